"""What the kernels of group normalisation share: the cut into tiles, their addresses, h from a tile of v.

Channels run along a tile's rows in [B, C, N] memory and along its columns in [B, N, C] (channels_last), so
one source serves both. Offsets of 32 bits lie within a tile; where a tile begins has 64.
"""

from __future__ import annotations

import torch

from ._triton import jit, tl

CHUNKS = 256  # the most partial results of a channel
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
_SMALL = 4096  # a group of this size is read once, however few there are
_TILE, _CHANNELS_LAST = 1024, 64  # elements of a tile; the channels of one in channels_last memory


def sizes(x: torch.Tensor, last: bool) -> tuple[int, int, int]:
    """B, C, N of [B, C, N], or of [B, N, C] where channels come last."""
    batch, rows, columns = x.shape
    return (batch, columns, rows) if last else (batch, rows, columns)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def fits(batch: int, groups: int, depth: int, n: int, on_chip: int) -> bool:
    """Whether a program should take a whole group: it fits on chip, and there are enough, or it is small."""
    size = power_of_2(depth) * power_of_2(n)
    return size <= _SMALL or (size <= on_chip and batch * groups >= PROGRAMS)


def tiles(channels: int, n: int, last: bool) -> tuple[int, int, int]:
    """Channels and positions of a tile, and how many tiles along the positions one program sums over."""
    if last:
        depth = min(power_of_2(channels), _CHANNELS_LAST)
        width = min(power_of_2(n), _TILE // depth)
    else:
        width = min(power_of_2(n), _TILE)
        depth = min(power_of_2(channels), _TILE // width)
    return depth, width, -(-n // (width * CHUNKS))


def warps(block: int) -> int:
    """Warps of a program over a block: 8 elements a thread, 32 in the largest blocks."""
    hip = 2 if torch.version.hip else 1
    return max(1, min(16, block // 256) // hip)


@jit
def tile_at(channels, n, own, left, LAST: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """A tile's offsets, and which of them lie within its `own` channels and the `left` positions."""
    c = tl.arange(0, DEPTH)
    s = tl.arange(0, WIDTH)
    if LAST:
        offset = s[:, None] * channels + c[None, :]
        inside = (s < left)[:, None] & (c < own)[None, :]
    else:
        offset = c[:, None] * n + s[None, :]
        inside = (c < own)[:, None] & (s < left)[None, :]
    return offset, inside


@jit
def start_of(b, channels, n, c, s, LAST: tl.constexpr):
    """The address, from the tensor's own, of channel c and position s of sample b; 64 bits."""
    sample = b.to(tl.int64) * channels * n
    if LAST:
        return sample + s.to(tl.int64) * channels + c
    else:
        return sample + c.to(tl.int64) * n + s


@jit
def load_v(x_ptr, residual_ptr, at, inside):
    """x + residual in float32; 0 outside."""
    v = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return v


@jit
def across(vector, LAST: tl.constexpr):
    """One value of each channel, as it meets a tile."""
    if LAST:
        return vector[None, :]
    else:
        return vector[:, None]


@jit
def over_positions(tile, LAST: tl.constexpr):
    """The sum of each channel over a tile's positions."""
    return tl.sum(tile, 0 if LAST else 1)


@jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_step, shift_step, b, c, inside):
    """gain, offset [channels] with h = gain (v - mean) rstd + offset."""
    gain = tl.where(inside, 1.0, 0.0)
    offset = gain * 0.0
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + (b.to(tl.int64) * scale_step + c), mask=inside, other=0.0).to(tl.float32)
        gain *= scale
        offset *= scale
    if shift_ptr is not None:
        offset += tl.load(shift_ptr + (b.to(tl.int64) * shift_step + c), mask=inside, other=0.0).to(
            tl.float32
        )
    return gain, offset


def steps(*vectors: torch.Tensor | None) -> tuple[int, ...]:
    """From one sample's values to the next one's: 0 where all samples share them."""
    return tuple(0 if v is None or v.shape[0] == 1 else v.shape[1] for v in vectors)
