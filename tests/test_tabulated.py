"""A chain's time and class embedding is computed for many rows at a time, and a step does no work for it."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from chains import one_thread
from networks import arguments, network
from operators import Operators

import fastdiff as fd
from fastdiff import chain
from fastdiff.nn import RowTimes, UNet, embedding_table
from fastdiff.nn.tabulated import CHUNK_ROWS, MAX_BYTES

_one_thread = pytest.fixture(autouse=True)(one_thread)
SCHEDULE = fd.NoiseSchedule.linear(1000)
SHAPE = (2, 6, 6)


def plainly(monkeypatch, run):
    """What `run` gives where nothing is tabulated."""
    with monkeypatch.context() as patched:
        patched.setattr(chain, "embedding_table", lambda *args, **kwargs: None)
        return run()


def rows(*times: int) -> RowTimes:
    return RowTimes(times, torch.device("cpu"), torch.int64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": [0, 1, 2, -1, 1]},
        {"labels": [2] * 5},
        {"labels": [0, 1, 2, 1, 0], "guidance_scale": [1.0, 2.0, 3.0, 1.0, 0.5]},
    ],
    ids=["no class", "classes", "one class", "guidance"],
)
@pytest.mark.parametrize(
    ("solver", "steps", "variance"),
    [("ddpm", 66, "learned_range"), ("heun", 10, "fixed_small"), ("dpmpp_2m", 12, "fixed_small")],
)
def test_a_chain_with_a_table_is_the_chain_without(options, solver, steps, variance, monkeypatch):
    # In float64, as a chain makes of a last bit what its network makes of it, and no bound says how much.
    model = network(learned_variance=variance == "learned_range").double()
    sampler = fd.Sampler(
        model,
        SCHEDULE,
        solver=solver,
        steps=steps,
        variance=variance,
        shape=SHAPE,
    )
    options = dict(options)
    labels = options.pop("labels", None)
    if labels is not None:
        options["cond"] = {"labels": torch.tensor(labels)}

    def run():
        return sampler.sample(5, trajectory=True, **options)

    x, states = run()
    wanted, wanted_states = plainly(monkeypatch, run)
    assert float((x - wanted).abs().max()) <= 1e-6
    assert float((states - wanted_states).abs().max()) <= 1e-6 * float(wanted_states.abs().max())


@pytest.mark.parametrize("rank", [1, 2])
def test_a_row_of_the_table_is_the_embedding_itself(rank):
    model = network(rank=rank)
    x, _, labels = arguments(model, 3)
    times = [999, 500, 500, 250, 0]
    table = embedding_table(model, rows(*times), {"labels": labels})
    for row, t in enumerate(times):
        wanted = model(x, torch.full((3,), t), labels)
        given = model.forward_embedded(x, table.at(row))
        assert float((given - wanted).detach().abs().max()) <= 1e-6 * float(wanted.detach().abs().max())


def test_lanes_at_their_own_rows_gather_what_a_row_gives():
    model = network()
    labels = torch.tensor([2, 0, 2])
    times = rows(900, 600, 600, 300)
    table = embedding_table(model, times, {"labels": labels})
    table.hold(0)
    assert table.is_whole
    lane_row = torch.tensor([3, 0, 2], dtype=torch.int32)
    wanted = torch.stack([table.at(row)[lane] for lane, row in enumerate(lane_row.tolist())])
    assert torch.equal(table.gather(lane_row), wanted)
    alike = embedding_table(model, times, {})
    alike.hold(0)
    assert torch.equal(alike.gather(lane_row), torch.cat([alike.at(row) for row in lane_row.tolist()]))


def step_operators(sampler, options):
    """The operators of one step in the middle of a chain."""
    seen = []

    watch = Operators()

    def callback(moment):
        seen.append(Counter(watch.counts))

    with watch:
        sampler.sample(2, callback=callback, **options)
    return seen[5] - seen[4]


def test_a_step_does_no_work_for_its_time_and_class(monkeypatch):
    sampler = fd.Sampler(network(attention_levels=()), SCHEDULE, steps=10, shape=SHAPE)
    options = {"cond": {"labels": torch.tensor([0, 1])}}
    with_table = step_operators(sampler, options)
    without = plainly(monkeypatch, lambda: step_operators(sampler, options))
    of_the_embedding = {"aten.cos.default", "aten.sin.default", "aten.embedding.default"}
    matrices = {"aten.addmm.default", "aten.linear.default"}
    assert of_the_embedding <= set(without)
    assert sum(without[name] for name in matrices) == 3
    assert not of_the_embedding & set(with_table)
    assert sum(with_table[name] for name in matrices) == 0
    # a slice of the table and, where the classes differ, a gather
    assert sum((with_table - without).values()) <= 2
    assert sum(without.values()) - sum(with_table.values()) >= 15
    alone = step_operators(sampler, {"cond": {"labels": 1}})
    assert alone["aten.index_select.default"] == 0


def test_the_table_computes_a_chunk_of_rows_at_a_time(monkeypatch):
    model = network()
    batches = []
    embed = model.embedding.forward
    monkeypatch.setattr(
        type(model.embedding), "forward", lambda self, t, y: batches.append(len(t)) or embed(t, y)
    )
    sampler = fd.Sampler(model, SCHEDULE, solver="ddpm", steps=150, shape=SHAPE)
    sampler.sample(4, cond={"labels": torch.tensor([0, 1, 1, 0])})
    assert batches == [2 * CHUNK_ROWS, 2 * CHUNK_ROWS, 2 * (150 - 2 * CHUNK_ROWS)]
    batches.clear()
    fd.Sampler(model, SCHEDULE, solver="heun", steps=10, shape=SHAPE).sample(4)
    assert batches == [10]  # 19 rows at 10 times


def test_the_bytes_are_stated_and_capped():
    model = network()
    times = rows(*range(200))
    labels = torch.arange(3)
    table = embedding_table(model, times, {"labels": labels})
    assert table.nbytes == CHUNK_ROWS * 3 * model.embedding_size * 4 <= MAX_BYTES
    assert not table.is_whole
    row_bytes = 3 * model.embedding_size * 4
    smaller = embedding_table(model, times, {"labels": labels}, max_bytes=10 * row_bytes)
    assert smaller.nbytes == 10 * row_bytes
    assert torch.allclose(smaller.at(150), table.at(150), rtol=1e-5, atol=1e-6)
    assert embedding_table(model, times, {"labels": labels}, max_bytes=row_bytes - 1) is None


def test_a_table_over_the_cap_leaves_the_chain_as_it_was(monkeypatch):
    sampler = fd.Sampler(network(), SCHEDULE, steps=5, shape=SHAPE)
    wanted = plainly(monkeypatch, lambda: sampler.sample(2))
    monkeypatch.setattr(chain, "embedding_table", partial(embedding_table, max_bytes=1))
    assert torch.equal(sampler.sample(2), wanted)


def test_weights_that_change_between_calls_are_followed(monkeypatch):
    sampler = fd.Sampler(network(), SCHEDULE, steps=5, shape=SHAPE)
    before = sampler.sample(2)
    with torch.no_grad():
        sampler.model.embedding.time1.weight.mul_(1.5)
    after = sampler.sample(2)
    assert float((after - before).abs().max()) > 1e-3
    assert torch.allclose(after, plainly(monkeypatch, lambda: sampler.sample(2)), atol=1e-6)


class Loud(UNet):
    def embed(self, t, labels=None):
        return super().embed(t, labels) * 2


def patched():
    model = network()
    model.forward = lambda x, t, labels=None: x
    return model


def hooked(inside):
    model = network()
    (model.embedding.time2 if inside else model).register_forward_hook(lambda module, args, out: out)
    return model


@pytest.mark.parametrize(
    ("model", "cond"),
    [
        (lambda x, t: x, {}),
        (Loud(2, model_channels=8), {}),
        (patched(), {}),
        (hooked(True), {}),
        (hooked(False), {}),
        (torch.compile(network()), {}),
        (network(), {"labels": torch.zeros(2, dtype=torch.int64), "text": torch.zeros(2)}),
        (network(), {"labels": torch.zeros(2)}),
        (network(num_classes=0), {"labels": torch.zeros(2, dtype=torch.int64)}),
        (network(), {"labels": torch.zeros(0, dtype=torch.int64)}),
    ],
)
def test_what_is_no_plain_unet_is_called_as_it_is(model, cond):
    assert embedding_table(model, rows(*range(5)), cond) is None


def test_a_hook_of_all_modules_is_not_gone_round():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, out: out)
    try:
        assert embedding_table(network(), rows(*range(5)), {}) is None
    finally:
        handle.remove()
    assert embedding_table(network(), rows(*range(5)), {}) is not None


def test_a_captured_step_has_no_table_that_is_refilled_every_few_rows():
    model, cond = network(), {"labels": torch.zeros(3, dtype=torch.int64)}
    row = 4 * model.embedding_size  # of one class in use; of three lanes where shapes are fixed
    for most, there in ((15, False), (16, True)):
        found = embedding_table(model, rows(*range(50)), cond, fixed=True, max_bytes=3 * most * row)
        assert (found is not None) == there
    assert embedding_table(model, rows(*range(50)), cond, max_bytes=3 * row) is not None
    assert embedding_table(model, rows(*range(5)), cond, fixed=True, max_bytes=15 * row) is not None


def test_chains_of_one_row_and_of_no_samples_need_no_table():
    assert embedding_table(network(), rows(5), {}) is None
    sampler = fd.Sampler(network(), SCHEDULE, steps=2, shape=SHAPE)
    assert sampler.sample(0, cond={"labels": torch.zeros(0, dtype=torch.int64)}).shape == (0, *SHAPE)


def test_lower_precision_tabulates_in_its_own():
    model = network().to(torch.bfloat16)
    table = embedding_table(model, rows(*range(5)), {})
    assert table.buffer.dtype == torch.bfloat16
    assert torch.equal(table.at(3), model.embed(torch.arange(5))[3:4])
