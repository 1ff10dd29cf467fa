"""Files as arrays: a page of one is read when it is needed and dropped when memory is."""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
from pathlib import Path
from typing import Literal

import numpy as np

# Linux sets memory aside for every page that may be changed, whether or not it ever is, and refuses a file
# that is larger than memory and swap; not with this flag, which Python's module names from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0
_REMEDIES = {
    errno.ENOMEM: "raise the process's limits on memory (`ulimit -v`, `ulimit -d`; with"
    " vm.overcommit_memory=2 the system's), or use fewer pictures",
    errno.ENODEV: "its file system maps no files: copy it to another disk",
}


def mapped(
    path: Path,
    dtype: np.dtype,
    shape: tuple[int, ...],
    offset: int = 0,
    order: Literal["C", "F"] = "C",
) -> np.ndarray:
    """The array that lies in a file from byte `offset` on; what is changed in it never reaches the file.

    Raises:
        ValueError: the file is too short, or the system cannot map it.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    with open(path, "rb") as file:
        held = os.fstat(file.fileno()).st_size
        if held < offset + size:
            raise ValueError(
                f"the file {str(path)!r} must hold {offset + size} bytes, got {held}: it was cut off; remove"
                " it or write it again"
            )
        skipped = offset % mmap.ALLOCATIONGRANULARITY
        try:
            pages = _pages(file.fileno(), skipped + size, offset - skipped)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "copy it to another disk")
            raise ValueError(
                f"the file {str(path)!r} of {held / 1e9:.3g} GB cannot be mapped into memory"
                f" ({error.strerror}): {remedy}"
            ) from error
    return np.ndarray(shape, dtype, pages, skipped, order=order)


def _pages(handle: int, length: int, offset: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(handle, length, access=mmap.ACCESS_COPY, offset=offset)
    flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(handle, length, flags, protection, offset=offset)
