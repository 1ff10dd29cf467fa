"""The example of a robot's policy: any layout, receding horizon with a warm start, latencies as a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chains import one_thread
from PIL import Image

from examples import robot_policy as example
from examples.action_unet import ActionUNet
from fastdiff.plots import show_latencies

_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return ActionUNet(example.ACTIONS, example.OBSERVATIONS, widths=(16, 32)).eval()


class Counting(torch.nn.Module):
    """Counts the evaluations of a policy, and keeps what it was given."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.given = policy, []

    def forward(self, plan, t, obs):
        self.given.append((plan.clone(), int(t[0]), obs))
        return self.policy(plan, t, obs)


def test_the_example_runs_as_it_stands_in_short(tmp_path, capsys):
    out = tmp_path / "policy.png"
    example.main(["--train-steps", "3", "--drives", "4", "--calls", "12", "--out", str(out)])
    text = capsys.readouterr().out
    assert text.count("of 4 drives reach the goal") == 2
    assert "from noise" in text
    assert f"wrote {out}" in text
    with Image.open(out) as picture:
        assert picture.size[0] > 500


def test_demonstrations_are_what_an_expert_would_do_next():
    observations, plans = example.demonstrations(20, seed=0)
    assert observations.shape == (len(plans), example.OBSERVATIONS)
    assert plans.shape[1:] == (example.HORIZON, example.ACTIONS)
    assert float(plans.norm(dim=2).max()) <= 1 + 1e-6
    assert (plans[:20, 0, 0] > 0).any()  # to either side
    assert (plans[:20, 0, 0] < 0).any()


def test_a_warm_start_halves_the_evaluations_and_starts_from_the_shifted_plan(policy):
    counting = Counting(policy)
    planner = example.Planner(counting, warm=0.5)
    obs = torch.zeros(3, example.OBSERVATIONS)
    first = planner(obs)
    assert first.shape == (3, example.HORIZON, example.ACTIONS)
    assert len(counting.given) == example.STEPS
    counting.given.clear()
    planner(obs)
    assert len(counting.given) == example.STEPS // 2
    noised, t, _ = counting.given[0]
    shifted = torch.cat([first[:, example.EXECUTED :], first[:, -1:].expand(-1, example.EXECUTED, -1)], dim=1)
    alpha, sigma = example.SCHEDULE.alpha[t], example.SCHEDULE.sigma[t]
    noise = (noised - float(alpha) * shifted) / float(sigma)
    assert abs(float(noise.mean())) < 0.5
    assert 0.7 < float(noise.std()) < 1.3


def test_a_robot_plans_the_same_alone_and_among_others(policy):
    obs = torch.randn(4, example.OBSERVATIONS, generator=torch.Generator().manual_seed(0))
    together = example.Planner(policy)(obs)
    alone = example.Planner(policy).sampler.sample(1, seed=1, sample_ids=[2], cond={"obs": obs[2:3]})
    assert torch.allclose(together[2:3], alone, atol=1e-5)


def test_every_counted_plan_starts_from_the_last_one(policy):
    counting = Counting(policy)
    seconds = example.latencies(example.Planner(counting), 30, warmup=3)
    assert seconds.shape == (30,)
    assert (seconds > 0).all()
    warm = example.DRIVE - 1
    drives = -(-33 // warm)
    assert len(counting.given) == drives * (example.STEPS + warm * example.STEPS // 2)


def test_latencies_are_drawn_with_what_lies_far_out_in_the_last_bin(tmp_path):
    generator = np.random.default_rng(0)
    seconds = generator.normal(5e-3, 2e-4, 1000)
    seconds[0] = 3.0
    path = show_latencies({"one": seconds, "two": seconds * 2}, tmp_path / "latencies.png")
    with Image.open(path) as picture:
        dark = np.asarray(picture.convert("L")) < 128
    assert dark.any(axis=0).mean() > 0.3  # the bars are no line at the left edge
    with pytest.raises(ValueError, match="`seconds` must hold series"):
        show_latencies({"none": []}, tmp_path / "none.png")


@pytest.mark.slow
def test_a_trained_policy_reaches_the_goal_cold_and_warm():
    policy = example.train(600)
    for warm in (None, example.WARM):
        drives = example.drive(example.Planner(policy, warm), 200)
        assert float(drives.reached.float().mean()) >= 0.85
        sides = drives.paths[drives.paths.shape[0] // 4, :, 0].sign()
        assert 0.2 < float((sides > 0).float().mean()) < 0.8
