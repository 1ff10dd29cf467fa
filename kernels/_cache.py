"""Compiled files on disk: written whole, readable by their owner alone, checked before they are loaded.

FASTDIFF_CACHE=DIR     where they are kept (default: fastdiff in $XDG_CACHE_HOME or ~/.cache)
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_UNUSED = 30 * 86400  # seconds after which a file that nobody has loaded is removed
_ABANDONED = 3600  # and one that a killed build left


def folder() -> Path:
    """FASTDIFF_CACHE, or the user's cache; where there is no home, a temporary folder of the user's."""
    if chosen := os.environ.get("FASTDIFF_CACHE"):
        return Path(chosen)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache, "fastdiff")
    home = os.path.expanduser("~")
    if home != "~":
        return Path(home, ".cache", "fastdiff")
    return Path(tempfile.gettempdir(), f"fastdiff-{os.getuid()}")


def digest(*parts: str) -> str:
    """A file name's part that differs where any of the parts does."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def compiler() -> list[str] | None:
    """The command that compiles C++ (CXX, or g++, clang++, c++), or None."""
    if chosen := os.environ.get("CXX"):
        try:
            return shlex.split(chosen)
        except ValueError:  # an open quotation mark: one word, which then fails with its name
            return [chosen]
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    return [found] if found else None


def processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def free_memory() -> float:
    """Bytes that Linux says are free, in this process's control group too; infinite where nobody says."""
    found, group = [math.inf], Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        found.append(1024 * _numbers(Path("/proc/meminfo")).get("MemAvailable:", math.inf))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = float((group / "memory.max").read_text())
        found.append(limit - _numbers(group / "memory.stat").get("anon", 0.0))  # the rest is cache
    return min(found)


def _numbers(path: Path) -> dict[str, float]:
    """name -> number of a file of Linux's that has one of each in a line."""
    return {name: float(number) for name, number, *_ in map(str.split, path.read_text().splitlines())}


def digest_file(path: Path) -> Path:
    """Where the digest of a file lies."""
    return path.with_suffix(".sha256")


def intact(path: Path) -> bool:
    """Whether `path` holds what was once written there: damaged code would end the process when it runs.

    Raises:
        OSError: the file belongs to another user, whose code is not run.
    """
    try:
        content, written = path.read_bytes(), digest_file(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        raise OSError(f"{path} belongs to another user; remove it or set FASTDIFF_CACHE")
    return hashlib.sha256(content).hexdigest() == written


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the system has such locks: who comes later finds `path` built."""
    if fcntl is None:
        yield
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("w") as file:
        lock.chmod(0o600)
        with contextlib.suppress(OSError):  # a file system without locks: both build, and the last one stays
            fcntl.lockf(file, fcntl.LOCK_EX)  # not flock, whose lock a forked child would hold with us
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits for this file has it open


@contextlib.contextmanager
def building(cache: Path) -> Iterator[Path]:
    """A folder in the cache to build in, removed afterwards; what is old is swept first."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    sweep(cache)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as made:
        yield Path(made)


def keep(made: Path, path: Path) -> None:
    """Put a file that was built into its place, atomically, mode 0600, with its digest beside it."""
    written = digest_file(made)
    written.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
    for source, target in ((made, path), (written, digest_file(path))):
        source.chmod(0o600)
        os.replace(source, target)


def used(path: Path) -> None:
    """Keep a file that was loaded, and its digest, from the next sweep."""
    with contextlib.suppress(OSError):  # a cache that is only read from is never swept either
        for part in (path, digest_file(path)):
            os.utime(part)


def sweep(cache: Path) -> None:
    """Remove what killed builds left, and compiled files that nobody has loaded for a month."""
    for kind, age in (("build", _ABANDONED), ("cpu", _UNUSED), ("torch", _UNUSED), ("step", _UNUSED)):
        for old in cache.glob(f"{kind}-*"):
            with contextlib.suppress(OSError):  # another process sweeps as well
                if time.time() - old.stat().st_mtime > age:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
