"""The predicted trace of a schedule. No torch here."""

from __future__ import annotations

from dataclasses import replace

from memplan.ir.liveness import ScheduledStep
from memplan.ir.memory_trace import (
    WORKSPACE,
    Allocation,
    MemoryTrace,
    Resident,
    spans_of,
)
from memplan.ir.program import Phase, Role
from memplan.ir.schedule import Free, start_of_backward


def predicted_trace(step: ScheduledStep, device: str) -> MemoryTrace:
    """Every block of a step, by the account of ``ScheduledStep.timeline``.

    Times are sums of costs. Incoming gradients are allocated when the backward starts.
    """
    return _Prediction(step).trace(device)


class _Prediction:
    def __init__(self, step: ScheduledStep) -> None:
        self.step = step
        self.program = step.program
        self.catalog = step.catalog
        self.schedule = step.schedule
        self.costs = step.costs
        self.blocks: list[Allocation] = []
        self.open: dict[int, int] = {}
        self.times_s: list[float] = []
        self.phases: list[str] = []
        self.now_s = 0.0

    def trace(self, device: str) -> MemoryTrace:
        phase = Phase.FORWARD
        first = start_of_backward(self.program, self.schedule)
        for position, step in enumerate(self.schedule.steps):
            if position == first:
                phase = Phase.BACKWARD
                self.make_tangents()
            if isinstance(step, Free):
                self.free(step.value, phase)
                continue
            if self.catalog.ops[step.op].phase is Phase.OPTIMIZER:
                phase = Phase.OPTIMIZER
            if step.over is not None:
                self.free(step.over, phase)
            self.run(step.op, step.binds, phase)
        return MemoryTrace(
            kind="predicted",
            device=device,
            residents=tuple(
                Resident(value.name, value.nbytes, value.role.value)
                for value in self.program.values
                if value.role.is_resident
            ),
            blocks=tuple(self.blocks),
            times_s=tuple(self.times_s),
            spans=spans_of(self.phases),
        )

    def make_tangents(self) -> None:
        for value in self.program.values:
            if value.role is Role.TANGENT:
                self.make(value.id, Phase.BACKWARD)

    def run(self, op: int, binds: tuple[int, ...], phase: Phase) -> None:
        results = self.catalog.ops[op].results
        for value in results:
            self.make(value, phase)
        workspace_bytes = self.costs.by_op[op].workspace_bytes
        if workspace_bytes:
            self.happen(phase)
            self.blocks.append(self.block(op, workspace_bytes, WORKSPACE, "", phase))
        self.now_s += self.costs.seconds[op]
        if workspace_bytes:
            self.close(len(self.blocks) - 1, phase)
        for value in set(results) - set(binds):
            self.free(value, phase)

    def make(self, id: int, phase: Phase) -> None:
        value = self.catalog.values[id]
        category = self.step.category(value)
        self.happen(phase)
        self.open[id] = len(self.blocks)
        self.blocks.append(
            self.block(value.producer, value.device_bytes, category, value.name, phase)
        )

    def block(
        self, producer: int | None, nbytes: int, category: str, name: str, phase: Phase
    ) -> Allocation:
        op = None if producer is None else self.catalog.ops[producer]
        return Allocation(
            nbytes=nbytes,
            category=category,
            phase=phase.value,
            op="the caller" if op is None else op.target,
            module="" if op is None else op.module,
            source="" if op is None else op.source,
            name=name,
            made=len(self.times_s) - 1,
            freed=None,
        )

    def free(self, id: int, phase: Phase) -> None:
        self.close(self.open.pop(id), phase)

    def close(self, number: int, phase: Phase) -> None:
        self.happen(phase)
        block = self.blocks[number]
        self.blocks[number] = replace(block, freed=len(self.times_s) - 1)

    def happen(self, phase: Phase) -> None:
        self.times_s.append(self.now_s)
        self.phases.append(phase.value)
