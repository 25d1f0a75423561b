"""A network as layers, in the account of Jain et al., "Checkmate", 2020, and its program to plan.

Layers are ops and their outputs are values of 4 bytes per element; the gradient of a layer's output
reads that output, and the outputs and gradients of its consumers; a backward layer takes twice the
multiply-adds of its forward.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from memplan.ir.program import Costs, Op, OpCost, Phase, Program, Role, Value
from memplan.ir.schedule import Recovery

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import published

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a network, for one image.

    Attributes:
        inputs: positions of the layers that it reads; the network's own input is omitted.
        elements: elements of its output.
        macs: multiply-adds of its forward.
    """

    inputs: tuple[int, ...]
    elements: int
    macs: int


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_own = isinstance(
            m,
            published.Together
            | published.Padded
            | published.PaddedPool
            | published.Add
            | published.Concat
            | published.Crop,
        )
        return is_own or super().is_leaf_module(m, module_qualified_name)


def layers_of(model: nn.Module, size: tuple[int, int]) -> list[Layer]:
    """A network's layers as its authors count them, in execution order."""
    graph = fx.GraphModule(model, _Tracer().trace(model))
    ShapeProp(graph).propagate(torch.empty(1, 3, *size, device="meta"))
    place: dict[fx.Node, int] = {}
    layers: list[Layer] = []

    def add(inputs: Iterable[int], shape: Iterable[int], macs: int = 0) -> int:
        layers.append(Layer(tuple(i for i in inputs if i >= 0), math.prod(shape), macs))
        return len(layers) - 1

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            place[node] = -1
        if node.op != "call_module":
            continue
        module = graph.get_submodule(str(node.target))
        shapes = [source.meta["tensor_meta"].shape for source in node.all_input_nodes]
        shape = node.meta["tensor_meta"].shape
        inputs = [place[source] for source in node.all_input_nodes]
        if isinstance(module, published.Padded | published.PaddedPool):
            n, c, h, w = shapes[0]
            inputs = [add(inputs, (n, c, h + module.kept, w + module.kept))]
        if isinstance(module, published.Crop):
            inputs = [add(inputs[:1], (*shapes[0][:3], shape[3]))]
        place[node] = add(inputs, shape, macs_of(module, shapes, shape))
    if not isinstance(module, nn.Linear):  # it includes its softmax
        add([len(layers) - 1], shape, math.prod(shape))
    return layers


def macs_of(module: nn.Module, shapes: list[torch.Size], shape: torch.Size) -> int:
    """Multiply-adds of a layer, as Checkmate counts them."""
    elements = math.prod(shape)
    if isinstance(module, published.Together):
        module = module[0]
    if isinstance(module, nn.ConvTranspose2d):
        return elements * module.in_channels
    if isinstance(module, nn.Conv2d):
        return elements * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return elements * module.in_features
    if isinstance(module, nn.BatchNorm2d):
        return 4 * elements
    if isinstance(module, nn.ReLU | nn.ReLU6 | nn.Upsample):
        return elements
    return elements * len(shapes) if isinstance(module, published.Add) else 0


def program_of(layers: list[Layer]) -> tuple[Program, Costs, tuple[Recovery, ...]]:
    """One image's step over layers, in Checkmate's account; seconds are multiply-adds.

    Ops and values: the layers, the loss, and the gradients of the layers' outputs in reverse.
    """
    loss = len(layers)
    readers: dict[int, list[int]] = {i: [] for i in range(loss)}
    for position, layer in enumerate(layers):
        for source in layer.inputs:
            readers[source].append(position)
    readers[loss - 1].append(loss)
    ops = [
        Op(i, "layer", tuple(dict.fromkeys(layer.inputs)), (i,)) for i, layer in enumerate(layers)
    ]
    ops.append(Op(loss, "loss", (loss - 1,), (loss,)))
    elements = [*(layer.elements for layer in layers), 1]
    seconds = [*(layer.macs for layer in layers), 0]
    for i, layer in reversed(list(enumerate(layers))):
        gradients = [2 * loss - j for j in readers[i] if j != loss]
        operands = tuple(dict.fromkeys([i, *readers[i], *gradients]))
        ops.append(Op(len(ops), "gradient", operands, (len(ops),), Phase.BACKWARD))
        elements.append(layer.elements)
        seconds.append(2 * layer.macs)
    values = [Value(i, FLOAT_BYTES * n, Role.ACTIVATION, i) for i, n in enumerate(elements)]
    costs = Costs({op.id: OpCost(float(seconds[op.id])) for op in ops}, "multiply-adds")
    recoveries = tuple(Recovery("recompute", op.results, op) for op in ops[:loss])
    return Program(tuple(ops), tuple(values), ()), costs, recoveries


def everything_kept(program: Program) -> Program:
    """The same program, with all outputs of the forward also read by the last op."""
    *others, last = program.ops
    kept = [value for op in others if op.phase is Phase.FORWARD for value in op.results]
    last = replace(last, operands=tuple(dict.fromkeys([*last.operands, *kept])))
    return replace(program, ops=(*others, last))
