"""Packing documents into windows of fixed length, with random access and without needless truncation.

A document of n + 1 tokens (BOS first) asks for n predictions: token t predicts token t + 1 of the same
document. It is cut into pieces of at most L predictions. Full pieces are windows of their own; the
remainders, and every document with fewer predictions than L, are packed whole by best-fit decreasing (arXiv
2404.10830, section 3). So every prediction is made exactly once per epoch, no document of up to L predictions
is cut, and no prediction crosses documents.
"""

import dataclasses
import math
from typing import Protocol, SupportsIndex

import numpy as np
from jaxtyping import Float, Int

Window = dict[str, Int[np.ndarray, "L"] | Float[np.ndarray, "L"]]


class Documents(Protocol):
    """Tokenised documents with random access; `lengths` [documents] counts tokens, BOS included."""

    lengths: Int[np.ndarray, "documents"]

    def read(self, document: int, start: int, stop: int) -> Int[np.ndarray, "stop-start"]:
        """Tokens [start, stop) of one document."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pieces make up which window: window w holds the pieces [first[w], first[w + 1]).

    Attributes:
      document, start, length: per piece, the predictions [start, start + length) of a document.
      first: one entry per window, and one more.
    """

    document: Int[np.ndarray, "pieces"]
    start: Int[np.ndarray, "pieces"]
    length: Int[np.ndarray, "pieces"]
    first: Int[np.ndarray, "windows+1"]


def plan_windows(predictions: Int[np.ndarray, "documents"], seq_len: int) -> Plan:
    """The packing plan for documents that ask for that many predictions each (0 is allowed)."""
    full, remainder = np.divmod(predictions, seq_len)
    full_document = np.repeat(np.arange(len(predictions)), full)
    full_start = (np.arange(len(full_document)) - np.repeat(np.cumsum(full) - full, full)) * seq_len
    rest_document = np.flatnonzero(remainder)
    rest_window = best_fit_decreasing(remainder[rest_document], seq_len) + len(full_document)

    window = np.concatenate([np.arange(len(full_document)), rest_window])
    order = np.argsort(window, kind="stable")
    windows = int(window.max(initial=-1)) + 1
    return Plan(
        document=np.concatenate([full_document, rest_document])[order],
        start=np.concatenate([full_start, (full * seq_len)[rest_document]])[order],
        length=np.concatenate([np.full(len(full_document), seq_len), remainder[rest_document]])[order],
        first=np.searchsorted(window[order], np.arange(windows + 1)),
    )


def best_fit_decreasing(sizes: Int[np.ndarray, "items"], capacity: int) -> Int[np.ndarray, "items"]:
    """Bin of each item: longest item first, into the fullest bin that has room, a new bin where none has.

    Items of one size are placed together: the fullest bin with room is still the fullest after it took one,
    so it takes as many as it has room for. The work is therefore counted in pairs of (size, room), not in
    items.

    Args:
      sizes: in [1, capacity].
      capacity: of every bin.
    """
    capacity = min(capacity, int(sizes.sum()))  # one bin then holds all
    bin_of_item = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(-sizes, return_counts=True)
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where bins_with_room[r] is not empty
    bins = done = 0
    for size, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        while count:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                per_bin = room // size
                used = bins_with_room[room][-math.ceil(count / per_bin) :]
                del bins_with_room[room][-len(used) :]
                if not bins_with_room[room]:
                    rooms ^= 1 << room
            else:
                room, per_bin = capacity, capacity // size
                used = list(range(bins, bins + math.ceil(count / per_bin)))
                bins += len(used)
            placed = min(count, per_bin * len(used))
            bin_of_item[order[done : done + placed]] = np.repeat(used, per_bin)[:placed]
            done += placed
            count -= placed
            in_last = placed - per_bin * (len(used) - 1)
            for left, some in ((room - per_bin * size, used[:-1]), (room - in_last * size, used[-1:])):
                if some:
                    bins_with_room[left].extend(some)
                    rooms |= 1 << left
    return bin_of_item


class FullWindows:
    """Windows that each lie within one document, so that a position in the window is as many tokens of context.

    At most `limit` of them, evenly spaced over all that there are; each a dict as of `PackedWindows`.
    """

    def __init__(self, documents: Documents, seq_len: int, limit: int):
        """Pieces shorter than seq_len predictions are left out."""
        predictions = documents.lengths - 1
        self._all = PackedWindows(documents, seq_len, predictions - predictions % seq_len)
        self._size = min(limit, len(self._all))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex) -> Window:
        return self._all[index.__index__() * len(self._all) // self._size]


class PackedWindows:
    """The windows of a set of documents, as a random-access source for Grain.

    Window i is a dict of arrays of length L = seq_len:
      tokens: int32, the inputs; 0 in the padding.
      targets: int32, the next token of the same document; 0 in the padding.
      segment_ids: int32, 1, 2, ... for the pieces in the window, 0 for the padding.
      weights: float32, 1 where there is a target, 0 in the padding.
    """

    def __init__(self, documents: Documents, seq_len: int, predictions: Int[np.ndarray, "documents"] | None = None):
        """`predictions` of each document, from its beginning; default all."""
        self._documents = documents
        self._seq_len = seq_len
        self._plan = plan_windows(documents.lengths - 1 if predictions is None else predictions, seq_len)

    def __len__(self) -> int:
        return len(self._plan.first) - 1

    def __getitem__(self, index: SupportsIndex) -> Window:
        plan, window = self._plan, index.__index__()
        tokens, targets, segment_ids = np.zeros((3, self._seq_len), np.int32)
        at = 0
        for segment, piece in enumerate(range(plan.first[window], plan.first[window + 1]), start=1):
            start, length = int(plan.start[piece]), int(plan.length[piece])
            text = self._documents.read(int(plan.document[piece]), start, start + length + 1)
            tokens[at : at + length] = text[:-1]
            targets[at : at + length] = text[1:]
            segment_ids[at : at + length] = segment
            at += length
        weights = (segment_ids > 0).astype(np.float32)
        return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "weights": weights}
