"""The numbers that matter of each kind of document, as cards, and the table below them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from memplan.report.page import card, marked, section, table
from memplan.report.reading import objects, optional, required
from memplan.tables import ALARM
from memplan.units import format_bytes

Found = Mapping[str, object]

_SAME = (
    ("loss", "loss_equal"),
    ("gradients", "gradients_equal"),
    ("buffers", "buffers_equal"),
    ("updated parameters", "parameters_equal"),
    ("random state", "rng_equal"),
)


def headline(document: Found) -> str:
    """The cards of a document."""
    kind = required(document, "kind", str)
    if kind == "comparison":
        cards = _comparison(document)
    elif kind == "frontier":
        cards = _frontier(document)
    else:
        cards = [*_peaks(document), *_predicted(document)]
    css = "cards pairs" if kind == "comparison" else "cards"
    return f'<div class="{css}">{"".join(cards)}</div>'


def _peaks(document: Found) -> list[str]:
    peak_bytes = required(document, "peak_bytes", int)
    resident_bytes = optional(document, "resident_bytes", int)
    cards = [card("peak memory", format_bytes(peak_bytes), _exactly(peak_bytes))]
    if resident_bytes is not None:
        above = f"{format_bytes(peak_bytes - resident_bytes)} above it at the peak"
        cards.append(card("resident", format_bytes(resident_bytes), above))
    unexplained_bytes = optional(document, "unexplained_bytes", int)
    if unexplained_bytes is not None:
        share = f"{unexplained_bytes / peak_bytes:.1%} of the peak" if peak_bytes else ""
        cards.append(card("unexplained", format_bytes(unexplained_bytes), share))
    step_s = optional(document, "step_s", float)
    if step_s is not None:
        cards.append(card("step time", _milliseconds(step_s), "median of the measured steps"))
    return cards


def _predicted(document: Found) -> list[str]:
    """What a plan says of itself; nothing of what is not planned."""
    cards = []
    original = optional(document, "original_peak_bytes", int)
    if original is not None:
        ratio = _ratio(required(document, "peak_bytes", int), original)
        cards.append(card("of the unplanned peak", ratio, f"{format_bytes(original)} unplanned"))
    slowdown = optional(document, "slowdown", float)
    if slowdown is not None:
        cards.append(card("predicted time", f"{slowdown:.3f}x", "of the unplanned step"))
    return cards


def _comparison(document: Found) -> list[str]:
    both = [required(document, name, dict) for name in ("original", "planned")]
    before, after = (required(one, "peak_bytes", int) for one in both)
    times = [required(one, "step_s", float) for one in both]
    ratio = required(document, "time_ratio", float)
    plan = optional(document, "plan", dict) or {}
    cards = [
        card(
            "peak memory",
            f"{format_bytes(before)} → {format_bytes(after)}",
            f"{_ratio(after, before)}, original to planned",
        ),
        card("step time", " → ".join(map(_milliseconds, times)), f"{ratio:.3f}x, measured"),
        card("results", _results(document), _differences(document)),
    ]
    predicted = optional(plan, "peak_bytes", int)
    if predicted is not None:
        words = f"{format_bytes(predicted)} / {format_bytes(after)}"
        error = f"measured - predicted: {after - predicted:+,d} B"
        cards.append(card("peak, predicted / measured", words, error))
    resident_bytes = required(document, "resident_bytes", int)
    cards.append(card("resident", format_bytes(resident_bytes), _exactly(resident_bytes)))
    measured_traces = [one for one in objects(document, "traces") if one["source"] == "measured"]
    if measured_traces:
        found = [required(one, "unexplained_bytes", int) for one in measured_traces]
        words = " → ".join(map(format_bytes, found))
        cards.append(card("unexplained", words, "measured, at the peak"))
    return cards


def _results(document: Found) -> str:
    return "same bits" if required(document, "is_exact", bool) else ALARM


def _differences(document: Found) -> str:
    if required(document, "is_exact", bool):
        return "loss, gradients and every state"
    different = [name for name, key in _SAME if document.get(key) is False]
    error = optional(document, "max_gradient_error", float)
    largest = "" if error is None else f"; largest gradient error {error:.3g}"
    return f"{', '.join(different)}{largest}"


def _frontier(document: Found) -> list[str]:
    plans = objects(document, "plans")
    unplanned = optional(document, "original_peak_bytes", int)
    cards = []
    if unplanned is not None:
        cards.append(card("unplanned peak", format_bytes(unplanned), "predicted"))
    if plans:
        smallest = min(plans, key=lambda plan: required(plan, "peak_bytes", int))
        nbytes = required(smallest, "peak_bytes", int)
        time = f"{required(smallest, 'slowdown', float):.3f}x the time"
        cards.append(card("smallest peak", format_bytes(nbytes), time))
    resident_bytes = optional(document, "resident_bytes", int)
    if resident_bytes is not None:
        cards.append(card("resident", format_bytes(resident_bytes), _exactly(resident_bytes)))
    return cards


def phases(document: Found) -> str:
    """The most bytes in each phase, and its time where it was measured; empty if unknown."""
    rows = [
        (
            escape(required(phase, "name", str)),
            format_bytes(required(phase, "peak_bytes", int)),
            "" if (took := optional(phase, "seconds", float)) is None else _milliseconds(took),
        )
        for phase in objects(document, "phases")
    ]
    if not rows:
        return ""
    # a prediction of the peaks does not say how long each phase takes
    shown = 3 if any(time for _, _, time in rows) else 2
    headers = ("phase", "peak", "time")[:shown]
    content = table(headers, [row[:shown] for row in rows], frozenset({1, 2}))
    return section("By phase", content)


def measured(document: Found) -> str:
    """Both measured steps side by side, and whether their results are the same."""
    both = [required(document, name, dict) for name in ("original", "planned")]
    rows: list[tuple[str, ...]] = [
        _bytes_row(name, *(optional(one, key, int) for one in both))
        for name, key in (
            ("peak memory", "peak_bytes"),
            ("resident", "resident_bytes"),
            ("reserved by the allocator", "reserved_bytes"),
            ("of the process on the device", "process_bytes"),
            ("of the process on the host", "host_bytes"),
        )
    ]
    peaks = [_phase_peaks(one) for one in both]
    rows += [_bytes_row(f"peak in {name}", peaks[0].get(name), peaks[1][name]) for name in peaks[1]]
    times = [required(one, "step_s", float) for one in both]
    ratio = f"{required(document, 'time_ratio', float):.3f}x"
    rows.append(("step time", *map(_milliseconds, times), ratio))
    for name, key in _SAME:
        is_same = optional(document, key, bool)
        # parameters that no optimizer updated prove nothing
        if is_same is not None and (key != "parameters_equal" or "optimizer" in peaks[1]):
            rows.append((name, "", "", marked("same bits" if is_same else ALARM)))
    headers = ("", "original", "planned", "planned / original")
    shown = [row for row in rows if any(row[1:])]
    return section("Measured", table(headers, shown, frozenset({1, 2, 3})))


def plans(document: Found) -> str:
    """The plans of a frontier."""
    rows = [
        (
            format_bytes(required(plan, "peak_bytes", int)),
            f"{required(plan, 'slowdown', float):.3f}x",
            f"{optional(plan, 'num_restores', int) or 0} of {optional(plan, 'num_ops', int) or 0}",
            escape(", ".join(effects(plan))),
        )
        for plan in objects(document, "plans")
    ]
    headers = ("peak", "predicted time", "ops run again", "results")
    return section("Plans", table(headers, rows, frozenset({0, 1, 2})))


def effects(plan: Found) -> list[str]:
    """What a plan does to the results."""
    return [str(one) for one in optional(plan, "effects", list) or []]


def _phase_peaks(profile: Found) -> dict[str, int]:
    return {
        required(one, "name", str): required(one, "peak_bytes", int)
        for one in objects(profile, "phases")
    }


def _bytes_row(name: str, before: int | None, after: int | None) -> tuple[str, str, str, str]:
    cells = ["" if nbytes is None else format_bytes(nbytes) for nbytes in (before, after)]
    ratio = _ratio(after, before) if before is not None and after is not None else ""
    return (escape(name), cells[0], cells[1], ratio)


def _ratio(after: int, before: int) -> str:
    return f"{after / before:.3f}x" if before else ""


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _exactly(nbytes: int) -> str:
    return f"{nbytes:,d} B"
