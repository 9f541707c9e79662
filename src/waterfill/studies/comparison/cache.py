"""Results on disk, one small JSON file per (model, method, text, context): a comparison that was broken off goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from waterfill.base.cache import cache_folder
from waterfill.base.writing import write_file
from waterfill.studies.comparison.base import Row

VERSION = 1  # of what is stored, and of how peers are called; raise it when either changes


def comparisons_folder() -> Path:
    """Of all comparisons."""
    return cache_folder() / "compare"


class Results:
    """The results of one model, by its fingerprint."""

    def __init__(self, fingerprint: str) -> None:
        self.folder = comparisons_folder() / fingerprint

    def get(self, key: Mapping[str, Any]) -> Row | None:
        """The row that was stored under exactly this key."""
        content = _read(self._file(key))
        return content[1] if content is not None and content[0] == _plain(key) else None

    def put(self, key: Mapping[str, Any], row: Row) -> None:
        """Store a row; another process sees all of it or nothing."""
        file = self._file(key)
        content = {"version": VERSION, "key": _plain(key), "row": asdict(row)}
        write_file(file, json.dumps(content, indent=1) + "\n")

    def rows(self) -> Iterator[tuple[dict[str, Any], Row]]:
        """Everything that is stored, with its key."""
        for file in sorted(self.folder.glob("*.json")):
            content = _read(file)
            if content is not None:
                yield content

    def _file(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps(_plain(key), sort_keys=True)
        return self.folder / f"{blake2b(text.encode(), digest_size=12).hexdigest()}.json"


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _read(file: Path) -> tuple[dict[str, Any], Row] | None:
    """None for a file that is absent, damaged or of another version: it is measured again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != VERSION or set(content["row"]) != {field.name for field in fields(Row)}:
            return None
        return dict(content["key"]), Row(**content["row"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
