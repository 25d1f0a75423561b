"""``memplan doctor``: the state of memplan on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import warnings
from collections.abc import Callable

import click
import psutil
import torch
from torch import nn

import memplan
from memplan.cli.failures import write_whole
from memplan.cli.output import Format, show, with_format
from memplan.costs import CostCache, cache_folder
from memplan.report import checks_document, tables_of
from memplan.torch_internals import warn_of_untested_torch
from memplan.units import format_bytes

_EXTRAS = {"report": "matplotlib", "exact": "highspy", "low-bit": "torchao"}


@click.command()
@with_format
def doctor(shape: Format) -> None:
    """Say what memplan finds on this machine, and try what it relies on.

    \b
    Exit codes: 0 all works; 1 something does not.
    """
    found = {name: _outcome(check) for name, check in _CHECKS.items()}
    following = "To try it on a model: memplan profile file.py:factory"
    document = checks_document(found)
    show(shape, tables_of(document), document, following)
    if not all(is_ok for is_ok, _ in found.values()):
        raise SystemExit(1)


def _outcome(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def _versions() -> str:
    return f"memplan {importlib.metadata.version('memplan')}, Python {platform.python_version()}"


def _torch() -> str:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_untested_torch()
    notes = "".join(f"; {warning.message}" for warning in seen)
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads{notes}"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{format_bytes(memory.total)}, of which {format_bytes(memory.available)} are free"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees; --device plans for one that is not there"
    names = []
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        names.append(f"{one.name} with {format_bytes(one.total_memory)}")
    return ", ".join(names)


def _cache() -> str:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "probe"
    write_whole(probe, "")
    probe.unlink()
    entries = len(CostCache.load(torch.device("cpu")).entries)
    return f"{folder}, {entries} costs for this machine"


def _extras() -> str:
    there = [name for name, module in _EXTRAS.items() if importlib.util.find_spec(module)]
    missing = [name for name in _EXTRAS if name not in there]
    return f"{', '.join(there) or 'none'} (not installed: {', '.join(missing) or 'none'})"


def _step() -> str:
    model = memplan.WithLoss(
        nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh()))),
        nn.functional.mse_loss,
    )
    batch = (torch.randn(256, 64), torch.randn(256, 64))
    planned = memplan.optimize(model, batch, budget="80%")
    comparison = memplan.compare(model, planned, batch, steps=1)
    off = comparison.planned.peak_bytes - planned.plan.peak_bytes
    if not comparison.is_exact or off > 0:
        raise memplan.MemplanError(f"a planned step differs, or needs {off} B more than predicted")
    return f"a planned step has the same bits, and measured - predicted is {off:+d} B"


_CHECKS: dict[str, Callable[[], str]] = {
    "versions": _versions,
    "torch": _torch,
    "memory": _memory,
    "GPUs": _gpus,
    "cost cache": _cache,
    "extras": _extras,
    "a step": _step,
}
