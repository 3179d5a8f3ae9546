"""Options that commands share, and how their texts become values. No torch here: help must open at once.

Names, help texts and defaults come from the configuration's fields, so that each is written once.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from typer.core import TyperGroup

from coraq.cli.loading import load_networks
from coraq.config import MAX_BITS, MIN_BITS
from coraq.errors import EXIT_BELOW_THRESHOLD, CoraqError, UsageError
from coraq.scheme import SCHEME_OPTIONS

if TYPE_CHECKING:
    from coraq.results import RunResult

METHOD_PANEL, RUN_PANEL, OUTPUT_PANEL = "Method", "The run", "Output"

# parameters of `quantize` that the configuration has by another name
FIELDS = {"override": "overrides", "method_options": "options"}

# Options that `--help` leaves out: `coraq.cli.app` shows them where `--help-all` asks for them.
ADVANCED: list[Any] = []

M = TypeVar("M", bound=BaseModel)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_EXPONENT = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


# ---------------------------------------------------------------- texts to values


def parse_bytes(text: str) -> int:
    """ "4G" → 4·2³⁰; plain numbers are bytes; K, M, G, T are powers of 1024.

    Raises:
        typer.BadParameter: anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a size; write 512M or 4G")
    return int(float(match[1]) * 1024 ** _EXPONENT[match[2].upper()])


def parse_weight_bits(text: str) -> float:  # typer calls it with the default, too
    """ "4" → 4, "2.7" → 2.7: with a point it is a budget for all weights together.

    Raises:
        typer.BadParameter: no number.
    """
    if re.fullmatch(r"-?[0-9]{1,9}", text):
        return int(text)
    if re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,9}", text):
        return float(text)
    raise typer.BadParameter(f"{text!r} is no number of bits; write 4, or 2.7 for a budget")


def parse_file_size(text: str) -> int:
    """ "1.5MB" → 1500000; "1.5MiB" → 1572864; plain numbers are bytes.

    Raises:
        typer.BadParameter: anything else, or nothing.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([kKMGT]?)(i?)B?", text.strip())
    if not match or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a size; write 1.5MB or 800kB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _EXPONENT[match[2].upper()])


def parse_edge_bits(text: str) -> int | str:  # Typer calls it with the default, too
    """Bits of the first or last layer, or "same" where they have as many as all others.

    Raises:
        typer.BadParameter: anything but "same" and 2 to 8.
    """
    if text in ("", "same"):
        return "same"
    if not text.isdecimal() or not MIN_BITS <= int(text) <= MAX_BITS:
        raise typer.BadParameter(f"{text!r} is neither {MIN_BITS} to {MAX_BITS} nor 'same'")
    return int(text)


def parse_value(text: str) -> Any:
    """JSON if it is JSON (3, true, [1, 2]), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_pairs(texts: Iterable[str], option_name: str) -> dict[str, Any]:
    """["a=1", "b=x"] → {"a": 1, "b": "x"}.

    Raises:
        UsageError: a text without "=", or a key given twice.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{option_name} {text!r} is not KEY=VALUE", f"write {option_name} {key or 'KEY'}=VALUE")
        if key in pairs:
            raise UsageError(f"{option_name} {key} is given twice", "give each key once")
        pairs[key] = parse_value(value)
    return pairs


def parse_overrides(texts: Iterable[str]) -> dict[str, dict[str, int]]:
    """["layer1\\..*=3", "fc=4/8"] → {"layer1\\..*": {"bits": 3}, "fc": {"bits": 4, "act_bits": 8}}.

    The last "=" separates, as a pattern may hold one; behind the "/" are the bits of the layer's input.

    Raises:
        UsageError: a text that is not REGEX=BITS or REGEX=BITS/INPUT_BITS, or a pattern given twice.
    """
    overrides: dict[str, dict[str, int]] = {}
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        numbers = bits.split("/")
        valid = len(numbers) <= 2 and all(n.isdecimal() and MIN_BITS <= int(n) <= MAX_BITS for n in numbers)
        if not equals or not pattern or not valid:
            raise UsageError(
                f"--override {text!r} is not REGEX=BITS, or REGEX=BITS/INPUT_BITS, with {MIN_BITS} to {MAX_BITS} bits",
                r"for example --override 'layer1\..*=3' or 'fc=4/8'; the expression must match a layer's whole name",
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(
                f"--override {pattern!r} is no regular expression: {error}", r"for example --override 'layer1\..*=3'"
            ) from None
        if pattern in overrides:
            raise UsageError(
                f"--override {pattern!r} is given twice", "give each expression once; the first match wins"
            )
        overrides[pattern] = dict(zip(("bits", "act_bits"), map(int, numbers), strict=False))
    return overrides


def parse_channels(text: str) -> tuple[float, ...]:
    """ "0.485,0.456,0.406" or "0.485 0.456 0.406" → one number a channel.

    Raises:
        typer.BadParameter: no numbers.
    """
    try:
        values = tuple(float(part) for part in re.split(r"[,\s]+", text.strip()))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers; write 0.485,0.456,0.406") from None
    return values


def validated(model: type[M], content: dict[str, Any]) -> M:
    """`model` made of `content`.

    Raises:
        UsageError: naming the option, its value, and what is allowed.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise usage_error(error) from None


