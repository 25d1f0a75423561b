"""One table, all laws, for named passes: each row is one or more of them on a model they are for.

Which laws hold follows from the plan's effects. What a pass makes of a model is checked against
something written by hand in the pass's own file; here that model, run by torch, is the reference.
A new pass is a new row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import memplan
from memplan import Effect, Pass, PlannedModule
from memplan.ir.program import Costs
from memplan.passes import (
    add_adapters,
    add_lora,
    checkpoint_activations,
    drop_dead_operands,
    drop_minibatches,
    freeze,
    invert_couplings,
    keep_signs,
    learn_locally,
    make_reversible,
    pack_masks,
    reuse_operands,
    skip_layers,
    split_dropout,
    train_biases_only,
)

from models.reversible import ResNet
from support import couplings, laws, local, rows
from support.skipping import net_and_batch

SMALLEST = memplan.Options(on_infeasible="smallest")
UNDONE = "undone"
"""In the place of a budget: every stream that can comes back from a later one."""


@dataclass(frozen=True)
class Row:
    """Passes on a model.

    Attributes:
        make: makes the model and a batch.
        passes: the passes, in order.
        children: those that the passes add, whose names are prefixes of the state.
        has_defaults: whether the EXACT defaults run, too.
        has_reference: whether torch can run what the passes made of the model; else the pass's own
            file has a reference.
        is_rounded: whether the forward is not the reference's to the bit, but up to rounding.
        other_order: what the passes do in the other order: the "same" plan, or what is "equal" to
            its own reference.
        budgets: to plan for; those that are not in ``MAIN_BUDGETS`` are slow.
    """

    make: Callable[[], rows.Made]
    passes: Callable[[], list[Pass]]
    children: tuple[str, ...] = ()
    has_defaults: bool = True
    has_reference: bool = True
    is_rounded: bool = False
    other_order: str = "same"
    budgets: tuple[str | None, ...] = ("50%", "100%", None, "1 B")


MAIN_BUDGETS = ("50%", UNDONE)
"""Budgets of the default tests."""


def two_streams() -> rows.Made:
    """A plain residual network."""
    sample = (torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))
    return memplan.WithLoss(ResNet(26, width=0.5), nn.functional.cross_entropy), sample


def gpt_of_two_batches() -> rows.Made:
    """Its tokens and labels are two tensors."""
    model, (tokens, labels) = local.gpt()
    return model, (tokens, labels.clone())


SUBSET = {"mode": "subset", "rate": 0.4}
BLOCKS = {"mode": "blocks", "rate": 0.5}
GATED = {"mode": "gated", "capacity": 0.5}


def exact(model: str, *passes: Callable[[], Pass], other_order: str = "same") -> Row:
    """Passes of the defaults, without the others."""
    return Row(
        rows.MODELS[model],
        lambda: [make() for make in passes],
        has_defaults=False,
        other_order=other_order,
    )


def skipping(*others: Pass, child: str = "", **arguments: Any) -> Row:
    """Layers of a small residual network that are skipped, beside other passes."""
    return Row(
        net_and_batch,
        lambda: [skip_layers(**arguments), *others],
        children=("layer_skipping", *([child] if child else [])),
        has_reference=arguments["mode"] != "blocks",
        other_order="equal",
    )


def undone(name: str) -> Row:
    """Couplings, all of which are undone."""
    return Row(
        couplings.ROWS[name],
        lambda: [invert_couplings()],
        is_rounded=name in couplings.PUT_TOGETHER,
        budgets=(UNDONE,),
    )


ROWS: dict[str, Row] = {
    "checkpoints": exact("mlp", checkpoint_activations),
    "split dropout": exact("gpt2", split_dropout, checkpoint_activations),
    "packed masks": exact(
        "mlp", split_dropout, checkpoint_activations, pack_masks, other_order="equal"
    ),
    "dead operands": exact("frozen", drop_dead_operands, checkpoint_activations),
    "signs": exact("resnet", drop_dead_operands, keep_signs, checkpoint_activations),
    "in place": exact("autoencoder", reuse_operands, checkpoint_activations),
    "biases": Row(rows.resnet, lambda: [train_biases_only(also_train=("norms", "head"))]),
    "freeze": Row(rows.vit, lambda: [freeze(blocks=2)]),
    "freeze, biases": Row(rows.bert, lambda: [freeze(blocks=1), train_biases_only()]),
    "lora": Row(rows.gpt2, lambda: [add_lora(2, dropout=0.1)], ("lora",)),
    "adapters": Row(rows.vit, lambda: [add_adapters(4)], ("adapters",)),
    "adapters, lora": Row(
        rows.bert,
        lambda: [add_adapters(4, also_train="head"), add_lora(2)],
        ("adapters", "lora"),
        other_order="equal",
    ),
    "freeze, lora": Row(rows.vit, lambda: [freeze(blocks=2), add_lora(2)], ("lora",)),
    "two streams": Row(two_streams, lambda: [make_reversible()], budgets=("50%", "100%", None)),
    "two streams, inverted": Row(
        two_streams,
        lambda: [make_reversible(0.5, 0.8), invert_couplings()],
        budgets=("50%", "100%", None),
    ),
    "fixed point": Row(
        couplings.ROWS["tuple"], lambda: [invert_couplings(grid=True)], has_reference=False
    ),
    **{f"inverted {name}": undone(name) for name in couplings.ROWS},
    "parts": Row(local.vit, lambda: [learn_locally(4)], ("local_losses",)),
    "parts, lora": Row(
        local.vit,
        lambda: [add_lora(2), learn_locally(4)],
        ("lora", "local_losses"),
        other_order="equal",
    ),
    "parts, lora with dropout": Row(
        gpt_of_two_batches,
        lambda: [learn_locally(2), add_lora(2, dropout=0.1)],
        ("lora", "local_losses"),
        other_order="equal",
    ),
    "parts, freeze": Row(
        gpt_of_two_batches,
        lambda: [freeze("*.wte", blocks=0), learn_locally(4)],
        ("local_losses",),
    ),
    "batches": Row(rows.mlp, lambda: [drop_minibatches(0.5)], ("minibatch_dropping",)),
    "batches, lora": Row(
        rows.mlp, lambda: [drop_minibatches(0.5), add_lora(2)], ("minibatch_dropping", "lora")
    ),
    "subset": skipping(**SUBSET),
    "blocks": skipping(**BLOCKS),
    "blocks, decaying": skipping(**BLOCKS, linear_decay=True),
    "gates": skipping(**GATED),
    "gates, recurrent": skipping(mode="gated", capacity=0.25, gate="recurrent"),
    "subset, lora": skipping(add_lora(2), child="lora", **SUBSET),
    "blocks, lora": skipping(add_lora(2), child="lora", **BLOCKS),
    "gates, lora": skipping(add_lora(2), child="lora", **GATED),
    "subset, freeze": skipping(freeze("*.stem"), **SUBSET),
    "blocks, freeze": skipping(freeze("*.stem"), **BLOCKS),
    "gates, freeze": skipping(freeze("*.stem"), **GATED),
    "subset, parts": skipping(learn_locally(2), child="local_losses", **SUBSET),
    "blocks, parts": skipping(learn_locally(2), child="local_losses", **BLOCKS),
    "gates, parts": skipping(learn_locally(2), child="local_losses", **GATED),
    "subset, batches": skipping(drop_minibatches(0.5), child="minibatch_dropping", **SUBSET),
    "subset of a ViT": Row(local.vit, lambda: [skip_layers(**SUBSET)], ("layer_skipping",)),
    "subset of a GPT": Row(
        gpt_of_two_batches, lambda: [skip_layers(**SUBSET)], ("layer_skipping",)
    ),
    "subset of a ResNet": Row(
        local.resnet, lambda: [skip_layers(**SUBSET, batch_norm=True)], ("layer_skipping",)
    ),
    "gates of a ViT": Row(local.vit, lambda: [skip_layers(**GATED)], ("layer_skipping",)),
    "gates of a GPT": Row(gpt_of_two_batches, lambda: [skip_layers(**GATED)], ("layer_skipping",)),
    "gates of a ResNet": Row(local.resnet, lambda: [skip_layers(**GATED)], ("layer_skipping",)),
}

MAIN_ROWS = (
    "checkpoints",
    "packed masks",
    "dead operands",
    "signs",
    "in place",
    "biases",
    "freeze, biases",
    "adapters, lora",
    "two streams, inverted",
    "inverted tuple",
    "parts",
    "batches, lora",
    "blocks",
    "subset, lora",
    "gates",
)
"""Rows of the default tests; the others are slow."""

ORDERED = ("packed masks", "freeze, biases", "batches, lora")
"""Pairs that are tried in the other order by default."""

ALONE = ("freeze, biases", "two streams, inverted")
"""Rows that are saved and copied by default."""

FAILED = ("checkpoints", "freeze, biases", "two streams, inverted", "blocks", "gates")
"""Rows in which a step fails by default."""


def made(name: str) -> rows.Made:
    """Model and batch, always the same."""
    torch.manual_seed(0)
    return ROWS[name].make()


def optimized(name: str, budget: str | None, passes: list[Pass]) -> PlannedModule:
    """A model of its own under these passes."""
    model, sample = made(name)
    if budget == UNDONE:
        return couplings.undone(model, sample, *passes)
    return memplan.optimize(
        model,
        sample,
        budget=budget,
        passes=passes,
        default_passes=ROWS[name].has_defaults,
        options=SMALLEST,
    )


@cache
def planned(name: str, budget: str | None) -> PlannedModule:
    """A row's planned module; used by all laws, which leave it as it is."""
    return optimized(name, budget, ROWS[name].passes())


