"""Compiles a library in a process of its own, which goes on when the one that asked for it has ended.

Run by its path: standard input says what, in JSON. Without fastdiff and torch, whose import
would take as long as some compilers do.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_SECONDS = 180  # the longest that a compiler may take


def main() -> None:
    """Build what there is not yet, atomically, with its digest beside it; or exit with the reason."""
    cache = _neighbour("_cache")
    asked = json.load(sys.stdin)
    path = Path(asked["path"])
    with cache.alone(path):
        if cache.intact(path):  # another process has built it meanwhile
            return
        with cache.building(path.parent) as folder:
            source, target = (folder / f"{asked['name']}{end}" for end in (".cpp", ".so"))
            source.write_text(asked["text"], encoding="utf-8")
            for options in asked["options"]:
                command = [*asked["compiler"], "-shared", "-fPIC", str(source), *options, "-o", str(target)]
                result = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
                )
                if result.returncode == 0 and target.exists():
                    cache.keep(target, path)
                    return
    sys.exit(f"{' '.join(command)} failed: {result.stderr.strip()[:500]}")


def _neighbour(name: str) -> Any:
    """A module of this folder, which must not be searched: it has names of the standard library's."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
