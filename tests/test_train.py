"""train.py: BAP's maps, results and pages, seeds and interruption, fine-tuning and its losses, bad input."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import data
import model
import train
from conftest import run_script
from data import Complaint
from model import additive_solve, load_encoder, unit

TRAIN = str(Path(data.__file__).with_name("train.py"))
PLACES = (60, 90, 200), (200, 180, 60), (90, 90, 90)
CLASSES = (30, 200, 60), (220, 40, 40), (240, 240, 240)
COUNTS = ["16 0 0 16", "10 0 5 5", "8 7 6 5"]  # images of each group, class by class, in train, val, test
WEIGHTS = "weights.safetensors"
run, saved = functools.partial(run_script, TRAIN), functools.partial(torch.load, weights_only=True)


def ground(seed, colour, size=64):
    g = np.random.default_rng(seed)
    pixels = g.normal(0, 25, (size, size, 3)) + colour + g.normal(0, 15, 3)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def figure(seed, y, size=64):
    """An ellipse or a box, by its class: RGBA."""
    g = np.random.default_rng([seed, y])
    image, at = Image.new("RGBA", (size, size)), g.integers(4, 20, 2).tolist()
    colour = tuple((np.array(CLASSES[y]) + g.integers(-12, 12, 3)).clip(0, 255).tolist())
    shape = ImageDraw.Draw(image)
    (shape.ellipse if y % 2 == 0 else shape.rectangle)((*at, at[0] + 34, at[1] + 30), fill=(*colour, 255))
    return image


def photo(path, seed, y, place):
    """A figure of a class on a ground of a place, as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, shape = ground(seed, PLACES[place]), figure(seed, y)
    image.paste(shape, (0, 0), shape)
    image.save(path)


def birds(root, counts, places=2):
    """A folder in the Waterbirds layout, with masks. counts: as COUNTS. Returns the flag that reads it."""
    counts = [(split, g, int(n)) for split, line in enumerate(counts) for g, n in enumerate(line.split())]
    groups = [(split, g) for split, g, n in counts for _ in range(n)]
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    (root / "masks").mkdir(parents=True)
    for k, (split, group) in enumerate(groups):
        y, place = divmod(group, places)
        photo(root / f"set/{k}.png", k, y, place)
        figure(k, y).getchannel("A").save(root / f"masks/{k}.png")
        lines.append(f"{k},{k}.png,{('dog', 'fox', 'owl')[y]},{split},{place},-")
    (root / "set/metadata.csv").write_text("\n".join(lines))
    return f"--data=waterbirds:{root / 'set'}"


@pytest.fixture(autouse=True, scope="module")
def one_tokenizer():
    """A tokenizer takes as long to make as a small run takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Biased data at 100 % and at 75 %, cut-outs, backgrounds, and backgrounds of each place."""
    root = tmp_path_factory.mktemp("files")
    birds(root / "all", COUNTS)
    birds(root / "most", ["12 4 4 12", "6 6 6 6", "8 7 6 5"])
    for folder in ("foregrounds", "backgrounds", "land", "water"):
        (root / folder).mkdir()
    for k in range(12):
        figure(500 + k, k % 3).save(root / f"foregrounds/{k}.png")
        ground(700 + k, np.random.default_rng(k).integers(40, 220, 3)).save(root / f"backgrounds/{k}.png")
        for place, folder in enumerate(("land", "water")):
            ground(800 + k, PLACES[place]).save(root / f"{folder}/{k}.png")
    return root


def words(files, out, text="", which="all"):
    """A command line of bap; flags in text come last, and count."""
    paths = dict(data=f"waterbirds:{files / which / 'set'}", cache_dir=files / "cache", out_dir=out)
    paths.update(foregrounds=files / "foregrounds", backgrounds=files / "backgrounds")
    small = f"--model=tiny --dtype=float32 --instances=16 --per_instance=2 {text}".split()
    return [*[f"--{k}={v}" for k, v in paths.items()], *small]


def tune_words(files, out, text=""):
    how = "--method=finetune --captions=class --pairs=8 --steps=6 --learning_rate=0.001"
    return words(files, out, f"{how} {text}", "most")


def bap(files, out, text="", which="all"):
    return run(words(files, out, text, which))


def tune(files, out, text=""):
    return run(tune_words(files, out, text))


def samples_of(files, which="most", masks=""):
    return data.load_data(f"waterbirds:{files / which / 'set'}", masks=masks)


def composed(root, instances=16):
    """Figures and grounds in a folder, and composites of them, as the runs here have them: cells, i, j."""
    kinds = ("foregrounds", data.Cutout), ("backgrounds", data.Ground)
    figures, grounds = (data.layers(root / name, kind, name)[0] for name, kind in kinds)
    return figures, grounds, *data.composites(figures, grounds, instances, 2, 0)


def tiny(files=None, pretrained=""):
    cache = str(files / "cache") if files else ""
    return load_encoder("tiny", str(pretrained), device="cpu", dtype="float32", cache=cache)


def tree(out, name="results.json"):
    return json.loads((out / name).read_text())


def numbers(out):
    """All that the seed decides."""
    return {k: tree(out)[k] for k in ("methods", "additivity", "invariance", "zero_shot")}


def weights(out):
    return load_file(out / WEIGHTS)


