"""Settings of ``optimize`` and ``plan`` that most users leave alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memplan.capture import Differentiable
from memplan.ir.program import Costs


@dataclass(frozen=True)
class Options:
    """Settings for planning.

    Attributes:
        device: the device to plan for, such as "h100" (see ``memplan.costs.DEVICES``); the model
            and sample may be anywhere, or without data. Such a plan is for reading: ``optimize``
            refuses it. None is the model's device.
        costs: "measured" runs each distinct op on its own, "auto" is measured where the tensors
            have data. "analytic" runs nothing, and knows no workspace: the budget then bounds all
            memory but what kernels allocate inside. Or ``Costs`` of one's own.
        on_infeasible: "raise" ``InfeasibleBudget``, or plan for the "smallest" feasible budget.
        cache_size: the number of signatures that a planned module remembers.
        differentiable_outputs: "all", or positions among the leaves of the output; None is the
            loss alone where there is exactly one.
        solver: "search" is fast and near the optimum. "exact" (extra ``exact``) goes on until the
            plan is proven the fastest within its budget among those that restore each op at most
            once, or ``solver_limit_s`` has passed; for steps of up to about a hundred ops.
        with_bound: prove how fast any plan within the budget can be: ``Plan.slowdown_bound`` (extra
            ``exact``).
        solver_limit_s: time limit for each of these proofs, in seconds.
        update_in_backward: update each parameter as soon as its gradient is complete, and free the
            gradient; the user's ``optimizer.step()`` then changes nothing. Exact for optimizers
            that treat parameters separately; others are refused, and so are clipping by the norm
            of all gradients, gradient accumulation and a GradScaler.
        fused: complete the gradients in the forward, each as soon as its inputs are there;
            ``loss.backward()`` then hands them on, times the gradient that arrives at the loss. For
            models with losses of their own inside, whose gradients do not meet: a part's
            activations are freed before the next part runs. The gradient that arrives must be a
            power of two, or one where gradients are in float16 or need not be linear in it; a
            second forward before the backward, and ``retain_graph``, are refused.
        verify: "forward" compares the first call of each signature with a forward of the untouched
            module: outputs, buffers and random states, bit by bit. Rounding is reported (a
            warning, and ``Plan.notes``); more is an error that names the module. Skipped, and
            reported in the notes, where it does not fit into the budget, or, without one, into
            what the captured step needs; and without a note where passes change the output by
            design. "step" compares gradients, too, before that call: where a whole step without a
            plan fits into the budget, if there is one, and neither ``update_in_backward`` nor
            ``fused`` is set. "none" does not compare.
    """

    device: str | None = None
    costs: Literal["auto", "measured", "analytic"] | Costs = "auto"
    on_infeasible: Literal["raise", "smallest"] = "raise"
    cache_size: int = 8
    differentiable_outputs: Differentiable = None
    solver: Literal["search", "exact"] = "search"
    with_bound: bool = False
    solver_limit_s: float = 60.0
    update_in_backward: bool = False
    fused: bool = False
    verify: Literal["forward", "step", "none"] = "forward"
