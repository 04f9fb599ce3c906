"""Overwrite massive activations at one block of a trained model, and see what that does to its loss (arXiv 2402.17762).

    python -m deltajax.massive_activations.intervene --workdir=runs/mine --layer=2
    python -m deltajax.massive_activations.intervene --checkpoint=pythia-410m --text=FILE

The first takes a run of ours and its validation data, the second a GPT-NeoX directory of Hugging Face's and a text.
The paper found of large models: setting them to zero destroys the model, setting them to their mean changes nothing: they are
constants that the model needs.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Bool, Float, Int

from deltajax import cli
from deltajax.massive_activations import tables
from deltajax.ops import taps
from deltajax.ops.activation_statistics import padding_mask

Mode = Literal["none", "zero", "mean", "neighbours"]
MODES: tuple[Mode, ...] = ("none", "zero", "mean", "neighbours")
COLUMNS = ("model", "layer", "top", "mode", "loss", "change")


def massive(x: Float[Array, "B ... D"], top: int, mask: Bool[Array, "B ..."] | None = None) -> Bool[Array, "B ... D"]:
    """Select exactly `top` values of each sequence, those of largest magnitude; of equals the first.

    Args:
      mask: which positions count, x's shape without channels; None: all. Where fewer values than `top`
        count, these are selected.

    Raises:
      ValueError: `top` is not an integer from 1 to the number of values of a sequence.
    """
    magnitude = jnp.abs(x.astype(jnp.float32)).reshape(x.shape[0], -1)
    if not isinstance(top, int | np.integer) or isinstance(top, bool) or not 1 <= top <= magnitude.shape[1]:
        raise ValueError(
            f"top must be an integer from 1 to {magnitude.shape[1]}, the values of a sequence, got {top!r}"
        )
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must have the shape of activations without channels, {x.shape[:-1]}, got {mask.shape}")
    counted = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask[..., None], x.shape)
    largest = jax.lax.top_k(jnp.where(counted.reshape(magnitude.shape), magnitude, -1), int(top))[1]
    chosen = jnp.put_along_axis(jnp.zeros(magnitude.shape, bool), largest, True, axis=1, inplace=False)
    return chosen.reshape(x.shape) & counted


def overwrite(
    x: Float[Array, "B ... D"],
    mode: Mode,
    top: int,
    mean: Float[Array, "D"] | None = None,
    mask: Bool[Array, "B ..."] | None = None,
) -> Float[Array, "B ... D"]:
    """Replace the `massive` values of activations.

    Args:
      mode: "zero": by 0; "mean": by `mean` of their channel; "neighbours", a control: the channel beside each is set to 0
        instead, at the same positions; "none": nothing.
      top: values per sequence.
      mean: see `channel_means`.
      mask: as in `massive`.

    Raises:
      ValueError: an unknown mode, or "mean" without `mean`.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return x
    chosen = massive(x, top, mask)
    if mode == "neighbours" and x.shape[-1] == 1:
        raise ValueError("mode 'neighbours' needs at least 2 channels, got 1")
    if mode == "neighbours":
        chosen = jnp.roll(chosen, 1, axis=-1)
    if mode != "mean":
        return jnp.where(chosen, 0, x)
    if mean is None:
        raise ValueError("mode 'mean' needs the means of the channels")
    return jnp.where(chosen, mean.astype(x.dtype), x)


def intervened(f: Callable, layer: int | Int[Array, ""], change: Callable[[Array], Array]) -> Callable:
    """Return `f` with the residual stream after block `layer` (from 0) replaced by `change` of it.

    Args:
      f: tags its blocks' outputs "residual" (see `ops.taps`).
      layer: may be traced; then the caller checks that there is such a block.

    Raises (when the result is called):
      ValueError: there is no such block.
    """
    replaced = taps.replace(f, {"residual": lambda x, place: jnp.where(place == layer, change(x), x)})

    def call(*args):
        if not isinstance(layer, jax.Array):
            check_layers([layer], taps.tags(f, *args).count("residual"))
        return replaced(*args)

    return call


def check_layers(layers: Sequence[Any], blocks: int) -> None:
    """Raise a ValueError unless every layer is the number of a block, from 0."""
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 <= layer < blocks:
            raise ValueError(f"layer must be a block's number, 0 to {blocks - 1}, got {layer!r}")


def channel_means(f: Callable, params: Any, batches: Iterable[Any], top: int) -> Float[np.ndarray, "layers D"]:
    """Average the `massive` values of each block and channel over all batches, sign included; 0 where a channel has none.

    Args:
      f: (params, batch) -> anything; tags its blocks' outputs "residual".
      batches: their padding does not count, where they have `segment_ids` (see `padding_mask`).

    Raises:
      ValueError: there is no batch.
    """

    @jax.jit
    def run(params, batch):
        def probe(x: Array) -> tuple[Array, Array]:
            chosen, axes = massive(x, top, _mask(batch)), tuple(range(x.ndim - 1))
            return jnp.sum(jnp.where(chosen, x.astype(jnp.float32), 0), axes), jnp.sum(chosen, axes)

        return taps.capture(f, {"residual": probe})(params, batch)[1]["residual"]

    parts = [jax.device_get(run(params, batch)) for batch in batches]
    if not parts:
        raise ValueError("batches must hold at least one batch, got none")
    totals, counts = (np.sum(part, axis=0) for part in zip(*parts, strict=True))
    return totals / np.maximum(counts, 1)


