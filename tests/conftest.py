"""What the tests of several files share."""

import functools
import io
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import model


@pytest.fixture(autouse=True, scope="session")
def ahead(request):
    """What tests only wait for runs on the other core from the beginning, one after the other: name ->
    future."""
    functions = {item.name: item.function for item in request.session.items}
    with ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(f.ahead) for name, f in functions.items() if hasattr(f, "ahead")}
        pool.shutdown(cancel_futures=True)


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
