"""The U-Net: what it computes, and what it promises to capture, export and compile."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import ARGUMENTS, arguments, network
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.nn import UNet
from fastdiff.nn.layers import num_groups


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks so small take longer on two threads, and much longer where other programs share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(a: Tensor, b: Tensor, model: UNet) -> None:
    """Within what the order of float32 sums may change: sqrt(fan-in) half-ulps of the largest in a layer."""
    fans = [p[0].numel() for p in model.parameters() if p.ndim > 1]
    tolerance = sum(map(math.sqrt, fans)) * 2**-24 * b.abs().max()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance


def test_assert_close_sees_a_thousandth():
    model = network()
    out = model(*arguments(model))
    assert_close(out, out.clone(), model)
    with pytest.raises(AssertionError):
        assert_close(out * 1.001, out, model)


@given(st.integers(1, 2000))
def test_group_norm_has_groups_for_any_channels(channels):
    groups = num_groups(channels)
    assert channels % groups == 0
    assert groups <= 32
    assert groups == 1 or channels // groups >= 4


def test_the_usual_widths_have_the_usual_groups():
    assert [num_groups(c) for c in (32, 64, 128, 256, 320, 7)] == [8, 16, 32, 32, 32, 1]


@pytest.mark.parametrize("shape", [(2, 2, 6, 6), (2, 2, 5, 7), (1, 2, 1, 1), (2, 2, 1, 9), (0, 2, 4, 4)])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_rank_2_takes_any_size(shape, learned_variance):
    model = network(learned_variance=learned_variance, channel_mult=(1, 1, 2))
    out = model(torch.randn(shape), torch.tensor(7))
    assert out.shape == (shape[0], 4 if learned_variance else 2, *shape[2:])
    assert out.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_rank_1_takes_any_length(length):
    model = network(rank=1)
    out = model(torch.randn(2, 2, length), torch.tensor([0, 5]), torch.tensor([0, -1]))
    assert out.shape == (2, 2, length)


def test_rank_1_is_rank_2_at_height_1():
    line, plane = network(rank=1), network(rank=2)
    state = {
        name: F.pad(p, (0, 0, 1, 1)) if p.ndim == 4 and p.shape[-1] == 3 else p
        for name, p in line.state_dict().items()
    }
    plane.load_state_dict(state)
    x, t, labels = arguments(line)
    assert_close(line(x, t, labels), plane(x.unsqueeze(2), t, labels).squeeze(2), line)


def test_a_new_network_says_0():
    model = UNet(1, **ARGUMENTS)
    assert torch.equal(model(*arguments(model)), torch.zeros(3, 1, 6, 6))


def test_no_class_is_class_minus_1():
    model = network()
    x, t, _ = arguments(model)
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), -1)))
    assert torch.equal(model(x, t), model(x, t, torch.tensor(-1)))


def test_every_time_and_class_counts():
    model = network()
    x = arguments(model)[0][:1].expand(8, -1, -1, -1)
    t = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    out = model(x, t, torch.tensor([-1, 0, 1, 2] * 2)).flatten(1)
    distance = torch.cdist(out, out) + 10 * torch.eye(8)
    assert distance.min() > 0.01


def test_a_time_may_be_float_int_or_one_for_all():
    model = network()
    x, _, labels = arguments(model)
    expected = model(x, torch.tensor([40, 40, 40]), labels)
    for dtype in (torch.float32, torch.float64, torch.int32):
        assert torch.equal(model(x, torch.full((3,), 40, dtype=dtype), labels), expected)
    for t in (torch.tensor(40), torch.tensor([40.0])):
        assert_close(model(x, t, labels), expected, model)
    between = model.embed(torch.tensor([40.0, 40.5, 41.0]))
    assert not torch.equal(between[0], between[1])
    assert not torch.equal(between[1], between[2])


def test_labels_outside_of_the_table_are_clamped():
    model = network()
    t = torch.tensor(3)
    far = torch.tensor([2**63 - 1, -7])
    assert torch.equal(model.embed(t, far), model.embed(t, torch.tensor([2, -1])))
    small = torch.tensor([255, 0], dtype=torch.uint8)  # 255 + 1 in uint8 would be 0, the null class
    assert torch.equal(model.embed(t, small), model.embed(t, torch.tensor([2, 0])))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_sample_alone_is_the_sample_in_the_batch(rank, layout):
    model = network(rank=rank).to(memory_format=layout)
    x, t, labels = arguments(model)
    whole = model(x, t, labels)
    for b in range(3):
        assert_close(model(x[b : b + 1], t[b : b + 1], labels[b : b + 1]), whole[b : b + 1], model)


def test_the_memory_layout_does_not_change_the_result():
    last, first = network(), network().to(memory_format=torch.contiguous_format)
    x, t, labels = arguments(last)
    assert_close(last(x, t, labels), first(x, t, labels), last)
    assert_close(last(x.to(memory_format=torch.channels_last), t, labels), first(x, t, labels), last)


def test_an_embedding_gathered_from_a_table_is_the_embedding():
    model = network()
    x, t, labels = arguments(model)
    times = torch.arange(5) * 100
    table = torch.stack([model.embed(times, torch.full((5,), c)) for c in (-1, 0, 1, 2)])  # [class, time, S]
    assert table.shape[2] == model.embedding_size
    t = times[[4, 0, 2]]
    assert_close(model.forward_embedded(x, table[labels + 1, t // 100]), model(x, t, labels), model)


def test_forward_is_its_two_stages_and_changes_no_argument():
    model = network()
    x, t, labels = arguments(model)
    emb = model.embed(t, labels)
    before = [v.clone() for v in (x, t, labels, emb)]
    with torch.inference_mode():
        out = model.forward_embedded(x, emb)
        assert torch.equal(out, model(x, t, labels))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, t, labels, emb), strict=True))


def test_bfloat16_keeps_the_frequencies():
    model = network().to(torch.bfloat16)
    seen = []
    model.embedding.time1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.embed(torch.tensor([999]))
    angle = 999 * torch.exp(-math.log(10_000) * torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.cat([angle.cos(), angle.sin()])
    # bfloat16 rounds to 2^-9, and the angle, up to 999, was rounded to float32 twice.
    torch.testing.assert_close(seen[0][0].double(), expected, rtol=0, atol=2**-9 + 999 * 2**-23)


def test_dropout_acts_in_training_only():
    model = network(dropout=0.5)
    x, t, labels = arguments(model)
    assert torch.equal(model(x, t, labels), model(x, t, labels))
    model.train()
    assert not torch.equal(model(x, t, labels), model(x, t, labels))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_finite_differences(shared, layout):
    model = network(1, model_channels=4, head_channels=4).double().to(memory_format=layout)
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(5) if shared else torch.tensor([5, 900])
    emb = model.embed(t).detach().requires_grad_()
    assert torch.autograd.gradcheck(model.forward_embedded, (x, emb), fast_mode=True)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_gradient_reaches_every_parameter(rank):
    model = network(rank=rank, dropout=0.1, learned_variance=True).train()
    model(*arguments(model)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_three_steps_of_training_reach_every_parameter():
    # The head, then the blocks' last convolutions begin at 0: what lies before them learns from step 3 on.
    torch.manual_seed(0)
    model = UNet(1, **ARGUMENTS)
    start = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, t, labels = arguments(model)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t, labels) - x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor is read on the host, is made from Python data, or gets its size from values."""

    names = ("_local_scalar_dense", "lift_fresh", "lift_fresh_copy", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name in self.names:
            raise AssertionError(f"{name} stops the device")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0]),
        lambda x: torch.tensor([1.0]),
        lambda x: x[x > 0],
        torch.nonzero,
    ],
)
def test_no_host_reads_sees_them(read):
    with NoHostReads(), pytest.raises(AssertionError, match="stops the device"):
        read(torch.ones(2).neg())


