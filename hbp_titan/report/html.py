"""HTML of the report page: style sheet, script, and blocks such as tables, cards and figures.

Owns the escaping: text from a run (names of sources, levels, folders) reaches the page only through `text` or a chart,
and both escape it. The script shows the values below the pointer; without it the page lacks only these, and tables have
them too.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbp_titan.report.charts import Chart

NUM_COLORS = 8
"""Colors --c0 to --c7 of PALETTE."""
_LIGHT = """color-scheme: light dark; --ink: #1c2430; --soft: #566070; --grid: #e3e7ed; --paper: #ffffff;
  --panel: #f7f9fb; --back: var(--paper); --shade: #1c243038; --wait: #f3cbc5; --c0: #123f9e; --c1: #e0560b;
  --c2: #279071; --c3: #702483; --c4: #8862ee; --c5: #5c4a2e; --c6: #2a71b7; --c7: #e34371;"""
_DARK = """--ink: #e6eaf0; --soft: #9aa5b4; --grid: #2c3440; --paper: #12161c; --panel: #1a2029;
  --shade: #000000b0; --wait: #6b3735;
  --c0: #789eed; --c1: #eab14e; --c2: #4be0ae; --c3: #f777ad; --c4: #9a78f5; --c5: #e0c493; --c6: #93d9e2;
  --c7: #f96488;"""
# Chosen by the distance between any two colors as people with protanopia, deuteranopia and tritanopia perceive them
# (CIELAB distance of at least 27 between the first three, 10 between the first five), and by contrast to the panel:
# at least 3.5 for colors, 5.9 for text.
PALETTE = f""":root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
"""
"""Colors of a page as CSS variables, light and dark."""
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
.cards { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 10px; margin: 14px 0; }
.card:last-child { grid-column-end: span var(--rest); }
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
figure { --back: var(--panel); margin: 0; background: var(--panel); border: 1px solid var(--grid); border-radius: 10px;
  padding: 12px 14px 8px; min-width: 0; }
figcaption { font-size: 14px; } figcaption small { display: block; color: var(--soft); font-size: 12.5px; }
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
.lane.tall { height: 64px; } figure > .lane { background: none; border-radius: 0; }
.panel { margin: 10px 0 3px; font-size: 13px; } .lane line { vector-effect: non-scaling-stroke; stroke-width: 2; }
.axis { position: relative; height: 16px; font-size: 11px; color: var(--soft); font-variant-numeric: tabular-nums; }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis .end { right: 0; transform: none; }
/* Shadows at the ends of a table that scrolls; covers that scroll along hide them where the table ends. */
.scroll { overflow-x: auto; margin: 12px 0; max-width: 100%; background:
  linear-gradient(to right, var(--back) 40%, transparent) 0 0 / 48px 100% no-repeat local,
  linear-gradient(to left, var(--back) 40%, transparent) 100% 0 / 48px 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) 0 0 / 16px 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / 16px 100% no-repeat scroll; }
