"""One table, all laws: models x budgets under the default passes."""

from __future__ import annotations

import copy

import laws
import pytest
import torch
from models import MODELS

import memplan
from memplan.schedule import Schedule

BUDGETS = ("100%", "80%", "50%", "35%")
LOWEST_SHARE = {"gpt2": 0.45}
"""How low a share of what is above resident must be feasible at least."""


@pytest.fixture(scope="module", params=MODELS)
def row(request):
    torch.manual_seed(0)
    model, sample = MODELS[request.param]()
    planned = {}
    for budget in BUDGETS:
        options = memplan.Options(on_infeasible="smallest")
        planned[budget] = memplan.optimize(model, sample, budget=budget, options=options)
    return request.param, model, sample, planned


@pytest.mark.parametrize("budget", BUDGETS)
def test_exact_plans_give_the_same_bits(row, budget):
    _, model, sample, planned = row
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned[budget], sample))


@pytest.mark.parametrize("budget", BUDGETS)
def test_measured_is_at_most_predicted_is_at_most_the_budget(row, budget):
    name, _, sample, planned = row
    laws.assert_within_budget(planned[budget], sample)
    plan = planned[budget].plan
    asked = memplan.units.parse_budget(budget).resolve(
        plan.resident_bytes, plan.original_peak_bytes
    )
    if name in LOWEST_SHARE:
        share = max(float(budget.rstrip("%")) / 100, LOWEST_SHARE[name])
        above = plan.original_peak_bytes - plan.resident_bytes
        assert plan.peak_bytes - plan.resident_bytes <= share * above
    assert plan.budget_bytes is not None and plan.budget_bytes >= asked
    assert plan.floor_bytes <= plan.peak_bytes


def test_predicted_slowdown_does_not_grow_with_the_budget(row):
    _, _, _, planned = row
    slowdowns = [planned[budget].plan.slowdown for budget in BUDGETS]
    assert slowdowns == sorted(slowdowns)
    assert planned["100%"].plan.num_restores == 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_plan_survives_json(row, budget):
    _, _, _, planned = row
    plan = planned[budget].plan
    assert memplan.Plan.from_json(plan.to_json()) == plan
    assert Schedule.from_json(plan.schedule.to_json()) == plan.schedule


def test_a_saved_plan_runs(row):
    _, model, sample, planned = row
    saved = memplan.Plan.from_json(planned["50%"].plan.to_json())
    applied = memplan.optimize(model, sample, plan=saved)
    assert applied.plan.schedule == saved.schedule
    laws.assert_same_bits(laws.step(model, sample), laws.step(applied, sample))


def test_planning_twice_gives_the_same_plan(row):
    _, model, sample, planned = row
    options = memplan.Options(on_infeasible="smallest")
    again = memplan.plan(model, sample, budget="50%", options=options)
    assert again == planned["50%"].plan


def test_names_evaluation_and_copies_are_the_originals(row):
    _, model, sample, planned = row
    one = planned["50%"]
    assert list(one.state_dict()) == list(model.state_dict())
    assert [name for name, _ in one.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(
        mine is theirs for mine, theirs in zip(one.parameters(), model.parameters(), strict=True)
    )
    batch = memplan.Sample.of(sample)
    one.eval()
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        mine, theirs = (module(*batch.args, **batch.kwargs) for module in (one, model))
    leaves = [memplan.torch_internals.flatten(output)[0] for output in (mine, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))
    one.train()
    duplicate = copy.deepcopy(one)
    assert next(duplicate.parameters()) is not next(one.parameters())
    laws.assert_same_bits(laws.step(model, sample), laws.step(duplicate, sample))
