"""Low-rank adapters: against weights changed by hand, and against peft, both ways."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call

import memplan
from memplan.passes import (
    add_adapters,
    add_lora,
    freeze,
    load_lora,
    lora_like,
    merge_lora,
    save_lora,
    unmerge_lora,
)
from memplan.transforms.apply import changing

from support import laws
from support.rows import MODELS

SMALLEST = memplan.Options(on_infeasible="smallest")
SCALES = {"lora": 3.0 / 4, "rslora": 3.0 / 2, "lora_fa": 3.0 / 4, "dora": 3.0 / 4}


class Layers(nn.Module):
    """One layer of each kind that can be adapted, dropout and a head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16, padding_idx=0)
        self.image = nn.Conv2d(1, 8, 3, stride=2, padding=2, dilation=2, padding_mode="circular")
        self.turned = transformers.pytorch_utils.Conv1D(12, 16)
        self.plain = nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, words, target):
        states = torch.tanh(self.turned(self.words(words)))
        states = nn.functional.dropout(torch.tanh(self.plain(states)), 0.1, self.training)
        states = torch.tanh(self.image(states.unsqueeze(1))).mean((2, 3))
        return nn.functional.cross_entropy(self.head(states), target)


def layers():
    torch.manual_seed(0)
    return Layers(), (torch.randint(1, 20, (6, 8)), torch.randint(0, 5, (6,)))


ALL = ("words", "image", "turned", "plain")


def adapted(variant="lora", dropout=0.0, targets=ALL, **more):
    model, batch = layers()
    one = add_lora(4, 3.0, dropout=dropout, targets=targets, variant=variant)
    planned = memplan.optimize(model, batch, passes=[one], options=SMALLEST, **more)
    with torch.no_grad():
        for parameter in planned.lora.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, batch, planned


def by_hand(model, planned, variant, batch):
    """Loss and adapters' gradients of the model with its weights changed, by autograd alone."""
    adapters = {n: p.detach().clone().requires_grad_() for n, p in planned.lora.named_parameters()}
    weights = {}
    for name in planned.lora.names:
        layer = model.get_submodule(name)
        is_turned = name in ("words", "turned")
        a, b = adapters[f"{name}.A"].flatten(1), adapters[f"{name}.B"].flatten(1)
        weight = layer.weight.detach()
        matrix = (weight.t() if is_turned else weight).flatten(1) + SCALES[variant] * b @ a
        if variant == "dora":
            norms = matrix.detach().norm(dim=1, keepdim=True)
            matrix = matrix / norms * adapters[f"{name}.magnitude"].unsqueeze(1)
        weights[f"{name}.weight"] = matrix.t() if is_turned else matrix.view(weight.shape)
    torch.manual_seed(1)
    loss = functional_call(model, weights, batch)
    loss.backward()
    return loss.detach(), {f"lora.{n}": p.grad for n, p in adapters.items()}


@pytest.mark.by_default("lora", "dora")
@pytest.mark.parametrize("variant", SCALES)
def test_loss_and_gradients_are_those_of_changed_weights(variant):
    model, batch, planned = adapted(variant, budget="60%")
    mine = laws.step(planned, batch)
    loss, gradients = by_hand(copy.deepcopy(model), planned, variant, batch)
    torch.testing.assert_close(mine.loss, loss)
    for name, gradient in mine.gradients.items():
        if name.endswith(".A") and variant == "lora_fa":
            assert gradient is None
        elif name.startswith("lora."):
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6)
        else:
            assert gradient is None
    laws.assert_within_budget(planned, batch)


@pytest.mark.by_default("rslora", "dora")
@pytest.mark.parametrize("variant", SCALES)
def test_the_model_alone_is_as_it_was_and_merged_it_is_adapted(variant):
    model, batch, planned = adapted(variant)
    untouched, _ = layers()
    planned.eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        alone, with_adapters = model(*batch), planned(*batch)
        assert torch.equal(alone, untouched.eval()(*batch))
        assert not torch.equal(alone, with_adapters)
        merge_lora(planned)
        torch.testing.assert_close(model(*batch), with_adapters)
        assert torch.equal(model(*batch), planned(*batch))
        with pytest.raises(memplan.MemplanError, match="merged already"):
            merge_lora(planned)
    with pytest.raises(memplan.CaptureError, match="unmerge_lora"):
        planned(*batch)
    assert unmerge_lora(planned) is model
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(planned(*batch), with_adapters)
    with pytest.raises(memplan.MemplanError, match="not merged"):
        unmerge_lora(planned)


