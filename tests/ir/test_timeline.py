"""The account of hand-built programs whose numbers are known."""

from __future__ import annotations

from memplan.ir.liveness import ScheduledStep, floor_bytes
from memplan.ir.program import Costs, OpCost, Phase, Role
from memplan.planner import keep_all

from support.programs import Builder, chain, recompute_all, unit_costs


def test_a_chain_peaks_when_its_backward_starts():
    program = chain(4, nbytes=10)
    costs = unit_costs(program)
    timeline = ScheduledStep(program, (), costs, keep_all(program, costs)).timeline
    # input, three saved states, output, tangent, and the first gradient
    assert timeline.peak_bytes == 10 * 7
    assert program.ops[timeline.peak.op].target == "b3"
    assert timeline.resident_bytes == 10


def two_ops() -> Builder:
    b = Builder()
    x = b.value(1000, Role.INPUT)
    (h,) = b.op("f0", [x], [100])
    (y,) = b.op("f1", [h], [8])
    t = b.value(8, Role.TANGENT)
    (g,) = b.op("b1", [h, t], [100], Phase.BACKWARD)
    (gx,) = b.op("b0", [x, g], [1000], Phase.BACKWARD)
    b.outputs = {y: Role.OUTPUT, gx: Role.GRADIENT}
    return b


def test_workspace_counts_only_while_its_op_runs():
    builder = two_ops()
    program = builder.program(builder.outputs)
    costs = Costs({op.id: OpCost(1.0, workspace_bytes=5000 * (op.id == 0)) for op in program.ops})
    timeline = ScheduledStep(program, (), costs, keep_all(program, costs)).timeline
    assert timeline.peak_bytes == 1000 + 100 + 5000
    assert timeline.moments[0].live_bytes == 1000 + 100


def test_categories_add_up_to_the_peak():
    builder = two_ops()
    program = builder.program(builder.outputs)
    costs = Costs({op.id: OpCost(1.0, workspace_bytes=7) for op in program.ops})
    step = ScheduledStep(program, (), costs, keep_all(program, costs))
    assert sum(step.categories.values()) == step.peak_bytes
    assert step.categories == {
        "input": 1000,
        "temporary": 100,
        "output": 8,
        "tangent": 8,
        "gradient": 1000,
        "workspace": 7,
    }


def test_the_floor_of_a_chain_is_one_op_with_what_the_caller_holds():
    program = chain(32, nbytes=10)
    # input, output, tangent, the incoming gradient, the operand, the result
    assert floor_bytes(program, recompute_all(program), unit_costs(program)) == 60


def test_the_fingerprint_sees_structure_and_not_names():
    assert chain(4).fingerprint == chain(4).fingerprint
    assert chain(4).fingerprint != chain(5).fingerprint
    assert chain(4, 10).fingerprint != chain(4, 11).fingerprint
