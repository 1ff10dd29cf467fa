"""The fused CPU kernels, this folder's C++ sources, where a C++ compiler is there.

The build takes about six seconds, runs in the background and is kept on disk (_library.py), so that no image
waits for it: until it is there, and where there is no compiler, callers use NumPy and torch, whose results
are the same to the last bit.
"""

from __future__ import annotations

import ctypes
import logging

import torch

from ._cpp_constants import constants
from ._library import Library, sources

_SOURCES = (
    "loops.h", "philox.cpp", "cpu.cpp", "vlb.cpp", "reverse_step.cpp", "lanes.h", "group_norm.cpp"
)  # fmt: skip
_OPS = [
    "normal",
    "q_sample",
    "denoising_loss",
    "vlb_terms",
    "reverse_step",
    "threshold",
    "group_norm",
    "group_norm_backward",
]
# exact arithmetic first
_EXACT = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# then the widest vectors that the machine has (512 bits: 1.3x over the compiler's own choice on an AVX-512
# Xeon); what a given compiler may not know is left out step by step
_TUNINGS = [
    ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
    ["-march=native", "-fopenmp"],
    ["-mcpu=native", "-fopenmp"],
    ["-march=native"],
    [],
]


def library(wait: bool = False) -> ctypes.CDLL | None:
    """The compiled kernels, or None while they are being built and where they cannot be.

    Args:
        wait: block until a build that is under way has ended.
    """
    loaded: ctypes.CDLL | None = kernels.get(wait)
    return loaded


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """A tensor's address as a C argument; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _loaded(native: ctypes.CDLL) -> ctypes.CDLL:
    for name in _OPS:
        getattr(native, f"fd_{name}").restype = None
    return native


def _refused(why: str) -> None:
    logging.getLogger("fastdiff").warning(
        "fastdiff's CPU kernels could not be built, NumPy is used instead, which draws noise about 4x slower "
        "than torch.randn: %s",
        why,
    )


kernels = Library(
    "cpu",
    lambda: constants() + sources(*_SOURCES),
    lambda: [[*_EXACT, *tuning] for tuning in _TUNINGS],
    _loaded,
    _refused,
)