def logged(out):
    """The rows of log.csv, numbers."""
    rows = csv.DictReader((out / "log.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items()} for row in rows]


def same(a, b, atol=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a)


def complaint(*texts):
    """Expects a Complaint of one line that contains each of the texts."""
    every = "".join(f"(?=.*{re.escape(str(text))})" for text in texts)
    return pytest.raises(Complaint, match=rf"(?s)^{every}[^\n]*$")


def refused(capture, argv, *expected):
    """Expects exit code 2 and one line that contains each of the texts."""
    capture.readouterr()
    assert run(argv) == 2
    line = capture.readouterr().err
    assert line.startswith("train.py: ") and line.count("\n") == 1, line
    assert not [text for text in map(str, expected) if text not in line], line


@pytest.fixture
def ctrl_c(monkeypatch):
    """(module, name, k, times): Ctrl-C is pressed so many times on the k-th call of module.name."""

    def press(module, name, k, times=1):
        calls, real = [], getattr(module, name)

        def counted(*arguments, **more):
            calls.append(1)
            for _ in range(times if len(calls) == k else 0):
                signal.raise_signal(signal.SIGINT)
            return real(*arguments, **more)

        monkeypatch.setattr(module, name, counted)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    yield press
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def deaf(monkeypatch):
    """The terminal closes the pipe at the first table."""
    real = data.say

    def say(text, *more):
        if "worst" in text and "\n" in text.strip():
            raise BrokenPipeError
        real(text, *more)

    monkeypatch.setattr(data, "say", say)
    monkeypatch.setattr(data.os, "dup2", lambda *_: None)


# --- what it writes


@pytest.mark.parametrize("start, written", [("bap", "results.json"), ("tune", "finetune.json")])
def test_results_are_written_before_they_are_shown(files, tmp_path, deaf, start, written):
    assert dict(bap=bap, tune=tune)[start](files, tmp_path) == 0
    assert (tmp_path / written).is_file()


@pytest.fixture(scope="module")
def plain(files):
    """One run at 100 %: its out_dir."""
    assert bap(files, files / "plain") == 0
    return files / "plain"


@pytest.fixture(scope="module")
def full(files):
    """One run at 75 % with masks and backgrounds of the places."""
    more = f"--masks={files / 'most/masks'} --place_backgrounds={files / 'land'},{files / 'water'}"
    assert bap(files, files / "full", more, "most") == 0
    return files / "full"


def check_method(m):
    accuracy = [g["accuracy"] for g in m["groups"]]
    assert m["worst_group"] == min(accuracy) and m["over_erm"][0] <= m["over_erm"][1]
    assert m["avg_group_mean"] == pytest.approx(np.mean(accuracy))
    keys = [(0, 0, 8), (0, 1, 7), (1, 0, 6), (1, 1, 5)]
    assert [(g["y"], g["place"], g["n"]) for g in m["groups"]] == keys
    for g in m["groups"]:
        assert 0 <= g["interval"][0] <= g["accuracy"] <= g["interval"][1] <= 1
        assert g["accuracy"] * g["n"] == pytest.approx(round(g["accuracy"] * g["n"]))


@pytest.mark.parametrize("which, train_counts", [("plain", (16, 0, 0, 16)), ("full", (12, 4, 4, 12))])
def test_results_keep_the_contract(which, train_counts, request):
    out = request.getfixturevalue(which)
    r = tree(out)
    needy = {"group_weighted", "copy_paste", "balanced_train"}  # of minority groups or masks
    head = "config git fingerprint inputs notes files seconds"
    assert r.keys() == {*head.split(), *"additivity invariance zero_shot methods reasons".split()}
    assert r["reasons"].keys() == (needy if which == "plain" else set())
    assert which == "full" or "one place only" in r["reasons"]["group_weighted"]
    assert all(reason in (out / "report.html").read_text() for reason in r["reasons"].values())
    assert r["additivity"].keys() == {"flat", "sphere"} and r["zero_shot"] is None
    for part in r["additivity"].values():
        assert {"r2", "r2_heldout", "foreground", "background", "residual", "cross"} <= set(part)
        assert 0 < part["r2"] < 1 and -1 <= part["cos_sum"] <= 1 and -1 <= part["cos_sum_shuffled"] <= 1
    probes = {f"place_probe_{name}" for name in ("raw", "map", "map_free", "map_mlp")}
    assert r["invariance"].keys() == probes | {"cos_within", "cos_between", "own_foretold"}
    assert {"erm", "nullspace", "leace", "bap_closed", "bap", "val_probe"} <= set(r["methods"])
    assert needy & set(r["methods"]) == (needy if which == "full" else set())
    assert list(r["methods"]) == [name for name in train.ROWS if name in r["methods"]]
    for m in r["methods"].values():
        check_method(m)
        mean = sum(g["accuracy"] * k for g, k in zip(m["groups"], train_counts, strict=True)) / 32
        assert m["avg_train_weighted"] == pytest.approx(mean)  # as the training set has the groups
        (alone,) = m["seeds"]
        assert alone == {k: m[k] for k in alone} and m["spread"] == 0
    assert r["config"]["model"] == "tiny" and r["config"]["instances"] == 16 and r["seconds"]["total"] > 0
    assert any("100 % correlated" in note for note in r["notes"]) == (which == "plain")
    assert sorted(os.listdir(out)) == ["ckpt.pt", "map.npz", "report.html", "results.json"]


def groups_of(kept, probe, z, samples):
    right, test = model.load_heads(kept)[probe](z).argmax(1) == samples.y, samples.split == 2
    return model.group_metrics(right[test], samples, test.nonzero()[:, 0])["groups"]


def test_numbers_are_those_of_the_embeddings_and_of_the_checkpoint_which_holds_no_code(files, plain):
    (*_, cells, i, j), encoder, samples = composed(files), tiny(files), samples_of(files, "all")
    r = tree(plain)
    flat = model.additivity(unit(encoder.embed(cells)), i, j)["flat"]
    assert {k: r["additivity"]["flat"][k] for k in flat} == pytest.approx(flat)
    kept, z, fit = saved(plain / "ckpt.pt"), encoder.embed(samples.items), samples.split == 0
    assert kept["config"] == r["config"] and kept["git"] == r["git"]
    for name in ("erm", "bap"):
        assert groups_of(kept, name, z, samples) == r["methods"][name]["groups"]
    scaler, val, group = model.standard(z[fit]), samples.split == 1, samples.group()
    for name, scaled in (("dfr", scaler), ("dfr_val_scaled", None)):  # on raw embeddings, as in eval.py
        right = model.dfr(z[val], samples.y[val], group[val], 0, scaled).predict(z) == samples.y
        worst = model.worst_group(right[samples.split == 2], group[samples.split == 2])
        assert worst == r["methods"][name]["worst_group"]
    said = train.summary(r, samples)
    assert re.search(r"\ncopy_paste +-[- ]+needs --masks\n", said)
    logits, x = model.load_heads(kept)["erm"](z), unit(z)
    assert torch.allclose(logits, model.fit_probe(x[fit], samples.y[fit], 0.8).logits(x), atol=1e-4)


def test_of_many_groups_the_console_and_the_page_show_those_that_are_hardest_for_erm():
    groups = [dict(accuracy=k % 10 / 10) for k in range(70)]
    index, few = train.hardest(groups, 8)
    assert index == [0, 1, *range(10, 70, 10)] and "of 70 the 8" in few
    assert train.hardest(groups[:8], 8) == ([*range(8)], "")


def test_an_encoder_without_levels_cannot_cut_foregrounds_out_but_can_be_trained():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    mine = model.Encoder("mine", "mine", lambda: module, None, "", "").embeds_with("cpu")
    config = dict(train="image", loss="infonce")
    assert len(train.choose_parameters(mine, train.ANCHORS, config)) == 2
    with pytest.raises(Complaint, match="--train=last_blocks: the encoder has no numbered blocks"):
        train.choose_parameters(mine, train.ANCHORS, dict(config, train="last_blocks"))
    with pytest.raises(Complaint, match="--own: .*expected 0, as the levels of mine"):
        train.dense(SimpleNamespace(fast=module, name="mine"), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    "flags, unused",
    [
        ("--discovery=x --pairs=8 --l2=0.5", "--discovery=x: not used with --method=bap"),
        ("--pairs=8 --steps=5 --l2=0.5", "--pairs=8, --steps=5: not used with --train=auto"),
        ("--method=finetune --own=0.3 --pairs=8", "--own=0.3: not used with --method=finetune"),
    ],
)
def test_flags_that_a_method_has_no_use_for_are_said(flags, unused, tmp_path, capsys):
    assert run([*flags.split(), f"--data=folder:{tmp_path}", f"--out_dir={tmp_path / 'out'}"]) == 2
    assert f"WARNING: {unused}" in capsys.readouterr().out


def test_the_readmes_lines_of_python_and_of_numpy_apply_the_map(files, plain):
    samples = samples_of(files, "all")
    lines = (data.ASSETS.parent / "README.md").read_text(encoding="utf-8")
    lines = re.search("```\n(import numpy.+?)```", lines, re.S)[1]
    for word, here in {'"lite0"': '"tiny", dtype="float32"', "out/": f"{plain}/"}.items():
        assert word in lines
        lines = lines.replace(word, here)
    folder = Path(samples.items[0].path).parent
    photos = [data.Photo(f"{folder}/" + "/".join(parts)) for parts in data.scan(folder)]
    exec(lines, scope := dict(photos=photos))
    label, logits = scope["label"], scope["logits"]
    by_path = dict(zip([p.path for p in photos], label, strict=True))
    assert (np.array(samples.classes)[logits.argmax(1)] == label).all() and len(set(label)) > 1
    label = np.array([by_path[item.path] for item in samples.items])
    assert (label == np.array(samples.classes)[samples.y])[samples.split == 2].mean() == pytest.approx(
        tree(plain)["methods"]["bap"]["overall"]
    )


def test_report_is_one_self_contained_page(plain, full):
    for out in (plain, full):
        text = (out / "report.html").read_text()
        links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", text)
        assert len(links) > 12 and all(link.startswith("data:image/") for link in links)
        assert not re.search(r"https?:|url\(|@import|<script", text.replace(data.SVG, ""))
        bap = tree(out)["methods"]["bap"]
        assert f"<b>{bap['worst_group']:.0%}</b>" in text and f"{bap['worst_group']:.3f}" in text
        assert "--instances=16" in text and 'alt=""' not in text
        assert all(f"<title>{g['accuracy']:.3f}</title>" in text for g in bap["groups"])


def test_report_escapes_whatever_the_data_set_says(files, tmp_path):
    names, places = ("egg", "<script>alert(1)</script>"), ("land", "<img src=x onerror=alert(2)>")
    folder, lines = tmp_path / "<b onclick=x>", ["path,label,place,split"]
    for k in range(24):
        y, place, split = k % 2, k % 2 if k < 18 else k // 2 % 2, "001122"[k // 4]
        photo(folder / f"{k}.png", k, y, place)
        lines.append(f"{k}.png,{names[y]},{places[place]},{split}")
    (folder / "set.csv").write_text("\n".join(lines))
    assert run([*words(files, tmp_path / "out", "--own=0"), f"--data=csv:{folder / 'set.csv'}"]) == 0
    text = (tmp_path / "out/report.html").read_text()
    bare = re.sub(r'="[^"]*"', "", text)  # without the values of attributes
    assert "&lt;script&gt;alert(1)" in text and "&lt;img src=x onerror" in text and "&lt;b onclick" in text
    assert any(names[1] in note for note in tree(tmp_path / "out")["notes"])  # which the page shows, too
    assert not re.search(r"<script|<b onclick|<[^>]*\s(on\w+|src=)", bare)


# --- repeatability, seeds, interruption


def test_same_seed_gives_the_same_numbers_in_another_process_without_a_cache(files, plain, tmp_path):
    argv = [sys.executable, TRAIN, *words(files, tmp_path / "out", "--cache_dir= --threads=3")]
    few = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.run(argv, capture_output=True, text=True, timeout=200, env=few)
    assert job.returncode == 0 and not job.stderr, job.stderr
    assert numbers(tmp_path / "out") == numbers(plain)


def test_seeds_are_averaged_and_resume_between_them(files, plain, tmp_path, ctrl_c, capsys):
    two, alone, cut = (tmp_path / name for name in ("two", "alone", "cut"))
    assert bap(files, two, "--seeds=2") == 0
    data.write(alone / WEIGHTS, "old")
    capsys.readouterr()
    assert bap(files, alone, "--seed=1") == 0
    assert "weights.safetensors: of another run" in capsys.readouterr().out
    methods = tree(two)["methods"]
    for name, m in methods.items():
        assert m["seeds"] == [tree(out)["methods"][name]["seeds"][0] for out in (plain, alone)]
        worst = [v["worst_group"] for v in m["seeds"]]
        assert m["worst_group"] == pytest.approx(np.mean(worst))
        assert m["spread"] == pytest.approx(np.std(worst, ddof=1), abs=1e-6)
        third = [v["groups"][2]["accuracy"] for v in m["seeds"]]
        assert m["groups"][2]["accuracy"] == pytest.approx(np.mean(third))
    assert any(m["seeds"][0] != m["seeds"][1] for m in methods.values())

    ctrl_c(model, "additivity", 2)
    assert bap(files, cut, "--seeds=2") == 130
    assert "--resume" in capsys.readouterr().err and os.listdir(cut) == ["partial.pt"]
    refused(capsys, words(files, cut, "--seeds=2 --resume --l2=3"), "--l2=0.8", "same flags")
    state = saved(cut / "partial.pt")
    model.save_checkpoint(cut / "partial.pt", state | dict(runs=3))
    refused(capsys, words(files, cut, "--seeds=2 --resume"), "run without --resume")
    model.save_checkpoint(cut / "partial.pt", state)
    model.save_checkpoint(tmp_path / "one/partial.pt", state)  # as a run of one seed is killed at its end
    assert bap(files, tmp_path / "one", "--resume") == 0 and numbers(tmp_path / "one") == numbers(plain)
    assert bap(files, cut, "--seeds=2 --resume") == 0
    assert "goes on behind 1 of 2 seeds" in capsys.readouterr().out
    assert numbers(cut) == numbers(two) and "partial.pt" not in os.listdir(cut)


def test_resume_over_other_labels_is_refused_and_a_finished_run_stays(files, tmp_path, ctrl_c, capsys):
    shutil.copytree(files / "all" / "set", tmp_path / "set")
    table, out = tmp_path / "set/metadata.csv", tmp_path / "out"
    flags, whole = f"--data=waterbirds:{tmp_path / 'set'} --seeds=2", table.read_text()
    head, first, *rest = whole.splitlines()
    y, cells = head.split(",").index("y"), first.split(",")
    cells[y] = next(row.split(",")[y] for row in rest if row.split(",")[y] != cells[y])
    flipped = "\n".join([head, ",".join(cells), *rest])
    ctrl_c(model, "additivity", 2)
    assert bap(files, out, flags) == 130
    table.write_text(flipped)
    refused(
        capsys, words(files, out, f"{flags} --resume"), "--resume", "partial.pt", "other images or labels"
    )
    table.write_text(whole)
    assert bap(files, out, f"{flags} --resume") == 0
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    assert bap(files, out, f"{flags} --resume") == 0 and "finished already" in capsys.readouterr().out
    refused(capsys, words(files, out, f"{flags} --resume --seed=9"), "--resume", "results.json", "--seed=0")
    table.write_text(flipped)
    refused(capsys, words(files, out, f"{flags} --resume"), "results.json", "other images or labels")
    assert before == {name: (out / name).read_bytes() for name in os.listdir(out)}


def test_resume_over_other_masks_or_backgrounds_of_places_is_refused(files, tmp_path, capsys):
    for name in ("masks", "land"):
        shutil.copytree(files / ("most/masks" if name == "masks" else name), tmp_path / name)
    flags = f"--masks={tmp_path / 'masks'} --place_backgrounds={tmp_path / 'land'},{files / 'water'} --own=0"
    out = tmp_path / "out"
    assert bap(files, out, flags, "most") == bap(files, out, f"{flags} --resume", "most") == 0
    assert "finished already" in capsys.readouterr().out
    for name in ("masks", "land"):
        path = tmp_path / name / "3.png"
        path.write_bytes(path.read_bytes())
        argv = words(files, out, f"{flags} --resume", "most")
        refused(capsys, argv, "results.json", "other images or labels")
        assert bap(files, out, flags, "most") == 0


def test_files_of_two_runs_are_told_apart(files, plain, found, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "out")
    model.load_checkpoint(tmp_path / "out/ckpt.pt")
    assert "WARNING" not in capsys.readouterr().out
    model.save_checkpoint(tmp_path / "out/ckpt.pt", saved(plain / "ckpt.pt") | dict(git="other"))
    model.load_checkpoint(tmp_path / "out/ckpt.pt")
    assert "ckpt.pt: results.json beside it is of another run" in capsys.readouterr().out
    shutil.copytree(found, tmp_path / "found")
    path = tmp_path / "found/discovery.npz"
    result = tree(tmp_path / "found", "discovery.json") | dict(npz=model.file_digest(path, ""))
    data.write_json(path.with_suffix(".json"), result)
    train.load_discovery(tmp_path / "found")
    data.write_json(path.with_suffix(".json"), result | dict(npz="other"))
    with pytest.raises(Complaint, match="discovery.npz beside it is of another run"):
        train.load_discovery(tmp_path / "found")


def test_a_run_that_stops_while_it_writes_leaves_no_results_of_another(files, plain, tmp_path, monkeypatch):
    shutil.copytree(plain, tmp_path / "out")
    monkeypatch.setattr(data, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bap(files, tmp_path / "out")
    assert not (tmp_path / "out/results.json").exists()


def test_what_one_seed_lacks_is_left_out_of_the_means():
    def one(worst, r2):
        methods = {name: dict(worst_group=w, groups=[dict(accuracy=w)]) for name, w in worst.items()}
        return dict(methods=methods, additivity=dict(flat=dict(r2=r2)), invariance={}, zero_shot=None)

    notes = []
    mean = train.average([one(dict(erm=0.2, dfr=0.8), 0.5), one(dict(erm=0.4), None)], notes)
    assert list(mean["methods"]) == ["erm"] and mean["methods"]["erm"]["worst_group"] == pytest.approx(0.3)
    assert mean["additivity"]["flat"]["r2"] is None and notes == ["dfr: only 1 of 2 seeds have it, left out"]


def test_what_another_run_left_is_not_in_the_way(files, tmp_path, ctrl_c, capsys):
    for name in train.PARTIAL:
        model.save_checkpoint(tmp_path / name, dict(config={}, fingerprint="other"))
    ctrl_c(model, "additivity", 1)
    refused(capsys, words(files, tmp_path, "--resume"), "partial.pt", "not with the weights")
    assert bap(files, tmp_path) == 130
    assert sorted(os.listdir(tmp_path)) == [f"{name}.old" for name in train.PARTIAL]
    assert "begins anew and keeps it" in capsys.readouterr().out
    assert saved(tmp_path / "partial.pt.old")["fingerprint"] == "other"


# --- the maps


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def grid(n, m, share, D, noise=0.0, seed=0):
    """An incomplete grid, every foreground and background in it: z, i, j, a, c; the effects sum to zero."""
    keep = torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) < share
    row, column = torch.arange(n)[:, None] % m, torch.arange(m)
    i, j = (keep | (row == column) | ((row + 1) % m == column)).nonzero().T
    a, c = (gaussian(k, D, seed=seed + s) for k, s in ((n, 1), (m, 2)))
    a, c = a - a.mean(0), c - c.mean(0)
    z = gaussian(D, seed=seed + 3) + a[i] + c[j] + noise * gaussian(len(i), D, seed=seed + 4)
    return z, i, j, a, c


def skewed(noise=0.3, seed=0):
    """Additive data in which foreground and background vary along different, skewed directions."""
    mix = gaussian(6, 6, seed=9) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.2])
    _, i, j, a, c = grid(80, 40, 0.15, 6, seed=seed)
    errors = noise * gaussian(len(i), 6, seed=seed + 5)
    return 5 + a[i] @ mix + 2 * c[j] @ gaussian(6, 6, seed=8).tril() + errors, i, j


