"""Sums on a grid: multiples of 2^-k, which add and subtract without rounding.

A 32-bit float holds integers up to 2^24 exactly, so a sum of multiples of 2^-k is exact while it is
below 2^(24 - k): what was added can be subtracted again, to the last bit.
"""

from __future__ import annotations

import torch

from memplan.errors import MemplanError

MANTISSA_BITS = 24
"""Bits of a 32-bit float's mantissa."""


def round_to_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest multiples of 2^-bits, as 32-bit floats; same shape."""
    return x.float().mul(2.0**bits).round_().mul_(2.0**-bits)


def add_on_grid(stream: torch.Tensor, change: torch.Tensor, bits: int) -> torch.Tensor:
    """The sum of two tensors on a grid.

    Raises:
        MemplanError: if the sum is outside the range in which it is exact.
    """
    total = torch.add(stream, change)
    if not total.numel():
        return total
    least, most = torch.aminmax(total)
    largest = max(-float(least), float(most))
    if largest >= 2.0 ** (MANTISSA_BITS - bits):
        raise MemplanError(
            f"a stream reaches {largest:g}; sums on a grid of 2^-{bits} are exact below "
            f"{2.0 ** (MANTISSA_BITS - bits):g}. Use a coarser grid: "
            f"invert_couplings(grid={max(1, bits - 3)}); or none"
        )
    return total
