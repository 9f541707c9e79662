"""What an interrupted run has finished (docs/format.md §7): an append-only file, locked while a process has it open.

Every line is `<digest of the rest> <JSON>`, so that a torn or altered line is recognised; reading stops at the first.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from waterfill.base.errors import ArtifactError
from waterfill.files.artifact.format import compact_json, digest

_log = logging.getLogger(__name__)


class Ledger:
    """Open, lock and read a ledger; `entries` are its whole lines.

    Raises:
        ArtifactError: if another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+b")
        try:
            _lock(self._file, path)
            self.entries = self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        entries = []
        whole_bytes = 0
        for line in self._file:
            seal, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or seal != digest(text).encode():
                break
            entries.append(json.loads(text))
            whole_bytes += len(line)
        self._file.truncate(whole_bytes)  # or the next line would be appended to a torn one
        return entries

    def append(self, entry: Mapping[str, object]) -> None:
        """Add a line and wait until it is on the disk."""
        text = compact_json(entry)
        self._file.write(digest(text).encode() + b" " + text + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Forget every line."""
        self._file.truncate(0)
        self.entries = []

    def close(self) -> None:
        """Release the lock, leaving the file for the next run."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file, then release the lock."""
        if os.name == "nt":  # cannot delete an open file
            self.close()
        self._path.unlink(missing_ok=True)
        self.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Exclusive lock where the system has them; it ends with the process, however that ends."""
    if sys.platform == "win32":
        return
    import fcntl

    busy = ArtifactError(
        f"{path.parent} is being written by another process; wait for it to end, or give another output"
    )
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError as error:
        _log.warning("%s cannot be locked (%s): do not start a second run with this output", path, error.strerror)
    # The one who held the lock before us may have finished and removed the file that we opened.
    if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
        raise busy
