"""Report section on what a run gained: held-out loss before and after, and its plan next to the baselines' plans.

Owns the choice of these figures; summary.py prints the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hbp_titan.packing.metrics import bucket_name
from hbp_titan.report.charts import Chart
from hbp_titan.report.html import bar_table, caption, figure, missing, note, row, section, terms
from hbp_titan.report.methods import Compared, meaning_of
from hbp_titan.report.run import Run, StepLog
from hbp_titan.report.series import bands_in_order, last
from hbp_titan.report.timeline import timeline_figure

METRICS = {
    "padding": "PR, padding ratio: share of computed positions without a token.",
    "idle share": "Share of the ranks' time that they wait for the slowest one of a micro-batch, by the cost model.",
    "shared": "CR, communication ratio: share of the tokens in packs that several ranks share (context parallelism, "
    "cp). Their attention exchanges data between ranks.",
    "micro-batches": "Forward and backward passes of an epoch: in each, every rank works on one pack.",
}
MAX_ROWS = 16
COLOR = 3
"""Not one of the first colors, which stand for levels."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss of a group of samples, in nats per token. group: all, level, length or source.

    before: of the initial weights, None if they were not evaluated. tokens: those with a loss.
    """

    group: str
    name: str
    before: float | None
    after: float
    tokens: float

    @property
    def change(self) -> float | None:
        """After minus before."""
        return None if self.before is None else self.after - self.before


def held_out(log: StepLog) -> list[HeldOut]:
    """Return the first and the last validation of all samples, each level, each length band and each source."""
    keys: list[tuple[str, str, tuple[str, ...]]] = [("all", "all samples", ())]
    keys += [("level", name, ("by_level", name)) for name in log.names("validation", "by_level")]
    bands = bands_in_order(log.names("validation", "by_length"))
    keys += [("length", bucket_name(int(band)), ("by_length", band)) for band in bands]
    keys += [("source", name, ("by_source", name)) for name in log.names("validation", "by_source")]
    found = []
    for group, name, key in keys:
        after = last(log.column("validation", *key, "loss"))
        if after is not None:
            before = last(log.column("validation_at_start", *key, "loss"))
            tokens = last(log.column("validation", *key, "trained_tokens"))
            found.append(HeldOut(group, name, before, after, tokens or 0.0))
    return found


def fell(quantity: str, before: float, after: float, digits: int = 2) -> str:
    """Return the change as a sentence: "Loss fell from 8.34 to 5.95"."""
    first, final = f"{before:.{digits}f}", f"{after:.{digits}f}"
    if first == final:
        return f"{quantity} stayed at {final}"
    return f"{quantity} {'fell' if after < before else 'rose'} from {first} to {final}"


def gains_section(run: Run) -> str:
    """Return the section on held-out loss before and after, and on the plan next to the baselines."""
    groups = [of for of in held_out(run.log) if of.group != "source"]
    compared = run.compared()
    if not groups and not compared:
        return ""
    return section(
        "What the run gained",
        "",
        row(_held_out_figure(groups), methods_figure(compared) if compared else ""),
        timeline_figure(compared[0].plan) if compared else "",
    )


def _held_out_figure(groups: Sequence[HeldOut]) -> str:
    """Return a row per group with the loss of the initial and of the final weights."""
    if not groups:
        return missing("No held-out loss: [validation] enable evaluates samples that are not trained.")
    shown = groups[:MAX_ROWS]
    losses = [loss for of in shown for loss in (of.before, of.after) if loss is not None]
    margin = 0.06 * (max(losses) - min(losses)) or 0.1
    span = (min(losses) - margin, max(losses) + margin)
    unit = "nats per token; hollow: before step 1, filled: after the last step"
    chart = Chart("Held-out loss", "nats per token, lower is better", unit, span, (0.0, float(len(shown))), bare=True)
    chart.left = 118
    chart.y_ticks = [(len(shown) - at - 0.5, of.name) for at, of in enumerate(shown)]
    for at, of in enumerate(shown):
        y = len(shown) - at - 0.5
        if of.before is not None:
            low, high = sorted((of.before, of.after))
            chart.bar(low, high, y - 0.05, y + 0.05, COLOR, opacity=0.45)
            chart.dot(of.before, y, COLOR, f"{of.name}: {of.before:.4f} before step 1", 5, hollow=True)
        chart.dot(of.after, y, COLOR, f"{of.name}: {of.after:.4f} after the last step, {of.tokens:,.0f} tokens", 5)
    whole = groups[0]
    if whole.before is None:
        chart.message = f"Held-out loss is {whole.after:.2f} at the end"
        remark = "The initial weights were not evaluated (validation.at_start)."
    else:
        chart.message = fell("Held-out loss", whole.before, whole.after)
        remark = "Of all samples, by the level that packs them, and by their tokens."
    return figure(chart, remark)


def methods_figure(compared: Sequence[Compared]) -> str:
    """Return a table with bars of the plan and of the baselines on the same samples, and what the words mean."""
    rows = []
    for of in compared:
        m = of.metrics
        rows.append((of.label, [m.pr, m.time_imbalance, m.cr], [f"{m.iterations:,}"]))
    meanings = {**{of.label: meaning_of(of.plan.method) for of in compared}, **METRICS}
    unit = "this plan and baselines on the same samples; of the shares less is better"
    return (
        f"<figure>{caption(methods_message(compared), unit)}"
        f"{bar_table(['method', *METRICS], rows)}"
        f"{note('Counted from the plans, idle share by the cost model. Bars compare the methods within a column.')}"
        f"{terms('What the methods and columns are', meanings)}</figure>"
    )


def methods_message(compared: Sequence[Compared]) -> str:
    """Return the largest gain of the plan over the last baseline as a sentence."""
    own, other = compared[0].metrics, compared[-1].metrics
    gains = {
        "Ranks wait {} of the time": (own.time_imbalance, other.time_imbalance),
        "{} of the tokens need context parallelism": (own.cr, other.cr),
        "{} of the positions are padding": (own.pr, other.pr),
    }
    sentence, (mine, theirs) = max(gains.items(), key=lambda item: item[1][1] - item[1][0])
    return f"{sentence.format(f'{mine:.1%}')}, with {compared[-1].label} {theirs:.1%}"
