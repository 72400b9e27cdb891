"""What the tests of several files share."""

import functools
import io
import os
import runpy
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import model


AHEAD, OTHER_CORE = {}, ThreadPoolExecutor(1)  # node id -> future


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "ahead: it only waits for other processes, and starts with the session"
    )


def pytest_collection_finish(session):
    """Tests marked `ahead` run on the other core from the beginning, and are waited for at the end."""
    alone = session.config.option.collectonly or "TRITON_INTERPRET" in os.environ  # begun by one of them
    session.items.sort(key=lambda item: item.get_closest_marker("ahead") is not None)
    for item in session.items:
        skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
        if item.get_closest_marker("ahead") and not alone and not skipped:
            arguments = item.callspec.params if hasattr(item, "callspec") else {}
            AHEAD[item.nodeid] = OTHER_CORE.submit(item.obj, **arguments)


def pytest_pyfunc_call(pyfuncitem):
    if pyfuncitem.nodeid in AHEAD:
        AHEAD[pyfuncitem.nodeid].result()
        return True


def pytest_sessionfinish():
    OTHER_CORE.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small inputs gain nothing by more threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_modules_kept(monkeypatch):
    """What eval.py's controlled settings keep for the scripts that they run is not for the next test."""
    monkeypatch.setattr(model, "LOADED", dict(most=0))
    yield


@pytest.fixture
def terminal(monkeypatch):
    """What bars are drawn on, as on a terminal."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(model, "tqdm", functools.partial(model.tqdm, file=screen))
    return screen


def run_script(path, argv):
    """A script in this process, as from the command line: its exit code."""
    before = sys.argv
    sys.argv = [str(path), *map(str, argv)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def in_two_processes(*argv):
    """Python in two processes, with what torchrun tells them: [(exit code, output, errors) of each]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", OMP_NUM_THREADS="1")
    started, how = [], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for rank in "01":
        env = {**os.environ, **there, "RANK": rank, "LOCAL_RANK": rank}
        started.append(subprocess.Popen([sys.executable, *map(str, argv)], env=env, **how))
    said = [process.communicate(timeout=200) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]
