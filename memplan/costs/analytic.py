"""Costs by a roofline: nothing is allocated and nothing is run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from memplan.capture import Captured
from memplan.program import Costs, Op, OpCost
from memplan.torch_internals import OpOverload

_RANDOM_S_PER_ELEMENT = 10e-9
"""The CPU's generator is serial; it takes about this long for each number that it draws."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a roofline needs to know.

    Attributes:
        name: for reports.
        bytes_per_s: memory bandwidth.
        flops_per_s: arithmetic throughput.
        launch_s: time of an op that does nothing.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    launch_s: float


CPU = Device("two CPU cores", bytes_per_s=8e9, flops_per_s=60e9, launch_s=4e-6)


def analytic_costs(captured: Captured, ops: Iterable[Op], device: Device = CPU) -> Costs:
    """Time is the sum of launch, traffic and arithmetic. Workspace is taken to be none."""
    by_op = {op.id: _cost(captured, op, device) for op in ops}
    return Costs(by_op, f"analytic, {device.name}")


def _cost(captured: Captured, op: Op, device: Device) -> OpCost:
    if op.target == "memplan.save_rng_state":
        return OpCost(device.launch_s)
    node = captured.calls[op.id if op.variant_of is None else op.variant_of]
    results = _tensors(node.meta["val"])
    operands = [
        tensor for source in node.all_input_nodes for tensor in _tensors(source.meta["val"])
    ]
    traffic = sum(tensor.numel() * tensor.element_size() for tensor in (*results, *operands))
    flops = _flops(node)
    seconds = device.launch_s + traffic / device.bytes_per_s + flops / device.flops_per_s
    if op.is_random or op.target == "memplan.redraw":
        seconds += _RANDOM_S_PER_ELEMENT * max((tensor.numel() for tensor in results), default=0)
    return OpCost(seconds, flops)


def _flops(node: fx.Node) -> int:
    target = node.target
    if not isinstance(target, OpOverload):
        return 0
    formula = flop_registry.get(target.overloadpacket)
    if formula is None:
        return 0
    args = fx.map_arg(node.args, lambda argument: argument.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda argument: argument.meta["val"])
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


def _tensors(value: object) -> list[torch.Tensor]:
    items = value if isinstance(value, list | tuple) else (value,)
    return [item for item in items if isinstance(item, torch.Tensor)]
