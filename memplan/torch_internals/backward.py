"""State of the running backward and of autograd's graph."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.autograd.graph import _engine_run_backward

_LEAF = "torch::autograd::AccumulateGrad"
_MOST_NODES = 20_000
"""Larger graphs are not searched."""


def backward_keeps_graph() -> bool:
    """Tell whether the running backward has ``retain_graph=True`` (torch 2.13-2.15)."""
    return bool(_get_current_graph_task_keep_graph())


def received_from_one_node() -> frozenset[int]:
    """Ids of the leaves that a single edge of ``loss.backward()`` leads to (torch 2.13-2.15).

    Their gradient is what that edge brings; that of other leaves is a sum. Empty where unknown,
    and inside ``torch.autograd.grad`` and ``backward(inputs=...)``.
    """
    return _leaves(lambda count: count == 1)


def received_from_several_nodes() -> frozenset[int]:
    """The same for leaves that several edges lead to."""
    return _leaves(lambda count: count > 1)


def _leaves(is_asked_for: Callable[[int], bool]) -> frozenset[int]:
    edges: Counter[Any] = Counter(_roots())
    stack = list(edges)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                if node not in edges:
                    stack.append(node)
                edges[node] += 1
        if len(edges) > _MOST_NODES:
            return frozenset()
    leaves = (node for node, count in edges.items() if is_asked_for(count) and node.name() == _LEAF)
    return frozenset(id(node.variable) for node in leaves)


def leads_to(output: torch.Tensor, ends: Collection[torch.Tensor]) -> frozenset[int]:
    """Ids of the tensors that autograd's graph leads to from an output (torch 2.13-2.15).

    Their gradient is not None in eager, unless a function on the way returns None; it may be zero,
    or independent of what arrives at the output.
    """
    inner = {tensor.grad_fn: id(tensor) for tensor in ends if tensor.grad_fn is not None}
    found = {id(tensor) for tensor in ends if tensor is output and tensor.requires_grad}
    stack = [output.grad_fn]
    seen = set(stack)
    while stack:
        node: Any = stack.pop()
        if node is None:
            continue
        if node in inner:
            found.add(inner[node])
        if node.name() == _LEAF:
            found.add(id(node.variable))
        new = {after for after, _ in node.next_functions} - seen
        seen |= new
        stack += new
    return frozenset(found)


def order_of_making(node: Any) -> int:
    """A number that grows with each autograd node created in this thread (torch 2.13-2.15)."""
    return int(node._sequence_nr())


def _roots() -> Sequence[Any]:
    """Nodes that the running backward started from, if it is to accumulate into all leaves."""
    frame = next(_engine_frames(sys._getframe()), None)
    if frame is None:
        # Nodes of another device run in a thread of their own.
        others = [next(_engine_frames(top), None) for top in sys._current_frames().values()]
        found = [other for other in others if other is not None]
        if len(found) != 1:
            return ()
        frame = found[0]
    outputs, args, options = (frame.f_locals[name] for name in ("t_outputs", "args", "kwargs"))
    inputs = args[3]
    if not options["accumulate_grad"] or inputs:
        return ()
    nodes = [out.grad_fn if isinstance(out, torch.Tensor) else out.node for out in outputs]
    return [node for node in nodes if node is not None]


def _engine_frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if frame.f_code is _engine_run_backward.__code__:
            yield frame
        frame = frame.f_back


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Tell whether hooks run when a leaf's gradient arrives (torch 2.13-2.15)."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def exchanges_gradients() -> bool:
    """Tell whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
