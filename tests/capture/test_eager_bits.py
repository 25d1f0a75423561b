"""What other people's modules do: the bits are eager's, or the reason why not is said."""

from __future__ import annotations

import pytest
import torch
from torch import manual_seed as seed_by_another_name
from torch import nn
from torch.utils.checkpoint import checkpoint

import memplan
from memplan.torch_internals import TRACED_IN_PYTHON, python_kernels

from support.databases import freeze_rng_state
from support.modules import Model, assert_eager_bits

COMPILED = {
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "_upsample_lanczos2d_aa",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "broadcast_tensors",
    "empty",
    "hardshrink",
    "istft",
    "matmul",
    "multi_margin_loss",
    "multilabel_margin_loss_forward",
    "one_hot",
    "pad_sequence",
    "softshrink",
    "stft",
    "tensor_split",
    "to_dense",
    "unsafe_chunk",
    "upsample_bicubic2d",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_trilinear3d",
}
"""Ops with a kernel in Python that a trace takes by their compiled kernels, as eager does."""


def test_every_kernel_in_python_is_known():
    """One that is new in a release of torch is to be looked at."""
    names = {op._schema.name.removeprefix("aten::") for op in python_kernels()}
    assert names <= COMPILED | TRACED_IN_PYTHON.keys()
    assert not COMPILED & TRACED_IN_PYTHON.keys()


class Resized(nn.Module):
    """A convolution, a resizing, a convolution."""

    def __init__(self, dims, **resizing):
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.before, self.after = convolution(2, 4, 3, padding=1), convolution(4, 2, 3, padding=1)
        self.resizing = resizing

    def forward(self, x):
        return self.after(
            nn.functional.interpolate(self.before(x), scale_factor=2, **self.resizing)
        ).sum()


RESIZED = {
    "nearest": (2, {"mode": "nearest"}),
    "nearest-exact": (3, {"mode": "nearest-exact"}),
    "linear": (1, {"mode": "linear"}),
    "bilinear": (2, {"mode": "bilinear"}),
    "bilinear, corners": (2, {"mode": "bilinear", "align_corners": True}),
    "bilinear, smooth": (2, {"mode": "bilinear", "antialias": True}),
    "bicubic": (2, {"mode": "bicubic"}),
    "trilinear": (3, {"mode": "trilinear"}),
}


@pytest.mark.by_default("linear", "bilinear", "bicubic")
@pytest.mark.parametrize("name", RESIZED)
def test_resizing_by_the_kernels_that_eager_runs(name):
    dims, resizing = RESIZED[name]
    model, x = Resized(dims, **resizing), torch.randn(2, 2, *[7] * dims)
    assert_eager_bits(model, x)
    planned = memplan.optimize(model, x, budget="100%")
    assert planned.plan.num_ops < 15


LABELS = torch.arange(7) % 6
CLASSES = torch.linspace(0.3, 1.7, 6)
LOSSES = {
    "multi_margin": lambda m, a, b: nn.functional.multi_margin_loss(a, LABELS),
    "multilabel_margin": lambda m, a, b: nn.functional.multilabel_margin_loss(
        a, LABELS[:, None].repeat(1, 6)
    ),
    "shrunk": lambda m, a, b: (
        (nn.functional.softshrink(a) + nn.functional.hardshrink(b)).square().sum()
    ),
    "spectrum": lambda m, a, b: (
        torch.stft(a, 4, window=torch.hann_window(4), return_complex=True).abs().sum()
    ),
    "padded": lambda m, a, b: nn.utils.rnn.pad_sequence([a[:3], b]).square().sum(),
    "product": lambda m, a, b: torch.matmul(a.view(7, 2, 3), b.view(7, 3, 2)).square().sum(),
    "smoothed labels": lambda m, a, b: nn.functional.cross_entropy(
        a * b, LABELS, CLASSES, label_smoothing=0.1
    ),
    "smoothed labels, some ignored": lambda m, a, b: nn.functional.cross_entropy(
        a * b, LABELS, b[0].detach().sigmoid(), ignore_index=1, label_smoothing=0.1
    ),
    "smoothed labels of images": lambda m, a, b: nn.CrossEntropyLoss(CLASSES, label_smoothing=0.1)(
        a.expand(3, 7, 6).mT, LABELS.expand(3, 7)
    ),
    "smoothed labels of a linear layer": lambda m, a, b: nn.functional.linear_cross_entropy(
        a, b[:6], LABELS, weight=CLASSES, ignore_index=1, label_smoothing=0.1
    ),
    "smoothed labels under autocast": lambda m, a, b: smoothed_under_autocast(a, b),
    "quotients of complex numbers": lambda m, a, b: (
        (torch.complex(a, b)[:5, :4] / torch.complex(b, a)[:5, :4]).abs().sum()
    ),
    "logarithms of complex numbers": lambda m, a, b: torch.complex(a, b)[:5, :4].log().abs().sum(),
}


