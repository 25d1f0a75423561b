"""Several recoveries of one value: which of them a schedule uses. No torch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memplan.ir.liveness import ScheduledStep
from memplan.ir.program import Costs, Op, OpCost, Phase, Program, Role, Value
from memplan.ir.schedule import Effect, Recovery, check_schedule
from memplan.planner import prove, solve

from support.programs import Builder, replay

FIRST, SECOND = 1, 3
"""The two large values that the backward reads."""


def two_values() -> tuple[Program, tuple[Recovery, ...], Costs]:
    """Both can be made again, or kept in half of their bytes; making the second is dear.

    At the peak there is room for one of them in half of its bytes.
    """
    b = Builder()
    x = b.value(10, Role.INPUT)
    (first,) = b.op("first", [x], [100])
    (small,) = b.op("small", [first], [10])
    (second,) = b.op("second", [small], [100])
    (narrow,) = b.op("narrow", [second], [10])
    (wide,) = b.op("wide", [narrow], [200])
    (out,) = b.op("out", [wide], [10])
    gradient = b.value(10, Role.TANGENT)
    (gradient,) = b.op("b_second", [second, gradient], [10], Phase.BACKWARD)
    (gradient,) = b.op("b_first", [first, gradient], [10], Phase.BACKWARD)
    program = b.program({out: Role.OUTPUT, gradient: Role.GRADIENT})
    assert (first, second) == (FIRST, SECOND)
    recoveries = [Recovery("again", op.results, op) for op in program.ops[:5]]
    next_op, next_value = len(program.ops), len(program.values)
    for value in (first, second):
        made_by = program.values[value].producer
        assert made_by is not None
        op = program.ops[made_by]
        half = Value(next_value, 50, Role.KEPT, next_op)
        to = Op(next_op, "halve", (value,), (half.id,), variant_of=op.id)
        back = Op(next_op + 1, "widen", (half.id,), (value,), Phase.BACKWARD, variant_of=op.id)
        recoveries.append(Recovery("half", (value,), back, to, (half,)))
        next_op, next_value = next_op + 2, next_value + 1
    seconds = dict.fromkeys(range(next_op), 1.0) | {0: 3.0, 2: 50.0}
    seconds |= dict.fromkeys(range(len(program.ops), next_op), 0.5)
    return program, tuple(recoveries), Costs({id: OpCost(s) for id, s in seconds.items()})


def kinds(recoveries, schedule) -> dict[int, str]:
    """By value, the pass whose recovery gives it back."""
    ran = set(schedule.restored_ops)
    return {
        value: one.pass_name
        for one in recoveries
        if one.restore_op.id in ran
        for value in one.values
    }


@pytest.mark.parametrize("is_exact", [False, True])
def test_a_plan_may_need_two_kinds(is_exact):
    """The fastest of each value are too large together, and the smallest too slow."""
    program, recoveries, costs = two_values()
    budget = program.resident_bytes + 265
    found = solve(program, costs, recoveries, budget_bytes=budget)
    if is_exact:
        pytest.importorskip("highspy")
        found = prove(program, costs, recoveries, found, budget_bytes=budget, time_limit_s=20)
    check_schedule(program, recoveries, found.schedule)
    assert found.is_feasible and found.peak_bytes <= budget
    assert found.peak_bytes == replay(program, recoveries, costs, found.schedule)
    used = kinds(recoveries, found.schedule)
    assert used[FIRST] == "again" and used[SECOND] == "half"
    base = sum(costs.by_op[op.id].seconds for op in program.ops)
    assert found.seconds == base + 3.0 + 1.0


@pytest.mark.parametrize("is_exact", [False, True])
def test_what_may_not_be_rounded_comes_back_exactly(is_exact):
    program, recoveries, costs = two_values()
    rounding = tuple(
        replace(one, exactness=Effect.ROUNDING) if one.pass_name == "half" else one
        for one in recoveries
    )
    budget = program.resident_bytes + 320
    for anchors, expected in ((set(), {"half"}), ({FIRST, SECOND}, {"again"})):
        anchored = frozenset(anchors)
        found = solve(program, costs, rounding, budget_bytes=budget, anchors=anchored)
        if is_exact:
            pytest.importorskip("highspy")
            found = prove(
                program,
                costs,
                rounding,
                found,
                budget_bytes=budget,
                time_limit_s=20,
                anchors=anchored,
            )
        used = kinds(rounding, found.schedule)
        assert found.is_feasible and set(used.values()) == expected


def test_recoveries_that_read_each_other_make_no_circle():
    """Of two values, each could be had from the other: one of them is kept."""
    program, recoveries, costs = two_values()
    first, second = len(costs.by_op), len(costs.by_op) + 1
    both = (
        Recovery("swap", (FIRST,), Op(first, "from_second", (SECOND,), (FIRST,), Phase.BACKWARD)),
        Recovery("swap", (SECOND,), Op(second, "from_first", (FIRST,), (SECOND,), Phase.BACKWARD)),
    )
    prices = Costs({**costs.by_op, first: OpCost(0.1), second: OpCost(0.1)})
    offered = (*recoveries, *both)
    found = solve(program, prices, offered, budget_bytes=program.resident_bytes + 320)
    check_schedule(program, offered, found.schedule)
    assert found.is_feasible
    step = ScheduledStep(program, offered, prices, found.schedule)
    assert step.peak_bytes == found.peak_bytes
