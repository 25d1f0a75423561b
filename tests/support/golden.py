"""Tables of data made by hand, as text. ``python tests/support/golden.py --write`` writes them."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

from msgspec import structs
from rich.console import Console

from memplan.advise.techniques import Technique
from memplan.costs import DEVICES
from memplan.ir.memory_trace import (
    SAVED,
    TEMPORARY,
    UNEXPLAINED,
    WORKSPACE,
    Allocation,
    MemoryTrace,
    Resident,
    Span,
)
from memplan.ir.schedule import Effect, Schedule
from memplan.planner.plan import LiveValue, PassRecord, Plan
from memplan.profiler import Comparison, Estimate, Profile
from memplan.report import (
    checks_document,
    comparison_document,
    difference_table,
    estimate_document,
    frontier_document,
    profile_document,
    solution_document,
    tables_of,
    technique_rows,
    techniques_table,
    terminal,
)
from memplan.report.documents import PLANNED
from memplan.tables import markdown

FOLDER = Path(__file__).parents[1] / "report" / "golden"
WIDTHS = (80, 140)

MIB, GIB, TIB = 2**20, 2**30, 2**40
DEEP = "model.encoder.layers.11.self_attention.query_key_value_projection"
SOURCE = "/data/projects/language/models/transformers/modeling_with_a_long_name.py:1207"
SECONDS = {"forward": 12.5, "backward": 34.25, "optimizer": 0.125}


def trace(activations=3 * TIB):
    """Terabytes of activations in the backward, in long modules and of long lines."""

    def block(nbytes, category, module, lives, *, op="aten::mm", source=SOURCE):
        phase = "forward" if lives[0] < 4 else "backward"
        return Allocation(nbytes, category, phase, op, module, source, "", *lives)

    flash = "aten::_scaled_dot_product_flash_attention_backward"
    blocks = (
        block(activations, SAVED, DEEP, (1, 8)),
        block(5 * GIB, SAVED, "model.decoder.layers.0.mlp", (2, 8)),
        block(6 * GIB, SAVED, "model.decoder.layers.1.mlp", (3, 8)),
        block(7 * GIB + 1, TEMPORARY, DEEP, (4, 7), op=flash),
        block(40 * GIB, WORKSPACE, DEEP, (5, 6), op=flash),
        block(12345, UNEXPLAINED, "", (5, 7), op="", source=""),
    )
    residents = (
        Resident(f"{DEEP}.weight", 140 * GIB, "parameter"),
        Resident("input", 12, "input"),
        Resident(f"{DEEP}.weight.exp_avg", 280 * GIB, "optimizer state"),
    )
    spans = (Span("forward", 0, 4), Span("backward", 4, 8), Span("optimizer", 8, 9))
    return MemoryTrace("measured", "cuda:0", residents, blocks, tuple(map(float, range(9))), spans)


def estimate():
    found = trace()
    return Estimate(
        trace=found,
        least_bytes=found.peak_bytes - 3 * GIB,
        most_bytes=found.peak_bytes + 4 * GIB,
        reserved_bytes=found.peak_bytes + 6 * GIB,
        costs="measured",
        refusals=("a_library_of_the_user::a_kernel_with_a_long_name (it needs data)",),
        device=DEVICES["h100"],
    )


def plan(peak_bytes=2 * TIB, slowdown=1.375):
    value = LiveValue(900 * GIB, SAVED, "aten.native_layer_norm.default", DEEP, SOURCE)
    peaks = {"forward": TIB, "backward": peak_bytes, "optimizer": 420 * GIB}
    return Plan(
        peak_bytes=peak_bytes,
        resident_bytes=420 * GIB,
        original_peak_bytes=4 * TIB,
        floor_bytes=TIB,
        saved_bytes=TIB,
        seconds=40.0 * slowdown,
        original_seconds=40.0,
        slowdown_bound=None,
        num_ops=123456,
        num_restores=65432,
        categories={"parameter": 140 * GIB, "optimizer state": 280 * GIB, SAVED: peak_bytes // 2},
        phases=peaks,
        peak_op=f"aten._scaled_dot_product_flash_attention_backward.default in {DEEP}",
        live=(value, replace(value, nbytes=12, module="", target="")),
        budget_bytes=2 * TIB + 1,
        costs_source="measured",
        passes=tuple(PassRecord("named", {}, effect) for effect in Effect),
        captured_effect=Effect.APPROXIMATE,
        notes=(),
        parts=(),
        fingerprint="",
        schedule=Schedule((), ()),
    )


def techniques():
    long = "offload_activations:device=cpu,largest_first=True,at_least_bytes=1048576,overlap=True"
    exact = replace(plan(), captured_effect=Effect.EXACT, passes=())
    return [
        Technique("checkpoint_activations", replace(exact, seconds=40.0), fits=True),
        Technique("all exact ones", exact, fits=True),
        Technique("pack_masks", replace(exact, peak_bytes=4 * TIB), fits=False),
        Technique(long, plan(3 * TIB), fits=False),
    ]


def profile(peak_bytes, step_s):
    peaks = {"forward": TIB, "backward": peak_bytes, "optimizer": 420 * GIB}
    return Profile(peak_bytes, 420 * GIB, peaks, step_s, (), "cuda:0", None, None, 0)


def comparison(is_exact=True, error=3.25e-7, loss=1234567.890123):
    found = Comparison(
        original=profile(4 * TIB, 40.0),
        planned=profile(2 * TIB - 512, 55.5),
        time_ratio=1.3875,
        loss_equal=True,
        gradients_equal=is_exact,
        buffers_equal=True,
        parameters_equal=is_exact,
        rng_equal=True,
        max_gradient_error=0.0 if is_exact else error,
        losses=(loss, loss),
    )
    return comparison_document(found, plan(), {PLANNED: trace()})


def solution():
    tried = {1: 3 * GIB, 131072: 2 * TIB - 5, 131073: 2 * TIB + 11 * GIB}
    nothing = {1: 9 * TIB}
    rows = {"untouched": (0, nothing), "planned": (131072, tried)}
    field = "max_position_embeddings_of_the_text_encoder"
    return solution_document(field, 2 * TIB, 1.5, rows, plan())


def difference():
    before, after = (profile_document(trace(n), SECONDS) for n in (3 * TIB, 5 * TIB))
    return difference_table(before, structs.replace(after, step_s=60.0))


def checks():
    long = "/data/a/folder/with/a/long/name/" * 3
    return checks_document(
        {"versions": (True, "memplan 1.2.3"), "cost cache": (False, f"PermissionError: {long}")}
    )


def tables():
    """Of every kind."""
    frontier = [plan(n * TIB, slowdown) for n, slowdown in ((2, 1.375), (3, 1.01), (4, 1.0))]
    return {
        "profile": tables_of(profile_document(trace(), SECONDS)),
        "estimate": tables_of(estimate_document(estimate(), DEVICES["h100"].memory_bytes)),
        "plan": plan().tables(),
        "techniques": [techniques_table(technique_rows(techniques()))],
        "frontier": tables_of(frontier_document(frontier)),
        "comparison": tables_of(comparison()),
        "different": tables_of(comparison(is_exact=False)),
        "solution": tables_of(solution()),
        "difference": [difference()],
        "checks": tables_of(checks()),
    }


def rendered(shown, width):
    """As on a screen that has no colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    for table in shown:
        console.print(terminal(table))
    lines = console.file.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def texts():
    """The files of the folder."""
    found = {}
    for name, shown in tables().items():
        for width in WIDTHS:
            found[f"{name}.{width}.txt"] = rendered(shown, width)
        found[f"{name}.md.txt"] = f"{markdown(shown)}\n"
    return found


def write():
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.txt"):
        path.unlink()
    for name, text in texts().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
