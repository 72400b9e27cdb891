"""discover.py: clusters, identification and ranking against slow definitions, files, bad input, images."""

import csv
import functools
import json
import math
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import in_two_processes, run_script
from einops import repeat
from PIL import Image, ImageDraw, ImageOps

import data
import discover
import model
import train
from kernels.region_pool import region_pool_ref
from model import unit

DISCOVER = Path(data.__file__).with_name("discover.py")
run = functools.partial(run_script, DISCOVER)

# Made by scikit-learn-extra 0.3.0 and scikit-learn: for k in range(2 * C, 5 * C), x = rows(**case),
#   distance = numpy.clip(1 - x @ x.T, 0, 1); numpy.fill_diagonal(distance, 0)
#   m = KMedoids(n_clusters=k, metric="precomputed", init="k-medoids++", random_state=0).fit(distance);
#   m.labels_ (one base-36 digit each), m.medoid_indices_, silhouette_score(distance, m.labels_,
#   metric="precomputed"); best: the k of the first strictly largest
PUBLISHED = json.loads((Path(__file__).parent / "fixtures/kmedoids.json").read_text())


def rows(seed, n, D, spread, cone, dtype, C):
    """Unit rows [n, D] around 7 directions; spread: of noise; cone: of a direction common to all."""
    g = np.random.RandomState(seed)
    kinds, common = g.randn(7, D), cone * g.randn(D)
    x = kinds[g.randint(7, size=n)] + spread * g.randn(n, D) + common
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def some_rows(name):
    return torch.from_numpy(rows(**PUBLISHED[name]["case"])).float()


def digits(labels):
    return [int(v, 36) for v in labels]


def tree_of(out):
    return json.loads((Path(out) / "discovery.json").read_text())


