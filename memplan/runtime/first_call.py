"""The first call of each plan, compared with the untouched module's forward, bit by bit.

The untouched forward runs first, and within the budget if there is one. Its autograd graph is
built, since modules may ask whether gradients are enabled, but nothing is saved for a backward.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memplan.capture import tensors_of
from memplan.errors import CaptureError, UnfaithfulCapture
from memplan.ir.program import Phase
from memplan.ir.schedule import Effect
from memplan.runtime import whole_step
from memplan.runtime.fused_gradients import PendingGradients
from memplan.runtime.outcome import Outcome, digest
from memplan.runtime.step import PlannedStep, noted
from memplan.runtime.untouched import (
    UntouchedCall,
    allowed_bytes,
    forward_alone,
    peak_bytes,
    repeats_itself,
    unchanged,
    unchanged_by_errors,
    untouched_outcome,
)
from memplan.torch_internals import around_calls, flatten, is_backward
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")


def what_is_due(asked: str, effects: Sequence[Effect]) -> str:
    """The comparison that a plan's first call makes: none where its output differs by design."""
    return "none" if {Effect.STOCHASTIC, Effect.APPROXIMATE} & {*effects} else asked


def first_call(
    step: PlannedStep, call: UntouchedCall, finished: PendingGradients
) -> tuple[PlannedStep, Any]:
    """The compared step, and the output of its call.

    Raises:
        UnfaithfulCapture: if anything differs by more than rounding.
    """
    if step.compares == "step":
        step = whole_step.compared(step, call, finished)
    expected = before(step, call)
    with unchanged_by_errors(call.model):
        output = [step.run(call.state, call.sample, finished)]
        compared = after(step, call, expected, output)
    return compared, output[0]


def before(step: PlannedStep, call: UntouchedCall) -> Outcome | str:
    """The outcome of the untouched forward, or why it is not run."""
    primals = {primal.node for primal in step.captured.primals if primal.kind == "input"}
    written = {
        value
        for op in step.captured.program.ops
        if op.phase is Phase.FORWARD
        for value in op.mutates
    }
    if any(step.captured.storage[node] in written for node in primals):
        return "it writes its inputs"
    if step.plan.budget_bytes is None:  # it takes no more than it would take in a step of its own
        return untouched_outcome(call)
    above_bytes = _needed_bytes(call)
    if above_bytes is None:
        return "what it takes cannot be known without running it"
    needed_bytes = above_bytes + step.captured.program.resident_bytes
    if needed_bytes > allowed_bytes(step.plan):
        return f"that may take {format_bytes(needed_bytes)}"
    return untouched_outcome(call)


def _needed_bytes(call: UntouchedCall) -> int | None:
    """The bytes that the untouched forward adds to those alive; None if they cannot be known."""
    try:
        return peak_bytes(call)
    except Exception as error:  # a forward without data may raise anything
        _LOG.debug("the untouched forward cannot be followed: %s", error)
        return None


def after(
    step: PlannedStep, call: UntouchedCall, expected: Outcome | str, output: list[Any]
) -> PlannedStep:
    """The compared step: its first call's outcome is as expected, or a note says otherwise.

    Args:
        step: the step.
        call: its first call.
        expected: the result of ``before``.
        output: the call's output, alone in a list, which is emptied where it is of no use.

    Raises:
        UnfaithfulCapture: if it differs by more than rounding.
        CaptureError: if the untouched module does not repeat itself, or keeps state that matters.
    """
    checked = replace(step, compares="none")
    if isinstance(expected, str):
        return noted(checked, f"the first call was not compared with the untouched: {expected}")
    found = Outcome.of(call.model, output[0])
    what = found.difference(expected)
    error = found.error(expected) if what == "its output" else 0.0
    if what and not (what == "its output" and error <= expected.rounding):
        output.clear()  # makes room; nothing else is needed to find the place
        raise _fault(step, call, what)
    if not expected.is_steady:
        raise CaptureError(
            f"what {type(call.model).__name__} returns depends on what the call before left in its "
            f"attributes ({', '.join(expected.attributes)}), and a planned step leaves nothing "
            "there. Hand it from call to call as an input and an output, or keep it in a buffer."
        )
    _warn_of_state(step, expected)
    return _rounded(checked, call, error) if what else checked


