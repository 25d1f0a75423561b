"""Results as data: one declaration of what is written, of its JSON schema, and of what is read.

``docs/json.md`` says more of the fields; ``docs/report.schema.json`` is made of this file, its
descriptions of these docstrings (``tests/support/schema_file.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from memplan.errors import MemplanError
from memplan.ir.memory_trace import CATEGORIES
from memplan.ir.schedule import Effect

SCHEMA_VERSION: Final = 1

PHASES = ("forward", "backward", "optimizer")


def _one_of(names: Sequence[str]) -> Meta:
    return Meta(pattern=f"^({'|'.join(names)})$", extra_json_schema={"enum": list(names)})


Bytes = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Ratio = Annotated[float, Meta(ge=0)]
Category = Annotated[str, _one_of(CATEGORIES)]
PhaseName = Annotated[str, _one_of(PHASES)]
PhaseOrEnd = Annotated[str, _one_of((*PHASES, "end"))]
Number = Annotated[str, Meta(pattern="^[1-9][0-9]*$")]


class UnreadableDocument(MemplanError, ValueError):
    """Not a document of memplan, or one of another version."""


class Peak(Struct, frozen=True, kw_only=True):
    """The place of a trace's peak.

    Attributes:
        phase: the phase of the step; "end" when all is freed.
        op: the op that makes it; empty where unknown.
        module: the module of the op; empty for the root, or where unknown.
        source: file:line; empty where unknown.
    """

    phase: PhaseOrEnd
    op: str
    module: str
    source: str


class ModuleBytes(Struct, frozen=True, kw_only=True):
    """Bytes of a module at the peak, those of its children not included.

    Attributes:
        module: its name in the model; empty for what belongs to none.
        categories: bytes by category.
    """

    module: str
    categories: dict[Category, Bytes]


class Group(Struct, frozen=True, kw_only=True):
    """Blocks of one category that the same op makes at the same line.

    Attributes:
        nbytes: bytes of all of them.
        count: number of blocks.
        category: their category.
        op: the op that made them; empty where unknown.
        module: the module of the op, with * for a number in which they differ.
        source: file:line; empty where unknown.
    """

    nbytes: Bytes
    count: Annotated[int, Meta(ge=1)]
    category: Category
    op: str
    module: str
    source: str


class Totals(Struct, frozen=True, kw_only=True):
    """The totals of a step.

    Attributes:
        peak_bytes: the most bytes at any time, residents included.
        resident_bytes: bytes alive before the step and after it.
        categories: bytes at the peak by category; together peak_bytes.
    """

    peak_bytes: Bytes
    resident_bytes: Bytes
    categories: dict[Category, Bytes]


class ExplainedTotals(Totals, frozen=True, kw_only=True):
    """The totals of a step.

    Attributes:
        unexplained_bytes: bytes at the peak of unknown origin; the category of that name.
    """

    unexplained_bytes: Bytes


class Trace(ExplainedTotals, frozen=True, kw_only=True):
    """The bytes alive over a step.

    Attributes:
        label: the traced step, such as "planned, measured".
        source: whether it was measured or predicted.
        peak: its place.
        modules: bytes at the peak by module.
        lines: blocks at the peak by op and line, the largest first.
        times_s: seconds from the start of the step, for each chosen event.
        phases: the phase of each event.
        series: bytes by category after each event.
    """

    label: str
    source: Literal["measured", "predicted"]
    peak: Peak
    modules: tuple[ModuleBytes, ...]
    lines: tuple[Group, ...]
    times_s: tuple[float, ...]
    phases: tuple[PhaseOrEnd, ...]
    series: dict[Category, tuple[Bytes, ...]]

    def __post_init__(self) -> None:
        if {len(self.times_s)} != {len(self.phases), *map(len, self.series.values())}:
            raise ValueError("times_s, phases and series of a trace differ in length")
        if any(after < before for before, after in pairwise(self.times_s)):
            raise ValueError("times_s of a trace go back")

    @property
    def totals(self) -> list[int]:
        """Bytes after each event."""
        return [sum(column) for column in zip(*self.series.values(), strict=True)]


class PhasePeak(Struct, frozen=True, kw_only=True):
    """A phase of the step.

    Attributes:
        name: name of the phase.
        peak_bytes: the most bytes in it.
    """

    name: PhaseName
    peak_bytes: Bytes


class TimedPhasePeak(PhasePeak, frozen=True, kw_only=True):
    """A phase of a measured step.

    Attributes:
        seconds: its time, the median of several steps; null where a whole script ran.
    """

    seconds: Seconds | None


class Live(Struct, frozen=True, kw_only=True):
    """A value that is alive at the peak.

    Attributes:
        nbytes: its size.
        category: its category.
        target: the op that made it.
        module: its module; empty for the root.
        source: file:line; empty where unknown.
    """

    nbytes: Bytes
    category: Category
    target: str
    module: str
    source: str


class OpAtPeak(Struct, frozen=True, kw_only=True):
    """The place of a plan's peak.

    Attributes:
        op: at the peak, with its module.
    """

    op: str


class PlanBody(Totals, frozen=True, kw_only=True):
    """The predictions of a plan.

    Attributes:
        original_peak_bytes: the peak with nothing recomputed.
        floor_bytes: no schedule of this step in this order has a lower peak.
        budget_bytes: the requested bound, if any.
        slowdown: predicted time over that with nothing recomputed.
        num_ops: number of ops of the step.
        num_restores: number of ops that run to restore something.
        phases: the phases of the step, in order.
        peak: its place.
        live: the largest values alive at the peak.
        costs_source: the source of times and workspace.
        effects: the effects on the results.
        passes: the techniques that took part.
        notes: further notes on the results.
    """

    original_peak_bytes: Bytes
    floor_bytes: Bytes
    budget_bytes: Bytes | None
    slowdown: Ratio
    num_ops: Count
    num_restores: Count
    phases: tuple[PhasePeak, ...]
    peak: OpAtPeak
    live: tuple[Live, ...]
    costs_source: str
    effects: tuple[Effect, ...]
    passes: tuple[str, ...]
    notes: tuple[str, ...]


class MeasuredStep(Struct, frozen=True, kw_only=True):
    """A measured step of a comparison.

    Attributes:
        peak_bytes: the most bytes at any time, residents included.
        resident_bytes: bytes alive before the step and after it.
        step_s: seconds of a step; the median of several.
        phases: the phases of the step, in order.
        device: the device that it ran on.
        reserved_bytes: the most that CUDA's caching allocator held; null on the CPU.
        process_bytes: GPU memory of the process by NVML; null on the CPU.
        host_bytes: resident set of the process.
        loss: of the step; null if it is not finite, missing in documents of earlier releases.
    """

    peak_bytes: Bytes
    resident_bytes: Bytes
    step_s: Seconds
    phases: tuple[PhasePeak, ...]
    device: str
    reserved_bytes: Bytes | None
    process_bytes: Bytes | None
    host_bytes: Bytes
    loss: float | UnsetType | None = UNSET


class TechniqueRow(Struct, frozen=True, kw_only=True):
    """A technique planned alone.

    Attributes:
        name: name of the technique.
        peak_bytes: the peak with it alone.
        saved_bytes: bytes below the unplanned peak.
        slowdown: predicted time over the unplanned.
        effects: the effects on the results.
        fits: whether its peak is within the budget.
    """

    name: str
    peak_bytes: Bytes
    saved_bytes: int
    slowdown: Ratio
    effects: tuple[Effect, ...]
    fits: bool


class SolvedValue(Struct, frozen=True, kw_only=True):
    """The largest value that fits.

    Attributes:
        value: 0 if not even the smallest does.
        tried: the peak of each value tried, in bytes.
    """

    value: Count
    tried: dict[Number, Bytes]


class Choice(Struct, frozen=True, kw_only=True):
    """The bytes that a step holds if parts are frozen or adapted.

    Attributes:
        name: the parts that are frozen or adapted.
        option: its value for --pass.
        trained_bytes: bytes of the trained parameters.
        gradient_bytes: bytes of their gradients.
        state_bytes: bytes of the optimizer's state.
        activation_bytes: bytes kept from the forward for the backward.
        peak_bytes: peak of the step.
        kept_for: kernels of the backward, and the bytes that each reads.
    """

    name: str
    option: str
    trained_bytes: Bytes
    gradient_bytes: Bytes
    state_bytes: Bytes
    activation_bytes: Bytes
    peak_bytes: Bytes
    kept_for: dict[str, Bytes]


class Check(Struct, frozen=True, kw_only=True):
    """A check of this machine.

    Attributes:
        name: name of the check.
        is_ok: whether it works.
        text: the result in words.
    """

    name: str
    is_ok: bool
    text: str


class StepDocument(ExplainedTotals, frozen=True, kw_only=True, tag_field="kind"):
    """A document that is about a step."""

    schema_version: Literal[1] = SCHEMA_VERSION


class ProfileDocument(StepDocument, frozen=True, kw_only=True, tag="profile"):
    """A measured step.

    Attributes:
        device: the device that it ran on.
        torch: version of torch.
        step_s: seconds of a step.
        growth_bytes: bytes at the end of a script's step less those at its start; null where a
            factory was profiled.
        phases: the phases of the step, in order.
        traces: bytes alive over the step.
    """

    device: str
    torch: str
    step_s: Seconds
    growth_bytes: int | None
    phases: tuple[TimedPhasePeak, ...]
    traces: tuple[Trace, ...]


class EstimateDocument(StepDocument, frozen=True, kw_only=True, tag="estimate"):
    """An estimate of an untouched step.

    Attributes:
        least_bytes: the peak is not below.
        most_bytes: the peak is not above.
        reserved_bytes: bytes that CUDA's caching allocator would hold, by a model that is not
            verified; null for the CPU.
        memory_bytes: the available memory.
        headroom_bytes: memory_bytes - most_bytes.
        verdict: whether the step fits.
        costs: whether kernels' workspace is bounded or measured.
        refusals: kernels that could not be measured, and why.
        device: the device of the estimate.
        torch: version of torch.
        phases: the phases of the step, in order.
        traces: bytes alive over the step.
    """

    least_bytes: Bytes
    most_bytes: Bytes
    reserved_bytes: Bytes | None
    memory_bytes: Bytes
    headroom_bytes: int
    verdict: Literal["fits", "may not fit", "does not fit"]
    costs: Literal["analytic", "measured"]
    refusals: tuple[str, ...]
    device: str
    torch: str
    phases: tuple[PhasePeak, ...]
    traces: tuple[Trace, ...]


class PlanDocument(PlanBody, frozen=True, kw_only=True, tag_field="kind", tag="plan"):
    """A planned step, predicted.

    Attributes:
        unexplained_bytes: 0, as every byte of a prediction has a name.
        traces: bytes alive over the step.
        techniques: with --techniques: each planned alone, as they are ranked.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    unexplained_bytes: Bytes
    traces: tuple[Trace, ...]
    techniques: tuple[TechniqueRow, ...] | UnsetType = UNSET


