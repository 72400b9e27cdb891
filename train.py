"""Background-invariant anchor pre-training (BAP), and what it does for a probe trained on spurious data.

    python train.py                                    birds on places, EfficientNet-Lite0, no files needed
    python train.py --data=waterbirds:DIR --foregrounds=DIR --backgrounds=DIR --model=timm:resnet50

1. Put foregrounds (cut-outs) on backgrounds, embed the composites with a frozen encoder.
2. Report how additive the embeddings are: z(f, b) = mu + a_f + c_b + e.
3. Pre-train a map g that sends every composite of a foreground to its anchor mu + a_f, whatever the
   background; with --train=last_blocks|image the encoder itself, in the same sense.
4. Train a probe on the biased data through g, and compare it with what else could be done, on the test split.

BAP is arXiv 2605.11107; its equations are not public, those here are our reading.

    python train.py --method=finetune --model=ViT-B-32 --pretrained=openai --data=...
    python discover.py --model=ViT-B-32 --pretrained=out/weights.safetensors --data=...
    python train.py --method=ravl --discovery=out --model=ViT-B-32 --pretrained=openai --data=...

The second half of this file: contrastive fine-tuning, then RaVL's region-aware loss, which holds down what
discover.py found, and the mitigations that it is compared with. torchrun spreads it.
"""

import contextlib
import copy
import functools
import io
import itertools
import math
import os
import re
import signal
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

# first, as it checks the flags before numpy and torch are imported
from data import ASSETS, Complaint, Composite, Crop, Cutout, Ground, Photo, Picture, View, bounded
from data import cell_shares, check, composites, dots, expect, filled, flags, html_table, idle, layers
from data import linked, load_data, load_foregrounds, load_regions, page, picture_size, read_json, reading
from data import require, revision, rng, run, say, stored_composites, synsets, table, tag, thumb, write
from data import write_json, write_table

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image

from kernels import pairwise_loss, region_logits
from model import SHARES, Map, additive_solve, additivity, bar, cos_sum, dfr, embeddings, features
from model import file_digest, fit_probe, from_first, group_metrics, join, load_checkpoint, load_encoder
from model import paired_bootstrap, ranks, region_embeddings, renumber, save_checkpoint, sha256, sphere_log
from model import standard, sums, unbalanced, unit, weights_bytes, with_map

# fmt: off
# --- I/O ----------------------------------------------------------------------------------------------------
out_dir = "out"           # results.json, report.html, ckpt.pt, map.npz; trained: weights.safetensors, log.csv
cache_dir = "cache"       # embeddings, reused by every run; --cache_dir= for none
resume = False            # go on where an interrupted run of the same flags stopped
quiet = False             # say only warnings, the result and where it lies
skip_bad = False          # leave out images that cannot be read, counted and named, instead of stopping
resize_once = False       # keep photos as small as a model sees them, for others of its preprocessing
max_pixels = 89478485     # a photo of more is refused
# --- the biased data to train the probe on ------------------------------------------------------------------
data = "scenes"           # scenes, or NAME:DIR: waterbirds, celeba, counteranimal, nico, cocogender, in9,
                          # imagenet, folder, csv; controlled: digits, cutouts, coco; --data=NAME:help;
                          # embeddings:FILE.npz: no images and no encoder
classes = ""              # only these, as in car,truck; or a file of names, one a line
places = ""               # only these; with as many as --classes the k-th is the k-th class's own
columns = ""              # of csv, waterbirds: which is what, as in place=weather,path=photo; see csv:help
masks = ""                # folder of foreground masks of the training images (copy_paste, balanced_train)
place_backgrounds = ""    # folders of backgrounds, one per place, comma-separated (balanced_train)
confounder = 1.0          # scenes and pairs: share of the training images on their class's own place
strength = 0.0            # controlled settings: Cramer's V of a class and the planted feature,
spurious = "0"            # that class, by number or name,
feature = ""              # and that feature, where there is a choice
# --- the composites to pre-train on -------------------------------------------------------------------------
foregrounds = "assets/foregrounds"  # folder of RGBA cut-outs; masked photos, COCO, ...: --foregrounds=help
backgrounds = "assets/backgrounds"  # folder of photos, or discovery:PATH: the regions that discover.py found
instances = 640           # foregrounds in a pose of their own: each cut-out is used several times
per_instance = 8          # backgrounds behind each
# --- encoder ------------------------------------------------------------------------------------------------
model = "lite0"           # lite0, lite1, lite2, timm:NAME, an open_clip name (ViT-L-14), hf-hub:NAME,
                          # local-dir:FOLDER, lite0-clip, tiny, tiny-conv
pretrained = ""           # open_clip tag, local file, or folder of weights
quick_gelu = "auto"       # auto follows the record of the weights; on, off
test_size = False         # timm: pictures at the size and crop of its published accuracies, not of training
device = "auto"           # auto, cpu, cuda
dtype = "auto"            # of the forward pass: auto, float32, bfloat16
batch_size = "auto"       # images at a time; auto: 256 on a GPU, fewer if memory asks for it; CPU: 8 to 64
threads = 0               # that decode images and, on a CPU, embed them; 0 for one per core
# --- method -------------------------------------------------------------------------------------------------
method = "bap"            # bap; or fine-tuning: finetune, ravl, upsampled, ... (see METHODS)
own = 0.5                 # bap: weight of the target's own training foregrounds, cut out; 0 for none
lam = 1.0                 # bap: the Wiener filter's ridge, in units of the mean variance
bap_map = "closed"        # bap: closed (Wiener filter), or linear, trained by contrast against the anchors
train = "auto"            # bap: map (auto), or the encoder itself: image, last_blocks (the last quarter).
                          # Fine-tuning: all (auto), image, text, projection (each tower's last layer)
text_weight = 0.1         # bap, encoder: weight of what texts, or a classifier's rows, say of an image
steps = 300               # of every training
learning_rate = 3e-4
l2 = 0.8                  # penalty of every probe, in units of the mean loss (scikit-learn's C = 1 / (l2 n))
# --- fine-tuning: every method but bap; pairs, compile, checkpointing also where bap trains the encoder ----
pairs = 128               # image-caption pairs in a step, of all processes together
loss = "auto"             # infonce, sigmoid (SigLIP); auto: by the model
captions = "own"          # own: the data set's; class: the class's prompt; place: the prompt and the place
discovery = ""            # discovery.json of discover.py, or its folder; see METHODS which need it
clusters = 0              # how many of its kept clusters count, the best first; 0: see clusters_used
region_weight = 0.2       # ravl: w in (1 - w) L_CL + w (L_R + L_A)
region_temperature = 0.07 # ravl: of its cosines
compile = False           # torch.compile
checkpointing = False     # of gradients: less memory for large batches, more time
save_every = 100          # steps between checkpoints for --resume
wandb = False             # also log to Weights & Biases, if installed
# --- system -------------------------------------------------------------------------------------------------
seed = 0
seeds = 1                 # bap: runs with seed, seed + 1, ...; reported are means and spread
# --- end ----------------------------------------------------------------------------------------------------
LIMITS = {  # the words that a flag may be, those of a table by its name; or its interval
    "method": ("bap", "METHODS"),
    "train": ("auto", "map", "image", "last_blocks", "all", "text", "projection"),
    "bap_map": ("closed", "linear"),
    "loss": ("auto", "infonce", "sigmoid"),
    "captions": ("own", "class", "place"),
    "seeds": "[1, 1000]", "steps": "[1, 1e9]", "save_every": "[1, inf)",
    "lam": "[1e-9, inf)", "learning_rate": "(0, inf)", "region_temperature": "(0, inf)",
    "text_weight": "[0, inf)", "clusters": "[0, inf)", "own": "[0, 1]", "region_weight": "[0, 1]",
    "instances": "[8, 1e6]", "per_instance": "[2, 10000]", "pairs": "[2, 1e6]",
}
# fmt: on

ROWS = {  # of the table, in this order
    "erm": "probe on the raw embedding",
    "group_weighted": "erm, groups weighted by the inverse of their size",
    "nullspace": "32 leading background directions projected out",
    "leace": "LEACE on the same 32 background coordinates",
    "copy_paste": "training foregrounds also on random backgrounds (needs masks)",
    "bap_closed": "Wiener filter on the raw embedding",
    "bap_synthetic": "bap without the target's own foregrounds",
    "bap_map": "the recommended map on the encoder as it was",
    "bap_both": "the map on the pre-trained encoder",
    "bap": "BAP: the recommended map, or the pre-trained encoder",
    "dfr": "last-layer retraining on validation groups, as its authors run it",
    "dfr_val_scaled": "dfr, standardised by the validation set, the bias free",
    "val_probe": "probe trained on the validation set",
    "val_probe_bap": "the same through the map",
    "balanced_train": "training foregrounds on every place (needs masks and places)",
}
MASKED = {"copy_paste": "needs --masks", "balanced_train": "needs --masks and --place_backgrounds"}
BAP_TRAINS = "auto", "map", "last_blocks", "image"  # what --train may be
TUNE_TRAINS = "auto", "all", "image", "text", "projection"
# flags of one kind of method only; of training the encoder
OF_TUNING = "loss captions discovery clusters region_weight region_temperature"
OF_BAP = "foregrounds backgrounds instances per_instance own lam bap_map l2 masks place_backgrounds"
OF_TRAINING = "text_weight pairs compile checkpointing save_every wandb"
# The next three lines were chosen on sets that LOG.md names, with the figures, 2026-11-22 to 29
OWN_MOST, OWN_PER = 1000, 5  # of the target's own foregrounds at most so many, on so many backgrounds each
DRIFT, FORETOLD = 0.2, 0.1  # weight of its photos' own backgrounds; see own_backgrounds
LEAST, FEWEST = 1 / 3, 16  # directions of the map: the foreground's share, and how many stay anyway
LOG_EVERY, WARMUP = 20, 0.1  # steps between lines; share of the steps
WEIGHT_DECAY, CLIP = 0.1, 1.0  # AdamW's; norm of the gradient
PARTIAL = ("partial.pt", "training.pt")  # bap: what --resume goes on from: seeds, the encoder
LEFT = "what an interrupted run left", "run without --resume"
ANEW = dict(resume=False)  # in the record of weights: the same bytes, whether it was interrupted or not
JTT_WEIGHT = 20.0  # times that an image counts, in all, which a first quarter of the steps leaves wrong
AVERAGES = "avg_group_mean", "avg_train_weighted"  # shown beside the worst group
NONE = -1e30  # the logit of what is not there; finite, so that its gradient is zero and not NaN
ROOM, ROOM_GPU = 4 << 30, 2 << 30  # bytes of decoded training images in memory, and before that on the GPU
# composites, cells: their weight in the map, embeddings z [N, D], foreground i and background j [N] of each
Grid = namedtuple("Grid", "weight z i j cells")
# what a seed's run leaves beside its numbers, for page and checkpoint; probes: name -> Probe; correct: name
# -> which images are right [n]; x: embeddings [n, D] by encoder; cells: composites; cuts: own foregrounds
Fitted = namedtuple("Fitted", "encoder weights map probes correct samples x cells cuts")


