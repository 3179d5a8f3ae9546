"""`coraq reproduce`: run a run again, and say whether bytes and numbers agree."""

from __future__ import annotations

import typer

from coraq.cli import options
from coraq.errors import EXIT_FAILURE, CoraqError

SHOWN = 8


def reproduce(
    context: typer.Context,
    run: options.RunArgument = None,
    output: options.RunsDir = options.DEFAULT_RUNS_DIR,
    plugins_dir: options.PluginsDir = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a run's exact configuration again, and compare checkpoint bytes and all numbers.

    The second run goes to a temporary folder. Exit code 1 if anything but times and memory differs.
    """
    options.use_plugins(plugins_dir or [])
    folder = options.find_run(run, output, quiet)

    from coraq.cli.display import columns_table, stdout
    from coraq.cli.progress import progress
    from coraq.pipeline.reproduce import reproduce as run_again

    with progress(quiet, verbose) as sink:
        outcome = run_again(folder, sink=sink)
    if as_json:
        print(outcome.model_dump_json())
    else:
        console = stdout()
        console.print(f"checkpoint: {'the same bytes' if outcome.same_checkpoint else 'other bytes'}")
        console.print(f"  then {outcome.checkpoint_sha256 or 'gone'}", soft_wrap=True)
        console.print(f"  now  {outcome.again_sha256}", soft_wrap=True)
        count = len(outcome.differences)
        console.print(f"metrics: {'all agree (times and memory aside)' if not count else f'{count} differ'}")
        if count:
            rows = [(one.place, one.before, one.after) for one in outcome.differences[:SHOWN]]
            console.print(columns_table(["metric", "then", "now"], rows))
        for line in outcome.changed:
            console.print(f"note: {line}", soft_wrap=True)
    if not outcome.reproduced:
        raise CoraqError(
            f"{folder} was not reproduced",
            "; ".join(outcome.changed) or "nothing known has changed; was the method's code?",
            EXIT_FAILURE,
        )
