"""A joint graph as a program: storages become values, kernels become ops, views vanish."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from memplan.capture.captured import Captured, Primal
from memplan.capture.flat import own_name
from memplan.capture.joint import Traced
from memplan.capture.node_info import (
    forward_origins,
    module_of,
    signature,
    source_of,
    target_name,
)
from memplan.capture.random_ops import is_random, schema_arguments
from memplan.capture.updates import update_parameter
from memplan.errors import CaptureError
from memplan.ir.program import Op, Phase, Program, Role, Value
from memplan.torch_internals import (
    CHECK_OF_LINALG,
    JointInput,
    OpOverload,
    is_backward,
    storage_key,
)

_ROLES: dict[str, Role] = {
    "parameter": Role.PARAMETER,
    "buffer": Role.BUFFER,
    "input": Role.INPUT,
    "constant": Role.CONSTANT,
    "gradient": Role.EXISTING_GRADIENT,
}

_FREE_TARGETS = frozenset({torch.ops.aten._assert_tensor_metadata.default})
"""Checks of the capture itself."""


def read(traced: Traced) -> Captured:
    """Read a joint graph as a program.

    Raises:
        CaptureError: naming an op that memplan cannot account for, and where it comes from.
    """
    try:
        return _Reader(traced).read()
    except (AssertionError, KeyError) as error:
        raise CaptureError(
            f"{traced.module_name}'s step cannot be read ({error!r}): it writes tensors in a way "
            "that memplan does not know"
        ) from error


class _Reader:
    """Reads a joint graph once, front to back."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.joint = traced.joint
        self.origins = forward_origins(self.joint.graph.nodes)
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.calls: dict[int, fx.Node] = {}
        self.storage: dict[fx.Node, int] = {}
        self.bases: dict[int, fx.Node] = {}
        self.by_key: dict[int, int] = {}

    def read(self) -> Captured:
        primals = tuple(
            self.primal(given) for given in self.joint.inputs if given.kind != "tangent"
        )
        tangents = tuple(
            (given.index, given.node) for given in self.joint.inputs if given.kind == "tangent"
        )
        for _, node in tangents:
            self.add_value(node, Role.TANGENT)
        self.add_existing_gradients()
        for node in self.in_order():
            self.call(node)
        self.check_no_stale_reads()
        outputs = self.output_nodes()
        gradients = self.gradient_nodes(primals)
        return Captured(
            program=self.program(outputs, [node for _, node in gradients]),
            graph=self.joint.graph,
            calls=self.calls,
            storage=self.storage,
            bases=self.bases,
            primals=primals,
            constants=self.joint.constants,
            outputs=outputs,
            output=self.traced.output,
            gradients=gradients,
            tangents=tangents,
            decisions=self.traced.decisions,
            attributes=self.traced.attributes,
            differences=self.traced.differences,
            needs_one=self.traced.needs_one,
        )

    def primal(self, given: JointInput) -> Primal:
        node = given.node
        assert given.kind != "tangent"
        name = own_name(given.name)
        self.add_value(node, _ROLES[given.kind], name)
        if given.kind == "input":
            return Primal(node, "input", index=given.index)
        return Primal(node, given.kind, name)

    def add_value(self, node: fx.Node, role: Role, name: str = "") -> None:
        key = storage_key(node.meta["val"])
        if key not in self.by_key:
            nbytes = node.meta["val"].untyped_storage().nbytes()
            self.by_key[key] = len(self.values)
            self.bases[len(self.values)] = node
            self.values.append(Value(len(self.values), nbytes, role, name=name))
        self.storage[node] = self.by_key[key]

    def add_existing_gradients(self) -> None:
        """Add existing gradients that this step adds nothing to."""
        added_to = sum(v.nbytes for v in self.values if v.role is Role.EXISTING_GRADIENT)
        others = self.traced.existing_gradient_bytes - added_to
        if others > 0:
            self.values.append(Value(len(self.values), others, Role.EXISTING_GRADIENT))

    def check_no_stale_reads(self) -> None:
        overwritten: set[int] = set()
        for op in self.ops:
            assert not overwritten.intersection(op.operands), "stale read"
            overwritten.update(op.mutates)

    def in_order(self) -> Iterable[fx.Node]:
        """The calls that matter, forward first unless the step is fused."""
        needed: set[fx.Node] = set()
        stack = [out.value for out in self.joint.outputs if isinstance(out.value, fx.Node)]
        calls = [node for node in self.joint.graph.nodes if node.op == "call_function"]
        stack += [node for node in calls if is_random(node) or _mutated(node) or _is_check(node)]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        kept = [node for node in calls if node in needed and node.target not in _FREE_TARGETS]
        return kept if self.traced.is_fused else sorted(kept, key=is_backward)

    def call(self, node: fx.Node) -> None:
        """Read one call: an op, or a view of an existing value."""
        mutated = _mutated(node)
        tensors = [] if mutated or _is_check(node) else _tensors(node.meta.get("val"))
        if tensors is None:
            raise CaptureError(
                f"{self.traced.module_name}'s step computes something other than tensors by "
                f"{node.target} (at {source_of(node) or 'an unknown line'}); unsupported"
            )
        if "mkldnn" in target_name(node):
            raise CaptureError(f"{node.target} hands on what cannot be measured; unsupported")
        new = {storage_key(tensor) for tensor in tensors} - self.by_key.keys()
        if node.target is operator.getitem or (not new and not mutated and not _is_check(node)):
            self.storage[node] = self.by_key[storage_key(tensors[0])] if tensors else -1
            if node.target is operator.getitem and self.values[self.storage[node]].role in (
                Role.ACTIVATION,
                Role.GRADIENT,
            ):
                self.bases.setdefault(self.storage[node], node)
            return
        self.add_op(node, self.distinct(node, tensors), mutated)

    def distinct(self, node: fx.Node, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """An op's results, one for each storage. Only equal tensors may share one."""
        first: dict[int, torch.Tensor] = {}
        for tensor in tensors:
            other = first.setdefault(storage_key(tensor), tensor)
            same = (tensor.shape, tensor.stride()) == (other.shape, other.stride())
            if storage_key(tensor) in self.by_key or not same:
                raise CaptureError(f"{node.target} returns tensors that share memory; unsupported")
        return list(first.values())

    def add_op(self, node: fx.Node, results: list[torch.Tensor], mutated: list[fx.Node]) -> None:
        id = len(self.ops)
        origin = node if node.meta.get("nn_module_stack") else None
        origin = origin or self.origins.get(node.meta.get("seq_nr", -1), node)
        module, source = module_of(origin), source_of(origin)
        operands = dict.fromkeys(self.storage[source] for source in node.all_input_nodes)
        made = []
        for tensor in results:
            value = Value(
                id=len(self.values),
                nbytes=tensor.untyped_storage().nbytes(),
                role=Role.ACTIVATION,
                producer=id,
                module=module,
                source=source,
            )
            self.by_key[storage_key(tensor)] = value.id
            self.values.append(value)
            made.append(value.id)
        if isinstance(node.meta["val"], torch.Tensor):
            self.storage[node] = made[0] if made else self.storage[mutated[0]]
            if made:
                self.bases[made[0]] = node
        self.calls[id] = node
        self.ops.append(
            Op(
                id=id,
                target=target_name(node),
                operands=tuple(operands),
                results=tuple(made),
                phase=Phase.BACKWARD if is_backward(node) else Phase.FORWARD,
                is_random=is_random(node),
                mutates=tuple(self.storage[target] for target in mutated),
                module=module,
                source=source,
                signature=signature(node),
                may_overwrite=self.overwritable(node, results),
            )
        )

    def overwritable(self, node: fx.Node, results: list[torch.Tensor]) -> tuple[int, ...]:
        """Values in whose memory a call can write its only result, element by element."""
        if len(results) != 1:
            return ()
        return tuple(
            self.storage[operand]
            for position in node.meta.get("in_place", ())
            if isinstance(operand := node.args[position], fx.Node)
            and _fills_alike(operand.meta["val"], results[0])
            and [self.storage[n] for n in node.all_input_nodes].count(self.storage[operand]) == 1
        )

    def output_nodes(self) -> tuple[fx.Node, ...]:
        outputs = sorted(
            (output for output in self.joint.outputs if output.kind == "output"),
            key=lambda output: int(str(output.of)),
        )
        assert all(isinstance(output.value, fx.Node) for output in outputs)
        return tuple(output.value for output in outputs if isinstance(output.value, fx.Node))

    def gradient_nodes(self, primals: tuple[Primal, ...]) -> tuple[tuple[int, fx.Node], ...]:
        position = {primal.node: index for index, primal in enumerate(primals)}
        return tuple(
            (position[output.of], output.value)
            for output in self.joint.outputs
            if output.kind in ("gradient", "accumulated")
            and isinstance(output.value, fx.Node)
            and isinstance(output.of, fx.Node)
        )

    def program(self, outputs: Iterable[fx.Node], gradients: Iterable[fx.Node]) -> Program:
        roles: dict[int, Role] = {self.storage[node]: Role.OUTPUT for node in outputs}
        roles |= {self.storage[node]: Role.GRADIENT for node in gradients}
        held = {id: role for id, role in roles.items() if self.values[id].role is Role.ACTIVATION}
        used_up = {
            self.storage[argument]: Role.GRADIENT
            for node in self.calls.values()
            if node.target is update_parameter
            for argument in node.args[1:]
            if isinstance(argument, fx.Node)
        }
        roles = {**used_up, **held}
        values = tuple(
            replace(value, role=roles.get(value.id, value.role)) for value in self.values
        )
        return Program(tuple(self.ops), values, tuple(sorted(held)), self.num_fused())

    def num_fused(self) -> int | None:
        """The number of ops a fused step runs in the forward: all before the first accumulation."""
        if not self.traced.is_fused:
            return None
        later = (
            op.id
            for op in self.ops
            if any(self.values[id].role is Role.EXISTING_GRADIENT for id in op.mutates)
        )
        return next(later, len(self.ops))


def _fills_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are laid out alike, and fill their storages."""
    nbytes = one.numel() * one.element_size()
    return (
        (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        and one.device == other.device
        and one.untyped_storage().nbytes() == other.untyped_storage().nbytes() == nbytes
    )


def _tensors(value: object) -> list[torch.Tensor] | None:
    """The tensors that an op returns, or None if it returns something else."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        if not all(isinstance(item, torch.Tensor | int | None) for item in value):
            return None
        return [item for item in value if isinstance(item, torch.Tensor)]
    return None


def _is_check(node: fx.Node) -> bool:
    """Tell whether a call may raise an error and does nothing else."""
    return node.target is CHECK_OF_LINALG


def _mutated(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory a call writes."""
    target = node.target
    if target is update_parameter:
        return [argument for argument in node.args[:1] if isinstance(argument, fx.Node)]
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return []
    arguments = schema_arguments(node)
    written = [
        arguments.get(argument.name)
        for argument in target._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [node for node in written if isinstance(node, fx.Node)]