def test_adapters_begin_as_no_change_and_leave_the_random_state():
    model, batch = layers()
    with torch.no_grad():
        expected = model.eval()(*batch)
    model.train()
    state = torch.get_rng_state()
    planned = memplan.optimize(model, batch, passes=[add_lora(2, targets=ALL)])
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(planned.eval()(*batch), expected)


def test_linear_means_all_linear_layers_but_the_head():
    model, batch = layers()
    planned = memplan.optimize(model, batch, passes=[add_lora(2)])
    assert planned.lora.names == ("turned", "plain")


def test_planned_and_unplanned_draw_the_same_dropout():
    _, batch, planned = adapted("dora", dropout=0.3, targets=("turned", "plain"), budget="60%")
    mine = laws.step(planned, batch)
    torch.manual_seed(1)
    assert torch.equal(mine.loss, planned.changed.model(*batch))


@pytest.mark.slow
def test_names_files_and_copies():
    model, batch, planned = adapted("dora")
    keys = set(planned.state_dict()) - set(model.state_dict())
    assert {key.partition(".")[0] for key in keys} == {"lora"} and len(keys) == 12
    _, _, other = adapted("dora")
    other.load_state_dict(planned.state_dict())
    laws.assert_same_bits(laws.step(planned, batch), laws.step(other, batch))
    missing = {k: v for k, v in planned.state_dict().items() if k != "lora.plain.A"}
    with pytest.raises(RuntimeError, match="A"):
        other.load_state_dict(missing)
    for one in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        laws.assert_same_bits(laws.step(planned, batch), laws.step(one, batch))
        assert next(one.lora.parameters()) is not next(planned.lora.parameters())
    plan = memplan.Plan.from_json(planned.plan.to_json())
    again = memplan.optimize(layers()[0], batch, plan=plan)
    again.load_state_dict(planned.state_dict())
    laws.assert_same_bits(laws.step(planned, batch), laws.step(again, batch))


def test_an_optimizer_covers_the_adapters_alone():
    model, batch = layers()
    optimizer = torch.optim.AdamW
    planned = memplan.optimize(model, batch, passes=[add_lora(2)], optimizer=optimizer)
    laws.assert_within_budget(planned, batch)
    planned(*batch).backward()
    planned.optimizer.step()
    held = {id(parameter) for parameter in planned.optimizer.state}
    assert held == {id(parameter) for parameter in planned.lora.parameters()}
    with pytest.raises(memplan.MemplanError, match="misses 4 trainable parameters"):
        built = torch.optim.AdamW(layers()[0].parameters())
        memplan.optimize(layers()[0], batch, passes=[add_lora(2)], optimizer=built)


class Asking(nn.Module):
    """Passes on what it is given; runs a model in another thread meanwhile, if it has one."""

    def __init__(self):
        super().__init__()
        self.ask = None

    def forward(self, x):
        if self.ask is not None:
            ask, self.ask = self.ask, None
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
        return x


def test_another_thread_sees_the_model_alone():
    model, batch = layers()
    asking = Asking()
    model.plain = nn.Sequential(asking, model.plain)
    planned = memplan.optimize(model.eval(), batch, passes=[add_lora(4, targets="plain")])
    seen = []

    @torch.no_grad()
    def evaluate(module):
        return module(*batch)

    expected = evaluate(model)
    with torch.no_grad():
        planned.lora.plain.get_submodule("1").B.fill_(1.0)
    asking.ask = lambda: seen.append(evaluate(model))
    inside = evaluate(planned)
    assert torch.equal(seen[0], expected) and not torch.equal(inside, expected)


