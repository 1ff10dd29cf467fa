"""What a CUDA graph does not capture, and what it does: networks of one line each for `explain_capture`.

Each takes x [2, 4] and t [2] and has the offence in the line that ends with `# here`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdiff as fd

TABLE = torch.linspace(0, 1, 1000)
CHOICE = torch.tensor([0, 1])
SCALE = torch.tensor(0.5)
GENERATOR = torch.Generator().manual_seed(0)

OFFENCES: dict[str, tuple[str, Callable[[Tensor, Tensor], object]]] = {}
HARMLESS: dict[str, nn.Module | Callable[[Tensor, Tensor], object]] = {}


def offence(operation: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Registers a network whose `# here` line calls `operation`."""

    def register(network: Callable[..., object]) -> Callable[..., object]:
        OFFENCES[network.__name__] = operation, network
        return network

    return register


@offence("torch.Tensor.item")
def item(x, t):
    scale = t.max().item()  # here
    return x * scale


@offence("torch.Tensor.__float__")
def float_of_a_tensor(x, t):
    return x * float(x.sum())  # here


@offence("torch.Tensor.__int__")
def int_of_a_tensor(x, t):
    return x.repeat(int(t[0]), 1)  # here


@offence("torch.Tensor.__bool__")
def branch_on_a_value(x, t):
    if t[0] > 500:  # here
        return x
    return -x


@offence("torch.Tensor.__bool__")
def assert_on_a_tensor(x, t):
    assert (x < 10).all()  # here
    return x


@offence("torch.Tensor.tolist")
def tolist(x, t):
    return x * t.tolist()[0]  # here


@offence("torch.Tensor.__index__")
def value_as_an_index(x, t):
    return x[range(4)[t[0]]]  # here


@offence("torch.Tensor.__getitem__")
def element_by_a_scalar_tensor(x, t):
    return x[t[0]]  # here


@offence("torch.Tensor.cpu")
def cpu(x, t):
    return x.cpu() + 1  # here


@offence("torch.Tensor.to")
def to_the_cpu_without_blocking(x, t):
    return x.to("cpu", non_blocking=True)  # here


@offence("torch.Tensor.numpy")
def numpy_of_a_tensor(x, t):
    return torch.from_numpy(x.numpy())  # here


@offence("torch.Tensor.__array__")
def array_of_a_tensor(x, t):
    return np.asarray(x)  # here


@offence("torch.Tensor.cpu")
def numpy_by_way_of_the_cpu(x, t):
    return np.sin(x.cpu().numpy())  # here


@offence("torch.Tensor.__repr__")
def print_a_tensor(x, t):
    print(x)  # here
    return x


@offence("torch.Tensor.__format__")
def format_a_tensor(x, t):
    name = f"{x.sum():.3f}"  # here
    return x + len(name)


@offence("torch.nonzero")
def nonzero(x, t):
    return torch.nonzero(x)  # here


@offence("torch.where")
def where_without_values(x, t):
    return torch.where(x > 0)  # here


@offence("torch.Tensor.__getitem__")
def index_by_a_mask(x, t):
    return x[x > 0]  # here


@offence("torch.Tensor.__setitem__")
def assign_tensors_to_a_mask(x, t):
    y = x.clone()
    y[y > 0] = x.sum()  # here
    return y


@offence("torch.masked_select")
def masked_select(x, t):
    return torch.masked_select(x, x > 0)  # here


@offence("torch.unique")
def unique(x, t):
    return torch.unique(t)  # here


@offence("torch.repeat_interleave")
def repeat_by_a_tensor(x, t):
    return torch.repeat_interleave(x, t, dim=0)  # here


@offence("torch.arange")
def arange_to_a_value(x, t):
    return torch.arange(t[0], device=x.device)  # here


@offence("torch.nn.functional.one_hot")
def one_hot_without_a_number(x, t):
    return F.one_hot(t)  # here


@offence("torch.split")
def split_by_values(x, t):
    return torch.split(x, [*t])  # here


@offence("torch.bincount")
def bincount(x, t):
    return torch.bincount(t)  # here


@offence("torch.tensor")
def tensor_of_a_list(x, t):
    return x + torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda")  # here


@offence("torch.as_tensor")
def as_tensor_of_a_list(x, t):
    return x + torch.as_tensor([1.0, 2.0, 3.0, 4.0], device=x.device)  # here


@offence("torch.as_tensor")
def as_tensor_of_an_array(x, t):
    return x + torch.as_tensor(np.ones(4, np.float32), device=x.device)  # here


@offence("torch.Tensor.new_tensor")
def new_tensor(x, t):
    return x + x.new_tensor([1.0, 2.0, 3.0, 4.0])  # here


@offence("torch.Tensor.to")
def move_to_the_device(x, t):
    return x + torch.arange(4).to(x.device)  # here


@offence("torch.Tensor.cuda")
def cuda(x, t):
    return x + torch.ones(4).cuda()  # here


@offence("torch.Tensor.copy_")
def copy_into_a_tensor(x, t):
    return torch.empty_like(x).copy_(torch.zeros(2, 4))  # here


