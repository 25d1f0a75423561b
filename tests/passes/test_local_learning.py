"""Parts that learn from losses of their own: their gradients are eager's, their memory is not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

import memplan
from memplan.passes import add_lora, freeze, invert_couplings, learn_locally

from support import laws
from support.local import MODELS, SMALLEST, assert_as_in_eager, in_eager, made


@pytest.mark.by_default("resnet-4-None", "vit-2-1 B")
@pytest.mark.parametrize("budget", [None, pytest.param("100%", marks=pytest.mark.slow), "1 B"])
@pytest.mark.parametrize("blocks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_sum_of_detached_losses(name, blocks, budget):
    model, batch = made(name, depth=max(4, blocks))
    planned = memplan.optimize(
        model, batch, budget=budget, passes=[learn_locally(blocks)], options=SMALLEST
    )
    assert len(planned.local_losses.names) == blocks - 1
    laws.assert_within_budget(planned, batch)
    for seed in (1, 2):
        assert_as_in_eager(planned, batch, seed)


@pytest.mark.by_default("resnet")
@pytest.mark.parametrize("name", MODELS)
def test_more_parts_need_less(name):
    model, batch = made(name)
    peaks = [
        memplan.plan(model, batch, budget="100%", passes=[learn_locally(blocks)]).peak_bytes
        for blocks in (1, 2, 4)
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < 0.75 * peaks[0]


def test_one_part_is_the_model_itself():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(1)])
    mine, theirs = laws.step(planned, batch), laws.step(model, batch)
    assert mine.buffers.keys() - theirs.buffers.keys() == {"local_losses.last"}
    assert torch.equal(mine.buffers["local_losses.last"], theirs.loss.view(1))
    own = {name: mine.buffers[name] for name in theirs.buffers}
    laws.assert_same_bits(replace(mine, buffers=own), theirs)


class Coupled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.g = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, streams):
        one, two = streams
        one = one + self.f(two)
        return one, two + self.g(one)


class Streams(nn.Module):
    """Two streams that pass through eight couplings."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Coupled(width) for _ in range(8)])
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = self.first(x)
        streams = (x, x)
        for block in self.blocks:
            streams = block(streams)
        return self.head(torch.cat(streams, 1))


@pytest.mark.slow
def test_blocks_are_undone_inside_parts():
    torch.manual_seed(0)
    model = memplan.WithLoss(Streams(), cross_entropy)
    batch = (torch.randn(64, 32), torch.randint(10, (64,)))
    cut = memplan.optimize(model, batch, budget="1 B", passes=[learn_locally(2)], options=SMALLEST)
    assert_as_in_eager(cut, batch)
    undone = memplan.optimize(
        model, batch, passes=[learn_locally(2), invert_couplings()], max_slowdown=1.5
    )
    step = undone.prepare(memplan.Sample.of(batch))
    undoing = {
        one.restore_op.id for one in step.recoveries if one.restore_op.target == "memplan.undo"
    }
    assert undoing.intersection(step.plan.schedule.restored_ops)
    mine = copy.deepcopy(undone)
    in_eager(mine, batch)[0].backward()
    undone.zero_grad()
    undone(*batch).backward()
    for one, two in zip(undone.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_under_autocast():
    model, batch = made("vit")
    planned = memplan.optimize(model, batch, passes=[learn_locally(4)], options=SMALLEST)
    other = copy.deepcopy(planned)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        total, losses = in_eager(other, batch)
        torch.manual_seed(1)
        loss = planned(*batch)
    total.backward()
    loss.backward()
    assert torch.equal(loss, total)
    assert torch.equal(planned.local_losses.last, torch.stack(losses).detach().float())
    for one, two in zip(planned.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.slow
def test_accumulated_gradients():
    model, batch = made("vit")
    planned = memplan.optimize(model, batch, passes=[learn_locally(2)])
    other = copy.deepcopy(planned)
    for seed in (1, 2, 3):
        (in_eager(other, batch, seed)[0] / 4).backward()
        torch.manual_seed(seed)
        (planned(*batch) / 4).backward()
    for one, two in zip(planned.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    laws.assert_within_budget(planned, batch)


def test_an_optimizer_trains_model_and_heads():
    model, batch = made("resnet")
    planned = memplan.optimize(
        model, batch, passes=[learn_locally(2)], optimizer=lambda p: torch.optim.Adam(p, lr=1e-3)
    )
    losses = []
    for _ in range(20):
        loss = planned(*batch)
        loss.backward()
        planned.optimizer.step()
        planned.optimizer.zero_grad()
        losses.append(planned.local_losses.last.clone())
    assert bool((losses[-1] < 0.8 * losses[0]).all())


def test_evaluation_names_and_export_are_the_models():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(4)])
    own = set(model.state_dict())
    added = set(planned.state_dict()) - own
    assert added and all(name.startswith("local_losses.") for name in added)
    planned(*batch).backward()
    planned.eval()
    with torch.no_grad():
        assert torch.equal(planned(*batch), copy.deepcopy(model).eval()(*batch))
    exported = planned.export()
    assert set(exported.state_dict()) == own and exported is not model
    for one, two in zip(exported.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two) and one is not two


@pytest.mark.slow
def test_adapters_are_not_exported_without_being_merged():
    model, batch = made("vit")
    planned = memplan.optimize(model, batch, passes=[add_lora(rank=2)])
    with pytest.raises(memplan.MemplanError, match="merge_lora"):
        planned.export()


def test_the_given_model_computes_what_it_did():
    model, batch = made("vit")
    before, names = laws.step(model, batch), set(model.state_dict())
    planned = memplan.optimize(model, batch, passes=[learn_locally(4)])
    planned(*batch).backward()
    model.zero_grad()
    laws.assert_same_bits(laws.step(model, batch), before)
    assert set(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_the_fewest_parts_that_fit():
    model, batch = made("resnet")

    def peak(blocks):
        passes = [learn_locally(blocks)]
        return memplan.plan(model, batch, budget="1 B", passes=passes, options=SMALLEST).peak_bytes

    budget = peak(3)
    planned = memplan.optimize(model, batch, budget=budget, passes=[learn_locally("fit")])
    parts = len(planned.local_losses.names) + 1
    assert parts <= 3 and (parts == 1 or peak(parts - 1) > budget)
    assert planned.plan.peak_bytes <= budget


def test_weights_by_depth():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(4, weights=(0.5, 2.0))])
    assert planned.local_losses.weights == (0.5, 1.25, 2.0)
    assert_as_in_eager(planned, batch)


