"""From a schedule to the plan that a user reads. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.freeing import parts
from memplan.plan import LiveValue, PassRecord, Plan
from memplan.planner import keep_all
from memplan.program import Costs, Program, Role
from memplan.schedule import Catalog, Effect, Recovery, Schedule
from memplan.timeline import (
    categories_at_peak,
    floor_bytes,
    live_during,
    peak_by_phase,
    saved_values,
    seconds,
    simulate,
)

_MOST_LIVE = 12


@dataclass(frozen=True, slots=True)
class Original:
    """The captured step as it is: no pass took part, everything is kept.

    Attributes:
        peak_bytes: its predicted peak, residents included.
        seconds: its predicted time.
        schedule: everything is kept that autograd keeps.
    """

    peak_bytes: int
    seconds: float
    schedule: Schedule


def describe_original(program: Program, costs: Costs) -> Original:
    """Account for the captured step with everything kept that autograd keeps."""
    schedule = keep_all(program, costs)
    timeline = simulate(program, Catalog.of(program, ()), schedule, costs)
    return Original(timeline.peak_bytes, seconds(schedule, costs), schedule)


def describe_plan(
    program: Program,
    recoveries: Sequence[Recovery],
    costs: Costs,
    schedule: Schedule,
    *,
    original: Original,
    slowdown_bound: float | None = None,
    budget_bytes: int | None,
    passes: Sequence[PassRecord],
    captured_effect: Effect,
    notes: Sequence[str],
    gradients: Mapping[str, int],
) -> Plan:
    """Account for a schedule, and for the captured step beside it."""
    catalog = Catalog.of(program, recoveries)
    timeline = simulate(program, catalog, schedule, costs)
    op = catalog.ops[timeline.peak.op]
    held = {Role.TANGENT, Role.OUTPUT, Role.GRADIENT}
    saved = [
        value for value in saved_values(program, schedule) if catalog.values[value].role not in held
    ]
    return Plan(
        peak_bytes=timeline.peak_bytes,
        resident_bytes=program.resident_bytes,
        original_peak_bytes=original.peak_bytes,
        floor_bytes=floor_bytes(program, recoveries, costs),
        saved_bytes=sum(catalog.values[value].nbytes for value in saved),
        seconds=seconds(schedule, costs),
        original_seconds=original.seconds,
        slowdown_bound=slowdown_bound,
        num_ops=len(program.ops),
        num_restores=len(schedule.restored_ops),
        categories=categories_at_peak(program, catalog, schedule, costs),
        phases=peak_by_phase(program, catalog, schedule, costs),
        peak_op=f"{op.target} in {op.module or 'the root module'}",
        live=_largest_live(program, catalog, schedule, costs),
        budget_bytes=budget_bytes,
        costs_source=costs.source,
        passes=tuple(passes),
        captured_effect=captured_effect,
        notes=tuple(notes),
        parts=parts(program, keep_all(program, costs), gradients),
        fingerprint=fingerprint(program, recoveries),
        schedule=schedule,
    )


def fingerprint(program: Program, recoveries: Sequence[Recovery]) -> str:
    """Digest of a program and of the recoveries that a schedule may name."""
    rows = [
        [r.restores, r.restore.id, r.restore.target, r.restore.operands, len(r.keeps)]
        for r in recoveries
    ]
    text = program.fingerprint + json.dumps(rows)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _largest_live(
    program: Program, catalog: Catalog, schedule: Schedule, costs: Costs
) -> tuple[LiveValue, ...]:
    peak = simulate(program, catalog, schedule, costs).peak
    saved = saved_values(program, schedule)
    ids = live_during(program, catalog, schedule, peak.step)
    largest = sorted(ids, key=lambda id: (-catalog.values[id].nbytes, id))[:_MOST_LIVE]
    live = []
    for id in largest:
        value = catalog.values[id]
        category = value.role.value
        if value.role is Role.ACTIVATION:
            category = "saved activation" if id in saved else "temporary"
        target = "the caller" if value.producer is None else catalog.ops[value.producer].target
        live.append(LiveValue(value.nbytes, category, target, value.module, value.source))
    return tuple(live)
