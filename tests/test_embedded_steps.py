"""Compiled and captured steps of a U-Net take its embedding from a table: on stand-ins of both runtimes."""

from __future__ import annotations

import pytest
import torch
from chains import SCHEDULE, one_thread
from cuda_stand_in import capture_on_cpu
from networks import network
from package_stand_in import Loader, refuse_to_compile, said, stand_ins

import fastdiff as fd
from fastdiff import compiled, graph, packages
from fastdiff.nn import embedding_table
from fastdiff.nn.tabulated import CHUNK_ROWS

_one_thread = pytest.fixture(autouse=True)(one_thread)
compiler = pytest.fixture(stand_ins)
cuda = pytest.fixture(capture_on_cpu)
SHAPE = (2, 4, 4)
LONG = CHUNK_ROWS + 6
CASES = {
    "no class": (3, {}),
    "one sample": (1, {"cond": {"labels": [2]}}),
    "classes": (3, {"cond": {"labels": [0, 2, -1]}}),
    "one class": (3, {"cond": {"labels": 1}}),
    "guidance": (3, {"cond": {"labels": [0, 1, 1]}, "guidance_scale": [1.0, 2.0, 0.5]}),
    "more samples than classes": (6, {"cond": {"labels": [0, 1, 2, 2, 1, -1]}}),
}


def unet() -> fd.UNet:
    """Without attention, whose matrix products would be counted; float64, so that no rounding grows."""
    return network(attention_levels=(), channel_mult=(1,)).double()


def pair(net: fd.UNet, steps: int = 5, **fast) -> tuple[fd.Sampler, fd.Sampler]:
    """Two samplers of one network: compiled or captured as `fast` says, and eager."""
    given = {"solver": "ddpm", "steps": steps, "shape": SHAPE, "dtype": torch.float64}
    plain = {"graph": False, "compile": False}
    return tuple(fd.Sampler(net, SCHEDULE, **given, **options) for options in (plain | fast, plain))


def assert_same(samplers: tuple[fd.Sampler, fd.Sampler], num: int = 3, **arguments) -> torch.Tensor:
    x, expected = (sampler.sample(num, **arguments) for sampler in samplers)
    # the state is float32: its last bit, which a network of such weights does not make larger than this
    assert float((x - expected).abs().max()) <= 1e-5
    return x


def operations(method: str, *given: torch.Tensor) -> list[str]:
    exported = packages.export(packages.structure_copy(unet()), packages.Call(given, {}, method))
    return [str(node.target) for node in exported.program.graph.nodes if node.op == "call_function"]


OF_TIME = {"aten.cos.default", "aten.sin.default", "aten.select.int"}
PRODUCTS = {"aten.linear.default", "aten.addmm.default"}


def test_what_is_compiled_behind_the_embedding_does_no_work_for_it(compiler):
    x = torch.zeros(2, *SHAPE, dtype=torch.float64)
    whole = operations("__call__", x, torch.zeros(2, dtype=torch.int64))
    behind = operations("forward_embedded", x, torch.zeros(2, unet().embedding_size, dtype=torch.float64))
    assert set(whole) >= OF_TIME
    assert not OF_TIME & set(behind)
    assert sum(name in PRODUCTS for name in whole) == 3, (
        "of the embedding: two of the time, one of the blocks"
    )
    assert sum(name in PRODUCTS for name in behind) == 0
    assert whole.count("aten.conv2d.default") == behind.count("aten.conv2d.default") > 0


@pytest.mark.parametrize("case", ["no class", "one sample", "guidance"])
def test_a_compiled_chain_with_a_table_is_the_eager_chain(compiler, case, caplog):
    num, arguments = CASES[case]
    assert_same(pair(unet(), compile=True), num, **arguments)
    assert len(compiler.runs) == 1
    assert not said(caplog)


def test_a_compiled_chain_goes_from_chunk_to_chunk_and_follows_weights_in_place(compiler, monkeypatch):
    net, taken = unet(), []
    run = Loader.run
    monkeypatch.setattr(Loader, "run", lambda self, given: taken.append(len(given)) or run(self, given))
    samplers, arguments = pair(net, LONG, compile=True), {"cond": {"labels": [0, 2, 1]}}
    results = [assert_same(samplers, **arguments)]
    assert taken == [2] * (2 + LONG), "compared at two rows, then every row with its input and its embedding"
    for weight in (
        net.embedding.time1.weight,
        net.embedding.classes.weight,
        net.blocks[0].residual.conv1.weight,
    ):
        weight.data.mul_(1.5)
        results.append(assert_same(samplers, **arguments))
        assert float((results[-1] - results[-2]).abs().max()) > 1e-3
    assert len(compiler.runs) == 1


def test_a_package_serves_whichever_classes_there_are(compiler):
    samplers = pair(unet(), compile=True)
    for labels in ([0, 1, 2], [2, 2, 2], [0, 0, -1]):
        assert_same(samplers, cond={"labels": labels})
    assert len(compiler.runs) == 1
    assert_same(samplers)
    assert len(compiler.runs) == 2, "without classes all lanes share a line"


