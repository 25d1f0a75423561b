"""Layers that are skipped are neither computed nor stored, and what is left is eager's."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import memplan
from memplan.passes import learn_locally, skip_layers, skipped_flops
from memplan.passes.skipped_blocks import _drawn

from support import laws
from support.local import SMALLEST, made, refused
from support.skipping import DEPTH, Block, net_and_batch, on_parts, through_gates, without

MODES = {
    "subset": {"mode": "subset", "rate": 0.4},
    "blocks": {"mode": "blocks", "rate": 0.5},
    "decaying": {"mode": "blocks", "rate": 0.5, "linear_decay": True},
    "gated": {"mode": "gated", "capacity": 0.5},
    "recurrent": {"mode": "gated", "capacity": 0.25, "gate": "recurrent"},
}


SLOW = ("decaying", "recurrent")
SOME = [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in MODES]
"""All modes, and of two kinds the second in ``.ci/full`` only."""


def planned_net(mode, *, budget=None, dropout=0.1, **others):
    model, batch = net_and_batch(dropout=dropout)
    passes = [skip_layers(**{**MODES[mode], **others})]
    return memplan.optimize(model, batch, budget=budget, passes=passes, options=SMALLEST), batch


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


@pytest.mark.parametrize("budget", [None, "1 B"])
def test_blocks_take_turns_in_one_program(budget):
    planned, batch = planned_net("blocks", budget=budget)
    child, reference = planned.layer_skipping, copy.deepcopy(planned.original)
    seen = set()
    for seed in range(8):
        planned.zero_grad()
        torch.manual_seed(seed)
        planned(*batch).backward()
        seen.add(child.skipped)
        assert_as_without(planned, batch, reference, [2.0] * DEPTH, seed)
    assert len(planned.plans) == 1 and len(seen) > 3
    assert {len(one) for one in seen} == {DEPTH // 2}


def assert_as_without(planned, batch, reference, scales, seed):
    """What the last call left, with that seed."""
    child = planned.layer_skipping
    gradients = {name: one.grad for name, one in planned.original.named_parameters()}
    reference.zero_grad()
    torch.manual_seed(seed)
    without(reference, batch, child.skipped, scales).backward()
    for name, parameter in reference.named_parameters():
        mine = gradients[name]
        assert (mine is None) == (parameter.grad is None), name
        is_skipped = any(name.startswith(f"{block}.") for block in child.skipped)
        assert is_skipped == (mine is None), name
        if mine is not None:
            assert torch.equal(mine, parameter.grad), name


def test_late_blocks_are_skipped_more_often():
    planned, batch = planned_net("decaying")
    child, reference = planned.layer_skipping, copy.deepcopy(planned.original)
    chances = [float(one) for one in child.chances()]
    assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(DEPTH / 2)
    steps = {round(one - other, 9) for one, other in pairwise(chances)}
    assert steps == {round(1 / (DEPTH + 1), 9)}
    for seed in range(4):
        planned.zero_grad()
        torch.manual_seed(seed)
        planned(*batch).backward()
        scales = [float(torch.tensor(1 / one)) for one in chances]
        gradients = [p.grad for p in planned.original.parameters()]
        reference.zero_grad()
        torch.manual_seed(seed)
        without(reference, batch, child.skipped, scales).backward()
        for mine, parameter in zip(gradients, reference.parameters(), strict=True):
            assert (mine is None) == (parameter.grad is None)
            if mine is not None:
                torch.testing.assert_close(mine, parameter.grad)
    assert len(planned.plans) == 1


@pytest.mark.parametrize("mode", ["gated", "recurrent"])
@pytest.mark.parametrize("budget", [None, pytest.param("1 B", marks=pytest.mark.slow)])
def test_gates_choose_samples(mode, budget):
    planned, batch = planned_net(mode, budget=budget, dropout=0.0)
    other = copy.deepcopy(planned)
    capacity = MODES[mode]["capacity"]
    planned(*batch).backward()
    through_gates(other, batch, capacity, 0.01).backward()
    names = [name for name, _ in planned.named_parameters()]
    assert sum("layer_skipping" in name for name in names) >= 2 * DEPTH
    for name, one, two in zip(names, planned.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name, rtol=1e-4, atol=1e-6)
    assert planned.plan.effects == (memplan.Effect.APPROXIMATE,)


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


def test_gates_choose_each_sample_by_itself_in_evaluation():
    planned, batch = planned_net("gated", dropout=0.0)
    child, net = planned.layer_skipping, planned.original.model
    with torch.no_grad():
        for number, gate in enumerate(child.gates):
            gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.manual_seed(number)))
        child.gates[2].weight.zero_()
        child.gates[2].bias.fill_(-1.0)
        child.gates[3].weight.zero_()
        child.gates[3].bias.fill_(1.0)
        planned.eval()
        found = planned(*batch)
        x = net.stem(batch[0])
        rates = []
        for gate, block in zip(child.gates, net.blocks, strict=True):
            runs = gate(x.mean(1))[:, 0] > 0
            rates.append(max(float(runs.float().mean()), 1 / 8))
            x = torch.where(runs.view(-1, 1, 1), block(x), x)
        torch.testing.assert_close(found, cross_entropy(net.head(x.mean(1)), batch[1]))
        each = [planned(batch[0][n : n + 1], batch[1][n : n + 1]) for n in range(8)]
        torch.testing.assert_close(found, torch.stack(each).mean())
        planned(*batch)
    assert child.rates.tolist() == pytest.approx(rates)
    assert rates[2] == 1 / 8 and rates[3] == 1 and min(rates[:2]) > 0 and max(rates[:2]) < 1
    assert skipped_flops(planned) == pytest.approx(1 - sum(rates) / DEPTH, abs=0.02)


@pytest.mark.slow
def test_borders_follow_the_batches_and_are_saved():
    planned, batch = planned_net("gated", dropout=0.0)
    child = planned.layer_skipping
    for _ in range(60):
        planned(*batch).backward()
        planned.zero_grad()
    with torch.no_grad():
        planned.eval()
        planned(*batch)
    assert child.rates.tolist() == [0.5] * DEPTH
    other, _ = planned_net("gated")
    other.load_state_dict(planned.state_dict())
    assert torch.equal(other.layer_skipping.borders, child.borders)
    whole, _ = planned_net("gated", capacity=1.0, dropout=0.0)
    whole(*batch).backward()
    with torch.no_grad():
        whole.eval()
        assert torch.allclose(whole(*batch), whole.original(*batch))


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


@pytest.mark.parametrize(
    "chances", [[Fraction(1, 2)] * 6, [1 - Fraction(n, 7) for n in range(1, 7)]]
)
@pytest.mark.parametrize(
    "groups", [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2], [3, 4, 5]], [[n] for n in range(6)]]
)
def test_a_fixed_number_of_blocks_each_with_its_chance(chances, groups):
    drawn = [_drawn(Random(seed), groups, chances) for seed in range(4000)]
    assert {len(one) for one in drawn} == {3}
    for number, chance in enumerate(chances):
        share, p = sum(number in one for one in drawn) / 4000, float(chance)
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 4000)
    counts = {tuple(len(one.intersection(group)) for group in groups) for one in drawn}
    assert len(counts) <= len(groups)


@pytest.mark.slow
def test_unlike_blocks_need_one_program_for_each_run_of_like_ones():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.one = nn.ModuleList([Block(8) for _ in range(3)])
            self.between = nn.Linear(8, 16)
            self.two = nn.ModuleList([Block(16) for _ in range(2)])
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = self.stem(x)
            for block in self.one:
                x = block(x)
            x = self.between(x)
            for block in self.two:
                x = block(x)
            return self.head(x.mean(1))

    torch.manual_seed(0)
    model = memplan.WithLoss(Two(), cross_entropy)
    batch = (torch.randn(4, 3, 8), torch.randint(4, (4,)))
    planned = memplan.optimize(model, batch, passes=[skip_layers("blocks", 0.4)])
    child = planned.layer_skipping
    assert child.seen.kinds == (0, 0, 0, 3, 3)
    counts = set()
    for _ in range(30):
        planned.zero_grad()
        planned(*batch).backward()
        kept = [p.grad is not None for p in planned.original.parameters()]
        assert len(child.skipped) == 2 and sum(kept) < len(kept)
        counts.add(sum(".one." in name for name in child.skipped))
    assert len(planned.plans) == len(counts) == 2
    planned.zero_grad()
    programs = []
    for number in range(150):
        child.drawn.fill_(number)
        programs.append(planned.changed.choose(is_call=False).program)
    measured = set()
    for number, (read, timed) in enumerate(pairwise(programs[1:])):
        # a profile warms up, reads memory, and takes the time; the plan is that of the last step
        if read == timed and read not in measured:
            child.drawn.fill_(number)
            laws.assert_within_budget(planned, batch)
            measured.add(read)
    assert len(measured) == 2


@pytest.mark.slow
def test_choices_go_on_from_a_state():
    planned, batch = planned_net("blocks")
    child = planned.layer_skipping
    choices = []
    for step in range(6):
        planned(*batch).backward()
        planned.zero_grad()
        choices.append(child.skipped)
        if step == 2:
            state = copy.deepcopy(planned.state_dict())
    other, _ = planned_net("blocks")
    other.load_state_dict(state)
    for expected in choices[3:]:
        other(*batch).backward()
        other.zero_grad()
        assert other.layer_skipping.skipped == expected
    memplan.profile(other, batch, steps=1)
    assert int(other.layer_skipping.drawn) == 6
    seeds, _ = planned_net("blocks", seed=1)
    assert [one.skipped for one in [seeds.layer_skipping]] != [choices[0]]


def test_the_choice_stays_while_gradients_wait():
    planned, batch = planned_net("blocks", dropout=0.0)
    child, reference = planned.layer_skipping, copy.deepcopy(planned.original)
    optimizer = torch.optim.SGD(planned.parameters(), lr=0.0)
    for _ in range(3):
        choices = []
        for _ in range(2):
            planned(*batch).backward()
            choices.append(child.skipped)
        assert choices[0] == choices[1]
        reference.zero_grad()
        for _ in range(2):
            without(reference, batch, child.skipped, [2.0] * DEPTH).backward()
        for one, two in zip(planned.original.parameters(), reference.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            assert one.grad is None or torch.equal(one.grad, two.grad)
        optimizer.step()
        optimizer.zero_grad()
    assert len(planned.plans) == 2  # the first of two batches, and the second


def test_what_is_captured_are_the_tensors_of_the_call():
    """Whichever blocks a window began with, its second batch adds to gradients that are there."""
    peaks, skipped = set(), set()
    for seed in (0, 1, 2):
        model, batch = net_and_batch(width=64, batch=2, tokens=2)
        passes = [skip_layers("blocks", 0.5, seed=seed)]
        planned = memplan.optimize(model, batch, passes=passes, budget="100%")
        for _ in range(2):
            planned(*batch).backward()
        peaks.add(planned.plan.peak_bytes)
        skipped.add(planned.layer_skipping.skipped)
    assert len(peaks) == 1 and len(skipped) == 3


def test_gradients_that_are_kept_as_zeros():
    planned, batch = planned_net("blocks", dropout=0.0)
    optimizer = torch.optim.SGD(planned.parameters(), lr=0.1)
    choices = set()
    for _ in range(5):
        planned(*batch).backward()
        choices.add(planned.layer_skipping.skipped)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert len(choices) > 1 and len(planned.plans) == 2


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


def test_statistics_of_blocks_that_take_turns():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[skip_layers("blocks", 0.5)])
    child, net = planned.layer_skipping, model.model
    before = {n: b.clone() for n, b in model.named_buffers()}
    planned(*batch).backward()
    for number, block in enumerate([*net.first, *net.second]):
        name = child.found[number].name
        counts = [int(one) for n, one in block.named_buffers() if "num_batches" in n]
        assert counts == [0, 0] if name in child.skipped else [1, 1]
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers())


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


def optimized(model, batch, **arguments):
    return memplan.optimize(model, batch, passes=[skip_layers(**arguments)])


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


class InPlace(nn.Module):
    """Adds the stream to the change in place, as torchvision writes it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        out = self.two(self.one(x))
        out += x
        return out


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


