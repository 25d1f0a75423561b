"""The first call of each plan, compared with the untouched module's forward, bit by bit.

The untouched forward runs first, within the budget. Autograd's graph of it is made, since modules
may ask whether gradients are enabled, and nothing is saved for a backward.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import fx, nn

from memplan.capture import (
    tensors_of,
    unchanged_attributes,
    unchanged_randomness,
    without_data_of,
)
from memplan.costs import most_memory
from memplan.errors import CaptureError
from memplan.outcome import Outcome, digest, same_outputs
from memplan.program import Phase
from memplan.rng import random_states, set_random_states
from memplan.runtime import PlannedStep
from memplan.sample import Sample
from memplan.schedule import Effect
from memplan.signature import State
from memplan.torch_internals import (
    Following,
    flatten,
    is_backward,
    seeming_real,
    version_of,
    with_kernels,
    without_log_of_failures,
)
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")


def is_due(asked: str, effects: Sequence[Effect]) -> bool:
    """Whether the first call of a plan is compared: not where its output is another by design."""
    return asked != "none" and not {Effect.STOCHASTIC, Effect.APPROXIMATE} & {*effects}


def untouched_forward(model: nn.Module, sample: Sample) -> Outcome:
    """What the untouched forward leaves behind; it leaves nothing.

    Where it changes attributes, other than once as it seems, it also runs twice in a row.

    Raises:
        CaptureError: if it writes an input.
    """

    def once() -> Outcome:
        with _unchanged_tensors_of(model), _saving_nothing():
            return Outcome.of(model, model(*sample.args, **sample.kwargs))

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


@contextlib.contextmanager
def _unchanged_tensors_of(model: nn.Module) -> Iterator[None]:
    """Put back random states and buffers."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
        with torch.no_grad():
            for buffer, content in before:
                buffer.detach().copy_(content)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Put back what a forward changes: random states, buffers and attributes.

    Yields what ``unchanged_attributes`` does.
    """
    with unchanged_attributes(model) as changed, _unchanged_tensors_of(model):
        yield changed


@contextlib.contextmanager
def _saving_nothing() -> Iterator[None]:
    """Inside, autograd's graph is made, and keeps no tensors for a backward."""

    def nothing(tensor: torch.Tensor) -> None:
        del tensor

    def unused(packed: object) -> Any:
        raise AssertionError("there is no backward")

    with torch.autograd.graph.saved_tensors_hooks(nothing, unused):
        yield


@dataclass(frozen=True)
class Call:
    """A call of a planned module.

    Attributes:
        model: the module as it is without a plan.
        state: its tensors.
        sample: the inputs.
    """

    model: nn.Module
    state: State
    sample: Sample

    def untouched(self) -> Any:
        """What the module returns without a plan."""
        return self.model(*self.sample.args, **self.sample.kwargs)


def before(step: PlannedStep, call: Call) -> Outcome | str:
    """What the untouched forward leaves behind, or why it is not run."""
    primals = {primal.node for primal in step.captured.primals if primal.kind == "input"}
    written = {
        value
        for op in step.captured.program.ops
        if op.phase is Phase.FORWARD
        for value in op.mutates
    }
    if any(step.captured.storage[node] in written for node in primals):
        return "it writes its inputs"
    try:
        peak_bytes = _peak_bytes(call.model, call.sample) + step.captured.program.resident_bytes
    except Exception as error:  # whatever a forward without data may meet
        _LOG.debug("the untouched forward cannot be followed: %s", error)
        return "what it takes cannot be known without running it"
    plan = step.plan
    if peak_bytes > (plan.budget_bytes or max(plan.original_peak_bytes, plan.peak_bytes)):
        return f"that may take {format_bytes(peak_bytes)}"
    return untouched_forward(call.model, call.sample)


def _peak_bytes(model: nn.Module, sample: Sample) -> int:
    """What the untouched forward takes above what is there, at most; random states, 5 KB, apart."""
    copies = sum(buffer.untyped_storage().nbytes() for buffer in model.buffers())
    following = Following()
    with (
        unchanged_randomness(),
        unchanged_attributes(model),
        without_log_of_failures(),
        without_data_of(model, sample) as (given, _),
        _saving_nothing(),
        seeming_real(),
        following,
    ):
        output = model(*given.args, **given.kwargs)
        found = with_kernels(
            following.followed(),
            lambda call: most_memory(call).workspace_bytes,
            lambda call: most_memory(call).result_bytes,
        )
        del output
    return copies + max(accumulate((event.nbytes for event in found.events), initial=0))


