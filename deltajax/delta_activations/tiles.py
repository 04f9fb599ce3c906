"""Streaming by XLA, tile by tile: for where the native kernel does not serve.

Each map is cut into tiles and has a limit on those worth computing one by one; a map with more is computed densely, and a frame
of which more than the input's limit changed goes densely through the whole network.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from deltajax.delta_activations import changes
from deltajax.delta_activations.graph import NO_PADDING, Graph, Node, Padding, Sizes, head, inside

DENSE = -1  # among the counts of tiles: the map was computed densely


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a map is cut up.

    Attributes:
      tile: rows and columns of a tile.
      block: tiles computed together, one product; more are worked off block by block.
    """

    tile: tuple[int, int]
    block: int


def default_tiling(height: int, width: int) -> Tiling:
    """About 14 tiles to a side of 4 to 16 pixels, 2048 pixels to a block; maps of less than 16 pixels are one or four tiles."""
    side = max(height, width)
    edge = next((t for t in (16, 8, 4) if side >= 12 * t), 4 if side > 16 else -(-side // 2) if side > 8 else side)
    tile = (min(edge, height), min(edge, width))
    rows, columns = changes.grid(height, width, tile)
    return Tiling(tile, max(1, min(rows * columns, 2048 // (tile[0] * tile[1]), 16)))


class Runner:
    """A graph for frames of one size.

    Attributes:
      memory: bytes that a state holds beside the maps: none.
    """

    memory = 0

    def __init__(self, graph: Graph, sizes: Sizes, tilings: Mapping[str, Tiling]):
        """`tilings`: of every map."""
        self.graph, self.sizes, self.tilings, self.margins = graph, sizes, tilings, graph.margins()
        for name, tiling in tilings.items():
            height, width, _ = sizes[name]
            count = int(np.prod(changes.grid(height, width, tiling.tile))) if min(tiling.tile) > 0 else 0
            if not 1 <= tiling.block <= count or tiling.tile[0] > height or tiling.tile[1] > width:
                raise ValueError(
                    f"tiles of {name} must be of 1 to {height} x {width} pixels, a block of 1 to all tiles, got {tiling}"
                )

    def prepare(self, params: dict) -> dict[str, Any]:
        """What `advance` takes of the parameters, beside "limits": tiles of every map."""
        maps = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params["maps"])
        return {"maps": maps, "head": jax.tree.map(jnp.array, params["head"])}

    def advance(
        self, maps: dict[str, Array], memory: Array, started: Array, given: dict, frame: Float[Array, "H W C"]
    ) -> tuple[Float[Array, "classes"], dict[str, Array], Array, Int[Array, "nodes"]]:
        """One frame: logits, the maps with their margins, `memory`, numbers of tiles computed (DENSE: all at once)."""
        source, last = self.graph.nodes[0].name, self.graph.nodes[-1].name
        maps, limits = dict(maps), given["limits"]
        values = self.graph.nodes[0].compute(given["maps"][source], [frame[None]], [NO_PADDING])[0]
        differ = jnp.any(values != self._inside(source, maps[source]), axis=-1)
        count = jnp.sum(changes.near(differ, self.tilings[source].tile), dtype=jnp.int32)
        dense = (count > limits[0]) | ~started
        before, after = self.margins[source]
        del maps[source]
        frame_map = jnp.pad(values, ((before, after), (before, after), (0, 0)))
        # Loops that run once or never, not conditionals: XLA lets loops update their arrays in place.
        maps = _once(dense, self._all_dense, maps, given["maps"], frame_map)
        counts = jnp.full(len(self.graph.nodes) - 1, DENSE, jnp.int32)
        maps, counts = _once(~dense, self._all_sparse, (maps, counts), given["maps"], limits, frame_map, differ)
        maps[source] = frame_map
        logits = head(given, self._inside(last, maps[last])[None])[0]
        return logits, maps, memory, jnp.concatenate([jnp.where(dense, DENSE, count)[None], counts])

    def _inside(self, name: str, value: Array) -> Array:
        return inside(value, self.sizes[name], self.margins[name])

    def _all_dense(self, maps: dict[str, Array], params: dict[str, dict], frame_map: Array) -> dict[str, Array]:
        """All maps anew."""
        maps = {**maps, self.graph.nodes[0].name: frame_map}
        for node in self.graph.nodes[1:]:
            maps[node.name] = self._put(node.name, maps[node.name], self._whole(node, params[node.name], maps))
        return {node.name: maps[node.name] for node in self.graph.nodes[1:]}

    def _all_sparse(
        self,
        carry: tuple[dict[str, Array], Array],
        params: dict[str, dict],
        limits: Array,
        frame_map: Array,
        differ: Array,
    ) -> tuple[dict[str, Array], Array]:
        """All maps where the frame changed, each densely if that is cheaper; and the counts of tiles."""
        source = self.graph.nodes[0].name
        maps, changed, counts = {**carry[0], source: frame_map}, {source: differ}, [carry[1][:0]]
        for i, node in enumerate(self.graph.nodes[1:], 1):
            inputs = {name: maps[name] for name, _ in node.sources}
            own = maps[node.name], jnp.zeros(self.sizes[node.name][:2], bool)
            dirty = self._dirty(node, changed)
            count = jnp.sum(dirty, dtype=jnp.int32)
            overflow = count > limits[i]
            own = _once(overflow, functools.partial(self._dense, node), own, params[node.name], inputs)
            own = self._sparse(node, params[node.name], inputs, dirty, jnp.where(overflow, 0, count), own)
            maps[node.name], changed[node.name] = own
            counts.append(jnp.where(overflow, DENSE, count)[None])
        return {node.name: maps[node.name] for node in self.graph.nodes[1:]}, jnp.concatenate(counts)

    def _put(self, name: str, whole: Array, value: Array) -> Array:
        """A map with its margins, all else anew."""
        before, _ = self.margins[name]
        return jax.lax.dynamic_update_slice(whole, value, (before, before, 0))

    def _whole(self, node: Node, params: dict[str, Array], maps: Mapping[str, Array]) -> Array:
        """A map without its margins, from sources with theirs."""
        paddings: list[Padding] = []
        for name, window in node.sources:  # margins are read as padding; what is too much is cropped
            side = (window.padding[0] - self.margins[name][0], window.padding[1] - self.margins[name][1])
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
        self, node: Node, params: dict[str, Array], maps: dict[str, Array], dirty: Array, count: Array, own: tuple
    ) -> tuple[Array, Array]:
        """The dirty tiles of a map, block by block: gather windows, compute, compare, put back."""
        height, width, _ = self.sizes[node.name]
        tiling, margin = self.tilings[node.name], self.margins[node.name][0]
        (rows, columns), block = tiling.tile, tiling.block
        slots = -(-dirty.size // block) * block
        # The last block is filled up with tile 0: it is computed needlessly, but right.
        index = jnp.nonzero(dirty, size=slots, fill_value=0)[0].astype(jnp.int32)

        def body(carry):
            n, value, differ = carry
            positions, sources, of_map = _inside_loop(n, (index, maps, params))
            chosen = jax.lax.dynamic_slice_in_dim(positions, n * block, block)
            top, left = changes.origins(chosen, height, width, tiling.tile)
            inputs = []
            for name, window in node.sources:
                first = self.margins[name][0] - window.padding[0]
                corner = top * window.stride + first, left * window.stride + first
                inputs.append(_gather(sources[name], *corner, (window.extent(rows), window.extent(columns))))
            if node.quantized and of_map["step"].ndim == 3:  # of neurons: those of the tiles
                of_map = {**of_map, "step": _gather(of_map["step"], top, left, (rows, columns))}
            new = node.compute(of_map, inputs, [NO_PADDING] * len(inputs))
            old = _gather(value, top + margin, left + margin, (rows, columns))
            # Otherwise every one of the updates below would compute all of it again for itself.
            new, unlike = jax.lax.optimization_barrier((new, jnp.any(new != old, axis=-1)))
            for g in range(block):
                place = top[g] + margin, left[g] + margin, jnp.zeros_like(n)
                value = jax.lax.dynamic_update_slice(value, new[g], place)
            return n + 1, value, jax.lax.dynamic_update_slice_in_dim(differ, unlike, n * block, 0)

        start = (jnp.zeros((), jnp.int32), own[0], jnp.zeros((slots, rows, columns), bool))
        _, value, differ = jax.lax.while_loop(lambda carry: carry[0] * block < count, body, start)
        # Tiles are worked off in their order, so the n-th dirty one stands in slot n.
        slot = jnp.cumsum(dirty) - 1
        by_tile = differ[slot] & (dirty & (count > 0))[:, None, None]
        return value, own[1] | changes.assemble(by_tile, height, width)


def _gather(x: Array, top: Array, left: Array, size: tuple[int, int]) -> Array:
    """Rectangles [G, *size, C] of a map."""

    def one(i, j):
        return jax.lax.dynamic_slice(x, (i, j, jnp.zeros_like(i)), (*size, x.shape[-1]))

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
