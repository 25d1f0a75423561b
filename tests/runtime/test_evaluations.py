"""Threads that evaluate a planned module while another trains it on new shapes."""

from __future__ import annotations

import threading

import torch
from torch import nn

import memplan
from memplan.runtime.evaluations import Evaluations


def test_evaluation_waits_while_another_thread_captures():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.BatchNorm1d(8))
    planned = memplan.optimize(model).eval()
    x = torch.randn(5, 8)
    expected = planned(x).detach()
    wrong, runs, is_over = [], [], threading.Event()

    def evaluate():
        while not is_over.is_set():
            try:
                with torch.no_grad():
                    if not torch.equal(planned(x), expected):
                        wrong.append("other bits")
            except Exception as error:  # whatever it is, in this thread, is a failure
                wrong.append(error)
            runs.append(1)

    threads = [threading.Thread(target=evaluate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for size in (2, 3, 4):
        planned(torch.randn(size, 8)).sum().backward()
    is_over.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(runs) > 0


def test_a_capture_inside_of_a_run_of_the_same_thread():
    evaluations = Evaluations()
    with evaluations.one(), evaluations.none(), evaluations.one():
        pass
    with evaluations.none(), evaluations.none():
        pass
    with evaluations.none():
        pass


def test_two_modules_are_captured_at_a_time():
    failures = []

    def train():
        try:
            for size in (2, 3, 4):
                model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 1))
                memplan.optimize(model, torch.randn(size, 8))
        except Exception as error:  # whatever it is, in this thread, is a failure
            failures.append(error)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert "__getattribute__" not in vars(nn.Module)