def refused(capsys, argv, *expected):
    capsys.readouterr()
    assert run(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("discover.py: ") and line.count("\n") == 1, line
    assert all(str(w) in line for w in expected), line


# --- step 1, the published procedure


@pytest.mark.parametrize("name", PUBLISHED)
def test_ravl_is_sklearn_extra_s_kmedoids_and_scikit_learn_s_silhouette(name):
    f = PUBLISHED[name]
    ks = range(2 * f["case"]["C"], 5 * f["case"]["C"])
    sweep = discover.published(torch.from_numpy(rows(**f["case"])), ks)
    assert list(sweep) == list(ks) == [int(k) for k in f["found"]]
    for k, expected in f["found"].items():
        assert sweep[int(k)].labels.tolist() == digits(expected["labels"])
        assert sweep[int(k)].medoids.tolist() == expected["medoids"]
        assert sweep[int(k)].silhouette == pytest.approx(expected["silhouette"], abs=2e-6)


def store(path, x, C, n, **more):
    """An .npz with regions x, two an image; the classifier is beside the point."""
    g = np.random.RandomState(0)
    D, y, count = x.shape[1], g.randint(C, size=n), np.full(n, 2)
    text, z = g.randn(C, D), g.randn(n, D)
    arrays = dict(reg_emb=x, num_regions=count, true_label=y, text_emb=text, img_emb=z)
    np.savez(path, **{**arrays, **more})


@pytest.mark.parametrize("name", PUBLISHED)
def test_ravl_chooses_the_published_k(name, tmp_path):
    f = PUBLISHED[name]
    x, best = rows(**f["case"]), f["found"][str(f["best"])]
    store(tmp_path / "e.npz", x, f["case"]["C"], len(x) // 2)
    assert run(words(tmp_path / "e.npz", tmp_path, "--clustering=ravl")) == 0
    tree, labels = tree_of(tmp_path), digits(best["labels"])
    assert tree["k"] == f["best"] and not tree["mean_removed"]
    assert tree["silhouette"] == pytest.approx(best["silhouette"], abs=1e-5)
    for c in tree["clusters"]:
        assert sorted(c["regions"]) == [r for r, label in enumerate(labels) if label == c["id"]]
        assert c["medoid"] == best["medoids"][c["id"]]


def test_of_equal_silhouettes_the_first_k_wins(tmp_path):
    x = np.repeat(np.eye(6), 4, 0)  # six kinds of equal rows: silhouettes of one at most, none above
    y, z = np.arange(12) % 2, np.eye(6)[np.arange(12) % 3]
    store(tmp_path / "e.npz", x, 2, 12, true_label=y, text_emb=np.eye(6)[:2], img_emb=z)
    assert run(words(tmp_path / "e.npz", tmp_path, "--clustering=ravl", "--k=6:10")) == 0
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
    most = np.maximum(a, b)
    return float(np.mean(np.where((size[labels] > 1) & (most > 0), (b - a) / most.clip(1e-300), 0)))


def check_clusters(x, sweep):
    """Silhouettes by brute force; labels of the nearest medoid; medoids with the largest sum of cosines."""
    d = distances(x, False)
    for k, found in sweep.items():
        labels, medoids = found.labels.numpy(), found.medoids.numpy()
        assert len(medoids) == k == len(set(medoids.tolist())) and set(labels.tolist()) == set(range(k))
        assert found.silhouette == pytest.approx(silhouette(d, labels), abs=1e-5)
        assert (labels[medoids] == np.arange(k)).all()
        assert (d[np.arange(len(x)), medoids[labels]] <= d[:, medoids].min(1) + 1e-6).all()
        for c in range(k):
            members = np.flatnonzero(labels == c)
            cost = d[np.ix_(members, members)].sum(1)
            assert cost[members == medoids[c]][0] <= cost.min() + 2e-6 * len(members)


@pytest.mark.parametrize("tile", [1 << 16, 64])
@pytest.mark.parametrize("name", PUBLISHED)
def test_medoids_labels_and_silhouettes_are_exact(monkeypatch, name, tile):
    monkeypatch.setattr(discover, "STEP", tile)
    x = some_rows(name)
    sweep = discover.kmedoids(x, range(2, 13), 0)
    assert list(sweep) == list(range(2, 13))
    check_clusters(x, sweep)


@pytest.mark.parametrize(
    "sweep", [lambda x: discover.kmedoids(x, range(2, 4), 0), lambda x: discover.published(x, [2])]
)
def test_clustering_has_a_bar_on_a_terminal(terminal, sweep):
    sweep(some_rows("large"))
    assert "clusters: " in terminal.getvalue()


@pytest.mark.parametrize("ks", [[3, 30], [2, 5, 40]])
def test_medoids_labels_and_silhouettes_are_exact_over_ks_far_apart(ks):
    x = some_rows("large")
    check_clusters(x, discover.kmedoids(x, ks, 0))


def test_silhouettes_of_the_only_region_of_a_cluster_are_zero():
    x = some_rows("large")[:40]
    labels = torch.arange(40).clamp(max=5)  # five clusters of one region, one of the rest
    hot = torch.nn.functional.one_hot(labels).float()
    values = discover.silhouettes((x @ x.T @ hot).T, hot.sum(0), labels)
    assert (values[:5] == 0).all() and (values[5:] != 0).all()
    assert float(values.mean()) == pytest.approx(silhouette(distances(x, False), labels.numpy()), abs=1e-6)


def test_the_seed_decides_all_and_only_the_seed():
    x = some_rows("even")
    one, again, other = (discover.kmedoids(x.clone(), range(4, 10), seed) for seed in (0, 0, 5))
    for k in one:
        assert torch.equal(one[k].labels, again[k].labels) and torch.equal(one[k].medoids, again[k].medoids)
        assert one[k].silhouette == again[k].silhouette
    assert any(not torch.equal(one[k].medoids, other[k].medoids) for k in one)


@pytest.mark.parametrize("name", ["clustered", "clustered_single", "flat", "large"])
def test_best_silhouette_is_no_lower_than_the_published_one(name):
    f, x = PUBLISHED[name], some_rows(name)
    sweep = discover.kmedoids(x.clone(), range(4, 10), 0)
    best = max(sweep.values(), key=lambda found: found.silhouette)
    published = f["found"][str(f["best"])]["silhouette"]
    assert silhouette(distances(x, True), best.labels.numpy()) >= published - 1e-5


def test_planted_clusters_are_found_whole():
    g = torch.Generator().manual_seed(0)
    kind = torch.arange(140) % 7
    x = unit(torch.eye(12)[kind] + 0.05 * torch.randn(140, 12, generator=g))
    sweep = discover.kmedoids(x, range(4, 12), 0)
    assert max(sweep, key=lambda k: sweep[k].silhouette) == 7
    assert len({*zip(kind.tolist(), sweep[7].labels.tolist(), strict=True)}) == 7


def test_fewer_different_rows_than_k():
    x = torch.eye(5).repeat(6, 1)
    sweep = discover.kmedoids(x, range(4, 10), 0)
    assert list(sweep) == [4, 5] and sweep[5].silhouette == pytest.approx(1)
    assert len(set(sweep[5].labels.tolist())) == 5 == len(x[sweep[5].medoids].unique(dim=0))
    only_more = discover.kmedoids(x, range(7, 10), 0)
    assert list(only_more) == [5] and only_more[5].silhouette == pytest.approx(1)


def test_duplicates_stay_together():
    x = some_rows("even").repeat(2, 1)
    for found in discover.kmedoids(x, range(4, 10), 0).values():
        assert torch.equal(found.labels[:150], found.labels[150:])


def test_of_equally_good_members_the_first_becomes_the_medoid():
    middle, e = unit(torch.ones(4)), torch.eye(4)
    x = torch.stack([*unit(middle + e), middle, middle, -e[0]])
    found = discover.Medoids(x, torch.tensor([2, 6]))
    found.settle()
    assert found.index.tolist() == [4, 6] and found.label.tolist() == [0] * 6 + [1]


def test_the_silhouette_that_is_told_is_on_the_published_distance_of_the_given_embeddings():
    x = some_rows("cone")
    moved = x.clone()
    mean = discover.less_mean(moved)
    assert torch.allclose(moved, unit(x - x.mean(0)), atol=1e-6) and torch.allclose(
        mean, x.mean(0), atol=1e-6
    )
    assert torch.allclose(discover.given(moved, mean), x, atol=1e-5)
    labels = discover.kmedoids(moved, [6], 0)[6].labels.long()
    told_of = discover.on_published_distance(moved, labels, 6, mean, 0)
    assert told_of["silhouette_rows"] == len(x)
    assert told_of["silhouette"] == pytest.approx(silhouette(distances(x, True), labels.numpy()), abs=1e-4)


def test_the_mean_is_taken_off_where_regions_lie_in_a_cone():
    x = some_rows("even")
    before = x.clone()
    assert not discover.less_mean(x).any() and torch.equal(x, before)
    assert discover.less_mean(x := some_rows("cone")).any()
    assert torch.allclose(x.norm(dim=1), torch.ones(len(x)), atol=1e-5)


@pytest.mark.parametrize("n, off", [(150, 1e-9), (5000, 0.01), (11_000, 0.01)])
def test_share_of_pairs_with_a_negative_cosine(n, off):
    x = torch.from_numpy(rows(3, n, 8, 9.0, 0.0, "float32", 2))
    negative = float((x @ x.T < 0).double().sum()) / (n * (n - 1))
    told_of = discover.on_published_distance(x, torch.arange(n) % 5, 5, torch.zeros(8), 0)
    assert told_of["negative_pairs"] == pytest.approx(negative, abs=off)
    assert told_of["silhouette_rows"] == (n if n < 10_000 else 1000)


def test_range_of_k(capsys):
    assert discover.k_range(0, 0, 2, 100, "fast") == list(range(4, 10))
    assert discover.k_range(0, 0, 2, 7, "fast") == [4, 5, 6]
    assert "4 to 9 wanted, but there are 7 regions; up to 6 is used" in capsys.readouterr().out
    assert discover.k_range(20, 50, 2, 100, "fast") == list(range(20, 50))
    with pytest.raises(data.Complaint, match="--k: 19999 clusters times 900000 regions, expected at most"):
        discover.k_range(2, 20_000, 2, 900_000, "fast")
    some = discover.k_range(2, 500, 2, 1000, "fast")
    assert len(some) <= 40 and some[0] == 2 and some[-1] == 499 and some == sorted(set(some))
    assert discover.k_range(2, 500, 2, 1000, "ravl") == list(range(2, 500))


# --- step 2


def told(x, z, W, count, y, names):
    """Evidence of a linear classifier."""
    rest = dict(target=None, box=torch.zeros(len(x), 4), pictures=None, encoder=None)
    return discover.evidence(x.clone(), z, lambda v: v @ W, "drawn", names, y, count, [], **rest)


def ragged(seed, C=3, n=60, k=6, D=5, steps=None):
    """Random images with 0 to 5 regions, a linear classifier, random clusters; steps: embeddings on a
    lattice, so that scores tie."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        x = torch.randn(*size, generator=g)
        x = torch.randint(-steps, steps + 1, size, generator=g).float() if steps else x
        x[(x == 0).all(1), 0] = 1
        return x

    count = torch.randint(0, 6, (n,), generator=g)
    x, z, W = draw(int(count.sum()), D), draw(n, D), torch.randn(D, C, generator=g)
    predicted = (z @ W).argmax(1)
    y = torch.where(torch.rand(n, generator=g) < 0.5, predicted, torch.randint(C, (n,), generator=g))
    label = torch.randint(k, (len(x),), generator=g)
    e = told(x, z, W, count, y, [f"c{c}" for c in range(C)])
    return label, e, (x, z, lambda v: v @ W, count.tolist(), y.tolist(), C)


def fisher(wrong_in, n_in, wrong, n):
    """P(at least wrong_in of n_in drawn out of n are of the wrong ones), by counting; 1 without a loss."""
    if Fraction(wrong_in, n_in) <= Fraction(wrong, n):
        return 1.0
    ways = [math.comb(wrong, t) * math.comb(n - wrong, n_in - t) for t in range(wrong_in, n_in + 1)]
    return float(Fraction(sum(ways), math.comb(n, n_in)))


def stepped_up(p):
    """Adjusted p of Benjamini and Hochberg, as they define it: the least level at which each is rejected."""
    return [min(1.0, *[t * len(p) / sum(u <= t for u in p) for t in p if t >= own]) for own in p]


def oracle(label, k, x, z, logits, count, y, C, method="ravl", least=0.25):
    """Step 2 of RaVL, word by word; the clusters as they are ranked."""
    predicted, label, p = logits(z).argmax(1).tolist(), label.tolist(), logits(x).double().softmax(1)
    start = np.cumsum([0, *count])
    regions = [list(range(start[i], start[i + 1])) for i in range(len(y))]
    out, tests = [], {}
    for c in range(k):
        has = [any(label[r] == c for r in mine) for mine in regions]
        gaps, gap_of, asked = {}, {}, []
        for l in range(C):  # noqa: E741
            inside = [i for i in range(len(y)) if y[i] == l and has[i]]
            outside = [i for i in range(len(y)) if y[i] == l and not has[i]]
            if not inside or not outside:
                continue
            acc_in, acc_out = (np.mean([predicted[i] == l for i in part]) for part in (inside, outside))
            w = 2 * min(len(inside), len(outside)) / (len(inside) + len(outside))
            gaps[l] = dict(weight=w, acc_in=acc_in, n_in=len(inside), acc_out=acc_out, n_out=len(outside))
            hit = [sum(predicted[i] != l for i in part) for part in (inside, outside)]
            tests[c, l] = fisher(hit[0], len(inside), sum(hit), len(inside) + len(outside))
            gap_of[l] = (1 if method == "unweighted" else w) * (acc_in - acc_out)
            wrong = [i for i in inside if predicted[i] != l and len(regions[i]) > 1]
            if gap_of[l] < 0 and wrong:
                looked = [max(regions[i], key=lambda r, i=i: float(p[r, predicted[i]])) for i in wrong]
                asked.append(np.mean([label[r] == c for r in looked]))
        influence, score = max(asked, default=-np.inf), sum(abs(v) for v in gap_of.values())
        signs = any(v > 0 for v in gap_of.values()) and any(v < 0 for v in gap_of.values())
        kept = dict(gap_only=signs, influence_only=influence >= least)
        kept = kept.get(method, signs and influence >= least)
        losses = -sum(min(v, 0) for v in gap_of.values())
        key = dict(influence_only=influence, loss=losses).get(method, score)
        out.append(dict(id=c, gaps=gaps, gap=gap_of, influence=influence, score=key, kept=kept))
    q = dict(zip(tests, stepped_up(list(tests.values())), strict=True))
    for c in out:
        for l, g in c["gaps"].items():  # noqa: E741
            g["q"] = q[c["id"], l]
        if method == "loss":
            c["kept"] = any(g["q"] <= 0.05 for g in c["gaps"].values())
    return sorted(
        out, key=lambda c: (c["kept"], c["score"], c["id"]), reverse=True
    )  # ties: higher index first


def same_as_oracle(v, expected):
    assert v.ranking == [c["id"] for c in expected]
    for e in expected:
        c = e["id"]
        assert bool(v.kept[c]) == e["kept"] and float(v.influence[c]) == pytest.approx(e["influence"])
        assert float(v.score[c]) == pytest.approx(e["score"], abs=1e-12)
        for l in range(len(v.gap)):  # noqa: E741
            if l not in e["gaps"]:
                assert v.gap[l, c].isnan()
                continue
            assert float(v.gap[l, c]) == pytest.approx(e["gap"][l], abs=1e-12)
            assert {name: float(v.of_gap[name][l, c]) for name in e["gaps"][l]} == pytest.approx(e["gaps"][l])


def judged(label, k, e, method="ravl"):
    return discover.identify(label, k, e, discover.CRITERIA[method])


@pytest.mark.parametrize("method", discover.CRITERIA)
@pytest.mark.parametrize("seed", range(6))
def test_identify_is_the_slow_definition(seed, method):
    C, k = 2 + seed % 3, (4, 9, 30)[seed % 3]
    label, e, raw = ragged(seed, C, 40 + 30 * seed, k)
    expected = oracle(label, k, *raw, method)
    same_as_oracle(judged(label, k, e, method), expected)
    assert (e.count == 0).any() and (e.count == 1).any()
    if method == "ravl" and seed < 2:
        assert any(c["kept"] for c in expected) and any(not c["kept"] for c in expected)


def test_a_loss_is_tested_exactly_and_levels_are_stepped_up():
    one = torch.ones(1, 1, dtype=torch.double)
    # 3 of 3 errors among 3 of 6 images: 1 of 20 draws; at least 2 of them: 1 + 9 of 20
    assert discover.loss_p(3 * one, 3 * one, 3 * one, 6 * one).item() == pytest.approx(1 / 20)
    assert discover.loss_p(2 * one, 3 * one, 3 * one, 6 * one).item() == pytest.approx(10 / 20)
    assert discover.loss_p(one, 2 * one, one, 2 * one) == discover.loss_p(0 * one, one, 0 * one, 9 * one) == 1
    p = discover.loss_p(900 * one, 3000 * one, 2000 * one, 10000 * one).item()
    assert p == pytest.approx(fisher(900, 3000, 2000, 10000), rel=1e-6) and p < 1e-50
    p = torch.tensor([[0.01, 0.04, 0.5], [0.02, 0.9, 0.03]], dtype=torch.double)
    tested = torch.tensor([[True, True, True], [True, False, True]])
    # of five: .01 x 5, .02 x 5/2, .03 x 5/3, .04 x 5/4, .5, of each the least from there on
    expected = torch.tensor([[0.05, 0.05, 0.5], [0.05, torch.nan, 0.05]], dtype=torch.double)
    assert torch.allclose(discover.adjusted(p, tested), expected, equal_nan=True)
    assert discover.adjusted(p, tested & False).isnan().all()


def one_sided(wrong=8):
    """Class a is right in all of its 40 images, class b fails in some of its 20 that show cluster 0."""
    n = 40
    y, has = torch.arange(2 * n) // n, torch.arange(2 * n) % 2
    fails = (y == 1) & (has == 0) & (torch.arange(2 * n) < n + 2 * wrong)
    of = dict(y=y, classes=["a", "b"], predicted=torch.where(fails, 0, y), image=torch.arange(2 * n))
    return has, SimpleNamespace(**of, count=torch.full((2 * n,), 2), best=torch.arange(2 * n))


def test_where_a_class_is_never_wrong_only_the_rule_of_loss_keeps_a_cluster():
    label, e = one_sided()
    v, w = judged(label, 2, e), judged(label, 2, e, "loss")
    assert not v.kept.any() and discover.why(v, 0) == "no class does better with it"
    # 8 errors, all in 20 of 40 images; four tests, of which two (class a, and b without it) are 1
    p = math.comb(32, 12) / math.comb(40, 20)
    assert w.q[1, 0].item() == pytest.approx(4 * p) and w.kept.tolist() == [True, False]
    assert w.score[0].item() == pytest.approx(8 / 20) and w.chance[0] == v.chance[0] / 2
    assert discover.why(w, 1) == "no loss beyond chance (q 1)" and w.ranking == [0, 1]
    label, e = one_sided(wrong=4)  # 4 x .053
    w = judged(label, 2, e, "loss")
    assert not w.kept.any() and discover.why(w, 0) == "no loss beyond chance (q 0.21)"
    clusters = discover.described(judged(label, 2, e), torch.arange(2), [torch.arange(3)] * 2, {}, e.classes)
    said = discover.dropped(clusters)
    assert (
        "Cluster 0, score 0.20 (by chance" in said and "b -0.20 (0.80 of 20 with, 1.00 of 20 without)" in said
    )
    assert (
        "no class does better with it" in said
        and "--method=loss" in said
        and said.endswith("here q is 0.21.")
    )
    assert not discover.dropped([dict(c, kept=c["id"] == 1) for c in clusters])
    assert not discover.dropped([dict(c, reason="influence 0.00 below 0.25") for c in clusters])


def test_the_rule_of_loss_is_seldom_wrong_where_the_feature_changes_nothing():
    g, image, kept = torch.Generator().manual_seed(0), torch.arange(300), []
    for _ in range(100):
        y, label = torch.randint(2, (300,), generator=g), torch.randint(10, (300,), generator=g)
        predicted = torch.where(torch.rand(300, generator=g) < 0.7, y, 1 - y)
        of = dict(
            y=y, classes=["a", "b"], predicted=predicted, image=image, count=torch.ones(300), best=image
        )
        kept.append(bool(judged(label, 10, SimpleNamespace(**of), "loss").kept.any()))
    assert sum(kept) <= 10  # 5 % at most are expected


def test_identify_where_regions_tie_the_first_is_looked_at():
    """Equal regions in one image, in different clusters: the public code's argmax takes the first."""
    label, e, raw = ragged(1, 3, 80, 4, 2, steps=1)
    start = np.cumsum([0, *raw[3]])
    assert any(len(raw[0][a:b].unique(dim=0)) < b - a for a, b in zip(start, start[1:], strict=False))
    same_as_oracle(judged(label, 4, e), oracle(label, 4, *raw))


def test_identify_of_clusters_in_no_image_or_in_all_of_them():
    label, e, (x, z, logits, count, y, C) = ragged(3, 3, 50, 5)
    some = e.count > 0  # images without regions go
    count, y, z = e.count[some], torch.tensor(y)[some], z[some]
    label = label.clamp(max=2)
    label[torch.tensor(np.cumsum([0, *count.tolist()])[:-1])] = 4  # in every image; 3 in none
    rest = dict(target=None, box=None, pictures=None, encoder=None)
    e = discover.evidence(x.clone(), z, logits, "drawn", ["a", "b", "c"], y, count, [], **rest)
    v = judged(label, 5, e)
    same_as_oracle(v, oracle(label, 5, x, z, logits, count.tolist(), y.tolist(), C))
    for c in (3, 4):
        assert not v.kept[c] and v.influence[c] == -np.inf and v.score[c] == 0
        assert discover.why(v, c) == "in no image, or in all of a class"
    assert v.ranking[-2:] == [4, 3]


def test_identify_asks_only_images_with_more_than_one_region():
    # two images of class 0 with the feature, both wrong: one has it as its only region, one looks elsewhere
    e = torch.eye(2)
    z, x = torch.stack([e[1], e[1], e[0], e[1], e[0]]), torch.stack([e[1], e[0], e[1], e[0], e[1], e[0]])
    y, count = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 2, 1, 1, 1])
    v = judged(torch.tensor([0, 0, 1, 1, 0, 1]), 2, told(x, z, e, count, y, ["a", "b"]))
    assert float(v.influence[0]) == 0 and not v.kept[0]
    assert discover.why(v, 0) == "influence 0.00 below 0.25"
    assert v.gap[0, 0] == pytest.approx(2 * 1 / 3 * -1) and v.gap[1, 0] == pytest.approx(1)


