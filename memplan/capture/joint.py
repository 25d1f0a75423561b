"""Tracing of a module's forward and backward into one graph, and rewrites of that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from memplan.capture.accumulate import accumulate
from memplan.capture.cuda_emulation import as_on_cuda
from memplan.capture.draws import draws_as_eager
from memplan.capture.dropout import dropout_as_eager
from memplan.capture.explain import explain, is_data_dependent
from memplan.capture.flat import Differentiable, Flat, Output, own_name
from memplan.capture.hooks import harmless_hooks
from memplan.capture.input_guards import Decision, decide
from memplan.capture.isolation import ONE_AT_A_TIME, unchanged_randomness, without_meta
from memplan.capture.module_state import unchanged_attributes, unchanged_tensors
from memplan.capture.provenance import origins
from memplan.capture.python_state import Attribute
from memplan.capture.recurrent import OneLayerAtATime, without_flat_weights
from memplan.capture.relaid import Layouts, relaying, remember_calls
from memplan.capture.sample import Sample
from memplan.capture.unsupported import refuse_after, refuse_before, refused_inside
from memplan.errors import CaptureError, MemplanError
from memplan.torch_internals import (
    Joint,
    JointInput,
    Relay,
    UnsupportedJointError,
    asking_for_lists,
    by_compiled_kernels,
    copy_joint,
    is_backward,
    questions_about_tracing,
    shapes_as_eager,
    storage_key,
    trace_joint,
    without_autocast,
    without_checkpointing,
    without_checks_of_values,
    without_idle_moves,
    without_log_of_failures,
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A reason why the captured step may differ from the untouched module's.

    Attributes:
        is_certain: whether it does differ, by rounding, or only may.
        reason: in words.
        is_warned_of: whether it needs more than a note in the plan.
    """

    is_certain: bool
    reason: str
    is_warned_of: bool = False


@dataclass(frozen=True)
class Traced:
    """A step as a joint graph, before it is read as a program.

    Attributes:
        joint: forward and backward in one graph.
        output: the output of the module.
        decisions: values that the forward asked for; the trace holds for these alone.
        attributes: Python state; the trace holds for it alone.
        differences: ways in which the step may differ from the untouched module's.
        module_name: the class of the module, for messages.
        existing_gradient_bytes: of the gradients that existed when it was traced.
        is_fused: whether ops of the backward run in the forward, in the order of the graph.
        needs_one: in a fused step, why the gradient that arrives at the loss must be 1; or "".
    """

    joint: Joint
    output: Output
    decisions: tuple[Decision, ...]
    attributes: tuple[Attribute, ...]
    differences: tuple[Difference, ...]
    module_name: str
    existing_gradient_bytes: int
    is_fused: bool = False
    needs_one: str = ""


def trace(
    module: nn.Module,
    sample: Sample,
    differentiable: Differentiable = None,
    is_for_cuda: bool = False,
    look: Callable[[], object] | None = None,
    *,
    layouts: Mapping[str, Layouts] | None = None,
) -> Traced:
    """Trace one training step of a module, in its present mode, for this sample.

    With ``is_for_cuda``, attention and autocast are traced as a CUDA device would run them. Before
    each attempt ``look`` is called; code in it that asks whether it is traced gets the attempt's
    answer. Results are laid out as ``layouts`` says, by the call, and else as torch predicts.

    All random states and the modules' attributes are left unchanged.

    Raises:
        CaptureError: naming what cannot be captured, and where in the user's code it is.
    """
    refuse_before(module, sample)
    with (
        ONE_AT_A_TIME,
        without_meta(module, sample) as given,
        torch.inference_mode(False),
        torch.enable_grad(),
        unchanged_randomness(),
        unchanged_tensors(module),
        unchanged_attributes(module),
        OneLayerAtATime() as recurrent,
        as_on_cuda(given) if is_for_cuda else contextlib.nullcontext(),
        by_compiled_kernels(),
        asking_for_lists(),
        shapes_as_eager(),
        without_checkpointing(module),
        without_checks_of_values() as has_left_out_checks,
        without_flat_weights(),
        without_idle_moves(),
        without_log_of_failures(),
        _explained(module),
    ):
        flat = Flat(module, given, differentiable)
        with without_autocast():  # which the backward is not under
            joint, asked = _trace(
                flat, given, look or (lambda: None), relaying(layouts) if layouts else None
            )
    remember_calls(joint.graph)
    refuse_after(joint)
    draws_as_eager(joint.graph)
    dropout_as_eager(joint.graph)
    assert flat.seen is not None
    existing = [parameter.grad for parameter in module.parameters()]
    return Traced(
        joint=own_gradients(accumulate(_copy_back(_forget_running_statistics(joint)), module)),
        output=flat.seen,
        decisions=tuple(flat.decisions or ()),
        attributes=flat.reads.attributes(flat.changed),
        differences=_differences(
            joint, recurrent.seen, flat.changed, asked, lacks_checks=has_left_out_checks()
        ),
        module_name=type(module).__name__,
        existing_gradient_bytes=sum(
            gradient.untyped_storage().nbytes() for gradient in existing if gradient is not None
        ),
    )


