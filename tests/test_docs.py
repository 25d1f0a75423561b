"""What the pages of ``docs/`` show, as it is."""

from __future__ import annotations

import importlib
import re

import memplan

from support import laws
from support.paths import CHECKOUT


def test_the_pass_of_the_page_on_passes(tmp_path, monkeypatch):
    page = (CHECKOUT / "docs" / "write_a_pass.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "a_pass_of_the_docs.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    shown = importlib.import_module("a_pass_of_the_docs")
    model, batch = shown.model, shown.batch
    planned = memplan.optimize(
        model,
        batch,
        budget="1%",
        passes=[shown.in_16_bits()],
        default_passes=False,
        options=memplan.Options(on_infeasible="smallest"),
    )
    assert planned.plan.num_restores and planned.plan.effects == (memplan.Effect.ROUNDING,)
    assert planned.plan.peak_bytes < planned.plan.original_peak_bytes
    assert 0 < laws.error(laws.step(planned, batch), laws.step(model, batch)) < 1e-2
    laws.assert_within_budget(planned, batch)


def test_the_page_on_the_architecture_names_every_folder():
    page = (CHECKOUT / "docs" / "architecture.md").read_text()
    folders = {path.parent.name for path in (CHECKOUT / "memplan").glob("*/__init__.py")}
    assert folders and {name for name in folders if f"`{name}/`" not in page} == set()
