"""Boolean masks stashed as bits: an eighth of their memory, without recomputation.

Dropout masks are drawn one number after the other, and sign masks are computed from whole tensors
that are gone by then; packing and unpacking work on eight booleans at a time. So this is the cheap
way to restore a mask; redrawing it under the generator's stashed state, or recomputing it, frees
more. All are offered, and the plan decides where each is worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from memplan.capture import OpCall, first_tensor, source_of_call
from memplan.ir.program import Op, Phase
from memplan.ir.schedule import Recovery
from memplan.transforms.passes import Effect, Pass, RecoveryContext

if TYPE_CHECKING:
    from memplan.capture import Captured

_NAME = "pack_masks"
_PACK, _UNPACK = "memplan.pack_mask", "memplan.unpack_mask"
_LEAST_BYTES = 4096
"""Size below which a mask takes about as long to pack as to compute."""

_GATHER: Final = 0x0102040810204080
"""Factor that collects eight bytes of 0 or 1 as the bits of the highest byte."""

_SPREAD: Final = 0x0101010101010101
"""Factor that repeats a byte eight times."""

_ONE_EACH: Final = 0x8040201008040201 - (1 << 64)
"""Mask of bit i of byte i, for all eight, as a signed integer."""


def pack_masks() -> Pass:
    """Offer to stash as bits the boolean masks that the forward makes and the backward reads.

    Returns:
        A pass of effect ``EXACT``.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> layers = [one for _ in range(9) for one in (nn.Linear(64, 64), nn.Dropout())]
        >>> model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> planned = memplan.optimize(model, batch, budget="60%")  # it is one of the defaults
        >>> planned.plan.peak_bytes <= planned.plan.budget_bytes
        True
    """
    lowerings = {_PACK: _call_of_pack, _UNPACK: _call_of_unpack}
    return Pass(_NAME, Effect.EXACT, recoveries=_recoveries, lowerings=lowerings)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Bits [n / 8] of a boolean tensor of n elements, a multiple of 8, that fill its storage."""
    words = mask.as_strided((mask.numel(),), (1,), 0).view(torch.int64) * _GATHER
    return words.bitwise_right_shift_(56).to(torch.uint8)


def unpack(packed: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """The boolean tensor from its bits, with its shape and layout."""
    words = packed.to(torch.int64).mul_(_SPREAD).bitwise_and_(_ONE_EACH)
    return words.view(torch.uint8).clamp_(max=1).view(torch.bool).as_strided(shape, strides)


def _call_of_pack(captured: Captured, op: Op, stashed: Sequence[Any]) -> OpCall:
    del stashed
    return OpCall(pack, (source_of_call(captured, op),))


def _call_of_unpack(captured: Captured, op: Op, stashed: Sequence[Any]) -> OpCall:
    mask = first_tensor(source_of_call(captured, op))
    return OpCall(unpack, (stashed[0], tuple(mask.shape), mask.stride()))


def _recoveries(captured: Captured, context: RecoveryContext) -> tuple[Recovery, ...]:
    ops = captured.program.ops
    read = {value for op in ops if op.phase is Phase.BACKWARD for value in op.operands}
    return tuple(
        context.stash(_NAME, op, op.results[0], nbytes // 8, stash=_PACK, restore=_UNPACK)
        for op in ops
        if op.phase is Phase.FORWARD
        and not read.isdisjoint(op.results)
        and (nbytes := _mask_bytes(captured.calls[op.id].meta["val"])) is not None
    )


def _mask_bytes(value: object) -> int | None:
    """The size of a mask that can be packed: booleans that fill whole bytes, and nothing else."""
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.bool:
        return None
    nbytes = value.untyped_storage().nbytes()
    is_dense = nbytes == value.numel() and value.device.type == "cpu"
    return nbytes if is_dense and nbytes % 8 == 0 and nbytes >= _LEAST_BYTES else None
