"""Configurations from the papers, by name: `named.get("deltanet-1.3b")`.

Vocabulary 32,000 and tied embeddings, by which the sizes in the names come out; SwiGLU of 8/3 d rounded up to a multiple of
256. One name does not match its count: "deltaproduct-340m" with the published width 1024 and 6 heads of 128 has 392M
parameters (4 heads would give 341M).
"""

import difflib
import functools
from collections.abc import Callable

from deltajax.layers import attention, delta, mixer
from deltajax.models import lm

WINDOW = 2048  # tokens of the sliding-window layers of the DeltaNet paper's hybrids


def _build(d_model: int, pattern: tuple[str, ...], **mixers: mixer.Config) -> lm.Config:
    mlp_dim = -(-(8 * d_model // 3) // 256) * 256
    return lm.Config(
        vocab_size=32000,
        d_model=d_model,
        pattern=pattern,
        mixers=mixers,
        mlp_dim=mlp_dim,
        dtype="bfloat16",
        remat="full",
    )


def _transformer(d_model: int) -> lm.Config:
    """Transformer++: rotary attention with heads of 64, SwiGLU, RMSNorm."""
    return _build(d_model, ("attention",) * 24, attention=attention.Config(d_model // 64, 64))


def _deltanet(d_model: int, pattern: tuple[str, ...] = ("delta",) * 24) -> lm.Config:
    """DeltaNet and its hybrids (arXiv 2406.06484, section 4): 24 layers, heads of 128."""
    choices: dict[str, mixer.Config] = {
        "delta": delta.deltanet(d_model // 128, 128),
        "window": attention.Config(d_model // 64, 64, window=WINDOW),
        "global": attention.Config(d_model // 64, 64),
    }
    return _build(d_model, pattern, **{name: choices[name] for name in sorted(set(pattern))})


def _deltaproduct(d_model: int, heads: int, gated: bool) -> lm.Config:
    """DeltaProduct with R = 3 (arXiv 2502.10297): 24 layers, heads of 128; gated: with forget gate and output gate."""
    config = (delta.gated_deltaproduct if gated else delta.deltaproduct)(heads, 128, num_householder=3)
    return _build(d_model, ("delta",) * 24, delta=config)


def _two_global(layers: int = 24) -> tuple[str, ...]:
    """The second layer and the one after the middle are global attention."""
    return tuple("global" if i in (1, layers // 2) else "delta" for i in range(layers))


_SIZES = {"340m": 1024, "1.3b": 2048}
NAMED: dict[str, Callable[[], lm.Config]] = {
    "gated-deltanet-1.3b": functools.partial(
        _build,  # arXiv 2412.06464: 6 heads of 256, values twice as wide
        2048,
        ("delta",) * 21,
        delta=delta.gated_deltanet(6, 256, value_head_dim=512),
    ),
    "kda-340m": functools.partial(_build, 1024, ("delta",) * 24, delta=delta.kda(8, 128)),
}
for _size, _d in _SIZES.items():
    NAMED[f"transformer++-{_size}"] = functools.partial(_transformer, _d)
    NAMED[f"deltanet-{_size}"] = functools.partial(_deltanet, _d)
    NAMED[f"deltanet-window-{_size}"] = functools.partial(_deltanet, _d, ("delta", "window") * 12)
    NAMED[f"deltanet-global-{_size}"] = functools.partial(_deltanet, _d, _two_global())
for _size, _d, _heads in (("213m", 768, 4), ("340m", 1024, 6), ("805m", 1536, 8)):
    for _prefix, _gated in (("", False), ("gated-", True)):
        NAMED[f"{_prefix}deltaproduct-{_size}"] = functools.partial(_deltaproduct, _d, _heads, _gated)


def get(name: str) -> lm.Config:
    """The configuration of this name.

    Raises:
      ValueError: no such name; the message gives the nearest.
    """
    if name not in NAMED:
        nearest = difflib.get_close_matches(name, NAMED, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"model {name!r} is not known{hint} (known: {', '.join(sorted(NAMED))})")
    return NAMED[name]()
