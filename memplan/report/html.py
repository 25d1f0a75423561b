"""A document as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from memplan.report.headlines import headline, phases
from memplan.report.moment import by_category, by_line, by_module
from memplan.report.page import chart, page, section, shown, swatch, table
from memplan.report.schema import (
    ComparisonDocument,
    EstimateDocument,
    FrontierDocument,
    Live,
    PlanBody,
    ProfileDocument,
    Readable,
    encode,
    kind_of,
    plan_of,
)
from memplan.report.step_tables import short_source
from memplan.report.svg import frontier_svg, timeline_svg
from memplan.report.tables import comparison_table, frontier_table
from memplan.units import format_bytes

_TITLES = {
    "profile": "A measured training step",
    "estimate": "The estimate of a training step",
    "plan": "The plan of a training step",
    "frontier": "What memory costs in time",
    "comparison": "A training step, original and planned",
}


def html_report(document: Readable) -> str:
    """The report of a document: one file, with no external script or style.

    Args:
        document: a document as a command writes it; it is embedded too.
    """
    title = _TITLES[kind_of(document)]
    body = [
        f"<h1>{title}</h1>",
        f'<p class="sub">{escape(_where(document))}</p>',
        headline(document),
        *filter(None, _sections(document)),
    ]
    return page(f"memplan: {title}", body, encode(document))


def _sections(document: Readable) -> list[str]:
    """Sections in reading order; empty strings where there is nothing to show."""
    plan = plan_of(document)
    after = [] if plan is None else [_plan(plan), _live(plan.live), _notes(plan.notes)]
    if isinstance(document, FrontierDocument):
        peak = by_category("At the unplanned peak, by category", {"predicted": document.categories})
        return [
            chart(frontier_svg(document)),
            section("Plans", shown(frontier_table(document))),
            peak,
        ]
    traces = document.traces
    source = "measured" if isinstance(document, ProfileDocument) else "predicted"
    columns = {trace.label: trace.categories for trace in traces}
    return [
        _timeline(document, plan),
        section("Measured", shown(comparison_table(document)))
        if isinstance(document, ComparisonDocument)
        else phases(document),
        by_category("At the peak, by category", columns or {source: document.categories}),
        by_module(traces),
        by_line(traces),
        *after,
    ]


def _where(document: Readable) -> str:
    """One line on what was measured or assumed."""
    if isinstance(document, ProfileDocument | EstimateDocument):
        return f"device {document.device}; torch {document.torch}"
    if isinstance(document, ComparisonDocument):
        return f"device {document.planned.device}; costs {document.plan.costs_source}"
    plan = document.plans[0] if isinstance(document, FrontierDocument) else document
    return f"costs {plan.costs_source}"


def _timeline(document: Readable, plan: PlanBody | None) -> str:
    if isinstance(document, FrontierDocument) or not any(one.times_s for one in document.traces):
        return ""
    return chart(timeline_svg(document.traces, None if plan is None else plan.budget_bytes))


def _plan(plan: PlanBody) -> str:
    sizes = {
        "budget": plan.budget_bytes,
        "predicted peak": plan.peak_bytes,
        "predicted peak, unplanned": plan.original_peak_bytes,
        "resident": plan.resident_bytes,
        "smallest possible peak, at least": plan.floor_bytes,
    }
    facts = {name: _bytes(nbytes) for name, nbytes in sizes.items() if nbytes is not None}
    facts |= {
        "predicted time": f"{plan.slowdown:.3f}x that of the unplanned step",
        "ops run again": f"{plan.num_restores} of {plan.num_ops}",
        "op at the peak": plan.peak.op or "unknown",
        "results": ", ".join(plan.effects),
        "passes": ", ".join(plan.passes) or "none",
        "costs": plan.costs_source,
    }
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return section("The plan", f"<dl>{''.join(rows)}</dl>")


def _live(values: Sequence[Live]) -> str:
    rows = [
        (
            format_bytes(value.nbytes),
            swatch(value.category),
            *(
                f"<code>{escape(words)}</code>"
                for words in (value.target, value.module, short_source(value.source))
            ),
        )
        for value in values
    ]
    if not rows:
        return ""
    headers = ("bytes", "category", "op", "module", "source line")
    return section("Largest values at the predicted peak", table(headers, rows, frozenset({0})))


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return section("Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")


def _bytes(nbytes: int) -> str:
    return f"{format_bytes(nbytes)} ({nbytes:,d} B)"
