"""The backward of a fused step: it passes on gradients that are finished already."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from memplan.errors import PlanMismatch
from memplan.torch_internals import backward_keeps_graph

_MOST, _FEWEST = 1 << 16, 1 << 8
"""Elements scaled at once, at most and at least."""

_FUSED_BY = "Steps are fused by Options(fused=True) and by passes that ask for it."

_SCRATCH = 4
"""Scratch for checking an element, in elements: its multiple, and three booleans at most."""


class Pending:
    """A token that lives as long as finished gradients wait for their backward."""


class PendingGradients:
    """A record of whether gradients of a planned forward are waiting."""

    def __init__(self) -> None:
        self._pending: weakref.ref[Pending] | None = None
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[Pending]:
        """Context of a forward, whose gradients wait as long as the yielded token lives.

        A failed forward has nothing waiting, whoever still holds its frames.

        Raises:
            PlanMismatch: if gradients of another are waiting.
        """
        with self._lock:
            if self._pending is not None and self._pending() is not None:
                raise PlanMismatch(
                    "a second forward of a fused step before the backward of the first, whose "
                    "gradients are still held: call backward() on its loss, or drop the loss (del "
                    "loss); run what is only evaluated under torch.no_grad(). " + _FUSED_BY
                )
            pending = Pending()
            self._pending = weakref.ref(pending)
        try:
            yield pending
        except BaseException:
            self._pending = None
            raise


def check_not_retained() -> None:
    """Refuse a backward that asks for another one.

    Raises:
        PlanMismatch: if it does.
    """
    if backward_keeps_graph():
        raise PlanMismatch(
            "retain_graph=True asks for a second backward, and a fused step hands its finished "
            "gradients on once. " + _FUSED_BY
        )


def scale(
    gradients: Sequence[torch.Tensor], factor: torch.Tensor, room_bytes: int, needs_one: str = ""
) -> None:
    """Multiply finished gradients, in place, by the gradient that arrives at the loss.

    A power of two gives the bits that a backward from it would give, as long as nothing overflows
    or underflows; any other factor would round at other places. Infinities and NaNs stay as they
    are. Nothing is changed if anything is refused.

    Args:
        gradients: of any shapes.
        factor: one element.
        room_bytes: bytes that scaling may take.
        needs_one: why the factor must be one; or "".

    Raises:
        PlanMismatch: if the bits would differ.
    """
    number = float(factor)
    if number == 1.0:
        return
    if needs_one:
        raise PlanMismatch(
            f"the gradient that arrives at the loss of a fused step is {number:g}, and must be one "
            f"here: {needs_one}. Scale the learning rate instead of the loss. " + _FUSED_BY
        )
    if not math.isfinite(number) or math.frexp(abs(number))[0] != 0.5:
        raise PlanMismatch(
            f"the gradient that arrives at the loss of a fused step is {number:g}; it must be a "
            "power of two (1/2, 1/4, 65536, ...), or gradients that are finished already could "
            "not be scaled without rounding. Divide by such a number, or scale the learning rate "
            "instead. " + _FUSED_BY
        )
    for gradient in gradients:
        for chunk in _chunks(gradient, room_bytes):
            is_same = (chunk * number).div_(number) == chunk
            # zero, infinities and NaNs stay as they are
            is_same.logical_or_(chunk == 0).logical_or_(chunk.isfinite().logical_not_())
            if not bool(is_same.all()):
                raise PlanMismatch(
                    f"a finished gradient times {number:g}, which arrives at the loss of a fused "
                    "step, overflows or underflows; use another scale"
                )
    for gradient in gradients:
        gradient.mul_(number)


def _chunks(gradient: torch.Tensor, room_bytes: int) -> Iterator[torch.Tensor]:
    """Views of all elements, in storage order."""
    size = room_bytes // (_SCRATCH * gradient.element_size())
    size = min(max(size, _FEWEST), _MOST)
    by_stride = sorted(range(gradient.dim()), key=gradient.stride, reverse=True)
    flat = gradient.permute(by_stride).view(-1)
    for start in range(0, len(flat), size):
        yield flat[start : start + size]
