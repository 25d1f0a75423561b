"""Documents as tables, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from msgspec import UNSET

from memplan.report.schema import (
    Check,
    ChecksDocument,
    Choice,
    ChoicesDocument,
    ComparisonDocument,
    EstimateDocument,
    FrontierDocument,
    MeasuredStep,
    ProfileDocument,
    SolutionDocument,
    TechniqueRow,
)
from memplan.report.step_tables import categories_table, lines_table, modules_table
from memplan.tables import ALARM, Table, said_of_bits
from memplan.units import format_bytes

Tabled: TypeAlias = (
    ProfileDocument
    | EstimateDocument
    | FrontierDocument
    | ComparisonDocument
    | SolutionDocument
    | ChoicesDocument
    | ChecksDocument
)
"""Documents with tables here; a plan has its own, a difference is shown with both documents."""

_Rows: TypeAlias = list[tuple[str, ...]]

_PEAK = {"measured": "peak", "analytic": "peak, kernels' workspace apart"}
_MOST_KERNELS = 3
_BAR = 10


def tables_of(document: Tabled) -> list[Table]:
    """A document's tables."""
    match document:
        case ProfileDocument():
            found = _profile(document)
        case EstimateDocument():
            found = [_answer(document), *_step(document)]
        case FrontierDocument():
            found = [frontier_table(document)]
        case ComparisonDocument():
            found = [comparison_table(document)]
        case SolutionDocument():
            found = [_solution(document)]
        case ChoicesDocument():
            found = [_freed_by(document.choices), _kept_by(document.choices)]
        case ChecksDocument():
            found = [_checks(document.checks)]
    return found


def _step(document: ProfileDocument | EstimateDocument) -> list[Table]:
    (trace,) = document.traces
    return [
        categories_table(trace, _phases_line(document)),
        modules_table(trace),
        lines_table(trace),
    ]


def _profile(document: ProfileDocument) -> list[Table]:
    totals, *others = _step(document)
    if document.growth_bytes and document.growth_bytes > 0:
        grows = f" It leaves {format_bytes(document.growth_bytes)} more than there was before it."
        totals = replace(totals, footer=totals.footer + grows)
    return [totals, *others]


def _phases_line(document: ProfileDocument | EstimateDocument) -> str:
    """The peak of each phase and, where measured, its time."""
    times: dict[str, str] = {}
    whole = ""
    if isinstance(document, ProfileDocument):
        known = {one.name: one.seconds for one in document.phases if one.seconds is not None}
        times = {name: f" ({_milliseconds(seconds)})" for name, seconds in known.items()}
        whole = "" if times else f" A step takes {_milliseconds(document.step_s)}."
    peaks = [
        f"{one.name} {format_bytes(one.peak_bytes)}{times.get(one.name, '')}"
        for one in document.phases
    ]
    return f"The most in each phase: {', '.join(peaks)}.{whole}"


def _answer(document: EstimateDocument) -> Table:
    interval = f"{format_bytes(document.least_bytes)} to {format_bytes(document.most_bytes)}"
    rows: _Rows = [
        (_PEAK[document.costs], format_bytes(document.peak_bytes)),
        ("  between", interval),
        (f"memory of {document.device}", format_bytes(document.memory_bytes)),
        ("headroom", format_bytes(document.headroom_bytes)),
    ]
    if document.costs == "measured":
        notes = "Kernels were run one by one, the model was not."
    else:
        notes = "Nothing was run but shapes; kernels' workspace is bounded."
    if document.reserved_bytes is not None:
        reserved = f"{format_bytes(document.reserved_bytes)} (modelled, not verified)"
        rows.insert(2, ("  reserved", reserved))
        notes += " CUDA's own context, some hundred MiB, comes on top."
    if document.refusals:
        notes += f" Not measured: {'; '.join(document.refusals)}."
    return Table(
        f"The step {document.verdict}",
        ("estimated", ""),
        tuple(rows),
        frozenset({1}),
        frozenset({0, 1}),
        footer=notes,
    )


