"""Updates in the backward: what they cannot be combined with is refused, by name."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import memplan

from support import laws
from support.small import Net, X, sgd

IN_BACKWARD = memplan.Options(update_in_backward=True)


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def updating(net):
    return memplan.optimize(net, X, optimizer=sgd, options=IN_BACKWARD)


def refused(message):
    return pytest.raises(memplan.PlanMismatch, match=message)


def test_a_parameter_that_is_replaced_is_missed(net):
    planned = memplan.optimize(net, X, optimizer=sgd)
    updating = memplan.optimize(net, X, optimizer=sgd, options=IN_BACKWARD)
    net.first.weight = nn.Parameter(torch.ones(32, 16))
    with pytest.raises(memplan.MemplanError, match=r"misses 1 .*'first.weight'"):
        planned(X[:8])
    with refused("was replaced"):
        updating(X).backward()


def test_updates_in_the_backward_need_an_optimizer(net):
    with pytest.raises(memplan.MemplanError, match="needs optimizer="):
        memplan.optimize(net, X, options=IN_BACKWARD)


def test_clipping_is_refused(net, updating):
    updating(X).backward()
    with refused("gradients that are gone"):
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    with refused("gradients that are gone"):
        nn.utils.clip_grad_value_(net.parameters(), 1.0)


def test_looking_at_a_gradient_is_refused(net, updating):
    updating(X).backward()
    with refused("gradients that are gone"):
        net.first.weight.grad.norm()
    assert "used in the backward" in repr(net.first.weight.grad)


def test_accumulation_is_refused(net, updating):
    updating(X).backward()
    with refused("cannot be accumulated"):
        updating(X).backward()
    updating.optimizer.step()
    updating(X).backward()
    net.zero_grad()
    with refused("without an optimizer.step"):
        updating(X).backward()


def test_gradients_that_are_there_are_refused(net, updating):
    net(X).backward()
    with refused("accumulation"):
        updating(X).backward()


def test_a_scaled_loss_is_refused(net, updating):
    before = [p.detach().clone() for p in net.parameters()]
    with refused("scaled"):
        (updating(X) / 4).backward()
    scaler = torch.amp.GradScaler("cpu")
    with refused("scaled"):
        scaler.scale(updating(X)).backward()
    assert all(map(torch.equal, before, net.parameters()))


def test_settings_changed_after_the_backward_are_refused(net, updating):
    updating(X).backward()
    updating.optimizer.param_groups[0]["lr"] = 0.5
    with refused("was changed between"):
        updating.optimizer.step()


def test_gradients_thrown_away_after_the_backward_are_refused(net, updating):
    updating(X).backward()
    net.zero_grad()
    with refused("set to None between"):
        updating.optimizer.step()


def test_a_hook_that_clips_is_refused_whenever_it_was_registered(net, updating):
    updating.optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(net.parameters(), 1.0) and None
    )
    updating(X).backward()
    with refused("gradients that are gone"):
        updating.optimizer.step()


def test_planning_leaves_no_hook(net):
    optimizer = sgd(net.parameters())
    for _ in range(3):
        memplan.plan(net, X, optimizer=optimizer, options=IN_BACKWARD)
    assert not optimizer._optimizer_step_pre_hooks


def test_hooks_of_all_optimizers_run_once(net, updating):
    calls = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    updating(X).backward()
    updating.optimizer.step()
    handle.remove()
    assert len(calls) == 1


class Stops(torch.optim.SGD):
    """Is interrupted at its second parameter."""

    calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    Stops.calls += 1
                    if Stops.calls == 2 and p.shape == (1,):
                        raise KeyboardInterrupt
                    p.sub_(p.grad, alpha=group["lr"])


def test_an_interrupted_backward_is_remembered(net):
    optimizer = Stops(net.parameters(), lr=0.1)
    planned = memplan.optimize(net, X, optimizer=optimizer, options=IN_BACKWARD)
    Stops.calls = 1
    with pytest.raises(KeyboardInterrupt):
        planned(X).backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    with refused("interrupted"):
        optimizer.step()
    planned(X).backward()
    optimizer.step()


class Clips(torch.optim.SGD):
    """Scales all gradients where their norm is above a bound."""

    @torch.no_grad()
    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.sub_(p.grad / torch.clamp(norm / 100, min=1), alpha=self.param_groups[0]["lr"])


def test_a_bound_that_small_gradients_do_not_reach_is_found(net):
    with pytest.raises(memplan.MemplanError, match="not treat parameters separately"):
        memplan.optimize(net, X, optimizer=partial(Clips, lr=0.1), options=IN_BACKWARD)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.first(x).square().mean(), self.second(x).square().mean()


def test_what_only_an_unused_output_depends_on_has_no_gradient():
    model = TwoHeads()
    planned = memplan.optimize(model, X)
    gradients = []
    for module in (planned, model):
        model.zero_grad()
        module(X)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    assert model.second.weight.grad is None
    model.zero_grad()
    updating = memplan.optimize(model, X, optimizer=sgd, options=IN_BACKWARD)
    with refused("some of the module's outputs"):
        updating(X)[0].backward()


def test_other_uses_of_gradients_are_refused(net, updating):
    with refused("not only to be used"):
        (updating(X) + net.first.weight.sum()).backward()
    with refused("not only to be used"):
        torch.autograd.grad(updating(X), list(net.parameters()))
    with refused("retain_graph"):
        updating(X).backward(retain_graph=True)
    handle = net.first.weight.register_hook(lambda gradient: gradient)
    with refused("hooks"):
        updating(X).backward()
    handle.remove()


class Together(torch.optim.SGD):
    """Scales each update by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad / norm, alpha=-group["lr"])


class Counting(torch.optim.SGD):
    """Counts its steps in the group."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


def test_optimizers_that_mix_parameters_are_refused(net):
    memplan.optimize(net, X, optimizer=partial(Together, lr=0.1))
    for kind in (Together, Counting):
        with pytest.raises(memplan.MemplanError, match="not treat parameters separately"):
            optimizer = kind(net.parameters(), lr=0.1)
            if kind is Counting:
                optimizer.param_groups[0]["count"] = 0
            memplan.optimize(net, X, optimizer=optimizer, options=IN_BACKWARD)


def test_a_copy_updates_its_own_parameters(net, updating):
    duplicate = copy.deepcopy(updating)
    before = [p.detach().clone() for p in net.parameters()]
    duplicate(X).backward()
    duplicate.optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))
    mine = [p.detach().clone() for p in duplicate.parameters()]
    updating(X).backward()
    updating.optimizer.step()
    assert all(map(torch.equal, mine, net.parameters()))


class Tied(nn.Module):
    """One weight, read first and last; recomputation needs it after its first gradient."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.inner = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)])

    def forward(self, tokens):
        states = self.inner(self.table(tokens))
        logits = nn.functional.linear(states * self.table(tokens), self.table.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("budget", ["100%", "60%", "1 B"])
def test_a_parameter_that_is_still_to_be_read_is_updated_later(budget):
    model, tokens = Tied(), torch.randint(0, 32, (8, 32))
    reference = copy.deepcopy(model)
    options = memplan.Options(on_infeasible="smallest", update_in_backward=True)
    planned = memplan.optimize(model, tokens, budget=budget, optimizer=sgd, options=options)
    ordinary = sgd(reference.parameters())
    for module, optimizer in ((planned, planned.optimizer), (reference, ordinary)):
        for _ in range(3):
            laws.run_step(module, memplan.Sample.of(tokens), optimizer)
            optimizer.zero_grad()
    assert all(map(torch.equal, model.parameters(), reference.parameters()))
