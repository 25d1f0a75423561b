"""From a module and a sample to forward and backward in one graph, and rewrites of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from memplan.capture.forward import Differentiable, Forward, explain, trace_forward
from memplan.errors import CaptureError
from memplan.sample import Sample
from memplan.torch_internals import (
    Joint,
    UnsupportedJointError,
    copy_joint,
    is_backward,
    storage_key,
    trace_joint,
    without_onednn,
)


@dataclass(frozen=True)
class Traced:
    """A step as a joint graph, before it is read as a program.

    Attributes:
        joint: forward and backward in one graph.
        forward: where it came from.
        module_name: the class of the module, for messages.
        existing_gradient_bytes: gradients that were there when it was traced.
    """

    joint: Joint
    forward: Forward
    module_name: str
    existing_gradient_bytes: int


def trace(module: nn.Module, sample: Sample, differentiable: Differentiable = None) -> Traced:
    """Trace one training step of a module, in its present mode, for this sample.

    Raises:
        CaptureError: naming what cannot be captured, and where in the user's code it is.
    """
    forward = trace_forward(module, sample, differentiable)
    # What the recurrent kernels of oneDNN hand to their backward is opaque: it can be neither
    # measured nor made again.
    kernels = without_onednn() if forward.is_recurrent else contextlib.nullcontext()
    try:
        with kernels:
            joint = trace_joint(forward.graph_module, sample.tensors())
    except UnsupportedJointError as error:
        raise CaptureError(f"{type(module).__name__}'s step has {error}; unsupported") from error
    except Exception as error:
        raise CaptureError(explain(error, module)) from error
    existing = [parameter.grad for parameter in module.parameters()]
    return Traced(
        joint=_own_gradients(_copy_back(_forget_running_statistics(joint))),
        forward=forward,
        module_name=type(module).__name__,
        existing_gradient_bytes=sum(
            gradient.untyped_storage().nbytes() for gradient in existing if gradient is not None
        ),
    )


def rewrite(traced: Traced, rewrites: Iterable[Callable[[fx.Graph], None]]) -> Traced:
    """Apply rewrites, in order, to a copy of the joint graph."""
    joint = copy_joint(traced.joint)
    for one in rewrites:
        one(joint.graph)
    joint.graph.lint()
    return replace(traced, joint=joint)


def _forget_running_statistics(joint: Joint) -> Joint:
    """The backward of batch norm in training is given the running statistics and never reads them.

    Left in, they would be kept, although the forward overwrites them.
    """
    for node in joint.graph.nodes:
        if node.target is torch.ops.aten.native_batch_norm_backward.default and node.args[7]:
            node.args = (*node.args[:3], None, None, *node.args[5:])
    return joint


def _copy_back(joint: Joint) -> Joint:
    """Write new contents of buffers and inputs back at the end of the forward."""
    graph = joint.graph
    last_forward = [n for n in graph.nodes if n.op == "call_function" and not is_backward(n)][-1:]
    anchor = last_forward[0] if last_forward else [i.node for i in joint.inputs][-1]
    for output in joint.outputs:
        if output.kind != "mutation":
            continue
        assert isinstance(output.of, fx.Node) and isinstance(output.value, fx.Node)
        with graph.inserting_after(anchor):
            copy = graph.call_function(torch.ops.aten.copy_.default, (output.of, output.value))
        copy.meta = {**output.value.meta, "val": output.of.meta["val"]}
        anchor = copy
    return replace(joint, outputs=tuple(o for o in joint.outputs if o.kind != "mutation"))


def _own_gradients(joint: Joint) -> Joint:
    """Give each gradient a storage of its own, in its parameter's layout.

    Autograd takes over a gradient that comes so, and copies any other; done here, the copy is
    part of the program.
    """
    seen = {storage_key(given.node.meta["val"]) for given in joint.inputs}
    outputs = []
    for output in joint.outputs:
        node = output.value
        if output.kind == "gradient" and isinstance(node, fx.Node):
            assert isinstance(output.of, fx.Node)
            of = output.of.meta["val"]
            if storage_key(node.meta["val"]) in seen or not _same_layout(node.meta["val"], of):
                node = _clone_like(joint.graph, node, of)
            seen.add(storage_key(node.meta["val"]))
        outputs.append(replace(output, value=node))
    return replace(joint, outputs=tuple(outputs))


def _same_layout(gradient: torch.Tensor, of: torch.Tensor) -> bool:
    pairs = zip(gradient.shape, gradient.stride(), of.stride(), strict=True)
    return all(size == 1 or mine == theirs for size, mine, theirs in pairs)


def _clone_like(graph: fx.Graph, gradient: fx.Node, of: torch.Tensor) -> fx.Node:
    layout = torch.contiguous_format
    if not of.is_contiguous() and of.dim() == 4:
        layout = torch.channels_last
    anchor = gradient
    if gradient.op == "placeholder":
        anchor = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(anchor):
        clone = graph.call_function(
            torch.ops.aten.clone.default, (gradient,), {"memory_format": layout}
        )
    value = gradient.meta["val"].clone(memory_format=layout)
    clone.meta = {**gradient.meta, "val": value, "partitioner_tag": "is_backward"}
    return clone
