"""Batches that are passed over before they are loaded."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

import memplan
from memplan.passes import drop_minibatches


class Counting(Dataset):
    """Samples that say when they are looked up."""

    def __init__(self, count=40):
        self.count, self.seen = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        self.seen.append(place)
        generator = torch.Generator().manual_seed(place)
        return torch.randn(6, generator=generator), place % 3


class Stream(IterableDataset):
    def __init__(self, count=40):
        self.samples = Counting(count)

    def __iter__(self):
        for place in range(len(self.samples)):
            yield self.samples[place]


class Numbers(IterableDataset):
    def __iter__(self):
        yield from range(10)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x, labels):
        return cross_entropy(self.inside(x), labels)


def planned_net(p=0.5, seed=0):
    torch.manual_seed(0)
    batch = (torch.randn(4, 6), torch.randint(3, (4,)))
    return memplan.optimize(Net(), batch, passes=[drop_minibatches(p, seed)])


def kept(planned, count):
    dropping = planned.minibatch_dropping
    return [number for number in range(count) if not dropping.is_dropped(number)]


def test_what_is_dropped_is_never_looked_up():
    planned, data = planned_net(), Counting()
    batches = planned.batches(DataLoader(data, batch_size=4))
    wanted = kept(planned, 10)
    assert 0 < len(wanted) < 10
    found = [labels.tolist() for _, labels in batches]
    assert data.seen == [4 * batch + n for batch in wanted for n in range(4)]
    assert found == [[(4 * batch + n) % 3 for n in range(4)] for batch in wanted]
    assert batches.num_kept == len(wanted) and batches.num_dropped == 10 - len(wanted)
    assert f"{len(wanted)} of 10 batches ran (5 expected)" in batches.summary


def test_an_iterable_data_set_makes_no_batch_of_what_is_dropped():
    planned, collated = planned_net(), []

    def collate(samples):
        collated.append(len(samples))
        return torch.utils.data.default_collate(samples)

    loader = DataLoader(Stream(), batch_size=4, collate_fn=collate)
    batches = planned.batches(loader)
    assert len(list(batches)) == len(collated) == len(kept(planned, 10))
    with pytest.raises(TypeError, match="length"):
        len(batches)


@pytest.mark.by_default("list", "generator", "no batches", "loader", "workers")
@pytest.mark.parametrize(
    "make",
    [
        lambda: [torch.tensor([n]) for n in range(10)],
        lambda: (torch.tensor([n]) for n in range(10)),
        lambda: DataLoader(torch.arange(10), batch_size=None),
        lambda: DataLoader(torch.arange(10), batch_size=1),
        lambda: DataLoader(torch.arange(10), batch_size=1, num_workers=2),
        lambda: DataLoader(torch.arange(10), batch_size=1, num_workers=1, persistent_workers=True),
    ],
    ids=["list", "generator", "no batches", "loader", "workers", "persistent workers"],
)
def test_any_iterable(make):
    planned, loader = planned_net(), make()
    batches = planned.batches(loader)
    assert [int(one) for one in batches] == kept(planned, 10)
    if iter(loader) is loader:
        with pytest.raises(TypeError, match="a generator without a length"):
            batches.count(2)
    else:
        expected = [number - 10 for number in kept(planned, 20) if number >= 10]
        assert len(batches) == len(expected)
        assert batches.count(3) == len([n for n in kept(planned, 40) if n >= 10])
        assert [int(one) for one in batches] == expected


def test_a_subclass_stays_one():
    class Doubling(DataLoader):
        def __iter__(self):
            return (2 * batch for batch in super().__iter__())

    for data in (torch.arange(10), Numbers()):
        planned = planned_net()
        batches = planned.batches(Doubling(data, batch_size=1))
        assert [int(one) for one in batches] == [2 * number for number in kept(planned, 10)]


def test_counts_are_those_of_the_probability():
    for p in (0.1, 0.5, 0.9):
        for seed in (0, 1):
            dropping = planned_net(p, seed).minibatch_dropping
            dropped = sum(map(dropping.is_dropped, range(10_000)))
            assert abs(dropped - 10_000 * p) <= 4 * math.sqrt(10_000 * p * (1 - p))
    assert not any(map(planned_net(0).minibatch_dropping.is_dropped, range(100)))
    one, other = (planned_net(0.5, seed).minibatch_dropping for seed in (0, 1))
    assert [one.is_dropped(n) for n in range(99)] != [other.is_dropped(n) for n in range(99)]


def test_the_step_is_as_it_was():
    planned = planned_net()
    torch.manual_seed(0)
    batch = (torch.randn(4, 6), torch.randint(3, (4,)))
    torch.manual_seed(1)
    loss = planned(*batch)
    torch.manual_seed(1)
    assert torch.equal(loss, planned.original(*batch))
    plan = planned.plan
    assert plan.peak_bytes == memplan.plan(planned.original, batch).peak_bytes
    assert plan.effects == (memplan.Effect.STOCHASTIC,)
    assert any("frees 0 B of a step's peak" in note for note in plan.notes)
    assert memplan.Plan.from_json(plan.to_json()) == plan


class Run:
    """A training with all that has a state, and dropout."""

    def __init__(self, generator=False, schedule=True):
        self.planned = planned_net()
        self.generator = torch.Generator().manual_seed(5) if generator else None
        data = TensorDataset(torch.randn(36, 6), torch.randint(3, (36,)))
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=self.generator)
        self.optimizer = torch.optim.SGD(
            self.planned.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.95)
        self.batches = self.planned.batches(loader, schedule=self.schedule if schedule else None)
        self.losses, self.saved, self.counts_all = [], None, schedule
        torch.manual_seed(7)

    def train(self, epochs, save_at=None, stop_at=None):
        for _ in range(epochs):
            for batch in self.batches:
                loss = self.planned(*batch)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.counts_all:
                    self.schedule.step()
                self.losses.append(loss.item())
                if len(self.losses) == save_at:
                    self.saved = copy.deepcopy(self.state())
                if len(self.losses) == stop_at:
                    return

    def state(self):
        owners = (self.planned, self.optimizer, self.schedule)
        return [*(one.state_dict() for one in owners), torch.random.get_rng_state()]

    def load(self, state):
        for one, part in zip((self.planned, self.optimizer, self.schedule), state, strict=False):
            one.load_state_dict(part)
        torch.random.set_rng_state(state[-1])


@pytest.mark.parametrize("generator", [False, True], ids=["torch's order", "its own order"])
@pytest.mark.parametrize("place", range(1, 14, 2))
def test_a_resumed_run_is_the_uninterrupted_one(place, generator, tmp_path):
    whole = Run(generator)
    whole.train(4, save_at=place)
    torch.save(whole.saved, tmp_path / "state.pt")
    other = Run(generator)
    if generator:
        other.generator.manual_seed(99)
    torch.manual_seed(99)
    other.load(torch.load(tmp_path / "state.pt", weights_only=True))
    dropping = other.planned.minibatch_dropping
    assert dropping.iteration == kept(whole.planned, 36)[place - 1] + 1
    other.train(4 - (dropping.iteration - dropping.position) // 9)
    assert other.losses == whole.losses[place:]
    for one, two in zip(other.planned.parameters(), whole.planned.parameters(), strict=True):
        assert torch.equal(one, two)
    assert other.schedule.last_epoch == whole.schedule.last_epoch == 36
    assert torch.equal(torch.random.get_rng_state(), whole.state()[-1])


class Shuffled:
    """A loader that is none of torch's."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        yield from self.loader


