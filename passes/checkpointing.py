"""Activation checkpointing: drop what the forward made, and make it again for the backward.

Deterministic ops are recomputed from their inputs (Griewank and Walther, "Algorithm 799: revolve",
2000; Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
https://arxiv.org/abs/1604.06174). Here the unit is one op, not a block: which values are dropped,
and when, is the planner's choice. Random ops are redrawn: the generator's state before the op is
kept (5 KB on the CPU), and the op runs again under it. Batch norm in training runs again without
its running statistics, which are made once. All give the bits of the first run.

Not offered: ops that write in place, and ops that read what the step overwrites.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import fx

from memplan.passing import Effect, Pass, RecoveryContext
from memplan.program import Op, Phase, Role, Value
from memplan.schedule import Recovery

if TYPE_CHECKING:
    from memplan.capture import Captured

_NAME = "checkpoint_activations"
_BATCH_NORM = "aten._native_batch_norm_legit_functional.default"
_TRAINING = 5
"""Which argument of it says that it takes the batch's statistics."""


def checkpoint_activations() -> Pass:
    """Offer to recompute, or redraw, everything that the forward makes.

    Returns:
        A pass of effect ``EXACT``.
    """
    return Pass(_NAME, Effect.EXACT, recoveries=_recoveries)


def _recoveries(captured: Captured, context: RecoveryContext) -> tuple[Recovery, ...]:
    program = captured.program
    # What the backward overwrites is read by nothing after it.
    overwritten = {value for op in program.ops if op.phase is Phase.FORWARD for value in op.mutates}
    op_ids, value_ids = count(context.first_op), count(context.first_value)
    offered = []
    for op in program.ops:
        if op.phase is not Phase.FORWARD or not op.results or op.mutates:
            continue
        if op.target == _BATCH_NORM and captured.calls[op.id].args[_TRAINING]:
            offered.append(_batch_norm(captured, op, next(op_ids)))
            continue
        if overwritten.intersection(op.operands):
            continue
        if op.is_random:
            new = next(op_ids), next(op_ids), next(value_ids)
            offered.append(_redraw(op, *new, captured.device))
        else:
            offered.append(Recovery(_NAME, op.results, op))
    return tuple(offered)


def _batch_norm(captured: Captured, op: Op, id: int) -> Recovery:
    """Normalise again, without reading or making running statistics: those are made once."""
    node = captured.calls[op.id]
    read = [captured.storage[arg] for arg in node.args[:3] if isinstance(arg, fx.Node)]
    return Recovery(
        pass_name=_NAME,
        restores=op.results[:3],
        restore=Op(
            id=id,
            target="memplan.batch_norm_without_statistics",
            operands=tuple(dict.fromkeys(read)),
            results=op.results[:3],
            phase=Phase.BACKWARD,
            module=op.module,
            source=op.source,
            signature=f"memplan.batch_norm_without_statistics({op.signature})",
            variant_of=op.id,
        ),
    )


def _redraw(op: Op, save: int, draw: int, state: int, device: torch.device) -> Recovery:
    """Keep the state of the generator before a random op; draw again under it."""
    # That of a GPU's generator is kept in the host's memory.
    nbytes = 0 if device.type == "cuda" else torch.get_rng_state().nbytes
    return Recovery(
        pass_name=_NAME,
        restores=op.results,
        restore=Op(
            id=draw,
            target="memplan.redraw",
            operands=(state, *op.operands),
            results=op.results,
            phase=Phase.BACKWARD,
            module=op.module,
            source=op.source,
            signature=f"memplan.redraw({op.signature})",
            variant_of=op.id,
        ),
        prepare=Op(
            id=save,
            target="memplan.save_rng_state",
            operands=(),
            results=(state,),
            module=op.module,
            source=op.source,
            signature="memplan.save_rng_state()",
            variant_of=op.id,
        ),
        keeps=(Value(state, nbytes, Role.KEPT, producer=save, module=op.module),),
    )
