"""MobileNetV2 (arXiv 1801.04381, table 2) and MobileNetV3-Small (1905.02244, table 2), as tables for `efficientnet`.

`v2()` is torchvision's and timm's. `v3_small()` has timm's normalisation; torchvision's weights want
`norm=batch_norm.Config(momentum=0.01, eps=1e-3)`.
"""

import functools
from typing import Any

from deltajax.models.efficientnet import Config, Row, Squeeze, Stage, round_channels, scaled_stages

_V2: tuple[Row, ...] = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (3, 6, 32, 3, 2),
    (3, 6, 64, 4, 2),
    (3, 6, 96, 3, 1),
    (3, 6, 160, 3, 2),
    (3, 6, 320, 1, 1),
)


def v2(width: float = 1.0, **changes: Any) -> Config:
    """MobileNetV2 with relu6; timm's `mobilenetv2_140` is `v2(1.4)`."""
    stages = scaled_stages(_V2, width, 1.0, "relu6", None, fixed_ends=False)
    head = max(1280, round_channels(width, 1280))
    made = {"stem": round_channels(width, 32), "stages": stages, "head": head, "activation": "relu6"}
    return Config(**{**made, **changes})


def v2_deep(width: float, depth: float, **changes: Any) -> Config:
    """MobileNetV2 with more blocks: timm's `mobilenetv2_110d` is `v2_deep(1.1, 1.2)`, its `120d` `v2_deep(1.2, 1.4)`."""
    stages = scaled_stages(_V2, width, depth, "relu6", None, fixed_ends=True)
    return Config(**{"stem": 32, "stages": stages, "head": 1280, "activation": "relu6", **changes})


_SQUEEZE = Squeeze(of="hidden", activation="relu", gate="hard_sigmoid")
_V3_SMALL = (
    Stage("inverted", 16, 1, 3, 2, 1, _SQUEEZE, "relu"),
    Stage("inverted", 24, 2, 3, 2, (72 / 16, 88 / 24), None, "relu"),
    Stage("inverted", 40, 3, 5, 2, (4, 6, 6), _SQUEEZE, "hard_swish"),
    Stage("inverted", 48, 2, 5, 1, 3, _SQUEEZE, "hard_swish"),
    Stage("inverted", 96, 3, 5, 2, 6, _SQUEEZE, "hard_swish"),
)
v3_small = functools.partial(Config, stem=16, stages=_V3_SMALL, head=576, head_hidden=1024, activation="hard_swish")
