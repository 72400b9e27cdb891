"""train.py from its command line: results, checkpoint and page, bad input, repeatability, interruption."""

import csv
import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import kernels
import model
from conftest import run_script

TRAIN = str(Path(data.__file__).with_name("train.py"))
run = functools.partial(run_script, TRAIN)
COLUMNS = "img_id,img_filename,y,split,place,place_filename".split(",")
PLACES = (60, 90, 200), (200, 180, 60), (90, 90, 90)
CLASSES = (30, 200, 60), (220, 40, 40), (240, 240, 240)


def ground(seed, colour, size=64):
    g = np.random.default_rng(seed)
    return Image.fromarray(
        (g.normal(0, 25, (size, size, 3)) + colour + g.normal(0, 15, 3)).clip(0, 255).astype("uint8")
    )


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
        csv.writer(file).writerows([COLUMNS, *rows])


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


def words(files, out, *more, which="all"):
    return [
        f"--data=waterbirds:{files / which / 'set'}",
        f"--foregrounds={files / 'cutouts'}",
        f"--backgrounds={files / 'photos'}",
        "--model=tiny",
        "--instances=24",
        "--per_instance=4",
        f"--cache_dir={files / 'cache'}",
        f"--out_dir={out}",
        *more,
    ]


def results(out):
    return json.loads((out / "results.json").read_text())


def numbers(out):
    """All that the seed decides."""
    return {k: v for k, v in results(out).items() if k in ("methods", "additivity", "invariance")}