@offence("torch.Tensor.__getitem__")
def index_by_a_list(x, t):
    return x[:, [0, 2]]  # here


@offence("torch.Tensor.__getitem__")
def table_on_the_cpu(x, t):
    return x * TABLE[t][:, None]  # here


@offence("torch.Tensor.__getitem__")
def index_on_the_cpu(x, t):
    return x[:, CHOICE]  # here


@offence("torch.Tensor.add")
def constant_on_the_cpu(x, t):
    return x + TABLE[:4]  # here


@offence("torch.linalg.inv")
def inverse(x, t):
    return torch.linalg.inv(x[:, :2])  # here


@offence("torch.linalg.solve")
def solve(x, t):
    return torch.linalg.solve(x[:, :2], x[:, 2:])  # here


@offence("torch.linalg.eigh")
def eigenvalues(x, t):
    return torch.linalg.eigh(x[:, :2])  # here


@offence("torch.allclose")
def allclose(x, t):
    return x if torch.allclose(x, x) else -x  # here


@offence("torch.equal")
def equal(x, t):
    return x if torch.equal(x, x) else -x  # here


@offence("torch.multinomial")
def multinomial(x, t):
    return torch.multinomial(x.abs(), 1)  # here


@offence("torch.Tensor.masked_fill")
def fill_with_a_tensor(x, t):
    return x.masked_fill(x > 0, x.sum())  # here


@offence("torch.randn")
def generator_of_the_cpu(x, t):
    return x + torch.randn(4, generator=GENERATOR, device=x.device)  # here


@offence("torch.Tensor.pin_memory")
def pinned_memory(x, t):
    return x + torch.ones(4).pin_memory().to(x.device, non_blocking=True)  # here


@offence("torch.cuda.synchronize")
def synchronise(x, t):
    torch.cuda.synchronize()  # here
    return x


def streams_of_ones_own(x, t):
    with torch.cuda.stream(torch.cuda.Stream()):
        return x + 1


class Layers(nn.Module):
    """Layers of every harmless kind, in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 4)
        )
        self.classes = nn.Embedding(10, 4)
        self.register_buffer("table", torch.linspace(0, 1, 1000), persistent=False)
        self.register_buffer("choice", torch.tensor([0, 1, 1, 0]))
        self.steps = torch.tensor(4)  # 0-dim, on the CPU: its value is at hand

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.mlp(x) + self.classes(t % 10) * self.table[t][:, None]
        return h[:, self.choice] * self.steps if self.steps.item() > 2 else h


class LazyTable(nn.Module):
    """Builds its table in the first call, which a capture's warm-up is."""

    table: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 1000).to(x.device)
        return x * self.table[t][:, None]


def assign_a_number(x: Tensor, t: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0] = 0.0
    y[:, 1:] = 2.0
    return y


def timestep_mlp() -> Callable[[Tensor, Tensor], Tensor]:
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))

    def network(x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(4, device=t.device) * -2.0)
        angle = t[:, None] * frequencies
        return x + mlp(torch.cat((angle.sin(), angle.cos()), dim=1))

    return network


HARMLESS = {
    "layers": Layers(),
    "table built in the first call": LazyTable(),
    "timestep mlp in a closure": timestep_mlp(),
    "images": lambda x, t: F.interpolate(
        F.avg_pool2d(F.conv2d(x.view(2, 1, 2, 2), x.new_ones(3, 1, 1, 1)), 2), scale_factor=2.0
    ),
    "bilinear": lambda x, t: F.interpolate(x.view(2, 1, 2, 2), size=(5, 7), mode="bilinear"),
    "attention": lambda x, t: F.scaled_dot_product_attention(*[x.view(2, 1, 2, 2)] * 3, is_causal=True),
    "einsum": lambda x, t: torch.einsum("bi,bj->bij", x, x),
    "where": lambda x, t: torch.where(x > 0, x, 0.0).clamp(max=1),
    "mask filled with a number": lambda x, t: x.masked_fill(x > 0, 0.0),
    "number assigned to a mask": assign_a_number,
    "scalar on the cpu": lambda x, t: x * SCALE + SCALE.item(),
    "arange on the device": lambda x, t: x + torch.arange(4, device=x.device) + torch.ones_like(x),
    "one hot": lambda x, t: F.one_hot(t, 1000),
    "repeat by a number": lambda x, t: torch.repeat_interleave(x, 2, dim=0),
    "repeat to a known size": lambda x, t: torch.repeat_interleave(x, t, dim=0, output_size=4),
    "random numbers": lambda x, t: x + torch.randn_like(x) * torch.rand(2, 1, device=x.device),
    "reductions and sorting": lambda x, t: x.sort(dim=1).values.cumsum(1).topk(2, dim=1).values,
    "our norm": lambda x, t: fd.ops.group_norm_silu(x.view(2, 4, 1), 2),
    "our noise": lambda x, t: x + fd.ops.normal((4,), t, t, 0),
    "inverse without a check": lambda x, t: torch.linalg.inv_ex(x[:, :2]).inverse,
}
