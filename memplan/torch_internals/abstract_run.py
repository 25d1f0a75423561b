"""Allocator events of a step run on tensors without data."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from memplan.torch_internals.fake import NUMBERS, DispatchMode
from memplan.torch_internals.recorded import AllocatorEvent, Enclosing, Recorded
from memplan.torch_internals.state import OpOverload, storage_key


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's layout.

    Attributes:
        shape: its sizes.
        stride: in elements.
        offset: into the storage, in elements.
        dtype: its type.
        storage_bytes: size of its storage.
        device: its device.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    storage_bytes: int
    device: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The layout of a tensor."""
        return cls(
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
            tensor.dtype,
            int(tensor.untyped_storage().nbytes()),
            str(tensor.device),
        )


@dataclass(frozen=True)
class KernelCall:
    """A kernel call.

    Attributes:
        target: the kernel.
        args: its arguments, tensors as ``TensorSpec``.
        kwargs: its keyword arguments.
        blocks: the blocks allocated for its results, in order.
        result_bytes: bytes of all its results.
        with_grad: whether gradients were enabled: some kernels then save more for their backward.
    """

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    blocks: tuple[int, ...]
    result_bytes: int
    with_grad: bool

    @property
    def signature(self) -> str:
        """A key equal for calls that differ only in their data."""
        return f"call {self.target}({self.args!r}, {self.kwargs!r}, {self.with_grad})"


@dataclass(frozen=True)
class Followed:
    """A followed step.

    Attributes:
        recorded: its events, without kernels' workspace.
        calls: for each call of a kernel, the number of events before it, and the call.
        enclosing: the calls around each call.
    """

    recorded: Recorded
    calls: tuple[tuple[int, KernelCall], ...]
    enclosing: tuple[tuple[Enclosing, ...], ...]


