"""What a fused step does in place of a backward: it hands on gradients that are finished."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator

import torch

from memplan.errors import PlanMismatch
from memplan.torch_internals import backward_keeps_graph

_CHUNK = 1 << 16
"""Elements that are scaled at once, so that checking them takes next to no memory."""


class Pending:
    """Lives as long as finished gradients wait for their backward."""


class Finished:
    """Whether gradients of a forward are waiting."""

    def __init__(self) -> None:
        self._pending: weakref.ref[Pending] | None = None

    def begin(self) -> Pending:
        """A forward has finished its gradients."""
        pending = Pending()
        self._pending = weakref.ref(pending)
        return pending

    def check_none_pending(self) -> None:
        """Refuse a forward while the gradients of another are waiting.

        Raises:
            PlanMismatch: if so.
        """
        if self._pending is not None and self._pending() is not None:
            raise PlanMismatch(
                "a second forward of a fused step before the backward of the first, whose "
                "gradients are still held: call backward() on its loss, or drop the loss (del "
                "loss); run what is only evaluated under torch.no_grad(). Steps are fused by "
                "Options(fused=True) and by learn_locally."
            )


def check_not_retained() -> None:
    """Refuse a backward that asks for another one.

    Raises:
        PlanMismatch: if it does.
    """
    if backward_keeps_graph():
        raise PlanMismatch(
            "retain_graph=True asks for a second backward, and a fused step hands its finished "
            "gradients on once. Steps are fused by Options(fused=True) and by learn_locally."
        )


def scale(gradients: Iterable[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply finished gradients, in place, by what arrives at the loss.

    A power of two gives the bits that a backward from it would give, as long as nothing
    overflows or underflows; any other factor would round at other places.

    Args:
        gradients: of any shapes.
        factor: one element.

    Raises:
        PlanMismatch: if the bits would be others.
    """
    number = float(factor)
    if number == 1.0:
        return
    if not math.isfinite(number) or math.frexp(abs(number))[0] != 0.5:
        raise PlanMismatch(
            f"the gradient that arrives at the loss of a fused step is {number:g}; it must be a "
            "power of two (1/2, 1/4, 65536, ...), or gradients that are finished already could "
            "not be scaled without rounding. Divide by such a number, or scale the learning rate "
            "instead. Steps are fused by Options(fused=True) and by learn_locally."
        )
    for gradient in gradients:
        _scale_one(gradient, number)


def _scale_one(gradient: torch.Tensor, number: float) -> None:
    for chunk in _chunks(gradient):
        scaled = chunk * number
        if not torch.equal(scaled / number, chunk):
            raise PlanMismatch(
                f"a finished gradient times {number:g}, which arrives at the loss of a fused step, "
                "overflows or underflows, or is no number; use another scale"
            )
        chunk.copy_(scaled)


def _chunks(gradient: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of all elements, in the order in which they are stored."""
    by_stride = sorted(range(gradient.dim()), key=gradient.stride, reverse=True)
    flat = gradient.permute(by_stride).view(-1)
    for start in range(0, len(flat), _CHUNK):
        yield flat[start : start + _CHUNK]
