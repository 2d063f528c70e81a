"""What several test files share: a tiny toy world, rendered once; and Ctrl-C as users have it."""

import multiprocessing
import signal

import pytest

from datasets import toyworld

# `pytest … &` has Ctrl-C ignored, and so would every program that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A toy world of 48 training, 12 validation and 12 test videos."""
    folder = tmp_path_factory.mktemp("world")
    return toyworld.generate(folder, train=48, val=12, test=12, seed=0, workers=1, progress=False)


def pytest_sessionfinish(session):
    """A worker that a test left behind would keep pytest from ending: name it, and end it."""
    for child in multiprocessing.active_children():
        print(f"\nleft behind by a test: {child}")
        child.kill()
