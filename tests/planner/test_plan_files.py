"""Plans from files: whatever the file holds, a clear error or a plan that is right; never code."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memplan

from support import laws

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["__import__('os').system('true')", "aten.mm.default", "run", "free", "exact"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def make_step():
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1)] * 3
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(64, 8), torch.randn(64, 8))


torch.manual_seed(0)
MODEL, SAMPLE = make_step()
SAVED = memplan.plan(MODEL, SAMPLE, budget="75%").to_json()


def places(data, path=()):
    """All paths into nested lists and dicts."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


PLACES = sorted(set(places(json.loads(SAVED))) - {()}, key=str)


def edited(path, value, action):
    """The saved plan with one place changed."""
    data = copy.deepcopy(json.loads(SAVED))
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    last = path[-1]
    if action == "remove":
        del inside[last]
    elif action == "repeat" and isinstance(inside, list):
        inside.insert(last, copy.deepcopy(inside[last]))
    elif action == "swap" and isinstance(inside, list) and last > 0:
        inside[last], inside[last - 1] = inside[last - 1], inside[last]
    else:
        inside[last] = value
    return json.dumps(data)


def use(text: str) -> None:
    """Read and apply a plan: it is refused, or it runs and is right."""
    try:
        plan = memplan.Plan.from_json(text)
        str(plan), plan.explain(), plan.to_json()
        planned = memplan.optimize(MODEL, SAMPLE, plan=plan)
    except memplan.MemplanError:
        return
    laws.assert_same_bits(laws.step(MODEL, SAMPLE), laws.step(planned, SAMPLE))
    laws.assert_within_budget(planned, SAMPLE)


def test_the_unchanged_plan_is_used():
    planned = memplan.optimize(MODEL, SAMPLE, plan=memplan.Plan.from_json(SAVED))
    assert planned.plan.schedule == memplan.Plan.from_json(SAVED).schedule


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACES), JSON, st.sampled_from(["set", "remove", "repeat", "swap"]))
def test_an_edited_plan_is_refused_or_right(path, value, action):
    use(edited(path, value, action))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(SAVED) - 1))
def test_a_truncated_plan_is_refused(length):
    with pytest.raises(memplan.PlanMismatch):
        memplan.Plan.from_json(SAVED[:length])


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(memplan.PlanMismatch):
        memplan.Plan.from_json(json.dumps(data))


def test_a_plan_cannot_claim_a_budget_that_it_does_not_keep():
    data = json.loads(SAVED)
    with pytest.raises(memplan.PlanMismatch, match=r"needs \d+ bytes here"):
        plan = memplan.Plan.from_json(json.dumps({**data, "budget_bytes": 1000}))
        memplan.optimize(MODEL, SAMPLE, plan=plan)


def test_nested_so_deeply_that_it_cannot_be_read():
    with pytest.raises(memplan.PlanMismatch):
        memplan.Plan.from_json("[" * 100_000)
