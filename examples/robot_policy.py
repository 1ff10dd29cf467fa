"""A diffusion policy in receding horizon: train it, drive with it, and see how long a plan takes.

    python -m examples.robot_policy --out policy.png

A point robot drives from below an obstacle to a goal above it. The expert passes on either side, so the mean
of its plans leads into the obstacle: a plan has to be sampled. Each call plans 16 velocities from the robot's
position and goal, the robot executes 4 of them, and the next call starts from the last plan, shifted and
partly noised again (`init=`, `strength=`), which takes half the evaluations of the network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff as fd
from examples.action_unet import ActionUNet
from fastdiff import plots

HORIZON, EXECUTED, ACTIONS, OBSERVATIONS = 16, 4, 2, 4
SPEED = 0.15  # of a full velocity in one time step
RADIUS = 0.3  # of the obstacle at the origin
SCHEDULE = fd.NoiseSchedule.cosine(100)
STEPS, WARM = 10, 0.5
DRIVE = 2 * HORIZON // EXECUTED  # plans of a drive


def expert(position: Tensor, goal: Tensor, side: Tensor) -> Tensor:
    """[B, 2] velocities in [-1, 1]: past the obstacle on a side (-1 or 1), then to the goal."""
    beside = torch.stack((0.6 * side, torch.full_like(side, 0.1)), dim=1)
    step = (torch.where(position[:, 1:] < 0, beside, goal) - position) / SPEED
    return step / step.norm(dim=1, keepdim=True).clamp(min=1)


def starts(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where robots start, below the obstacle, and their goals above it: [B, 2] each."""
    offset = torch.rand(2, num, 2, generator=generator) * 0.4 - 0.2
    return offset[0] + torch.tensor([0.0, -1.0]), offset[1] + torch.tensor([0.0, 1.0])


def demonstrations(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Observations [N, 4] along `num` drives of the expert, and its next 16 velocities [N, 16, 2]."""
    generator = torch.Generator().manual_seed(seed)
    position, goal = starts(num, generator)
    side = torch.randint(0, 2, (num,), generator=generator) * 2.0 - 1.0
    observations, velocities = [], []
    for _ in range(2 * HORIZON):
        observations.append(torch.cat((position, goal), dim=1))
        velocities.append(expert(position, goal, side))
        wind = 0.1 * torch.randn(num, 2, generator=generator)
        position = position + SPEED * (velocities[-1] + wind)
    plans = torch.stack(velocities, dim=1).unfold(1, HORIZON, 1).transpose(2, 3)
    return torch.stack(observations, dim=1)[:, : plans.shape[1]].flatten(0, 1), plans.flatten(0, 1)


def train(steps: int, seed: int = 0) -> ActionUNet:
    """A policy, trained to denoise the expert's plans."""
    torch.manual_seed(seed)
    policy = ActionUNet(ACTIONS, OBSERVATIONS, widths=(32, 64))
    observations, plans = demonstrations(500, seed)
    objective = fd.Objective(SCHEDULE, prediction="v")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = fd.EMA(policy, decay=0.995)
    for step in range(steps):
        chosen = torch.randint(0, len(plans), (128,))
        losses = objective(policy, plans[chosen], draw=step, cond={"obs": observations[chosen]})
        optimizer.zero_grad()
        losses.total.mean().backward()
        optimizer.step()
        decay.step()
        average.update(policy)
    average.copy_to(policy)
    return policy.eval()


class Planner:
    """Plans in receding horizon, for several robots at once: keeps the last plan to start the next from.

    Args:
        policy: a network (plan [B, horizon, actions], t, obs) -> v.
        warm: the share of the chain that runs from the last plan; None starts every plan from noise.
    """

    def __init__(self, policy: torch.nn.Module, warm: float | None = WARM) -> None:
        self.sampler = fd.Sampler(
            policy, SCHEDULE, steps=STEPS, prediction="v", shape=(HORIZON, ACTIONS), clip=(-1, 1)
        )
        self.warm = warm
        self.plan: Tensor | None = None
        self.calls = 0

    def __call__(self, obs: Tensor) -> Tensor:
        """The plans [B, horizon, actions] for the observations [B, observations]."""
        start: dict[str, Any] = {}
        if self.plan is not None and self.warm is not None:
            # What is left of the last plan, its last action held to the end of the horizon.
            rest, last = self.plan[:, EXECUTED:], self.plan[:, -1:]
            start = {"init": torch.cat((rest, last.expand(-1, EXECUTED, -1)), dim=1), "strength": self.warm}
        self.calls += 1
        self.plan = self.sampler.sample(len(obs), seed=self.calls, cond={"obs": obs}, **start)
        return self.plan


@dataclass(frozen=True)
class Drives:
    """What became of some drives.

    Attributes:
        paths: [steps + 1, B, 2] positions.
        reached: [B] whether the goal was reached and the obstacle was not hit.
    """

    paths: Tensor
    reached: Tensor


def drive(planner: Planner, num: int, seed: int = 1) -> Drives:
    """Drive `num` robots with one planner, without the expert."""
    position, goal = starts(num, torch.Generator().manual_seed(seed))
    paths = [position]
    for _ in range(DRIVE):
        plan = planner(torch.cat((position, goal), dim=1))
        for action in plan[:, :EXECUTED].unbind(dim=1):
            position = position + SPEED * action
            paths.append(position)
    walked = torch.stack(paths)
    safe = walked.norm(dim=2).amin(dim=0) > RADIUS
    there = (walked[-1] - goal).norm(dim=1) < 0.2
    return Drives(walked, safe & there)


def latencies(planner: Planner, calls: int, warmup: int = 20) -> np.ndarray:
    """Seconds of each of `calls` plans for one robot, which drives to its goal over and over.

    The first plan of a drive starts from noise and is not counted: it is made before the robot moves.
    """
    seconds = []
    generator = torch.Generator().manual_seed(2)
    while len(seconds) < warmup + calls:
        position, goal = starts(1, generator)
        planner.plan = None
        for i in range(DRIVE):
            begin = time.perf_counter()
            plan = planner(torch.cat((position, goal), dim=1))
            if i > 0:
                seconds.append(time.perf_counter() - begin)
            position = position + SPEED * plan[:, :EXECUTED].sum(dim=1)
    return np.array(seconds[warmup : warmup + calls])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, drive, measure, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.robot_policy",
        description="Train a diffusion policy, drive with it in receding horizon, and draw its latency.",
    )
    parser.add_argument("--train-steps", type=int, default=1000, help="steps of training, some 20 ms each")
    parser.add_argument("--drives", type=int, default=200, help="drives that the policy is tried on")
    parser.add_argument("--calls", type=int, default=1000, help="plans whose latency is measured")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is steady on a busy machine")
    parser.add_argument("--out", type=Path, default=Path("policy.png"), help="the histogram")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    policy = train(chosen.train_steps)
    print(fd.optimize(policy))
    measured = {}
    for name, warm in (("from noise", None), ("from the last plan", WARM)):
        drives = drive(Planner(policy, warm), chosen.drives)
        seconds = measured[name] = latencies(Planner(policy, warm), chosen.calls)
        p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
        print(
            f"{name}: {drives.reached.float().mean():.0%} of {chosen.drives} drives reach the goal, "
            f"a plan takes {p50:.1f} ms (p50), {p99:.1f} ms (p99)"
        )
    print(f"wrote {plots.show_latencies(measured, chosen.out)}")


if __name__ == "__main__":
    main()
