"""The generated part of a document: what stands between a name's two marks.

<!-- name: begin -->
(made anew)
<!-- name: end -->
"""

from __future__ import annotations

import re
from pathlib import Path

from fastdiff.files import atomic_path


def replaced(text: str, name: str, content: str) -> str:
    """A document with `content`, which ends with its line, between the marks of `name`.

    Raises:
        ValueError: it has no such marks.
    """
    section = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    text, count = section.subn(lambda found: f"{found[1]}{content}{found[2]}", text)
    if not count:
        raise ValueError(f"`text` must hold the marks of {name!r}; add them where its part belongs")
    return text


def rewrite(path: Path, name: str, content: str) -> None:
    """`replaced` in the file of a document."""
    text = replaced(path.read_text(), name, content)
    with atomic_path(path) as temporary:
        temporary.write_text(text)
