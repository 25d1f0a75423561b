"""From a trace to a program of true sizes, with the cost of every op that may run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import nn
from torch.optim import Optimizer

from memplan.capture import (
    Captured,
    Layouts,
    Traced,
    other_layouts,
    read,
    trained_by,
    update_parameter,
)
from memplan.costs import CPU, Device, analytic_costs, device_named, measured_costs
from memplan.errors import CaptureError, MemplanError
from memplan.options import Options
from memplan.passing import Pass, RecoveryContext
from memplan.program import Costs, Op, OpCost, Phase
from memplan.sample import Sample
from memplan.schedule import Recovery
from memplan.torch_internals import is_fake
from memplan.update import UpdateCost, group_of, resolve_optimizer, update_cost, with_update


@dataclass(frozen=True, slots=True)
class Pricing:
    """How ops are priced.

    Attributes:
        costs: as in ``Options``.
        has_data: whether model and sample do, so that kernels can be measured.
        device: to plan for another device than the model is on.
        update: of the optimizer, where there is one.
    """

    costs: object
    has_data: bool
    device: Device | None
    update: UpdateCost | None = None

    @classmethod
    def of(cls, model: nn.Module, sample: Sample, options: Options) -> Pricing:
        """What the options ask for."""
        tensors = (*model.parameters(), *model.buffers(), *sample.tensors())
        has_data = not any(is_fake(tensor) or tensor.is_meta for tensor in tensors)
        device = None if options.device is None else device_named(options.device)
        if options.costs == "measured" and not (has_data and device is None):
            raise CaptureError(
                'Options(costs="measured") needs a model and a sample with data, and the device '
                'that they are on; use "analytic"'
            )
        return cls(options.costs, has_data, device)

    def as_run(self, trace: Callable[..., Traced]) -> Traced:
        """The trace, with the ``layouts`` that its kernels were seen to make."""
        known: dict[str, Layouts] = {}
        traced = trace(layouts=known)
        # What an op refuses may be what the trace recorded wrongly of the ops before it.
        while others := other_layouts(*self._price(read(traced), ()), known):
            known |= others
            traced = trace(layouts=known)
        return traced

    def read(self, traced: Traced) -> Captured:
        """The trace as a program, the optimizer's part included."""
        captured = read(traced)
        return captured if self.update is None else with_update(captured, self.update)

    def price(
        self, captured: Captured, recoveries: tuple[Recovery, ...] = ()
    ) -> tuple[Captured, Costs]:
        """Costs of all ops, and the program with its values as large as they really are.

        Raises:
            CaptureError: naming an op that cannot be measured.
        """
        priced, costs = self._price(captured, recoveries)
        for cost in costs.by_op.values():
            if cost.refusal:
                raise CaptureError(cost.refusal)
        return priced, costs

    def _price(
        self, captured: Captured, recoveries: tuple[Recovery, ...]
    ) -> tuple[Captured, Costs]:
        ops = {op.id: op for op in captured.program.ops}
        for recovery in recoveries:
            new = (recovery.restore, recovery.prepare)
            ops.update({op.id: op for op in new if op is not None})
        costs = self._costs(captured, ops.values())
        program = captured.program.with_real_sizes(costs)
        if self.device is not None:
            program = program.in_blocks_of(self.device.granule_bytes)
        return replace(captured, program=program), costs

    def with_optimizer(
        self, model: nn.Module, traced: Traced, optimizer: Optimizer, *, in_backward: bool
    ) -> Pricing:
        """The same with what the optimizer costs after this step.

        Raises:
            MemplanError: if the optimizer is not one over the model's parameters any more.
        """
        resolve_optimizer(model, optimizer)
        device = self.device
        if device is None and (self.costs == "analytic" or not self.has_data):
            device = CPU
        held = group_of(optimizer)
        trained = {
            name: parameter
            for name, parameter in trained_by(traced, model).items()
            if id(parameter) in held
        }
        on_cuda = any(parameter.is_cuda for parameter in trained.values())
        if device is None and on_cuda:
            device = replace(CPU, name="CUDA", is_cuda=True)
        cost = update_cost(optimizer, trained, one_by_one=in_backward, device=device)
        return replace(self, update=cost)

    def _costs(self, captured: Captured, ops: Iterable[Op]) -> Costs:
        """Costs of ops of the graph, and of the updates."""
        ops = list(ops)
        updates = {op.id: cost for op in ops if (cost := self._update_cost(captured, op))}
        costs = self._graph_costs(captured, [op for op in ops if op.id not in updates])
        return replace(costs, by_op={**costs.by_op, **updates})

    def _update_cost(self, captured: Captured, op: Op) -> OpCost | None:
        if self.update is None:
            return None
        if op.phase is Phase.OPTIMIZER:
            return self.update.cost
        node = captured.calls.get(op.id)
        if node is None or node.target is not update_parameter:
            return None
        return self.update.each[captured.program.values[op.mutates[0]].name]

    def _graph_costs(self, captured: Captured, ops: list[Op]) -> Costs:
        if isinstance(self.costs, Costs):
            missing = [op for op in ops if op.id not in self.costs.by_op]
            if missing:
                raise MemplanError(
                    f"Options(costs=...) has no cost for {len(missing)} of {len(ops)} ops, the "
                    f"first of them op {missing[0].id} ({missing[0].target})"
                )
            return self.costs
        if self.device is not None:
            return analytic_costs(captured, ops, self.device)
        if self.costs == "analytic" or not self.has_data:
            return analytic_costs(captured, ops)
        return measured_costs(captured, ops)


def offers(captured: Captured, passes: Iterable[Pass]) -> tuple[Recovery, ...]:
    """What all passes offer, with ids that do not collide."""
    offered: tuple[Recovery, ...] = ()
    first_op, first_value = len(captured.program.ops), len(captured.program.values)
    for one in passes:
        if one.recoveries is None:
            continue
        new = one.recoveries(captured, RecoveryContext(first_op, first_value))
        for recovery in new:
            ids = [recovery.restore.id, -1 if recovery.prepare is None else recovery.prepare.id]
            first_op = max(first_op, *(id + 1 for id in ids))
            first_value = max([first_value, *(value.id + 1 for value in recovery.keeps)])
        offered += new
    return offered
