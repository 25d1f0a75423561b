"""Selection of a model's modules and parameters: by name, by type, or by purpose."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from memplan.errors import MemplanError
from memplan.torch_internals import around_calls

Patterns: TypeAlias = "str | type[nn.Module] | Iterable[str | type[nn.Module]]"
"""Names as in ``state_dict``, whole or their last parts ("q_proj"); globs ("encoder.*");
"name:fc" for exactly that name; types of modules (``nn.Embedding``, or "type:Embedding"); "norms",
"biases", or "head": the layer that makes the output, that is ``get_output_embeddings()``, or else
the linear layer that is called last."""

_TYPE, _NAME = "type:", "name:"
_WITH_LOSS = "model."
"""Prefix that ``WithLoss`` puts before its model's names."""

_HEAD, _NORMS, _BIASES, _LINEAR = "head", "norms", "biases", "linear"


def as_texts(patterns: Patterns) -> tuple[str, ...]:
    """Patterns as texts, types by their names.

    Raises:
        MemplanError: naming what is no pattern.
    """
    several = [patterns] if isinstance(patterns, str | type) else list(patterns)
    for one in several:
        if not isinstance(one, str | type) or not one:
            raise MemplanError(
                f"{one!r} is no pattern: expected a name, a glob, or a type of modules"
            )
    return tuple(one if isinstance(one, str) else f"{_TYPE}{one.__name__}" for one in several)


def select_modules(
    model: nn.Module, patterns: Iterable[str], forward: Callable[[], None]
) -> frozenset[str]:
    """FQNs of the modules that patterns name.

    Args:
        model: the model.
        patterns: texts.
        forward: runs a forward; called if "head" is among the patterns.

    Raises:
        MemplanError: naming a pattern that matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = _modules(model, pattern, forward)
        if not matched:
            raise _nothing(pattern, [name for name, _ in model.named_modules() if name])
        found |= matched
    return frozenset(found)


def select_parameters(
    model: nn.Module, patterns: Sequence[str], forward: Callable[[], None]
) -> frozenset[str]:
    """Names of the parameters that patterns name, or that are in modules that they name.

    Raises:
        MemplanError: naming a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: set[str] = set()
    for pattern in patterns:
        inside = tuple(f"{name}." for name in _modules(model, pattern, forward))
        matched = {name for name in names if name.startswith(inside) or _is_meant(name, pattern)}
        if not matched and not inside:
            modules = [name for name, _ in model.named_modules() if name]
            raise _nothing(pattern, [*names, *modules])
        found |= matched
    if patterns and not found:
        raise MemplanError(f"{', '.join(map(repr, patterns))}: modules without parameters")
    return frozenset(found)


def called_modules(model: nn.Module, forward: Callable[[], None]) -> tuple[str, ...]:
    """FQNs of submodules in the order in which a forward calls them, once for each call."""
    calls: list[str] = []
    with watched(model, calls.append):
        forward()
    return tuple(calls)


def parts_of(model: nn.Module, most: int = 12) -> tuple[str, ...]:
    """Patterns that together name all parameters of a model, each a part that people know.

    Those are its children; for a list of alike blocks, the children of all of them together.
    """
    return tuple(_parts(model, "")[:most])


def _parts(module: nn.Module, prefix: str) -> list[str]:
    children = {
        name: child
        for name, child in module.named_children()
        if next(child.parameters(), None) is not None
    }
    if _are_alike(children.values()):
        inside = _parts(next(iter(children.values())), f"{prefix}*.")
        return inside or [f"{prefix}{name}" for name in children]
    found = []
    for name, child in children.items():
        has_blocks = any(_are_alike(one.children()) for one in child.modules())
        if len(children) == 1 or has_blocks:
            found += _parts(child, f"{prefix}{name}.") or [f"{prefix}{name}"]
        else:
            found.append(f"{prefix}{name}")
    return found


def _are_alike(modules: Iterable[nn.Module]) -> bool:
    """Tell whether there are several modules, all with the same children."""
    shapes = [tuple(dict(module.named_children())) for module in modules]
    return len(shapes) > 1 and len(set(shapes)) == 1 and bool(shapes[0])


