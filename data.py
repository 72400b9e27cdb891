"""All that comes in and goes out: flags, files, pictures, data sets as rows, regions, tables and pages.

The three scripts share this file and model.py. What is read from outside is checked here, and a
`Complaint` names the file or flag, what was found and what to do; `run` prints it as one line.
"""

import ast
import base64
import contextlib
import csv
import difflib
import fcntl
import functools
import gc
import gzip
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "val", "test")
MOST = 10_000_000  # pictures or regions in memory

# --------------------------------------------------------------------------------------------------------
# run and flags: how a script starts and ends, what it says, and the flags that it takes

HOST = hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]  # in the names of temporary files
LOCKS = {}  # of each out_dir the open file that keeps other processes out, and whether the folder is new
SPEECH = dict(quiet=False)  # --quiet, as flags() read it last
GIVEN = {}  # the flags that are not their defaults, the same
PIXELS = dict(most=89478485)  # --max_pixels, the same
WARNED = set()


class Complaint(Exception):
    """Something that the user can mend: one line that names it, says what was found and what to do."""


def require(holds, line):
    if not holds:
        raise Complaint(line)


def expect(holds, flag, value, wanted):
    if not holds:
        raise Complaint(f"--{flag}: found {repr(value)[:200]}, expected {wanted}")


def run(main, again="the same command with --resume"):
    """main(); what the user can mend is one line and exit code 2, Ctrl-C and SIGTERM 130, a closed pipe 0.
    again: what goes on then."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the caller
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    listen()
    held, code = set(LOCKS), 2
    try:
        try:
            return main()
        finally:
            for path in LOCKS.keys() - held:  # lets others in; a new folder into which nothing came goes
                file, new = LOCKS.pop(path)
                with contextlib.suppress(OSError):
                    path.unlink()
                    new and path.parent.rmdir()
                file.close()
            sys.stdout.flush()
    except Complaint as problem:
        line = str(problem)
    except BrokenPipeError:  # | head has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor does Python complain of it at the end
        sys.exit(0)
    except OSError as problem:  # a full disk, a folder that may not be written, a file that went away
        line = f"{problem.filename or 'file system'}: {problem.strerror or problem}"
    except RuntimeError as problem:
        if type(problem).__name__ != "OutOfMemoryError":  # torch's; it may not be imported yet
            raise
        cure = "lower --pairs or --batch_size, or use --dtype=bfloat16 or a smaller --model"
        line = f"the GPU's memory is full ({str(problem).partition('. ')[0]}); {cure}"
    except KeyboardInterrupt:
        line, code = f"interrupted; {again} goes on from here", 130
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a closed pipe, too
            line = harmless(" ".join(line.splitlines()))
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def listen():
    """Has SIGTERM do what Ctrl-C does, and that raise KeyboardInterrupt, also in a shell's background."""

    def as_ctrl_c(*_):
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):
            raise KeyboardInterrupt
        handler(signal.SIGINT, None)

    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # one of several must not wait for the others
        signal.signal(signal.SIGTERM, as_ctrl_c)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as while it imports
        signal.signal(signal.SIGINT, signal.default_int_handler)


def lock(out_dir):
    """Keeps other processes out of a folder until the run() around it, or this process, ends."""
    path = Path(os.path.realpath(out_dir), ".lock")
    if path in LOCKS or os.environ.get("RANK", "0") != "0":
        return
    new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as problem:
        raise Complaint(f"--out_dir={out_dir}: cannot be made ({problem.strerror}); take another") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # not just removed by who had it
    except OSError as problem:  # others say that this file system has no locks
        free = not isinstance(problem, (BlockingIOError, FileNotFoundError))
    expect(free, "out_dir", out_dir, "a folder that no other run writes into now: wait, or take another")
    LOCKS[path] = file, new
    sweep(path.parent)


@functools.cache  # once for each folder
def sweep(folder):
    """Removes the temporary files of killed runs: of this machine, of others' after a day."""
    with contextlib.suppress(OSError):  # another run is faster, or may not
        for path in folder.glob(".*.tmp"):
            made = re.search(r"\.([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}\.tmp$", path.name)
            dead = made and time.time() - path.stat().st_mtime > 86400
            if made and made[1] == HOST:
                try:
                    os.kill(int(made[2]), 0)
                except OSError as problem:  # its process has ended, or is another user's
                    dead = dead or isinstance(problem, ProcessLookupError)
            if dead:
                path.unlink()


def harmless(text):
    """Text for a terminal: control characters but line ends and tabs, as in file names, are spelled out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def say(text, result=False):
    """Prints a line; of several processes only the first does, and with --quiet only warnings and results.
    Behind | head a run goes on, for its files."""
    heard = result or not SPEECH["quiet"] or re.search("WARNING|FAILED|skipped", text)
    if heard and os.environ.get("RANK", "0") == "0":
        try:
            print(harmless(text), flush=True)
        except OSError as problem:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if not isinstance(problem, BrokenPipeError):  # the disk that it goes to is full
                with contextlib.suppress(OSError):
                    print(f"WARNING: standard output: {problem.strerror}; the rest is lost", file=sys.stderr)


def filled(text):
    """Text whose lines are wrapped at 100 columns, words left whole."""
    fill = functools.partial(textwrap.fill, width=100, break_long_words=False, break_on_hyphens=False)
    return "\n".join(fill(line) if len(line) > 100 else line for line in text.split("\n"))


def warn_once(path, what):
    """Warns of what a file has, of the first of all such."""
    if what not in WARNED:
        WARNED.add(what)
        say(f"WARNING: {path} and perhaps others: {what}")


LIMITS = {  # of flags that several scripts have; those of one stand below its first screen, as its LIMITS
    "threads": "[0, 1024]",
    "seed": "[0, 1e15)",
    "max_pixels": "[64, inf)",
    "l2": "(0, inf)",
    "strength": "[0, 1]",
    "confounder": "(0, 1]",
    "dtype": ("auto", "float32", "bfloat16"),
    "quick_gelu": ("auto", "on", "off"),
}
COUNTS = "[1-9][0-9]{,8}(,[1-9][0-9]{,8})*"
FORMS = {  # what the text of a flag looks like
    "batch_size": ("auto|[1-9][0-9]{,8}", "auto, or a whole number from 1"),
    "device": ("auto|cpu|cuda(:[0-9]+)?", "auto, cpu, cuda or cuda:N"),
    "k": ("([0-9]{1,99}:[0-9]{1,99})?", "LOW:HIGH, as in 20:50"),
    "columns": ("([^=,]+=[^,]*(,[^=,]+=[^,]*)*)?", "ours=theirs,..., as in place=weather"),
    "shots": (COUNTS, "whole numbers from 1, comma-separated"),
    "regions": (f"(grid:{COUNTS}|(boxes|coco|masks):.+)?", "grid:N, boxes:FILE, coco:FILE or masks:DIR"),
}
ALONE = ("scenes", "digits", "cutouts")  # sets that need no folder
CONTROLLED = ("digits", "cutouts", "coco")  # with a planted feature
# flags that name files or folders, but for some words
PATHS = "foregrounds backgrounds masks regions prompts ckpt discovery predictions embeddings".split()
NO_PATHS = "random:", "grid:", "openai"


def flags(script, argv=None):
    """Overrides the defaults on a script's first screen by --key=value, in place, and returns them all.

    script: the script's globals(); its lower-case bool, int, float and str are the flags and their defaults,
    its LIMITS say of a flag the words it may be (a tuple) or may list (a list), where one in capitals stands
    for the keys of that table of the script, or an interval "[0, 1)". argv: list of words, sys.argv[1:] if
    None. --help and --list=WHAT print, and exit. Raises Complaint for what cannot be."""
    default = {k: v for k, v in script.items() if k[0].islower() and type(v) in (bool, int, float, str)}
    config = dict(default)
    for word in sys.argv[1:] if argv is None else argv:
        if text := answer(word, script):
            print(text)
            sys.exit(0)
        key, equals, value = word.removeprefix("--").partition("=")
        require(word.startswith("--"), f"{word}: a bare word, expected --key=value; --help lists the flags")
        require(key in config, f"--{key}: no such flag; {near(key, config)}")
        config[key] = read_flag(key, value if equals else None, type(config[key]))
    GIVEN.clear()
    GIVEN.update({flag: value for flag, value in config.items() if value != default[flag]})
    for flag, value in GIVEN.items():
        expect(value != "" or flag == "cache_dir", flag, "", f"a value, as its default, {default[flag]}")
    for key, limit in {**LIMITS, **script.get("LIMITS", {})}.items():
        if key in config and isinstance(limit, str):
            low, high = map(float, limit[1:-1].split(","))
            at_end = config[key] == low and limit[0] == "[" or config[key] == high and limit[-1] == "]"
            expect(low < config[key] < high or at_end, key, config[key], f"a number in {limit}")
        elif key in config:
            words = [w for word in limit for w in (script[word] if word.isupper() else [word])]
            several = isinstance(limit, list)
            parts = [part.strip() for part in config[key].split(",")] if several else [config[key]]
            expect({*parts} <= {*words}, key, config[key], " or ".join(word for word in words if word))
    for key, (form, wanted) in FORMS.items():
        expect(key not in config or re.fullmatch(form, config[key]), key, config.get(key), wanted)
    PIXELS["most"], SPEECH["quiet"] = config.get("max_pixels", PIXELS["most"]), config.get("quiet", False)
    for flag in [flag for flag in ("out_dir", "cache_dir") if config.get(flag)]:  # now, not after the work
        path = Path(config[flag]).absolute()
        there = next(p for p in (path, *path.parents) if p.exists())
        usable = there.is_dir() and (flag == "cache_dir" or os.access(there, os.W_OK))
        expect(usable, flag, config[flag], f"a folder that may be written to, {there} is not")
    if "out_dir" in config and argv is None:  # of a script that runs
        lock(config["out_dir"])
    script.update(config)
    return config


def idle(names, where):
    """Says which of these flags were given, and are not used."""
    given = [f"--{flag}={GIVEN[flag]}" for flag in names.split() if flag in GIVEN]
    if given:
        say(f"WARNING: {', '.join(given)}: not used {where}")


def refuse(names, where):
    """Complains of these flags, if they were given."""
    for flag in names.split():
        expect(flag not in GIVEN, flag, GIVEN.get(flag), f"nothing {where}")


def look(script, config):
    """Complains of a model or data set that there is not, and of a path, perhaps behind a word and a colon,
    where nothing is, as what reads them would, but before the slow imports. script: see unrun."""
    named = [(flag, config.get(flag, "")) for flag in PATHS]
    named += [("place_backgrounds", path) for path in config.get("place_backgrounds", "").split(",")]
    if config.get("data"):
        known = [*unrun(__file__)["SETS"], *script.get("SETS", ())]
        kind, root = set_named(config, known)
        named.append((f"data {kind}", root))
    if "/" in config.get("pretrained", ""):
        named.append(("pretrained", config["pretrained"]))
    for flag, value in named:
        rest = value.partition(":")[2]
        places = [value, str(ASSETS.parent / value), rest, rest.partition(":")[0]]
        there = not value or value.startswith(NO_PATHS) or any(map(os.path.exists, filter(None, places)))
        require(there, f"--{flag}: {value}: no such file, no such folder")
    model, names = config.get("model", ""), [*unrun(ASSETS.parent / "model.py")["FAMILIES"], *clips()]
    good = not model or ":" in model or model in names
    kinds = "no such model, nor is it timm:NAME or local-dir:FOLDER"
    require(good, f"--model={model}: {kinds}; {near(model, names)}")


def set_named(config, known):
    """NAME, DIR of --data=NAME:DIR; complains of an unknown NAME, and of flags that say nothing of it."""
    name, _, root = config["data"].partition(":")
    names = f"NAME:DIR of {', '.join(known)}; see NAME:help"
    expect(name in known and (root or name in ALONE), "data", config["data"], names)
    for flag, default in dict(strength=0, spurious="0", feature="").items():
        value = config.get(flag, default)
        wanted = f"its default: in {name} no feature is planted"
        expect(name in CONTROLLED or value == default, flag, value, wanted)
    places, feature = config.get("places", ""), config.get("feature", "")
    expect(name not in CONTROLLED or not places, "places", places, "none: with and without the feature")
    expect(name != "digits" or not feature, "feature", feature, "none: a red rectangle")
    columns = config.get("columns", "")
    expect(not columns or name in ("csv", "waterbirds"), "columns", columns, "none: no table")
    return name, root


def read_flag(key, value, kind):
    """The value of a flag of a kind (bool, int, float, str) from its text, None for --key alone."""
    if kind is bool:
        words = {None: True, "true": True, "1": True, "false": False, "0": False}
        word = value and value.lower()
        expect(word in words, key, value, "True or False")
        return words[word]
    expect(value is not None, key, "no value", f"--{key}=VALUE")
    if kind is str:  # shells leave ~ alone behind = and :
        return re.sub("(?<![^:,])~(?=/)", lambda _: os.path.expanduser("~"), value)
    number = math.nan
    with contextlib.suppress(ValueError):
        number = kind(value)
    expect(number == number, key, value, "a whole number" if kind is int else "a number")
    return number


def near(word, names):
    """'did you mean ...' for a mistyped word, or the list of what there is."""
    names = list(map(str, names))
    close = difflib.get_close_matches(word, names, 5, 0.5)
    there = f"there are {', '.join(sorted(names)[:40])}" + f" and {len(names) - 40} more" * (len(names) > 40)
    return f"did you mean {', '.join(close)}?" if close else there


def unrun(path):
    """What stands at the top level of a script, without running it, so that --help and wrong flags need not
    wait for torch: constants, tables as {key: the syntax tree of its row}, and docstrings as __docs__."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    script = dict(__file__=path, __doc__=ast.get_docstring(tree), __docs__={})
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            script["__docs__"][node.name] = ast.get_docstring(node)
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            if isinstance(target, ast.Subscript):  # TABLE["key"] = row
                script.setdefault(target.value.id, {})[target.slice.value] = node.value
            if isinstance(target, ast.Name):
                if isinstance(node.value, ast.Dict):
                    keys = [key.value for key in node.value.keys]
                    script[target.id] = dict(zip(keys, node.value.values, strict=True))
                script[target.id] = ast.literal_eval(node.value)  # counts, if it is constant
    return script


def docs_of(row, script):
    """The docstrings of the functions that a row of a table in unrun(script) names."""
    names = [part.id for part in ast.walk(row) if isinstance(part, ast.Name)]
    return [script["__docs__"][name] for name in names if script["__docs__"].get(name)]


def answer(word, script):
    """What --help, --list=WHAT, --data=NAME:help and --foregrounds=help print; "" for any other word."""
    flag, _, value = word.partition("=")
    if word in ("--help", "-h"):
        source = Path(script["__file__"]).read_text(encoding="utf-8")
        screen = source[source.index("\n# ---") : source.index("\n# --- end")].strip()
        return script["__doc__"].strip() + "\n\nFlags (--key=value) and their defaults:\n\n" + screen
    if word.startswith("--list"):
        return filled(listing(value, script["__file__"]))
    if word == "--foregrounds=help":
        return unrun(__file__)["__docs__"]["load_foregrounds"].partition("\n\n")[2]
    if flag == "--data" and value.endswith(":help"):
        here, name = unrun(__file__), value.removesuffix(":help")
        expect(name in here["SETS"], "data", value, f"NAME:help of {', '.join(here['SETS'])}")
        texts = docs_of(here["SETS"][name], here)
        return texts[0] if texts else f"{name}: its function in data.py has no docstring"
    return ""


# of --list: tables, of which a script has some
LISTS = {"data": ["SETS"], "methods": ["METHODS", "CRITERIA", "BASELINES"], "protocols": ["PROTOCOLS"]}


def listing(what, path):
    """What --list=WHAT prints: names, and the first line that the source says of each. path: the script's."""
    if what == "models":
        source = Path(path).read_text(encoding="utf-8")
        comment = re.search("\nmodel = .*?# (.*(?:\n  +# .*)*)", source)[1]
        lines = [re.sub("\\s*\n +# ", " ", comment), "open_clip's names, with --pretrained=TAG|FILE|FOLDER:"]
        return "\n".join(lines + clips())
    script, lines = unrun(__file__ if what == "data" else path), []
    if what == "methods" and "bap" in script["__docs__"]:
        lines.append("bap  " + script["__docs__"]["bap"].partition(".")[0])
    for key, row in [pair for table in LISTS.get(what, ()) for pair in script.get(table, {}).items()]:
        # a protocol's row says what it is
        texts = [row.args[0].value] if what == "protocols" else docs_of(row, script)
        said = "; ".join(re.split("[.,;:]?\n|\\.$|\\. (?=[a-z]+:)", text)[0] for text in texts)
        lines.append(said if what == "data" and said else f"{key}  {said}")
    expect(lines, "list", what, ", ".join(LISTS) + " or models (of what this script has)")
    return "\n".join(re.sub("  +", "  ", line.rstrip()) for line in lines)


def clips():
    """The names of open_clip's models, without importing it."""
    require(library := find_spec("open_clip"), "open_clip is missing: pip install -r requirements.txt")
    return sorted(file.stem for file in (Path(library.origin).parent / "model_configs").glob("*.json"))


# a script that imports this file has its flags checked before the slow imports
RUNNING = getattr(sys.modules["__main__"], "__file__", None) or ""
if os.path.isfile(RUNNING) and Path(RUNNING).resolve().parent == ASSETS.parent.resolve():
    if "\n# --- end" in Path(RUNNING).read_text(encoding="utf-8"):
        run(lambda: look(script := unrun(RUNNING), flags(script)))
        for stop in filter(lambda s: callable(signal.getsignal(s)), (signal.SIGINT, signal.SIGTERM)):
            signal.signal(stop, signal.SIG_DFL)  # nothing is lost while it imports, until the next run()
try:
    import numpy as np
    import torch
    from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps
except ModuleNotFoundError as problem:
    sys.exit(f"{problem}; pip install -r requirements.txt")


# --------------------------------------------------------------------------------------------------------
# files: written whole or not at all; what is wrong with one that is read becomes one line

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz", ".parquet")
FORMATS = "JPEG PNG WEBP BMP GIF TIFF PPM AVIF JPEG2000 HEIF".split()  # not EPS, which starts Ghostscript
IN_PLACE = {  # what lies where a file should
    b"version https://git-lfs": "a pointer of Git LFS; git lfs pull fetches the file",
    (b"<!doctype html", b"<html"): "a web page; the link asks for a login, or is no longer right",
}


def revision():
    """The git revision of this checkout, with + if files differ from it; None outside one."""
    words = "describe --always --abbrev=40 --exclude=* --dirty=+".split()
    with contextlib.suppress(OSError):  # there is no git
        git = subprocess.run(["git", "-C", str(ASSETS.parent), *words], capture_output=True, text=True)
        return git.stdout.strip() or None


@functools.cache
def asset(name):
    return (ASSETS / name).read_text(encoding="utf-8")


