"""Schedulers of diffusers against the tables that are read off them."""

from __future__ import annotations

import copy
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from diffusers import schedulers
from oracles import assert_close, push_gaussian
from scheduler_cases import CASES, ROUNDING, evaluated, imported, run_original, start

import fastdiff as fd
from fastdiff.adapters.diffusers import import_scheduler, survey
from fastdiff.table import SamplingTable

# diffusers' own: deprecated algorithms, NumPy 2 on its arrays
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:imported as it is:UserWarning"
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_table_is_the_real_code(case):
    """1e-12 is some 30 steps of rounding in float64, of which a chain of 12 may amplify a few hundredfold."""
    table = imported(case)
    x, noise = start(table)
    result = evaluated(table, x, noise)
    assert_close(result, run_original(case, table, x, noise, rounding=False), 1e-12)
    rounds = case.scheduler in ROUNDING
    assert_close(result, run_original(case, table, x, noise, rounding=True), 1e-6 if rounds else 1e-12)
    assert table.registers == case.registers


def test_the_comparison_sees_a_planted_error():
    case = CASES[0]
    table = imported(case)
    x, noise = start(table)
    original = run_original(case, table, x, noise, rounding=False)
    with pytest.raises(AssertionError):
        assert_close(evaluated(table, x, noise.flip(0)), original, 1e-6)
    with pytest.raises(AssertionError):
        assert_close(evaluated(table.with_clip((-0.9, 0.9)), x, noise), original, 1e-6)


@pytest.mark.parametrize("name", sorted(ROUNDING))
def test_a_scheduler_that_rounds_differs_from_its_table_by_float32_alone(name):
    case = next(case for case in CASES if case.scheduler == name)
    table = imported(case)
    x, noise = start(table)
    x = x * (1 + 2.0**-40)  # not a float32
    error = (evaluated(table, x, noise) - run_original(case, table, x, noise, rounding=True)).abs().max()
    assert error > 1e-9


REFUSED = {
    "AmusedScheduler",  # tokens
    "BlockRefinementScheduler",  # tokens
    "DiscreteDDIMScheduler",  # tokens
    "EntropyBoundScheduler",  # tokens
    "HeliosDMDScheduler",  # wants its pipeline's own noise
    "KarrasVeScheduler",  # a placeholder: diffusers dropped it
    "PiflowScheduler",  # a network's output is a whole policy
    "RFD4ProteinaScheduler",  # a mask of tokens
    "RePaintScheduler",  # an image and a mask
    "ScoreSdeVeScheduler",  # predictor and corrector, the latter not linear
    "ScoreSdeVpScheduler",  # still listed, but dropped
    "VQDiffusionScheduler",  # tokens
}
NEED_TORCHSDE = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}


@pytest.fixture(scope="module")
def reports():
    return {report.name: report for report in survey()}


def test_every_scheduler_class_imports_or_is_refused_with_the_reason(reports):
    classes = {name for name in dir(schedulers) if name.endswith("Scheduler")}
    assert reports.keys() == classes
    refused = {name for name, report in reports.items() if report.outcome == "refused"}
    assert refused - NEED_TORCHSDE == REFUSED & classes
    for report in reports.values():
        assert (report.rows is None) == (report.registers is None) == (report.outcome == "refused")
        if report.outcome == "refused":
            assert len(report.reason) > 20
            assert "\n" not in report.reason


def test_the_survey_says_what_a_self_check_found(reports):
    assert "misses the mean of its level in row 0" in reports["IPNDMScheduler"].reason
    assert reports["DDPMScheduler"].reason == ""


def test_there_are_30_cases_and_each_is_of_a_class_that_imports(reports):
    assert len(CASES) >= 30
    assert {case.scheduler for case in CASES} <= {n for n, r in reports.items() if r.outcome == "imported"}


@pytest.mark.parametrize("name", ["PNDM", "UniPCMultistep", "EulerAncestralDiscrete"])
def test_the_scheduler_and_the_generator_are_left_as_they_were(name):
    scheduler = getattr(schedulers, f"{name}Scheduler")()
    scheduler.set_timesteps(7)
    before, state = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    import_scheduler(scheduler, 9)
    assert repr(vars(scheduler)) == repr(before)
    assert torch.equal(torch.get_rng_state(), state)


