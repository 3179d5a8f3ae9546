"""`coraq quantize`: one network, one method, one scheme, one run folder."""

from __future__ import annotations

import math
import shlex
import sys
from typing import Annotated, Any, Literal

import typer

from coraq.cli import options
from coraq.cli.loading import load_networks
from coraq.cli.options import METHOD_PANEL, MODEL_PANEL, RUN_PANEL, SCHEME_PANEL, option
from coraq.config import MAX_BITS, MIN_BITS, ColumnScale, DataConfig, RunConfig, Scheme
from coraq.errors import EXIT_INTERRUPTED, CoraqError, UsageError
from coraq.events import ListSink, Note, tee

EDGES = ("first_bits", "last_bits", "act_first_bits", "act_last_bits")
RUN, SCHEME, DATA = RunConfig(model="demo"), Scheme(), DataConfig()  # the defaults, from where they are written


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=RunConfig.model_fields["model"].description)] = "demo",
    # -- model
    checkpoint: Annotated[
        str | None, option(RunConfig, "checkpoint", "--checkpoint", panel=MODEL_PANEL, metavar="FILE")
    ] = RUN.checkpoint,
    num_classes: Annotated[
        int | None, option(RunConfig, "num_classes", "--num-classes", panel=MODEL_PANEL)
    ] = RUN.num_classes,
    model_kwargs: Annotated[
        list[str] | None,
        option(
            RunConfig,
            "model_kwargs",
            "--model-kwargs",
            panel=MODEL_PANEL,
            note="; repeat for more",
            metavar="KEY=VALUE",
        ),
    ] = None,
    # -- method
    method: Annotated[
        str, option(RunConfig, "method", "--method", panel=METHOD_PANEL, note=" (see coraq methods)")
    ] = RUN.method,
    method_options: Annotated[
        list[str] | None,
        option(
            RunConfig,
            "options",
            "--option",
            "-o",
            panel=METHOD_PANEL,
            note=" (see coraq methods NAME); repeat for more",
            metavar="KEY=VALUE",
        ),
    ] = None,
    plugins_dir: options.PluginsDir = None,
    # -- scheme
    bits: Annotated[
        Any,
        option(
            Scheme,
            "bits",
            "--bits",
            "-w",
            panel=SCHEME_PANEL,
            note="; with a point (2.7) a budget for each weight, as --size",
            parser=options.parse_weight_bits,
            metavar="BITS",
        ),
    ] = str(SCHEME.bits),
    size: Annotated[
        Any,
        option(
            RunConfig, "size", "--size", panel=SCHEME_PANEL, parser=options.parse_file_size, metavar="1.5MB", note=""
        ),
    ] = RUN.size,
    ratio: Annotated[float | None, option(RunConfig, "ratio", "--ratio", panel=SCHEME_PANEL)] = RUN.ratio,
    coding: Annotated[
        Literal["auto", "packed", "ans"] | None, option(RunConfig, "coding", "--coding", panel=SCHEME_PANEL)
    ] = RUN.coding,
    first_bits: Annotated[
        Any,
        option(
            Scheme,
            "first_bits",
            "--first-bits",
            panel=SCHEME_PANEL,
            parser=options.parse_edge_bits,
            metavar="2..8|same",
        ),
    ] = str(SCHEME.first_bits),
    last_bits: Annotated[
        Any,
        option(
            Scheme, "last_bits", "--last-bits", panel=SCHEME_PANEL, parser=options.parse_edge_bits, metavar="2..8|same"
        ),
    ] = str(SCHEME.last_bits),
    granularity: Annotated[
        Literal["channel", "tensor"], option(Scheme, "granularity", "--granularity", panel=SCHEME_PANEL)
    ] = SCHEME.granularity,
    symmetric: Annotated[
        bool, option(Scheme, "symmetric", "--symmetric/--asymmetric", panel=SCHEME_PANEL)
    ] = SCHEME.symmetric,
    zero_point: Annotated[
        Literal["auto", "whole", "half", "quarter", "eighth"],
        option(Scheme, "zero_point", "--zero-point", panel=SCHEME_PANEL),
    ] = SCHEME.zero_point,
    column_scale: Annotated[
        ColumnScale, option(Scheme, "column_scale", "--column-scale", panel=SCHEME_PANEL)
    ] = SCHEME.column_scale,
    bias: Annotated[
        Literal["float", "layer", "keep"], option(Scheme, "bias", "--bias", panel=SCHEME_PANEL)
    ] = SCHEME.bias,
    gain: Annotated[Literal["float", "keep"], option(Scheme, "gain", "--gain", panel=SCHEME_PANEL)] = SCHEME.gain,
    act_bits: Annotated[int | None, option(Scheme, "act_bits", "--act-bits", "-a", panel=SCHEME_PANEL)] = None,
    act_placement: Annotated[
        Literal["inputs", "integer"], option(Scheme, "act_placement", "--act-placement", panel=SCHEME_PANEL)
    ] = SCHEME.act_placement,
    act_first_bits: Annotated[
        Any,
        option(
            Scheme,
            "act_first_bits",
            "--act-first-bits",
            panel=SCHEME_PANEL,
            parser=options.parse_edge_bits,
            metavar="2..8|same",
        ),
    ] = str(SCHEME.act_first_bits),
    act_last_bits: Annotated[
        Any,
        option(
            Scheme,
            "act_last_bits",
            "--act-last-bits",
            panel=SCHEME_PANEL,
            parser=options.parse_edge_bits,
            metavar="2..8|same",
        ),
    ] = str(SCHEME.act_last_bits),
    act_range: Annotated[
        Literal["mse", "percentile"], option(Scheme, "act_range", "--act-range", panel=SCHEME_PANEL)
    ] = SCHEME.act_range,
    act_percentile: Annotated[
        float, option(Scheme, "act_percentile", "--act-percentile", panel=SCHEME_PANEL)
    ] = SCHEME.act_percentile,
    act_mixed: Annotated[
        Literal["none", "values", "macs", "both"], option(Scheme, "act_mixed", "--act-mixed", panel=SCHEME_PANEL)
    ] = SCHEME.act_mixed,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            help="bits of the layers whose whole name matches (4/8: of weight and input, with --act-bits); "
            "repeat for more, the first match wins",
            rich_help_panel=SCHEME_PANEL,
            metavar="REGEX=BITS[/BITS]",
        ),
    ] = None,
    float_dtype: Annotated[
        Literal["float32", "float16"], option(RunConfig, "float_dtype", "--float-dtype", panel=SCHEME_PANEL)
    ] = RUN.float_dtype,
    # -- images
    data_dir: options.DataDir = DATA.data_dir,
    dataset: options.Dataset = DATA.dataset,
    split: options.Split = DATA.split,
    eval_size: options.EvalSize = DATA.eval_size,
    class_map: options.ClassMap = DATA.class_map,
    batch_size: options.BatchSize = DATA.batch_size,
    workers: options.Workers = DATA.workers,
    img_size: options.ImgSize = DATA.img_size,
    crop_pct: options.CropPct = DATA.crop_pct,
    mean: options.Mean = DATA.mean,
    std: options.Std = DATA.std,
    interpolation: options.Interpolation = DATA.interpolation,
    strict: options.Strict = DATA.strict,
    # -- calibration
    calib_dir: Annotated[
        str | None, option(DataConfig, "calib_dir", "--calib-dir", panel=options.CALIBRATION_PANEL, metavar="FOLDER")
    ] = DATA.calib_dir,
    calib_split: Annotated[
        str, option(DataConfig, "calib_split", "--calib-split", panel=options.CALIBRATION_PANEL)
    ] = DATA.calib_split,
    calib_size: Annotated[
        int, option(DataConfig, "calib_size", "--calib-size", panel=options.CALIBRATION_PANEL)
    ] = DATA.calib_size,
    calib_rows: Annotated[
        int, option(DataConfig, "calib_rows", "--calib-rows", panel=options.CALIBRATION_PANEL)
    ] = DATA.calib_rows,
    calib_early: Annotated[
        int, option(DataConfig, "calib_early", "--calib-early", panel=options.CALIBRATION_PANEL)
    ] = DATA.calib_early,
    calib_precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        option(DataConfig, "calib_precision", "--calib-precision", panel=options.CALIBRATION_PANEL),
    ] = DATA.calib_precision,
    calib_memory: Annotated[
        Any,
        option(
            RunConfig,
            "calib_memory",
            "--calib-memory",
            panel=options.CALIBRATION_PANEL,
            note="; 4G and 512M are understood",
            parser=options.parse_bytes,
            metavar="SIZE",
        ),
    ] = RUN.calib_memory,
    # -- run
    seed: Annotated[int, option(RunConfig, "seed", "--seed", panel=RUN_PANEL)] = RUN.seed,
    device: Annotated[str, option(RunConfig, "device", "--device", panel=RUN_PANEL)] = RUN.device,
    force: Annotated[
        bool, typer.Option("--force", help="start afresh even if the run exists", rich_help_panel=RUN_PANEL)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print layers, bits and sizes, and leave", rich_help_panel=RUN_PANEL)
    ] = False,
    # -- output
    output: options.RunsDir = options.DEFAULT_RUNS_DIR,
    fail_under: options.FailUnder = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize a network without training, write it, and measure what was written.

    With no images given, calibration uses synthetic ones and accuracy is not measured.
    The same command after an interruption goes on where it stopped.
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
    return options.validated(RunConfig, run_content(parameters))


def run_content(parameters: dict[str, Any]) -> dict[str, Any]:
    """The content of a `RunConfig` that a command line means, its values not yet checked together.

    Raises:
        UsageError: a value that cannot be read.
    """
    scheme = {name: parameters[name] for name in Scheme.model_fields if name in parameters}
    scheme |= {name: scheme[name] or None for name in EDGES}  # 0 stands for "same"
    scheme["overrides"] = options.parse_overrides(parameters["override"] or [])
    content = {name: parameters[name] for name in RunConfig.model_fields if name in parameters}
    if isinstance(scheme.get("bits"), float):  # a budget; the scheme's bits are those of methods that it measures with
        content["budget_bits"] = scheme["bits"]
        scheme["bits"] = min(max(math.ceil(scheme["bits"]), MIN_BITS), MAX_BITS)
    content["model_kwargs"] = options.parse_pairs(parameters["model_kwargs"] or [], "--model-kwargs")
    content["options"] = options.parse_pairs(parameters["method_options"] or [], "-o")
    data = {name: parameters[name] for name in DataConfig.model_fields}
    return {**content, "scheme": scheme, "data": data}
