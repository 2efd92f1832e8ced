"""The page in a real browser: no errors, no requests, every plot drawn, narrow screens, print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hbp_titan.report import read_runs, report_page
from tests.report.browser import Browser, find_browser
from tests.report.sample_run import write_usual_run

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium: set CHROMIUM to one")

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"' onload=window.hacked=1"

DRAWN = """[...document.querySelectorAll('svg.chart')].map((svg) => {
  const frame = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('polyline, circle, rect')].map((mark) => mark.getBoundingClientRect());
  const inside = marks.every((box) => box.left >= frame.left - 2 && box.right <= frame.right + 2
    && box.top >= frame.top - 2 && box.bottom <= frame.bottom + 2);
  const widest = Math.max(0, ...marks.map((box) => box.width));
  return { name: svg.getAttribute('aria-label'), wide: frame.width > 200 && frame.height > 100, inside, widest };
})"""

OVERLAPPING = """[...document.querySelectorAll('svg.chart')].flatMap((svg) => {
  const boxes = [...svg.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) => a.left < b.right - 1
    && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3).map(([two]) => one + ' | ' + two));
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program
    with Browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs, one of them with a source whose name is an attack."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_usual_run(folder / "a"), write_usual_run(folder / "b", 60, sources=(HOSTILE, "books"))]
    path = folder / "report.html"
    path.write_text(report_page(read_runs(runs)), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1200, 390])
def test_every_plot_is_drawn_without_errors_requests_and_overflow(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.complaints() == []
    plots = browser.evaluate(DRAWN)
    # Seven of the comparison; per run four of loss, two of groups, three of validation, four of speed, one of ranks,
    # two of timing checks, three of balance, two of memory.
    assert len(plots) == 7 + 2 * 21
    assert [plot["name"] for plot in plots if not plot["wide"] or not plot["inside"] or plot["widest"] < 3] == []
    assert browser.evaluate("document.querySelectorAll('svg.lane.tall rect').length") > 20
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERLAPPING) == []


def test_hostile_source_name_stays_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.evaluate("window.hacked === undefined")
    assert browser.evaluate("document.querySelectorAll('img, [onload], [onerror]').length") == 0
    assert browser.evaluate("document.scripts.length") == 1
    cells = browser.evaluate("[...document.querySelectorAll('#run-1 tbody th')].map(cell => cell.textContent)")
    assert HOSTILE in cells


def test_value_below_the_pointer_is_shown(browser: Browser, page: Path) -> None:
    browser.open(page)
    place = browser.evaluate(
        """(() => { const svg = document.querySelector('#run-0 svg.chart[aria-label="Loss by level"]');
        svg.scrollIntoView({block: 'center'}); const box = svg.getBoundingClientRect();
        const line = svg.querySelector('polyline[data-name]');
        const at = line.points[line.points.length - 1].x / 520 * box.width;
        return [box.left + at, box.top + box.height / 2, line.dataset.x.split(' ').pop(),
          line.dataset.y.split(' ').pop()]; })()"""
    )
    browser.point(place[0], place[1])
    assert browser.evaluate("document.getElementById('tip').hidden") is False
    texts = browser.evaluate("document.getElementById('tip').textContent").split("\n")
    assert texts[0] == f"step {place[2]}"
    assert f"1K/cp1: {place[3]}" in texts
    browser.point(place[0], 1)
    assert browser.evaluate("document.getElementById('tip').hidden") is True


def test_page_follows_the_color_scheme_and_prints_light(browser: Browser, page: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    shown = [browser.evaluate(paper)]
    for media, scheme in (("", "dark"), ("print", "dark")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.call("Emulation.setEmulatedMedia", media=media, features=features)
        shown.append(browser.evaluate(paper))
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    assert shown == ["rgb(255, 255, 255)", "rgb(18, 22, 28)", "rgb(255, 255, 255)"]


def test_browser_reports_errors_requests_and_overflow(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "faulty.html"
    path.write_text("<body style='width:2000px'><img src='missing.png'><script>console.log(1); lacking()</script>")
    browser.open(path, 390)
    texts = " ".join(browser.complaints())
    assert "missing.png" in texts
    assert "console.log" in texts
    assert "lacking is not defined" in texts
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
