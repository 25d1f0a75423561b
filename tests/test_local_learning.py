"""Parts that learn from losses of their own: their gradients are eager's, their memory is not."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import laws
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import memplan
from memplan.analysis import Cut, balanced
from memplan.passes import add_lora, freeze, invert_couplings, learn_locally
from memplan.passes.masked_images import MaskedImage, patches_of

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from models.masked import MaskedAutoencoder

SMALLEST = memplan.Options(on_infeasible="smallest")


class Residual(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return x + self.inside(x)


def conv_block(channels=8):
    return Residual(
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )
    )


class ResNet(nn.Module):
    """Eight blocks with batch norm; the second half at half the resolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(*[conv_block() for _ in range(4)])
        self.pool = nn.MaxPool2d(2)
        self.second = nn.ModuleList([conv_block() for _ in range(4)])
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.pool(self.first(self.stem(x)))
        for block in self.second:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Logits(nn.Module):
    """A model of transformers that returns logits alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def resnet():
    batch = (torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))
    return memplan.WithLoss(ResNet(), cross_entropy), batch


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
        hidden_dropout_prob=0.1,
    )
    model = Logits(transformers.ViTForImageClassification(config))
    batch = (torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))
    return memplan.WithLoss(model, cross_entropy).train(), batch


def next_token(logits, tokens):
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gpt(tied=False):
    config = transformers.GPT2Config(
        n_layer=8,
        n_embd=32,
        n_head=4,
        vocab_size=64,
        n_positions=32,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )
    tokens = torch.randint(0, 64, (4, 32))
    model = Logits(transformers.GPT2LMHeadModel(config))
    return memplan.WithLoss(model, next_token).train(), (tokens, tokens)


MODELS = {"resnet": resnet, "vit": vit, "gpt": gpt}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]()


def in_eager(planned, batch, seed=1):
    """The sum of the detached local losses, and one backward: hooks of torch's own, no memplan.

    Returns the total and the losses.
    """
    model, heads = planned.original, planned.local_losses
    losses = []

    def end(number):
        def hook(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            losses.append(heads.get_submodule(str(number))(first, memplan.Sample.of(batch)))
            if isinstance(output, tuple):
                return tuple(one.detach() for one in output)
            return output.detach()

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(end(number))
        for number, name in enumerate(heads.names)
    ]
    torch.manual_seed(seed)
    own = model(*batch)
    for handle in handles:
        handle.remove()
    total = own
    for weight, loss in zip(heads.weights, losses, strict=True):
        total = total + weight * loss
    total.backward()
    return total, [*losses, own]


def assert_as_in_eager(planned, batch, seed=1):
    """Law 1: the loss, all gradients, the buffers and the random state."""
    other = copy.deepcopy(planned)
    planned.zero_grad()
    other.zero_grad()
    total, losses = in_eager(other, batch, seed)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    mine = planned(*batch)
    mine.backward()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(mine, total)
    for (name, one), two in zip(planned.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.equal(one.grad, two.grad), name
    for (name, one), two in zip(planned.named_buffers(), other.named_buffers(), strict=True):
        if not name.startswith("local_losses"):
            assert torch.equal(one, two[1]), name
    assert torch.equal(planned.local_losses.last, torch.stack(losses).detach())


@pytest.mark.parametrize("budget", [None, pytest.param("100%", marks=pytest.mark.slow), "1 B"])
@pytest.mark.parametrize("blocks", [2, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_sum_of_detached_losses(name, blocks, budget):
    model, batch = made(name)
    planned = memplan.optimize(
        model, batch, budget=budget, passes=[learn_locally(blocks)], options=SMALLEST
    )
    assert len(planned.local_losses.names) == blocks - 1
    laws.assert_within_budget(planned, batch)
    for seed in (1, 2):
        assert_as_in_eager(planned, batch, seed)


@pytest.mark.parametrize("name", MODELS)
def test_more_parts_need_less(name):
    model, batch = made(name)
    peaks = [
        memplan.plan(model, batch, budget="100%", passes=[learn_locally(blocks)]).peak_bytes
        for blocks in (1, 2, 4)
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < 0.75 * peaks[0]


def test_one_part_is_the_model_itself():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(1)])
    laws.assert_same_bits(
        laws.step(planned, batch),
        laws.Outcome(
            **{
                **vars(laws.step(model, batch)),
                "buffers": laws.step(planned, batch).buffers,
            }
        ),
    )


def lora_beside():
    model, batch = made("vit")
    return model, batch, [add_lora(rank=2), learn_locally(4)]


def lora_before():
    model, batch = made("gpt")
    return model, batch, [learn_locally(2), add_lora(rank=2, dropout=0.1)]


def frozen_embeddings():
    model, batch = made("gpt")
    return model, batch, [freeze("*.wte", blocks=0), learn_locally(4)]


class Coupled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.g = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, streams):
        one, two = streams
        one = one + self.f(two)
        return one, two + self.g(one)


class Streams(nn.Module):
    """Two streams that pass through eight couplings."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Coupled(width) for _ in range(8)])
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = self.first(x)
        streams = (x, x)
        for block in self.blocks:
            streams = block(streams)
        return self.head(torch.cat(streams, 1))


