"""The page: one self-contained HTML file for one run or several.

Owns its skeleton and the order of its sections. The page loads nothing: its policy forbids every request, and every
script but its own, so that no text from a run can become one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import numpy as np

from hbp_titan.packing.svg import PALETTE
from hbp_titan.report.balance_part import plan_section, ranks_section
from hbp_titan.report.comparison_part import comparison
from hbp_titan.report.header_part import header
from hbp_titan.report.learning_part import expert_section, groups_section, loss_section, validation_section
from hbp_titan.report.look import SCRIPT, STYLE
from hbp_titan.report.parts import text
from hbp_titan.report.run_folder import Run
from hbp_titan.report.speed_part import memory_section, speed_section
from hbp_titan.report.timeline import timeline_section


def report_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML."""
    # A share of nothing is NaN, which is shown as not there.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _page(runs)


def _page(runs: Sequence[Run]) -> str:
    title = "Run report: " + ", ".join(run.name for run in runs)
    body = [f'<article id="run-{number}">{_run(run)}</article>' for number, run in enumerate(runs)]
    if len(runs) > 1:
        links = "".join(f'<a href="#run-{number}">{text(run.name)}</a>' for number, run in enumerate(runs))
        body.insert(0, f"<h1>{len(runs)} runs</h1><nav>{links}</nav>{comparison(runs)}")
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{text(title)}</title><style>{PALETTE}{STYLE}</style></head><body><main>'
        f'{"".join(body)}</main><div id="tip" role="status" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def _run(run: Run) -> str:
    if not len(run.log):
        return header(run) + plan_section(run)
    sections = (
        timeline_section,
        loss_section,
        groups_section,
        validation_section,
        speed_section,
        ranks_section,
        plan_section,
        memory_section,
        expert_section,
    )
    return header(run) + "".join(of(run) for of in sections)
