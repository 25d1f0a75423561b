"""Models that a capture could get wrong in silence: each is right, or refused by name."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import memplan

from support import laws


class Model(nn.Module):
    def __init__(self, forward, **attributes):
        super().__init__()
        self.l = nn.Linear(8, 8)
        self.run = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args):
        return self.run(self, *args)


def x():
    return torch.randn(4, 8)


def assert_right(model, *calls):
    """Planned for the first call; then every call is as eager's, without a backward between."""
    planned = memplan.optimize(model, calls[0], budget="100%")
    for call in calls:
        laws.assert_same_bits(laws.step(model, call), laws.step(planned, call))
    return planned


def without_autocast_inside(m, x):
    y = m.l(x)
    with torch.autocast("cpu", enabled=False):
        return (x @ m.l.weight).square().sum() + y.float().sum()


def test_a_region_without_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_right(Model(without_autocast_inside), x())


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        for _ in range(2):
            x = self.attention(x, x, x, need_weights=False)[0]
        return x.float().square().mean()


def test_a_cast_that_is_not_shared_as_eager_shares_it_is_rounding_and_says_so():
    model, sample = Attends(), torch.randn(4, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        planned = memplan.optimize(model, sample)
        laws.assert_close(laws.step(model, sample), laws.step(planned, sample), 1e-2)
    assert planned.plan.effects == (memplan.Effect.ROUNDING,)
    assert "autocast" in planned.plan.notes[0]


def test_the_fast_path_of_attention_is_refused_and_can_be_turned_off():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)

    def forward(m, x, padded):
        return m.l(m.encoder(x, src_key_padding_mask=padded)).square().mean()

    sample = (torch.randn(2, 2, 8), torch.tensor([[False, True], [False, False]]))
    model = Model(forward, encoder=encoder)
    with pytest.raises(memplan.CaptureError, match="fast path"):
        memplan.optimize(model, sample)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert_right(model, sample)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def seeds(m, x):
    torch.manual_seed(3)
    return (m.l(x) * torch.rand(8)).sum()


def forks(m, x):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return (m.l(x) * torch.rand(8)).sum()


def with_hooks_on_saved_tensors(m, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return m.l(x).exp().square().sum()


def replaces_a_parameter(m, x):
    m.l.weight = nn.Parameter(m.l.weight * 2)
    return m.l(x).sum()


def writes_a_parameter(m, x):
    with torch.no_grad():
        m.l.weight.mul_(0.5)
    return m.l(x).sum()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(seeds), "random seed or state"),
        (Model(forks), "random seed or state"),
        (Model(lambda m, x: m.l(x).sum() * m.g.random(), g=random.Random(1)), "generator"),
        (
            Model(lambda m, x: m.l(x).sum() * m.g.random(), g=np.random.default_rng(1)),
            "generator",
        ),
        (
            Model(lambda m, x: (m.l(x) * torch.rand(8, generator=m.g)).sum(), g=torch.Generator()),
            "a torch.Generator of its own",
        ),
        (Model(with_hooks_on_saved_tensors), "hooks on saved tensors"),
        (
            Model(lambda m, x: checkpoint(m.l, x, use_reentrant=True).square().sum()),
            "use_reentrant=False",
        ),
        (Model(replaces_a_parameter), "replaces a parameter"),
        (Model(writes_a_parameter), "writes a parameter"),
    ],
)
def test_refused(model, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(memplan.MemplanError, match=message):
        memplan.optimize(model, x())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_zero_is_not_minus_zero():
    model = Model(lambda m, x: m.l(x).sum() * math.copysign(1.0, x[0, 0].item()))
    assert_right(model, torch.zeros(4, 8), -torch.zeros(4, 8))
    model = Model(lambda m, x, s: m.l(x).sum() * math.copysign(1.0, s))
    assert_right(model, (x(), 0.0), (x(), -0.0))


def test_nan_is_itself():
    model = Model(lambda m, x: m.l(x[1:]).sum() * (2 if math.isnan(float(x[0, 0])) else 1))
    sample = x()
    sample[0, 0] = math.nan
    planned = assert_right(model, sample, sample.clone())
    assert len(planned.plans) == 1


def test_a_branch_where_inputs_share_memory_is_refused():
    def forward(m, x, z):
        x.add_(100)
        return m.l(z * 1).sum() if z.sum() > 0 else m.l(z * 1).square().sum()

    sample = -torch.rand(4, 8)
    with pytest.raises(memplan.CaptureError, match="shares memory"):
        memplan.optimize(Model(forward), (sample, sample))


def test_a_branch_where_inputs_share_memory_and_none_is_written():
    def forward(m, x, z):
        return m.l(z * 1).sum() if z.sum() > 0 else m.l(z * x).square().sum()

    sample = -torch.rand(4, 8)
    assert_right(Model(forward), (sample, sample), (-sample, -sample), (sample, sample[:, :]))


def test_what_a_write_only_reads_is_still_known():
    def forward(m, x, edges):
        degrees = torch.zeros(4).scatter_add_(0, edges[0], torch.ones(6))
        is_loop = edges[0] == edges[1]
        y = m.l(x) * degrees[:, None]
        weights = y.mean(1)[edges[0]]
        weights[is_loop] -= 1
        return weights.square().sum()

    edges = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 2, 2, 1, 3, 1]])
    others = (torch.randn(4, 8), edges.flip(0)), (torch.randn(4, 8), edges * 0)
    planned = assert_right(Model(forward), (torch.randn(4, 8), edges), *others)
    assert len(planned.plans) == 2  # for three loops, and for six


