"""docs/results.md and its chapters say what the JSON files beside them say, and those have what benchmarks write."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

results: Any = pytest.importorskip("benchmarks.results", reason="benchmarks/ is not here")
common: Any = pytest.importorskip("benchmarks.shared.report")
held_out: Any = pytest.importorskip("benchmarks.held_out")

STALE = "run python -m benchmarks.results"


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    return dict(results.saved_reports())


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    """What a run leaves: a table, a criterion that holds and one that does not, a note."""
    report = common.BenchmarkReport("a title")
    report.table("printed", ["codec", "bits|b", "±"], [["p1", 2.0, None], ["p2", 3.14159, 1]], key="by_codec")
    report.criterion("worst_ratio", 1.23456, "<= 1", False)
    report.criterion("ratio_of_p1", 0.5, "|x| <= 1", True)
    report.note("a note")
    report.save(tmp_path / "made" / "report.json")
    return dict(json.loads((tmp_path / "made" / "report.json").read_text("utf-8")))


def test_every_chapter_has_its_figures_and_its_page(reports: dict[str, dict[str, Any]]) -> None:
    assert list(reports) == list(results.CHAPTERS)
    files = sorted(path.name for path in results.FOLDER.iterdir())
    assert files == sorted(f"{name}.{kind}" for name in results.CHAPTERS for kind in ("json", "md"))


@pytest.mark.parametrize("name", results.CHAPTERS)
def test_a_chapter_says_what_its_file_says(name: str, reports: dict[str, dict[str, Any]]) -> None:
    page = results.chapter_page(name, results.CHAPTERS[name], reports[name])
    assert (results.FOLDER / f"{name}.md").read_text("utf-8") == page, f"{STALE} {name}"


def test_the_summary_says_what_the_files_say(reports: dict[str, dict[str, Any]]) -> None:
    assert results.SUMMARY.read_text("utf-8") == results.summary_page(reports), STALE


def test_findings_have_their_figures(reports: dict[str, dict[str, Any]]) -> None:
    for name, report in reports.items():
        said = results.finding(results.CHAPTERS[name].finding, report)
        assert not set("{}—") & set(said), f"{name}: {said}"


def test_files_have_what_a_run_writes(saved: dict[str, Any], reports: dict[str, dict[str, Any]]) -> None:
    for name, report in reports.items():
        assert list(report) == list(saved), name
        assert report["machine"].keys() == saved["machine"].keys(), name
        assert all(item.keys() == {"value", "goal", "holds"} for item in report["criteria"].values()), name


def test_a_run_becomes_a_chapter(saved: dict[str, Any]) -> None:
    page = results.chapter_page("made", results.Chapter("A heading", "none"), saved)
    for line in (
        "# A heading",
        "- ✗ worst ratio: 1.235 (goal <= 1)",
        "- ✓ ratio of p1: 0.5 (goal |x| <= 1)",
        "**by codec**",
        "| p1 | 2 | — |",
        "| p2 | 3.142 | 1 |",
        "- a note",
    ):
        assert line in page.splitlines()
    assert "quick run" not in page
    assert "quick run" in results.chapter_page("made", results.Chapter("A heading", "none"), saved | {"quick": True})


def test_a_finding_takes_its_figures_from_the_report(saved: dict[str, Any]) -> None:
    sentence = "{worst_ratio} {least *ratio*:.0%} {most by_codec/bits|b:.1f} {most by_codec/±:MB} {gone}"
    assert results.finding(sentence, saved) == "1.23 50 % 3.1 0 MB —"


def test_the_summary_names_what_is_not_met(reports: dict[str, dict[str, Any]], saved: dict[str, Any]) -> None:
    page = results.summary_page(reports | {"bound": saved | {"quick": True}})
    heading = results.CHAPTERS["bound"].heading
    assert next(line for line in page.splitlines() if heading in line).endswith("*(A quick run.)* |")
    assert f"| [{heading}](results/bound.md) | 1 | 1 | worst ratio: 1.235 (goal <= 1) |" in page.splitlines()


def test_a_report_names_the_text_it_was_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.txt").write_bytes(b"x = 1\n")
    monkeypatch.setenv("WATERFILL_TEXT", str(tmp_path / "some.txt"))
    report = common.BenchmarkReport("a title")
    assert common.held_out_text(report) == tmp_path / "some.txt"
    assert report.text == {"name": "some.txt", "bytes": 6, "sha256": hashlib.sha256(b"x = 1\n").hexdigest()}


def test_the_text_is_taken_from_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATERFILL_TEXT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report = common.BenchmarkReport("a title")
    assert common.held_out_text(report).name.startswith("standard-library-")
    assert report.text["name"].startswith("standard library of Python")
    held_out.cached().write_bytes(b"x = 1\n")
    assert common.held_out_text(report) == held_out.cached()
    assert report.text["name"] == held_out.cached().name  # not the release's: its digest is another


def test_other_files_than_the_release_s_are_refused() -> None:
    with pytest.raises(ValueError, match="not those of scikit-learn"):
        held_out.joined(lambda name: name.encode())
