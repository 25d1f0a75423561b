"""A training step as immutable data: values, ops, and what each op costs. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property


class Role(str, Enum):
    """The purpose of a value."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    CONSTANT = "constant"
    TANGENT = "tangent"
    """An incoming gradient: the caller allocates it when the backward starts."""
    ACTIVATION = "activation"
    OUTPUT = "output"
    GRADIENT = "gradient"
    EXISTING_GRADIENT = "existing gradient"
    """A gradient that exists when the step starts, and is added to."""
    OPTIMIZER_STATE = "optimizer state"
    KEPT = "kept"
    """Stashed by a recovery instead of the value that it restores (an RNG state, a packed mask)."""

    @property
    def is_resident(self) -> bool:
        """Tell whether such a value is alive before the step and stays after it."""
        return self in _RESIDENT


_RESIDENT = frozenset(
    {
        Role.PARAMETER,
        Role.BUFFER,
        Role.INPUT,
        Role.CONSTANT,
        Role.EXISTING_GRADIENT,
        Role.OPTIMIZER_STATE,
    }
)


class Memory(str, Enum):
    """The memory that a value is in."""

    DEVICE = "device"
    """In the memory that the step is planned for."""
    HOST = "host"
    """In the host's memory, while the step is planned for a GPU's."""


class Phase(str, Enum):
    """The part of the step that an op belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Value:
    """One storage. Views of it are free and are not values of their own.

    Attributes:
        id: position in ``Program.values``; ids past its end belong to recoveries.
        nbytes: size of the storage.
        role: its purpose.
        producer: the op that makes it, or None for residents and tangents.
        module: FQN of the module whose code made it, "" for the root.
        source: ``file.py:line`` of the user's code, where known.
        name: a parameter's, buffer's or constant's FQN, else "".
        device: the memory that it is in.
    """

    id: int
    nbytes: int
    role: Role
    producer: int | None = None
    module: str = ""
    source: str = ""
    name: str = ""
    device: Memory = Memory.DEVICE

    @property
    def device_bytes(self) -> int:
        """The bytes that it takes of the memory that the step is planned for."""
        return self.nbytes if self.device is Memory.DEVICE else 0

    @property
    def host_bytes(self) -> int:
        """The bytes that it takes of the host's memory."""
        return self.nbytes - self.device_bytes


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel call.

    Attributes:
        id: position in ``Program.ops``; ids past its end belong to recoveries.
        target: overload name, such as ``aten.mm.default``.
        operands: values that it reads, each once.
        results: values that it allocates.
        phase: forward, backward or optimizer.
        is_random: whether it draws from a random generator.
        mutates: values that it writes in place.
        module: FQN of the module whose code ran it.
        source: ``file.py:line`` of the user's code, where known.
        signature: target, shapes, strides, dtypes and scalars: equal signatures cost the same.
        variant_of: for an op of a recovery, the captured op that it belongs to.
        may_overwrite: operands in whose memory it can write its result, with the same bits.
    """

    id: int
    target: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    phase: Phase = Phase.FORWARD
    is_random: bool = False
    mutates: tuple[int, ...] = ()
    module: str = ""
    source: str = ""
    signature: str = ""
    variant_of: int | None = None
    may_overwrite: tuple[int, ...] = ()

    def variant(
        self,
        id: int,
        target: str,
        operands: Iterable[int],
        results: Iterable[int],
        *,
        phase: Phase = Phase.BACKWARD,
        is_random: bool = False,
        settings: str = "",
        may_overwrite: tuple[int, ...] = (),
    ) -> Op:
        """An op that a pass adds for this one, taking its arguments or its result.

        Args:
            id: an id that no other op has.
            target: a key of the pass's ``lowerings``.
            operands: values that it reads.
            results: values that it allocates.
            phase: the phase of the step in which it runs.
            is_random: whether it draws random numbers.
            settings: what else its costs depend on, in words.
            may_overwrite: as in ``Op``.
        """
        name = f"{target}[{settings}]" if settings else target
        return Op(
            id=id,
            target=target,
            operands=tuple(dict.fromkeys(operands)),
            results=tuple(results),
            phase=phase,
            is_random=is_random,
            module=self.module,
            source=self.source,
            signature=f"{name}({self.signature})",
            variant_of=self.id,
            may_overwrite=may_overwrite,
        )


@dataclass(frozen=True)
class Program:
    """A training step: ops in captured order, forward before backward.

    Attributes:
        ops: in captured order; ``ops[i].id == i``.
        values: ``values[i].id == i``.
        outputs: values that the caller holds from their production to the end of the step
            (the forward's outputs and the gradients).
        num_fused: number of ops that run in the forward, those of the backward included, if the
            step is fused; None: those of the forward's phase.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    outputs: tuple[int, ...]
    num_fused: int | None = None

    def __post_init__(self) -> None:
        for index, op in enumerate(self.ops):
            assert op.id == index, f"op {op.id} stands at {index}"
        for index, value in enumerate(self.values):
            assert value.id == index, f"value {value.id} stands at {index}"
            assert value.device is Memory.DEVICE, f"value {index} is not where the step is"
        phases = [op.phase for op in self.ops[self.num_fused or 0 :]]
        assert phases == sorted(phases, key=list(Phase).index), "phases are out of order"

    @cached_property
    def num_forward(self) -> int:
        """Number of ops that run in the forward."""
        if self.num_fused is not None:
            return self.num_fused
        return sum(op.phase is Phase.FORWARD for op in self.ops)

    @cached_property
    def turn(self) -> int:
        """The first op that is not of the forward's phase: the incoming gradient is alive there."""
        turns = (op.id for op in self.ops if op.phase is not Phase.FORWARD)
        return next(turns, len(self.ops))

    @cached_property
    def end_of_forward(self) -> int:
        """The first op after which none is of the forward's phase."""
        return max((op.id + 1 for op in self.ops if op.phase is Phase.FORWARD), default=0)

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes alive before the step and after it."""
        return sum(value.nbytes for value in self.values if value.role.is_resident)

    @cached_property
    def held(self) -> frozenset[int]:
        """Values that the caller holds to the end of the step."""
        return frozenset(self.outputs)

    def with_real_sizes(self, costs: Costs) -> Program:
        """The program with each result at its observed size."""
        seen = {
            id: nbytes
            for op in self.ops
            for id, nbytes in zip(op.results, costs.by_op[op.id].result_bytes, strict=False)
        }
        values = [replace(value, nbytes=seen.get(value.id, value.nbytes)) for value in self.values]
        return replace(self, values=tuple(values))

    def in_blocks_of(self, granule_bytes: int) -> Program:
        """The program as held by an allocator whose blocks are multiples of this size."""
        values = [
            replace(value, nbytes=-(-value.nbytes // granule_bytes) * granule_bytes)
            for value in self.values
        ]
        return replace(self, values=tuple(values))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the structure: equal for equal steps, whatever the paths and file names."""
        digest = hashlib.sha256()
        for op in self.ops:
            row = (
                op.signature or op.target,
                op.operands,
                op.results,
                op.mutates,
                op.may_overwrite,
            )
            digest.update(json.dumps([*row, op.phase.value, op.is_random]).encode())
        for value in self.values:
            resident_bytes = value.nbytes if value.role.is_resident else None
            digest.update(json.dumps([resident_bytes, value.role.value, value.name]).encode())
        fused = [] if self.num_fused is None else [self.num_fused]
        digest.update(json.dumps([*self.outputs, *fused]).encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout that a kernel gave a result.

    Attributes:
        strides: in elements.
        dtype: its name, such as "float32".
        device: its device, such as "cpu" or "cuda:0".
    """

    strides: tuple[int, ...]
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class OpCost:
    """The cost of one run of an op.

    Attributes:
        seconds: wall time.
        flops: floating-point operations, 0 where unknown.
        workspace_bytes: what the kernel allocates and frees inside, at its peak, results apart.
        result_bytes: real bytes of each result's storage, where observed. They can be more than its
            elements: a kernel may shrink a result that it allocated in full.
        result_layouts: of the results, in order, where observed; None for what is recorded as a
            result, and is none.
        refusal: why the op could not be measured, or "".
    """

    seconds: float
    flops: int = 0
    workspace_bytes: int = 0
    result_bytes: tuple[int, ...] = ()
    result_layouts: tuple[Layout | None, ...] = ()
    refusal: str = ""


@dataclass(frozen=True)
class Costs:
    """The cost of every op, recoveries' ops included.

    Attributes:
        by_op: op id to cost.
        source: "measured" or "analytic", and on what.
    """

    by_op: Mapping[int, OpCost]
    source: str = "unknown"
    seconds: Mapping[int, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", {op: cost.seconds for op, cost in self.by_op.items()})
