"""Background-invariant anchor pre-training (BAP), and what it does for a probe trained on spurious data.

    python train.py                                             drawn scenes, EfficientNet-Lite0, no files needed
    python train.py --data=waterbirds:DIR --foregrounds=DIR --backgrounds=DIR --model=ViT-L-14 --pretrained=openai

1. Put foregrounds (cut-outs) on backgrounds, embed the composites with a frozen encoder.
2. Report how additive the embeddings are: z(f, b) = mu + a_f + c_b + e.
3. Pre-train a map g that sends every composite of a foreground to its anchor mu + a_f, whatever the background;
   with --train=last_blocks|image first the encoder itself, in the same sense.
4. Train a probe on the biased data through g, and compare it with what else could be done, on the test split.

BAP is arXiv 2605.11107; its equations are not public, those here and in model.py are our reading.

    python train.py --method=finetune --model=ViT-B-32 --pretrained=openai --data=...           contrastive fine-tuning, then discover.py,
    python train.py --method=ravl --discovery=out/discovery.json --model=... --data=...         then the same with what was found held down

The second half of this file: RaVL's region-aware loss and the mitigations that it is compared with. torchrun spreads it.
"""
import contextlib
import copy
import csv
import functools
import io
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (Complaint, Composite, bars, check, composites, draw_view, expect, flags, html_table, imagenet_names, layers, load_data, load_discovery, load_regions, page,
                  picture_size, place_grounds, recompose, revision, rng, run, say, table, thumb, until_asked, write, write_json)
from kernels import pairwise_loss, region_pool
from model import (Cutter, Encoder, Map, additive_solve, additivity, assign_regions, cores, cos_sum, dfr, embed, embeddings, features, fit_probe, fuse, group_metrics, leace,
                   load_checkpoint, load_encoder, moments, nullspace, paired_bootstrap, prompt_embeddings, region_embeddings, renumber, save_checkpoint, sphere_log, unit,
                   wiener, wiener_of, with_map, worst_group)

# --- I/O ------------------------------------------------------------------------------------------------------------
out_dir = "out"          # results.json, report.html, ckpt.pt; what was trained of the model: weights.safetensors, log.csv
cache_dir = "cache"      # embeddings, reused by every run; --cache_dir= for none
resume = False           # go on where an interrupted run of the same flags stopped
skip_bad = False         # leave out images that cannot be read, counted and named, instead of stopping
# --- the biased data to train the probe on ---------------------------------------------------------------------------
data = "scenes"          # scenes, or NAME:DIR with NAME waterbirds, celeba, counteranimal, nico, cocogender, in9, imagenet, folder, csv, coco; digits, cutouts;
                         # --data=NAME:help says what to download and how it must look
masks = ""               # folder of foreground masks of the training images (copy_paste, balanced_train)
place_backgrounds = ""   # folders of backgrounds, one per place, comma-separated (balanced_train)
confounder = 1.0         # scenes and pairs: share of the training images on their class's own place
difficulty = 0.65        # scenes: how much the background outshouts the foreground, 0 to 1
# --- the composites to pre-train on ----------------------------------------------------------------------------------
foregrounds = "drawn"    # folder of RGBA cut-outs
backgrounds = "drawn"    # folder of photos, or discovery:PATH: the regions that discover.py found, of the target itself
instances = 640          # foregrounds in a pose of their own: each cut-out is used several times
per_instance = 8         # backgrounds behind each
# --- encoder ---------------------------------------------------------------------------------------------------------
model = "lite0"          # lite0, timm:NAME, any open_clip name such as ViT-L-14, or the small CLIPs lite0-clip, tiny, tiny-conv
pretrained = ""          # open_clip tag or local file
quick_gelu = "auto"      # auto follows the record of the weights; on, off
device = "auto"          # auto, cpu, cuda
dtype = "auto"           # of the forward pass: auto, float32, bfloat16
batch_size = 8           # small batches are faster on a CPU; raise it on a GPU
threads = 0              # that decode images and, on a CPU, embed them; 0 for one per core
# --- method ----------------------------------------------------------------------------------------------------------
method = "bap"           # bap; or finetune, ravl, upsampled, vl_erm, vl_gdro, spurious_aware, jtt, subg: see METHODS
own = 0.5                # bap: weight of the target's own training foregrounds, cut out by what composites taught; 0 for none
own_per = 5              # backgrounds behind each of them
own_most = 1000          # at most so many of them
power = 0.0              # bap works on sign(z) |z|^power; 0 means 0.5 after a ReLU, else 1
lam = 1.0                # Wiener filter: ridge in units of the mean variance
bap_map = "closed"       # closed (Wiener filter), linear or mlp, the last two trained by contrast against the anchors
steps = 300              # of that training, and of fine-tuning
learning_rate = 3e-4
scale = 20.0             # inverse temperature of the contrast
train = "auto"           # bap: map, on the frozen encoder (auto), or the encoder itself: image, last_blocks (the last quarter of its image tower).
                         # Fine-tuning: all (auto), image, text, projection (the last layer of each tower, and the temperature)
text_weight = 0.1        # bap, encoder: weight of the term that keeps what texts, or an ImageNet classifier's rows, say of an image
# --- fine-tuning (every method but bap; pairs, accumulate and all from warmup on also bap with --train=last_blocks|image) --
pairs = 128              # image-caption pairs in a step, of all processes together
accumulate = 1           # parts that a step is computed in, to the same gradient: less memory, a second forward pass
loss = "auto"            # infonce, sigmoid (SigLIP); auto: by the model
captions = "own"         # own: the data set's; class: the prompt of the image's class, as zero-shot uses it; place: and its place
discovery = ""           # discovery.json of discover.py, or its folder; every method but finetune, vl_erm and jtt needs it
clusters = 0             # how many of its kept clusters count, the best first; 0: those worth at least half of the best (clusters_used)
region_weight = 0.2      # ravl: w in (1 - w) L_CL + w (L_R + L_A)
region_temperature = 0.07  # ravl: of its cosines
repeated = "once"        # ravl: a label that several images of the batch have counts once in L_R's sum, or each time
jtt_weight = 20.0        # jtt: of the images that a first quarter of the steps leaves wrong
warmup = 0.1             # share of the steps; then a cosine to zero
weight_decay = 0.1
clip = 1.0               # norm of the gradient
compile = False          # torch.compile
save_every = 100         # steps between checkpoints for --resume
log_every = 20           # steps between lines
log_to = ""              # also tensorboard or wandb, if installed
keep_gib = 4.0           # of decoded images in memory
# --- probe -----------------------------------------------------------------------------------------------------------
tuned = True             # also rows tuned on the validation split's groups, under their own names
l2 = 0.8                 # penalty of every probe in the table, in units of the mean loss (scikit-learn's C = 1 / (l2 n))
# --- system ----------------------------------------------------------------------------------------------------------
seed = 0
seeds = 1                # bap: runs with seed, seed + 1, ...; reported are means and spread
# --- end -------------------------------------------------------------------------------------------------------------

