"""What a step will take, known before it is run."""

from __future__ import annotations

import inspect
import random
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import nn

import memplan
from memplan.costs import DEVICES
from memplan.ir.memory_trace import SAVED, TEMPORARY, Allocation, MemoryTrace, Resident
from memplan.profiler import estimate, profile
from memplan.profiler.caching_allocator import reserved_bytes
from memplan.torch_internals import allocations, recording

from support.known import Known, Outer
from support.rows import MODELS

MIB = 2**20


@pytest.mark.by_default("bert", "resnet", "experts", "autoencoder", "frozen", "returns_dict")
@pytest.mark.parametrize("name", MODELS)
def test_an_estimate_is_what_is_measured(name):
    model, batch = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters())
    seen = profile(model, batch, optimizer=optimizer, steps=1)
    measured = estimate(model, batch, optimizer=optimizer, costs="measured")
    assert measured.refusals == ()
    assert abs(measured.peak_bytes - seen.peak_bytes) <= 0.001 * seen.peak_bytes
    assert measured.trace.resident_bytes == seen.resident_bytes
    analytic = estimate(model, batch, optimizer=optimizer)
    assert analytic.least_bytes <= seen.peak_bytes <= analytic.most_bytes
    assert analytic.least_bytes <= analytic.peak_bytes <= analytic.most_bytes


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_are_measured_with_as_many_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, batch = MODELS["unet"]()
        seen = profile(model, batch, steps=1)
        found = estimate(model, batch, costs="measured")
    finally:
        torch.set_num_threads(before)
    assert abs(found.peak_bytes - seen.peak_bytes) <= 0.001 * seen.peak_bytes


def test_nothing_is_allocated():
    width, layers, batch = 4096, 8, 512
    with torch.device("meta"):
        body = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        model = memplan.WithLoss(body, nn.functional.mse_loss)
        sample = (torch.randn(batch, width), torch.randn(batch, width))
        optimizer = torch.optim.AdamW(model.parameters())
    with recording() as recorded:
        found = estimate(model, sample, optimizer=optimizer)
    held = max(accumulate(nbytes for _, nbytes in allocations(recorded)), default=0)
    assert held < 2 * MIB
    # Parameters, two moments and gradients of every layer, at the least.
    assert found.peak_bytes > 4 * layers * width * width * 4
    assert found.peak_bytes < 6 * layers * width * width * 4


