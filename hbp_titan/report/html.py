"""The look of the page, for screens wide and narrow and for paper, and the script that shows values under the pointer.

Owns style sheet and script. Without the script the page shows all but these values; tables have them too.

Building blocks of the page: escaped text, tables, figures, cards, and numbers as people read them.

Owns the HTML of these blocks. Text from a run (names of sources, levels, folders) reaches the page through `text` or a
chart alone, both of which escape it.

Plot: curves over one x axis, as they are and smoothed, as a figure of the page.

Owns how curves are drawn together: their span, their legend, what is thin and what is thick.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hbp_titan.packing.metrics import band_name
from hbp_titan.report.charts import COLORS, Chart
from hbp_titan.report.run import Floats, StepLog
from hbp_titan.report.series import combinations, smooth, window_of

STYLE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: var(--ink); background: var(--paper); }
main { max-width: 1160px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h3 { font-size: 18px; margin: 0 0 4px; letter-spacing: -0.005em; }
p { color: var(--soft); margin: 0 0 10px; max-width: 84ch; overflow-wrap: anywhere; }
a { color: var(--c0); }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 16px; }
article + article, nav + section { margin-top: 24px; }
article + article, section + article { border-top: 3px solid var(--grid); padding-top: 32px; margin-top: 48px; }
section { margin-top: 36px; padding-top: 20px; border-top: 1px solid var(--grid); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 14px 0; }
.card { background: var(--panel); border: 1px solid var(--grid); border-radius: 10px; padding: 10px 14px;
  min-width: 0; }
.card span, .card small { display: block; color: var(--soft); font-size: 12px; }
.card b { display: block; font-size: 21px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 2px 28px; margin: 14px 0; }
.facts div { display: flex; gap: 10px; min-width: 0; border-bottom: 1px solid var(--grid); padding: 4px 0; }
.facts dt { flex: 0 0 110px; color: var(--soft); } .facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px; margin: 12px 0;
  align-items: start; }
.row > * { min-width: 0; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--grid); border-radius: 10px;
  padding: 12px 14px 8px; min-width: 0; }
figcaption { font-size: 14px; } figcaption small { color: var(--soft); margin-left: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--soft); margin: 2px 0 4px; }
.legend i { font-style: normal; overflow-wrap: anywhere; } .legend s { display: inline-block; width: 10px;
  height: 10px; border-radius: 3px; margin-right: 5px; vertical-align: -1px; }
.chart { display: block; width: 100%; height: auto; font-size: 11px; fill: var(--soft);
  font-variant-numeric: tabular-nums; touch-action: pan-y; }
.chart polyline { stroke-linejoin: round; stroke-linecap: round; }
.chart .cross { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.wide { margin: 12px 0; }
.lanes { display: grid; grid-template-columns: max-content 1fr; gap: 5px 12px; align-items: center; margin-top: 8px; }
.lanes .legend { margin: 0; }
.lanes .name { font-size: 12px; color: var(--soft); text-align: right; }
.lane { display: block; width: 100%; height: 18px; background: var(--paper); border-radius: 4px; overflow: hidden; }
.lane.tall { height: 64px; } .lane line { vector-effect: non-scaling-stroke; stroke-width: 2; }
.axis { position: relative; height: 16px; font-size: 11px; color: var(--soft); font-variant-numeric: tabular-nums; }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis .end { right: 0; transform: none; }
.scroll { overflow-x: auto; margin: 12px 0; max-width: 100%; }
.row .scroll { margin: 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; white-space: nowrap; }
caption { text-align: left; font-weight: 600; padding: 0 0 4px; }
th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid var(--grid); font-weight: 400; }
thead th { color: var(--soft); font-size: 12px; vertical-align: bottom; }
tbody th { max-width: 340px; overflow: hidden; text-overflow: ellipsis; }
th:first-child { text-align: left; } .marked th, .marked td { font-weight: 600; }
td small { color: var(--soft); }
.note { font-size: 12.5px; margin: 6px 0 4px; }
.missing { font-size: 13.5px; border-left: 3px solid var(--grid); padding: 2px 0 2px 10px; margin: 10px 0; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: 10px; border-radius: 8px;
  font-size: 12.5px; }
#tip { position: fixed; z-index: 9; pointer-events: none; background: var(--ink); color: var(--paper);
  font-size: 12.5px; line-height: 1.45; padding: 6px 10px; border-radius: 7px; max-width: min(340px, 90vw);
  white-space: pre-line;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
#tip[hidden] { display: none; }
@media (max-width: 600px) {
  main { padding: 18px 14px 48px; } .chart { font-size: 15px; } figure { padding: 10px 10px 6px; }
  .facts dt { flex-basis: 92px; } .cards { grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); }
  .lanes { grid-template-columns: 1fr; gap: 2px; } .lanes .legend { margin: 0; }
.lanes .name { text-align: left; margin-top: 6px; }
  .axis span:nth-child(even) { display: none; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --grid: #ccc; --paper: #fff; --panel: #fff; --c0: #2f6fb7;
    --c1: #e08a2e; --c2: #3a9a6b; --c3: #b0508e; --c4: #7a6fc0; --c5: #8c7a5a; --c6: #2b9aa8; --c7: #c4504a; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11px; } main { max-width: none; padding: 0; } nav, #tip { display: none; }
  .row { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; }
  table { white-space: normal; font-size: 10px; }
  figure, table, .card { break-inside: avoid; } h3 { break-after: avoid; } article { break-before: auto; }
}
"""

