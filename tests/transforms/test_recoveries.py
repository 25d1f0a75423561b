"""Recoveries that nothing in the package knows: all that one needs comes with its pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import memplan
from memplan import Effect, MemplanError, Pass
from memplan.capture import Captured, OpCall
from memplan.compiler.lower import LoweredStep, lower
from memplan.compiler.request import Request
from memplan.costs import CPU, DEVICES
from memplan.ir.program import Memory, Op, Phase
from memplan.ir.schedule import Recovery
from memplan.planner import solve
from memplan.transforms.apply import changing
from memplan.transforms.passes import RecoveryContext

from support import laws

SMALLEST = memplan.Options(on_infeasible="smallest")


def stashing(
    name: str,
    dtype: torch.dtype,
    stash: Callable[[torch.Tensor], torch.Tensor],
    restore: Callable[[torch.Tensor], torch.Tensor],
    *,
    shrinks: int,
    effect: Effect = Effect.EXACT,
    tolerance: float = 0.0,
    memory: Memory = Memory.DEVICE,
) -> Pass:
    """Stash dense tensors of a type as something smaller, and restore them from that."""

    def of_stash(captured: Captured, op: Op, stashed: Sequence[Any]) -> OpCall:
        assert not stashed
        return OpCall(stash, (captured.bases[op.operands[0]],))

    def of_restore(captured: Captured, op: Op, stashed: Sequence[Any]) -> OpCall:
        del captured, op
        return OpCall(restore, tuple(stashed))

    def recoveries(captured: Captured, context: RecoveryContext) -> tuple[Recovery, ...]:
        return tuple(
            context.stash(
                name,
                op,
                value,
                like.nbytes // shrinks,
                stash=f"{name}.stash",
                restore=f"{name}.restore",
                device=memory,
                exactness=effect,
                tolerance=tolerance,
            )
            for op in captured.program.ops
            for value in op.results
            if op.phase is Phase.FORWARD and value in captured.bases
            if (like := captured.bases[value].meta["val"]).dtype is dtype
            if like.is_contiguous() and like.nbytes == captured.program.values[value].nbytes
        )

    lowerings = {f"{name}.stash": of_stash, f"{name}.restore": of_restore}
    return Pass(name, effect, recoveries=recoveries, lowerings=lowerings)


def negated(indices: torch.Tensor) -> torch.Tensor:
    """Indices as negative numbers of half their size."""
    return indices.to(torch.int32).neg_()


def counted(stashed: torch.Tensor) -> torch.Tensor:
    """The indices."""
    return stashed.to(torch.int64).neg_()


def rounded(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of 16 bits."""
    return values.to(torch.bfloat16)


def widened(stashed: torch.Tensor) -> torch.Tensor:
    """As numbers of 32 bits."""
    return stashed.to(torch.float32)


def as_negatives() -> Pass:
    return stashing("as_negatives", torch.int64, negated, counted, shrinks=2)


def as_bfloat16(tolerance: float = 1e-2) -> Pass:
    return stashing(
        "as_bfloat16",
        torch.float32,
        rounded,
        widened,
        shrinks=2,
        effect=Effect.ROUNDING,
        tolerance=tolerance,
    )


class Pooled(nn.Module):
    """Holds indices of 64 bits from a pooling while the layers after it run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.rest = nn.Sequential(
            *(layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(nn.functional.max_pool2d(self.first(x), 2)).square().mean()


class Layers(nn.Module):
    """Keeps numbers of 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh()))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def used(planned: memplan.PlannedModule, sample: Any) -> set[str]:
    """Targets of the ops that restore something."""
    step = planned.prepare(memplan.Sample.of(sample))
    ran = set(step.plan.schedule.restored_ops)
    return {one.restore_op.target for one in step.recoveries if one.restore_op.id in ran}


def test_an_exact_recovery_from_a_test():
    model, batch = Pooled(), torch.randn(4, 3, 32, 32)
    planned = memplan.optimize(
        model, batch, budget="1%", passes=[as_negatives()], default_passes=False, options=SMALLEST
    )
    assert used(planned, batch) == {"as_negatives.restore"}
    assert planned.plan.effects == (Effect.EXACT,)
    assert planned.plan.peak_bytes < planned.plan.original_peak_bytes
    laws.assert_same_bits(laws.step(planned, batch), laws.step(model, batch))
    laws.assert_within_budget(planned, batch)
    laws.assert_searched_again(planned, batch)


