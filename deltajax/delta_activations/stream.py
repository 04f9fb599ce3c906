"""The streaming runner: a frame at a time, computing only what reads an input that changed.

Every map of a `graph.Graph` stays in memory between frames. A frame's quantised input is compared with the last one; a map
computes the tiles that read a changed pixel, compares what comes out with what was there, and only pixels that really differ
count as changed for the maps that read it. So quantisation, which makes small changes vanish, makes the work shrink on its way
through the network. Numbers are those of dense inference: nothing is accumulated, a tile is computed from whole inputs.

Implementations, each one compiled program:
- "native": by `pallas_kernels/delta_convolution.cc`. A tile is one pixel, and the first frame, or any other, computed densely
  gives the same numbers bit for bit.
- "xla": where that kernel is not to be had. Each map has a limit on the tiles worth computing one by one; a map with more is
  computed densely, and a frame of which more than `limits` of the input tiles changed goes densely through the whole network.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from deltajax.delta_activations import changes, native
from deltajax.delta_activations.graph import NO_PADDING, Graph, Node, Padding, Params, head
from pallas_kernels import delta_convolution

DENSE = -1  # among the counts of tiles: the map was computed densely

Implementation = Literal["native", "xla"]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a map is cut up.

    Attributes:
      tile: rows and columns of a tile.
      block: tiles computed together, one product; more are worked off block by block.
    """

    tile: tuple[int, int]
    block: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["maps", "started"], meta_fields=["identity"])
@dataclasses.dataclass(frozen=True)
class State:
    """What a stream remembers; `Stream.step` consumes it and returns the next.

    Attributes:
      maps: every map [H + margins, W + margins, C] of the last frame; the margins are zeros.
      started: false before the first frame.
      identity: of the stream that made it.
    """

    maps: dict[str, Array]
    started: Bool[Array, ""]
    identity: str


