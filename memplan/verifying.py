"""The first call of each signature, compared with the untouched module's forward, bit by bit.

Values are compared by digests of their bytes, so that nothing of the untouched forward is kept
while the planned one runs. Autograd's graph of it is made, since modules may ask whether gradients
are enabled, and nothing is saved for a backward.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
from memplan.finished import Finished
from memplan.program import Phase
from memplan.rng import RandomStates, random_states, set_random_states
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
_CHUNK = 1 << 20
"""Elements that are read at a time."""


@dataclass(frozen=True)
class Outcome:
    """What a forward leaves behind.

    Attributes:
        outputs: a digest of each tensor that it returns, and what else it returns, as text.
        buffers: a digest of each, by FQN.
        random: the random states.
        attributes: names of those that it changes, and of each whether it seems to be set once.
    """

    outputs: tuple[str, ...]
    buffers: Mapping[str, str]
    random: RandomStates
    attributes: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, output: object) -> Outcome:
        """As it is now."""
        return cls(
            tuple(map(_leaf, flatten(output)[0])),
            {name: digest(buffer) for name, buffer in model.named_buffers()},
            random_states(),
        )

    def difference(self, other: Outcome) -> str:
        """What is not the same, in words; "" if nothing."""
        if self.outputs != other.outputs:
            return "its output"
        changed = [name for name, one in self.buffers.items() if other.buffers.get(name) != one]
        if changed:
            return f"buffer {changed[0]!r}"
        same = all(map(torch.equal, self.random, other.random))
        return "" if same else "torch's random state"


def is_due(asked: str, effects: Sequence[Effect]) -> bool:
    """Whether the first call of a plan is compared: not where its output is another by design."""
    return asked != "none" and not {Effect.STOCHASTIC, Effect.APPROXIMATE} & {*effects}


def digest(tensor: torch.Tensor) -> str:
    """Equal for tensors of equal shapes, dtypes and bits."""
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach()
    if not flat.is_contiguous() and flat.numel() > _CHUNK and flat.dim() > 1:
        for row in flat:  # no copy of the whole
            found.update(digest(row).encode())
        return found.hexdigest()
    for part in flat.reshape(-1).split(_CHUNK):  # type: ignore[no-untyped-call]
        plain = part.resolve_conj().resolve_neg().contiguous()
        found.update(memoryview(plain.view(torch.uint8).cpu().numpy()))
    return found.hexdigest()


def _leaf(leaf: object) -> str:
    return digest(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)


def untouched_forward(model: nn.Module, sample: Sample) -> Outcome:
    """What the untouched forward leaves behind; it leaves nothing.

    Raises:
        CaptureError: if it writes an input.
    """
    versions = [version_of(tensor) for tensor in sample.tensors()]
    with _unchanged(model) as changed, _saving_nothing():
        outcome = Outcome.of(model, model(*sample.args, **sample.kwargs))
    outcome = replace(outcome, attributes=changed)
    if versions != [version_of(tensor) for tensor in sample.tensors()]:
        raise CaptureError("the forward writes an input, and the captured one does not")
    return outcome


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
class Error:
    """How far two forwards are from each other.

    Attributes:
        relative: the largest difference of any entry over the largest entry; infinite where more
            than floats differ.
        allowed: what rounding explains.
    """

    relative: float
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it."""
        return self.relative <= self.allowed


def error_of(mine: Sequence[object], theirs: Sequence[object]) -> Error:
    """How far leaves of two outputs are from each other."""
    worst, allowed = 0.0, 0.0
    for one, other in zip(mine, theirs, strict=True):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            continue
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return Error(float("inf"), 0.0)
        if not one.is_floating_point() and not one.is_complex():
            worst = worst if torch.equal(one, other) else float("inf")
            continue
        allowed = max(allowed, torch.finfo(one.dtype).eps ** 0.5)
        if one.numel():
            worst = max(worst, _relative(one.detach(), other.detach()))
    return Error(worst, allowed)


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


