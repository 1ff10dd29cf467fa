"""The random choices of training: order, times, dropout."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.train import draws


def test_mix_gives_the_published_words_of_splitmix64():
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], dtype=np.uint64)
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert draws.mix(states).tolist() == wanted


def test_words_depend_on_every_part_of_their_key_and_on_nothing_else():
    base = draws.words(1, 2, 3, np.arange(4))
    assert base.tolist() == draws.words(1, 2, 3, np.arange(9))[:4].tolist()
    assert base[::-1].tolist() == draws.words(np.ones(4, np.int64), 2, 3, np.arange(4)[::-1]).tolist()
    others = [draws.words(*key, np.arange(4)) for key in ((0, 2, 3), (1, 1, 3), (1, 2, 4), (2, 1, 3))]
    assert len({word for words in (base, *others) for word in words.tolist()}) == 20
    assert draws.words(-1, 0, 0, [0]).tolist() == draws.words(2**64 - 1, 0, 0, [0]).tolist()
    assert draws.words(2**32, 0, 0, [0]).tolist() != draws.words(0, 0, 0, [0]).tolist()


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**64 - 1))
def test_every_sample_comes_once_in_an_epoch_whatever_the_batch_size(n, batch_size, seed):
    batches = draws.Batches(n, batch_size, seed)
    steps = -(-3 * n // batch_size)
    seen = np.concatenate([batches.index(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    # any step can be asked for by itself, as a resumed run does
    assert draws.Batches(n, batch_size, seed).index(steps - 1).tolist() == batches.index(steps - 1).tolist()


def test_epochs_differ_and_dropout_has_its_probability():
    assert draws.permutation(50, 0, 0).tolist() != draws.permutation(50, 0, 1).tolist()
    share = np.mean([draws.dropped(7, step, np.arange(1000), 0.1).mean() for step in range(100)])
    assert abs(share - 0.1) < 5 * np.sqrt(0.1 * 0.9 / 1e5)  # five standard errors
    assert not draws.dropped(7, 0, np.arange(1000), 0.0).any()
    assert draws.dropped(7, 0, np.arange(1000), 1.0).all()
