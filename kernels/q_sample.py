"""The forward process in one pass: x_t = alpha_t x_0 + sigma_t z, z drawn in the kernel, and the target.

    x_t = alpha_t x_0 + sigma_t z,   z = normal(seed, sample_id, draw, element) in domain 2
    target: eps = z,   v = alpha_t z - sigma_t x_0,   x0 = x_0

Source: Ho et al. 2020, eq. 4 (alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)); Salimans and Ho 2022
(v).
"""

from __future__ import annotations

from ctypes import c_int64
from typing import NamedTuple

import torch

from . import cpu
from ._blocks import cut, first_element
from ._triton import jit, tl
from .philox import DOMAIN_TRAIN, normal_block, normal_reference, normal_torch

TARGETS = ("none", "eps", "v", "x0")
_NONE, _EPS, _V = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_DOMAIN_TRAIN = tl.constexpr(DOMAIN_TRAIN)


class Forward(NamedTuple):
    """The operands of q_sample, B samples of N elements.

    Attributes:
        x_t: [B, N] float32, bfloat16 or float16, dense. Overwritten.
        target: [B, N] float32, dense, or None with kind 0. Overwritten.
        x0: [B, N] float32, dense.
        alpha_sigma: [levels, 2] float32, alpha and sigma of each level.
        t: [B] int64, a row of `alpha_sigma`; clamped into it.
        seed, sample_id, draw: [B] int64, the noise's key.
        kind: the target, an index into `TARGETS`.
        noise: [B, N] float32 in place of the drawn z.
    """

    x_t: torch.Tensor
    target: torch.Tensor | None
    x0: torch.Tensor
    alpha_sigma: torch.Tensor
    t: torch.Tensor
    seed: torch.Tensor
    sample_id: torch.Tensor
    draw: torch.Tensor
    kind: int = 0
    noise: torch.Tensor | None = None


@jit
def target_of(alpha, sigma, x0, z, KIND: tl.constexpr):
    """What the network should predict, by the index of its kind in `TARGETS`."""
    if KIND == _EPS:
        return z
    elif KIND == _V:
        return alpha * z - sigma * x0
    else:
        return x0


@jit
def _q_sample_kernel(
    x_t_ptr, target_ptr, x0_ptr, alpha_sigma_ptr, t_ptr, seed_ptr, sample_id_ptr, draw_ptr, noise_ptr,
    levels, n,
    KIND: tl.constexpr, GIVEN_NOISE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    level = tl.load(t_ptr + b)
    level = tl.minimum(tl.maximum(level, 0), levels - 1)
    alpha = tl.load(alpha_sigma_ptr + 2 * level)
    sigma = tl.load(alpha_sigma_ptr + 2 * level + 1)
    if not GIVEN_NOISE:
        draw = tl.load(draw_ptr + b).to(tl.uint32)
        sample_id = tl.load(sample_id_ptr + b).to(tl.uint32)
        seed = tl.load(seed_ptr + b).to(tl.uint64)
    offset = tl.arange(0, BLOCK)
    start = first_element(BLOCK)
    inside = offset < n - start
    own = b * n + start + offset
    x0 = tl.load(x0_ptr + own, mask=inside, other=0.0)
    if GIVEN_NOISE:
        z = tl.load(noise_ptr + own, mask=inside, other=0.0)
    else:
        z = normal_block(start, draw, sample_id, _DOMAIN_TRAIN, seed, BLOCK, WIDTH)
    x_t = alpha * x0 + sigma * z
    tl.store(x_t_ptr + own, x_t.to(x_t_ptr.dtype.element_ty), mask=inside)
    if KIND != _NONE:
        tl.store(target_ptr + own, target_of(alpha, sigma, x0, z, KIND), mask=inside)


def q_sample_triton(f: Forward) -> None:
    """`q_sample_torch` on a GPU or in Triton's interpreter."""
    if not f.x0.numel():
        return
    grid, options = cut(*f.x0.shape, f.x_t)
    _q_sample_kernel[grid](
        f.x_t, f.target, f.x0, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw,
        None if f.noise is None else f.noise.contiguous(), f.alpha_sigma.shape[0], f.x0.shape[1],
        KIND=f.kind, GIVEN_NOISE=f.noise is not None, **options,
    )  # fmt: skip


def q_sample_torch(f: Forward) -> None:
    """Fill x_t, and the target if wanted: the CPU's implementation, and that of devices without Triton.

    Traffic: reads 4 bytes per element, writes 4 (2 in half precision), and 4 more for a target.
    """
    native = cpu.library() if f.x0.device.type == "cpu" else None
    if native is None:
        alpha, sigma = _scales(f)
        z = f.noise if f.noise is not None else torch.empty_like(f.x0)
        if f.noise is None:
            normal_torch(z, f.seed, f.sample_id, f.draw, DOMAIN_TRAIN)
        f.x_t.copy_(alpha * f.x0 + sigma * z)
        _fill_target(f, alpha, sigma, z)
        return
    x_t = f.x_t if f.x_t.dtype == torch.float32 else torch.empty_like(f.x0)
    noise = None if f.noise is None else f.noise.contiguous()
    tensors = (x_t, f.target, f.x0, noise, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw)
    native.fd_q_sample(
        *map(cpu.pointer, tensors),
        *map(c_int64, f.x0.shape),
        c_int64(f.alpha_sigma.shape[0]),
        f.kind,
        torch.get_num_threads(),
    )
    if x_t is not f.x_t:
        f.x_t.copy_(x_t)


def q_sample_reference(f: Forward) -> None:
    """The formula in float64; x_t and target may be float64."""
    alpha, sigma = (a.double() for a in _scales(f))
    z = torch.empty_like(f.x0, dtype=torch.float64) if f.noise is None else f.noise.double()
    if f.noise is None:
        normal_reference(z, f.seed, f.sample_id, f.draw, DOMAIN_TRAIN)
    f.x_t.copy_(alpha * f.x0.double() + sigma * z)
    _fill_target(f, alpha, sigma, z)


def _scales(f: Forward) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of each sample, [B, 1]."""
    pair = f.alpha_sigma[f.t.clamp(0, f.alpha_sigma.shape[0] - 1)]
    return pair[:, :1], pair[:, 1:]


def _fill_target(f: Forward, alpha: torch.Tensor, sigma: torch.Tensor, z: torch.Tensor) -> None:
    kind = TARGETS[f.kind]
    if f.target is not None and kind != "none":
        f.target.copy_({"eps": lambda: z, "v": lambda: alpha * z - sigma * f.x0, "x0": lambda: f.x0}[kind]())