@pytest.mark.parametrize("rank", [1, 2])
def test_a_forward_pass_reads_nothing_on_the_host(rank):
    model = network(rank=rank)
    x, t, labels = arguments(model)
    with NoHostReads():
        model(x, t, labels)
        model(x, t)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_forward_pass_on_another_device_makes_nothing_on_the_cpu(rank):
    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            devices = {v.device.type for v in tree_leaves((args, kwargs, out)) if isinstance(v, Tensor)}
            assert devices <= {"cuda"}, f"{func} touches {devices}"
            return out

    model = network(rank=rank)

    def fake(v: Tensor) -> Tensor:
        return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")

    x, t, labels = arguments(model)
    with FakeTensorMode():
        state = {name: fake(v) for name, v in [*model.named_parameters(), *model.named_buffers()]}
        with OneDevice():
            functional_call(model, state, (fake(x), fake(t)))
            out = functional_call(model, state, (fake(x), fake(t), fake(labels)))
            with pytest.raises(AssertionError, match="touches"):
                torch.zeros(1) + out
    assert out.device.type == "cuda"


def test_it_exports_with_any_batch_size():
    model = network(rank=1)
    x, t, labels = arguments(model)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (x, t, labels), dynamic_shapes=(batch, batch, batch))
    assert_close(program.module()(x[1:], t[1:], labels[1:]), model(x[1:], t[1:], labels[1:]), model)


