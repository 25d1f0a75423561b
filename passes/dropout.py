"""Dropout's backward with one pass over memory less.

The backward of dropout multiplies the incoming gradient by the mask and by 1 / (1 - p). torch's
kernel for the CPU turns the boolean mask into floats and scales those first, g * (float(m) * s),
where the conversion from bool is slow. Here the mask is read as bytes, and the product is scaled
in place, (g * m) * s. Both have the same bits: m is 0 or 1, so one of the two products is exact,
signed zeros and NaN included; in half precision s is exact too, as captured.

Not applied to other devices, whose kernels are fused.
"""

from __future__ import annotations

import torch
from torch import fx

from memplan.passing import Effect, Pass

_NAME = "speed_up_dropout"


def speed_up_dropout() -> Pass:
    """Replace the kernel of dropout's backward on the CPU.

    Returns:
        A pass of effect ``EXACT``.
    """
    return Pass(_NAME, Effect.EXACT, rewrite_joint=_rewrite)


def _rewrite(graph: fx.Graph) -> None:
    for node in graph.nodes:
        is_dropout = node.target is torch.ops.aten.native_dropout_backward.default
        if is_dropout and node.meta["val"].device.type == "cpu":
            node.target = dropout_backward


def dropout_backward(gradient: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """``gradient`` where the boolean ``mask`` is True, times ``scale``; same shape."""
    return torch.mul(gradient, mask.view(torch.uint8)).mul_(scale)
