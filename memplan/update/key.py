"""What the cost of an update depends on, as text."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

_LEARNING_RATES = ("lr", "initial_lr", "params")


def update_key(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> str | None:
    """Equal for optimizers that cost the same; None if that cannot be told.

    It cannot where there is state of parameters that this step does not train.
    """
    if optimizer.state.keys() - set(trained.values()):
        return None
    kind = type(optimizer)
    version = getattr(sys.modules[kind.__module__.partition(".")[0]], "__version__", "")
    own = {name: _text(value) for name, value in sorted(optimizer.__dict__.items())}
    plain = {name: text for name, text in own.items() if text and not name.startswith("_")}
    groups = [_group(group, trained) for group in optimizer.param_groups]
    return f"update {kind.__module__}.{kind.__qualname__} {version} {plain} {groups}"


def parameter_key(key: str, group: int, parameter: nn.Parameter) -> str:
    """The same for the step of one parameter alone."""
    return f"{key} alone {group} {_layout(parameter)}"


def _group(group: Mapping[str, object], trained: Mapping[str, nn.Parameter]) -> object:
    ids = {id(parameter) for parameter in trained.values()}
    parameters = group["params"]
    assert isinstance(parameters, list)
    settings = {k: _text(v) for k, v in group.items() if k not in _LEARNING_RATES}
    return settings, [_layout(parameter) for parameter in parameters if id(parameter) in ids]


def _text(value: object) -> str:
    """Numbers and the like as they are; for a tensor, that it is one."""
    if isinstance(value, bool | int | float | str | type(None)):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return "tensor" if isinstance(value, torch.Tensor) else ""


def _layout(parameter: nn.Parameter) -> str:
    dtype = str(parameter.dtype).removeprefix("torch.")
    return f"{dtype}{list(parameter.shape)}{parameter.stride()}"
