"""`explain_capture`: what a CUDA graph cannot capture is found on a CPU, with its line; the rest passes."""

from __future__ import annotations

import copy
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from capture_cases import HARMLESS, OFFENCES, Layers, streams_of_ones_own
from networks import arguments, network
from torch import nn
from typer.testing import CliRunner

import fastdiff as fd
from fastdiff.capture import CAVEAT, explain_capture
from fastdiff.cli import app
from fastdiff.nn import EmbeddingTable

EXAMPLE = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("name", OFFENCES)
def test_an_offence_is_found_with_its_operation_and_line(name, capsys):
    operation, model = OFFENCES[name]
    report = explain_capture(model, EXAMPLE)
    assert not report.ok
    first = report.findings[0]
    assert first.operation == operation
    assert first.source.endswith("# here")
    assert first.file.endswith("capture_cases.py")
    assert all(f.line == first.line for f in report.findings)
    assert first.why
    assert first.remedy
    for part in (f"{first.file}:{first.line}", first.source, operation, first.why, first.remedy):
        assert part in str(report)


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_network_passes(name):
    report = explain_capture(HARMLESS[name], EXAMPLE)
    assert report.findings == ()
    assert report.complete
    assert report.operations > 0
    assert CAVEAT in str(report)
    assert report


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a build with CUDA can make a stream")
def test_what_a_build_without_cuda_refuses_is_named_and_not_raised():
    (finding,) = explain_capture(streams_of_ones_own, EXAMPLE).findings
    assert "torch.cuda.stream(" in finding.source
    assert "build of torch with CUDA" in finding.why


CONFIGURATIONS = {
    "images": {},
    "signals": {"rank": 1},
    "no classes": {"num_classes": 0, "attention_levels": ()},
    "learned variance": {"learned_variance": True, "attention_levels": (0, 1)},
    "dropout": {"dropout": 0.1, "num_res_blocks": 2},
    "three levels": {"channel_mult": (1, 2, 2), "embedding_channels": 12},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(("batch", "size"), [(1, 8), (3, 7)])
def test_the_unet_passes_in_every_configuration(name, batch, size):
    model = network(**CONFIGURATIONS[name])
    x, t, labels = arguments(model, batch, size)
    example = (x, t, {"labels": labels}) if model.num_classes else (x, t)
    assert explain_capture(model, example).findings == ()


def test_the_unet_passes_in_lower_precision_and_training_mode():
    model = network().train().to(torch.bfloat16)
    x, t, labels = arguments(model)
    assert explain_capture(model, (x.to(torch.bfloat16), t, labels)).ok
    assert all(module.training for module in model.modules())


def test_diffusers_unets_pass():
    diffusers = pytest.importorskip("diffusers")
    common = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    plain = diffusers.UNet2DModel(
        **common,
        attention_head_dim=4,
        num_class_embeds=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    t, labels = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    x = torch.zeros(2, 3, 8, 8)
    assert explain_capture(plain, (x, t, {"class_labels": labels})).findings == ()
    conditioned = diffusers.UNet2DConditionModel(
        **common,
        attention_head_dim=4,
        cross_attention_dim=6,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    text = {"encoder_hidden_states": torch.zeros(2, 5, 6)}
    assert explain_capture(conditioned, (torch.zeros(2, 4, 8, 8), t, text)).findings == ()


def test_the_fused_step_and_the_row_counter_pass():
    """What a graph of a chain holds beside the network."""
    sampler = fd.Sampler(network(), fd.NoiseSchedule.linear(10), steps=4, shape=(2, 8, 8))
    table = sampler.table.pack("cpu")

    def step(x, u, row, t, key, coef, plan):
        out = sampler.model(u, t)
        lanes = known = [None] * 3
        rest = (*lanes, None, False, *known)  # no guidance, given noise, threshold, known part
        torch.ops.fastdiff.reverse_step_(x, None, out, u, coef, plan, row, key, key, *rest)
        torch.ops.fastdiff.advance_(row, coef, t, None, None, None, None)

    x, whole = torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.int64)
    row = table.start(2)
    assert explain_capture(step, (x, x, row, whole, whole, table.coef, table.plan)).findings == ()


def test_an_embedding_gathered_from_a_table_passes():
    """What a step holds in place of the embedding where lanes stand at their own rows."""
    model = network()

    def step(x, buffer, first, lane_class, lane_row):
        table = SimpleNamespace(buffer=buffer, _first=first, given={"lane_class": lane_class})
        return model.forward_embedded(x, EmbeddingTable.gather(table, lane_row))

    whole = torch.zeros(2, dtype=torch.int64)
    example = (
        torch.zeros(2, 2, 8, 8),
        torch.zeros(30, model.embedding_size),
        torch.zeros(10).long(),
        whole,
        whole,
    )
    assert explain_capture(step, example).findings == ()


class Nested(nn.Module):
    def __init__(self, offend):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Identity(), Offender(offend))])

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return x


class Offender(nn.Module):
    def __init__(self, offend):
        super().__init__()
        self.offend = offend

    def forward(self, x):
        return self.offend(x)


def test_the_module_of_an_offence_is_named_by_its_path():
    model = Nested(lambda x: x.cpu().to(x.device))
    (to_cpu, to_cuda) = explain_capture(model, EXAMPLE).findings
    assert to_cpu.module == to_cuda.module == "blocks.1.1"
    assert (to_cpu.operation, to_cuda.operation) == ("torch.Tensor.cpu", "torch.Tensor.to")


