"""Proven optima and bounds: against brute force, and the search against them."""

from __future__ import annotations

import importlib
import math

import pytest
from hypothesis import given, settings

from memplan.errors import MemplanError
from memplan.ir.program import Phase, Role
from memplan.ir.schedule import check_schedule
from memplan.planner import bound_seconds, frontier, prove, solve
from memplan.planner.account import Decisions, account_of, keep_everything
from memplan.planner.bound import least_seconds
from memplan.planner.exact import solve_exactly
from memplan.planner.problem import make_problem

from support.programs import (
    Builder,
    chain,
    programs,
    recompute_all,
    replay,
    subsets,
    training_step,
    unit_costs,
)

WHOLE_EFFORT = True
LIMIT_S = 20.0


def once(account) -> bool:
    """Whether no op is restored twice."""
    restored = [call.op for call in account.calls if call.kind.__name__ == "Restore"]
    return len(set(restored)) == len(restored)


@settings(max_examples=15, deadline=None)
@given(programs(max_forward=5))
def test_the_optimum_is_legal_and_no_choice_of_what_to_keep_beats_it(made):
    program, costs = made
    recoveries = recompute_all(program)
    problem = make_problem(program, recoveries, costs)
    base = account_of(problem, keep_everything(problem))
    every = [
        account_of(problem, Decisions(frozenset(kept), frozenset()))
        for kept in subsets(sorted(problem.recovery))
    ]
    for target in (int(0.9 * base.peak), int(0.7 * base.peak)):
        exact = solve_exactly(problem, target, LIMIT_S)
        assert exact.is_proven
        feasible = [one.seconds for one in every if one.peak <= target and once(one)]
        assert exact.seconds <= min(feasible, default=math.inf) + 1e-9
        assert least_seconds(problem, target) <= exact.seconds + 1e-6
        if exact.schedule is not None:
            check_schedule(program, recoveries, exact.schedule)
            peak = replay(program, recoveries, costs, exact.schedule)
            assert peak - program.resident_bytes <= target


def test_an_output_stays_while_the_op_that_made_it_runs_again():
    b = Builder()
    x = b.value(10, Role.INPUT)
    inner, output = b.op("f", [x], [50, 80])
    tangent = b.value(10, Role.TANGENT)
    (between,) = b.op("b0", [tangent], [20], Phase.BACKWARD)
    b.op("b1", [tangent], [100], Phase.BACKWARD)
    (gradient,) = b.op("b2", [inner, between], [10], Phase.BACKWARD)
    program = b.program({output: Role.OUTPUT, gradient: Role.GRADIENT})
    problem = make_problem(program, recompute_all(program), unit_costs(program))
    exact = solve_exactly(problem, 230, LIMIT_S)
    assert exact.is_proven
    assert exact.schedule is None


@pytest.mark.slow
def test_the_search_is_within_a_percent_of_the_optimum_and_at_most_five():
    ratios = []
    for seed in range(12):
        program, costs = training_step(seed, num_forward=14)
        recoveries = recompute_all(program)
        problem = make_problem(program, recoveries, costs)
        peak = account_of(problem, keep_everything(problem)).peak
        for share in (0.9, 0.8, 0.7):
            target = int(share * peak)
            exact = solve_exactly(problem, target, LIMIT_S)
            assert exact.is_proven
            if exact.schedule is None:
                continue
            found = solve(
                program,
                costs,
                recoveries,
                budget_bytes=target + program.resident_bytes,
                max_slowdown=9.0,
            )
            assert found.is_feasible
            ratios.append(found.seconds / exact.seconds)
    assert len(ratios) >= 12
    assert math.prod(ratios) ** (1 / len(ratios)) <= 1.01
    assert max(ratios) <= 1.05


def test_a_plan_is_never_faster_than_its_bound():
    program = chain(24)
    costs, recoveries = unit_costs(program), recompute_all(program)
    for budget in (2000, 1600, 1200):
        found = solve(program, costs, recoveries, budget_bytes=budget)
        bound = bound_seconds(program, costs, recoveries, budget_bytes=budget)
        assert len(program.ops) < bound <= found.seconds
    assert math.isinf(bound_seconds(program, costs, recoveries, budget_bytes=300))


def test_the_solver_improves_what_was_found_or_keeps_it():
    program, costs = training_step(3, num_forward=10)
    recoveries = recompute_all(program)
    problem = make_problem(program, recoveries, costs)
    everything = account_of(problem, keep_everything(problem))
    budget = int(0.8 * everything.peak) + program.resident_bytes
    found = solve(program, costs, recoveries, budget_bytes=budget)
    proven = prove(program, costs, recoveries, found, budget_bytes=budget, time_limit_s=LIMIT_S)
    assert proven.is_feasible and proven.seconds <= found.seconds
    assert proven.peak_bytes <= budget


@pytest.mark.slow
def test_the_frontier_trades_memory_for_time():
    program = chain(32)
    costs, recoveries = unit_costs(program), recompute_all(program)
    found = frontier(program, costs, recoveries, points=12)
    assert len(found) >= 6
    peaks = [one.peak_bytes for one in found]
    times = [one.seconds for one in found]
    assert peaks == sorted(set(peaks)) and times == sorted(set(times), reverse=True)
    assert times[-1] == len(program.ops)
    for one in found:
        check_schedule(program, recoveries, one.schedule)
        assert replay(program, recoveries, costs, one.schedule) == one.peak_bytes


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    program = chain(8)
    with pytest.raises(MemplanError, match=r"memplan\[exact\]"):
        bound_seconds(program, unit_costs(program), recompute_all(program), budget_bytes=600)