def test_the_least_influence_itself_is_kept(monkeypatch):
    label, e, raw = ragged(1, 3, 100, 9)
    v = judged(label, 9, e, "gap_only")
    value = min(float(i) for i, signs in zip(v.influence, v.signs, strict=True) if signs and i > 0)
    for least, kept in ((value, True), (value + 1e-9, False)):
        monkeypatch.setattr(discover, "INFLUENCE", least)
        again = judged(label, 9, e)
        same_as_oracle(again, oracle(label, 9, *raw, least=least))
        assert (again.kept[again.signs & (again.influence == value)] == kept).all()


def test_score_by_chance_is_the_mean_of_the_score_where_the_feature_changes_nothing():
    """The normal approximation of binomial errors, against simulation."""
    g, n, scores, chances = torch.Generator().manual_seed(0), 2000, [], []
    image = torch.arange(n)
    for _ in range(60):
        y, label = torch.randint(2, (n,), generator=g), torch.randint(3, (n,), generator=g)
        predicted = torch.where(torch.rand(n, generator=g) < 0.7, y, 1 - y)
        of = dict(y=y, classes=["a", "b"], predicted=predicted, image=image, count=torch.ones(n), best=image)
        v = judged(label, 3, SimpleNamespace(**of))
        scores.append(float(v.score.mean()))
        chances.append(float(v.chance.mean()))
    assert np.mean(scores) == pytest.approx(np.mean(chances), rel=0.1)


def test_equal_scores_are_ranked_with_the_later_first():
    score = torch.tensor([1.0, 2.0, 1.0, -np.inf, 2.0, -np.inf])
    assert discover.descending(score).tolist() == [4, 1, 2, 0, 5, 3]


# --- from embeddings, end to end

CONTRACT = {"config", "k", "silhouette", "clusters", "precision_at_10", "seconds", "methods", "base_rate"}
CONTRACT |= {
    "silhouettes",
    "silhouette_rows",
    "git",
    "notes",
    "accuracy",
    "classes",
    "mean_removed",
    "peak_gib",
}
OF_CLUSTER = {
    "id",
    "kept",
    "reason",
    "score",
    "chance",
    "influence",
    "gaps",
    "medoid",
    "stability",
    "n",
    "regions",
}
OF_GAP = {"gap", "weight", "acc_in", "n_in", "acc_out", "n_out", "q"}
BOTH = pytest.mark.parametrize("clustering", ["fast", "ravl"])
METHODS = (*discover.CRITERIA, *discover.BASELINES)


def plant(path, N=800, D=16, seed=0, **changes):
    """An .npz of drawn_regions; changes: arrays instead of its own, None for leaving one out."""
    arrays = {k: v.numpy() for k, v in discover.drawn_regions(N, D, seed).items()}
    arrays = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    np.savez(path, **arrays)
    return arrays


def words(path, out, *more):
    return [f"--embeddings={path}", f"--out_dir={out}", *more]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """One run on planted embeddings: (out_dir, arrays)."""
    out = tmp_path_factory.mktemp("planted")
    arrays = plant(out / "e.npz", class_names=np.array([f"kind <{c}>" for c in range(10)]))
    assert run(words(out / "e.npz", out)) == 0
    return out, arrays


def test_a_cluster_lists_its_first_thousand_regions_and_counts_them_all(tmp_path):
    a = plant(tmp_path / "e.npz", 5000, region_target=None)
    for method in ("ravl", "random"):
        assert run(words(tmp_path / "e.npz", tmp_path, "--k=2:3", f"--method={method}")) == 0
        found, tree, x = train.load_discovery(tmp_path), tree_of(tmp_path), torch.from_numpy(a["reg_emb"])
        label = found.label
        for c in tree["clusters"]:
            assert len(c["regions"]) == len(set(c["regions"])) == 1000 < c["n"]
            if method == "random":
                assert c["n"] == 5000
                continue
            members = (label == c["id"]).nonzero()[:, 0]
            cosine = x @ x[c["medoid"]]
            assert c["n"] == len(members) and set(c["regions"]) <= set(members.tolist())
            assert float(cosine[c["regions"]].min()) >= float(cosine[members].sort().values[-1000]) - 1e-6
        assert (tmp_path / "discovery.json").stat().st_size < 60_000


def test_silhouettes_of_many_regions_are_estimated_from_as_many_as_a_step(monkeypatch):
    x = discover.drawn_regions(12_000, 16)["reg_emb"]
    c = discover.kmedoids(x, [20], 0)[20]
    label, zero = c.labels.long(), torch.zeros(16)
    whole = discover.on_published_distance(x, label, 20, zero, 0)
    monkeypatch.setattr(discover, "STEP", 6000)
    part = discover.on_published_distance(x, label, 20, zero, 0)
    assert whole["silhouette_rows"] == part["silhouette_rows"] == 1000
    assert whole["silhouette"] != part["silhouette"] == pytest.approx(whole["silhouette"], abs=0.002)


def check_contract(tree, N):
    assert set(tree) >= CONTRACT and set(tree["seconds"]) == {"cluster", "identify", "rank", "total"}
    clusters = tree["clusters"]
    assert sorted(c["id"] for c in clusters) == list(range(tree["k"]))
    assert sorted(r for c in clusters for r in c["regions"]) == list(range(N))
    keys = [(c["kept"], -np.inf if c["score"] is None else c["score"], c["id"]) for c in clusters]
    assert keys == sorted(keys, reverse=True)
    for c in clusters:
        assert set(c) == OF_CLUSTER and c["medoid"] in c["regions"] and type(c["kept"]) is bool
        assert c["reason"] and (c["reason"] == "kept") == c["kept"]
        assert c["influence"] is None or 0 <= c["influence"] <= 1
        assert c["score"] == pytest.approx(sum(abs(g["gap"]) for g in c["gaps"].values()))
        for g in c["gaps"].values():
            assert set(g) == OF_GAP and 0 <= g["q"] <= 1 and g["n_in"] > 0 and g["n_out"] > 0
            weight = 2 * min(g["n_in"], g["n_out"]) / (g["n_in"] + g["n_out"])
            assert g["weight"] == pytest.approx(weight)
            assert g["gap"] == pytest.approx(weight * (g["acc_in"] - g["acc_out"]))
        signs = {g["gap"] > 0 for g in c["gaps"].values() if g["gap"]}
        assert not c["kept"] or c["influence"] >= 0.25 and signs == {True, False}


