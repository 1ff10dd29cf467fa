"""From a time and a class to the scales and shifts of every block of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdiff.nn.layers import silu_of

MAX_PERIOD = 10_000.0  # the slowest sinusoid turns once in about 2 pi * 10 000 training steps
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Embedding(nn.Module):
    """(t, label) -> the modulation of all blocks, [B, sum(columns)], in one matrix product.

        h = mlp(cos(t f), sin(t f)) + class_table[label],   f_i = 10000^(-i / frequencies)
        modulation = project(silu(h)) + (1 for a scale, 0 for a shift)

    The columns of a block lie side by side, its scales before its shifts. Nothing here depends on the state,
    so a sampler may tabulate the result for each (t, label) and gather it.

    Args:
        frequencies: number of frequencies, at least 1.
        channels: width of h.
        columns: for each block, twice its channels.
        num_classes: 0 for a network without classes.
    Source: Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, section 3.
    """

    frequency_bits: Tensor
    identity: Tensor

    def __init__(self, frequencies: int, channels: int, columns: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        powers = torch.arange(frequencies, dtype=torch.float64) / frequencies
        table = torch.exp(-math.log(MAX_PERIOD) * powers).to(torch.float32)
        # Kept as integers: `model.to(torch.bfloat16)` would round the frequencies by up to 2^-9, which at
        # t = 999 is two radians.
        self.register_buffer("frequency_bits", table.view(torch.int32), persistent=False)
        identity = [torch.arange(count, 0, -1) > count // 2 for count in columns]
        self.register_buffer("identity", torch.cat(identity).to(torch.float32), persistent=False)
        self.time1 = nn.Linear(2 * frequencies, channels)
        self.time2 = nn.Linear(channels, channels)
        # Row 0 is the null class, row k + 1 class k.
        self.classes = nn.Embedding(num_classes + 1, channels) if num_classes else None
        self.project = nn.Linear(channels, sum(columns))

    def forward(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `UNet.embed`."""
        self._check(t, labels)
        angle = t.reshape(-1, 1).to(torch.float32) * self.frequency_bits.view(torch.float32)
        h = torch.cat((angle.cos(), angle.sin()), dim=1).to(self.time1.weight.dtype)
        h = self.time2(silu_of(self.time1(h)))
        if self.classes is not None:
            if labels is None:
                h = h + self.classes.weight.select(0, 0)
            else:
                # Reading labels to check their range would stop a device; a clamped row is in the table.
                row = labels.reshape(-1).to(torch.int64).clamp(-1, self.num_classes - 1) + 1
                h = h + self.classes(row)
        return self.project(silu_of(h)) + self.identity

    def _check(self, t: Tensor, labels: Tensor | None) -> None:
        if not isinstance(t, Tensor) or t.is_complex() or t.dtype == torch.bool:
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(
                f"`t` must be a tensor of real numbers, got {kind}; use torch.tensor(t, device=x.device)"
            )
        if t.ndim > 1:
            raise ValueError(f"`t` must be of shape [B] or [], one time per sample, got {list(t.shape)}")
        self._check_device("t", t)
        if labels is None:
            return
        if self.classes is None:
            raise ValueError(
                "`labels` must be None for a network without classes, got some; build it with `num_classes`"
            )
        if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(
                f"`labels` must be an integer tensor, -1 or 0 to {self.num_classes - 1}, got {kind}; "
                "use torch.tensor(labels, device=x.device)"
            )
        shapes = (*t.shape, *labels.shape)
        if labels.ndim > 1 or (len(shapes) == 2 and shapes[0] != shapes[1] and 1 not in shapes):
            raise ValueError(
                f"`labels` must be of shape [B] or [], one class per sample, got {list(labels.shape)} "
                f"with `t` of shape {list(t.shape)}"
            )
        self._check_device("labels", labels)

    def _check_device(self, name: str, tensor: Tensor) -> None:
        device = self.time1.weight.device
        if tensor.device != device:
            raise ValueError(
                f"`{name}` must be on the network's device, {device}, got {tensor.device}; move it"
            )
