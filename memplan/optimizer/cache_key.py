"""Text keys of what the cost of an update depends on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

_LEARNING_RATES = ("lr", "initial_lr", "params")


def update_key(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> str | None:
    """A key, equal for optimizers that cost the same; None if that is unknown.

    It is known for torch's own, whose code is that of the release, while they have no state yet.
    """
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim.") or optimizer.state:
        return None
    groups = [_group(group, trained) for group in optimizer.param_groups]
    if None in groups:
        return None
    return f"update {kind.__module__}.{kind.__qualname__} {groups}"


def parameter_key(key: str, group: int, parameter: nn.Parameter) -> str:
    """The key for the step of one parameter alone."""
    return f"{key} alone {group} {_layout(parameter)}"


def _group(group: Mapping[str, object], trained: Mapping[str, nn.Parameter]) -> object:
    ids = {id(parameter) for parameter in trained.values()}
    parameters = group["params"]
    assert isinstance(parameters, list)
    settings = {name: _text(value) for name, value in group.items() if name not in _LEARNING_RATES}
    if "" in settings.values():
        return None
    return settings, [_layout(parameter) for parameter in parameters if id(parameter) in ids]


def _text(value: object) -> str:
    """The text of numbers and the like; "tensor" for a tensor; else ""."""
    if isinstance(value, bool | int | float | str | type(None)):
        return repr(value)
    if isinstance(value, list | tuple) and all(map(_text, value)):
        return f"[{', '.join(map(_text, value))}]"
    return "tensor" if isinstance(value, torch.Tensor) else ""


def _layout(parameter: nn.Parameter) -> str:
    dtype = str(parameter.dtype).removeprefix("torch.")
    return f"{dtype}{list(parameter.shape)}{parameter.stride()}"