class Remembering(nn.Module):
    """Keeps what it computed, and counts its calls, in attributes of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.head, self.calls, self.last = nn.Linear(8, 8), nn.Linear(8, 8), 0, None

    def forward(self, x):
        self.calls += 1
        self.last = torch.relu(self.one(x))
        return self.head(self.last).square().mean()


@pytest.mark.filterwarnings("ignore:the forward changes attributes:UserWarning")
def test_attributes_of_the_model_are_as_they_were_and_a_change_is_said():
    model, x = Remembering(), torch.randn(4, 8)
    plan = memplan.plan(model, x, passes=[add_lora(2)])
    assert model.calls == 0 and model.last is None
    assert any("changes attributes" in note for note in plan.notes)
    memplan.optimize(model, x, passes=[add_lora(2)])
    assert model.calls == 0 and model.last is None


def test_one_thread_evaluates_while_another_trains():
    model, batch = layers()
    planned = memplan.optimize(model, batch, passes=[add_lora(4)])
    for _ in range(2):  # without gradients, and with those of the step before
        planned(*batch).backward()
    plans = planned.plans
    is_over, failures = threading.Event(), []

    @torch.no_grad()
    def evaluate():
        try:
            while not is_over.is_set():
                planned(*batch)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        for _ in range(40):
            planned(*batch).backward()
    finally:
        is_over.set()
        thread.join()
    assert not failures and planned.plans == plans
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_fitted_or_merged_is_said():
    model, batch = layers()
    with pytest.raises(memplan.MemplanError, match="there is no budget here"):
        memplan.frontier(model, batch, passes=[add_lora("fit")])
    nn.utils.parametrizations.weight_norm(model.plain)
    planned = memplan.optimize(model, batch, passes=[add_lora(2, targets="plain")])
    with pytest.raises(memplan.MemplanError, match="'plain' is computed"):
        merge_lora(planned)
    with pytest.raises(memplan.MemplanError, match="calls none of"):
        memplan.optimize(Skipping(), torch.randn(2, 8), passes=[freeze(blocks=1)])


class Skipping(nn.Module):
    """Calls the first of its blocks alone."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.used = 1

    def forward(self, x):
        x = x * self.start
        for block in self.blocks[: self.used]:
            x = block(x)
        return x.square().mean()


def test_parameters_before_the_blocks_are_frozen_with_them():
    model = Skipping()
    model.used = 3
    memplan.optimize(model, torch.randn(2, 8), passes=[freeze(blocks=2)])
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained == ["blocks.2.weight", "blocks.2.bias"]


def test_merged_adapters_are_neither_saved_nor_loaded(tmp_path):
    _, _, planned = adapted(targets=("turned", "plain"))
    state = planned.state_dict()
    save_lora(planned, tmp_path)
    merge_lora(planned)
    for what in (
        planned.state_dict,
        lambda: planned.load_state_dict(state),
        lambda: load_lora(planned, tmp_path),
    ):
        with pytest.raises(memplan.MemplanError, match="unmerge_lora"):
            what()


def test_a_file_of_another_kind_is_refused_and_changes_nothing(tmp_path):
    _, batch, planned = adapted(targets=("turned", "plain"))
    save_lora(planned, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    before = {name: one.clone() for name, one in planned.lora.state_dict().items()}
    for more in ({"alpha_pattern": {"plain": 64}}, {"init_lora_weights": "pissa"}):
        path.write_text(json.dumps(config | more))
        for what in (lambda: load_lora(planned, tmp_path), lambda: lora_like(tmp_path)):
            with pytest.raises(memplan.MemplanError, match=r"not supported|changes the weights"):
                what()
    assert all(torch.equal(one, before[name]) for name, one in planned.lora.state_dict().items())
    biases = add_lora(2, targets="plain", also_train="biases")
    only = memplan.optimize(layers()[0], batch, passes=[biases])
    with pytest.raises(memplan.MemplanError, match="whole modules"):
        save_lora(only, tmp_path)


def test_names_of_a_file_are_meant_exactly(tmp_path):
    inner = nn.ModuleDict({"linear": nn.Linear(8, 8)})
    body = nn.ModuleDict({"linear": nn.Linear(8, 8), "block": inner, "end": nn.Linear(8, 8)})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            x = torch.tanh(body["linear"](self.linear(x)))
            return body["end"](body["block"]["linear"](x))

    model = memplan.WithLoss(Model(), nn.functional.mse_loss)
    batch = torch.randn(2, 8), torch.randn(2, 8)
    planned = memplan.optimize(model, batch, passes=[add_lora(2, targets="name:linear")])
    save_lora(planned, tmp_path)
    again = memplan.optimize(model, batch, passes=[lora_like(tmp_path)])
    assert again.lora.names == planned.lora.names == ("model.linear",)
    load_lora(again, tmp_path)


@pytest.mark.parametrize("variant", SCALES)
def test_autocast_keeps_sixteen_bits(variant):
    model, batch = layers()
    seen = []
    model.head.register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    changed = add_lora(2, targets="image", variant=variant)
    with changing(model, memplan.Sample.of(batch), [changed]) as found:
        model.head._forward_pre_hooks.clear()
        model.image.register_forward_hook(lambda layer, args, y: seen.append(y.dtype))
        with torch.no_grad(), torch.autocast("cpu"):
            output = found.model(*batch)
    assert output.dtype.is_floating_point and seen[-1] is torch.bfloat16


@pytest.mark.slow
def test_the_largest_rank_that_fits():
    torch.manual_seed(0)
    body = [layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.Tanh())]
    model = memplan.WithLoss(nn.Sequential(*body, nn.Linear(32, 4)), nn.functional.cross_entropy)
    batch = torch.randn(64, 32), torch.randint(0, 4, (64,))
    options = memplan.Options(costs="analytic")

    def smallest_bytes(rank):
        more = {"options": memplan.Options(costs="analytic", on_infeasible="smallest")}
        return memplan.plan(model, batch, budget="1 B", passes=[add_lora(rank)], **more).peak_bytes

    budget = smallest_bytes(11)
    fit = [add_lora("fit")]
    planned = memplan.optimize(model, batch, budget=budget, passes=fit, options=options)
    rank = planned.plan.passes[-1].arguments["rank"]
    assert rank >= 11 and smallest_bytes(rank) <= budget < smallest_bytes(rank + 1)
    assert planned.lora.model.get_submodule("0").A.shape == (rank, 32)
    with pytest.raises(memplan.InfeasibleBudget):
        memplan.plan(model, batch, budget="1 B", passes=fit)
    with pytest.raises(memplan.MemplanError, match="a budget in bytes"):
        memplan.optimize(model, batch, budget="50%", passes=fit)


