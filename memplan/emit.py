"""From a captured step and a schedule to two functions: the forward and the backward.

Each copy of a value becomes a node of its own, and generated code lets go of a node right after
its last use: so a schedule's frees need no code. Views are made anew on each copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument

from memplan.accumulation import accumulate
from memplan.capture import (
    Captured,
    call_of,
    reads_kept,
    source_of_call,
    update_parameter,
)
from memplan.program import Op, Phase, Role
from memplan.schedule import Catalog, Free, Recovery, Schedule, Step
from memplan.torch_internals import boxed


@dataclass(frozen=True)
class Emitted:
    """The two functions, and what goes in and out of them.

    Attributes:
        forward: takes the list of ``forward_primals``; returns outputs, then saved tensors.
        backward: takes saved tensors, ``backward_primals``, tangents, and what is added to: the
            gradients that ``accumulated`` primals hold, or None. Returns gradients, and None for
            those that were added into what was there.
        forward_primals: positions of primals.
        backward_primals: positions of primals.
        output_slots: for each output of the module, its position in what ``forward`` returns, or
            ``~p`` for the primal at position ``p``.
        num_outputs: how many of what ``forward`` returns are outputs.
        tangents: positions, among the module's outputs, whose incoming gradients are passed on.
        gradient_primals: positions of the primals that the gradients are for, in order.
        gradient_sources: for each of them, the outputs whose incoming gradients it depends on.
        accumulated: positions of the primals whose gradients are added into what is there.
        updated: positions of the primals that are updated in the backward.
        overwritten: positions, among the saved tensors, of those that the backward writes over.
    """

    forward: Callable[[list[Any]], list[torch.Tensor]]
    backward: Callable[[list[Any]], list[torch.Tensor]]
    forward_primals: tuple[int, ...]
    backward_primals: tuple[int, ...]
    output_slots: tuple[int, ...]
    num_outputs: int
    tangents: tuple[int, ...]
    gradient_primals: tuple[int, ...]
    gradient_sources: tuple[frozenset[int], ...]
    accumulated: tuple[int, ...]
    updated: tuple[int, ...]
    overwritten: tuple[int, ...]

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the primals that get a gradient, or are updated by it."""
        return tuple(sorted({*self.gradient_primals, *self.updated}))


@dataclass(frozen=True)
class Probe:
    """Looks at each copy of some values as it is made.

    Attributes:
        values: which.
        look: takes the value's id and the copy.
    """

    values: frozenset[int]
    look: Callable[[int, torch.Tensor], None]


def emit(
    captured: Captured,
    recoveries: Iterable[Recovery],
    schedule: Schedule,
    update: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    probe: Probe | None = None,
) -> Emitted:
    """Write a schedule as code.

    ``update`` takes a parameter and its gradient, if the schedule updates in the backward. What
    the user's own call of the optimizer runs is not written.
    """
    catalog = Catalog.of(captured.program, recoveries)
    schedule = _without_last_update(captured, schedule)
    saved = saved_for_backward(captured, catalog, schedule)
    forward = _Segment(captured, catalog, probe=probe)
    forward_primals = forward.take_primals(_read(catalog, schedule.forward))
    forward.run(schedule.forward)
    slots, results = _outputs(captured, forward)
    forward.graph.output([*results, *forward.save(saved, results)])
    backward = _Segment(captured, catalog, update, probe)
    backward.take(saved)
    backward_primals = backward.take_primals(_read(catalog, schedule.backward))
    backward.take_tangents()
    accumulated = backward.take_existing_gradients()
    backward.run(schedule.backward)
    backward.graph.output([backward.resolve(node) for _, node in captured.gradients])
    return Emitted(
        forward=boxed(forward.graph),
        backward=boxed(backward.graph),
        forward_primals=forward_primals,
        backward_primals=backward_primals,
        output_slots=slots,
        num_outputs=len(results),
        tangents=tuple(position for position, _ in captured.tangents),
        gradient_primals=tuple(position for position, _ in captured.gradients),
        gradient_sources=_sources(captured),
        accumulated=accumulated,
        updated=_updated(captured),
        overwritten=_overwritten(saved, schedule.backward),
    )


def _without_last_update(captured: Captured, schedule: Schedule) -> Schedule:
    ops = captured.program.ops
    last = [op.id for op in ops[-1:] if op.phase is Phase.OPTIMIZER]
    kept = (step for step in schedule.backward if isinstance(step, Free) or step.op not in last)
    return Schedule(schedule.forward, tuple(kept))


def saved_for_backward(captured: Captured, catalog: Catalog, schedule: Schedule) -> tuple[int, ...]:
    """Values that the backward reads in the copy that the forward made, in order of id."""
    made: set[int] = set()
    for step in schedule.forward:
        if isinstance(step, Free):
            made.discard(step.value)
        else:
            made.discard(-1 if step.over is None else step.over)
            made.update(step.binds)
    saved: set[int] = set()
    for step in schedule.backward:
        if isinstance(step, Free):
            made.discard(step.value)
        else:
            saved.update(made.intersection(catalog.ops[step.op].operands))
            made.difference_update(step.binds)
            made.discard(-1 if step.over is None else step.over)
    gradients = {captured.storage[node] for _, node in captured.gradients}
    return tuple(sorted(saved | (gradients & made)))