@pytest.mark.parametrize("make", [lora_beside, lora_before, frozen_embeddings])
@pytest.mark.parametrize("budget", [None, "50%"])
def test_with_other_passes(make, budget):
    model, batch, passes = make()
    planned = memplan.optimize(model, batch, budget=budget, passes=passes, options=SMALLEST)
    names = {name for name, p in planned.named_parameters() if p.requires_grad}
    planned(*batch).backward()
    assert {name for name, p in planned.named_parameters() if p.grad is not None} == names
    assert {name.partition(".")[0] for name in names} >= {"local_losses"}
    laws.assert_within_budget(planned, batch)


def test_blocks_are_undone_inside_parts():
    torch.manual_seed(0)
    model = memplan.WithLoss(Streams(), cross_entropy)
    batch = (torch.randn(64, 32), torch.randint(10, (64,)))
    cut = memplan.optimize(model, batch, budget="1 B", passes=[learn_locally(2)], options=SMALLEST)
    assert_as_in_eager(cut, batch)
    undone = memplan.optimize(
        model, batch, passes=[learn_locally(2), invert_couplings()], max_slowdown=1.5
    )
    step = undone.prepare(memplan.Sample.of(batch))
    undoing = {one.restore.id for one in step.recoveries if one.restore.target == "memplan.undo"}
    assert undoing.intersection(step.plan.schedule.restored_ops)
    mine = copy.deepcopy(undone)
    in_eager(mine, batch)
    undone.zero_grad()
    undone(*batch).backward()
    for one, two in zip(undone.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


def test_under_autocast():
    model, batch = made("vit")
    planned = memplan.optimize(model, batch, passes=[learn_locally(4)], options=SMALLEST)
    other = copy.deepcopy(planned)
    for module in (planned, None):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            if module is None:
                in_eager(other, batch)
            else:
                torch.manual_seed(1)
                loss = planned(*batch)
        if module is not None:
            loss.backward()
    for one, two in zip(planned.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0.05, atol=1e-3)


def test_accumulated_gradients():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(2)])
    planned(*batch).backward()
    once = [p.grad.clone() for p in planned.parameters()]
    (planned(*batch) / 2).backward()
    for one, p in zip(once, planned.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 1.5 * one, rtol=1e-3, atol=1e-6)
    laws.assert_within_budget(planned, batch)


def test_an_optimizer_trains_model_and_heads():
    model, batch = made("resnet")
    planned = memplan.optimize(
        model, batch, passes=[learn_locally(2)], optimizer=lambda p: torch.optim.Adam(p, lr=1e-3)
    )
    losses = []
    for _ in range(20):
        loss = planned(*batch)
        loss.backward()
        planned.optimizer.step()
        planned.optimizer.zero_grad()
        losses.append(planned.local_losses.last.clone())
    assert bool((losses[-1] < 0.8 * losses[0]).all())


def test_evaluation_names_and_export_are_the_models():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(4)])
    own = set(model.state_dict())
    added = set(planned.state_dict()) - own
    assert added and all(name.startswith("local_losses.") for name in added)
    planned(*batch).backward()
    planned.eval()
    with torch.no_grad():
        assert torch.equal(planned(*batch), copy.deepcopy(model).eval()(*batch))
    exported = planned.export()
    assert set(exported.state_dict()) == own and exported is not model
    for one, two in zip(exported.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two) and one is not two