def share_within(y, i):
    """Share of the variance that is within foregrounds."""
    i = model.renumber(i)
    means = torch.stack([y[i == k].mean(0) for k in range(int(i.max()) + 1)])
    return float((y - means[i]).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("noise", [0.3, 30.0])  # in much noise S_f has negative eigenvalues to clip
def test_wiener_is_its_equation(noise):
    z, i, _ = skewed(noise)
    x, n = unit(z).numpy(), int(i.max()) + 1
    anchors = np.stack([x[i.numpy() == k].mean(0) for k in range(n)])
    mu, r = x.mean(0), x - anchors[i.numpy()]
    S_w = sum(np.outer(v, v) for v in r) / (len(x) - n)
    S_f = sum(np.outer(v, v) for v in anchors - mu) / n - S_w * np.mean(1 / np.bincount(i))
    value, vector = np.linalg.eigh(S_f)
    assert value.min() < 0 or noise < 1
    S_f = vector @ np.diag(value.clip(0)) @ vector.T
    for lam in (0.1, 1.0):
        W = np.linalg.inv(S_f + S_w + lam * np.trace(S_f + S_w) / 6 * np.eye(6)) @ S_f
        g = train.wiener([(1.0, z, i)], lam)
        assert np.allclose(g.W, W, atol=1e-6) and not np.allclose(g.W, W.T, atol=1e-2 * abs(W).max())
        assert np.allclose(g(z.float()), (x - mu) @ W, atol=1e-5)


def test_wiener_of_two_grids_averages_their_moments_and_power_works_on_signed_powers():
    (z, i, _), (v, k, _) = skewed(), skewed(seed=50)
    moments = zip(train.scatter(unit(z), i), train.scatter(unit(v), k), strict=True)
    mu, S_f, S_w = (0.75 * a + 0.25 * b for a, b in moments)
    value, vector = torch.linalg.eigh(S_f)
    S_f = (vector * value.clamp(min=0)) @ vector.T
    W = torch.linalg.solve(S_f + S_w + 0.5 * (S_f + S_w).trace() / 6 * torch.eye(6), S_f)
    g, z = train.wiener([(0.6, z, i), (0.2, v, k)], 0.5), z - 5
    assert torch.allclose(g.W.double(), W, atol=1e-6) and torch.allclose(g.mu.double(), mu, atol=1e-6)
    rooted = unit(z.sign() * z.abs().sqrt())
    powered, usual = train.wiener([(1.0, z, i)], power=0.5), train.wiener([(1.0, rooted, i)])
    assert torch.allclose(powered(z.float()), usual(rooted.float()), atol=1e-5)


def test_scatter_of_foregrounds_without_any_of_their_own_is_nothing_whatever_their_counts():
    i = torch.arange(300).repeat_interleave(torch.tensor([2, 60] * 150))
    _, S_f, S_w = train.scatter(gaussian(len(i), 20), i)
    assert abs(float(S_f.trace() / S_w.trace())) < 0.02  # less S_w / mean count: .23


def test_wiener_finds_anchors_on_unseen_backgrounds_and_the_transposed_product_does_not():
    z, i, j = skewed()
    x, seen = unit(z), j < 25
    W = train.wiener([(1.0, x[seen], i[seen])], 1e-3).W.double()
    anchor = torch.stack([x[i == k].mean(0) for k in range(80)])[i] - x.mean(0)

    def error(W):
        return float(((x - x.mean(0)) @ W - anchor)[~seen].square().sum() / anchor[~seen].square().sum())

    assert error(W) < 0.8 * error(W.T) and error(W) < error(torch.eye(6).double())


def test_maps_make_backgrounds_that_were_never_seen_matter_less():
    z, i, j, _, c = grid(60, 60, 0.15, 32, 0.05)
    z = z - c[j] + 3 * c[j][:, :4] @ gaussian(4, 32, seed=7)  # backgrounds vary in four directions only
    seen, before = j < 40, share_within(unit(z)[j >= 40], i[j >= 40])
    cells = z[seen], i[seen], j[seen]
    for g in (train.wiener([(1.0, *cells[:2])], 0.1), train.nullspace(*cells, 4), train.leace(*cells, 4)):
        assert share_within(g(z.float())[~seen], i[~seen]) < 0.5 * before


def test_nullspace_is_a_projection_after_which_no_background_effect_is_left():
    z, i, j, _, _ = grid(40, 6, 0.5, 20, 0.1)
    g = train.nullspace(z, i, j)
    W, (before, after) = g.W, (additive_solve(x, i, j)[2].norm() for x in (unit(z), g(z.float())))
    assert torch.allclose(W, W.T, atol=1e-6) and torch.allclose(W @ W, W, atol=1e-5)
    assert after < 1e-4 * before


@pytest.mark.parametrize("eraser", [train.nullspace, train.leace])
@pytest.mark.parametrize("m, k, removed", [(6, 32, 5), (6, 3, 3), (30, 32, 20)])
def test_erasers_remove_no_more_directions_than_backgrounds_span(eraser, m, k, removed):
    z, i, j, _, _ = grid(40, m, 0.5, 20, 0.3)
    rest = torch.eye(20) - eraser(z, i, j, k).W
    assert int((torch.linalg.svdvals(rest) > 1e-3).sum()) == removed


def explained(x, target):
    """R2 of the least-squares prediction of target from x, on the data that it is fitted on."""
    x, target = torch.cat([x.double(), torch.ones(len(x), 1)], 1), target - target.mean(0)
    rest = target - x @ torch.linalg.lstsq(x, target, driver="gelsd", rcond=1e-5).solution
    return 1 - float(rest.square().sum() / target.square().sum())


@pytest.mark.parametrize("k", [2, 32])
def test_leace_leaves_nothing_that_a_linear_probe_could_find(k):
    z, i, j, _, _ = grid(60, 8, 0.5, 24, 0.3)
    u, s, _ = torch.linalg.svd(additive_solve(unit(z), i, j)[2], full_matrices=False)
    concept = (u * s)[:, : min(k, 7)][j]
    maps = unit, train.leace(z, i, j, k), train.nullspace(z, i, j, k)
    raw, erased, projected = (explained(g(z.float()), concept) for g in maps)
    assert raw > 0.5 and erased < 1e-4 and projected > 1e-3  # projecting the means out is not enough


def test_contrast_trains_the_linear_map_and_starts_at_the_closed_form(capsys):
    z, i, j, _, _ = grid(12, 8, 0.5, 6, 0.5)
    mu, a, _ = additive_solve(unit(z), i, j)
    start = train.wiener([(1.0, z, i)], 0.1)
    r, a, closed = unit(z) - mu - a[i], mu + a - start.mu, start.W.double()  # the map takes its own mean off

    def loss(W):
        """Every virtual composite a_i + r_k is to point at anchor i."""
        cosine = unit((a[:, None] + r) @ W) @ unit(a @ W).T  # [n, N, n]
        return F.cross_entropy(20 * cosine.flatten(0, 1), torch.arange(12).repeat_interleave(len(r)))

    g = train.contrast(start, z, i, j, 0, 60, 0.02)
    said = [float(v) for v in re.findall(r"step \d+: loss ([\d.]+)", capsys.readouterr().out)]
    assert len(said) == 3 and said[0] == pytest.approx(loss(closed).item(), abs=1e-4)
    assert loss(g.W.double()) < loss(closed) - 0.01 and not g.W.requires_grad
    with complaint("--bap_map=linear", "not finite", "--learning_rate"):
        train.contrast(train.wiener([(1.0, z, i)]), z, i, j, 0, 9, 1e38)


def test_a_trained_map_is_a_run_of_its_own(files, plain, tmp_path):
    assert bap(files, tmp_path, "--bap_map=linear --steps=20 --learning_rate=0.01") == 0
    a, b = (saved(out / "ckpt.pt")["map"] for out in (plain, tmp_path))
    assert torch.equal(a["mu"], b["mu"]) and 1e-4 < (a["W"] - b["W"]).norm() / a["W"].norm() < 1
    check_method(tree(tmp_path)["methods"]["bap"])


def test_invariance_compares_two_composites_of_one_foreground_and_of_two():
    z, i = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1], [0, 2]]), torch.tensor([0, 0, 1, 1])
    samples = SimpleNamespace(place=torch.zeros(4).long(), split=torch.tensor([0, 1, 2, 2]))
    v = train.invariance(lambda z: z, z, i, z, z, samples, 1.0, 0)
    assert (v["cos_within"], v["cos_between"]) == pytest.approx(((0.6 + 1) / 2, (0 + 0 + 0.8 + 0.8) / 4))
    assert v["place_probe_raw"] is None  # one place only


# --- foregrounds of the target: cut out, or by their masks


def test_cutter_learns_from_composites_to_cut_foregrounds_out_of_others(terminal):
    cells, encoder = composed(data.ASSETS, 32)[2], load_encoder("lite0", device="cpu")
    cuts, _, line = train.cut_out(encoder, cells[50:], cells[:50], 0, "scenes")
    overlap = []
    for k, c in cuts.items():
        cut, true = (np.asarray(a) > 128 for a in (c.image().getchannel("A"), cells[50 + k].alpha()))
        overlap.append((cut & true).sum() / (cut | true).sum())
    assert len(cuts) > 7 and np.mean(overlap) > 0.35
    assert 0.5 < float(re.search("IoU ([.0-9]+)", line)[1]) <= 1
    assert "cutter: " in terminal.getvalue()


