"""The `coraq` command: its sub-commands, and the one place where exceptions become messages and exit codes."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer

from coraq import __version__
from coraq.cli import compare, evaluate, export, methods, quantize, report, reproduce
from coraq.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, CoraqError

app = typer.Typer(
    name="coraq",
    help="Quantize any timm ConvNet to 4 bits and below, without training.",
    epilog="Start with: coraq quantize demo",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.quantize)
app.command("compare")(compare.compare)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("reproduce")(reproduce.reproduce)
app.command("methods")(methods.methods)

# What Typer raises for a command line it cannot parse. Its base has no public name in every Typer that we take.
_ParseError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"coraq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Quantize any timm ConvNet to 4 bits and below, without training."""


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code. Prints errors as two lines on stderr."""
    try:
        code = app(args=arguments or ["--help"], prog_name="coraq", standalone_mode=False, obj=arguments)
    except CoraqError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except _ParseError as error:
        known = [name for name in arguments[:1] if name in _command_names()]
        hint = f"see {shlex.join(['coraq', *known, '--help'])}"
        return _fail(error.format_message(), hint, EXIT_USAGE)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            "interrupted", f"the same command starts again: {shlex.join(['coraq', *arguments])}", EXIT_INTERRUPTED
        )
    except Exception as error:  # the edge: everything else is a bug, ours or a plugin's
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # in a library, or on stdout
            hint = "free some space and run the same command again: finished layers are kept"
            return _fail(f"no room on a disk: {error}", hint, EXIT_FAILURE)
        return _fail(*_bug(error), EXIT_FAILURE)
    if code == EXIT_INTERRUPTED:  # Typer turns an interrupt into this exit code
        return _fail(
            "interrupted", f"the same command starts again: {shlex.join(['coraq', *arguments])}", EXIT_INTERRUPTED
        )
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the process's own command line and leave with its exit code."""
    # Activations are large and short-lived: with huge pages the kernel clears them in far fewer faults, which was
    # worth a third of resnet18's and half of mobilenetv2's time. torch reads this when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.exit(run(sys.argv[1:]))


def _command_names() -> list[str]:
    return [command.name for command in app.registered_commands if command.name]


def _fail(message: str, hint: str, code: int) -> int:
    """Two lines on stderr, whatever line breaks the message holds."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"hint: {' '.join(hint.split())}", file=sys.stderr)
    return code


def _bug(error: Exception) -> tuple[str, str]:
    """Message and hint of an unexpected exception; its traceback goes to a log.

    The pipeline leaves the run folder in the exception's `run_dir`; without one the log is a temporary file.
    """
    text = "".join(traceback.format_exception(error))
    run_dir = getattr(error, "run_dir", None)
    try:
        if run_dir is None:
            raise FileNotFoundError
        log = Path(run_dir) / "log.txt"
        with log.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        with tempfile.NamedTemporaryFile(
            "w", prefix="coraq-", suffix=".log", delete=False, encoding="utf-8"
        ) as temporary:
            temporary.write(text)
        log = Path(temporary.name)
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return message, f"this should not happen; the traceback is in {log}"
