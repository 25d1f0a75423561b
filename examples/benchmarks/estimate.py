"""The error of estimates against measured peaks, on the CPU: memplan's and other tools'.

    python examples/benchmarks/estimate.py                       # needs transformers
    python examples/benchmarks/estimate.py --models gpt2,swin --threads 1 2
    python examples/benchmarks/estimate.py --write examples/benchmarks/results/estimate.json
    python examples/benchmarks/estimate.py --read examples/benchmarks/results/estimate.json

A cell is a model, a batch size and an optimizer, whose step is part of the measured step; the
truth is the bytes handed out by torch's allocator. Measured costs start from an empty cache in
every cell. Models marked * had no part in the constants of ``memplan/costs/kernels.py``. The calls
of the estimators are in ``estimators.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

import memplan

sys.path.insert(0, str(Path(__file__).parent))
import scaled
from estimators import OTHERS, OURS, Estimator, Row

Made = tuple[nn.Module, Any]
SHARES = (0.25, 0.5, 1.0)
"""Shares of a model's batch."""
OPTIMIZERS: dict[str, type[Optimizer]] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


def swin() -> Made:
    """Windowed attention in three stages."""
    config = transformers.SwinConfig(
        image_size=96, patch_size=4, embed_dim=48, depths=[2, 2, 4], num_heads=[2, 4, 8],
        window_size=6, num_labels=10,
    )  # fmt: skip
    return transformers.SwinForImageClassification(config), _images(16, 96)


def regnet() -> Made:
    """Grouped convolutions, squeeze and excitation."""
    config = transformers.RegNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 4, 1], groups_width=16,
        num_labels=10,
    )  # fmt: skip
    return transformers.RegNetForImageClassification(config), _images(16, 112)


def whisper() -> Made:
    """Convolutions over a spectrogram, an encoder and a decoder."""
    config = transformers.WhisperConfig(
        vocab_size=2000, d_model=128, encoder_layers=3, decoder_layers=3, num_mel_bins=40,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=512,
        decoder_ffn_dim=512, max_source_positions=256, max_target_positions=64, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )  # fmt: skip
    batch = {"input_features": torch.randn(8, 40, 512), "labels": torch.randint(0, 2000, (8, 48))}
    return transformers.WhisperForConditionalGeneration(config), batch