def test_adapters_are_not_exported_without_being_merged():
    model, batch = made("vit")
    planned = memplan.optimize(model, batch, passes=[add_lora(rank=2)])
    with pytest.raises(memplan.MemplanError, match="merge_lora"):
        planned.export()


def test_the_given_model_is_untouched():
    model, batch = made("resnet")
    before = laws.step(model, batch)
    memplan.optimize(model, batch, passes=[learn_locally(4)])(*batch).backward()
    model.zero_grad()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    after = laws.step(model, batch)
    assert before.gradients.keys() == after.gradients.keys()


def test_a_plan_is_saved_and_applied():
    model, batch = made("gpt")
    plan = memplan.plan(model, batch, budget="50%", passes=[learn_locally(4)])
    again = memplan.Plan.from_json(plan.to_json())
    assert memplan.Effect.APPROXIMATE in again.effects
    planned = memplan.optimize(model, batch, plan=again)
    assert_as_in_eager(planned, batch)


def test_the_fewest_parts_that_fit():
    model, batch = made("resnet")

    def peak(blocks):
        passes = [learn_locally(blocks)]
        return memplan.plan(model, batch, budget="1 B", passes=passes, options=SMALLEST).peak_bytes

    budget = peak(3)
    planned = memplan.optimize(model, batch, budget=budget, passes=[learn_locally("fit")])
    parts = len(planned.local_losses.names) + 1
    assert parts <= 3 and (parts == 1 or peak(parts - 1) > budget)
    assert planned.plan.peak_bytes <= budget


def test_cut_after_named_modules():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(at=["first.1", "second.0"])])
    assert planned.local_losses.names == ("model.first.1", "model.second.0")
    assert_as_in_eager(planned, batch)


def test_weights_by_depth():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(4, weights=(0.5, 2.0))])
    assert planned.local_losses.weights == (0.5, 1.25, 2.0)
    assert_as_in_eager(planned, batch)


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_with_a_reconstruction(head):
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[learn_locally(4, head, reconstruction=2.0)])
    assert [planned.local_losses.get_submodule(str(k)).weight for k in range(3)] == [
        2.0,
        pytest.approx(4 / 3),
        pytest.approx(2 / 3),
    ]
    assert_as_in_eager(planned, batch)


class Own(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 10)

    def forward(self, x, pixel_values, labels):
        return cross_entropy(self.layer(x[:, 0]), labels)


def test_a_head_of_ones_own_for_a_model_with_its_loss_inside():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    model = transformers.ViTForImageClassification(config).train()
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(10, (4,))}
    planned = memplan.optimize(
        model, batch, passes=[learn_locally(2, lambda example, number: Own(example.shape[-1]))]
    )
    output = planned(**batch)
    output.loss.backward()
    assert planned.local_losses.get_submodule("0.function.layer").weight.grad is not None
    torch.testing.assert_close(output.loss.detach(), planned.local_losses.last.sum())
    assert output.logits.shape == (4, 10)


def masked(depth=4):
    model = MaskedAutoencoder(depth, 32, image=16, decoder_width=16)
    return model, (torch.randn(4, 1, 16, 16), torch.rand(4, 16))


@pytest.mark.parametrize("budget", [None, "1 B"])
@pytest.mark.parametrize("blocks", [2, 4])
def test_masked_images_in_blocks(blocks, budget):
    torch.manual_seed(0)
    model, batch = masked()
    planned = memplan.optimize(
        model,
        batch,
        budget=budget,
        passes=[learn_locally(blocks, "masked_image")],
        options=SMALLEST,
    )
    laws.assert_within_budget(planned, batch)
    for seed in (1, 2):
        assert_as_in_eager(planned, batch, seed)


