"""Estimators of a training step's peak, each called as its documentation prescribes.

Beside memplan stand, where they are installed:

* ``torch.distributed._tools.MemTracker`` under ``FakeTensorMode``: a fake copy of the model, a
  fresh optimizer, one step to create its state and one that is tracked; "Total" at the peak.
* ``torch_preflight.VRAMGuard(model, optimizer=, batch_size=, example_input=)``: its own measure of
  activations on the meta device, through a module of one input that calls the model on the whole
  batch, so that the loss counts. Its allowances for a CUDA context and fragmentation are left out,
  as the truth has neither.
* ``torchinfo.summary(model, input_data=, mode="train")``: its "Estimated Total Size", which ignores
  the optimizer.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

import memplan
from memplan.profiler import Estimate, estimate
from memplan.profiler.step import clear_gradients, run_step

Row = dict[str, Any]


def analytic(module: nn.Module, sample: memplan.Sample, optimizer: Optimizer) -> Row:
    """Estimate without running anything."""
    return _found(estimate(module, sample, optimizer=optimizer))


def measured(module: nn.Module, sample: memplan.Sample, optimizer: Optimizer) -> Row:
    """Estimate by running each distinct kernel alone."""
    with tempfile.TemporaryDirectory() as empty:
        os.environ["MEMPLAN_CACHE_DIR"] = empty
        return _found(estimate(module, sample, optimizer=optimizer, costs="measured"))


def _found(found: Estimate) -> Row:
    return {
        "peak_bytes": found.peak_bytes,
        "least_bytes": found.least_bytes,
        "most_bytes": found.most_bytes,
    }


def tracker(module: nn.Module, sample: memplan.Sample, optimizer: Optimizer) -> Row:
    """Torch's ``MemTracker`` on fake tensors."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(module)
    with mode:
        args, kwargs = tree_map_only(
            torch.Tensor, mode.from_tensor, (sample.args, dict(sample.kwargs))
        )
        batch = memplan.Sample(args, kwargs)
        stepped = type(optimizer)(fake.parameters())  # type: ignore[call-arg]
        run_step(fake, batch, stepped)
        clear_gradients(fake)
        tracked = MemTracker()
        tracked.track_external(fake, stepped, *batch.tensors())
        with tracked:
            run_step(fake, batch, stepped)
    return {"peak_bytes": tracked.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]}


class OneInput(nn.Module):
    """A model on a batch without data, whatever its input."""

    def __init__(self, model: nn.Module, sample: memplan.Sample) -> None:
        super().__init__()
        self.model = model
        self.args, self.kwargs = tree_map_only(
            torch.Tensor, lambda tensor: tensor.to("meta"), (sample.args, dict(sample.kwargs))
        )

    def forward(self, first: torch.Tensor) -> Any:
        """The model's output."""
        return self.model(*self.args, **self.kwargs)


def preflight(module: nn.Module, sample: memplan.Sample, optimizer: Optimizer) -> Row:
    """torch-preflight's guard of a live model."""
    from torch_preflight import VRAMGuard  # noqa: PLC0415  it is optional

    first = sample.tensors()[0]
    guard = VRAMGuard(
        OneInput(module, sample), optimizer=optimizer, batch_size=len(first), example_input=first
    )
    with guard:
        parts = guard.report.breakdown
    if guard.activation_source != "measured":
        raise RuntimeError("activations unknown")
    return {"peak_bytes": parts.total - parts.cuda_context - parts.fragmentation}


def torchinfo(module: nn.Module, sample: memplan.Sample, optimizer: Optimizer) -> Row:
    """Torchinfo's total size."""
    import torchinfo as package  # noqa: PLC0415  it is optional

    data = dict(sample.kwargs) or list(sample.args)
    found = package.summary(module, input_data=data, mode="train", verbose=0)
    return {"peak_bytes": found.total_input + found.total_output_bytes + found.total_param_bytes}


Estimator = Callable[[nn.Module, memplan.Sample, Optimizer], Row]
OURS: dict[str, Estimator] = {"measured": measured, "analytic": analytic}
OTHERS: dict[str, Estimator] = {"MemTracker": tracker} | {
    name: estimator
    for name, package, estimator in (
        ("torch-preflight", "torch_preflight", preflight),
        ("torchinfo", "torchinfo", torchinfo),
    )
    if importlib.util.find_spec(package) is not None
}
