"""Fewer parameters: those that are trained get eager's gradients, the others none, and no bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import memplan
from memplan.passes import add_lora, freeze, train_biases_only, unfreeze

from support import laws
from support.rows import MODELS

SMALLEST = memplan.Options(on_infeasible="smallest")
PASSES = {
    "biases": train_biases_only,
    "biases, norms and head": lambda: train_biases_only(also_train=("norms", "head")),
    "one block": lambda: freeze(blocks=1),
    "types": lambda: freeze(("type:*Norm*", "norms")),
}


def named_by_hand(model, chosen):
    """The names that a pass is about, said once more."""
    owners = {}
    for module_name, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            owners[f"{module_name}.{own}".lstrip(".")] = type(module).__name__
    if chosen == "types":
        return {one for one, owner in owners.items() if "Norm" in owner}
    if chosen == "one block":
        early = ("embeddings", "layer.0.", "layers.0.")
        return {one for one in owners if any(part in one for part in early)}
    found = {one for one in owners if one.endswith("bias")}
    if chosen != "biases":
        heads = ("decoder", "classifier", "classifier.1")
        found |= {one for one, owner in owners.items() if "Norm" in owner}
        found |= {one for one in owners if one.rpartition(".")[0].endswith(heads)}
    return found


def frozen_by_hand(model, chosen):
    """A copy of which only some parameters require a gradient; a tied one goes by any name."""
    reference = copy.deepcopy(model)
    names = named_by_hand(reference, chosen)
    everything = reference.named_parameters(remove_duplicate=False)
    meant = {id(parameter) for name, parameter in everything if name in names}
    for parameter in reference.parameters():
        parameter.requires_grad_((id(parameter) in meant) == chosen.startswith("biases"))
    return reference


@pytest.mark.by_default(
    "bert-biases",
    "vit-biases, norms and head",
    "vit-one block",
    "resnet-types",
)
@pytest.mark.parametrize("chosen", PASSES)
@pytest.mark.parametrize("name", ["bert", "vit", "resnet"])
def test_what_is_trained_gets_eagers_gradients_and_the_rest_none(name, chosen):
    if (name, chosen) == ("resnet", "one block"):
        pytest.skip("its blocks are stages of other lists")
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    reference = frozen_by_hand(model, chosen)
    planned = memplan.optimize(
        model, batch, budget="50%", passes=[PASSES[chosen]()], options=SMALLEST
    )
    trained = {n for n, p in planned.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in reference.named_parameters() if p.requires_grad}
    assert 0 < len(trained) < len(list(planned.parameters()))
    laws.assert_same_bits(laws.step(reference, batch), laws.step(planned, batch))
    laws.assert_within_budget(planned, batch)
    assert planned.plan.effects == (memplan.Effect.RESTRICTED,)


def two_layers():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = memplan.WithLoss(layers, nn.functional.cross_entropy)
    return model, (torch.randn(16, 8), torch.randint(0, 3, (16,)))


def test_frozen_parameters_get_no_optimizer_state_and_lose_their_gradient():
    model, batch = two_layers()
    model(*batch).backward()
    planned = memplan.optimize(model, batch, passes=[freeze("model.0")], optimizer=torch.optim.Adam)
    assert model.model[0].weight.grad is None and model.model[2].weight.grad is not None
    planned(*batch).backward()
    planned.optimizer.step()
    assert {id(one) for one in planned.optimizer.state} == {
        id(one) for layer in model.model[2:] for one in layer.parameters()
    }


def test_toggling_later_plans_again_and_unfreeze_puts_back():
    model, batch = two_layers()
    model.model[4].bias.requires_grad_(False)
    planned = memplan.optimize(model, batch, passes=[freeze("0")])
    frozen = planned.plan
    laws.assert_same_bits(laws.step(model, batch), laws.step(planned, batch))
    model.model[0].weight.requires_grad_(True)
    laws.assert_same_bits(laws.step(model, batch), laws.step(planned, batch))
    assert planned.plan.fingerprint != frozen.fingerprint
    assert unfreeze(planned) is model
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.4.bias"]
    laws.assert_same_bits(laws.step(model, batch), laws.step(planned, batch))


def test_a_plan_leaves_the_model_as_it_was_and_a_failure_does_too():
    model, batch = two_layers()
    model(*batch).backward()
    gradient = model.model[0].weight.grad
    memplan.plan(model, batch, passes=[freeze("0")])
    with pytest.raises(memplan.InfeasibleBudget):
        memplan.optimize(model, batch, budget="1 B", passes=[freeze("0")])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.model[0].weight.grad is gradient


def test_passes_that_say_what_is_trained_commute():
    model, batch = two_layers()
    passes = [freeze("model.0"), train_biases_only(), add_lora(rank=2)]
    plans = [
        memplan.plan(model, batch, passes=order) for order in (passes, [passes[1], *passes[::2]])
    ]
    assert plans[0].fingerprint == plans[1].fingerprint
    memplan.optimize(model, batch, passes=passes)
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained == ["model.2.bias", "model.4.bias"]


def test_comparing_runs_the_original_as_it_was():
    model, batch = two_layers()
    full = memplan.profile(model, batch, steps=1)
    planned = memplan.optimize(model, batch, passes=[freeze("model.0")])
    compared = memplan.compare(model, planned, batch, steps=1)
    assert compared.original.peak_bytes == full.peak_bytes
    assert compared.is_exact and compared.untrained == 2
    assert "2 parameters not trained" in str(compared)
    assert not model.model[0].weight.requires_grad


def test_a_frozen_start_keeps_nothing():
    torch.manual_seed(0)
    body = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))]
    model = memplan.WithLoss(nn.Sequential(*body, nn.Linear(64, 4)), nn.functional.cross_entropy)
    batch = torch.randn(512, 64), torch.randint(0, 4, (512,))
    start = [f"model.{index}" for index in range(23)]
    plan = memplan.plan(model, batch, budget="100%", passes=[freeze(start)])
    layer_bytes = 512 * 64 * 4
    assert plan.saved_bytes < 2.5 * layer_bytes  # the last norm's input, the head's, the logits


WRONG = {
    "matches nothing": (lambda: freeze("modle.0"), "matches nothing.*'model.0'"),
    "no patterns": (freeze, "needs what to freeze"),
    "everything": (lambda: freeze("*"), "nothing is left to train"),
    "no blocks": (lambda: freeze(blocks=2), "name what to freeze"),
    "not a pattern": (lambda: freeze([3]), "no pattern"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_said(name):
    make, message = WRONG[name]
    model, batch = two_layers()
    with pytest.raises(memplan.MemplanError, match=message):
        memplan.optimize(model, batch, passes=[make()])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_the_forward_calls_needs_a_sample():
    model, _ = two_layers()
    with pytest.raises(memplan.MemplanError, match="pass a batch"):
        memplan.optimize(model, passes=[train_biases_only(also_train="head")])
    planned = memplan.optimize(model, passes=[train_biases_only()])
    assert not planned.model[0].weight.requires_grad