def test_it_compiles_whole_and_once_for_all_batch_sizes():
    torch._dynamo.reset()
    model, counter = network(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (3, 5):
        x, t, labels = arguments(model, batch)
        for argument in (x, t, labels):
            torch._dynamo.mark_dynamic(argument, 0)
        assert_close(compiled(x, t, labels), model(x, t, labels), model)
    assert counter.frame_count == 1


def test_num_parameters_counts_them():
    model = UNet(1, model_channels=4, channel_mult=(1,), num_res_blocks=1, embedding_channels=3)
    stem, head, norm = 4 * 9 + 4, 4 * 9 + 1, 8
    plain = 8 + 2 * (4 * 4 * 9 + 4)
    joined = 16 + (8 * 4 * 9 + 4) + (4 * 4 * 9 + 4) + (8 * 4 + 4)
    embedding = (4 * 3 + 3) + (3 * 3 + 3) + (3 + 1) * 5 * 8
    assert model.num_parameters == stem + head + norm + 3 * plain + 2 * joined + embedding


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"rank": 3}, "rank"),
        ({"model_channels": 8.0}, "model_channels"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"num_res_blocks": True}, "num_res_blocks"),
        ({"attention_levels": (2,)}, "attention_levels"),
        ({"head_channels": 5}, "head_channels"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        ({"num_classes": -1}, "num_classes"),
        ({"learned_variance": 1}, "learned_variance"),
        ({"embedding_channels": 0}, "embedding_channels"),
    ],
)
def test_a_bad_constructor_argument_is_named(changes, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        UNet(**{"in_channels": 1} | ARGUMENTS | changes)


X, T = torch.zeros(2, 2, 4, 4), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda m: m(None, T), TypeError, "x"),
        (lambda m: m(X[0], T), ValueError, "x"),
        (lambda m: m(X[:, :1], T), ValueError, "x"),
        (lambda m: m(X[..., :0], T), ValueError, "x"),
        (lambda m: m(X.double(), T), ValueError, "x"),
        (lambda m: m(X.to("meta"), T), ValueError, "x"),
        (lambda m: m(X, 5), TypeError, "t"),
        (lambda m: m(X, T > 0), TypeError, "t"),
        (lambda m: m(X, T[:, None]), ValueError, "t"),
        (lambda m: m(X, T.to("meta")), ValueError, "t"),
        (lambda m: m(X, torch.zeros(3)), ValueError, "t"),
        (lambda m: m(X, T, 3), TypeError, "labels"),
        (lambda m: m(X, T, T), TypeError, "labels"),
        (lambda m: m(X, T, torch.zeros(2, 1, dtype=torch.int64)), ValueError, "labels"),
        (lambda m: m(X, T, torch.zeros(3, dtype=torch.int64)), ValueError, "labels"),
        (lambda m: m(X, T, torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "labels"),
        (lambda m: m.forward_embedded(X, m.embed(T)[:, 1:]), ValueError, "emb"),
    ],
)
def test_a_bad_argument_is_named(call, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        call(network())


def test_labels_without_classes_are_refused():
    model = network(num_classes=0)
    with pytest.raises(ValueError, match=r"`labels` must be None.*`num_classes`"):
        model(X, T, torch.full((2,), -1))


def test_autocast_may_mix_dtypes():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X.bfloat16(), T)
    assert out.dtype == torch.bfloat16
