"""What is supported: each row is right, bit for bit, or refused with a reason.

``docs/support.md`` is made from what happens here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import memplan

from support import laws


class Model(nn.Module):
    """A module of layers, with a forward of its own."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


class StraightThrough(torch.autograd.Function):
    """Rounds forwards, passes gradients on backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Tagged(torch.Tensor):
    """A tensor subclass."""


def x() -> torch.Tensor:
    return torch.randn(4, 8)


def hooked(hook: Callable[..., Any]) -> Model:
    model = Model(lambda m, x: m.first(x).square().mean())
    model.first.register_forward_hook(hook)
    return model


def parameter_hook() -> Model:
    model = Model(lambda m, x: m.first(x).square().mean())
    model.first.weight.register_hook(lambda gradient: gradient.mul_(2))
    return model


def frozen() -> Model:
    model = Model(lambda m, x: m.second(m.first(x)).square().mean(), second=nn.Linear(8, 8))
    model.first.requires_grad_(False)
    return model


def tied() -> Model:
    model = Model(lambda m, x: m.second(m.first(x).tanh()).square().mean(), second=nn.Linear(8, 8))
    model.second.weight = model.first.weight
    return model


def evaluated_part() -> Model:
    model = Model(lambda m, x: m.norm(m.first(x)).square().mean(), norm=nn.BatchNorm1d(8))
    model.norm.eval()
    return model


def loss(change: Callable[[Any], Any]) -> Callable[..., torch.Tensor]:
    """A forward that changes the first layer's result somehow."""
    return lambda m, x: change(m.first(x)).square().mean()


