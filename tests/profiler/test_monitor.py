"""Steps of a running training, measured beside their plan."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import memplan
from memplan.units import format_bytes

from support.small import Net, X, sgd


def adamw(parameters):
    return torch.optim.AdamW(parameters, foreach=True)


@pytest.fixture
def lines(caplog):
    """What was logged of steps so far."""
    caplog.set_level(logging.INFO, logger="memplan")
    return lambda: [text for text in caplog.messages if text.startswith("step ")]


def train(planned, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        planned(X).backward()
        optimizer.step()


def as_predicted(step, plan):
    peak = format_bytes(plan.peak_bytes)
    return f"step {step}: predicted {peak}, measured {peak}, ratio 1.000"


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize("is_covered", [True, False])
def test_what_is_predicted_is_measured(lines, make_optimizer, is_covered):
    net = Net()
    optimizer = make_optimizer(net.parameters())
    planned = memplan.optimize(net, X, optimizer=optimizer if is_covered else None)
    with memplan.log_memory(planned, every=2):
        train(planned, optimizer, steps=5)
    assert lines() == [as_predicted(2, planned.plan), as_predicted(4, planned.plan)]


class Wide(nn.Module):
    """Most memory is taken by the optimizer's update."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x):
        return self.linear(x).square().mean()


@pytest.mark.parametrize("is_covered", [True, False])
def test_the_update_is_measured_if_the_plan_covers_it(lines, is_covered):
    net, batch = Wide(), torch.ones(1, 256)
    optimizer = adamw(net.parameters())
    planned = memplan.optimize(net, batch, optimizer=optimizer if is_covered else None)
    if is_covered:
        assert planned.plan.peak_phase == "optimizer"
    with memplan.log_memory(planned, every=1):
        for _ in range(2):
            optimizer.zero_grad()
            planned(batch).backward()
            optimizer.step()
    assert lines()[1] == as_predicted(2, planned.plan)


def test_what_is_not_predicted_is_measured(lines):
    planned = memplan.optimize(Net(), X)
    plan = planned.plan
    with memplan.log_memory(planned, every=1):
        loss = planned(X)
        held = torch.ones(2**20, dtype=torch.uint8)
        loss.backward()
    measured = plan.phases["backward"] + held.nbytes
    assert lines() == [
        f"step 1: predicted {format_bytes(plan.peak_bytes)}, measured {format_bytes(measured)}, "
        f"ratio {measured / plan.peak_bytes:.3f}"
    ]


class Noisy(Net):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))


def trained(every):
    torch.manual_seed(0)
    net = Noisy()
    optimizer = adamw(net.parameters())
    planned = memplan.optimize(net, X)
    if every is None:
        train(planned, optimizer, steps=4)
    else:
        with memplan.log_memory(planned, every):
            train(planned, optimizer, steps=4)
    assert len(planned.plans) == 1
    return [*(p.detach() for p in net.parameters()), torch.get_rng_state()]


def test_results_and_plans_do_not_change(lines):
    expected = trained(every=None)
    assert lines() == []
    for every in (1, 3):
        assert all(map(torch.equal, trained(every), expected))
    assert [line.partition(":")[0] for line in lines()] == [f"step {n}" for n in (1, 2, 3, 4, 3)]


def test_a_step_that_is_planned_first_is_passed_over(lines):
    net = Net()
    planned = memplan.optimize(net)
    with memplan.log_memory(planned, every=3):
        for batch in (X, X, X[:32], X[:32], X[:32]):
            planned(batch).backward()
            net.zero_grad()
    assert lines() == [as_predicted(4, planned.plan)]


def test_calls_without_gradients_are_no_steps(lines):
    planned = memplan.optimize(Net(), X)
    with memplan.log_memory(planned, every=2):
        planned(X).backward()
        planned.zero_grad()
        with torch.no_grad():
            planned(X)
        assert lines() == []
        planned(X).backward()
        with torch.no_grad():
            planned(X)
        assert lines() == [as_predicted(2, planned.plan)]
    assert len(lines()) == 1


@pytest.mark.parametrize("is_covered", [True, False])
def test_the_steps_of_other_optimizers_do_not_end_it(lines, is_covered):
    planned = memplan.optimize(Net(), X, optimizer=sgd if is_covered else None)
    other = nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    with memplan.log_memory(planned, every=1):
        loss = planned(X)
        sgd([other]).step()
        assert lines() == []
        loss.backward()
    assert len(lines()) == 1


def test_a_step_that_fails_is_not_logged(lines):
    planned = memplan.optimize(Net(), X)
    with pytest.raises(ZeroDivisionError), memplan.log_memory(planned, every=1):
        planned(X)
        raise ZeroDivisionError
    train(planned, sgd(planned.parameters()), steps=1)
    assert lines() == []


def test_nothing_is_logged_once_it_is_closed(lines):
    net = Net()
    optimizer = sgd(net.parameters())
    planned = memplan.optimize(net, X)
    log = memplan.log_memory(planned, every=1)
    train(planned, optimizer, steps=1)
    log.close()
    train(planned, optimizer, steps=1)
    log.close()
    assert len(lines()) == 1


def test_every_zero_steps_is_refused():
    with pytest.raises(memplan.MemplanError, match="every=1"):
        memplan.log_memory(memplan.optimize(Net()), every=0)


def test_a_step_in_which_something_else_is_measured_is_passed_over(lines):
    one, other = memplan.optimize(Net(), X), memplan.optimize(Net(), X)
    with memplan.log_memory(one, every=1), memplan.log_memory(other, every=1):
        first = one(X)
        other(X).backward()
        first.backward()
    assert len(lines()) == 1


def test_a_profile_of_the_users_is_left_alone(lines):
    planned = memplan.optimize(Net(), X)
    with memplan.log_memory(planned, every=1):
        with torch.profiler.profile() as theirs:
            planned(X).backward()
        assert theirs.events() and lines() == []
        planned.zero_grad()
        planned(X).backward()
    assert len(lines()) == 1
