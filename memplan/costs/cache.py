"""Measured costs on disk: one JSON file for each machine and setting."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

from memplan.ir.program import Layout, OpCost

_SCHEMA = 8
_LOG = logging.getLogger("memplan")


def cache_folder() -> Path:
    """The folder of memplan's files: ``$MEMPLAN_CACHE_DIR``, or "memplan" in the user's cache."""
    chosen = os.environ.get("MEMPLAN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return platformdirs.user_cache_path("memplan", appauthor=False)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    new = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def describe_machine(device: torch.device) -> str:
    """All that measured costs depend on, apart from the op."""
    cuda = []
    if device.type == "cuda":
        cuda = [
            torch.cuda.get_device_name(device),
            f"cudnn {torch.backends.cudnn.version()}",  # type: ignore[no-untyped-call]
            f"benchmark {torch.backends.cudnn.benchmark}",
            f"deterministic {torch.backends.cudnn.deterministic}",
            f"tf32 {torch.backends.cudnn.allow_tf32}",
        ]
    return ", ".join(
        [
            *cuda,
            _processor(),
            f"{torch.get_num_threads()} threads",
            f"torch {torch.__version__}",
            f"mkldnn {torch.backends.mkldnn.enabled}",
            f"matmul {torch.get_float32_matmul_precision()}",
            f"deterministic {torch.are_deterministic_algorithms_enabled()}",
        ]
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class CostCache:
    """Costs by op signature.

    Attributes:
        machine: the machine that they were measured on.
        path: the file.
        entries: signature to cost.
    """

    machine: str
    path: Path
    entries: Mapping[str, OpCost]

    @classmethod
    def load(cls, device: torch.device) -> CostCache:
        """Read the file for a device and setting; a damaged one counts as empty."""
        machine = describe_machine(device)
        name = hashlib.sha256(machine.encode()).hexdigest()[:16]
        path = cache_folder() / f"costs-{name}.json"
        return cls(machine, path, _read(path, machine))

    def updated(self, new: Mapping[str, OpCost]) -> CostCache:
        """Add entries and write the file, whole or not at all."""
        if not new:
            return self
        merged = CostCache(
            self.machine, self.path, {**_read(self.path, self.machine), **self.entries, **new}
        )
        merged._write()
        return merged

    def _write(self) -> None:
        data = {
            "schema_version": _SCHEMA,
            "machine": self.machine,
            "entries": {
                signature: [
                    cost.seconds,
                    cost.flops,
                    cost.workspace_bytes,
                    cost.result_bytes,
                    [one and [one.strides, one.dtype, one.device] for one in cost.result_layouts],
                ]
                for signature, cost in self.entries.items()
            },
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(data))
        except OSError as error:
            _LOG.warning("measured costs are not kept: %s: %s", self.path, error)


def _read(path: Path, machine: str) -> Mapping[str, OpCost]:
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        _LOG.warning("ignoring damaged cost cache %s: %s", path, error)
        return {}
    return _parsed(path, machine, (state.st_ino, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, machine: str, state: tuple[int, ...]) -> Mapping[str, OpCost]:
    """The entries of a file, read once for each ``state`` of it: a plan asks several times."""
    del state
    try:
        data = json.loads(path.read_text())
        if data["schema_version"] != _SCHEMA or data["machine"] != machine:
            return {}
        return {
            str(signature): OpCost(
                float(seconds),
                int(flops),
                int(workspace),
                tuple(map(int, sizes)),
                tuple(
                    None
                    if one is None
                    else Layout(tuple(map(int, one[0])), str(one[1]), str(one[2]))
                    for one in layouts
                ),
            )
            for signature, (seconds, flops, workspace, sizes, layouts) in data["entries"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("ignoring damaged cost cache %s: %s", path, error)
        return {}
