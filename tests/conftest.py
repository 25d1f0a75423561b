"""Settings of all tests."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("short", max_examples=200)
settings.register_profile("full", max_examples=2000)
settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def cost_cache(tmp_path_factory):
    """Measured costs are shared by the session's tests, and by nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
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
    """Where to write ``Results``."""
    parser.addoption("--results", type=Path, help="write what was seen to this JSON file")


@pytest.fixture(scope="session")
def results(pytestconfig):
    """Collects; written at the end, if asked for."""
    collected = Results()
    yield collected
    path = pytestconfig.getoption("--results")
    if path is not None:
        path.write_text(json.dumps(asdict(collected), indent=1) + "\n")
