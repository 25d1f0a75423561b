"""The only file that uses private torch names. Each was checked on torch 2.13.0.

Everything here has a narrow, typed face, so that a new torch release is met in one place.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.fx.traceback as fx_traceback
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch._C._profiler import _EventType
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import _BoxedCodeGen

TESTED_TORCH = ("2.13",)
"""Releases that memplan's tests ran on."""

TreeSpec: TypeAlias = pytree.TreeSpec
OpOverload: TypeAlias = torch._ops.OpOverload

PrimalKind = Literal["parameter", "buffer", "input"]
OutputKind = Literal["output", "mutation", "gradient"]


@dataclass(frozen=True, slots=True)
class JointInput:
    """A placeholder of the joint graph.

    Attributes:
        node: the placeholder.
        kind: "parameter", "buffer", "input", or "tangent".
        name: FQN of a parameter or buffer, else "".
        index: position among the inputs, or, for a tangent, among the outputs.
    """

    node: fx.Node
    kind: PrimalKind | Literal["tangent"]
    name: str = ""
    index: int = -1


@dataclass(frozen=True, slots=True)
class JointOutput:
    """A result of the joint graph.

    Attributes:
        value: its node, or a constant.
        kind: "output", "mutation" (the new content of an input or buffer), or "gradient".
        of: for an output its position; else the placeholder that is mutated or differentiated.
    """

    value: object
    kind: OutputKind
    of: int | fx.Node


@dataclass(frozen=True)
class Joint:
    """A forward and backward in one graph."""

    graph: fx.Graph
    inputs: tuple[JointInput, ...]
    outputs: tuple[JointOutput, ...]


@functools.cache
def warn_of_untested_torch() -> None:
    """Say once that this release of torch was not tested."""
    if not torch.__version__.startswith(TESTED_TORCH):
        warnings.warn(
            f"memplan was tested with torch {', '.join(TESTED_TORCH)}; this is "
            f"{torch.__version__}. Check with memplan.compare that results are the same.",
            stacklevel=4,
        )


def copy_joint(joint: Joint) -> Joint:
    """The same with a graph of its own."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(joint.graph, copies))

    def copied(value: object) -> Any:
        return copies[value] if isinstance(value, fx.Node) else value

    return Joint(
        graph,
        tuple(replace(given, node=copies[given.node]) for given in joint.inputs),
        tuple(replace(out, value=copied(out.value), of=copied(out.of)) for out in joint.outputs),
    )


class UnsupportedJointError(Exception):
    """The joint graph has a feature that memplan does not handle; the text says which."""


def trace_joint(module: fx.GraphModule, args: Sequence[torch.Tensor]) -> Joint:
    """Trace forward and backward of an exported graph (torch 2.13.0).

    Raises:
        UnsupportedJointError: if the step changes metadata of its inputs, has tensor subclasses,
            or the like.
    """
    with contextlib.ExitStack() as stack, fx_traceback.preserve_node_meta():
        joint = aot_export_joint_with_descriptors(stack, module, tuple(args))
    graph = joint.graph_module.graph
    inputs = tuple(_joint_input(node) for node in graph.nodes if node.op == "placeholder")
    by_descriptor = {node.meta["desc"]: node for node in graph.nodes if node.op == "placeholder"}
    output = graph.output_node()
    results = zip(_as_list(output.args[0]), output.meta["desc"], strict=True)
    outputs = [_joint_output(value, desc, by_descriptor) for value, desc in results]
    return Joint(graph, inputs, tuple(out for out in outputs if out is not None))


def _as_list(values: object) -> list[object]:
    assert isinstance(values, list | tuple)
    return list(values)


def _joint_input(node: fx.Node) -> JointInput:
    match node.meta["desc"]:
        case ParamAOTInput(target=name):
            return JointInput(node, "parameter", name=name)
        case BufferAOTInput(target=name):
            return JointInput(node, "buffer", name=name)
        case PlainAOTInput(idx=index):
            return JointInput(node, "input", index=index)
        case TangentAOTInput(output=PlainAOTOutput(idx=index)):
            return JointInput(node, "tangent", index=index)
    raise UnsupportedJointError(f"an input of the kind {node.meta['desc']}")


def _joint_output(
    value: object, descriptor: object, placeholders: dict[object, fx.Node]
) -> JointOutput | None:
    match descriptor:
        case None:
            return None
        case PlainAOTOutput(idx=index):
            return JointOutput(value, "output", index)
        case InputMutationAOTOutput(mutated_input=mutated):
            return JointOutput(value, "mutation", placeholders[mutated])
        case GradAOTOutput(grad_of=source):
            return JointOutput(value, "gradient", placeholders[source])
    raise UnsupportedJointError(f"a result of the kind {descriptor}")


def is_backward(node: fx.Node) -> bool:
    """Whether a node of a joint graph was traced while gradients were computed (torch 2.13.0)."""
    return node.meta.get("partitioner_tag") == "is_backward"


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, fake ones included (torch 2.13.0)."""
    return int(tensor.untyped_storage()._cdata)


