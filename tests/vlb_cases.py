"""What the tests of vlb_terms share: operands, backends, the formula with a bound of its float32 error."""

from __future__ import annotations

import torch
from kernel_cases import OTHERS, Rounded, run_on

from fastdiff.kernels import vlb
from fastdiff.kernels.vlb import Terms, vlb_terms_torch, vlb_terms_triton
from fastdiff.schedule import NoiseSchedule
from fastdiff.train.bound import vlb_coefficients

BACKENDS = ["torch", *OTHERS]  # `torch` means without the compiled loop
SCHEDULE = NoiseSchedule.linear(100)
TIMES = (0, -3, 0, 1, 7, 50, 99, 120)
EPS = 2.0**-24


def operands(
    n: int, prediction: str = "v", variance: str = "learned_range", clip: tuple[float, float] | None = (-1, 1)
) -> Terms:
    """Eight samples of pixels, times in and out of range, a network that is nearly right."""
    g = torch.Generator().manual_seed(n)
    batch, is_learned = len(TIMES), variance.startswith("learned")
    x0 = torch.randint(0, 256, (batch, n), generator=g) / 127.5 - 1
    z = torch.randn(batch, n, generator=g)
    t = torch.tensor(TIMES)
    level = t.clamp(0, len(SCHEDULE) - 1)
    alpha, sigma = (
        torch.from_numpy(a.copy()).float()[level][:, None] for a in (SCHEDULE.alpha, SCHEDULE.sigma)
    )
    out = {"eps": z, "x0": x0, "v": alpha * z - sigma * x0}[prediction]
    out = out + 0.1 * torch.randn(batch, n, generator=g)
    v = 3 * torch.rand(batch, n, generator=g) - 1.5 - 5 * (variance == "learned")
    return Terms(
        vlb=torch.full((batch,), float("nan")),
        grad_mean=torch.full((batch, n), float("nan")),
        grad_v=torch.full((batch, n), float("nan")) if is_learned else None,
        x0=x0,
        x_t=alpha * x0 + sigma * z,
        out=torch.cat([out, v], 1) if is_learned else out,
        coef=vlb_coefficients(SCHEDULE, prediction, variance, clip),
        t=t,
    )


def copies(f: Terms, dtype: torch.dtype = torch.float32) -> Terms:
    """The same operands with results of their own, of a dtype."""
    results = (None if a is None else torch.full_like(a, float("nan"), dtype=dtype) for a in f[:3])
    return Terms._make((*results, *f[3:]))


def run(backend: str, f: Terms) -> None:
    run_on(backend, vlb_terms_torch, vlb_terms_triton, f)


# A constant, its own rounding included, and what Rounded lacks, with the errors that the kernels state.
def constant(value: float) -> Rounded:
    return Rounded(torch.tensor(value, dtype=torch.float64), torch.tensor(EPS * abs(value)))


def power(y: Rounded) -> Rounded:
    value = y.value.exp()
    return Rounded(value, value * (y.error.expm1() + 2e-7))


def less(y: Rounded) -> Rounded:
    value = y.value.expm1()
    return Rounded(value, y.value.exp() * y.error.expm1() + 1e-6 * value.abs())


def rest(y: Rounded) -> Rounded:
    slope = (y.value.abs() + y.error).expm1()
    return Rounded(y.value.expm1() - y.value, slope * y.error + 1e-6 * y.value.expm1().abs())


def over(a: Rounded, b: Rounded) -> Rounded:
    value = a.value / b.value
    return Rounded(
        value, (a.error + value.abs() * b.error) / (b.value - b.error).abs() + 4 * EPS * value.abs()
    )


def minus(a: Rounded) -> Rounded:
    return Rounded(-a.value, a.error)


def choose(where: torch.Tensor, value: float, otherwise: Rounded) -> Rounded:
    return Rounded(
        torch.where(where, value, otherwise.value),
        torch.where(where, 0.0, otherwise.error).nan_to_num(nan=0.0),
    )