def rng(seed, purpose, *index):
    """A generator of its own for each (seed, purpose, index): any order, any sharding draws the same."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *index])


def write(path, content):
    """Writes str or bytes whole or not at all: a temporary file beside it, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}-{os.urandom(4).hex()}.tmp")
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with open(temporary, "xb") as file:  # with the rights that the umask leaves
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        cure = "free some space, allow writing there, or choose another folder"
        raise Complaint(f"{path}: cannot be written ({problem.strerror}); {cure}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path, tree):
    write(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")


def write_table(path, header, rows):
    """A CSV file; None as an empty field. Text that a spreadsheet would run as a formula is quoted by ', what
    a terminal would obey is spelled out."""
    formula = re.compile(r"[=@\t\r\n]|[+-](?![\d.]+(e[+-]?\d+)?$)")
    rows = [[f"'{cell}" if formula.match(str(cell)) else cell for cell in row] for row in (header, *rows)]
    rows = [[harmless(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write(path, buffer.getvalue())


@contextlib.contextmanager
def reading(path, what, cure="mend it, or fetch it again"):
    """Whatever a missing, damaged or hand-edited file makes of itself in here becomes one Complaint, which
    says what the file should be and what the user can do."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise Complaint(f"{path}: a named pipe, device or socket, expected {what}")  # opening it may hang
    try:
        yield
    except Complaint:
        raise
    except FileNotFoundError as problem:  # of several files that make it up, the one that is missing
        path = problem.filename or path
        raise Complaint(f"{path}: {not_there(path)}; expected {what}") from None
    except Exception as problem:  # KeyError, RecursionError, MemoryError, zlib.error, ...: all say damage
        if type(problem).__name__ == "OutOfMemoryError":  # the GPU's, see run
            raise
        damage = f"{type(problem).__name__}: {one_line(problem)}"
        with contextlib.suppress(OSError), open(path, "rb") as file:
            head = file.read(99).lower()
            damage = next((kind for start, kind in IN_PLACE.items() if head.startswith(start)), damage)
            if not head:
                damage = "an empty file"
        raise Complaint(f"{path}: not {what} ({damage}); {cure}") from None


def not_there(path):
    link = os.path.islink(path)
    return f"a link to {os.readlink(path)}, which does not exist" if link else "no such file"


def one_line(problem):
    """The first line of what an exception says, at most 300 characters."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= 300 else text[:295] + " ..."


def read_json(path, what):
    with reading(path, what):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path, flag):
    """The lines of a text file, without the empty ones: list of (number, line)."""
    with reading(path, f"a text file in UTF-8 for --{flag}"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    lines = [(k, line.strip()) for k, line in enumerate(lines, 1) if line.strip()]
    require(lines, f"--{flag}={path}: an empty file")
    return lines


def bounded(path):
    """The path; ValueError where a small file, of np.savez or torch.save, would unpack to much memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            full = sum(part.file_size for part in file.infolist())
        if full > max(1 << 30, 50 * os.path.getsize(path)):
            raise ValueError(f"it unpacks to {full:,} bytes, 50 times its size")
    return path


def folder(path, flag):
    path = Path(path)
    require(path.is_dir(), f"--{flag}: {path}: " + ("not a folder" if path.exists() else "no such folder"))
    return path


def first_folder(root, *names):
    """The first of the sub-folders that exists, or the folder itself."""
    return next((Path(root) / n for n in names if (Path(root) / n).is_dir()), Path(root))


def first_file(*paths):
    return next((path for path in paths if path.is_file()), None)


def inside(root):
    """What a folder holds, for an error message; archives first, which have to be unpacked."""
    names = sorted(os.listdir(root))
    packed = [name for name in names if name.lower().endswith(ARCHIVES)]
    return f"{', '.join(packed[:3])}: unpack it first" if packed else ", ".join(names[:5]) or "nothing"


def needs(holds, root, what, name):
    if not holds:
        raise Complaint(f"{root}: no {what} in it (found {inside(root)}); see --data={name}:help")


@functools.cache
def formats():
    """Those of FORMATS that this Pillow opens."""
    if find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def scan(root, flag="data", notes=None):
    """Sorted image files below a folder, not hidden ones, each a tuple of its parts; Complaint if there are
    none. Links are followed last, and not if what they lead to was met: no photo counts twice."""
    files, other, folders, again = walk(folder(root, flag))
    cure = "; for .heic: pip install pillow-heif" * any(kind in (".heic", ".heif") for kind in other)
    if not files:
        raise Complaint(f"--{flag}: {root}: no images in it or below (found {inside(root)}){cure}")
    if notes is None:
        return files
    if other:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(other).most_common(5))
        passed = f"{len(other)} file{'s' * (len(other) > 1)} passed over"
        notes.append(f"{root}: {passed}, no pictures: {kinds}{cure}")
    if again:
        few = f"{len(again)} links to what is counted already, {', '.join(again[:5])}"
        notes.append(f"WARNING: {root}: {few}; not followed")
    full = {parts[:k] for parts in {p[:-1] for p in files} for k in range(len(parts) + 1)}
    bare = sorted("/".join(parts) for parts in folders if parts not in full and parts[:-1] in full)
    if bare:
        few = f"no picture in {len(bare)} of its folders, {', '.join(bare[:5])}"
        notes.append(f"WARNING: {root}: {few}; no class for these")
    return files


def walk(root):
    """What lies below a folder: image files, sorted tuples of their parts; kinds of other files; folders, as
    tuples; links to what was met."""
    files, other, again, met, folders, links, aliases = {}, [], [], {}, [()], [], []
    opens, endings = formats(), Image.registered_extensions()
    while folders or links:
        parts = folders.pop() if folders else links.pop(0)
        at = os.path.join(root, *parts)
        if (real := os.path.realpath(at)) in met:
            again.append("/".join(parts))
            continue
        met[real] = parts
        entries = [e for e in os.scandir(at) if not e.name.startswith((".", "__MACOSX"))]
        for entry in sorted(entries, key=lambda entry: entry.name):
            path, kind = (*parts, entry.name), os.path.splitext(entry.name)[1].lower()
            image = endings.get(kind) in opens
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif not kind and not os.path.exists(entry.path):
                raise Complaint(f"{entry.path}: {not_there(entry.path)}; remove it")
            elif not image or os.path.exists(entry.path) and not entry.is_file():  # a pipe may hang
                pipe = f"pipe, device or socket {kind}" * image
                other.append(pipe or kind or "without an ending")
            elif entry.is_symlink():
                aliases.append(path)
            else:
                files[os.path.join(real, entry.name)] = path
    for path in aliases:
        if files.setdefault(os.path.realpath(os.path.join(root, *path)), path) is not path:
            again.append("/".join(path))
    return sorted(files.values()), other, met.values(), again


def scan_paths(root, flag="data", notes=None):
    return [os.path.join(root, *parts) for parts in scan(root, flag, notes)]


# --------------------------------------------------------------------------------------------------------
# pictures: files as they are opened, and what is drawn or composed; each has an image() and a key()

Image.MAX_IMAGE_PIXELS = None  # see PIXELS
SLIMMEST = 100  # sides of a picture
GREY = (124, 116, 104)  # the mean colour of ImageNet
SKIP = "replace it, or leave such files out with --skip_bad"


@contextlib.contextmanager
def opened(path):
    """An image file, not yet decoded. Whatever is wrong with it, inside, too, becomes one Complaint."""
    with reading(path, "a picture", SKIP), Image.open(path, formats=formats()) as image:
        w, h = image.size
        large = f"more than --max_pixels={PIXELS['most']}; raise it if you trust the file, or shrink it"
        require(w * h <= PIXELS["most"], f"{path}: {large}")
        slim = f"{w}x{h} pixels, one side more than 100 times the other; crop it"
        require(max(w, h) <= SLIMMEST * min(w, h), f"{path}: {slim}")  # the shorter side becomes 224 or so
        yield image


def open_image(path):
    """An image file -> PIL image, 8-bit RGB, or RGBA if it has transparency, turned as its EXIF data says; of
    an animation the first frame."""
    with opened(path) as image:
        w, h = image.size
        require(min(w, h) >= 8, f"{path}: {w}x{h} pixels, expected 8x8 or more; {SKIP}")
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            grey, top = np.asarray(image, np.float32), 65535  # of 8, 12 or 16 bits, or floats from 0 to 1
            if not np.isfinite(grey).all() or grey.min() < 0:
                warn_once(path, "values below 0 or not finite come out black; scale them")
                grey = np.nan_to_num(grey, nan=0.0, posinf=0.0, neginf=0.0)
            top = next((t for t in (1, 255, 4095) if grey.max() <= t and (t > 1 or image.mode == "F")), top)
            if top == 4095:
                warn_once(path, "no value above 4095 in 16 bits; read as 12 bits")
            image = Image.fromarray((grey * (255 / top)).clip(0, 255).astype(np.uint8))
        elif deep and max(high for _, high in image.convert("RGB").getextrema()) < 16:
            warn_once(path, "12-bit values in 16 bits of each colour come out dark; scale them")
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


def opaque(image):
    """RGBA -> RGB on white."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class Picture:
    """What can be embedded: image() -> PIL, and key(), the cache's name for it and all that it depends on."""

    def key(self):
        parts = [getattr(self, f.name) for f in fields(self)]
        keys = [part.key() if isinstance(part, Picture) else repr(part) for part in parts]
        return " ".join([type(self).__name__, drawn_by(type(self)), *keys])


@functools.cache
def drawn_by(kind):
    """Hash of the source of a kind of Picture and of what opens and composes them, which people fork."""
    makers = open_image, opened, opaque, layer, posed, view_of, rle_counts, draw_digit
    text = "".join(map(inspect.getsource, makers))
    with contextlib.suppress(OSError, TypeError):  # of a kind that was typed in there is none
        text += inspect.getsource(kind)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Photo(Picture):
    path: str

    def image(self):
        return opaque(open_image(self.path))

    def key(self):
        what = "gone"  # image() says so
        with contextlib.suppress(OSError):
            at = os.stat(self.path)
            what = f"{at.st_size}|{at.st_mtime_ns}|{at.st_ctime_ns}"  # the last cannot be set back
        return f"{os.path.abspath(self.path)}|{what}|{drawn_by(type(self))}"


@dataclass(frozen=True)
class Stored(Picture):
    """An image of which only the embedding is at hand, a row of a file. To look at there is its number."""

    file: str
    row: int
    path = property(lambda self: f"{self.file}[{self.row}]")

    def key(self):
        return f"{Photo(self.file).key()} row {self.row}"

    def image(self):
        tile = Image.new("RGB", (150, 100), GREY)
        ImageDraw.Draw(tile).text((45, 44), f"row {self.row}")
        return tile


@dataclass(frozen=True)
class Ground(Photo):
    def image(self):
        return layer(self.path)


@dataclass(frozen=True)
class Cutout(Photo):
    """A foreground with its alpha, cropped to what is visible: a file, or a Picture in its photo's frame."""

    source: Picture | None = None

    def image(self):
        return layer(self.path, self.source, cut=True)

    def key(self):
        return f"{super().key()} {self.source and self.source.key()}"


@functools.lru_cache(2048)
def layer(path, source=None, cut=False):
    """A background or foreground, kept at 512 pixels at most: thousands of composites share it."""
    image = source.image() if source else open_image(path)
    if cut:
        least, most = image.getchannel("A").getextrema() if image.mode == "RGBA" else (255, 255)
        require(least < 255, f"{path}: no transparency around the foreground; cut it out, or use --skip_bad")
        require(not 8 < most < 128, f"{path}: its largest alpha is {most}, expected 255 on the foreground")
        box = image.getchannel("A").point([0] * 9 + [255] * 247).getbbox() or (0, 0, 0, 0)
        tiny = min(box[2] - box[0], box[3] - box[1]) < 8
        require(not tiny, f"{path}: nothing visible in it, or not 8x8 pixels; move it away, or --skip_bad")
    image = image.crop(box) if cut else opaque(image)
    image.thumbnail((512, 512), Image.BICUBIC, reducing_gap=2)
    return image


@dataclass(frozen=True)
class Mask(Photo):
    """Where a foreground is: "L", 255 on it."""

    def image(self):
        red, green, blue, *alpha = (image := open_image(self.path)).split()
        by_alpha = alpha and len(set(alpha[0].getextrema())) > 1  # a cut-out, or a mask by its transparency
        spread = max(ImageChops.difference(red, other).getextrema()[1] for other in (green, blue))
        grey = f"{self.path}: colours, expected a mask in grey, 255 on the foreground, 0 elsewhere"
        require(by_alpha or spread <= 64, grey)
        mask = alpha[0] if by_alpha else image.convert("L")
        top = mask.getextrema()[1]
        require(not 0 < top < 128, f"{self.path}: its largest value is {top}, expected 255 on the foreground")
        if not top:
            warn_once(self.path, "a mask of nothing: no foreground in its picture")
        return mask


@dataclass(frozen=True)
class Outline(Picture):
    """The same by an outline in a photo, as MS COCO has it: polygons, each floats x1, y1, x2, y2, ... in
    pixels; or (counts,) of an RLE, a string or ints."""

    path: str  # of the photo
    outline: tuple
    size: tuple

    def image(self):
        w, h = self.size
        if isinstance(self.outline[0], str) or isinstance(self.outline[0][0], int):
            counts = rle_counts(self.outline[0])  # of zeros, ones, zeros, ..., down the columns
            good = sum(counts) == w * h and min(counts) >= 0
            require(good, f"{self.path}: the counts of its annotation's RLE do not add up to {w}x{h}")
            on = np.repeat(np.arange(len(counts)) % 2, counts).reshape(w, h).T
            return Image.fromarray(255 * on.astype(np.uint8))
        mask = Image.new("L", self.size)
        for polygon in self.outline:
            ImageDraw.Draw(mask).polygon(polygon, 255)
        return mask


def rle_counts(code):
    """The counts of an RLE of MS COCO: whole numbers as they are, or a string in which each character holds
    five bits, the lowest first, and from the fourth number on the difference to that two before."""
    if not isinstance(code, str):
        return code
    counts, value, shift = [], 0, 0
    for bits in (ord(c) - 48 for c in code):
        value, shift = value | (bits & 31) << shift, min(shift + 5, 70)  # no count has more bits
        if not bits & 32:  # the last of a number; bit 16 is its sign
            value -= (bits & 16) << 1 << (shift - 5)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


@dataclass(frozen=True)
class Masked(Picture):
    """The foreground of a photo, by its Mask or Outline, in the photo's own frame: RGBA."""

    photo: Photo
    mask: Picture
    path = property(lambda self: self.photo.path)

    def image(self):
        image, (w, h) = self.photo.image(), picture_size(self.mask)  # before it is drawn: it may be anything
        sizes = f"a mask of {w}x{h} pixels, the photo {self.path} has {image.width}x{image.height}"
        require(image.size == (w, h), f"{self.mask.path}: {sizes}")
        warn_turned(self.photo)
        image.putalpha(self.mask.image())
        return image


@dataclass(frozen=True)
class Crop(Picture):
    """A part of a picture; box: x1, y1, x2, y2, shares of its width and height."""

    picture: Picture
    box: tuple

    def image(self):
        image = decoded(self.picture)
        left, top, right, bottom = (round(v * n) for v, n in zip(self.box, image.size * 2, strict=True))
        left, top = min(left, image.width - 1), min(top, image.height - 1)
        w, h = max(1, right - left), max(1, bottom - top)
        return image.crop((left, top, left + max(w, h // SLIMMEST), top + max(h, w // SLIMMEST)))


@functools.lru_cache(16)
def decoded(picture):
    """picture.image(), kept while its crops are taken one after the other."""
    return picture.image()


def picture_size(picture):
    """(width, height) of a picture; of a file from its head."""
    if isinstance(picture, Outline):
        return picture.size
    if getattr(picture, "pose", None) or isinstance(picture, Quadrants):
        return picture.size, picture.size
    if not isinstance(picture, Photo):
        return picture.image().size
    with opened(picture.path) as image:
        w, h = image.size
        return (h, w) if image.getexif().get(274) in (5, 6, 7, 8) else (w, h)


def turned(picture):
    """How the EXIF data of a picture in a file turns or mirrors it, 2 to 8; 0 if it does not."""
    if not isinstance(picture, Photo):
        return 0
    with opened(picture.path) as image:
        way = image.getexif().get(274, 1)
        return way if way in range(2, 9) else 0


def warn_turned(picture):
    if turned(picture):
        warn_once(picture.path, "turned by its EXIF data; its mask counts in the turned picture")


@dataclass(frozen=True)
class Pose:
    """How a foreground stands in a composite; one draw of it is one foreground instance."""

    area: float  # of its bounding box, share of the frame
    x: float = 0.5  # place in what room is left, in [0, 1]
    y: float = 0.5
    flip: bool = False
    stretch: float = 1.0  # aspect ratio times this
    hue: float = 0.0  # turned by this share of a circle
    colour: float = 1.0  # saturation times this
    light: float = 1.0  # value times this


def draw_pose(g, recolour=True):
    pose = Pose(g.uniform(0.06, 0.4), g.random(), g.random(), bool(g.random() < 0.5))
    if not recolour:
        return pose
    stretch, hue = math.exp(g.uniform(-0.2, 0.2)), g.uniform(-0.15, 0.15)
    return replace(pose, stretch=stretch, hue=hue, colour=g.uniform(0.4, 1.4), light=g.uniform(0.6, 1.3))


@dataclass(frozen=True)
class View:
    """What of a background is seen, and in which light."""

    box: tuple = (0.0, 0.0, 1.0, 1.0)  # x1, y1, x2, y2, in shares
    flip: bool = False
    light: float = 1.0  # brightness, saturation and contrast times these
    colour: float = 1.0
    contrast: float = 1.0


def draw_view(g, crop=0.5, light=0.3):
    """A random View from the numpy generator g: at least (1 - crop) of the side, light within 1 +- light."""
    side, flip = g.uniform(1 - crop, 1), bool(g.random() < 0.5)
    w, h = (min(1.0, side * math.exp(g.uniform(-0.25, 0.25))) for _ in range(2))
    x, y = g.uniform(0, 1 - w), g.uniform(0, 1 - h)
    bright, colour = g.uniform(1 - light, 1 + light), g.uniform(1 - 1.5 * light, 1 + 1.5 * light)
    return View((x, y, x + w, y + h), flip, bright, colour, g.uniform(1 - light, 1 + light))


@dataclass(frozen=True)
class Composite(Picture):
    """A foreground in a pose on a background. pose None: in the foreground's own frame; ground None: on mean
    grey; figure None: the background alone."""

    figure: Picture | None
    ground: Picture | None
    pose: Pose | None
    view: View = View()
    size: int = 256

    def image(self):
        figure = self.figure and self.figure.image()
        frame = figure.size if figure and self.pose is None else (self.size, self.size)
        image = Image.new("RGB", frame, GREY)
        if self.ground:
            image = view_of(self.ground.image(), self.view, frame)
        if figure:
            figure, at = posed(figure, self.pose, self.size) if self.pose else (figure, (0, 0))
            image.paste(figure, at, figure)
        return image

    def alpha(self):
        """Where the foreground is: PIL L, in the frame of image()."""
        figure, at = posed(self.figure.image(), self.pose, self.size)
        mask = Image.new("L", (self.size, self.size))
        mask.paste(figure.getchannel("A"), at)
        return mask


def posed(figure, pose, size):
    """RGBA figure in a pose -> (RGBA, (left, top)); a little blur softens the edge of the alpha."""
    if pose.flip:
        figure = ImageOps.mirror(figure)
    aspect = figure.width / figure.height * pose.stretch
    w, h = math.sqrt(pose.area * aspect) * size, math.sqrt(pose.area / aspect) * size
    k = min(1, 0.98 * size / max(w, h))
    w, h = max(8, round(w * k)), max(8, round(h * k))
    figure = figure.resize((w, h), Image.LANCZOS)
    alpha = figure.getchannel("A").filter(ImageFilter.GaussianBlur(size / 450))
    if pose.hue or pose.colour != 1 or pose.light != 1:
        hue, colour, light = figure.convert("RGB").convert("HSV").split()
        hue = hue.point([(i + round(256 * pose.hue)) % 256 for i in range(256)])
        colour = colour.point([min(255, round(i * pose.colour)) for i in range(256)])
        light = light.point([min(255, round(i * pose.light)) for i in range(256)])
        figure = Image.merge("HSV", (hue, colour, light)).convert("RGB")
    figure.putalpha(alpha)
    return figure, (round(pose.x * (size - w)), round(pose.y * (size - h)))


def view_of(ground, view, frame):
    """RGB background -> its view, frame = (width, height) in size."""
    box = [v * n for v, n in zip(view.box, ground.size * 2, strict=True)]
    ground = ground.resize(frame, Image.BICUBIC, box)
    if view.flip:
        ground = ImageOps.mirror(ground)
    ground = ImageEnhance.Brightness(ground).enhance(view.light)
    ground = ImageEnhance.Color(ground).enhance(view.colour)
    return ImageEnhance.Contrast(ground).enhance(view.contrast)


@dataclass(frozen=True)
class Quadrants(Picture):
    """A figure in one box and, perhaps, a mark in another, each as large as its box (shares of the image)
    lets it be, mirrored if flips says so; size x size pixels on a view of a ground, or black."""

    figure: Picture
    mark: Picture | None
    at: tuple
    mark_at: tuple
    ground: Picture | None = None
    size: int = 56
    view: View = View()
    flips: tuple = (False, False)

    def image(self):
        canvas, things = Image.new("RGB", (self.size, self.size)), (self.figure, self.mark)
        if self.ground:
            canvas = view_of(self.ground.image(), self.view, canvas.size)
        for thing, box, flip in zip(things, (self.at, self.mark_at), self.flips, strict=True):
            if thing:
                left, top, right, bottom = (round(v * self.size) for v in box)
                image = ImageOps.mirror(thing.image()) if flip else thing.image()
                image = ImageOps.contain(image, (right - left, bottom - top))
                at = (left + right - image.width) // 2, (top + bottom - image.height) // 2
                canvas.paste(image, at, image if image.mode == "RGBA" else None)
        return canvas


@dataclass(frozen=True)
class Rectangle(Picture):
    seed: tuple

    def image(self):
        g, image = rng(self.seed[0], "rectangle", *self.seed[1:]), Image.new("RGB", (28, 28))
        w, h = g.integers(12, 23, 2).tolist()
        x, y = (int(g.integers(1, 28 - n)) for n in (w, h))
        red = (int(g.integers(200, 256)), *g.integers(0, 40, 2).tolist())
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=red)
        return image


@dataclass(frozen=True)
class Digit(Picture):
    """A digit as if written by hand, 28x28; or one of MNIST's, by its 784 bytes."""

    digit: int
    seed: tuple = ()
    pixels: bytes = b""

    def image(self):
        mnist = self.pixels and Image.frombytes("L", (28, 28), self.pixels)
        return (mnist or draw_digit(self.digit, self.seed)).convert("RGB")


@functools.lru_cache(1 << 15)  # settings share most of them
def draw_digit(digit, seed):
    """PIL L (28, 28), white on black: one of its ways, points moved, slanted, turned, bent."""

    def smooth(p, n):
        """Catmull-Rom curve through points p [k, 2] -> [n, 2]."""
        p = np.asarray(p, np.float32)
        q = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
        t = np.linspace(0, len(p) - 1, n)
        i = np.minimum(t.astype(int), len(q) - 4)
        f, (a, b, c, d) = (t - i)[:, None], (q[i], q[i + 1], q[i + 2], q[i + 3])
        return b + 0.5 * f * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * (b - c) + d - a)))

    g, n = rng(seed[0], "digit", digit, *seed[1:]), 4 * 28
    # a line a digit: its ways to be written, each of lines and curves on a square of 100 x 100, y down
    strokes = draw_one(asset("digits.txt").splitlines()[digit].split("|"), g).split(",")
    turn, slant = g.normal(0, 0.14), g.normal(0, 0.25)
    wide, high = g.uniform(0.55, 1.05), g.uniform(0.8, 1.05)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    A, curves = np.array([[wide, slant], [0, high]]) @ turned, []
    bend, phase, pen = g.normal(0, 0.05, 2), g.uniform(0, 6.28, 2), g.uniform(0.055, 0.14) * n
    for stroke in strokes:
        p = np.array(stroke.split(), float).reshape(-1, 2) / 100
        p = p + g.normal(0, 0.035, p.shape)
        p = ((smooth(p, 6 * len(p)) if len(p) > 2 else p) - 0.5) @ A.T
        curves.append(p + bend * np.sin(5 * p[:, ::-1] + phase))
    low, high = np.concatenate(curves).min(0), np.concatenate(curves).max(0)
    scale, shift = g.uniform(0.58, 0.72) * n / (high - low).max(), g.uniform(-0.07, 0.07, 2) * n + n / 2
    image = Image.new("L", (n, n))
    pencil = ImageDraw.Draw(image)
    for p in curves:
        p = (p - (low + high) / 2) * scale + shift
        pencil.line(p.ravel().tolist(), 255, round(pen))
        for x, y in p.tolist():  # round joints and ends
            pencil.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), 255)
    return image.resize((28, 28), Image.BOX)


def draw_one(items, g):
    return items[g.integers(len(items))]


# --------------------------------------------------------------------------------------------------------
# data sets: each is a generator of rows; here the rows become Samples, with splits, prompts and masks

SCENE = "scene"  # what an image shows whose planted feature is all but the class object
CODE = r"[\W\d_]+|n\d{8}|(class|label|cls|cat|category|group|id|c|y)?[-_ ]*\d+|true|false"  # is no name
CODE += r"|.*[\ud800-\udfff].*"  # nor is what is no UTF-8, which no tokenizer reads
SPLIT_NAMES = dict(train=0, training=0, val=1, valid=1, validation=1, dev=1, test=2, testing=2)


class Row(NamedTuple):
    """One image of a data set, with all names as the set has them."""

    picture: object  # the path of a file, or a Picture
    y: str | None  # its class; None: unlabelled
    place: str | None = None  # None: the set has none
    split: int | None = None  # 0 train, 1 val, 2 test; None: splits are made here, for all rows
    caption: str = ""  # "": the usual one
    cut: Composite | None = None  # the foreground, without a ground, where there is a mask
    shows: tuple | None = None  # boxes of the class object, and of the planted feature or SCENE, in shares


@dataclass
class Facts:
    """What the flags ask of a data set, and what the set says of itself beside its rows."""

    chosen: list = field(default_factory=list)  # --classes=a,b
    renamed: list = field(default_factory=list)  # --classes=FILE
    wanted: list = field(default_factory=list)  # --places=p,q
    seed: int = 0
    confounder: float = 1.0  # the share of training images on their class's own place
    strength: float = 0.0  # of controlled settings, as the next two
    spurious: str = "0"
    feature: str = ""
    columns: str = ""  # --columns=ours=theirs,...
    all_labels: bool = False  # --labels=all: models choose among all of ImageNet's, not the folder's own
    names: list = field(default_factory=list)  # of classes, where images have no labels and no flag says them
    notes: list = field(default_factory=list)  # lines to print
    classes: list = field(default_factory=list)  # in their order, if it is not the alphabet's; also places
    places: list = field(default_factory=list)
    labels: list = field(default_factory=list)  # what a model chooses from, if not the classes
    imagenet: list = field(default_factory=list)  # of each class the ImageNet labels
    home_of: dict = field(default_factory=dict)  # of each class the place that it goes with in training
    official: bool = True  # whether splits are the set's own
    published: dict = field(default_factory=dict)  # counts; see compare


@dataclass
class Samples:
    """A labelled data set of n pictures."""

    name: str
    items: list
    y: torch.Tensor  # [n] class, -1: unlabelled
    place: torch.Tensor  # [n], -1: not known; such images are in no group
    split: torch.Tensor  # [n] 0 train, 1 val, 2 test
    classes: list
    places: list
    captions: list
    cut: list  # cut, shows: n, as of Row
    shows: list
    notes: list = field(default_factory=list)  # lines to print
    labels: list = field(default_factory=list)  # the names that a model chooses from
    prompts: list = field(default_factory=list)  # a list of texts for each of the labels
    nameless: str = ""  # why these cannot be used: labels that are numbers or codes
    imagenet: list = field(default_factory=list)  # for each class its ImageNet labels, 0 to 999; or empty
    official: bool = True  # False where the splits are made here, by a rule

    @functools.cached_property
    def digest(self):
        """Hash of what it shows and says, and its masks; of files as the cache knows them, by size, times."""
        cut = [c and c.key() for c in self.cut]
        said = cut, self.captions, self.prompts, [v.tolist() for v in (self.y, self.place, self.split)]
        return hashlib.sha256(json.dumps([[p.key() for p in self.items], said]).encode()).hexdigest()

    @property
    def worst(self):
        """What the smallest accuracy of a group is called: without places to compare groups are classes."""
        return "worst_group" if len(self.places) > 1 else "worst_class"

    def group(self):
        """Group of each image, y * places + place [n]; -1 where one of them is not known."""
        return (self.y * len(self.places) + self.place).where((self.y >= 0) & (self.place >= 0), -1)

    def group_name(self, y, place):
        """What a group is called; of one place, or of an image without any, the class alone."""
        if place < 0 or len(self.places) < 2:
            return self.classes[y]
        return f"{self.classes[y]} on {self.places[place]}"

    def prompt_line(self):
        (text, *rest), label, n = self.prompts[0], self.labels[0], len(self.labels)
        beside = f" and {len(rest)} more, averaged" * bool(rest)
        return f"prompts: {textwrap.shorten(text, 300)!r}{beside} for {label!r}, so of {n} labels"

    def class_prompts(self):
        """The prompts of the classes, where a model chooses among more labels than these; or Complaint."""
        require(not self.nameless, self.nameless)
        if len(self.prompts) == len(self.classes):
            return self.prompts
        return [self.prompts[labels[0]] for labels in self.imagenet]

    def counts(self):
        """Images in each group of each split, [3, classes * places]."""
        return tally(self.group(), self.split, len(self.classes) * len(self.places))

    def keep(self, index):
        """The samples at an index [k], or where a mask [n] is true."""
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        lists = dict(items=self.items, captions=self.captions, cut=self.cut, shows=self.shows)
        lists = {name: [values[i] for i in index.tolist()] for name, values in lists.items()}
        return replace(self, y=self.y[index], place=self.place[index], split=self.split[index], **lists)


def tally(number, split, most):
    """How many images of each number [n] from 0 below most there are in each split, [3, most]."""
    there = number >= 0
    return torch.bincount((split * most + number)[there], minlength=3 * most).view(3, most)


def load_data(spec, classes="", places="", prompts="", masks="", splits=True, seed=0, **planted_by):
    """The data set that --data names, as Samples.

    classes: a file of names, one a line, or a,b: only these of the set's. places: p,q, only these; where as
    many are named as classes, the k-th is the k-th class's own. prompts: see read_prompts. masks: a folder of
    foreground masks. splits: whether the set is to be trained on, and needs labels and images of every class
    in each. planted_by: more of Facts."""
    name, root = set_named(dict(planted_by, data=spec, places=places), SETS)
    rows, template = SETS[name]
    listed = {"renamed" if os.path.isfile(classes) else "chosen": names_in(classes, "classes", 2)}
    facts = Facts(wanted=names_in(places, "places", 1), seed=seed, **listed, **planted_by)
    expect(not prompts or name != "embeddings", "prompts", prompts, "none: texts are in their file")
    gc.disable()  # looking for garbage among a million objects takes as long as reading them
    try:
        samples = samples_of(spec, rows(Path(root) if root else None, facts), facts)
    finally:
        gc.enable()
    if name in CONTROLLED:  # as a discovery of one setting says nothing of another
        samples.name += f" V {facts.strength:g} of {facts.spurious} seed {seed}"
    labels, renamed = samples.labels, facts.renamed
    if renamed and facts.classes is not renamed:  # it is where a folder was numbered by these names already
        n = f"{len(labels)} ({', '.join(labels[:5])}, ...)"
        expect(len(renamed) == len(labels), "classes", classes, f"{n} names, it has {len(renamed)}")
        here = {folded(name): k for k, name in enumerate(labels)}
        moved = [name for k, name in enumerate(renamed) if here.get(folded(name), k) != k]
        expect(not moved, "classes", f"{classes}: {moved[:1]}", f"the set's order, {', '.join(labels[:9])}")
        if labels is samples.classes:
            samples.classes = renamed
        samples.labels = labels = renamed
    if masks:
        files = find_masks([getattr(item, "path", "") for item in samples.items], masks)
        samples.notes += about_masks(masks, files)
        pairs = zip(samples.items, files, strict=True)
        samples.cut = [m and Composite(Masked(item, Mask(m)), None, None) for item, m in pairs]
    texts = read_prompts(prompts, labels, samples.notes) if prompts else [[template]] * len(labels)
    pairs = list(zip(labels, texts, strict=True))
    words = labels if name == "embeddings" else worded(labels)
    samples.prompts = [[t.replace("{}", w) for t in each] for w, each in zip(words, texts, strict=True)]
    codes = [c for c, forms in pairs if re.fullmatch(CODE, c.strip().lower()) and "{}" in "\n".join(forms)]
    if codes and not renamed and name != "embeddings":
        code = f"{len(codes)} of its {len(labels)} class names are numbers or codes, as {codes[0]!r}"
        samples.nameless = f"{samples.name}: {code}: say what they are, --classes=FILE, one a line"
    return check(samples, splits)


def worded(labels):
    """Names as prompts say them: underscores as spaces, without numbers that all have, as 001.Blue_Jay, or
    ids, as n02085620-Chihuahua."""
    bare = [re.sub(r"^(n\d+[-._ ]+|\d+[-._]+)(?=[^\W\d_])", "", name) for name in labels]
    coded = len({*map(folded, bare)} - {*map(folded, labels)}) == len(labels)  # all differ, and still do
    names = bare if coded else labels
    return [n if re.fullmatch(CODE, n.strip().lower()) else n.replace("_", " ") for n in names]


def names_in(text, flag, least):
    """The names in a,b or, one a line, in a file; Complaint where they are not so many, and different."""
    names = [name.strip() for name in text.split(",") if text]
    if os.path.isfile(text):
        names, least = [name for _, name in read_lines(text, flag)], 1
    twice = [name for name, n in Counter(map(folded, names)).items() if n > 1]
    good = not text or least <= len(names) and not twice and "" not in names
    text += f" (twice: {', '.join(twice[:5])})" * bool(twice)
    expect(good, flag, text, "a file, or different names, a,b")
    return names


def samples_of(name, rows, facts):
    """Samples of a generator of Rows: numbers names, makes splits, leaves out what does not exist."""
    everything, notes = list(rows), facts.notes
    rows = [row for row in everything if row.split != len(SPLITS)]
    if len(rows) < len(everything) and not facts.renamed:  # nor do names count that only the others have
        gone = {row.y for row in everything} - {row.y for row in rows}
        there = [k for k, name in enumerate(facts.classes) if name not in gone]
        facts.imagenet = facts.imagenet and [facts.imagenet[k] for k in there]
        facts.classes = [facts.classes[k] for k in there]
        gone = {row.place for row in everything} - {row.place for row in rows}
        facts.places = [name for name in facts.places if name not in gone]
    total = len(rows)
    if facts.chosen:
        rows, chosen = only(rows, "y", facts.chosen, "classes")
        facts.imagenet = facts.imagenet and [facts.imagenet[facts.classes.index(c)] for c in chosen]
        facts.classes = chosen
    if facts.wanted:
        rows, facts.places = only(rows, "place", facts.wanted, "places")
    if len(rows) < total:
        notes.append(f"{name}: {len(rows)} of {total} images are of --classes and --places")
    require(rows, f"--data={name}: no images; see --data={name.partition(':')[0]}:help")
    picture, y, place, split, captions, cut, shows = map(list, zip(*rows, strict=True))
    y, classes = numbered(y, facts.classes, "classes")
    place, places = numbered(place, facts.places, "places")
    place, places = place if places else torch.zeros_like(place), places or ["anywhere"]
    drawn = None in split or not any(split)  # where all is train, too
    P, official = len(places), facts.official and not drawn
    group = (y * P + place).where(place >= 0, len(classes) * P + y)  # without a place: of each class one more
    group = group.clamp(min=-1)  # the unlabelled are one
    split = make_splits(group) if drawn else completed(torch.tensor(split), group, notes)
    items = [Photo(p) if isinstance(p, str) else p for p in picture]
    samples = Samples(name, items, y, place, split, classes, places, captions, cut, shows, notes)
    samples.labels, samples.imagenet, samples.official = facts.labels or classes, facts.imagenet, official
    if not all(captions):
        called, pairs = functools.cache(samples.group_name), zip(y.tolist(), place.tolist(), strict=True)
        samples.captions = [f"a {called(*pair)}" if pair[0] >= 0 else "" for pair in pairs]
    if P < 2 and (y >= 0).any():
        notes.append(f"{name}: no places to compare: no worst group, groups are the classes")
    bare = int((place < 0).sum())
    if bare:
        line = f"{bare} of {len(rows)} images have no place (empty, nan, none, -1), and are in no group"
        notes.append(f"WARNING: {name}: {line}")
    # after the splits, which do not hang on what is lost
    samples = samples.keep(present(picture, name, notes))
    if facts.published and not (facts.chosen or facts.wanted):
        compare(samples, facts.published)
    if facts.wanted and len(facts.wanted) == len(classes):
        facts.home_of = dict(zip(classes, places, strict=True))
    wanted = "1.0: no class has a place of its own here; --classes=a,b --places=p,q give them one"
    asked = facts.confounder == 1 or name.partition(":")[0] == "scenes"  # which draws it itself
    expect(facts.home_of or asked, "confounder", facts.confounder, wanted)
    if facts.home_of:
        samples = correlate(samples, facts.home_of, facts.confounder)
    if not official:
        n = ", ".join(map(str, torch.bincount(samples.split, minlength=3).tolist()))
        notes.append(f"{name}: train, val and test are drawn here, the same each time: {n} images")
    return samples


def only(rows, column, names, flag):
    """The rows whose class (or place) is one of the names; and these names, as the set spells them."""
    occurring = {getattr(row, column) for row in rows} - {None}
    numbered([*occurring], (), flag)  # complains of two spellings
    spelled = {folded(name): name for name in occurring}
    for name in names:
        require(folded(name) in spelled, f"--{flag}: no {name!r} in this data set; {near(name, occurring)}")
    names = [spelled[folded(name)] for name in names]
    return [row for row in rows if getattr(row, column) in names], names


def present(pictures, where, notes):
    """Which pictures exist, bool [n], and a note on those that do not; or Complaint, if none does."""
    names_in_folder = functools.cache(lambda at: set(os.listdir(at)) if os.path.isdir(at) else ())
    here = []  # folders are listed once, as a million questions take long
    for path in pictures:
        at, name = os.path.split(path) if isinstance(path, str) else (None, None)
        here.append(at is None or name in names_in_folder(at or "."))
    lost = [path for path, there in zip(pictures, here, strict=True) if not there]
    if lost:
        line = f"{where}: {len(lost)} of its {len(pictures)} images do not exist, the first is {lost[0]}"
        at = next(p for p in Path(lost[0]).absolute().parents if p.is_dir())
        require(any(here), f"{line} ({at} has {inside(at)}); complete the folder, or mend the paths")
        notes.append(f"WARNING: {line}; they are left out")
    return torch.tensor(here, dtype=torch.bool)


def numbered(names, order, what):
    """Names, None where there is none -> numbers [n], -1 for None, and the names: in an order, or sorted."""
    distinct = sorted(set(names) - {None})
    order, at = list(order or distinct), {}
    for k, name in enumerate(order):
        if (other := at.setdefault(folded(name), k)) < k:
            raise Complaint(f"--data: {order[other]!r} and {name!r} are one name of {what}; rename one")
    for name in distinct:
        if folded(name) not in at:
            flag = "--classes" if what == "classes" else "--data"
            raise Complaint(f"{flag}: no name {name!r} among the {what}; {near(name, order)}")
    number = {name: at[folded(name)] for name in distinct} | {None: -1}
    return torch.from_numpy(np.fromiter(map(number.__getitem__, names), np.int64, len(names))), order


def folded(name):
    """A name as it is compared: without case, underscores as spaces, accents as one letter or two."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


def make_splits(group, shares=(0.6, 0.2, 0.2)):
    """Splits [n] by a rule, the same for the same files: of each group [n] shares for train, val, test."""
    group, split = np.asarray(group), np.zeros(len(group), np.int64)
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.unique(group[order], return_index=True)[1][1:]):
        g = rng(0, "split", int(group[members[0]]) + 1)  # 0: for every seed the same; + 1: -1 is a group, too
        members = members[g.permutation(len(members))]
        at = (np.arange(len(members)) + 0.5) / len(members)
        split[members] = np.searchsorted(np.cumsum(shares)[:2], at, side="right")
    return torch.from_numpy(split)


def completed(split, group, notes):
    """Splits [n] with none missing: without test val is test, without val a fifth of each group's train."""
    train, val, test = torch.bincount(split, minlength=3).tolist()
    if train and val and not test:
        notes.append("no test split: val is used as test")
        split[split == 1] = 2
    if train and not (val and test):
        notes.append("no val split: a fifth of the training images of each group is used as val")
        of_train = (split == 0).nonzero()[:, 0]
        split[of_train] = make_splits(group[of_train], (0.8, 0.2, 0.0))
    return split


def correlate(samples, home_of, confounder):
    """The samples with a biased training split: of each class the share confounder on its own place, home_of
    {class: place}. Further training images on other places go to test where splits are ours, else out."""
    extra, said, short = torch.zeros(len(samples.y), dtype=torch.bool), [], ""
    for y, name in enumerate(samples.classes):
        place = home_of[name]
        expect(place in samples.places, "places", samples.places, f"{place}, of {name}, too")
        train, on = (samples.y == y) & (samples.split == 0), samples.place == samples.places.index(place)
        home, away = int((train & on).sum()), (train & ~on).nonzero()[:, 0]
        allowed = round(home * (1 - confounder) / confounder)
        away = away[torch.from_numpy(rng(0, "confounder", y).permutation(len(away)))]
        extra[away[allowed:]] = True
        said.append(f"{home / max(1, home + min(allowed, len(away))):.0%} of {name} on {place}")
        if len(away) < allowed:
            short = f"WARNING: --confounder={confounder:g} is not reached: too few images on other places; "
    out = f"{int(extra.sum())} more on other places {'are left out' if samples.official else 'go to test'}"
    samples.notes.append(f"{short}training split: {', '.join(said)}; {out}")
    if samples.official:
        return samples.keep(~extra)
    samples.split[extra] = 2
    return samples


def compare(samples, published):
    """Notes whether counts are as published: classes, images, images of each place, groups of each split."""
    groups = samples.counts().tolist()
    places = tally(samples.place, samples.split, len(samples.places)).sum(0).tolist()
    counts = dict(classes=len(samples.classes), images=len(samples.items), places=places)
    counts |= dict(groups=groups, val_test=groups[1:])
    counts = {k: counts[k] for k in published}
    there, stated = (re.sub("[{}':]", "", str(each)) for each in (counts, published))
    line = f"{samples.name}: the published counts, {stated}"
    if counts != published:
        line = f"WARNING: {samples.name}: found {there}; published {stated}: incomplete or another making"
    samples.notes.append(line)


def check(samples, splits=True):
    """Samples with two labels or more; with splits, images of every class in every split; or Complaint."""
    name, n, y = samples.name, len(samples.classes), samples.y
    one = f"{name}: one class only, {', '.join(samples.classes)!r}; expected at least two"
    one = "; ".join([one, *[note for note in samples.notes if "WARNING" in note]])
    require((n if splits else max(n, len(samples.labels))) > 1, one)
    of_class, of_place = tally(y, samples.split, n), tally(samples.place, samples.split, len(samples.places))
    if splits:
        require(y.max() >= 0, f"{name}: no labels; training needs them: a folder for each class")
        for s, split in enumerate(SPLITS):
            lacks = f"no images of class {samples.classes[int(of_class[s].argmin())]}"
            line = f"{name}: split {s} ({split}) has {lacks}; train, val and test need them"
            line += ": splits drawn here four of each class" * (not samples.official)
            require(of_class[s].all(), line)
    for what, names, k in (("class", samples.classes, of_class), ("place", samples.places, of_place)):
        bare = [names[at] for at in (k.sum(0) == 0).nonzero()[:, 0].tolist()]
        if splits and bare:
            raise Complaint(f"{name}: no images of {what} {bare[0]}; leave it out")
        if bare and k.any() and samples.labels is samples.classes:
            samples.notes.append(f"{name}: no image of {len(bare)} {what} names: {', '.join(bare[:5])}")
    if not splits:
        lacks = ((of_class[0] == 0) & (of_class.sum(0) > 0)).nonzero()[:, 0].tolist()
        bare = f"{len(lacks)} of {n} classes, {', '.join(samples.classes[c] for c in lacks[:5])}"
        line = f"WARNING: {name}: no training image of {bare}: no probe names them"
        samples.notes += [line] * bool(lacks and of_class[0].any())
        train, _, test = samples.counts().view(3, n, -1)  # places that are not in test are so by design
        bare = ((train > 0) & (test == 0) & (of_place[2] > 0) & samples.official).nonzero().tolist()
        few = ", ".join(samples.group_name(*pair) for pair in bare[:5])
        line = f"WARNING: {name}: no test image of {len(bare)} groups that training has, {few}: in no figure"
        samples.notes += [line] * bool(bare)
        return samples
    train, val, test = grouped = samples.counts() > 0
    for split, there in zip(SPLITS, grouped.any(1), strict=True):
        cure = "; --columns=place= reads it without" * name.startswith(("csv:", "waterbirds:"))
        require(there, f"{name}: no image of {split} has a place{cure}")
    empty = ((val | test) & ~train).nonzero()[:4, 0].tolist()
    empty = " or ".join(samples.group_name(*divmod(g, len(samples.places))) for g in empty)
    correlated = ": 100 % correlated" * bool((train.view(n, -1).sum(1) == 1).all())
    samples.notes += [f"training set without {empty}{correlated}"] * bool(empty)
    return samples


def read_prompts(path, labels, notes):
    """--prompts=FILE -> for each label a list of texts, {} for its name; openai: CLIP's 80. FILE: templates,
    or lines class<TAB>prompt; in JSON or Python templates, or descriptions of each class, as CuPL's."""
    if path == "openai":
        import open_clip

        return [[t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]] * len(labels)
    texts_of, others, lines = {"": []}, {}, read_lines(path, "prompts")  # "": templates
    tree, names = literal("\n".join(line for _, line in lines)), {folded(label) for label in labels}
    if isinstance(tree, dict) and len(tree) == 1 and folded(next(iter(tree))) not in names:
        tree = next(iter(tree.values()))  # templates under a name
    with reading(path, "templates, or a dict of class: descriptions"):
        if tree is None and re.match(r"[\[{]\s*['\"\[{]", "\n".join(line for _, line in lines)):
            raise Complaint(f"--prompts={path}: a list or dict that is damaged, or holds others; mend it")
        if isinstance(tree, dict):
            lines = [(1, f"{name}\t{text}") for name in tree for text in listed(tree[name])]
        elif tree is not None:
            lines = list(enumerate(listed(tree), 1))
    for number, line in lines:
        name, tab, prompt = line.partition("\t") if "\t" in line else ("", "", line)
        text = re.sub(r"\{[a-z_]*\}", "{}", prompt.strip())
        several = f"{line!r} has several names in braces, expected {{}} for the class"
        require(len({*re.findall(r"\{[a-z_]*\}", prompt)}) < 2, f"--prompts={path}:{number}: {several}")
        if tab and folded(name) not in names:
            others.setdefault(name, number)
        elif not tab and "{}" not in text:
            raise Complaint(f"--prompts={path}:{number}: {line!r}, expected a {{}}, or class<TAB>prompt")
        texts_of.setdefault(folded(name), []).append(text)
    if others and (not isinstance(tree, dict) or len(others) == len(tree)):
        name, number = next(iter(others.items()))
        raise Complaint(f"--prompts={path}:{number}: no class {name!r}; {near(name, labels)}")
    texts = [texts_of.get(folded(label), texts_of[""]) for label in labels]
    if not all(texts):
        bare = labels[texts.index([])]
        raise Complaint(f"--prompts={path}: no prompt for class {bare!r}; add one, or a template with {{}}")
    pairs = [(folded(c), text) for c, forms in zip(labels, texts, strict=True) for text in forms]
    mute = sum("{}" not in text and c not in folded(text) for c, text in pairs)
    notes += [f"--prompts={path}: {len(others)} classes in it are none of these, and not used"] * bool(others)
    notes += [f"--prompts={path}: {mute} prompts do not name their class; read as they are"] * bool(mute)
    return texts


def literal(text):
    """The tree in a text in JSON, or in Python: a list or dict, perhaps behind `name =`, of strings, perhaps
    lambda c: f'... {c}', perhaps without the brackets; or None."""
    text = re.sub(r"lambda \w+:\s*f(?=['\"])", "", text)
    text = re.sub(r"(['\"])\s*\n\s*(?=['\"])", r"\1,\n", text)  # a lost comma, or Python would join the two
    for part in (text, text.partition("=")[2] if re.match(r"\w+\s*=", text) else "", f"[{text}]"):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                tree = read(part.strip())
                if isinstance(tree, (list, tuple, dict)) and tree and all(isinstance(k, str) for k in tree):
                    return tree
    return None


def listed(texts):
    """A string or several -> a list of them; or ValueError."""
    texts = [texts] if isinstance(texts, str) else texts
    if not texts or isinstance(texts, dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"found {str(texts)[:60]}, expected strings")
    return [" ".join(text.split()) for text in texts]


def find_masks(paths, masks, flag="masks"):
    """For each image the mask NAME.png below the folder masks, or None. NAME: the end of the image's path, as
    long as possible, or that up to its last '_', if no other image is called so. A photo is no mask."""
    bases = {os.path.splitext(path)[0] for path in paths}
    masks, photos, files = folder(masks, flag), {os.path.realpath(path) for path in paths}, []
    expect(any(paths), flag, str(masks), "images in files: those of this data set are drawn")
    for path in paths:
        parts = Path(os.path.splitext(path)[0]).parts
        ends = [Path(*parts[-depth:]).as_posix() for depth in range(min(4, len(parts)), 0, -1)]
        if "_" in parts[-1] and os.path.splitext(path)[0].rpartition("_")[0] not in bases:
            ends = [stem for end in ends for stem in (end, end.rpartition("_")[0])]
        names = [str(masks / f"{stem}.png") for stem in ends if stem and not stem.endswith("/")]
        good = (f for f in names if os.path.isfile(f) and os.path.realpath(f) not in photos)
        files.append(next(good, None))
    none = f"--{flag}: {masks}: no mask for any image (found {inside(masks)})"
    require(any(files), f"{none}; for {path} one of {', '.join(names[-4:])}")
    owner = {}
    for path, file in zip(paths, files, strict=True):
        other = owner.setdefault(file, path) if file else path
        if other != path and os.path.basename(other) == os.path.basename(path):
            raise Complaint(f"--{flag}: {file}: the mask of two photos, {other} and {path}; use folders, too")
    return files


def about_masks(where, files):
    """Notes on masks of images, None where there is none: how many there are; a warning where most of some
    are white along most of their edge: it is the foreground, seldom at the edge, that should be white."""
    there, edges = [f for f in files if f], []
    for file in there[:: 1 + len(there) // 8]:
        with contextlib.suppress(Complaint):  # said when it is used
            a = np.asarray(Mask(file).image()) > 127
            edges.append(np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]]).mean() > 0.75)
    few = f"{where}: masks for {len(there)} of {len(files)} images; what needs one is of these only"
    line = f"{where}: {sum(edges)} of {len(edges)} masks are white along their edge: white is the foreground"
    inverse = f"WARNING: {line}; invert them if it is not"
    return [few] * (len(there) < len(files)) + [inverse] * bool(2 * sum(edges) > len(edges))


