"""Captured steps: the order of calls and what is frozen, on a stand-in of torch.cuda and on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from chains import SCHEDULE, SHAPE
from cuda_stand_in import capture_on_cpu
from networks import network

import fastdiff as fd
from fastdiff import execution, graph


class Net(torch.nn.Module):
    """A small non-linear network with a weight, a class and a setting."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))
        self.outputs, self.gain = outputs, 1.0
        self.calls = []

    def forward(self, x, t, labels=None):
        self.calls.append(x.data_ptr())
        shift = torch.cos(t.to(x.dtype) / 300)
        if labels is not None:
            shift = shift + labels.to(x.dtype) / 5
        h = torch.tanh(self.weight * x * self.gain + shift.view(-1, 1, 1, 1))
        return torch.cat([h] * self.outputs, dim=1)


cuda = pytest.fixture(capture_on_cpu)


def both(net, solver="ddpm", **options) -> tuple[fd.Sampler, fd.Sampler]:
    """The captured and the eager sampler of one network."""
    given = {"solver": solver, "steps": 6, "shape": SHAPE, "compile": False} | options
    return fd.Sampler(net, SCHEDULE, **given), fd.Sampler(net, SCHEDULE, graph=False, **given)


def test_a_chain_warms_up_captures_once_and_replays_every_row(cuda):
    net = Net()
    captured, _ = both(net)
    captured.sample(2)
    assert cuda.calls == [
        "a side stream waits for the chain's stream",
        "enter a side stream",
        "leave a side stream",
        "the chain's stream waits for a side stream",
        "capture",
        "captured",
        "wait for the chain before",
        *["replay"] * 6,
        "record",
    ]
    assert len(net.calls) == graph._WARM_UPS + 1
    cuda.calls.clear()
    captured.sample(2, seed=1)
    assert cuda.calls == ["wait for the chain before", *["replay"] * 6, "record"]


def len_of_x0(moment: fd.Moment) -> int:
    """A callback, which makes every row leave a preview."""
    return len(moment.x0)


