"""The scheme: how finely weights and activations are quantized, and what is corrected afterwards.

A `Scheme` is nested: weights, activations (None where they stay float), corrections, overrides. The command line, and
whoever finds it shorter, names all values in one flat list (`bits`, `act_bits`, `bias_correction` …): these are the
scheme's options, and `Scheme.of`, `Scheme.options` and `Scheme.replace` translate.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from coraq.errors import UsageError
from coraq.former_names import FORMER_NAMES, present

MIN_BITS, MAX_BITS = 2, 8
COLUMN_BITS = 4  # column scales are for weights, or inputs, of at most so many bits
AUTO_FRACTION = 2  # bits of a zero point behind the point at 2 bits, where `zero_point_fraction` is auto

ColumnScale = Literal["auto", "none", "channel", "input"]
Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]


class Frozen(BaseModel):
    """A frozen pydantic model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class WeightScheme(Frozen):
    """The grids of weights."""

    bits: int = Field(default=4, ge=MIN_BITS, le=MAX_BITS, description="bits of a weight, 2 to 8")
    first_bits: Bits | Literal["same"] | None = Field(
        default=None, description="bits of the first layer (default: as all others; 8 with a paper's preset)"
    )
    last_bits: Bits | Literal["same"] | None = Field(
        default=None,
        description="bits of the classifier (default: as all others; 8 with a paper's preset)",
    )
    granularity: Literal["channel", "tensor"] = Field(
        default="channel", description="one scale for each output channel, or one for each weight tensor"
    )
    symmetric: bool = Field(default=False, description="symmetric grids, which every integer runtime takes")
    zero_point_fraction: Literal["auto", 0, 1, 2, 3] = Field(
        default="auto",
        description="fractional bits of zero points: 0 puts them at codes; 1, 2, 3 at halves, quarters, eighths of a"
        " step, in the same byte. auto: 2 for 2-bit weights on searched ranges, else 0",
    )
    column_scale: ColumnScale = Field(
        default="auto",
        description="a second scale for each input channel, one byte each: of weights of at most 4 bits (channel), "
        "or of inputs of at most 4 bits (input). auto: the one that suits the activations, by methods "
        "that gain from it",
    )

    @field_validator("zero_point_fraction")
    @classmethod
    def _is_free(cls, value: str | int, info: ValidationInfo) -> str | int:
        if info.data.get("symmetric") and value not in ("auto", 0):
            raise ValueError("a symmetric grid has its zero point at the middle code; leave out --symmetric")
        return value


