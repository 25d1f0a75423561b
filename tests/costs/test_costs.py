"""Measured costs, their cache, and analytic ones."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

import memplan
from memplan.capture import read, trace
from memplan.capture.sample import Sample
from memplan.costs import analytic_costs, cache_folder, measured_costs
from memplan.costs.cache import CostCache


def read_step(step, sample):
    return read(trace(step, sample))


@pytest.fixture
def captured(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path / "new" / "folder"))
    conv = nn.Conv2d(3, 8, 3, padding=1)
    step = memplan.WithLoss(conv, lambda output, target: (output * target).mean())
    return read_step(step, Sample.of((torch.randn(2, 3, 16, 16), torch.randn(2, 8, 16, 16))))


def test_workspace_of_a_convolution_is_found(captured):
    ops = captured.program.ops
    costs = measured_costs(captured, ops)
    conv = next(op for op in ops if "convolution" in op.target)
    assert costs.by_op[conv.id].workspace_bytes > 0
    assert all(cost.seconds > 0 for cost in costs.by_op.values())


def test_a_result_that_holds_more_than_its_elements():
    """The scalar that mse_loss returns sits in a storage as large as its operand."""
    step = memplan.WithLoss(nn.Linear(8, 8), nn.functional.mse_loss)
    sample = (torch.randn(64, 8), torch.randn(64, 8))
    ops = read_step(step, Sample.of(sample)).program.ops
    costs = measured_costs(read_step(step, Sample.of(sample)), ops)
    loss = next(op for op in ops if op.target == "aten.mse_loss.default")
    assert costs.by_op[loss.id].result_bytes == (64 * 8 * 4,)
    planned = memplan.optimize(step, sample, budget="100%")
    assert memplan.profile(planned, sample).peak_bytes == planned.plan.peak_bytes


def test_the_second_time_nothing_is_measured(captured, monkeypatch):
    ops = captured.program.ops
    first = measured_costs(captured, ops)
    monkeypatch.setattr("memplan.costs.measured._measure", lambda *_: pytest.fail("measured"))
    assert measured_costs(captured, ops) == first


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema_version": 1}', "null", '{"entries": 3}', "\x00"]
)
def test_a_damaged_cache_is_ignored_and_replaced(captured, content, caplog):
    ops = captured.program.ops
    measured_costs(captured, ops)
    (file,) = cache_folder().iterdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING, "memplan"):
        assert CostCache.load(torch.device("cpu")).entries == {}
    measured_costs(captured, ops)
    assert json.loads(file.read_text())["entries"]


def test_a_cache_that_cannot_be_written_is_no_error(captured, caplog):
    cache_folder().parent.mkdir(parents=True)
    cache_folder().write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "memplan"):
        assert measured_costs(captured, captured.program.ops).by_op
    assert "not kept" in caplog.text


def test_threads_are_part_of_the_key(captured):
    threads = torch.get_num_threads()
    path = CostCache.load(torch.device("cpu")).path
    try:
        torch.set_num_threads(threads + 1)
        assert CostCache.load(torch.device("cpu")).path != path
    finally:
        torch.set_num_threads(threads)


def test_measuring_leaves_the_random_state_alone(captured):
    before = torch.get_rng_state()
    measured_costs(captured, captured.program.ops)
    assert torch.equal(torch.get_rng_state(), before)


def test_analytic_costs_count_arithmetic(captured):
    costs = analytic_costs(captured, captured.program.ops)
    conv = next(op for op in captured.program.ops if op.target == "aten.convolution.default")
    assert costs.by_op[conv.id].flops == 2 * 2 * 16 * 16 * 8 * 3 * 9
