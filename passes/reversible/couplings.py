"""Invertible sums: two streams, each changed by a function of the other.

``y1 = x1 + F(x2); y2 = x2 + G(y1)`` (Dinh et al., "NICE", 2014, https://arxiv.org/abs/1410.8516;
Gomez et al., "The Reversible Residual Network", 2017, https://arxiv.org/abs/1707.04585) gives
``x2 = y2 - G(y1)``, then ``x1 = y1 - F(x2)``. A sum is such a coupling if its change can be
computed from what the forward still uses after the sum, and the stream that is added to is not
among that. The graph shows this however the model is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from operator import getitem

import networkx as nx
import torch
from torch import fx

from memplan.analysis import is_backward, memory_of
from memplan.passes.reversible.fixed_point import add_on_grid

SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, add_on_grid)
_PRODUCT = torch.ops.aten.mul.Tensor
_LONGEST = 4000
"""Limit on the calls of one function."""


@dataclass(frozen=True, slots=True)
class Coupling:
    """``total = stream + change``, or ``total = c * stream + change``.

    Attributes:
        total: the sum.
        stream: the operand that can be restored from it.
        change: the other operand.
        unscaled: ``stream`` without its scaling; itself if it has none.
        partners: memory of the values that the change is computed from.
        size: number of calls between these and the change.
    """

    total: fx.Node
    stream: fx.Node
    change: fx.Node
    unscaled: fx.Node
    partners: frozenset[int]
    size: int

    @property
    def coefficient(self) -> float:
        """The factor of the stream."""
        return 1.0 if self.unscaled is self.stream else float(str(self.stream.args[1]))


@dataclass(frozen=True, slots=True)
class Chain:
    """Couplings on the same two streams, in the order of the forward.

    Attributes:
        name: their place in the model.
        couplings: the couplings, of which at least two follow each other on one stream.
    """

    name: str
    couplings: tuple[Coupling, ...]


@dataclass(frozen=True, slots=True)
class Couplings:
    """The couplings of a graph.

    Attributes:
        chains: couplings that can be inverted.
        kept: reasons why other sums cannot, with the number of sums for each.
    """

    chains: tuple[Chain, ...]
    kept: Mapping[str, int]


PLAIN = "change what they are computed from (plain residuals, x + F(x))"
SHAPES = "change shape, layout or precision on the way"
TANGLED = "have a change that depends on their stream by another path"
ALONE = "are alone on their stream"


def find_couplings(graph: fx.Graph) -> Couplings:
    """The couplings of a joint graph's forward."""
    forward = _Forward(graph)
    kept: Counter[str] = Counter()
    found = []
    for node in forward.calls:
        if node.target in SUMS:
            outcome = forward.coupling(node)
            if isinstance(outcome, Coupling):
                found.append(outcome)
            elif outcome:
                kept[outcome] += 1
    chains = list(_chains(found))
    kept[ALONE] += len(found) - sum(len(chain.couplings) for chain in chains)
    tangled = _tangled(forward, chains)
    kept[TANGLED] += len(tangled)
    chains = [
        Chain(chain.name, tuple(c for c in chain.couplings if c.total not in tangled))
        for chain in chains
    ]
    return Couplings(tuple(chain for chain in chains if chain.couplings), +kept)


