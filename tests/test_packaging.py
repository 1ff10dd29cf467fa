"""What is built is what is run: the wheel holds what it should, and samples from an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from fastdiff import __version__

ROOT = Path(__file__).resolve().parents[1]
MODELS_MB = 4


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command in a folder, with no path of the checkout in its environment.

    Raises:
        AssertionError: it failed; with all that it said.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git holds, or would after `git add`: building leaves nothing in the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel_files(built: tuple[Path, Path]) -> dict[str, int]:
    """Size of each file of the wheel."""
    with zipfile.ZipFile(built[1]) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def environment(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel alone; torch and the rest come from the running one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    run(*install, built[1], cwd=folder)
    # Folders of a .pth file stand behind the environment's own, and their .pth files (the editable
    # installation's among them) are not read.
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    running = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "running.pth").write_text("\n".join(running) + "\n")
    return python


def kernel_files(names: Iterable[str], below: str) -> set[str]:
    return {name.removeprefix(below) for name in names if name.startswith(below) and not name.endswith("/")}


def test_the_wheel_holds_every_kernel_as_a_real_file(checkout, wheel_files):
    kernels = {p.name for p in (checkout / "kernels").iterdir() if p.suffix in (".py", ".cpp", ".h", ".md")}
    assert "cpu.cpp" in kernels
    assert kernel_files(wheel_files, "fastdiff/kernels/") == kernels
    assert all(size for name, size in wheel_files.items() if name.startswith("fastdiff/kernels/"))


def test_the_sdist_holds_every_kernel_as_a_real_file_and_the_licence(checkout, built):
    with tarfile.open(built[0]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    kernels = {p.name for p in (checkout / "kernels").iterdir() if p.suffix in (".py", ".cpp", ".h", ".md")}
    assert kernel_files(members, "fastdiff/kernels/") == kernels
    assert not any(member.issym() or member.islnk() for member in members.values())
    assert {"LICENSE", "README.md", "pyproject.toml"} <= members.keys()
    assert not any(name.startswith("tests") for name in members)


def test_the_wheel_holds_all_modules_and_nothing_else(checkout, wheel_files):
    modules = {p.relative_to(checkout).as_posix() for p in (checkout / "fastdiff").rglob("*.py")}
    in_wheel = {name for name in wheel_files if not name.startswith("fastdiff/kernels/")}
    assert {name for name in in_wheel if name.endswith(".py")} == {
        name for name in modules if not name.startswith("fastdiff/kernels/")
    }
    assert "fastdiff/py.typed" in in_wheel
    info = f"fastdiff_engine-{__version__}.dist-info/"
    assert all(name.startswith(("fastdiff/", info)) for name in wheel_files), "a second top-level package"
    assert f"{info}licenses/LICENSE" in wheel_files


def test_the_embedded_models_are_whole_and_small(wheel_files):
    models = {name: size for name, size in wheel_files.items() if name.startswith("fastdiff/models/")}
    assert {
        f"fastdiff/models/digits/{name}" for name in ("config.json", "model.safetensors")
    } <= models.keys()
    assert sum(models.values()) <= MODELS_MB * 2**20


def test_the_metadata_names_the_distribution_and_its_extras(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("fastdiff-engine", __version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"data", "diffusers", "bench", "test"}


def test_an_installation_requires_the_named_libraries_and_none_by_its_exact_version(metadata):
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.split(r"[^A-Za-z0-9-]", line)[0] for line in required}
    assert names == {"torch", "triton", "numpy", "safetensors", "pillow", "tqdm", "typer", "rich"}
    assert not any("==" in line.partition(";")[0] for line in metadata.get_all("Requires-Dist"))


def test_the_installed_wheel_samples_from_an_empty_folder(environment, tmp_path):
    where = run(environment, "-c", "import fastdiff; print(fastdiff.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(environment.parents[1])
    said = run(
        environment.with_name("fastdiff"), "sample", "--num", 10, "--steps", 4, "--out", "digits.png",
        cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert "digits.png" in said


def test_the_installed_wheel_samples_without_triton(environment, tmp_path):
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import fastdiff as fd\n"
        "x = fd.Sampler.from_pretrained('digits', solver='ddpm', steps=3).sample(2)\n"
        "print(tuple(x.shape), bool(x.isfinite().all()), sys.modules['triton'])"
    )
    *_, finite, triton = run(environment, "-c", script, cwd=tmp_path).split()
    assert (finite, triton) == ("True", "None")


@pytest.mark.parametrize("place", ["installed", "checkout"])
def test_an_installed_package_called_kernels_stays_visible(place, environment, checkout, tmp_path):
    """Hugging Face's `kernels`, say, even where a checkout's folder of that name is first on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'somebody else'")
    script = (
        "import importlib.util, sys, fastdiff.kernels.philox\n"
        "print(importlib.util.find_spec('kernels'))\n"
        f"sys.path.insert(1, {str(tmp_path)!r})\n"
        "import kernels; print(kernels.owner)"
    )
    found, owner = run(
        environment, "-c", script, cwd=checkout if place == "checkout" else environment.parent
    ).splitlines()
    assert owner == "somebody else"
    assert str(environment.parents[1]) not in found, "the wheel brings a top-level package `kernels`"


def test_a_checkout_without_links_says_what_to_do(environment, checkout, tmp_path):
    """Git without symbolic links writes the link's target into a file."""
    shutil.copytree(checkout / "fastdiff", tmp_path / "fastdiff", symlinks=True)
    (tmp_path / "fastdiff" / "kernels").unlink()
    (tmp_path / "fastdiff" / "kernels").write_text("../kernels")
    with pytest.raises(AssertionError, match=r"ImportError: fastdiff/kernels .* symbolic link"):
        run(environment, "-c", "import fastdiff", cwd=tmp_path)


def test_the_constraints_pin_what_the_extras_name():
    """Each requirement of pyproject.toml is pinned, for each Python, and the build's own tools as well."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    pinned: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, marker = re.fullmatch(r"([a-z0-9-]+)==[0-9a-z.]+(?:; (.+))?", line).groups()
            pinned.setdefault(name, []).append(marker or "")
    assert {re.split(r"[^A-Za-z0-9-]", line)[0] for line in named} <= pinned.keys()
    both = ["python_version >= '3.11'", "python_version < '3.11'"]
    assert all(len(markers) == 1 or markers == both for markers in pinned.values())
