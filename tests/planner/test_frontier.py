"""What memory costs in time: the frontier, bounds and proofs of real steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan

from support import laws


@pytest.fixture(scope="module")
def step():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1))]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(256, 64), torch.randn(256, 64))


def test_a_frontier_falls_and_each_plan_of_it_can_be_run(step):
    model, sample = step
    plans = memplan.frontier(model, sample, points=8)
    assert len(plans) >= 3
    peaks = [plan.peak_bytes for plan in plans]
    slowdowns = [plan.slowdown for plan in plans]
    assert peaks == sorted(peaks) and slowdowns == sorted(slowdowns, reverse=True)
    for plan in (plans[0], plans[len(plans) // 2]):
        planned = memplan.optimize(model, sample, plan=plan)
        assert laws.assert_within_budget(planned, sample) == plan.peak_bytes
        laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


def test_a_frontier_of_one_point_is_refused(step):
    with pytest.raises(memplan.MemplanError, match="at least 2 points"):
        memplan.frontier(*step, points=1)


def test_a_bound_stands_beside_the_slowdown(step):
    model, sample = step
    options = memplan.Options(with_bound=True)
    plan = memplan.plan(model, sample, budget="60%", options=options)
    assert plan.slowdown_bound is not None
    base = memplan.plan(model, sample, budget="100%").slowdown
    assert base <= plan.slowdown_bound <= plan.slowdown + 1e-9
    assert f"(at least {plan.slowdown_bound:.3f}x)" in str(plan)
    assert memplan.Plan.from_json(plan.to_json()) == plan


def test_the_exact_solver_is_at_least_as_good_and_needs_a_budget(step):
    model, sample = step
    exact = memplan.Options(solver="exact", solver_limit_s=20)
    proven = memplan.plan(model, sample, budget="60%", options=exact)
    assert proven.slowdown <= memplan.plan(model, sample, budget="60%").slowdown
    planned = memplan.optimize(model, sample, plan=proven)
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))
    laws.assert_within_budget(planned, sample)
    with pytest.raises(memplan.MemplanError, match="needs a budget"):
        memplan.plan(model, sample, options=exact)
