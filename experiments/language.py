"""Language modelling at equal parameters and tokens: loss, and loss by position to 8 times the training context.

Claim (arXiv 2406.06484, 2412.06464, 2502.10297): at equal size and tokens DeltaNet equals Transformer++, hybrids and gates
are better than either, more Householder steps help, and gated models extrapolate best to longer contexts.

Command: `python -m deltajax.sweep --config=experiments/language.py --jobs=2 --csv=docs/results/language.csv`

Time: 1 to 2 minutes a member on one idle core; the whole grid, 27 members, takes about 20 minutes on two.

Result: gates and Householder steps help, and Gated DeltaProduct with R = 3 is best; all recurrent models extrapolate to 8 times
the context. At this size DeltaNet is worse than Transformer++, and of the hybrids only that with a sliding window is better.
"""

import dataclasses
from typing import Literal, get_args

from deltajax import data
from deltajax.layers import attention, delta
from deltajax.layers import mixer as mixer_lib
from deltajax.models import lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig
from deltajax.training.reports import Claim, Curves, Report, Table, told

Model = Literal[
    "transformer",
    "deltanet",
    "gated_deltanet",
    "deltaproduct_2",
    "deltaproduct_3",
    "deltanet_window",
    "deltanet_global",
    "gated_deltaproduct_2",
    "gated_deltaproduct_3",
]
NAMES = {
    "transformer": "Transformer++",
    "deltanet": "DeltaNet",
    "gated_deltanet": "Gated DeltaNet",
    "deltaproduct_2": "DeltaProduct, R = 2",
    "deltaproduct_3": "DeltaProduct, R = 3",
    "deltanet_window": "DeltaNet + sliding window",
    "deltanet_global": "DeltaNet + 2 global layers",
    "gated_deltaproduct_2": "Gated DeltaProduct, R = 2",
    "gated_deltaproduct_3": "Gated DeltaProduct, R = 3",
}


