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


def test_one_decay_and_a_list_of_one_are_the_same_run():
    one, listed = TrainConfig(ema_decay=0.9), TrainConfig(ema_decay=(0.9,))
    assert one.ema_decays == listed.ema_decays == (0.9,)
    assert one.identity() == listed.identity()


def test_how_the_work_is_done_may_change_in_a_resumed_run():
    other = TrainConfig(accumulate=4, compile=True, prefetch=0, keep_checkpoints=9)
    assert other.identity() == TrainConfig().identity()
    for change in ({"amp": "bf16"}, {"flip": True}, {"crop": 3}, {"ema_decay": (0.999, 0.9)}):
        assert TrainConfig(**change).identity() != TrainConfig().identity()


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
        ({"ema_decay": (0.9, 1.0)}, r"`ema_decay` must be a number in \[0, 1\), or several, got 1.0"),
        ({"ema_decay": ()}, r"`ema_decay` must be one decay or several different ones, got \(\)"),
        ({"ema_decay": (0.9, 0.9)}, "`ema_decay` must be one decay or several different ones"),
        ({"accumulate": 0}, "`accumulate` must be a whole number of at least 1"),
        ({"accumulate": 9, "batch_size": 8}, "`accumulate` must be at most the 8 samples of a batch, got 9"),
        ({"amp": "fp16"}, "`amp` must be 'bf16' or None, got 'fp16'"),
        ({"compile": "yes"}, "`compile` must be True or False, got 'yes'"),
        ({"flip": 1}, "`flip` must be True or False, got 1"),
        ({"crop": 0}, "`crop` must be a whole number of at least 1"),
        ({"prefetch": -1}, "`prefetch` must be a whole number of at least 0"),
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
