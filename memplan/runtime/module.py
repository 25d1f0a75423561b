"""The module that the user trains: it runs a plan made for exactly this call."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.capture.sample import Sample
from memplan.errors import MemplanError, NotPlannedYet, PlanMismatch
from memplan.ir.memory_trace import MemoryTrace
from memplan.planner.plan import Plan
from memplan.runtime.drift import BuiltStep, Drift
from memplan.runtime.evaluations import Evaluations
from memplan.runtime.first_call import first_call
from memplan.runtime.fused_gradients import PendingGradients
from memplan.runtime.signature import State, signature_of
from memplan.runtime.step import PlannedStep
from memplan.runtime.untouched import UntouchedCall
from memplan.torch_internals import enclosing_transform
from memplan.transforms.apply import Changed
from memplan.transforms.module_hooks import standing_for
from memplan.transforms.passes import LRSchedule

Build = Callable[[Changed, Sample], BuiltStep]
"""Captures, plans and emits one step."""


class PlannedModule(nn.Module):
    """A module that replaces another: same parameters, same names, same results, less memory.

    It shares the original's parameters, buffers and children, under their own names, so that an
    optimizer, ``state_dict``, ``to`` and ``train`` act on both. With gradients enabled each call
    runs a plan made for its signature (shapes, modes, flags, ...); a new signature is captured
    and planned first. Without gradients the original runs, as passes changed it.

    Several threads may call it. While one of them captures, the others wait, evaluating ones too;
    the original and its parameters must not be used meanwhile, because stand-ins replace them.

    Attributes of modules that the forward reads may be changed by hand: a plan depends on plain
    values, and on those of objects that modules hold, such as a configuration. A change that no
    attribute holds (a global, a variable of a closure) needs ``recapture()``.
    """

    original: nn.Module
    optimizer: Optimizer | None
    """The optimizer that the budget covers, if any."""
    changed: Changed
    """The original as passes changed it, and its earlier state."""

    def __init__(
        self,
        original: nn.Module,
        build: Build,
        cache_size: int,
        optimizer: Optimizer | None = None,
        changed: Changed | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.__dict__["changed"] = changed or Changed(original, {}, {})
        self.optimizer = optimizer
        self._build = build
        self._cache_size = cache_size
        self._finished = PendingGradients()
        self.training = original.training
        _warn_of_hidden(original)
        self._share()
        self._reset()

    def _share(self) -> None:
        """Use the original's own dictionaries: additions, moves and replacements apply to both.

        Where passes add children, replacing a child of the original itself does not.
        """
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = self.changed.model.__dict__[name]

    def _reset(self) -> None:
        self._steps: OrderedDict[Hashable, tuple[BuiltStep, ...]] = OrderedDict()
        self._last: PlannedStep | None = None
        self._lock = threading.RLock()
        self._evaluations = Evaluations()

    @property
    def plan(self) -> Plan:
        """The plan of the last call with gradients enabled, or else of the sample.

        Raises:
            NotPlannedYet: before there is one.
        """
        if self._last is None:
            raise NotPlannedYet(
                "there is no plan yet: call the module with gradients enabled, or pass a sample "
                "to memplan.optimize"
            )
        return self._last.plan

    @property
    def trace(self) -> MemoryTrace:
        """The prediction of ``plan``, block by block.

        Raises:
            NotPlannedYet: before there is one.
        """
        assert self.plan is not None and self._last is not None
        return self._last.trace

    def print_memory_plan(self) -> None:
        """Print ``plan.summary``.

        Raises:
            NotPlannedYet: before there is a plan.
        """
        sys.stdout.write(f"{self.plan.summary}\n")

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans in the cache, the one used last at the end."""
        return tuple(built.step.plan for steps in self._steps.values() for built in steps)

    def recapture(self) -> None:
        """Forget every capture and plan; the next call captures and plans anew."""
        self._reset()

    def prepare(self, sample: Sample) -> PlannedStep:
        """The step for a call with these inputs, from the cache or built now."""
        # A capture puts other tensors in the place of the parameters for a while; only one
        # thread may look at them then.
        with self._lock:
            return self._built(self._next_state(), sample).step

    def _next_state(self) -> State:
        return State.of(self.changed.model).chosen(self.changed.choose(is_call=False))

    def _built(self, state: State, sample: Sample) -> BuiltStep:
        signature = signature_of(self.changed.model, state, sample)
        steps = self._steps.get(signature, ())
        built = next((one for one in steps if one.step.holds(state, sample)), None)
        if built is None:
            # blocks take turns: the tensors of this call are captured
            with (
                self._evaluations.none(),
                standing_for(self.changed.model, state.choice.tensors),
            ):
                built = self._build(self.changed, sample)
            self._steps[signature] = (*steps, built)
            self._forget_oldest()
        self._steps.move_to_end(signature)
        self._last = built.step
        return built

    def _settled(self, state: State, sample: Sample) -> BuiltStep:
        """The step of a training call; its drift is measured first."""
        built = self._built(state, sample)
        if built.drift_check is None or built.is_settled:
            return built
        with self._evaluations.none():
            settled = built.settled(state, sample)
        self._replace(built, settled, state, sample)
        return settled

    def measure_drift(self, sample: object) -> Drift:
        """Measure how far values restored with rounding are from their originals, on one batch.

        The step runs, and leaves nothing behind.
        """
        batch = Sample.of(sample)
        with self._lock:
            state = self._next_state()
            built = self._built(state, batch)
            with self._evaluations.none():
                return built.drift(state, batch)

    def _forget_oldest(self) -> None:
        """Keep to the cache size, for all signatures and for the steps of one."""
        newest, steps = next(reversed(self._steps.items()))
        if len(self._steps) > self._cache_size:
            self._steps.popitem(last=False)
        elif len(steps) > self._cache_size:
            self._steps[newest] = steps[1:]
        else:
            return
        warnings.warn(
            f"more than {self._cache_size} signatures (shapes, modes, ...) or values that the "
            "forward branches on are in use; each that comes back is captured again. Pad the "
            "batches to fewer shapes, or raise Options.cache_size.",
            stacklevel=5,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original's output for these inputs."""
        if not torch.is_grad_enabled():
            return self._evaluated(args, kwargs)
        if transform := enclosing_transform():
            raise PlanMismatch(
                f"a planned module is called inside of {transform}, which would lose what it "
                "computes. Call the untouched module there: planned.original."
            )
        sample = Sample(args, kwargs)
        with self._lock:
            state = State.of(self.changed.model)
            tensors = (*state.parameters.values(), *sample.tensors())
            is_trained = any(tensor.requires_grad for tensor in tensors)
            if is_trained:
                state = state.chosen(self.changed.choose(is_call=True))
            built = self._settled(state, sample) if is_trained else None
            if built is not None and built.step.compares != "none":
                return self._compared(built, state, sample)
        if built is None:
            return self._evaluated(args, kwargs)
        return built.step.run(state, sample, self._finished)

    def _evaluated(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self._evaluations.one():
            return self.changed.model(*args, **kwargs)

    def _compared(self, built: BuiltStep, state: State, sample: Sample) -> Any:
        """The first call of a step, compared with the untouched forward."""
        call = UntouchedCall(self.changed.model, state, sample, built.step.captured.decisions)
        with self._evaluations.none():
            compared, output = first_call(built.step, call, self._finished)
        self._replace(built, replace(built, step=compared), state, sample)
        return output

    def _replace(self, built: BuiltStep, better: BuiltStep, state: State, sample: Sample) -> None:
        """Replace a step in the cache."""
        signature = signature_of(self.changed.model, state, sample)
        self._steps[signature] = tuple(
            better if one is built else one for one in self._steps[signature]
        )
        self._last = better.step

    def batches(
        self,
        loader: Iterable[Any],
        *,
        accumulate: int | None = None,
        schedule: LRSchedule | None = None,
    ) -> Iterable[Any]:
        """The batches to train on, without those that passes drop (``drop_minibatches``).

        Args:
            loader: any iterable of batches.
            accumulate: batches of one update, if there is more than one.
            schedule: one that is to step for dropped batches too, as the loop's body lets it for
                the others.

        Raises:
            MemplanError: if ``accumulate`` is less than 1.
        """
        if accumulate is not None and accumulate < 1:
            raise MemplanError(f"accumulate is a number of batches, got {accumulate!r}")
        for loop in self.changed.loops:
            loader = loop(self.changed.model, loader, accumulate, schedule)
        return loader

    def export(self) -> nn.Module:
        """A copy of the original as trained so far, without what passes added for training.

        Raises:
            MemplanError: if passes made another model of it than the original.
        """
        if self.changed.is_another:
            raise MemplanError(
                "what passes added is part of this model in evaluation, too, and the original "
                "alone is another model: merge adapters first (memplan.passes.merge_lora(planned) "
                "returns the original), or save planned.state_dict()"
            )
        exported = copy.deepcopy(self.original)
        for name, parameter in exported.named_parameters():
            if name in self.changed.frozen:
                parameter.requires_grad_(True)
        return exported

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Set the mode here and in the original, by the original's own method.

        Returns this module, or what that method returns if it is not the original.
        """
        return self._mode_of_original(self.original.train(*args, **kwargs))

    def eval(self) -> Any:
        """Set the mode of evaluation here and in the original, by the original's own method."""
        return self._mode_of_original(self.original.eval())

    def _mode_of_original(self, result: object) -> Any:
        self.training = self.original.training
        for child in self.changed.modules.values():
            child.train(self.training)
        return self if result is self.original else result

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state, and that of what passes added, under prefixes of its own."""
        return self.changed.model.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load into the original, whose parameters are this module's, and what passes added."""
        return self.changed.model.load_state_dict(state_dict, strict=strict, assign=assign)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            if original is None:
                raise
            return getattr(original, name)

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_steps", "_last", "_lock", "_evaluations", "_finished")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._finished = PendingGradients()
        self._share()
        self._reset()


def _warn_of_hidden(original: nn.Module) -> None:
    """Warn of a module's attributes that the planned module's own hide."""
    own = {"original", "changed", "optimizer", *vars(PlannedModule)} - set(dir(nn.Module))
    classes = type(original).__mro__[: -len(nn.Module.__mro__)]
    places = [vars(original), *map(vars, classes)]
    places += [original._modules, original._parameters, original._buffers]
    hidden = sorted(
        name for name in own if not name.startswith("_") and any(name in held for held in places)
    )
    if hidden:
        warnings.warn(
            f"{', '.join(hidden)} of the planned module {'are' if hidden[1:] else 'is'} "
            f"memplan's; the model's own: planned.original.{hidden[0]}",
            stacklevel=4,
        )