class _Forward:
    """The calls of a forward, and the last read of each memory."""

    def __init__(self, graph: fx.Graph) -> None:
        self.calls = [n for n in graph.nodes if n.op == "call_function" and not is_backward(n)]
        self.index = {node: index for index, node in enumerate(self.calls)}
        self.base: dict[int, fx.Node] = {}
        self.last_read: dict[int, int] = {}
        for node in graph.nodes:
            key = memory_of(node)
            if key is not None:
                self.base.setdefault(key, node)
            if not is_backward(node):
                when = self.index.get(node, len(self.calls))
                for source in node.all_input_nodes:
                    read = memory_of(source)
                    if read is not None and read != key and not is_backward(source):
                        self.last_read[read] = when

    def coupling(self, node: fx.Node) -> Coupling | str:
        """The coupling of a sum; or why there is none; or "" if it does not resemble one."""
        operands = [operand for operand in node.args[:2] if isinstance(operand, fx.Node)]
        if len(operands) < 2:
            return ""
        if not node.meta["val"].is_floating_point() or node.meta["val"].dim() < 2:
            return ""
        found = [
            coupling
            for stream, change in permutations(operands)
            if (coupling := self.as_coupling(node, stream, change)) is not None
        ]
        if found:
            return min(found, key=lambda one: one.size)
        fit = [operand for operand in operands if self.fits(node, operand)]
        return PLAIN if fit else SHAPES

    def as_coupling(self, total: fx.Node, stream: fx.Node, change: fx.Node) -> Coupling | None:
        is_first = total.args[0] is stream
        if not is_first and total.kwargs.get("alpha", 1) != 1:
            return None
        if not self.fits(total, stream):
            return None
        unscaled = stream
        if stream.target is _PRODUCT and isinstance(stream.args[1], int | float):
            operand = stream.args[0]
            assert isinstance(operand, fx.Node)
            unscaled = operand if stream.args[1] and self.fits(total, operand) else stream
        reached = self.reach(total, change, {memory_of(stream), memory_of(unscaled)})
        if reached is None or not reached[0]:
            return None
        return Coupling(total, stream, change, unscaled, *reached)

    def fits(self, total: fx.Node, stream: fx.Node) -> bool:
        """Tell whether a stream has the sum's layout, fills its memory, and comes from the step."""
        if stream not in self.index:
            return False
        mine, sums = stream.meta["val"], total.meta["val"]
        base = self.base[memory_of(stream) or 0]
        nbytes = mine.numel() * mine.element_size()
        return (
            (mine.dtype, mine.shape, mine.stride()) == (sums.dtype, sums.shape, sums.stride())
            and base in self.index
            and (base is stream or _is_alias(base.meta["val"], mine))
            and mine.untyped_storage().nbytes() == nbytes
            and sums.untyped_storage().nbytes() == nbytes
        )

    def reach(
        self, total: fx.Node, change: fx.Node, streams: set[int | None]
    ) -> tuple[frozenset[int], int] | None:
        """The values read after the sum that a change is computed from, and the change's size.

        None if it is one of them itself, or computed from one of ``streams``, or from too much.
        """
        when = self.index[total]
        partners: set[int] = set()
        seen = {change}
        stack = [change]
        while stack:
            node = stack.pop()
            key = memory_of(node)
            if (key is not None and key in streams) or len(seen) > _LONGEST:
                return None
            if node not in self.index:
                continue
            if key is not None and self.last_read.get(key, -1) > when:
                if node is change:
                    return None
                partners.add(key)
                continue
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            stack.extend(new)
        return frozenset(partners), len(seen)

    def reads(self) -> Iterator[tuple[int, int]]:
        """Pairs of memory: a value, and a value read to compute it."""
        for key, base in self.base.items():
            if base not in self.index:
                continue
            maker = base.all_input_nodes[0] if base.target is getitem else base
            for source in maker.all_input_nodes:
                read = memory_of(source)
                if read is not None and read != key:
                    yield key, read


def _is_alias(base: torch.Tensor, other: torch.Tensor) -> bool:
    return (base.shape, base.stride()) == (other.shape, other.stride())


def _chains(found: Iterable[Coupling]) -> Iterator[Chain]:
    """Couplings that follow each other; without those whose stream is changed only once."""
    made_by = {memory_of(coupling.total): coupling for coupling in found}
    graph = nx.Graph()
    followed = set()
    for coupling in made_by.values():
        graph.add_node(coupling.total)
        before = made_by.get(memory_of(coupling.unscaled))
        if before is not None:
            followed.add(coupling.total)
            graph.add_edge(before.total, coupling.total)
        for partner in coupling.partners:
            other = made_by.get(partner)
            if other is not None and _alike(other.total, coupling.total):
                graph.add_edge(other.total, coupling.total)
    by_total = {coupling.total: coupling for coupling in made_by.values()}
    order = {total: position for position, total in enumerate(by_total)}
    for totals in nx.connected_components(graph):
        if followed.intersection(totals):
            couplings = tuple(by_total[total] for total in sorted(totals, key=order.__getitem__))
            yield Chain(_common_module(couplings), couplings)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta["val"].shape == other.meta["val"].shape)


def _common_module(couplings: Iterable[Coupling]) -> str:
    """The first and the last of the modules that compute the changes."""
    names = []
    for coupling in couplings:
        stack = coupling.change.meta.get("nn_module_stack") or {}
        path = [str(name) for name, _ in stack.values()]
        if path:
            names.append(path[-1].replace("L['self'].", ""))
    distinct = list(dict.fromkeys(names))
    return (
        " .. ".join(dict.fromkeys([distinct[0], distinct[-1]])) if distinct else "the root module"
    )


def _tangled(forward: _Forward, chains: Iterable[Chain]) -> set[fx.Node]:
    """Sums that cannot be inverted after all, because the inversion would need them first."""
    couplings = {c.total: c for chain in chains for c in chain.couplings}
    tangled: set[fx.Node] = set()
    while couplings:
        graph = nx.DiGraph(forward.reads())
        for coupling in couplings.values():
            for given in (coupling.stream, coupling.unscaled):
                graph.remove_edges_from(list(graph.out_edges(memory_of(given))))
        streams = {memory_of(c.unscaled) for c in couplings.values()}
        for coupling in couplings.values():
            total, stream = memory_of(coupling.total), memory_of(coupling.stream)
            if total not in streams:
                # What nothing restores is kept.
                graph.remove_edges_from(list(graph.out_edges(total)))
            graph.add_edges_from([(stream, total), (stream, memory_of(coupling.change))])
            if coupling.unscaled is not coupling.stream:
                graph.add_edge(memory_of(coupling.unscaled), stream)
        circular = {
            key
            for component in nx.strongly_connected_components(graph)
            if len(component) > 1
            for key in component
        }
        wrong = {total for total, c in couplings.items() if memory_of(c.stream) in circular}
        if not wrong:
            break
        tangled |= wrong
        couplings = {total: c for total, c in couplings.items() if total not in wrong}
    return tangled
