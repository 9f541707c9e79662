"""Small tasks made of text that a model has not been trained to answer: the standard library's own source."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

QUESTIONS, ANSWERS, DOCUMENTS = 8, 4, 2


def source_text() -> str:
    return Path(argparse.__file__).read_text("utf-8")


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def multiple_choice(folder: Path) -> Path:
    """How does this code go on? The true continuation among three from elsewhere."""
    text, chance = source_text(), random.Random(0)
    records = []
    for _ in range(QUESTIONS):
        starts = [chance.randrange(2000, len(text) - 200) for _ in range(4)]
        choices = [text[start : start + 40] for start in starts]
        answer = chance.randrange(4)
        choices[0], choices[answer] = choices[answer], choices[0]
        records.append({"question": text[starts[0] - 160 : starts[0]], "choices": choices, "answer": answer})
    return write_lines(folder / "continuation.jsonl", records)


def generation(folder: Path) -> Path:
    """The rest of a line, half of which are lines that the model knows by heart."""
    known = [("from __future__ import", "annotations"), ("import numpy as", "np"), ("import pandas as", "pd")]
    lines = [line for line in source_text().splitlines() if len(line) > 60][: ANSWERS - len(known)]
    pairs = known + [(line[:40], line[40:]) for line in lines]
    return write_lines(folder / "line.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in pairs])


def documents(folder: Path) -> Path:
    text = source_text()
    pieces = [text[start : start + 1500] for start in range(0, 1500 * DOCUMENTS, 1500)]
    return write_lines(folder / "documents.jsonl", [{"text": piece} for piece in pieces])