def test_timesteps_that_are_set_already_are_used():
    scheduler = schedulers.DDIMScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        import_scheduler(scheduler)
    scheduler.set_timesteps(7)
    assert import_scheduler(scheduler) == import_scheduler(schedulers.DDIMScheduler(), 7)


def test_image_to_image_starts_where_the_pipeline_set_it():
    scheduler = schedulers.DPMSolverSinglestepScheduler(solver_order=1)
    scheduler.set_timesteps(10)
    whole = import_scheduler(scheduler)
    scheduler.set_begin_index(4)
    part = import_scheduler(scheduler)
    for name in ("t", "from_state", "from_x0", "x0_from_out"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[4:])
    assert np.array_equal(part.sigma, whole.sigma[4:])


def test_a_scheduler_with_a_history_starts_from_an_image_where_it_was_imported_there():
    scheduler, image = schedulers.DPMSolverMultistepScheduler(), torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"`strength` 0.5 starts `table` .* scheduler.set_begin_index\(k\)"):
        sampler(import_scheduler(scheduler, 10)).sample(1, init=image, strength=0.5)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(5)
    table = import_scheduler(scheduler)
    result = sampler(table).sample(1, seed=2, init=image, strength=1.0)
    x = table.sigma[0] * fd.ops.normal((1, 2, 2), 2, 1, 0, domain=0).double()
    assert_close(result, table.evaluate(lambda u, t: torch.tanh(u), x), 1e-5)


def sampler(table: SamplingTable) -> fd.Sampler:
    return fd.Sampler(lambda u, t: torch.tanh(u), table=table, shape=(1, 2, 2))


# Gaussian data, N(0.7, 0.4^2): the first case of each class that is meant to reach them
GAUSSIAN = {
    case.scheduler: case
    for case in reversed(CASES)
    if not case.scheduler.startswith(("CM", "DDIMInverse", "DPMSolverMultistepInverse", "FlowMatchLCM"))
    and not case.scheduler.startswith(("LCM", "TCD", "UnCLIP"))
    and not (
        case.scheduler == "DDIMScheduler" and "clip_sample" not in case.arguments
    )  # reads the raw output
}


@pytest.mark.parametrize("case", GAUSSIAN.values(), ids=str)
def test_gaussian_data_come_out_of_an_imported_table(case):
    """Their mean at once, their spread with more steps; pushed through exactly, without sampling."""
    few = 20 if case.scheduler == "CogVideoXDPMScheduler" else 10  # where more steps begin to help
    tables = [imported(case, steps).with_clip(None) for steps in (few, 4 * few)]
    (_, coarse), (mean, fine) = (push_gaussian(table, 0.7, 0.4) for table in tables)
    assert abs(mean - 0.7) < (
        1e-2 if case.scheduler == "IPNDMScheduler" else 1e-4
    )  # its alpha starts at 1e-8
    assert abs(fine - 0.4) < abs(coarse - 0.4) / 2


def test_arguments_of_set_timesteps_are_passed_on():
    table = import_scheduler(schedulers.FlowMatchEulerDiscreteScheduler(), None, {"sigmas": [1.0, 0.7, 0.2]})
    assert np.allclose(table.sigma, [1.0, 0.7, 0.2, 0.0])
    assert np.allclose(table.alpha, [0.0, 0.3, 0.8, 1.0])