def main():
    config = flags(globals())
    trains = BAP_TRAINS if method == "bap" else TUNE_TRAINS
    expect(train in trains, "train", train, f"with --method={method} {', '.join(trains)}")
    alone = method != "bap" or int(os.environ.get("WORLD_SIZE", 1)) == 1
    expect(alone, "method", method, "another under torchrun, as bap runs in one process")
    join(device)
    idle(OF_TUNING if method == "bap" else f"{OF_BAP} text_weight", f"with --method={method}")
    if method == "bap" and train in ("auto", "map"):
        closed = " steps learning_rate" * (bap_map == "closed")
        idle(OF_TRAINING + closed, f"with --train={train}: the map is found in closed form")
    stored = data.startswith("embeddings:")
    if stored:
        wanted = "its default with --data=embeddings: there is no network"
        for flag, usable in dict(method=["bap"], model=["lite0"], train=["auto", "map"]).items():
            expect(config[flag] in usable, flag, config[flag], wanted)
        config["model"] = data
    network = "a network; embeddings go with --data=embeddings:FILE"
    expect(not model.startswith("embeddings:"), "model", model, network)
    planted = dict(confounder=confounder, strength=strength, spurious=spurious, feature=feature)
    dataset = functools.partial(load_data, data, classes, places, masks=masks, columns=columns, **planted)
    how = dict(device=device, dtype=dtype, batch=batch_size, threads=threads, cache=cache_dir)
    how.update(skip_bad=skip_bad, resize_once=resize_once)
    samples = dataset(seed=seed)
    encoder = load_encoder(config["model"], pretrained, quick_gelu, test_size, **how)
    if method != "bap":
        return finetune(config, encoder, samples)
    out, started = Path(out_dir), time.time()
    figures, grounds, notes = material(config, encoder, out)
    by_place = place_grounds(samples, place_backgrounds)
    parts = figures[0] if stored else sum(by_place, figures + grounds)
    head = head_of(config, encoder, samples, *[part.key() for part in parts])
    states = [unfinished(out / name, head, encoder) for name in PARTIAL]  # complains now, not in an hour
    if not any(states) and finished(out / "results.json", head):
        return
    runs = []
    if states[0]:
        with reading(out / PARTIAL[0], *LEFT):
            average(states[0]["runs"], [])  # complains of what no means can be made of
        runs = states[0]["runs"][: seeds - 1]  # of the last seed are page and checkpoint: it is run anew
        if runs:
            say(f"{out / PARTIAL[0]}: goes on behind {len(runs)} of {seeds} seeds", True)
    for k in range(len(runs), seeds):
        biased = dataset(seed=seed + k)
        result, fitted = bap(seed + k, encoder, figures, grounds, biased, out, head, by_place)
        runs.append(result)
        save_checkpoint(out / PARTIAL[0], dict(head, runs=runs))
    results = dict(head, notes=encoder.notes + notes + fitted.samples.notes)
    results.update(average(runs, results["notes"]))
    results["seconds"] = dict(runs[-1]["seconds"], total=time.time() - started)
    save_results(out, results, fitted)
    say(f"\n{out}: results.json, report.html, ckpt.pt, map.npz written, {time.time() - started:.0f} s", True)


def bap(seed, encoder, figures, grounds, samples, out, head, by_place=()):
    """The whole method, for one seed: composites, additivity, maps, probes. Returns the result in plain
    numbers, and a Fitted. figures, grounds: see material; head: see head_of; by_place: see place_grounds."""
    lap = Laps()

    # 1. the composites: an incomplete grid of foreground instances i and backgrounds j
    stored = encoder.kind == "stored"  # then figures are composites, as embeddings from elsewhere
    cells, i, j = figures if stored else composites(figures, grounds, instances, per_instance, seed)
    cells, z, i, j = embedded(encoder, cells, "composites", i, j)
    lap("composites", "how additive they are" * bool(cells))

    # 2. how additive are they?
    additive = how_additive(encoder, cells, z, i, j, seed) if cells else None
    lap("additivity")

    # 3. the biased data. Its training foregrounds are worth having among the composites, and need no labels:
    # a cutter that learned from composites what a foreground looks like cuts them out
    x = encoder.embed(samples.items, "target")
    good = x.isfinite().all(1)
    if not good.all():
        samples, x = check(samples.keep(good.cpu())), x[good]
    lap("target", "own foregrounds" * bool(own and not stored))
    # after a ReLU no embedding is below zero, and a few large channels outshout the rest: roots even them out
    power = 1.0 if (z < 0).any() else 0.5
    target = None
    if own and not stored:
        target = own_foregrounds(encoder, cells, grounds, samples, x, power, seed)
    lap("own", "maps")

    # 4. the maps. The two grids are weighed, not pooled: the synthetic one knows many foregrounds, the
    # target's those that matter, and neither is to win by its number of composites
    grids, drift, maps, cuts, foretold = [Grid(1.0, z, i, j, cells)], None, {}, [], None
    if cells:
        maps = dict(nullspace=nullspace(z, i, j), leace=leace(z, i, j), bap_closed=wiener(grids, lam))
    if target:
        maps["bap_synthetic"] = wiener(grids, lam, power, None, LEAST)
        drift, cuts, foretold = target.drift, target.cuts, target.foretold
        if target.independent:
            grids = [grids[0]._replace(weight=1 - own), target.grid._replace(weight=own)]
    if cells:
        maps["bap"] = wiener(grids, lam, power, drift, LEAST)
    # with --train=last_blocks|image the encoder itself learns what the map does, and needs none behind it
    identity = Map(x.new_zeros(x.shape[1]), torch.ones_like(x[0]).diag())
    trained, x_bap, zero, weights = encoder, x, None, b""
    if train in ("last_blocks", "image"):
        trained, weights, grids = pretrain(encoder, grids, samples, seed, out, head)
        x_bap = trained.embed(samples.items, "target, trained")
        both = wiener(grids, lam, power, None, LEAST)  # no drift: it was measured on the encoder as it was
        maps.update(bap_map=maps["bap"], bap_both=both, bap=identity)
        if encoder.tokenizer:
            say(samples.nameless or samples.prompt_line())
        if encoder.tokenizer and not samples.nameless:
            zero = dict(before=zero_shot(encoder, samples, x), after=zero_shot(trained, samples, x_bap))
    if bap_map == "linear" and cells:
        name = "bap_both" if "bap_both" in maps else "bap"
        maps[name] = contrast(maps[name], grids[0].z, i, j, seed, steps, learning_rate)
    lap("pretraining", "probes, dfr, and whether the map is invariant")

    # 5. probes, all with the same penalty, trained on the biased data, read on the test split
    augmented = recomposed(encoder, samples, grounds, by_place, seed)
    probes, methods, reasons, correct = probe_all(maps, x, x_bap, samples, augmented, l2, seed)
    reasons.update(dict.fromkeys(MASKED if stored else (), "needs pictures"))
    lap("probes")
    g, invariant = maps.get("bap", identity), None
    if cells:
        invariant = invariance(g, grids[0].z, i, x, x_bap, samples, l2, seed) | dict(own_foretold=foretold)
    result = dict(additivity=additive, invariance=invariant, methods=methods, reasons=reasons)
    result.update(seconds=lap.seconds, zero_shot=zero)
    return result, Fitted(trained, weights, g, probes, correct, samples, x_bap, cells, cuts)


# ----------------------------------------------------------------------------------------------------------
# the maps: composites z [N, D] of foregrounds i [N] and backgrounds j [N] -> g


def scatter(z, i):
    """Mean [D], and the scatters of z [N, D] between and within foregrounds i [N], double [D, D]: S_f, S_w.

    S_w: scatter around the mean of each foreground's composites; S_f: covariance of these means less S_w
    times the mean of 1 / (composites of a foreground), not yet clipped to positive semi-definite. A mean is
    the anchor mu + a_f and the mean of a few c_b, which S_f is so freed of.
    """
    z, i = z.double(), renumber(i)
    count = torch.bincount(i).double()
    means = sums(z, i, len(count)) / count[:, None]  # [n, D]
    mu, residual = z.mean(0), z - means[i]
    S_w = residual.T @ residual / max(1, len(z) - len(count))
    return mu, (means - mu).T @ (means - mu) / len(count) - S_w * (1 / count).mean(), S_w


def wiener(grids, lam=1.0, power=1.0, drift=None, least=0.0):
    """The closed form, a Wiener filter for the foreground: W = (S_f + S_w + lam t I)^-1 S_f.

    grids: list of Grid, or (weight, z [N, D], i [N]); the moments of several are averaged, and S_f then
    clipped to positive semi-definite. The ridge is in units of the mean variance, t = trace(S_f + S_w) / D.
    For row vectors: (z - mu) W; the transposed product is wrong. Our reading of BAP, claim 2. Returns a Map.

    Ours: drift [n, D], effects of the target's own backgrounds, whose scatter joins S_w with weight DRIFT;
    and least: directions in which the foreground has a smaller share of all that the filter divides by are
    cut, as what is only weakened a probe makes strong again. The FEWEST with the largest shares stay.
    """
    total = sum(weight for weight, *_ in grids)
    moments = [[weight / total * m for m in scatter(features(z, power), i)] for weight, z, i, *_ in grids]
    mu, S_f, S_w = (sum(parts) for parts in zip(*moments, strict=True))
    if drift is not None:
        S_w = S_w + DRIFT * drift.T @ drift / len(drift)
    value, vector = torch.linalg.eigh(S_f)
    S_f = (vector * value.clamp(min=0)) @ vector.T
    ridge = lam * (S_f + S_w).trace() / len(mu) * torch.ones_like(mu).diag()
    L = torch.linalg.cholesky(S_f + S_w + ridge)
    # whitened, L^-1 S_f L^-T is symmetric, and its eigenvalues are the foreground's shares
    half = torch.linalg.solve_triangular(L, S_f, upper=False)
    share, u = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.T, upper=False))
    share = share.where(share >= min(least, share[-FEWEST:][0]), 0)  # [D], from 0 to 1, ascending
    return Map(mu, torch.linalg.solve_triangular(L.T, u * share, upper=True) @ u.T @ L.T, power)


def contrast(g, z, i, j, seed, steps, learning_rate):
    """Trains the map by contrast: every virtual composite of foreground i is to point at its own anchor.

    A virtual composite is a_i + r_k, a_i the anchor of foreground i as the map sees it, less its mean, and
    r_k all that is not the foreground in a real composite k: background, interaction, noise. A linear map
    commutes with the sum, so all pairs are had from the projected parts (kernels/pairwise_loss.py). Starts
    at the closed form.
    """
    x, i = features(z, g.power), renumber(i)
    mu, a, _ = additive_solve(x, i, renumber(j))
    a, r = (mu - g.mu + a).float(), (x - mu - a[i]).float()  # [n, D], [N, D]; anchors as the map sees them
    generator, W = torch.Generator().manual_seed(seed), g.W.requires_grad_(True)
    start, gain = W.detach().clone(), 1 / (a @ W.detach()).norm(dim=1).mean()
    optimiser = torch.optim.AdamW([W], learning_rate * float(start.std()), weight_decay=0.0)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for step in range(steps):
        n, m = (torch.randperm(len(v), generator=generator)[:256].to(v.device) for v in (a, r))
        f, b, y = a[n] @ W, r[m] @ W, torch.arange(len(n), device=a.device)
        value = pairwise_loss(f, b, unit(f), y, 20.0)  # the inverse temperature
        value = value + 100 * (gain * (W - start)).square().sum() / len(W)  # it stays near the closed form
        optimiser.zero_grad()
        value.backward()
        require(value.isfinite(), f"--bap_map=linear: not finite in step {step}; lower --learning_rate")
        optimiser.step()
        slower.step()
        if step % 50 == 0 or step == steps - 1:
            say(f"step {step}: loss {value.item():.4f}")
    W.requires_grad_(False)
    return g


# ----------------------------------------------------------------------------------------------------------
# the encoder itself, with --train=last_blocks|image


def pretrain(encoder, grids, samples, seed, out, head):
    """BAP on the encoder itself (--train=last_blocks|image): a copy of it is trained so that each composite
    lands on the anchor of its foreground (squared distance, in shares of the anchors' variance). What
    texts (or the rows of its classifier) say of an image is kept: it becomes what they say of the anchor
    (KL). Anchors, mu + a_f, are those of the encoder as it was: fixed, so nothing can collapse. Contrast
    among them was worse. Our reading.

    Returns the Encoder, its weights as a file's bytes, and the grids with its embeddings."""
    config, head = head["config"], dict(head, seed=seed)
    z, j = (torch.cat(parts) for parts in zip(*[(grid.z, grid.j) for grid in grids], strict=True))
    # numbers of one grid mean nothing in the other, and none of the first is as large as --instances
    i = renumber(torch.cat([grid.i + n * config["instances"] for n, grid in enumerate(grids)]))
    mu, a, _ = additive_solve(z, i, renumber(j))
    a = a.float()
    task = SimpleNamespace(items=sum((grid.cells for grid in grids), []), y=i.cpu(), C=len(a), seed=seed)
    task.anchors, task.variance = mu.float() + a, a.square().sum(1).mean()
    task.weight = torch.cat([torch.full((len(grid.z),), grid.weight / len(grid.z)) for grid in grids])
    task.read, task.text_weight = readout(encoder, samples), config["text_weight"]
    student, path = encoder.with_module(copy.deepcopy(encoder.module)), out / PARTIAL[1]
    # without --resume what lies there is this run's own, of the seed before
    state = unfinished(path, head, encoder) if config["resume"] else None
    if state and state["seed"] != seed:
        state = None
    fit(student, task, ANCHORS, head, path, state)
    weights = weights_bytes(student.module, config=config | ANEW, git=head["git"])
    trained = encoder.with_module(student.module, sha256(weights))
    z = trained.embed(task.items, "composites, trained").split([len(grid.z) for grid in grids])
    return trained, weights, [grid._replace(z=v) for grid, v in zip(grids, z, strict=True)]


