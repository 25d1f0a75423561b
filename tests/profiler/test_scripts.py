"""A whole script is profiled as it is."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import warnings

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


@pytest.mark.slow
def test_what_a_script_holds_is_counted(script):
    command = [sys.executable, "-m", "memplan", "profile", str(script), "--json", "--", "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["categories"]["input"] == 256 * 64 * 4


def test_a_script_is_not_changed_by_it(script, capsys, monkeypatch):
    profile_script(script, ["9"])
    losses = [line for line in capsys.readouterr().err.splitlines() if line[:1].isdigit()]
    assert [line.split()[0] for line in losses] == ["0", "1", "2", "3"]
    monkeypatch.setattr("sys.argv", [str(script), "4"])
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


def profiled(tmp_path, script):
    return profile_of(tmp_path, script).trace


def profile_of(tmp_path, script):
    path = tmp_path / "script.py"
    path.write_text(MODEL + script)
    return profile_script(path, [])


COMPILED = """
torch._dynamo.reset()
net = Net()
compiled = torch.compile(net, backend="aot_eager")
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
while True:
    compiled(torch.randn(256, 64)).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_script_may_compile_its_model(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        trace = profiled(tmp_path, COMPILED)
    saved = [b for b in trace.live(trace.peak_event) if b.category == "saved activation"]
    assert sum(block.nbytes for block in saved) >= 2 * 256 * 64 * 4
    assert trace.unexplained_bytes == 0


CLOSURE = """
net, data = Net(), torch.randn(256, 64)
optimizer = torch.optim.LBFGS(net.parameters(), lr=1e-3, max_iter=2)

def closure():
    optimizer.zero_grad()
    loss = net(data)
    loss.backward()
    return loss

while True:
    optimizer.step(closure)
"""


def test_an_optimizer_may_call_a_closure(tmp_path):
    trace = profiled(tmp_path, CLOSURE)
    saved = {b.module for b in trace.blocks if b.category == "saved activation"}
    assert {"body.1", "body.3"} <= saved
    gradients = [b for b in trace.blocks if b.category == "gradient"]
    assert {block.name for block in gradients} >= {"body.0.weight", "head.weight"}
    state = [one for one in trace.residents if one.category == "optimizer state"]
    assert state and {one.name for one in state if one.nbytes > 64 * 64 * 4} == {""}


CALLED_BY_FORWARD = """
class Whole(nn.Module):
    def __init__(this):
        super().__init__()
        this.net = Net()

    def forward(this, x):
        return this.net.body.forward(x).sum() + this.net(x)

whole = Whole()
optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
while True:
    whole.forward(torch.randn(256, 64)).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_modules_have_names_where_their_forward_is_called(tmp_path):
    trace = profiled(tmp_path, CALLED_BY_FORWARD)
    saved = [b.module for b in trace.blocks if b.nbytes == 256 * 64 * 4 and b.phase == "forward"]
    assert saved.count("net.body.1") >= 2 and {"net.body.1", "net.body.3"} <= {*saved}
    parameters = {one.name for one in trace.residents if one.category == "parameter"}
    assert {"net.body.0.weight", "net.head.weight"} <= parameters


def test_a_script_without_an_optimizer_of_torchs_is_told_so(tmp_path):
    with pytest.raises(MemplanError, match=r"made no step of a torch\.optim\.Optimizer"):
        profiled(tmp_path, "Net()(torch.randn(2, 64)).backward()")


HELD_BY_AUTOGRAD = """
net, total = Net(), 0
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(9):
    loss = net(torch.randn(256, 64))
    total = total + loss
    optimizer.zero_grad()
    loss.backward(retain_graph=True)
    optimizer.step()
"""


def test_what_steps_leave_behind_is_said(tmp_path):
    found = profile_of(tmp_path, HELD_BY_AUTOGRAD)
    kept = 2 * 256 * 64 * 4  # what each step's two ReLUs saved
    assert kept <= found.growth_bytes <= 2 * kept
    saved = [one for one in found.trace.residents if one.category == "saved activation"]
    assert sum(one.nbytes for one in saved) >= 2 * kept
    assert {one.name for one in saved} >= {"body.1.", "body.3."}
    assert {one.source.rpartition(":")[0] for one in saved} == {str(tmp_path / "script.py")}
    path = str(tmp_path / "script.py")
    result = CliRunner().invoke(main, ["profile", path])
    assert "It leaves" in " ".join(result.stdout.split())


DISTRIBUTED = """
from torch import distributed
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
net = nn.parallel.DistributedDataParallel(Net())
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
try:
    while True:
        net(torch.randn(256, 64)).backward()
        optimizer.step()
        optimizer.zero_grad()
finally:
    distributed.destroy_process_group()
"""


def test_what_python_does_not_see_is_unexplained_and_not_zero(tmp_path):
    trace = profiled(tmp_path, DISTRIBUTED)
    buckets = 4 * (2 * (64 * 64 + 64) + 64 * 16)
    # DDP makes its buckets anew after the first step; a thread that frees the old ones is not seen.
    assert trace.unexplained_bytes >= buckets
    unexplained = [one for one in trace.residents if one.category == "unexplained"]
    assert {one.op for one in unexplained} == {"aten::empty"} and len(unexplained) <= 2


SPARSE = """
table = nn.Embedding(1000, 16, sparse=True)
matrix = torch.eye(500).to_sparse()
rows = torch.eye(500).to_sparse_csr()
optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
while True:
    (matrix @ table(torch.arange(500)) + rows @ torch.ones(500, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_tensors_are_counted(tmp_path):
    trace = profiled(tmp_path, SPARSE)
    held = sum(one.nbytes for one in trace.residents if one.category == "input")
    assert held >= 500 * (4 + 8 + 8) + 500 * (4 + 8) + 501 * 8
    gradients = [block for block in trace.blocks if block.category == "gradient"]
    assert {block.name for block in gradients} == {"weight"}
    assert trace.unexplained_bytes == 0


PLANNED = """
import memplan
net = memplan.optimize(Net(), budget="90%")
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
while True:
    net(torch.randn({rows}, 64)).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_planned_step_has_modules_and_lines(tmp_path):
    with pytest.warns(UserWarning, match="only what Python sees"):
        trace = profiled(tmp_path, PLANNED.format(rows=251))  # no kernel of it was measured yet
    made = {(block.phase, block.module) for block in trace.blocks if block.op == "aten::mm"}
    assert made >= {("backward", "head"), ("backward", "body.2")}
    lines = {block.source.rpartition(":")[0] for block in trace.blocks if block.module == "head"}
    assert lines == {str(tmp_path / "script.py")}
    assert trace.unexplained_bytes == 0


def test_planning_in_the_step_that_is_recorded_is_said(tmp_path):
    script = "import itertools\nrows = itertools.count(257)\n" + PLANNED.format(rows="next(rows)")
    with (
        pytest.warns(UserWarning, match="only what Python sees"),
        pytest.raises(MemplanError, match="before step 4, which is recorded"),
    ):
        profiled(tmp_path, script)


INTERRUPTED = {
    "by a closure": """
import memplan
net, data = memplan.optimize(Net()), torch.randn(253, 64)
optimizer = torch.optim.LBFGS(net.parameters(), lr=1e-3, max_iter=2)

def closure():
    optimizer.zero_grad()
    loss = net(data)
    loss.backward()
    return loss

while True:
    optimizer.step(closure)
""",
    "after the first step": """
import memplan
net = memplan.optimize(Net())
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(99):
    net(torch.randn(254 if step == 0 else 255, 64)).backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    "in a task": """
import asyncio
import memplan

async def main():
    net = memplan.optimize(Net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    while True:
        net(torch.randn(252, 64)).backward()
        optimizer.step()
        optimizer.zero_grad()

asyncio.run(main())
""",
}


@pytest.mark.by_default("by a closure")
@pytest.mark.parametrize("name", INTERRUPTED)
def test_memplan_may_measure_before_the_steps_that_matter(name, tmp_path):
    with pytest.warns(UserWarning, match="only what Python sees"):
        trace = profiled(tmp_path, INTERRUPTED[name])
    gradients = {block.name for block in trace.blocks if block.category == "gradient"}
    assert gradients >= {"body.0.weight", "head.weight"}
    assert trace.unexplained_bytes == 0


PLANNED_INSIDE = """
import memplan

class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = memplan.optimize(Net())
        self.last = nn.Linear(1, 1)

    def forward(self, x):
        return self.last(self.net(x)[None]).sum()

trainer = Trainer()
optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
while True:
    trainer(torch.randn(256, 64)).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.filterwarnings("ignore:memplan measured kernels")
def test_modules_of_a_planned_part_go_by_their_whole_name(tmp_path):
    trace = profiled(tmp_path, PLANNED_INSIDE)
    made = {(block.phase, block.module) for block in trace.blocks if block.op == "aten::mm"}
    assert made >= {("backward", "net.head"), ("backward", "net.body.2")}
