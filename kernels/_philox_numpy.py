"""Noise without a kernel: the operations of philox.py on NumPy arrays, and the constants of both.

Every operation rounds once and stands in the same order as in philox.py, which holds the formulas and their
sources; so the normals agree to the last bit.
"""

from __future__ import annotations

import numpy as np
import torch

from .exact import ROUNDER

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Q(f), constant term first; cos(pi/2 r) in r^2; sin(pi/2 r)/r in r^2
LOG = (
    -1.9999996423721313,
    0.9999987483024597,
    -0.6667597889900208,
    0.5001524090766907,
    -0.3959007263183594,
    0.3284017741680145,
    -0.34222379326820374,
    0.3073137104511261,
)
COS = (1.0, -1.2336970567703247, 0.2535986304283142, -0.020408352836966515)
SIN = (1.5707963705062866, -0.6459634900093079, 0.07968022674322128, -0.004602177068591118)
LOG_EXPONENT = float(np.float32(-2.0 * np.log(2.0) * 2.0**-23))  # times the exponent in place, e * 2^23
MANTISSA_BASE, EXPONENT_MASK = 0x3F2AAAAB, -0x800000  # float32 2/3 as bits; sign and exponent field

# elements; 8 such temporaries fit a second-level cache (2 cores of a Xeon: 3.7x the time of torch.randn; 4.3x
# at 16384 and at 262144)
_CHUNK = 65536


def normal_numpy(
    z: torch.Tensor,
    seed: torch.Tensor,
    sample_id: torch.Tensor,
    draw: torch.Tensor,
    domain: int,
    start: int = 0,
) -> torch.Tensor:
    """Fill `z` as `normal_torch` does, in NumPy, a part at a time so that the temporaries stay in cache.

    Args:
        start: z[b, 0] is the sample's element `start`, a multiple of 4.
    """
    batch, n = z.shape
    out = z.numpy()
    draws, ids = (a.numpy().astype(np.uint32)[:, None] for a in (draw, sample_id))
    keys = seed.numpy().view(np.uint64)[:, None]
    rows = max(1, _CHUNK // max(n, 1))
    for b in range(0, batch, rows):
        for i in range(0, n, _CHUNK):
            part = out[b : b + rows, i : i + _CHUNK]
            some = slice(b, b + rows)
            _normal_part(part, (start + i) // 4, draws[some], ids[some], domain, keys[some])
    return z


def _normal_part(
    z: np.ndarray, first_quad: int, draw: np.ndarray, sample_id: np.ndarray, domain: int, seed: np.ndarray
) -> None:
    """Fill z [rows, elements] from quad `first_quad` on; draw, sample_id, seed: [rows, 1]."""
    rows, count = z.shape
    quads = -(-count // 4)
    shape = (rows, quads)
    c0 = np.arange(first_quad, first_quad + quads, dtype=np.uint64) & np.uint64(0xFFFFFFFF)
    c0 = np.broadcast_to(c0, shape)
    w = philox_numpy(
        c0, draw, np.broadcast_to(sample_id.astype(np.uint64), shape), np.array(domain, np.uint64), seed
    )
    whole = count // 4
    for pair in range(2):
        for offset, values in zip(
            (2 * pair, 2 * pair + 1), _box_muller_numpy(w[2 * pair], w[2 * pair + 1]), strict=True
        ):
            z[:, offset : 4 * whole : 4] = values[:, :whole]
            if 4 * whole + offset < count:
                z[:, 4 * whole + offset] = values[:, whole]


def philox_numpy(
    c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray, seed: np.ndarray
) -> list[np.ndarray]:
    """Philox4x32-10; c0 and c2 as uint64 below 2^32, seed as uint64; four uint32 words."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = seed & low, seed >> shift
    c1, c3 = np.asarray(c1).astype(np.uint64), np.asarray(c3).astype(np.uint64)
    m0, m1 = map(np.uint64, MULTIPLIERS)
    for _ in range(ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0 = p1 >> shift
        c0 ^= c1
        c0 ^= k0
        c2 = p0 >> shift
        c2 ^= c3
        c2 ^= k1
        p0 &= low
        p1 &= low
        c1, c3 = p1, p0
        k0, k1 = (k0 + np.uint64(KEY_STEPS[0])) & low, (k1 + np.uint64(KEY_STEPS[1])) & low
    return [c.astype(np.uint32) for c in (c0, c1, c2, c3)]


def _box_muller_numpy(w0: np.ndarray, w1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two standard normals from two words, operation for operation as `box_muller`."""
    f32, i32 = np.float32, np.int32
    u = w0.astype(f32)
    u *= f32(2.0**-32)
    u += f32(2.0**-33)
    bits = u.view(i32)
    e = bits - i32(MANTISSA_BASE)
    e &= i32(EXPONENT_MASK)
    f = (bits - e).view(f32)
    f -= f32(1.0)
    radius = f * f32(LOG[7])
    for c in LOG[6:0:-1]:
        radius += f32(c)
        radius *= f
    radius += f32(LOG[0])
    radius *= f
    radius += e.astype(f32) * f32(LOG_EXPONENT)
    np.sqrt(radius, out=radius)
    r = w1.astype(f32)
    r *= f32(2.0**-30)
    rounded = r + f32(ROUNDER)
    k = rounded.view(i32)
    r -= rounded - f32(ROUNDER)
    s = r * r
    cos, sin = s * f32(COS[3]), s * f32(SIN[3])
    for wave, fit in ((cos, COS), (sin, SIN)):
        for c in fit[2:0:-1]:
            wave += f32(c)
            wave *= s
        wave += f32(fit[0])
    sin *= r
    odd = (k & i32(1)) != 0
    a, b = np.where(odd, sin, cos), np.where(odd, cos, sin)
    a.view(i32)[...] ^= ((k + i32(1)) & i32(2)) << i32(30)
    b.view(i32)[...] ^= (k & i32(2)) << i32(30)
    a *= radius
    b *= radius
    return a, b
