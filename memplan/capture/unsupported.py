"""Refusal, by name, of what a capture would silently lose."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from memplan.capture.sample import Sample
from memplan.errors import CaptureError
from memplan.rng import random_states
from memplan.torch_internals import (
    Joint,
    caller_of_random_functions,
    is_compiled,
    is_plain_tensor,
    is_under_autocast,
    watched_generator,
    without_modes,
)


def refuse_before(module: nn.Module, sample: Sample) -> None:
    """Refuse compiled modules, kernels that cannot be captured, and subclasses of tensors.

    Raises:
        CaptureError: naming the first.
    """
    for name, child in module.named_modules():
        if is_compiled(child):
            where = f"module {name!r}" if name else "the module"
            raise CaptureError(
                f"{where} is compiled (torch.compile); a captured step runs torch's own kernels. "
                "Plan the module that was compiled: module._orig_mod, or one on which compile() "
                "was not called."
            )
        attention = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
        has_fast_path = torch.backends.mha.get_fastpath_enabled() and not child.training
        if isinstance(child, attention) and has_fast_path:
            raise CaptureError(
                f"module {name!r} ({type(child).__name__}) is in evaluation mode, in which torch "
                "may run a fast path that cannot be captured and gives other values at padded "
                "places. Call torch.backends.mha.set_fastpath_enabled(False), for the untouched "
                "model too."
            )
    named = [*module.named_parameters(), *module.named_buffers()]
    named += [(f"input {index}", tensor) for index, tensor in enumerate(sample.tensors())]
    for name, tensor in named:
        if not is_plain_tensor(tensor):
            raise CaptureError(
                f"{name} is a {type(tensor).__name__}, a tensor subclass; a captured step would "
                "lose what it does. Pass a plain tensor: tensor.as_subclass(torch.Tensor)."
            )


def refuse_after(joint: Joint) -> None:
    """Refuse sparse tensors, and gradients that would reach no parameter.

    Raises:
        CaptureError: naming the first.
    """
    for node in joint.graph.nodes:
        if node.target is torch.ops.aten._trilinear.default and is_under_autocast():
            raise CaptureError(
                "the forward uses bilinear under autocast, which eager casts inside of the op; "
                "leave autocast for it: with torch.autocast(..., enabled=False)"
            )
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout != torch.strided:
            raise CaptureError(
                f"{node.target} makes a sparse tensor, of which memplan does not know the memory. "
                "For embeddings: sparse=False."
            )
    for name, constant in joint.constants.items():
        if constant.requires_grad:
            raise CaptureError(
                f"the forward uses a tensor that requires a gradient and that is no parameter of "
                f"the module (shape {tuple(constant.shape)}, {name}); register it as a parameter, "
                "or as a submodule what holds it"
            )


@contextlib.contextmanager
def refused_inside(module: nn.Module) -> Iterator[None]:
    """Refuse, while a module is traced, what a trace cannot hold.

    Raises:
        CaptureError: for seeds and states set in the forward, hooks on saved tensors, and numbers
            drawn from generators that the module has.
    """
    generators = [
        (value, _state(value))
        for child in module.modules()
        for value in child.__dict__.values()
        if isinstance(value, random.Random | np.random.Generator | np.random.RandomState)
    ]
    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    original = hooks.__enter__
    hooks.__enter__ = _refusing("the forward puts hooks on saved tensors", original)
    try:
        with watched_generator(partial(_refusing, _SEEDING)):
            yield
    finally:
        hooks.__enter__ = original
    if any(_state(generator) != state for generator, state in generators):
        raise CaptureError(
            "the forward draws numbers from a generator of numpy's or Python's; captured, they "
            "would be the same in every step. Draw them with torch, or outside of the module."
        )


_SEEDING = "the forward sets torch's random seed or state"


@contextlib.contextmanager
def refused_seeds() -> Iterator[None]:
    """Refuse code that changes the random state: on tensors without data, no op does.

    Not while there are other threads, which may draw numbers.

    Raises:
        CaptureError: if it has changed.
    """
    with without_modes():
        before = random_states()
    yield
    with without_modes():
        is_same = all(map(torch.equal, before, random_states()))
    if not is_same and threading.active_count() == 1:
        raise CaptureError(f"{_SEEDING}, which a planned step would not do")


def _refusing(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The original for tracing code of torch and memplan; a refusal for anyone else.

    Other threads go on as before.
    """
    tracing = threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != tracing:
            return original(*args, **kwargs)
        caller = caller_of_random_functions()
        if caller.startswith(("torch.", "memplan.")) and not caller.startswith("torch.testing"):
            return original(*args, **kwargs)
        raise CaptureError(f"{what}, which a planned step would not do")

    return refuse


def _state(generator: Any) -> str:
    if isinstance(generator, random.Random):
        return repr(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.get_state(legacy=False))
