"""From a module and a sample to a step that can be planned: captured, rewritten, priced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from memplan.capture import ONE_AT_A_TIME, Captured, Traced, rewrite, trace, update_in_backward
from memplan.changing import ChangedModel, changing
from memplan.collector import paused_collector
from memplan.describing import Original, describe_original, describe_plan
from memplan.fusing import fused
from memplan.plan import PassRecord, Plan
from memplan.predicting import predicted_trace
from memplan.pricing import Pricing, offers
from memplan.program import Costs
from memplan.request import Request
from memplan.sample import Sample
from memplan.schedule import Catalog, Effect, Recovery, Schedule
from memplan.timeline import tangent_bytes
from memplan.trace import MemoryTrace
from memplan.units import Budget, format_bytes

_LOG = logging.getLogger("memplan")


@dataclass(frozen=True)
class Prepared:
    """A step that was captured and priced, and can be planned.

    Attributes:
        captured: with what the passes made of it.
        recoveries: what the passes offer.
        costs: of every op that may run.
        unplanned: peak and time of the captured step, no pass taken part.
        describe: makes a plan of a schedule.
        unplanned_trace: what the captured step will leave, no pass taken part.
        device: what it is planned for.
        without_optional: the same without what optional passes rewrote; None if that is nothing.
    """

    captured: Captured
    recoveries: tuple[Recovery, ...]
    costs: Costs
    unplanned: Original
    describe: Callable[..., Plan]
    unplanned_trace: Callable[[], MemoryTrace]
    device: str
    without_optional: Callable[[], Prepared] | None = None

    def trace(self, schedule: Schedule) -> MemoryTrace:
        """What a schedule will leave."""
        program = self.captured.program
        catalog = Catalog.of(program, self.recoveries)
        return predicted_trace(program, catalog, schedule, self.costs, self.device)

    def resolve(self, budget: Budget | None) -> int | None:
        """A budget in bytes."""
        resident_bytes = self.captured.program.resident_bytes
        if budget is None:
            return None
        return budget.resolve(resident_bytes, self.unplanned.peak_bytes)


@paused_collector()
def prepare(model: nn.Module, sample: Sample, request: Request) -> Prepared:
    """Capture a step, let the passes at it, and price every op. The model is as before."""
    _LOG.debug("capturing %s", type(model).__name__)
    with ONE_AT_A_TIME, changing(model, sample, request.passes) as changed:
        return _prepare(changed.model, sample, request.with_optimizer_of(changed.model))


def _prepare(model: nn.Module, sample: Sample, request: Request) -> Prepared:
    pricing = Pricing.of(model, sample, request.options)
    is_cuda = pricing.device is not None and pricing.device.is_cuda
    look = partial(model.look, sample) if isinstance(model, ChangedModel) else None
    outputs = request.options.differentiable_outputs
    traced = pricing.as_run(partial(trace, model, sample, outputs, is_cuda, look))
    if request.optimizer is not None:
        in_backward = request.in_backward is not None
        pricing = pricing.with_optimizer(model, traced, request.optimizer, in_backward=in_backward)
    finish = partial(_finish, pricing, pricing.price(pricing.read(traced)))
    plain = replace(request, passes=tuple(one for one in request.passes if not one.is_optional))
    rewritten = _rewritten(traced, request)
    step = finish(rewritten, request)
    if len(plain.passes) == len(request.passes):
        return step
    without = _rewritten(traced, plain)
    if _targets(without) == _targets(rewritten):
        return step
    return replace(step, without_optional=partial(finish, without, plain))


def _targets(traced: Traced) -> list[object]:
    return [node.target for node in traced.joint.graph.nodes]


def _finish(
    pricing: Pricing,
    priced: tuple[Captured, Costs],
    changed: Traced,
    request: Request,
) -> Prepared:
    """Offer and price what the passes made of a trace, which was ``priced`` as it was."""
    original, original_costs = priced
    unplanned = describe_original(original.program, original_costs)
    rewritten = pricing.read(changed)
    recoveries = offers(rewritten, request.passes)
    captured, costs = pricing.price(rewritten, recoveries)
    is_rounded = any(difference.is_certain for difference in captured.differences)
    describe = partial(
        describe_plan,
        captured.program,
        recoveries,
        costs,
        original=unplanned,
        gradients={
            captured.primals[position].name: captured.storage[node]
            for position, node in captured.gradients
            if captured.primals[position].kind == "parameter"
        },
        passes=tuple(PassRecord(p.name, p.arguments, p.effect) for p in request.passes),
        captured_effect=Effect.ROUNDING if is_rounded else Effect.EXACT,
        notes=[
            *(difference.reason for difference in captured.differences),
            *_held_gradients(captured),
            *(note for one in request.passes if one.notes for note in one.notes(captured)),
        ],
    )
    device = str(original.device) if pricing.device is None else pricing.device.name
    unplanned_trace = partial(
        predicted_trace,
        original.program,
        Catalog.of(original.program, ()),
        unplanned.schedule,
        original_costs,
        device,
    )
    return Prepared(captured, recoveries, costs, unplanned, describe, unplanned_trace, device)


def _held_gradients(captured: Captured) -> list[str]:
    """What to say of a gradient that arrives from outside and stays to the end of the backward."""
    if all(node.meta["val"].dim() == 0 for _, node in captured.tangents):
        return []
    held = format_bytes(tangent_bytes(captured.program))
    return [
        f"the gradient that arrives at the output ({held}) is alive through the whole planned "
        "backward, and ends early in the untouched module's: return the loss from the module "
        "(memplan.WithLoss)"
    ]


def _rewritten(traced: Traced, request: Request) -> Traced:
    """What the passes make of a trace."""
    rewrites = [one.rewrite_joint for one in request.passes if one.rewrite_joint is not None]
    rewritten = rewrite(traced, rewrites)
    if request.options.fused:
        return fused(traced, rewritten)
    return rewritten if request.in_backward is None else update_in_backward(rewritten)
