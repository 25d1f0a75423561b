"""A fused step finishes its gradients in the forward: eager's bits, and never a higher peak."""

from __future__ import annotations

import copy
import gc

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import MODELS
from small import Net, X
from torch import nn

import memplan
from memplan.finished import scale

FUSED = memplan.Options(fused=True, on_infeasible="smallest")
SPLIT = memplan.Options(on_infeasible="smallest")

SHORT = ("mlp", "bert", "resnet", "unet", "returns_dict")
LOSSES = [
    name if name in SHORT else pytest.param(name, marks=pytest.mark.slow)
    for name in ("mlp", "bert", "resnet", "unet", "returns_dict", "gpt2", "vit", "llama", "t5")
]


def refused(message):
    return pytest.raises(memplan.PlanMismatch, match=message)


@pytest.mark.parametrize("budget", ["100%", "50%", "1 B"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_model_with_a_loss_has_eagers_bits_and_the_peak_of_the_split_step(name, budget):
    model, sample = MODELS[name]()
    fused = memplan.optimize(model, sample, budget=budget, options=FUSED)
    split = memplan.optimize(model, sample, budget=budget, options=SPLIT)
    laws.assert_same_bits(laws.step(fused, sample), laws.step(model, sample))
    laws.assert_within_budget(fused, sample)
    assert fused.plan.peak_bytes <= split.plan.peak_bytes
    assert fused.plan.slowdown <= split.plan.slowdown


class Parts(nn.Module):
    """Blocks with a loss at the end of each part, from which no gradient goes back."""

    def __init__(self, num_parts, num_blocks=8, width=32, dropout=0.1):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.GELU(),
                nn.Dropout(dropout),
            )
            for _ in range(num_blocks)
        )
        self.heads = nn.ModuleList(nn.Linear(8, 10) for _ in range(num_parts))

    def forward(self, x, y):
        per_part = len(self.blocks) // len(self.heads)
        losses = []
        for number, block in enumerate(self.blocks):
            x = x + block(x)
            if (number + 1) % per_part == 0:
                head = self.heads[number // per_part]
                losses.append(nn.functional.cross_entropy(head(x.mean((2, 3))), y))
                x = x.detach()
        return torch.stack(losses).sum()


def parts_and_batch(num_parts, **given):
    torch.manual_seed(0)
    model = Parts(num_parts, **given)
    return model, (torch.randn(4, 8, 32, 32), torch.randint(10, (4,)))


@pytest.mark.parametrize("num_parts", [1, 2, 4, 8])
def test_a_part_is_finished_before_the_next_begins(num_parts):
    model, batch = parts_and_batch(num_parts)
    plan = memplan.plan(model, batch, budget="100%", options=FUSED)
    whole = plan.original_peak_bytes - plan.resident_bytes
    # a part, and what the next makes before this one's is gone
    assert plan.peak_bytes - plan.resident_bytes <= (1 / num_parts + 0.2) * whole


@pytest.mark.parametrize("budget", [None, "50%", "1 B"])
@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_parts_have_eagers_bits_within_budgets(num_parts, budget):
    model, batch = parts_and_batch(num_parts)
    planned = memplan.optimize(model, batch, budget=budget, options=FUSED)
    laws.assert_same_bits(laws.step(planned, batch), laws.step(model, batch))
    laws.assert_within_budget(planned, batch)


def test_recomputation_goes_on_inside_parts():
    model, batch = parts_and_batch(2)
    # costs that are the same on every machine
    whole, fused, split = (
        memplan.plan(
            model, batch, budget=budget, options=memplan.Options(fused=fused, costs="analytic")
        )
        for budget, fused in (("100%", True), ("40%", True), ("40%", False))
    )
    assert fused.budget_bytes == split.budget_bytes < whole.peak_bytes
    assert 0 < len(fused.schedule.restored_ops) < len(split.schedule.restored_ops)
    assert fused.slowdown < split.slowdown


def test_a_plan_is_saved_and_applied(tmp_path):
    model, batch = parts_and_batch(4)
    plan = memplan.plan(model, batch, budget="30%", options=FUSED)
    again = memplan.Plan.from_json(plan.to_json())
    planned = memplan.optimize(model, batch, plan=again, options=FUSED)
    laws.assert_same_bits(laws.step(planned, batch), laws.step(model, batch))
    with refused("other"):
        memplan.optimize(model, batch, plan=again)


def test_statistics_are_written_once_and_evaluation_is_the_models():
    model, batch = parts_and_batch(2)
    other = copy.deepcopy(model)
    planned = memplan.optimize(model, batch, options=FUSED)
    for module in (planned, other):
        torch.manual_seed(1)
        for _ in range(3):
            module(*batch).backward()
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)
    planned.eval()
    other.eval()
    with torch.no_grad():
        assert torch.equal(planned(*batch), other(*batch))


