"""A whole script is profiled as it is."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import pytest
from click.testing import CliRunner

from memplan import MemplanError
from memplan.cli import main
from memplan.profiler import profile_script

MODEL = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return self.head(self.body(x)).square().mean()
"""

SCRIPT = (
    MODEL
    + """
print("training", sys.argv[1:])
torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False)
data = torch.randn(256, 64)
for step in range(int(sys.argv[1])):
    optimizer.zero_grad()
    loss = net(data)
    loss.backward()
    optimizer.step()
    print(step, loss.item())
    if "--exit" in sys.argv:
        sys.exit(3)
"""
)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_the_bytes_of_a_script_are_known(script):
    found = profile_script(script, ["9"])
    trace = found.trace
    parameters = 4 * (2 * (64 * 64 + 64) + 64 * 16)
    at_peak = trace.categories(trace.peak_event)
    assert at_peak["parameter"] == at_peak["optimizer state"] == parameters
    assert trace.unexplained_bytes == 0
    # Results of the two ReLUs, the loss and its gradient; the head's result is gone by then.
    assert at_peak["saved activation"] == 2 * 256 * 64 * 4 + 2 * 4
    assert set(trace.phase_peaks()) == {"forward", "backward", "optimizer"}
    gradients = [b for b in trace.live(len(trace.times_s) - 1) if b.category == "gradient"]
    assert sum(block.nbytes for block in gradients) == parameters
    assert {block.name for block in gradients} == {
        *("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "head.weight")
    }
    saved = [block for block in trace.blocks if block.category == "saved activation"]
    assert {block.module for block in saved if block.nbytes == 256 * 64 * 4} == {"body.1", "body.3"}
    assert {block.source.rpartition(":")[0] for block in saved} == {str(script)}
    assert found.step == 4 and found.step_s > 0


def test_what_a_script_holds_is_counted(script):
    command = [sys.executable, "-m", "memplan", "profile", str(script), "--json", "--", "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["categories"]["input"] == 256 * 64 * 4


def test_a_script_is_not_changed_by_it(script, capsys, monkeypatch):
    profile_script(script, ["9"])
    losses = [line for line in capsys.readouterr().err.splitlines() if line[:1].isdigit()]
    assert [line.split()[0] for line in losses] == ["0", "1", "2"]
    monkeypatch.setattr("sys.argv", [str(script), "3"])
    runpy.run_path(str(script))
    plain = [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert losses == plain


def test_a_script_that_ends_early_says_so(script):
    with pytest.raises(MemplanError, match=r"made 2 optimizer steps, and 4 are needed: it ended"):
        profile_script(script, ["2"])
    with pytest.raises(MemplanError, match="it exited with 3"):
        profile_script(script, ["9", "--exit"])
    with pytest.raises(MemplanError, match="third or a later"):
        profile_script(script, ["9"], step=2)


def test_the_command_takes_scripts(script, tmp_path):
    result = CliRunner().invoke(main, ["profile", str(script), "--json", "--", "9"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["kind"] == "profile" and data["unexplained_bytes"] == 0
    assert "training ['9']" in result.stderr
    early = CliRunner().invoke(main, ["profile", str(script), "--", "1"])
    assert early.exit_code == 1 and "made 1 optimizer steps" in early.stderr
    missing = CliRunner().invoke(main, ["profile", str(tmp_path / "no.py")])
    assert missing.exit_code == 2
    fails = CliRunner().invoke(main, ["profile", str(script), "--", "many"])
    assert fails.exit_code == 1 and "raised ValueError" in fails.stderr
    wrong = CliRunner().invoke(main, ["profile", str(script), "--optimizer", "sgd"])
    assert wrong.exit_code == 2 and "after --" in wrong.stderr


DELETED = """
import torch
from torch import nn
teacher = nn.Linear(1024, 1024)
teacher(torch.ones(1, 1024))
del teacher
first, second = nn.Linear(8, 8), nn.Linear(4, 4)
one = torch.optim.SGD(first.parameters(), lr=0.1)
other = torch.optim.SGD(second.parameters(), lr=0.1)
while True:
    try:
        first(torch.ones(2, 8)).sum().backward()
        one.step()
        one.zero_grad()
        second(torch.ones(2, 4)).sum().backward()
        other.step()
        other.zero_grad()
    except Exception:
        pass
"""


def test_a_script_keeps_what_it_keeps_and_no_more(tmp_path):
    """A module that it deletes is gone; two optimizers each have gradients of their own."""
    path = tmp_path / "two.py"
    path.write_text(DELETED)
    command = [sys.executable, "-m", "memplan", "profile", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    data = json.loads(done.stdout)
    assert data["categories"]["parameter"] == 4 * (8 * 8 + 8 + 4 * 4 + 4)
    gradients = [b for b in profile_script(path, []).trace.blocks if b.category == "gradient"]
    assert {block.name for block in gradients} >= {"weight", "bias"}
    assert {block.nbytes for block in gradients} >= {4 * 8 * 8, 4 * 4 * 4}
