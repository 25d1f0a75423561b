"""Masks kept as bits: the same masks, an eighth of the bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.passes.packed_masks import pack, unpack

from support import laws

SMALLEST = memplan.Options(on_infeasible="smallest")


@pytest.mark.parametrize("shape", [(8,), (4096,), (3, 5, 16), (64, 1001)])
def test_what_is_unpacked_is_what_was_packed(shape):
    for mask in (torch.rand(shape) < 0.9, torch.zeros(shape).bool(), torch.ones(shape).bool()):
        packed = pack(mask)
        assert packed.dtype is torch.uint8 and packed.numel() == mask.numel() // 8
        again = unpack(packed, tuple(mask.shape), mask.stride())
        assert torch.equal(again.view(torch.uint8), mask.view(torch.uint8))
        assert again.untyped_storage().nbytes() == mask.numel()


def test_the_layout_comes_back_as_well():
    mask = (torch.rand(4, 8, 6) < 0.5).transpose(0, 2).contiguous().transpose(0, 2)
    again = unpack(pack(mask), tuple(mask.shape), mask.stride())
    assert again.stride() == mask.stride() and torch.equal(again, mask)


def dropouts(width=256, rows=512):
    layers = [x for _ in range(6) for x in (nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.2))]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(rows, width), torch.randn(rows, width))


def stashes(planned):
    steps = planned.plan.schedule.forward
    return sum(isinstance(step, memplan.ir.schedule.Stash) for step in steps)


def test_masks_are_kept_packed_where_they_are_in_the_way():
    model, batch = dropouts()
    passes = [memplan.passes.split_dropout(), memplan.passes.pack_masks()]
    planned = memplan.optimize(model, batch, budget="90%", default_passes=False, passes=passes)
    assert stashes(planned) > 0
    laws.assert_same_bits(laws.step(model, batch), laws.step(planned, batch))
    laws.assert_within_budget(planned, batch)
    assert memplan.Plan.from_json(planned.plan.to_json()).schedule == planned.plan.schedule


class Filled(nn.Module):
    """Fills where numbers are large; the second mask is of the forward alone."""

    def __init__(self, width=256):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x * self.scale
        count = (y < 0).sum()
        return y.masked_fill(y > 1, 0.5).square().sum() + count


def test_masks_that_are_computed_are_offered_too_where_the_backward_reads_them():
    model, batch = Filled(), (torch.randn(512, 256),)
    packing = [memplan.passes.pack_masks()]
    planned = memplan.optimize(model, batch, budget="100%", default_passes=False, passes=packing)
    offered = planned.prepare(memplan.Sample(batch)).recoveries
    assert len(offered) == 1 and "gt" in offered[0].restore_op.signature
    laws.assert_same_bits(laws.step(model, batch), laws.step(planned, batch))


def test_nothing_is_packed_at_the_whole_budget():
    model, batch = dropouts()
    assert stashes(memplan.optimize(model, batch, budget="100%")) == 0


def test_the_smallest_budget_draws_again_and_keeps_no_mask():
    model, batch = dropouts()
    both = [
        memplan.plan(model, batch, budget="1 B", options=SMALLEST, default_passes=False, passes=p)
        for p in (
            [memplan.passes.split_dropout(), memplan.passes.checkpoint_activations()],
            [
                memplan.passes.split_dropout(),
                memplan.passes.checkpoint_activations(),
                memplan.passes.pack_masks(),
            ],
        )
    ]
    assert both[1].peak_bytes <= both[0].peak_bytes


def test_masks_that_are_small_or_of_no_whole_bytes_are_left_alone():
    for width, rows in ((3, 3001), (16, 16)):
        model, batch = dropouts(width, rows)
        step = memplan.optimize(model, batch, budget="1 B", options=SMALLEST)
        assert not any(
            recovery.pass_name == "pack_masks"
            for recovery in step.prepare(memplan.Sample(batch)).recoveries
        )
