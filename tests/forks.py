"""Training in children of one fresh process that imports torch once: cheap to start, to kill and to join.

A test process has threads, which a fork would lose, so it starts `python forks.py` (the fixture `forks`);
that process does no work itself and forks a child for each piece of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Forks:
    """The fresh process; its functions are this module's."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, name: str, folder: Path, *arguments: Any, timeout: float = 240) -> Any:
        """What the function `name` returns there, given `folder` and the arguments."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([name, str(folder), *arguments]), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        assert ready, f"`{name}` took more than {timeout} s"
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Answer a line [name, folder, ...] of JSON with another until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what children print is no answer
    warm_up()
    for line in sys.stdin:
        name, folder, *arguments = json.loads(line)
        try:
            answer = {"result": globals()[name](Path(folder), *arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def children(works: Sequence[Callable[[], Any]], seconds: int = 60) -> list[tuple[int, str]]:
    """(exit status or minus the signal, stderr) of children that do the works at the same time."""
    started = []
    for i, work in enumerate(works):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(read)
            os.dup2(write, 2)
            signal.alarm(seconds)  # a deadlock is a failure, not a wait
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    work()
                    status = 0
                except SystemExit as end:
                    status = end.code
                except BaseException:
                    traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        os.close(write)
        started.append((pid, read, i))
    ended = []
    for pid, read, _ in started:
        with open(read, errors="replace") as file:
            said = file.read()
        ended.append((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said))
    return ended


def die() -> None:
    """As the kernel ends a process: nothing is flushed, nothing put in order."""
    os.kill(os.getpid(), signal.SIGKILL)


# Runs that are killed


def killed(folder: Path, kills: int) -> dict[str, Any]:
    """Run `straight` without interruption, and `run` with `kills` kills; what the children came to."""
    import training_runs as runs

    config = replace(runs.CONFIG, steps=kills + 4, checkpoint_every=2, sample_every=2, log_every=3)
    [straight] = children([lambda: runs.trainer(folder / "straight", config).run(progress=False)])
    ends = []
    for step in range(1, kills + 1):
        moment = (MOMENTS_ODD if step % 2 else MOMENTS_EVEN)[step // 2 % 3]
        ends += children([lambda m=moment, s=step: run_until(folder / "run", config, m, s)])
    ends += children([lambda: runs.trainer(folder / "run", config, resume=True).run(progress=False)])
    return {"straight": straight, "ends": ends, "steps": config.steps}


MOMENTS_ODD = ("in a step", "in the log", "before the log")
MOMENTS_EVEN = ("in a checkpoint", "before pruning", "in a grid")


def run_until(out: Path, config: Any, moment: str, step: int) -> None:
    """Begin or resume the run in `out` and be killed in step `step` (1 is the first)."""
    import torch
    import training_runs as runs

    from fastdiff.train import trainer as module
    from fastdiff.train.log import StepLog
    from fastdiff.train.step import Stepper

    def grid(model: Any) -> Any:
        return die() if moment == "in a grid" and run.step == step else torch.zeros(1, 1, 6, 6)

    run = runs.trainer(out, config, resume=(out / "run.json").exists(), sample_fn=grid)
    torch.randn(7)  # the state of the global generator must not matter
    if moment == "in a step":
        original = Stepper._part
        Stepper._part = lambda self, s, part: die() if s == step - 1 else original(self, s, part)
    elif moment in ("in the log", "before the log"):

        def write(self: StepLog, records: list[dict[str, Any]]) -> None:
            if run.step >= step:
                if moment == "in the log":
                    self._file.write(json.dumps(records)[1:30])
                    self._file.flush()
                die()
            written(self, records)

        written, StepLog.write = StepLog.write, write
    elif moment == "in a checkpoint":
        renamed = os.replace
        name = f"step-{step:08d}.safetensors"
        os.replace = lambda a, b: die() if str(b).endswith(name) else renamed(a, b)
    elif moment == "before pruning":
        prune = module.prune
        module.prune = lambda folder, keep: die() if run.step == step else prune(folder, keep)
    run.run(progress=False)


def terminated(folder: Path) -> dict[str, Any]:
    """Runs that are asked to end: in step 5, alone, then going on, and in one of two; later; in an error."""
    import training_runs as runs

    from fastdiff.train import trainer as module

    rare = replace(runs.CONFIG, checkpoint_every=100)

    def ask() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def asked(run: Any, rank: int = 0, at: int = 5, fails: bool = False) -> None:
        part = type(run._stepper)._part

        def call(self: Any, step: int, given: Any) -> Any:
            if step == at - 1 and rank == 0:
                ask()
                ask()  # as a scheduler and its shell may both do
                if fails:
                    raise OSError("no more of it")
            return part(self, step, given)

        type(run._stepper)._part = call
        run.run(progress=False)

    def of_two(rank: int) -> None:
        save = module.save_checkpoint
        module.save_checkpoint = lambda *given: (time.sleep(0.3), save(*given))
        try:
            asked(plain_trainer(folder / "two", 12, checkpoint_every=100), rank)
        finally:
            print(left("two")[-1], file=sys.stderr)

    def in_the_last_checkpoint() -> None:
        save = module.save_checkpoint
        run = runs.trainer(folder / "late", rare)
        module.save_checkpoint = lambda *given: (ask(), save(*given))
        run.run(progress=False)

    def left(name: str) -> list[str]:
        return sorted(path.name for path in (folder / name / "checkpoints").iterdir())

    def resumed(name: str) -> list[tuple[int, str]]:
        return children([lambda: runs.trainer(folder / name, rare, resume=True).run(progress=False)])

    return {
        "alone": children([lambda: asked(runs.trainer(folder / "alone", rare))]),
        "left": left("alone"),
        "resumed": resumed("alone"),
        "two": grouped(of_two),
        "two left": left("two"),
        "last": children([lambda: asked(runs.trainer(folder / "last", rare), at=12)]),
        "last resumed": resumed("last"),
        "late": children([in_the_last_checkpoint]),
        "late left": left("late"),
        "failing": children([lambda: asked(runs.trainer(folder / "failing", rare), fails=True)]),
    }


def full_disk(folder: Path) -> dict[str, Any]:
    """A run in which no file may grow past a few bytes from its second checkpoint on."""
    import training_runs as runs

    def limited() -> None:
        run = runs.trainer(folder / "run")
        step = type(run._stepper).__call__

        def call(self: Any, s: int, parts: Any) -> Any:
            if s == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            return step(self, s, parts)

        type(run._stepper).__call__ = call
        run.run(progress=False)

    return {"ends": children([limited])}


# Runs of two processes


def grouped(work: Callable[[int], Any], size: int = 2) -> list[tuple[int, str]]:
    """`work(rank)` in each of `size` processes, started as torchrun does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        work(rank)

    return children([lambda r=rank: start(r) for rank in range(size)])


