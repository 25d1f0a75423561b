"""Dropout as in eager, where torch's trace of it gives other numbers.

Eager draws noise of the input's type, divides it by 1 - p, and multiplies. A trace holds torch's
fused op, which multiplies by 1 / (1 - p), computed in 64 bits. The two differ in the last bit for
some p, and in 16-bit types for most; where p is 1, eager draws nothing.
"""

from __future__ import annotations

import torch
from torch import fx

from memplan.rng import drop_all, dropout

_FORWARD = torch.ops.aten.native_dropout.default
_BACKWARD = torch.ops.aten.native_dropout_backward.default


def dropout_as_eager(graph: fx.Graph) -> None:
    """Scale forward and backward as eager does; on the CPU, where eager is not fused."""
    for node in graph.nodes:
        if node.target is not _FORWARD or node.meta["val"][0].device.type != "cpu":
            continue
        x, probability, is_training = node.args
        if not is_training:
            continue
        if probability == 1:
            node.target, node.args, scale = drop_all, (x,), 0.0
        else:
            dtype = node.meta["val"][0].dtype
            scale = torch.ones((), dtype=dtype).div_(1 - probability).item()
            if scale != torch.tensor(1 / (1 - probability), dtype=dtype).item():
                node.target, node.args = dropout, (x, probability, scale)
        for item in list(node.users):
            for user in list(item.users):
                if user.target is _BACKWARD and user.args[1] is item:
                    user.args = (*user.args[:2], scale)