def test_sixteen_bits_keep_their_inputs_in_sixteen_bits():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 4))
    model = memplan.WithLoss(model, nn.functional.cross_entropy).to(torch.bfloat16)
    batch = torch.randn(512, 64).bfloat16(), torch.randint(0, 4, (512,))
    planned = memplan.optimize(model, batch, budget="100%", passes=[add_lora(2)])
    assert planned.lora.model.get_submodule("0").A.dtype is torch.float32
    layer_bytes = 512 * 64 * 2
    assert planned.plan.saved_bytes < 8 * layer_bytes
    laws.assert_within_budget(planned, batch)


WRONG = {
    "matches nothing": ({"targets": "q_proj"}, "'q_proj' matches nothing"),
    "rank": ({"rank": 9, "targets": "plain"}, "larger than 'plain' has.*rank 8 at most"),
    "no layer": ({"targets": "type:Tanh"}, "matches nothing|no layer of a kind"),
    "rank is none": ({"rank": 0}, "rank is a number"),
    "dropout": ({"dropout": 1.0}, "dropout is a probability"),
    "variant": ({"variant": "qlora"}, "variant is one of"),
    "dropout of words": ({"dropout": 0.1, "targets": "words"}, "embedding, whose input"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_said(name):
    arguments, message = WRONG[name]
    model, batch = layers()
    with pytest.raises(memplan.MemplanError, match=message):
        memplan.optimize(model, batch, passes=[add_lora(**arguments)])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tied_and_idle_layers_are_refused_by_name():
    model, batch = MODELS["gpt2"]()
    with pytest.raises(memplan.MemplanError, match=r"'transformer\.wte' is tied"):
        memplan.optimize(model, batch, passes=[add_lora(targets="wte")])
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.end = attention, nn.Linear(8, 8)

        def forward(self, x):
            return self.end(self.attention(x, x, x)[0]).square().mean()

    with pytest.raises(memplan.MemplanError, match=r"never calls 'attention\.out_proj'"):
        memplan.optimize(Model(), torch.randn(2, 4, 8), passes=[add_lora(2, targets="out_proj")])
    with pytest.raises(memplan.MemplanError, match="can be used once"):
        memplan.optimize(Model(), torch.randn(2, 4, 8), passes=[add_lora(2, targets="end")] * 2)
    untied = memplan.optimize(Model(), torch.randn(2, 4, 8), passes=[add_lora(2, targets="end")])
    with pytest.raises(memplan.MemplanError, match="no adapters"):
        merge_lora(memplan.optimize(*layers()))
    assert untied.lora.names == ("end",)


@pytest.mark.by_default("vit")
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_bottlenecks_after_sublayers(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    passes = [add_adapters(4, also_train="head"), add_lora(2)]
    planned = memplan.optimize(model, batch, budget="60%", passes=passes, options=SMALLEST)
    laws.assert_within_budget(planned, batch)
    with torch.no_grad():
        for parameter in planned.adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    reference = copy.deepcopy(model)
    tree = copy.deepcopy(planned.adapters)
    names = [one.removesuffix(".up") for one, _ in tree.named_parameters() if one.endswith(".up")]
    ends = ("output.dense", "o_proj", "fc2")
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(names) == {one for one in linear if one.endswith(ends)}
    for one in names:
        holder, last = reference.get_submodule(one.rpartition(".")[0]), one.rpartition(".")[2]
        setattr(holder, last, WithBottleneck(getattr(holder, last), tree.get_submodule(one)))
    theirs, mine = laws.step(reference, batch), laws.step(planned, batch)
    torch.testing.assert_close(mine.loss, theirs.loss)
    for one in names:
        for part in ("down", "up", "down_bias", "up_bias"):
            expected = theirs.gradients[f"{one}.bottleneck.{part}"]
            torch.testing.assert_close(mine.gradients[f"adapters.{one}.{part}"], expected)
    trained = {n for n, p in planned.named_parameters() if p.requires_grad}
    assert {one.partition(".")[0] for one in trained} >= {"adapters", "lora"}


class WithBottleneck(nn.Module):
    """A layer and a bottleneck after it, written by hand."""

    def __init__(self, layer, bottleneck):
        super().__init__()
        self.layer, self.bottleneck = layer, bottleneck

    def forward(self, x):
        y, given = self.layer(x), self.bottleneck
        inner = nn.functional.gelu(y @ given.down.t() + given.down_bias)
        return y + inner @ given.up.t() + given.up_bias


peft_only = pytest.mark.filterwarnings("ignore")


def gpt(**more):
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=41, n_positions=32, use_cache=False, **more
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, 41, (4, 32))
    model = transformers.GPT2LMHeadModel(config)
    return model.train(), {"input_ids": tokens, "labels": tokens}


@pytest.mark.slow
@peft_only
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", SCALES)
def test_files_for_peft_and_back(variant, dropout, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = gpt()
    one = add_lora(4, 3.0, dropout=dropout, variant=variant, also_train="ln_f")
    planned = memplan.optimize(model, batch, budget="70%", passes=[one], options=SMALLEST)
    with torch.no_grad():
        for parameter in planned.lora.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_lora(planned, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(gpt()[0], tmp_path / "ours", is_trainable=True).train()
    torch.manual_seed(1)
    theirs(**batch).loss.backward()
    mine = laws.step(planned, batch)
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    if variant == "lora_fa":
        found = {name: gradient for name, gradient in found.items() if "lora_A" not in name}
    gradients = [gradient for gradient in mine.gradients.values() if gradient is not None]
    assert len(gradients) == len(found)
    sums = [sorted(float(g.double().norm()) for g in one) for one in (gradients, found.values())]
    torch.testing.assert_close(*map(torch.tensor, sums), rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        expected = theirs.eval()(**batch).logits
        torch.testing.assert_close(planned.eval()(**batch).logits, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = memplan.optimize(gpt()[0], batch, passes=[lora_like(tmp_path / "theirs")])
    load_lora(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, expected)


@peft_only
def test_every_kind_of_layer_goes_to_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    model, batch, planned = adapted("lora", targets=("words", "turned", "plain"))
    save_lora(planned, tmp_path)
    theirs = peft.PeftModel.from_pretrained(layers()[0], tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(*batch), planned.eval()(*batch))
    other = memplan.optimize(layers()[0], batch, passes=[lora_like(tmp_path)])
    load_lora(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other.eval()(*batch), planned(*batch))
    wider = memplan.optimize(model, batch, passes=[add_lora(2)])
    with pytest.raises(memplan.MemplanError, match="has rank 4, this module 2"):
        load_lora(wider, tmp_path)
    with pytest.raises(memplan.MemplanError, match="is missing"):
        load_lora(other, tmp_path / "nothing")


@peft_only
def test_a_model_that_peft_wrapped_is_planned_as_it_is():
    peft = pytest.importorskip("peft")
    model, batch = gpt()
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, config).train()
    planned = memplan.optimize(wrapped, batch, budget="50%", options=SMALLEST)
    laws.assert_same_bits(laws.step(wrapped, batch), laws.step(planned, batch))
    laws.assert_within_budget(planned, batch)
