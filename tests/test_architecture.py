"""The house's rules that no other test would notice: layers, sizes, cost of importing, what is forbidden."""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdiff.solvers import SOLVERS

ROOT = Path(__file__).resolve().parents[1]
# A room imports rooms of its own layer or below, never in a circle. `kernels` lies under all of them, and the
# package itself, which names the public API, above.
LAYERS = {
    0: "files pictures timing _arguments _overlaps",
    1: "schedule spacing levels clip table",
    2: "solvers plots words",
    3: "_gradients _direct _dispatch _losses _norm _step ops nn",
    4: "editing lanes anatomy chain packages compiled graph execution sampler train likelihood "
    "_fake _capture_rules capture optimization",
    5: "engine generate shares adapters",
    6: "cli __main__",
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms.split()}
LINES = 400
NETWORK = {"urllib", "urllib3", "http", "httpx", "requests", "socket", "ftplib", "huggingface_hub", "aiohttp"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HEAVY = "triton torch._dynamo PIL sklearn scipy matplotlib typer rich diffusers"


def python_files(*folders: str) -> list[Path]:
    """Every Python file of folders of the checkout; `fastdiff` without the kernels that it links to."""
    files = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in files if not path.is_relative_to(ROOT / "fastdiff" / "kernels")]


def module_name(path: Path) -> str:
    """fastdiff/nn/__init__.py -> fastdiff.nn."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, package: str = "") -> set[str]:
    """Every module that a source names in an import, wherever it stands; `from a import b` gives a and a.b.

    Args:
        source: Python.
        package: the package that it lies in, to which relative imports refer.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            found |= {".".join(base)} | {".".join([*base, alias.name]) for alias in node.names}
    return found


def upward(module: str, imported: set[str]) -> list[str]:
    """The imports of `module` that its layer forbids."""
    layer = LAYER_OF[module.split(".")[1]]
    rooms = {name.split(".")[1] for name in imported if name.startswith("fastdiff.")}
    return sorted(room for room in rooms & LAYER_OF.keys() if LAYER_OF[room] > layer)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of the graph as the list of its nodes, or []."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        found = next((c for other in sorted(graph[node]) if (c := visit(other, [*path, node]))), [])
        done.add(node)
        return found

    return next((c for node in sorted(graph) if (c := visit(node, []))), [])


def forbidden(source: str) -> Iterator[str]:
    """What the package may not do: reach for a network, read a pickle."""
    roots = {name.split(".")[0] for name in imports_of(source)}
    yield from sorted(roots & (NETWORK | PICKLES))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.hub", "torch.utils.model_zoo"):
            yield ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if given.get("allow_pickle", "False") != "False":
                yield "allow_pickle"


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Each module of fastdiff -> the modules of fastdiff that it imports, without the kernels."""
    files = {module_name(path): path for path in python_files("fastdiff")}
    imported = {}
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        named = imports_of(path.read_text(), package) & files.keys()
        # `from fastdiff.nn import unet` names fastdiff.nn as well: what counts is the deepest module.
        imported[name] = {n for n in named if not any(m.startswith(f"{n}.") for m in named)} - {name}
    return imported


def test_every_room_has_a_layer(graph):
    rooms = {name.split(".")[1] for name in graph if "." in name}
    assert rooms <= LAYER_OF.keys(), "give the new rooms a layer in LAYERS"


def test_imports_go_down_only(graph):
    wrong = {name: found for name in graph if "." in name and (found := upward(name, graph[name]))}
    assert not wrong


def test_no_module_imports_the_package_itself(graph):
    assert [name for name, imported in graph.items() if "fastdiff" in imported] == []


def test_imports_make_no_circle(graph):
    assert circle(graph) == []


def test_the_kernels_import_nothing_of_fastdiff():
    for path in python_files("kernels"):
        assert not any(n.split(".")[0] == "fastdiff" for n in imports_of(path.read_text(), "kernels")), path


def test_the_checks_of_imports_see_a_planted_error():
    lazily = "def f():\n    if True:\n        from fastdiff.sampler import Sampler"
    assert upward("fastdiff.nn.unet", imports_of(lazily)) == ["sampler"]
    assert upward("fastdiff.ops", imports_of("from fastdiff import cli")) == ["cli"]
    assert upward("fastdiff.nn.unet", imports_of("from ..train import data", "fastdiff.nn")) == ["train"]
    assert upward("fastdiff.cli", imports_of("import fastdiff.sampler")) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_package_reads_no_pickle_and_no_network():
    found = {str(p): list(forbidden(p.read_text())) for p in python_files("fastdiff", "kernels")}
    assert {path: words for path, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "import urllib.request",
        "def f():\n    from huggingface_hub import hf_hub_download",
        "import pickle as p",
        "import torch\ntorch.hub.load('a', 'b')",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_the_check_for_pickles_and_network_sees_a_planted_error(planted):
    assert len(list(forbidden(planted))) == 1
    assert list(forbidden("import torch\ntorch.load(path, weights_only=True)\nnp.load(path)")) == []


def test_kernels_is_a_relative_link_and_shadows_no_package():
    """A folder without __init__.py yields to an installed `kernels`, as a regular package goes first."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "fastdiff" / "kernels") == "../kernels"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_stores_kernels_as_a_link():
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "fastdiff/kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.startswith("120000 ")


def test_files_are_short():
    """At most 400 lines; a solver 80, a kernel 250."""
    most = {path: LINES for path in python_files("fastdiff", "benchmarks", "tests")}
    most |= {path: 250 for path in (ROOT / "kernels").iterdir() if path.suffix in (".py", ".cpp")}
    most |= {ROOT / "fastdiff" / "solvers" / f"{name}.py": 80 for name in SOLVERS}
    lines = {path: len(path.read_text().splitlines()) for path in most}
    assert {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > most[p]} == {}


@pytest.fixture(scope="module")
def imports() -> list[tuple[float, list[str]]]:
    """Five fresh processes: the processor seconds that fastdiff costs over torch, and what it brought."""
    script = f"""
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import fastdiff
print(time.process_time() - start, *(set({HEAVY.split()!r}) & (set(sys.modules) - before)))
"""
    runs = []
    for _ in range(5):
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds, *heavy = run.stdout.split()
        runs.append((float(seconds), sorted(heavy)))
    return runs


def test_importing_fastdiff_brings_nothing_heavy(imports):
    assert imports[0][1] == []


def test_importing_fastdiff_costs_at_most_300_ms_over_torch(imports):
    assert statistics.median(seconds for seconds, _ in imports) <= 0.3


@pytest.mark.parametrize("check", ["ruff check .", "ruff format --check .", "mypy"])
def test_style_and_types_are_clean(check):
    run = subprocess.run([sys.executable, "-m", *check.split()], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
