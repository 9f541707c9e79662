"""The small files of a model's directory, which may come from anybody: regular, of a sensible size, read at once.

A named pipe would be waited for without end, and a link to a device read until memory ends. Links as such are fine: a
hub's cache is made of them.
"""

from __future__ import annotations

import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

SMALL_BYTES = 64_000_000  # of any file but weights; the largest tokenizers have half as many
CONFIG_BYTES = 1 << 20

# Settings and vocabularies, whoever reads them; and those that transformers opens of a directory that it is given.
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.codes")
_OPENED = (
    *("config.json", "generation_config.json", "chat_template.*", "*token*.json", "vocab.*", "merges.txt", "*.jinja"),
    *("*.model", "*.tiktoken", "*.spm", "*.codes"),
)
_FOLDER_OF_TEMPLATES = "additional_chat_templates"

# A pipe is not waited for; none of the flags means anything to a regular file.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))


class UnfitFileError(OSError):
    """A file that no model has: the middle of a sentence that begins with its name."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        UnfitFileError: it is a directory, a pipe, a device or a socket.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, _FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnfitFileError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, limit_bytes: int = SMALL_BYTES) -> bytes:
    """All of a regular file of at most `limit_bytes`.

    Raises:
        UnfitFileError: it is not regular, or larger.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > limit_bytes:
            raise UnfitFileError(f"it is larger than {limit_bytes} bytes")
        return file.read(size_bytes)


def read_text(path: Path, limit_bytes: int = SMALL_BYTES) -> str:
    """`read_small` as UTF-8.

    Raises:
        UnicodeDecodeError: the file is something else; a ValueError.
    """
    return read_small(path, limit_bytes).decode("utf-8")


def check_settings(directory: Path) -> None:
    """Look at every file that another library is going to read of a model's directory, weights excepted.

    Raises:
        UnfitFileError: the first that is not regular, or too large; the message begins with its name.
    """
    for path in (*directory.iterdir(), *(directory / _FOLDER_OF_TEMPLATES).glob("*.jinja")):
        if not path.exists() or not any(fnmatchcase(path.name, pattern) for pattern in _OPENED):
            continue
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > SMALL_BYTES:
            raise UnfitFileError(f"{path} is not a regular file of at most {SMALL_BYTES} bytes")
