"""The guide to solvers: its code runs and says what it says, its words exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from chains import one_thread
from typer.testing import CliRunner

from fastdiff.cli import app
from fastdiff.solvers import forms, steps
from fastdiff.table import SamplingTable

GUIDE = Path(__file__).parents[1] / "fastdiff" / "solvers" / "README.md"
TEXT = GUIDE.read_text()
ADD, IMPORT_DIFFUSERS, IMPORT_PASTED = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
_one_thread = pytest.fixture(autouse=True)(one_thread)


def test_a_solver_is_added_in_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict = {}
    exec(ADD, scope)
    said = re.search(r"# (SamplingTable.*)", ADD)
    assert said is not None
    assert capsys.readouterr().out.strip() == said[1]
    assert scope["x"].shape == (4, 3, 16, 16)
    solver = ADD[ADD.index("def extrapolated") : ADD.index("\n\n\nnetwork")]
    assert len(solver.strip().splitlines()) <= 10


def test_a_sampler_is_imported_in_two_lines() -> None:
    pytest.importorskip("diffusers")
    scope: dict = {}
    exec(IMPORT_DIFFUSERS, scope)
    assert isinstance(scope["table"], SamplingTable)
    assert scope["table"].num_rows == 20
    assert len(IMPORT_DIFFUSERS.strip().splitlines()) <= 4


def test_a_pasted_sampler_is_imported() -> None:
    scope: dict = {}
    exec(IMPORT_PASTED, scope)
    assert scope["table"].name == "my_euler"
    assert scope["table"].num_rows == 3


def test_the_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = re.search(r"```bash\n(.*?)\n```", TEXT)
    assert command is not None
    result = CliRunner().invoke(app, shlex.split(command[1])[1:])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "unipc.png").exists()


def test_links_and_words_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (GUIDE.parent / link).exists()
    helpers = re.search(r"\[steps.py\]\(steps.py\) \| (.*?) \|", TEXT)
    assert helpers is not None
    for name in re.findall(r"`(\w+)", helpers[1]):
        assert hasattr(steps, name)
    for name in ("X", "X0", "OUT", "Z", "Register", "Row"):
        assert hasattr(forms, name)
