"""From examples to batches: a global batch is a pure function of (seed, step), on any number of processes."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, SupportsIndex

import grain
import numpy as np

from deltajax.data.selection import SelectedBatches
from deltajax.data.tokenizer import Tokenizer
from deltajax.hard_batches import Selection, Shuffled

Batch = dict[str, np.ndarray]  # [rows of this process, L] each

# Threads, not worker processes: reading is mostly copying, and the state of workers depends on their number.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Source(Protocol):
    """Examples with random access, each a dict of arrays of the same keys, shapes and dtypes."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Example `index`."""


@dataclasses.dataclass(frozen=True)
class Half:
    """Every other example of a source.

    Attributes:
      source: of the examples.
      first: 0: those of even index, 1: of odd index.
    """

    source: Source
    first: int

    def __len__(self) -> int:
        """Number of examples."""
        return (len(self.source) + 1 - self.first) // 2

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Example `index`."""
        return self.source[self.first + 2 * int(index)]


def half_of(source: Source, half: str) -> Source:
    """What a config's `half` says: "all" examples, or those of "even" or "odd" index."""
    return source if half == "all" else Half(source, int(half == "odd"))


class ShuffledBatches:
    """An endless iterator of batches whose position is counted in examples."""

    def __init__(self, start: Callable[[int], Iterator[Batch]], batch_size: int):
        """`start` returns the batches that begin with an example; batch_size: examples of a global batch."""
        self._start, self._batch_size = start, batch_size
        self._batches, self._next_example = start(0), 0

    def __iter__(self) -> "ShuffledBatches":
        """Return itself."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch."""
        batch = next(self._batches)
        self._next_example += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the position as JSON."""
        return {"next_example": self._next_example}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue at the position that `get_state` returned, whatever the batch size was then.

        `{"next_index": n}`, which older versions returned, counts batches of this batch size.
        """
        if "next_index" in state:
            state = {"next_example": state["next_index"] * self._batch_size}
        self._next_example = state["next_example"]
        self._batches = self._start(self._next_example)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A task ready to train on. Every task's `load` returns one, so the trainer knows no task.

    Attributes:
      train, validation: examples; for a language model the windows of `packing.PackedWindows`.
      batch_size: rows of a global batch.
      seed: of the order of the training examples.
      vocab_size: tokens and targets are in [0, vocab_size); None: the examples are not made of tokens.
      num_classes: labels are in [0, num_classes); None: the examples carry no labels.
      unit: what one unit of weight is, for the throughput: "tokens", "images".
      chance: accuracy of guessing with equal probability; None: not a sensible baseline.
      tokenizer: of tasks made of text.
      validation_text: raw bytes of the validation documents, one after the other; of tasks made of text.
      bytes_per_target: bytes over targets in the validation documents; None: not made of text, or of text that the
        tokenizer does not preserve. Mean loss in
        nats over (ln 2 * bytes_per_target) is bits per byte: exact over the whole validation split for any
        tokenizer, over any part of it for the byte tokenizer, whose value is 1.
      augment: (training example, random generator) -> example, another one each time; None: as they are.
      selection: which examples the next update learns from.
      evaluations: further sets by name, scored when the run ends; each with shapes of its own.
      fingerprint: differs where the data differ, to tell on resume; "": the config says it all.
    """

    train: Source
    validation: Source
    batch_size: int
    seed: int
    vocab_size: int | None = None
    num_classes: int | None = None
    unit: str = "tokens"
    chance: float | None = None
    tokenizer: Tokenizer | None = None
    validation_text: bytes = b""
    bytes_per_target: float | None = None
    augment: Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]] | None = None
    selection: Selection = dataclasses.field(default_factory=Shuffled)
    evaluations: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""

    def train_iterator(
        self,
        process_index: int = 0,
        process_count: int = 1,
        *,
        updates: int = 0,
        score: Callable[[Batch], np.ndarray] | None = None,
    ) -> "ShuffledBatches | SelectedBatches":
        """Endless batches: the rows of this process, a contiguous slice of each global batch.

        Without selection the examples are shuffled anew each epoch; a batch may span two epochs, so none is dropped. The
        state, `{"next_example": n}`, is the same on every process, for every number of processes and for every batch
        size. With a selection the policy decides, and `SelectedBatches.observe` must follow every batch.

        Args:
          process_index, process_count: of the readers of a batch.
          updates: of the whole run, for policies that divide it into phases (InfoBatch); 0: not known, which these refuse.
          score: this process' rows -> losses of all examples of the batch, for policies that score candidates.

        Raises:
          ValueError: batch_size is not divisible by process_count, process_index is out of range, or the policy does not
            fit the data.
        """
        if isinstance(self.selection, Shuffled):
            examples = grain.MapDataset.source(self.train).seed(self.seed).shuffle().repeat()
            augmented = examples.__getitem__ if self.augment is None else lambda i: self._augmented(examples[i], i)
            return ShuffledBatches(
                lambda first: self._batches(augmented, sys.maxsize, process_index, process_count, first),
                self.batch_size,
            )
        rows = self._rows(process_index, process_count)

        def unavailable(batch: Batch) -> np.ndarray:
            raise ValueError(f"train_iterator: {type(self.selection).__name__} needs a function that scores batches")

        return SelectedBatches(
            self.selection,
            num_examples=len(self.train),
            batch_size=self.batch_size,
            updates=updates,
            seed=self.seed,
            rows=slice(process_index * rows, (process_index + 1) * rows),
            make=lambda update, indices: _stack([self._augmented(self.train[i], update, i) for i in indices]),
            score=score or unavailable,
            read_options=READ_OPTIONS,
        )

    def validation_batches(
        self,
        num_batches: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        evaluation: str | None = None,
    ) -> grain.DatasetIterator[Batch]:
        """Every validation example exactly once, or the first `num_batches` batches, in one shuffled order.

        With `evaluation` those of that set of `evaluations`.

        The order depends on the number of examples only, so the first batches are a fair sample and the same
        in every run. The last batch is filled up with examples of zeros, whose weights are zero.

        Raises:
          ValueError: as `train_iterator`, or num_batches < 1.
        """
        if num_batches is not None and num_batches < 1:
            raise ValueError(f"num_batches: got {num_batches}; allowed: >= 1, or None for all")
        source = self.validation if evaluation is None else self.evaluations[evaluation]
        examples = grain.MapDataset.source(source).shuffle(seed=0)
        padding = {name: np.zeros_like(x) for name, x in examples[0].items()}
        whole = -(-len(examples) // self.batch_size)
        return self._batches(
            lambda i: examples[i] if i < len(examples) else padding,
            whole if num_batches is None else min(num_batches, whole),
            process_index,
            process_count,
        )

    def _batches(
        self,
        example: Callable[[int], Any],
        num_batches: int,
        process_index: int,
        process_count: int,
        first_example: int = 0,
    ) -> grain.DatasetIterator[Batch]:
        rows = self._rows(process_index, process_count)

        def batch(step: int) -> Batch:
            first = first_example + step * self.batch_size + process_index * rows
            return _stack([example(i) for i in range(first, first + rows)])

        return iter(grain.MapDataset.range(num_batches).map(batch).to_iter_dataset(READ_OPTIONS))

    def _rows(self, process_index: int, process_count: int) -> int:
        """Rows of a batch that each process reads."""
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index: got {process_index}; allowed: 0 to process_count - 1 = {process_count - 1}"
            )
        if self.batch_size % process_count:
            raise ValueError(f"batch_size: {self.batch_size} is not divisible by the {process_count} processes")
        return self.batch_size // process_count

    def _augmented(self, example: dict[str, np.ndarray], *when: int) -> dict[str, np.ndarray]:
        return example if self.augment is None else self.augment(example, np.random.default_rng((self.seed, *when)))


def _stack(examples: list[dict[str, np.ndarray]]) -> Batch:
    return {name: np.stack([x[name] for x in examples]) for name in examples[0]}
