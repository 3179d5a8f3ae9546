"""Configurations as command lines, and command lines laid over configurations: the inverse of `quantize.run_config`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import typer

from coraq.cli import options
from coraq.cli.parameters import BY_NAME
from coraq.cli.quantize import config_of, run_content
from coraq.config import DataConfig, RunConfig
from coraq.scheme import SCHEME_OPTIONS


def given_names(context: typer.Context) -> set[str]:
    """Names of the parameters that stand on the command line (the others have their defaults)."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def overlaid(config: RunConfig, parameters: dict[str, Any], given: Collection[str]) -> RunConfig:
    """`config` with what was given on the command line in place of its own.

    Raises:
        UsageError: a value that the configuration does not allow.
    """
    fresh = run_content(parameters)  # not valid by itself, perhaps: an option may need what `config` has
    content = {**config.model_dump(), "scheme": config.scheme.options()}
    for name in given:
        key = options.FIELDS.get(name, name)
        if key in SCHEME_OPTIONS:
            content["scheme"][key] = fresh["scheme"][key]
        elif key in DataConfig.model_fields:
            content["data"][key] = fresh["data"][key]
        elif key in RunConfig.model_fields:
            content[key] = fresh[key]
    return config_of(content)


def command_line(config: RunConfig, runs_dir: Path, plugins_dirs: Iterable[Path] = ()) -> list[str]:
    """The `coraq quantize` line that makes this run: only what differs from the defaults."""
    default = RunConfig(model=config.model)
    line = ["coraq", "quantize", config.model]

    def add(parameter: str, *values: str) -> None:
        line.extend((BY_NAME[parameter].names[0], *values))

    for values, standard in (
        (vars(config), vars(default)),
        (config.scheme.options(), default.scheme.options()),
        (vars(config.data), vars(default.data)),
    ):
        for name, value in values.items():
            if name in ("model", "scheme", "data", "version") or value == standard[name]:
                continue
            if name in ("options", "model_kwargs"):
                for key, content in value.items():
                    add("method_options" if name == "options" else name, f"{key}={_text(content)}")
            elif name == "overrides":
                for pattern, own in value.items():
                    add("override", f"{pattern}={own}")
            elif isinstance(value, bool):
                line.append(BY_NAME[name].names[0].split("/")[0 if value else 1])
            elif name.endswith(("first_bits", "last_bits")):
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
