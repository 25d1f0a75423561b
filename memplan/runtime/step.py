"""One emitted step, run as a node of autograd's graph."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from memplan.capture import Captured, Primal
from memplan.capture.sample import Sample
from memplan.emit.emit import Emitted
from memplan.errors import CaptureError, PlanMismatch
from memplan.ir.liveness import ScheduledStep, tangent_bytes
from memplan.ir.memory_trace import MemoryTrace
from memplan.ir.predicted_trace import predicted_trace
from memplan.ir.program import Costs
from memplan.ir.schedule import Recovery
from memplan.optimizer import InBackward
from memplan.planner.plan import Plan
from memplan.runtime.fused_gradients import Pending, PendingGradients, check_not_retained, scale
from memplan.runtime.gradient_sums import existing_gradients, summed, warn_of_other_order
from memplan.runtime.signature import State
from memplan.torch_internals import (
    backward_keeps_graph,
    exchanges_gradients,
    is_under_autocast,
    unflatten,
    version_of,
    without_autocast,
)


@dataclass(frozen=True)
class PlannedStep:
    """A step captured, planned and emitted for one signature.

    Attributes:
        captured: the program and the joint graph.
        recoveries: those that the passes offered.
        costs: of every op that may run.
        emitted: the two functions.
        plan: what was decided.
        in_backward: what updates parameters in the backward, or None.
        compares: what its next call is to compare with the untouched module's: "forward", "step",
            or "none" where that was done, or need not be.
    """

    captured: Captured
    recoveries: tuple[Recovery, ...]
    costs: Costs
    emitted: Emitted
    plan: Plan
    in_backward: InBackward | None = None
    compares: str = "none"

    @property
    def scheduled(self) -> ScheduledStep:
        """The program and its schedule, with their account."""
        return ScheduledStep(self.captured.program, self.recoveries, self.costs, self.plan.schedule)

    @cached_property
    def room_bytes(self) -> int:
        """The bytes below the plan's peak that are free when the backward is called."""
        program = self.captured.program
        timeline = self.scheduled.timeline
        last = len(self.plan.schedule.forward)
        before = [moment for moment in timeline.moments if moment.step < last]
        live = before[-1].live_bytes if before else program.resident_bytes
        return max(0, self.plan.peak_bytes - live - 2 * tangent_bytes(program))

    @property
    def trace(self) -> MemoryTrace:
        """The predicted memory trace of the step, block by block."""
        return predicted_trace(self.scheduled, str(self.captured.device))

    def holds(self, state: State, sample: Sample) -> bool:
        """Tell whether all that the captured forward read, and branched on, is the same here."""
        captured = self.captured
        return all(attribute.holds() for attribute in captured.attributes) and (
            not captured.decisions
            or all(one.holds(sample.tensors(), state.buffers) for one in captured.decisions)
        )

    @cached_property
    def summed(self) -> tuple[int, ...]:
        """Positions of the parameters whose gradients are sums."""
        return summed(self.captured)

    @property
    def is_fused(self) -> bool:
        """Tell whether its gradients are finished in the forward."""
        return self.captured.program.num_fused is not None

    def run(self, state: State, sample: Sample, finished: PendingGradients) -> Any:
        """Run the forward; its result has the structure of the module's output.

        Raises:
            PlanMismatch: if the step is fused and finished gradients of another are waiting.
        """
        if not self.is_fused:
            return self._run(state, sample, None)
        with finished.waiting() as pending:
            return self._run(state, sample, pending)

    def _run(self, state: State, sample: Sample, pending: Pending | None) -> Any:
        primals = self.primals(state, sample)
        # Tensors without a gradient are no inputs of the node, or autograd would run their hooks.
        differentiable = [primals[position] for position in self.emitted.differentiable]
        # Processes that exchange gradients wait for those of all parameters.
        unused = self._unused(state) if exchanges_gradients() else []
        # Outputs that autograd's graph leads to have a node, even where every gradient is None.
        unused += [] if differentiable else self._led_from(primals)
        results = _PlannedFunction.apply(self, primals, pending, *differentiable, *unused)  # type: ignore[no-untyped-call]
        outputs = [
            results[slot] if slot >= 0 else primals[~slot] for slot in self.emitted.output_slots
        ]
        leaves = [
            leaf.constant if leaf.position is None else outputs[leaf.position]
            for leaf in self.captured.output.leaves
        ]
        return unflatten(leaves, self.captured.output.spec)

    @staticmethod
    def _unused(state: State) -> list[torch.Tensor]:
        """Trained parameters that have no part in this call."""
        unused = (state.parameters[name] for name in sorted(state.choice.unused))
        return [parameter for parameter in unused if parameter.requires_grad]

    def _led_from(self, primals: list[torch.Tensor]) -> list[torch.Tensor]:
        """The primals that the autograd graph of an output leads to."""
        reached = {key for keys in self.captured.output.leads_to.values() for key in keys}
        return [
            tensor
            for primal, tensor in zip(self.given_primals, primals, strict=True)
            if (primal.index if primal.kind == "input" else primal.name) in reached
        ]

    @property
    def given_primals(self) -> tuple[Primal, ...]:
        """The primals that a call passes in: all but existing gradients."""
        return tuple(one for one in self.captured.primals if one.kind != "gradient")

    def primals(self, state: State, sample: Sample) -> list[torch.Tensor]:
        """The tensors of ``given_primals``."""
        tensors = sample.tensors()
        by_kind = {
            "parameter": state.parameters,
            "buffer": state.buffers,
            "constant": self.captured.constants,
        }
        return [
            tensors[primal.index] if primal.kind == "input" else by_kind[primal.kind][primal.name]
            for primal in self.given_primals
        ]

    def incoming(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """The tangents of the backward, from the gradients that autograd passes to the outputs.

        Raises:
            PlanMismatch: if a gradient arrives at an output that the plan is not for.
        """
        expected = {self.emitted.output_slots[output] for output in self.emitted.tangents}
        for slot, gradient in enumerate(gradients):
            if gradient is not None and slot not in expected:
                raise PlanMismatch(
                    "a gradient arrives at an output other than the loss, which this plan "
                    "computes nothing for. Backpropagate from the loss that the module returns, "
                    'or plan with Options(differentiable_outputs="all").'
                )
        tangents = []
        for output, placeholder in self.captured.tangents:
            like = placeholder.meta["val"]
            gradient = gradients[self.emitted.output_slots[output]]
            if gradient is None:
                gradient = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            if gradient.stride() != like.stride():
                layout = torch.empty_strided(
                    like.shape, like.stride(), dtype=like.dtype, device=like.device
                )
                gradient = layout.copy_(gradient)
            tangents.append(gradient)
        return tangents

    def _arrived(self, incoming: Sequence[torch.Tensor | None]) -> frozenset[int]:
        """The outputs that a gradient arrives at."""
        slots = self.emitted.output_slots
        tangents = self.emitted.tangents
        return frozenset(output for output in tangents if incoming[slots[output]] is not None)

    def gradients(
        self, results: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The gradient of each differentiable primal; None where eager has none."""
        emitted, arrived = self.emitted, self._arrived(incoming)
        made = {
            position: result if sources & arrived else None
            for position, result, sources in zip(
                emitted.gradient_primals, results, emitted.gradient_sources, strict=True
            )
        }
        return [made.get(position) for position in emitted.differentiable]

    def check_sources(self, incoming: Sequence[torch.Tensor | None]) -> None:
        """Check that the gradients that arrive determine the results.

        Raises:
            PlanMismatch: if a result may have a part that belongs to an output at which no gradient
                arrives, whatever would arrive there.
        """
        arrived = self._arrived(incoming)
        pairs = zip(self.emitted.gradient_sources, self.emitted.ignored_sources, strict=True)
        if any(sources & arrived and not ignored <= arrived for sources, ignored in pairs):
            raise PlanMismatch(
                "the backward comes from some of the module's outputs alone, and a gradient has a "
                "part that does not depend on what arrives at the others (a backward that ignores "
                "its argument). Backpropagate from all outputs together, or name those that are: "
                "Options(differentiable_outputs=...)"
            )

    def check_unwritten(self, versions: Sequence[tuple[weakref.ref[torch.Tensor], int]]) -> None:
        """Check that nothing that the backward reads was written.

        Raises:
            PlanMismatch: naming what was written.
        """
        for position, (reference, version) in zip(
            self.emitted.backward_primals, versions, strict=True
        ):
            tensor = reference()
            if tensor is not None and version_of(tensor) != version:
                primal = self.captured.primals[position]
                what = f"input {primal.index}" if primal.kind == "input" else repr(primal.name)
                raise PlanMismatch(
                    f"{what} (shape {tuple(tensor.shape)}) was written between the forward and the "
                    "backward, which reads it again: to compute gradients, or what the forward "
                    "made and did not keep. Write it after the backward, or pass a copy."
                )

    def start_updates(
        self,
        parameters: Sequence[torch.Tensor],
        tangents: Sequence[torch.Tensor],
        incoming: Sequence[torch.Tensor | None],
    ) -> None:
        """Check that this backward may update the parameters, and start.

        Raises:
            PlanMismatch: saying why not.
        """
        if self.in_backward is None:
            return
        if backward_keeps_graph():
            raise PlanMismatch(
                "retain_graph=True asks for another backward of parameters that this one updates; "
                "leave Options(update_in_backward=True) out"
            )
        if len(self._arrived(incoming)) < len(self.emitted.tangents):
            raise PlanMismatch(
                "the backward comes from some of the module's outputs alone, and would update "
                "what only the others depend on; leave Options(update_in_backward=True) out"
            )
        is_loss = self.captured.output.is_loss
        self.in_backward.start(parameters, tangents if is_loss else ())


def noted(step: PlannedStep, note: str) -> PlannedStep:
    """A step with one more note in its plan."""
    return replace(step, plan=replace(step.plan, notes=(*step.plan.notes, note)))


def check_emitted(step: PlannedStep) -> None:
    """Refuse a step whose outputs autograd cannot tell apart.

    Raises:
        CaptureError: if two outputs that take gradients are one tensor.
    """
    slots = [step.emitted.output_slots[output] for output in step.emitted.tangents]
    if len(set(slots)) < len(slots) or any(slot < 0 for slot in slots):
        raise CaptureError(
            "the module returns one tensor in two places, or an input, and gradients arrive "
            "there; return it once, or return the loss"
        )


class _PlannedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        step: PlannedStep,
        primals: list[torch.Tensor],
        pending: Pending | None,
        *differentiable: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        # primals and unused parameters, listed so that autograd sees them
        ctx.num_unused = len(differentiable) - len(step.emitted.differentiable)
        emitted = step.emitted
        with without_autocast():
            results = emitted.forward([primals[position] for position in emitted.forward_primals])
        outputs = results[: emitted.num_outputs]
        ctx.step = step
        ctx.kept = results[emitted.num_outputs :][: emitted.num_saved]
        ctx.pending = pending
        ctx.accumulated = [primals[position] for position in emitted.accumulated]
        ctx.summed = [primals[position] for position in step.summed]
        ctx.updated = [primals[position] for position in emitted.updated]
        ctx.set_materialize_grads(False)
        saved = [primals[position] for position in emitted.backward_primals]
        ctx.save_for_backward(*saved)
        ctx.versions = [(weakref.ref(tensor), version_of(tensor)) for tensor in saved]
        needs = {
            slot
            for slot, required in zip(
                emitted.output_slots, step.captured.output.requires_grad, strict=True
            )
            if required
        }
        ctx.mark_non_differentiable(
            *(output for slot, output in enumerate(outputs) if slot not in needs)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        step: PlannedStep = ctx.step
        if torch.is_grad_enabled():
            raise PlanMismatch(
                "create_graph=True asks for a backward that can be differentiated, which a "
                "planned step does not have. Use the untouched module: planned.original."
            )
        if is_under_autocast():
            raise PlanMismatch(
                "backward() is called inside autocast, where its ops would be cast too; torch "
                "advises against it. Close the autocast context after the forward."
            )
        step.check_unwritten(ctx.versions)
        primals = ctx.saved_tensors
        if ctx.kept is None:
            raise RuntimeError(
                "trying to backward through a planned step a second time; what it saved is freed. "
                "Call backward(retain_graph=True) the first time."
            )
        step.check_sources(gradients)
        warn_of_other_order(ctx.summed)
        tangents = step.incoming(gradients)
        step.start_updates(ctx.updated, tangents, gradients)
        kept = list(ctx.kept)
        if step.is_fused:
            check_not_retained()
            gradients_made = [kept[position] for position in step.emitted.finished]
            scale(gradients_made, tangents[0], step.room_bytes, step.captured.needs_one)
            del gradients_made
            ctx.pending = None
        if backward_keeps_graph():
            for position in step.emitted.overwritten:
                kept[position] = kept[position].clone()
            warnings.warn(
                "retain_graph=True keeps what a planned step saved to the end of its backward; "
                "its peak may be above the plan's",
                stacklevel=2,
            )
        else:
            ctx.kept = None
        arguments = [*kept, *primals, *tangents, *existing_gradients(ctx.accumulated)]
        del kept
        results = step.emitted.backward(arguments)
        if step.in_backward is not None:
            step.in_backward.finish()
        unused = [None] * ctx.num_unused
        return (None, None, None, *step.gradients(results, gradients), *unused)
