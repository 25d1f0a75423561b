"""Modules beside a model's own: named as the layers that they adapt, and called after them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.torch_internals import OwnHook, flatten, unflatten

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
    """Inside, and in this thread, layers return what functions make of their outputs.

    Args:
        model: whose layers.
        functions: by FQN of the layer.
    """
    hooks = [_Hook(function) for function in functions.values()]
    handles = [
        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        for name, hook in zip(functions, hooks, strict=True)
    ]
    try:
        yield
    finally:
        for handle, hook in zip(handles, hooks, strict=True):
            hook.thread = None
            handle.remove()


@contextmanager
def standing_for(model: nn.Module, names: Mapping[str, str]) -> Iterator[None]:
    """Inside, parameters and buffers have other ones in their places.

    Args:
        model: whose tensors.
        names: FQN of what stands in a place, by FQN of the place.
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
    """Inside, and in this thread, a function of its arguments runs in the place of a module."""
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
    """The first tensor among what a layer returns that a gradient goes back through.

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
    """The same structure, with another loss: what a function makes of the only scalar."""
    leaves, spec = flatten(output)
    return unflatten([change(leaf) if _is_loss(leaf) else leaf for leaf in leaves], spec)


def _is_loss(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and not leaf.dim() and leaf.requires_grad


class Through:
    """Changes what goes into a module's call, and what comes out of it."""

    def given(self, leaves: list[Any]) -> list[Any]:
        """The leaves of its arguments."""
        return leaves

    def returned(self, leaves: list[Any]) -> list[Any]:
        """The leaves of what it returns."""
        return leaves


@contextmanager
def going_through(model: nn.Module, changes: Mapping[str, Through]) -> Iterator[None]:
    """Inside, and in this thread, calls of modules go through changes.

    Args:
        model: whose modules.
        changes: by FQN.
    """
    handles = []
    hooks: list[_Before | _After] = []
    for name, change in changes.items():
        module, before, after = model.get_submodule(name), _Before(change), _After(change)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        # first, so that other hooks are given what the module returns in the end
        handles.append(module.register_forward_hook(after, prepend=True))
        hooks += [before, after]
    try:
        yield
    finally:
        for hook in hooks:
            hook.thread = None
        for handle in handles:
            handle.remove()


class _Before(OwnHook):
    def __init__(self, change: Through) -> None:
        self.change = change
        self.thread: int | None = threading.get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return None
        leaves, spec = flatten((args, kwargs))
        return unflatten(self.change.given(leaves), spec)


class _After(OwnHook):
    def __init__(self, change: Through) -> None:
        self.change = change
        self.thread: int | None = threading.get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != self.thread:
            return None
        leaves, spec = flatten(output)
        return unflatten(self.change.returned(leaves), spec)


class _Hook(OwnHook):
    """Calls a function after a layer, in the thread that made it, and until it is let go."""

    def __init__(self, function: After) -> None:
        self.function = function
        self.thread: int | None = threading.get_ident()

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        if threading.get_ident() != self.thread:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return self.function(layer, x, output)
