"""Operands that are not read: the same bits without them, and no bytes kept for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.analysis import operands

from support import laws

aten = torch.ops.aten
X = (2, 6, 8, 8)
DEEP_X = (2, 3, 4, 4, 6)


def images(*shape, layout=torch.contiguous_format):
    return torch.randn(*shape).contiguous(memory_format=layout)


def convolution(outputs, kernel, stride, groups=1, bias=False):
    def made(layout):
        x, weight = images(*X, layout=layout), torch.randn(outputs, 6 // groups, kernel, kernel)
        more = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups)
        y = aten.convolution(x, weight, None, *more)
        sizes = [outputs] if bias else None
        return torch.randn_like(y), x, weight, sizes, *more, [True, False, bias]

    return aten.convolution_backward.default, made


def pooled(op, output, *more):
    return op, lambda layout: (images(*output, layout=layout), images(*X, layout=layout), *more)


def max_pool(layout):
    x = images(*X, layout=layout)
    y, where = aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])
    return torch.randn_like(y), x, [3, 3], [2, 2], [1, 1], [1, 1], False, where


def adaptive_max_pool(layout):
    x = images(*X, layout=layout)
    y, where = aten.adaptive_max_pool2d(x, [3, 3])
    return torch.randn_like(y), x, where


def batch_norm(layout):
    x, one = images(*X, layout=layout), torch.rand(6) + 1
    empty = torch.empty(0)
    return torch.randn_like(x), x, one, one, one, empty, empty, False, 1e-5, [True, False, True]


def layer_norm(layout):
    x, one = torch.randn(4, 5, 6), torch.ones(6)
    _, mean, scale = aten.native_layer_norm(x, [6], one, one, 1e-5)
    return torch.randn(4, 5, 6), x, [6], mean, scale, one, one, [False, False, True]


def group_norm(layout):
    x, one = torch.randn(*X), torch.ones(6)  # torch 2.13.0 crashes with channels last
    sizes = (2, 6, 64, 3)
    _, mean, scale = aten.native_group_norm(x, one, one, *sizes, 1e-5)
    return torch.randn(*X), x, mean, scale, one, *sizes, [False, False, True]


def volumes(layout, *shape):
    deep = torch.channels_last_3d if layout is torch.channels_last else layout
    return images(*shape, layout=deep)


def deep(op, output, *more):
    return op, lambda layout: (volumes(layout, *output), volumes(layout, *DEEP_X), *more)


def deep_max_pool(layout):
    x = volumes(layout, *DEEP_X)
    y, where = aten.max_pool3d_with_indices(x, [3] * 3, [2] * 3, [1] * 3)
    return torch.randn_like(y), x, [3] * 3, [2] * 3, [1] * 3, [1] * 3, False, where


def deep_adaptive_max_pool(layout):
    x = volumes(layout, *DEEP_X)
    y, where = aten.adaptive_max_pool3d(x, [2, 2, 2])
    return torch.randn_like(y), x, where


def likelihood(op, *shape):
    def made(layout):
        x, target = torch.randn(shape), torch.randint(shape[1], (shape[0], *shape[2:]))
        return torch.tensor(0.7), x, target, None, 1, -100, torch.tensor(float(target.numel()))

    return op, made


CASES = {
    "convolution": convolution(6, 3, 1),
    "convolution and its bias": convolution(6, 3, 1, bias=True),
    "wider": convolution(12, 1, 1),
    "narrower": convolution(3, 1, 1),
    "strided": convolution(8, 3, 2),
    "depthwise": convolution(6, 3, 1, groups=6),
    "batch norm": (aten.native_batch_norm_backward.default, batch_norm),
    "layer norm": (aten.native_layer_norm_backward.default, layer_norm),
    "group norm": (aten.native_group_norm_backward.default, group_norm),
    "max pool": (aten.max_pool2d_with_indices_backward.default, max_pool),
    "adaptive max pool": (aten.adaptive_max_pool2d_backward.default, adaptive_max_pool),
    "average pool": pooled(
        aten.avg_pool2d_backward.default, (2, 6, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None
    ),
    "adaptive average pool": pooled(aten._adaptive_avg_pool2d_backward.default, (2, 6, 3, 3)),
    "one average": pooled(aten._adaptive_avg_pool2d_backward.default, (2, 6, 1, 1)),
    "reflection": pooled(aten.reflection_pad2d_backward.default, (2, 6, 12, 12), [2, 2, 2, 2]),
    "replication": pooled(aten.replication_pad2d_backward.default, (2, 6, 12, 12), [2, 2, 2, 2]),
    "reflection of rows": (
        aten.reflection_pad1d_backward.default,
        lambda layout: (torch.randn(2, 3, 12), torch.randn(2, 3, 8), [2, 2]),
    ),
    "replication of rows": (
        aten.replication_pad1d_backward.default,
        lambda layout: (torch.randn(2, 3, 12), torch.randn(2, 3, 8), [2, 2]),
    ),
    "deep max pool": (aten.max_pool3d_with_indices_backward.default, deep_max_pool),
    "deep adaptive max pool": (aten.adaptive_max_pool3d_backward.default, deep_adaptive_max_pool),
    "deep average pool": deep(
        aten.avg_pool3d_backward.default,
        (2, 3, 2, 2, 3),
        *([2] * 3, [2] * 3, [0] * 3, False, True, None),
    ),
    "deep adaptive average pool": deep(aten._adaptive_avg_pool3d_backward.default, (2, 3, 2, 2, 2)),
    "deep reflection": deep(aten.reflection_pad3d_backward.default, (2, 3, 6, 6, 8), [1] * 6),
    "deep replication": deep(aten.replication_pad3d_backward.default, (2, 3, 6, 6, 8), [1] * 6),
    "likelihood": likelihood(aten.nll_loss_backward.default, 7, 5),
    "likelihood of places": likelihood(aten.nll_loss2d_backward.default, 2, 5, 4, 4),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_that_does_not_read_an_operand_has_the_same_bits_without_it(name, layout):
    op, make = CASES[name]
    gradient, operand, *more = make(layout)
    strides = operands.stand_in_strides(gradient, operand)
    if strides is None:
        assert layout is torch.channels_last
        return
    stand_in = gradient.as_strided(operand.shape, strides)
    expected, found = op(gradient, operand, *more), op(gradient, stand_in, *more)
    if op in operands.FOR_SHAPE:
        expected, found, wanted = [expected], [found], [True]
    else:
        wanted = more[-1]
    for one, other, is_wanted in zip(expected, found, wanted, strict=True):
        if is_wanted:
            assert one.stride() == other.stride()
            assert torch.equal(one, other)


def test_every_op_of_the_tables_is_tried():
    tried = {op for op, _ in CASES.values()}
    assert tried == {*operands.FOR_SHAPE, *operands.FOR_PARAMETERS}


def frozen_stack(*middle):
    layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *middle, nn.Flatten(), nn.LazyLinear(4))
    batch = torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,))
    layers(batch[0])
    layers[1:-1].requires_grad_(False).eval()
    return memplan.WithLoss(layers, nn.functional.cross_entropy), batch


def kept_bytes(model, batch, *, with_pass):
    passes = [memplan.passes.drop_dead_operands()] if with_pass else []
    planned = memplan.optimize(model, batch, budget="100%", default_passes=False, passes=passes)
    laws.assert_same_bits(laws.step(model, batch), laws.step(planned, batch))
    laws.assert_within_budget(planned, batch)
    return planned.plan.peak_bytes - planned.plan.resident_bytes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_frozen_convolutions_and_norms_keep_nothing(layout):
    pairs = [(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)) for _ in range(6)]
    model, batch = frozen_stack(*(layer for pair in pairs for layer in pair))
    model.to(memory_format=layout)
    batch = (batch[0].contiguous(memory_format=layout), batch[1])
    before = kept_bytes(model, batch, with_pass=False)
    after = kept_bytes(model, batch, with_pass=True)
    assert after < 0.4 * before


def test_pooling_keeps_nothing_unless_something_else_does():
    model, batch = frozen_stack(nn.SiLU(), nn.MaxPool2d(2), nn.SiLU(), nn.AvgPool2d(2))
    image_bytes = 8 * 16 * 16 * 16 * 4
    saved = kept_bytes(model, batch, with_pass=False) - kept_bytes(model, batch, with_pass=True)
    assert saved > image_bytes // 2  # the peak is elsewhere then
    model, batch = frozen_stack(nn.ReLU(), nn.MaxPool2d(2))
    assert kept_bytes(model, batch, with_pass=False) == kept_bytes(model, batch, with_pass=True)