def get_config(size: Literal["paper", "small"] = "small", model: Model = "deltanet") -> TrainConfig:
    """The standard library of the running Python, byte by byte (`paper`: give --config.data.corpus and a tokenizer)."""
    d_model, layers, head_dim = {"paper": (1024, 24, 128), "small": (64, 4, 16)}[size]
    seq_len = {"paper": 2048, "small": 128}[size]
    heads = d_model // head_dim
    mixers: dict[str, mixer_lib.Config] = {
        "transformer": attention.Config(heads, head_dim),
        "window": attention.Config(heads, head_dim, window=seq_len // 2),
        "deltanet": delta.deltanet(heads, head_dim),
        "gated_deltanet": delta.gated_deltanet(heads, head_dim),
        "deltaproduct_2": delta.deltaproduct(heads, head_dim, num_householder=2),
        "deltaproduct_3": delta.deltaproduct(heads, head_dim, num_householder=3),
        "gated_deltaproduct_2": delta.gated_deltaproduct(heads, head_dim, num_householder=2),
        "gated_deltaproduct_3": delta.gated_deltaproduct(heads, head_dim, num_householder=3),
    }
    pattern: tuple[str, ...] = (model,) * layers
    if model == "deltanet_window":
        pattern = ("deltanet", "window") * (layers // 2)
    if model == "deltanet_global":
        pattern = tuple("transformer" if i in (1, layers // 2) else "deltanet" for i in range(layers))
    config = lm.Config(
        vocab_size={"paper": 32000, "small": 257}[size],
        d_model=d_model,
        pattern=pattern,
        mixers={name: mixers[name] for name in sorted(set(pattern))},
        dtype="bfloat16" if size == "paper" else "float32",
        remat="full" if size == "paper" else "none",
    )
    reference = dataclasses.replace(
        config, pattern=("transformer",) * layers, mixers={"transformer": mixers["transformer"]}
    )
    missing = lm.num_params(reference) - lm.num_params(config)
    steps = {"paper": 30_000, "small": 400}[size]
    return TrainConfig(
        model=dataclasses.replace(config, mlp_dim=config.hidden_dim + round(missing / (3 * d_model * layers))),
        data=data.Config(
            seq_len=seq_len,
            batch_size={"paper": 256, "small": 16}[size],
            validation_fraction=0.02,
            lengths=(8 * seq_len,),
            evaluation_windows={"paper": 512, "small": 64}[size],
        ),
        steps=steps,
        optimizer={
            "paper": Optimizer(learning_rate=3e-4),
            "small": Optimizer(name="muon", learning_rate=1e-2),
        }[size],
        schedule=Schedule(warmup_steps={"paper": 1000, "small": 20}[size], final_fraction=0.05),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=steps, batches=64),
    )


def get_grid(size: Literal["paper", "small"] = "small") -> dict[str, list]:
    """Every model, the first seeds of all before the second."""
    return {"config.seed": [0, 1, 2] if size == "small" else [0], "model": list(NAMES)}


def get_report() -> Report:
    """What `python -m deltajax.report` shows of `small`."""

    def last(model: str, **where) -> dict:
        return {"model": model, "set": "validation"} | where

    widths = ", ".join(f"{NAMES[model]} {get_config(model=model).model.mlp_dim}" for model in get_args(Model))
    return Report(
        title="Language modelling at equal parameters and tokens",
        text=told(__doc__),
        claims=[
            Claim(
                "DeltaNet is as good as Transformer++: within 0.02 nats per byte.",
                {"DeltaNet": last("deltanet"), "Transformer++": last("transformer")},
                lambda delta, attention: abs(delta - attention) <= 0.02,
                metric="loss",
            ),
            Claim(
                "Hybrids are better than DeltaNet.",
                {
                    "window": last("deltanet_window"),
                    "global": last("deltanet_global"),
                    "DeltaNet": last("deltanet"),
                },
                lambda window, global_, delta: max(window, global_) < delta,
                metric="loss",
            ),
            *(
                Claim(
                    f"More Householder steps help: R = 3 below R = 2 below R = 1, {'gated' if gated else 'ungated'}.",
                    {f"R = {r}": last(f"{gated}deltaproduct_{r}" if r > 1 else f"{gated}deltanet") for r in (3, 2, 1)},
                    lambda three, two, one: three < two < one,
                    metric="loss",
                )
                for gated in ("", "gated_")
            ),
            Claim(
                "Gated models extrapolate: at 8 times the training context Gated DeltaNet's loss is no higher than at its end, "
                "and Transformer++'s is.",
                {
                    f"{NAMES[model]} at {at}": {"model": model, "position": at}
                    for model in ("gated_deltanet", "transformer")
                    for at in (128, 1024)
                },
                lambda gated, gated_far, attention, attention_far: gated_far <= gated and attention_far > attention,
                metric="loss",
            ),
        ],
        tables=[
            Table(
                "Loss on the validation split, nats per byte.",
                ["model"],
                [],
                metric="loss",
                where={"set": "validation"},
                better="low",
                published=PUBLISHED,
                labels=NAMES,
            ),
            Table(
                "Loss in windows of 1024 bytes, the 32 bytes up to each position; trained on 128.",
                ["model"],
                ["position"],
                metric="loss",
                where={"position": [32, 128, 256, 512, 1024]},
                better="low",
                labels=NAMES,
            ),
            Table("Parameters.", ["model"], [], metric="parameters", better="low", labels=NAMES, digits=0),
        ],
        figures=[
            Curves(
                "position",
                "Loss by position: median and range over seeds; 32 positions a point.",
                "position",
                "loss",
                ["model"],
                marks={128: "training context"},
                log="x",
                labels=NAMES,
            )
        ],
        notes=[*NOTES, f"Parameters are made equal by the width of the feed-forward layers: {widths}."],
    )


PUBLISHED = {
    "transformer": "28.39 ppl at 340M",
    "deltanet": "28.24 ppl at 340M",
    "deltanet_window": "27.06 ppl at 340M",
    "deltanet_global": "27.51 ppl at 340M",
}
NOTES = [
    "The paper's figures are WikiText perplexities of 340M parameters and 15B tokens of SlimPajama; ours are of 0.2 million"
    " parameters and 0.8 million bytes of Python's standard library: only the order can be compared, and it need not agree.",
    "`paper` was not run. Its corpus must be given (`--config.data.corpus`, `--config.data.tokenizer`).",
    "One learning rate (Muon, 0.01) for all; none was tuned. With 4 layers, a window or attention over everything stands in"
    " every second layer.",
    "`paper` keeps heads, training and parameters alike for all models; the configurations published for each are in "
    "`deltajax/models/named.py`.",
]
