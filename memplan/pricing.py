"""From a trace to a program of true sizes, with the cost of every op that may run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from memplan.capture import Captured, Strides, Traced, other_layouts, read, with_layouts
from memplan.costs import Device, analytic_costs, device_named, measured_costs
from memplan.errors import CaptureError, MemplanError
from memplan.options import Options
from memplan.passing import Pass, RecoveryContext
from memplan.program import Costs, Op
from memplan.sample import Sample
from memplan.schedule import Recovery
from memplan.torch_internals import is_fake


@dataclass(frozen=True, slots=True)
class Pricing:
    """How ops are priced.

    Attributes:
        costs: as in ``Options``.
        has_data: whether model and sample do, so that kernels can be measured.
        device: to plan for another device than the model is on.
    """

    costs: object
    has_data: bool
    device: Device | None

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

    def read_as_run(self, traced: Traced) -> tuple[Traced, Captured, Costs]:
        """Read a trace, with the layouts that its kernels were seen to make."""
        known: dict[str, Strides] = {}
        while True:
            captured, costs = self.price(read(traced), ())
            others = other_layouts(captured, costs)
            if not others:
                return traced, captured, costs
            known |= others
            traced = with_layouts(traced, known)

    def price(self, captured: Captured, recoveries: tuple[Recovery, ...]) -> tuple[Captured, Costs]:
        """Costs of all ops, and the program with its values as large as they really are."""
        ops = {op.id: op for op in captured.program.ops}
        for recovery in recoveries:
            new = (recovery.restore, recovery.prepare)
            ops.update({op.id: op for op in new if op is not None})
        costs = self._costs(captured, ops.values())
        program = captured.program.with_real_sizes(costs)
        if self.device is not None:
            program = program.in_blocks_of(self.device.granule_bytes)
        return replace(captured, program=program), costs

    def _costs(self, captured: Captured, ops: Iterable[Op]) -> Costs:
        ops = list(ops)
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
