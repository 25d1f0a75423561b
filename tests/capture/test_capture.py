"""What capture reads, and what it refuses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import memplan
from memplan.capture import read, trace
from memplan.capture.relaid import relaying
from memplan.capture.sample import Sample
from memplan.ir.program import Phase, Role
from memplan.ir.schedule import Catalog
from memplan.torch_internals import fake_mode_of

from support import laws
from support.rows import MODELS


def read_step(step, sample):
    return read(trace(step, sample))


def test_a_linear_layer_as_a_program():
    step = memplan.WithLoss(nn.Linear(4, 2), lambda output, target: (output - target).sum())
    captured = read_step(step, Sample.of((torch.zeros(3, 4), torch.zeros(3, 2))))
    program = captured.program
    targets = [op.target for op in program.ops]
    assert targets[:3] == ["aten.addmm.default", "aten.sub.Tensor", "aten.sum.default"]
    assert all(op.module == "model" for op in program.ops if "mm" in op.target)
    assert captured.output.is_loss
    roles = [value.role for value in program.values]
    assert roles.count(Role.PARAMETER) == 2 and roles.count(Role.INPUT) == 2
    assert roles.count(Role.GRADIENT) == 2 and roles.count(Role.TANGENT) == 1
    assert program.resident_bytes == 4 * (4 * 2 + 2 + 3 * 4 + 3 * 2)
    assert {op.phase for op in program.ops} == {Phase.FORWARD, Phase.BACKWARD}


class Model(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def branches(self, x):
    if (x * self.weight).sum() > 0:
        return x.sum() * self.weight.sum()
    return self.weight.sum()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (branches, r"test_capture\.py:\d+ \(if \(x \* self\.weight\).*must not branch"),
        (lambda self, x: x.view(3) * self.weight, "is invalid for input.*Does the untouched"),
        (lambda self, x: x.sum(), "no output depends"),
        (lambda self, x: (self.weight.sum(), object()), "returns a object"),
        (lambda self, x: self.weight.sum() * random.random(), "numpy.random or random"),
        (lambda self, x: self.weight.sum() * float(np.random.rand()), "numpy.random or random"),
    ],
)
def test_what_cannot_be_captured_says_why(forward, message):
    with pytest.raises(memplan.CaptureError, match=message):
        memplan.plan(Model(forward), torch.ones(4))


def test_outputs_have_the_originals_structure():
    def forward(self, x):
        y = x * self.weight
        return {"loss": y.sum(), "more": [y, (x, None, 3, "text")], "again": y}

    model = Model(forward)
    planned = memplan.optimize(model, torch.ones(4), budget="100%")
    x = torch.ones(4)
    output = planned(x)
    assert output["more"][1][0] is x
    assert output["more"][1][1:] == (None, 3, "text")
    assert torch.equal(output["again"], output["more"][0])
    laws.assert_same_bits(laws.step(model, torch.ones(4)), laws.step(planned, torch.ones(4)))


def test_buffers_are_written_once_at_every_budget():
    model = memplan.WithLoss(
        nn.Sequential(
            *(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.BatchNorm1d(16))),
            nn.Linear(16, 2),
        ),
        nn.functional.cross_entropy,
    )
    sample = (torch.randn(64, 16), torch.randint(0, 2, (64,)))
    for budget in ("100%", "70%"):
        options = memplan.Options(on_infeasible="smallest")
        planned = memplan.optimize(model, sample, budget=budget, options=options)
        laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))
        laws.assert_within_budget(planned, sample)


def test_a_gradient_that_is_a_view_of_the_incoming_one():
    """Autograd would copy it at the end; the program does, and so counts it."""
    model = Model(lambda self, x: (self.weight + x).sum())
    planned = memplan.optimize(model, torch.ones(4), budget="100%")
    laws.assert_same_bits(laws.step(model, torch.ones(4)), laws.step(planned, torch.ones(4)))
    laws.assert_within_budget(planned, torch.ones(4))


def test_one_gradient_for_two_parameters():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))

        def forward(self, x):
            return ((self.a + self.b) * x).square().sum()

    model, sample = Twice(), torch.randn(64)
    planned = memplan.optimize(model, sample, budget="100%")
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))
    laws.assert_within_budget(planned, sample)
    assert model.a.grad is None


def test_a_constant_that_is_no_buffer():
    model = Model(lambda self, x: (self.weight * self.table * x).sum())
    model.table = torch.arange(4.0)
    planned = memplan.optimize(model, torch.ones(4), budget="100%")
    laws.assert_same_bits(laws.step(model, torch.ones(4)), laws.step(planned, torch.ones(4)))
    assert "table" not in planned.state_dict()


def test_a_random_op_whose_result_is_not_used_moves_the_stream():
    def forward(self, x):
        torch.rand(3)
        return (nn.functional.dropout(x * self.weight, 0.5)).sum()

    model = Model(forward)
    planned = memplan.optimize(model, torch.ones(4), budget="100%")
    laws.assert_same_bits(laws.step(model, torch.ones(4)), laws.step(planned, torch.ones(4)))


def test_a_buffer_that_is_overwritten_before_the_backward_reads_it():
    """Eager refuses it in the backward, the capture at once."""

    def forward(self, x):
        y = (x * self.weight * self.table).sum()
        self.table.mul_(0.5)
        return y

    model = Model(forward)
    model.register_buffer("table", torch.ones(4))
    with pytest.raises(memplan.CaptureError, match="modified by an inplace operation"):
        memplan.optimize(model, torch.ones(4))


@pytest.mark.by_default("False-False-GRU")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_dropout_between_recurrent_layers_is_drawn(kind, batch_first, bidirectional):
    """torch's own trace of these modules has none."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = kind(
                6, 5, 3, dropout=0.4, batch_first=batch_first, bidirectional=bidirectional
            )

        def forward(self, x):
            output, final = self.layers(x)
            return output.square().mean() + sum(state.sum() for state in final)

    model, sample = Recurrent(), torch.randn(4, 7, 6)
    planned = memplan.optimize(model, sample, budget="100%")
    assert planned.plan.effects == (memplan.Effect.ROUNDING,) and planned.plan.notes
    laws.assert_close(laws.step(model, sample), laws.step(planned, sample))


