"""Pricing of a trace: a program of true sizes, with the cost of every op that may run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count

from torch import nn
from torch.optim import Optimizer

from memplan.capture import (
    Captured,
    Layouts,
    Lowering,
    Traced,
    other_layouts,
    read,
    trained_by,
    update_parameter,
)
from memplan.capture.sample import Sample
from memplan.costs import CPU, Device, analytic_costs, device_named, measured_costs
from memplan.errors import CaptureError, MemplanError
from memplan.ir.program import Costs, Memory, Op, OpCost, Phase, Value
from memplan.ir.schedule import Recovery
from memplan.optimizer import UpdateCost, group_of, resolve_optimizer, update_cost, with_update
from memplan.options import Options
from memplan.torch_internals import is_fake
from memplan.transforms.passes import Pass, RecoveryContext


@dataclass(frozen=True, slots=True)
class Pricing:
    """The way in which ops are priced.

    Attributes:
        costs: as in ``Options``.
        has_data: whether model and sample have data, so that kernels can be measured.
        device: the device to plan for, if the model is on another.
        update: cost of the optimizer's update, where there is one.
    """

    costs: object
    has_data: bool
    device: Device | None
    update: UpdateCost | None = None

    @classmethod
    def of(cls, model: nn.Module, sample: Sample, options: Options) -> Pricing:
        """The pricing that the options ask for."""
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
        """The trace, with the ``layouts`` observed from its kernels."""
        known: dict[str, Layouts] = {}
        traced = trace(layouts=known)
        # An op may refuse what the trace recorded wrongly of the ops before it.
        while others := other_layouts(*self._price(read(traced), ()), known):
            known |= others
            traced = trace(layouts=known)
        return traced

    def read(self, traced: Traced) -> Captured:
        """The trace as a program, the optimizer's part included."""
        captured = read(traced)
        return captured if self.update is None else with_update(captured, self.update)

    def price_offered(
        self, captured: Captured, recoveries: tuple[Recovery, ...]
    ) -> tuple[Captured, tuple[Recovery, ...], Costs]:
        """Costs of all ops, and the program and the stashes at their real sizes.

        Raises:
            CaptureError: naming an op that cannot be measured.
        """
        priced, costs = self.price(captured, recoveries)
        is_cuda = captured.device.type == "cuda" or bool(self.device and self.device.is_cuda)
        granule_bytes = 1 if self.device is None else self.device.granule_bytes
        sized = (_sized(one, costs, is_cuda, granule_bytes) for one in recoveries)
        return priced, tuple(sized), costs

    def price(
        self, captured: Captured, recoveries: tuple[Recovery, ...] = ()
    ) -> tuple[Captured, Costs]:
        """Costs of all ops, and the program with its values at their real sizes.

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
            new = (recovery.stash_op, recovery.restore_op)  # stashes are measured first
            ops.update({op.id: op for op in new if op is not None})
        stashed = [value for recovery in recoveries for value in recovery.stashed]
        costs = self._costs(captured, ops.values(), stashed)
        program = captured.program.with_real_sizes(costs)
        if self.device is not None:
            program = program.in_blocks_of(self.device.granule_bytes)
        return replace(captured, program=program), costs

    def with_optimizer(
        self, model: nn.Module, traced: Traced, optimizer: Optimizer, *, in_backward: bool
    ) -> Pricing:
        """The same with the optimizer's cost after this step.

        Raises:
            MemplanError: if the optimizer no longer covers the model's parameters.
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

    def _costs(self, captured: Captured, ops: Iterable[Op], stashed: list[Value]) -> Costs:
        """Costs of the graph's ops, and of the updates."""
        ops = list(ops)
        updates = {op.id: cost for op in ops if (cost := self._update_cost(captured, op))}
        others = [op for op in ops if op.id not in updates]
        costs = self._graph_costs(captured, others, stashed)
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

    def _graph_costs(self, captured: Captured, ops: list[Op], stashed: list[Value]) -> Costs:
        if isinstance(self.costs, Costs):
            missing = [op for op in ops if op.id not in self.costs.by_op]
            if missing:
                raise MemplanError(
                    f"Options(costs=...) has no cost for {len(missing)} of {len(ops)} ops, the "
                    f"first of them op {missing[0].id} ({missing[0].target})"
                )
            return self.costs
        if self.device is not None:
            return analytic_costs(captured, ops, self.device, stashed)
        if self.costs == "analytic" or not self.has_data:
            return analytic_costs(captured, ops, stashed=stashed)
        return measured_costs(captured, ops)


def _sized(recovery: Recovery, costs: Costs, is_cuda: bool, granule_bytes: int) -> Recovery:
    """A recovery with its stash at the observed size; on the host only where that is another."""
    seen: dict[int, int] = {}
    if recovery.stash_op is not None:
        sizes = costs.by_op[recovery.stash_op.id].result_bytes
        seen = dict(zip(recovery.stash_op.results, sizes, strict=False))
    stashed = []
    for value in recovery.stashed:
        on_host = is_cuda and value.device is Memory.HOST
        nbytes = value.nbytes if on_host else seen.get(value.id, value.nbytes)
        nbytes = -(-nbytes // granule_bytes) * granule_bytes
        device = Memory.HOST if on_host else Memory.DEVICE
        stashed.append(replace(value, device=device, nbytes=nbytes))
    return replace(recovery, stashed=tuple(stashed))


def offers(captured: Captured, passes: Iterable[Pass]) -> tuple[Captured, tuple[Recovery, ...]]:
    """The step with the lowerings of added ops, and the recoveries that all passes offer.

    Raises:
        MemplanError: if a pass adds an op without saying how it is called, or if another pass says
            otherwise.
    """
    passes = tuple(passes)
    lowerings = _lowerings(passes)
    captured = replace(captured, lowerings=lowerings)
    program = captured.program
    context = RecoveryContext(count(len(program.ops)), count(len(program.values)))
    offered = tuple(
        recovery
        for one in passes
        if one.recoveries is not None
        for recovery in one.recoveries(captured, context)
    )
    for recovery in offered:
        _check_lowered(len(program.ops), lowerings, recovery)
    return captured, offered


def _lowerings(passes: Iterable[Pass]) -> dict[str, Lowering]:
    """The lowerings of all passes, by target."""
    lowerings: dict[str, Lowering] = {}
    for one in passes:
        for target, lowering in one.lowerings.items():
            if lowerings.setdefault(target, lowering) is not lowering:
                raise MemplanError(
                    f"two passes say how an op {target!r} is called, one of them {one.name}; "
                    "put the name of the pass into the target's"
                )
    return lowerings


def _check_lowered(num_ops: int, lowerings: Mapping[str, Lowering], recovery: Recovery) -> None:
    """Refuse an op that no pass has a lowering for."""
    for op in (recovery.stash_op, recovery.restore_op):
        is_new = op is not None and op.id >= num_ops
        if op is not None and is_new and (op.variant_of is None or op.target not in lowerings):
            raise MemplanError(
                f"the pass {recovery.pass_name} adds an op {op.target!r}, and does not say how it "
                f"is called: Pass(lowerings={{{op.target!r}: ...}})"
            )
