"""Noise: known words, the same bits everywhere, accuracy, distribution and independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kernel_cases import OTHERS, SIZES, apply, assert_same_bits, library

from fastdiff.kernels._philox_numpy import _box_muller_numpy, philox_numpy
from fastdiff.kernels.philox import (
    DOMAIN_INIT,
    DOMAIN_TRAIN,
    RNG_VERSION,
    normal_numpy,
    normal_reference,
    normal_torch,
    normal_triton,
)

ONES = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32 10: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def keys(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds over all 64 bits, ids and draws up to 2^32 - 1."""
    g = torch.Generator().manual_seed(batch)
    seed = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g)
    sample_id, draw = torch.randint(0, 2**32, (2, batch), generator=g)
    seed[:1], sample_id[:1], draw[:1] = -1, ONES, ONES
    return seed, sample_id, draw


def draw(n: int, seed: int = 0, sample_id: int = 0, draw: int = 0, domain: int = 1) -> torch.Tensor:
    key = (torch.tensor([value]) for value in (seed, sample_id, draw))
    return normal_torch(torch.empty(1, n), *key, domain)[0]


def fill(backend: str, z: torch.Tensor, *key: torch.Tensor, domain: int) -> torch.Tensor:
    if backend == "native":
        library()
        normal_torch(z, *key, domain)
    else:
        apply(backend, normal_triton, z, *key, domain)
    return z


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_words_are_random123s(counter: tuple, key: tuple, words: tuple) -> None:
    c = [np.array([value], np.uint64) for value in counter]
    got = philox_numpy(*c, np.array([key[0] | key[1] << 32], np.uint64))
    assert tuple(int(word[0]) for word in got) == words