def marked(name: str, budget: str | None) -> Any:
    """A case, slow if its row or its budget is."""
    is_slow = name not in MAIN_ROWS or budget not in MAIN_BUDGETS
    case = (name, budget)
    return pytest.param(*case, marks=pytest.mark.slow if is_slow else ())


CASES = [marked(name, budget) for name, row in ROWS.items() for budget in row.budgets]
ONCE = [marked(name, row.budgets[0]) for name, row in ROWS.items()]
PAIRS = [marked(name, "50%") for name, row in ROWS.items() if len(row.passes()) > 1]


def reference(name: str, module: PlannedModule) -> nn.Module:
    """What the passes made of the model, for torch to run."""
    if not ROWS[name].has_reference:
        pytest.skip("torch cannot run it; the pass's own tests have a reference")
    return module.changed.model


@pytest.mark.parametrize(("name", "budget"), CASES)
def test_the_bits_are_those_of_the_changed_model(name, budget):
    module, (_, sample) = planned(name, budget), made(name)
    model = reference(name, module)
    for seed in (1, 2):
        theirs, mine = laws.step(model, sample, seed), laws.step(module, sample, seed)
        if Effect.ROUNDING not in module.plan.effects:
            laws.assert_same_bits(mine, theirs)
            continue
        rtol, atol = (1e-5, 1e-6) if ROWS[name].is_rounded else (0, 0)
        torch.testing.assert_close(mine.loss, theirs.loss, rtol=rtol, atol=atol)
        for buffer, value in theirs.buffers.items():
            torch.testing.assert_close(mine.buffers[buffer], value, rtol=rtol, atol=atol)
        assert all(map(torch.equal, mine.rng, theirs.rng))
    if Effect.ROUNDING in module.plan.effects:
        laws.assert_near_64_bits(module, model, sample)