def test_a_cut_lies_in_the_box_that_the_encoder_saw_and_stands_on_several_backgrounds():
    whole = SimpleNamespace(image=lambda: Image.new("RGB", (40, 20), "red"))
    cut = train.Cut(whole, bytes([255]), (1, 1), (0.25, 0.0, 0.75, 1.0)).image()
    assert cut.mode == "RGBA" and cut.getchannel("A").getbbox() == (10, 0, 30, 20)
    items, i, j = train.composites(["x", "y"], list("abcdefgh"), 2, train.OWN_PER, 3, in_pose=False)
    assert (
        i.tolist() == [0] * train.OWN_PER + [1] * train.OWN_PER
        and len({*j[: train.OWN_PER].tolist()}) == train.OWN_PER
    )
    pairs = [("xy"[a], "abcdefgh"[b]) for a, b in zip(i, j, strict=True)]
    assert [(c.figure, c.ground) for c in items] == pairs


@pytest.mark.parametrize("iou, last", [(0.6, 0.49), (0.59, 0.49), (1.0, 0.51)])
def test_a_cutter_is_not_trusted_if_it_misses_foregrounds_or_finds_implausible_ones(monkeypatch, iou, last):
    shares, trusted = [0.01, 0.3, 0.3, 0.03, 0.6, last], iou >= 0.6 and last < 0.5
    monkeypatch.setattr(
        train, "learn_cutter", lambda *_: torch.tensor([[0, 0, 3, 3, iou]], dtype=torch.double)
    )
    monkeypatch.setattr(train, "picture_size", lambda picture: (3, 3))
    encoder = SimpleNamespace(embed=lambda pictures, *_: torch.tensor([[shares[p]] * 9 for p in pictures]))
    encoder.precision, encoder.frame, encoder.kept = "", lambda *_: (0, 0, 1, 1), lambda *how: how[-1]()
    cuts, yes, _ = train.cut_out(encoder, list(range(6)), [data.Digit(0)], 0, "photos")
    assert [(k, cut.picture) for k, cut in cuts.items()] == [(k, k) for k in (1, 2, 3, 5)[: 3 + (last < 0.5)]]
    assert yes == trusted
    if not trusted:  # then the target's own foregrounds are not used
        samples = SimpleNamespace(split=torch.zeros(6), keep=lambda _: SimpleNamespace(items=list(range(6))))
        assert train.own_foregrounds(encoder, [data.Digit(0)], [], samples, None, 1.0, 0) is None


@pytest.mark.parametrize("limit", [0.1, -9.0])
def test_own_foregrounds_have_their_weight_in_the_map_if_they_do_not_foretell_their_backgrounds(
    files, tmp_path, monkeypatch, limit
):
    samples, encoder = samples_of(files, "all", str(files / "all/masks")), tiny(files)
    (figures, grounds, cells, i, _), cuts = composed(files), [c.figure for c in samples.cut[:6]]
    changed = dict(instances=16, per_instance=2, own=0.3, FORETOLD=limit)
    changed.update(cut_out=lambda *_: (dict(enumerate(cuts)), True, ""), foretold_share=lambda *_: 0.0)
    for name, value in changed.items():
        monkeypatch.setattr(train, name, value)
    result, last = train.bap(0, encoder, figures, grounds, samples, tmp_path, dict(config={}))
    items, k, _ = train.composites(cuts, grounds, 6, train.OWN_PER, 0, in_pose=False)
    z, v, photos = (encoder.embed(some) for some in (cells, items, samples.items))
    power = last.map.power
    v_root, root = train.features(v, power), train.features(photos[samples.split == 0][:6], power)
    drift = torch.stack([root[n] - v_root[k == n].mean(0) for n in range(6)]).double()
    grids = [(0.7, z, i), (0.3, v, k)] if limit > 0 else [(1.0, z, i)]
    wanted = train.wiener(grids, 1.0, power, drift - drift.mean(0), train.LEAST)
    assert torch.allclose(last.map.W, wanted.W, atol=1e-6) and last.cuts == cuts
    assert result["methods"]["bap_synthetic"]["groups"] and result["invariance"]["own_foretold"] == 0


@pytest.mark.parametrize("own, places", [(0.0, 0), (0.8, 0), (0.0, 1)])
def test_what_foregrounds_foretell_of_their_own_backgrounds_is_found_within_classes(own, places):
    """A photo is its foreground and its own background; this depends on the foreground, or on the class."""
    g, n, D = torch.Generator().manual_seed(0), 300, 12
    f, b, y = torch.randn(n, D, generator=g), torch.randn(n, D, generator=g), torch.arange(n) % 2
    b = own * f.roll(1, 1) + (1 - own**2) ** 0.5 * b + 9 * places * y[:, None]
    i, turn = (
        torch.arange(n).repeat_interleave(train.OWN_PER),
        torch.arange(n * train.OWN_PER) % train.OWN_PER,
    )
    v = f[i] + torch.randn(len(i), D, generator=g)
    drift, share = train.own_backgrounds(f + b, v, i, turn, y, 0)
    anchor = v.reshape(n, train.OWN_PER, D).double().mean(1)
    assert torch.allclose(drift, f + b - anchor - (f + b - anchor).mean(0), atol=1e-6)
    assert share > 0.2 if own else share < 0.1
    fewer = (i != 5) | (turn < 2)  # the other composites of the sixth cannot be read: it is left out
    rest, _ = train.own_backgrounds(f + b, v[fewer], i[fewer], turn[fewer], y, 0)
    assert len(rest) == n - 1
    few = train.own_backgrounds(
        (f + b)[:9], v[: 9 * train.OWN_PER], i[: 9 * train.OWN_PER], turn[: 9 * train.OWN_PER], y[:9], 0
    )
    assert few[1] is None


def test_own_backgrounds_join_the_scatter_that_the_map_takes_off():
    g = torch.Generator().manual_seed(1)
    z, i, d = torch.randn(40, 5, generator=g), torch.arange(40) % 8, torch.randn(30, 5, generator=g).double()
    mu, S_f, S_w = train.scatter(z / z.norm(dim=1, keepdim=True), i)
    S_w = S_w + train.DRIFT * torch.einsum("nd,ne->de", d, d) / 30
    value, vector = torch.linalg.eigh(S_f)
    S_f = vector @ torch.diag(value.clamp(min=0)) @ vector.T
    total = S_f + S_w
    W = torch.linalg.inv(total + 0.5 * total.trace() / 5 * torch.eye(5, dtype=torch.double)) @ S_f
    assert torch.allclose(train.wiener([(1.0, z, i)], 0.5, drift=d).W.double(), W, atol=1e-6)


@pytest.mark.parametrize("fewest, left", [(1, 2), (4, 4)])
def test_directions_in_which_the_foreground_has_little_are_cut_but_the_best_few(monkeypatch, fewest, left):
    monkeypatch.setattr(train, "FEWEST", fewest)
    z, i, _ = skewed(1.0)
    S_f, S_w = (part.numpy() for part in train.scatter(unit(z), i)[1:])
    value, vector = np.linalg.eigh(S_f)
    S_f = vector @ np.diag(value.clip(0)) @ vector.T
    M = S_f + S_w + 0.1 * np.trace(S_f + S_w) / 6 * np.eye(6)
    share, V = np.linalg.eig(np.linalg.solve(M, S_f))  # S_f v = share M v, in any order
    share, V = share.real, V.real
    least = np.sort(share)[-2] - 1e-6
    kept = np.where(share >= min(least, np.sort(share)[-fewest]), share, 0)
    W = train.wiener([(1.0, z, i)], 0.1, least=least).W.double().numpy()
    assert np.allclose(W, V @ np.diag(kept) @ np.linalg.inv(V), atol=1e-5)
    assert np.linalg.matrix_rank(W, 1e-5) == left < np.linalg.matrix_rank(S_f)


def test_an_adversary_with_a_hidden_layer_reads_what_no_line_separates():
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    assert (train.mlp(x[:300], y[:300])(x[300:]) == y[300:]).double().mean() > 0.9
    line = train.fit_probe(x[:300], y[:300], 1e-6).predict(x[300:])
    assert (line == y[300:]).double().mean() < 0.65


def test_training_foregrounds_go_by_their_masks_onto_other_backgrounds(files):
    samples, seen = samples_of(files, masks=str(files / "most/masks")), {}
    samples.cut[1] = None
    _, grounds, *_ = composed(files)
    land, water = (data.layers(files / place, data.Ground, place)[0] for place in ("land", "water"))

    def embed(pictures, label):
        seen[label] = pictures
        return torch.arange(float(len(pictures)))[:, None]

    encoder, masked = SimpleNamespace(embed=embed), [k for k in range(32) if k != 1]
    out = train.recomposed(encoder, samples, grounds, [land, water], 0)
    for name, choices in (("copy_paste", (grounds, grounds)), ("balanced_train", (land, water))):
        assert [c.figure for c in seen[name]] == [samples.cut[k].figure for k in masked for _ in range(2)]
        assert all(c.ground in choices[k % 2] for k, c in enumerate(seen[name]))
        assert out[name][1].tolist() == [int(samples.y[k]) for k in masked for _ in range(2)]
        assert out[name][0][:, 0].tolist() == list(range(62))
    a, b = (np.asarray(v.image()).astype(int) for v in (samples.items[0], seen["copy_paste"][0]))
    inside = np.asarray(Image.open(files / "most/masks/0.png")) == 255
    assert (a[inside] == b[inside]).all() and (a[~inside] != b[~inside]).mean() > 0.9
    assert train.recomposed(encoder, samples, grounds, [], 0).keys() == {"copy_paste"}


# --- BAP on the encoder itself

FINE = "--train=last_blocks --steps=6 --pairs=8 --learning_rate=0.001 --save_every=2"


@pytest.fixture(scope="module")
def fine(files):
    """A run that pre-trains the encoder's last blocks for a few steps."""
    assert bap(files, files / "fine", FINE) == 0
    return files / "fine"


def test_a_pretrained_encoder_comes_with_what_belongs_to_it(files, fine):
    r, old, new = tree(fine), tiny(files), tiny(files, fine / WEIGHTS)
    for name in ("bap", "bap_map", "bap_both"):
        check_method(r["methods"][name])
    assert all(0 <= r["zero_shot"][k]["overall"] <= 1 for k in ("before", "after"))
    assert "<h2>Zero-shot</h2>" in (fine / "report.html").read_text()
    kept, samples = model.load_checkpoint(fine / "ckpt.pt", new), samples_of(files, "all")
    of = {name: model.file_digest(fine / name, "") for name in (WEIGHTS, "ckpt.pt", "map.npz", "report.html")}
    assert r["files"] == of
    assert set(kept["probes"]) == {"erm", "bap", "val_probe_bap"}  # no probe of the encoder as it was
    with complaint("not with the weights"):
        model.load_checkpoint(fine / "ckpt.pt", old)
    z = new.embed(samples.items)
    for name in ("erm", "bap"):
        assert groups_of(kept, name, z, samples) == r["methods"]["bap"]["groups"]


def test_pretraining_of_the_encoder_resumes_to_the_same_numbers(files, fine, tmp_path, ctrl_c, capsys):
    ctrl_c(torch.nn.utils, "clip_grad_norm_", 4, 2)
    assert bap(files, tmp_path, FINE) == 130 and saved(tmp_path / "training.pt")["step"] == 2
    refused(capsys, words(files, tmp_path, f"{FINE} --resume --pairs=9"), "--pairs=8", "same flags")
    assert bap(files, tmp_path, f"{FINE} --resume") == 0
    assert numbers(tmp_path) == numbers(fine) and same(weights(tmp_path), weights(fine))
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(fine))