@pytest.mark.by_default("conv")
@pytest.mark.parametrize("head", ["linear", "conv"])
def test_with_a_reconstruction(head):
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(4, head, reconstruction=2.0)])
    assert [planned.local_losses.get_submodule(str(k)).weight for k in range(3)] == [
        2.0,
        pytest.approx(4 / 3),
        pytest.approx(2 / 3),
    ]
    assert_as_in_eager(planned, batch)


class Own(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 10)

    def forward(self, x, pixel_values, labels):
        return cross_entropy(self.layer(x[:, 0]), labels)


def test_a_head_of_ones_own_for_a_model_with_its_loss_inside():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    model = transformers.ViTForImageClassification(config).train()
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(10, (4,))}
    planned = memplan.optimize(
        model, batch, passes=[learn_locally(2, lambda example, number: Own(example.shape[-1]))]
    )
    output = planned(**batch)
    output.loss.backward()
    assert planned.local_losses.get_submodule("0.function.layer").weight.grad is not None
    torch.testing.assert_close(output.loss.detach(), planned.local_losses.last.sum())
    assert output.logits.shape == (4, 10)


class WithMask(nn.Module):
    """Returns first what no gradient goes back through."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, mask, x):
        return mask, x + self.layer(x).relu() * mask


class Masked(nn.Module):
    def __init__(self, width=16, num_blocks=4):
        super().__init__()
        self.blocks = nn.ModuleList(WithMask(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        mask = x > 0
        for block in self.blocks:
            mask, x = block(mask, x)
        return self.head(x)


def test_a_part_learns_from_what_a_gradient_goes_back_through():
    model = memplan.WithLoss(Masked(), cross_entropy)
    batch = (torch.randn(8, 16), torch.randint(10, (8,)))
    planned = memplan.optimize(model, batch, passes=[learn_locally(2)])
    planned(*batch).backward()
    assert all(parameter.grad is not None for parameter in planned.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_have_the_models_type(dtype):
    torch.manual_seed(0)
    model = memplan.WithLoss(Masked().to(dtype), cross_entropy)
    batch = (torch.randn(8, 16, dtype=dtype), torch.randint(10, (8,)))
    planned = memplan.optimize(model, batch, passes=[learn_locally(2)])
    assert {parameter.dtype for parameter in planned.parameters()} == {dtype}
    planned(*batch).backward()


def test_what_the_user_has_frozen_stays_frozen_in_an_export():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[freeze("stem"), learn_locally(2)])
    model.model.head.requires_grad_(False)
    exported = planned.export()
    assert not exported.model.head.weight.requires_grad
    assert exported.model.stem.weight.requires_grad and not model.model.stem.weight.requires_grad
