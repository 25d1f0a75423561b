"""The checked request of ``optimize`` and ``plan``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn
from torch.optim import Optimizer

from memplan.errors import MemplanError, PlanMismatch
from memplan.optimizer import InBackward, resolve_optimizer
from memplan.options import Options
from memplan.planner.plan import PassRecord, Plan
from memplan.runtime.module import PlannedModule
from memplan.torch_internals import warn_of_untested_torch
from memplan.transforms.passes import Pass
from memplan.units import Budget, parse_budget


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        budget: bound on the peak, or None.
        max_slowdown: bound on predicted time over the captured step's, or None.
        passes: in the order in which they offer.
        plan: a saved plan to apply, or None.
        options: the rest.
        given_optimizer: whose state and update are part of the step: an optimizer, a callable that
            makes one, or None.
        optimizer: the optimizer itself, once the trained parameters are known.
        in_backward: what updates parameters in the backward, or None.
    """

    budget: Budget | None = None
    max_slowdown: float | None = None
    passes: tuple[Pass, ...] = ()
    plan: Plan | None = None
    options: Options = field(default_factory=Options)
    given_optimizer: object = None
    optimizer: Optimizer | None = None
    in_backward: InBackward | None = None

    def __post_init__(self) -> None:
        if self.options.update_in_backward and self.options.fused:
            raise MemplanError(
                "a fused step finishes its gradients in the forward, where it is not known yet "
                "that parameters are to be updated: Options(update_in_backward=True) cannot be "
                "combined with Options(fused=True) and with passes that fuse the step; "
                "leave one of the two out"
            )

    def with_optimizer_of(self, model: nn.Module) -> Request:
        """The request with the optimizer for the parameters of a model that passes have changed."""
        found = self.optimizer or resolve_optimizer(model, self.given_optimizer)
        in_backward = self.in_backward
        if found is not None and in_backward is None and self.options.update_in_backward:
            in_backward = InBackward(found)
        return replace(self, optimizer=found, in_backward=in_backward)


_SHARING = frozenset({"DataParallel", "FullyShardedDataParallel", "FSDPModule"})
"""Wrappers that split or copy a module over devices."""


def require_module(model: object) -> None:
    """Refuse a model that is not a module, or is planned already."""
    if isinstance(model, PlannedModule):
        raise MemplanError("the model is planned already; plan its original: planned.original")
    if not isinstance(model, nn.Module):
        raise MemplanError(f"the model must be an nn.Module, got {type(model).__name__}")
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "DistributedDataParallel" in kinds:
        raise MemplanError(
            "the model is a DistributedDataParallel, whose exchange of gradients a plan would "
            "leave out. Plan the module first, and wrap the result: "
            "DistributedDataParallel(memplan.optimize(module, ...)), or "
            "accelerator.prepare(memplan.optimize(module, ...))."
        )
    if sharing := kinds & _SHARING:
        raise MemplanError(
            f"the model is a {sharing.pop()}, whose parameters are split or copied over devices; "
            "a plan would leave that out. Plan a module as it is, for one device or inside of "
            "DistributedDataParallel."
        )


def make_request(
    model: nn.Module,
    *,
    budget: int | str | None = None,
    max_slowdown: float | None = None,
    passes: Iterable[Pass] = (),
    default_passes: bool = True,
    optimizer: object = None,
    plan: Plan | None = None,
    options: Options | None = None,
) -> Request:
    """The checked request. Arguments are those of ``memplan.optimize``."""
    warn_of_untested_torch()
    options = Options() if options is None else options
    require_module(model)
    if options.update_in_backward and optimizer is None:
        raise MemplanError("Options(update_in_backward=True) needs optimizer=")
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
        recorded = tuple(map(_recorded, plan.passes))
        options = replace(options, fused=options.fused or any(one.is_fused for one in recorded))
        return Request(None, None, recorded, plan, options, optimizer)
    chosen = (*_defaults(), *named) if default_passes else named
    if any(one.is_fused for one in chosen):
        options = replace(options, fused=True)
    parsed = None if budget is None else parse_budget(budget)
    return Request(parsed, max_slowdown, chosen, None, options, optimizer)


def _defaults() -> tuple[Pass, ...]:
    # The kernel does not import passes while it is imported itself: they import the kernel.
    from memplan.passes import DEFAULT_PASSES, PASSES  # noqa: PLC0415

    return tuple(PASSES[name]() for name in DEFAULT_PASSES)


def _recorded(record: PassRecord) -> Pass:
    """The pass that a plan names, built by its factory."""
    from memplan.passes import PASSES  # noqa: PLC0415

    if record.name not in PASSES:
        raise PlanMismatch(f"the plan uses the pass {record.name!r}; there is {sorted(PASSES)}")
    try:
        return PASSES[record.name](**record.arguments)
    except (TypeError, ValueError, MemplanError) as error:
        raise PlanMismatch(f"the plan's pass {record.name!r} cannot be made: {error}") from error