class Chain(nn.Module):
    """Blocks that are alike, with a function of them and an input as the forward."""

    def __init__(self, function, depth=4):
        super().__init__()
        self.function = function
        self.blocks = nn.ModuleList([InPlace() for _ in range(depth)])

    def forward(self, x, weights):
        return (self.function(self.blocks, x) * weights).sum()


def scaled_between(blocks, x):
    for number, block in enumerate(blocks):
        x = block(x)
        if number == 1:
            x = x.relu() * 3
    return x


def two_towers(blocks, x):
    one, other = x, 2 * x
    for block in blocks[:2]:
        one = block(one)
    for block in blocks[2:]:
        other = block(other)
    return one.sin() + other


def collected(blocks, x):
    outs = []
    for block in blocks:
        x = block(x)
        outs.append(x)
    return x + 10 * outs[1].sin()


@pytest.mark.parametrize("function", [scaled_between, two_towers, collected])
def test_blocks_take_turns_only_where_one_follows_the_other(function):
    torch.manual_seed(0)
    model, batch = Chain(function), (torch.randn(5, 8), torch.randn(5, 8))
    planned = memplan.optimize(model, batch, passes=[skip_layers("blocks", 0.5)])
    for _ in range(8):
        planned.zero_grad()
        mine = planned(*batch)
        mine.backward()
        skipped = planned.layer_skipping.skipped
        run = [
            (lambda x: x)
            if f"blocks.{n}" in skipped
            else (lambda x, b=b: torch.add(x, b.two(b.one(x)), alpha=2))
            for n, b in enumerate(model.blocks)
        ]
        torch.testing.assert_close(mine, (function(run, batch[0]) * batch[1]).sum())
        for n, block in enumerate(model.blocks):
            assert (block.one.weight.grad is None) == (f"blocks.{n}" in skipped)


