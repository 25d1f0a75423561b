"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import memplan

from support.paths import CHECKOUT

KERNEL = Path(memplan.__file__).parent
PRIVATE = re.compile(
    r"\btorch(?!\.ops\.)(\.\w+)*\._(?!_)|\._cdata\b|\._version\b|\._(forward|backward)_(pre_)?hooks"
)


def sources() -> list[Path]:
    found = sorted(path for path in KERNEL.rglob("*.py") if "__pycache__" not in path.parts)
    assert len(found) > 30
    return found


def test_private_names_of_torch_are_in_one_package():
    internals = KERNEL / "torch_internals"
    assert any(PRIVATE.search(path.read_text()) for path in internals.glob("*.py"))
    for path in sources():
        if path.parent == internals:
            continue
        lines = [line for line in path.read_text().splitlines() if '"' not in line]
        used = [line for line in lines if PRIVATE.search(line)]
        assert not used, f"{path.name}: {used}"


def test_files_are_short():
    long = {path.name: len(path.read_text().splitlines()) for path in sources()}
    assert not {name: lines for name, lines in long.items() if lines > 400}


def test_only_the_command_line_prints():
    for path in sources():
        if "cli" not in path.parts and "report" not in path.parts:
            assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path


def test_the_readmes_first_snippet_runs_in_a_checkout():
    snippet = (CHECKOUT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    # There the folder `memplan` comes before an installed package.
    command = [sys.executable, "-W", "error", "-c", snippet + "\nprint(memplan.__file__)"]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    plan, place = result.stdout.splitlines()
    assert plan.startswith("Plan: peak")
    assert Path(place).parent == CHECKOUT / "memplan"
