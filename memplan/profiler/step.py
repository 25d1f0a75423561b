"""One training step as the profiler runs it, and restoration of all that it changes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from memplan.capture.sample import Sample
from memplan.errors import MemplanError
from memplan.optimizer import state_bytes, state_tensors
from memplan.torch_internals import flatten, storage_key, version_of, without_autocast

During = Callable[[str], AbstractContextManager[object]]
"""Context factory for each phase, called with its name."""


@dataclass(frozen=True)
class Result:
    """The results of a step.

    Attributes:
        output: the module's return value.
        loss: the scalar in it.
    """

    output: Any
    loss: torch.Tensor


def run_step(
    module: nn.Module,
    sample: Sample,
    optimizer: Optimizer | None = None,
    during: During = contextlib.nullcontext,
) -> Result:
    """Run forward, backward and the optimizer's step, if any; autocast is for the forward only.

    Raises:
        MemplanError: if the module does not return exactly one scalar with a gradient.
    """
    with during("forward"):
        output = module(*sample.args, **sample.kwargs)
    scalars = [
        leaf
        for leaf in flatten(output)[0]
        if isinstance(leaf, torch.Tensor) and leaf.dim() == 0 and leaf.requires_grad
    ]
    if len(scalars) != 1:
        raise MemplanError(
            f"{type(module).__name__} returns {len(scalars)} scalars that need a gradient; a "
            "step is measured from exactly one, the loss. Wrap the model: "
            "memplan.WithLoss(model, loss_fn)."
        )
    with during("backward"), without_autocast():
        torch.autograd.backward(scalars[0])
    if optimizer is not None:
        with during("optimizer"):
            optimizer.step()
    return Result(output, scalars[0])


@contextlib.contextmanager
def preserved(module: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Start without gradients; restore gradients, buffers and random states at the end.

    With an optimizer, restore parameters and its state as well.
    """
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = [
        (child, name, buffer, buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child.named_buffers(recurse=False)
    ]
    parameters = [(parameter, version_of(parameter)) for parameter in module.parameters()]
    unchanged = contextlib.nullcontext() if optimizer is None else restored(optimizer)
    with restored_randomness(), unchanged:
        try:
            clear_gradients(module)
            yield
        finally:
            with torch.no_grad():
                for child, name, buffer, content in buffers:
                    setattr(child, name, buffer.copy_(content))
            for parameter, gradient in gradients:
                parameter.grad = gradient
    changed = any(version_of(parameter) != version for parameter, version in parameters)
    if changed and optimizer is None:
        raise MemplanError("the module's forward changes its parameters; it cannot be measured")


@contextlib.contextmanager
def restored_randomness() -> Iterator[None]:
    """Restore torch's, numpy's and Python's random states at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextlib.contextmanager
def restored(optimizer: Optimizer) -> Iterator[None]:
    """Restore parameters, state and settings at the end, from copies in the host's memory."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    contents = [
        (tensor, tensor.detach().to("cpu", copy=True))
        for tensor in (*parameters, *state_tensors(optimizer))
    ]
    state = {
        key: dict(own) if isinstance(own, dict) else own for key, own in optimizer.state.items()
    }
    attributes = dict(optimizer.__dict__)
    settings = [dict(group) for group in optimizer.param_groups]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, content in contents:
                tensor.copy_(content)
        optimizer.__dict__.clear()
        optimizer.__dict__.update(attributes)
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in zip(optimizer.param_groups, settings, strict=True):
            group.clear()
            group.update(before)


@contextlib.contextmanager
def unchanged_inputs(sample: Sample) -> Iterator[None]:
    """Restore the gradients of inputs at the end."""
    gradients = [(tensor, tensor.grad) for tensor in sample.tensors() if tensor.is_leaf]
    try:
        yield
    finally:
        for tensor, gradient in gradients:
            tensor.grad = gradient


def clear_gradients(module: nn.Module) -> None:
    """Set every gradient to None."""
    for parameter in module.parameters():
        parameter.grad = None


def resident_bytes(module: nn.Module, sample: Sample, optimizer: Optimizer | None = None) -> int:
    """Bytes of parameters, buffers, inputs and the optimizer's state, each storage once."""
    tensors = (*module.parameters(), *module.buffers(), *sample.tensors())
    storages = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + (0 if optimizer is None else state_bytes(optimizer))