def test_an_inexact_recovery_from_a_test():
    model, batch = Layers(), torch.randn(64, 64)
    planned = memplan.optimize(
        model, batch, budget="1%", passes=[as_bfloat16()], default_passes=False, options=SMALLEST
    )
    assert used(planned, batch) == {"as_bfloat16.restore"}
    assert Effect.ROUNDING in planned.plan.effects
    assert planned.plan.peak_bytes < planned.plan.original_peak_bytes
    mine, theirs = laws.step(planned, batch), laws.step(model, batch)
    assert 0 < laws.error(mine, theirs) < 1e-2
    assert torch.equal(mine.loss, theirs.loss)
    laws.assert_within_budget(planned, batch)
    assert any("1e-2" in note or "0.01 allowed" in note for note in planned.plan.notes)


def test_one_value_after_the_other_is_kept_exactly_where_rounding_is_too_much():
    """Where half of the bits are more than what is tolerated, exact recoveries take over."""
    model, batch = Layers(), torch.randn(64, 64)
    planned = memplan.optimize(
        model, batch, budget="50%", passes=[as_bfloat16(tolerance=1e-9)], options=SMALLEST
    )
    mine, theirs = laws.step(planned, batch), laws.step(model, batch)
    assert "as_bfloat16.restore" not in used(planned, batch)
    laws.assert_same_bits(mine, theirs)


def test_of_recoveries_that_cost_the_same_the_exact_one_is_taken():
    """The plan is not run: what it takes for exact here is the same rounding, to cost the same."""
    model, batch = Layers(), torch.randn(64, 64)
    again = stashing("again", torch.float32, rounded, widened, shrinks=2)
    options = memplan.Options(costs="analytic", on_infeasible="smallest")
    for passes in ([as_bfloat16(), again], [again, as_bfloat16()]):
        planned = memplan.optimize(
            model, batch, budget="50%", passes=passes, default_passes=False, options=options
        )
        assert used(planned, batch) == {"again.restore"}


def lowered(one: Pass, model: nn.Module, batch: torch.Tensor, device: str | None) -> LoweredStep:
    """A step with a pass's recoveries, with analytic costs."""
    options = memplan.Options(costs="analytic", device=device)
    sample, request = memplan.Sample.of(batch), Request(passes=(one,), options=options)
    with changing(model, sample, request.passes) as changed:
        return lower(changed, sample, request)


@pytest.mark.parametrize("device", [None, "a100"])
def test_costs_are_those_of_its_own_traffic(device):
    """A stash of a product moves its own bytes, and computes no product."""
    step = lowered(as_bfloat16(), Layers(), torch.randn(64, 64), device)
    product = next(op for op in step.captured.program.ops if "addmm" in op.target)
    stashes = [one.stash_op for one in step.recoveries if one.stash_op is not None]
    stash = next(op for op in stashes if op.variant_of == product.id)
    of = CPU if device is None else DEVICES[device]
    expected = of.launch_s + (64 * 64 * 4 + 64 * 64 * 2) / of.bytes_per_s
    assert step.costs.by_op[stash.id].seconds == pytest.approx(expected)
    assert step.costs.by_op[stash.id].flops == 0 < step.costs.by_op[product.id].flops


def test_what_is_on_the_host_moves_over_the_link_and_is_counted_apart():
    to_host = stashing(
        "to_host", torch.float32, torch.clone, torch.clone, shrinks=1, memory=Memory.HOST
    )
    step = lowered(to_host, Layers(), torch.randn(64, 64), "a100")
    program, of = step.captured.program, DEVICES["a100"]
    stash = step.recoveries[0].stash_op
    assert stash is not None
    expected = 64 * 64 * 4 / of.bytes_per_s + 64 * 64 * 4 / of.link_bytes_per_s
    assert step.costs.by_op[stash.id].seconds == pytest.approx(of.launch_s + expected)
    kept = step.unplanned.peak_bytes
    budget_bytes = kept - 64 * 64 * 2
    found = solve(program, step.costs, step.recoveries, budget_bytes=budget_bytes, max_slowdown=100)
    timeline = step.scheduled(found.schedule).timeline
    assert timeline.peak_bytes == found.peak_bytes <= budget_bytes
    assert timeline.host_bytes >= 64 * 64 * 4


def test_a_pass_that_does_not_say_how_its_op_is_called():
    one = as_negatives()
    silent = Pass(one.name, one.effect, recoveries=one.recoveries)
    with pytest.raises(MemplanError, match=r"lowerings=\{'as_negatives.stash': ...\}"):
        memplan.plan(Pooled(), torch.randn(4, 3, 32, 32), passes=[silent])


def test_two_passes_with_ops_of_one_name():
    again = stashing("as_negatives", torch.int64, negated, counted, shrinks=2)
    with pytest.raises(MemplanError, match="two passes say how an op"):
        memplan.plan(Pooled(), torch.randn(4, 3, 32, 32), passes=[as_negatives(), again])
