"""TARGET: where a command finds the model, the batch and, perhaps, the optimizer."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import click
from torch import nn

from memplan.cli.dtypes import default_dtype, under_autocast
from memplan.cli.hub import HUB, model_of_config
from memplan.torch_internals import making_no_data


class TargetError(click.ClickException):
    """The factory failed, or returned something else than a model and a batch."""

    exit_code = 1


Made = tuple[nn.Module, object, object]
"""Model, batch and optimizer."""

Command = TypeVar("Command", bound=Callable[..., None])


def with_target(command: Command) -> Command:
    """Give a command its TARGET, and ``--set`` for the factory's arguments."""
    option = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="An argument of the factory, as often as there are some.",
    )
    return click.argument("target")(option(command))


def with_sizes(command: Command) -> Command:
    """Give a command ``--batch-size`` and ``--seq-len``, short for ``--set``."""

    def add(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
        if value is not None:
            setting = f"{parameter.name}={value}"
            context.params["settings"] = (*context.params.get("settings", ()), setting)

    for name in ("--seq-len", "--batch-size"):
        command = click.option(
            name,
            type=click.IntRange(min=1),
            expose_value=False,
            callback=add,
            help=f"Short for --set {name.removeprefix('--').replace('-', '_')}=...",
        )(command)
    return command


def with_bounds(command: Command) -> Command:
    """Give a command ``--budget`` and ``--max-slowdown``."""
    budget = click.option(
        "--budget", metavar="BYTES", help='Bound on the peak: "6GiB", 6000000000, "50%".'
    )
    max_slowdown = click.option(
        "--max-slowdown", type=float, metavar="X", help="Bound on predicted time: 1.2 is 20% more."
    )
    return budget(max_slowdown(command))


def command_line(
    command: str, target: str, settings: Iterable[str], *more: str, bounds: Iterable[str] = ()
) -> str:
    """What to type for a command on the same target."""
    given = [part for setting in settings for part in ("--set", setting)]
    return shlex.join(["memplan", command, *more, target, *given, *bounds])


def load_target(
    target: str,
    settings: Iterable[str] = (),
    *,
    without_data: bool = False,
    dtype: str = "as is",
) -> tuple[nn.Module, object, object]:
    """Call a factory that returns ``(model, batch)`` or ``(model, batch, optimizer)``.

    The optimizer is one over the model's parameters, a callable that makes one, or None.

    Args:
        target: ``path/to/file.py:factory`` or ``package.module:factory``.
        settings: keyword arguments of the factory, each ``name=value``; a value that is no Python
            literal is text.
        without_data: call it so that tensors have a shape and no data, if it can be.
        dtype: as in ``with_dtype``.

    Raises:
        click.UsageError: if there is no such file, module, factory or argument.
        TargetError: if the factory raises or returns something else.
    """
    arguments = dict(map(_setting, settings))
    with default_dtype(dtype):
        made = _without_data(target, arguments) if without_data else None
        model, batch, optimizer = _made(target, arguments) if made is None else made
    return under_autocast(model, dtype), batch, optimizer


def _without_data(target: str, arguments: Mapping[str, object]) -> Made | None:
    """What the factory makes on tensors that have no data; None if it needs some."""
    try:
        with making_no_data():
            return _made(target, arguments)
    except TargetError as error:
        note = f"note: {error.message}, on tensors without data; it is called with data"
        click.echo(note, err=True)
        return None


def _made(target: str, arguments: Mapping[str, object]) -> Made:
    if target.startswith(HUB):
        return model_of_config(Path(target.removeprefix(HUB)), arguments)
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise click.UsageError(
            f"TARGET {target!r} must be 'path/to/file.py:factory' or 'package.module:factory'"
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise click.UsageError(f"{place} has no function {name!r}")
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters) or "no arguments"
        raise click.UsageError(
            f"{target}: {error}; it takes {known}, given as --set NAME=VALUE"
        ) from error
    return _call(factory, target, arguments)


def _setting(setting: str) -> tuple[str, object]:
    name, equals, text = setting.partition("=")
    if not equals or not name.isidentifier():
        raise click.UsageError(f"--set {setting!r} must be NAME=VALUE")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text


def _call(
    factory: Callable[..., object], target: str, arguments: Mapping[str, object]
) -> tuple[nn.Module, object, object]:
    try:
        made = factory(**arguments)
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
