"""How an op is called: its target and arguments, for emission and for measurement alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memplan.capture.captured import Captured, tensors_of
from memplan.packing import pack, unpack
from memplan.passing import InPlace
from memplan.program import Op
from memplan.rng import OWN_DRAWS, redraw, save_rng_state
from memplan.undoing import undo


@dataclass(frozen=True)
class OpCall:
    """A target and arguments, in which tensors are nodes of the joint graph.

    Attributes:
        in_place: by the position of an argument, the call that writes the result over it.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: Mapping[int, InPlace] = field(default_factory=dict)


def call_of(captured: Captured, op: Op, kept: Any = None) -> OpCall:
    """The call of a captured op, or of a new op of a recovery.

    Args:
        captured: what the op belongs to.
        op: the op.
        kept: what stands for the value that a recovery kept, where the op reads one.
    """
    source = source_of_call(captured, op)
    assert callable(source.target)
    if op.variant_of is None:
        in_place = source.meta.get("in_place", {})
        return OpCall(source.target, tuple(source.args), dict(source.kwargs), in_place)
    return _variant(captured, op, source, kept)


def _variant(captured: Captured, op: Op, source: fx.Node, kept: Any) -> OpCall:
    """The call of a new op, which takes the arguments of a captured one."""
    assert callable(source.target)
    if op.target == "memplan.undo":
        operands = [arg for arg in source.args[:2] if isinstance(arg, fx.Node)]
        position = [captured.storage[arg] for arg in operands].index(op.results[0])
        target, out, args, kwargs = undo(source, position)
        return OpCall(target, args, kwargs, {args.index(source): InPlace(out, "out")})
    device = str(first_tensor(source).device)
    if op.target == "memplan.save_rng_state":
        return OpCall(save_rng_state, (device,), {})
    if op.target == "memplan.batch_norm_without_statistics":
        x, weight, bias, _, _, training, momentum, eps = source.args
        target = torch.ops.aten._native_batch_norm_legit.no_stats
        return OpCall(target, (x, weight, bias, training, momentum, eps), {})
    if op.target == "memplan.pack_mask":
        return OpCall(pack, (source,), {})
    if op.target == "memplan.unpack_mask":
        mask = first_tensor(source)
        return OpCall(unpack, (kept, tuple(mask.shape), mask.stride()), {})
    assert op.target == "memplan.redraw", f"no code for {op.target}"
    names = {function: name for name, function in OWN_DRAWS.items()}
    drawn = names.get(source.target, source.target)
    return OpCall(redraw, (kept, device, drawn, *source.args), dict(source.kwargs))


def source_of_call(captured: Captured, op: Op) -> fx.Node:
    """The node of a captured op, or of the one whose arguments a new op takes."""
    return captured.calls[op.id if op.variant_of is None else op.variant_of]


def made_up_kept(captured: Captured, op: Op) -> torch.Tensor | None:
    """A tensor like the one that an op of a recovery reads and that was kept for it."""
    if op.target == "memplan.redraw":
        return save_rng_state(str(first_tensor(source_of_call(captured, op)).device))
    if op.target == "memplan.unpack_mask":
        return torch.zeros(first_tensor(source_of_call(captured, op)).numel() // 8).byte()
    return None


def reads_kept(op: Op) -> bool:
    """Whether the first operand of an op is what a recovery kept."""
    return op.target in ("memplan.redraw", "memplan.unpack_mask")


def first_tensor(node: fx.Node) -> torch.Tensor:
    """The first tensor among an op's results, as recorded."""
    return tensors_of(node.meta["val"])[0]
