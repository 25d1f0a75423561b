"""Lowering of a module and a sample to a step that can be planned: captured, rewritten, priced."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice

from memplan.capture import ONE_AT_A_TIME, Captured, Traced, rewrite, trace, update_in_backward
from memplan.capture.sample import Sample
from memplan.compiler.fused_order import fused
from memplan.compiler.pricing import Pricing, offers
from memplan.compiler.request import Request
from memplan.gc_pause import paused_collector
from memplan.ir.liveness import ScheduledStep, tangent_bytes
from memplan.ir.memory_trace import MemoryTrace
from memplan.ir.predicted_trace import predicted_trace
from memplan.ir.program import Costs
from memplan.ir.schedule import Effect, Recovery, Schedule
from memplan.planner.plan import PassRecord, Plan
from memplan.planner.summarize import describe_plan, unplanned_step
from memplan.transforms.apply import Changed, ChangedModel
from memplan.transforms.passes import Pass
from memplan.units import Budget, format_bytes

_LOG = logging.getLogger("memplan")


@dataclass(frozen=True)
class PricedTrace:
    """A traced step, with its costs.

    Attributes:
        traced: the joint graph.
        pricing: how ops are priced.
        captured: the trace as a program.
        costs: of its ops.
        unplanned: the step with everything kept.
    """

    traced: Traced
    pricing: Pricing
    captured: Captured
    costs: Costs
    unplanned: ScheduledStep

    @property
    def device(self) -> str:
        """The device that the step is planned for."""
        device = self.pricing.device
        return str(self.captured.device) if device is None else device.name


@dataclass(frozen=True)
class LoweredStep:
    """A captured, rewritten and priced step that can be planned.

    Attributes:
        unplanned: the step as it was traced, everything kept.
        device: the device that it is planned for.
        captured: the step as the passes rewrote it.
        recoveries: those that the passes offer.
        costs: of every op that may run.
        passes: the passes.
    """

    unplanned: ScheduledStep
    device: str
    captured: Captured
    recoveries: tuple[Recovery, ...]
    costs: Costs
    passes: tuple[Pass, ...]

    def scheduled(self, schedule: Schedule) -> ScheduledStep:
        """The step as a schedule runs it."""
        return ScheduledStep(self.captured.program, self.recoveries, self.costs, schedule)

    def trace(self, schedule: Schedule) -> MemoryTrace:
        """The predicted memory trace of a schedule."""
        return predicted_trace(self.scheduled(schedule), self.device)

    def unplanned_trace(self) -> MemoryTrace:
        """The predicted memory trace of the captured step, without passes."""
        return predicted_trace(self.unplanned, self.device)

    def resolve(self, budget: Budget | None) -> int | None:
        """A budget in bytes."""
        resident_bytes = self.captured.program.resident_bytes
        if budget is None:
            return None
        return budget.resolve(resident_bytes, self.unplanned.peak_bytes)

    def describe(self, schedule: Schedule, *, budget_bytes: int | None) -> Plan:
        """The plan that runs a schedule."""
        captured = self.captured
        is_rounded = any(difference.is_certain for difference in captured.differences)
        return describe_plan(
            self.scheduled(schedule),
            original=self.unplanned,
            budget_bytes=budget_bytes,
            gradients={
                captured.primals[position].name: captured.storage[node]
                for position, node in captured.gradients
                if captured.primals[position].kind == "parameter"
            },
            passes=tuple(PassRecord(p.name, p.arguments, p.effect) for p in self.passes),
            captured_effect=Effect.ROUNDING if is_rounded else Effect.EXACT,
            notes=self.notes,
        )

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Notes on the step that hold for every schedule."""
        captured = self.captured
        return (
            *(difference.reason for difference in captured.differences),
            *_held_gradients(captured),
            *(note for one in self.passes if one.notes for note in one.notes(captured)),
        )


@paused_collector()
def trace_and_price(changed: Changed, sample: Sample, request: Request) -> PricedTrace:
    """Capture the step of a model that passes have changed, and price every op.

    The model is left unchanged.
    """
    model = changed.model
    _LOG.debug("capturing %s", type(model).__name__)
    with ONE_AT_A_TIME:
        pricing = Pricing.of(model, sample, request.options)
        is_cuda = pricing.device is not None and pricing.device.is_cuda
        look = partial(model.look, sample) if isinstance(model, ChangedModel) else None
        outputs = request.options.differentiable_outputs
        traced = pricing.as_run(partial(trace, model, sample, outputs, is_cuda, look))
        if request.optimizer is not None:
            in_backward = request.in_backward is not None
            pricing = pricing.with_optimizer(
                model, traced, request.optimizer, in_backward=in_backward
            )
        captured, costs = pricing.price(pricing.read(traced))
    unplanned = unplanned_step(captured.program, costs)
    return PricedTrace(traced, pricing, captured, costs, unplanned)


def rewrite_and_offer(original: PricedTrace, request: Request) -> Iterator[LoweredStep]:
    """The step as all passes rewrite it; then, where that differs, without the optional ones."""
    rewritten = _rewritten(original.traced, request)
    yield _offered(original, rewritten, request.passes)
    plain = tuple(one for one in request.passes if not one.is_optional)
    if len(plain) == len(request.passes):
        return
    without = _rewritten(original.traced, replace(request, passes=plain))
    if _targets(without) != _targets(rewritten):
        yield _offered(original, without, plain)


def lower(changed: Changed, sample: Sample, request: Request) -> LoweredStep:
    """The step of a model that passes have changed, as all of them rewrite it."""
    return next(rewrite_and_offer(trace_and_price(changed, sample, request), request))


def lower_each(changed: Changed, sample: Sample, request: Request) -> tuple[LoweredStep, ...]:
    """The same, then without optional passes' rewrites; a saved plan is for the first."""
    steps = rewrite_and_offer(trace_and_price(changed, sample, request), request)
    return tuple(steps if request.plan is None else islice(steps, 1))


@paused_collector()
def _offered(original: PricedTrace, changed: Traced, passes: tuple[Pass, ...]) -> LoweredStep:
    """Let passes offer recoveries for the trace that they rewrote, and price all."""
    pricing = original.pricing
    with ONE_AT_A_TIME:
        rewritten, offered = offers(pricing.read(changed), passes)
        captured, recoveries, costs = pricing.price_offered(rewritten, offered)
    return LoweredStep(original.unplanned, original.device, captured, recoveries, costs, passes)


def _targets(traced: Traced) -> list[object]:
    return [node.target for node in traced.joint.graph.nodes]


def _held_gradients(captured: Captured) -> list[str]:
    """Note on a gradient that arrives from outside and is alive to the end of the backward."""
    if all(node.meta["val"].dim() == 0 for _, node in captured.tangents):
        return []
    held = format_bytes(tangent_bytes(captured.program))
    return [
        f"the gradient that arrives at the output ({held}) is alive through the whole planned "
        "backward, and ends early in the untouched module's: return the loss from the module "
        "(memplan.WithLoss)"
    ]


def _rewritten(traced: Traced, request: Request) -> Traced:
    """The trace as the passes rewrite it."""
    rewrites = [one.rewrite_joint for one in request.passes if one.rewrite_joint is not None]
    with ONE_AT_A_TIME:
        rewritten = rewrite(traced, rewrites)
        if request.options.fused:
            return fused(traced, rewritten)
        return rewritten if request.in_backward is None else update_in_backward(rewritten)
