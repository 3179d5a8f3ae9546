"""`coraq export`: a run in the format of another tool, verified against its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from coraq.cli import options
from coraq.cli.loading import load_networks
from coraq.errors import EXIT_FAILURE, UsageError

if TYPE_CHECKING:
    from coraq.export.export_result import Check, ExportResult

VERIFY_PANEL = "Verification"


def export(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="run folder, its name within --output, or a checkpoint; default: newest"),
    ] = None,
    format: Annotated[
        Literal["onnx", "timm", "pt2"],
        typer.Option(
            "--format",
            help="onnx: low-bit codes that ONNX Runtime opens; timm: a folder for timm and the hub (float weights on "
            "the grid); pt2: torch.export of a network that unpacks its codes",
        ),
    ] = "onnx",
    portable: Annotated[
        bool, typer.Option("--portable", help="onnx: bit-packed codes in opset 18, for ONNX Runtime back to 1.17")
    ] = False,
    npu: Annotated[
        bool, typer.Option("--npu", help="onnx: DequantizeLinear(INT4), as NPU compilers want it; slow on a CPU")
    ] = False,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="onnx: verify and time it in OpenVINO, too", rich_help_panel=VERIFY_PANEL)
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="write the file and do not open it", rich_help_panel=VERIFY_PANEL)
    ] = False,
    images: Annotated[
        int, typer.Option("--eval-size", min=1, help="verify on at most so many images", rich_help_panel=VERIFY_PANEL)
    ] = 512,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="of the runtime (default: torch's)", rich_help_panel=VERIFY_PANEL),
    ] = None,
    plugins_dir: options.PluginsDir = None,
    output: options.RunsDir = options.DEFAULT_RUNS_DIR,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a run as a file that other tools open, and compare it with the checkpoint.

    The file is opened in its own runtime and run on the run's images. What is out of tolerance keeps the
    ending .unverified, and the exit code is 1.
    """
    if portable and npu:
        raise UsageError("--portable and --npu exclude each other", "give one; run the command twice for both")
    if format != "onnx" and (portable or npu or openvino):
        raise UsageError(f"--portable, --npu and --openvino are for --format onnx, not {format}", "leave them out")
    if openvino and no_verify:
        raise UsageError("--openvino verifies, --no-verify does not", "give one of them")
    options.use_plugins(plugins_dir or [])
    source = Path(run) if run is not None and Path(run).is_file() else options.find_run(run, output, quiet)
    load_networks(quiet)

    from coraq.cli.progress import progress
    from coraq.export.run import Request, export_run

    request = Request(
        format=format,
        form="packed" if portable else "dq" if npu else "cast",
        verify=not no_verify,
        images=images,
        threads=threads,
        openvino=openvino,
    )
    with progress(quiet, verbose) as sink:
        result = export_run(source, request, sink)
    if as_json:
        print(result.model_dump_json())
    else:
        show_export(result)
    if result.verified is False:
        raise typer.Exit(EXIT_FAILURE)


def show_export(result: ExportResult) -> None:
    """What was written, what a runtime does with it, and what each check found."""
    from coraq.cli.display import facts_table, stdout
    from coraq.report.summary import bytes_text

    console = stdout()
    verdict = {True: "verified", False: "NOT VERIFIED: out of tolerance", None: "not verified (--no-verify)"}
    share = result.size_bytes / result.nominal_bytes
    size = (
        f"{bytes_text(result.size_bytes)}, float {bytes_text(result.float_bytes)}; "
        f"{share:.3f} × (codes + scales + float rest)"
    )
    if result.graph_bytes is not None:
        size += f", {bytes_text(result.graph_bytes)} of it are the graph"
    facts = [("file", result.path), ("label", result.label), ("size", size), ("verdict", verdict[result.verified])]
    if result.opset:
        facts.insert(2, ("form", f"{result.form}, opset {result.opset}"))
    console.print(facts_table(facts))
    for check in result.checks:
        console.print()
        console.print(Text(check.runtime, style="bold"))
        console.print(facts_table(check_facts(check)))
        for failure in check.failures:
            console.print(Text(f"failed: {failure}", style="bold red"))
    for note in result.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def check_facts(check: Check) -> list[tuple[str, str]]:
    """One check in labels and texts."""
    if check.logits_error is None:
        return []
    control = "" if check.float_error is None else f" (float export {check.float_error:.1e})"
    facts = [
        ("images", f"{check.count} of {check.images}"),
        ("logits error", f"{check.logits_error:.1e} relative{control}"),
        ("top-1 agreement", f"{check.agreement_pct:.2f} % with the checkpoint"),
    ]
    if check.top1_pct is not None:
        facts.append(("top-1", f"{check.top1_pct:.2f} %, checkpoint {check.checkpoint_top1_pct:.2f} %"))
    if check.codes_exact is not None:
        facts.append(("codes", "bit-exact as read back" if check.codes_exact else "DIFFERENT"))
    if check.weights_exact is not None:
        facts.append(("weights", weights_text(check) if check.weights_exact else "DIFFERENT"))
    if check.quantized_convolutions is not None:
        kernels = f"{check.integer_convolutions} of {check.quantized_convolutions} convolutions"
        if check.quantized_products:
            kernels += f", {check.integer_products} of {check.quantized_products} matrix products"
        facts.append(("integer kernels", kernels))
    if check.largest_step is not None:
        facts.append(("integer layers", f"at most {check.largest_step} output step from the literal graph"))
    if check.precisions:
        facts.append(("convolutions ran in", ", ".join(f"{key} {n}" for key, n in check.precisions.items())))
    for timed in check.latency:
        facts.append(
            (
                f"batch {timed.batch}",
                f"{timed.exported_ms:.2f} ms, float {timed.float_ms:.2f} ms: {timed.ratio:.2f} × "
                f"(median of {timed.repeats}, {timed.threads} thread{'s' if timed.threads > 1 else ''})",
            )
        )
    return facts


def weights_text(check: Check) -> str:
    """How far the claim goes: all layers, or all but those that are named."""
    same = "as the checkpoint's in the runtime, bit for bit"
    if check.layers is None or not check.inexact:
        return same
    reasons: dict[str, list[str]] = {}
    for name, reason in check.inexact.items():
        reasons.setdefault(reason, []).append(name)
    others = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return f"{same}, in {check.layers - len(check.inexact)} of {check.layers} layers; not in {others}"