@pytest.mark.parametrize("name", ["parts", "mlp"])
def test_gradients_are_added_into_those_that_are_there(name):
    model, batch = parts_and_batch(2) if name == "parts" else MODELS[name]()
    other = copy.deepcopy(model)
    planned = memplan.optimize(model, batch, options=FUSED)
    batch = memplan.Sample.of(batch)
    for module in (planned, other):
        torch.manual_seed(1)
        for _ in range(3):
            (laws.loss_of(module, batch) / 4).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    accumulating = planned.plans[-1]
    gradients = sum(p.grad.nbytes for p in model.parameters())
    assert accumulating.resident_bytes == planned.plans[0].resident_bytes + gradients
    laws.assert_within_budget(planned, batch)


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


class Drawing(torch.autograd.Function):
    """A backward that draws numbers."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 1e-3 * torch.rand_like(gradient)


class Draws(nn.Module):
    """Two parts; the backward of each draws numbers, and so does the forward of the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        one, two, three, four = self.layers
        hidden = two(nn.functional.dropout(Drawing.apply(one(x)).relu(), 0.1))
        loss = hidden.square().mean()
        hidden = four(nn.functional.dropout(Drawing.apply(three(hidden.detach())).relu(), 0.1))
        return loss + hidden.square().mean()


def test_numbers_are_drawn_in_eagers_order():
    model = Draws()
    planned = memplan.optimize(model, X, options=FUSED)
    laws.assert_same_bits(laws.step(planned, X), laws.step(model, X))


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


def test_a_forward_for_other_shapes_is_a_second_one_too(planned):
    loss = planned(X)
    with refused("second forward"):
        planned(X[:8])
    del loss
    copy.deepcopy(planned)(X[:8]).backward()


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


def test_a_second_forward_is_refused_until_the_first_is_done_or_dropped(planned):
    loss = planned(X)
    with refused("second forward"):
        planned(X)
    with torch.no_grad():
        planned(X)
    loss.backward()
    second = planned(X)
    del second
    gc.collect()
    planned(X).backward()


def test_retain_graph_is_refused(planned):
    loss = planned(X)
    with refused("retain_graph=True"):
        loss.backward(retain_graph=True)


def test_a_second_backward_is_refused(planned):
    loss = planned(X)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_only_some_gradients_can_be_asked_for(planned):
    first = next(planned.parameters())
    (gradient,) = torch.autograd.grad(planned(X), [first])
    (wanted,) = torch.autograd.grad(planned.original(X), [first])
    assert torch.equal(gradient, wanted) and first.grad is None


def test_a_model_without_a_loss_is_refused():
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU())
    with pytest.raises(memplan.CaptureError, match=r"must return its loss.*WithLoss"):
        memplan.optimize(model, X, options=FUSED)


def test_other_outputs_than_one_loss_are_refused():
    def optimize(wrap, **options):
        class Returning(Net):
            def forward(self, x):
                return wrap(super().forward(x), x)

        memplan.optimize(Returning(), X, options=memplan.Options(fused=True, **options))

    with pytest.raises(memplan.CaptureError, match="exactly one scalar"):
        optimize(lambda loss, x: loss.reshape(1))
    with pytest.raises(memplan.CaptureError, match="exactly one scalar"):
        optimize(lambda loss, x: (loss, 2 * loss))
    with pytest.raises(memplan.CaptureError, match="differentiable_outputs"):
        optimize(lambda loss, x: (loss, x), differentiable_outputs=(0,))


def test_updates_in_the_backward_are_refused():
    options = memplan.Options(fused=True, update_in_backward=True)
    optimizer = torch.optim.SGD
    with pytest.raises(memplan.MemplanError, match="leave one of the two out"):
        memplan.optimize(Net(), X, optimizer=lambda p: optimizer(p, lr=0.1), options=options)


def test_an_optimizers_step_is_part_of_the_plan():
    model, batch = parts_and_batch(4)
    planned = memplan.optimize(
        model, batch, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), options=FUSED
    )
    for _ in range(2):
        planned(*batch).backward()
        planned.optimizer.step()
        planned.optimizer.zero_grad()
    measured = memplan.profile(planned, batch, steps=1, optimizer=planned.optimizer)
    assert measured.peak_bytes <= planned.plan.peak_bytes


class TwoUses(nn.Module):
    """A buffer that is read, through a view, and overwritten; and a loss of its own before."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        x = self.first(x)
        scale = self.mean.view(1, 16)
        loss = (x * (scale + 0) + x.exp() + scale).mean()
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean(0))
        x = self.second(x.detach() + self.mean.view(1, 16))
        return loss + x.square().mean()


def test_a_buffer_is_read_before_and_after_it_is_written():
    torch.manual_seed(0)
    model = TwoUses()
    model.mean.add_(1.0)
    planned = memplan.optimize(model, X, options=FUSED)
    laws.assert_same_bits(laws.step(planned, X), laws.step(model, X))
