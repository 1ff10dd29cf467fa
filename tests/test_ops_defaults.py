"""The operators under another default dtype or device of torch, which no operand's memory may follow."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import assert_same_bits, clone, library, op_arguments, random_step
from vlb_cases import copies as vlb_copies
from vlb_cases import operands as vlb_operands

from fastdiff import ops
from fastdiff.kernels import cpu
from fastdiff.kernels._reverse_step_cpu import step_eager
from fastdiff.kernels._reverse_step_reference import reverse_step_reference
from fastdiff.kernels.q_sample import Forward, q_sample_reference, q_sample_torch
from fastdiff.kernels.vlb import vlb_terms_reference, vlb_terms_torch

ORDINARY: Any = {"dtype": torch.float32, "device": "cpu"}
SETTINGS = ("float64", "bfloat16", "meta")


def norms() -> list[torch.Tensor]:
    """Both memory formats, small and large, and their gradients."""
    results = []
    for last in (False, True):
        for n in (5, 48):
            g = torch.Generator("cpu").manual_seed(n)
            x, residual = (torch.randn(2, 32, n, n, generator=g, **ORDINARY) for _ in range(2))
            if last:
                x, residual = (a.to(memory_format=torch.channels_last) for a in (x, residual))
            shapes = ((32,), (32,), (2, 32), (1, 32))
            vectors = [torch.randn(*s, generator=g, **ORDINARY) for s in shapes]
            leaves = [a.requires_grad_() for a in (x, residual, *vectors)]
            u, r, weight, bias, scale, shift = leaves
            y = ops.group_norm_silu(u, 4, weight, bias, scale=scale, shift=shift, residual=r)
            results += [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]
            with torch.no_grad():
                results.append(ops.group_norm_silu(u, 4))
    return results


def losses() -> list[torch.Tensor]:
    """The denoising loss of every target and dtype, the bound's terms, and their gradients."""
    results = []
    g = torch.Generator("cpu").manual_seed(1)
    x0, prediction = (torch.randn(3, 3, 9, 9, generator=g, **ORDINARY) for _ in range(2))
    levels = torch.rand(10, 2, generator=g, **ORDINARY)
    t = torch.tensor([1, 5, 8], dtype=torch.int64, device="cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        for target in ("eps", "v", "x0"):
            out = prediction.to(dtype).requires_grad_()
            loss = ops.denoising_loss(out, x0.to(real), levels.to(real), t, 3, None, 4, target=target)
            results += [loss.detach(), *torch.autograd.grad(loss.sum(), out)]
    f = VLB
    out = f.out.clone().requires_grad_()
    vlb = ops.vlb_terms(f.x0, f.x_t, out, f.coef, f.t)
    return [*results, vlb.detach(), *torch.autograd.grad(vlb.sum(), out)]


def sampling() -> list[torch.Tensor]:
    """A reverse step and the noise of q_sample."""
    given = {k: a.clone() if isinstance(a, torch.Tensor) else a for k, a in STEP.items()}
    ops.reverse_step(**given)
    x_t, goal = ops.q_sample(
        given["out"], LEVELS, torch.ones_like(given["row"]).long(), 3, None, 4, target="v"
    )
    return [given["x"], x_t, goal]


VLB, STEP, LEVELS = vlb_operands(12), op_arguments(), torch.rand(10, 2)
WORK: dict[str, Any] = {"norms": norms, "losses": losses, "sampling": sampling}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("work", WORK)
def test_default_dtype_and_device_of_torch_change_no_bit(work: str, setting: str) -> None:
    """In a process of its own: memory of the wrong size would be overwritten, and may end it."""
    library()
    command = [sys.executable, __file__, work, setting]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def direct() -> list[torch.Tensor]:
    """The kernels' own functions, which a chain calls without the dispatcher, in torch and in float64."""
    results = []
    for step in (step_eager, reverse_step_reference):
        s = clone(CHAIN)
        step(s)
        results.append(s.x)
    for dtype, forward in ((torch.float32, q_sample_torch), (torch.float64, q_sample_reference)):
        x0 = VLB.x0.to(dtype)
        x_t, goal = torch.empty_like(x0), torch.empty_like(x0)
        forward(Forward(x_t, goal, x0, LEVELS.to(dtype), VLB.t, VLB.t, VLB.t, VLB.t, kind=2))
        results += [x_t, goal]
    for terms in (vlb_terms_torch, vlb_terms_reference):
        f = vlb_copies(VLB)
        terms(f)
        results += f[:3]
    return results


CHAIN = random_step(1, learned=True, known=True)


def test_kernels_called_on_the_cpu_under_another_default_device_stay_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    expected = direct()
    with torch.device("meta"):
        found = direct()
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


def main(work: str, setting: str) -> None:
    """Compare what `work` gives as torch starts and under the setting."""
    library()
    expected = WORK[work]()
    if setting != "meta":
        torch.set_default_dtype(getattr(torch, setting))
    with torch.device("meta") if setting == "meta" else nullcontext():
        found = WORK[work]()
    torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


if __name__ == "__main__":
    main(*sys.argv[1:])
