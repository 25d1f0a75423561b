"""Results as documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import msgspec
import torch

from memplan.advise.freezing import FreezingChoice
from memplan.advise.techniques import Technique
from memplan.ir.memory_trace import MemoryTrace
from memplan.planner.plan import Plan
from memplan.profiler import Comparison, Estimate, Profile
from memplan.report.places import by_line, by_module
from memplan.report.schema import (
    Check,
    ChecksDocument,
    Choice,
    ChoicesDocument,
    ComparisonDocument,
    EstimateDocument,
    FrontierDocument,
    Live,
    MeasuredStep,
    ModuleBytes,
    OpAtPeak,
    Peak,
    PhasePeak,
    PlanBody,
    PlanDocument,
    ProfileDocument,
    SolutionDocument,
    SolvedValue,
    TechniqueRow,
    TimedPhasePeak,
    Trace,
)

_POINTS = 2000
"""Approximate limit on the points of a timeline."""

PLANNED = "planned, measured"
"""The trace that a comparison's totals are taken from."""


def profile_document(
    trace: MemoryTrace, seconds: Mapping[str, float], growth_bytes: int | None = None
) -> ProfileDocument:
    """A measured step; for a script, also the growth in bytes over the step."""
    return ProfileDocument(
        **_totals(trace),
        device=trace.device,
        torch=str(torch.__version__),
        step_s=sum(seconds.values()),
        growth_bytes=growth_bytes,
        phases=tuple(
            TimedPhasePeak(name=name, peak_bytes=nbytes, seconds=seconds.get(name))
            for name, nbytes in trace.phase_peaks().items()
        ),
        traces=_traces({"measured": trace}),
    )


def trace_document(label: str, trace: MemoryTrace) -> Trace:
    """The bytes alive at the peak, and the bytes by category over the step."""
    event = trace.peak_event
    block = trace.peak_block
    events = trace.highlights(_POINTS)
    return Trace(
        **_totals(trace),
        label=label,
        source=trace.kind,
        peak=Peak(
            phase=trace.phase_at(event),
            op="" if block is None else block.op,
            module="" if block is None else block.module,
            source="" if block is None else block.source,
        ),
        modules=tuple(
            ModuleBytes(module=name, categories=dict(nbytes))
            for name, nbytes in sorted(by_module(trace, event).items())
        ),
        lines=tuple(by_line(trace, event)),
        times_s=tuple(trace.times_s[event] for event in events),
        phases=tuple(trace.phase_at(event) for event in events),
        series={name: tuple(sizes) for name, sizes in trace.over_time(events).items()},
    )


def _traces(traces: Mapping[str, MemoryTrace]) -> tuple[Trace, ...]:
    return tuple(trace_document(label, trace) for label, trace in traces.items())


def _totals(trace: MemoryTrace) -> dict[str, Any]:
    """The totals of a trace."""
    return {
        "peak_bytes": trace.peak_bytes,
        "resident_bytes": trace.resident_bytes,
        "categories": dict(trace.categories(trace.peak_event)),
        "unexplained_bytes": trace.unexplained_bytes,
    }


def _plan_totals(plan: Plan) -> dict[str, Any]:
    """The totals of a prediction, in which every byte has a name."""
    return {
        "peak_bytes": plan.peak_bytes,
        "resident_bytes": plan.resident_bytes,
        "categories": dict(plan.categories),
        "unexplained_bytes": 0,
    }


def plan_document(
    plan: Plan,
    traces: Mapping[str, MemoryTrace] | None = None,
    techniques: Sequence[Technique] = (),
) -> PlanDocument:
    """The predictions of a plan; its schedule is in the file that ``-o`` writes."""
    return PlanDocument(
        **_plan(plan),
        unexplained_bytes=0,
        traces=_traces(traces or {}),
        techniques=technique_rows(techniques) or msgspec.UNSET,
    )


def technique_rows(techniques: Sequence[Technique]) -> tuple[TechniqueRow, ...]:
    """Rows of techniques planned alone, in the order of their rank."""
    return tuple(
        TechniqueRow(
            name=one.name,
            peak_bytes=one.plan.peak_bytes,
            saved_bytes=one.saved_bytes,
            slowdown=one.plan.slowdown,
            effects=one.plan.effects,
            fits=one.fits,
        )
        for one in techniques
    )


def _plan(plan: Plan) -> dict[str, Any]:
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
        "phases": _phases(plan.phases),
        "peak": OpAtPeak(op=plan.peak_op),
        "live": msgspec.convert(plan.live, tuple[Live, ...], from_attributes=True),
        "costs_source": plan.costs_source,
        "effects": plan.effects,
        "passes": tuple(record.name for record in plan.passes),
        "notes": plan.notes,
    }


def _phases(peaks: Mapping[str, int]) -> tuple[PhasePeak, ...]:
    return tuple(PhasePeak(name=name, peak_bytes=nbytes) for name, nbytes in peaks.items())