def test_a_line_that_offends_often_is_one_finding():
    (finding,) = explain_capture(lambda x, t: [x.cpu() for _ in range(3)], EXAMPLE).findings
    assert finding.times == 3
    assert "(3 times)" in str(finding)


def test_what_follows_a_copy_is_examined_and_what_follows_a_value_is_not():
    def copies(x, t):
        y = x.cpu()
        return y, torch.linalg.inv(x[:, :2])

    assert [f.operation for f in explain_capture(copies, EXAMPLE).findings] == [
        "torch.Tensor.cpu",
        "torch.linalg.inv",
    ]
    report = explain_capture(lambda x, t: (x.sum().item(), x.cpu()), EXAMPLE)
    assert len(report.findings) == 1
    assert not report.complete
    assert "was not examined" in str(report)


def test_the_network_stays_as_it_is():
    model = Layers().train()
    before = copy.deepcopy(model.state_dict())
    identities = {name: id(p) for name, p in model.named_parameters()}
    explain_capture(model, EXAMPLE)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model.steps) is torch.Tensor
    assert all(module.training for module in model.modules())
    assert model(*EXAMPLE).device.type == "cpu"


def test_networks_behind_functions_are_found_and_left_alone():
    net = nn.Linear(4, 4)

    class Holder:
        def __init__(self):
            self.nets = {"main": net}

        def call(self, x, t):
            return self.nets["main"](x)

        def __call__(self, x, t):
            return self.call(x, t)

    def helper(n, x, t):
        return n(x)

    holder = Holder()
    models = [lambda x, t: net(x), partial(helper, net), holder, holder.call, lambda x, t: holder(x, t)]
    for model in models:
        assert explain_capture(model, EXAMPLE).findings == ()
    assert net.weight.device.type == "cpu"
    assert holder.nets["main"] is net


def test_tied_weights_stay_tied_and_hooks_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].register_forward_hook(lambda module, given, out: out.cpu())
    report = explain_capture(lambda x, t: model(x), EXAMPLE)
    assert report.findings[0].operation == "torch.Tensor.cpu"
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert explain_capture(lambda x, t: parametrised(x), EXAMPLE).ok


def test_a_compiled_network_is_examined_as_the_one_it_compiles():
    model = torch.compile(Nested(lambda x: x.cpu()))
    assert explain_capture(model, EXAMPLE).findings[0].module == "blocks.1.1"


def test_two_threads_do_not_meet():
    reports = {}

    def examine(name):
        reports[name] = explain_capture(OFFENCES[name][1], EXAMPLE)

    threads = [threading.Thread(target=examine, args=(name,)) for name in ("nonzero", "cpu")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: r.findings[0].operation for name, r in reports.items()} == {
        "nonzero": "torch.nonzero",
        "cpu": "torch.Tensor.cpu",
    }


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="`model` must be callable"):
        explain_capture(3, EXAMPLE)
    with pytest.raises(TypeError, match="`example` must be a tuple"):
        explain_capture(nn.Identity(), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`model` must run on `example`, but raised RuntimeError at .*:\d+"):
        explain_capture(lambda x, t: x @ x, EXAMPLE)
    with pytest.raises(ValueError, match="`model` must run on `example`, but raised TypeError"):
        explain_capture(nn.Linear(4, 4), EXAMPLE)
    locked = nn.Identity()
    locked.lock = threading.Lock()
    with pytest.raises(TypeError, match="`model` must be copyable"):
        explain_capture(lambda x, t: locked(x), EXAMPLE)


def doctor(*given):
    result = CliRunner().invoke(app, ["doctor", *given])
    return result.exit_code, result.output


def test_doctor_says_whether_a_model_can_be_captured(tmp_path):
    code, text = doctor("--model", "digits")
    assert code == 0
    assert text.startswith("UNet: nothing found")
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n\ndef good():\n    return nn.Conv2d(1, 1, 1).forward and Net(False)\n\n"
        "def bad():\n    return Net(True)\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, reads=True):\n        super().__init__()\n        self.reads = reads\n\n"
        "    def forward(self, x, t, y=None):\n        return x * t.max().item() if self.reads else x\n"
    )
    assert doctor("--model", f"{file}:good", "--shape", "1,8,8")[0] == 0
    for name in ("bad", "Net"):
        code, text = doctor("--model", f"{file}:{name}", "--shape", "1,8,8", "--cond", "y=3:long")
        assert code == 1
        assert f"{file}:15" in text
        assert "torch.Tensor.item" in text
    code, text = doctor("--model", f"{file}:bad", "--shape", "1,8,8", "--json")
    assert code == 1
    assert '"ok": false' in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "nowhere.py:net"], "must name a file that exists"),
        (["--model", f"{__file__}:missing"], "must name what"),
        (["--model", f"{__file__}:EXAMPLE", "--shape", "1"], "must name a network or build one"),
        (["--model", f"{__file__}:Nested"], "missing 1 required positional argument"),
        (["--model", f"{__file__}:arguments"], "`--shape` must be one sample's"),
        (["--model", "digits", "--cond", "labels"], "`--cond` must be name=shape"),
        (["--model", "digit"], "did you mean 'digits'"),
    ],
)
def test_doctor_names_what_is_wrong_with_a_model(given, message):
    code, text = doctor(*given)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1
