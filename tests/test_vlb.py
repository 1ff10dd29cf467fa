"""vlb_terms: the variational bound's terms and their gradient; the discretised Gaussian; coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from kernel_cases import SIZES, assert_compiles_as_one_graph, assert_same_bits
from torch.library import opcheck
from vlb_cases import BACKENDS, EPS, SCHEDULE, TIMES, copies, operands, run, terms_with_bounds

from fastdiff import ops
from fastdiff.kernels import exact, vlb
from fastdiff.kernels.vlb import Terms, vlb_terms_reference, vlb_terms_torch
from fastdiff.train.bound import vlb_coefficients


def within_rounding(f: Terms, exact_f: Terms) -> torch.Tensor:
    """[samples], whether results lie within the error bound of float32 around those in float64."""
    n = f.x0.shape[1]
    term, by_out, by_v = terms_with_bounds(exact_f)
    # a sum of n float32 terms in blocks, each a tree, rounds at most 64 times; then two factors
    bound = (term.error + 66 * EPS * term.value.abs()).mean(1) * vlb.BITS
    holds = (f.vlb - exact_f.vlb).abs() <= bound
    factors = (vlb.factors(a.coef.double(), a.t, n) for a in (f, exact_f))
    stored = zip(f[1:3], exact_f[1:3], *factors, (by_out, by_v), strict=True)
    for got, wanted, factor, exact_factor, each in stored:
        if got is not None and wanted is not None:
            got, wanted = got * factor[:, None], wanted * exact_factor[:, None]
            bound = each.error * vlb.BITS / n + 8 * EPS * wanted.abs() + 2.0**-149
            holds &= ((got - wanted).abs() <= bound).all(1)
    return holds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_terms_and_gradients_are_the_formula_up_to_rounding(
    backend: str, n: int, variance: str, prediction: str
) -> None:
    f = operands(n, prediction, variance)
    exact_f = copies(f, torch.float64)
    vlb_terms_reference(exact_f)
    run(backend, f)
    assert within_rounding(f, exact_f).all()


@pytest.mark.parametrize("column", [vlb.X0_FROM_OUT, vlb.MEAN_WEIGHT, vlb.GAP_AT_MIN, vlb.GAP_AT_MAX])
def test_coefficient_that_is_off_by_a_thousandth_is_noticed(column: int) -> None:
    f = operands(1823, variance="learned")
    exact_f = copies(f, torch.float64)
    vlb_terms_reference(exact_f)
    wrong = f._replace(coef=f.coef.clone())
    wrong.coef[:, column] *= 1.001
    vlb_terms_torch(wrong)
    assert not within_rounding(wrong, exact_f).any()


def test_reference_is_the_papers_formula() -> None:
    """KL of normals and the tanh form of the normal distribution, with 50 digits, element by element."""
    mpmath.mp.dps = 50
    for variance, clip in (("learned_range", (-1, 1)), ("learned", None), ("fixed_large", (-0.5, 0.5))):
        f = copies(operands(6, "eps", variance, clip), torch.float64)
        vlb_terms_reference(f)
        for b in range(len(TIMES)):
            r = [mpmath.mpf(float(c)) for c in f.coef[min(max(TIMES[b], 0), len(SCHEDULE) - 1)]]
            bits = [_bits(f, b, i, r) for i in range(6)]
            assert abs(sum(bits) / 6 - float(f.vlb[b])) <= 1e-10 * abs(float(f.vlb[b]))


def _bits(f: Terms, b: int, i: int, r: list[Any]) -> Any:
    """One element in units of the posterior's standard deviation, from the definitions."""
    x0, x_t, out = (mpmath.mpf(float(a[b, i])) for a in (f.x0, f.x_t, f.out))
    x0_hat = min(max(r[vlb.X0_FROM_X] * x_t + r[vlb.X0_FROM_OUT] * out, r[vlb.CLIP_LO]), r[vlb.CLIP_HI])
    share = (mpmath.mpf(float(f.out[b, 6 + i])) + 1) / 2 if f.out.shape[1] == 12 else 0
    log_variance = -(share * r[vlb.GAP_AT_MAX] + (1 - share) * r[vlb.GAP_AT_MIN])
    mean, mean_hat, std = r[vlb.MEAN_WEIGHT] * x0, r[vlb.MEAN_WEIGHT] * x0_hat, mpmath.exp(log_variance / 2)
    if TIMES[b] > 0:
        kl = log_variance + (1 + (mean - mean_hat) ** 2) / std**2 - 1
        return kl / 2 / mpmath.log(2)

    def cdf(z: Any) -> Any:
        return (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3))) / 2

    half_bin = r[vlb.MEAN_WEIGHT] / 255
    upper, lower = cdf((mean - mean_hat + half_bin) / std), cdf((mean - mean_hat - half_bin) / std)
    upper, lower = 1 if x0 > 0.999 else upper, 0 if x0 < -0.999 else lower
    return -mpmath.log(max(upper - lower, mpmath.mpf("1e-12")), 2)