def frontier_document(plans: Sequence[Plan]) -> FrontierDocument:
    """Plans by ascending peak; the totals are those of the last one, the unplanned step."""
    return FrontierDocument(
        **_plan_totals(plans[-1]),
        original_peak_bytes=plans[-1].original_peak_bytes,
        plans=tuple(PlanBody(**_plan(plan)) for plan in plans),
    )


def comparison_document(
    comparison: Comparison, plan: Plan, traces: Mapping[str, MemoryTrace]
) -> ComparisonDocument:
    """Two measured steps and the plan of the second, whose trace gives the totals.

    Without traces, where no categories are shown, the totals are the measured ones.
    """
    error = comparison.max_gradient_error
    measured = comparison.planned
    return ComparisonDocument(
        **(_totals(traces[PLANNED]) if traces else _totals_without_names(measured)),
        original=_measured(comparison.original, comparison.losses[0]),
        planned=_measured(comparison.planned, comparison.losses[1]),
        plan=PlanBody(**_plan(plan)),
        time_ratio=comparison.time_ratio,
        is_exact=comparison.is_exact,
        loss_equal=comparison.loss_equal,
        gradients_equal=comparison.gradients_equal,
        buffers_equal=comparison.buffers_equal,
        parameters_equal=comparison.parameters_equal,
        rng_equal=comparison.rng_equal,
        max_gradient_error=error if math.isfinite(error) else None,
        traces=_traces(traces),
    )


def _totals_without_names(profile: Profile) -> dict[str, Any]:
    return {
        "peak_bytes": profile.peak_bytes,
        "resident_bytes": profile.resident_bytes,
        "categories": {},
        "unexplained_bytes": 0,
    }


def _measured(profile: Profile, loss: float) -> MeasuredStep:
    return MeasuredStep(
        peak_bytes=profile.peak_bytes,
        resident_bytes=profile.resident_bytes,
        step_s=profile.step_s,
        phases=_phases(profile.phases),
        device=profile.device,
        reserved_bytes=profile.reserved_bytes,
        process_bytes=profile.process_bytes,
        host_bytes=profile.host_bytes,
        loss=loss if math.isfinite(loss) else None,
    )


def _verdict(
    estimate: Estimate, memory_bytes: int
) -> Literal["fits", "may not fit", "does not fit"]:
    """Judge whether a step fits into so much memory."""
    if estimate.most_bytes <= memory_bytes:
        return "fits"
    return "does not fit" if estimate.least_bytes > memory_bytes else "may not fit"


def estimate_document(estimate: Estimate, memory_bytes: int) -> EstimateDocument:
    """An untouched step that was not run, and whether it fits into so much memory."""
    return EstimateDocument(
        **_totals(estimate.trace),
        least_bytes=estimate.least_bytes,
        most_bytes=estimate.most_bytes,
        reserved_bytes=estimate.reserved_bytes,
        memory_bytes=memory_bytes,
        headroom_bytes=memory_bytes - estimate.most_bytes,
        verdict=_verdict(estimate, memory_bytes),
        costs=estimate.costs,
        refusals=tuple(estimate.refusals),
        device=estimate.device.name,
        torch=str(torch.__version__),
        phases=_phases(estimate.trace.phase_peaks()),
        traces=(trace_document("estimated", estimate.trace),),
    )


def solution_document(
    field: str,
    memory_bytes: int,
    max_slowdown: float,
    solutions: Mapping[str, tuple[int, Mapping[int, int]]],
    plan: Plan,
) -> SolutionDocument:
    """The largest value that fits; the totals are those of a planned step.

    Args:
        field: the factory's argument.
        memory_bytes: the bound.
        max_slowdown: the bound on the planned step's predicted time.
        solutions: for "untouched" and "planned", the largest value and the bytes of each value
            tried.
        plan: the plan for the largest value that fits, or for the smallest if none does.
    """
    found = {
        name: SolvedValue(
            value=value, tried={str(k): nbytes for k, nbytes in sorted(tried.items())}
        )
        for name, (value, tried) in solutions.items()
    }
    return SolutionDocument(
        **_plan_totals(plan),
        memory_bytes=memory_bytes,
        field=field,
        max_slowdown=max_slowdown,
        untouched=found["untouched"],
        planned=found["planned"],
    )


def choices_document(choices: Sequence[FreezingChoice]) -> ChoicesDocument:
    """The savings from training less."""
    return ChoicesDocument(
        choices=tuple(Choice(**{**asdict(one), "kept_for": dict(one.kept_for)}) for one in choices)
    )


def checks_document(checks: Mapping[str, tuple[bool, str]]) -> ChecksDocument:
    """The checks of this machine, each with its result and a description."""
    return ChecksDocument(
        checks=tuple(
            Check(name=name, is_ok=is_ok, text=text) for name, (is_ok, text) in checks.items()
        )
    )
