"""Documents read back: checked where something depends on it, typed from there on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from memplan.errors import MemplanError
from memplan.ir.memory_trace import CATEGORIES
from memplan.report.documents import SCHEMA_VERSION, Document
from memplan.report.places import Group

KINDS = ("profile", "estimate", "plan", "frontier", "comparison")

T = TypeVar("T")


class UnreadableDocument(MemplanError, ValueError):
    """Not a document of memplan, or one of another version."""


@dataclass(frozen=True)
class TraceView:
    """A trace as a document holds it, with the events that were chosen for it.

    Attributes:
        label: what it is of, such as "planned, measured".
        source: "measured" or "predicted".
        peak_bytes: the most bytes at any time, residents included.
        categories: bytes by category at the peak.
        peak: the "phase", "op", "module" and "source" of the peak, as far as known.
        modules: bytes by category of each module at the peak.
        lines: the blocks at the peak by op and line, the largest first.
        times_s: seconds from the start, of each event.
        phases: the phase of each event.
        series: bytes by category after each event, in the order of ``CATEGORIES``.
    """

    label: str
    source: str
    peak_bytes: int
    categories: Mapping[str, int]
    peak: Mapping[str, str]
    modules: Mapping[str, Mapping[str, int]]
    lines: tuple[Group, ...]
    times_s: tuple[float, ...]
    phases: tuple[str, ...]
    series: Mapping[str, Sequence[int]]

    @property
    def totals(self) -> list[int]:
        """Bytes after each event."""
        return [sum(column) for column in zip(*self.series.values(), strict=True)]


def read_document(text: str) -> Document:
    """Read and check the JSON that a command wrote.

    Raises:
        UnreadableDocument: if it is anything else.
    """
    try:
        # JSON has no NaN; a page that embeds one could not be read by a browser
        found = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise UnreadableDocument(f"not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UnreadableDocument("a JSON object was expected")
    version, kind = found.get("schema_version"), found.get("kind")
    if kind not in KINDS:
        raise UnreadableDocument(
            f"kind is {kind!r}, expected one of {', '.join(KINDS)}: what --json prints"
        )
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UnreadableDocument(
            f"schema_version is {version!r}, expected {SCHEMA_VERSION}; write the document again "
            "with this version of memplan"
        )
    return found


def plain(document: Mapping[str, object]) -> Document:
    """The document as it is after a way through JSON, checked.

    Raises:
        UnreadableDocument: as ``read_document`` does.
    """
    return read_document(json.dumps(document))


def optional(document: Mapping[str, object], key: str, kind: type[T]) -> T | None:
    """A value, or None where there is none.

    Raises:
        UnreadableDocument: if it is of another type.
    """
    value = document.get(key)
    if value is None:
        return None
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)  # type: ignore[call-arg]
    raise UnreadableDocument(f"{key} is {str(value)[:40]!r}, expected {kind.__name__}")


def required(document: Mapping[str, object], key: str, kind: type[T]) -> T:
    """A value that must be there.

    Raises:
        UnreadableDocument: if it is not, or of another type.
    """
    value = optional(document, key, kind)
    if value is None:
        raise UnreadableDocument(f"{key} is missing")
    return value


def objects(document: Mapping[str, object], key: str) -> list[dict[str, object]]:
    """A list of objects; empty where there is none."""
    return _each(document, key, dict)


def texts(document: Mapping[str, object], key: str) -> list[str]:
    """A list of texts; empty where there is none."""
    return _each(document, key, str)


def sizes(document: Mapping[str, object], key: str) -> dict[str, int]:
    """Bytes by category, in the order of ``CATEGORIES``; empty where there are none."""
    return _by_category(optional(document, key, dict) or {}, int)


def plan_of(document: Mapping[str, object]) -> Mapping[str, object]:
    """The plan that a document is of, or has; empty if there is none."""
    return document if document["kind"] == "plan" else optional(document, "plan", dict) or {}


def trace_views(document: Mapping[str, object]) -> list[TraceView]:
    """The traces of a document; empty where there are none."""
    return [trace_view(trace) for trace in objects(document, "traces")]


def trace_view(trace: Mapping[str, object]) -> TraceView:
    """A trace.

    Raises:
        UnreadableDocument: if what it draws is missing or of different lengths.
    """
    times_s = tuple(_each(trace, "times_s", float))
    phases = tuple(texts(trace, "phases"))
    found = required(trace, "series", dict)
    series = {name: tuple(_each(found, name, int)) for name in _by_category(found, list)}
    if {len(times_s)} != {len(phases), *map(len, series.values())}:
        raise UnreadableDocument("times_s, phases and series of a trace differ in length")
    if any(after < before for before, after in pairwise(times_s)):
        raise UnreadableDocument("times_s of a trace go back")
    return TraceView(
        label=required(trace, "label", str),
        source=required(trace, "source", str),
        peak_bytes=required(trace, "peak_bytes", int),
        categories=sizes(trace, "categories"),
        peak=optional(trace, "peak", dict) or {},
        modules={
            required(one, "module", str): sizes(one, "categories")
            for one in objects(trace, "modules")
        },
        lines=tuple(_group(one) for one in objects(trace, "lines")),
        times_s=times_s,
        phases=phases,
        series=series,
    )


def _group(line: Mapping[str, object]) -> Group:
    return Group(
        nbytes=required(line, "nbytes", int),
        count=required(line, "count", int),
        category=required(line, "category", str),
        op=required(line, "op", str),
        module=required(line, "module", str),
        source=required(line, "source", str),
    )


def _each(document: Mapping[str, object], key: str, kind: type[T]) -> list[T]:
    return [required({key: one}, key, kind) for one in optional(document, key, list) or []]


def _by_category(found: Mapping[str, object], kind: type[T]) -> dict[str, T]:
    unknown = sorted(set(found) - set(CATEGORIES))
    if unknown:
        raise UnreadableDocument(f"{unknown[0]!r} is not a category of bytes")
    return {name: required(found, name, kind) for name in CATEGORIES if name in found}