# --------------------------------------------------------------------------------------------------------
# tables of images: columns under the names that people use, classes by names or numbers, splits

EMPTY = {"", "nan", "na", "n/a", "null", "<na>"}  # no value, as is Python's None
COLUMNS = {  # what we call them, and what people do, the likeliest first
    "path": "path file_name filename img_filename filepath file_path image_path img_path image_file image "
    "file img image_name img_name image_id",
    "y": "y label target class class_name label_name category y_true true_label class_id label_id "
    "category_id ground_truth gt labels targets",
    "place": "place a background attribute env environment confounder group domain context spurious attr",
    "split": "split partition subset set phase",
    "predicted": "predicted prediction pred y_pred yhat y_hat predicted_label pred_label predicted_class "
    "predictions preds",
    "confidence": "confidence conf probability prob score",
}
BOXES = {
    "x1": "x1 xmin x_min left",
    "y1": "y1 ymin y_min top",
    "x2": "x2 xmax x_max right",
    "y2": "y2 ymax y_max bottom",
    "width": "width",  # of the picture that they are stated for, may be missing
    "height": "height",
}


def empty(text):
    return text.strip().casefold() in EMPTY or text.strip() == "None"


def decimal(text):
    return float(text.replace(",", "."))  # as half of the world writes it


class Table(dict):
    """The columns of a table: name -> tuple of strings, one for each row. lines: where each ends in the file,
    in which lines may be empty, and fields run over several."""

    def __init__(self, path, columns, lines):
        super().__init__(columns)
        self.path, self.lines, self.count = path, lines, len(lines)

    def complaint(self, k, problem):
        return Complaint(f"{self.path}:{self.lines[k % self.count]}: {problem}")  # of two columns in one, too


