"""Where in its data a run continues, and which changes of the data a workdir allows."""

from typing import Any

from deltajax.hard_batches import Shuffled
from deltajax.training import serialize

# Fields of a data config that do not decide which training examples follow a position.
_READ_ALIKE = ("folder", "corpus", "verify", "lengths", "evaluation_windows", "evaluation_examples")


def data_position(progress: dict[str, Any], step: int) -> tuple[int, dict[str, Any]]:
    """Return how many examples a checkpoint's run has consumed, and the state of its data iterator.

    Older checkpoints count both in batches.
    """
    batch_size = progress["config"].data.batch_size
    state = progress["iterator"]
    if "next_index" in state:
        state = {"next_example": state["next_index"] * batch_size}
    return progress.get("examples", step * batch_size), state


def check_position(stored: Any, given: Any) -> None:
    """Refuse data whose examples are not those that a checkpoint's position counts.

    Raises:
      ValueError: names the first such field, its old and its new value.
    """
    fixed = "a policy composes its batches once" if not isinstance(selection_of(given), Shuffled) else ""
    for difference in serialize.differences(stored, given):
        key = difference.split(":")[0].split(".")[0]
        if key in _READ_ALIKE or key == "selection" or (key == "batch_size" and not fixed):
            continue
        why = fixed if key == "batch_size" else "the checkpoint's position counts examples of the old data"
        raise ValueError(
            f"data.{difference}: cannot change in this workdir ({why}); begin another run with --config.init_from"
        )


def selection_of(config: Any) -> Any:
    """Return the policy of a data config; tasks without one shuffle."""
    return getattr(config, "selection", Shuffled())
