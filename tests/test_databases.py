"""Torch's own databases of modules and operators: right, or refused with a reason.

``docs/support.md`` counts what happens here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

import memplan
from memplan.runtime.outcome import same_bits

from support import databases
from support.databases import Case

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of its samples

COMPARED = True
"""First calls are compared with the untouched module, as they are for users."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "complex64": torch.complex64}

BY_DEFAULT = {
    "float32": """
        addbmm resolve_neg diagonal lu_unpack nanquantile _native_batch_norm_legit
        nn.functional.rms_norm nn.functional.multilabel_margin_loss nn.functional.threshold
        round.decimals_0 vsplit unflatten squeeze.multiple nansum
    """,
    "bfloat16": """
        addr diff kthvalue maximum nn.functional.avg_pool1d nn.functional.interpolate.area
        nn.functional.threshold split polygamma.polygamma_n_1 double log_softmax.with_dtype
    """,
    "complex64": """
        addmm.decomposed unsafe_chunk expand_copy lu_solve as_strided.partial_views real slice
        unflatten scatter_add fft.hfftn
    """,
}
"""Operators of which default tests try the samples: every so-manieth that is quick."""


def left_by(module: nn.Module, case: Case) -> list[torch.Tensor | None]:
    """What a step leaves behind."""
    with memplan.profiler.step.preserved(module):
        torch.manual_seed(7)
        output = module(*case.sample.args, **case.sample.kwargs)
        output["loss"].backward()
        return [
            output["loss"].detach(),
            *output["outputs"],
            *(parameter.grad for parameter in module.parameters()),
            *(buffer.clone() for buffer in module.buffers()),
            torch.get_rng_state(),
        ]


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors have the same bits; one NaN is as good as another."""
    if one is None or other is None:
        return one is other
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    pairs = [(one.isnan(), one), (other.isnan(), other)]
    numbers = [tensor.detach().masked_fill(is_nan, 0) for is_nan, tensor in pairs]
    return same_bits(*numbers) and torch.equal(pairs[0][0], pairs[1][0])


def what_happens(case: Case, budget: str) -> str:
    """How a planned module compares with the untouched one, in a word, and why it is refused."""
    try:
        eager, again = (left_by(copy.deepcopy(case.model), case) for _ in range(2))
    except (RuntimeError, ValueError, NotImplementedError):
        return "eager fails"
    if not all(map(same, eager, again)):
        return "eager differs from itself"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            planned = memplan.optimize(
                copy.deepcopy(case.model),
                case.sample,
                budget=budget,
                options=memplan.Options(on_infeasible="smallest"),
            )
            mine = left_by(planned, case)
    except memplan.MemplanError as error:
        is_caught = isinstance(error, memplan.UnfaithfulCapture)  # by the check of the first call
        return "wrong" if is_caught else f"refused: {error}"
    if memplan.profile(planned, case.sample, steps=1).peak_bytes > planned.plan.peak_bytes:
        return "over"
    if all(map(same, eager, mine)):
        return "right"
    return "rounding" if memplan.Effect.ROUNDING in planned.plan.effects else "wrong"


def check(cases: Iterable[Case], record_property: Callable[[str, str], None]) -> None:
    """Try each case with nothing and with all that can be recomputed."""
    bad = []
    for case in cases:
        for budget in ("100%", "1B"):
            found = what_happens(case, budget)
            record_property(f"{case.name} {budget}", found)
            if found in ("wrong", "over"):
                bad.append(f"{case.name} at {budget}: {found}")
    assert not bad


@pytest.mark.by_default(
    *(f"{name}-{dtype}" for dtype, names in BY_DEFAULT.items() for name in names.split())
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", databases.operators())
def test_operators(name, dtype, record_property):
    check(databases.operator_cases(name, DTYPES[dtype]), record_property)


@pytest.mark.by_default("nn.GELU", "nn.Tanh")
@pytest.mark.parametrize("name", databases.modules())
def test_modules(name, record_property):
    check(databases.module_cases(name, torch.float32), record_property)
