"""Gates choose which samples each block sees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import memplan
from memplan.passes import skipped_flops

from support.local import refused
from support.skipping import DEPTH, MODES, net_and_batch, optimized, planned_net, through_gates


@pytest.mark.by_default("None-gated")
@pytest.mark.parametrize("mode", ["gated", "recurrent"])
@pytest.mark.parametrize("budget", [None, "1 B"])
def test_gates_choose_samples(mode, budget):
    planned, batch = planned_net(mode, budget=budget, dropout=0.0)
    other = copy.deepcopy(planned)
    capacity = MODES[mode]["capacity"]
    planned(*batch).backward()
    through_gates(other, batch, capacity, 0.01).backward()
    names = [name for name, _ in planned.named_parameters()]
    assert sum("layer_skipping" in name for name in names) >= 2 * DEPTH
    for name, one, two in zip(names, planned.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name, rtol=1e-4, atol=1e-6)
    assert planned.plan.effects == (memplan.Effect.APPROXIMATE,)


def test_gates_choose_each_sample_by_itself_in_evaluation():
    planned, batch = planned_net("gated", dropout=0.0)
    child, net = planned.layer_skipping, planned.original.model
    with torch.no_grad():
        for number, gate in enumerate(child.gates):
            gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.manual_seed(number)))
        child.gates[2].weight.zero_()
        child.gates[2].bias.fill_(-1.0)
        child.gates[3].weight.zero_()
        child.gates[3].bias.fill_(1.0)
        planned.eval()
        found = planned(*batch)
        x = net.stem(batch[0])
        rates = []
        for gate, block in zip(child.gates, net.blocks, strict=True):
            runs = gate(x.mean(1))[:, 0] > 0
            rates.append(max(float(runs.float().mean()), 1 / 8))
            x = torch.where(runs.view(-1, 1, 1), block(x), x)
        torch.testing.assert_close(found, cross_entropy(net.head(x.mean(1)), batch[1]))
        each = [planned(batch[0][n : n + 1], batch[1][n : n + 1]) for n in range(8)]
        torch.testing.assert_close(found, torch.stack(each).mean())
        planned(*batch)
    assert child.rates.tolist() == pytest.approx(rates)
    assert rates[2] == 1 / 8 and rates[3] == 1 and min(rates[:2]) > 0 and max(rates[:2]) < 1
    assert skipped_flops(planned) == pytest.approx(1 - sum(rates) / DEPTH, abs=0.02)


@pytest.mark.slow
def test_borders_follow_the_batches_and_are_saved():
    planned, batch = planned_net("gated", dropout=0.0)
    child = planned.layer_skipping
    for _ in range(60):
        planned(*batch).backward()
        planned.zero_grad()
    with torch.no_grad():
        planned.eval()
        planned(*batch)
    assert child.rates.tolist() == [0.5] * DEPTH
    other, _ = planned_net("gated")
    other.load_state_dict(planned.state_dict())
    assert torch.equal(other.layer_skipping.borders, child.borders)
    whole, _ = planned_net("gated", capacity=1.0, dropout=0.0)
    whole(*batch).backward()
    with torch.no_grad():
        whole.eval()
        assert torch.allclose(whole(*batch), whole.original(*batch))


def test_gates_refuse_what_they_cannot_do():
    model, (x, _) = net_and_batch()
    with refused("returns no scalars"):
        optimized(model.model, (x,), mode="gated")
    assert optimized(model.model, (x,), mode="gated", cost=0).plan