def readout(encoder, samples):
    """A function from embeddings [N, D] to logits [N, V], of the target's and ImageNet's texts, or of a
    classifier's rows; None without either."""
    if encoder.tokenizer:
        prompts = [[f"a photo of a {name}."] for name in synsets()[2]]
        if not samples.nameless:
            prompts = samples.class_prompts() + prompts
        t, scale = encoder.prompts(prompts), encoder.facts["logit_scale"]
        return lambda z: scale * unit(z) @ t.T
    if encoder.facts["rows"]:
        rows, bias = encoder.classifier()
        return lambda z: z @ rows.T + bias
    return None


# ----------------------------------------------------------------------------------------------------------
# the target's own foregrounds: a cutter learns from composites, whose alpha is known, where the foreground is


def own_foregrounds(encoder, cells, grounds, samples, x, power, seed):
    """The target's own training foregrounds, as a cutter that learned from the composites cells finds them,
    on other backgrounds: cuts, a Grid, and drift and foretold, see own_backgrounds. None if the cutter is not
    trusted. x: embeddings of all samples [n, D]."""
    biased = samples.split == 0
    pictures = samples.keep(biased).items
    cut, trusted, line = cut_out(encoder, pictures, cells, seed, "training images")
    if not trusted:
        say(filled(f"{line}: not trusted, the target's own foregrounds are not used"))
        return None
    say(line)
    cuts = list(cut.values())
    cells, i, j = composites(cuts, grounds, len(cuts), OWN_PER, seed, in_pose=False)
    turn = torch.arange(len(cells)) % OWN_PER
    cells, z, i, j, turn = embedded(encoder, cells, "own foregrounds", i, j, turn)
    photos, y = (v[biased.to(v.device)][list(cut)] for v in (x, samples.y))
    views = features(photos, power), features(z, power)
    drift, foretold = own_backgrounds(*views, i, turn, y.to(x.device), seed)
    independent, line = True, "too few to tell whether their foregrounds foretell it"
    if foretold is not None:
        independent = foretold < FORETOLD
        verdict = "independent" if independent else "they are left out of S_f"
        line = f"their foregrounds foretell {foretold:.3f} of it: {verdict}"
    say(f"what {len(drift)} photos have beside their foregrounds: {line}")
    grid = Grid(1.0, z, i, j, cells)
    return SimpleNamespace(cuts=cuts, grid=grid, drift=drift, foretold=foretold, independent=independent)


def own_backgrounds(photos, v, i, turn, y, seed):
    """What the target's photos have beside their foregrounds, and whether it depends on these. Ours.

    photos: their features [n, D]; v: features [N, D] of composites of foreground i [N], the turn-th of each;
    y: classes [n]. Returns each photo less the mean of its foreground's composites, less the mean of all
    [m, D], and the share of its variance within classes that the foregrounds foretell. On composites that
    is nothing: foreground and background were drawn apart. In photographs pose, waterline and light go
    together with the place, or cuts carry a rim of it along: S_f would keep what should go.
    """
    n, means = len(photos), []
    for half in (turn < 2, turn >= 2):  # apart, so that the two sides share no composite's noise
        means.append(sums(v[half].double(), i[half], n) / torch.bincount(i[half], minlength=n)[:, None])
    good = sum(means).isfinite().all(1)  # NaN where no composite of a foreground could be embedded
    (f, f_again), photos, y = (m[good] for m in means), photos[good], y[good]
    drift = photos.double() - (2 * f + (OWN_PER - 2) * f_again) / OWN_PER  # the mean of all of its composites
    pick = some_of(len(drift), 400, seed)
    share = foretold_share(f[pick], (photos - f_again)[pick], y[pick], seed)
    return drift - drift.mean(0), share


def foretold_share(a, d, y, seed, leading=40):
    """Share of the variance of d [n, D] that ridge regression on a [n, D] foretells, by five-fold
    cross-validation in the leading principal components of each, within classes y [n]; below 0: none. None
    of fewer than 20."""
    if len(y) < 20:
        return None
    y, columns = renumber(y), []
    for part in (a, d):
        middle = sums(part, y, int(y.max()) + 1) / torch.bincount(y)[:, None]
        u, size, _ = torch.linalg.svd(part - middle[y], full_matrices=False)
        columns.append(u[:, :leading] * size[:leading])
    (a, d), lost = columns, 0.0
    fold = torch.tensor(some_of(len(y), len(y), seed), device=y.device) % 5
    for k in range(5):
        rest, test = a[fold != k], fold == k
        ridge = 0.1 * rest.square().sum() / leading * torch.ones_like(a[0]).diag()
        B = torch.linalg.solve(rest.T @ rest + ridge, rest.T @ d[fold != k])
        lost += (d[test] - a[test] @ B).square().sum()
    return float(1 - lost / d.square().sum())


def cut_out(encoder, pictures, cells, seed, what):
    """The foregrounds of pictures, {number: Cut}, by a cutter that learned from the composites cells; whether
    it can be trusted; and a line on that. It cannot if it misses the foregrounds of held-out composites (IoU
    below 0.6), nor if it finds one of plausible size, 2 to 50 % of the picture, in less than two thirds of
    the target's: then what it learned from composites does not carry over."""
    scenes = [cells[k] for k in some_of(len(cells), 640, seed)]
    part, keys = f"cutter {seed} {encoder.precision}", [scene.key() for scene in scenes]
    learned = encoder.kept(part, keys, 1, lambda: learn_cutter(encoder, scenes, seed))[0]
    theta, (h, w, iou) = learned[:-3], learned[-3:].tolist()

    def masks(x, _):  # images [N, 3, H, W] -> [N, h * w], for encoder.embed
        return rearrange(soft_mask(dense(encoder, x), theta), "n h w -> n (h w)")

    numbers = sorted(some_of(len(pictures), OWN_MOST, seed))
    name = f"cutter {sha256(theta.cpu().numpy().tobytes())[:16]}"
    alpha = encoder.embed([pictures[k] for k in numbers], "cut out", masks, name)
    plausible = (alpha.mean(1) > 0.02) & (alpha.mean(1) < 0.5)
    share, cuts = float(plausible.double().mean()), {}
    for k, mask in zip(itertools.compress(numbers, plausible.tolist()), alpha[plausible], strict=True):
        raw = (mask * 255).round().to(torch.uint8).cpu().numpy().tobytes()
        cuts[k] = Cut(pictures[k], raw, (int(h), int(w)), encoder.frame(*picture_size(pictures[k])))
    line = f"cutter: IoU {iou:.2f} on held-out composites"
    line += f", a plausible foreground in {share:.0%} of the {what}"
    return cuts, iou >= 0.6 and share >= 2 / 3, line


