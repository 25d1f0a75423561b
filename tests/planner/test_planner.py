"""The search on hand-built and random programs; brute force and an independent replay judge it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.liveness import ScheduledStep, floor_bytes
from memplan.ir.program import Costs, OpCost, Phase, Role
from memplan.ir.schedule import Restore, check_schedule
from memplan.planner import MAX_SLOWDOWN, keep_all, solve
from memplan.planner.account import Decisions, account_of, to_schedule
from memplan.planner.exact import solve_exactly
from memplan.planner.hoist import hoist
from memplan.planner.problem import make_problem
from memplan.planner.repair import RangeMaximum

from support.programs import Builder, chain, programs, recompute_all, replay, unit_costs


def test_a_chain_within_a_tenth_of_its_memory_takes_less_than_twice_the_time():
    program = chain(64)
    costs, recoveries = unit_costs(program), recompute_all(program)
    solution = solve(program, costs, recoveries, budget_bytes=1000)
    assert solution.is_feasible and solution.peak_bytes <= 1000
    assert solution.seconds <= MAX_SLOWDOWN * len(program.ops)
    check_schedule(program, recoveries, solution.schedule)


def test_a_budget_of_the_whole_recomputes_nothing():
    program = chain(8)
    costs = unit_costs(program)
    whole = keep_all(program, costs)
    peak = ScheduledStep(program, (), costs, whole).peak_bytes
    solution = solve(program, costs, recompute_all(program), budget_bytes=peak)
    assert solution.schedule == whole


def test_an_infeasible_budget_names_one_that_is_feasible():
    program = chain(16)
    costs, recoveries = unit_costs(program), recompute_all(program)
    refused = solve(program, costs, recoveries, budget_bytes=150)
    assert not refused.is_feasible
    found = solve(program, costs, recoveries, budget_bytes=refused.peak_bytes)
    assert found.is_feasible and found.peak_bytes <= refused.peak_bytes


def test_without_a_budget_the_least_memory_within_the_slowdown():
    program = chain(32)
    costs, recoveries = unit_costs(program), recompute_all(program)
    free = solve(program, costs, recoveries)
    assert free.seconds <= 1.01 * len(program.ops)
    slower = solve(program, costs, recoveries, max_slowdown=1.3)
    assert slower.seconds <= 1.3 * len(program.ops)
    assert slower.peak_bytes < free.peak_bytes


def test_budget_and_slowdown_both_hold():
    program = chain(32)
    costs, recoveries = unit_costs(program), recompute_all(program)
    solution = solve(program, costs, recoveries, budget_bytes=1200, max_slowdown=1.5)
    assert solution.is_feasible
    assert solution.peak_bytes <= 1200 and solution.seconds <= 1.5 * len(program.ops)
    assert not solve(program, costs, recoveries, budget_bytes=1200, max_slowdown=1.01).is_feasible


@settings(deadline=None)
@given(programs(max_forward=20))
def test_random_programs_keep_every_law_of_schedules(made):
    program, costs = made
    recoveries = recompute_all(program)
    whole = ScheduledStep(program, (), costs, keep_all(program, costs)).peak_bytes
    floor = floor_bytes(program, recoveries, costs)
    for share in (1.0, 0.8, 0.6, 0.4):
        budget = int(share * whole)
        solution = solve(program, costs, recoveries, budget_bytes=budget)
        check_schedule(program, recoveries, solution.schedule)
        peak = ScheduledStep(program, recoveries, costs, solution.schedule).peak_bytes
        assert peak == solution.peak_bytes == replay(program, recoveries, costs, solution.schedule)
        assert peak >= floor
        if solution.is_feasible:
            assert peak <= budget
        random_ops = {op.id for op in program.ops if op.is_random}
        restored = [step.op for step in solution.schedule.steps if isinstance(step, Restore)]
        assert not random_ops.intersection(restored)


def test_a_restore_runs_before_an_earlier_op_where_there_is_room():
    b = Builder()
    x = b.value(5, Role.INPUT)
    (kept,) = b.op("f0", [x], [10])
    (wide,) = b.op("f1", [x], [20])
    (loss,) = b.op("f2", [wide], [1])
    tangent = b.value(2, Role.TANGENT)
    (gradient,) = b.op("b0", [tangent], [10], Phase.BACKWARD)
    (result,) = b.op("b1", [gradient, kept], [1], Phase.BACKWARD)
    program = b.program({loss: Role.OUTPUT, result: Role.GRADIENT})
    workspace = {0: 10}
    costs = Costs({op.id: OpCost(1.0, 0, workspace.get(op.id, 0)) for op in program.ops})
    recoveries = recompute_all(program)
    # Directly before b1, its gradient, the tangent, the result and the workspace need 33.
    budget = 5 + 24
    found = solve(program, costs, recoveries, budget_bytes=budget, max_slowdown=2.0)
    assert found.is_feasible
    check_schedule(program, recoveries, found.schedule)
    assert replay(program, recoveries, costs, found.schedule) == found.peak_bytes <= budget


def test_a_restore_does_not_move_to_before_its_value_was_made():
    b = Builder()
    x = b.value(5, Role.INPUT)
    (small,) = b.op("f0", [x], [1])
    (kept,) = b.op("f1", [x], [10])
    (wide,) = b.op("f2", [x], [15])
    (loss,) = b.op("f3", [small, kept, wide], [1])
    program = b.program({loss: Role.OUTPUT})
    costs = Costs({op.id: OpCost(1.0, 0, 10 * (op.id == 1)) for op in program.ops})
    problem = make_problem(program, recompute_all(program), costs)
    decisions = Decisions(frozenset(), frozenset({(kept, 3)}))
    account = account_of(problem, decisions)
    assert account.peak == 1 + 15 + 10 + 10
    hoisted = hoist(problem, decisions, account, target=33)
    assert hoisted == Decisions(frozenset(), frozenset({(kept, 2)}), frozenset({(kept, 2)}))
    assert account_of(problem, hoisted).peak <= 33


def updated_in_the_backward():
    """A wide value that an early op of the backward reads, and the last; its weight is updated."""
    b = Builder()
    x, weight = b.value(5, Role.INPUT), b.value(1, Role.PARAMETER)
    (wide,) = b.op("f0", [x, weight], [100])
    (loss,) = b.op("f1", [wide], [1])
    tangent = b.value(1, Role.TANGENT)
    (gradient,) = b.op("b0", [tangent, wide], [2], Phase.BACKWARD)
    b.op("update", [gradient, weight], [], Phase.BACKWARD, mutates=(weight,))
    (aside,) = b.op("b1", [gradient], [100], Phase.BACKWARD)
    (small,) = b.op("b2", [aside], [1], Phase.BACKWARD)
    (result,) = b.op("b3", [small, wide], [1], Phase.BACKWARD)
    return b.program({loss: Role.OUTPUT, result: Role.GRADIENT}), wide


def test_what_reads_an_updated_parameter_does_not_run_again():
    program, wide = updated_in_the_backward()
    costs, recoveries = unit_costs(program), recompute_all(program)
    problem = make_problem(program, recoveries, costs)
    assert problem.can_come_back(wide, 3) and not problem.can_come_back(wide, 6)
    account = account_of(problem, Decisions(frozenset({wide}), frozenset({(wide, 6)})))
    check_schedule(program, recoveries, to_schedule(problem, account))
    found = solve(program, costs, recoveries, budget_bytes=1)
    check_schedule(program, recoveries, found.schedule)
    assert found.peak_bytes >= 200
    exact = solve_exactly(problem, 210 - program.resident_bytes, 10.0)
    check_schedule(program, recoveries, exact.schedule)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40))
def test_the_maximum_of_any_stretch(values):
    highest = RangeMaximum(np.array(values))
    for start in range(len(values)):
        for stop in range(len(values) + 1):
            assert highest.between(start, stop) == max(values[start:stop], default=0)
