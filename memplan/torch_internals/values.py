"""Code that asks for values of tensors while it is traced, where there are none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from memplan.torch_internals.state import OpOverload


@contextlib.contextmanager
def asking_for_lists() -> Iterator[None]:
    """Inside, ``tolist`` of a tensor that is traced asks for all its values at once (2.13-2.15)."""
    traced: Any = FunctionalTensor
    original = vars(traced)["tolist"]
    traced.tolist = torch.Tensor.tolist
    try:
        yield
    finally:
        traced.tolist = original


def _shapes_of_ctc_loss(
    mode: FakeTensorMode, func: OpOverload, log_probs: torch.Tensor, *others: Any, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses, and of each time and label, a blank between any two, what the backward needs."""
    del mode, func, kwargs
    _, _, target_lengths, *_ = others
    batch = log_probs.shape[1] if log_probs.dim() == 3 else 1
    labels = 2 * max(target_lengths, default=0) + 1
    alpha = log_probs.new_empty((batch, log_probs.shape[0], labels))
    return log_probs.new_empty((batch,) if log_probs.dim() == 3 else ()), alpha


@contextlib.contextmanager
def with_shapes_of_ctc_loss() -> Iterator[None]:
    """Inside, a trace knows the results of ``ctc_loss`` with lengths as lists (2.13-2.15)."""
    known: dict[object, object] = fake_impls.op_implementations_dict
    target = torch.ops.aten._ctc_loss.default
    before = known.get(target)
    known[target] = _shapes_of_ctc_loss
    try:
        yield
    finally:
        known.pop(target)
        if before is not None:
            known[target] = before


class _NoChecks:
    """Says that arguments are not to be checked, and remembers that it was asked."""

    def __init__(self) -> None:
        self.was_asked = False

    def __get__(self, owner: object, kind: type) -> bool:
        self.was_asked = True
        return False


@contextlib.contextmanager
def without_checks_of_distributions() -> Iterator[Callable[[], bool]]:
    """Inside, torch.distributions does not check values by default; parameters have none.

    Yields what tells whether it would have (torch 2.13-2.15).
    """
    kind: Any = torch.distributions.Distribution
    original = vars(kind)["_validate_args"]
    checks = _NoChecks()
    kind._validate_args = checks if original else original
    try:
        yield lambda: checks.was_asked
    finally:
        kind._validate_args = original
