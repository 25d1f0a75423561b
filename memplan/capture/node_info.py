"""Text about nodes: an op's signature, and the module and line that it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import FunctionType

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def signature(node: fx.Node) -> str:
    """Target, shapes, strides, dtypes and scalars: ops with equal signatures cost the same."""
    return call_signature(target_name(node), node.args, node.kwargs)


def call_signature(target: str, args: Iterable[object], kwargs: Mapping[str, object]) -> str:
    """The signature of a call with nodes, or with tensors."""
    parts = [_argument(argument) for argument in args]
    parts += [f"{name}={_argument(argument)}" for name, argument in kwargs.items()]
    return f"{target}({', '.join(parts)})"


def target_name(node: fx.Node) -> str:
    """A name such as ``aten.mm.default``, or a Python function's full name."""
    target = node.target
    if isinstance(target, FunctionType):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target)


def _argument(argument: object) -> str:
    if isinstance(argument, fx.Node):
        return tensor_text(argument.meta["val"])
    if isinstance(argument, torch.Tensor):
        return tensor_text(argument)
    if isinstance(argument, list | tuple):
        return f"[{', '.join(_argument(item) for item in argument)}]"
    return repr(argument)


def tensor_text(value: object) -> str:
    """Text such as ``float32[2, 3]{3, 1}@cpu``; a storage offset follows a plus sign."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    dtype = str(value.dtype).removeprefix("torch.")
    offset = f"+{value.storage_offset()}" if value.storage_offset() else ""
    lazy = " conjugated" * value.is_conj() + " negated" * value.is_neg()
    return f"{dtype}{list(value.shape)}{_braces(value.stride())}{offset}@{value.device}{lazy}"


def _braces(numbers: Iterable[int]) -> str:
    """Numbers in braces."""
    return "{" + ", ".join(str(number) for number in numbers) + "}"


def module_of(node: fx.Node) -> str:
    """FQN of the module whose code made a node; "" for the root or where unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(list(stack.values())[-1][0])


def source_of(node: fx.Node) -> str:
    """``file.py:line`` of the innermost frame outside torch, or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return f"{outside[-1][0]}:{outside[-1][1]}" if outside else ""


def forward_origins(nodes: Iterable[fx.Node]) -> dict[int, fx.Node]:
    """The first forward node of each autograd sequence number: the origin of backward ops."""
    origins: dict[int, fx.Node] = {}
    for node in nodes:
        number = node.meta.get("seq_nr")
        if number is not None and node.meta.get("nn_module_stack"):
            origins.setdefault(number, node)
    return origins
