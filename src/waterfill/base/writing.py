"""Files that are written whole or not at all: beside their place, flushed, and renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waterfill.base.errors import WaterfillError


def prepare_file(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        WaterfillError: it cannot be written; said before the work.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path if resolved(path).exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_file(path: Path, content: str | bytes) -> None:
    """Put content into a file: beside it, flushed, and renamed, so that a full disk or a kill leaves what was there.

    Links stay links. A device, or a pipe that somebody reads, is written to as it is.

    Raises:
        WaterfillError: it cannot be written.
    """
    prepare_file(path)
    with _writing(path):
        data, real = content.encode() if isinstance(content, str) else content, resolved(path)
        if real.exists() and not real.is_file():
            handle = os.open(real, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))  # which waits for nobody to read
            os.set_blocking(handle, True)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            return
        partial = real.with_name(f".waterfill-{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            flush(partial)
            if real.exists():
                shutil.copymode(real, partial)
            partial.replace(real)
        finally:
            partial.unlink(missing_ok=True)
        flush(real.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WaterfillError(
            f"cannot write {path} ({error.strerror or error}); free some space, or name another file"
        ) from error


def resolved(path: Path) -> Path:
    """Where a path leads, links followed, whether or not anything is there.

    Raises:
        OSError: the links go in a circle.
    """
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