def learn_cutter(encoder, scenes, seed, cells=60):
    """A logistic regression on the cells of dense(), learned from composites [n] and their alpha, from so
    many cells of each, as neighbours say much the same; and its mean intersection over union on every tenth
    composite, held out, though its cut-out may stand in others. Returns weight, bias, h and w of the grid,
    and IoU, [1, D' + 4]. Ours, not in the papers."""
    generator, rows, target, held_out = torch.Generator().manual_seed(seed), [], [], []
    with ThreadPoolExecutor(encoder.threads) as pool:
        for start in bar("cutter", range(0, len(scenes), 16)):
            batch = scenes[start : start + 16]
            x = encoder.normalised(encoder.onto_device(list(pool.map(encoder.pixels, batch))))
            f = encoder.run(x, encoder.precision, lambda x, _: dense(encoder, x))  # [N, h, w, D']
            alphas, grid = [scene.alpha() for scene in batch], f.shape[1:3]
            a = torch.stack([cell_shares(v, encoder.frame(*v.size), *grid) for v in alphas]).to(f.device)
            test = torch.arange(start, start + len(batch), device=f.device) % 10 == 9
            held_out.append((f[test], a[test]))
            f, a = rearrange(f[~test], "n h w d -> n (h w) d"), rearrange(a[~test], "n h w -> n (h w)")
            pick = torch.randint(a.shape[1], (len(a), cells), generator=generator).to(f.device)
            rows.append(f.gather(1, repeat(pick, "n k -> n k d", d=f.shape[2])).flatten(0, 1))
            target.append(a.gather(1, pick).flatten())
    x, y = torch.cat(rows), torch.cat(target)
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x, theta = (x - mean) / scale, x.new_zeros(x.shape[1] + 1).requires_grad_()
    optimiser = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

    def step():
        optimiser.zero_grad()
        ce = F.binary_cross_entropy_with_logits(x @ theta[:-1] + theta[-1], y)
        value = ce + 1e-4 * theta[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(step)
    weight, bias = theta.detach()[:-1] / scale, theta.detach()[-1:]
    theta, iou = torch.cat([weight, bias - mean @ weight]), []  # of cells as they come, not standardised
    for f, a in held_out:
        on, true = soft_mask(f, theta) > 0.5, a > 0.5
        iou.append((on & true).sum((1, 2)) / (on | true).sum((1, 2)).clamp(min=1))
    return torch.cat([theta, theta.new_tensor([*grid, float(torch.cat(iou).mean())])])[None]


def dense(encoder, x):
    """Images [N, 3, H, W] -> the last three levels of features on the finest one's grid: [N, h, w, D']."""
    tower = getattr(encoder.fast, "visual", encoder.fast)
    wanted = f"0, as the levels of {encoder.name} are not known, by which foregrounds are cut out"
    expect(hasattr(tower, "forward_intermediates"), "own", "a weight", wanted)
    levels = tower.forward_intermediates(x, indices=3, intermediates_only=True)
    if isinstance(levels, dict):  # open_clip's, where timm has a list
        levels = levels["image_intermediates"]
    grid = max(tuple(v.shape[2:]) for v in levels)
    same = torch.cat([F.interpolate(v.float(), size=grid, mode="bilinear") for v in levels], 1)
    return rearrange(same, "n d h w -> n h w d")


def soft_mask(cells, theta):
    """Cells [..., D'] of dense() -> soft mask [...]: 0 below probability 0.2, where most cells are ground, 1
    above 0.5. theta: weight and bias of a logistic regression, [D' + 1]."""
    return (((cells @ theta[:-1] + theta[-1]).sigmoid() - 0.2) / 0.3).clamp(0, 1)


@dataclass(frozen=True)
class Cut(Picture):
    """The foreground of a picture by a soft mask that the cutter found, in the picture's own frame: RGBA."""

    picture: Picture
    alpha: bytes  # of h x w cells
    shape: tuple  # h, w
    box: tuple = (0.0, 0.0, 1.0, 1.0)  # that they cover, in shares of the picture; nothing outside it

    @property
    def path(self):
        return getattr(self.picture, "path", "a drawn picture")

    def at_edge(self):
        """Whether the edge of what the model saw cuts it, over more than a thirtieth of that edge."""
        mask = np.frombuffer(self.alpha, np.uint8).reshape(self.shape) > 127
        return np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean() > 1 / 30

    def image(self):
        image = self.picture.image()
        left, top, right, bottom = (round(v * n) for v, n in zip(self.box, image.size * 2, strict=True))
        alpha = Image.frombytes("L", self.shape[::-1], self.alpha)
        mask = Image.new("L", image.size)
        mask.paste(alpha.resize((right - left, bottom - top), Image.BICUBIC), (left, top))
        image.putalpha(mask)
        return image


def some_of(n, most, seed):
    """Up to `most` of the numbers 0 to n - 1, in random order: list."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].tolist()


# ----------------------------------------------------------------------------------------------------------
# what BAP is compared with, probes, and whether the map is invariant


def background_effects(z, i, j, k):
    """mu [D], and the k leading directions [D, k] and coordinates [m, k] of the backgrounds' effects c_j."""
    mu, _, c = additive_solve(z, renumber(i), renumber(j))
    u, size, v = torch.linalg.svd(c, full_matrices=False)
    k = min(k, int((size > 1e-6 * size[0]).sum()))
    return mu, v[:k].T, (u * size)[:, :k]


def nullspace(z, i, j, k=32):
    """A Map that projects out the k leading directions of the background effects c_j of the additive fit."""
    mu, v, _ = background_effects(unit(z), i, j, k)
    return Map(mu, torch.ones_like(mu).diag() - v @ v.T)


def leace(z, i, j, k=32):
    """LEACE (Belrose et al. 2023): the least change of z after which no linear probe finds the concept, here
    the k leading coordinates of the background effect c_j of the additive fit. Returns a Map."""
    x = unit(z).double()
    mu, _, coordinates = background_effects(x, i, j, k)
    x, concept = x - x.mean(0), coordinates[renumber(j)]
    concept = concept - concept.mean(0)
    value, vector = torch.linalg.eigh(x.T @ x / len(x))
    root = value.clamp(min=0).sqrt()
    inverse = torch.where(root > 1e-4 * root.max(), 1 / root, 0)  # float32's noise is not whitened
    whiten, colour = (vector * inverse) @ vector.T, (vector * root) @ vector.T
    q = torch.linalg.qr(whiten @ (x.T @ concept / len(x))).Q
    return Map(mu, (torch.ones_like(mu).diag() - colour @ q @ q.T @ whiten).T)


def recomposed(encoder, samples, grounds, by_place, seed):
    """The training foregrounds, by their masks, on other backgrounds: {"copy_paste": on two of the
    composites', "balanced_train": on one of each place}, each (embeddings [k, D], labels [k]), if any."""
    out, masked = {}, [k for k in (samples.split == 0).nonzero()[:, 0].tolist() if samples.cut[k]]
    for name, choices, copies in (("copy_paste", [grounds], 2), ("balanced_train", by_place, 1)):
        items, y = [], []
        for k, which, again in itertools.product(masked, range(len(choices)), range(copies)):
            g = rng(seed, "recompose", k, which, again)
            ground = choices[which][g.integers(len(choices[which]))]
            items.append(replace(samples.cut[k], ground=ground, view=View(flip=bool(g.random() < 0.5))))
            y.append(int(samples.y[k]))
        if items:
            out[name] = embedded(encoder, items, name, torch.tensor(y))[1:]
    return out


def probe_all(maps, x, x_bap, samples, augmented, l2, seed):
    """The probe on every map, and what else could be done: probes, the metrics of ROWS on the test split, of
    rows that cannot be computed the reasons, and which images are right [n]. maps: name -> g; x, x_bap:
    embeddings [n, D] of all images, by the encoder and by what BAP made of it; augmented: name ->
    (embeddings, labels) of images that join the training split, see recomposed."""
    y, group, split = (v.to(x.device) for v in (samples.y, samples.group(), samples.split))
    biased, val, test = (split == k for k in range(3))
    probes, correct, counts = {}, {}, samples.counts()[0].to(x.device)

    def probe(name, g, mask=biased, joining=None, weight=None):
        inputs = x_bap if name in ("bap", "bap_both", "val_probe_bap") else x
        rows, labels = g(inputs[mask]), y[mask]
        if joining:
            rows, labels = torch.cat([rows, g(joining[0])]), torch.cat([labels, joining[1]])
        probes[name] = fit_probe(rows, labels, l2, weight, len(samples.classes))
        correct[name] = probes[name].predict(g(inputs)) == y

    probe("erm", unit)
    for name, g in maps.items():
        probe(name, g)
    probe("val_probe", unit, val)
    if "bap" in maps:
        probe("val_probe_bap", maps["bap"], val)
    for name, joining in augmented.items():
        probe(name, unit, joining=joining)
    reasons = dict(group_weighted=unbalanced(samples, 0), dfr=unbalanced(samples, 1, 2, 8))
    reasons["dfr_val_scaled"] = reasons["dfr"]
    if not reasons["group_weighted"]:
        placed = biased & (group >= 0)
        probe("group_weighted", unit, placed, weight=1 / counts[group[placed]].double())
    for name, scaler in (("dfr", standard(x[biased])), ("dfr_val_scaled", None)):
        if not reasons[name]:
            correct[name] = dfr(x[val], y[val], group[val], seed, scaler).predict(x) == y
    reasons = {name: reason for name, reason in (reasons | MASKED).items() if name not in correct}
    methods = {}
    for name in ROWS:
        if name in correct:
            right, erm = correct[name][test], correct["erm"][test]
            over = (0.0, 0.0) if name == "erm" else paired_bootstrap(right, erm, group[test], seed=seed)
            metrics = group_metrics(right, samples, test.nonzero()[:, 0])
            methods[name] = dict(metrics, over_erm=list(over))
    return probes, methods, reasons, {name: right.cpu() for name, right in correct.items()}


def invariance(g, z, i, x, x_bap, samples, l2, seed):
    """Is the map's output invariant? Accuracy on test of a probe for the place, trained on val, raw and
    mapped, there also without penalty (free) and of a small network (mlp), as an adversary would; mean
    cosine of map outputs of one foreground on two backgrounds, and of two foregrounds."""
    place, split = samples.place.to(x.device), samples.split.to(x.device)
    val, test = (split == 1) & (place >= 0), (split == 2) & (place >= 0)

    def accuracy(v, penalty):
        if len(torch.unique(place[val])) < 2:
            return None  # no place to predict
        if penalty is None:  # by a small network
            predict = mlp(v[val], place[val])
        else:
            predict = fit_probe(v[val], place[val], penalty).predict
        return float((predict(v[test]) == place[test]).double().mean())

    at = renumber(i.cpu())
    order = torch.tensor(some_of(int(at.max()) + 1, len(at), seed))  # foregrounds with all of theirs
    pick = order[at].argsort(stable=True)[:2000].tolist()
    y, same = unit(g(z[pick])), i[pick][:, None] == i[pick]  # [n, D], [n, n]
    cosine, other = y @ y.T, ~torch.eye(len(pick), dtype=torch.bool, device=z.device)
    mapped = g(x_bap)
    return dict(
        place_probe_map=accuracy(mapped, l2),
        place_probe_map_free=accuracy(mapped, 1e-6),
        place_probe_map_mlp=accuracy(mapped, None),
        place_probe_raw=accuracy(unit(x), l2),
        cos_within=float(cosine[same & other].mean()),
        cos_between=float(cosine[~same].mean()),
    )


def mlp(x, y, hidden=64):
    """A network with one hidden layer, trained to predict y [n] from x [n, D], 300 steps of AdamW on all of
    them: the function that predicts. It starts from seed 0."""
    mean, scale, generator = x.mean(0), x.std().clamp(min=1e-12), torch.Generator().manual_seed(0)
    parameters = []
    for m, n in itertools.pairwise((x.shape[1], hidden, int(y.max()) + 1)):
        W = torch.randn(m, n, generator=generator, dtype=x.dtype) * (2 / m) ** 0.5
        parameters += [W.to(x.device).requires_grad_(), x.new_zeros(n).requires_grad_()]
    W1, b1, W2, b2 = parameters

    def logits(v):
        return ((v - mean) / scale @ W1 + b1).relu() @ W2 + b2

    optimiser = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01, fused=True)
    for _ in range(300):
        optimiser.zero_grad()
        F.cross_entropy(logits(x), y).backward()
        optimiser.step()
    return lambda v: logits(v).argmax(1)


# ----------------------------------------------------------------------------------------------------------
# what composites are made of, and how additive they are


def material(config, encoder, out):
    """What composites are made of: foregrounds, backgrounds, and notes. With embeddings from elsewhere not
    foregrounds but the composites that --foregrounds has, or none: Stored [N], foreground, background [N]."""
    kind, _, file = foregrounds.partition(":")
    if encoder.kind != "stored":
        wanted = "a folder; embeddings of composites go with --data=embeddings:FILE"
        expect(kind != "embeddings", "foregrounds", foregrounds, wanted)
        grounds, ground_notes = grounds_of(backgrounds, skip_bad)
        figures, notes = figures_of(foregrounds, grounds, encoder, skip_bad, out)
        return figures, grounds, notes + ground_notes
    if kind == "embeddings":
        grid = stored_composites(file)
        return grid, [], [f"{file}: embeddings of {len(grid[0])} composites"]
    none = torch.empty(0, dtype=torch.long)
    note = "no composites (--foregrounds=embeddings:FILE): no rows of bap, nullspace, leace, no additivity"
    return ([], none, none), [], [note]


def figures_of(where, grounds, encoder, skip_bad, out):
    """The foregrounds of --foregrounds, and notes. cut:DIR: those of photos of one object each, by a cutter
    that learned from composites of the default's cut-outs; out/cuts.html shows what it makes of them."""
    if not where.startswith("cut:"):
        return load_foregrounds(where, skip_bad)
    photos, notes = layers(where.removeprefix("cut:"), Photo, "foregrounds", skip_bad)
    teachers = layers(ASSETS / "foregrounds", Cutout, "foregrounds")[0]
    cells = composites(teachers, grounds, 640, 1, 0)[0]
    cuts, trusted, line = cut_out(encoder, photos, cells, 0, "photos")
    found, cuts = len(cuts), [cut for cut in cuts.values() if not cut.at_edge()]
    line += f"; {found - len(cuts)} of these are left out, as the edge of what the model sees cuts them"
    figures = [thumb(Composite(cut, None, None), Path(cut.path).name) for cut in cuts[:60]]
    lead, about = line + ": not used" * (not trusted), dict(foregrounds=where)
    sheet = page("flock, train.py", "Cut out", lead, [(where, *figures)], about, revision())
    write(out / "cuts.html", sheet)
    wanted = f"photos that the cutter can be trusted with ({line}); see {out / 'cuts.html'}, or bring masks"
    expect(trusted and len(cuts) >= 8, "foregrounds", where, wanted)
    rough = f"WARNING: photos are cut more roughly than composites: look at {out / 'cuts.html'}"
    return [Cutout(cut.path, cut) for cut in cuts], [*notes, line, rough]


def grounds_of(where, skip_bad, most=100):
    """The backgrounds of --backgrounds, and notes: a folder's, or of discovery:PATH the regions closest to
    the medoid of each kept cluster, up to `most` of each."""
    if not where.startswith("discovery:"):
        return layers(where, Ground, "backgrounds", skip_bad)
    discovery = load_discovery(where.removeprefix("discovery:"), f"--backgrounds={where}")
    kept = [c for c in discovery.clusters if c["kept"]]
    regions = [k for c in kept for k in c.get("regions", [])[:most]]
    cure = "a discovery that kept a cluster; without one leave --backgrounds out, or look at more photos"
    expect(regions, "backgrounds", where, cure)
    paths, boxes = [discovery.paths[k] for k in discovery.image[regions]], discovery.box[regions].tolist()
    expect(all(paths), "backgrounds", where, "a discovery on photos, not on images that lie in no file")
    grounds = [Crop(Photo(path), tuple(box)) for path, box in zip(paths, boxes, strict=True)]
    few = f"{len(grounds)} of {max(len(grounds), sum(c.get('n', 0) for c in kept))} regions"
    return grounds, [f"backgrounds: {few} that discover.py found the model to rely on, {most} a cluster"]


def place_grounds(samples, folders):
    """For each place a list of backgrounds to recompose on, from --place_backgrounds=DIR,DIR."""
    folders = folders.split(",") if folders else []
    wanted = f"one folder for each of the places {', '.join(samples.places)}"
    expect(len(folders) in (0, len(samples.places)), "place_backgrounds", ",".join(folders), wanted)
    if samples.name == "scenes" and not folders:
        folders = [str(ASSETS / "scenes" / "train" / place) for place in samples.places]
    return [layers(folder, Ground, "place_backgrounds")[0] for folder in folders]


def embedded(encoder, pictures, label, *numbers):
    """Of pictures, and numbers [N] of them, what can be embedded: list, embeddings [n, D], numbers [n]."""
    z = encoder.embed(pictures, label)
    good = z.isfinite().all(1)
    pictures = list(itertools.compress(pictures, good.tolist()))
    return pictures, z[good], *[v.to(z.device)[good] for v in numbers]


def how_additive(encoder, cells, z, i, j, seed):
    """The fit of z(f, b) = mu + a_f + c_b + e, and of 200 composites cos(z(f, b), z(f on grey) + z(b))."""
    additive = additivity(unit(z), i, j, seed=seed)
    if encoder.kind == "stored":  # neither part alone can be embedded
        return additive
    pick = some_of(len(z), 200, seed)
    f = encoder.embed([replace(cells[k], ground=None) for k in pick], "foregrounds on grey")
    b = encoder.embed([replace(cells[k], figure=None) for k in pick], "backgrounds alone")
    parts = torch.stack([unit(v) for v in (z[pick], f, b)])  # [3, N, D]
    parts = parts[:, parts.isfinite().all(2).all(0)]
    additive["flat"].update(cos_sum(*parts, seed=seed))
    logs = sphere_log(rearrange(parts, "k n d -> (k n) d"))
    additive["sphere"].update(cos_sum(*rearrange(logs, "(k n) d -> k n d", k=3), seed=seed))
    return additive


class Laps:
    """Seconds since the last lap, by name; a call ends a lap, and says what is coming."""

    def __init__(self):
        self.seconds, self.clock = {}, time.time()

    def __call__(self, name, coming=""):
        self.seconds[name], self.clock = time.time() - self.clock, time.time()
        if coming:
            say(f"{coming} ...")


# ----------------------------------------------------------------------------------------------------------
# what is shown