def terms_with_bounds(f: Terms) -> tuple[Rounded, Rounded, Rounded]:
    """In nats: every element's term and its derivatives by the mean's and the variance's half of out."""
    n = f.x0.shape[1]
    level = f.t.clamp(0, f.coef.shape[0] - 1)
    row = [Rounded.exact(a[:, None]) for a in f.coef[level].unbind(1)]
    half, one, h = Rounded.exact(torch.tensor(0.5)), Rounded.exact(torch.tensor(1.0)), constant(vlb.HALF_BIN)
    x_t = Rounded.exact(f.x_t.where(row[vlb.X0_FROM_X].value != 0, 0))
    raw = row[vlb.X0_FROM_X] * x_t + row[vlb.X0_FROM_OUT] * Rounded.exact(f.out[:, :n])
    low, high = row[vlb.CLIP_LO].value, row[vlb.CLIP_HI].value
    error = Rounded.exact(f.x0) - Rounded(raw.value.clamp(low, high), raw.error)
    gap = row[vlb.GAP_AT_MIN]
    if f.out.shape[1] != n:
        share = (Rounded.exact(f.out[:, n:]) + one) * half
        gap = share * row[vlb.GAP_AT_MAX] + (one - share) * gap
    weight = row[vlb.MEAN_WEIGHT]
    m = weight * error
    square = power(gap) * (m * m)
    kl = half * (rest(gap) + square), half * (less(gap) + square), minus((power(gap) * m) * weight)

    k = weight * power(half * gap)
    a, b = k * (error + h), k * (error - h)
    slope, cubic, three = constant(vlb.SLOPE), constant(vlb.CUBIC), Rounded.exact(torch.tensor(3.0))
    aa, bb = cubic * (a * a), cubic * (b * b)
    span = constant(2 * vlb.HALF_BIN) * k
    bend = (cubic * (k * k)) * (three * (error * error) + constant(vlb.HALF_BIN**2))
    above, below = f.x0 > vlb.EDGE, f.x0 < -vlb.EDGE
    e_p = choose(above, 0.0, power(minus(a * (slope + aa))))
    e_q = choose(below, 0.0, power(b * (slope + bb)))
    y = span * (slope + bend)
    top = choose(above | below, 1.0, minus(less(minus(y))))
    from_p, from_q = one + e_p, one + e_q
    probability = over(top, from_p * from_q)
    s_y = choose(above | below, 0.0, over(power(minus(y)), top))
    s_p, s_q = over(e_p, from_p), over(e_q, from_q)
    rise_p, rise_q, rise_y = (slope + three * c for c in (aa, bb, bend))
    by_log_k = s_p * (a * rise_p) - s_q * (b * rise_q) + s_y * (span * rise_y)
    bent = constant(6 * vlb.CUBIC) * (k * error)
    by_error = k * (s_p * rise_p - s_q * rise_q + s_y * (span * bent))
    value = probability.value.clamp(min=vlb.LEAST)
    share_lost = (probability.error / value).nan_to_num(0.0)
    assert (share_lost < 0.01).all()
    nll = Rounded(-value.log(), 1.01 * share_lost + 2e-7 * value.log().abs())
    least = probability.value < vlb.LEAST
    first = (level == 0)[:, None]
    nlls = nll, choose(least, 0.0, minus(half * by_log_k)), choose(least, 0.0, by_error)
    term, by_gap, by_x0 = (
        Rounded(torch.where(first, x.value, y.value), torch.where(first, x.error, y.error))
        for x, y in zip(nlls, kl, strict=True)
    )
    outside = (raw.value < low) | (raw.value > high)
    by_out = choose(outside, 0.0, by_x0 * row[vlb.X0_FROM_OUT])
    return term, by_out, by_gap * (half * (row[vlb.GAP_AT_MAX] - row[vlb.GAP_AT_MIN]))
