"""Layers that are skipped are neither computed nor stored, and what is left is eager's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import memplan
from memplan.passes import skip_layers

from support import laws
from support.local import made, refused
from support.skipping import MODES, InPlace, net_and_batch, on_parts, optimized, planned_net

SLOW = ("decaying", "recurrent")
SOME = [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in MODES]
"""All modes, and of two kinds the second in ``.ci/full`` only."""


@pytest.mark.parametrize("budget", [None, "1 B"])
def test_branches_on_a_part_of_the_batch(budget):
    planned, batch = planned_net("subset", budget=budget)
    reference = copy.deepcopy(planned.original)
    for seed in (1, 2):
        assert_as(planned, batch, lambda: on_parts(reference, batch, 0.4), reference, seed)


def assert_as(planned, batch, in_eager, reference, seed):
    planned.zero_grad()
    reference.zero_grad()
    torch.manual_seed(seed)
    mine = planned(*batch)
    mine.backward()
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    theirs = in_eager()
    theirs.backward()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(mine, theirs)
    for (name, one), two in zip(
        planned.original.named_parameters(), reference.parameters(), strict=True
    ):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.equal(one.grad, two.grad), name


@pytest.mark.by_default("blocks")
@pytest.mark.parametrize("mode", ["subset", "blocks"])
def test_evaluation_is_the_originals(mode):
    planned, batch = planned_net(mode)
    planned.eval()
    with torch.no_grad():
        assert torch.equal(planned(*batch), planned.original(*batch))
    planned.original.zero_grad()
    mine, theirs = laws.step(planned, batch), laws.step(planned.original, batch)
    assert torch.equal(mine.loss, theirs.loss)
    for name, gradient in theirs.gradients.items():
        assert torch.equal(mine.gradients[name], gradient), name
    planned.train()
    with torch.no_grad():
        torch.manual_seed(0)
        loss = planned(*batch)
        torch.manual_seed(0)
        assert torch.equal(loss, planned.original(*batch))
    exported = planned.export()
    assert type(exported) is type(planned.original)


class Adding(nn.Module):
    """A branch that reads the first half and writes the second: outputs are sums of branches."""

    def __init__(self, width=4):
        super().__init__()
        self.inside = nn.Linear(width, width)

    def forward(self, x):
        made = self.inside(x[:, : x.shape[1] // 2])
        return x + torch.cat([torch.zeros_like(made), made], 1)


class Sums(nn.Module):
    def __init__(self, depth=4, width=4):
        super().__init__()
        self.first = nn.Linear(3, 2 * width)
        self.blocks = nn.Sequential(*[Adding(width) for _ in range(depth)])

    def forward(self, x, weights):
        y = self.blocks(self.first(x))
        return (y * weights).sum(), y


@pytest.mark.parametrize("mode", ["subset", "blocks", "decaying"])
def test_outputs_and_gradients_are_right_in_the_mean(mode):
    """Within 4 standard errors; the seeds are fixed."""
    torch.manual_seed(0)
    model, batch = Sums(), (torch.randn(5, 3), torch.randn(5, 8))
    planned = memplan.optimize(model, batch, passes=[skip_layers(**MODES[mode])])
    samples = []
    for seed in range(600):
        planned.zero_grad()
        torch.manual_seed(seed)
        loss, y = planned(*batch)
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        samples.append(torch.cat([y.detach().flatten(), *(one.flatten() for one in grads)]))
    model.zero_grad()
    loss, y = model(*batch)
    loss.backward()
    expected = torch.cat([y.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])
    stacked = torch.stack(samples).double()
    errors = (stacked.mean(0) - expected).abs()
    standard = stacked.std(0) / math.sqrt(len(samples))
    assert bool((errors <= 4 * standard + 1e-5).all())
    assert bool((standard > 1e-3).any())


@pytest.mark.by_default("blocks")
@pytest.mark.parametrize("mode", ["subset", "blocks", "gated"])
def test_with_an_optimizer_and_an_update_in_the_backward(mode):
    model, batch = net_and_batch()
    for inside in (False, True):
        model.zero_grad()
        planned = memplan.optimize(
            model,
            batch,
            passes=[skip_layers(**MODES[mode])],
            optimizer=torch.optim.AdamW,
            options=memplan.Options(update_in_backward=inside),
        )
        before = [p.detach().clone() for p in planned.parameters()]
        planned(*batch).backward()
        planned.optimizer.step()
        changed = [
            not torch.equal(one, two) for one, two in zip(before, planned.parameters(), strict=True)
        ]
        assert any(changed) and all(changed) == (mode != "blocks")


@pytest.mark.by_default("subset")
@pytest.mark.parametrize("mode", SOME)
def test_under_autocast_and_as_a_copy(mode):
    planned, batch = planned_net(mode)
    other = copy.deepcopy(planned)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        torch.manual_seed(0)
        mine = planned(*batch)
        torch.manual_seed(0)
        theirs = other(*batch)
    mine.backward()
    theirs.backward()
    assert torch.equal(mine, theirs)
    for one, two in zip(planned.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)


@pytest.mark.by_default("blocks")
@pytest.mark.parametrize("mode", SOME)
def test_another_shape_is_planned_anew(mode):
    planned, (x, labels) = planned_net(mode)
    planned(x[:6, :3], labels[:6]).backward()
    assert len(planned.plans) == 2


def test_rate_0_is_the_unchanged_model():
    model, batch = net_and_batch()
    for mode in ("subset", "blocks"):
        planned = memplan.optimize(model, batch, passes=[skip_layers(mode, 0)])
        assert planned.plan.effects == (memplan.Effect.EXACT,)
        laws.assert_same_bits(laws.step(planned, batch), laws.step(model, batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "half"}, "mode is one of subset, blocks, gated"),
        ({"rate": 1.0}, "0 <= rate < 1"),
        ({"rate": -0.1}, "0 <= rate < 1"),
        ({"rate": True}, "0 <= rate < 1"),
        ({"mode": "gated", "rate": 0.5}, "rate does not go with mode='gated'"),
        ({"mode": "gated", "capacity": 0.0}, "0 < capacity <= 1"),
        ({"mode": "gated", "gate": "deep"}, "gate is one of linear, recurrent"),
        ({"mode": "gated", "cost": -1}, "cost is a weight"),
        ({"mode": "blocks", "capacity": 0.5}, "capacity does not go with"),
        ({"mode": "blocks", "batch_norm": True}, "batch_norm does not go with"),
        ({"linear_decay": True}, "linear_decay does not go with"),
        ({"at": "*.0"}, "at does not go with"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with refused(message):
        skip_layers(**arguments)


def test_batches_that_are_too_small():
    model, (x, labels) = net_and_batch()
    one = (x[:1], labels[:1])
    with refused("batch is too small: rate=0.4 of 1 samples is none"):
        optimized(model, one, mode="subset", rate=0.4)
    with refused("batch is too small: capacity=0.4 of 1 samples is none"):
        optimized(model, one, mode="gated", capacity=0.4)
    with refused("rate=0.05 of 4 blocks .* is none"):
        optimized(model, one, mode="blocks", rate=0.05)
    with refused("rate=0.95 of 4 blocks .* is all"):
        optimized(model, one, mode="blocks", rate=0.95)
    with refused("less than 0.62"):
        optimized(model, one, mode="blocks", rate=0.67, linear_decay=True)


@pytest.mark.by_default("subset", "blocks", "gated")
@pytest.mark.parametrize("mode", ["subset", "blocks", "gated"])
def test_models_without_residual_branches(mode):
    model = memplan.WithLoss(
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), cross_entropy
    )
    with refused(r"no residual branch: a sum x \+ f\(x\)"):
        optimized(model, (torch.randn(4, 4), torch.randint(4, (4,))), mode=mode)


def test_branches_that_cannot_be_skipped_say_why():
    model, batch = made("resnet")
    with refused(r"batch norm \('model.first.0.inside.1'\)"):
        optimized(model, batch, mode="subset")
    with refused("what follows its last sum"):
        optimized(PostNorm(), (torch.randn(4, 8),), mode="blocks")
    with refused("no blocks to skip, or not all"):
        optimized(*net_and_batch(), mode="blocks", at="model.head")
    with refused("is used elsewhere as well"):
        optimized(Leaking(), (torch.randn(4, 8),), mode="subset")


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(3)])
        self.blocks = nn.ModuleList([Normed() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.inside(x))


class Leaking(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(8, 8)

    def forward(self, x):
        made = self.inside(x)
        return ((x + made) * made).mean()


@pytest.mark.parametrize("mode", ["subset", "blocks"])
def test_sums_in_place(mode):
    torch.manual_seed(0)
    blocks = nn.Sequential(*[InPlace() for _ in range(4)])
    model = memplan.WithLoss(blocks, lambda x, weights: (x * weights).sum())
    batch = (torch.randn(5, 8), torch.randn(5, 8))
    planned = memplan.optimize(model, batch, passes=[skip_layers(**MODES[mode])])
    torch.manual_seed(1)
    mine = planned(*batch)
    torch.manual_seed(1)
    x = batch[0]
    for number, block in enumerate(blocks):
        if mode == "subset":
            chosen = torch.randperm(5)[:3]
            made = block.two(block.one(x[chosen]))
            x = torch.index_add(x, 0, chosen, made, alpha=5 / 3)
        elif f"model.{number}" not in planned.layer_skipping.skipped:
            x = torch.add(x, block.two(block.one(x)), alpha=2)
    torch.testing.assert_close(mine, (x * batch[1]).sum())


def divided(m, x):
    count = x.shape[0]
    x = x + m.inside(x)
    return x.square().sum() / count


def viewed(m, x):
    count = x.shape[0]
    x = x * 1
    return (x + m.inside(x).view(count, 2, -1).flatten(1)).sum()


def written(m, x):
    made = m.inside(x)
    made.add_(x)
    return made.sum()


class Sized(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.inside = function, nn.Linear(8, 8)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (divided, "both inside a residual branch and outside"),
        (viewed, "both inside a residual branch and outside"),
        (written, r"write x \+ f\(x\), or out \+= x"),
    ],
)
def test_sizes_that_leak_are_refused(function, message):
    with refused(message):
        optimized(Sized(function), (torch.randn(5, 8),), mode="subset")
