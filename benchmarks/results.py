"""docs/results.md and its chapters from the files that the other scripts wrote: `python -m benchmarks.results [NAME…]`.

::

    python -m benchmarks.NAME --json docs/results/NAME.json
        --> NAME.json --> docs/results/NAME.md, of those named, or of all
        --> all files --> docs/results.md: findings and criteria

So one chapter is renewed by running its script, then `python -m benchmarks.results NAME`. Headings and text are in
`chapters.py`; a chapter whose file is missing is left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.chapters import CHAPTERS, Chapter
from benchmarks.shared.report import REPOSITORY

SUMMARY = REPOSITORY / "docs" / "results.md"
FOLDER = REPOSITORY / "docs" / "results"
INTRODUCTION = """# Results

Measured by the scripts in [benchmarks/](../benchmarks/README.md), a chapter each; this page and the chapters are
written by `benchmarks.results` from the JSON files in [results/](results), which the scripts wrote.

Model, where none is named: `examples/ref-llama` (6.8 M weights, tied embeddings, bf16), a small and lightly trained
Llama: compare methods and predictions with one another, its quality means nothing else. KL is in nats per token,
against the original model, on text that it has not seen (`python -m benchmarks.held_out` makes that text).

Also measured: [what quantised weights can be compressed to](compressibility.md),
[every causal family of transformers](families.md).
"""
FIGURE = re.compile(r"\{(?:(least|most) )?([^{}:]+)(?::([^{}]+))?\}")


def main() -> None:
    reports = saved_reports()
    names = sys.argv[1:] or list(reports)
    for name in names:
        if name not in CHAPTERS:
            sys.exit(f"no chapter is called {name!r}; there are {', '.join(CHAPTERS)}")
        if name not in reports:
            sys.exit(
                f"{name}.json is not in docs/results; run python -m benchmarks.{name} --json docs/results/{name}.json"
            )
    for name in names:
        (FOLDER / f"{name}.md").write_text(chapter_page(name, CHAPTERS[name], reports[name]), "utf-8")
    SUMMARY.write_text(summary_page(reports), "utf-8")


def saved_reports() -> dict[str, dict[str, Any]]:
    """What is in docs/results, by name of script, in the chapters' order."""
    files = {name: FOLDER / f"{name}.json" for name in CHAPTERS}
    return {name: json.loads(path.read_text("utf-8")) for name, path in files.items() if path.is_file()}


def chapter_page(name: str, chapter: Chapter, report: dict[str, Any]) -> str:
    """One chapter: what was measured on what, criteria, tables, notes."""
    lines = [
        f"# {chapter.heading}",
        "",
        f"*[Results](../results.md) · `python -m benchmarks.{name}` · [{name}.json]({name}.json)*",
        "",
        *([chapter.text, ""] if chapter.text else []),
        f"*{machine_of(report)}.*",
        "",
        *([f"*Text: {text_of(report)}.*", ""] if report["text"] else []),
        *(["*A quick run: fewer points and repetitions than without `--quick`.*", ""] if report["quick"] else []),
    ]
    for key, criterion in report["criteria"].items():
        mark = "✓" if criterion["holds"] else "✗"
        lines.append(f"- {mark} {stated(key, criterion)}")
    for key, rows in report["results"].items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            lines += [
                "",
                f"**{spaced(key)}**",
                "",
                *table(list(rows[0]), ([row.get(column) for column in rows[0]] for row in rows)),
            ]
    if report["notes"]:
        lines += ["", "**notes**", "", *(f"- {note}" for note in report["notes"])]
    return "\n".join([*lines, ""])


def summary_page(reports: dict[str, dict[str, Any]]) -> str:
    """What was measured on what, every chapter's finding, and the criteria that are not met."""
    findings: list[list[Any]] = []
    criteria: list[list[Any]] = []
    for name, report in reports.items():
        link = f"[{CHAPTERS[name].heading}](results/{name}.md)"
        quick = " *(A quick run.)*" if report["quick"] else ""
        findings.append([link, finding(CHAPTERS[name].finding, report) + quick])
        missed = [stated(key, item) for key, item in report["criteria"].items() if not item["holds"]]
        said = "<br>".join(missed).replace("|", "\\|")
        criteria.append([link, len(report["criteria"]) - len(missed), len(missed), said])
    total = ["**all**", sum(row[1] for row in criteria), sum(row[2] for row in criteria), ""]
    conditions = [
        *grouped("machine", {name: machine_of(report) for name, report in reports.items()}),
        *grouped("text", {name: text_of(report) for name, report in reports.items() if report["text"]}),
    ]
    return "\n".join(
        [
            INTRODUCTION,
            *table(["what", "measured on", "chapters"], conditions),
            "",
            "## Findings",
            "",
            *table(["chapter", "main finding"], findings),
            "",
            "## Criteria",
            "",
            *table(["chapter", "met", "not met", "figures that are not met, and their goals"], [*criteria, total]),
            "",
        ]
    )


def grouped(kind: str, conditions: dict[str, str]) -> list[list[str]]:
    """A row per distinct condition, with the names that share it."""
    names: dict[str, list[str]] = {}
    for name, condition in conditions.items():
        names.setdefault(condition, []).append(name)
    return [[kind, condition, ", ".join(f"`{name}`" for name in those)] for condition, those in names.items()]


def finding(sentence: str, report: dict[str, Any]) -> str:
    """The sentence with the report's figures in place of what is in braces; — where the report has none."""

    def figure(match: re.Match[str]) -> str:
        which, name, form = match.groups()
        values = [value for value in figures(name, report) if value is not None]
        if not values:
            return cell(None)
        value = max(values) if which == "most" else min(values)
        return f"{value / 1e6:.0f} MB" if form == "MB" else f"{value:{form or '.3g'}}".replace("%", " %")

    return FIGURE.sub(figure, sentence)


def figures(name: str, report: dict[str, Any]) -> list[Any]:
    """Values of TABLE/COLUMN, or of the criteria whose names fit a pattern."""
    key, slash, column = name.partition("/")
    if slash:
        return [row[column] for row in report["results"].get(key, [])]
    return [criterion["value"] for key, criterion in report["criteria"].items() if fnmatchcase(key, name)]


def machine_of(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}"


def text_of(report: dict[str, Any]) -> str:
    text = report["text"]
    return f"{text['name']} ({text['bytes']:,} bytes, SHA-256 `{text['sha256']}`)"


def stated(key: str, criterion: dict[str, Any]) -> str:
    return f"{spaced(key)}: {cell(criterion['value'])} (goal {cell(criterion['goal'])})"


def spaced(key: str) -> str:
    return key.replace("_", " ")


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    body = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def cell(value: Any) -> str:
    """A value as tables show it: four significant digits for floats."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "—" if value is None else str(value)


if __name__ == "__main__":
    main()
