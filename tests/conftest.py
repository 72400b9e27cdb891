"""What the tests of several files share."""

import functools
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile

import pytest
import torch

import model


OTHER = {}  # the process on the other core, and what it reports: {node id: reports}


def pytest_configure(config):
    config.addinivalue_line("markers", "ahead: runs on the other core from the beginning of the session")
    OTHER.update(config=config, path=os.environ.pop("FLOCK_AHEAD", ""))  # where that process reports


def marked(item):
    return item.get_closest_marker("ahead") is not None


def pytest_collection_finish(session):
    """Tests marked `ahead` run in another process, with this one's flags, and are reported at the end."""
    session.items.sort(key=marked)
    options, there = session.config.option, [*map(marked, session.items)]
    alone = OTHER["path"] or {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER"} & {*os.environ}  # begun by others
    alone = alone or options.collectonly or options.markexpr or options.basetemp
    if any(there) and not all(there) and not alone:
        argv = [sys.executable, "-m", "pytest", *session.config.invocation_params.args, "-m", "ahead"]
        OTHER["file"] = tempfile.NamedTemporaryFile("r", suffix=".jsonl")
        env = {**os.environ, "FLOCK_AHEAD": OTHER["file"].name}
        where = dict(cwd=session.config.invocation_params.dir, env=env)
        OTHER["process"] = subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **where
        )


def pytest_runtest_logreport(report):
    if OTHER["path"]:
        config = OTHER["config"]
        tree = config.hook.pytest_report_to_serializable(config=config, report=report)
        with open(OTHER["path"], "a", encoding="utf-8") as file:
            file.write(json.dumps(tree) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    if "process" not in OTHER or not marked(item):
        return None
    if "reports" not in OTHER:
        OTHER["process"].wait()
        OTHER["reports"] = {}
        for tree in map(json.loads, OTHER["file"]):
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=tree)
            OTHER["reports"].setdefault(report.nodeid, []).append(report)
    reports = OTHER["reports"].get(item.nodeid)
    if not reports or reports[-1].when != "teardown":  # the other process ended early: here, then
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish():
    if "process" in OTHER:
        OTHER["process"].kill()


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
