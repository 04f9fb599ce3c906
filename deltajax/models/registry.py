"""All models that can be trained, behind one interface: which functions run is decided by the type of the config.

A new model is a file with these names, and a line in `MODELS`:

    Config                                  frozen, checked dataclass
    param_specs(config)                     tree of ParamSpec
    init(key, config)                       parameters drawn from it, float32
    init_stats(config)                      running statistics that training updates without gradients; {} if there are none
    loss_sums(params, stats, config, batch, *, key, train) -> (sums, stats)
    position_sums(params, stats, config, batch)     may be absent: the sums of evaluation with an axis of positions kept
    SHOWN                                   may be absent: entries of the sums that the progress line shows

and, for language models that shall be able to write (`training.sampling`):

    init_state(config, batch, max_length)
    apply(params, config, tokens, *, segment_ids, state) -> (logits, state)

`batch` is a dict of arrays whose first axis is the batch, as the task's `Dataset` makes them. `sums` are float32 scalars, each a
sum over the batch: always "loss" and "weight", and whatever else is worth a column ("accuracy": the weight of what was right).
The trainer adds them over microbatches and devices, minimises loss / weight and logs each entry over weight. `key` is new in
every step and microbatch (None in evaluation); statistics come back changed only if `train`.
"""

from typing import Any

from deltajax.models import autoencoder, delta_lm, efficientnet, frames, gpt_neox, lm, resnet

MODELS: dict[type, Any] = {
    lm.Config: lm,
    delta_lm.Config: delta_lm,
    gpt_neox.Config: gpt_neox,
    autoencoder.Config: autoencoder,
    resnet.Config: resnet,
    efficientnet.Config: efficientnet,
    frames.Config: frames,
}


def module_of(config: Any) -> Any:
    """The module whose functions serve this config.

    Raises:
      ValueError: not a model's config.
    """
    if type(config) not in MODELS:
        known = ", ".join(f"{c.__module__}.{c.__name__}" for c in MODELS)
        raise ValueError(f"model must be a config of one of {known}, got {type(config).__name__}")
    return MODELS[type(config)]
