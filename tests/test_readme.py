"""The README's promises: its code and commands run, its links lead somewhere, its set-up is two commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastdiff.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_a_snippet_runs_as_it_stands(code, tmp_path):
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("fastdiff ")])
def test_a_command_runs_as_it_stands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    if arguments[0] == "train":
        arguments += ["--steps", "1", "--channels", "8", "--blocks", "1"]  # the command itself takes minutes
    if arguments[0] == "eval":
        arguments += ["--num", "5", "--times", "5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir())


def test_the_set_up_is_exactly_two_commands_that_make_knows():
    others = [c for c in COMMANDS if not c.startswith("fastdiff ")]
    assert others == ["make sample", "make test"]
    for command in others:
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    titles = {
        "#" + title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    assert [link for link in links if not (link in titles or (ROOT / link).exists())] == []


def test_the_table_of_schedulers_is_what_importing_them_gives():
    pytest.importorskip("diffusers")
    pytest.importorskip("torchsde")  # which some of its schedulers ask for
    from benchmarks.schedulers import table

    assert table() in README
