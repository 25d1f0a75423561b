"""Made-up operands to measure a kernel: valid, and such that it needs the most memory.

A kernel's allocations may depend on what its operands hold: how many entries a mask picks, where
bags begin. They hold what takes the most of all that the kernel accepts: anything else may end the
process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from memplan.torch_internals import negated_view

_aten = torch.ops.aten


def filled(storage_bytes: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A storage full of made-up values: floats are 0.5, integers 0, and booleans true."""
    fill: Any = 0.5 if dtype.is_floating_point or dtype.is_complex else dtype == torch.bool
    return torch.full((storage_bytes // dtype.itemsize,), fill, dtype=dtype, device=device)


def made_up_like(value: object) -> object:
    """A made-up copy of a traced value: laid out, and lazily conjugated or negated, like it."""
    if isinstance(value, list | tuple):
        return [made_up_like(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    flat = filled(value.untyped_storage().nbytes(), value.dtype, value.device)
    made = flat.as_strided(value.shape, value.stride(), value.storage_offset())
    made = made.conj() if value.is_conj() else made
    return negated_view(made) if value.is_neg() else made


def make_valid(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Write into made-up operands what a kernel accepts and takes the most memory for."""
    write = _VALID.get(target)
    if write is not None:
        write(args, kwargs)


def other_cases(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Write further contents, one after the other, each of which may take the most."""
    for write in _OTHERS.get(target, ()):
        write(args, kwargs)
        yield


def _pivots(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Fill the pivots, which count from 1."""
    del kwargs
    args[1].fill_(1)


def _places(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Pick as many places as the step was captured for."""
    mask = args[0]
    if 0 not in mask.stride():
        is_true = torch.arange(mask.numel(), device=mask.device) < kwargs["size"]
        mask.copy_(is_true.view(mask.shape))


def _repeats(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Make as many repetitions in all as the step was captured for."""
    repeats, size = args[0], kwargs.get("output_size")
    if size is not None and repeats.numel():
        repeats.fill_(0)
        repeats.view(-1)[-1:].fill_(size)


def _bags(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Let bags of like sizes begin."""
    del kwargs
    _, indices, offsets, *_ = args
    last = max(indices.numel() - 1, 0)
    offsets.copy_(torch.linspace(0, last, max(offsets.numel(), 1))[: offsets.numel()].floor())


def _no_empty_bags(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Leave no bag empty; for sums the kernel has to find out which bag an entry is in."""
    del kwargs
    args[4].fill_(1)
    if args[8] == _SUM:
        args[3].resize_(0)


def _all_but_one(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Leave something out of a mask: what it picks is then padded, and copied for that."""
    del kwargs
    mask = args[1]
    if mask.numel() > 1:
        mask[(-1,) * mask.dim()] = False


def _positive_definite(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Write identity matrices."""
    del kwargs
    args[0].zero_().diagonal(dim1=-2, dim2=-1).fill_(1)


def _lengths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Put everything into one segment."""
    lengths = kwargs.get("lengths")
    if lengths is not None and lengths.numel():
        lengths.zero_()[..., 0] = args[0].shape[kwargs.get("axis", 0)]


_SUM = 0
"""The mode of bags that sums."""

_VALID: Mapping[object, Callable[[Sequence[Any], Mapping[str, Any]], None]] = {
    _aten.cholesky.default: _positive_definite,
    _aten.linalg_cholesky_ex.default: _positive_definite,
    _aten.linalg_lu_solve.default: _pivots,
    _aten.lu_unpack.default: _pivots,
    _aten.repeat_interleave.Tensor: _repeats,
    _aten.segment_reduce.default: _lengths,
    _aten.nonzero_static.default: _places,
    _aten._embedding_bag.default: _bags,
    _aten._embedding_bag_forward_only.default: _bags,
    _aten._embedding_bag_backward.default: _no_empty_bags,
}

_OTHERS: Mapping[object, Sequence[Callable[[Sequence[Any], Mapping[str, Any]], None]]] = {
    _aten.masked_scatter_backward.default: (_all_but_one,),
}
