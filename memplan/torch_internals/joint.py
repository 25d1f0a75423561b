"""The joint graph: forward and backward of a module in one trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch._functorch._aot_autograd.descriptors import (
    BackwardTokenAOTInput,
    BackwardTokenAOTOutput,
    BufferAOTInput,
    ForwardTokenAOTInput,
    ForwardTokenAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph import _BoxedCodeGen

from memplan.torch_internals.fake import Relay, fake_mode_of
from memplan.torch_internals.recorded import noted
from memplan.torch_internals.state import storage_key

PrimalKind = Literal["parameter", "buffer", "input", "constant", "gradient"]
OutputKind = Literal["output", "mutation", "gradient", "accumulated"]


@dataclass(frozen=True, slots=True)
class JointInput:
    """A placeholder of the joint graph.

    Attributes:
        node: the placeholder.
        kind: "parameter", "buffer", "input", "constant" (a tensor that the module does not own),
            "gradient" (one that a parameter holds when the step starts), or "tangent".
        name: FQN of a parameter or buffer, the parameter's for a gradient, key of a constant, or
            "".
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
        kind: "output", "mutation" (the new content of an input or buffer), "gradient", or
            "accumulated" (a gradient added into an existing one).
        of: for an output its position; else the placeholder that is mutated or differentiated.
    """

    value: object
    kind: OutputKind
    of: int | fx.Node


@dataclass(frozen=True)
class Joint:
    """A forward and backward in one graph.

    Attributes:
        constants: tensors of inputs of that kind, by name.
    """

    graph: fx.Graph
    inputs: tuple[JointInput, ...]
    outputs: tuple[JointOutput, ...]
    constants: Mapping[str, torch.Tensor]


class UnsupportedJointError(Exception):
    """The joint graph has a feature that memplan does not handle; the text says which."""


def copy_joint(joint: Joint) -> Joint:
    """A copy with a graph of its own."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(joint.graph, copies))

    def copied(value: object) -> Any:
        return copies[value] if isinstance(value, fx.Node) else value

    return Joint(
        graph,
        tuple(replace(given, node=copies[given.node]) for given in joint.inputs),
        tuple(replace(out, value=copied(out.value), of=copied(out.of)) for out in joint.outputs),
        joint.constants,
    )


