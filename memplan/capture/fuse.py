"""A fused step: the backward's ops run in the forward, as soon as their operands are ready.

With one loss, gradients can be computed before its own arrives, as if that were 1. They are linear
in it unless the user's code says otherwise, so the gradient that arrives is then a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import Enum

import torch
from torch import fx

from memplan.capture.joint import Traced
from memplan.capture.linearity import why_not_linear
from memplan.capture.random_ops import is_random
from memplan.errors import CaptureError
from memplan.torch_internals import Joint, copy_joint, is_backward, storage_key


class Early(Enum):
    """The ops of the backward that do not wait for the end of the forward."""

    NONE = "none"
    FINISHING = "those that lead to a gradient before the forward goes on"
    ALL = "all whose operands are there"


def orders(traced: Traced) -> tuple[Early, ...]:
    """Orders in which a fused step can run; a backward that draws numbers stays where it is."""
    nodes = traced.joint.graph.nodes
    return (Early.NONE,) if any(is_backward(n) and is_random(n) for n in nodes) else (*Early,)


def needs_one(traced: Traced) -> str:
    """The reason why the gradient that arrives at the loss must be 1, for the same bits; or "".

    Raises:
        CaptureError: if the module's output holds no loss.
    """
    # gradients are scaled before they are added into existing ones
    added = {output.value for output in traced.joint.outputs if output.kind == "accumulated"}
    nodes = [node for node in traced.joint.graph.nodes if node not in added]
    return why_not_linear(nodes, _follows(nodes, _tangent(traced, traced.joint)))


def fuse(traced: Traced, early: Early) -> Traced:
    """Compute all gradients in the forward.

    Their accumulation into existing gradients stays in the backward.

    Raises:
        CaptureError: if the module's output holds no loss.
    """
    _tangent(traced, traced.joint)
    joint = copy_joint(traced.joint)
    order = _Order(joint, _tangent(traced, joint)).with_early(early)
    anchor = [node for node in joint.graph.nodes if node.op == "placeholder"][-1]
    for node in order:
        anchor.append(node)
        anchor = node
    joint.graph.lint()
    return replace(traced, joint=joint, is_fused=True)


def _tangent(traced: Traced, joint: Joint) -> fx.Node:
    """The gradient that arrives at the loss."""
    tangents = [given.node for given in joint.inputs if given.kind == "tangent"]
    if not traced.output.is_loss or len(tangents) != 1:
        raise CaptureError(
            f"{traced.module_name} must return its loss, exactly one scalar (a tensor of shape []) "
            "that requires a gradient, and Options(differentiable_outputs=...) be left out: a "
            "fused step finishes the gradients of that while the forward runs. memplan.WithLoss "
            "adds a loss to a model."
        )
    return tangents[0]


def _follows(nodes: Iterable[fx.Node], tangent: fx.Node) -> frozenset[fx.Node]:
    """Nodes that depend on the incoming gradient."""
    found = {tangent}
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _key(node: object) -> int:
    """The storage that a node is, or is a view of; -1 if it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return storage_key(value) if isinstance(value, torch.Tensor) else -1


class _Order:
    """Other orders of a joint graph's nodes, in which those of the forward keep theirs."""

    def __init__(self, joint: Joint, tangent: fx.Node) -> None:
        self.nodes = [node for node in joint.graph.nodes if node.op == "call_function"]
        self.number = {node: number for number, node in enumerate(self.nodes)}
        results = {out.value: out.kind for out in joint.outputs if isinstance(out.value, fx.Node)}
        self.finished = {node for node, kind in results.items() if kind == "gradient"}
        self.last = {node for node, kind in results.items() if kind == "accumulated"}
        self.finished |= {operand for node in self.last for operand in node.all_input_nodes}
        self.writes = {
            _key(node.args[0]): node
            for node in self.nodes
            if node.target is torch.ops.aten.copy_.default and not is_backward(node)
        }
        self.after = self._after()
        self.follows = _follows(self.nodes, tangent)

    def _after(self) -> Mapping[fx.Node, int]:
        """The number of the last forward node that each node depends on."""
        after: dict[fx.Node, int] = {}
        last_read: dict[int, int] = {}
        for node in self.nodes:
            if node in self.writes.values():
                after[node] = self.number[node]
            elif is_backward(node):
                after[node] = max((after.get(one, -1) for one in self._needs(node)), default=-1)
            else:
                after[node] = self.number[node]
                for key in set(map(_key, node.all_input_nodes)) & self.writes.keys():
                    last_read[key] = max(last_read.get(key, -1), self.number[node])
        for key, copy in self.writes.items():
            made = (after.get(one, -1) for one in copy.all_input_nodes)
            after[copy] = max(last_read.get(key, -1), *made)
        return after

    def _needs(self, node: fx.Node) -> Iterable[fx.Node]:
        """Nodes that run before a node: its inputs and, in the backward, what wrote those."""
        yield from node.all_input_nodes
        if is_backward(node):
            keys = map(_key, node.all_input_nodes)
            yield from (self.writes[key] for key in keys if key in self.writes)

    def with_early(self, early: Early) -> list[fx.Node]:
        """All nodes; those that are not early stand where first needed, or at the end."""
        if early is Early.NONE:
            return sorted(self.nodes, key=lambda node: (is_backward(node), node in self.last))
        is_early = self._is_early(early)
        placed: dict[fx.Node, None] = {}
        chosen = [
            node
            for node in self.nodes
            if node not in self.last and (not is_backward(node) or is_early(node))
        ]
        ends = self.follows | self.finished
        rest = [n for n in self.nodes if is_backward(n) and n in ends and not is_early(n)]
        rest.sort(key=self.last.__contains__)
        for node in (*sorted(chosen, key=self._place), *rest):
            self._place_with_needs(node, placed)
        return list(placed)

    def _place(self, node: fx.Node) -> tuple[int, bool, int]:
        is_write = node in self.writes.values()
        is_after = is_backward(node) or is_write
        return (self.after[node], is_after, -1 if is_write else self.number[node])

    def _place_with_needs(self, node: fx.Node, placed: dict[fx.Node, None]) -> None:
        """Place a node, after all that it needs and that is not placed yet."""
        stack = [node]
        while stack:
            missing = [n for n in self._needs(stack[-1]) if n in self.number and n not in placed]
            if missing:
                stack.extend(sorted(missing, key=self.number.__getitem__, reverse=True))
            else:
                placed[stack.pop()] = None

    def _is_early(self, early: Early) -> Callable[[fx.Node], bool]:
        if early is Early.ALL:
            return lambda node: node in self.follows and node not in self.last
        finishing: set[fx.Node] = set()
        for node in reversed(self.nodes):
            leads = node in self.finished or any(
                user in finishing and self.after[user] == self.after[node] for user in node.users
            )
            if leads and node in self.follows and node not in self.last:
                finishing.add(node)
        return finishing.__contains__