def sampled(generator):
    batches = BatchSampler(RandomSampler(range(36), generator=generator), 4, False)
    return DataLoader(TensorDataset(torch.arange(36)), batch_sampler=batches)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shuffled(DataLoader(TensorDataset(torch.arange(36)), 4, shuffle=True)),
        lambda: DataLoader(Numbers(), batch_size=2),
        lambda: sampled(torch.Generator().manual_seed(3)),
        lambda: sampled(None),
    ],
    ids=["wrapped", "iterable", "a generator inside", "a sampler inside"],
)
def test_other_loaders_go_on_as_well(make):
    def some(planned, batches, count):
        """Batches, and a number that is drawn while they are trained on."""
        for one in batches:
            values = one[0] if isinstance(one, list) else one
            yield values.tolist(), float(torch.rand(()))
            count -= 1
            if not count:
                return

    torch.manual_seed(1)
    whole, loader = planned_net(p=0.3), make()
    torch.manual_seed(2)
    batches = iter(whole.batches(loader))
    first = list(some(whole, batches, 2))
    saved, random = copy.deepcopy(whole.state_dict()), torch.random.get_rng_state()
    rest = list(some(whole, batches, -1))
    other = planned_net(p=0.3)
    torch.manual_seed(99)
    resumed = other.batches(make())
    other.load_state_dict(saved)
    torch.random.set_rng_state(random)
    assert list(some(other, resumed, -1)) == rest and len(first) == 2 and rest


