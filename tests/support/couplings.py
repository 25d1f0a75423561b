"""Networks of two streams, and plans in which every stream that can comes back from a later one."""

from __future__ import annotations

import torch
from torch import nn

import memplan
from memplan.compiler.lower import lower
from memplan.compiler.request import make_request
from memplan.passes import invert_couplings
from memplan.planner.account import account_of, to_schedule
from memplan.planner.problem import make_problems
from memplan.planner.starts import starts
from memplan.transforms.apply import changing

from models.reversible import RevNet, RevViT

WIDTH = 32


def function(dropout=0.0, norm="layer"):
    norms = {"layer": nn.LayerNorm(WIDTH), "batch": OverTokens(nn.BatchNorm1d(WIDTH))}
    return nn.Sequential(norms[norm], nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(dropout))


class OverTokens(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).view(x.shape)


class Streams(nn.Module):
    """Couplings of two streams, written in one of several ways."""

    def __init__(self, how="tuple", layers=8, coefficient=1.0, **settings):
        super().__init__()
        self.how, self.coefficient = how, coefficient
        self.stem = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.functions = nn.ModuleList(function(**settings) for _ in range(layers))
        self.head = nn.Linear(2 * WIDTH, 10)

    def forward(self, x):
        pairs = list(zip(self.functions[::2], self.functions[1::2], strict=True))
        return self.head(getattr(self, f"by_{self.how}")(self.stem(x), pairs)).mean(1)

    def by_tuple(self, x, pairs):
        streams = x.chunk(2, -1)
        for f, g in pairs:
            first = streams[0] + f(streams[1])
            streams = first, streams[1] + g(first)
        return torch.cat(streams, -1)

    def by_chunk(self, x, pairs):
        for f, g in pairs:
            one, other = x.chunk(2, -1)
            one = one + f(other)
            x = torch.cat([one, other + g(one)], -1)
        return x

    def by_slice(self, x, pairs):
        for f, g in pairs:
            one = f(x[..., WIDTH:]) + x[..., :WIDTH]
            x = torch.cat([one, x[..., WIDTH:] + g(one)], -1)
        return x

    def by_minus(self, x, pairs):
        one, other = x.chunk(2, -1)
        for f, g in pairs:
            one = one - f(other)
            other = torch.add(other, g(one), alpha=0.5)
        return torch.cat([one, other], -1)

    def by_scale(self, x, pairs):
        one, other = x.chunk(2, -1)
        for f, g in pairs:
            one = self.coefficient * one + f(other)
            other = g(one) + other * self.coefficient
        return torch.cat([one, other], -1)


def classifier(model, *shape):
    sample = (torch.randn(*shape), torch.randint(0, 10, shape[:1]))
    return memplan.WithLoss(model, nn.functional.cross_entropy), sample


def streams(**settings):
    return classifier(Streams(**settings), 8, 16, 2 * WIDTH)


ROWS = {
    "revnet": lambda: classifier(RevNet(38, width=0.5), 8, 3, 32, 32),
    "bottlenecks": lambda: classifier(RevNet(38, width=0.5, has_bottlenecks=True), 4, 3, 32, 32),
    "vit": lambda: classifier(RevViT(4, 32, dropout=0.5), 4, 3, 32, 32),
    "tuple": lambda: streams(dropout=0.5, norm="batch"),
    "chunk": lambda: streams(how="chunk", dropout=0.5),
    "slice": lambda: streams(how="slice", norm="batch"),
    "minus": lambda: streams(how="minus"),
    "scale": lambda: streams(how="scale", coefficient=0.7),
}


def lowered(model, sample, *passes):
    request = make_request(
        model,
        passes=passes,
    )
    batch = memplan.Sample.of(sample)
    with changing(model, batch, request.passes) as changed:
        return lower(changed, batch, request)


def undone(model, sample, *passes):
    """The model under a plan in which every stream that can comes back from a later one."""
    step = lowered(model, sample, *(passes or (invert_couplings(),)))
    program = step.captured.program
    problem = make_problems(program, step.recoveries, step.costs)[1][0]
    schedule = to_schedule(problem, account_of(problem, starts(problem, 0)[1]))
    plan = step.describe(schedule, budget_bytes=None)
    return memplan.optimize(model, sample, plan=plan)


def num_undone(planned):
    """How many values come back from later ones."""
    step = next(reversed(planned._steps.values()))[-1].step
    ops = {one.restore_op.id for one in step.recoveries if one.restore_op.target == "memplan.undo"}
    return sum(op in ops for op in step.plan.schedule.restored_ops)


PUT_TOGETHER = ("chunk", "slice")
"""Rows whose streams are one tensor between blocks; functions then read another layout of them."""