@pytest.mark.parametrize("variance", ["learned_range", "learned", "fixed_small"])
def test_gradient_of_the_reference_is_its_finite_difference(variance: str) -> None:
    f = copies(operands(5, "eps", variance), torch.float64)
    f = f._replace(out=f.out.double())
    vlb_terms_reference(f)
    halves = zip(f[1:3], vlb.factors(f.coef.double(), f.t, 5), strict=True)
    grad = torch.cat([half * factor[:, None] for half, factor in halves if half is not None], 1)
    step = 1e-6
    for i in range(f.out.shape[1]):
        ends = []
        for sign in (1, -1):
            moved = f._replace(out=f.out.clone(), vlb=f.vlb.clone(), grad_mean=None, grad_v=None)
            moved.out[:, i] += sign * step
            vlb_terms_reference(moved)
            ends.append(moved.vlb)
        slope = (ends[0] - ends[1]) / (2 * step)
        # rounding of the difference, and the cube of the step
        assert torch.allclose(slope, grad[:, i], rtol=1e-5, atol=1e-7 * float(grad.abs().max()))


def test_probabilities_of_the_256_levels_add_up_to_one() -> None:
    coef, t = vlb_coefficients(SCHEDULE, "x0", "learned_range"), torch.zeros(256, dtype=torch.int64)
    x0 = torch.arange(256, dtype=torch.float64)[:, None] / 127.5 - 1
    for x0_hat in (-1.3, -0.99, 0.1234, 0.9):
        for v in (-2.0, 0.0, 60.0):
            out = torch.tensor([[x0_hat, v]]).expand(256, 2)
            f = Terms(torch.empty(256).double(), None, None, x0, x0, out, coef, t)
            vlb_terms_reference(f)
            # a level has at least 1e-12; the rest is the rounding of 256 differences
            assert abs(float(torch.exp2(-f.vlb).sum()) - 1) <= 256 * 1e-12 + 256 * 2.0**-52


def test_exact_prediction_with_the_posteriors_variance_costs_nothing() -> None:
    f = operands(63, "x0", "fixed_small")._replace(grad_mean=None, grad_v=None)
    for backend in BACKENDS[:2]:
        run(backend, f._replace(out=f.x0))
        assert f.vlb[3:].tolist() == [0.0] * 5
        assert (f.vlb[:3] > 0).all()
        f.vlb.fill_(float("nan"))


def test_rest_of_the_exponential_keeps_its_digits_near_0() -> None:
    y = np.concatenate([-np.geomspace(1e-12, 0.3466, 1000), np.geomspace(1e-12, 0.3466, 1000)])
    q = np.polyval(exact.EXP[:1:-1], y)
    taylor = sum(y**k / math.factorial(k + 2) for k in range(20))
    assert np.abs(q / taylor - 1).max() <= 8e-7