def test_normals_of_version_one_never_change() -> None:
    assert RNG_VERSION == 1
    z = draw(6, seed=2**64 // 3 - 2**63, sample_id=7, draw=11, domain=1)
    assert [value.hex() for value in z.tolist()] == [
        "-0x1.2ef5860000000p+0",
        "-0x1.ec39960000000p-2",
        "0x1.ca14a40000000p-1",
        "-0x1.1145ce0000000p-2",
        "-0x1.5c52ee0000000p-1",
        "0x1.861f680000000p-1",
    ]


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("domain", [DOMAIN_INIT, DOMAIN_TRAIN, ONES])
def test_backends_agree_to_the_last_bit(backend: str, n: int, domain: int) -> None:
    key = keys(3)
    expected = normal_numpy(torch.full((3, n), float("nan")), *key, domain)
    assert_same_bits(fill(backend, torch.full((3, n), float("nan")), *key, domain=domain), expected)


@pytest.mark.parametrize("backend", OTHERS)
def test_empty_batch_and_empty_sample_keep_their_shape(backend: str) -> None:
    assert fill(backend, torch.empty(0, 5), *keys(0), domain=1).shape == (0, 5)
    assert fill(backend, torch.empty(2, 0), *keys(2), domain=1).shape == (2, 0)


def test_parts_of_a_long_sample_join_without_a_seam() -> None:
    key = keys(1)
    whole = normal_numpy(torch.empty(1, 3 * 65536 + 7), *key, 1)
    part = normal_numpy(torch.empty(1, 1000), *key, 1, start=131072 - 64)
    assert_same_bits(part, whole[:, 131072 - 64 :][:, :1000].contiguous())
    assert_same_bits(normal_torch(torch.empty_like(whole), *key, 1), whole)


def test_many_small_samples_equal_each_alone() -> None:
    key = keys(700)
    together = normal_numpy(torch.empty(700, 130), *key, 1)
    for b in (0, 503, 504, 699):
        alone = normal_numpy(torch.empty(1, 130), *(k[b : b + 1] for k in key), 1)
        assert_same_bits(together[b : b + 1], alone)


def test_counter_of_elements_wraps_after_2_to_34() -> None:
    key = keys(1)
    last = normal_numpy(torch.empty(1, 8), *key, 1, start=2**34 - 4)
    first = normal_numpy(torch.empty(1, 4), *key, 1)
    assert_same_bits(last[:, 4:].contiguous(), first)
    assert not torch.equal(last[:, :4], first)


def test_only_the_low_32_bits_of_id_and_draw_count() -> None:
    seed, sample_id, draw_ = keys(4)
    z = normal_numpy(torch.empty(4, 9), seed, sample_id, draw_, 1)
    assert_same_bits(normal_numpy(torch.empty(4, 9), seed, sample_id + 2**32, draw_ - 2**32, 1), z)
    assert_same_bits(normal_torch(torch.empty(4, 9), seed, sample_id + 2**32, draw_ - 2**32, 1), z)


def test_normals_are_within_1e_6_of_float64() -> None:
    key = keys(20)
    z = normal_torch(torch.empty(20, 50_001), *key, 1)
    exact = normal_reference(torch.empty(z.shape, dtype=torch.float64), *key, 1)
    assert ((z - exact).abs() <= 1e-6 * exact.abs().clamp(min=1)).all()


def test_extreme_words_are_within_1e_6_of_float64_and_reach_6_7_sigma() -> None:
    edges = [0, 1, 2, 127, 128, 255, 2**31, ONES - 128, ONES - 127, ONES]
    eighths = [k * 2**29 + d for k in range(9) for d in (-128, -1, 0, 1, 128)]  # where sin and cos change
    thirds = [
        int(2**32 * 2**-e * 2 / 3) + d for e in range(32) for d in (-1, 0, 1)
    ]  # where the exponent changes
    words = np.array([w for w in edges + eighths + thirds if 0 <= w <= ONES], np.uint32)
    w0, w1 = (a.reshape(-1) for a in np.meshgrid(words, words))
    u = (w0.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    v = (w1.astype(np.float32) * np.float32(2**-32)).astype(np.float64)
    assert u.min() > 0
    assert u.max() <= 1
    radius = np.sqrt(-2 * np.log(u))
    for z, wave in zip(
        _box_muller_numpy(w0, w1), (np.cos(2 * np.pi * v), np.sin(2 * np.pi * v)), strict=True
    ):
        error = np.abs(z - radius * wave)
        assert np.isfinite(z).all()
        assert (error <= 1e-6 * np.maximum(1, np.abs(z))).all()
    assert 6.7 < float(radius.max()) < 6.8


def test_moments_of_a_million_normals() -> None:
    n = 2_000_000
    z = draw(n, seed=3).double()
    for power, mean, variance in (
        (1, 0, 1),
        (2, 1, 2),
        (3, 0, 15),
        (4, 3, 96),
    ):  # Var z^k = E z^2k - (E z^k)^2
        assert abs(float((z**power).mean()) - mean) < 5 * math.sqrt(variance / n)


def test_distribution_passes_kolmogorov_smirnov() -> None:
    n = 1_000_000
    z = draw(n, seed=4).double().sort().values
    cdf = 0.5 * torch.erfc(-z / math.sqrt(2))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((cdf - steps[:-1]).max()), float((steps[1:] - cdf).max()))
    assert distance < 1.95 / math.sqrt(n)  # the 0.1 % point of the Kolmogorov distribution


def test_tails_hold_as_many_as_the_normal_law_says() -> None:
    n = 8_000_000
    z = draw(n, seed=5)
    for sigma in (3.0, 4.0, 4.5):
        expected = n * math.erfc(sigma / math.sqrt(2))
        assert abs(int((z.abs() > sigma).sum()) - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("changed", ["seed", "high half of seed", "sample_id", "draw", "domain", "element"])
def test_draws_that_differ_in_one_coordinate_are_independent(changed: str) -> None:
    n = 500_000
    other = {
        "seed": dict(seed=1),
        "high half of seed": dict(seed=2**32),
        "sample_id": dict(sample_id=1),
        "draw": dict(draw=1),
        "domain": dict(domain=2),
    }
    a = draw(n).double()
    b = draw(n + 1).double()[1:] if changed == "element" else draw(n, **other[changed]).double()
    for f in (lambda z: z, lambda z: z * z - 1, torch.sign):  # each with mean 0; the square's variance is 2
        assert abs(float((f(a) * f(b)).mean())) < 5 * float(f(a).std()) ** 2 / math.sqrt(n)


def test_the_four_normals_of_one_counter_are_independent() -> None:
    z = draw(2_000_000, seed=6).double().view(-1, 4)
    bound = 5 / math.sqrt(len(z))
    for f in (z, (z * z - 1) / math.sqrt(2), z.sign()):
        correlation = f.T @ f / len(z) - torch.eye(4)
        assert float((correlation - torch.diag(correlation.diag())).abs().max()) < bound
