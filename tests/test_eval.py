"""eval.py from its command line and piece by piece: protocols, metrics, many models, controlled settings."""

import contextlib
import csv
import functools
import itertools
import json
import math
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import in_two_processes, run_script
from PIL import Image
from safetensors import safe_open

import data
import eval as script
import model
from data import Facts, Row, load_data
from model import load_encoder, unit

EVAL = str(Path(data.__file__).with_name("eval.py"))
DATA = Path(os.environ.get("FLOCK_DATA", "nowhere"))
COLOURS = {"cat": (132, 118, 110), "dog": (118, 120, 128), "sea": (30, 120, 160), "wood": (60, 130, 50)}
run = functools.partial(run_script, EVAL)


def picture(path, seed, *names, size=32):
    """A picture with the colours of its class and place, one above the other, and noise."""
    g = np.random.default_rng(seed)
    a = np.concatenate([np.full((size // len(names), size, 3), COLOURS[name]) for name in names])
    a = a + g.normal(0, 70, a.shape) + g.normal(0, 12, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a.clip(0, 255).astype("uint8")).save(path)


TRAIN, TEST = (9, 1, 1, 9), (6, 5, 4, 7)  # images of each group


def pets(root, counts=(TRAIN, (8, 8, 8, 8), TEST)):
    """A set of cats and dogs on sea and wood."""
    for s, groups in enumerate(counts):
        for g, n in enumerate(groups):
            names = ("cat", "dog")[g // 2], ("sea", "wood")[g % 2]
            for k in range(n):
                picture(Path(root, "set", data.SPLITS[s], *names, f"{k}.png"), [g, k, s], *names)
    return root


def animals(root, n=3):
    """CounterAnimal with two classes, n photos each on common and counter backgrounds."""
    for a, c in itertools.product(("10 brambling/common-grass", "10 brambling/counter-sky"), (10, 16)):
        name = a if c == 10 else a.replace("10 brambling", "16 bulbul")
        for k in range(n):
            picture(root / name / f"{k}.png", [k, c, len(name)], "cat" if c == 10 else "dog", "sea")
    return f"--data=counteranimal:{root}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return pets(tmp_path_factory.mktemp("pets"))


def words(files, out, *more):
    one = ["--model=tiny"] * (not any(w.startswith(("--models=", "--model=")) for w in more))
    here = [f"--data=folder:{files / 'set'}", f"--cache_dir={files / 'cache'}", f"--out_dir={out}"]
    return [*here, *one, "--dtype=float32", *more]


def results(out):
    return json.loads((out / "eval.json").read_text())


def entry(out, name="tiny"):
    return results(out)["models"][name]


def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tiny():
    return load_encoder("tiny", device="cpu", dtype="float32")


def listed(root, place):
    """The pets as a table with the classes 1 and 2, their place as place(k, it) says."""
    paths = data.scan(root / "set")
    lines = [f"{'/'.join(p)},{1 + (p[1] == 'dog')},{place(k, p[2])},{p[0]}" for k, p in enumerate(paths)]
    (root / "set/t.csv").write_text("\n".join(["file_name,label,a,partition", *lines]))
    return f"--data=csv:{root / 'set/t.csv'}"


def test_numbered_classes_are_not_asked_for_by_text_and_one_empty_place_is_no_group(files, tmp_path, capsys):
    spec = listed(files, lambda k, p: p)
    assert run(words(files, tmp_path / "all", "--protocol=probe", spec)) == 0
    whole = entry(tmp_path / "all")
    assert [c for c in whole["classes"]] == ["1", "2"] and len(whole["groups"]) == 4
    wrong = next(
        k
        for k, row in enumerate(table_of(tmp_path / "all/predictions.csv"))
        if row["class"] != row["tiny probe"]
    )
    lost = table_of(tmp_path / "all/predictions.csv")[wrong]["image"]
    spec = listed(
        files, lambda k, p: "nan" if str(files / "set" / "/".join(data.scan(files / "set")[k])) == lost else p
    )
    assert run(words(files, tmp_path / "one", spec)) == 0
    said, one = capsys.readouterr().out, entry(tmp_path / "one")
    assert one["protocol"] == "probe" and "prompts:" not in said  # auto does not ask by text
    assert "zeroshot is not run: " in said
    assert "1 of 74 images have no place" in said and len(one["groups"]) == 4
    n = [[g["n"] for g in e["groups"]] for e in (whole, one)]
    assert sum(n[0]) - sum(n[1]) == 1 and one["metrics"]["n"] == whole["metrics"]["n"]
    right = [[g["accuracy"] * g["n"] for g in e["groups"]] for e in (whole, one)]
    assert right[0] == pytest.approx(right[1])
    assert table_of(tmp_path / "one/predictions.csv")[wrong]["place"] == ""
    assert run(words(files, tmp_path / "no", "--protocol=zeroshot", spec)) == 2
    assert "numbers or codes" in capsys.readouterr().err
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    assert run(words(files, tmp_path / "named", "--protocol=zeroshot", spec, f"--classes={names}")) == 0
    assert "prompts: 'a photo of a cat.' for 'cat', so of 2 labels" in capsys.readouterr().out


PROTOCOLS = "zeroshot", "probe", "clip_probe", "dfr", "dfr_val_scaled", "fewshot_1", "fewshot_3"


@pytest.fixture(scope="module")
def everything(files):
    """One run with every protocol that tiny can: its out_dir."""
    argv = words(
        files, files / "all", "--protocol=zeroshot,probe,clip_probe,dfr,dfr_val_scaled,fewshot", "--shots=1,3"
    )
    assert run(argv) == 0
    return files / "all"


@pytest.fixture(scope="module")
def embedded(files, tiny):
    samples = load_data(f"folder:{files / 'set'}", splits=False)
    return samples, tiny.embed(samples.items)


def refused(capsys, argv, *expected):
    """Exit code 2 and one line with these words."""
    capsys.readouterr()
    assert run(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("eval.py: ") and line.count("\n") == 1
    assert all(str(word) in line for word in expected), line


# --- what it writes


def test_results_are_written_before_they_are_shown(files, tmp_path, monkeypatch):
    def say(text, *_):  # the terminal closes the pipe at the table
        if text.startswith("\n"):
            raise BrokenPipeError

    monkeypatch.setattr(data, "say", say)
    monkeypatch.setattr(data.os, "dup2", lambda *_: None)
    assert run(words(files, tmp_path, "--protocol=zeroshot")) == 0
    assert len(os.listdir(tmp_path)) == 5 and results(tmp_path)["pending"] == []


def test_contract_of_a_grouped_set(everything):
    r, m = results(everything), entry(everything)
    assert r.keys() == set("config git data seconds models failed pending".split())
    assert m.keys() == set("metrics classes groups protocol protocols additivity".split())
    assert m["protocol"] == "zeroshot" and m["metrics"] == m["protocols"]["zeroshot"]["metrics"]
    assert tuple(m["protocols"]) == PROTOCOLS and r["pending"] == [] and r["failed"] == {}
    assert r["config"]["shots"] == "1,3" and r["data"]["splits"] == [20, 32, 22]
    assert m["classes"].keys() == {"cat", "dog"} and m["classes"]["cat"]["n"] == 11
    assert m["classes"]["cat"]["places"].keys() == {"sea", "wood"}
    assert m["additivity"]["cells"].keys() == {"flat", "sphere"}
    names = ["eval.csv", "eval.html", "eval.json", "groups.csv", "predictions.csv"]
    assert sorted(os.listdir(everything)) == names


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_averages_and_intervals_of_groups(everything, protocol):
    part = entry(everything)["protocols"][protocol]
    groups, m = part["groups"], part["metrics"]
    accuracy = np.array([g["accuracy"] for g in groups])
    numbers = [(g["y"], g["place"], g["n"]) for g in groups]
    assert numbers == [(y, p, TEST[2 * y + p]) for y in (0, 1) for p in (0, 1)]
    assert m["avg_group_mean"] == pytest.approx(accuracy.mean())
    assert m["avg_train_weighted"] == pytest.approx(np.average(accuracy, weights=TRAIN))
    assert m["average"] == pytest.approx(np.average(accuracy, weights=TEST))
    assert all(g["interval"][0] <= g["accuracy"] <= g["interval"][1] for g in groups)
    low, high = m["worst_group_interval"]
    assert 0 <= low <= m["worst_group"] <= high <= 1 and m["seen_in_training"] == 0
    if protocol.startswith("fewshot"):
        assert m["worst_group"] <= accuracy.min() + 1e-9  # the mean of each draw's own
    else:  # the interval is simultaneous over four groups
        right = [(round(g["accuracy"] * g["n"]), g["n"]) for g in groups]
        least = [
            sum(math.comb(n, i) * low**i * (1 - low) ** (n - i) for i in range(k, n + 1)) for k, n in right
        ]
        most = [
            sum(math.comb(n, i) * high**i * (1 - high) ** (n - i) for i in range(k + 1)) for k, n in right
        ]
        assert low == 0 or max(least) == pytest.approx(0.025 / 4)  # so few right, or more, would be rare
        assert min(most) == pytest.approx(0.025 / 4) and m["worst_group"] == min(accuracy)


def test_photos_that_trained_the_probe_are_counted(files, tmp_path, capsys):
    assert run(words(files, tmp_path, "--protocol=probe", "--split=train")) == 0
    m = entry(tmp_path)["metrics"]
    assert m["seen_in_training"] == m["n"] == 20
    assert "WARNING: probe was trained on 20 of the 20 photos" in capsys.readouterr().out


def test_tables_agree_with_the_json(everything):
    m = entry(everything)["protocols"]
    worst = {row["protocol"]: float(row["worst_group"]) for row in table_of(everything / "eval.csv")}
    assert worst == {name: part["metrics"]["worst_group"] for name, part in m.items()}
    groups = table_of(everything / "groups.csv")
    assert {(r["class"], r["place"], r["n"]) for r in groups if r["protocol"] == "dfr"} == {
        (c, p, str(n))
        for (c, p), n in zip(itertools.product(("cat", "dog"), ("sea", "wood")), TEST, strict=True)
    }
    photos = table_of(everything / "predictions.csv")
    right = np.mean([row["class"] == row["tiny probe"] for row in photos])
    assert right == pytest.approx(m["probe"]["metrics"]["average"]) and len(photos) == sum(TEST)
    assert all(os.path.isfile(row["image"]) and row["split"] == "test" for row in photos)


def test_page_is_self_contained_and_shows_numbers_prompts_and_pictures(everything):
    page = (everything / "eval.html").read_text()
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", page)
    assert links and all(link.startswith("data:image/") for link in links)
    assert not re.search(r"https?:|url\(|@import|<script", page.replace(data.SVG, ""))
    wanted = f"{entry(everything)['metrics']['worst_group']:.3f}", "a photo of a cat.", "taken for"
    assert all(text in page for text in wanted)


# --- protocols, against the same by hand


def same_as(everything, protocol, predicted, samples):
    test = (samples.split == 2).nonzero()[:, 0]
    wanted = model.group_metrics((predicted == samples.y)[test], samples, test)["groups"]
    got = entry(everything)["protocols"][protocol]["groups"]
    assert [g["accuracy"] for g in got] == pytest.approx([g["accuracy"] for g in wanted])


def cats_and_dogs(tiny):
    return tiny.texts(["a photo of a cat.", "a photo of a dog."])


def test_zeroshot_is_the_nearest_prompt(everything, embedded, tiny):
    samples, z = embedded
    same_as(everything, "zeroshot", (unit(z) @ cats_and_dogs(tiny).T).argmax(1), samples)


def test_probe_is_the_erm_of_train(everything, embedded):
    samples, z = embedded
    train, x = samples.split == 0, unit(z)
    same_as(everything, "probe", model.fit_probe(x[train], samples.y[train], 0.8).predict(x), samples)


def test_clip_probe_has_the_penalty_in_units_of_the_raw_embedding(everything, embedded):
    samples, z = embedded
    train = samples.split == 0
    x, y = z[train].double(), samples.y[train]
    theta = torch.zeros(x.shape[1] + 1, dtype=torch.double, requires_grad=True)
    stop = dict(max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14)
    optimiser = torch.optim.LBFGS([theta], line_search_fn="strong_wolfe", **stop)

    def loss():  # scikit-learn's: C sum_n CE_n + |w|^2 / 2
        optimiser.zero_grad()
        ce = F.softplus(-(2 * y - 1) * (x @ theta[:-1] + theta[-1])).sum()
        value = 0.316 * ce + theta[:-1].square().sum() / 2
        value.backward()
        return value

    optimiser.step(loss)
    w, b = theta.detach()[:-1], theta.detach()[-1]
    same_as(everything, "clip_probe", (z.double() @ w + b > 0).long(), samples)


def test_dfr_is_the_shared_one_on_the_validation_set(everything, embedded):
    samples, z = embedded
    val, scaler = samples.split == 1, model.standard(z[samples.split == 0])
    for name, scaled in (("dfr", scaler), ("dfr_val_scaled", None)):
        fit = model.dfr(z[val], samples.y[val], samples.group()[val], 0, scaled)
        same_as(everything, name, fit.predict(z), samples)


def test_fewshot_is_the_mean_of_its_draws(everything, embedded):
    samples, z = embedded
    e, right = script.Embedded(None, samples, z, unit, 0.8, 0), 0
    heads, test = script.fewshot_heads(e, 3), samples.split == 2
    assert len(heads) == script.DRAWS
    for head, _ in heads:
        right = right + (head(z[test]).argmax(1) == samples.y[test]).double() / script.DRAWS
    metrics = entry(everything)["protocols"]["fewshot_3"]["metrics"]
    assert metrics["average"] == pytest.approx(float(right.mean())) and 0 < right.std()
    assert len({tuple(head(z[test]).flatten().tolist()) for head, _ in heads}) > 1  # each of other images


def test_models_are_shown_without_the_folders_of_their_files():
    names = ["tiny", "tiny@/a/b.pt", "tiny@/a/c/b.safetensors"]
    assert [*script.shortened(dict.fromkeys(names))] == ["tiny", "tiny@b.pt", "tiny@b.safetensors"]
    both = dict.fromkeys(["tiny@/a/b.pt", "tiny@/c/b.pt"])
    assert script.shortened(both) == both


def test_more_shots_than_images_are_said(files, tmp_path, capsys):
    assert run(words(files, tmp_path, "--protocol=fewshot", "--shots=10,99")) == 0
    said = capsys.readouterr().out
    assert "fewshot_99: 2 of 2 classes have fewer training images, cat the fewest, 10;" in said
    assert "WARNING: fewshot_10" not in said and "\nfewshot_10:" not in said


def test_classifier_rows_over_all_labels_and_among_those_of_a_pair(tmp_path):
    flags = [animals(tmp_path / "set"), "--model=lite0", f"--cache_dir={tmp_path / 'cache'}", "--picker=self"]
    flags += ["--dtype=float32", "--protocol=classifier"]
    lite0 = load_encoder("lite0", device="cpu", dtype="float32", cache=str(tmp_path / "cache"))
    rows, bias = lite0.classifier()

    def logits(**more):
        samples = load_data(f"counteranimal:{tmp_path / 'set'}", splits=False, **more)
        return samples, lite0.embed(samples.items) @ rows.T + bias

    assert run([*flags, f"--out_dir={tmp_path / 'all'}"]) == 0
    names = data.synsets()[1]
    said = [row["lite0 classifier"] for row in table_of(tmp_path / "all/predictions.csv")]
    assert said == [names[k] for k in logits()[1].argmax(1).tolist()]
    m = entry(tmp_path / "all", "lite0")
    kinds = {f"{k}{suffix}" for k in ("common", "counter", "drop") for suffix in ("", "_1v20")}
    assert kinds | {"common_plain", "counter_plain", "effective_robustness"} <= m["metrics"].keys()
    assert kinds | {"n_common", "n_counter"} <= m["classes"]["brambling"].keys()
    assert m["metrics"]["picker"] == "self"

    assert run([*flags, "--classes=brambling,bulbul", f"--out_dir={tmp_path / 'pair'}"]) == 0
    pair, of = logits(classes="brambling,bulbul")
    right = float((of[:, [10, 16]].argmax(1) == pair.y).double().mean())
    assert entry(tmp_path / "pair", "lite0")["metrics"]["average"] == pytest.approx(right)


@pytest.mark.skipif(not DATA.is_dir(), reason="FLOCK_DATA (a folder with imagenet_samples) is not set")
def test_lite0_on_imagenet_photos(tmp_path):
    (tmp_path / "some").mkdir()
    for path in sorted((DATA / "imagenet_samples").iterdir())[::8]:
        (tmp_path / "some" / path.name).symlink_to(path)
    argv = [f"--data=imagenet:{tmp_path / 'some'}", "--model=lite0", f"--out_dir={tmp_path}"]
    argv += [f"--cache_dir={tmp_path / 'cache'}"]
    assert run([*argv, "--labels=all"]) == 0
    among_all = entry(tmp_path, "lite0")
    assert among_all["metrics"]["average"] >= 0.75  # 125 photos; .82 of all 1000
    assert run(argv) == 0
    own = entry(tmp_path, "lite0")  # what is right among 1000 is right among 125
    assert own["metrics"]["average"] > among_all["metrics"]["average"] and len(own["classes"]) == 125
    encoder, names = (
        load_encoder("lite0", dtype="float32"),
        json.loads((tmp_path / "eval.json").read_text())["data"],
    )
    assert len(names["classes"]) == 125
    photos = [data.Photo(str(p)) for p in sorted((tmp_path / "some").iterdir())]
    rows, bias = encoder.classifier()
    mine = [data.synsets()[0].index(p.name.split("_")[0]) for p in (Path(photo.path) for photo in photos)]
    taken = (encoder.embed(photos) @ rows[mine].T + bias[mine]).argmax(1)
    right = float((taken == torch.arange(125)).double().mean())
    assert own["metrics"]["average"] == pytest.approx(right, abs=0.017)  # bfloat16 may turn two of them


def test_without_places_there_is_a_worst_class_and_no_worst_group(tmp_path, capsys):
    for s, name, k in itertools.product(data.SPLITS, ("cat", "dog"), range(8)):
        picture(tmp_path / f"set/{s}/{name}/{k}.png", [k, len(s)], name)
    more = f"--data=folder:{tmp_path / 'set'}", "--protocol=zeroshot,probe,fewshot", "--models=tiny,tiny-conv"
    assert run(words(tmp_path, tmp_path / "out", *more)) == 0
    out, m = tmp_path / "out", entry(tmp_path / "out", "tiny-conv")["metrics"]
    assert m["worst_class"] == min(c["accuracy"] for c in entry(out, "tiny-conv")["classes"].values())
    assert m["worst_class_interval"] and m["worst_class_over_first"]
    for text in (capsys.readouterr().out, *[p.read_text() for p in out.iterdir()]):
        assert "worst class" in text.replace("_", " ") or "worst" not in text
        assert text.count("no worst group") <= 1 and "worst group" not in text.replace("_", " ").replace(
            "no worst group", ""
        )


def test_unlabelled_photos_are_classified(files, tmp_path, capsys):
    for k in range(3):
        picture(tmp_path / f"new/{k}.png", k, "cat")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    more = f"--data=folder:{tmp_path / 'new'}", f"--classes={tmp_path / 'names.txt'}", "--protocol=zeroshot"
    assert run(words(files, tmp_path / "out", *more)) == 0
    rows = table_of(tmp_path / "out/predictions.csv")
    assert len(rows) == 3 and {row["tiny zeroshot"] for row in rows} <= {"cat", "dog"}
    page = (tmp_path / "out/eval.html").read_text()
    assert "sure of photos without labels" in page and "Worst confusions" not in page
    assert re.search(
        r"What photos are taken for, tiny .*\nclass +photos\n[- ]+\n(cat|dog) +\d+\n", capsys.readouterr().out
    )
    assert sum(c["predicted"] for c in entry(tmp_path / "out")["classes"].values()) == 3


# --- metrics


def drawn(y, places, classes, kinds, name="folder:x"):
    """Samples of the test split without pictures; y, places: names, one of each photo."""
    rows = [Row(data.Digit(0), c, p, 2) for c, p in zip(y, places, strict=True)]
    return data.samples_of(name, rows, Facts(classes=list(classes), places=list(kinds)))


def outcome(predicted, samples, confidence=0.6, **more):
    taken, sure = torch.tensor([predicted]), torch.full((1, len(predicted)), confidence)
    return script.Outcome(torch.arange(len(predicted)), taken, sure, samples.y, samples.classes, **more)


def fixture():
    """Per-class accuracies in per cent, from the appendix of the CounterAnimal paper (NeurIPS 2024)."""
    return table_of(Path(__file__).parent / "fixtures/counteranimal.csv")


@pytest.mark.parametrize(
    "name, common, counter",
    [("L400M_B16", 73.11, 52.17), ("L400M_B32", 67.13, 36.95), ("OAI_B32", 69.13, 45.62)],
)
def test_published_class_tables_give_the_published_averages(name, common, counter):
    rows, n, classes, groups = fixture(), 10_000, {}, []
    parts = [[float(r[f"{name}_{kind}"]) for kind in ("common", "counter")] for r in rows]
    for y, pair in enumerate(parts):
        groups += [dict(y=y, place=k, n=n, accuracy=v / 100) for k, v in enumerate(pair)]
    m = script.counter_metrics(groups, classes, [r["imagenet_idx"] for r in rows], 0)
    assert 100 * m["common"] == pytest.approx(common, abs=0.15)
    assert 100 * m["counter"] == pytest.approx(counter, abs=0.15)
    assert m["drop"] == pytest.approx(m["common"] - m["counter"])
    assert m["drop_interval"][0] < m["drop"] < m["drop_interval"][1]
    assert classes["9"]["common"] == pytest.approx(parts[0][0] / 100) and classes["9"]["n_counter"] == n


def test_class_balance_differs_from_the_plain_average():
    cells = (0, 0, 9, 1.0), (0, 1, 1, 1.0), (1, 0, 1, 0.0)
    groups = [dict(y=y, place=place, n=n, accuracy=share) for y, place, n, share in cells]
    m = script.counter_metrics(groups, {}, ["a", "b"], 0, "_1v20")
    assert (m["common_1v20"], m["common_plain_1v20"], m["counter_1v20"]) == (0.5, 0.9, 1)
    assert all(key.endswith("_1v20") for key in m)


def test_a_drop_is_of_classes_that_have_both_kinds_and_predictions_are_named_as_classes_are(tmp_path, capsys):
    cells = (0, 0, 8, 1.0), (0, 1, 8, 0.5), (1, 0, 8, 0.0)
    groups = [dict(y=y, place=place, n=n, accuracy=share) for y, place, n, share in cells]
    m = script.counter_metrics(groups, {}, ["a", "b"], 0)
    assert (m["common"], m["counter"], m["drop"]) == (0.5, 0.5, 0.5)
    where = animals(tmp_path / "set")
    shutil.rmtree(tmp_path / "set/16 bulbul/counter-sky")
    argv = [
        where,
        "--model=tiny",
        "--picker=self",
        "--split=all",
        f"--out_dir={tmp_path / 'out'}",
        "--cache_dir=",
    ]
    assert run(argv) == 0 and "1 of 2 classes have photos of one kind only, bulbul" in capsys.readouterr().out
    right = json.loads((tmp_path / "out/eval.json").read_text())["models"]["tiny"]["metrics"]["average"]
    rows = table_of(tmp_path / "out/predictions.csv")
    taken = next(k for k in rows[0] if k.startswith("tiny zeroshot") and not k.endswith("confidence"))
    assert sum(row[taken] == row["class"] for row in rows) / len(rows) == pytest.approx(right)


def test_drop_interval_covers_as_often_as_it_says():
    """200 sets of 2 x 400 photos: the 95 % interval holds the true drop, 0.2, in about 190."""
    g, inside, n = np.random.default_rng(0), 0, 400
    for seed in range(200):
        groups = [dict(y=0, place=k, n=n, accuracy=g.binomial(n, p) / n) for k, p in enumerate((0.8, 0.6))]
        low, high = script.counter_metrics(groups, {}, ["a"], seed)["drop_interval"]
        inside += low <= 0.2 <= high
    assert 180 <= inside <= 198


def logit(v):
    return np.log(v / (1 - v))


def test_robustness_is_the_distance_from_a_line_of_logits_through_the_published_models():
    low, middle, high = (script.expected(1 / (1 + np.exp(-v))) for v in (-1.0, 0.0, 1.0))
    assert logit(high) - logit(middle) == pytest.approx(logit(middle) - logit(low), abs=1e-6)
    published = np.array(list(script.PUBLISHED.values())) / 100
    distance = [logit(b) - logit(script.expected(a)) for a, b in published]
    assert abs(np.mean(distance)) < 1e-6  # a least-squares line leaves none on the whole


def counted(figures, monkeypatch):
    """results, outcomes and samples of a comparison on CounterAnimal; figures: {model: (common, counter)}."""
    places = ("common", "counter")
    samples = drawn("ab" * 20, places * 20, "ab", places, "counteranimal:x")
    samples.labels = [str(k) for k in range(1000)]
    monkeypatch.setattr(script, "worst", lambda *_: [])  # no pictures
    results, outcomes = {}, {}
    for name, (common, counter) in figures.items():
        m = dict(common=common, counter=counter, drop=common - counter, drop_interval=[0.0, 1.0], n=40)
        of = dict(common=common, counter=counter, drop=common - counter, n_common=10, n_counter=10)
        part = dict(metrics=m, classes=dict(a=dict(of, accuracy=0.5, n=20)), groups=[])
        results[name] = dict(part, protocol="zeroshot", protocols=dict(zeroshot=part), additivity={})
        outcomes[name] = dict(zeroshot=outcome([0, 1] * 20, samples))
    script.compare(results, outcomes, samples, 0)
    samples.prompts = [[label] for label in samples.labels]
    return results, outcomes, samples


def test_the_page_draws_the_line_that_robustness_is_measured_from(monkeypatch):
    lines = []
    monkeypatch.setattr(script, "scatter", lambda dots, curve, *_: lines.append(dict(curve)) or data.Html())
    results, outcomes, samples = counted(dict(a=(0.5, 0.1), b=(0.7, 0.2), c=(0.9, 0.6)), monkeypatch)
    script.blocks_of(results, outcomes, samples, {})
    for r in results.values():
        m = r["metrics"]
        assert m["counter"] - m["effective_robustness"] == pytest.approx(lines[0][round(m["common"], 2)])


@pytest.mark.parametrize(
    "name, known",
    [
        ("timm:resnet50", True),
        ("ViT-B-32@laion400m_e32", True),
        ("timm:resnet50d.ra2_in1k", False),
        ("timm:resnet50@mine.pt", False),
        ("ViT-B-32@laion400m_e31", False),
    ],
)
def test_published_figures_stand_beside_the_published_model_only(name, known, monkeypatch):
    results, outcomes, samples = counted({name: (0.5, 0.1)}, monkeypatch)
    said = script.console(script.blocks_of(results, outcomes, samples, {}))
    assert (f"{name}: published" in said) == known and "0.100" in said


def test_bg_gap_is_mixed_same_less_mixed_rand():
    places = ["original"] * 4 + ["mixed_same"] * 4 + ["mixed_rand"] * 4
    samples = drawn(["dog", "bird"] * 6, places, ("dog", "bird"), dict.fromkeys(places), "in9:x")
    m = script.measure(outcome([0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1, -1], samples), samples, 0)["metrics"]
    assert [m[k] for k in ("original", "mixed_same", "mixed_rand", "bg_gap")] == [1, 0.75, 0.25, 0.5]
    assert m["bg_gap_interval"][0] < 0.5 < m["bg_gap_interval"][1]


def test_wrong_labels_are_counted_by_name():
    samples = drawn(["cat"] * 4 + ["dog"], ["here"] * 5, ("cat", "dog", "fox"), ("here",))
    m = script.measure(outcome([2, 2, 1, 0, 1], samples), samples, 0)
    assert m["classes"]["cat"]["taken_for"] == {"fox": 2, "dog": 1} and m["metrics"]["average"] == 0.4


def test_calibration_error_by_hand():
    confidence, correct = torch.tensor([0.95] * 4 + [0.55] * 2), torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    assert script.ece(confidence, correct) == pytest.approx((4 * (0.95 - 0.75) + 2 * (1 - 0.55)) / 6)
    assert script.ece(torch.ones(5), torch.ones(5).bool()) == 0


def test_rows_on_different_photos_say_how_many():
    samples = drawn("ab", ["here"] * 2, "ab", ("here",))

    def columns(*ns):
        rows = {str(k): dict(metrics=dict(n=n, average=0.5), groups=[]) for k, n in enumerate(ns)}
        return script.metric_columns(dict(m=dict(protocols=rows)), samples)

    assert columns(12, 12) == ["average"] and columns(60, 12) == ["n", "average"]


# --- the 20 labels, maps, regions


def test_one_of_twenty_is_among_the_labels_nearest_to_the_class():
    g = torch.Generator().manual_seed(0)
    rows, z = unit(torch.randn(1000, 16, generator=g)), 3 * torch.randn(6, 16, generator=g)
    samples = drawn("aaabbb", ("common", "counter") * 3, "ab", ("common", "counter"), "counteranimal:x")
    samples.imagenet, samples.labels = [[7], [8]], [str(k) for k in range(1000)]
    samples.prompts = [[label] for label in samples.labels]
    prompts = dict(prompts=lambda *_: rows, tokenizer=True, facts=dict(logit_scale=10.0))
    encoder = SimpleNamespace(**prompts)
    twenty = script.pick_labels(encoder, z, samples)
    for c in (0, 1):
        mean = (unit(z) @ rows.T)[3 * c : 3 * c + 3].mean(0)
        assert set(twenty[c].tolist()) == set(mean.argsort(descending=True)[:20].tolist())
    e, row = script.Embedded(encoder, samples, z, unit, 0.8, 0), script.PROTOCOLS["zeroshot"]
    out = script.classify(e, row, script.prompt_heads(e), "all", twenty, None)
    best = [max(twenty[k // 3].tolist(), key=lambda label: float(unit(z)[k] @ rows[label])) for k in range(6)]
    assert out.of_20.tolist() == best and out.target.tolist() == [7, 7, 7, 8, 8, 8]
    assert out.predicted[0].tolist() == (unit(z) @ rows.T).argmax(1).tolist()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_map_that_changes_nothing_gives_the_embedding_back(power):
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    z = z if power == 1 else z.abs()
    g = model.Map(torch.full((8,), 0.1), torch.eye(8), power)
    assert torch.allclose(script.repaired(g, z), z, atol=1e-5)


def test_checkpoint_of_train_is_applied_first_and_others_are_refused(files, tmp_path, tiny, embedded, capsys):
    samples, z = embedded
    g = model.Map(unit(z).mean(0), torch.diag(torch.linspace(1, 0, 64)))

    def applied(name, out, *more, **other):
        state = dict(
            config=dict(model="tiny", pretrained=""), fingerprint=tiny.fingerprint, probes=dict(bap={})
        )
        model.save_checkpoint(tmp_path / name, state | dict(map=g.state_dict(), power=1.0) | other)
        return words(files, tmp_path / out, f"--ckpt={tmp_path / name}", *more)

    assert run(applied("ckpt.pt", "out", "--protocol=zeroshot,probe")) == 0
    train = samples.split == 0
    fit = model.fit_probe(g(z)[train], samples.y[train], 0.8)
    same_as(tmp_path / "out", "probe", fit.predict(g(z)), samples)
    repaired = unit(script.repaired(g, z))
    same_as(tmp_path / "out", "zeroshot", (repaired @ cats_and_dogs(tiny).T).argmax(1), samples)
    told = capsys.readouterr().out, (tmp_path / "out/eval.html").read_text()
    assert all("probe, bap" in text and "bap: through the map of ckpt.pt" in text for text in told)
    assert "a photo of a cat." in told[1]
    other = dict(fingerprint="another", config=dict(model="lite0", pretrained=""))
    refused(capsys, applied("other.pt", "no", **other), "other.pt", "lite0", "tiny")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    refused(capsys, words(files, tmp_path / "no", f"--ckpt={tmp_path / 'bad.pt'}"), "bad.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A checkpoint as of train.py, whose classes are in another order than the alphabet's."""
    draw = torch.Generator().manual_seed(0)
    g = model.Map(0.1 * torch.randn(64, generator=draw), torch.randn(64, 64, generator=draw))
    probes = {}
    for name in ("erm", "nullspace", "bap"):
        weight = torch.randn(64, 2, generator=draw).double()
        bias = torch.zeros(2).double()
        probes[name] = dict(
            mean=torch.zeros(64).double(), scale=torch.tensor(0.1).double(), weight=weight, bias=bias
        )
    path, config = (
        tmp_path_factory.mktemp("ckpt") / "ckpt.pt",
        dict(model="tiny", pretrained="", data="folder:x"),
    )
    state = dict(config=config, fingerprint=tiny.fingerprint, probes=probes, classes=["dog", "cat"])
    state.update(map=g.state_dict(), power=1.0)
    model.save_checkpoint(path, state)

    def logits(name, z):
        """Of cat and dog [N, 2]."""
        x = unit(z.double()) if name == "erm" else (unit(z.double()) - g.mu.double()) @ g.W.double()
        return (x / 0.1 @ probes[name]["weight"])[:, [1, 0]]

    return path, state, logits


def test_probes_of_a_checkpoint_are_rows_of_their_names_on_other_data(
    files, tmp_path, trained, embedded, capsys
):
    samples, z = embedded
    path, state, logits = trained
    argv = words(files, tmp_path, "--protocol=ckpt", f"--ckpt={path}")
    assert run(argv) == 0
    assert list(entry(tmp_path)["protocols"]) == ["erm", "bap"]  # the map of nullspace is not in the file
    assert entry(tmp_path)["protocol"] == "bap"  # the headline is the checkpoint's own method, not erm
    for name in ("erm", "bap"):
        same_as(tmp_path, name, logits(name, z).argmax(1), samples)
    assert "was trained on" not in capsys.readouterr().out
    made = dict(state, classes=["bird", "cat"])
    model.save_checkpoint(tmp_path / "other.pt", made)
    refused(
        capsys, words(files, tmp_path, "--protocol=ckpt", f"--ckpt={tmp_path}/other.pt"), "bird", "cat, dog"
    )
    refused(capsys, words(files, tmp_path, "--protocol=ckpt"), "--ckpt=FILE")


def test_a_checkpoint_of_more_classes_may_be_wrong_by_another(files, tmp_path, trained, embedded, capsys):
    (samples, z), state = embedded, trained[1]
    bird = torch.randn(64, 1, generator=torch.Generator().manual_seed(5)).double()
    erm = dict(state["probes"]["erm"], bias=torch.zeros(3).double())
    erm["weight"] = torch.cat([erm["weight"], bird], 1)
    made = dict(state, classes=["dog", "cat", "bird"], probes=dict(erm=erm))
    model.save_checkpoint(tmp_path / "more.pt", made)
    assert run(words(files, tmp_path, "--protocol=ckpt", f"--ckpt={tmp_path}/more.pt")) == 0
    taken = (unit(z.double()) @ erm["weight"]).argmax(1).tolist()
    test = [k for k in range(len(taken)) if samples.split[k] == 2]
    names = [["dog", "cat", "none of them"][taken[k]] for k in test]
    assert [r["tiny erm"] for r in table_of(tmp_path / "predictions.csv")] == names and 2 in taken
    right = [samples.classes[samples.y[k]] == name for k, name in zip(test, names, strict=True)]
    assert entry(tmp_path)["protocols"]["erm"]["metrics"]["average"] == pytest.approx(np.mean(right))
    for k in range(2):
        picture(tmp_path / f"photos/{k}.png", k, "cat", "sea")
    argv = [
        f"--data=folder:{tmp_path / 'photos'}",
        "--model=tiny",
        f"--ckpt={tmp_path}/more.pt",
        "--classes=cat,dog",
    ]
    refused(
        capsys, [*argv, "--protocol=ckpt", f"--out_dir={tmp_path}"], "made for dog, cat, bird", "cat, dog"
    )


def test_probes_of_a_checkpoint_of_the_same_data_say_that_they_have_seen_it(files, tmp_path, trained, capsys):
    state = dict(trained[1], config=dict(trained[1]["config"], data=f"folder:{files / 'set'}"))
    model.save_checkpoint(tmp_path / "same.pt", state)
    assert (
        run(words(files, tmp_path, "--protocol=ckpt", f"--ckpt={tmp_path / 'same.pt'}", "--split=all")) == 0
    )
    assert "WARNING: erm was trained on 20 of the 74" in capsys.readouterr().out


def test_a_checkpoint_classifies_photos_without_labels(tmp_path, trained, tiny):
    for k in range(6):
        picture(tmp_path / f"photos/{k}.png", k, "cat", "sea")
    argv = [f"--data=folder:{tmp_path / 'photos'}", "--model=tiny", f"--ckpt={trained[0]}", "--dtype=float32"]
    assert run([*argv, f"--out_dir={tmp_path}", "--cache_dir="]) == 0
    z = tiny.embed([data.Photo(str(tmp_path / f"photos/{k}.png")) for k in range(6)])
    sure, taken = trained[2]("bap", z).softmax(1).max(1)
    rows = table_of(tmp_path / "predictions.csv")
    assert [r["tiny bap"] for r in rows] == [("cat", "dog")[k] for k in taken]
    assert [float(r["tiny bap confidence"]) for r in rows] == pytest.approx(sure.tolist(), abs=1e-4)


def test_regions_that_show_the_object_are_classified_too(tmp_path):
    rows = ["img_id,img_filename,y,split,place,place_filename"]
    (tmp_path / "masks").mkdir()
    for k in range(24):
        y, place, split = k % 2, k // 2 % 2, k // 8
        picture(tmp_path / f"set/{k}.png", k, "cat" if y else "dog", "sea", size=60)
        mask = np.zeros((60, 60), "uint8")
        mask[: 20 + 14 * y, :20] = 255  # the upper left cell, and for y = 1 most of the one below
        Image.fromarray(mask).save(tmp_path / f"masks/{k}.png")
        rows.append(f"{k},{k}.png,{y},{split},{place},-")
    (tmp_path / "set/metadata.csv").write_text("\n".join(rows))
    argv = [f"--data=waterbirds:{tmp_path / 'set'}", f"--masks={tmp_path / 'masks'}", "--model=tiny"]
    assert run([*argv, f"--out_dir={tmp_path / 'out'}", "--cache_dir=", "--protocol=probe"]) == 0
    m = entry(tmp_path / "out")["metrics"]
    assert m["regions"] == 4 * 1 + 4 * 2 and 0 <= m["region_worst_group"] <= m["region_overall"] <= 1


# --- several models, the cache, interruption, processes


def weights(path, seed):
    """Other weights for tiny."""
    g, state = torch.Generator().manual_seed(seed), load_encoder("tiny", device="cpu").module.state_dict()
    state = {
        k: v + 0.05 * torch.randn(v.shape, generator=g) if v.is_floating_point() else v
        for k, v in state.items()
    }
    torch.save(state, path)
    return f"tiny@{path}"


def test_models_are_compared_one_that_fails_is_reported_and_the_others_go_on(files, tmp_path, capsys):
    other, gone = weights(tmp_path / "w.pt", 1), f"tiny@{tmp_path}/gone.pt"
    assert run(words(files, tmp_path / "out", f"--models=tiny,nonsense,{gone},{other}")) == 0
    r, said = results(tmp_path / "out"), capsys.readouterr().out
    assert list(r["models"]) == ["tiny", other] and list(r["failed"]) == ["nonsense", gone]
    assert "no such model" in r["failed"]["nonsense"] and "no such file" in r["failed"][gone]
    assert r["pending"] == [] and "nonsense: FAILED" in said
    low, high = r["models"][other]["metrics"]["worst_group_over_first"]
    assert -1 <= low <= high <= 1 and "worst_group_over_first" not in r["models"]["tiny"]["metrics"]
    page = (tmp_path / "out/eval.html").read_text()
    assert "Accuracy on the line" in page and "nonsense" in page
    assert {row["model"] for row in table_of(tmp_path / "out/eval.csv")} == {"tiny", other}


def test_of_several_models_one_that_cannot_have_a_protocol_has_the_others(files, tmp_path, capsys):
    flags = "--models=lite0,tiny", "--protocol=zeroshot,probe"
    assert run(words(files, tmp_path, *flags)) == 0
    r, said = results(tmp_path), capsys.readouterr().out
    assert {name: list(m["protocols"]) for name, m in r["models"].items()} == dict(
        lite0=["probe"], tiny=["zeroshot", "probe"]
    )
    assert (
        list(r["failed"]) == ["lite0 zeroshot"] and "FAILED lite0 zeroshot: --model=lite0: it has no" in said
    )
    refused(capsys, words(files, tmp_path, "--model=lite0", flags[1]), "it has no text tower")


def test_a_model_whose_measuring_fails_is_reported_and_the_others_go_on(files, tmp_path, monkeypatch):
    real, calls = model.wilson, []

    def wilson(*arguments):
        calls.append(arguments)
        return real(*arguments) if len(calls) > 1 else 1 / 0

    monkeypatch.setattr(model, "wilson", wilson)
    names = f"--models=tiny,{weights(tmp_path / 'w.pt', 1)}"
    assert run(words(files, tmp_path / "out", names, "--protocol=zeroshot")) == 0
    r = results(tmp_path / "out")
    assert r["failed"] == dict(tiny="ZeroDivisionError: division by zero") and len(r["models"]) == 1


def test_all_models_failing_is_exit_code_2(files, tmp_path, capsys):
    argv = words(files, tmp_path / "out", "--models=nonsense,rubbish")
    refused(capsys, argv, "none could be evaluated", "nonsense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["--model=tiny", "--pretrained=none"])
def test_several_models_and_one_are_not_asked_for_together(files, tmp_path, capsys, word):
    argv = words(files, tmp_path / "out", "--models=tiny,tiny-conv", word)
    refused(capsys, argv, f"{word.partition('=')[0]}: ", "behind @ in --models")


def test_interrupted_among_models_it_goes_on_where_it_stopped(files, tmp_path, monkeypatch, capsys):
    names = f"--models=tiny,{weights(tmp_path / 'a.pt', 1)},{weights(tmp_path / 'b.pt', 2)}"
    argv = words(files, tmp_path / "out", names, "--protocol=zeroshot", f"--cache_dir={tmp_path / 'cache'}")
    real, calls = model.Encoder.embed, []

    def embed(encoder, *arguments, **more):
        calls.append(encoder.fingerprint)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(encoder, *arguments, **more)

    monkeypatch.setattr(model.Encoder, "embed", embed)
    assert run(argv) == 130 and "the same command goes on" in capsys.readouterr().err
    partial = results(tmp_path / "out")
    assert list(partial["models"]) == ["tiny"] and len(partial["pending"]) == 2
    assert not (tmp_path / "out/eval.html").exists()
    assert run(argv) == 0 and re.search(r"tiny: \d+ from the cache", capsys.readouterr().out)
    whole = results(tmp_path / "out")
    assert (
        len(whole["models"]) == 3 and whole["models"]["tiny"]["groups"] == partial["models"]["tiny"]["groups"]
    )


def test_a_warm_run_loads_no_weights_and_gives_the_same(files, tmp_path, monkeypatch):
    first, second = (words(files, tmp_path / name, "--protocol=zeroshot,probe") for name in ("a", "b"))
    assert run(first) == 0

    def fail(_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(model.Encoder, "module", property(fail))
    assert run(second) == 0 and results(tmp_path / "a")["models"] == results(tmp_path / "b")["models"]


@pytest.mark.ahead
def test_two_processes_give_the_numbers_of_one(files, tmp_path):
    one, two = (
        words(files, tmp_path / name, "--protocol=zeroshot,probe", f"--cache_dir={tmp_path / name}/cache")
        for name in ("one", "two")
    )
    jobs = in_two_processes(EVAL, *two)
    assert run(one) == 0 and [code for code, *_ in jobs] == [0, 0], jobs
    assert results(tmp_path / "one")["models"] == results(tmp_path / "two")["models"]


# --- bad input: exit code 2 and one line


@pytest.mark.parametrize(
    "word, expected",
    [
        ("--protocl=probe", ("--protocl", "protocol")),
        ("--protocol=prob", ("--protocol", "probe")),
        ("--split=dev", ("--split", "val")),
        ("--shots=0", ("--shots",)),
        ("--l2=0", ("--l2",)),
        ("--models=tiny,tiny", ("--models", "different")),
        ("--models=tiny,,", ("--models",)),
        ("--data=folder:nowhere", ("nowhere", "no such folder")),
        ("--data=holder:x", ("--data", "folder")),
        ("--model=lite9", ("--model=lite9", "lite0")),
        ("--protocol=classifier", ("no ImageNet classifier", "zeroshot")),
        ("--model=lite0 --protocol=zeroshot", ("no text tower", "classifier")),
        ("--prompts=nowhere", ("--prompts", "no such file")),
        ("--ckpt=nowhere", ("nowhere", "no such file")),
        ("--masks=nowhere", ("--masks", "no such folder")),
        ("--pairs=4", ("--pairs", "nothing without --protocol=ravl")),
        ("--masks=assets", ("--masks", "no mask for any image")),
        ("--classes=nowhere", ("--classes", "nowhere")),
        ("--composites=-1", ("--composites",)),
    ],
)
def test_bad_flag_is_one_line_and_exit_code_2(files, tmp_path, capsys, word, expected):
    word = word.replace("=assets", f"={data.ASSETS}")
    refused(capsys, words(files, tmp_path / "out", *word.split()), *expected)
    assert not (tmp_path / "out/eval.json").exists()


def test_a_set_too_small_for_a_protocol(tmp_path, capsys):
    for name in ("cat", "dog"):
        picture(tmp_path / f"few/{name}/a.png", 1, name)
    few = [f"--data=folder:{tmp_path / 'few'}", "--model=tiny", "--cache_dir="]
    few.append(f"--out_dir={tmp_path / 'out'}")
    refused(capsys, [*few, "--protocol=dfr"], "dfr", "validation")
    assert run([*few, "--protocol=zeroshot"]) == 0 and entry(tmp_path / "out")["metrics"]["n"] == 2


def test_a_bad_picture_stops_it_or_is_left_out_and_counted(tmp_path, capsys):
    pets(tmp_path, ((2,) * 4, (1,) * 4, (3,) * 4))
    (tmp_path / "set/test/cat/sea/1.png").write_bytes(b"")
    refused(capsys, words(tmp_path, tmp_path / "out"), "set/test/cat/sea/1.png", "empty")
    assert run(words(tmp_path, tmp_path / "out", "--skip_bad")) == 0
    m = entry(tmp_path / "out")
    assert m["metrics"]["n"] == 11 and m["metrics"]["skipped"] == 1 and m["groups"][0]["n"] == 2
    assert "1 of 24 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("split, n", [("val", 32), ("train", 20), ("all", 74), ("auto", 22)])
def test_split_chooses_the_photos(files, tmp_path, split, n):
    assert run(words(files, tmp_path, "--protocol=zeroshot", f"--split={split}")) == 0
    assert entry(tmp_path)["metrics"]["n"] == n


def test_incomplete_set_warns_once_and_goes_on(tmp_path, capsys):
    argv = [animals(tmp_path / "set", 2), "--model=tiny", "--cache_dir=", f"--out_dir={tmp_path / 'out'}"]
    assert run([*argv, "--picker=self"]) == 0
    assert (
        capsys.readouterr().out.count("WARNING: counteranimal") == 1
        and len(entry(tmp_path / "out")["classes"]) == 2
    )
    assert "points of drop" in (tmp_path / "out/eval.html").read_text()


def test_full_disk_leaves_nothing_half_written(files, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", full)
    refused(capsys, words(files, tmp_path / "out", f"--cache_dir={tmp_path / 'cache'}"), "free some space")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_help_of_the_script_and_of_a_data_set(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{k}" in shown for k in ("out_dir", "data", "protocol", "picker", "seed"))
    assert "def main" not in shown and run(["--data=counteranimal:help"]) == 0
    assert "LAION-final" in capsys.readouterr().out


# --- controlled settings


class Scripts:
    """Stands in for runpy: eval.py runs as it is, of the scripts that it starts only what they leave."""

    def __init__(self, monkeypatch, leaves):
        self.real, self.leaves, self.ran = runpy.run_path, leaves, []
        monkeypatch.setattr(runpy, "run_path", self)

    def __call__(self, path, **more):
        if Path(path).name == "eval.py":
            return self.real(path, **more)
        words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
        self.ran.append(dict(words, script=Path(path).name))
        self.leaves(self, path, Path(words["out_dir"]), words)


@functools.lru_cache(8)
def same_data(spec, classes, feature, strength, spurious, seed):
    planted = dict(feature=feature, strength=float(strength), spurious=spurious)
    return load_data(spec, classes, seed=int(seed), **planted)


def reaches(at, words, groups, values, regions="grid:2"):
    """Leaves figures beside weights, as eval.py does."""
    data_flags = [words[k] for k in ("data", "classes", "feature", "strength", "spurious", "seed")]
    known = {k: words[k] for k in script.SHARED} | dict(
        regions=regions, pretrained=at / "weights.safetensors"
    )
    made = script.made_of("eval.py", known, same_data(*data_flags), dict(cache_dir=""))
    figures = dict(zip(script.FIGURES, values, strict=True), groups=groups, made=made)
    data.write_json(at / "figures.json", figures)


SETTINGS = {  # by class: gap, Precision@10, scale of the figures: valid and found, half found, not valid
    0: (0.5, dict(ravl=1.0, random=0.2), 1.0),
    1: (0.3, dict(ravl=0.7, random=None), 0.5),
    2: (0.1, dict(ravl=0.0, random=0.0), 1.0),
}


def leave_setting(scripts, path, at, words):
    label = data.DIGITS.index(words["spurious"])
    gap, precision, scale = SETTINGS[label]
    if Path(path).name == "discover.py":
        methods = {m: dict(precision_at_10=v) for m, v in precision.items()}
        found = dict(methods=methods, clusters=[dict(id=0, kept=True)], when=len(scripts.ran))
        return data.write_json(at / "discovery.json", found)
    k, groups = script.MITIGATIONS.index(words["method"]), [0.9] * 20
    groups[2 * label] -= gap * (k == 0)
    data.write(at / "weights.safetensors", f"{at} {words['steps']}")
    reaches(at, words, groups, (scale * (0.5 + 0.05 * k), scale * 0.1 * k, 0.8, 0.7))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Flags of three settings, a folder, and what stands in for the scripts."""
    argv = ["--protocol=ravl", "--settings=3", "--mitigate=2", "--pretrained=base.safetensors"]
    return [*argv, f"--out_dir={tmp_path}"], tmp_path, Scripts(monkeypatch, leave_setting)


def tree_of(out):
    return json.loads((out / "protocol.json").read_text())


def test_the_same_settings_are_shown_once(settings, capsys):
    assert run([*settings[0], "--settings=1", "--mitigate=1"]) == 0
    assert capsys.readouterr().out.count("Mitigation, mean of settings, Precision@10 > 0.8, n = 1") == 1
    assert (settings[1] / "protocol.html").read_text().count("<h2>Mitigation, mean") == 1


def test_the_feature_of_chosen_classes_goes_with_one_of_them(settings):
    argv, _, scripts = settings
    assert run([*argv, "--classes=one,zero", "--settings=1"]) == 0
    assert {words["spurious"] for words in scripts.ran} == {"one"}  # as a number it counts all ten digits


def test_controlled_settings_resume_from_what_is_done_and_keep_the_contract(settings, capsys):
    argv, out, scripts = settings
    assert run(argv) == 0 and len(scripts.ran) == 3 + 2 + 14
    assert run(argv) == 0 and len(scripts.ran) == 19  # nothing anew
    tree, said = tree_of(out), capsys.readouterr().out
    assert tree.keys() == {"config", "git", "settings", "summary", "seconds"}
    valid = [(s["strength"], s["spurious_class"], s["valid"]) for s in tree["settings"]]
    assert valid == [(0.99, 0, True), (0.99, 1, True), (0.99, 2, False)]
    first, _, last = tree["settings"]
    assert first["precision_at_10"] == dict(ravl=1.0, random=0.2) and last["precision_at_10"] == {}
    assert first["gap"] == pytest.approx(0.5) and set(first["mitigation"]) == set(script.MITIGATIONS)
    assert set(first["mitigation"]["jtt"]) == set(script.FIGURES)
    p, m = tree["summary"]["precision_at_10"], tree["summary"]["mitigation"]
    assert p["ravl"]["all"]["mean"] == pytest.approx(0.85) and p["ravl"]["all"]["n"] == 2
    assert p["random"]["all"]["mean"] == pytest.approx(0.1)  # what was not found counts as zero
    low = p["ravl"]["0.99"]["low"]  # from where .85 is 1.96 deviations of a mean of two shares away
    assert 0 < low < 0.85 and 0.85 - low == pytest.approx(1.96 * (low * (1 - low) / 2) ** 0.5, abs=1e-4)
    at_6, at_8 = m["precision_above_0.6"], m["precision_above_0.8"]
    assert (at_6["n"], at_8["n"]) == (2, 1) and at_8["methods"]["finetune"]["image_overall"] == 0.5
    worst = [at["methods"]["ravl"]["image_worst_group"] for at in (at_6, at_8)]
    assert worst == pytest.approx([0.075, 0.1])
    rows = table_of(out / "protocol.csv")
    assert len([r for r in rows if r["stage"] == "mitigate"]) == 16
    assert [r["precision_at_10"] for r in rows if r["method"] == "random"] == ["0.2", ""]
    page = (out / "protocol.html").read_text()
    assert "2 of 3 settings learned" in page and not re.search(r"(?:src|href)\s*=\s*[\"']?http", page)
    assert "Precision@10 > 0.8" in said and "made anew" not in said


def test_what_was_made_with_other_code_or_flags_is_made_anew_and_said(settings, monkeypatch, capsys):
    argv, out, scripts = settings
    code, argv = out / "code", [*argv, "--settings=1", "--mitigate=1"]
    shutil.copytree(Path(EVAL).parent, code, ignore=shutil.ignore_patterns(".*", "assets", "tests"))
    monkeypatch.setattr(script, "__file__", str(code / "eval.py"))
    at, methods = out / "settings/0.99-0", list(script.MITIGATIONS)

    def ran(*more):
        """The methods that ran, and whether what was there before was said to be made anew."""
        before = len(scripts.ran)
        capsys.readouterr()
        assert run_script(code / "eval.py", [*argv, *more]) == 0
        said = capsys.readouterr().out
        return [words["method"] for words in scripts.ran[before:]], f"{at}" in said and "made anew" in said

    everything = ["finetune", "all", *methods[1:]]
    assert ran() == (everything, False) and ran() == ([], False)
    edit(code / "train.py")  # the same weights come of it, and the discovery stays
    assert ran() == (methods, True) and ran() == ([], False)
    edit(code / "model.py")
    assert ran() == (everything, True) and ran() == ([], False)
    edit(code / "discover.py")  # the fine-tuned weights stay
    assert ran() == (everything[1:], True)
    (at / "jtt/made.json").unlink()  # killed before its end
    assert ran() == (["jtt"], True)
    (at / "subg/made.json").write_text("[1")
    assert ran() == (["subg"], True)
    (out / "protocol.json").unlink()
    assert ran("--steps=7")[0] == everything and scripts.ran[-1]["steps"] == "7"
    assert ran("--steps=7", "--threads=1", f"--cache_dir={out}") == ([], False)  # say nothing of the figures


def edit(path):
    path.write_text(path.read_text() + "# edited\n")


def test_other_photos_of_the_same_names_are_other_data(tmp_path):
    for name in ("cat", "dog"):
        for k in range(4):
            picture(tmp_path / f"set/{name}/{k}.png", k, name)
    first, one = (load_data(f"folder:{tmp_path / 'set'}").digest for _ in range(2))
    os.utime(tmp_path / "set/cat/0.png", (1, 1))
    assert first == one != load_data(f"folder:{tmp_path / 'set'}").digest


SCRIPT_RUNS = {  # what a script does -> what becomes of it, and the last line of its log
    "print('done')": (None, "done"),
    "import sys; print('train.py: --steps: no', file=sys.stderr); sys.exit(2)": (
        data.Complaint,
        "--steps: no",
    ),
    "print('a'); raise ValueError('of a kind')": (data.Complaint, "ValueError: of a kind"),
    "import sys; sys.exit(130)": (KeyboardInterrupt, ""),
    "raise KeyboardInterrupt": (KeyboardInterrupt, ""),
}


@pytest.mark.parametrize("source", SCRIPT_RUNS)
def test_a_script_runs_in_this_process_with_its_own_output_and_argv(tmp_path, monkeypatch, capsys, source):
    problem, line = SCRIPT_RUNS[source]
    mark = (
        "import os, sys; open(sys.argv[-1].split('=')[1] + '/who', 'w').write(f'{os.getpid()} {__name__}')\n"
    )
    for name in ("model.py", "data.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "train.py").write_text(mark + source)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "eval.py"))
    monkeypatch.setitem(script.PRODUCTS, "train.py", "who")
    before, out, config = list(sys.argv), tmp_path / "out", of(tmp_path)
    capsys.readouterr()
    with pytest.raises(problem) if problem else contextlib.nullcontext() as raised:
        assert (
            script.script_run("train.py", out, config, SimpleNamespace(digest="data"), steps=7) == out / "who"
        )
    assert (out / "who").read_text() == f"{os.getpid()} __main__" and sys.argv == before
    assert (out / "made.json").exists() == (problem is None)
    said = (out / "log.txt").read_text().splitlines()
    assert not line or line in said[-1] and capsys.readouterr() == ("", "")
    if problem is data.Complaint:
        assert "train.py --data=digits" in str(raised.value) and line in str(raised.value)
        assert "--steps=7" in str(raised.value) and "\n" not in str(raised.value)


def test_controlled_settings_of_other_flags_are_refused_and_more_of_them_are_not(settings, capsys):
    argv, out, _ = settings
    assert run([*argv, "--settings=1", "--mitigate=0"]) == 0
    assert tree_of(out)["settings"][0]["mitigation"] == {}
    refused(capsys, [*argv, "--steps=7"], "--steps=160")
    assert run(argv) == 0 and len(tree_of(out)["settings"]) == 3


@pytest.mark.parametrize(
    "more, expected",
    [
        ("--settings=0", "--settings"),
        ("--settings=51", "--settings"),
        ("--data=waterbirds:x", "--data"),
        ("--data=digits:/nowhere", "/nowhere"),
        ("--data=cutouts --feature=object=unicorn", "unicorn"),
        ("--data=cutouts:/nowhere", "/nowhere"),
        ("--data=coco:/nowhere --classes=a,b --feature=c", "/nowhere"),
        ("--regions=quads", "--regions"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(settings, capsys, more, expected):
    refused(capsys, [*settings[0], *more.split()], expected)


def test_settings_of_many_runs_are_for_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--protocol=ravl", "--settings=1", f"--out_dir={tmp_path}"]
    refused(capsys, argv, "--protocol", "several processes", "without torchrun")


def of(out, text=""):
    """The flags of controlled settings, as --protocol=ravl has them."""
    argv = [f"--out_dir={out}", f"--cache_dir={out}", "--protocol=ravl", *text.split()]
    return script.of_family(data.flags(dict(vars(script)), argv))


@pytest.mark.parametrize("kind, taken", script.FAMILIES.items())
def test_each_family_has_its_own_defaults_and_a_flag_goes_before_them(tmp_path, kind, taken):
    config = of(tmp_path, f"--data={kind}:x --steps=9")
    wanted = dict(zip(script.FAMILY, taken, strict=True), steps=9)
    assert {k: config[k] for k in script.FAMILY} == wanted


def test_a_base_model_is_of_the_flags_and_the_code_that_made_it(tmp_path, monkeypatch):
    here = tmp_path / "code"
    here.mkdir()
    for name in ("train.py", "model.py", "data.py", "eval.py"):
        (here / name).write_text("one")
    scripts = Scripts(monkeypatch, lambda _, path, at, words: data.write(at / "weights.safetensors", str(at)))
    monkeypatch.setattr(script, "__file__", str(here / "eval.py"))
    base, made = of(tmp_path), scripts.ran
    first = script.base_model(base)
    assert script.base_model(base) == first and len(made) == 1
    wanted = dict(pretrained="none", strength="0", seed="1000", method="finetune", steps="130")
    assert made[0].items() >= wanted.items()
    for more in ("--base_steps=7", "--seed=1", "--data=cutouts --base_steps=5"):
        script.base_model(of(tmp_path, more))
    edit(here / "train.py")
    script.base_model(base)
    assert len({run["out_dir"] for run in made}) == len(made) == 5 and made[3]["pretrained"] == "imagenet"
    for more, wanted in (("--pretrained=mine.pt", "mine.pt"), ("--model=RN50", ""), ("--data=cutouts", "")):
        assert script.base_model(of(tmp_path, more)) == wanted and len(made) == 5


def test_figures_of_a_setting_are_the_accuracies_of_images_and_kept(tmp_path, monkeypatch):
    encoder, weights = (
        load_encoder("tiny-conv", "none", device="cpu", dtype="float32"),
        tmp_path / "weights.safetensors",
    )
    torch.nn.init.normal_(encoder.module.visual.trunk.body[8].bias, std=0.1)
    data.write(weights, model.weights_bytes(encoder.module))
    config = of(tmp_path, "--dtype=float32")
    samples = script.setting_data(config, 0.99, 0)
    found = script.reached(config, weights, samples)
    encoder = load_encoder("tiny-conv", str(weights), device="cpu", dtype="float32")
    test = samples.keep(samples.split == 2)
    right = (unit(encoder.embed(test.items)) @ encoder.prompts(test.class_prompts()).T).argmax(1) == test.y
    groups = [float(right[test.group() == k].double().mean()) for k in range(20)]
    assert found["image_overall"] == pytest.approx(float(right.double().mean()), abs=0.01)
    assert found["groups"] == pytest.approx(groups, abs=0.03) and max(groups) > 0.3
    assert found["image_worst_group"] == min(found["groups"])
    path = tmp_path / "figures.json"
    assert json.loads(path.read_text()) == found

    def never(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(script, "load_encoder", never)
    assert script.reached(config, weights, samples) == found  # read, not computed
    for damage in (found | dict(made="x"), {k: found[k] for k in ("made", "groups")}, [found]):
        data.write_json(path, damage)
        with pytest.raises(ZeroDivisionError):
            script.reached(config, weights, samples)
    data.write_json(path, found)
    other = script.setting_data(config, 0.9, 0), config | dict(regions="grid:3")
    for flags, rows in ((config, other[0]), (other[1], samples)):
        with pytest.raises(ZeroDivisionError):
            script.reached(flags, weights, rows)
    weights.write_bytes(weights.read_bytes() + b" ")  # other weights
    with pytest.raises(ZeroDivisionError):
        script.reached(config, weights, samples)


def objects(root):
    """COCO with cats and dogs, each with and without a cup."""
    images, boxes = [], []
    for k in range(40):
        picture(root / f"train2017/{k}.png", k, "cat" if k % 2 else "dog", "sea", size=48)
        images.append(dict(id=k, file_name=f"{k}.png", width=48, height=48))
        for c in (1 + k % 2, 3)[: 1 + k // 2 % 2]:
            boxes.append(dict(image_id=k, category_id=c, bbox=[24 * (c == 3), 8, 20, 20]))
    names = [dict(id=k, name=name) for k, name in ((1, "cat"), (2, "dog"), (3, "cup"))]
    tree = dict(images=images, categories=names, annotations=boxes)
    data.write_json(root / "annotations/instances_train2017.json", tree)
    return f"--data=coco:{root} --classes=cat,dog --feature=cup"


@pytest.mark.parametrize("kind, regions, groups", [("cutouts", "grid:2", 12), ("coco", "grid:3", 4)])
def test_a_family_of_photos_runs_through_the_scripts_with_a_clip_resnet(
    tmp_path, monkeypatch, kind, regions, groups
):
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    image = dict(image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)
    data.write_json(tmp_path / "small-rn.json", dict(embed_dim=24, vision_cfg=image, text_cfg=text))
    open_clip.add_model_config(tmp_path / "small-rn.json")
    flags = "--data=cutouts --feature=scene" if kind == "cutouts" else objects(tmp_path / "coco")
    flags += (
        " --model=small-rn --pretrained=none --settings=1 --steps=1 --pairs=4 --quick_gelu=on --threads=1"
    )
    out, at = tmp_path / "out", tmp_path / "out/settings/0.99-0"
    argv = ["--protocol=ravl", *flags.split(), f"--out_dir={out}", f"--cache_dir={tmp_path / 'cache'}"]

    def leaves(scripts, path, where, words):
        commands.append(" ".join(sys.argv))
        scripts.real(path, run_name="__main__")
        if words["method"] == "finetune":
            reaches(where, words, [0.1, 0.9] * (groups // 2), [0.5] * 4, regions)

    monkeypatch.setattr(data, "LEAST", 1)
    commands = []
    Scripts(monkeypatch, leaves)
    assert run(argv) == 0
    tree, (train, discover) = tree_of(out), commands[:2]
    assert tree["config"]["regions"] == regions and tree["config"]["learning_rate"] == 3e-4
    both = ("--quick_gelu=on", "--strength=0.99", "--spurious=", flags.split()[0])
    assert all(word in train and word in discover for word in both)
    assert all(word in train for word in ("--pretrained=none", "--steps=1", "--pairs=4"))
    assert (
        f"--pretrained={at / 'finetune/weights.safetensors'}" in discover
        and f"--regions={regions}" in discover
    )
    with safe_open(at / "finetune/weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["record"])["quick_gelu"] is True
    assert (
        tree["settings"][0]["valid"] and {"ravl", "domino"} <= tree["settings"][0]["precision_at_10"].keys()
    )
    assert 0 < json.loads((at / "discovery/discovery.json").read_text())["base_rate"] < 0.5
    assert f"controlled settings, {kind}" in (out / "protocol.html").read_text()
    (at / "finetune/figures.json").unlink()
    assert run(argv) == 0  # the figures anew
    figures = json.loads((at / "finetune/figures.json").read_text())
    assert len(figures["groups"]) == groups and 0 <= figures["region_overall"] <= 1


# --- embeddings and predictions from elsewhere


def test_embeddings_from_elsewhere_are_measured_like_any_model(tmp_path, capsys):
    g = np.random.default_rng(0)
    x, y, place = g.normal(0, 1, (120, 8)), np.arange(120) % 3, g.integers(2, size=120)
    x[:, 0] += y
    text, names = g.normal(0, 1, (3, 8)), np.array(["cat", "dog", "owl"])
    split, path = np.repeat([0, 1, 2], 40), tmp_path / "e.npz"
    np.savez(path, embedding=x, y=y, place=place, text=text, classes=names, split=split)
    argv = [f"--data=embeddings:{path}", f"--out_dir={tmp_path}", "--protocol=zeroshot,probe,dfr"]
    assert run(argv) == 0
    found = entry(tmp_path, f"embeddings:{path}")
    test, cosine = split == 2, x @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T
    right = (cosine.argmax(1) == y)[test]
    zero, probe = (found["protocols"][p] for p in ("zeroshot", "probe"))
    assert zero["metrics"]["average"] == pytest.approx(right.mean())
    of = [right[(y[test] == c) & (place[test] == p)].mean() for c in range(3) for p in range(2)]
    assert [m["accuracy"] for m in zero["groups"]] == pytest.approx(of)
    fit = model.fit_probe(unit(torch.from_numpy(x).float()[split == 0]), torch.from_numpy(y)[split == 0], 0.8)
    right = fit.predict(unit(torch.from_numpy(x).float()))[test].numpy() == y[test]
    assert probe["metrics"]["average"] == pytest.approx(right.mean()) and "cells" in found["additivity"]
    assert table_of(tmp_path / "predictions.csv")[0]["image"] == f"{path}[80]"
    two = [*argv[:2], "--protocol=zeroshot", "--classes=owl,cat"]
    assert run(two) == 0
    both = test & (y != 1)
    right = (cosine[:, [2, 0]].argmax(1) == (y == 0))[both]
    assert entry(tmp_path, f"embeddings:{path}")["metrics"]["average"] == pytest.approx(right.mean())
    refused(capsys, [*argv, "--model=tiny"], "--model", "needs no model")
    refused(capsys, [*argv, "--composites=8"], "embeddings only", "composites")
    np.savez(path.with_name("bare.npz"), embedding=x, y=y)
    refused(capsys, [f"--data=embeddings:{tmp_path}/bare.npz", *argv[1:]], "array text [C, D]")


def predictions(path, *lines):
    path.write_text("\n".join(lines))
    return [f"--predictions={path}", f"--out_dir={path.parent}"]


def test_predictions_of_another_program_are_measured_like_any_model(tmp_path, capsys):
    rows = ["a,0,0,0,.9", "b,0,1,1,.8", "c,1,1,1,.7", "d,1,0,1,.6", "e,1,0,0,.9", "f,,0,0,.9"]
    rows += ["g,0,0,0,.9", "h,0,1,0,.9", "i,1,1,2,0.5", "j,1,0,NaN,.1"]
    argv = predictions(tmp_path / "p.csv", "img,label,background,pred,prob", *rows)
    assert run(argv) == 0
    found = entry(tmp_path, str(tmp_path / "p.csv"))
    assert found["protocol"] == "predictions" and found["metrics"]["n"] == 8
    groups = {(g["y"], g["place"]): (g["accuracy"], g["n"]) for g in found["groups"]}
    assert groups == {(0, 0): (1.0, 2), (0, 1): (0.5, 2), (1, 0): (0.5, 2), (1, 1): (0.5, 2)}
    m = found["metrics"]
    assert (m["worst_group"], m["avg_group_mean"], m["average"]) == (0.5, 0.625, 0.625)
    assert m["avg_train_weighted"] is None  # no photos of a training split
    # bins of 1/15: .9 five times, right 4; .8 wrong; .7 right; .6 right (its own); .5 wrong
    gaps = abs(3 / 4 - 0.9) * 4 + 0.8 + 0.3 + 0.4 + 0.5
    assert m["ece"] == pytest.approx(gaps / 8, abs=1e-6)
    assert found["classes"]["1"]["taken_for"] == {"2": 1, "0": 1}
    said = capsys.readouterr().out
    assert "background" in said and "2 of 10 rows lack y or predicted; left out" in said
    assert table_of(tmp_path / "groups.csv")[1]["n"] == "2"


def test_predictions_by_name_without_confidence_and_with_splits(tmp_path, capsys):
    lines = ["truth,bg,said,split", "cat,sea,cat,train", "dog,sea,cat,train", "cat,wood,cat,train"]
    lines += ["cat,sea,dog,test", "dog,wood,dog,test", "dog,sea,dog,test", "dog,sea,cat,test"]
    argv = [*predictions(tmp_path / "p.csv", *lines), "--columns=y=truth,place=bg,predicted=said"]
    assert run(argv) == 0
    found = entry(tmp_path, str(tmp_path / "p.csv"))
    assert found["metrics"]["n"] == 4 and found["metrics"]["ece"] is None
    assert [(g["y"], g["place"], g["accuracy"]) for g in found["groups"]] == [
        (0, 0, 0),
        (1, 0, 0.5),
        (1, 1, 1),
    ]
    assert found["metrics"]["avg_train_weighted"] == 0.25  # train: cat on sea 1, dog on sea 1, dog on wood 0
    assert run([*argv, "--split=train"]) == 0
    assert entry(tmp_path, str(tmp_path / "p.csv"))["metrics"]["average"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "lines, more, expected",
    [
        (("y,guess", "0,0"), (), "predicted"),
        (("y,predicted,confidence", "0,0,.5", "1,1,87.5"), (), "confidence='87.5'"),
        (("y,predicted", "cat,0", "dog,1"), (), "no value in both y and predicted"),
        (("y,predicted,split", "0,0,test", "1,1,tset"), (), "'tset'"),
        (("y,predicted", "0,0", "1,1"), ("--model=tiny",), "--model"),
        (("y,predicted", "0,0", "1,1"), ("--data=scenes",), "--data"),
        (("y,predicted", "0,0", "1,1"), ("--columns=y=nothing",), "--columns"),
    ],
)
def test_predictions_that_cannot_be_read_are_one_line(tmp_path, capsys, lines, more, expected):
    refused(capsys, [*predictions(tmp_path / "p.csv", *lines), *more], expected)


def test_a_probability_of_the_second_class_is_no_confidence_of_the_first(tmp_path, capsys):
    lines = ["label,pred,prob", "0,0,.1", "0,0,.2", "1,1,.9", "1,0,.4", "0,1,.7"]
    assert run(predictions(tmp_path / "p.csv", *lines)) == 0
    m = entry(tmp_path, str(tmp_path / "p.csv"))["metrics"]
    assert m["ece"] == pytest.approx((0.1 + 0.2 + 0.1 + 0.6 + 0.7) / 5, abs=1e-6)
    assert "read as those of '1'" in capsys.readouterr().out
    assert run(predictions(tmp_path / "p.csv", *lines, "0,0,.9")) == 0  # of neither
    assert entry(tmp_path, str(tmp_path / "p.csv"))["metrics"]["ece"] is None


def test_labels_spelled_otherwise_or_counted_from_elsewhere(tmp_path, capsys):
    lines = [
        "y,place,predicted",
        "indigo_bunting,sea,Indigo Bunting",
        "jay,sea ,jay",
        "jay,land,indigo bunting",
    ]
    assert run(predictions(tmp_path / "p.csv", *lines)) == 0
    found = entry(tmp_path, str(tmp_path / "p.csv"))
    assert [(g["n"], g["accuracy"]) for g in found["groups"]] == [(1, 1.0), (1, 0.0), (1, 1.0)]
    refused(
        capsys, predictions(tmp_path / "p.csv", "y,pred", "-1,0", "1,1", "1,0"), "-1, 1", "the same numbers"
    )
    assert run(predictions(tmp_path / "p.csv", "y,pred", "1,0", "2,1", "3,2")) == 0
    assert "counts from 0" in capsys.readouterr().out


def test_scores_of_each_class_and_our_own_table_are_predictions(tmp_path, capsys):
    g = np.random.default_rng(0)
    z, y, place = g.normal(size=(60, 3)), g.integers(3, size=60), g.integers(2, size=60)
    z[range(60), y] += 1
    lines = ["img,y,place,logit_0,logit_1,logit_2"]
    lines += [f"{k}.jpg,{y[k]},{place[k]},{z[k, 0]},{z[k, 1]},{z[k, 2]}" for k in range(60)]
    assert run(predictions(tmp_path / "p.csv", *lines)) == 0
    found, right = entry(tmp_path, str(tmp_path / "p.csv")), z.argmax(1) == y
    of = [right[(y == c) & (place == p)].mean() for c in range(3) for p in range(2)]
    assert [m["accuracy"] for m in found["groups"]] == pytest.approx(of)
    shutil.copy(tmp_path / "predictions.csv", tmp_path / "ours.csv")
    assert run([f"--predictions={tmp_path / 'ours.csv'}", f"--out_dir={tmp_path}"]) == 0
    again = entry(tmp_path, str(tmp_path / "ours.csv"))
    assert again["groups"] == found["groups"]
    assert again["metrics"]["ece"] == pytest.approx(found["metrics"]["ece"], abs=1e-3)
    two = ["class,a,a confidence,b,b confidence", "x,x,.9,y,.8", "y,x,.9,y,.8"]
    refused(capsys, predictions(tmp_path / "q.csv", *two), "predictions of a, b", "--columns=predicted=a")


def test_an_image_that_is_listed_twice_in_predictions_is_said(tmp_path, capsys):
    assert run(predictions(tmp_path / "p.csv", "path,y,pred", "a,0,0", "a,0,1", "b,1,1")) == 0
    assert "1 rows are of an image that stands above" in capsys.readouterr().out


def test_scores_that_are_none_are_not_taken_for_predictions(tmp_path, capsys):
    def taken(*lines):
        assert run(predictions(tmp_path / "p.csv", *lines)) == 0
        return entry(tmp_path, str(tmp_path / "p.csv"))["metrics"]

    sigmoids = taken("y,prob_0,prob_1", "0,.9,.2", "1,.1,.8")  # as they are: they need not sum to 1
    assert sigmoids["average"] == 1 and sigmoids["ece"] == pytest.approx(0.15)
    assert taken("y,score_0,score_1", "0,9,2", "1,1,8").get("ece") is None
    own = taken("y,confidence,logit_0,logit_1", "0,.7,3,1", "1,.7,0,2")
    assert own["ece"] == pytest.approx(0.3)
    assert taken("y,pred,confidence", "0,0,.4999999", "1,1,.9", "1,0,.8")["ece"] is not None  # a tie
    refused(capsys, predictions(tmp_path / "p.csv", "y,logit_0,logit_1", "0,nan,1", "1,0,1"), "not finite")
    other = predictions(tmp_path / "p.csv", "y,logit_0,logit_1", "1,2,1", "2,0,1")  # y counts from 1
    refused(capsys, other, "predicted")


def test_groups_that_a_protocol_has_no_photo_of_stay_empty_and_the_others_in_their_column(tmp_path):
    sizes = {("cat", "a"): 30, ("cat", "b"): 2, ("dog", "a"): 30, ("dog", "b"): 30}  # two: none is for test
    y, place = zip(*[pair for pair, n in sizes.items() for _ in range(n)], strict=True)
    z = np.random.default_rng(0).normal(size=(92, 8)).astype("float32") + (np.array(y) == "cat")[:, None]
    np.savez(tmp_path / "x.npz", embedding=z, y=y, place=place, text=np.eye(8)[:2], classes=["cat", "dog"])
    words = f"--data=embeddings:{tmp_path}/x.npz", "--protocol=zeroshot,probe", "--device=cpu"
    assert run([*words, f"--out_dir={tmp_path}/out"]) == 0
    models = results(tmp_path / "out")["models"]
    columns = [[g and g["n"] for g in groups] for groups in script.by_group(models).values()]
    assert columns == [[30, 6], [2, None], [30, 6], [30, 6]]
    assert "n = 6, 30" in (tmp_path / "out/eval.html").read_text()


def test_photos_without_a_label_among_others_count_as_neither_right_nor_wrong(tmp_path, capsys):
    y, z = np.repeat([0, 1, -1], 20), np.repeat(np.eye(2), [40, 20], 0)
    np.savez(
        tmp_path / "x.npz", embedding=z[np.r_[:20, 40:60, 20:40]], y=y, text=np.eye(2), classes=["a", "b"]
    )
    words = f"--data=embeddings:{tmp_path}/x.npz", "--protocol=zeroshot", "--device=cpu"
    assert run([*words, f"--out_dir={tmp_path}/out"]) == 0
    assert "20 of 60 photos have no label: they are left out" in capsys.readouterr().out
    assert results(tmp_path / "out")["models"].popitem()[1]["metrics"]["average"] == 1
