"""Ordinary files only: what lies in a folder that a stranger made may be a link, a pipe or a device.

A pipe would be waited for without end, a device read without end, and a link written through to a file elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_JSON_BYTES = 64 << 20  # metrics.json of a thousand layers has less than one


def read_plain(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The contents of an ordinary file; a link to one will do.

    Raises:
        OSError: it is missing, is no file, or has more than `most` bytes.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe without a writer would wait
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is no ordinary file")
        if about.st_size > most:
            raise OSError(errno.EFBIG, f"it has {about.st_size:,} bytes, more than the {most:,} that are read")
        return file.read(most)


def append_plain(path: Path) -> BinaryIO:
    """An ordinary file, opened unbuffered to append to, and made if there is none.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe or a device.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no ordinary file")
    return file