def read_table(path):
    """The Table in a file with a header, its fields between commas, semicolons, tabs, bars or blanks; UTF-8,
    or UTF-16 as Excel writes it. Fast enough for a million rows."""
    with reading(path, "a table in UTF-8", "save it as .csv in UTF-8"):
        raw = Path(path).read_bytes()
        utf = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = re.sub(r"^sep=.\r?\n", "\n", raw.decode(utf).replace("\0", ""))  # Excel's
        if text.lstrip()[:1] in ("{", "["):
            return records(path, text)
        head = text[:10_000].lstrip().partition("\n")[0]
        mark = max(",;\t|", key=head.count)
        mark = mark if mark in head else " "
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=mark != "\t")
        pairs = [(row, reader.line_num) for row in reader if row]
    rows, lines = [row for row, _ in pairs], [line for _, line in pairs]
    if mark == " " and len(rows) > 2:
        # as CelebA's: the number of rows, the names of all columns but the first, blanks at the ends
        rows = [row[:-1] if not row[-1] else row for row in rows]
        rows = rows[1:] if len(rows[0]) == 1 < len(rows[1]) else rows
        rows[0] = [""] * (len(rows[1]) - len(rows[0]) == 1) + rows[0]
    names, rows = ([name.strip() for name in rows[0]], rows[1:]) if len(rows) > 1 else ([], [])
    lines = lines[len(lines) - len(rows) :]
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(names):
            fields = f"{len(row)} fields ({mark.join(row)[:60]!r}), expected {len(names)}"
            raise Complaint(f"{path}:{line}: {fields}")
    for name, n in Counter(names).items():
        require(n == 1 or not name, f"{path}: two columns {name!r}; rename one")
    return Table(path, zip(names, zip(*rows, strict=True), strict=True), lines)


