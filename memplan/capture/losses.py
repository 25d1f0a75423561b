"""Losses of torch's that take another branch on traced tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch.nn import functional

from memplan.torch_internals import FunctionMode

_FUNCTIONS = (functional.cross_entropy, functional.linear_cross_entropy)
_LOSSES = {function: signature(function) for function in _FUNCTIONS}


class LossesAsEager(FunctionMode):
    """Mode in which ``cross_entropy`` with class weights and label smoothing is what eager runs.

    The mean is over the weights of the labels that count: eager picks those and sums them; on
    traced tensors, torch sums all, with zeros for the others, in another order.
    """

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in _LOSSES:
            return func(*args, **kwargs)
        bound = _LOSSES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        has_labels = not given["target"].is_floating_point()
        is_weighted = given["weight"] is not None and given["label_smoothing"] > 0
        if given["reduction"] != "mean" or not (has_labels and is_weighted):
            return func(*args, **kwargs)
        ignore_index = -100 if given["ignore_index"] is None else given["ignore_index"]
        return _smoothed(
            _logits(given) if "linear_weight" in given else given["input"],
            given["target"],
            given["weight"],
            ignore_index,
            given["label_smoothing"],
        )


def _logits(given: Mapping[str, Any]) -> torch.Tensor:
    """The logits of ``linear_cross_entropy``: (batch, classes, ...)."""
    x, weight, bias = (given[name] for name in ("input", "linear_weight", "linear_bias"))
    flat = weight.reshape(-1, weight.shape[-1])
    logits = functional.linear(x, flat, None if bias is None else bias.reshape(-1))
    return logits.reshape(*x.shape[:-1], *weight.shape[:-1])


def _smoothed(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """The mean over labels, in the steps of torch's compiled branch (torch 2.13-2.15)."""
    device = input.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _smoothed(input.float(), target, weight.float(), ignore_index, label_smoothing)
    dim = min(input.dim() - 1, 1)
    logs = input.log_softmax(dim, input.dtype)
    plain = functional.nll_loss(logs, target, weight, ignore_index=ignore_index)
    by_class = weight.view([-1 if place == dim else 1 for place in range(input.dim())])
    is_ignored = target == ignore_index
    smooth = (logs * by_class).sum(dim).neg().masked_fill(is_ignored, 0.0)
    counting = target.masked_select(~is_ignored).flatten()
    mean = smooth.sum() / weight.gather(0, counting).sum()
    return (1 - label_smoothing) * plain + mean * (label_smoothing / input.shape[dim])
