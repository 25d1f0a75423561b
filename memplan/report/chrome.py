"""A trace as events for chrome://tracing and Perfetto."""

from __future__ import annotations

from typing import Any

from memplan.ir.memory_trace import MemoryTrace

_PROCESS = 1
_PHASES = 1
"""The thread that the phases are drawn on."""

_MOST_SAMPLES = 20_000


def chrome_trace(trace: MemoryTrace) -> dict[str, Any]:
    """Bytes by category over time, the phases, and the peak; ready for ``json.dumps``.

    Very long traces keep only their highest and lowest moments; the peak is always included.
    """
    events = [
        _named("process_name", f"memory on {trace.device}, {trace.kind}"),
        _named("thread_name", "phases"),
        *_samples(trace),
        *_phases(trace),
    ]
    if trace.times_s:
        events.append(_peak(trace))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": _PROCESS, "tid": _PHASES, "args": {"name": name}}


def _samples(trace: MemoryTrace) -> list[dict[str, Any]]:
    events = trace.highlights(_MOST_SAMPLES)
    series = trace.over_time(events)
    return [
        {
            "name": "bytes",
            "ph": "C",
            "ts": _microseconds(trace.times_s[event]),
            "pid": _PROCESS,
            "args": {category: values[n] for category, values in series.items()},
        }
        for n, event in enumerate(events)
    ]


def _phases(trace: MemoryTrace) -> list[dict[str, Any]]:
    """The phases as events, each lasting until the next begins."""
    starts = [_microseconds(trace.times_s[span.first]) for span in trace.spans]
    ends = [*starts[1:], *(_microseconds(when) for when in trace.times_s[-1:])]
    return [
        {
            "name": span.phase,
            "ph": "X",
            "ts": start,
            "dur": end - start,
            "pid": _PROCESS,
            "tid": _PHASES,
        }
        for span, start, end in zip(trace.spans, starts, ends, strict=True)
    ]


def _peak(trace: MemoryTrace) -> dict[str, Any]:
    block = trace.peak_block
    made = {} if block is None else {"op": block.op, "module": block.module, "source": block.source}
    return {
        "name": "peak",
        "ph": "i",
        "s": "p",
        "ts": _microseconds(trace.times_s[trace.peak_event]),
        "pid": _PROCESS,
        "tid": _PHASES,
        "args": {"bytes": trace.peak_bytes, **made},
    }


def _microseconds(seconds: float) -> float:
    return seconds * 1e6
