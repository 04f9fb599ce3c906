"""What of a config may change in a workdir, and where in its data a run continues."""

from typing import Any

from deltajax.fields import fixed_leaves
from deltajax.hard_batches import Shuffled
from deltajax.training.config import TrainConfig

# Of the optimizer, what its moments belong to. Of model and data: all fields that are not `CHANGEABLE`.
_OPTIMIZER = ("optimizer.name", "optimizer.trainable")


def fixed_differences(stored: TrainConfig, given: TrainConfig) -> list[str]:
    """Return `key: stored -> given` for what no run can change when it continues from a checkpoint.

    A checkpoint's arrays belong to the model and the optimizer, its position to the order of the data. Another policy of
    selection is not listed: its iterator refuses the state.
    """
    old, new = dict(_fixed(stored)), dict(_fixed(given))
    if type(selection_of(stored.data)) is not type(selection_of(given.data)):
        old, new = ({k: x for k, x in of.items() if not k.startswith("data.selection.")} for of in (old, new))
    absent = "absent"
    return [
        f"{key}: {old.get(key, absent)!r} -> {new.get(key, absent)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


def _fixed(config: TrainConfig) -> list[tuple[str, Any]]:
    optimizer = [leaf for leaf in fixed_leaves(config.optimizer, "optimizer") if leaf[0] in _OPTIMIZER]
    return [*fixed_leaves(config.model, "model"), *optimizer, *fixed_leaves(config.data, "data")]


def data_position(progress: dict[str, Any], step: int) -> tuple[int, dict[str, Any]]:
    """Return how many examples a checkpoint's run has consumed, and the state of its data iterator.

    Older checkpoints count both in batches.
    """
    batch_size = progress["config"].data.batch_size
    state = {"batch_size": batch_size} | progress["iterator"]
    if "next_index" in state:
        state = {"next_example": state["next_index"] * batch_size}
    return progress.get("examples", step * batch_size), state


def selection_of(config: Any) -> Any:
    """Return the policy of a data config; tasks without one shuffle."""
    return getattr(config, "selection", Shuffled())
