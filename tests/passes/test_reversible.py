"""Streams that come back from later ones: bits where they must be, rounding where it is said."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memplan
from memplan.passes import check_drift, invert_couplings
from memplan.passes.reversible.couplings import ALONE, PLAIN, find_couplings

from models.reversible import RevNet
from support import laws
from support.couplings import (
    ROWS,
    WIDTH,
    Streams,
    classifier,
    lowered,
    num_undone,
    streams,
    undone,
)

SMALLEST = memplan.Options(on_infeasible="smallest")


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    torch.manual_seed(0)
    model, sample = ROWS[request.param]()
    return model, sample, undone(model, sample)


@pytest.mark.by_default("chunk")
def test_bits_of_the_forward_are_those_without_inversion(row):
    model, sample, planned = row
    full = memplan.optimize(model, sample, budget="100%", passes=[invert_couplings()])
    assert num_undone(full) == 0
    plain, mine = laws.step(full, sample), laws.step(planned, sample)
    assert torch.equal(plain.loss, mine.loss)
    assert all(torch.equal(buffer, mine.buffers[name]) for name, buffer in plain.buffers.items())


@pytest.mark.slow
def test_gradients_in_64_bits_pass_gradcheck():
    torch.manual_seed(0)
    model, (x, target) = streams(layers=6, dropout=0.5, how="chunk")
    model, x = model.double(), x[:2, :3].double().requires_grad_()
    planned = undone(model, (x, target[:2]))
    assert num_undone(planned) > 0

    def loss(x):
        torch.manual_seed(1)
        return planned(x, target[:2])

    with pytest.warns(UserWarning, match="retain_graph"):
        assert torch.autograd.gradcheck(loss, (x,))


@pytest.mark.by_default("20-True")
@pytest.mark.parametrize(
    ("depth", "half"),
    [(20, True), (38, False), (38, True), pytest.param(110, True, marks=pytest.mark.slow)],
)
def test_on_a_grid_the_bits_are_those_without_inversion(depth, half):
    torch.manual_seed(0)
    size = 16 if depth == 20 else 32
    network, sample = classifier(RevNet(depth, width=0.5), 4, 3, size, size)
    model = UnderAutocast(network) if half else network
    step = undone(model, sample, invert_couplings(grid=True))
    full = memplan.optimize(model, sample, budget="100%", passes=[invert_couplings(grid=True)])
    assert num_undone(step) >= (2 if depth == 20 else 11) and num_undone(full) == 0
    assert memplan.Effect.APPROXIMATE in step.plan.effects
    laws.assert_same_bits(laws.step(full, sample), laws.step(step, sample))
    laws.assert_within_budget(step, sample)
    assert check_drift(step, sample).chains == ()


class UnderAutocast(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(*args)


def test_a_stream_that_leaves_the_grid_is_an_error():
    model, (x, target) = streams(layers=8)
    planned = undone(model, (x, target), invert_couplings(grid=20))
    with pytest.raises(memplan.MemplanError, match="coarser grid"):
        planned(100 * x, target)


@pytest.mark.parametrize("grid", [-1, 24, 1.5])
def test_a_grid_that_cannot_be_is_refused(grid):
    with pytest.raises(ValueError, match="grid is True, or"):
        invert_couplings(grid=grid)


@pytest.mark.parametrize("tolerance", [0, -1e-3, float("nan")])
def test_a_tolerance_that_cannot_be_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance is a relative error above 0"):
        invert_couplings(tolerance=tolerance)


def unsettled(coefficient, *passes, tolerance=None):
    """12 couplings, planned for the least bytes that these passes can do with; not run yet."""
    torch.manual_seed(0)
    model, (x, target) = streams(how="scale", layers=12, coefficient=coefficient)
    sample = (x.repeat(4, 2, 1), target.repeat(4))
    least = memplan.plan(model, sample, budget="1 B", passes=passes, options=SMALLEST)
    named = [invert_couplings(tolerance=tolerance)]
    planned = memplan.optimize(model, sample, budget=least.peak_bytes, passes=named)
    assert num_undone(planned) > 5
    return planned, model, sample


def test_the_first_training_call_measures_drift_and_leaves_nothing_behind():
    planned, model, sample = unsettled(1.0)
    assert any(note.startswith("drift unmeasured") for note in planned.plan.notes)
    before, schedule = torch.get_rng_state(), planned.plan.schedule
    planned(*sample)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert planned.plan.schedule == schedule
    assert not any("unmeasured" in note for note in planned.plan.notes)
    assert any(note.startswith("drift ") and "gradients" in note for note in planned.plan.notes)
    drift = check_drift(planned, sample)
    assert drift.is_within_tolerance and 0 < drift.worst < 1e-5


@pytest.mark.slow
def test_a_coefficient_of_a_tenth_at_12_layers_trips_the_guard():
    planned, model, sample = unsettled(0.1)
    drift = check_drift(planned, sample)
    assert not drift.is_within_tolerance and drift.worst > 1e-2
    planned(*sample)
    assert check_drift(planned, sample).is_within_tolerance
    assert planned.plan.peak_bytes <= planned.plan.budget_bytes
    assert any("values do not come back by rounding" in note for note in planned.plan.notes)
    laws.assert_close(laws.step(model, sample), laws.step(planned, sample), 1e-3)


@pytest.mark.slow
def test_streams_are_kept_as_often_as_the_tolerance_asks_for():
    planned, _, sample = unsettled(0.5, tolerance=1e-6)
    assert check_drift(planned, sample).worst > 1e-6
    planned(*sample)
    assert check_drift(planned, sample).worst <= 1e-6


@pytest.mark.slow
def test_a_budget_that_the_drift_does_not_allow_is_refused_with_the_reason():
    planned, _, sample = unsettled(0.1, invert_couplings())
    with pytest.raises(memplan.InfeasibleBudget, match="would drift by more than the tolerance"):
        planned(*sample)


@pytest.mark.slow
def test_a_saved_plan_runs_and_one_that_drifts_is_refused():
    torch.manual_seed(0)
    for coefficient in (1.0, 0.1):
        model, sample = streams(how="scale", layers=12, coefficient=coefficient)
        plan = memplan.Plan.from_json(undone(model, sample).plan.to_json())
        applied = memplan.optimize(model, sample, plan=plan)
        if coefficient == 1.0:
            laws.assert_close(laws.step(model, sample), laws.step(applied, sample), 1e-4)
        else:
            with pytest.raises(memplan.PlanMismatch, match="the saved plan drifts too far"):
                applied(*sample)


class Gated(nn.Module):
    """Takes its input apart itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH // 2, WIDTH)

    def forward(self, x):
        one, other = x.chunk(2, -1)
        return self.layer(one * torch.sigmoid(other))