def test_a_damaged_file_of_an_interrupted_run_is_one_line(files, tmp_path, ctrl_c, capsys):
    ctrl_c(torch.nn.utils, "clip_grad_norm_", 4, 2)
    assert tune(files, tmp_path, "--save_every=2") == 130
    state, again = saved(tmp_path / "training.pt"), tune_words(files, tmp_path, "--save_every=2 --resume")
    odd = dict(state["config"], pairs=torch.zeros(0))
    for part in (
        dict(module={}),
        dict(optimiser=1),
        dict(step="two"),
        dict(rows=3),
        dict(rows=[1]),
        dict(step=99),
        dict(step=-1),
        dict(config=odd),
    ):
        model.save_checkpoint(tmp_path / "training.pt", state | part)
        refused(capsys, again, "training.pt", "run without --resume")
    model.save_checkpoint(tmp_path / "training.pt", state)
    assert run(again) == 0


@pytest.mark.parametrize("part", ["last_blocks", "image"])
def test_composites_come_nearer_to_their_anchors(files, plain, tmp_path, monkeypatch, part):
    tasks, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda e, task, *how: tasks.append(task) or fit(e, task, *how))
    (*_, cells, i, j), encoder, samples = composed(files), tiny(files), samples_of(files, "all")
    how = dict(train=part, steps=10, pairs=16, learning_rate=2e-3, out_dir=str(tmp_path))
    z, config = encoder.embed(cells), {**tree(plain)["config"], **how}
    grids, head = [train.Grid(1.0, z, i, j, cells)], dict(config=config, git=None)
    trained, _, (grid,) = train.pretrain(encoder, grids, samples, 0, tmp_path, head)
    assert torch.equal(grid.z, trained.embed(cells)) and grid.i is i
    mu, a, _ = additive_solve(z, i, model.renumber(j))
    assert float(tasks[0].variance) == pytest.approx(float(a.square().sum(1).mean()), rel=1e-5)
    before, after = ((v - (mu + a)[i]).square().sum() for v in (z, trained.embed(cells)))
    assert after < 0.8 * before
    old, new = encoder.module.state_dict(), trained.module.state_dict()
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    late = "visual.transformer.resblocks.3.", "visual.ln_post", "visual.proj"
    wanted = {k for k in old if k.startswith(late if part == "last_blocks" else "visual.")}
    assert changed <= wanted and len(changed) > 0.8 * len(wanted)


def test_loss_of_the_encoder_by_hand():
    effects, mu = torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([1.0, 1])
    z, y = torch.tensor([[2.0, 1], [1, 1], [0, 2]]), torch.tensor([0, 0, 1])
    task = SimpleNamespace(y=y, anchors=mu + effects, variance=2.0, read=lambda v: v, text_weight=0.1)
    terms = train.anchor_cost(dict(z=z), torch.arange(3), task)
    assert terms["L_anchor"][0] == 1 and terms["L_anchor"][1].item() == pytest.approx((0 + 1 + 1) / 3 / 2)
    p, q = (v.double().softmax(1) for v in (z, torch.tensor([[2.0, 1], [2, 1], [0, 1]])))
    divergence = (q * (q.log() - p.log())).sum(1).mean().item()
    assert terms["L_text"][0] == 0.1 and terms["L_text"][1].item() == pytest.approx(divergence)
    task.read = None
    assert train.anchor_cost(dict(z=z), torch.arange(3), task).keys() == {"L_anchor"}


LATE = dict(tf_efficientnet_lite0="blocks.5. blocks.6. conv_head bn2", resnet10t="layer4.")
LATE.update(test_vit="blocks.4. blocks.5. norm.")
PARTS = dict(all="", image="visual.", projection="visual.proj text_projection")
PARTS.update(text="token pos trans ln_final text_proj")


@pytest.mark.parametrize("name, begins", [*LATE.items(), *PARTS.items()])
def test_train_chooses_the_last_quarter_of_blocks_without_classifier_or_parts_of_both_towers(name, begins):
    part, row, encoder = name, train.METHODS["finetune"], tiny()
    if name in LATE:
        part, row = "last_blocks", train.ANCHORS
        encoder = SimpleNamespace(module=timm.create_model(name, pretrained=False), kind="timm")
    train.choose_parameters(encoder, row, dict(train=part, loss="auto"))
    parameters = dict(encoder.module.named_parameters())
    assert (name in LATE) or parameters.pop("logit_scale").requires_grad
    chosen = {n for n, p in parameters.items() if p.requires_grad}
    assert chosen == {n for n in parameters if n.startswith(tuple(begins.split()) or "")}
    with complaint("--train=last_blocks", "--train=image"):
        train.last_quarter(["conv1.weight", "head.proj.weight"])


# --- other shapes of the problem


@pytest.mark.parametrize("trusted", [True, False])
def test_photos_are_cut_out_for_foregrounds_with_a_sheet_to_look_at(tmp_path, monkeypatch, trusted):
    """What the cutter finds is put in its place here; what it finds of composites others test."""
    for k in range(9):
        photo(tmp_path / f"p/{k}.png", k, k % 2, 0)
    asked = []

    def cut_out(encoder, pictures, cells, s, what):
        asked.append((len(pictures), len(cells)))
        alpha = np.zeros((9, 7, 7), np.uint8)
        alpha[:, 2:6, 1:5] = 255
        alpha[4, 2:6, 6] = 255
        cuts = {
            k: train.Cut(p, a.tobytes(), (7, 7)) for k, (p, a) in enumerate(zip(pictures, alpha, strict=True))
        }
        return cuts, trusted, "cutter: IoU 0.77"

    monkeypatch.setattr(train, "cut_out", cut_out)
    grounds = data.layers(data.ASSETS / "backgrounds", data.Ground, "backgrounds")[0]
    where = f"cut:{tmp_path / 'p'}"
    if trusted:
        figures, notes = train.figures_of(where, grounds, None, False, tmp_path / "o")
        assert (
            len(figures) == 8
            and "1 of these are left out, as the edge" in notes[-2]
            and "IoU 0.77" in notes[-2]
            and "cuts.html" in notes[-1]
        )
        w, h = data.Photo(str(tmp_path / "p/0.png")).image().size
        assert figures[0].image().mode == "RGBA" and figures[0].image().width < w
        assert (tmp_path / "o/cuts.html").read_text().count("<figure>") == 8 and asked == [(9, 640)]
    else:
        with pytest.raises(Complaint, match="--foregrounds: .*trusted.*IoU 0.77.*cuts.html"):
            train.figures_of(where, grounds, None, False, tmp_path / "o")
        assert "edge of what the model sees cuts them: not used" in (tmp_path / "o/cuts.html").read_text()


def test_three_classes_on_three_places_by_the_smallest_convolutional_clip(files, tmp_path, capsys):
    counts = ["6 0 0 0 6 0 0 0 6", "2 2 2 2 2 2 2 2 0", "2 2 2 2 2 2 2 2 2"]
    how = f"--instances=8 --model=tiny-conv --pretrained=none {birds(tmp_path, counts, 3)}"
    assert bap(files, tmp_path / "out", how) == 0 and "cutter: IoU" in capsys.readouterr().out
    groups = [(y, place, 2) for y in range(3) for place in range(3)]
    for m in tree(tmp_path / "out")["methods"].values():
        assert [(g["y"], g["place"], g["n"]) for g in m["groups"]] == groups


def test_a_set_without_places_is_trained_on_and_has_a_worst_class_but_no_worst_group(files, tmp_path, capsys):
    for split, k in np.ndindex(3, 12):
        folder = tmp_path / "set" / data.SPLITS[split] / ("egg", "box")[k % 2]
        photo(folder / f"{k}.png", 100 * split + k, k % 2, 0)
    assert bap(files, tmp_path / "out", f"--own=0 --data=folder:{tmp_path / 'set'}") == 0
    r = tree(tmp_path / "out")
    assert len(r["methods"]["bap"]["groups"]) == 2 and r["invariance"]["place_probe_raw"] is None
    told = capsys.readouterr().out, (tmp_path / "out/report.html").read_text()
    assert all(f"\n{line}" in told[0] for line in ("how additive", "maps ...", "probes, dfr"))
    assert "own foregrounds" not in told[0]
    for text in told:
        assert text.count("no worst group") == 1
        assert "worst class" in text and "worst group" not in text.replace("no worst group", "")
    assert "worst_group" not in json.dumps(r) and 0 <= r["methods"]["bap"]["worst_class"] <= 1


# --- fine-tuning: losses, draws and the pass through the network, by hand


def ravl_by_definition(cos, state, y, tau):
    """RaVL's L_R and L_A as their definition reads, sums of exponentials and loops; cos [B, R, C]."""
    regions = list(np.ndindex(state.shape))
    spurious = [cos[at] / tau for at in regions if state[at] == 1]
    rest = {i: [cos[at] / tau for at in regions if at[0] == i and state[at] == 0] for i in range(len(y))}
    rest = {i: rows for i, rows in rest.items() if rows}

    def sigma(i, c):
        return np.exp(max(v[c] for v in rest[i]))

    labels, L_R, L_A = sorted(set(y)), [], []
    for i in rest:
        R = sum(sigma(i, c) for c in labels) + sum(np.exp(max(v[labels])) for v in spurious)
        A = sigma(i, y[i]) + sum(sigma(j, y[i]) for j in rest if y[j] != y[i])
        A += sum(np.exp(v[y[i]]) for v in spurious)
        L_R.append(-np.log(sigma(i, y[i]) / R))
        L_A.append(-np.log(sigma(i, y[i]) / A))
    return np.mean(L_R), np.mean(L_A)


def ravl_with_shapes_of_the_data(cos, state, y, tau):
    """The same in PyTorch, what takes no part cut out instead of filled; cos [B, R, C]."""
    cos, spurious, ok = cos / tau, cos[state == 1] / tau, (state == 0).any(1)
    present, y = torch.unique(y), y[ok]
    s = cos[ok].masked_fill((state[ok] != 0)[:, :, None], -torch.inf).amax(1)
    own = s.gather(1, y[:, None])
    held = spurious[:, present].amax(1).expand(len(s), -1)
    L_R = torch.cat([s[:, present], held], 1).logsumexp(1) - own[:, 0]
    others = s[:, y].T.masked_fill(y[:, None] == y, -torch.inf)
    L_A = torch.cat([own, others, spurious[:, y].T], 1).logsumexp(1) - own[:, 0]
    return L_R.mean(), L_A.mean()


def test_region_terms_of_two_images_worked_out_on_paper():
    # one free region each, along its own class; one spurious region at 45 degrees between the two; tau = 1
    half, g, state = 0.5**0.5, torch.eye(2), torch.tensor([[0, 1], [0, -1]])
    r = torch.tensor([[[1.0, 0], [half, half]], [[0.0, 1], [1, 0]]])
    terms = [v.item() for v in train.region_terms(r @ g.T, state, torch.tensor([0, 1]), 1.0)]
    # for both: sigma(own) = e, sigma(other) = 1, the spurious region e^0.7071
    assert terms == pytest.approx([np.log((np.e + 1 + np.exp(half)) / np.e)] * 2, abs=1e-6)
    cos = (r @ g.T).requires_grad_()
    L_R, L_A = train.region_terms(cos, torch.ones(2, 2), torch.tensor([0, 1]))
    (L_R + L_A).backward()  # without any free region
    assert L_R.item() == L_A.item() == 0 and cos.grad.eq(0).all()


