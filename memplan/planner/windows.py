"""A program within a budget as a mixed-integer program: liveness and restores.

Time is cut where some captured ops run; a window reaches from one of these runs to the next. Binary
variables say which values are alive while the op at its start runs, and which restores run in the
window (compare R, S and FREE of Jain et al., "Checkmate", MLSys 2020,
https://arxiv.org/abs/1910.02653). With a few cuts this is a relaxation: bytes count at the cuts
alone. With a cut at every op it covers every schedule of these ops in this order, except for the
bytes while restores run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.ir.schedule import Restore, Run, Stash
from memplan.planner.account import Kind
from memplan.planner.milp import Answer, Milp
from memplan.planner.problem import Problem

_UNIT = 1000.0
"""Rows of bytes are scaled so that the budget is this many units."""

_Term = tuple[int, float]


class Windows:
    """The variables and rows of a problem.

    Attributes:
        milp: the program, which minimises the seconds of restores.
        live: (window, value) to whether the value is alive while the op at its start runs.
        again: (window, op) to whether the restore runs in it.
        over: (window, value) to whether the op at its start writes over the value.
    """

    def __init__(self, problem: Problem, target: int, cuts: Sequence[int]) -> None:
        self.problem = problem
        self.target = target
        self.cuts = tuple(cuts)
        self.milp = Milp()
        self.unit = _UNIT / max(target, 1)
        self.made_at = {v: op.id for op in problem.program.ops for v in op.results}
        self.made_at |= problem.producer
        self.recoveries = [
            r for r in problem.recoveries if not problem.program.held.issuperset(r.values)
        ]
        self.restores: dict[int, list[int]] = {}
        for recovery in self.recoveries:
            for value in recovery.values:
                ops = self.restores.setdefault(value, [])
                if value not in problem.program.held and recovery.restore_op.id not in ops:
                    ops.append(recovery.restore_op.id)
        self.made_after = {v for op in problem.stashed_after for v in problem.results[op]}
        self.live: dict[tuple[int, int], int] = {}
        self.again: dict[tuple[int, int], int] = {}
        self.over: dict[tuple[int, int], int] = {}
        self.needed = [self._needed_from(cut) for cut in self.cuts]
        for window in range(len(self.cuts)):
            self._variables(window)
        self._stashes()
        for window in range(len(self.cuts)):
            self._availability(window)
            self._bytes(window)

    def _stop(self, window: int) -> int:
        """The captured op at which a window ends."""
        following = (*self.cuts, self.problem.num_ops)
        return following[window + 1]

    def _needed_from(self, cut: int) -> list[int]:
        """Values made before a cut that may be read at or after it."""
        problem = self.problem
        needed = set(problem.program.held)
        stack = [v for op in range(cut, problem.num_ops) for v in problem.operands[op]]
        while stack:
            value = stack.pop()
            if value in needed:
                continue
            needed.add(value)
            for op in self.restores.get(value, ()):
                stack.extend(problem.operands[op])
        return sorted(v for v in needed if self.made_at[v] < cut)

    def _variables(self, window: int) -> None:
        problem, cut = self.problem, self.cuts[window]
        operands = problem.operands[cut]
        for value in self.needed[window]:
            is_there = value in problem.program.held or value in operands
            self.live[window, value] = self.milp.variable(0.0, 1.0 if is_there else 0.0)
            for op in self.restores.get(value, ()):
                is_over = op in problem.latest and cut >= problem.latest[op]
                if (window, op) not in self.again and not is_over:
                    self.again[window, op] = self.milp.variable(problem.op_seconds[op])
        offered = problem.may_overwrite.get(cut, ())
        for value in offered:
            self.over[window, value] = self.milp.variable()
        if len(offered) > 1:
            self.milp.at_most(1.0, [(self.over[window, value], 1.0) for value in offered])

    def _stashes(self) -> None:
        """Run each recovery's stash once, if the recovery is used at all."""
        for recovery in self.recoveries:
            if recovery.stash_op is None:
                continue
            is_used = self.milp.variable(self.problem.op_seconds[recovery.stash_op.id])
            for (_, op), variable in self.again.items():
                if op == recovery.restore_op.id:
                    self.milp.at_least(0.0, [(is_used, 1.0), (variable, -1.0)])

    def available(self, window: int, value: int) -> list[_Term]:
        """Terms whose sum is at least 1 if a value is there in a window, after its first op."""
        terms = [(self.live[window, value], 1.0)]
        if (window, value) in self.over:
            terms.append((self.over[window, value], -1.0))
        ops = [op for op in self.restores.get(value, ()) if (window, op) in self.again]
        return terms + [(self.again[window, op], 1.0) for op in ops]

    def _availability(self, window: int) -> None:
        """Require that what is read in a window, or alive at the next, is there."""
        problem = self.problem
        for op in range(self.cuts[window] + 1, self._stop(window)):
            for value in problem.operands[op]:
                if (window, value) in self.live:
                    self.milp.at_least(1.0, self.available(window, value))
        for (when, op), variable in list(self.again.items()):
            if when != window:
                continue
            for value in problem.operands[op]:
                if (window, value) in self.live:
                    terms = [*self.available(window, value), (variable, -1.0)]
                    self.milp.at_least(0.0, terms)
        if window + 1 < len(self.cuts):
            for value in self.needed[window + 1]:
                if (window, value) in self.live:
                    after = (self.live[window + 1, value], -1.0)
                    self.milp.at_least(0.0, [*self.available(window, value), after])

    def _bytes(self, window: int) -> None:
        """Bound the bytes while the op at the start of a window runs."""
        nbytes, cut = self.problem.nbytes, self.cuts[window]
        terms = [
            (self.live[window, value], nbytes[value] * self.unit)
            for value in self.needed[window]
            if nbytes[value]
        ]
        # A stash is made directly before the op, if it does not read its results.
        terms += [
            (self.live[window + 1, kept], nbytes[kept] * self.unit)
            for kept, made_by in self.problem.producer.items()
            if made_by == cut and (window + 1, kept) in self.live and kept not in self.made_after
        ]
        terms += [
            (self.over[window, value], -nbytes[value] * self.unit)
            for value in self.problem.may_overwrite.get(cut, ())
        ]
        self.milp.at_most((self.target - self._fixed(cut, cut)) * self.unit, terms)

    def _fixed(self, op: int, time: int) -> int:
        """Bytes that a call takes besides those alive."""
        is_backward = time >= self.problem.program.turn
        return self.problem.call_bytes[op] + is_backward * self.problem.tangent_bytes

    def restore_once(self) -> None:
        """Allow each restore in one window only."""
        by_op: dict[int, list[int]] = {}
        for (_, op), variable in self.again.items():
            by_op.setdefault(op, []).append(variable)
        for variables in by_op.values():
            self.milp.at_most(1.0, [(variable, 1.0) for variable in variables])

    def order(self, op: int) -> int:
        """A sort key: restores of a window run in the order in which values were first made."""
        return min(self.made_at[value] for value in self.problem.results[op])

    def bound_restore(self, window: int, op: int) -> None:
        """Bound the bytes while a restore runs: its operands and results, and what is needed later.

        Only for windows of one op.
        """
        problem = self.problem
        later = [k for when, k in self.again if when == window and self.order(k) > self.order(op)]
        runs = self.again[window, op]
        fixed = self._fixed(op, self.cuts[window] + 1)
        own_results = set(problem.results[op])
        known = [*self.needed[window], *problem.results[self.cuts[window]]]
        known += [kept for kept, at in problem.producer.items() if at == self.cuts[window]]
        terms: list[_Term] = []
        overs: list[_Term] = []
        most = 0.0
        for value in dict.fromkeys(known):
            if not problem.nbytes[value]:
                continue
            if value in own_results:
                # A value held to the end is not replaced.
                fixed += problem.nbytes[value] * (value in problem.program.held)
                continue
            size = problem.nbytes[value] * self.unit
            most += size
            needed = [self.again[window, k] for k in later if value in problem.operands[k]]
            if (window + 1, value) in self.live:
                needed.append(self.live[window + 1, value])
            if value in problem.operands[op]:
                fixed += problem.nbytes[value]
                if value in problem.may_overwrite.get(op, ()):
                    over = self.milp.variable()
                    overs.append((over, -size))
                    for variable in needed:
                        self.milp.at_most(1.0, [(over, 1.0), (variable, 1.0)])
                continue
            is_alive = self.milp.variable(is_integer=False)
            terms.append((is_alive, size))
            made_later = [
                (self.again[window, k], 1.0) for k in self.restores.get(value, ()) if k in later
            ]
            for variable in needed:
                self.milp.at_least(0.0, [(is_alive, 1.0), (variable, -1.0), *made_later])
        if len(overs) > 1:
            self.milp.at_most(1.0, [(over, 1.0) for over, _ in overs])
        limit = (self.target - fixed) * self.unit
        self.milp.at_most(limit + 2 * most, [*terms, *overs, (runs, 2 * most)])

    def calls(self, answer: Answer) -> Iterator[tuple[Kind, int, int]]:
        """The calls of a solution: kind, op, and the captured op that each is for."""
        problem = self.problem
        restores: dict[int, list[int]] = {}
        for (window, op), variable in self.again.items():
            if answer.values[variable] > 0.5:
                restores.setdefault(self.cuts[window] + 1, []).append(op)
        used = {op for ops in restores.values() for op in ops}
        before: dict[int, list[int]] = {}
        after: dict[int, list[int]] = {}
        for recovery in self.recoveries:
            if recovery.stash_op is not None and recovery.restore_op.id in used:
                made_by = problem.producer[recovery.stashed[0].id]
                beside = after if recovery.stash_op.id in problem.stashed_after else before
                beside.setdefault(made_by, []).append(recovery.stash_op.id)
        for time in range(problem.num_ops):
            for op in sorted(restores.get(time, ()), key=self.order):
                yield Restore, op, time
            for op in before.get(time, ()):
                yield Stash, op, time
            yield Run, time, time
            for op in after.get(time, ()):
                yield Stash, op, time
