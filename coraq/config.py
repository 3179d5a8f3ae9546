"""Configuration as interface: what is quantized, on what data, how. All models are frozen and versioned.

Nothing here imports torch, so that the command line can build and check a configuration at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from coraq.scheme import (
    COLUMN_BITS,
    MAX_BITS,
    MIN_BITS,
    ActivationScheme,
    ColumnScale,
    Corrections,
    Frozen,
    LayerScheme,
    Scheme,
    WeightScheme,
)

__all__ = [
    "COLUMN_BITS",
    "MAX_BITS",
    "MIN_BITS",
    "ActivationScheme",
    "ColumnScale",
    "Corrections",
    "DataConfig",
    "Frozen",
    "LayerScheme",
    "RunConfig",
    "Scheme",
    "WeightScheme",
]

MAX_PIXELS = 8192  # of an image's side: one such image takes 0.8 GB in float32
MAX_CROP = 2  # a fraction; some networks of timm's were evaluated on a little more than the image


class DataConfig(Frozen):
    """Where images come from and how they are prepared. Names follow timm's `validate.py`."""

    data_dir: str | None = Field(default=None, description="folder of images, one sub-folder for each class")
    dataset: str = Field(default="", description="timm dataset: torch/NAME, hfds/NAME or wds/NAME (default: a folder)")
    split: str = Field(default="validation", description="split to evaluate on")
    calib_dir: str | None = Field(default=None, description="folder of calibration images, if not under --data-dir")
    calib_split: str = Field(default="train", description="split to calibrate on")
    calib_size: int = Field(default=1024, ge=1, description="number of calibration images")
    calib_rows_per_input: int = Field(
        default=64,
        ge=0,
        description="rows of im2col patches for each input of a layer that its Gram matrix is estimated from; 0: all",
    )
    calib_early_images: int = Field(
        default=256,
        ge=0,
        description="images that the first layers are calibrated on, where activations are largest; the others join "
        "once they need no more memory. 0: all from the start",
    )
    calib_precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="precision of the calibration passes. auto: bfloat16 for weights of at most 4 bits with float "
        "activations, where the processor has it",
    )
    eval_size: int | None = Field(default=None, ge=1, description="evaluate on at most this many images (default: all)")
    class_map: str | None = Field(default=None, description="text file of class names in index order")
    batch_size: int = Field(default=32, ge=1, description="images in a batch")
    workers: int = Field(default=2, ge=0, description="processes that decode images")
    img_size: int | None = Field(
        default=None, ge=8, le=MAX_PIXELS, description="input size in pixels (default: the model's)"
    )
    crop_pct: float | None = Field(
        default=None, gt=0, le=MAX_CROP, description="centre-crop fraction, 0.875 for 87.5 % (default: the model's)"
    )
    mean: tuple[float, ...] | None = Field(default=None, description="channel means (default: the model's)")
    std: tuple[float, ...] | None = Field(default=None, description="channel deviations (default: the model's)")
    interpolation: str | None = Field(default=None, description="resize interpolation (default: the model's)")
    strict: bool = Field(default=False, description="stop at a corrupt image instead of skipping it")

    @field_validator("mean", "std")
    @classmethod
    def _normalises(cls, value: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if value is None:
            return None
        if not all(math.isfinite(x) and (x > 0 or info.field_name == "mean") for x in value):
            raise ValueError(f"each {info.field_name} must be finite{' and positive' * (info.field_name == 'std')}")
        if any(abs(x) > 1 for x in value):
            of_255 = ", ".join(f"{x / 255:.4g}" for x in value)
            raise ValueError(
                f"pixels are scaled to 0…1 before; of values up to 255 that is --{info.field_name} {of_255}"
            )
        return value


class RunConfig(Frozen):
    """One run, completely: the run folder's name is a hash of this."""

    version: Literal[2] = 2
    model: str = Field(description="timm name, hf-hub:ORG/NAME, local-dir:FOLDER, or demo")
    checkpoint: str | None = Field(default=None, description="float weights to load (safetensors)")
    num_classes: int | None = Field(
        default=None, ge=1, description="number of classes of an untrained network (default: the model's)"
    )
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="argument for timm's create_model")
    method: str = Field(default="mixed", description="quantization method")
    options: dict[str, Any] = Field(default_factory=dict, description="option of the method")
    scheme: Scheme = Scheme()
    data: DataConfig = DataConfig()
    seed: int = Field(default=0, description="seed of everything random")
    device: str = Field(default="cpu", description="torch device")
    calib_memory: int | None = Field(
        default=None, ge=1, description="bound on the memory of activations (default: half of what is free)"
    )
    float_dtype: Literal["float32", "float16"] = Field(
        default="float32", description="type of what stays unquantized: biases, norms"
    )
    coding: Literal["auto", "packed", "ans"] | None = Field(
        default=None,
        description="how codes are stored: packed (so many bits each), ans (entropy-coded), or auto, the smaller of "
        "the two, layer by layer; not given: as the method stores them",
    )
    size: int | None = Field(
        default=None, ge=1, description="largest size of the checkpoint in bytes, all included, for methods that choose"
    )
    ratio: float | None = Field(
        default=None, gt=1, description="the same as a ratio: how many times smaller than the float weights"
    )
    budget_bits: float | None = Field(
        default=None, gt=0, le=8, description="the same as bits for each quantized weight, scales included"
    )

    @field_validator("ratio", "budget_bits")
    @classmethod
    def _is_the_only_budget(cls, value: float | None, info: ValidationInfo) -> float | None:
        others = [name for name in ("size", "ratio") if info.data.get(name) is not None]
        if value is not None and others:
            raise ValueError(f"a size is given already (--{others[0]}): a budget is said in one way")
        return value

    @property
    def budget(self) -> str | None:
        """The option that gives a budget of bytes, as it is typed; None: there is none."""
        if self.size is not None:
            return f"--size {self.size}"
        if self.ratio is not None:
            return f"--ratio {self.ratio:g}"
        return None if self.budget_bits is None else f"--bits {self.budget_bits:g}"

    @property
    def budget_text(self) -> str | None:
        """The budget in words: "60,000 bytes", "1/8 of the float bytes", "2.7 bits a weight"; or None."""
        if self.size is not None:
            return f"{self.size:,} bytes"
        if self.ratio is not None:
            return f"1/{self.ratio:g} of the float bytes"
        return None if self.budget_bits is None else f"{self.budget_bits:g} bits a weight"

    def digest(
        self, options: Mapping[str, Any] | None = None, bases: Sequence[Mapping[str, Any]] = (), **more: str
    ) -> str:
        """Six hex digits over what differs from the defaults, the method's options in full, and `more`.

        A new field of the configuration changes no digest where it has its default. A method's options count in full:
        with another default a method gives other codes. What cannot change the result (workers, the memory bound) is
        left out, so that the same command with another number of workers resumes the same run. A strict run is
        another run: it may not skip images.

        Args:
            options: all of the method's options, after its presets; None: those that are given.
            bases: of each method that this one uses: its name, version and all of its options.
            more: whatever else decides the result, such as the fingerprint of the calibration images.
        """
        data = {"workers"} if self.data.strict else {"workers", "strict"}
        without: Any = {"calib_memory": True, "options": True, "data": data}
        content = self._resolved().model_dump(mode="json", exclude_defaults=True, exclude=without)
        identity = {
            **content,
            "version": self.version,
            "method": self.method,
            "options": dict(self.options if options is None else options),
            "bases": [dict(base) for base in bases],
            "more": more,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]

    def _resolved(self) -> RunConfig:
        """Without what has no effect: of two configurations that give the same result, the same one."""
        data, weights, own = self.data, self.scheme.weights, self.scheme.activations
        if not 0 < data.calib_early_images < data.calib_size:  # all images are there from the start
            data = data.model_copy(update={"calib_early_images": 0})
        if weights.symmetric:
            weights = weights.model_copy(update={"zero_point_fraction": "auto"})
        if own is not None and own.range == "mse":
            own = own.model_copy(update={"percentile": ActivationScheme.model_fields["percentile"].default})
        scheme = self.scheme.model_copy(update={"weights": weights, "activations": own})
        return self.model_copy(update={"data": data, "scheme": scheme})
