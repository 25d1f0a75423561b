"""Modules beside a model's own: named as the layers that they adapt, and called after them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

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
    thread = threading.get_ident()

    def after(
        function: After,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> Any:
        if threading.get_ident() != thread:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return function(layer, x, output)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(after, function), with_kwargs=True)
        for name, function in functions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