def comparison_table(document: ComparisonDocument) -> Table:
    """The original and the planned step side by side."""
    original, planned, plan = document.original, document.planned, document.plan
    peaks, residents = (
        (original.peak_bytes, planned.peak_bytes),
        (original.resident_bytes, planned.resident_bytes),
    )
    above = tuple(peak - resident for peak, resident in zip(peaks, residents, strict=True))
    before = {phase.name: phase.peak_bytes for phase in original.phases}
    times = (original.step_s, planned.step_s)
    rows: _Rows = [_bytes_row("peak memory", *peaks), _bytes_row("  above resident", *above)]
    rows += [
        _bytes_row(f"  in {one.name}", before.get(one.name), one.peak_bytes)
        for one in planned.phases
    ]
    rows += [
        _bytes_row(name, *both)
        for name, *both in (
            ("reserved by the allocator", original.reserved_bytes, planned.reserved_bytes),
            ("of the process on the device", original.process_bytes, planned.process_bytes),
        )
        if None not in both
    ]
    rows.append(("step time", *map(_milliseconds, times), f"{document.time_ratio:.3f}"))
    rows += _results(document)
    if plan.budget_bytes is not None:
        rows.append(("budget", "", format_bytes(plan.budget_bytes), ""))
    rows += [
        ("predicted peak", "", format_bytes(plan.peak_bytes), ""),
        ("measured - predicted", "", f"{planned.peak_bytes - plan.peak_bytes:+d} B", ""),
        ("predicted time", "", "", f"{plan.slowdown:.3f}"),
    ]
    headers = ("", "original", "planned", "planned / original")
    numbers = frozenset({1, 2, 3})
    return Table("One training step, measured", headers, tuple(rows), numbers, frozenset({3}))


def _results(document: ComparisonDocument) -> _Rows:
    """The results of both steps and whether they are equal, then an empty row."""
    losses = [_loss(one) for one in (document.original, document.planned)]
    error = document.max_gradient_error
    by = f" by {error:.1e}" if error is not None else ""
    gradients = said_of_bits(True) if document.gradients_equal else f"{ALARM}{by}"
    rows: _Rows = [
        ("loss", *losses, said_of_bits(document.loss_equal)),
        ("gradients", "", "", gradients),
        ("buffers", "", "", said_of_bits(document.buffers_equal)),
    ]
    # without an optimizer's update, equal parameters prove nothing
    if any(phase.name == "optimizer" for phase in document.planned.phases):
        rows.append(("updated parameters", "", "", said_of_bits(document.parameters_equal)))
    return [*rows, ("random state", "", "", said_of_bits(document.rng_equal)), ()]


def _loss(step: MeasuredStep) -> str:
    if step.loss is None:
        return "not finite"
    return "" if step.loss is UNSET else f"{step.loss:.6f}"


def _bytes_row(name: str, before: int | None, after: int | None) -> tuple[str, str, str, str]:
    first, second = ("" if nbytes is None else format_bytes(nbytes) for nbytes in (before, after))
    ratio = f"{after / before:.3f}" if before and after is not None else ""
    return name, first, second, ratio


def frontier_table(document: FrontierDocument) -> Table:
    """Plans by ascending peak, with the time of each."""
    most = max(plan.slowdown for plan in document.plans) - 1
    rows = []
    for plan in document.plans:
        above = plan.peak_bytes - plan.resident_bytes
        unplanned = plan.original_peak_bytes - plan.resident_bytes
        added = max(0.0, plan.slowdown - 1)
        rows.append(
            (
                format_bytes(plan.peak_bytes),
                format_bytes(above),
                f"{above / unplanned:.0%}" if unplanned else "",
                f"{plan.slowdown:.3f}x",
                str(plan.num_restores),
                "#" * round(_BAR * added / most) if most > 0 else "",
            )
        )
    headers = ("peak", "above resident", "share", "time", "ops run again", "time added")
    numbers = frozenset(range(5))
    return Table("What memory costs in time, predicted", headers, tuple(rows), numbers)