class FrontierDocument(StepDocument, frozen=True, kw_only=True, tag="frontier"):
    """Plans of a step.

    Attributes:
        original_peak_bytes: the peak with nothing recomputed.
        plans: by ascending peak.
    """

    original_peak_bytes: Bytes
    plans: Annotated[tuple[PlanBody, ...], Meta(min_length=1)]


class ComparisonDocument(StepDocument, frozen=True, kw_only=True, tag="comparison"):
    """A step measured untouched and planned.

    Attributes:
        original: the untouched step.
        planned: the planned step.
        plan: its predictions.
        time_ratio: planned over original, the median over rounds.
        is_exact: whether all of the following have the same bits.
        loss_equal: the loss has.
        gradients_equal: all gradients have.
        buffers_equal: all buffers have.
        parameters_equal: all parameters have, after the update if there is one.
        rng_equal: the random states have.
        max_gradient_error: the largest difference over the largest gradient entry; null if it is
            not finite.
        traces: bytes alive over the step.
    """

    original: MeasuredStep
    planned: MeasuredStep
    plan: PlanBody
    time_ratio: Ratio
    is_exact: bool
    loss_equal: bool
    gradients_equal: bool
    buffers_equal: bool
    parameters_equal: bool
    rng_equal: bool
    max_gradient_error: Annotated[float, Meta(ge=0)] | None
    traces: tuple[Trace, ...]