def plain_run(out: Path, steps: int, **options: Any) -> Any:
    """A run whose losses depend on the cut of a batch in their last bits alone."""
    return plain_trainer(out, steps, **options).run(progress=False)


def plain_trainer(
    out: Path, steps: int, resume: bool = False, data: Any = None, times: Any = None, **changes: Any
) -> Any:
    import torch
    import training_runs as runs

    torch.manual_seed(1 + int(os.environ.get("RANK", 0)))  # rank 0's weights are the run's
    config = replace(runs.CONFIG, steps=steps, **changes)
    return runs.trainer(out, config, data, runs.Plain(), seeded=False, resume=resume, times=times)


def two_processes(folder: Path) -> dict[str, Any]:
    """Runs: alone; in two processes, of which one cannot write; begun in one way, ended in the other."""
    import training_runs as runs

    def together(rank: int) -> None:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        plain_run(folder / "two", 12, batch_size=7, accumulate=2)

    def compiled(rank: int) -> None:
        """All of torch.compile but the code generation; no idle parameter; bfloat16."""
        import torch

        torch.compile = runs.traced
        torch.manual_seed(1)
        model = runs.Plain()
        del model.unused
        model.unused = torch.ones(3)
        config = replace(runs.CONFIG, batch_size=7, accumulate=2, compile=True, amp="bf16")
        runs.trainer(folder / "compiled", config, model=model, seeded=False).run(progress=False)

    def learning(rank: int, name: str = "learnt by two") -> None:
        plain_run(folder / name, 12, batch_size=7, times=runs.Learning())

    return {
        "compiled": grouped(compiled),
        "learning": [*grouped(learning), *children([lambda: learning(0, "learnt by one")])],
        "alone": children([lambda: plain_run(folder / "one", 12, batch_size=7)]),
        "together": grouped(together),
        "begun alone": children([lambda: plain_run(folder / "grown", 6, batch_size=7)]),
        "ended together": grouped(lambda rank: plain_run(folder / "grown", 12, resume=True, batch_size=7)),
        "begun together": grouped(lambda rank: plain_run(folder / "shrunk", 6, batch_size=7)),
        "ended alone": children([lambda: plain_run(folder / "shrunk", 12, resume=True, batch_size=7)]),
    }


def processes_that_fail(folder: Path) -> dict[str, Any]:
    """What two processes say when one is killed, when the folder is taken, and when their data differ."""
    import training_runs as runs

    def loses_one(rank: int) -> None:
        from fastdiff.train.step import Stepper

        original = Stepper._part
        Stepper._part = lambda self, s, p: die() if (rank, s) == (1, 4) else original(self, s, p)
        plain_run(folder / "lost", 12)

    def other_data(rank: int) -> None:
        data = runs.tiny_data()
        plain_run(folder / "other", 12, data=replace(data, images=data.images + rank))

    return {
        "lost": grouped(loses_one),
        "taken": grouped(lambda rank: plain_run(folder / "lost", 12)),
        "other": grouped(other_data),
        "too small": grouped(lambda rank: plain_run(folder / "small", 12, batch_size=5, accumulate=3)),
    }


def warm_up() -> None:
    """Import all that a run imports, here and once; nothing that would start a thread."""
    import tempfile

    import torch
    import tqdm
    import training_runs as runs
    from PIL import Image

    Image.init()
    assert tqdm.tqdm
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs.trainer(Path(folder) / "run")


if __name__ == "__main__":
    serve()
