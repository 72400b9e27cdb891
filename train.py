"""Background-invariant anchor pre-training (BAP), and what it does for a probe trained on spurious data.

    python train.py                                             drawn scenes, EfficientNet-Lite0, no files needed
    python train.py --data=waterbirds:DIR --foregrounds=DIR --backgrounds=DIR --model=ViT-L-14 --pretrained=openai

1. Put foregrounds (cut-outs) on backgrounds, embed the composites with a frozen encoder.
2. Report how additive the embeddings are: z(f, b) = mu + a_f + c_b + e.
3. Pre-train a map g that sends every composite of a foreground to its anchor mu + a_f, whatever the background.
4. Train a probe on the biased data through g, and compare it with what else could be done, on the test split.

BAP is arXiv 2605.11107; its equations are not public, those here and in model.py are our reading.
"""
import time
from dataclasses import replace
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (Complaint, Composite, bars, check, composites, draw_view, expect, flags, html_table, layers, load_data, page, place_grounds, recompose,
                  revision, rng, run, say, table, thumb, write, write_json)
from kernels import pairwise_loss
from model import (Cutter, Map, additive_solve, additivity, cos_sum, dfr, embed, features, fit_probe, group_metrics, leace,
                   load_checkpoint, load_encoder, moments, nullspace, paired_bootstrap, renumber, save_checkpoint, sphere_log, unit, wiener, wiener_of, worst_group)

# --- I/O ------------------------------------------------------------------------------------------------------------
out_dir = "out"          # results.json, report.html, ckpt.pt
cache_dir = "cache"      # embeddings, reused by every run; --cache_dir= for none
resume = False           # go on where an interrupted run of the same flags stopped
skip_bad = False         # leave out images that cannot be read, counted and named, instead of stopping
# --- the biased data to train the probe on ---------------------------------------------------------------------------
data = "scenes"          # scenes, or NAME:DIR with NAME waterbirds, celeba, counteranimal, nico, cocogender, in9, imagenet, folder, csv;
                         # --data=NAME:help says what to download and how it must look
masks = ""               # folder of foreground masks of the training images (copy_paste, balanced_train)
place_backgrounds = ""   # folders of backgrounds, one per place, comma-separated (balanced_train)
confounder = 1.0         # scenes and pairs: share of the training images on their class's own place
difficulty = 0.65        # scenes: how much the background outshouts the foreground, 0 to 1
# --- the composites to pre-train on ----------------------------------------------------------------------------------
foregrounds = "drawn"    # folder of RGBA cut-outs
backgrounds = "drawn"    # folder of photos
instances = 640          # foregrounds in a pose of their own: each cut-out is used several times
per_instance = 8         # backgrounds behind each
# --- encoder ---------------------------------------------------------------------------------------------------------
model = "lite0"          # lite0, timm:NAME, tiny, or any open_clip name such as ViT-L-14
pretrained = ""          # open_clip tag or local file
quick_gelu = "auto"      # auto follows the record of the weights; on, off
device = "auto"          # auto, cpu, cuda
dtype = "auto"           # of the forward pass: auto, float32, bfloat16
batch_size = 8           # small batches are faster on a CPU; raise it on a GPU
threads = 0              # that decode images and, on a CPU, embed them; 0 for one per core
# --- method ----------------------------------------------------------------------------------------------------------
method = "bap"           # bap is all there is so far
own = 0.5                # bap: weight of the target's own training foregrounds, cut out by what composites taught; 0 for none
own_per = 5              # backgrounds behind each of them
own_most = 1000          # at most so many of them
power = 0.0              # bap works on sign(z) |z|^power; 0 means 0.5 after a ReLU, else 1
lam = 1.0                # Wiener filter: ridge in units of the mean variance
bap_map = "closed"       # closed (Wiener filter), linear or mlp, the last two trained by contrast against the anchors
steps = 300              # of that training
learning_rate = 3e-4
scale = 20.0             # inverse temperature of the contrast
# --- probe -----------------------------------------------------------------------------------------------------------
tuned = True             # also rows tuned on the validation split's groups, under their own names
l2 = 0.8                 # penalty of every probe in the table, in units of the mean loss (scikit-learn's C = 1 / (l2 n))
# --- system ----------------------------------------------------------------------------------------------------------
seed = 0
seeds = 1                # runs with seed, seed + 1, ...; reported are means and spread
# --- end -------------------------------------------------------------------------------------------------------------

