"""MobileNetV3-Small (arXiv 1905.02244, table 2), as a table for `efficientnet`.

`v3_small()` has timm's normalisation; torchvision's weights want `norm=batch_norm.Config(momentum=0.01, eps=1e-3)`.
"""

import functools

from deltajax.models.efficientnet import Config, Squeeze, Stage

_SQUEEZE = Squeeze(of="hidden", activation="relu", gate="hard_sigmoid")
_V3_SMALL = (
    Stage("inverted", 16, 1, 3, 2, 1, _SQUEEZE, "relu"),
    Stage("inverted", 24, 2, 3, 2, (72 / 16, 88 / 24), None, "relu"),
    Stage("inverted", 40, 3, 5, 2, (4, 6, 6), _SQUEEZE, "hard_swish"),
    Stage("inverted", 48, 2, 5, 1, 3, _SQUEEZE, "hard_swish"),
    Stage("inverted", 96, 3, 5, 2, 6, _SQUEEZE, "hard_swish"),
)
v3_small = functools.partial(Config, stem=16, stages=_V3_SMALL, head=576, head_hidden=1024, activation="hard_swish")
