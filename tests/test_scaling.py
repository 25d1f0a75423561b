"""Finished gradients are scaled exactly by what arrives at the loss, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memplan
from memplan.runtime.fused_gradients import scale

from support import laws
from support.rows import MODELS
from support.small import Net, X

FUSED = memplan.Options(fused=True, on_infeasible="smallest")


def refused(message):
    return pytest.raises(memplan.PlanMismatch, match=message)


@pytest.fixture
def planned():
    return memplan.optimize(Net(), X, options=FUSED)


@pytest.mark.parametrize("factor", [2.0**-9, 0.5, 4.0, 65536.0, -2.0])
def test_powers_of_two_scale_exactly(planned, factor):
    other = copy.deepcopy(planned.original)
    (planned(X) * factor).backward()
    (other(X) * factor).backward()
    for one, two in zip(planned.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("factor", [1 / 3, 3.0, 0.0, float("inf"), float("nan")])
def test_other_scales_are_refused(planned, factor):
    with refused("power of two"):
        (planned(X) * factor).backward()


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-3, 1e-3)


class Hooked(Net):
    """A hook that clamps a gradient on its way."""

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return self.second(hidden).square().mean()


class Own(Net):
    def forward(self, x):
        return self.second(Clamped.apply(self.first(x))).square().mean()


@pytest.mark.parametrize("kind", [Hooked, Own])
def test_where_gradients_are_not_linear_no_other_scale_is_taken(kind):
    model = kind()
    planned = memplan.optimize(model, X, options=FUSED)
    laws.assert_same_bits(laws.step(planned, X), laws.step(model, X))
    with refused(r"must be one here.*clamp"):
        (planned(X) * 0.5).backward()


def test_gradients_in_float16_take_no_other_scale():
    model = Net()
    planned = memplan.optimize(model, options=FUSED)
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        loss = planned(X)
    with refused("float16"):
        (loss * 65536).backward()


@pytest.mark.by_default("bert", "resnet", "unet", "mobilenet")
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "unet", "vit", "mobilenet", "convnext"])
def test_gradients_of_torchs_functions_are_linear(name):
    model, sample = MODELS[name]()
    other = copy.deepcopy(model)
    planned = memplan.optimize(model, sample, default_passes=False, options=FUSED)
    for module in (planned, other):
        torch.manual_seed(1)
        (laws.loss_of(module, memplan.Sample.of(sample)) / 4).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_a_refused_scale_changes_nothing(planned):
    other = copy.deepcopy(planned.original)
    loss = planned(X)
    with refused("overflows or underflows"):
        (loss * 2.0**-126 * 2.0**-20).backward()
    loss.backward()
    other(X).backward()
    for one, two in zip(planned.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_what_is_no_number_stays_so(planned):
    (planned(X * float("nan")) * 65536).backward()
    assert all(p.grad.isnan().any() for p in planned.parameters())


class Scaled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) * 0.5


def test_scaling_takes_no_more_than_is_planned():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(300, 300, bias=False)

        def forward(self, x):
            return self.layer(x).square().mean()

    planned = memplan.optimize(Wide(), torch.randn(8, 300), options=FUSED)
    measured = memplan.profile(Scaled(planned), torch.randn(8, 300), steps=1)
    assert measured.peak_bytes <= planned.plan.peak_bytes


@pytest.mark.parametrize("factor", [2.0**120, 2.0**-140])
def test_scales_that_leave_the_range_are_refused(planned, factor):
    with refused("overflows or underflows"):
        (planned(X * 1e4) * factor * (1.0 if factor < 1 else 2.0**7)).backward()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.integers(-126, 127),
)
def test_a_scaled_gradient_is_the_product_or_is_refused(numbers, exponent):
    gradient = torch.tensor(numbers)
    exact = gradient.double() * 2.0**exponent
    factor = torch.tensor(2.0**exponent, dtype=torch.float64)
    if torch.equal(exact.float().double(), exact):
        scale([gradient], factor, 0)
        assert torch.equal(gradient.double(), exact)
    else:
        with refused("overflows or underflows"):
            scale([gradient], factor, 1 << 20)


@pytest.mark.parametrize("make", [torch.Tensor.t, lambda x: x[:, None].transpose(0, 2)])
def test_gradients_of_any_layout_are_scaled(make):
    gradient = make(torch.randn(300, 500))
    wanted = gradient * 4
    scale([gradient], torch.tensor(4.0), 1 << 20)
    assert torch.equal(gradient, wanted)