class Transposing(nn.Module):
    """Makes its change in another layout."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x.transpose(1, 2).reshape(-1, WIDTH, 16)).transpose(1, 2)


@pytest.mark.by_default("tuple-Transposing")
@pytest.mark.parametrize("function_of", [Gated, Transposing])
@pytest.mark.parametrize("how", ["chunk", "slice", "tuple"])
def test_functions_may_take_their_stream_apart(function_of, how):
    torch.manual_seed(0)
    network = Streams(how=how, layers=8)
    network.functions = nn.ModuleList(function_of() for _ in range(8))
    model, sample = classifier(network, 8, 16, 2 * WIDTH)
    for budget in ("100%", "1 B"):
        planned = memplan.optimize(
            model, sample, budget=budget, passes=[invert_couplings()], options=SMALLEST
        )
        laws.step(planned, sample)
        laws.assert_close(laws.step(model, sample), laws.step(planned, sample), 1e-5)
        laws.assert_within_budget(planned, sample)


class Promoted(Streams):
    """Puts a sum in 16 bits and one in 32 together."""

    def forward(self, x):
        x = self.stem(x)
        for f, g in zip(self.functions[::2], self.functions[1::2], strict=True):
            one, other = x.chunk(2, -1)
            half = (one + f(other)).bfloat16() + one.bfloat16()
            x = torch.cat([half, other + g(one)], -1)
        return self.head(x).mean(1)


def test_streams_of_two_precisions_are_left_alone():
    torch.manual_seed(0)
    model, sample = classifier(Promoted(layers=4), 4, 8, 2 * WIDTH)
    planned = memplan.optimize(model, sample, budget="100%", passes=[invert_couplings()])
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


class Started(Streams):
    """Streams begin as activations whose backward reads them."""

    def forward(self, x):
        one, other = (torch.tanh(part.clone()) for part in self.stem(x).chunk(2, -1))
        for f, g in zip(self.functions[::2], self.functions[1::2], strict=True):
            one = one + f(other)
            other = g(one) + other
        return self.head(torch.cat([one, other], -1)).mean(1)


def test_a_grid_begins_where_the_streams_do():
    torch.manual_seed(0)
    model, sample = classifier(Started(layers=8), 8, 16, 2 * WIDTH)
    step = undone(model, sample, invert_couplings(grid=True))
    full = memplan.optimize(model, sample, budget="100%", passes=[invert_couplings(grid=True)])
    assert num_undone(step) >= 6
    laws.assert_same_bits(laws.step(full, sample), laws.step(step, sample))
    laws.assert_close(laws.step(model, sample), laws.step(full, sample), 1e-2)


@pytest.mark.slow
def test_drift_is_seen_in_64_bits_and_beside_gradients_that_are_there():
    torch.manual_seed(0)
    model, (x, target) = streams(how="scale", layers=8, coefficient=0.5)
    model, sample = model.double(), (x.double(), target)
    planned = undone(model, sample)
    assert 0 < check_drift(planned, sample).worst < 1e-10
    planned(*sample).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    again = memplan.optimize(
        model, sample, budget="1 B", passes=[invert_couplings()], options=SMALLEST
    )
    again(*sample)
    assert all(map(torch.equal, before, (parameter.grad for parameter in model.parameters())))


class Plain(Streams):
    """``x + f(x)``, which cannot be undone."""

    def forward(self, x):
        x = self.stem(x)[..., :WIDTH]
        for f in self.functions:
            x = x + f(x)
        return self.head(torch.cat([x, x], -1)).mean(1)


class Tangled(Streams):
    """The change comes from a value that was made of the stream."""

    def forward(self, x):
        one, other = (part.clone() for part in self.stem(x).chunk(2, -1))
        for f, g in zip(self.functions[::2], self.functions[1::2], strict=True):
            aside = torch.tanh(one)
            one, other = other, one + f(aside) + g(other)
            other = other + aside.mean()
        return self.head(torch.cat([one, other], -1)).mean(1)


class Alone(Streams):
    """Each stream is changed once."""

    def forward(self, x):
        one, other = (part.clone() for part in self.stem(x).chunk(2, -1))
        one = one + self.functions[0](other)
        other = other + self.functions[1](one)
        return self.head(torch.cat([one, other], -1)).mean(1)


class Projected(Streams):
    """What is added to has another shape."""

    def forward(self, x):
        one, other = (part.clone() for part in self.stem(x).chunk(2, -1))
        for f in self.functions:
            one, other = other, one.mean(1, keepdim=True) + f(other)
        return self.head(torch.cat([one, other], -1)).mean(1)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Plain, PLAIN), (Tangled, PLAIN), (Alone, ALONE), (Projected, PLAIN)]
)
def test_what_cannot_be_undone_is_kept_with_a_reason(kind, reason):
    torch.manual_seed(0)
    model, sample = classifier(kind(layers=4), 4, 8, 2 * WIDTH)
    planned = memplan.optimize(
        model, sample, budget="1 B", passes=[invert_couplings()], options=SMALLEST
    )
    found = find_couplings(lowered(model, sample).captured.graph)
    assert not found.chains and found.kept[reason]
    assert any("found no couplings" in note and reason in note for note in planned.plan.notes)
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


def scaled_streams():
    torch.manual_seed(0)
    model, (x, target) = streams(how="scale", layers=8)
    return model, (x.repeat(4, 2, 1), target.repeat(4))


@pytest.mark.slow
def test_bounds_proofs_and_frontiers():
    model, sample = scaled_streams()
    passes = [invert_couplings()]
    frontier = memplan.frontier(model, sample, points=4, passes=passes)
    least = frontier[0].peak_bytes
    limit_s = 5.0
    for options in (
        memplan.Options(with_bound=True, solver_limit_s=limit_s),
        memplan.Options(solver="exact", solver_limit_s=limit_s),
    ):
        plan = memplan.plan(model, sample, budget=least, passes=passes, options=options)
        assert plan.peak_bytes <= least
        assert plan.slowdown_bound is None or plan.slowdown_bound <= plan.slowdown + 1e-9


def test_updates_in_the_backward():
    model, sample = scaled_streams()
    passes = [invert_couplings()]
    other = copy.deepcopy(model)
    inside = memplan.Options(update_in_backward=True, on_infeasible="smallest")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    planned = memplan.optimize(
        model, sample, budget="1 B", passes=passes, optimizer=optimizer, options=inside
    )
    assert num_undone(planned) > 0
    others = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(2):
        for module, one in ((planned, planned.optimizer), (other, others)):
            module(*sample).backward()
            one.step()
            one.zero_grad()
    assert any("gradients not compared" in note for note in planned.plan.notes)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@given(
    made=st.fixed_dictionaries(
        {
            "layers": st.integers(3, 5).map(lambda half: 2 * half),
            "how": st.sampled_from(["tuple", "chunk", "slice", "minus", "scale"]),
            "coefficient": st.sampled_from([1.0, 0.9, -1.0, 2.0]),
            "dropout": st.sampled_from([0.0, 0.3]),
            "norm": st.sampled_from(["layer", "batch"]),
        }
    ),
    share=st.sampled_from(["undone", "60%", "35%", "1 B"]),
)
@settings(max_examples=settings.default.max_examples // 20, deadline=None)
def test_any_couplings_under_any_budget(made, share):
    torch.manual_seed(0)
    model, sample = streams(**made)
    if share == "undone":
        planned = undone(model, sample)
    else:
        planned = memplan.optimize(
            model, sample, budget=share, passes=[invert_couplings()], options=SMALLEST
        )
    planned(*sample)
    laws.assert_within_budget(planned, sample)
    laws.assert_close(laws.step(model, sample), laws.step(planned, sample), 1e-4)