SCRIPT = """
'use strict';
(() => {
  const tip = document.getElementById('tip');
  const show = (text, event) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const above = event.clientY - box.height - 12;
    tip.style.left = Math.max(8, left) + 'px';
    tip.style.top = (above > 8 ? above : event.clientY + 18) + 'px';
  };
  // A browser's own tips do not come on touch, and would come twice.
  const own = new Map();
  for (const title of document.querySelectorAll('svg title')) {
    own.set(title.parentNode, title.textContent);
    title.remove();
  }
  const named = (target, svg) => {
    for (let node = target; node && node !== svg; node = node.parentNode) if (own.has(node)) return own.get(node);
    return '';
  };
  const curvesOf = (svg) => [...svg.querySelectorAll('polyline[data-name]')].map((line) => ({
    name: line.dataset.name,
    at: [...line.points].map((point) => point.x),
    x: line.dataset.x.split(' '),
    y: line.dataset.y.split(' '),
  }));
  for (const svg of document.querySelectorAll('svg')) {
    let curves = null;
    let cross = null;
    const leave = () => {
      tip.hidden = true;
      if (cross) { cross.remove(); cross = null; }
    };
    svg.addEventListener('pointerleave', leave);
    svg.addEventListener('pointercancel', leave);
    const move = (event) => {
      const text = named(event.target, svg);
      curves = curves || curvesOf(svg);
      if (text || !curves.length) {
        leave();
        if (text) show(text, event);
        return;
      }
      const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      let nearest = null;
      const found = curves.map((curve) => {
        let best = 0;
        curve.at.forEach((at, i) => { if (Math.abs(at - x) < Math.abs(curve.at[best] - x)) best = i; });
        const far = Math.abs(curve.at[best] - x);
        if (!nearest || far < nearest.far) nearest = { far, at: curve.at[best], x: curve.x[best] };
        return { name: curve.name, far, y: curve.y[best] };
      }).filter((one) => one.far < 30);
      if (!cross) {
        cross = document.createElementNS('http://www.w3.org/2000/svg', 'line');
        cross.setAttribute('class', 'cross');
        const box = svg.viewBox.baseVal;
        cross.setAttribute('y1', 8);
        cross.setAttribute('y2', box.height - 46);
        svg.appendChild(cross);
      }
      cross.setAttribute('x1', nearest.at);
      cross.setAttribute('x2', nearest.at);
      const label = svg.querySelector('.x').textContent;
      const shown = Number(nearest.x).toLocaleString('en-US', { maximumSignificantDigits: 7 });
      show([`${label} ${shown}`, ...found.map((one) => `${one.name}: ${one.y}`)].join('\\n'), event);
    };
    svg.addEventListener('pointermove', move);
    svg.addEventListener('pointerdown', move);
  }
})();
"""


