"""Private torch state of tensors, modules and modes."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from torch._prims_common import suggest_memory_format

from memplan.torch_internals.own_hooks import OwnHook

TESTED_TORCH = ("2.13", "2.14", "2.15")
"""Releases that memplan's tests ran on."""

_KINDS = ("cpu", "cuda")

OpOverload: TypeAlias = torch._ops.OpOverload


@functools.cache
def warn_of_untested_torch() -> None:
    """Warn once if this torch release is untested."""
    if ".".join(torch.__version__.split(".")[:2]) not in TESTED_TORCH:
        warnings.warn(
            f"memplan was tested with torch {', '.join(TESTED_TORCH)}; this is "
            f"{torch.__version__}. Check with memplan.compare that results are the same.",
            stacklevel=4,
        )


def writes_its_first_alone(op: OpOverload) -> bool:
    """Tell whether an op writes its first argument alone, and returns it (2.13-2.15)."""
    infos = [argument.alias_info for argument in op._schema.arguments]
    written = [info is not None and info.is_write for info in infos]
    return any(written[:1]) and not any(written[1:]) and len(op._schema.returns) == 1


def storage_key(tensor: torch.Tensor) -> int:
    """A key equal for tensors that share memory, fake ones included (torch 2.13-2.15)."""
    return int(tensor.untyped_storage()._cdata)


def memory_format_of(tensor: torch.Tensor) -> torch.memory_format:
    """The memory format that torch infers from a tensor's strides (torch 2.13-2.15)."""
    return suggest_memory_format(tensor)


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the same memory, read with the opposite sign (torch 2.13-2.15)."""
    return torch._neg_view(tensor)


def version_of(tensor: torch.Tensor) -> int:
    """The number of writes into a tensor (torch 2.13-2.15)."""
    return int(tensor._version)


def enclosing_transform() -> str:
    """The active function transform, autograd apart, in words; "" if none (2.13-2.15)."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func (grad, vmap, jvp, ...)"
    is_dual = torch.autograd.forward_ad._current_level >= 0
    return "forward-mode differentiation" if is_dual else ""


def hooks_of(module: nn.Module) -> dict[str, dict[int, Callable[..., object]]]:
    """A module's own forward and backward hooks, by kind and by key (2.13-2.15)."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {kind: vars(module)[kind] for kind in kinds}


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module itself has forward or backward hooks."""
    # Another thread may add or remove hooks meanwhile, which does not affect a copy.
    return any(
        not isinstance(hook, OwnHook)
        for hooks in hooks_of(module).values()
        for hook in (*hooks.values(),)
    )


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``torch.compile`` wraps a module or is to run its forward (torch 2.13-2.15)."""
    return module._compiled_call_impl is not None or hasattr(type(module), "_opt_mod_attributes")


def enabled_attention() -> tuple[bool, ...]:
    """Flags of the kernels that scaled_dot_product_attention may use (torch 2.13-2.15)."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def is_under_autocast() -> bool:
    """Tell whether ops are autocast here."""
    return any(map(torch.is_autocast_enabled, _KINDS))


@dataclass(frozen=True, slots=True)
class Autocast:
    """Autocast settings at one place."""

    dtypes: tuple[tuple[str, torch.dtype], ...]
    is_cached: bool

    @classmethod
    def here(cls) -> Autocast:
        """The current settings."""
        enabled = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
        dtypes = tuple((kind, torch.get_autocast_dtype(kind)) for kind in enabled)
        return cls(dtypes, torch.is_autocast_cache_enabled())

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Context with these settings, whose cache of casts is empty at its start and end."""
        is_cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(self.is_cached)
        try:
            with contextlib.ExitStack() as stack:
                for kind, dtype in self.dtypes:
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self.is_cached))
                yield
        finally:
            torch.set_autocast_cache_enabled(is_cached)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Context without autocast: the casts are part of the trace (torch 2.13-2.15)."""
    kinds = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)
