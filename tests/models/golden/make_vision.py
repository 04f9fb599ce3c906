"""Make `vision.json`: names, shapes and outputs of timm's and torchvision's own networks.

Needs Python 3.11 and `pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31`, nothing of this project:

    python tests/models/golden/make_vision.py
"""

import json
from pathlib import Path

import timm
import torch
import torchvision
from vision_weights import images, weight

NETWORKS = {  # name -> (library, size of the images)
    "resnet18": ("timm", 61),
    "resnet50": ("torchvision", 64),
    "tf_efficientnet_b4": ("timm", 70),
    "efficientnet_b4": ("torchvision", 61),
    "tf_efficientnetv2_s": ("timm", 70),
    "efficientnet_v2_s": ("torchvision", 61),
    "mobilenetv3_small_100": ("timm", 61),
    "mobilenet_v3_small": ("torchvision", 64),
    "mobilenetv2_100": ("timm", 61),
    "mobilenet_v2": ("torchvision", 64),
    "efficientnet_lite0": ("timm", 64),
    "tf_efficientnet_lite0": ("timm", 70),
}


def main():
    golden = {}
    for name, (library, size) in NETWORKS.items():
        build = timm.create_model if library == "timm" else getattr(torchvision.models, name)
        model = build(name) if library == "timm" else build()
        state = model.state_dict()
        shapes = {key: tuple(x.shape) for key, x in state.items() if not key.endswith("num_batches_tracked")}
        model.load_state_dict(
            {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()}, strict=False
        )
        model.double()
        x = torch.from_numpy(images(size)).double().permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model.eval()(x)[:, :8]
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout | torchvision.ops.StochasticDepth):
                    module.p = 0.0
            trained = model.train()(x)[:, :8]
        moved = [key for key in shapes if key.endswith(("running_mean", "running_var"))]
        golden[name] = {
            "size": size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "shapes": shapes,
            "logits": logits.tolist(),
            "training_logits": trained.tolist(),
            "moved": {key: model.state_dict()[key][:2].tolist() for key in (*moved[:2], *moved[-2:])},
        }
    path = Path(__file__).parent / "vision.json"
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
