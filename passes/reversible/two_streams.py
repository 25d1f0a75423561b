"""Two streams in place of one: plain residual networks made reversible.

A stack of residual blocks ``h' = h + f(h)`` cannot be inverted. With the residual added to the
stream before the last, ``h'' = h + f(h')``, it can: that is the pairing of Gomez et al., "The
Reversible Residual Network", 2017, https://arxiv.org/abs/1707.04585, in which each block changes
one of two streams by a function of the other. Between the two lies
``h'' = alpha h' + beta h + f(h')`` (compare Zhao et al., "Dr2Net", 2024,
https://arxiv.org/abs/2401.04105, and Liao et al., "Make Pre-trained Model Reversible", 2023,
https://arxiv.org/abs/2306.00477): alpha 1 and beta 0 is the network as it was trained, alpha 0 and
beta 1 the reversible one. Inverting a block divides by beta, so a small one loses bits:
``invert_couplings`` measures how many, and saves streams where it must.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from memplan.analysis import Residuals
from memplan.transforms.passes import Change, Effect, ModelContext, Pass

if TYPE_CHECKING:
    from memplan.capture.sample import Sample

_NAME = "make_reversible"


def make_reversible(alpha: float = 0.0, beta: float = 1.0) -> Pass:
    """Add each residual to the stream before the last, so that ``invert_couplings`` can invert it.

    Acts on every sum ``h + f(h)`` of tensors of one shape whose ``h`` is such a sum itself, in
    training and in evaluation; a block that changes the shape starts over. Parameters keep their
    names.

    Args:
        alpha: factor of the last stream. 1, with beta 0, is the model as it is.
        beta: factor of the stream before it. 0 cannot be inverted.

    Returns:
        A pass of effect ``APPROXIMATE``: it is another model.

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
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.make_reversible()])
        >>> [effect.value for effect in planned.plan.effects]
        ['approximate']
    """
    return Pass(
        _NAME,
        Effect.APPROXIMATE,
        {"alpha": alpha, "beta": beta},
        change=partial(_change, alpha, beta),
    )


def _change(alpha: float, beta: float, model: nn.Module, context: ModelContext) -> Change:
    del model, context
    return Change(around=partial(_two_streams, alpha, beta))


def _two_streams(
    alpha: float, beta: float, model: nn.Module, sample: Sample, forward: Callable[[], Any]
) -> Any:
    del model, sample
    with _TwoStreams(alpha, beta):
        return forward()


class _TwoStreams(Residuals):
    """Replaces the sums of residual blocks."""

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.stream_before: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()

    def added(self, stream: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """``alpha * stream + beta * the one before + change``."""
        before = self.stream_before.pop(stream, None)
        if before is None:
            total = stream + change
        else:
            terms = [(self.alpha, stream), (self.beta, before)]
            scaled = [one if factor == 1 else one * factor for factor, one in terms if factor]
            total = sum(scaled, start=change)
        self.stream_before[total] = stream
        return total
