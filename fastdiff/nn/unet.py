"""The U-Net of denoising diffusion, for images and signals, in two stages: the embedding, and the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.nn.embedding import Embedding
from fastdiff.nn.layers import Block, ModulatedNormSiLU, NormSiLU, conv, num_groups, zeroed
from fastdiff.nn.pretrained import load_pretrained, save_pretrained


class UNet(nn.Module):
    """A class-conditional U-Net: `model(x, t, labels)` estimates the noise in x (or x0, or v) at the times t.

        model(x, t, labels) = model.forward_embedded(x, model.embed(t, labels))

    Level k works at 1 / 2^k of the size, on `model_channels * channel_mult[k]` channels; it has
    `num_res_blocks` residual blocks on the way down and one more on the way up. Any size works: an odd one is
    rounded up on the way down and cut on the way up. The output begins at 0.

    A forward pass reads nothing on the host and builds no tensor from Python data, and its shapes follow from
    its arguments' shapes alone: it can be captured in a CUDA graph, exported, and compiled whole. Weights are
    laid out in channels_last order; `.to(memory_format=torch.contiguous_format)` changes that.

    Args:
        in_channels: C of x.
        rank: 1 for x [B, C, L], 2 for x [B, C, H, W].
        model_channels: channels of the stem, and the unit of `channel_mult`.
        channel_mult: one factor for each level, finest first.
        num_res_blocks: residual blocks of a level.
        attention_levels: the levels (0 is the finest) whose blocks are followed by self-attention. Of the two
            blocks in the middle, which count to the last level, only the first is.
        head_channels: channels of an attention head; divides those of each level that has attention.
        dropout: probability, in [0, 1), before the last convolution of each block; in training mode only.
        num_classes: classes 0..num_classes - 1 beside the null class -1; 0 for a network without classes.
        learned_variance: 2C output channels, the second C for the variance.
        embedding_channels: width of the time embedding; 4 * model_channels if None.
    Raises:
        ValueError: an argument out of its range.
    Source: Ho et al. 2020, appendix B; Nichol & Dhariwal 2021, 3.1; Dhariwal & Nichol 2021, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        rank: int = 2,
        model_channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 2),
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (),
        head_channels: int = 32,
        dropout: float = 0.0,
        num_classes: int = 0,
        learned_variance: bool = False,
        embedding_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "rank": rank,
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "attention_levels": list(attention_levels),
            "head_channels": head_channels,
            "dropout": dropout,
            "num_classes": num_classes,
            "learned_variance": learned_variance,
            "embedding_channels": embedding_channels,
        }
        _check_config(self.config)
        self.rank = rank
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learned_variance else 1)
        self.num_classes = num_classes
        self.num_levels = len(channel_mult)
        self.num_res_blocks = num_res_blocks
        widths = [model_channels * factor for factor in channel_mult]
        self.stem = conv(in_channels, model_channels, 3, rank)
        # All blocks in the order in which they run, the order of their columns in an embedding.
        self.blocks, self.downsample, self.upsample = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        columns: list[int] = []
        channels, skips = model_channels, [model_channels]

        def add_block(level: int, skip: int = 0, attention: bool = True) -> int:
            heads = head_channels if attention and level in attention_levels else 0
            self.blocks.append(Block(channels + skip, widths[level], rank, dropout, heads))
            columns.append(2 * widths[level])
            return widths[level]

        last = self.num_levels - 1
        for level in range(self.num_levels):
            for _ in range(num_res_blocks):
                channels = add_block(level)
                skips.append(channels)
            if level < last:
                self.downsample.append(conv(channels, channels, 3, rank, stride=2))
                skips.append(channels)
        channels = add_block(last)
        channels = add_block(last, attention=False)
        for level in reversed(range(self.num_levels)):
            for _ in range(num_res_blocks + 1):
                channels = add_block(level, skip=skips.pop())
            if level > 0:
                self.upsample.append(conv(channels, channels, 3, rank))
        self.norm = NormSiLU(num_groups(channels), channels)
        self.head = zeroed(conv(channels, self.out_channels, 3, rank))
        self.columns = tuple(columns)
        self.embedding = Embedding(
            max(1, model_channels // 2), embedding_channels or 4 * model_channels, self.columns, num_classes
        )
        # In this order a CPU runs the convolutions faster: 5-10 % of a forward pass at 8x8 to 32x32 pixels,
        # batch 1 to 64, with 1.2 M and 7.3 M parameters on two cores.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def num_parameters(self) -> int:
        """The number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def embedding_size(self) -> int:
        """Columns of what `embed` returns: scale and shift of each channel of each block."""
        return sum(self.columns)

    def fuse_norms(self, fused: bool = True) -> None:
        """Let eager passes on a CPU take each norm with its modulation and SiLU as one operator, or not.

        The results differ in their last bits. With a C++ compiler a training step is up to 1.1 times as fast.
        """
        for module in self.modules():
            if isinstance(module, (NormSiLU, ModulatedNormSiLU)):
                module.fused = fused

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: [B, C, L] or [B, C, H, W], as `rank` says, of the parameters' dtype; not changed.
            t, labels: as in `embed`.
        Returns:
            [B, C, ...] of x's shape, or [B, 2C, ...] with a learned variance.
        Raises:
            TypeError, ValueError: shape, dtype or device mismatch, before any work.
        """
        self._check_state(x)
        return self.forward_embedded(x, self.embed(t, labels))

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the blocks take from time and class: each one's scales and shifts.

        Args:
            t: [B] or [], integer or floating, original training times (0..T-1, also between integers).
            labels: [B] or [], integer, -1 for no class; None for no class at all. Values outside of
                -1..num_classes - 1 are clamped, not refused: reading them would stop the device.
        Returns:
            [B, embedding_size], or [1, embedding_size] where t and labels are one for all samples.
        Raises:
            TypeError, ValueError: shape, dtype or device mismatch, or labels for a network without classes.
        """
        return self.embedding(t, labels)

    def forward_embedded(self, x: Tensor, emb: Tensor) -> Tensor:
        """The network's output from what `embed` gave, now or earlier (gathered from a table, say).

        Args:
            x: as in `forward`.
            emb: [B, embedding_size], or [1, embedding_size] for all samples alike.
        Raises:
            TypeError, ValueError: shape, dtype or device mismatch, before any work.
        """
        self._check_state(x)
        if emb.ndim != 2 or emb.shape[1] != self.embedding_size or emb.shape[0] not in (1, x.shape[0]):
            batch = x.shape[0]
            raise ValueError(
                f"`emb` must be of shape [{batch} or 1, {self.embedding_size}], got {list(emb.shape)}; "
                f"`t` and `labels` that are not one for all samples must be of shape [{batch}], like `x`"
            )
        steps = zip(self.blocks, emb.split(self.columns, dim=1), strict=True)

        def run_block(h: Tensor) -> Tensor:
            block, modulation = next(steps)
            return block(h, modulation)

        h = self.stem(x if self.rank == 2 else x.unsqueeze(2))
        skips = [h]
        for level in range(self.num_levels):
            for _ in range(self.num_res_blocks):
                h = run_block(h)
                skips.append(h)
            if level < self.num_levels - 1:
                h = self.downsample[level](h)
                skips.append(h)
        h = run_block(run_block(h))
        for level in range(self.num_levels):
            for _ in range(self.num_res_blocks + 1):
                h = run_block(torch.cat((h, skips.pop()), dim=1))
            if level < self.num_levels - 1:
                # To the next skip's size, not to twice this one: that is how an odd size comes back.
                h = self.upsample[level](F.interpolate(h, size=skips[-1].shape[2:], mode="nearest"))
        h = self.head(self.norm(h))
        return h if self.rank == 2 else h.squeeze(2)

    def _check_state(self, x: Tensor) -> None:
        shape = "[B, C, L]" if self.rank == 1 else "[B, C, H, W]"
        weight = self.stem.weight
        if not isinstance(x, Tensor):
            raise TypeError(f"`x` must be a tensor {shape}, got {type(x).__name__}")
        if x.ndim != self.rank + 2 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f"`x` must be of shape {shape} with C = {self.in_channels} and no empty axis, "
                f"got {list(x.shape)}; build the network for it with `in_channels` and `rank`"
            )
        if x.device != weight.device:
            raise ValueError(
                f"`x` must be on the network's device, {weight.device}, got {x.device}; move one"
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"`x` must have the network's dtype, {weight.dtype}, got {x.dtype}; cast one")

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str]) -> UNet:
        """The network of an embedded model or of a folder that `save_pretrained` wrote: float32, eval mode.

        Args:
            name_or_path: a name from `fastdiff.nn.embedded_models()`, or a folder's path ("./digits" for a
                folder that is called like an embedded model).
        Raises:
            ValueError: an unknown name or no such folder; a file that is missing, truncated, a pickle, or not
                the one that the configuration describes; tensors that are missing, extra or of a wrong shape.
        """
        return load_pretrained(cls, name_or_path)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        diffusion: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the network to a folder: `model.safetensors`, and `config.json` with its arguments.

        A kill at any moment leaves the old pair, the new pair, or a pair that does not match, which
        `from_pretrained` detects (config.json holds the SHA-256 of the weights) and names.

        Args:
            path: the folder; made if need be, files of an earlier save are replaced.
            diffusion: what a sampler needs beside the network (schedule, prediction, variance, shape, ...).
            about: where it comes from (data and its attribution, command, seed, time, ...).
            dtype: float32, float16 or bfloat16 for smaller files; None keeps the parameters' own.
        Raises:
            TypeError, ValueError: `diffusion` or `about` is not JSON data, `dtype` is none of these, or a
                parameter is too large for it; before anything is written.
            OSError: the disk is full or cannot be written; an earlier save is untouched.
        """
        save_pretrained(self, self.config, path, diffusion, about, dtype)