class ActivationScheme(Frozen):
    """The grids of activations, one scale per tensor."""

    bits: int = Field(ge=MIN_BITS, le=MAX_BITS, description="bits of an activation, 2 to 8 (default: float)")
    first_bits: Bits | None = Field(default=8, description="bits of the images, or same")
    last_bits: Bits | None = Field(default=8, description="bits of the classifier's input, or same")
    placement: Literal["inputs", "integer"] = Field(
        default="inputs",
        description="quantize the inputs of layers (inputs, as in papers), or also outputs and sums, as integer "
        "runtimes need (integer)",
    )
    range: Literal["mse", "percentile"] = Field(
        default="mse", description="range of an activation: least squared error, or percentiles"
    )
    percentile: float = Field(default=99.99, gt=50, le=100, description="the upper percentile, in %")
    allocation: Literal["none", "memory", "bitops", "both"] = Field(
        default="none",
        description="mixed precision of inputs, 2 to 8 bits each by their predicted KL divergence: --act-bits on "
        "average over all values (memory), over all multiplications (bitops), or over both",
    )

    @field_validator("allocation")
    @classmethod
    def _has_inputs_only(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and info.data.get("placement") == "integer":
            raise ValueError("bits are shared out between inputs only; leave out --act-placement integer")
        return value


class Corrections(Frozen):
    """What is set after a layer's codes are chosen, from statistics of calibration images."""

    bias: Literal["network", "layer", "off"] = Field(
        default="network",
        description="bias correction: match each channel's mean output to the float network's (network), to the "
        "float layer's on the same inputs (layer), or off",
    )
    scale: Literal["network", "off"] = Field(
        default="network",
        description="scale correction: match each channel's variance to the float network's, or off",
    )


class Scheme(Frozen):
    """All that decides whether a number reproduces, beside the method. Printed with every result."""

    version: Literal[2] = 2
    weights: WeightScheme = WeightScheme()
    activations: ActivationScheme | None = Field(
        default=None, validate_default=True, description="None: activations stay float"
    )
    corrections: Corrections = Corrections()
    overrides: dict[str, LayerScheme] = Field(
        default_factory=dict,
        description="bits of the layers whose whole name matches a regular expression; the first match wins",
    )

    @field_validator("activations")
    @classmethod
    def _has_inputs_to_scale(cls, value: ActivationScheme | None, info: ValidationInfo) -> ActivationScheme | None:
        weights = info.data.get("weights")
        scaled = weights is not None and weights.column_scale == "input"
        if scaled and (value is None or value.placement == "integer"):
            raise ValueError(
                "column scales of inputs need --act-bits and --act-placement inputs; leave out --column-scale input"
            )
        return value

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
        if lone and info.data.get("activations", 0) is None:
            raise ValueError(f"bits of inputs, as {lone[0]!r} has them, need --act-bits for the other layers")
        return value

    # ---------------------------------------------------------------- one flat list of options

    @classmethod
    def of(cls, **options: Any) -> Scheme:
        """A scheme from options by their flat names: `Scheme.of(bits=3, act_bits=8, bias_correction="off")`.

        Raises:
            UsageError: an unknown option, or one of activations without `act_bits`.
            ValidationError: a value that is not allowed.
        """
        return cls.model_validate(nested(options))

    def options(self) -> dict[str, Any]:
        """All values by their flat names; those of activations that stay float have their defaults."""
        found: dict[str, Any] = {}
        for name, (part, field) in SCHEME_OPTIONS.items():
            owner = self if part is None else getattr(self, part)
            found[name] = option_default(name) if owner is None else getattr(owner, field)
        return found

    def replace(self, **options: Any) -> Scheme:
        """The same scheme with other values, by their flat names; checked as `of` does."""
        return self.of(**{**self.options(), **options})

    @property
    def act_bits(self) -> int | None:
        """Bits of an activation; None where activations stay float."""
        return None if self.activations is None else self.activations.bits

    # ---------------------------------------------------------------- what each layer gets

    def resolve(self, names: list[str]) -> dict[str, LayerScheme]:
        """Each layer's own scheme. `names` are all quantizable layers in execution order."""
        return {
            name: own if own.act_bits is not None else own.model_copy(update={"act_bits": self.act_bits})
            for name, own in self._own(names).items()
        }

    def mixes(self, names: list[str]) -> set[str]:
        """The layers whose inputs' bits are shared out (`ActivationScheme.allocation`). `names` as in `resolve`."""
        if self.activations is None or self.activations.allocation == "none":
            return set()
        return {name for name, own in self._own(names).items() if own.act_bits is None}

    def _own(self, names: list[str]) -> dict[str, LayerScheme]:
        """As `resolve`, but without bits of an input that has no others than all inputs."""
        found = {}
        weights, activations = self.weights, self.activations
        for index, name in enumerate(names):
            first, last = index == 0, index == len(names) - 1  # of a network of one layer both: the first one counts
            bits = (first and _number(weights.first_bits)) or (last and _number(weights.last_bits)) or weights.bits
            matches = (own for pattern, own in self.overrides.items() if re.fullmatch(pattern, name))
            own = next(matches, LayerScheme(bits=bits))
            if own.act_bits is None and activations is not None:
                act = (first and activations.first_bits) or (last and activations.last_bits) or None
                own = own.model_copy(update={"act_bits": act})
            found[name] = own
        return found

    def fraction(self, bits: int, searched: bool = True) -> int:
        """Bits of a zero point behind the point, for codes of so many bits: as many as a byte has room for.

        `auto` is what measured best (examples/results/activations.md) among what fits in a 4-bit code, the narrowest
        that integer kernels of other tools take.

        Args:
            searched: the grid's range is searched for the least error. One that is just the weights' extremes is wide,
                and small weights need a level at zero.
        """
        asked = self.weights.zero_point_fraction
        if self.weights.symmetric:
            return 0
        if asked == "auto":
            return AUTO_FRACTION if bits == 2 and searched else 0
        return min(asked, MAX_BITS - bits)

    def resolve_auto(self, column_scales: bool, edge_bits: int | None = None) -> Scheme:
        """The scheme with what is left to the method decided.

        Args:
            column_scales: whether the method does better with them (`MethodConfig.column_scales`).
            edge_bits: bits of the first and last layer where the scheme says none (`MethodConfig.edge_bits`);
                None: as all others.
        """
        weights = self.weights
        changes: dict[str, Any] = {}
        for edge in ("first_bits", "last_bits"):
            asked = getattr(weights, edge)
            number = edge_bits if asked is None else _number(asked)
            changes[edge] = None if number == weights.bits else number
        if weights.column_scale == "auto":
            changes["column_scale"] = self._column_scale() if column_scales else "none"
        return self.model_copy(update={"weights": weights.model_copy(update=changes)})

    def _column_scale(self) -> ColumnScale:
        """What `auto` is with a method that does better with column scales."""
        if self.weights.granularity == "tensor":
            return "none"
        if self.activations is None:
            return "none" if self.weights.symmetric else "channel"
        few = self.activations.bits <= COLUMN_BITS and self.activations.placement == "inputs"
        return "input" if few else "none"

    def scales_inputs(self, act_bits: int) -> bool:
        """Whether an input of so many bits is multiplied by column scales before it is rounded."""
        return self.weights.column_scale == "input" and act_bits <= COLUMN_BITS

    def scales_columns(self, bits: int, channels: int) -> bool:
        """Whether a weight with codes of so many bits and so many input channels in a group has column scales.

        With one channel a group (depthwise) the scale of the output channel says as much. At 8 bits nothing is gained.
        An `auto` that is not resolved has none.
        """
        return self.weights.column_scale == "channel" and bits <= COLUMN_BITS and channels > 1

    def overrides_layer(self, name: str) -> bool:
        """Whether an override says this layer's bits."""
        return any(re.fullmatch(pattern, name) for pattern in self.overrides)

    def unmatched(self, names: list[str]) -> list[str]:
        """The overrides that no name matches."""
        return [pattern for pattern in self.overrides if not any(re.fullmatch(pattern, name) for name in names)]

    # ---------------------------------------------------------------- in words

    def describe(self, layer_bits: Mapping[str, float] | None = None, budget: str | None = None) -> str:
        """One line that a person can read and a paper can cite.

        Args:
            layer_bits: the bits that a weight of each layer has, in execution order. Where the method chose others
                than the scheme says, they are what is described.
            budget: what the user named as the size of the file; None: the scheme's bits.
        """
        weights, corrections = self.weights, self.corrections
        zero = "" if weights.symmetric else f", zero point fraction {weights.zero_point_fraction}"
        grid = f"{'symmetric' if weights.symmetric else 'affine'} per {weights.granularity}{zero}"
        grid += {
            "auto": ", column scales auto",
            "channel": ", column scales",
            "input": ", column scales of inputs",
            "none": "",
        }[weights.column_scale]
        extra = "".join(f", {pattern}={own}" for pattern, own in self.overrides.items())
        return (
            f"{self._widths(layer_bits, budget)}, {grid}, bias correction {corrections.bias}, "
            f"scale correction {corrections.scale}, {self._activations()}{extra}"
        )

    def _widths(self, layer_bits: Mapping[str, float] | None, budget: str | None) -> str:
        """Bits of weights and activations: "W4A32, first/last layer 8/8 bits"."""
        weights, after = self.weights, f"A{self.act_bits or 32}"
        if layer_bits and (chosen := chosen_bits(self, layer_bits, budget)):
            return f"{chosen}, {after}"
        first, last = (_number(edge) or weights.bits for edge in (weights.first_bits, weights.last_bits))
        edges = "" if first == last == weights.bits else f", first/last layer {first}/{last} bits"
        return f"W{weights.bits}{after}{edges}"

    def _activations(self) -> str:
        own = self.activations
        if own is None:
            return "activations float"
        where = "layer inputs" if own.placement == "inputs" else "layer inputs and outputs, sums and products"
        edges = f"images/last input {own.first_bits or own.bits}/{own.last_bits or own.bits} bits"
        kind = "mse" if own.range == "mse" else f"percentile {own.percentile:g}"
        over = {
            "none": "",
            "memory": "a value",
            "bitops": "a multiplication",
            "both": "a value and a multiplication",
        }[own.allocation]
        mixed = f"mixed, {own.bits} bits {over} on average, " if over else ""
        return f"activations per tensor at {where} ({own.placement}), {mixed}{edges}, range by {kind}"


def _number(edge: int | str | None) -> int | None:
    """Bits of a first or last layer; None where it has the same as all others."""
    return edge if isinstance(edge, int) else None


def chosen_bits(scheme: Scheme, layer_bits: Mapping[str, float], budget: str | None = None) -> str:
    """ "budget of 3 bits a weight, layers 2 to 8 bits" where a method chose others than the scheme says; else ""."""
    asked = {name: own.bits for name, own in scheme.resolve(list(layer_bits)).items()}
    if asked == dict(layer_bits):
        return ""
    named = f"{scheme.weights.bits} bits a weight" if budget is None else budget
    return f"budget of {named}, layers {span(layer_bits.values())} bits"


def span(bits: Collection[float]) -> str:
    """ "4", "2 to 8" or "0.8 to 3.1"."""
    return f"{min(bits):.3g}" if len(set(bits)) == 1 else f"{min(bits):.3g} to {max(bits):.3g}"


# Of each option of a scheme, by its flat name: the part of the scheme (None: the scheme itself) and the field.
SCHEME_OPTIONS: dict[str, tuple[str | None, str]] = {
    **{name: ("weights", name) for name in WeightScheme.model_fields},
    **{f"act_{name}": ("activations", name) for name in ActivationScheme.model_fields},
    **{f"{name}_correction": ("corrections", name) for name in Corrections.model_fields},
    "overrides": (None, "overrides"),
}
SCHEME_PARTS: dict[str | None, type[Frozen]] = {
    "weights": WeightScheme,
    "activations": ActivationScheme,
    "corrections": Corrections,
    None: Scheme,
}


def option_default(name: str) -> Any:
    """An option's default; `act_bits` has None, as activations are float by default."""
    part, field = SCHEME_OPTIONS[name]
    return None if name == "act_bits" else SCHEME_PARTS[part].model_fields[field].get_default(call_default_factory=True)


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """A scheme's content, not yet validated, from options by their flat names.

    Raises:
        UsageError: an unknown option, or one of activations without `act_bits`.
    """
    content: dict[str, Any] = {"weights": {}, "activations": {}, "corrections": {}}
    for name, value in options.items():
        if name in FORMER_NAMES:
            new, now = present(name, value)
            raise UsageError(f"option {name!r} of a scheme is now called {new!r}", f"Write {new}={now!r}.")
        if name not in SCHEME_OPTIONS:
            raise UsageError(f"a scheme has no option {name!r}", f"It has: {', '.join(SCHEME_OPTIONS)}.")
        part, field = SCHEME_OPTIONS[name]
        (content if part is None else content[part])[field] = value
    if content["activations"].get("bits") is None:
        for field, value in content["activations"].items():
            if value != option_default(f"act_{field}"):
                raise UsageError(
                    f"--act-{field.replace('_', '-')} {value} needs --act-bits", "Say how many bits an activation has."
                )
        content["activations"] = None
    return content