def deberta() -> Made:
    """Attention that separates content from position."""
    config = transformers.DebertaV2Config(
        num_hidden_layers=4, hidden_size=128, num_attention_heads=4, intermediate_size=512,
        vocab_size=2000, max_position_embeddings=128, relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    ids = torch.randint(3, 2000, (8, 96))
    batch = {"input_ids": ids, "labels": ids.clone()}
    return transformers.DebertaV2ForMaskedLM(config), batch


def _images(batch: int, size: int) -> Any:
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    return {"pixel_values": images, "labels": labels}


def _seen(name: str) -> Callable[[], Made]:
    return lambda: scaled.MODELS[name]()[:2]


UNSEEN: dict[str, Callable[[], Made]] = {
    made.__name__: made for made in (swin, regnet, whisper, deberta)
}
MODELS: dict[str, Callable[[], Made]] = {
    **{
        name: _seen(name)
        for name in (
            "mlp", "gpt2", "bert", "llama", "t5", "vit", "resnet", "convnext", "mobilenet",
            "lstm", "experts", "unet", "autoencoder",
        )
    },
    **UNSEEN,
}  # fmt: skip


def cells(name: str, threads: int, estimators: dict[str, Estimator]) -> list[Row]:
    """All cells of a model: the truth and the estimates."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module, whole = MODELS[name]()
    module.train()
    rows = []
    for share in SHARES:
        batch = tree_map_only(torch.Tensor, lambda tensor, of=share: _part(tensor, of), whole)
        sample = memplan.Sample.of(batch)
        for kind, make in OPTIMIZERS.items():
            optimizer = make(module.parameters())  # type: ignore[call-arg]
            seen = memplan.profile(module, sample, optimizer=optimizer, steps=1)
            rows.append(
                {
                    "model": name,
                    "unseen": name in UNSEEN,
                    "threads": threads,
                    "batch": len(sample.tensors()[0]),
                    "optimizer": kind,
                    "peak_bytes": seen.peak_bytes,
                    "resident_bytes": seen.resident_bytes,
                    "step_s": seen.step_s,
                    "estimates": {
                        key: _answer(estimator, module, sample, optimizer)
                        for key, estimator in estimators.items()
                    },
                }
            )
            print(_line(rows[-1]), flush=True)
    return rows


def _part(tensor: torch.Tensor, share: float) -> torch.Tensor:
    return tensor[: max(1, int(share * len(tensor)))].clone()


def _answer(
    estimator: Estimator, module: nn.Module, sample: memplan.Sample, optimizer: Optimizer
) -> Row:
    """An estimate and the seconds it took, or the reason why there is none."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = estimator(module, sample, optimizer)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return {**found, "seconds": time.perf_counter() - start}


def _errors(rows: list[Row], key: str) -> list[float]:
    """Estimate over truth, minus one, for each row with an estimate."""
    return [
        row["estimates"][key]["peak_bytes"] / row["peak_bytes"] - 1
        for row in rows
        if "peak_bytes" in row["estimates"].get(key, {})
    ]


def _line(row: Row) -> str:
    found = {key: _errors([row], key) for key in row["estimates"]}
    errors = ", ".join(
        f"{key} {_percent(max(error, default=None))}" for key, error in found.items()
    )
    cell = f"{row['model']} {row['batch']} {row['optimizer']}, {row['threads']} threads"
    return f"{cell}: {memplan.units.format_bytes(row['peak_bytes'])}; {errors}"


def _percent(share: float | None = None) -> str:
    return "-" if share is None else f"{100 * share:+.3f} %"


def table(rows: list[Row]) -> str:
    """Markdown: the median absolute error for each model and estimator."""
    keys = list(rows[0]["estimates"])
    lines = [f"| model | {' | '.join(keys)} |", f"|---|{'--:|' * len(keys)}"]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        errors = [list(map(abs, _errors(own, key))) for key in keys]
        found = [f"{100 * median(sizes):.2f} %" if sizes else "no answer" for sizes in errors]
        lines.append(f"| {name}{'*' if own[0]['unseen'] else ''} | {' | '.join(found)} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Markdown: all cells of each estimator together, and memplan's promises."""
    lines = [
        "| estimator | cells | median | p95 | most under | most over | seconds, against a step's |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for key in rows[0]["estimates"]:
        errors = _errors(rows, key)
        if not errors:
            lines.append(f"| {key} | 0 of {len(rows)} | | | | | |")
            continue
        sizes = sorted(map(abs, errors))
        answers = [(row["estimates"][key], row["step_s"]) for row in rows]
        times = [(found["seconds"], step_s) for found, step_s in answers if "seconds" in found]
        seconds = median(taken_s for taken_s, _ in times)
        steps = median(taken_s / step_s for taken_s, step_s in times)
        lines.append(
            f"| {key} | {len(errors)} of {len(rows)} | {100 * median(sizes):.2f} % "
            f"| {100 * _p95(sizes):.2f} % | {_percent(min(0.0, *errors))} "
            f"| {_percent(max(0.0, *errors))} | {seconds:.1f}, {steps:.1f}x |"
        )
    return "\n".join(lines)


def _p95(ordered: list[float]) -> float:
    return ordered[-(-95 * len(ordered) // 100) - 1]


def verdicts(rows: list[Row]) -> list[str]:
    """The targets, each met or missed."""
    errors = _errors(rows, "measured")
    sizes = sorted(map(abs, errors))
    intervals = [
        (row["estimates"]["analytic"], row["peak_bytes"])
        for row in rows
        if "least_bytes" in row["estimates"]["analytic"]
    ]
    holds = [found["least_bytes"] <= peak <= found["most_bytes"] for found, peak in intervals]
    widths = [(found["most_bytes"] - found["least_bytes"]) / peak for found, peak in intervals]
    width = median(widths)
    targets = {
        f"measured: median error {100 * median(sizes):.4f} % (target 1 %)": median(sizes) <= 0.01,
        f"measured: p95 {100 * _p95(sizes):.4f} % (target 3 %)": _p95(sizes) <= 0.03,
        f"measured: most under {_percent(min(0.0, *errors))} (target -2 %)": min(errors) >= -0.02,
        f"measured: answers in {len(errors)} of {len(rows)} cells": len(errors) == len(rows),
        f"analytic: the interval holds {sum(holds)} of {len(rows)}": sum(holds) == len(rows),
        f"analytic: median width {100 * width:.1f} % (target 25 %), widest "
        f"{100 * max(widths):.1f} %": width <= 0.25,
    }
    return [f"{'met' if is_met else 'MISSED'}: {text}" for text, is_met in targets.items()]


def report(rows: list[Row]) -> str:
    """All tables, for each number of threads."""
    parts = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        own = [row for row in rows if row["threads"] == threads]
        parts += [f"CPU, {threads} threads", table(own), summary(own), "\n".join(verdicts(own))]
        refused = {
            f"{row['model']}, {key}: {found['refused']}"
            for row in own
            for key, found in row["estimates"].items()
            if "refused" in found
        }
        parts.append("\n".join(["No answer:", *sorted(refused)] if refused else []))
    return "\n\n".join(filter(None, parts))


def main() -> None:
    """Measure, print, and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas between")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="other tools at the first alone"
    )
    parser.add_argument("--write", type=Path, metavar="JSON", help="write all cells there")
    parser.add_argument("--read", type=Path, metavar="JSON", help="measure nothing: show these")
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(report(json.loads(arguments.read.read_text())["rows"]))
        return
    transformers.utils.logging.set_verbosity_error()
    packages = ["torch", "transformers", *(name for name in OTHERS if name != "MemTracker")]
    machine = ", ".join(["CPU", *(f"{name} {version(name)}" for name in packages)])
    rows: list[Row] = []
    for threads in arguments.threads:
        estimators = OURS | (OTHERS if threads == arguments.threads[0] else {})
        for name in arguments.models.split(","):
            rows += cells(name, threads, estimators)
            if arguments.write is not None:
                found = {"machine": machine, "rows": rows}
                arguments.write.write_text(json.dumps(found, indent=1) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
