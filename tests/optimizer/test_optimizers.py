"""The optimizer as a part of the step: its state and its update."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import memplan
from memplan.costs import DEVICES
from memplan.optimizer import update_cost
from memplan.profiler.step import resident_bytes, restored

from support import laws
from support.rows import MODELS
from support.small import Net, X, sgd

OPTIMIZERS = {
    "SGD momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-3, foreach=True),
    "AdamW for-loop": partial(torch.optim.AdamW, lr=1e-3, foreach=False),
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "Adafactor": partial(torch.optim.Adafactor, lr=1e-2),
}


def heavy(depth=8):
    """Many parameters and few activations: gradients and the update are the peak."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(128, 128), nn.GELU())]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(1, 128), torch.randn(1, 128))


MADE = {**{name: MODELS[name] for name in ("gpt2", "vit", "unet")}, "heavy": heavy}
UPDATES = (False, True)


@pytest.fixture(
    scope="module",
    params=[
        name if name in ("heavy", "unet") else pytest.param(name, marks=pytest.mark.slow)
        for name in MADE
    ],
)
def made(request):
    torch.manual_seed(0)
    return MADE[request.param]()


@pytest.mark.by_default(
    "heavy-SGD momentum-update at the end",
    "heavy-SGD momentum-update in backward",
    "heavy-AdamW foreach-update at the end",
    "heavy-AdamW foreach-update in backward",
    "heavy-AdamW for-loop-update in backward",
    "heavy-AdamW fused-update at the end",
    "heavy-Adafactor-update at the end",
    "heavy-Adafactor-update in backward",
    "unet-AdamW foreach-update at the end",
    "unet-AdamW foreach-update in backward",
)
@pytest.mark.parametrize("in_backward", UPDATES, ids=["update at the end", "update in backward"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_whole_step_is_predicted(made, optimizer, in_backward, results, request):
    model, sample = made
    options = memplan.Options(on_infeasible="smallest", update_in_backward=in_backward)
    planned = memplan.optimize(
        model, sample, budget="50%", optimizer=OPTIMIZERS[optimizer], options=options
    )
    plan, measured = planned.plan, memplan.profile(planned, sample, steps=1)
    above = plan.peak_bytes - plan.resident_bytes
    assert measured.peak_bytes <= plan.peak_bytes <= plan.budget_bytes
    assert plan.peak_bytes - measured.peak_bytes <= 0.01 * above
    assert plan.peak_phase == measured.peak_phase
    with laws.preserved(model, planned.optimizer):
        laws.run_step(model, memplan.Sample.of(sample), planned.optimizer)
        resident = resident_bytes(model, memplan.Sample.of(sample), planned.optimizer)
    assert plan.resident_bytes == resident
    results.optimizers.append(
        {
            "model": request.node.callspec.params["made"],
            "optimizer": optimizer,
            "in_backward": in_backward,
            "resident_bytes": resident,
            "predicted_bytes": plan.peak_bytes,
            "measured_bytes": measured.peak_bytes,
            "phase": measured.peak_phase,
        }
    )


@pytest.mark.by_default(
    "heavy-SGD momentum",
    "heavy-AdamW foreach",
    "heavy-AdamW for-loop",
    "heavy-AdamW fused",
    "heavy-Adafactor",
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_with_updates_in_the_backward_have_the_same_bits(made, optimizer):
    model, sample = made
    reference = copy.deepcopy(model)
    ordinary = OPTIMIZERS[optimizer](reference.parameters())
    options = memplan.Options(on_infeasible="smallest", update_in_backward=True)
    trained = copy.deepcopy(model)
    planned = memplan.optimize(
        trained, sample, budget="50%", optimizer=OPTIMIZERS[optimizer], options=options
    )
    batch = memplan.Sample.of(sample)
    for module, one in ((planned, planned.optimizer), (reference, ordinary)):
        schedule = torch.optim.lr_scheduler.StepLR(one, 5, 0.5)
        torch.manual_seed(3)
        for _ in range(20):
            laws.run_step(module, batch, one)
            schedule.step()
            one.zero_grad()
    assert all(map(torch.equal, trained.parameters(), reference.parameters()))
    mine, theirs = planned.optimizer.state_dict(), ordinary.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(mine["state"][key][name]), torch.as_tensor(value))


@pytest.mark.by_default("SGD momentum", "AdamW foreach")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_in_the_backward_free_the_gradients(optimizer, results):
    model, sample = heavy(depth=24)
    peaks = []
    for in_backward in UPDATES:
        options = memplan.Options(update_in_backward=in_backward)
        planned = memplan.optimize(
            model, sample, budget="100%", optimizer=OPTIMIZERS[optimizer], options=options
        )
        peaks.append(memplan.profile(planned, sample, steps=1).peak_bytes)
    gradients = sum(p.nbytes for p in model.parameters())
    results.freed[optimizer] = (peaks[0] - peaks[1]) / gradients
    assert peaks[0] - peaks[1] >= 0.9 * gradients


IN_BACKWARD = memplan.Options(update_in_backward=True)


@pytest.fixture
def net():
    return Net()


def test_an_optimizer_or_a_callable(net):
    optimizer = sgd(net.parameters())
    assert memplan.optimize(net, X, optimizer=optimizer).optimizer is optimizer
    made = memplan.optimize(net, X, optimizer=sgd).optimizer
    assert isinstance(made, torch.optim.SGD)
    assert memplan.optimize(net, X).optimizer is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda net: sgd(net.first.parameters()), "misses 2 .*'second.weight'"),
        (lambda net: sgd([*net.parameters(), nn.Parameter(torch.ones(2))]), "not the model's"),
        (lambda net: 3, "got int"),
        (lambda net: lambda parameters: "adam", "got str"),
        (lambda net: torch.optim.LBFGS(net.parameters()), "closure"),
    ],
)
def test_other_optimizers_are_refused(net, given, message):
    with pytest.raises(memplan.MemplanError, match=message):
        memplan.optimize(net, X, optimizer=given(net))


