"""From a module and a sample to a graph of its forward."""

from __future__ import annotations

import contextlib
import random
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import fx, nn

from memplan.capture.recurrent import OneLayerAtATime
from memplan.errors import CaptureError
from memplan.sample import Sample
from memplan.torch_internals import (
    TreeSpec,
    flatten,
    has_hooks,
    questions_about_tracing,
    unflatten,
)

Differentiable = Literal["all"] | tuple[int, ...] | None
"""Outputs that gradients arrive at: all, some by position among the output's leaves, or None:
the loss alone if there is exactly one, else all."""

_PREFIX = "wrapped."

_DATA_DEPENDENT = frozenset(
    {"GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException"}
)
"""Names of torch's errors that mean: this needs the values of tensors."""


@dataclass(frozen=True)
class OutputLeaf:
    """One leaf of what the module returns.

    Attributes:
        position: among the graph's outputs, or None for a constant.
        constant: the constant.
    """

    position: int | None
    constant: object = None


@dataclass(frozen=True, slots=True)
class Difference:
    """A reason why the captured step may differ from the untouched module's by rounding.

    Attributes:
        is_certain: whether it does, or only may.
        reason: in words.
    """

    is_certain: bool
    reason: str


@dataclass(frozen=True)
class Forward:
    """The forward as a graph over the tensors among the inputs' leaves.

    Attributes:
        graph_module: parameters and buffers under the module's own FQNs.
        constants: tensors in the graph that the module does not own, by name.
        spec: structure of what the module returns.
        leaves: its leaves, in order.
        requires_grad: for each graph output, whether it does in the untouched module.
        differentiable: positions of graph outputs that gradients may arrive at.
        is_loss: whether ``differentiable`` was narrowed to the only scalar.
        is_recurrent: whether it has recurrent kernels.
        differences: where it is not made of the ops that eager runs.
    """

    graph_module: fx.GraphModule
    constants: Mapping[str, torch.Tensor]
    spec: TreeSpec
    leaves: tuple[OutputLeaf, ...]
    requires_grad: tuple[bool, ...]
    differentiable: frozenset[int]
    is_loss: bool
    is_recurrent: bool
    differences: tuple[Difference, ...]


@dataclass
class _Notes:
    """What tracing the forward saw beside the graph."""

    spec: TreeSpec | None = None
    leaves: tuple[OutputLeaf, ...] = ()
    requires_grad: tuple[bool, ...] = ()
    is_scalar: tuple[bool, ...] = ()
    unknown: str = ""


class _Flat(nn.Module):
    """The module as a function from tensors to a tuple of tensors; notes down the rest."""

    def __init__(self, module: nn.Module, sample: Sample, notes: _Notes) -> None:
        super().__init__()
        self.wrapped = module
        self.sample_leaves, self.sample_spec = flatten((sample.args, dict(sample.kwargs)))
        self.notes = notes

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [
            next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.sample_leaves
        ]
        args, kwargs = unflatten(leaves, self.sample_spec)
        outputs, self.notes.spec = flatten(self.wrapped(*args, **kwargs))
        kept: list[torch.Tensor] = []
        described: list[OutputLeaf] = []
        for leaf in outputs:
            if isinstance(leaf, torch.Tensor):
                described.append(OutputLeaf(len(kept)))
                kept.append(leaf)
            elif leaf is None or isinstance(leaf, bool | int | float | complex | str):
                described.append(OutputLeaf(None, leaf))
            else:
                self.notes.unknown = type(leaf).__name__
                raise TypeError(f"unknown output {type(leaf).__name__}")
        self.notes.leaves = tuple(described)
        self.notes.requires_grad = tuple(t.requires_grad for t in kept)
        self.notes.is_scalar = tuple(t.dim() == 0 for t in kept)
        return tuple(kept)


def trace_forward(module: nn.Module, sample: Sample, differentiable: Differentiable) -> Forward:
    """Export the module's forward in its present mode.

    All random states are left as they were found.

    Raises:
        CaptureError: if it has hooks, draws numbers outside torch, branches on the values of
            tensors, or returns something other than nested containers of tensors.
    """
    _refuse_hooks(module)
    notes = _Notes()
    flat = _Flat(module, sample, notes)
    try:
        with (
            unchanged_randomness(),
            OneLayerAtATime() as recurrent,
            questions_about_tracing() as questions,
            _quiet_export(),
        ):
            exported = torch.export.export(flat, tuple(sample.tensors()), strict=False)
            graph_module = exported.module(check_guards=False)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(explain(error, module, notes.unknown)) from error
    assert isinstance(graph_module, fx.GraphModule)
    constants = _own_constants(graph_module, module)
    wanted, is_loss = _choose_differentiable(notes, differentiable)
    _detach_others(graph_module, wanted)
    assert notes.spec is not None
    return Forward(
        graph_module=graph_module,
        constants=constants,
        spec=notes.spec,
        leaves=notes.leaves,
        requires_grad=notes.requires_grad,
        differentiable=wanted,
        is_loss=is_loss,
        is_recurrent=bool(recurrent.seen),
        differences=_differences(recurrent.seen, questions),
    )