def default_tiling(height: int, width: int) -> Tiling:
    """About 14 tiles to a side of 4 to 16 pixels, 2048 pixels to a block; maps of less than 16 pixels are one or four tiles."""
    side = max(height, width)
    edge = next((t for t in (16, 8, 4) if side >= 12 * t), 4 if side > 16 else -(-side // 2) if side > 8 else side)
    tile = (min(edge, height), min(edge, width))
    rows, columns = changes.grid(height, width, tile)
    return Tiling(tile, max(1, min(rows * columns, 2048 // (tile[0] * tile[1]), 16)))


class Stream:
    """A compiled runner for one network and one size of frames.

    Attributes:
      nodes: names of the maps that are computed, in the order of `step`'s counts; the input comes first.
      implementation: which computes them.
      tilings: of every map.
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
          params: for a stream whose parameters change assign to its attribute `params`.
          frame_shape: [H, W, C].
          tilings: of some of the maps; for "xla".
          limits: of some of the maps; for "xla".
          implementation: None: "native" where it serves the graph and neither tilings nor limits are given, else "xla".

        Raises:
          ValueError: frame_shape is not [H, W, C] of the graph's input or too small for it, a step is not > 0, a map
            has an unknown name, the implementation is unknown, or "native" is given tilings or limits.
          NotImplementedError: "native" does not serve this graph or cannot be compiled here; the message says why.
        """
        channels = graph.nodes[0].channels
        if len(frame_shape) != 3 or frame_shape[2] != channels or min(frame_shape) < 1:
            raise ValueError(f"frame_shape must be (height, width, {channels}), got {frame_shape}")
        self.graph, self.frame_shape = graph, tuple(frame_shape)
        self.sizes = graph.sizes(*frame_shape[:2])
        self.nodes = tuple(self.sizes)
        self._margins = _margins(graph)
        self.implementation: Implementation = _implementation(
            implementation, graph, params, self.sizes, tilings or limits
        )
        self.params = params
        one = self.implementation == "native"
        self.tilings = {
            name: Tiling((1, 1), 1) if one else default_tiling(*size[:2]) for name, size in self.sizes.items()
        }
        counts = {}
        for given in (tilings or {}, limits or {}):
            unknown = set(given) - set(self.nodes)
            if unknown:
                raise ValueError(f"no map is named {min(unknown)!r}; maps: {', '.join(self.nodes)}")
        self.tilings.update(tilings or {})
        for name in self.nodes:
            rows, columns = changes.grid(*self.sizes[name][:2], self.tilings[name].tile)
            counts[name] = rows * columns
        self.tile_counts = counts
        # Where nothing is known: gathered tiles cost about 1.6 times their share of a dense map.
        self.limits: dict[str, int] = {}
        self._limits = jnp.zeros(0, jnp.int32)
        if not one:
            self.set_limits({name: counts[name] * 3 // 5 for name in self.nodes} | dict(limits or {}))
        self._identity = f"{id(self):x}-{'x'.join(map(str, frame_shape))}"
        self._step = jax.jit(self._advance_natively if one else self._advance, donate_argnums=0)

    @property
    def params(self) -> Params:
        """Of the graph; what is assigned holds from the next frame on, maps that it changes included, after a reset."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        _check_steps(self.graph, params)
        self._params = self._given = params
        if self.implementation == "native":
            program, packed = native.program(self.graph, params, self.sizes, self._margins)
            self._program, self._given = program, {"packed": jnp.asarray(packed), "head": params["head"]}

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Change some of the limits; nothing is compiled again."""
        if self.implementation == "native":
            raise ValueError("limits are for implementation 'xla'; this stream is 'native'")
        for name, limit in limits.items():
            if name not in self.nodes or type(limit) is not int or limit < -1:
                raise ValueError(f"limits must be integers >= -1 by name of a map, got {name!r}: {limit!r}")
        self.limits = {**self.limits, **limits}
        self._limits = jnp.asarray([self.limits[name] for name in self.nodes], jnp.int32)

    def init_state(self) -> State:
        """The state before the first frame."""
        maps = {}
        for name, (height, width, channels) in self.sizes.items():
            before, after = self._margins[name]
            maps[name] = jnp.zeros((height + before + after, width + before + after, channels), jnp.float32)
        return State(maps, jnp.zeros((), bool), self._identity)

    def reset(self, state: State) -> State:
        """The state before the first frame, in the memory of this one, which is consumed."""
        return dataclasses.replace(state, started=jnp.zeros((), bool))

    def step(
        self, state: State, frame: Float[Any, "H W C"]
    ) -> tuple[Float[Array, "classes"], State, Int[Array, "nodes"]]:
        """One frame: logits, the next state, and how many tiles of each map were computed (DENSE: all, at once).

        Consumes `state` (its memory is reused), unless it raises.

        Raises:
          ValueError: the frame's shape, a value that is not finite, or a state of another stream; the state stays valid.
        """
        if not isinstance(state, State) or state.identity != self._identity:
            raise ValueError("the state is not one of this stream; begin with its init_state()")
        if np.shape(frame) != self.frame_shape:
            raise ValueError(f"frames of this stream have shape {self.frame_shape}, got {np.shape(frame)}")
        if not isinstance(frame, jax.Array):
            frame = np.array(frame, np.float32)  # a copy: the caller may fill its buffer again before this one is read
            # The sum is finite unless a value is not, or it overflows; only then look at all values.
            if not np.isfinite(frame.sum()) and not np.isfinite(frame).all():
                bad = frame.size - int(np.isfinite(frame).sum())
                raise ValueError(f"{bad} of the frame's {frame.size} values are not finite")
        elif not bool(jnp.isfinite(frame).all()):
            raise ValueError("the frame has values that are not finite")
        return self._step(state, self._given, self._limits, frame)

    def run(self, frames: Iterable[Any], state: State | None = None) -> Iterator[Float[Array, "classes"]]:
        """Logits of each frame of a stream."""
        state = self.init_state() if state is None else state
        for frame in frames:
            logits, state, _ = self.step(state, frame)
            yield logits

    def _advance_natively(self, state: State, params: Params, _: Array, frame: Array) -> tuple[Array, State, Array]:
        maps = [state.maps[name] for name in self.nodes]
        channels = self.graph.nodes[-1].channels
        maps, means, counts = delta_convolution.step(
            maps, frame.astype(jnp.float32), state.started, params["packed"], self._program, channels
        )
        after = State(dict(zip(self.nodes, maps, strict=True)), jnp.ones((), bool), state.identity)
        return head(params, means[None, None, None])[0], after, counts

    def _advance(self, state: State, params: Params, limits: Array, frame: Array) -> tuple[Array, State, Array]:
        source = self.graph.nodes[0]
        maps = dict(state.maps)
        frame = frame.astype(jnp.float32)
        values = source.compute(params["maps"][source.name], [frame[None]], [NO_PADDING])[0]
        differ = jnp.any(values != self._inside(source.name, maps[source.name]), axis=-1)
        count = jnp.sum(changes.near(differ, self.tilings[source.name].tile), dtype=jnp.int32)
        dense = (count > limits[0]) | ~state.started
        before, after = self._margins[source.name]
        maps[source.name] = jnp.pad(values, ((before, after), (before, after), (0, 0)))
        # Loops that run once or never, not conditionals: XLA lets loops update their arrays in place.
        frame_map = maps.pop(source.name)
        maps = _once(dense, self._all_dense, maps, params, frame_map)
        counts = jnp.full(len(self.nodes) - 1, DENSE, jnp.int32)
        maps, counts = _once(~dense, self._all_sparse, (maps, counts), params, limits, frame_map, differ)
        maps[source.name] = frame_map
        last = self.nodes[-1]
        logits = head(params, self._inside(last, maps[last])[None])[0]
        counts = jnp.concatenate([jnp.where(dense, DENSE, count)[None], counts])
        return logits, State(maps, jnp.ones((), bool), state.identity), counts

    def _all_dense(self, maps: dict[str, Array], params: Params, frame_map: Array) -> dict[str, Array]:
        """All maps anew."""
        maps = {**maps, self.nodes[0]: frame_map}
        for node in self.graph.nodes[1:]:
            value = self._whole(node, params["maps"][node.name], maps)
            maps[node.name] = self._put(node.name, maps[node.name], value)
        return {name: maps[name] for name in self.nodes[1:]}

    def _all_sparse(
        self, carry: tuple[dict[str, Array], Array], params: Params, limits: Array, frame_map: Array, differ: Array
    ) -> tuple[dict[str, Array], Array]:
        """All maps where the frame changed, each densely if that is cheaper; and the counts of tiles."""
        maps = {**carry[0], self.nodes[0]: frame_map}
        changed, counts = {self.nodes[0]: differ}, []
        for i, node in enumerate(self.graph.nodes[1:], 1):
            inputs = {name: maps[name] for name, _ in node.sources}
            own = maps[node.name], jnp.zeros(self.sizes[node.name][:2], bool)
            dirty = self._dirty(node, changed)
            count = jnp.sum(dirty, dtype=jnp.int32)
            overflow = count > limits[i]
            own = _once(overflow, functools.partial(self._dense, node), own, params["maps"][node.name], inputs)
            own = self._sparse(node, params, inputs, dirty, jnp.where(overflow, 0, count), own)
            maps[node.name], changed[node.name] = own
            counts.append(jnp.where(overflow, DENSE, count))
        return {name: maps[name] for name in self.nodes[1:]}, jnp.stack(counts)

    def _inside(self, name: str, value: Array) -> Array:
        """A map without its margins."""
        height, width, _ = self.sizes[name]
        before, _ = self._margins[name]
        return value[before : before + height, before : before + width]

    def _put(self, name: str, whole: Array, inside: Array) -> Array:
        """A map with its margins, all else anew."""
        before, _ = self._margins[name]
        return jax.lax.dynamic_update_slice(whole, inside, (before, before, 0))

    def _whole(self, node: Node, params: dict[str, Array], maps: Mapping[str, Array]) -> Array:
        """A map without its margins, from sources with theirs."""
        paddings: list[Padding] = []
        for name, window in node.sources:  # margins are read as padding; what is too much is cropped
            side = (window.padding[0] - self._margins[name][0], window.padding[1] - self._margins[name][1])
            paddings.append((side, side))
        return node.compute(params, [maps[name][None] for name, _ in node.sources], paddings)[0]

    def _dense(
        self, node: Node, own: tuple[Array, Array], params: dict[str, Array], maps: dict[str, Array]
    ) -> tuple[Array, Array]:
        """A whole map and which of its pixels changed."""
        value = jax.lax.optimization_barrier(self._whole(node, params, maps))
        differ = jnp.any(value != self._inside(node.name, own[0]), axis=-1)
        return self._put(node.name, own[0], value), differ

    def _dirty(self, node: Node, changed: dict[str, Array]) -> Bool[Array, "tiles"]:
        pixels = [changes.readers(changed[name], window) for name, window in node.sources]
        return changes.tiles(functools.reduce(jnp.logical_or, pixels), self.tilings[node.name].tile)

    def _sparse(
        self, node: Node, params: Params, maps: dict[str, Array], dirty: Array, count: Array, own: tuple
    ) -> tuple[Array, Array]:
        """The dirty tiles of a map, block by block: gather windows, compute, compare, put back."""
        height, width, _ = self.sizes[node.name]
        tiling, margin = self.tilings[node.name], self._margins[node.name][0]
        (rows, columns), block = tiling.tile, tiling.block
        slots = -(-dirty.size // block) * block
        # The last block is filled up with tile 0: it is computed needlessly, but right.
        index = jnp.nonzero(dirty, size=slots, fill_value=0)[0].astype(jnp.int32)

        def body(carry):
            n, value, differ = carry
            positions, sources = _inside_loop(n, (index, maps))
            chosen = jax.lax.dynamic_slice_in_dim(positions, n * block, block)
            top, left = changes.origins(chosen, height, width, tiling.tile)
            inputs = []
            for name, window in node.sources:
                first = self._margins[name][0] - window.padding[0]
                corner = top * window.stride + first, left * window.stride + first
                inputs.append(_gather(sources[name], *corner, (window.extent(rows), window.extent(columns))))
            new = node.compute(params["maps"][node.name], inputs, [NO_PADDING] * len(inputs))
            old = _gather(value, top + margin, left + margin, (rows, columns))
            # Otherwise every one of the updates below would compute all of it again for itself.
            new, unlike = jax.lax.optimization_barrier((new, jnp.any(new != old, axis=-1)))
            for g in range(block):
                value = jax.lax.dynamic_update_slice(value, new[g], (top[g] + margin, left[g] + margin, 0))
            return n + 1, value, jax.lax.dynamic_update_slice(differ, unlike, (n * block, 0, 0))

        start = (jnp.zeros((), jnp.int32), own[0], jnp.zeros((slots, rows, columns), bool))
        _, value, differ = jax.lax.while_loop(lambda carry: carry[0] * block < count, body, start)
        # Tiles are worked off in their order, so the n-th dirty one stands in slot n.
        slot = jnp.cumsum(dirty) - 1
        by_tile = differ[slot] & (dirty & (count > 0))[:, None, None]
        return value, own[1] | changes.assemble(by_tile, height, width)


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
        limits = {name: int(share * count) for name, count in stream.tile_counts.items()}
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
    limits = {name: int(share * count) for name, count in stream.tile_counts.items()}
    limits[stream.nodes[0]] = limit
    stream.set_limits(limits)
    return limits


def _gather(x: Array, top: Array, left: Array, size: tuple[int, int]) -> Array:
    """Rectangles [G, *size, C] of a map."""

    def one(i, j):
        return jax.lax.dynamic_slice(x, (i, j, 0), (*size, x.shape[-1]))

    return jax.vmap(one)(top, left)


def _once(condition: Array, function: Callable, value: Any, *given: Any) -> Any:
    """function(value, *given) if the condition holds, else value."""

    def body(carry):
        again, value = carry
        return jnp.zeros((), bool), function(value, *_inside_loop(again, given))

    return jax.lax.while_loop(lambda carry: carry[0], body, (condition, value))[1]


def _inside_loop(carried: Array, given: Any) -> Any:
    """`given`, made to look as if it depended on what the loop carries.

    Otherwise XLA would move what is computed from it out of the loop, to where it always runs.
    """
    return jax.lax.optimization_barrier((carried, given))[1]


def _margins(graph: Graph) -> dict[str, tuple[int, int]]:
    """Zeros before and after each axis that the readers of a map need."""
    margins = {node.name: (0, 0) for node in graph.nodes}
    for node in graph.nodes:
        for name, window in node.sources:
            margins[name] = (max(margins[name][0], window.padding[0]), max(margins[name][1], window.padding[1]))
    return margins


def _implementation(
    asked: Implementation | None, graph: Graph, params: Params, sizes: Mapping[str, tuple], tiled: Any
) -> Implementation:
    """The one that is asked for, or the best; checked."""
    if asked not in (None, "native", "xla"):
        raise ValueError(f"implementation must be native, xla or None, got {asked!r}")
    if asked == "xla" or (tiled and asked is None):
        return "xla"
    if tiled:
        raise ValueError("tilings and limits are for implementation 'xla', got 'native'")
    reason = native.unserved(graph, params, sizes)
    if reason is None:
        return "native"
    if asked == "native":
        raise NotImplementedError(f"the native kernel does not serve this graph: {reason}")
    logging.warning("streaming by XLA, which is slower: %s", reason)
    return "xla"


def _check_steps(graph: Graph, params: Params) -> None:
    for node in graph.nodes:
        if node.quantized:
            step = np.asarray(params["maps"][node.name]["step"])
            if not (np.isfinite(step) & (step > 0)).all():
                raise ValueError(f"steps of {node.name} must be > 0 and finite, got {step.min()} to {step.max()}")