def smoothed_under_autocast(a, b):
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.cross_entropy(a @ b.mT, LABELS, CLASSES[[0] * 7], label_smoothing=0.1)


@pytest.mark.by_default(
    *("multi_margin", "multilabel_margin", "padded", "smoothed labels, some ignored"),
    *("smoothed labels of a linear layer", "quotients of complex numbers"),
)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_the_kernels_that_eager_runs(name):
    torch.manual_seed(0)
    assert_eager_bits(Model(LOSSES[name]), torch.randn(7, 5))


class Ignores(torch.autograd.Function):
    """A sum whose gradient is that of a square, whatever arrives."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        del gradient
        return 2 * ctx.saved_tensors[0]


INDEPENDENT = {
    "all": lambda m, a, b: Ignores.apply(a),
    "beside another": lambda m, a, b: Ignores.apply(a.tanh()) + b.exp().sum(),
    "copysign": lambda m, a, b: torch.copysign(a, b).square().sum(),
    "round": lambda m, a, b: (a.round() + b).sum(),
    "sign": lambda m, a, b: (a.sign() * b.floor()).sum(),
    "detached": lambda m, a, b: a.sum() + b.detach().sum(),
    "unused": lambda m, a, b: a.sum(),
    "of nothing": lambda m, a, b: torch.linalg.householder_product(a[:0, :0], b[0, :0]).sum(),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_gradients_that_do_not_depend_on_what_arrives(name):
    assert_eager_bits(Model(INDEPENDENT[name]), torch.randn(7, 5))


def test_an_input_whose_gradient_does_not_depend_on_what_arrives():
    x = torch.randn(7, 5)
    model = Model(lambda m, a, b: Ignores.apply(a))
    given, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(given).backward()
    memplan.optimize(model, other)(other).backward()
    assert torch.equal(given.grad, other.grad)


def test_a_part_that_another_output_brings_whatever_arrives_there():
    model = Model(lambda m, a, b: (Ignores.apply(a), a.sum() + b.sum()))
    x, options = torch.randn(7, 5), memplan.Options(differentiable_outputs="all")
    planned = memplan.optimize(model, x, options=options)
    with pytest.raises(memplan.PlanMismatch, match="does not depend on what arrives"):
        planned(x)[1].backward()
    for module in (model, planned):
        model.zero_grad()
        sum(module(x)).backward()
        if module is model:
            expected = [p.grad.clone() for p in model.parameters()]
    assert all(map(torch.equal, expected, (p.grad for p in model.parameters())))


def assigns_first(m, a, b):
    m.scale.data = m.scale * 0.5 + a.detach().mean(0)
    return (a * m.scale).sum() + b.sum()


def assigns_without_gradients(m, a, b):
    with torch.no_grad():
        m.scale.data = m.scale.mul(0.5)
    return (a * m.scale).sum() + b.sum()


def assigns_what_it_reads(m, a, b):
    m.scale.data = m.scale.data.mul(0.5)
    return (a * m.scale).sum() + b.sum()


@pytest.mark.parametrize("loss", [assigns_first, assigns_without_gradients, assigns_what_it_reads])
def test_data_of_a_buffer(loss):
    assert_eager_bits(Model(loss), torch.randn(7, 5))


def assigns_last(m, a, b):
    loss = (a * m.scale).sum() + b.sum()
    m.scale.data = m.scale * 0.5
    return loss


def assigns_an_activation(m, a, b):
    a.data = a.detach().round()
    return (a * a).sum() + b.sum()


def assigns_a_parameter(m, a, b):
    m.one.weight.data = m.one.weight * 0.5
    return a.sum() + b.sum()


def assigns_another_shape(m, a, b):
    m.scale.data = torch.ones(3)
    return a.sum() + b.sum()


def assigns_a_view(m, a, b):
    view = m.scale.view(2, 3)
    view.data = view * 2  # which leaves the buffer alone
    return (a * m.scale).sum() + b.sum()


def assigns_beside_a_view(m, a, b):
    with torch.no_grad():
        view = m.scale.view(6)
        m.scale.data = m.scale * 2
    return (a * view).sum() + b.sum()


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (assigns_a_view, "assigns to .data of a tensor"),
        (assigns_beside_a_view, "while another tensor has its memory"),
        (assigns_last, "buffer 'scale' after it has computed with it"),
        (assigns_an_activation, r"assigns to .data of a tensor .torch.float32, \(7, 6\)"),
        (assigns_a_parameter, "assigns to .data of a tensor"),
        (assigns_another_shape, r"what is torch.float32, \(3,\)"),
    ],
)
def test_data_of_others(loss, why):
    model = Model(loss)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(memplan.CaptureError, match=why):
        memplan.optimize(model, torch.randn(7, 5))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def seeds_by_name(m, a, b):
    seed_by_another_name(3)
    return nn.functional.dropout(a + b).sum()


def seeds_the_generator(m, a, b):
    torch.default_generator.manual_seed(3)
    return nn.functional.dropout(a + b).sum()


def sets_a_state(m, a, b):
    state = torch.Generator().manual_seed(3).get_state()
    torch.default_generator.set_state(state)
    return nn.functional.dropout(a + b).sum()


def seeds_anew(m, a, b):
    torch.seed()
    return nn.functional.dropout(a + b).sum()


def seeds_for_a_while(m, a, b):
    with freeze_rng_state():
        torch.manual_seed(3)
        return nn.functional.dropout(a + b).sum()


@pytest.mark.parametrize(
    "loss",
    [seeds_by_name, seeds_the_generator, sets_a_state, seeds_anew, seeds_for_a_while],
)
def test_seeds_under_any_name(loss):
    with pytest.raises(memplan.CaptureError, match="sets torch's random seed or state"):
        memplan.optimize(Model(loss), torch.randn(7, 5))


class Checkpointed(nn.Module):
    """A layer and a norm under torch's checkpoint."""

    def __init__(self, norm):
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(5, 6), norm, nn.Linear(6, 2)

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False)).square().sum()

    def inner(self, x):
        return self.norm(self.layer(x)).relu()


