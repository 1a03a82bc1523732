"""Every test is offline, single-threaded and seeded; set before anything imports torch or transformers."""

import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from moesaic.progress import set_quiet

ROOT = Path(__file__).resolve().parent.parent

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # workers share the cores, and one thread sums in one order
    MPLBACKEND="Agg",
    MOESAIC_TUNE="off",  # what was measured on this machine must not choose what a test runs
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),  # for subprocesses
)

os.environ.pop("MOESAIC_PROGRESS", None)  # what a user's shell says is no test's business

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: Ctrl-C would reach no subprocess
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("moesaic", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("moesaic")


@pytest.fixture(autouse=True)
def progress_as_new() -> Iterator[None]:
    """A command run with --json switches the progress of its whole process off."""
    yield
    set_quiet(False)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection to another machine is an error, not a slow test."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"  # a str is a Unix socket's path
        if host not in ("localhost", "::1") and not str(host).startswith("127."):
            raise RuntimeError(f"a test tried to reach {address}; tests are offline")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers whatever ran before; torch and numpy only if something imported them already."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