def average(runs, notes):
    """Results of all seeds -> their means; of a method that all have also its spread and the seeds' own. The
    mean of intervals' ends covers the mean at least as often: seeds are read on the same images."""

    def mean(values):
        if None in values:
            return None
        if isinstance(values[0], dict):
            return {k: mean([v[k] for v in values]) for k in values[0]}
        if isinstance(values[0], list):
            return [mean(list(v)) for v in zip(*values, strict=True)]
        return sum(values) / len(values) if isinstance(values[0], float) else values[0]

    methods = {}
    for name in ROWS:
        each = [r["methods"][name] for r in runs if name in r["methods"]]
        if 0 < len(each) < len(runs):
            notes.append(f"{name}: only {len(each)} of {len(runs)} seeds have it, left out")
        elif each:
            worst = torch.tensor([min(g["accuracy"] for g in m["groups"]) for m in each])
            spread = float(worst.std()) if len(each) > 1 else 0.0
            methods[name] = dict(mean(each), seeds=each, spread=spread)
    rest = {name: mean([r[name] for r in runs]) for name in ("additivity", "invariance", "zero_shot")}
    reasons = {name: r for run in runs for name, r in run.get("reasons", {}).items() if name not in methods}
    return dict(rest, methods=methods, reasons=reasons)


def geometry(results):
    """What console and page say of the composites' embeddings: header and rows of the table of shares, a
    line on sums, one on invariance."""
    fits, v, sums, place = results["additivity"], results["invariance"], "", ""
    shares = ("geometry", *SHARES), [(name, *[fit[share] for share in SHARES]) for name, fit in fits.items()]
    if "cos_sum" in fits["flat"]:
        sums = "cos(z(f, b), z(f) + z(b)): raw {cos_sum:.3f} (shuffled {cos_sum_shuffled:.3f}), "
        sums += "means removed {cos_sum_centred:.3f} ({cos_sum_centred_shuffled:.3f})"
    if v["place_probe_raw"] is not None:
        place = "accuracy of a probe for the place: raw {place_probe_raw:.3f}, map {place_probe_map:.3f} "
        place += "(unpenalised {place_probe_map_free:.3f}, a small network {place_probe_map_mlp:.3f}); "
    cosines = "cosine within a foreground {cos_within:.3f}, between {cos_between:.3f}"
    return shares, sums.format(**fits["flat"]), (place + cosines).format(**v)


def summary(results, samples):
    """The tables on the console."""
    methods, config = results["methods"], results["config"]
    keys, worst = (samples.worst, *AVERAGES), samples.worst.replace("_", " ")
    index, few = hardest(methods["erm"]["groups"], 8)
    groups, rows = [methods["erm"]["groups"][k] for k in index], []
    for name in [name for name in ROWS if name in methods or name in results["reasons"]]:
        m, over = methods.get(name, {}), results["reasons"].get(name)
        if m:
            over = "{:+.3f} to {:+.3f}".format(*m["over_erm"])
        accuracies = [m["groups"][k]["accuracy"] if m else None for k in index]
        rows.append((name, *[m.get(k) for k in keys], *accuracies, over))
    lines, spread = [], ""
    if results["zero_shot"]:
        lines.append("\n" + table(*zero_rows(results["zero_shot"], samples.worst)))
    if results["additivity"]:
        shares, sums, invariant = geometry(results)
        lines += ["\nHow additive are embeddings of composites? Shares of their variance"]
        lines += [table(*shares), *filter(None, [sums]), "\nIs the map invariant?", invariant]
    if config["seeds"] > 1:
        best = "bap" if "bap" in methods else "erm"
        spread = f"; means of {config['seeds']} seeds, {best}'s {worst} +- {methods[best]['spread']:.3f}"
    lines.append(f"\nTest split, l2 = {config['l2']}{spread}. Over erm: {worst}, 95 % interval")
    header = ("method", "worst", "mean", "weighted", *range(1, len(groups) + 1), "over erm")
    names = [f"{samples.group_name(g['y'], g['place'])} (n={g['n']})" for g in groups]
    named = ", ".join(f"{k} {name}" for k, name in enumerate(names, 1))
    return filled("\n".join([*lines, table(header, rows), f"groups{few}: {named}"]))


def hardest(groups, most):
    """Numbers of the groups with the lowest accuracies, at most so many, in their order; and words on it."""
    index = sorted(range(len(groups)), key=lambda k: groups[k]["accuracy"])[:most]
    few = f", of {len(groups)} the {most} in which erm is least accurate"
    return sorted(index), few * (len(groups) > most)


def headline(methods, samples, best, other):
    """The page's title, and the numbers below it."""
    erm, ours, kind = methods["erm"], methods[best], samples.worst.replace("_", " ")
    (low, high), least = ours["over_erm"], min(g["interval"][0] for g in ours["groups"])
    if best == "erm":
        title = "A plain probe, as there are no composites for BAP."
    elif low > 0 and len(samples.places) > 1 and least > 1 / len(samples.classes):  # chance
        title = "The probe went by the background. With BAP it goes by the foreground."
    elif low > 0:
        title = f"BAP made the {kind} better."
    elif high < 0:
        title = f"BAP made the {kind} worse."
    else:
        title = f"BAP made the {kind} neither clearly better nor worse."
    worst = min(erm["groups"], key=lambda g: g["accuracy"])
    worst = samples.group_name(worst["y"], worst["place"])
    numbers = [(f"{erm[samples.worst]:.0%}", f"{kind} of a plain probe ({worst})")]
    if best == "bap":
        gain = 100 * (ours[samples.worst] - erm[samples.worst])
        what = f"{kind} with BAP: {gain:+.0f} points (95 %: {100 * low:+.0f} to {100 * high:+.0f})"
        numbers.append((f"{ours[samples.worst]:.0%}", what))
    return title, [*numbers, (f"{methods[other][samples.worst]:.0%}", ROWS[other])]


def report(results, fitted):
    """The page: what BAP changed, group by group; what it now gets right, with pictures; how it was made."""
    samples, methods, config = fitted.samples, results["methods"], results["config"]
    reasons, test = results["reasons"], samples.split == 2
    best = "bap" if "bap" in methods else "erm"  # without composites
    other = "balanced_train" if "balanced_train" in methods else "val_probe"
    title, numbers = headline(methods, samples, best, other)
    names = [samples.group_name(*pair) for pair in zip(samples.y, samples.place, strict=True)]
    predicted = fitted.probes[best].predict(fitted.map.to(fitted.x.device)(fitted.x)).tolist()
    taken = [f"{name}, taken for {samples.classes[k]}" for name, k in zip(names, predicted, strict=True)]
    mended, wrong = test & fitted.correct[best] & ~fitted.correct["erm"], test & ~fitted.correct[best]
    compared, bars = tuple(dict.fromkeys(("erm", best, other))), []
    index, few = hardest(methods["erm"]["groups"], 12)
    for each in ([methods[name]["groups"][k] for name in compared] for k in index):
        y, place, n = (each[0][k] for k in ("y", "place", "n"))
        count = int(samples.counts()[0, y * len(samples.places) + place])
        note = f"{count or 'none'} in training, n = {n}"
        bars.append((samples.group_name(y, place), note, [(m["accuracy"], m["interval"]) for m in each]))
    picked = torch.linspace(0, len(fitted.cells) - 1, 12 * bool(fitted.cells)).long().tolist()
    pictures = [thumb(fitted.cells[k], f"composite {k}") for k in picked]
    pictures += [thumb(Composite(cut, None, None), "cut out of the target") for cut in fitted.cuts[:6]]
    keys, rows = (samples.worst, *AVERAGES), []
    for name in [name for name in ROWS if name in methods or name in reasons]:
        m = methods.get(name, {})
        rows.append((name, *[m.get(k) for k in keys], reasons.get(name, ROWS[name])))
    header = "method", *[key.replace("_", " ") for key in keys], "what"
    additive, invariant = ["of composites: none"], ""
    if results["additivity"]:
        shares, sums, invariant = geometry(results)
        fit = "Shares of the variance of composites in z = mu + a + c + e, flat and after the log map."
        additive = tag("p", fit), html_table(*shares), tag("p", sums)
    sections = [
        (f"Accuracy of each group, with 95 % intervals{few}", dots("groups", bars, compared)),
        ("What the plain probe got wrong, and BAP gets right", *examples(samples, mended, names)),
        (f"What is still wrong: {int(wrong.sum())} of {int(test.sum())}", *examples(samples, wrong, taken)),
        ("The training data", *examples(samples, samples.split == 0, names)),
        ("Composites to pre-train on", *(pictures or ["none"])),
        ("Methods", html_table(header, rows)),
        ("Additivity", *additive),
        ("Invariance", tag("p", invariant)),
    ]
    if results["zero_shot"]:
        sections.insert(1, ("Zero-shot", html_table(*zero_rows(results["zero_shot"], samples.worst))))
    kind, _, discovery = config["backgrounds"].partition(":")
    links = linked("what it looks at", discovery * (kind == "discovery"), "discovery.html", config["out_dir"])
    kicker = f"flock, train.py: {Path(config['data']).name} by {config['model']}, seed {config['seed']}"
    means = [f"{methods[name]['avg_group_mean']:.1%}" for name in dict.fromkeys(("erm", best))]
    lead = f"Mean of the groups: {' → '.join(means)}. No place label was used to train either probe."
    return page(kicker, title, lead, sections, config, results["git"], results["notes"], numbers, links)