@pytest.mark.parametrize("case", ["mixed", "none spurious", "some images all spurious", "one class"])
def test_region_terms_are_the_definition(case):
    g = torch.Generator().manual_seed(3)
    r, texts = (unit(torch.randn(*n, 5, generator=g)) for n in ((6, 4), (3,)))
    y, state = torch.tensor([0, 0, 1, 2, 1, 0]), torch.randint(0, 2, (6, 4), generator=g)
    state[:, 0], state[2, 3] = 0, -1
    if case == "none spurious":
        state[state == 1] = 0
    if case == "some images all spurious":
        state[1], state[4] = 1, torch.tensor([1, 1, -1, 1])
    if case == "one class":
        y[:] = 1
    cos = (r @ texts.T).requires_grad_()
    terms = train.region_terms(cos, state, y, 0.07)
    wanted = ravl_by_definition(cos.detach().double().numpy(), state.numpy(), y.tolist(), 0.07)
    assert [v.item() for v in terms] == pytest.approx(wanted, rel=1e-4)
    for term, other in zip(terms, ravl_with_shapes_of_the_data(cos, state, y, 0.07), strict=True):
        grad, expected = (torch.autograd.grad(v, cos, retain_graph=True)[0] for v in (term, other))
        torch.testing.assert_close(term, other)
        torch.testing.assert_close(grad, expected)
        assert grad.any() and not grad[state == -1].any()
    train.region_terms(
        cos.to("meta"), state.to("meta"), y.to("meta")
    )  # would raise if a shape asked for data


Z, T = (unit(gaussian(7, 5, seed=k).float()) for k in (1, 2))
SCALE, BIAS = torch.tensor(9.0), torch.tensor(-3.0)


def test_contrastive_losses_are_open_clip_s_and_the_model_s():
    wanted = [ClipLoss()(Z, T, SCALE), SigLipLoss()(Z, T, SCALE, BIAS)]
    assert torch.allclose(train.infonce(Z, T, SCALE), wanted[0])
    assert torch.allclose(train.sigmoid(Z, T, SCALE, BIAS), wanted[1])
    for loss, bias, k in (("auto", {}, 0), ("auto", dict(bias=BIAS), 1), ("infonce", dict(bias=BIAS), 0)):
        e, task = dict(z=Z, t=T, scale=SCALE, **bias), SimpleNamespace(loss=loss)
        assert torch.allclose(train.contrast_cost(e, None, task)["L_CL"][1], wanted[k])
    z, low, high = torch.eye(2), np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0))  # by hand
    assert train.infonce(z, z, 2.0).item() == pytest.approx(low, rel=1e-6)
    assert train.sigmoid(z, z, 2.0, -1.0).item() == pytest.approx(high + high, rel=1e-6)  # 2 - 1, -(0 - 1)


def test_spurious_aware_loss_contrasts_only_pairs_that_agree_on_the_feature():
    feature, ids = torch.tensor([1, 0, 1, 0, 0, 1, 0]).bool(), torch.arange(6, -1, -1)
    has, task = feature[ids], SimpleNamespace(loss="auto", feature=feature)
    cost = train.spurious_aware_cost(dict(z=Z, t=T, scale=SCALE), ids, task)["L_CL"][1]
    with_it, without = (train.infonce(Z[v], T[v], SCALE) for v in (has, ~has))
    assert torch.allclose(cost, (3 * with_it + 4 * without) / 7)


def test_group_dro_weighs_up_the_group_with_the_larger_loss():
    y, feature = torch.tensor([0, 0, 1, 1]), torch.tensor([False, False, True, False])
    task = SimpleNamespace(y=y, group=2 * y + feature.long(), C=2, q=torch.full((4,), 0.25))
    e = dict(z=torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]]), g=torch.eye(2), scale=torch.tensor(2.0))
    value = train.gdro_cost(e, torch.arange(4), task)["DRO"][1]
    low, high = np.log(1 + np.exp(-2)), np.log(1 + np.exp(2))  # right and wrong; group 1 is not in the batch
    w = np.exp(0.01 * np.array([low, 0, high, low]))
    w /= w.sum()
    assert task.q.tolist() == pytest.approx(w, rel=1e-5)
    assert value.item() == pytest.approx((w * [low, 0, high, low]).sum(), rel=1e-5)
    assert train.erm_cost(e, torch.arange(4), task)["CE"][1].item() == pytest.approx((3 * low + high) / 4)


def counted(method, task, draws=400):
    """How often each image is drawn, as a share [n]; draws are functions of the step alone."""
    draw = train.METHODS[method].draw(task, 50)
    rows = [draw(k) for k in range(draws)]
    assert torch.equal(rows[3], train.METHODS[method].draw(task, 50)(3))
    return torch.bincount(torch.cat(rows), minlength=len(task.y)).double() / (50 * draws)


def test_images_are_drawn_as_the_methods_say():
    y, n = torch.tensor([0] * 60 + [1] * 40), torch.arange(100)
    weight = torch.where(n < 5, 20.0, 1.0)
    group = 2 * y + ((n % 10 == 0) ^ (y == 1)).long()
    task = SimpleNamespace(y=y, group=group, C=2, weight=weight, seed=0)
    assert counted("finetune", task, 4).unique().tolist() == [0.01]  # two epochs, each image once in each
    for method, wanted in (("upsampled", [0.3, 0.3, 0.2, 0.2]), ("vl_gdro", [0.25] * 4)):
        share = counted(method, task)
        assert [float(share[group == g].sum()) for g in range(4)] == pytest.approx(wanted, abs=0.02), method
    share = counted("jtt", task)
    assert (share[:5].mean() / share[5:].mean()).item() == pytest.approx(20, rel=0.15)
    share = counted("subg", task, 16)
    assert [int((share[group == g] > 0).sum()) for g in range(4)] == [4, 4, 4, 4]


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    rates = np.array([train.rate(step, 100, 2.0) for step in range(100)])
    assert rates[:10] == pytest.approx(0.2 * np.arange(1, 11))
    assert rates[10:] == pytest.approx(1 + np.cos(np.pi * np.arange(90) / 90))


def test_one_pass_gives_images_their_regions_and_their_texts(files):
    encoder, samples, ids = tiny(files), samples_of(files), torch.tensor([4, 0, 0, 5])
    pictures, _ = data.load_regions("grid:2", samples.items[:6], encoder.frame)
    z, r = (unit(v) for v in model.region_embeddings(encoder, pictures))
    task, bare = train.pairs_of(samples, "place", 8), dict(checkpointing=False, compile=False)
    task.boxes = torch.stack([p.in_frame() for p in pictures])
    row = train.METHODS["ravl"]
    words = train.Words(encoder, task, row)
    forward = train.forward_of(encoder, task, row, bare, words)
    with torch.no_grad():
        e = forward(torch.stack([encoder.transform(samples.items[k].image()) for k in ids]), ids)
    words.restore()
    wanted = dict(z=z[ids], g=encoder.texts(task.prompts), t=encoder.texts([task.captions[k] for k in ids]))
    wanted.update(cos=r.unflatten(0, (6, 4))[ids] @ wanted["g"].T, scale=encoder.module.logit_scale.exp())
    assert e.keys() == wanted.keys() and all(torch.allclose(e[k], wanted[k], atol=1e-4) for k in e)


def test_images_are_decoded_ahead_and_kept_while_they_fit(files, monkeypatch):
    monkeypatch.setattr(train, "ROOM", 3 * 56 * 56 * 3 - 1)  # two images, in bytes
    encoder, items, decoded = tiny(), samples_of(files).items[:30], []
    pixels = encoder.pixels
    encoder.pixels = lambda item: decoded.append(items.index(item)) or pixels(item)
    feed = train.Feed(items, encoder)
    for ids in ([3, 1, 29], [1, 2, 3, 1]):
        feed.ahead(torch.tensor(ids))
        assert torch.equal(feed.get(), torch.stack([encoder.transform(items[k].image()) for k in ids]))
    assert list(feed.near) == [3, 1] and not feed.far and sorted(decoded) == [1, 2, 3, 29]
    feed.close()


def test_just_train_twice_weighs_what_a_first_quarter_leaves_wrong(files, monkeypatch):
    encoder, task, calls = tiny(files), train.pairs_of(samples_of(files), "class", 8), []
    start = {k: v.clone() for k, v in encoder.module.state_dict().items()}

    def fit(encoder, task, row, config):
        calls.append((row, config["config"]["steps"]))
        encoder.module.visual.proj.data.neg_()

    monkeypatch.setattr(train, "fit", fit)
    weight = train.first_errors(encoder.with_module(encoder.module), task, dict(steps=43))
    assert calls == [(train.METHODS["finetune"], 10)] and same(encoder.module.state_dict(), start)
    wrong = (-unit(encoder.embed(task.items)) @ encoder.texts(task.prompts).T).argmax(1) != task.y
    assert 0 < wrong.sum() < 32 and weight.tolist() == [20.0 if v else 1.0 for v in wrong.tolist()]


def test_captions_name_the_class_or_the_place_too_and_must_be_there(files):
    samples = samples_of(files)
    bare, full = (train.pairs_of(samples, kind, 8).captions for kind in ("class", "place"))
    places = [samples.places[k] for k in samples.place[samples.split == 0].tolist()]
    assert full == [f"{text.rstrip('.')}, {place}" for text, place in zip(bare, places, strict=True)]
    assert len(set(bare)) == 2 and len(set(full)) == 4
    samples.captions[3] = " "
    with complaint("1 of 32 images have no caption", "number 3", "--captions=class"):
        train.pairs_of(samples, "own", 8)
    with complaint("images are of one class"):
        train.pairs_of(samples.keep((samples.split > 0) | (samples.y == 0)), "class", 8)


# --- what discover.py found

CLUSTERS = [dict(id=k, kept=k != 1) for k in (2, 0, 1)]


