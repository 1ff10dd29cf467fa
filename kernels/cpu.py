"""Builds and loads the fused CPU kernels, this folder's C++ sources, where a C++ compiler is there.

The build takes about five seconds, runs in the background and is kept on disk, so that no image waits for it:
until it is there, and where there is no compiler, callers use NumPy and torch, whose results are the same to
the last bit.

    FASTDIFF_NATIVE=0      never build or load it
    FASTDIFF_CACHE=DIR     where compiled files are kept (_cache.py)
    CXX=...                the compiler (default: g++, clang++, c++)
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import subprocess
import threading
from pathlib import Path

import torch

from . import _cache
from ._cpp_constants import constants

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp") for name in ("philox", "cpu", "vlb", "reverse_step", "group_norm")
)
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
_lock = threading.Lock()
_thread: threading.Thread | None = None
_library: ctypes.CDLL | None = None
_log = logging.getLogger("fastdiff")


def library(wait: bool = False) -> ctypes.CDLL | None:
    """The compiled kernels, or None while they are being built and where they cannot be.

    Args:
        wait: block until a build that is under way has ended.
    """
    global _thread
    if _library is not None:
        return _library
    if os.environ.get("FASTDIFF_NATIVE") == "0":
        return None
    with _lock:
        if _thread is None:
            # a daemon: a process that ends before its compiler does not wait for it
            _thread = threading.Thread(target=_load, name="fastdiff-build", daemon=True)
            _thread.start()
            wait = wait or _is_cached()  # loading takes milliseconds
    if wait:
        _thread.join()
    return _library


def _after_fork() -> None:
    """A child has none of its parent's threads: a build that was under way is started anew."""
    global _thread, _lock
    _thread, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """A tensor's address as a C argument; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _load() -> None:
    """Set `_library`; say in one line why not, where it cannot be."""
    global _library
    compiler = _cache.compiler()
    path = _cache_file(compiler)
    if compiler is None or path is None:
        _log.warning(
            "no C++ compiler found: fastdiff draws noise with NumPy, about 4x slower than torch.randn; "
            "install g++"
        )
        return
    try:
        if not _cache.intact(path):
            _build(compiler, path)
        loaded = ctypes.CDLL(str(path))
        for name in _OPS:
            getattr(loaded, f"fd_{name}").restype = None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        _log.warning("fastdiff's CPU kernels could not be built, NumPy is used instead: %s", error)
        return
    _library = loaded
    _cache.used(path)


def _build(compiler: list[str], path: Path) -> None:
    """Compile into `path`, atomically, mode 0600, with its digest beside it."""
    with _cache.building(path.parent) as folder:
        source, target = (folder / name for name in ("cpu.cpp", "cpu.so"))
        source.write_text(constants() + _text())
        for tuning in _TUNINGS:
            command = [*compiler, *_EXACT, *tuning, "-shared", "-fPIC", str(source), "-o", str(target)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if result.returncode == 0 and target.exists():
                _cache.keep(target, path)
                return
    raise OSError(f"{' '.join(command)} failed: {result.stderr.strip()[:500]}")


def _is_cached() -> bool:
    """Whether there is something to load."""
    path = _cache_file(_cache.compiler())
    return path is not None and path.exists()


def _cache_file(compiler: list[str] | None) -> Path | None:
    """Where the compiled file for this source, compiler and processor lies."""
    if compiler is None:
        return None
    machine = (platform.machine(), _cache.processor(), repr((_EXACT, _TUNINGS)))
    name = _cache.digest(_text(), constants(), *compiler, *machine)
    return _cache.folder() / f"cpu-{name}.so"


def _text() -> str:
    """The kernels' C++, one source behind the other."""
    return "\n".join(source.read_text() for source in _SOURCES)