def test_buffers_that_checkpointing_writes_twice():
    with pytest.raises(
        memplan.CaptureError, match=r"'norm\.num_batches_tracked' is written inside"
    ):
        memplan.optimize(Checkpointed(nn.BatchNorm1d(6)), torch.randn(7, 5))
    assert_eager_bits(Checkpointed(nn.BatchNorm1d(6).eval()), torch.randn(7, 5))
    assert_eager_bits(Checkpointed(nn.LayerNorm(6)), torch.randn(7, 5))


ENDS = {
    "dropout": nn.Dropout(0.3),
    "dropout in place": nn.Dropout(0.3, inplace=True),
    "relu": nn.ReLU(),
    "norm": nn.BatchNorm1d(6),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_output_that_a_pass_rewrites(end):
    model, x = nn.Sequential(nn.Linear(5, 6), ENDS[end]), torch.randn(7, 5)
    summed = memplan.WithLoss(model, lambda output, target: (output * target).sum())
    assert_eager_bits(summed, (x, torch.randn(7, 6)))
    planned = memplan.optimize(model, x)
    results = []
    for module in (model, planned):
        torch.manual_seed(1)
        output = module(x)
        model.zero_grad()
        output.square().sum().backward()
        results.append([output.detach().clone(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


class Frozen(dict):
    """A configuration that is read alone."""

    def refuse(self, *args):
        raise TypeError("frozen")

    __setitem__ = __delitem__ = update = clear = pop = setdefault = __reduce_ex__ = refuse

    def __deepcopy__(self, memo):
        return Frozen(self)


def test_a_configuration_that_cannot_be_written():
    model = Model(lambda m, a, b: (a * m.settings["factor"] + b).sum())
    model.settings, model.plain = Frozen(factor=2.0), {"factor": 2.0}
    assert_eager_bits(model, torch.randn(7, 5))
    assert model.settings == {"factor": 2.0}
    failing = Model(lambda m, a, b: a.sum() if a.sum() > 0 else b.sum())
    failing.settings, failing.plain = Frozen(factor=2.0), model.plain
    with pytest.raises(memplan.CaptureError):
        memplan.optimize(failing, torch.randn(7, 5))
    assert failing.settings == failing.plain == {"factor": 2.0}


def changes_settings(m, a, b):
    m.settings["factor"] += 1
    m.settings.setdefault("steps", []).append(1)
    return (a * m.settings["factor"] + b).sum()


@pytest.mark.filterwarnings("ignore:the forward changes attributes:UserWarning")
def test_a_configuration_that_the_forward_writes_is_as_before():
    model = Model(changes_settings)
    model.settings = {"first": None, "factor": 2.0}
    planned = memplan.optimize(model, torch.randn(7, 5))
    assert list(model.settings.items()) == [("first", None), ("factor", 2.0)]
    assert "changes attributes" in planned.plan.notes[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own making
@pytest.mark.filterwarnings("ignore:.torch.jit.script.*:FutureWarning")  # of torch 2.14's own
def test_transforms_of_functions_are_refused():
    model, x = Model(lambda m, a, b: (a * b).sum()), torch.randn(7, 5)
    planned = memplan.optimize(model, x)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(state):
        return torch.func.functional_call(planned, state, (x,))

    with pytest.raises(memplan.PlanMismatch, match=r"transform of torch\.func.*planned\.original"):
        torch.func.grad(loss)(state)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(memplan.PlanMismatch, match="forward-mode differentiation"),
    ):
        planned(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_wrappers_for_several_devices_are_refused(tmp_path):
    inner = Model(lambda m, a, b: (a * b).sum())
    with pytest.raises(memplan.MemplanError, match="is a DataParallel, whose parameters are split"):
        memplan.optimize(nn.DataParallel(inner), torch.randn(7, 5))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(inner)
        with pytest.raises(memplan.MemplanError, match=r"DataParallel\(memplan\.optimize\(module"):
            memplan.optimize(wrapped, torch.randn(7, 5))
    finally:
        torch.distributed.destroy_process_group()


PRODUCTS = {
    "all": lambda m, a, b: a.prod() + b.sum(),
    "rows": lambda m, a, b: (a.prod(dim=1) * b.prod(dim=0, keepdim=True)[0, 0]).sum(),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_gradient_of_a_product_is_said_to_be_rounded(name):
    assert_eager_bits(Model(PRODUCTS[name]), torch.randn(7, 5), effect=memplan.Effect.ROUNDING)
    running = Model(lambda m, a, b: (a.cumprod(1) + b.detach().prod()).sum())
    planned = memplan.optimize(running, torch.randn(7, 5))
    assert planned.plan.effects == (memplan.Effect.EXACT,)


def square(a):
    return a[:6] @ a[:6].T + 3 * torch.eye(6)


LINALG = {
    "inverse": lambda m, a, b: (torch.linalg.inv(square(a)) @ torch.linalg.inv(square(b))).sum(),
    "solve": lambda m, a, b: torch.linalg.solve(square(a), b[:6]).square().sum(),
    "cholesky": lambda m, a, b: torch.linalg.cholesky(square(a)).sum() + b.sum(),
    "determinant": lambda m, a, b: torch.linalg.slogdet(square(a))[1] + torch.linalg.det(square(b)),
    "eigenvalues": lambda m, a, b: torch.linalg.eigh(square(a))[0].sum() + b.sum(),
    "any eigenvalues": lambda m, a, b: torch.linalg.eigvals(a[:6]).abs().sum() + b.sum(),
}


@pytest.mark.by_default("inverse", "determinant")
@pytest.mark.parametrize("name", LINALG)
def test_matrices_that_are_taken_apart(name):
    assert_eager_bits(Model(LINALG[name]), torch.randn(7, 5))


class InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        made = torch.empty_like(gradient)
        made[:, :2] = gradient[:, :2] * 2
        made[:, 2:] = gradient[:, 2:] * 2
        return made


class OneRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return (InParts.apply(self.weight.unsqueeze(0)).sin() * x).sum()


def test_a_gradient_that_is_a_view_of_what_the_backward_writes_in_parts():
    assert_eager_bits(OneRow(), torch.randn(1, 5))


def test_a_singular_matrix_is_an_error_as_in_eager():
    model = Model(lambda m, a, b: torch.linalg.inv(a[:6] * m.scale.relu()).sum() + b.sum())
    planned = memplan.optimize(model, torch.randn(7, 5))
    for one in (model, planned):
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            one(torch.randn(7, 5))


def test_a_kernel_whose_result_has_another_shape_than_torch_predicts_is_refused():
    target = torch.tensor([1, 0, -1, 2, 3, 4])
    model = Model(
        lambda m, a, b: nn.functional.multilabel_margin_loss(a[0], target, reduction="none").sum()
    )
    with pytest.raises(memplan.CaptureError, match="otherwise than torch predicts"):
        memplan.optimize(model, torch.randn(7, 5))


class Attended(nn.Module):
    """What attention makes of one image, as an image again, and a norm of it."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 8), nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 3, 3)

    def forward(self, x):
        y = self.layer(x).transpose(1, 2).reshape(len(x), 8, 4, 4)
        return self.last(self.norm(y.sin()).relu()).square().sum()


@pytest.mark.parametrize("batch", [1, 2])
def test_an_image_whose_strides_say_little(batch):
    """Of one image alone the first stride says nothing of places, and decides on the format."""
    assert_eager_bits(Attended(), torch.randn(batch, 16, 5))
