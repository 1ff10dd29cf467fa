"""Builds and registers norm_op.cpp: group_norm.cpp's loops as one of torch's own operators, with a gradient.

An operator in Python costs about 40 µs a call, and torch's own group_norm and SiLU 13 µs for 64x8x8; this one
takes 6. It is built against torch's headers, which takes a compiler about 12 seconds and 1 GB of memory, in
the background (_library.py).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import cpu
from ._library import Library, sources

_STANDARDS = ("-std=c++20", "-std=c++17")  # newer torch's headers ask for the first


def operator(wait: bool = False) -> Callable[..., torch.Tensor | None] | None:
    """fastdiff::group_norm_silu_direct, which returns None for operands that need the long way.

    Args:
        wait: block until a build that is under way has ended.
    """
    found: Callable[..., torch.Tensor | None] | None = library.get(wait)
    return found


def _options() -> Sequence[Sequence[str]]:
    """The compiler's, for this torch."""
    home = Path(torch.__file__).parent
    include = [f"-I{home / 'include'}", f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
    # what torch it is, which no path need say, is part of the options, and so of the file's name
    version = f'-DTORCH_IS="{torch.__version__}-{torch.version.git_version}"'
    return [["-O1", standard, abi, version, *include, *libraries] for standard in _STANDARDS]


def _loaded(native: ctypes.CDLL) -> Any:
    """The operator, registered with the addresses of the loops."""
    loops = cpu.library(wait=True)
    if loops is None:
        raise OSError("its loops are not there")
    native.fd_register.restype = ctypes.c_char_p
    addresses = (loops.fd_group_norm, loops.fd_group_norm_backward)
    refusal = native.fd_register(*(ctypes.cast(address, ctypes.c_void_p) for address in addresses))
    if refusal is not None:
        raise OSError(refusal.decode())
    return torch.ops.fastdiff.group_norm_silu_direct.default


def _refused(why: str) -> None:
    """It is nothing to worry about: torch's own operators are as fast, but for large images."""
    logging.getLogger("fastdiff").info("fastdiff's operator group_norm_silu could not be built: %s", why)


library = Library("norm", lambda: sources("norm.h", "norm_op.cpp"), _options, _loaded, _refused)
