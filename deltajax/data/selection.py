"""Batches that a policy of `hard_batches` chooses, from the losses that the trainer gives back.

`deltajax.train` does so by itself. In a loop of one's own, here softmax regression on the digits for E N = 3 * 5 updates:

    >>> import jax, jax.numpy as jnp
    >>> from deltajax.data import vision
    >>> from deltajax.hard_batches import HardBatches
    >>> @jax.jit
    ... def step(w, batch):
    ...     def loss(w):
    ...         scores = jax.nn.log_softmax(batch["images"].reshape(256, 64) @ w)
    ...         return -scores[jnp.arange(256), batch["targets"]].mean()
    ...     value, gradient = jax.value_and_grad(loss)(w)
    ...     return w - 0.5 * gradient, value
    >>> dataset = vision.load(vision.Config(batch_size=256, selection=HardBatches(delta=0.5)))
    >>> batches, w = dataset.train_iterator(), jnp.zeros((64, 10))
    >>> for _ in range(3 * 5):
    ...     w, loss = step(w, next(batches))
    ...     batches.observe(lambda loss=loss: float(loss))  # the loss before the update, read when the round ends
    >>> state = batches.get_state()  # JSON: after a restart `set_state(state)` goes on from here
    >>> state["step"], [bool(loss < 1) for loss in state["state"]["losses"]["values"]]
    (15, [True, True, True, True, True])
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from deltajax.errors import RunError
from deltajax.hard_batches import BatchPolicy, Draw, ExamplePolicy, InOrder, Shuffled

Batch = dict[str, np.ndarray]
Losses = Callable[[], np.ndarray]

_GIVEN = ("batch_size", "updates", "irreducible")  # what the config says: not kept in checkpoints


def check_policy(policy: BatchPolicy | ExamplePolicy | Shuffled, state: dict[str, Any]) -> None:
    """Raise a ValueError if the state of an iterator, selected or shuffled, was made with another policy."""
    made, now = state.get("policy", Shuffled.__name__), type(policy).__name__
    if made != now:
        raise ValueError(f"data.selection: the checkpoint was made with {made}, not {now}")


class UnrankableLoss(RunError):
    """A policy was given a loss that is not a number."""


class SelectedBatches:
    """An endless iterator of training batches; every process runs the same policy on the same losses.

    After each batch `observe` takes what reads that batch's losses. They are read when the policy needs them: for
    batches of a round, at its end. So the loop that calls it stays one step ahead of the device.

    Attributes:
      by_example: whether the policy wants a loss for every example, or one for the batch.
      scored: examples that were scored without an update so far.
    """

    def __init__(
        self,
        policy: BatchPolicy | ExamplePolicy,
        *,
        num_examples: int,
        batch_size: int,
        updates: int,
        seed: int,
        rows: slice,
        make: Callable[[int, np.ndarray], Batch],
        score: Callable[[Batch], np.ndarray],
        read_options: grain.ReadOptions,
    ):
        """Start before the first update.

        Args:
          policy: what chooses.
          num_examples: of the training set.
          batch_size: of the global batch.
          updates: the run's, which some policies divide into phases; 0: not known.
          seed: of a seeded composition.
          rows: of a global batch that this process reads.
          make: (update, indices of examples) -> batch of these.
          score: rows of this process -> losses of all examples of the global batch, by the model as it is now.
          read_options: of the threads that make batches ahead.

        Raises:
          ValueError: the policy does not fit the data.
        """
        self.policy, self.by_example, self.scored = policy, isinstance(policy, ExamplePolicy), 0
        self._rows, self._make, self._score, self._read_options = rows, make, score, read_options
        self._batch_size = batch_size
        if isinstance(policy, ExamplePolicy):
            self._state = policy.init(num_examples, batch_size, updates)
        else:
            if num_examples < batch_size:
                raise ValueError(
                    f"batch_size must be at most the {num_examples} examples of the training set, got {batch_size}"
                )
            self._state = policy.init(num_examples // batch_size)
            if 0 < updates <= num_examples // batch_size and not isinstance(policy, InOrder) and rows.start == 0:
                print(
                    f"{type(policy).__name__} chooses nothing in this run: its {updates} updates are of the first pass, "
                    f"which takes all {num_examples // batch_size} batches in order"
                )
            seeded = policy.composition == "seeded"
            order = np.random.default_rng(seed).permutation(num_examples) if seeded else np.arange(num_examples)
            self._composition = order[: num_examples // batch_size * batch_size].reshape(-1, batch_size)
        self._step = 0
        self._planned: Iterator[tuple[Any, Batch]] = iter(())
        self._open: list[tuple[Any, Losses]] = []  # trained on, losses not read yet
        self._current: Any = None

    def __iter__(self) -> "SelectedBatches":
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch to train on; `observe` must follow."""
        if self._current is not None:
            raise RuntimeError("observe the last batch first")
        while True:
            planned = next(self._planned, None)
            if planned is None:
                self._settle()
                self._planned = self._plan()
                continue
            draw, batch = planned
            if isinstance(draw, Draw) and draw.scored:
                self._update(draw, self._score(batch))
                self.scored += len(draw.examples)
                continue
            self._current = draw
            return batch

    def observe(self, losses: Losses) -> None:
        """Take the losses of the last batch, before its update: of all examples in order, or of the batch (`by_example`)."""
        self._open.append((self._current, losses))
        self._current = None
        self._step += 1

    def get_state(self) -> dict[str, Any]:
        """How to go on after the last observed batch, as JSON; waits for its losses."""
        self._settle()
        state = {name: _to_json(x) for name, x in self._state.items() if name not in _GIVEN}
        made = {"policy": type(self.policy).__name__, "batch_size": self._batch_size}
        return {"step": self._step, "scored": self.scored, **made, "state": state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` gave. Policies over examples take it with another batch size, too.

        Raises:
          ValueError: it is another policy's, of other data, or of batches of another size that are ranked as a whole.
        """
        check_policy(self.policy, state)
        fresh = self._state
        restored = {name: _from_json(x) for name, x in state["state"].items()}
        before = state.get("batch_size", self._batch_size)
        resized = f" (data.batch_size: {before} -> {self._batch_size})" if before != self._batch_size else ""
        if "losses" in fresh and len(fresh["losses"]) != len(restored["losses"]):
            raise ValueError(
                f"data.selection: the checkpoint's table has {len(restored['losses'])} losses, "
                f"the data {len(fresh['losses'])}{resized}"
            )
        if fresh.get("num_examples") != restored.get("num_examples"):
            raise ValueError(
                f"data.selection: the checkpoint is of {restored['num_examples']} examples, "
                f"the data have {fresh['num_examples']}"
            )
        if isinstance(self.policy, ExamplePolicy):
            given = {name: fresh[name] for name in _GIVEN if name in fresh}
            self._state = self.policy.resize(restored | given | {"batch_size": before}, self._batch_size)
        elif resized:
            raise ValueError(
                f"data.selection: {type(self.policy).__name__} ranks batches that were composed once{resized}; "
                "keep the size, or begin a run in another --workdir"
            )
        else:
            self._state = restored
        self._step, self.scored = state["step"], state["scored"]
        self._planned, self._open, self._current = iter(()), [], None

    def _plan(self) -> Iterator[tuple[Any, Batch]]:
        """What is known of the future, made ahead by threads."""
        draws, first = self.policy.upcoming(self._state), self._step
        source = grain.MapDataset.range(len(draws)).map(lambda i: self._batch(first + i, draws[i]))
        batches = iter(source.to_iter_dataset(self._read_options))
        return zip(draws, batches, strict=False)  # draws first: an iterator of Grain is not asked beyond its end

    def _batch(self, update: int, draw: Any) -> Batch:
        if not isinstance(draw, Draw):
            return self._make(update, self._composition[draw][self._rows])
        batch = self._make(update, draw.examples[self._rows])
        return batch if draw.rescale is None else {**batch, "rescale": draw.rescale[self._rows]}

    def _settle(self) -> None:
        for draw, losses in self._open:
            self._update(draw, losses())
        self._open = []

    def _update(self, draw: Any, losses: np.ndarray) -> None:
        try:
            self._state = self.policy.update(self._state, draw, losses)
        except ValueError as error:
            raise UnrankableLoss(f"data.selection: {error}") from None


def _to_json(x: Any) -> Any:
    """Python's floats hold every float32, and its JSON writes NaN and infinity."""
    return {"dtype": str(x.dtype), "values": x.tolist()} if isinstance(x, np.ndarray | np.generic) else x


def _from_json(x: Any) -> Any:
    return np.array(x["values"], x["dtype"]) if isinstance(x, dict) else x
