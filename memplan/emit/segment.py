"""One segment of a schedule as an FX graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from memplan.capture import Captured, OpCall, call_of, stashed_operands, update_parameter
from memplan.emit.accumulate import accumulate
from memplan.ir.program import Op, Role
from memplan.ir.schedule import Catalog, Free, Step
from memplan.torch_internals import Origin


@dataclass(frozen=True)
class Probe:
    """Looks at each copy of some values as it is made.

    Attributes:
        values: their ids.
        look: takes the value's id and the copy.
    """

    values: frozenset[int]
    look: Callable[[int, torch.Tensor], None]


class Segment:
    """Writes one segment's graph."""

    def __init__(
        self,
        captured: Captured,
        catalog: Catalog,
        update: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.captured = captured
        self.catalog = catalog
        self.update = update
        self.probe = probe
        self.graph = fx.Graph()
        self.given: dict[fx.Node, fx.Node] = {}
        self.tangents = frozenset(node for _, node in captured.tangents)
        self.copies: dict[int, fx.Node] = {}
        self.views: dict[int, dict[fx.Node, fx.Node]] = {}
        self.kernels = frozenset(captured.calls.values())

    def take_primals(self, read: set[int]) -> tuple[int, ...]:
        """Add placeholders for primals whose storages are read; return their positions.

        Outputs that are views of a primal need it in the forward as well.
        """
        storage = self.captured.storage
        read = read | {storage[node] for node in self.captured.outputs}
        positions = [
            position
            for position, primal in enumerate(self.captured.primals)
            if storage[primal.node] in read and primal.kind != "gradient"
        ]
        for position in positions:
            node = self.captured.primals[position].node
            self.given[node] = self.graph.placeholder(f"primal_{position}")
        return tuple(positions)

    def take(self, values: Iterable[int]) -> None:
        """Add placeholders for saved values."""
        for value in values:
            self.copies[value] = self.graph.placeholder(f"saved_{value}")

    def take_tangents(self) -> None:
        """Add placeholders for incoming gradients."""
        for position, node in self.captured.tangents:
            self.given[node] = self.graph.placeholder(f"tangent_{position}")

    def made_tangents(self) -> list[fx.Node]:
        """The incoming gradient that a fused step's forward made. It is held to its end."""
        return [self.given[node] for node in self.tangents if node in self.given]

    def take_existing_gradients(self) -> tuple[int, ...]:
        """Add placeholders for existing gradients; return the positions of their parameters."""
        primals = self.captured.primals
        existing = [primal for primal in primals if primal.kind == "gradient"]
        for primal in existing:
            self.given[primal.node] = self.graph.placeholder(primal.node.name)
        positions = {p.name: index for index, p in enumerate(primals) if p.kind == "parameter"}
        return tuple(positions[primal.name] for primal in existing)

    def save(self, values: Iterable[int], results: list[fx.Node]) -> list[fx.Node]:
        """The tensors saved for the backward.

        One that is also returned to the caller becomes part of autograd's graph there; the backward
        gets an alias, or the two would keep each other alive.
        """
        detach = torch.ops.aten.detach.default
        return [
            self.graph.call_function(detach, (copy,)) if copy in results else copy
            for copy in (self.copies[value] for value in values)
        ]

    def run(self, steps: Iterable[Step]) -> None:
        """Write the calls of the steps."""
        for step in steps:
            if isinstance(step, Free):
                self.copies.pop(step.value)
                self.views.pop(step.value, None)
            else:
                op = self.catalog.ops[step.op]
                stashed = [self.copies[id] for id in stashed_operands(self.captured, op)]
                call = call_of(self.captured, op, stashed)
                node = self.write(op, call, step.over)
                node.meta["origin"] = Origin(op.module, op.source)
                self.bind(call, node, step.binds)
                if step.over is not None and step.over not in step.binds:
                    self.copies.pop(step.over)
                    self.views.pop(step.over, None)

    def write(self, op: Op, call: OpCall, over: int | None = None) -> fx.Node:
        """Write one call, whose result overwrites the value ``over``, if any."""

        def translate(node: fx.Node) -> fx.Node:
            return node if node.graph is self.graph else self.resolve(node)

        args = fx.map_arg(call.args, translate)
        kwargs = fx.map_arg(call.kwargs, translate)
        assert isinstance(args, tuple) and isinstance(kwargs, Mapping)
        if self.is_accumulation(op):
            added = self.graph.call_function(accumulate, args)
            self.given[self.captured.calls[op.id]] = added
            return added
        target = call.target
        if target is update_parameter:
            assert self.update is not None, "the schedule updates parameters, and nothing does so"
            target = self.update
        if over is None:
            return self.graph.call_function(target, args, dict(kwargs))
        position, in_place = next(
            (position, in_place)
            for position, in_place in call.in_place.items()
            if self.captured.storage[call.args[position]] == over
        )
        into = {in_place.out: args[position]} if in_place.out else {}
        return self.graph.call_function(in_place.target, args, {**kwargs, **into})

    def is_accumulation(self, op: Op) -> bool:
        """Tell whether an op adds a gradient into an existing one."""
        values = self.catalog.values
        return any(values[id].role is Role.EXISTING_GRADIENT for id in op.mutates)

    def bind(self, call: OpCall, node: fx.Node, values: Iterable[int]) -> None:
        """Bind the results that are held."""
        items = call.items or {}
        for value in values:
            copy = node
            if value in items:
                copy = self.graph.call_function(getitem, (node, items[value]))
            self.copies[value] = copy
            self.views.pop(value, None)
            if self.probe is not None and value in self.probe.values:
                self.graph.call_function(self.probe.look, (value, copy))

    def resolve(self, node: fx.Node) -> fx.Node:
        """The node of the current copy, or of a view of it."""
        if node in self.tangents and node not in self.given:
            like: torch.Tensor = node.meta["val"]
            self.given[node] = self.graph.call_function(
                torch.ones, (tuple(like.shape),), {"dtype": like.dtype, "device": like.device}
            )
        if node in self.given:
            return self.given[node]
        value = self.captured.storage[node]
        if self.captured.bases.get(value) is node or self.is_result(node):
            return self.copies[value]
        views = self.views.setdefault(value, {})
        if node not in views:
            args = fx.map_arg(node.args, self.resolve)
            kwargs = fx.map_arg(node.kwargs, self.resolve)
            assert isinstance(args, tuple) and isinstance(kwargs, Mapping)
            assert callable(node.target), f"{node} is neither a result nor a view"
            views[node] = self.graph.call_function(node.target, args, dict(kwargs))
        return views[node]

    def is_result(self, node: fx.Node) -> bool:
        """Tell whether a node is one item of what a kernel returned."""
        return node.target is getitem and node.args[0] in self.kernels
