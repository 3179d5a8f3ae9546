"""Configuration as interface: what is quantized, on what data, how. All models are frozen and versioned.

Nothing here imports torch, so that the command line can build and check a configuration at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

MIN_BITS, MAX_BITS = 2, 8
MAX_PIXELS = 8192  # of an image's side: one such image takes 0.8 GB in float32


class Frozen(BaseModel):
    """A frozen pydantic model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


COLUMN_BITS = 4  # of a weight that column scales are made for, or of an input, at most
ColumnScale = Literal["auto", "none", "channel", "input"]
FRACTIONS = {"whole": 0, "half": 1, "quarter": 2, "eighth": 3}  # bits of a zero point behind the point


class LayerScheme(Frozen):
    """What one layer gets. `rank` is for methods with low-rank adapters; `None` leaves it to the method."""

    bits: int = Field(ge=MIN_BITS, le=MAX_BITS, description="bits of a weight code")
    rank: int | None = Field(default=None, ge=0, description="rank of the adapter")
    act_bits: int | None = Field(
        default=None, ge=MIN_BITS, le=MAX_BITS, description="bits of the layer's input, where inputs are quantized"
    )

    def __str__(self) -> str:
        """As `--override` takes it."""
        return f"{self.bits}" if self.act_bits is None else f"{self.bits}/{self.act_bits}"


