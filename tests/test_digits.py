"""The embedded model is good: its samples carry their class, vary like real digits, and are no copies."""

from __future__ import annotations

import pytest

import fastdiff as fd
from benchmarks.digits import Quality, quality
from fastdiff.nn import load_config


def judge(per_class: int) -> Quality:
    return quality(fd.Sampler.from_pretrained("digits", solver="ddim", steps=50), per_class, guidance=2.0)


def test_a_hundred_samples_are_readable_and_varied():
    result = judge(per_class=10)
    # the shares of 1 000 samples (below) less three standard deviations of 100: 97 % -> 92 %, 5 % -> 12 %
    assert result.read >= 0.92
    assert 0.7 <= result.spread <= 1.3
    assert result.near <= 0.12


@pytest.mark.slow
def test_a_thousand_samples_pass_the_gate():
    result = judge(per_class=100)
    assert result.read >= 0.97
    assert 0.7 <= result.spread <= 1.3
    assert result.near <= 0.05


def test_the_model_says_where_it_comes_from():
    about = load_config("digits")["about"]
    assert "Alpaydin" in about["data"]
    assert "CC BY 4.0" in about["data"]
    assert about["command"].startswith("fastdiff train --data digits")
    assert about["training_seconds"] > 0
    assert about["seed"] == 0