def in_half_precision(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.first(x).float().square().mean()


def with_a_part_without_gradients(m, x):
    with torch.no_grad():
        scale = m.first(x).sigmoid()
    return (m.first(x) * scale).mean()


def branches_on_a_parameter(m, x):
    return m.first(x).mean() if m.first.bias.sum() > 0 else m.first(x).sum()


def branches_on_the_input(m, x):
    return m.first(x).mean() if x.sum() > 0 else m.first(x).sum()


def drops_layers(m, x):
    return m.first(x).mean() if torch.rand(()) > 0.5 else m.first(x).sum()


def seeded(y):
    torch.manual_seed(0)
    return y + torch.randn_like(y)


def with_saved_hooks(m, x):
    with torch.autograd.graph.save_on_cpu():
        return m.first(x).exp().mean()


def writes_weights(m, x):
    with torch.no_grad():
        m.first.weight.clamp_(-1, 1)
    return m.first(x).mean()


hidden = nn.Linear(8, 8)


@dataclass(frozen=True)
class Row:
    """A feature: a model that has it, and the words of the refusal, if it is refused."""

    feature: str
    make: Callable[[], nn.Module]
    refusal: str = ""
    sample: Callable[[], Any] = x


ROWS = [
    Row("weights shared by two layers", tied),
    Row("frozen parameters", frozen),
    Row("a submodule in evaluation mode", evaluated_part),
    Row("dropout", lambda: Model(loss(lambda y: functional.dropout(y, 0.3)))),
    Row("random numbers from torch", lambda: Model(loss(lambda y: y + torch.randn_like(y)))),
    Row(
        "batch norm and other buffers that the forward writes",
        lambda: Model(lambda m, x: m.norm(m.first(x)).square().mean(), norm=nn.BatchNorm1d(8)),
    ),
    Row("operations in place", lambda: Model(loss(lambda y: y.sin().mul_(2).relu_()))),
    Row("views, expanded and strided tensors", lambda: Model(loss(lambda y: y.t()[::2, 1:]))),
    Row("complex numbers inside", lambda: Model(loss(lambda y: torch.fft.rfft(y).abs()))),
    Row("autograd functions of your own", lambda: Model(loss(StraightThrough.apply))),
    Row(
        "`torch.utils.checkpoint` in the model (the planner takes its place)",
        lambda: Model(lambda m, x: checkpoint(m.first, x, use_reentrant=False).square().mean()),
    ),
    Row("`torch.no_grad` in the forward", lambda: Model(with_a_part_without_gradients)),
    Row("autocast in the forward", lambda: Model(in_half_precision)),
    Row("parametrizations (weight norm)", lambda: parametrized(parametrizations.weight_norm)),
    Row("parametrizations (spectral norm)", lambda: parametrized(parametrizations.spectral_norm)),
    Row(
        "hooks of modules that only look",
        lambda: hooked(lambda module, given, output: None),
    ),
    Row("hooks of parameters (what they allocate is not in the plan)", parameter_hook),
    Row(
        "a branch on values of the inputs (a plan for each way)",
        lambda: Model(branches_on_the_input),
    ),
    Row(
        "sizes that depend on values of the inputs (`x[mask]`, `nonzero`; a plan for each size)",
        lambda: Model(lambda m, x: m.first(x[x[:, 0] > -9]).square().mean()),
    ),
    Row(
        "tensors in plain attributes",
        lambda: Model(lambda m, x: (m.first(x) * m.table).mean(), table=torch.arange(8.0)),
    ),
    Row(
        "recurrent layers (equal up to rounding, and said so)",
        lambda: Model(lambda m, x: m.rnn(m.first(x))[0].square().mean(), rnn=nn.LSTM(8, 8)),
    ),
    Row("outputs in tuples, lists, dicts and dataclasses", lambda: Model(nested)),
    Row(
        "hooks of modules that change what they are given or return",
        lambda: hooked(lambda module, given, output: 2 * output),
        "changes what the module is given or returns",
    ),
    Row(
        "a branch on values of parameters",
        lambda: Model(branches_on_a_parameter),
        "must not branch",
    ),
    Row("a branch on random numbers (layer drop)", lambda: Model(drops_layers), "must not branch"),
    Row(
        "sizes that depend on values of parameters",
        lambda: Model(loss(lambda y: y[y > 0])),
        "nor use them as sizes",
    ),
    Row(
        "random numbers from numpy or Python",
        lambda: Model(loss(lambda y: y * float(np.random.rand()))),
        "numpy.random or random",
    ),
    Row("seeds set in the forward", lambda: Model(loss(seeded)), "random seed or state"),
    Row(
        "`torch.utils.checkpoint(use_reentrant=True)`",
        lambda: Model(loss(lambda y: checkpoint(torch.sin, y, use_reentrant=True))),
        "use_reentrant=False",
    ),
    Row("hooks on saved tensors", lambda: Model(with_saved_hooks), "hooks on saved tensors"),
    Row("parameters that the forward writes", lambda: Model(writes_weights), "writes a parameter"),
    Row(
        "the fast path of attention in evaluation mode",
        lambda: Model(
            lambda m, x: m.attention(m.first(x), x, x)[0].mean(),
            attention=nn.MultiheadAttention(8, 2).eval(),
        ),
        "fast path",
    ),
    Row(
        "parameters that are not registered",
        lambda: Model(loss(hidden)),
        "no parameter of the module",
    ),
    Row(
        "sparse gradients",
        lambda: Model(
            lambda m, x: m.first(m.table(x.long().clamp(0, 3)).mean(1)).mean(),
            table=nn.Embedding(4, 8, sparse=True),
        ),
        "sparse",
    ),
    Row(
        "tensor subclasses",
        lambda: Model(loss(torch.tanh)),
        "subclass",
        lambda: x().as_subclass(Tagged),
    ),
    Row(
        "outputs of unknown types",
        lambda: Model(lambda m, x: (m.first(x).mean(), object())),
        "returns a object",
    ),
    Row(
        "packed sequences",
        lambda: Model(packed, rnn=nn.LSTM(8, 8)),
        "cannot be captured",
        lambda: torch.randn(5, 3, 8),
    ),
    Row(
        "uninitialized (lazy) modules",
        lambda: Model(lambda m, x: m.lazy(m.first(x)).mean(), lazy=nn.LazyLinear(4)),
        "not initialized",
    ),
]


def parametrized(what: Callable[[nn.Module], nn.Module]) -> Model:
    model = Model(lambda m, x: m.first(x).square().mean())
    what(model.first)
    return model


def nested(m, x):
    y = m.first(x)
    return {"loss": y.square().mean(), "more": [y, (x, None, 3)]}


def packed(m, x):
    lengths = torch.tensor([5, 3, 2])
    return m.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths))[0].data.mean()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.feature)
def test_it_is_right_or_refused(row, results):
    model, sample = row.make(), row.sample()
    if row.refusal:
        with pytest.raises(memplan.MemplanError, match=row.refusal) as raised:
            memplan.optimize(model, sample)
        reason = re.sub(r" at /\S+ \(.*\): ", " at a line of the model: ", str(raised.value))
        results.support.append((row.feature, "refused", reason))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned = memplan.optimize(model, sample, budget="100%")
    eager, mine = laws.step(model, sample), laws.step(planned, sample)
    if planned.plan.effects == (memplan.Effect.EXACT,):
        laws.assert_same_bits(eager, mine)
    else:
        laws.assert_close(eager, mine)
    laws.assert_within_budget(planned, sample)
    results.support.append((row.feature, "/".join(e.value for e in planned.plan.effects), ""))
