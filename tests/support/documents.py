"""A small step as a trace and as documents, for pages and figures."""

from __future__ import annotations

from memplan.ir.memory_trace import SAVED, TEMPORARY, Allocation, MemoryTrace, Resident, Span
from memplan.ir.schedule import Effect
from memplan.report.documents import profile_document, trace_document
from memplan.report.schema import (
    ComparisonDocument,
    EstimateDocument,
    FrontierDocument,
    MeasuredStep,
    OpAtPeak,
    PhasePeak,
    PlanBody,
    encode,
)

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


def step(peak_bytes):
    return MeasuredStep(
        peak_bytes=peak_bytes,
        resident_bytes=10 * KIB,
        step_s=0.5,
        phases=(PhasePeak(name="forward", peak_bytes=40 * KIB),),
        device="cpu",
        reserved_bytes=None,
        process_bytes=None,
        host_bytes=10**9,
    )


def plan(peak_bytes=59 * KIB, slowdown=1.25):
    return PlanBody(
        peak_bytes=peak_bytes,
        resident_bytes=10 * KIB,
        categories={"parameter": 10 * KIB, SAVED: peak_bytes - 10 * KIB},
        original_peak_bytes=120 * KIB,
        floor_bytes=15 * KIB,
        budget_bytes=61 * KIB,
        slowdown=slowdown,
        num_ops=9,
        num_restores=2,
        phases=(),
        peak=OpAtPeak(op="mm"),
        live=(),
        costs_source="measured",
        effects=(Effect.EXACT,),
        passes=("pack_masks",),
        notes=("one <b>note</b>",),
    )


def comparison(**changes):
    fields = {
        "peak_bytes": 60 * KIB,
        "resident_bytes": 10 * KIB,
        "categories": {},
        "unexplained_bytes": 0,
        "original": step(120 * KIB),
        "planned": step(60 * KIB),
        "plan": plan(),
        "time_ratio": 1.5,
        "is_exact": True,
        "loss_equal": True,
        "gradients_equal": True,
        "buffers_equal": True,
        "parameters_equal": True,
        "rng_equal": True,
        "max_gradient_error": 0.0,
        "traces": (
            trace_document("original, measured", trace()),
            trace_document("planned, measured", trace()),
            trace_document("planned, predicted", trace("predicted", (0.0, 0.1, 0.2, 0.4, 1.2))),
        ),
    }
    return ComparisonDocument(**{**fields, **changes})


def curve():
    return FrontierDocument(
        peak_bytes=60 * KIB,
        resident_bytes=10 * KIB,
        categories={"parameter": 60 * KIB},
        unexplained_bytes=0,
        original_peak_bytes=60 * KIB,
        plans=tuple(plan(n * KIB, time) for n, time in ((20, 1.5), (30, 1.25), (60, 1.0))),
    )


def estimate(**changes):
    fields = {
        "peak_bytes": 3 * KIB,
        "resident_bytes": KIB,
        "categories": {"parameter": KIB, SAVED: 2 * KIB},
        "unexplained_bytes": 0,
        "least_bytes": 3 * KIB,
        "most_bytes": 4 * KIB,
        "reserved_bytes": None,
        "memory_bytes": 5 * KIB,
        "headroom_bytes": KIB,
        "verdict": "fits",
        "costs": "analytic",
        "refusals": (),
        "device": "cpu",
        "torch": "2.13.0",
        "phases": (),
        "traces": (),
    }
    return EstimateDocument(**{**fields, **changes})


def estimate_with_trace():
    return estimate(traces=(trace_document("measured", trace()),))


DOCUMENTS = {"measured": measured, "comparison": comparison, "curve": curve, "estimate": estimate}


def write(folder, document):
    path = folder / "step.json"
    path.write_text(document if isinstance(document, str) else encode(document))
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
