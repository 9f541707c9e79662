"""The report in a real headless Chromium: it loads without a word, its charts have their marks, keys reach them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from waterfill import api
from waterfill.files.artifact import open_artifact
from waterfill.planning.budget import format_size
from waterfill.studies.comparison import Row
from waterfill.studies.report import Continuation, Report, gather, render

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's own Chromium, or else one that is installed."""
    with playwright.sync_playwright() as session:
        installed = Path(session.chromium.executable_path).exists()
        found = None if installed else next(filter(None, map(shutil.which, BROWSERS)), None)
        if not installed and found is None:
            pytest.skip("no Chromium here (playwright install chromium --only-shell, or install chromium)")
        try:
            opened = session.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = work / "packed"
    report: Report = gather(
        open_artifact(path, verify=False), api.read_plan(path), json.loads((path / "config.json").read_text())
    )
    row = Row("hqq-4", "HQQ 4 bits", "hqq", "1", False, 3_800_000, 4.5, 0.006, 0.0001)
    samples = (Continuation("def f(", "x" * 400, "x" * 300 + "y"), Continuation("long", "word " * 80, "word " * 80))
    file = tmp_path_factory.mktemp("browser") / "report.html"
    file.write_text(render(replace(report, peers=(row,), samples=samples)), "utf-8")
    return file


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")], ids=str)
def page(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, opened; anything that it logs or asks of the network fails the test."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    said: list[str] = []
    opened.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: said.append(f"error: {error}"))
    opened.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or said.append(f"asks {asked.url}"))
    opened.goto(page_file.as_uri())
    yield opened
    opened.close()
    assert said == []


def test_it_fits_and_its_charts_have_their_marks(page: Any, work: Path) -> None:
    matrices = len(api.read_plan(work / "packed").tensors)
    assert page.title() == f"ref-llama in {format_size(api.read_plan(work / 'packed').size_bytes)}: waterfill report"
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, "nothing sticks out sideways"
    marks = {name: page.locator(f"#{name} .mark").count() for name in ("bytes", "map", "level", "promise", "bound")}
    assert marks == {
        "bytes": matrices + 2, "map": matrices - 1, "level": matrices, "promise": matrices + 1, "bound": matrices
    }  # fmt: skip
    assert page.locator("#pareto .peer.mark").count() == 1
    boxes = page.evaluate(
        "[...document.querySelectorAll('.mark')].map(m => m.getBoundingClientRect())"
        ".map(b => [b.left, b.right, b.height])"
    )
    width = page.evaluate("innerWidth")
    assert all(0 <= left < right <= width and height > 2 for left, right, height in boxes)


def test_text_does_not_shrink_with_the_window(page: Any) -> None:
    sizes = page.evaluate("[...document.querySelectorAll('svg.plot text')].map(t => t.getBoundingClientRect().height)")
    assert min(sizes) >= 10


def test_keys_reach_every_mark(page: Any) -> None:
    first = page.locator("#level .mark").first
    assert first.get_attribute("tabindex") == "0"
    page.locator("#level h2").click()  # focus starts behind it
    page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label')"
    labels = [page.evaluate(focused)]
    count = page.locator("#level .mark").count()
    for _ in range(count):  # one more than there are: it stays at the last
        page.keyboard.press("ArrowRight")
        labels.append(page.evaluate(focused))
    assert len(set(labels)) == count
    assert labels[-1] == labels[-2]
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert tip.inner_text().replace("\n", ", ") == labels[-1]
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= page.evaluate("innerWidth")
    page.keyboard.press("Home")
    assert page.evaluate(focused) == labels[0]
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#level')") is None, "one tab stop per chart"


def test_pointing_at_a_mark_names_its_tensor(page: Any) -> None:
    block = page.locator("#bytes .mark").first
    block.hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert tip.inner_text().startswith("model.embed_tokens\n8192 × 256, ")
    page.mouse.move(1, 1)
    assert tip.is_hidden()


def test_tables_stand_behind_the_charts(page: Any) -> None:
    table = page.locator("#bytes table")
    assert not table.is_visible()
    page.locator("#bytes summary").press("Enter")
    assert table.is_visible()
    assert table.locator("tbody tr").count() == 7
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_text_stands_out_from_its_ground(page: Any) -> None:
    """WCAG's contrast of 4.5 for text, and for what cells of the map say on their colours."""
    script = """() => {
      const parse = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const light = (c) => parse(c).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const contrast = (a, b) => {
        const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return (x + .05) / (y + .05);
      };
      const style = (e) => getComputedStyle(e), ground = style(document.body).backgroundColor;
      const plain = [...document.querySelectorAll("p, dd, dt, th, h1, h2, summary, .legend li")]
        .map(e => contrast(style(e).color, ground));
      const cells = [...document.querySelectorAll(".cell")].map(e => [e.querySelector("rect"), e.querySelector("text")])
        .map(([r, t]) => contrast(style(r).fill, style(t).fill));
      return [Math.min(...plain), Math.min(...cells)];
    }"""
    plain, cells = page.evaluate(script)
    assert plain >= 4.5
    assert cells >= 3, "large figures on colour"
