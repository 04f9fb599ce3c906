"""How much of a network the streaming runner computed for a frame."""

import math
from typing import Any

import numpy as np

from deltajax.delta_activations import stream


def computed(runner: stream.Stream, counts: Any) -> float:
    """Share of the multiply-accumulates of all maps in the tiles that a step with these counts computed, in [0, 1]."""
    done = total = 0.0
    for node, count in zip(runner.graph.nodes, np.asarray(counts), strict=True):
        own = runner.params["maps"][node.name]
        each = sum(own[name].size for name in ("kernel", "shortcut") if name in own)
        of_map = each * math.prod(runner.sizes[node.name][:2])
        share = 1.0 if count == stream.DENSE else count / runner.tile_counts[node.name]
        done, total = done + of_map * share, total + of_map
    return done / total
