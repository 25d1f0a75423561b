"""Traces in the formats of other programs."""

from __future__ import annotations

import json
import pickle
import pickletools
from collections import Counter

import pytest
from torch.cuda import _memory_viz

import memplan
from memplan.ir.memory_trace import Allocation, MemoryTrace, Resident, Span
from memplan.profiler import trace_memory
from memplan.report.chrome import chrome_trace
from memplan.report.snapshot import snapshot, snapshot_bytes

from support.small import Net, X, sgd

READ_BY_THE_VIEWER = {
    *("APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT"),
    *("BINUNICODE", "DICT", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1"),
    *("LONG_BINGET", "LONG_BINPUT", "MARK", "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO"),
    *("SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
"""Opcodes of pickle; it fails at any other."""


def block(nbytes, category, phase, lives, **known):
    made, freed = lives
    about = {"op": "aten::mm", "module": "layers.0", "source": "/home/train.py:12", "name": ""}
    about.update(known)
    return Allocation(nbytes, category, phase, **about, made=made, freed=freed)


def small_trace():
    """After each event 140, 160, 140, 200, 160, 190 and 160 bytes; 60 remain above residents."""
    return MemoryTrace(
        kind="measured",
        device="cuda:3",
        residents=(Resident("weight", 100, "parameter"), Resident("nothing", 0, "buffer")),
        blocks=(
            block(40, "saved activation", "forward", (0, 4)),
            block(20, "temporary", "forward", (1, 2)),
            block(60, "gradient", "backward", (3, None), name="weight"),
            block(30, "temporary", "backward", (5, 6), op=""),
        ),
        times_s=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
        spans=(Span("forward", 0, 3), Span("backward", 3, 7)),
    )


def test_a_small_snapshot():
    data = snapshot(small_trace())
    residents, rest = data["segments"]
    start = residents["address"]
    (weight,) = residents["blocks"]
    assert (weight["size"], weight["state"]) == (100, "active_allocated")
    assert weight["frames"][0]["filename"] == "weight"
    # 40, then 20, then 60 beside them, which stay; 30 go into the gap that the first two leave.
    assert (rest["address"], rest["total_size"], rest["active_size"]) == (start + 100, 120, 60)
    assert [(b["address"] - start, b["size"], b["state"]) for b in rest["blocks"]] == [
        (100, 60, "inactive"),
        (160, 60, "active_allocated"),
    ]
    assert {segment["device"] for segment in data["segments"]} == {0}
    (events,) = data["device_traces"]
    assert [(e["action"], e["addr"] - start - 100, e["size"]) for e in events] == [
        ("alloc", 0, 40),
        ("alloc", 40, 20),
        ("free_requested", 40, 20),
        ("free_completed", 40, 20),
        ("alloc", 60, 60),
        ("free_requested", 0, 40),
        ("free_completed", 0, 40),
        ("alloc", 0, 30),
        ("free_requested", 0, 30),
        ("free_completed", 0, 30),
    ]
    assert events[4]["frames"] == [
        {"filename": "/home/train.py", "line": 12, "name": "aten::mm"},
        {"filename": "layers.0", "line": 0, "name": "gradient of weight, made in backward"},
    ]
    assert events[-1]["frames"][0]["name"] == "an unknown op"


def real_traces():
    net = Net()
    optimizer = sgd(net.parameters())
    planned = memplan.optimize(net, X, optimizer=optimizer)
    return {"measured": trace_memory(net, X, optimizer=optimizer), "predicted": planned.trace}


@pytest.mark.parametrize("kind", ["measured", "predicted"])
def test_a_snapshot_replays_the_step(kind):
    trace = real_traces()[kind]
    assert trace.kind == kind and len(trace.blocks) > 10
    data = pickle.loads(snapshot_bytes(trace))
    live = {b["address"]: b["size"] for b in data["segments"][0]["blocks"]}
    assert sum(live.values()) == trace.resident_bytes
    totals = []
    for event in data["device_traces"][0]:
        start, end = event["addr"], event["addr"] + event["size"]
        if event["action"] == "alloc":
            assert all(end <= at or at + size <= start for at, size in live.items())
            live[start] = event["size"]
            totals.append(sum(live.values()))
        elif event["action"] == "free_completed":
            assert live.pop(start) == event["size"]
            totals.append(sum(live.values()))
        for frame in event["frames"]:
            assert {key: type(value) for key, value in frame.items()} == {
                "filename": str,
                "line": int,
                "name": str,
            }
    assert max(totals) == trace.peak_bytes and totals[-1] == trace.totals[-1]
    blocks = [b for segment in data["segments"] for b in segment["blocks"]]
    active = {b["address"]: b["size"] for b in blocks if b["state"] == "active_allocated"}
    assert active == live
    for segment in data["segments"]:
        assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"]


def test_the_viewer_reads_a_snapshot():
    content = snapshot_bytes(real_traces()["measured"])
    assert content[:2] == b"\x80\x04"
    assert {opcode.name for opcode, _, _ in pickletools.genops(content)} <= READ_BY_THE_VIEWER
    data = pickle.loads(content)
    for page in (_memory_viz.trace_plot(data), _memory_viz.segment_plot(data)):
        assert "snapshot.pickle" in page
    assert "aten::" in _memory_viz.memory(data, format_flamegraph=str)
    assert f"{len(data['device_traces'][0])} entries" in _memory_viz.trace(data)


def test_nothing_happens_in_an_empty_snapshot():
    empty = MemoryTrace("measured", "cpu", (), (), (), ())
    assert snapshot(empty) == {"segments": [], "device_traces": [[]]}


def test_a_small_chrome_trace():
    events = chrome_trace(small_trace())["traceEvents"]
    assert Counter(event["ph"] for event in events) == {"M": 2, "C": 7, "X": 2, "i": 1}
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["memory on cuda:3, measured", "phases"]
    samples = [event for event in events if event["ph"] == "C"]
    assert [sample["ts"] for sample in samples] == [0, 5e5, 1e6, 1.5e6, 2e6, 2.5e6, 3e6]
    assert samples[3]["args"] == {
        "parameter": 100,
        "gradient": 60,
        "saved activation": 40,
        "temporary": 0,
    }
    phases = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert phases == [("forward", 0, 1.5e6), ("backward", 1.5e6, 1.5e6)]
    (peak,) = (event for event in events if event["ph"] == "i")
    assert peak["ts"] == 1.5e6
    assert peak["args"] == {
        "bytes": 200,
        "op": "aten::mm",
        "module": "layers.0",
        "source": "/home/train.py:12",
    }


@pytest.mark.parametrize("kind", ["measured", "predicted"])
def test_a_chrome_trace_is_strict_json(kind):
    trace = real_traces()[kind]
    text = json.dumps(chrome_trace(trace), allow_nan=False)
    events = json.loads(text)["traceEvents"]
    sums = [sum(event["args"].values()) for event in events if event["ph"] == "C"]
    assert sums == list(trace.totals)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_an_empty_chrome_trace_has_names_alone():
    empty = MemoryTrace("measured", "cpu", (), (), (), ())
    assert [event["ph"] for event in chrome_trace(empty)["traceEvents"]] == ["M", "M"]
