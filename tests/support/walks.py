"""How far a reader walks through the house: `python -m tests.support.walks` follows three things from beginning to end.

A move is a call that enters another room than the one that it comes from, whatever lies between the two (torch,
transformers); a climb is a move to a higher floor: a callback, or a generator that goes on. The same function called
again from the same one counts once; how often that was is in brackets. Other threads than the main one are not seen.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import waterfill
from tests.support.layers import FLOORS, SOURCE, TOP, modules, room_of
from tests.support.models import tiny_llama

FLOOR = {room: floor for floor, members in enumerate(FLOORS) for room in members}
PROBE = {"sequences": 2, "length": 16}


class Place(NamedTuple):
    """A function of the package, and the room and file that it is in."""

    room: str
    file: str
    function: str


class Walk:
    """A profiler of `sys.setprofile`: which rooms are entered, from where."""

    def __init__(self) -> None:
        self._stack: list[Place | None] = [None]  # of every frame, the nearest place below it
        self.places: set[Place] = set()
        self.moves: Counter[tuple[Place, Place]] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            last, place = self._stack[-1], place_of(frame.f_code)
            if place is not None:
                self.places.add(place)
                if last is not None and last.room != place.room:
                    self.moves[last, place] += 1
            self._stack.append(place or last)
        elif event == "return" and len(self._stack) > 1:
            self._stack.pop()

    def follow(self, function: Callable[[], object]) -> None:
        sys.setprofile(self)
        try:
            function()
        finally:
            sys.setprofile(None)

    @property
    def climbs(self) -> Counter[tuple[Place, Place]]:
        return Counter({move: count for move, count in self.moves.items() if FLOOR[move[1].room] > FLOOR[move[0].room]})

    def show(self, title: str) -> None:
        rooms = sorted({place.room for place in self.places}, key=lambda room: (-FLOOR[room], room))
        print(f"{title}: {len(rooms)} rooms ({', '.join(rooms)}), {len({place.file for place in self.places})} files")
        print(f"    {len(self.moves)} moves between rooms ({self.moves.total()})")
        print(f"    {len(self.climbs)} climbs ({self.climbs.total()})")
        for (caller, callee), count in sorted(self.climbs.items()):
            print(f"        {caller.file}:{caller.function} -> {callee.file}:{callee.function} ({count})")


@cache
def place_of(code: CodeType) -> Place | None:
    """None for code of others, and for what is run once by an import."""
    path = Path(code.co_filename)
    if code.co_name == "<module>" or not path.is_relative_to(SOURCE):
        return None
    file = path.relative_to(SOURCE)
    room = room_of(".".join(file.with_suffix("").parts))
    return None if room == TOP else Place("waterfill" if room == "__init__" else room, str(file), code.co_qualname)


def walks(folder: Path) -> dict[str, Walk]:
    """The three, of a tiny checkpoint that is written into a folder."""
    model, packed, text = tiny_llama(folder / "model", tokenizer=True), folder / "packed", folder / "text"
    text.write_text("".join(f"def f{number}(x):\n    return x + {number}\n" for number in range(50)))

    def answer() -> str:
        return "".join(waterfill.Engine(packed).generate("def", temperature=0, max_new_tokens=4))

    steps: dict[str, Callable[[], object]] = {
        "a checkpoint is packed": lambda: waterfill.pack(model, packed, bits=4, **PROBE),
        "an artifact is opened, and a prompt becomes a text": answer,
        "one convention is evaluated": lambda: waterfill.evaluate(packed, model, text, context=32, cache=False),
    }
    followed = {title: Walk() for title in steps}
    for title, step in steps.items():
        followed[title].follow(step)
    return followed


def main() -> None:
    logging.disable()
    for name in modules().keys() - {TOP, "waterfill"}:  # so that no walk leads through an import
        with suppress(ImportError):  # what takes an extra
            importlib.import_module(f"waterfill.{name}")
    with tempfile.TemporaryDirectory() as folder:
        for title, walk in walks(Path(folder)).items():
            walk.show(title)


if __name__ == "__main__":
    main()
