"""What ``optimize`` and ``plan`` were asked for, checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from memplan.errors import MemplanError, PlanMismatch
from memplan.module import PlannedModule
from memplan.options import Options
from memplan.passing import Pass
from memplan.plan import PassRecord, Plan
from memplan.torch_internals import warn_of_untested_torch
from memplan.units import Budget, parse_budget


@dataclass(frozen=True)
class Request:
    """What was asked for, checked.

    Attributes:
        budget: bound on the peak, or None.
        max_slowdown: bound on predicted time over the captured step's, or None.
        passes: in the order in which they offer.
        plan: a saved plan to apply, or None.
        options: the rest.
    """

    budget: Budget | None = None
    max_slowdown: float | None = None
    passes: tuple[Pass, ...] = ()
    plan: Plan | None = None
    options: Options = field(default_factory=Options)


def require_module(model: object) -> None:
    """Refuse what is not a module, and what is planned already."""
    if isinstance(model, PlannedModule):
        raise MemplanError("the model is planned already; plan its original: planned.original")
    if not isinstance(model, nn.Module):
        raise MemplanError(f"the model must be an nn.Module, got {type(model).__name__}")


def make_request(
    *,
    budget: int | str | None,
    max_slowdown: float | None,
    passes: Iterable[Pass],
    default_passes: bool,
    optimizer: object,
    plan: Plan | None,
    options: Options | None,
) -> Request:
    """Check what was asked for."""
    warn_of_untested_torch()
    options = Options() if options is None else options
    if optimizer is not None:
        raise MemplanError(
            "optimizer= is not supported yet: the budget covers forward and backward. Leave it "
            "out, and leave room for the optimizer's state and update."
        )
    if max_slowdown is not None and not max_slowdown >= 1:
        raise MemplanError(f"max_slowdown is a factor of at least 1, got {max_slowdown!r}")
    named = tuple(passes)
    for one in named:
        if not isinstance(one, Pass):
            raise MemplanError(
                f"passes holds {one!r}; a pass is made by calling its factory, such as "
                "memplan.passes.checkpoint_activations()"
            )
    if plan is not None:
        if budget is not None or max_slowdown is not None or named:
            raise MemplanError("plan= excludes budget, max_slowdown and passes: it has its own")
        return Request(passes=tuple(map(_recorded, plan.passes)), plan=plan, options=options)
    chosen = (*_defaults(), *named) if default_passes else named
    parsed = None if budget is None else parse_budget(budget)
    return Request(parsed, max_slowdown, chosen, None, options)


def _defaults() -> tuple[Pass, ...]:
    # The kernel does not import passes while it is imported itself: they import the kernel.
    from memplan.passes import DEFAULT_PASSES, PASSES  # noqa: PLC0415

    return tuple(PASSES[name]() for name in DEFAULT_PASSES)


def _recorded(record: PassRecord) -> Pass:
    """The pass that a plan names, made by its factory."""
    from memplan.passes import PASSES  # noqa: PLC0415

    if record.name not in PASSES:
        raise PlanMismatch(f"the plan uses the pass {record.name!r}; there is {sorted(PASSES)}")
    try:
        return PASSES[record.name](**record.arguments)
    except (TypeError, ValueError) as error:
        raise PlanMismatch(f"the plan's pass {record.name!r} cannot be made: {error}") from error