def _overwritten(saved: tuple[int, ...], steps: Iterable[Step]) -> tuple[int, ...]:
    """Positions of the saved values whose memory the backward may write over."""
    over = {step.over for step in steps if not isinstance(step, Free)}
    return tuple(position for position, value in enumerate(saved) if value in over)


def _read(catalog: Catalog, steps: Iterable[Step]) -> set[int]:
    return {
        value
        for step in steps
        if not isinstance(step, Free)
        for value in (*catalog.ops[step.op].operands, *catalog.ops[step.op].mutates)
    }


def _sources(captured: Captured) -> tuple[frozenset[int], ...]:
    """The outputs whose incoming gradients each gradient depends on."""
    reached: dict[fx.Node, frozenset[int]] = {
        node: frozenset([output]) for output, node in captured.tangents
    }
    none = frozenset[int]()
    for node in captured.graph.nodes:
        if node.op == "call_function":
            reached[node] = none.union(*(reached.get(n, none) for n in node.all_input_nodes))
    return tuple(reached.get(node, none) for _, node in captured.gradients)


def _updated(captured: Captured) -> tuple[int, ...]:
    calls = captured.calls.values()
    nodes = {node.args[0] for node in calls if node.target is update_parameter}
    return tuple(i for i, primal in enumerate(captured.primals) if primal.node in nodes)


def _outputs(captured: Captured, forward: _Segment) -> tuple[tuple[int, ...], list[fx.Node]]:
    """Each output once, and where each of the module's outputs finds itself."""
    positions = {primal.node: index for index, primal in enumerate(captured.primals)}
    results: list[fx.Node] = []
    slots: list[int] = []
    for node in captured.outputs:
        if node in positions:
            slots.append(~positions[node])
            continue
        emitted = forward.resolve(node)
        if emitted not in results:
            results.append(emitted)
        slots.append(results.index(emitted))
    return tuple(slots), results


class _Segment:
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
        self.copies: dict[int, fx.Node] = {}
        self.views: dict[int, dict[fx.Node, fx.Node]] = {}
        self.kernels = frozenset(captured.calls.values())

    def take_primals(self, read: set[int]) -> tuple[int, ...]:
        """Placeholders for the primals whose storages are read; their positions.

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
        """Placeholders for saved values."""
        for value in values:
            self.copies[value] = self.graph.placeholder(f"saved_{value}")

    def take_tangents(self) -> None:
        """Placeholders for incoming gradients."""
        for position, node in self.captured.tangents:
            self.given[node] = self.graph.placeholder(f"tangent_{position}")

    def take_existing_gradients(self) -> tuple[int, ...]:
        """Placeholders for the gradients that are there; the positions of their parameters."""
        primals = self.captured.primals
        existing = [primal for primal in primals if primal.kind == "gradient"]
        for primal in existing:
            self.given[primal.node] = self.graph.placeholder(primal.node.name)
        positions = {p.name: index for index, p in enumerate(primals) if p.kind == "parameter"}
        return tuple(positions[primal.name] for primal in existing)

    def save(self, values: Iterable[int], results: list[fx.Node]) -> list[fx.Node]:
        """What the forward hands to the backward.

        What is returned to the caller as well becomes part of autograd's graph there; the backward
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
                self.bind(op, self.call(op, step.over), step.binds)
                if step.over is not None and step.over not in step.binds:
                    self.copies.pop(step.over)
                    self.views.pop(step.over, None)

    def call(self, op: Op, over: int | None = None) -> fx.Node:
        """Write one call, whose result goes where the value ``over`` was."""
        kept = self.copies[op.operands[0]] if reads_kept(op) else None
        call = call_of(self.captured, op, kept)

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
        """Whether an op adds a gradient into one that is there."""
        values = self.catalog.values
        return any(values[id].role is Role.EXISTING_GRADIENT for id in op.mutates)

    def bind(self, op: Op, node: fx.Node, values: Iterable[int]) -> None:
        """Name the results that are held."""
        source = source_of_call(self.captured, op)
        for value in values:
            base = self.captured.bases.get(value)
            copy = node
            if base is not None and base.target is getitem and base.args[0] is source:
                index: Argument = base.args[1]
                copy = self.graph.call_function(getitem, (node, index))
            self.copies[value] = copy
            self.views.pop(value, None)
            if self.probe is not None and value in self.probe.values:
                self.graph.call_function(self.probe.look, (value, copy))

    def resolve(self, node: fx.Node) -> fx.Node:
        """The node of the current copy, or of a view of it."""
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
        """Whether a node is one item of what a kernel returned."""
        return node.target is getitem and node.args[0] in self.kernels
