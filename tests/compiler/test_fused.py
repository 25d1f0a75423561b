"""A fused step finishes its gradients in the forward: eager's bits, and never a higher peak."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import memplan

from support import laws
from support.rows import MODELS
from support.small import Net, X

FUSED = memplan.Options(fused=True, on_infeasible="smallest")


SPLIT = memplan.Options(on_infeasible="smallest")


SHORT = ("mlp", "bert", "resnet", "unet", "returns_dict")


LOSSES = [
    name if name in SHORT else pytest.param(name, marks=pytest.mark.slow)
    for name in ("mlp", "bert", "resnet", "unet", "returns_dict", "gpt2", "vit", "llama", "t5")
]


def refused(message):
    return pytest.raises(memplan.PlanMismatch, match=message)


@pytest.mark.by_default("mlp-100%", "resnet-50%", "returns_dict-1 B")
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


@pytest.mark.by_default("2-None", "4-1 B", "8-50%")
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


@pytest.mark.by_default("parts")
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


def test_a_forward_for_other_shapes_is_a_second_one_too(planned):
    loss = planned(X)
    with refused("second forward"):
        planned(X[:8])
    del loss
    copy.deepcopy(planned)(X[:8]).backward()


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


def test_a_forward_that_failed_has_nothing_waiting(planned, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(planned.prepare(memplan.Sample.of(X))), "primals", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:
            planned(X)
    assert kept.traceback  # its frames live on, as after an error in a notebook
    planned(X).backward()
