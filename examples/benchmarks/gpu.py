"""The cost of a budget on a GPU: GPT-2 and a Llama under autocast, planned and not.

    python examples/benchmarks/gpu.py                     # needs transformers and a CUDA device
    python examples/benchmarks/gpu.py gpt2 --json gpu.json
    python examples/benchmarks/gpu.py --json gpu.json --readme README.md    # without a device

Beside memplan stand the untouched module and ``torch.utils.checkpoint`` around every layer. Times
are medians of ratios to the untouched module over interleaved rounds. A peak is the bytes that
tensors and kernels request of torch's allocator above residents; ``allocated`` is the same in the
allocator's blocks, and ``reserved`` the bytes that it holds of the GPU, the parameters of the model
and of its checkpointed copy included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import memplan
from memplan.profiler.step import clear_gradients, preserved, run_step

# Deterministic kernels, so that bits can be compared; and segments that can grow, so that the
# allocator reserves little more than is requested.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

sys.path.insert(0, str(Path(__file__).parent))
from budgets import hugging_face_peer
from pages import put

BUDGETS = ("100%", "70%", "50%", "30%", "20%", "10%")
GIB = 2**30


class Autocast(nn.Module):
    """A model whose forward runs under autocast to bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, length] to the loss of next-token prediction."""
        with torch.autocast("cuda", torch.bfloat16):
            loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss


def gpt2() -> tuple[nn.Module, torch.Tensor]:
    """GPT-2 of 124 million parameters, dropout on, 16 texts of 1,024 tokens."""
    config = transformers.GPT2Config(use_cache=False, loss_type="ForCausalLM")
    return transformers.GPT2LMHeadModel(config), torch.randint(0, 50257, (16, 1024))


def llama() -> tuple[nn.Module, torch.Tensor]:
    """A Llama of 16 layers and width 1,024, 8 texts of 2,048 tokens."""
    config = transformers.LlamaConfig(
        num_hidden_layers=16, hidden_size=1024, num_attention_heads=16, num_key_value_heads=4,
        intermediate_size=2816, vocab_size=32000, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), torch.randint(0, 32000, (8, 2048))


MODELS: dict[str, Callable[[], tuple[Any, torch.Tensor]]] = {"gpt2": gpt2, "llama": llama}


def allocated_bytes(module: nn.Module, tokens: torch.Tensor) -> int:
    """The peak of a step in the allocator's blocks, above the bytes held before."""
    with preserved(module):
        run_step(module, memplan.Sample.of(tokens))
        clear_gradients(module)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_step(module, memplan.Sample.of(tokens))
        return torch.cuda.max_memory_allocated() - before


def measure(name: str, budgets: Iterable[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each way to run the step."""
    torch.manual_seed(0)
    model, tokens = MODELS[name]()
    tokens = tokens.cuda()
    peer = Autocast(hugging_face_peer(model)).cuda().train()
    module = Autocast(model).cuda().train()
    rows = []

    def add(run: str, other: nn.Module, **more: Any) -> None:
        found = memplan.compare(module, other, tokens, steps=rounds)
        profile = found.planned
        rows.append(
            {
                "model": name,
                "run": run,
                "peak_bytes": profile.peak_bytes - profile.resident_bytes,
                "allocated_bytes": allocated_bytes(other, tokens),
                "reserved_bytes": profile.reserved_bytes,
                "step_s": profile.step_s,
                "time_ratio": found.time_ratio,
                "same_bits": found.is_exact,
                "max_gradient_error": found.max_gradient_error,
                **more,
            }
        )
        print(_line(rows[-1]), flush=True)

    add("untouched", module)
    add("checkpoint per layer", peer)
    for budget in budgets:
        start = time.perf_counter()
        try:
            planned = memplan.optimize(module, tokens, budget=budget)
        except memplan.InfeasibleBudget as error:
            print(f"{name} {budget}: {error}", file=sys.stderr)
            break
        plan = planned.plan
        add(
            f"memplan {budget}",
            planned,
            predicted_bytes=plan.peak_bytes - plan.resident_bytes,
            predicted_slowdown=plan.slowdown,
            planning_s=time.perf_counter() - start,
        )
    return rows


def _line(row: dict[str, Any]) -> str:
    predicted = ""
    if "predicted_bytes" in row:
        off = row["peak_bytes"] - row["predicted_bytes"]
        predicted = (
            f"  predicted {off:+d} B, {row['predicted_slowdown']:.3f}x, "
            f"planned in {row['planning_s']:.1f} s"
        )
    sizes = " / ".join(
        f"{row[key] / GIB:.3f}" for key in ("peak_bytes", "allocated_bytes", "reserved_bytes")
    )
    return (
        f"{row['model']:6} {row['run']:22} {sizes} GiB  {row['step_s'] * 1e3:6.1f} ms "
        f"{row['time_ratio']:.3f}x  {_bits(row)}{predicted}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | step | peak | predicted - measured | reserved | time | predicted | results |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        peak, reserved = (f"{row[key] / GIB:.2f} GiB" for key in ("peak_bytes", "reserved_bytes"))
        off = predicted = ""
        if "predicted_bytes" in row:
            off = f"{row['predicted_bytes'] - row['peak_bytes']} B"
            predicted = f"{row['predicted_slowdown']:.2f}x"
        lines.append(
            f"| {row['model']} | {row['run']} | {peak} | {off} | {reserved} "
            f"| {row['time_ratio']:.2f}x | {predicted} | {_bits(row)} |"
        )
    return "\n".join(lines)


def _bits(row: dict[str, Any]) -> str:
    error = f"gradients off by {row['max_gradient_error']:.0e}"
    return "same bits" if row["same_bits"] else error


def main() -> None:
    """Measure, print, and optionally write JSON."""
    parser = argparse.ArgumentParser(description="What a budget costs on a GPU.")
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], default=[])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--readme", type=Path, help="measure nothing: put --json's table in there")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    arguments = parser.parse_args()
    if arguments.readme is not None:
        found = json.loads(arguments.json.read_text())
        put(arguments.readme, "examples/benchmarks/results/gpu.json", table(found["rows"]))
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device; for the CPU there is budgets.py")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{machine}\npeak / allocated / reserved")
    rows = [
        row
        for name in arguments.names or MODELS
        for row in measure(name, arguments.budgets, arguments.rounds)
    ]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
