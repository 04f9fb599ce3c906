"""Parity and modular arithmetic: which mixers keep a state beyond the training length (arXiv 2411.12537, table 2)."""

from typing import Literal

from deltajax.data import formal
from deltajax.layers import attention, delta
from deltajax.layers import mixer as mixer_lib
from deltajax.models import lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig

Mixer = Literal["deltanet", "deltanet_negative", "deltaproduct", "gated_deltaproduct", "attention"]


def get_config(
    size: Literal["paper", "small"] = "small",
    task: Literal["parity", "arithmetic", "brackets"] = "parity",
    mixer: Mixer = "deltanet_negative",
) -> TrainConfig:
    """Trained on strings of up to 40 symbols, tested on up to 256 (`small`: 240)."""
    heads, head_dim = {"paper": (4, 32), "small": (4, 16)}[size]
    layers = {"paper": 2 if task == "parity" else 3, "small": 1 if task == "parity" else 2}[size]
    data = formal.Config(
        task=task,
        modulus={"paper": 5, "small": 3}[size],
        every_prefix=size == "small" and task != "brackets",
        seq_len=41,
        batch_size={"paper": 1024, "small": 64}[size],
        validation_examples=256,
        lengths=({"paper": 257, "small": 241}[size],),
        evaluation_examples={"paper": 4096, "small": 512}[size],
    )
    steps = {"paper": 100_000, "small": 300 if task == "parity" else 1000}[size]
    conv = 4 if size == "paper" or task != "parity" else 0
    mixers: dict[str, mixer_lib.Config] = {
        "deltanet": delta.Config(heads, head_dim, conv_width=conv),
        "deltanet_negative": delta.Config(heads, head_dim, beta_max=2.0, conv_width=conv),
        "deltaproduct": delta.deltaproduct(heads, head_dim, conv_width=conv),
        "gated_deltaproduct": delta.gated_deltaproduct(heads, head_dim, conv_width=conv),
        "attention": attention.Config(heads, head_dim),
    }
    return TrainConfig(
        model=lm.Config(
            vocab_size=len(data.symbols),
            d_model={"paper": 128, "small": 64}[size],
            pattern=("mixer",) * layers,
            mixers={"mixer": mixers[mixer]},
            mlp_dim={"paper": None, "small": 64}[size],
            tie_embeddings=False,
        ),
        data=data,
        steps=steps,
        optimizer={
            "paper": Optimizer(learning_rate=1e-3, weight_decay=0.01),
            "small": Optimizer(name="muon", learning_rate=1e-2, weight_decay=0),
        }[size],
        schedule=Schedule(warmup_steps=50, final_fraction=0.02),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=min(steps, 250)),
        log_every=50,
    )


def get_grid(size: Literal["paper", "small"] = "small") -> list[dict[str, list]]:
    """Every mixer on every language."""
    mixers = ["deltanet_negative", "deltanet", "deltaproduct", "gated_deltaproduct", "attention"]
    return [
        {"task": [task], "mixer": mixers, "config.seed": [0, 1, 2]} for task in ("parity", "arithmetic", "brackets")
    ]
