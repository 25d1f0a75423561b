"""Plain residual networks as two streams, in training and in evaluation."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import memplan
from memplan.passes import invert_couplings, make_reversible
from memplan.transforms.apply import changing

from models.reversible import ResNet
from support import laws, rows

SMALLEST = memplan.Options(on_infeasible="smallest")


class Paired(nn.Module):
    """What ``make_reversible`` should make of a ResNet, written by hand."""

    def __init__(self, net, alpha, beta):
        super().__init__()
        self.net, self.alpha, self.beta = net, alpha, beta

    def forward(self, x):
        x = self.net.stem(x)
        before = None
        for function in self.net.functions:
            change = function(x)
            if change.shape != x.shape:
                before, x = None, sized(x, change) + change
            elif before is None:
                before, x = x, x + change
            else:
                before, x = x, self.alpha * x + self.beta * before + change
        return self.net.classify(x)


def sized(x, like):
    x = nn.functional.avg_pool2d(x, x.shape[-1] // like.shape[-1])
    return nn.functional.pad(x, (0, 0, 0, 0, 0, like.shape[1] - x.shape[1]))


def resnet():
    torch.manual_seed(0)
    sample = (torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))
    return memplan.WithLoss(ResNet(26, width=0.5), nn.functional.cross_entropy), sample


def by_hand(model, alpha, beta):
    return memplan.WithLoss(Paired(model.model, alpha, beta), nn.functional.cross_entropy)


@pytest.mark.by_default("0.3-0.7")
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, 0.5), (0.3, 0.7)])
def test_it_is_the_model_that_one_would_write(alpha, beta):
    model, sample = resnet()
    planned = memplan.optimize(model, sample, budget="100%", passes=[make_reversible(alpha, beta)])
    other = by_hand(copy.deepcopy(model), alpha, beta)
    mine, theirs = laws.step(planned, sample), laws.step(other, sample)
    torch.testing.assert_close(mine.loss, theirs.loss)
    for name, gradient in mine.gradients.items():
        other_gradient = theirs.gradients[name.replace("model.", "model.net.", 1)]
        torch.testing.assert_close(gradient, other_gradient, rtol=1e-3, atol=1e-4)
    assert list(planned.state_dict()) == list(model.state_dict())
    assert memplan.Effect.APPROXIMATE in planned.plan.effects


def test_evaluation_runs_the_two_streams_too():
    model, sample = resnet()
    planned = memplan.optimize(model, sample, budget="100%", passes=[make_reversible()])
    planned.eval()
    other = by_hand(copy.deepcopy(model), 0.0, 1.0).eval()
    with torch.no_grad():
        torch.testing.assert_close(planned(*sample), other(*sample))
        assert not torch.equal(planned(*sample), model(*sample))


@pytest.mark.by_default("vit")
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_a_pretrained_model_starts_as_it_is(name):
    torch.manual_seed(0)
    model, sample = rows.MODELS[name]()
    passes = [make_reversible(alpha=1.0, beta=0.0), invert_couplings()]
    planned = memplan.optimize(model, sample, budget="50%", passes=passes)
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "vit"])
def test_and_can_be_undone_from_there_on(name):
    torch.manual_seed(0)
    model, sample = rows.DEEP[name]()
    passes = [make_reversible(alpha=0.5, beta=0.8), invert_couplings()]
    planned = memplan.optimize(model, sample, budget="1 B", passes=passes, options=SMALLEST)
    full = memplan.optimize(model, sample, budget="100%", passes=passes[:1])
    assert any("can be undone" in note for note in planned.plan.notes)
    laws.step(planned, sample)
    laws.assert_close(laws.step(full, sample), laws.step(planned, sample), 1e-3)
    laws.assert_within_budget(planned, sample)


@pytest.mark.slow
def test_a_small_beta_trips_the_guard():
    model, sample = resnet()
    passes = [make_reversible(alpha=1.0, beta=0.02), invert_couplings()]
    planned = memplan.optimize(model, sample, budget="1 B", passes=passes, options=SMALLEST)
    planned(*sample)
    full = memplan.optimize(model, sample, budget="100%", passes=passes[:1])
    assert memplan.passes.check_drift(planned, sample).is_within_tolerance
    laws.assert_close(laws.step(full, sample), laws.step(planned, sample), 1e-2)


def test_a_polynomial_is_no_block_and_streams_are_let_go():
    class Gelu(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            x = self.layer(x)
            return (x + 0.044715 * x**3).mean()

    model, x = Gelu(), torch.randn(4, 8)
    planned = memplan.optimize(model, x, passes=[make_reversible(0.5, 0.3)])
    with torch.no_grad():
        assert torch.equal(model(x), planned(x))
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            x = x * 1.0
            for _ in range(6):
                x = x + x.tanh()
                seen.append(weakref.ref(x))
            alive.append(sum(one() is not None for one in seen))
            return x

    alive = []
    with changing(Watched(), None, [make_reversible()]) as changed, torch.no_grad():
        changed.model(torch.randn(4, 4))
    assert alive == [2]


def test_planned_modules_can_be_pickled():
    model, sample = resnet()
    passes = [make_reversible(), invert_couplings(grid=True)]
    planned = memplan.optimize(model, sample, budget="60%", passes=passes)
    pickle.loads(pickle.dumps(planned))
