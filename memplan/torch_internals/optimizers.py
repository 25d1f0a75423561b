"""Torch's wrappers around an optimizer's step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def attributes_without_hooks(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's attributes, with no hooks on its step (torch 2.13-2.15).

    Schedulers wrap the instance's ``step``; such a wrapper would step this very optimizer.
    """
    own = {name: value for name, value in optimizer.__dict__.items() if name != "step"}
    return {**own, **{name: OrderedDict() for name in _HOOKS}}


def defined_step(optimizer: Optimizer) -> Callable[[Optimizer], object]:
    """The step that a class defines, without the hooks of all optimizers (torch 2.13-2.15)."""
    found: Callable[[Optimizer], object] = type(optimizer).step
    if getattr(found, "hooked", False):
        found = getattr(found, "__wrapped__", found)
    return found
