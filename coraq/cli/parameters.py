"""The options of `coraq quantize`, made from the configuration's fields.

A field's description, default and type are beside the field; how it is typed on a command line (panel, short name,
metavar, parser) is one row of `ROWS` here. `with_options` puts them into a command's signature, where Typer finds
them. No torch here: help must open at once.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel

from coraq.cli import options
from coraq.config import ActivationScheme, Corrections, DataConfig, RunConfig, Scheme, WeightScheme

MODEL, METHOD, WEIGHTS, ACTIVATIONS = "Model", options.METHOD_PANEL, "Weights", "Activations"
IMAGES, CALIBRATION, RUN = "Images", "Calibration", "The run"

EDGE_METAVAR = "2..8|same"
BITS_METAVAR = "BITS"
# What `--help` shows; `--help-all` shows the rest, too.
COMMON = {"method", "method_options", "bits", "override", "act_bits", "act_placement", "data_dir", "split", "class_map"}
COMMON |= {"calib_dir", "calib_split", "calib_size", "device"}


@dataclasses.dataclass(frozen=True)
class Row:
    """How a field is typed on the command line.

    Attributes:
        name: of the parameter; the option is `--name` with dashes.
        model: the model that has the field.
        field: the field; by default of the parameter's name.
        flags: the option's names where they are not `--name` alone.
        note: is appended to the field's description in help.
        settings: for `typer.Option`.
    """

    name: str
    model: type[BaseModel]
    panel: str
    field: str = ""
    flags: tuple[str, ...] = ()
    note: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def advanced(self) -> bool:
        """Whether only `--help-all` shows the option."""
        return self.name not in COMMON

    @property
    def names(self) -> tuple[str, ...]:
        """The option's names: its long one first; a switch's is ON/OFF."""
        return self.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def default(self) -> Any:
        """The field's, as it would be typed; None where nothing is typed."""
        described = self._field
        if described.is_required():
            return None
        value = described.get_default(call_default_factory=True)
        if self.settings.get("metavar") in (EDGE_METAVAR, BITS_METAVAR) and value is not None:
            return str(value)  # Typer hands defaults to the parser, too
        return value or None if isinstance(value, dict) else value

    def parameter(self, default: Any) -> inspect.Parameter:
        """The option as a command's parameter with this default."""
        help_text = (self._field.description or "") + self.note
        info = typer.Option(*self.names, help=help_text, rich_help_panel=self.panel, **self.settings)
        if self.advanced:
            options.ADVANCED.append(info)
        kind = _typed(self._field.annotation) if "parser" not in self.settings else Any
        if default is None and kind is not Any:
            kind = kind | None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )

    @property
    def _field(self) -> Any:
        return self.model.model_fields[self.field or self.name]


def _typed(annotation: Any) -> Any:
    """What Typer understands of a field's type: optional values by their type, mappings as repeated texts."""
    if get_origin(annotation) is dict:
        return list[str]
    if get_origin(annotation) is Literal:
        return Literal[tuple(str(value) for value in get_args(annotation))]
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if type(None) in get_args(annotation) and len(parts) == 1:
        return _typed(parts[0])
    return annotation


def _edge(name: str, model: type[BaseModel], panel: str, field: str = "") -> Row:
    return Row(name, model, panel, field, settings={"parser": options.parse_edge_bits, "metavar": EDGE_METAVAR})


def _channels(name: str) -> Row:
    return Row(name, DataConfig, IMAGES, settings={"parser": options.parse_channels, "metavar": "R,G,B"})


