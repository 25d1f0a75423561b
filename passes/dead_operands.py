"""Operands that a backward kernel is given and whose values it never reads.

Autograd keeps what the backward of an op takes, and some take a tensor for its shape alone: pooling
and padding take their input, the negative log-likelihood takes all log-probabilities. Convolutions
and norms read their input for the gradients of their own parameters only, and not when those are
frozen. Here such an operand is replaced by a view of the incoming gradient, of the same shape, so
that nothing is kept for it. The same kernel runs, with the same bits.

Only where that frees memory: where nothing else in the backward reads the operand, and it is not
one of the step's own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import fx

from memplan.analysis import backward_readers, given_memory, memory_of
from memplan.passing import Effect, Pass

_NAME = "drop_dead_operands"
_OPERAND = 1
"""All of these ops take the incoming gradient first, and then the operand in question."""

aten = torch.ops.aten

_FOR_SHAPE: Final[frozenset[object]] = frozenset(
    {
        aten.max_pool2d_with_indices_backward.default,
        aten.adaptive_max_pool2d_backward.default,
        aten.avg_pool2d_backward.default,
        aten._adaptive_avg_pool2d_backward.default,
        aten.reflection_pad1d_backward.default,
        aten.reflection_pad2d_backward.default,
        aten.replication_pad2d_backward.default,
        aten.nll_loss_backward.default,
        aten.nll_loss2d_backward.default,
    }
)
"""Ops that read no value of the operand."""

_FOR_PARAMETERS: Final[Mapping[object, Callable[[fx.Node], bool]]] = {
    aten.convolution_backward.default: lambda node: not _mask(node)[1],
    aten.native_batch_norm_backward.default: lambda node: not (node.args[7] or _mask(node)[1]),
    aten.native_layer_norm_backward.default: lambda node: not any(_mask(node)[:2]),
}
"""Ops that do not if this holds: the gradients that need the values are not asked for."""


def drop_dead_operands() -> Pass:
    """Keep nothing for operands whose values no kernel reads.

    Returns:
        A pass of effect ``EXACT``.
    """
    return Pass(_NAME, Effect.EXACT, rewrite_joint=_rewrite)


def _rewrite(graph: fx.Graph) -> None:
    given, readers = given_memory(graph), backward_readers(graph)
    dead = [node for node in graph.nodes if _ignores_values(node)]
    of_memory: dict[int, list[fx.Node]] = {}
    for node in dead:
        key = memory_of(node.args[_OPERAND])
        if key is not None:
            of_memory.setdefault(key, []).append(node)
    for key, nodes in of_memory.items():
        if key in given or not readers.get(key, frozenset()) <= set(nodes):
            continue
        for node in nodes:
            _replace(graph, node)


def _mask(node: fx.Node) -> list[bool]:
    """Which gradients a backward is asked for: of its input, weight and bias."""
    mask = node.args[-1]
    assert isinstance(mask, list | tuple), f"{node.target} has no output mask"
    return [bool(one) for one in mask]


def _ignores_values(node: fx.Node) -> bool:
    if node.target in _FOR_SHAPE:
        return True
    condition = _FOR_PARAMETERS.get(node.target)
    return condition is not None and condition(node)


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    """Give a node a view of its incoming gradient for its operand."""
    gradient, operand = node.args[0], node.args[_OPERAND]
    assert isinstance(gradient, fx.Node) and isinstance(operand, fx.Node)
    strides = _stand_in_strides(gradient.meta["val"], operand.meta["val"])
    if strides is None:
        return
    size = tuple(operand.meta["val"].shape)
    with graph.inserting_before(node):
        stand_in = graph.call_function(aten.as_strided.default, (gradient, size, strides))
    stand_in.meta = {**gradient.meta, "val": gradient.meta["val"].as_strided(size, strides)}
    stand_in.meta["partitioner_tag"] = "is_backward"
    node.args = (gradient, stand_in, *node.args[_OPERAND + 1 :])


def _stand_in_strides(gradient: torch.Tensor, operand: torch.Tensor) -> tuple[int, ...] | None:
    """How to look at the gradient's memory as at the operand; None if it cannot be done.

    With the operand's own strides where the memory suffices. Else all elements are the first one;
    kernels take that for an ordinary layout, so the operand must have had that.
    """
    if gradient.dtype != operand.dtype or gradient.numel() == 0 or operand.numel() == 0:
        return None
    room = gradient.untyped_storage().nbytes() // gradient.element_size()
    last = sum((n - 1) * s for n, s in zip(operand.shape, operand.stride(), strict=True))
    if gradient.storage_offset() + last < room:
        return tuple(operand.stride())
    is_ambiguous = operand.dim() == 4 and operand.is_contiguous(memory_format=torch.channels_last)
    return (0,) * operand.dim() if operand.is_contiguous() and not is_ambiguous else None
