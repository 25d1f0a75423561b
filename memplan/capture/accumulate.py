"""Accumulation of new gradients into existing ones, each as soon as it is complete.

Autograd accumulates when the whole backward of a node is done, and a planned step is one node:
a second set of all gradients would be alive at its end. Here each addition is an op of the step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn

from memplan.capture.flat import own_name
from memplan.torch_internals import Joint, JointInput, JointOutput, is_plain_tensor


def accumulate(joint: Joint, module: nn.Module) -> Joint:
    """Add the new gradient of each parameter into the one that it holds, if any."""
    existing = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and _can_be_added_to(parameter.grad)
    }
    names = {given.node: given.name for given in joint.inputs if given.kind == "parameter"}
    inputs: list[JointInput] = []
    outputs: list[JointOutput] = []
    for output in joint.outputs:
        name = names.get(output.of) if isinstance(output.of, fx.Node) else None
        held = None if name is None else existing.get(own_name(name))
        if output.kind != "gradient" or held is None or not isinstance(output.value, fx.Node):
            outputs.append(output)
            continue
        assert name is not None
        given = _placeholder(joint.graph, output, held)
        inputs.append(JointInput(given, "gradient", name))
        outputs.append(replace(output, value=_add(output.value, given), kind="accumulated"))
    return replace(joint, inputs=(*joint.inputs, *inputs), outputs=tuple(outputs))


def _can_be_added_to(gradient: torch.Tensor) -> bool:
    return gradient.layout == torch.strided and is_plain_tensor(gradient)


def _placeholder(graph: fx.Graph, output: JointOutput, held: torch.Tensor) -> fx.Node:
    """A graph input for an existing gradient."""
    assert isinstance(output.of, fx.Node)
    with graph.inserting_after(_last_placeholder(graph)):
        given = graph.placeholder(f"existing_gradient_of_{output.of.name}")
    like = output.of.meta["val"]
    given.meta["val"] = like.new_empty_strided(held.shape, held.stride())
    return given


def _add(gradient: fx.Node, given: fx.Node) -> fx.Node:
    """Add in place, with the same bits as autograd (torch/csrc/autograd/functions)."""
    graph = gradient.graph
    anchor = _last_placeholder(graph) if gradient.op == "placeholder" else gradient
    with graph.inserting_after(anchor):
        added = graph.call_function(torch.ops.aten.add_.Tensor, (given, gradient))
    added.meta = {**gradient.meta, "val": given.meta["val"], "partitioner_tag": "is_backward"}
    return added


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    placeholders: list[fx.Node] = graph.find_nodes(op="placeholder")
    return placeholders[-1]
