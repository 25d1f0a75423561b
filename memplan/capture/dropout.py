"""Dropout as eager does it, where torch's trace of it gives other numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

_DROPOUT = torch.ops.aten.native_dropout.default


class DropsAll(TorchFunctionMode):
    """Inside, ``dropout`` with probability 1 multiplies by zero, as eager does.

    torch's trace of it draws a mask, which moves the random state.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in (torch.dropout, torch.nn.functional.dropout):
            x = args[0] if args else kwargs["input"]
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            is_training = args[2] if len(args) > 2 else kwargs.get("training", True)
            if p == 1 and is_training:
                return x * torch.zeros((), dtype=x.dtype, device=x.device)
        return func(*args, **kwargs)


def round_scales(graph: fx.Graph) -> None:
    """Scale the backward in half precision by what eager scales by, 1 / (1 - p) in 16 bits.

    Eager multiplies by the noise that it drew, which has the type of the input. The kernel that
    torch traces multiplies by the same number in 32 bits; both product and noise are exact there,
    so that a rounded scale gives eager's bits.
    """
    for node in graph.nodes:
        if node.target is not torch.ops.aten.native_dropout_backward.default:
            continue
        gradient, mask, _ = node.args
        value = gradient.meta["val"]
        drawn = mask.args[0] if mask.args else None
        if not isinstance(drawn, fx.Node) or drawn.target is not _DROPOUT:
            continue
        if value.dtype.itemsize == 2 and value.device.type == "cpu":
            probability: Any = drawn.args[1]
            scale = torch.ones((), dtype=value.dtype).div_(1 - probability).item()
            node.args = (gradient, mask, scale)
