"""What torch knows of tensors, modules and the running backward, and does not say."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import nn
from torch._C._autograd import _get_current_graph_task_keep_graph

TESTED_TORCH = ("2.13",)
"""Releases that memplan's tests ran on."""

OpOverload: TypeAlias = torch._ops.OpOverload


@functools.cache
def warn_of_untested_torch() -> None:
    """Say once that this release of torch was not tested."""
    if not torch.__version__.startswith(TESTED_TORCH):
        warnings.warn(
            f"memplan was tested with torch {', '.join(TESTED_TORCH)}; this is "
            f"{torch.__version__}. Check with memplan.compare that results are the same.",
            stacklevel=4,
        )


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, fake ones included (torch 2.13.0)."""
    return int(tensor.untyped_storage()._cdata)


def version_of(tensor: torch.Tensor) -> int:
    """Counts the writes into a tensor (torch 2.13.0)."""
    return int(tensor._version)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module itself has forward or backward hooks (torch 2.13.0)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def enabled_attention() -> tuple[bool, ...]:
    """Which kernels scaled_dot_product_attention may choose from (torch 2.13.0)."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def backward_keeps_graph() -> bool:
    """Inside a backward: whether it was called with ``retain_graph=True`` (torch 2.13.0)."""
    return bool(_get_current_graph_task_keep_graph())


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, no op is cast: the casts are part of what was traced (torch 2.13.0)."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)
