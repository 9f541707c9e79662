"""What docs/cli.md promises of JSON, to hold answers against."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def sections() -> dict[str, str]:
    """docs/cli.md by command."""
    parts = re.split(r"^## (.+)$", DOCS.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(name: str) -> Any:
    """The JSON object that docs/cli.md shows for a command."""
    blocks = re.findall(r"```json\n(.*?)```", sections()[name], flags=re.DOTALL)
    assert len(blocks) == 1
    return json.loads(blocks[0])


def documented_events() -> list[dict[str, Any]]:
    """The events that docs/cli.md shows, one a line."""
    blocks = re.findall(r"```jsonl\n(.*?)```", sections()["Events"], flags=re.DOTALL)
    assert len(blocks) == 1
    return [json.loads(line) for line in blocks[0].splitlines()]


def shape(value: Any) -> Any:
    """Keys and types of a JSON value, in order; of a list, those of its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return "number" if type(value) in (int, float) else type(value).__name__
