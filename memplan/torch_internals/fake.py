"""Tensors without data, and contexts in which modules are traced on them."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.utils.checkpoint
from torch import nn
from torch._functorch._aot_autograd.functional_utils import to_fun
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memplan.errors import CaptureError
from memplan.torch_internals.state import OpOverload, version_of


class DispatchMode(TorchDispatchMode):
    """Sees every op below autograd; subclasses define ``__torch_dispatch__`` (torch 2.13-2.15)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]


def is_fake(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has no data, as in a trace (torch 2.13-2.15)."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's class leaves operations unchanged (torch 2.13-2.15)."""
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor) or (
        isinstance(tensor, FakeTensor | nn.Parameter) and is_fake(tensor)
    )


def making_no_data() -> contextlib.AbstractContextManager[object]:
    """Context in which new tensors have no data (torch 2.13-2.15).

    Reading a number from one is an error: a wrong number would lead to wrong sizes.
    """
    mode: contextlib.AbstractContextManager[object] = FakeTensorMode(allow_non_fake_inputs=True)
    return mode


NUMBERS: dict[torch.dtype, bool | int] = {torch.bool: True, torch.int64: 1000, torch.int32: 1000}
"""The number that a tensor without data is taken to hold; 1000.0 for a float."""


Relay = Callable[
    [OpOverload, Sequence[torch.Tensor], Sequence[Any], Mapping[str, Any]],
    Sequence[torch.Tensor | None],
]
"""Takes a call on tensors without data, its results and arguments; returns for each result one
laid out as by the kernel, or None; nothing where all are as torch predicts."""


def _relaying_mode(relay: Relay) -> FakeTensorMode:
    """A mode whose results have the layouts observed from kernels (torch 2.13-2.15)."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    predicted = mode.dispatch

    def dispatch(
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result: Any = predicted(func, types, args, kwargs or {})
        items = result if isinstance(result, tuple | list) else (result,)
        places = [n for n, item in enumerate(items) if isinstance(item, torch.Tensor)]
        with mode:
            others = relay(func, [items[n] for n in places], args, kwargs or {})
        relaid = {n: other for n, other in zip(places, others, strict=False) if other is not None}
        if not relaid:
            return result
        if items is not result:
            return relaid[0]
        return type(result)(relaid.get(n, item) for n, item in enumerate(items))

    # Not a subclass: higher-order ops go by the mode's class.
    mode.dispatch = dispatch  # type: ignore[method-assign]
    return mode


def fake_mode_of(tensors: Iterable[torch.Tensor], relay: Relay | None = None) -> FakeTensorMode:
    """The mode of tensors that are fake already, or a new one (torch 2.13-2.15)."""
    mode = detect_fake_mode(list(tensors))
    if mode is not None:
        return mode
    return FakeTensorMode(allow_non_fake_inputs=True) if relay is None else _relaying_mode(relay)


def cpu_stand_ins(tensors: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """CPU stand-ins without data for tensors on the meta device, by id (torch 2.13-2.15)."""
    on_meta = [tensor for tensor in tensors if tensor.is_meta]
    return _stand_ins(on_meta, FakeTensorMode(allow_non_fake_inputs=True))


@contextlib.contextmanager
def stand_ins_without_data(
    tensors: Iterable[torch.Tensor], on_cpu: bool
) -> Iterator[dict[int, torch.Tensor]]:
    """Stand-ins without data for tensors, by id; new tensors inside have none (torch 2.13-2.15).

    With ``on_cpu``, those for another device are on the CPU.
    """
    given = list(tensors)
    mode = fake_mode_of(given)
    stand_ins = {id(tensor): tensor for tensor in given if is_fake(tensor)}
    stand_ins |= _stand_ins([tensor for tensor in given if not is_fake(tensor)], mode, on_cpu)
    with mode:
        yield stand_ins


def _stand_ins(
    tensors: Iterable[torch.Tensor], mode: FakeTensorMode, on_cpu: bool = False
) -> dict[int, torch.Tensor]:
    stand_ins: dict[int, torch.Tensor] = {}
    with mode:
        for tensor in tensors:
            if id(tensor) in stand_ins:
                continue
            device = "cpu" if on_cpu or tensor.is_meta else tensor.device
            made = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            ).requires_grad_(tensor.requires_grad)
            is_parameter = isinstance(tensor, nn.Parameter)
            stand_ins[id(tensor)] = (
                nn.Parameter(made, tensor.requires_grad) if is_parameter else made
            )
    return stand_ins


@contextlib.contextmanager
def as_if_traced(
    module: nn.Module, inputs: Iterable[torch.Tensor], watch: DispatchMode
) -> Iterator[tuple[dict[str, torch.Tensor], list[torch.Tensor]]]:
    """Copies without data of a module's state and inputs, such as ``trace_joint`` runs on.

    ``watch`` sees every op run on them inside (torch 2.13-2.15).
    """
    given = list(inputs)
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    mode = fake_mode_of((*(tensor for _, tensor in named), *given))

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = to_fun(mode.from_tensor(tensor, static_shapes=True))
        return made

    with mode, watch, FunctionalTensorMode():
        yield {name: copy(tensor) for name, tensor in named}, [copy(tensor) for tensor in given]


def without_modes() -> contextlib.AbstractContextManager[object]:
    """Context in which tensors are real again (torch 2.13-2.15)."""
    manager: contextlib.AbstractContextManager[object] = _disable_current_modes()
    return manager


def set_origin(modules: Sequence[str], source: str) -> None:
    """Set the origin of nodes traced from now on: the modules' FQNs and ``file.py:line``.

    They appear in ``node.meta`` as in torch's own traces (torch 2.13-2.15).
    """
    meta = fx_traceback.current_meta
    meta["nn_module_stack"] = {name: (name, nn.Module) for name in modules}
    meta["stack_trace"] = source


def annotated(key: str, value: object) -> contextlib.AbstractContextManager[object]:
    """Context in which traced nodes carry a note (torch 2.13-2.15)."""
    manager: contextlib.AbstractContextManager[object] = fx_traceback.annotate({key: value})
    return manager


def annotation(node: torch.fx.Node, key: str) -> Any:
    """The note of a node under a key; None if there is none (torch 2.13-2.15)."""
    return node.meta.get("custom", {}).get(key)


@contextlib.contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Context in which ``torch.utils.checkpoint`` only calls the function (torch 2.13-2.15).

    Raises:
        CaptureError: inside, for the reentrant variant, which computes other gradients: none where
            no input needs one, and sums in another order; and for functions that write buffers of
            the module, which they would write again in the backward.
    """

    def only_call(*args: object, **kwargs: object) -> Iterator[None]:
        del args, kwargs
        before = {name: version_of(buffer) for name, buffer in module.named_buffers()}
        yield
        for name, buffer in module.named_buffers():
            if version_of(buffer) != before[name]:
                raise CaptureError(
                    f"buffer {name!r} is written inside of torch.utils.checkpoint, which writes it "
                    "again in the backward: statistics of batch norm are updated twice. memplan "
                    "takes the place of checkpointing: take it out, and they are updated once."
                )

    def refuse(*args: object) -> Any:
        del args
        raise CaptureError(
            "the model calls torch.utils.checkpoint with use_reentrant=True; memplan takes its "
            "place: take it out, or pass use_reentrant=False"
        )

    reentrant: Any = torch.utils.checkpoint.CheckpointFunction
    original, others = reentrant.apply, vars(torch.utils.checkpoint)
    # From 2.14 on one calls the other, and torch.utils.checkpoint.checkpoint the second.
    names = (
        "_checkpoint_without_reentrant_generator",
        "_checkpoint_without_reentrant_generator_impl",
    )
    generators = {name: others[name] for name in names if name in others}
    others.update(dict.fromkeys(generators, only_call))
    reentrant.apply = refuse
    try:
        yield
    finally:
        reentrant.apply = original
        others.update(generators)


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Context without oneDNN kernels; the public switch sets flags of other devices (2.13-2.15)."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


