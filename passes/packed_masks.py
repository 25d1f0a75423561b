"""Masks of dropout kept as bits: an eighth of their memory, without drawing them anew.

torch draws a mask one number after the other; packing and unpacking work on eight booleans at a
time. So of the ways to get a mask back this is the cheap one; drawing it again under the
generator's kept state frees more. Both are offered, and the plan says where one is worth it.
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
"""Smaller masks take about as long to pack as to draw."""


def pack_masks() -> Pass:
    """Offer to keep boolean masks that were drawn at random as bits.

    Returns:
        A pass of effect ``EXACT``.
    """
    return Pass(_NAME, Effect.EXACT, recoveries=_recoveries)


def _recoveries(captured: Captured, context: RecoveryContext) -> tuple[Recovery, ...]:
    op_ids, value_ids = count(context.first_op), count(context.first_value)
    return tuple(
        _packed(op, next(op_ids), next(op_ids), next(value_ids), nbytes)
        for op in captured.program.ops
        if op.phase is Phase.FORWARD
        and op.is_random
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
