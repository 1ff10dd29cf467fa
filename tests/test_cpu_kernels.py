"""The compiled CPU kernels: built once, kept safely, replaced by NumPy where they cannot be."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kernel_cases import assert_same_bits, library

from fastdiff import ops
from fastdiff.kernels import _cache, _cpp_constants, cpu


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not looked for the library yet, with a cache of its own."""
    monkeypatch.setattr(cpu.kernels, "loaded", None)
    monkeypatch.setattr(cpu.kernels, "_thread", None)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Normals of the library that all tests share."""
    library()
    return ops.normal((1003,), 7, [2, 5], 0)


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache that two processes filled at the same time, and a note of each compilation."""
    library()
    home = tmp_path_factory.mktemp("home")
    noted, real = home / "noted", " ".join(map(shlex.quote, _cache.compiler() or ()))
    noting = home / "noting"
    noting.write_text(f'#!/bin/sh\necho once >> {shlex.quote(str(noted))}\nexec {real} "$@"\n')
    noting.chmod(0o700)
    code = "from fastdiff.kernels import cpu; raise SystemExit(cpu.library(wait=True) is None)"
    environment = os.environ | {"FASTDIFF_CACHE": str(home / "cache"), "CXX": str(noting)}
    racing = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in racing] == [0, 0]
    return home


@pytest.fixture(scope="module")
def built(raced: Path) -> Path:
    """The same cache, for the compiler that tests have."""
    (made,) = (raced / "cache").glob("*.so")
    here = cpu.kernels.file(_cache.compiler())
    assert here is not None
    for suffix in (".so", ".sha256"):
        made.with_suffix(suffix).rename(made.with_name(here.stem + suffix))
    return raced / "cache"


