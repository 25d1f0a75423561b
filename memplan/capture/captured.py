"""What capturing yields: the program, and how it maps to the joint graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from memplan.capture.forward import Difference, OutputLeaf
from memplan.program import Program
from memplan.torch_internals import TreeSpec


@dataclass(frozen=True, slots=True)
class Primal:
    """A tensor that the step is given.

    Attributes:
        node: its placeholder in the joint graph.
        kind: "parameter", "buffer" or "constant" (found by ``name``), or "input" (by ``index``).
        name: FQN, for all but inputs.
        index: position among the tensors of the sample, for inputs.
    """

    node: fx.Node
    kind: Literal["parameter", "buffer", "constant", "input"]
    name: str = ""
    index: int = -1


@dataclass(frozen=True)
class Captured:
    """A training step as a program, and the joint graph that it abstracts.

    Attributes:
        program: what the planner sees.
        graph: the joint graph; ops and views, no in-place op but the final copies into buffers.
        calls: op id to its node.
        storage: node of a tensor to the value whose storage it is, or is a view of.
        bases: value to the node that its op's result is (the op itself, or one of its items).
        primals: in the order in which the joint graph takes them.
        constants: tensors of primals of that kind, by name.
        outputs: nodes that the forward returns, in order.
        requires_grad: for each output, whether it does in the untouched module.
        gradients: (position of the primal, node of its gradient).
        tangents: (position of the output, placeholder of its incoming gradient).
        spec: structure of what the module returns.
        leaves: its leaves.
        is_loss: whether gradients arrive at the only scalar output alone.
        differences: where the step is not made of the ops that eager runs.
    """

    program: Program
    graph: fx.Graph
    calls: Mapping[int, fx.Node]
    storage: Mapping[fx.Node, int]
    bases: Mapping[int, fx.Node]
    primals: tuple[Primal, ...]
    constants: Mapping[str, torch.Tensor]
    outputs: tuple[fx.Node, ...]
    requires_grad: tuple[bool, ...]
    gradients: tuple[tuple[int, fx.Node], ...]
    tangents: tuple[tuple[int, fx.Node], ...]
    spec: TreeSpec
    leaves: tuple[OutputLeaf, ...]
    is_loss: bool
    differences: tuple[Difference, ...]
