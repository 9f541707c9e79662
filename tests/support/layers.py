"""The house that `waterfill` lives in: `python -m tests.support.layers` prints its rooms, floors and faults.

A room is a folder (or module) right below `waterfill`. It imports rooms on lower floors only; imports inside functions
and those for types count as well. Inside a room files form no circle, nor do its folders.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "waterfill"
FLOORS: Sequence[Sequence[str]] = (
    ("base",),
    ("codecs",),
    ("files",),
    ("kernels", "planning"),
    ("packing", "running"),
    ("evaluation",),
    ("studies", "tuning"),
    ("api",),
    ("cli", "waterfill"),  # `waterfill` is the package's own __init__: names only
)
TOP = "__main__"
LONGEST = 400  # lines of a file
Graph = Mapping[str, set[str]]


def main() -> None:
    print(f"{sum(map(len, FLOORS))} rooms on {len(FLOORS)} floors, from the top:")
    for floor in range(len(FLOORS) - 1, -1, -1):
        for room in FLOORS[floor]:
            files = [name for name in modules() if room_of(name) == room]
            below = ", ".join(sorted(rooms()[room]))
            print(f"{floor + 1:3}  {room:<10} {len(files):3} files" + f"  imports {below}" * bool(below))
    for what, found in faults().items():
        print(f"{len(found)} {what}", *found, sep="\n     ")


def faults() -> dict[str, list[str]]:
    """What breaks the rules, by rule."""
    return {
        "imports that do not go down": list(upward()),
        "circles of files": circle(file_graph()),
        "circles of folders": [step for room in rooms() for step in circle(folder_graph(room))],
        f"files of more than {LONGEST} lines": list(long_files()),
    }


def upward() -> Iterator[str]:
    """Imports of a room on the same floor or above."""
    floors = {room: floor for floor, members in enumerate(FLOORS) for room in members}
    for name in modules():
        here = room_of(name)
        if here == TOP:
            continue
        for line, there in imports(name):
            if room_of(there) != here and floors[room_of(there)] >= floors[here]:
                yield f"{name}:{line} imports {there}"


def circle(graph: Graph) -> list[str]:
    """Names on one circle of a graph; none if it has none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(name) for name in error.args[1]]
    return []


def file_graph() -> Graph:
    return {name: {there for _, there in imports(name)} - {name} for name in modules()}


def folder_graph(room: str) -> Graph:
    """Between the folders inside a room; its own files, which folders share and which join them, are left out."""
    graph: dict[str, set[str]] = {}
    for name in modules():
        for _, there in imports(name):
            here, other = folder_of(name), folder_of(there)
            if room_of(name) == room_of(there) == room and here and other and here != other:
                graph.setdefault(here, set()).add(other)
    return graph


def rooms() -> Graph:
    """Which rooms each of them imports."""
    graph: dict[str, set[str]] = {room: set() for floor in FLOORS for room in floor}
    for name in modules():
        if (here := room_of(name)) != TOP:
            graph[here] |= {room_of(there) for _, there in imports(name)} - {here}
    return graph


def long_files() -> Iterator[str]:
    folders = (SOURCE, REPOSITORY / "tests", REPOSITORY / "benchmarks", REPOSITORY / "native")
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix in {".py", ".cpp", ".hpp", ".h"}:
            lines = len(path.read_text("utf-8").splitlines())
            if lines > LONGEST:
                yield f"{path.relative_to(REPOSITORY)}: {lines}"


@lru_cache
def modules() -> Mapping[str, Path]:
    """Every module by its name below `waterfill`; the package itself is "waterfill"."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "waterfill"] = path
    return found


@lru_cache
def imports(name: str) -> Sequence[tuple[int, str]]:
    """(line, module) of everything of the package that a module imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(modules()[name].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("waterfill.")
                home = full if full in modules() else node.module.removeprefix("waterfill.")
                if node.module.partition(".")[0] == "waterfill":
                    found.append((node.lineno, home))
        elif isinstance(node, ast.Import):
            found += [
                (node.lineno, alias.name.removeprefix("waterfill."))
                for alias in node.names
                if alias.name.partition(".")[0] == "waterfill"
            ]
    return found


def room_of(name: str) -> str:
    return name.partition(".")[0]


def folder_of(name: str) -> str:
    """The folder of a module inside its room; "" for a file of the room's own."""
    parts = name.split(".")
    if len(parts) > 2 or (len(parts) == 2 and modules()[name].name == "__init__.py"):
        return parts[1]
    return ""


if __name__ == "__main__":
    main()