def process(argv, **more):
    return subprocess.Popen(
        [sys.executable, TRAIN, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **more,
    )


@pytest.fixture(scope="module")
def plain(files):
    """One run at 100 %: its out_dir."""
    assert run(words(files, files / "plain")) == 0
    return files / "plain"


@pytest.fixture(scope="module")
def full(files):
    """One run at 75 % with masks and backgrounds of the places."""
    assert (
        run(
            words(
                files,
                files / "full",
                f"--masks={files / 'most/masks'}",
                f"--place_backgrounds={files / 'land'},{files / 'water'}",
                which="most",
            )
        )
        == 0
    )
    return files / "full"


# --- what it writes


def check_method(m, n):
    accuracy = [g["accuracy"] for g in m["groups"]]
    assert m["worst_group"] == min(accuracy) and m["avg_group_mean"] == pytest.approx(
        sum(accuracy) / len(accuracy)
    )
    assert all(
        0 <= v <= 1 for v in (*accuracy, m["worst_group"], m["avg_group_mean"], m["avg_train_weighted"])
    )
    assert [(g["y"], g["place"], g["n"]) for g in m["groups"]] == [
        (k // 2, k % 2, v) for k, v in enumerate(n)
    ]
    assert all(
        g["interval"][0] <= g["accuracy"] <= g["interval"][1]
        and g["accuracy"] * g["n"] == pytest.approx(round(g["accuracy"] * g["n"]))
        for g in m["groups"]
    )


@pytest.mark.parametrize("which", ["plain", "full"])
def test_results_keep_the_contract(which, request):
    r = results(request.getfixturevalue(which))
    assert {"config", "git", "seconds", "additivity", "invariance", "methods"} <= set(r)
    assert set(r["additivity"]) == {"flat", "sphere"} and all(
        -1 <= g["cos_sum"] <= 1 for g in r["additivity"].values()
    )
    for part in r["additivity"].values():
        assert {"r2", "r2_heldout", "foreground", "background", "residual"} <= set(part) and 0 < part[
            "r2"
        ] < 1
    assert set(r["invariance"]) == {"place_probe_raw", "place_probe_map", "cos_within", "cos_between"}
    assert all(0 <= r["invariance"][k] <= 1 for k in ("place_probe_raw", "place_probe_map"))
    assert {"erm", "nullspace", "leace", "bap_closed", "bap", "val_probe"} <= set(r["methods"])
    for m in r["methods"].values():
        check_method(m, (8, 7, 6, 5))
        assert len(m["seeds"]) == 1 and {k: m["seeds"][0][k] for k in ("worst_group", "groups")} == {
            k: m[k] for k in ("worst_group", "groups")
        }
    assert r["config"]["model"] == "tiny" and r["config"]["instances"] == 24 and r["seconds"]["total"] > 0


def test_train_weighted_average_weighs_groups_as_the_training_set_has_them(plain, full):
    for out, n in ((plain, (16, 0, 0, 16)), (full, (12, 4, 4, 12))):
        for m in results(out)["methods"].values():
            assert m["avg_train_weighted"] == pytest.approx(
                sum(g["accuracy"] * k for g, k in zip(m["groups"], n, strict=True)) / 32
            )


def test_rows_that_need_minority_groups_or_masks_are_there_only_with_them(plain, full):
    needy = {"group_weighted", "copy_paste", "balanced_train"}
    assert not needy & set(results(plain)["methods"]) and needy | {"dfr"} <= set(results(full)["methods"])


def test_notes_say_that_the_training_set_is_fully_correlated(plain, full):
    def says(out):
        return any("100 % correlated" in note for note in results(out)["notes"])

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
    z = encoder.embed(samples.items)
    g = model.Map(state["map"]["mu"], state["map"]["W"], state["power"])
    correct = model.Probe(**state["probes"]["bap"]).predict(g(z)) == samples.y
    test = samples.split == 2
    m = model.group_metrics(correct[test], samples, test.nonzero()[:, 0])
    assert [v["accuracy"] for v in m["groups"]] == pytest.approx(
        [v["accuracy"] for v in r["methods"]["bap"]["groups"]], abs=0.15
    )


def test_nothing_but_the_three_files_is_left(plain, full):
    for out in (plain, full):
        assert sorted(os.listdir(out)) == ["ckpt.pt", "report.html", "results.json"]


# --- repeatability, seeds, interruption


def test_same_seed_gives_the_same_numbers_in_another_process_without_a_cache(files, plain, tmp_path):
    job = process(words(files, tmp_path / "out", "--cache_dir=", "--threads=3"))
    _, problem = job.communicate(timeout=100)
    assert job.returncode == 0, problem
    assert numbers(tmp_path / "out") == numbers(plain)


def test_seeds_are_averaged_and_one_interrupted_between_them_resumes_to_the_same(
    files, plain, tmp_path, monkeypatch, capsys
):
    assert run(words(files, tmp_path / "two", "--seeds=2")) == 0
    methods = results(tmp_path / "two")["methods"]
    for name, m in methods.items():
        first, second = m["seeds"]
        assert first == results(plain)["methods"][name]["seeds"][0]
        assert m["worst_group"] == pytest.approx((first["worst_group"] + second["worst_group"]) / 2)
        assert m["groups"][2]["accuracy"] == pytest.approx(
            (first["groups"][2]["accuracy"] + second["groups"][2]["accuracy"]) / 2
        )
        assert m["spread"] == pytest.approx(
            np.std([first["worst_group"], second["worst_group"]], ddof=1), abs=1e-6
        )
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
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "two") and sorted(
        os.listdir(tmp_path / "cut")
    ) == ["ckpt.pt", "report.html", "results.json"]


def test_what_one_seed_lacks_is_left_out_of_the_means(script):
    def one(worst, r2):
        methods = {name: dict(worst_group=w) for name, w in worst.items()}
        return dict(methods=methods, additivity=dict(flat=dict(r2=r2)), invariance={}, zero_shot=None)

    notes = []
    mean = script.average([one(dict(erm=0.2, dfr=0.8), 0.5), one(dict(erm=0.4), None)], notes)
    assert list(mean["methods"]) == ["erm"] and mean["methods"]["erm"]["worst_group"] == pytest.approx(0.3)
    assert mean["additivity"]["flat"]["r2"] is None and "1 of 2 seeds" in notes[0]


def test_a_seed_is_the_same_alone_and_among_others(files, tmp_path):
    drawn = ("--own=0",)
    assert (
        run(words(files, tmp_path / "alone", *drawn, "--seed=1")) == 0
        and run(words(files, tmp_path / "both", *drawn, "--seeds=2")) == 0
    )
    for name, m in results(tmp_path / "both")["methods"].items():
        assert m["seeds"][1] == results(tmp_path / "alone")["methods"][name]["seeds"][0]


def losses(text):
    return [float(v) for v in re.findall(r"step \d+: loss ([\d.]+)", text)]


def test_a_trained_map_learns(files, tmp_path, capsys):
    assert run(words(files, tmp_path, "--bap_map=linear", "--steps=60", "--learning_rate=0.003")) == 0
    found = losses(capsys.readouterr().out)
    assert len(found) >= 2 and found[-1] < found[0]
    check_method(results(tmp_path)["methods"]["bap"], (8, 7, 6, 5))


# --- BAP on the encoder itself


def fine(files, out, part, *more):
    return words(
        files,
        out,
        f"--train={part}",
        "--steps=40",
        "--pairs=16",
        "--learning_rate=0.001",
        *more,
    )


@pytest.mark.parametrize("part", ["last_blocks", "image"])
def test_encoder_is_pretrained_toward_the_anchors(files, tmp_path, capsys, part):
    assert run(fine(files, tmp_path, part)) == 0
    said = capsys.readouterr().out
    found = [float(v) for v in re.findall(r"L_anchor ([\d.]+)", said)]
    assert len(found) == 2 and found[-1] < 0.9 * found[0] and "zero-shot" in said
    tree = results(tmp_path)
    for name in ("bap", "bap_map", "bap_both"):
        check_method(tree["methods"][name], (8, 7, 6, 5))
    assert all(0 <= tree["zero_shot"][k]["overall"] <= 1 for k in ("before", "after"))
    assert "<h2>Zero-shot</h2>" in (tmp_path / "report.html").read_text()
    first, last = (
        model.load_encoder("tiny"),
        model.load_encoder("tiny", str(tmp_path / "weights.safetensors")),
    )
    kept = model.load_checkpoint(tmp_path / "ckpt.pt", last)
    assert kept["config"]["train"] == part and set(kept["probes"]) == {
        "erm",
        "bap",
        "val_probe_bap",
    }  # no probe of the encoder as it was
    with pytest.raises(data.Complaint, match="not with the weights"):
        model.load_checkpoint(tmp_path / "ckpt.pt", first)
    a, b = first.module.state_dict(), last.module.state_dict()
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    late = {
        k for k in a if k.startswith(("visual.transformer.resblocks.3.", "visual.ln_post", "visual.proj"))
    }
    assert changed <= (late if part == "last_blocks" else {k for k in a if k.startswith("visual.")}) and len(
        changed
    ) > 0.8 * len(late)
    samples = data.load_data(f"waterbirds:{files / 'all/set'}")
    z, test = last.embed(samples.items), samples.split == 2
    for probe, name, g in (("erm", "bap", model.unit), ("bap", "bap", model.load_map(kept))):
        right = model.Probe(**kept["probes"][probe]).predict(g(z)) == samples.y
        found = model.group_metrics(right[test], samples, test.nonzero()[:, 0])["groups"]
        groups = tree["methods"][name]["groups"]
        assert [v["accuracy"] for v in found] == [v["accuracy"] for v in groups]


def test_pretraining_of_the_encoder_resumes_to_the_same_numbers(files, tmp_path, monkeypatch):
    assert run(fine(files, tmp_path / "whole", "last_blocks", "--save_every=10")) == 0
    real, count = model.embeddings, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 25:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(
        model, "embeddings", interrupted
    )  # train.py's own name: the steps, not the cached embeddings
    assert run(
        fine(files, tmp_path / "cut", "last_blocks", "--save_every=10")
    ) == 130 and "training.pt" in os.listdir(tmp_path / "cut")
    assert torch.load(tmp_path / "cut/training.pt", weights_only=True)["step"] in (10, 20)
    monkeypatch.undo()
    assert (
        run(
            fine(
                files, tmp_path / "cut", "last_blocks", "--save_every=10", "--resume", "--learning_rate=0.01"
            )
        )
        == 2
    )
    assert run(fine(files, tmp_path / "cut", "last_blocks", "--save_every=10", "--resume")) == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole") and "training.pt" not in os.listdir(
        tmp_path / "cut"
    )


