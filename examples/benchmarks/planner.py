"""The quality of plans, against proven bounds and optima, and against a user's alternatives.

    python examples/benchmarks/planner.py bounds               # every model of the law table
    python examples/benchmarks/planner.py curves gpt2 vit      # 40 budgets each
    python examples/benchmarks/planner.py optimality           # small programs, random and real
    python examples/benchmarks/planner.py peers mlp gpt2       # measured, beside torch's own ways

``bounds`` prints, for each model and budget, the predicted overhead of the plan over the same step
with nothing recomputed, the proven lower bound on that overhead, and the seconds of planning.
``curves`` shows whether the predicted slowdown ever grows with the budget, how low budgets can be,
and how slow plans are there.
``optimality`` compares plans of programs of up to about a hundred ops with the proven optimum among
those that restore each op at most once (both need the extra ``exact``). ``peers`` measures peak and
time of plans and of torch's own ways (``peers.py``), all interleaved in one process; and asks, for
every point that one of those reaches with right gradients, whether a plan dominates it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from memplan.gc_pause import paused_collector
from memplan.ir.liveness import ScheduledStep, floor_bytes
from memplan.ir.program import Costs, Program
from memplan.ir.schedule import Recovery
from memplan.planner import bound_seconds, keep_all, solve
from memplan.planner.account import account_of, keep_everything
from memplan.planner.exact import solve_exactly
from memplan.planner.problem import make_problem

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import peer_tables
import peers
import scaled
from blocks import BLOCKS
from curves import curves
from steps import lowered, models

from support.programs import recompute_all, training_step

SHARES = (0.5, 0.4, 0.3)
ABOVE_FLOOR = (0.8, 0.6, 0.4, 0.2)
"""Budgets of the proofs: shares of the way from the floor to the unplanned peak."""


def bounds(names: Iterable[str], limit_s: float) -> list[dict[str, Any]]:
    """One row for each model and budget: overhead, bound, and planning time."""
    made = models()
    rows = []
    for name in names or made:
        torch.manual_seed(0)
        step = lowered(*made[name]()[:2])
        program, costs, recoveries = step.captured.program, step.costs, step.recoveries
        base = ScheduledStep(program, (), costs, keep_all(program, costs)).seconds
        resident = program.resident_bytes
        floor = floor_bytes(program, recoveries, costs) - resident
        for share in SHARES:
            budget = resident + int(share * (step.unplanned.peak_bytes - resident))
            start = time.perf_counter()
            with paused_collector():
                found = solve(
                    program, costs, recoveries,
                    budget_bytes=budget, original_seconds=step.unplanned.seconds,
                )  # fmt: skip
            planning_s = time.perf_counter() - start
            bound = bound_seconds(
                program, costs, recoveries, budget_bytes=budget, time_limit_s=limit_s
            )
            rows.append(
                {
                    "model": name,
                    "ops": len(program.ops),
                    "share": share,
                    "is_feasible": found.is_feasible,
                    "budget_over_floor": (budget - resident) / floor,
                    "overhead": found.seconds / base - 1,
                    "bound": None if math.isinf(bound) else bound / base - 1,
                    "slowdown": found.seconds / step.unplanned.seconds,
                    "planning_s": planning_s,
                    "smallest_over_floor": None
                    if found.is_feasible
                    else (found.peak_bytes - resident) / floor,
                }
            )
            print(_bound_line(rows[-1]), flush=True)
    return rows


def _bound_line(row: dict[str, Any]) -> str:
    bound = "none" if row["bound"] is None else f"{row['bound']:.1%}"
    if row["is_feasible"]:
        result = f"overhead {row['overhead']:.1%}, slowdown {row['slowdown']:.3f}x"
    elif row["bound"] is None or row["budget_over_floor"] < 1:
        result = "proven infeasible"
    else:
        result = (
            f"unsolved, at {row['budget_over_floor']:.2f}x floor "
            f"(smallest found {row['smallest_over_floor']:.2f}x)"
        )
    return (
        f"{row['model']:18} {row['ops']:5} ops  {row['share']:.0%}  bound {bound:>6}  {result}, "
        f"{row['planning_s']:.2f} s"
    )


def bounds_table(rows: list[dict[str, Any]]) -> str:
    """Overhead and bound of each model and budget, as Markdown."""
    lines = [
        f"| model | ops | {' | '.join(f'{share:.0%}' for share in SHARES)} | planning |",
        f"|---|--:|{'--:|' * len(SHARES)}--:|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        cells = [_bound_cell(row) for row in own]
        slowest = max(row["planning_s"] for row in own)
        lines.append(f"| {model} | {own[0]['ops']} | {' | '.join(cells)} | {slowest:.1f} s |")
    return "\n".join(lines)


def _bound_cell(row: dict[str, Any]) -> str:
    if row["is_feasible"]:
        return f"{row['overhead']:.1%} / {row['bound']:.1%}"
    if row["bound"] is None or row["budget_over_floor"] < 1:
        return "infeasible"
    return f"unsolved at {row['budget_over_floor']:.2f}x floor"


def summary(rows: list[dict[str, Any]]) -> str:
    """Geometric means over the solved cells."""
    lines = []
    for share in SHARES:
        solved = [row for row in rows if row["share"] == share and row["is_feasible"]]
        if not solved:
            continue
        ratios = [
            row["overhead"] / row["bound"]
            if row["bound"] >= 0.005
            else (1 + row["overhead"]) / (1 + row["bound"])
            for row in solved
        ]
        slowdowns = [row["slowdown"] for row in solved]
        lines.append(
            f"{share:.0%}: {len(solved)} solved, overhead / bound {_mean(ratios):.3f}, predicted "
            f"slowdown {_mean(slowdowns):.3f}x"
        )
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return math.exp(sum(math.log(max(value, 1e-9)) for value in values) / len(values))


def optimality(limit_s: float) -> list[dict[str, Any]]:
    """One row for each program and budget: the plan beside the proven optimum."""
    rows = []
    for name, (program, costs, recoveries) in _small_programs():
        problem = make_problem(program, recoveries, costs)
        base = account_of(problem, keep_everything(problem))
        floor = floor_bytes(program, recoveries, costs) - program.resident_bytes
        for share in ABOVE_FLOOR:
            target = int(floor + share * (base.peak - floor))
            found = solve(
                program, costs, recoveries,
                budget_bytes=target + program.resident_bytes, max_slowdown=9.0,
            )  # fmt: skip
            exact = solve_exactly(problem, target, limit_s)
            has_optimum = exact.is_proven and exact.schedule is not None
            rows.append(
                {
                    "program": name,
                    "ops": len(program.ops),
                    "above_floor": share,
                    "is_feasible": found.is_feasible,
                    "is_proven": exact.is_proven,
                    "ratio": found.seconds / exact.seconds
                    if found.is_feasible and has_optimum
                    else None,
                    "at_most": found.seconds / exact.bound_seconds
                    if found.is_feasible and not exact.is_proven
                    else None,
                }
            )
            print(_optimality_line(rows[-1]), flush=True)
    return rows


def _small_programs() -> Iterator[tuple[str, tuple[Program, Costs, tuple[Recovery, ...]]]]:
    for seed in range(6):
        program, costs = training_step(seed, num_forward=20 + 4 * seed)
        yield f"random {seed}", (program, costs, recompute_all(program))
    for name, make in BLOCKS.items():
        step = lowered(*make()[:2])
        yield name, (step.captured.program, step.costs, step.recoveries)


def _optimality_line(row: dict[str, Any]) -> str:
    if row["ratio"] is not None:
        result = f"{row['ratio']:.4f}x the optimum"
    elif row["at_most"] is not None:
        result = f"timed out, at most {row['at_most']:.4f}x the optimum"
    elif row["is_feasible"]:
        result = "found; infeasible if each op is restored at most once"
    else:
        result = "infeasible" if row["is_proven"] else "unsolved"
    return f"{row['program']:12} {row['ops']:4} ops, {row['above_floor']:.0%} above floor: {result}"


def optimality_table(rows: list[dict[str, Any]]) -> str:
    """Each program and budget, as Markdown."""
    lines = [
        f"| program | ops | {' | '.join(f'{share:.0%} above floor' for share in ABOVE_FLOOR)} |",
        f"|---|--:|{'--:|' * len(ABOVE_FLOOR)}",
    ]
    for name in dict.fromkeys(row["program"] for row in rows):
        own = [row for row in rows if row["program"] == name]
        cells = [_optimality_line(row).rpartition(": ")[2] for row in own]
        lines.append(f"| {name} | {own[0]['ops']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def optimality_summary(rows: list[dict[str, Any]]) -> str:
    """The number of proven optima, and the distance of plans from them."""
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    without = [row for row in rows if row["is_proven"] and row["ratio"] is None]
    found = sum(row["is_feasible"] for row in without)
    return (
        f"{len(rows)} cells: {len(ratios)} with a proven optimum, geometric mean "
        f"{_mean(ratios):.4f}, worst {max(ratios):.4f}; {len(without)} proven infeasible if each "
        f"op is restored at most once ({found} of them found otherwise); "
        f"{sum(not row['is_proven'] for row in rows)} timed out"
    )


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("bounds", "curves", "optimality", "peers"))
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit-s", type=float, default=30.0, help="of each bound and proof")
    parser.add_argument("--json", type=Path, help="write the numbers here; of models, theirs alone")
    parser.add_argument("--figure", type=Path, help="draw the peers' curves here")
    arguments = parser.parse_args()
    if arguments.what == "optimality" and arguments.models:
        parser.error("optimality has programs of its own, and takes no models")
    if arguments.what == "bounds":
        rows = bounds(arguments.models, arguments.limit_s)
        print(summary(rows))
    elif arguments.what == "curves":
        rows = curves(arguments.models or models())
    elif arguments.what == "optimality":
        rows = optimality(arguments.limit_s)
        print(optimality_summary(rows))
    else:
        rows = []
        for name in arguments.models or scaled.MODELS:
            rows += peers.measure(name, arguments.rounds)
            if arguments.json is not None:  # results are kept even if a later model fails
                _write(arguments.json, rows)
        print(peer_tables.table(rows))
        for own in peer_tables.by_model(rows):
            print(peer_tables.verdict(own))
        print(peer_tables.summary(rows))
        if arguments.figure is not None:
            peer_tables.figure(rows, arguments.figure)
    if arguments.json is not None:
        _write(arguments.json, rows, whole=not arguments.models and arguments.what != "peers")


def _write(path: Path, rows: list[dict[str, Any]], *, whole: bool = False) -> None:
    """Write rows over those of the same models; ``whole``: over all existing ones."""
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    if not whole and path.exists():
        measured = {row["model"] for row in rows}
        known = json.loads(path.read_text())["rows"]
        order = list(dict.fromkeys(row["model"] for row in (*known, *rows)))
        rows = rows + [row for row in known if row["model"] not in measured]
        rows.sort(key=lambda row: order.index(row["model"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
