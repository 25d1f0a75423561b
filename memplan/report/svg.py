"""Figures as SVG: memory over a step, and memory against time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import add

from memplan.ir.memory_trace import CATEGORIES
from memplan.report.axes import (
    Frame,
    area_colour,
    axes,
    figure,
    legend,
    line,
    steps,
    text,
)
from memplan.report.panels import (
    Panel,
    memory_unit,
    panels,
    peak_label,
    phase_spans,
    scaled_times,
    time_unit,
)
from memplan.report.schema import FrontierDocument, Trace
from memplan.units import format_bytes

_WIDTH = 960.0
_LEFT, _RIGHT = 74.0, 20.0
_HEADROOM = 1.15
"""Factor that leaves room for the label above the highest peak."""

TIMELINE_TITLE = "Memory over one training step"
FRONTIER_TITLE = "What memory costs in time"


def timeline_svg(traces: Sequence[Trace], budget_bytes: int | None = None) -> str:
    """Bytes by category over the step: one panel per trace, all with the same memory axis.

    Args:
        traces: the traces of a document.
        budget_bytes: drawn as a line unless it is far above the peaks.

    Raises:
        UnreadableDocument: if there is nothing to draw.
    """
    shown = panels(traces)
    top_bytes = round(max(panel.peak_bytes for panel in shown) * _HEADROOM)
    budget = budget_bytes if budget_bytes is not None and budget_bytes <= top_bytes else None
    parts, y = legend(_entries(shown, budget), 40, _WIDTH)
    height = 300 if len(shown) == 1 else 230
    for panel in shown:
        frame = Frame(
            _LEFT,
            y + 44,
            _WIDTH - _LEFT - _RIGHT,
            height,
            (0.0, panel.trace.times_s[-1]),
            (0.0, top_bytes),
        )
        parts += _panel(panel, frame, budget)
        y = frame.bottom + 50
    peaks = "; ".join(f"{panel.title}: {peak_label(panel.trace)}" for panel in shown)
    return figure(_WIDTH, y, TIMELINE_TITLE, peaks, parts)


def _entries(shown: Sequence[Panel], budget_bytes: int | None) -> list[tuple[str, str]]:
    present = {name for panel in shown for name in panel.trace.series}
    entries: list[tuple[str, str]] = [
        (f'<rect width="14" height="10" rx="2" {area_colour(name)}/>', name)
        for name in CATEGORIES
        if name in present
    ]
    for panel in shown:
        if panel.predicted is not None:
            name = f"predicted total, {peak_label(panel.predicted)}"
            entries.append((line(0, 5, 14, 5, "predicted"), name))
    if budget_bytes is not None:
        entries.append((line(0, 5, 14, 5, "bound"), f"budget {format_bytes(budget_bytes)}"))
    return entries


def _panel(panel: Panel, frame: Frame, budget_bytes: int | None) -> list[str]:
    unit, unit_bytes = memory_unit(round(frame.y_range[1]))
    time, unit_s = time_unit(frame.x_range[1])
    names = (f"{panel.time_label}, {time}", f"memory, {unit}")
    parts = [
        f'<g class="panel" data-trace="{panel.number}" data-left="{frame.left:g}" '
        f'data-width="{frame.width:g}" data-seconds="{frame.x_range[1]!r}">',
        text(16, frame.top - 26, panel.title, "panel-title"),
        *_stack(panel, frame),
        *axes(frame, *names, (unit_s, unit_bytes)),
        *_phases(panel, frame),
    ]
    if budget_bytes is not None:
        y = frame.y(budget_bytes)
        parts.append(line(frame.left, y, frame.right, y, "bound"))
    if panel.predicted is not None:
        times_s = scaled_times(panel.predicted, panel.trace)
        path = steps(frame, times_s, panel.predicted.totals)
        parts.append(f'<path d="{path}" class="predicted"/>')
    parts += _peak(panel, frame)
    area = f'x="{frame.left:g}" y="{frame.top:g}" width="{frame.width:g}" height="{frame.height:g}"'
    parts.append(line(frame.left, frame.top, frame.left, frame.bottom, "cursor axis"))
    return [*parts, f'<rect {area} class="sensor" fill="none" pointer-events="all"/>', "</g>"]


def _stack(panel: Panel, frame: Frame) -> list[str]:
    """Stacked areas: each reaches down to zero, and those below it are drawn over it."""
    series = panel.trace.series
    tops = accumulate(series.values(), lambda below, own: [*map(add, below, own)])
    areas = []
    for name, top in zip(series, tops, strict=True):
        path = steps(frame, panel.trace.times_s, top)
        down = f"V{frame.bottom:.1f}H{frame.x(panel.trace.times_s[0]):.1f}Z"
        areas.append(f'<path d="{path}{down}" {area_colour(name)}/>')
    return ['<g class="stack">', *reversed(areas), "</g>"]


def _phases(panel: Panel, frame: Frame) -> list[str]:
    parts = []
    for phase, start, end in phase_spans(panel.trace):
        left, right = frame.x(start), frame.x(end)
        if start > 0:
            parts.append(line(left, frame.top - 14, left, frame.bottom, "boundary"))
        # where phases alternate quickly, their names would overlap
        if right - left > 8 * len(phase):
            parts.append(text(left + 5, frame.top - 5, phase, "phase"))
    return parts


def _peak(panel: Panel, frame: Frame) -> list[str]:
    totals = panel.trace.totals
    event = max(range(len(totals)), key=totals.__getitem__)
    x, y = frame.x(panel.trace.times_s[event]), frame.y(totals[event])
    anchor, shift = ("end", -8) if x > (frame.left + frame.right) / 2 else ("start", 8)
    return [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="dot"/>',
        text(x + shift, y - 8, peak_label(panel.trace), "note", anchor),
    ]


def frontier_svg(document: FrontierDocument) -> str:
    """Predicted time against peak memory, one point per plan.

    Between two plans the one of smaller peak is the best known, hence the steps.
    """
    points = frontier_points(document)
    most_bytes = max(peak for peak, _ in points)
    low, high = min(1.0, points[-1][1]), max(time for _, time in points)
    room = max(high - low, 0.02) * (_HEADROOM - 1)
    frame = Frame(
        _LEFT,
        60,
        _WIDTH - _LEFT - _RIGHT,
        340,
        (0.0, most_bytes * 1.04),
        (low - room / 2, high + room),
    )
    unit, unit_bytes = memory_unit(most_bytes)
    names = (f"peak memory, {unit}", "predicted time / unplanned time")
    path = steps(frame, [peak for peak, _ in points], [time for _, time in points])
    parts = [
        *axes(frame, *names, (unit_bytes, 1.0)),
        *_floor(document, frame),
        f'<path d="{path}" class="curve"/>',
        *_points(points, frame),
    ]
    ends = [f"{format_bytes(peak)} at {time:.3f}x" for peak, time in (points[0], points[-1])]
    return figure(_WIDTH, frame.bottom + 52, FRONTIER_TITLE, " to ".join(ends), parts)


def _floor(document: FrontierDocument, frame: Frame) -> list[str]:
    floor_bytes = min(plan.floor_bytes for plan in document.plans)
    x = frame.x(floor_bytes)
    words = f"no schedule is below {format_bytes(floor_bytes)}"
    return [
        line(x, frame.top, x, frame.bottom, "bound"),
        text(x + 6, frame.top + 4, words, "phase"),
    ]


def _points(points: Sequence[tuple[int, float]], frame: Frame) -> list[str]:
    """Points, each with a label unless it would overlap the one before."""
    parts, free = [], frame.left
    for peak_bytes, slowdown in points:
        x, y = frame.x(peak_bytes), frame.y(slowdown)
        name = f"{format_bytes(peak_bytes)}, {slowdown:.3f}x"
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="point">'
        parts.append(f"{dot}<title>{name}</title></circle>")
        if x > free:
            anchor = "end" if x > frame.right - 40 else "start"
            parts.append(text(x + 6, y - 9, f"{slowdown:.3f}x", "note", anchor))
            free = x + 48
    return parts


def frontier_points(document: FrontierDocument) -> list[tuple[int, float]]:
    """Peak and predicted slowdown of each plan, by ascending peak."""
    return sorted((plan.peak_bytes, plan.slowdown) for plan in document.plans)
