"""Atomic writes: a reader sees the whole old file or the whole new one, whatever kills the writer."""

from __future__ import annotations

import os
from pathlib import Path

from coraq.errors import disk_error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file by way of a temporary one beside it, flushed to disk, then renamed over it.

    Raises:
        CoraqError: no room, or no permission; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a new file: a link of that name would be written through
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error, len(data)) from error
