"""Every random choice of training that is not image noise: the order of the data, times, label dropout.

    word(seed, domain, draw, id) = mix(mix(mix(mix(seed) + domain) + draw) + id)

with mix the finaliser of SplitMix64. A choice is thus a pure function of what it is for: nothing is carried
from step to step, so a resumed run needs no generator's state, and no choice depends on the batch around it.
Integers only: the same on every machine and with every version of NumPy and torch.

Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
"""

from __future__ import annotations

from typing import Any

import numpy as np

DOMAIN_ORDER, DOMAIN_TIME, DOMAIN_LABEL_DROPOUT, DOMAIN_MODEL, DOMAIN_SPLIT = range(5)
DOMAIN_FLIP, DOMAIN_TOP, DOMAIN_LEFT = range(5, 8)
DOMAIN_STRATUM = 16  # of the likelihood's estimate: which time of a stratum

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output for the state z: a bijection of uint64, wrapping."""
    z = z + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


def words(seed: Any, domain: int, draw: int, ids: Any) -> np.ndarray:
    """uint64 words, one for each of `ids`, uniform and independent across seed, domain, draw and id.

    Args:
        seed: a whole number of 64 bits, or an int64 array of the shape of `ids`.
        domain: what the words are for.
        draw: the optimisation step or the epoch, >= 0.
        ids: int64 array, the identity of each sample.
    """
    seeds = np.asarray(seed)
    # Python integers up to 2^64 - 1 and negative ones: the same two's complement that int64 arrays have.
    seeds = seeds.astype(np.uint64) if seeds.ndim else np.array([int(seed) % 2**64], dtype=np.uint64)
    state = mix(seeds) + np.uint64(domain)
    return mix(mix(mix(state) + np.uint64(draw)) + np.asarray(ids).astype(np.uint64))


def below(seed: Any, domain: int, draw: int, ids: Any, bound: int) -> np.ndarray:
    """Uniform in 0..bound-1 as int64: floor(bound u), u of 32 bits; probabilities differ by < 2^-32."""
    fraction = words(seed, domain, draw, ids) >> np.uint64(32)
    return ((fraction * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def times(seed: Any, draw: int, ids: Any, num_timesteps: int) -> np.ndarray:
    """Uniform times, int64."""
    return below(seed, DOMAIN_TIME, draw, ids, num_timesteps)


def dropped(seed: int, draw: int, ids: Any, probability: float) -> np.ndarray:
    """Booleans, true with the given probability (to 2^-32)."""
    fraction = words(seed, DOMAIN_LABEL_DROPOUT, draw, ids) >> np.uint64(32)
    return fraction < np.uint64(round(probability * 2**32))


def permutation(n: int, seed: int, epoch: int, domain: int = DOMAIN_ORDER) -> np.ndarray:
    """A random order of 0..n-1, int64: the samples sorted by their words."""
    return np.argsort(words(seed, domain, epoch, np.arange(n)), kind="stable")


class Batches:
    """Which samples each step sees: the epochs' permutations, one behind the other, cut into batches.

    Every sample comes once in an epoch; a batch may reach over the end of one, or hold several of a small
    data set.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self._n, self._batch_size, self._seed = n, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def index(self, step: int) -> np.ndarray:
        """[batch_size] int64 indices of step `step`, a function of it alone."""
        start, parts, wanted = step * self._batch_size, [], self._batch_size
        while wanted:
            epoch, offset = divmod(start, self._n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self._n, self._seed, epoch)
            part = self._order[offset : offset + wanted]
            parts.append(part)
            start, wanted = start + len(part), wanted - len(part)
        return np.concatenate(parts)
