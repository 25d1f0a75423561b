"""The planned module in a user's hands: signatures, modes, copies, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

import memplan
from memplan.runtime.drift import BuiltStep
from memplan.torch_internals import allocations, recording

from support import laws


class Net(nn.Module):
    """Two layers with dropout; returns loss and logits in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 4)
        self.width = 32

    def forward(self, x, target, scale=1.0):
        hidden = nn.functional.dropout(torch.relu(self.first(x)), 0.2, self.training)
        logits = self.second(hidden) * scale
        return {"loss": nn.functional.cross_entropy(logits, target), "logits": logits}

    def describe(self):
        return f"width {self.width}"


def batch(size=6, features=8):
    return {"x": torch.randn(size, features), "target": torch.randint(0, 4, (size,))}


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def planned(net):
    options = memplan.Options(on_infeasible="smallest")
    return memplan.optimize(net, batch(), budget="50%", options=options)


def test_the_users_loop_is_unchanged(net):
    reference = copy.deepcopy(net)
    planned = memplan.optimize(net, batch(), budget="100%")
    losses = []
    for module in (planned, reference):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        for _ in range(5):
            loss = module(**batch())["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:5] == losses[5:]


@pytest.mark.parametrize("size", [1, 6, 13])
def test_another_batch_size_is_planned_on_its_own(net, planned, size):
    sample = batch(size)
    laws.assert_same_bits(laws.step(net, sample), laws.step(planned, sample))
    laws.assert_within_budget(planned, sample)
    laws.step(planned, batch())
    assert len(planned.plans) == len({size, 6})


def test_another_sequence_length_is_planned_on_its_own():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    step = memplan.WithLoss(model, lambda output, target: ((output - target) ** 2).mean())
    planned = memplan.optimize(step, budget="60%")
    for length in (20, 30, 20):
        sample = (torch.randn(8, length, 16), torch.randn(8, length, 16))
        laws.assert_same_bits(laws.step(step, sample), laws.step(planned, sample))
    assert len(planned.plans) == 2


def test_eval_and_no_grad_run_what_the_original_runs(net, planned):
    sample = batch()
    planned.eval()
    with torch.no_grad():
        assert torch.equal(planned(**sample)["logits"], net(**sample)["logits"])
    laws.assert_same_bits(laws.step(net, sample), laws.step(planned, sample))
    assert len(planned.plans) == 2, "evaluation with gradients has its own plan"
    planned.train()
    laws.assert_same_bits(laws.step(net, sample), laws.step(planned, sample))
    with torch.inference_mode():
        assert not planned(**sample)["loss"].requires_grad


def test_a_submodule_in_another_mode_is_another_signature(net):
    net.drop = nn.Dropout(0.5)
    planned = memplan.optimize(net, batch(), budget="100%")
    net.drop.eval()
    laws.step(planned, batch())
    assert len(planned.plans) == 2


def test_a_frozen_parameter_gets_no_gradient(net, planned):
    net.first.weight.requires_grad_(False)
    outcome = laws.step(planned, batch())
    assert outcome.gradients["first.weight"] is None
    assert outcome.gradients["second.weight"] is not None
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    assert not planned(**batch())["loss"].requires_grad


def test_a_replaced_parameter_is_the_one_that_is_used(net, planned):
    net.second = nn.Linear(32, 4)
    sample = batch()
    laws.assert_same_bits(laws.step(net, sample), laws.step(planned, sample))


def test_gradients_are_added_to_those_that_are_there(net, planned):
    sample = batch()
    results = []
    for module in (net, planned):
        torch.manual_seed(5)
        for _ in range(3):
            module(**sample)["loss"].backward()
        results.append([parameter.grad.clone() for parameter in net.parameters()])
        net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert planned.plan.resident_bytes > planned.plans[0].resident_bytes


def test_two_forwards_before_two_backwards(net, planned):
    results = []
    samples = [batch(6), batch(9)]
    for module in (net, planned):
        torch.manual_seed(5)
        losses = [module(**sample)["loss"] for sample in samples]
        sum(losses).backward()
        results.append([parameter.grad.clone() for parameter in net.parameters()])
        net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_scaled_loss(net, planned):
    sample = batch()
    results = []
    for module in (net, planned):
        torch.manual_seed(5)
        (module(**sample)["loss"] * 0.3).backward()
        results.append([parameter.grad.clone() for parameter in net.parameters()])
        net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_at_another_output_is_refused(planned):
    output = planned(**batch())
    assert output["logits"].requires_grad
    with pytest.raises(memplan.PlanMismatch, match="differentiable_outputs"):
        output["logits"].sum().backward()


def test_gradients_at_all_outputs_if_asked(net):
    options = memplan.Options(differentiable_outputs="all")
    planned = memplan.optimize(net, batch(), budget="100%", options=options)
    sample = batch()
    results = []
    for module in (net, planned):
        torch.manual_seed(5)
        output = module(**sample)
        (output["loss"] + output["logits"].square().mean()).backward()
        results.append([parameter.grad.clone() for parameter in net.parameters()])
        net.zero_grad()
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.manual_seed(5)
    planned(**sample)["logits"].sum().backward()
    assert net.first.weight.grad is not None


def test_a_second_backward_needs_retain_graph(planned):
    loss = planned(**batch())["loss"]
    with pytest.warns(UserWarning, match="retain_graph"):
        loss.backward(retain_graph=True)
    first = planned.first.weight.grad.clone()
    loss.backward()
    assert torch.equal(planned.first.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_is_refused(planned):
    loss = planned(**batch())["loss"]
    with pytest.raises(memplan.PlanMismatch, match="create_graph"):
        torch.autograd.grad(loss, [planned.first.weight], create_graph=True)


def test_a_parameter_changed_between_forward_and_backward_is_refused(planned):
    loss = planned(**batch())["loss"]
    with torch.no_grad():
        planned.second.weight.add_(1)
    with pytest.raises(memplan.PlanMismatch, match=r"'second\.weight'.* was written between"):
        loss.backward()


def test_a_gradient_for_an_input(net):
    sample = batch()
    planned = memplan.optimize(net, sample, budget="100%")
    x = sample["x"].requires_grad_()
    results = []
    for module in (net, planned):
        torch.manual_seed(5)
        module(**sample)["loss"].backward()
        results.append(x.grad)
        x.grad = None
    assert torch.equal(*results)


def test_autocast_is_part_of_the_signature(net, planned):
    sample = batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert planned(**sample)["logits"].dtype == net(**sample)["logits"].dtype
        laws.assert_same_bits(laws.step(net, sample), laws.step(planned, sample))
    assert planned(**sample)["logits"].dtype == torch.float32


def test_a_plain_value_is_part_of_the_signature(net, planned):
    sample = {**batch(), "scale": 2.0}
    laws.assert_same_bits(laws.step(net, sample), laws.step(planned, sample))


def test_an_input_that_cannot_be_compared_is_refused(planned):
    with pytest.raises(memplan.PlanMismatch, match="plain values"):
        planned(**batch(), scale=object())


def test_hooks_are_refused_by_name(net, planned):
    handle = net.second.register_forward_hook(lambda module, given, output: output * 2)
    with pytest.raises(memplan.CaptureError, match="'second'"):
        planned(**batch())
    handle.remove()
    planned(**batch())


def test_hooks_of_parameters_run(net, planned):
    seen = []
    net.first.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    planned(**batch())["loss"].backward()
    assert seen == [net.first.weight.shape]


def test_it_looks_like_the_original(net, planned):
    assert list(planned.state_dict()) == list(net.state_dict())
    assert dict(planned.named_children()) == dict(net.named_children())
    assert planned.width == 32 and planned.describe() == "width 32"
    assert planned.original is net
    with pytest.raises(AttributeError, match="nothing"):
        _ = planned.nothing
    planned.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    planned.to(torch.float64)
    assert net.first.weight.dtype == torch.float64


def test_before_the_first_call_there_is_no_plan(net):
    planned = memplan.optimize(net, budget="100%")
    with pytest.raises(memplan.NotPlannedYet, match="pass a sample"):
        _ = planned.plan
    planned(**batch())
    assert planned.plan.num_ops > 0
    planned.recapture()
    with pytest.raises(memplan.NotPlannedYet):
        _ = planned.plan


def test_copies_and_pickles_are_independent(net, planned):
    file = io.BytesIO()
    torch.save(planned.state_dict(), file)
    for twin in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        assert twin.first.weight is not net.first.weight
        assert twin.first is twin.original.first
        torch.manual_seed(2)
        sample = batch()
        laws.assert_same_bits(laws.step(net, sample), laws.step(twin, sample))


def test_more_signatures_than_the_cache_holds_are_warned_about(net):
    options = memplan.Options(cache_size=2, costs="analytic")
    planned = memplan.optimize(net, budget="100%", options=options)
    planned(**batch(1)), planned(**batch(2))
    with pytest.warns(UserWarning, match="more than 2 signatures"):
        planned(**batch(3))
    assert len(planned.plans) == 2


def test_planning_leaves_random_states_alone(net):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sample = {"x": torch.zeros(6, 8), "target": torch.zeros(6, dtype=torch.long)}
    planned = memplan.optimize(net, sample, budget="100%")
    memplan.profile(planned, sample)
    memplan.compare(net, planned, sample)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_an_exception_in_the_middle_leaves_the_module_usable(net, planned):
    with pytest.raises(IndexError):
        planned(x=torch.randn(6, 8), target=torch.full((6,), 99))
    sample = batch()
    laws.assert_same_bits(laws.step(net, sample), laws.step(planned, sample))


@pytest.mark.parametrize("segment", ["forward", "backward"])
def test_an_interrupt_in_the_middle_leaves_the_module_usable(net, planned, segment, monkeypatch):
    sample = batch()
    step = planned.prepare(memplan.Sample.of(sample))

    def interrupted(arguments):
        raise KeyboardInterrupt

    emitted = dataclasses.replace(step.emitted, **{segment: interrupted})
    broken = dataclasses.replace(step, emitted=emitted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(planned, "_built", lambda state, sample: BuiltStep(broken))
        planned(**sample)["loss"].backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    laws.assert_same_bits(laws.step(net, sample), laws.step(planned, sample))


def test_two_threads():
    """Both plan and run at once; without dropout, so that the order of draws does not matter."""
    net = Net()
    net.eval()
    planned = memplan.optimize(net)
    samples = [batch(), batch(9)]
    gradients = [[], []]
    parameters = list(net.parameters())

    def run(index):
        for _ in range(5):
            loss = planned(**samples[index])["loss"]
            gradients[index].append(torch.autograd.grad(loss, parameters))

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sample, seen in zip(samples, gradients, strict=True):
        expected = torch.autograd.grad(net(**sample)["loss"], parameters)
        assert len(seen) == 5
        for found in seen:
            pairs = zip(found, expected, strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_200_calls_of_4_shapes_plan_4_times_and_leak_nothing(net):
    samples = [batch(size) for size in (4, 5, 6, 7)]
    planned = memplan.optimize(net, budget="100%")
    for sample in samples:
        planned(**sample)["loss"].backward()
        net.zero_grad()
    assert len(planned.plans) == 4

    def held_bytes(num_calls):
        with recording() as profile:
            for call in range(num_calls):
                planned(**samples[call % 4])["loss"].backward()
                net.zero_grad()
        return sum(nbytes for _, nbytes in allocations(profile))

    plans = planned.plans
    assert held_bytes(200) == 0
    assert sorted(map(id, planned.plans)) == sorted(map(id, plans))


def test_a_tensor_given_twice_is_not_one_given_once(net):
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, a, b):
            return ((a - b) * self.weight).square().sum()

    model = Difference()
    x = torch.randn(4)
    planned = memplan.optimize(model, (x, x), budget="100%")
    assert planned(x, x).item() == 0
    assert planned(x, x + 1).item() == model(x, x + 1).item() != 0


class Tied(nn.Module):
    """One layer that is run twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.layer(x)).square().mean()


def test_sums_over_several_calls_are_said_to_be_in_another_order():
    planned, x = memplan.optimize(Tied(), torch.randn(4, 8)), torch.randn(4, 8)
    planned(x).backward()
    planned.zero_grad()
    loss = planned(x) + planned(2 * x)
    with pytest.warns(UserWarning, match="2 parameters are used more than once in a planned call"):
        loss.backward()
    once = memplan.optimize(memplan.WithLoss(nn.Linear(8, 8), nn.functional.mse_loss))
    (once(x, x) + once(2 * x, x)).backward()  # one use in each: nothing is said


def test_what_is_written_between_forward_and_backward_is_named():
    planned = memplan.optimize(Tied(), torch.randn(4, 8))
    x = torch.randn(4, 8)
    loss = planned(x)
    x.add_(1)
    with pytest.raises(memplan.PlanMismatch, match=r"input 0 \(shape \(4, 8\)\) was written"):
        loss.backward()
    loss = planned(x)
    with torch.no_grad():
        planned.layer.weight.mul_(2)
    with pytest.raises(memplan.PlanMismatch, match=r"'layer\.weight'"):
        loss.backward()


class KeepsStatistics(nn.Module):
    """Its norm stays in evaluation, whatever its own mode is."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.layer(x)).square().mean()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def test_the_mode_is_set_by_the_models_own_method():
    model = KeepsStatistics()
    planned = memplan.optimize(model, torch.randn(4, 8))
    assert planned.eval() is planned and not planned.training and not planned.layer.training
    assert planned.train() is planned and planned.training and planned.layer.training
    assert model.training and not planned.norm.training
    before = model.norm.running_mean.clone()
    planned(torch.randn(4, 8)).backward()
    assert torch.equal(model.norm.running_mean, before)


class Own(Tied):
    """Has methods with names of a planned module's."""

    def export(self):
        return "mine"

    def train(self, data=None, labels=None):
        return super().train() if data is None else ("trained", data, labels)


def test_methods_with_the_names_of_memplans_own_are_reached_and_named():
    with pytest.warns(UserWarning, match=r"export .* is memplan's.*planned\.original\.export"):
        planned = memplan.optimize(Own(), torch.randn(4, 8))
    assert planned.train(1, 2) == ("trained", 1, 2) and planned.train() is planned
    assert planned.original.export() == "mine"


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_sparse_input_is_refused(make):
    class Sparse(nn.Linear):
        def forward(self, x, mixing):
            return (mixing @ super().forward(x)).sum()

    with pytest.raises(memplan.CaptureError, match=r"is sparse .*to_dense"):
        memplan.optimize(Sparse(8, 8), (torch.randn(4, 8), make(torch.eye(4))))
