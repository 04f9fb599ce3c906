"""Policies over batches of fixed composition: in order, the hardest, the easiest, or random ones of each round.

Pass 1 takes all N batches in index order. Then rounds of floor(delta N) batches follow, in index order too. The loss of a batch
is recorded whenever it is trained on; the others keep theirs, however old (arXiv 2304.03486, algorithm 1). One epoch is N
updates for every delta, so runs of E N updates compare at equal cost.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from deltajax.errors import check_integers, check_number, check_types
from deltajax.fields import CHANGEABLE
from deltajax.rounding import floor_of

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BatchPolicy:
    """What the policies below share; by itself it is not used.

    Attributes:
      composition: examples are cut into batches in the source's order, or in one order drawn once from the data's seed.

    A state is {"losses" [N] (NaN: never trained on), "chosen" [N], "position", "round"}: what remains of this round are
    the chosen batches from `position` on. It is made of NumPy arrays (`init`) or JAX arrays (pass them instead); with
    JAX arrays `next` and `update` of all but RandomBatches can be traced.
    """

    composition: Literal["source", "seeded"] = "source"

    def __post_init__(self):
        """Check ranges."""
        check_types(self)

    def init(self, num_batches: int) -> State:
        """The state before the first update.

        Raises:
          ValueError: no batch, or a delta so small that a round would be empty.
        """
        if num_batches < 1:
            raise ValueError(f"num_batches must be >= 1, got {num_batches}: the data are fewer than one batch")
        self._per_round(num_batches)
        return {
            "losses": np.full(num_batches, np.nan, np.float32),
            "chosen": np.ones(num_batches, bool),
            "position": np.zeros((), np.int32),
            "round": np.zeros((), np.int32),
        }

    def next(self, state: State) -> Int[Array, ""]:
        """Index of the batch to train on."""
        return _remaining(state).argmax()

    def upcoming(self, state: State) -> Int[np.ndarray, "batches"]:
        """The batches of this round that remain, known ahead of their losses."""
        return np.flatnonzero(_remaining(state))

    def update(self, state: State, index: Any, loss: Any) -> State:
        """The state after a step on batch `index` whose loss, before the update, was `loss`.

        Raises:
          ValueError: the loss is NaN (not noticed while tracing).
        """
        if not isinstance(loss, jax.core.Tracer) and math.isnan(loss):
            raise ValueError(f"loss of batch {int(index)} must be a number to rank it by, got nan")
        xp = state["losses"].__array_namespace__()
        here = xp.arange(len(state["losses"])) == index
        losses = xp.where(here, loss, state["losses"]).astype(state["losses"].dtype)
        moved = {**state, "losses": losses, "position": xp.asarray(index + 1, dtype=state["position"].dtype)}
        done = ~_remaining(moved).any()
        if not isinstance(done, jax.core.Tracer) and not done:
            return moved  # a new round is only drawn where one begins
        turn = state["round"] + 1
        fresh = {
            "losses": losses,
            "chosen": self._choose(losses, turn),
            "position": xp.zeros_like(state["position"]),
            "round": turn.astype(state["round"].dtype),
        }
        return {name: xp.where(done, fresh[name], moved[name]) for name in moved}

    def _per_round(self, num_batches: int) -> int:
        """Batches of a round after the first."""
        return num_batches

    def _choose(self, losses: Float[Array, "N"], turn: Int[Array, ""]) -> Bool[Array, "N"]:
        """Which batches a round takes."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class InOrder(BatchPolicy):
    """All batches in index order, again and again: plain training without a shuffle."""

    def _choose(self, losses, turn):
        return losses.__array_namespace__().ones_like(losses, dtype=bool)


@dataclasses.dataclass(frozen=True)
class _Share(BatchPolicy):
    """A round of floor(delta N) batches, delta in (0, 1]; `rounding` says how the product is taken."""

    delta: float = dataclasses.field(default=0.5, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        check_number(self, "delta", 0, 1)

    def _per_round(self, num_batches):
        count = floor_of(self.delta, num_batches)
        if count == 0:
            raise ValueError(
                f"delta must be at least 1 / {num_batches}, or a round of the {num_batches} batches is empty, got {self.delta!r}"
            )
        return count

    def _lowest(self, scores):
        """The batches of lowest score; of equals the earlier one."""
        xp = scores.__array_namespace__()
        rank = xp.argsort(xp.argsort(scores, stable=True), stable=True)
        return rank < self._per_round(len(scores))


@dataclasses.dataclass(frozen=True)
class HardBatches(_Share):
    """The batches of highest recorded loss (the paper's). delta = 1 is `InOrder`."""

    def _choose(self, losses, turn):
        return self._lowest(-losses)


@dataclasses.dataclass(frozen=True)
class EasyBatches(_Share):
    """The mirror: the batches of lowest recorded loss, a curriculum that begins with the easy."""

    def _choose(self, losses, turn):
        return self._lowest(losses)


@dataclasses.dataclass(frozen=True)
class RandomBatches(_Share):
    """The control: equally many, drawn anew each round whatever their losses.

    Attributes:
      seed: of the draws, >= 0.
    """

    seed: int = dataclasses.field(default=0, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        check_integers(self, 0, "seed")

    def _choose(self, losses, turn):
        draws = np.random.default_rng((self.seed, int(turn))).permutation(len(losses))
        return losses.__array_namespace__().asarray(draws < self._per_round(len(losses)))


def _remaining(state: State) -> Bool[Array, "N"]:
    xp = state["losses"].__array_namespace__()
    return state["chosen"] & (xp.arange(len(state["chosen"])) >= state["position"])