class SolutionDocument(StepDocument, frozen=True, kw_only=True, tag="solution"):
    """The largest value that fits.

    Attributes:
        memory_bytes: the bound.
        field: the argument that was solved for.
        max_slowdown: bound on the planned step's predicted time.
        untouched: the solution for the untouched step.
        planned: the solution for the planned step.
    """

    memory_bytes: Bytes
    field: str
    max_slowdown: Annotated[float, Meta(ge=1)]
    untouched: SolvedValue
    planned: SolvedValue


class DifferenceDocument(StepDocument, frozen=True, kw_only=True, tag="difference"):
    """The changes between two documents.

    Attributes:
        increase: growth of the peak, as a share of the peak before: 0.02 is 2 %.
        difference_bytes: the peak after minus the peak before.
        differences: the same of each category, in bytes.
    """

    increase: Annotated[float, Meta(ge=-1)]
    difference_bytes: int
    differences: dict[Category, int]


class ChoicesDocument(Struct, frozen=True, kw_only=True, tag_field="kind", tag="choices"):
    """The savings from training less.

    Attributes:
        choices: the unchanged model first.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    choices: Annotated[tuple[Choice, ...], Meta(min_length=1)]


class ChecksDocument(Struct, frozen=True, kw_only=True, tag_field="kind", tag="checks"):
    """The checks of this machine.

    Attributes:
        checks: all checks.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    checks: tuple[Check, ...]


