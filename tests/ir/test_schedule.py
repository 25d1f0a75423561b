"""Legality and JSON of schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import PlanMismatch
from memplan.ir.program import Op, Phase, Program, Role, Value
from memplan.ir.schedule import Free, Restore, Run, Schedule, check_schedule
from memplan.planner import keep_all, solve

from support.programs import chain, recompute_all, unit_costs

PROGRAM = chain(6)
RECOVERIES = recompute_all(PROGRAM)
SCHEDULE = solve(PROGRAM, unit_costs(PROGRAM), RECOVERIES, budget_bytes=600).schedule


def test_the_solution_is_legal_and_recomputes():
    check_schedule(PROGRAM, RECOVERIES, SCHEDULE)
    assert SCHEDULE.restored_ops


@pytest.mark.parametrize("segment", ["forward", "backward"])
def test_any_step_left_out_is_illegal(segment):
    steps = getattr(SCHEDULE, segment)
    for index in range(len(steps)):
        broken = replace(SCHEDULE, **{segment: steps[:index] + steps[index + 1 :]})
        with pytest.raises(PlanMismatch, match="illegal schedule"):
            check_schedule(PROGRAM, RECOVERIES, broken)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Run(0, ()), "runs op 0 where op"),
        (Restore(9, ()), "nothing offers"),
        (Free(0), "not the schedule's to free"),
        (Free(99), "not alive"),
        (Restore(0, (5,)), "binds what op 0 does not make"),
    ],
)
def test_a_step_put_in_is_illegal(step, message):
    broken = replace(SCHEDULE, forward=(*SCHEDULE.forward, step))
    with pytest.raises(PlanMismatch, match=message):
        check_schedule(PROGRAM, RECOVERIES, broken)


def test_a_result_is_bound_once():
    index, run = next(
        (i, s) for i, s in enumerate(SCHEDULE.forward) if isinstance(s, Run) and s.binds
    )
    twice = replace(run, binds=(*run.binds, run.binds[0]))
    steps = (*SCHEDULE.forward[:index], twice, *SCHEDULE.forward[index + 1 :])
    with pytest.raises(PlanMismatch, match="twice"):
        check_schedule(PROGRAM, RECOVERIES, replace(SCHEDULE, forward=steps))


def test_what_was_overwritten_is_not_read_again():
    values = (
        Value(0, 8, Role.PARAMETER),
        Value(1, 8, Role.OUTPUT, producer=0),
        Value(2, 8, Role.GRADIENT, producer=2),
    )
    ops = (
        Op(0, "make", (0,), (1,)),
        Op(1, "overwrite", (0,), (), Phase.BACKWARD, mutates=(0,)),
        Op(2, "read", (0,), (2,), Phase.BACKWARD),
    )
    program = Program(ops, values, (1, 2))
    schedule = Schedule((Run(0, (1,)),), (Run(1, ()), Run(2, (2,))))
    with pytest.raises(PlanMismatch, match=r"after values \[0\] changed"):
        check_schedule(program, (), schedule)


def test_nothing_is_restored_that_no_recovery_offers():
    with pytest.raises(PlanMismatch, match="nothing offers"):
        check_schedule(PROGRAM, (), SCHEDULE)


def test_json_gives_an_equal_schedule_back():
    assert Schedule.from_json(SCHEDULE.to_json()) == SCHEDULE
    whole = keep_all(PROGRAM, unit_costs(PROGRAM))
    assert Schedule.from_json(whole.to_json()) == whole


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@given(st.fixed_dictionaries({"forward": st.lists(json_values), "backward": json_values}))
def test_other_json_is_refused_or_read(data):
    try:
        schedule = Schedule.from_json(data)
    except PlanMismatch:
        return
    assert isinstance(schedule, Schedule)
