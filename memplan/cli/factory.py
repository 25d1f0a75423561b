"""Model, batch and possibly optimizer of a command, from the user's factory."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import click
from torch import nn

from memplan.capture import users_place
from memplan.cli.failures import described
from memplan.cli.hub import HUB, model_of_config
from memplan.cli.progress import aside
from memplan.torch_internals import making_no_data

Made = tuple[nn.Module, object, object]
"""Model, batch and optimizer: one over its parameters, a callable that makes one, or None."""


class TargetError(click.ClickException):
    """The factory failed, or returned something other than a model and a batch."""

    exit_code = 1


def make(target: str, settings: Iterable[str] = (), *, without_data: bool = False) -> Made:
    """Call a factory that returns ``(model, batch)`` or ``(model, batch, optimizer)``.

    Args:
        target: ``path/to/file.py:factory``, ``package.module:factory`` or ``hf:config.json``.
        settings: keyword arguments of the factory, each ``name=value``; a value that is not a
            Python literal is text.
        without_data: call it on tensors that have a shape and no data, if possible.

    Raises:
        click.UsageError: if there is no such file, module, factory or argument.
        TargetError: if the factory raises or returns something else.
    """
    arguments = dict(map(_setting, settings))
    with aside():
        made = _without_data(target, arguments) if without_data else None
        return _made(target, arguments) if made is None else made


def _without_data(target: str, arguments: Mapping[str, object]) -> Made | None:
    """The factory's result on tensors without data; None if it needs data."""
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


def _call(factory: Callable[..., object], target: str, arguments: Mapping[str, object]) -> Made:
    with failing(target):
        made = factory(**arguments)
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
    with failing(str(path)):
        spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    with failing(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise click.UsageError(f"there is no module {name!r}") from error
            raise


@contextlib.contextmanager
def failing(where: str) -> Iterator[None]:
    """Turn errors of the user's code inside into the target's failure, ``sys.exit()`` too.

    Raises:
        TargetError: in place of the error.
    """
    try:
        yield
    except click.ClickException:
        raise
    except SystemExit as error:
        raise TargetError(f"{where} ended the program with sys.exit({error.code!r})") from error
    except Exception as error:
        raise TargetError(f"{where} raised {described(error)}{users_place(error)}") from error