def test_loss_of_the_encoder_by_hand(script):
    anchors, mu = torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([1.0, 1])
    z, y = torch.tensor([[2.0, 1], [1, 1], [0, 2]]), torch.tensor([0, 0, 1])
    task = SimpleNamespace(y=y, mu=mu, anchors=anchors, read=lambda v: v, text_weight=0.1)
    terms = script.anchor_cost(dict(z=z), torch.arange(3), task)
    assert terms["L_anchor"][0] == 1 and terms["L_anchor"][1].item() == pytest.approx((0 + 1 + 1) / 3)
    want = []
    for said, wanted in (([2, 1], [2, 1]), ([1, 1], [2, 1]), ([0, 2], [0, 1])):
        p, q = softmax(said), softmax(wanted)
        want.append((q * (np.log(q) - np.log(p))).sum())
    assert terms["L_text"][0] == 0.1 and terms["L_text"][1].item() == pytest.approx(sum(want) / 3)
    task.read = None
    assert set(script.anchor_cost(dict(z=z), torch.arange(3), task)) == {"L_anchor"}


def softmax(v):
    e = np.exp(v)
    return e / e.sum()


@pytest.mark.parametrize(
    "name, last, heads",
    [
        ("tf_efficientnet_lite0", ("blocks.5.", "blocks.6.", "conv_head", "bn2"), "classifier"),
        ("resnet10t", ("layer4.",), "fc"),
        ("test_vit", ("blocks.", "norm."), "head"),
    ],
)
def test_last_blocks_are_the_last_quarter_and_no_classifier(script, name, last, heads):
    import timm

    module = timm.create_model(name, pretrained=False)
    config = dict(train="last_blocks", loss="auto")
    script.choose_parameters(SimpleNamespace(module=module, kind="timm"), script.ANCHORS, config)
    chosen = {n for n, p in module.named_parameters() if p.requires_grad}
    assert chosen and all(n.startswith(last) for n in chosen) and not any(n.startswith(heads) for n in chosen)
    assert {n.split(".")[0] for n in chosen} == {n.split(".")[0] for n in last} and len(chosen) < len(
        list(module.parameters())
    )


def test_last_blocks_of_a_network_without_any_is_one_line(files, tmp_path, capsys):
    refused(
        capsys,
        fine(files, tmp_path, "last_blocks", "--model=tiny-conv", "--pretrained=none", "--own=0"),
        "--train=last_blocks",
        "--train=image",
    )


def test_the_smallest_convolutional_clip_cuts_out_foregrounds_too(files, tmp_path, capsys):
    assert run(words(files, tmp_path, "--model=tiny-conv", "--pretrained=none")) == 0
    assert "cutter: IoU" in capsys.readouterr().out


def test_what_another_run_left_is_not_in_the_way(files, tmp_path, monkeypatch):
    for name in ("training.pt", "partial.pt"):
        model.save_checkpoint(tmp_path / name, dict(config={}, fingerprint="other"))

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "additivity", interrupted)
    assert (
        run(words(files, tmp_path, "--resume")) == 2
        and run(words(files, tmp_path)) == 130
        and os.listdir(tmp_path) == []
    )


def test_bap_is_not_for_torchrun(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, words(files, tmp_path), "--method", "torchrun")


# --- bad input: exit code 2 and one line


def refused(capsys, argv, *expected):
    assert run(argv) == 2
    line = capsys.readouterr().err
    assert (
        line.startswith("train.py: ") and line.count("\n") == 1 and all(str(w) in line for w in expected)
    ), line


