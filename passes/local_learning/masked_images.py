"""Masked-image pre-training of a part: its own light decoder fills in the hidden patches.

Luo, Ren and Zhang, "BIM: Block-Wise Self-Supervised Learning with Masked Image Modeling", 2023,
https://arxiv.org/abs/2311.17218, on the recipe of He et al., "Masked Autoencoders Are Scalable
Vision Learners", 2021, https://arxiv.org/abs/2111.06377: the encoder sees the visible patches
only, the decoder puts a learned token in place of each hidden one, and the loss is the mean
squared error of the hidden patches. Each part of the encoder is then a backbone by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from memplan.capture.sample import Sample

_WIDTH = 64
_HEADS = 4


class MaskedImage(nn.Module):
    """Predicts the hidden patches of an image from a part's output for the visible ones.

    The model is called with images ``[batch, channels, height, width]`` and noise
    ``[batch, patches]``, as positional or keyword arguments; the patches of each image with the
    least noise are visible, in the order of their noise.

    Args:
        example: ``[batch, tokens, width]``, the part's output: the visible patches, after a class
            token if there is one.
        inputs: the model's input tensors.
        mask_ratio: share of hidden patches.

    Raises:
        MemplanError: if images, noise and tokens do not match in this way.
    """

    def __init__(
        self, example: torch.Tensor, inputs: Sequence[torch.Tensor], mask_ratio: float
    ) -> None:
        super().__init__()
        places = [place for place, one in enumerate(inputs) if one.dim() == 4]
        noises = [
            place for place, one in enumerate(inputs) if one.dim() == 2 and one.is_floating_point()
        ]
        if len(places) != 1 or len(noises) != 1 or example.dim() != 3:
            raise _mismatch(example, inputs)
        self.places = places[0], noises[0]
        images, noise = (inputs[place] for place in self.places)
        self.num_patches = noise.shape[1]
        self.num_visible = int(self.num_patches * (1 - mask_ratio))
        self.num_before = example.shape[1] - self.num_visible
        pixels = images.shape[2] * images.shape[3] / self.num_patches
        self.side = math.isqrt(round(pixels))
        if self.num_before not in (0, 1) or self.side**2 != pixels:
            raise _mismatch(example, inputs)
        channels = images.shape[1]
        self.embed = nn.Linear(example.shape[2], _WIDTH)
        self.hidden = nn.Parameter(0.02 * torch.randn(1, 1, _WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.num_patches, _WIDTH))
        self.block = nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, 2 * _WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(_WIDTH)
        self.predict = nn.Linear(_WIDTH, channels * self.side**2)

    def forward(self, x: torch.Tensor, sample: Sample) -> torch.Tensor:
        """The mean squared error of the hidden patches."""
        tensors = sample.tensors()
        images, noise = (tensors[place] for place in self.places)
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        visible = self.embed(x[:, self.num_before :])
        count = self.num_patches - self.num_visible
        hidden = self.hidden.to(visible.dtype).expand(len(visible), count, -1)
        tokens = torch.cat([visible, hidden], dim=1)
        tokens = tokens.gather(1, back[..., None].expand(-1, -1, tokens.shape[2]))
        predicted = self.predict(self.norm(self.block(tokens + self.positions)))
        is_hidden = (back >= self.num_visible).to(predicted.dtype)
        error = (predicted - patches_of(images, self.side)).square().mean(2)
        total: torch.Tensor = (error * is_hidden).sum()
        return total / is_hidden.sum()


def patches_of(images: torch.Tensor, side: int) -> torch.Tensor:
    """Patches ``[batch, patches, pixels]`` of images ``[batch, channels, height, width]``."""
    return nn.functional.unfold(images, side, stride=side).transpose(1, 2)


def _mismatch(example: torch.Tensor, inputs: Sequence[torch.Tensor]) -> MemplanError:
    shapes = ", ".join(str(list(one.shape)) for one in inputs)
    return MemplanError(
        'head="masked_image" needs a model that is called with images [batch, channels, height, '
        "width] and noise [batch, patches], whose parts return [batch, visible patches (and one "
        f"for the class), width]. The inputs are {shapes}, and a part returns "
        f"{list(example.shape)}: is mask_ratio the model's?"
    )
