"""Configurations as command lines, and command lines laid over configurations: the inverse of `quantize.run_config`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from coraq.cli import options
from coraq.cli.quantize import quantize, run_content
from coraq.config import DataConfig, RunConfig, Scheme


def given_names(context: typer.Context) -> set[str]:
    """Names of the parameters that stand on the command line (the others have their defaults)."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def overlaid(config: RunConfig, parameters: dict[str, Any], given: Collection[str]) -> RunConfig:
    """`config` with what was given on the command line in place of its own.

    Raises:
        UsageError: a value that the configuration does not allow.
    """
    fresh = run_content(parameters)  # not valid by itself, perhaps: a flag may need what `config` has
    content = config.model_dump()
    for name in given:
        key = options.FIELDS.get(name, name)
        for part, fields in (
            ("scheme", Scheme.model_fields),
            ("data", DataConfig.model_fields),
            (None, RunConfig.model_fields),
        ):
            if key in fields and key not in ("scheme", "data", "version"):
                target, source = (content[part], fresh[part]) if part else (content, fresh)
                target[key] = source[key]
                break
    return options.validated(RunConfig, content)


def command_line(config: RunConfig, runs_dir: Path, plugins_dirs: Iterable[Path] = ()) -> list[str]:
    """The `coraq quantize` line that makes this run: only what differs from the defaults."""
    default = RunConfig(model=config.model)
    line = ["coraq", "quantize", config.model]
    flags = _flags()

    def add(parameter: str, *values: str) -> None:
        line.extend((flags[parameter][0], *values))

    for part, standard in ((config, default), (config.scheme, default.scheme), (config.data, default.data)):
        for name in type(part).model_fields:
            value = getattr(part, name)
            if name in ("model", "scheme", "data", "version") or value == getattr(standard, name):
                continue
            if name in ("options", "model_kwargs"):
                for key, content in value.items():
                    add("method_options" if name == "options" else name, f"{key}={_text(content)}")
            elif name == "overrides":
                for pattern, own in value.items():
                    add("override", f"{pattern}={own}")
            elif isinstance(value, bool):
                line.append(flags[name][0 if value else 1])
            elif name in ("first_bits", "last_bits"):
                add(name, str(value or "same"))
            elif isinstance(value, tuple):
                add(name, ",".join(map(str, value)))
            else:
                add(name, str(value))
    line += options.plugin_flags(plugins_dirs)
    if runs_dir != options.DEFAULT_RUNS_DIR:
        line += ["--output", str(runs_dir)]
    return line


def _text(value: Any) -> str:
    """What `options.parse_value` reads back as `value`."""
    return value if isinstance(value, str) and options.parse_value(value) == value else json.dumps(value)


def _flags() -> dict[str, tuple[str, ...]]:
    """Of each option of `quantize`: its long name, and for a switch the name that turns it off."""
    found = {}
    for name, parameter in inspect.signature(quantize, eval_str=True).parameters.items():
        if get_origin(parameter.annotation) is Annotated:
            info = get_args(parameter.annotation)[1]
            if isinstance(info, OptionInfo):
                # in an Annotated, typer keeps the first name as the default
                names = [info.default, *(info.param_decls or ())]
                found[name] = tuple(str(names[0]).split("/"))
    return found


def with_parameters_of(command: Callable[..., None], without: Collection[str]) -> Callable[[Any], Any]:
    """Decorator: give a command's function, in place of its `**parameters`, the parameters of another command."""

    def extend(function: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        taken = {parameter.name for parameter in own} | set(without)
        others = inspect.signature(command, eval_str=True).parameters
        borrowed = [parameter for name, parameter in others.items() if name not in taken]
        function.__signature__ = inspect.Signature([*own, *borrowed])  # type: ignore[attr-defined]
        return function

    return extend
