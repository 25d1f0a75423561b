"""A captured step and a schedule as two functions: the forward and the backward.

Each copy of a value becomes a node of its own, and generated code releases a node right after its
last use, so a schedule's frees need no code. Each copy gets its own views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memplan.capture import (
    Captured,
    update_parameter,
)
from memplan.emit.segment import Probe, Segment
from memplan.ir.program import Phase
from memplan.ir.schedule import Catalog, Free, Recovery, Schedule, Step
from memplan.torch_internals import boxed


@dataclass(frozen=True)
class Emitted:
    """The two functions, with their inputs and outputs.

    Attributes:
        forward: takes the list of ``forward_primals``; returns outputs, then saved tensors; then,
            in a fused step, the incoming gradient that it assumed.
        backward: takes saved tensors, ``backward_primals``, tangents, and the gradients that
            ``accumulated`` primals hold, or None. Returns gradients, and None for those added into
            existing ones.
        forward_primals: positions of primals.
        backward_primals: positions of primals.
        output_slots: for each output of the module, its position in what ``forward`` returns, or
            ``~p`` for the primal at position ``p``.
        num_outputs: number of outputs among what ``forward`` returns.
        num_saved: number of tensors saved for ``backward``.
        tangents: positions, among the module's outputs, whose incoming gradients are passed on.
        gradient_primals: positions of the primals that the gradients are for, in order.
        gradient_sources: for each of them, the outputs whose incoming gradients are handed on to
            it, whether it depends on them or not.
        ignored_sources: those of them on whose incoming gradient it does not depend.
        accumulated: positions of the primals whose gradients are added into existing ones.
        updated: positions of the primals that are updated in the backward.
        overwritten: positions, among the saved tensors, of those that the backward overwrites.
        finished: positions, among the saved tensors, of gradients that a fused step computed for
            an incoming gradient of 1.
    """

    forward: Callable[[list[Any]], list[torch.Tensor]]
    backward: Callable[[list[Any]], list[torch.Tensor]]
    forward_primals: tuple[int, ...]
    backward_primals: tuple[int, ...]
    output_slots: tuple[int, ...]
    num_outputs: int
    num_saved: int
    tangents: tuple[int, ...]
    gradient_primals: tuple[int, ...]
    gradient_sources: tuple[frozenset[int], ...]
    ignored_sources: tuple[frozenset[int], ...]
    accumulated: tuple[int, ...]
    updated: tuple[int, ...]
    overwritten: tuple[int, ...]
    finished: tuple[int, ...]

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the primals that get a gradient, or are updated by it."""
        return tuple(sorted({*self.gradient_primals, *self.updated}))


def emit(
    captured: Captured,
    recoveries: Iterable[Recovery],
    schedule: Schedule,
    update: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    probe: Probe | None = None,
) -> Emitted:
    """Write a schedule as code.

    ``update`` takes a parameter and its gradient, if the schedule updates in the backward. An
    update by the user's own call of the optimizer is not written.
    """
    catalog = Catalog.of(captured.program, recoveries)
    schedule = _without_last_update(captured, schedule)
    saved = saved_for_backward(captured, catalog, schedule)
    forward = Segment(captured, catalog, probe=probe)
    forward_primals = forward.take_primals(_read(catalog, schedule.forward))
    forward.run(schedule.forward)
    slots, results = _outputs(captured, forward)
    reached = _reached(captured)
    following = {value for node, value in captured.storage.items() if reached.get(node)}
    forward.graph.output([*results, *forward.save(saved, results), *forward.made_tangents()])
    backward = Segment(captured, catalog, update, probe)
    backward.take(saved)
    backward_primals = backward.take_primals(_read(catalog, schedule.backward))
    backward.take_tangents()
    accumulated = backward.take_existing_gradients()
    backward.run(schedule.backward)
    backward.graph.output([backward.resolve(node) for _, node in captured.gradients])
    sources = tuple(_sources(captured, position) for position, _ in captured.gradients)
    used = [reached.get(node, frozenset()) for _, node in captured.gradients]
    return Emitted(
        forward=boxed(forward.graph),
        backward=boxed(backward.graph),
        forward_primals=forward_primals,
        backward_primals=backward_primals,
        output_slots=slots,
        num_outputs=len(results),
        num_saved=len(saved),
        tangents=tuple(position for position, _ in captured.tangents),
        gradient_primals=tuple(position for position, _ in captured.gradients),
        gradient_sources=sources,
        ignored_sources=tuple(all - used for all, used in zip(sources, used, strict=True)),
        accumulated=accumulated,
        updated=_updated(captured),
        overwritten=_overwritten(saved, schedule.backward),
        finished=tuple(position for position, value in enumerate(saved) if value in following),
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
    """Positions of the saved values whose memory the backward may overwrite."""
    over = {step.over for step in steps if not isinstance(step, Free)}
    return tuple(position for position, value in enumerate(saved) if value in over)


def _read(catalog: Catalog, steps: Iterable[Step]) -> set[int]:
    return {
        value
        for step in steps
        if not isinstance(step, Free)
        for value in (*catalog.ops[step.op].operands, *catalog.ops[step.op].mutates)
    }


def _reached(captured: Captured) -> dict[fx.Node, frozenset[int]]:
    """The outputs whose incoming gradients each node depends on."""
    reached: dict[fx.Node, frozenset[int]] = {
        node: frozenset([output]) for output, node in captured.tangents
    }
    none = frozenset[int]()
    for node in captured.graph.nodes:
        if node.op == "call_function":
            reached[node] = none.union(*(reached.get(n, none) for n in node.all_input_nodes))
    return reached


def _sources(captured: Captured, position: int) -> frozenset[int]:
    """The outputs from which autograd's graph leads to a primal."""
    primal = captured.primals[position]
    key = primal.index if primal.kind == "input" else primal.name
    return frozenset(
        output for output, reached in captured.output.leads_to.items() if key in reached
    )


def _updated(captured: Captured) -> tuple[int, ...]:
    calls = captured.calls.values()
    nodes = {node.args[0] for node in calls if node.target is update_parameter}
    return tuple(i for i, primal in enumerate(captured.primals) if primal.node in nodes)


def _outputs(captured: Captured, forward: Segment) -> tuple[tuple[int, ...], list[fx.Node]]:
    """The slot of each of the module's outputs, and each output once."""
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
