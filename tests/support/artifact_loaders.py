"""Every way in which an artifact is opened and run, and what each says of one that may be anything."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import waterfill
from waterfill.base.errors import WaterfillError
from waterfill.files.artifact import open_artifact
from waterfill.running.engine.engine import Engine

SOURCES = Path(waterfill.__file__).parent
PROMPT = "ab"
IDS = torch.tensor([[1, 2, 3]])


class FindingError(Exception):
    """A loader did what none may do; the message says which, and what."""


def judge(path: Path) -> dict[str, str]:
    """What every loader says: "runs", or the name of its error. Raises FindingError for an error not ours."""
    said = {}
    for name, loader in LOADERS.items():
        try:
            loader(path)
            said[name] = "runs"
        except WaterfillError as error:
            said[name] = type(error).__name__
            if UNENDING in str(error):  # transformers builds layers as long as it is told to
                break
        except Exception as error:
            if name not in FOREIGN or _is_ours(error):
                where = traceback.extract_tb(error.__traceback__)[-1]
                raise FindingError(f"{name}: {type(error).__name__}: {error} in {where}") from error
            said[name] = "transformers'"
    return said


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by waterfill itself; transformers, called by the user, has errors of its own."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(SOURCES)


def _inspect(path: Path) -> None:
    open_artifact(path).size_bytes  # noqa: B018 - all is checked when it is opened


def _engine(path: Path, streamed: bool) -> None:
    list(Engine(path, streamed=streamed).generate(PROMPT, max_new_tokens=2, seed=0))


def _forward(model: Any) -> None:
    with torch.no_grad():
        model(IDS)


LOADERS: dict[str, Callable[[Path], None]] = {
    "open": _inspect,
    "engine": lambda path: _engine(path, streamed=False),
    "engine, streamed": lambda path: _engine(path, streamed=True),
    "load": lambda path: waterfill.load(path, streamed=False),
    "load, streamed": lambda path: waterfill.load(path, streamed=True),
    "forward": lambda path: _forward(waterfill.load(path, streamed=False)),
    "forward, streamed": lambda path: _forward(waterfill.load(path, streamed=True)),
    "from_pretrained": lambda path: _forward(transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")),
}
UNENDING = "which cannot be those of the"
FOREIGN = frozenset({"forward", "forward, streamed", "from_pretrained"})  # that go through the user's transformers