@pytest.mark.parametrize("num_before", [0, 1])
def test_a_decoder_puts_patches_where_they_were_and_is_judged_by_hidden_ones(num_before):
    torch.manual_seed(0)
    images, noise = torch.randn(2, 1, 16, 16), torch.rand(2, 16)
    head = MaskedImage(torch.empty(2, 4 + num_before, 8), [images, noise], 0.75)
    sample = memplan.Sample.of((images, noise))
    visible = noise.argsort(1)[:, :4]
    head.embed = nn.Identity()
    head.hidden.data = torch.full((1, 1, 16), 7.0)
    head.positions.data = torch.zeros(1, 16, 16)
    head.block, head.norm, head.predict = nn.Identity(), nn.Identity(), nn.Identity()
    patches = patches_of(images, 4)
    assert torch.equal(patches[0, 5].view(4, 4), images[0, 0, 4:8, 4:8])
    seen = patches.gather(1, visible[..., None].expand(-1, -1, 16))
    tokens = torch.cat([torch.full((2, num_before, 16), 1e3), seen], 1)
    loss = head(tokens, sample)
    is_hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, visible, False)
    torch.testing.assert_close(loss, (patches[is_hidden] - 7.0).square().mean())
    # visible ones stand in their own places: were they judged, there would be no error
    head.hidden.data = torch.zeros(1, 1, 16)
    images[is_hidden.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)] = 0
    assert head(tokens, sample) == 0


def test_each_prefix_of_a_masked_autoencoder_is_trained():
    torch.manual_seed(0)
    model, batch = masked()
    planned = memplan.optimize(
        model,
        batch,
        passes=[learn_locally(4, "masked_image")],
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
    )
    losses = []
    for _ in range(30):
        planned(*batch).backward()
        planned.optimizer.step()
        planned.optimizer.zero_grad()
        losses.append(planned.local_losses.last.clone())
    assert bool((losses[-1] < 0.9 * losses[0]).all())
    assert model.features(batch[0], 2).shape == (4, 32)


def test_inputs_that_are_no_masked_images_are_refused():
    torch.manual_seed(0)
    model, batch = masked()
    with refused("is mask_ratio the model's"):
        memplan.optimize(model, batch, passes=[learn_locally(2, "masked_image", mask_ratio=0.5)])
    model, batch = made("vit")
    with refused("images .*and noise"):
        memplan.optimize(model, batch, passes=[learn_locally(2, "masked_image")])


