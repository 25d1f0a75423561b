"""Dropout of everything, which eager does without drawing numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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
