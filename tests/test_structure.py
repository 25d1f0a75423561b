"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memplan

from support.paths import CHECKOUT

KERNEL = Path(memplan.__file__).parent
PRIVATE = re.compile(
    r"\btorch(?!\.ops\.)(\.\w+)*\._(?!_)|\._cdata\b|\._version\b|\._(forward|backward)_(pre_)?hooks"
)


PASSES = Path(memplan.passes.__file__).parent
"""Inside of the kernel's folder, or, in a checkout, beside it."""


def sources() -> list[Path]:
    found = {path for folder in (KERNEL, PASSES) for path in folder.rglob("*.py")}
    assert len(found) > 30
    return sorted(path for path in found if "__pycache__" not in path.parts)


def sources_of(folder: str) -> list[Path]:
    root = PASSES if folder == "passes" else KERNEL / folder
    return [path for path in sources() if root in path.parents]


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
    assert not {name: lines for name, lines in long.items() if lines > 600}


def test_the_root_is_small():
    assert len([path for path in KERNEL.glob("*.py") if path in sources()]) <= 10


MAY_IMPORT = {
    "passes": {"analysis", "capture", "errors", "ir", "passes", "rng", "transforms", "with_loss"},
    "report": {"advise", "errors", "ir", "planner", "profiler", "report", "tables", "units"},
}
"""What a folder may import of the package; when only types are checked, anything below it."""


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_what_folders_may_import(folder):
    found = set()
    for path in sources_of(folder):
        tree = ast.parse(path.read_text())
        typed = {
            id(one)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for one in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in typed and node.module:
                found |= set(re.findall(r"^memplan\.(\w+)", node.module))
    assert found and found <= MAY_IMPORT[folder]


def test_no_class_name_is_defined_twice():
    places: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.name)
    assert not {name: files for name, files in places.items() if len(files) > 1}


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
