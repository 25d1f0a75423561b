"""The signs of a rectifier's input, saved in place of its values.

The backward of a ReLU, a ReLU6, a hard tanh or a leaky ReLU reads a whole tensor, and of each
element only on which side of a bound it is. Where nothing else in the backward reads that memory,
the forward computes a boolean mask and saves it: one byte per element, and one bit where the mask
is packed. That is so between frozen layers, and before dropout, pooling or a sum; a layer that
trains reads its input itself.

The kernel itself computes the mask, and applies it: it runs on a gradient of ones, and in the
backward on a tensor of zeros and ones in place of the values. So all bits are its own, for NaN
too. Booleans are slow to convert in any other way; this is done part by part, so that no whole
tensor is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any, Final

import torch
from torch import fx

from memplan.analysis import (
    backward_readers,
    can_drop,
    drop,
    given_memory,
    is_backward,
    memory_of,
)
from memplan.capture import InPlace
from memplan.transforms.passes import Effect, Pass

_NAME = "keep_signs"
_PARTS = 8
_LEAST_PART = 1 << 17
"""Elements that a part has at least; a tensor is processed in up to ``_PARTS`` of them."""

_LEAST_BYTES = 1 << 16
"""Size below which a tensor is not worth two calls."""

_BLOCK = 64
"""Parts begin at multiples of this many elements, as the blocks of vectorised loops do: a kernel's
treatment of NaN may depend on an element's place in one."""

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Rectifier:
    """The backward of a rectifier, called with a gradient, values, and numbers.

    Attributes:
        kernel: the op.
        out: its form that writes to ``grad_input``.
        on_ones: numbers, in place of the captured ones where not None, with which a gradient of
            ones becomes 1 where it passes, and else 0.
        on_mask: the same, with which a gradient passes where values are one, not where zero.
    """

    kernel: Callable[..., Any]
    out: Callable[..., Any]
    on_ones: tuple[float | bool | None, ...]
    on_mask: tuple[float | bool | None, ...]

    def told(self, numbers: tuple[Any, ...], other: tuple[float | bool | None, ...]) -> Any:
        """The captured numbers, with some replaced."""
        return tuple(a if b is None else b for a, b in zip(numbers, other, strict=True))


_RECTIFIERS: Final[Mapping[str, _Rectifier]] = {
    str(one.kernel): one
    for one in (
        _Rectifier(
            aten.threshold_backward.default, aten.threshold_backward.grad_input, (None,), (0.0,)
        ),
        _Rectifier(
            aten.hardtanh_backward.default,
            aten.hardtanh_backward.grad_input,
            (None, None),
            (0.0, 2.0),
        ),
        _Rectifier(
            aten.leaky_relu_backward.default,
            aten.leaky_relu_backward.grad_input,
            (0.0, False),
            (None, False),
        ),
    )
}
"""Rectifiers by the name of the kernel, which generated code can hold."""


def keep_signs() -> Pass:
    """Save masks for rectifiers whose values nothing else in the backward reads.

    Returns:
        A pass of effect ``EXACT``.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64))
        >>> model = memplan.WithLoss(net, nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> one = [memplan.passes.keep_signs()]
        >>> planned = memplan.optimize(model, batch, passes=one, default_passes=False)
        >>> memplan.compare(model, planned, batch).is_exact
        True
    """
    return Pass(_NAME, Effect.EXACT, is_optional=True, rewrite_joint=_rewrite)


def let_through(
    values: torch.Tensor, strides: tuple[int, ...], name: str, numbers: tuple[Any, ...]
) -> torch.Tensor:
    """A mask of where a rectifier passes a gradient: booleans of the values' shape, so strided."""
    rectifier = _RECTIFIERS[name]
    told = rectifier.told(numbers, rectifier.on_ones)
    if values.stride() != strides:
        ones = torch.empty_strided(values.shape, strides, dtype=values.dtype, device=values.device)
        passed: torch.Tensor = rectifier.out(ones.fill_(1), values, *told, grad_input=ones)
        return passed.to(torch.bool)
    mask = torch.empty_like(values, dtype=torch.bool)
    for part, into in zip(_parts(values), _parts(mask), strict=True):
        ones = torch.ones_like(part)
        into.copy_(rectifier.out(ones, part, *told, grad_input=ones))
    return mask


def rectify(
    gradient: torch.Tensor, mask: torch.Tensor, name: str, numbers: tuple[Any, ...]
) -> torch.Tensor:
    """Compute a rectifier's backward from the mask of ``let_through``, with the mask's layout."""
    into = torch.empty_like(mask, dtype=gradient.dtype)
    return _rectify(gradient, mask, name, numbers, into)


def rectify_(
    gradient: torch.Tensor, mask: torch.Tensor, name: str, numbers: tuple[Any, ...]
) -> torch.Tensor:
    """``rectify`` written over a gradient that is laid out like the mask."""
    return _rectify(gradient, mask, name, numbers, gradient)


