"""Blocks that take turns: which ones, when, and what they leave."""

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
from memplan.passes import learn_locally, skip_layers
from memplan.passes.layer_skipping.block_skipping import _drawn

from support import laws
from support.local import SMALLEST, made, refused
from support.skipping import DEPTH, Block, InPlace, net_and_batch, optimized, planned_net, without


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


@pytest.mark.slow
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


class Zeroing(InPlace):
    def forward(self, x):
        x = super().forward(x)
        x[:, 0] = 0.0
        return x


def test_what_is_written_by_an_index_counts():
    model = memplan.WithLoss(nn.Sequential(Zeroing(), Zeroing(), Zeroing()), cross_entropy)
    with refused("what follows its last sum"):
        optimized(model, (torch.randn(4, 8), torch.randint(8, (4,))), mode="blocks", rate=0.4)


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
