"""Boolean masks kept as bits: an eighth of their memory, without making them anew.

Masks of dropout are drawn one number after the other, and masks of signs are made of whole tensors
that are gone by then; packing and unpacking work on eight booleans at a time. So of the ways to get
a mask back this is the cheap one; drawing it again under the generator's kept state, or computing
it again, frees more. All are offered, and the plan says where one is worth it.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import torch

from memplan.passing import Effect, Pass, RecoveryContext
from memplan.program import Op, Phase, Role, Value
from memplan.schedule import Recovery

if TYPE_CHECKING:
    from memplan.capture import Captured

_NAME = "pack_masks"
_LEAST_BYTES = 4096
"""Smaller masks take about as long to pack as to make."""


def pack_masks() -> Pass:
    """Offer to keep boolean masks that the forward makes and the backward reads as bits.

    Returns:
        A pass of effect ``EXACT``.
    """
    return Pass(_NAME, Effect.EXACT, recoveries=_recoveries)


def _recoveries(captured: Captured, context: RecoveryContext) -> tuple[Recovery, ...]:
    op_ids, value_ids = count(context.first_op), count(context.first_value)
    ops = captured.program.ops
    read = {value for op in ops if op.phase is Phase.BACKWARD for value in op.operands}
    return tuple(
        _packed(op, next(op_ids), next(op_ids), next(value_ids), nbytes)
        for op in ops
        if op.phase is Phase.FORWARD
        and not read.isdisjoint(op.results)
        and (nbytes := _mask_bytes(captured.calls[op.id].meta["val"])) is not None
    )


def _mask_bytes(value: object) -> int | None:
    """The size of a mask that can be packed: booleans, whole bytes of them, and nothing else."""
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.bool:
        return None
    nbytes = value.untyped_storage().nbytes()
    is_dense = nbytes == value.numel() and value.device.type == "cpu"
    return nbytes if is_dense and nbytes % 8 == 0 and nbytes >= _LEAST_BYTES else None


def _packed(op: Op, save: int, restore: int, bits: int, nbytes: int) -> Recovery:
    def call(id: int, target: str, reads: int, makes: int, phase: Phase) -> Op:
        return Op(
            id=id,
            target=target,
            operands=(reads,),
            results=(makes,),
            phase=phase,
            module=op.module,
            source=op.source,
            signature=f"{target}({op.signature})",
            variant_of=op.id,
        )

    mask = op.results[0]
    return Recovery(
        pass_name=_NAME,
        restores=op.results,
        restore=call(restore, "memplan.unpack_mask", bits, mask, Phase.BACKWARD),
        prepare=call(save, "memplan.pack_mask", mask, bits, Phase.FORWARD),
        keeps=(Value(bits, nbytes // 8, Role.KEPT, producer=save, module=op.module),),
    )
