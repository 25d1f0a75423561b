"""Where a forward is cut, and what is refused with which words."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import memplan
from memplan.analysis import Cut, balanced
from memplan.passes import learn_locally

from support.local import assert_as_in_eager, gpt, made, refused


def test_cut_after_named_modules():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(at=["first.1", "second.0"])])
    assert planned.local_losses.names == ("model.first.1", "model.second.0")
    assert_as_in_eager(planned, batch)


def test_what_cannot_be_cut_is_refused():
    model, batch = made("resnet")

    def optimize(*passes, model=model, batch=batch):
        memplan.optimize(model, batch, passes=passes)

    with refused(r"blocks=10, and the forward has 8 blocks.*model\.first\.0"):
        optimize(learn_locally(10))
    with refused("cannot be cut after 'model.first.0.inside.0'.*what follows also depends"):
        optimize(learn_locally(at="model.first.0.inside.0"))
    with refused("nothing that is trained follows"):
        optimize(learn_locally(at="model.head"))
    with refused("matches nothing"):
        optimize(learn_locally(at="third"))
    with refused("returns its loss, one scalar, and ResNet returns no scalars.*WithLoss"):
        optimize(learn_locally(), model=model.model, batch=batch[:1])
    with refused(r"must return a scalar.*returned \[4, 8, 32, 32\]"):
        optimize(learn_locally(2, lambda example, number: lambda x, *batch: x))
    with refused("must return a scalar.*returned NoneType"):
        optimize(learn_locally(2, lambda example, number: lambda x, *batch: None))
    with refused("which is no function"):
        optimize(learn_locally(2, lambda example, number: 1))
    with refused("pass a batch"):
        memplan.optimize(model, passes=[learn_locally()])
    with refused("is to fit.*budget in bytes"):
        optimize(learn_locally("fit"))


def test_a_weight_on_both_sides_is_refused_by_name():
    torch.manual_seed(0)
    model, batch = gpt(tied=True)
    with refused(r"'model.model.transformer.wte.weight' is used before and after"):
        memplan.optimize(model, batch, passes=[learn_locally()])


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return (self.first(x) * self.second(x)).mean()


def test_a_forward_that_is_no_chain_is_refused():
    with refused("no chain of blocks"):
        memplan.optimize(Around(), torch.randn(4, 8), passes=[learn_locally(2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 0}, "at least 1"),
        ({"blocks": "few"}, "fit"),
        ({"head": "large"}, "linear, conv"),
        ({"mask_ratio": 1.0}, "between 0 and 1"),
        ({"weights": 1.0}, "first head's and the last's"),
        ({"weights": (float("nan"), 1.0)}, "first head's and the last's"),
        ({"reconstruction": -1.0}, "at least 0"),
        ({"blocks": "fit", "at": "first.1"}, "one of the two"),
        ({"weights": (1.0,)}, "first head's and the last's"),
        ({"weights": (-1.0, 1.0)}, "first head's and the last's"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with refused(message):
        learn_locally(**arguments)


def test_heads_without_a_loss_to_judge_them_are_refused():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])

        def forward(self, x):
            return self.layers(x).square().mean()

    with refused("WithLoss.*callable as head"):
        memplan.optimize(Inside(), torch.randn(4, 8), passes=[learn_locally(2)])


def test_heads_that_do_not_fit_are_refused():
    model = memplan.WithLoss(
        nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)]), nn.functional.mse_loss
    )
    batch = (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))
    with refused("cannot predict"):
        memplan.optimize(model, batch, passes=[learn_locally(2)])
    with refused("reconstruction is of images"):
        model, batch = made("vit")
        memplan.optimize(model, batch, passes=[learn_locally(2, reconstruction=1.0)])


def test_updates_in_the_backward_are_refused():
    model, batch = made("resnet")
    options = memplan.Options(update_in_backward=True)
    with refused("passes that fuse the step"):
        memplan.optimize(
            model,
            batch,
            passes=[learn_locally(2)],
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            options=options,
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 50), st.data())
def test_parts_are_balanced(sizes, rest, data):
    ends = list(itertools.accumulate(sizes))
    total = ends[-1] + rest
    cuts = [Cut(str(k), end, torch.empty(0), (), True) for k, end in enumerate(ends)]
    parts = data.draw(st.integers(1, len(cuts) + 1))

    def largest(chosen):
        bounds = [0, *(cut.saved_bytes for cut in chosen), total]
        return max(after - before for before, after in itertools.pairwise(bounds))

    best = min(map(largest, itertools.combinations(cuts, parts - 1)))
    found = balanced(cuts, total, parts)
    assert len(found) == parts - 1 and largest(found) == best


def test_a_plan_with_a_head_of_ones_own_is_not_applied_without_it():
    model, batch = made("resnet")

    def head(example, number):
        layer = nn.Linear(8, 10)
        return lambda x, images, labels: cross_entropy(layer(x.mean((2, 3))), labels)

    plan = memplan.plan(model, batch, passes=[learn_locally(1, head)])
    with pytest.raises(memplan.PlanMismatch, match="head of your own"):
        memplan.optimize(model, batch, plan=plan)
