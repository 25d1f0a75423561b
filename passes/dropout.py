"""Dropout in two ops, mask and product, and its backward by the same product.

torch's kernel for the CPU draws a boolean mask and multiplies by it, ``(x * float(m)) * s``, where
the conversion from bool is slow; its backward does the same to the gradient. Here the mask is drawn
by an op of its own, and read as bytes: the product can be recomputed from a saved mask (one byte
per element) without redrawing, and can be written over ``x``. All have the same bits: m is 0 or 1,
so one of the two products is exact, signed zeros and NaN included; in half precision s is exact
too, as captured. The numbers are drawn in the same order.

Not applied to other devices, whose kernels are fused.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from memplan.capture import InPlace
from memplan.rng import apply_mask, draw_mask, dropout
from memplan.transforms.passes import Effect, Pass

_NAME = "split_dropout"
_FORWARD = torch.ops.aten.native_dropout.default
_BACKWARD = torch.ops.aten.native_dropout_backward.default


def split_dropout() -> Pass:
    """Separate the drawing of dropout's mask from its use, on the CPU.

    Returns:
        A pass of effect ``EXACT``.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.Linear(64, 64))
        >>> model = memplan.WithLoss(net, nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.split_dropout()])
        >>> memplan.compare(model, planned, batch).is_exact
        True
    """
    return Pass(_NAME, Effect.EXACT, rewrite_joint=_rewrite)


def _rewrite(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is _BACKWARD and node.meta["val"].device.type == "cpu":
            node.target = apply_mask
            node.meta["in_place"] = {0: InPlace(apply_mask_)}
        elif _draws(node) and node.meta["val"][0].device.type == "cpu":
            _split(graph, node)


def _draws(node: fx.Node) -> bool:
    """Tell whether a node is a dropout that draws numbers."""
    if node.target is dropout:
        return True
    return node.target is _FORWARD and bool(node.args[2]) and 0 < float(str(node.args[1])) < 1


def _split(graph: fx.Graph, node: fx.Node) -> None:
    x, probability, last = node.args
    product, mask = node.meta["val"]
    scale = last
    if node.target is _FORWARD:  # it scales by a number of the tensor's type
        scale = torch.tensor(1 / (1 - float(str(probability))), dtype=product.dtype).item()
    with graph.inserting_before(node):
        drawn = graph.call_function(
            draw_mask, (tuple(mask.shape), mask.stride(), probability, str(mask.device))
        )
        applied = graph.call_function(apply_mask, (x, drawn, scale))
    drawn.meta = {**node.meta, "val": mask}
    applied.meta = {**node.meta, "val": product, "in_place": {0: InPlace(apply_mask_)}}
    for item in list(node.users):
        assert item.target is getitem, f"{item} reads more than one result of {node}"
        item.replace_all_uses_with(applied if item.args[1] == 0 else drawn)
        graph.erase_node(item)
    graph.erase_node(node)


def apply_mask_(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """``apply_mask`` written over ``x``."""
    return x.mul_(mask.view(torch.uint8)).mul_(scale)
