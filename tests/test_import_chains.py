"""Imported schedulers as real chains through the kernels: alone, and of different K in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import assert_close
from scheduler_cases import CASES, SHAPE, evaluated, imported, network, start

import fastdiff as fd
from fastdiff.adapters.diffusers import import_scheduler
from fastdiff.kernels import cpu, layout
from fastdiff.table import SamplingTable

# diffusers' own: deprecated algorithms, NumPy 2 on its arrays
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# Through the kernels, one or two of every K; a small state, as the interpreter is slow.
CHAINS = [
    case
    for case in CASES
    if str(case)
    in (
        "DDPM",
        "DDIM",
        "DDPM-variance_type=learned_range",
        "DDIM-eta=1.0-clip_sample=False",
        "EulerDiscrete-use_karras_sigmas=True",
        "EulerAncestralDiscrete-prediction_type=v_prediction",
        "HeunDiscrete",
        "PNDM",
        "DPMSolverMultistep",
        "DPMSolverMultistep-solver_order=3-use_karras_sigmas=True",
        "UniPCMultistep",
        "SASolver-predictor_order=3-corrector_order=3",
        "FlowMatchHeunDiscrete",
        "UnCLIP-variance_type=learned_range",
    )
    or str(case).startswith(("DDIM-eta=1.0", "DPMSolverMultistep-thresholding"))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_float32_chain_of_the_sampler_is_within_1e_5_of_float64(case):
    table = imported(case)
    x, noise = start(table)
    sampler = fd.Sampler(lambda u, t: network(u, t, table.learned).float(), table=table, shape=SHAPE)
    result = sampler.sample(2, x_T=x.float(), noise=noise.float())
    assert_close(result, evaluated(table, x, noise), 1e-5)


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_an_imported_scheduler_runs_with_drawn_noise(case, native, monkeypatch):
    if native and cpu.library(wait=True) is None:
        pytest.skip("needs a C++ compiler")
    if not native:
        monkeypatch.setattr(cpu, "library", lambda wait=False: None)
    chain_with_drawn_noise(imported(case), SHAPE)


@pytest.mark.interpret
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_an_imported_scheduler_runs_in_the_interpreter(case, monkeypatch):
    monkeypatch.setenv("FASTDIFF_BACKEND", "triton")
    chain_with_drawn_noise(imported(case, steps=5), (3, 2, 2))


def chain_with_drawn_noise(table: SamplingTable, shape: tuple[int, ...]) -> None:
    """A sampler that draws its own noise ends where the table does with the same."""
    sampler = fd.Sampler(lambda u, t: network(u, t, table.learned).float(), table=table, shape=shape)
    result = sampler.sample(2, seed=5)
    x = table.init_scale * fd.ops.normal(shape, 5, 2, 0, domain=0)
    noise = torch.stack([fd.ops.normal(shape, 5, 2, row) for row in range(table.num_rows)])
    assert_close(result, evaluated(table, x, noise), 1e-5)


def run_mixed(tables: list[SamplingTable], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """One slot for each table, all in one launch per step; returns the start and the result."""
    most = max(table.registers for table in tables)
    packed = [table.pack(registers=most) for table in tables]
    arena = layout.join(packed)
    lengths = np.array([len(p.coef) for p in packed])
    first = torch.tensor(np.cumsum(lengths) - lengths, dtype=torch.int32)
    rows = torch.tensor([table.num_rows for table in tables], dtype=torch.int32)
    scale = torch.tensor([table.init_scale for table in tables]).view(-1, 1, 1, 1)
    x = start_x = scale * fd.ops.normal(shape, 9, len(tables), 0, domain=0)
    x, registers = x.clone(), torch.zeros(most, *x.shape)
    u = torch.stack([float(t.c_in[0]) * state for t, state in zip(tables, x, strict=True)])
    for step in range(int(rows.max())):
        here = [min(step, table.num_rows - 1) for table in tables]
        outs = [network(u[i : i + 1], tables[i].t[row]) for i, row in enumerate(here)]
        row = first + torch.clamp(rows, max=step)  # a slot that is done stays at its idle row
        fd.ops.reverse_step(x, torch.cat(outs).float(), arena, row, 9, registers=registers, u=u)
    return start_x, x


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
def test_imported_schedulers_share_one_batch_with_each_other_and_with_our_solvers(backend, monkeypatch):
    monkeypatch.setenv("FASTDIFF_BACKEND", backend)
    """The interpreter, which is slow, goes without the long start of PNDM, and mixes thresholds elsewhere."""
    steps = 6 if backend == "torch" else 4
    without = ("learned",) if backend == "torch" else ("learned", "thresholding", "PNDM")
    tables = [imported(case, steps=steps) for case in CHAINS if not any(w in str(case) for w in without)]
    assert len(tables) >= 10
    assert {0, 1, 2} <= {table.registers for table in tables}
    levels = fd.NoiseLevels.karras(steps, sigma_min=0.1, sigma_max=10.0)
    clip = fd.DynamicThreshold(0.7) if backend == "torch" else (-1.0, 1.0)
    tables += [fd.compile_table(solver, levels, clip=clip) for solver in ("heun", "dpmpp_3m_sde", "ddim")]
    shape = (3, 1, 2)
    x, mixed = run_mixed(tables, shape)
    for slot, table in enumerate(tables):
        noise = [fd.ops.normal(shape, 9, len(tables), row)[slot : slot + 1] for row in range(table.num_rows)]
        assert_close(mixed[slot : slot + 1], evaluated(table, x[slot : slot + 1], noise), 1e-5)


@pytest.mark.parametrize(("begin", "scale"), [(None, "init_noise_sigma"), (5, "level")])
def test_a_chain_that_begins_part_of_the_way_down_starts_with_the_noise_of_its_level(begin, scale):
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    if begin:
        scheduler.set_begin_index(begin)
    table = import_scheduler(scheduler)
    expected = table.sigma[0] if scale == "level" else float(scheduler.init_noise_sigma)
    assert table.init_scale == pytest.approx(expected, rel=1e-6)