def _trace(
    flat: Flat, sample: Sample, look: Callable[[], object], relay: Relay | None
) -> tuple[Joint, set[str]]:
    """Trace what eager runs or, if that fails, what the model does when it is traced.

    Returns the joint graph, and the lines that asked whether they are traced and were told yes.
    """
    try:
        with questions_about_tracing(answer=False) as asked:
            look()
            with refused_inside(flat.wrapped), harmless_hooks(flat.wrapped):
                return _trace_decided(flat, sample.tensors(), relay), set()
    except Exception:
        if not asked:
            raise
        flat.decisions = None
        with contextlib.suppress(Exception), questions_about_tracing(answer=True) as asked:
            look()
            with refused_inside(flat.wrapped), harmless_hooks(flat.wrapped):
                return _trace_decided(flat, sample.tensors(), relay), asked
        raise


def _trace_decided(flat: Flat, tensors: Sequence[torch.Tensor], relay: Relay | None) -> Joint:
    """Trace directly or, if values of tensors are asked for, compute them first and trace again."""
    try:
        with origins(flat.wrapped):
            joint = trace_joint(flat, tensors, relay)
    except Exception as error:
        if not is_data_dependent(error):
            raise
        buffers = {own_name(name): buffer for name, buffer in flat.named_buffers()}
        flat.decisions = decide(flat, tensors, buffers)
        with origins(flat.wrapped):
            joint = trace_joint(flat, tensors, relay)
    return joint


@contextlib.contextmanager
def _explained(module: nn.Module) -> Iterator[None]:
    try:
        yield
    except MemplanError:
        raise
    except UnsupportedJointError as error:
        raise CaptureError(f"{type(module).__name__}'s step has {error}; unsupported") from error
    except Exception as error:
        raise CaptureError(explain(error, module)) from error


def _differences(
    joint: Joint,
    recurrent: set[str],
    changed: Mapping[str, bool],
    asked: set[str],
    *,
    lacks_checks: bool,
) -> tuple[Difference, ...]:
    """Differences between the captured step and what eager runs."""
    found = []
    if recurrent:
        kinds = ", ".join(sorted(recurrent))
        reason = f"the recurrent kernels ({kinds}) are captured as other ops than the module runs"
        found.append(Difference(True, reason))
    if any(map(_is_cudnn_batch_norm, joint.graph.nodes)):
        reason = (
            "batch norm is captured as torch's own kernel, and the untouched module runs cuDNN's, "
            "which rounds otherwise"
        )
        found.append(Difference(True, reason))
    if torch.is_autocast_cache_enabled() and any(map(_is_cast_again, joint.inputs)):
        reason = (
            "autocast casts a weight that is used more than once in every use; the untouched "
            "module casts it once and sums its gradients in 16 bits"
        )
        found.append(Difference(True, reason))
    if any(map(_is_product, joint.graph.nodes)):
        reason = (
            "the gradient of a product is captured as it is where an element is zero; the "
            "untouched module divides the product by each element where none is, which rounds "
            "otherwise"
        )
        found.append(Difference(True, reason))
    if lacks_checks:
        reason = (
            "torch.distributions and gaussian_nll_loss do not check the values of their arguments "
            "in a planned step"
        )
        found.append(Difference(False, reason))
    if changed:
        reason = (
            f"the forward changes attributes of its modules ({', '.join(sorted(changed))}); a "
            "planned step does in every call what it did in the first, and leaves them alone"
        )
        found.append(Difference(False, reason, is_warned_of=not all(changed.values())))
    if asked:
        reason = (
            f"the model's code asks whether it is traced ({', '.join(sorted(asked))}), and may "
            "then compute the same in another way; memplan.compare shows whether it does"
        )
        found.append(Difference(False, reason))
    return tuple(found)


def _is_cudnn_batch_norm(node: fx.Node) -> bool:
    """Tell whether a node is batch norm's backward in training, which eager runs by cuDNN."""
    return (
        node.target is torch.ops.aten.native_batch_norm_backward.default
        and bool(node.args[7])
        and node.meta["val"][0].device.type == "cuda"
        and torch.backends.cudnn.enabled
    )


