"""Which sums are residual branches, what they read, and which modules are blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from memplan.analysis import Record, find_blocks, find_branches, flops_of

from support.skipping import Block, net_and_batch


def found_in(model, *inputs):
    """The branches of a model, and two records of its forward."""
    records = []
    for given in (inputs, [torch.cat([one, one[:1]]) for one in inputs]):
        record = Record(model)
        record.of(lambda given=given: model(*given))
        records.append(record)
    return find_branches(model, *records, len(inputs[0])), records


class Of(nn.Module):
    """A model of one function of two linear layers and its inputs."""

    def __init__(self, function, width=8):
        super().__init__()
        self.function = function
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def plain(m, x):
    return x + m.one(x)


def other_way_round(m, x):
    return m.one(x) + x


def in_place(m, x):
    x = m.two(x)
    x += m.one(x)
    return x.relu_()


def as_it_is(m, x):
    """Functions that return what they are given."""
    x = m.two(x)
    y = x.to(torch.float32).contiguous()
    return x + m.one(y)


def nested(m, x):
    x = m.two(x)
    y = m.one(x)
    return x + (y + m.two(y))


def twice(m, x):
    return plain(m, plain(m, x))


def in_parallel(m, x):
    return m.one(x) + m.two(x) + x


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (plain, 1),
        (other_way_round, 1),
        (in_place, 1),
        (as_it_is, 1),
        (nested, 1),
        (twice, 2),
        (in_parallel, 1),
        (lambda m, x: m.one(x) + m.two(x), 0),
        (lambda m, x: x + functional.gelu(x), 0),  # nothing is learned in it
        (lambda m, x: 0.5 * m.one(x) * (1 + torch.tanh(x + 0.04 * x**3)), 0),
        (lambda m, x: m.one(x) + m.one.bias, 0),
        (lambda m, x: torch.add(x, m.one(x), alpha=2), 0),
        (lambda m, x: x.sum(1) + m.one(x).sum(1), 0),
    ],
)
def test_sums(function, count):
    branches, _ = found_in(Of(function), torch.randn(4, 8))
    assert len(branches.found) == count


def test_the_innermost_is_taken():
    branches, (record, _) = found_in(Of(nested), torch.randn(4, 8))
    (branch,) = branches.found
    assert record.calls[branch.number + 1].key == (record.calls[-1].key)


def leaking(m, x):
    y = m.one(x)
    return (x + y) * y


def returned(m, x):
    y = m.one(x)
    return x + y, y


def merged(m, x, y):
    """Branches on tensors whose batch is no dimension of its own."""
    x = x.flatten(0, 1)
    return (x + m.one(x)).view_as(y)


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (leaking, (torch.randn(4, 8),), "elsewhere"),
        (returned, (torch.randn(4, 8),), "elsewhere"),
        (merged, (torch.randn(4, 2, 8), torch.randn(4, 2, 8)), "no dimension of its own"),
        (lambda m, x: m.one.weight * 1 + m.two(m.one.weight * 1), (torch.randn(4, 8),), ""),
    ],
)
def test_why_not(function, inputs, reason):
    branches, _ = found_in(Of(function), *inputs)
    assert not branches.found
    assert all(reason in why for why in branches.blocked.values())


def test_the_batch_is_told_from_a_length_of_the_same_size():
    def forward(m, x, mask):
        scores = m.one(x) @ m.one(x).transpose(1, 2)
        hidden = torch.ones(4, 4).tril()  # no batch, and of its size
        return x + (scores * hidden * mask[:, None]).softmax(2) @ m.two(x)

    branches, (record, _) = found_in(Of(forward), torch.randn(4, 4, 8), torch.ones(4, 4))
    (branch,) = branches.found
    inside = {call.key: call for call in record.calls}
    read = [
        inside[key].given[[g.place for g in inside[key].given].index(one.place)].shape
        for key, entries in branch.entries.items()
        for one in entries
    ]
    assert branch.dim == 0 and torch.Size([4, 4, 8]) in read and torch.Size([4, 1, 4]) in read
    assert torch.Size([4, 4]) not in read


def test_batches_in_the_second_dimension():
    def forward(m, x):
        y = x.transpose(0, 1)
        return y + m.one(y)

    branches, _ = found_in(Of(forward), torch.randn(4, 3, 8))
    assert [one.dim for one in branches.found] == [1]


def blocks_of(model, *inputs, names=None):
    branches, (record, larger) = found_in(model, *inputs)
    return find_blocks(model, record, larger, branches.found, names)


def test_blocks_and_kinds():
    model, (x, _) = net_and_batch(depth=6)
    net = model.model
    blocks, _ = blocks_of(net, x)
    assert [one.name for one in blocks] == [f"blocks.{n}" for n in range(6)]
    assert all(one.is_identity and len(one.branches) == 2 for one in blocks)
    assert all(one.kind == blocks[0].kind for one in blocks)
    with torch.no_grad():
        leaves = torch.randn(3, 5, 16)
        assert blocks[0].passed_on((leaves,), {}) is leaves


@pytest.mark.parametrize("change", ["dropout", "attribute", "tie", "dtype"])
def test_what_makes_a_block_another(change):
    model, (x, _) = net_and_batch(depth=6)
    net = model.model
    if change == "dropout":
        net.blocks[2].mlp[3].eval()
    elif change == "attribute":
        net.blocks[2].attention.heads = 4
    elif change == "tie":
        net.blocks[2].mlp[1].weight = net.blocks[4].mlp[1].weight
    else:
        net.blocks[2].mlp[0].double()
        net.blocks[2].mlp[0].forward = lambda x: x
    blocks, _ = blocks_of(net, x)
    kinds = [one.kind for one in blocks]
    assert kinds[2] != kinds[1] and kinds[0] == kinds[1] == kinds[3]


def test_what_is_no_block():
    class Wider(Block):
        def forward(self, x):
            return torch.cat([super().forward(x)] * 2, 2)

    class Pair(Block):
        def forward(self, x):
            return super().forward(x), x.mean()

    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.blocks = nn.ModuleList([kind(8), kind(8)])

        def forward(self, x):
            return [block(x) for block in self.blocks]

    for kind, reason in ((Wider, "shape that it returns"), (Pair, "more than one tensor")):
        blocks, blocked = blocks_of(Model(kind), torch.randn(4, 3, 8))
        assert not blocks and reason in blocked["blocks.0"] and reason in blocked["blocks.1"]
    shared = Model(Block)
    shared.blocks[1] = shared.blocks[0]
    names = frozenset({"blocks.0"})
    blocks, blocked = blocks_of(shared, torch.randn(4, 3, 8), names=names)
    assert not blocks and "more than once" in blocked["blocks.0"]


def test_operations_of_modules():
    model, (x, _) = net_and_batch(depth=6)
    net = model.model
    flops = flops_of(net, lambda: net(x))
    assert flops["blocks.0"] == flops["blocks.5"] > flops["blocks.0.mlp"] > 0
    assert 6 * flops["blocks.0"] < flops[""] < 6.2 * flops["blocks.0"]