def _differences(recurrent: set[str], questions: set[str]) -> tuple[Difference, ...]:
    """Where the captured step is not made of the ops that eager runs."""
    found = []
    if recurrent:
        kinds = ", ".join(sorted(recurrent))
        reason = f"the recurrent kernels ({kinds}) are captured as other ops than the module runs"
        found.append(Difference(True, reason))
    if questions:
        found.append(
            Difference(
                False,
                f"the model's code asks whether it is traced ({', '.join(sorted(questions))}), and "
                "may then compute the same in another way; memplan.compare shows whether it does",
            )
        )
    return tuple(found)


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Without torch's warning of tensors in plain attributes, which recurrent modules all have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The tensor attributes? ", category=UserWarning)
        yield


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Restore torch's, numpy's and Python's random states.

    Raises:
        CaptureError: if numpy's or Python's state moved inside: what was drawn would be baked
            into the capture and be the same in every step.
    """
    numpy_state, python_state = np.random.get_state(legacy=False), random.getstate()
    with torch.random.fork_rng():
        try:
            yield
            moved = random.getstate() != python_state or str(
                np.random.get_state(legacy=False)
            ) != str(numpy_state)
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
    if moved:
        raise CaptureError(
            "the forward draws numbers from numpy.random or random; captured, they would be the "
            "same in every step. Draw them with torch, or outside of the module."
        )


def _refuse_hooks(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if has_hooks(child):
            where = f"module {name!r}" if name else "the module"
            raise CaptureError(
                f"{where} ({type(child).__name__}) has hooks, which a captured step would not "
                "run. Remove them, or leave this module unplanned."
            )


def _own_constants(graph_module: fx.GraphModule, module: nn.Module) -> dict[str, torch.Tensor]:
    """Make buffers of tensors that are none; return all that the module does not own."""
    known = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in graph_module.named_buffers(remove_duplicate=False)}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            owner_name, _, name = node.target.rpartition(".")
            owner = graph_module.get_submodule(owner_name)
            tensor = getattr(owner, name)
            if isinstance(tensor, fx.GraphModule):
                continue
            if not isinstance(tensor, torch.Tensor):
                raise CaptureError(f"the graph holds {name!r}, a {type(tensor).__name__}")
            delattr(owner, name)
            owner.register_buffer(name, tensor, persistent=False)
    owned = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    owned |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {
        own_name(name): tensor
        for name, tensor in graph_module.named_buffers(remove_duplicate=False)
        if own_name(name) not in owned
    }


def own_name(name: str) -> str:
    """The module's own FQN of something that the graph names."""
    return name.removeprefix(_PREFIX)


def _choose_differentiable(notes: _Notes, asked: Differentiable) -> tuple[frozenset[int], bool]:
    able = {position for position, required in enumerate(notes.requires_grad) if required}
    if not able:
        raise CaptureError(
            "no output depends on a parameter or input that requires a gradient; there is no "
            "backward to plan"
        )
    if asked == "all":
        return frozenset(able), False
    if isinstance(asked, tuple):
        leaves = notes.leaves
        chosen = {leaves[leaf].position for leaf in asked if leaf in range(len(leaves))}
        if len(chosen) != len(set(asked)) or not chosen <= able:
            raise CaptureError(
                f"differentiable_outputs={asked!r} must name leaves of the output that require a "
                f"gradient; there are {len(leaves)} leaves"
            )
        return frozenset(position for position in chosen if position is not None), False
    scalars = {position for position in able if notes.is_scalar[position]}
    return (frozenset(scalars), True) if len(scalars) == 1 else (frozenset(able), False)


def _detach_others(graph_module: fx.GraphModule, wanted: frozenset[int]) -> None:
    """Cut outputs that no gradient arrives at, so that nothing is computed for them."""
    graph = graph_module.graph
    output = graph.output_node()
    results = output.args[0]
    assert isinstance(results, list | tuple)
    updated = list(results)
    with graph.inserting_before(output):
        for position, node in enumerate(results):
            if position not in wanted and isinstance(node, fx.Node) and node.op == "call_function":
                detached = graph.call_function(torch.ops.aten.detach.default, (node,))
                detached.meta = dict(node.meta)
                updated[position] = detached
    output.args = (tuple(updated),)
    graph_module.recompile()


def explain(error: Exception, module: nn.Module, unknown_output: str = "") -> str:
    """What failed, where in the user's code, and what to do."""
    if unknown_output:
        return (
            f"{type(module).__name__} returns a {unknown_output}, which is no container of tensors "
            "that torch knows. Return tensors, tuples, lists or dicts (for Hugging Face models: "
            "set config.use_cache = False), or register it with torch.utils._pytree."
        )
    own = Path(__file__).parent.parent
    site = Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and own not in Path(frame.filename).parents
        and site not in Path(frame.filename).parents
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    text = str(error).strip()
    cause = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    advice = "Does the untouched module run on this sample?"
    if any(kind.__name__ in _DATA_DEPENDENT for kind in type(error).__mro__):
        advice = (
            "A captured forward must not branch on the values of tensors; rewrite that line, or "
            "plan a part of the model."
        )
    return f"{type(module).__name__} cannot be captured{where}: {cause}. {advice}"
