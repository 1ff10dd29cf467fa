"""A run goes on as if nothing had happened: after kills at any moment, a spoilt checkpoint, a full disk."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace

import chains
import pytest
from training_runs import CONFIG, log, state, trainer

from fastdiff.files import load_tensors, save_tensors
from fastdiff.train import stop
from fastdiff.train.checkpoint import checkpoints
from fastdiff.train.stop import Stop, Stopped


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on networks this small only wait for each other."""
    yield from chains.one_thread()


def test_a_run_killed_twenty_times_ends_bit_for_bit_as_one_never_killed(forks, tmp_path):
    found = forks("killed", tmp_path, 20)
    assert found["straight"] == [0, ""]
    statuses = [status for status, _ in found["ends"]]
    assert statuses == [-signal.SIGKILL] * 20 + [0], found["ends"]
    assert len(log(tmp_path / "straight")) == found["steps"]
    assert log(tmp_path / "run") == log(tmp_path / "straight")
    assert state(tmp_path / "run") == state(tmp_path / "straight")
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [f"step-{found['steps'] - back:08d}.safetensors" for back in (2, 0)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, one_thread):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    trainer(out).run(progress=False)
    return out


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def rename_an_entry(path):
    tensors, metadata = load_tensors(path)
    tensors["model/other"] = tensors.pop("model/unused")
    save_tensors(path, tensors, metadata)


@pytest.mark.parametrize("spoil", [cut_short, flip_one_bit, empty, rename_an_entry])
def test_a_spoilt_checkpoint_is_named_and_the_one_before_is_taken(straight, tmp_path, spoil):
    out = tmp_path / "run"
    trainer(out).run(progress=False)
    last = checkpoints(out / "checkpoints")[-1]
    spoil(last)
    with pytest.warns(UserWarning, match=rf"{last.name}.* damaged.*the checkpoint before it is taken"):
        resumed = trainer(out, resume=True)
    assert resumed.step == 9
    assert last.with_suffix(".damaged").exists()
    resumed.run(progress=False)
    assert state(out) == state(straight)
    assert log(out) == log(straight)


def test_without_a_whole_checkpoint_the_damaged_ones_are_all_named(tmp_path):
    out = tmp_path / "run"
    trainer(out, replace(CONFIG, steps=6)).run(progress=False)
    found = checkpoints(out / "checkpoints")
    for path in found:
        cut_short(path)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match=f"all .* are damaged: .*{found[1].name}.*{found[0].name}"),
    ):
        trainer(out, resume=True)


@pytest.fixture(scope="module")
def terminated(forks, tmp_path_factory):
    """(folder, what the runs that were asked to end came to)."""
    folder = tmp_path_factory.mktemp("terminated")
    return folder, forks("terminated", folder)


def test_a_run_that_is_asked_to_end_does_so_after_its_step_and_goes_on_bit_for_bit(terminated, straight):
    """Twice at once, as a scheduler and its shell may both ask."""
    folder, found = terminated
    [[status, said]] = found["alone"]
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 5 of 12; the same run goes on from its checkpoint in" in said
    assert f"{folder / 'alone'} with --resume" in said
    assert found["left"] == ["step-00000000.safetensors", "step-00000005.safetensors"]
    assert found["resumed"] == [[0, ""]]
    assert state(folder / "alone") == state(straight)
    assert log(folder / "alone") == log(straight)


def test_two_processes_of_which_one_is_asked_end_after_the_same_step_with_its_checkpoint(terminated):
    """After the next look at the loss; none before rank 0 has written, as torchrun then kills the others."""
    _, found = terminated
    assert [status for status, _ in found["two"]] == [143, 143], found["two"]
    assert [said.count("after step 6 of 12") for _, said in found["two"]] == [1, 0]
    assert found["two left"] == ["step-00000000.safetensors", "step-00000006.safetensors"]
    assert [said.split()[-1] for _, said in found["two"]] == ["step-00000006.safetensors"] * 2


def test_a_request_to_end_is_never_lost(terminated, straight):
    """In the last step it is answered as in any; in the last checkpoint and in an error the process ends."""
    folder, found = terminated
    [[status, said]] = found["last"]
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 12 of 12" in said
    assert found["last resumed"] == [[0, ""]]
    assert state(folder / "last") == state(straight)
    assert [status for status, _ in found["late"]] == [-signal.SIGTERM]
    assert found["late left"] == ["step-00000000.safetensors", "step-00000012.safetensors"]
    [[status, said]] = found["failing"]
    assert status == -signal.SIGTERM
    assert "OSError: no more of it" in said  # which nobody else can say


def test_sigterm_is_left_to_those_who_have_a_use_for_it():
    theirs = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with Stop():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, theirs)
    found = []
    with_thread = threading.Thread(target=lambda: found.append(Stop().__enter__().asked))
    with_thread.start()
    with_thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_request_ends_the_process_if_it_is_none_of_those_that_come_together(monkeypatch):
    ends = []

    def asked_again():
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert ends == []
        monkeypatch.setattr(stop, "_REPEATS", -1.0)
        signal.raise_signal(signal.SIGTERM)
        raise Stopped(143)

    monkeypatch.setattr(stop, "_end", lambda: ends.append(signal.getsignal(signal.SIGTERM)))
    with pytest.raises(Stopped), Stop() as asked:
        asked_again()
    assert asked.asked
    assert ends == [signal.SIG_DFL]  # and none for the first, which was answered


def test_a_full_disk_ends_the_run_clearly_and_spoils_nothing(forks, straight, tmp_path):
    [[status, said]] = forks("full_disk", tmp_path)["ends"]
    assert status == 1
    assert "OSError" in said
    assert "the checkpoint of step 6 could not be written (File too large)" in said
    assert "the last whole one is step-00000003.safetensors: make room" in said
    out = tmp_path / "run"
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert left == ["step-00000000.safetensors", "step-00000003.safetensors"]
    trainer(out, resume=True).run(progress=False)
    assert state(out) == state(straight)
