"""One table, all laws: models x budgets under the default passes.

Every model runs at 100 % and 50 % here; the budgets marked slow run in ``.ci/full``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import memplan
from memplan.ir.schedule import Schedule

from support import laws
from support.rows import DEEP, MODELS

ALL = ("100%", "80%", "50%", "35%")
SMALLEST = "smallest"
"""Not even a byte is asked for, and the smallest feasible budget taken."""

BUDGETS = (
    "100%",
    pytest.param("80%", marks=pytest.mark.slow),
    "50%",
    pytest.param("35%", marks=pytest.mark.slow),
    pytest.param(SMALLEST, marks=pytest.mark.slow),
)

LOWEST_SHARE = {"deep gpt2": 0.45}
"""How low a share of what is above resident must be feasible at least."""

OTHER_DECOMPOSITION = {
    "gru": "torch traces the recurrent layers as other ops than those that eager runs",
    "lstm": "torch traces the recurrent layers as other ops than those that eager runs",
}
"""Rows whose captured program is not eager's: equal to the program, and close to eager."""


def bytes_asked(budget: str) -> str:
    return "1 B" if budget == SMALLEST else budget


COPIED = ("bert", "resnet", "unet", "mlp", "gpt2", "frozen", "returns_tuple")
"""Rows that are saved and copied by default."""


@dataclass
class Row:
    """A model, its batch, and its planned modules by budget."""

    name: str
    model: nn.Module
    sample: Any
    made: dict[str, memplan.PlannedModule] = field(default_factory=dict)

    def planned(self, budget: str) -> memplan.PlannedModule:
        if budget not in self.made:
            options = memplan.Options(on_infeasible="smallest")
            self.made[budget] = memplan.optimize(
                self.model,
                self.sample,
                budget=bytes_asked(budget),
                options=options,
            )
        return self.made[budget]


ROWS = {**MODELS, **{f"deep {name}": make for name, make in DEEP.items()}}


SLOW = ("llama", "t5", "gru", "mobilenet", "returns_dict", "returns_dataclass")
"""Rows whose like is in the default tests, and the deep ones."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in MODELS and name not in SLOW else pytest.mark.slow)
        for name in ROWS
    ],
)
def row(request):
    torch.manual_seed(0)
    return Row(request.param, *ROWS[request.param]())


def assert_exact(row: Row, module: nn.Module) -> None:
    eager = laws.step(row.model, row.sample)
    mine = laws.step(module, row.sample)
    if row.name in OTHER_DECOMPOSITION:
        assert row.planned("100%").plan.notes
        laws.assert_same_bits(laws.step(row.planned("100%"), row.sample), mine)
        laws.assert_close(eager, mine)
    else:
        laws.assert_same_bits(eager, mine)


@pytest.mark.parametrize("budget", BUDGETS)
def test_exact_plans_give_the_same_bits(row, budget, results):
    planned = row.planned(budget)
    assert_exact(row, planned)
    effects = [effect.value for effect in planned.plan.effects]
    error = laws.error(laws.step(row.model, row.sample), laws.step(planned, row.sample))
    results.law(row.name, budget, effects=effects, error=error)


@pytest.mark.parametrize("budget", BUDGETS)
def test_measured_is_at_most_predicted_is_at_most_the_budget(row, budget, results):
    planned = row.planned(budget)
    measured_bytes = laws.assert_within_budget(planned, row.sample)
    plan = planned.plan
    results.law(
        row.name,
        budget,
        ops=plan.num_ops,
        resident_bytes=plan.resident_bytes,
        original_peak_bytes=plan.original_peak_bytes,
        budget_bytes=plan.budget_bytes,
        predicted_bytes=plan.peak_bytes,
        measured_bytes=measured_bytes,
        slowdown=plan.slowdown,
    )
    asked = memplan.units.parse_budget(bytes_asked(budget)).resolve(
        plan.resident_bytes, plan.original_peak_bytes
    )
    if row.name in LOWEST_SHARE and budget != SMALLEST:
        share = max(float(budget.rstrip("%")) / 100, LOWEST_SHARE[row.name])
        above = plan.original_peak_bytes - plan.resident_bytes
        assert plan.peak_bytes - plan.resident_bytes <= share * above
    assert plan.budget_bytes is not None and plan.budget_bytes >= asked
    assert plan.floor_bytes <= plan.peak_bytes


@pytest.mark.slow
def test_predicted_slowdown_does_not_grow_with_the_budget(row):
    slowdowns = [row.planned(budget).plan.slowdown for budget in ALL]
    assert slowdowns == sorted(slowdowns)


def test_with_all_its_memory_nothing_is_recomputed(row):
    assert row.planned("100%").plan.num_restores == 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_plan_survives_json(row, budget):
    plan = row.planned(budget).plan
    assert memplan.Plan.from_json(plan.to_json()) == plan
    assert Schedule.from_json(plan.schedule.to_json()) == plan.schedule


@pytest.mark.by_default(*COPIED)
def test_a_saved_plan_runs(row):
    saved = memplan.Plan.from_json(row.planned("50%").plan.to_json())
    applied = memplan.optimize(row.model, row.sample, plan=saved)
    assert applied.plan.schedule == saved.schedule
    assert_exact(row, applied)


def test_searching_twice_gives_the_same_solution(row):
    laws.assert_searched_again(row.planned("50%"), row.sample)


@pytest.mark.by_default("bert", "resnet", "unet", "mlp")
def test_planning_twice_gives_the_same_plan(row):
    options = memplan.Options(on_infeasible="smallest")
    again = memplan.plan(row.model, row.sample, budget="50%", options=options)
    assert again == row.planned("50%").plan


@pytest.mark.by_default(*COPIED)
def test_names_evaluation_and_copies_are_the_originals(row):
    model, one = row.model, row.planned("50%")
    assert list(one.state_dict()) == list(model.state_dict())
    assert [name for name, _ in one.named_parameters()] == [n for n, _ in model.named_parameters()]
    pairs = zip(one.parameters(), model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    batch = memplan.Sample.of(row.sample)
    with laws.preserved(model), torch.no_grad():
        one.eval()
        assert not any(module.training for module in model.modules())
        mine = memplan.torch_internals.flatten(one(*batch.args, **batch.kwargs))[0]
    with laws.preserved(model), torch.no_grad():
        theirs = memplan.torch_internals.flatten(model(*batch.args, **batch.kwargs))[0]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    one.train()
    duplicate = copy.deepcopy(one)
    assert next(duplicate.parameters()) is not next(one.parameters())
    assert_exact(row, duplicate)
