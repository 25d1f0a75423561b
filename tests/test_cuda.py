"""What needs a GPU; skipped where there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from test_laws import OTHER_DECOMPOSITION
from torch import nn
from torch.utils import _pytree as pytree

import memplan
from memplan.profiler.devices import process_bytes

from support import laws
from support.rows import MODELS

# Without it cuBLAS does not repeat itself.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def deterministic():
    """Kernels that repeat themselves, where there are such."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def on_cuda(name):
    torch.manual_seed(0)
    model, sample = MODELS[name]()
    return model.cuda(), pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, sample)


@contextlib.contextmanager
def native_batch_norm() -> Iterator[None]:
    """Batch norm by torch's own kernel, which is what a capture holds, and not by cuDNN's."""
    original = torch.batch_norm

    def native(*args):
        return torch.native_batch_norm(*args[:8])[0]

    torch.batch_norm = native
    try:
        yield
    finally:
        torch.batch_norm = original


@pytest.mark.parametrize("name", MODELS)
def test_same_bits_and_the_predicted_peak_on_cuda(name):
    model, sample = on_cuda(name)
    options = memplan.Options(on_infeasible="smallest")
    made = [
        memplan.optimize(model, sample, budget=budget, options=options)
        for budget in ("100%", "50%", "1 B")
    ]
    with native_batch_norm():
        eager = laws.step(model, sample)
    if name in OTHER_DECOMPOSITION:
        assert any("draws other numbers" in note for note in made[0].plan.notes)
    expected = laws.step(made[0], sample) if name in OTHER_DECOMPOSITION else eager
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        assert any("cuDNN" in note for note in made[0].plan.notes)
    for planned in made:
        laws.assert_same_bits(expected, laws.step(planned, sample))
        assert laws.assert_within_budget(planned, sample) == planned.plan.peak_bytes


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_optimizer_is_part_of_the_step_on_cuda(in_backward):
    model, sample = on_cuda("llama")
    planned = memplan.optimize(
        model,
        sample,
        budget="60%",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        options=memplan.Options(update_in_backward=in_backward),
    )
    laws.assert_within_budget(planned, sample)
    compared = memplan.compare(model, planned, sample, steps=1)
    assert compared.is_exact


def test_less_memory_on_cuda_and_what_is_reserved():
    layers = [layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.GELU(), nn.Dropout())]
    step = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss).cuda()
    sample = (torch.randn(4096, 512, device="cuda"), torch.randn(4096, 512, device="cuda"))
    planned = memplan.optimize(step, sample, budget="60%")
    result = memplan.compare(step, planned, sample)
    assert result.is_exact
    assert result.planned.peak_bytes < result.original.peak_bytes
    assert result.planned.reserved_bytes is not None
    assert result.planned.reserved_bytes >= result.planned.peak_bytes


def test_large_convolutions_and_their_workspace_on_cuda():
    convs = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)]
    step = memplan.WithLoss(nn.Sequential(*convs), nn.functional.mse_loss).cuda()
    sample = tuple(torch.randn(64, 16, 128, 128, device="cuda") for _ in range(2))
    options = memplan.Options(on_infeasible="smallest")
    for budget in ("100%", "1 B"):
        planned = memplan.optimize(step, sample, budget=budget, options=options)
        assert memplan.profile(planned, sample).peak_bytes == planned.plan.peak_bytes


def test_nvml_sees_this_process():
    torch.zeros(1, device="cuda")
    assert process_bytes(0) is None or process_bytes(0) > 0
