"""Results as JSON. All have a schema version, a kind and the same totals; see docs/json.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from memplan.ir.memory_trace import MemoryTrace
from memplan.planner.plan import Plan
from memplan.profiler import Comparison, Profile
from memplan.report.places import by_line, by_module

SCHEMA_VERSION = 1

_POINTS = 2000
"""Of a timeline, at most about so many."""

PLANNED = "planned, measured"
"""The trace of a comparison that its totals are of."""

Document = dict[str, object]


def profile_document(
    trace: MemoryTrace, seconds: Mapping[str, float], growth_bytes: int | None = None
) -> Document:
    """A measured step; of a script, how much more is there after it than before."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "profile",
        **totals(trace),
        "device": trace.device,
        "torch": torch.__version__,
        "step_s": sum(seconds.values()),
        "growth_bytes": growth_bytes,
        "phases": [
            {"name": name, "peak_bytes": nbytes, "seconds": seconds.get(name)}
            for name, nbytes in trace.phase_peaks().items()
        ],
        "traces": _traces({"measured": trace}),
    }


def trace_document(label: str, trace: MemoryTrace) -> Document:
    """A trace: what is there at the peak, and bytes by category over the step."""
    event = trace.peak_event
    block = trace.peak_block
    events = trace.highlights(_POINTS)
    return {
        "label": label,
        "source": trace.kind,
        **totals(trace),
        "peak": {
            "phase": trace.phase_at(event),
            "op": "" if block is None else block.op,
            "module": "" if block is None else block.module,
            "source": "" if block is None else block.source,
        },
        "modules": [
            {"module": name, "categories": dict(nbytes)}
            for name, nbytes in sorted(by_module(trace, event).items())
        ],
        "lines": [asdict(group) for group in by_line(trace, event)],
        "times_s": [trace.times_s[event] for event in events],
        "phases": [trace.phase_at(event) for event in events],
        "series": trace.over_time(events),
    }


def _traces(traces: Mapping[str, MemoryTrace]) -> list[Document]:
    return [trace_document(label, trace) for label, trace in traces.items()]


def totals(trace: MemoryTrace) -> Document:
    """What every report has."""
    return {
        "peak_bytes": trace.peak_bytes,
        "resident_bytes": trace.resident_bytes,
        "categories": dict(trace.categories(trace.peak_event)),
        "unexplained_bytes": trace.unexplained_bytes,
    }


def plan_document(plan: Plan, traces: Mapping[str, MemoryTrace] | None = None) -> Document:
    """What a plan predicts; its schedule is in the file that ``-o`` writes."""
    return {**plan_totals("plan", plan), **_plan(plan), "traces": _traces(traces or {})}


def _plan(plan: Plan) -> Document:
    return {
        "peak_bytes": plan.peak_bytes,
        "resident_bytes": plan.resident_bytes,
        "categories": dict(plan.categories),
        "original_peak_bytes": plan.original_peak_bytes,
        "floor_bytes": plan.floor_bytes,
        "budget_bytes": plan.budget_bytes,
        "slowdown": plan.slowdown,
        "num_ops": plan.num_ops,
        "num_restores": plan.num_restores,
        "phases": [{"name": name, "peak_bytes": n} for name, n in plan.phases.items()],
        "peak": {"op": plan.peak_op},
        "live": [asdict(value) for value in plan.live],
        "costs_source": plan.costs_source,
        "effects": [effect.value for effect in plan.effects],
        "passes": [record.name for record in plan.passes],
        "notes": list(plan.notes),
    }


def frontier_document(plans: Sequence[Plan]) -> Document:
    """Plans by ascending peak; the totals are those of the unplanned step, the last of them."""
    return {
        **plan_totals("frontier", plans[-1]),
        "original_peak_bytes": plans[-1].original_peak_bytes,
        "plans": [_plan(plan) for plan in plans],
    }


def comparison_document(
    comparison: Comparison, plan: Plan, traces: Mapping[str, MemoryTrace]
) -> Document:
    """Two measured steps and the plan of the second; the totals are those of its trace."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        **totals(traces[PLANNED]),
        "original": _measured(comparison.original),
        "planned": _measured(comparison.planned),
        "plan": _plan(plan),
        "time_ratio": comparison.time_ratio,
        "is_exact": comparison.is_exact,
        "loss_equal": comparison.loss_equal,
        "gradients_equal": comparison.gradients_equal,
        "buffers_equal": comparison.buffers_equal,
        "parameters_equal": comparison.parameters_equal,
        "rng_equal": comparison.rng_equal,
        "max_gradient_error": _finite(comparison.max_gradient_error),
        "traces": _traces(traces),
    }


def _finite(number: float) -> float | None:
    """JSON has no other numbers."""
    return number if math.isfinite(number) else None


def checks_document(checks: Mapping[str, tuple[bool, str]]) -> Document:
    """What works here: whether, and in words."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "checks",
        "checks": [
            {"name": name, "is_ok": is_ok, "text": text} for name, (is_ok, text) in checks.items()
        ],
    }


def _measured(profile: Profile) -> Document:
    return {
        "peak_bytes": profile.peak_bytes,
        "resident_bytes": profile.resident_bytes,
        "step_s": profile.step_s,
        "phases": [{"name": name, "peak_bytes": n} for name, n in profile.phases.items()],
        "device": profile.device,
        "reserved_bytes": profile.reserved_bytes,
        "process_bytes": profile.process_bytes,
        "host_bytes": profile.host_bytes,
    }


def plan_totals(kind: str, plan: Plan) -> Document:
    """Of a prediction: every byte of it has a name."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "peak_bytes": plan.peak_bytes,
        "resident_bytes": plan.resident_bytes,
        "categories": dict(plan.categories),
        "unexplained_bytes": 0,
    }
