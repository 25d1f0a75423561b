"""Reversible residuals: streams restored from later ones, so that none need be saved.

Where two streams are each changed by a function of the other, ``y1 = x1 + F(x2); y2 = x2 + G(y1)``,
the sums can be inverted: ``x2 = y2 - G(y1)``, then ``x1 = y1 - F(x2)`` (Dinh et al., "NICE", 2014,
https://arxiv.org/abs/1410.8516; Gomez et al., "The Reversible Residual Network", 2017,
https://arxiv.org/abs/1707.04585). Only the streams at the end of a chain are saved. F and G are
recomputed, as their backward needs their inner values, and that run serves both; with the other
passes' recoveries, so that dropout is redrawn under its own state and statistics are updated once.

Inversion loses bits: copies differ from the originals by rounding, a little more with every
coupling. The error is measured at the first training call, and streams are saved where it would
exceed ``tolerance``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from memplan.analysis import is_backward, memory_of, views_of
from memplan.ir.program import Role
from memplan.ir.schedule import Recovery
from memplan.passes.reversible.couplings import SUMS, Chain, Coupling, find_couplings
from memplan.passes.reversible.fixed_point import MANTISSA_BITS, add_on_grid, round_to_grid
from memplan.passes.reversible.inverse_ops import call_of_undo
from memplan.transforms.passes import Effect, Pass, RecoveryContext

if TYPE_CHECKING:
    from memplan.capture import Captured
    from memplan.runtime.drift import Drift
    from memplan.runtime.module import PlannedModule

_NAME = "invert_couplings"
_UNDO = "memplan.undo"
_TOLERANCE: Final = 1e-4
_HALF_TOLERANCE: Final = 1e-2
"""Tolerance for chains whose functions compute in 16 bits."""

_GRID_BITS: Final = 14


def invert_couplings(tolerance: float | None = None, grid: bool | int = False) -> Pass:
    """Offer to invert the sums of reversible residual blocks, however they are written.

    Args:
        tolerance: relative error, in the 2-norm, allowed in a restored stream. By default 1e-4, or
            1e-2 where functions compute in 16 bits.
        grid: round streams of 32 bits, and what is added to them, to multiples of 2^-14 (True) or
            2^-grid: inversion then gives the same bits, while a stream is below 2^(24 - grid),
            which each call checks. The backward treats the rounding as the identity.

    Returns:
        A pass of effect ``ROUNDING``; with a grid, which changes the forward, ``APPROXIMATE``.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> blocks = nn.Sequential(*(Block() for _ in range(4)))
        >>> model = memplan.WithLoss(blocks, nn.functional.mse_loss)
        >>> batch = torch.randn(64, 32), torch.randn(64, 32)
        >>> both = [memplan.passes.make_reversible(), memplan.passes.invert_couplings()]
        >>> planned = memplan.optimize(model, batch, budget="70%", passes=both)
        >>> planned.plan.peak_bytes <= planned.plan.budget_bytes
        True
    """
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is a relative error above 0, got {tolerance!r}")
    bits = _GRID_BITS if grid is True else grid
    if not isinstance(bits, int) or not 0 <= bits < MANTISSA_BITS:
        raise ValueError(f"grid is True, or from 1 to {MANTISSA_BITS - 1}, got {grid!r}")

    arguments: dict[str, object] = {} if tolerance is None else {"tolerance": tolerance}
    return Pass(
        _NAME,
        Effect.APPROXIMATE if bits else Effect.ROUNDING,
        {**arguments, "grid": bits} if bits else arguments,
        rewrite_joint=partial(_rewrite, bits=bits),
        recoveries=partial(_recoveries, tolerance=tolerance),
        lowerings={_UNDO: call_of_undo},
        notes=_notes,
    )


def check_drift(planned: PlannedModule, batch: object) -> Drift:
    """Measure the errors that inversion leaves in restored streams, and in the gradients.

    The step runs twice and leaves nothing behind. ``str`` of the result puts it in words.

    Args:
        planned: from ``memplan.optimize`` with ``invert_couplings()``.
        batch: one batch, as for ``optimize``.

    Returns:
        Errors of the restored streams, and of the gradients.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> blocks = nn.Sequential(*(Block() for _ in range(4)))
        >>> model = memplan.WithLoss(blocks, nn.functional.mse_loss)
        >>> batch = torch.randn(64, 32), torch.randn(64, 32)
        >>> both = [memplan.passes.make_reversible(), memplan.passes.invert_couplings()]
        >>> planned = memplan.optimize(model, batch, budget="70%", passes=both)
        >>> memplan.passes.check_drift(planned, batch).is_within_tolerance
        True
    """
    return planned.measure_drift(batch)


def _rewrite(graph: fx.Graph, bits: int) -> None:
    _read_parts(graph)
    if bits:
        _round(graph, bits)


def _recoveries(
    captured: Captured, context: RecoveryContext, tolerance: float | None
) -> tuple[Recovery, ...]:
    return tuple(_each_recovery(captured, context, tolerance))


def _each_recovery(
    captured: Captured, context: RecoveryContext, tolerance: float | None
) -> Iterator[Recovery]:
    ops = {node: op for op, node in captured.calls.items()}
    program = captured.program
    for chain in find_couplings(captured.graph).chains:
        allowed = _tolerance_of(chain) if tolerance is None else tolerance
        for coupling in chain.couplings:
            for node in _undone(coupling):
                op = program.ops[ops[node]]
                stream = captured.storage[_stream_of(coupling, node)]
                if program.values[stream].role is not Role.ACTIVATION:
                    continue
                total = op.results[0]
                yield Recovery(
                    _NAME,
                    values=(stream,),
                    restore_op=op.variant(
                        next(context.op_ids),
                        _UNDO,
                        (value for value in (total, *op.operands) if value != stream),
                        (stream,),
                        settings=str(op.operands.index(stream)),
                        may_overwrite=(total,),
                    ),
                    exactness=Effect.EXACT if node.target is add_on_grid else Effect.ROUNDING,
                    chain=chain.name,
                    tolerance=allowed,
                )


def _undone(coupling: Coupling) -> tuple[fx.Node, ...]:
    """The sum of a coupling, and the product in it, if any."""
    is_scaled = coupling.unscaled is not coupling.stream
    return (coupling.total, coupling.stream) if is_scaled else (coupling.total,)


def _stream_of(coupling: Coupling, node: fx.Node) -> fx.Node:
    """The stream that inverting a node of a coupling restores."""
    return coupling.stream if node is coupling.total else coupling.unscaled


def _tolerance_of(chain: Chain) -> float:
    tensors = [
        tensor for c in chain.couplings for tensor in (c.total.meta["val"], c.change.meta["val"])
    ]
    return _HALF_TOLERANCE if any(_is_half(tensor) for tensor in tensors) else _TOLERANCE


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _notes(captured: Captured) -> tuple[str, ...]:
    """The couplings found, and the reasons why other sums are not inverted."""
    found = find_couplings(captured.graph)
    total = sum(len(chain.couplings) for chain in found.chains)
    others = "; ".join(f"{count} sums {reason}" for reason, count in found.kept.items())
    if not total:
        return (f"invert_couplings found no couplings{f': {others}' if others else ''}",)
    text = f"{total} couplings in {len(found.chains)} chains can be undone"
    return (f"{text}; not undone: {others}" if others else text,)


def _read_parts(graph: fx.Graph) -> None:
    """Let readers of one part of two streams in one tensor read that stream itself.

    A model may carry its streams as one tensor, which it splits and joins again.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.cat.default or is_backward(node):
            continue
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if all(isinstance(part, fx.Node) and part.target in SUMS for part in parts):
            _replace_parts(graph, node, list(parts), int(str(dim)))


