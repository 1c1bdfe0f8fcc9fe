"""What all tests have: the machine's two cores are shared by two processes of tests and those that they start."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is there: a thread that spins takes another's core


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small a second thread only waits, for long where the machine is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
