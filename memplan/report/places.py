"""The places of the bytes alive at one moment: modules, and ops with their lines."""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from memplan.ir.memory_trace import MemoryTrace
from memplan.report.schema import Group

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


@dataclass
class Place:
    """A module, or several whose names differ only by a number.

    Attributes:
        path: FQN, with "*" for that number; "" is the whole model.
        names: the FQNs.
        nbytes: bytes by category, children included.
        children: children by path.
    """

    path: str
    names: set[str] = field(default_factory=set)
    nbytes: Counter[str] = field(default_factory=Counter)
    children: dict[str, Place] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return self.nbytes.total()


def by_module(trace: MemoryTrace, event: int) -> Mapping[str, Mapping[str, int]]:
    """Bytes by category of each module itself; "" collects those of no module."""
    totals: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for resident in trace.residents:
        totals[resident.name.rpartition(".")[0]][resident.category] += resident.nbytes
    for block in trace.live(event):
        totals[block.module][block.category] += block.nbytes
    return totals


def by_line(trace: MemoryTrace, event: int) -> list[Group]:
    """Blocks alive and residents of known origin; equal ones grouped, the largest first."""
    alike: defaultdict[tuple[str, str, str, str], list[tuple[int, str]]] = defaultdict(list)
    for block in trace.live(event):
        key = (block.category, block.op, merged(block.module), block.source)
        alike[key].append((block.nbytes, block.module))
    for resident in trace.residents:
        if resident.source or resident.op:
            module = resident.name.rpartition(".")[0]
            key = (resident.category, resident.op, merged(module), resident.source)
            alike[key].append((resident.nbytes, module))
    groups = [
        Group(
            nbytes=sum(nbytes for nbytes, _ in blocks),
            count=len(blocks),
            category=category,
            op=op,
            module=path if len({module for _, module in blocks}) > 1 else blocks[0][1],
            source=source,
        )
        for (category, op, path, source), blocks in alike.items()
    ]
    return sorted(groups, key=lambda group: (-group.nbytes, group.module, group.op))


def merged(name: str) -> str:
    """An FQN with each number replaced by "*"."""
    return _NUMBER.sub("*", name)


def tree(modules: Mapping[str, Mapping[str, int]]) -> Place:
    """A tree of modules; those whose names differ only by a number are merged."""
    root = Place("")
    for name, nbytes in modules.items():
        place = root
        place.nbytes.update(nbytes)
        parts = name.split(".") if name else []
        for end in range(1, len(parts) + 1):
            inner = ".".join(parts[:end])
            place = place.children.setdefault(merged(inner), Place(merged(inner)))
            place.names.add(inner)
            place.nbytes.update(nbytes)
    return _without_links(root)


def _without_links(place: Place) -> Place:
    """The tree without places whose only child holds all their bytes."""
    children = [_without_links(child) for child in place.children.values()]
    if place.path and len(children) == 1 and children[0].total == place.total:
        return children[0]
    return replace(place, children={child.path: child for child in children})


def largest(root: Place, most: int) -> list[tuple[Place, str, int]]:
    """The places to show, at most ``most``, picked by size; a parent comes before its children.

    Each comes with its path relative to its parent, and its depth.
    """
    chosen: set[str] = set()
    waiting = [(-place.total, place.path, place) for place in root.children.values()]
    heapq.heapify(waiting)
    while waiting and len(chosen) < most:
        _, path, place = heapq.heappop(waiting)
        chosen.add(path)
        for child in place.children.values():
            heapq.heappush(waiting, (-child.total, child.path, child))
    return _in_order(root, chosen, 0)


def _in_order(place: Place, chosen: set[str], depth: int) -> list[tuple[Place, str, int]]:
    ordered: list[tuple[Place, str, int]] = []
    for child in _sorted(place.children.values()):
        if child.path in chosen:
            below = child.path[len(place.path) :].removeprefix(".")
            ordered += [(child, below, depth), *_in_order(child, chosen, depth + 1)]
    return ordered


def _sorted(places: Iterable[Place]) -> list[Place]:
    return sorted(places, key=lambda place: (-place.total, place.path))
