"""Autocast's cache of casts, which a trace does without.

In eager, a leaf that autocast casts for several ops is cast once, and its gradients are summed in
the lower precision before they are cast back. A trace has no leaves, so torch casts for every op.
Here the cast is shared as in eager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from memplan.torch_internals import FunctionMode

_CAST = frozenset(
    [
        *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"),
        *("addbmm", "vecdot", "conv1d", "conv2d", "conv3d", "conv_tbc"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    ]
)
"""Functions whose arguments autocast casts down, on every device (torch/csrc, autocast_mode)."""


@contextlib.contextmanager
def cuda_casts_on_cpu() -> Iterator[None]:
    """Context in which ``torch.autocast("cuda")`` casts CPU tensors, which stand for a GPU's.

    It uses the CPU's lists of functions, which are shorter than CUDA's.
    """
    original = torch.autocast.__init__

    def start(
        self: torch.autocast,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        original(self, device_type, dtype, enabled, cache_enabled)

    torch.autocast.__init__ = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


class CastOnce(FunctionMode):
    """Mode that casts each leaf once for all ops that autocast casts it for."""

    def __init__(self, leaves: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._leaves = {id(leaf): leaf for leaf in leaves}
        self._casts: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._clear = torch.clear_autocast_cache

    def __enter__(self) -> CastOnce:
        super().__enter__()  # type: ignore[no-untyped-call]
        torch.clear_autocast_cache = self._cleared
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.clear_autocast_cache = self._clear
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _cleared(self) -> None:
        """Clear the casts when autocast's outermost context ends."""
        self._casts.clear()
        self._clear()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__name__", "") in _CAST and torch.is_autocast_cache_enabled():
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: object) -> object:
        if id(value) not in self._leaves or not isinstance(value, torch.Tensor):
            return value
        kind = value.device.type
        if value.dtype is not torch.float32 or not torch.is_autocast_enabled(kind):
            return value
        if not torch.is_grad_enabled():  # eager keeps no cast that a gradient cannot pass
            return value
        dtype = torch.get_autocast_dtype(kind)
        key = (id(value), dtype)
        if key not in self._casts:
            self._casts[key] = value.to(dtype)
        return self._casts[key]