Readable = ProfileDocument | EstimateDocument | PlanDocument | FrontierDocument | ComparisonDocument
"""What ``memplan report`` and ``memplan diff`` read."""

Document = Readable | SolutionDocument | DifferenceDocument | ChoicesDocument | ChecksDocument


class _Head(Struct):
    schema_version: object = None
    kind: object = None


def kind_of(document: Document) -> str:
    """The document's ``kind``."""
    return str(document.__struct_config__.tag)


def plan_of(document: Readable) -> PlanBody | None:
    """The plan that a document is, or has."""
    if isinstance(document, PlanDocument):
        return document
    return document.plan if isinstance(document, ComparisonDocument) else None


def encode(document: Document) -> str:
    """The document as JSON, in a line."""
    return msgspec.json.encode(document).decode()


def read_document(text: str) -> Readable:
    """Read and check the JSON that a command wrote.

    Fields that are not known are ignored: a later release of memplan may have added them.

    Raises:
        UnreadableDocument: if it is anything else.
    """
    try:
        head = msgspec.json.decode(text, type=_Head)
    except msgspec.ValidationError as error:
        raise UnreadableDocument("a JSON object was expected") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnreadableDocument(f"not JSON ({error})") from error
    kinds = [str(one.__struct_config__.tag) for one in get_args(Readable)]
    if head.kind not in kinds:
        raise UnreadableDocument(
            f"kind is {head.kind!r}, expected one of {', '.join(kinds)}: what --json prints"
        )
    if head.schema_version != SCHEMA_VERSION or isinstance(head.schema_version, bool):
        raise UnreadableDocument(
            f"schema_version is {head.schema_version!r}, expected {SCHEMA_VERSION}; write the "
            "document again with this version of memplan"
        )
    try:
        found: Readable = msgspec.json.decode(text, type=Readable)
    except msgspec.ValidationError as error:
        raise UnreadableDocument(str(error)) from error
    return found
