"""The cost of training a part of a network: frozen layers, planned and not.

python examples/benchmarks/frozen.py [--quick]

Prints a table. Peaks are measured, above resident bytes (parameters, buffers, the batch). Eager
saves the inputs of convolutions and norms whether their parameters train or not, and the results
of ReLU; for frozen linear layers it saves nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import memplan

sys.path.insert(0, str(Path(__file__).parent))
from pages import put

MAX_SLOWDOWN = 1.02
MIB = 2**20
CLASSES = 100


class Bottleneck(nn.Module):
    """ResNet's block: 1 x 1, 3 x 3 and 1 x 1 convolutions, and a shortcut.

    Args:
        inputs: input channels.
        width: channels of the 3 x 3 convolution; the output has four times as many.
        stride: stride of the 3 x 3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        self.last = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, c, h, w]."""
        result: torch.Tensor = self.last(self.body(x) + self.around(x))
        return result


def resnet(depths: tuple[int, ...]) -> nn.Sequential:
    """A ResNet of bottlenecks: stem, stages, classifier."""
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    )
    blocks: list[nn.Module] = []
    channels = 64
    for stage, depth in enumerate(depths):
        for block in range(depth):
            width = 64 * 2**stage
            blocks.append(Bottleneck(channels, width, 2 if stage and not block else 1))
            channels = 4 * width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    return nn.Sequential(stem, *blocks, head)


def frozen_resnet(depths: tuple[int, ...], *, norms_train: bool) -> nn.Module:
    """All convolutions but the first frozen, norms in evaluation, the classifier trainable."""
    model = resnet(depths)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(norms_train)
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(module.in_channels == 3)
    return model


def only_fourth(layers: list[nn.Module]) -> nn.Module:
    """A stack in evaluation of which the fourth layer trains, without its norm."""
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    fourth = layers[3][0] if isinstance(layers[3], nn.Sequential) else layers[3]
    fourth.requires_grad_(True)
    return model


class Mean(nn.Module):
    """The mean of a model's output, as a loss.

    Args:
        model: returns a tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of any batch of the model."""
        loss: torch.Tensor = self.model(x).mean()
        return loss


@dataclass(frozen=True)
class Case:
    """A partly trained model and a batch.

    Attributes:
        name: name to print.
        make: makes the module that returns a loss, and its batch.
    """

    name: str
    make: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]


def cases(*, quick: bool) -> list[Case]:
    """The rows of the table; smaller ones for a quick run."""
    channels, size, batch = (16, 32, 4) if quick else (64, 64, 8)
    depths = (1, 1, 2, 1) if quick else (3, 4, 23, 3)
    images = 2 if quick else 8

    def convolutions() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
            for _ in range(10)
        ]
        return Mean(only_fourth(layers)), (torch.randn(batch, channels, size, size),)

    def linears() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        width = 8 * channels
        layers: list[nn.Module] = [nn.Linear(width, width) for _ in range(10)]
        return Mean(only_fourth(layers)), (torch.randn(64 * batch, width),)

    def with_loss(model: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        given = torch.randn(images, 3, 64, 64), torch.randint(0, CLASSES, (images,))
        return memplan.WithLoss(model, nn.functional.cross_entropy), given

    name = f"ResNet-{3 * sum(depths) + 2}"
    return [
        Case("10 x conv + norm, 4th conv trains", convolutions),
        Case(
            f"{name}, convs frozen, norms train",
            lambda: with_loss(frozen_resnet(depths, norms_train=True)),
        ),
        Case(
            f"{name}, convs and norms frozen",
            lambda: with_loss(frozen_resnet(depths, norms_train=False)),
        ),
        Case("10 x linear, 4th trains", linears),
        Case(f"{name}, all trains", lambda: with_loss(resnet(depths))),
    ]


def row(case: Case, steps: int) -> str:
    """Measure a case, for one line of the table."""
    torch.manual_seed(0)
    model, batch = case.make()
    planned = memplan.optimize(model, batch, max_slowdown=MAX_SLOWDOWN)
    found = memplan.compare(model, planned, batch, steps=steps)
    eager, ours = (
        (profile.peak_bytes - profile.resident_bytes) / MIB
        for profile in (found.original, found.planned)
    )
    return (
        f"| {case.name} | {eager:.1f} | {ours:.1f} | {ours / eager:.2f} "
        f"| {planned.plan.slowdown:.3f} | {found.time_ratio:.3f} "
        f"| {'yes' if found.gradients_equal else 'no'} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models, a few seconds")
    parser.add_argument("--page", type=Path, help="put the table there, at its mark")
    parser.add_argument("--mark", default="frozen, two threads", help="of the table on the page")
    chosen = parser.parse_args()
    lines = [
        "| model | eager MiB | memplan MiB | ratio | predicted | time | same bits |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    print("\n".join(lines))
    for case in cases(quick=chosen.quick):
        lines.append(row(case, steps=3 if chosen.quick else 5))
        print(lines[-1], flush=True)
    if chosen.page is not None:
        put(chosen.page, chosen.mark, "\n".join(lines))
    print(
        "\nLinear layers that are frozen keep nothing in eager either: their gradient reads the "
        "weight alone.\nWhere all convolutions train, they read the ReLUs' results themselves, and "
        "no mask is made but the one before the pooling."
    )


if __name__ == "__main__":
    main()
