"""Atomic writes: a reader sees the whole old file or the whole new one, whatever kills the writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from coraq.errors import CoraqError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file by way of a temporary one beside it, flushed to disk, then renamed over it.

    Raises:
        CoraqError: no room, or no permission; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error, len(data)) from error


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
