"""Massive activations while small models train: a Pythia-shaped family, its cures, and models of the delta rule.

Claim: the ratio of the largest to the median activation follows the five-parameter law of arXiv 2508.03616 in models trained
here, too; a pure DeltaNet, which has no softmax to dump attention in, is compared with attention at the same size.
Command: python -m deltajax.sweep --config=experiments/massive_activations.py --jobs=2
         python -m deltajax.massive_activations.study --runs=runs/massive_activations
Result: deltajax/massive_activations/RESULTS.md
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltajax import data
from deltajax.layers import attention, delta
from deltajax.models import gpt_neox, lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Probes, Schedule, TrainConfig

VOCAB = 257  # bytes and the token that begins a document


def _neox(layers: int, width: int, **fields: Any) -> gpt_neox.Config:
    """Heads of 16, of which 4 dimensions are rotated."""
    return gpt_neox.Config(VOCAB, width, layers, width // 16, **fields)


def _lm(pattern: Sequence[str], **mixers: Any) -> lm.Config:
    return lm.Config(VOCAB, 64, tuple(pattern), mixers, mlp_dim=192)


_DELTA = delta.deltanet(4, 16)
_ATTENTION = attention.Config(4, 16)
MODELS: dict[str, Callable[[], Any]] = {
    "neox-2x32": lambda: _neox(2, 32),
    "neox-4x32": lambda: _neox(4, 32),
    "neox-4x64": lambda: _neox(4, 64),
    "neox-6x48": lambda: _neox(6, 48),
    "neox-8x64": lambda: _neox(8, 64),
    "neox-14m": lambda: gpt_neox.pythia("14m", vocab_size=VOCAB),  # Pythia's smallest, on bytes: 1.2M parameters
    "neox-4x64-kv": lambda: _neox(4, 64, sink="kv"),
    "neox-4x64-one": lambda: _neox(4, 64, sink="one"),
    "neox-4x64-gated": lambda: _neox(4, 64, gated=True),
    "attention-4x64": lambda: _lm(["a"] * 4, a=_ATTENTION),
    "deltanet-4x64": lambda: _lm(["d"] * 4, d=_DELTA),
    "gated_deltanet-4x64": lambda: _lm(["g"] * 4, g=delta.gated_deltanet(4, 16)),
    "deltaproduct-4x64": lambda: _lm(["p"] * 4, p=delta.deltaproduct(4, 16)),
    "hybrid-4x64": lambda: _lm(["d", "a"] * 2, d=_DELTA, a=_ATTENTION),
}
# Names that end so train one of the models above in another way.
TRAINING: Mapping[str, dict[str, Any]] = {
    "-decay0": {"optimizer": {"weight_decay": 0.0}},
    "-constant": {"schedule": {"decay": "constant"}},
}
SEEDED = ("neox-4x64", "attention-4x64", "deltanet-4x64")  # those with three seeds


def get_grid() -> list[dict[str, Any]]:
    """All models once, three of them with three seeds, and one of these without weight decay and at a constant rate."""
    others = [name for name in MODELS if name not in SEEDED] + [SEEDED[0] + suffix for suffix in TRAINING]
    return [{"model": SEEDED, "seed": range(3)}, {"model": others, "seed": [0]}]


def get_config(model: str = SEEDED[0], seed: int = 0, steps: int | None = None) -> TrainConfig:
    """One run: 1,024 bytes a step of the standard library's source; 1,200 steps, of the largest model 4,000."""
    steps = steps or (4000 if model == "neox-14m" else 1200)
    base, changes = model, {}
    for suffix in TRAINING:
        if model.endswith(suffix):
            base, changes = model.removesuffix(suffix), TRAINING[suffix]
    if base not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {base!r}")
    config = TrainConfig(
        model=MODELS[base](),
        data=data.Config(corpus="stdlib", seq_len=128, batch_size=8, validation_fraction=0.02, seed=seed),
        steps=steps,
        seed=seed,
        optimizer=Optimizer(learning_rate=3e-3),
        schedule=Schedule(warmup_steps=min(100, steps - 1)),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=steps, batches=40),
        probes=Probes(every=50),
    )
    parts = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(config, **parts)
