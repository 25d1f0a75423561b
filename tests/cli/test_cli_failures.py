"""Bad input to every command: an exit code, one clear message, and nothing half-written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from memplan import profiler
from memplan.cli import main
from memplan.compiler import autosize
from memplan.report.schema import SCHEMA_VERSION

from support.bad_input import FILES, MAKE, ON_TARGET, TABLE


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of inputs: what can be read, and what cannot."""
    folder = tmp_path_factory.mktemp("made")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "binary.json").write_bytes(bytes(range(128, 256)))
    (folder / "folder.json").mkdir()
    (folder / "folder.html").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "dont_write_bytecode", True)
        for line in (
            f"profile {MAKE} --steps 1 -o profile.json",
            f"plan {MAKE} --budget 90% -o plan.json",
        ):
            result = CliRunner().invoke(main, line.split())
            assert result.exit_code == 0, result.output
        text = (folder / "plan.json").read_text()
        (folder / "cut.json").write_text(text[: len(text) // 2])
        (folder / "retyped.json").write_text(json.dumps({**json.loads(text), "peak_bytes": "x"}))
        (folder / "page.html").write_text((folder / "profile.json").read_text())
        yield folder


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def invoke(line):
    command, *rest = line.split()
    shape = [] if command == "report" else ["--json"]
    return CliRunner().invoke(main, [command, *shape, *rest])


@pytest.mark.parametrize(("line", "code", "fragment"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input(made, line, code, fragment):
    before = contents(made)
    result = invoke(line)
    said = [text for text in result.stderr.splitlines() if text.strip()]
    assert result.exit_code == code, result.stderr
    assert said[-1].startswith("Error: ") and fragment in said[-1], result.stderr
    usage = [text.split(maxsplit=1)[0] for text in said[:-1]]
    assert usage in ([], ["Usage:", "Try"], ["note:"]), result.stderr
    assert "internal error" not in result.stderr
    assert result.stdout == ""
    assert contents(made) == before


@pytest.mark.parametrize("command", ON_TARGET)
def test_an_interrupt_is_1(made, command):
    before = contents(made)
    result = invoke(f"{command} target.py:interrupted")
    assert result.exit_code == 1
    assert result.stderr.split() == ["Aborted!"] and result.stdout == ""
    assert contents(made) == before


@pytest.mark.parametrize("command", ON_TARGET)
def test_what_the_factory_prints_is_not_the_result(made, command):
    result = invoke(f"{command} target.py:prints")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["schema_version"] == SCHEMA_VERSION
    assert "loading" in result.stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"estimate {MAKE} --memory 1KiB", 3),
        (f"estimate {MAKE} --memory 0", 3),
        (f"solve batch_size {MAKE} --budget 1KiB", 3),
        ("diff smaller.json profile.json --fail-on-increase 2%", 4),
        ("diff smaller.json profile.json", 0),
        ("diff profile.json smaller.json --fail-on-increase 0%", 0),
    ],
)
def test_an_answer_that_is_no_is_still_an_answer(made, line, code):
    profile = json.loads((made / "profile.json").read_text())
    smaller = {**profile, "peak_bytes": profile["peak_bytes"] // 2}
    (made / "smaller.json").write_text(json.dumps(smaller))
    result = invoke(line)
    assert result.exit_code == code, result.stderr
    assert json.loads(result.stdout)["schema_version"] == SCHEMA_VERSION
    assert "Traceback" not in result.stderr


def test_what_could_not_be_measured_is_5_when_strict(made, monkeypatch):
    whole = profiler.estimate

    def partly(*given, **settings):
        return replace(whole(*given, **settings), refusals=("a kernel",))

    monkeypatch.setattr(profiler, "estimate", partly)
    line = f"estimate {MAKE} --memory 1GiB"
    assert invoke(line).exit_code == 0
    assert invoke(f"{line} --strict").exit_code == 5
    assert invoke(f"estimate {MAKE} --memory 1KiB --strict").exit_code == 3


def test_what_comes_nearest_is_shown_where_nothing_fits(made):
    result = CliRunner().invoke(main, f"plan {MAKE} --techniques --budget 1%".split())
    assert result.exit_code == 3
    assert "What would make it fit" in result.stdout and "too small" in result.stderr


def fail(*_given, **_settings):
    raise RuntimeError("something\nunforeseen")


def test_an_internal_error_is_one_line(made, monkeypatch):
    monkeypatch.setattr(autosize, "make_plan", fail)
    before = contents(made)
    result = invoke(f"plan {MAKE} -o out.json")
    assert result.exit_code == 1
    assert result.stdout == "" and contents(made) == before
    assert result.stderr.startswith("Error: internal error: RuntimeError: something unforeseen")
    assert result.stderr.count("\n") == 1 and "memplan --debug" in result.stderr


def test_debug_shows_the_traceback(made, monkeypatch):
    result = CliRunner().invoke(main, ["--debug", "plan", "target.py:raises"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "raise ValueError" in result.stderr
    monkeypatch.setattr(autosize, "make_plan", fail)
    result = CliRunner().invoke(main, ["--debug", "plan", MAKE])
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)