def test_frozen_parameters_may_be_left_out(net):
    net.first.requires_grad_(False)
    planned = memplan.optimize(net, X, optimizer=sgd(net.second.parameters()))
    state = sum(p.nbytes for p in net.second.parameters())
    assert planned.plan.resident_bytes == state + X.nbytes + sum(p.nbytes for p in net.parameters())


def test_planning_leaves_parameters_state_and_randomness_alone(net):
    optimizer = torch.optim.AdamW(net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    rng = torch.get_rng_state()
    memplan.optimize(net, X, optimizer=optimizer, options=IN_BACKWARD)
    assert not optimizer.state and torch.equal(rng, torch.get_rng_state())
    assert all(map(torch.equal, before, net.parameters()))
    assert all(p.grad is None for p in net.parameters())


def test_what_was_measured_is_known_again(net):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    trained = dict(net.named_parameters())
    made = update_cost(optimizer, trained, one_by_one=True)
    again = update_cost(torch.optim.AdamW(net.parameters(), lr=0.2), trained, one_by_one=True)
    assert again == made
    other = update_cost(torch.optim.AdamW(net.parameters(), amsgrad=True), trained)
    assert other.state_bytes > made.state_bytes
    fewer = update_cost(optimizer, {"first.weight": net.first.weight})
    assert fewer.state_bytes < made.state_bytes


def test_measuring_puts_parameters_and_state_back(net):
    planned = memplan.optimize(net, X, optimizer=sgd)
    laws.run_step(planned, memplan.Sample.of(X), planned.optimizer)
    before = copy.deepcopy((list(net.parameters()), planned.optimizer.state_dict()))
    memplan.profile(planned, X)
    assert memplan.compare(net, planned, X).is_exact
    after = (list(net.parameters()), planned.optimizer.state_dict())
    assert all(map(torch.equal, before[0], after[0]))
    for mine, theirs in zip(before[1]["state"].values(), after[1]["state"].values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


def test_the_update_as_the_peak_is_explained():
    model, sample = heavy()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    plan = memplan.plan(model, sample, optimizer=optimizer)
    assert plan.peak_phase == "optimizer" and plan.peak_op.startswith("AdamW.step")
    assert "update_in_backward" in plan.explain()
    budget = plan.resident_bytes + (plan.peak_bytes - plan.resident_bytes) // 2
    with pytest.raises(memplan.InfeasibleBudget, match="update_in_backward"):
        memplan.plan(model, sample, optimizer=optimizer, budget=budget)
    inside = memplan.plan(model, sample, optimizer=optimizer, budget=budget, options=IN_BACKWARD)
    assert inside.peak_bytes <= budget and inside.peak_phase == "backward"


def test_a_plan_with_an_optimizer_survives_json_and_runs_with_that_optimizer_alone(net):
    plan = memplan.Plan.from_json(memplan.plan(net, X, optimizer=sgd).to_json())
    assert memplan.optimize(net, X, optimizer=sgd, plan=plan).plan.phases == plan.phases
    with pytest.raises(memplan.PlanMismatch, match="another step"):
        memplan.optimize(net, X, plan=plan)


@pytest.mark.by_default(
    "SGD momentum-cpu", "AdamW foreach-h100", "AdamW fused-cpu", "Adafactor-h100"
)
@pytest.mark.parametrize("device", ["cpu", "h100"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_data_the_state_is_known_too(optimizer, device):
    model, sample = heavy()
    exact = memplan.plan(model, sample, optimizer=OPTIMIZERS[optimizer])
    with torch.device("meta"):
        meta = memplan.WithLoss(copy.deepcopy(model.model).to("meta"), model.loss_fn)
    options = memplan.Options(device=device)
    given = tuple(tensor.to("meta") for tensor in sample)
    plan = memplan.plan(meta, given, optimizer=OPTIMIZERS[optimizer], options=options)
    assert plan.phases["optimizer"] >= plan.resident_bytes
    if device == "cpu":
        assert plan.resident_bytes == exact.resident_bytes
    else:
        assert plan.resident_bytes >= exact.resident_bytes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_temporaries_are_known_without_running(optimizer):
    model, _ = heavy()
    trained = dict(model.named_parameters())
    one = OPTIMIZERS[optimizer](model.parameters())
    measured = update_cost(one, trained, one_by_one=True)
    followed = update_cost(one, trained, one_by_one=True, device=DEVICES["cpu"])
    assert measured.state_bytes == followed.state_bytes
    pairs = [(measured.cost, followed.cost)]
    pairs += [(measured.each[name], followed.each[name]) for name in trained]
    # but for a few scalars that are made on the way
    assert all(abs(a.workspace_bytes - b.workspace_bytes) < 64 for a, b in pairs)


def test_hooks_of_what_is_not_used_do_not_run(net):
    net.idle = nn.Parameter(torch.ones(2))
    net.idle.register_hook(lambda gradient: gradient.clamp(0, 1))
    planned = memplan.optimize(net, X)
    planned(X).backward()
    assert net.idle.grad is None


def test_state_of_ones_own_is_measured_anew(net):
    optimizer = torch.optim.AdamW(net.parameters())
    trained = dict(net.named_parameters())
    before = update_cost(optimizer, trained)
    for parameter in net.parameters():
        optimizer.state[parameter]["average"] = parameter.detach().clone()
    extra = sum(parameter.nbytes for parameter in net.parameters())
    with pytest.raises(memplan.MemplanError, match="fails when it steps"):
        update_cost(optimizer, trained)  # AdamW takes any state for its own
    optimizer = sgd(net.parameters())
    before = update_cost(optimizer, trained)
    laws.run_step(net, memplan.Sample.of(X), optimizer)
    for parameter in net.parameters():
        optimizer.state[parameter]["average"] = parameter.detach().clone()
    assert update_cost(optimizer, trained).state_bytes == before.state_bytes + extra


def test_a_frozen_parameter_with_a_gradient_left_over(net):
    net(X).backward()
    net.first.requires_grad_(False)
    plan = memplan.plan(net, X, optimizer=sgd(net.second.parameters()))
    assert plan.phases["optimizer"] > 0


def test_restored_puts_all_back_after_an_error(net):
    optimizer = sgd(net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ZeroDivisionError), restored(optimizer):
        laws.run_step(net, memplan.Sample.of(X), optimizer)
        optimizer.param_groups[0]["lr"] = 5
        raise ZeroDivisionError
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1
    assert all(map(torch.equal, before, net.parameters()))
