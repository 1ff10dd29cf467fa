"""Samplers of k-diffusion's shape against the tables read off them: a user's own, and k-diffusion's."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import types
import warnings
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import assert_close, push_gaussian
from pasted_samplers import (
    ancestral,
    averaged,
    churned_history,
    clipped,
    euler,
    heun,
    in_place,
    noise_first,
    two_noises,
    two_steps,
)

import fastdiff as fd
from fastdiff.adapters.brownian import BrownianPath
from fastdiff.adapters.k_diffusion import import_sampler
from fastdiff.table import SamplingTable

SIGMAS = torch.cat([torch.logspace(1.3, -1.7, 9, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


class Noise:
    """Stands in for torch's normals while a sampler runs, and for its model, whose calls start the rows."""

    def __init__(self, monkeypatch):
        self.rows = [[]]
        self.entered = []
        self.generator = torch.Generator().manual_seed(4)
        self.normal = torch.randn
        monkeypatch.setattr(torch, "randn_like", lambda x: self.draw(x.shape))
        monkeypatch.setattr(torch, "randn", lambda size, **_: self.draw(size))

    def draw(self, shape):
        z = self.normal(tuple(shape), generator=self.generator, dtype=torch.float64)
        self.rows[-1].append(z.clone())
        return z

    def model(self, x, sigma, **_):
        self.rows.append([])
        self.entered.append(x.clone())
        return denoiser(x, sigma)


def denoiser(x, sigma):
    return torch.tanh(1.3 * x / (1 + torch.as_tensor(sigma).flatten()[0]) + 0.2) + 0.1 * torch.sin(x)


def compare(sample_fn, table: SamplingTable, monkeypatch, merge=lambda draws: draws[-1], **options) -> None:
    """Run the function itself and the table on the same numbers: equal but for some steps' rounding."""
    noise = Noise(monkeypatch)
    x = SIGMAS[0] * noise.normal((2, 3, 4), dtype=torch.float64, generator=noise.generator)
    passed = {"extra_args": {}, "callback": lambda *_: None, "disable": True, **options}
    if "noise_sampler" in inspect.signature(sample_fn).parameters:
        passed["noise_sampler"] = BrownianPath(lambda: noise.draw(x.shape))
    result = sample_fn(noise.model, x, SIGMAS.clone(), **passed)
    rows = [merge(draws) if draws else torch.zeros_like(x) for draws in noise.rows[1:]]
    assert_close(table.evaluate(denoiser, noise.entered[0], rows), result, 1e-12)


@pytest.mark.parametrize(
    ("sample_fn", "registers", "rows", "options"),
    [
        (euler, 0, 9, {}),
        (euler, 0, 9, {"s_churn": 3.0}),
        (heun, 1, 17, {}),
        (heun, 1, 17, {"s_churn": 3.0, "s_noise": 1.003}),
        (ancestral, 0, 9, {}),
        (ancestral, 0, 9, {"eta": 0.5}),
        (two_steps, 1, 9, {}),
        (clipped, 0, 9, {}),
        (in_place, 0, 9, {}),
    ],
)
def test_a_users_sampler_is_its_table(sample_fn, registers, rows, options, monkeypatch):
    table = import_sampler(sample_fn, SIGMAS, **options)
    assert (table.registers, table.num_rows, table.name) == (registers, rows, sample_fn.__name__)
    assert table.ends_step.sum() == 9
    table.check(1e-12)
    compare(sample_fn, table, monkeypatch, **options)


def test_the_comparison_sees_a_planted_error(monkeypatch):
    with pytest.raises(AssertionError):
        compare(ancestral, import_sampler(ancestral, SIGMAS, eta=0.999), monkeypatch)


def test_noise_in_one_proportion_is_one_noise(monkeypatch):
    table = import_sampler(two_noises, SIGMAS)
    assert_close(table.from_noise[:-1, 0], SIGMAS[1:-1], 1e-15)
    compare(two_noises, table, monkeypatch, merge=lambda draws: 0.6 * draws[0] + 0.8 * draws[1])


def test_noise_that_is_drawn_before_the_network_is_called_is_that_rows_own(monkeypatch):
    table = import_sampler(noise_first, SIGMAS)
    assert (table.registers, table.num_rows) == (0, 9)
    assert_close(table.from_noise[:, 0], SIGMAS[1:], 1e-15)
    noise = Noise(monkeypatch)
    x = SIGMAS[0] * noise.normal((2, 3, 4), dtype=torch.float64, generator=noise.generator)
    result = noise_first(noise.model, x, SIGMAS)
    assert_close(table.evaluate(denoiser, x, [draws[0] for draws in noise.rows[:-1]]), result, 1e-12)


def test_churn_before_the_first_evaluation_is_the_initial_level():
    table = import_sampler(euler, SIGMAS, s_churn=3.0)
    assert math.isclose(table.sigma[0], table.init_scale, rel_tol=1e-15)
    assert math.isclose(table.init_scale, float(SIGMAS[0]) * (1 + 3.0 / 9), rel_tol=1e-15)
    assert_close(table.t, SIGMAS[:-1] * (1 + 3.0 / 9), 1e-15)
    assert table.from_noise[-1, 0] == 0


