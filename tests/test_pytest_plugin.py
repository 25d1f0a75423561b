"""The plugin, as a user's session loads it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import memplan
from memplan.profiler.limits import measured
from pytest_memplan import _limit_of

UNMARKED = """
import sys

def test_nothing_is_imported():
    assert not {"torch", "memplan"} & set(sys.modules)
"""

MARKED = """
import pytest
import torch

MIB = 2**20
limit = pytest.mark.limit_tensor_memory

@pytest.fixture
def there():
    return torch.ones(8 * MIB, dtype=torch.uint8)

@limit("1 MiB")
def test_at_the_limit(there):
    for _ in range(2):
        torch.ones(MIB, dtype=torch.uint8)

@limit("1 MiB")
def test_above():
    large = torch.ones(MIB, dtype=torch.uint8)  # line 19
    small = torch.zeros(1024, dtype=torch.uint8)  # line 20

@limit("1 MiB")
def test_backward():
    weight = torch.ones(MIB // 4, requires_grad=True)
    weight.exp().sum().backward()  # line 25

@limit("1 GiB")
class TestClosest:
    @limit(2**20 - 1)
    def test_inner(self):
        torch.ones(MIB, dtype=torch.uint8)

    def test_outer(self):
        torch.ones(MIB, dtype=torch.uint8)

@limit(1)
def test_its_own_failure():
    torch.ones(MIB)
    assert "this" == "that"

@limit(1, device="cuda")
def test_on_cuda():
    pytest.importorskip("no such device")
"""

WRONG = """
import pytest

@pytest.mark.limit_tensor_memory("3 apples")
def test_never_runs():
    raise SystemExit("it ran")
"""


@pytest.fixture
def run(tmp_path):
    def run(content):
        (tmp_path / "test_one.py").write_text(content)
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "--strict-markers"]
        command += ["-W", "error", "-p", "no:cacheprovider"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_a_session_without_the_marker_does_not_import_torch(run):
    result = run(UNMARKED)
    assert result.returncode == 0, result.stdout


def test_limits(run):
    result = run(MARKED)
    text = result.stdout
    assert result.returncode == 1, text + result.stderr
    for name in ("test_at_the_limit", "TestClosest::test_outer"):
        assert f"PASSED test_one.py::{name}" in text
    assert "test_above: 1.00 MiB of tensor memory, 1.00 KiB more than the limit of 1.00 MiB" in text
    largest = text.partition("test_above: ")[2].splitlines()[2:4]
    assert largest[0].split()[:3] == ["1.00", "MiB", "aten::ones"]
    assert largest[0].endswith("test_one.py:19")
    assert largest[1].split()[:3] == ["1.00", "KiB", "aten::zeros"]
    assert largest[1].endswith("test_one.py:20")
    # The weight, its exponential and its gradient.
    assert "test_backward: 3.00 MiB of tensor memory, 2.00 MiB more" in text
    blocks = text.partition("test_backward: ")[2].splitlines()[2:5]
    assert [line.rpartition(":")[2] for line in blocks].count("25") == 2
    assert "test_inner: 1.00 MiB of tensor memory, 1 B more" in text
    assert "1 skipped" in text
    assert "test_its_own_failure: " not in text and "assert 'this' == 'that'" in text


def test_a_wrong_size_is_a_usage_error(run):
    result = run(WRONG)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR, result.stdout
    assert "ERROR: test_one.py::test_never_runs" in result.stderr
    assert "'3 apples' is not a number of bytes; accepted forms:" in result.stderr


@dataclass
class Item:
    marker: pytest.MarkDecorator
    nodeid: str = "test_one.py::test_two"

    def get_closest_marker(self, name):
        assert name == "limit_tensor_memory"
        return self.marker.mark


limit = pytest.mark.limit_tensor_memory


def test_a_marker_is_read():
    assert _limit_of(Item(limit("1 KiB"))) == (1024, "cpu")
    assert _limit_of(Item(limit(7, device="cuda:1"))) == (7, "cuda:1")


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (limit, "write limit_tensor_memory"),
        (limit("1 KiB", "2 KiB"), "write limit_tensor_memory"),
        (limit("1 KiB", devise="cuda"), "write limit_tensor_memory"),
        (limit("1 KiB", device="meta"), "not 'meta'"),
        (limit(-1), "-1 is negative"),
        (limit("10%"), "'10%' is not a number of bytes"),
    ],
    ids=str,
)
def test_other_markers_are_refused(marker, message):
    with pytest.raises(pytest.UsageError, match=message) as caught:
        _limit_of(Item(marker))
    assert "test_one.py::test_two" in str(caught.value)


def test_measuring_inside_a_limit_is_an_error_and_not_a_peak_of_zero():
    model, batch = memplan.WithLoss(nn.Linear(59, 3), nn.functional.mse_loss), torch.randn(7, 59)
    planned = memplan.optimize(model, (batch, torch.randn(7, 3)))
    with measured(torch.device("cpu")) as usage:
        planned(batch, torch.randn(7, 3)).backward()
    assert usage().peak_bytes > 0
    with (
        pytest.raises(memplan.MemplanError, match="Plan the model before"),
        measured(torch.device("cpu")),
    ):
        memplan.profile(planned, (batch, torch.randn(7, 3)), steps=1)
