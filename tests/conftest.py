"""Settings of all tests."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

# Workers share the cores: one thread each, said before torch reads it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

from memplan.costs import measured
from memplan.planner import search
from memplan.runtime import first_call

settings.register_profile("short", max_examples=40)
settings.register_profile("full", max_examples=2000)
settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def cost_cache(tmp_path_factory):
    """Measured costs are shared by the session's tests, and by nothing else."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMPLAN_CACHE_DIR", str(folder / "costs"))
        yield


@pytest.fixture(scope="module", autouse=True)
def search_effort(request):
    """A tenth of the search's effort, and ops timed as often as they must be.

    Laws hold for any plan, and the rest is for faster ones. Nor are first calls compared with the
    untouched module, as tests do so for themselves. All of it with ``--whole-effort``, and in files
    that say ``WHOLE_EFFORT = True`` or ``COMPARED = True``.
    """
    with pytest.MonkeyPatch.context() as patch:
        is_whole = getattr(request.module, "WHOLE_EFFORT", False)
        if not is_whole and not request.config.getoption("--whole-effort"):
            for name in ("_CALLS", "_FEWEST_TIMES", "_MOST_TIMES"):
                patch.setattr(search, name, getattr(search, name) // 10)
            patch.setattr(measured, "_LONGEST_S", 0.0)
            if not getattr(request.module, "COMPARED", False):
                patch.setattr(first_call, "what_is_due", lambda asked, effects: "none")
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@dataclass
class Results:
    """What the tests saw, for the documentation.

    Attributes:
        laws: columns of the law table, by "model budget".
        support: (feature, effect or "refused", reason).
        optimizers: rows of the table of optimizers.
        freed: by optimizer, how much of the gradients' bytes updates in the backward free.
    """

    laws: dict[str, dict[str, Any]] = field(default_factory=dict)
    support: list[tuple[str, str, str]] = field(default_factory=list)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    freed: dict[str, float] = field(default_factory=dict)

    def law(self, model: str, budget: str, **columns: Any) -> None:
        """Add columns to a row of the law table."""
        row = self.laws.setdefault(f"{model} {budget}", {"model": model, "budget": budget})
        row.update(columns)


def pytest_addoption(parser):
    """Where to write ``Results``, and how long to search."""
    parser.addoption("--results", type=Path, help="write what was seen to this JSON file")
    parser.addoption(
        "--whole-effort", action="store_true", help="search as long as users' plans do"
    )


def pytest_configure(config):
    """Make a marker known, and refuse to write half of what was seen."""
    config.addinivalue_line(
        "markers", "by_default(*ids): of a test's parameters, those that are not slow"
    )
    if config.getoption("--results") is not None and config.getoption("numprocesses", 0):
        raise pytest.UsageError("--results needs one process: add --numprocesses 0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow what ``by_default`` does not name; a name that is no parameter is an error."""
    named = {}
    for item in items:
        marker = item.get_closest_marker("by_default")
        if marker is not None:
            test = item.nodeid.partition("[")[0]
            named.setdefault(test, (set(marker.args), []))[1].append(item)
    for test, (ids, its) in named.items():
        unknown = ids - {item.callspec.id for item in its}
        if unknown and len(its) > 1:  # one alone was asked for by its name
            raise pytest.UsageError(f"{test}: by_default names {sorted(unknown)}, which are none")
        for item in its:
            if item.callspec.id not in ids:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Spare the collector what is there by now: each measurement has it look at everything."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def results(pytestconfig):
    """Collects; written at the end, if asked for."""
    collected = Results()
    yield collected
    path = pytestconfig.getoption("--results")
    if path is not None:
        path.write_text(json.dumps(asdict(collected), indent=1) + "\n")
