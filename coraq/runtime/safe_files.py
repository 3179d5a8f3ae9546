"""Ordinary files only: what lies in a folder that a stranger made may be a link, a pipe or a device.

A pipe would be waited for without end, a device read without end, and a link written through to a file elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
import traceback
from pathlib import Path
from typing import BinaryIO

MOST_JSON_BYTES = 64 << 20  # metrics.json of a thousand layers has less than one


def read_plain(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The contents of an ordinary file; a link to one will do.

    Raises:
        OSError: it is missing, is no file, or has more than `most` bytes.
    """
    number = _open(path, os.O_RDONLY)
    with os.fdopen(number, "rb") as file:
        size = os.fstat(number).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {most:,} that are read")
        return file.read(most)


def append_plain(path: Path) -> BinaryIO:
    """An ordinary file, opened unbuffered to append to, and made if there is none.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe or a device.
    """
    number = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
    return os.fdopen(number, "ab", buffering=0)


def append_traceback(path: Path, error: BaseException) -> None:
    """Keep an exception's traceback, and its causes', at the end of a log.

    Raises:
        OSError: as `append_plain`.
    """
    with append_plain(path) as file:
        file.write("".join(traceback.format_exception(error)).encode())


def _open(path: Path, flags: int) -> int:
    """A descriptor of an ordinary file; without waiting, as a pipe that nobody writes to would make one."""
    number = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no ordinary file")
    return number