@pytest.mark.parametrize(
    "word, expected",
    [
        ("--instanses=3", ("--instanses", "instances")),
        ("--instances=many", ("--instances", "whole number")),
        ("--instances=1", ("--instances", "[8, inf)")),
        ("--method=magic", ("--method", "bap")),
        ("--bap_map=cubic", ("--bap_map", "closed or linear")),
        ("--l2=0", ("--l2",)),
        ("--l2=inf", ("--l2",)),
        ("--strength=2", ("--strength",)),
        ("--data=scene", ("--data", "scenes", "waterbirds")),
        ("--data=waterbirds:nowhere", ("nowhere", "no such folder")),
        ("--model=lite1", ("--model=lite1", "lite0")),
        ("--model=timm:resnet5", ("timm:resnet5", "resnet50")),
        ("--model=ViT-B-32", ("--pretrained",)),
        ("--pretrained=nowhere.pt", ("nowhere.pt",)),
        ("--device=gpu", ("--device",)),
        ("--dtype=half", ("--dtype",)),
        ("--quick_gelu=perhaps", ("--quick_gelu",)),
        ("--foregrounds=nowhere", ("--foregrounds", "no such folder")),
        ("--masks=nowhere", ("--masks",)),
        ("--seed=-1", ("--seed",)),
        ("--own=2", ("--own",)),
        ("--wandb=paper", ("--wandb", "True or False")),
        ("--lam=0", ("--lam", "(0, inf)")),
        ("--train=all", ("--train", "last_blocks")),
        ("--text_weight=-1", ("--text_weight",)),
        ("--pairs=1", ("--pairs",)),
        ("--place_backgrounds=a,b,c", ("--place_backgrounds", "one folder for each")),
        ("--masks=nowhere", ("--masks", "no such folder")),
        (f"--out_dir={__file__}/out", ("--out_dir", "may be written")),
    ],
)
def test_bad_flag_is_one_line_and_exit_code_2(files, tmp_path, capsys, word, expected):
    refused(capsys, words(files, tmp_path / "out", word), *expected)
    assert not (tmp_path / "out/results.json").exists()


def test_bad_confounder(tmp_path, capsys):
    refused(capsys, ["--confounder=0", f"--out_dir={tmp_path}", "--model=tiny"], "--confounder")


def test_in_a_process_of_its_own_stderr_is_that_one_line(files, tmp_path):
    birds(tmp_path, ((8, 0, 0, 8), (2, 2, 2, 2), (2, 2, 2, 2)))
    (tmp_path / "set/3.png").write_bytes((tmp_path / "set/3.png").read_bytes()[:500])
    job = process([*words(files, tmp_path / "out", "--own=0"), f"--data=waterbirds:{tmp_path / 'set'}"])
    _, problem = job.communicate(timeout=100)
    assert (
        job.returncode == 2
        and problem.count("\n") == 1
        and "set/3.png" in problem
        and not (tmp_path / "out/results.json").exists()
    )


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
    refused(
        capsys,
        [*words(files, tmp_path / "out"), f"--data=waterbirds:{tmp_path / 'set'}", "--skip_bad=True"],
        "split 1 (val)",
        "class 1",
    )


