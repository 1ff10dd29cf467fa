"""The losses that hold the bound: values in float64, gradients, what is detached, what is dispatched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import Objective
from fastdiff.train.bound import vlb_coefficients

SCHEDULES = {
    "linear": NoiseSchedule.linear(100),
    "cosine": NoiseSchedule.cosine(40),
    "respaced": NoiseSchedule.linear(1000).respace([0, 17, 300, 650, 999]),
    "zero_snr": NoiseSchedule.cosine(40).rescale_zero_terminal_snr(),
    "one": NoiseSchedule.linear(1),
}
SHAPE = (2, 3, 4)
ALL = [
    *(("simple", v) for v in ("fixed_small", "fixed_large")),
    *(("vlb", v) for v in ("fixed_small", "fixed_large", "learned", "learned_range")),
    *(("hybrid", v) for v in ("learned", "learned_range")),
    ("min_snr", "fixed_small"),
]


def batch(schedule: NoiseSchedule, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Pixels with both edges among them, times with both ends, noise."""
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([0, len(schedule) - 1, 0, len(schedule) // 2])
    x0 = torch.randint(0, 256, (4, *SHAPE), generator=g).double() / 127.5 - 1
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = -1, 1
    noise = torch.randn(4, *SHAPE, generator=g, dtype=torch.float64)
    return x0.to(dtype), t, noise.to(dtype)


class Network(torch.nn.Module):
    """Nearly right about x0 at low noise: a mean, and a variance where one is wanted."""

    def __init__(self, learned: str | None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([0.9, 0.4, -0.2], dtype=dtype))
        self.learned = learned

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mean = self.gain[0] * x + 0.05 * torch.sin(5 * x)
        if self.learned is None:
            return mean
        v = self.gain[1] * torch.tanh(x) + self.gain[2]
        return torch.cat([mean, v - 3 * (self.learned == "learned")], 1)


def network(objective: Objective, dtype: torch.dtype = torch.float64) -> Network:
    return Network(objective.variance if objective.learned_variance else None, dtype)


def by_the_papers(
    objective: Objective, x0: np.ndarray, t: np.ndarray, z: np.ndarray, model: Any
) -> dict[str, np.ndarray]:
    """mse and vlb of every sample from the betas alone, in NumPy: means, variances, divergences of normals.

    Ho et al. 2020, eq. 4, 7, 11 and 13; Nichol & Dhariwal 2021, eq. 15.
    """
    beta = objective.schedule.betas
    bar = np.cumprod(1 - beta) if objective.schedule.alpha_bar[-1] else objective.schedule.alpha_bar
    before = np.append(1.0, bar[:-1])
    tilde = beta * (1 - before) / (1 - bar)
    log_tilde = np.log(np.append(tilde[1] if len(beta) > 1 else beta[0], tilde[1:]))
    mse, vlb = [], []
    for x, s, e in zip(x0, t, z, strict=True):
        a, b, c = bar[s], beta[s], before[s]
        x_t = np.sqrt(a) * x + np.sqrt(1 - a) * e
        told = torch.tensor([objective.schedule.timesteps[s]])
        out = model(torch.from_numpy(x_t)[None], told).detach().numpy()[0]
        first, second = np.split(out, 2) if objective.learned_variance else (out, None)
        velocity = np.sqrt(a) * e - np.sqrt(1 - a) * x
        target = {"eps": e, "x0": x, "v": velocity}[objective.prediction]
        mse.append(np.mean((first - target) ** 2))
        large = np.log(b) if s or objective.variance == "learned_range" else log_tilde[0]
        log_variance = log_tilde[s] if objective.variance == "fixed_small" else large
        if second is not None:
            between = ((second + 1) * large + (1 - second) * log_tilde[s]) / 2
            log_variance = second if objective.variance == "learned" else between
        log_variance = np.broadcast_to(log_variance, x.shape)
        if objective.prediction == "eps":  # Ho's eq. 11, without going through x0
            mean = (x_t - b / np.sqrt(1 - a) * first) / np.sqrt(1 - b)
        else:
            guess = first if objective.prediction == "x0" else np.sqrt(a) * x_t - np.sqrt(1 - a) * first
            mean = (np.sqrt(c) * b * guess + np.sqrt(1 - b) * (1 - c) * x_t) / (1 - a)
        if s == 0:
            terms = np.vectorize(_nll)(x, mean, np.exp(log_variance / 2))
        else:
            true_mean = (np.sqrt(c) * b * x + np.sqrt(1 - b) * (1 - c) * x_t) / (1 - a)
            lv = log_tilde[s]
            squares = (true_mean - mean) ** 2 * np.exp(-log_variance)
            terms = 0.5 * (log_variance - lv + np.exp(lv - log_variance) - 1 + squares)
        vlb.append(np.mean(terms) / np.log(2))
    return {"mse": np.array(mse), "vlb": np.array(vlb)}


def _nll(x: float, mean: float, std: float) -> float:
    def cdf(z: float) -> float:  # the tanh form, from the side where it is small
        return 1 / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    upper, lower = (x - mean + 1 / 255) / std, (x - mean - 1 / 255) / std
    if x < -0.999:
        p = cdf(upper)
    elif x > 0.999:
        p = cdf(-lower)
    else:
        p = cdf(upper) - cdf(lower) if x < mean else cdf(-lower) - cdf(-upper)
    return float(-np.log(max(p, 1e-12)))


def differs(got: torch.Tensor, wanted: np.ndarray) -> float:
    """The largest relative difference."""
    return float(np.abs(got.detach().numpy() / wanted - 1).max())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(("loss", "variance"), ALL)
def test_losses_are_the_papers_formulas_to_1e_minus_10(loss, variance, prediction, schedule):
    if (schedule, prediction) == ("zero_snr", "eps"):
        with pytest.raises(ValueError, match="`prediction` must be 'x0' or 'v'"):
            Objective(SCHEDULES[schedule], prediction, variance, loss)
        return
    objective = Objective(SCHEDULES[schedule], prediction, variance, loss)
    x0, t, noise = batch(objective.schedule)
    model = network(objective)
    got = objective(model, x0, t, noise=noise)
    with np.errstate(over="ignore"):
        wanted = by_the_papers(objective, x0.numpy(), t.numpy(), noise.numpy(), model)
    assert differs(got.mse, wanted["mse"]) <= 1e-10
    if loss in ("simple", "min_snr"):
        assert got.vlb is None
        total = wanted["mse"] * objective.weights()[t]
    else:
        assert differs(got.vlb, wanted["vlb"]) <= 1e-10
        steps = len(objective.schedule)
        total = steps * wanted["vlb"]
        if loss == "hybrid":
            total = wanted["mse"] + steps / 1000 * wanted["vlb"]
    kept = total != 0  # min_snr weighs pure noise by 0
    assert differs(got.total[kept], total[kept]) <= 1e-10
    assert (got.total[~kept] == 0).all()


def test_the_comparison_sees_a_millionth():
    objective = Objective(SCHEDULES["linear"], "eps", "learned_range", "hybrid")
    x0, t, noise = batch(objective.schedule)
    model = network(objective)
    right = objective(model, x0, t, noise=noise)
    for wrong in (
        by_the_papers(objective, x0.numpy() * (1 + 1e-6), t.numpy(), noise.numpy(), model),
        by_the_papers(objective, x0.numpy(), t.numpy(), noise.numpy() * (1 + 1e-6), model),
    ):
        assert differs(right.mse, wrong["mse"]) > 1e-8
        assert differs(right.vlb, wrong["vlb"]) > 1e-8


@pytest.mark.parametrize(("loss", "variance"), ALL)
def test_float32_is_the_operators_and_nothing_else(loss, variance):
    """Bit for bit, so that the error bounds of test_vlb.py and test_denoising_loss.py hold for the loss."""
    objective = Objective(SCHEDULES["cosine"], "v", variance, loss)
    x0, t, _ = batch(objective.schedule, torch.float32)
    model, key = network(objective, torch.float32), (5, torch.tensor([4, 1, 2, 9]), 3)
    got = objective(model, x0, t, None, *key)
    levels = torch.from_numpy(np.stack([objective.schedule.alpha, objective.schedule.sigma], 1)).float()
    x_t, target = ops.q_sample(x0, levels, t, *key, target="v")
    out = model(x_t, torch.from_numpy(objective.schedule.timesteps[t]))
    assert_same_bits(got.mse, ops.denoising_loss(out, x0, levels, t, *key, target="v"))
    # a mean of 24 squares, added in two orders
    torch.testing.assert_close(got.mse, (out[:, :2] - target).square().mean((1, 2, 3)), rtol=2e-6, atol=0)
    if got.vlb is not None:
        coef = vlb_coefficients(objective.schedule, "v", variance)
        assert_same_bits(got.vlb, ops.vlb_terms(x0, x_t, out, coef, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_of_the_loss_is_the_noise_of_x_t(dtype):
    objective = Objective(SCHEDULES["linear"], "eps")
    x0, t, _ = batch(objective.schedule, dtype)
    alpha, sigma = (torch.from_numpy(a.copy())[t].to(dtype).view(4, 1, 1, 1) for a in
                    (objective.schedule.alpha, objective.schedule.sigma))  # fmt: skip
    losses = objective(lambda x, _: (x - alpha * x0) / sigma, x0, t, seed=3, draw=8)
    # a rounding of x_t, at most 5, is 100 times as large in eps at t = 0
    assert losses.mse.max() <= (4 * 5 * 100 * torch.finfo(dtype).eps) ** 2
    drawn = objective(lambda x, _: torch.zeros_like(x), x0, t, seed=3, draw=8).mse
    z = ops.normal(SHAPE, 3, 4, 8, domain=2).to(dtype)
    torch.testing.assert_close(drawn, z.square().mean((1, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(("loss", "variance"), [a for a in ALL if a[0] != "hybrid"])
def test_gradients_are_finite_differences(loss, variance, prediction):
    objective = Objective(SCHEDULES["respaced"], prediction, variance, loss)
    x0, t, noise = batch(objective.schedule)
    model = network(objective)

    def total(gain: torch.Tensor) -> torch.Tensor:
        return objective(
            lambda x, s: torch.func.functional_call(model, {"gain": gain}, (x, s)), x0, t, noise=noise
        ).total

    assert torch.autograd.gradcheck(total, model.gain.detach().requires_grad_())


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_hybrid_trains_the_mean_by_its_mse_and_the_variance_by_the_bound(variance, prediction):
    hybrid = Objective(SCHEDULES["cosine"], prediction, variance, "hybrid", vlb_weight=0.25)
    simple = Objective(SCHEDULES["cosine"], prediction)
    x0, t, noise = batch(hybrid.schedule)
    with torch.no_grad():
        out = network(hybrid)(x0 + noise, t)
    leaf = out.clone().requires_grad_()
    hybrid(lambda x, _: leaf, x0, t, noise=noise).total.sum().backward()
    mean = out[:, :2].clone().requires_grad_()
    simple(lambda x, _: mean, x0, t, noise=noise).total.sum().backward()
    assert_same_bits(leaf.grad[:, :2].contiguous(), mean.grad)
    bound = Objective(SCHEDULES["cosine"], prediction, variance, "vlb")

    def term(v: torch.Tensor) -> torch.Tensor:
        return bound(lambda x, _: torch.cat([out[:, :2], v], 1), x0, t, noise=noise).vlb

    v = out[:, 2:].clone().requires_grad_()
    assert torch.autograd.gradcheck(term, v)
    term(v).sum().backward()
    torch.testing.assert_close(leaf.grad[:, 2:], 0.25 * v.grad, rtol=1e-12, atol=0)
    assert (v.grad != 0).any()
    detached = leaf.detach().requires_grad_()  # and the bound alone would move the mean
    bound(lambda x, _: detached, x0, t, noise=noise).total.sum().backward()
    assert (detached.grad[:, :2] != 0).any()


def test_losses_of_pure_noise_are_finite():
    for loss, variance in ALL:
        for prediction in ("x0", "v"):
            objective = Objective(SCHEDULES["zero_snr"], prediction, variance, loss)
            model = network(objective, torch.float32)
            losses = objective(model, torch.zeros(2, *SHAPE), torch.full((2,), 39))
            losses.total.sum().backward()
            assert losses.total.isfinite().all()
            assert model.gain.grad.isfinite().all()


class Dispatched(TorchDispatchMode):
    """Counts operations once it is told to: all, and those that read or write as many numbers as a batch.

    Views and detachments move nothing and do not count; an operator of fastdiff is one operation; a gather
    reads the rows that it returns.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.counting = numel, False
        self.all: list[str] = []
        self.full: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.counting and not func.is_view and func.name() != "aten::detach":
            self.all.append(func.name())
            is_gather = func.name() == "aten::index.Tensor"
            tensors = torch.utils._pytree.tree_leaves(result if is_gather else (args, kwargs, result))
            if any(isinstance(a, torch.Tensor) and a.numel() >= self.numel for a in tensors):
                self.full.append(func.name())
        return result


def count(loss_of: Any, objective: Objective) -> tuple[Dispatched, Dispatched]:
    """What runs between the network's output and total, and then from total back to that output."""
    x0, t, _ = batch(objective.schedule, torch.float32)
    model, forward, back = network(objective, torch.float32), Dispatched(x0.numel()), Dispatched(x0.numel())
    with forward:

        def run(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            out = model(x, s).detach().requires_grad_()
            forward.counting = True
            return out

        total = loss_of(run, x0, t)
        forward.counting = False
    with back:
        back.counting = True
        total.sum().backward()
    return forward, back


@pytest.mark.parametrize(("loss", "variance"), ALL)
def test_a_loss_dispatches_at_most_four_operations(loss, variance):
    objective = Objective(SCHEDULES["cosine"], "eps", variance, loss)
    forward, back = count(lambda run, x0, t: objective(run, x0, t).total, objective)
    operators = ["fastdiff::denoising_loss", "fastdiff::vlb_terms"]
    assert forward.full == operators[: 2 if loss in ("vlb", "hybrid") else 1]
    assert len(forward.all) <= 4, forward.all
    # zeros and a product for each half of a learned variance's output, and the sum of two losses
    assert len(back.full) <= {"hybrid": 5, "vlb": 3}.get(loss, 1), back.full


def test_the_count_sees_the_same_loss_written_out():
    objective = Objective(SCHEDULES["cosine"], "eps", "learned_range", "hybrid")
    schedule = objective.schedule

    def written_out(run: Any, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma, small, large = (
            torch.from_numpy(a.copy()).float()[t].view(-1, 1, 1, 1)
            for a in (schedule.alpha, schedule.sigma, schedule.posterior_log_variance_clipped,
                      np.log(schedule.betas))
        )  # fmt: skip
        z = torch.randn_like(x0)
        x_t = alpha * x0 + sigma * z
        eps, v = run(x_t, t).chunk(2, 1)
        mse = (eps - z).square().mean((1, 2, 3))
        guess = (x_t - sigma * eps.detach()) / alpha
        log_variance = (v + 1) / 2 * large + (1 - v) / 2 * small
        gap = small - log_variance
        kl = 0.5 * (gap.exp() - 1 - gap + (x0 - guess).square() * (-log_variance).exp())
        return mse + kl.mean((1, 2, 3))

    forward, _ = count(written_out, objective)
    assert len(forward.full) > 20
