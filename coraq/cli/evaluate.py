"""`coraq evaluate`: measure a written run again, on its own images or on others."""

from __future__ import annotations

import typer

from coraq.cli import options
from coraq.config import DataConfig


def evaluate(
    context: typer.Context,
    run: options.RunArgument = None,
    data_dir: options.DataDir = None,
    dataset: options.Dataset = None,
    split: options.Split = None,
    eval_size: options.EvalSize = None,
    class_map: options.ClassMap = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    img_size: options.ImgSize = None,
    crop_pct: options.CropPct = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    strict: options.Strict = None,
    output: options.RunsDir = options.DEFAULT_RUNS_DIR,
    fail_under: options.FailUnder = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a run again from the files it wrote.

    Options that are not given stay as they were in the run.
    """
    options.check_fail_under(fail_under)
    given = {name: value for name in DataConfig.model_fields if (value := context.params.get(name)) is not None}
    folder = options.find_run(run, output)

    from coraq import artifact, pipeline
    from coraq.cli.display import show_result
    from coraq.cli.progress import progress

    data = None
    if given:
        before = artifact.read_result(folder).config.data.model_dump()
        data = options.validated(DataConfig, {**before, **given})
    with progress(quiet, verbose) as sink:
        result = pipeline.evaluate_run(folder, data, sink=sink)
    if as_json:
        print(result.model_dump_json())
    else:
        show_result(result, options.command_names(context))
    options.enforce_threshold(result, fail_under)
