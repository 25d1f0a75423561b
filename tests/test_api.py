"""What ``optimize``, ``plan``, ``profile`` and ``compare`` accept, return and refuse."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

import memplan
from memplan.ir.program import OpCost
from memplan.passes import checkpoint_activations

from support import laws


@pytest.fixture(scope="module")
def step():
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)


@pytest.fixture(scope="module")
def sample():
    return torch.randn(256, 64), torch.randn(256, 64)


def test_samples_in_every_form(step, sample):
    x, y = sample
    plans = [
        memplan.plan(step, given, budget="70%")
        for given in (sample, list(sample), memplan.Sample((x, y)))
    ]
    assert plans[0] == plans[1] == plans[2]

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return (x * self.weight).square().sum()

    assert memplan.plan(Named(), {"x": x}).peak_bytes == memplan.plan(Named(), x).peak_bytes


def test_a_plan_says_what_it_costs_and_why(step, sample):
    plan = memplan.plan(step, sample, budget="60%")
    assert plan.resident_bytes < plan.floor_bytes <= plan.peak_bytes <= plan.budget_bytes
    assert plan.peak_bytes < plan.original_peak_bytes
    assert sum(plan.categories.values()) == plan.peak_bytes
    assert plan.slowdown > 1 and plan.effects == (memplan.Effect.EXACT,)
    text = plan.explain()
    assert "model." in text and "Floor" in text and "measured" in text
    assert str(plan) in repr(plan)


def test_more_bytes_never_cost_more_time(step, sample):
    plans = [memplan.plan(step, sample, budget=f"{percent}%") for percent in (55, 65, 75, 85, 100)]
    slowdowns = [plan.slowdown for plan in plans]
    assert slowdowns == sorted(slowdowns, reverse=True)


def test_the_smallest_budget_that_an_error_names_is_feasible(step, sample):
    with pytest.raises(memplan.InfeasibleBudget) as caught:
        memplan.plan(step, sample, budget="5%")
    message = str(caught.value)
    assert "Its peak is at aten." in message and "alive" in message and "model." in message
    smallest = caught.value.smallest_budget_bytes
    assert memplan.plan(step, sample, budget=smallest).peak_bytes <= smallest
    with pytest.raises(memplan.InfeasibleBudget):
        memplan.plan(step, sample, budget=smallest - 1)
    options = memplan.Options(on_infeasible="smallest")
    assert memplan.plan(step, sample, budget="5%", options=options).peak_bytes == smallest


def test_a_slowdown_is_a_bound(step, sample):
    # measured times differ from run to run
    plan = partial(memplan.plan, step, sample, options=memplan.Options(costs="analytic"))
    assert 1 < plan(max_slowdown=1.1).slowdown <= 1.1
    assert plan().slowdown <= 1.01
    with pytest.raises(memplan.InfeasibleBudget, match=r"no more than 1.01x"):
        plan(budget="60%", max_slowdown=1.01)


def test_without_passes_nothing_comes_back(step, sample):
    whole = memplan.plan(step, sample, budget="100%", default_passes=False)
    assert whole.num_restores == 0 and whole.passes == ()
    with pytest.raises(memplan.InfeasibleBudget):
        memplan.plan(step, sample, budget="60%", default_passes=False)
    named = [checkpoint_activations()]
    plan = memplan.plan(step, sample, budget="60%", default_passes=False, passes=named)
    assert plan.passes[0].name == "checkpoint_activations"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": "6 potatoes"}, memplan.UnitsError, "accepted forms"),
        ({"budget": 0.5}, memplan.UnitsError, "accepted forms"),
        ({"max_slowdown": 0.9}, memplan.MemplanError, "at least 1"),
        ({"optimizer": object()}, memplan.MemplanError, "torch.optim.Optimizer"),
        ({"passes": [checkpoint_activations]}, memplan.MemplanError, "calling its factory"),
    ],
)
def test_wrong_arguments_are_refused_at_once(step, sample, arguments, error, message):
    with pytest.raises(error, match=message):
        memplan.optimize(step, **arguments)
    with pytest.raises(error, match=message):
        memplan.plan(step, sample, **arguments)


def test_a_saved_plan_runs_only_what_it_was_made_for(step, sample):
    plan = memplan.Plan.from_json(memplan.plan(step, sample, budget="60%").to_json())
    with pytest.raises(memplan.MemplanError, match="excludes"):
        memplan.optimize(step, sample, plan=plan, budget="60%")
    other = (torch.randn(128, 64), torch.randn(128, 64))
    with pytest.raises(memplan.PlanMismatch, match="another step"):
        memplan.optimize(step, other, plan=plan)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 1},
        {"peak_bytes": "many"},
        {"schedule": []},
        {"passes": [{"name": "os.system"}]},
        {"extra": 1},
        {"live": [{"nbytes": 1}]},
        {"categories": {"a": None}},
    ],
)
def test_a_damaged_plan_is_refused(step, sample, change):
    data = json.loads(memplan.plan(step, sample, budget="60%").to_json())
    with pytest.raises(memplan.PlanMismatch):
        memplan.Plan.from_json(json.dumps({**data, **change}))
    with pytest.raises(memplan.PlanMismatch, match="not a plan"):
        memplan.Plan.from_json(json.dumps(data)[:-5])


def test_a_plan_with_an_unknown_pass_is_refused(step, sample):
    data = json.loads(memplan.plan(step, sample, budget="60%").to_json())
    data["passes"] = [{"name": "evil", "arguments": {}, "effect": "exact"}]
    plan = memplan.Plan.from_json(json.dumps(data))
    with pytest.raises(memplan.PlanMismatch, match="'evil'"):
        memplan.optimize(step, sample, plan=plan)


def test_profile_measures_what_is_there(step, sample):
    profile = memplan.profile(step, sample, steps=2)
    parameters = sum(p.numel() * 4 for p in step.parameters())
    assert profile.resident_bytes == parameters + 2 * 256 * 64 * 4
    assert profile.peak_bytes == max(nbytes for _, nbytes in profile.timeline)
    assert profile.step_s > 0 and profile.host_bytes > 0 and profile.device == "cpu"
    assert profile.reserved_bytes is None
    assert memplan.profile(step, sample).peak_bytes == profile.peak_bytes
    assert all(parameter.grad is None for parameter in step.parameters())


def test_profile_needs_one_loss(sample):
    with pytest.raises(memplan.MemplanError, match="WithLoss"):
        memplan.profile(nn.Linear(64, 64), sample[0])


def test_compare_tells_same_from_different(step, sample):
    planned = memplan.optimize(step, sample, budget="60%")
    result = memplan.compare(step, planned, sample)
    assert result.is_exact and result.max_gradient_error == 0
    assert result.planned.peak_bytes == planned.plan.peak_bytes
    assert result.peak_ratio < 1
    other = memplan.WithLoss(step.model, lambda output, target: (output - target).square().sum())
    different = memplan.compare(step, other, sample)
    assert not different.loss_equal and not different.gradients_equal
    assert different.max_gradient_error > 0 and not different.is_exact


def test_with_loss_keeps_the_models_keys(step):
    assert list(step.state_dict()) == list(step.model.state_dict())
    step.load_state_dict(step.model.state_dict())


def test_what_is_no_model_is_refused(step, sample):
    with pytest.raises(memplan.MemplanError, match=r"nn\.Module, got int"):
        memplan.optimize(3, sample)
    with pytest.raises(memplan.MemplanError, match=r"planned\.original"):
        memplan.plan(memplan.optimize(step), sample)


def test_costs_of_ones_own(step, sample):
    own = memplan.Costs({op: OpCost(1.0) for op in range(1000)}, "one second each")
    plan = memplan.plan(step, sample, budget="60%", options=memplan.Options(costs=own))
    assert plan.seconds == plan.num_ops + plan.num_restores
    with pytest.raises(memplan.MemplanError, match="the first of them op 0 "):
        memplan.plan(step, sample, options=memplan.Options(costs=memplan.Costs({})))
    analytic = memplan.plan(step, sample, options=memplan.Options(costs="analytic"))
    assert analytic.costs_source.startswith("analytic")
    assert "workspace unknown" in str(analytic)


def test_a_model_without_data_is_planned_analytically():
    with torch.device("meta"):
        layers = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.Tanh())]
        step = memplan.WithLoss(nn.Sequential(*layers), lambda a, b: (a - b).square().mean())
        sample = (torch.empty(256, 64), torch.empty(256, 64))
    plan = memplan.plan(step, sample, budget="60%")
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.costs_source.startswith("analytic")
    with pytest.raises(memplan.CaptureError, match="analytic"):
        memplan.plan(step, sample, options=memplan.Options(costs="measured"))


def test_the_loss_alone_is_a_bare_tensor(step, sample):
    planned = memplan.optimize(step, sample, budget="100%")
    assert isinstance(planned(*sample), torch.Tensor)
    laws.assert_same_bits(laws.step(step, sample), laws.step(planned, sample))


def test_a_release_of_torch_that_was_not_tested_is_warned_about_once(step, monkeypatch):
    from memplan.torch_internals import warn_of_untested_torch

    monkeypatch.setattr(torch, "__version__", "9.9.0")
    warn_of_untested_torch.cache_clear()
    with pytest.warns(UserWarning, match=r"this is 9\.9\.0"):
        memplan.optimize(step)
    memplan.optimize(step)
    warn_of_untested_torch.cache_clear()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_planning_where_gradients_are_off(step, sample, mode):
    with mode():
        planned = memplan.optimize(step, sample, budget="100%")
    laws.assert_same_bits(laws.step(step, sample), laws.step(planned, sample))
    assert len(planned.plans) == 1


def test_a_gradient_from_outside_that_stays_is_said():
    layer, x = nn.Linear(8, 8), torch.randn(16, 8)
    (note,) = memplan.plan(layer, x).notes
    assert "the gradient that arrives at the output (512 B)" in note and "WithLoss" in note
    assert not memplan.plan(memplan.WithLoss(layer, nn.functional.mse_loss), (x, x)).notes
