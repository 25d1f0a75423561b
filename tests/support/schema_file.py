"""docs/report.schema.json, made of the declaration.

To write it: ``python tests/support/schema_file.py``. The schema is stricter than reading: no field
more than this version writes, and none less.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from memplan.report import schema

PATH = Path(__file__).parents[2] / "docs" / "report.schema.json"


def text():
    """What the file should hold."""
    found = msgspec.json.schema(schema.Document)
    for name, part in found["$defs"].items():
        if "properties" in part:
            _describe(part, getattr(schema, name))
            part["additionalProperties"] = False
            if "schema_version" in part["properties"]:
                part["required"].append("schema_version")
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What a command of memplan prints with --json",
    }
    return json.dumps({**head, **found}, indent=1) + "\n"


def _describe(part, kind):
    """Give each property the words that the docstrings have for it."""
    part["description"] = kind.__doc__.partition("\n")[0]
    for one in reversed(kind.__mro__):
        attributes = (one.__doc__ or "").partition("Attributes:\n")[2]
        for entry in filter(str.strip, attributes.replace("\n            ", " ").splitlines()):
            name, _, words = entry.strip().partition(": ")
            if name in part["properties"]:
                part["properties"][name]["description"] = words


if __name__ == "__main__":
    PATH.write_text(text())
