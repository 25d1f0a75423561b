"""The cost of planning, of checking each call, and of comparing the first one.

    python examples/benchmarks/overheads.py                   # needs transformers

Planning: seconds of ``memplan.optimize`` without any measured costs (cold), and with all of them
(warm). The check: every call of a planned module compares shapes, modes and flags with those that
were planned for, and values that the model branches on; its share of the step's time. The
comparison: the first call of a plan runs the untouched forward as well, which is followed without
data first if there is a budget (with budget); its time, in untouched forwards.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn

import memplan
from memplan.profiler.step import clear_gradients, run_step

sys.path.insert(0, str(Path(__file__).parent))
from budgets import gpt, gpt2, mlp, vit

ROUNDS = 7
COMPARISONS = 3


def gpt2_small() -> tuple[nn.Module, Any, nn.Module]:
    """GPT-2 as published: twelve layers, width 768."""
    config = transformers.GPT2Config(use_cache=False)
    tokens = torch.randint(0, config.vocab_size, (2, 128))
    model = transformers.GPT2LMHeadModel(config).train()
    return model, {"input_ids": tokens, "labels": tokens.clone()}, model


MODELS: dict[str, Callable[[], tuple[nn.Module, Any, nn.Module]]] = {
    "gpt": gpt,
    "mlp": mlp,
    "gpt2": gpt2,
    "gpt2_small": gpt2_small,
    "vit": vit,
}


def main() -> None:
    """Print one line for each model."""
    transformers.utils.logging.set_verbosity_error()
    titles = "model | ops | cold | warm | step | check | share | comparison | with budget"
    print(f"| {titles} |\n|---{'|--:' * 8}|")
    for name in sys.argv[1:] or MODELS:
        model, batch, _ = MODELS[name]()
        sample = memplan.Sample.of(batch)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MEMPLAN_CACHE_DIR"] = folder
            cold_s, _ = seconds(optimize, model, sample)
            warm_s, planned = seconds(optimize, model, sample)
            compared = [
                median(comparison(model, sample, budget) for _ in range(COMPARISONS))
                for budget in (None, "50%")
            ]
        check_s, step_s = [], []
        for _ in range(ROUNDS):
            clear_gradients(model)
            check_s.append(seconds(planned.prepare, sample)[0])
            step_s.append(seconds(run_step, planned, sample)[0])
        check, step = median(check_s), median(step_s)
        cells = [name, planned.plan.num_ops, f"{cold_s:.1f} s", f"{warm_s:.1f} s"]
        cells += [f"{step * 1e3:.0f} ms", f"{check * 1e3:.2f} ms", f"{check / step:.2%}"]
        cells += [f"{forwards:.1f} forwards" for forwards in compared]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def optimize(
    model: nn.Module, sample: memplan.Sample, budget: str | None = "50%"
) -> memplan.PlannedModule:
    """Plan for half of the memory, or for the smallest feasible budget."""
    options = memplan.Options(on_infeasible="smallest")
    return memplan.optimize(model, sample, budget=budget, options=options)


def comparison(model: nn.Module, sample: memplan.Sample, budget: str | None) -> float:
    """The extra time of a plan's first call over later ones, in untouched forwards."""
    planned = optimize(model, sample, budget)
    first_s, *later_s = [seconds(forward, planned, sample)[0] for _ in range(1 + ROUNDS)]
    untouched_s = median(seconds(forward, model, sample)[0] for _ in range(ROUNDS))
    return (first_s - median(later_s)) / untouched_s


def forward(module: nn.Module, sample: memplan.Sample) -> None:
    """Call a module, and drop its output."""
    module(*sample.args, **sample.kwargs)


def seconds(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """The time of a call, and its result."""
    start = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