def records(path, text):
    """The Table in JSON: a list of objects, or one a line, as Hugging Face's metadata.jsonl; or an object of
    columns, as pandas writes it."""
    pairs = [(k, line) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
    listed = text.lstrip()[0] == "["  # then the k-th object is said to be in line k
    trees = json.loads(text) if listed else [json.loads(line) for _, line in pairs]
    if len(trees) == 1 and all(isinstance(v, (dict, list)) for v in trees[0].values()):
        columns = [v if isinstance(v, dict) else dict(enumerate(v)) for v in trees[0].values()]
        if any(list(v) != list(columns[0]) for v in columns):
            raise ValueError("its columns have different rows")
        columns = [v.values() for v in columns]
        trees, listed = [dict(zip(trees[0], row, strict=True)) for row in zip(*columns, strict=True)], True
    names = dict.fromkeys(name for tree in trees for name in tree)
    columns = {n: tuple("" if (v := tree.get(n)) is None else str(v) for tree in trees) for n in names}
    return Table(path, columns, list(range(1, len(trees) + 1)) if listed else [k for k, _ in pairs])


def columns_of(table, chosen, ours, needed=()):
    """Which column of a table is what: {name of ours, of COLUMNS or BOXES: theirs, or None}, and a line that
    says so. chosen: --columns, ours=theirs,...; nothing behind = for none."""
    require(table, f"{table.path}: no rows; expected a header, and rows below it")
    usual = {name: (COLUMNS | BOXES)[name].split() for name in ours}
    spelled = {folded(c): c for c in table if c}
    for pair in chosen.split(",") if chosen else ():
        name, equals, theirs = map(str.strip, pair.partition("="))
        expect(equals and name in usual, "columns", chosen, f"ours=theirs,..., ours of {', '.join(ours)}")
        there = not theirs or folded(theirs) in spelled
        expect(there, "columns", theirs, f"a column of {table.path}; {near(theirs, spelled.values())}")
        usual[name] = [theirs] if theirs else []
    if {"x", "y"} <= spelled.keys() and set(map(folded, usual.get("y", [])[1:])) & spelled.keys():
        usual["y"].remove("y")  # beside x and a label it is a coordinate
    at = {}
    for name in ours:
        at[name] = next((spelled[folded(c)] for c in usual[name] if folded(c) in spelled), None)
    headless = any(re.search(r"\.(jpe?g|png)$", c, re.I) for c in table)
    for name in needed:
        cure = f"say which it is, --columns={name}=NAME" if "y" in ours else f"expected {','.join(needed)}"
        cure = f"the first line is no header; write one above it, as {','.join(needed)}" if headless else cure
        line = f"{table.path}: no column {name!r} (found: {', '.join([*table][:20])}); {cure}"
        require(at[name] is not None, line)
    rest = ", ".join(c for c in table if c and c not in at.values())
    used = ", ".join(f"{name} is {theirs!r}" for name, theirs in at.items() if theirs is not None)
    cure = f"; columns not used: {rest}" * bool(rest) + " (see --columns)" * bool(rest and "y" in ours)
    steps = itertools.pairwise([1, *table.lines])  # without a gap none runs over several
    if any(b - a > 1 for a, b in steps) and (long := sum("\n" in v for c in table.values() for v in c)):
        cure += f"; WARNING: {long} fields run over several lines; if a quote opens by mistake, rows are lost"
    return at, f"{table.path}: {used}{cure}"


def named(table, column, names=()):
    """A column of classes or places -> for each row its name, None where it is empty; all names in order; and
    notes. Whole numbers, also as 1.0, are those that occur; case makes no other name of a word. names: of
    --classes=FILE, in order."""
    values, where = table[column], f"{table.path}: {column}"
    text = {v: v.strip() for v in set(values) if not empty(v)}
    number = {v: re.fullmatch(r"(-?[0-9]{1,18})(\.0*)?", t) for v, t in text.items()}
    words, notes = [v for v, n in number.items() if not n], []
    if words and len(words) < len(number) / 2:
        k = next(k for k, v in enumerate(values) if v in number and not number[v])
        raise table.complaint(k, f"{column}={values[k][:60]!r}, not a whole number as in other rows")
    if words:
        mixed = f"WARNING: {where} has words and numbers, as {words[0][:60]!r}; all are read as words"
        notes, spelling = [mixed] if len(words) < len(number) else [], {}  # the commonest of each name
        for v, _ in Counter(v for v in values if v in text).most_common():
            spelling.setdefault(folded(text[v]), text[v])
        other = sorted(set(text.values()) - set(spelling.values()))
        one = f"WARNING: {where}: spelled otherwise, but taken for one name: {', '.join(other[:5])}"
        notes += [f"{one} ({len(other)})"] * bool(other)
        text = {v: spelling[folded(t)] for v, t in text.items()}
        return [text.get(v) for v in values], list(names) or sorted(spelling.values()), notes
    number = {v: int(n[1]) for v, n in number.items()}
    if set(number.values()) != {-1, 1}:  # -1 says that the class is not known
        number = {v: n for v, n in number.items() if n != -1}
    distinct, name_of = sorted(set(number.values())), dict(enumerate(names))
    if len(names) in (0, len(distinct)):
        name_of = dict(zip(distinct, names or map(str, distinct), strict=True))
        if distinct != list(range(len(distinct))):
            said = ", ".join(map(str, distinct[:20])) + ", ..." * (len(distinct) > 20)
            said = f"{where} has the numbers {said}: {len(distinct)}, those that occur"
            notes = [said + f", named {', '.join(names[:20])}" * bool(names)]
    odd = {v for v, n in number.items() if n not in name_of}
    if odd:
        k = next(k for k, v in enumerate(values) if v in odd)
        raise table.complaint(k, f"{column}={values[k]!r}, expected 0 to {len(names) - 1}, of the names")
    number = {v: name_of[n] for v, n in number.items()}
    return list(map(number.get, values)), list(names) or list(name_of.values()), notes


def split_numbers(values, name, complaint, notes):
    """0, 1, 2 of values such as 0, 1.0, train, val; if each of these occurs 3 of other words, as WILDS's
    id_val; else raises complaint(k, what is wrong)."""
    if re.fullmatch("(is |in )?(train|training|val|test|testing)( image| set)?", folded(name)):
        raise complaint(0, f"{name} says whether, not which; expected a column of train, val, test")
    numbers = SPLIT_NAMES | {"0": 0, "1": 1, "2": 2}
    out = len(SPLITS)
    number = {v: numbers.get(str(v).strip().lower().removesuffix(".0"), out) for v in set(values)}
    split = [number[v] for v in values]
    if out in split:
        k, odd = split.index(out), "".join(str(v) for v, s in number.items() if s == out)
        there = f"{name}={str(values[k])[:60]!r}, so {split.count(out)} of {len(split)}"
        if not {0, 1, 2} <= {*split} or re.search(r"\d", odd):
            cure = "leave such rows out, or read it without that column"
            raise complaint(k, f"{there}, expected 0, 1, 2 or train, val, test; {cure}")
        notes.append(f"WARNING: {there} rows are neither train, val nor test, and are left out")
    return split


def places_and_splits(table, at, facts):
    """Of each row of a table its place and its split: lists, of None where there is no such column."""
    place, split = [None] * table.count, [None] * table.count
    if at["place"]:
        place, facts.places, notes = named(table, at["place"])
        facts.notes += notes
    if at["split"]:
        split = split_numbers(table[at["split"]], at["split"], table.complaint, facts.notes)
    return place, split


def table_rows(table, facts, needed):
    """Of each row of a table its image's path, class, place and split: lists."""
    at, line = columns_of(table, facts.columns, ("path", "y", "place", "split"), needed)
    y, facts.classes, notes = named(table, at["y"], facts.renamed)
    facts.notes += [line, *notes]
    place, split = places_and_splits(table, at, facts)
    bare = [k for k, name in enumerate(y) if name is None and split[k] != len(SPLITS)]
    if bare:
        raise table.complaint(bare[0], f"{at['y']} is empty or -1; give every image its class")
    words = spoken(set(y) - {None}, facts)
    y = [words.get(name, name) for name in y]
    names, root = table[at["path"]], os.path.dirname(table.path) or "."
    below = os.path.abspath(root) + "/"
    names = [name.removeprefix(below) for name in names]
    if all(map(os.path.isabs, names)):
        root = os.path.commonpath({os.path.dirname(name) for name in names})
        names = [name[len(root) :].lstrip("/") for name in names]
    return inside_root(root, table, names), y, place, split


def inside_root(root, table, names):
    """Paths of a table's images; Complaint for a name that leads out of root, or that is listed twice."""
    lines = {}
    for k, name in enumerate(names):
        path = os.path.normpath(name.strip().replace("\\", "/"))  # ./a.png is a.png
        if path in (".", "..") or path.startswith(("/", "../")):
            raise table.complaint(k, f"image {name!r}, expected a path inside {root}")
        line = lines.setdefault(path, table.lines[k])
        if line < table.lines[k]:
            raise table.complaint(k, f"image {path!r} is listed already in line {line}")
    return [os.path.join(root, path) for path in lines]


def csv_table(path, facts):
    """csv:FILE       any table of images and groups with a header: between commas, semicolons or tabs;
    also JSON, a list of objects or one a line
    path      relative to the table's folder, or below it; or all absolute
    y         class: names, or whole numbers
    split     0, 1, 2 or train, val, test; may be missing: 3/5, 1/5, 1/5 of each group
    place     names or numbers; may be missing. Images whose place is empty or nan count in no group.
    Usual names will do, as file_name, label, partition, background, a, group; else --columns=place=weather,
    path=photo says which they are, and --columns=place= that there is none.
    --classes=FILE names the classes of y, one a line; --prompts=FILE as for folder:DIR."""
    return map(Row, *table_rows(read_table(path), facts, ("path", "y")))


def waterbirds(root, facts):
    """waterbirds:DIR       land- or waterbird? Groups: bird x place; also your own of this layout
    Download waterbird_complete95_forest2water2.tar.gz, linked from the README of the repository
    kohpangwei/group_DRO (the 100 % set, waterbird_1.0_forest2water2, from spetryk/GALS), and unpack it.
    Any folder of this layout will do, with any number of classes and places:
    DIR/metadata.csv     img_filename,y,split,place,place_filename; split 0 train, 1 val, 2 test
    DIR/001.Black_footed_Albatross/....jpg     as img_filename says
    Land- and waterbirds are known by their species, land and water by place_filename; all by their counts.
    To make one: CUB's photos and segmentations (data.caltech.edu/records/65de6-vp158 and w9d68-gec53), photos
    of two places, and for each bird Pillow's Image.composite(photo, place, mask), all three of one size."""
    table = folder(root, "data waterbirds") / "metadata.csv"
    needs(table.is_file(), root, "metadata.csv", "waterbirds")
    table = read_table(table)
    grounds = next((c for c in table if folded(c) == "place filename"), "")
    grounds = table.pop(grounds, ())  # what the place's name is read off
    paths, y, place, split = table_rows(table, facts, ("path", "y", "split", "place"))
    each = slice(None, None, max(1, len(y) // 5000))
    species = [os.path.basename(os.path.dirname(path)) for path in paths[each]]
    what = told_by(y[each], species, dict(waterbird=WATERBIRDS), "landbird")
    where = told_by(place[each], grounds[each], dict(water=WATER, land=LAND))
    groups = Counter(zip(split, y, place, strict=True))
    if [[groups[s, a, b] for a in "01" for b in "01"] for s in (1, 2)] == OFFICIAL:
        what, where = {"0": "landbird", "1": "waterbird"}, {"0": "land", "1": "water"}
    if len(y) == 11788 or "waterbird_complete" in root.name or "forest2water2" in root.name:
        facts.published = dict(val_test=OFFICIAL)
    facts.classes = [what.get(name, name) for name in facts.classes]
    facts.places = [where.get(name, name) for name in facts.places]
    for path, a, b, s in zip(paths, y, place, split, strict=True):
        yield Row(path, what.get(a, a), where.get(b, b), s)


WATERBIRDS = (  # words of their species' names
    "albatross auklet cormorant frigatebird fulmar gull jaeger kittiwake pelican puffin tern gadwall grebe "
    "mallard merganser guillemot loon"
)
WATER, LAND = "water ocean sea lake beach", "land forest bamboo broadleaf"
OFFICIAL = [[467, 466, 133, 133], [2255, 2255, 642, 642]]  # groups of val and test, of all makings


def told_by(values, keys, words, rest=None):
    """What numbered classes or places are called by their images' species or backgrounds: {value: name} that
    four fifths of its keys have. words: {name: words, of which a key has one}; rest: what others are."""
    hits = {}
    for value, key in zip(values, keys, strict=False):
        parts = re.split("[^a-z]+", key.lower())
        name = next((name for name, listed in words.items() if {*parts} & {*listed.split()}), rest)
        hits.setdefault(value, Counter())[name] += 1
    called = {value: n.most_common(1)[0] for value, n in hits.items() if str(value).isdecimal()}
    called = {value: name for value, (name, k) in called.items() if name and k >= 0.8 * hits[value].total()}
    return called if 1 < len(called) == len(set(called.values())) else {}


def celeba(root, facts):
    """celeba:DIR       is the hair blond (Blond_Hair)? Groups: hair x Male
    Download from the site of the Multimedia Laboratory of CUHK ("CelebA"; also on Kaggle, as csv files):
    DIR/list_attr_celeba.txt or .csv        (or in DIR/Anno)
    DIR/list_eval_partition.txt or .csv     (or in DIR/Eval)
    DIR/img_align_celeba/000001.jpg ...     (or in DIR/Img)"""
    root, tables = folder(root, "data celeba"), []
    for name in ("list_attr_celeba", "list_eval_partition"):
        files = [root / sub / f"{name}.{kind}" for sub in ("", "Anno", "Eval") for kind in ("txt", "csv")]
        tables.append(first_file(*files))
        needs(tables[-1], root, f"{name}.txt or .csv", "celeba")
    facts.classes, facts.places = ["dark hair", "blond hair"], ["female", "male"]
    train, val = [71629, 66874, 22880, 1387], [8535, 8276, 2874, 182]
    facts.published = dict(groups=[train, val, [9767, 7535, 2480, 180]])
    faces = read_table(tables[0])
    with reading(tables[0], "CelebA's table of attributes, with Blond_Hair and Male"):
        hair, gender = (yes_or_no(faces, name) for name in ("Blond_Hair", "Male"))
        names = next(iter(faces.values()))  # the official file has no name for the first column
    with reading(tables[1], "CelebA's table of splits, 0, 1 or 2, for the same images"):
        pairs = [line.replace(",", " ").split() for _, line in read_lines(tables[1], "data")]
        split = {name: int(s) for name, s in pairs if s in ("0", "1", "2")}
        split = [split[name] for name in names]
    at = "img_align_celeba"
    images = first_folder(root, f"{at}/{at}", at, f"Img/{at}")
    paths = inside_root(images, faces, names)
    for path, blond, male, s in zip(paths, hair, gender, split, strict=True):
        y, place = facts.classes[blond], facts.places[male]
        yield Row(path, y, place, s, f"a photo of a {place} celebrity with {y}")


def yes_or_no(table, column):
    """An attribute of CelebA's, 1 or -1 (or 0, 1.0, True) -> list of bool."""
    signs = {"1": True, "true": True, "-1": False, "0": False, "false": False}
    values = [signs.get(v.strip().lower().removesuffix(".0")) for v in table[column]]
    if None in values:
        k = values.index(None)
        raise table.complaint(k, f"{column}={table[column][k][:60]!r}, expected 1 or -1")
    return values


def load_predictions(path, columns="", classes=""):
    """What another program predicted, a table of y, predicted and, if it has them, place, confidence, split,
    path (see COLUMNS) -> Samples, what each is taken for [n], and how surely [n], NaN if it is not said."""
    t, notes = read_table(path), []
    at, _ = columns_of(t, columns, tuple(COLUMNS), ("y",))
    if at["predicted"] is None:
        add_predicted(t, at, notes)
    at, note = columns_of(t, columns, tuple(COLUMNS), ("y", "predicted"))
    n, facts = t.count, Facts()
    both = t[at["y"]] + t[at["predicted"]]
    kind = {v: folded(v) for v in dict.fromkeys(both)}
    spelled = {kind[v]: v for v in reversed(kind)}  # as it comes first
    t["y and predicted"] = tuple(spelled[kind[v]] for v in both)  # numbered together
    renamed = names_in(classes, "classes", 2) if os.path.isfile(classes) else []
    words, facts.classes, of_names = named(t, "y and predicted", renamed)
    y, taken = words[:n], words[n:]
    both = f"{path}: no value in both {at['y']} and {at['predicted']}; give them the same names"
    require(set(y) & set(taken) - {None}, both)
    never, unknown = (sorted({*a} - {*b} - {None}) for a, b in ((y, taken), (taken, y)))
    if never and unknown:
        alike = f"{never[0]!r} is never predicted, {unknown[0]!r} in no {at['y']}"
        notes.append(f"WARNING: {path}: {alike}; if they are one class, spell it alike")
    facts.notes = [*notes, note, *of_names, *numbered_alike(t, at)]
    twice = len(t[at["path"]]) - len(set(t[at["path"]])) if at["path"] else 0
    facts.notes += [f"WARNING: {path}: {twice} rows are of an image that stands above, too"] * bool(twice)
    place, split = places_and_splits(t, at, facts)
    sure = []  # from 0 to 1
    for k, text in enumerate(t[at["confidence"]] if at["confidence"] else [""] * n):
        with contextlib.suppress(ValueError):
            sure.append(math.nan if empty(text) else decimal(text))
        if len(sure) == k or sure[k] < 0 or sure[k] > 1 + 1e-5:  # of float32's sums
            wanted = "expected a number from 0 to 1; scale it, or read none: --columns=confidence="
            raise t.complaint(k, f"{at['confidence']}={text[:60]!r}, {wanted}")
    names = [os.path.join(os.path.dirname(path), v) for v in t[at["path"]]] if at["path"] else [""] * n
    pairs = zip(t.lines, names, strict=True)
    pictures = [Photo(v) if os.path.isfile(v) else Stored(path, k) for k, v in pairs]
    samples = samples_of(f"predictions:{path}", map(Row, pictures, y, place, [2] * n), facts)
    if at["split"]:
        samples.split = torch.tensor(split)
    samples.prompts = [[name] for name in samples.classes]
    taken = numbered(taken, facts.classes, "classes")[0]
    sure = of_predicted(torch.tensor(sure).clamp(max=1), taken, samples)
    keep = (samples.y >= 0) & (taken >= 0)
    bare = int((~keep & (samples.split < len(SPLITS))).sum())
    facts.notes += [f"WARNING: {path}: {bare} of {n} rows lack y or predicted; left out"] * bool(bare)
    keep &= samples.split < len(SPLITS)
    bare, kept = int(sure[keep].isnan().sum()), int(keep.sum())
    facts.notes += [f"{path}: {bare} of {kept} rows have no confidence: no ece"] * (0 < bare < kept)
    return check(samples.keep(keep), False), taken[keep], sure[keep]


SCORES = "(logit|prob|probability|softmax|score|p)s?(?: (?:class )?(.+)|([0-9]+))"


def add_predicted(t, at, notes):
    """Gives a table predictions and confidences: of eval.py's predictions.csv, NAME and NAME confidence, if
    there is one model; or, with scores of each class of y, logit_0, logit_1, ..., the largest."""
    ours, kinds = [c for c in t if f"{c} confidence" in t], {}
    if ours:
        cure = f"say whose, --columns=predicted={ours[0]},confidence={ours[0]} confidence"
        require(len(ours) == 1, f"{t.path}: predictions of {', '.join(ours)}; {cure}")
        t["predicted"], t["confidence"] = t[ours[0]], t[f"{ours[0]} confidence"]
    for column in [] if ours else t:
        if match := re.fullmatch(SCORES, folded(column)):
            kinds.setdefault(match[1], {})[match[2] or match[3]] = column
    classes = {folded(v).removesuffix(".0") for v in set(t[at["y"]])} - EMPTY - {"-1"}
    for kind, of in [(kind, of) for kind, of in kinds.items() if {*of} >= classes and len(of) > 1][:1]:
        with reading(t.path, said := f"a table with numbers in {', '.join(of.values())}"):
            x = torch.tensor([[*map(decimal, t[column])] for column in of.values()])  # [C, n]
            require(x.isfinite().all(), f"{t.path}: not {said}: some are not finite")
        shares = x.min() >= 0 and (x.sum(0) - 1).abs().max() < 1e-3  # whatever they are called
        sure, k = (x.softmax(0) if kind == "logit" and not shares else x).max(0)
        t["predicted"] = tuple(map([*of].__getitem__, k.tolist()))
        if at["confidence"] is None and (kind == "logit" or x.min() >= 0 and x.max() <= 1):
            t["confidence"] = tuple(map(str, sure.tolist()))
        notes.append(f"{t.path}: predicted is the largest of {', '.join(of.values())}")


def numbered_alike(t, at):
    """A warning, [line] or [], where one of y and predicted seems to count from 1 and the other from 0;
    Complaint where only one has -1 and 1."""
    y, taken = ({v.strip().removesuffix(".0") for v in set(t[at[k]])} - EMPTY for k in ("y", "predicted"))
    said = f"{t.path}: {at['y']} has {', '.join(sorted(y)[:5])}, {at['predicted']} "
    said += ", ".join(sorted(taken)[:5])
    require({"-1", "1"} not in (y, taken) or "0" not in y | taken, f"{said}; give both the same numbers")
    ends = [(min(map(int, v)), max(map(int, v))) for v in (y, taken) if all(map(str.isdecimal, y | taken))]
    moved = ends and ends[0][0] - ends[1][0] == ends[0][1] - ends[1][1] in (-1, 1)
    return [f"WARNING: {said}: if one counts from 0 and the other from 1, mend that"] if moved else []


def of_predicted(sure, taken, samples):
    """Confidences [n] of what is predicted [n]: of two classes none is below 1/2. Where those of a table are,
    they are the second's, as people store them, or NaN; a note says so."""
    told, line = taken >= 0, "are not of the predicted: no ece"
    if len(samples.classes) != 2 or not (sure[told] < 0.499).any():  # a tie, rounded
        return sure
    other = sure.where(taken == 1, 1 - sure)
    if (other[told] < 0.499).any():
        other = torch.full_like(sure, torch.nan)
    else:
        line = f"are read as those of {samples.classes[1]!r}"
    samples.notes.append(f"WARNING: confidences, of two classes some below 1/2, {line}")
    return other


# --------------------------------------------------------------------------------------------------------
# folders of images, and embeddings from elsewhere


def scenes(root, facts):
    """scenes[:DIR]      the embedded default: birds on places; or a folder of your own, composed anew
    DIR/train/landbird/*.webp, DIR/train/waterbird/*.webp    cut-outs (RGBA) of two classes; so val, test
    DIR/train/land/*.webp, DIR/train/water/*.webp            backgrounds
    In train the share --confounder of each class stands on its own place; val and test are balanced."""
    root, classes, places = root or ASSETS / "scenes", ("landbird", "waterbird"), ("land", "water")
    for s, n in enumerate((600, 200, 600)):
        at = {name: scan_paths(root / SPLITS[s] / name) for name in (*classes, *places)}
        for k in range(n):
            g, y, home = rng(facts.seed, "scene", s, k), k % 2, (k // 2 + 0.5) / (n / 2) < facts.confounder
            place = (y if home else 1 - y) if s == 0 else k // 2 % 2
            figure, ground = draw_one(at[classes[y]], g), draw_one(at[places[place]], g)
            item = Composite(Cutout(figure), Ground(ground), draw_pose(g, False), draw_view(g, 0.3, 0.15))
            what, where = (Path(path).stem.partition("__")[0] for path in (figure, ground))
            caption = f"a picture of a {classes[y]} ({what}) with {where} behind it"
            yield Row(item, classes[y], places[place], s, caption, replace(item, ground=None))


def image_folder(root, facts):
    """folder:DIR       your own images, in one of the layouts
    DIR/split/class/place/*    split: train, val or test; the folder below the class is the place (the group)
    DIR/split/class/*    DIR/class/place/*    DIR/class/*    or place/class/*, if --classes names these
    DIR/*                unlabelled; --classes says what to choose from
    Folders named by WordNet's ids, n01440764, have their names.
    --classes=FILE: names in order, one a line; a class folder must bear one of them (but for case and _).
    --prompts=FILE: templates with {} for the name, or lines class<TAB>prompt; several are averaged.
    Without split folders, or with train alone, 3/5, 1/5, 1/5 of each group are train, val, test; without val
    1/5 of train is."""
    paths, facts.classes, where = scan(root, notes=facts.notes), facts.renamed, f"--data=folder:{root}"
    moved = {p: p for p in paths}
    if all(len(p) > 2 and p[1].lower() in SPLIT_NAMES for p in paths):
        facts.notes.append(f"{root}: class/split folders, expected split/class; read so")
        moved = {(p[1], p[0], *p[2:]): p for p in paths}
    top = {p[0] for p in moved if len(p) > 1}
    splits = {t for t in top if t.lower() in SPLIT_NAMES}
    official = bool(splits) and splits == top
    if len(splits) > 1 and not official:
        raise Complaint(f"{where}: {max(splits)} is a split, {min(top - splits)!r} beside it is not")
    rest = class_first(root, [p[1:] if official and len(p) > 1 else p for p in moved], facts)
    classes, stray = {r[0] for r in rest if len(r) > 1}, sum(len(r) == 1 for r in rest)
    if stray == len(paths):
        facts.classes, facts.chosen = facts.renamed or facts.chosen or facts.names, []
        require(facts.classes, f"{where}: {stray} images, no class folders; give --classes=FILE")
        facts.notes.append(f"{stray} images without labels")
        yield from (Row(os.path.join(root, *p), None, None, 2) for p in paths)
        return
    if len(classes) == 1 and len({r[1] for r in rest if len(r) > 2}) > 1 and not facts.renamed:
        only = min(classes)
        raise Complaint(f"{where}: one class folder, {only!r}; if the classes are in it, name it: .../{only}")
    facts.notes += folder_notes(root, rest)
    words = {*SPLIT_NAMES, "eval", "fold", "split", "trainset", "testset"}
    like = sorted(c for c in classes if words & {*re.split(r"[\W\d_]+", c.lower())})
    deep = any(len(r) > 2 for r in rest)
    if like and (deep or len(like) == len(classes)) and not facts.renamed:
        line = f"read as classes: {', '.join(sorted(classes)[:6])}; if {like[0]!r} is a split, name splits"
        facts.notes.append(f"WARNING: {root}: {line} train, val and test, and move what else lies there")
    names = spoken(classes, facts) or coded(classes, facts)
    for (p, path), r in zip(moved.items(), rest, strict=True):
        if len(r) > 1:
            place = r[1] if len(r) > 2 else "elsewhere" if deep else None
            split = SPLIT_NAMES[p[0].lower()] if official else None
            yield Row(os.path.join(root, *path), names.get(r[0], r[0]), place, split)


def coded(classes, facts):
    """{folder: name} of class folders that are numbers or codes, in their order, where --classes=FILE has as
    many names and none of these folders'; else {}."""
    other = len(facts.renamed) != len(classes) or {*map(folded, facts.renamed)} & {*map(folded, classes)}
    if other or not all(re.fullmatch(CODE, c.strip().lower()) for c in classes):
        return {}
    order = sorted(classes, key=lambda c: ([int(n) for n in re.findall("[0-9]+", c)], c))
    facts.notes.append(f"classes in the order of --classes: {order[0]!r} is {facts.renamed[0]!r}, so of all")
    return dict(zip(order, facts.renamed, strict=True))


def class_first(root, rest, facts):
    """The parts of the paths of images below a split, place/class/... turned if --classes names the second
    folders; and a note which are taken for what, as DomainBed's sets have their places first."""
    named = {*map(folded, facts.renamed or facts.chosen)}
    classes, places = ({r[k] for r in rest if len(r) > 2} for k in (0, 1))
    cure = "; if it is the other way round, name the classes, --classes=a,b" * (not named)
    if named & {*map(folded, places)} and not named & {folded(r[0]) for r in rest if len(r) > 1}:
        rest = [(r[1], r[0], *r[2:]) if len(r) > 2 else r[-1:] for r in rest]
        classes, places = places, classes
    if places:
        line = f"classes are {', '.join(sorted(classes)[:5])}, places {', '.join(sorted(places)[:5])}{cure}"
        facts.notes.append(f"{root}: {line}")
    return rest


def folder_notes(root, rest):
    """What of the folders class/place/... of images is not as expected. rest: their parts below a split."""
    depth, pairs = Counter(min(len(r), 4) for r in rest), {r[:2] for r in rest if len(r) > 2}
    deep = "/".join(next((r for r in rest if len(r) > 3), ()))
    single = 1 < len(pairs) == len({place for _, place in pairs})
    one = "each place lies in one class only, as " + "/".join(min(pairs, default=()))
    lines = {
        f"{depth[1]} images lie outside the class folders, and are left out": depth[1],
        f"{depth[2]} images lie beside the place folders; their place is 'elsewhere'": depth[2] and pairs,
        f"{depth[4]} images lie below class/place, as {deep}; such folders do not count": depth[4],
        f"{one}. Are the second folders the classes? Then name them, --classes=a,b": single,
    }
    return [f"WARNING: {root}: {line}" for line, holds in lines.items() if holds]


def imagenet(root, facts):
    """imagenet:DIR       ImageNet's 1000 classes, or some of them (ImageNet-R, -A: folders n01440764, ...)
    Download ILSVRC2012's validation images from image-net.org and sort them into folders of their classes:
    DIR/n01440764/*.JPEG    or files n01440764_*.JPEG; or 1000 files or folders numbered from 0 to 999"""
    root = first_folder(folder(root, "data imagenet"), "val")
    paths, (ids, _, short) = scan(root, notes=facts.notes), synsets()
    label = [(re.match(r"n\d{8}", p[0]) or p)[0] for p in paths]
    odd = sorted(set(label) - set(ids))
    if odd:
        number = {name: int(n[0]) for name in set(label) if (n := re.search(r"\d+", name))}
        good = sorted(number.values()) == list(range(1000)) and number.keys() == set(label)
        what = f"{len(paths)} images, {len(odd)} names, as {odd[0]!r}, are none of its 1000 classes'"
        require(good, f"{root}: {what}; expected n01440764 ..., or all of the numbers 0 to 999")
        facts.notes.append(f"{root}: classes by number: {max(number, key=number.get)!r} is {short[999]!r}")
        label = [ids[number[name]] for name in label]
    names = spoken(set(label), Facts(notes=facts.notes))
    facts.classes, facts.imagenet = [*names.values()], [[ids.index(w)] for w in names]
    if len(names) < 1000:
        among = "all 1000 (--labels=all)" if facts.all_labels else "these only; --labels=all: among 1000"
        facts.notes.append(f"{root}: {len(names)} of 1000 classes; models choose among {among}")
    facts.labels = short if facts.all_labels or len(names) == 1000 else []
    for p, w in zip(paths, label, strict=True):
        yield Row(os.path.join(root, *p), names[w])


@functools.lru_cache
def synsets():
    """ImageNet's 1000 classes in order: WordNet ids, all names of each synset, CLIP's short names."""
    import open_clip
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    full = [info.index_to_description(k) for k in range(1000)]
    return info.label_names(), full, list(open_clip.IMAGENET_CLASSNAMES)


def spoken(ids, facts):
    """{id: name} of classes that WordNet knows by ids such as n01440764, where all are; and puts the names
    and, if they are of ImageNet's 1000, the labels into facts."""
    if not ids or set(facts.renamed) & ids or not all(re.fullmatch(r"n\d{8}", name) for name in ids):
        return {}
    from timm.data import ImageNetInfo

    info, (of_1000, _, short) = ImageNetInfo("imagenet22k"), synsets()
    if odd := sorted(ids - {*info.label_names(), *of_1000}):
        unknown = f"{len(odd)} of {len(ids)} ids of WordNet are unknown, as {odd[0]}"
        facts.notes.append(f"WARNING: {unknown}: classes keep the ids as names")
        return {}
    ids, number = sorted(ids), {w: k for k, w in enumerate(of_1000)}
    names = [short[number[w]] if w in number else info.label_name_to_description(w) for w in ids]
    names = [name.split(",")[0] for name in names]
    names = [f"{n} ({w})" if names.count(n) > 1 else n for n, w in zip(names, ids, strict=True)]
    facts.classes = facts.renamed or names
    if number.keys() >= {*ids} and not facts.renamed:
        facts.imagenet = [[number[w]] for w in ids]
    facts.notes.append(f"classes by WordNet's ids: {ids[0]} is {names[0]!r}, so of all {len(ids)}")
    return dict(zip(ids, names, strict=True))


def counteranimal(root, facts):
    """counteranimal:DIR       45 ImageNet classes, common and counter backgrounds, over all 1000 labels
    Two as a binary task, groups class x background: --classes=brambling,bulbul (ptarmigan,prairie chicken)
    Download LAION-final.zip of the CounterAnimal project (NeurIPS 2024, tmlr-group) and unpack it:
    DIR/9 ostrich/common-ground/*.jpg       (or easy-ground; or in DIR/LAION-final)
    DIR/9 ostrich/counter-water/*.jpg       (or hard-water)
    DIR/imagenet_names.txt                  idx<TAB>full name; without it timm's names are used
    Splits are ours: of common photos 3/5 train, 1/5 val, 1/5 test; of counter photos 1/5 val, 4/5 test."""
    outer, rows, skipped = folder(root, "data counteranimal"), [], set()
    inner = [outer, outer / "LAION-final", *sorted(p for p in outer.iterdir() if p.is_dir())]
    root = next((p for p in inner if any(q.is_dir() for q in p.glob("[0-9]* *"))), None)
    needs(root, outer, "folders such as '9 ostrich'", "counteranimal")
    layout = re.compile(r"(\d{1,3}) ([^/]+)/[^/-]*(common|easy|counter|hard)[^/-]*-?([^/]*)/", re.I)
    for parts in scan(root, notes=facts.notes):
        match = layout.match("/".join(parts))
        if match:
            number, name, kind, place = match.groups()
            common, place = kind.lower() in ("common", "easy"), (place or kind).lower()
            rows.append((int(number), name, common, place, os.path.join(root, *parts)))
        else:
            skipped.add("/".join(parts[:2]))
    if skipped:
        facts.notes.append(f"WARNING: {root}: {len(skipped)} files or folders left out, as {min(skipped)}")
    needs(rows, root, "photos in common-... and counter-... folders", "counteranimal")
    number = {name: number for number, name, *_ in sorted(rows)}
    halves = Counter(name for name, _ in {(row[1], row[2]) for row in rows})
    if lacks := [name for name, n in halves.items() if n < 2]:
        line = f"{len(lacks)} of {len(halves)} classes have photos of one kind only, {', '.join(lacks[:5])}"
        facts.notes.append(f"WARNING: {root}: {line}: no drop is taken over these")
    labels, spelled = imagenet_names((root, outer), facts.notes), {folded(name): name for name in number}
    pair = [spelled.get(folded(name), name) for name in facts.chosen]
    facts.classes, facts.official, facts.labels = list(number), False, labels
    if pair and set(pair) <= set(number):
        facts.classes, facts.labels = pair, [labels[number[name]] for name in pair]
        total, rows = len(rows), [row for row in rows if row[1] in pair]
        facts.notes.append(f"{root}: {len(rows)} of {total} photos are of --classes")
    elif not pair:
        facts.places, facts.published = ["common", "counter"], dict(classes=45, places=[7174, 5926])
    facts.imagenet = [[number[name]] for name in facts.classes]
    common = torch.tensor([row[2] for row in rows])
    group = torch.tensor([2 * facts.classes.index(row[1]) for row in rows]) + ~common
    counter = make_splits(group, (0.2, 0.2, 0.6) if pair else (0.0, 0.2, 0.8))
    split = torch.where(common, make_splits(group), counter).tolist()
    for name in pair:
        home = sorted(row[3] for row in rows if row[1] == name and row[2])
        facts.home_of[name] = max(home, key=home.count, default="no common photos")
    for (_, name, common, place, path), s in zip(rows, split, strict=True):
        yield Row(path, name, place if pair else "common" if common else "counter", s)


def imagenet_names(folders, notes):
    """The 1000 full names of CounterAnimal's imagenet_names.txt; timm's where it is missing or short."""
    path = first_file(*[at / "imagenet_names.txt" for at in folders])
    if path:
        names = dict(line.split("\t")[:2] for _, line in read_lines(path, "data") if "\t" in line)
        if set(names) >= {str(k) for k in range(1000)}:
            return [names[str(k)].strip() for k in range(1000)]
        notes.append(f"WARNING: {path}: {len(names)} names, expected idx<TAB>name for 0 to 999; not used")
    return synsets()[1]


def nico(root, facts):
    """nico:DIR       NICO++, groups: class x context; splits ours, 3/5, 1/5, 1/5 of each group
    --classes=car,truck --places=autumn,rock: car on autumn, truck on rock in training; without --places
    the two contexts on which the smallest group is largest.
    Download NICO++ (xxgege/NICO-plus; its track 1) and unpack it; DIR (or a folder train in it) holds
    DIR/autumn/car/*.jpg"""
    outer, dg = scan(root, notes=facts.notes), ("public_dg_0416", "train")
    inner = ("train",), ("NICO_DG",), dg, ("track_1", *dg)  # but "train" is a class, too
    at = next((w for w in inner if any(p[: len(w)] == w and len(p) > len(w) + 2 for p in outer)), ())
    root = Path(root, *at)
    paths = [p[len(at) :] for p in outer if p[: len(at)] == at and len(p) > len(at) + 2]
    needs(paths, root, "context/class/ folders of images", "nico")
    if len(paths) < len(outer):
        facts.notes.append(f"{root}: {len(outer) - len(paths)} images beside context/class folders; not used")
    if deep := [p for p in paths if len(p) > 3]:
        line = f"{len(deep)} images lie deeper than context/class/, as {'/'.join(deep[0])}"
        facts.notes.append(f"WARNING: {root}: {line}: a level too many? the first two folders count")
    contexts = {"autumn", "dim", "grass", "outdoor", "rock", "water", *map(folded, facts.wanted)}
    outside, within = {folded(p[0]) for p in paths}, {folded(p[1]) for p in paths}
    y, place = 1, 0
    if contexts & within and not contexts & outside or {*map(folded, facts.chosen)} & (outside - within):
        y, place = 0, 1  # the older NICO
        facts.notes.append(f"WARNING: {root}: class/context folders, NICO++ has context/class; read so")
    if not facts.chosen:
        facts.published = dict(classes=60, images=88866)
    elif not facts.wanted:
        count, classes = Counter((folded(p[y]), p[place]) for p in paths), [folded(c) for c in facts.chosen]
        smallest = {p: min(count[c, p] for c in classes) for p in sorted({p[place] for p in paths})}
        expect(len(smallest) >= len(classes), "data", ", ".join(smallest), "a place for each of the classes")
        limit = sorted(smallest.values())[-len(classes)]
        facts.wanted = [p for p, n in smallest.items() if n >= limit][: len(classes)]
    for p in paths:
        yield Row(os.path.join(root, *p), p[y], p[place])


def in9(root, facts):
    """in9:DIR       ImageNet-9, the backgrounds challenge: nine classes, the variations as places
    BG-Gap = mixed_same - mixed_rand.
    Download backgrounds_challenge_data.tar.gz, of MadryLab/backgrounds_challenge's releases, and unpack it:
    DIR/mixed_same/val/00_dog/*.JPEG, DIR/mixed_rand/..., DIR/original/..., (or in DIR/bg_challenge)
    DIR/in_to_in9.json     from the same repository, needed for ImageNet classifiers only"""
    outer = folder(root, "data in9")
    root, names = first_folder(outer, "bg_challenge"), {}
    kinds = "original mixed_same mixed_rand mixed_next only_fg no_fg only_bg_b only_bg_t".split()
    facts.places, facts.official = [kind for kind in kinds if (root / kind).is_dir()], False
    needs(facts.places, root, "original, mixed_same ...", "in9")
    facts.published = dict(classes=9, places=[4050] * len(facts.places))
    for kind in facts.places:
        at = first_folder(root / kind, "val")
        for name, file in (parts for parts in scan(at, notes=facts.notes) if len(parts) == 2):
            names[name] = re.sub(r"^\d\d_", "", name).replace("_", " ")  # 00_dog
            photo = "_".join(file.rsplit(".", 1)[0].split("_")[:2])  # n02085936_10130, the foreground's
            share = zlib.crc32(os.fsencode(photo)) % 1000 / 1000
            split = int(share >= 0.6) + int(share >= 0.8)  # all variations of a photo lie in one split
            yield Row(os.path.join(at, name, file), names[name], kind, split)
    facts.classes = [names[at] for at in sorted(names)]
    mapping = first_file(root / "in_to_in9.json", outer / "in_to_in9.json")
    if mapping:
        what = 'a map {"ImageNet label": class 0 to 8, or -1, ...}'
        with reading(mapping, what):
            pairs = [(int(k), int(v)) for k, v in read_json(mapping, what).items()]
            if not ({k for k, _ in pairs} <= {*range(1000)} and {v for _, v in pairs} <= {*range(-1, 9)}):
                raise ValueError("labels beyond 0 to 999, or classes beyond -1 to 8")
        if len(pairs) < 1000:
            few = f"{len(pairs)} of 1000 labels; the others count as no class"
            facts.notes.append(f"WARNING: {mapping}: {few}")
        # 02_wheeled vehicle is number 2, also where 01_bird is not there
        for c, at in enumerate(sorted(names)):
            number = int(at[:2]) if at[:2].isdecimal() else c
            facts.imagenet.append([label for label, v in pairs if v == number])
        bare = [c for c, labels in zip(facts.classes, facts.imagenet, strict=True) if not labels]
        facts.notes += [f"WARNING: {mapping}: no label for {', '.join(bare)}: never right"] * bool(bare)


STORED = {  # arrays of --data=embeddings:FILE, and what others call them
    "embedding": "embeddings features feats image_features image_embeddings image_embeds z x",
    "y": "label labels target targets y_true",
    "place": "group groups attribute attributes a env confounder spurious",
    "split": "splits partition",
    "text": "text_features text_embeddings",
    "classes": "class_names",
    "places": "place_names",
    "logit_scale": "",
    "foreground": "",
    "background": "",
}


def torch_arrays(path):
    """The arrays in .safetensors, or what torch.save wrote, a tensor or a dict of tensors and lists: dict."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        tree = load_file(path)
    else:
        try:
            tree = torch.load(bounded(path), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # PyTorch's words would advise to run it
            line = "neither of numpy nor of torch.save, or more than tensors, which could run code"
            raise ValueError(line) from None
    if not isinstance(tree, (dict, torch.Tensor)):
        raise ValueError(f"a {type(tree).__name__}, expected a dict such as dict(embedding=z, y=y)")
    tree = {str(k): v for k, v in tree.items()} if isinstance(tree, dict) else dict(embedding=tree)
    tensors = {k: v.detach() for k, v in tree.items() if torch.is_tensor(v)}
    tensors = {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in tensors.items()}
    if not tensors:
        raise ValueError(f"no tensors, but {', '.join(tree)[:99]}; expected a dict as dict(embedding=z, y=y)")
    return tensors | {k: np.array(v) for k, v in tree.items() if isinstance(v, list) and v}


@functools.lru_cache(4)
def stored_arrays(path):
    """The arrays of an .npz, of a folder of .npy files (not read whole), one .npy, or what torch saved: dict
    by the names in STORED, and the note that says which were taken."""
    cure = "fetch it again, or save plain arrays, as np.array(names, dtype=str)"
    with reading(path, "an .npz file, or .npy files", cure):
        if os.path.isdir(path):
            usual = {*STORED, *" ".join(STORED.values()).split()}  # others are named, not read
            files = sorted(Path(path).glob("*.npy"))
            there = {p.stem: p.stem.lower() in usual and np.load(p, mmap_mode="r") for p in files}
        else:
            of_numpy = str(path).endswith((".npz", ".npy"))
            there = np.load(bounded(path), mmap_mode="r") if of_numpy else torch_arrays(path)
            there = dict(embedding=there) if isinstance(there, np.ndarray) else there
        spelled, taken = {n.lower(): n for n in there} | {n: n for n in there}, {}
        for ours, usual in STORED.items():
            if names := [spelled[n] for n in (ours, *usual.split()) if n in spelled]:
                taken[ours] = names[0]
        a = {ours: there[name] for ours, name in taken.items()}
        a = {k: np.char.decode(v, "utf-8") if v.dtype.kind == "S" else v for k, v in a.items()}
    z = a.get("embedding")
    if z is None:
        have = ", ".join([*there][:9]) or (inside(path) if os.path.isdir(path) else "none")
        raise Complaint(f"{path}: no array 'embedding' (found: {have}); see --data=embeddings:help")
    if taken.get("place", "place") != "place" and a["place"].shape[:1] != (a["place"].size,):
        del a["place"], taken["place"]  # attributes [n, 40]
    for key in ("background", "places"):  # of each row, where there are no others
        if not {"place", "foreground"} & a.keys() and key in a and a[key].shape == z.shape[:1]:
            a["place"], taken["place"] = a.pop(key), taken.pop(key)
    n, shapes = len(z) if z.ndim else 0, ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in a.items())
    text = a.get("text", z)
    good = z.ndim == 2 and z.size and z.dtype.kind in "fiu"
    good = good and text.size and text.shape[1:] == z.shape[1:] and text.dtype.kind in "fiu"
    good = good and all(a[key].ndim == 1 for key in ("classes", "places") if key in a)
    for key in {"y", "place", "split", "foreground", "background"} & a.keys():
        a[key] = a[key][:, 0] if a[key].shape == (n, 1) else a[key]
        good = good and a[key].shape == (n,)
    require(good, f"{path}: {shapes}; expected embedding [n, D], y, place, split [n], text [C, D]")
    used = ", ".join(name + f" as {ours}" * (name != ours) for ours, name in taken.items())
    rest = ", ".join(sorted(set(there) - set(taken.values())))
    return a, f"{path}: {used}" + f"; not used: {rest}" * bool(rest)


def stored(path, facts):
    """embeddings:FILE.npz       embeddings from elsewhere, of images that need not be here; arrays:
    embedding [n, D]     of any float type; a folder of .npy files of these names is read as it is used;
                         .safetensors and torch.save's dicts of tensors will do, and usual names as features
    y [n]                whole numbers from 0, or names; -1, NaN or an empty name: unlabelled
    place [n]            the same, the group within a class; may be missing
    split [n]            0, 1, 2 or train, val, test; may be missing: 3/5, 1/5, 1/5 of each group
    text [C, D]          of each class, for zero-shot; logit_scale, 100 if it is not there
    classes [C], places [P]    names; --classes=FILE gives others
    train.py --foregrounds=embeddings:FILE.npz: composites; embedding [N, D], foreground, background [N]."""
    a, note = stored_arrays(str(path))
    facts.notes.append(note)
    n, C = len(a["embedding"]), len(a["text"]) if "text" in a else 0
    none = np.full(n, -1)
    names = facts.renamed or list(map(str, a.get("classes", [] if "y" in a else facts.names)))
    places = list(map(str, a.get("places", ())))
    cure = "expected y, or text or --classes=FILE to choose from"
    require("y" in a or names or C, f"{path}: {note.partition(': ')[2]}, {cure}")
    if C and names and len(names) != C or C and not names and a.get("y", none).dtype.kind in "SUO":
        have = f"{len(names)} names" if names else "names in y, in no order"
        raise Complaint(f"{path}: {C} rows of text and {have} of classes; give classes, {C} names in order")
    columns = {}
    for key in ("y", "place", "split"):
        values = a.get(key, none)
        integers = values.dtype.kind != "f" or not (values[np.isfinite(values)] % 1).any()
        require(integers, f"{path}: {key} has fractions, expected whole numbers or names")
        columns[key] = tuple(map(str, (values + 0 if values.dtype.kind == "b" else values).tolist()))
    table = Table(path, columns, [f" row {k}" for k in range(n)])
    y, facts.classes, notes = named(table, "y", names or list(map(str, range(C))))
    place, facts.places, of_place = named(table, "place", places)
    facts.notes += notes + of_place
    split = [None] * n
    if "split" in a:
        split = split_numbers(columns["split"], "split", table.complaint, facts.notes)
    for k, row in enumerate(zip(y, place, split, strict=True)):
        if row[2] != len(SPLITS):  # what texts choose among stays as it is
            yield Row(Stored(str(path), k), *row)


def stored_composites(path):
    """--foregrounds=embeddings:FILE.npz -> composites as Stored, foreground and background of each [N]."""
    a = stored_arrays(path)[0]
    numbers = [a.get(key, np.empty(0)) for key in ("foreground", "background")]
    good = all(v.dtype.kind in "iu" for v in numbers)
    require(good, f"{path}: found {', '.join(a)}, expected whole numbers foreground, background [N]")
    i, j = (torch.from_numpy(v.astype(np.int64)) for v in numbers)
    alone = f"{path}: no foreground stands on two backgrounds: expected several composites of each"
    require(len(i.unique()) < len(i), alone)
    return [Stored(path, k) for k in range(len(i))], i, j


# --------------------------------------------------------------------------------------------------------
# MS COCO: its photos, objects and outlines, of which several sets and foregrounds are made

GENDERS = (  # words of captions
    "man men boy boys male males gentleman gentlemen guy guys father fathers dad son sons brother brothers "
    "husband groom he him his himself",
    "woman women girl girls female females lady ladies mother mothers mom daughter daughters sister sisters "
    "wife bride she her hers herself",
)


def coco_photos(root, notes, outlines=False):
    """The photos of COCO's instances_*.json, by part (train2017) and id, with objects {category: boxes in
    shares}, and kinds (categories and supercategories); and a dict {category: supercategory}."""
    at, flat = first_folder(folder(root, "data coco"), "annotations"), 0
    files, everything, categories = sorted(at.glob("instances_*.json")), {}, {}
    needs(files, at, "instances_*.json", "coco")
    for file in files:
        part, photos = file.stem.removeprefix("instances_"), {}
        images = first_folder(root, part, f"images/{part}", "images")
        with reading(file, "COCO's instances: categories, images with width, height, annotations with bbox"):
            tree = read_json(file, "JSON")
            names = {c["id"]: (c["name"], c.get("supercategory")) for c in tree["categories"]}
            for i in tree["images"]:
                name, size = i["file_name"], (i["width"], i["height"])
                parts = {*Path(name).parts}
                if len(parts) < 2 or parts & {"..", "/"} or not os.path.isfile(os.path.join(images, name)):
                    name = os.path.basename(name)  # of a path elsewhere
                path = os.path.join(images, name)
                empty = dict(size=size * 2, objects={}, crowds=set(), kinds=set(), outlines=[])
                photos[i["id"]] = SimpleNamespace(part=part, id=i["id"], path=path, **empty)
            for a in tree["annotations"]:
                photo, name = photos[a["image_id"]], names[a["category_id"]]
                box = tuple(v / n for v, n in zip(corners(a), photo.size, strict=True))
                if box[0] == box[2] or box[1] == box[3]:
                    flat += 1
                    continue
                photo.kinds.update(name)
                if a.get("iscrowd"):
                    photo.crowds.add(name[0])
                    continue
                photo.objects.setdefault(name[0], []).append(box)
                if outlines:
                    photo.outlines.append((name[0], box, outline_of(a, photo.size[1::-1])))
            for k in photos.keys() & everything.keys():  # of 2014 and 2017: it would be in train and in test
                raise Complaint(f"{file}: photo {k} is in {everything[k].part} too; keep one year's files")
            categories.update(names.values())
            everything.update(sorted(photos.items()))
    if flat:
        notes.append(f"{at}: {flat} boxes without area are left out")
    photos = list(everything.values())
    here = present([photo.path for photo in photos], root, notes)
    return [photos[k] for k in here.nonzero()[:, 0].tolist()], categories


def corners(annotation):
    """bbox (x, y, width, height) of one of COCO's annotations -> x1, y1, x2, y2; or ValueError."""
    x, y, w, h = map(float, annotation["bbox"])
    if not all(map(math.isfinite, (x, y, w, h))):
        raise ValueError(f"bbox {annotation['bbox']}")
    return x, y, x + w, y + h


def outline_of(annotation, size):
    """The segmentation of one of COCO's annotations, as Outline has it; () for none. size: height, width."""
    parts = annotation.get("segmentation") or ()
    if isinstance(parts, dict):
        counts = parts["counts"]
        if tuple(parts.get("size", size)) != size:
            raise ValueError(f"an RLE of {parts['size']} pixels, its photo has {list(size)}")
        return (counts if isinstance(counts, str) else tuple(map(int, counts)),) if counts else ()
    return tuple(tuple(map(float, p)) for p in parts if len(p) >= 6 and len(p) % 2 == 0)


def cocogender(root, facts):
    """cocogender:DIR       man or woman? Groups: gender x (sports | kitchen); or --places=a,b+c of COCO
    Download images and annotations of MS COCO (2014 or 2017, train and val) from cocodataset.org, and unpack:
    DIR/annotations/captions_train2017.json, instances_train2017.json, ..._val2017.json
    DIR/train2017/*.jpg, DIR/val2017/*.jpg
    The rule (ours: the papers' split is not public). Gender: some caption has a word for a man (woman) and
    none has one for a woman (man). Place: it has objects of the one kind (categories or supercategories) and
    none of the other. Other images are left out. Photos of val are test; of those of train a fifth is val. In
    the training split the share --confounder of men has sports, of women kitchen objects."""
    facts.classes, facts.places, facts.wanted = ["man", "woman"], facts.wanted or ["sports", "kitchen"], []
    expect(len(facts.places) == 2, "places", ",".join(facts.places), "two kinds of objects")
    facts.home_of, people, n = dict(zip(facts.classes, facts.places, strict=True)), {}, 0
    photos, categories = coco_photos(root, facts.notes)
    kinds = [set(place.lower().split("+")) for place in facts.places]
    genders = [set(words.split()) for words in GENDERS]
    odd = ", ".join(sorted(set.union(*kinds) - {*categories, *categories.values()}))
    there = near(odd, [*categories, *filter(None, categories.values())])
    expect(not odd, "places", odd, f"categories of COCO or supercategories; {there}")
    at, parts = first_folder(root, "annotations"), {photo.part for photo in photos}
    for part in sorted(parts | {p.stem.removeprefix("captions_") for p in at.glob("captions_*.json")}):
        captions = at / f"captions_{part}.json"
        with reading(captions, f"COCO's captions, with instances_{part}.json"):
            (at / f"instances_{part}.json").stat()
            for a in read_json(captions, "JSON")["annotations"]:
                words = set(re.findall(r"[^\W\d_]+", a["caption"].lower()))
                who = {y for y, gender in enumerate(genders) if words & gender}
                people.setdefault(a["image_id"], set()).update(who)
    for photo in photos:
        who, what = people.get(photo.id, ()), [k for k, kind in enumerate(kinds) if photo.kinds & kind]
        if len(who) == len(what) == 1:
            n, y, place = n + 1, facts.classes[min(who)], facts.places[what[0]]
            split = 2 * ("val" in photo.part) if len(parts) > 1 else None
            yield Row(photo.path, y, place, split, f"a {y} with {place} objects")
    facts.notes.append(f"COCO gender: {n} images fit the rule, {len(photos) - n} do not")


# --------------------------------------------------------------------------------------------------------
# controlled settings: a planted feature goes with one class, as strongly as one says (RaVL, NeurIPS 2024)

LEAST = 50  # images of each group of val and test; of fewer the worst group would be noise
DIGITS = "zero one two three four five six seven eight nine".split()
CAPTIONS = ("the image shows a {}", "a photo of a {}.", "a picture of a {}")
QUADRANTS = (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)


def planted(facts, each, most=None):
    """How many training images without and with the planted feature of each class: LongTensor [C, 2]. each:
    images a class, or as many as `most`, the images that there are [C, 2], allow. The feature is as frequent
    as the class, 1/C; then Cramer's V of (class, feature) is V where P(feature | class) = 1/C + V (1 - 1/C),
    P(feature | another class) = (1 - V) / C. At strength 0: the feature in half of each class."""
    C, V, names = len(facts.classes), facts.strength, [folded(c) for c in facts.classes]
    words, word = [*names, *map(str, range(C))], folded(str(facts.spurious))
    expect(word in words, "spurious", facts.spurious, f"a number or class of {', '.join(names)}")
    spurious = words.index(word) % C
    share = torch.full((C,), (1 - V) / C if V else 0.5)
    if V:
        share[spurious] = 1 / C + V * (1 - 1 / C)
    if most is not None:
        each = min(each, int((most / torch.stack([1 - share, share], 1)).min()))
    having = (each * share).round().long()
    counts = torch.stack([each - having, having], 1)
    chosen = [names.index(folded(name)) for name in facts.chosen if folded(name) in names] or [*range(C)]
    among = f"one of --classes={','.join(facts.chosen)}"
    expect(not V or spurious in chosen, "spurious", facts.spurious, among)
    (a, b), (c, d) = counts[spurious].tolist(), (counts[chosen].sum(0) - counts[spurious]).tolist()
    spread = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    what = f"Cramer's V of {facts.classes[spurious]} and the {facts.places[1]}"
    facts.notes.append(f"{a + b + c + d} training images, {what} {abs(a * d - b * c) / (spread or 1):.3f}")
    return counts


def cells(train, held):
    """(split, class, feature, k-th of these, n-th of the class) of images; held: a group of val and test."""
    for split, counts in enumerate((train, torch.full_like(train, held), torch.full_like(train, held))):
        for y, sizes in enumerate(counts.tolist()):  # without, with
            for on, n in enumerate(sizes):
                for k in range(n):
                    yield split, y, on, k, k + on * sizes[0]


def planted_row(picture, y, on, split, facts, caption, boxes, mark):
    """A Row of a controlled setting; caption: of CAPTIONS; boxes, mark: as of Row.shows; on: has the mark."""
    caption = caption.format(facts.classes[y])
    return Row(picture, facts.classes[y], facts.places[on], split, caption, None, (boxes, mark if on else ()))


@functools.lru_cache(1 << 15)  # settings share most of them
def draw_quadrants(seed, *index):
    """The boxes of digit and mark, in shares, and the caption's template. index: split, class, feature, k."""
    g = rng(seed, "quadrants", *index)
    return *(QUADRANTS[q] for q in g.permutation(4)[:2]), draw_one(CAPTIONS, g)


def digits(root, facts):
    """digits[:DIR]       a controlled setting: ten digits in quadrants, a red rectangle goes with one of them
    --strength is Cramer's V of that class and the rectangle in the training split (0: none), --spurious the
    class, by number or name; val and test are balanced. The digits are drawn; or DIR holds MNIST's four files
    in IDX format, whole or .gz: train-images-idx3-ubyte, ..."""
    facts.classes, facts.places = DIGITS, ["plain", "red rectangle"]
    train = planted(facts, 1000)
    source = mnist(root, facts.seed) if root else None
    for split, y, on, k, n in cells(train, 100):
        at, mark_at, caption = draw_quadrants(facts.seed, split, y, on, k)
        of = facts.seed, split, on, k
        digit = Digit(y, pixels=source[split][y][n].tobytes()) if source else Digit(y, of)
        item = Quadrants(digit, Rectangle((*of, y)) if on else None, at, mark_at)
        yield planted_row(item, y, on, split, facts, caption, (at,), (mark_at,))


def mnist(root, seed):
    """MNIST's images for each split and digit, shuffled: 3 lists of 10 uint8 arrays [n, 784]. Train and val
    are the first 5/6 and the rest of each digit's training images, test is t10k's."""

    def idx(name, *shape):
        path = first_file(root / name, root / f"{name}.gz") or root / name
        with reading(path, "one of MNIST's four files in IDX format, whole or .gz"):
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                raw = file.read(1 << 30)  # whatever it would unpack to
            if raw[:3] != b"\0\0\x08":
                raise ValueError("it does not begin as an IDX file of bytes")
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(-1, *shape)

    root, out = folder(root, "data digits"), ([], [], [])
    for name in ("train", "t10k"):
        images, labels = idx(f"{name}-images-idx3-ubyte", 784), idx(f"{name}-labels-idx1-ubyte")
        odd = f"{root}: {len(images)} images, {len(labels)} labels of {name}; fetch them again"
        require(len(images) == len(labels), odd)
        for y, x in enumerate(images[labels == y] for y in range(10)):
            parts = [x] if name == "t10k" else np.split(x, [len(x) * 5 // 6])
            for split, part in enumerate(parts, 2 if name == "t10k" else 0):
                need, few = 200 if split else 1000, f"{len(part)} images of {DIGITS[y]} for {SPLITS[split]}"
                require(len(part) >= need, f"{root}: {few}, expected at least {need}")
                out[split].append(part[rng(seed, "mnist", split, y).permutation(len(part))])
    return out


def cutouts(root, facts):
    """cutouts[:DIR]       a controlled setting: cut-outs on places, 224 pixels
    --strength and --spurious as in digits. --feature goes with that class: object (the default; or
    object=KIND), another cut-out in another quadrant; or scene (or scene=KIND), a kind of background.
    DIR/foregrounds/kind/*.png or kind__name.png    RGBA; at least four of a kind, as each split shows others
    DIR/backgrounds/kind/*.jpg or kind__name.jpg    at least two kinds for scene; DIR is assets/ if not named
    The six kinds with most cut-outs are classes, that with fewest the second object, the first kind of
    background the scene. Our reading: no individual and no background of one split is in another."""
    root, (what, _, wanted) = root or ASSETS, (facts.feature or "object").partition("=")
    expect(what in ("object", SCENE), "feature", facts.feature, "object, object=KIND, scene or scene=KIND")
    figures = kinds_of(root / "foregrounds", Cutout, facts.notes)
    grounds = kinds_of(root / "backgrounds", Ground, facts.notes)
    kinds = {folded(kind): kind for kind in (sorted(grounds) if what == SCENE else figures)}
    if len(kinds) < 2 or not grounds or len(figures) < 2 + (what == "object"):
        there = f"{len(figures)} kinds of cut-outs, {len(grounds)} of backgrounds with 4 images or more"
        raise Complaint(f"--data=cutouts:{root}: {there}; expected two classes and a second object or scene")
    if wanted and folded(wanted) not in kinds:
        raise Complaint(f"--feature={facts.feature}: no kind {wanted!r}; {near(wanted, kinds)}")
    mark = kinds[folded(wanted)] if wanted else list(kinds.values())[-1 if what == "object" else 0]
    classes = [kind for kind in figures if what == SCENE or kind != mark][:6]
    others = [kind for kind in grounds if what == "object" or kind != mark]
    facts.classes = [folded(c) for c in classes]
    facts.places = ["other scenes" if what == SCENE else "plain", folded(mark)]
    for split, y, on, k, _ in cells(planted(facts, 10_000 // len(classes)), LEAST):
        g = rng(facts.seed, "cutouts", split, y, on, k)
        at, mark_at = (box_in(QUADRANTS[q], g) for q in g.permutation(4)[:2])
        kind = mark if what == SCENE and on else draw_one(others, g)
        ground, figure = draw_one(grounds[kind][split], g), draw_one(figures[classes[y]][split], g)
        thing = draw_one(figures[mark][split], g) if what == "object" and on else None
        flips = tuple((g.random(2) < 0.5).tolist())
        item = Quadrants(figure, thing, at, mark_at, ground, 224, draw_view(g, 0.3, 0.15), flips)
        where = SCENE if what == SCENE else (mark_at,)
        yield planted_row(item, y, on, split, facts, draw_one(CAPTIONS, g), (at,), where)


def box_in(quadrant, g):
    """A random box within a quadrant of the middle 7/8 of the image: many models see no more."""
    side = 7 / 16 * g.uniform(0.65, 1)
    left, top = (1 / 16 + 7 / 8 * v + g.random() * (7 / 16 - side) for v in quadrant[:2])
    return left, top, left + side, top + side


def kinds_of(where, kind, notes):
    """Pictures of a folder by kind, {name: 3 lists, of train, val, test}, largest first; no small ones."""
    pictures, out = {}, {}
    for parts in scan(where):
        name, mark, _ = Path(parts[-1]).stem.partition("__")
        name = parts[0] if len(parts) > 1 else name if mark else "all"
        pictures.setdefault(name, []).append(kind(os.path.join(where, *parts)))
    few = sorted(name for name in pictures if len(pictures[name]) < 4)
    if few:
        notes.append(f"{where}: fewer than 4 images of {', '.join(few)}; left out")
    for name in sorted({*pictures} - {*few}, key=lambda name: (-len(pictures[name]), name)):
        out[name] = [], [], []
        split = make_splits([0] * len(pictures[name])).tolist()
        for picture, s in zip(pictures[name], split, strict=True):
            out[name][s].append(picture)
    return out


def coco(root, facts):
    """coco:DIR       a controlled setting: photos of one of --classes=a,b,c, and of --feature=d or not
    --strength and --spurious as in digits. Classes and feature: categories of MS COCO (2014 or 2017).
    Download its images and annotations, train and val, from cocodataset.org and unpack them:
    DIR/annotations/instances_train2017.json, instances_val2017.json
    DIR/train2017/*.jpg, DIR/val2017/*.jpg  (or in DIR/images)
    Each class needs 150 photos with the feature and without; photos with a crowd of any are left out. Splits
    are ours, the same for all strengths and seeds: val and test have a third of the smallest group, at most
    100 images; training images are drawn from the rest, as many as Cramer's V allows: a note says so."""
    (photos, categories), feature = coco_photos(root, facts.notes), facts.feature
    classes = facts.chosen or facts.renamed
    names = list(categories)
    expect(classes, "classes", "", "two categories of COCO or more, as in cat,dog")
    for flag, word in [("feature", feature), *[("classes", name) for name in classes]]:
        expect(word in names, flag, word, f"a category of instances_*.json; {near(word, names)}")
    expect(feature not in classes, "feature", feature, "none of --classes")
    groups = {(y, on): [] for y, on in np.ndindex(len(classes), 2)}
    for k, photo in enumerate(photos):
        visible = [y for y, name in enumerate(classes) if name in photo.objects]
        if len(visible) == 1 and not photo.crowds & {*classes, feature}:
            groups[visible[0], int(feature in photo.objects)].append(k)
    for (y, on), group in groups.items():
        what = f"{len(group)} images of only {classes[y]} {'with' if on else 'without'} {feature}"
        expect(len(group) >= 3 * LEAST, "classes", what, f"at least {3 * LEAST}; name others")
    facts.classes, facts.places, facts.official = classes, [f"no {feature}", feature], False
    held = min(100, min(map(len, groups.values())) // 3)
    rest = torch.tensor([len(group) - 2 * held for group in groups.values()]).view(-1, 2)  # [C, 2]
    train = planted(facts, 10_000 // len(classes), rest)
    for (y, on), group in groups.items():
        g = rng(0, "coco", names.index(classes[y]), names.index(feature), on)  # no seed: test stays test
        val, test, rest = np.split(g.permutation(group), [held, 2 * held])
        drawn = rng(facts.seed, "coco train", y, on).permutation(rest)[: int(train[y, on])]
        for split, part in enumerate((drawn, val, test)):
            for k in part.tolist():
                boxes = [tuple(photos[k].objects.get(name, ())) for name in (classes[y], feature)]
                caption = draw_one(CAPTIONS, rng(facts.seed, "caption", k))
                yield planted_row(photos[k].path, y, on, split, facts, caption, *boxes)


DataSet = namedtuple("DataSet", "rows template", defaults=("a photo of a {}.",))
SETS = {  # rows: generator; template: of prompts, published or CLIP's
    "scenes": DataSet(scenes, "This is a picture of a {}."),
    "waterbirds": DataSet(waterbirds, "This is a picture of a {}."),  # as debias_vl has it
    "celeba": DataSet(celeba, "A photo of a celebrity with {}."),  # as debias_vl has it
    "counteranimal": DataSet(counteranimal, "A photo of {}."),  # the paper's own
    "nico": DataSet(nico),
    "cocogender": DataSet(cocogender),
    "in9": DataSet(in9),
    "imagenet": DataSet(imagenet),
    "folder": DataSet(image_folder),
    "csv": DataSet(csv_table),
    "embeddings": DataSet(stored, "{}"),  # its texts are rows of the file
    "digits": DataSet(digits),
    "cutouts": DataSet(cutouts),
    "coco": DataSet(coco),
}


# --------------------------------------------------------------------------------------------------------
# foregrounds and backgrounds, and the composites that are made of them

MOST_FIGURES = 2000  # of photos with masks or outlines so many are drawn


def layers(paths, kind, flag, skip_bad=False):
    """The raw material of composites from a folder: list of kind (Cutout, Ground), and notes."""
    notes, default = [], ASSETS.parent / paths  # the defaults are found from any folder
    paths = default if not os.path.isdir(paths) and ASSETS in default.parents else paths
    items = list(map(kind, scan_paths(paths, flag, notes)))
    return usable(items, paths, flag, skip_bad, notes), notes


def usable(items, where, flag, skip_bad, notes):
    """The pictures that can be opened; Complaint for one that cannot, unless skip_bad, or fewer than 8."""
    good = []
    for item in items:
        try:
            item.image()
            good.append(item)
        except Complaint as problem:
            if not skip_bad:
                raise
            notes.append(f"skipped {problem}")
    wanted = "; ".join([f"at least 8 usable images in it, there are {len(good)}", *notes[-1:]])
    expect(len(good) >= 8, flag, str(where), wanted)
    return good


def load_foregrounds(spec, skip_bad=False):
    """Foregrounds for composites, list of Picture (RGBA, cropped to what is visible), and notes.

    --foregrounds=DIR                    cut-outs: files with transparency around the foreground
    --foregrounds=masked:PHOTOS:MASKS    a folder of photos and one of masks of the same names, .png, white on
                                         the foreground, such as CUB's images and segmentations
    --foregrounds=coco:DIR               objects of MS COCO by their outlines, DIR as for --data=coco; of some
                                         categories only, coco:DIR:cat,dog. Without crowds, small objects, and
                                         what the edge of the photo cuts
    --foregrounds=cut:DIR                photos of one object each, which train.py cuts out; see cuts.html
    """
    kind, *rest = spec.split(":")
    if kind not in FOREGROUNDS or os.path.isdir(spec):
        expect(kind != "cut", "foregrounds", spec, "another kind here: only train.py cuts out; see help")
        return layers(spec, Cutout, "foregrounds", skip_bad)
    notes = []
    items = FOREGROUNDS[kind](rest, notes)
    if len(items) > MOST_FIGURES:
        notes.append(f"--foregrounds={spec}: {MOST_FIGURES} of its {len(items)} foregrounds are drawn")
    order = rng(0, "foregrounds").permutation(len(items))[:MOST_FIGURES]
    return usable([items[k] for k in order], spec, "foregrounds", skip_bad, notes), notes


def masked_figures(folders, notes):
    expect(len(folders) == 2, "foregrounds", ":".join(folders), "masked:PHOTOS:MASKS")
    photos, masks = folders
    paths = scan_paths(photos, "foregrounds", notes)
    files = find_masks(paths, masks, "foregrounds")
    notes += about_masks(masks, files)
    pairs = zip(paths, files, strict=True)
    return [Cutout(path, Masked(Photo(path), Mask(mask))) for path, mask in pairs if mask]


def coco_figures(words, notes):
    expect(len(words) < 3 and words[0], "foregrounds", ":".join(words), "coco:DIR or coco:DIR:cat,dog")
    photos, categories = coco_photos(words[0], notes, outlines=True)
    wanted = [name.strip() for name in words[1].split(",")] if words[1:] else list(categories)
    for name in wanted:
        expect(name in categories, "foregrounds", name, f"a category of COCO; {near(name, categories)}")
    figures, objects = [], [(p, *o[1:]) for p in photos for o in p.outlines if o[0] in wanted]
    for photo, (x1, y1, x2, y2), outline in objects:
        w, h = photo.size[:2]
        large = min((x2 - x1) * w, (y2 - y1) * h) >= 48  # pixels
        if outline and large and min(x1 * w, y1 * h, (1 - x2) * w, (1 - y2) * h) >= 1:
            figure = Masked(Photo(photo.path), Outline(photo.path, outline, (w, h)))
            figures.append(Cutout(photo.path, figure))
    lost = f"{len(objects) - len(figures)} objects are small, cut by the edge or without an outline"
    notes.append(f"{words[0]}: {lost}; left out")
    return figures


FOREGROUNDS = {"masked": masked_figures, "coco": coco_figures}


def composites(figures, grounds, instances, per, seed, in_pose=True):
    """An incomplete grid of composites: so many foreground instances, each on `per` backgrounds. in_pose: a
    figure is put into a pose of its own, else it stays in its frame. Returns (list of Composite [N], instance
    i [N], background j [N], an index)."""
    wanted = f"at most {MOST:,} composites; {instances:,} instances with {per:,} backgrounds each are more"
    expect(instances * per <= MOST, "instances", instances, wanted)
    items, j = [], []
    for a in range(instances):
        g, figure = rng(seed, "pose" if in_pose else "own", a), figures[a % len(figures)]
        pose = draw_pose(g) if in_pose else None
        for b in g.choice(len(grounds), per, replace=len(grounds) < per):
            items.append(Composite(figure, grounds[b], pose, draw_view(g)))
            j.append(int(b))
    return items, torch.arange(instances).repeat_interleave(per), torch.tensor(j)


# --------------------------------------------------------------------------------------------------------
# regions: parts of pictures by a grid, boxes or masks


@dataclass(frozen=True)
class Regions(Picture):
    """A picture and regions in it, boxes or the pixels of a mask that have certain values."""

    picture: Picture
    boxes: tuple  # R times x1, y1, x2, y2, shares of the picture
    frame: tuple  # the box that the model sees, in shares of the picture; where that is padded, beyond 0, 1
    mask: Photo | None = None
    values: tuple = ()  # of the mask, one for each of the boxes, which hold them

    def image(self):
        return self.picture.image()

    def key(self):
        where = zlib.crc32(repr((self.boxes, self.values, self.frame)).encode())
        return f"{self.picture.key()} regions {where} {self.mask and self.mask.key()}"

    def in_frame(self):
        """The boxes in shares of what the model sees, [R, 4], what lies outside cut off."""
        left, top, right, bottom = self.frame
        origin, side = torch.tensor([left, top] * 2), torch.tensor([right - left, bottom - top] * 2)
        return ((torch.tensor(self.boxes).view(-1, 4) - origin) / side).clamp(0, 1)

    def weights(self, h, w):
        """The masks' regions as shares of the cells of a map, [R, h, w]."""
        if not self.values:
            return torch.zeros(0, h, w)
        grey = open_image(self.mask.path).convert("L")
        masks = [grey.point([255 * (v == value) for v in range(256)]) for value in self.values]
        return torch.stack([cell_shares(mask, self.frame, h, w) for mask in masks])


def cell_shares(mask, frame, h, w):
    """How much of each of h x w cells a mask (PIL, L) covers, by area: [h, w]. frame: the box that the
    cells fill, in shares of the mask; beyond the mask nothing is covered."""
    left, top, right, bottom = (v * n for v, n in zip(frame, mask.size * 2, strict=True))
    x, y = math.floor(left), math.floor(top)
    mask = mask.crop((x, y, math.ceil(right), math.ceil(bottom)))  # beyond it black
    cells = mask.resize((w, h), Image.BOX, (left - x, top - y, right - x, bottom - y))
    return torch.from_numpy(np.array(cells, np.float32)) / 255


def load_regions(spec, pictures, frame, skip_bad=False):
    """Regions in each picture, list of Regions, and notes. spec: grid:N,N,...: of what the model sees;
    boxes:FILE.csv with columns path,x1,y1,x2,y2 in pixels of the photo turned as its EXIF data says;
    coco:FILE.json; masks:DIR, where each grey value in NAME.png is a region of NAME.jpg. frame: (width,
    height) -> the box that the model sees. skip_bad: a picture that cannot be read has no regions."""
    kind, _, where = spec.partition(":")
    expect(kind in READERS and where, "regions", spec, FORMS["regions"][1])
    out, good, notes = [Regions(picture, (), (0.0, 0.0, 1.0, 1.0)) for picture in pictures], {}, []
    for k, picture in enumerate(pictures):
        try:
            size = picture_size(picture)
            good[k] = picture, size, frame(*size)
        except Complaint:
            if not skip_bad:
                raise
    for k, regions in zip(good, READERS[kind](spec, [*good.values()], notes), strict=True):
        out[k] = regions
    return out, notes


def grid_regions(spec, pictures, notes):
    """Of "grid:3" or, in several scales, "grid:1,2,3": squares of what the model sees, row by row."""
    sides = [int(n) if n.isdecimal() and len(n) < 3 else 0 for n in spec.removeprefix("grid:").split(",")]
    good = all(0 < n <= 64 for n in sides) and sum(n * n for n in sides) <= 8192
    expect(good, "regions", spec, "grid:N or grid:N,N,... with N from 1 to 64, and at most 8192 regions")
    cells = [(c / n, r / n, (c + 1) / n, (r + 1) / n) for n in sides for r in range(n) for c in range(n)]
    wanted = f"at most {MOST:,} regions; {len(cells):,} in each of {len(pictures):,} pictures are more"
    expect(len(cells) * len(pictures) <= MOST, "regions", spec, wanted)
    for picture, _, frame in pictures:
        left, top, right, bottom = (min(1.0, max(0.0, v)) for v in frame)  # beyond it is no picture
        w, h = right - left, bottom - top
        boxes = tuple((left + a * w, top + b * h, left + c * w, top + d * h) for a, b, c, d in cells)
        yield Regions(picture, boxes, frame)


def check_shape(path, mask, picture, size):
    """Complaint where a mask has not the shape of its picture; sizes: (width, height), of any resolution."""
    (w, h), (W, H) = mask, size
    shape = f"{path}: a mask of {w}x{h} pixels, its picture has {W}x{H} as its EXIF data turn it"
    require(abs(w * H - h * W) <= max(w, h, W, H), shape)
    warn_turned(picture)


def mask_regions(spec, pictures, notes):
    masks = find_masks([getattr(p, "path", "") for p, *_ in pictures], spec.removeprefix("masks:"), "regions")
    for (picture, size, frame), path in zip(pictures, masks, strict=True):
        if not path:
            yield Regions(picture, (), frame)
            continue
        mask, boxes = open_image(path).convert("L"), {}
        check_shape(path, mask.size, picture, size)
        values = np.unique(mask).tolist()
        require(len(values) <= 32, f"{path}: {len(values)} grey values, expected at most 32, one a region")
        merged = f"{path}: some of its colours, or values of 16 bits, are one grey; expected 8-bit grey"
        with opened(path) as image:  # getcolors: None for more than 32
            colours = np.unique(image) if image.mode.startswith("I") else image.getcolors(32) or ()
        require(len(values) == len(colours), merged)
        for value in values:
            span = mask.point([v == value for v in range(256)]).getbbox()
            box = tuple(v / n for v, n in zip(span, mask.size * 2, strict=True))
            if overlap(box, frame) > 0:
                boxes[value] = box
        yield Regions(picture, tuple(boxes.values()), frame, Photo(path), tuple(boxes))


def box_regions(spec, pictures, notes):
    kind, _, where = spec.partition(":")
    rows, owner, said = (coco_boxes if kind == "coco" else csv_boxes)(where, notes), {}, Counter()
    for picture, (W, H), frame in pictures:
        end = path = getattr(picture, "path", "")
        boxes = []
        while end and end not in rows:  # or what is left of it without its first folder
            end = end.partition("/")[2]
        said["unlisted"] += not end
        if end and owner.setdefault(end, path) != path:
            raise Complaint(f"{where}: {end} is the end of two paths, {owner[end]} and {path}; add folders")
        way = turned(picture) if end else 0
        said["turned"] += way > 0
        for line, x1, y1, x2, y2, *stated in rows.get(end, ()):
            sizes = f"{where}: boxes for {stated} pixels, but {path} has {[W, H]}; give photos of that size"
            require(stated in ([], [W, H], [H, W]), sizes)
            if stated == [H, W] != [W, H] and way > 4:  # boxes of the picture before it is turned
                x1, y1, x2, y2 = y1, x1, y2, x2
                x1, x2 = (W - x2, W - x1) if way in (6, 7) else (x1, x2)
                y1, y2 = (H - y2, H - y1) if way in (7, 8) else (y1, y2)
            box = (max(0.0, x1 / W), max(0.0, y1 / H), min(1.0, x2 / W), min(1.0, y2 / H))
            if x1 != x2 and y1 != y2 and (box[2] <= box[0] or box[3] <= box[1]):
                wrong = "has no area" if x2 <= x1 or y2 <= y1 else f"lies outside its picture of {W}x{H}"
                raise Complaint(f"{where}: {line}: box {x1:g},{y1:g},{x2:g},{y2:g} {wrong}; mend it")
            said["cut"] += min(x1, y1) < -1 or x2 > W + 1 or y2 > H + 1  # by rounding they may be one off
            if overlap(box, frame) > 0:
                boxes.append(box)
            else:
                said["unseen"] += 1
        said["good"] += len(boxes)
        yield Regions(picture, tuple(boxes), frame)
    if pictures and not said["good"]:
        has = f"it has {', '.join([*rows][:2])}, but a picture is {path or 'drawn'}"
        raise Complaint(f"{where}: no box for any of the {len(pictures)} pictures; {has}")
    lines = dict(
        cut="boxes reach beyond their picture, and are cut at its edge",
        unseen="boxes lie in a margin that the model does not see, or have no area, and are left out",
        unlisted=f"of {len(pictures)} pictures are not in it, and count as without",
        turned="pictures are turned by their EXIF data; boxes count in the turned picture, but where their "
        "file states its size before (WARNING)",
    )
    notes += [f"{where}: {said[k]} {line}" for k, line in lines.items() if said[k]]


def csv_boxes(path, notes):
    """{picture: [(line, x1, y1, x2, y2)]} of a CSV with columns path,x1,y1,x2,y2; behind these the width and
    height that boxes are stated for, where it has such columns."""
    table, boxes, columns = read_table(path), {}, ("path", *BOXES)
    at, about = columns_of(table, "", columns, columns[:5])
    notes += [about] * ("not used" in about)
    used = [c for c in at.values() if c is not None]
    used = used if len(used) == 7 else used[:5]
    for line, (name, *box) in zip(table.lines, zip(*[table[c] for c in used], strict=True), strict=True):
        of_picture = boxes.setdefault(name.strip().replace("\\", "/").removeprefix("./"), [])
        if any(map(str.strip, box[:4])):  # else it has none
            with reading(f"{path}: line {line}", "four numbers x1,y1,x2,y2"):
                box = list(map(float, box))
                if not all(map(math.isfinite, box)):
                    raise ValueError(box)
            of_picture.append((f"line {line}", *box))
    largest = max((v for each in boxes.values() for row in each for v in row[1:5]), default=2)
    require(largest > 1, f"{path}: no number above 1: shares of the picture? expected pixels")
    return boxes


def coco_boxes(path, notes):
    """The same of a COCO instances file; crowds are left out, and counted in notes."""
    boxes, crowds = {}, 0
    with reading(path, "a COCO instances file: images with id, file_name, annotations with image_id, bbox"):
        tree = read_json(path, "JSON")
        names = {i["id"]: os.fspath(i["file_name"]) for i in tree["images"]}
        sizes = {i["id"]: [i.get("width"), i.get("height")] for i in tree["images"]}
        for name, n in Counter(names.values()).items():
            if n > 1:
                raise ValueError(f"two images have the file_name {name}")
        for a in tree["annotations"]:
            if a.get("iscrowd"):
                crowds += 1
            else:
                size = sizes[a["image_id"]] if all(sizes[a["image_id"]]) else ()  # not stated
                row = f"annotation {a.get('id')}", *corners(a), *size
                boxes.setdefault(names[a["image_id"]], []).append(row)
    notes += [f"{path}: {crowds} crowds are left out"] * bool(crowds)
    return boxes


# of each kind what generates the Regions of pictures, (picture, its size, the frame that the model sees)
READERS = {"grid": grid_regions, "masks": mask_regions, "boxes": box_regions, "coco": box_regions}


def overlap(a, b):
    """The area that two boxes have in common; less than 1e-4 wide or high is none."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 1e-4 and h > 1e-4 else 0.0


def region_truth(pictures, shows):
    """Which regions of pictures (Regions) show the class object, which the planted feature: bool [sum R].
    A region does if what it shares with a box of the thing is at least half of the smaller of the two; a
    planted scene if at least nine tenths of it are not the class object (our reading). shows: as of Row."""
    objects, features = [], []

    def hits(box, others):
        return any(overlap(box, b) >= 0.5 * min(overlap(box, box), overlap(b, b)) > 0 for b in others)

    for picture, (thing, mark) in zip(pictures, shows, strict=True):
        for box in picture.boxes:
            objects.append(hits(box, thing))
            behind = [overlap(box, b) <= 0.1 * overlap(box, box) for b in thing]
            features.append(all(behind) if mark == SCENE else hits(box, mark))
    return torch.tensor(objects, dtype=torch.bool), torch.tensor(features, dtype=torch.bool)


# --------------------------------------------------------------------------------------------------------
# tables on the terminal; pages and figures

SVG = "http://www.w3.org/2000/svg"  # the name of the format, not a place


def shown(value, missing="-"):
    """A cell of a table: numbers with three decimals, None as a dash."""
    if value is None:
        return missing
    return f"{round(value, 3) + 0.0:.3f}" if isinstance(value, float) else str(value)  # not -0.000


def table(header, rows, most=100):
    """Rows of strings and numbers as aligned columns. Where they are wider than `most`, heads and words are
    wrapped, and what still has no room stands below, behind the leading words again."""
    cells, spans = [[shown(v) for v in row] for row in [header, *rows]], range(len(header))
    words = [c == 0 or bool(rows) and all(isinstance(row[c], str) for row in rows) for c in spans]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def surplus(columns):
        return sum(width[c] + 2 for c in columns) - 2 - most

    if surplus(spans) > 0:
        cells[0] = [head.replace("_", " ") for head in cells[0]]
        parts = [[*head.split(), *below] for head, *below in zip(*cells, strict=True)]
        width = [max(map(len, column)) for column in parts]
    for c in [c for c in spans if words[c]][::-1]:
        width[c] -= max(0, min(surplus(spans), width[c] - 24))
    keys = 1 if all(words) else words.index(False)
    tables = [[*range(keys)]]
    for c in spans[keys:]:
        if surplus([*tables[-1], c]) > 0 and len(tables[-1]) > keys:
            tables.append([*range(keys)])
        tables[-1].append(c)
    return "\n\n".join(aligned(cells, width, words, columns) for columns in tables)


def aligned(cells, width, words, columns):
    """Columns of a table, by their numbers, as text; the first row of cells is the heads."""
    lines = []
    for row in cells:
        each = [textwrap.wrap(row[c], width[c]) or [""] for c in columns]
        for parts in itertools.zip_longest(*each, fillvalue=""):
            pairs = zip(parts, columns, strict=True)
            texts = [t.ljust(width[c]) if words[c] else t.rjust(width[c]) for t, c in pairs]
            lines.append("  ".join(texts).rstrip())
        if row is cells[0]:
            lines.append("  ".join("-" * width[c] for c in columns))
    return "\n".join(lines)


class Html(str):
    """Text that is markup already; all other text is escaped on its way into a page."""


def tag(name, *parts, **attributes):
    """An element of a page; parts that are not Html are escaped. An attribute loses a trailing _: class_."""
    inner = "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts)
    given = "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items() if v != "")
    return Html(f"<{name}{given}>{inner}</{name}>" if name != "img" else f"<img{given}>")


def thumb(picture, caption, size=150, alt="", then=opaque):
    """A Picture, or an image, as <figure> with its bytes inside the page; then: image -> RGB image; alt: what
    it shows, if not the caption. A run does not end for a photo that went after it was embedded."""
    try:
        image = picture.image() if isinstance(picture, Picture) else picture
    except Complaint:
        return tag("figure", tag("figcaption", f"{caption} (cannot be read any more)"))
    image, buffer = then(image).copy(), io.BytesIO()
    image.thumbnail((2 * size, 2 * size))
    image.save(buffer, "JPEG", quality=75)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return tag("figure", tag("img", alt=alt or caption or "picture", src=source), tag("figcaption", caption))


def text(x, y, words, anchor="start", kind="", **more):
    """Words in an SVG; kind dim for what is beside the point."""
    at = {"x": f"{x:.0f}", "y": f"{y:.0f}", "text-anchor": anchor}
    return tag("text", words, **at, class_=kind, **more)


def drawing(name, height, *parts):
    """An SVG, 400 wide, and a link that saves it."""
    about = {"viewBox": f"0 0 400 {height:.0f}", "role": "img", "aria-label": name}
    svg = tag("svg", Html(f"<style>{asset('figure.css')}</style>"), *parts, xmlns=SVG, **about)
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8", "backslashreplace")).decode()
    link = tag("a", "this figure as SVG", href=source, download=f"{name}.svg")
    return tag("div", svg, link, class_="chart")


def dots(name, rows, series=("",)):
    """Shares in [0, 1] with their intervals as an SVG, a line for each row: (label, note, values), one for
    each of the series: (share, (low, high) or None), or None."""
    parts, x, y = [], 8, 4 if series == ("",) else 20
    for k, label in enumerate(series if y > 4 else ()):
        width = 26 + 7.6 * len(label)
        x, y = (8, y + 18) if x > 8 and x + width > 392 else (x, y)
        parts.append(tag("circle", cx=f"{x + 5:.0f}", cy=y - 9, r=5, class_=f"c{k % 6}"))
        parts.append(text(x + 14, y - 5, label))
        x += width
    top, single = y, len(series) == 1
    for label, note, values in rows:
        parts += [text(8, y + 16, label), text(392, y + 16, note, "end", "dim")]
        y += 26
        ends = [8 + 384 * v[0] for v in values[:2] if v]
        if len(ends) == 2 and len(series) < 4:  # from the first to the second
            parts.append(tag("path", d=f"M{ends[0]:.1f} {y + 4}H{ends[1]:.1f}", class_="way"))
        for k, value in enumerate(values):
            if value:
                share, ends = value
                kind, spot = f"c{1 if single else k % 6}", f"{8 + 384 * share:.1f}"
                low, high = (8 + 384 * min(max(v, 0), 1) for v in ends or (share, share))
                parts.append(tag("path", d=f"M{low:.1f} {y}H{high:.1f}", class_=kind))
                parts.append(tag("circle", tag("title", f"{share:.3f}"), cx=spot, cy=y, r=5, class_=kind))
            y += 9
        y += 1
    grid = []
    for v, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end")):
        grid.append(tag("path", d=f"M{8 + 384 * v:.0f} {top}V{y + 4}", class_="grid"))
        grid.append(text(8 + 384 * v, y + 18, f"{v:.0%}", anchor, "dim"))
    return drawing(name, y + 24, *grid, *parts)


def html_table(header, rows):
    words = [{"class_": "text"} if rows and isinstance(cell, str) else {} for cell in (rows or [header])[0]]
    lines = []
    for kind, row in [("th", header), *[("td", row) for row in rows]]:
        cells = [tag(kind, shown(v, "\u2013"), **w) for v, w in zip(row, words, strict=True)]
        lines.append(tag("tr", *cells))
    return tag("div", tag("table", *lines), class_="wide")


def page(kicker, title, lead, sections, config, git, notes=(), numbers=(), links=()):
    """A self-contained HTML page. All text but Html is escaped.

    kicker: a line above the title; numbers: (figure, what it is), shown large; links: (text, path);
    sections: (heading, *parts); config, git and notes are folded away at its end."""
    folders = re.compile(r"(?<![\w.])/(?:[^/\s]+/)*(?=\S)")  # headlines name files without them
    kicker, title, *heads = [folders.sub("", words) for words in (kicker, title, *[s[0] for s in sections])]
    body = [tag("p", kicker, class_="dim"), tag("h1", title), tag("p", lead)]
    if numbers:
        large = [tag("div", tag("b", figure), tag("span", what)) for figure, what in numbers]
        body.append(tag("div", *large, class_="numbers"))
    if links:
        body.append(tag("p", *[tag("a", words, href=path) for words, path in links], class_="links"))
    body += [tag("section", tag("h2", h), *parts) for h, (_, *parts) in zip(heads, sections, strict=True)]
    lines = "\n".join([*[f"--{k}={v}" for k, v in config.items()], f"git {git}"])
    folded = [tag("summary", "Notes, flags and revision"), *[tag("p", note) for note in notes]]
    body.append(tag("details", *folded, tag("pre", lines)))
    head = '<!doctype html><html lang="en"><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width,initial-scale=1">'
    return head + tag("title", title) + f"<style>{asset('page.css')}</style>" + "".join(body) + "</html>"


def linked(words, made, name, out_dir):
    """The link, [(words, path)] or none, of a page in out_dir to one beside a file of another run."""
    path = Path(made if os.path.isdir(made) else os.path.dirname(made)) / name
    return [(words, os.path.relpath(path, out_dir))] if made and path.is_file() else []
