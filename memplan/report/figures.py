"""A document's figure as a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memplan.errors import MemplanError
from memplan.ir.memory_trace import CATEGORIES
from memplan.report.axes import standalone
from memplan.report.palette import LIGHT
from memplan.report.panels import (
    Panel,
    memory_unit,
    panels,
    peak_label,
    phase_spans,
    scaled_times,
    time_unit,
)
from memplan.report.schema import FrontierDocument, Readable, plan_of
from memplan.report.svg import (
    FRONTIER_TITLE,
    TIMELINE_TITLE,
    frontier_points,
    frontier_svg,
    timeline_svg,
)
from memplan.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_SUFFIXES = (".svg", ".png")


def save_figure(document: Readable, path: Path) -> None:
    """Draw a frontier against memory, any other document over time.

    Args:
        document: a document as a command writes it.
        path: the file, ``.svg`` or ``.png``; it is written whole or not at all.

    Raises:
        UnreadableDocument: if there is nothing to draw.
        MemplanError: for another suffix, or a PNG without matplotlib.
        OSError: if the file cannot be written.
    """
    if path.suffix not in FIGURE_SUFFIXES:
        raise MemplanError(f"{path.name}: expected a name that ends in .svg or .png")
    image = _png(document) if path.suffix == ".png" else _svg(document).encode()
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(image)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _svg(document: Readable) -> str:
    if isinstance(document, FrontierDocument):
        return standalone(frontier_svg(document))
    return standalone(timeline_svg(document.traces, _budget(document)))


def _budget(document: Readable) -> int | None:
    plan = plan_of(document)
    return None if plan is None else plan.budget_bytes


def _png(document: Readable) -> bytes:
    # Drawn without pyplot, which would pick a window system and keep every figure.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise MemplanError('a PNG needs matplotlib: pip install "memplan[report]"') from error
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    if isinstance(document, FrontierDocument):
        _draw_frontier(figure, document)
    else:
        _draw_timeline(figure, panels(document.traces), _budget(document))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_frontier(figure: Figure, document: FrontierDocument) -> None:
    points = frontier_points(document)
    unit, unit_bytes = memory_unit(max(nbytes for nbytes, _ in points))
    figure.set_size_inches(8, 4.5)
    axes = figure.add_subplot(
        title=FRONTIER_TITLE,
        xlabel=f"peak memory, {unit}",
        ylabel="predicted time / unplanned time",
    )
    xs = [nbytes / unit_bytes for nbytes, _ in points]
    axes.step(xs, [time for _, time in points], where="post", marker="o", color="#0072b2")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)


def _draw_timeline(figure: Figure, shown: Sequence[Panel], budget_bytes: int | None) -> None:
    most_bytes = max(panel.peak_bytes for panel in shown)
    figure.set_size_inches(10, 1.5 + 3.2 * len(shown))
    figure.suptitle(TIMELINE_TITLE)
    every = [figure.add_subplot(len(shown), 1, n) for n in range(1, len(shown) + 1)]
    names: dict[str, Artist] = {}
    for panel, axes in zip(shown, every, strict=True):
        _draw_panel(axes, panel, most_bytes, budget_bytes)
        handles, labels = axes.get_legend_handles_labels()
        names |= dict(zip(labels, handles, strict=True))
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=3, frameon=False)


def _draw_panel(axes: Axes, panel: Panel, most_bytes: int, budget_bytes: int | None) -> None:
    trace = panel.trace
    unit, unit_bytes = memory_unit(most_bytes)
    time, unit_s = time_unit(trace.times_s[-1])
    times = [one / unit_s for one in trace.times_s]
    present = [name for name in CATEGORIES if name in trace.series]
    below = [0.0] * len(times)
    for name in present:
        top = [low + own / unit_bytes for low, own in zip(below, trace.series[name], strict=True)]
        axes.fill_between(times, below, top, step="post", color=LIGHT[name], lw=0, label=name)
        below = top
    if panel.predicted is not None:
        xs = [one / unit_s for one in scaled_times(panel.predicted, trace)]
        ys = [total / unit_bytes for total in panel.predicted.totals]
        label = f"predicted total, {peak_label(panel.predicted)}"
        axes.step(xs, ys, where="post", color="black", ls="--", lw=1, label=label)
    if budget_bytes is not None and budget_bytes <= 1.15 * most_bytes:
        label = f"budget {format_bytes(budget_bytes)}"
        axes.axhline(budget_bytes / unit_bytes, color="#d5006d", ls=":", label=label)
    for phase, start, end in phase_spans(trace):
        axes.axvline(start / unit_s, color="black", alpha=0.3, lw=0.8)
        if end - start > 0.1 * trace.times_s[-1]:
            place = (start / unit_s, 1.13 * most_bytes / unit_bytes)
            axes.annotate(f" {phase}", place, va="top", size="small")
    _draw_peak(axes, panel, times, below)
    axes.set(
        title=panel.title,
        xlabel=f"{panel.time_label}, {time}",
        ylabel=f"memory, {unit}",
        xlim=(0, times[-1] or None),
        ylim=(0, 1.15 * most_bytes / unit_bytes),
    )


def _draw_peak(axes: Axes, panel: Panel, times: list[float], totals: list[float]) -> None:
    event = max(range(len(totals)), key=totals.__getitem__)
    is_late = times[event] > times[-1] / 2
    axes.plot(times[event], totals[event], "o", color="black", ms=4)
    axes.annotate(
        peak_label(panel.trace),
        (times[event], totals[event]),
        (-6 if is_late else 6, 6),
        textcoords="offset points",
        ha="right" if is_late else "left",
    )
