"""`coraq report`: render a run's report again from its metrics.json, and say where it is."""

from __future__ import annotations

import json

from coraq.cli import options


def report(
    run: options.RunArgument = None,
    output: options.RunsDir = options.DEFAULT_RUNS_DIR,
    as_json: options.AsJson = False,
) -> None:
    """Render a run's report again, and print its path.

    Needs nothing but the run's metrics.json.
    """
    folder = options.find_run(run, output)

    from coraq import artifact
    from coraq.report import write_report

    result = artifact.read_result(folder)
    path = write_report(result, folder)
    print(json.dumps({"report": str(path), "result": result.model_dump(mode="json")}) if as_json else path)
