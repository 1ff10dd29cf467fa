"""exp and sums with the same bits everywhere: multiplications and additions that each round once.

    exp(y) = 2^n P(r),  n = round(y / ln 2),  r = y - n ln 2 in two parts          relative error <= 2e-7
    y is clamped to [-87, 88]

The fit is minimax (iteratively reweighted least squares in float64); ln 2 is split so that n LN2_HI is exact
(Cody and Waite 1980).
"""

from __future__ import annotations

import numpy as np

from ._triton import jit, tl

EXP = (
    1.0,
    1.0,
    0.49999991059303284,
    0.16666419804096222,
    0.041668228805065155,
    0.00837484560906887,
    0.0013836807338520885,
)
EXP_LO, EXP_HI = -87.0, 88.0
LOG2E, LN2_HI, LN2_LO = 1.4426950216293335, 0.693115234375, 3.194618329871446e-05
ROUNDER = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, kept in the low bits

_E0, _E1, _E2, _E3, _E4, _E5, _E6 = (tl.constexpr(c) for c in EXP)
_LO, _HI = tl.constexpr(EXP_LO), tl.constexpr(EXP_HI)
_LOG2E, _LN2_HI, _LN2_LO = tl.constexpr(LOG2E), tl.constexpr(LN2_HI), tl.constexpr(LN2_LO)
_ROUNDER = tl.constexpr(ROUNDER)


@jit
def _exp_parts(y):
    """n, r, q and 2^n with exp(y) = 2^n (1 + r + r^2 q); NaN stays NaN."""
    y = tl.clamp(y, _LO, _HI, propagate_nan=tl.PropagateNan.ALL)
    rounded = y * _LOG2E + _ROUNDER
    n = rounded - _ROUNDER
    r = (y - n * _LN2_HI) - n * _LN2_LO
    p = _E6 * r + _E5
    p = p * r + _E4
    p = p * r + _E3
    p = p * r + _E2
    scale = ((rounded.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return n, r, p, scale


@jit
def exact_exp(y):
    """exp of a float32 tensor; NaN stays NaN."""
    _, r, q, scale = _exp_parts(y)
    return ((q * r + _E1) * r + _E0) * scale


@jit
def exact_exp_rest(y):
    """exp(y), exp(y) - 1 and exp(y) - 1 - y, the last two without cancellation where |y| < ln(2)/2."""
    n, r, q, scale = _exp_parts(y)
    power = ((q * r + _E1) * r + _E0) * scale
    rest = (q * r) * r
    less = power - 1.0
    return power, tl.where(n == 0.0, r + rest, less), tl.where(n == 0.0, rest, less - y)


@jit
def first_term(coefficient, value):
    """coefficient * value, or -0.0, to which a term adds up unchanged, where the coefficient is 0."""
    nothing = tl.full(value.shape, -0x80000000, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(coefficient != 0.0, coefficient * value, nothing)


@jit
def add_term(total, coefficient, value):
    """total + coefficient * value; total where the coefficient is 0, whatever the value."""
    if coefficient != 0.0:
        total = total + coefficient * value
    return total


def exact_exp_numpy(y: np.ndarray) -> np.ndarray:
    """exp of a float32 array; NaN stays NaN."""
    f32 = np.float32
    y = np.clip(y, f32(EXP_LO), f32(EXP_HI))
    rounded = y * f32(LOG2E) + f32(ROUNDER)
    n = rounded - f32(ROUNDER)
    r = (y - n * f32(LN2_HI)) - n * f32(LN2_LO)
    p = f32(EXP[6]) * r + f32(EXP[5])
    for c in EXP[4::-1]:
        p = p * r + f32(c)
    return p * ((rounded.view(np.int32) + np.int32(127)) << np.int32(23)).view(f32)
