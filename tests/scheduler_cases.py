"""diffusers' schedulers as users configure them, and their own code run on noise that the test holds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import schedulers
from torch.overrides import TorchFunctionMode

from fastdiff.adapters.diffusers import import_scheduler
from fastdiff.table import SamplingTable

SHAPE = (3, 4, 4)

# Their `step` casts the sample to float32 (`sample.to(torch.float32)`), or draws its noise in float32.
ROUNDING = {
    "DPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
}


@dataclass(frozen=True)
class Case:
    """A scheduler, how it is run, and the registers that its table needs."""

    scheduler: str
    registers: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 12
    step_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{k}={v}" for k, v in (*self.arguments.items(), *self.step_kwargs.items())]
        return "-".join([self.scheduler.replace("Scheduler", ""), *said])

    def build(self) -> Any:
        return getattr(schedulers, self.scheduler)(**self.arguments)


def case(scheduler: str, registers: int, steps: int = 12, step: Mapping[str, Any] | None = None, **arguments):
    return Case(f"{scheduler}Scheduler", registers, arguments, steps, step or {})


# a bound that the quantile exceeds in some steps and not in others
THRESHOLDING = dict(thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=1.2)

CASES = [
    case("DDPM", 0),
    case("DDPM", 0, variance_type="fixed_large", clip_sample=False),
    case("DDPM", 0, variance_type="fixed_small_log", clip_sample_range=2.0),
    case("DDPM", 0, variance_type="learned_range"),
    case("DDPM", 0, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
    case("DDPM", 0, prediction_type="sample", beta_schedule="squaredcos_cap_v2", clip_sample=False),
    case("DDPMParallel", 0, timestep_spacing="linspace", steps_offset=1),
    case("DDIM", 0),
    case("DDIM", 0, step={"eta": 1.0}, clip_sample=False),
    case("DDIM", 0, step={"eta": 0.5, "use_clipped_model_output": True}, prediction_type="v_prediction"),
    case("DDIM", 0, set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear"),
    case("DDIMInverse", 0, clip_sample=False),
    case("CogVideoXDDIM", 0),
    case("CogVideoXDPM", 1),
    case("EulerDiscrete", 0),
    case("EulerDiscrete", 0, use_karras_sigmas=True),
    case("EulerDiscrete", 0, use_exponential_sigmas=True),
    case("EulerDiscrete", 0, use_beta_sigmas=True, timestep_spacing="trailing"),
    case("EulerDiscrete", 0, prediction_type="v_prediction", step={"s_churn": 5.0, "s_noise": 1.01}),
    case("EulerAncestralDiscrete", 0, prediction_type="v_prediction"),
    case("HeunDiscrete", 1),
    case("HeunDiscrete", 1, use_karras_sigmas=True, clip_sample=True),
    case("KDPM2Discrete", 1, prediction_type="v_prediction"),
    case("KDPM2AncestralDiscrete", 1, use_karras_sigmas=True),
    case("LMSDiscrete", 3, steps=8),
    case("PNDM", 5),
    case("PNDM", 3, skip_prk_steps=True),
    case("IPNDM", 3),
    case("DPMSolverMultistep", 1),
    case("DPMSolverMultistep", 2, solver_order=3, use_karras_sigmas=True),
    case(
        "DPMSolverMultistep",
        1,
        algorithm_type="sde-dpmsolver++",
        solver_type="heun",
        final_sigmas_type="zero",
    ),
    case("DPMSolverMultistep", 1, variance_type="learned_range", use_lu_lambdas=True),
    case("DPMSolverMultistep", 1, use_flow_sigmas=True, prediction_type="flow_prediction"),
    case("DPMSolverMultistepInverse", 1),
    case("DPMSolverSinglestep", 1),
    case("DPMSolverSinglestep", 2, solver_order=3),
    case("DPMSolverSinglestep", 1, algorithm_type="sde-dpmsolver++"),
    case("UniPCMultistep", 2),
    case("UniPCMultistep", 3, solver_order=3, use_karras_sigmas=True),
    case("UniPCMultistep", 2, predict_x0=False, solver_type="bh1", final_sigmas_type="sigma_min"),
    case("UniPCMultistep", 2, use_flow_sigmas=True, prediction_type="flow_prediction"),
    case("DEISMultistep", 1),
    case("DEISMultistep", 2, solver_order=3, steps=8),
    case("SASolver", 2),
    case("SASolver", 3, predictor_order=3, corrector_order=3),
    case("LCM", 0, steps=6),
    case("TCD", 0, steps=6),
    case("EDMEuler", 0),
    case("EDMDPMSolverMultistep", 1),
    case("FlowMatchEulerDiscrete", 0, shift=3.0),
    case("FlowMatchEulerDiscrete", 0, stochastic_sampling=True),
    case("FlowMatchHeunDiscrete", 1),
    case("FlowMatchLCM", 0),
    case("LTXEulerAncestralRF", 0),
    case("CMStochasticIterative", 0),
    case("UnCLIP", 0, variance_type="learned_range"),
    case("DDIM", 0, step={"eta": 0.5}, **THRESHOLDING),
    case("DDIM", 0, prediction_type="v_prediction", thresholding=True),
    case("DDPM", 0, variance_type="learned_range", **THRESHOLDING),
    case("DPMSolverMultistep", 1, **THRESHOLDING),
    case("DPMSolverMultistep", 1, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **THRESHOLDING),
    case("DPMSolverSinglestep", 1, **THRESHOLDING),
    case("UniPCMultistep", 2, **THRESHOLDING),
    case("DEISMultistep", 1, **THRESHOLDING),
    case("SASolver", 2, **THRESHOLDING),
    case("LCM", 0, steps=6, **THRESHOLDING),
]
CASES = [case for case in CASES if hasattr(schedulers, case.scheduler)]  # older diffusers have fewer


class GivenNoise(TorchFunctionMode):
    """Hands out the noise that a table's rows are to use, row by row.

    Args:
        noise: [rows, ...] float64.
        rounding: False leaves samples and noise in float64 where the code would make them float32.
    """

    def __init__(self, noise: torch.Tensor, rounding: bool) -> None:
        super().__init__()
        self.noise, self.rounding, self.row = noise, rounding, -1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "randn":
            dtype = kwargs.get("dtype") or torch.float32
            return self.noise[self.row].to(dtype if self.rounding else torch.float64)
        if name == "to" and not self.rounding and args[0].dim() and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


def network(u: torch.Tensor, t: Any, learned: bool = False) -> torch.Tensor:
    """Smooth, non-linear and time-dependent; with a learned variance 2C channels."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1)[0]
    out = torch.tanh(0.8 * u.double() + 0.3 * torch.sin(0.01 * t)) + 0.2 * u.double()
    return torch.cat([out, torch.tanh(u.double())], dim=1) if learned else out


