"""The untouched module, run beside its plan; its changes are put back.

Copies of its buffers, like all copies kept for a comparison, are numpy's: torch's memory is the
plan's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from memplan.capture import (
    Decision,
    replayed,
    unchanged_attributes,
    unchanged_randomness,
    without_data_of,
)
from memplan.capture.sample import Sample
from memplan.costs import most_memory
from memplan.errors import CaptureError
from memplan.planner.plan import Plan
from memplan.rng import random_states, set_random_states
from memplan.runtime.outcome import Outcome, kept, same_outputs, write
from memplan.runtime.signature import State
from memplan.torch_internals import (
    Following,
    seeming_real,
    version_of,
    with_kernels,
    without_checks_of_values,
    without_log_of_failures,
)


@dataclass(frozen=True)
class UntouchedCall:
    """A call of a planned module.

    Attributes:
        model: the module without a plan.
        state: its tensors.
        sample: the inputs.
        decisions: answers to its forward's questions about values.
    """

    model: nn.Module
    state: State
    sample: Sample
    decisions: tuple[Decision, ...] = ()


Run = Callable[[nn.Module, Sample], Any]
"""Calls a module, and returns the values to compare."""


def forward_alone(model: nn.Module, sample: Sample) -> Any:
    """The module's output, whose autograd graph saves no tensors."""
    with _saving_nothing():
        return model(*sample.args, **sample.kwargs)


def untouched_outcome(call: UntouchedCall, run: Run = forward_alone) -> Outcome:
    """The outcome of the untouched module; its changes are put back.

    Where it changes attributes, and seemingly not just once, it also runs twice in a row.

    Raises:
        CaptureError: if it writes an input.
    """
    model, sample = call.model, call.sample

    def once() -> Outcome:
        with unchanged_tensors_of(model):
            return Outcome.of(model, run(model, sample))

    versions = [version_of(tensor) for tensor in sample.tensors()]
    with unchanged_attributes(model) as changed:
        outcome = once()
    if versions != [version_of(tensor) for tensor in sample.tensors()]:
        raise CaptureError("the forward writes an input, and the captured one does not")
    is_steady = True
    if not all(changed.values()):
        with unchanged_attributes(model):
            is_steady = same_outputs([once(), once()])
    return replace(outcome, attributes=changed, is_steady=is_steady)


def repeats_itself(call: UntouchedCall, run: Run = forward_alone) -> bool:
    """Tell whether two runs of the untouched module return the same bits."""
    return same_outputs([untouched_outcome(call, run) for _ in range(2)])


def _undoing(model: nn.Module) -> Callable[[], None]:
    """A function that puts back random states and buffers as they are now."""
    before = [(buffer, kept(buffer)) for buffer in model.buffers()]
    states = [kept(state) for state in random_states()]

    def undo() -> None:
        set_random_states(tuple(map(torch.from_numpy, states)))
        for buffer, content in before:
            write(buffer, content)

    return undo


@contextlib.contextmanager
def unchanged_tensors_of(model: nn.Module) -> Iterator[None]:
    """Put back random states and buffers."""
    undo = _undoing(model)
    try:
        yield
    finally:
        undo()


@contextlib.contextmanager
def unchanged_by_errors(model: nn.Module) -> Iterator[None]:
    """Put back random states and buffers where an error is raised."""
    undo = _undoing(model)
    try:
        yield
    except BaseException:
        undo()
        raise


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what a forward changes: random states, buffers and attributes."""
    with unchanged_attributes(model), unchanged_tensors_of(model):
        yield


@contextlib.contextmanager
def _saving_nothing() -> Iterator[None]:
    """Context in which autograd builds its graph, and saves no tensors."""

    def nothing(tensor: torch.Tensor) -> None:
        del tensor

    def unused(packed: object) -> Any:
        raise AssertionError("there is no backward")

    with torch.autograd.graph.saved_tensors_hooks(nothing, unused):
        yield


def peak_bytes(call: UntouchedCall, run: Run = forward_alone) -> int:
    """The most bytes that the untouched module adds to those alive; random states, 5 KB, apart."""
    following = Following()
    with (
        unchanged_randomness(),
        unchanged_attributes(call.model),
        without_log_of_failures(),
        without_checks_of_values(),
        without_data_of(call.model, call.sample) as (given, _),
        seeming_real(),
        following,
        replayed(call.decisions),
    ):
        output = run(call.model, given)
        found = with_kernels(
            following.followed(),
            lambda one: most_memory(one).workspace_bytes,
            lambda one: most_memory(one).result_bytes,
        )
        del output
    return max(accumulate((event.nbytes for event in found.events), initial=0))


def allowed_bytes(plan: Plan) -> int:
    """The bytes that a step may take: the budget, or else what the captured step needs."""
    return plan.budget_bytes or max(plan.original_peak_bytes, plan.peak_bytes)
