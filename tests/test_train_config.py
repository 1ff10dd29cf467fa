"""The numbers of a training run: the learning rate's course, and bad numbers."""

from __future__ import annotations

import math

import pytest

from fastdiff.train import TrainConfig


def test_the_rate_warms_up_and_falls_along_half_a_cosine():
    config = TrainConfig(steps=110, warmup=10, lr=1.0, lr_schedule="cosine")
    assert config.lr_at(0) == 0.1
    assert config.lr_at(9) == config.lr_at(10) == 1.0
    assert config.lr_at(60) == pytest.approx(0.5)
    assert 0 < config.lr_at(109) < 1e-3
    assert TrainConfig(steps=5, warmup=10, lr=1.0).lr_at(4) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "`batch_size` must be a whole number"),
        ({"lr": 0}, "`lr` must be a positive number, got 0"),
        ({"lr": math.nan}, "`lr` must be a positive number, got nan"),
        ({"weight_decay": -1}, "`weight_decay`"),
        ({"warmup": -1}, "`warmup` must be .* at least 0"),
        ({"lr_schedule": "linear"}, "`lr_schedule` must be one of constant, cosine, got 'linear'"),
        ({"ema_decay": 1}, r"`ema_decay` must be a number in \[0, 1\)"),
        ({"label_dropout": 1.5}, r"`label_dropout` must be a probability in \[0, 1\]"),
        ({"grad_clip": 0}, "`grad_clip` must be a positive number or None"),
        ({"seed": 2**64}, "`seed` must have at most 64 bits"),
        ({"seed": -(2**63) - 1}, "`seed` must be"),
        ({"sample_every": 0}, "`sample_every`"),
        ({"checkpoint_every": None}, "`checkpoint_every` must be a whole number"),
        ({"keep_checkpoints": 0}, "`keep_checkpoints`"),
        ({"log_every": True}, "`log_every` must be a whole number"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