ORDER = {  # of the table's rows
    "erm": "probe on the raw embedding", "group_weighted": "the same, groups weighted by the inverse of their size",
    "nullspace": "32 leading background directions projected out", "leace": "LEACE on the same 32 background coordinates",
    "copy_paste": "training foregrounds also on random backgrounds (needs masks)", "bap_closed": "Wiener filter on the raw embedding",
    "bap_synthetic": "bap without the target's own foregrounds", "bap_map": "the recommended map on the encoder as it was",
    "bap_both": "the map on the pre-trained encoder", "bap": "BAP: the recommended map, or the pre-trained encoder",
    "erm_tuned": "penalty tuned on the validation groups", "bap_tuned": "map and penalty tuned on the validation groups",
    "dfr": "last-layer retraining on validation groups", "val_probe": "probe on the balanced validation set", "val_probe_bap": "the same through the map",
    "balanced_train": "training foregrounds on every place: the true ceiling"}


def main():
    config = flags(globals())
    expect(method == "bap" or method in METHODS, "method", method, "bap, " + ", ".join(METHODS))
    for flag, least in (("batch_size", 1), ("threads", 0), ("seeds", 1), ("seed", 0), ("steps", 1), ("pairs", 2), ("accumulate", 1), ("save_every", 1), ("log_every", 1)):
        expect(config[flag] >= least, flag, config[flag], f"a whole number from {least}")
    for flag in ("learning_rate", "clip"):
        expect(0 < config[flag] < math.inf, flag, config[flag], "a positive number")
    for flag in ("difficulty", "warmup"):
        expect(0 <= config[flag] <= 1, flag, config[flag], "a number from 0 to 1")
    expect(0 <= weight_decay < math.inf, "weight_decay", weight_decay, "a number from 0")
    expect(log_to in ("", "tensorboard", "wandb"), "log_to", log_to, "tensorboard or wandb")
    if method != "bap":
        return finetune(config)
    expect(train in ("auto", "map", "last_blocks", "image"), "train", train, "map, last_blocks or image with --method=bap")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise Complaint("--method=bap: runs in one process; start it without torchrun")
    expect(bap_map in ("closed", "linear", "mlp"), "bap_map", bap_map, "closed, linear or mlp")
    for flag, least in (("instances", 8), ("per_instance", 2), ("own_per", 2), ("own_most", 8)):
        expect(config[flag] >= least, flag, config[flag], f"a whole number from {least}")
    for flag in ("l2", "lam", "scale"):
        expect(0 < config[flag] < math.inf, flag, config[flag], "a positive number")
    expect(0 <= text_weight < math.inf, "text_weight", text_weight, "a number from 0")
    expect(pairs % accumulate == 0, "pairs", pairs, f"a multiple of {accumulate} parts")
    expect(0 <= own <= 1, "own", own, "a number from 0 to 1")
    expect(0 <= power <= 1, "power", power, "a number from 0 to 1")
    out, started = Path(out_dir), time.time()
    load_data(data, masks, confounder, seed, difficulty)  # complains before any work is done

    encoder = load_encoder(model, pretrained, quick_gelu, device)
    partial, *_ = [unfinished(out / name, config, encoder) for name in ("partial.pt", "training.pt", "map.pt")]  # complains now, not in an hour
    runs, material = partial["runs"][:seeds - 1] if partial else [], None
    for s in range(seed + len(runs), seed + seeds):
        if material is None or "drawn" in (foregrounds, backgrounds):  # each seed draws its own
            material = layers(foregrounds, backgrounds, skip_bad, s, difficulty)
        result, last = one_run(encoder, *material[:2], s, out, config)
        runs.append(result)
        save_checkpoint(out / "partial.pt", dict(config=config, fingerprint=encoder.fingerprint, runs=runs))

    results = dict(config=config, git=revision(), notes=encoder.notes + material[2] + last["samples"].notes,
                   seconds=dict(total=time.time() - started, **runs[-1]["seconds"]), **average(runs))
    for name in ORDER:
        having = sum(name in r["methods"] for r in runs)
        if 0 < having < seeds:
            results["notes"].append(f"{name}: only {having} of {seeds} seeds have it, left out")
    for line in results["notes"]:
        say(line)
    say(summary(results, last["samples"]))
    if train not in ("auto", "map"):
        save_weights(out, last["encoder"], config)
        last["probes"] = {k: last["probes"][v] for k, v in dict(erm="bap", bap="bap", val_probe_bap="val_probe_bap").items()}  # those of its embeddings
    save_checkpoint(out / "ckpt.pt", dict(config=config, git=results["git"], fingerprint=last["encoder"].fingerprint, map=last["map"].state_dict(),
                                          power=last["map"].power, probes={k: p.state() for k, p in last["probes"].items()},
                                          classes=last["samples"].classes, places=last["samples"].places))
    write(out / "report.html", report(results, last))
    write_json(out / "results.json", results)  # last: it is there only if all the rest is
    for name in ("partial.pt", "training.pt", "map.pt"):
        (out / name).unlink(missing_ok=True)
    others_here(out, ["finetune.json", *(["weights.safetensors", "log.csv"] if train in ("auto", "map") else [])])
    say(f"\n{out}/results.json, report.html and ckpt.pt{'' if train in ('auto', 'map') else ', weights.safetensors'} written, {time.time() - started:.0f} s")


def others_here(out, names):
    """Says which of these files, which this run has not written, lie in its folder."""
    there = [name for name in names if (out / name).exists()]
    if there:
        say(f"{out}: {', '.join(there)}: of another run, not of this one")