def version_of(tensor: torch.Tensor) -> int:
    """Counts the writes into a tensor (torch 2.13.0)."""
    return int(tensor._version)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module itself has forward or backward hooks (torch 2.13.0)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no data."""
    return isinstance(tensor, FakeTensor)


def boxed(graph: fx.Graph) -> Callable[[list[Any]], Any]:
    """Compile a graph to a function that empties its list of arguments as it starts.

    The list holds the only references to what it passes, so each is freed at its last use.
    """
    graph.set_codegen(_BoxedCodeGen())
    module = fx.GraphModule({}, graph)
    function: Callable[[list[Any]], Any] = module.forward
    return function


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """No kernels of oneDNN inside; the public switch also sets flags of other devices (2.13.0)."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


def enabled_attention() -> tuple[bool, ...]:
    """Which kernels scaled_dot_product_attention may choose from (torch 2.13.0)."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def backward_keeps_graph() -> bool:
    """Inside a backward: whether it was called with ``retain_graph=True`` (torch 2.13.0)."""
    return bool(_get_current_graph_task_keep_graph())


class _Record:
    """An instance of a dataclass that torch does not know, as a container of its fields."""

    def __init__(self, instance: object) -> None:
        self.kind = type(instance)
        self.fields = {f.name: _as_tree(getattr(instance, f.name)) for f in fields(instance)}  # type: ignore[arg-type]


def _is_record(value: object) -> bool:
    is_instance = is_dataclass(value) and not isinstance(value, type)
    return is_instance and type(value) not in pytree.SUPPORTED_NODES


def _as_tree(tree: object) -> object:
    return pytree.tree_map(
        lambda leaf: _Record(leaf) if _is_record(leaf) else leaf, tree, is_leaf=_is_record
    )


def _rebuild(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> object:
    kind, names = context
    instance: Any = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(instance, name, value)
    return instance


pytree.register_pytree_node(
    _Record,
    lambda record: (list(record.fields.values()), (record.kind, tuple(record.fields))),
    _rebuild,
    serialized_type_name="memplan.record",
)


@contextlib.contextmanager
def questions_about_tracing() -> Iterator[set[str]]:
    """Inside, note which files outside of torch ask whether they are traced (torch 2.13.0).

    Yields the set of ``file.py:line``, still growing.
    """
    asked: set[str] = set()
    originals = {name: getattr(torch.compiler, name) for name in ("is_compiling", "is_exporting")}

    def listening(original: Callable[[], bool]) -> Callable[[], bool]:
        def answer() -> bool:
            caller = sys._getframe(1)
            if not caller.f_globals.get("__name__", "").startswith("torch."):
                asked.add(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
            return original()

        return answer

    try:
        for name, original in originals.items():
            setattr(torch.compiler, name, listening(original))
        yield asked
    finally:
        for name, original in originals.items():
            setattr(torch.compiler, name, original)


def flatten(tree: object) -> tuple[list[Any], TreeSpec]:
    """Leaves of nested containers, dataclasses included, and their structure (torch 2.13.0)."""
    return pytree.tree_flatten(_as_tree(tree))


def unflatten(leaves: Sequence[object], spec: TreeSpec) -> Any:
    """Inverse of ``flatten``."""
    return pytree.tree_unflatten(leaves, spec)


@contextlib.contextmanager
def recording() -> Iterator[torch.profiler.profile]:
    """Record the CPU's allocator events inside (torch 2.13.0).

    Kineto announces each start and stop on stderr unless this variable tells it not to.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        yield profile


def allocations(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """All (time in ns, bytes) events of the CPU's allocator; frees are negative (torch 2.13.0)."""
    events: list[tuple[int, int]] = []

    def walk(node: Any) -> Iterator[Any]:
        stack = [node]
        while stack:
            current = stack.pop()
            yield current
            stack.extend(current.children)

    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for root in profile.profiler.kineto_results.experimental_event_tree():
        for event in walk(root):
            if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
                events.append((event.start_time_ns, event.extra_fields.alloc_size))
    events.sort(key=lambda event: event[0])
    return events


def spans(profile: torch.profiler.profile, prefix: str) -> dict[str, tuple[int, int]]:
    """Start and end in ns of every ``record_function`` whose name begins so (torch 2.13.0)."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return {
        event.name(): (event.start_ns(), event.end_ns())
        for event in profile.profiler.kineto_results.events()
        if event.name().startswith(prefix)
    }
