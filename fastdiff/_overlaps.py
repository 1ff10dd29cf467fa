"""Which tensors of a network lie over each other in memory, and so cannot move one by one."""

from __future__ import annotations

import torch
from torch import nn


def overlapping(model: nn.Module) -> set[int]:
    """The ids of the model's parameters and buffers that share bytes with another of them.

    Views of one piece of memory that lie side by side share none.
    """
    spans = []
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if tensor.numel() and tensor.layout is torch.strided:
            last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            spans.append((str(tensor.device), begin, begin + (last + 1) * tensor.element_size(), id(tensor)))
    found: set[int] = set()
    furthest = ("", 0, 0, 0)
    for span in sorted(spans):
        if span[0] == furthest[0] and span[1] < furthest[2]:
            found |= {span[3], furthest[3]}
        if span[0] != furthest[0] or span[2] > furthest[2]:
            furthest = span
    return found
