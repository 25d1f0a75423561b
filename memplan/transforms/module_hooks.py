"""Modules beside a model's own, named like the layers that they adapt and called after them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.torch_internals import around_calls, flatten, unflatten

After: TypeAlias = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes a layer, its input and its output; returns another output."""


def hang(tree: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Add modules to a tree under FQNs, with empty modules between."""
    for name, module in sorted(modules.items()):
        *path, last = name.split(".")
        holder = tree
        for part in path:
            if part not in dict(holder.named_children()):
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.add_module(last, module)


@contextmanager
def after_calls(model: nn.Module, functions: Mapping[str, After]) -> Iterator[None]:
    """Context in which, in this thread, functions change the outputs of layers.

    Args:
        model: the model.
        functions: by FQN of the layer.
    """
    layers = {name: model.get_submodule(name) for name in functions}

    def change(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return functions[name](layers[name], x, output)

    with around_calls(layers, after=change):
        yield


@contextmanager
def standing_for(model: nn.Module, names: Mapping[str, str]) -> Iterator[None]:
    """Context in which other tensors stand for parameters and buffers.

    Args:
        model: the model.
        names: FQN of the stand-in, by FQN of the tensor that it stands for.
    """
    before = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        own = vars(module)["_parameters"]
        own = own if last in own else vars(module)["_buffers"]
        before[name] = own, last, own[last]
    for name, other in names.items():
        own, last, _ = before[name]
        own[last] = before[other][2] if other in before else model.get_buffer(other)
    try:
        yield
    finally:
        for own, last, tensor in before.values():
            own[last] = tensor


@contextmanager
def standing_in(
    module: nn.Module, function: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
) -> Iterator[None]:
    """Context in which, in this thread, a function of its arguments runs in place of a module."""
    own = vars(module).get("forward")
    original, thread = module.forward, threading.get_ident()

    def forward(*args: Any, **kwargs: Any) -> Any:
        is_mine = threading.get_ident() == thread
        return function(args, kwargs) if is_mine else original(*args, **kwargs)

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of a layer's output that a gradient goes back through.

    Raises:
        MemplanError: if there is none.
    """
    leaves, _ = flatten(output)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            return leaf
    raise MemplanError("no gradient goes back through what a block returns: nothing trains it")


def detached(output: Any) -> Any:
    """The same structure, with tensors that no gradient goes back through."""
    leaves, spec = flatten(output)
    return unflatten(
        [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
    )


def with_loss(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure, with another loss: the only scalar, changed by a function."""
    leaves, spec = flatten(output)
    return unflatten([change(leaf) if _is_loss(leaf) else leaf for leaf in leaves], spec)


def _is_loss(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and not leaf.dim() and leaf.requires_grad


class Through:
    """Changes the arguments of a module's call, and its output."""

    def given(self, leaves: list[Any]) -> list[Any]:
        """The leaves of its arguments."""
        return leaves

    def returned(self, leaves: list[Any]) -> list[Any]:
        """The leaves of its output."""
        return leaves


@contextmanager
def going_through(model: nn.Module, changes: Mapping[str, Through]) -> Iterator[None]:
    """Context in which, in this thread, calls of modules go through changes.

    Args:
        model: the model.
        changes: by FQN.
    """
    modules = {name: model.get_submodule(name) for name in changes}

    def before(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        leaves, spec = flatten((args, kwargs))
        return unflatten(changes[name].given(leaves), spec)

    def after(name: str, args: object, kwargs: object, output: Any) -> Any:
        del args, kwargs
        leaves, spec = flatten(output)
        return unflatten(changes[name].returned(leaves), spec)

    # first, so that other hooks get the module's final output
    with around_calls(modules, before=before, after=after, is_first=True):
        yield
