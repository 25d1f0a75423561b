"""Residual branches of a forward, ``x + f(x)``: their beginnings, inputs and ends.

They are looked up in a record of the forward, not in the code: sums of two tensors of one shape, of
which one is computed from the other by way of a parameter. A second forward with a larger batch
shows what depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import nn

from memplan.analysis.calls import FunctionCall, Key, Record, Scope
from memplan.analysis.residuals import ADDITIONS

SUMS: Final = ADDITIONS | {torch.Tensor.add_}


@dataclass(frozen=True)
class Entry:
    """An argument through which what depends on the batch enters a branch.

    Attributes:
        place: among the leaves of the call's arguments.
        dim: the batch dimension.
    """

    place: int
    dim: int


@dataclass(frozen=True)
class Branch:
    """A branch ``x + f(x)``.

    Attributes:
        name: FQN of the module that makes the sum.
        total: the sum.
        stream: number of its argument that is x; 0 or 1.
        dim: the batch dimension.
        entries: by call, arguments that get a part of the batch if f does.
        inside: numbers of the calls of f.
        number: of the sum, among all calls.
    """

    name: str
    total: Key
    stream: int
    dim: int
    entries: Mapping[Key, tuple[Entry, ...]]
    inside: frozenset[int]
    number: int


@dataclass(frozen=True)
class Expected:
    """Arguments of a call, with a batch and with one that is larger by one.

    Attributes:
        key: the call.
        branch: the sum of the branch that it belongs to, if any.
        given: shapes of tensors, and numbers.
        larger: the same with the larger batch.
    """

    key: Key
    branch: Key | None
    given: tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]
    larger: tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]

    def shapes(self, missing: int) -> list[tuple[int, ...]]:
        """Shapes with a batch that lacks samples."""
        pairs = zip(self.given[0], self.larger[0], strict=True)
        return [
            tuple(a - (b - a) * missing for a, b in zip(one, other, strict=True))
            for one, other in pairs
        ]

    def numbers(self, missing: int) -> tuple[float, ...]:
        """Numbers with a batch that lacks samples."""
        pairs = zip(self.given[1], self.larger[1], strict=True)
        return tuple(a - (b - a) * missing for a, b in pairs)


@dataclass(frozen=True)
class Branches:
    """The residual branches of a forward.

    Attributes:
        found: the branches, in order.
        expected: of calls inside branches, and in the modules that make the sums.
        blocked: reasons why sums that look like residual branches are none, by module name.
    """

    found: tuple[Branch, ...]
    blocked: Mapping[str, str] = field(default_factory=dict)
    expected: tuple[Expected, ...] = ()


class _Blocked(Exception):
    """The reason why a sum is no residual branch."""


def find_branches(model: nn.Module, record: Record, larger: Record, batch_size: int) -> Branches:
    """The residual branches of a forward; of nested ones the innermost.

    Args:
        model: the model.
        record: of its forward.
        larger: of a forward with a batch larger by one.
        batch_size: of the first.
    """
    finder = _Finder(model, record, larger, batch_size)
    found: list[Branch] = []
    blocked: dict[str, str] = {}
    for number, call in enumerate(record.calls):
        stream = finder.stream_of(number)
        if stream is None:
            continue
        try:
            inside = finder.inside(number, stream)
            if not finder.uses_parameter(inside) or any(one.number in inside for one in found):
                continue
            found.append(finder.branch(number, stream, inside))
        except _Blocked as reason:
            blocked.setdefault(call.key[0], str(reason))
    return Branches(tuple(found), blocked, tuple(finder.expected(found)))


class _Finder:
    def __init__(self, model: nn.Module, record: Record, larger: Record, batch_size: int) -> None:
        self.record, self.batch_size = record, batch_size
        self.calls = record.calls
        self.larger = {call.key: call for call in larger.calls}
        self.parameters = {name for name, _ in model.named_parameters()}
        self.readers: dict[int, list[int]] = {}
        for number, call in enumerate(self.calls):
            for one in call.given:
                self.readers.setdefault(one.tensor[0], []).append(number)
        self.returned = {one.tensor[0] for one in record.returned}

    def stream_of(self, number: int) -> int | None:
        """Number of the argument that is the stream, if the call adds a stream and a change."""
        call = self.calls[number]
        if call.function not in SUMS or len(call.given) != 2 or call.constants:
            return None
        one, other = call.given
        if one.shape != other.shape or len(one.shape) < 2 or one.name or other.name:
            return None
        for place, (stream, change) in enumerate(((one, other), (other, one))):
            if stream.tensor[0] != change.tensor[0] and self._reaches(
                stream.tensor[0], change.tensor[0]
            ):
                return place
        return None

    def _reaches(self, start: int, end: int) -> bool:
        return any(number == start for number in self._before(end, start))

    def _before(self, end: int, start: int) -> Iterator[int]:
        """Calls that a call is computed from, back to another."""
        stack, seen = [end], {end}
        while stack:
            number = stack.pop()
            yield number
            if number < 0 or number == start:
                continue
            for one in self.calls[number].given:
                source = one.tensor[0]
                if source not in seen and (source >= start or start < 0):
                    seen.add(source)
                    stack.append(source)

    def inside(self, number: int, stream: int) -> frozenset[int]:
        """The calls that lead from the stream to the change."""
        given = self.calls[number].given
        start, end = given[stream].tensor[0], given[1 - stream].tensor[0]
        inside: set[int] = set()
        for one in sorted(self._before(end, start)):
            if one >= 0 and any(
                source.tensor[0] == start or source.tensor[0] in inside
                for source in self.calls[one].given
            ):
                inside.add(one)
        return frozenset(inside)

    def uses_parameter(self, inside: frozenset[int]) -> bool:
        """Tell whether one of the calls takes a parameter."""
        return any(one.name in self.parameters for n in inside for one in self.calls[n].given)

    def branch(self, number: int, stream: int, inside: frozenset[int]) -> Branch:
        """The branch that ends with a sum.

        Raises:
            _Blocked: if it cannot be run on a part of the batch.
        """
        call = self.calls[number]
        inside = self._with_sides(call, inside)
        for one in inside:
            others = set(self.readers.get(one, ())) - inside - {number}
            if one in self.returned or any(self.calls[n].results for n in others):
                raise _Blocked("what its branch computes is used elsewhere as well")
        dim = self._batch_dim(call, call.given[stream].place)
        if dim is None:
            raise _Blocked("the sum does not depend on the size of the batch")
        entries: dict[Key, list[Entry]] = {}
        for one in sorted(inside | self._questions(number, stream, inside)):
            for given in self.calls[one].given:
                if given.tensor[0] in inside or given.name:
                    continue
                at = self._batch_dim(self.calls[one], given.place)
                if at is not None:
                    entries.setdefault(self.calls[one].key, []).append(Entry(given.place, at))
        return Branch(
            name=call.key[0],
            total=call.key,
            stream=stream,
            dim=dim,
            entries={key: tuple(found) for key, found in entries.items()},
            inside=inside,
            number=number,
        )

    def expected(self, branches: Sequence[Branch]) -> Iterator[Expected]:
        """Arguments of the calls that a size could leak to."""
        inside = {number: one.total for one in branches for number in one.inside}
        totals = {one.number for one in branches}
        scopes = {self.calls[number].key[:2] for number in totals}
        for number, call in enumerate(self.calls):
            other = self.larger.get(call.key)
            is_near = number in inside or call.key[:2] in scopes
            if not is_near or number in totals or other is None or not call.results:
                continue
            sizes, theirs = _sizes(call), _sizes(other)
            is_alike = list(map(len, sizes[0])) == list(map(len, theirs[0]))
            if is_alike and len(sizes[1]) == len(theirs[1]):
                yield Expected(call.key, inside.get(number), sizes, theirs)

    def _with_sides(self, total: FunctionCall, inside: frozenset[int]) -> frozenset[int]:
        """Add what modules inside compute of the batch from other tensors (cross attention)."""
        own = self._own_scopes(total, inside)
        found, stack = set(inside), list(inside)
        while stack:
            for given in self.calls[stack.pop()].given:
                source = given.tensor[0]
                if source < 0 or source in found or own.isdisjoint(self.calls[source].scopes):
                    continue
                if self._depends_on_batch(self.calls[source]):
                    found.add(source)
                    stack.append(source)
        return frozenset(found)

    def _own_scopes(self, total: FunctionCall, inside: frozenset[int]) -> set[Scope]:
        """Calls of modules between the stream and the sum."""
        scopes = {scope for one in inside for scope in self.calls[one].scopes}
        return scopes - set(total.scopes)

    def _depends_on_batch(self, call: FunctionCall) -> bool:
        other = self.larger.get(call.key)
        return other is None or other.results != call.results

    def _questions(self, number: int, stream: int, inside: frozenset[int]) -> set[int]:
        """Calls that return no tensor (shapes, ...), on the way from the stream to the sum."""
        total = self.calls[number]
        start = total.given[stream].tensor[0]
        own = self._own_scopes(total, inside)
        return {
            one
            for one in range(max(start, -1) + 1, number)
            if not self.calls[one].results
            and (
                not own.isdisjoint(self.calls[one].scopes)
                or (self.calls[one].scopes == total.scopes and self._asks(one, start))
            )
        }

    def _asks(self, number: int, start: int) -> bool:
        return any(one.tensor[0] == start for one in self.calls[number].given)

    def _batch_dim(self, call: FunctionCall, place: int) -> int | None:
        """The batch dimension of an argument, or None."""
        other = self.larger.get(call.key)
        if other is None or other.function != call.function:
            raise _Blocked("with another batch its module does something else")
        shape = next(one.shape for one in call.given if one.place == place)
        theirs = next((one.shape for one in other.given if one.place == place), torch.Size())
        if len(shape) != len(theirs):
            raise _Blocked("with another batch its module does something else")
        differing = [dim for dim, size in enumerate(shape) if size != theirs[dim]]
        if not differing:
            return None
        (dim, *others) = differing
        if others or (shape[dim], theirs[dim]) != (self.batch_size, self.batch_size + 1):
            raise _Blocked("the batch is no dimension of its own in what its branch reads")
        return dim


def _sizes(call: FunctionCall) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    return tuple(tuple(one.shape) for one in call.given), call.numbers
