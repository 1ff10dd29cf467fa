"""The README's bits/dim are those of the kept results."""

from __future__ import annotations

import copy
from pathlib import Path

from benchmarks import likelihood
from benchmarks.record import ROOT


def test_the_readme_shows_the_kept_results():
    text = (ROOT / "README.md").read_text()
    assert likelihood.up_to_date(text) == text
    assert likelihood.table(likelihood.results()) in text


def test_another_result_would_show():
    found = copy.deepcopy(likelihood.results())
    found[0]["models"][0]["bits_per_dim"]["mean"] += 0.001
    assert likelihood.table(found) != likelihood.table(likelihood.results())


def test_the_table_says_what_the_gates_hold():
    """tests/test_quality.py trains the same models anew."""
    (ablations,) = (r for r in likelihood.results() if r["differences"])
    less = {Path(entry["model"]).parent.name: entry for entry in ablations["differences"]}
    assert less["hybrid"]["high"] < 0 < less["linear"]["low"]
    for result in likelihood.results():
        assert result["holdout"] > 0
        assert result["times"] == "all"
        assert not any(Path(model["model"]).is_absolute() for model in result["models"])
