"""`coraq compare`: models × methods × bits × seeds, each cell a run folder, ranked at equal bytes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coraq.cli import options
from coraq.cli.commandline import command_line, given_names, overlaid, with_parameters_of
from coraq.cli.loading import load_networks
from coraq.cli.options import METHOD_PANEL, RUN_PANEL
from coraq.cli.parameters import WEIGHTS
from coraq.cli.quantize import quantize, run_config
from coraq.config import MAX_BITS, MIN_BITS, RunConfig
from coraq.errors import EXIT_FAILURE, EXIT_INTERRUPTED, CoraqError, UsageError

NOT_FOR_A_GRID = ("model", "method", "method_options", "bits", "seed", "fail_under", "dry_run")


@with_parameters_of(quantize, without=NOT_FOR_A_GRID)
def compare(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="as in quantize; default: the newest run's, or else demo"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B:KEY=VALUE",
            help="methods, each with options of its own behind colons (default: all built-in ones)",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            "-w",
            metavar="4,3,2",
            help="bits of a weight code, 2 to 8 (default: the newest run's, or 4)",
            rich_help_panel=WEIGHTS,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            metavar="0,1,2",
            help="one run for each (default: the newest run's, or 0)",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="one cell after another, or tasks of a Ray cluster", rich_help_panel=RUN_PANEL),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help="an existing cluster, auto or ray://HOST:10001 (default: one on this machine)",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    cell_cpus: Annotated[
        int | None,
        typer.Option(
            "--cell-cpus",
            min=1,
            help="threads of a Ray task, and the CPUs it reserves (default: 1)",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    **parameters: Any,
) -> None:
    """Run the missing cells of a grid, and rank methods at equal bytes.

    Finished cells are reused. A cell that fails is a row with its reason; the others go on, and the exit code is 1.
    With no MODEL: model, bits and data of the newest run, or else the demo.
    """
    for name, value in (("--ray-address", ray_address), ("--cell-cpus", cell_cpus)):
        if engine == "local" and value is not None:
            raise UsageError(f"{name} {value} without --engine ray", "add --engine ray")
    output: Path = parameters["output"]
    options.use_plugins(parameters["plugins_dir"] or [])
    load_networks(parameters["quiet"])
    newest = None if models else newest_run(output)
    base = base_config(context, models[0] if models else "demo", newest)
    widths = parse_numbers(bits, "--bits", MIN_BITS, MAX_BITS) or [base.scheme.weights.bits]
    numbers = parse_numbers(seeds, "--seeds", 0) or [base.seed]

    from coraq import registry
    from coraq.cli.display_compare import show_comparison
    from coraq.cli.progress import progress
    from coraq.compare import Engine, LocalEngine, expand, parse_variants
    from coraq.compare import compare as run_grid
    from coraq.report import write_comparison

    variants = parse_variants(",".join(registry.BUILT_IN) if methods is None else methods, options.parse_value)
    cells = expand(base, dict.fromkeys(models or [base.model]), variants, widths, numbers)
    chosen: Engine = LocalEngine()
    if engine == "ray":
        from coraq.compare.cluster import RayEngine

        chosen = RayEngine(ray_address, cell_cpus or 1)
    command = ["coraq", *(context.obj or sys.argv[1:])]

    def single(config: RunConfig) -> list[str]:
        return command_line(config, output, parameters["plugins_dir"] or [])

    try:
        with progress(parameters["quiet"], parameters["verbose"]) as sink:
            result = run_grid(
                cells,
                chosen,
                runs_dir=output,
                command_of=single,
                command=command,
                base=newest,
                sink=sink,
                force=parameters["force"],
            )
            report = write_comparison(result)
    except KeyboardInterrupt:
        raise CoraqError(
            "interrupted", f"finished cells are kept; to go on: {shlex.join(command)}", EXIT_INTERRUPTED
        ) from None
    if parameters["as_json"]:
        print(result.model_dump_json())
    else:
        show_comparison(result, report)
        for rival in registry.missing_rivals(variant.method for variant in variants):
            print(f"worth a column beside them: {rival} ({registry.load(rival).summary})")
    if result.failed:
        raise CoraqError(
            f"{len(result.failed)} of {len(cells)} cells failed",
            f"first {result.failed[0].label} on {result.failed[0].model}: {result.failed[0].reason}",
            EXIT_FAILURE,
        )


def newest_run(runs_dir: Path) -> str | None:
    """The folder of the newest finished run; None where there is none."""
    if not any(runs_dir.glob("*/metrics.json")):
        return None
    from coraq import artifact

    return str(artifact.newest_run(runs_dir))


def base_config(context: typer.Context, model: str, newest: str | None) -> RunConfig:
    """What all cells have in common: the newest run's configuration, or else `model`'s, and what was given over it."""
    parameters = _filled(context.params, model)
    if newest is None:
        return run_config(parameters)
    from coraq import artifact

    return overlaid(artifact.read_result(Path(newest)).config, parameters, given_names(context) - {"bits"})


def _filled(parameters: dict[str, Any], model: str) -> dict[str, Any]:
    """Parameters as `quantize` has them, with defaults for those that a grid replaces by lists."""
    default = RunConfig(model=model)
    return {
        **parameters,
        "model": model,
        "method": default.method,
        "method_options": None,
        "bits": default.scheme.weights.bits,
        "seed": default.seed,
    }


def parse_numbers(text: str | None, name: str, low: int, high: int | None = None) -> list[int]:
    """ "4,3" → [4, 3]; None → [].

    Raises:
        UsageError: anything but different whole numbers in range.
    """
    if text is None:
        return []
    allowed = f"{low} to {high}" if high is not None else f"{low} and above"
    numbers: list[int] = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < low or (high is not None and int(part) > high):
            raise UsageError(f"{name} {part.strip()!r} is not a whole number of {allowed}", f"write {name} 4,3,2")
        if int(part) in numbers:
            raise UsageError(f"{name} names {int(part)} twice", "give each number once")
        numbers.append(int(part))
    return numbers
