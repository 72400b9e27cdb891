"""discover.py: clusters, identification and ranking against slow definitions, its files, bad input, several processes, images."""
import csv
import functools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import discover
import model
from kernels.region_pool import region_pool_ref
from model import unit
from test_train import birds
from conftest import run_script

DISCOVER = str(Path(data.__file__).with_name("discover.py"))
run = functools.partial(run_script, DISCOVER)

# Made by scikit-learn-extra 0.3.0 and scikit-learn: for k in range(2 * C, 5 * C), x = rows(**case),
#   distance = numpy.clip(1 - x @ x.T, 0, 1); numpy.fill_diagonal(distance, 0)
#   m = KMedoids(n_clusters=k, metric="precomputed", init="k-medoids++", random_state=0).fit(distance); m.labels_ (one base-36 digit each),
#   m.medoid_indices_, silhouette_score(distance, m.labels_, metric="precomputed"); best: the k of the first strictly largest
PUBLISHED = json.loads((Path(__file__).parent / "fixtures/kmedoids.json").read_text())


def rows(seed, n, D, spread, cone, dtype, C):
    """Unit rows [n, D] around 7 directions; spread: of noise; cone: of a direction common to all."""
    g = np.random.RandomState(seed)
    kinds, common = g.randn(7, D), cone * g.randn(D)
    x = kinds[g.randint(7, size=n)] + spread * g.randn(n, D) + common
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def some_rows(name):
    return torch.from_numpy(rows(**PUBLISHED[name]["case"])).float()


def tree_of(out):
    return json.loads((Path(out) / "discovery.json").read_text())


