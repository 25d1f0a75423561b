"""Torch's own databases of modules and operators, as models that return a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from hypothesis import settings
from torch import nn

from memplan import Sample
from memplan.torch_internals import flatten, unflatten

_PROFILE = settings.get_current_profile_name()
from torch.testing._internal import (  # noqa: E402
    common_methods_invocations,
    common_modules,
    common_utils,
)

settings.load_profile(_PROFILE)  # the import has loaded another
freeze_rng_state = common_utils.freeze_rng_state

MOST = 40
"""Samples of a module: all but of two that have hundreds, of which so many spread over them."""


@dataclass(frozen=True)
class Case:
    """A model and what it is called with.

    Attributes:
        name: what torch calls it.
        model: the model; its output is a dict of the loss and of what the op or module returned.
        sample: its inputs.
    """

    name: str
    model: nn.Module
    sample: Sample


class Judged(nn.Module):
    """A model that returns the loss of what is inside, and what that returned."""

    def judged(self, output: object) -> dict[str, Any]:
        leaves = [leaf for leaf in flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        loss = sum(weighted(leaf) for leaf in leaves if leaf.requires_grad)
        return {"loss": loss, "outputs": [leaf.detach() for leaf in leaves]}


def weighted(leaf: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient is another one at each entry."""
    real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
    weights = torch.linspace(0.5, 2, real.numel(), dtype=real.dtype).view(real.shape)
    return (real * weights).sum()


class OfModule(Judged):
    """A module of torch's, on inputs that are computed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.1))
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        computed = [
            (arg * self.scale.to(arg.dtype)).sin() if is_scaled(arg) else arg for arg in args
        ]
        return self.judged(self.module(*computed, **kwargs))


def is_scaled(arg: object) -> bool:
    return isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.layout is torch.strided


class OfOperator(Judged):
    """An operator of torch's, on its tensors that need gradients as parameters."""

    def __init__(self, operator: Callable[..., Any], given: Any) -> None:
        super().__init__()
        self.operator = operator
        self.leaves, self.spec = flatten(given)
        self.places = [place for place, leaf in enumerate(self.leaves) if needs_gradient(leaf)]
        self.others = [place for place, leaf in enumerate(self.leaves) if is_input(leaf)]
        self.given = nn.ParameterList(self.leaves[place].detach().clone() for place in self.places)
        for place in self.places + self.others:
            self.leaves[place] = None

    def forward(self, *inputs: torch.Tensor) -> dict[str, Any]:
        leaves = list(self.leaves)
        for place, parameter in zip(self.places, self.given, strict=True):
            leaves[place] = parameter * 1
        for place, tensor in zip(self.others, inputs, strict=True):
            leaves[place] = tensor
        first, args, kwargs = unflatten(leaves, self.spec)
        return self.judged(self.operator(first, *args, **kwargs))


def needs_gradient(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def is_input(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and not leaf.requires_grad


@lru_cache
def operators() -> dict[str, Any]:
    """Those that have gradients, by name."""
    return {
        op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op
        for op in common_methods_invocations.op_db
        if op.supports_autograd
    }


@lru_cache
def modules() -> dict[str, Any]:
    """All of ``torch.nn``, by name."""
    return {info.name: info for info in common_modules.module_db}


def operator_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    """Samples of an operator: its first, and the one in the middle."""
    op = operators()[name]
    if dtype not in op.supported_dtypes("cpu"):
        return
    torch.manual_seed(1)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    for place in sorted({0, len(samples) // 2}):
        sample = samples[place]
        model = OfOperator(op, (sample.input, sample.args, sample.kwargs))
        if model.places:
            leaves = flatten((sample.input, sample.args, sample.kwargs))[0]
            inputs = tuple(leaves[other] for other in model.others)
            yield Case(f"{name} {place}", model, Sample(inputs, {}))


def module_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    """Samples of a module, in training and, where that differs, in evaluation mode."""
    info = modules()[name]
    for training in (True, False) if info.train_and_eval_differ else (True,):
        torch.manual_seed(1)
        given = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=False, training=training
        )
        for place, one in list(enumerate(given))[:: -(-len(given) // MOST)]:
            if one.forward_input is None:
                continue
            made = one.constructor_input
            torch.manual_seed(0)
            module = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
            called = one.forward_input
            if any(map(nn.parameter.is_lazy, module.parameters())):
                module(*called.args, **called.kwargs)
            yield Case(
                f"{name} {place} {'training' if training else 'evaluation'}",
                OfModule(module),
                Sample(tuple(called.args), dict(called.kwargs)),
            )