CASES = {
    "ddpm": ("ddpm", {}, {}),
    "a history": ("dpmpp_2m", {}, {}),
    "two evaluations a step": ("heun", {}, {}),
    "learned variance": ("ddpm", {"variance": "learned_range"}, {}),
    "bfloat16": ("ddpm", {"dtype": torch.bfloat16}, {}),
    "classes": ("ddim", {}, {"cond": {"labels": torch.tensor([1, 2, 3])}}),
    "one class for all": ("ddim", {}, {"cond": {"labels": 2}}),
    "guidance of some": (
        "ddpm", {}, {"cond": {"labels": [1, 2, 3]}, "uncond": {"labels": -1}, "guidance_scale": [1, 2, 0.5]}
    ),
    "dynamic thresholding": ("ddim", {"clip": fd.DynamicThreshold(0.9)}, {}),
    "a known part": (
        "ddpm", {}, {"known": torch.ones(SHAPE), "mask": torch.eye(4), "resample": 2, "callback": len_of_x0}
    ),
    "given noise": ("ddpm", {}, {"noise": torch.randn(6, 3, *SHAPE)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_replay_is_the_eager_step(cuda, case):
    solver, options, arguments = CASES[case]
    net = Net(1 + ("variance" in options)).to(options.get("dtype", torch.float32))
    captured, eager = both(net, solver, **options)
    for seed in (3, 4):
        expected, states = eager.sample(3, seed=seed, trajectory=True, **arguments)
        x, seen = captured.sample(3, seed=seed, trajectory=True, **arguments)
        assert torch.equal(x, expected)
        assert torch.equal(seen, states)
    assert cuda.calls.count("capture") == 1
    assert cuda.calls.count("replay") == 2 * (captured.table.num_rows + 5 * ("resample" in arguments))


def test_the_stand_in_sees_what_a_graph_would_freeze(cuda):
    """The helper on planted errors: a value that Python reads while capturing does not change any more."""
    net = Net()
    net.forward = lambda x, t: torch.tanh(x * float(t[0]) / 1000)  # read on the host
    captured, eager = both(net)
    assert not torch.allclose(captured.sample(2), eager.sample(2), atol=1e-3)


def test_what_a_chain_is_given_is_copied_into_the_buffers(cuda):
    captured, eager = both(Net())
    for labels in ([0, 1], [5, 9]):
        given = {"cond": {"labels": torch.tensor(labels)}, "x_T": torch.randn(2, *SHAPE), "seed": labels[0]}
        assert torch.equal(captured.sample(2, **given), eager.sample(2, **given))
    guided = {"uncond": {"labels": -1}, "cond": {"labels": [3, 4]}}
    for scale in (2.0, 4.0):
        assert torch.equal(
            captured.sample(2, guidance_scale=scale, **guided),
            eager.sample(2, guidance_scale=scale, **guided),
        )
    assert cuda.calls.count("capture") == 2


def test_what_was_one_tensor_may_be_two_in_the_next_call(cuda):
    """One buffer serves both of them in the first call; in the second each needs its own."""
    captured, eager = both(Net())
    ids = torch.arange(2)
    for labels in (ids, ids + 5):
        given = {"sample_ids": ids, "cond": {"labels": labels}}
        assert torch.equal(captured.sample(2, **given), eager.sample(2, **given))


def test_nothing_but_copies_runs_between_the_first_and_the_last_replay(cuda, monkeypatch):
    captured, _ = both(Net())
    noise = torch.randn(6, 2, *SHAPE)
    captured.sample(2, noise=noise, trajectory=True)
    cuda.calls.clear()
    with cuda.between() as tape:
        captured.sample(2, noise=noise, trajectory=True)
    inside = {str(func) for func, replays, *_ in tape.notes if 0 < replays < 6}
    assert inside == {"aten.copy_.default", "aten.select.int"}  # a view, and a copy into it
    assert {str(func) for func, *_ in tape.notes} > inside, "what allocates is seen"


def test_a_callback_sees_the_state_between_replays(cuda):
    captured, eager = both(Net())
    seen, expected = [], []
    captured.sample(2, callback=lambda moment: seen.append(torch.stack((moment.x, moment.x0))))
    eager.sample(2, callback=lambda moment: expected.append(torch.stack((moment.x, moment.x0))))
    assert torch.equal(torch.stack(seen), torch.stack(expected))


def test_a_callback_that_fails_leaves_the_graph_usable(cuda):
    captured, eager = both(Net())
    with pytest.raises(ZeroDivisionError):
        captured.sample(2, callback=lambda moment: 1 / 0)
    assert cuda.calls[-1] == "record"
    assert torch.equal(captured.sample(2), eager.sample(2))


def test_a_callback_may_sample(cuda):
    captured, eager = both(Net())
    inner = []
    x = captured.sample(2, callback=lambda moment: inner.append(captured.sample(2, seed=7)))
    assert torch.equal(x, eager.sample(2))
    assert all(torch.equal(y, eager.sample(2, seed=7)) for y in inner)
    assert len(inner) == 6


def test_autocast_is_captured_apart(cuda):
    captured, eager = both(Net())
    captured.sample(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(captured.sample(2), eager.sample(2))
    assert cuda.calls.count("capture") == 2


def test_a_result_stays_when_the_graph_runs_again(cuda):
    captured, _ = both(Net())
    first = captured.sample(2)
    kept = first.clone()
    captured.sample(2, seed=9)
    assert torch.equal(first, kept)


def test_threads_take_turns_in_the_buffers(cuda):
    captured, eager = both(Net())
    alone = [eager.sample(2, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: captured.sample(2, seed=seed), range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    runs = "".join({"replay": "r", "record": "."}.get(call, "") for call in cuda.calls)
    assert runs == "rrrrrr." * 8, "no chain's replays lie among another's"


def test_weights_changed_in_place_are_followed_and_new_ones_captured(cuda):
    net = Net()
    captured, eager = both(net)
    captured.sample(2)
    with torch.no_grad():
        net.weight.mul_(2)
    assert torch.equal(captured.sample(2), eager.sample(2))
    assert cuda.calls.count("capture") == 1
    net.load_state_dict({"weight": torch.tensor(0.3)})
    assert torch.equal(captured.sample(2), eager.sample(2))
    assert cuda.calls.count("capture") == 1
    net.weight = torch.nn.Parameter(torch.tensor(-0.4))
    assert torch.equal(captured.sample(2), eager.sample(2))
    assert cuda.calls.count("capture") == 2


@pytest.mark.parametrize("change", ["setting", "hook", "forward", "module"])
def test_a_network_that_has_become_another_is_captured_again(cuda, change):
    net = torch.nn.Module()
    net.inner, net.act = Net(), torch.nn.Tanh()
    hook = net.inner.register_forward_hook(lambda module, args, out: out)
    type(net).forward = lambda self, x, t: self.act(self.inner(x, t))
    captured, eager = both(net)
    try:
        captured.sample(2)
        if change == "setting":
            net.inner.gain = 2.0
        elif change == "hook":
            hook.remove()  # and there are as many as before
            net.inner.register_forward_hook(lambda module, args, out: 2 * out)
        elif change == "forward":
            net.inner.forward = lambda x, t: 0.5 * x
        else:
            net.act = torch.nn.Sigmoid()
        assert torch.equal(captured.sample(2), eager.sample(2))
    finally:
        del type(net).forward
    assert cuda.calls.count("capture") == 2


def test_the_least_recently_used_step_goes_first(cuda, monkeypatch):
    monkeypatch.setattr(graph, "_KEPT", 2)
    captured, _ = both(Net())
    for num in (1, 2, 1, 3, 1, 2):  # 3 puts 2 out, not 1
        captured.sample(num)
    assert cuda.calls.count("capture") == 4


def test_a_network_that_cannot_be_captured_runs_eagerly_after_one_warning(cuda, caplog):
    captured, eager = both(Net())
    cuda.refuses = RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    results = [captured.sample(2, seed=seed) for seed in (0, 1)]
    assert torch.equal(results[1], eager.sample(2, seed=1))
    assert cuda.calls.count("capture") == 1, "it is not tried again"
    assert cuda.calls.count("replay") == 0
    assert [record.getMessage() for record in caplog.records] == [
        "the network runs eagerly, its step cannot be captured as a CUDA graph: "
        "operation not permitted when stream is capturing"
    ]


def test_an_output_that_does_not_fit_is_refused_before_a_capture(cuda):
    net = Net()
    net.forward = lambda x, t: x[:1]
    with pytest.raises(ValueError, match="`model` must return"):
        both(net)[0].sample(2)
    assert "capture" not in cuda.calls


def test_only_a_module_is_captured_unasked():
    batch = type("Batch", (), {"x": torch.empty(2, device="meta")})
    batch.x = type("X", (), {"device": torch.device("cuda"), "numel": lambda self: 2})()
    cuda_device = torch.device("cuda")
    captures = {
        graph_: [
            execution.Execution(cuda_device, graph_, False)._captures(model, batch)
            for model in (Net(), lambda x, t: x)
        ]
        for graph_ in ("auto", True, False)
    }
    assert captures == {"auto": [True, False], True: [True, True], False: [False, False]}


def test_a_graph_without_a_gpu_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match='`graph` True needs a CUDA device, got cpu; use "auto"'):
        fd.Sampler(Net(), SCHEDULE, shape=SHAPE, graph=True)
    with pytest.raises(ValueError, match="`graph` must be"):
        fd.Sampler(Net(), SCHEDULE, shape=SHAPE, graph="always")


@pytest.fixture
def unet() -> fd.UNet:
    return network(num_classes=3).cuda()


def gpu_pair(unet: fd.UNet, solver: str, steps: int = 8) -> tuple[fd.Sampler, fd.Sampler]:
    given = {"solver": solver, "steps": steps, "shape": (2, 8, 8)}
    return fd.Sampler(unet, SCHEDULE, graph=True, **given), fd.Sampler(unet, SCHEDULE, graph=False, **given)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_a_replay_on_a_gpu_is_the_eager_step(unet, solver):
    captured, eager = gpu_pair(unet, solver)
    given = {"cond": {"labels": [0, 1, 2]}, "guidance_scale": 2.0}
    for seed in (0, 1):
        # the libraries may choose other algorithms under capture: rounding, over eight rows
        assert torch.allclose(
            captured.sample(3, seed=seed, **given), eager.sample(3, seed=seed, **given), atol=1e-3
        )


@pytest.mark.gpu
def test_a_chain_on_a_gpu_goes_from_chunk_to_chunk_of_its_embedding(unet):
    captured, eager = gpu_pair(unet, "ddim", 70)
    given = {"cond": {"labels": [0, 1, 2]}, "guidance_scale": 2.0}
    assert torch.allclose(captured.sample(3, **given), eager.sample(3, **given), atol=1e-3)


@pytest.mark.gpu
def test_replays_on_a_gpu_neither_wait_nor_allocate(unet):
    captured, _ = gpu_pair(unet, "ddpm")
    captured.sample(2, trajectory=True)
    allocated = []

    def watch(moment):
        if moment.row == 0:
            torch.cuda.set_sync_debug_mode("error")
        allocated.append(torch.cuda.memory_stats()["allocation.all.allocated"])
        if moment.row == moment.num_rows - 1:
            torch.cuda.set_sync_debug_mode("default")

    try:
        captured.sample(2, trajectory=True, callback=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(set(allocated)) == 1


@pytest.mark.gpu
def test_a_graph_on_a_gpu_follows_weights_changed_in_place(unet):
    captured, eager = gpu_pair(unet, "ddim")
    before = captured.sample(2)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    after = captured.sample(2)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after, eager.sample(2), atol=1e-3)
