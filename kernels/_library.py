"""Libraries of this folder's C++ sources: built in the background, kept on disk, loaded once.

FASTDIFF_NATIVE=0      never build or load one
FASTDIFF_CACHE=DIR     where compiled files are kept (_cache.py)
CXX=...                the compiler (default: g++, clang++, c++)
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import _cache

_SECONDS = 180  # the longest that a compiler may take


class Library:
    """One library, or None while it is being built and where it cannot be.

    Args:
        name: the beginning of its file's name.
        text: its source.
        options: the compiler's, in the order in which they are tried, without those of a shared library.
        load: what `get` returns, from the loaded file.
        refused: is told in words why there is none.
        needs: a library that is built first, and without which this one is of no use.
    """

    def __init__(
        self,
        name: str,
        text: Callable[[], str],
        options: Callable[[], Sequence[Sequence[str]]],
        load: Callable[[ctypes.CDLL], Any],
        refused: Callable[[str], None],
        needs: Library | None = None,
    ) -> None:
        self._name, self._text, self._options, self._load, self._refused = name, text, options, load, refused
        self._needs = needs
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loaded: Any = None
        _libraries.add(self)

    def get(self, wait: bool = False) -> Any:
        """What was loaded, or None.

        Args:
            wait: block until a build that is under way has ended.
        """
        if self._loaded is not None:
            return self._loaded
        if os.environ.get("FASTDIFF_NATIVE") == "0":
            return None
        with self._lock:
            if self._thread is None:
                # looked for before the thread begins, for what that imports: a child that is forked while
                # another thread imports a module waits for its end forever
                is_cached = self._is_cached()
                # a daemon: a process that ends before its compiler does not wait for it
                self._thread = threading.Thread(target=self.load, name="fastdiff-build", daemon=True)
                self._thread.start()
                wait = wait or is_cached  # loading takes milliseconds
        if wait:
            self._thread.join()
        return self._loaded

    def is_coming(self) -> bool:
        """Whether it is being built, or nobody has asked for it yet."""
        if self._loaded is not None or os.environ.get("FASTDIFF_NATIVE") == "0":
            return False
        return self._thread is None or self._thread.is_alive()

    def forget(self) -> None:
        """In a child, which has none of its parent's threads: a build that was under way is started anew."""
        self._thread, self._lock = None, threading.Lock()

    def load(self) -> None:
        """Build where there is no file, and load it; say why not where it cannot be."""
        if self._needs is not None and self._needs.get(wait=True) is None:
            self._refused(f"what it needs, {self._needs._name}, is not there")
            return
        compiler = _cache.compiler()
        path = self.file(compiler)
        if compiler is None or path is None:
            self._refused("no C++ compiler found; install g++")
            return
        try:
            if not _cache.intact(path):
                with _cache.alone(path):
                    if not _cache.intact(path):  # another process may have built it meanwhile
                        self._build(compiler, path)
            self._loaded = self._load(ctypes.CDLL(str(path)))
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            self._refused(str(error))
            return
        _cache.used(path)

    def file(self, compiler: list[str] | None) -> Path | None:
        """Where the compiled file for this source, compiler and processor lies."""
        if compiler is None:
            return None
        machine = (platform.machine(), _cache.processor(), repr(self._options()))
        name = _cache.digest(self._text(), *compiler, *machine)
        return _cache.folder() / f"{self._name}-{name}.so"

    def _is_cached(self) -> bool:
        """Whether there is something to load."""
        if self._needs is not None and not self._needs._is_cached():
            return False
        path = self.file(_cache.compiler())
        return path is not None and path.exists()

    def _build(self, compiler: list[str], path: Path) -> None:
        """Compile into `path`, atomically, mode 0600, with its digest beside it."""
        with _cache.building(path.parent) as folder:
            source, target = (folder / f"{self._name}{end}" for end in (".cpp", ".so"))
            source.write_text(self._text())
            for options in self._options():
                command = [*compiler, "-shared", "-fPIC", str(source), *options, "-o", str(target)]
                result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
                if result.returncode == 0 and target.exists():
                    _cache.keep(target, path)
                    return
        raise OSError(f"{' '.join(command)} failed: {result.stderr.strip()[:500]}")


_libraries: weakref.WeakSet[Library] = weakref.WeakSet()


def _after_fork() -> None:
    for library in _libraries:
        library.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def sources(*names: str) -> str:
    """Files of this folder, one behind the other."""
    return "\n".join(Path(__file__).with_name(name).read_text() for name in names)
