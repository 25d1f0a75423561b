"""What capturing yields: the program, and how it maps to the joint graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import fx

from memplan.capture.decisions import Decision
from memplan.capture.flat import Output
from memplan.capture.joint import Difference
from memplan.capture.python_state import Attribute
from memplan.program import Program


@dataclass(frozen=True, slots=True)
class Primal:
    """A tensor that the step is given.

    Attributes:
        node: its placeholder in the joint graph.
        kind: "parameter", "buffer", "constant" or "gradient" (of the parameter ``name``, if it has
            one when the backward runs), found by ``name``; or "input", by ``index``.
        name: FQN, for all but inputs.
        index: position among the tensors of the sample, for inputs.
    """

    node: fx.Node
    kind: Literal["parameter", "buffer", "constant", "gradient", "input"]
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
        output: what the module makes of them.
        gradients: (position of the primal, node of its gradient), or, for a primal that holds a
            gradient already, the node that adds the new one into it.
        tangents: (position of the output, placeholder of its incoming gradient).
        decisions: values that the forward asked for; the step is for inputs where they hold.
        attributes: what the forward reads of what Python holds; the step is for where they hold.
        differences: where the step may differ from the untouched module's.
        needs_one: of a fused step: why the gradient that arrives at the loss must be one; or "".
    """

    program: Program
    graph: fx.Graph
    calls: Mapping[int, fx.Node]
    storage: Mapping[fx.Node, int]
    bases: Mapping[int, fx.Node]
    primals: tuple[Primal, ...]
    constants: Mapping[str, torch.Tensor]
    outputs: tuple[fx.Node, ...]
    output: Output
    gradients: tuple[tuple[int, fx.Node], ...]
    tangents: tuple[tuple[int, fx.Node], ...]
    decisions: tuple[Decision, ...]
    attributes: tuple[Attribute, ...]
    differences: tuple[Difference, ...]
    needs_one: str = ""

    @cached_property
    def device(self) -> torch.device:
        """The device that the step's memory is counted on: a GPU, if anything is on one."""
        values = (node.meta["val"] for node in self.calls.values())
        devices = {tensor.device for value in values for tensor in tensors_of(value)}
        return max(devices, key=lambda one: one.type == "cuda", default=torch.device("cpu"))


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors among what an op returns, in order."""
    values = value if isinstance(value, list | tuple) else (value,)
    return [item for item in values if isinstance(item, torch.Tensor)]
