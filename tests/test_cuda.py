"""What needs a GPU; skipped where there is none."""

from __future__ import annotations

import laws
import pytest
import torch
from torch import nn

import memplan
from memplan.profiler.devices import process_bytes

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_same_bits_and_less_memory_on_cuda():
    layers = [layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.GELU(), nn.Dropout())]
    step = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss).cuda()
    sample = (torch.randn(4096, 512, device="cuda"), torch.randn(4096, 512, device="cuda"))
    planned = memplan.optimize(step, sample, budget="60%")
    laws.assert_same_bits(laws.step(step, sample), laws.step(planned, sample))
    result = memplan.compare(step, planned, sample)
    assert result.planned.peak_bytes < result.original.peak_bytes
    assert result.planned.reserved_bytes is not None


def test_nvml_sees_this_process():
    torch.zeros(1, device="cuda")
    assert process_bytes(0) is None or process_bytes(0) > 0
