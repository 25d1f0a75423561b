"""Sizes and branches that follow from values of inputs and buffers: a plan for each."""

from __future__ import annotations

import pytest
import torch
from torch import distributions, nn
from torch.nn import functional

import memplan

from support import laws
from support.modules import Model, assert_eager_bits, rows

LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2])
LENGTHS = (torch.tensor([[1, 2]]), torch.tensor([7]), torch.tensor([2]))

SIZED = {
    "one_hot": (lambda m, a, b, i: (functional.one_hot(i) * a[:, :4]).sum(), (LABELS,)),
    "one_hot of so many": (
        lambda m, a, b, i: (functional.one_hot(i, num_classes=6) * a).sum(),
        (LABELS,),
    ),
    "bincount": (lambda m, a, b, i: (i.bincount(minlength=6) * a).sum(), (LABELS,)),
    "repeat_interleave": (
        lambda m, a, b, i: a.repeat_interleave(i, 0).square().sum(),
        (LABELS,),
    ),
    "repeated places": (
        lambda m, a, b, i: a[torch.repeat_interleave(i)].square().sum(),
        (LABELS,),
    ),
    "tensor_split": (
        lambda m, a, b, i: sum(
            n * one.square().sum() for n, one in enumerate(torch.tensor_split(a, i))
        ),
        (torch.tensor([1, 4]),),
    ),
    "split": (
        lambda m, a, b, i: sum(n * one.square().sum() for n, one in enumerate(a.split(i.tolist()))),
        (torch.tensor([1, 4, 2]),),
    ),
    "masked_select": (
        lambda m, a, b, i: a.masked_select(i[:, None].repeat(1, 6) > 0).square().sum(),
        (LABELS,),
    ),
    "ctc_loss": (
        lambda m, a, b, *t: functional.ctc_loss(a[:, None].log_softmax(-1), *t),
        LENGTHS,
    ),
    "ctc_loss, summed": (
        lambda m, a, b, *t: functional.ctc_loss(a[:, None].log_softmax(-1), *t, reduction="sum"),
        LENGTHS,
    ),
    "a branch on a buffer": (lambda m, a, b: (a if m.scale.sum() > 0 else b).sum(), ()),
    "a branch on what was added up in place": (
        lambda m, a, b, i: (
            a if torch.zeros(7).scatter_add_(0, i, torch.ones(7)).max() > 1 else b
        ).sum(),
        (LABELS,),
    ),
    "unique": (
        lambda m, a, b, i: (
            (a[:, :4] * i.unique(return_inverse=True)[1][:, None]).sum()
            + (a[:4] * torch.unique(i)[:, None]).sum()
        ),
        (LABELS,),
    ),
    "unique, counted": (
        lambda m, a, b, i: sum(
            (a[: len(counts)] * (values * counts)[:, None]).sum()
            for values, counts in (
                torch.unique(i.view(1, -1), return_counts=True),
                torch.unique_consecutive(i // 2, return_counts=True),
            )
        ),
        (LABELS,),
    ),
    "a range up to a value": (
        lambda m, a, b, i: (a[0, torch.arange(i.max())] ** 2).sum(),
        (LABELS,),
    ),
    "a covariance": (lambda m, a, b: torch.cov(a).square().sum(), ()),
    "a part that starts where a tensor says": (
        lambda m, a, b, i: a.narrow(0, i, 3).square().sum(),
        (torch.tensor(2),),
    ),
    "a sound and back": (
        lambda m, a, b, w: (
            torch.istft(torch.stft(a.flatten(), 8, window=w, return_complex=True) * 2, 8, window=w)
            .square()
            .sum()
        ),
        (torch.hann_window(8),),
    ),
}


@pytest.mark.by_default(
    "one_hot", "repeat_interleave", "split", "ctc_loss", "a branch on a buffer", "a sound and back"
)
@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_follow_from_values(name):
    loss, others = SIZED[name]
    assert_eager_bits(Model(lambda m, a, b, *t: loss(m, a, b, *t) + b.sum()), (rows(), *others))


def test_other_values_are_other_plans():
    model = Model(lambda m, a, b, i: (functional.one_hot(i) * a[:, :1]).sum() + b.sum())
    planned = memplan.optimize(model, (rows(), LABELS))
    for labels in (LABELS, LABELS % 2, LABELS * 3, LABELS):
        sample = (rows(), labels)
        laws.assert_same_bits(laws.step(planned, sample), laws.step(model, sample))
    assert len(planned.plans) == 3


def test_another_buffer_takes_the_other_branch():
    model = Model(lambda m, a, b: (a if m.scale.sum() > 0 else b * 2).sum())
    planned = memplan.optimize(model, rows())
    for factor in (1, -1, -1):
        with torch.no_grad():
            model.scale.mul_(factor)
        sample = rows()
        laws.assert_same_bits(laws.step(planned, sample), laws.step(model, sample))


def test_a_number_that_is_another_in_each_call_is_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None))
    with pytest.raises(
        memplan.CaptureError, match=r"buffer '1\.num_batches_tracked', which it writes"
    ):
        memplan.optimize(model, rows())

    def counting(m, a, b):
        m.scale.add_(1)
        return (a if m.scale[0] > 2 else b * 2).sum()

    model = Model(counting)  # a flag stays what it is for many calls
    planned = memplan.optimize(model, rows())
    for _ in range(5):
        sample = rows()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        theirs = laws.step(model, sample)
        model.load_state_dict(before, strict=False)
        laws.assert_same_bits(laws.step(planned, sample), theirs)
        with torch.no_grad():
            model.scale.add_(1)
    assert len(planned.plans) == 2


DISTRIBUTIONS = {
    "normal": lambda m, a, b: (
        distributions.Normal(a, b.exp()).rsample().sum()
        + distributions.Normal(a, b.exp()).log_prob(torch.zeros(6)).sum()
    ),
    "categorical": lambda m, a, b: (
        distributions.Categorical(logits=a).log_prob(b.argmax(-1)).sum()
        + distributions.Categorical(logits=b).entropy().sum()
    ),
    "divergence": lambda m, a, b: distributions.kl_divergence(
        distributions.Normal(a, b.exp()), distributions.Normal(0.0, 1.0)
    ).sum(),
    "gaussian loss": lambda m, a, b: functional.gaussian_nll_loss(a, torch.zeros(7, 6), b.exp()),
    "gaussian loss, one variance": lambda m, a, b: nn.GaussianNLLLoss(full=True)(
        a, torch.zeros(7, 6), b[:, :1].sigmoid()
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_arguments_are_not_checked_and_that_is_said(name, monkeypatch):
    # torch's compiler, once it is loaded, turns the checks off
    monkeypatch.setattr(distributions.Distribution, "_validate_args", True)
    model = Model(DISTRIBUTIONS[name])
    assert_eager_bits(model, rows())
    assert "not check the values" in "; ".join(memplan.optimize(model, rows()).plan.notes)
    assert distributions.Distribution._validate_args


class Masked(nn.Module):
    """An encoder and a decoder with the usual masks, one of them given twice."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, source, target, causal, padded):
        return self.transformer(
            source,
            target,
            tgt_mask=causal,
            src_key_padding_mask=padded,
            memory_key_padding_mask=padded,
        ).sum()


@pytest.mark.slow
def test_the_usual_masks_of_a_transformer():
    padded = torch.zeros(2, 5, dtype=torch.bool)
    padded[0, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    assert_eager_bits(Masked(), (torch.randn(2, 5, 8), torch.randn(2, 4, 8), causal, padded))