def test_a_clamp_of_x0_is_the_clip():
    table = import_sampler(clipped, SIGMAS)
    assert table.clip == (-1.0, 1.0)
    assert (table.x0_from_x == 0).all()
    assert (table.x0_from_out == 1).all()


@pytest.mark.parametrize(
    ("sample_fn", "options", "ends"),
    [
        (euler, {}, [1] * 9),
        (euler, {"s_churn": 3.0}, [1] * 9),
        (heun, {}, [0, 1] * 8 + [1]),
        (heun, {"s_churn": 3.0}, [0, 1] * 8 + [1]),
        (averaged, {}, [0, 1] * 9),
        (two_steps, {}, [1] * 9),
        (churned_history, {}, [1] * 9),
    ],
)
@pytest.mark.parametrize("place", ["behind the first evaluation", "before it", "nowhere"])
@pytest.mark.filterwarnings("ignore:imported as it is:UserWarning")
def test_steps_end_at_the_levels_wherever_the_callback_is_called(sample_fn, options, ends, place):
    """Churned ones end where they remember nothing, or by a callback in k-diffusion's place."""
    starts = [0, *(np.flatnonzero(ends) + 1)]

    def moved(model, x, sigmas, extra_args=None, callback=None, disable=None):
        evaluations = iter(range(len(ends)))

        def evaluate(x, sigma):
            if next(evaluations) in starts and place == "before it":
                callback({})
            return model(x, sigma)

        own = callback if place == "behind the first evaluation" else lambda *_: None
        return sample_fn(evaluate, x, sigmas, extra_args={}, callback=own, **options)

    assert import_sampler(moved, SIGMAS).ends_step.tolist() == [bool(end) for end in ends]


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1], SIGMAS.float()], ids=["", "not to 0", "float32"])
def test_a_callback_at_the_end_of_a_step_moves_nothing(sigmas):
    def late(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for pair in pairwise(sigmas):
            x = heun(model, x, torch.stack(pair), callback=lambda *_: None)
            callback({})
        return x

    ends = import_sampler(late, sigmas).ends_step.tolist()
    assert ends == [False, True] * (len(ends) // 2) + [True] * (len(ends) % 2)


@pytest.mark.parametrize(
    ("sample_fn", "solver", "options"),
    [(euler, "euler", {"s_churn": 3.0}), (heun, "heun", {}), (ancestral, "euler_ancestral", {})],
)
def test_our_solver_is_the_imported_sampler(sample_fn, solver, options):
    check_ours(solver, import_sampler(sample_fn, SIGMAS, **options), **options)


def check_ours(solver: str, table: SamplingTable, **options) -> None:
    """A solver of ours makes of the same numbers what an imported table does."""
    levels = fd.NoiseLevels.from_sigmas(SIGMAS.numpy())
    ours = fd.compile_table(solver, levels, prediction="x0", **options)
    assert_close(push_gaussian(table, 0.7, 0.4), push_gaussian(ours, 0.7, 0.4), 1e-12)
    assert np.array_equal(table.ends_step, ours.ends_step)
    generator = torch.Generator().manual_seed(2)
    x, *noise = torch.randn((1 + table.num_rows, 2, 3, 4), generator=generator, dtype=torch.float64)
    x = table.init_scale * x
    assert ours.registers == table.registers
    assert_close(ours.evaluate(denoiser, x, noise), table.evaluate(denoiser, x, noise), 1e-12)


def adaptive(model, x, sigmas, **_):
    x0 = model(x, sigmas[0])
    return x0 if float((x - x0).norm()) > 1 else x


def own_sigma(model, x, sigmas, **_):
    return model(x, x.flatten()[0])


def spread(model, x, sigmas, **_):
    return model(x, sigmas[:1] * torch.arange(1.0, 4.0))


def keeps_the_start(model, x, sigmas, **_):
    return model(x + torch.randn_like(x), sigmas[0]) + x


def independent(model, x, sigmas, **_):
    first = model(x, sigmas[0])
    one, other = torch.randn_like(x), torch.randn_like(x)
    return model(first + other + one, sigmas[1]) + one


def forgets_nothing(model, x, sigmas, **_):
    outs = []
    for row in range(20):
        outs.append(model(x, sigmas[0]))
        x = sum(math.cos(row * i) * out for i, out in enumerate(outs))
    return x


@pytest.mark.parametrize(
    ("sample_fn", "reason"),
    [
        (adaptive, "`norm` is not linear|`norm` mixes"),
        (own_sigma, "`flatten` mixes|sigma that depends on the state"),
        (spread, "different sigma for each sample"),
        (keeps_the_start, "before the first evaluation"),
        (independent, "two independent noises"),
        (forgets_nothing, "it remembers 10 tensors .* at most 7 registers"),
        (lambda model, x, sigmas: euler(model, x.clamp(-100, 100), sigmas), "clips the start of the chain"),
        (lambda model, x, sigmas: x, "never calls the network"),
        (lambda model, x, sigmas: model(x, sigmas[0], 1, 2), "fails with TypeError"),
        (lambda model, x, sigmas: model(x * 0, sigmas[0]).exp(), "`exp` is not linear"),
    ],
)
def test_what_no_table_can_hold_is_refused_with_the_reason(sample_fn, reason):
    with pytest.raises(ValueError, match=f"cannot be imported: .*({reason})"):
        import_sampler(sample_fn, SIGMAS)
    assert type(torch.randn_like(SIGMAS)) is torch.Tensor


@pytest.mark.parametrize(
    ("sample_fn", "options", "reason"),
    [
        (lambda model, x, sigma_min, sigma_max, n: x, {}, "takes sigma_min and sigma_max"),
        (lambda model: model, {}, r"must take \(model, x, sigmas, ...\)"),
        (euler, {"churn": 1.0}, "`churn` is no option of euler, which takes .*s_churn"),
        (euler, {"callback": print}, "`callback` must be left out: the import gives euler its own"),
        ("euler", {}, "`sample_fn` must be a function"),
    ],
)
def test_another_shape_of_function_is_a_type_error(sample_fn, options, reason):
    with pytest.raises(TypeError, match=reason):
        import_sampler(sample_fn, SIGMAS, **options)


def test_our_own_levels_are_taken_without_a_warning():
    levels = fd.NoiseLevels.from_sigmas(SIGMAS.numpy())
    torch.set_warn_always(True)  # not only the first time in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert import_sampler(euler, levels.sigma) == import_sampler(euler, SIGMAS)
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("sigmas", [[1.0], [[1.0, 0.0]], [0.0, 0.0], [float("nan"), 0.0], [-1.0, 0.0]])
def test_sigmas_that_are_no_levels_are_refused(sigmas):
    with pytest.raises(ValueError, match="`sigmas` must be"):
        import_sampler(euler, sigmas)


@pytest.fixture(scope="module")
def k_diffusion():
    """k-diffusion's own samplers, where it is installed; its package wants more than they need."""
    spec = find_spec("k_diffusion")
    for needed in ("torchdiffeq", "torchsde", "scipy"):
        if spec is None or spec.origin is None or find_spec(needed) is None:
            pytest.skip("needs k-diffusion, torchdiffeq and torchsde")
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__, package.utils = [str(Path(spec.origin).parent)], utils
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    stubs = {"k_diffusion": package, "k_diffusion.utils": utils}
    before = {name: sys.modules.get(name) for name in (*stubs, "k_diffusion.sampling")}
    sys.modules.update(stubs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module("k_diffusion.sampling")
    for name, module in before.items():
        sys.modules.pop(name, None) if module is None else sys.modules.update({name: module})


THEIRS = [
    ("euler", "euler", 0, {}),
    ("euler", "euler", 0, {"s_churn": 3.0}),
    ("euler_ancestral", "euler_ancestral", 0, {"eta": 0.7}),
    ("heun", "heun", 1, {"s_churn": 3.0}),
    ("dpm_2", "dpm_2", 1, {"s_churn": 3.0}),
    ("dpm_2_ancestral", "dpm_2_ancestral", 1, {}),
    ("lms", "lms", 3, {}),
    ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", 1, {}),
    ("dpmpp_sde", "dpmpp_sde", 1, {}),
    ("dpmpp_2m", "dpmpp_2m", 1, {}),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", 1, {"solver_type": "heun"}),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", 1, {"solver_type": "midpoint", "eta": 0.5}),
    ("dpmpp_3m_sde", "dpmpp_3m_sde", 2, {}),
]


@pytest.mark.parametrize(("name", "solver", "registers", "options"), THEIRS, ids=str)
def test_k_diffusions_sampler_is_its_table_and_our_solver(
    name, solver, registers, options, k_diffusion, monkeypatch
):
    sample_fn = getattr(k_diffusion, f"sample_{name}")
    table = import_sampler(sample_fn, SIGMAS, **options)
    assert table.registers == registers
    assert table.ends_step.sum() == 9
    check_ours(solver, table, **options)
    compare(sample_fn, table, monkeypatch, **options)


@pytest.mark.filterwarnings("ignore:imported as it is:UserWarning")  # float32 inside
def test_dpm_fast_is_a_table_where_it_is_wrapped(k_diffusion, monkeypatch):
    """12 evaluations in steps of third order, the last two of second and first."""

    def dpm_fast(model, x, sigmas, extra_args=None, callback=None, disable=None):
        ends = float(sigmas[-2]), float(sigmas[0])
        return k_diffusion.sample_dpm_fast(model, x, *ends, 12, extra_args, callback, disable)

    table = import_sampler(dpm_fast, SIGMAS)
    assert (table.num_rows, table.registers) == (12, 2)
    assert table.ends_step.tolist() == [False, False, True] * 3 + [False, True, True]
    compare(dpm_fast, table, monkeypatch)


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_k_diffusions_samplers_that_choose_their_steps_are_refused(name, k_diffusion):
    with pytest.raises(TypeError, match="chooses its steps"):
        import_sampler(getattr(k_diffusion, f"sample_{name}"), SIGMAS)
