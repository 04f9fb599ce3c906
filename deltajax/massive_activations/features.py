"""What a predictor knows of a block before training: numbers of its architecture and its depth (arXiv 2508.03616)."""

import dataclasses
import re
from typing import Any

import numpy as np
from jaxtyping import Float

from deltajax.errors import check_integers, check_types

# Name -> (l, L, d, H, d_ff, rotary base, rotary fraction) -> value; l is the block, from 1.
_DEPTH = {
    "l/L": lambda a, l: l / a.layers,
    "(l/L)^2": lambda a, l: (l / a.layers) ** 2,
    "(l/L)^3": lambda a, l: (l / a.layers) ** 3,
    "sqrt(l/L)": lambda a, l: (l / a.layers) ** 0.5,
    "l L": lambda a, l: l * a.layers,
}
_SHAPE = {
    "H/d": lambda a: a.num_heads / a.d_model,
    "d_ff/d": lambda a: a.mlp_dim / a.d_model,
    "d/L": lambda a: a.d_model / a.layers,
    "H/L": lambda a: a.num_heads / a.layers,
    "log d": lambda a: np.log(a.d_model),
    "rotary base": lambda a: a.rotary_base,
    "rotary fraction": lambda a: a.rotary_fraction,
}
FEATURES = (*_DEPTH, *_SHAPE)
# What is permuted together: one number of depth tells the others.
GROUPS = {"depth": tuple(_DEPTH)} | {name: (name,) for name in _SHAPE}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model, as far as the predictor looks.

    Attributes:
      layers: blocks.
      d_model: width of the residual stream.
      num_heads: heads of each mixer; the most, where they differ.
      mlp_dim: hidden width of the feed-forward layers.
      rotary_base: of the rotary frequencies; 0 without attention that rotates.
      rotary_fraction: part of each head that is rotated.
    """

    layers: int
    d_model: int
    num_heads: int
    mlp_dim: int
    rotary_base: float = 10000.0
    rotary_fraction: float = 0.25

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "layers", "d_model", "num_heads", "mlp_dim")

    def features(self, layer: int) -> Float[np.ndarray, "features"]:
        """FEATURES of a block, from 0.

        Raises:
          ValueError: there is no such block.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer must be in 0 to {self.layers - 1}, got {layer}")
        return np.array([f(self, layer + 1) for f in _DEPTH.values()] + [f(self) for f in _SHAPE.values()], np.float64)


def of_config(model: Any) -> Architecture:
    """Of the config of one of our language models.

    Raises:
      ValueError: it is not one.
    """
    from deltajax.models import gpt_neox, lm

    if isinstance(model, gpt_neox.Config):
        return Architecture(
            model.num_layers, model.d_model, model.num_heads, model.hidden_dim, model.rotary_base, model.rotary_fraction
        )
    if isinstance(model, lm.Config):
        mixers = [model.mixers[name] for name in model.pattern]
        heads = max(getattr(mixer, "num_heads", 1) for mixer in mixers)
        base = max((getattr(mixer, "rope_base", None) or 0.0 for mixer in mixers), default=0.0)
        fraction = max((getattr(mixer, "rope_fraction", 0.0) for mixer in mixers), default=0.0) if base else 0.0
        return Architecture(len(model.pattern), model.d_model, heads, model.hidden_dim, base, fraction)
    raise ValueError(
        f"{type(model).__module__}.{type(model).__name__}: must be a config of models.lm or models.gpt_neox"
    )


def of_name(name: str) -> Architecture:
    """Of a Pythia model by any name that holds its size, such as "pythia-410m" or "EleutherAI/pythia-1.4b-deduped".

    Raises:
      ValueError: no size, or none of theirs.
    """
    from deltajax.models import gpt_neox

    match = re.search(r"(?<![\d.])(\d+(?:\.\d+)?[mb])(?![a-z])", name.lower())
    if not match or match[1] not in gpt_neox.PYTHIA:
        raise ValueError(f"model {name!r}: is not one of Pythia's ({', '.join(gpt_neox.PYTHIA)})")
    return of_config(gpt_neox.pythia(match[1]))


def parse(flag: str, text: str) -> Architecture:
    """Of what a flag says: a Pythia model's name, or fields as layers=4,d_model=64,...

    Raises:
      ValueError: it says neither; the flag is named.
    """
    if "=" not in text:
        return of_name(text)
    known = {field.name: field for field in dataclasses.fields(Architecture)}
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise ValueError(f"{flag}={text}: {name!r} is not one of {', '.join(known)}")
        try:
            given[name] = int(value) if known[name].type is int else float(value)
        except ValueError:
            raise ValueError(f"{flag}={text}: {value!r} is not a number") from None
    missing = [n for n, field in known.items() if field.default is dataclasses.MISSING and n not in given]
    if missing:
        raise ValueError(f"{flag}={text}: {missing[0]} is missing")
    return Architecture(**given)
