"""Decoded pictures as one run of bytes, in memory or in a mapped file: decoded once, read many times."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.files import atomic_path, read_json, write_json
from fastdiff.train.mapped import mapped

_FORMAT = 1


class Pixels:
    """Pictures of one size, appended one by one; grey until the first coloured one makes all of them RGB.

    Args:
        file: open for reading and writing, empty.
        count: how many pictures there will be at most.
        most: how many bytes they may take, or None.
    """

    def __init__(self, file: Any, count: int, most: int | None) -> None:
        self._file, self._count, self._most = file, count, most
        self._channels, self._size, self.length = 1, (0, 0), 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W] of what has been appended."""
        return (self.length, self._channels, *self._size)

    def append(self, picture: np.ndarray) -> None:
        """Add a picture, uint8 [H, W] or [H, W, 3].

        Raises:
            ValueError: all of them would take too much memory.
        """
        self._size = picture.shape[0], picture.shape[1]
        channels = 3 if picture.ndim == 3 else self._channels
        needed = self._count * channels * self._size[0] * self._size[1]
        if self._most is not None and needed > self._most:
            raise ValueError(
                f"`cache` must name a folder for pictures that take {needed / 1e9:.3g} GB decoded, more than"
                " half of this machine's memory; give cache=FOLDER on a disk with room for them, or a smaller"
                " `size`"
            )
        if channels > self._channels:
            self._widen()
        planes = picture.transpose(2, 0, 1) if picture.ndim == 3 else picture[None]
        self._file.write(np.ascontiguousarray(np.broadcast_to(planes, (self._channels, *self._size))))
        self.length += 1

    def _widen(self) -> None:
        """Grey to RGB in place, the last picture first, so that none is overwritten before it is read."""
        plane = self._size[0] * self._size[1]
        for i in reversed(range(self.length)):
            self._file.seek(i * plane)
            grey = self._file.read(plane)
            self._file.seek(3 * i * plane)
            self._file.write(grey * 3)
        self._file.seek(0, os.SEEK_END)
        self._channels = 3


def decoded(
    fill: Callable[[Pixels], list[str]],
    files: Sequence[Path],
    options: Sequence[Any],
    cache: Path | None,
    most: int | None,
) -> tuple[np.ndarray, list[str]]:
    """The pictures [N, C, H, W] uint8 that `fill` appends, and what it returns: why each file is bad, or "".

    With `cache` they lie in a file there, named by paths, sizes and times of the files and by the options,
    and are mapped into memory copy-on-write: pages come from the disk when they are read and go when memory
    is needed. A later call with the same files takes them from there.

    Args:
        fill: decodes and appends; an exception of it leaves nothing behind.
        files: what is decoded.
        options: how, as JSON data.
        cache: a folder, made if need be; None: in memory.
        most: without `cache`, how many bytes the pictures may take.
    """
    if cache is None:
        memory = io.BytesIO()
        pixels = Pixels(memory, len(files), most)
        reasons = fill(pixels)
        if not pixels.length:
            return np.empty(pixels.shape, np.uint8), reasons
        return np.frombuffer(memory.getbuffer(), np.uint8).reshape(pixels.shape), reasons
    digest = hashlib.sha256(json.dumps([_FORMAT, *options]).encode())
    for path in files:
        digest.update(f"{path.absolute()}\0{_stamp(path)}\0".encode(errors="surrogateescape"))
    data, about = (cache / f"pictures-{digest.hexdigest()[:24]}{suffix}" for suffix in (".bytes", ".json"))
    if not (data.exists() and about.exists()):
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(data))
            file = stack.enter_context(open(temporary, "w+b"))
            pixels = Pixels(file, len(files), None)
            reasons = fill(pixels)
            file.flush()
        write_json(
            about, {"shape": pixels.shape, "reasons": reasons}
        )  # after the data: it says they are whole
    found = read_json(about)
    shape = tuple(found["shape"])
    if not all(shape):
        return np.empty(shape, np.uint8), found["reasons"]
    return mapped(data, np.dtype(np.uint8), shape), found["reasons"]


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:  # a link to nowhere, say: it will be among the bad ones
        return "none"
    return f"{found.st_size} {found.st_mtime_ns}"


def half_of_memory() -> int | None:
    """Half of this machine's memory in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None