@pytest.mark.interpret
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_compiled_loop_has_the_interpreters_bits(variance: str, prediction: str) -> None:
    """Of the gradients; the sums are in another order."""
    f = operands(1823, prediction, variance)
    if prediction == "x0":
        f.out[-1, :1823] = f.x0[-1]  # an error of 0, whose gradient has a sign
    other = copies(f)
    run("native", f)
    run("interpret", other)
    for one, wanted in zip(f[1:3], other[1:3], strict=True):
        if one is not None:
            assert_same_bits(one, wanted)
    torch.testing.assert_close(f.vlb, other.vlb, rtol=64 * EPS, atol=0)


def test_number_of_threads_changes_no_bit() -> None:
    f, before = operands(3000), torch.get_num_threads()
    again = copies(f)
    try:
        for each, threads in ((f, 1), (again, 3)):
            torch.set_num_threads(threads)
            run("native", each)
    finally:
        torch.set_num_threads(before)
    for one, wanted in zip(again[:3], f[:3], strict=True):
        assert_same_bits(one, wanted)


@pytest.mark.parametrize("backend", ["torch", "native", BACKENDS[-1]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_only_the_casts(backend: str, dtype: torch.dtype) -> None:
    f = operands(63)
    half = f._replace(out=f.out.to(dtype), grad_mean=f.grad_mean.to(dtype), grad_v=f.grad_v.to(dtype))
    wide = copies(half)
    wide = wide._replace(out=half.out.float())
    run(backend, half)
    run(backend, wide)
    assert_same_bits(half.vlb, wide.vlb)
    assert_same_bits(half.grad_mean, wide.grad_mean.to(dtype))
    assert_same_bits(half.grad_v, wide.grad_v.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_do_not_change_the_terms_and_runs_repeat_their_bits(backend: str) -> None:
    f = operands(1823)
    again, bare = copies(f), copies(f)._replace(grad_mean=None, grad_v=None)
    for each in (f, again, bare):
        run(backend, each)
    for got, wanted in ((bare.vlb, f.vlb), (again.vlb, f.vlb), (again.grad_v, f.grad_v)):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_sample_does_not_depend_on_the_others(backend: str) -> None:
    f = operands(300)
    run(backend, f)
    for b in range(len(TIMES)):
        alone = Terms._make(a[b : b + 1].clone() for a in f)._replace(coef=f.coef)
        run(backend, alone)
        for got, wanted in zip(alone[:3], f[:3], strict=True):
            assert_same_bits(got, wanted[b : b + 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)])
def test_empty_operands_have_terms_of_0(backend: str, batch: int, n: int) -> None:
    f = operands(n)
    f = Terms._make(a[:batch] for a in f)._replace(coef=f.coef)
    run(backend, f)
    assert f.vlb.tolist() == [0.0] * batch


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_and_x_t_is_not_read_where_the_network_predicts_x0(backend: str) -> None:
    f = operands(63, "x0")
    f.x_t.fill_(float("nan"))
    run(backend, f)
    assert f.vlb.isfinite().all()
    f.out[:, 5] = float("nan")
    run(backend, f)
    assert f.vlb.isnan().all()
    assert (f.grad_mean[:, 5] == 0).all()  # it lies not within the clip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", [-120.0, 190.0])
def test_variances_far_from_the_posteriors_are_not_cut_short(backend: str, v: float) -> None:
    """exp(gap) is clamped at -87 and 88, the gap beside it is not."""
    f = operands(63, "eps", "learned")
    f.out[:, 63:] = v
    later = f.t > 0
    f = f._replace(**{name: getattr(f, name)[later] for name in ("vlb", "x0", "x_t", "out", "t")})
    f = f._replace(grad_mean=torch.empty_like(f.x0), grad_v=torch.empty_like(f.x0))
    exact_f = copies(f, torch.float64)
    vlb_terms_reference(exact_f)
    run(backend, f)
    if v > 0:
        torch.testing.assert_close(f.vlb.double(), exact_f.vlb, rtol=1e-5, atol=0)
    else:  # e^88 and more: both are past all use
        assert (f.vlb > 1e30).all()
        assert (exact_f.vlb > 1e30).all()


def op_operands(is_learned: bool = True) -> dict[str, Any]:
    f = operands(12, "v", "learned_range" if is_learned else "fixed_small")
    shape = (len(TIMES), 3, 2, 2)
    x0, x_t = f.x0.view(shape), f.x_t.view(shape)
    return dict(x0=x0, x_t=x_t, out=f.out.view(len(TIMES), -1, 2, 2), coef=f.coef, t=f.t)


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("detach_mean", [False, True])
def test_operator_gives_each_half_the_gradient_that_is_wanted(is_learned: bool, detach_mean: bool) -> None:
    given = op_operands(is_learned)
    out = given.pop("out").clone().requires_grad_()
    weights = torch.linspace(0.5, 2, len(TIMES))
    loss = ops.vlb_terms(out=out, **given, detach_mean=detach_mean)
    f = operands(12, "v", "learned_range" if is_learned else "fixed_small")
    vlb_terms_torch(f)
    assert_same_bits(loss.detach(), f.vlb)
    if detach_mean and not is_learned:
        assert not loss.requires_grad
        return
    (loss * weights).sum().backward()
    of_mean, of_v = (factor * weights for factor in vlb.factors(f.coef, f.t, 12))
    mean = torch.zeros_like(f.grad_mean) if detach_mean else f.grad_mean * of_mean[:, None]
    wanted = torch.cat([mean, f.grad_v * of_v[:, None]], 1) if is_learned else mean
    assert_same_bits(out.grad.flatten(1), wanted)


def test_operator_passes_opcheck_and_compiles_as_one_graph() -> None:
    given = op_operands()
    out = given.pop("out")
    rest_of = (given["coef"], given["t"])
    for wants in ((False, False), (False, True), (True, True)):
        leaf = out.clone().requires_grad_(any(wants))
        opcheck(torch.ops.fastdiff.vlb_terms, (given["x0"], given["x_t"], leaf, *rest_of, *wants))

    def step(out: torch.Tensor) -> torch.Tensor:
        return ops.vlb_terms(out=out * 2, **given, detach_mean=True).mean()

    assert_compiles_as_one_graph(step, out)


def test_strides_do_not_change_the_operators_bits() -> None:
    given = op_operands()
    strided = {k: a.to(memory_format=torch.channels_last) if a.dim() == 4 else a for k, a in given.items()}
    assert not strided["out"].is_contiguous()
    assert_same_bits(ops.vlb_terms(**strided), ops.vlb_terms(**given))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_coefficients_are_those_of_the_posterior(variance: str) -> None:
    """From the betas alone: Ho et al. 2020, eq. 7, with Nichol and Dhariwal's clipped logarithm at t = 0."""
    coef = vlb_coefficients(SCHEDULE, "eps", variance, (-2, 2)).double().numpy()
    bar = np.cumprod(1 - SCHEDULE.betas)
    before = np.append(1.0, bar[:-1])
    posterior = SCHEDULE.betas * (1 - before) / (1 - bar)
    posterior[0] = posterior[1]
    large = np.append(posterior[0], SCHEDULE.betas[1:])
    bounds = {
        "fixed_small": (np.log(posterior), np.log(posterior)),
        "fixed_large": (np.log(large), np.log(large)),
        "learned": (-np.ones(100), np.ones(100)),
        "learned_range": (np.log(posterior), np.log(SCHEDULE.betas)),
    }[variance]
    wanted = np.zeros((100, vlb.WIDTH))
    wanted[:, vlb.X0_FROM_X] = 1 / np.sqrt(bar)
    wanted[:, vlb.X0_FROM_OUT] = -np.sqrt((1 - bar) / bar)
    wanted[:, vlb.CLIP_LO], wanted[:, vlb.CLIP_HI] = -2, 2
    wanted[:, vlb.MEAN_WEIGHT] = np.sqrt(before) * SCHEDULE.betas / (1 - bar) / np.sqrt(posterior)
    wanted[:, vlb.GAP_AT_MIN], wanted[:, vlb.GAP_AT_MAX] = (np.log(posterior) - b for b in bounds)
    # rounded to float32 once; 1 - alpha_bar keeps 12 digits at least
    np.testing.assert_allclose(coef, wanted, rtol=1.01 * EPS, atol=1e-11)


def call(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.vlb_terms(**(op_operands() | changes))


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (r"`x0` must be torch.float32", call(x0=torch.zeros(8, 3, 2, 2).half())),
        (r"`x_t` must be torch.float64", call(x0=torch.zeros(8, 3, 2, 2).double())),
        (r"`x_t` must be torch.float32 \[8, 3, 2, 2\]", call(x_t=torch.zeros(8, 3, 2, 1))),
        (r"`out` must be .*\[8, 6, 2, 2\] with a learned variance", call(out=torch.zeros(8, 4, 2, 2))),
        (r"`out` must be .* got torch.float64", call(out=torch.zeros(8, 3, 2, 2).double())),
        (r"`coef` must be torch.float32 \[any, 8\]", call(coef=torch.zeros(3, 7))),
        (r"`t` must be torch.int64 \[8\]", call(t=torch.zeros(8).int())),
        (r"`prediction` must be one of .* got 'score'", lambda: vlb_coefficients(SCHEDULE, "score")),
        (r"`variance` must be one of .* got 'big'", lambda: vlb_coefficients(SCHEDULE, "eps", "big")),
        (r"`clip` must be a range", lambda: vlb_coefficients(SCHEDULE, clip=(1, -1))),
    ],
)
def test_argument_that_breaks_the_contract_is_named(message: str, wrong: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_coefficients_need_a_schedule() -> None:
    with pytest.raises(TypeError, match=r"`schedule` must be a NoiseSchedule, got list"):
        vlb_coefficients([0.1, 0.2])


def test_gradient_of_a_float16_network_does_not_underflow_however_large_the_image() -> None:
    """Under a loss scale of 65 536, as training in float16 has it, at every time."""
    small, repeats = operands(1823, "eps"), 200
    coef, t = small.coef, small.t
    images = [torch.cat([a] * repeats, 1).view(len(TIMES), 1, -1) for a in (small.x0, small.x_t)]
    halves = [torch.cat([a] * repeats, 1).view(len(TIMES), 1, -1) for a in small.out.split(1823, 1)]
    out = torch.cat(halves, 1).half()
    grads = []
    for dtype in (torch.float16, torch.float32):
        leaf = out.to(dtype).requires_grad_()
        loss = 65536 * len(TIMES) * ops.vlb_terms(*images, leaf, coef, t).mean()
        grads += torch.autograd.grad(loss, leaf)
    half, wide = (grad.double() for grad in grads)
    # two roundings to 11 bits; the result's is to multiples of 2^-24 below 2^-14
    assert ((half - wide).norm(dim=2) <= 2.0**-10 * wide.norm(dim=2) + 2.0**-25 * half.shape[2] ** 0.5).all()


def test_second_derivative_is_refused_not_taken_for_zero() -> None:
    given = op_operands()
    out = given.pop("out").clone().requires_grad_()
    loss = ops.vlb_terms(out=out, **given)
    (grad,) = torch.autograd.grad(loss.sum(), out, create_graph=True)
    with pytest.raises(RuntimeError, match="vlb_terms has no second derivative; use torch's"):
        (loss.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("is_learned", [False, True])
def test_gradients_of_many_sums_at_once_are_those_of_each(is_learned: bool) -> None:
    given = op_operands(is_learned)
    out = given.pop("out").clone().requires_grad_()
    loss = ops.vlb_terms(out=out, **given)
    each = torch.eye(len(TIMES))
    for keep in (True, False):
        (batched,) = torch.autograd.grad(loss, out, each, is_grads_batched=True, retain_graph=keep)
    loss = ops.vlb_terms(out=out, **given)
    for one, row in zip(batched, each, strict=True):
        assert_same_bits(one, *torch.autograd.grad(loss, out, row, retain_graph=True))
