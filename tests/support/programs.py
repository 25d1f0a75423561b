"""Hand-built and random programs, and a brute-force planner. No torch."""

from __future__ import annotations

import random
from itertools import combinations

from hypothesis import strategies as st

from memplan.ir.program import Costs, Op, OpCost, Phase, Program, Role, Value
from memplan.ir.schedule import Catalog, Free, Recovery


class Builder:
    """Appends values and ops; the tests read like the program."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.ops: list[Op] = []

    def value(self, nbytes: int, role: Role, producer: int | None = None) -> int:
        self.values.append(Value(len(self.values), nbytes, role, producer))
        return len(self.values) - 1

    def op(self, target: str, operands, nbytes, phase=Phase.FORWARD, **more) -> tuple[int, ...]:
        id = len(self.ops)
        results = tuple(self.value(size, Role.ACTIVATION, id) for size in nbytes)
        self.ops.append(Op(id, target, tuple(dict.fromkeys(operands)), results, phase, **more))
        return results

    def program(self, outputs: dict[int, Role]) -> Program:
        values = tuple(
            Value(v.id, v.nbytes, outputs.get(v.id, v.role), v.producer) for v in self.values
        )
        return Program(tuple(self.ops), values, tuple(sorted(outputs)))


def chain(length: int, nbytes: int = 100) -> Program:
    """A chain of ops, each backward op reading the input of its forward op."""
    b = Builder()
    states = [b.value(nbytes, Role.INPUT)]
    for i in range(length):
        states += b.op(f"f{i}", [states[-1]], [nbytes])
    gradient = b.value(nbytes, Role.TANGENT)
    for i in reversed(range(length)):
        (gradient,) = b.op(f"b{i}", [states[i], gradient], [nbytes], Phase.BACKWARD)
    return b.program({states[-1]: Role.OUTPUT, gradient: Role.GRADIENT})


STATE_BYTES = 3


def recompute_all(program: Program) -> tuple[Recovery, ...]:
    """Every deterministic forward op may run again, every random one under its kept state.

    What a random op alone made may be kept packed as well.
    """
    recoveries = []
    next_op, next_value = len(program.ops), len(program.values)
    for op in program.ops[: program.num_forward]:
        if not op.is_random:
            recoveries.append(Recovery("test", op.results, op))
            continue
        save = Op(next_op, "save", (), (next_value,))
        draw = Op(next_op + 1, "redraw", (next_value, *op.operands), op.results)
        state = Value(next_value, STATE_BYTES, Role.KEPT, next_op)
        recoveries.append(Recovery("test", op.results, draw, save, (state,)))
        next_op, next_value = next_op + 2, next_value + 1
        if len(op.results) > 1:
            continue
        nbytes = 1 + program.values[op.results[0]].nbytes // 8
        pack = Op(next_op, "pack", op.results, (next_value,))
        unpack = Op(next_op + 1, "unpack", (next_value,), op.results)
        bits = Value(next_value, nbytes, Role.KEPT, next_op)
        recoveries.append(Recovery("test", op.results, unpack, pack, (bits,)))
        next_op, next_value = next_op + 2, next_value + 1
    return tuple(recoveries)


def num_all_ops(program: Program) -> int:
    """Ops of a program and of ``recompute_all``."""
    catalog = Catalog.of(program, recompute_all(program))
    return len(catalog.ops)


def unit_costs(program: Program) -> Costs:
    """One second an op, no workspace."""
    return Costs({op.id: OpCost(1.0) for op in program.ops}, "test")


@st.composite
def programs(draw, max_forward: int = 12) -> tuple[Program, Costs]:
    """A random training step: fan-out, several results, random ops, uneven sizes and costs."""
    b = Builder()
    known = [b.value(draw(st.integers(1, 50)), Role.INPUT) for _ in range(2)]
    num_forward = draw(st.integers(3, max_forward))
    for i in range(num_forward):
        operands = draw(st.lists(st.sampled_from(known[-6:]), min_size=1, max_size=3))
        sizes = draw(st.lists(st.integers(0, 50), min_size=1, max_size=2))
        over = ()
        if b.values[operands[0]].producer is not None and draw(st.booleans()):
            over, sizes = (operands[0],), [b.values[operands[0]].nbytes]
        is_random = not over and draw(st.integers(0, 5)) == 0
        known += b.op(f"f{i}", operands, sizes, is_random=is_random, may_overwrite=over)
    made = [id for id in known if b.values[id].producer is not None]
    output = made[-1]
    backward = [b.value(draw(st.integers(1, 50)), Role.TANGENT)]
    gradients: dict[int, Role] = {}
    for i in range(draw(st.integers(2, num_forward))):
        reads = draw(st.lists(st.sampled_from(known), min_size=0, max_size=3))
        reads.append(draw(st.sampled_from(backward[-3:])))
        size, over = draw(st.integers(0, 50)), ()
        if b.values[reads[-1]].producer is not None and draw(st.booleans()):
            over, size = (reads[-1],), b.values[reads[-1]].nbytes
        results = b.op(f"b{i}", reads, [size], Phase.BACKWARD, may_overwrite=over)
        backward += results
        if draw(st.booleans()):
            gradients[results[0]] = Role.GRADIENT
    program = b.program({output: Role.OUTPUT, **gradients})
    num_ops = num_all_ops(program)
    costs = Costs(
        {
            id: OpCost(draw(st.integers(1, 9)), workspace_bytes=draw(st.integers(0, 20)))
            for id in range(num_ops)
        }
    )
    return program, costs


def training_step(seed: int, num_forward: int) -> tuple[Program, Costs]:
    """A random step whose backward visits the forward's values in reverse, as autograd does."""
    draw = random.Random(seed)
    b = Builder()
    known = [b.value(draw.randint(1, 50), Role.INPUT) for _ in range(2)]
    for i in range(num_forward):
        near = [min(len(known), 1 + int(draw.expovariate(0.4))) for _ in range(draw.randint(1, 3))]
        operands = [known[-distance] for distance in near]
        known += b.op(f"f{i}", operands, [draw.randint(1, 50)], is_random=draw.random() < 0.1)
    gradients = [b.value(5, Role.TANGENT)]
    held = {known[-1]: Role.OUTPUT}
    for i, id in enumerate(reversed(known[2:])):
        reads = [id] * (draw.random() < 0.8) + [id - 1] * (draw.random() < 0.6)
        size = draw.randint(1, 50)
        gradients += b.op(f"b{i}", [*reads, gradients[-1]], [size], Phase.BACKWARD)
        if draw.random() < 0.3:
            held[gradients[-1]] = Role.GRADIENT
    program = b.program(held)
    num_ops = num_all_ops(program)
    costs = {
        id: OpCost(draw.randint(1, 9), workspace_bytes=draw.randint(0, 10)) for id in range(num_ops)
    }
    return program, Costs(costs)


def subsets(items: list[int]):
    """All subsets, small ones first."""
    for size in range(len(items) + 1):
        yield from combinations(items, size)


def replay(program, recoveries, costs, schedule) -> int:
    """The peak, slow and obvious: a dictionary of what is alive."""
    catalog = Catalog.of(program, recoveries)
    alive = {v.id: v.nbytes for v in program.values if v.role.is_resident}
    peak = sum(alive.values())
    for position, step in enumerate(schedule.steps):
        if position == len(schedule.forward):
            alive |= {v.id: v.nbytes for v in program.values if v.role is Role.TANGENT}
        if isinstance(step, Free):
            del alive[step.value]
            continue
        op = catalog.ops[step.op]
        assert step.over is None or step.over in op.may_overwrite
        assert all(value in alive for value in op.operands)
        if step.over is not None:
            del alive[step.over]
        results = {value: catalog.values[value].nbytes for value in op.results}
        inside = sum(results.values()) + costs.by_op[op.id].workspace_bytes
        peak = max(peak, sum(alive.values()) + inside)
        alive |= {value: results[value] for value in step.binds}
    return peak
