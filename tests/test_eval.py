"""eval.py from its command line and piece by piece: protocols, metrics, cache, comparison of models, shards, bad input."""

import csv
import functools
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import data
import eval as script
import model
from model import unit
from conftest import run_script

EVAL = str(Path(data.__file__).with_name("eval.py"))
run = functools.partial(run_script, EVAL)
COLOURS = {"cat": (132, 118, 110), "dog": (118, 120, 128), "sea": (30, 120, 160), "wood": (60, 130, 50)}


def picture(path, seed, *names, size=32):
    """A picture with the colours of its class and place, one above the other, and noise."""
    g = np.random.default_rng(seed)
    a = (
        np.concatenate([np.full((size // len(names), size, 3), COLOURS[n]) for n in names])
        + g.normal(0, 70, (size, size, 3))
        + g.normal(0, 12, 3)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a.clip(0, 255).astype("uint8")).save(path)


def pets(root, counts=((9, 1, 1, 9), (8, 8, 8, 8), (6, 5, 4, 7))):
    """folder:DIR with groups cat/dog x sea/wood. counts: per split, images per group."""
    for split, groups in zip(data.SPLITS, counts, strict=False):
        for g, n in enumerate(groups):
            for k in range(n):
                c, p = ("cat", "dog")[g // 2], ("sea", "wood")[g % 2]
                picture(root / split / c / p / f"{k}.png", [g, k, data.SPLITS.index(split)], c, p)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return pets(tmp_path_factory.mktemp("pets") / "set").parent


def words(files, out, *more):
    one = ["--model=tiny"] * (not any(w.startswith("--models=") for w in more))
    return [
        f"--data=folder:{files / 'set'}",
        *one,
        "--dtype=float32",
        f"--cache_dir={files / 'cache'}",
        f"--out_dir={out}",
        *more,
    ]


def results(out):
    return json.loads((out / "eval.json").read_text())


def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tiny():
    return model.load_encoder("tiny", device="cpu")


@pytest.fixture(scope="module")
def everything(files):
    """One run with every protocol that tiny can: its out_dir."""
    assert (
        run(
            words(
                files,
                files / "everything",
                "--protocol=zeroshot,probe,clip_probe,dfr,fewshot",
                "--shots=1,3",
                "--draws=3",
            )
        )
        == 0
    )
    return files / "everything"


@pytest.fixture(scope="module")
def embedded(files, tiny):
    samples = data.load_data(f"folder:{files / 'set'}", splits=False)
    z, _ = model.embed(tiny, samples.items, "", dtype="float32")
    return samples, z


# --- what it writes


def test_contract_of_a_grouped_set(everything):
    r = results(everything)
    m = r["models"]["tiny"]
    assert {"metrics", "classes", "groups"} <= set(m) and {
        "worst_group",
        "avg_group_mean",
        "avg_train_weighted",
        "average",
        "ece",
    } <= set(m["metrics"])
    assert (
        m["protocol"] == "zeroshot"
        and list(m["protocols"]) == ["zeroshot", "probe", "clip_probe", "dfr", "fewshot_1", "fewshot_3"]
        and m["metrics"] == m["protocols"]["zeroshot"]["metrics"]
    )
    for part in m["protocols"].values():
        accuracy = [g["accuracy"] for g in part["groups"]]
        assert [(g["y"], g["place"], g["n"]) for g in part["groups"]] == [
            (0, 0, 6),
            (0, 1, 5),
            (1, 0, 4),
            (1, 1, 7),
        ]
        assert (
            part["metrics"]["worst_group"] == pytest.approx(min(accuracy))
            or part is m["protocols"]["fewshot_1"]
            or part is m["protocols"]["fewshot_3"]
        )
        assert part["metrics"]["avg_group_mean"] == pytest.approx(sum(accuracy) / 4)
        assert part["metrics"]["avg_train_weighted"] == pytest.approx(
            sum(a * n for a, n in zip(accuracy, (9, 1, 1, 9), strict=False)) / 20
        )
        assert part["metrics"]["average"] == pytest.approx(
            sum(a * n for a, n in zip(accuracy, (6, 5, 4, 7), strict=False)) / 22
        )
        assert all(g["interval"][0] <= g["accuracy"] <= g["interval"][1] for g in part["groups"])
        low, high = part["metrics"]["worst_group_interval"]
        if part not in (m["protocols"]["fewshot_1"], m["protocols"]["fewshot_3"]):
            bounds = [
                model.wilson(g["accuracy"] * g["n"], g["n"], 2.4977) for g in part["groups"]
            ]  # simultaneous over four groups
            assert (low, high) == pytest.approx(tuple(map(min, zip(*bounds, strict=False))), abs=1e-4)
        assert part["metrics"]["seen_in_training"] == 0
        assert 0 <= low <= part["metrics"]["worst_group"] + 1e-9 and low <= high <= 1
    assert (
        set(m["classes"]) == {"cat", "dog"}
        and m["classes"]["cat"]["n"] == 11
        and set(m["classes"]["cat"]["places"]) == {"sea", "wood"}
    )
    assert (
        set(m["additivity"]["cells"]) == {"flat", "sphere"}
        and r["pending"] == []
        and r["failed"] == {}
        and r["config"]["shots"] == "1,3"
    )
    assert sorted(os.listdir(everything)) == [
        "eval.csv",
        "eval.html",
        "eval.json",
        "groups.csv",
        "predictions.csv",
    ]


def test_photos_that_trained_the_probe_are_counted(files, capsys):
    assert run(words(files, files / "seen", "--protocol=probe", "--split=train")) == 0
    said, m = capsys.readouterr().out, results(files / "seen")["models"]["tiny"]["metrics"]
    assert (
        m["seen_in_training"] == m["n"] > 0
        and f"WARNING: probe was trained on {m['n']} of the {m['n']} photos" in said
    )


def test_tables_agree_with_the_json(everything):
    m = results(everything)["models"]["tiny"]["protocols"]
    for row in table_of(everything / "eval.csv"):
        assert float(row["worst_group"]) == m[row["protocol"]]["metrics"]["worst_group"]
    groups = table_of(everything / "groups.csv")
    assert len(groups) == 4 * 6 and {(r["class"], r["place"], r["n"]) for r in groups} == {
        ("cat", "sea", "6"),
        ("cat", "wood", "5"),
        ("dog", "sea", "4"),
        ("dog", "wood", "7"),
    }
    photos = table_of(everything / "predictions.csv")
    right = [r["class"] == r["tiny probe"] for r in photos]
    assert (
        len(photos) == 22
        and sum(right) / 22 == pytest.approx(m["probe"]["metrics"]["average"])
        and all(os.path.isfile(r["image"]) for r in photos)
    )


def test_page_is_self_contained_and_shows_numbers_prompts_and_pictures(everything):
    text = (everything / "eval.html").read_text()
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", text)
    assert (
        links
        and all(link.startswith("data:image/jpeg;base64,") for link in links)
        and not re.search(r"https?:|url\(|@import|<script", text)
    )
    assert (
        f"{results(everything)['models']['tiny']['metrics']['worst_group']:.3f}" in text
        and "a photo of a cat." in text
        and "taken for" in text
    )


# --- protocols, against the same by hand


def by_hand(everything, protocol, predicted, samples):
    correct = (predicted == samples.y)[samples.split == 2]
    y, place = samples.y[samples.split == 2], samples.place[samples.split == 2]
    wanted = model.group_metrics(correct, y, place, samples.counts(0), 2)
    got = results(everything)["models"]["tiny"]["protocols"][protocol]
    assert [g["accuracy"] for g in got["groups"]] == pytest.approx([g["accuracy"] for g in wanted["groups"]])


def test_zeroshot_is_the_nearest_prompt(everything, embedded, tiny):
    samples, z = embedded
    text = tiny.texts(["a photo of a cat.", "a photo of a dog."])
    by_hand(everything, "zeroshot", (unit(z) @ text.T).argmax(1), samples)


def test_probe_is_the_erm_of_train(everything, embedded):
    samples, z = embedded
    train = samples.split == 0
    by_hand(
        everything, "probe", model.fit_probe(unit(z)[train], samples.y[train], 0.8).predict(unit(z)), samples
    )


def test_clip_probe_has_the_penalty_in_units_of_the_raw_embedding(everything, embedded):
    samples, z = embedded
    x, y = z[samples.split == 0].double(), samples.y[samples.split == 0]
    theta = torch.zeros(x.shape[1] + 1, dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss():  # scikit-learn's: C sum_n CE_n + |w|^2 / 2
        optimiser.zero_grad()
        value = (
            0.316 * torch.nn.functional.softplus(-(2 * y - 1) * (x @ theta[:-1] + theta[-1])).sum()
            + theta[:-1].square().sum() / 2
        )
        value.backward()
        return value

    optimiser.step(loss)
    by_hand(
        everything, "clip_probe", (z.double() @ theta[:-1].detach() + theta[-1].detach() > 0).long(), samples
    )


def test_dfr_is_the_shared_one_on_the_validation_set(everything, embedded):
    samples, z = embedded
    val = samples.split == 1
    fit = model.dfr(
        unit(z)[val], samples.y[val], samples.group()[val], torch.ones(int(val.sum()), dtype=torch.bool), 0
    )
    by_hand(everything, "dfr", fit.predict(unit(z)), samples)


def test_dfr_averages_its_retrains_biases_too():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    x = (
        torch.randn(400, 8, generator=g) * 0.01 + 0.5 + 0.01 * y[:, None]
    )  # small scale, far from zero: a wrong bias shows
    assert (
        model.dfr(x, y, y * 2, torch.ones(400, dtype=torch.bool), 0).predict(x) == y
    ).double().mean() > 0.85


def test_rows_on_different_photos_say_how_many():
    samples = data.Samples(
        "x", [], torch.empty(0), torch.empty(0), torch.empty(0), ["a", "b"], ["anywhere"], [], []
    )

    def row(n):
        return dict(metrics=dict(n=n, average=0.5), groups=[])

    def both(*ns):
        return dict(m=dict(protocols={str(k): row(n) for k, n in enumerate(ns)}))

    assert script.columns(both(12, 12), samples) == ["average"] and script.columns(both(60, 12), samples) == [
        "n",
        "average",
    ]


def test_fewshot_is_the_mean_of_its_draws(files, tmp_path, everything):
    one = results(everything)["models"]["tiny"]["protocols"]["fewshot_3"]["groups"]
    assert all(abs(g["accuracy"] * g["n"] * 3 - round(g["accuracy"] * g["n"] * 3)) < 1e-9 for g in one)
    out = model.load_tensors(
        next(
            p
            for p in (files / "cache").glob("result-*")
            if model.load_tensors(p).get("predicted", torch.empty(0)).shape[:1] == (3,)
        )
    )
    assert out["predicted"].shape == (3, 22) and not torch.equal(out["confidence"][0], out["confidence"][1])


def test_more_shots_than_images_are_said(files, tmp_path, capsys):
    assert run(words(files, tmp_path, "--protocol=fewshot", "--shots=10,99", "--draws=1")) == 0
    said = capsys.readouterr().out
    assert (
        "fewshot_99: 2 of 2 classes have fewer training images, cat the fewest, 10;" in said
        and "fewshot_10:" not in said
    )


def test_classifier_rows_over_all_labels_and_among_those_of_a_pair(tmp_path):
    lite0 = model.load_encoder("lite0", device="cpu")
    for k, name in enumerate(
        (
            "10 brambling/common-grass",
            "16 bulbul/common-sky",
            "10 brambling/counter-sky",
            "16 bulbul/counter-grass",
        )
    ):
        for n in range(3):
            picture(tmp_path / f"set/{name}/{n}.png", [k, n], *("cat", "dog") if k % 2 else ("sea", "wood"))
    flags = [
        "--model=lite0",
        f"--cache_dir={tmp_path / 'cache'}",
        "--dtype=float32",
        "--picker=self",
        f"--data=counteranimal:{tmp_path / 'set'}",
    ]
    assert run([*flags, f"--out_dir={tmp_path / 'all'}"]) == 0
    samples = data.load_data(f"counteranimal:{tmp_path / 'set'}", splits=False)
    rows, bias = lite0.classifier()
    logits = model.embed(lite0, samples.items, "", dtype="float32")[0] @ rows.T + bias
    names = data.imagenet_names()
    assert [r["lite0 classifier"] for r in table_of(tmp_path / "all/predictions.csv")] == [
        names[k] for k in logits.argmax(1)
    ]
    m = results(tmp_path / "all")["models"]["lite0"]
    assert {
        "common",
        "counter",
        "drop",
        "common_plain",
        "counter_plain",
        "common_1v20",
        "counter_1v20",
        "drop_1v20",
        "effective_robustness",
    } <= set(m["metrics"])
    assert {"common", "counter", "drop", "n_common", "common_1v20"} <= set(m["classes"]["brambling"])

    assert (
        run(
            [
                *flags[:-1],
                f"--data=counteranimal:{tmp_path / 'set'}:brambling,bulbul",
                f"--out_dir={tmp_path / 'pair'}",
            ]
        )
        == 0
    )
    pair = data.load_data(f"counteranimal:{tmp_path / 'set'}:brambling,bulbul", splits=False)
    logits = model.embed(lite0, pair.items, "", dtype="float32")[0] @ rows.T + bias
    right = (logits[:, [10, 16]].argmax(1) == pair.y).double().mean()
    assert results(tmp_path / "pair")["models"]["lite0"]["protocols"]["classifier"]["metrics"][
        "average"
    ] == pytest.approx(float(right))


@pytest.mark.skipif(
    "FLOCK_DATA" not in os.environ, reason="FLOCK_DATA (a folder with imagenet_samples) is not set"
)
def test_lite0_on_imagenet_photos(tmp_path):
    root = tmp_path / "some"
    root.mkdir()
    for path in sorted((Path(os.environ["FLOCK_DATA"]) / "imagenet_samples").iterdir())[::8]:
        (root / path.name).symlink_to(path)
    assert (
        run([f"--data=imagenet:{root}", "--model=lite0", f"--out_dir={tmp_path / 'out'}", "--cache_dir="])
        == 0
    )
    assert (
        results(tmp_path / "out")["models"]["lite0"]["metrics"]["average"] >= 0.75
    )  # 125 photos; .82 of all 1000


# --- metrics


def fixture():
    with open(Path(__file__).parent / "fixtures/counteranimal.csv", newline="") as file:
        return list(
            csv.DictReader(file)
        )  # per-class accuracies in per cent, from the appendix of the CounterAnimal paper (NeurIPS 2024)


@pytest.mark.parametrize(
    "name, common, counter",
    [("L400M_B16", 73.11, 52.17), ("L400M_B32", 67.13, 36.95), ("OAI_B32", 69.13, 45.62)],
)
def test_published_class_tables_give_the_published_averages(name, common, counter):
    rows, n = fixture(), 10000

    def right(k):
        return torch.arange(n) < round(100 * float(k))

    correct = torch.cat([right(r[f"{name}_{kind}"]) for r in rows for kind in ("common", "counter")])
    y, place = torch.arange(45).repeat_interleave(2 * n), torch.arange(2).repeat_interleave(n).repeat(45)
    classes = {}
    m = script.counter_metrics(correct, y, place, classes, [r["imagenet_idx"] for r in rows])
    assert abs(100 * m["common"] - common) < 0.15 and abs(100 * m["counter"] - counter) < 0.15
    assert (
        m["drop"] == pytest.approx(m["common"] - m["counter"])
        and m["drop_interval"][0] < m["drop"] < m["drop_interval"][1]
    )
    assert (
        classes["9"]["common"] == pytest.approx(float(rows[0][f"{name}_common"]) / 100)
        and classes["9"]["n_counter"] == n
    )


def test_b16_laion400m_is_73_11_and_52_18():
    def mean(column):
        return sum(float(r[column]) for r in fixture()) / 45

    assert (round(mean("L400M_B16_common"), 2), round(mean("L400M_B16_counter"), 2)) == (73.11, 52.18)


def test_class_balance_differs_from_the_plain_average():
    correct = torch.tensor([True] * 9 + [False] + [True])
    y, place = torch.tensor([0] * 9 + [1] + [0]), torch.tensor([0] * 10 + [1])
    m = script.counter_metrics(correct, y, place, {}, ["a", "b"], "_1v20")
    assert (
        m["common_1v20"] == 0.5
        and m["common_plain_1v20"] == 0.9
        and m["counter_1v20"] == 1
        and set(m)
        == {
            f"{k}_1v20"
            for k in ("common", "counter", "drop", "drop_interval", "common_plain", "counter_plain")
        }
    )


def test_drop_interval_has_the_width_of_the_binomial():
    n, p = 400, 0.7
    correct = (torch.arange(n) < p * n).repeat(2)
    m = script.counter_metrics(
        correct, torch.zeros(2 * n, dtype=torch.long), torch.arange(2).repeat_interleave(n), {}, ["a"]
    )
    low, high = m["drop_interval"]
    assert high - low == pytest.approx(2 * 1.96 * (2 * p * (1 - p) / n) ** 0.5, rel=0.1)


def test_line_goes_through_points_on_a_line_of_logits_and_robustness_is_the_distance():
    line = (-0.5, 1.2)
    points = [(x, script.on_line(line, x)) for x in (0.3, 0.5, 0.8, 0.9)]
    assert script.line_through(points) == pytest.approx(line) and script.on_line(line, 0.5) == pytest.approx(
        1 / (1 + np.exp(0.5))
    )


def compared(shares):
    """CounterAnimal's two classes of 10 common and 10 counter photos each, and models that have such (common, counter) shares right."""
    y, place = torch.arange(40) // 20, torch.arange(40) // 10 % 2
    samples = data.samples_of(
        "counteranimal:x",
        [""] * 40,
        y.tolist(),
        place.tolist(),
        [2] * 40,
        ["a", "b"],
        ["common", "counter"],
        imagenet=[[7], [8]],
    )
    samples.labels, samples.prompts = [str(k) for k in range(1000)], [[str(k)] for k in range(1000)]
    outcomes = {
        name: dict(
            zeroshot=outcome(
                [
                    7 + c if k % 10 < 10 * share[p] else 0
                    for k, (c, p) in enumerate(zip(y.tolist(), place.tolist(), strict=False))
                ]
            )
        )
        for name, share in shares.items()
    }
    return {name: script.measured(o, samples) for name, o in outcomes.items()}, outcomes, samples


@pytest.mark.parametrize("line", ["published", "models"])
def test_the_page_draws_the_line_that_robustness_is_measured_from(monkeypatch, line):
    monkeypatch.setattr(script, "line", line)
    monkeypatch.setattr(script, "worst", lambda *_: "")
    drawn = []
    monkeypatch.setattr(script, "scatter", lambda dots, x, y, curve: drawn.append(dict(curve)) or "")
    results, outcomes, samples = compared(dict(a=(0.5, 0.1), b=(0.7, 0.2), c=(0.9, 0.6)))
    script.compare(results, outcomes, samples)
    script.report(results, outcomes, samples, {}, {}, None)
    for r in results.values():
        m = r["metrics"]
        assert m["counter"] - m["effective_robustness"] == pytest.approx(drawn[0][round(m["common"], 2)])


def test_two_models_make_no_line(monkeypatch, capsys):
    monkeypatch.setattr(script, "line", "models")
    results, outcomes, samples = compared(dict(a=(0.5, 0.1), b=(0.7, 0.2)))
    script.compare(results, outcomes, samples)
    assert (
        "needs three" in capsys.readouterr().out and results["a"]["metrics"]["effective_robustness"] is None
    )


@pytest.mark.parametrize(
    "name, known",
    [
        ("timm:resnet50", True),
        ("timm:vit_base_patch16_224", True),
        ("ViT-B-32@laion400m_e32", True),
        ("ViT-L-14@openai", True),
        ("timm:resnet50d.ra2_in1k", False),
        ("timm:resnet50.fb_swsl_ig1b_ft_in1k", False),
        ("timm:convnext_large_mlp.clip_laion2b_augreg", False),
        ("timm:vit_base_patch16_224_miil.in21k", False),
        ("timm:resnet50@mine.pt", False),
        ("ViT-B-32@laion400m_e31", False),
    ],
)
def test_published_figures_stand_beside_the_published_model_only(name, known):
    results, _, samples = compared({name: (0.5, 0.1)})
    assert (f"{name}: published" in script.summary(results, samples)) == known


def test_calibration_error_by_hand():
    confidence, correct = (
        torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55]),
        torch.tensor([1, 1, 1, 0, 1, 1]).bool(),
    )
    assert script.ece(confidence, correct) == pytest.approx((4 * (0.95 - 0.75) + 2 * (1 - 0.55)) / 6)
    assert script.ece(torch.ones(5), torch.ones(5).bool()) == 0


def outcome(predicted):
    return dict(
        index=torch.arange(len(predicted)),
        predicted=torch.tensor(predicted)[None].int(),
        confidence=torch.full((1, len(predicted)), 0.6),
        skipped=0,
    )


def test_bg_gap_is_mixed_same_less_mixed_rand():
    y = [0, 1] * 6
    samples = data.samples_of(
        "in9:x",
        [""] * 12,
        y,
        [0] * 4 + [1] * 4 + [2] * 4,
        [2] * 12,
        ["dog", "bird"],
        ["original", "mixed_same", "mixed_rand"],
    )
    samples.labels = samples.classes
    m = script.measure(outcome([0, 1, 0, 1] + [0, 1, 0, 0] + [0, 0, 1, -1]), samples, "classifier")["metrics"]
    assert (m["original"], m["mixed_same"], m["mixed_rand"], m["bg_gap"]) == (1, 0.75, 0.25, 0.5) and m[
        "bg_gap_interval"
    ][0] < 0.5 < m["bg_gap_interval"][1]


def test_wrong_labels_are_counted_by_name():
    samples = data.samples_of(
        "folder:x", [""] * 5, [0] * 4 + [1], [0] * 5, [2] * 5, ["cat", "dog", "fox"], ["anywhere"]
    )
    samples.labels = samples.classes
    assert script.measure(outcome([2, 2, 1, 0, 1]), samples, "zeroshot")["classes"]["cat"]["taken_for"] == {
        "fox": 2,
        "dog": 1,
    }


# --- the 20 labels, regions, maps


class Fake:
    """An encoder whose text embeddings are given."""

    reads, logit_scale, fingerprint, name = True, 10.0, "fake", "fake"

    def __init__(self, rows):
        self.rows = rows

    def texts(self, prompts):
        return self.rows[[int(p) for p in prompts]]


def test_one_of_twenty_is_among_the_labels_nearest_to_the_class(monkeypatch):
    monkeypatch.setattr(script, "picker", "self")
    monkeypatch.setattr(script, "cache_dir", "")
    rows = unit(torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)))
    samples = data.samples_of(
        "counteranimal:x",
        [""] * 6,
        [0, 0, 0, 1, 1, 1],
        [0, 1, 0, 1, 0, 1],
        [2] * 6,
        ["a", "b"],
        ["common", "counter"],
        imagenet=[[7], [8]],
    )
    samples.labels, samples.prompts = [str(k) for k in range(1000)], [[str(k)] for k in range(1000)]
    z = 3 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    twenty = script.pick_labels(Fake(rows), samples, z, None, (0, 1))
    for c in (0, 1):
        mean = (unit(z) @ rows.T)[3 * c : 3 * c + 3].mean(0)
        assert set(twenty[c].tolist()) == set(mean.argsort(descending=True)[:20].tolist())
    out = script.classify(
        "zeroshot", Fake(rows), samples, z, unit, torch.ones(6, dtype=torch.bool), twenty, None
    )
    best = [max(twenty[k // 3].tolist(), key=lambda label: float(unit(z)[k] @ rows[label])) for k in range(6)]
    assert (
        out["predicted_1v20"].tolist() == best
        and out["predicted"][0].tolist() == (unit(z) @ rows.T).argmax(1).tolist()
    )
    assert script.targets(samples, "zeroshot").tolist() == [7, 7, 7, 8, 8, 8] and script.targets(
        samples, "probe"
    ).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_map_that_changes_nothing_gives_the_embedding_back(power):
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    z = z if power == 1 else z.abs()
    g = model.Map(torch.full((8,), 0.1), torch.eye(8), power)
    assert torch.allclose(script.repaired(g, z), z, atol=1e-5)


def test_checkpoint_of_train_is_applied_first_and_one_of_another_encoder_is_refused(
    files, tmp_path, tiny, embedded, capsys
):
    samples, z = embedded
    g = model.Map(unit(z).mean(0), torch.diag(torch.linspace(1, 0, 64)))

    def save(name, **more):
        return model.save_checkpoint(
            tmp_path / name,
            dict(
                dict(
                    config=dict(model="tiny", pretrained=""),
                    fingerprint=tiny.fingerprint,
                    map=g.state_dict(),
                    power=1.0,
                ),
                **more,
            ),
        )

    save("ckpt.pt")
    assert (
        run(words(files, tmp_path / "out", f"--ckpt={tmp_path / 'ckpt.pt'}", "--protocol=zeroshot,probe"))
        == 0
    )
    train = samples.split == 0
    by_hand(
        tmp_path / "out", "probe", model.fit_probe(g(z)[train], samples.y[train], 0.8).predict(g(z)), samples
    )
    text = tiny.texts(["a photo of a cat.", "a photo of a dog."])
    by_hand(tmp_path / "out", "zeroshot", (unit(script.repaired(g, z)) @ text.T).argmax(1), samples)
    save("other.pt", fingerprint="another", config=dict(model="lite0", pretrained=""))
    capsys.readouterr()
    refused(
        capsys, words(files, tmp_path / "no", f"--ckpt={tmp_path / 'other.pt'}"), "other.pt", "lite0", "tiny"
    )
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    refused(capsys, words(files, tmp_path / "no", f"--ckpt={tmp_path / 'bad.pt'}"), "bad.pt")


def test_regions_that_show_the_object_are_classified_too(tmp_path, tiny):
    rows = []
    for k in range(24):
        y, place, split = k % 2, k // 2 % 2, k // 8
        picture(tmp_path / f"set/{k}.png", k, "cat" if y else "dog", "sea", size=60)
        mask = np.zeros((60, 60), "uint8")
        mask[: 20 + 14 * y, :20] = 255  # the upper left cell, and for y = 1 most of the one below
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"masks/{k}.png")
        rows.append(f"{k},{k}.png,{y},{split},{place},-")
    (tmp_path / "set/metadata.csv").write_text("\n".join([",".join(data.WATERBIRDS_COLUMNS), *rows]))
    argv = [
        f"--data=waterbirds:{tmp_path / 'set'}",
        f"--masks={tmp_path / 'masks'}",
        "--model=tiny",
        f"--out_dir={tmp_path / 'out'}",
        "--cache_dir=",
        "--protocol=probe",
    ]
    assert run(argv) == 0
    m = results(tmp_path / "out")["models"]["tiny"]["metrics"]
    assert m["regions"] == 4 * 1 + 4 * 2 and 0 <= m["region_worst_group"] <= m["region_overall"] <= 1


# --- the cache, several models, interruption


def test_a_warm_run_loads_no_model_and_embeds_nothing(files, everything, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("not needed")

    for name in ("load_encoder", "embed", "dfr", "fit_probe"):
        monkeypatch.setattr(model, name, never)
    assert (
        run(
            words(
                files,
                tmp_path,
                "--protocol=zeroshot,probe,clip_probe,dfr,fewshot",
                "--shots=1,3",
                "--draws=3",
            )
        )
        == 0
    )
    assert results(tmp_path)["models"] == results(everything)["models"]


def test_a_warm_run_imports_no_library_of_models(files, everything, tmp_path):
    code = (
        f"import sys, runpy; sys.argv = {[EVAL, *words(files, tmp_path, '--protocol=zeroshot,probe')]!r}\n"
        f"runpy.run_path({EVAL!r}, run_name='__main__')\nprint('imported', [m for m in ('open_clip', 'timm', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(EVAL).parent, capture_output=True, text=True)
    assert done.returncode == 0 and "imported []" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("change", ["prompt", "label", "picture", "flag"])
def test_other_inputs_are_computed_anew(tmp_path, change):
    pets(tmp_path / "set", ((2, 2, 2, 2), (1, 1, 1, 1), (3, 3, 3, 3)))
    argv = words(tmp_path, tmp_path / "out", "--protocol=zeroshot,probe")
    assert run(argv) == 0
    before, cached = results(tmp_path / "out")["models"], set((tmp_path / "cache").glob("result-*"))
    if change == "prompt":
        (tmp_path / "p.txt").write_text("cat\tthe sea\ndog\ta wood\n")
        argv.append(f"--prompts={tmp_path / 'p.txt'}")
    elif change == "label":
        (tmp_path / "set/test/cat/sea/0.png").rename(tmp_path / "set/test/dog/sea/9.png")
    elif change == "picture":
        picture(tmp_path / "set/test/cat/sea/0.png", 99, "dog", "wood")
    else:
        argv.append("--l2=5")
    assert run(argv) == 0
    new = set((tmp_path / "cache").glob("result-*")) - cached
    assert len(new) == {"prompt": 1, "label": 3, "picture": 3, "flag": 1}[change] and (
        before != results(tmp_path / "out")["models"] or change in ("prompt", "flag")
    )


def test_a_damaged_result_is_computed_anew(files, everything, tmp_path, capsys):
    for path in (files / "cache").glob("result-*"):
        path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    assert run(words(files, tmp_path, "--protocol=zeroshot")) == 0
    assert (
        "damaged, computed anew" in capsys.readouterr().out
        and results(tmp_path)["models"]["tiny"]["metrics"] == results(everything)["models"]["tiny"]["metrics"]
    )


def weights(path, seed):
    """Other weights for tiny."""
    g = torch.Generator().manual_seed(seed)
    state = {
        k: v + 0.05 * torch.randn(v.shape, generator=g) if v.is_floating_point() else v
        for k, v in model.load_encoder("tiny", device="cpu").module.state_dict().items()
    }
    torch.save(state, path)
    return f"tiny@{path}"


def test_models_are_compared_one_that_fails_is_reported_and_the_others_go_on(files, tmp_path, capsys):
    other = weights(tmp_path / "w.pt", 1)
    assert run(words(files, tmp_path / "out", f"--models=tiny,nonsense,tiny@{tmp_path}/gone.pt,{other}")) == 0
    r = results(tmp_path / "out")
    assert (
        list(r["models"]) == ["tiny", other]
        and set(r["failed"]) == {"nonsense", f"tiny@{tmp_path}/gone.pt"}
        and "no such model" in r["failed"]["nonsense"]
    )
    assert (
        r["pending"] == []
        and "worst_group_over_first" in r["models"][other]["metrics"]
        and "worst_group_over_first" not in r["models"]["tiny"]["metrics"]
    )
    said = capsys.readouterr().out
    assert "nonsense: FAILED" in said and said.count("gone.pt") >= 2
    text = (tmp_path / "out/eval.html").read_text()
    assert "Accuracy on the line" in text and "nonsense" in text
    assert len({row["model"] for row in table_of(tmp_path / "out/eval.csv")}) == 2


def test_a_model_that_cannot_be_measured_is_reported_and_the_others_go_on(files, tmp_path, monkeypatch):
    real, calls = model.wilson, []

    def wilson(*arguments):
        calls.append(arguments)
        return real(*arguments) if len(calls) > 1 else 1 / 0

    monkeypatch.setattr(model, "wilson", wilson)
    assert (
        run(
            words(
                files,
                tmp_path / "out",
                f"--models=tiny,{weights(tmp_path / 'w.pt', 1)}",
                "--protocol=zeroshot",
            )
        )
        == 0
    )
    r = results(tmp_path / "out")
    assert (
        r["failed"] == dict(tiny="ZeroDivisionError: division by zero")
        and len(r["models"]) == 1
        and r["pending"] == []
    )


@pytest.mark.parametrize("word", ["--model=tiny", "--pretrained=none"])
def test_several_models_and_one_are_not_asked_for_together(files, tmp_path, capsys, word):
    refused(
        capsys,
        words(files, tmp_path / "out", "--models=tiny,tiny-conv", word),
        f"{word.partition('=')[0]}: ",
        "behind @ in --models",
    )


def test_all_models_failing_is_exit_code_2(files, tmp_path, capsys):
    refused(
        capsys,
        words(files, tmp_path / "out", "--models=nonsense,rubbish"),
        "none could be evaluated",
        "nonsense",
    )
    assert not (tmp_path / "out").exists()


def test_interrupted_among_models_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    pets(tmp_path / "set", ((2, 2, 2, 2), (1, 1, 1, 1), (3, 3, 3, 3)))
    argv = words(
        tmp_path,
        tmp_path / "out",
        f"--models=tiny,{weights(tmp_path / 'a.pt', 1)},{weights(tmp_path / 'b.pt', 2)}",
    )
    real, calls = model.embed, []

    def embed(encoder, *arguments, **more):
        calls.append(encoder.fingerprint)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(encoder, *arguments, **more)

    monkeypatch.setattr(model, "embed", embed)
    assert run(argv) == 130
    assert "the same command" in capsys.readouterr().err
    partial = results(tmp_path / "out")
    assert (
        list(partial["models"]) == ["tiny"]
        and len(partial["pending"]) == 2
        and not (tmp_path / "out/eval.html").exists()
    )
    assert run(argv) == 0 and len(calls) == 4 and calls[0] not in calls[2:]
    assert (
        len(results(tmp_path / "out")["models"]) == 3
        and results(tmp_path / "out")["models"]["tiny"]["protocols"] == partial["models"]["tiny"]["protocols"]
    )


# --- encoders that are remembered; embedding in shards and in a file


def test_a_remembered_encoder_becomes_itself_when_it_is_asked_for_more(tmp_path, tiny):
    first = model.recall_encoder("tiny", device="cpu", cache=str(tmp_path))
    assert type(first) is model.Encoder
    again = model.recall_encoder("tiny", device="cpu", cache=str(tmp_path))
    assert type(again) is model.Remembered and (again.fingerprint, again.dim, again.reads, again.names) == (
        tiny.fingerprint,
        64,
        True,
        False,
    )
    assert again.images(torch.zeros(1, 3, 56, 56)).shape == (1, 64) and type(again) is model.Encoder


def test_a_remembered_encoder_with_other_weights_is_another(tmp_path):
    weights(tmp_path / "w.pt", 1)

    def load():
        return model.recall_encoder(
            "tiny", str(tmp_path / "w.pt"), device="cpu", cache=str(tmp_path / "cache")
        )

    before = load().fingerprint
    weights(tmp_path / "w.pt", 2)
    assert load().fingerprint != before
    note = next((tmp_path / "cache").glob("encoder-*"))
    note.write_text(note.read_text().replace(json.loads(note.read_text())["fingerprint"], "0" * 32))
    kept = [
        e
        for e in (load(), model.recall_encoder("tiny", device="cpu", cache=str(tmp_path / "cache")))
        if type(e) is model.Remembered
    ]
    for encoder in kept:
        if encoder.fingerprint == "0" * 32:
            with pytest.raises(data.Complaint, match="delete"):
                encoder.images
    for path in (tmp_path / "cache").glob("encoder-*"):
        path.write_text("{")
    assert type(load()) is model.Encoder


def test_random_weights_are_never_remembered(tmp_path):
    pytest.importorskip("timm")
    for _ in range(2):
        assert (
            type(model.recall_encoder("timm:test_vit", "none", device="cpu", cache=str(tmp_path)))
            is model.Encoder
        )
    assert not list(tmp_path.glob("encoder-*"))


def test_embeddings_beyond_the_room_lie_in_a_file_that_does_not_stay(tmp_path, embedded, tiny, monkeypatch):
    samples, z = embedded
    monkeypatch.setattr(model, "ROOM", 1000)
    assert torch.equal(model.embed(tiny, samples.items, str(tmp_path), dtype="float32")[0], z)
    assert torch.equal(model.embed(tiny, samples.items, str(tmp_path), dtype="float32")[0], z) and not list(
        tmp_path.glob(".room*")
    )


def test_batches_do_not_straddle_chunks(embedded, tiny, monkeypatch):
    samples, _ = embedded
    sizes = []
    monkeypatch.setattr(model, "CHUNK", 10)
    real = tiny.images
    monkeypatch.setattr(tiny, "images", lambda x: sizes.append(len(x)) or real(x))
    model.embed(tiny, samples.items[:25], "", 8, 1, "float32")
    assert sizes == [8, 2, 8, 2, 5]


@pytest.mark.parametrize("C", [2, 3])
def test_probes_in_blocks_are_the_same_without_a_second_copy(monkeypatch, C):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(70000, 6, generator=g) + 2, torch.randint(C, (70000,), generator=g)
    x += y[:, None] * torch.randn(6, generator=g)
    whole, whole1 = model.fit_probe(x, y, 0.1), model.fit_l1_probe(x[:40000], y[:40000], 0.01, 50)
    monkeypatch.setattr(model, "KEEP", 1000)
    parts, parts1 = model.fit_probe(x, y, 0.1), model.fit_l1_probe(x[:40000], y[:40000], 0.01, 50)
    for a, b in ((whole, parts), (whole1, parts1)):
        assert (
            torch.allclose(a.weight, b.weight, atol=1e-6)
            and torch.allclose(a.bias, b.bias, atol=1e-6)
            and torch.equal(a.predict(x), b.predict(x))
        )


def in_two_processes(argv):
    """eval.py as torchrun starts it: [(exit code, stdout, stderr)] of both ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, EVAL, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(r),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for r in (0, 1)
    ]
    said = [job.communicate(timeout=100) for job in ranks]
    return [(job.returncode, *text) for job, text in zip(ranks, said, strict=False)]


def test_two_processes_give_the_numbers_of_one(tmp_path):
    pets(
        tmp_path / "set", ((60, 4, 4, 60), (40, 40, 40, 40), (130, 130, 130, 130))
    )  # two chunks of the cache

    def flags(out):
        return words(tmp_path, tmp_path / out, "--cache_dir=", "--protocol=zeroshot,probe", "--batch_size=50")

    ranks = in_two_processes(flags("two"))
    assert [code for code, *_ in ranks] == [0, 0] and "(a shard of 2)" in ranks[0][1] and not ranks[1][1], (
        ranks
    )
    assert run(flags("one")) == 0
    assert results(tmp_path / "two")["models"] == results(tmp_path / "one")["models"]
    assert (tmp_path / "two/predictions.csv").read_bytes() == (tmp_path / "one/predictions.csv").read_bytes()


@pytest.mark.parametrize(
    "here, there, expected",
    [
        (None, ("Complaint", "a.png: empty"), "^a.png: empty$"),
        (data.Complaint("b.png: empty"), None, "^b.png: empty$"),
        (ZeroDivisionError("by zero"), None, "^ZeroDivisionError: by zero$"),
    ],
)
def test_what_fails_on_one_rank_ends_all_with_its_line(monkeypatch, here, there, expected):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_object",
        lambda lines, mine: lines.__setitem__(slice(None), [mine, there]),
    )

    def work():
        if here:
            raise here

    with pytest.raises(data.Complaint, match=expected):
        model._together(work)


# --- bad input: exit code 2 and one line


def refused(capsys, argv, *expected):
    assert run(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("eval.py: ") and line.count("\n") == 1 and all(str(w) in line for w in expected), (
        line
    )


@pytest.mark.parametrize(
    "word, expected",
    [
        ("--protocl=probe", ("--protocl", "protocol")),
        ("--protocol=prob", ("--protocol", "probe")),
        ("--split=dev", ("--split", "val")),
        ("--shots=0", ("--shots",)),
        ("--l2=0", ("--l2",)),
        ("--line=mine", ("--line",)),
        ("--models=tiny,tiny", ("--models", "different")),
        ("--models=tiny,,", ("--models",)),
        ("--draws=0", ("--draws",)),
        ("--data=folder:nowhere", ("nowhere", "no such folder")),
        ("--data=holder:x", ("--data", "folder:DIR")),
        ("--model=lite1", ("--model=lite1",)),
        ("--protocol=classifier", ("no ImageNet classifier", "zeroshot")),
        ("--prompts=nowhere", ("--prompts", "no such file")),
        ("--ckpt=nowhere", ("nowhere", "no such checkpoint")),
        ("--masks=nowhere", ("--masks",)),
        ("--classes=nowhere", ("--classes", "no such file")),
    ],
)
def test_bad_flag_is_one_line_and_exit_code_2(files, tmp_path, capsys, word, expected):
    if word == "--masks=nowhere":
        (tmp_path / "m").mkdir()
        word = f"--masks={tmp_path / 'm'}"
    refused(capsys, words(files, tmp_path / "out", word), *expected)
    assert not (tmp_path / "out/eval.json").exists()


def test_protocols_that_a_model_or_a_set_does_not_allow(files, tmp_path, capsys):
    refused(capsys, words(files, tmp_path, "--model=lite0", "--protocol=zeroshot"), "no text tower")
    picture(tmp_path / "few/cat/a.png", 1, "cat")
    picture(tmp_path / "few/dog/b.png", 2, "dog")
    few = [
        f"--data=folder:{tmp_path / 'few'}",
        "--model=tiny",
        "--cache_dir=",
        f"--out_dir={tmp_path / 'out'}",
    ]
    refused(capsys, [*few, "--protocol=dfr"], "dfr", "validation")
    assert (
        run([*few, "--protocol=zeroshot"]) == 0
        and results(tmp_path / "out")["models"]["tiny"]["metrics"]["n"] == 2
    )


def test_a_bad_picture_stops_it_or_is_left_out_and_counted(tmp_path, capsys):
    pets(tmp_path / "set", ((2, 2, 2, 2), (1, 1, 1, 1), (3, 3, 3, 3)))
    (tmp_path / "set/test/cat/sea/1.png").write_bytes(b"")
    refused(capsys, words(tmp_path, tmp_path / "out"), "set/test/cat/sea/1.png", "empty")
    assert run(words(tmp_path, tmp_path / "out", "--skip_bad")) == 0
    m = results(tmp_path / "out")["models"]["tiny"]
    assert (
        m["metrics"]["n"] == 11
        and m["metrics"]["skipped"] == 1
        and m["groups"][0]["n"] == 2
        and "skipped" in capsys.readouterr().out
    )


def test_unlabelled_photos_are_classified(tmp_path, tiny):
    for k in range(5):
        picture(tmp_path / f"set/{k}.png", k, "cat", "sea")
    (tmp_path / "names.txt").write_text("cat\ndog\nsea urchin\n")
    assert run(words(tmp_path, tmp_path / "out", f"--classes={tmp_path / 'names.txt'}")) == 0
    m = results(tmp_path / "out")["models"]["tiny"]
    assert (
        sum(c["predicted"] for c in m["classes"].values()) == 5
        and m["groups"] == []
        and m["metrics"]["n"] == 5
    )
    samples = data.load_data(f"folder:{tmp_path / 'set'}", classes=str(tmp_path / "names.txt"), splits=False)
    text = tiny.texts([p[0] for p in samples.prompts])
    best = (unit(model.embed(tiny, samples.items, "", dtype="float32")[0]) @ text.T).argmax(1)
    assert [r["tiny zeroshot"] for r in table_of(tmp_path / "out/predictions.csv")] == [
        samples.labels[k] for k in best
    ]


def test_split_chooses_the_photos(files, tmp_path):
    for split, n in (("val", 32), ("train", 20), ("all", 74)):
        assert (
            run(words(files, tmp_path, "--protocol=zeroshot", f"--split={split}")) == 0
            and results(tmp_path)["models"]["tiny"]["metrics"]["n"] == n
        )


def test_incomplete_set_warns_once_and_goes_on(tmp_path, capsys):
    for k in range(4):
        picture(
            tmp_path / f"set/9 ostrich/{'common-ground' if k < 2 else 'counter-water'}/{k}.png",
            k,
            "cat",
            "sea",
        )
        picture(
            tmp_path / f"set/10 brambling/{'common-grass' if k < 2 else 'counter-sky'}/{k}.png",
            9 + k,
            "dog",
            "sea",
        )
    assert (
        run(
            [
                f"--data=counteranimal:{tmp_path / 'set'}",
                "--model=tiny",
                "--cache_dir=",
                f"--out_dir={tmp_path / 'out'}",
                "--picker=self",
            ]
        )
        == 0
    )
    assert (
        capsys.readouterr().out.count("WARNING") == 1
        and len(results(tmp_path / "out")["models"]["tiny"]["classes"]) == 2
    )


def test_full_disk_leaves_nothing_half_written(files, tmp_path, monkeypatch, capsys):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", full)
    refused(capsys, words(files, tmp_path / "out", f"--cache_dir={tmp_path / 'cache'}"), "free some space")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_help_of_the_script_and_of_a_data_set(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert (
        all(f"\n{k}" in shown for k in ("out_dir", "data", "protocol", "picker", "seed"))
        and "def main" not in shown
    )
    assert run(["--data=counteranimal:help"]) == 0 and "LAION-final" in capsys.readouterr().out


# --- controlled settings


def done_setting(out, name, gap, precision, scale):
    """What a finished setting leaves: folders of every method with weights and figures, and a discovery."""
    label = int(name.partition("-")[2])
    for k, method in enumerate(script.MITIGATIONS):
        groups = [0.9] * 20
        groups[2 * label] -= gap * (method == "finetune")
        values = dict(
            zip(script.FIGURES, (scale * (0.5 + 0.05 * k), scale * 0.1 * k, 0.8, 0.7), strict=False)
        )
        data.write(out / f"settings/{name}/{method}/weights.safetensors", b"")
        data.write_json(out / f"settings/{name}/{method}/figures.json", dict(values, groups=groups))
    methods = {m: dict(precision_at_10=v) for m, v in precision.items()}
    data.write_json(
        out / f"settings/{name}/discovery/discovery.json",
        dict(methods=methods, clusters=[dict(id=0, kept=True)]),
    )


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Three settings that are done: valid and found, valid and half found, not valid. No script may run."""
    out = tmp_path / "out"
    done_setting(out, "0.99-0", 0.5, dict(ravl=1.0, random=0.2), 1.0)
    done_setting(out, "0.99-1", 0.3, dict(ravl=0.7, random=None), 0.5)
    done_setting(out, "0.99-2", 0.1, dict(ravl=0.0, random=0.0), 1.0)

    def never(*arguments, **more):
        if "git" not in arguments[0]:
            raise AssertionError(f"ran {arguments[0]}")
        return real(*arguments, **more)

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", never)
    return [
        f"--out_dir={out}",
        "--protocol=ravl",
        "--settings=3",
        "--mitigate=2",
        "--pretrained=base.safetensors",
    ], out


def test_controlled_settings_resume_from_what_is_done_and_keep_the_contract(settings, capsys):
    argv, out = settings
    assert run(argv) == 0
    tree = json.loads((out / "protocol.json").read_text())
    assert [(s["strength"], s["spurious_class"], s["valid"]) for s in tree["settings"]] == [
        (0.99, 0, True),
        (0.99, 1, True),
        (0.99, 2, False),
    ]
    first = tree["settings"][0]
    assert (
        first["precision_at_10"] == dict(ravl=1.0, random=0.2)
        and first["gap"] == pytest.approx(0.5)
        and tree["settings"][2]["precision_at_10"] == {}
    )
    assert set(first["mitigation"]) == set(script.MITIGATIONS) and set(first["mitigation"]["jtt"]) == set(
        script.FIGURES
    )
    p, m = tree["summary"]["precision_at_10"], tree["summary"]["mitigation"]
    assert (
        p["ravl"]["all"]["mean"] == pytest.approx(0.85)
        and p["random"]["all"]["mean"] == pytest.approx(0.1)
        and p["ravl"]["all"]["n"] == 2
    )
    assert p["ravl"]["0.99"]["low"] == pytest.approx(0.85 - 1.96 * np.std([1, 0.7], ddof=1) / 2**0.5)
    at_6, at_8 = m["precision_above_0.6"], m["precision_above_0.8"]
    assert (at_6["n"], at_8["n"]) == (2, 1) and at_8["methods"]["ravl"]["image_worst_group"] == pytest.approx(
        0.1
    )
    assert (
        at_6["methods"]["ravl"]["image_worst_group"] == pytest.approx(0.075)
        and at_8["methods"]["finetune"]["image_overall"] == 0.5
    )
    rows = list(csv.DictReader((out / "protocol.csv").read_text().splitlines()))
    assert (
        len([r for r in rows if r["stage"] == "mitigate"]) == 16
        and [r["precision_at_10"] for r in rows if r["method"] == "random"][1] == ""
    )
    page = (out / "protocol.html").read_text()
    assert "2 of 3 settings learned" in page and not re.search(r"(?:src|href)\s*=\s*[\"']?http", page)
    assert "Precision@10 > 0.8" in capsys.readouterr().out


def test_controlled_settings_of_other_flags_are_refused_and_more_of_them_are_not(settings, capsys):
    argv, out = settings
    assert run([*argv, "--settings=1", "--mitigate=0"]) == 0
    assert json.loads((out / "protocol.json").read_text())["settings"][0]["mitigation"] == {}
    assert run([*argv, "--steps=7"]) == 2
    assert "--steps=160" in capsys.readouterr().err
    assert run(argv) == 0 and len(json.loads((out / "protocol.json").read_text())["settings"]) == 3


@pytest.mark.parametrize("protocol", ["ravl", "contrast"])
def test_a_protocol_of_many_runs_is_for_one_process(tmp_path, monkeypatch, capsys, protocol):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        capsys,
        [f"--protocol={protocol}", "--settings=0", "--repeats=0", f"--out_dir={tmp_path}"],
        "--protocol",
        "several processes",
        "without torchrun",
    )


def test_controlled_settings_out_of_range(settings, capsys):
    argv, _ = settings
    for more in (
        "--settings=0",
        "--settings=51",
        "--digits=photos",
        "--family=photos",
        "--family=coco",
        "--family=digits:x",
        "--regions=quads",
    ):
        assert run([*argv, more]) == 2 and more.partition("=")[0] in capsys.readouterr().err


def test_contrast_compares_the_losses_over_strengths_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    ran = []
    real = subprocess.run

    def trained(argv, **more):
        if "git" in argv:
            return real(argv, **more)
        words = dict(w.removeprefix("--").split("=", 1) for w in argv[2:])
        out = Path(words["out_dir"])
        ran.append(words)
        strength, label = words["data"].split(":")[1:]
        groups = [0.9] * 20
        groups[2 * int(label)] -= (
            float(strength) / 2 * (words["method"] == "finetune") * (1 + (words["captions"] == "place"))
        )
        data.write(out / "weights.safetensors", b"")
        data.write_json(
            out / "figures.json", dict(groups=groups, image_worst_group=min(groups), image_overall=0.8)
        )
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", trained)
    argv = ["--protocol=contrast", "--repeats=1", "--pretrained=base.safetensors", f"--out_dir={tmp_path}"]
    assert run(argv) == 0
    tree = json.loads((tmp_path / "contrast.json").read_text())
    assert (
        len(tree["rows"]) == len(ran) == 7 * 3
        and {w["pretrained"] for w in ran} == {"base.safetensors"}
        and {w["steps"] for w in ran} == {"160"}
    )
    both, named, ce = ([m["mean"] for _, m in tree["drop"][name]] for name in script.ARMS)
    assert (
        named == pytest.approx([v / 2 for v in script.SWEEP])
        and both == pytest.approx([*script.SWEEP])
        and ce == pytest.approx([0] * 7)
    )
    assert (tmp_path / "contrast.svg").read_text().startswith("<svg") and len(
        (tmp_path / "contrast.csv").read_text().splitlines()
    ) == 22
    assert "cross-entropy" in capsys.readouterr().out
    assert run(argv) == 0 and len(ran) == 21
    assert run([*argv, "--repeats=0"]) == 2 and "--repeats" in capsys.readouterr().err


@pytest.fixture
def in_process(monkeypatch):
    """The scripts that eval.py starts run in this process, with one image in each group of val and test; the commands that were given."""
    real, commands = subprocess.run, []

    def here(words, stdout=None, **more):
        if words[0] != sys.executable:
            return real(words, stdout=stdout, **more)
        commands.append(words)
        monkeypatch.setattr(sys, "argv", words[1:])
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as stop:
            stdout.write(str(stop.code))
            return subprocess.CompletedProcess(words, stop.code or 0)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", here)
    monkeypatch.setattr(data, "LEAST", 1)
    monkeypatch.setattr(data, "IMAGES", 60)
    return commands


@pytest.mark.parametrize("kind", ["cutouts", "coco"])
def test_a_natural_family_runs_through_the_scripts_with_a_clip_resnet(tmp_path, in_process, kind):
    import open_clip
    from test_data import objects
    from test_model import SMALL

    flags, spec, words_, groups = (
        ["--family=cutouts", "--feature=scene"],
        "cutouts:0.99:0:scene:drawn:drawn",
        "cut-outs, drawn, on drawn, scene; flock-rn",
        12,
    )
    grid = "grid:3" if kind == "coco" else "grid:2"
    if kind == "coco":
        spec = f"coco:0.99:0:{objects(tmp_path / 'coco', dict(dog=(9, 9), cat=(9, 9)))}:dog,cat:person"
        flags, words_, groups = (
            [f"--family={spec.replace(':0.99:0', '')}"],
            f"{spec.replace(':0.99:0', '')}; flock-rn",
            4,
        )
    data.write_json(tmp_path / "configs/flock-rn.json", SMALL["flock-rn"])
    open_clip.add_model_config(tmp_path / "configs")
    out, argv = (
        tmp_path / "out",
        [
            "--protocol=ravl",
            *flags,
            "--settings=1",
            "--model=flock-rn",
            "--pretrained=none",
            "--steps=1",
            "--pairs=4",
            "--quick_gelu=on",
        ],
    )
    argv += [f"--out_dir={out}", f"--cache_dir={tmp_path / 'cache'}", "--threads=1"]
    at = out / "settings/0.99-0/finetune"
    data.write_json(
        at / "figures.json",
        dict(zip(script.FIGURES, (0.6, 0.1, 0.8, 0.7), strict=False), groups=[0.1, 0.9] * (groups // 2)),
    )  # it was learned
    assert run(argv) == 0
    tree = json.loads((out / "protocol.json").read_text())
    (train, discover) = in_process[:2]
    assert (
        tree["config"]["regions"] == grid
        and tree["config"]["learning_rate"] == 3e-4
        and tree["config"]["model"] == "flock-rn"
    )
    assert (
        f"--data={spec}" in train
        and "--pretrained=none" in train
        and "--steps=1" in train
        and "--pairs=4" in train
    )
    assert f"--pretrained={at / 'weights.safetensors'}" in discover and f"--regions={grid}" in discover
    assert "--quick_gelu=on" in train and "--quick_gelu=on" in discover
    with safe_open(at / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["record"])["quick_gelu"] is True
    assert tree["settings"][0]["valid"] and set(tree["settings"][0]["precision_at_10"]) >= {
        "ravl",
        "random",
        "domino",
    }
    assert (
        0 < json.loads((out / "settings/0.99-0/discovery/discovery.json").read_text())["base_rate"] < 0.5
    )  # of scenes of half the images, less the objects
    page = (out / "protocol.html").read_text()
    assert f"<h1>flock: controlled settings, {kind}" in page and words_ in page
    (at / "figures.json").unlink()
    assert run(argv) == 0  # the figures anew, with the encoder and the family's own regions
    figures = json.loads((at / "figures.json").read_text())
    assert len(figures["groups"]) == groups and 0 <= figures["region_overall"] <= 1


def test_each_family_has_its_own_defaults_and_data(tmp_path, in_process, monkeypatch, capsys):
    def stop(words, **more):
        if words[0] == sys.executable:
            raise data.Complaint(" ".join(words))
        return subprocess.CompletedProcess(words, 1)

    monkeypatch.setattr(subprocess, "run", stop)
    monkeypatch.setattr(data, "coco", lambda where, seed: data.cutouts("", 0))
    for more, wanted in (
        (
            ["--family=cutouts", "--feature=object=owl"],
            ("--data=cutouts:0.99:0:object=owl:drawn:drawn", "--model=lite0-clip"),
        ),
        (
            [f"--family=coco:{tmp_path}:dog,cat:person"],
            (f"--data=coco:0.99:0:{tmp_path}:dog,cat:person", "--model=lite0-clip"),
        ),
        (
            [],
            ("--data=digits:0:0", "--model=tiny-conv", "--steps=130", "--learning_rate=0.002", "--pairs=64"),
        ),
        (["--base_steps=9"], ("--steps=9",)),
    ):
        assert (
            run(["--protocol=ravl", f"--out_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path}", *more]) == 2
        )
        shown = capsys.readouterr().err.split()
        assert set(wanted) <= set(shown), shown


@pytest.mark.parametrize(
    "more",
    [
        ["--family=cutouts", "--feature=object=unicorn"],
        ["--family=cutouts", "--foregrounds=/nowhere"],
        ["--family=coco:/nowhere"],
    ],
)
def test_a_family_that_cannot_be_is_one_line(tmp_path, more, capsys):
    assert run(["--protocol=ravl", f"--out_dir={tmp_path / 'out'}", *more]) == 2
    line = capsys.readouterr().err
    assert (
        line.count("\n") == 1 and more[-1].partition("=")[2].rpartition("=")[2].removeprefix("coco:") in line
    )


def test_a_base_model_is_of_the_flags_and_the_code_that_made_it(tmp_path, monkeypatch):
    made = []

    def script_run(name, out, **more):
        made.append((more, out))
        data.write(out / "weights.safetensors", b"")

    monkeypatch.setattr(script, "script_run", script_run)
    for k, v in dict(model="tiny-conv", cache_dir=str(tmp_path), base_steps=130).items():
        monkeypatch.setattr(script, k, v)
    assert (
        script.base_model("digits:0:0") == script.base_model("digits:0:0")
        and len(made) == 1
        and "code" not in made[0][0]
        and made[0][0]["pretrained"] == "none"
    )
    for name, value in (("base_steps", 7), ("TRAINING", "other code"), ("model", "lite0-clip")):
        monkeypatch.setattr(script, name, value)
        script.base_model("digits:0:0")
    script.base_model("cutouts:0:0")
    assert len({out for _, out in made}) == len(made) == 5 and made[-1][0]["pretrained"] == "imagenet"
    for name, value in (("base_steps", 0), ("model", "RN50"), ("pretrained", "openai")):
        monkeypatch.setattr(script, name, value)
        assert script.base_model("digits:0:0") == script.pretrained and len(made) == 5
        monkeypatch.setattr(script, "base_steps", 5)


def test_figures_of_a_setting_are_the_accuracies_of_images_and_kept(tmp_path, monkeypatch):
    from safetensors.torch import save

    monkeypatch.setattr(script, "model", "tiny-conv")
    monkeypatch.setattr(script, "regions", "grid:2")
    module = model.load_encoder("tiny-conv", "none", device="cpu").module
    torch.nn.init.normal_(module.visual.trunk.body[8].bias, std=0.1)
    data.write(
        tmp_path / "weights.safetensors", save({k: v.contiguous() for k, v in module.state_dict().items()})
    )
    samples = data.load_data("digits:0.99:0")
    found, encoder = (
        script.reached(tmp_path, samples),
        model.load_encoder("tiny-conv", str(tmp_path / "weights.safetensors"), device="cpu"),
    )
    test = samples.keep((samples.split == 2).nonzero()[:, 0])
    g, (z, _) = (
        model.prompt_embeddings(encoder, test.class_prompts(), ""),
        model.embed(encoder, test.items, ""),
    )
    right = (unit(z) @ g.T).argmax(1) == test.y
    assert found["image_overall"] == pytest.approx(float(right.double().mean()), abs=0.02)
    assert found["groups"] == pytest.approx(
        [float(right[test.group() == k].double().mean()) for k in range(20)], abs=0.05
    )
    assert (
        found["image_worst_group"] == min(found["groups"])
        and json.loads((tmp_path / "figures.json").read_text()) == found
    )
