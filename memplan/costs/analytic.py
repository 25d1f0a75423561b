"""Costs by a roofline: nothing is allocated and nothing is run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.utils.flop_counter import flop_registry

from memplan.capture import Captured, source_of_call, tensors_of
from memplan.costs.devices import CPU, Device
from memplan.program import Costs, Op, OpCost
from memplan.torch_internals import OpOverload


def analytic_costs(captured: Captured, ops: Iterable[Op], device: Device = CPU) -> Costs:
    """Time is the sum of launch, traffic and arithmetic. Workspace is taken to be none."""
    by_op = {op.id: _cost(captured, op, device) for op in ops}
    return Costs(by_op, f"analytic, {device.name}")


def _cost(captured: Captured, op: Op, device: Device) -> OpCost:
    if op.target == "memplan.save_rng_state":
        return OpCost(device.launch_s)
    node = source_of_call(captured, op)
    results = tensors_of(node.meta["val"])
    operands = [
        tensor for source in node.all_input_nodes for tensor in tensors_of(source.meta["val"])
    ]
    traffic = sum(tensor.numel() * tensor.element_size() for tensor in (*results, *operands))
    flops = _flops(node)
    seconds = device.launch_s + traffic / device.bytes_per_s
    if flops:
        seconds += flops / device.flops_of(operands[0].dtype)
    if op.is_random or op.target == "memplan.redraw":
        seconds += device.random_s * max((tensor.numel() for tensor in results), default=0)
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
