"""Two processes that train together: the same decisions, and gradients of one process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import memplan
from memplan.passes import drop_minibatches, skip_layers

from support.skipping import DEPTH, net_and_batch, without

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo"
)


def blocks_take_turns(rank, folder):
    model, (x, labels) = net_and_batch(dropout=0.0)
    mine = (x[4 * rank :][:4], labels[4 * rank :][:4])
    planned = memplan.optimize(model, mine, passes=[skip_layers("blocks", 0.5)])
    together = DistributedDataParallel(planned)
    reference = copy.deepcopy(planned.original)
    for step in range(4):
        together.zero_grad()
        together(*mine).backward()
        skipped = planned.layer_skipping.skipped
        reference.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            one = without(reference, (x[half], labels[half]), skipped, [2.0] * DEPTH)
            (one / 2).backward()
        for (name, p), two in zip(
            planned.original.named_parameters(), reference.parameters(), strict=True
        ):
            expected = torch.zeros_like(p) if two.grad is None else two.grad
            torch.testing.assert_close(p.grad, expected, msg=name, rtol=1e-5, atol=1e-7)
        Path(folder, f"{rank}-{step}").write_text(str(skipped))


def parts_and_dropped_batches(rank, folder):
    model, batch = net_and_batch()
    passes = [skip_layers("subset", 0.25), drop_minibatches(0.5, seed=3)]
    planned = memplan.optimize(model, batch, passes=passes)
    together = DistributedDataParallel(planned)
    optimizer = torch.optim.SGD(together.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(96, 5, 8), torch.randint(4, (96,)))
    sampler = DistributedSampler(data, num_replicas=2, rank=rank)
    batches = planned.batches(DataLoader(data, 8, sampler=sampler))
    torch.manual_seed(rank)
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, labels in batches:
            together(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(planned.minibatch_dropping.iteration)
    total = torch.cat([p.detach().flatten() for p in planned.parameters()])
    torch.save((seen, total), Path(folder, str(rank)))


def run(rank, function, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    function(rank, folder)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_blocks(tmp_path):
    multiprocessing.spawn(run, (blocks_take_turns, str(tmp_path)), nprocs=2)
    choices = [[(tmp_path / f"{rank}-{n}").read_text() for n in range(4)] for rank in (0, 1)]
    assert choices[0] == choices[1] and len(set(choices[0])) > 1


@pytest.mark.slow
def test_parts_and_dropped_batches(tmp_path):
    multiprocessing.spawn(run, (parts_and_dropped_batches, str(tmp_path)), nprocs=2)
    (seen, mine), (theirs, other) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert seen == theirs and 0 < len(seen) < 12
    assert torch.equal(mine, other)