class Scheme(Frozen):
    """All that decides whether a number reproduces, beside the method. Printed with every result."""

    version: Literal[1] = 1
    bits: int = Field(default=4, ge=MIN_BITS, le=MAX_BITS, description="bits of a weight code, 2 to 8")
    first_bits: int | None = Field(
        default=8, ge=MIN_BITS, le=MAX_BITS, description="bits of the first layer; empty: as all others"
    )
    last_bits: int | None = Field(
        default=8, ge=MIN_BITS, le=MAX_BITS, description="bits of the last layer (the classifier); empty: as all others"
    )
    granularity: Literal["channel", "tensor"] = Field(
        default="channel", description="one scale per output channel, or one per weight tensor"
    )
    symmetric: bool = Field(
        default=False, description="zero point fixed at the middle code: every integer runtime takes it"
    )
    zero_point: Literal["auto", "whole", "half", "quarter", "eighth"] = Field(
        default="auto",
        description="where an affine grid's zero point may lie: at a code (whole), or between codes, too, in the same "
        "byte; auto: in quarters at 2 bits where a grid's range is searched, else whole. Integer kernels take whole "
        "ones only: exports for them store 1, 2 or 3 bits more a code",
    )
    column_scale: ColumnScale = Field(
        default="auto",
        description="a second scale, for every input channel of a weight of at most 4 bits (channel), or of a layer "
        "whose input has at most 4 bits and is multiplied by them before it is rounded (input): one byte each; auto: "
        "input where there are such inputs, channel for affine grids per channel with float activations, by methods "
        "that do better with it. Exports for integer kernels, which know none, round such weights to 8 bits",
    )
    bias: Literal["float", "layer", "keep"] = Field(
        default="float",
        description="bias correction: make a layer's mean output equal the float network's (float), that of the same "
        "layer with float weights on the quantized network's inputs (layer), or leave the bias alone (keep)",
    )
    gain: Literal["float", "keep"] = Field(
        default="float",
        description="scale correction: make every output channel vary as in the float network, as re-estimating "
        "BatchNorm would (float), or keep the scales that the method chose (keep); needs a scale per channel",
    )
    act_bits: int | None = Field(
        default=None,
        ge=MIN_BITS,
        le=MAX_BITS,
        validate_default=True,
        description="bits of an activation, 2 to 8; not given: float",
    )
    act_placement: Literal["inputs", "integer"] = Field(
        default="inputs",
        description="tensors with a grid: those that quantized layers read (inputs, as in papers), or also the outputs "
        "of layers, residual sums and products, as integer runtimes need (integer)",
    )
    act_first_bits: int | None = Field(
        default=8, ge=MIN_BITS, le=MAX_BITS, description="bits of the images; empty: as all others"
    )
    act_last_bits: int | None = Field(
        default=8, ge=MIN_BITS, le=MAX_BITS, description="bits of the last layer's input; empty: as all others"
    )
    act_range: Literal["mse", "percentile"] = Field(
        default="mse", description="range of an activation's grid: least error of its values, or percentiles of them"
    )
    act_percentile: float = Field(default=99.99, gt=50, le=100, description="percentile: the upper one, in %")
    act_mixed: Literal["none", "values", "macs", "both"] = Field(
        default="none",
        description="mixed precision of inputs: 2 to 8 bits each, by the KL divergence that its rounding costs, and "
        "--act-bits on average over all values (values: the same bytes), over the multiplications that they go into "
        "(macs: the same BitOps), or over either (both); none: all alike. The first and last input and overrides keep "
        "their own",
    )
    overrides: dict[str, LayerScheme] = Field(
        default_factory=dict,
        description="regular expression over layer names -> that layer's own bits and rank; first match wins",
    )

    @field_validator("overrides")
    @classmethod
    def _compiles(cls, value: dict[str, LayerScheme]) -> dict[str, LayerScheme]:
        for pattern in value:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    @field_validator("overrides")
    @classmethod
    def _has_inputs_to_quantize(cls, value: dict[str, LayerScheme], info: ValidationInfo) -> Any:
        lone = [pattern for pattern, own in value.items() if own.act_bits is not None]
        if lone and info.data.get("act_bits", 0) is None:
            raise ValueError(f"bits of inputs, as {lone[0]!r} has them, need --act-bits for the other layers")
        return value

    @field_validator("act_bits", "act_placement")
    @classmethod
    def _has_inputs_to_scale(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("column_scale") == "input" and value in (None, "integer"):
            raise ValueError(
                "column scales of inputs need --act-bits and --act-placement inputs; leave out --column-scale input"
            )
        return value

    @field_validator("act_mixed")
    @classmethod
    def _has_inputs_to_mix(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and info.data.get("act_bits", 0) is None:
            raise ValueError("mixed bits of inputs need --act-bits, what they are on average")
        if value != "none" and info.data.get("act_placement") == "integer":
            raise ValueError("mixed bits are for inputs; leave out --act-placement integer")
        return value

    @field_validator("zero_point")
    @classmethod
    def _is_free(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("symmetric") and value not in ("auto", "whole"):
            raise ValueError("a symmetric grid has its zero point at the middle code; leave out --symmetric")
        return value

    def resolve(self, names: list[str]) -> dict[str, LayerScheme]:
        """Each layer's own scheme. `names` are all quantizable layers in execution order."""
        return {
            name: own if own.act_bits is not None else own.model_copy(update={"act_bits": self.act_bits})
            for name, own in self._own(names).items()
        }

    def mixes(self, names: list[str]) -> set[str]:
        """The layers whose inputs' bits `act_mixed` shares out. `names` as in `resolve`."""
        if self.act_mixed == "none":
            return set()
        return {name for name, own in self._own(names).items() if own.act_bits is None}

    def _own(self, names: list[str]) -> dict[str, LayerScheme]:
        """As `resolve`, but without bits of an input that has no others than `act_bits`."""
        found = {}
        for index, name in enumerate(names):
            first, last = index == 0, index == len(names) - 1  # of a network of one layer both: the first one counts
            bits = (first and self.first_bits) or (last and self.last_bits) or self.bits
            act = (first and self.act_first_bits) or (last and self.act_last_bits) or None
            matches = (own for pattern, own in self.overrides.items() if re.fullmatch(pattern, name))
            own = next(matches, LayerScheme(bits=bits))
            if own.act_bits is None and self.act_bits is not None:
                own = own.model_copy(update={"act_bits": act})
            found[name] = own
        return found

    def fraction(self, bits: int, searched: bool = True) -> int:
        """Bits of a zero point behind the point, for codes of so many bits: as many as a byte has room for.

        `auto` is what measured best (examples/results/activations.md) among what fits in a 4-bit code, the narrowest
        that integer kernels of other tools take.

        Args:
            searched: the grid's range is searched for the least error. One that is just the weights' extremes is wide,
                and small weights do without a level at zero badly: at 2 bits quarters raise the weight error of min-max
                grids by 13 to 73 % (three networks), and lower that of searched ones by 9 to 17 %.
        """
        if self.symmetric:
            return 0
        if self.zero_point == "auto":
            return FRACTIONS["quarter"] if bits == 2 and searched else 0
        return min(FRACTIONS[self.zero_point], MAX_BITS - bits)

    def resolve_auto(self, column_scales: bool) -> Scheme:
        """The scheme with what is left to the method decided.

        Args:
            column_scales: whether the method does better with them (`MethodConfig.column_scales`).
        """
        if self.column_scale != "auto":
            return self
        chosen = "none"
        if column_scales and self.granularity == "channel":
            if self.act_bits is None:
                chosen = "none" if self.symmetric else "channel"
            elif self.act_bits <= COLUMN_BITS and self.act_placement == "inputs":
                chosen = "input"
        return self.model_copy(update={"column_scale": chosen})

    def scales_inputs(self, act_bits: int) -> bool:
        """Whether an input of so many bits is multiplied by column scales before it is rounded."""
        return self.column_scale == "input" and act_bits <= COLUMN_BITS

    def scales_columns(self, bits: int, channels: int) -> bool:
        """Whether a weight with codes of so many bits and so many input channels in a group has column scales.

        With one channel a group (depthwise) the scale of the output channel says as much. At 8 bits nothing is gained.
        An `auto` that is not resolved has none.
        """
        return self.column_scale == "channel" and bits <= COLUMN_BITS and channels > 1

    def overrides_layer(self, name: str) -> bool:
        """Whether an override says this layer's bits."""
        return any(re.fullmatch(pattern, name) for pattern in self.overrides)

    def unmatched(self, names: list[str]) -> list[str]:
        """The overrides that no name matches."""
        return [pattern for pattern in self.overrides if not any(re.fullmatch(pattern, name) for name in names)]

    def describe(self) -> str:
        """One line that a person can read and a paper can cite."""
        edges = f"first/last layer {self.first_bits or self.bits}/{self.last_bits or self.bits} bits"
        zero = "" if self.symmetric else f", zero point {self.zero_point}"
        grid = f"{'symmetric' if self.symmetric else 'affine'} per {self.granularity}{zero}"
        grid += {
            "auto": ", column scales auto",
            "channel": ", column scales",
            "input": ", column scales of inputs",
            "none": "",
        }[self.column_scale]
        extra = "".join(f", {pattern}={own}" for pattern, own in self.overrides.items())
        return (
            f"W{self.bits}A{self.act_bits or 32}, {edges}, {grid}, bias {self.bias}, gain {self.gain}, "
            f"{self._activations()}{extra}"
        )

    def _activations(self) -> str:
        if self.act_bits is None:
            return "activations float"
        where = "layer inputs" if self.act_placement == "inputs" else "layer inputs and outputs, sums and products"
        edges = f"images/last input {self.act_first_bits or self.act_bits}/{self.act_last_bits or self.act_bits} bits"
        kind = "mse" if self.act_range == "mse" else f"percentile {self.act_percentile:g}"
        over = {
            "none": "",
            "values": "a value",
            "macs": "a multiplication",
            "both": "a value and a multiplication",
        }[self.act_mixed]
        mixed = f"mixed, {self.act_bits} bits {over} on average, " if over else ""
        return f"activations per tensor at {where} ({self.act_placement}), {mixed}{edges}, range by {kind}"


class DataConfig(Frozen):
    """Where images come from and how they are prepared. Names follow timm's `validate.py`."""

    data_dir: str | None = Field(default=None, description="folder of images, one sub-folder a class")
    dataset: str = Field(default="", description="timm dataset spec: '' for folders, torch/…, hfds/…, wds/…")
    split: str = Field(default="validation", description="split to evaluate on")
    calib_dir: str | None = Field(default=None, description="folder of calibration images, if not under --data-dir")
    calib_split: str = Field(default="train", description="split to calibrate on")
    calib_size: int = Field(default=1024, ge=1, description="number of calibration images")
    calib_rows: int = Field(
        default=64,
        ge=0,
        description="patches for each input of a layer that Grams are estimated from; 0: all",
    )
    calib_early: int = Field(
        default=256,
        ge=0,
        description="images that the first layers are calibrated on, whose activations are largest and inputs fewest; "
        "the others join as soon as all together take no more memory than these did; 0: all from the start",
    )
    calib_precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of the passes through the network while calibrating (what is measured of them and solved is in "
        "float32 and float64); auto: bfloat16 for weights of at most 4 bits, float activations and a processor that "
        "multiplies it itself",
    )
    eval_size: int | None = Field(default=None, ge=1, description="evaluate on at most so many images (default: all)")
    class_map: str | None = Field(default=None, description="text file: class names in index order")
    batch_size: int = Field(default=32, ge=1, description="images in a micro-batch")
    workers: int = Field(default=2, ge=0, description="processes that decode images")
    img_size: int | None = Field(
        default=None, ge=8, le=MAX_PIXELS, description="input size in pixels (default: the model's)"
    )
    crop_pct: float | None = Field(default=None, gt=0, description="centre-crop fraction (default: the model's)")
    mean: tuple[float, ...] | None = Field(default=None, description="channel means (default: the model's)")
    std: tuple[float, ...] | None = Field(default=None, description="channel deviations (default: the model's)")
    interpolation: str | None = Field(default=None, description="resize interpolation (default: the model's)")
    strict: bool = Field(default=False, description="a corrupt image is an error instead of a skipped one")

    @field_validator("mean", "std")
    @classmethod
    def _normalises(cls, value: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if value is not None and not all(math.isfinite(x) and (x > 0 or info.field_name == "mean") for x in value):
            raise ValueError(f"each {info.field_name} must be finite{' and positive' * (info.field_name == 'std')}")
        return value


class RunConfig(Frozen):
    """One run, completely: the run folder's name is a hash of this."""

    version: Literal[1] = 1
    model: str = Field(description="timm name, hf-hub:ORG/NAME, local-dir:FOLDER, or demo")
    checkpoint: str | None = Field(default=None, description="float weights to load (safetensors)")
    num_classes: int | None = Field(default=None, ge=1, description="number of classes (default: the model's)")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="passed on to timm's create_model")
    method: str = Field(default="mixed", description="name of a registered method")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    scheme: Scheme = Scheme()
    data: DataConfig = DataConfig()
    seed: int = Field(default=0, description="seed of everything random")
    device: str = Field(default="cpu", description="torch device")
    calib_memory: int | None = Field(
        default=None, ge=1, description="bytes for live activations (default: half of what is free)"
    )
    float_dtype: Literal["float32", "float16"] = Field(
        default="float32", description="type of what stays unquantized in the checkpoint: biases, norms"
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

    def digest(self, **more: str) -> str:
        """Six hex digits over the resolved configuration and `more` (calibration fingerprint, method version).

        What cannot change the result (workers, memory bound) is left out, so that the same command with
        another number of workers resumes the same run. A strict run is another run: it may not skip images.
        """
        without = {"workers"} if self.data.strict else {"workers", "strict"}
        if not 0 < self.data.calib_early < self.data.calib_size:
            without.add("calib_early")  # all images are there from the start
        if self.data.calib_precision == "float32":  # as in runs that do not say: they stay found
            without.add("calib_precision")
        content = self.model_dump(mode="json", exclude={"calib_memory": True, "data": without})
        for name in ("coding", "size", "ratio", "budget_bits"):  # what is not asked for does not count
            if content[name] is None:
                del content[name]
        scheme = content["scheme"]
        if self.scheme.act_bits is None:  # what does not act does not count: earlier runs stay found
            scheme = {key: value for key, value in scheme.items() if not key.startswith("act_")}
        if self.scheme.symmetric or self.scheme.zero_point == "whole":
            scheme = {key: value for key, value in scheme.items() if key != "zero_point"}
        if self.scheme.column_scale == "none":
            scheme = {key: value for key, value in scheme.items() if key != "column_scale"}
        if self.scheme.act_mixed == "none":
            scheme = {key: value for key, value in scheme.items() if key != "act_mixed"}
        own = {
            pattern: {key: value for key, value in layer.items() if key != "act_bits" or value is not None}
            for pattern, layer in scheme["overrides"].items()
        }
        text = json.dumps({**content, "scheme": {**scheme, "overrides": own}, **more}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:6]
