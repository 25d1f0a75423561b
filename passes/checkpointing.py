"""Activation checkpointing: drop what the forward computed, and recompute it for the backward.

Deterministic ops are recomputed from their inputs (Griewank and Walther, "Algorithm 799: revolve",
2000; Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
https://arxiv.org/abs/1604.06174). Here the unit is one op, not a block: which values are dropped,
and when, is the planner's choice. Random ops are redrawn: the generator's state before the op is
stashed (5 KB on the CPU), and the op is recomputed under it. Batch norm in training is recomputed
without its running statistics, which are updated once. All give the bits of the first run.

Not offered: ops that write in place, and ops that read what the step overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from memplan.capture import OpCall, first_tensor, items_of, source_of_call
from memplan.ir.program import Memory, Op, Phase, Role, Value
from memplan.ir.schedule import Recovery
from memplan.rng import OWN_DRAWS, save_rng_state
from memplan.transforms.passes import Effect, Pass, RecoveryContext

if TYPE_CHECKING:
    from memplan.capture import Captured

_NAME = "checkpoint_activations"
_SAVE_STATE, _REDRAW = "memplan.save_rng_state", "memplan.redraw"
_NORMALISE = "memplan.batch_norm_without_statistics"
_BATCH_NORM = "aten._native_batch_norm_legit_functional.default"
_CUDA_STATE_BYTES = 16
"""Size of a GPU generator's state: its seed, and its offset."""

_TRAINING = 5
"""Position of batch norm's argument that selects the batch's statistics."""


def checkpoint_activations() -> Pass:
    """Offer to recompute, or redraw, everything that the forward computes.

    Returns:
        A pass of effect ``EXACT``.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.ReLU())]
        >>> model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> one = [memplan.passes.checkpoint_activations()]
        >>> plan = memplan.plan(model, batch, budget="80%", passes=one, default_passes=False)
        >>> plan.num_restores > 0
        True
    """
    lowerings = {
        _SAVE_STATE: _call_of_save,
        _REDRAW: _call_of_redraw,
        _NORMALISE: _call_of_batch_norm,
    }
    return Pass(_NAME, Effect.EXACT, recoveries=_recoveries, lowerings=lowerings)


def redraw(
    state: torch.Tensor, device: str, op: Callable[..., Any] | str, /, *args: Any, **kwargs: Any
) -> Any:
    """Recompute a random op under ``state``; the generator is left unchanged.

    One of ``OWN_DRAWS`` goes by its name: generated code cannot hold Python functions.
    """
    call = OWN_DRAWS[op] if isinstance(op, str) else op
    is_cuda = torch.device(device).type == "cuda"
    now = save_rng_state(device)
    try:
        torch.cuda.set_rng_state(state, device) if is_cuda else torch.set_rng_state(state)
        return call(*args, **kwargs)
    finally:
        torch.cuda.set_rng_state(now, device) if is_cuda else torch.set_rng_state(now)


def _call_of_save(captured: Captured, op: Op, stashed: Sequence[Any]) -> OpCall:
    del stashed
    return OpCall(save_rng_state, (str(first_tensor(source_of_call(captured, op)).device),))


def _call_of_redraw(captured: Captured, op: Op, stashed: Sequence[Any]) -> OpCall:
    source = source_of_call(captured, op)
    names = {function: name for name, function in OWN_DRAWS.items()}
    drawn = names.get(source.target, source.target)  # type: ignore[arg-type]
    args = (stashed[0], str(first_tensor(source).device), drawn, *source.args)
    return OpCall(redraw, args, dict(source.kwargs), items=items_of(captured, op))


def _call_of_batch_norm(captured: Captured, op: Op, stashed: Sequence[Any]) -> OpCall:
    del stashed
    x, weight, bias, _, _, training, momentum, eps = source_of_call(captured, op).args
    target = torch.ops.aten._native_batch_norm_legit.no_stats
    args = (x, weight, bias, training, momentum, eps)
    return OpCall(target, args, items=items_of(captured, op))


def _recoveries(captured: Captured, context: RecoveryContext) -> tuple[Recovery, ...]:
    program = captured.program
    # Nothing reads what the backward overwrites after that.
    overwritten = {value for op in program.ops if op.phase is Phase.FORWARD for value in op.mutates}
    offered = []
    for op in program.ops:
        if op.phase is not Phase.FORWARD or not op.results or op.mutates:
            continue
        if op.target == _BATCH_NORM and captured.calls[op.id].args[_TRAINING]:
            offered.append(_batch_norm(captured, op, next(context.op_ids)))
            continue
        if overwritten.intersection(op.operands):
            continue
        if op.is_random:
            offered.append(_redraw(op, captured.device, context))
        else:
            offered.append(Recovery(_NAME, op.results, op))
    return tuple(offered)


def _batch_norm(captured: Captured, op: Op, id: int) -> Recovery:
    """Normalise again, without reading or updating running statistics: those are updated once."""
    node = captured.calls[op.id]
    read = [captured.storage[arg] for arg in node.args[:3] if isinstance(arg, fx.Node)]
    results = op.results[:3]
    return Recovery(_NAME, results, op.variant(id, _NORMALISE, read, results))


def _redraw(op: Op, device: torch.device, context: RecoveryContext) -> Recovery:
    """Stash the generator's state before a random op; redraw under it."""
    # A GPU generator's state is stashed in the host's memory.
    is_cuda = device.type == "cuda"
    nbytes = _CUDA_STATE_BYTES if is_cuda else torch.get_rng_state().nbytes
    memory = Memory.HOST if is_cuda else Memory.DEVICE
    state, save = next(context.value_ids), next(context.op_ids)
    saving = op.variant(save, _SAVE_STATE, (), [state], phase=Phase.FORWARD)
    return Recovery(
        pass_name=_NAME,
        values=op.results,
        restore_op=op.variant(
            next(context.op_ids), _REDRAW, (state, *op.operands), op.results, is_random=True
        ),
        stash_op=replace(saving, signature=f"{_SAVE_STATE}()"),  # it costs the same for each op
        stashed=(Value(state, nbytes, Role.KEPT, save, op.module, device=memory),),
    )