def refused(capsys, argv, *expected):
    capsys.readouterr()
    assert run(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("discover.py: ") and line.count("\n") == 1 and all(str(w) in line for w in expected), line


# --- step 1, the published procedure

@pytest.mark.parametrize("name", PUBLISHED)
def test_ravl_is_sklearn_extra_s_kmedoids_and_scikit_learn_s_silhouette(name):
    f = PUBLISHED[name]
    ks = range(2 * f["case"]["C"], 5 * f["case"]["C"])
    sweep = discover.published_sweep(rows(**f["case"]), ks)
    assert list(sweep) == list(ks) == [int(k) for k in f["found"]]
    for k, expected in f["found"].items():
        assert sweep[int(k)]["labels"].tolist() == [int(v, 36) for v in expected["labels"]]
        assert sweep[int(k)]["medoids"].tolist() == expected["medoids"]
        assert sweep[int(k)]["silhouette"] == pytest.approx(expected["silhouette"], abs=2e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_ravl_chooses_the_published_k(name, tmp_path):
    """Through the command line: the embeddings are those of the fixture, the classifier is beside the point."""
    f = PUBLISHED[name]
    x = rows(**f["case"])
    C, D, n = f["case"]["C"], x.shape[1], len(x) // 2
    g = np.random.RandomState(0)
    np.savez(tmp_path / "e.npz", reg_emb=x, num_regions=np.full(n, 2), true_label=g.randint(C, size=n), text_emb=g.randn(C, D), img_emb=g.randn(n, D))
    assert run([f"--embeddings={tmp_path / 'e.npz'}", f"--out_dir={tmp_path}", "--clustering=ravl"]) == 0
    tree, labels = tree_of(tmp_path), [int(v, 36) for v in f["found"][str(f["best"])]["labels"]]
    assert tree["k"] == f["best"] and not tree["mean_removed"]
    assert tree["silhouette"] == pytest.approx(f["found"][str(f["best"])]["silhouette"], abs=1e-5)
    for c in tree["clusters"]:
        assert sorted(c["regions"]) == [r for r, l in enumerate(labels) if l == c["id"]]
        assert c["medoid"] == f["found"][str(f["best"])]["medoids"][c["id"]]


def test_of_equal_silhouettes_the_first_k_wins(tmp_path):
    x = np.repeat(np.eye(6), 4, 0)  # six kinds of equal rows: two silhouettes of one at most, none above
    np.savez(tmp_path / "e.npz", reg_emb=x, num_regions=np.full(12, 2), true_label=np.arange(12) % 2, text_emb=np.eye(6)[:2], img_emb=np.eye(6)[np.arange(12) % 3])
    assert run([f"--embeddings={tmp_path / 'e.npz'}", f"--out_dir={tmp_path}", "--clustering=ravl", "--k=6:10"]) == 0
    tree = tree_of(tmp_path)
    assert tree["k"] == 6 and tree["silhouettes"]["6"] == pytest.approx(1) == tree["silhouettes"]["9"]


# --- step 1, ours

def distances(x, clip):
    x = x.double().numpy()
    d = 1 - x @ x.T
    d = d.clip(0, 1) if clip else d.clip(0)
    np.fill_diagonal(d, 0)
    return d


def silhouette(d, labels):
    """The definition, from all n x n distances."""
    hot = np.eye(labels.max() + 1)[labels]
    total, size = d @ hot, hot.sum(0)  # [n, k], [k]
    a = (total * hot).sum(1) / np.maximum(size[labels] - 1, 1)
    b = np.where(hot > 0, np.inf, total / size).min(1)
    return float(np.mean(np.where((size[labels] > 1) & (np.maximum(a, b) > 0), (b - a) / np.maximum(a, b).clip(1e-300), 0)))


def check_clusters(x, sweep, clip):
    """Silhouettes by brute force; labels of the nearest medoid; medoids with the largest sum of cosines."""
    d = distances(x, clip)
    for k, found in sweep.items():
        labels, medoids = found["labels"].numpy(), found["medoids"].numpy()
        assert len(medoids) == k == len(set(medoids.tolist())) and set(labels.tolist()) == set(range(k))
        assert found["silhouette"] == pytest.approx(silhouette(d, labels), abs=1e-5)
        assert (labels[medoids] == np.arange(k)).all()
        plain = distances(x, False)
        assert (plain[np.arange(len(x)), medoids[labels]] <= plain[:, medoids].min(1) + 1e-6).all()
        for c in range(k):
            members = np.flatnonzero(labels == c)
            cost = d[np.ix_(members, members)].sum(1)
            assert cost[members == medoids[c]][0] <= cost.min() + 2e-6 * len(members)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_medoids_labels_and_silhouettes_are_exact(name, clip):
    x = some_rows(name)
    sweep = discover.kmedoids(x, range(2, 13), clip, 0)
    assert list(sweep) == list(range(2, 13))
    check_clusters(x, sweep, clip)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("ks", [[3, 30], [2, 5, 40]])
def test_medoids_labels_and_silhouettes_are_exact_over_ks_far_apart(clip, ks):
    x = some_rows("large")
    check_clusters(x, discover.kmedoids(x, ks, clip, 0), clip)


@pytest.mark.parametrize("clip", [False, True])
def test_the_seed_decides_all_and_only_the_seed(clip):
    x = some_rows("even")
    one, again, other = (discover.kmedoids(x.clone(), range(4, 10), clip, seed) for seed in (0, 0, 5))
    for k in one:
        assert torch.equal(one[k]["labels"], again[k]["labels"]) and torch.equal(one[k]["medoids"], again[k]["medoids"]) and one[k]["silhouette"] == again[k]["silhouette"]
    assert any(not torch.equal(one[k]["medoids"], other[k]["medoids"]) for k in one)


@pytest.mark.parametrize("name", ["clustered", "clustered_single", "flat", "large"])
def test_best_silhouette_is_no_lower_than_the_published_one(name):
    f, x = PUBLISHED[name], some_rows(name)
    ks, d = range(4, 10), distances(x, True)
    published = f["found"][str(f["best"])]["silhouette"]
    for clip in (False, True):
        sweep = discover.kmedoids(x.clone(), ks, clip, 0)
        best = max(sweep, key=lambda k: (sweep[k]["silhouette"], -k))
        assert silhouette(d, sweep[best]["labels"].numpy()) >= published - 1e-5


@pytest.mark.parametrize("clip", [False, True])
def test_planted_clusters_are_found_whole(clip):
    g = torch.Generator().manual_seed(0)
    kind = torch.arange(140) % 7
    x = unit(torch.eye(12)[kind] + .05 * torch.randn(140, 12, generator=g))
    sweep = discover.kmedoids(x, range(4, 12), clip, 0)
    assert max(sweep, key=lambda k: sweep[k]["silhouette"]) == 7
    assert len({(a, b) for a, b in zip(kind.tolist(), sweep[7]["labels"].tolist())}) == 7


@pytest.mark.parametrize("clip", [False, True])
def test_fewer_different_rows_than_k(clip):
    x = torch.eye(5).repeat(6, 1)
    sweep = discover.kmedoids(x, range(4, 10), clip, 0)
    assert list(sweep) == [4, 5] and sweep[5]["silhouette"] == pytest.approx(1)
    assert len(set(sweep[5]["labels"].tolist())) == 5 and len({tuple(v) for v in x[sweep[5]["medoids"]].tolist()}) == 5
    only_more = discover.kmedoids(x, range(7, 10), clip, 0)
    assert list(only_more) == [5] and only_more[5]["silhouette"] == pytest.approx(1)


@pytest.mark.parametrize("clip", [False, True])
def test_duplicates_stay_together(clip):
    x = some_rows("even").repeat(2, 1)
    for found in discover.kmedoids(x, range(4, 10), clip, 0).values():
        assert torch.equal(found["labels"][:150], found["labels"][150:])


def test_the_silhouette_that_is_told_is_on_the_published_distance_of_the_given_embeddings(monkeypatch):
    monkeypatch.setattr(discover, "centre", "on")
    x = some_rows("cone")
    moved, mean = discover.centred(x.clone())
    assert torch.allclose(moved, unit(x - x.mean(0)), atol=1e-6) and torch.allclose(mean, x.mean(0), atol=1e-6)
    labels = discover.kmedoids(moved, [6], False, 0)[6]["labels"].long()
    value, count = discover.clipped_silhouette(moved, labels, 6, mean)
    assert count == len(x) and value == pytest.approx(silhouette(distances(x, True), labels.numpy()), abs=1e-4)
    assert torch.allclose(discover.given(moved, mean), x, atol=1e-5)


@pytest.mark.parametrize("setting, clustering, name, expected", [
    ("auto", "fast", "cone", True), ("auto", "fast", "even", False), ("auto", "exact", "cone", False), ("auto", "ravl", "cone", False),
    ("on", "exact", "even", True), ("off", "fast", "cone", False)])
def test_the_mean_is_taken_off_where_centre_says_so(monkeypatch, setting, clustering, name, expected):
    monkeypatch.setattr(discover, "centre", setting)
    monkeypatch.setattr(discover, "clustering", clustering)
    x = some_rows(name)
    moved, mean = discover.centred(x.clone())
    assert bool(mean.any()) == expected and torch.equal(moved, x) != expected
    assert torch.allclose(moved.norm(dim=1), torch.ones(len(x)), atol=1e-5)


@pytest.mark.parametrize("n", [150, 5000])
def test_share_of_pairs_with_a_negative_cosine(n):
    x = torch.from_numpy(rows(3, n, 8, 9., 0., "float32", 2))
    negative = float((x @ x.T < 0).double().sum()) / (n * (n - 1))
    assert discover.negative_pairs(x, torch.zeros(x.shape[1])) == pytest.approx(negative, abs=1e-9 if n == 150 else .01)


def test_range_of_k(monkeypatch, capsys):
    assert list(discover.k_range(2, 100)) == list(range(4, 10))
    assert list(discover.k_range(2, 7)) == [4, 5, 6] and "4 to 9 wanted, but there are 7 regions; up to 6 is used" in capsys.readouterr().out
    monkeypatch.setattr(discover, "k", "20:50")
    assert list(discover.k_range(2, 100)) == list(range(20, 50))
    monkeypatch.setattr(discover, "k", "2:500")
    some = discover.k_range(2, 1000)
    assert len(some) <= 40 and some[0] == 2 and some[-1] == 499 and some == sorted(set(some))
    monkeypatch.setattr(discover, "clustering", "ravl")
    assert list(discover.k_range(2, 1000)) == list(range(2, 500))


# --- step 2

def told(x, z, W, count, y, names):
    """What discover.tell gathers, for a linear classifier."""
    return discover.tell(x.clone(), z, lambda v: v @ W, y=y, count=count, box=torch.zeros(len(x), 4), target=None, name="drawn", classes=names, pictures=None, fingerprint="",
                         notes=[], encoder=None)


def ragged(seed, C=3, n=60, k=6, D=5, steps=None):
    """Random images with 0 to 5 regions, a linear classifier, random clusters; steps: embeddings on a lattice, so that scores tie."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randint(-steps, steps + 1, size, generator=g).float() if steps else torch.randn(*size, generator=g)
    count = torch.randint(0, 6, (n,), generator=g)
    x = draw(int(count.sum()), D)
    x[(x == 0).all(1), 0] = 1
    z, W = draw(n, D), torch.randn(D, C, generator=g)
    z[(z == 0).all(1), 0] = 1
    y = torch.where(torch.rand(n, generator=g) < .5, (z @ W).argmax(1), torch.randint(C, (n,), generator=g))
    label = torch.randint(k, (len(x),), generator=g)
    _, found = told(x, z, W, count, y, [f"c{c}" for c in range(C)])
    return label, found, (x, z, W, count.tolist(), y.tolist())


def oracle(label, k, x, z, W, count, y, method="ravl", least=.25):
    """Step 2 of RaVL, word by word."""
    C, predicted, label = W.shape[1], (z @ W).argmax(1).tolist(), label.tolist()
    start = np.cumsum([0, *count])
    regions = [list(range(start[i], start[i + 1])) for i in range(len(y))]
    p = (x @ W).softmax(1)
    out = []
    for c in range(k):
        has = [any(label[r] == c for r in regions[i]) for i in range(len(y))]
        gaps, gap_of, asked = {}, {}, []
        for l in range(C):
            inside = [i for i in range(len(y)) if y[i] == l and has[i]]
            outside = [i for i in range(len(y)) if y[i] == l and not has[i]]
            if not inside or not outside:
                continue
            acc_in, acc_out = (np.mean([predicted[i] == l for i in part]) for part in (inside, outside))
            w = 2 * min(len(inside), len(outside)) / (len(inside) + len(outside))
            gaps[l] = dict(weight=w, acc_in=acc_in, n_in=len(inside), acc_out=acc_out, n_out=len(outside))
            gap_of[l] = (1 if method == "unweighted" else w) * (acc_in - acc_out)
            wrong = [i for i in inside if predicted[i] != l and len(regions[i]) > 1]
            if gap_of[l] < 0 and wrong:
                asked.append(np.mean([label[max(regions[i], key=lambda r: float(p[r, predicted[i]]))] == c for i in wrong]))
        influence = max(asked, default=-np.inf)
        score = sum(abs(v) for v in gap_of.values())
        signs = any(v > 0 for v in gap_of.values()) and any(v < 0 for v in gap_of.values())
        kept = signs if method == "gap_only" else influence >= least if method == "influence_only" else signs and influence >= least
        out.append(dict(id=c, gaps=gaps, gap=gap_of, influence=influence, score=score, kept=kept, key=influence if method == "influence_only" else score))
    return sorted(out, key=lambda c: (c["key"], c["id"]), reverse=True)  # ties: the higher index first


def same_as_oracle(r, expected, k):
    assert r["ranking"] == [c["id"] for c in expected]
    for e in expected:
        c = e["id"]
        assert r["kept"][c] == e["kept"] and float(r["influence"][c]) == pytest.approx(e["influence"]) and float(r["score"][c]) == pytest.approx(e["score"], abs=1e-12)
        for l in range(len(r["gap"])):
            if l not in e["gaps"]:
                assert r["gap"][l, c].isnan()
                continue
            assert float(r["gap"][l, c]) == pytest.approx(e["gap"][l], abs=1e-12)
            assert {name: float(r[name][l, c]) for name in e["gaps"][l]} == pytest.approx(e["gaps"][l])


@pytest.mark.parametrize("method", discover.CLUSTERS)
@pytest.mark.parametrize("seed", range(6))
def test_identify_is_the_slow_definition(seed, method):
    C, k = 2 + seed % 3, (4, 9, 30)[seed % 3]
    label, found, raw = ragged(seed, C, 40 + 30 * seed, k)
    expected = oracle(label, k, *raw, method)
    same_as_oracle(discover.identify(label, k, found, method), expected, k)
    assert 0 < (found["count"] == 0).sum() and 0 < (found["count"] == 1).sum()
    if method == "ravl" and seed < 2:
        assert any(c["kept"] for c in expected) and any(not c["kept"] for c in expected)


def test_identify_where_regions_tie_the_first_is_looked_at():
    """Equal regions in one image, in different clusters: the public code's argmax takes the first."""
    label, found, raw = ragged(1, 3, 80, 4, 2, steps=1)
    x, _, _, count, _ = raw
    start = np.cumsum([0, *count])
    assert any(len({tuple(v) for v in x[start[i]:start[i + 1]].tolist()}) < count[i] for i in range(len(count)))
    same_as_oracle(discover.identify(label, 4, found, "ravl"), oracle(label, 4, *raw), 4)


def test_identify_of_clusters_in_no_image_or_in_all_of_them():
    label, found, raw = ragged(3, 3, 50, 5)
    some = found["count"] > 0
    keep = some.repeat_interleave(found["count"])  # images without regions go
    x, z, W, count, y = raw
    count, y, z = [c for c in count if c], [l for l, c in zip(y, count) if c], z[some]
    label = label[keep].clamp(max=2)
    label[torch.tensor(np.cumsum([0, *count])[:-1])] = 4  # in every image; 3 in none
    _, found = told(x, z, W, torch.tensor(count), torch.tensor(y), ["a", "b", "c"])
    r = discover.identify(label, 5, found, "ravl")
    same_as_oracle(r, oracle(label, 5, x, z, W, count, y), 5)
    for c in (3, 4):
        assert not r["kept"][c] and r["influence"][c] == -np.inf and r["score"][c] == 0 and discover.why(r, c) == "in no image, or in all of a class"
    assert r["ranking"][-2:] == [4, 3]


def test_identify_asks_only_images_with_more_than_one_region():
    # two images of class 0 with the feature, both wrong: one has it as its only region, one looks elsewhere
    W, e = torch.eye(2), torch.eye(2)
    z = torch.stack([e[1], e[1], e[0], e[1], e[0]])
    y, count = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 2, 1, 1, 1])
    x = torch.stack([e[1], e[0], e[1], e[0], e[1], e[0]])
    label = torch.tensor([0, 0, 1, 1, 0, 1])
    _, found = told(x, z, W, count, y, ["a", "b"])
    r = discover.identify(label, 2, found, "ravl")
    assert float(r["influence"][0]) == 0 and not r["kept"][0] and "influence 0.00 below 0.25" == discover.why(r, 0)
    assert r["gap"][0, 0] == pytest.approx(2 * 1 / 3 * -1) and r["gap"][1, 0] == pytest.approx(1)


