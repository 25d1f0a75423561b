"""Figures: what is drawn where, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from memplan.cli.frontier import frontier
from memplan.cli.report import report
from memplan.errors import MemplanError
from memplan.ir.memory_trace import CATEGORIES
from memplan.report.documents import trace_document
from memplan.report.figures import save_figure
from memplan.report.palette import DARK, LIGHT
from memplan.report.panels import panels, scaled_times, ticks
from memplan.report.schema import UnreadableDocument, kind_of, read_document
from memplan.report.svg import frontier_svg, timeline_svg

from support.documents import (
    DOCUMENTS,
    KIB,
    comparison,
    curve,
    estimate,
    measured,
    trace,
    write,
    write_target,
)


def elements(svg, css):
    root = ElementTree.fromstring(svg)
    return [one for one in root.iter() if css in (one.get("class") or "").split()]


def test_the_timeline_names_its_peak_and_its_axes():
    svg = timeline_svg(measured().traces)
    (note,) = elements(svg, "note")
    assert note.text == "peak 60.00 KiB, backward, aten::sum"
    assert [one.text for one in elements(svg, "name")] == ["measured time, s", "memory, KiB"]
    assert [one.text for one in elements(svg, "phase")] == ["forward", "backward"]
    (dot,) = elements(svg, "dot")
    # at 2 s of 5, and at 1 of the 1.15 peaks that fit
    assert float(dot.get("cx")) == pytest.approx(74 + 866 * 2 / 5, abs=0.1)
    (panel,) = elements(svg, "panel")
    assert panel.get("data-trace") == "0" and float(panel.get("data-seconds")) == 5.0


def test_labels_are_escaped():
    label = "a<script>alert(1)</script>&b"
    (title,) = elements(timeline_svg([trace_document(label, trace())]), "panel-title")
    assert title.text == label


def test_areas_are_steps():
    svg = timeline_svg(measured().traces)
    paths = [one.get("d") for one in ElementTree.fromstring(svg).iter("path")]
    assert len(paths) == 3
    assert all(set(re.findall("[A-Z]", path)) <= set("MHVZ") for path in paths)
    # what is stacked last is drawn first, and rises and falls twice
    assert [path.count("V") for path in paths] == [5, 3, 1]


def test_a_prediction_is_drawn_over_what_was_measured():
    svg = timeline_svg(comparison().traces, 61 * KIB)
    titles = [one.text for one in elements(svg, "panel-title")]
    assert titles == ["original, measured", "planned, measured and predicted"]
    assert [one.get("data-trace") for one in elements(svg, "panel")] == ["0", "1"]
    second = elements(svg, "panel")[1]
    assert [one.tag for one in second if one.get("class") == "predicted"] == ["path"]
    assert "each phase of the prediction is scaled" in "".join(second.itertext())
    entries = "".join(ElementTree.fromstring(svg).itertext())
    assert "predicted total, peak 60.00 KiB" in entries and "budget 61.00 KiB" in entries


def test_all_panels_have_the_same_memory_axis():
    smaller = replace(trace_document("planned, predicted", trace("predicted")), peak_bytes=KIB)
    first, second = elements(timeline_svg([comparison().traces[0], smaller]), "panel")
    labels = [[t.text for t in panel if t.get("text-anchor") == "end"] for panel in (first, second)]
    assert labels[0][:-1] == labels[1][: len(labels[0]) - 1] and len(labels[0]) > 3


def test_each_predicted_phase_is_as_wide_as_the_measured():
    views = comparison().traces
    # forward: 0 to 0.2 s becomes 0 to 2 s; backward: 0.2 to 1.2 s becomes 2 to 5 s
    assert scaled_times(views[2], views[1]) == pytest.approx([0, 1, 2, 2.6, 5])


def test_other_phases_are_not_laid_over():
    other = trace_document("planned, predicted", trace("predicted"))
    other = replace(other, phases=("forward",) * 4 + ("optimizer",))
    views = [*comparison().traces[:2], other]
    assert [(panel.number, panel.predicted) for panel in panels(views)] == [
        (0, None),
        (1, None),
        (2, None),
    ]


def test_a_frontier_has_a_point_a_plan():
    svg = frontier_svg(curve())
    assert [one[0].text for one in elements(svg, "point")] == [
        "20.00 KiB, 1.500x",
        "30.00 KiB, 1.250x",
        "60.00 KiB, 1.000x",
    ]
    names = [one.text for one in elements(svg, "name")]
    assert names == ["peak memory, KiB", "predicted time / unplanned time"]
    (path,) = elements(svg, "curve")
    assert re.sub(r"[\d. ]", "", path.get("d")) == "MHVHVH"


def test_every_category_has_a_colour():
    assert [*LIGHT] == [*CATEGORIES] and DARK.keys() == LIGHT.keys()
    assert len(set(LIGHT.values())) == len(set(DARK.values())) == len(CATEGORIES)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.9, 1.1, [0.9, 0.95, 1.0, 1.05, 1.1]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["measured", "comparison", "curve"])
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_figures_are_written(tmp_path, name, suffix):
    path = write(tmp_path, DOCUMENTS[name]())
    output = tmp_path / f"figure{suffix}"
    result = CliRunner().invoke(report, [str(path), "-o", str(output)])
    assert result.exit_code == 0, result.output
    if suffix == ".svg":
        root = ElementTree.parse(output).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    else:
        assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {one.name for one in tmp_path.iterdir()} == {path.name, output.name}


def test_a_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MemplanError, match=r'pip install "memplan\[report\]"'):
        save_figure(measured(), tmp_path / "step.png")
    path = write(tmp_path, measured())
    result = CliRunner().invoke(report, [str(path), "-o", str(tmp_path / "step.png")])
    assert result.exit_code == 1 and "memplan[report]" in result.stderr
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_figure_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    def fails(path, data):
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    path, old = write(tmp_path, measured()), tmp_path / "step.svg"
    old.write_text("old")
    monkeypatch.setattr(Path, "write_bytes", fails)
    result = CliRunner().invoke(report, [str(path), "-o", str(old)])
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert old.read_text() == "old"
    assert {one.name for one in tmp_path.iterdir()} == {path.name, old.name}


def test_save_figure_refuses_other_suffixes_and_documents(tmp_path):
    with pytest.raises(MemplanError, match=r"ends in \.svg or \.png"):
        save_figure(measured(), tmp_path / "step.pdf")
    with pytest.raises(UnreadableDocument, match="no traces"):
        save_figure(estimate(), tmp_path / "step.svg")


def test_a_frontier_can_be_drawn_and_kept(tmp_path):
    target = write_target(tmp_path)
    for name in ("front.json", "front.svg"):
        output = str(tmp_path / name)
        run = CliRunner().invoke(frontier, [target, "--points", "2", "--json", "-o", output])
        assert run.exit_code == 0, run.output
        printed = json.loads(run.stdout)
    assert kind_of(read_document((tmp_path / "front.json").read_text())) == "frontier"
    points = elements((tmp_path / "front.svg").read_text(), "point")
    assert len(points) == len(printed["plans"])
    run = CliRunner().invoke(frontier, [target, "-o", "front.pdf"])
    assert run.exit_code == 2 and "ends in .svg, .png, .json" in run.stderr