def test_a_conjugated_view_is_not_its_base():
    def forward(m, x):
        y = x.conj()
        is_positive = torch.view_as_real(x * 1)[..., 1].sum() > 0
        total = m.l(x.real + 0 * y.real)
        return total.sum() if is_positive else total.square().sum()

    assert_right(Model(forward), torch.complex(x(), torch.rand(4, 8)))


def test_masks_of_every_kind():
    model = Model(
        lambda m, x, k: (
            m.l(x)[k[:, 0]].sum()
            + m.l(x)[..., k[0]].square().sum()
            + m.l(x)[None, k].sum()
            + m.l(x)[torch.where(k)].sum()
        )
    )
    calls = [(x(), torch.rand(4, 8) > 0.4) for _ in range(4)]
    assert_right(model, *calls)


def test_a_mask_of_the_wrong_length_is_refused():
    model = Model(lambda m, x, k: m.l(x)[k].sum())
    with pytest.raises(memplan.CaptureError):
        memplan.optimize(model, (x(), torch.tensor([True, False, True])))


def test_writing_by_a_mask():
    def forward(m, x, k):
        y = m.l(x) * 1
        y[k] = x[k] * 2
        return y.square().sum()

    assert_right(Model(forward), *[(x(), torch.rand(4) > 0.5) for _ in range(3)])


def test_places_of_a_mask_are_priced_as_they_are():
    sample = (torch.randn(512, 8), torch.ones(512, 8, dtype=torch.bool))
    model = Model(lambda m, x, k: m.l(x)[k].square().sum())
    planned = memplan.optimize(model, sample, budget="100%")
    laws.assert_within_budget(planned, sample)


def test_other_parts_of_a_storage_are_another_signature():
    def forward(m, x, z):
        return (m.l(x + z)).square().sum()

    base = torch.randn(8, 8)
    planned = memplan.optimize(Model(forward), (base[:4], base[4:]))
    planned(base[:4], base[:4])
    assert len(planned.plans) == 2


def test_buffers_that_are_no_longer_tied():
    model = Model(lambda m, x: (m.l(x) * m.b * m.c.b).sum(), c=nn.Identity())
    model.register_buffer("b", torch.ones(8))
    model.c.register_buffer("b", model.b)
    sample = x()
    planned = memplan.optimize(model, sample)
    model.c.b = torch.full((8,), 5.0)
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


def test_dropout_of_everything_draws_nothing():
    assert_right(Model(lambda m, x: nn.functional.dropout(m.l(x), 1.0).sum() + m.l(x).sum()), x())


@pytest.mark.filterwarnings("ignore:the forward changes attributes:UserWarning")
def test_every_trace_of_the_forward_starts_from_the_same_attributes():
    def forward(m, x):
        m.n += 1
        return m.l(x).sum() * m.n

    model, sample = Model(forward, n=0), x()
    planned = memplan.optimize(model, sample, options=memplan.Options(verify="none"))
    assert torch.equal(planned(sample), model.run(Model(forward, n=0, l=model.l), sample))
    assert model.n == 0


def caches_in_a_dict(m, x):
    if 8 not in m.cache:
        m.cache[8] = torch.arange(8.0)
    m.outputs.append(m.l(x))
    return (m.l(x) * m.cache[8]).sum()


@pytest.mark.filterwarnings("ignore:the forward changes attributes:UserWarning")
def test_containers_are_left_as_they_were():
    model, sample = Model(caches_in_a_dict, cache={}, outputs=[]), x()
    planned = memplan.optimize(model, sample)
    assert model.cache == {} and model.outputs == []
    assert "cache, outputs" in planned.plan.notes[0]
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


@pytest.mark.filterwarnings("ignore:the forward changes attributes:UserWarning")
def test_a_tensor_made_at_the_first_call():
    def forward(m, x):
        if m.table is None:
            m.table = torch.arange(8.0)
        return (m.l(x) * m.table).sum()

    assert_right(Model(forward, table=None), x())


def test_a_refused_capture_writes_nothing():
    def forward(m, x):
        m.held[0].add_(1)
        m.plain.add_(1)
        return (m.l(x) * m.b * m.plain).sum()

    model = Model(forward, plain=torch.zeros(8))
    model.register_buffer("b", torch.zeros(8))
    model.held = [model.b]
    with pytest.raises(memplan.MemplanError):
        memplan.optimize(model, x())
    assert torch.equal(model.b, torch.zeros(8)) and torch.equal(model.plain, torch.zeros(8))


@functools.cache
def table(size):
    return torch.arange(float(size))


def test_a_table_that_was_made_before():
    table(8)
    assert_right(Model(lambda m, x: (m.l(x) * table(8)).sum()), x())


class Features(nn.Module):
    """A backbone that puts hooks on its layers the first time that it runs."""

    def __init__(self):
        super().__init__()
        config = transformers.Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            out_features=["stage2"],
        )
        self.backbone = transformers.Dinov2Backbone(config)

    def forward(self, images):
        return self.backbone(images).feature_maps[-1].square().mean()


def test_a_backbone_that_hooks_its_layers_while_it_runs():
    assert_right(Features(), torch.randn(2, 3, 32, 32))
