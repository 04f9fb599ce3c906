"""Delta activations over the tokens of a DeltaNet: operation sparsity against bits per byte (arXiv 2107.07305).

First the baselines, then their refinement:

    python -m deltajax.sweep --config=experiments/delta_language.py --grid=seed=0,1,2 --workdir=runs/delta_language_base \\
        --csv=docs/results/delta_language_base.csv &&
    python -m deltajax.sweep --config=experiments/delta_language.py --csv=docs/results/delta_language.csv

Time: the baselines 2 to 3 minutes each, refinements half a minute to one, on two busy cores.
Result: docs/results/delta_language.csv and RESULTS.md.
"""

from deltajax import data
from deltajax.layers import delta, delta_activation
from deltajax.models import delta_lm, lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Sampling, Schedule, TrainConfig
from deltajax.training.reports import Claim, Report, Table, Tradeoff
from deltajax.training.results import ANY


def get_config(seed: int = 0, rate: float = -1.0, baselines: str = "runs/delta_language_base") -> TrainConfig:
    """rate -1: the baseline, without delta activations; else goes on from the one of the same seed."""
    refined = rate >= 0
    steps = 200 if refined else 400
    return TrainConfig(
        model=delta_lm.Config(
            lm.Config(
                vocab_size=257, d_model=64, pattern=("deltanet",) * 2, mixers={"deltanet": delta.deltanet(4, 16)}
            ),
            delta_activation.Config(init_step=0.1) if refined else None,
            rate=max(rate, 0.0),
        ),
        data=data.Config(seq_len=128, batch_size=16, validation_fraction=0.02),
        steps=steps,
        seed=seed,
        init_from=f"{baselines}/seed={seed}" if refined else "",
        optimizer=Optimizer(learning_rate=1e-3 if refined else 3e-3, weight_decay=1e-2),
        schedule=Schedule(warmup_steps=20, final_fraction=0.05),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=steps, batches=64),
        log_every=50,
        prompt="def ",
        sampling=Sampling(max_tokens=64),
    )


def get_grid() -> dict[str, list]:
    """Five rates, three seeds; at rate 0 steps follow the text's loss alone."""
    return {"rate": [0.0, 1e-4, 1e-3, 3e-3, 1e-2], "seed": [0, 1, 2]}


def get_report() -> Report:
    """Sparsity against bits per byte."""
    metrics = ["bits_per_byte", "spatial_sparsity", "temporal_sparsity"]
    return Report(
        title="Delta activations in a DeltaNet language model",
        text=TEXT,
        claims=[
            Claim(
                "The penalty raises operation sparsity over the tokens (rate 1e-3 against 0).",
                {
                    "1e-3": {"rate": 1e-3, "metric": "temporal_sparsity"},
                    "0": {"rate": 0, "metric": "temporal_sparsity"},
                },
                lambda high, low: high > low + 0.1,
            )
        ],
        tables=[
            Table(
                "After refinement, and before it.",
                ["rate"],
                ["metric"],
                where={"metric": metrics, "set": ["", "validation"]},
                labels={"": "before"},
            )
        ],
        figures=[
            Tradeoff(
                "tradeoff",
                "Bits per byte against the share of products saved, a point a run; a line through the medians of the rates.",
                {"temporal_sparsity": "share of operations: unchanged elements"},
                "bits_per_byte",
                {"before": {"rate": ""}, "refined": {"rate": ANY}},
                "rate",
            )
        ],
        also=["delta_language_base"],
    )


TEXT = """
Claim (ours): where a mixer or a SwiGLU layer reads the stream of a DeltaNet, delta activations over tokens save products, as they
do over the frames of a video.

Command: see `experiments/delta_language.py`.

Result: the table. At rate 0 steps follow the text's loss alone. Baselines are 200 steps of training shorter and have no delta
activations. Tokens do not resemble their neighbours as frames do: what the penalty saves is paid in bits, at every rate.
"""