def test_full_disk_leaves_nothing_half_written(files, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", full)
    refused(
        capsys,
        words(files, tmp_path / "out", f"--cache_dir={tmp_path / 'cache'}"),
        tmp_path,
        "free some space",
    )
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
    argv = [
        *words(files, tmp_path / "out", "--instances=8", "--per_instance=2"),
        f"--data=waterbirds:{tmp_path / 'set'}",
    ]
    assert run(argv) == 0
    for m in results(tmp_path / "out")["methods"].values():
        assert [(g["y"], g["place"], g["n"]) for g in m["groups"]] == [
            (y, p, 2) for y in range(3) for p in range(3)
        ]


def test_help_prints_the_block_of_defaults(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert (
        all(f"\n{k}" in shown for k in ("out_dir", "data", "foregrounds", "model", "seed"))
        and "def main" not in shown
    )


@pytest.mark.parametrize("kind", ["folder", "counteranimal", "nico"])
def test_other_data_sets_are_trained_on_too(files, tmp_path, kind):
    """Without places; pairs, 100 % correlated by their own splits."""
    names = {
        "folder": [f"{s}/{c}" for s in ("train", "val", "test") for c in ("box", "egg")],
        "counteranimal": [
            "10 brambling/common-grass",
            "10 brambling/counter-sky",
            "16 bulbul/common-sky",
            "16 bulbul/counter-grass",
        ],
        "nico": [f"{p}/{c}" for p in ("grass", "water") for c in ("car", "truck")],
    }[kind]
    for a, name in enumerate(names):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(10):
            image, shape = ground(100 * a + k, PLACES[a % 2]), figure(100 * a + k, a % 2)
            image.paste(shape, (0, 0), shape)
            image.save(tmp_path / "set" / name / f"{k}.png")
    pair = {"folder": "", "counteranimal": "brambling,bulbul", "nico": "car,truck"}[kind]
    more = "--own=0", f"--data={kind}:{tmp_path / 'set'}", f"--classes={pair}"
    assert run(words(files, tmp_path / "out", *more)) == 0
    r = results(tmp_path / "out")
    groups = r["methods"]["bap"]["groups"]
    assert len(groups) == (2 if kind == "folder" else 4) and (r["invariance"]["place_probe_raw"] is None) == (
        kind == "folder"
    )
    assert any("100 % correlated" in n for n in r["notes"]) == (kind != "folder")


# --- fine-tuning: losses by hand


@pytest.fixture(scope="module")
def script():
    """train.py as a module."""
    import train

    return train


def by_hand(cos, state, y, tau):
    """RaVL's L_R and L_A as their definition reads, sums of exponentials and loops; cos [B][R][C]."""
    B = range(len(y))
    rest = [[cos[i][r] for r in range(len(state[i])) if state[i][r] == 0] for i in B]
    spurious = [cos[i][r] for i in B for r in range(len(state[i])) if state[i][r] == 1]

    def sigma(i, c):
        return np.exp(max(v[c] for v in rest[i]) / tau)

    labels = sorted({int(v) for v in y})
    L_R, L_A = [], []
    for i in B:
        if not rest[i]:
            continue
        down_R = sum(sigma(i, c) for c in labels) + sum(
            np.exp(max(v[c] for c in labels) / tau) for v in spurious
        )
        down_A = (
            sigma(i, y[i])
            + sum(sigma(j, y[i]) for j in B if y[j] != y[i] and rest[j])
            + sum(np.exp(v[y[i]] / tau) for v in spurious)
        )
        L_R.append(-np.log(sigma(i, y[i]) / down_R))
        L_A.append(-np.log(sigma(i, y[i]) / down_A))
    return np.mean(L_R), np.mean(L_A)


def test_region_terms_of_two_images_worked_out_on_paper(script):
    # one free region each, along its own class; one spurious region at 45 degrees between the two; tau = 1
    r, g = torch.tensor([[[1.0, 0], [0.5**0.5, 0.5**0.5]], [[0.0, 1], [1, 0]]]), torch.eye(2)
    L_R, L_A = script.region_terms(r, torch.tensor([[0, 1], [0, -1]]), g, torch.tensor([0, 1]), 1.0)
    # for both: sigma(own) = e, sigma(other) = 1, the spurious region e^0.7071: log((e + 1 + e^0.7071) / e)
    assert L_R.item() == pytest.approx(
        np.log((np.e + 1 + np.exp(0.5**0.5)) / np.e), abs=1e-6
    ) and L_A.item() == pytest.approx(L_R.item(), abs=1e-6)


@pytest.mark.parametrize("case", ["mixed", "none spurious", "some images all spurious", "one class"])
def test_region_terms_are_the_definition(script, case):
    g = torch.Generator().manual_seed(3)
    r, texts = (
        torch.nn.functional.normalize(torch.randn(*n, 5, generator=g), dim=-1) for n in ((6, 4), (3,))
    )
    y, state = torch.tensor([0, 0, 1, 2, 1, 0]), torch.randint(0, 2, (6, 4), generator=g)
    state[:, 0], state[2, 3] = 0, -1
    if case == "none spurious":
        state[state == 1] = 0
    if case == "some images all spurious":
        state[1], state[4] = 1, torch.tensor([1, 1, -1, 1])
    if case == "one class":
        y[:] = 1
    r.requires_grad_()
    L_R, L_A = script.region_terms(r, state, texts, y, 0.07)
    expected = by_hand((r @ texts.T).detach().double().numpy(), state.tolist(), y.tolist(), 0.07)
    assert (L_R.item(), L_A.item()) == pytest.approx(expected, rel=1e-4)
    (L_R + L_A).backward()
    assert r.grad.isfinite().all() and not r.grad[state == -1].any()


def test_region_terms_without_any_free_region_are_zero_and_harmless(script):
    r = torch.nn.functional.normalize(torch.randn(3, 2, 4), dim=-1).requires_grad_()
    L_R, L_A = script.region_terms(r, torch.ones(3, 2), torch.eye(4)[:2], torch.tensor([0, 1, 0]))
    (L_R + L_A).backward()
    assert L_R.item() == L_A.item() == 0 and r.grad.eq(0).all()


def test_gradient_of_region_terms_reaches_the_map_through_region_pool_and_draws_the_free_region_to_its_label(
    script,
):
    torch.manual_seed(0)
    m, texts = torch.randn(2, 4, 4, 3, requires_grad=True), torch.eye(3)[:2]
    boxes, state = torch.tensor([[[0, 0, 2, 2], [2, 0, 4, 2.0]]] * 2), torch.tensor([[0, 1], [0, 1]])

    def pooled(m):
        return torch.nn.functional.normalize(
            kernels.region_pool(m, boxes.flatten(0, 1), torch.tensor([0, 0, 1, 1])), dim=-1
        ).unflatten(0, (2, 2))

    def value(m):
        return sum(script.region_terms(pooled(m), state, texts, torch.tensor([0, 1]), 0.5))

    value(m).backward()
    assert m.grad[:, :2].abs().sum() > 0 and not m.grad[:, 2:].any()  # nothing lies under the lower half
    with torch.no_grad():
        before, after = pooled(m), pooled(m - 0.5 * m.grad)
    assert after[0, 0, 0] > before[0, 0, 0] and value(m - 0.5 * m.grad) < value(m)
    assert after[0, 1, :2].max() < before[0, 1, :2].max()  # the spurious region is held off the labels


def test_contrastive_and_sigmoid_losses_are_open_clip_s(script):
    from open_clip.loss import ClipLoss, SigLipLoss

    z, t = (
        torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(k)), dim=1)
        for k in (1, 2)
    )
    assert torch.allclose(script.infonce(z, t, torch.tensor(9.0)), ClipLoss()(z, t, torch.tensor(9.0)))
    assert torch.allclose(
        script.sigmoid(z, t, torch.tensor(9.0), torch.tensor(-3.0)),
        SigLipLoss()(z, t, torch.tensor(9.0), torch.tensor(-3.0)),
    )


def test_spurious_aware_loss_contrasts_only_pairs_that_agree_on_the_feature(script):
    z, t = (
        torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(k)), dim=1)
        for k in (1, 2)
    )
    f = torch.tensor([True, False, True, False, False, True])
    inside = [script.infonce(z[f == v], t[f == v], torch.tensor(4.0)) for v in (True, False)]
    assert torch.allclose(
        script.infonce(z, t, torch.tensor(4.0), f[:, None] == f), (inside[0] + inside[1]) / 2
    )


def test_group_dro_weighs_up_the_group_with_the_larger_loss(script):
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
    feature = torch.tensor([False, False, True, False])
    task = SimpleNamespace(y=torch.tensor([0, 0, 1, 1]), feature=feature, C=2, q=torch.full((4,), 0.25))
    e = dict(z=z, g=torch.eye(2), scale=torch.tensor(2.0))
    value = script.gdro_cost(e, torch.arange(4), task)["DRO"][1]
    low, high = np.log(1 + np.exp(-2)), np.log(1 + np.exp(2))  # right and wrong; group 1 is not in the batch
    w = 0.25 * np.exp(0.01 * np.array([low, 0, high, low]))
    w /= w.sum()
    assert task.q.tolist() == pytest.approx(w, rel=1e-5)
    assert value.item() == pytest.approx((w * [low, 0, high, low]).sum(), rel=1e-5)