def usage_error(error: ValidationError) -> UsageError:
    """The first complaint of a pydantic error as a message with option and value, and a hint with what is allowed."""
    complaint = error.errors(include_url=False)[0]
    place = [str(part) for part in complaint["loc"] if part not in ("scheme", "data", "int", "literal['same']")]
    given = complaint["input"]
    name = "the configuration"
    if place == ["activations"]:  # what is wrong is what the option of weights asks of them
        place, given = ["weights", "column_scale"], "input"
    flat = {(part or "", field): option for option, (part, field) in SCHEME_OPTIONS.items()}
    if tuple(place[:2]) in flat:
        place = [flat[place[0], place[1]], *place[2:]]
    if place:
        named = {field: parameter for parameter, field in FIELDS.items()}
        name = f"--{named.get(place[0], place[0]).replace('_', '-')}"
    if len(place) > 1:
        name += f" ({'.'.join(place[1:])})"
    more = error.error_count() - 1
    hint = complaint["msg"].removeprefix("Value error, ")  # what our own validators say comes with it
    hint = hint[:1].lower() + hint[1:]
    return UsageError(f"{name} {given!r} is not allowed", hint + (f"; and {more} more" if more else ""))


def use_plugins(folders: Iterable[Path]) -> None:
    """Make the plugin folders known to the registry, and to processes that a method starts.

    Raises:
        UsageError: a path that is no folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(
                f"--plugins-dir {folder} is not a folder", "give the folder that holds the method's .py file"
            )
    known = [path for path in os.environ.get("CORAQ_PLUGINS", "").split(os.pathsep) if path]
    added = [str(folder.resolve()) for folder in folders]
    if added:
        os.environ["CORAQ_PLUGINS"] = os.pathsep.join(dict.fromkeys([*added, *known]))


def plugin_flags(folders: Iterable[Path]) -> list[str]:
    """The `--plugins-dir` options for these folders."""
    return [word for folder in folders for word in ("--plugins-dir", str(folder))]


def find_run(run: str | None, runs_dir: Path, quiet: bool = False) -> Path:
    """The run folder meant by `run`: a path, a name within `runs_dir`, or, for None, the newest one.

    Where there is one, what a command then needs of it is imported (see `load_networks`).

    Raises:
        CoraqError: there is none.
    """
    found = None if run is None else next((path for path in (Path(run), runs_dir / run) if path.is_dir()), None)
    if run is not None and found is None:
        names = [child.name for child in runs_dir.iterdir() if child.is_dir()] if runs_dir.is_dir() else []
        raise UsageError(f"no run {run!r} here or in {runs_dir}", nearest(run, names) or "coraq quantize makes one")
    load_networks(quiet)

    from coraq import artifact

    return found or artifact.newest_run(runs_dir)


def nearest(name: str, names: Iterable[str]) -> str:
    """ "did you mean …?", or "" where nothing is near."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def command_names(context: typer.Context) -> list[str]:
    """Names of all commands of the program that `context` belongs to."""
    root = context.find_root()
    return root.command.list_commands(root) if isinstance(root.command, TyperGroup) else []


def enforce_threshold(result: RunResult, threshold: float | None) -> None:
    """Leave with exit code 3 if the quantized network's top-1 is below `threshold` %.

    Raises:
        UsageError: accuracy was not measured.
        CoraqError: it is below.
    """
    if threshold is None:
        return
    top1 = result.comparison.quantized_top1 if result.comparison else None
    if top1 is None:
        raise UsageError(
            f"--fail-under {threshold:g}: accuracy was not measured", "give labelled images: --data-dir FOLDER"
        )
    if top1.value_pct < threshold:
        raise CoraqError(
            f"top-1 {top1.value_pct:.2f} % is below --fail-under {threshold:g}",
            "more --bits, more --calib-size, or another --method",
            EXIT_BELOW_THRESHOLD,
        )


def check_fail_under(threshold: float | None) -> None:
    """Raises UsageError unless the threshold is a percentage."""
    if threshold is not None and not 0 <= threshold <= 100:
        raise UsageError(f"--fail-under {threshold} is not a percentage", "give the top-1 in %, 0 to 100")


# ---------------------------------------------------------------- shared options
PluginsDir = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugins-dir", help="folder of methods as single .py files; repeat for more", rich_help_panel=METHOD_PANEL
    ),
]
RunsDir = Annotated[
    Path,
    typer.Option("--output", "-O", help="parent folder of runs", rich_help_panel=OUTPUT_PANEL, metavar="FOLDER"),
]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="run folder, or its name within --output; default: the newest")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="print exactly one JSON object on stdout", rich_help_panel=OUTPUT_PANEL)
]
FailUnder = Annotated[
    float | None,
    typer.Option(
        "--fail-under",
        help="exit with code 3 if the quantized network's top-1 is below this many %",
        rich_help_panel=OUTPUT_PANEL,
        metavar="PCT",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress", rich_help_panel=OUTPUT_PANEL)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="a line for every layer and note", rich_help_panel=OUTPUT_PANEL)
]

DEFAULT_RUNS_DIR = Path("runs")
