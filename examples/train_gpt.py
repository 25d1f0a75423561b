"""Train a GPT on real text within a budget of memory.

    python examples/train_gpt.py --budget 50% --steps 100
    python examples/train_gpt.py --plain --steps 100       # the untouched module

Both print the same losses, bit for bit. The budget is for the whole step, the optimizer's state
and update included; with --update-in-backward the gradients are never all alive. The text is the
Python language reference, as CPython ships it in ``pydoc_data.topics``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from models.gpt import GPT


def load_text() -> tuple[torch.Tensor, int]:
    """All topics as one sequence of character numbers, and the size of the vocabulary."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    return torch.tensor([number[character] for character in text]), len(characters)


def batches(
    text: torch.Tensor, batch_size: int, context: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens, targets), each [batch_size, context], from random places in the text."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context - 1, (batch_size,), generator=generator)
        windows = torch.stack([text[start : start + context + 1] for start in starts])
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def gpt_and_batch(
    batch_size: int = 16, context: int = 256
) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The model and one batch, for ``memplan compare examples/train_gpt.py:gpt_and_batch``."""
    torch.manual_seed(0)
    text, vocabulary = load_text()
    return GPT(vocabulary, context=context), next(batches(text, batch_size, context, seed=0))


def main() -> None:
    """Parse arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", default="50%", help='such as "50%%" or "300MiB"')
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update-in-backward", action="store_true", help="free each gradient")
    parser.add_argument("--plain", action="store_true", help="without memplan")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    text, vocabulary = load_text()
    model: nn.Module = GPT(
        vocabulary, arguments.context, depth=arguments.depth, width=arguments.width
    )
    source = batches(text, arguments.batch_size, arguments.context, arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    if not arguments.plain:
        batch = next(batches(text, arguments.batch_size, arguments.context, seed=1))
        in_backward = arguments.update_in_backward
        model = plan_and_show(model, batch, optimizer, arguments.budget, in_backward)
    train(model, optimizer, source, arguments.steps)


def plan_and_show(
    model: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    budget: str,
    update_in_backward: bool,
) -> nn.Module:
    """Plan, and print predicted and measured peak."""
    import memplan  # noqa: PLC0415  --plain runs without it

    options = memplan.Options(update_in_backward=update_in_backward)
    planned = memplan.optimize(model, batch, budget=budget, optimizer=optimizer, options=options)
    measured = memplan.profile(planned, batch, steps=1)
    print(planned.plan)
    print(f"predicted peak {memplan.format_bytes(planned.plan.peak_bytes)}")
    print(f"measured peak  {memplan.format_bytes(measured.peak_bytes)}")
    return planned


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
) -> None:
    """Run the usual loop, for any module."""
    num_tokens = 0
    start = time.perf_counter()
    for step in range(steps):
        tokens, targets = next(source)
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += tokens.numel()
        # .hex() shows every bit of the number
        print(f"step {step:4d}  loss {loss.item():.6f}  {loss.item().hex()}", flush=True)
    print(f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