class Following(DispatchMode):
    """Records the lifetime of every storage that an op allocates inside (torch 2.13-2.15).

    A number read from a tensor is taken to be that of a step long under way.
    """

    def __init__(self, granule_bytes: int = 1) -> None:
        super().__init__()
        self.granule_bytes = granule_bytes
        self.events: list[AllocatorEvent] = []
        self.calls: list[tuple[int, KernelCall]] = []
        self.call_enclosing: list[tuple[Enclosing, ...]] = []
        self.makers: dict[int, tuple[Enclosing, ...]] = {}
        self.marks: dict[str, int] = {}
        self._open: list[tuple[bool, Enclosing]] = []
        self._live: dict[int, tuple[int, int]] = {}
        self._ids = 0
        self._is_over = False

    def followed(self) -> Followed:
        """The record up to now; nothing is recorded afterwards."""
        self._is_over = True
        recorded = Recorded(tuple(self.events), self.makers, self.marks)
        return Followed(recorded, tuple(self.calls), tuple(self.call_enclosing))

    def block_of(self, tensor: torch.Tensor) -> int:
        """The address of the block that represents a tensor's memory; -1 if it is not tracked."""
        return self._live.get(storage_key(tensor), (-1, 0))[0]

    def mark(self, text: str) -> None:
        """Mark a moment."""
        self.marks[text] = time.perf_counter_ns()

    @contextlib.contextmanager
    def note(self, text: str) -> Iterator[None]:
        """Context recorded as a call of this name."""
        is_backward = torch._C._current_autograd_node() is not None
        self._open.append((is_backward, self._enclosing(text)))
        try:
            yield
        finally:
            self._open.pop()

    def _enclosing(self, name: str, sequence_number: int = -1) -> Enclosing:
        self._ids += 1
        return Enclosing(self._ids, name, sequence_number)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return NUMBERS.get(args[0].dtype, 1000.0)
        if func.namespace == "prim" or self._is_over:
            return func(*args, **kwargs)
        enclosing = self._context(func)
        over = _accumulated_into(func, args)
        result = _as_kernels_do(func, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {storage_key(tensor) for tensor in given}
        made = [
            leaf
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and storage_key(leaf) not in known
        ]
        if over is not None and storage_key(over) in self._live:
            self._take_over(over, result)
            made = []
        blocks = tuple(
            block for leaf in made for block in self._add(leaf.untyped_storage(), enclosing)
        )
        nbytes = sum(leaf.untyped_storage().nbytes() for leaf in made)
        spec_args, spec_kwargs = tree_map(_specified, (args, kwargs))
        with_grad = torch.is_grad_enabled()
        call = KernelCall(func, spec_args, spec_kwargs, blocks, nbytes, with_grad)
        self.calls.append((len(self.events), call))
        self.call_enclosing.append(enclosing)
        return result

    def _context(self, func: OpOverload) -> tuple[Enclosing, ...]:
        """The calls around a kernel, innermost first."""
        around = tuple(call for _, call in reversed(self._open))
        node = torch._C._current_autograd_node()
        if node is None:
            # The node of the running op was created just before.
            number = int(torch.autograd._get_sequence_nr()) - 1
            self.makers[number] = around
        else:
            name = str(node.name())
            engine = f"autograd::engine::evaluate_function: {name}"
            inside = [call for is_backward, call in reversed(self._open) if is_backward]
            outside = [call for is_backward, call in reversed(self._open) if not is_backward]
            around = (*inside, self._enclosing(engine, int(node._sequence_nr())), *outside)
        name = str(func.name())  # type: ignore[no-untyped-call]
        return (self._enclosing(name.partition(".")[0]), *around)

    def _add(self, storage: torch.UntypedStorage, enclosing: tuple[Enclosing, ...]) -> list[int]:
        """Record a storage if it is new; return its block."""
        key = storage._cdata
        if key in self._live:
            return []
        # An opaque storage has no size here, but has one in a real run.
        blocks = max(1, -(-storage.nbytes() // self.granule_bytes))
        nbytes = blocks * self.granule_bytes
        self._ids += 1
        self._live[key] = (self._ids, nbytes)
        self._happen(nbytes, self._ids, enclosing)
        weakref.finalize(storage, self._remove, key).atexit = False
        return [self._live[key][0]]

    def _take_over(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Hand one tensor's block over to another."""
        storage = new.untyped_storage()
        self._live[storage._cdata] = self._live.pop(storage_key(old))
        weakref.finalize(storage, self._remove, storage._cdata).atexit = False

    def _remove(self, key: int) -> None:
        if key not in self._live:
            return
        block, nbytes = self._live.pop(key)
        if not self._is_over:
            self._happen(-nbytes, block, tuple(call for _, call in reversed(self._open)))

    def _happen(self, nbytes: int, block: int, enclosing: tuple[Enclosing, ...]) -> None:
        self.events.append(AllocatorEvent(time.perf_counter_ns(), nbytes, block, enclosing))


def _as_kernels_do(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an op, as its kernel returns it where the prediction differs."""
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype is torch.float32:
        # The kernel accepts more dtypes than its stand-in.
        halves = [one.to(torch.bfloat16) for one in args[:2]]
        return func(*halves, *args[2:], **kwargs).to(torch.float32)
    result = func(*args, **kwargs)
    if func is torch.ops.aten.native_layer_norm_backward.default and result[0] is not None:
        return (result[0].contiguous(), *result[1:])
    return result


_UNSHARED = (4, 2)
"""References to a tensor, and to its storage, when only autograd's engine holds it and passes it
to an op that a mode sees."""


def _accumulated_into(func: OpOverload, args: tuple[Any, ...]) -> torch.Tensor | None:
    """The operand that a sum of gradients overwrites where no mode is active.

    Autograd's engine adds into a gradient that nothing else holds, except under a mode.
    """
    if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled():
        return None
    if torch._C._current_autograd_node() is None or len(args) != 2:
        return None
    one, other = args
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return None
    alike = (one.shape, one.dtype, one.is_contiguous()) == (other.shape, other.dtype, True)
    references = (
        one._use_count(),  # type: ignore[attr-defined]
        torch._C._storage_Use_Count(one.untyped_storage()._cdata),
    )
    return one if alike and references == _UNSHARED else None


def _specified(leaf: object) -> object:
    return TensorSpec.of(leaf) if isinstance(leaf, torch.Tensor) else leaf


def with_kernels(
    followed: Followed,
    workspace_bytes: Callable[[KernelCall], int],
    result_bytes: Callable[[KernelCall], tuple[int, ...] | None],
) -> Recorded:
    """The events with the kernels' real sizes.

    Args:
        followed: a followed step.
        workspace_bytes: what a call allocates and frees while it runs.
        result_bytes: what each of its results takes, or None where its layout determines it.
    """
    sizes: dict[int, int] = {}
    for _, call in followed.calls:
        seen = result_bytes(call)
        if seen is not None and len(seen) == len(call.blocks):
            sizes |= dict(zip(call.blocks, seen, strict=True))
    given = [_resized(event, sizes) for event in followed.recorded.events]
    events: list[AllocatorEvent] = []
    done = 0
    pairs = zip(followed.calls, followed.enclosing, strict=True)
    for number, ((position, call), enclosing) in enumerate(pairs):
        nbytes = workspace_bytes(call)
        if not nbytes:
            continue
        events += given[done:position]
        done = position
        when_ns = events[-1].time_ns if events else 0
        # No block has a negative address.
        events += [AllocatorEvent(when_ns, sign * nbytes, ~number, enclosing) for sign in (1, -1)]
    return replace(followed.recorded, events=(*events, *given[done:]))


def _resized(event: AllocatorEvent, sizes: Mapping[int, int]) -> AllocatorEvent:
    if event.address not in sizes:
        return event
    return replace(event, nbytes=int(math.copysign(sizes[event.address], event.nbytes)))
