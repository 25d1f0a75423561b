"""Whole steps, whose gradients are compared bit by bit before the first call of a plan.

Both steps backpropagate from every output that has a gradient, with ones for its entries. No hook
of a parameter runs, and nothing is left in ``.grad``.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from memplan.capture.sample import Sample
from memplan.errors import UnfaithfulCapture
from memplan.ir.schedule import Effect
from memplan.runtime.fused_gradients import PendingGradients
from memplan.runtime.outcome import Outcome
from memplan.runtime.step import PlannedStep, noted
from memplan.runtime.untouched import (
    Run,
    UntouchedCall,
    peak_bytes,
    repeats_itself,
    unchanged,
    untouched_outcome,
)
from memplan.torch_internals import flatten
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")


def compared(step: PlannedStep, call: UntouchedCall, finished: PendingGradients) -> PlannedStep:
    """The step: its gradients are the untouched module's, or a note says otherwise.

    Raises:
        UnfaithfulCapture: if they differ by more than rounding.
    """
    run = partial(_run, step)
    reason = _why_not(step, call, run)
    if reason:
        return noted(step, f"gradients were not compared with the untouched module's: {reason}")
    expected = untouched_outcome(call, run)
    with unchanged(call.model):
        output = step.run(call.state, call.sample, finished)
        found = Outcome.of(call.model, _gradients(step, output, call.model, call.sample))
        del output
    differing = found.differing(expected)
    if not differing:
        return step
    error = found.error(expected, by_all=True)
    what = f"the gradient of {_wanted(call.model, call.sample)[differing[0]][0]}"
    if not repeats_itself(call, run):
        return noted(step, f"{what} differs from run to run without a plan")
    if error > expected.rounding:
        raise UnfaithfulCapture(
            f"the planned step of {type(call.model).__name__} is not the untouched one: {what} "
            "differs. Something is lost when it is captured; please report it. "
            'Options(verify="none") runs the plan all the same.'
        )
    said = f"{what} differs from the untouched module's by {error:.1e} of the largest of all"
    if Effect.ROUNDING not in step.plan.effects:
        warnings.warn(f"the plan is not exact: {said}", stacklevel=8)
    rounding = replace(step, plan=replace(step.plan, captured_effect=Effect.ROUNDING))
    return noted(rounding, said)


def _why_not(step: PlannedStep, call: UntouchedCall, run: Run) -> str:
    """The reason why gradients cannot be compared; "" if they can."""
    if step.in_backward is not None or step.is_fused:
        return "they are used up, or made, while the step runs"
    if step.emitted.accumulated:
        return "there are some that the step adds to"
    budget_bytes = step.plan.budget_bytes
    if budget_bytes is None:
        return ""
    try:
        needed_bytes = peak_bytes(call, run) + step.captured.program.resident_bytes
    except Exception as error:  # a step without data may raise anything
        _LOG.debug("the untouched step cannot be followed: %s", error)
        return "what its step takes cannot be known without running it"
    is_too_much = needed_bytes > budget_bytes
    return f"its step may take {format_bytes(needed_bytes)}" if is_too_much else ""


def _run(step: PlannedStep, model: nn.Module, sample: Sample) -> list[torch.Tensor | None]:
    return _gradients(step, model(*sample.args, **sample.kwargs), model, sample)


def _gradients(
    step: PlannedStep, output: object, model: nn.Module, sample: Sample
) -> list[torch.Tensor | None]:
    """Gradients of parameters, then of inputs, from the plan's differentiable outputs."""
    pairs = zip(step.captured.output.leaves, flatten(output)[0], strict=True)
    sources = [made for leaf, made in pairs if leaf.position in step.emitted.tangents]
    wanted = [tensor for _, tensor in _wanted(model, sample)]
    ones = [torch.ones_like(source) for source in sources]
    return list(torch.autograd.grad(sources, wanted, ones, allow_unused=True))


def _wanted(model: nn.Module, sample: Sample) -> list[tuple[str, torch.Tensor]]:
    """The tensors that get a gradient, with their names."""
    inputs = [(f"input {place}", one) for place, one in enumerate(sample.tensors())]
    named = [(repr(name), one) for name, one in model.named_parameters()] + inputs
    return [(name, tensor) for name, tensor in named if tensor.requires_grad]
