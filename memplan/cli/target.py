"""TARGET: where a command finds the model, the batch and, perhaps, the optimizer."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
from torch import nn


class TargetError(click.ClickException):
    """The factory failed, or returned something else than a model and a batch."""

    exit_code = 1


def load_target(target: str) -> tuple[nn.Module, object, object]:
    """Call a factory that returns ``(model, batch)`` or ``(model, batch, optimizer)``.

    The optimizer is one over the model's parameters, a callable that makes one, or None.

    Args:
        target: ``path/to/file.py:factory`` or ``package.module:factory``.

    Raises:
        click.UsageError: if there is no such file, module or factory.
        TargetError: if the factory raises or returns something else.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise click.UsageError(
            f"TARGET {target!r} must be 'path/to/file.py:factory' or 'package.module:factory'"
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise click.UsageError(f"{place} has no function {name!r}")
    return _call(factory, target)


def _call(factory: Callable[[], object], target: str) -> tuple[nn.Module, object, object]:
    try:
        made = factory()
    except Exception as error:
        raise TargetError(f"{target} raised {type(error).__name__}: {error}") from error
    match made:
        case (nn.Module() as model, batch):
            return model, batch, None
        case (nn.Module() as model, batch, optimizer):
            return model, batch, optimizer
    raise TargetError(
        f"{target} must return (model, batch) or (model, batch, optimizer), got "
        f"{type(made).__name__}"
    )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise click.UsageError(f"there is no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(f"_memplan_target_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TargetError(f"{path} raised {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise click.UsageError(f"there is no module {name!r}") from error
        raise TargetError(f"{name} raised {type(error).__name__}: {error}") from error
    except Exception as error:
        raise TargetError(f"{name} raised {type(error).__name__}: {error}") from error
