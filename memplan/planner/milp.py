"""Mixed-integer programs for the extra ``exact``; solved by HiGHS."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from memplan.errors import MemplanError

Terms = Iterable[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a solver.

    Attributes:
        bound: no solution has a lower objective; infinite if there is none.
        objective: of the best solution; infinite if none was found.
        values: of the variables in the best solution.
    """

    bound: float
    objective: float
    values: tuple[float, ...] = ()

    @property
    def is_optimal(self) -> bool:
        """Tell whether the solution is proven to be the best, within a thousandth of a percent."""
        return self.bound >= self.objective - 1e-5 * abs(self.objective)


class Milp:
    """Minimise a sum over variables between 0 and 1, under linear rows."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.least: list[float] = []
        self.is_integer: list[bool] = []
        self.rows: list[tuple[float, float, list[tuple[int, float]]]] = []

    def variable(self, cost: float = 0.0, least: float = 0.0, *, is_integer: bool = True) -> int:
        """Add a variable in [least, 1]; return its index."""
        self.costs.append(cost)
        self.least.append(least)
        self.is_integer.append(is_integer)
        return len(self.costs) - 1

    def at_least(self, low: float, terms: Terms) -> None:
        """Require the sum of (variable, factor) to be at least ``low``."""
        self.rows.append((low, math.inf, list(terms)))

    def at_most(self, high: float, terms: Terms) -> None:
        """Require the sum of (variable, factor) to be at most ``high``."""
        self.rows.append((-math.inf, high, list(terms)))

    def minimise(
        self, time_limit_s: float, gap: float, start: Mapping[int, float] | None = None
    ) -> Answer:
        """Solve, on one thread.

        Args:
            time_limit_s: after which the best bound and solution so far are returned.
            gap: relative gap between the two at which the search ends.
            start: values of some variables, from a solution that is known.

        Raises:
            MemplanError: if the extra ``exact`` is not installed.
        """
        highs = _highspy()
        solver = highs.Highs()
        options = {"output_flag": False, "threads": 1, "time_limit": time_limit_s}
        for name, value in {**options, "mip_rel_gap": gap, "random_seed": 0}.items():
            solver.setOptionValue(name, value)
        scale = 1e3 / max(max(self.costs, default=0.0), 1e-12)
        solver.passModel(self._model(highs, scale))
        if start is not None:
            solution = highs.HighsSolution()
            solution.col_value = [start.get(index, 0.0) for index in range(len(self.costs))]
            solver.setSolution(solution)
        solver.run()
        if solver.getModelStatus() == highs.HighsModelStatus.kInfeasible:
            return Answer(math.inf, math.inf)
        info = solver.getInfo()
        bound = max(0.0, float(info.mip_dual_bound)) / scale
        if not math.isfinite(info.objective_function_value) or info.primal_solution_status < 2:
            return Answer(bound, math.inf)
        values = tuple(solver.getSolution().col_value)
        return Answer(bound, float(info.objective_function_value) / scale, values)

    def _model(self, highs: Any, scale: float) -> Any:
        model = highs.HighsLp()
        model.num_col_, model.num_row_ = len(self.costs), len(self.rows)
        model.col_cost_ = np.array(self.costs) * scale
        model.col_lower_ = np.array(self.least)
        model.col_upper_ = np.ones(len(self.costs))
        kinds = highs.HighsVarType
        model.integrality_ = [
            kinds.kInteger if is_integer else kinds.kContinuous for is_integer in self.is_integer
        ]
        model.row_lower_ = np.array([low for low, _, _ in self.rows])
        model.row_upper_ = np.array([high for _, high, _ in self.rows])
        terms = [terms for *_, terms in self.rows]
        model.a_matrix_.format_ = highs.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.cumsum([0, *map(len, terms)]).astype(np.int32)
        flat = [term for row in terms for term in row]
        model.a_matrix_.index_ = np.array([index for index, _ in flat], dtype=np.int32)
        model.a_matrix_.value_ = np.array([factor for _, factor in flat], dtype=float)
        return model


def _highspy() -> Any:
    try:
        return importlib.import_module("highspy")
    except ImportError as error:
        raise MemplanError("this needs a solver: pip install 'memplan[exact]'") from error
