"""The generated part of a document."""

from __future__ import annotations

import pytest

from benchmarks.sections import replaced, rewrite


def test_only_what_stands_between_the_marks_is_made_anew(tmp_path):
    path, rest = tmp_path / "page.md", "<!-- x: end -->\nb\n<!-- y: begin -->\nkept\n<!-- y: end -->\n"
    path.write_text("a\n<!-- x: begin -->\nold \\1\n" + rest)
    rewrite(path, "x", "new \\1\n")
    assert path.read_text() == "a\n<!-- x: begin -->\nnew \\1\n" + rest


def test_a_document_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="must hold the marks of 'x'"):
        replaced("nothing here", "x", "new\n")
