"""Results and memory of a training step, for ``reversible.py``: one way beside another."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import torch
from torch import nn

import memplan
from memplan.profiler.step import preserved, run_step

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images and labels."""

STEP = 1e-6
"""Distance that weights move to measure a slope; 64 bits show ten digits of it."""


def images(batch_size: int) -> Batch:
    """Images of 3x32x32 and labels."""
    torch.manual_seed(0)
    return torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))


@dataclass(frozen=True)
class Outcome:
    """The results of a step.

    Attributes:
        gradients: gradients of the parameters.
        buffers: running statistics and counts of batches.
        random_state: torch's random state.
    """

    gradients: list[torch.Tensor]
    buffers: list[torch.Tensor]
    random_state: torch.Tensor


def outcome(run: nn.Module, owner: nn.Module, batch: Batch) -> Outcome:
    """A step under one random state; all its changes are restored.

    Args:
        run: the module to run.
        owner: the module whose parameters and buffers it shares; they set the order.
        batch: images and labels.
    """
    with preserved(owner):
        _seed()
        run_step(run, memplan.Sample.of(batch))
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in owner.parameters()
        ]
        buffers = [buffer.clone() for buffer in owner.buffers()]
        return Outcome(gradients, buffers, torch.get_rng_state())


def errors(found: list[torch.Tensor], right: list[torch.Tensor]) -> list[float]:
    """For each tensor, the largest difference over the largest entry."""
    return [
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(found, right, strict=True)
    ]


def right_gradients(module: nn.Module, batch: Batch) -> Outcome:
    """The same step in 64 bits."""
    exact = copy.deepcopy(module).double()
    return outcome(exact, exact, (batch[0].double(), batch[1]))


def slope_error(run: nn.Module, owner: nn.Module, batch: Batch) -> float:
    """Measure how far the loss's slope is from the one that its gradients imply.

    Along the gradients the loss changes by their squared norm. Under one random state the masks of
    dropout are the same in every forward, whichever a library draws; needs 64 bits.
    """
    gradients = outcome(run, owner, batch).gradients
    square = sum(float(gradient.square().sum()) for gradient in gradients)
    step = STEP / square**0.5
    losses = []
    with preserved(owner, torch.optim.SGD(owner.parameters())):
        for distance in (step, -2 * step):
            with torch.no_grad():
                for parameter, gradient in zip(owner.parameters(), gradients, strict=True):
                    parameter.add_(gradient, alpha=distance)
            _seed()
            losses.append(float(run(*batch).detach()))
    return abs((losses[0] - losses[1]) / (2 * step * square) - 1)


def _seed() -> None:
    torch.manual_seed(1)
    random.seed(1)


def gradient_bytes(module: nn.Module) -> int:
    """Bytes of the gradients of all parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def activation_bytes(module: nn.Module, profile: memplan.Profile) -> int:
    """The bytes of a step at its peak besides residents and all gradients."""
    return profile.peak_bytes - profile.resident_bytes - gradient_bytes(module)
