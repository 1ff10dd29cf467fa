"""Flips and crops: what makes a small data set larger, as functions of (seed, step, sample)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff.train import draws
from fastdiff.train.config import TrainConfig


def shape_after(shape: tuple[int, ...], config: TrainConfig) -> tuple[int, ...]:
    """(C, H, W) of the images that the network sees.

    Raises:
        ValueError: the images are smaller than the crop.
    """
    if config.crop is None:
        return shape
    if min(shape[1:]) < config.crop:
        raise ValueError(
            f"`crop` must be at most the images' size, got {config.crop} for images of"
            f" {'x'.join(map(str, shape[1:]))}; load them with a larger size"
        )
    return (shape[0], config.crop, config.crop)


def augmented(images: Tensor, config: TrainConfig, step: int, ids: np.ndarray) -> Tensor:
    """A window of each image, mirrored for half of them, as the configuration asks.

    Args:
        images: [n, C, H, W], of any dtype.
        config: `flip` and `crop` are read.
        step: the optimisation step.
        ids: [n] int64, the identities of the samples in it; the choice depends on nothing else.
    Returns:
        [n, C, crop, crop] or [n, C, H, W]; `images` itself if nothing is asked for.
    """
    if not config.flip and config.crop is None:
        return images
    channels, height, width = shape_after(tuple(images.shape[1:]), config)
    top = draws.below(config.seed, draws.DOMAIN_TOP, step, ids, images.shape[2] - height + 1)
    left = draws.below(config.seed, draws.DOMAIN_LEFT, step, ids, images.shape[3] - width + 1)
    rows, columns = (top[:, None] + np.arange(height), left[:, None] + np.arange(width))
    if config.flip:
        mirrored = draws.below(config.seed, draws.DOMAIN_FLIP, step, ids, 2).astype(bool)
        columns[mirrored] = columns[mirrored, ::-1]
    place = (
        np.arange(len(ids))[:, None, None, None],
        np.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )
    if images.device.type == "cpu":
        return torch.from_numpy(images.numpy()[place])
    return images[tuple(torch.from_numpy(axis).to(images.device) for axis in place)]