def test_discovery_json_keeps_the_contract(planted):
    out, arrays = planted
    tree, x, target = tree_of(out), torch.from_numpy(arrays["reg_emb"]), arrays["region_target"]
    check_contract(tree, len(x))
    assert tree["config"]["seed"] == 0 and tree["config"]["embeddings"].endswith("e.npz")
    assert set(tree["clusters"][0]["gaps"]) <= set(arrays["class_names"].tolist())
    assert tree["base_rate"] == pytest.approx(target.mean())
    first = tree["clusters"][0]
    assert first["kept"] and tree["precision_at_10"] == pytest.approx(target[first["regions"][:10]].mean())
    for c in tree["clusters"]:  # ranked by cosine to the medoid, the medoid itself first
        cosine = (x[c["regions"]] @ x[c["medoid"]]).tolist()
        assert c["regions"][0] == c["medoid"] and (np.diff(cosine) <= 1e-6).all()
    assert not tree["mean_removed"]
    # the planted feature is the first cluster found
    assert (
        tree["precision_at_10"] == 1 and first["gaps"]["kind <0>"]["gap"] > 0.2 and first["stability"] > 0.7
    )
    assert target[first["regions"]].mean() > 0.9 and target.sum() <= len(first["regions"]) + 10


def test_gaps_and_influence_of_the_file_are_those_of_the_slow_definition(planted):
    out, a = planted
    raw = [torch.from_numpy(a[k]).double() for k in ("reg_emb", "img_emb")]
    text = unit(torch.from_numpy(a["text_emb"]).double()) / 0.07
    y, count = a["true_label"].tolist(), a["num_regions"].tolist()
    check_step_2(out, *raw, lambda v: v @ text.T, count, y, a["class_names"].tolist())


def check_step_2(out, x, z, logits, count, y, names):
    """Clusters of a run are scored as the slow definition does, with a classifier that is a function."""
    tree, found = tree_of(out), train.load_discovery(out)
    expected = oracle(found.label, tree["k"], x, z, logits, count, y, len(names))
    assert [c["id"] for c in tree["clusters"]] == [e["id"] for e in expected]
    for c, e in zip(tree["clusters"], expected, strict=True):
        influence = None if e["influence"] == -np.inf else pytest.approx(e["influence"])
        assert (
            c["kept"] == e["kept"] and c["influence"] == influence and c["score"] == pytest.approx(e["score"])
        )
        assert set(c["gaps"]) == {names[l] for l in e["gaps"]}  # noqa: E741
        for l, g in e["gaps"].items():  # noqa: E741
            assert c["gaps"][names[l]] == pytest.approx(dict(g, gap=e["gap"][l]))


def check_bridge(tmp_path, x, *more):
    """What train.py reads back, and how it assigns regions."""
    assert run(words(tmp_path / "e.npz", tmp_path, *more)) == 0
    found, tree, x = train.load_discovery(tmp_path), tree_of(tmp_path), torch.from_numpy(x)
    assert (
        found.kept == [c["id"] for c in tree["clusters"] if c["kept"]] and found.clusters == tree["clusters"]
    )
    assert found.medoids.shape == (tree["k"], 16)
    assert torch.allclose(found.medoids.norm(dim=1), torch.ones(tree["k"]), atol=1e-5)
    for c in tree["clusters"]:
        assert torch.allclose(found.medoids[c["id"]], unit(unit(x[c["medoid"]]) - found.mean), atol=1e-5)
        assert sorted(c["regions"]) == (found.label == c["id"]).nonzero()[:, 0].tolist()
    assert torch.equal(train.assign_regions(x * 3, found), found.label)
    return found


@BOTH
def test_discovery_npz_assigns_the_same_clusters_to_the_same_regions(tmp_path, clustering):
    a = plant(tmp_path / "e.npz", seed=2)
    found = check_bridge(tmp_path, a["reg_emb"], f"--clustering={clustering}")
    assert found.image.tolist() == np.repeat(np.arange(200), a["num_regions"]).tolist()


@BOTH
def test_discovery_npz_assigns_the_same_clusters_where_all_medoids_are_far(tmp_path, clustering):
    """Of medoids that are all beyond the clip, the published procedure takes the first."""
    a = plant(tmp_path / "e.npz", reg_emb=rows(0, 800, 16, 9.0, 0.0, "float32", 2))
    check_bridge(tmp_path, a["reg_emb"], f"--clustering={clustering}", "--k=2:5")


def test_discovery_npz_assigns_the_same_where_the_mean_was_taken_off(tmp_path):
    x = plant(tmp_path / "e.npz")["reg_emb"] + 1.2 * np.eye(16, dtype="float32")[0]
    plant(tmp_path / "e.npz", reg_emb=x)
    assert check_bridge(tmp_path, x).mean.norm() > 0.3 and tree_of(tmp_path)["mean_removed"]


def check_page(path):
    """How many pictures a page has, all of them inside it; and its text."""
    text = path.read_text()
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", text)
    assert all(link.startswith("data:image/") for link in links) and "viewport" in text
    assert not re.search(r"https?:|url\(|@import|<script", text.replace(data.SVG, ""))
    return len(links), text


def test_page_is_self_contained_escapes_and_shows_the_first_kept_clusters(planted):
    out, _ = planted
    _, text = check_page(out / "discovery.html")
    kept = [c for c in tree_of(out)["clusters"] if c["kept"]]
    for k, c in enumerate(kept):  # with all of many a page would be heavy
        assert (f"Cluster {c['id']}, score {c['score']:.2f}" in text) == (k < discover.PICTURED)
    assert "kind &lt;0&gt;" in text and "kind <0>" not in text and "--clustering=fast" in text


def test_console_says_what_was_found(planted, tmp_path, capsys):
    assert run(words(planted[0] / "e.npz", tmp_path)) == 0
    said, tree = capsys.readouterr().out, tree_of(tmp_path)
    kept = [c for c in tree["clusters"] if c["kept"]]
    above = sum(c["score"] > 2 * c["chance"] for c in kept)
    assert f"{len(kept)} clusters kept by the paper's rule, {above} with a score above twice" in said
    assert f"k = {tree['k']}, silhouette {tree['silhouette']:.3f}" in said and "negative cosine" in said
    rate = f"of regions at random {tree['base_rate']:.3f}"
    assert "Precision@10 of the first: 1.00" in said and rate in said
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".html", ".json", ".npz"]


@BOTH
def test_random_embeddings_find_what_was_planted(tmp_path, clustering):
    assert run(words("random:1200,32", tmp_path, f"--clustering={clustering}", "--k=20:30")) == 0
    tree = tree_of(tmp_path)
    check_contract(tree, 1200)
    assert tree["precision_at_10"] == 1 and 0.08 < tree["base_rate"] < 0.17