def test_the_least_influence_is_a_flag_and_the_bound_itself_is_kept(monkeypatch):
    label, found, raw = ragged(1, 3, 100, 9)
    r = discover.identify(label, 9, found, "gap_only")
    value = sorted(float(v) for v, s in zip(r["influence"], r["signs"]) if s and v > 0)[0]
    for least, kept in ((value, True), (value + 1e-9, False)):
        monkeypatch.setattr(discover, "influence_least", least)
        again = discover.identify(label, 9, found, "ravl")
        same_as_oracle(again, oracle(label, 9, *raw, least=least), 9)
        assert all(again["kept"][c] == kept for c in range(9) if again["signs"][c] and float(again["influence"][c]) == value)


def test_score_by_chance_is_the_mean_of_the_score_where_the_feature_changes_nothing():
    """The normal approximation of binomial errors, against simulation."""
    g, n, total, chance = torch.Generator().manual_seed(0), 2000, [], []
    image = torch.arange(n)
    for _ in range(60):
        y, label = torch.randint(2, (n,), generator=g), torch.randint(3, (n,), generator=g)
        predicted = torch.where(torch.rand(n, generator=g) < .7, y, 1 - y)
        found = dict(y=y, classes=["a", "b"], predicted=predicted, image=image, count=torch.ones(n).long(), best=image)
        r = discover.identify(label, 3, found, "ravl")
        total.append(float(r["score"].mean())), chance.append(float(r["chance"].mean()))
    assert np.mean(total) == pytest.approx(np.mean(chance), rel=.1)


# --- from embeddings, end to end

CONTRACT = {"config", "k", "silhouette", "clusters", "precision_at_10", "seconds"}
OF_CLUSTER = {"id", "kept", "reason", "score", "influence", "gaps", "medoid", "regions"}
OF_GAP = {"gap", "weight", "acc_in", "n_in", "acc_out", "n_out"}


def plant(path, N=800, D=16, seed=0, **changes):
    """An .npz of data.drawn_regions; changes: arrays instead of its own, None for leaving one out."""
    arrays = {k: v.numpy() for k, v in data.drawn_regions(N, D, seed).items()}
    arrays = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    path.write_bytes(data.npz(**arrays))
    return arrays


def words(path, out, *more):
    return [f"--embeddings={path}", f"--out_dir={out}", *more]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """One run on planted embeddings: (out_dir, arrays)."""
    out = tmp_path_factory.mktemp("planted")
    names = np.array([f"kind <{c}>" for c in range(10)])
    arrays = plant(out / "e.npz", class_names=names)
    assert run(words(out / "e.npz", out)) == 0
    return out, arrays


def check_contract(tree, N):
    assert CONTRACT <= set(tree) and set(tree["seconds"]) == {"cluster", "identify", "rank", "total"}
    clusters = tree["clusters"]
    assert [c["id"] for c in clusters] != list(range(len(clusters))) or len(clusters) < 3
    assert sorted(c["id"] for c in clusters) == list(range(tree["k"]))
    assert sorted(r for c in clusters for r in c["regions"]) == list(range(N))
    kept = [c["kept"] for c in clusters]
    assert kept == sorted(kept, reverse=True) and all(type(v) is bool for v in kept)
    for part in (True, False):
        keys = [(c["score"] if c["score"] is not None else -np.inf, c["id"]) for c in clusters if c["kept"] == part]
        assert keys == sorted(keys, reverse=True)
    for c in clusters:
        assert OF_CLUSTER <= set(c) and c["medoid"] in c["regions"] and (c["reason"] == "kept") == c["kept"] and c["reason"]
        assert c["influence"] is None or 0 <= c["influence"] <= 1
        assert c["score"] == pytest.approx(sum(abs(g["gap"]) for g in c["gaps"].values()))
        for g in c["gaps"].values():
            assert set(g) == OF_GAP and g["n_in"] > 0 and g["n_out"] > 0
            assert g["weight"] == pytest.approx(2 * min(g["n_in"], g["n_out"]) / (g["n_in"] + g["n_out"]))
            assert g["gap"] == pytest.approx(g["weight"] * (g["acc_in"] - g["acc_out"]))
        assert not c["kept"] or c["influence"] >= tree["config"]["influence_least"] and {g["gap"] > 0 for g in c["gaps"].values() if g["gap"]} == {True, False}


def test_discovery_json_keeps_the_contract(planted):
    out, arrays = planted
    tree, x = tree_of(out), torch.from_numpy(arrays["reg_emb"])
    check_contract(tree, len(x))
    assert tree["config"]["seed"] == 0 and tree["config"]["embeddings"].endswith("e.npz") and set(tree["clusters"][0]["gaps"]) <= set(arrays["class_names"].tolist())
    assert tree["base_rate"] == pytest.approx(arrays["region_target"].mean())
    first = tree["clusters"][0]
    assert first["kept"] and tree["precision_at_10"] == pytest.approx(arrays["region_target"][first["regions"][:10]].mean())
    for c in tree["clusters"]:  # ranked by cosine to the medoid, the medoid itself first; all k clusters were found without taking the mean off
        cosine = (x[c["regions"]] @ x[c["medoid"]]).tolist()
        assert not tree["mean_removed"] and c["regions"][0] == c["medoid"] and all(a >= b - 1e-6 for a, b in zip(cosine, cosine[1:]))


def test_planted_feature_is_the_first_cluster_found(planted):
    out, arrays = planted
    tree = tree_of(out)
    first = tree["clusters"][0]
    assert tree["precision_at_10"] == 1 and first["gaps"]["kind <0>"]["gap"] > .2 and first["stability"] > .7
    assert arrays["region_target"][first["regions"]].mean() > .9 and arrays["region_target"].sum() <= len(first["regions"]) + 10


def test_gaps_and_influence_of_the_file_are_those_of_the_slow_definition(planted):
    out, a = planted
    tree, found = tree_of(out), data.load_discovery(out)
    text = torch.from_numpy(unit(torch.from_numpy(a["text_emb"]).double()).numpy() / .07)
    raw = [torch.from_numpy(a[k]).double() for k in ("reg_emb", "img_emb")]
    expected = oracle(found["label"], tree["k"], *raw, text.T, a["num_regions"].tolist(), a["true_label"].tolist())
    expected = [c for c in expected if c["kept"]] + [c for c in expected if not c["kept"]]
    assert [c["id"] for c in tree["clusters"]] == [c["id"] for c in expected]
    for c, e in zip(tree["clusters"], expected):
        assert c["kept"] == e["kept"] and c["score"] == pytest.approx(e["score"]) and c["influence"] == (None if e["influence"] == -np.inf else pytest.approx(e["influence"]))
        assert c["gaps"] == {str(a["class_names"][l]): {"gap": pytest.approx(e["gap"][l]), **{k: pytest.approx(v) for k, v in g.items()}} for l, g in e["gaps"].items()}


def check_bridge(tmp_path, x, *flags):
    assert run(words(tmp_path / "e.npz", tmp_path, *flags)) == 0
    found, tree = data.load_discovery(tmp_path), tree_of(tmp_path)
    assert found["kept"] == [c["id"] for c in tree["clusters"] if c["kept"]] and found["clusters"] == tree["clusters"]
    assert found["medoids"].shape == (tree["k"], 16) and torch.allclose(found["medoids"].norm(dim=1), torch.ones(tree["k"]), atol=1e-5)
    for c in tree["clusters"]:
        assert torch.allclose(found["medoids"][c["id"]], unit(unit(torch.from_numpy(x[c["medoid"]])) - found["mean"]), atol=1e-5)
        assert sorted(c["regions"]) == (found["label"] == c["id"]).nonzero()[:, 0].tolist()
    assert torch.equal(model.assign_regions(torch.from_numpy(x) * 3, found), found["label"])
    return found


@pytest.mark.parametrize("clustering", ["fast", "exact", "ravl"])
def test_discovery_npz_assigns_the_same_clusters_to_the_same_regions(tmp_path, clustering):
    a = plant(tmp_path / "e.npz", seed=2)
    found = check_bridge(tmp_path, a["reg_emb"], f"--clustering={clustering}")
    assert found["image"].tolist() == np.repeat(np.arange(len(a["num_regions"])), a["num_regions"]).tolist()


@pytest.mark.parametrize("clustering", ["fast", "exact", "ravl"])
def test_discovery_npz_assigns_the_same_clusters_where_all_medoids_are_far(tmp_path, clustering):
    """Of medoids that are all beyond the clip, the published procedure takes the first."""
    a = plant(tmp_path / "e.npz", reg_emb=rows(0, 800, 16, 9., 0., "float32", 2))
    check_bridge(tmp_path, a["reg_emb"], f"--clustering={clustering}", "--k=2:5")


def test_discovery_npz_assigns_the_same_where_the_mean_was_taken_off(tmp_path):
    a = plant(tmp_path / "e.npz")
    x = a["reg_emb"] + 1.2 * np.eye(16, dtype="float32")[0]
    plant(tmp_path / "e.npz", reg_emb=x)
    assert check_bridge(tmp_path, x)["mean"].norm() > .3 and tree_of(tmp_path)["mean_removed"]


def check_page(path):
    text = path.read_text()
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", text)
    assert all(link.startswith("data:image/jpeg;base64,") for link in links) and not re.search(r"https?:|url\(|@import|<script", text)
    assert "viewport" in text
    return text, len(links)


def test_page_is_self_contained_and_shows_every_kept_cluster(planted):
    out, _ = planted
    text, _ = check_page(out / "discovery.html")
    for c in tree_of(out)["clusters"]:
        assert not c["kept"] or f"Cluster {c['id']}, score {c['score']:.2f}" in text
    assert "kind &lt;0&gt;" in text and "kind <0>" not in text and "--clustering=fast" in text


