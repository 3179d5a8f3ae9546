"""How a picture becomes a network's input: timm's evaluation transform, resolved once and stored with the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from coraq.config import MAX_PIXELS, DataConfig
from coraq.errors import CoraqError, UsageError

# timm also knows "random", which is for training only.
CROP_MODES = ("center", "squash", "border")
MAX_CHANNELS = 4096
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop and normalise, as the network's authors evaluated it.

    Attributes:
        input_size: (channels, height, width) in pixels.
        interpolation: of the resize.
        crop_pct: part of the resized image's side that the crop keeps.
        crop_mode: "center", "squash" or "border".
        mean, std: per channel, of pixels scaled to 0…1.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def resolve(cls, model: nn.Module | Mapping[str, Any], data: DataConfig) -> Preprocess:
        """The preprocessing of a timm model (or of its pretrained_cfg), under what `data` overrides.

        As timm's `validate.py` does by default, a network's test size and test crop win over its training
        size where it has both.

        Raises:
            UsageError: mean or std of another length than the network has channels, or an unknown interpolation.
        """
        cfg = dict(getattr(model, "pretrained_cfg", None) or {} if isinstance(model, nn.Module) else model)
        channels = _input_channels(model, cfg)
        for name, value in (("mean", data.mean), ("std", data.std)):
            if value is not None and len(value) not in (1, channels):
                raise UsageError(
                    f"--{name} has {len(value)} values, the network has {channels} input channels",
                    f"give one value, or {channels}",
                )
        if data.interpolation is not None and data.interpolation not in INTERPOLATIONS:
            raise UsageError(f"unknown interpolation {data.interpolation!r}", f"one of {', '.join(INTERPOLATIONS)}")
        overrides = {
            "in_chans": channels,
            "img_size": data.img_size,
            "crop_pct": data.crop_pct,
            "mean": data.mean,
            "std": data.std,
            "interpolation": data.interpolation,
        }
        resolved = resolve_data_config(overrides, pretrained_cfg=cfg, use_test_size=True)
        _, height, width = resolved["input_size"]
        return cls(
            input_size=(channels, int(height), int(width)),
            interpolation=str(resolved["interpolation"]),
            crop_pct=float(resolved["crop_pct"]),
            crop_mode=str(resolved["crop_mode"]),
            mean=_per_channel(resolved["mean"], channels),
            std=_per_channel(resolved["std"], channels),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the inverse."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """What `as_dict` gave.

        Raises:
            CoraqError: the values, which come from a file, are no preprocessing, or of images larger than any.
        """
        try:
            channels, height, width = (int(size) for size in values["input_size"])
            if not (1 <= channels <= MAX_CHANNELS and 1 <= height <= MAX_PIXELS and 1 <= width <= MAX_PIXELS):
                raise ValueError(f"input_size is {values['input_size']}")
            made = cls(
                input_size=(channels, height, width),
                interpolation=str(values["interpolation"]),
                crop_pct=float(values["crop_pct"]),
                crop_mode=str(values["crop_mode"]),
                mean=tuple(float(value) for value in values["mean"]),
                std=tuple(float(value) for value in values["std"]),
            )
            if not (0 < made.crop_pct < MAX_PIXELS and all(map(math.isfinite, made.mean))):
                raise ValueError("crop_pct or mean is out of range")
            if not (len(made.mean) == len(made.std) == channels and all(0 < x < math.inf for x in made.std)):
                raise ValueError("std is not positive, or of another length")
            if made.interpolation not in INTERPOLATIONS or made.crop_mode not in CROP_MODES:
                raise ValueError(f"{made.interpolation!r} or {made.crop_mode!r} is unknown")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            wrong = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise CoraqError(
                f"the file's preprocessing (input_size, mean, std, …) is invalid: {wrong}",
                "The file is damaged or not coraq's.",
            ) from error
        return made

    @property
    def image_mode(self) -> str:
        """PIL's mode of the pictures that `transform` takes."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """timm's own evaluation transform: picture to normalised float32 [channels, height, width]."""
        transform: Callable[[Image.Image], Tensor] = create_transform(
            input_size=self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return transform

    def describe(self) -> str:
        """One line for the report."""
        _, height, width = self.input_size
        size = f"{height} px" if height == width else f"{height}×{width} px"
        crop = f"crop {self.crop_pct:.4g}" + ("" if self.crop_mode == "center" else f" ({self.crop_mode})")
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{size}, {self.interpolation}, {crop}, mean {mean}, std {std}"


def _input_channels(model: nn.Module | Mapping[str, Any], cfg: Mapping[str, Any]) -> int:
    """Channels of the first convolution; a network built with `in_chans` keeps its old pretrained_cfg."""
    first = cfg.get("first_conv")
    name = first[0] if isinstance(first, (tuple, list)) and first else first
    if isinstance(model, nn.Module) and isinstance(name, str):
        weight = dict(model.named_parameters()).get(f"{name}.weight")
        if weight is not None and weight.dim() == 4:
            return int(weight.shape[1])
    return int(cfg.get("input_size", (3, 224, 224))[0])


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """`values`, or their average for every channel where their number does not fit, as timm does."""
    values = tuple(float(value) for value in values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels
