"""Masks in the place of what rectifiers were given: the same bits, a quarter of the bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import memplan
from memplan.capture import read, rewrite, trace
from memplan.passes import signs

from support import laws

aten = torch.ops.aten
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
RECTIFIERS = [
    (aten.threshold_backward.default, (0,)),
    (aten.threshold_backward.default, (0.1,)),
    (aten.threshold_backward.default, (-1,)),
    (aten.hardtanh_backward.default, (0.0, 6.0)),
    (aten.hardtanh_backward.default, (-0.1, 0.1)),
    (aten.leaky_relu_backward.default, (0.01, False)),
    (aten.leaky_relu_backward.default, (0.3, True)),
    (aten.leaky_relu_backward.default, (0.0, False)),
    (aten.leaky_relu_backward.default, (-0.5, False)),
]


def same_bits(one, other):
    kind = BITS[one.element_size()]
    return torch.equal(one.view(kind), other.view(kind)) and one.stride() == other.stride()


def special(dtype):
    """All pairs of special values, and of those next to the bounds; and many ordinary ones."""
    bounds = torch.tensor([0.0, 0.1, -0.1, 1, -1, 6], dtype=dtype)
    up, down = (torch.full_like(bounds, sign * torch.inf) for sign in (1, -1))
    others = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38], dtype=dtype)
    values = torch.cat([bounds, bounds.nextafter(up), bounds.nextafter(down), others])
    pairs = torch.cartesian_prod(values, values)
    return torch.cat([pairs, torch.randn(4096 - len(pairs), 2).to(dtype)]).unbind(1)


CHANNELS_FIRST, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(params=[1 << 17, 128], ids=["whole", "in parts"])
def parts(request, monkeypatch):
    monkeypatch.setattr(signs, "_LEAST_PART", request.param)


@pytest.mark.parametrize("layout", [CHANNELS_FIRST, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "numbers"), RECTIFIERS, ids=str)
@pytest.mark.usefixtures("parts")
def test_a_mask_lets_through_what_the_kernel_does(op, numbers, dtype, layout):
    gradient, values = (column.contiguous().view(8, 4, 8, 16) for column in special(dtype))
    values = values.contiguous(memory_format=torch.channels_last)
    gradient = gradient.contiguous(memory_format=layout)
    expected = op(gradient, values, *numbers)
    mask = signs.let_through(values, expected.stride(), str(op), numbers)
    assert mask.dtype is torch.bool and mask.stride() == expected.stride()
    found = signs.rectify(gradient, mask, str(op), numbers)
    if dtype is torch.bfloat16:
        # Which NaN a kernel writes depends there on the place of an element in a block.
        assert torch.equal(expected.isnan(), found.isnan())
        expected, found = expected.nan_to_num(7), found.nan_to_num(7)
    assert same_bits(expected, found)
    if dtype is not torch.bfloat16 and gradient.stride() == expected.stride():
        written = gradient.clone()
        assert signs.rectify_(written, mask, str(op), numbers) is written
        assert same_bits(written, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_relus_result_as_a_boolean_is_its_mask(dtype):
    values = special(dtype)[1].contiguous().relu()
    mask = signs.let_through(values, values.stride(), "aten.threshold_backward.default", (0,))
    assert torch.equal(mask, values.to(torch.bool))


class Frozen(nn.Module):
    """A frozen convolution and norm, and what rectifies their sum with the input."""

    def __init__(self, rectifier, channels=16):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.rectifier = rectifier
        self.eval().requires_grad_(False)

    def forward(self, x):
        return self.rectifier(self.norm(self.conv(x)) + x)


def classifier(*middle, layout=torch.contiguous_format, dtype=torch.float32):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *middle)
    body = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    body.to(memory_format=layout, dtype=dtype)
    images = torch.randn(8, 3, 16, 16, dtype=dtype).contiguous(memory_format=layout)
    model = memplan.WithLoss(body, nn.functional.cross_entropy)
    return model, (images, torch.randint(0, 4, (8,)))


TENSOR_BYTES = 8 * 16 * 16 * 16 * 4
PASSES = ("drop_dead_operands", "keep_signs", "reuse_operands")


def planned(model, batch, names=PASSES, budget="100%"):
    # Whether a mask is worth its time is another question.
    passes = [replace(memplan.passes.PASSES[name](), is_optional=False) for name in names]
    found = memplan.optimize(model, batch, budget=budget, default_passes=False, passes=passes)
    laws.assert_same_bits(laws.step(model, batch), laws.step(found, batch))
    laws.assert_within_budget(found, batch)
    return found


def above(found):
    return found.plan.peak_bytes - found.plan.resident_bytes


def masks(model, batch):
    """The masks that the pass makes, and the rectifiers that read one."""
    found = rewrite(
        trace(model, memplan.Sample.of(batch)),
        [memplan.passes.PASSES[name]().rewrite_joint for name in PASSES],
    )
    made = {node.args[1] for node in found.joint.graph.nodes if node.target is signs.rectify}
    captured = read(found)
    phases = {captured.calls[op.id]: op.phase.value for op in captured.program.ops}
    assert all(phases[node] == "forward" for node in made)
    return made, [n for n in found.joint.graph.nodes if n.target is signs.rectify]


@pytest.mark.by_default(
    "ReLU()-torch.contiguous_format", "LeakyReLU(negative_slope=0.01)-torch.contiguous_format"
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "rectifier",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.Hardtanh(), nn.LeakyReLU()],
    ids=str,
)
def test_between_frozen_layers_masks_are_all_that_is_kept(rectifier, layout):
    model, batch = classifier(*(Frozen(rectifier) for _ in range(6)), layout=layout)
    made, readers = masks(model, batch)
    assert len(made) == len(readers) == 6
    assert all(mask.meta["val"].dtype is torch.bool for mask in made)
    before = planned(model, batch, ("drop_dead_operands", "reuse_operands"))
    assert above(before) - above(planned(model, batch)) > 2.5 * TENSOR_BYTES


def test_in_bfloat16_as_well():
    model, batch = classifier(*(Frozen(nn.ReLU6()) for _ in range(4)), dtype=torch.bfloat16)
    assert len(masks(model, batch)[0]) == 4
    before = planned(model, batch, ("drop_dead_operands", "reuse_operands"))
    assert above(planned(model, batch)) < above(before)


@pytest.mark.parametrize(
    "after", [nn.MaxPool2d(2), nn.Dropout(0.3), nn.AvgPool2d(3, 1), nn.ReflectionPad2d(2)], ids=str
)
def test_before_what_reads_no_values_a_mask_is_kept_although_all_trains(after):
    model, batch = classifier(nn.ReLU(), after, nn.Conv2d(16, 16, 1), nn.SiLU())
    assert len(masks(model, batch)[0]) == 1
    planned(model, batch, ("split_dropout", *PASSES))


@pytest.mark.parametrize(
    "middle",
    [
        (nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)),  # the convolution's weight reads it
        (nn.ReLU(), nn.SiLU()),
        (nn.BatchNorm2d(16), nn.ReLU6()),  # recomputed as fast from what the norm keeps
        (nn.Sigmoid(), nn.LeakyReLU()),  # what is rectified is kept for the sigmoid
    ],
    ids=["convolution", "silu", "norm", "sigmoid"],
)
def test_what_something_else_reads_is_left_alone(middle):
    model, batch = classifier(*middle)
    assert not masks(model, batch)[0]


def test_outputs_and_small_tensors_are_left_alone():
    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(256))

        def forward(self, x):
            y = (x * self.scale).relu()
            return y.sum(), y

    assert not masks(Returned(), (torch.randn(512, 256),))[0]
    model, batch = classifier(nn.ReLU(), nn.MaxPool2d(2))
    small = batch[0][:1, :, :4, :4], batch[1][:1]
    assert not masks(model, small)[0]


class Twice(nn.Module):
    """Rectifies the same memory more than once, in the same way or not, and through views."""

    def __init__(self, *rectifiers):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(256))
        self.rectifiers = nn.ModuleList(rectifiers)

    def forward(self, x):
        y = x + self.scale
        return sum(rectifier(y).square().sum() for rectifier in self.rectifiers)


@pytest.mark.parametrize(
    ("rectifiers", "expected"),
    [
        ((nn.Hardtanh(), nn.Hardtanh()), 1),
        ((nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)), 1),
        ((nn.Hardtanh(), nn.ReLU6(), nn.LeakyReLU()), 3),
        ((nn.Hardtanh(), nn.Hardtanh(-2, 2), nn.ReLU6(), nn.LeakyReLU()), 0),
    ],
    ids=["shared", "shared by slopes", "three", "as large as the tensor"],
)
def test_rectifiers_of_one_memory_share_masks(rectifiers, expected):
    model, batch = Twice(*rectifiers), (torch.randn(512, 256),)
    made, readers = masks(model, batch)
    assert len(made) == expected and len(readers) == (len(rectifiers) if expected else 0)
    planned(model, batch)


class Halves(nn.Module):
    """Rectifies two views of one tensor."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(512, 256))

    def forward(self, x):
        upper, lower = (x * self.scale).chunk(2, dim=self.dim)
        upper, lower = nn.functional.leaky_relu(upper), nn.functional.hardtanh(lower)
        return upper.square().sum() + lower.square().sum()


@pytest.mark.parametrize("dim", [0, 1])
def test_views_are_masked(dim):
    model, batch = Halves(dim), (torch.randn(512, 256),)
    assert len(masks(model, batch)[0]) == 2
    planned(model, batch)


def test_masks_are_packed_where_bytes_are_short():
    model, batch = classifier(*(Frozen(nn.ReLU()) for _ in range(8)))
    whole = planned(model, batch)
    share = (above(whole) - 6 * TENSOR_BYTES // 4 * 3 // 4) / above(planned(model, batch, ()))
    packed = planned(model, batch, (*PASSES, "pack_masks"), budget=f"{share:.1%}")
    steps = packed.plan.schedule.forward
    assert any(isinstance(step, memplan.ir.schedule.Stash) for step in steps)


@pytest.mark.parametrize("max_slowdown", [1.0, 1.02, 1.3])
def test_masks_are_made_where_the_plan_is_better_for_them(max_slowdown):
    model, batch = classifier(*(Frozen(nn.ReLU()) for _ in range(6)))
    plans = [
        memplan.plan(model, batch, max_slowdown=max_slowdown, passes=passes, default_passes=False)
        for passes in (
            [memplan.passes.PASSES[name]() for name in ("drop_dead_operands", *more)]
            for more in ((), ("keep_signs",))
        )
    ]
    assert plans[1].peak_bytes <= plans[0].peak_bytes
    assert plans[1].slowdown <= max(max_slowdown, plans[0].slowdown)


def test_a_whole_budget_is_kept_in_the_least_time():
    model, batch = classifier(*(Frozen(nn.ReLU()) for _ in range(6)))
    names = ("drop_dead_operands", "keep_signs")
    passes = [memplan.passes.PASSES[name]() for name in names]
    both = memplan.plan(model, batch, budget="100%", passes=passes, default_passes=False)
    one = memplan.plan(model, batch, budget="100%", passes=passes[:1], default_passes=False)
    assert both.seconds <= one.seconds
    saved = memplan.Plan.from_json(both.to_json())
    assert memplan.optimize(model, batch, plan=saved).plan.schedule == both.schedule