def counted(script, method, task, draws=400):
    """How often each image is drawn, as a share [n]."""
    draw = script.METHODS[method].draw(task, 50)
    assert torch.equal(draw(3), script.METHODS[method].draw(task, 50)(3))
    rows = torch.cat([draw(k) for k in range(draws)])
    return torch.bincount(rows, minlength=len(task.y)).double() / (50 * draws)


def test_images_are_drawn_as_the_methods_say(script):
    y, n = torch.tensor([0] * 60 + [1] * 40), torch.arange(100)
    weight = torch.where(n < 5, 20.0, 1.0)
    task = SimpleNamespace(y=y, feature=(n % 10 == 0) ^ (y == 1), C=2, weight=weight, seed=0)
    share = counted(script, "finetune", task, 4)
    assert share.min() == share.max()  # two epochs, each image once in each
    group = 2 * y + task.feature.long()
    for method, wanted in (("upsampled", [0.3, 0.3, 0.2, 0.2]), ("vl_gdro", [0.25] * 4)):
        share = counted(script, method, task)
        per = torch.stack([share[group == g].sum() for g in range(4)])
        assert torch.allclose(per, torch.tensor(wanted).double(), atol=0.02), method
    share = counted(script, "jtt", task)
    assert (share[:5].mean() / share[5:].mean()).item() == pytest.approx(20, rel=0.15)
    share = counted(script, "subg", task, 16)
    assert [int((share[group == g] > 0).sum()) for g in range(4)] == [4, 4, 4, 4]


def test_clusters_used_are_those_as_frequent_in_each_class_not_the_class_s_own_object(script):
    def gap(*n):
        return {str(k): dict(n_in=a, n_out=b) for k, (a, b) in enumerate(n)}

    def cluster(i, score, kept, *n):
        return dict(id=i, kept=kept, score=score, gaps=gap(*n))

    found = SimpleNamespace(
        kept=[3, 0, 2, 1],
        clusters=[
            cluster(3, 0.80, True, (97, 1), (33, 36)),  # nearly every image of a class: its object; worth .39
            cluster(0, 0.78, True, (47, 51), (31, 38)),  # .75
            cluster(2, 0.70, True, (48, 50), (41, 28)),  # .63
            cluster(1, 0.30, True, (48, 52), (33, 36)),  # even, but weak: .30
            cluster(4, 9.0, False, (50, 50), (50, 50)),
        ],
    )
    assert script.clusters_used(found) == [0, 2, 3]
    found.clusters[0]["gaps"] = gap((97, 1), (20, 49))
    assert script.clusters_used(found) == [0, 2]
    assert script.clusters_used(found, 1) == [0] and script.clusters_used(found, 9) == [0, 2, 1, 3]
    assert script.clusters_used(
        SimpleNamespace(kept=[7], clusters=[dict(id=7, kept=True, score=None, gaps={})])
    ) == [7]


# --- fine-tuning from the command line


def tune_words(files, out, *more):
    return [
        f"--data=waterbirds:{files / 'most/set'}",
        "--model=tiny",
        "--captions=class",
        "--pairs=8",
        "--steps=6",
        "--learning_rate=0.001",
        f"--cache_dir={files / 'cache'}",
        f"--out_dir={out}",
        "--method=finetune",
        *more,
    ]


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "weights.safetensors")


def close(a, b, atol):
    return all(torch.allclose(a[k], b[k], atol=atol) for k in a)


def discovery(files, out, kept=True, source=None, fingerprint=None):
    """A discovery of 2 x 2 regions; its clusters: of place 0 (the feature), of place 1, upper left ones."""
    encoder, samples = (
        model.load_encoder("tiny", device="cpu"),
        data.load_data(f"waterbirds:{files / 'most/set'}"),
    )
    pictures, _ = data.load_regions("grid:2", samples.items[:32], encoder.frame)
    r = model.unit(model.region_embeddings(encoder, pictures)[1]).unflatten(0, (32, 4))
    mean, place = r.mean((0, 1)), samples.place[:32]
    medoids = torch.stack([r[place == 0, 3].mean(0), r[place == 1, 3].mean(0), r[:, 0].mean(0)])
    arrays = dict(
        medoids=model.unit(medoids - mean).numpy(), mean=mean.numpy(), kept=np.array([0]), regions="grid:2"
    )
    arrays.update(
        region_encoder="pool", data=source or samples.name, paths=["-"] * 8, image=np.arange(32) // 4
    )
    arrays.update(box=np.zeros((32, 4), np.float32), label=np.zeros(32, np.int64), clipped=np.array(False))
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "discovery.npz", fingerprint=fingerprint or encoder.fingerprint, **arrays)
    config = dict(model="tiny", pretrained="", quick_gelu="auto", embeddings="", method="ravl")
    data.write_json(out / "discovery.json", dict(config=config, clusters=[dict(id=0, kept=kept)]))
    return f"--discovery={out}"


@pytest.fixture(scope="module")
def tuned(files):
    assert run(tune_words(files, files / "tuned")) == 0
    return files / "tuned"


