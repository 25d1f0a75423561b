"""The cost of a budget: memory and time of a step, planned and not, in one process.

    python examples/benchmarks/budgets.py                     # the GPT of examples/train_gpt.py
    python examples/benchmarks/budgets.py gpt mlp gpt2 vit    # needs transformers

Beside memplan stand the alternatives of a user: the untouched module, and
``torch.utils.checkpoint`` around every block. Times are medians of ratios to the untouched module
over interleaved rounds; peaks are exact. ``--json`` writes the numbers, and ``--readme`` makes the
README's table from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memplan
from memplan.profiler.step import clear_gradients, run_step

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from pages import put
from train_gpt import gpt_and_batch

BUDGETS = ("100%", "80%", "50%", "35%")
Scaled = tuple[nn.Module, Any, nn.Module]
"""A model, a batch, and the model with every block under a checkpoint."""


class Checkpointed(nn.Module):
    """A block whose activations torch's own checkpointing recomputes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def gpt() -> Scaled:
    """The GPT of the examples, and its copy with every block checkpointed."""
    model, batch = gpt_and_batch()
    peer = copy.deepcopy(model)
    peer.blocks = nn.Sequential(*(Checkpointed(block) for block in peer.blocks))
    return model, batch, peer


def mlp() -> Scaled:
    """Sixteen layers in ``nn.Sequential``; a block is linear, gelu and dropout."""

    def build() -> list[nn.Module]:
        return [nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Dropout(0.1)) for _ in range(16)]

    blocks = build()
    head = nn.Linear(512, 10)
    batch = (torch.randn(2048, 512), torch.randint(0, 10, (2048,)))
    loss = nn.functional.cross_entropy
    peer_blocks = [Checkpointed(copy.deepcopy(block)) for block in blocks]
    return (
        memplan.WithLoss(nn.Sequential(*blocks, head), loss),
        batch,
        memplan.WithLoss(nn.Sequential(*peer_blocks, copy.deepcopy(head)), loss),
    )


def gpt2() -> Scaled:
    """GPT-2 from transformers: twelve layers, width 192."""
    import transformers  # noqa: PLC0415  only some rows need it

    config = transformers.GPT2Config(
        n_layer=12, n_embd=192, n_head=6, vocab_size=2000, n_positions=256, use_cache=False,
        bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
    )  # fmt: skip
    tokens = torch.randint(0, 2000, (4, 256))
    model = transformers.GPT2LMHeadModel(config).train()
    return model, {"input_ids": tokens, "labels": tokens.clone()}, hugging_face_peer(model)


def vit() -> Scaled:
    """ViT from transformers: eight layers, width 192, dropout."""
    import transformers  # noqa: PLC0415  only some rows need it

    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=8, num_attention_heads=6, intermediate_size=768,
        image_size=96, patch_size=8, num_labels=10, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(8, 3, 96, 96), "labels": torch.randint(0, 10, (8,))}
    model = transformers.ViTForImageClassification(config).train()
    return model, batch, hugging_face_peer(model)


def hugging_face_peer(model: Any) -> nn.Module:
    """A copy under transformers' own checkpoints, one for each layer."""
    peer = copy.deepcopy(model)
    peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert isinstance(peer, nn.Module)
    return peer


MODELS: dict[str, Callable[[], Scaled]] = {
    "gpt": gpt,
    "mlp": mlp,
    "gpt2": gpt2,
    "vit": vit,
}


def measure(name: str, rounds: int, budgets: list[str], *, peers: bool) -> list[dict[str, Any]]:
    """All rows for one model."""
    torch.manual_seed(0)
    model, sample, peer = MODELS[name]()
    batch = memplan.Sample.of(sample)
    modules: dict[str, nn.Module] = {"untouched": model}
    if peers:
        modules["checkpoint per block"] = peer
    plans: dict[str, memplan.Plan] = {}
    for budget in budgets:
        print(f"{name}: planning for {budget}", file=sys.stderr)
        options = memplan.Options(on_infeasible="smallest")
        planned = memplan.optimize(model, sample, budget=budget, options=options)
        modules[f"memplan {budget}"] = planned
        plans[f"memplan {budget}"] = planned.plan
    peaks = {key: memplan.profile(module, sample, steps=1) for key, module in modules.items()}
    exact = {key: _same_gradients(model, module, batch) for key, module in modules.items()}
    times = _interleaved(modules, batch, rounds, name)
    return [
        {
            "model": name,
            "run": key,
            "peak_bytes": peaks[key].peak_bytes,
            "resident_bytes": peaks[key].resident_bytes,
            "predicted_bytes": plans[key].peak_bytes if key in plans else None,
            "budget_bytes": plans[key].budget_bytes if key in plans else None,
            "time_ratio": median(b / a for a, b in zip(times["untouched"], spent, strict=True)),
            "step_s": median(spent),
            "same_gradients": exact[key],
        }
        for key, spent in times.items()
    ]


def _interleaved(
    modules: dict[str, nn.Module], batch: memplan.Sample, rounds: int, name: str
) -> dict[str, list[float]]:
    """Seconds of each module's step: one step of each per round, in a random order."""
    times: dict[str, list[float]] = {key: [] for key in modules}
    order = random.Random(0)
    for number in range(rounds + 1):
        print(f"{name}: round {number} of {rounds}", file=sys.stderr)
        for key in order.sample(list(modules), len(modules)):
            start = time.perf_counter()
            run_step(modules[key], batch)
            spent = time.perf_counter() - start
            clear_gradients(modules[key])
            if number > 0:
                times[key].append(spent)
    return times


def _same_gradients(original: nn.Module, module: nn.Module, batch: memplan.Sample) -> bool:
    """Tell whether the gradients have the same bits, parameter by parameter."""
    gradients = []
    for one in (original, module):
        torch.manual_seed(1)
        run_step(one, batch)
        gradients.append([parameter.grad for parameter in one.parameters()])
        clear_gradients(one)
    pairs = zip(*gradients, strict=True)
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | run | peak | above resident | predicted - measured | step time | gradients |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        base = next(r for r in rows if r["model"] == row["model"] and r["run"] == "untouched")
        above = row["peak_bytes"] - row["resident_bytes"]
        share = above / (base["peak_bytes"] - base["resident_bytes"])
        error = "" if row["predicted_bytes"] is None else row["predicted_bytes"] - row["peak_bytes"]
        same = "same bits" if row["same_gradients"] else "differ"
        lines.append(
            f"| {row['model']} | {row['run']} | {memplan.format_bytes(row['peak_bytes'])} "
            f"| {share:.0%} | {error if error == '' else f'{error} B'} "
            f"| {row['time_ratio']:.2f}x | {same} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["gpt"], metavar="MODEL")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, metavar="BUDGET")
    parser.add_argument("--no-peers", action="store_true", help="the untouched module alone")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--readme", type=Path, help="measure nothing: put --json's table in there")
    arguments = parser.parse_args()
    if arguments.readme is not None:
        markdown = table(json.loads(arguments.json.read_text())["rows"])
        put(arguments.readme, "examples/benchmarks/results/budgets.json", markdown)
        return
    rows = [
        row
        for name in arguments.models
        for row in measure(name, arguments.rounds, arguments.budgets, peers=not arguments.no_peers)
    ]
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(table(rows))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
