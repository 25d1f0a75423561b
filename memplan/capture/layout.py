"""Layouts as kernels make them, where the trace recorded others.

The rules by which torch predicts a kernel's strides, dtypes and devices are sometimes wrong. What
follows from them then is, too: a ``view`` that the kernel's real result cannot have, where eager
copies; statistics of a norm that are in 32 bits, and recorded in 16; the seed of an attention's
dropout that is in the host's memory, and recorded on the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.fx.node import Argument

from memplan.capture.captured import Captured, tensors_of
from memplan.capture.joint import Traced, own_gradients
from memplan.program import Costs, Layout
from memplan.torch_internals import copy_joint, fake_mode_of

Layouts = Sequence[Layout | None]


def other_layouts(captured: Captured, costs: Costs) -> dict[str, Layouts]:
    """The layouts of results that were seen to be others than recorded, by the node's name."""
    found: dict[str, Layouts] = {}
    for op, node in captured.calls.items():
        seen = costs.by_op[op].result_layouts
        recorded = tensors_of(node.meta["val"])
        if any(_differ(like, layout) for like, layout in zip(recorded, seen, strict=False)):
            found[node.name] = seen
    return found


def _differ(recorded: torch.Tensor, seen: Layout | None) -> bool:
    if seen is None:
        return False
    if recorded.dtype != _dtype(seen) or recorded.device != torch.device(seen.device):
        return True
    pairs = zip(recorded.shape, recorded.stride(), seen.strides, strict=True)
    return recorded.numel() > 0 and any(size > 1 and mine != other for size, mine, other in pairs)


def _dtype(layout: Layout) -> torch.dtype:
    dtype = getattr(torch, layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def with_layouts(traced: Traced, layouts: Mapping[str, Layouts]) -> Traced:
    """The trace with the layouts of some nodes' results, by the nodes' names, put right.

    All that follows from them is predicted anew; a view that cannot be gets a copy.
    """
    joint = copy_joint(traced.joint)
    graph = joint.graph
    mode = fake_mode_of(given.node.meta["val"] for given in joint.inputs)
    with mode, torch.no_grad():
        for node in list(graph.nodes):
            if node.op != "call_function" or "_assert" in str(node.target):
                continue
            value = _result(graph, node)
            if node.name in layouts:
                value = _relayout(value, layouts[node.name])
            node.meta["val"] = value
    graph.lint()
    return replace(traced, joint=own_gradients(joint))


def _result(graph: fx.Graph, node: fx.Node) -> object:
    """What a node returns for its operands as they are recorded now."""
    assert callable(node.target)

    def run() -> object:
        args = fx.map_arg(node.args, lambda operand: operand.meta["val"])
        kwargs = fx.map_arg(node.kwargs, lambda operand: operand.meta["val"])
        assert callable(node.target)
        return node.target(*args, **kwargs)

    try:
        return run()
    except (RuntimeError, ValueError):
        if node.target is not torch.ops.aten.view.default:
            raise
    source = node.args[0]
    assert isinstance(source, fx.Node)
    with graph.inserting_before(node):
        contiguous: dict[str, Argument] = {"memory_format": torch.contiguous_format}
        copy = graph.call_function(torch.ops.aten.clone.default, (source,), contiguous)
    value = source.meta["val"].clone(memory_format=torch.contiguous_format)
    copy.meta = {**node.meta, "val": value}
    node.args = (copy, *node.args[1:])
    return run()


def _relayout(value: object, layouts: Layouts) -> object:
    """The same shapes in other layouts."""
    remaining = iter(layouts)

    def one(tensor: torch.Tensor) -> torch.Tensor:
        seen = next(remaining)
        if seen is None:
            return tensor
        return torch.empty_strided(
            tensor.shape, seen.strides, dtype=_dtype(seen), device=seen.device
        )

    if isinstance(value, torch.Tensor):
        return one(value)
    assert isinstance(value, list | tuple)
    return type(value)(one(item) if isinstance(item, torch.Tensor) else item for item in value)