ORDER = {  # of the table's rows
    "erm": "probe on the raw embedding", "group_weighted": "the same, groups weighted by the inverse of their size",
    "nullspace": "32 leading background directions projected out", "leace": "LEACE on the same 32 background coordinates",
    "copy_paste": "training foregrounds also on random backgrounds (needs masks)", "bap_closed": "Wiener filter on the raw embedding",
    "bap_synthetic": "bap without the target's own foregrounds", "bap": "BAP, the recommended map",
    "erm_tuned": "penalty tuned on the validation groups", "bap_tuned": "map and penalty tuned on the validation groups",
    "dfr": "last-layer retraining on validation groups", "val_probe": "probe on the balanced validation set", "val_probe_bap": "the same through the map",
    "balanced_train": "training foregrounds on every place: the true ceiling"}


def main():
    config = flags(globals())
    expect(method == "bap", "method", method, "bap")
    expect(bap_map in ("closed", "linear", "mlp"), "bap_map", bap_map, "closed, linear or mlp")
    expect(0 <= difficulty <= 1, "difficulty", difficulty, "a number from 0 to 1")
    for flag, least in (("instances", 8), ("per_instance", 2), ("own_per", 2), ("own_most", 8), ("batch_size", 1), ("threads", 0),
                        ("seeds", 1), ("steps", 1), ("seed", 0)):
        expect(config[flag] >= least, flag, config[flag], f"a whole number from {least}")
    for flag in ("l2", "lam", "learning_rate", "scale"):
        expect(0 < config[flag] < float("inf"), flag, config[flag], "a positive number")
    expect(0 <= own <= 1, "own", own, "a number from 0 to 1")
    expect(0 <= power <= 1, "power", power, "a number from 0 to 1")
    out, started = Path(out_dir), time.time()
    load_data(data, masks, confounder, seed, difficulty)  # complains before any work is done

    encoder = load_encoder(model, pretrained, quick_gelu, device)
    figures, grounds, notes = layers(foregrounds, backgrounds, skip_bad, seed, difficulty)
    partial = unfinished(out / "partial.pt", config, encoder)
    runs = partial["runs"][:seeds - 1] if partial else []
    for s in range(seed + len(runs), seed + seeds):
        result, last = one_run(encoder, figures, grounds, s, out, config)
        runs.append(result)
        save_checkpoint(out / "partial.pt", dict(config=config, fingerprint=encoder.fingerprint, runs=runs))

    results = dict(config=config, git=revision(), notes=encoder.notes + notes + last["samples"].notes,
                   seconds=dict(total=time.time() - started, **runs[-1]["seconds"]), **average(runs))
    for line in results["notes"]:
        say(line)
    say(summary(results))
    save_checkpoint(out / "ckpt.pt", dict(config=config, git=results["git"], fingerprint=encoder.fingerprint, map=last["map"].state_dict(),
                                          power=last["map"].power, probes={k: p.state() for k, p in last["probes"].items()},
                                          classes=last["samples"].classes, places=last["samples"].places))
    write(out / "report.html", report(results, last))
    write_json(out / "results.json", results)  # last: it is there only if all the rest is
    for name in ("partial.pt", "training.pt"):
        (out / name).unlink(missing_ok=True)
    say(f"\n{out}/results.json, report.html and ckpt.pt written, {time.time() - started:.0f} s")


def unfinished(path, config, encoder):
    """What an interrupted run of the same flags has left, with --resume; else None."""
    state = load_checkpoint(path, encoder) if resume and path.is_file() else None
    if state is None:
        return None
    differ = [k for k in config if k not in ("resume", "threads", "seeds") and state["config"].get(k) != config[k]]
    if differ:
        made = ", ".join(f"--{k}={state['config'].get(k)}" for k in differ)
        raise Complaint(f"--resume: {path} was made with {made}; give the same flags, or no --resume")
    return state