def unfinished(path, config, encoder):
    """What an interrupted run of the same flags has left, with --resume; else None."""
    if not resume:
        path.unlink(missing_ok=True)  # of another run: it would be in the way of this one's --resume
    state = load_checkpoint(path, encoder) if resume and path.is_file() else None
    if state is None:
        return None
    differ = [k for k in config if k not in ("resume", "threads", "seeds", "save_every", "log_every", "log_to", "keep_gib") and state["config"].get(k) != config[k]]
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

    def embedded(pictures, label, encoder=encoder):
        z, bad = embed(encoder, pictures, cache_dir, batch_size, threads, dtype, skip_bad, label)
        for _, line in bad[:20]:
            say(f"skipped {line}")
        if bad:
            say(f"{label}: {len(bad)} of {len(pictures)} skipped")
        return z, z.isfinite().all(1)

    # 1. the composites: an incomplete grid of foreground instances i and backgrounds j
    cells, i, j = composites(figures, grounds, instances, per_instance, s)
    z, sound = embedded(cells, "composites")
    z, i, j = z[sound], i[sound], j[sound]
    lap("composites")

    # 2. how additive are they?
    additive = additivity(unit(z), i, j, seed=s)
    some = torch.randperm(len(z), generator=torch.Generator().manual_seed(s))[:200]
    shown = [cells[k] for k in sound.nonzero()[:, 0][some].tolist()]
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
    biased, val, test = (samples.split == k for k in range(3))
    lap("target")
    grids, exponent = [(1., z, i)], power or (1. if encoder.signed else .5)
    own_cells, own_j = [], torch.empty(0, dtype=torch.long)
    cuts = cut_own(encoder, [samples.items[k] for k in biased.nonzero()[:, 0]], cells, s) if own else []
    if cuts:
        picks = [(c, int(g.integers(len(grounds))), draw_view(g)) for n, c in enumerate(cuts) for g in (rng(s, "own", n, k) for k in range(own_per))]
        own_cells = [Composite(c, grounds[b], None, view) for c, b, view in picks]
        v, good = embedded(own_cells, "own foregrounds")
        own_cells, own_j = [own_cells[k] for k in good.nonzero()[:, 0]], torch.tensor([b for _, b, _ in picks])[good]
        grids = [(1 - own, z, i), (own, v[good], (torch.arange(len(picks)) // own_per)[good])]
    lap("own")

    # 4. the maps, and with --train=last_blocks|image first the encoder
    maps = dict(nullspace=nullspace(z, i, j), leace=leace(z, i, j), bap_closed=wiener([(1., z, i)], lam), bap=wiener(grids, lam, exponent))
    trained, x_bap, zero = encoder, x, None
    if train not in ("auto", "map"):
        kept = [cells[k] for k in sound.nonzero()[:, 0]]
        trained = pretrain(encoder, kept + own_cells, grids, torch.cat([j, own_j]), samples, s, out, config)
        new = embedded(kept + own_cells, "composites, trained", trained)[0].split([len(z), len(own_cells)])
        x_bap = embedded(samples.items, "target, trained", trained)[0]
        grids = [(weight, v, k) for v, (weight, _, k) in zip(new, grids)]
        D = x_bap.shape[1]
        maps.update(bap_map=maps["bap"], bap_both=wiener(grids, lam, exponent), bap=Map(torch.zeros(D), torch.eye(D)))  # no map any more
        zero = encoder.reads and dict(before=zero_shot(encoder, samples, x), after=zero_shot(trained, samples, x_bap)) or None
    if bap_map != "closed":
        last = "bap_both" if "bap_both" in maps else "bap"
        with until_asked() as asked:
            maps[last] = contrast(maps[last], grids[0][1], i, j, s, lambda: unfinished(out / "map.pt", config, encoder),
                                  lambda **state: save_checkpoint(out / "map.pt", dict(config=config, fingerprint=encoder.fingerprint, **state)), asked)
    if cuts:
        maps["bap_synthetic"] = wiener([(1., z, i)], lam, exponent)
    lap("pretraining")

    # 5. probes, all with the same penalty, trained on the biased data, read on the test split
    y, place, group = samples.y, samples.place, samples.group()
    C = len(samples.classes)
    probes, correct = {}, {}

    def probe(name, g, mask=biased, extra=None, weight=None):
        z = x_bap if name in ("bap", "bap_both", "val_probe_bap") else x
        inputs, labels = g(z[mask]), y[mask]
        if extra:
            inputs, labels = torch.cat([inputs, g(extra[0])]), torch.cat([labels, extra[1]])
        probes[name] = fit_probe(inputs, labels, l2, weight, C)
        correct[name] = probes[name].predict(g(z)) == y

    probe("erm", unit)
    for name, g in maps.items():
        probe(name, g)
    probe("val_probe", unit, val)
    probe("val_probe_bap", maps["bap"], val)
    counts = samples.counts(0)
    if counts.all():
        probe("group_weighted", unit, weight=1 / counts[group[biased]].double())
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
        for name, v, tries in (("erm_tuned", x, [unit]), ("bap_tuned", x_bap, [wiener_of(both, k, exponent) for k in (.3, 1., 3.)])):
            tries = [fit_probe(g(v[biased]), y[biased], k, classes=C).predict(g(v)) == y for g in tries for k in (.02, .2, 2.)]
            correct[name] = max(tries, key=lambda c: worst_group(c[val], group[val]))
    lap("probes")

    methods = {name: group_metrics(correct[name][test], y[test], place[test], counts, len(samples.places)) for name in ORDER if name in correct}
    for name in methods:
        low, high = paired_bootstrap(correct[name][test], correct["erm"][test], group[test], seed=s)
        methods[name]["over_erm"] = [low, high]
    result = dict(additivity=additive, invariance=invariance(maps["bap"], grids[0][1], i, x, x_bap, samples, s), methods=methods, seconds=seconds, zero_shot=zero)
    return result, dict(map=maps["bap"], probes=probes, samples=samples, correct=correct, x=x_bap, cells=cells, cuts=cuts, encoder=trained)


def cut_own(encoder, pictures, cells, s):
    """The foregrounds of the target's training pictures, list of data.Cut; none where the cutter cannot be trusted.

    It is not if it misses the foregrounds of held-out composites (IoU below 0.6), nor if it finds one of plausible size, 2 to
    50 % of the picture, in less than two thirds of the target's: then what it learned from composites does not carry over.
    """
    some = torch.randperm(len(cells), generator=torch.Generator().manual_seed(s))[:640].tolist()
    cutter = Cutter(encoder, [cells[k] for k in some], threads, seed=s, dtype=dtype)
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(s))[:own_most].sort().values.tolist()
    pictures = [pictures[k] for k in chosen]
    alpha, _ = embed(encoder, pictures, cache_dir, batch_size, threads, dtype, False, "cut out", cutter.masks, cutter.name)
    plausible = (alpha.mean(1) > .02) & (alpha.mean(1) < .5)
    share = float(plausible.double().mean())
    trusted = cutter.iou >= .6 and share >= 2 / 3
    say(f"cutter: IoU {cutter.iou:.2f} on held-out composites, a plausible foreground in {share:.0%} of the training images"
        + ("" if trusted else ": not trusted, the target's own foregrounds are not used"))
    return [cutter.cut(p, a) for p, a, good in zip(pictures, alpha, plausible.tolist()) if good] if trusted else []


def pretrain(encoder, cells, grids, j, samples, s, out, config):
    """BAP on the encoder itself (--train=last_blocks|image): a copy of it is trained so that each composite lands on the anchor of its
    foreground (squared distance, in shares of the anchors' variance). What texts (or the rows of its classifier) say of an image is kept:
    it becomes what they say of the anchor (KL). Anchors, mu + a_f, are those of the encoder as it was: fixed, so nothing can collapse.
    Contrast among the anchors was worse (LOG.md). Our reading. Returns the trained Encoder.

    cells: the composites [N]; grids: as wiener takes them, j: background of each.
    """
    z = torch.cat([v for _, v, _ in grids])
    i = renumber(torch.cat([k + n * instances for n, (_, _, k) in enumerate(grids)]))
    mu, a, _ = additive_solve(z, i, renumber(j))
    weight = torch.cat([torch.full((len(v),), w / len(v)) for w, v, _ in grids])
    task = dict(items=cells, y=i, C=len(a), mu=mu.float().to(encoder.device), anchors=a.float().to(encoder.device), weight=weight, read=readout(encoder, samples), seed=s)
    state = unfinished(out / "training.pt", config, encoder)
    student = Encoder(encoder.name, copy.deepcopy(encoder.module), encoder.transform, encoder.kind, encoder.device, None, encoder.tokenizer)
    with until_asked() as asked:
        fit(student, task, steps, "bap", say, state if state and state["seed"] == s else None, lambda **more: save_checkpoint(
            out / "training.pt", dict(config=config, git=revision(), fingerprint=encoder.fingerprint, seed=s, **more)), out, asked)
    return Encoder(encoder.name, student.module, encoder.transform, encoder.kind, encoder.device, fuse(student.module) if encoder.kind == "timm" else None,
                   encoder.tokenizer, encoder.notes)


def readout(encoder, samples):
    """Embeddings [N, D] -> logits [N, V]: of texts, the target's classes and ImageNet's, or of the rows of an ImageNet classifier; None without."""
    if encoder.reads:
        t = prompt_embeddings(encoder, samples.class_prompts() + [[f"a photo of a {name}."] for name in imagenet_names(2)], cache_dir).to(encoder.device)
        return lambda z: encoder.logit_scale * unit(z) @ t.T
    if encoder.names:
        w, b = (v.to(encoder.device) for v in encoder.classifier())
        return lambda z: z @ w.T + b


def contrast(g, z, i, j, s, load, save, asked):
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
        g = Map(g.mu, g.W.data, g.power, hidden=512)
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
        if step and (step % 100 == 0 or asked):
            save(seed=s, step=step, map=g.state_dict(), optimiser=optimiser.state_dict(), generator=generator.get_state())
        if asked:
            raise KeyboardInterrupt
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


def invariance(g, z, i, x, x_bap, samples, s):
    """Is the map's output invariant? Accuracy on test of a probe for the place, trained on val, on the raw embedding and on
    the map (of the trained encoder's x_bap, where one is trained); mean cosine of map outputs of one foreground on two backgrounds, and of two foregrounds."""
    val, test = samples.split == 1, samples.split == 2
    one = len(torch.unique(samples.place[val])) < 2  # no place to predict
    accuracy = lambda v: None if one else float((fit_probe(v[val], samples.place[val], l2).predict(v[test]) == samples.place[test]).double().mean())
    y, generator = unit(g(z)), torch.Generator().manual_seed(s)
    pick = torch.randperm(len(y), generator=generator)[:2000]
    cosine, same = y[pick] @ y[pick].T, i[pick][:, None] == i[pick]
    same_not_self = same & ~torch.eye(len(pick), dtype=torch.bool)
    return dict(place_probe_raw=accuracy(unit(x)), place_probe_map=accuracy(g(x_bap)),
                cos_within=float(cosine[same_not_self].mean()), cos_between=float(cosine[~same].mean()))


def average(runs):
    """Results of all seeds -> their means, spread and, for each method that all have, the seeds' own. What one lacks is None."""
    def mean(values):
        if None in values:
            return None
        if isinstance(values[0], dict):
            return {k: mean([v[k] for v in values]) for k in values[0]}
        if isinstance(values[0], list):
            return [mean(list(v)) for v in zip(*values)]
        return sum(values) / len(values) if isinstance(values[0], float) else values[0]

    methods = {}
    for name in [name for name in ORDER if all(name in r["methods"] for r in runs)]:
        each = [r["methods"][name] for r in runs]
        methods[name] = dict(mean(each), seeds=each)
        worst = torch.tensor([m["worst_group"] for m in each])
        methods[name]["spread"] = float(worst.std()) if len(each) > 1 else 0.
    return dict(methods=methods, **{name: mean([r[name] for r in runs]) for name in ("additivity", "invariance", "zero_shot")})


def summary(results, samples):
    """The tables on the console."""
    a, v = results["additivity"], results["invariance"]
    keys = ("r2", "r2_heldout", "foreground", "background", "residual", "cross")
    sums = a["flat"]
    first = results["methods"]["erm"]
    names = [f"{samples.classes[g['y']]} on {samples.places[g['place']]} (n={g['n']})" for g in first["groups"]]
    rows = [(name, m["worst_group"], m["avg_group_mean"], m["avg_train_weighted"], *[g["accuracy"] for g in m["groups"]],
             f"{m['over_erm'][0]:+.3f} to {m['over_erm'][1]:+.3f}") for name, m in results["methods"].items()]
    spread = f"; means of {seeds} seeds, spread of bap's worst group {results['methods']['bap']['spread']:.3f}" if seeds > 1 else ""
    zero = results["zero_shot"]
    return "\n".join((
        *(["\n" + table(*zero_rows(zero))] if zero else []),
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
                f"{bap['worst_group']:.3f} with BAP. It used no place labels.", [
        ("Composites to pre-train on", shown + "".join(thumb(Composite(c, None, None).image(), "cut out of the target")
                                                       for c in last["cuts"][:6])),
        ("The biased data", "<p>" + escape("; ".join(samples.notes)) + "</p>" + biased),
        ("Methods", html_table(("method", "worst group", "mean of groups", "train-weighted", "what"),
                               [(n, m["worst_group"], m["avg_group_mean"], m["avg_train_weighted"], ORDER[n]) for n, m in methods.items()])),
        ("Accuracy per group, with 95 % intervals", by_group),
        ("Additivity", "<p>Shares of the variance of composites in the fit z(f, b) = mu + a + c + e, flat and after the log map at the intrinsic mean.</p>"
         + html_table(("geometry", *keys), [(k, *[a[k][q] for q in keys]) for k in a])
         + f"<p>cos(z(f, b), z(f on grey) + z(b alone)), means removed: {a['flat']['cos_sum_centred']:.3f}; shuffled {a['flat']['cos_sum_centred_shuffled']:.3f}.</p>"),
        *([("Zero-shot", html_table(*zero_rows(results["zero_shot"])))] if results["zero_shot"] else []),
        ("Invariance", f"<p>{place_probe(v)}cosine of map outputs within a foreground {v['cos_within']:.3f}, between foregrounds {v['cos_between']:.3f}.</p>"),
        ("Worst errors of bap on test", errors or "<p>none</p>"),
        ("Flags", "<pre>" + escape("\n".join(f"--{k}={v}" for k, v in results["config"].items())) + f"\ngit {results['git']}</pre>")])


# ---------------------------------------------------------------------------------------------------------------------
# fine-tuning on image-caption pairs, and its mitigations

METHODS = {
    "finetune": "contrastive loss on the pairs as they are",
    "ravl": "RaVL: the contrastive loss, and regions without the discovered feature drawn to the label, regions with it held off (PROTOCOLS 4)",
    "upsampled": "images with and without the discovered feature drawn equally often for each label",
    "vl_erm": "cross-entropy of the similarities with the classes' texts",
    "vl_gdro": "the same under group DRO, groups = label x discovered feature, drawn equally often",
    "spurious_aware": "contrastive loss among the pairs of a batch that agree on the discovered feature, so that it cannot help",
    "jtt": "just train twice: images that a short first run leaves wrong are drawn more often",
    "subg": "each group, label x discovered feature, cut down to the smallest"}


def finetune(config):
    """--method=finetune and the mitigations: fits, and writes weights.safetensors, finetune.json and log.csv."""
    for flag, known in (("train", ("auto", "all", "image", "text", "projection")), ("loss", ("auto", "infonce", "sigmoid")), ("captions", ("own", "class", "place")),
                        ("repeated", ("once", "each"))):
        expect(config[flag] in known, flag, config[flag], " or ".join(filter(None, known)))
    expect(seeds == 1, "seeds", seeds, f"1 with --method={method}: start it once for each --seed, with an --out_dir of its own")
    expect(clusters >= 0, "clusters", clusters, "a whole number from 0")
    for flag in ("region_temperature", "jtt_weight"):
        expect(0 < config[flag] < math.inf, flag, config[flag], "a positive number")
    expect(0 <= region_weight <= 1, "region_weight", region_weight, "a number from 0 to 1")
    rank, world = join()
    expect(pairs % (world * accumulate) == 0, "pairs", pairs, f"a multiple of {world} processes x {accumulate} parts")
    out, started, talk = Path(out_dir), time.time(), say if rank == 0 else lambda line: None
    samples = load_data(data, masks, confounder, seed, difficulty)
    samples = readable(samples, talk) if skip_bad else samples
    task = pairs_of(samples)
    encoder = load_encoder(model, pretrained, quick_gelu, device)
    if loss == "sigmoid" and getattr(encoder.module, "logit_bias", None) is None:
        encoder.module.logit_bias = torch.nn.Parameter(torch.tensor(-10., device=encoder.device))
    task["prompts"] = [texts[0] for texts in samples.class_prompts()]
    encoder.texts(task["prompts"])  # complains if there is no text tower
    notes = encoder.notes + samples.notes
    if discovery or method in ("ravl", "upsampled", "vl_gdro", "spurious_aware", "subg"):
        notes += discovered(samples, encoder, task)
    for line in notes:
        talk(line)
    before = zero_shot(encoder, samples) if rank == 0 else None
    state = unfinished(out / "training.pt", config, encoder)
    base = encoder.fingerprint
    if method == "jtt":
        task["weight"] = state["weight"] if state else first_errors(encoder, task, samples, talk)
    with until_asked() if world == 1 else contextlib.nullcontext(()) as asked:  # one process of several must not stop alone
        rows = fit(encoder, task, steps, method, talk, state, lambda **more: rank or save_checkpoint(out / "training.pt", dict(
            config=config, git=revision(), fingerprint=base, weight=task.get("weight"), **more)), out, asked)
    if rank:
        return
    after = zero_shot(encoder, samples)
    say(table(*zero_rows(dict(before=before, after=after))))
    save_weights(out, encoder, config)
    seconds = dict(total=time.time() - started, images_per_s=rows[-1]["images_per_s"] if rows else None)
    write_json(out / "finetune.json", dict(config=config, git=revision(), notes=notes, before=before, after=after, seconds=seconds))
    (out / "training.pt").unlink(missing_ok=True)
    others_here(out, ["results.json", "report.html", "ckpt.pt"])
    say(f"\n{out}/weights.safetensors, finetune.json and log.csv written, {time.time() - started:.0f} s")


def zero_rows(both):
    """Header and rows of the table of zero-shot accuracies before and after."""
    columns = "worst_group", "avg_group_mean", "overall"
    return ("zero-shot, test split", *columns), [(name, *[m[c] for c in columns]) for name, m in both.items()]


def save_weights(out, encoder, config):
    """weights.safetensors, for --pretrained; with its activation and preprocessing, which no name says once a tag's weights are a local file."""
    from safetensors.torch import save
    state = {k: v.detach().cpu().contiguous() for k, v in encoder.module.state_dict().items()}
    record = dict(bias=getattr(encoder.module, "logit_bias", None) is not None,
                  quick_gelu=any(type(m).__name__ == "QuickGELU" for m in encoder.module.modules()),
                  preprocess=getattr(getattr(encoder.module, "visual", None), "preprocess_cfg", {}))
    write(out / "weights.safetensors", save(state, dict(config=json.dumps(config), git=str(revision()), record=json.dumps(record))))


def join():
    """(rank, processes) under torchrun, (0, 1) without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() and device != "cpu" else "gloo")
        torch.set_num_threads(max(1, cores() // world))
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def readable(samples, talk):
    """--skip_bad: the samples whose images can be read, each looked at once; the others are counted and named."""
    def problem(item):
        try:
            item.image()
        except Complaint as said:
            return str(said)

    with ThreadPoolExecutor(threads or cores()) as pool:
        bad = list(pool.map(problem, samples.items))
    for line in [line for line in bad if line][:20]:
        talk(f"skipped {line}")
    good = [k for k, line in enumerate(bad) if not line]
    if len(good) == len(bad):
        return samples
    talk(f"{len(bad) - len(good)} of {len(bad)} images skipped")
    return check(samples.keep(torch.tensor(good, dtype=torch.long)))


def pairs_of(samples):
    """The training pairs: items, captions, y [n]; Complaint where captions are missing or all of one class."""
    index = (samples.split == 0).nonzero()[:, 0]
    mine, y = samples.keep(index), samples.y[index]
    if len(set(y.tolist())) < 2:
        raise Complaint(f"{samples.name}: all {len(y)} training images are of one class; contrast needs two")
    texts = mine.captions if captions == "own" else [samples.class_prompts()[k][0] for k in y.tolist()]
    if captions == "place":
        texts = [f"{text.rstrip('.')}, {samples.places[k]}" for text, k in zip(texts, mine.place.tolist())]
    missing = [k for k, text in enumerate(texts or [""] * len(y)) if not (text or "").strip()]
    if missing:
        raise Complaint(f"{samples.name}: {len(missing)} of {len(y)} training images have no caption (the first is number {missing[0]}); "
                        "add them, or use --captions=class")
    if len(y) < pairs:
        raise Complaint(f"--pairs: found {pairs}, but there are {len(y)} training images; use fewer")
    return dict(items=mine.items, captions=texts, y=y, C=len(samples.classes))


def discovered(samples, encoder, task):
    """Adds to the task what was discovered: boxes [n, R, 4] of each image's regions in shares of what the model sees; state [n, R],
    1 in a discovered cluster, 0 not, -1 no region; feature [n], whether any is. Regions are assigned once, by the fixed medoids and
    encoder of stage 1. Returns notes; raises Complaint for a discovery of other data, another model, or without anything to use."""
    if not discovery:
        raise Complaint(f"--method={method}: needs --discovery=PATH, what discover.py wrote; run it on the fine-tuned model first")
    found = load_discovery(discovery)
    path = Path(discovery) / "discovery.json" if Path(discovery).is_dir() else Path(discovery)
    made = json.loads(path.read_text())["config"]
    if made.get("embeddings"):
        raise Complaint(f"{path}: made from --embeddings, which says nothing of images; run discover.py with --data and --model")
    if found["data"] != samples.name:
        raise Complaint(f"{path}: made on {found['data']}, not on {samples.name}; run discover.py with this --data and --seed")
    if not found["kept"]:
        raise Complaint(f"{path}: no cluster was kept, nothing was found to hold down; try discover.py with other --regions or --k")
    if any(c["kept"] and c.get("score", 0) is None for c in found["clusters"]):
        raise Complaint(f"{path}: made with --method={made['method']}, which ranks regions and keeps no cluster; run discover.py with --method=ravl or all")
    first = load_encoder(made["model"], made["pretrained"], made["quick_gelu"], device)
    if first.fingerprint != found["fingerprint"]:
        raise Complaint(f"{path}: made with --model={made['model']} --pretrained={made['pretrained']!r}, whose weights are others now; "
                        "bring them back, or run discover.py again")
    pictures, notes = load_regions(found["regions"], task["items"], first.frame)
    if any(p.mask for p in pictures):
        raise Complaint(f"{path}: its regions are masks; the region-aware loss takes boxes or a grid")
    _, r, _ = region_embeddings(first, pictures, found["region_encoder"], cache=cache_dir, batch=batch_size, threads=threads, dtype=dtype, label="regions")
    used = torch.tensor(clusters_used(found, clusters))
    inside = torch.isin(assign_regions(r, found), used).long().split([len(p.boxes) for p in pictures])
    own = [replace(p, frame=encoder.frame(*picture_size(p.picture))).seen() for p in pictures]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    task["boxes"], task["state"] = pad(own), pad(list(inside), padding_value=-1)
    task["feature"] = (task["state"] == 1).any(1)
    n, having, without = len(pictures), int(task["feature"].sum()), int((~(task["state"] == 0).any(1)).sum())
    if not having or method == "ravl" and without == n:
        raise Complaint(f"{path}: {having} of {n} training images have a region in its {len(used)} clusters, {without} have no other; nothing to learn from")
    return notes + [f"{having} of {n} training images have a region in the {len(used)} clusters discovered"] + [
        f"{without} of {n} training images have no region without the discovered feature; L_R and L_A skip them"] * (without > 0)


def clusters_used(found, most=0):
    """Which kept clusters of a discovery count as the discovered feature, the best first: the first `most`, or, if 0, those that come to
    at least half of the best one's score x evenness. Evenness, our reading, not in the paper: 1 - (largest - smallest share of a class's images
    that have a region in the cluster), over the classes present on both sides. A feature that only misleads is as frequent in one class as in
    another wherever it is not tied to the label, as in the balanced splits that discover.py looks at; the class's own object is not."""
    share = lambda c: [g["n_in"] / (g["n_in"] + g["n_out"]) for g in (c.get("gaps") or {}).values()] or [0.]
    worth = {c["id"]: (c.get("score") or 0.) * (1 - max(share(c)) + min(share(c))) for c in found["clusters"] if c["kept"]}
    ranked = sorted(found["kept"], key=lambda c: -worth[c])
    return ranked[:most] if most else [c for c in ranked if worth[c] >= .5 * worth[ranked[0]]]


def zero_shot(encoder, samples, x=None):
    """Accuracies of the test split by the classes' texts: group_metrics, and overall. x: embeddings of all images, if they are there."""
    test = samples.split == 2
    z = embed(encoder, samples.keep(test.nonzero()[:, 0]).items, "", batch_size, threads, dtype, False, "test images")[0] if x is None else x[test]
    g = prompt_embeddings(encoder, samples.class_prompts(), "")
    correct = (unit(z) @ g.T).argmax(1) == samples.y[test]
    m = group_metrics(correct, samples.y[test], samples.place[test], samples.counts(0), len(samples.places))
    return dict(m, overall=float(correct.double().mean()))


def first_errors(encoder, task, samples, talk):
    """JTT's first stage: a quarter of the steps of plain fine-tuning, from the same weights; jtt_weight for the training images that
    are then wrong, 1 for the rest [n]. The encoder is put back."""
    start = {k: v.clone() for k, v in encoder.module.state_dict().items()}
    fit(encoder, task, max(1, steps // 4), "finetune", lambda line: talk(f"jtt, first stage: {line}"))
    z, _ = embed(encoder, task["items"], "", batch_size, threads, dtype, False, "training images")
    wrong = (unit(z) @ prompt_embeddings(encoder, samples.class_prompts(), "").T).argmax(1) != task["y"]
    talk(f"jtt: {int(wrong.sum())} of {len(wrong)} training images are wrong after {max(1, steps // 4)} steps, each counts {jtt_weight:g} times")
    encoder.module.load_state_dict(start)
    return torch.where(wrong, jtt_weight, 1.)


class Towers(torch.nn.Module):
    """Both towers in one forward pass, for DDP and torch.compile."""

    def __init__(self, module, kind, raw=False):
        super().__init__()
        self.module, self.kind, self.raw = module, kind, raw

    def forward(self, x, boxes, texts, prompts):
        """Images [N, 3, H, W], boxes [N, R, 4] in shares of the image, tokens [M, L], [C, L]; each but x may be None -> dict of
        unit-norm z [N, D], r [N, R, D] (regions, from the same pass), t [M, D], g [C, D], and scale, bias of the logits; if
        raw only z, not normalised."""
        if self.raw:
            return dict(z=embeddings(self.module, self.kind, x).float())
        out = {}
        if boxes is None:
            out["z"] = self.module.encode_image(x)
        else:
            out["z"], m = with_map(self.module, "open_clip", x)  # [N, D], [N, h, w, D]
            (N, R), (h, w) = boxes.shape[:2], m.shape[1:3]
            cells = boxes.flatten(0, 1) * boxes.new_tensor([w, h, w, h])
            out["r"] = region_pool(m.float(), cells, torch.arange(N, device=x.device).repeat_interleave(R)).unflatten(0, (N, R))
        tokens = {name: some for name, some in (("t", texts), ("g", prompts)) if some is not None}
        if tokens:
            both = self.module.encode_text(torch.cat(list(tokens.values())))  # one pass: the gradient of the vocabulary is dense
            out.update(zip(tokens, both.split([len(some) for some in tokens.values()])))
        out = {k: unit(v.float()) for k, v in out.items()}
        out["scale"] = self.module.logit_scale.exp()
        if getattr(self.module, "logit_bias", None) is not None:
            out["bias"] = self.module.logit_bias * 1.
        return out


def fit(encoder, task, steps, method, talk, state=None, save=None, out=None, asked=()):
    """Trains encoder.module on the task for so many steps. state: of a checkpoint to go on from; save(**state) writes one; asked: see until_asked.

    Image embeddings of all parts and processes are gathered before the loss, so that neither changes it: the loss is had from the
    gathered embeddings, its gradient is sent back through each part. Batch norm keeps its statistics. Returns the log's rows.
    """
    rank, world = join()
    module, regions, amp = encoder.module, method == "ravl", dtype == "bfloat16" or dtype == "auto" and encoder.device.startswith("cuda")
    kind = ("sigmoid" if getattr(module, "logit_bias", None) is not None else "infonce") if loss == "auto" else loss
    pick_parameters(encoder, method, kind)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([dict(params=[p for p in parameters if p.dim() > 1], weight_decay=weight_decay),
                                   dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.)], learning_rate, (.9, .98))
    tower = Towers(module, encoder.kind, method == "bap")
    tower = torch.compile(tower) if compile else tower
    ddp = torch.nn.parallel.DistributedDataParallel(tower) if world > 1 else tower
    contrast_too = method not in ("bap", "vl_erm", "vl_gdro")
    if contrast_too:
        texts = list(dict.fromkeys(task["captions"]))
        row = {text: k for k, text in enumerate(texts)}
        which, tokens = torch.tensor([row[c] for c in task["captions"]]), encoder.tokenizer()(texts).to(encoder.device)
    prompts = encoder.tokenizer()(task["prompts"]).to(encoder.device) if method in ("ravl", "vl_erm", "vl_gdro") else None
    images, draw = Pictures(task["items"], encoder), sampler(task, method)
    part = pairs // (world * accumulate)
    mine = lambda step: draw(step).view(world, accumulate, part)[rank]  # [accumulate, part]
    q, first, rows, warned = torch.full((2 * task["C"],), 1 / (2 * task["C"])), 0, [], method == "bap"
    if state:
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        q, first, rows = state["q"], state["step"], state["rows"]
    keep = lambda step: save and save(step=step, module=module.state_dict(), optimiser=optimiser.state_dict(), q=q, rows=rows)
    sink, clock, count = sink_for(out) if save and rank == 0 else None, time.time(), 0
    images.ahead(mine(first)) if first < steps else None

    def forward(ids, last):
        u, back = torch.unique(which[ids], return_inverse=True) if contrast_too else (None, None)
        with torch.autocast(encoder.device.split(":")[0], torch.bfloat16, enabled=amp):
            o = ddp(images.get(ids), task["boxes"][ids].to(encoder.device) if regions else None, tokens[u] if contrast_too else None, prompts if last else None)
        return {**o, "t": o["t"][back.to(encoder.device)]} if contrast_too else o

    rising = warmup * steps
    for step in range(first, steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min((step + 1) / max(1, rising), .5 + .5 * math.cos(math.pi * max(0, step - rising) / max(1, steps - rising)))
        optimiser.zero_grad()
        ids = mine(step)
        if step + 1 < steps:
            images.ahead(mine(step + 1))
        whole, last = draw(step), accumulate - 1
        with torch.set_grad_enabled(accumulate == 1):
            parts = [forward(ids[k], k == last) for k in range(accumulate)]
        rows_ = [k for k in ("z", "r", "t") if k in parts[0]]
        leaf = {k: (torch.cat([p[k] for p in parts]) if k in rows_ else parts[last][k]).detach().requires_grad_() for k in parts[last]}
        terms = objective(method, kind, {k: gather(v) if k in rows_ else v for k, v in leaf.items()}, whole, task, q)
        if len(set(task["y"][whole].tolist())) == 1 and not warned:
            talk(f"step {step}: the batch has one class only, it cannot teach what tells classes apart; larger --pairs make that rarer")
            warned = True
        total = sum(weight * term for weight, term in terms.values())
        bad = [name for name, (_, term) in terms.items() if not term.isfinite()]
        if not bad:
            total.backward()
            for k in range(accumulate):
                quiet = k < last and world > 1
                with ddp.no_sync() if quiet else contextlib.nullcontext():
                    o = parts[k] if accumulate == 1 else forward(ids[k], k == last)
                    grads = {n: world * leaf[n].grad[k * part:(k + 1) * part] if n in rows_ else leaf[n].grad if k == last else torch.zeros_like(v)
                             for n, v in o.items() if v.requires_grad and leaf[n].grad is not None}
                    torch.autograd.backward([o[n] for n in grads], [g.to(o[n].dtype) for n, g in grads.items()])
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
            bad = [] if norm.isfinite() else ["the gradient"]
        if bad:
            keep(step)
            raise Complaint(f"step {step}: {' and '.join(bad)} not finite; the state before it is in {out}/training.pt; "
                            "start anew with a lower --learning_rate, or with --dtype=float32")
        optimiser.step()
        if method != "bap":
            with torch.no_grad():
                module.logit_scale.clamp_(0, math.log(100))
        count += pairs
        if (step + 1) % log_every == 0 or step + 1 == steps:
            speed = count / (time.time() - clock)
            rows.append(dict(step=step + 1, loss=total.item(), **{name: term.item() for name, (_, term) in terms.items()}, lr=group["lr"],
                             gradient=float(norm), images_per_s=speed))
            talk(f"step {step + 1}/{steps}: loss {total.item():.4f} (" + ", ".join(f"{name} {term.item():.4f}" for name, (_, term) in terms.items())
                 + f"), {speed:.0f} images/s")
            if sink:
                sink(rows)
            clock, count = time.time(), 0
        if (step + 1) % save_every == 0 or step + 1 == steps or asked:
            keep(step + 1)
        if asked:
            raise KeyboardInterrupt
    images.close()
    module.requires_grad_(True)
    return rows


def pick_parameters(encoder, method, kind):
    """requires_grad by --train; what the method has no use for is frozen, as DDP wants every gradient. last_blocks: the last quarter of
    the image tower's blocks (layers, stages), and what comes after them."""
    module, part = encoder.module, train if train != "auto" else "all"
    visual = lambda name: name.startswith("visual.") or encoder.kind == "timm"
    last = ("visual.proj", "visual.head", "visual.attnpool.c_proj", "text_projection", "text.proj", "text.text_projection")
    chosen = {"all": lambda n: True, "image": visual, "text": lambda n: not visual(n), "projection": lambda n: n.startswith(last)}
    if part == "last_blocks":
        names = [n for n, _ in module.named_parameters() if visual(n)]
        number = [int(m[1]) if (m := re.search(r"(?<![a-z])(?:blocks|resblocks|layers|stages|features|layer)\.?(\d+)\.", n)) else -1 for n in names]
        if max(number) < 0:
            raise Complaint(f"--train=last_blocks: found no numbered blocks, layers or stages in {encoder.name}; use --train=image")
        least = max(number) + 1 - max(1, round((max(number) - min(k for k in number if k >= 0) + 1) / 4))
        after = set(names[next((k for k, v in enumerate(number) if v >= least), 0):])
        chosen[part] = lambda n: n in after or visual(n) and n.startswith(last)
    heads = module.get_classifier() if encoder.kind == "timm" else ()  # of distilled ones a tuple
    head = {id(p) for m in (heads if isinstance(heads, tuple) else (heads,)) for p in m.parameters()}
    for name, p in module.named_parameters():
        scalar = name in ("logit_scale", "logit_bias")
        p.requires_grad_(method != "bap" and (name == "logit_scale" or name == "logit_bias" and kind == "sigmoid" and method not in ("vl_erm", "vl_gdro"))
                         or not scalar and id(p) not in head and chosen[part](name))
    if getattr(getattr(module, "visual", None), "pool_type", "") == "avg" and not module.visual.positional_embedding.requires_grad:
        module.visual.class_embedding.requires_grad_(False)


def gather(x):
    """Rows of all processes, in the order of ranks; the gradient stays with this process's own."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def objective(method, kind, e, ids, task, q):
    """The terms of the loss, name -> (weight, value), of gathered embeddings e (see Towers) of the images ids [B]. q [2 C]: group DRO's
    weights of the groups label x feature, changed in place."""
    y = task["y"][ids].to(e["z"].device)
    if method == "bap":
        target, read = task["mu"] + task["anchors"][y], task["read"]
        terms = dict(L_anchor=(1., (e["z"] - target).square().sum(1).mean() / task["anchors"].square().sum(1).mean()))
        if text_weight and read:
            terms["L_text"] = text_weight, F.kl_div(read(e["z"]).log_softmax(1), read(target).log_softmax(1), reduction="batchmean", log_target=True)
        return terms
    if method in ("vl_erm", "vl_gdro"):
        ce = F.cross_entropy(e["scale"] * e["z"] @ e["g"].T, y, reduction="none")
        if method == "vl_erm":
            return dict(CE=(1., ce.mean()))
        group = 2 * task["y"][ids] + task["feature"][ids].long()
        present = torch.unique(group)
        losses = torch.stack([ce[group.to(ce.device) == g].mean() for g in present])
        if losses.isfinite().all():
            q[present] *= torch.exp(.01 * losses.detach().cpu())
            q /= q.sum()
        return dict(DRO=(1., (q[present].to(losses) * losses).sum()))
    f = task["feature"][ids].to(y.device) if method == "spurious_aware" else None
    together = None if f is None else f[:, None] == f
    L_CL = contrastive(e["z"], e["t"], e["scale"], together) if kind == "infonce" else sigmoid(e["z"], e["t"], e["scale"], e["bias"], together)
    if method != "ravl":
        return dict(L_CL=(1., L_CL))
    L_R, L_A = region_terms(e["r"], task["state"][ids].to(y.device), e["g"], y, region_temperature, repeated == "each")
    return dict(L_CL=(1 - region_weight, L_CL), L_R=(region_weight, L_R), L_A=(region_weight, L_A))


def contrastive(z, t, scale, together=None):
    """InfoNCE, both ways: mean cross-entropy of scale * z t^T [B, B] with its diagonal. together: [B, B] pairs that count, all if None."""
    logits, n = scale * z @ t.T, torch.arange(len(z), device=z.device)
    if together is not None:
        logits = logits.masked_fill(~together, -torch.inf)
    return (F.cross_entropy(logits, n) + F.cross_entropy(logits.T, n)) / 2


def sigmoid(z, t, scale, bias, together=None):
    """SigLIP's loss (Zhai et al. 2023): -log sigmoid of +-(scale z t^T + bias), summed over texts, averaged over images."""
    sign = 2 * torch.eye(len(z), device=z.device) - 1
    value = -F.logsigmoid(sign * (scale * z @ t.T + bias))
    return (value if together is None else value * together).sum() / len(z)


def region_terms(r, state, g, y, tau=.07, each=False):
    """RaVL's L_R and L_A (PROTOCOLS 4; the paper's Eqs 3 to 9, second-hand), averaged over the images that have other regions.

    r: regions [B, R, D], unit-norm; state: [B, R] 1 in the discovered cluster (R^s), 0 not (R^r), -1 no region; g: class texts [C, D];
    y: labels [B]. With s_i(y) = max over R_i^r of cos(r, g_y) / tau:
        L_R = logsumexp(s_i(y_j) for the labels y_j of the batch, max_y cos(r, g_y) / tau for r in R_B^s) - s_i(y_i)
        L_A = logsumexp(s_i(y_i), s_j(y_i) for images j of other labels, cos(r, g_{y_i}) / tau for r in R_B^s) - s_i(y_i)
    each: a label counts in L_R's first sum as often as it occurs in the batch, not once (open in the paper). Zeros if every R_i^r is empty.
    """
    cos = r.float() @ g.float().T / tau  # [B, R, C]
    spurious, ok = cos[state == 1], (state == 0).any(1)  # [S, C], [B]
    if not ok.any():
        return cos.sum() * 0, cos.sum() * 0
    present, times = torch.unique(y, return_counts=True)
    s = cos[ok].masked_fill((state[ok] != 0)[:, :, None], -torch.inf).amax(1)  # [B', C]
    y = y[ok]
    own = s.gather(1, y[:, None])  # [B', 1]
    labels = s[:, present] + (times.log() if each else 0)  # [B', P]
    L_R = torch.cat([labels, spurious[:, present].amax(1).expand(len(s), -1)], 1).logsumexp(1) - own[:, 0]
    others = s[:, y].T.masked_fill(y[:, None] == y, -torch.inf)  # [i, j]: s_j(y_i)
    L_A = torch.cat([own, others, spurious[:, y].T], 1).logsumexp(1) - own[:, 0]
    return L_R.mean(), L_A.mean()


def sampler(task, method):
    """step -> rows of the training pairs [pairs], a function of the seed and the step alone."""
    y, f, n = task["y"], task.get("feature"), len(task["y"])
    group = None if f is None else 2 * y + f.long()
    pool, weight, s = torch.arange(n), None, task.get("seed", seed)
    if method == "upsampled":  # labels stay as frequent as they are
        size, kinds = torch.bincount(group, minlength=2 * task["C"]).double(), torch.stack([torch.bincount(y[f == v], minlength=task["C"]) for v in (False, True)])
        weight = torch.bincount(y)[y] / (kinds > 0).sum(0)[y] / size[group]
    elif method == "vl_gdro":
        weight = 1 / torch.bincount(group).double()[group]
    elif method in ("jtt", "bap"):
        weight = task["weight"].double()
    elif method == "subg":
        least = int(torch.bincount(group)[torch.unique(group)].min())
        pick = torch.from_numpy(rng(s, "subg").permutation(n))
        pool = torch.cat([pick[group[pick] == g][:least] for g in torch.unique(group)])
    epoch = functools.lru_cache(2)(lambda e: pool[torch.from_numpy(rng(s, "epoch", e).permutation(len(pool)))])

    def draw(step):
        if weight is not None:
            generator = torch.Generator().manual_seed(int(rng(s, "batch", step).integers(1 << 62)))
            return torch.multinomial(weight, pairs, replacement=True, generator=generator)
        at = torch.arange(step * pairs, (step + 1) * pairs)
        return torch.stack([epoch(e)[k] for e, k in zip((at // len(pool)).tolist(), (at % len(pool)).tolist())])

    return draw


class Pictures:
    """Transformed images, decoded by threads ahead of need, and kept in memory while they fit into keep_gib."""

    def __init__(self, items, encoder):
        self.items, self.encoder, self.kept, self.room = items, encoder, {}, int(keep_gib * 2 ** 30)
        self.pool, self.front, self.coming = ThreadPoolExecutor(threads or cores()), ThreadPoolExecutor(1), {}

    def one(self, k):
        return self.kept[k] if k in self.kept else self.encoder.transform(self.items[k].image())

    def load(self, ids):
        x = list(self.pool.map(self.one, ids))
        for k, v in zip(ids, x):
            if k not in self.kept and self.room > 0:
                self.kept[k], self.room = v, self.room - v.numel() * v.element_size()
        return torch.stack(x)

    def ahead(self, ids):
        """Starts on the rows ids [parts, n] of a later step."""
        self.coming = {**{k: v for k, v in list(self.coming.items())[-len(ids):]}, **{tuple(p): self.front.submit(self.load, p) for p in ids.tolist()}}

    def get(self, ids):
        """Images [n, 3, H, W] of rows ids [n], on the encoder's device."""
        ids = ids.tolist()
        x = self.coming[tuple(ids)].result() if tuple(ids) in self.coming else self.load(ids)
        return x.to(self.encoder.device, memory_format=torch.channels_last)

    def close(self):
        self.front.shutdown(cancel_futures=True)
        self.pool.shutdown()


def sink_for(out):
    """A function that takes the rows of the log: writes log.csv whole and, if --log_to asks for it, the last row there."""
    writer = None
    if log_to:
        try:
            if log_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(str(out)).add_scalars
            else:
                import wandb
                wandb.init(project="flock", dir=str(out))
                writer = lambda _, values, step: wandb.log(values, step=step)
        except ImportError:
            raise Complaint(f"--log_to={log_to}: it is not installed; pip install {log_to}, or leave the flag away") from None

    def sink(rows):
        text = io.StringIO()
        table_ = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
        table_.writeheader()
        table_.writerows(rows)
        write(out / "log.csv", text.getvalue())
        if writer:
            writer("train", {k: v for k, v in rows[-1].items() if k != "step"}, rows[-1]["step"])

    return sink


if __name__ == "__main__":
    run(main)
