"""Libraries of this folder's C++ sources: built in the background (_compile.py), kept on disk, loaded once.

FASTDIFF_NATIVE=0      never build or load one
FASTDIFF_CACHE=DIR     where compiled files are kept (_cache.py)
CXX=...                the compiler (default: g++, clang++, c++)
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import _cache


class Library:
    """One library, or None while it is being built and where it cannot be.

    Args:
        name: the beginning of its file's name.
        text: its source.
        options: the compiler's, in the order in which they are tried, without those of a shared library.
        load: what `get` returns, from the loaded file.
        refused: is told in words why there is none.
        needs: a library without which this one is of no use.
        memory: bytes that its compiler takes; with less than twice that free it is not started.
    """

    def __init__(
        self,
        name: str,
        text: Callable[[], str],
        options: Callable[[], Sequence[Sequence[str]]],
        load: Callable[[ctypes.CDLL], Any],
        refused: Callable[[str], None],
        needs: Library | None = None,
        memory: int = 0,
    ) -> None:
        self._name, self._text, self._options, self._load, self._refused = name, text, options, load, refused
        self._needs, self._memory = needs, memory
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.loaded: Any = None
        _libraries.add(self)

    def get(self, wait: bool = False) -> Any:
        """What was loaded, or None.

        Args:
            wait: block until a build that is under way has ended.
        """
        if self.loaded is not None:
            return self.loaded
        if os.environ.get("FASTDIFF_NATIVE") == "0":
            return None
        with self._lock:
            if self._thread is None:
                # The builder is started here, as a short program would end before the thread does so; and
                # what that imports is imported here, as a child that is forked while another thread imports
                # a module waits for its end forever.
                path, builder = self._begun()
                # a daemon: a process that ends before its compiler does not wait for it
                self._thread = threading.Thread(
                    target=self._end, args=(path, builder), name="fastdiff-build", daemon=True
                )
                self._thread.start()
                wait = wait or builder is None  # loading takes milliseconds
        if wait:
            self._thread.join()
        return self.loaded

    def is_coming(self) -> bool:
        """Whether it is being built, or nobody has asked for it yet."""
        if self.loaded is not None or os.environ.get("FASTDIFF_NATIVE") == "0":
            return False
        return self._thread is None or self._thread.is_alive()

    def forget(self) -> None:
        """In a child, which has none of its parent's threads: a build that was under way is started anew."""
        self._thread, self._lock = None, threading.Lock()

    def _begun(self) -> tuple[Path | None, subprocess.Popen[str] | None]:
        """Where the file is or will be, None where it cannot, and the process that builds it, if one must."""
        try:
            if self._needs is not None:
                self._needs.get()
            compiler = _cache.compiler()
            path = self.file(compiler)
            if compiler is None or path is None:
                raise OSError("no C++ compiler found; install g++")
            return path, None if _cache.intact(path) else self._building(compiler, path)
        except (OSError, subprocess.SubprocessError) as error:
            self._refused(str(error))
            return None, None

    def _building(self, compiler: list[str], path: Path) -> subprocess.Popen[str]:
        """A process that compiles into `path`, and ends when that is done, whenever this one does."""
        if _cache.free_memory() < 2 * self._memory:  # the system might end somebody else's process for it
            raise OSError(
                f"its compiler takes {self._memory / 1e9:.1f} GB of memory, and twice that is not free"
            )
        asked = dict(name=self._name, path=str(path), compiler=compiler, text=self._text())
        builder = [sys.executable, "-I", str(Path(__file__).with_name("_compile.py"))]
        with tempfile.TemporaryFile("w+") as file:  # a pipe would have to be filled before this process ends
            json.dump({**asked, "options": self._options()}, file)
            file.seek(0)
            return subprocess.Popen(
                builder, stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip

    def _end(self, path: Path | None, builder: subprocess.Popen[str] | None) -> None:
        """Wait for the file, and load it; say why not where it cannot be."""
        if path is None:
            return
        try:
            if self._needs is not None and self._needs.get(wait=True) is None:
                raise OSError(f"what it needs, {self._needs._name}, is not there")
            if builder is not None:
                _, said = builder.communicate()
                if builder.returncode != 0:
                    raise OSError(said.strip()[-600:] or f"the builder ended with {builder.returncode}")
            self.loaded = self._load(ctypes.CDLL(str(path)))
        except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
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


_libraries: weakref.WeakSet[Library] = weakref.WeakSet()


def _after_fork() -> None:
    for library in _libraries:
        library.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def sources(*names: str) -> str:
    """Files of this folder, one behind the other."""
    return "\n".join(Path(__file__).with_name(name).read_text() for name in names)
