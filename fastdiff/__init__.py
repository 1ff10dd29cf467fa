"""fastdiff: a kernel-fused engine for denoising diffusion models.

    import fastdiff as fd

    sampler = fd.Sampler.from_pretrained("digits", solver="ddim", steps=50)
    x = sampler.sample(100, cond={"labels": y}, guidance_scale=2.0)

A checkout's `fastdiff/kernels` is a symbolic link to `kernels/`.
"""

from __future__ import annotations

from importlib.util import find_spec as _find_spec

if _find_spec("fastdiff.kernels") is None:
    raise ImportError(
        "fastdiff/kernels is missing: in a checkout it is a symbolic link to ../kernels, which this file "
        "system or unpacking lost; clone with `git clone -c core.symlinks=true`, or install a wheel"
    )

from fastdiff import adapters, ops
from fastdiff.capture import CaptureReport, explain_capture
from fastdiff.clip import DynamicThreshold
from fastdiff.editing import slerp
from fastdiff.levels import NoiseLevels
from fastdiff.likelihood import BitsPerDim, bits_per_dim
from fastdiff.nn import EMA, UNet
from fastdiff.optimization import Optimization, optimize
from fastdiff.sampler import Moment, Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import compile_table
from fastdiff.spacing import space_timesteps
from fastdiff.table import SamplingTable
from fastdiff.train import Objective

__version__ = "0.1.0"
__all__ = [
    "EMA",
    "RNG_VERSION",
    "BitsPerDim",
    "CaptureReport",
    "DynamicThreshold",
    "Moment",
    "NoiseLevels",
    "NoiseSchedule",
    "Objective",
    "Optimization",
    "Sampler",
    "SamplingTable",
    "UNet",
    "adapters",
    "bits_per_dim",
    "compile_table",
    "explain_capture",
    "ops",
    "optimize",
    "slerp",
    "space_timesteps",
]


def __getattr__(name: str) -> object:
    if name == "RNG_VERSION":  # the noise's bits; imported when asked for, as the kernels import Triton
        from fastdiff.kernels.philox import RNG_VERSION

        return RNG_VERSION
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