def test_without_a_target_there_is_no_precision(tmp_path):
    plant(tmp_path / "e.npz", region_target=None)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    tree = tree_of(tmp_path)
    assert tree["precision_at_10"] is None is tree["base_rate"] and tree["clusters"][0]["kept"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method(tmp_path, method, capsys):
    a = plant(tmp_path / "e.npz", 4000 if method == "loss" else 400)  # in 10 images of a class none is shown
    assert run(words(tmp_path / "e.npz", tmp_path, f"--method={method}")) == 0
    tree = tree_of(tmp_path)
    first, target = tree["clusters"][0], a["region_target"]
    assert first["kept"] and tree["precision_at_10"] == pytest.approx(target[first["regions"][:10]].mean())
    if method in discover.BASELINES:
        assert len(tree["clusters"]) == 1 and len(set(first["regions"])) == len(first["regions"]) > 3
        assert f"ranked list of {method}" in first["reason"] and set(first) == OF_CLUSTER
        text = (tmp_path / "discovery.html").read_text()
        assert (
            "medoid" not in text
            and "no class" not in text
            and f"ranked by {method}" in capsys.readouterr().out
        )
    else:
        assert sorted(c["id"] for c in tree["clusters"]) == list(range(tree["k"]))
    check_page(tmp_path / "discovery.html")


def test_all_methods_are_compared_and_agree_with_each_alone(tmp_path, capsys):
    plant(tmp_path / "e.npz", 400)
    assert run(words(tmp_path / "e.npz", tmp_path / "all", "--method=all")) == 0
    said, tree = capsys.readouterr().out, tree_of(tmp_path / "all")
    assert set(tree["methods"]) == set(METHODS)
    assert all(re.search(rf"(?m)^{name} +([\d.]+|-)$", said) for name in METHODS)
    check_contract(tree, 400)
    for name in ("ravl", "gap_only", "influence_only", "unweighted", "george"):
        assert run(words(tmp_path / "e.npz", tmp_path / name, f"--method={name}")) == 0
        alone, entry = tree_of(tmp_path / name), tree["methods"][name]
        assert alone["precision_at_10"] == entry["precision_at_10"]
        assert alone["clusters"][0]["regions"][:100] == entry["top"]
    assert tree["clusters"] == tree_of(tmp_path / "ravl")["clusters"]


def clustering_of(labels):
    return discover.Clustering(0.0, labels, None)


def test_stability_is_the_share_of_k_at_which_a_kept_cluster_shares_half_of_the_regions(monkeypatch):
    n = torch.arange(12)
    sweep = {k: clustering_of(v) for k, v in {2: (n >= 6).long(), 3: n // 4, 4: n // 3}.items()}
    first = lambda label, k, e, criterion: SimpleNamespace(kept=torch.arange(k) == 0)  # noqa: E731
    monkeypatch.setattr(discover, "identify", first)
    both = SimpleNamespace(kept=torch.tensor([True, True]), criterion=None)
    # cluster 0 is 0..5: itself; 0..3 of 4 shares 4 of 6; 0..2 shares 3 of 6. Cluster 1 is 6..11: never
    assert discover.stability(sweep, 2, both, None) == {0: 1.0, 1: 0.0}
    sweep = {6: clustering_of(n // 2), 2: sweep[2]}
    one = SimpleNamespace(kept=torch.tensor([True, False]), criterion=None)
    assert discover.stability(sweep, 2, one, None) == {0: 0.5}


@pytest.mark.parametrize("n", [1, 2, 14, 15, 16, 23, 40])
def test_stability_asks_up_to_15_k_from_the_first_to_the_last(monkeypatch, n):
    tried, sweep = [], {k: clustering_of(torch.arange(50) % k) for k in range(2, 2 + n)}

    def note(label, k, e, criterion):
        tried.append(k)
        return SimpleNamespace(kept=torch.ones(k, dtype=torch.bool))

    monkeypatch.setattr(discover, "identify", note)
    discover.stability(sweep, 2, SimpleNamespace(kept=torch.tensor([True, False]), criterion=None), None)
    steps = np.diff(tried)
    assert len(tried) == min(n, 15) and (tried[0], tried[-1]) == (2, 1 + n)
    assert n == 1 or 0 < steps.min() >= steps.max() - 1


@pytest.mark.parametrize("kind", ["float16", "float64", "fortran", ">f4"])
def test_other_ways_to_store_the_embeddings(tmp_path, kind):
    a = discover.drawn_regions(400, 16)["reg_emb"].numpy()
    a = np.asfortranarray(a) if kind == "fortran" else a.astype(kind)
    plant(tmp_path / "e.npz", 400, reg_emb=a)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert tree_of(tmp_path)["precision_at_10"] == 1


@pytest.mark.parametrize("kind", ["uint8", "uint64", ">i4"])
def test_whole_numbers_of_any_type(tmp_path, kind):
    arrays = plant(tmp_path / "e.npz", 400)
    whole = {k: arrays[k].astype(kind) for k in ("num_regions", "true_label", "region_target")}
    plant(tmp_path / "e.npz", 400, **whole)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert tree_of(tmp_path)["precision_at_10"] == 1


def test_regions_of_which_nothing_is_known_do_not_count(tmp_path):
    nan = float("nan")
    target = torch.tensor([nan, 1.0, nan, 0.0, 1.0, nan])
    for regions, K, expected in (([0, 1, 2, 3], 10, 0.5), ([0, 1, 2, 4, 3], 2, 1.0), (range(6), 6, 2 / 3)):
        assert discover.precision(torch.tensor(regions), target, K) == pytest.approx(expected)
    for regions in ([0, 2, 5], []):
        assert discover.precision(torch.tensor(regions, dtype=torch.long), target) is None
    target = plant(tmp_path / "e.npz", 400)["region_target"].copy()
    target[np.flatnonzero(target == 0)[::2]] = np.nan
    plant(tmp_path / "e.npz", 400, region_target=target)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert tree_of(tmp_path)["base_rate"] == pytest.approx(np.nanmean(target))


# --- bad input: one line, no traceback

NONE = np.ones((0, 16), "float32")
EMPTY = dict(reg_emb=NONE, num_regions=np.zeros(0, int), true_label=np.zeros(0, int), region_target=None)
BAD = {
    "no reg_emb": (dict(reg_emb=None), "no array 'reg_emb'", "num_regions"),
    "no img_emb": (dict(img_emb=None), "no array 'img_emb'"),
    "other D": (dict(text_emb=np.ones((10, 7))), "reg_emb [400, 16]", "text_emb [10, 7]", "one D"),
    "a number": (dict(text_emb=np.array(3.0)), "text_emb []", "one D"),
    "other n": (dict(true_label=np.zeros(7, int)), "true_label [7]"),
    "sum": (dict(num_regions=np.full(100, 3)), "sum 300", "reg_emb [400, 16]"),
    "negative count": (dict(num_regions=np.array([-1, 5] * 50) * 2), "num_regions"),
    "float labels": (dict(true_label=np.zeros(100)), "whole numbers"),
    "labels in a column": (dict(true_label=np.zeros((100, 1), int)), "[100, 1]", "whole numbers [n]"),
    "label too high": (dict(true_label=np.arange(100) % 11), "0 to 9", "10 classes", "0 to 10"),
    "label too low": (dict(true_label=np.arange(100) % 5 - 1), "found -1 to 3"),
    "target": (dict(region_target=np.zeros(5)), "region_target [5]", "[400]"),
    "names": (dict(class_names=np.array(["a", "b"])), "class_names [2]", "10 different"),
    "a name twice": (dict(class_names=np.array([*"aabcdefghi"])), "10 different class_names", "'a', 'a'"),
    "nan image": (dict(img_emb=np.full((100, 16), np.nan)), "img_emb", "row 0"),
    "zero text": (dict(text_emb=np.zeros((10, 16))), "text_emb", "zero"),
    "one class": (dict(text_emb=np.ones((1, 16)), true_label=np.zeros(100, int)), "one class", "two or more"),
    "no region": (dict(reg_emb=NONE, num_regions=np.zeros(100, int), region_target=None), "none of its 100"),
    "no image": (dict(EMPTY, img_emb=NONE), "no images"),
    "all equal": (dict(reg_emb=np.ones((400, 16), "float32")), "all equal", "nothing to cluster"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_embeddings_are_one_line_and_exit_code_2(tmp_path, capsys, name):
    changes, *expected = BAD[name]
    plant(tmp_path / "e.npz", 400, **changes)
    path = "" if name == "all equal" else tmp_path / "e.npz"
    refused(capsys, words(tmp_path / "e.npz", tmp_path / "out"), path, *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "row, value, what", [(7, 0.0, "zero"), (399, np.nan, "not finite"), (250, np.inf, "not f")]
)
def test_zero_or_nan_row_is_named(tmp_path, capsys, row, value, what):
    x = discover.drawn_regions(400, 16)["reg_emb"].numpy()
    x[row] = value
    plant(tmp_path / "e.npz", 400, reg_emb=x)
    refused(
        capsys, words(tmp_path / "e.npz", tmp_path / "out"), tmp_path / "e.npz", f"region {row} is {what}"
    )


@pytest.mark.parametrize("content", [b"", b"garbage" * 40, "cut", "object"])
def test_file_that_is_no_npz(tmp_path, capsys, content):
    path = tmp_path / "e.npz"
    plant(path, 400, **(dict(class_names=np.array([["a"], 3], object)) if content == "object" else {}))
    if content != "object":
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:3000])
    refused(capsys, words(path, tmp_path / "out"), path, "not an .npz file of plain arrays")


FLAGS = {  # a word and what the line about it says
    "--methd=ravl": ("--methd", "method"),
    "--method=magic": ("--method", "spurious_aware"),
    "--clustering=exact": ("--clustering", "fast or ravl"),
    "--k=20": ("--k", "LOW:HIGH"),
    "--k=5000:6000": ("--k", "5000 clusters of 400 regions"),
    "--embeddings=nowhere.npz": ("nowhere.npz", "no such file"),
    "--embeddings=random:many": ("random:N,D",),
    "--k=2:10000000000000": ("--k", "HIGH <= 20000"),
    "--embeddings=random:10000000000000,10000000000000": ("--embeddings", "at most 4,294,967,296"),
    "--embeddings=random:5,5": ("random:5,5", "at least 40 regions"),
}
OF_IMAGES = (
    "data=waterbirds:. split=test confounder=0.9 strength=0.5 spurious=1 feature=x masks=. outside=0.5 "
)
OF_IMAGES += (
    "regions=grid:2 region_encoder=crop classifier=text ckpt=. probe=bap classes=x places=x prompts=. "
)
OF_IMAGES += "model=tiny pretrained=x quick_gelu=on"
for word in OF_IMAGES.split():
    FLAGS[f"--{word}"] = f"--{word.partition('=')[0]}: ", "nothing with --embeddings"
WRONG = (
    "batch_size=0 threads=-1 region_encoder=roll classifier=knn temperature=0 l2=inf outside=0 outside=1.1 "
)
WRONG += f"seed=-1 k=1:5 k=9:9 k=²:5 k=2:{'9' * 5000}"
for word in WRONG.split():
    FLAGS[f"--{word}"] = (f"--{word.partition('=')[0]}: found",)


@pytest.mark.parametrize("word", FLAGS)
def test_bad_flag_is_one_line_and_exit_code_2(tmp_path, capsys, word):
    refused(capsys, [*words("random:400,16", tmp_path / "out"), word], *FLAGS[word])
    assert not (tmp_path / "out").exists()


def test_k_larger_than_the_number_of_regions_is_cut(tmp_path, capsys):
    plant(tmp_path / "e.npz", 40)
    assert run(words(tmp_path / "e.npz", tmp_path, "--k=30:60")) == 0
    assert "30 to 59 wanted, but there are 40 regions; up to 39 is used" in capsys.readouterr().out
    assert tree_of(tmp_path)["k"] <= 39


def test_embeddings_that_are_not_unit_norm_are_normalised_and_that_is_said(tmp_path, planted, capsys):
    a = planted[1]
    scale = np.random.RandomState(0).uniform(0.5, 9, (800, 1)).astype("float32")
    more = dict(img_emb=5 * a["img_emb"], text_emb=3 * a["text_emb"], class_names=a["class_names"])
    plant(tmp_path / "e.npz", reg_emb=a["reg_emb"] * scale, **more)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    said = capsys.readouterr().out
    assert all(f"{name} is not unit-norm" in said for name in ("reg_emb", "img_emb", "text_emb"))
    for c, d in zip(tree_of(tmp_path)["clusters"], tree_of(planted[0])["clusters"], strict=True):
        assert sorted(c.pop("regions")) == sorted(d.pop("regions")) and c == d


def test_images_without_a_region_are_counted_and_kept(tmp_path, capsys):
    count = np.full(200, 4)
    count[:50], count[50:100] = 0, 8
    plant(tmp_path / "e.npz", num_regions=count)
    assert run(words(tmp_path / "e.npz", tmp_path)) == 0
    assert "50 of 200 images have no region" in capsys.readouterr().out
    gaps = tree_of(tmp_path)["clusters"][0]["gaps"].values()
    assert sum(g["n_in"] + g["n_out"] for g in gaps) > 150


@pytest.mark.parametrize("method", ["all", *METHODS])
def test_perfect_classifier_finds_nothing_and_says_why(tmp_path, capsys, method):
    a = discover.drawn_regions(400, 16)
    z = a["text_emb"][a["true_label"]].numpy() + 0.025 * np.random.RandomState(0).randn(100, 16)
    plant(tmp_path / "e.npz", 400, img_emb=z)
    assert run(words(tmp_path / "e.npz", tmp_path, f"--method={method}")) == 0
    said, tree = capsys.readouterr().out, tree_of(tmp_path)
    assert "the classifier is right on all 100 images" in said and tree["accuracy"] == 1
    if method == "ravl":
        check_contract(tree, 400)
        assert "No spurious feature was found. The nearest candidates:" in said
        assert not any(c["kept"] for c in tree["clusters"]) and tree["precision_at_10"] is None
        assert all(c["influence"] is None for c in tree["clusters"])
        text = check_page(tmp_path / "discovery.html")[1]
        assert "No spurious feature found above chance" in text and "is right on all images" in text
        assert "No spurious feature was found" not in text  # said once
        assert train.load_discovery(tmp_path).kept == []


def test_equal_images_in_a_class(tmp_path):
    a = discover.drawn_regions(400, 16)
    z = torch.where(a["true_label"][:, None] == 3, a["img_emb"][0], a["img_emb"])
    plant(tmp_path / "e.npz", 400, img_emb=z.numpy())
    assert run(words(tmp_path / "e.npz", tmp_path, "--method=all")) == 0


def test_images_of_one_class_find_nothing_and_say_why(tmp_path, capsys):
    plant(tmp_path / "e.npz", 400, true_label=np.full(100, 3))
    assert run(words(tmp_path / "e.npz", tmp_path, "--method=all")) == 0
    said = capsys.readouterr().out
    assert "all images are of one class (3)" in said and "No spurious feature was found" in said


@BOTH
def test_regions_of_few_kinds(tmp_path, clustering):
    """Three different rows, k from 20: no crash, and no more clusters than kinds where clusters are ours."""
    plant(tmp_path / "e.npz", 400, reg_emb=np.eye(16, dtype="float32")[np.arange(400) % 3])
    assert run(words(tmp_path / "e.npz", tmp_path, f"--clustering={clustering}", "--method=all")) == 0
    tree = tree_of(tmp_path)
    assert sorted(r for c in tree["clusters"] for r in c["regions"]) == list(range(400))
    assert clustering == "ravl" or tree["k"] == 3


def test_all_regions_equal_in_the_published_procedure(tmp_path, capsys):
    plant(tmp_path / "e.npz", 400, reg_emb=np.ones((400, 16), "float32"))
    assert run(words(tmp_path / "e.npz", tmp_path, "--clustering=ravl")) == 0
    assert "not positive for any k" in capsys.readouterr().out


def test_help_prints_the_block_of_defaults(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    flags = ("out_dir", "embeddings", "regions", "clustering", "seed")
    assert all(f"\n{flag}" in shown for flag in flags) and "def main" not in shown
    assert "the data set's own, of most" in shown  # --prompts: not every set has the same


# --- baselines, where the right answer is known


def errors(n=40, D=8, seed=0):
    """Two classes; class 0's second half shows a feature (dimension 2) and is taken for class 1. Each image
    has a region of its object and one of the feature or of another ground (dimension 3). Returns evidence,
    the regions that show the feature in class 0, and the images."""
    g, e = torch.Generator().manual_seed(seed), torch.eye(D)

    def noise():
        return 0.05 * torch.randn(2 * n, D, generator=g)

    y, place = torch.arange(2 * n) // n, torch.arange(2 * n) % n
    has = (y == 0) & (place >= n // 2)
    ground = torch.where(has[:, None], e[2], e[3])
    z = unit(e[y] + ground + noise())
    x = unit(torch.stack([e[y] + noise(), ground + noise()], 1).flatten(0, 1))
    W = torch.zeros(D, 2)
    W[0, 0], W[1, 1], W[2, 1] = 1, 1, 3
    found = told(x, z, W, torch.full((2 * n,), 2), y, ["a", "b"])
    assert torch.equal(found.predicted != y, has)
    return found, set((2 * has.nonzero()[:, 0] + 1).tolist()), has


def ranked(method, e, seed=0):
    return discover.BASELINES[method](e, seed, 0.8).tolist()


@pytest.mark.parametrize("method", ["failures", "george", "domino"])
def test_baseline_ranks_the_regions_of_the_failing_images_first(method):
    e, wanted, has = errors()
    regions = ranked(method, e)
    images, failing = {int(e.image[r]) for r in regions}, set(has.nonzero()[:, 0].tolist())
    if method == "domino":  # of equal images the mixture may make several slices
        assert images <= failing and len(images) > 1
        wanted = {2 * i + 1 for i in images}
    else:
        assert images == (set(range(40)) if method == "failures" else failing)  # a class's, a cluster's
    assert set(regions[: len(wanted)]) == wanted
    assert len(set(regions)) == len(regions) == 2 * len(images)


def published_mixture(v, y, scores, K, noise):
    """Domino's mixture, as its package has it, one component and image at a time."""
    n, C = scores.shape
    hot = np.eye(C)[y]
    R = np.array([np.outer(hot[k], scores[k]).ravel() for k in range(n)])
    R = np.concatenate([R] * (K // R.shape[1] + 1), 1)[:, :K]
    R = R / R.sum(1, keepdims=True) + 1e-3 * noise
    R, last = R / R.sum(1, keepdims=True), -np.inf
    for _ in range(100):
        log_p = np.zeros((n, K))
        for k in range(K):
            w = R[:, k] / R[:, k].sum()
            mean = w @ v
            var = w @ (v - mean) ** 2 + 1e-6
            log_p[:, k] = -0.5 * (np.log(2 * np.pi * var) + (v - mean) ** 2 / var).sum(1)
            log_p[:, k] += np.log(hot @ (w @ hot)) + np.log(scores @ (w @ scores)) + np.log(R[:, k].mean())
        top = log_p.max(1, keepdims=True)
        total = top + np.log(np.exp(log_p - top).sum(1, keepdims=True))
        R = np.exp(log_p - total)
        if abs(total.mean() - last) < 1e-3:
            break
        last = total.mean()
    return R


def test_domino_s_mixture_is_the_published_one():
    g = np.random.default_rng(3)
    y, spot = np.repeat([0, 0, 1, 1], 40), np.repeat(np.arange(4), 40)
    v = 0.3 * g.normal(size=(4, 6))[spot] + 0.05 * g.normal(size=(160, 6))
    scores = np.where(
        (spot == 1)[:, None], [[0.2, 0.8]], np.where((y == 0)[:, None], [[0.9, 0.1]], [[0.1, 0.9]])
    )
    noise = torch.rand(160, 8, generator=torch.Generator().manual_seed(5), dtype=torch.double)
    R, excess = discover.mixture(*map(torch.from_numpy, (v, y, scores)), 8, 5)
    expected = published_mixture(v, y, scores, 8, noise.numpy())
    assert np.allclose(R, expected, atol=1e-6)
    slices = np.unique(expected.argmax(1)[spot == 1])  # of the images that are taken for the other class
    assert int(excess.argmax()) in slices and not set(slices) & set(expected.argmax(1)[spot != 1])
    assert np.bincount(R.argmax(1)[spot == 1]).max() >= 10  # no crumbs of one or two images


def test_domino_of_more_confusions_than_slices():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 10
    v, scores = (
        torch.randn(300, 5, generator=g).double(),
        torch.randn(300, 10, generator=g).double().softmax(1),
    )
    R, excess = discover.mixture(v, y, scores, 25, 0)
    assert R.shape == (300, 25) and R.isfinite().all() and excess.isfinite().all()
    assert torch.allclose(R.sum(1), torch.ones(300).double())


@pytest.mark.parametrize("method", ["domino", "george"])
def test_images_without_regions_are_not_what_a_baseline_ranks(method):
    e, wanted, has = errors()
    bare = has & (torch.arange(80) % 2 == 0)  # of the images that fail every second has no region
    kept = ~bare.repeat_interleave(2)
    e.z = unit(e.z + 2 * torch.eye(8)[4] * bare[:, None])  # they stand apart, and are taken for it surely
    e.scores = torch.where(bare[:, None], torch.eye(2)[1], 0.9 * e.scores + 0.05)
    e.count, e.x, e.image, e.own = torch.where(bare, 0, 2), e.x[kept], e.image[kept], e.own[kept]
    assert ranked(method, e)


def test_failures_takes_the_least_accurate_class_first_and_leaves_out_classes_without_errors():
    e, wanted, _ = errors()
    assert set(e.image[ranked("failures", e)].tolist()) == set(range(40))  # class 1 has no errors
    e.predicted = e.predicted.clone()
    e.predicted[45] = 0  # one error in class 1
    regions = ranked("failures", e)
    assert e.y[e.image[regions]].tolist() == [0] * 80 + [1] * 80 and set(regions[:20]) == wanted
    e.predicted = e.y
    assert sorted(ranked("failures", e)) == list(range(160))


def test_george_takes_the_cluster_with_the_lowest_accuracy_of_any_class():
    e, _, _ = errors()
    even = torch.arange(80) % 2 == 0
    e.predicted = torch.where((e.y == 1) & (e.z[:, 3] > 0) & even, 0, e.y)
    e.z = unit(
        e.z + torch.eye(8)[4 + (torch.arange(80) % 2)]
    )  # the even ones of class 1 stand apart, and fail
    assert {int(e.image[r]) for r in ranked("george", e)} == set(range(40, 80, 2))


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2])
def test_george_of_images_that_are_nearly_alike(spread):
    e, _, _ = errors()
    e.z = unit(e.z[:1] + spread * torch.randn(80, 8, generator=torch.Generator().manual_seed(0)))
    assert len(ranked("george", e)) > 0


def test_spurious_aware_ranks_the_regions_of_wrong_images_by_their_score_for_the_predicted_class():
    e, wanted, has = errors()
    regions = ranked("spurious_aware", e)
    p = (
        torch.stack([e.x[:, 0], e.x[:, 1] + 3 * e.x[:, 2]], 1).double().softmax(1)[:, 1]
    )  # all taken for class 1
    assert sorted(regions) == has[e.image].nonzero()[:, 0].tolist() and set(regions[:20]) == wanted
    assert (p[regions].diff() <= 1e-6).all()


def test_random_is_a_permutation_that_the_seed_decides():
    e, _, _ = errors()
    one = ranked("random", e)
    assert sorted(one) == list(range(160)) and one == ranked("random", e) != ranked("random", e, 1)


# --- images

SETS = (12, 4, 4, 12), (6, 5, 5, 6), (3, 3, 3, 3)
NAMES = ["oval", "square", "tall one"]  # of classes


def birds(root, counts=SETS, classes=2):
    """A folder in the Waterbirds layout, with masks, its images 96x64: the model sees the middle two thirds.
    counts: for each split, images per group. Also folders of the birds as cut-outs and of grounds."""
    table = [("img_id", "img_filename", "y", "split", "place", "place_filename")]
    for name in ("set", "masks", "cutouts", "grounds"):
        (root / name).mkdir(parents=True)
    groups = [(split, g) for split, n in enumerate(counts) for g in range(2 * classes) for _ in range(n[g])]
    for k, (split, g) in enumerate(groups):
        r, (y, place) = np.random.default_rng(k), divmod(g, 2)
        photo = (r.normal(0, 25, (64, 96, 3)) + ((60, 90, 200), (200, 180, 60))[place]).clip(0, 255)
        photo, bird = Image.fromarray(photo.astype("uint8")), Image.new("RGBA", (96, 64))
        at, colour = r.integers(8, 24, 2).tolist(), ((30, 200, 60), (220, 40, 40), (240, 240, 240))[y]
        shape = ImageDraw.Draw(bird)
        (shape.ellipse if y % 2 == 0 else shape.rectangle)((*at, at[0] + 48, at[1] + 30), fill=colour)
        if k < 8:
            photo.save(root / f"grounds/{k}.png")
            bird.save(root / f"cutouts/{k}.png")
        photo.paste(bird, (0, 0), bird)
        photo.save(root / f"set/{k}.png")
        bird.getchannel("A").save(root / f"masks/{k}.png")
        table.append((k, f"{k}.png", NAMES[y], split, place, "-"))
    with open(root / "set/metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    birds(root)
    return root


def words_of(photos, out, *more, model="tiny"):
    where = f"--data=waterbirds:{photos / 'set'}", f"--cache_dir={photos / 'cache'}", f"--out_dir={out}"
    return [*where, f"--model={model}", "--dtype=float32", *more]


@pytest.fixture(scope="module")
def tiny():
    return model.load_encoder("tiny", device="cpu", dtype="float32")


def paths_of(photos, split=1):
    with open(photos / "set/metadata.csv", newline="") as file:
        table = [row for row in csv.DictReader(file) if int(row["split"]) == split]
    return [str(photos / "set" / row["img_filename"]) for row in table]


def by_hand(encoder, found, kind="pool"):
    """Embeddings of the regions that discovery.npz lists, one image at a time: unit-norm [N, D]."""
    out = []
    for i, path in enumerate(found.paths):
        boxes, image = found.box[found.image == i].double(), Image.open(path).convert("RGB")
        if not len(boxes):
            continue
        left, top, right, bottom = encoder.frame(*image.size)
        side = torch.tensor([right - left, bottom - top] * 2)
        share = ((boxes - torch.tensor([left, top] * 2)) / side).clamp(0, 1)
        with torch.inference_mode():
            x = encoder.transform(image)[None]
            if kind == "pool":
                m = model.with_map(encoder.module, encoder.kind, x)[1]
                h, w = m.shape[1:3]
                of = torch.zeros(len(boxes), dtype=torch.long)
                out.append(region_pool_ref(m.double(), share * torch.tensor([w, h, w, h]), of))
            elif kind == "roi":
                out.append(model.roi_regions(encoder.module, x, [share.float()])[1])
            else:
                pictures, _ = data.load_regions(found.regions, [data.Photo(path)], encoder.frame)
                crops = [data.Crop(data.Photo(path), box).image() for box in pictures[0].boxes]
                out.append(encoder.module.encode_image(torch.stack([encoder.transform(c) for c in crops])))
    return unit(torch.cat(out).float())


def check_images(photos, out, encoder, kind="pool"):
    """Files of a run on images: the contract, medoids and clusters of regions embedded by hand."""
    tree, found = tree_of(out), train.load_discovery(out)
    check_contract(tree, len(found.label))
    x = by_hand(encoder, found, kind)
    assert found.fingerprint == encoder.fingerprint and found.region_encoder == kind
    assert found.data == f"waterbirds:{photos / 'set'}"
    medoids = torch.tensor([c["medoid"] for c in sorted(tree["clusters"], key=lambda c: c["id"])])
    assert torch.allclose(unit(x[medoids] - found.mean), found.medoids, atol=1e-3)
    cosine = unit(x - found.mean) @ found.medoids.T
    assert (cosine.gather(1, found.label[:, None])[:, 0] >= cosine.amax(1) - 1e-3).all()
    assert (train.assign_regions(x, found) == found.label).double().mean() > 0.98
    return tree, found, x


def embedded(encoder, paths):
    return unit(encoder.embed([data.Photo(p) for p in paths]))


@pytest.mark.parametrize("kind", ["pool", "crop"])
def test_grid_regions_of_images_are_what_a_hand_made_pooling_gives(photos, tiny, tmp_path, kind):
    flags = (
        "--classifier=probe",
        f"--region_encoder={kind}",
        "--regions=grid:2,3",
        f"--masks={photos / 'masks'}",
    )
    assert run(words_of(photos, tmp_path, *flags)) == 0
    tree, found, x = check_images(photos, tmp_path, tiny, kind)
    paths = paths_of(photos)
    assert found.paths == paths and found.image.tolist() == np.repeat(np.arange(22), 13).tolist()
    # the model sees a 64x64 square in the middle of 96x64: shares of the original image
    assert found.box[0].tolist() == pytest.approx([1 / 6, 0, 0.5, 0.5], abs=1e-6)
    assert found.box[12].tolist() == pytest.approx([1 / 6 + 4 / 9, 2 / 3, 5 / 6, 1], abs=1e-6)
    # the probe is train.py's erm, on unit embeddings of the training images
    samples = data.load_data(found.data)
    z, fit, val = unit(tiny.embed(samples.items)), samples.split == 0, samples.split == 1
    fitted = model.fit_probe(z[fit], samples.y[fit], 0.8, classes=2)
    right = fitted.predict(z[val]) == samples.y[val]
    assert tree["accuracy"] == pytest.approx(float(right.double().mean()))
    check_step_2(tmp_path, x, z[val], fitted.logits, [13] * 22, samples.y[val].tolist(), NAMES[:2])
    outside = []  # the target: at least 90 % outside of the mask
    for i, (x1, y1, x2, y2) in zip(found.image.tolist(), found.box.tolist(), strict=True):
        mask = np.asarray(Image.open(photos / "masks" / Path(paths[i]).name)) > 127
        at = mask[round(y1 * 64) : round(y2 * 64), round(x1 * 96) : round(x2 * 96)]
        outside.append(at.mean() <= 0.1)
    assert tree["base_rate"] == pytest.approx(np.mean(outside), abs=0.03) and 0.1 < tree["base_rate"] < 0.9
    assert check_page(tmp_path / "discovery.html")[0] >= 10


def test_second_run_comes_from_the_cache_and_is_the_same(photos, tmp_path, capsys):
    flags = "--classifier=probe", "--regions=grid:4"
    said = []
    for name, more in (("a", flags), ("b", flags), ("c", ("--classifier=probe", "--regions=grid:5"))):
        assert run(words_of(photos, tmp_path / name, *more)) == 0
        said.append(capsys.readouterr().out)
    assert (
        "regions: 22 embedded" in said[0] and "regions: 22 embedded" in said[2]
    )  # others are not taken for these
    assert "regions: 22 from the cache" in said[1] and "embedded in" not in said[1]
    assert tree_of(tmp_path / "a")["clusters"] == tree_of(tmp_path / "b")["clusters"]


def test_zero_shot_by_text(photos, tiny, tmp_path, capsys):
    assert run(words_of(photos, tmp_path)) == 0
    said = "text embeddings, prompts: 'This is a picture of a oval.' for 'oval', so of 2"
    assert said in capsys.readouterr().out
    tree, found, x = check_images(photos, tmp_path, tiny)
    text = tiny.prompts([[f"This is a picture of a {c}."] for c in NAMES[:2]])
    z, y = embedded(tiny, found.paths), data.load_data(found.data).y[32:54]
    accuracy = ((z @ text.T).argmax(1) == y).double().mean()
    assert tree["accuracy"] == pytest.approx(float(accuracy))
    check_step_2(tmp_path, x, z, lambda v: v @ text.T / 0.07, [9] * 22, y.tolist(), NAMES[:2])


def test_nearest_words_are_given_by_a_trained_text_tower_only(photos, tiny, tmp_path, capsys):
    (tmp_path / "w.safetensors").write_bytes(model.weights_bytes(tiny.module))
    for pretrained, given in (("", False), ("none", False), (tmp_path / "w.safetensors", True)):
        more = f"--pretrained={pretrained}", "--classifier=probe", "--l2=30", "--method=loss"
        assert run(words_of(photos, tmp_path / "out", *more)) == 0
        assert any(c["kept"] for c in tree_of(tmp_path / "out")["clusters"])
        assert ("Nearest words: " in (tmp_path / "out/discovery.html").read_text()) == given
        assert capsys.readouterr().out.count("untrained: no nearest words") == (not given)


def rectangles(form, path, paths):
    """The same boxes in pixels for each picture, as CSV or COCO; the shares of those that are seen. The third
    is cut off at the edge, the last lies where the model does not look."""
    boxes = [(10, 5, 60, 40), (30, 20, 90, 64), (70, 0, 100, 30), (0, 0, 10, 64)]
    if form == "boxes":
        lines = [(f"set/{Path(p).name}", *b) for p in paths for b in boxes]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("path", "x1", "y1", "x2", "y2"), *lines])
    else:
        marks = []
        for k in range(len(paths)):
            for (x1, y1, x2, y2), crowd in zip([*boxes, (1, 1, 6, 6)], [0, 0, 0, 0, 1], strict=True):
                marks.append(dict(id=1, image_id=k, bbox=[x1, y1, x2 - x1, y2 - y1], iscrowd=crowd))
        images = [dict(id=k, file_name=Path(p).name) for k, p in enumerate(paths)]
        path.write_text(json.dumps(dict(images=images, annotations=marks)))
    return torch.tensor(
        [(10 / 96, 5 / 64, 60 / 96, 40 / 64), (30 / 96, 20 / 64, 90 / 96, 1), (70 / 96, 0, 1, 30 / 64)]
    )


@pytest.mark.parametrize("form, kind", [("boxes", "pool"), ("coco", "pool"), ("boxes", "crop")])
def test_boxes_are_regions(photos, tiny, tmp_path, capsys, form, kind):
    seen = rectangles(form, tmp_path / "boxes", paths_of(photos)[:-2])  # two images have none
    flags = f"--regions={form}:{tmp_path / 'boxes'}", f"--region_encoder={kind}"
    assert run(words_of(photos, tmp_path, *flags)) == 0
    said = capsys.readouterr().out
    assert "20 boxes lie in a margin" in said and "2 of 22 images have no region" in said
    _, found, _ = check_images(photos, tmp_path, tiny, kind)
    assert found.image.tolist() == np.repeat(np.arange(20), 3).tolist() and len(found.paths) == 22
    assert torch.allclose(found.box, repeat(seen, "r four -> (n r) four", n=20), atol=1e-6)


def test_masks_are_regions(photos, tiny, tmp_path, capsys):
    """Three regions: above, left below, right below; the first image has no mask."""
    (tmp_path / "m").mkdir()
    a = np.zeros((64, 96), "uint8")
    a[32:], a[32:, 48:] = 100, 200
    for p in paths_of(photos)[1:]:
        Image.fromarray(a).save(tmp_path / "m" / Path(p).name)
    assert run(words_of(photos, tmp_path, f"--regions=masks:{tmp_path / 'm'}")) == 0
    assert "1 of 22 images have no region" in capsys.readouterr().out
    _, found, _ = check_images(photos, tmp_path, tiny)  # rectangles: pooled by mask as by box
    expected = torch.tensor([[0, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]).repeat(21, 1)
    assert torch.allclose(found.box, expected, atol=1e-6)


def test_roi_regions_are_for_clip_s_resnets_only(photos, tmp_path, capsys):
    import open_clip

    vision = dict(image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)
    (tmp_path / "configs").mkdir()
    config = dict(embed_dim=32, vision_cfg=vision, text_cfg=text)
    (tmp_path / "configs/flock-roi.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    encoder = model.load_encoder("flock-roi", "none", device="cpu")
    torch.save(encoder.module.state_dict(), tmp_path / "rn.pt")
    encoder = model.load_encoder("flock-roi", str(tmp_path / "rn.pt"), device="cpu")
    flags = "--classifier=probe", "--region_encoder=roi"
    pretrained = f"--pretrained={tmp_path / 'rn.pt'}"
    assert run(words_of(photos, tmp_path / "out", *flags, pretrained, model="flock-roi")) == 0
    check_images(photos, tmp_path / "out", encoder, "roi")
    refused(capsys, words_of(photos, tmp_path, *flags), "--region_encoder", "roi", "ResNets")


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A checkpoint of train.py."""
    out = tmp_path_factory.mktemp("trained")
    folders = [f"--foregrounds={photos / 'cutouts'}", f"--backgrounds={photos / 'grounds'}"]
    more = ["--instances=16", "--per_instance=2", "--own=0"]
    assert run_script(DISCOVER.with_name("train.py"), words_of(photos, out, *folders, *more)) == 0
    return out / "ckpt.pt"


@pytest.mark.parametrize("name", ["erm", "bap"])
def test_probe_of_a_checkpoint(photos, tiny, trained, tmp_path, name, capsys):
    assert run(words_of(photos, tmp_path, f"--ckpt={trained}", f"--probe={name}")) == 0
    assert f"probe {name} of {trained}" in capsys.readouterr().out
    tree, found, x = check_images(photos, tmp_path, tiny)
    state = model.load_checkpoint(trained)
    g = unit if name == "erm" else model.load_map(state)
    fitted = model.Probe(**state["probes"][name])
    z, y = embedded(tiny, found.paths), data.load_data(found.data).y[32:54]
    assert tree["accuracy"] == pytest.approx(float((fitted.predict(g(z)) == y).double().mean()))
    check_step_2(tmp_path, x, z, lambda v: fitted.logits(g(v)), [9] * 22, y.tolist(), NAMES[:2])


def test_a_checkpoint_s_classes_may_come_in_another_order_and_case(photos, tiny, trained):
    right = []
    for names in (NAMES[:2], [NAMES[1].upper(), NAMES[0]]):
        samples = data.load_data(f"waterbirds:{photos / 'set'}", classes="", splits=False)
        samples.classes, samples.y = names, samples.y if names == NAMES[:2] else 1 - samples.y
        head, _ = discover.checkpoint_probe(tiny, samples, ["val"], str(trained), "erm")
        right.append((head(tiny.embed(samples.items)).argmax(1) == samples.y).tolist())
    assert right[0] == right[1] and any(right[0])


def test_which_probes_may_be_looked_at_on_what(photos, trained, tmp_path, capsys):
    argv = words_of(photos, tmp_path / "o", f"--ckpt={trained}")
    for word, *expected in (
        ("--probe=val_probe", "--split=val", "val_probe was fitted on the val split"),
        ("--split=train", "--split=train", "erm was fitted on the train split"),
        ("--classifier=text", "--ckpt", "--classifier=text"),
        ("--probe=magic", "--probe", "magic", "erm"),
        ("--probe=leace", "--probe", "leace", "no other, or not its map"),
        (f"--ckpt={tmp_path / 'none.pt'}", "none.pt", "no such file"),
        ("--ckpt=", "--probe", "--ckpt=FILE"),
    ):
        more = ["--probe=bap"] if word == "--ckpt=" else []
        refused(capsys, [*argv, *more, word], *expected)
    refused(
        capsys,
        words_of(photos, tmp_path / "o", "--classifier=probe", "--split=train,val"),
        "--split=train,val",
    )
    birds(tmp_path / "three", ((2,) * 6, (2,) * 6, (2,) * 6), 3)
    other = f"--data=waterbirds:{tmp_path / 'three/set'}"
    refused(capsys, [*argv, other], f"made for {NAMES[:2]}", str(NAMES))


@pytest.mark.parametrize(
    "word, expected",
    [
        ("--regions=grid:0", ("--regions", "grid:N")),
        ("--regions=grid:64,64,64", ("--regions", "at most 8192 regions")),
        ("--regions=tiles:3", ("--regions", "masks:DIR")),
        ("--regions=boxes:nowhere.csv", ("nowhere.csv",)),
        ("--regions=coco:nowhere.json", ("nowhere.json",)),
        ("--regions=masks:nowhere", ("nowhere", "no such folder")),
        ("--masks=nowhere", ("--masks", "no such folder")),
        ("--split=vall", ("--split", "train or val or test")),
        ("--classifier=rows", ("no linear classifier",)),
        ("--data=waterbirds:nowhere", ("nowhere", "no such folder")),
    ],
)
def test_bad_flag_about_images(photos, tmp_path, capsys, word, expected):
    refused(capsys, [*words_of(photos, tmp_path / "o"), word], *expected)


@pytest.mark.parametrize(
    "box, expected", [("200,5,300,20", "outside"), ("20,5,19,9", "no area"), ("1,2,nan,4", "four")]
)
def test_bad_box_names_its_line(photos, tmp_path, capsys, box, expected):
    path = tmp_path / "boxes"
    path.write_text(f"path,x1,y1,x2,y2\nset/{Path(paths_of(photos)[0]).name},{box}\n")
    refused(capsys, words_of(photos, tmp_path / "o", f"--regions=boxes:{path}"), path, "line 2", expected)


def test_images_without_labels_or_a_split_without_images_are_a_line(photos, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for path in paths_of(photos)[:4]:
        shutil.copy(path, tmp_path / "flat")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    flat = f"--data=folder:{tmp_path / 'flat'}", f"--classes={tmp_path / 'names.txt'}"
    refused(capsys, [*words_of(photos, tmp_path / "o"), *flat], "flat", "no labels", "discovery needs them")
    lines = [f"{p},{k % 2},{k % 2}" for k, p in enumerate(paths_of(photos))]
    (tmp_path / "t.csv").write_text(
        "\n".join(["path,y,split", *[line.replace(",0,0", ",0,1") for line in lines]])
    )
    table = [f"--data=csv:{tmp_path / 't.csv'}", "--split=train"]
    refused(capsys, [*words_of(photos, tmp_path / "o"), *table], "--split=train", "no images there")


def test_several_splits(photos, tmp_path):
    assert run(words_of(photos, tmp_path, "--classifier=probe", "--split=val,test")) == 0
    assert train.load_discovery(tmp_path).paths == paths_of(photos) + paths_of(photos, 2)


@pytest.mark.parametrize("kind, share", [("pool", 0.5), ("crop", 0.0)])
def test_skip_bad_leaves_an_image_out_and_says_so(photos, tmp_path, capsys, kind, share):
    shutil.copytree(photos / "set", tmp_path / "set")
    bad = tmp_path / "set" / Path(paths_of(photos)[3]).name
    content = bad.read_bytes()
    bad.write_bytes(content[: int(share * len(content))])
    flags = "--classifier=probe", f"--region_encoder={kind}", f"--data=waterbirds:{tmp_path / 'set'}"
    argv = words_of(photos, tmp_path / "o", *flags)
    refused(capsys, argv, f"set/{bad.name}")
    assert run([*argv, "--skip_bad", f"--masks={photos / 'masks'}"]) == 0
    said, found = capsys.readouterr().out, train.load_discovery(tmp_path / "o")
    assert f"set/{bad.name}" in said and "1 of 22 images cannot be read; left out" in said
    names = [Path(p).name for p in paths_of(photos)]
    assert [Path(p).name for p in found.paths] == [name for name in names if name != bad.name]
    assert len(found.label) == 21 * 9


def test_masks_that_are_white_outside_are_said(photos, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    for path in (photos / "masks").iterdir():
        ImageOps.invert(Image.open(path).convert("L")).save(tmp_path / "masks" / path.name)
    argv = words_of(photos, tmp_path / "o", "--classifier=probe")
    assert run([*argv, f"--masks={photos / 'masks'}"]) == 0
    assert "along their edge" not in capsys.readouterr().out
    assert run([*argv, f"--masks={tmp_path / 'masks'}"]) == 0
    assert "masks are white along their edge" in capsys.readouterr().out


@pytest.mark.ahead
def test_two_processes_share_the_embedding_and_give_what_one_gives(photos, tmp_path, monkeypatch):
    flags = "--classifier=probe", f"--masks={photos / 'masks'}", "--regions=grid:2"
    argv = words_of(photos, tmp_path / "two", *flags, f"--cache_dir={tmp_path / 'cache'}")
    assert run(words_of(photos, tmp_path / "one", *flags)) == 0
    jobs = in_two_processes(DISCOVER, *argv)
    assert [code for code, *_ in jobs] == [0, 0], jobs
    said = "".join(out for _, out, _ in jobs)
    assert said.count("discovery.json, discovery.npz and discovery.html written") == 1
    one, two = tree_of(tmp_path / "one"), tree_of(tmp_path / "two")
    assert all(one[k] == two[k] for k in ("k", "clusters", "precision_at_10", "base_rate", "silhouettes"))


# --- real data


@pytest.mark.ahead
@pytest.mark.skipif(
    "FLOCK_DATA" not in os.environ, reason="FLOCK_DATA (minibirds_0.95, bird_masks) is not set"
)
def test_real_birds_backgrounds_are_found(tmp_path):
    """An ERM probe on lite0, minibirds at 95 %, regions of a 3x3 grid over val: water and forest."""
    real = Path(os.environ["FLOCK_DATA"])
    where = f"--data=waterbirds:{real / 'minibirds_0.95'}", f"--masks={real / 'bird_masks'}"
    assert run([*where, f"--out_dir={tmp_path}", f"--cache_dir={tmp_path / 'cache'}"]) == 0
    tree, found = tree_of(tmp_path), train.load_discovery(tmp_path)
    samples = data.load_data(f"waterbirds:{real / 'minibirds_0.95'}")
    place = dict(zip([item.path for item in samples.items], samples.place.tolist(), strict=True))
    kept = [c for c in tree["clusters"] if c["kept"]]
    assert len(kept) == 2 and tree["precision_at_10"] >= 0.9 and 0.4 < tree["base_rate"] < 0.6
    water = [sum(place[found.paths[found.image[r]]] for r in c["regions"][:10]) for c in kept]
    assert sorted(v >= 9 for v in water) == sorted(v <= 1 for v in water) == [False, True]
