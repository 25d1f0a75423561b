"""One training step as the profiler runs it, and a module's state put back afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.sample import Sample
from memplan.torch_internals import flatten, storage_key, version_of


@dataclass(frozen=True)
class Result:
    """What a step leaves behind.

    Attributes:
        output: what the module returned.
        loss: its scalar.
    """

    output: Any
    loss: torch.Tensor


def run_step(module: nn.Module, sample: Sample) -> Result:
    """Forward and backward.

    Raises:
        MemplanError: if the module does not return exactly one scalar with a gradient.
    """
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
    torch.autograd.backward(scalars[0])
    return Result(output, scalars[0])


@contextlib.contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Start without gradients; put gradients, buffers and random states back at the end."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = [
        (child, name, buffer, buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child.named_buffers(recurse=False)
    ]
    parameters = [(parameter, version_of(parameter)) for parameter in module.parameters()]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            clear_gradients(module)
            yield
        finally:
            with torch.no_grad():
                for child, name, buffer, content in buffers:
                    setattr(child, name, buffer.copy_(content))
            for parameter, gradient in gradients:
                parameter.grad = gradient
            np.random.set_state(numpy_state)
            random.setstate(python_state)
    changed = any(version_of(parameter) != version for parameter, version in parameters)
    if changed:
        raise MemplanError("the module's forward changes its parameters; it cannot be measured")


def clear_gradients(module: nn.Module) -> None:
    """Set every gradient to None."""
    for parameter in module.parameters():
        parameter.grad = None


def resident_bytes(module: nn.Module, sample: Sample) -> int:
    """Bytes of parameters, buffers and inputs, each storage once."""
    tensors = (*module.parameters(), *module.buffers(), *sample.tensors())
    storages = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
