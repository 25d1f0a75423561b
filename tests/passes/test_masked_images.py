"""Masked images in blocks: each part has a decoder of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.passes import learn_locally
from memplan.passes.local_learning.masked_images import MaskedImage, patches_of

from models.masked import MaskedAutoencoder
from support import laws
from support.local import SMALLEST, assert_as_in_eager, made, refused


def masked(depth=4):
    model = MaskedAutoencoder(depth, 32, image=16, decoder_width=16)
    return model, (torch.randn(4, 1, 16, 16), torch.rand(4, 16))


@pytest.mark.by_default("2-None")
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


@pytest.mark.slow
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