@pytest.mark.parametrize(("name", "budget"), ONCE)
def test_those_that_are_trained_have_a_gradient_and_no_others(name, budget):
    module, (_, sample) = planned(name, budget), made(name)
    gradients = laws.step(module, sample).gradients
    trained = {name for name, one in module.named_parameters() if one.requires_grad}
    found = {name for name, gradient in gradients.items() if gradient is not None}
    assert len(found) > 0 and found <= trained
    if ROWS[name].has_reference:
        assert found == trained
    before = {name for name, required in module.changed.required_grad.items() if required}
    assert (not before <= trained) == (Effect.RESTRICTED in module.plan.effects)


@pytest.mark.parametrize(("name", "budget"), CASES)
def test_measured_is_at_most_predicted_is_at_most_the_budget(name, budget):
    laws.assert_within_budget(planned(name, budget), made(name)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if UNDONE not in ROWS[name].budgets])
def test_predicted_slowdown_does_not_grow_with_the_budget(name):
    plans = [optimized(name, budget, ROWS[name].passes()).plan for budget in ("100%", "75%", "50%")]
    slowdowns = [plan.slowdown for plan in plans]
    assert slowdowns == sorted(slowdowns)


@pytest.mark.by_default(*(f"{name}-{ROWS[name].budgets[0]}" for name in ALONE))
@pytest.mark.parametrize(("name", "budget"), ONCE)
def test_a_plan_survives_json_and_runs(name, budget):
    # of its own: with choices that make several programs, a plan is for one of them
    module, (model, sample) = optimized(name, budget, ROWS[name].passes()), made(name)
    plan = memplan.Plan.from_json(module.plan.to_json())
    assert plan == module.plan
    other = memplan.optimize(model, sample, plan=plan)
    assert other.plan.schedule == plan.schedule and other.plan.peak_bytes == plan.peak_bytes
    other.load_state_dict(module.state_dict())
    laws.assert_same_bits(laws.step(module, sample), laws.step(other, sample))


