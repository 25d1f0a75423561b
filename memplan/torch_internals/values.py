"""Support for traced code that asks for tensor values, where there are none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch._C import DispatchKey
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional

from memplan.torch_internals.modes import FunctionMode
from memplan.torch_internals.state import OpOverload


@contextlib.contextmanager
def asking_for_lists() -> Iterator[None]:
    """Context in which ``tolist`` of a traced tensor asks for all values at once (2.13-2.15)."""
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
    """The losses, and what the backward needs: per time and label, with blanks in between."""
    del mode, func, kwargs
    _, _, target_lengths, *_ = others
    batch = log_probs.shape[1] if log_probs.dim() == 3 else 1
    labels = 2 * max(target_lengths, default=0) + 1
    alpha = log_probs.new_empty((batch, log_probs.shape[0], labels))
    return log_probs.new_empty((batch,) if log_probs.dim() == 3 else ()), alpha


@contextlib.contextmanager
def shapes_as_eager() -> Iterator[None]:
    """Context in which a trace predicts some ops as their compiled kernels behave (2.13-2.15).

    ``ctc_loss`` with lengths as lists has known result shapes. A view has eager's strides even
    where a size is 1: by these torch decides whether a tensor counts as channels-last.
    """
    known: dict[object, object] = fake_impls.op_implementations_dict
    aten = torch.ops.aten
    changed: dict[object, object] = {
        aten._ctc_loss.default: _shapes_of_ctc_loss,
        aten.view.default: None,
        aten._unsafe_view.default: None,
    }
    before = {target: known.pop(target, None) for target in changed}
    known.update({target: one for target, one in changed.items() if one is not None})
    views: list[Any] = [aten.view.default, aten._unsafe_view.default]
    kernels = [view.py_kernels.pop(DispatchKey.Meta, None) for view in views]
    for view in views:
        view._dispatch_cache.clear()
    try:
        yield
    finally:
        for view, kernel in zip(views, kernels, strict=True):
            if kernel is not None:
                view.py_kernels[DispatchKey.Meta] = kernel
            view._dispatch_cache.clear()
        for target, one in before.items():
            known.pop(target, None)
            if one is not None:
                known[target] = one


class _NoChecks:
    """Descriptor that turns argument checks off and records that it was read."""

    def __init__(self) -> None:
        self.was_asked = False

    def __get__(self, owner: object, kind: type) -> bool:
        self.was_asked = True
        return False


class _Unchecking:
    """The torch module, in which no entry of any tensor is True."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def any(self, tensor: torch.Tensor) -> bool:
        del tensor
        return False


def _unchecked(function: Any) -> Any:
    """A torch loss without its check for negative entries."""
    own = {**function.__globals__, "torch": _Unchecking()}
    code = FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    own[function.__name__] = code  # passed to the next mode
    return code


class _LossesWithoutChecks(FunctionMode):
    """Mode in which torch's losses do not check values."""

    _UNCHECKED: ClassVar = {one: _unchecked(one) for one in (functional.gaussian_nll_loss,)}

    def __init__(self) -> None:
        super().__init__()
        self.was_asked = False

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        unchecked = self._UNCHECKED.get(func)
        self.was_asked = self.was_asked or unchecked is not None
        return (unchecked or func)(*args, **kwargs)


@contextlib.contextmanager
def without_checks_of_values() -> Iterator[Callable[[], bool]]:
    """Context in which torch.distributions and torch's losses do not check values: there are none.

    Yields a function that tells whether they would have (torch 2.13-2.15).
    """
    kind: Any = torch.distributions.Distribution
    original = vars(kind)["_validate_args"]
    checks = _NoChecks()
    kind._validate_args = checks if original else original
    try:
        with _LossesWithoutChecks() as losses:
            yield lambda: checks.was_asked or losses.was_asked
    finally:
        kind._validate_args = original