class WithMask(nn.Module):
    """Returns first what no gradient goes back through."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, mask, x):
        return mask, x + self.layer(x).relu() * mask


class Masked(nn.Module):
    def __init__(self, width=16, num_blocks=4):
        super().__init__()
        self.blocks = nn.ModuleList(WithMask(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        mask = x > 0
        for block in self.blocks:
            mask, x = block(mask, x)
        return self.head(x)


def test_a_part_learns_from_what_a_gradient_goes_back_through():
    model = memplan.WithLoss(Masked(), cross_entropy)
    batch = (torch.randn(8, 16), torch.randint(10, (8,)))
    planned = memplan.optimize(model, batch, passes=[learn_locally(2)])
    planned(*batch).backward()
    assert all(parameter.grad is not None for parameter in planned.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_have_the_models_type(dtype):
    torch.manual_seed(0)
    model = memplan.WithLoss(Masked().to(dtype), cross_entropy)
    batch = (torch.randn(8, 16, dtype=dtype), torch.randint(10, (8,)))
    planned = memplan.optimize(model, batch, passes=[learn_locally(2)])
    assert {parameter.dtype for parameter in planned.parameters()} == {dtype}
    planned(*batch).backward()


def test_what_the_user_has_frozen_stays_frozen_in_an_export():
    model, batch = made("resnet")
    planned = memplan.optimize(model, batch, passes=[freeze("stem"), learn_locally(2)])
    model.model.head.requires_grad_(False)
    exported = planned.export()
    assert not exported.model.head.weight.requires_grad
    assert exported.model.stem.weight.requires_grad and not model.model.stem.weight.requires_grad


def test_a_plan_with_a_head_of_ones_own_is_not_applied_without_it():
    model, batch = made("resnet")

    def head(example, number):
        layer = nn.Linear(8, 10)
        return lambda x, images, labels: cross_entropy(layer(x.mean((2, 3))), labels)

    plan = memplan.plan(model, batch, passes=[learn_locally(1, head)])
    with pytest.raises(memplan.PlanMismatch, match="head of your own"):
        memplan.optimize(model, batch, plan=plan)


def refused(message):
    return pytest.raises(memplan.MemplanError, match=message)


def test_what_cannot_be_cut_is_refused():
    model, batch = made("resnet")

    def optimize(*passes, model=model, batch=batch):
        memplan.optimize(model, batch, passes=passes)

    with refused(r"blocks=10, and the forward has 8 blocks.*model\.first\.0"):
        optimize(learn_locally(10))
    with refused("cannot be cut after 'model.first.0.inside.0'.*what follows also depends"):
        optimize(learn_locally(at="model.first.0.inside.0"))
    with refused("nothing that is trained follows"):
        optimize(learn_locally(at="model.head"))
    with refused("matches nothing"):
        optimize(learn_locally(at="third"))
    with refused("returns its loss, one scalar, and ResNet returns no scalars.*WithLoss"):
        optimize(learn_locally(), model=model.model, batch=batch[:1])
    with refused(r"must return a scalar.*returned \[4, 8, 32, 32\]"):
        optimize(learn_locally(2, lambda example, number: lambda x, *batch: x))
    with refused("must return a scalar.*returned NoneType"):
        optimize(learn_locally(2, lambda example, number: lambda x, *batch: None))
    with refused("which is no function"):
        optimize(learn_locally(2, lambda example, number: 1))
    with refused("pass a batch"):
        memplan.optimize(model, passes=[learn_locally()])
    with refused("is to fit.*budget in bytes"):
        optimize(learn_locally("fit"))


def test_a_weight_on_both_sides_is_refused_by_name():
    torch.manual_seed(0)
    model, batch = gpt(tied=True)
    with refused(r"'model.model.transformer.wte.weight' is used before and after"):
        memplan.optimize(model, batch, passes=[learn_locally()])


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return (self.first(x) * self.second(x)).mean()


def test_a_forward_that_is_no_chain_is_refused():
    with refused("no chain of blocks"):
        memplan.optimize(Around(), torch.randn(4, 8), passes=[learn_locally(2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 0}, "at least 1"),
        ({"blocks": "few"}, "fit"),
        ({"head": "large"}, "linear, conv"),
        ({"mask_ratio": 1.0}, "between 0 and 1"),
        ({"weights": 1.0}, "first head's and the last's"),
        ({"weights": (float("nan"), 1.0)}, "first head's and the last's"),
        ({"reconstruction": -1.0}, "at least 0"),
        ({"blocks": "fit", "at": "first.1"}, "one of the two"),
        ({"weights": (1.0,)}, "first head's and the last's"),
        ({"weights": (-1.0, 1.0)}, "first head's and the last's"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with refused(message):
        learn_locally(**arguments)


def test_heads_without_a_loss_to_judge_them_are_refused():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])

        def forward(self, x):
            return self.layers(x).square().mean()

    with refused("WithLoss.*callable as head"):
        memplan.optimize(Inside(), torch.randn(4, 8), passes=[learn_locally(2)])


def test_heads_that_do_not_fit_are_refused():
    model = memplan.WithLoss(
        nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)]), nn.functional.mse_loss
    )
    batch = (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))
    with refused("cannot predict"):
        memplan.optimize(model, batch, passes=[learn_locally(2)])
    with refused("reconstruction is of images"):
        model, batch = made("vit")
        memplan.optimize(model, batch, passes=[learn_locally(2, reconstruction=1.0)])


def test_updates_in_the_backward_are_refused():
    model, batch = made("resnet")
    options = memplan.Options(update_in_backward=True)
    with refused("learn_locally"):
        memplan.optimize(
            model,
            batch,
            passes=[learn_locally(2)],
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            options=options,
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 50), st.data())
def test_parts_are_balanced(sizes, rest, data):
    ends = list(itertools.accumulate(sizes))
    total = ends[-1] + rest
    cuts = [Cut(str(k), end, torch.empty(0), (), True) for k, end in enumerate(ends)]
    parts = data.draw(st.integers(1, len(cuts) + 1))

    def largest(chosen):
        bounds = [0, *(cut.saved_bytes for cut in chosen), total]
        return max(after - before for before, after in itertools.pairwise(bounds))

    best = min(map(largest, itertools.combinations(cuts, parts - 1)))
    found = balanced(cuts, total, parts)
    assert len(found) == parts - 1 and largest(found) == best
