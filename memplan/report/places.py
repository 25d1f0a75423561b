"""Where the bytes of one moment are: by module, and by op and line."""

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
    """A module, or several that differ by a number in their name alone.

    Attributes:
        path: FQN, with "*" for such a number; "" is the whole model.
        names: the FQNs.
        nbytes: by category, children included.
        children: by path.
    """

    path: str
    names: set[str] = field(default_factory=set)
    nbytes: Counter[str] = field(default_factory=Counter)
    children: dict[str, Place] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Of all categories."""
        return self.nbytes.total()


def by_module(trace: MemoryTrace, event: int) -> Mapping[str, Mapping[str, int]]:
    """Bytes by category of each module itself; "" is what belongs to none."""
    totals: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for resident in trace.residents:
        totals[resident.name.rpartition(".")[0]][resident.category] += resident.nbytes
    for block in trace.live(event):
        totals[block.module][block.category] += block.nbytes
    return totals


def by_line(trace: MemoryTrace, event: int) -> list[Group]:
    """Blocks that are alive, and residents made at a known line; alike together, largest first."""
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
    """An FQN with "*" in the place of each number."""
    return _NUMBER.sub("*", name)


def tree(modules: Mapping[str, Mapping[str, int]]) -> Place:
    """Modules with what is inside them; those that differ by a number alone as one."""
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
    """Places that are nothing but their only child left out."""
    children = [_without_links(child) for child in place.children.values()]
    if place.path and len(children) == 1 and children[0].total == place.total:
        return children[0]
    return replace(place, children={child.path: child for child in children})


def largest(root: Place, most: int) -> list[tuple[Place, str, int]]:
    """So many places, the largest opened first; a place stands before what is inside it.

    Each with its path from the place that it stands under, and how deep it is.
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
