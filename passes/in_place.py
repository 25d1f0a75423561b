"""Results written over operands that are no longer needed.

Pointwise kernels, and softmax's over the last dimension, read an element (a row) before they write
it. Where an operand is last used by such an op, the result can take its memory: the same bits, one
tensor less at the peak, and often less time. The pass marks the candidates; the plan decides which
operands end where, and those that a backward still reads end later.

Not offered: complex results. In place, a quotient of 20 complex numbers has other last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

import torch
from torch import fx

from memplan.capture import InPlace
from memplan.transforms.passes import Effect, Pass

_NAME = "reuse_operands"
_Into: TypeAlias = tuple[Callable[..., object], str, tuple[int, ...]]
aten = torch.ops.aten

_OVER_ITSELF: Final[dict[object, Callable[..., object]]] = {
    aten.abs.default: aten.abs_.default,
    aten.neg.default: aten.neg_.default,
    aten.exp.default: aten.exp_.default,
    aten.log.default: aten.log_.default,
    aten.sqrt.default: aten.sqrt_.default,
    aten.rsqrt.default: aten.rsqrt_.default,
    aten.reciprocal.default: aten.reciprocal_.default,
    aten.sin.default: aten.sin_.default,
    aten.cos.default: aten.cos_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.erf.default: aten.erf_.default,
    aten.relu.default: aten.relu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.silu.default: aten.silu_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.elu.default: aten.elu_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.hardsigmoid.default: aten.hardsigmoid_.default,
    aten.clamp.default: aten.clamp_.default,
    aten.clamp_min.default: aten.clamp_min_.default,
    aten.pow.Tensor_Scalar: aten.pow_.Scalar,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor: aten.masked_fill_.Tensor,
}
"""Ops with a form that writes over their first operand."""

_OVER_ANY: Final[dict[object, _Into]] = {
    aten.add.Tensor: (aten.add.out, "out", (0, 1)),
    aten.sub.Tensor: (aten.sub.out, "out", (0, 1)),
    aten.mul.Tensor: (aten.mul.out, "out", (0, 1)),
    aten.div.Tensor: (aten.div.out, "out", (0, 1)),
    aten.maximum.default: (aten.maximum.out, "out", (0, 1)),
    aten.minimum.default: (aten.minimum.out, "out", (0, 1)),
    aten.where.self: (aten.where.self_out, "out", (1, 2)),
    aten.addcmul.default: (aten.addcmul.out, "out", (0, 1, 2)),
    aten.addcdiv.default: (aten.addcdiv.out, "out", (0, 1, 2)),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input", (0, 1)),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input", (0, 1)),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input", (0, 1)),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input", (0, 1)),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input", (0, 1)),
    aten.leaky_relu_backward.default: (aten.leaky_relu_backward.grad_input, "grad_input", (0, 1)),
    aten.elu_backward.default: (aten.elu_backward.grad_input, "grad_input", (0,)),
    aten.hardtanh_backward.default: (aten.hardtanh_backward.grad_input, "grad_input", (0, 1)),
    aten.softplus_backward.default: (aten.softplus_backward.grad_input, "grad_input", (0, 1)),
}
"""Ops with a form that writes to a given output, its keyword, and the operands to write over."""

_OVER_ROWS: Final[dict[object, _Into]] = {
    aten._softmax.default: (aten._softmax.out, "out", (0,)),
    aten._log_softmax.default: (aten._log_softmax.out, "out", (0,)),
    aten._softmax_backward_data.default: (aten._softmax_backward_data.out, "grad_input", (0, 1)),
    aten._log_softmax_backward_data.default: (
        aten._log_softmax_backward_data.out,
        "out",
        (0, 1),
    ),
}
"""The same for ops that work row by row, along the last dimension."""


def reuse_operands() -> Pass:
    """Offer to write results over operands that are last used there.

    Returns:
        A pass of effect ``EXACT``.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.Tanh())]
        >>> model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> one = [memplan.passes.reuse_operands()]
        >>> plan = memplan.plan(model, batch, passes=one, default_passes=False)
        >>> plan.peak_bytes < memplan.plan(model, batch, default_passes=False).peak_bytes
        True
    """
    return Pass(_NAME, Effect.EXACT, rewrite_joint=_mark)


def _mark(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if found := dict(_in_place(node)):
            node.meta["in_place"] = found


def _in_place(node: fx.Node) -> Iterable[tuple[int, InPlace]]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.is_complex():
        return
    if node.target in _OVER_ITSELF:
        yield 0, InPlace(_OVER_ITSELF[node.target])
    found = _OVER_ANY.get(node.target)
    if found is None and node.target in _OVER_ROWS and _is_along_rows(node):
        found = _OVER_ROWS[node.target]
    if found is not None:
        target, out, positions = found
        for position in positions:
            if position < len(node.args):
                yield position, InPlace(target, out)


def _is_along_rows(node: fx.Node) -> bool:
    """Tell whether a softmax, or its backward, runs along a contiguous last dimension."""
    value = node.meta["val"]
    dim = next(argument for argument in node.args if isinstance(argument, int))
    return dim in (-1, value.dim() - 1) and value.is_contiguous()
