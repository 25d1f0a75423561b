"""A model and its loss as one module, so that logits and loss are inside the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class WithLoss(nn.Module):
    """Takes a model's inputs and a target; returns the loss.

    The keys of ``state_dict`` are the model's own.

    Args:
        model: any module.
        loss_fn: takes the model's output and the target; returns a scalar tensor.

    >>> step = WithLoss(nn.Linear(2, 2), nn.functional.mse_loss)
    >>> step(torch.zeros(1, 2), step.model(torch.zeros(1, 2))).item()
    0.0
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, *inputs_and_target: Any) -> torch.Tensor:
        """The loss of the model's output for all arguments but the last, which is the target."""
        *inputs, target = inputs_and_target
        return self.loss_fn(self.model(*inputs), target)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own state."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load into the model."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)
