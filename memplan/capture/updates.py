"""Updates of parameters as ops of the backward.

Each stands where its gradient is complete and the parameter is no longer read, neither by the
backward nor by anything that may be recomputed for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn

from memplan.capture.flat import own_name
from memplan.capture.joint import Traced
from memplan.errors import PlanMismatch
from memplan.torch_internals import Joint, JointOutput, is_backward, storage_key


def update_parameter(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """Mark the place of a parameter's update, which is put here when the step is emitted."""
    raise AssertionError("an update is part of a graph, and is not called by itself")


def trained_by(traced: Traced, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a gradient after the step, by name."""
    names = {given.node: own_name(given.name) for given in traced.joint.inputs}
    reached = {
        names[output.of]
        for output in traced.joint.outputs
        if isinstance(output.of, fx.Node) and isinstance(output.value, fx.Node)
    }
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if name in reached or parameter.grad is not None
    }


def update_in_backward(traced: Traced) -> Traced:
    """Consume the gradient of each parameter inside the backward.

    Raises:
        PlanMismatch: if there are gradients from before.
    """
    joint = traced.joint
    if any(output.kind == "accumulated" for output in joint.outputs):
        raise PlanMismatch(
            "parameters hold gradients from before (accumulation), and with "
            "Options(update_in_backward=True) would be updated without them. Call "
            "optimizer.zero_grad() first, or leave that option out."
        )
    names = {given.node for given in joint.inputs if given.kind == "parameter"}
    last = _last_reads(joint)
    order = {node: number for number, node in enumerate(joint.graph.nodes)}
    outputs: list[JointOutput] = []
    for output in joint.outputs:
        if output.kind != "gradient" or output.of not in names or output.value is None:
            outputs.append(output)
            continue
        assert isinstance(output.value, fx.Node) and isinstance(output.of, fx.Node)
        gradient, parameter = output.value, output.of
        anchor = max(gradient, last.get(parameter, gradient), key=order.__getitem__)
        with joint.graph.inserting_after(anchor):
            update = joint.graph.call_function(update_parameter, (parameter, gradient))
        update.meta = {**gradient.meta, "val": None, "partitioner_tag": "is_backward"}
        order[update] = order[anchor]
    return replace(traced, joint=replace(joint, outputs=tuple(outputs)))


def _last_reads(joint: Joint) -> dict[fx.Node, fx.Node]:
    """The last node of the backward that needs each parameter.

    A node needs what it reads, and all that the forward computed it from: it may be recomputed.
    """
    bits = {given.node: 1 << index for index, given in enumerate(joint.inputs)}
    made_from = dict(bits)
    last: dict[int, fx.Node] = {}
    for node in sorted(
        (node for node in joint.graph.nodes if node.op == "call_function"), key=is_backward
    ):
        needs = 0
        for operand in node.all_input_nodes:
            needs |= made_from.get(operand, 0)
        if not is_backward(node) or _is_view(node):
            made_from[node] = needs
        if is_backward(node) and needs:
            last[needs] = node
    order = {node: number for number, node in enumerate(joint.graph.nodes)}
    found: dict[fx.Node, fx.Node] = {}
    for parameter, bit in bits.items():
        readers = [node for needs, node in last.items() if needs & bit]
        if readers:
            found[parameter] = max(readers, key=order.__getitem__)
    return found


def _is_view(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    operands = [operand.meta.get("val") for operand in node.all_input_nodes]
    keys = {storage_key(operand) for operand in operands if isinstance(operand, torch.Tensor)}
    return storage_key(value) in keys
