"""Figures of massive activations; each function draws on axes that it is given."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float

from deltajax.massive_activations.fit import PARAMETERS, Fit
from deltajax.massive_activations.trajectories import Trajectories

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = Mapping[str, str]


def depth_color(layer: int, layers: int) -> Any:
    """From the first block, dark, to the last."""
    return plt.get_cmap("viridis")(0.9 * layer / max(layers - 1, 1))


def trajectories(axes: Any, table: Trajectories, fits: Mapping[int, Fit], statistic: str = "ratio") -> None:
    """A statistic per block over training, points, with the law fitted to it, lines; steps on a logarithmic scale."""
    for layer, steps in table.steps.items():
        color = depth_color(layer, len(table.steps))
        axes.plot(steps + 1, table.values[statistic][layer], ".", color=color, markersize=3, alpha=0.6)
        if layer in fits and not fits[layer].problem:
            fine = np.geomspace(1, steps.max() + 1, 300) - 1
            axes.plot(fine + 1, fits[layer].curve(fine), color=color, linewidth=1.2)
        axes.plot([], [], color=color, label=f"block {layer}")
    axes.set(xscale="log", xlabel="step + 1", ylabel=statistic, title=table.model)
    axes.grid(alpha=0.3)


def surface(axes: Any, magnitude: Float[np.ndarray, "T D"], title: str = "") -> None:
    """|h| of one sequence over token and channel; on axes with projection="3d"."""
    token, channel = np.meshgrid(np.arange(magnitude.shape[0]), np.arange(magnitude.shape[1]), indexing="ij")
    axes.plot_surface(token, channel, magnitude, cmap="viridis", rcount=128, ccount=128, linewidth=0)
    axes.set(xlabel="token", ylabel="channel", zlabel="|h|", title=title)
    axes.view_init(elev=28, azim=-55)


def depth(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Parameters of the law against relative depth, one of the axes each; filled where the data identify them.

    Args:
      rows: of a table of fits, see `fits.COLUMNS`.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    for axis, name in zip(axes, PARAMETERS, strict=True):
        for i, model in enumerate(models):
            chosen = [row for row in rows if row["model"] == model and row[name]]
            x = [(int(row["layer"]) + 1) / int(row["layers"]) for row in chosen]
            y = [abs(float(row[name])) for row in chosen]
            face = [f"C{i % 10}" if row[f"{name}_low"] else "none" for row in chosen]
            axis.plot(x, y, color=f"C{i % 10}", linewidth=0.5, alpha=0.5)
            axis.scatter(x, y, s=16, facecolors=face, edgecolors=f"C{i % 10}", linewidths=0.8, label=model)
        axis.set(xlabel="block / blocks", title=f"|{name}|" if name in "AK" else name, yscale="log")
        axis.grid(alpha=0.3)


def scores(axes: Any, rows: Sequence[Row]) -> None:
    """Best R2 of each parameter in both splits, with the estimator's name; bars end at -1.

    Args:
      rows: of a table of scores, see `predict.COLUMNS`.
    """
    splits = list(dict.fromkeys(row["split"] for row in rows))
    names = list(dict.fromkeys(row["parameter"] for row in rows))
    for i, split in enumerate(splits):
        for j, name in enumerate(names):
            of_cell = [row for row in rows if row["parameter"] == name and row["split"] == split]
            row = max(of_cell, key=lambda row: np.nan_to_num(float(row["r2"]), nan=-np.inf))
            r2 = float(row["r2"])
            x = j + (i - 0.5) * 0.38
            axes.bar(x, max(r2, -1), 0.36, color=f"C{i}", label=split if j == 0 else None)
            label = f"{row['estimator']} {r2:.2f}"
            axes.annotate(label, (x, max(r2, 0) + 0.03), rotation=90, fontsize=7, ha="center", va="bottom")
    axes.set(xticks=range(len(names)), xticklabels=names, ylim=(-1.05, 1.9), ylabel="R2 of rows held out")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.3, axis="y")


def importance(axes: Any, rows: Sequence[Row]) -> None:
    """How far R2 falls when features are permuted: parameters against groups of features.

    Args:
      rows: columns parameter, estimator, features, fall.
    """
    names = list(dict.fromkeys(row["parameter"] for row in rows))
    groups = list(dict.fromkeys(row["features"] for row in rows))
    falls = {(row["parameter"], row["features"]): float(row["fall"]) for row in rows}
    image = np.array([[falls[name, group] for group in groups] for name in names])
    axes.imshow(np.clip(image, 0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in np.ndindex(image.shape):
        color = "white" if image[i, j] > 0.6 else "black"
        axes.annotate(f"{image[i, j]:.2f}", (j, i), ha="center", va="center", fontsize=7, color=color)
    axes.set(yticks=range(len(names)), yticklabels=names, xticks=range(len(groups)), title="fall of R2 when permuted")
    axes.set_xticklabels(groups, rotation=35, ha="right", fontsize=8)
