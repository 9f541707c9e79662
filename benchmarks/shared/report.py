"""What every script in benchmarks/ shares: arguments, the machine, the held-out text, and one report per run.

A script parses its arguments, measures, hands tables and criteria to a `BenchmarkReport`, and ends by saving it::

    arguments = parse_arguments(__doc__, model={"type": Path, "default": EXAMPLE_MODEL, "help": "what to measure"})
    report = BenchmarkReport("prediction against measurement")
    text = held_out_text(report)
    report.table("KL by bits", ["bits", "predicted", "measured"], rows, key="kl_by_bits")
    report.criterion("prediction_within_10_percent", worst, "<= 0.10", worst <= 0.10)
    report.save(arguments.json)

A criterion that does not hold is reported, not raised: the exit status only says whether the script ran to its end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import held_out
from waterfill.base.machine import cpu_name, memory_bytes, package_version
from waterfill.base.process import usable_cpus

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE_MODEL = REPOSITORY / "examples" / "ref-llama"

# Modules that every supported interpreter has as one plain file: about 2 MB of source.
STANDARD_LIBRARY_MODULES = """
    argparse ast bdb calendar cmd codecs configparser contextlib copy csv dataclasses difflib dis doctest enum filecmp
    fractions ftplib functools gettext glob gzip heapq imaplib inspect ipaddress mailbox optparse pickle plistlib poplib
    pprint pstats random sched shelve shlex shutil smtplib socket statistics subprocess tarfile tempfile textwrap timeit
"""


def parse_arguments(description: str | None, **extra: Mapping[str, Any]) -> argparse.Namespace:
    """Arguments of one script: `--quick`, `--json FILE`, and `--NAME` per keyword (its value: add_argument's keywords).

    Underscores in a keyword become hyphens on the command line, and underscores again in the namespace.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer points and repetitions: minutes become seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, criteria and results to FILE")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions: what a figure needs to be compared; no host name and no path."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{
            package: package_version(package) or "not installed"
            for package in ("torch", "transformers", "numpy", "waterfill")
        },
    }


def median_spread(samples: Sequence[float]) -> tuple[float, float]:
    """Median of the samples and half the distance between their quartiles, in the samples' unit."""
    low, median, high = np.percentile(np.asarray(samples, dtype=np.float64), [25, 50, 75])
    return float(median), float(high - low) / 2


def held_out_text(report: BenchmarkReport | None = None) -> Path:
    """File of code that the example model was not trained on; the report (or the terminal) says which one it is.

    It is the file that WATERFILL_TEXT names; or else the text of the published figures, where `held_out.py` has made
    it; or else the standard library's own source: the same kind of text wherever the interpreter is the same, without
    the network, but not certain to be unseen by the model.
    """
    hint = ""
    if chosen := os.environ.get("WATERFILL_TEXT"):
        path = Path(chosen)
        name = path.name
    elif held_out.cached().is_file():
        path = held_out.cached()
        name = path.name
    else:
        path, name = _standard_library_text(), f"standard library of Python {platform.python_version()}"
        hint = "; the text of the published figures is made by: python -m benchmarks.held_out"
    content = path.read_bytes()
    text: dict[str, Any] = {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if text["sha256"] == held_out.SHA256:
        text["name"] = held_out.NAME
    said = f"text: {text['name']} ({len(content):,} bytes, SHA-256 {text['sha256']}){hint}"
    if report is None:
        _console().print(said, style="dim", highlight=False)
    else:
        report.text = text
        report.console.print(said, style="dim", highlight=False, markup=False)
    return path


class BenchmarkReport:
    """Tables, notes and criteria of one run: printed as they come, written as one JSON object at the end.

    The object: `title`; `quick`, whether --quick was given; `machine`; `text`, the name, bytes and SHA-256 of the text
    measured on, or null; `criteria`, {NAME: {value, goal, holds}}; `results`, tables as lists of {COLUMN: value};
    `notes`. What was not kept is null.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.text: dict[str, Any] | None = None
        self.results: dict[str, Any] = {}
        self.notes: list[str] = []
        self.criteria: dict[str, dict[str, Any]] = {}
        self.console = _console()
        self.console.rule(escape(title))

    def note(self, text: str) -> None:
        """Print one remark and keep it for the JSON file."""
        self.notes.append(text)
        self.console.print(text, style="dim", highlight=False, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], key: str | None = None) -> None:
        """Print rows under their columns; with a key, keep them in `results` as a list of {column: value}."""
        table = Table(*map(escape, columns), title=escape(title), title_justify="left")
        for row in rows:
            table.add_row(*(escape(_cell(value)) for value in row))
        for column in table.columns[1:]:
            column.justify = "right"
        self.console.print(table)
        if key is not None:
            self.results[key] = [dict(zip(columns, row, strict=True)) for row in rows]

    def criterion(self, name: str, value: Any, goal: Any, holds: bool) -> None:
        """Record one figure, the goal it is held against, and whether it holds."""
        if name in self.criteria:
            raise ValueError(f"criterion {name!r} was reported twice: give each figure its own name")
        self.criteria[name] = {"value": value, "goal": goal, "holds": bool(holds)}

    def save(self, path: Path | None) -> None:
        """Print every criterion with ✓ or ✗ and, when a path is given, write the whole report there as JSON."""
        for name, criterion in self.criteria.items():
            mark, style = ("✓", "green") if criterion["holds"] else ("✗", "bold red")
            line = f"{mark} {name}: {_cell(criterion['value'])} (goal {_cell(criterion['goal'])})"
            self.console.print(line, style=style, highlight=False, markup=False)
        if path is None:
            return
        content = {
            "title": self.title,
            "quick": "--quick" in sys.argv,
            "machine": machine(),
            "text": self.text,
            "criteria": self.criteria,
            "results": self.results,
            "notes": self.notes,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def _console() -> Console:
    # Piped into a file the terminal's width means nothing, and the usual 80 columns would cut the tables.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _cell(value: Any) -> str:
    """A value as a table shows it: four significant digits for floats."""
    value = _plain(value)
    return f"{value:.4g}" if isinstance(value, float) else "—" if value is None else str(value)


def _plain(value: Any) -> Any:
    """The same value in JSON's own types: numpy and torch scalars unwrapped, not-a-number and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _standard_library_text() -> Path:
    """Write the listed modules' source, in order, to a cache file named after the interpreter's version."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "waterfill"
    path = cache / f"standard-library-{platform.python_version()}.txt"
    if not path.is_file():
        library = Path(sysconfig.get_path("stdlib"))
        sources = [(library / f"{name}.py").read_text("utf-8") for name in STANDARD_LIBRARY_MODULES.split()]
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text("\n".join(sources), "utf-8")
        partial.replace(path)  # a second script started meanwhile sees all of the text or none
    return path
