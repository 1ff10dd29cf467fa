"""A network of somebody else's before and after `fd.optimize`."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import fastdiff as fd
from benchmarks import networks
from benchmarks.record import Comparison, compare


def optimize_speed(network: str, batch: int, rounds: int = 15) -> Comparison:
    """One evaluation of a network, as it is and optimised with and without an example."""
    model, example = getattr(networks, network)(batch)
    by_rule, measured = copy.deepcopy(model), copy.deepcopy(model)
    fd.optimize(by_rule)
    fd.optimize(measured, example)
    with torch.inference_mode():
        wanted = model(*example)
        for changed in (by_rule, measured):
            assert torch.allclose(changed(*example), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        return compare(
            "optimize",
            f"{network}, batch {batch}",
            {
                "as it is": partial(model, *example),
                "fd.optimize(model)": partial(by_rule, *example),
                "fd.optimize(model, example)": partial(measured, *example),
            },
            "as it is",
            rounds=rounds,
            parameters=sum(p.numel() for p in model.parameters()),
        )


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("network", ["action_unet", "large_action_unet"])
def bench_optimize(network, batch, measured):
    model, example = getattr(networks, network)(batch)
    fd.optimize(model)
    with torch.inference_mode():
        measured(optimize_speed(network, batch), partial(model, *example))
