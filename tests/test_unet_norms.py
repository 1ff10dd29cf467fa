"""The norms of the U-Net: plain, and fused with their modulation and SiLU."""

from __future__ import annotations

import pytest
import torch
from networks import network
from operators import Operators
from torch.nn import functional as F

from fastdiff.nn.layers import ModulatedNormSiLU, num_groups


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 5, 3), (1, 6, 1, 7), (2, 12, 1, 1)])
def test_every_form_of_the_scale_shift_norm_is_its_formula(shape, fused, shared, layout):
    groups = num_groups(shape[1])
    x = torch.randn(shape).to(memory_format=layout)
    scale, shift = torch.randn(1 if shared else shape[0], 2 * shape[1]).chunk(2, dim=1)
    grouped = x.double().reshape(shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    normed = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(shape)
    expected = F.silu(normed * scale[:, :, None, None] + shift[:, :, None, None])
    before = x.clone()
    norm = ModulatedNormSiLU(groups)
    norm.fused = fused
    result = norm(x, scale, shift)
    # A mean of at most 40 numbers, a root, two products, a sum and a logistic function, 8 half-ulps each.
    torch.testing.assert_close(
        result.double(), expected, rtol=0, atol=48 * 2**-24 * float(expected.abs().max())
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_norms_are_the_same_network_up_to_rounding(rank, batch):
    torch.manual_seed(0)
    model = network(rank=rank, channel_mult=(1, 2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(batch, 2, *(6,) * rank), torch.randint(0, 1000, (batch,))
    names, found = list(model.state_dict()), []
    for fused in (False, True):
        model.fuse_norms(fused)
        model.zero_grad()
        out = model(x, t)
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert list(model.state_dict()) == names
    assert not torch.equal(found[0][0], found[1][0])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


def test_an_exporter_sees_the_plain_norms_of_a_fused_network():
    model = network().eval()
    model.fuse_norms()
    given = (torch.randn(2, 2, 6, 6), torch.tensor([3, 5]))
    with Operators() as operators, torch.no_grad():
        model(*given)
    assert operators.counts["fastdiff.group_norm_silu.default"] > 0
    exported = torch.export.export(model, given)
    assert not [node for node in exported.graph.nodes if "fastdiff" in str(node.target)]