def losses(
    sums: Callable[[Any, Any], dict[str, Array]],
    params: Any,
    batches: Iterable[Any],
    layers: Sequence[int],
    top: int,
) -> dict[int, dict[Mode, float]]:
    """Compute the mean loss over batches in each mode, for each of these blocks.

    Args:
      sums: (params, batch) -> {"loss", "weight"}, sums over the batch; tags its blocks' outputs "residual".
      batches: read once; padding is never overwritten, see `channel_means`.
      layers: blocks, from 0.
      top: values per sequence that are overwritten.

    Raises:
      ValueError: there is no such block, no batch, or nothing in the batches has a weight.
    """
    if not len(layers):
        raise ValueError("layers must name at least one block, got none")
    batches = list(batches)
    means = jnp.asarray(channel_means(sums, params, batches, top))
    check_layers(layers, len(means))

    @jax.jit
    def run(params, batch, layer, mode):
        mean, mask = means[layer], _mask(batch)
        choices = [functools.partial(overwrite, mode=name, top=top, mean=mean, mask=mask) for name in MODES]
        return intervened(sums, layer, lambda x: jax.lax.switch(mode, choices, x))(params, batch)

    def mean_loss(layer: int, mode: Mode) -> float:
        parts = [jax.device_get(run(params, batch, layer, MODES.index(mode))) for batch in batches]
        total = {name: np.sum([part[name] for part in parts], dtype=np.float64) for name in ("loss", "weight")}
        if not total["weight"]:
            raise ValueError("batches must hold targets with a weight, got none")
        return float(total["loss"] / total["weight"])

    untouched = mean_loss(0, "none")
    return {layer: {m: untouched if m == "none" else mean_loss(layer, m) for m in MODES} for layer in layers}


def _mask(batch: Any) -> Array | None:
    return padding_mask(batch) if isinstance(batch, Mapping) else None


def rows(model: str, found: dict[int, dict[Mode, float]], top: int) -> list[dict[str, object]]:
    """What `losses` found, a row per block and mode, as COLUMNS."""
    return [
        dict(zip(COLUMNS, (model, layer, top, mode, f"{x:.5f}", f"{x - of_layer['none']:+.5f}"), strict=True))
        for layer, of_layer in found.items()
        for mode, x in of_layer.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_string("workdir", None, "workdir of a training run", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "a GPT-NeoX directory in place of a run", flag_values=values)
    flags.DEFINE_string("text", None, "text file to run it on", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "'byte' or a tokenizer.json; default: the checkpoint's", flag_values=values)
    flags.DEFINE_integer("length", 512, "tokens of each of its sequences", 1, flag_values=values)
    flags.DEFINE_integer("layer", None, "block, from 0; default: all of them", 0, flag_values=values)
    flags.DEFINE_integer("top", 5, "values per sequence that are overwritten", 1, flag_values=values)
    flags.DEFINE_integer("batches", 10, "validation batches of a run, or sequences of the text", 1, flag_values=values)
    flags.DEFINE_string("csv", None, "write the table to this file", flag_values=values)

    def action(_: dict[str, str]) -> None:
        from deltajax.massive_activations import trained  # here, so that Ctrl-C while it is imported is one line too

        if (values.workdir is None) == (values.checkpoint is None):
            raise ValueError("give either --workdir or --checkpoint")
        if values.workdir:
            model = trained.load(values.workdir, values.batches)
        elif not values.text:
            raise ValueError("--text: a text file is missing")
        else:
            text = Path(values.text).read_bytes()
            model = trained.load_directory(values.checkpoint, text, values.tokenizer, values.batches, values.length)
        if values.layer is not None and values.layer >= model.blocks:
            raise ValueError(f"--layer={values.layer}: the model has {model.blocks} blocks, 0 to {model.blocks - 1}")
        layers = range(model.blocks) if values.layer is None else [values.layer]
        table = rows(model.name, losses(model.sums, model.params, model.batches, layers, values.top), values.top)
        width = max(len(model.name), 6) + 2
        for name, *cells in (COLUMNS, *(row.values() for row in table)):
            print(f"{name:<{width}}" + "".join(f"{cell!s:<12}" for cell in cells).rstrip())
        if values.csv:
            tables.write(values.csv, COLUMNS, table)

    return cli.run(action, values, __doc__ or "", argv, result_is_printed=True)


if __name__ == "__main__":
    sys.exit(main())
