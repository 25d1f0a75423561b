"""``optimize``, ``plan``, ``frontier``: passes change the model, and steps are built for it.

The build of one step, from the trace to the code that runs, is in ``compiler.build``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn

from memplan.capture import ONE_AT_A_TIME
from memplan.capture.sample import Sample
from memplan.compiler.autosize import fitted, make_plan
from memplan.compiler.build import build_step
from memplan.compiler.lower import lower
from memplan.compiler.request import make_request
from memplan.errors import MemplanError
from memplan.options import Options
from memplan.planner import frontier as find_frontier
from memplan.planner.plan import Plan
from memplan.runtime.module import PlannedModule
from memplan.transforms.apply import changing
from memplan.transforms.passes import Pass


def optimize(
    model: nn.Module,
    sample: object = None,
    *,
    budget: int | str | None = None,
    max_slowdown: float | None = None,
    passes: Iterable[Pass] = (),
    default_passes: bool = True,
    optimizer: object = None,
    plan: Plan | None = None,
    options: Options | None = None,
) -> PlannedModule:
    """Make a module that trains as ``model`` does, within a budget of memory.

    Args:
        model: the module; its output must include the loss for the logits to be inside the plan
            (see ``WithLoss``). It stays usable, and shares its parameters with the result.
        sample: one batch. A mapping is keyword arguments, a tuple or list positional ones,
            anything else the only argument. If omitted, planning happens at the first call.
        budget: hard bound on the peak of the whole step: "6GiB", 6_000_000_000, or "50%" of what
            the step needs above its resident bytes.
        max_slowdown: bound on predicted time over the unplanned step's; without a budget, the
            least memory within it. Neither: all savings that are free.
        passes: techniques to add to the EXACT defaults.
        default_passes: False leaves the defaults out.
        optimizer: the budget then covers its state and update too: one over
            ``model.parameters()``, or a callable that makes one, available as
            ``planned.optimizer``. None: the step is forward and backward.
        plan: a saved plan to apply; excludes budget, max_slowdown and passes.
        options: further settings.

    Returns:
        A module with the model's parameters, whose calls run the plan.

    Raises:
        UnitsError, CaptureError, InfeasibleBudget, PlanMismatch: each says what to do.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.ReLU())]
        >>> model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> planned = memplan.optimize(model, batch, budget="80%")
        >>> planned.plan.peak_bytes <= planned.plan.budget_bytes
        True
        >>> planned(*batch).backward()
    """
    request = make_request(
        model,
        budget=budget,
        max_slowdown=max_slowdown,
        passes=passes,
        default_passes=default_passes,
        optimizer=optimizer,
        plan=plan,
        options=options,
    )
    batch = None if sample is None else Sample.of(sample)
    request = fitted(model, batch, request)
    with changing(model, batch, request.passes, is_lasting=True) as changed:
        request = request.with_optimizer_of(changed.model)
        build = partial(build_step, request=request)
        planned = PlannedModule(
            model, build, request.options.cache_size, request.optimizer, changed
        )
        if batch is not None:
            planned.prepare(batch)
    return planned


def plan(
    model: nn.Module,
    sample: object,
    *,
    budget: int | str | None = None,
    max_slowdown: float | None = None,
    passes: Iterable[Pass] = (),
    default_passes: bool = True,
    optimizer: object = None,
    options: Options | None = None,
) -> Plan:
    """Make the plan that ``optimize`` would run, with the same arguments. Never runs the model.

    Returns:
        The plan: its predictions, and the schedule behind them.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.ReLU())]
        >>> model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> plan = memplan.plan(model, batch, budget="80%")
        >>> plan.num_restores > 0 and plan.peak_bytes < plan.original_peak_bytes
        True
    """
    request = make_request(
        model,
        budget=budget,
        max_slowdown=max_slowdown,
        passes=passes,
        default_passes=default_passes,
        optimizer=optimizer,
        options=options,
    )
    return make_plan(model, Sample.of(sample), request)[1]


def frontier(
    model: nn.Module,
    sample: object,
    *,
    points: int = 20,
    passes: Iterable[Pass] = (),
    default_passes: bool = True,
    optimizer: object = None,
    options: Options | None = None,
) -> list[Plan]:
    """Tell what memory costs in time: plans by ascending peak and falling slowdown.

    Budgets are spread evenly from the smallest feasible one to the captured step's peak. Other
    arguments are those of ``plan``. Never runs the model.

    Args:
        model: the module.
        sample: one batch.
        points: number of budgets to plan for; fewer plans are returned where one serves several.
        passes: techniques to add to the EXACT defaults.
        default_passes: False leaves the defaults out.
        optimizer: its state and update are part of the step.
        options: further settings.

    Returns:
        Plans by ascending peak; the last is the unplanned step's.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.ReLU())]
        >>> model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> plans = memplan.frontier(model, batch, points=4)
        >>> plans[0].peak_bytes < plans[-1].peak_bytes and plans[0].slowdown > plans[-1].slowdown
        True
    """
    if points < 2:
        raise MemplanError(f"a frontier has at least 2 points, got {points}")
    request = make_request(
        model,
        passes=passes,
        default_passes=default_passes,
        optimizer=optimizer,
        options=options,
    )
    batch = Sample.of(sample)
    with ONE_AT_A_TIME, changing(model, batch, request.passes) as changed:
        step = lower(changed, batch, request.with_optimizer_of(changed.model))
    solutions = find_frontier(
        step.captured.program,
        step.costs,
        step.recoveries,
        original_seconds=step.unplanned.seconds,
        points=points,
    )
    return [step.describe(one.schedule, budget_bytes=one.peak_bytes) for one in solutions]
