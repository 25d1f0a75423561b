"""Values that come back from later ones, on programs built by hand. No torch."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.program import Costs, Op, OpCost, Phase, Program, Role
from memplan.ir.schedule import Recovery, check_schedule
from memplan.planner import solve
from memplan.planner.problem import inverts, make_problem, make_problems

from support.programs import Builder, recompute_all, replay, unit_costs


def couplings(length: int, nbytes: int = 100) -> tuple[Program, list[int], list[int]]:
    """Two streams, each changed in turn by a function of the other; streams and changes."""
    b = Builder()
    given = b.value(nbytes, Role.INPUT)
    streams = [*b.op("stem", [given], [nbytes]), *b.op("other", [given], [nbytes])]
    changes = []
    for i in range(length):
        changes += b.op(f"f{i}", [streams[-1]], [nbytes])
        streams += b.op(f"sum{i}", [streams[-2], changes[-1]], [nbytes])
    (loss,) = b.op("loss", streams[-2:], [1])
    gradients = [b.value(1, Role.TANGENT)] * 2
    for i in reversed(range(length)):
        reads = [streams[i + 1], changes[i], *gradients]
        gradients = [gradients[1], *b.op(f"b{i}", reads, [nbytes], Phase.BACKWARD)]
    return b.program({loss: Role.OUTPUT, gradients[1]: Role.GRADIENT}), streams, changes


def undo(program: Program, streams: list[int], changes: list[int]) -> tuple[Recovery, ...]:
    """Each stream from the one two later, and its change."""
    first = 10_000
    return tuple(
        Recovery(
            "undo",
            (stream,),
            Op(
                first + i,
                "undo",
                (total, change),
                (stream,),
                Phase.BACKWARD,
                may_overwrite=(total,),
            ),
        )
        for i, (stream, total, change) in enumerate(
            zip(streams[:-2], streams[2:], changes, strict=True)
        )
    )


def with_undoing(costs: Costs, recoveries: tuple[Recovery, ...]) -> Costs:
    return Costs({**costs.by_op, **{one.restore_op.id: OpCost(0.1) for one in recoveries}})


def test_only_what_reads_results_of_what_it_restores_looks_back():
    program, streams, changes = couplings(4)
    assert all(inverts(program, one) for one in undo(program, streams, changes))
    assert not any(inverts(program, one) for one in recompute_all(program))


def test_what_streams_come_from_is_kept_and_so_are_anchors():
    program, streams, changes = couplings(6)
    undone = undo(program, streams, changes)
    recoveries = (*recompute_all(program), *undone)
    costs = with_undoing(unit_costs(program), undone)
    problem = make_problem(program, recoveries, costs, is_inverting=True)
    assert set(problem.inverted) == set(streams[:-2])
    assert not problem.recovery.keys() & set(streams[-2:])
    anchor = frozenset({streams[3]})
    problem = make_problem(program, recoveries, costs, is_inverting=True, anchors=anchor)
    assert streams[3] not in problem.recovery and streams[2] in problem.inverted
    assert len(make_problems(program, recoveries, costs)) == 2
    assert len(make_problems(program, recompute_all(program), costs)) == 1


def test_memory_does_not_grow_with_depth():
    peaks = []
    for length in (8, 16):
        program, streams, changes = couplings(length)
        undone = undo(program, streams, changes)
        recoveries = (*recompute_all(program), *undone)
        costs = with_undoing(unit_costs(program), undone)
        found = solve(program, costs, recoveries, max_slowdown=2.0)
        check_schedule(program, recoveries, found.schedule)
        assert replay(program, recoveries, costs, found.schedule) == found.peak_bytes
        peaks.append(found.peak_bytes)
    assert len(set(peaks)) == 1
    assert solve(program, costs, recompute_all(program), max_slowdown=2.0).peak_bytes > peaks[0]


@settings(max_examples=12, deadline=None)
@given(st.integers(3, 14), st.floats(0.1, 1.0), st.sets(st.integers(0, 10)))
def test_schedules_are_legal_and_within_any_budget_that_is_met(length, share, kept):
    program, streams, changes = couplings(length)
    undone = undo(program, streams, changes)
    recoveries = (*recompute_all(program), *undone)
    costs = with_undoing(unit_costs(program), undone)
    anchors = frozenset(streams[i] for i in kept if i < len(streams) - 2)
    most = solve(program, costs, recoveries, max_slowdown=1.0).peak_bytes
    budget = int(share * most)
    found = solve(program, costs, recoveries, budget_bytes=budget, anchors=anchors)
    check_schedule(program, recoveries, found.schedule)
    assert replay(program, recoveries, costs, found.schedule) == found.peak_bytes
    assert found.is_feasible == (found.peak_bytes <= budget)
    assert (
        not {
            value
            for one in undone
            if one.restore_op.id in found.schedule.restored_ops
            for value in one.values
        }
        & anchors
    )
