"""Ops that torch traces by a Python kernel where eager runs a compiled one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._C import DispatchKey

from memplan.torch_internals.state import OpOverload

_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)
"""Keys at which a Python kernel replaces autograd's formula or a compiled composite."""

TRACED_IN_PYTHON: Mapping[str, str] = {
    "dropout": "its compiled composite is several ops; ``dropout_as_eager`` gives it eager's bits",
    "native_batch_norm": "the compiled one writes running statistics that its schema hides",
    "cudnn_batch_norm": "the compiled one writes running statistics that its schema hides",
    "miopen_batch_norm": "the compiled one writes running statistics that its schema hides",
    "lstm": "the compiled one hands its backward what cannot be made again",
    "gru": "the compiled one hands its backward what cannot be made again",
    "rnn_tanh": "the compiled one hands its backward what cannot be made again",
    "rnn_relu": "the compiled one hands its backward what cannot be made again",
}
"""Aten ops that are traced by their Python kernels nevertheless, and why."""

Kernels = dict[DispatchKey, Callable[..., Any]]


def python_kernels() -> dict[OpOverload, Kernels]:
    """Aten ops with a Python kernel that a trace would prefer (torch 2.13-2.15)."""
    packets = [
        packet
        for packet in vars(torch.ops.aten).values()
        if isinstance(packet, torch._ops.OpOverloadPacket)
    ]
    ops = [op for packet in packets for op in vars(packet).values() if isinstance(op, OpOverload)]
    found = {op: {key: op.py_kernels[key] for key in _KEYS if key in op.py_kernels} for op in ops}
    return {op: kernels for op, kernels in found.items() if kernels}


@contextlib.contextmanager
def by_compiled_kernels() -> Iterator[None]:
    """Context in which a trace sees the ops of eager, ``TRACED_IN_PYTHON`` apart (2.13-2.15).

    Python kernels compute the same in other steps: with other last bits, more time and more
    memory.
    """
    removed = {
        op: kernels
        for op, kernels in python_kernels().items()
        if op._schema.name.removeprefix("aten::") not in TRACED_IN_PYTHON
    }
    for op, kernels in removed.items():
        for key in kernels:
            del op.py_kernels[key]
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, kernels in removed.items():
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()
