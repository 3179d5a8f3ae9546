"""`coraq quantize`: one network, one method, one scheme, one run folder."""

from __future__ import annotations

import math
import shlex
import sys
from typing import Annotated, Any

import typer

from coraq.cli import options
from coraq.cli.loading import load_networks
from coraq.cli.options import RUN_PANEL
from coraq.cli.parameters import with_options
from coraq.config import MAX_BITS, MIN_BITS, DataConfig, RunConfig
from coraq.errors import EXIT_INTERRUPTED, CoraqError, UsageError
from coraq.events import ListSink, Note, tee
from coraq.scheme import SCHEME_OPTIONS, nested


@with_options()
def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=RunConfig.model_fields["model"].description)] = "demo",
    *,
    plugins_dir: options.PluginsDir = None,
    force: Annotated[
        bool, typer.Option("--force", help="start afresh even if the run exists", rich_help_panel=RUN_PANEL)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print layers, bits and sizes, and exit", rich_help_panel=RUN_PANEL)
    ] = False,
    output: options.RunsDir = options.DEFAULT_RUNS_DIR,
    fail_under: options.FailUnder = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    **parameters: Any,
) -> None:
    """Quantize a network without training, write it, and measure what was written.

    With no images given, calibration uses synthetic ones and accuracy is not measured.
    After an interruption, the same command resumes where it stopped.
    """
    config = run_config(context.params)
    options.check_fail_under(fail_under)
    if fail_under is not None and not (config.data.data_dir or config.data.dataset or config.model == "demo"):
        raise UsageError(f"--fail-under {fail_under} needs images to measure accuracy on", "give --data-dir FOLDER")
    options.use_plugins(plugins_dir or [])
    load_networks(quiet)

    from coraq import pipeline
    from coraq.cli.display import show_plan, show_result
    from coraq.cli.progress import progress

    if dry_run:
        plan = pipeline.plan(config, runs_dir=output)
        if as_json:
            print(plan.model_dump_json())
        else:
            show_plan(plan)
        return
    command = ["coraq", *(context.obj or sys.argv[1:])]
    heard = ListSink()  # a finished run is returned as it was: that it is, only the events say
    try:
        with progress(quiet, verbose) as sink:
            result = pipeline.run(config, runs_dir=output, sink=tee(sink, heard), force=force, command=command)
    except KeyboardInterrupt:
        raise CoraqError(
            "interrupted", f"finished layers are kept; to go on: {shlex.join(command)}", EXIT_INTERRUPTED
        ) from None
    if as_json:
        print(result.model_dump_json())
    else:
        notes = [event.message for event in heard.events if isinstance(event, Note)]
        show_result(result, options.command_names(context), notes, plugins_dir or [])
    options.enforce_threshold(result, fail_under)


def run_config(parameters: dict[str, Any]) -> RunConfig:
    """The configuration that a command line means; `parameters` are Typer's, by name.

    Raises:
        UsageError: a value that the configuration does not allow.
    """
    return config_of(run_content(parameters))


def config_of(content: dict[str, Any]) -> RunConfig:
    """The configuration with this content, whose scheme is a flat list of options.

    Raises:
        UsageError: a value that the configuration does not allow.
    """
    return options.validated(RunConfig, {**content, "scheme": nested(content["scheme"])})


def run_content(parameters: dict[str, Any]) -> dict[str, Any]:
    """The content of a `RunConfig` that a command line means, its scheme flat, its values not yet checked together.

    Raises:
        UsageError: a value that cannot be read.
    """
    scheme = {name: parameters[name] for name in SCHEME_OPTIONS if name in parameters}
    for name in ("act_first_bits", "act_last_bits"):
        scheme[name] = None if scheme[name] == "same" else scheme[name]
    if scheme["zero_point_fraction"] != "auto":
        scheme["zero_point_fraction"] = int(scheme["zero_point_fraction"])
    scheme["overrides"] = options.parse_overrides(parameters["override"] or [])
    content = {name: parameters[name] for name in RunConfig.model_fields if name in parameters}
    if isinstance(scheme.get("bits"), float):  # a budget; the scheme's bits are those of methods that it measures with
        content["budget_bits"] = scheme["bits"]
        scheme["bits"] = min(max(math.ceil(scheme["bits"]), MIN_BITS), MAX_BITS)
    content["model_kwargs"] = options.parse_pairs(parameters["model_kwargs"] or [], "--model-kwargs")
    content["options"] = options.parse_pairs(parameters["method_options"] or [], "-o")
    data = {name: parameters[name] for name in DataConfig.model_fields}
    return {**content, "scheme": scheme, "data": data}
