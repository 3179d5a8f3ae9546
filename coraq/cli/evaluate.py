"""`coraq evaluate`: measure a written run again, on its own images or on others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coraq.cli import options
from coraq.cli.loading import load_networks
from coraq.cli.parameters import IMAGE_NAMES, with_options
from coraq.config import DataConfig
from coraq.errors import EXIT_BELOW_THRESHOLD, CoraqError, UsageError

CHECKPOINT, METRICS = "model.safetensors", "metrics.json"  # of a run folder


@with_options(IMAGE_NAMES, unset=True)
def evaluate(
    context: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="run folder, its name within --output, FILE.onnx or FILE.safetensors; default: the newest",
        ),
    ] = None,
    *,
    plugins_dir: options.PluginsDir = None,
    output: options.RunsDir = options.DEFAULT_RUNS_DIR,
    fail_under: options.FailUnder = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    **parameters: Any,
) -> None:
    """Measure a run again from the files it wrote, or an exported file through its runtime.

    Options that are not given stay as they were in the run.
    """
    options.check_fail_under(fail_under)
    options.use_plugins(plugins_dir or [])
    given = {name: value for name in DataConfig.model_fields if (value := context.params.get(name)) is not None}
    file = Path(run or "")
    if file.name == CHECKPOINT and (file.parent / METRICS).is_file():
        run = str(file.parent)  # the run's own checkpoint
    elif {".onnx", ".safetensors"} & set(file.suffixes):
        evaluate_exported(file, given, fail_under, as_json, quiet, verbose)
        return
    folder = options.find_run(run, output, quiet)

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
        show_result(result, options.command_names(context), plugins_dirs=plugins_dir or [])
    options.enforce_threshold(result, fail_under)


def evaluate_exported(
    file: Path, given: dict[str, Any], fail_under: float | None, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Accuracy of an ONNX file or of a checkpoint without its run folder, printed.

    Raises:
        UsageError: there is no such file, or no labelled image.
        CoraqError: below `fail_under`.
    """
    if not file.is_file():
        raise UsageError(f"there is no file {file}", "coraq quantize writes model.safetensors, coraq export FILE.onnx")
    load_networks(quiet)

    from coraq import pipeline
    from coraq.cli.display import facts_table, stdout
    from coraq.cli.progress import progress

    data = None
    if given:  # options that are not given are those of the run that the file lies in, as for the run itself
        run = pipeline.run_of(file)
        before = {} if run is None else run.data.model_dump()
        data = options.validated(DataConfig, {**before, **given})
    with progress(quiet, verbose) as sink:
        result = pipeline.evaluate_file(file, data, sink=sink)
    accuracy, top1 = result.accuracy, result.accuracy.top1
    if as_json:
        print(result.model_dump_json())
    else:
        facts = [("file", result.path), ("runtime", result.runtime), ("label", result.label)]
        facts.append(("images", f"{accuracy.count} of {result.evaluation_data}"))
        for name, share in (("top-1", top1), ("top-5", accuracy.top5)):
            if share is not None:
                facts.append((name, f"{share.value_pct:.2f} % [{share.low_pct:.1f}, {share.high_pct:.1f}]"))
        if top1 is None:
            facts.append(("top-1", "not measured: no image has a label"))
        stdout().print(facts_table(facts))
    if fail_under is None:
        return
    if top1 is None:
        raise UsageError(
            f"--fail-under {fail_under:g}: no image has a label", "give labelled images: --data-dir FOLDER"
        )
    if top1.value_pct < fail_under:
        raise CoraqError(
            f"top-1 {top1.value_pct:.2f} % is below --fail-under {fail_under:g}",
            "compare with `coraq evaluate` of the run",
            EXIT_BELOW_THRESHOLD,
        )
