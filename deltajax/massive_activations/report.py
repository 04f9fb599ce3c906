"""One page of HTML on the massive activations of a run: `python -m deltajax.massive_activations.report --workdir=runs/mine`.

From the log of its probes (`--config.probes.every=N`): trajectories with fits, and their numbers. From its last checkpoint: |h|
over token and channel, and what happens when massive values are overwritten. A run that lacks one of them, because it was made
without probes or stopped early, gets the other part. Pictures are inside the page.
"""

import base64
import html
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from deltajax import cli

if TYPE_CHECKING:
    from deltajax.massive_activations.fit import Estimate, Fit
    from deltajax.massive_activations.trained import Trained
    from deltajax.massive_activations.trajectories import Trajectories

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 13px; }}
th, td {{ border: 1px solid #ccc; padding: .2rem .5rem; text-align: right; }}
th {{ background: #f3f3f3; }} td:first-child, th:first-child {{ text-align: left; }}
img {{ max-width: 100%; }} .open {{ color: #999; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def page(workdir: Path, batches: int = 10, top: int = 5) -> str:
    """The page.

    Args:
      batches: of validation data, for the interventions.
      top: values per sequence that they overwrite.

    Raises:
      RunError: neither a log of probes nor a checkpoint that can be read.
      ValueError: a log that is no table, or a model without residual stream.
    """
    from deltajax.errors import RunError
    from deltajax.massive_activations import trained, trajectories

    parts, no_log = [], None
    try:
        log = trajectories.of_run(workdir)
    except FileNotFoundError as error:
        no_log = error
        parts.append(_lacking("Over training", error))
    else:
        probed = f"{len(log.steps)} blocks, probed at {max(map(len, log.steps.values()))} steps"
        parts += [f"<p>{probed}.</p>", _massive(log), *_of_trajectories(log)]
    try:
        model = trained.load(workdir, batches)
    except RunError as error:
        if no_log is not None:
            raise RunError(f"{error}; {no_log}") from None
        parts.append(_lacking("The model", error))
    else:
        kind = type(model.config).__module__.rpartition(".")[2]
        parts += [f"<h2>The model</h2><p>{kind}, {model.step} steps.</p>", *_of_model(model, top)]
    return _PAGE.format(title=f"Massive activations of {html.escape(workdir.resolve().name)}", body="\n".join(parts))


def _lacking(title: str, error: Exception) -> str:
    return f"<h2>{title}</h2><p>Nothing to show: {html.escape(str(error))}.</p>"


def _massive(log: "Trajectories") -> str:
    """By the base paper's test on the last row of each block."""
    if not {"top1", "median"} <= log.values.keys():
        return ""
    last = {layer: (of[-1], log.values["median"][layer][-1]) for layer, of in log.values["top1"].items()}
    found = [str(layer) for layer, (largest, median) in last.items() if largest > 100 and largest > 1000 * median]
    magnitudes = [x for x, _ in last.values()]
    largest = math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes)
    verdict = f"Massive in blocks {', '.join(found)}" if found else "None is massive"
    return (
        f"<p><b>{verdict}</b> by the test of arXiv 2402.17762 (above 100 and above 1,000 times the median); the largest mean "
        f"of maxima at the end is {largest:.3g}. Models that are small or trained briefly show little of what large ones do.</p>"
    )


def _of_trajectories(log: "Trajectories") -> Iterable[str]:
    from deltajax.massive_activations import figures
    from deltajax.massive_activations.fit import PARAMETERS

    found = log.fits()
    drawing, axes = figures.plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    figures.trajectories(axes[0], log, found)
    axes[0].legend(fontsize=7, ncols=2)
    share = log.values.get("first_token_share", {})
    for layer, of in share.items():
        axes[1].plot(log.steps[layer] + 1, of, color=figures.depth_color(layer, len(share)))
    axes[1].set(xscale="log", xlabel="step + 1", ylabel="attention on the first token")
    axes[1].set_ylim(bottom=0)
    yield "<h2>Over training</h2><p>Largest over median magnitude of every block's output: measured, and the law</p>"
    yield _image(drawing)
    head = ["block", "kind", *PARAMETERS, "peak at step", "R2", "AIC", "best rival by AIC"]
    yield (
        "<p>A exp(-&lambda;x) log(x) + K, x = &gamma;t + t0, with 95 % intervals; a number in grey is that of the best curve, "
        "which the data leave open (why: hover over it).</p>"
    )
    yield _table(head, [_row(layer, fit) for layer, fit in found.items()])


def _row(layer: int, fit: "Fit") -> list[str]:
    from deltajax.massive_activations.fit import PARAMETERS

    if fit.score is None:
        return [str(layer), html.escape(fit.problem), *[""] * (len(PARAMETERS) + 4)]
    rival = min(fit.rivals, key=lambda name: fit.rivals[name].aic)
    cells = [_estimate(fit.estimates[name], fit.parameters.get(name)) for name in (*PARAMETERS, "peak_step")]
    rival_text = f"{rival.replace('_', ' ')}, {fit.rivals[rival].aic:.0f}"
    return [str(layer), fit.kind, *cells, f"{fit.score.r2:.3f}", f"{fit.score.aic:.0f}", rival_text]


def _estimate(estimate: "Estimate", of_curve: float | None) -> str:
    if estimate.value is not None:
        return f"{estimate.value:.3g}<br>[{estimate.low:.3g}, {estimate.high:.3g}]"
    shown = "open" if of_curve is None else f"{of_curve:.3g}"
    return f'<span class="open" title="{html.escape(estimate.problem)}">{shown}</span>'


def _of_model(model: "Trained", top: int) -> Iterable[str]:
    from deltajax.massive_activations import figures, intervene, surface

    layer, magnitude = surface.magnitudes(model.sums, model.params, model.batches[0])
    drawing, axes = figures.plt.subplots(figsize=(6.5, 4.5), subplot_kw={"projection": "3d"}, layout="constrained")
    figures.surface(axes, magnitude)
    yield f"<h3>|h| after block {layer}</h3><p>Of the sequence of the validation text that holds the largest value</p>"
    yield _image(drawing)
    found = intervene.losses(model.sums, model.params, model.batches, range(model.blocks), top)
    yield (
        f"<h3>Interventions</h3><p>Loss when the {top} largest values of each sequence are overwritten after one block. Large "
        "models break when they are zero and do not care when they are their mean.</p>"
    )
    head = ["block", "untouched", "set to zero", "set to their mean", "neighbours to zero"]
    rows = [
        [
            str(n),
            f"{of['none']:.4f}",
            *(f"{of[mode]:.4f} ({of[mode] - of['none']:+.4f})" for mode in intervene.MODES[1:]),
        ]
        for n, of in found.items()
    ]
    yield _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _image(drawing: Any) -> str:
    from deltajax.massive_activations import figures

    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110)
    figures.plt.close(drawing)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_string("workdir", None, "workdir of a training run", flag_values=values)
    flags.DEFINE_string("out", None, "the page; default: massive_activations.html in the workdir", flag_values=values)
    flags.DEFINE_integer("batches", 10, "validation batches for the interventions", 1, flag_values=values)
    flags.DEFINE_integer("top", 5, "values per sequence that they overwrite", 1, flag_values=values)

    def action(_: Mapping[str, str]) -> None:
        if not values.workdir:
            raise ValueError("--workdir: the workdir of a training run is missing")
        out = Path(values.out or Path(values.workdir) / "massive_activations.html")
        text = page(Path(values.workdir), values.batches, values.top)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
        print(out)

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
