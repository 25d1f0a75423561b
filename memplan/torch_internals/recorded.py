"""Allocator events and the calls around them, as torch's profiler records them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import fx
from torch._C._profiler import _EventType, _RecordFunctionFast


@dataclass(frozen=True, slots=True)
class Enclosing:
    """A recorded call.

    Attributes:
        id: unique for each call.
        name: such as "aten::mm", "AddmmBackward0", or the text of a ``note``.
        sequence_number: autograd's number, which a forward op shares with its node; -1 if there is
            none.
    """

    id: int
    name: str
    sequence_number: int


@dataclass(frozen=True, slots=True)
class AllocatorEvent:
    """An allocation or a free of a block.

    Attributes:
        time_ns: its time.
        nbytes: negative for a free.
        address: the block's address.
        enclosing: the calls that were running, innermost first.
    """

    time_ns: int
    nbytes: int
    address: int
    enclosing: tuple[Enclosing, ...]


@dataclass(frozen=True)
class Recorded:
    """Allocator events, and the origins of autograd's nodes.

    Attributes:
        events: in order of time.
        makers: sequence number to the calls around the forward op that has it.
        marks: the time of each ``mark``, in ns.
    """

    events: tuple[AllocatorEvent, ...]
    makers: dict[int, tuple[Enclosing, ...]]
    marks: dict[str, int]


def note(text: str) -> AbstractContextManager[object]:
    """Context recorded as a call of this name (torch 2.13-2.15)."""
    return cast("AbstractContextManager[object]", _RecordFunctionFast(text))


_NOTE = "memplan@"
_WITHIN = "memplan@@"


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a torch function call.

    Attributes:
        module: FQN of the innermost running module.
        source: ``file.py:line`` of the user's code.
        function: the called function.
    """

    module: str = ""
    source: str = ""
    function: str = ""

    def as_note(self) -> str:
        """The name under which the call is recorded."""
        return f"{_NOTE}{self.module}\t{self.source}\t{self.function}"

    def as_note_within(self) -> str:
        """The same, for a module named within a planned one, whose note encloses it."""
        return f"{_WITHIN}{self.module}\t{self.source}\t{self.function}"

    @classmethod
    def of(cls, calls: Iterable[Enclosing]) -> Origin | None:
        """The innermost origin noted among calls."""
        inner: Origin | None = None
        for call in calls:
            if call.name.startswith(_WITHIN):
                inner = inner or cls(*call.name.removeprefix(_WITHIN).split("\t"))
            elif call.name.startswith(_NOTE):
                outer = cls(*call.name.removeprefix(_NOTE).split("\t"))
                return outer if inner is None else inner.within(outer)
        return inner

    def within(self, outer: Origin) -> Origin:
        """The origin with its module's name prefixed by that of ``outer``."""
        module = ".".join(name for name in (outer.module, self.module) if name)
        return Origin(module, self.source or outer.source, self.function)

    @staticmethod
    def is_noted_by(call: Enclosing) -> bool:
        """Tell whether a call is the note of an origin."""
        return call.name.startswith(_NOTE)


Note = Callable[[str], AbstractContextManager[object]]
"""Records the code inside under a name."""


class _Noting(threading.local):
    """A thread's current note for planned code, and whether code that uses it is running."""

    find: Callable[[], Note | None] = staticmethod(lambda: None)
    is_inside: bool = False


_NOTING = _Noting()


@contextmanager
def noting_planned(note: Note, is_on: Callable[[], bool]) -> Iterator[None]:
    """Context in which this thread's planned code notes origins of its calls while ``is_on``."""
    before, _NOTING.find = _NOTING.find, lambda: note if is_on() else None
    try:
        yield
    finally:
        _NOTING.find = before


def is_noting_planned() -> bool:
    """Tell whether planned code is running and notes the origins of its calls itself."""
    return _NOTING.is_inside


def noted(module: fx.GraphModule, compiled: Boxed) -> Boxed:
    """A graph's compiled code, or, where planned code is to be noted, the graph call by call.

    Both allocate and free alike: the list is emptied, and a value is freed at its last use
    (torch 2.13-2.15).
    """

    def run(arguments: list[Any]) -> Any:
        note = _NOTING.find()
        if note is None or _NOTING.is_inside:
            return compiled(arguments)
        given = [node for node in module.graph.nodes if node.op == "placeholder"]
        values = dict(zip(given, arguments, strict=True))
        arguments.clear()
        _NOTING.is_inside = True
        try:
            return _Noted(module, note).run(initial_env=values, enable_io_processing=False)
        finally:
            _NOTING.is_inside = False

    return run


Boxed = Callable[[list[Any]], Any]
"""Takes a list of arguments and empties it."""


class _Noted(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, note: Note) -> None:
        super().__init__(module)
        self.note = note
        self.extra_traceback = False  # errors keep their own text

    def run_node(self, node: fx.Node) -> Any:
        origin: Origin | None = node.meta.get("origin")
        with nullcontext() if origin is None else self.note(origin.as_note_within()):
            result = super().run_node(node)
        # Compiled code frees an unread result at once.
        return result if node.users or node.op == "output" else None


_MARK = "memplan!"


def mark(text: str) -> None:
    """Mark a moment in the record."""
    with note(f"{_MARK}{text}"):
        pass


def recorded(profile: torch.profiler.profile, device_type: str) -> Recorded:
    """The record of one type of device (torch 2.13-2.15)."""
    events = []
    makers: dict[int, tuple[Enclosing, ...]] = {}
    marks: dict[str, int] = {}
    for node, enclosing in _walk(profile):
        fields = node.extra_fields
        if node.tag == _EventType.Allocation and fields.device.type == device_type:
            size, address = int(fields.alloc_size), int(fields.ptr)
            events.append(AllocatorEvent(node.start_time_ns, size, address, enclosing))
        elif node.tag == _EventType.TorchOp and node.name.startswith(_MARK):
            marks[node.name.removeprefix(_MARK)] = node.start_time_ns
        elif node.tag == _EventType.TorchOp and fields.sequence_number >= 0:
            is_backward = any(call.name.startswith("autograd::engine") for call in enclosing)
            if not is_backward and not node.name.startswith("autograd::engine"):
                makers[fields.sequence_number] = enclosing
    events.sort(key=lambda event: event.time_ns)
    return Recorded(tuple(events), makers, marks)


def _walk(profile: torch.profiler.profile) -> Iterator[tuple[Any, tuple[Enclosing, ...]]]:
    """All nodes of the tree, each parent before its children, with the calls around them."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    roots = profile.profiler.kineto_results.experimental_event_tree()
    stack: list[tuple[Any, tuple[Enclosing, ...]]] = [(root, ()) for root in reversed(roots)]
    count = 0
    while stack:
        node, enclosing = stack.pop()
        yield node, enclosing
        if not node.children:
            continue
        if node.tag == _EventType.TorchOp:
            count += 1
            call = Enclosing(count, node.name, node.extra_fields.sequence_number)
            enclosing = (call, *enclosing)
        stack.extend((child, enclosing) for child in reversed(node.children))


@cache
def is_composite(name: str) -> bool:
    """Tell whether an op such as "aten::linear" only calls other ops (torch 2.13-2.15)."""
    namespace, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), short, None)
    if packet is None:
        return False
    names = [f"{name}.{overload}".removesuffix(".default") for overload in packet.overloads()]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    # Some overloads exist for scripts only.
    known = (each for each in names if torch._C._dispatch_has_kernel(each))
    return any(has_kernel(each, "CompositeImplicitAutograd") for each in known)