@pytest.mark.parametrize("generator", [False, True])
def test_resumed_between_epochs(generator):
    whole = Run(generator)
    whole.train(2)
    saved, count = copy.deepcopy(whole.state()), len(whole.losses)
    whole.train(2)
    other = Run(generator)
    other.load(saved)
    other.train(2)
    assert other.losses == whole.losses[count:]


def test_an_epoch_that_is_left_early_is_over():
    run = Run()
    run.train(1, stop_at=2)
    done = run.planned.minibatch_dropping.iteration
    rest = [number - done for number in kept(run.planned, done + 9) if number >= done]
    assert len(run.batches) == len(rest) == len(list(run.batches))


def test_optimizer_and_schedule_stand_still():
    run = Run(schedule=False)
    run.train(1)
    assert run.schedule.last_epoch == 0
    assert 0 < len(run.losses) == len(kept(run.planned, 9)) < 9
    steps = [run.optimizer.state[one]["momentum_buffer"] for one in run.planned.parameters()]
    other = Run(schedule=False)
    torch.empty((), dtype=torch.int64).random_()  # as a loader's iterator does
    order = list(other.batches._loader.loader.sampler)
    data = other.batches._loader.loader.dataset
    for number in kept(other.planned, 9):
        x, labels = zip(*(data[place] for place in order[4 * number :][:4]), strict=True)
        other.planned(torch.stack(x), torch.stack(labels)).backward()
        other.optimizer.step()
        other.optimizer.zero_grad()
    for one, two, momentum in zip(
        run.planned.parameters(), other.planned.parameters(), steps, strict=True
    ):
        assert torch.equal(one, two)
        assert torch.equal(momentum, other.optimizer.state[two]["momentum_buffer"])


def test_batches_of_one_update_stay_together():
    planned = planned_net()
    loader = [torch.tensor([n]) for n in range(12)]
    found = [int(one) for one in planned.batches(loader, accumulate=4)]
    assert found == [n for n in range(12) if not planned.minibatch_dropping.is_dropped(n // 4 * 4)]
    assert {n // 4 for n in found} != {0, 1, 2}


@pytest.mark.parametrize("at_the_top", [False, True])
def test_no_batch_is_dropped_while_gradients_wait(at_the_top):
    planned = planned_net()
    optimizer = torch.optim.AdamW(planned.parameters())
    data = TensorDataset(torch.randn(36, 6), torch.randint(3, (36,)))
    for x, labels in planned.batches(DataLoader(data, batch_size=4)):
        if at_the_top:
            optimizer.zero_grad()
        planned(x, labels).backward()
        optimizer.step()
        if not at_the_top:
            optimizer.zero_grad()
    with pytest.raises(memplan.MemplanError, match="accumulate=n"):
        for x, labels in planned.batches(DataLoader(data, batch_size=4)):
            planned(x, labels).backward()
    optimizer.zero_grad()
    for x, labels in planned.batches(DataLoader(data, batch_size=4), accumulate=1):
        planned(x, labels).backward()


@pytest.mark.parametrize(
    "arguments", [{"p": 1}, {"p": -0.1}, {"p": float("nan")}, {"p": "0.5"}, {"seed": 0.5}]
)
def test_arguments_that_make_no_sense(arguments):
    with pytest.raises(memplan.MemplanError, match=next(iter(arguments))):
        drop_minibatches(**arguments)


def test_what_else_is_refused():
    planned = planned_net()
    with pytest.raises(memplan.MemplanError, match="accumulate is a number of batches, got 0"):
        planned.batches([], accumulate=0)
    with pytest.raises(memplan.MemplanError, match=r"drop_minibatches\(p=0.5, seed=1\)"):
        planned.load_state_dict(planned_net(0.5, 1).state_dict())


def test_without_the_pass_all_batches_come():
    planned = memplan.optimize(Net(), (torch.randn(4, 6), torch.randint(3, (4,))))
    loader = DataLoader(torch.arange(5))
    assert planned.batches(loader) is loader