class Careless(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.calls, self.last = 0, None

    def forward(self, x):
        self.calls += 1
        self.last = self.norm(self.layer(nn.functional.dropout(x)))
        scale = random.random() + np.random.random()
        return (self.last * scale).square().mean()


def test_all_is_as_it_was():
    model, x = Careless(), torch.randn(4, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    contents = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    values = {name: gradient.clone() for name, gradient in gradients.items()}
    states = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    estimate(model, x, optimizer=optimizer)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert (model.calls, model.last, optimizer.state) == (0, None, {})
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(now[name] is tensor for name, tensor in tensors.items())
    assert all(torch.equal(now[name], content) for name, content in contents.items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name] and torch.equal(parameter.grad, values[name])


def test_op_module_and_line_of_the_largest_blocks_are_known():
    trace = estimate(Outer(), torch.zeros(256, 1024)).trace
    lines, first = inspect.getsourcelines(Known)

    def at(text):
        number = first + next(n for n, line in enumerate(lines) if text in line)
        return f"{inspect.getsourcefile(Known)}:{number}"

    # In the backward of the square, its two gradients stand beside what was saved.
    live = sorted(trace.live(trace.peak_event), key=lambda block: block.made)
    largest = [block for block in live if block.nbytes >= MIB]
    assert [(b.nbytes, b.category, b.phase, b.op, b.module, b.source) for b in largest] == [
        (MIB, SAVED, "forward", "aten::exp", "known", at("torch.exp")),
        (8 * MIB, SAVED, "forward", "aten::cat", "known", at("torch.cat")),
        (8 * MIB, TEMPORARY, "backward", "aten::mul", "known", at("wide * wide")),
        (8 * MIB, TEMPORARY, "backward", "aten::mul", "known", at("wide * wide")),
    ]
    assert [block.name for block in trace.blocks if block.name] == ["known.weight"]


class Asking(nn.Module):
    """Takes eight times as much if its input is positive."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1024))

    def forward(self, x):
        x = x * self.weight
        if x.sum() > 0:
            x = torch.cat([x] * 8)
        return x.exp().sum()


def test_a_question_is_answered_with_yes():
    positive, negative = torch.ones(64, 1024), -torch.ones(64, 1024)
    peak_bytes = profile(Asking(), positive, steps=1).peak_bytes
    assert profile(Asking(), negative, steps=1).peak_bytes < 0.5 * peak_bytes
    for batch in (positive, negative):
        found = estimate(Asking(), batch, costs="measured")
        assert abs(found.peak_bytes - peak_bytes) <= 64


class Choosing(nn.Module):
    """Has a size that depends on data."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1024))

    def forward(self, x):
        x = x * self.weight
        return x[x > 0].sum()


def test_a_size_that_depends_on_data_is_refused():
    with pytest.raises(memplan.MemplanError, match="cannot be followed without data") as caught:
        estimate(Choosing(), torch.ones(64, 1024))
    assert str(caught.value).startswith("Choosing's step") and "\n" not in str(caught.value)


def reserved(*events, residents=()):
    """What is reserved for a trace: bytes are taken, and a number is the block given back."""
    taken = [(n, nbytes) for n, nbytes in enumerate(events) if nbytes >= MIB / 8]
    freed = {event: n for n, event in enumerate(events) if event < MIB / 8}
    blocks = [
        Allocation(nbytes, SAVED, "forward", "", "", "", "", made, freed.get(number))
        for number, (made, nbytes) in enumerate(taken)
    ]
    assert len(taken) + len(freed) == len(events) and set(freed) <= set(range(len(taken)))
    before = tuple(Resident("", nbytes, "parameter") for nbytes in residents)
    times_s = tuple(map(float, range(len(events))))
    return reserved_bytes(MemoryTrace("predicted", "", before, tuple(blocks), times_s, ()))


def test_segments_are_as_large_as_requests_need():
    assert reserved() == 0
    # Up to 1 MiB from segments of 2 MiB, below 10 MiB from those of 20 MiB, then of their own.
    assert reserved(MIB // 2) == reserved(MIB) == 2 * MIB
    assert reserved(MIB + 1) == reserved(3 * MIB // 2) == reserved(10 * MIB - 512) == 20 * MIB
    assert reserved(10 * MIB) == 10 * MIB
    assert reserved(30 * MIB) == 30 * MIB
    assert reserved(30 * MIB + 1) == 32 * MIB
    assert reserved(MIB // 2, residents=[30 * MIB]) == 32 * MIB


def test_segments_are_shared_within_a_pool():
    assert reserved(*[MIB // 2] * 4) == 2 * MIB
    assert reserved(*[MIB // 2] * 5) == 4 * MIB
    assert reserved(9 * MIB, 9 * MIB, 2 * MIB) == 20 * MIB
    assert reserved(9 * MIB, 9 * MIB, 3 * MIB) == 40 * MIB
    assert reserved(9 * MIB, MIB) == 22 * MIB


def test_what_was_given_back_is_used_again():
    assert reserved(30 * MIB, 0, 30 * MIB) == 30 * MIB
    assert reserved(30 * MIB, 30 * MIB) == 60 * MIB
    assert reserved(30 * MIB, 0, 32 * MIB) == 62 * MIB
    # The smallest block that is large enough: 12 MiB, and 30 MiB stay whole.
    assert reserved(30 * MIB, 12 * MIB, 0, 1, 12 * MIB, 30 * MIB) == 42 * MIB


def test_a_block_is_split_if_more_than_a_mib_is_left():
    assert reserved(30 * MIB, 0, 28 * MIB, 2 * MIB) == 30 * MIB
    assert reserved(30 * MIB, 0, 29 * MIB - 512, MIB + 512) == 30 * MIB
    assert reserved(30 * MIB, 0, 29 * MIB, MIB + 512) == 50 * MIB
    # Not split, the block is found again as a whole.
    assert reserved(30 * MIB, 0, 29 * MIB, 1, 30 * MIB) == 30 * MIB


def test_free_neighbours_are_joined():
    # Three blocks fill a segment; the first and the second, or all, then make room for another.
    thirds = [9 * MIB, 9 * MIB, 2 * MIB]
    assert reserved(*thirds, 0, 1, 18 * MIB) == 20 * MIB
    assert reserved(*thirds, 1, 0, 18 * MIB) == 20 * MIB
    assert reserved(*thirds, 0, 2, 18 * MIB) == 38 * MIB
    assert reserved(*thirds, 0, 2, 1, 20 * MIB) == 20 * MIB


class Attending(nn.Module):
    """Attention of 256 tokens with dropout, and dropout of what it makes."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x):
        attend = nn.functional.scaled_dot_product_attention
        x = attend(*self.project(x).chunk(3, -1), dropout_p=0.1)
        return nn.functional.dropout(x, 0.5).square().mean()


def test_another_device_runs_its_own_kernels():
    batch, heads, tokens, width = 2, 4, 256, 32
    x = torch.randn(batch, heads, tokens, width)
    scores = batch * heads * tokens * tokens * 4
    here, there = estimate(Attending(), x).trace, estimate(Attending(), x, device="h100").trace
    assert [b for b in here.blocks if b.category == SAVED and b.nbytes == scores]
    assert not [block for block in there.blocks if block.nbytes >= scores]
    masks = {
        "cpu": [b.nbytes for b in here.blocks if b.op == "aten::bernoulli_" and b.nbytes > 4],
        "h100": [b.nbytes for b in there.blocks if b.op == "aten::native_dropout"],
    }
    assert masks["h100"][1:] == [x.numel()] and masks["h100"][0] == 4 * x.numel()
    assert all(block.nbytes % 512 == 0 for block in there.blocks)
    assert all(resident.nbytes % 512 == 0 for resident in there.residents)
    assert any(block.nbytes % 512 for block in here.blocks)


def test_only_cuda_reserves():
    model, x = Attending(), torch.randn(2, 4, 256, 32)
    there = estimate(model, x, device="h100")
    assert there.reserved_bytes is not None and there.reserved_bytes >= there.peak_bytes
    assert there.reserved_bytes % (2 * MIB) == 0
    assert estimate(model, x).reserved_bytes is None


def test_an_unknown_device_is_told_from_those_that_are_known():
    with pytest.raises(memplan.MemplanError, match="'h1000'") as caught:
        estimate(Attending(), torch.randn(2, 4, 256, 32), device="h1000")
    assert all(name in str(caught.value) for name in DEVICES)


def test_kernels_of_another_device_cannot_be_measured():
    with pytest.raises(memplan.MemplanError, match="cannot for another device"):
        estimate(Attending(), torch.randn(2, 4, 256, 32), device="h100", costs="measured")


def test_the_gradient_of_a_layer_norm_is_contiguous():
    """It is noted in the layout of the gradient that comes in, which is another here."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 32, 3, padding=1)
            self.second = nn.Conv2d(32, 32, 3, padding=1)
            self.norm = nn.LayerNorm(32)

        def forward(self, x):
            x = self.norm(self.second(self.first(x)).permute(0, 2, 3, 1))
            return x.permute(0, 3, 1, 2).contiguous().square().sum()

    model, x = Norm(), torch.randn(4, 3, 32, 32)
    assert estimate(model, x, costs="measured").peak_bytes == profile(model, x, steps=1).peak_bytes


def test_grouped_products_in_32_bits():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 16, 32))

        def forward(self, x):
            ends = torch.tensor([4, 8], dtype=torch.int32)
            return torch._grouped_mm(x, self.weight, offs=ends).square().sum()

    model, x = Experts(), torch.randn(8, 16)
    found = estimate(model, x, costs="measured")
    assert abs(found.peak_bytes - profile(model, x, steps=1).peak_bytes) <= 64
