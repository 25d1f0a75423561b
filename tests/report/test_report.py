"""Pages: what is in them, that they need nothing else, and which documents are refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from memplan.cli.profile import profile
from memplan.cli.report import report
from memplan.ir.memory_trace import SAVED
from memplan.report.documents import profile_document
from memplan.report.html import html_report
from memplan.report.schema import encode, read_document
from memplan.report.step_tables import short_source

from support.documents import (
    DOCUMENTS,
    comparison,
    estimate,
    estimate_with_trace,
    measured,
    trace,
    write,
    write_target,
)

EVIL = "a<script>alert(1)</script>&b"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Its tags must be balanced; collects the text and the scripts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.scripts, self.tags = [], [], {}, []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1].get("id")] = data
        elif self.open and self.open[-1][0] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


@pytest.mark.parametrize("name", ["measured", "comparison", "curve", "estimate"])
def test_a_page_needs_nothing_else_and_holds_its_document(name):
    document = DOCUMENTS[name]()
    page = html_report(document)
    for outside in ("http", "//", "src=", "@import", "url("):
        assert outside not in page
    assert Page(page).scripts["memplan"].replace("\\u003c", "<") == encode(document)
    assert page.count("<script") == 2


def test_the_headline_of_a_profile():
    page = Page(html_report(measured())).text
    for words in ("60.00 KiB", "61,440 B", "10.00 KiB", "750.0 ms", "250.0 ms", "unexplained"):
        assert words in page


def test_the_headline_of_a_comparison():
    page = Page(html_report(comparison())).text
    for words in (
        "120.00 KiB → 60.00 KiB",
        "0.500x, original to planned",
        "1.500x, measured",
        "59.00 KiB / 60.00 KiB",
        "measured - predicted: +1,024 B",
        "same bits",
        "2 of 9",
        "pack_masks",
        "one <b>note</b>",
    ):
        assert words in page
    assert "DIFFERENT" not in page


def test_different_results_stand_out():
    page = html_report(comparison(is_exact=False, gradients_equal=False, max_gradient_error=None))
    assert '<strong class="alarm">DIFFERENT</strong>' in page
    assert Page(page).texts.count("DIFFERENT") == 2


def test_an_estimate_has_no_timeline():
    page = Page(html_report(estimate()))
    assert "svg" not in page.tags
    assert "2.00 KiB" in page.text and SAVED in page.text


def test_the_modules_are_a_tree():
    page = html_report(measured())
    assert re.search(r"<details[^>]*><summary><span class=\"mono\">net</span>", page) is None
    # the two children of "net" differ by a number alone
    assert '<span class="mono">net.* x2</span><span class="number">60.00 KiB</span>' in page
    assert "saved activation 30.00 KiB, temporary 20.00 KiB, parameter 10.00 KiB" in page


def test_names_are_escaped():
    page = html_report(profile_document(trace(module=EVIL), {}))
    parsed = Page(page)
    assert "<script>alert" not in page
    assert EVIL in parsed.text
    assert parsed.tags.count("script") == 2
    assert json.loads(parsed.scripts["memplan"])["traces"][0]["lines"][0]["module"] == EVIL


def test_the_default_is_a_page_beside_the_file(tmp_path):
    path = write(tmp_path, measured())
    result = CliRunner().invoke(report, [str(path)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'step.html'}\n"
    assert (tmp_path / "step.html").read_text() == html_report(measured())


def changed(**changes):
    return json.dumps({**json.loads(encode(estimate_with_trace())), **changes})


def broken_trace(**changes):
    (found,) = json.loads(changed())["traces"]
    return changed(traces=[{**found, **changes}])


def without(field):
    found = json.loads(changed())
    del found[field]
    return json.dumps(found)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON object was expected"),
        ("{}", "kind is None"),
        (changed(kind="poem"), "kind is 'poem'"),
        (changed(schema_version=2), "schema_version is 2, expected 1"),
        (changed(schema_version=True), "schema_version is True, expected 1"),
        (without("peak_bytes"), "missing required field `peak_bytes`"),
        (changed(peak_bytes=None), "Expected `int`, got `null` - at `$.peak_bytes`"),
        (changed(peak_bytes="much"), "Expected `int`, got `str` - at `$.peak_bytes`"),
        (changed(categories={"magic": 1}), "at `key` in `$.categories`"),
        (broken_trace(times_s=[0.0]), "differ in length"),
        (broken_trace(times_s=[0.0, 2.0, 1.0, 4.0, 5.0]), "go back"),
        (broken_trace(series={SAVED: ["x"] * 5}), "`$.traces[0].series[...][0]`"),
        (broken_trace(label=None), "`$.traces[0].label`"),
        ('{"kind":' * 100_000, "not JSON"),
    ],
)
def test_what_cannot_be_read_is_2_and_leaves_no_file(tmp_path, document, message):
    path = write(tmp_path, document)
    result = CliRunner().invoke(report, [str(path)])
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "step.pdf"), "ends in .html, .svg, .png"),
        (("-o", "nowhere/step.html"), "cannot write"),
        (("-o", "nowhere/step.png"), "cannot write"),
        (("-o", "figure.svg"), "no traces"),
    ],
)
def test_wrong_outputs_are_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, estimate() if "figure.svg" in arguments else estimate_with_trace())
    result = CliRunner().invoke(report, [path.name, *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_the_input_is_not_overwritten(tmp_path):
    path = tmp_path / "step.html"
    path.write_text(encode(measured()))
    result = CliRunner().invoke(report, [str(path)])
    assert result.exit_code == 2 and "would be overwritten" in result.stderr
    assert read_document(path.read_text()) == measured()


def test_bytes_that_are_no_text_are_2(tmp_path):
    path = tmp_path / "step.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert CliRunner().invoke(report, [str(path)]).exit_code == 2


def test_a_measured_step_becomes_a_page(tmp_path):
    path = tmp_path / "step.json"
    target = write_target(tmp_path)
    run = CliRunner().invoke(profile, [target, "--steps", "1", "-o", str(path)])
    assert run.exit_code == 0, run.output
    assert CliRunner().invoke(report, [str(path)]).exit_code == 0
    document = json.loads(path.read_text())
    page = Page(path.with_suffix(".html").read_text())
    assert json.loads(page.scripts["memplan"]) == document
    assert f"{document['peak_bytes']:,d} B" in page.text
    assert "svg" in page.tags and "aten::" in page.text


@pytest.mark.parametrize(
    ("inside", "shown"),
    [
        ("models/gpt.py", "models/gpt.py:3"),
        (".venv/lib/python3.11/site-packages/transformers/loss/utils.py", "loss/utils.py:3"),
    ],
)
def test_files_are_shown_from_here_but_for_installed_ones(inside, shown):
    assert short_source(f"{Path.cwd() / inside}:3") == shown
    assert short_source("/elsewhere/models/gpt.py:3") == "models/gpt.py:3"
