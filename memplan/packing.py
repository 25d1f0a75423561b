"""Booleans as bits: eight of them in a byte."""

from __future__ import annotations

from typing import Final

import torch

_GATHER: Final = 0x0102040810204080
"""Times eight bytes of 0 or 1, this has them as the bits of the highest byte."""

_SPREAD: Final = 0x0101010101010101
"""Times a byte, this is the byte eight times."""

_ONE_EACH: Final = 0x8040201008040201 - (1 << 64)
"""Bit i of byte i, for all eight, as a signed integer."""


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Bits [n / 8] of a boolean tensor of n elements, a multiple of 8, that fill its storage."""
    words = mask.as_strided((mask.numel(),), (1,), 0).view(torch.int64) * _GATHER
    return words.bitwise_right_shift_(56).to(torch.uint8)


def unpack(packed: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """The boolean tensor that was packed, of its shape and layout."""
    words = packed.to(torch.int64).mul_(_SPREAD).bitwise_and_(_ONE_EACH)
    return words.view(torch.uint8).clamp_(max=1).view(torch.bool).as_strided(shape, strides)
