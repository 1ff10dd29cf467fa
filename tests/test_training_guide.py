"""The guide to training: its code and commands run, its words exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from chains import one_thread
from PIL import Image
from typer.testing import CliRunner

from fastdiff.cli import app
from fastdiff.train import step

GUIDE = Path(__file__).parents[1] / "fastdiff" / "train" / "README.md"
TEXT = GUIDE.read_text()
_one_thread = pytest.fixture(autouse=True)(one_thread)


def test_the_code_runs_and_leaves_what_the_table_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    assert scope["sampler"].sample(2, cond={"labels": 1}).shape == (2, 1, 8, 8)
    left = {path.name for path in (tmp_path / "runs" / "circles").iterdir()}
    listed = set(re.findall(r"`([a-z.-]+)/?`", TEXT[TEXT.index("| `log.jsonl`") : TEXT.index("## What may")]))
    assert left - {"model-ema-0.99"} <= listed | {"samples"}
    line = json.loads((tmp_path / "runs" / "circles" / "log.jsonl").read_text().splitlines()[0])
    assert all(f"`{key}`" in TEXT for key in line if key not in ("loss_q2", "loss_q3"))


def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(np.full((50, 44, 3), 90, np.uint8)).save(tmp_path / "photos" / name / "1.png")
    [block] = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [command[0] for command in commands] == ["train", "train", "sample"]
    for command in commands:
        short = (
            "--steps 1 --channels 8 --blocks 1 --batch 4 --timesteps 2"
            if command[0] == "train"
            else "--steps 1"
        )
        result = CliRunner().invoke(app, [*command, *short.split()])
        assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "samples.png").size[0] > 32


def test_every_option_and_name_that_it_mentions_exists():
    said = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    said += CliRunner().invoke(app, ["sample", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - {"--nproc-per-node", "--help"}
    assert len(options) > 8
    assert [option for option in options if option not in said] == []
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    assert all((GUIDE.parent / link).exists() for link in links)
    assert step.Times
