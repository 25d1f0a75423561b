"""New gradients are added into those that are there, as autograd would, and no later."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch

import memplan
from memplan.profiler.devices import read_cpu
from memplan.profiler.step import preserved

from support import laws
from support.rows import MODELS
from support.small import Net, X

STEPS = 4


def micro_batches(module, sample, count=STEPS):
    """The gradients of a loop that scales the loss, from a fixed random state."""
    batch = memplan.Sample.of(sample)
    torch.manual_seed(3)
    for _ in range(count):
        (laws.loss_of(module, batch) / STEPS).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same(mine, theirs):
    for name, gradient in theirs.items():
        other = mine[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


SHORT = ("mlp", "returns_dict")


@pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_accumulated_gradients_are_eagers_and_no_second_set_is_alive(name):
    model, sample = MODELS[name]()
    options = memplan.Options(on_infeasible="smallest")
    planned = memplan.optimize(model, sample, budget="50%", options=options)
    with preserved(model):
        reference = micro_batches(model, sample)
    with preserved(model):
        mine = micro_batches(planned, sample)
        if planned.plan.effects == (memplan.Effect.EXACT,):
            assert_same(mine, reference)
        assert len(planned.plans) == 2
        alone, accumulating = planned.plans
        gradients = sum(g.nbytes for g in mine.values() if g is not None)
        assert accumulating.resident_bytes == alone.resident_bytes + gradients
        batch = memplan.Sample.of(sample)
        peaks = [read_cpu(lambda _: laws.run_step(planned, batch)).peak_bytes for _ in range(3)]
    above = accumulating.peak_bytes - accumulating.resident_bytes
    assert max(peaks) <= above <= 1.01 * max(peaks)
    assert accumulating.peak_bytes <= accumulating.budget_bytes


@pytest.fixture
def net():
    return Net()


def both(net, run):
    """What a function of a module makes of its gradients, planned and untouched."""
    planned = memplan.optimize(net)
    seen = []
    for module in (planned, net):
        net.zero_grad()
        module(X).backward()
        extra = run(module)
        seen.append(([p.grad.clone() for p in net.parameters()], extra))
    (mine, extra), (theirs, other) = seen
    assert all(map(torch.equal, mine, theirs))
    return extra, other


def test_gradients_set_to_none_between_forward_and_backward(net):
    def run(module):
        loss = module(X)
        net.zero_grad()
        loss.backward()

    both(net, run)


def test_gradients_set_to_zero(net):
    def run(module):
        net.zero_grad(set_to_none=False)
        module(X).backward()

    both(net, run)


@pytest.mark.filterwarnings("ignore:.*new gradients are kept beside")
def test_hooks_see_each_gradient(net):
    def run(module):
        seen = {}
        handle = net.first.weight.register_hook(lambda gradient: seen.update(new=gradient.clone()))
        other = net.second.weight.register_post_accumulate_grad_hook(
            lambda parameter: seen.update(total=parameter.grad.clone())
        )
        module(X).backward()
        handle.remove()
        other.remove()
        return seen

    mine, theirs = both(net, run)
    assert all(torch.equal(mine[name], theirs[name]) for name in ("new", "total"))


@pytest.mark.filterwarnings("ignore:.*new gradients are kept beside")
def test_a_sum_with_what_comes_from_elsewhere_is_rounded_as_eagers(net):
    def run(module):
        (module(X) / 3 + 0.3 * net.first.weight.square().sum()).backward()

    both(net, run)


def test_only_the_gradients_that_are_asked_for_change(net):
    def run(module):
        with pytest.warns(UserWarning, match="beside") if module is not net else nullcontext():
            return torch.autograd.grad(module(X), [net.first.weight, net.second.bias])

    mine, theirs = both(net, run)
    assert all(map(torch.equal, mine, theirs))

    def run_some(module):
        with pytest.warns(UserWarning, match="beside") if module is not net else nullcontext():
            module(X).backward(inputs=[net.first.weight])

    both(net, run_some)


def test_two_forwards_before_one_backward(net):
    def run(module):
        (module(X) + module(2 * X)).backward()

    with pytest.warns(UserWarning, match="beside"):
        both(net, run)


def test_a_bucket_that_holds_all_gradients(net):
    def run(module):
        bucket = torch.zeros(sum(p.numel() for p in net.parameters()))
        offset = 0
        for p in net.parameters():
            p.grad = bucket[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
        module(X).backward()
        return bucket

    mine, theirs = both(net, run)
    assert torch.equal(mine, theirs) and mine.abs().sum() > 0


def test_threads_add_one_at_a_time(net):
    planned = memplan.optimize(net, X)
    for _ in range(41):
        net(X).backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()

    def run():
        for _ in range(10):
            planned(X).backward()

    planned(X).backward()
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # all add the same, so their order does not show
    assert all(map(torch.equal, (parameter.grad for parameter in net.parameters()), expected))