def examples(samples, mask, captions, most=6):
    """Figures of up to `most` images where the mask [n] is true, of each group alike."""
    group = samples.group()
    indices = [(mask & (group == g)).nonzero()[:, 0].tolist() for g in group[mask].unique()]
    few = [k for index in indices for k in index[: max(1, most // len(indices))]]
    return [thumb(samples.items[k], captions[k]) for k in few[:most]] or ["none"]


def zero_rows(both, worst):
    """Header and rows of the table of zero-shot accuracies before and after."""
    columns = worst, "avg_group_mean", "overall"
    return ("zero-shot, test split", *columns), [(name, *[m[c] for c in columns]) for name, m in both.items()]


def others_here(out, names):
    """Says which of these files, which this run has not written, lie in its folder."""
    there = [name for name in names if (out / name).exists()]
    if there:
        say(f"{out}: {', '.join(there)}: of another run, not of this one")


# ----------------------------------------------------------------------------------------------------------
# what a run leaves, and goes on from


def save_results(out, results, fitted):
    """Writes what came out: ckpt.pt, report.html, results.json, trained weights.safetensors; and says it."""
    (out / "results.json").unlink(missing_ok=True)  # it would be of another run than what comes now
    names, other = ["ckpt.pt", "map.npz", "report.html"], ["finetune.json"]
    if fitted.weights:
        write(out / "weights.safetensors", fitted.weights)
        names.append("weights.safetensors")
        trained = dict(erm="bap", bap="bap", val_probe_bap="val_probe_bap")  # the probes on its embeddings
        fitted = fitted._replace(probes={name: fitted.probes[of] for name, of in trained.items()})
    else:
        other += ["weights.safetensors", "log.csv"]
    state = dict(config=results["config"], git=results["git"], fingerprint=fitted.encoder.fingerprint)
    state.update(map=fitted.map.state_dict(), power=fitted.map.power)
    state.update(probes={name: vars(probe) for name, probe in fitted.probes.items()})
    state.update(classes=fitted.samples.classes, places=fitted.samples.places)
    save_checkpoint(out / "ckpt.pt", state)
    write(out / "map.npz", map_bytes(fitted))
    write(out / "report.html", report(results, fitted))
    results["files"] = {name: file_digest(out / name, "") for name in names}
    write_json(out / "results.json", results)  # at the end: it is there only if all the rest is
    for name in PARTIAL:
        (out / name).unlink(missing_ok=True)
    for line in results["notes"]:
        say(line)
    say(summary(results, fitted.samples), True)
    others_here(out, other)


def map_bytes(fitted):
    """map.npz: the map (mu [D], W [D, D], power) and its probe (weight [D, C], bias [C], classes [C]; of bap,
    or without composites of erm) for those who have numpy only; the README shows how it is applied."""
    probe, buffer = fitted.probes.get("bap", fitted.probes["erm"]), io.BytesIO()
    weight = probe.weight / torch.as_tensor(probe.scale).reshape(-1, 1)  # [D, C]
    bias = probe.bias - torch.as_tensor(probe.mean) @ weight
    arrays = dict(weight=weight, bias=bias, **fitted.map.state_dict())
    arrays = {k: v.detach().cpu().numpy() for k, v in arrays.items()}
    np.savez(buffer, power=fitted.map.power, classes=np.array(fitted.samples.classes, str), **arrays)
    return buffer.getvalue()


def head_of(config, encoder, samples, *parts):
    """What files of a run say of it: its flags, revision, encoder, and a hash of all that it learns from."""
    inputs = sha256(" ".join([encoder.fingerprint, samples.digest, *parts]))
    return dict(config=config, git=revision(), fingerprint=encoder.fingerprint, inputs=inputs)


def finished(path, head):
    """Whether there are results already, with --resume; Complaint where they are not of the same run."""
    if not head["config"]["resume"]:
        return False
    if not path.is_file():
        say(f"--resume: {path.parent}: nothing of an interrupted run, it begins anew", True)
        return False
    check_same(path, read_json(path, "JSON"), head)
    say(f"{path}: finished already; without --resume it runs anew", True)
    return True


def unfinished(path, head, encoder):
    """What an interrupted run of the same flags on the same data has left, with --resume; else None, and
    rank 0 puts it aside, as it would be in the way of this run's own."""
    if not path.is_file():
        return None
    if head["config"]["resume"]:
        state = load_checkpoint(path, encoder)
        check_same(path, state, head, "seeds")
        return state
    if ranks()[0] == 0:
        path.replace(f"{path}.old")
        say(f"{path}: of an interrupted run; this one begins anew and keeps it as {path.name}.old", True)
    return None


def check_same(path, made, head, *free):
    """Complaint where the file of a run says that it was made of other flags, images, labels, discovery."""
    free += "resume", "threads", "save_every", "wandb", "quiet"  # change no result, nor do these
    free += "out_dir", "cache_dir", "resize_once"
    with reading(path, *LEFT):
        flags = {k: made["config"].get(k) for k in head["config"]}
        differ = [f"--{k}={v}" for k, v in flags.items() if k not in free and v != head["config"][k]]
    if not differ and made.get("inputs") != head["inputs"]:
        differ = ["other images or labels, or of another discovery"]
    cure = "give the same flags and data, or no --resume"
    require(not differ, f"--resume: {path} was made with {', '.join(differ)}; {cure}")


@contextlib.contextmanager
def until_asked():
    """Ctrl-C waits for the end of a step: gives a list, not empty from then on. A second stops at once, as
    the first does where there are several processes: one of them must not stop alone."""
    asked, before = [], signal.getsignal(signal.SIGINT)

    def ask(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked.append(True)
        say("stopping at the end of this step; Ctrl-C once more stops at once", True)

    if ranks()[1] == 1:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------
# fine-tuning on image-caption pairs, and its mitigations


def finetune(config, encoder, samples):
    """--method=finetune and the mitigations: fits, and writes weights.safetensors, finetune.json, log.csv."""
    expect(seeds == 1, "seeds", seeds, f"1 with --method={method}: start it once for each --seed")
    expect(not wandb or find_spec("wandb"), "wandb", True, "False, or pip install wandb")
    rank, world = ranks()
    expect(pairs % world == 0, "pairs", pairs, f"a multiple of {world} processes")
    out, started, row = Path(out_dir), time.time(), METHODS[method]
    if skip_bad:
        z = encoder.embed(samples.items, "all images")  # None on ranks above 0
        good = from_first(None if z is None else z.isfinite().all(1).cpu())
        if not good.all():
            samples = check(samples.keep(good))
    task = pairs_of(samples, captions, pairs)
    task.seed, task.loss, task.tau, task.w = seed, loss, region_temperature, region_weight
    encoder.texts(task.prompts)  # complains if there is no text tower
    notes = encoder.notes + samples.notes + [samples.prompt_line()]
    if discovery or row.discovery:
        notes += discovered(samples, encoder, task, discovery, clusters)
    for line in notes:
        say(line)
    regions = getattr(task, "state", torch.zeros(0)).numpy().tobytes()
    path, head = out / PARTIAL[1], head_of(config, encoder, samples, sha256(regions))
    if not path.is_file() and finished(out / "finetune.json", head):
        return
    before, student = zero_shot(encoder, samples), encoder.with_module(copy.deepcopy(encoder.module))
    if loss == "sigmoid" and getattr(student.module, "logit_bias", None) is None:
        bias = torch.tensor(-10.0, device=encoder.device)  # as SigLIP starts: nearly all pairs are no pairs
        student.module.logit_bias = torch.nn.Parameter(bias)
    state = unfinished(path, head, encoder)
    if method == "jtt" and not state:
        task.weight = first_errors(student, task, config)
    rows = fit(student, task, row, head, path, state)
    if rank:
        return
    after = zero_shot(student, samples)
    (out / "finetune.json").unlink(missing_ok=True)  # it would be of another run than what comes now
    write(out / "weights.safetensors", weights_bytes(student.module, config=config | ANEW, git=head["git"]))
    seconds = dict(total=time.time() - started, images_per_s=rows[-1]["images_per_s"])
    write_json(out / "finetune.json", dict(head, notes=notes, before=before, after=after, seconds=seconds))
    path.unlink(missing_ok=True)
    say(table(*zero_rows(dict(before=before, after=after), samples.worst)), True)
    others_here(out, ["results.json", "report.html", "ckpt.pt", "map.npz"])
    what = "weights.safetensors (for --pretrained), finetune.json, log.csv"
    say(f"\n{out}: {what} written, {time.time() - started:.0f} s", True)


def zero_shot(encoder, samples, x=None):
    """Accuracies of the test split by the classes' texts, as group_metrics. x: embeddings of all images."""
    index = (samples.split == 2).nonzero()[:, 0]
    if x is None:
        z = encoder.embed([samples.items[k] for k in index], "test images")
    else:
        z = x[index.to(x.device)]
    if z is None:  # rank 0 has them
        return None
    texts = encoder.prompts(samples.class_prompts(), samples.classes)  # [C, D]
    correct = (unit(z) @ texts.T).argmax(1).cpu() == samples.y[index]
    return group_metrics(correct, samples, index)


def pairs_of(samples, captions, pairs):
    """The task of fine-tuning: items, captions, y [n], C, prompts and weights, 1, of the training split."""
    biased, C = samples.keep(samples.split == 0), len(samples.classes)
    prompts, y = [texts[0] for texts in samples.class_prompts()], biased.y
    require(len(y.unique()) > 1, f"{samples.name}: its training images are of one class; contrast needs two")
    texts = biased.captions
    if captions != "own":
        texts = [prompts[k] for k in y.tolist()]
    if captions == "place":
        named = [*[f", {place}" for place in samples.places], ""]  # of place -1: none
        texts = [text.rstrip(".") + named[k] for text, k in zip(texts, biased.place.tolist(), strict=True)]
    missing = [k for k, text in enumerate(texts) if not text.strip()]
    if missing:
        what = f"{len(missing)} of {len(texts)} images have no caption, the first is number {missing[0]}"
        raise Complaint(f"{samples.name}: {what}; add them, or use --captions=class")
    expect(len(texts) >= pairs, "pairs", pairs, f"at most {len(texts)}, the number of training images")
    weight = torch.ones(len(y))
    return SimpleNamespace(items=biased.items, captions=texts, y=y, C=C, prompts=prompts, weight=weight)


def load_discovery(path, flag=""):
    """What discover.py wrote: discovery.json, or its folder, with discovery.npz beside it.

    Returns a namespace: config; kept, ids of the kept clusters, ranked; clusters, as in discovery.json;
    medoids [K, D] unit-norm, one row for each cluster id; mean [D], taken from unit region embeddings
    before they are compared with medoids (zeros: none was); clipped, whether cosines below zero counted as
    zero; fingerprint, of the encoder; regions, region_encoder and data as the flags were; paths [n]; and
    for each region image [N] (row of paths), box [N, 4], label [N].
    """
    flag = flag or f"--discovery={path}"
    require(Path(path).exists(), f"{flag}: no such file; expected what discover.py writes, or its folder")
    path = Path(path) / "discovery.json" if Path(path).is_dir() else Path(path)
    what = "discovery.json and discovery.npz as discover.py writes them"
    tree = read_json(path, what)
    with reading(path, what, "run discover.py again"):
        file = np.load(bounded(path.with_suffix(".npz")))
        if tree.get("npz", same := file_digest(path.with_suffix(".npz"), "")) != same:
            raise ValueError("discovery.npz beside it is of another run")
        kinds = dict(medoids="f4", mean="f4", box="f4", image="i8", label="i8")
        arrays = {k: torch.from_numpy(file[k].astype(kind, casting="same_kind")) for k, kind in kinds.items()}
        words = {k: str(file[k]) for k in ("fingerprint", "regions", "region_encoder", "data")}
        d = SimpleNamespace(**arrays, **words, clusters=tree["clusters"], clipped=bool(file["clipped"]))
        d.paths = [str(name) for name in file["paths"]]
        d.config = {k: v if isinstance(v, bool) else str(v) for k, v in tree["config"].items()}
        if not d.config.get("embeddings") and not {"model", "pretrained", "quick_gelu"} <= d.config.keys():
            raise ValueError("its config does not say which model")
        d.kept = [int(c["id"]) for c in d.clusters if c["kept"]]
        if not 0 <= min(d.kept, default=0) <= max(d.kept, default=0) < len(d.medoids):
            raise ValueError("it has a cluster without a medoid")
        rows = [k for c in d.clusters if c["kept"] for k in c.get("regions", [])]
        fitting = (
            0 <= d.image.min() <= d.image.max() < len(d.paths),
            all(type(k) is int and 0 <= k < len(d.image) for k in rows),
            d.box.shape == (len(d.image), 4) and ((d.box >= 0) & (d.box <= 1)).all(),
            d.medoids.shape[1:] == d.mean.shape and (d.medoids - d.mean).isfinite().all(),
        )
        if not all(fitting) or d.kept and not clusters_used(d):
            raise ValueError("its arrays do not fit each other")
        return d


def stage_one(path, samples, encoder):
    """What --discovery holds, and the encoder that it was made with; Complaint if it does not fit here."""
    flag = f"--discovery={path}"
    require(path, f"{flag}: this method needs what discover.py found; run it on the fine-tuned model first")
    d = load_discovery(path)
    made, cure = d.config, "run discover.py with"
    require(not made.get("embeddings"), f"{flag}: made from --embeddings; {cure} --data and --model")
    require(d.data == samples.name, f"{flag}: made on {d.data}, not on {samples.name}; {cure} this --data")
    require(d.kept, f"{flag}: no cluster was kept, nothing to hold down; try other --regions or --k")
    scored = all(c.get("score", 0) is not None for c in d.clusters if c["kept"])
    require(scored, f"{flag}: by --method={made.get('method')}, which keeps no cluster; take --method=ravl")
    how = {k: getattr(encoder, k) for k in ("device", "dtype", "batch", "threads", "cache")}
    test_size = made.get("test_size", False)
    finder = load_encoder(made["model"], made["pretrained"], made["quick_gelu"], test_size, **how)
    named = f"--model={made['model']} --pretrained={made['pretrained']!r}"
    changed = f"{flag}: {named}: its weights are others now; run discover.py again"
    require(finder.fingerprint == d.fingerprint, changed)
    return d, finder


def discovered(samples, encoder, task, path, most):
    """Adds to the task what was discovered: boxes [n, R, 4] of each image's regions in shares of what the
    model sees; state [n, R], 1 in a discovered cluster, 0 not, -1 no region; feature [n], whether any is;
    group [n], label x feature. Regions are assigned once, by the fixed medoids and encoder of stage 1.
    Returns notes."""
    d, finder = stage_one(path, samples, encoder)
    pictures, notes = load_regions(d.regions, task.items, finder.frame)
    boxes = not any(p.mask for p in pictures)
    require(boxes, f"--discovery={path}: its regions are masks; the region-aware loss takes boxes or a grid")
    _, r = region_embeddings(finder, pictures, d.region_encoder)  # None on ranks above 0
    used, counts = torch.tensor(clusters_used(d, most)), [len(p.boxes) for p in pictures]
    inside = from_first(None if r is None else torch.isin(assign_regions(r.cpu(), d), used).long())
    boxes = [replace(p, frame=encoder.frame(*picture_size(p.picture))).in_frame() for p in pictures]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    task.boxes = pad(boxes)  # [n, R, 4]
    task.state = pad(list(inside.split(counts)), padding_value=-1)  # [n, R]
    task.feature = (task.state == 1).any(1)
    task.group = 2 * task.y + task.feature.long()
    n, having, without = len(pictures), int(task.feature.sum()), int((~(task.state == 0).any(1)).sum())
    what = f"{having} of {n} training images have a region in the {len(used)} clusters discovered"
    require(having and without < n, f"--discovery={path}: {what}, {without} have no other; nothing to learn")
    if having == n:
        what = f"WARNING: {what}: what goes by an image's having one cannot help"
    if without:
        what += f"; {without} have no region without it, which ravl's L_R and L_A skip"
    return notes + [what]


def assign_regions(r, discovery):
    """Region embeddings [N, D] of the stage-1 encoder -> for each the cluster with the nearest medoid [N]."""
    r = unit(unit(r.float()) - discovery.mean)
    least = 0 if discovery.clipped else -1
    return torch.cat([(part @ discovery.medoids.T).clamp(min=least).argmax(1) for part in r.split(1 << 16)])


def clusters_used(discovery, most=0):
    """Which kept clusters of a discovery count as the discovered feature, the best first: the first `most`,
    or, if 0, those that come to at least half of the best one's score x evenness. Evenness, our reading,
    not in the paper: 1 - (largest - smallest share of a class's images that have a region in the
    cluster), over the classes present on both sides. A feature that only misleads is as frequent in one
    class as in another wherever it is not tied to the label, as in the balanced splits that discover.py
    looks at; the class's own object is not."""
    worth = {}
    for c in discovery.clusters:
        if c["kept"]:
            gaps = (c.get("gaps") or {}).values()
            shares = [g["n_in"] / (g["n_in"] + g["n_out"]) for g in gaps] or [0.0]
            worth[c["id"]] = (c.get("score") or 0.0) * (1 - max(shares) + min(shares))
    ranked = sorted(discovery.kept, key=lambda c: -worth[c])
    return ranked[:most] if most else [c for c in ranked if worth[c] >= 0.5 * worth[ranked[0]]]


def first_errors(encoder, task, config):
    """JTT's first stage: a quarter of the steps of plain fine-tuning, from the same weights; JTT_WEIGHT for
    the training images that are then wrong, 1 for the rest [n]. The encoder is put back."""
    start = copy.deepcopy(encoder.module.state_dict())
    quarter = max(1, config["steps"] // 4)
    fit(encoder, task, METHODS["finetune"], dict(config=dict(config, steps=quarter, wandb=False)))
    z, g = encoder.embed(task.items, "training images"), encoder.prompts([[text] for text in task.prompts])
    wrong = from_first(None if z is None else (unit(z) @ g.T).argmax(1).cpu() != task.y)
    counts = f"jtt: {int(wrong.sum())} of {len(wrong)} training images are wrong after {quarter} steps"
    say(f"{counts}, each counts {JTT_WEIGHT:g} times")
    encoder.module.load_state_dict(start)
    return torch.where(wrong, JTT_WEIGHT, 1.0)


class Towers(torch.nn.Module):
    """Both towers in one forward pass, for DDP and torch.compile."""

    def __init__(self, module, kind, raw, checkpointing):
        super().__init__()
        self.module, self.kind, self.raw = module, kind, raw
        if checkpointing:
            getattr(module, "set_grad_checkpointing", bool)(True)

    def forward(self, x, boxes, texts, prompts):
        """Images [N, 3, H, W], boxes [N, R, 4] in shares of the image, tokens [M, L], [C, L]; each but x
        may be None -> dict of unit-norm z [N, D], t [M, D], g [C, D], cos [N, R, C] of the regions, from
        the same pass, and g; and scale, bias of the logits; if raw only z, not normalised."""
        if self.raw:
            return dict(z=embeddings(self.module, self.kind, x).float())
        out = {}
        if boxes is None:
            out["z"] = self.module.encode_image(x)
        else:
            out["z"], m = with_map(self.module, "open_clip", x)  # [N, D], [N, h, w, D]
        tokens = {name: v for name, v in dict(t=texts, g=prompts).items() if v is not None}
        if tokens:
            # in one call, as the vocabulary's gradient is dense
            both = self.module.encode_text(torch.cat(list(tokens.values())))
            out.update(zip(tokens, both.split([len(v) for v in tokens.values()]), strict=True))
        out = {k: unit(v.float()) for k, v in out.items()}
        if boxes is not None:
            h, w = m.shape[1:3]
            cells = torch.stack([boxes[:, :, ::2] * w, boxes[:, :, 1::2] * h], 3)  # [N, R, corners, (x, y)]
            image = torch.arange(len(x), device=x.device).repeat_interleave(boxes.shape[1])
            cos, _ = region_logits(m, rearrange(cells, "n r k xy -> (n r) (k xy)"), image, out["g"])
            out["cos"] = rearrange(cos, "(n r) c -> n r c", n=len(x))
        out["scale"] = self.module.logit_scale.exp()
        if getattr(self.module, "logit_bias", None) is not None:
            out["bias"] = self.module.logit_bias * 1.0
        return out


def fit(encoder, task, row, head, path=None, state=None):
    """Trains encoder.module on a task by a row of METHODS. Returns the rows of the log.

    task: items, y [n], C, seed, weight [n], and what the row's draw and cost take. head: what a checkpoint
    says of the run, its flags as config; path: where it is written, if at all; state: of one to go on from,
    read from there. Embeddings of all processes are gathered before the loss, with their gradients, so that
    their number does not change it. Batch norm keeps its statistics.
    """
    (rank, world), module, config = ranks(), encoder.module, head["config"]
    steps, pairs, writes = config["steps"], config["pairs"], path is not None and rank == 0
    words = Words(encoder, task, row)
    parameters = choose_parameters(encoder, row, config)
    groups = [dict(params=[p for p in parameters if p.dim() > 1], weight_decay=WEIGHT_DECAY)]
    groups.append(dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0))  # biases, scales
    optimiser = torch.optim.AdamW(groups, config["learning_rate"], (0.9, 0.98), fused=True)  # betas: CLIP's
    forward = forward_of(encoder, task, row, config, words)
    start, rows = 0, []
    task.q = torch.full((2 * task.C,), 1 / (2 * task.C))  # of gdro_cost, label x feature
    if state:
        with reading(path, *LEFT):
            module.load_state_dict(state["module"])
            optimiser.load_state_dict(state["optimiser"])
            task.q, task.weight = state["q"].view(2 * task.C), state["weight"].view(len(task.y))
            start, rows = range(steps + 1).index(state["step"]), list(map(dict, state["rows"]))
        say(f"--resume: goes on behind step {start}", True)
    feed, draw = Feed(task.items, encoder), row.draw(task, pairs)
    # what a batch costs is computed on the device, where near.q moves on; images are drawn on the CPU
    tensors = {k: v.to(encoder.device) for k, v in vars(task).items() if isinstance(v, torch.Tensor)}
    near = SimpleNamespace(**vars(task) | tensors)
    amp = config["dtype"] == "bfloat16" or (config["dtype"] == "auto" and encoder.on_gpu and encoder.bf16)
    clock, count, warned = time.time(), 0, row is ANCHORS
    share = slice(rank * pairs // world, (rank + 1) * pairs // world)  # of a batch, this process's images

    def keep(step):
        if writes:
            states = dict(module=module.state_dict(), optimiser=optimiser.state_dict(), q=near.q)
            states |= dict(weight=task.weight, step=step, rows=rows)
            save_checkpoint(path, head | states)

    feed.ahead(draw(start)[share])
    with until_asked() as asked:
        for step in range(start, steps):
            for group in optimiser.param_groups:
                group["lr"] = rate(step, steps, config["learning_rate"])
            ids, x = draw(step), feed.get()
            feed.ahead(draw(step + 1)[share])
            if not warned and len(task.y[ids].unique()) == 1:
                warned = True
                say(f"step {step}: the batch has one class only and cannot tell classes apart; raise --pairs")
            with torch.autocast(encoder.device.split(":")[0], torch.bfloat16, enabled=amp):
                e = forward(x, ids[share])
            terms = row.cost(e, ids.to(encoder.device, non_blocking=True), near)
            optimiser.zero_grad()
            total = sum(weight * value for weight, value in terms.values())
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            numbers = [v.detach().float() for v in (total, *[value for _, value in terms.values()], norm)]
            numbers = torch.stack(numbers).tolist()  # the one wait of a step
            values = dict(zip(("loss", *terms, "gradient"), numbers, strict=True))
            bad = [name for name in (*terms, "gradient") if not math.isfinite(values[name])]
            if bad:
                keep(step)
                kept = f"the state before it is in {path}; " * bool(path)
                cure = "start anew with a lower --learning_rate" + ", or with --dtype=float32" * amp
                raise Complaint(f"step {step}: {' and '.join(bad)} not finite; {kept}{cure}")
            optimiser.step()
            if hasattr(module, "logit_scale"):
                module.logit_scale.data.clamp_(0, math.log(100))  # as CLIP does
            count += pairs
            if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                speed = count / (time.time() - clock)
                rows.append(dict(step=step + 1, **values, lr=group["lr"], images_per_s=speed))
                log(rows, config, writes)
                clock, count = time.time(), 0
            if (step + 1) % config["save_every"] == 0 or step + 1 == steps or asked:
                keep(step + 1)
            if asked:
                raise KeyboardInterrupt
    feed.close()
    words.restore()
    module.requires_grad_(True)
    return rows


def rate(step, steps, peak):
    """The learning rate: linear warm-up, then a cosine to zero."""
    rising = WARMUP * steps
    falling = math.pi * max(0, step - rising) / max(1, steps - rising)
    return peak * min((step + 1) / max(1, rising), 0.5 + 0.5 * math.cos(falling))


class Words:
    """A tokenizer for the texts of a task, and as the text tower's vocabulary the words in these alone: for
    all 49,408 gradient and step took a tenth of the controlled protocol. Others, which would but decay, stay
    as they are (ours)."""

    def __init__(self, encoder, task, row):
        self.module, self.used = encoder.module, None
        if not row.uses:
            return
        self.tokenize, texts = encoder.tokenizer(), {*task.captions * ("texts" in row.uses), *task.prompts}
        if getattr(self.module, "text_pool_type", "") == "argmax":  # elsewhere a number may have a meaning
            self.full, self.used = self.module.token_embedding, self.tokenize([*texts]).unique()
            rows = self.full.weight.detach()[self.used.to(encoder.device)]
            self.module.token_embedding = torch.nn.Embedding.from_pretrained(rows, freeze=False)

    def __call__(self, texts):
        """n texts -> tokens [n, L], numbered in the same order, as the largest ends a text."""
        tokens = self.tokenize(texts)
        return tokens if self.used is None else torch.searchsorted(self.used, tokens)

    def restore(self):
        """Puts what was learned back into the whole vocabulary."""
        if self.used is not None:
            learned, self.module.token_embedding = self.module.token_embedding.weight.detach(), self.full
            self.full.weight.data[self.used.to(learned.device)] = learned


def forward_of(encoder, task, row, config, words):
    """A function from images [N, 3, H, W] and their rows [N] to embeddings (see Towers) of all processes."""
    towers = Towers(encoder.module, encoder.kind, row is ANCHORS, config["checkpointing"])
    if config["checkpointing"] and not hasattr(encoder.module, "set_grad_checkpointing"):
        say(f"WARNING: --checkpointing has no effect: {encoder.name} cannot")
    if config["compile"]:
        towers = torch.compile(towers)
    if ranks()[1] > 1:
        towers = torch.nn.parallel.DistributedDataParallel(towers)
    if "texts" in row.uses:
        texts = list(dict.fromkeys(task.captions))
        number = {text: k for k, text in enumerate(texts)}
        which = torch.tensor([number[caption] for caption in task.captions])
        tokens = words(texts)
    prompts = None
    if "prompts" in row.uses:
        prompts = words(task.prompts).to(encoder.device)

    def forward(x, ids):
        boxes = captions = None
        if "regions" in row.uses:
            boxes = task.boxes[ids].to(encoder.device, non_blocking=True)
        if "texts" in row.uses:  # a caption of several images is embedded once
            distinct, back = torch.unique(which[ids], return_inverse=True)
            captions = tokens[distinct].to(encoder.device, non_blocking=True)
        e = towers(x, boxes, captions, prompts)
        if captions is not None:
            e["t"] = e["t"][back.to(encoder.device, non_blocking=True)]
        if dist.is_initialized():  # rows of all processes, in the order of ranks, with their gradients
            from torch.distributed.nn.functional import all_gather

            e.update({k: torch.cat(all_gather(e[k].contiguous())) for k in ("z", "cos", "t") if k in e})
        return e

    return forward


def choose_parameters(encoder, row, config):
    """The parameters to train, by --train; others, and what the method has no use for, are frozen, as DDP
    wants every gradient. last_blocks: the last quarter of the image tower's blocks (layers, stages), and
    what comes after them."""
    module, part = encoder.module, config["train"]
    names = [name for name, _ in module.named_parameters()]
    image = {name for name in names if name.startswith("visual.") or encoder.kind != "open_clip"}
    ends = "visual.proj visual.head visual.attnpool.c_proj text_projection text.proj text.text_proj".split()
    projections = {name for name in names if name.startswith(tuple(ends))}
    chosen = {"image": image, "text": set(names) - image, "projection": projections}.get(part, set(names))
    if part == "last_blocks":
        chosen = last_quarter([name for name in names if name in image]) | (projections & image)
    chosen -= {"logit_scale", "logit_bias"}
    if row is not ANCHORS:
        chosen.add("logit_scale")
        if config["loss"] != "infonce" and "texts" in row.uses:
            chosen.add("logit_bias")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
    heads = module.get_classifier() if encoder.kind == "timm" else ()  # of distilled ones a tuple
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.requires_grad_(False)
    visual = getattr(module, "visual", None)
    # averaged tokens leave the class token without a gradient
    if getattr(visual, "pool_type", "") == "avg" and not visual.positional_embedding.requires_grad:
        visual.class_embedding.requires_grad_(False)
    return [p for p in module.parameters() if p.requires_grad]


def last_quarter(names):
    """Of an image tower's parameters those in the last quarter of its numbered blocks, and behind them."""
    pattern = re.compile(r"(?<![a-z])(?:blocks|resblocks|layers|stages|features|layer)\.?(\d+)\.")
    number = [int(m[1]) if (m := pattern.search(name)) else -1 for name in names]
    require(max(number) >= 0, "--train=last_blocks: the encoder has no numbered blocks; use --train=image")
    blocks = max(number) - min(k for k in number if k >= 0) + 1
    least = max(number) + 1 - max(1, round(blocks / 4))
    return set(names[next(k for k, v in enumerate(number) if v >= least) :])


# --- what a batch costs: e, embeddings (see Towers) of the images ids [B] -> {term: (weight, value)}


def contrast_cost(e, ids, task, together=None):
    """The contrastive loss. together: bool [B, B], the pairs that count, all if None."""
    if task.loss == "sigmoid" or (task.loss == "auto" and "bias" in e):
        return dict(L_CL=(1.0, sigmoid(e["z"], e["t"], e["scale"], e["bias"], together)))
    return dict(L_CL=(1.0, infonce(e["z"], e["t"], e["scale"], together)))


def spurious_aware_cost(e, ids, task):
    """The contrastive loss within pairs that agree on the discovered feature, so that it cannot help."""
    has = task.feature[ids]
    return contrast_cost(e, ids, task, has[:, None] == has)


def ravl_cost(e, ids, task):
    """RaVL's region-aware loss, which holds down what was discovered."""
    L_CL = contrast_cost(e, ids, task)["L_CL"][1]
    L_R, L_A = region_terms(e["cos"], task.state[ids], task.y[ids], task.tau)
    return dict(L_CL=(1 - task.w, L_CL), L_R=(task.w, L_R), L_A=(task.w, L_A))


def erm_cost(e, ids, task):
    """Cross-entropy over the classes' texts."""
    return dict(CE=(1.0, F.cross_entropy(e["scale"] * e["z"] @ e["g"].T, task.y[ids])))


def gdro_cost(e, ids, task):
    """Group DRO (Sagawa et al. 2020) over label x feature: q <- q exp(0.01 loss), kept in the task."""
    ce = F.cross_entropy(e["scale"] * e["z"] @ e["g"].T, task.y[ids], reduction="none")
    one_hot = (task.group[ids][:, None] == torch.arange(len(task.q), device=ids.device)).to(ce)  # [B, G]
    losses = one_hot.T @ ce / one_hot.sum(0).clamp(min=1)  # zero of a group that is not there
    q = task.q * torch.exp(0.01 * losses.detach())
    task.q = torch.where(losses.isfinite().all(), q / q.sum(), task.q)
    return dict(DRO=(1.0, (task.q * losses).sum()))


def anchor_cost(e, ids, task):
    """BAP on the encoder: see pretrain."""
    anchor = task.anchors[task.y[ids]]
    terms = dict(L_anchor=(1.0, (e["z"] - anchor).square().sum(1).mean() / task.variance))
    if task.text_weight and task.read:
        said, wanted = task.read(e["z"]).log_softmax(1), task.read(anchor).log_softmax(1)
        terms["L_text"] = task.text_weight, F.kl_div(said, wanted, reduction="batchmean", log_target=True)
    return terms


def infonce(z, t, scale, together=None):
    """InfoNCE, both ways: mean cross-entropy of scale * z t^T [B, B] with its diagonal."""
    logits, n = scale * z @ t.T, torch.arange(len(z), device=z.device)
    if together is not None:
        logits = logits.masked_fill(~together, -torch.inf)
    return (F.cross_entropy(logits, n) + F.cross_entropy(logits.T, n)) / 2


def sigmoid(z, t, scale, bias, together=None):
    """SigLIP's loss (Zhai et al. 2023): -log sigmoid of +-(scale z t^T + bias), summed over texts."""
    sign = 2 * torch.eye(len(z), device=z.device) - 1
    value = -F.logsigmoid(sign * (scale * z @ t.T + bias))
    if together is not None:
        value = value * together
    return value.sum() / len(z)


def region_terms(cos, state, y, tau=0.07):
    """RaVL's L_R and L_A (the paper's Eqs 3 to 9, second-hand), means over images with other regions.

    cos: of regions and class texts g [B, R, C]; state: [B, R] 1 in the discovered cluster (R^s), 0 not (R^r),
    -1 no region; y: labels [B]. With s_i(y) = max over R_i^r of cos(r, g_y) / tau:
        L_R = logsumexp(s_i(y_j) of the batch's labels y_j, max_y cos(r, g_y) / tau of r in R_B^s) - s_i(y_i)
        L_A = logsumexp(s_i(y_i), s_j(y_i) of other labels' images j, cos(r, g_{y_i}) / tau of r in R_B^s)
            - s_i(y_i)
    A label of several images counts once in L_R's first sum (open in the paper). Zeros if no R_i^r has any.
    What takes no part is NONE, not cut out: no shape depends on the data, so a GPU is never waited for.
    """
    x = cos.float() / tau
    s = x.where((state == 0)[:, :, None], NONE).amax(1)  # [B, C], s_i(y) in row i
    spurious = x.where((state == 1)[:, :, None], NONE).flatten(0, 1)  # [B R, C], R_B^s of all images
    in_batch = (y[:, None] == torch.arange(x.shape[2], device=y.device)).any(0)  # [C], labels
    s_y, largest = s.gather(1, y[:, None])[:, 0], spurious.where(in_batch, NONE).amax(1)  # [B], [B R]
    L_R = torch.logaddexp(s.where(in_batch, NONE).logsumexp(1), largest.logsumexp(0)) - s_y
    # an image's own term stays in its sum, so that the ratio is below 1
    others = (y[:, None] != y) | torch.eye(len(y), dtype=torch.bool, device=y.device)
    images = s[:, y].T.where(others, NONE)  # [B, B], s_j(y_i) in row i
    L_A = torch.logaddexp(images.logsumexp(1), spurious.logsumexp(0)[y]) - s_y
    counted = (state == 0).any(1)
    return [v.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1) for v in (L_R, L_A)]


# --- how often an image is drawn: a function from the step to rows [pairs], of the seed and the step alone


def every_image(task, pairs, pool=None):
    """Each image once an epoch. pool: of these rows only."""
    if pool is None:
        pool = torch.arange(len(task.y))

    @functools.lru_cache(2)
    def epoch(e):
        return pool[torch.from_numpy(rng(task.seed, "epoch", e).permutation(len(pool)))]

    def draw(step):
        at = range(step * pairs, (step + 1) * pairs)
        return torch.stack([epoch(k // len(pool))[k % len(pool)] for k in at])

    return draw


def by_weight(task, pairs, weight=None):
    """In proportion to task.weight [n]: see first_errors, pretrain."""
    if weight is None:
        weight = task.weight

    def draw(step):
        generator = torch.Generator().manual_seed(int(rng(task.seed, "batch", step).integers(1 << 62)))
        return torch.multinomial(weight.double(), pairs, replacement=True, generator=generator)

    return draw


def feature_evenly(task, pairs):
    """With and without the discovered feature equally often for each label, as frequent as it is."""
    size = torch.bincount(task.group, minlength=2 * task.C).double()
    kinds = (rearrange(size, "(c f) -> c f", f=2) > 0).sum(1)  # of each label: with, without or both
    return by_weight(task, pairs, torch.bincount(task.y)[task.y] / kinds[task.y] / size[task.group])


def groups_evenly(task, pairs):
    """Each group, label x feature, equally often."""
    return by_weight(task, pairs, 1 / torch.bincount(task.group).double()[task.group])


def smallest_groups(task, pairs):
    """Each group, label x feature, cut down to the smallest."""
    pick = torch.from_numpy(rng(task.seed, "subg").permutation(len(task.group)))
    members = [pick[task.group[pick] == g] for g in torch.unique(task.group)]
    least = min(map(len, members))
    say(f"subg: {least} images of each of {len(members)} groups")
    return every_image(task, pairs, torch.cat([rows[:least] for rows in members]))


# How often an image is drawn, what a batch costs, whether a discovery is needed, what the towers see.
# A cost takes e (see Towers), ids and the task, on e's device: y [n], C, seed, loss, tau, w; with a discovery
# state [n, R], feature, group [n] (see discovered); of jtt weight [n].
Method = namedtuple("Method", "draw cost discovery uses", defaults=(False, ("texts",)))
METHODS = {
    "finetune": Method(every_image, contrast_cost),
    "ravl": Method(every_image, ravl_cost, True, ("texts", "prompts", "regions")),
    "upsampled": Method(feature_evenly, contrast_cost, True),
    "vl_erm": Method(every_image, erm_cost, False, ("prompts",)),
    "vl_gdro": Method(groups_evenly, gdro_cost, True, ("prompts",)),
    "spurious_aware": Method(every_image, spurious_aware_cost, True),
    "jtt": Method(by_weight, contrast_cost),  # just train twice: see first_errors
    "subg": Method(smallest_groups, contrast_cost, True),
}
ANCHORS = Method(by_weight, anchor_cost, False, ())  # --method=bap --train=last_blocks|image


class Feed:
    """Images of a training set, decoded by threads ahead of need, once: their bytes stay on the device while
    they fit into ROOM_GPU (on a CPU into ROOM), and beyond that in memory."""

    def __init__(self, items, encoder):
        self.items, self.encoder, self.near, self.far = items, encoder, {}, {}
        self.room = dict(near=ROOM_GPU, far=ROOM) if encoder.on_gpu else dict(near=ROOM, far=0)
        self.pool = ThreadPoolExecutor(encoder.threads)

    def decoded(self, k):
        return self.far[k] if k in self.far else self.encoder.pixels(self.items[k])

    def ahead(self, ids):
        """Starts on the rows ids [n] of the next step."""
        self.ids = ids.tolist()
        self.away = [k for k in dict.fromkeys(self.ids) if k not in self.near]
        self.coming = self.pool.map(self.decoded, self.away)

    def get(self):
        """Images [n, 3, H, W] of the rows that ahead() was told of, on the encoder's device."""
        images, here = list(self.coming), {}
        if images:
            here = dict(zip(self.away, self.encoder.onto_device(images), strict=True))
        batch = torch.stack([here[k] if k in here else self.near[k] for k in self.ids])
        for k, image in zip(self.away, images, strict=True):
            for place, kept, v in (("near", self.near, here[k]), ("far", self.far, image)):
                if self.room[place] >= v.nbytes and k not in self.far:
                    kept[k], self.room[place] = v, self.room[place] - v.nbytes
                    break
        return self.encoder.normalised(batch)

    def close(self):
        self.pool.shutdown(cancel_futures=True)


def log(rows, config, to_file):
    """Says the newest row; if asked to, writes log.csv whole and, with --wandb, logs the row there."""
    row = dict(rows[-1])
    step, loss, speed, _ = (row.pop(key) for key in ("step", "loss", "images_per_s", "lr"))
    listed = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
    say(f"step {step}/{config['steps']}: loss {loss:.4f} ({listed}), {speed:.0f} images/s")
    if to_file:
        write_table(Path(config["out_dir"]) / "log.csv", list(rows[-1]), [list(row.values()) for row in rows])
    if to_file and config["wandb"]:
        import wandb

        (wandb.run or wandb.init(project="flock", config=config)).log(rows[-1])


if __name__ == "__main__":
    run(main)
