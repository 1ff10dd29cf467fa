"""What runs where: `interpret` tests under TRITON_INTERPRET=1, all others without it, `gpu` tests on a GPU.

Triton decides at import whether a kernel is interpreted or compiled, so the two kinds need two processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from forks import Forks

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Threads that wait for one another on a busy core make a small network many times slower: workers share the
# cores, and so do the processes that they start.
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
hypothesis.settings.register_profile("shared", deadline=None)  # an example may wait for its core
hypothesis.settings.load_profile("shared")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """The process that forks children for tests of runs that are killed, and of runs of several processes."""
    server = Forks()
    yield server
    server.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if bool(item.get_closest_marker("interpret")) == INTERPRETING]
    elsewhere = [item for item in items if bool(item.get_closest_marker("interpret")) != INTERPRETING]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = here


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