def test_two_processes_that_build_at_once_leave_one_library_and_its_digest(built: Path) -> None:
    assert sorted(path.suffix for path in built.iterdir()) == [".sha256", ".so"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_of_two_processes_one_builds_and_the_other_waits(raced: Path) -> None:
    assert (raced / "noted").read_text().split() == ["once"]


def test_cache_is_private(built: Path) -> None:
    assert stat.S_IMODE(built.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in built.iterdir()} == {0o600}


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "digest lost"])
def test_damaged_library_is_rebuilt(
    fresh: Path, built: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.mkdir()
    name = next(built.glob("*.so")).name
    content = (built / name).read_bytes()
    changed = {"truncated": content[:1000], "overwritten": bytes(len(content)), "digest lost": content}
    (fresh / name).write_bytes(changed[damage])
    if damage != "digest lost":
        digest = next(built.glob("*.sha256"))
        (fresh / digest.name).write_bytes(digest.read_bytes())
    assert cpu.library(wait=True) is not None
    assert _cache.intact(fresh / name)
    assert not caplog.records


def test_library_of_another_user_is_not_loaded(
    built: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE", str(built))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cpu.library(wait=True) is None
    assert "belongs to another user" in caplog.text


@pytest.mark.parametrize("broken", ["compiler", "missing compiler", "cache"])
def test_build_that_fails_falls_back_with_one_warning_and_the_same_bits(
    expected: torch.Tensor,
    fresh: Path,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if broken == "compiler":
        monkeypatch.setenv("CXX", "false")
    elif broken == "missing compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(fresh))
    else:
        (fresh.parent / "file").write_text("no folder")
        monkeypatch.setenv("FASTDIFF_CACHE", str(fresh.parent / "file"))
    assert cpu.library(wait=True) is None
    got = [ops.normal((1003,), 7, [2, 5], 0) for _ in range(2)]
    assert len(caplog.records) == 1
    assert "NumPy" in caplog.text
    for each in got:
        assert_same_bits(each, expected)


def test_processors_without_wide_vectors_draw_the_same_bits(
    expected: torch.Tensor, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loops that stand beside those of AVX-512, compiled here."""
    monkeypatch.setenv("CXX", shlex.join([*(_cache.compiler() or ()), "-U__AVX512F__"]))
    assert cpu.library(wait=True) is not None
    assert_same_bits(ops.normal((1003,), 7, [2, 5], 0), expected)


def test_native_zero_neither_builds_nor_loads(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTDIFF_NATIVE", "0")
    assert cpu.library(wait=True) is None
    assert torch.isfinite(ops.normal((3,), 0, 1, 0)).all()
    assert not caplog.records
    assert not fresh.exists()


def test_change_of_a_constant_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpu.kernels.file(["g++"])
    assert before == cpu.kernels.file(["g++"])
    monkeypatch.setattr("fastdiff.kernels._philox_numpy.ROUNDS", 7)
    assert cpu.kernels.file(["g++"]) != before
    assert cpu.kernels.file(None) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "constexpr float N = 0x1.0000000000000p-1f;"),
        (-3, "constexpr int N = -3;"),
        (2**31, "constexpr unsigned N = 2147483648u;"),
        ((1.0, -2.0), "constexpr float N[] = {0x1.0000000000000p+0f, -0x1.0000000000000p+1f};"),
    ],
)
def test_constants_become_exact_literals(value: object, text: str) -> None:
    assert _cpp_constants._constant("N", value) == text


def test_home_of_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTDIFF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu.kernels.file(["g++"]).parent == tmp_path / "fastdiff"
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "own"))
    assert cpu.kernels.file(["g++"]).parent == tmp_path / "own"


def test_process_does_not_wait_for_its_compiler(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o700)
    code = "import fastdiff as fd; print(fd.ops.normal((3,), 0, 1, 0).shape)"
    environment = os.environ | {"CXX": str(slow), "FASTDIFF_CACHE": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=50)
    assert result.returncode == 0


def test_a_build_goes_on_when_the_process_that_asked_for_it_has_ended(tmp_path: Path) -> None:
    """Or a program that is shorter than its compiler would start it again each time, for nothing."""
    code = "import fastdiff as fd; print(fd.ops.normal((3,), 0, 1, 0).shape)"
    environment = os.environ | {"FASTDIFF_CACHE": str(tmp_path / "cache")}
    library()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=50)
    limit = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("cpu-*.so")):
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_what_killed_builds_left_is_swept(fresh: Path) -> None:
    old, new, library = fresh / "build-old", fresh / "build-new", fresh / "cpu-0.so"
    old.mkdir(parents=True)
    new.mkdir()
    library.write_bytes(b"")
    for path, days in ((old, 1), (library, 40)):
        os.utime(path, (path.stat().st_mtime - days * 86400,) * 2)
    assert cpu.library(wait=True) is not None
    assert not old.exists()
    assert not library.exists()
    assert new.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_builds_for_itself(fresh: Path) -> None:
    code = """
import os
from fastdiff.kernels import cpu
cpu.library()
child = os.fork()
if child == 0:
    os._exit(cpu.library(wait=True) is None)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("native", [True, False])
def test_torchs_default_dtype_changes_nothing(dtype: torch.dtype, native: bool, monkeypatch) -> None:
    import fastdiff as fd

    def chain() -> torch.Tensor:
        sampler = fd.Sampler(
            lambda x, t: x.tanh(), fd.NoiseSchedule.linear(1000), solver="unipc", steps=6, shape=(2, 9),
            dtype=torch.float32,
        )  # fmt: skip
        ancestral = fd.Sampler(
            lambda x, t: x.tanh(), fd.NoiseSchedule.linear(1000), solver="ddpm", steps=6, shape=(2, 9),
            dtype=torch.float32,
        )  # fmt: skip
        return torch.stack([sampler.sample(3), ancestral.sample(3)])

    library()
    if not native:
        monkeypatch.setattr(cpu, "library", lambda wait=False: None)
    expected = chain()
    torch.set_default_dtype(dtype)
    try:
        assert_same_bits(chain(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_output_that_is_the_state_is_read_before_it_is_overwritten() -> None:
    """A register made of `out`, with a network that returns its own input: native, eager and a copy agree."""
    import fastdiff as fd
    from fastdiff.solvers import OUT, X0, Register, Row, X

    def remembers(levels: fd.NoiseLevels) -> list[Row]:
        kept, rows = None, []
        for now, to in levels.steps():
            eps = (X - now.alpha * X0) / now.sigma
            x = to.alpha * X0 + to.sigma * eps
            saved = Register()
            rows.append(
                Row(now, x if kept is None else x + 0.1 * kept, {saved: OUT}, exempt=("mean", "noise"))
            )
            kept = saved
        return rows

    def chain(network: object) -> torch.Tensor:
        schedule = fd.NoiseSchedule.linear(1000)
        return fd.Sampler(network, schedule, solver=remembers, steps=4, shape=(2, 9)).sample(3)

    library()
    assert_same_bits(chain(lambda x, t: x), chain(lambda x, t: x.clone()))


def test_a_cache_that_is_only_read_from_is_used(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setenv("FASTDIFF_CACHE", str(built))
    monkeypatch.setattr(os, "utime", refuse)
    assert cpu.library(wait=True) is not None
    assert not caplog.records


def test_a_library_in_use_keeps_its_digest_from_the_sweep(fresh: Path) -> None:
    assert cpu.library(wait=True) is not None
    kept = sorted(fresh.iterdir())
    for path in kept:
        os.utime(path, (0, 0))
    cpu.kernels._end(cpu.kernels.file(_cache.compiler()), None)
    _cache.sweep(fresh)
    assert sorted(fresh.iterdir()) == kept
