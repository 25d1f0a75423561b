"""Steps to plan: the models of the law table, as they are and scaled, captured and priced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import memplan
from memplan.compiler.lower import LoweredStep, lower
from memplan.compiler.request import make_request
from memplan.transforms.apply import changing

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import scaled

from support.rows import DEEP
from support.rows import MODELS as ROWS


def models() -> Mapping[str, Callable[[], Any]]:
    """Factories by name, each of a module and a batch, and sometimes more."""
    return {**ROWS, **DEEP, **{f"{name} (large)": make for name, make in scaled.MODELS.items()}}


def lowered(model: nn.Module, sample: Any, **options: Any) -> LoweredStep:
    """A step under the default passes, captured and priced."""
    request = make_request(
        model,
        options=memplan.Options(**options),
    )
    batch = memplan.Sample.of(sample)
    with changing(model, batch, request.passes) as changed:
        return lower(changed, batch, request)
