"""The result of a capture: the program, and its mapping to the joint graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from memplan.capture.flat import Output
from memplan.capture.input_guards import Decision
from memplan.capture.joint import Difference
from memplan.capture.python_state import Attribute
from memplan.ir.program import Op, Program


@dataclass(frozen=True, slots=True)
class InPlace:
    """A call that writes an op's result into the memory of one of its operands, bit for bit.

    A node's ``meta["in_place"]`` holds them by the position of the argument that they overwrite.
    The reader decides which are possible (same layout, memory of its own), and the planner where
    one is worth it.

    Attributes:
        target: called with the op's arguments.
        out: the keyword of the argument to overwrite; "" if the target does so by itself.
    """

    target: Callable[..., object]
    out: str = ""


@dataclass(frozen=True)
class OpCall:
    """A target and arguments, in which tensors are nodes of the joint graph.

    Attributes:
        in_place: by the position of an argument, the call that writes the result over it.
        items: the position of each result that is one item of what the target returns; others
            are all that it returns. None: several results are its items in their order, and one
            result is all that it returns.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: Mapping[int, InPlace] = field(default_factory=dict)
    items: Mapping[int, int] | None = None


Lowering: TypeAlias = "Callable[[Captured, Op, Sequence[Any]], OpCall]"
"""Makes the call of an op that a pass adds. Takes the captured step, the op, and a stand-in for
each of its operands that a recovery stashed, which the call hands on as it is."""


@dataclass(frozen=True, slots=True)
class Primal:
    """A tensor that the step takes.

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
        program: the planner's view.
        graph: the joint graph; ops and views, no in-place op but the final copies into buffers.
        calls: op id to its node.
        storage: node of a tensor to the value whose storage it is, or is a view of.
        bases: value to the node that its op's result is (the op itself, or one of its items).
        primals: in the order in which the joint graph takes them.
        constants: tensors of primals of that kind, by name.
        outputs: nodes that the forward returns, in order.
        output: the module's output, made of them.
        gradients: (position of the primal, node of its gradient), or, for a primal that holds a
            gradient already, the node that adds the new one into it.
        tangents: (position of the output, placeholder of its incoming gradient).
        decisions: values that the forward asked for; the step is valid where they hold.
        attributes: Python state that the forward reads; the step is valid where it holds.
        differences: ways in which the step may differ from the untouched module's.
        needs_one: in a fused step, why the gradient that arrives at the loss must be 1; or "".
        lowerings: calls of the ops that passes add, by target.
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
    lowerings: Mapping[str, Lowering] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """The device that the step's memory is counted on: a GPU, if anything is on one."""
        values = (node.meta["val"] for node in self.calls.values())
        devices = {tensor.device for value in values for tensor in tensors_of(value)}
        return max(devices, key=lambda one: one.type == "cuda", default=torch.device("cpu"))


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors that an op returns, in order."""
    values = value if isinstance(value, list | tuple) else (value,)
    return [item for item in values if isinstance(item, torch.Tensor)]