def _is_product(node: fx.Node) -> bool:
    """Tell whether a call multiplies elements of what needs a gradient."""
    return node.target in _PRODUCTS and any(is_backward(user) for user in _users(node.args[0]))


def _users(operand: object) -> Iterable[fx.Node]:
    return operand.users if isinstance(operand, fx.Node) else ()


_PRODUCTS = (torch.ops.aten.prod.default, torch.ops.aten.prod.dim_int)


def _is_cast_again(given: JointInput) -> bool:
    """Tell whether the forward casts a parameter from 32 to 16 bits more than once."""
    casts = [
        node
        for node in given.node.users
        if node.target is torch.ops.aten._to_copy.default and not is_backward(node)
    ]
    halves = [node for node in casts if node.meta["val"].dtype.itemsize == 2]
    return given.kind == "parameter" and len(halves) > 1


def rewrite(traced: Traced, rewrites: Iterable[Callable[[fx.Graph], None]]) -> Traced:
    """Apply rewrites, in order, to a copy of the joint graph."""
    joint = copy_joint(traced.joint)
    end = joint.graph.output_node()
    # The output node refers to what the step returns, so that replacements reach it.
    values: list[Any] = [output.value for output in joint.outputs]
    end.args = (values,)
    for one in rewrites:
        one(joint.graph)
    joint.graph.lint()
    assert isinstance(end.args[0], list)
    pairs = zip(joint.outputs, end.args[0], strict=True)
    outputs = tuple(replace(output, value=value) for output, value in pairs)
    return replace(traced, joint=replace(joint, outputs=outputs))


def _forget_running_statistics(joint: Joint) -> Joint:
    """Drop running statistics from batch norm's backward in training, which never reads them.

    Left in, they would be saved, although the forward overwrites them.
    """
    for node in joint.graph.nodes:
        if node.target is torch.ops.aten.native_batch_norm_backward.default and node.args[7]:
            node.args = (*node.args[:3], None, None, *node.args[5:])
    return joint


def _copy_back(joint: Joint) -> Joint:
    """Write new contents of buffers and inputs back at the end of the forward."""
    graph = joint.graph
    last_forward = [n for n in graph.nodes if n.op == "call_function" and not is_backward(n)][-1:]
    anchor = last_forward[0] if last_forward else [i.node for i in joint.inputs][-1]
    for output in joint.outputs:
        if output.kind != "mutation":
            continue
        assert isinstance(output.of, fx.Node) and isinstance(output.value, fx.Node)
        with graph.inserting_after(anchor):
            copy = graph.call_function(torch.ops.aten.copy_.default, (output.of, output.value))
        copy.meta = {**output.value.meta, "val": output.of.meta["val"]}
        anchor = copy
    return replace(joint, outputs=tuple(o for o in joint.outputs if o.kind != "mutation"))


def own_gradients(joint: Joint) -> Joint:
    """Give each gradient a storage of its own, in its parameter's layout.

    Autograd takes over such a gradient, and copies any other; done here, the copy is part of the
    program.
    """
    seen = {storage_key(given.node.meta["val"]) for given in joint.inputs}
    outputs = []
    for output in joint.outputs:
        node = output.value
        if output.kind == "gradient" and isinstance(node, fx.Node):
            assert isinstance(output.of, fx.Node)
            of = output.of.meta["val"]
            if storage_key(node.meta["val"]) in seen or not _same_layout(node.meta["val"], of):
                node = _clone_like(joint.graph, node, of)
            seen.add(storage_key(node.meta["val"]))
        outputs.append(replace(output, value=node))
    return replace(joint, outputs=tuple(outputs))


def _same_layout(gradient: torch.Tensor, of: torch.Tensor) -> bool:
    pairs = zip(gradient.shape, gradient.stride(), of.stride(), strict=True)
    return all(size == 1 or mine == theirs for size, mine, theirs in pairs)


def _clone_like(graph: fx.Graph, gradient: fx.Node, of: torch.Tensor) -> fx.Node:
    layout = torch.contiguous_format
    if not of.is_contiguous() and of.dim() == 4:
        layout = torch.channels_last
    anchor = gradient
    if gradient.op == "placeholder":
        anchor = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(anchor):
        clone = graph.call_function(
            torch.ops.aten.clone.default, (gradient,), {"memory_format": layout}
        )
    value = gradient.meta["val"].clone(memory_format=layout)
    clone.meta = {**gradient.meta, "val": value, "partitioner_tag": "is_backward"}
    return clone
