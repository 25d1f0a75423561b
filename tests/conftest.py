"""Settings of all tests."""

from __future__ import annotations

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