.row .scroll { margin: 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; white-space: nowrap; }
caption { text-align: left; font-weight: 600; padding: 0 0 4px; }
th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid var(--grid); font-weight: 400; }
thead th { color: var(--soft); font-size: 12px; vertical-align: bottom; }
tbody th { max-width: 340px; overflow: hidden; text-overflow: ellipsis; }
th:first-child { text-align: left; } .marked th, .marked td { font-weight: 600; }
th:last-child, td:last-child { padding-right: 4px; }
td small { color: var(--soft); }
.bars { width: 100%; } .bars td { width: 22%; }
.bar { display: block; height: 6px; margin: 2px 0 3px auto; border-radius: 3px; background: var(--soft); }
.marked .bar { background: var(--c3); }
.terms { max-width: 84ch; margin: 8px 0; font-size: 13.5px; } .terms dt { font-weight: 600; }
.terms dd { margin: 0 0 6px; color: var(--soft); }
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
@media (max-width: 900px) {
  .cards { grid-template-columns: 1fr 1fr; } .card:last-child { grid-column-end: auto; }
  .card:last-child:nth-child(odd) { grid-column-end: span 2; }
}
@media (max-width: 600px) {
  main { padding: 18px 14px 48px; } .chart { font-size: 15px; } figure { padding: 10px 10px 6px; }
  .facts dt { flex-basis: 92px; }
  /* The names stay while the figures scroll. */
  .scroll th:first-child { position: sticky; left: 0; background: var(--back); max-width: 132px; white-space: normal; }
  .lanes { grid-template-columns: 1fr; gap: 2px; } .lanes .legend { margin: 0; }
.lanes .name { text-align: left; margin-top: 6px; }
  .axis span:nth-child(even) { display: none; }
}
@media print {
  :root { LIGHT color-scheme: light; --ink: #000; --soft: #444; --grid: #ccc; --panel: #fff; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11px; } main { max-width: none; padding: 0; } nav, #tip { display: none; }
  .row { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; }
  table { white-space: normal; font-size: 10px; }
  figure, table, .card { break-inside: avoid; } h3 { break-after: avoid; } article { break-before: auto; }
}
""".replace("LIGHT", _LIGHT)

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
  // The browser's own tooltips do not show on touch, and would show twice elsewhere.
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
LEAST_FULL_BAR = 0.05
"""Share whose bar may fill its column: a long bar for a share of nothing would exaggerate it."""


def text(value: object) -> str:
    """Return `value` as escaped text."""
    return html.escape(str(value))


def number(value: float | None, digits: int = 0) -> str:
    """Return 1,234 or 1,234.56, and a dash for None and NaN."""
    return DASH if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share as percent, and a dash for None and NaN."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}%}"


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", marked: Sequence[int] = (), limit: int = 0
) -> str:
    """Return a table that scrolls if it is wide; heads and cells are HTML.

    marked: rows in bold. limit: rows to show; further ones open on a click [0: all].
    """
    if limit and len(rows) > limit:
        more = details(f"{len(rows) - limit:,} more", table(heads, rows[limit:]))
        return table(heads, rows[:limit], caption, marked) + more
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = []
    for index, row in enumerate(rows):
        mark = ' class="marked"' if index in marked else ""
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        body.append(f'<tr{mark}><th scope="row">{row[0]}</th>{cells}</tr>')
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{named}<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def missing(sentence: str) -> str:
    """Return a note in place of something that the run has not recorded; the sentence is plain text."""
    return f'<p class="missing">{text(sentence)}</p>'


def note(sentence: str) -> str:
    """Return a sentence of plain text below a figure or table."""
    return f'<p class="note">{text(sentence)}</p>'


def details(summary: str, body: str) -> str:
    """Return a body that opens on a click; the summary is plain text."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def row(*figures: str) -> str:
    """Return figures and tables side by side, on a narrow screen below each other; empty ones are skipped."""
    return f'<div class="row">{"".join(filter(None, figures))}</div>' if any(figures) else ""


def section(name: str, intro: str, *bodies: str) -> str:
    """Return a section of the page; name and intro are plain text."""
    lead = f"<p>{text(intro)}</p>" if intro else ""
    return f"<section><h3>{text(name)}</h3>{lead}{''.join(bodies)}</section>"


def cards(figures: Sequence[tuple[str, str, str]]) -> str:
    """Return key figures: (name, value, explanation), values are HTML. The rows are full: the last card fills up."""
    columns = min((6, 5, 4), key=lambda count: -len(figures) % count) if len(figures) > 6 else max(1, len(figures))
    boxes = [
        f'<div class="card"><span>{text(name)}</span><b>{value}</b><small>{text(meaning)}</small></div>'
        for name, value, meaning in figures
    ]
    style = f"--columns: {columns}; --rest: {1 + -len(figures) % columns}"
    return f'<div class="cards" style="{style}">{"".join(boxes)}</div>'


def figure(chart: Chart, remark: str = "") -> str:
    """Return a bare chart with its message or title, its unit and its legend as text around it."""
    unit = ", ".join(filter(None, [chart.title if chart.message else "", chart.y_label]))
    return (
        f"<figure>{caption(chart.message or chart.title, unit)}{legend(chart.names)}"
        f"{chart.svg()}{note(remark) if remark else ''}</figure>"
    )


def caption(message: str, unit: str = "") -> str:
    """Return the caption of a figure: what it shows, as a sentence with its figures, then the quantity and its unit."""
    small = f" <small>{text(unit)}</small>" if unit else ""
    return f"<figcaption><b>{text(message)}</b>{small}</figcaption>"


def bar_table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float], Sequence[str]]]) -> str:
    """Return a table with a bar below each share; the first row stands out.

    rows: (name, shares, 0 to 1, with a bar each, further cells). heads are HTML. A bar is as long as its share is of
    the column's largest, or of LEAST_FULL_BAR if all are smaller.
    """
    tops = [max(LEAST_FULL_BAR, *column) for column in zip(*(shares for _, shares, _ in rows), strict=True)]
    shown = []
    for name, shares, further in rows:
        cells = [
            f'{percent(share)}<s class="bar" style="width:{100 * share / top:.1f}%"></s>'
            for share, top in zip(shares, tops, strict=True)
        ]
        shown.append([text(name), *cells, *further])
    return table(heads, shown, marked=[0]).replace("<table>", '<table class="bars">', 1)


def terms(summary: str, meanings: Mapping[str, str]) -> str:
    """Return a list of terms and what they mean, which opens on a click."""
    parts = "".join(f"<dt>{text(term)}</dt><dd>{text(meaning)}</dd>" for term, meaning in meanings.items())
    return details(summary, f'<dl class="terms">{parts}</dl>')


def document(title: str, body: str, script: str = "") -> str:
    """Return the whole page. Its content security policy forbids every request and every other script."""
    # Even text of a run that was not escaped could not run as a script.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline'{allowed}"
    tip = f'<div id="tip" role="status" hidden></div><script>{script}</script>' if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{text(title)}</title><style>{PALETTE}{STYLE}</style></head><body><main>'
        f"{body}</main>{tip}</body></html>\n"
    )


def legend(names: Iterable[tuple[str, int | str]]) -> str:
    """Return the legend of (name, color) pairs; a color is a number or the name of a CSS variable."""
    variables = [(name, color if isinstance(color, str) else f"c{color % NUM_COLORS}") for name, color in names]
    keys = "".join(f'<i><s style="background:var(--{color})"></s>{text(name)}</i>' for name, color in variables)
    return f'<div class="legend">{keys}</div>' if keys else ""
