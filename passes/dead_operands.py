"""Operands of backward kernels whose values are never read.

Autograd saves the operands of an op's backward, and some are there for their shape alone: pooling
and padding take their input, the negative log-likelihood takes all log-probabilities. Convolutions
and norms read their input for the gradients of their own parameters only, and not when those are
frozen. Here such an operand is replaced by a view of the incoming gradient, of the same shape, so
that nothing is saved for it. The same kernel runs, with the same bits.

Applied only where it frees memory: where nothing else in the backward reads the operand, and it
is not one of the step's own inputs.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import torch
from torch import fx

from memplan.analysis import (
    backward_readers,
    can_drop,
    drop,
    given_memory,
    is_backward,
    operand_memory,
)
from memplan.transforms.passes import Effect, Pass

if TYPE_CHECKING:
    from memplan.capture import Captured

aten = torch.ops.aten

_NAME = "drop_dead_operands"
_LINEAR = (
    "linear layers: the untouched step keeps no input of such either, so that their freezing "
    "frees gradients and optimizer state alone"
)
_NORMALIZED = (
    "batch norms in training: their backward reads their input, whatever is frozen; call .eval() "
    "on them, and it is not kept"
)
_KEEPING: Final[dict[object, str]] = {
    aten.mm.default: _LINEAR,
    aten.addmm.default: _LINEAR,
    aten._native_batch_norm_legit_functional.default: _NORMALIZED,
}
_VIEWS: Final = frozenset({aten.t.default, aten.permute.default, aten.transpose.int})


def drop_dead_operands() -> Pass:
    """Save nothing for operands whose values no kernel reads.

    Returns:
        A pass of effect ``EXACT``.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> conv, last = nn.Conv2d(3, 8, 3), nn.Linear(392, 2)
        >>> net = nn.Sequential(conv, nn.AvgPool2d(2), nn.Flatten(), last)
        >>> model = memplan.WithLoss(net, nn.functional.cross_entropy)
        >>> batch = torch.randn(8, 3, 16, 16), torch.randint(2, (8,))
        >>> one = [memplan.passes.drop_dead_operands()]
        >>> plan = memplan.plan(model, batch, passes=one, default_passes=False)
        >>> plan.saved_bytes < memplan.plan(model, batch, default_passes=False).saved_bytes
        True
    """
    return Pass(_NAME, Effect.EXACT, rewrite_joint=_rewrite, notes=_notes)


def _notes(captured: Captured) -> tuple[str, ...]:
    """Frozen layers whose freezing frees no activations, and why."""
    trained = {position for position, _ in captured.gradients}
    frozen = {
        primal.node
        for position, primal in enumerate(captured.primals)
        if primal.kind == "parameter" and position not in trained
    }
    readers = Counter(
        _KEEPING[node.target]
        for node in captured.graph.nodes
        if node.target in _KEEPING
        and not is_backward(node)
        and any(_source(arg) in frozen for arg in node.all_input_nodes)
    )
    return tuple(f"{count} frozen {kind}" for kind, count in readers.items())


def _source(node: fx.Node) -> fx.Node:
    """The node that a node is a view of."""
    while node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _rewrite(graph: fx.Graph) -> None:
    given, readers = given_memory(graph), backward_readers(graph)
    dead = [node for node in graph.nodes if can_drop(node)]
    of_memory: dict[int, list[fx.Node]] = {}
    for node in dead:
        key = operand_memory(node)
        if key is not None:
            of_memory.setdefault(key, []).append(node)
    for key, nodes in of_memory.items():
        if key in given or not readers.get(key, frozenset()) <= set(nodes):
            continue
        for node in nodes:
            drop(graph, node)
