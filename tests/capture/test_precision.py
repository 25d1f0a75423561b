"""Mixed precision: autocast around the call and inside the model, 16-bit models, GradScaler."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import memplan

from support import laws
from support.rows import MODELS

SMALLEST = memplan.Options(on_infeasible="smallest")
RECURRENT = ("gru", "lstm")
SHORT = ("mlp", "returns_dict")


def rows(*left_out):
    names = [name for name in MODELS if name not in left_out]
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in names]


def assert_laws(model, sample, is_exact=True):
    planned = memplan.optimize(model, sample, budget="50%", options=SMALLEST)
    eager, mine = laws.step(model, sample), laws.step(planned, sample)
    if is_exact:
        assert planned.plan.effects == (memplan.Effect.EXACT,)
        laws.assert_same_bits(eager, mine)
    else:
        assert planned.plan.notes
        laws.assert_close(eager, mine, tolerance=1e-2)
    laws.assert_within_budget(planned, sample)
    assert memplan.optimize(model, sample, budget="100%").plan.num_restores == 0


def skip_if_eager_cannot(model, sample):
    try:
        laws.step(model, sample)
    except RuntimeError as error:
        if "could not create a primitive descriptor" not in str(error):
            raise
        pytest.skip(f"oneDNN does not run the untouched module on this CPU: {error}")


@pytest.mark.parametrize("name", rows())
def test_all_laws_hold_under_bfloat16(name):
    model, sample = MODELS[name]()
    with torch.autocast("cpu", torch.bfloat16):  # its cache of casts ends with it
        skip_if_eager_cannot(model, sample)
    with torch.autocast("cpu", torch.bfloat16):
        assert_laws(model, sample, is_exact=name not in RECURRENT)


@pytest.mark.slow
@pytest.mark.parametrize("name", rows("lstm"))
def test_all_laws_hold_under_float16(name):
    model, sample = MODELS[name]()
    with torch.autocast("cpu", torch.float16):
        assert_laws(model, sample, is_exact=name not in RECURRENT)


@pytest.mark.by_default("mlp", "returns_dict")
@pytest.mark.parametrize("name", ["mlp", "vit", "returns_dict"])
def test_models_in_bfloat16(name):
    model, sample = MODELS[name]()
    model.to(torch.bfloat16)

    def converted(value):
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if is_float else value

    leaves, spec = memplan.torch_internals.flatten(sample)
    sample = memplan.torch_internals.unflatten(list(map(converted, leaves)), spec)
    assert_laws(model, sample)


class Partly(nn.Module):
    """Autocast in parts of the forward, with a weight that is cast in several of them."""

    def __init__(self, is_cached=True):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.is_cached = is_cached

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=self.is_cached):
            x = self.second(torch.tanh(self.first(x)))
            x = self.first(x) @ self.second.weight
            with torch.autocast("cpu", enabled=False):
                x = self.first(x.float())
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=self.is_cached):
            x = self.first(x)
        return x.float().square().mean()


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("is_around", [True, False])
def test_a_weight_is_cast_as_often_as_eager_casts_it(is_cached, is_around):
    model, x = Partly(is_cached), torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16) if is_around else nullcontext():
        planned = memplan.optimize(model, x)
        laws.assert_same_bits(laws.step(model, x), laws.step(planned, x))
        laws.assert_within_budget(planned, x)
    program = planned._last.captured.program
    first = next(value.id for value in program.values if value.name == "first.weight")
    casts = [op for op in program.ops if "_to_copy" in op.target and op.operands == (first,)]
    assert len(casts) == (3 if not is_cached else 1 if is_around else 2)


class Looks(nn.Module):
    """Uses a weight without gradients first."""

    def __init__(self, inside):
        super().__init__()
        self.layer, self.inside = nn.Linear(32, 32), inside

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16) if self.inside else nullcontext():
            with torch.no_grad():
                target = self.layer(x)
            return (self.layer(self.layer(x)) - target).float().square().mean()


@pytest.mark.parametrize("inside", [True, False])
def test_a_weight_that_is_used_without_gradients_first(inside):
    model, x = Looks(inside), torch.randn(16, 32)
    with nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
        planned = memplan.optimize(model, x)
        laws.assert_same_bits(laws.step(model, x), laws.step(planned, x))


def test_bilinear_under_autocast_is_refused():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(8, 8, 4)

        def forward(self, x):
            return self.layer(x, x).float().square().mean()

    model, x = Bilinear(), torch.randn(16, 8)
    laws.assert_same_bits(laws.step(model, x), laws.step(memplan.optimize(model, x), x))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(memplan.CaptureError, match="bilinear"),
    ):
        memplan.optimize(model, x)


def test_casts_of_weights_are_counted():
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(8)])
    step, sample = memplan.WithLoss(model, nn.functional.mse_loss), (torch.randn(4, 128),) * 2
    with torch.autocast("cpu", torch.bfloat16):
        plan = memplan.optimize(step, sample, budget="100%").plan
    # the first layer's input needs no gradient
    assert plan.saved_bytes >= sum(layer.weight.numel() * 2 for layer in model[1:])


def test_backward_inside_autocast_is_refused():
    model, x = Partly(), torch.randn(16, 32)
    planned = memplan.optimize(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = planned(x)
        with pytest.raises(memplan.PlanMismatch, match="inside autocast"):
            loss.backward()


@pytest.mark.by_default("50%")
@pytest.mark.parametrize("budget", ["100%", "50%"])
def test_a_grad_scalers_loop_has_the_same_bits(budget):
    model, sample = MODELS["mlp"]()
    reference = copy.deepcopy(model)
    planned = memplan.optimize(model, budget=budget, options=SMALLEST)
    losses = []
    for module in (planned, reference):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        seen = []
        for _ in range(8):
            with torch.autocast("cpu", torch.float16):
                loss = module(*sample)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen.append((loss.item(), scaler.get_scale()))
        losses.append(seen)
    assert losses[0] == losses[1]
    assert all(map(torch.equal, model.parameters(), reference.parameters()))


class MasterWeights(torch.optim.SGD):
    """Keeps its parameters in 32 bits as well."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    master = self.state[p].setdefault("master", p.detach().float().clone())
                    master.add_(p.grad, alpha=-group["lr"])
                    p.copy_(master)


def test_master_weights_are_counted():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).to(torch.bfloat16)
    step = memplan.WithLoss(model, nn.functional.mse_loss)
    sample = (torch.randn(4, 64, dtype=torch.bfloat16),) * 2
    optimizer = MasterWeights(step.parameters(), lr=0.1)
    without, plan = (memplan.plan(step, sample, optimizer=o) for o in (None, optimizer))
    assert plan.resident_bytes - without.resident_bytes == 2 * sum(
        parameter.nbytes for parameter in step.parameters()
    )
    for in_backward in (False, True):
        options = memplan.Options(update_in_backward=in_backward)
        planned = memplan.optimize(step, sample, optimizer=optimizer, options=options)
        assert memplan.compare(step, planned, sample).is_exact
        measured = memplan.profile(planned, sample)
        assert measured.peak_bytes <= planned.plan.peak_bytes
        above = planned.plan.peak_bytes - planned.plan.resident_bytes
        assert planned.plan.peak_bytes - measured.peak_bytes <= 0.01 * above