DASH = "&ndash;"


def text(value: object) -> str:
    """Text for the page, escaped."""
    return html.escape(str(value))


def number(value: float | None, digits: int = 0) -> str:
    """1,234 or 1,234.56; a dash for None and NaN."""
    return DASH if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A share as percent; a dash for None and NaN."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}%}"


def duration(seconds: float) -> str:
    """48.2s, 12m 5s, 3h 20m, 2d 4h."""
    for unit, size, below, name in ((86400, 3600, "h", "d"), (3600, 60, "m", "h"), (60, 1, "s", "m")):
        if seconds >= unit:
            return f"{int(seconds // unit)}{name} {int(seconds % unit // size)}{below}"
    return f"{seconds:.1f}s"


def length_name(band: str) -> str:
    """A length band of metrics.jsonl, "2048", as text: 1,025 to 2K."""
    return band_name(int(band))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", marked: Sequence[int] = ()) -> str:
    """A table; heads and cells are HTML. marked: rows that stand out. Wide ones scroll on their own."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = []
    for at, row in enumerate(rows):
        mark = ' class="marked"' if at in marked else ""
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        body.append(f'<tr{mark}><th scope="row">{row[0]}</th>{cells}</tr>')
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{named}<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def missing(sentence: str) -> str:
    """What stands where something is left out; the sentence is plain text."""
    return f'<p class="missing">{text(sentence)}</p>'


def note(sentence: str) -> str:
    """A sentence of plain text below a figure or table."""
    return f'<p class="note">{text(sentence)}</p>'


def folded(summary: str, body: str) -> str:
    """Something long that opens on a click; the summary is plain text."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def row(*figures: str) -> str:
    """Figures and tables side by side, below each other where there is no room; empty ones are left out."""
    return f'<div class="row">{"".join(filter(None, figures))}</div>' if any(figures) else ""


def section(name: str, intro: str, *bodies: str) -> str:
    """A section of the page; name and intro are plain text."""
    lead = f"<p>{text(intro)}</p>" if intro else ""
    return f"<section><h3>{text(name)}</h3>{lead}{''.join(bodies)}</section>"


