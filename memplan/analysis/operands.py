"""Operands whose values a kernel never reads, and stand-ins for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import fx

from memplan.analysis.memory import memory_of

_OPERAND = 1
"""Place of the operand in question: all of these ops take the incoming gradient first."""

aten = torch.ops.aten

FOR_SHAPE: Final[frozenset[object]] = frozenset(
    {
        aten.max_pool2d_with_indices_backward.default,
        aten.adaptive_max_pool2d_backward.default,
        aten.avg_pool2d_backward.default,
        aten._adaptive_avg_pool2d_backward.default,
        aten.max_pool3d_with_indices_backward.default,
        aten.adaptive_max_pool3d_backward.default,
        aten.avg_pool3d_backward.default,
        aten._adaptive_avg_pool3d_backward.default,
        aten.reflection_pad1d_backward.default,
        aten.reflection_pad2d_backward.default,
        aten.reflection_pad3d_backward.default,
        aten.replication_pad1d_backward.default,
        aten.replication_pad2d_backward.default,
        aten.replication_pad3d_backward.default,
        aten.nll_loss_backward.default,
        aten.nll_loss2d_backward.default,
    }
)
"""Ops that read no value of the operand."""

FOR_PARAMETERS: Final[Mapping[object, Callable[[fx.Node], bool]]] = {
    aten.convolution_backward.default: lambda node: not _mask(node)[1],
    aten.native_batch_norm_backward.default: lambda node: not (node.args[7] or _mask(node)[1]),
    aten.native_layer_norm_backward.default: lambda node: not any(_mask(node)[:2]),
    aten.native_group_norm_backward.default: lambda node: not any(_mask(node)[:2]),
}
"""Ops that read none if this holds: the gradients that need the values are not asked for."""


def _mask(node: fx.Node) -> list[bool]:
    """The gradients that a backward is asked for: of its input, weight and bias."""
    mask = node.args[-1]
    assert isinstance(mask, list | tuple), f"{node.target} has no output mask"
    return [bool(one) for one in mask]


def _ignores_values(node: fx.Node) -> bool:
    if node.target in FOR_SHAPE:
        return True
    condition = FOR_PARAMETERS.get(node.target)
    return condition is not None and condition(node)


def can_drop(node: fx.Node) -> bool:
    """Tell whether a node never reads the values of its second argument, and can lack them."""
    if not _ignores_values(node):
        return False
    gradient, operand = node.args[0], node.args[_OPERAND]
    assert isinstance(gradient, fx.Node) and isinstance(operand, fx.Node)
    return stand_in_strides(gradient.meta["val"], operand.meta["val"]) is not None


def operand_memory(node: fx.Node) -> int | None:
    """The memory of a node's second argument."""
    operand = node.args[_OPERAND]
    assert isinstance(operand, fx.Node)
    return memory_of(operand)


def drop(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a node's second argument by a view of its incoming gradient."""
    gradient, operand = node.args[0], node.args[_OPERAND]
    assert isinstance(gradient, fx.Node) and isinstance(operand, fx.Node)
    strides = stand_in_strides(gradient.meta["val"], operand.meta["val"])
    assert strides is not None, f"{node} needs its operand"
    size = tuple(operand.meta["val"].shape)
    with graph.inserting_before(node):
        stand_in = graph.call_function(aten.as_strided.default, (gradient, size, strides))
    stand_in.meta = {**gradient.meta, "val": gradient.meta["val"].as_strided(size, strides)}
    stand_in.meta["partitioner_tag"] = "is_backward"
    node.args = (gradient, stand_in, *node.args[_OPERAND + 1 :])


def stand_in_strides(gradient: torch.Tensor, operand: torch.Tensor) -> tuple[int, ...] | None:
    """Strides that view the gradient's memory as the operand; None if there are none.

    The operand's own strides where the memory suffices. Else all elements are the first one;
    kernels take that for an ordinary layout, so the operand must have had that.
    """
    if gradient.dtype != operand.dtype or gradient.numel() == 0 or operand.numel() == 0:
        return None
    room = gradient.untyped_storage().nbytes() // gradient.element_size()
    last = sum((n - 1) * s for n, s in zip(operand.shape, operand.stride(), strict=True))
    if gradient.storage_offset() + last < room:
        return tuple(operand.stride())
    last_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(operand.dim())
    is_ambiguous = last_format is not None and operand.is_contiguous(memory_format=last_format)
    return (0,) * operand.dim() if operand.is_contiguous() and not is_ambiguous else None
