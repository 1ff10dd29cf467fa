"""A stand-in for the compiler and for AOTInductor's runtime, which reads a network's graph node by node.

Everything around them is real: the export, the files, what is lent, what is compared. As AOTInductor does, it
reads weights where they lie when it runs, and keeps for ever what it is lent.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import SCHEDULE, SHAPE

import fastdiff as fd
from fastdiff import compiled, execution, packages

_never_freed: list[Any] = []


class Compiler:
    """Counts compilations; its package is the exported program itself."""

    def __init__(self) -> None:
        self.runs: list[Path] = []
        self.fails = ""

    def __call__(self, program: Path, package: Path, config: Any, aside: bool) -> None:
        self.runs.append(package)
        if self.fails:
            raise packages.Refused(self.fails)
        shutil.copy(program, package)


class Loader:
    """AOTIModelPackageLoader, as far as packages.py uses it."""

    spoil = 0.0  # a relative error of every output, for what compares to find

    def __init__(self, path: str, name: str, single: bool, runners: int, device: int) -> None:
        program = torch.export.load(path)
        signature = program.graph_signature
        named = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.graph = program.graph_module
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        self.names = [named.get(node.name) for node in inputs]
        self.shapes = [node.meta["val"].shape for node in inputs if node.name not in named]
        self.lent: dict[str, torch.Tensor] = {}

    def get_constant_fqns(self) -> list[str]:
        return [name for name in self.names if name is not None]

    def load_constants(self, lent: dict[str, torch.Tensor], *flags: bool) -> None:
        assert flags == (False, True, True), "active, complete, kept by the caller"
        self.lent = lent
        _never_freed.append(lent)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        # compiled code looks at neither, and reads what it takes to be there
        assert [a.shape for a in inputs] == self.shapes
        assert all(a.is_contiguous() for a in inputs)
        given = iter(inputs)
        arguments = [next(given) if name is None else self.lent[name] for name in self.names]
        (out,) = torch.fx.Interpreter(self.graph).run(*arguments)
        return [out * (1 + self.spoil)]


class Net(torch.nn.Module):
    """Convolutions with a scalar weight, a buffer, a class, and a setting."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = torch.nn.Conv2d(2, 2 * outputs, 3, padding=1)
        for parameter in self.conv.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        self.weight = torch.nn.Parameter(torch.tensor(0.7))
        self.register_buffer("offset", torch.tensor([0.1, -0.2]), persistent=False)
        self.gain = 1.0

    def forward(self, x, t, labels=None):
        shift = torch.cos(t.to(x.dtype) / 300)
        if labels is not None:
            shift = shift + labels.to(x.dtype) / 5
        h = torch.tanh(self.weight * x * self.gain + shift.view(-1, 1, 1, 1) + self.offset.view(1, -1, 1, 1))
        return self.conv(h)


def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """A fixture: the stand-ins, an empty cache and no plans."""
    stand_in = Compiler()
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "_compile", stand_in)
    monkeypatch.setattr(packages, "has_compiler", lambda: True)
    monkeypatch.setattr(execution, "has_compiler", lambda: True)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    compiled._plans.clear()
    return stand_in


def both(net, **options) -> tuple[fd.Sampler, fd.Sampler]:
    """The compiled and the eager sampler of one network."""
    given = {"solver": "ddpm", "steps": 5, "shape": SHAPE} | options
    return fd.Sampler(net, SCHEDULE, compile=True, **given), fd.Sampler(net, SCHEDULE, compile=False, **given)


def assert_same(pair: tuple[fd.Sampler, fd.Sampler], **arguments) -> torch.Tensor:
    """The two samplers' chains, which differ by a compiled network's rounding at most: here by nothing."""
    x, expected = (sampler.sample(3, **arguments) for sampler in pair)
    assert torch.equal(x, expected)
    return x


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What fastdiff has said."""
    return [record.getMessage() for record in caplog.records if record.name == "fastdiff"]


def refuse_to_compile(*args, **kwargs):
    raise RuntimeError("torch.compile is not to be used")
