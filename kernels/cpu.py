"""Builds and loads kernels/cpu.cpp: the fused CPU kernels, where a C++ compiler is there.

The build takes about a second, runs in the background and is kept on disk, so that no image waits for it:
until it is there, and where there is no compiler, callers use NumPy and torch, whose results are the same to
the last bit.

    FASTDIFF_NATIVE=0      never build or load it
    FASTDIFF_CACHE=DIR     where compiled files are kept (default: fastdiff in $XDG_CACHE_HOME or ~/.cache)
    CXX=...                the compiler (default: g++, clang++, c++)
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("cpu.cpp")
_FUNCTIONS = ("fd_normal", "fd_q_sample", "fd_denoising_loss", "fd_reverse_step")
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
            _thread = threading.Thread(target=_load, name="fastdiff-build")
            _thread.start()
            if cached := _cache_file(_compiler()):
                wait = wait or cached.exists()  # loading takes a millisecond
    if wait:
        _thread.join()
    return _library


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """A tensor's address as a C argument; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _compiler() -> list[str] | None:
    """The command that compiles C++, or None."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    return [found] if found else None


def _load() -> None:
    """Set `_library`; say in one line why not, where it cannot be."""
    global _library
    compiler = _compiler()
    path = _cache_file(compiler)
    if compiler is None or path is None:
        _log.warning(
            "no C++ compiler found: fastdiff draws noise with NumPy, about 4x slower than torch.randn; "
            "install g++"
        )
        return
    try:
        if not _intact(path):
            _build(compiler, path)
        loaded = ctypes.CDLL(str(path))
        for name in _FUNCTIONS:
            getattr(loaded, name).restype = None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        _log.warning("fastdiff's CPU kernels could not be built, NumPy is used instead: %s", error)
        return
    _library = loaded


def _intact(path: Path) -> bool:
    """Whether `path` holds what was once written there: a damaged library would end the process when it runs.

    Raises:
        OSError: the file belongs to another user, whose code is not run.
    """
    try:
        content, digest = path.read_bytes(), _digest_file(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        raise OSError(f"{path} belongs to another user; remove it or set FASTDIFF_CACHE")
    return hashlib.sha256(content).hexdigest() == digest


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _build(compiler: list[str], path: Path) -> None:
    """Compile into `path`, atomically, mode 0600, with its digest beside it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, target, digest = (Path(folder, name) for name in ("cpu.cpp", "cpu.so", "cpu.sha256"))
        source.write_text(_constants() + _SOURCE.read_text())
        for tuning in _TUNINGS:
            command = [*compiler, *_EXACT, *tuning, "-shared", "-fPIC", str(source), "-o", str(target)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if result.returncode == 0 and target.exists():
                digest.write_text(hashlib.sha256(target.read_bytes()).hexdigest())
                for made, kept in ((target, path), (digest, _digest_file(path))):
                    made.chmod(0o600)
                    os.replace(made, kept)
                return
    raise OSError(f"{' '.join(command)} failed: {result.stderr.strip()[:500]}")


def _cache_file(compiler: list[str] | None) -> Path | None:
    """Where the compiled file for this source, compiler and processor lies."""
    if compiler is None:
        return None
    key = [
        _SOURCE.read_text(),
        _constants(),
        *compiler,
        platform.machine(),
        _processor(),
        repr((_EXACT, _TUNINGS)),
    ]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("FASTDIFF_CACHE") or os.path.join(home, "fastdiff"))
    return folder / f"cpu-{digest}.so"


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _constants() -> str:
    """The C++ of what the Python modules define, floats as exact hexadecimal literals."""
    from . import _philox_numpy, exact, layout, philox

    names = {
        _philox_numpy: "ROUNDS MULTIPLIERS KEY_STEPS LOG COS SIN LOG_EXPONENT MANTISSA_BASE EXPONENT_MASK",
        philox: "DOMAIN_STEP DOMAIN_TRAIN",
        exact: "EXP EXP_LO EXP_HI LOG2E LN2_HI LN2_LO ROUNDER",
        layout: "DRAW READS WRITES PLAN_WIDTH HEAD C_IN_NEXT X0_FROM_X X0_FROM_OUT CLIP_LO CLIP_HI "
        "LOG_VAR_MIN LOG_VAR_MAX MAX_REGISTERS READS_OUT READS_X0 READS_NOISE READS_LEARNED READS_CLIP "
        "WRITES_U",
    }
    lines = [_constant(name, getattr(m, name)) for m, listed in names.items() for name in listed.split()]
    return "#include <cstdint>\n" + "\n".join(lines) + "\n"


def _constant(name: str, value: Any) -> str:
    """One C++ definition of a number or of a tuple of numbers."""
    values = value if isinstance(value, tuple) else (value,)
    if isinstance(values[0], float):
        kind, literals = "float", [v.hex() + "f" for v in values]
    elif max(values) < 2**31:
        kind, literals = "int", [str(v) for v in values]
    else:
        kind, literals = "unsigned", [f"{v}u" for v in values]
    if isinstance(value, tuple):
        return f"constexpr {kind} {name}[] = {{{', '.join(literals)}}};"
    return f"constexpr {kind} {name} = {literals[0]};"
