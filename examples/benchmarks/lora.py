"""LoRA by memplan beside LoRA by peft: the same GPT, adapters, batch and random numbers.

    pip install transformers peft safetensors
    python examples/benchmarks/lora.py [--quick]

Peaks are above the shared residents. Times are medians of ratios over interleaved rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers
from torch import nn

import memplan
from memplan.passes import add_lora, save_lora

sys.path.insert(0, str(Path(__file__).parent))
from pages import put

MIB = 2**20
TARGETS = ("c_attn", "c_proj", "c_fc")
HEADER = """| dropout | run | above resident | of peft's | time of peft's | predicted | gradients |
|--:|---|--:|--:|--:|--:|---|"""

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the GPT and its batch."""

    num_layers: int = 12
    width: int = 256
    num_heads: int = 8
    num_words: int = 2048
    num_tokens: int = 256
    batch_size: int = 8


def gpt(shape: Shape) -> nn.Module:
    """A GPT-2 from transformers, the same each time."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=shape.num_layers,
        n_embd=shape.width,
        n_head=shape.num_heads,
        vocab_size=shape.num_words,
        n_positions=shape.num_tokens,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).train()


def batch_of(shape: Shape) -> dict[str, torch.Tensor]:
    """Random words to learn."""
    size = (shape.batch_size, shape.num_tokens)
    words = torch.randint(shape.num_words, size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "labels": words}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two layers, one round")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--page", type=Path, help="put the table there, at its mark")
    chosen = parser.parse_args()
    shape = Shape(num_layers=2, width=64, num_tokens=64) if chosen.quick else Shape()
    lines = [HEADER]
    print(HEADER)
    for dropout in (0.0, 0.1):
        for row in rows(shape, chosen.rank, dropout, 1 if chosen.quick else chosen.rounds):
            lines.append(f"| {dropout} | {' | '.join(row)} |")
            print(lines[-1], flush=True)
    if chosen.page is not None:
        put(chosen.page, "lora", "\n".join(lines))


def rows(shape: Shape, rank: int, dropout: float, rounds: int) -> Iterator[tuple[str, ...]]:
    """Rows for peft's step, memplan's for free, and memplan's at half of peft's memory."""
    batch = batch_of(shape)
    config = peft.LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=list(TARGETS),
        fan_in_fan_out=True,
    )  # fmt: skip
    theirs = peft.get_peft_model(gpt(shape), config).train()
    before = memplan.profile(theirs, batch, steps=1)
    above = before.peak_bytes - before.resident_bytes
    yield "peft", f"{above / MIB:.1f} MiB", "1.00x", "1.00x", "", ""
    half = f"{before.resident_bytes + above // 2} B"
    for name, bounds in (
        ("memplan, max_slowdown=1.02", {"max_slowdown": 1.02}),
        ("memplan, half of peft's", {"budget": half}),
    ):
        one = add_lora(rank, 16, dropout=dropout, targets=TARGETS)
        mine = memplan.optimize(gpt(shape), batch, passes=[one], **bounds)  # type: ignore[arg-type]
        same_adapters(mine, theirs)
        after = memplan.profile(mine, batch, steps=1)
        kept = after.peak_bytes - after.resident_bytes
        yield (
            name,
            f"{kept / MIB:.1f} MiB",
            f"{kept / above:.2f}x",
            f"{time_ratio(theirs, mine, batch, rounds):.2f}x",
            f"{mine.plan.slowdown:.2f}x",
            difference(theirs, mine, batch),
        )


def same_adapters(mine: memplan.PlannedModule, theirs: Any) -> None:
    """Copy the planned module's adapters to peft's model, through a file, with a non-zero B."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            if name.startswith("lora.") and name.endswith(".B"):
                parameter.normal_(std=0.05, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        save_lora(mine, Path(folder))
        peft.set_peft_model_state_dict(theirs, peft.load_peft_weights(folder))


def time_ratio(one: nn.Module, other: nn.Module, batch: Batch, rounds: int) -> float:
    """The time of the other's step over the one's."""
    ratios = []
    for _ in range(rounds):
        ratios.append(step_s(other, batch) / step_s(one, batch))
    return median(ratios)


def step_s(model: nn.Module, batch: Batch) -> float:
    """Seconds of a forward and backward."""
    model.zero_grad()
    start = time.perf_counter()
    model(**batch).loss.backward()
    return time.perf_counter() - start


def difference(theirs: nn.Module, mine: nn.Module, batch: Batch) -> str:
    """The largest difference of an adapter's gradient, over that gradient's largest entry."""
    found = [gradients(model, batch) for model in (theirs, mine)]
    assert found[0].keys() == found[1].keys(), "other parameters are trained"
    worst = max(
        float((gradient - found[1][name]).abs().max() / gradient.abs().max())
        for name, gradient in found[0].items()
    )
    return "same bits" if worst == 0 else f"off by {worst:.0e}"


def gradients(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of the adapters, by memplan's names."""
    model.zero_grad()
    torch.manual_seed(1)
    model(**batch).loss.backward()
    named = {
        name.replace("base_model.model.", "lora.")
        .replace("lora_A.default.weight", "A")
        .replace("lora_B.default.weight", "B"): parameter.grad
        for name, parameter in model.named_parameters()
    }
    return {name: gradient for name, gradient in named.items() if gradient is not None}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