@pytest.mark.by_default(*(f"{name}-{ROWS[name].budgets[0]}" for name in ALONE))
@pytest.mark.parametrize(("name", "budget"), ONCE)
def test_names_evaluation_and_copies(name, budget):
    module, (model, sample) = planned(name, budget), made(name)
    added = set(module.state_dict()) - set(model.state_dict())
    assert set(model.state_dict()) <= set(module.state_dict())
    assert {key.partition(".")[0] for key in added} <= set(ROWS[name].children)
    assert set(ROWS[name].children) <= {key for key, _ in module.named_children()}
    other = copy.deepcopy(module)
    assert next(other.parameters()) is not next(module.parameters())
    laws.assert_same_bits(laws.step(module, sample), laws.step(other, sample))
    batch = memplan.Sample.of(sample)
    other.eval()
    with torch.no_grad():
        mine = memplan.torch_internals.flatten(other(*batch.args, **batch.kwargs))[0]
        theirs = other.changed.model(*batch.args, **batch.kwargs)
    theirs = memplan.torch_internals.flatten(theirs)[0]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("name", "budget"), ONCE)
def test_searching_twice_gives_the_same_solution(name, budget):
    module, (_, sample) = planned(name, budget), made(name)
    if Effect.ROUNDING in module.plan.effects:
        pytest.skip("the drift that was measured has its say in this plan")
    laws.assert_searched_again(module, sample)


@pytest.mark.by_default(*(f"{name}-50%" for name in ORDERED))
@pytest.mark.parametrize(("name", "budget"), PAIRS)
def test_the_order_of_passes(name, budget):
    passes = ROWS[name].passes()[::-1]
    module, (_, sample) = optimized(name, budget, passes), made(name)
    if ROWS[name].other_order == "same":
        mine = planned(name, budget).plan
        assert module.plan.fingerprint == mine.fingerprint
        assert module.plan.peak_bytes == mine.peak_bytes
    if ROWS[name].has_reference and Effect.ROUNDING not in module.plan.effects:
        laws.assert_same_bits(laws.step(module, sample), laws.step(module.changed.model, sample))
    laws.assert_within_budget(module, sample)


@pytest.mark.by_default(*(f"{name}-50%" for name in FAILED))
@pytest.mark.parametrize(("name", "budget"), ONCE)
def test_after_an_error_the_model_is_as_it_was(name, budget):
    model, sample = made(name)
    before = laws.step(model, sample)
    names, required = set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    no_costs = memplan.Options(costs=Costs({}))
    with pytest.raises(memplan.MemplanError, match="no cost for"):
        memplan.optimize(model, sample, passes=ROWS[name].passes(), options=no_costs)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == required
    assert not any(module._forward_hooks for module in model.modules())
    laws.assert_same_bits(before, laws.step(model, sample))
