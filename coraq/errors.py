"""The one exception that coraq raises on purpose: what is wrong, and what to do next."""

from __future__ import annotations

import errno
from pathlib import Path

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_BELOW_THRESHOLD = 3
EXIT_INTERRUPTED = 130
OVERFLOW_HINT = "Does the float network overflow on these images? Check --mean and --std, and its weights."


class CoraqError(Exception):
    """An error that the user can act on.

    Args:
        message: what is wrong, with the offending value in it.
        hint: what to do next; one line.
        exit_code: 1 for a failure, 2 for a wrong request (see the constants of this module).
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(CoraqError):
    """A wrong request: an unknown option, method or value. Exit code 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, EXIT_USAGE)


class MethodError(CoraqError):
    """A method that broke what it promised: its author can mend it, the user can take another."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            "This is a fault of the method: tell its author, or use another. Layers that were finished are kept.",
        )


def exception_text(error: BaseException) -> str:
    """ "ValueError: what it says", or "ValueError" where it says nothing."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def disk_error(path: Path, error: OSError, size: int = 0) -> CoraqError:
    """The CoraqError for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CoraqError(
            f"no room on the disk of {path.parent} (writing {size:,} bytes to {path.name})",
            "Free some space and run the same command again: finished layers are kept. Or choose another --output.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CoraqError(
            f"cannot write to {path.parent}: {error.strerror}", "Choose another place with --output FOLDER."
        )
    return CoraqError(f"cannot write {path}: {error.strerror or error}", "Choose another place with --output FOLDER.")
