"""How plans and measurements show themselves."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

import memplan
from memplan.ir.schedule import Effect
from memplan.tables import Table

from support.small import Net, X


@pytest.fixture(scope="module")
def plan():
    made = memplan.plan(Net(), X)
    assert made.captured_effect is Effect.EXACT
    return replace(
        made,
        peak_bytes=330 * 2**20,
        original_peak_bytes=660 * 2**20,
        resident_bytes=60 * 2**20,
        budget_bytes=331 * 2**20,
        seconds=1.06,
        original_seconds=1.0,
        passes=(),
        peak_op="aten.mm in <lambda>",
    )


def test_a_plan_in_a_line(plan):
    assert plan.summary == (
        "peak: 660.00 MiB -> 330.00 MiB (-50.0%) || time: 1.06x || budget: 331.00 MiB || exact"
    )


def test_what_is_unknown_is_left_out(plan):
    one = replace(plan, budget_bytes=None, captured_effect=Effect.ROUNDING)
    assert one.summary == ("peak: 660.00 MiB -> 330.00 MiB (-50.0%) || time: 1.06x || rounding")


def test_a_planned_module_prints_its_plan(capsys):
    planned = memplan.optimize(Net())
    with pytest.raises(memplan.NotPlannedYet):
        planned.print_memory_plan()
    planned(X)
    planned.print_memory_plan()
    assert capsys.readouterr().out == f"{planned.plan.summary}\n"


class Cells(HTMLParser):
    """The texts of a table's cells; fails where tags do not match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.rows = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_a_table():
    table = Table(
        "<b>&", ("", "n"), (("a<script>", "1"), (), ("x", "DIFFERENT")), frozenset({1}), footer="<"
    )
    left, right = 'style="text-align: left"', 'style="text-align: right"'
    assert table.to_html() == (
        "<table><caption><b>&lt;b&gt;&amp;</b></caption>"
        f"<tr><th {left}></th><th {right}>n</th></tr>"
        f"<tr><td {left}>a&lt;script&gt;</td><td {right}>1</td></tr>"
        f"<tr><td {left}>x</td><td {right}><b>DIFFERENT</b></td></tr>"
        "</table><p>&lt;</p>"
    )


def test_a_plan_in_a_notebook(plan):
    page = plan._repr_html_()
    rows = Cells(page).rows
    assert ["peak memory", "660.00 MiB", "330.00 MiB", "0.500"] in rows
    assert ["  above resident", "600.00 MiB", "270.00 MiB", "0.450"] in rows
    assert "aten.mm in &lt;lambda&gt;" in page


def profile(peak_bytes, step_s):
    return memplan.Profile(
        peak_bytes=peak_bytes,
        resident_bytes=1024,
        phases={"forward": 2048, "backward": peak_bytes},
        step_s=step_s,
        timeline=(),
        device="cpu",
        reserved_bytes=None,
        process_bytes=None,
        host_bytes=0,
    )


def test_a_profile_in_a_notebook():
    assert Cells(profile(4096, 0.25)._repr_html_()).rows == [
        ["", "measured"],
        ["peak memory", "4.00 KiB"],
        ["in forward", "2.00 KiB"],
        ["in backward", "4.00 KiB"],
        ["resident", "1.00 KiB"],
        ["step time", "250.0 ms"],
    ]


@pytest.mark.parametrize(("equal", "said"), [(True, "same bits"), (False, "DIFFERENT")])
def test_a_comparison_in_a_notebook(equal, said):
    comparison = memplan.Comparison(
        original=profile(5120, 0.2),
        planned=profile(3072, 0.3),
        time_ratio=1.5,
        loss_equal=True,
        gradients_equal=equal,
        buffers_equal=True,
        parameters_equal=True,
        rng_equal=True,
        max_gradient_error=0.0,
        losses=(1.0, 1.0),
    )
    assert Cells(comparison._repr_html_()).rows == [
        ["", "original", "planned", "planned / original"],
        ["peak memory", "5.00 KiB", "3.00 KiB", "0.600"],
        ["above resident", "4.00 KiB", "2.00 KiB", "0.500"],
        ["step time", "200.0 ms", "300.0 ms", "1.500"],
        ["results", "", "", said],
    ]
