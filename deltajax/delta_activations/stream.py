"""The streaming runner: a frame at a time, computing only what reads an input that changed.

Every map of a `graph.Graph` stays in memory between frames. A frame's quantised input is compared with the last one; a map
computes the tiles that read a changed pixel, compares what comes out with what was there, and only pixels that really differ
count as changed for the maps that read it. So quantisation, which makes small changes vanish, makes the work shrink on its way
through the network. Numbers are those of dense inference: nothing is accumulated, a tile is computed from whole inputs.

Implementations, each one compiled program:
- "native" (`native.py`): by a kernel in C++. A tile is one pixel, and the first frame, or any other, computed densely
  gives the same numbers bit for bit. A map whose pixels nearly all differed counts what it computes as changed, uncompared,
  for a few frames.
- "xla" (`tiles.py`): where that kernel is not to be had.
"""

import dataclasses
import functools
import operator
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, UInt8

from deltajax.delta_activations import changes, native, tiles
from deltajax.delta_activations.graph import Graph, Params, inside
from deltajax.delta_activations.tiles import DENSE, Tiling, default_tiling
from deltajax.rounding import floor_of

__all__ = ["DENSE", "Implementation", "State", "Stream", "Tiling", "calibrate", "default_tiling"]

Implementation = Literal["native", "xla"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["maps", "memory", "version"], meta_fields=["identity"]
)
@dataclasses.dataclass(frozen=True)
class State:
    """What a stream remembers; `Stream.step` consumes it and returns the next.

    Attributes:
      maps: every map [H + margins, W + margins, C] of the last frame; the margins are zeros.
      memory: what the kernel works in, so that no frame needs more; what is in it changes no map.
      version: of the parameters that the maps are of; 0 before the first frame.
      identity: of the stream that made it.
    """

    maps: dict[str, Array]
    memory: UInt8[Array, "N"]
    version: Int[Array, ""]
    identity: str