class Named(nn.Module):
    """A child has children of the names of the blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([InPlace() for _ in range(4)])
        self.aux = nn.Module()
        self.aux.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        for layer in self.aux.layers:
            x = layer(x).tanh()
        return x.sum()


def test_other_children_of_the_same_names_stay_where_they_are():
    torch.manual_seed(0)
    model, batch = Named(), (torch.randn(5, 8),)
    planned = memplan.optimize(model, batch, passes=[skip_layers("blocks", 0.5)])
    for _ in range(6):
        planned.zero_grad()
        mine = planned(*batch)
        mine.backward()
        x = batch[0]
        for n, layer in enumerate(model.layers):
            if f"layers.{n}" not in planned.layer_skipping.skipped:
                x = torch.add(x, layer.two(layer.one(x)), alpha=2)
        for layer in model.aux.layers:
            x = layer(x).tanh()
        torch.testing.assert_close(mine, x.sum())


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Custom(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.inside = factor, nn.Linear(8, 8)

    def forward(self, x):
        return x + Straight.apply(self.inside(x), self.factor)


def test_blocks_with_backwards_of_their_own_are_not_alike():
    torch.manual_seed(0)
    blocks = nn.Sequential(*[Custom(10.0**n) for n in range(4)])
    model = memplan.WithLoss(blocks, lambda x, weights: (x * weights).sum())
    batch = (torch.randn(5, 8), torch.randn(5, 8))
    planned = memplan.optimize(model, batch, passes=[skip_layers("blocks", 0.5)])
    assert planned.layer_skipping.seen.kinds == (0, 1, 2, 3)


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


class Zeroing(InPlace):
    def forward(self, x):
        x = super().forward(x)
        x[:, 0] = 0.0
        return x


def test_what_is_written_by_an_index_counts():
    model = memplan.WithLoss(nn.Sequential(Zeroing(), Zeroing(), Zeroing()), cross_entropy)
    with refused("what follows its last sum"):
        optimized(model, (torch.randn(4, 8), torch.randint(8, (4,))), mode="blocks", rate=0.4)


def test_gates_refuse_what_they_cannot_do():
    model, (x, _) = net_and_batch()
    with refused("returns no scalars"):
        optimized(model.model, (x,), mode="gated")
    assert optimized(model.model, (x,), mode="gated", cost=0).plan


@pytest.mark.slow
def test_the_plan_of_the_sample_is_that_of_the_first_call_beside_another_pass():
    model, batch = net_and_batch()
    passes = [
        skip_layers("blocks", 0.5),
        learn_locally(2),
    ]  # which blocks are alike depends on both
    planned = memplan.optimize(model, batch, passes=passes, options=SMALLEST)
    seen = planned.plan
    assert memplan.plan(model, batch, passes=passes, options=SMALLEST) == seen
    planned(*batch).backward()
    assert planned.plans == (seen,)
