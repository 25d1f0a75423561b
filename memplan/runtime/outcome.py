"""The outcome of a forward, and the distance between two.

Values are compared by digests of their bytes, and outputs are kept as numpy arrays: nothing of
one forward is in torch's memory while the other runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from memplan.rng import random_states
from memplan.torch_internals import flatten

Array: TypeAlias = np.ndarray[Any, Any]

_CHUNK_BYTES = 1 << 22
"""Bytes read at a time of a tensor that is not contiguous."""
_MOST_KEPT = 1 << 22
"""The most entries kept of an output; those of a larger one are spread over it."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a forward.

    Attributes:
        outputs: a digest of each tensor that it returns, and all else that it returns as text.
        buffers: a digest of each, by FQN.
        random: the random states.
        kept: entries of the outputs that are floats, by position.
        eps: the largest of their dtypes.
        attributes: names of those that it changes, and whether each seems to be set just once.
        is_steady: whether a forward after those changes returns the same.
    """

    outputs: tuple[str, ...]
    buffers: Mapping[str, str]
    random: tuple[bytes, ...]
    kept: Mapping[int, Array] = field(repr=False)
    eps: float
    attributes: Mapping[str, bool] = field(default_factory=dict)
    is_steady: bool = True

    @classmethod
    def of(cls, model: nn.Module, output: object) -> Outcome:
        """The current outcome."""
        leaves = flatten(output)[0]
        floats = {
            place: leaf.detach()
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        }
        return cls(
            tuple(map(_leaf, leaves)),
            {name: digest(buffer) for name, buffer in model.named_buffers()},
            tuple(state.numpy().tobytes() for state in random_states()),
            {place: _entries(tensor) for place, tensor in floats.items()},
            max((torch.finfo(tensor.dtype).eps for tensor in floats.values()), default=0.0),
        )

    def difference(self, other: Outcome) -> str:
        """The first difference, in words; "" if there is none."""
        if self.outputs != other.outputs:
            return "its output"
        changed = [name for name, one in self.buffers.items() if other.buffers.get(name) != one]
        if changed:
            return f"buffer {changed[0]!r}"
        return "" if self.random == other.random else "torch's random state"

    def differing(self, other: Outcome) -> list[int]:
        """Positions of the outputs that differ."""
        places = range(max(len(self.outputs), len(other.outputs)))
        return [n for n in places if self.outputs[n : n + 1] != other.outputs[n : n + 1]]

    def error(self, other: Outcome, *, by_all: bool = False) -> float:
        """The largest difference of an output over its largest entry; infinite if not floats.

        Args:
            other: the reference.
            by_all: divide by the largest entry of all outputs together.
        """
        differing = self.differing(other)
        if any(n not in self.kept or n not in other.kept for n in differing):
            return math.inf
        scale = max(map(_largest, other.kept.values()), default=0.0) if by_all else None
        pairs = [(self.kept[n], other.kept[n]) for n in differing]
        return max((relative_error(mine, theirs, scale) for mine, theirs in pairs), default=0.0)

    @property
    def rounding(self) -> float:
        """The error that rounding explains."""
        return float(self.eps**0.5)


def relative_error(mine: Array, theirs: Array, scale: float | None = None) -> float:
    """The largest difference over the largest entry, or over ``scale``.

    Infinite where just one of two entries is NaN.
    """
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        return math.inf
    differs = (mine != theirs) & ~(np.isnan(mine) & np.isnan(theirs))
    if not differs.any():
        return 0.0
    apart = np.abs(mine[differs].astype(np.complex128) - theirs[differs])
    if not np.isfinite(apart).all():
        return math.inf
    scale = _largest(theirs) if scale is None else scale
    return float(apart.max()) / scale if scale else float(apart.max())


def _largest(array: Array) -> float:
    """The largest magnitude of an entry; 0 if there is none."""
    return float(np.abs(array[np.isfinite(array)].astype(np.complex128)).max(initial=0.0))


def digest(tensor: torch.Tensor) -> str:
    """A digest equal for tensors of equal shapes, dtypes and bits."""
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    for part in _in_order(_bits(tensor.detach())):
        found.update(part.data)
    return found.hexdigest()


def _in_order(bits: Array) -> Iterator[Array]:
    """All entries in index order, without a copy of the whole."""
    if bits.flags.c_contiguous or bits.nbytes <= _CHUNK_BYTES:
        yield np.ascontiguousarray(bits)
        return
    rows = _CHUNK_BYTES * len(bits) // bits.nbytes
    if rows == 0:
        for row in bits:
            yield from _in_order(row)
    else:
        for start in range(0, len(bits), rows):
            yield np.ascontiguousarray(bits[start : start + rows])


def same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Tell whether two tensors have equal shapes, dtypes and bits, or are both None."""
    if one is None or other is None:
        return one is other
    return digest(one) == digest(other)


def kept(tensor: torch.Tensor) -> Array:
    """A copy of a tensor's bits, outside torch's memory."""
    return _bits(tensor.detach()).copy()


def write(tensor: torch.Tensor, content: Array) -> None:
    """Write a tensor's earlier bits back, unless it has them."""
    if np.array_equal(_bits(tensor.detach()), content):
        return
    bits = torch.from_numpy(content)
    if tensor.is_complex():
        values = torch.view_as_complex(bits.view(tensor.dtype.to_real()))
    else:
        values = bits.view(tensor.dtype)
    with torch.no_grad():
        tensor.detach().copy_(values)


def _bits(tensor: torch.Tensor) -> Array:
    """A tensor's memory, as integers; a view of it on the CPU."""
    plain = tensor.resolve_conj().resolve_neg()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    array: Array = plain.view(_BITS[plain.element_size()]).cpu().numpy()
    return array


def _entries(tensor: torch.Tensor) -> Array:
    """All entries of a tensor, or some of a large one, in an order of their own."""
    bits = _bits(tensor).reshape(-1)
    pairs = bits.reshape(-1, 2) if tensor.is_complex() else bits.reshape(-1, 1)
    some = np.ascontiguousarray(pairs[:: max(1, -(-len(pairs) // _MOST_KEPT))]).copy()
    if tensor.dtype is torch.bfloat16:
        return (some.astype(np.uint32) << 16).view(np.float32).reshape(-1)
    real = {2: np.float16, 4: np.float32, 8: np.float64}.get(bits.itemsize)
    if real is None:  # 8 bits: their codes serve as their values
        return some.astype(np.float32).reshape(-1)
    floats = some.view(real)
    return floats[:, 0] + 1j * floats[:, 1] if tensor.is_complex() else floats.reshape(-1)


def _leaf(leaf: object) -> str:
    return digest(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)


def same_outputs(outcomes: Sequence[Outcome]) -> bool:
    """Tell whether all outputs have the same bits."""
    return len({outcome.outputs for outcome in outcomes}) == 1
