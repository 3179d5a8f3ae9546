"""Trains the bundled demo network on scikit-learn's handwritten digits and writes coraq/demo/.

    python examples/train_demo.py [FOLDER]      # two minutes on one core; the default FOLDER is coraq/demo

Writes config.json and model.safetensors, which `timm.create_model("local-dir:FOLDER", pretrained=True)`
opens, and digits.npz with the images and the fixed split. scikit-learn is needed here only.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

SEED = 0
TEST_COUNT = 600
EPOCHS = 32
BATCH = 64
ARCHITECTURE = "test_efficientnet"  # dense 3×3, depthwise, squeeze-excite; twice as deep to have residual sums
MODEL_ARGS: dict[str, Any] = {"depth_multiplier": 2.0, "channel_multiplier": 0.75}
PREPROCESSING: dict[str, Any] = {
    "input_size": [3, 48, 48],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


def split_digits() -> dict[str, np.ndarray]:
    """The 1,797 digits as uint8 [n, 8, 8] (0 to 255), shuffled by the seed: 1,197 to train, 600 to test."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored with 17 levels
    labels = digits.target.astype(np.uint8)
    order = np.random.default_rng(SEED).permutation(len(labels))
    test, train = order[:TEST_COUNT], order[TEST_COUNT:]
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
    }


def prepare(images: np.ndarray) -> Tensor:
    """uint8 [n, 8, 8] to normalised float32 [n, 3, 48, 48], by timm's own evaluation transform."""
    transform = timm.data.create_transform(**PREPROCESSING)
    return torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in images])


def jitter(images: Tensor, rng: torch.Generator) -> Tensor:
    """Rotated by up to 12 degrees, scaled by up to 12 %, shifted by up to 8 % of the width."""
    count = len(images)
    draw = torch.rand(count, 4, generator=rng) * 2 - 1
    angle, scale = draw[:, 0] * math.radians(12), 1 + 0.12 * draw[:, 1]
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = draw[:, 2:] * 0.16  # grid_sample's coordinates span 2
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def top1_pct(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(200)])
    return 100 * (predicted == labels).float().mean().item()


def train(model: torch.nn.Module, images: Tensor, labels: Tensor) -> None:
    rng = torch.Generator().manual_seed(SEED)
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.15)
    model.train()
    for epoch in range(EPOCHS):
        started, total = time.perf_counter(), 0.0
        order = torch.randperm(len(images), generator=rng)[: len(images) // BATCH * BATCH]
        for chosen in order.split(BATCH):
            loss = F.cross_entropy(model(jitter(images[chosen], rng)), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2d}  loss {total * BATCH / len(order):.4f}  {time.perf_counter() - started:.1f} s")
    model.eval()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the sum's order, and so the weights, depend on the number of threads
    torch.manual_seed(SEED)  # timm initialises from the global generator
    digits = split_digits()
    train_images, test_images = prepare(digits["train_images"]), prepare(digits["test_images"])
    train_labels, test_labels = (torch.from_numpy(digits[f"{part}_labels"]).long() for part in ("train", "test"))
    model = timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
    train(model, train_images, train_labels)
    accuracy = top1_pct(model, test_images, test_labels)
    print(
        f"test top-1 {accuracy:.2f} % of {len(test_labels)}, train {top1_pct(model, train_images, train_labels):.2f} %"
    )

    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "digits.npz", **digits)  # type: ignore[arg-type]
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "num_features": model.num_features,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "tag": "demo",
            "custom_load": False,
            **PREPROCESSING,
            "fixed_input_size": False,
            "num_classes": 10,
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "label_names": [str(digit) for digit in range(10)],
            "license": "apache-2.0",
        },
        "provenance": {
            "source": "examples/train_demo.py of coraq, on the UCI Optical Recognition of Handwritten Digits",
            "test_top1_pct": round(accuracy, 2),
            "test_count": len(test_labels),
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "coraq" / "demo")