def _relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest entry; infinite where one alone is no number."""
    is_same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    if bool(is_same.all()):
        return 0.0
    apart = float((mine - theirs)[~is_same].abs().max())
    scale = float(theirs.abs().nan_to_num(posinf=0.0).max())
    if not math.isfinite(apart):
        return math.inf
    return apart / scale if scale else apart


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
    """What the untouched forward takes above what is there, at most."""
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


def after(step: PlannedStep, call: Call, expected: Outcome | str, output: object) -> PlannedStep:
    """The step, compared: what its first call left behind is what was expected, or it is said.

    Raises:
        CaptureError: if it differs by more than rounding.
    """
    checked = replace(step, is_compared=True)
    if isinstance(expected, str):
        note = f"the first call was not compared with the untouched forward: {expected}"
        return replace(checked, plan=replace(step.plan, notes=(*step.plan.notes, note)))
    what = expected.difference(Outcome.of(call.model, output))
    if what:
        return _explained(checked, call, what)
    return _without_state(checked, call, expected) if expected.attributes else checked


def _without_state(step: PlannedStep, call: Call, expected: Outcome) -> PlannedStep:
    """A step whose untouched forward changes attributes: that is said, and must not matter.

    Raises:
        CaptureError: if what a call leaves behind changes the result of the next.
    """
    names = ", ".join(sorted(expected.attributes))
    with _unchanged(call.model), _saving_nothing():
        outcomes = []
        for _ in range(2):
            with _unchanged_tensors_of(call.model):
                outcomes.append(Outcome.of(call.model, call.untouched()).outputs)
    if outcomes[0] != outcomes[1]:
        raise CaptureError(
            f"what {type(call.model).__name__} returns depends on what the call before left in its "
            f"attributes ({names}), and a planned step leaves nothing there. Hand it from call to "
            "call as an input and an output, or keep it in a buffer."
        )
    is_said = any(difference.is_warned_of for difference in step.captured.differences)
    if not is_said and not all(expected.attributes.values()):
        warnings.warn(
            f"the forward changes attributes ({names}), and the plan does not", stacklevel=5
        )
    return step


def _explained(step: PlannedStep, call: Call, what: str) -> PlannedStep:
    """A step whose first call differed, with that said; the forwards run once more for it."""

    def untouched() -> list[Any]:
        with _unchanged(call.model), _saving_nothing():
            return _kept(call.untouched())

    theirs = untouched()
    if any(_leaf(one) != _leaf(other) for one, other in zip(theirs, untouched(), strict=True)):
        note = "the untouched forward's output differs from run to run"
        return replace(step, plan=replace(step.plan, notes=(*step.plan.notes, note)))
    with _unchanged(call.model), torch.no_grad():
        mine = _kept(step.run(call.state, call.sample, Finished()))
    error = error_of(mine, theirs)
    if not (what.startswith("its output") and error.is_rounding):
        place = _first_difference(step, call)
        raise CaptureError(
            f"the planned forward of {type(call.model).__name__} is not the untouched one: {what} "
            f"differs{f', first in {place}' if place else ''}. Something is lost when it is "
            'captured; please report it. Options(verify="none") runs the plan all the same.'
        )
    if error.relative == 0:  # zeros of another sign
        return step
    note = f"the output differs from the untouched forward's by {error.relative:.1e} of its largest"
    if Effect.ROUNDING not in step.plan.effects:
        warnings.warn(f"the plan is not exact: {note} entry", stacklevel=4)
    plan = replace(
        step.plan, notes=(*step.plan.notes, f"{note} entry"), captured_effect=Effect.ROUNDING
    )
    return replace(step, plan=plan)


def _kept(output: object) -> list[Any]:
    return [
        leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
        for leaf in flatten(output)[0]
    ]


def _first_difference(step: PlannedStep, call: Call) -> str:
    """The first module of which no tensor of the captured forward is the output; "" if none."""
    with _unchanged(call.model), torch.no_grad():
        known = _digests_of_forward(step, call.state, call.sample)
    outputs: list[tuple[str, str]] = []

    def look(name: str, child: nn.Module, output: object) -> None:
        leaves = [leaf for leaf in flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        kind = f"module {name!r} ({type(child).__name__})" if name else ""
        outputs.extend((kind, digest(leaf)) for leaf in leaves)

    with ExitStack() as stack, _unchanged(call.model), _saving_nothing():
        for name, child in call.model.named_modules():

            def hook(child: nn.Module, args: object, output: object, name: str = name) -> None:
                del args
                look(name, child, output)

            stack.callback(child.register_forward_hook(hook).remove)
        call.untouched()
    return next((kind for kind, found in outputs if found not in known), "")


def _digests_of_forward(step: PlannedStep, state: State, sample: Sample) -> set[str]:
    """Digests of all tensors that the captured forward makes."""
    captured = step.captured
    given = step.primals(state, sample)
    values: dict[fx.Node, Any] = {
        primal.node: tensor for primal, tensor in zip(step.given_primals, given, strict=True)
    }
    for node in captured.graph.nodes:
        if node.op != "call_function" or is_backward(node):
            continue
        if all(source in values for source in node.all_input_nodes):
            assert callable(node.target)
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return {digest(leaf) for one in values.values() for leaf in tensors_of(one)}
