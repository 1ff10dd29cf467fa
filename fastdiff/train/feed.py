"""Batches, cut into the parts that one process computes, and made ready while the device is still busy."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.train import draws
from fastdiff.train.augment import augmented
from fastdiff.train.config import TrainConfig
from fastdiff.train.data import ImageData, as_images

# Data sets up to this size move to a GPU at once; larger ones go batch by batch.
_RESIDENT_BYTES = 4 << 30


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a step's batch.

    Attributes:
        ids: [n] int64, the places of its samples in the batch, which are the samples' identities in the step:
            noise, times, flips and crops depend on them, so that no cut changes these.
        stored: [n, C, H, W] as `ImageData` stores them, augmented; `x0` gives them in [-1, 1].
        labels: [n] int64, -1 where dropped; or None.
    """

    ids: np.ndarray
    stored: Tensor
    labels: Tensor | None

    @property
    def x0(self) -> Tensor:
        """[n, C, H, W] float32 in [-1, 1]."""
        return as_images(self.stored)


def cut(batch_size: int, parts: int, rank: int = 0, size: int = 1) -> list[np.ndarray]:
    """The places 0..batch_size-1 in size * parts runs as equal as can be; those of one rank."""
    return np.array_split(np.arange(batch_size), size * parts)[rank * parts : (rank + 1) * parts]


class Feed:
    """The parts of step after step, prepared ahead by a thread; at most `config.prefetch` steps are kept.

    The thread only gathers, cuts and copies (NumPy and copies to the device release the interpreter's lock).
    Where the whole data set lies on a GPU there is nothing to prepare, and there is no thread.

    Attributes:
        waited: seconds for which `next_parts` waited or worked.
    """

    def __init__(
        self, data: ImageData, config: TrainConfig, cuts: list[np.ndarray], device: torch.device, step: int
    ) -> None:
        if device.type != "cpu" and data.images.nbytes <= _RESIDENT_BYTES:
            data = data.to(device)
        self._data, self._config, self._cuts, self._device = data, config, cuts, device
        self._batches = draws.Batches(len(data), config.batch_size, config.seed)
        self._made = self._make(step)
        self.waited = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if config.prefetch and data.images.device.type == "cpu":
            self._queue: queue.Queue[list[Part] | Exception | None] = queue.Queue(config.prefetch)
            self._thread = threading.Thread(target=self._work, name="fastdiff-feed", daemon=True)
            self._thread.start()

    def next_parts(self) -> list[Part]:
        """The parts of the next step, in order.

        Raises:
            Exception: what went wrong in the thread.
        """
        start = time.perf_counter()
        got = next(self._made) if self._thread is None else self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(got, Exception):
            raise got
        assert got is not None  # None is what `close` leaves behind
        return got

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():
                try:
                    self._queue.get_nowait()
                except queue.Empty:
                    self._thread.join(0.01)

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread is on GPU 0, and pinning takes memory there
        try:
            for parts in self._made:
                self._queue.put(parts)
                if self._stop.is_set():
                    return
        except Exception as error:  # raised again where the step waits
            self._queue.put(error)

    def _make(self, step: int) -> Iterator[list[Part]]:
        config = self._config
        while step < config.steps:
            index, parts = self._batches.index(step), []
            for ids in self._cuts:
                stored, labels = self._data.rows(index[ids])
                stored = augmented(stored, config, step, ids)
                if labels is not None:
                    drop = draws.dropped(config.seed, step, ids, config.label_dropout)
                    labels = self._sent(labels.masked_fill(torch.from_numpy(drop).to(labels.device), -1))
                parts.append(Part(ids, self._sent(stored), labels))
            yield parts
            step += 1

    def _sent(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._device or self._device.type == "cpu":
            return tensor
        if self._device.type == "cuda":  # a copy from pinned memory goes on beside the step
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)