class Stream:
    """A compiled runner for one network and one size of frames; threads may share it, each with a state of its own.

    Attributes:
      nodes: names of the maps that are computed, in the order of `step`'s counts; the input comes first.
      implementation: which computes them.
      tilings: of every map; the tiles of "native" are single pixels.
      tile_counts: of every map.
      limits: of every map: more tiles than this are computed densely; of the input: tiles that changed or touch one that
        did (scattered ones cost more than neighbours), above which all is computed densely (-1: always).
        `calibrate` chooses them for a machine. "native" has none.
    """

    def __init__(
        self,
        graph: Graph,
        params: Params,
        frame_shape: tuple[int, int, int],
        tilings: Mapping[str, Tiling] | None = None,
        limits: Mapping[str, int] | None = None,
        implementation: Implementation | None = None,
    ):
        """The network's program is not compiled before the first call; the native kernel is, the first time on a machine.

        Args:
          graph: with its parameters, of `fold.fold`.
          params: taken as float32; for a stream whose parameters change assign to its attribute `params`.
          frame_shape: [H, W, C].
          tilings: of some of the maps; for "xla".
          limits: of some of the maps; for "xla".
          implementation: None: "native" where it serves the graph and neither tilings nor limits are given, else "xla".

        Raises:
          ValueError: frame_shape is not [H, W, C] of the graph's input or too small for it, parameters are missing or of
            another shape, a step is not > 0, a map has an unknown name, tiles larger than itself or a limit below -1, the
            implementation is unknown, or "native" is given tilings or limits.
          NotImplementedError: "native" does not serve this graph or cannot be compiled here; the message says why.
        """
        channels = graph.nodes[0].channels
        try:
            self.frame_shape = tuple(operator.index(length) for length in frame_shape)
        except TypeError:
            self.frame_shape = ()
        if len(self.frame_shape) != 3 or self.frame_shape[2] != channels or min(self.frame_shape) < 1:
            raise ValueError(f"frame_shape must be (height, width, {channels}), got {frame_shape}")
        self.graph, self.sizes = graph, graph.sizes(*self.frame_shape[:2])
        self.nodes = tuple(self.sizes)
        for given in (tilings or {}, limits or {}):
            unknown = set(given) - set(self.nodes)
            if unknown:
                raise ValueError(f"no map is named {min(unknown)!r}; maps: {', '.join(self.nodes)}")
        graph.check(params, self.sizes)
        self.implementation = self._chosen(implementation, params, bool(tilings or limits))
        if self.implementation == "native":
            self.tilings = dict.fromkeys(self.nodes, Tiling((1, 1), 1))
            self._runner: native.Runner | tiles.Runner = native.Runner(graph, self.sizes, params)
        else:
            self.tilings = {name: default_tiling(*size[:2]) for name, size in self.sizes.items()} | dict(tilings or {})
            self._runner = tiles.Runner(graph, self.sizes, self.tilings)
        grids = {name: changes.grid(*self.sizes[name][:2], self.tilings[name].tile) for name in self.nodes}
        self.tile_counts = {name: rows * columns for name, (rows, columns) in grids.items()}
        self._margins, self._identity, self._version = graph.margins(), uuid.uuid4().hex, 0
        self.limits: dict[str, int] = {}
        self.params = params
        if self.implementation == "xla":  # gathered tiles cost about 1.6 times their share of a dense map
            self.set_limits({name: count * 3 // 5 for name, count in self.tile_counts.items()} | dict(limits or {}))
        self._step, self._traced = jax.jit(self._advance, donate_argnums=0), jax.jit(self._advance)

    def _chosen(self, asked: Implementation | None, params: Params, tiled: bool) -> Implementation:
        """The implementation that is asked for, or the best; checked."""
        if asked not in (None, "native", "xla"):
            raise ValueError(f"implementation must be native, xla or None, got {asked!r}")
        if asked == "xla" or (tiled and asked is None):
            return "xla"
        if tiled:
            raise ValueError("tilings and limits are for implementation 'xla', got 'native'")
        reason = native.unserved(self.graph, params, self.sizes)
        if reason is None:
            return "native"
        if asked == "native":
            raise NotImplementedError(f"the native kernel does not serve this graph: {reason}")
        logging.warning("streaming by XLA, which is slower: %s", reason)
        return "xla"

    @property
    def params(self) -> Params:
        """Of the graph; what is assigned is checked, and the next frame of every state computes all maps with it."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self.graph.check(params, self.sizes)
        prepared = self._runner.prepare(params)
        self._params, self._version = params, self._version + 1
        # One assignment: a thread that steps meanwhile has all of the old ones or all of the new.
        self._given = {**prepared, "limits": self._of_limits(), "version": jnp.asarray(self._version, jnp.int32)}

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Change some of the limits; nothing is compiled again."""
        if self.implementation == "native":
            raise ValueError("limits are for implementation 'xla'; this stream is 'native'")
        for name, limit in limits.items():
            if name not in self.nodes or type(limit) is not int or limit < -1:
                raise ValueError(f"limits must be integers >= -1 by name of a map, got {name!r}: {limit!r}")
        self.limits = {**self.limits, **limits}
        self._given = {**self._given, "limits": self._of_limits()}

    def _of_limits(self) -> Int[Array, "nodes"]:
        return jnp.asarray([self.limits[name] for name in self.nodes if name in self.limits], jnp.int32)

    def init_state(self) -> State:
        """The state before the first frame."""
        maps = {}
        for name, (height, width, channels) in self.sizes.items():
            margins = sum(self._margins[name])
            maps[name] = jnp.zeros((height + margins, width + margins, channels), jnp.float32)
        return State(maps, jnp.zeros(self._runner.memory, jnp.uint8), jnp.zeros((), jnp.int32), self._identity)

    def reset(self, state: State) -> State:
        """The state before the first frame, in the memory of this one, which is consumed."""
        return dataclasses.replace(state, version=jnp.zeros_like(state.version))

    def map(self, state: State, name: str) -> Float[Array, "h w C"]:
        """A map of the last frame."""
        return inside(state.maps[name], self.sizes[name], self._margins[name])

    def step(
        self, state: State, frame: Float[Any, "H W C"]
    ) -> tuple[Float[Array, "classes"], State, Int[Array, "nodes"]]:
        """One frame: logits, the next state, and how many tiles of each map were computed (DENSE: all, at once).

        Consumes `state` (its memory is reused), unless it raises. May be traced (jit, scan; vmap over states and frames, one
        after the other); then nothing is consumed, the parameters are those of the time of tracing, and the frame's values
        are not looked at: one that is not finite goes on as in dense inference, until no frame has it.

        Args:
          state: of `init_state`, `reset` or the step before.
          frame: real numbers of any type, taken as float32.

        Raises:
          ValueError: the frame's shape or type, a value that is not finite, a state of another stream or one that was
            consumed; the state stays as it was.
        """
        if not isinstance(state, State) or state.identity != self._identity:
            raise ValueError("the state is not one of this stream; begin with its init_state()")
        frame, last = self._checked(frame), state.maps.get(self.nodes[-1])
        if isinstance(frame, jax.core.Tracer) or isinstance(last, jax.core.Tracer):
            return self._traced(state, self._given, frame)
        if last is not None and last.is_deleted():
            raise ValueError("the state was consumed by a step; go on with the one it returned, or with init_state()")
        return self._step(state, self._given, frame)

    def run(self, frames: Iterable[Any], state: State | None = None) -> Iterator[Float[Array, "classes"]]:
        """Logits of each frame of a stream."""
        state = self.init_state() if state is None else state
        for frame in frames:
            logits, state, _ = self.step(state, frame)
            yield logits

    def _checked(self, frame: Any) -> Any:
        """The frame, and nobody else's memory."""
        values = frame if isinstance(frame, jax.Array) else np.asarray(frame)
        if values.shape != self.frame_shape:
            raise ValueError(f"frames of this stream have shape {self.frame_shape}, got {values.shape}")
        if values.dtype.kind not in "fiub" and not jnp.issubdtype(values.dtype, jnp.floating):  # the latter: bfloat16
            raise ValueError(f"frames must be of real numbers, got {values.dtype}")
        if isinstance(values, jax.core.Tracer):
            return values
        if isinstance(values, jax.Array):
            bad = int(_not_finite(values))
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.array(values, np.float32)  # the caller may fill its buffer again before this one is read
                # The sum is finite unless a value is not, or it overflows; only then look at all values.
                bad = 0 if np.isfinite(values.sum()) else values.size - int(np.isfinite(values).sum())
        if bad:
            raise ValueError(f"{bad} of the frame's {values.size} values are not finite")
        return values

    def _advance(self, state: State, given: dict, frame: Array) -> tuple[Array, State, Array]:
        for name, (height, width, channels) in self.sizes.items():
            margins, found = sum(self._margins[name]), state.maps.get(name)
            shape = (height + margins, width + margins, channels)
            if found is None or found.shape != shape or found.dtype != jnp.float32:
                raise ValueError(
                    f"the state's map {name} must be float32{list(shape)}, got {found if found is None else jax.typeof(found)}"
                )
        started = state.version == given["version"]
        logits, maps, memory, counts = self._runner.advance(
            state.maps, state.memory, started, given, frame.astype(jnp.float32)
        )
        return logits, State(maps, memory, given["version"], state.identity), counts


@jax.jit
def _not_finite(frame: Array) -> Int[Array, ""]:
    """Values that float32 does not hold."""
    return jnp.sum(~jnp.isfinite(frame.astype(jnp.float32)), dtype=jnp.int32)


def calibrate(stream: Stream, frames: Sequence[Any], rounds: int = 3) -> dict[str, int]:
    """Limits that make a sample of a stream's frames fastest on this machine; they are set, and returned to be kept.

    All candidates run in the stream's one compiled program: shares of a map's tiles from which on it is computed densely, then
    the number of changed tiles of the frame from which on everything is. A frame's time is its smallest of `rounds`.

    Args:
      stream: its limits are replaced; one that is "native" has none, and nothing is run.
      frames: at least three successive frames, among them some with as much change as there will be: what changes more
        than any of them is computed densely.
      rounds: >= 1.
    """
    if len(frames) < 3 or rounds < 1:
        raise ValueError(f"calibration needs 3 frames and 1 round or more, got {len(frames)} and {rounds}")
    if stream.implementation == "native":
        return {}

    def times(share: float, of_input: int) -> tuple[np.ndarray, np.ndarray]:
        limits = {name: floor_of(share, count) for name, count in stream.tile_counts.items()}
        stream.set_limits({**limits, stream.nodes[0]: of_input})
        best = np.full(len(frames) - 1, np.inf)
        changed = np.zeros(len(frames) - 1, int)
        for _ in range(rounds):
            _, state, _ = jax.block_until_ready(stream.step(stream.init_state(), frames[0]))
            for t, frame in enumerate(frames[1:]):
                start = time.perf_counter()
                _, state, counts = jax.block_until_ready(stream.step(state, frame))
                best[t], changed[t] = min(best[t], time.perf_counter() - start), counts[0]
        return best, changed

    every = stream.tile_counts[stream.nodes[0]]
    dense, _ = times(0, -1)
    found = {share: times(share, every) for share in (0.2, 0.35, 0.5, 0.65, 0.8, 1)}
    share = min(found, key=lambda share: found[share][0].sum())
    sparse, changed = found[share]
    # The number that loses least time against knowing the better way for every frame.
    candidates = sorted({-1, *changed.tolist()})
    limit = min(candidates, key=lambda n: np.where(changed <= n, sparse, dense).sum())
    limits = {name: floor_of(share, count) for name, count in stream.tile_counts.items()}
    limits[stream.nodes[0]] = limit
    stream.set_limits(limits)
    return limits
