"""Hooks of modules: those that only look are accepted, all others refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import memplan

from support.modules import Model, assert_eager_bits, rows

SEEN = {}


def loss(model, a, b):
    return (a * b).sum()


def hooked(hook, kind="register_forward_hook"):
    model = Model(loss)
    getattr(model.one, kind)(hook)
    return model


def store(module, given, output):
    SEEN["output"] = output


class Counter:
    def __init__(self):
        self.count = 0

    def __call__(self, module, given, output):
        self.count += 1


@pytest.mark.parametrize(
    ("hook", "kind"),
    [
        (lambda module, given, output: None, "register_forward_hook"),
        (lambda module, given: None, "register_forward_pre_hook"),
        (lambda module, given, output: output.requires_grad_(True), "register_forward_hook"),
    ],
)
def test_hooks_that_only_look_are_accepted(hook, kind):
    model = hooked(hook, kind)
    assert_eager_bits(model, rows())
    assert [*model.one._forward_hooks.values(), *model.one._forward_pre_hooks.values()] == [hook]


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (store, "'one'.*store keeps something"),
        (Counter(), "Counter keeps something"),
        (lambda module, given, output: 2 * output, "changes what the module is given or returns"),
        (lambda module, given, output: output.mul_(2) and None, "changes what the module is given"),
    ],
)
def test_hooks_that_do_something_are_refused(hook, message):
    model = hooked(hook)
    with pytest.raises(memplan.CaptureError, match=message):
        memplan.optimize(model, rows())
    assert [*model.one._forward_hooks.values()] == [hook]
    assert SEEN == {} and getattr(hook, "count", 0) == 0


def test_hooks_that_append_are_refused():
    found = []
    model = hooked(lambda module, given, output: found.append(output))
    with pytest.raises(memplan.CaptureError, match="keeps something"):
        memplan.optimize(model, rows())
    assert found == []


def test_hooks_that_keep_by_a_default_argument_or_a_method_are_refused():
    class Store:
        def __init__(self):
            self.found = {}

        def keep(self, module, given, output):
            self.found["output"] = output

    def keep(module, given, output, found=[]):  # noqa: B006  what is tried
        found.append(output)

    kept = Store()
    for hook in (keep, kept.keep, partial(lambda found, *given: found.append(given), [])):
        with pytest.raises(memplan.CaptureError, match="keeps something"):
            memplan.optimize(hooked(hook), rows())
    assert kept.found == {} and keep.__defaults__ == ([],)


def test_hooks_of_the_backward_are_refused():
    model = hooked(look := lambda module, given, output: None)
    model.other.register_full_backward_hook(lambda module, given, output: None)
    with pytest.raises(memplan.CaptureError, match="hooks of its backward"):
        memplan.optimize(model, rows())
    assert [*model.one._forward_hooks.values()] == [look]


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_compiled_modules_are_refused_by_name(is_wrapped):
    model = nn.Sequential(nn.Linear(5, 6), Model(loss).one)
    if is_wrapped:
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model[0].compile(backend="eager")
    with pytest.raises(memplan.CaptureError, match=r"module '0' is compiled.*_orig_mod"):
        memplan.optimize(model, rows())
