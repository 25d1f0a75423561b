"""Changes of a model by passes: parameters that are not trained, and another forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from memplan.capture import run_without_data
from memplan.capture.sample import Sample
from memplan.errors import MemplanError
from memplan.torch_internals import seeming_real
from memplan.transforms.passes import Around, CallChoice, Change, Loop, ModelContext, Pass

_SHARED = tuple(
    name for name in vars(nn.Module()) if isinstance(vars(nn.Module())[name], dict | set)
)


class ChangedModel(nn.Module):
    """Another module, with children of its own, that computes something else. Tensors are shared.

    Its hooks, buffers, parameters and, except for those added, children are the original's.
    """

    added: dict[str, nn.Module]

    def __init__(
        self,
        original: nn.Module,
        modules: Mapping[str, nn.Module],
        around: tuple[Around, ...],
        looks: tuple[Callable[[nn.Module, ModelContext], None], ...] = (),
    ) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.__dict__["added"] = dict(modules)
        self.around = around
        self.looks = looks
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        if modules:
            self.__dict__["_modules"] = {**original._modules, **modules}

    @property
    def training(self) -> bool:
        """The original's mode."""
        return bool(self.__dict__["original"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "original" in self.__dict__:
            self.__dict__["original"].training = mode

    def look(self, sample: Sample) -> None:
        """Let passes look at the forward that is to be captured."""
        with seeming_real():
            for one in self.looks:
                one(self, context_of(self, sample))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the original, as passes change it."""
        run = partial(self.__dict__["original"].forward, *args, **kwargs)
        for one in reversed(self.around):
            run = partial(one, self, Sample(args, kwargs), run)
        return run()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state, then that of added modules."""
        found = self.__dict__["original"].state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        keep_vars = kwargs.get("keep_vars", args[2] if len(args) > 2 else False)
        for name, child in self.added.items():
            child.state_dict(destination=found, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load into the original and into added modules."""
        parts: dict[str, dict[str, Any]] = {name: {} for name in self.added}
        own = {}
        for name, tensor in state_dict.items():
            first, _, rest = name.partition(".")
            if first in parts:
                parts[first][rest] = tensor
            else:
                own[name] = tensor
        result = self.__dict__["original"].load_state_dict(own, strict=strict, assign=assign)
        for name, child in self.added.items():
            found = child.load_state_dict(parts[name], strict=strict, assign=assign)
            result.missing_keys.extend(f"{name}.{key}" for key in found.missing_keys)
            result.unexpected_keys.extend(f"{name}.{key}" for key in found.unexpected_keys)
        return result


@dataclass(frozen=True)
class Changed:
    """A model as passes changed it.

    Attributes:
        model: the changed one; the original itself, if its forward is as it was.
        modules: the children that it has besides the original's.
        required_grad: by name, whether the original's parameters required a gradient before.
        is_another: whether it computes something else without gradients, too.
        frozen: the original's parameters that required a gradient, and that passes do not train.
        loops: choose batches in the training loop.
        chooses: chooses what a training call runs.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    required_grad: Mapping[str, bool]
    is_another: bool = False
    frozen: frozenset[str] = frozenset()
    loops: tuple[Loop, ...] = ()
    chooses: Callable[[nn.Module, bool], CallChoice] | None = None

    def choose(self, is_call: bool) -> CallChoice:
        """The choice of the next training call; if this is that call, the one after is drawn."""
        return CallChoice() if self.chooses is None else self.chooses(self.model, is_call)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Context in which the original's parameters require gradients as they did before."""
        named = dict(self.model.named_parameters())
        now = {name: named[name].requires_grad for name in self.required_grad}
        try:
            for name, required in self.required_grad.items():
                named[name].requires_grad_(required)
            yield
        finally:
            for name, required in now.items():
                named[name].requires_grad_(required)


def context_of(model: nn.Module, sample: Sample | None) -> ModelContext:
    """The context of a model for passes; without a sample it has no forward."""
    return ModelContext(
        forward=partial(_forward, model, sample),
        forward_with_gradients=partial(_forward, model, sample, with_gradients=True),
        forward_with_one_more=partial(_forward, model, sample, with_gradients=True, is_larger=True),
        batch_size=None if sample is None else sample.batch_size,
    )


@contextmanager
def changing(
    model: nn.Module, sample: Sample | None, passes: Sequence[Pass], *, is_lasting: bool = False
) -> Iterator[Changed]:
    """Let passes change a model.

    ``requires_grad`` is set on the model itself, and frozen parameters lose the gradient that they
    hold. All is restored at the end or, where the change is lasting, only if the block fails.

    Raises:
        MemplanError: naming the pass, if passes cannot be combined or nothing is left to train.
    """
    for one in passes:
        if one.candidates is not None:
            raise MemplanError(
                f"{one.name} is to fit, and there is no budget here: use memplan.optimize or "
                "memplan.plan, or say how large it is to be"
            )
    context = context_of(model, sample)
    changes = [one.change(model, context) for one in passes if one.change is not None]
    modules: dict[str, nn.Module] = {}
    for change in changes:
        for name, child in change.modules.items():
            if name in modules or name in dict(model.named_children()):
                raise MemplanError(
                    f"a pass adds a child named {name!r}, which the model, or another pass, has "
                    "already; a pass that adds parameters can be used once"
                )
            modules[name] = child
    around = tuple(change.around for change in changes if change.around is not None)
    looks = tuple(change.look for change in changes if change.look is not None)
    changed = ChangedModel(model, modules, around, looks) if modules or around else model
    is_another = any(c.around is not None and not c.is_for_gradients for c in changes)
    named = dict(model.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in named.items()}
    gradients = {name: parameter.grad for name, parameter in named.items()}
    trained = _trained(model, changes)
    try:
        frozen = frozenset(name for name, required in before.items() if required) - trained
        for name in frozen:
            named[name].requires_grad_(False)
            named[name].grad = None
        if any(before.values()) and not any(one.requires_grad for one in changed.parameters()):
            raise MemplanError("the passes freeze every parameter; nothing is left to train")
        loops = tuple(change.loop for change in changes if change.loop is not None)
        chooses = [change.choose for change in changes if change.choose is not None]
        chosen = chooses[0] if chooses else None
        found = Changed(changed, modules, before, is_another, frozen, loops, chosen)
        if sample is not None and len(changes) > 1 and isinstance(changed, ChangedModel):
            # A pass may choose otherwise beside the others than on its own.
            changed.look(sample)
            found.choose(is_call=False)
        yield found
    except BaseException:
        _put_back(named, before, gradients)
        raise
    if not is_lasting:
        _put_back(named, before, gradients)


def _trained(model: nn.Module, changes: Sequence[Change]) -> frozenset[str]:
    """First names of the parameters that are trained; a tied one goes by any of its names."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    wanted = [change.trains for change in changes if change.trains is not None]
    frozen = frozenset[str]().union(*(change.freezes for change in changes))
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (not wanted or any(not names[id(parameter)].isdisjoint(one) for one in wanted))
        and names[id(parameter)].isdisjoint(frozen)
    )


def _forward(
    model: nn.Module,
    sample: Sample | None,
    *,
    with_gradients: bool = False,
    is_larger: bool = False,
) -> Any:
    if sample is None:
        raise MemplanError(
            "a pass needs to know what the forward calls: pass a batch to memplan.optimize"
        )
    given = sample.with_one_more if is_larger else sample
    return run_without_data(model, given, with_gradients=with_gradients)


def _put_back(
    named: Mapping[str, nn.Parameter],
    required: Mapping[str, bool],
    gradients: Mapping[str, Any],
) -> None:
    for name, parameter in named.items():
        if parameter.requires_grad != required[name]:
            parameter.requires_grad_(required[name])
            parameter.grad = gradients[name]
