"""Where a chain's time goes: its network, the update between two evaluations, the noise, the host.

Four chains with one table, timed in turn. Each leaves one thing out, so the differences add up to the whole:

    step     the chain itself                                          network = step - bare
    bare     its network returns an output that was computed before    noise   = bare - given
    given    and its noise is given                                    update  = given - host
    host     and its samples are single numbers
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastdiff.chain import evaluating
from fastdiff.lanes import has_null_class
from fastdiff.nn import prediction_of
from fastdiff.sampler import Sampler
from fastdiff.timing import interleaved

PARTS = ("network", "update", "noise", "host")


@dataclass(frozen=True)
class Shares:
    """Seconds of one row of a chain, medians over rounds.

    Attributes:
        name: of the chain.
        rows, batch: evaluations of the network, samples at once.
        step: the whole row; the sum of the parts, where none of them came out below 0 and was set to 0.
        network, update, noise, host: its parts.
    """

    name: str
    rows: int
    batch: int
    step: float
    network: float
    update: float
    noise: float
    host: float

    def share(self, part: str) -> float:
        """A part of the whole, 0 to 1."""
        total = sum(getattr(self, name) for name in PARTS)
        return float(getattr(self, part) / total) if total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.name}: {1e6 * self.step:.1f} µs a row, {self.rows} rows, batch {self.batch}"]
        for part in PARTS:
            lines.append(f"  {part:<8}{1e6 * getattr(self, part):>10.1f} µs {self.share(part):>7.1%}")
        return "\n".join(lines)


def chain_shares(
    sampler: Sampler,
    batch: int,
    *,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    rounds: int = 9,
    name: str = "",
) -> Shares:
    """Measure where the time of a sampler's chain goes.

    Args:
        sampler: the chain.
        batch: samples at once.
        cond, uncond, guidance_scale: as `Sampler.sample` takes them.
        rounds: how often each chain is timed.
        name: what it is called; the solver's name by default.
    """
    cond = dict(cond or {})
    if guidance_scale != 1 and uncond is None and has_null_class(sampler.model):
        uncond = {"labels": -1}
    rows = sampler.table.num_rows
    outputs = _outputs(sampler, batch, cond, uncond, guidance_scale)
    bare = _without_network(sampler, outputs, sampler.shape)
    channels = outputs.shape[1] // sampler.shape[0]
    number = outputs[(slice(None), slice(channels), *[slice(1)] * (outputs.dim() - 2))].clone()
    host = _without_network(sampler, number, (1,) * len(sampler.shape))

    def settle() -> None:
        if sampler.device.type == "cuda":
            torch.cuda.synchronize(sampler.device)

    def run(chain: Sampler, noise: bool = False) -> Callable[[], Any]:
        given = torch.randn(rows, batch, *chain.shape, device=sampler.device) if noise else None
        options: dict[str, Any] = {
            "cond": cond,
            "uncond": uncond,
            "guidance_scale": guidance_scale,
            "noise": given,
        }

        return partial(chain.sample, batch, **options)

    draws = bool((sampler.table.from_noise != 0).any())
    chains = {"step": run(sampler), "bare": run(bare), "host": run(host, noise=draws)}
    if draws:
        chains["given"] = run(bare, noise=True)
    seconds = interleaved(chains, rounds, settle=settle)
    seconds.setdefault("given", seconds["bare"])

    def part(whole: str, without: str) -> float:
        pairs = zip(seconds[whole], seconds[without], strict=True)
        return max(0.0, statistics.median(a - b for a, b in pairs) / rows)

    return Shares(
        name=name or sampler.table.name,
        rows=rows,
        batch=batch,
        step=statistics.median(seconds["step"]) / rows,
        network=part("step", "bare"),
        update=part("given", "host"),
        noise=part("bare", "given"),
        host=statistics.median(seconds["host"]) / rows,
    )


def _outputs(
    sampler: Sampler, batch: int, cond: Mapping[str, Any], uncond: Any, guidance_scale: float
) -> torch.Tensor:
    """The network's output in the middle of a chain, for all lanes."""
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor, t: torch.Tensor, **given: Any) -> torch.Tensor:
        kept.append(prediction_of(sampler.model(x, t, **given)))
        return kept[-1]

    model: Any = keep
    chain = Sampler(
        model, table=sampler.table, shape=sampler.shape, device=sampler.device, dtype=sampler.dtype
    )
    with evaluating(sampler.model):
        chain.sample(batch, cond=cond, uncond=uncond, guidance_scale=guidance_scale)
    return kept[len(kept) // 2]


def _without_network(sampler: Sampler, outputs: torch.Tensor, shape: tuple[int, ...]) -> Sampler:
    """The chain with a network that costs nothing."""

    def network(x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
        return outputs

    return Sampler(network, table=sampler.table, shape=shape, device=sampler.device, dtype=sampler.dtype)
