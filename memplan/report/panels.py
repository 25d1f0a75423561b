"""The content of a figure before it is drawn: traces that share axes, units and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memplan.ir.memory_trace import Span, spans_of
from memplan.report.schema import Trace, UnreadableDocument
from memplan.units import format_bytes

END = "end"


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        number: the position of the trace in the document.
        trace: the one whose bytes are stacked.
        predicted: the prediction of the same step, if the trace is measured and one is known.
    """

    number: int
    trace: Trace
    predicted: Trace | None = None

    @property
    def peak_bytes(self) -> int:
        """The higher of the two peaks."""
        return max(one.peak_bytes for one in (self.trace, self.predicted) if one is not None)

    @property
    def title(self) -> str:
        """The title of the panel."""
        return self.trace.label if self.predicted is None else f"{self.trace.label} and predicted"

    @property
    def time_label(self) -> str:
        """The label of the time axis."""
        if self.predicted is None:
            return f"{self.trace.source} time"
        return "measured time; each phase of the prediction is scaled to the measured phase"


def panels(traces: Sequence[Trace]) -> list[Panel]:
    """One panel per trace; a prediction is drawn over the measurement of the same step.

    If their phases differ, the two cannot be overlaid and get a panel each. Traces without
    events are left out.

    Raises:
        UnreadableDocument: if no trace is left.
    """
    drawn = [(number, one) for number, one in enumerate(traces) if one.times_s]
    if not drawn:
        raise UnreadableDocument("it has no traces, so there is no timeline to draw")
    predictions = {_subject(one): one for _, one in drawn if one.source == "predicted"}
    measured = {_subject(one): one for _, one in drawn if one.source == "measured"}
    shared = {
        subject
        for subject, one in predictions.items()
        if subject in measured and _order(one) == _order(measured[subject])
    }
    return [
        Panel(number, one, predictions[_subject(one)] if _subject(one) in shared else None)
        for number, one in drawn
        if one.source != "predicted" or _subject(one) not in shared
    ]


def phase_spans(trace: Trace) -> list[tuple[str, float, float]]:
    """The phases in order, each with its start and end in seconds."""
    spans = spans_of(trace.phases)
    starts = [trace.times_s[span.first] for span in spans]
    ends = [*starts[1:], trace.times_s[-1]]
    return [
        (span.phase, start, end)
        for span, start, end in zip(spans, starts, ends, strict=True)
        if span.phase != END
    ]


def scaled_times(predicted: Trace, measured: Trace) -> list[float]:
    """The predicted events on the measured clock: each phase begins and ends as measured."""
    times: list[float] = []
    both = zip(_stretches(predicted), phase_spans(predicted), phase_spans(measured), strict=True)
    for span, (_, start, end), (_, on_start, on_end) in both:
        factor = (on_end - on_start) / (end - start) if end > start else 0.0
        events = predicted.times_s[span.first : span.end]
        times += [on_start + (time - start) * factor for time in events]
    return times + [measured.times_s[-1]] * (len(predicted.times_s) - len(times))


def peak_label(trace: Trace) -> str:
    """A short label of the peak."""
    parts = [trace.peak.phase, trace.peak.op]
    return ", ".join([f"peak {format_bytes(trace.peak_bytes)}", *filter(None, parts)])


def memory_unit(nbytes: int) -> tuple[str, int]:
    """The unit for an axis of so many bytes, and the bytes in it."""
    names = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(nbytes.bit_length() - 1, 0) // 10, len(names) - 1)
    return names[power], 1024**power


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit for an axis of so many seconds, and the seconds in it."""
    for name, unit_s in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= unit_s:
            return name, unit_s
    return "µs", 1e-6


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two numbers, about ``most`` or fewer."""
    if high <= low:
        return [low]
    least = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(least))
    step = next(f * magnitude for f in (1, 2, 2.5, 5, 10) if f * magnitude >= least)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _subject(trace: Trace) -> str:
    return trace.label.removesuffix(trace.source).rstrip(", ")


def _stretches(trace: Trace) -> list[Span]:
    return [span for span in spans_of(trace.phases) if span.phase != END]


def _order(trace: Trace) -> list[str]:
    return [span.phase for span in _stretches(trace)]
