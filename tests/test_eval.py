"""eval.py from its command line and piece by piece: protocols, metrics, cache, comparison of models,
shards, bad input."""

import csv
import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
            )
        )
        == 0
    )
    return files / "everything"


@pytest.fixture(scope="module")
def embedded(files, tiny):
    samples = data.load_data(f"folder:{files / 'set'}", splits=False)
    z = tiny.embed(samples.items)
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
                model.wilson(g["accuracy"] * g["n"], g["n"], 1 - 0.05 / 4) for g in part["groups"]
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
    wanted = model.group_metrics(correct, samples, (samples.split == 2).nonzero()[:, 0])
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
    fit = model.dfr(unit(z)[val], samples.y[val], samples.group()[val], 0)
    by_hand(everything, "dfr", fit.predict(unit(z)), samples)


def test_dfr_averages_its_retrains_biases_too():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    x = (
        torch.randn(400, 8, generator=g) * 0.01 + 0.5 + 0.01 * y[:, None]
    )  # small scale, far from zero: a wrong bias shows
    assert (model.dfr(x, y, y * 2, 0).predict(x) == y).double().mean() > 0.85


def test_rows_on_different_photos_say_how_many():
    samples = data.Samples(
        "x", [], torch.empty(0), torch.empty(0), torch.empty(0), ["a", "b"], ["anywhere"], [], [], []
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
    shares = [g["accuracy"] * g["n"] * script.DRAWS for g in one]
    assert all(abs(v - round(v)) < 1e-9 for v in shares)


def test_more_shots_than_images_are_said(files, tmp_path, capsys):
    assert run(words(files, tmp_path, "--protocol=fewshot", "--shots=10,99")) == 0
    said = capsys.readouterr().out
    assert (
        "fewshot_99: 2 of 2 classes have fewer training images, cat the fewest, 10;" in said
        and "fewshot_10:" not in said
    )


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
    m = script.counter_metrics(correct, y, place, classes, [r["imagenet_idx"] for r in rows], 0)
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
    m = script.counter_metrics(correct, y, place, {}, ["a", "b"], 0, "_1v20")
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
        correct, torch.zeros(2 * n, dtype=torch.long), torch.arange(2).repeat_interleave(n), {}, ["a"], 0
    )
    low, high = m["drop_interval"]
    assert high - low == pytest.approx(2 * 1.96 * (2 * p * (1 - p) / n) ** 0.5, rel=0.1)


def test_robustness_is_the_distance_from_a_line_of_logits_through_the_published_models():
    def logit(v):
        return np.log(v / (1 - v))

    low, middle, high = (script.expected(1 / (1 + np.exp(-v))) for v in (-1.0, 0.0, 1.0))
    assert logit(high) - logit(middle) == pytest.approx(logit(middle) - logit(low), abs=1e-6)
    published = np.array(list(script.PUBLISHED.values())) / 100
    distance = [logit(b) - logit(script.expected(a)) for a, b in published]
    assert abs(np.mean(distance)) < 1e-6  # a least-squares line leaves none on the whole


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


# --- the 20 labels, regions, maps


class Fake:
    """An encoder whose text embeddings are given."""

    reads, logit_scale, fingerprint, name = True, 10.0, "fake", "fake"

    def __init__(self, rows):
        self.rows = rows

    def texts(self, prompts):
        return self.rows[[int(p) for p in prompts]]


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
    (tmp_path / "set/metadata.csv").write_text(
        "\n".join([",".join("img_id,img_filename,y,split,place,place_filename".split(",")), *rows])
    )
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


# --- encoders that are remembered; embedding in shards and in a file


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
        ("--data=holder:x", ("--data", "folder")),
        ("--model=lite1", ("--model=lite1",)),
        ("--protocol=classifier", ("no ImageNet classifier", "zeroshot")),
        ("--prompts=nowhere", ("--prompts", "no such file")),
        ("--ckpt=nowhere", ("nowhere", "no such file")),
        ("--masks=nowhere", ("--masks",)),
        ("--classes=nowhere", ("--classes", "nowhere")),
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


@pytest.mark.parametrize("protocol", ["ravl"])
def test_a_protocol_of_many_runs_is_for_one_process(tmp_path, monkeypatch, capsys, protocol):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        capsys,
        [f"--protocol={protocol}", "--settings=1", f"--out_dir={tmp_path}"],
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


def test_a_warm_run_loads_no_weights_and_gives_the_same(files, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(words(files, first, "--protocol=zeroshot,probe")) == 0

    def fail(_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(model.Encoder, "module", property(fail))
    assert run(words(files, second, "--protocol=zeroshot,probe")) == 0
    assert results(first)["models"] == results(second)["models"]


def test_two_processes_give_the_numbers_of_one(files, tmp_path):
    words_of = lambda out: words(files, out, "--protocol=zeroshot,probe", f"--cache_dir={out}/cache")  # noqa: E731
    assert run(words_of(tmp_path / "one")) == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29541",
        script.__file__,
    ]
    job = subprocess.run([*launch, *words_of(tmp_path / "two")], capture_output=True, text=True, timeout=200)
    assert job.returncode == 0, job.stderr
    assert results(tmp_path / "one")["models"] == results(tmp_path / "two")["models"]


def test_unlabelled_photos_are_classified(files, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    (tmp_path / "new").mkdir()
    for k in range(3):
        Image.new("RGB", (60, 60), (k * 80, 90, 30)).save(tmp_path / f"new/{k}.png")
    more = [f"--data=folder:{tmp_path / 'new'}", f"--classes={names}", "--protocol=zeroshot"]
    assert run([*words(files, tmp_path / "out"), *more]) == 0
    rows = table_of(tmp_path / "out/predictions.csv")
    assert len(rows) == 3 and {row["tiny zeroshot"] for row in rows} <= {"cat", "dog"}