@contextlib.contextmanager
def questions_about_tracing(answer: bool) -> Iterator[set[str]]:
    """Context in which code outside torch that asks whether it is traced is told this (2.13-2.15).

    Yields the growing set of ``file.py:line`` that asked.
    """
    asked: set[str] = set()
    originals = {name: getattr(torch.compiler, name) for name in ("is_compiling", "is_exporting")}

    def replacing(original: Callable[[], bool]) -> Callable[[], bool]:
        def reply() -> bool:
            caller = sys._getframe(1)
            if caller.f_globals.get("__name__", "").startswith("torch."):
                return original()
            asked.add(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
            return answer

        return reply

    try:
        for name, original in originals.items():
            setattr(torch.compiler, name, replacing(original))
        yield asked
    finally:
        for name, original in originals.items():
            setattr(torch.compiler, name, original)


class _SeemsReal(type):
    def __instancecheck__(cls, instance: object) -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return caller.startswith("torch.") and isinstance(instance, FakeTensor)


class _NeverFake(metaclass=_SeemsReal):
    """Stand-in for the class of tensors without data."""


@contextlib.contextmanager
def seeming_real() -> Iterator[None]:
    """Context in which code outside torch takes tensors without data for real (torch 2.13-2.15)."""
    original = torch._subclasses.FakeTensor
    torch._subclasses.FakeTensor = _NeverFake  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch._subclasses.FakeTensor = original  # type: ignore[misc]


@contextlib.contextmanager
def without_log_of_failures() -> Iterator[None]:
    """Context in which torch does not log errors that it is about to raise (torch 2.13-2.15)."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def without_idle_moves() -> Iterator[None]:
    """Context in which moving a module to where it is does nothing (torch 2.13-2.15).

    Otherwise it would try to write the stand-ins for its parameters.
    """
    original = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        is_there = layout is None and all(
            (device is None or device.type == tensor.device.type)
            and (dtype is None or dtype == tensor.dtype or not tensor.is_floating_point())
            for tensor in (*self.parameters(), *self.buffers())
        )
        return self if is_there else original(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]
