"""train.py from its command line: results, checkpoint and page, bad input, repeatability, interruption."""
import csv
import errno
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import kernels
import model

TRAIN = str(Path(data.__file__).with_name("train.py"))
PLACES = (60, 90, 200), (200, 180, 60), (90, 90, 90)
CLASSES = (30, 200, 60), (220, 40, 40), (240, 240, 240)


def ground(seed, colour, size=64):
    g = np.random.default_rng(seed)
    return Image.fromarray((g.normal(0, 25, (size, size, 3)) + colour + g.normal(0, 15, 3)).clip(0, 255).astype("uint8"))


def figure(seed, y, size=64):
    """An ellipse or a box, by its class: RGBA."""
    g = np.random.default_rng([seed, y])
    image, at = Image.new("RGBA", (size, size)), g.integers(4, 20, 2).tolist()
    colour = tuple((np.array(CLASSES[y]) + g.integers(-12, 12, 3)).clip(0, 255).tolist())
    shape = ImageDraw.Draw(image)
    (shape.ellipse if y % 2 == 0 else shape.rectangle)((*at, at[0] + 34, at[1] + 30), fill=(*colour, 255))
    return image


def birds(root, counts, classes=2, places=2):
    """A folder in the Waterbirds layout, with masks. counts: for each split, images per group."""
    rows = []
    for split, groups in enumerate(counts):
        for g, n in enumerate(groups):
            for _ in range(n):
                k, (y, place) = len(rows), divmod(g, places)
                image, bird = ground(1000 + k, PLACES[place]), figure(k, y)
                image.paste(bird, (0, 0), bird)
                for folder in ("set", "masks"):
                    (root / folder).mkdir(parents=True, exist_ok=True)
                image.save(root / f"set/{k}.png")
                bird.getchannel("A").save(root / f"masks/{k}.png")
                rows.append((k, f"{k}.png", y, split, place, "-"))
    with open(root / "set/metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([data.WATERBIRDS_COLUMNS, *rows])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Biased data at 100 % and at 75 %, cut-outs, backgrounds, and backgrounds of each place."""
    root = tmp_path_factory.mktemp("files")
    birds(root / "all", ((16, 0, 0, 16), (5, 5, 5, 5), (8, 7, 6, 5)))
    birds(root / "most", ((12, 4, 4, 12), (6, 6, 6, 6), (8, 7, 6, 5)))
    for folder in ("cutouts", "photos", "land", "water"):
        (root / folder).mkdir()
    for k in range(12):
        figure(500 + k, k % 3).save(root / f"cutouts/{k}.png")
        ground(700 + k, np.random.default_rng(k).integers(40, 220, 3)).save(root / f"photos/{k}.png")
        for place, folder in enumerate(("land", "water")):
            ground(800 + k, PLACES[place]).save(root / f"{folder}/{k}.png")
    return root


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def words(files, out, *more, which="all"):
    return [f"--data=waterbirds:{files / which / 'set'}", f"--foregrounds={files / 'cutouts'}", f"--backgrounds={files / 'photos'}", "--model=tiny",
            "--instances=24", "--per_instance=4", "--own_per=2", f"--cache_dir={files / 'cache'}", f"--out_dir={out}", *more]


def run(argv):
    """train.py in this process, as from the command line: its exit code."""
    before = sys.argv
    sys.argv = [TRAIN, *argv]
    try:
        runpy.run_path(TRAIN, run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def results(out):
    return json.loads((out / "results.json").read_text())


def numbers(out):
    """All that the seed decides."""
    return {k: v for k, v in results(out).items() if k in ("methods", "additivity", "invariance")}


def process(argv, **more):
    return subprocess.Popen([sys.executable, TRAIN, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


@pytest.fixture(scope="module")
def plain(files):
    """One run at 100 %: its out_dir."""
    assert run(words(files, files / "plain")) == 0
    return files / "plain"


@pytest.fixture(scope="module")
def full(files):
    """One run at 75 % with masks and backgrounds of the places."""
    assert run(words(files, files / "full", f"--masks={files / 'most/masks'}", f"--place_backgrounds={files / 'land'},{files / 'water'}", which="most")) == 0
    return files / "full"


# --- what it writes

def check_method(m, n):
    accuracy = [g["accuracy"] for g in m["groups"]]
    assert m["worst_group"] == min(accuracy) and m["avg_group_mean"] == pytest.approx(sum(accuracy) / len(accuracy))
    assert all(0 <= v <= 1 for v in (*accuracy, m["worst_group"], m["avg_group_mean"], m["avg_train_weighted"]))
    assert [(g["y"], g["place"], g["n"]) for g in m["groups"]] == [(k // 2, k % 2, v) for k, v in enumerate(n)]
    assert all(g["interval"][0] <= g["accuracy"] <= g["interval"][1] and g["accuracy"] * g["n"] == pytest.approx(round(g["accuracy"] * g["n"])) for g in m["groups"])


@pytest.mark.parametrize("which", ["plain", "full"])
def test_results_keep_the_contract(which, request):
    r = results(request.getfixturevalue(which))
    assert {"config", "git", "seconds", "additivity", "invariance", "methods"} <= set(r)
    assert set(r["additivity"]) == {"flat", "sphere"} and all(-1 <= g["cos_sum"] <= 1 for g in r["additivity"].values())
    for part in r["additivity"].values():
        assert {"r2", "r2_heldout", "foreground", "background", "residual"} <= set(part) and 0 < part["r2"] < 1
    assert set(r["invariance"]) == {"place_probe_raw", "place_probe_map", "cos_within", "cos_between"}
    assert all(0 <= r["invariance"][k] <= 1 for k in ("place_probe_raw", "place_probe_map"))
    assert {"erm", "nullspace", "leace", "bap_closed", "bap", "val_probe"} <= set(r["methods"])
    for m in r["methods"].values():
        check_method(m, (8, 7, 6, 5))
        assert len(m["seeds"]) == 1 and {k: m["seeds"][0][k] for k in ("worst_group", "groups")} == {k: m[k] for k in ("worst_group", "groups")}
    assert r["config"]["model"] == "tiny" and r["config"]["instances"] == 24 and r["seconds"]["total"] > 0


def test_train_weighted_average_weighs_groups_as_the_training_set_has_them(plain, full):
    for out, n in ((plain, (16, 0, 0, 16)), (full, (12, 4, 4, 12))):
        for m in results(out)["methods"].values():
            assert m["avg_train_weighted"] == pytest.approx(sum(g["accuracy"] * k for g, k in zip(m["groups"], n)) / 32)


def test_rows_that_need_minority_groups_or_masks_are_there_only_with_them(plain, full):
    needy = {"group_weighted", "copy_paste", "balanced_train"}
    assert not needy & set(results(plain)["methods"]) and needy | {"dfr"} <= set(results(full)["methods"])


def test_notes_say_that_the_training_set_is_fully_correlated(plain, full):
    says = lambda out: any("100 % correlated" in note for note in results(out)["notes"])
    assert says(plain) and not says(full)


@pytest.mark.parametrize("which", ["plain", "full"])
def test_report_is_one_self_contained_page(which, request):
    text = (request.getfixturevalue(which) / "report.html").read_text()
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", text)
    assert len(links) > 12 and all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    worst = results(request.getfixturevalue(which))["methods"]["bap"]["worst_group"]
    assert f"{worst:.3f}" in text and "--instances=24" in text


def test_checkpoint_loads_without_code_and_its_probe_gives_the_numbers(plain):
    state = torch.load(plain / "ckpt.pt", weights_only=True)
    encoder = model.load_encoder("tiny", device="cpu")
    assert model.load_checkpoint(plain / "ckpt.pt", encoder)["fingerprint"] == encoder.fingerprint
    r = results(plain)
    assert state["config"] == r["config"] and state["git"] == r["git"]
    samples = data.load_data(r["config"]["data"])
    z, _ = model.embed(encoder, samples.items, cache="")
    g = model.Map(state["map"]["mu"], state["map"]["W"], state["power"])
    correct = model.Probe(**state["probes"]["bap"]).predict(g(z)) == samples.y
    test = samples.split == 2
    m = model.group_metrics(correct[test], samples.y[test], samples.place[test], samples.counts(0), 2)
    assert [v["accuracy"] for v in m["groups"]] == pytest.approx([v["accuracy"] for v in r["methods"]["bap"]["groups"]], abs=.15)


def test_nothing_but_the_three_files_is_left(plain, full):
    for out in (plain, full):
        assert sorted(os.listdir(out)) == ["ckpt.pt", "report.html", "results.json"]


# --- repeatability, seeds, interruption

def test_same_seed_gives_the_same_numbers_in_another_process_without_a_cache(files, plain, tmp_path):
    job = process(words(files, tmp_path / "out", "--cache_dir=", "--threads=3"))
    _, problem = job.communicate(timeout=100)
    assert job.returncode == 0, problem
    assert numbers(tmp_path / "out") == numbers(plain)


def test_seeds_are_averaged_and_one_interrupted_between_them_resumes_to_the_same(files, plain, tmp_path, monkeypatch, capsys):
    assert run(words(files, tmp_path / "two", "--seeds=2")) == 0
    methods = results(tmp_path / "two")["methods"]
    for name, m in methods.items():
        first, second = m["seeds"]
        assert first == results(plain)["methods"][name]["seeds"][0]
        assert m["worst_group"] == pytest.approx((first["worst_group"] + second["worst_group"]) / 2)
        assert m["groups"][2]["accuracy"] == pytest.approx((first["groups"][2]["accuracy"] + second["groups"][2]["accuracy"]) / 2)
        assert m["spread"] == pytest.approx(np.std([first["worst_group"], second["worst_group"]], ddof=1), abs=1e-6)
    assert any(m["seeds"][0] != m["seeds"][1] for m in methods.values())

    calls, real = [], model.additivity
    def interrupted(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)
    monkeypatch.setattr(model, "additivity", interrupted)
    assert run(words(files, tmp_path / "cut", "--seeds=2")) == 130
    assert "--resume" in capsys.readouterr().err and not (tmp_path / "cut/results.json").exists()
    assert run(words(files, tmp_path / "cut", "--seeds=2", "--resume", "--l2=3")) == 2
    assert "--l2=" in capsys.readouterr().err
    assert run(words(files, tmp_path / "cut", "--seeds=2", "--resume")) == 0 and len(calls) == 3
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "two") and sorted(os.listdir(tmp_path / "cut")) == ["ckpt.pt", "report.html", "results.json"]


def losses(text):
    return [float(v) for v in re.findall(r"step \d+: loss ([\d.]+)", text)]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_trained_maps_learn(files, tmp_path, capsys, kind):
    assert run(words(files, tmp_path, f"--bap_map={kind}", "--steps=60", "--learning_rate=0.003")) == 0
    found = losses(capsys.readouterr().out)
    assert len(found) >= 2 and found[-1] < found[0]
    check_method(results(tmp_path)["methods"]["bap"], (8, 7, 6, 5))


def test_interrupted_by_ctrl_c_in_training_it_resumes_to_the_numbers_of_an_uninterrupted_run(files, tmp_path, capsys):
    flags = "--bap_map=mlp", "--steps=400"
    job = process(words(files, tmp_path / "cut", *flags))
    for line in job.stdout:
        if line.startswith("step 150:"):
            job.send_signal(signal.SIGINT)
            break
    _, problem = job.communicate(timeout=60)
    assert job.returncode == 130 and "Traceback" not in problem and "--resume" in problem
    assert os.listdir(tmp_path / "cut") == ["training.pt"]
    capsys.readouterr()
    assert run(words(files, tmp_path / "other", *flags)) == 0
    whole = losses(capsys.readouterr().out)
    assert run(words(files, tmp_path / "cut", *flags, "--resume")) == 0
    rest = losses(capsys.readouterr().out)
    assert 2 <= len(rest) < len(whole) and rest == whole[-len(rest):] and numbers(tmp_path / "cut") == numbers(tmp_path / "other")


def test_resume_of_training_with_other_flags_is_refused(files, tmp_path, monkeypatch, capsys):
    real, steps = kernels.pairwise_loss, []
    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 110:
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(kernels, "pairwise_loss", interrupted)
    assert run(words(files, tmp_path, "--bap_map=linear", "--steps=150")) == 130
    for other in ("--learning_rate=0.1", "--bap_map=mlp", "--steps=200"):
        capsys.readouterr()
        assert run(words(files, tmp_path, "--bap_map=linear", "--steps=150", other, "--resume")) == 2
        assert "--resume" in capsys.readouterr().err


# --- bad input: exit code 2 and one line

def refused(capsys, argv, *expected):
    assert run(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("train.py: ") and line.count("\n") == 1 and all(str(w) in line for w in expected), line


@pytest.mark.parametrize("word, expected", [
    ("--instanses=3", ("--instanses", "instances")), ("--instances=many", ("--instances", "whole number")), ("--instances=1", ("--instances", "from 8")),
    ("--method=magic", ("--method", "bap")), ("--bap_map=cubic", ("--bap_map", "closed, linear or mlp")), ("--l2=0", ("--l2",)), ("--l2=inf", ("--l2",)),
    ("--difficulty=2", ("--difficulty",)), ("--data=scene", ("--data", "scenes", "waterbirds:DIR")), ("--data=waterbirds:nowhere", ("nowhere", "no such folder")),
    ("--model=lite1", ("--model=lite1", "lite0")), ("--model=timm:resnet5", ("timm:resnet5", "resnet50")), ("--model=ViT-B-32", ("--pretrained",)),
    ("--pretrained=nowhere.pt", ("nowhere.pt",)), ("--device=gpu", ("--device",)), ("--dtype=half", ("--dtype",)), ("--quick_gelu=perhaps", ("--quick_gelu",)),
    ("--foregrounds=nowhere", ("--foregrounds", "no such folder")), ("--masks=nowhere", ("--masks",)), ("--seed=-1", ("--seed",)), ("--own=2", ("--own",)),
    ("--place_backgrounds=a,b,c", ("--place_backgrounds", "3 folders")), ("--masks=nowhere", ("--masks", "no such folder"))])
def test_bad_flag_is_one_line_and_exit_code_2(files, tmp_path, capsys, word, expected):
    refused(capsys, words(files, tmp_path / "out", word), *expected)
    assert not (tmp_path / "out/results.json").exists()


def test_bad_confounder(tmp_path, capsys):
    refused(capsys, ["--confounder=0.3", f"--out_dir={tmp_path}", "--model=tiny"], "--confounder")


def test_in_a_process_of_its_own_stderr_is_that_one_line(files, tmp_path):
    birds(tmp_path, ((8, 0, 0, 8), (2, 2, 2, 2), (2, 2, 2, 2)))
    (tmp_path / "set/3.png").write_bytes((tmp_path / "set/3.png").read_bytes()[:500])
    job = process([*words(files, tmp_path / "out", "--own=0"), f"--data=waterbirds:{tmp_path / 'set'}"])
    _, problem = job.communicate(timeout=100)
    assert job.returncode == 2 and problem.count("\n") == 1 and "set/3.png" in problem and not (tmp_path / "out/results.json").exists()


def test_skip_bad_counts_and_names_what_is_left_out(files, tmp_path, capsys):
    birds(tmp_path, ((8, 0, 0, 8), (3, 3, 3, 3), (3, 3, 3, 3)))
    for k in (3, 30):
        (tmp_path / f"set/{k}.png").write_bytes(b"")
    argv = [*words(files, tmp_path / "out"), f"--data=waterbirds:{tmp_path / 'set'}", "--skip_bad=True"]
    assert run(argv) == 0
    said = capsys.readouterr().out
    assert "set/3.png" in said and "set/30.png" in said and "2 of 40 skipped" in said
    assert sum(g["n"] for g in results(tmp_path / "out")["methods"]["bap"]["groups"]) == 11


def test_skip_bad_that_leaves_a_class_without_images_says_so(files, tmp_path, capsys):
    birds(tmp_path, ((8, 0, 0, 8), (2, 2, 1, 0), (2, 2, 2, 2)))
    (tmp_path / "set/20.png").write_bytes(b"")
    refused(capsys, [*words(files, tmp_path / "out"), f"--data=waterbirds:{tmp_path / 'set'}", "--skip_bad=True"], "split 1 (val)", "class 1")


def test_full_disk_leaves_nothing_half_written(files, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(data.os, "fsync", full)
    refused(capsys, words(files, tmp_path / "out", f"--cache_dir={tmp_path / 'cache'}"), tmp_path, "free some space")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_out_dir_that_is_a_file(files, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    refused(capsys, words(files, tmp_path / "out"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_weights_full_of_nan_name_the_picture(files, tmp_path, capsys):
    state = model.load_encoder("tiny", device="cpu").module.state_dict()
    state["visual.proj"] = state["visual.proj"] * torch.nan
    torch.save(state, tmp_path / "w.pt")
    refused(capsys, words(files, tmp_path / "out", f"--pretrained={tmp_path / 'w.pt'}"), "not finite")


# --- other shapes of the problem

def test_three_classes_on_three_places_with_the_least_of_everything(files, tmp_path):
    birds(tmp_path, ((6, 0, 0, 0, 6, 0, 0, 0, 6), (2,) * 9, (2,) * 9), 3, 3)
    argv = [*words(files, tmp_path / "out", "--instances=8", "--per_instance=2"), f"--data=waterbirds:{tmp_path / 'set'}"]
    assert run(argv) == 0
    for m in results(tmp_path / "out")["methods"].values():
        assert [(g["y"], g["place"], g["n"]) for g in m["groups"]] == [(y, p, 2) for y in range(3) for p in range(3)]


def test_help_prints_the_block_of_defaults(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{k}" in shown for k in ("out_dir", "data", "foregrounds", "model", "seed")) and "def main" not in shown


@pytest.mark.parametrize("kind", ["folder", "counteranimal", "nico"])
def test_other_data_sets_are_trained_on_too(files, tmp_path, kind):
    """Without places; pairs, 100 % correlated by their own splits."""
    names = {"folder": [f"{s}/{c}" for s in ("train", "val", "test") for c in ("box", "egg")],
             "counteranimal": ["10 brambling/common-grass", "10 brambling/counter-sky", "16 bulbul/common-sky", "16 bulbul/counter-grass"],
             "nico": [f"{p}/{c}" for p in ("grass", "water") for c in ("car", "truck")]}[kind]
    for a, name in enumerate(names):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(10):
            image, shape = ground(100 * a + k, PLACES[a % 2]), figure(100 * a + k, a % 2)
            image.paste(shape, (0, 0), shape)
            image.save(tmp_path / "set" / name / f"{k}.png")
    spec = {"folder": "", "counteranimal": ":brambling,bulbul", "nico": ":car,truck"}[kind]
    assert run([*words(files, tmp_path / "out", "--own=0"), f"--data={kind}:{tmp_path / 'set'}{spec}"]) == 0
    r = results(tmp_path / "out")
    groups = r["methods"]["bap"]["groups"]
    assert len(groups) == (2 if kind == "folder" else 4) and (r["invariance"]["place_probe_raw"] is None) == (kind == "folder")
    assert any("100 % correlated" in n for n in r["notes"]) == (kind != "folder")