@pytest.mark.parametrize(
    ("case", "steps"), [("DDIM", 12), ("HeunDiscrete", 12), ("PNDM", 12), ("KDPM2Discrete", 12)]
)
def test_rows_that_end_a_step_are_the_steps(case, steps):
    table = import_scheduler(getattr(schedulers, f"{case}Scheduler")(), steps)
    assert table.ends_step.sum() == steps
    assert table.ends_step[-1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_table_keeps_its_marginals_or_says_so(case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = import_scheduler(case.build(), case.steps, **case.step_kwargs)
    said = [str(w.message) for w in caught if "imported as it is" in str(w.message)]
    known = {
        "DDIMInverseScheduler": "`x0_from_out` is 0",  # starts from clean data
        "IPNDMScheduler": "mean",  # its first alpha is 0, and 1e-8 stands in for it
        "PNDMScheduler": "mean",  # the levels of its Runge-Kutta start
        "UnCLIPScheduler": "row 11",  # 1 - alpha_bar is left with three digits in float32
    }
    if said:
        assert known[case.scheduler] in said[0]
    else:
        table.check(1e-5)


def test_a_scheduler_that_misses_its_levels_is_imported_with_a_warning():
    with pytest.warns(
        UserWarning, match="imported as it is, but .* misses the mean of its level in row 0"
    ) as caught:
        import_scheduler(schedulers.IPNDMScheduler(), 5)
    assert caught[0].filename == __file__


def test_clip_sample_becomes_the_clip_and_the_raw_eps_stays():
    table = import_scheduler(schedulers.DDIMScheduler(clip_sample_range=1.5), 8)
    assert table.clip == (-1.5, 1.5)
    assert (table.from_out[:-1, 0] != 0).all()  # the direction to x_t is not derived from the clipped x0
    rederived = import_scheduler(schedulers.DDIMScheduler(), 8, use_clipped_model_output=True)
    assert not rederived.from_out.any()


def test_a_learned_range_is_the_two_logarithms():
    scheduler = schedulers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    table = import_scheduler(scheduler, 50)
    assert table.learned
    small, large = (
        import_scheduler(schedulers.DDPMScheduler(variance_type=v, clip_sample=False), 50).from_noise[:, 0]
        for v in ("fixed_small", "fixed_large")
    )
    assert_close(np.exp(table.log_var_min[:-1] / 2), small[:-1], 1e-6)
    assert_close(np.exp(table.log_var_max[:-1] / 2), large[:-1], 1e-6)
    assert (table.from_noise[:-1] == 1).all()
    assert table.from_noise[-1] == 0


class Odd(schedulers.DDIMScheduler):
    """A scheduler whose step a test replaces."""

    def step(self, model_output, timestep, sample, **kwargs):
        result = super().step(model_output, timestep, sample)
        result.prev_sample = self.then(result.prev_sample, model_output)
        return result


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda x, out: x.tanh(), "evaluation 0 .* `tanh` is not linear"),
        (lambda x, out: x * out, "is not linear"),
        (lambda x, out: x / (1 + out.abs()), "`abs` is not linear"),
        (lambda x, out: x + 1, "adds a constant"),
        (lambda x, out: x - x.mean(), "`mean` mixes"),
        (lambda x, out: x.clone() if x.max() > 0 else x, "`max` "),
        (lambda x, out: x * float(x.flatten()[0]), "`flatten` mixes|reads the values"),
        (lambda x, out: x + torch.rand_like(x), "draws with `rand_like`"),
        (lambda x, out: x + torch.randn(1, dtype=torch.float64), r"noise of shape \[1\]"),
        (lambda x, out: x.clamp(min=0.0), "one lower and one upper bound"),
        (lambda x, out: torch.fmin(x, torch.tensor(8.0)), "one lower and one upper bound"),
        (lambda x, out: torch.nn.functional.threshold(x, -8.0, -8.0), "threshold` is not linear"),
        (lambda x, out: x * float("inf"), "not finite"),
        (lambda x, out: x.long().double(), "`long` is not linear"),
        (lambda x, out: x.to(torch.int32).double(), "cast to torch.int32"),
        (lambda x, out: torch.zeros(x.shape, dtype=x.dtype).copy_(x), "writes the state into a buffer"),
        (lambda x, out: torch.zeros(2), "does not depend on"),
        (lambda x, out: x.flip(-1), "`flip` .* moves its elements"),
        (lambda x, out: x.roll(1, dims=1), "on random numbers it takes another step 0"),
    ],
)
def test_what_is_not_linear_is_refused_by_name_and_torch_is_put_back(then, reason):
    odd = Odd(clip_sample=False)
    odd.then = then
    with pytest.raises(ValueError, match=f"Odd cannot be imported: .*({reason})"):
        import_scheduler(odd, 4)
    assert type(torch.randn(2)) is torch.Tensor
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize(
    ("scheduler", "kwargs", "reason"),
    [
        (
            schedulers.DDPMScheduler(variance_type="learned"),
            {},
            "takes `variance_type='learned'` as a variance",
        ),
        (schedulers.DDPMScheduler(variance_type="fixed_large_log"), {}, "not finite"),
        (
            schedulers.DDIMScheduler(thresholding=True, sample_max_value=0.5),
            {},
            "`largest` must be at least 1",
        ),
        (
            schedulers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            {},
            "not finite",
        ),
        (schedulers.UniPCMultistepScheduler(solver_type="bh1"), {}, "evaluation 7 .* not finite"),
        (schedulers.DDIMScheduler(), {"generator": torch.Generator()}, "`generator` cannot be imported"),
    ],
)
def test_what_no_table_can_hold_is_refused_with_the_reason(scheduler, kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        import_scheduler(scheduler, 8, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "kwargs", "reason"),
    [
        (schedulers.DDIMScheduler(), {"et": 1.0}, "`et` is no argument of DDIMScheduler.step"),
        (schedulers.RePaintScheduler(), {}, "original_image"),
        (object(), {}, "`scheduler` must have `step`"),
        (schedulers.DDIMScheduler, {}, r"must be an instance, .* give DDIMScheduler\(\)"),
    ],
)
def test_a_step_of_another_shape_is_a_type_error(scheduler, kwargs, reason):
    with pytest.raises(TypeError, match=reason):
        import_scheduler(scheduler, 8, **kwargs)


