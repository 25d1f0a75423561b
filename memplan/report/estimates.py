"""An estimate as tables and as a document."""

from __future__ import annotations

from typing import Literal

import torch

from memplan.profiler import Estimate
from memplan.report.documents import totals, trace_document
from memplan.report.profiles import categories_table, lines_table, modules_table
from memplan.report.schema import EstimateDocument, Phase
from memplan.tables import Table
from memplan.units import format_bytes

_PEAK = {"measured": "peak", "analytic": "peak, kernels' workspace apart"}

Verdict = Literal["fits", "may not fit", "does not fit"]


def verdict(estimate: Estimate, memory_bytes: int) -> Verdict:
    """Whether a step fits into so much memory."""
    if estimate.most_bytes <= memory_bytes:
        return "fits"
    return "does not fit" if estimate.least_bytes > memory_bytes else "may not fit"


def estimate_tables(estimate: Estimate, memory_bytes: int) -> list[Table]:
    """Whether it fits, and what is there at the peak, by category, by module and by line."""
    interval = f"{format_bytes(estimate.least_bytes)} to {format_bytes(estimate.most_bytes)}"
    headroom = memory_bytes - estimate.most_bytes
    rows = [
        (_PEAK[estimate.costs], format_bytes(estimate.peak_bytes)),
        ("  between", interval),
        (f"memory of {estimate.device.name}", format_bytes(memory_bytes)),
        ("headroom", format_bytes(headroom)),
    ]
    if estimate.reserved_bytes is not None:
        reserved = f"{format_bytes(estimate.reserved_bytes)} (modelled, not verified)"
        rows.insert(2, ("  reserved", reserved))
    workspace = "measured kernel by kernel" if estimate.costs == "measured" else "bounded"
    notes = f"Nothing was run but shapes; kernels' workspace is {workspace}."
    if estimate.costs == "measured":
        notes = "Kernels were run one by one, the model was not."
    if estimate.device.is_cuda:
        notes += " CUDA's own context, some hundred MiB, comes on top."
    if estimate.refusals:
        notes += f" Not measured: {'; '.join(estimate.refusals)}."
    answer = Table(
        f"The step {verdict(estimate, memory_bytes)}",
        ("estimated", ""),
        tuple(rows),
        frozenset({1}),
        frozenset({0, 1}),
        footer=notes,
    )
    trace = estimate.trace
    return [answer, categories_table(trace, {}), modules_table(trace), lines_table(trace)]


def estimate_document(estimate: Estimate, memory_bytes: int) -> EstimateDocument:
    """The same as data."""
    return EstimateDocument(
        **totals(estimate.trace),
        least_bytes=estimate.least_bytes,
        most_bytes=estimate.most_bytes,
        reserved_bytes=estimate.reserved_bytes,
        memory_bytes=memory_bytes,
        headroom_bytes=memory_bytes - estimate.most_bytes,
        verdict=verdict(estimate, memory_bytes),
        costs=estimate.costs,
        refusals=tuple(estimate.refusals),
        device=estimate.device.name,
        torch=str(torch.__version__),
        phases=tuple(
            Phase(name=name, peak_bytes=nbytes)
            for name, nbytes in estimate.trace.phase_peaks().items()
        ),
        traces=(trace_document("estimated", estimate.trace),),
    )
