"""The streaming runner: a frame at a time, computing only the tiles whose inputs changed.

Every map of a `graph.Graph` stays in memory between frames. A frame's quantised input is compared with the last one; a map
computes the tiles that read a changed pixel, compares what comes out with what was there, and only pixels that really differ
count as changed for the maps that read it. So quantisation, which makes small changes vanish, makes the work shrink on its way
through the network. Numbers are those of dense inference: nothing is accumulated, a tile is computed from whole inputs.

All of it is one compiled program. Each map has a limit on the tiles worth computing one by one; a map with more is computed
densely, and a frame of which more than `Plan.limits[input]` tiles changed goes densely through the whole network.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from deltajax.delta_activations import changes
from deltajax.delta_activations.graph import NO_PADDING, Graph, Node, Padding, Params, head

DENSE = -1  # in `Step.tiles`: the map was computed densely


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
      tilings: of every map.
      limits: [nodes] integers: more tiles than this are computed densely; of the input: tiles that changed.
    """

    def __init__(
        self,
        graph: Graph,
        params: Params,
        frame_shape: tuple[int, int, int],
        tilings: Mapping[str, Tiling] | None = None,
        limits: Mapping[str, int] | None = None,
    ):
        """Nothing is compiled before the first call.

        Raises:
          ValueError: frame_shape is not [H, W, C] of the graph's input or too small for it, a step is not > 0, or a map
            has an unknown name.
        """
        channels = graph.nodes[0].channels
        if len(frame_shape) != 3 or frame_shape[2] != channels or min(frame_shape) < 1:
            raise ValueError(f"frame_shape must be (height, width, {channels}), got {frame_shape}")
        _check_steps(graph, params)
        self.graph, self.params, self.frame_shape = graph, params, tuple(frame_shape)
        self.sizes = graph.sizes(*frame_shape[:2])
        self.nodes = tuple(self.sizes)
        self.tilings = {name: default_tiling(*size[:2]) for name, size in self.sizes.items()}
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
        self.limits = {name: counts[name] * 3 // 5 for name in self.nodes} | dict(limits or {})
        self._margins = _margins(graph)
        self._identity = f"{id(self):x}-{'x'.join(map(str, frame_shape))}"
        self._step = jax.jit(self._advance, donate_argnums=0)

    def init_state(self) -> State:
        """The state before the first frame; also the reset of a stream."""
        maps = {}
        for name, (height, width, channels) in self.sizes.items():
            before, after = self._margins[name]
            maps[name] = jnp.zeros((height + before + after, width + before + after, channels), jnp.float32)
        return State(maps, jnp.zeros((), bool), self._identity)

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
        limits = np.array([self.limits[name] for name in self.nodes], np.int32)
        return self._step(state, self.params, limits, frame)

    def run(self, frames: Iterable[Any], state: State | None = None) -> Iterator[Float[Array, "classes"]]:
        """Logits of each frame of a stream."""
        state = self.init_state() if state is None else state
        for frame in frames:
            logits, state, _ = self.step(state, frame)
            yield logits

    def _advance(self, state: State, params: Params, limits: Array, frame: Array) -> tuple[Array, State, Array]:
        source = self.graph.nodes[0]
        maps = dict(state.maps)
        frame = frame.astype(jnp.float32)
        values = source.compute(params["maps"][source.name], [frame[None]], [NO_PADDING])[0]
        differ = jnp.any(values != self._inside(source.name, maps[source.name]), axis=-1)
        count = jnp.sum(changes.tiles(differ, self.tilings[source.name].tile), dtype=jnp.int32)
        dense = (count > limits[0]) | ~state.started
        before, after = self._margins[source.name]
        maps[source.name] = jnp.pad(values, ((before, after), (before, after), (0, 0)))
        # Loops that run once or never, not conditionals: XLA lets loops update their arrays in place.
        frame_map = maps.pop(source.name)
        maps = _once(dense, functools.partial(self._all_dense, params, frame_map), maps)
        counts = jnp.full(len(self.nodes) - 1, DENSE, jnp.int32)
        sparse = functools.partial(self._all_sparse, params, limits, frame_map, differ)
        maps, counts = _once(~dense, sparse, (maps, counts))
        maps[source.name] = frame_map
        last = self.nodes[-1]
        logits = head(params, self._inside(last, maps[last])[None])[0]
        counts = jnp.concatenate([jnp.where(dense, DENSE, count)[None], counts])
        return logits, State(maps, jnp.ones((), bool), state.identity), counts

    def _all_dense(self, params: Params, frame_map: Array, maps: dict[str, Array]) -> dict[str, Array]:
        """All maps anew."""
        values = {self.nodes[0]: frame_map}
        for node in self.graph.nodes[1:]:
            values[node.name] = self._whole(node, params, values)
        return {name: values[name] for name in maps}

    def _all_sparse(
        self, params: Params, limits: Array, frame_map: Array, differ: Array, carry: tuple[dict[str, Array], Array]
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
            own = _once(overflow, functools.partial(self._dense, node, params, inputs), own)
            own = self._sparse(node, params, inputs, dirty, jnp.where(overflow, 0, count), own)
            maps[node.name], changed[node.name] = own
            counts.append(jnp.where(overflow, DENSE, count))
        return {name: maps[name] for name in self.nodes[1:]}, jnp.stack(counts)

    def _inside(self, name: str, value: Array) -> Array:
        """A map without its margins."""
        height, width, _ = self.sizes[name]
        before, _ = self._margins[name]
        return value[before : before + height, before : before + width]

    def _whole(self, node: Node, params: Params, maps: Mapping[str, Array]) -> Array:
        """A map with its margins, from sources with theirs.

        Margins are computed like pixels and set to zero then: elementwise, that is cheaper than to copy a map into its frame.
        """
        inputs = [maps[name][None] for name, _ in node.sources]
        paddings = [self._padding(node, i) for i in range(len(inputs))]
        value = node.compute(params["maps"][node.name], inputs, paddings)[0]
        return jnp.where(self._interior(node.name)[..., None], value, 0)

    def _padding(self, node: Node, source: int) -> Padding:
        """How a whole source, margins included, is to be padded so that the node's window yields its map with margins."""
        name, window = node.sources[source]
        before, after = self._margins[node.name]
        first = before * window.stride - self._margins[name][0] + window.padding[0]
        paddings = []
        for length, of_source in zip(self.sizes[node.name][:2], self.sizes[name][:2], strict=True):
            read = window.extent(before + length + after)
            paddings.append((first, read - first - of_source - sum(self._margins[name])))
        return (paddings[0], paddings[1])

    def _interior(self, name: str) -> Array:
        """True for pixels, false for margins."""
        height, width, _ = self.sizes[name]
        return jnp.pad(jnp.ones((height, width), bool), self._margins[name])

    def _dense(self, node: Node, params: Params, maps: dict[str, Array], own: tuple) -> tuple[Array, Array]:
        """A whole map and which of its pixels changed."""
        value = self._whole(node, params, maps)
        differ = self._inside(node.name, jnp.any(value != own[0], axis=-1))
        return jax.lax.optimization_barrier((value, differ))

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
            n, value, changed = carry
            chosen = jax.lax.dynamic_slice_in_dim(index, n * block, block)
            top, left = changes.origins(chosen, height, width, tiling.tile)
            inputs = []
            for name, window in node.sources:
                first = self._margins[name][0] - window.padding[0]
                inputs.append(
                    _gather(
                        maps[name],
                        top * window.stride + first,
                        left * window.stride + first,
                        (window.extent(rows), window.extent(columns)),
                    )
                )
            new = node.compute(params["maps"][node.name], inputs, [NO_PADDING] * len(inputs))
            old = _gather(value, top + margin, left + margin, (rows, columns))
            differ = jnp.any(new != old, axis=-1)
            # Otherwise every one of the updates below would compute all of it again for itself.
            new, differ = jax.lax.optimization_barrier((new, differ))
            for g in range(block):
                value = jax.lax.dynamic_update_slice(value, new[g], (top[g] + margin, left[g] + margin, 0))
                before = jax.lax.dynamic_slice(changed, (top[g], left[g]), (rows, columns))
                changed = jax.lax.dynamic_update_slice(changed, differ[g] | before, (top[g], left[g]))
            return n + 1, value, changed

        start = (jnp.zeros((), jnp.int32), *own)
        _, value, changed = jax.lax.while_loop(lambda carry: carry[0] * block < count, body, start)
        return value, changed


def _gather(x: Array, top: Array, left: Array, size: tuple[int, int]) -> Array:
    """Rectangles [G, *size, C] of a map."""

    def one(i, j):
        return jax.lax.dynamic_slice(x, (i, j, 0), (*size, x.shape[-1]))

    return jax.vmap(one)(top, left)


def _once(condition: Array, function: Any, value: Any) -> Any:
    """function(value) if the condition holds, else value."""
    return jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros((), bool), function(carry[1])), (condition, value)
    )[1]


def _margins(graph: Graph) -> dict[str, tuple[int, int]]:
    """Zeros before and after each axis that the readers of a map need."""
    margins = {node.name: (0, 0) for node in graph.nodes}
    for node in graph.nodes:
        for name, window in node.sources:
            margins[name] = (max(margins[name][0], window.padding[0]), max(margins[name][1], window.padding[1]))
    return margins


def _check_steps(graph: Graph, params: Params) -> None:
    for node in graph.nodes:
        if node.quantized:
            step = np.asarray(params["maps"][node.name]["step"])
            if not (np.isfinite(step) & (step > 0)).all():
                raise ValueError(f"steps of {node.name} must be > 0 and finite, got {step.min()} to {step.max()}")
