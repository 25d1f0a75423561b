"""Costs by a roofline: nothing is allocated and nothing is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from memplan.capture import (
    Captured,
    OpCall,
    call_of,
    source_of_call,
    stashed_operands,
    tensors_of,
)
from memplan.costs.devices import CPU, Device
from memplan.ir.program import Costs, Op, OpCost, Value
from memplan.torch_internals import OpOverload


def analytic_costs(
    captured: Captured, ops: Iterable[Op], device: Device = CPU, stashed: Iterable[Value] = ()
) -> Costs:
    """Costs by the sum of launch, traffic and arithmetic. Workspace is taken to be none.

    Args:
        captured: the step that the ops belong to.
        ops: the ops.
        device: the device that they are to run on.
        stashed: values that ops added by passes make and read.
    """
    values = {value.id: value for value in stashed}
    return Costs(
        {op.id: _cost(captured, op, device, values) for op in ops}, f"analytic, {device.name}"
    )


def _cost(captured: Captured, op: Op, device: Device, stashed: Mapping[int, Value]) -> OpCost:
    """The cost of a captured op, or of one that a pass adds, by the bytes that its call moves."""
    given = [stashed[id] for id in stashed_operands(captured, op)]
    call = call_of(captured, op, given)
    nodes: dict[fx.Node, None] = {}
    fx.map_arg((call.args, call.kwargs), nodes.setdefault)
    operands = [tensor for node in nodes for tensor in tensors_of(node.meta["val"])]
    result = source_of_call(captured, op).meta["val"]
    results = tensors_of(result)
    moved_bytes, linked_bytes = _bytes_of(operands), 0
    if op.variant_of is None:
        moved_bytes += _bytes_of(results)
    else:
        values = captured.program.values
        moved = [*given, *(stashed[id] if id in stashed else values[id] for id in op.results)]
        moved_bytes += sum(value.device_bytes for value in moved)
        linked_bytes = sum(value.host_bytes for value in moved)
    seconds = device.launch_s + moved_bytes / device.bytes_per_s
    seconds += linked_bytes / device.link_bytes_per_s
    flops = 0 if given else _flops(call, result)
    if flops:
        seconds += flops / device.flops_of(operands[0].dtype)
    if op.is_random:
        seconds += device.random_s * max((tensor.numel() for tensor in results), default=0)
    return OpCost(seconds, flops)


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _flops(call: OpCall, result: object) -> int:
    if not isinstance(call.target, OpOverload):
        return 0
    formula = flop_registry.get(call.target.overloadpacket)
    if formula is None:
        return 0
    args = fx.map_arg(call.args, lambda argument: argument.meta["val"])
    kwargs = fx.map_arg(call.kwargs, lambda argument: argument.meta["val"])
    return int(formula(*args, **kwargs, out_val=result))
