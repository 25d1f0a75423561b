"""Every byte of a measured step has a name."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

import memplan
from memplan.capture.sample import Sample
from memplan.ir.memory_trace import SAVED, TEMPORARY, WORKSPACE
from memplan.profiler import profile, trace_memory
from memplan.profiler.step import clear_gradients, preserved, run_step

from support.known import Known, Outer
from support.rows import MODELS

MIB = 2**20


@pytest.mark.by_default(
    "bert",
    "resnet",
    "convnext",
    "lstm",
    "experts",
    "unet",
    "autoencoder",
    "mlp",
    "frozen",
    "returns_tuple",
    "returns_dict",
    "returns_dataclass",
)
@pytest.mark.parametrize("name", MODELS)
def test_every_byte_of_a_step_is_explained(name):
    model, batch = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters())
    trace = trace_memory(model, batch, optimizer=optimizer)
    seen = profile(model, batch, optimizer=optimizer, steps=1)
    assert trace.peak_bytes == seen.peak_bytes
    assert trace.phase_peaks() == seen.phases
    above = trace.peak_bytes - trace.resident_bytes
    assert trace.unexplained_bytes <= 0.01 * above
    assert sum(trace.categories(trace.peak_event).values()) == trace.peak_bytes
    named = [block for block in trace.blocks if block.op]
    assert len(named) == len(trace.blocks)


@pytest.mark.by_default("bert", "vit", "resnet")
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama", "resnet"])
def test_what_the_backward_needs_is_found_in_the_code(name):
    model, batch = MODELS[name]()
    trace = trace_memory(model, batch)
    saved = [block for block in trace.blocks if block.category == SAVED]
    assert saved and all(block.source for block in saved)
    assert any(f"modeling_{name}.py" in block.source for block in saved)


@pytest.mark.by_default("mlp", "unet")
@pytest.mark.parametrize("name", ["gpt2", "mlp", "lstm", "unet"])
def test_a_prediction_and_its_plan_account_alike(name):
    model, batch = MODELS[name]()
    options = memplan.Options(on_infeasible="smallest")
    planned = memplan.optimize(model, batch, budget="60%", options=options)
    trace = planned.trace
    assert trace.kind == "predicted"
    assert trace.peak_bytes == planned.plan.peak_bytes
    assert trace.categories(trace.peak_event) == planned.plan.categories
    assert trace.phase_peaks() == planned.plan.phases
    assert trace_memory(planned, batch).peak_bytes == trace.peak_bytes


class Discarding(nn.Module):
    """Draws numbers that nothing reads."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        torch.rand(64, 4096)
        return self.linear(self.linear(x).tanh()).square().mean()


def test_what_nothing_reads_is_gone_in_a_traced_step_as_in_any():
    model, batch = Discarding(), torch.randn(512, 64)
    planned = memplan.optimize(model, batch)
    measured = memplan.profile(planned, batch, steps=1)
    assert trace_memory(planned, batch).peak_bytes == measured.peak_bytes == planned.plan.peak_bytes


def test_op_line_and_bytes_at_the_peak_are_known():
    trace = trace_memory(Outer(), torch.zeros(256, 1024))
    lines, first = inspect.getsourcelines(Known)
    square = first + next(n for n, line in enumerate(lines) if "wide * wide" in line)
    # In the backward of the square, its two gradients stand beside what was saved.
    block = trace.peak_block
    assert block is not None
    assert (block.op, block.module, block.nbytes) == ("aten::mul", "known", 8 * MIB)
    assert block.source == f"{inspect.getsourcefile(Known)}:{square}"
    assert trace.phase_at(trace.peak_event) == "backward"
    at_peak = trace.categories(trace.peak_event)
    assert at_peak[SAVED] == (1 + 8) * MIB
    assert at_peak[TEMPORARY] == (8 + 8) * MIB + 4
    assert at_peak["parameter"] == 4096 and at_peak["input"] == MIB and at_peak["output"] == 4
    assert "gradient" not in at_peak
    gradient = [block for block in trace.blocks if block.name]
    assert [block.name for block in gradient] == ["known.weight"]


def test_workspace_is_what_a_kernel_gives_back():
    model = memplan.WithLoss(nn.Conv2d(8, 8, 3), nn.functional.mse_loss)
    trace = trace_memory(model, (torch.randn(4, 8, 32, 32), torch.randn(4, 8, 30, 30)))
    kernels = {block.op for block in trace.blocks if block.category == WORKSPACE}
    assert "aten::convolution_backward" in kernels


@pytest.mark.by_default("bert", "unet", "mlp")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "bert", "resnet", "unet", "lstm", "mlp"])
def test_torchs_tracker_agrees(name):
    """At its own peak, by category; it sees no workspace, and knows gradients when they arrive."""
    model, batch = MODELS[name]()
    sample = Sample.of(batch)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    trace = trace_memory(model, batch, optimizer=optimizer)
    series = trace.over_time(range(len(trace.times_s)))
    seen = [name for name in series if name != WORKSPACE]
    totals = [sum(series[name][event] for name in seen) for event in range(len(trace.times_s))]
    event = max(range(len(totals)), key=totals.__getitem__)
    live = [block for block in trace.live(event) if block.category != WORKSPACE]
    mine = {
        "Total": totals[event],
        "Parameter": series["parameter"][event],
        "Optstate": series["optimizer state"][event],
        "Activation": sum(block.nbytes for block in live if block.phase == "forward"),
        "Gradient and Temp": sum(block.nbytes for block in live if block.phase != "forward"),
    }
    with preserved(model, optimizer):
        run_step(model, sample, optimizer)
        clear_gradients(model)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *sample.tensors())
        with tracker:
            run_step(model, sample, optimizer)
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    theirs = {getattr(key, "value", key): nbytes for key, nbytes in snapshot.items()}
    theirs["Gradient and Temp"] = theirs["Gradient"] + theirs["Temp"]
    for category, nbytes in mine.items():
        assert abs(nbytes - theirs[category]) <= 0.01 * theirs["Total"], category


def test_what_a_checkpoint_runs_again_is_its_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layers = (nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Dropout(0.1))
            self.body = nn.Sequential(*layers)

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False).square().mean()

    model, x = Model(), torch.randn(512, 64)
    for trace in (trace_memory(model, x), memplan.estimate(model, x).trace):
        again = {b.module for b in trace.blocks if b.phase == "backward" and b.op == "aten::addmm"}
        assert again == {"body.0", "body.2"}
        # The state of the generator, which the checkpoint keeps.
        assert trace.unexplained_bytes <= 5056


def test_a_profile_of_the_users_is_not_lost():
    model, x = nn.Linear(64, 1), torch.randn(512, 64)
    scalar = memplan.WithLoss(model, nn.functional.mse_loss)
    with torch.profiler.profile() as theirs:
        with pytest.raises(memplan.MemplanError, match="profiler is running"):
            memplan.profile(scalar, (x, torch.randn(512, 1)))
        model(x)
    assert any(event.name == "aten::linear" for event in theirs.events())