def test_console_says_what_was_found(planted, tmp_path, capsys):
    out, _ = planted
    assert run(words(out / "e.npz", tmp_path)) == 0
    said, tree = capsys.readouterr().out, tree_of(tmp_path)
    n = sum(c["kept"] for c in tree["clusters"])
    assert f"{n} spurious features found" in said and f"k = {tree['k']}, silhouette {tree['silhouette']:.3f}" in said
    assert "Precision@10 of the first: 1.00" in said and f"{tree['base_rate']:.3f} show the target" in said and "have a negative cosine" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["discovery.html", "discovery.json", "discovery.npz"]


@pytest.mark.parametrize("clustering", ["fast", "exact", "ravl"])
def test_random_embeddings_find_what_was_planted(tmp_path, clustering):
    assert run(words("random:1200,32", tmp_path, f"--clustering={clustering}", "--k=20:30")) == 0
    tree = tree_of(tmp_path)
    check_contract(tree, 1200)
    assert tree["precision_at_10"] == 1 and .08 < tree["base_rate"] < .17


def test_without_a_target_there_is_no_precision(tmp_path, capsys):
    plant(tmp_path / "e.npz", region_target=None)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    tree = tree_of(tmp_path)
    assert tree["precision_at_10"] is None and tree["base_rate"] is None and any(c["kept"] for c in tree["clusters"])


def test_nothing_found_is_an_answer(tmp_path, capsys):
    plant(tmp_path / "e.npz")
    assert run(words(tmp_path / "e.npz", tmp_path, "--influence_least=1.1")) == 0
    said, tree = capsys.readouterr().out, tree_of(tmp_path)
    check_contract(tree, 800)
    assert not any(c["kept"] for c in tree["clusters"]) and tree["precision_at_10"] is None
    assert "No spurious feature was found. The nearest candidates:" in said and "below 1.1" in said
    text, _ = check_page(tmp_path / "discovery.html")
    assert "no spurious feature was found" in text and data.load_discovery(tmp_path)["kept"] == []


@pytest.mark.parametrize("method", [*discover.CLUSTERS, *discover.LISTS])
def test_each_method(tmp_path, capsys, method):
    a = plant(tmp_path / "e.npz", 400)
    assert run(words(tmp_path / "e.npz", tmp_path, f"--method={method}")) == 0
    tree = tree_of(tmp_path)
    first = tree["clusters"][0]
    assert first["kept"] and tree["precision_at_10"] == pytest.approx(a["region_target"][first["regions"][:10]].mean())
    if method in discover.LISTS:
        assert len(tree["clusters"]) == 1 and len(set(first["regions"])) == len(first["regions"]) > 3
        assert f"ranked list of {method}" in first["reason"]
    else:
        assert sorted(c["id"] for c in tree["clusters"]) == list(range(tree["k"]))
    check_page(tmp_path / "discovery.html")


def test_all_methods_are_compared_and_agree_with_each_alone(tmp_path, capsys):
    plant(tmp_path / "e.npz", 400)
    assert run(words(tmp_path / "e.npz", tmp_path / "all", "--method=all")) == 0
    said, tree = capsys.readouterr().out, tree_of(tmp_path / "all")
    names = {"ravl", "random", "failures", "george", "domino", "spurious_aware", "gap_only", "influence_only", "unweighted"}
    assert set(tree["methods"]) == names and all(re.search(rf"(?m)^{name} +[\d.]+$", said) for name in names)
    check_contract(tree, 400)
    for name in ("ravl", "gap_only", "influence_only", "unweighted", "george"):
        assert run(words(tmp_path / "e.npz", tmp_path / name, f"--method={name}")) == 0
        alone = tree_of(tmp_path / name)
        assert alone["precision_at_10"] == tree["methods"][name]["precision_at_10"] and alone["clusters"][0]["regions"][:100] == tree["methods"][name]["top"]
    assert tree["clusters"] == tree_of(tmp_path / "ravl")["clusters"]


