"""Plans for a device that is not here, of models without data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.capture import read, trace
from memplan.capture.sample import Sample
from memplan.costs import DEVICES

H100 = memplan.Options(device="h100", on_infeasible="smallest")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 96)

    def forward(self, x, mask=None, dropout=0.0):
        q, k, v = self.layer(x).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
        attention = nn.functional.scaled_dot_product_attention
        return attention(q, k, v, attn_mask=mask, dropout_p=dropout).square().mean()


def on(device, dtype, **more):
    with torch.device(device):
        return Attention().to(dtype), {"x": torch.randn(2, 16, 32, dtype=dtype), **more}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("dtype", "more", "kernel"),
    [
        (torch.bfloat16, {}, "flash"),
        (torch.bfloat16, {"dropout": 0.1}, "flash"),
        (torch.float32, {}, "efficient"),
        (torch.float32, {"mask": torch.ones(16, 16, dtype=torch.bool).tril()}, "efficient"),
    ],
)
def test_attention_is_one_fused_kernel(device, dtype, more, kernel):
    model, batch = on(device, dtype, **more)
    program = read(trace(model, Sample.of(batch), is_for_cuda=True)).program
    attention = [op for op in program.ops if "attention" in op.target]
    assert [f"dot_product_{kernel}_attention" in op.target for op in attention] == [True, True]
    assert all(op.is_random == ("dropout" in more) for op in attention[:1])
    largest = max(value.nbytes for value in program.values)
    assert largest < 2 * 4 * 16 * 16 * 32, "no matrix of scores"
    plan = memplan.plan(model, batch, budget="80%", options=H100)
    assert plan.costs_source == "analytic, H100 SXM 80 GB"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_for_cuda_casts_there(device):
    class Cast(Attention):
        def forward(self, x):
            with torch.autocast("cuda", torch.bfloat16):
                q = self.layer(x).view(2, 16, 4, 24).float()
                attention = nn.functional.scaled_dot_product_attention
                return attention(q, q, q).square().mean()

    with torch.device(device):
        model, batch = Cast(), {"x": torch.randn(2, 16, 32)}
    program = read(trace(model, Sample.of(batch), is_for_cuda=True)).program
    assert any("flash_attention" in op.target for op in program.ops)


def test_memory_comes_in_blocks():
    model, batch = on("meta", torch.float32)
    plan = memplan.plan(model, batch, options=H100)
    parameters = [96 * 32 * 4, 96 * 4, 2 * 16 * 32 * 4]
    assert plan.resident_bytes == sum(-(-nbytes // 512) * 512 for nbytes in parameters)
    assert plan.peak_bytes % 512 == 0


def test_the_model_on_the_meta_device_is_left_there():
    model, batch = on("meta", torch.float32)
    before = dict(model.named_parameters())
    memplan.plan(model, batch, options=H100)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_planned_for(name):
    model, batch = on("meta", torch.float32)
    plan = memplan.plan(model, batch, options=memplan.Options(device=name))
    assert plan.seconds > 0 and DEVICES[name].name in plan.costs_source


def test_what_such_plans_are_not_for():
    model, batch = on("cpu", torch.float32)
    with pytest.raises(memplan.MemplanError, match="there is a100, cpu, h100"):
        memplan.plan(model, batch, options=memplan.Options(device="h1000"))
    with pytest.raises(memplan.MemplanError, match="plans for reading"):
        memplan.optimize(model, batch, options=H100)
    with pytest.raises(memplan.CaptureError, match="analytic"):
        memplan.plan(model, batch, options=memplan.Options(device="h100", costs="measured"))