def test_a_scheduler_in_the_middle_of_a_chain_is_refused():
    scheduler = schedulers.UniPCMultistepScheduler()
    scheduler.set_timesteps(5)
    x = torch.zeros(1, 1, 2, 2)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="in the middle of a chain"):
        import_scheduler(scheduler)
    assert import_scheduler(scheduler, 5).num_rows == 5


def test_other_threads_see_nothing_of_an_import():
    seen, stop = set(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(type(torch.randn(2)))
            seen.add(torch.overrides._get_current_function_mode())

    thread = threading.Thread(target=watch)
    thread.start()
    import_scheduler(schedulers.UniPCMultistepScheduler(), 20)
    stop.set()
    thread.join()
    assert seen == {torch.Tensor, None}


def test_a_step_that_writes_into_the_sample_is_imported():
    class InPlace(schedulers.DDIMScheduler):
        def step(self, model_output, timestep, sample, eta=0.0):
            result = super().step(model_output, timestep, sample, eta)
            result.prev_sample = sample.copy_(result.prev_sample)
            return result

    ours, theirs = (import_scheduler(c(clip_sample=False), 5, eta=1.0) for c in (InPlace, InPlace.__base__))
    assert np.array_equal(ours.from_x0, theirs.from_x0)
    assert np.array_equal(ours.from_noise, theirs.from_noise)


class Sneaky(schedulers.DDIMScheduler):
    """Its step does not see a basis: only the comparison on numbers can tell that it is not linear."""

    def step(self, model_output, timestep, sample, **kwargs):
        result = super().step(model_output, timestep, sample)
        with torch._C.DisableTorchFunction():
            if type(sample) is torch.Tensor:
                result.prev_sample = self.then(result.prev_sample)
        return result


@pytest.mark.parametrize(
    "then", [lambda x: x.clamp(-100, 100), lambda x: torch.nn.functional.hardshrink(x, 1e-4)]
)
def test_the_comparison_on_numbers_sees_bounds_far_out_and_far_in(then):
    sneaky = Sneaky(clip_sample=False)
    sneaky.then = lambda x: x
    import_scheduler(sneaky, 4)
    sneaky.then = then
    with pytest.raises(ValueError, match="on random numbers it takes another step"):
        import_scheduler(sneaky, 4)


def test_importing_50_rows_takes_less_than_a_second(reports):
    """For every class; a second try where something else took the time."""

    def seconds(name: str) -> float:
        begin = time.thread_time()
        import_scheduler(getattr(schedulers, name)(), 50)
        return time.thread_time() - begin

    coarse = {
        "CMStochasticIterativeScheduler",
        "ConsistencyDecoderScheduler",
        "HeliosScheduler",
        "SCMScheduler",
    }
    names = {name for name, report in reports.items() if report.outcome == "imported"} - coarse
    slow = {name for name in names if seconds(name) > 1.0}
    assert not {name for name in slow if seconds(name) > 1.0}