def test_stability_is_the_share_of_k_at_which_a_kept_cluster_shares_half_of_the_regions(monkeypatch):
    n = torch.arange(12)
    sweep = {2: (n >= 6).long(), 3: n // 4, 4: n // 3}
    monkeypatch.setattr(discover, "identify", lambda label, k, found, method: dict(kept=[c == 0 for c in range(k)]))
    got = discover.stability({k: dict(labels=v) for k, v in sweep.items()}, 2, sweep[2], dict(kept=[True, True]), {}, "ravl")
    # cluster 0 is 0..5: itself; 0..3 of 4 shares 4 of 6; 0..2 shares 3 of 6: all count. Cluster 1 is 6..11: never near a kept one
    assert got == {0: 1., 1: 0.}
    assert discover.stability({6: dict(labels=n // 2)}, 2, sweep[2], dict(kept=[True, False]), {}, "ravl") == {0: 0.}


@pytest.mark.parametrize("n", [1, 2, 14, 15, 16, 23, 40])
def test_stability_asks_up_to_15_k_from_the_first_to_the_last(monkeypatch, n):
    tried, sweep = [], {k: dict(labels=torch.arange(50) % k) for k in range(2, 2 + n)}
    monkeypatch.setattr(discover, "identify", lambda label, k, found, method: tried.append(k) or dict(kept=[True] * k))
    discover.stability(sweep, 2, sweep[2]["labels"], dict(kept=[True, False]), {}, "ravl")
    steps = np.diff(tried)
    assert len(tried) == min(n, 15) and (tried[0], tried[-1]) == (2, 1 + n) and (n == 1 or 0 < steps.min() >= steps.max() - 1)


@pytest.mark.parametrize("kind", ["float16", "float64", "fortran", "big endian"])
def test_other_ways_to_store_the_embeddings(tmp_path, kind):
    a = data.drawn_regions(400, 16)["reg_emb"].numpy()
    a = dict(float16=a.astype("float16"), float64=a.astype("float64"), fortran=np.asfortranarray(a)).get(kind, a.astype(">f4"))
    plant(tmp_path / "e.npz", 400, reg_emb=a)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert tree_of(tmp_path)["precision_at_10"] == 1


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "uint64", ">i4"])
def test_whole_numbers_of_any_type(tmp_path, kind):
    arrays = plant(tmp_path / "e.npz", 400)
    plant(tmp_path / "e.npz", 400, **{k: arrays[k].astype(kind) for k in ("num_regions", "true_label", "region_target")})
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert tree_of(tmp_path)["precision_at_10"] == 1


def test_a_target_of_nan_is_not_known(tmp_path):
    target = plant(tmp_path / "e.npz", 400)["region_target"].astype("float32")
    target[np.flatnonzero(target == 0)[::2]] = np.nan
    plant(tmp_path / "e.npz", 400, region_target=target)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert tree_of(tmp_path)["base_rate"] == pytest.approx(np.nanmean(target))


# --- bad input: one line, no traceback

BAD = {"no reg_emb": (dict(reg_emb=None), ("no array 'reg_emb'", "num_regions")), "no img_emb": (dict(img_emb=None), ("no array 'img_emb'",)),
       "other D": (dict(text_emb=np.ones((10, 7))), ("reg_emb [400, 16]", "text_emb [10, 7]", "one D")),
       "other n": (dict(true_label=np.zeros(7, int)), ("true_label [7]",)), "sum": (dict(num_regions=np.full(100, 3)), ("sum 300", "reg_emb [400, 16]")),
       "negative count": (dict(num_regions=np.array([-1, 5] * 50) * 2), ("num_regions",)), "float labels": (dict(true_label=np.zeros(100)), ("whole numbers",)),
       "labels in a column": (dict(true_label=np.zeros((100, 1), int)), ("true_label [100, 1]", "whole numbers [n]")),
       "counts in a column": (dict(num_regions=np.full((100, 1), 4)), ("num_regions [100, 1]", "whole numbers [n]")),
       "label too high": (dict(true_label=np.arange(100) % 11), ("true_label from 0 to 10", "10 classes", "0 to 9")),
       "label too low": (dict(true_label=np.arange(100) % 5 - 1), ("true_label from -1 to 3",)),
       "target": (dict(region_target=np.zeros(5)), ("region_target [5]", "[400]")), "names": (dict(class_names=np.array(["a", "b"])), ("2 class_names", "400] and 10")),
       "nan image": (dict(img_emb=np.full((100, 16), np.nan)), ("img_emb", "row 0")), "zero text": (dict(text_emb=np.zeros((10, 16))), ("text_emb", "zero")),
       "one class": (dict(text_emb=np.ones((1, 16)), true_label=np.zeros(100, int)), ("one class", "two or more")),
       "all equal": (dict(reg_emb=np.ones((400, 16), "float32")), ("all equal", "nothing to cluster")),
       "no region": (dict(reg_emb=np.ones((0, 16), "float32"), num_regions=np.zeros(100, int), region_target=None), ("none of its 100 images has a region",)),
       "no image": (dict(reg_emb=np.ones((0, 16)), num_regions=np.zeros(0, int), true_label=np.zeros(0, int), img_emb=np.ones((0, 16)), region_target=None), ("no images",))}


@pytest.mark.parametrize("name", BAD)
def test_bad_embeddings_are_one_line_and_exit_code_2(tmp_path, capsys, name):
    changes, expected = BAD[name]
    plant(tmp_path / "e.npz", 400, **changes)
    refused(capsys, words(tmp_path / "e.npz", tmp_path / "out"), tmp_path / "e.npz" if name != "all equal" else "", *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row, value, expected", [(7, 0., "region 7 is zero"), (399, np.nan, "region 399 is not finite"), (250, np.inf, "region 250 is not finite")])
def test_zero_or_nan_row_is_named(tmp_path, capsys, row, value, expected):
    x = data.drawn_regions(400, 16)["reg_emb"].numpy()
    x[row] = value
    plant(tmp_path / "e.npz", 400, reg_emb=x)
    refused(capsys, words(tmp_path / "e.npz", tmp_path / "out"), tmp_path / "e.npz", expected)


@pytest.mark.parametrize("content", [b"", b"garbage" * 40, "cut", "object"])
def test_file_that_is_no_npz(tmp_path, capsys, content):
    path = tmp_path / "e.npz"
    plant(path, 400, **(dict(class_names=np.array([["a"], 3], object)) if content == "object" else {}))
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:3000 if content == "cut" else None])
    refused(capsys, words(path, tmp_path / "out"), path, "not an .npz file of plain arrays")


@pytest.mark.parametrize("word, expected", [
    ("--methd=ravl", ("--methd", "method")), ("--method=magic", ("--method", "spurious_aware")), ("--clustering=slow", ("--clustering", "fast, exact, ravl")),
    ("--batch_size=0", ("--batch_size", "from 1")), ("--threads=-1", ("--threads", "from 0")), ("--difficulty=99", ("--difficulty", "from 0 to 1")),
    *[(f"--influence_least={v}", ("--influence_least",)) for v in ("inf", "-inf", "nan")],
    *[(f"--{word}", (f"--{word.split('=')[0]}: ", "nothing with --embeddings")) for word in (
        "data=waterbirds:x", "split=test", "confounder=0.9", "difficulty=0.5", "masks=x", "outside=0.5", "regions=grid:2", "region_encoder=crop", "classifier=text",
        "ckpt=x", "probe=bap", "classes=x", "prompts=x", "model=tiny", "pretrained=x", "quick_gelu=on")],
    ("--centre=maybe", ("--centre",)), ("--region_encoder=roll", ("--region_encoder",)), ("--classifier=knn", ("--classifier",)), ("--temperature=0", ("--temperature",)),
    ("--l2=inf", ("--l2",)), ("--outside=0", ("--outside",)), ("--outside=1.1", ("--outside",)), ("--seed=-1", ("--seed",)), ("--k=20", ("--k", "LOW:HIGH")),
    ("--k=1:5", ("--k",)), ("--k=9:9", ("--k",)), ("--k=5000:6000", ("--k", "5000 clusters of 400 regions")), ("--embeddings=nowhere.npz", ("nowhere.npz", "no such file")),
    ("--embeddings=random:many", ("random:N,D",)), ("--embeddings=random:5,5", ("random:5,5", "at least 40 regions"))])
def test_bad_flag_is_one_line_and_exit_code_2(planted, tmp_path, capsys, word, expected):
    refused(capsys, [*words("random:400,16", tmp_path / "out"), word], *expected)
    assert not (tmp_path / "out").exists()


def test_k_larger_than_the_number_of_regions_is_cut(tmp_path, capsys):
    plant(tmp_path / "e.npz", 40)
    assert run(words(tmp_path / "e.npz", tmp_path, "--k=30:60")) == 0
    assert "30 to 59 wanted, but there are 40 regions; up to 39 is used" in capsys.readouterr().out
    assert tree_of(tmp_path)["k"] <= 39


def test_embeddings_that_are_not_unit_norm_are_normalised_and_that_is_said(tmp_path, planted, capsys):
    a = planted[1]
    scale = np.random.RandomState(0).uniform(.5, 9, (800, 1)).astype("float32")
    plant(tmp_path / "e.npz", reg_emb=a["reg_emb"] * scale, class_names=a["class_names"])
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert "reg_emb is not unit-norm" in capsys.readouterr().out
    strip = lambda clusters: [{k: v for k, v in c.items() if k != "regions"} | dict(regions=sorted(c["regions"])) for c in clusters]
    assert strip(tree_of(tmp_path)["clusters"]) == strip(tree_of(planted[0])["clusters"])


@pytest.mark.parametrize("name", ["img_emb", "text_emb"])
def test_embeddings_of_images_or_text_that_are_not_unit_norm_are_said_too(tmp_path, planted, capsys, name):
    plant(tmp_path / "e.npz", **{name: 5 * planted[1][name]})
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert tree_of(tmp_path)["precision_at_10"] == 1
    assert f"{name} is not unit-norm" in capsys.readouterr().out


def test_images_without_a_region_are_counted_and_kept(tmp_path, capsys):
    count = np.full(200, 4)
    count[:50], count[50:100] = 0, 8
    plant(tmp_path / "e.npz", num_regions=count)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert "50 of 200 images have no region" in capsys.readouterr().out
    c = tree_of(tmp_path)["clusters"][0]
    assert any(g["n_in"] + g["n_out"] > 10 for g in c["gaps"].values())
    assert sum(g["n_in"] + g["n_out"] for g in c["gaps"].values()) > 150


def perfect(path, noise=.1):
    a = data.drawn_regions(400, 16)
    return plant(path, 400, img_emb=a["text_emb"][a["true_label"]].numpy() + noise * np.random.RandomState(0).randn(100, 16) / 4)


def test_perfect_classifier_finds_nothing_and_says_why(tmp_path, capsys):
    perfect(tmp_path / "e.npz")
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    said, tree = capsys.readouterr().out, tree_of(tmp_path)
    assert "the classifier is right on all 100 images" in said and "No spurious feature was found" in said
    assert not any(c["kept"] for c in tree["clusters"]) and all(c["influence"] is None for c in tree["clusters"]) and tree["accuracy"] == 1


@pytest.mark.parametrize("method", ["all", *discover.CLUSTERS, *discover.LISTS])
def test_perfect_classifier_under_each_method(tmp_path, capsys, method):
    perfect(tmp_path / "e.npz")
    assert run(words(tmp_path / "e.npz", tmp_path, f"--method={method}")) == 0
    tree_of(tmp_path)


@pytest.mark.parametrize("method", ["all", "george"])
def test_equal_images_in_a_class(tmp_path, method):
    a = data.drawn_regions(400, 16)
    z = torch.where(a["true_label"][:, None] == 3, a["img_emb"][0], a["img_emb"])
    plant(tmp_path / "e.npz", 400, img_emb=z.numpy())
    assert run(words(tmp_path / "e.npz", tmp_path, f"--method={method}")) == 0


def test_images_of_one_class_find_nothing_and_say_why(tmp_path, capsys):
    plant(tmp_path / "e.npz", 400, true_label=np.full(100, 3))
    assert run(words(tmp_path / "e.npz", tmp_path, "--method=all")) == 0
    said = capsys.readouterr().out
    assert "all images are of one class (3)" in said and "No spurious feature was found" in said


@pytest.mark.parametrize("clustering", ["fast", "exact", "ravl"])
@pytest.mark.parametrize("method", ["ravl", "all"])
def test_regions_of_few_kinds(tmp_path, capsys, clustering, method):
    """Three different rows, k from 20: no crash, and no more clusters than kinds where clusters are ours."""
    x = np.eye(16, dtype="float32")[np.arange(400) % 3]
    plant(tmp_path / "e.npz", 400, reg_emb=x)
    assert run(words(tmp_path / "e.npz", tmp_path, f"--clustering={clustering}", f"--method={method}")) == 0
    tree = tree_of(tmp_path)
    assert sorted(r for c in tree["clusters"] for r in c["regions"]) == list(range(400))
    assert clustering == "ravl" or tree["k"] == 3


def test_all_regions_equal_in_the_published_procedure(tmp_path, capsys):
    plant(tmp_path / "e.npz", 400, reg_emb=np.ones((400, 16), "float32"))
    code = run(words(tmp_path / "e.npz", tmp_path, "--clustering=ravl"))
    said = capsys.readouterr()
    assert code == 0 and "not positive for any k" in said.out or code == 2 and said.err.count("\n") == 1 and "equal" in said.err


def test_out_dir_that_is_a_file(planted, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    refused(capsys, words("random:400,16", tmp_path / "out"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_help_prints_the_block_of_defaults(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{k}" in shown for k in ("out_dir", "embeddings", "regions", "clustering", "seed")) and "def main" not in shown
    assert "This is a picture of a {}." in shown  # --prompts: not every set has the same


# --- baselines, where the right answer is known

def errors(n=40, D=8, seed=0):
    """Two classes; class 0's second half shows a feature (dimension 2) and is taken for class 1. Each image has a region of its object and one of the
    feature or of another ground (dimension 3). Returns x, found, and which regions show the feature in class 0."""
    g = torch.Generator().manual_seed(seed)
    e, noise = torch.eye(D), lambda *size: .05 * torch.randn(*size, generator=g)
    y = torch.arange(2 * n) // n
    has = (y == 0) & (torch.arange(2 * n) % n >= n // 2)
    ground = torch.where(has[:, None], e[2], e[3])
    z = unit(e[y] + ground + noise(2 * n, D))
    x = unit(torch.stack([e[y] + noise(2 * n, D), ground + noise(2 * n, D)], 1).flatten(0, 1))
    W = torch.zeros(D, 2)
    W[0, 0], W[1, 1], W[2, 1] = 1, 1, 3
    x, found = told(x, z, W, torch.full((2 * n,), 2), y, ["a", "b"])
    assert torch.equal(found["predicted"] != y, has)
    return x, found, set((2 * has.nonzero()[:, 0] + 1).tolist()), has


@pytest.mark.parametrize("method", ["failures", "george", "domino"])
def test_baseline_ranks_the_regions_of_the_failing_images_first(method):
    x, found, wanted, has = errors()
    ranked = getattr(discover, method)(x, found).tolist()
    images, failing = {int(found["image"][r]) for r in ranked}, set(has.nonzero()[:, 0].tolist())
    if method == "domino":  # of equal images the mixture may make several slices
        assert images <= failing and len(images) > 2
        wanted = {2 * i + 1 for i in images}
    else:
        assert images == (set(range(40)) if method == "failures" else failing)  # a class's, a cluster's
    assert set(ranked[:len(wanted)]) == wanted and len(set(ranked)) == len(ranked) == 2 * len(images)


def test_failures_takes_the_least_accurate_class_first_and_leaves_out_classes_without_errors():
    x, found, wanted, _ = errors()
    y = found["y"]
    found["predicted"] = found["predicted"].clone()
    found["predicted"][45] = 0  # one error in class 1
    assert discover.worst_labels(found) == [0, 1]
    ranked = discover.failures(x, found)
    assert (y[found["image"][ranked]] == torch.arange(2).repeat_interleave(80)).all() and set(ranked[:20].tolist()) == wanted
    found["predicted"] = y
    assert discover.worst_labels(found) == [] and sorted(discover.failures(x, found).tolist()) == list(range(160))


def test_george_takes_the_cluster_with_the_lowest_accuracy_of_any_class():
    x, found, _, _ = errors()
    found["predicted"] = torch.where((found["y"] == 1) & (found["z"][:, 3] > 0) & (torch.arange(80) % 2 == 0), 0, found["y"])
    found["z"] = unit(found["z"] + torch.eye(8)[4 + (torch.arange(80) % 2)])  # the even ones of class 1 stand apart, and fail
    ranked = discover.george(x, found).tolist()
    assert {int(found["image"][r]) for r in ranked} == set(range(40, 80, 2))


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2])
def test_george_of_images_that_are_nearly_alike(spread):
    x, found, _, _ = errors()
    found["z"] = unit(found["z"][:1] + spread * torch.randn(80, found["z"].shape[1], generator=torch.Generator().manual_seed(0)))
    assert len(discover.george(x, found)) > 0


def test_spurious_aware_ranks_the_regions_of_wrong_images_by_their_score_for_the_predicted_class():
    x, found, wanted, has = errors()
    ranked = discover.spurious_aware(x, found).tolist()
    p = torch.stack([x[:, 0], x[:, 1] + 3 * x[:, 2]], 1).double().softmax(1)[:, 1]  # all are taken for class 1
    assert sorted(ranked) == [r for r in range(160) if has[found["image"][r]]] and set(ranked[:20]) == wanted
    assert all(p[a] >= p[b] - 1e-6 for a, b in zip(ranked, ranked[1:]))


def test_random_is_a_permutation_that_the_seed_decides(monkeypatch):
    x, found, _, _ = errors()
    one, again = (discover.random(x, found).tolist() for _ in range(2))
    monkeypatch.setattr(discover, "seed", 1)
    assert sorted(one) == list(range(160)) and one == again != discover.random(x, found).tolist()


# --- images

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder in the Waterbirds layout with masks, its images 96x64: the model sees the middle two thirds."""
    root = tmp_path_factory.mktemp("photos")
    birds(root, ((12, 4, 4, 12), (6, 5, 5, 6), (3, 3, 3, 3)))
    for path in root.rglob("*.png"):
        Image.open(path).resize((96, 64)).save(path)
    (root / "cache").mkdir()
    return root


def words_of(photos, out, *more, model="tiny"):
    return [f"--data=waterbirds:{photos / 'set'}", f"--model={model}", f"--cache_dir={photos / 'cache'}", f"--out_dir={out}", "--dtype=float32", "--centre=off", *more]


@pytest.fixture(scope="module")
def tiny():
    return model.load_encoder("tiny", device="cpu")


def by_hand(encoder, found, kind="pool"):
    """Embeddings of the regions that discovery.npz lists, one image at a time: unit-norm [N, D]."""
    out = []
    for i, path in enumerate(found["paths"]):
        boxes = found["box"][found["image"] == i].double()
        if not len(boxes):
            continue
        image = Image.open(path).convert("RGB")
        left, top, right, bottom = encoder.frame(*image.size)
        share = torch.stack([(boxes[:, 0] - left) / (right - left), (boxes[:, 1] - top) / (bottom - top),
                             (boxes[:, 2] - left) / (right - left), (boxes[:, 3] - top) / (bottom - top)], 1).clamp(0, 1)
        with torch.inference_mode():
            x = encoder.transform(image)[None]
            if kind == "pool":
                m = encoder.maps(x)
                h, w = m.shape[1:3]
                out.append(region_pool_ref(m.double(), share * torch.tensor([w, h, w, h]), torch.zeros(len(boxes), dtype=torch.long)))
            elif kind == "roi":
                out.append(model.roi_regions(encoder.fast, x, [share.float()])[1])
            else:
                pictures, _ = data.load_regions(found["regions"], [data.Photo(path)], encoder.frame)
                crops = [data.Crop(data.Photo(path), box).image() for box in pictures[0].boxes]
                out.append(encoder.images(torch.stack([encoder.transform(c) for c in crops])))
    return unit(torch.cat(out).float())


def check_images(photos, out, encoder, kind="pool"):
    """Files of a run on images: the contract, medoids and clusters of regions embedded by hand."""
    tree, found = tree_of(out), data.load_discovery(out)
    n = len(found["label"])
    check_contract(tree, n)
    x = by_hand(encoder, found, kind)
    assert found["fingerprint"] == encoder.fingerprint and found["region_encoder"] == kind and found["data"] == f"waterbirds:{photos / 'set'}"
    medoids = torch.tensor([c["medoid"] for c in sorted(tree["clusters"], key=lambda c: c["id"])])
    assert torch.allclose(x[medoids], found["medoids"], atol=1e-4)
    label = found["label"]
    assert bool(((x @ found["medoids"].T).gather(1, label[:, None])[:, 0] >= (x @ found["medoids"].T).amax(1) - 1e-4).all())
    assert (model.assign_regions(x, found) == label).double().mean() > .98
    return tree, found, x


def paths_of(photos, split=1):
    with open(photos / "set/metadata.csv", newline="") as file:
        return [str(photos / "set" / row["img_filename"]) for row in csv.DictReader(file) if int(row["split"]) == split]


@pytest.mark.parametrize("kind", ["pool", "crop"])
def test_grid_regions_of_images_are_what_a_hand_made_pooling_gives(photos, tiny, tmp_path, kind, capsys):
    assert run(words_of(photos, tmp_path, "--classifier=probe", f"--region_encoder={kind}", "--regions=grid:2,3", f"--masks={photos / 'masks'}")) == 0
    tree, found, x = check_images(photos, tmp_path, tiny, kind)
    paths = paths_of(photos)
    assert found["paths"] == paths and found["image"].tolist() == np.repeat(np.arange(22), 13).tolist()
    # the model sees a 64x64 square in the middle of 96x64: shares of the original image
    assert found["box"][0].tolist() == pytest.approx([1 / 6, 0, .5, .5], abs=1e-6) and found["box"][12].tolist() == pytest.approx([1 / 6 + 4 / 9, 2 / 3, 5 / 6, 1], abs=1e-6)
    # the probe is train.py's erm, on unit embeddings of the training images
    samples = data.load_data(found["data"])
    z, _ = model.embed(tiny, samples.items, cache="", dtype="float32")
    train, val = samples.split == 0, samples.split == 1
    fitted = model.fit_probe(unit(z[train]), samples.y[train], .8, classes=2)
    assert tree["accuracy"] == pytest.approx(float((fitted.predict(unit(z[val])) == samples.y[val]).double().mean()))
    raw = x, unit(z[val]), None, [13] * 22, samples.y[val].tolist()
    check_step_2(tree, found, raw, fitted.logits, ["0", "1"])
    # the target: at least 90 % outside of the mask
    outside = [float((np.asarray(Image.open(photos / "masks" / Path(p).name).convert("L")) <= 127)[slice(*edges(b[1], b[3], 64)), slice(*edges(b[0], b[2], 96))].mean())
               for p, boxes in zip(paths, found["box"].view(22, 13, 4).tolist()) for b in boxes]
    assert tree["base_rate"] == pytest.approx(np.mean([v >= .9 for v in outside]), abs=.03)
    text, pictures = check_page(tmp_path / "discovery.html")
    assert pictures >= 10


def edges(low, high, n):
    return round(low * n), round(high * n)


def check_step_2(tree, found, raw, logits, names):
    """Clusters of a run are scored as the slow definition does, with a classifier that is a function."""
    class Linear:
        def __init__(self, v):
            self.v = v

        def __matmul__(self, W):
            return logits(self.v)
    W = torch.zeros(1, len(names))
    expected = {c["id"]: c for c in oracle(found["label"], tree["k"], Linear(raw[0]), Linear(raw[1]), W, *raw[3:])}
    for c in tree["clusters"]:
        e = expected[c["id"]]
        assert c["score"] == pytest.approx(e["score"]) and c["influence"] == (None if e["influence"] == -np.inf else pytest.approx(e["influence"])) and c["kept"] == e["kept"]
        assert {l: g["gap"] for l, g in c["gaps"].items()} == pytest.approx({names[l]: v for l, v in e["gap"].items()})


def test_second_run_comes_from_the_cache_and_is_the_same(photos, tmp_path, monkeypatch, capsys):
    flags = "--classifier=probe", "--regions=grid:4"
    assert run(words_of(photos, tmp_path / "a", *flags)) == 0
    assert "22 embedded" in capsys.readouterr().out
    assert run(words_of(photos, tmp_path / "b", *flags)) == 0
    said = capsys.readouterr().out
    assert "regions: 22 from the cache" in said and "embedded in" not in said
    assert tree_of(tmp_path / "a")["clusters"] == tree_of(tmp_path / "b")["clusters"]
    assert run(words_of(photos, tmp_path / "c", "--classifier=probe", "--regions=grid:5")) == 0
    assert "22 embedded" in capsys.readouterr().out  # other regions are not taken for these


def test_zero_shot_by_text(photos, tiny, tmp_path, capsys):
    assert run(words_of(photos, tmp_path)) == 0
    assert "text embeddings, prompts 'This is a picture of a 0.'" in capsys.readouterr().out
    tree, found, x = check_images(photos, tmp_path, tiny)
    text = tiny.class_embeddings(["0", "1"], ["This is a picture of a {}."])
    z, _ = model.embed(tiny, [data.Photo(p) for p in found["paths"]], cache="", dtype="float32")
    y = data.load_data(found["data"]).y[32:54]
    assert tree["accuracy"] == pytest.approx(float(((unit(z) @ text.T).argmax(1) == y).double().mean()))
    check_step_2(tree, found, (x, unit(z), None, [9] * 22, y.tolist()), lambda v: v @ text.T / .07, ["0", "1"])


def rectangles(photos, form, path, paths):
    """The same boxes in pixels for each picture, as CSV or COCO, in margins and over edges; [(box in shares)] that are seen."""
    boxes = [(10, 5, 60, 40), (30, 20, 90, 64), (70, 0, 100, 30), (0, 0, 10, 64)]  # the third is cut off at the edge, the last lies where the model does not look
    if form == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("path", "x1", "y1", "x2", "y2"), *[(f"set/{Path(p).name}", *b) for p in paths for b in boxes]])
    else:
        path.write_text(json.dumps(dict(images=[dict(id=7 + k, file_name=Path(p).name) for k, p in enumerate(paths)],
                                        annotations=[dict(id=1, image_id=7 + k, bbox=[b[0], b[1], b[2] - b[0], b[3] - b[1]], iscrowd=crowd)
                                                     for k in range(len(paths)) for b, crowd in zip([*boxes, (1, 1, 5, 5)], [0, 0, 0, 0, 1])])))
    return [(10 / 96, 5 / 64, 60 / 96, 40 / 64), (30 / 96, 20 / 64, 90 / 96, 1), (70 / 96, 0, 1, 30 / 64)]


@pytest.mark.parametrize("form, kind", [("csv", "pool"), ("coco", "pool"), ("csv", "crop")])
def test_boxes_are_regions(photos, tiny, tmp_path, capsys, form, kind):
    paths = paths_of(photos)
    seen = rectangles(photos, form, tmp_path / "boxes", paths[:-2])  # two images have none
    assert run(words_of(photos, tmp_path, f"--regions={dict(csv='boxes', coco='coco')[form]}:{tmp_path / 'boxes'}", f"--region_encoder={kind}")) == 0
    said = capsys.readouterr().out
    assert "20 boxes lie in a margin" in said and "2 of 22 images have no region" in said
    _, found, _ = check_images(photos, tmp_path, tiny, kind)
    assert found["image"].tolist() == np.repeat(np.arange(20), 3).tolist() and len(found["paths"]) == 22
    assert torch.allclose(found["box"].double(), torch.tensor(seen * 20).double(), atol=1e-6)


def grey_masks(photos, folder, paths):
    """For each picture a mask of three regions: above, left below, right below."""
    folder.mkdir()
    a = np.zeros((64, 96), "uint8")
    a[32:], a[32:, 48:] = 100, 200
    for p in paths:
        Image.fromarray(a).save(folder / Path(p).name)


def test_masks_are_regions(photos, tiny, tmp_path):
    grey_masks(photos, tmp_path / "m", paths_of(photos))
    assert run(words_of(photos, tmp_path, f"--regions=masks:{tmp_path / 'm'}")) == 0
    _, found, _ = check_images(photos, tmp_path, tiny)  # rectangles: pooled by mask as by box
    assert torch.allclose(found["box"].float(), torch.tensor([[0, 0, 1, .5], [0, .5, .5, 1], [.5, .5, 1, 1]]).repeat(22, 1), atol=1e-6)


def test_masks_are_regions_where_an_image_has_no_mask(photos, tiny, tmp_path, capsys):
    grey_masks(photos, tmp_path / "m", paths_of(photos)[1:])
    assert run(words_of(photos, tmp_path, f"--regions=masks:{tmp_path / 'm'}")) == 0
    assert "1 of 22 images have no region" in capsys.readouterr().out


def test_roi_regions_of_a_clip_resnet(photos, tmp_path):
    import open_clip
    from test_model import SMALL
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/flock-rn.json").write_text(json.dumps(SMALL["flock-rn"]))
    open_clip.add_model_config(tmp_path / "configs")
    torch.manual_seed(0)
    encoder = model.load_encoder("flock-rn", "none", device="cpu")
    torch.save(encoder.module.state_dict(), tmp_path / "rn.pt")
    encoder = model.load_encoder("flock-rn", str(tmp_path / "rn.pt"), device="cpu")
    assert run(words_of(photos, tmp_path / "out", "--classifier=probe", "--region_encoder=roi", f"--pretrained={tmp_path / 'rn.pt'}", model="flock-rn")) == 0
    check_images(photos, tmp_path / "out", encoder, "roi")


def test_roi_is_for_clip_s_resnets_only(photos, tmp_path, capsys):
    refused(capsys, words_of(photos, tmp_path, "--classifier=probe", "--region_encoder=roi"), "--region_encoder=roi", "ResNets")


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A checkpoint of train.py."""
    out, train, before = tmp_path_factory.mktemp("trained"), DISCOVER.replace("discover.py", "train.py"), sys.argv
    sys.argv = [train, f"--data=waterbirds:{photos / 'set'}", "--foregrounds=drawn", "--backgrounds=drawn", "--model=tiny", "--instances=16", "--per_instance=2", "--own=0",
                f"--cache_dir={photos / 'cache'}", f"--out_dir={out}", "--dtype=float32"]
    try:
        runpy.run_path(train, run_name="__main__")
    finally:
        sys.argv = before
    return out / "ckpt.pt"


@pytest.mark.parametrize("name", ["erm", "bap"])
def test_probe_of_a_checkpoint(photos, tiny, trained, tmp_path, name, capsys):
    assert run(words_of(photos, tmp_path, f"--ckpt={trained}", f"--probe={name}")) == 0
    assert f"probe {name} of {trained}" in capsys.readouterr().out
    tree, found, x = check_images(photos, tmp_path, tiny)
    state = torch.load(trained, weights_only=True)
    z, _ = model.embed(tiny, [data.Photo(p) for p in found["paths"]], cache="", dtype="float32")
    g = unit if name == "erm" else model.Map(state["map"]["mu"], state["map"]["W"], state["power"])
    y = data.load_data(found["data"]).y[32:54]
    logits = lambda v: model.Probe(**state["probes"][name]).logits(g(v).detach())
    assert tree["accuracy"] == pytest.approx(float((logits(z).argmax(1) == y).double().mean()))
    check_step_2(tree, found, (x, z, None, [9] * 22, y.tolist()), logits, ["0", "1"])


@pytest.mark.parametrize("name", ["erm", "bap"])
def test_logits_of_a_checkpoint_s_probe(photos, tiny, trained, monkeypatch, name):
    monkeypatch.setattr(discover, "ckpt", str(trained))
    monkeypatch.setattr(discover, "probe", name)
    logits, _ = discover.suspect(tiny, data.load_data(f"waterbirds:{photos / 'set'}"), ["val"])
    state, v = torch.load(trained, weights_only=True), torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    g = unit if name == "erm" else model.Map(state["map"]["mu"], state["map"]["W"], state["power"])
    expected = model.Probe(**state["probes"][name]).logits(g(v).detach())
    assert torch.allclose(logits(v), expected, atol=1e-5) and expected.std() > .01


def test_a_probe_is_not_looked_at_on_what_it_was_fitted_on(photos, trained, tmp_path, capsys):
    refused(capsys, words_of(photos, tmp_path, f"--ckpt={trained}", "--probe=val_probe"), "--split=val", "val_probe was fitted on the val split")
    refused(capsys, words_of(photos, tmp_path, f"--ckpt={trained}", "--split=train"), "--split=train", "erm was fitted on the train split")
    refused(capsys, words_of(photos, tmp_path, "--probe=bap"), "--probe", "--ckpt=FILE")
    refused(capsys, words_of(photos, tmp_path, f"--ckpt={trained}", "--classifier=text"), "--ckpt", "--classifier=text")


def test_a_split_without_images_is_a_line(tmp_path, capsys):
    names = ("00_dog", "01_bird", "02_wheeled vehicle", "03_reptile", "04_carnivore", "05_insect", "06_musical instrument", "07_primate", "08_fish")
    for k, (version, name) in enumerate((v, n) for v in ("mixed_same", "mixed_rand") for n in names):
        folder = tmp_path / "in9" / version / "val" / name
        folder.mkdir(parents=True)
        for j in range(5):
            Image.new("RGB", (64, 64), (12 * k, 40 * j, 99)).save(folder / f"{j}.png")
    refused(capsys, [f"--data=in9:{tmp_path / 'in9'}", "--model=tiny", "--split=test", f"--cache_dir={tmp_path}", f"--out_dir={tmp_path}"], "--split=test", "no images there")


def test_regions_of_which_nothing_is_known_do_not_count():
    nan = float("nan")
    found = dict(target=torch.tensor([nan, 1., nan, 0., 1., nan]))
    assert discover.precision([0, 1, 2, 3], found) == .5 and discover.precision([0, 1, 2, 4, 3], found, 2) == 1.
    assert discover.precision([0, 2, 5], found) is None and discover.precision([], found) is None
    assert discover.precision(range(6), found, 6) == pytest.approx(2 / 3)


def test_two_classes_of_one_name_are_refused(tmp_path, capsys):
    d = data.drawn_regions(400, 16)
    np.savez(tmp_path / "e.npz", class_names=["a", "a", *"bcdefghi"], **{k: v.numpy() for k, v in d.items()})
    refused(capsys, [f"--embeddings={tmp_path / 'e.npz'}", f"--out_dir={tmp_path}"], "class_names lists 'a' twice")


def test_checkpoint_of_another_kind(photos, trained, tmp_path, capsys):
    refused(capsys, words_of(photos, tmp_path, f"--ckpt={trained}", "--probe=magic"), "--probe=magic", "erm")
    refused(capsys, words_of(photos, tmp_path, f"--ckpt={trained}", "--probe=leace"), "--probe=leace")
    refused(capsys, words_of(photos, tmp_path, f"--ckpt={tmp_path / 'none.pt'}"), "none.pt", "no such checkpoint")
    birds(tmp_path, ((2,) * 9, (2,) * 9, (2,) * 9), 3, 3)
    refused(capsys, [*words_of(photos, tmp_path / "o", f"--ckpt={trained}"), f"--data=waterbirds:{tmp_path / 'set'}"], "made for the classes ['0', '1']", "['0', '1', '2']")


@pytest.mark.parametrize("form, box, expected", [
    ("csv", "200,5,300,20", ("line 2", "lies outside its picture of 96x64 pixels")), ("csv", "20,70,30,90", ("line 2", "outside")), ("csv", "-9,5,0,20", ("line 2", "outside")),
    ("csv", "20,5,20,9", ("line 2", "has no area")), ("csv", "20,9,40,5", ("line 2", "has no area")), ("csv", "a,b,c,d", ("line 2", "four numbers")), ("csv", "1,2,nan,4", ("line 2", "four numbers")),
    ("csv", "1,2", ("line 2", "four numbers")), ("coco", "200,5,100,20", ("annotation 3", "outside")), ("coco", "20,5,0,20", ("annotation 3", "no area")), ("coco", "1,2", ("not a COCO",))])
def test_bad_box_names_its_line(photos, tmp_path, capsys, form, box, expected):
    path, name = tmp_path / "boxes", Path(paths_of(photos)[0]).name
    if form == "csv":
        path.write_text(f"path,x1,y1,x2,y2\nset/{name},{box}\n")
    else:
        path.write_text(json.dumps(dict(images=[dict(id=1, file_name=name)], annotations=[dict(id=3, image_id=1, bbox=[float(v) for v in box.split(",")])])))
    refused(capsys, words_of(photos, tmp_path / "o", f"--regions={dict(csv='boxes', coco='coco')[form]}:{path}"), path, *expected)


@pytest.mark.parametrize("word, expected", [
    ("--regions=grid:0", ("--regions", "grid:N")), ("--regions=tiles:3", ("--regions", "masks:DIR")), ("--regions=boxes:nowhere.csv", ("nowhere.csv",)),
    ("--regions=coco:nowhere.json", ("nowhere.json",)), ("--regions=masks:nowhere", ("nowhere", "no such folder")), ("--masks=nowhere", ("--masks", "no such folder")),
    ("--split=vall", ("--split", "train, val, test")), ("--classifier=rows", ("no linear classifier",)), ("--data=waterbirds:nowhere", ("nowhere", "no such folder"))])
def test_bad_flag_about_images(photos, tmp_path, capsys, word, expected):
    refused(capsys, [*words_of(photos, tmp_path / "o"), word], *expected)


def test_images_without_labels_are_a_line(photos, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for path in paths_of(photos)[:4]:
        shutil.copy(path, tmp_path / "flat")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    argv = [f"--data=folder:{tmp_path / 'flat'}", f"--classes={tmp_path / 'names.txt'}", "--model=tiny", "--cache_dir=", f"--out_dir={tmp_path / 'o'}"]
    for split in ("val", "test"):
        refused(capsys, [*argv, f"--split={split}"], "flat", "no labels", "discovery needs them")


def test_a_probe_is_not_looked_at_on_the_images_that_it_was_fitted_on(photos, tmp_path, capsys):
    refused(capsys, words_of(photos, tmp_path / "o", "--classifier=probe", "--split=train,val"), "--split=train,val", "--ckpt")


def test_several_splits(photos, tmp_path):
    assert run(words_of(photos, tmp_path, "--classifier=probe", "--split=val,test")) == 0
    assert data.load_discovery(tmp_path)["paths"] == paths_of(photos) + paths_of(photos, 2)


def broken(photos, tmp_path, content):
    shutil.copytree(photos / "set", tmp_path / "set")
    bad = Path(paths_of(photos)[3]).name
    (tmp_path / "set" / bad).write_bytes(content((tmp_path / "set" / bad).read_bytes()))
    return bad, [*words_of(photos, tmp_path / "o", "--classifier=probe"), f"--data=waterbirds:{tmp_path / 'set'}"]


@pytest.mark.parametrize("kind, content", [("pool", lambda b: b[:len(b) // 2]), ("crop", lambda b: b"")])
def test_skip_bad_leaves_an_image_out_and_says_so(photos, tmp_path, capsys, content, kind):
    bad, argv = broken(photos, tmp_path, content)
    refused(capsys, [*argv, f"--region_encoder={kind}"], f"set/{bad}")
    assert run([*argv, f"--region_encoder={kind}", "--skip_bad=True", f"--masks={photos / 'masks'}"]) == 0
    assert f"set/{bad}" in capsys.readouterr().out
    found = data.load_discovery(tmp_path / "o")
    assert [Path(p).name for p in found["paths"]] == [Path(p).name for p in paths_of(photos) if Path(p).name != bad] and len(found["label"]) == 21 * 9


# --- several processes

def together(argv):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", DISCOVER, *argv], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)


def check_together(one, two):
    a, b = tree_of(one), tree_of(two)
    assert a["k"] == b["k"] and a["silhouette"] == pytest.approx(b["silhouette"], abs=1e-5) and a["precision_at_10"] == b["precision_at_10"] and a["base_rate"] == b["base_rate"]
    for c, d in zip(a["clusters"], b["clusters"], strict=True):
        assert sorted(c["regions"]) == sorted(d["regions"]) and c["regions"][:3] == d["regions"][:3]
        assert {k: v for k, v in c.items() if k != "regions"} == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in d.items() if k != "regions"}
    x, y = data.load_discovery(one), data.load_discovery(two)
    assert torch.allclose(x["medoids"], y["medoids"], atol=1e-5)
    assert all(torch.equal(x[k], y[k]) for k in ("label", "image", "box")) and x["paths"] == y["paths"] and x["fingerprint"] == y["fingerprint"]
    assert {k: v["precision_at_10"] for k, v in a["methods"].items()} == {k: v["precision_at_10"] for k, v in b["methods"].items()}


def test_two_processes_give_what_one_gives_on_embeddings(planted, tmp_path):
    out, _ = planted
    assert run(words(out / "e.npz", tmp_path / "one", "--method=all")) == 0
    job = together(words(out / "e.npz", tmp_path / "two", "--method=all"))
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("spurious features found") == 1
    check_together(tmp_path / "one", tmp_path / "two")


def test_two_processes_give_what_one_gives_on_images(photos, tmp_path):
    """Only images of the first process have boxes."""
    rectangles(photos, "csv", tmp_path / "boxes.csv", paths_of(photos)[:9])
    flags = f"--regions=boxes:{tmp_path / 'boxes.csv'}", "--classifier=probe", f"--masks={photos / 'masks'}", "--centre=auto"
    assert run(words_of(photos, tmp_path / "one", *flags)) == 0
    job = together(words_of(photos, tmp_path / "two", *flags))
    assert job.returncode == 0, job.stderr
    check_together(tmp_path / "one", tmp_path / "two")


def test_only_fast_clusters_in_several_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, words("random:400,16", tmp_path / "o", "--clustering=exact"), "--clustering", "several processes")


# --- real data

@pytest.mark.skipif("FLOCK_DATA" not in os.environ, reason="FLOCK_DATA (a folder with minibirds_0.95 and bird_masks) is not set")
def test_real_birds_backgrounds_are_found(tmp_path):
    """An ERM probe on lite0, minibirds at 95 %, regions of a 3x3 grid over val: water and forest."""
    real = Path(os.environ["FLOCK_DATA"])
    assert run([f"--data=waterbirds:{real / 'minibirds_0.95'}", f"--masks={real / 'bird_masks'}", f"--out_dir={tmp_path}", f"--cache_dir={tmp_path / 'cache'}"]) == 0
    tree, found = tree_of(tmp_path), data.load_discovery(tmp_path)
    samples = data.load_data(f"waterbirds:{real / 'minibirds_0.95'}")
    place = dict(zip([item.path for item in samples.items], samples.place.tolist()))
    kept = [c for c in tree["clusters"] if c["kept"]]
    assert len(kept) == 2 and tree["precision_at_10"] >= .9 and .4 < tree["base_rate"] < .6
    water = [sum(place[found["paths"][found["image"][r]]] for r in c["regions"][:10]) for c in kept]
    assert sorted(v >= 9 for v in water) == sorted(v <= 1 for v in water) == [False, True]
