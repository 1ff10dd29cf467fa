"""`fastdiff doctor --kernels`: the cost of compiled kernels, from the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fastdiff.cli import app
from fastdiff.kernels import _triton, inspect


def doctor(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.output


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two quick kernels in place of all, so that the test takes seconds."""
    pytest.importorskip("triton", reason="needs Triton")
    chosen = [s for s in inspect._specialisations.IN_USE if s.kernel in ("normal", "advance")]
    monkeypatch.setattr(inspect._specialisations, "IN_USE", chosen)


def test_table_names_every_kernel_and_says_that_it_is_a_model(few: None) -> None:
    code, text = doctor("--kernels", "--target", "sm_80", "--target", "sm_90")
    assert code == 0
    lines = text.strip().splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["normal"] * 2 + ["advance"] * 2
    assert lines[-1] == inspect.NOTE
    # neither a share above all nor more bytes than the least
    shown = [(r.wide, r.traffic, r.least) for r in inspect.report(["sm_80", "sm_90"])]
    assert shown == [(1.0, 4.0, 4)] * 2 + [(0.0, 16.0, 16)] * 2
    assert lines[1].split()[13:16] == ["100%", "4", "4"]
    assert lines[3].split()[13:16] == ["0%", "16", "16"]


def test_json_is_the_report(few: None) -> None:
    code, text = doctor("--kernels", "--target", "sm_90", "--json")
    assert code == 0
    assert text.strip() == inspect.to_json(inspect.report(["sm_90"]))
    assert [kernel["target"] for kernel in json.loads(text)["kernels"]] == ["sm_90"] * 2


def test_missing_triton_and_wrong_options_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor() == (
        2,
        "fastdiff: `doctor` needs to be told what to examine: `--kernels` or `--model`\n",
    )
    code, text = doctor("--kernels", "--target", "sm_9")
    assert code == 2
    assert text == "fastdiff: `--target` must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_9'\n"
    monkeypatch.setattr(_triton, "HAS_TRITON", False)
    code, text = doctor("--kernels")
    assert code == 2
    assert "pip install triton" in text
    assert len(text.splitlines()) == 1