def techniques_table(ranked: Sequence[TechniqueRow]) -> Table:
    """Each technique's yield, in the order of their rank."""
    rows = [
        (
            one.name,
            format_bytes(one.peak_bytes),
            f"{one.slowdown:.3f}x",
            _yield(one),
            ", ".join(one.effects),
            "fits" if one.fits else "",
        )
        for one in ranked
    ]
    return Table(
        "What would make it fit",
        ("technique", "peak", "time", "saved per 1 %", "results", ""),
        tuple(rows),
        frozenset({1, 2, 3}),
        frozenset({0, 4}),
        footer="Each planned alone, as near to the budget as it comes; exact ones first.",
    )


def _yield(one: TechniqueRow) -> str:
    """Bytes saved per percent of slowdown."""
    percent = 100 * (one.slowdown - 1)
    if one.saved_bytes <= 0:
        return ""
    return format_bytes(int(one.saved_bytes / percent)) if percent > 0 else "free"


def _solution(document: SolutionDocument) -> Table:
    """The largest value untouched and planned, and the bytes on either side of the bound."""
    rows = []
    for name, solution in (("untouched", document.untouched), ("planned", document.planned)):
        tried = {int(number): nbytes for number, nbytes in solution.tried.items()}
        here = format_bytes(tried[solution.value]) if solution.value else ""
        more = min((number for number in tried if number > solution.value), default=0)
        above = format_bytes(tried[more]) if more else ""
        rows.append((name, str(solution.value), here, above, str(len(tried))))
    return Table(
        f"The largest {document.field} within {format_bytes(document.memory_bytes)}",
        ("step", document.field, "needs", "the next needs", "tried"),
        tuple(rows),
        frozenset({1, 2, 3, 4}),
        frozenset({1}),
        footer=f"Planned: at no more than {document.max_slowdown:g}x the predicted time.",
    )


def _freed_by(choices: Sequence[Choice]) -> Table:
    """The model as it is, and the bytes that each choice frees."""
    before, *others = choices
    rows: _Rows = [
        (before.name, format_bytes(before.trained_bytes), *map(format_bytes, _sizes(before))),
        (),
    ]
    for one in others:
        freed = (_freed(*pair) for pair in zip(_sizes(before), _sizes(one), strict=True))
        rows.append((one.name, format_bytes(one.trained_bytes), *freed))
    return Table(
        "What training less would free",
        ("choice", "trained", "gradients", "optimizer", "activations", "peak"),
        tuple(rows),
        frozenset({1, 2, 3, 4, 5}),
        frozenset({0}),
        footer="A name alone: that part frozen. Nothing is recomputed; budgets go below that.",
    )


def _sizes(one: Choice) -> tuple[int, ...]:
    return one.gradient_bytes, one.state_bytes, one.activation_bytes, one.peak_bytes


def _freed(before: int, after: int) -> str:
    """The change in bytes, signed."""
    if after > before:
        return f"+{format_bytes(after - before)}"
    return f"-{format_bytes(before - after)}" if after < before else "0 B"


def _kept_by(choices: Sequence[Choice]) -> Table:
    """The kernels that the remaining activations are saved for."""
    usual = _kept_for(choices[0])
    distinct = [choices[0], *(one for one in choices[1:] if _kept_for(one) != usual)]
    return Table(
        "What the activations that stay are kept for",
        ("choice", "kernels of the backward, and what each reads"),
        tuple((one.name, _kept_for(one)) for one in distinct),
        folded=frozenset({0, 1}),
        footer="What several kernels read counts for each. Choices not shown: as it is.",
    )


def _kept_for(choice: Choice) -> str:
    return ", ".join(
        f"{target.split('.')[-2] if '.' in target else target} {format_bytes(nbytes)}"
        for target, nbytes in [*choice.kept_for.items()][:_MOST_KERNELS]
    )


def _checks(checks: Sequence[Check]) -> Table:
    rows = tuple((one.name, "ok" if one.is_ok else "FAILS", one.text) for one in checks)
    return Table("memplan on this machine", ("", "", ""), rows, folded=frozenset({2}))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