def test_a_package_of_another_embedding_is_found_out(compiler, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", refuse_to_compile)
    run = Loader.run
    monkeypatch.setattr(Loader, "run", lambda self, given: run(self, [given[0], given[1] * (1 + 1e-6)]))
    assert_same(pair(unet(), compile=True))
    assert "compiled it is off by" in said(caplog)[-1]


def test_a_unet_with_an_embedding_of_its_own_is_compiled_and_captured_whole(compiler, cuda):
    net = unet()
    net.embedding.register_forward_hook(lambda module, args, out: out * 1.1)
    assert_same(pair(net, compile=True), cond={"labels": [0, 1, 2]})
    (plan,) = compiled._plans[net].values()
    assert plan._call.method == "__call__"
    assert_same(pair(net, graph="auto"), cond={"labels": [0, 1, 2]})
    assert cuda.calls.count("capture") == 1


def test_what_torch_compiles_takes_the_network_whole(compiler, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: asked.append(f) or f)
    compiler.fails = "the compilation failed"
    net = unet()
    samplers = pair(net, compile=True)
    for seed in range(2):
        assert_same(samplers, seed=seed)
    assert asked == [net]
    (line,) = said(caplog)
    assert "compiled by torch.compile" in line


@pytest.mark.parametrize("case", CASES)
def test_a_captured_chain_with_a_table_is_the_eager_chain(cuda, case):
    num, arguments = CASES[case]
    samplers = pair(unet(), graph="auto")
    for seed in range(2):
        assert_same(samplers, num, seed=seed, **arguments)
    assert cuda.calls.count("capture") == 1
    assert_same(
        pair(unet(), graph._WARM_UPS - 1, graph="auto"), num, **arguments
    )  # the warm-up runs past its end


def test_a_replay_does_no_work_for_time_and_class(cuda):
    names = {}
    for embedded in (True, False):
        net = unet()
        if not embedded:
            net.register_forward_hook(lambda module, args, out: out)
        pair(net, graph="auto")[0].sample(3, cond={"labels": [0, 1, 2]})
        names[embedded] = cuda.tape.names()
    of_both = OF_TIME - {"aten.select.int"} | {"aten.embedding.default"}
    assert set(names[False]) >= of_both
    assert not of_both & set(names[True])
    assert [sum(name in PRODUCTS for name in names[embedded]) for embedded in (True, False)] == [0, 3]
    gathered = {name: names[True].count(name) - names[False].count(name) for name in set(names[True])}
    assert gathered["aten.index_select.default"] == 2, "the row's place, the lanes' lines"
    assert len(names[True]) <= len(names[False]) - 15


def test_a_chunk_is_computed_before_its_first_replay_and_nothing_else_is_between(cuda, monkeypatch):
    net = unet()
    embed = net.embedding.forward
    monkeypatch.setattr(
        type(net.embedding), "forward", lambda self, *given: cuda.calls.append("embed") or embed(*given)
    )
    samplers = pair(net, LONG, graph="auto")
    samplers[0].sample(3)
    chain = [
        "wait for the chain before",
        "embed",
        *["replay"] * CHUNK_ROWS,
        "embed",
        *["replay"] * 6,
        "record",
    ]
    first = cuda.calls.index("capture")
    assert cuda.calls[:first].count("embed") == 1, "the warm-up runs on a chunk that is there"
    assert cuda.calls[first + 2 :] == chain
    cuda.calls.clear()
    with cuda.between() as tape:
        samplers[0].sample(3, seed=1)
    assert cuda.calls == chain
    names = {
        replays: [str(func) for func, at, *_ in tape.notes if at == replays] for replays in range(1, LONG)
    }
    assert "aten.sin.default" in names.pop(CHUNK_ROWS)
    assert not any(names.values()), "what lies between two replays of a chunk"


def test_a_captured_chain_follows_classes_and_weights_without_another_capture(cuda):
    net = unet()
    samplers = pair(net, LONG, graph="auto")
    results = []
    for labels in ([0, 1, 2], [2, 2, 2]):
        results.append(assert_same(samplers, cond={"labels": labels}))
    for weight in (
        net.embedding.time1.weight,
        net.embedding.classes.weight,
        net.blocks[0].residual.conv1.weight,
    ):
        weight.data.mul_(1.5)
        results.append(assert_same(samplers, cond={"labels": [2, 2, 2]}))
        assert float((results[-1] - results[-2]).abs().max()) > 1e-3
    assert cuda.calls.count("capture") == 1
    net.embedding.register_forward_hook(lambda module, args, out: out * 1.1)
    assert_same(samplers, cond={"labels": [2, 2, 2]})
    assert cuda.calls.count("capture") == 2


@pytest.mark.parametrize("num", [2, 6])
def test_a_table_of_fixed_shapes_reads_no_class(num):
    model = unet()
    labels = torch.tensor([2, 7, -5, 0, 1, 2][:num])
    times = fd.nn.RowTimes([900, 300], torch.device("cpu"), torch.int64)
    table = embedding_table(model, times, {"labels": labels}, fixed=True)
    alike = embedding_table(model, times, {"labels": labels.clone().fill_(1)}, fixed=True)
    shapes = [{name: value.shape for name, value in t.given.items()} for t in (table, alike)]
    assert shapes[0] == shapes[1]
    assert len(table.given["classes"]) == min(num, model.num_classes + 1)
    with torch.no_grad():
        wanted = model.embed(torch.full((num,), 300), labels)
    table.hold(1)
    for gathered in (table.at(1), table.by_lane(1), table.gather(torch.tensor([1]))):
        assert torch.allclose(gathered, wanted, rtol=1e-12)
    on_meta = embedding_table(model, times, {"labels": labels.to("meta")}, fixed=True)
    assert on_meta.given["classes"].device.type == "meta", "whose values cannot be read"
