"""The savings of skipping: peaks and times beside the whole model in eager, and epochs of batches.

    python examples/benchmarks/skipping.py [--quick] [--page docs/skipping.md]

Peaks are above the bytes alive before the step. *Kept* recomputes nothing (a budget of 100 %);
*free* is memplan's plan without a budget; *half* is a budget of 50 %. Times are medians of ratios
over interleaved rounds, of *kept*.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import memplan
from memplan.passes import drop_minibatches, skip_layers

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from local_learning import printed, time_ratio
from pages import put

from models.blocks import ResNet
from models.vit import VisionTransformer

MIB = 2**20
HEADER = """| model | skipped | kept MiB | of eager's | free MiB | of eager's | half MiB \
| of eager's | largest off | time |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""
BATCHES = """| p | batches | kept | epochs, s | of all batches' |
|--:|--:|--:|--:|--:|"""
WAYS: dict[str, dict[str, Any]] = {
    "subset 0.4": {"mode": "subset", "rate": 0.4},
    "blocks 0.5": {"mode": "blocks", "rate": 0.5},
    "gated 0.5": {"mode": "gated", "capacity": 0.5},
}

SMALLEST = memplan.Options(on_infeasible="smallest")

Images = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of models and batches."""

    depth: int = 12
    width: int = 192
    image: int = 64
    resnet: int = 32
    batch_size: int = 32
    samples: int = 2400
    epochs: int = 4


def models(shape: Shape) -> Iterator[tuple[str, nn.Module, Images]]:
    """Models, each with a batch."""
    torch.manual_seed(0)
    labels = torch.randint(10, (shape.batch_size,))
    vit = VisionTransformer(shape.depth, shape.width, image=shape.image, channels=3)
    images = torch.randn(shape.batch_size, 3, shape.image, shape.image)
    yield f"ViT, {shape.depth} blocks", vit, (images, labels)
    images = torch.randn(shape.batch_size, 1, 32, 32)
    yield f"ResNet-{shape.resnet}", ResNet(shape.resnet), (images, labels)


def layer_rows(shape: Shape, rounds: int) -> Iterator[str]:
    """Rows for the whole model in eager, and for each way to skip."""
    for name, network, batch in models(shape):
        model = memplan.WithLoss(network, nn.functional.cross_entropy).train()
        eager = memplan.profile(model, batch, steps=1)
        above = eager.peak_bytes - eager.resident_bytes
        yield f"| {name} | nothing, in eager | {above / MIB:.1f} | 1.00x | | | | | | 1.00x |"
        for way, arguments in WAYS.items():
            one = {**arguments, "batch_norm": True} if way.startswith("subset") else arguments
            passes = [skip_layers(**one)]
            model.zero_grad()  # existing gradients would be added to
            planned = [
                memplan.optimize(model, batch, passes=passes, budget=budget, options=SMALLEST)
                for budget in ("100%", None, "50%")
            ]
            found = [highest(each, batch) for each in planned]
            peaks = [each.peak_bytes - each.resident_bytes for each in found]
            off = [predicted(p) - each.peak_bytes for p, each in zip(planned, found, strict=True)]
            sizes = " | ".join(f"{peak / MIB:.1f} | {peak / above:.2f}x" for peak in peaks)
            ratio = time_ratio(model, planned[0], batch, rounds)
            yield f"| {name} | {way} | {sizes} | {max(off, key=abs)} B | {ratio:.2f}x |"


def highest(planned: memplan.PlannedModule, batch: Images) -> memplan.Profile:
    """The highest measured peak of a step; blocks that differ have several programs."""
    found = [memplan.profile(planned, batch, steps=1)]
    for _ in range(3 if len(planned.plans) > 1 else 0):
        planned(*batch).backward()
        planned.zero_grad()
        found.append(memplan.profile(planned, batch, steps=1))
    return max(found, key=lambda one: one.peak_bytes)


def predicted(planned: memplan.PlannedModule) -> int:
    """The highest peak of all its programs."""
    return max(plan.peak_bytes for plan in planned.plans)


class Slow(Dataset[tuple[torch.Tensor, int]]):
    """Samples that each take a millisecond to look up."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.001)
        return torch.full((64,), place / self.count), place % 4


def batch_rows(shape: Shape) -> Iterator[str]:
    """Rows for epochs of all batches, and of those not dropped."""
    loader = DataLoader(Slow(shape.samples), batch_size=8)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
    model = memplan.WithLoss(network, nn.functional.cross_entropy)
    whole_s = 0.0
    for p in (0.0, 0.25, 0.5, 0.75):
        sample = next(iter(loader))
        planned = memplan.optimize(model, sample, passes=[drop_minibatches(p)])
        batches: Any = planned.batches(loader)
        start = time.perf_counter()
        for _ in range(shape.epochs):
            train(planned, batches)
        took_s = time.perf_counter() - start
        whole_s = whole_s or took_s
        total = batches.num_kept + batches.num_dropped
        share = batches.num_kept / total
        yield f"| {p:g} | {total} | {share:.1%} | {took_s:.1f} | {took_s / whole_s:.2f}x |"


def train(step: nn.Module, batches: Iterable[Any]) -> None:
    """Train for one epoch."""
    optimizer = torch.optim.SGD(step.parameters(), lr=0.01)
    for inputs, labels in batches:
        step(inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models, one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--page", type=Path, help="put the tables there, at their marks")
    chosen = parser.parse_args()
    shape = Shape(4, 32, 16, 20, 8, 80, 1) if chosen.quick else Shape()
    rounds = 1 if chosen.quick else chosen.rounds
    tables = {
        "layers": [HEADER, *printed(HEADER, layer_rows(shape, rounds))],
        "batches": [BATCHES, *printed(BATCHES, batch_rows(shape))],
    }
    if chosen.page is not None:
        for mark, lines in tables.items():
            put(chosen.page, mark, "\n".join(lines))


if __name__ == "__main__":
    main()
