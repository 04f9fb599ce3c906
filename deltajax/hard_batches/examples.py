"""Policies over single examples: Selective-Backprop, InfoBatch, RHO-loss.

`upcoming(state)` gives the next draws, as many as are known before anything more is learnt; `update(state, draw, losses)`
takes the losses of a draw's examples in their order. Some draws are only scored (a forward pass), the others are trained
on; the loop must follow their order.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from deltajax.errors import check_integers, check_types
from deltajax.fields import CHANGEABLE
from deltajax.rounding import floor_of

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Every example once per epoch, in a new order each: what training does without selection. The loader's own."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """A batch of examples.

    Attributes:
      examples: their indices.
      rescale: factors of their losses in the gradient of the batch's mean; None: 1.
      scored: only losses are wanted, no update.
    """

    examples: Int[np.ndarray, "B"]
    rescale: Float[np.ndarray, "B"] | None = None
    scored: bool = False


@dataclasses.dataclass(frozen=True)
class ExamplePolicy:
    """What the policies below share; by itself it is not used.

    Attributes:
      seed: of orders and draws, >= 0.
    """

    seed: int = 0

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 0, "seed")

    def init(self, num_examples: int, batch_size: int, updates: int) -> State:
        """The state before the first update.

        Args:
          num_examples: of the training set.
          batch_size: examples of a draw.
          updates: that the run will make in all; 0: not known.

        Raises:
          ValueError: the examples are fewer than a batch.
        """
        if num_examples < batch_size:
            raise ValueError(
                f"batch_size must be at most the {num_examples} examples of the training set, got {batch_size}"
            )
        return {"num_examples": num_examples, "batch_size": batch_size, "updates": updates}

    def upcoming(self, state: State) -> list[Draw]:
        """The next draws, at least one."""
        raise NotImplementedError

    def update(self, state: State, draw: Draw, losses: Float[np.ndarray, "B"]) -> State:
        """The state after a draw whose examples had these losses (before the update, if it was trained on).

        Raises:
          ValueError: a loss is NaN.
        """
        bad = np.flatnonzero(np.isnan(losses))
        if len(bad):
            raise ValueError(f"loss of example {draw.examples[bad[0]]} must be a number to rank it by, got nan")
        return self._update(state, draw, np.asarray(losses, np.float32))

    def _update(self, state: State, draw: Draw, losses: Float[np.ndarray, "B"]) -> State:
        raise NotImplementedError

    def resize(self, state: State, batch_size: int) -> State:
        """The state from which draws of another size follow: no example is left out or drawn again on that account.

        What remains of an epoch and does not fill a batch is left out, as always.
        """
        if batch_size == state["batch_size"]:
            return state
        return self._resize(state, batch_size) | {"batch_size": batch_size}

    def _resize(self, state: State, batch_size: int) -> State:
        raise NotImplementedError

    def _candidates(self, state: State, number: int) -> Int[np.ndarray, "B"]:
        """Batch `number` of endless epochs, each in an order of its own and without its incomplete last batch."""
        epoch, first = self._place(state, number)
        order = np.random.default_rng((self.seed, epoch)).permutation(state["num_examples"])
        return order[first : first + state["batch_size"]]

    def _place(self, state: State, number: int) -> tuple[int, int]:
        """The epoch in which batch `number` of candidates is, and its first example's place in it.

        Numbers count from `origin`: (number, epoch, place) of the first batch of the present size.
        """
        size, (origin, epoch, place) = state["batch_size"], state.get("origin", (0, 0, 0))
        number -= origin
        left = (state["num_examples"] - place) // size
        if number < left:
            return epoch, place + number * size
        more, i = divmod(number - left, state["num_examples"] // size)
        return epoch + 1 + more, i * size

    def _origin(self, state: State, number: int) -> tuple[int, int, int]:
        """(number, epoch, place) right behind the candidates before batch `number`."""
        origin = state.get("origin", (0, 0, 0))
        if number == origin[0]:
            return origin
        epoch, place = self._place(state, number - 1)
        return number, epoch, place + state["batch_size"]


@dataclasses.dataclass(frozen=True)
class SelectiveBackprop(ExamplePolicy):
    """Keep a candidate with probability (percentile of its loss among recent ones) ** beta (arXiv 1910.00762).

    Attributes:
      beta: 0 keeps all; the larger, the fewer and the harder. The expected share kept is 1 / (1 + beta).
      history: how many recent losses make the percentiles.

    Batches of candidates are scored; kept ones wait until they fill a batch.
    """

    beta: float = dataclasses.field(default=1.0, metadata=CHANGEABLE)
    history: int = dataclasses.field(default=1024, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        check_integers(self, 1, "history")
        if not 0 <= self.beta < np.inf:
            raise ValueError(f"beta must be a number >= 0, got {self.beta!r}")

    def init(self, num_examples, batch_size, updates):
        """See `ExamplePolicy`; adds the recent losses, the examples that wait, and how many candidates were scored."""
        state = super().init(num_examples, batch_size, updates)
        return state | {"recent": np.zeros(0, np.float32), "waiting": np.zeros(0, np.int64), "scored": 0}

    def upcoming(self, state):
        """See `ExamplePolicy`: one draw."""
        if len(state["waiting"]) >= state["batch_size"]:
            return [Draw(state["waiting"][: state["batch_size"]])]
        return [Draw(self._candidates(state, state["scored"]), scored=True)]

    def _resize(self, state, batch_size):
        return state | {"origin": self._origin(state, state["scored"])}

    def _update(self, state, draw, losses):
        if not draw.scored:
            return state | {"waiting": state["waiting"][len(draw.examples) :]}
        recent = np.concatenate([state["recent"], losses])[-self.history :]
        percentile = np.searchsorted(np.sort(recent), losses, side="right") / len(recent)
        draws = np.random.default_rng((self.seed, state["scored"], 1)).random(len(losses))
        kept = draw.examples[draws < percentile**self.beta]
        waiting = np.concatenate([state["waiting"], kept])
        return state | {"recent": recent, "waiting": waiting, "scored": state["scored"] + 1}


@dataclasses.dataclass(frozen=True)
class InfoBatch(ExamplePolicy):
    """Prune examples below the mean loss, rescale those that stay, end on the full data (arXiv 2303.04947).

    Attributes:
      ratio: r, probability with which an example whose last loss is below the mean is left out of an epoch; its gradient
        counts 1 / (1 - r) where it is not, which keeps the expected gradient.
      full: the last part of all updates, whose epochs are whole.

    Losses are those of the training steps themselves. An epoch's incomplete last batch is left out. The first epoch is whole,
    too, since no loss is known before it ends, and so is one that would keep less than a batch.
    """

    ratio: float = dataclasses.field(default=0.5, metadata=CHANGEABLE)
    full: float = dataclasses.field(default=0.125, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        for name in ("ratio", "full"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {getattr(self, name)!r}")

    def init(self, num_examples, batch_size, updates):
        """See `ExamplePolicy`; adds every example's last loss, and this epoch's order and factors.

        Raises:
          ValueError: also if no epoch could be pruned: all updates are of the first epoch or of the last part, or an epoch is
            one batch.
        """
        state = super().init(num_examples, batch_size, updates)
        first, last = num_examples // batch_size, floor_of(self.full, updates)
        if num_examples == batch_size:
            raise ValueError(
                f"batch_size must be less than the {num_examples} examples for InfoBatch to prune any, got {batch_size}"
            )
        if updates == 0 and self.full:
            raise ValueError(
                f"updates must be the number of updates of the whole run, because InfoBatch does not prune in the last "
                f"{self.full:.1%} of them; got {updates}"
            )
        if updates and updates <= first + last:
            raise ValueError(
                f"updates must be > {first + last} for InfoBatch to prune anything, as the first {first} and the last {last} "
                f"(full = {self.full}) are of whole epochs, got {updates}"
            )
        state |= {"losses": np.full(num_examples, np.inf, np.float32), "epoch": 0, "position": 0, "done": 0}
        return state | self._epoch(state)

    def upcoming(self, state):
        """See `ExamplePolicy`: the rest of the epoch."""
        size = state["batch_size"]
        starts = range(state["position"], len(state["order"]) - size + 1, size)
        return [Draw(state["order"][i : i + size], state["rescale"][i : i + size]) for i in starts]

    def _resize(self, state, batch_size):
        return self._begin_epoch_if_due(state | {"batch_size": batch_size})

    def _update(self, state, draw, losses):
        table = state["losses"].copy()
        table[draw.examples] = losses
        position = state["position"] + state["batch_size"]
        return self._begin_epoch_if_due(state | {"losses": table, "position": position, "done": state["done"] + 1})

    def _begin_epoch_if_due(self, state):
        if state["position"] + state["batch_size"] <= len(state["order"]):
            return state
        state |= {"position": 0, "epoch": state["epoch"] + 1}
        return state | self._epoch(state)

    def _epoch(self, state):
        """An order of the examples that this epoch keeps, and their factors."""
        rng = np.random.default_rng((self.seed, state["epoch"]))
        losses = state["losses"]
        known = losses[np.isfinite(losses)]
        easy = losses < (known.mean(dtype=np.float64) if len(known) else -np.inf)
        if self.full and state["updates"] - state["done"] <= floor_of(self.full, state["updates"]):
            easy[:] = False
        kept = ~(easy & (rng.random(len(losses)) < self.ratio))
        if kept.sum() < state["batch_size"]:
            kept[:], easy = True, np.zeros_like(easy)
        order = rng.permutation(np.flatnonzero(kept))
        return {"order": order, "rescale": np.where(easy[order], 1 / (1 - self.ratio), 1).astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class RhoLoss(ExamplePolicy):
    """From a pool of candidates those whose loss exceeds their irreducible loss the most (arXiv 2206.07137).

    Attributes:
      table: path of a `.npy` with the irreducible loss of every training example: that of a model which was not
        trained on it, as `python -m deltajax.score` writes it.
      pool: batches of candidates per batch that is trained on (the paper's: 10).
    """

    table: str = dataclasses.field(default="", metadata=CHANGEABLE)
    pool: int = 10

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        check_integers(self, 1, "pool")

    def init(self, num_examples, batch_size, updates):
        """See `ExamplePolicy`; adds the irreducible losses, the pool's excess losses so far, and what was chosen."""
        state = super().init(num_examples, batch_size, updates)
        return state | {
            "irreducible": self._read(num_examples),
            "pools": 0,
            "excess": np.zeros(0, np.float32),
            "chosen": np.zeros(0, np.int64),
        }

    def upcoming(self, state):
        """See `ExamplePolicy`: the rest of the pool, or the batch chosen from it."""
        if len(state["chosen"]):
            return [Draw(state["chosen"])]
        done = len(state["excess"]) // state["batch_size"]
        numbers = range(state["pools"] * self.pool + done, (state["pools"] + 1) * self.pool)
        return [Draw(self._candidates(state, n), scored=True) for n in numbers]

    def _resize(self, state, batch_size):
        """A pool that is not complete or not trained on is scored again."""
        first = (state["pools"] - (len(state["chosen"]) > 0)) * self.pool
        fresh = {"excess": np.zeros(0, np.float32), "chosen": np.zeros(0, np.int64)}
        return state | fresh | {"pools": first // self.pool, "origin": self._origin(state, first)}

    def _update(self, state, draw, losses):
        if not draw.scored:
            return state | {"chosen": np.zeros(0, np.int64)}
        excess = np.concatenate([state["excess"], losses - state["irreducible"][draw.examples]])
        if len(excess) < self.pool * state["batch_size"]:
            return state | {"excess": excess}
        numbers = range(state["pools"] * self.pool, (state["pools"] + 1) * self.pool)
        pool = np.concatenate([self._candidates(state, n) for n in numbers])
        chosen = pool[np.argsort(-excess, kind="stable")[: state["batch_size"]]]
        return state | {"excess": np.zeros(0, np.float32), "chosen": chosen, "pools": state["pools"] + 1}

    def _read(self, num_examples):
        wanted = f"table must be a .npy file with a finite loss for each of the {num_examples} training examples"
        try:
            with open(Path(self.table).expanduser(), "rb") as file:
                table = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"{wanted}, as `python -m deltajax.score` writes it, got {self.table!r} ({reason})"
            ) from None
        if table.shape != (num_examples,) or table.dtype.kind not in "fiu" or not np.isfinite(table).all():
            raise ValueError(f"{wanted}, got {self.table!r} with {table.dtype} {table.shape}")
        return table.astype(np.float32)