def _warn_of_state(step: PlannedStep, expected: Outcome) -> None:
    """Warn of state that the untouched forward keeps in attributes, if the capture did not."""
    is_said = any(difference.is_warned_of for difference in step.captured.differences)
    if not is_said and not all(expected.attributes.values()):
        names = ", ".join(expected.attributes)
        warnings.warn(
            f"the forward changes attributes ({names}), and the plan does not", stacklevel=7
        )


def _rounded(step: PlannedStep, call: UntouchedCall, error: float) -> PlannedStep:
    """A step whose output differs by rounding, with a note of that."""
    if error == 0:  # zeros of another sign, or entries of a large output that were not kept
        what = "the output differs from the untouched forward's, by less than could be seen"
    else:
        what = f"the output differs from the untouched forward's by {error:.1e} of its largest"
    needed_bytes = _needed_bytes(call)
    if needed_bytes is None or step.room_bytes < needed_bytes:
        what += " (there was no room to see whether that repeats itself)"
    elif not repeats_itself(call):
        return noted(step, "the untouched forward's output differs from run to run")
    if Effect.ROUNDING not in step.plan.effects:
        warnings.warn(f"the plan is not exact: {what}", stacklevel=7)
    return noted(replace(step, plan=replace(step.plan, captured_effect=Effect.ROUNDING)), what)


def _fault(step: PlannedStep, call: UntouchedCall, what: str) -> CaptureError:
    """The error for a step whose first call differs; the forwards run once more for it."""
    name = type(call.model).__name__
    if not repeats_itself(call):
        return CaptureError(
            f"the untouched forward of {name} does not repeat itself, so that the planned one "
            'cannot be compared with it. Options(verify="none") runs the plan all the same.'
        )
    place = _first_difference(step, call)
    return UnfaithfulCapture(
        f"the planned forward of {name} is not the untouched one: {what} differs"
        f"{f', first in {place}' if place else ''}. Something is lost when it is captured; please "
        'report it. Options(verify="none") runs the plan all the same.'
    )


def _first_difference(step: PlannedStep, call: UntouchedCall) -> str:
    """The first module whose output is no tensor of the captured forward; "" if none."""
    with unchanged(call.model), torch.no_grad():
        known = _digests_of_forward(step, call)
    outputs: list[tuple[str, str]] = []

    modules = dict(call.model.named_modules())

    def look(name: str, args: object, kwargs: object, output: object) -> None:
        del args, kwargs
        leaves = [leaf for leaf in flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        kind = f"module {name!r} ({type(modules[name]).__name__})" if name else ""
        outputs.extend((kind, digest(leaf)) for leaf in leaves)

    with around_calls(modules, after=look), unchanged(call.model):
        forward_alone(call.model, call.sample)
    return next((kind for kind, found in outputs if found not in known), "")


def _digests_of_forward(step: PlannedStep, call: UntouchedCall) -> set[str]:
    """Digests of all tensors that the captured forward computes."""
    given = step.primals(call.state, call.sample)
    values: dict[fx.Node, Any] = {
        primal.node: tensor for primal, tensor in zip(step.given_primals, given, strict=True)
    }
    calls = [
        node
        for node in step.captured.graph.nodes
        if node.op == "call_function" and not is_backward(node)
    ]
    readers = Counter(source for node in calls for source in node.all_input_nodes)
    found: set[str] = set()
    for node in calls:
        if all(source in values for source in node.all_input_nodes):
            assert callable(node.target)
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            if "empty" not in str(node.target):  # its content is arbitrary
                found |= {digest(leaf) for leaf in tensors_of(values[node])}
            del args, kwargs
        for source in node.all_input_nodes:
            readers[source] -= 1
            if not readers[source]:
                values.pop(source, None)
    return found
