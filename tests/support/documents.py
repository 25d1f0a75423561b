"""A small step as a trace and as documents, for pages and figures."""

from __future__ import annotations

import json

from memplan.ir.memory_trace import SAVED, TEMPORARY, Allocation, MemoryTrace, Resident, Span
from memplan.report.documents import profile_document, trace_document

KIB = 1024


def block(kib, category, *, phase, made, freed, op="aten::mm", module="net.0"):
    return Allocation(kib * KIB, category, phase, op, module, "model.py:7", "", made, freed)


def trace(kind="measured", times_s=(0.0, 1.0, 2.0, 4.0, 5.0), module="net.0"):
    """10 KiB stay; 30 are saved, and 20 more are there for a moment in the backward."""
    blocks = (
        block(30, SAVED, phase="forward", made=1, freed=4, module=module),
        block(20, TEMPORARY, phase="backward", made=2, freed=3, op="aten::sum", module="net.1"),
    )
    spans = (Span("forward", 0, 2), Span("backward", 2, 5))
    residents = (Resident("net.0.weight", 10 * KIB, "parameter"),)
    return MemoryTrace(kind, "cpu", residents, blocks, times_s, spans)


def measured():
    return profile_document(trace(), {"forward": 0.25, "backward": 0.5})


def comparison():
    step = {
        "peak_bytes": 60 * KIB,
        "resident_bytes": 10 * KIB,
        "step_s": 0.5,
        "phases": [{"name": "forward", "peak_bytes": 40 * KIB}],
        "device": "cpu",
    }
    predicted = trace("predicted", (0.0, 0.1, 0.2, 0.4, 1.2))
    return {
        "schema_version": 1,
        "kind": "comparison",
        "peak_bytes": 60 * KIB,
        "resident_bytes": 10 * KIB,
        "categories": {},
        "unexplained_bytes": 0,
        "original": {**step, "peak_bytes": 120 * KIB},
        "planned": step,
        "plan": {
            "peak_bytes": 59 * KIB,
            "budget_bytes": 61 * KIB,
            "slowdown": 1.25,
            "num_ops": 9,
            "num_restores": 2,
            "effects": ["exact"],
            "passes": ["pack_masks"],
            "notes": ["one <b>note</b>"],
        },
        "time_ratio": 1.5,
        "is_exact": True,
        "max_gradient_error": 0.0,
        "traces": [
            trace_document("original, measured", trace()),
            trace_document("planned, measured", trace()),
            trace_document("planned, predicted", predicted),
        ],
    }


def curve():
    plans = [
        {"peak_bytes": peak * KIB, "slowdown": time, "num_ops": 9, "num_restores": 3}
        for peak, time in ((20, 1.5), (30, 1.25), (60, 1.0))
    ]
    return {"schema_version": 1, "kind": "frontier", "peak_bytes": 60 * KIB, "plans": plans}


def estimate():
    found = {"schema_version": 1, "kind": "estimate", "peak_bytes": 3 * KIB}
    return {**found, "resident_bytes": KIB, "categories": {"parameter": KIB, SAVED: 2 * KIB}}


def estimate_with_trace():
    return estimate() | {"traces": [trace_document("measured", trace())]}


DOCUMENTS = {"measured": measured, "comparison": comparison, "curve": curve, "estimate": estimate}


def write(folder, document):
    path = folder / "step.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


TARGET = """
import torch
from torch import nn
import memplan

def make():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(256, 64), torch.randn(256, 64))
"""


def write_target(folder):
    (folder / "target.py").write_text(TARGET)
    return f"{folder / 'target.py'}:make"