def _rectify(
    gradient: torch.Tensor,
    mask: torch.Tensor,
    name: str,
    numbers: tuple[Any, ...],
    into: torch.Tensor,
) -> torch.Tensor:
    rectifier = _RECTIFIERS[name]
    told = rectifier.told(numbers, rectifier.on_mask)
    flags = mask.view(torch.uint8)  # converted much faster than booleans
    if gradient.stride() != mask.stride():
        rectifier.out(gradient, flags.to(gradient.dtype), *told, grad_input=into)
        return into
    for part, flag, out in zip(_parts(gradient), _parts(flags), _parts(into), strict=True):
        rectifier.out(part, flag.to(part.dtype), *told, grad_input=out)
    return into


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The parts of a tensor without gaps, along its memory."""
    count = tensor.numel()
    size = max(-(-count // (_PARTS * _BLOCK)) * _BLOCK, _LEAST_PART)
    flat = tensor.as_strided((count,), (1,))
    return (flat[start : start + size] for start in range(0, count, size))


def _rewrite(graph: fx.Graph) -> None:
    given, readers = given_memory(graph), backward_readers(graph)
    of_memory: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if str(node.target) in _RECTIFIERS and _can_be_masked(node):
            key = _storage(node.args[1])
            if key is not None:
                of_memory.setdefault(key, []).append(node)
    for key, nodes in of_memory.items():
        others = readers.get(key, frozenset()) - set(nodes)
        are_dead = all(can_drop(node) and _storage(node.args[1]) == key for node in others)
        is_free = key not in given and not _is_normalized(nodes[0], readers)
        if is_free and are_dead and _replace(graph, nodes):
            for node in others:
                drop(graph, node)


def _is_normalized(node: fx.Node, readers: Mapping[int, frozenset[fx.Node]]) -> bool:
    """Tell whether values are the result of a batch norm whose input is saved for its backward.

    Recomputing that result takes no longer than computing a mask, and frees all of it.
    """
    assert isinstance(node.args[1], fx.Node)
    source = _origin(node.args[1])
    norm = source.args[0] if source.target is getitem else source
    if not isinstance(norm, fx.Node) or "batch_norm" not in str(norm.target):
        return False
    key = _storage(norm.args[0])
    return key is not None and not all(map(can_drop, readers.get(key, ())))


def _can_be_masked(node: fx.Node) -> bool:
    """Tell whether a rectifier's backward reads forward values, and its tensors have no gaps.

    Its mask is laid out like its result. An expanded gradient has too little memory to write over.
    """
    gradient, values = node.args[:2]
    if not (isinstance(gradient, fx.Node) and isinstance(values, fx.Node)) or node.kwargs:
        return False
    if not is_backward(node) or is_backward(_origin(values)):
        return False
    one, other, result = map(_tensor, (gradient, values, node))
    is_alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    is_dense = all(tensor.stride() == torch.empty_like(tensor).stride() for tensor in (one, result))
    return is_alike and is_dense and other.untyped_storage().nbytes() >= _LEAST_BYTES


def _origin(node: fx.Node) -> fx.Node:
    """The first node with the same elements of the same memory."""
    while len(node.all_input_nodes) == 1 and _is_same(node, node.all_input_nodes[0]):
        node = node.all_input_nodes[0]
    return node


def _is_same(node: fx.Node, other: fx.Node) -> bool:
    """Tell whether two nodes have the same elements of the same memory."""
    mine, theirs = node.meta.get("val"), other.meta.get("val")
    if not (isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor)):
        return False
    return memory_of(node) == memory_of(other) and _place(mine) == _place(theirs)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """The place and layout of a tensor in its memory."""
    return (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())


def _replace(graph: fx.Graph, nodes: list[fx.Node]) -> bool:
    """Give rectifiers masks in place of values that all lie in one memory.

    Those that test the same elements in the same way share one. If the masks together are no
    smaller than the memory, nothing is done, and False is returned.
    """
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in nodes:
        rectifier = _RECTIFIERS[str(node.target)]
        asks = rectifier.told(_numbers(node), rectifier.on_ones)
        key = (str(node.target), asks, _tensor(node).stride(), *_place(_tensor(node.args[1])))
        groups.setdefault(key, []).append(node)
    tensors = [_tensor(group[0].args[1]) for group in groups.values()]
    if sum(tensor.numel() for tensor in tensors) >= tensors[0].untyped_storage().nbytes():
        return False
    for group in groups.values():
        mask = _insert_mask(graph, group[0])
        for node in group:
            node.args = (node.args[0], mask, str(node.target), _numbers(node))
            node.target = rectify
            node.meta["in_place"] = {0: InPlace(rectify_)}
    return True


def _tensor(node: object) -> torch.Tensor:
    assert isinstance(node, fx.Node)
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _numbers(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args[2:])


def _storage(node: object) -> int | None:
    assert isinstance(node, fx.Node)
    return memory_of(node)


def _insert_mask(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Compute a rectifier's mask in the forward, right after the values."""
    assert isinstance(node.args[1], fx.Node)
    source, numbers = _origin(node.args[1]), _numbers(node)
    strides = _tensor(node).stride()
    is_alike = _tensor(source).stride() == strides
    with graph.inserting_after(source):
        if is_alike and source.target is aten.relu.default and numbers == (0,):
            # Nothing is below zero, and NaN passes: what the conversion calls True.
            mask = graph.call_function(aten._to_copy.default, (source,), {"dtype": torch.bool})
        else:
            args = (source, strides, str(node.target), numbers)
            mask = graph.call_function(let_through, args)
    value = torch.empty_like(_tensor(node), dtype=torch.bool)
    mask.meta = {**source.meta, "val": value, "partitioner_tag": "is_forward"}
    mask.meta.pop("in_place", None)
    return mask
