"""`coraq report`: render a run's or a comparison's report again from its JSON, and say where it is."""

from __future__ import annotations

import json

from coraq.cli import options


def report(
    run: options.RunArgument = None,
    output: options.RunsDir = options.DEFAULT_RUNS_DIR,
    as_json: options.AsJson = False,
) -> None:
    """Render the report of a run or of a comparison's folder again, and print its path.

    Needs nothing but metrics.json or compare.json; plots that need more are left out where it is gone.
    """
    folder = options.find_run(run, output)

    from coraq import artifact
    from coraq.report import read_comparison, write_comparison, write_report
    from coraq.results import Result

    compared = read_comparison(folder)
    result: Result
    if compared is not None:
        result, path = compared, write_comparison(compared)
    else:
        artifact.read_result(folder)  # an unfinished run is said to be that, whoever works in it
        with artifact.RunFolder(folder).locked():  # else a forced run might end in between, and lose to its old result
            result = artifact.read_result(folder)
            path = write_report(result, folder)
    print(json.dumps({"report": str(path), "result": result.model_dump(mode="json")}) if as_json else path)
