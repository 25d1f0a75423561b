"""The search for the largest of several passes with which a plan fits the budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from memplan.capture import ONE_AT_A_TIME
from memplan.capture.sample import Sample
from memplan.compiler.lower import LoweredStep, lower_each
from memplan.compiler.request import Request
from memplan.compiler.select import select
from memplan.errors import InfeasibleBudget, MemplanError
from memplan.planner.plan import Plan
from memplan.transforms.apply import changing, context_of
from memplan.transforms.passes import Pass

_LOG = logging.getLogger("memplan")


def fitted(model: nn.Module, sample: Sample | None, request: Request) -> Request:
    """The request with each pass that has candidates replaced by the largest that fits.

    Candidates are tried by bisection, or one by one if less wanted ones may fit no better.

    Args:
        model: the module.
        sample: one batch.
        request: the request.

    Raises:
        InfeasibleBudget: if not even the smallest fits.
        MemplanError: if there is no budget in bytes to fit.
    """
    for place, one in enumerate(request.passes):
        if one.candidates is None:
            continue
        if sample is None or request.budget is None or request.budget.nbytes is None:
            raise MemplanError(
                f"{one.name} is to fit: pass a batch, and a budget in bytes, such as budget='2GiB'"
            )
        candidates = one.candidates(model, context_of(model, sample))
        requests = [_with_pass(request, place, candidate) for candidate in candidates]
        attempts = [partial(make_plan, model, sample, _strictly(each)) for each in requests]
        number = _last_that_fits(attempts) if one.is_ordered else _wanted_most(attempts)
        _LOG.info("%s fits with %s", one.name, dict(candidates[number].arguments))
        request = requests[number]
    return request


def make_plan(model: nn.Module, sample: Sample, request: Request) -> tuple[LoweredStep, Plan]:
    """The captured step, and the plan that runs it. The model is left unchanged.

    Raises:
        InfeasibleBudget: if there is none.
    """
    request = fitted(model, sample, request)
    with ONE_AT_A_TIME, changing(model, sample, request.passes) as changed:
        steps = lower_each(changed, sample, request.with_optimizer_of(changed.model))
    return select(steps, request)


def _with_pass(request: Request, place: int, one: Pass) -> Request:
    return replace(request, passes=(*request.passes[:place], one, *request.passes[place + 1 :]))


def _strictly(request: Request) -> Request:
    return replace(request, options=replace(request.options, on_infeasible="raise"))


def _wanted_most(attempts: Sequence[Callable[[], object]]) -> int:
    """Index of the last attempt that succeeds, tried from the end on; an error if none does."""
    failures: list[InfeasibleBudget] = []
    for number in reversed(range(len(attempts))):
        try:
            attempts[number]()
        except InfeasibleBudget as error:
            failures.append(error)
        else:
            return number
    raise min(failures, key=lambda error: error.smallest_budget_bytes)


def _last_that_fits(attempts: Sequence[Callable[[], object]]) -> int:
    """Index of the last attempt that succeeds; an error if the first does not."""
    attempts[0]()
    fits, too_large = 0, len(attempts)
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        try:
            attempts[middle]()
        except InfeasibleBudget:
            too_large = middle
        else:
            fits = middle
    return fits
