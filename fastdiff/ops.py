"""The public operators over `fastdiff.kernels`: arguments checked before anything runs.

CUDA tensors go to the Triton kernels, all others to the torch implementations (on the CPU a compiled loop
where a C++ compiler is there; same bits). FASTDIFF_BACKEND=torch|triton chooses for every device instead;
nothing else changes the choice silently.

The kernels are opaque to torch.compile and to export: `torch.ops.fastdiff.*` are plain `torch.library`
operators with fake implementations (fastdiff/_dispatch.py). Triton is imported at the first call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastdiff._arguments import integers, noise_key
from fastdiff._losses import denoising_loss, q_sample, vlb_terms
from fastdiff._norm import group_norm_silu
from fastdiff._step import advance, reverse_step

__all__ = [
    "advance",
    "denoising_loss",
    "group_norm_silu",
    "noise_key",
    "normal",
    "q_sample",
    "reverse_step",
    "vlb_terms",
]


def normal(
    shape: Sequence[int],
    seed: int | torch.Tensor,
    sample_ids: Sequence[int] | torch.Tensor | int,
    draw: int | torch.Tensor,
    domain: int = 1,
    device: Any = None,
) -> torch.Tensor:
    """Standard normals that depend on nothing but (seed, sample_id, draw, domain, element).

        z[b, i] = Box-Muller of Philox4x32-10(key = seed, counter = (i // 4, draw, sample_ids[b], domain))

    Args:
        shape: shape of one sample, without the batch.
        seed: 64 bits, for all samples or [B].
        sample_ids: [B] identities in [0, 2^32), or B for 0..B-1.
        draw: which draw of a sample this is, for all samples or [B]; the row of the table in a chain.
        domain: 0 initial noise, 1 reverse step, 2 training.
        device: where the result lies; the device of `sample_ids` if that is a tensor, else the CPU.

    Returns:
        [B, *shape] float32, bit-identical on every backend of one `RNG_VERSION`.

    Raises:
        ValueError: seed, sample id, draw or domain out of range.
    """
    if not 0 <= domain < 2**32:
        raise ValueError(f"`domain` must be in [0, 2^32), got {domain}")
    if device is None and isinstance(sample_ids, torch.Tensor):
        device = sample_ids.device
    key, ids = noise_key(seed, sample_ids, None, device)
    draws = integers("draw", draw, ids.shape[0], ids.device)
    return torch.ops.fastdiff.normal(key, ids, draws, domain, math.prod(shape)).view(ids.shape[0], *shape)
