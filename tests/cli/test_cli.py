"""The commands, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import memplan
from memplan.cli import main

WHOLE_EFFORT = True

TARGET = """
import torch
from torch import nn
import memplan

def make(depth=12):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(256, 64), torch.randn(256, 64))

def scaled(scale=1):
    return make(depth=1)

def whole():
    model, batch = make()
    return model, batch, torch.optim.AdamW(model.parameters(), foreach=True)

def fails():
    raise ValueError("no data here")

def nonsense():
    return 3

class Counted(torch.autograd.Function):
    calls = 0
    @staticmethod
    def forward(ctx, x):
        return x * 1
    @staticmethod
    def backward(ctx, gradient):
        Counted.calls += 1
        return gradient * Counted.calls

class Cheat(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
    def forward(self, x):
        return Counted.apply(self.weight * x).sum()

def cheats():
    return Cheat(), torch.ones(4)

def branches():
    class Branches(Cheat):
        def forward(self, x):
            return self.weight.sum() if self.weight.sum() > 0 else x.sum()
    return Branches(), torch.ones(4)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "target.py").write_text(TARGET)

    def run(factory, *arguments):
        target = f"{tmp_path / 'target.py'}:{factory}"
        return CliRunner().invoke(main, ["compare", target, *arguments])

    return run


def test_the_proof(run):
    result = run("make", "--budget", "60%", "--steps", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("same bits") == 4
    assert "predicted peak" in result.stdout and "memplan.optimize" in result.stdout
    assert result.stderr == ""


def test_an_infeasible_budget_is_3(run):
    result = run("make", "--budget", "1%")
    assert result.exit_code == 3
    assert "the smallest that memplan can keep" in result.stderr


def test_a_plan_that_breaks_its_promise_is_4(run):
    result = run("cheats")
    assert result.exit_code == 4
    assert "broken promise: the plan is exact, but the results differ" in result.stderr


@pytest.mark.parametrize(
    ("factory", "arguments", "code", "message"),
    [
        ("missing", (), 2, "has no function 'missing'"),
        ("make", ("--budget", "much"), 2, "accepted forms"),
        ("make", ("--steps", "0"), 2, "--steps"),
        ("fails", (), 1, "raised ValueError: no data here"),
        ("nonsense", (), 1, "must return (model, batch)"),
        ("branches", (), 1, "cannot be captured"),
        ("make", ("--max-slowdown", "0.5"), 2, "--max-slowdown"),
    ],
)
def test_bad_input_is_one_clear_line(run, factory, arguments, code, message):
    result = run(factory, *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "target", ["nowhere.py:make", "no.such.module:make", "target.py", ":make", "target:"]
)
def test_a_missing_target_is_2(target):
    result = CliRunner().invoke(main, ["compare", target])
    assert result.exit_code == 2
    assert "Error:" in result.stderr


def test_the_console_script_answers():
    command = [sys.executable, "-m", "memplan", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "memplan" in result.stdout


def test_with_an_optimizer_the_whole_step_is_compared(run):
    result = run("whole", "--budget", "80%", "--steps", "1")
    assert result.exit_code == 0
    assert "in optimizer" in result.output and "updated parameters" in result.output
    assert "optimizer=optimizer" in result.output


@pytest.fixture
def command(tmp_path):
    (tmp_path / "target.py").write_text(TARGET)

    def run(name, *arguments):
        given = [
            str(argument).replace("TARGET", str(tmp_path / "target.py")) for argument in arguments
        ]
        return CliRunner().invoke(main, [name, *given])

    return run


def assert_fits(text, width=80):
    assert max(map(len, text.splitlines())) <= width


def test_a_plan_is_shown_and_written_and_verified(command, tmp_path):
    path = tmp_path / "plan.json"
    made = command("plan", "TARGET:make", "--budget", "60%", "-o", path)
    assert made.exit_code == 0, made.output
    assert "saved activation" in made.stdout and "At the peak" in made.stdout
    assert_fits(made.stdout[: made.stdout.index("To measure it")])
    assert f"memplan verify {path}" in made.stdout
    saved = memplan.Plan.from_json(path.read_text())
    assert saved.peak_bytes <= saved.budget_bytes
    verified = command("verify", path, "TARGET:make", "--steps", "1")
    assert verified.exit_code == 0, verified.output
    assert "The plan holds." in verified.stdout
    other = command("verify", path, "TARGET:make", "--set", "depth=11", "--steps", "1")
    assert other.exit_code == 4
    assert "Error:" in other.stderr and "Traceback" not in other.output


def test_a_plan_as_json_is_all_that_is_printed(command):
    result = command("plan", "TARGET:make", "--budget", "60%", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["kind"] == "plan" and data["num_restores"] > 0
    assert sum(data["categories"].values()) == data["peak_bytes"]


def test_a_plan_for_another_device(command):
    result = command("plan", "TARGET:make", "--budget", "80%", "--device", "h100")
    assert result.exit_code == 0 and "To measure it" not in result.stdout
    result = command("plan", "TARGET:make", "--device", "abacus")
    assert result.exit_code == 2 and "h100" in result.stderr


def test_no_plan_is_written_where_none_fits(command, tmp_path):
    path = tmp_path / "plan.json"
    result = command("plan", "TARGET:make", "--budget", "1%", "-o", path)
    assert result.exit_code == 3
    assert not path.exists()


def test_a_plan_that_cannot_be_written_is_2(command, tmp_path):
    result = command("plan", "TARGET:make", "-o", tmp_path / "no" / "folder" / "plan.json")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


@pytest.mark.parametrize("content", ["", "{}", "\x00", '{"schema_version": 1}', "[1, 2]"])
def test_a_corrupt_plan_is_2(command, tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    result = command("verify", path, "TARGET:make")
    assert result.exit_code == 2
    assert "not a plan" in result.stderr and "Traceback" not in result.output


def test_the_frontier_falls(command):
    result = command("frontier", "TARGET:make", "--points", "4")
    assert result.exit_code == 0, result.output
    assert_fits(result.stdout[: result.stdout.index("To measure one")])
    data = json.loads(command("frontier", "TARGET:make", "--points", "4", "--json").stdout)
    slowdowns = [plan["slowdown"] for plan in data["plans"]]
    assert len(slowdowns) > 1 and slowdowns == sorted(slowdowns, reverse=True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("width=3", "unexpected keyword argument 'width'"), ("depth", "NAME=VALUE"), ("=3", "NAME=")],
)
def test_a_wrong_setting_is_2(command, setting, message):
    result = command("plan", "TARGET:make", "--set", setting)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_field_that_costs_nothing_is_2(command):
    result = command("solve", "scale", "TARGET:scaled", "--budget", "1GiB", "--device", "h100")
    assert result.exit_code == 2
    assert "does not depend on 'scale'" in result.stderr


def test_a_plan_with_passes_is_measured_by_its_file(command):
    result = command("plan", "TARGET:make", "--pass", "train_biases_only")
    assert result.exit_code == 0 and "memplan verify plan.json" in result.stdout


def test_what_is_unexplained_is_5_when_strict(command, monkeypatch):
    arguments = ("TARGET:make", "--steps", "1", "--strict")
    assert command("profile", *arguments).exit_code == 0
    monkeypatch.setattr("memplan.profiler.attribution._op_of", lambda event, origin: "")
    assert command("profile", *arguments).exit_code == 5
