"""AdamW over weights that lie in one piece: one call of torch's fused kernel, whatever their number."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastdiff.train.flat import Flat

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_DIVIDING = ("cpu", "cuda")  # the devices whose kernel takes `grad_scale`; that of MPS ignores it


class AdamW:
    """torch.optim.AdamW(fused=True) of all parameters of a `Flat`, with the same numbers for each.

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2                      g the gradient / scale
        w = (1 - rate decay) w - rate (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + 1e-8)

    n counts the steps in which this parameter had a gradient; in others it is left alone, decay included.

    Source: Loshchilov & Hutter 2019 (1711.05101), algorithm 2.
    """

    def __init__(self, flat: Flat, weight_decay: float) -> None:
        self._flat, self._weight_decay = flat, weight_decay
        self._means, self._mean_views = flat.like()
        self._squares, self._square_views = flat.like()
        self._counts = [0] * len(flat.parameters)
        self._forget_runs()

    def _forget_runs(self) -> None:
        self._active: list[bool] = []
        self._pieces: tuple[list[Tensor], ...] = ()

    @torch.no_grad()
    def step(self, rate: float, scale: Tensor | None = None) -> None:
        """Move the weights by `flat.gradients`, which become their quotient by `scale`, 0-dim float32."""
        active = self._flat.active
        if active != self._active:
            self._cut(active)
        self._counts = [count + is_active for count, is_active in zip(self._counts, active, strict=True)]
        weights, gradients, means, squares, counts = self._pieces
        if scale is not None and any(g.device.type not in _DIVIDING for g in gradients):
            for gradient in gradients:
                gradient.div_(scale.to(gradient.device))
            scale = None
        adamw(
            weights, gradients, means, squares, [], counts,
            fused=True, grad_scale=scale, found_inf=None, amsgrad=False, maximize=False,
            beta1=_BETAS[0], beta2=_BETAS[1], lr=rate, weight_decay=self._weight_decay, eps=_EPS,
        )  # fmt: skip

    def _cut(self, active: list[bool]) -> None:
        """The pieces whose parameters have a gradient and the same n: one for each buffer, as a rule."""
        flat = self._flat
        keys = [count if is_active else None for count, is_active in zip(self._counts, active, strict=True)]
        runs = list(flat.runs(keys))
        buffers = (flat.weights, flat.gradients, self._means, self._squares)
        pieces = tuple([all_[buffer][where] for buffer, where, _ in runs] for all_ in buffers)
        counts = [flat.weights[i].new_tensor(count, dtype=torch.float32) for i, _, count in runs]
        self._active, self._pieces = list(active), (*pieces, counts)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """name -> step, exp_avg, exp_avg_sq, as torch.optim.AdamW names them; the tensors are not copied."""
        state = zip(self._flat.names, self._counts, self._mean_views, self._square_views, strict=True)
        return {
            name: {"step": torch.tensor(float(count)), "exp_avg": mean, "exp_avg_sq": square}
            for name, count, mean, square in state
            if count
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the result of `state_dict`; its tensors are copied, whatever their strides."""
        for i, name in enumerate(self._flat.names):
            known = state.get(name)
            self._counts[i] = 0 if known is None else int(known["step"])
            for key, view in (("exp_avg", self._mean_views[i]), ("exp_avg_sq", self._square_views[i])):
                if known is None:
                    view.zero_()
                else:
                    view.copy_(known[key])
        self._forget_runs()