def test_packed_sequences_are_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.GRU(6, 5, 2, dropout=0.4)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 5, 5, 2]))
            return self.layers(packed)[1].sum()

    with pytest.raises(memplan.CaptureError, match=r"test_capture\.py.*pack_padded_sequence"):
        memplan.plan(Packed(), torch.randn(7, 4, 6))


def test_batch_norm_is_recomputed_and_its_statistics_written_once():
    """As in pytorch#96136, where checkpointing a block writes them twice."""
    layers = [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()] * 8
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    sample = (torch.randn(256, 32), torch.randn(256, 32))
    smallest = memplan.Options(on_infeasible="smallest")
    planned = memplan.optimize(model, sample, budget="1 B", options=smallest)
    assert any("batch_norm" in op.target for op in restored_ops(planned, sample))
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))
    laws.assert_within_budget(planned, sample)
    with torch.random.fork_rng():
        planned(*sample).backward()
    assert model.model[1].num_batches_tracked.item() == 8


def restored_ops(planned, sample):
    step = planned.prepare(memplan.Sample.of(sample))
    catalog = Catalog.of(step.captured.program, step.recoveries)
    return [catalog.ops[op] for op in step.plan.schedule.restored_ops]


def causal_or_not(self, mask):
    if mask.all():
        return (self.weight * mask).sum()
    return (self.weight.exp() * mask.float() * int(mask.sum())).sum()


def test_a_branch_on_the_inputs_is_part_of_the_signature():
    model = Model(causal_or_not)
    masks = [
        torch.tensor([True, True, True, True]),
        torch.tensor([True, False, True, True]),
        torch.tensor([False, True, True, True]),
        torch.tensor([False, False, True, True]),
    ]
    planned = memplan.optimize(model, masks[0])
    for mask in masks * 2:
        laws.assert_same_bits(laws.step(model, mask), laws.step(planned, mask))
    assert len(planned.plans) == 3


