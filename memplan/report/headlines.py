"""The key numbers of each kind of document as cards, and its phases."""

from __future__ import annotations

from html import escape

from memplan.report.page import card, section, table
from memplan.report.schema import (
    ComparisonDocument,
    EstimateDocument,
    FrontierDocument,
    PlanDocument,
    ProfileDocument,
    Readable,
)
from memplan.tables import ALARM
from memplan.units import format_bytes

_SAME = (
    ("loss", "loss_equal"),
    ("gradients", "gradients_equal"),
    ("buffers", "buffers_equal"),
    ("updated parameters", "parameters_equal"),
    ("random state", "rng_equal"),
)


def headline(document: Readable) -> str:
    """The cards of a document."""
    if isinstance(document, ComparisonDocument):
        return f'<div class="cards pairs">{"".join(_comparison(document))}</div>'
    cards = _frontier(document) if isinstance(document, FrontierDocument) else _step(document)
    return f'<div class="cards">{"".join(cards)}</div>'


def _step(document: ProfileDocument | EstimateDocument | PlanDocument) -> list[str]:
    peak_bytes, unexplained_bytes = document.peak_bytes, document.unexplained_bytes
    above = f"{format_bytes(peak_bytes - document.resident_bytes)} above it at the peak"
    share = f"{unexplained_bytes / peak_bytes:.1%} of the peak" if peak_bytes else ""
    cards = [
        card("peak memory", format_bytes(peak_bytes), _exactly(peak_bytes)),
        card("resident", format_bytes(document.resident_bytes), above),
        card("unexplained", format_bytes(unexplained_bytes), share),
    ]
    if isinstance(document, ProfileDocument):
        time = _milliseconds(document.step_s)
        cards.append(card("step time", time, "median of the measured steps"))
    if isinstance(document, PlanDocument):
        original = document.original_peak_bytes
        unplanned = f"{format_bytes(original)} unplanned"
        cards += [
            card("of the unplanned peak", _ratio(peak_bytes, original), unplanned),
            card("predicted time", f"{document.slowdown:.3f}x", "of the unplanned step"),
        ]
    return cards


def _comparison(document: ComparisonDocument) -> list[str]:
    both = (document.original, document.planned)
    before, after = (one.peak_bytes for one in both)
    times = " → ".join(_milliseconds(one.step_s) for one in both)
    predicted = document.plan.peak_bytes
    cards = [
        card(
            "peak memory",
            f"{format_bytes(before)} → {format_bytes(after)}",
            f"{_ratio(after, before)}, original to planned",
        ),
        card("step time", times, f"{document.time_ratio:.3f}x, measured"),
        card("results", "same bits" if document.is_exact else ALARM, _differences(document)),
        card(
            "peak, predicted / measured",
            f"{format_bytes(predicted)} / {format_bytes(after)}",
            f"measured - predicted: {after - predicted:+,d} B",
        ),
        card("resident", format_bytes(document.resident_bytes), _exactly(document.resident_bytes)),
    ]
    found = [one.unexplained_bytes for one in document.traces if one.source == "measured"]
    if found:
        words = " → ".join(map(format_bytes, found))
        cards.append(card("unexplained", words, "measured, at the peak"))
    return cards


def _differences(document: ComparisonDocument) -> str:
    if document.is_exact:
        return "loss, gradients and every state"
    different = [name for name, key in _SAME if not getattr(document, key)]
    error = document.max_gradient_error
    largest = "" if error is None else f"; largest gradient error {error:.3g}"
    return f"{', '.join(different)}{largest}"


def _frontier(document: FrontierDocument) -> list[str]:
    smallest = min(document.plans, key=lambda plan: plan.peak_bytes)
    time = f"{smallest.slowdown:.3f}x the time"
    return [
        card("unplanned peak", format_bytes(document.original_peak_bytes), "predicted"),
        card("smallest peak", format_bytes(smallest.peak_bytes), time),
        card("resident", format_bytes(document.resident_bytes), _exactly(document.resident_bytes)),
    ]


def phases(document: ProfileDocument | EstimateDocument | PlanDocument) -> str:
    """The peak in each phase, and its time where measured; empty if there are no phases."""
    took = (
        {phase.name: phase.seconds for phase in document.phases if phase.seconds is not None}
        if isinstance(document, ProfileDocument)
        else {}
    )
    rows = [
        (
            escape(phase.name),
            format_bytes(phase.peak_bytes),
            _milliseconds(took[phase.name]) if phase.name in took else "",
        )
        for phase in document.phases
    ]
    if not rows:
        return ""
    # a prediction of the peaks has no time for each phase
    shown = 3 if took else 2
    headers = ("phase", "peak", "time")[:shown]
    content = table(headers, [row[:shown] for row in rows], frozenset({1, 2}))
    return section("By phase", content)


def _ratio(after: int, before: int) -> str:
    return f"{after / before:.3f}x" if before else ""


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _exactly(nbytes: int) -> str:
    return f"{nbytes:,d} B"