def _check_config(config: Mapping[str, Any]) -> None:
    def require(good: bool, name: str, contract: str) -> None:
        if not good:
            raise ValueError(f"`{name}` must be {contract}, got {config[name]!r}")

    def is_int(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    for name in ("in_channels", "model_channels", "num_res_blocks", "head_channels"):
        require(is_int(config[name], 1), name, "an int of at least 1")
    embedding = config["embedding_channels"]
    require(embedding is None or is_int(embedding, 1), "embedding_channels", "None or an int of at least 1")
    require(config["rank"] in (1, 2), "rank", "1 for [B, C, L] or 2 for [B, C, H, W]")
    mult, levels = config["channel_mult"], config["attention_levels"]
    require(
        len(mult) > 0 and all(is_int(m, 1) for m in mult), "channel_mult", "ints of at least 1, one per level"
    )
    in_range = all(is_int(level, 0) and level < len(mult) for level in levels)
    require(in_range, "attention_levels", f"levels of `channel_mult`, 0 to {len(mult) - 1}")
    widths = [config["model_channels"] * mult[level] for level in levels]
    divides = all(width % config["head_channels"] == 0 for width in widths)
    require(divides, "head_channels", f"a divisor of {widths}, the channels of the levels with attention")
    dropout = config["dropout"]
    require(isinstance(dropout, (int, float)) and 0 <= dropout < 1, "dropout", "a probability in [0, 1)")
    require(is_int(config["num_classes"], 0), "num_classes", "an int, 0 for a network without classes")
    require(isinstance(config["learned_variance"], bool), "learned_variance", "True or False")
