"""What a sampler refuses, with the argument's name, before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_sampler import SHAPE, Net

import fastdiff as fd


@pytest.fixture
def schedule() -> fd.NoiseSchedule:
    return fd.NoiseSchedule.linear(1000)


BAD_SAMPLERS = [
    (dict(steps=1001), ValueError, "steps"),
    (dict(steps=0), ValueError, "steps"),
    (dict(solver="dddim"), ValueError, "ddim"),
    (dict(prediction="epsilon"), ValueError, "prediction"),
    (dict(variance="small"), ValueError, "variance"),
    (dict(shape=()), ValueError, "shape"),
    (dict(shape=(3, 0)), ValueError, "shape"),
    (dict(dtype=torch.int32), ValueError, "dtype"),
    (dict(eta=2.0), ValueError, "eta"),
    (dict(solver="ddpm", eta=0.5), TypeError, "eta"),
    (dict(clip=(1.0, -1.0)), ValueError, "clip"),
    (dict(shape=(2.7, 4, 4)), ValueError, "shape"),
    (dict(shape=5), ValueError, "shape"),
    (dict(dtype="float16"), ValueError, "dtype"),
    (dict(schedule="cosine"), TypeError, "schedule"),
]


@pytest.mark.parametrize(("arguments", "error", "named"), BAD_SAMPLERS)
def test_a_bad_sampler_is_refused_before_any_work(schedule, arguments, error, named):
    with pytest.raises(error, match=named):
        fd.Sampler(Net(), **{"schedule": schedule, "shape": SHAPE, **arguments})


def test_schedule_and_table_exclude_each_other(schedule):
    with pytest.raises(ValueError, match="neither"):
        fd.Sampler(Net(), shape=SHAPE)
    table = fd.Sampler(Net(), schedule, steps=2, shape=SHAPE).table
    with pytest.raises(ValueError, match="both"):
        fd.Sampler(Net(), schedule, table=table, shape=SHAPE)
    with pytest.raises(TypeError, match="eta"):
        fd.Sampler(Net(), table=table, eta=0.5, shape=SHAPE)
    with pytest.raises(TypeError, match="model"):
        fd.Sampler("digits", schedule, shape=SHAPE)


BAD_CALLS = [
    (dict(num=-1), "num"),
    (dict(seed=2**64), "seed"),
    (dict(seed=-(2**63) - 1), "seed"),
    (dict(sample_ids=[0]), "sample_ids"),
    (dict(sample_ids=[0, 2**32]), "sample_ids"),
    (dict(x_T=torch.zeros(2, 1, 4, 4)), "x_T"),
    (dict(noise=torch.zeros(3, 2, *SHAPE)), "noise"),
    (dict(guidance_scale=2.0), "cond"),
    (dict(num=2.0), "num"),
    (dict(num=True), "num"),
    (dict(seed=[1, 2, 3]), "seed"),
    (dict(sample_ids=torch.tensor([0, 2**32])), "sample_ids"),
    (dict(x_T=np.zeros((2, *SHAPE))), "x_T"),
    (dict(noise=np.zeros((2, 2, *SHAPE))), "noise"),
    (dict(cond={"labels": None}), "labels"),
    (dict(guidance_scale=2.0, cond={"labels": [1, 2]}), "uncond"),
    (dict(guidance_scale=[1.0, 2.0, 3.0]), "guidance_scale"),
    (dict(guidance_scale=float("nan")), "guidance_scale"),
    (dict(cond={"labels": [1, 2, 3]}), "labels"),
    (dict(guidance_scale=2.0, cond={"labels": [1, 2]}, uncond={"y": [1, 2]}), "uncond"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_CALLS)
def test_a_bad_call_is_refused_before_the_network_runs(schedule, arguments, named):
    def never(x, t, **cond):
        raise AssertionError("the network ran")

    sampler = fd.Sampler(never, schedule, steps=2, shape=SHAPE)
    with pytest.raises(ValueError, match=named):
        sampler.sample(**{"num": 2, **arguments})
