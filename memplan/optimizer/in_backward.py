"""Updates of parameters inside the backward, each as soon as its gradient is complete.

The idea is LOMO's (Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
Resources", 2023, https://arxiv.org/abs/2306.09782), here for any optimizer that treats parameters
separately, and with the bits of the ordinary loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from memplan.errors import PlanMismatch
from memplan.optimizer.clone import group_of, step_one
from memplan.torch_internals import (
    SpentGradient,
    exchanges_gradients,
    has_gradient_hooks,
    received_from_one_node,
    version_of,
)

_LEAVE_OUT = "Leave Options(update_in_backward=True) out."


class InBackward:
    """Runs an optimizer's step one parameter at a time.

    After a backward each parameter's gradient is a ``SpentGradient``, so that code that needs
    gradients fails. The user's own ``optimizer.step()`` removes these and changes nothing.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._is_pending = False
        self._updated: list[torch.Tensor] = []
        self._groups: dict[int, dict[str, Any]] = {}
        self._settings: list[dict[str, Any]] = []
        self._hook: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Each backward sets both again; a copy has parameters of other ids.
        return {**self.__dict__, "_groups": {}, "_hook": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._is_pending:
            self._await_step()

    def _await_step(self) -> None:
        """Watch the user's next step, after all existing hooks."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.optimizer.register_step_pre_hook(self._step)

    def _step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Handle the user's own call, with nothing left to do.

        Raises:
            PlanMismatch: if the ordinary loop would have made another update.
        """
        del args, kwargs
        if not self._is_pending:
            return
        self._is_pending = False  # whoever goes on after an error has been told
        if not all(isinstance(parameter.grad, SpentGradient) for parameter in self._updated):
            raise PlanMismatch(
                "gradients were set to None between backward() and optimizer.step(), or the "
                f"backward was interrupted; parameters are updated already. {_LEAVE_OUT}"
            )
        if self._settings != _settings(optimizer):
            raise PlanMismatch(
                "a setting of the optimizer, such as the learning rate, was changed between "
                "backward() and optimizer.step(), and the parameters are updated already. Change "
                f"it before backward(). {_LEAVE_OUT}"
            )
        for parameter in self._updated:
            parameter.grad = None

    def start(self, parameters: Sequence[torch.Tensor], scales: Iterable[torch.Tensor]) -> None:
        """Check, when a backward starts, that each gradient will be whole when it is used.

        Args:
            parameters: those that the backward will update.
            scales: the incoming gradients of losses, which must be 1.

        Raises:
            PlanMismatch: naming what the updates cannot be combined with.
        """
        if self._is_pending:
            raise PlanMismatch(
                "backward() runs again without an optimizer.step() since the last one, which "
                f"updated the parameters already: gradients cannot be accumulated. {_LEAVE_OUT}"
            )
        if any(parameter.grad is not None for parameter in parameters):
            raise PlanMismatch(
                "there are gradients from before (accumulation, or zero_grad(set_to_none=False)), "
                f"which would be left out of the update. {_LEAVE_OUT}"
            )
        if any(bool((scale != 1).any()) for scale in scales):
            raise PlanMismatch(
                "the loss is scaled before its backward (a GradScaler, or a loss divided for "
                f"accumulation); the update would use gradients of the scaled loss. {_LEAVE_OUT}"
            )
        alone = frozenset[int]() if exchanges_gradients() else received_from_one_node()
        if any(id(p) not in alone or has_gradient_hooks(p) for p in parameters):
            raise PlanMismatch(
                "gradients are not only to be used (hooks, torch.autograd.grad, a parameter that "
                f"the loss depends on outside of the module, several processes). {_LEAVE_OUT}"
            )
        self._groups = group_of(self.optimizer)
        if any(id(parameter) not in self._groups for parameter in parameters):
            raise PlanMismatch(
                "a parameter of the model was replaced, and is not the optimizer's; build the "
                "optimizer again, and plan with it"
            )
        self._settings = _settings(self.optimizer)
        self._updated = list(parameters)
        self._await_step()
        self._is_pending = True

    def update(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Consume one complete gradient."""
        assert isinstance(parameter, nn.Parameter)
        parameter.grad = gradient
        try:
            step_one(self.optimizer, parameter, self._groups[id(parameter)])
        finally:
            parameter.grad = None

    def updating(self) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """``update`` as a function, which generated code can call."""

        def update(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
            self.update(parameter, gradient)

        return update

    def finish(self) -> None:
        """Mark the gradients as used."""
        for parameter in self._updated:
            parameter.grad = SpentGradient(parameter)


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """All settings of the groups; tensors by identity and version."""
    return [
        {
            name: (id(value), version_of(value)) if isinstance(value, torch.Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]