ROWS = (
    Row("checkpoint", RunConfig, MODEL, settings={"metavar": "FILE"}),
    Row("num_classes", RunConfig, MODEL),
    Row("model_kwargs", RunConfig, MODEL, note=" (repeatable)", settings={"metavar": "KEY=VALUE"}),
    Row("method", RunConfig, METHOD, note=" (coraq methods lists them)"),
    Row(
        "method_options",
        RunConfig,
        METHOD,
        "options",
        ("--option", "-o"),
        " (coraq methods NAME lists them; repeatable)",
        {"metavar": "KEY=VALUE"},
    ),
    Row(
        "bits",
        WeightScheme,
        WEIGHTS,
        flags=("--bits", "-w"),
        note="; with a point (2.7) a budget of bits for each weight on average, as --size",
        settings={"parser": options.parse_weight_bits, "metavar": BITS_METAVAR},
    ),
    Row("size", RunConfig, WEIGHTS, settings={"parser": options.parse_file_size, "metavar": "SIZE"}),
    Row("ratio", RunConfig, WEIGHTS),
    Row("coding", RunConfig, WEIGHTS),
    _edge("first_bits", WeightScheme, WEIGHTS),
    _edge("last_bits", WeightScheme, WEIGHTS),
    Row("granularity", WeightScheme, WEIGHTS),
    Row("symmetric", WeightScheme, WEIGHTS, flags=("--symmetric/--asymmetric",)),
    Row("zero_point_fraction", WeightScheme, WEIGHTS),
    Row("column_scale", WeightScheme, WEIGHTS),
    Row("bias_correction", Corrections, WEIGHTS, "bias"),
    Row("scale_correction", Corrections, WEIGHTS, "scale"),
    Row(
        "override",
        Scheme,
        WEIGHTS,
        "overrides",
        note="; 4/8 means 4 bits for the weight and 8 for the input (repeatable)",
        settings={"metavar": "REGEX=BITS[/BITS]"},
    ),
    Row("float_dtype", RunConfig, WEIGHTS),
    Row("act_bits", ActivationScheme, ACTIVATIONS, "bits", ("--act-bits", "-a")),
    _edge("act_first_bits", ActivationScheme, ACTIVATIONS, "first_bits"),
    _edge("act_last_bits", ActivationScheme, ACTIVATIONS, "last_bits"),
    Row("act_placement", ActivationScheme, ACTIVATIONS, "placement"),
    Row("act_range", ActivationScheme, ACTIVATIONS, "range"),
    Row("act_percentile", ActivationScheme, ACTIVATIONS, "percentile"),
    Row("act_allocation", ActivationScheme, ACTIVATIONS, "allocation"),
    Row("data_dir", DataConfig, IMAGES, settings={"metavar": "FOLDER"}),
    Row("dataset", DataConfig, IMAGES),
    Row("split", DataConfig, IMAGES),
    Row("eval_size", DataConfig, IMAGES),
    Row("class_map", DataConfig, IMAGES, settings={"metavar": "FILE"}),
    Row("batch_size", DataConfig, IMAGES, flags=("--batch-size", "-b")),
    Row("workers", DataConfig, IMAGES, flags=("--workers", "-j")),
    Row("img_size", DataConfig, IMAGES),
    Row("crop_pct", DataConfig, IMAGES),
    _channels("mean"),
    _channels("std"),
    Row("interpolation", DataConfig, IMAGES),
    Row("strict", DataConfig, IMAGES, flags=("--strict/--no-strict",)),
    Row("calib_dir", DataConfig, CALIBRATION, settings={"metavar": "FOLDER"}),
    Row("calib_split", DataConfig, CALIBRATION),
    Row("calib_size", DataConfig, CALIBRATION),
    Row("calib_rows_per_input", DataConfig, CALIBRATION),
    Row("calib_early_images", DataConfig, CALIBRATION),
    Row("calib_precision", DataConfig, CALIBRATION),
    Row(
        "calib_memory",
        RunConfig,
        CALIBRATION,
        note="; 512M, 4G",
        settings={"parser": options.parse_bytes, "metavar": "SIZE"},
    ),
    Row("seed", RunConfig, RUN),
    Row("device", RunConfig, RUN),
)
BY_NAME = {row.name: row for row in ROWS}
IMAGE_NAMES = tuple(row.name for row in ROWS if row.panel == IMAGES)


def with_options(names: Collection[str] | None = None, unset: bool = False) -> Callable[[Any], Any]:
    """Decorator: give a command, in place of its `**parameters`, the options of `ROWS`.

    Args:
        names: only these options; None: all.
        unset: an option that is not given is None, in place of the configuration's default.
    """

    def extend(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())
        positional = [p for p in own if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        more = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
        made = [row.parameter(None if unset else row.default) for row in ROWS if names is None or row.name in names]
        signature = inspect.Signature([*positional, *made, *more])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return extend
