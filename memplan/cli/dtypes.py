"""``--dtype``: the type that the model computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MIXED = "-mixed"

DTYPES = (*_TYPES, "bf16-mixed", "fp16-mixed")


@contextlib.contextmanager
def default_dtype(dtype: str | None) -> Iterator[None]:
    """Set the default type of parameters and tensors created inside."""
    if dtype is None or dtype not in _TYPES:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(_TYPES[dtype])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Autocast(nn.Module):
    """A module whose forward runs under autocast."""

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.device_type = device_type
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, self.dtype):
            return self.model(*args, **kwargs)


def under_autocast(model: nn.Module, dtype: str | None) -> nn.Module:
    """The module, with its forward under autocast if the type says so."""
    if dtype is None or not dtype.endswith(_MIXED):
        return model
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kind = "cpu" if device.type == "meta" else device.type
    return _Autocast(model, kind, _TYPES[dtype.removesuffix(_MIXED)])
