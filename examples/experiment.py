"""Shared parts of examples that compare trainings: loops, command lines, times, tables, figures."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import truediv
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from torch import nn

DOCS = Path(__file__).parent.parent / "docs"
GREY, ORANGE, BLUE, GREEN, PINK = COLORS = ("#999999", "#d55e00", "#0072b2", "#009e73", "#cc79a7")

_KINDS: dict[str, type] = {"int": int, "float": float, "str": str}

Row = dict[str, Any]
Key = TypeVar("Key")
Kind = TypeVar("Kind")


def parser_for(
    text: str, settings: type, *, quick: str = "", table: str = "--table", rounds: int = 10
) -> ArgumentParser:
    """A command line with an option for each of the settings.

    Args:
        text: the script's description.
        settings: a dataclass.
        quick: the parts of a training left with ``--quick``, if it exists.
        table: the options that ``--seeds`` applies to.
        rounds: default number of rounds to time.
    """
    made = ArgumentParser(description=text, formatter_class=RawTextHelpFormatter)
    for name in settings.__annotations__:
        kind = _KINDS[settings.__annotations__[name].removesuffix(" | None")]
        default = getattr(settings, name)
        made.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    if quick:
        made.add_argument("--quick", action="store_true", help=f"{quick}: does it run?")
    made.add_argument("--seeds", type=int, default=3, help=f"with {table}: how many")
    made.add_argument("--rounds", type=int, default=rounds, help="that are timed")
    made.add_argument("--json", type=Path, help="write the numbers here")
    return made


def settings_of(kind: type[Kind], arguments: Namespace) -> Kind:
    """The settings from the command line."""
    return kind(**{name: getattr(arguments, name) for name in kind.__annotations__})


def write_rows(path: Path | None, rows: Sequence[Row]) -> None:
    """Write results as JSON, if a path is given."""
    if path is not None:
        found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        path.write_text(json.dumps(found, indent=1) + "\n")


def epochs(
    step: nn.Module,
    data: Sequence[torch.Tensor],
    settings: Any,
    look: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[int, torch.Tensor, float]]:
    """The usual loop for any module: each epoch's number, mean losses and seconds.

    Args:
        step: takes a batch, returns the loss.
        data: inputs and targets.
        settings: ``batch_size``, ``epochs``, ``learning_rate`` and ``seed``.
        look: the values to show of a loss.
    """
    size, total = settings.batch_size, len(data[0])
    count = total // size
    optimizer = torch.optim.SGD(step.parameters(), momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * count
    )
    generator = torch.Generator().manual_seed(settings.seed)
    for number in range(1, settings.epochs + 1):
        start, losses = time.perf_counter(), []
        order = torch.randperm(total, generator=generator)
        for chosen in order[: count * size].split(size):
            loss = step(*(part[chosen] for part in data))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(look(loss))
        yield number, torch.stack(losses).mean(0), time.perf_counter() - start


def backward_of(
    step: nn.Module, batch: Sequence[torch.Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward and backward, and the untimed release of the gradients."""
    return lambda: step(*batch).backward(), step.zero_grad


def interleaved_s(
    runs: Mapping[Key, tuple[Callable[[], object], Callable[[], object]]], rounds: int
) -> dict[Key, list[float]]:
    """Seconds of each run in each round, after a warm-up round.

    Args:
        runs: for each key, the call to time and a call to make after it.
        rounds: the number of rounds.
    """
    times_s: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(rounds + 1):
        for key, (run, afterwards) in runs.items():
            start = time.perf_counter()
            run()
            times_s[key].append(time.perf_counter() - start)
            afterwards()
    return {key: seconds[1:] for key, seconds in times_s.items()}


def time_ratios(times_s: Mapping[Key, Sequence[float]], to: Key) -> dict[Key, float]:
    """The time of each run over another's: medians of the rounds' ratios."""
    return {key: median(map(truediv, own, times_s[to])) for key, own in times_s.items()}


def spread(values: Sequence[float], form: str = "{:.1%}") -> str:
    """The mean over several seeds, and the lowest and highest value."""
    mean, low, high = map(form.format, (fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def bars(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the distances of the lowest and the highest value from it."""
    mean = fmean(values)
    return mean, mean - min(values), max(values) - mean


def new_figure(title: str) -> tuple[Any, Any]:
    """A figure of one plot, and its axes."""
    from matplotlib.figure import Figure  # noqa: PLC0415  not a dependency of memplan

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    return figure, figure.add_subplot(title=title)


def save_figure(figure: Any, axes: Any, path: Path, **labels: Any) -> None:
    """Label the axes, and write the figure."""
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
