"""States of random generators, and draws of dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch

RandomStates: TypeAlias = tuple[torch.Tensor, ...]
"""States of the CPU's generator, then of the GPUs'."""


def save_rng_state(device: str) -> torch.Tensor:
    """The state of a device's default generator, as a tensor of bytes on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def random_states() -> RandomStates:
    """The states of the generators of the CPU and of every GPU in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return (torch.get_rng_state(), *cuda)


def set_random_states(states: RandomStates) -> None:
    """Restore the states that ``random_states`` returned."""
    torch.set_rng_state(states[0])
    for index, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, index)


def dropout(x: torch.Tensor, probability: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply dropout, drawing as eager does: zero or ``x * scale``, and the mask of the latter."""
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - probability)
    return apply_mask(x, mask, scale), mask


def draw(
    op: tuple[str, str],
    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    kind: tuple[torch.dtype, torch.device],
    *args: Any,
) -> torch.Tensor:
    """Draw into a new tensor with one of torch's in-place random ops.

    Args:
        op: its name and its overload's.
        layout: shape and strides of the tensor, and strides of the result.
        kind: its dtype and device.
        args: the op's other arguments.
    """
    shape, strides, result_strides = layout
    dtype, device = kind
    drawn = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    drawing: Callable[..., torch.Tensor] = getattr(getattr(torch.ops.aten, op[0]), op[1])
    drawn = drawing(drawn, *args)
    if strides == result_strides:
        return drawn
    result = torch.empty_strided(shape, result_strides, dtype=dtype, device=device)
    return result.copy_(drawn)


def draw_mask(
    shape: tuple[int, ...], strides: tuple[int, ...], probability: float, device: str
) -> torch.Tensor:
    """A boolean mask of a shape and layout, True where dropout keeps its input."""
    mask = torch.empty_strided(shape, strides, dtype=torch.bool, device=device)
    return mask.bernoulli_(1 - probability)


def apply_mask(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """``x * scale`` where the boolean ``mask`` is True, else zero; same shape."""
    return torch.mul(x, mask.view(torch.uint8)).mul_(scale)


def drop_all(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout with probability 1, which draws nothing."""
    return x * torch.zeros((), dtype=x.dtype), torch.zeros_like(x, dtype=torch.bool)


OWN_DRAWS: Final[dict[str, Callable[..., Any]]] = {
    function.__name__: function for function in (dropout, draw, draw_mask)
}
"""This file's functions that draw, by name."""
