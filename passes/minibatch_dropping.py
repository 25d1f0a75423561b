"""Mini-batch dropping: a random part of the batches is skipped, before they are loaded.

Stochastic mini-batch dropping (SMD) of Wang et al., "E2-Train: Training State-of-the-art CNNs with
Over 80% Energy Savings", 2019, https://arxiv.org/abs/1910.13349, section 3.1: each batch is dropped
with probability p, and an epoch takes about 1 - p of its time. No step gets smaller.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.transforms.data_loader import PassingLoader, Updates
from memplan.transforms.passes import Change, Effect, LRSchedule, ModelContext, Pass

if TYPE_CHECKING:
    from memplan.capture import Captured

_CHILD: Final = "minibatch_dropping"


def drop_minibatches(p: float = 0.5, seed: int = 0) -> Pass:
    """Skip a random part of the batches: ``for batch in planned.batches(loader):``.

    Only the seed and the number of batches before it decide whether a batch is dropped: that is
    known before the batch is loaded, and is the same on every rank. The loop's body does not run
    for a dropped batch, so optimizer, schedule and weight decay stand still.

    Args:
        p: probability that a batch is dropped; 0 drops none.
        seed: seed of the decisions.

    Returns:
        A pass of effect ``STOCHASTIC`` that changes no step.

    Raises:
        MemplanError: naming the invalid argument.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = memplan.WithLoss(net, nn.functional.cross_entropy)
        >>> batch = torch.randn(4, 8), torch.randint(2, (4,))
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.drop_minibatches(0.5)])
        >>> len(list(planned.batches([batch] * 10))) < 10
        True
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise MemplanError(f"p is the probability that a batch is dropped, 0 <= p < 1, got {p!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MemplanError(f"seed is a whole number, got {seed!r}")
    arguments = {"p": float(p), "seed": seed}
    return Pass(
        "drop_minibatches",
        Effect.STOCHASTIC,
        arguments,
        change=partial(_change, float(p), seed),
        notes=partial(_notes, float(p)),
    )


def _change(p: float, seed: int, model: nn.Module, context: ModelContext) -> Change:
    del model, context
    return Change(modules={_CHILD: MinibatchDropping(p, seed)}, loop=_loop)


def _notes(p: float, captured: Captured) -> tuple[str, ...]:
    del captured
    return (
        f"drop_minibatches(p={p:g}) frees 0 B of a step's peak; an epoch of "
        f"planned.batches(loader) takes about {1 - p:.2f}x the time of all its batches",
    )


def _loop(
    model: nn.Module, loader: Iterable[Any], accumulate: int | None, schedule: LRSchedule | None
) -> Batches:
    dropping = model.get_submodule(_CHILD)
    assert isinstance(dropping, MinibatchDropping)
    return Batches(loader, dropping, tuple(model.parameters()), accumulate, schedule)


class MinibatchDropping(nn.Module):
    """The dropping decisions and the training's progress; both go into ``state_dict``.

    Attributes:
        p: probability that a batch is dropped.
        seed: seed of the decisions.
        iteration: batches so far, dropped ones included.
        position: batches so far in the current epoch.
        order: the random states at the start of that epoch.
        is_resuming: whether the next epoch continues from a loaded state.
    """

    def __init__(self, p: float, seed: int) -> None:
        super().__init__()
        self.p, self.seed = p, seed
        self.iteration = self.position = 0
        self.order: Mapping[str, torch.Tensor] = {}
        self.is_resuming = False

    def is_dropped(self, iteration: int) -> bool:
        """Tell whether a batch is dropped, by its number from the start of the training."""
        drawn = Random(f"drop_minibatches {self.seed} {iteration}").random()
        return drawn < self.p

    def get_extra_state(self) -> dict[str, Any]:
        """The state for ``state_dict``."""
        return {
            "p": self.p,
            "seed": self.seed,
            "iteration": self.iteration,
            "position": self.position,
            "order": dict(self.order),
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the state from ``state_dict``.

        Raises:
            MemplanError: if the state is from other dropping decisions.
        """
        if (state["p"], state["seed"]) != (self.p, self.seed):
            raise MemplanError(
                f"the state is of drop_minibatches(p={state['p']}, seed={state['seed']}), and this "
                f"is drop_minibatches(p={self.p}, seed={self.seed}): the training would not go on "
                "with the same decisions"
            )
        self.iteration, self.position = state["iteration"], state["position"]
        self.order = {name: one.cpu() for name, one in state["order"].items()}
        self.is_resuming = True


class Batches:
    """The batches of a loader that are not dropped; created once, and iterated once an epoch.

    After a state is loaded, the interrupted epoch continues from its position: in the same order,
    if the loader draws it, when the epoch begins, from torch's random state or from a generator of
    its own. An epoch that is left early is over.

    Attributes:
        num_kept: batches yielded, in all epochs.
        num_dropped: batches skipped.
        seconds: time in the loop, loading and body.

    Args:
        loader: any iterable of batches.
        dropping: makes the decisions.
        parameters: the model's parameters.
        accumulate: number of batches per update; they are dropped or kept together. None: one, and
            a batch is not dropped while gradients wait for an update.
        schedule: stepped for each dropped batch, as in the paper; the loop's body steps it for the
            others.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        dropping: MinibatchDropping,
        parameters: tuple[nn.Parameter, ...],
        accumulate: int | None,
        schedule: LRSchedule | None,
    ) -> None:
        self._dropping = dropping
        self._loader = PassingLoader(loader)
        self._updates = Updates(parameters) if accumulate is None else None
        self._window = accumulate or 1
        self._schedule = schedule
        self.num_kept = self.num_dropped = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        """The number of batches that the next epoch yields.

        Raises:
            TypeError: if the loader has no length.
        """
        return self.count(1)

    def count(self, epochs: int) -> int:
        """The number of batches that the next epochs yield, for a schedule of executed steps.

        Raises:
            TypeError: if the loader has no length.
        """
        start, length = self._start(), self._length()
        first = self._dropping.iteration - start
        return sum(
            self._is_kept(first + epoch * length, place)
            for epoch in range(epochs)
            for place in range(0 if epoch else start, length)
        )

    def _length(self) -> int:
        loader = self._loader.loader
        try:
            return len(loader)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(
                f"a {type(loader).__name__} without a length: how many of its batches are kept is "
                f"not known before its end ({error})"
            ) from error

    @property
    def summary(self) -> str:
        """One line on the batches kept and dropped so far, and the time taken."""
        total, p = self.num_kept + self.num_dropped, self._dropping.p
        whole_s = self.seconds / self.num_kept * total if self.num_kept else 0.0
        return (
            f"{self.num_kept} of {total} batches ran ({(1 - p) * total:.0f} expected) in "
            f"{self.seconds:.1f} s; all would take about {whole_s:.1f} s. 0 B of a step's peak."
        )

    def _start(self) -> int:
        return self._dropping.position if self._dropping.is_resuming else 0

    def _is_kept(self, first: int, place: int) -> bool:
        """Tell whether a batch is kept, by its place in the epoch whose first has this number."""
        return not self._dropping.is_dropped(first + place // self._window * self._window)

    def __iter__(self) -> Iterator[Any]:
        dropping, loader, start = self._dropping, self._loader, self._start()
        first, done, asked = dropping.iteration - start, start, start

        def is_wanted(place: int) -> bool:
            nonlocal asked
            asked = place + 1
            return self._is_kept(first, place)

        order = dropping.order if start else None
        if order is None:
            if dropping.is_resuming:
                loader.set_own_states(dropping.order)
            dropping.order = loader.random_states()
        dropping.is_resuming, dropping.position = False, start
        began = time.perf_counter()
        for place, batch in loader.epoch(is_wanted, start, order):
            self._pass_over(range(done, place))
            done = place + 1
            dropping.iteration, dropping.position = first + done, done
            self.num_kept += 1
            if self._updates is not None:
                self._updates.note()
            yield batch
            now = time.perf_counter()
            self.seconds, began = self.seconds + now - began, now
        self._pass_over(range(done, asked))
        dropping.iteration, dropping.position = first + asked, 0
        dropping.order = loader.random_states()

    def _pass_over(self, places: range) -> None:
        """Count dropped batches.

        Raises:
            MemplanError: if gradients that they would have been part of wait for an update.
        """
        if places and self._updates is not None and self._updates.are_due():
            raise MemplanError(
                "a batch would be dropped between backwards whose gradients are added up: no "
                "parameter was updated since the last batch. With an update for each n batches, "
                "planned.batches(loader, accumulate=n) keeps or drops n together; accumulate=1 "
                "says that steps without an update are meant"
            )
        self.num_dropped += len(places)
        if self._schedule is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*lr_scheduler.step.*before.*")
                for _ in places:
                    self._schedule.step()