def trace_joint(
    module: nn.Module, args: Sequence[torch.Tensor], relay: Relay | None = None
) -> Joint:
    """Trace forward and backward of a module from tensors to a tuple of them (torch 2.13-2.15).

    Autograd itself runs during the trace, on tensors without data: a user's own backward, or a
    part without gradients, is traced as it is.

    Args:
        module: from tensors to a tuple of them.
        args: the tensors.
        relay: replaces results that kernels lay out otherwise than torch predicts.

    Raises:
        UnsupportedJointError: if the step changes metadata of its inputs, has tensor subclasses,
            or the like.
    """
    # The inputs carry the mode: with a TracingContext, random ops with unused results would be
    # dropped.
    fake_mode = fake_mode_of((*module.parameters(), *module.buffers(), *args), relay)
    fakes = tuple(fake_mode.from_tensor(tensor, static_shapes=True) for tensor in args)
    with contextlib.ExitStack() as stack, fx_traceback.preserve_node_meta():
        joint = aot_export_joint_with_descriptors(stack, module, fakes)
    graph = joint.graph_module.graph
    _without_tokens(graph)
    _as_backward(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = [_joint_input(node) for node in placeholders]
    by_descriptor = {node.meta["desc"]: node for node in placeholders}
    output = graph.output_node()
    results = zip(_as_list(output.args[0]), output.meta["desc"], strict=True)
    outputs = [_joint_output(value, desc, by_descriptor) for value, desc in results]
    constants = _lift_constants(joint.graph_module, fake_mode)
    _without_copies(graph)
    _fold_numbers(graph)
    inputs += [JointInput(node, "constant", name=name) for name, (node, _) in constants.items()]
    return Joint(
        graph,
        tuple(inputs),
        tuple(out for out in outputs if out is not None),
        {name: tensor for name, (_, tensor) in constants.items()},
    )


def _without_tokens(graph: fx.Graph) -> None:
    """Turn checks that a trace orders by tokens into plain calls (torch 2.13-2.15).

    Raises:
        UnsupportedJointError: for any other op with an effect.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.higher_order.with_effects:
            continue
        _, target, *args = node.args
        if target is not CHECK_OF_LINALG:
            raise UnsupportedJointError(f"an op with an effect ({target})")
        with graph.inserting_before(node):
            call = graph.call_function(target, tuple(args), dict(node.kwargs))
        call.meta = {**node.meta, "val": None}
        for item in list(node.users):
            item.replace_all_uses_with(node.args[0])
            graph.erase_node(item)
        graph.erase_node(node)
    end = graph.output_node()
    pairs = list(zip(_as_list(end.args[0]), end.meta["desc"], strict=True))
    kept = [pair for pair in pairs if not isinstance(pair[1], _TOKENS)]
    values: list[Any] = [value for value, _ in kept]
    end.args = (values,)
    end.meta["desc"] = [descriptor for _, descriptor in kept]
    for node in list(graph.nodes):
        if node.op == "placeholder" and isinstance(node.meta["desc"], _TOKENS):
            graph.erase_node(node)


def _as_backward(graph: fx.Graph) -> None:
    """Mark all that follows from the backward: views of gradients at its end have no mark."""
    for node in graph.nodes:
        if node.op == "call_function" and any(is_backward(one) for one in node.all_input_nodes):
            node.meta["partitioner_tag"] = "is_backward"


_TOKENS = (
    ForwardTokenAOTInput,
    ForwardTokenAOTOutput,
    BackwardTokenAOTInput,
    BackwardTokenAOTOutput,
)

CHECK_OF_LINALG = torch.ops.aten._linalg_check_errors.default
"""Raises an error for what could not be inverted, solved or decomposed; returns nothing."""


def _lift_constants(
    module: fx.GraphModule, fake_mode: FakeTensorMode
) -> dict[str, tuple[fx.Node, torch.Tensor]]:
    """Turn tensors that a trace holds as attributes into placeholders (torch 2.13-2.15)."""
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    lifted: dict[str, tuple[fx.Node, torch.Tensor]] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(module, node.target)
        if isinstance(tensor, fx.GraphModule):
            continue
        if isinstance(tensor, torch.Generator):
            raise UnsupportedJointError(
                "numbers drawn from a torch.Generator of its own (draw them from torch's default "
                "one, or outside of the module)"
            )
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedJointError(f"an object that is no tensor ({type(tensor).__name__})")
        if node.target not in lifted:
            with graph.inserting_after(last):
                last = graph.placeholder(node.target)
            last.meta["val"] = fake_mode.from_tensor(tensor, static_shapes=True)
            lifted[node.target] = (last, tensor)
        node.replace_all_uses_with(lifted[node.target][0])
        graph.erase_node(node)
    return lifted


def _without_copies(graph: fx.Graph) -> None:
    """Read constants without copies: no op writes them; eager creates them anew (torch 2.13-2.15).

    Outputs of the module stay copies.
    """
    copies = [node for node in graph.nodes if node.target is torch.ops.aten.lift_fresh_copy.default]
    results = [node.meta["val"] for node in graph.output_node().all_input_nodes] if copies else []
    returned = {storage_key(value) for value in results if value.layout == torch.strided}
    for node in copies:
        if storage_key(node.meta["val"]) not in returned:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _fold_numbers(graph: fx.Graph) -> None:
    """Inline numbers that ops return, such as sequence lengths."""
    for node in reversed(graph.nodes):
        number = node.meta.get("val")
        if node.op == "call_function" and isinstance(number, int):

            def fold(operand: fx.Node, node: fx.Node = node, number: int = number) -> Any:
                return number if operand is node else operand

            for user in list(node.users):
                user.args = fx.map_arg(user.args, fold)
                user.kwargs = fx.map_arg(user.kwargs, fold)
            graph.erase_node(node)


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
        case TangentAOTInput(output=InputMutationAOTOutput()):
            raise UnsupportedJointError("a forward that writes a parameter")
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
    """Tell whether a joint graph's node was traced during the backward (torch 2.13-2.15)."""
    return node.meta.get("partitioner_tag") == "is_backward"


def boxed(graph: fx.Graph) -> Callable[[list[Any]], Any]:
    """Compile a graph to a function that empties its list of arguments as it starts.

    The list holds the only references to the arguments, so each is freed at its last use.
    """
    graph.set_codegen(_BoxedCodeGen())
    module = fx.GraphModule({}, graph)
    return noted(module, module.forward)