def _replace_parts(graph: fx.Graph, whole: fx.Node, parts: list[fx.Node], dim: int) -> None:
    memory, result = memory_of(whole), whole.meta["val"]
    part_at = {}
    start = 0
    for part in parts:
        mine = part.meta["val"]
        place = result.narrow(dim, start, mine.shape[dim])
        if mine.dtype != result.dtype or mine.stride() != torch.empty_like(place).stride():
            return
        part_at[_place(place)] = part
        start += mine.shape[dim]
    found = {
        node: part_at[_place(node.meta["val"])]
        for node in graph.nodes
        if memory_of(node) == memory and _place(node.meta["val"]) in part_at
    }
    values = views_of(graph, {node: part.meta["val"] for node, part in found.items()}, memory)
    if values is None:
        return
    for node, part in found.items():
        node.replace_all_uses_with(part)
    for node in values.keys() - found.keys():
        node.meta["val"] = values[node]


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _round(graph: fx.Graph, bits: int) -> None:
    """Put streams of 32 bits, and what is added to them, on a grid."""
    for chain in find_couplings(graph).chains:
        couplings = [one for one in chain.couplings if _can_be_rounded(one)]
        totals = {memory_of(one.total) for one in chain.couplings}
        starts = {memory_of(one.stream) for one in couplings} - totals
        if len(couplings) < len(chain.couplings):
            continue
        is_second = {one.total: one.total.args[1] is one.stream for one in couplings}
        bases = [next(n for n in graph.nodes if memory_of(n) == memory) for memory in starts]
        if not all(_rounded(graph, node, bits) for node in bases):
            continue
        for one in couplings:
            stream, change_node = one.total.args[:: -1 if is_second[one.total] else 1]
            assert isinstance(change_node, fx.Node)
            with graph.inserting_before(one.total):
                change = graph.call_function(round_to_grid, (change_node, bits))
            change.meta = _meta(change_node, one.total.meta["val"].clone())
            one.total.target = add_on_grid
            one.total.meta.pop("in_place", None)
            one.total.args = (stream, change, bits)


def _rounded(graph: fx.Graph, node: fx.Node, bits: int) -> bool:
    """Let all readers of a stream's start read it on the grid, if possible."""
    value = node.meta["val"].clone()
    values = views_of(graph, {node: value}, memory_of(node))
    if values is None:
        return False
    with graph.inserting_after(node):
        start = graph.call_function(round_to_grid, (node, bits))
    start.meta = _meta(node, value)
    node.replace_all_uses_with(start, lambda user: user is not start)
    for view in values.keys() - {node}:
        view.meta["val"] = values[view]
    return True


def _meta(node: fx.Node, value: torch.Tensor) -> dict[str, Any]:
    """Metadata of a new node that takes the place of another."""
    return {**{key: item for key, item in node.meta.items() if key != "in_place"}, "val": value}


def _can_be_rounded(coupling: Coupling) -> bool:
    """Tell whether a coupling is a plain sum on a stream of 32 bits."""
    is_plain = coupling.total.target is torch.ops.aten.add.Tensor and not coupling.total.kwargs
    is_whole = coupling.change.meta["val"].shape == coupling.total.meta["val"].shape
    is_plain = is_plain and is_whole and coupling.unscaled is coupling.stream
    return is_plain and coupling.total.meta["val"].dtype is torch.float32