def test_fine_tuning_writes_weights_that_load_a_log_and_the_accuracies(files, tuned):
    assert sorted(os.listdir(tuned)) == ["finetune.json", "log.csv", "weights.safetensors"]
    encoder = model.load_encoder("tiny", str(tuned / "weights.safetensors"), device="cpu")
    assert encoder.fingerprint != model.load_encoder("tiny", device="cpu").fingerprint
    r = json.loads((tuned / "finetune.json").read_text())
    rows = list(csv.DictReader((tuned / "log.csv").read_text().splitlines()))
    assert (
        [int(row["step"]) for row in rows] == [6]
        and float(rows[0]["L_CL"]) > 0
        and float(rows[0]["images_per_s"]) > 0
    )
    assert {"worst_group", "overall", "groups"} <= set(r["after"]) and r["config"]["pairs"] == 8
    samples = data.load_data(f"waterbirds:{files / 'most/set'}")
    test = samples.keep((samples.split == 2).nonzero()[:, 0])
    z, t = encoder.embed(test.items), encoder.prompts(samples.class_prompts())
    right = (model.unit(z) @ t.T).argmax(1) == test.y
    assert r["after"]["overall"] == pytest.approx(float(right.double().mean()), abs=0.1)


def test_fine_tuning_learns_the_pairs(files, tmp_path, capsys):
    assert run(tune_words(files, tmp_path, "--steps=40", "--pairs=16", "--learning_rate=0.002")) == 0
    found = [float(v) for v in re.findall(r"L_CL ([\d.]+)", capsys.readouterr().out)]
    assert found[-1] < np.log(16) - 0.3  # at first pairs are told apart no better than by chance


@pytest.mark.parametrize("method", ["finetune", "ravl", "vl_gdro", "jtt"])
def test_interrupted_fine_tuning_resumes_to_the_same_weights_bit_for_bit(
    files, tmp_path, monkeypatch, capsys, method
):
    more = [f"--method={method}", "--save_every=2", discovery(files, tmp_path / "found")]
    assert run(tune_words(files, tmp_path / "whole", *more)) == 0
    calls, real = [], torch.nn.utils.clip_grad_norm_

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    assert run(tune_words(files, tmp_path / "cut", *more)) == 130
    assert (
        "training.pt" in os.listdir(tmp_path / "cut") and not (tmp_path / "cut/weights.safetensors").exists()
    )
    capsys.readouterr()
    assert (
        run(tune_words(files, tmp_path / "cut", *more, "--resume", "--learning_rate=1")) == 2
        and "--learning_rate" in capsys.readouterr().err
    )
    assert run(tune_words(files, tmp_path / "cut", *more, "--resume")) == 0
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a) and "training.pt" not in os.listdir(tmp_path / "cut")
    steps = [row["step"] for row in csv.DictReader((tmp_path / "cut/log.csv").read_text().splitlines())]
    assert steps == ["6"]


def ctrl_c(real, at):
    """real, which presses Ctrl-C on its call number at."""
    calls = []

    def pressed(*arguments):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    return pressed


def test_ctrl_c_keeps_the_step_it_comes_in(files, tmp_path, monkeypatch):
    assert run(tune_words(files, tmp_path / "whole")) == 0
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", ctrl_c(torch.nn.utils.clip_grad_norm_, 3))
    assert (
        run(tune_words(files, tmp_path / "cut")) == 130
        and torch.load(tmp_path / "cut/training.pt", weights_only=True)["step"] == 3
    )
    assert run(tune_words(files, tmp_path / "cut", "--resume")) == 0
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_another_method_left_in_the_folder_is_said(files, tmp_path, capsys):
    for name in ("weights.safetensors", "report.html"):
        (tmp_path / name).write_text("old")
    assert run(words(files, tmp_path)) == 0
    assert "weights.safetensors: of another run" in capsys.readouterr().out


def test_processes_and_checkpointing_do_not_change_the_step(files, tmp_path):
    more = ["--method=ravl", "--steps=3", discovery(files, tmp_path / "found")]
    assert run(tune_words(files, tmp_path / "one", *more)) == 0
    assert run(tune_words(files, tmp_path / "less", *more, "--checkpointing")) == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29533",
        TRAIN,
    ]
    two = [*launch, *tune_words(files, tmp_path / "two", *more)]
    job = subprocess.run(two, capture_output=True, text=True, timeout=200)
    assert job.returncode == 0, job.stderr
    one, start = weights(tmp_path / "one"), model.load_encoder("tiny", device="cpu").module.state_dict()
    for other in ("less", "two"):
        assert close(one, weights(tmp_path / other), 2e-4), other
    assert not close(one, start, 2e-4)


def test_a_bias_of_siglip_s_loss_is_trained_saved_and_read_again(files, tmp_path):
    assert run(tune_words(files, tmp_path, "--method=jtt", "--loss=sigmoid")) == 0
    assert (
        model.load_encoder(
            "tiny", str(tmp_path / "weights.safetensors"), device="cpu"
        ).module.logit_bias.item()
        != -10
    )


@pytest.mark.parametrize("part, moved", [("image", "visual."), ("text", ""), ("projection", "visual.proj")])
def test_train_chooses_what_changes(files, tmp_path, part, moved):
    assert run(tune_words(files, tmp_path, f"--train={part}", "--steps=2")) == 0
    start = model.load_encoder("tiny", device="cpu").module.state_dict()
    changed = {k for k, v in weights(tmp_path).items() if not torch.equal(v, start[k])} - {"logit_scale"}
    wanted = {
        "image": lambda k: k.startswith("visual."),
        "text": lambda k: not k.startswith("visual."),
        "projection": lambda k: k in ("visual.proj", "text_projection"),
    }[part]
    assert changed and all(wanted(k) for k in changed)


