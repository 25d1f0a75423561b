"""A document as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from memplan.report.headlines import effects, headline, measured, phases, plans
from memplan.report.moment import by_category, by_line, by_module
from memplan.report.page import chart, page, section, swatch, table
from memplan.report.profiles import short_source
from memplan.report.reading import (
    objects,
    optional,
    plain,
    plan_of,
    required,
    sizes,
    texts,
    trace_views,
)
from memplan.report.svg import frontier_svg, timeline_svg
from memplan.units import format_bytes

Found = Mapping[str, object]

_TITLES = {
    "profile": "A measured training step",
    "estimate": "The estimate of a training step",
    "plan": "The plan of a training step",
    "frontier": "What memory costs in time",
    "comparison": "A training step, original and planned",
}


def html_report(document: Found) -> str:
    """The report of a document: one file, without a script or a style from elsewhere.

    Args:
        document: as a command writes it; it is embedded too.

    Raises:
        UnreadableDocument: if it is not a document of this version.
    """
    found = plain(document)
    title = _TITLES[required(found, "kind", str)]
    body = [
        f"<h1>{title}</h1>",
        f'<p class="sub">{escape(_where(found))}</p>',
        headline(found),
        *_sections(found),
    ]
    return page(f"memplan: {title}", body, json.dumps(found))


def _sections(document: Found) -> list[str]:
    """Those that there is something for, in reading order."""
    kind, plan, traces = document["kind"], plan_of(document), trace_views(document)
    columns = {trace.label: trace.categories for trace in traces}
    sections = [
        _figure(document, plan),
        plans(document) if kind == "frontier" else "",
        measured(document) if kind == "comparison" else phases(document),
        by_category(
            f"At the {'unplanned ' if kind == 'frontier' else ''}peak, by category",
            columns or {_source(document): sizes(document, "categories")},
        ),
        by_module(traces),
        by_line(traces),
        _plan(plan),
        _live(plan),
        _notes(plan or document),
    ]
    return [one for one in sections if one]


def _where(document: Found) -> str:
    """What was measured or assumed, in a line."""
    inner = optional(document, "planned", dict) or {}
    device = optional(document, "device", str) or optional(inner, "device", str)
    version = optional(document, "torch", str)
    first = next(iter(objects(document, "plans")), {})
    costs = optional(plan_of(document) or first, "costs_source", str)
    parts = [
        f"device {device}" if device else "",
        f"torch {version}" if version else "",
        f"costs {costs}" if costs else "",
    ]
    return "; ".join(filter(None, parts))


def _source(document: Found) -> str:
    return "measured" if document["kind"] == "profile" else "predicted"


def _figure(document: Found, plan: Found) -> str:
    if document["kind"] == "frontier":
        return chart(frontier_svg(document))
    traces = objects(document, "traces")
    if not any(trace.times_s for trace in trace_views(document)):
        return ""
    return chart(timeline_svg(traces, optional(plan, "budget_bytes", int)))


def _plan(plan: Found) -> str:
    if not plan:
        return ""
    sizes_of = {
        "budget": "budget_bytes",
        "predicted peak": "peak_bytes",
        "predicted peak, unplanned": "original_peak_bytes",
        "resident": "resident_bytes",
        "smallest possible peak, at least": "floor_bytes",
    }
    found = {name: optional(plan, key, int) for name, key in sizes_of.items()}
    facts = {name: _bytes(nbytes) for name, nbytes in found.items() if nbytes is not None}
    slowdown = optional(plan, "slowdown", float)
    if slowdown is not None:
        facts["predicted time"] = f"{slowdown:.3f}x that of the unplanned step"
    facts["ops run again"] = (
        f"{required(plan, 'num_restores', int)} of {required(plan, 'num_ops', int)}"
    )
    peak = optional(plan, "peak", dict) or {}
    facts["op at the peak"] = optional(peak, "op", str) or "unknown"
    facts["results"] = ", ".join(effects(plan)) or "unknown"
    facts["passes"] = ", ".join(texts(plan, "passes")) or "none"
    facts["costs"] = optional(plan, "costs_source", str) or "unknown"
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return section("The plan", f"<dl>{''.join(rows)}</dl>")


def _live(plan: Found) -> str:
    rows = [
        (
            format_bytes(required(value, "nbytes", int)),
            swatch(required(value, "category", str)),
            *(
                f"<code>{escape(words)}</code>"
                for words in (
                    required(value, "target", str),
                    required(value, "module", str),
                    short_source(required(value, "source", str)),
                )
            ),
        )
        for value in objects(plan, "live")
    ]
    if not rows:
        return ""
    headers = ("bytes", "category", "op", "module", "source line")
    return section("Largest values at the predicted peak", table(headers, rows, frozenset({0})))


def _notes(document: Found) -> str:
    notes = texts(document, "notes")
    if not notes:
        return ""
    return section("Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")


def _bytes(nbytes: int) -> str:
    return f"{format_bytes(nbytes)} ({nbytes:,d} B)"