def one_run(encoder, figures, grounds, s, out, config):
    """Everything for one seed: its result (plain numbers), and what the report and the checkpoint need."""
    seconds, clock = {}, time.time()

    def lap(name):
        nonlocal clock
        seconds[name], clock = time.time() - clock, time.time()

    def embedded(pictures, label):
        z, bad = embed(encoder, pictures, cache_dir, batch_size, threads, dtype, skip_bad, label)
        for _, line in bad[:20]:
            say(f"skipped {line}")
        if bad:
            say(f"{label}: {len(bad)} of {len(pictures)} skipped")
        return z, z.isfinite().all(1)

    # 1. the composites: an incomplete grid of foreground instances i and backgrounds j
    cells, i, j = composites(figures, grounds, instances, per_instance, s)
    z, good = embedded(cells, "composites")
    z, i, j = z[good], i[good], j[good]
    lap("composites")

    # 2. how additive are they?
    additive = additivity(unit(z), i, j, seed=s)
    some = torch.randperm(len(z), generator=torch.Generator().manual_seed(s))[:200]
    shown = [cells[k] for k in good.nonzero()[:, 0][some].tolist()]
    f, b = (embedded([replace(c, **{without: None}) for c in shown], label)[0]
            for without, label in (("ground", "foregrounds on grey"), ("figure", "backgrounds alone")))
    both = f.isfinite().all(1) & b.isfinite().all(1)
    parts = torch.stack([unit(v[both]) for v in (z[some], f, b)])  # [3, N, D]
    additive["flat"].update(cos_sum(*parts, seed=s))
    additive["sphere"].update(cos_sum(*sphere_log(parts.flatten(0, 1)).unflatten(0, (3, -1)), seed=s))
    lap("additivity")

    # 3. the biased data. Its training foregrounds, without labels, are worth having among the composites: a cutter that
    # learned from composites what a foreground looks like cuts them out, and they get backgrounds of the composites'.
    samples = load_data(data, masks, confounder, s, difficulty)
    x, good = embedded(samples.items, "target")
    samples, x = samples.keep(good.nonzero()[:, 0]) if not good.all() else samples, x[good]
    if not good.all():
        check(samples)
    train, val, test = (samples.split == k for k in range(3))
    lap("target")
    grids, exponent = [(1., z, i)], power or (1. if encoder.signed else .5)
    cuts = cut_own(encoder, [samples.items[k] for k in train.nonzero()[:, 0]], cells, s) if own else []
    if cuts:
        own_cells = [Composite(c, grounds[g.integers(len(grounds))], None, draw_view(g)) for n, c in enumerate(cuts)
                     for g in (rng(s, "own", n, k) for k in range(own_per))]
        v, good = embedded(own_cells, "own foregrounds")
        grids = [(1 - own, z, i), (own, v[good], torch.arange(len(own_cells))[good] // own_per)]
    lap("own")

    # 4. the maps
    maps = dict(nullspace=nullspace(z, i, j), leace=leace(z, i, j), bap_closed=wiener([(1., z, i)], lam), bap=wiener(grids, lam, exponent))
    if bap_map != "closed":
        maps["bap"] = contrast(maps["bap"], z, i, j, s, lambda: unfinished(out / "training.pt", config, encoder),
                              lambda **state: save_checkpoint(out / "training.pt", dict(config=config, fingerprint=encoder.fingerprint, **state)))
    if cuts:
        maps["bap_synthetic"] = wiener([(1., z, i)], lam, exponent)
    lap("pretraining")

    # 5. probes, all with the same penalty, trained on the biased data, read on the test split
    y, place, group = samples.y, samples.place, samples.group()
    C = len(samples.classes)
    probes, correct = {}, {}

    def probe(name, g, mask=train, extra=None, weight=None):
        inputs, labels = g(x[mask]), y[mask]
        if extra:
            inputs, labels = torch.cat([inputs, g(extra[0])]), torch.cat([labels, extra[1]])
        probes[name] = fit_probe(inputs, labels, l2, weight, C)
        correct[name] = probes[name].predict(g(x)) == y

    probe("erm", unit)
    for name, g in maps.items():
        probe(name, g)
    probe("val_probe", unit, val)
    probe("val_probe_bap", maps["bap"], val)
    counts = samples.counts(0)
    if counts.all():
        probe("group_weighted", unit, weight=1 / counts[group[train]].double())
    if samples.counts(1).all():
        correct["dfr"] = dfr(x, y, group, val, s).predict(x) == y
    for name, choices, copies in (("copy_paste", [grounds], 2),
                                  ("balanced_train", place_grounds(samples, place_backgrounds, s, difficulty), 1)):
        pictures, labels = recompose(samples, choices, copies, s) if choices else ([], None)
        if pictures:
            more, good = embedded(pictures, name)
            probe(name, unit, extra=(more[good], labels[good]))
    if tuned:  # for the worst group of the validation split, which knows the places: beside the headline, never in it
        both = moments(grids, exponent)
        for name, tries in (("erm_tuned", [unit]), ("bap_tuned", [wiener_of(both, k, exponent) for k in (.3, 1., 3.)])):
            tries = [fit_probe(g(x[train]), y[train], k, classes=C).predict(g(x)) == y for g in tries for k in (.02, .2, 2.)]
            correct[name] = max(tries, key=lambda c: worst_group(c[val], group[val]))
    lap("probes")

    methods = {name: group_metrics(correct[name][test], y[test], place[test], counts, len(samples.places)) for name in ORDER if name in correct}
    for name in methods:
        low, high = paired_bootstrap(correct[name][test], correct["erm"][test], group[test], seed=s)
        methods[name]["over_erm"] = [low, high]
    result = dict(additivity=additive, invariance=invariance(maps["bap"], z, i, x, samples, s), methods=methods, seconds=seconds)
    return result, dict(map=maps["bap"], probes=probes, samples=samples, correct=correct, x=x, cells=cells, cuts=cuts)


def cut_own(encoder, pictures, cells, s):
    """The foregrounds of the target's training pictures, list of data.Cut; none where the cutter cannot be trusted.

    It is not if it misses the foregrounds of held-out composites (IoU below 0.6), nor if it finds one of plausible size, 2 to
    50 % of the picture, in less than two thirds of the target's: then what it learned from composites does not carry over.
    """
    some = torch.randperm(len(cells), generator=torch.Generator().manual_seed(s))[:640].tolist()
    cutter = Cutter(encoder, [cells[k] for k in some], threads, seed=s)
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(s))[:own_most].sort().values.tolist()
    pictures = [pictures[k] for k in chosen]
    alpha, _ = embed(encoder, pictures, cache_dir, batch_size, threads, dtype, False, "cut out", cutter.masks, cutter.name)
    plausible = (alpha.mean(1) > .02) & (alpha.mean(1) < .5)
    share = float(plausible.double().mean())
    trusted = cutter.iou >= .6 and share >= 2 / 3
    say(f"cutter: IoU {cutter.iou:.2f} on held-out composites, a plausible foreground in {share:.0%} of the training images"
        + ("" if trusted else ": not trusted, the target's own foregrounds are not used"))
    return [cutter.cut(p, a) for p, a, good in zip(pictures, alpha, plausible.tolist()) if good] if trusted else []


def contrast(g, z, i, j, s, load, save):
    """Trains the map by contrast: every virtual composite of foreground i is to point at its own anchor, not at another's.

    A virtual composite is a_i + r_k, a_i the effect of foreground i and r_k = z_k - mu - a_i(k) all that is not the
    foreground in a real composite k: background, interaction, noise. For a linear map all pairs are had from the
    projected parts (kernels/pairwise_loss.py); for the MLP they are made, a tile at a time. Starts at the closed form.
    """
    x = features(z, g.power)
    i = renumber(i)
    mu, a, _ = additive_solve(x, i, renumber(j))
    a, r = a.float(), (x - mu - a[i]).float()  # [n, D], [N, D]
    generator = torch.Generator().manual_seed(s)
    if bap_map == "mlp":
        torch.manual_seed(s)
        g = Map(mu, g.W.data, g.power, hidden=512)
    g.requires_grad_(True)
    gain = 1 / (a @ g.W.data).norm(dim=1).mean()
    start, W = g.W.data.clone(), g.W
    optimiser = torch.optim.AdamW(g.parameters(), learning_rate * (float(W.data.std()) if bap_map == "linear" else 1.), weight_decay=0.)
    first, state = 0, load()
    if state and state["seed"] == s:
        g.load_state_dict(state["map"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        first = state["step"]
    for step in range(first, steps):
        if step and step % 100 == 0:
            save(seed=s, step=step, map=g.state_dict(), optimiser=optimiser.state_dict(), generator=generator.get_state())
        n = torch.randperm(len(a), generator=generator)[:256]
        m = torch.randperm(len(r), generator=generator)[:256 if bap_map == "linear" else 16]
        y = torch.arange(len(n))
        for group in optimiser.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * (1 - step / steps)
        if bap_map == "linear":
            f, b = a[n] @ W, r[m] @ W
            loss = pairwise_loss(f, b, unit(f), y, scale)
        else:
            s_ij = (a[n][:, None] + r[m]).flatten(0, 1) @ W  # [n m, D]
            s_ij = s_ij + g.mlp(s_ij * s_ij.shape[1] ** .5)
            loss = F.cross_entropy(scale * unit(s_ij) @ unit(a[n] @ W).T, y.repeat_interleave(len(m)))
        loss = loss + 100 * (gain * (W - start)).square().sum() / len(W)
        optimiser.zero_grad()
        loss.backward()
        if not loss.isfinite():
            raise Complaint(f"--bap_map={bap_map}: the loss is not finite in step {step}; lower --learning_rate")
        optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            say(f"step {step}: loss {loss.item():.4f}")
    return g.requires_grad_(False)


def invariance(g, z, i, x, samples, s):
    """Is the map's output invariant? Accuracy on test of a probe for the place, trained on val, on the raw embedding and on
    the map; mean cosine of map outputs of one foreground on two backgrounds, and of two foregrounds."""
    val, test = samples.split == 1, samples.split == 2
    one = len(torch.unique(samples.place[val])) < 2  # no place to predict
    accuracy = lambda v: None if one else float((fit_probe(v[val], samples.place[val], l2).predict(v[test]) == samples.place[test]).double().mean())
    y, generator = unit(g(z)), torch.Generator().manual_seed(s)
    pick = torch.randperm(len(y), generator=generator)[:2000]
    cosine, same = y[pick] @ y[pick].T, i[pick][:, None] == i[pick]
    same_not_self = same & ~torch.eye(len(pick), dtype=torch.bool)
    return dict(place_probe_raw=accuracy(unit(x)), place_probe_map=accuracy(g(x)),
                cos_within=float(cosine[same_not_self].mean()), cos_between=float(cosine[~same].mean()))


def average(runs):
    """Results of all seeds -> their means, spread and, for each method, the seeds' own."""
    def mean(values):
        if isinstance(values[0], dict):
            return {k: mean([v[k] for v in values]) for k in values[0]}
        if isinstance(values[0], list):
            return [mean(list(v)) for v in zip(*values)]
        return None if values[0] is None else sum(values) / len(values) if isinstance(values[0], float) else values[0]

    methods = {}
    for name in runs[0]["methods"]:
        each = [r["methods"][name] for r in runs]
        methods[name] = dict(mean(each), seeds=each)
        worst = torch.tensor([m["worst_group"] for m in each])
        methods[name]["spread"] = float(worst.std()) if len(each) > 1 else 0.
    return dict(additivity=mean([r["additivity"] for r in runs]), invariance=mean([r["invariance"] for r in runs]), methods=methods)


def summary(results):
    """The tables on the console."""
    a, v = results["additivity"], results["invariance"]
    keys = ("r2", "r2_heldout", "foreground", "background", "residual", "cross")
    sums = a["flat"]
    first = results["methods"]["erm"]
    names = [f"y{g['y']}/p{g['place']} (n={g['n']})" for g in first["groups"]]
    rows = [(name, m["worst_group"], m["avg_group_mean"], m["avg_train_weighted"], *[g["accuracy"] for g in m["groups"]],
             f"{m['over_erm'][0]:+.3f} to {m['over_erm'][1]:+.3f}") for name, m in results["methods"].items()]
    spread = f"; means of {seeds} seeds, spread of bap's worst group {results['methods']['bap']['spread']:.3f}" if seeds > 1 else ""
    return "\n".join((
        "\nHow additive are embeddings of composites? Shares of their variance",
        table(("geometry", *keys), [(k, *[a[k][q] for q in keys]) for k in a]),
        f"cos(z(f, b), z(f) + z(b)): raw {sums['cos_sum']:.3f} (shuffled {sums['cos_sum_shuffled']:.3f}), "
        f"means removed {sums['cos_sum_centred']:.3f} ({sums['cos_sum_centred_shuffled']:.3f})",
        "\nIs the map invariant?",
        f"{place_probe(v)}cosine within a foreground {v['cos_within']:.3f}, between {v['cos_between']:.3f}",
        f"\nTest split, every probe with l2 = {l2}{spread}. Interval: worst group over erm, 95 %, paired bootstrap",
        table(("method", "worst_group", "avg_group_mean", "avg_train_weighted", *names, "over erm"), rows)))


def place_probe(v):
    return "" if v["place_probe_raw"] is None else f"accuracy of a probe for the place: raw {v['place_probe_raw']:.3f}, map {v['place_probe_map']:.3f}; "


def report(results, last):
    """The page: what was done, how additive, how good, and where it fails, with pictures."""
    samples, methods, a = last["samples"], results["methods"], results["additivity"]
    test = samples.split == 2
    label = lambda k: f"{samples.classes[samples.y[k]]} on {samples.places[samples.place[k]]}"
    picked = torch.linspace(0, len(last["cells"]) - 1, 12).long().tolist()
    shown = "".join(thumb(last["cells"][k].image()) for k in picked)
    biased = "".join(thumb(samples.items[int(k)].image(), f"{split}: {label(int(k))}") for split, s in (("train", samples.split == 0), ("test", test))
                     for g in torch.unique(samples.group()[s]) for k in (s & (samples.group() == g)).nonzero()[:2, 0])
    probe, g = last["probes"]["bap"], last["map"]
    logits = probe.logits(g(last["x"]))
    taken = logits.argmax(1).tolist()
    margin = logits.gather(1, samples.y[:, None])[:, 0] - logits.amax(1)
    wrong = [k for k in margin.argsort().tolist() if test[k] and margin[k] < 0][:12]
    errors = "".join(thumb(samples.items[k].image(), f"{label(k)}, taken for {samples.classes[taken[k]]}") for k in wrong)
    compared = [methods[name] | {"name": name} for name in ("erm", "bap_closed", "bap", "val_probe", "balanced_train") if name in methods]
    by_group = "".join(
        f"<h3>{samples.classes[g['y']]} on {samples.places[g['place']]}</h3>"
        + bars([(m["name"], m["groups"][k]["accuracy"], m["groups"][k]["interval"], f"n={g['n']}") for m in compared])
        for k, g in enumerate(methods["erm"]["groups"]))
    keys = ("r2", "r2_heldout", "foreground", "background", "residual", "cross")
    erm, bap, v = methods["erm"], methods["bap"], results["invariance"]
    return page("flock: background-invariant anchor pre-training",
                f"{data}, {model} {pretrained}: worst group {erm['worst_group']:.3f} for a probe on the raw embedding, "
                f"{bap['worst_group']:.3f} through the map. It used no place labels.", [
        ("Composites to pre-train on", shown + "".join(thumb(Composite(c, None, None).image(), "cut out of the target")
                                                       for c in last["cuts"][:6])),
        ("The biased data", "<p>" + escape("; ".join(samples.notes)) + "</p>" + biased),
        ("Methods", html_table(("method", "worst group", "mean of groups", "train-weighted", "what"),
                               [(n, m["worst_group"], m["avg_group_mean"], m["avg_train_weighted"], ORDER[n]) for n, m in methods.items()])),
        ("Accuracy per group, with 95 % intervals", by_group),
        ("Additivity", "<p>Shares of the variance of composites in the fit z(f, b) = mu + a + c + e, flat and after the log map at the intrinsic mean.</p>"
         + html_table(("geometry", *keys), [(k, *[a[k][q] for q in keys]) for k in a])
         + f"<p>cos(z(f, b), z(f on grey) + z(b alone)), means removed: {a['flat']['cos_sum_centred']:.3f}; shuffled {a['flat']['cos_sum_centred_shuffled']:.3f}.</p>"),
        ("Invariance", f"<p>{place_probe(v)}cosine of map outputs within a foreground {v['cos_within']:.3f}, between foregrounds {v['cos_between']:.3f}.</p>"),
        ("Worst errors of bap on test", errors or "<p>none</p>"),
        ("Flags", "<pre>" + escape("\n".join(f"--{k}={v}" for k, v in results["config"].items())) + f"\ngit {results['git']}</pre>")])


if __name__ == "__main__":
    run(main)