def test_a_branch_on_constants_needs_no_guard():
    def forward(self, x):
        positions = torch.arange(4).unsqueeze(0)
        if (positions.diff() == 1).all():
            return (self.weight * x).sum()
        return self.weight.sum()

    model = Model(forward)
    planned = memplan.optimize(model, torch.randn(4))
    decisions = planned.prepare(Sample.of(torch.randn(4))).captured.decisions
    assert decisions and not any(one.is_guard for one in decisions)
    x = torch.randn(4)
    laws.assert_same_bits(laws.step(model, x), laws.step(planned, x))


class Doubled(torch.autograd.Function):
    """Its backward is not its forward's."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2 * ctx.saved_tensors[0]


def test_a_backward_of_the_users_own_is_run():
    model, sample = Model(lambda self, x: Doubled.apply(self.weight * x).sum()), torch.randn(4)
    planned = memplan.optimize(model, sample)
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


@pytest.mark.parametrize("reentrant", [False])
def test_checkpointing_in_the_model_is_left_to_the_planner(reentrant):
    def forward(self, x):
        def block(y):
            return nn.functional.dropout((y * self.weight).sin(), 0.5).exp()

        y = torch.utils.checkpoint.checkpoint(block, x * self.weight, use_reentrant=reentrant)
        return y.sum()

    model, sample = Model(forward), torch.randn(4)
    planned = memplan.optimize(model, sample, budget="100%")
    assert planned.plan.num_restores == 0
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


def test_a_buffer_replaced_by_assignment_is_written():
    def forward(self, x):
        self.average = 0.9 * self.average + x.detach()
        return (self.weight * self.average).sum()

    model = Model(forward)
    model.register_buffer("average", torch.ones(4))
    planned = memplan.optimize(model, torch.randn(4))
    for _ in range(2):
        x = torch.randn(4)
        laws.assert_same_bits(laws.step(model, x), laws.step(planned, x))
        planned(x)


def test_attributes_that_the_forward_changes_are_left_alone_and_named():
    def forward(self, x):
        self.count += 1
        self.last = x * self.weight
        return self.last.sum()

    model = Model(forward)
    model.count, model.last = 7, None
    with pytest.warns(UserWarning, match=r"changes attributes of its modules \(count, last\)"):
        planned = memplan.optimize(model, torch.randn(4))
    assert model.count == 7 and model.last is None
    (note,) = planned.plan.notes
    assert "count, last" in note


def test_a_parameter_that_is_not_registered_is_refused():
    hidden = nn.Parameter(torch.ones(4))
    model = Model(lambda self, x: (self.weight * hidden * x).sum())
    with pytest.raises(memplan.CaptureError, match="no parameter of the module"):
        memplan.plan(model, torch.randn(4))


def test_no_grad_inside_the_forward_is_kept():
    def forward(self, x):
        with torch.no_grad():
            scale = (self.weight * x).sin()
        return (scale * self.weight).sum()

    model, sample = Model(forward), torch.randn(4)
    planned = memplan.optimize(model, sample)
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


def test_a_model_that_is_captured_only_when_it_knows_says_so():
    def forward(self, x):
        if not torch.compiler.is_compiling() and self.weight.sum() < 0:
            return self.weight.sum()
        return (self.weight * x).sum()

    model, sample = Model(forward), torch.randn(4)
    planned = memplan.optimize(model, sample)
    (note,) = planned.plan.notes
    assert "asks whether it is traced (test_capture.py" in note
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


def test_a_model_that_asks_is_told_what_eager_is():
    model = Model(lambda self, x: (self.weight * x).sum() * (2 - torch.compiler.is_compiling()))
    planned = memplan.optimize(model, torch.ones(4))
    assert not planned.plan.notes
    laws.assert_same_bits(laws.step(model, torch.ones(4)), laws.step(planned, torch.ones(4)))


class ByColumns(nn.Module):
    """Batch norm of a tensor that lies by columns: the kernel's result lies by rows."""

    def __init__(self, end):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.end = end

    def forward(self, x):
        x = self.norm(self.first(x).t().contiguous().t())
        if self.end == "linear":  # whose backward goes by the layout of what it is for
            return self.last(x).square().sum()
        return (x * x.detach().t().contiguous().t()).sum()


