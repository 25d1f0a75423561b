"""What the commands print with ``--json`` is what docs/report.schema.json says."""

from __future__ import annotations

import copy
import json

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from memplan.cli import main
from memplan.ir.memory_trace import CATEGORIES

from support import schema_file
from support.paths import DOCS

SCHEMA = json.loads(schema_file.PATH.read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
KINDS = set(SCHEMA["discriminator"]["mapping"])
TOTALS = ("peak_bytes", "resident_bytes", "categories", "unexplained_bytes")

TARGET = """
import torch
from torch import nn
import memplan

def make(batch_size=64):
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(batch_size, 16), torch.randn(batch_size, 16))

def whole():
    model, batch = make()
    return model, batch, torch.optim.AdamW(model.parameters())
"""

SCRIPT = """
import torch

model = torch.nn.Linear(16, 1)
optimizer = torch.optim.AdamW(model.parameters())
for number in range(9):
    model(torch.ones(64, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    print("step", number)
"""

COMMANDS = {
    "profile": ("profile", "TARGET:whole", "--steps", "1", "-o", "FOLDER/step.json"),
    "profile of a script": ("profile", "FOLDER/script.py"),
    "estimate": ("estimate", "TARGET:make", "--memory", "1GiB"),
    "estimate for a GPU": ("estimate", "TARGET:make", "--device", "h100", "--optimizer", "adamw"),
    "estimate, measured": ("estimate", "TARGET:make", "--costs", "measured", "--memory", "1GiB"),
    "plan": ("plan", "TARGET:make", "--budget", "90%", "-o", "FOLDER/plan.json"),
    "plan and techniques": ("plan", "TARGET:whole", "--budget", "99%", "--techniques"),
    "frontier": ("frontier", "TARGET:make", "--points", "2"),
    "comparison": ("compare", "TARGET:whole", "--steps", "1", "-o", "FOLDER/proof.json"),
    "verification": ("verify", "FOLDER/plan.json", "TARGET:make", "--steps", "1"),
    "difference": ("diff", "FOLDER/step.json", "FOLDER/proof.json"),
    "solution": ("solve", "batch_size", "TARGET:make", "--budget", "64KiB"),
    "no solution": ("solve", "batch_size", "TARGET:make", "--budget", "1KiB"),
    "choices": ("freeze", "TARGET:whole"),
    "checks": ("doctor",),
}
"""Those that read a file come after those that write it."""

CODES = {"no solution": 3}

STEPS = [name for name in COMMANDS if name not in ("checks", "choices")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    (folder / "target.py").write_text(TARGET)
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Every command once, on a terminal: where there is progress, it is shown."""
    found = {}
    for name, command in COMMANDS.items():
        given = [part.replace("TARGET", "FOLDER/target.py") for part in command]
        line = [part.replace("FOLDER", str(folder)) for part in (*given, "--json")]
        found[name] = CliRunner().invoke(main, line, env={"FORCE_COLOR": "1"})
    return found


@pytest.fixture(scope="module")
def documents(results):
    return {name: json.loads(result.stdout) for name, result in results.items()}


def cut(value):
    """With the first item alone of each list: as wrong as the whole, and sooner read."""
    if isinstance(value, list):
        return [cut(one) for one in value[:1]]
    return {key: cut(one) for key, one in value.items()} if isinstance(value, dict) else value


def problem(document):
    error = best_match(VALIDATOR.iter_errors(document))
    return None if error is None else f"{error.json_path}: {error.message[:300]}"


def test_the_schema_is_that_of_the_declaration():
    Draft202012Validator.check_schema(SCHEMA)
    assert schema_file.PATH.read_text() == schema_file.text(), (
        "to write it: python tests/support/schema_file.py"
    )
    described = [part for part in SCHEMA["$defs"].values() if "properties" in part]
    fixed = ("kind", "schema_version")
    fields = [(name, one) for part in described for name, one in part["properties"].items()]
    assert [name for name, one in fields if "description" not in one and name not in fixed] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_stdout_is_one_document_and_nothing_else(results, name):
    result = results[name]
    assert result.exit_code == CODES.get(name, 0), result.output
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("}\n")
    assert isinstance(json.loads(result.stdout, parse_constant=pytest.fail), dict)
    assert "Traceback" not in result.stderr


def test_progress_is_on_stderr_alone(results):
    assert "\x1b" in results["profile"].stderr and "\x1b" in results["plan"].stderr
    assert not any("\x1b" in result.stdout for result in results.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_schema_holds(documents, name):
    assert problem(documents[name]) is None


def test_every_kind_is_seen(documents):
    assert {document["kind"] for document in documents.values()} == KINDS


@pytest.mark.parametrize("name", STEPS)
def test_categories_sum_to_the_peak(documents, name):
    for one in (documents[name], *documents[name].get("traces", ())):
        assert sum(one["categories"].values()) == one["peak_bytes"] > one["resident_bytes"] > 0
        assert one["categories"].get("unexplained", 0) == one["unexplained_bytes"]


@pytest.mark.parametrize("name", STEPS)
def test_traces_agree_with_themselves(documents, name):
    for trace in documents[name].get("traces", ()):
        columns = [sum(column) for column in zip(*trace["series"].values(), strict=True)]
        assert max(columns) == trace["peak_bytes"]
        assert len(columns) == len(trace["times_s"]) == len(trace["phases"])
        in_modules = sum(sum(one["categories"].values()) for one in trace["modules"])
        assert in_modules == trace["peak_bytes"]


def test_a_file_is_what_is_printed(documents, folder):
    for name, file in (("profile", "step.json"), ("comparison", "proof.json")):
        assert json.loads((folder / file).read_text()) == documents[name]


def test_the_file_of_a_plan_is_no_report(folder):
    assert problem(json.loads((folder / "plan.json").read_text())) is not None


def test_the_totals_of_a_solution_are_those_of_its_planned_step(documents):
    planned = documents["solution"]["planned"]
    assert documents["solution"]["peak_bytes"] == planned["tried"][str(planned["value"])]
    nothing = documents["no solution"]
    assert nothing["planned"]["value"] == 0
    assert nothing["peak_bytes"] == nothing["planned"]["tried"]["1"] > nothing["memory_bytes"]


OPTIONAL = {"techniques"}
NULLABLE = {"reserved_bytes", "budget_bytes", "max_gradient_error", "growth_bytes"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_field_that_is_missing_or_renamed_fails(documents, name):
    document = cut(documents[name])
    assert VALIDATOR.is_valid(document)
    for field in document.keys() - OPTIONAL:
        rest = {key: value for key, value in document.items() if key != field}
        assert not VALIDATOR.is_valid(rest), field
        assert not VALIDATOR.is_valid({**rest, f"{field}_": document[field]}), field
    assert not VALIDATOR.is_valid({**document, "more": 1})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_field_of_the_wrong_type_fails(documents, name):
    document = cut(documents[name])
    for field in document:
        for wrong in ([1], -2.5, {"a": "b"}, *([] if field in NULLABLE else [None])):
            assert not VALIDATOR.is_valid({**document, field: wrong}), (field, wrong)


@pytest.mark.parametrize(
    ("name", "path", "wrong"),
    [
        ("profile", ("categories", "parameter"), "1 KiB"),
        ("profile", ("categories", "parameters"), 1),
        ("profile", ("phases", 0, "name"), "sideways"),
        ("profile", ("traces", 0, "series", "parameter", 0), 1.5),
        ("profile", ("traces", 0, "peak", "op"), None),
        ("profile", ("traces", 0, "lines", 0, "nbytes"), -1),
        ("profile", ("traces", 0, "modules", 0, "name"), "net"),
        ("estimate", ("verdict",), "perhaps"),
        ("plan", ("effects", 0), "harmless"),
        ("plan", ("live", 0, "category"), "stuff"),
        ("plan and techniques", ("techniques", 0, "fits"), "yes"),
        ("frontier", ("plans", 0, "slowdown"), "1.2x"),
        ("frontier", ("plans",), []),
        ("comparison", ("planned", "step_s"), None),
        ("comparison", ("plan", "num_ops"), 1.5),
        ("solution", ("planned", "tried", "many"), 1),
        ("difference", ("differences", "parameter"), "same"),
        ("choices", ("choices", 0, "state_bytes"), "none"),
        ("checks", ("checks", 0, "is_ok"), "ok"),
        ("checks", ("schema_version",), 2),
        ("checks", ("kind",), "cheque"),
    ],
)
def test_a_wrong_value_inside_fails(documents, name, path, wrong):
    document = copy.deepcopy(documents[name])
    *parents, last = path
    place = document
    for part in parents:
        place = place[part]
    place[last] = wrong
    assert not VALIDATOR.is_valid(document)


def fields_of(schema):
    """Every name of a property, however deep."""
    if isinstance(schema, list):
        return {name for one in schema for name in fields_of(one)}
    if not isinstance(schema, dict):
        return set()
    deeper = {name for one in schema.values() for name in fields_of(one)}
    own = schema.get("properties", {})
    return deeper | set(own) if isinstance(own, dict) else deeper


def test_the_page_for_people_has_every_kind_and_field():
    page = (DOCS / "json.md").read_text()
    missing = [name for name in {*KINDS, *fields_of(SCHEMA)} if f"`{name}`" not in page]
    assert not missing
    assert all(f"`{name}`" in page for name in CATEGORIES)