def run_original(
    case: Case, table: SamplingTable, x: torch.Tensor, noise: torch.Tensor, rounding: bool
) -> torch.Tensor:
    """The loop that every pipeline of diffusers runs, with a fresh scheduler."""
    scheduler = case.build()
    scheduler.set_timesteps(case.steps)
    times, old = scheduler.timesteps, None
    with GivenNoise(noise, rounding) as given:
        for given.row, t in enumerate(times):
            u = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            kwargs = dict(case.step_kwargs)
            if case.scheduler == "UnCLIPScheduler" and given.row + 1 < len(times):
                kwargs["prev_timestep"] = times[given.row + 1]
            if case.scheduler == "CogVideoXDPMScheduler":
                back = times[given.row - 1] if given.row else None
                x, old = scheduler.step(network(u, t), old, t, back, x, return_dict=False)
                continue
            x = scheduler.step(network(u, t, table.learned), t, x, **kwargs, return_dict=False)[0]
    return x


def imported(case: Case, steps: int | None = None) -> SamplingTable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a self-check says has its own tests
        return import_scheduler(case.build(), steps or case.steps, **case.step_kwargs)


def start(table: SamplingTable, batch: int = 2, shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, ...]:
    """x at the first level and noise [rows, ...], float64 numbers that float32 holds exactly."""
    generator = torch.Generator().manual_seed(1)
    x, *noise = torch.randn((1 + table.num_rows, batch, *shape), generator=generator)
    return (table.init_scale * x).double(), torch.stack(noise).double()


def evaluated(table: SamplingTable, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return table.evaluate(lambda u, t: network(u, t, table.learned), x, noise)
