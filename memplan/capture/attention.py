"""Attention as a CUDA device would run it, in a trace made without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memplan.torch_internals import FunctionMode

_MOST_FLASH_DIM = 256


class CudaAttention(FunctionMode):
    """Mode in which scaled_dot_product_attention is one of CUDA's fused kernels.

    Flash attention for 16-bit operands without a mask, else the memory-efficient kernel. With a
    mask or dropout, the CPU would run it as other ops, with a matrix of scores.
    """

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(  # noqa: PLR0917 - as torch has it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    query, key, value = map(_as_autocast, (query, key, value))
    attn_mask = None if attn_mask is None else _as_autocast(attn_mask)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    if attn_mask is None and query.dtype.itemsize == 2 and query.shape[-1] <= _MOST_FLASH_DIM:
        output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return output
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        zeros = torch.zeros(bias.shape, dtype=query.dtype, device=query.device)
        bias = zeros.masked_fill(~bias, float("-inf"))
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    output = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]
    return output


def _as_autocast(operand: torch.Tensor) -> torch.Tensor:
    """The operand as autocast hands it to attention, a function that it casts down for."""
    kind = operand.device.type
    if not torch.is_autocast_enabled(kind) or operand.dtype is not torch.float32:
        return operand
    return operand.to(torch.get_autocast_dtype(kind))
