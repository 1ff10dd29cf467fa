"""Builds and registers torch_ops.cpp: the CPU's loops as operators of torch's own kind, with their gradients.

An operator in Python costs about 40 µs a call and 100 more with a gradient, and torch's own group_norm and
SiLU 10 to 13 µs for 64x8x8; with one of these it is 9. They are built against torch's headers, which takes a
compiler about 13 seconds and 1 GB of memory, in the background (_library.py).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cpu
from ._library import Library, sources

_SOURCES = ("loops.h", "torch_ops.h", "norm_op.cpp", "loss_op.cpp", "torch_ops.cpp")
_LOOPS = ("fd_group_norm", "fd_group_norm_backward", "fd_blocks", "fd_denoising_loss")
_STANDARDS = ("-std=c++20", "-std=c++17")  # newer torch's headers ask for the first


class Operators(NamedTuple):
    """fastdiff::<name>_direct: each returns None for operands that need the long way."""

    group_norm_silu: Any
    denoising_loss: Any


def operators(wait: bool = False) -> Operators | None:
    """The operators, or None while they are being built and where they cannot be.

    Args:
        wait: block until a build that is under way has ended.
    """
    found: Operators | None = library.get(wait)
    return found


def _options() -> Sequence[Sequence[str]]:
    """The compiler's, for this torch."""
    home = Path(torch.__file__).parent
    include = [f"-I{home / 'include'}", f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
    # what torch it is, which no path need say, is part of the options, and so of the file's name
    version = f'-DTORCH_IS="{torch.__version__}-{getattr(torch.version, "git_version", "")}"'
    return [["-O1", standard, abi, version, *include, *libraries] for standard in _STANDARDS]


def _loaded(native: ctypes.CDLL) -> Operators:
    """The operators, registered with the addresses of the loops."""
    loops = cpu.library()
    native.fd_register.restype = ctypes.c_char_p
    refusal = native.fd_register(*(ctypes.cast(getattr(loops, name), ctypes.c_void_p) for name in _LOOPS))
    if refusal is not None:
        raise OSError(refusal.decode())
    own = torch.ops.fastdiff
    # `_op`: without the layer of Python that torch puts around it
    return Operators(*(getattr(own, f"{name}_direct").default._op for name in Operators._fields))


def _refused(why: str) -> None:
    """It is nothing to worry about: the operators in Python give the same."""
    logging.getLogger("fastdiff").info("fastdiff's operators could not be built for this torch: %s", why)


library = Library(
    "torch", lambda: sources(*_SOURCES), _options, _loaded, _refused, needs=cpu.kernels, memory=10**9
)
