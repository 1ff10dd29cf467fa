"""Pictures of schedules, levels and tables: written whole, telling, refused clearly."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from oracles import SCHEDULES
from PIL import Image

from fastdiff import words
from fastdiff.levels import NoiseLevels
from fastdiff.plots import _groups, show_levels, show_schedule, show_table
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import SOLVERS, compile_table
from fastdiff.spacing import space_timesteps

LEVELS = NoiseLevels.from_schedule(SCHEDULES["linear"], space_timesteps(1000, 8))


def ink(path: Path) -> int:
    """Pixels that are not white."""
    with Image.open(path) as picture:
        return int((np.asarray(picture.convert("L")) < 250).sum())


@pytest.mark.filterwarnings("error")
def test_schedules_are_drawn_over_each_other(tmp_path: Path) -> None:
    one = show_schedule({"linear": SCHEDULES["linear"]}, tmp_path / "one.png")
    both = show_schedule(
        {"linear": SCHEDULES["linear"], "zero": SCHEDULES["zero_snr"]}, tmp_path / "both.png"
    )
    assert ink(both) > ink(one) + 500


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "levels", [LEVELS, NoiseLevels.flow(6), NoiseLevels.karras(6, 0.02, 80.0)], ids=["vp", "flow", "ve"]
)
def test_levels_of_every_path_are_drawn(tmp_path: Path, levels: NoiseLevels) -> None:
    assert ink(show_levels(levels, tmp_path / "levels.png")) > 5000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("solver", ["ddpm", "heun", "unipc"])
def test_a_solver_is_drawn(tmp_path: Path, solver: str) -> None:
    path = show_table(compile_table(solver, LEVELS), tmp_path / "table.png")
    assert ink(path) > 50_000
    with Image.open(path) as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    red, blue = colours[:, 0] - colours[:, 2] > 80, colours[:, 2] - colours[:, 0] > 80
    assert min(red.sum(), blue.sum()) > 2000  # coefficients of both signs


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_large_panel_holds_every_coefficient_and_no_empty_column(solver: str) -> None:
    table = compile_table(solver, LEVELS)
    drawn = {title: (names, columns, kept) for title, names, columns, kept in _groups(table)}
    assert list(drawn) == ["x0 =", "x' =", *(f"r{k}' =" for k in range(1, table.registers + 1))]
    for j, (names, columns, kept) in enumerate(list(drawn.values())[1:]):
        assert columns.any(axis=0).all()
        for name, column in zip(names, columns.T, strict=True):
            full = {"x0": table.from_x0[:, j], "out": table.from_out[:, j], "z": table.from_noise[:, j]}
            k = 0 if name == "x" else int(name[1:]) if name not in full else -1
            assert column.tolist() == (full[name] if k < 0 else table.from_state[:, j, k]).tolist()
        counted = np.count_nonzero(table.from_state[:, j]) + sum(
            np.count_nonzero(part[:, j]) for part in (table.from_x0, table.from_out, table.from_noise)
        )
        assert np.count_nonzero(columns) == counted
        assert not (j == 0 and kept.any())


def test_a_picture_has_the_format_of_its_suffix(tmp_path: Path) -> None:
    with Image.open(show_table(compile_table("ddim", LEVELS), tmp_path / "table.jpg")) as picture:
        assert picture.format == "JPEG"


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff-engine\[bench\]'"):
        show_levels(LEVELS, tmp_path / "levels.png")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must end in"):
        show_table(compile_table("ddim", LEVELS), tmp_path / "table.txt")
    with pytest.raises(ValueError, match="folder that exists"):
        show_schedule({"linear": SCHEDULES["linear"]}, tmp_path / "nowhere" / "a.png")


def test_words_stand_for_schedules_levels_and_options() -> None:
    for name in ("linear", "scaled_linear"):
        ends = [words.schedule(name, steps).alpha_bar[-1] for steps in (200, 1000, 4000)]
        assert max(ends) < 1.6 * min(ends)  # as noisy an end, whatever the length
        assert words.schedule(name, 1000) == getattr(NoiseSchedule, name)(1000)
        assert len(words.schedule(name, 1)) == 1
    made = words.schedule("cosine", 100, zero_snr=True)
    assert (len(made), made.alpha_bar[-1]) == (100, 0.0)
    assert len(words.levels("schedule", SCHEDULES["linear"], "ddim25", "ddpm")) == 25
    assert len(words.levels("schedule", SCHEDULES["linear"], "10", "trailing")) == 10
    for kind in words.FORMULAS:
        assert len(words.levels(kind, SCHEDULES["linear"], "7", "ddpm")) == 7
    given = words.options(["order=2", "solver_type=heun", "brownian=false", "eta=0.5"])
    assert given == {"order": 2, "solver_type": "heun", "brownian": False, "eta": 0.5}
    given = words.options(["s_tmax=inf", "brownian=False", "sigma_data=None", "r=.5", "of=()x"])
    assert given == {"s_tmax": math.inf, "brownian": False, "sigma_data": None, "r": 0.5, "of": "()x"}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: words.schedule("cosin", 10), "--schedule"),
        (lambda: words.levels("karas", SCHEDULES["linear"], "7", "ddpm"), "--levels"),
        (lambda: words.levels("karras", SCHEDULES["linear"], "ddim7", "ddpm"), "--steps"),
        (lambda: words.options(["order"]), "--option"),
        (lambda: words.options(["=2"]), "--option"),
    ],
)
def test_words_that_stand_for_nothing_are_named(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
