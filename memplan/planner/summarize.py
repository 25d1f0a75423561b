"""The plan that a user reads, from a schedule. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from memplan.ir.liveness import ScheduledStep, floor_bytes
from memplan.ir.program import Costs, Program, Role
from memplan.ir.schedule import Effect, Recovery
from memplan.planner import keep_all
from memplan.planner.frozen_parts import parts
from memplan.planner.plan import LiveValue, PassRecord, Plan

_MOST_LIVE = 12


def unplanned_step(program: Program, costs: Costs) -> ScheduledStep:
    """The captured step as it is: without passes, and with all kept that autograd saves."""
    return ScheduledStep(program, (), costs, keep_all(program, costs))


def describe_plan(
    step: ScheduledStep,
    *,
    original: ScheduledStep,
    budget_bytes: int | None,
    passes: Sequence[PassRecord],
    captured_effect: Effect,
    notes: Sequence[str],
    gradients: Mapping[str, int],
) -> Plan:
    """The plan of a step: its account, and that of the captured one beside it."""
    program, costs, values = step.program, step.costs, step.catalog.values
    op = step.catalog.ops[step.timeline.peak.op]
    held = {Role.TANGENT, Role.OUTPUT, Role.GRADIENT}
    saved = [values[id] for id in step.saved if values[id].role not in held]
    return Plan(
        peak_bytes=step.peak_bytes,
        resident_bytes=program.resident_bytes,
        original_peak_bytes=original.peak_bytes,
        floor_bytes=floor_bytes(program, step.recoveries, costs),
        saved_bytes=sum(value.device_bytes for value in saved),
        seconds=step.seconds,
        original_seconds=original.seconds,
        slowdown_bound=None,
        num_ops=len(program.ops),
        num_restores=len(step.schedule.restored_ops),
        categories=step.categories,
        phases=step.phases,
        peak_op=f"{op.target} in {op.module or 'the root module'}",
        live=_largest_live(step),
        budget_bytes=budget_bytes,
        costs_source=costs.source,
        passes=tuple(passes),
        captured_effect=captured_effect,
        notes=tuple(notes),
        parts=parts(unplanned_step(program, costs), gradients),
        fingerprint=fingerprint(program, step.recoveries),
        schedule=step.schedule,
    )


def fingerprint(program: Program, recoveries: Sequence[Recovery]) -> str:
    """Digest of a program and of the recoveries that a schedule may name."""
    rows = [
        [r.values, r.restore_op.id, r.restore_op.target, r.restore_op.operands, len(r.stashed)]
        for r in recoveries
    ]
    text = program.fingerprint + json.dumps(rows)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _largest_live(step: ScheduledStep) -> tuple[LiveValue, ...]:
    values, ops = step.catalog.values, step.catalog.ops
    largest = sorted(step.live_at_peak, key=lambda id: (-values[id].device_bytes, id))
    return tuple(
        LiveValue(
            value.device_bytes,
            step.category(value),
            "the caller" if value.producer is None else ops[value.producer].target,
            value.module,
            value.source,
        )
        for value in (values[id] for id in largest[:_MOST_LIVE])
    )