@pytest.mark.parametrize(
    "method", ["ravl", "upsampled", "vl_erm", "vl_gdro", "spurious_aware", "jtt", "subg"]
)
def test_every_mitigation_runs_and_differs_from_plain_fine_tuning(files, tuned, tmp_path, method):
    assert (
        run(tune_words(files, tmp_path / "out", f"--method={method}", discovery(files, tmp_path / "found")))
        == 0
    )
    assert not close(weights(tuned), weights(tmp_path / "out"), 1e-6)


def test_sigmoid_loss_and_bfloat16_run(files, tmp_path):
    assert run(tune_words(files, tmp_path, "--loss=sigmoid", "--dtype=bfloat16", "--steps=2")) == 0
    assert "logit_bias" in weights(tmp_path)


def test_a_loss_that_is_not_finite_stops_with_its_term_and_the_last_good_state(files, tmp_path, capsys):
    refused(
        capsys,
        tune_words(files, tmp_path, "--learning_rate=1e30"),
        "L_CL and gradient not finite",
        "training.pt",
        "--learning_rate",
    )
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["step"] >= 1 and not (tmp_path / "weights.safetensors").exists()


@pytest.mark.parametrize(
    "kind, words",
    [
        ("none kept", ("no cluster was kept", "--discovery")),
        ("list", ("--method=random", "no cluster")),
        ("other data", ("made on elsewhere", "run discover.py")),
        ("other model", ("weights are others",)),
        ("missing", ("--discovery",)),
        ("no such file", ("no such file",)),
        ("no fields", ("discovery.json", "not discovery.json and discovery.npz")),
        ("never", ("0 of 32 training images",)),
        ("always", ("32 have no other",)),
    ],
)
def test_a_discovery_that_cannot_be_used_is_one_line(files, tmp_path, capsys, kind, words):
    found = tmp_path / "found"
    source, fingerprint = (
        "elsewhere" if kind == "other data" else None,
        "0" * 32 if kind == "other model" else None,
    )
    word = discovery(files, found, kind != "none kept", source, fingerprint)
    config = dict(model="tiny", pretrained="", quick_gelu="auto", method="random")
    if kind == "list":
        data.write_json(
            found / "discovery.json", dict(config=config, clusters=[dict(id=0, kept=True, score=None)])
        )
    if kind == "no fields":
        data.write_json(found / "discovery.json", dict(config=config, clusters=[7]))
    if kind in ("never", "always"):
        with np.load(found / "discovery.npz") as file:
            arrays = dict(file)
        if kind == "never":
            medoids = np.eye(64, dtype=np.float32)[:2]
            medoids[0] = -arrays["mean"] / np.linalg.norm(arrays["mean"])
            arrays.update(medoids=medoids, mean=0 * arrays["mean"])
        else:
            arrays["medoids"] = arrays["medoids"][:1]
        np.savez(found / "discovery.npz", **arrays)
    word = {"missing": "--discovery=", "no such file": f"--discovery={tmp_path / 'nowhere'}"}.get(kind, word)
    refused(capsys, tune_words(files, tmp_path / "out", "--method=ravl", word), *words)


def test_fine_tuning_stops_at_a_broken_image_or_skips_it(files, tmp_path, capsys):
    birds(tmp_path, ((8, 2, 2, 8), (2, 2, 2, 2), (2, 2, 2, 2)))
    (tmp_path / "set/3.png").write_bytes((tmp_path / "set/3.png").read_bytes()[:500])
    argv = [*tune_words(files, tmp_path / "out", "--steps=4"), f"--data=waterbirds:{tmp_path / 'set'}"]
    refused(capsys, argv, "set/3.png", "--skip_bad")
    assert run([*argv, "--skip_bad=True"]) == 0
    said = capsys.readouterr().out
    assert re.search("skipped .*set/3.png", said) and "1 of 36 skipped" in said


def test_captions_name_the_class_or_the_place_too(files, script):
    samples = data.load_data(f"waterbirds:{files / 'most/set'}")
    texts = {kind: script.pairs_of(samples, kind, 8).captions for kind in ("class", "place")}
    places = [samples.places[k] for k in samples.place[samples.split == 0].tolist()]
    both = zip(texts["class"], places, strict=True)
    assert texts["place"] == [f"{text.rstrip('.')}, {place}" for text, place in both]
    assert len(set(texts["class"])) == 2 and len(set(texts["place"])) == 4


def test_missing_captions_and_one_class_are_complaints(files, script):
    samples = data.load_data(f"waterbirds:{files / 'most/set'}")
    samples.captions[3] = " "
    with pytest.raises(data.Complaint, match="1 of 32 images have no caption.*--captions=class"):
        script.pairs_of(samples, "own", 8)
    with pytest.raises(data.Complaint, match="images are of one class"):
        script.pairs_of(samples.keep((samples.split > 0) | (samples.y == 0)), "class", 8)


@pytest.mark.parametrize(
    "word, expected",
    [
        ("--pairs=64", "32, the number of training images"),
        ("--seeds=3", "each --seed"),
        ("--batch_size=0", "[1, inf)"),
        ("--threads=-1", "[0, inf)"),
        ("--strength=7", "[0, 1]"),
        ("--train=last_blocks", "--method=finetune"),
        ("--model=lite0", "no text tower"),
    ],
)
def test_bad_flags_of_fine_tuning_are_one_line(files, tmp_path, capsys, word, expected):
    refused(capsys, tune_words(files, tmp_path, word), word.split("=")[0], expected)


def test_a_batch_of_one_class_is_said_and_does_not_stop(files, tmp_path, capsys):
    assert run(tune_words(files, tmp_path, "--pairs=2", "--steps=12")) == 0
    assert "one class only" in capsys.readouterr().out