def written(folder, clusters=CLUSTERS, **changes):
    """A small discovery of three clusters in R^4, as discover.py writes it, with changes; None: without."""
    arrays = dict(medoids=np.eye(3, 4, dtype="float32"), mean=np.zeros(4, "float32"), clipped=np.array(True))
    arrays.update(fingerprint="f", regions="grid:3", region_encoder="pool", data="scenes", paths=["a", "b"])
    arrays.update(image=np.array([0, 0, 1]), box=np.zeros((3, 4), "float32"), label=np.array([2, 0, 1]))
    folder.mkdir(exist_ok=True, parents=True)
    np.savez(folder / "discovery.npz", **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    config = dict(model="tiny", pretrained="", quick_gelu="auto", embeddings="", method="ravl")
    data.write_json(folder / "discovery.json", dict(config=config, clusters=clusters))
    return folder


def test_load_discovery(tmp_path):
    folder = written(tmp_path / "out")
    for path in (folder, folder / "discovery.json", str(folder)):
        v = train.load_discovery(path)
        assert v.kept == [2, 0] and v.clusters == CLUSTERS and v.clipped is True and v.paths == ["a", "b"]
        assert (v.fingerprint, v.regions, v.region_encoder, v.data) == ("f", "grid:3", "pool", "scenes")
        assert torch.equal(v.medoids, torch.eye(3, 4)) and not v.mean.any() and v.box.shape == (3, 4)
        assert v.image.tolist() == [0, 0, 1] and v.label.tolist() == [2, 0, 1]


@pytest.mark.parametrize("name", ["discovery.json", "discovery.npz"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"clusters": [1]}', "cut", "bits", None])
def test_a_damaged_discovery_is_one_line(tmp_path, name, content):
    path = written(tmp_path / "out") / name
    a, b = path.read_bytes()[:60], path.read_bytes()[60:]
    damage = dict(cut=a, bits=a + bytes(v ^ 255 for v in b[:10]) + b[10:])
    path.write_bytes(damage.get(content, content or b""))
    if content is None:
        path.unlink()
    with complaint(path.parent, "not discovery.json and discovery.npz" if content else name):
        train.load_discovery(tmp_path / "out")


@pytest.mark.parametrize("missing", ["medoids", "mean", "label", "paths", "fingerprint", "clipped"])
def test_a_discovery_without_an_array_names_it(tmp_path, missing):
    with complaint("not discovery.json and discovery.npz", missing, "run discover.py again"):
        train.load_discovery(written(tmp_path, **{missing: None}))
    with complaint("cluster without a medoid"):
        train.load_discovery(written(tmp_path, [dict(id=9, kept=True)]))
    path = written(tmp_path) / "discovery.json"
    path.write_text(path.read_text().replace('"quick_gelu"', '"quick"'))
    with complaint("discovery.json", "its config does not say which model"):
        train.load_discovery(tmp_path)


def test_assign_regions_takes_the_nearest_medoid_after_the_mean_is_taken_off():
    medoids, mean = unit(gaussian(5, 8)).float(), 0.5 * unit(gaussian(8, seed=1)).float()
    v, r = SimpleNamespace(medoids=medoids, mean=mean, clipped=False), gaussian(70_000, 8, seed=2).float()
    label = train.assign_regions(9 * r, v)  # more than one block
    assert torch.equal(label, (unit(unit(r) - mean) @ medoids.T).argmax(1)) and label.dtype == torch.long
    assert not torch.equal(label, (unit(r) @ medoids.T).argmax(1))
    assert train.assign_regions(r[:0], v).shape == (0,)
    assert train.assign_regions(r[:1].double(), v).tolist() == label[:1].tolist()
    r, v = torch.tensor([[-1.0, -0.5, -0.1], [-1, -0.5, 0.1]]), dict(medoids=torch.eye(3), mean=0)
    for clipped, wanted in ((True, [0, 2]), (False, [2, 2])):  # the first of the medoids beyond the clip
        assert train.assign_regions(r, SimpleNamespace(**v, clipped=clipped)).tolist() == wanted


def test_clusters_used_are_those_as_frequent_in_each_class_not_the_class_s_own_object():
    def cluster(k, score, *n):
        gaps = {str(c): dict(n_in=a, n_out=b) for c, (a, b) in enumerate(n)}
        return dict(id=k, kept=k < 4, score=score, gaps=gaps)

    others = [cluster(0, 0.78, (47, 51), (31, 38)), cluster(2, 0.70, (48, 50), (41, 28))]  # worth .75, .63
    others += [cluster(1, 0.30, (48, 52), (33, 36)), cluster(4, 9.0, (50, 50), (50, 50))]  # .30; not kept
    object_ = cluster(3, 0.80, (97, 1), (33, 36))  # in nearly every image of a class: .39
    v = SimpleNamespace(kept=[3, 0, 2, 1], clusters=[object_, *others])
    assert train.clusters_used(v) == [0, 2, 3]
    v.clusters[0] = cluster(3, 0.80, (97, 1), (20, 49))
    assert train.clusters_used(v) == [0, 2] and train.clusters_used(v, 1) == [0]
    assert train.clusters_used(v, 9) == [0, 2, 1, 3]
    assert train.clusters_used(SimpleNamespace(kept=[7], clusters=[dict(id=7, kept=True, score=None)])) == [7]


def test_backgrounds_from_a_discovery_are_its_best_regions(files, tmp_path):
    paths = [str(files / f"backgrounds/{k}.png") for k in range(3)]
    clusters = [dict(id=1, kept=True, n=12, regions=[2, 1] * 5), dict(id=0, kept=False, regions=[0])]
    box = np.array([[0, 0, 1, 1], [0.5, 0, 1, 1], [0, 0.5, 1, 1]], "float32")
    where, folder = dict(image=np.array([0, 1, 2]), box=box, paths=paths), tmp_path / "found"
    word = f"discovery:{written(folder, clusters, **where)}"
    grounds, notes = train.grounds_of(word, False)
    assert len(grounds) == 10 and "10 of 12 regions" in notes[0]
    for crop, path, corners in zip(grounds, paths[:0:-1], ((0, 32, 64, 64), (32, 0, 64, 64)), strict=False):
        assert crop.image().tobytes() == Image.open(path).crop(corners).tobytes()
    assert bap(files, tmp_path / "out", f"--backgrounds={word} --own=0") == 0
    assert notes[0] in tree(tmp_path / "out")["notes"]
    written(folder, clusters, **where | dict(paths=[""] * 3))
    with complaint("--backgrounds", "a discovery on photos"):
        train.grounds_of(word, False)
    written(folder, [clusters[1]])
    with complaint("--backgrounds", "a discovery that kept a cluster"):
        train.grounds_of(word, False)


def discovery(files, out, clusters=CLUSTERS[1:2], **changes):
    """A discovery on the biased data in 2 x 2 regions: clusters of place 0, of place 1, of the upper left."""
    encoder, samples = tiny(files), samples_of(files)
    pictures, _ = data.load_regions("grid:2", samples.items[:32], encoder.frame)
    r = unit(model.region_embeddings(encoder, pictures)[1]).unflatten(0, (32, 4))
    mean, place = r.mean((0, 1)), samples.place[:32]
    medoids = torch.stack([r[place == 0, 3].mean(0), r[place == 1, 3].mean(0), r[:, 0].mean(0)])
    made = dict(medoids=unit(medoids - mean).numpy(), mean=mean.numpy(), clipped=np.array(False))
    made.update(fingerprint=encoder.fingerprint, data=samples.name, regions="grid:2")
    return written(out, clusters, **made | changes)


@pytest.fixture(scope="module")
def found(files):
    return discovery(files, files / "found")


def assigned(files, path):
    task = train.pairs_of(samples_of(files), "class", 8)
    return task, train.discovered(samples_of(files), tiny(files), task, str(path), 0)


def test_regions_are_told_apart_by_the_discovery(files, found):
    (task, notes), samples = assigned(files, found), samples_of(files)
    assert task.boxes.shape == (32, 4, 4) and task.state.unique().tolist() == [0, 1]
    assert torch.equal(task.state[:, 3], (samples.place[:32] == 0).long())  # the lower right shows the place
    assert torch.equal(task.feature, (task.state == 1).any(1))
    assert f"{int(task.feature.sum())} of 32 training images have a region" in notes[-1]


EYE, ZEROS = np.eye(64, dtype="float32"), np.zeros((1, 64), "float32")
REFUSALS = [
    ("no cluster was kept", dict(clusters=CLUSTERS[2:])),
    ("which keeps no cluster", dict(clusters=[dict(id=0, kept=True, score=None)])),  # a ranked list
    ("made on elsewhere", dict(data="elsewhere")),
    ("weights are others", dict(fingerprint="0" * 32)),
    ("0 of 32 training images", dict(medoids=np.concatenate([ZEROS, EYE, -EYE]))),
    ("32 have no other", dict(medoids=EYE[:1])),
    ("its regions are masks", dict(regions="masks:{files}/most/masks")),
]


@pytest.mark.parametrize("expected, changes", REFUSALS)
def test_a_discovery_that_cannot_be_used_is_one_line(files, tmp_path, expected, changes):
    regions = changes.get("regions", "grid:2").format(files=files)
    with complaint(f"--discovery={tmp_path}", expected):
        assigned(files, discovery(files, tmp_path, **changes | dict(regions=regions)))


# --- fine-tuning from the command line


@pytest.fixture(scope="module")
def tuned(files, found):
    """The folder of a short run of each method, started once."""

    @functools.cache
    def by(method):
        assert tune(files, files / method, f"--method={method} --discovery={found}") == 0
        return files / method

    return by


def test_fine_tuning_writes_weights_that_load_a_log_and_the_accuracies(files, tuned):
    out = tuned("finetune")
    assert sorted(os.listdir(out)) == ["finetune.json", "log.csv", WEIGHTS]
    r, encoder, (row,) = tree(out, "finetune.json"), tiny(files, out / WEIGHTS), logged(out)
    assert row["step"] == 6 and row["L_CL"] > 0 and row["images_per_s"] > 0 and r["config"]["pairs"] == 8
    assert encoder.fingerprint != tiny().fingerprint
    for name, e in (("before", tiny(files)), ("after", encoder)):
        assert r[name] == train.zero_shot(e, samples_of(files))


def test_only_words_that_occur_are_trained_and_the_whole_vocabulary_comes_back(tuned):
    name, was = "token_embedding.weight", tiny()
    for method in ("finetune", "vl_erm"):  # by captions and prompts, by prompts alone
        now = weights(tuned(method))[name]
        moved = (now != was.module.state_dict()[name]).any(1).nonzero()[:, 0]
        here = {int(moved.min()), int(moved.max())}
        assert now.shape == (49408, 64) and here < set(was.tokenizer()(["a photo of a"]).flatten().tolist())
        assert 4 < len(moved) < 100


def test_finished_fine_tuning_stays(files, tmp_path, capsys):
    assert tune(files, tmp_path, "--resume") == 0 and "begins anew" in capsys.readouterr().out
    before = (tmp_path / WEIGHTS).stat().st_mtime_ns
    assert tune(files, tmp_path, "--resume") == 0 and "finished already" in capsys.readouterr().out
    refused(capsys, tune_words(files, tmp_path, "--resume --seed=9"), "finetune.json", "--seed=0")
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == before


def test_fine_tuning_learns_the_pairs(files, tmp_path):
    assert tune(files, tmp_path, "--steps=20 --learning_rate=0.003") == 0
    assert logged(tmp_path)[-1]["L_CL"] < np.log(8) - 0.3  # at first pairs are told apart by chance


@pytest.mark.parametrize("method, times", [("finetune", 1), ("ravl", 2), ("vl_gdro", 1), ("jtt", 2)])
def test_ctrl_c_and_resume_come_to_the_same_bits(found, tuned, tmp_path, ctrl_c, capsys, method, times):
    files, how = found.parent, f"--method={method} --save_every=2 --discovery={found}"
    jtt = method == "jtt"  # which takes a step before the first
    ctrl_c(torch.nn.utils, "clip_grad_norm_", 5 + jtt, times)
    assert tune(files, tmp_path, how) == 130 and os.listdir(tmp_path) == ["training.pt"]
    state = saved(tmp_path / "training.pt")  # once: its step is kept; twice: it stops at once
    assert state["step"] == (5 if times == 1 else 4) and (state["weight"] > 1).any() == jtt
    refused(capsys, tune_words(files, tmp_path, f"{how} --resume --learning_rate=1"), "--learning_rate=0.001")
    assert tune(files, tmp_path, f"{how} --resume") == 0 and "training.pt" not in os.listdir(tmp_path)
    assert f"goes on behind step {state['step']}" in capsys.readouterr().out
    assert same(weights(tuned(method)), weights(tmp_path))


def test_processes_and_checkpointing_do_not_change_the_step(files, found, tmp_path):
    how, (one, less, two) = f"--method=ravl --steps=2 --discovery={found}", (tmp_path / k for k in "abc")
    assert tune(files, one, how) == 0 and tune(files, less, f"{how} --checkpointing") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN]
    job = subprocess.run([*launch, *tune_words(files, two, how)], capture_output=True, text=True, timeout=200)
    assert job.returncode == 0, job.stderr
    names = ("loss", "L_CL", "L_R", "L_A", "gradient")
    for other in (less, two):
        a, b = ([row[name] for row in logged(out) for name in names] for out in (one, other))
        assert a == pytest.approx(b, rel=1e-3) and same(weights(one), weights(other), 2e-4)
    assert not same(weights(one), tiny().module.state_dict(), 2e-4)


@pytest.mark.parametrize("method", [name for name in train.METHODS if name != "finetune"])
def test_every_mitigation_runs_and_differs_from_plain_fine_tuning(tuned, method):
    assert not same(weights(tuned("finetune")), weights(tuned(method)), 1e-6)


def test_weights_go_back_in_with_their_activation_preprocessing_and_bias(files, tmp_path):
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    vision = dict(image_size=48, layers=2, width=32, patch_size=16, head_width=16)
    data.write_json(tmp_path / "flock-tune.json", dict(embed_dim=24, vision_cfg=vision, text_cfg=text))
    open_clip.add_model_config(tmp_path)
    encoder, path = load_encoder("flock-tune", "none", "on", device="cpu"), tmp_path / "one.safetensors"
    encoder.module.visual.preprocess_cfg.update(mean=(0.1,) * 3, std=(0.5,) * 3)
    data.write(path, model.weights_bytes(encoder.module))
    how = f"--model=flock-tune --pretrained={path} --loss=sigmoid --dtype=bfloat16"
    assert tune(files, tmp_path / "out", how) == 0
    encoder = load_encoder("flock-tune", str(tmp_path / "out/weights.safetensors"), device="cpu")
    normal, bias = encoder.transform.transforms[-1], encoder.module.logit_bias.item()
    assert tuple(normal.mean) == (0.1,) * 3 and tuple(normal.std) == (0.5,) * 3 and 0 < abs(bias + 10) < 1
    assert any(type(m).__name__ == "QuickGELU" for m in encoder.module.modules())


# --- bad input: exit code 2 and one line

BAD = """--instanses=3: did you mean instances; --instances=many: a whole number; --instances=1: [8, 1e6]
--method=magic: bap or finetune; --bap_map=cubic: closed or linear; --l2=inf: (0, inf); --own=2: [0, 1]
--data=scene: scenes, waterbirds; --data=waterbirds:nowhere: no such folder; --model=lite9: lite0
--pretrained=nowhere.pt: no such file; --device=gpu: auto, cpu; --dtype=half: bfloat16; --strength=2: [0, 1]
--foregrounds=nowhere: no such folder; --backgrounds=nowhere: no such folder; --masks=nowhere: no such folder
--seed=-1: [0, 1e15); --steps=0: [1, 1e9]; --wandb=paper: True or False; --lam=0: [1e-9, inf)
--confounder=0: (0, 1]; --pairs=1: [2, 1e6]; --train=all: auto, map, last_blocks, image; --loss=l2: infonce
--text_weight=-1: [0, inf); --place_backgrounds=.,.,.: one folder for each
--out_dir=/dev/null/x: /dev/null; --instances=10000000000000: [8, 1e6]; --per_instance=10001: [2, 10000]
--seeds=10000000000000: [1, 1000]; --instances=1000000 --per_instance=11: at most 10,000,000 composites"""
BAD_TUNE = """--pairs=64: 32, the number of training images; --threads=-1: [0, 1024]; --batch_size=0: auto, or
--seeds=3: each --seed; --captions=long: own or class or place; --train=last_blocks: --method=finetune
--model=lite0: no text tower; --discovery=nowhere: no such file; --learning_rate=0: (0, inf)
--discovery= --method=ravl: this method needs what discover.py found"""


def cases(text):
    return [case.rpartition(": ")[::2] for case in re.split("; |\n", text)]


@pytest.mark.parametrize("flag, expected", cases(BAD))
def test_bad_flag_is_one_line_and_exit_code_2(files, tmp_path, capsys, flag, expected):
    refused(capsys, words(files, tmp_path / "out", flag), flag.partition("=")[0], expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, expected", cases(BAD_TUNE))
def test_bad_flags_of_fine_tuning_are_one_line(files, tmp_path, capsys, flag, expected):
    refused(capsys, tune_words(files, tmp_path / "out", flag), flag.partition("=")[0].strip("-"), expected)
    assert not (tmp_path / "out").exists()


def test_bap_is_not_for_torchrun(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, words(files, tmp_path), "--method", "torchrun")


@pytest.mark.parametrize("argv", [words, tune_words])
def test_a_bad_picture_stops_it_or_is_left_out_and_counted(files, tmp_path, capfd, argv):
    flag, out = birds(tmp_path, ["9 1 0 8", "6 0 3 3", "3 3 3 3"]), tmp_path / "out"
    broken = [tmp_path / f"set/{k}.png" for k in (3, 30, *range(24, 30))]  # the last: class 1 of val
    broken[0].write_bytes(broken[0].read_bytes()[:500])
    refused(capfd, argv(files, out, flag), broken[0], "--skip_bad")  # no line of other threads, too
    assert not out.exists()
    broken[1].write_bytes(b"")
    assert run(argv(files, out, f"{flag} --skip_bad --steps=2")) == 0
    said = capfd.readouterr().out
    assert all(re.search(f"skipped .*{path.name}", said) for path in broken[:2]) and "2 of 42 skipped" in said
    if argv is words:
        assert [g["n"] for g in tree(out)["methods"]["bap"]["groups"]] == [2, 3, 3, 3]
    for path in broken:
        path.write_bytes(b"")
    refused(capfd, argv(files, out, f"{flag} --skip_bad"), "split 1 (val)", "class fox")


def test_a_loss_that_is_not_finite_stops_with_its_term_and_the_last_good_state(files, tmp_path, capsys):
    argv = tune_words(files, tmp_path, "--learning_rate=1e30")
    refused(capsys, argv, "L_CL and gradient not finite", "training.pt", "--learning_rate")
    assert saved(tmp_path / "training.pt")["step"] >= 1 and not (tmp_path / WEIGHTS).exists()


def test_a_batch_of_one_class_is_said_and_does_not_stop(files, tmp_path, capsys):
    assert tune(files, tmp_path, "--pairs=2 --steps=12") == 0
    assert capsys.readouterr().out.count("one class only") == 1


# --- embeddings from elsewhere


def spurious_vectors(path, D=12):
    """Embeddings whose coordinate 0 is the class and 1, thrice as large, the place; and of composites."""
    g, parts = np.random.default_rng(0), []
    for n, share in ((300, 0.95), (200, 0.5), (240, 0.5)):
        y = np.arange(n) % 2
        place = np.where(g.random(n) < share, y, 1 - y)
        z = g.normal(0, 0.3, (n, D))
        z[:, 0] += 2 * y - 1
        z[:, 1] += 3 * (2 * place - 1)
        parts.append((z, y, place))
    z, y, place = (np.concatenate(v) for v in zip(*parts, strict=True))
    split, text = np.repeat([0, 1, 2], [300, 200, 240]), np.zeros((2, D))
    text[:, 0] = -1, 1
    np.savez(path, embedding=z.astype(np.float16), y=y, place=place, split=split, text=text)
    i, j = np.repeat(np.arange(40), 6), g.integers(20, size=240)
    a, b = g.normal(0, 1, (40, D)), np.zeros((20, D))
    a[:, 1], b[:, 1] = 0, g.normal(0, 3, 20)
    composed = a[i] + b[j] + g.normal(0, 0.1, (240, D))
    np.savez(path.with_name("composites.npz"), embedding=composed, foreground=i, background=j)
    return [f"--data=embeddings:{path}", f"--out_dir={path.parent / 'out'}", "--cache_dir="]


def test_embeddings_from_elsewhere_have_the_rows_that_need_no_pictures(tmp_path, capsys):
    argv = spurious_vectors(tmp_path / "e.npz")
    assert run(argv) == 0
    found = tree(tmp_path / "out")
    rows = {"erm", "group_weighted", "dfr", "dfr_val_scaled", "val_probe"}
    assert set(found["methods"]) == rows
    assert found["additivity"] is None and found["invariance"] is None
    assert "no rows of bap" in capsys.readouterr().out
    at, erm = found["methods"], found["methods"]["erm"]
    assert erm["worst_group"] < 0.3 < 0.9 < min(at[m]["worst_group"] for m in ("dfr", "val_probe"))
    arrays = dict(np.load(tmp_path / "e.npz"))
    state, (train, test) = saved(tmp_path / "out/ckpt.pt"), (arrays["split"] == k for k in (0, 2))
    x = unit(torch.from_numpy(arrays["embedding"]).double())
    probe = model.fit_probe(x[train], torch.from_numpy(arrays["y"])[train], 0.8)
    right = probe.predict(x).numpy() == arrays["y"]
    of = [right[test & (arrays["y"] == g // 2) & (arrays["place"] == g % 2)].mean() for g in range(4)]
    assert [g["accuracy"] for g in erm["groups"]] == pytest.approx(of)
    assert torch.equal(state["map"]["W"], torch.eye(12)) and state["config"]["model"].startswith(
        "embeddings:"
    )
    page = (tmp_path / "out/report.html").read_text()
    assert "no composites for BAP" in page and "of composites: none" in page


def test_composites_from_elsewhere_bring_the_maps_back(tmp_path):
    argv = spurious_vectors(tmp_path / "e.npz")
    assert run([*argv, f"--foregrounds=embeddings:{tmp_path / 'composites.npz'}"]) == 0
    found = tree(tmp_path / "out")
    assert {"nullspace", "leace", "bap_closed", "bap", "val_probe_bap"} <= set(found["methods"])
    assert found["additivity"]["flat"]["r2"] > 0.9 and "cos_sum" not in found["additivity"]["flat"]
    worst = {m: found["methods"][m]["worst_group"] for m in ("erm", "bap_closed")}
    assert worst["bap_closed"] > 0.85 > 0.3 > worst["erm"]


@pytest.mark.parametrize("word", ["--method=finetune", "--train=image", "--model=tiny", "--pretrained=x"])
def test_what_needs_a_network_is_refused_for_embeddings(tmp_path, capsys, word):
    refused(capsys, [*spurious_vectors(tmp_path / "e.npz"), word], word.partition("=")[0], "embeddings")


def test_embeddings_of_composites_go_with_embeddings(files, tmp_path, capsys):
    argv = words(files, tmp_path / "out", f"--foregrounds=embeddings:{__file__}")
    refused(capsys, argv, "--foregrounds", "--data=embeddings:FILE")


def test_backgrounds_of_a_discovery_that_is_not_there_name_their_flag(tmp_path):
    with pytest.raises(Complaint, match="--backgrounds=discovery:nowhere: no such file"):
        train.grounds_of("discovery:nowhere", False)


@pytest.mark.parametrize(
    "worst, interval, said",
    [(0.9, (0.5, 0.9), "goes by the foreground"), (0.4, (0.1, 0.5), "better."), (0.1, (-0.3, -0.1), "worse.")]
    + [(0.2, (-0.1, 0.3), "neither")],
)
def test_the_title_claims_no_more_than_the_figures(worst, interval, said):
    erm = dict(worst_group=0.1, groups=[dict(y=0, place=0, accuracy=0.1)])
    bap = dict(worst_group=worst, over_erm=interval, groups=[dict(interval=[worst - 0.1, 1.0])])
    samples = SimpleNamespace(worst="worst_group", places=["a", "b"], classes=["x", "y"])
    samples.group_name = lambda y, place: f"{y} on {place}"
    methods = dict(erm=erm, bap=bap, val_probe=dict(worst_group=0.9))
    title, numbers = train.headline(methods, samples, "bap", "val_probe")
    assert said in title and numbers[1][0] == f"{worst:.0%}"


def test_composites_as_embeddings_of_which_none_share_a_foreground_are_refused(tmp_path, capsys):
    file, argv = tmp_path / "grid.npz", spurious_vectors(tmp_path / "e.npz")
    arrays = dict(embedding=np.eye(9, 32), foreground=np.arange(9), background=np.arange(9) % 2)
    np.savez(file, **arrays)
    refused(capsys, [*argv, f"--foregrounds=embeddings:{file}"], "grid.npz", "several composites of each")


def test_embeddings_as_a_model_of_pictures_are_refused(files, tmp_path, capsys):
    spurious_vectors(tmp_path / "e.npz")
    argv = words(files, tmp_path / "out", f"--model=embeddings:{tmp_path}/e.npz")
    refused(capsys, argv, "--model", "--data=embeddings:FILE")


def test_invariance_does_not_hang_on_how_foregrounds_are_numbered():
    z, i = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) // 4
    samples = SimpleNamespace(place=torch.zeros(40).long(), split=torch.arange(40) % 3)
    a, b = (train.invariance(lambda z: z, z, k, z, z, samples, 1.0, 0) for k in (i, 10**12 + 3 * i))
    assert a == b