def targeted_layers(
    model: nn.Module,
    patterns: Iterable[str],
    forward: Callable[[], None],
    can_be: Callable[[nn.Module], bool],
) -> tuple[str, ...]:
    """FQNs of the layers to adapt, in the order of the model.

    "linear" stands for all linear layers but the head. A pattern that names a module of another
    kind stands for the layers inside it.

    Raises:
        MemplanError: for a pattern that matches no layer of such a kind, a layer that the forward
            does not call, and one whose weight is another parameter as well.
    """
    called = set(called_modules(model, forward))
    found: set[str] = set()
    for pattern in patterns:
        if pattern == _LINEAR:
            linear = {name for name in called if is_linear(model, name)}
            matched = linear - {head_of(model, forward)} if linear else linear
            if not matched:
                raise MemplanError("the model has no linear layer but its head: name other targets")
        else:
            matched = _layers(model, select_modules(model, [pattern], forward), can_be)
            if not matched:
                raise MemplanError(f"{pattern!r} names no layer of a kind that can be adapted")
            if idle := sorted(matched - called):
                raise MemplanError(
                    f"the forward never calls {idle[0]!r} as a module (it may use its weight "
                    "itself), so that it cannot be adapted; leave it out of targets"
                )
        found |= matched
    names = [name for name, _ in model.named_modules() if name in found]
    for name in names:
        if len(ties := _names_of_weight(model, name)) > 1:
            raise MemplanError(
                f"the weight of {name!r} is tied ({', '.join(ties)}); an adapter would change one "
                "of them alone. Leave it out of targets, or untie it"
            )
    return tuple(names)


def _layers(
    model: nn.Module, names: Iterable[str], can_be: Callable[[nn.Module], bool]
) -> set[str]:
    """Modules that can be adapted, and such inside the others."""
    found = set()
    for name in names:
        module = model.get_submodule(name)
        inside = ((f"{name}.{inner}", child) for inner, child in module.named_modules() if inner)
        own = [(name, module)] if can_be(module) else inside
        found |= {one for one, child in own if can_be(child)}
    return found


def _names_of_weight(model: nn.Module, layer: str) -> list[str]:
    weight = model.get_submodule(layer).weight
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter is weight]


def head_of(model: nn.Module, forward: Callable[[], None]) -> str:
    """FQN of the layer that makes the output.

    Raises:
        MemplanError: if there is none.
    """
    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        if callable(ask := getattr(module, "get_output_embeddings", None)):
            found = ask()
            if found in names:
                return str(names[found])
    linear = [name for name in called_modules(model, forward) if is_linear(model, name)]
    if not linear:
        raise MemplanError(f"the forward of {type(model).__name__} calls no linear layer: no head")
    return linear[-1]


def is_linear(model: nn.Module, name: str) -> bool:
    """Tell whether a module is a linear layer, or transformers' layer of transposed weight."""
    module = model.get_submodule(name)
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' linear layer of transposed weight."""
    kinds = {(one.__module__, one.__name__) for one in type(module).__mro__}
    return ("transformers.pytorch_utils", "Conv1D") in kinds


@contextmanager
def watched(model: nn.Module, note: Callable[[str], None]) -> Iterator[None]:
    """Context in which ``note`` gets the FQN of each submodule that is called, before it runs."""
    parts = {name: module for name, module in model.named_modules() if name}
    with around_calls(parts, before=lambda name, *_: note(name)):
        yield


def _modules(model: nn.Module, pattern: str, forward: Callable[[], None]) -> set[str]:
    if pattern == _HEAD:
        return {head_of(model, forward)}
    named = [(name, module) for name, module in model.named_modules() if name]
    if pattern == _NORMS:
        return {name for name, module in named if "norm" in type(module).__name__.lower()}
    if pattern.startswith(_TYPE):
        wanted = pattern.removeprefix(_TYPE)
        return {
            name
            for name, module in named
            if any(fnmatchcase(one.__name__, wanted) for one in type(module).__mro__)
        }
    return {name for name, _ in named if _is_meant(name, pattern)}


def _is_meant(name: str, pattern: str) -> bool:
    if pattern.startswith(_NAME):
        exact = pattern.removeprefix(_NAME)
        return name in (exact, f"{_WITH_LOSS}{exact}")
    if pattern == _BIASES:
        return "bias" in name.rpartition(".")[2]
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def _nothing(pattern: str, names: list[str]) -> MemplanError:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    return MemplanError(
        f"the pattern {pattern!r} matches nothing in the model; there is, for one, "
        f"{', '.join(map(repr, near))}"
    )


def list_members(model: nn.Module) -> frozenset[str]:
    """FQNs of modules of which a list of modules has several of a type."""
    found = set()
    for name, holder in model.named_modules():
        if isinstance(holder, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            kinds = Counter(type(child) for child in holder.children())
            alike = (child for child, one in holder.named_children() if kinds[type(one)] > 1)
            found |= {f"{name}.{child}" if name else child for child in alike}
    return frozenset(found)