def cards(figures: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: (name, value, what it means), values are HTML."""
    boxes = [
        f'<div class="card"><span>{text(name)}</span><b>{value}</b><small>{text(meaning)}</small></div>'
        for name, value, meaning in figures
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def framed(chart: Chart, remark: str = "") -> str:
    """A bare chart with its title, unit and legend as text around it."""
    unit = f"<small>{text(chart.y_label)}</small>" if chart.y_label else ""
    return (
        f"<figure><figcaption><b>{text(chart.title)}</b> {unit}</figcaption>{legend(chart.names)}"
        f"{chart.svg()}{note(remark) if remark else ''}</figure>"
    )


def legend(names: Iterable[tuple[str, int]]) -> str:
    """What colors stand for: (name, color)."""
    keys = "".join(f'<i><s style="background:var(--c{color % COLORS})"></s>{text(name)}</i>' for name, color in names)
    return f'<div class="legend">{keys}</div>'


RAW = 'stroke-width="1" stroke-opacity="0.32"'
DASHED = 'stroke-width="1.6" stroke-dasharray="5 4"'


@dataclass
class Curve:
    """One curve of a plot: name, values float64 [n] (NaN where there is none), color, and weights for its smoothing."""

    name: str
    y: Floats
    color: int
    weights: Floats | None = None
    x: Floats | None = None


@dataclass
class Plot:
    """A chart of curves over one x axis, raw and smoothed or as they are.

    x: float64 [n] ascending. smoothed: whether the curves are drawn thin as they are and thick as smoothed. zero: y
    starts at 0. log: a logarithmic y. scatter: points of their own instead of the raw line. planned: (name, value,
    color), dashed lines.
    """

    title: str
    unit: str
    x_label: str
    x: Floats
    curves: list[Curve]
    smoothed: bool = True
    zero: bool = False
    log: bool = False
    remark: str = ""
    planned: Sequence[tuple[str, float, int]] = ()
    extra: list[Curve] = field(default_factory=list)
    """Curves of few points, drawn with their points and not smoothed."""

    def figure(self) -> str:
        """The plot as a <figure>, nothing where no curve has a value."""
        curves = [curve for curve in self.curves if np.isfinite(curve.y).any()]
        extra = [curve for curve in self.extra if np.isfinite(curve.y).any()]
        if not curves and not extra:
            return ""
        smoothed = {curve.name: self._smooth(curve) for curve in curves} if self.smoothed else {}
        full = [curve.y for curve in extra] + list(smoothed.values() if smoothed else (curve.y for curve in curves))
        raw = [curve.y for curve in curves] if smoothed else []
        chart = Chart(
            self.title, self.x_label, self.unit, self._x_span([*curves, *extra]), self._y_span(full, raw),
            y_log=self.log, bare=True,
        )  # fmt: skip
        if smoothed:
            for curve in curves:
                chart.curve(self._x_of(curve), curve.y, curve.color % COLORS, look=RAW)
        for curve in curves:
            y = smoothed.get(curve.name, curve.y)
            chart.curve(self._x_of(curve), y, curve.color % COLORS, curve.name)
            chart.name(curve.name, curve.color % COLORS)
        for curve in extra:
            self._draw_extra(chart, curve)
        for name, value, color in filter(lambda line: np.isfinite(line[1]), self.planned):
            chart.curve(np.array(chart.x), np.array([value, value]), color % COLORS, name, DASHED)
            chart.name(name, color % COLORS)
        return framed(chart, self.remark)

    def _draw_extra(self, chart: Chart, curve: Curve) -> None:
        x = self._x_of(curve)
        chart.curve(x, curve.y, curve.color % COLORS, curve.name)
        known = np.flatnonzero(np.isfinite(curve.y))
        if len(known) <= 60:
            for at in known.tolist():
                chart.dot(float(x[at]), float(curve.y[at]), curve.color % COLORS)
        chart.name(curve.name, curve.color % COLORS)

    def _x_of(self, curve: Curve) -> Floats:
        return self.x if curve.x is None else curve.x

    def _smooth(self, curve: Curve) -> Floats:
        weights = np.ones(len(curve.y)) if curve.weights is None else curve.weights
        return smooth(curve.y, weights, window_of(int(np.isfinite(curve.y).sum())))

    def _x_span(self, curves: Sequence[Curve]) -> tuple[float, float]:
        ends = [end for curve in curves for end in (float(self._x_of(curve)[0]), float(self._x_of(curve)[-1]))]
        low, high = min(ends), max(ends)
        room = max(1.0, abs(high) / 1000)
        return (low, high) if high > low else (low - room, high + room)

    def _y_span(self, full: Sequence[Floats], raw: Sequence[Floats]) -> tuple[float, float]:
        """From the lowest to the highest value; single spikes of raw curves are cut at the border."""
        low, high = np.inf, -np.inf
        planned = [np.array([value]) for _, value, _ in self.planned]
        for values, cut in [*((y, (0, 100)) for y in [*full, *planned]), *((y, (0.5, 99.5)) for y in raw)]:
            known = values[np.isfinite(values) & ((values > 0) | (not self.log))]
            if len(known):
                bounds = np.percentile(known, cut if len(known) >= 100 else (0, 100))
                low, high = min(low, float(bounds[0])), max(high, float(bounds[1]))
        if not np.isfinite(low):
            return (0.1, 1.0)
        if self.log:
            return (low / 1.15, high * 1.15)
        if self.zero:
            low = min(low, 0.0)
        room = (high - low) * 0.05 or max(abs(high), 1e-6) * 0.05
        return (low if self.zero and low == 0 else low - room, high + room)


def level_curves(log: StepLog, values: Floats, weights: Floats | None = None) -> list[Curve]:
    """A curve for each combination of levels that steps train, in the color of its level; values: float64 [n]."""
    return [
        Curve(name, np.where(steps, values, np.nan), log.color(name), weights)
        for name, steps in combinations(log).items()
    ]
