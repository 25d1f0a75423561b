"""The savings of block-wise local learning: peaks and times beside end-to-end training in eager.

    python examples/benchmarks/local_learning.py [--quick] [--page docs/local_learning.md]

Peaks are above the bytes alive before the step, which include the heads' parameters. *Kept*
recomputes nothing (a budget of 100 %); *free* is memplan's plan without a budget. Times are
medians of ratios over interleaved rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn

import memplan
from memplan.passes import learn_locally

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from pages import put

from models.blocks import ResNet, Stack

MIB = 2**20
HEADER = """| network | parts | resident MiB | kept MiB | of eager's | free MiB | of eager's | off \
| time |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""
FUSED_HEADER = """| budget | split MiB | fused MiB | fused, measured | slowdown, split | fused |
|---|--:|--:|--:|--:|--:|"""

Images = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of networks and batches."""

    num_blocks: int = 16
    depth: int = 110
    batch_size: int = 32
    size: int = 32
    num_layers: int = 12


def images(shape: Shape, channels: int) -> Images:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch_size, channels, shape.size, shape.size)
    labels = torch.randint(10, (shape.batch_size,), generator=generator)
    return torch.randn(size, generator=generator), labels


def rows(
    name: str, network: nn.Module, batch: Images, parts: tuple[int, ...], rounds: int
) -> Iterator[str]:
    """Rows for end-to-end training in eager, and for each number of parts."""
    model = memplan.WithLoss(network, nn.functional.cross_entropy)
    eager = memplan.profile(model, batch, steps=1)
    above = eager.peak_bytes - eager.resident_bytes
    sizes = f"{eager.resident_bytes / MIB:.1f} | {above / MIB:.1f} | 1.00x | | |"
    yield f"| {name} | eager | {sizes} | 1.00x |"
    for count in parts:
        passes = [learn_locally(count)]
        kept = memplan.optimize(model, batch, passes=passes, budget="100%")
        free = memplan.optimize(model, batch, passes=passes)
        found = [memplan.profile(one, batch, steps=1) for one in (kept, free)]
        peaks = [one.peak_bytes - one.resident_bytes for one in found]
        off = kept.plan.peak_bytes - found[0].peak_bytes
        yield (
            f"| {name} | {count} | {found[0].resident_bytes / MIB:.1f} "
            f"| {peaks[0] / MIB:.1f} | {peaks[0] / above:.2f}x "
            f"| {peaks[1] / MIB:.1f} | {peaks[1] / above:.2f}x "
            f"| {off} B | {time_ratio(model, kept, batch, rounds):.2f}x |"
        )


def time_ratio(one: nn.Module, other: nn.Module, batch: Any, rounds: int) -> float:
    """The time of the other's step over the one's."""
    step_s(one, batch), step_s(other, batch)
    return median(step_s(other, batch) / step_s(one, batch) for _ in range(rounds))


def step_s(model: nn.Module, batch: Any) -> float:
    """Seconds of a forward and backward."""
    model.zero_grad()
    start = time.perf_counter()
    model(*batch).backward()
    return time.perf_counter() - start


def fused_rows(shape: Shape) -> Iterator[str]:
    """Rows for a GPT-2 with one ordinary loss: split and fused steps within the same budgets."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=shape.num_layers,
        n_embd=128,
        n_head=4,
        vocab_size=1024,
        n_positions=128,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    model = transformers.GPT2LMHeadModel(config).train()
    words = torch.randint(1024, (8, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": words, "labels": words}
    for budget in ("100%", None, "50%", "30%", "1 B"):
        plans = [
            memplan.optimize(
                model,
                batch,
                budget=budget,
                options=memplan.Options(fused=fused, on_infeasible="smallest"),
            )
            for fused in (False, True)
        ]
        split, fused = (one.plan for one in plans)
        measured = memplan.profile(plans[1], batch, steps=1)
        name = {None: "none", "1 B": "the smallest"}.get(budget, budget)
        yield (
            f"| {name} | {split.peak_bytes / MIB:.2f} | {fused.peak_bytes / MIB:.2f} "
            f"| {measured.peak_bytes / MIB:.2f} | {split.slowdown:.3f}x | {fused.slowdown:.3f}x |"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page", type=Path, help="put the tables there, at their marks")
    chosen = parser.parse_args()
    shape = Shape(8, 20, 4, 16, 2) if chosen.quick else Shape()
    rounds = 1 if chosen.quick else chosen.rounds
    stack, resnet = Stack(shape.num_blocks), ResNet(shape.depth)
    tables = {
        "parts": [
            HEADER,
            *printed(
                HEADER,
                rows(
                    f"{shape.num_blocks} equal blocks", stack, images(shape, 3), (2, 4, 8), rounds
                ),
            ),
            *printed("", rows(f"ResNet-{shape.depth}", resnet, images(shape, 1), (2, 4), rounds)),
        ],
        "fused": [FUSED_HEADER, *printed(FUSED_HEADER, fused_rows(shape))],
    }
    if chosen.page is not None:
        for mark, lines in tables.items():
            put(chosen.page, mark, "\n".join(lines))


def printed(header: str, lines: Iterator[str]) -> list[str]:
    """The lines, each printed as it is computed."""
    if header:
        print(header)
    found = []
    for line in lines:
        print(line, flush=True)
        found.append(line)
    return found


if __name__ == "__main__":
    main()