def after(step: PlannedStep, call: Call, expected: Outcome | str, output: list[Any]) -> PlannedStep:
    """The step, compared: what its first call left behind is what was expected, or it is said.

    Args:
        step: the step.
        call: its first call.
        expected: what ``before`` found.
        output: what the call returned, alone in a list, which is emptied where it is of no use.

    Raises:
        CaptureError: if it differs by more than rounding.
    """
    checked = replace(step, is_compared=True)
    if isinstance(expected, str):
        return _noted(checked, f"the first call was not compared with the untouched: {expected}")
    found = Outcome.of(call.model, output[0])
    what = found.difference(expected)
    error = found.error(expected) if what == "its output" else 0.0
    if what and not (what == "its output" and error <= expected.rounding):
        output.clear()  # there is room then, and to look for the place nothing else is needed
        raise CaptureError(_fault(step, call, what))
    if not expected.is_steady:
        raise CaptureError(
            f"what {type(call.model).__name__} returns depends on what the call before left in its "
            f"attributes ({', '.join(expected.attributes)}), and a planned step leaves nothing "
            "there. Hand it from call to call as an input and an output, or keep it in a buffer."
        )
    _warn_of_state(step, expected)
    return _rounded(checked, call, error) if what else checked


def _noted(step: PlannedStep, note: str) -> PlannedStep:
    return replace(step, plan=replace(step.plan, notes=(*step.plan.notes, note)))


def _warn_of_state(step: PlannedStep, expected: Outcome) -> None:
    """Say what the untouched forward keeps in attributes, if the capture did not."""
    is_said = any(difference.is_warned_of for difference in step.captured.differences)
    if not is_said and not all(expected.attributes.values()):
        names = ", ".join(expected.attributes)
        warnings.warn(
            f"the forward changes attributes ({names}), and the plan does not", stacklevel=6
        )


def _rounded(step: PlannedStep, call: Call, error: float) -> PlannedStep:
    """A step whose output differs by rounding, with that said."""
    if error == 0:  # zeros of another sign, or entries of a large output that were not kept
        what = "the output differs from the untouched forward's, by less than could be seen"
    else:
        what = f"the output differs from the untouched forward's by {error:.1e} of its largest"
    if step.room_bytes < _peak_bytes(call.model, call.sample):
        what += " (there was no room to see whether that repeats itself)"
    elif not same_outputs([untouched_forward(call.model, call.sample) for _ in range(2)]):
        return _noted(step, "the untouched forward's output differs from run to run")
    if Effect.ROUNDING not in step.plan.effects:
        warnings.warn(f"the plan is not exact: {what}", stacklevel=6)
    return _noted(replace(step, plan=replace(step.plan, captured_effect=Effect.ROUNDING)), what)


def _fault(step: PlannedStep, call: Call, what: str) -> str:
    """What to say of a step whose first call was another; the forwards run once more for it."""
    name = type(call.model).__name__
    if not same_outputs([untouched_forward(call.model, call.sample) for _ in range(2)]):
        return (
            f"the untouched forward of {name} does not repeat itself, so that the planned one "
            'cannot be compared with it. Options(verify="none") runs the plan all the same.'
        )
    place = _first_difference(step, call)
    return (
        f"the planned forward of {name} is not the untouched one: {what} differs"
        f"{f', first in {place}' if place else ''}. Something is lost when it is captured; please "
        'report it. Options(verify="none") runs the plan all the same.'
    )


def _first_difference(step: PlannedStep, call: Call) -> str:
    """The first module of which no tensor of the captured forward is the output; "" if none."""
    with _unchanged(call.model), torch.no_grad():
        known = _digests_of_forward(step, call.state, call.sample)
    outputs: list[tuple[str, str]] = []

    def look(name: str, child: nn.Module, output: object) -> None:
        leaves = [leaf for leaf in flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        kind = f"module {name!r} ({type(child).__name__})" if name else ""
        outputs.extend((kind, digest(leaf)) for leaf in leaves)

    with contextlib.ExitStack() as stack, _unchanged(call.model), _saving_nothing():
        for name, child in call.model.named_modules():

            def hook(child: nn.Module, args: object, output: object, name: str = name) -> None:
                del args
                look(name, child, output)

            stack.callback(child.register_forward_hook(hook).remove)
        call.untouched()
    return next((kind for kind, found in outputs if found not in known), "")


def _digests_of_forward(step: PlannedStep, state: State, sample: Sample) -> set[str]:
    """Digests of all tensors that the captured forward makes."""
    given = step.primals(state, sample)
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
            if "empty" not in str(node.target):  # what is left there may be anyone's
                found |= {digest(leaf) for leaf in tensors_of(values[node])}
            del args, kwargs
        for source in node.all_input_nodes:
            readers[source] -= 1
            if not readers[source]:
                values.pop(source, None)
    return found
