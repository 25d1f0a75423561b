"""The first 60 architectures of transformers, in alphabetical order, planned and compared.

An architecture counts if one recipe (``models/tiny.py``) makes a tiny model of it that trains in
eager within a minute. Each is planned at 60 %, or at its smallest feasible budget, and then
compared with the untouched model: loss, gradients, buffers, random state, and the allocator's
bytes. Each runs in a process of its own.

    python examples/benchmarks/architectures.py --json results.json --markdown table.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

import memplan
from memplan.profiler.step import preserved, run_step

sys.path.insert(0, str(Path(__file__).parent.parent))
from models.tiny import model_types, tiny_model

EAGER_S = 60
PLANNED_S = 300
CLOSE = 1e-5
"""Limit on what counts as rounding, as a share of the largest gradient."""


def main() -> None:
    """Run, print one line for each, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all, in order, if none is named")
    parser.add_argument("--count", type=int, default=60, help="stop after so many that train")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for name in arguments.names or model_types():
        result = run(name)
        results.append(result)
        print(f"{name:32} {result['status']:10} {result['detail'][:140]}", flush=True)
        if sum(result["trains"] for result in results) == arguments.count:
            break
    table = markdown(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(table)
    print(table.split("\n\n")[1])
    if any(result["status"] == "wrong" for result in results):
        sys.exit("a plan broke a promise")


def run(name: str) -> dict[str, Any]:
    """The outcome for one architecture."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=in_child, args=(name, sender))
    child.start()
    sender.close()
    result: dict[str, Any] = {"name": name, "trains": False, "status": "no model", "detail": ""}
    try:
        for limit_s in (EAGER_S, PLANNED_S):
            if not receiver.poll(limit_s):
                result |= {"detail": f"took longer than {limit_s} s"}
                result |= {"status": "failed" if result["trains"] else "no model"}
                break
            result |= receiver.recv()
            if not result["trains"]:
                break
    except EOFError:
        result |= {"status": "failed" if result["trains"] else "no model", "detail": "crashed"}
    child.kill()
    child.join()
    return result


def in_child(name: str, sender: Connection) -> None:
    """Send whether it trains, then the outcome of planning it."""
    try:
        torch.manual_seed(0)
        model, batch = tiny_model(name)
        sample = memplan.Sample.of(batch)
        step(model, sample)  # the first call of some models changes them
        eager = step(model, sample)
    except Exception as error:
        sender.send({"detail": one_line(error)})
        return
    sender.send({"trains": True, "status": "failed", "detail": ""})
    try:
        sender.send(planned(model, sample, eager))
    except memplan.CaptureError as error:
        sender.send({"status": "refused", "detail": one_line(error)})
    except Exception as error:
        sender.send({"status": "failed", "detail": one_line(error)})


def planned(
    model: torch.nn.Module, sample: memplan.Sample, eager: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Plan one model and compare it with eager."""
    start = time.perf_counter()
    options = memplan.Options(on_infeasible="smallest")
    module = memplan.optimize(model, sample, budget="60%", options=options)
    planning_s = time.perf_counter() - start
    mine = step(module, sample)
    plan = module.plan
    measured = memplan.profile(module, sample, steps=1)
    above = plan.original_peak_bytes - plan.resident_bytes
    same = mine.keys() == eager.keys() and all(torch.equal(mine[n], eager[n]) for n in mine)
    gradients = [name for name in eager if name.startswith("gradient") and eager[name].numel()]
    scale = max(float(eager[name].abs().max()) for name in gradients)
    error = max(
        float((mine[name] - eager[name]).abs().max()) / scale for name in ["loss", *gradients]
    )
    holds = measured.peak_bytes <= plan.peak_bytes and (same or error <= CLOSE)
    share = (plan.peak_bytes - plan.resident_bytes) / above
    bits = "same bits" if same else f"differs by {error:.0e}"
    return {
        "status": ("planned" if same else "rounding") if holds else "wrong",
        "detail": f"{share:.0%} of the memory, {plan.slowdown:.2f}x the time, {bits}",
        "ops": plan.num_ops,
        "share": share,
        "slowdown": plan.slowdown,
        "error": 0.0 if same else error,
        "predicted_minus_measured_bytes": plan.peak_bytes - measured.peak_bytes,
        "planning_s": planning_s,
        "notes": plan.notes,
    }


def step(module: torch.nn.Module, sample: memplan.Sample) -> dict[str, torch.Tensor]:
    """All results of one step, by name."""
    with preserved(module):
        torch.manual_seed(1)
        result = run_step(module, sample)
        left = {"loss": result.loss.detach().clone(), "random state": torch.get_rng_state()}
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                left[f"gradient of {name}"] = parameter.grad
        return left | {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}


def one_line(error: Exception) -> str:
    """An error without paths on this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.replace(str(Path(transformers.__file__).parent.parent) + "/", "")


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The results as a page."""
    trains = [result for result in results if result["trains"]]
    counts = {
        status: sum(result["status"] == status for result in trains)
        for status in ("planned", "rounding", "refused", "failed", "wrong")
    }
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [
        "# Architectures",
        f"Of {len(trains)} architectures of transformers {transformers.__version__} that train: "
        f"{said}. Torch {torch.__version__.split('+')[0]}; made by "
        "`examples/benchmarks/architectures.py`.",
        "*planned*: at 60 % of what the step needs above its resident bytes, or at the smallest "
        "budget that is feasible, with the same bits in loss, gradients, buffers and random state. "
        "*rounding*: gradients differ by float rounding, and the plan says why. *refused*: a "
        "`CaptureError`. The models are tiny (two layers of width 32), so that weights and a few "
        "large kernels rule their memory, and 60 % is often below what is feasible.",
    ]
    rows = ["| architecture | ops | memory | time | gradients |", "|---|--:|--:|--:|---|"]
    for result in trains:
        if "share" in result:
            bits = "same bits" if not result["error"] else f"differ by {result['error']:.0e}"
            cells = [result["ops"], f"{result['share']:.0%}", f"{result['slowdown']:.2f}x", bits]
        else:
            cells = ["", "", "", f"{result['status']}: {result['detail'][:300]}"]
        rows.append("| " + " | ".join(map(str, [result["name"], *cells])) + " |")
    skipped = [result["name"] for result in results if not result["trains"]]
    lines += [
        "\n".join(rows),
        f"{len(skipped)} names on the way were not counted, because the recipe makes no model of "
        "them that trains (parts of other models, inputs that it does not know, packages that are "
        f"missing): {', '.join(skipped)}.",
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