@pytest.mark.parametrize("end", ["linear", "product"])
@pytest.mark.parametrize("budget", ["100%", "85%"])
def test_what_autograd_makes_of_another_layout_than_recorded(end, budget):
    torch.manual_seed(0)
    model, x = ByColumns(end), torch.randn(64, 5)
    planned = memplan.optimize(
        model, x, budget=budget, options=memplan.Options(on_infeasible="smallest")
    )
    laws.assert_same_bits(laws.step(model, x), laws.step(planned, x))
    laws.assert_within_budget(planned, x)


def test_a_kernel_that_makes_another_layout_than_recorded():
    """Softplus's backward takes the layout of the incoming gradient; torch's trace says not."""

    def forward(self, x):
        y = (x.reshape(32, 4) * self.weight).view(2, 16, 4)
        return nn.functional.softplus(y).transpose(1, 2).contiguous().square().sum()

    model, sample = Model(forward), torch.randn(2, 4, 16)
    planned = memplan.optimize(model, sample, budget="100%")
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))
    laws.assert_within_budget(planned, sample)


def test_layouts_are_put_right_by_a_mode_of_torchs_own_class():
    """By which torch finds what a higher-order op does without data."""
    assert type(fake_mode_of([], relaying({}))) is type(fake_mode_of([]))


@pytest.mark.parametrize("budget", ["90%", "60%", "40%"])
def test_gradients_under_dropout_do_not_depend_on_the_budget(budget):
    """As in pytorch#190758, where a memory budget changed them."""
    layers = [nn.Linear(32, 32), nn.Dropout(0.5), nn.GELU()] * 6
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    sample = (torch.randn(128, 32), torch.randn(128, 32))
    options = memplan.Options(on_infeasible="smallest")
    planned = memplan.optimize(model, sample, budget=budget, options=options)
    assert planned.plan.num_restores
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


def test_the_peak_does_not_grow_as_the_budget_falls():
    """As in pytorch#197838, where it did."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU())]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    sample = (torch.randn(256, 32), torch.randn(256, 32))
    peaks = []
    for budget in ("100%", "90%", "80%", "70%", "60%", "50%"):
        planned = memplan.optimize(model, sample, budget=budget)
        peaks.append(memplan.profile(planned, sample, steps=1).peak_bytes)
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.7 * peaks[0]


@pytest.mark.by_default("convnext-2")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", ["convnext", "gpt2", "mobilenet", "unet"])
def test_bytes_are_exact_for_any_number_of_threads(num_threads, name):
    """A kernel's workspace can depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        model, sample = MODELS[name]()
        options = memplan.Options(on_infeasible="smallest")
        planned = memplan.optimize(model, sample, budget="60%", options=options)
        laws.assert_within_budget(planned, sample)
    finally:
        torch.set_num_threads(before)


def chooses_by_mask(self, x):
    rows = (x * self.weight)[x[:, 0] > 0]
    positions = (x[:, 1] > 0).nonzero()
    return rows.square().sum() + positions.sum() * self.weight[(x > 1)[0]].sum()


def test_sizes_that_depend_on_the_inputs_are_guarded():
    model = Model(chooses_by_mask)
    samples = [torch.randn(6, 4) for _ in range(6)]
    planned = memplan.optimize(model, samples[0], options=memplan.Options(cache_size=99))
    for x in samples:
        laws.assert_same_bits(laws.step(model, x), laws.step(planned, x))
        laws.assert_within_budget(planned, x)
    plans = len(planned.plans)
    for x in samples:
        planned(x)
    assert len(planned.plans) == plans > 1


def test_a_module_moved_to_where_it_is():
    class Moves(Model):
        def forward(self, x):
            return self.layer.to(torch.float32)(x).square().mean()

    model = Moves(None)
    model.layer = nn.Linear(4, 4)
    sample = torch.randn(3, 4)
    planned = memplan.optimize(model, sample)
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))


def test_a_parameter_that_only_an_output_apart_from_the_loss_reaches_has_no_gradient():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.side = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return {"loss": self.head(x).square().mean(), "side": self.side(x)}

    model, sample = Two(), torch.randn(3, 4)
    planned = memplan.optimize(model, sample)
    planned(sample)["loss"].backward()
    assert model.side.weight.grad is None and model.head.weight.grad is not None
    laws.assert_same_bits(laws.step(model, sample), laws.step(planned, sample))
