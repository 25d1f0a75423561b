"""The largest of several passes that a plan fits the budget with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from memplan.changing import context_of
from memplan.errors import InfeasibleBudget, MemplanError
from memplan.passing import Pass
from memplan.request import Request
from memplan.sample import Sample

_LOG = logging.getLogger("memplan")


def fitted(
    model: nn.Module,
    sample: Sample | None,
    request: Request,
    plan: Callable[[nn.Module, Sample, Request], object],
) -> Request:
    """The request with each pass that has candidates replaced by the largest that fits.

    Candidates are tried by bisection, or, if those that are wanted less may fit no better, one by
    one.

    Args:
        model: the module.
        sample: one batch.
        request: what was asked for.
        plan: makes a plan, or raises ``InfeasibleBudget``.

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
        attempts = [partial(plan, model, sample, _strictly(each)) for each in requests]
        number = _last_that_fits(attempts) if one.is_ordered else _wanted_most(attempts)
        _LOG.info("%s fits with %s", one.name, dict(candidates[number].arguments))
        request = requests[number]
    return request


def _with_pass(request: Request, place: int, one: Pass) -> Request:
    return replace(request, passes=(*request.passes[:place], one, *request.passes[place + 1 :]))


def _strictly(request: Request) -> Request:
    return replace(request, options=replace(request.options, on_infeasible="raise"))


def _wanted_most(attempts: Sequence[Callable[[], object]]) -> int:
    """The number of the last that can be planned for, from the end on; an error if none can."""
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
    """The number of the last that can be planned for; an error if the first cannot."""
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
