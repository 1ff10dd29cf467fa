"""Noise: z = normal(seed, sample_id, draw, element), the same bits on every backend.

    words = Philox4x32-10(key = seed, counter = (element // 4, draw, sample_id, domain))
    u = word_0 * 2^-32 + 2^-33,  v = word_1 * 2^-32                                             in float32
    z_0 = sqrt(-2 ln u) cos(2 pi v),  z_1 = sqrt(-2 ln u) sin(2 pi v)        z_2, z_3 from words 2 and 3

Logarithm, sine and cosine are polynomials of separate multiplications and additions, so that every operation
is correctly rounded everywhere: NumPy (_philox_numpy.py, which holds the constants), C++ without contraction
(philox.cpp), Triton's interpreter, compiled code with `enable_fp_fusion=False`.

    -2 ln u = -2 ln 2 * e + f Q(f),  u = 2^e (1 + f), 1 + f in [2/3, 4/3)            relative error <= 1.7e-7
    cos, sin(2 pi v) = ± P(r),  r = 4v - round(4v), |r| <= 1/2                                error <= 2.8e-8

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958. The
polynomials are minimax fits (iteratively reweighted least squares in float64, then rounded to float32).
"""

from __future__ import annotations

from ctypes import c_int64

import numpy as np
import torch

from . import cpu
from ._blocks import cut, first_element
from ._philox_numpy import (
    COS,
    EXPONENT_MASK,
    KEY_STEPS,
    LOG,
    LOG_EXPONENT,
    MANTISSA_BASE,
    MULTIPLIERS,
    ROUNDS,
    SIN,
    normal_numpy,
    philox_numpy,
)
from ._triton import jit, tl
from .exact import ROUNDER

RNG_VERSION = 1
DOMAIN_INIT, DOMAIN_STEP, DOMAIN_TRAIN, DOMAIN_KNOWN = 0, 1, 2, 3

_M0, _M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_W0, _W1 = tl.constexpr(KEY_STEPS[0]), tl.constexpr(KEY_STEPS[1])
_ROUNDS = tl.constexpr(ROUNDS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(c) for c in LOG)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in COS)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in SIN)
_LOG_EXPONENT = tl.constexpr(LOG_EXPONENT)
_MANTISSA_BASE, _EXPONENT_MASK = tl.constexpr(MANTISSA_BASE), tl.constexpr(EXPONENT_MASK)
_ROUNDER = tl.constexpr(ROUNDER)
_TWO_M30, _TWO_M32, _TWO_M33 = tl.constexpr(2.0**-30), tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)


@jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words from a counter of four uint32 tensors and a key of two."""
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@jit
def minus_two_log(u):
    """-2 ln u of normal numbers 0 < u < 4/3; every operation rounds once (see the module's head)."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - _MANTISSA_BASE) & _EXPONENT_MASK
    f = (bits - e).to(tl.float32, bitcast=True) - 1.0
    q = _L7 * f + _L6
    q = q * f + _L5
    q = q * f + _L4
    q = q * f + _L3
    q = q * f + _L2
    q = q * f + _L1
    q = q * f + _L0
    return q * f + e.to(tl.float32) * _LOG_EXPONENT


@jit
def box_muller(w0, w1):
    """Two standard normals from two words; every operation rounds once (see the module's head)."""
    radius = tl.sqrt_rn(minus_two_log(w0.to(tl.float32) * _TWO_M32 + _TWO_M33))
    v4 = w1.to(tl.float32) * _TWO_M30
    rounded = v4 + _ROUNDER
    k = rounded.to(tl.int32, bitcast=True)
    r = v4 - (rounded - _ROUNDER)
    s = r * r
    cos = ((_C3 * s + _C2) * s + _C1) * s + _C0
    sin = (((_S3 * s + _S2) * s + _S1) * s + _S0) * r
    odd = (k & 1) != 0
    a = tl.where(odd, sin, cos).to(tl.int32, bitcast=True) ^ (((k + 1) & 2) << 30)
    b = tl.where(odd, cos, sin).to(tl.int32, bitcast=True) ^ ((k & 2) << 30)
    return a.to(tl.float32, bitcast=True) * radius, b.to(tl.float32, bitcast=True) * radius


@jit
def _normal_quad(quad, draw, sample_id, domain, seed):
    """The four normals of each counter."""
    zero = tl.zeros_like(quad)
    w0, w1, w2, w3 = philox(
        quad,
        zero + draw,
        zero + sample_id,
        (zero + domain).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@jit
def normal_block(start, draw, sample_id, domain, seed, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK] normals of one sample, those of its elements from `start` on.

    A thread draws what it also loads, WIDTH = 4 or 8 neighbouring elements at a time, so that nothing goes
    through shared memory; `start` is a multiple of WIDTH.
    """
    first = (start // 4).to(tl.uint32)
    if WIDTH == 4:
        quad = first + tl.arange(0, BLOCK // 4).to(tl.uint32)
        z0, z1, z2, z3 = _normal_quad(quad, draw, sample_id, domain, seed)
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))
    even = first + 2 * tl.arange(0, BLOCK // 8).to(tl.uint32)
    a0, a1, a2, a3 = _normal_quad(even, draw, sample_id, domain, seed)
    b0, b1, b2, b3 = _normal_quad(even + 1, draw, sample_id, domain, seed)
    z02 = tl.join(tl.join(a0, b0), tl.join(a2, b2))
    z13 = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.reshape(tl.join(z02, z13), (BLOCK,))


@jit
def _normal_kernel(
    z_ptr, seed_ptr, sample_id_ptr, draw_ptr, domain, n, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr + b).to(tl.uint64)
    sample_id = tl.load(sample_id_ptr + b).to(tl.uint32)
    draw = tl.load(draw_ptr + b).to(tl.uint32)
    offset = tl.arange(0, BLOCK)
    start = first_element(BLOCK)
    z = normal_block(start, draw, sample_id, domain, seed, BLOCK, WIDTH)
    tl.store(z_ptr + b * n + start + offset, z, mask=offset < n - start)


def normal_triton(
    z: torch.Tensor, seed: torch.Tensor, sample_id: torch.Tensor, draw: torch.Tensor, domain: int
) -> torch.Tensor:
    """Fill `z` as `normal_torch` does, on a GPU or in Triton's interpreter."""
    if z.numel():
        grid, options = cut(*z.shape, z)
        _normal_kernel[grid](z, seed, sample_id, draw, domain, z.shape[1], **options)
    return z


def normal_torch(
    z: torch.Tensor, seed: torch.Tensor, sample_id: torch.Tensor, draw: torch.Tensor, domain: int
) -> torch.Tensor:
    """z[b, i] = normal(seed[b], sample_id[b], draw[b], i).

    Args:
        z: [B, N] float32, dense. Overwritten.
        seed: [B] int64, dense: the 64 bits of the key.
        sample_id, draw: [B] int64, dense, of which 32 bits count.
        domain: which use of noise this is (`DOMAIN_INIT`, `DOMAIN_STEP`, `DOMAIN_TRAIN`).

    Returns:
        `z`.

    Traffic: 4 bytes written per element.
    """
    if z.device.type != "cpu":
        drawn = torch.empty(z.shape, dtype=torch.float32, device="cpu")
        return z.copy_(normal_torch(drawn, seed.cpu(), sample_id.cpu(), draw.cpu(), domain))
    if native := cpu.library():
        key = map(cpu.pointer, (seed, sample_id, draw))
        native.fd_normal(
            cpu.pointer(z), *map(c_int64, z.shape), *key, c_int64(domain), torch.get_num_threads()
        )
        return z
    return normal_numpy(z, seed, sample_id, draw, domain)


def normal_reference(
    z: torch.Tensor, seed: torch.Tensor, sample_id: torch.Tensor, draw: torch.Tensor, domain: int
) -> torch.Tensor:
    """Fill `z` (float64) by Box-Muller in float64 at the same float32 u and v."""
    batch, n = z.shape
    for b in range(batch):
        quad = np.arange(-(-n // 4), dtype=np.uint64)
        key = np.array([int(seed[b]) & 0xFFFFFFFFFFFFFFFF], np.uint64)
        ids = [np.full(quad.shape, int(i) & 0xFFFFFFFF, np.uint64) for i in (draw[b], sample_id[b])]
        words = philox_numpy(quad, ids[0], ids[1], np.array(domain, np.uint64), key)
        unit = [w.astype(np.float32) * np.float32(2.0**-32) for w in words]
        columns = []
        for u, v in ((unit[0], unit[1]), (unit[2], unit[3])):
            radius = np.sqrt(-2 * np.log((u + np.float32(2.0**-33)).astype(np.float64)))
            angle = 2 * np.pi * v.astype(np.float64)
            columns += [radius * np.cos(angle), radius * np.sin(angle)]
        z[b] = torch.from_numpy(np.stack(columns, axis=1).reshape(-1)[:n])
    return z
