"""The share of a measured step that is explained, and its estimate's error, on 60 architectures.

Each of ``architectures.py``, in a process of its own, with AdamW: the bytes at the peak without a
known op, storage or optimizer; the measured peak by the trace against that of the plain profile;
and the prior result of ``estimate``.

    python examples/benchmarks/explained.py [--count 60]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

import memplan
from memplan.profiler import trace_memory

sys.path.insert(0, str(Path(__file__).parent.parent))
from models.tiny import model_types, tiny_model

LIMIT_S = 120
NEAR = 0.001


def look(name: str, sender: Connection) -> None:
    """Measure one architecture in a child process."""
    torch.manual_seed(0)
    try:
        model, batch = tiny_model(name)
        optimizer = torch.optim.AdamW(model.parameters())
        profile = memplan.profile(model, batch, steps=1, optimizer=optimizer)
    except Exception:
        return
    trace = trace_memory(model, batch, optimizer=optimizer)
    found: dict[str, Any] = {
        "peak_bytes": profile.peak_bytes,
        "difference_bytes": trace.peak_bytes - profile.peak_bytes,
        "unexplained": trace.unexplained_bytes / profile.peak_bytes,
    }
    try:
        known = memplan.estimate(model, batch, optimizer=optimizer, costs="measured")
        bounded = memplan.estimate(model, batch, optimizer=optimizer)
        found["error"] = known.peak_bytes / profile.peak_bytes - 1
        found["holds"] = bounded.least_bytes <= profile.peak_bytes <= bounded.most_bytes
    except memplan.MemplanError as error:
        found["refusal"] = " ".join(str(error).split())
    sender.send(found)


def run(name: str) -> dict[str, Any] | None:
    """The measurements of one architecture, or None if it does not train."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=look, args=(name, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT_S) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()


def main() -> None:
    """Print one line for each, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="stop after so many that train")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    seen: dict[str, dict[str, Any]] = {}
    for name in model_types():
        if (found := run(name)) is not None:
            seen[name] = found
            print(name, found, flush=True)
        if len(seen) == arguments.count:
            break
    answered = [one for one in seen.values() if "error" in one]
    near = sum(abs(one["error"]) <= NEAR for one in answered)
    print(
        f"{len(seen)} architectures: at most {max(o['unexplained'] for o in seen.values()):.2%} "
        f"unexplained; the trace's peak is the profile's in "
        f"{sum(o['difference_bytes'] == 0 for o in seen.values())}. Estimates: {len(answered)} "
        f"answered, {near} within {NEAR:.1%}, largest error "
        f"{max(abs(o['error']) for o in answered):.2%}; {sum(o['holds'] for o in answered)} "
        "intervals hold."
    )


if __name__ == "__main__":
    main()
