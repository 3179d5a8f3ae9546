"""The `coraq` command: its sub-commands, and the one place where exceptions become messages and exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer

from coraq import __version__
from coraq.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, CoraqError, exception_text
from coraq.former_names import FORMER_NAMES, present
from coraq.runtime.memory import reuse_freed_memory
from coraq.runtime.processors import share_processors
from coraq.runtime.safe_files import append_traceback

# First lines of the commands' docstrings, so that `coraq --help` need not import what they import.
COMMANDS = {
    "quantize": "Quantize a network without training, write it, and measure what was written.",
    "compare": "Run the missing cells of a grid, and rank methods at equal bytes.",
    "evaluate": "Measure a run again from the files it wrote, or an exported file through its runtime.",
    "export": "Write a run as a file that other tools open, and compare it with the checkpoint.",
    "report": "Render the report of a run or of a comparison's folder again, and print its path.",
    "reproduce": "Run a run's exact configuration again, and compare checkpoint bytes and all numbers.",
    "methods": "List the methods with their source; with NAME, print that method's options.",
}


HELP_ALL = "--help-all"
LONG_HELP = ("quantize", "compare", "evaluate")
MORE_HELP = f"{HELP_ALL} shows all options."


def build(arguments: list[str]) -> typer.Typer:
    """The command line with the command that `arguments` name, all others by name and first line alone.

    Where the shell asks for completions, all are there.
    """
    app = typer.Typer(
        name="coraq",
        help="Quantize any timm ConvNet to 4 bits and below, without training.",
        epilog="Start with: coraq quantize demo",
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(root)
    wanted = next((text for text in arguments if not text.startswith("-")), "")
    for name, summary in COMMANDS.items():
        if name == wanted or "_CORAQ_COMPLETE" in os.environ:
            found = importlib.import_module(f"coraq.cli.{name}")
            app.command(name, epilog=MORE_HELP if name in LONG_HELP else None)(getattr(found, name))
        else:
            app.command(name, help=summary)(_not_asked_for)
    shared = sys.modules.get("coraq.cli.options")  # not imported where no command is
    for option in [] if shared is None else shared.ADVANCED:
        option.hidden = HELP_ALL not in arguments
    return app


def _not_asked_for() -> None:
    raise AssertionError("a command that was not on the command line ran")


_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory|unable to mmap", re.IGNORECASE)

# What Typer raises for a command line it cannot parse. Its base has no public name in every Typer that we take.
_ParseError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"coraq {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Quantize any timm ConvNet to 4 bits and below, without training."""


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code. Prints errors as two lines on stderr."""
    try:
        given = ["--help" if text == HELP_ALL else text for text in arguments]
        code = build(arguments)(args=given or ["--help"], prog_name="coraq", standalone_mode=False, obj=arguments)
    except CoraqError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except _ParseError as error:
        if (renamed := renamed_option(arguments)) is not None:
            return _fail(*renamed, EXIT_USAGE)
        known = [name for name in arguments[:1] if name in COMMANDS]
        hint = f"see {shlex.join(['coraq', *known, '--help'])}"
        message = error.format_message().replace("Value error, ", "")  # type: ignore[attr-defined]  # pydantic's
        return _fail(message, hint, EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            "interrupted", f"the same command starts again: {shlex.join(['coraq', *arguments])}", EXIT_INTERRUPTED
        )
    except Exception as error:  # the edge: everything else is a bug, ours or a plugin's
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # in a library, or on stdout
            hint = "free some space and run the same command again: finished layers are kept"
            return _fail(f"no room on a disk: {error}", hint, EXIT_FAILURE)
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "raise the limit (ulimit -n), or decode images in this process: --workers 0"
            return _fail(f"too many open files: {error}", hint, EXIT_FAILURE)
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
            hint = (
                "lower --calib-memory, --batch-size or --calib-size, or raise the limit (ulimit -v); then run it again"
            )
            return _fail(f"out of memory: {str(error) or type(error).__name__}", hint, EXIT_FAILURE)
        return _fail(*_bug(error), EXIT_FAILURE)
    if code == EXIT_INTERRUPTED:  # Typer turns an interrupt into this exit code
        return _fail(
            "interrupted", f"the same command starts again: {shlex.join(['coraq', *arguments])}", EXIT_INTERRUPTED
        )
    return code if isinstance(code, int) else 0


def renamed_option(arguments: list[str]) -> tuple[str, str] | None:
    """Message and hint where a command line has an option, or an option's value, by a name that it had before."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        typed, _, value = word.partition("=")
        value = value or following
        former = typed.removeprefix("--").replace("-", "_")
        name, now = present(former, value)
        option = f"--{name.replace('_', '-')}"
        if typed.startswith("--") and former in FORMER_NAMES:
            return f"{typed} is now called {option}", f"write {option} {now if now != '' else 'VALUE'}"
        if typed.startswith("--") and now != value:
            return f"{option} {value} is now called {now}", f"write {option} {now}"
    return None


def main() -> None:
    """Run the process's own command line and leave with its exit code."""
    reuse_freed_memory()
    share_processors()
    sys.exit(run(sys.argv[1:]))


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
    run_dir = getattr(error, "run_dir", None)
    try:
        if run_dir is None:
            raise FileNotFoundError
        log = Path(run_dir) / "log.txt"
        append_traceback(log, error)
    except OSError:
        with tempfile.NamedTemporaryFile(
            "w", prefix="coraq-", suffix=".log", delete=False, encoding="utf-8"
        ) as temporary:
            temporary.write("".join(traceback.format_exception(error)))
        log = Path(temporary.name)
    return exception_text(error), f"this should not happen; the traceback is in {log}"
