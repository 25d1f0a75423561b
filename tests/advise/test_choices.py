"""What training less would free, on a model whose bytes are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.advise.freezing import compare_choices
from memplan.analysis import parts_of
from memplan.passes import add_lora, freeze, train_biases_only
from memplan.planner.frozen_parts import Part

ROWS, WIDTH = 128, 32
LAYER_BYTES = ROWS * WIDTH * 4
WEIGHT_BYTES, BIAS_BYTES = WIDTH * WIDTH * 4, WIDTH * 4


class Model(nn.Module):
    """Linear layers whose inputs nothing else keeps, and tanh, which keeps its results."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"one": nn.Linear(WIDTH, WIDTH), "two": nn.Linear(WIDTH, WIDTH)})
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, target):
        for block in self.blocks:
            x = torch.tanh(block["two"](block["one"](x)))
        return nn.functional.mse_loss(self.head(x), target)


def made():
    torch.manual_seed(0)
    return Model(), (torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))


def test_each_choice_has_the_bytes_that_can_be_counted_by_hand():
    model, batch = made()
    found = {one.name: one for one in compare_choices(model, batch, optimizer=torch.optim.Adam)}
    before = found.pop("as it is")
    assert list(found)[:3] == ["blocks.*.one", "blocks.*.two", "head"]
    assert before.gradient_bytes == before.trained_bytes == 5 * (WEIGHT_BYTES + BIAS_BYTES)
    assert before.state_bytes == 2 * before.gradient_bytes + 2 * 5 * 4
    # one's result for two's weight, tanh's result, in each block; the head's for the loss.
    assert before.activation_bytes == 5 * LAYER_BYTES
    two = found["blocks.*.two"]
    assert before.gradient_bytes - two.gradient_bytes == 2 * (WEIGHT_BYTES + BIAS_BYTES)
    assert before.activation_bytes - two.activation_bytes == 2 * LAYER_BYTES
    assert found["blocks.*.one"].activation_bytes == before.activation_bytes
    assert found["head"].activation_bytes == before.activation_bytes  # tanh keeps it too
    biases = found["biases alone"]
    assert biases.trained_bytes == biases.gradient_bytes == 5 * BIAS_BYTES
    assert biases.activation_bytes == 3 * LAYER_BYTES
    assert dict(biases.kept_for)["aten.tanh_backward.default"] == 2 * LAYER_BYTES
    adapted = found["lora, rank 8"]
    assert adapted.trained_bytes == 4 * 2 * 8 * WIDTH * 4
    assert found["lora_fa, rank 8"].activation_bytes < adapted.activation_bytes
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["blocks.*.one", "blocks.*.two", "head"])
def test_a_choice_is_what_the_pass_then_frees(name):
    model, batch = made()
    found = compare_choices(model, batch, passes={"": freeze(name)})
    plan = memplan.plan(model, batch, budget="100%", passes=[freeze(name)])
    assert found[1].activation_bytes == plan.saved_bytes


def test_a_plan_says_what_its_parts_take():
    model, batch = made()
    plan = memplan.plan(model, batch)
    pair = 2 * (WEIGHT_BYTES + BIAS_BYTES)
    assert set(plan.parts) == {
        Part("blocks.*.two", pair, pair, 2 * LAYER_BYTES),
        Part("blocks.*.one", pair, pair, 0),
        Part("head", pair // 2, pair // 2, 0),
    }
    assert "blocks.*.two" in plan.explain()
    assert memplan.Plan.from_json(plan.to_json()) == plan
    frozen = memplan.plan(model, batch, passes=[train_biases_only()])
    assert {part.gradient_bytes for part in frozen.parts} == {BIAS_BYTES, 2 * BIAS_BYTES}
    assert any("5 frozen linear layers" in note for note in frozen.notes)


def test_what_does_not_apply_is_left_out():
    model = memplan.WithLoss(nn.Linear(4, 4), nn.functional.mse_loss)
    batch = torch.randn(8, 4), torch.randn(8, 4)
    assert [one.name for one in compare_choices(model, batch)] == ["as it is", "biases alone"]
    assert len(compare_choices(model, batch, passes={"add_lora": add_lora()})) == 1


def test_parts_are_named_as_people_do():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
    model = nn.ModuleDict({"words": nn.Embedding(4, 8), "encoder": encoder, "end": nn.Linear(8, 4)})
    names = parts_of(model)
    assert names[0] == "words" and names[-1] == "end"
    assert "encoder.layers.*.linear1" in names
    assert parts_of(nn.Sequential(nn.Sequential(nn.Linear(2, 2)))) == ("0.0",)
