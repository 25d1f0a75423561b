"""What Python holds and a forward reads: a change by hand is seen, and a loss of state is said."""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import dropout, leaky_relu

import memplan

from support import laws
from support.modules import Model, assert_eager_bits, assert_follows, rows


class Settings:
    """A configuration that modules share."""

    def __init__(self):
        self.rate = 0.1
        self.scale = [2.0, 3.0]
        self.unread = 0


def scaled(model, a, b):
    return (a * b).sum()


def network():
    return nn.Sequential(
        nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.ReLU(), Model(scaled)
    )


def replaced(model):
    model[3] = nn.Tanh()


CHANGES = {
    "dropout": lambda model: setattr(model[2], "p", 0.8),
    "momentum": lambda model: setattr(model[1], "momentum", 0.7),
    "a submodule": replaced,
    "a function": lambda model: setattr(model[4], "loss", lambda m, a, b: (a + b).square().sum()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_by_hand_is_captured_anew(name):
    assert_follows(network(), rows(), rows(), rows(), change=CHANGES[name])


def with_settings(model, a, b):
    return dropout(a, model.settings.rate).sum() * model.settings.scale[0] + b.sum()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.settings, "rate", 0.7),
        lambda model: model.settings.scale.__setitem__(0, 5.0),
    ],
)
def test_what_a_configuration_holds_is_seen(change):
    assert_follows(Model(with_settings, settings=Settings()), rows(), rows(), change=change)


def test_containers_are_seen():
    for attributes, read in (
        ({"values": {"k": 2.0}}, lambda model: model.values["k"]),
        ({"values": SimpleNamespace(k=2.0)}, lambda model: model.values.k),
    ):

        def loss(model, a, b, read=read):
            return (a * read(model)).sum() + b.sum()

        def change(model):
            values = model.values
            held = values if isinstance(values, dict) else vars(values)
            held["k"] = 3.0

        assert_follows(Model(loss, **attributes), rows(), rows(), change=change)


class Helped(Model):
    """Has a method that its loss calls."""

    def helper(self, a):
        return a * 2


REPLACED = {
    "a forward": (network, lambda m: setattr(m[3], "forward", lambda x: x * 2)),
    "a method": (
        lambda: Helped(lambda m, a, b: (m.helper(a) * b).sum()),
        lambda m: setattr(m, "helper", lambda a: a * 3),
    ),
    "a partial function": (
        lambda: Model(lambda m, a, b: (m.act(a) * b).sum(), act=partial(leaky_relu)),
        lambda m: setattr(m, "act", partial(leaky_relu, negative_slope=0.5)),
    ),
    "a method of tensors": (
        lambda: Model(lambda m, a, b: (m.act(a) * b).sum(), act=torch.Tensor.sin),
        lambda m: setattr(m, "act", torch.Tensor.cos),
    ),
    "what was not there": (
        lambda: Model(lambda m, a, b: (a * b).sum() * getattr(m, "late", 1.0)),
        lambda m: setattr(m, "late", 3.0),
    ),
    "an array": (
        lambda: Model(lambda m, a, b: (a * b).sum() * float(m.k[0]), k=np.ones(2)),
        lambda m: m.k.__setitem__(0, 5.0),
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_put_in_the_place_of_code_is_seen(name):
    make, change = REPLACED[name]
    assert_follows(make(), rows(), rows(), change=change)


def test_what_is_not_read_may_change():
    model = Model(with_settings, settings=Settings())
    planned = memplan.optimize(model, rows())
    laws.step(planned, rows())
    for number in range(3):
        model.settings.unread = number
        model.counter = number
        laws.step(planned, rows())
    assert len(planned.plans) == 1


@pytest.mark.slow
def test_the_configuration_of_a_published_model():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=8, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(11, (2, 8))

    def change(model):
        for child in model.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.5

    batch = {"input_ids": ids, "labels": ids}
    assert_follows(model, batch, batch, change=change)


def counts(model, a, b):
    model.calls += 1
    return (a * b).sum()


def keeps(model, a, b):
    model.state = a.detach() if model.state is None else a.detach() + model.state
    return (a * model.state).sum() + b.sum()


def keeps_in_an_object(model, a, b):
    model.settings.unread += 1
    return (a * b).sum()


@pytest.mark.parametrize(
    ("loss", "attributes", "name"),
    [
        (counts, {"calls": 0}, "calls"),
        (keeps, {"state": None}, "state"),
        (keeps_in_an_object, {"settings": Settings()}, "settings"),
    ],
)
def test_state_that_the_forward_keeps_in_python_is_warned_of(loss, attributes, name):
    model = Model(loss, **attributes)
    before = {
        key: vars(value) if name == "settings" else value for key, value in attributes.items()
    }
    with pytest.warns(UserWarning, match=f"changes attributes of its modules.*{name}"):
        memplan.optimize(model, rows())
    assert {
        key: vars(getattr(model, key)) if name == "settings" else getattr(model, key)
        for key in attributes
    } == before


def marked(value):
    tensor = torch.randn(7, 6)
    tensor.scale = value
    return rows(), tensor


def test_attributes_of_inputs_are_read_and_seen():
    model = Model(lambda m, a, b, y: (a * y).sum() * getattr(y, "scale", 1.0) + b.sum())
    assert_eager_bits(model, marked(3.0))
    planned = memplan.optimize(model, marked(3.0))
    for value in (3.0, 2.0, 3.0):
        sample = marked(value)
        laws.assert_same_bits(laws.step(planned, sample), laws.step(model, sample))
    assert len(planned.plans) == 2


class Named(nn.Module):
    """Finds out in its first call what it is for, and notes that in its configuration."""

    def __init__(self):
        super().__init__()
        self.layer, self.settings = nn.Linear(5, 6), SimpleSettings()

    def forward(self, x):
        if self.settings.kind is None:
            self.settings.kind = "regression"
        return self.layer(x).square().sum()


class SimpleSettings:
    """A configuration."""

    def __init__(self):
        self.kind = None


def test_a_word_that_is_set_once_is_noted_and_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned = memplan.optimize(Named(), rows())
    assert "settings.kind" in planned.plan.notes[0]
    assert planned.settings.kind is None


def test_nothing_is_said_of_a_forward_that_keeps_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memplan.optimize(network(), rows())
