"""The savings of each technique alone, and of all together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from memplan import api
from memplan.errors import MemplanError
from memplan.ir.schedule import Effect
from memplan.options import Options
from memplan.planner.plan import Plan
from memplan.transforms.passes import Pass
from memplan.units import parse_budget

_LOG = logging.getLogger("memplan")

TOGETHER = "all exact ones"


@dataclass(frozen=True, slots=True)
class Technique:
    """A way to save memory, planned for one step.

    Attributes:
        name: name of the pass, ``TOGETHER``, or the option that is added to the latter.
        plan: the plan with this technique alone, as near to the budget as possible.
        fits: whether the plan is within the budget.
    """

    name: str
    plan: Plan
    fits: bool

    @property
    def saved_bytes(self) -> int:
        """Bytes saved against the step with nothing recomputed."""
        return self.plan.original_peak_bytes - self.plan.peak_bytes

    @property
    def bytes_per_percent(self) -> float:
        """Bytes saved per percent of predicted slowdown; infinite if free."""
        percent = 100 * (self.plan.slowdown - 1)
        if percent > 0:
            return self.saved_bytes / percent
        return float("inf") if self.saved_bytes > 0 else 0.0

    @property
    def is_exact(self) -> bool:
        """Tell whether the results keep their bits."""
        return self.plan.effects == (Effect.EXACT,)


def compare_techniques(
    model: nn.Module,
    sample: object,
    *,
    budget: int | str,
    passes: Mapping[str, Pass],
    optimizer: object = None,
    options: Options | None = None,
) -> list[Technique]:
    """Plan a step with each technique alone, and with all: exact ones first, then by yield.

    Args:
        model: the module.
        sample: one batch.
        budget: the budget to reach, as in ``memplan.plan``.
        passes: the techniques to try alone, by name.
        optimizer: its state and update are part of the step.
        options: further settings.
    """
    options = replace(options or Options(), on_infeasible="smallest")
    found = []

    def add(name: str, alone: list[Pass] | None, options: Options) -> None:
        _LOG.debug("planning with %s", name)
        try:
            plan = api.plan(
                model,
                sample,
                budget=budget,
                passes=alone or (),
                default_passes=alone is None,
                optimizer=optimizer,
                options=options,
            )
        except MemplanError as error:
            _LOG.debug("%s does not apply: %s", name, error)
            return
        wanted = parse_budget(budget).resolve(plan.resident_bytes, plan.original_peak_bytes)
        found.append(Technique(name, plan, plan.peak_bytes <= wanted))

    for name, one in passes.items():
        add(name, [one], options)
    add(TOGETHER, None, options)
    if optimizer is not None:
        add("update_in_backward too", None, replace(options, update_in_backward=True))
    return sorted(found, key=lambda one: (not one.is_exact, -one.bytes_per_percent, one.name))
