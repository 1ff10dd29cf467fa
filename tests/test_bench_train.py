"""The figures of training: what the objective stores and how fast it is, beside two recipes."""

from __future__ import annotations

import time

import pytest
from chains import one_thread

from benchmarks import bench_train
from benchmarks.bench_train import RECIPES, batches_held, check, objective_speed
from fastdiff.kernels import cpu

_one_thread = pytest.fixture(autouse=True)(one_thread)


def test_the_recipes_are_the_same_loss():
    check()


def test_the_check_sees_another_loss(monkeypatch):
    made = bench_train.losses

    def wrong(prediction: str = "v"):
        found = made(prediction)
        ours = found["fastdiff"]
        return found | {"fastdiff": lambda *given: 1.001 * ours(*given)}

    monkeypatch.setattr(bench_train, "losses", wrong)
    with pytest.raises(AssertionError):
        check()


def test_the_objective_never_stores_noise_or_target():
    """At its peak it holds x_t and a gradient; a recipe holds the noise and the squares as well."""
    if cpu.library(wait=True) is None:
        pytest.skip("needs a C++ compiler: without one a target is made for the loss, and given back")
    try:
        held = {recipe: batches_held(recipe) for recipe in RECIPES}
    except OSError:
        pytest.skip("the system does not count peak memory")
    scratch = 0.1  # of a batch: a chunk at a time, the allocator's rounding
    assert held["fastdiff"] <= 2 + scratch
    for recipe in RECIPES[:2]:
        assert held["fastdiff"] <= held[recipe] - 1 + scratch  # the noise of a batch


def test_the_objective_is_faster_than_either_recipe(monkeypatch):
    """On one thread, by its own processor time: what else runs beside the test does not count."""
    if cpu.library(wait=True) is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    found = objective_speed(rounds=9)
    for recipe in RECIPES[:2]:
        assert found.times[recipe].median >= 1.2 * found.times["fastdiff"].median
