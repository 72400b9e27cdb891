"""How robust is this model? Zero-shot, classifier rows and probes on data sets with groups; one model or many compared.

    python eval.py --data=counteranimal:DIR --model=ViT-B-16 --pretrained=laion400m_e32
    python eval.py --data=waterbirds:DIR --models=lite0,ViT-B-32@openai,timm:resnet50 --protocol=probe,dfr
    python eval.py --data=folder:DIR --model=ViT-L-14 --pretrained=openai --prompts=FILE
    torchrun --nproc_per_node=4 eval.py ...                      shards the images; the numbers are the same
    python eval.py --protocol=ravl --settings=5 --mitigate=2     controlled settings: fine-tune, discover, mitigate (end of this file);
                                                                 --family=cutouts or coco:DIR for photos
    python eval.py --protocol=contrast                           does a contrastive loss learn the nuisance more than cross-entropy?

1. Embed the images, once: what was computed before is read from the cache, and then no model is even loaded.
2. Classify them: by prompts (zeroshot), by an ImageNet classifier's own rows (classifier), by probes trained on the training split
   (probe, clip_probe, fewshot) or on the validation groups (dfr); with --ckpt through a map of train.py.
3. Measure: groups and their worst, CounterAnimal's common, counter and drop, BG-Gap, calibration, additivity; with intervals.

--data=NAME:help says what to download and how it must look. The same command after an interruption goes on where it stopped.
"""
import csv
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import time
from datetime import timedelta
from html import escape
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import (LEAST, Complaint, bars, composites as compose, expect, flags, html_table, layers, lines, load_data, load_regions, near,
                  open_mask, page, pictures, region_truth, revision, rng, run, say, scatter, table,
                  thumb, write, write_json, write_table)
from model import (additivity, cores, dfr, embed, fit_probe, group_metrics, load_checkpoint, load_encoder, load_map, load_tensors, mean_std,
                   paired_bootstrap, prompt_embeddings, recall_encoder, region_embeddings, remember, save_tensors, unit, wilson)

# --- I/O ------------------------------------------------------------------------------------------------------------
out_dir = "out"          # eval.json, eval.html, eval.csv, groups.csv, predictions.csv
cache_dir = "cache"      # embeddings and results, reused by every run; --cache_dir= for none
skip_bad = False         # leave out images that cannot be read, counted and named, instead of stopping
# --- data ------------------------------------------------------------------------------------------------------------
data = "scenes"          # scenes, or NAME:DIR with NAME waterbirds, celeba, counteranimal, nico, cocogender, in9, imagenet, folder, csv, coco; digits, cutouts
split = "auto"           # photos to measure on: train, val, test, all; auto: test, or all where the splits are ours and not trained on
classes = ""             # file of class names, one a line
prompts = ""             # file of templates with {}, or of class<TAB>prompt lines; assets/imagenet_templates.txt is CLIP's ensemble of 80
masks = ""               # folder of foreground masks: also region metrics
confounder = 1.0         # scenes and pairs: share of the training images on their class's own place
difficulty = 0.65        # scenes: how much the background outshouts the foreground, 0 to 1
# --- models ----------------------------------------------------------------------------------------------------------
model = "lite0"          # lite0, timm:NAME, any open_clip name such as ViT-L-14, or the small CLIPs lite0-clip, tiny, tiny-conv
pretrained = ""          # open_clip tag or local file
models = ""              # several instead, comma-separated, each NAME or NAME@PRETRAINED
quick_gelu = "auto"      # auto follows the record of the weights; on, off
ckpt = ""                # ckpt.pt of train.py: its map is applied first
device = "auto"          # auto, cpu, cuda
dtype = "auto"           # of the forward pass: auto, float32, bfloat16
batch_size = 8           # small batches are faster on a CPU; raise it on a GPU
threads = 0              # that decode images and, on a CPU, embed them; 0 for one per core
# --- protocols -------------------------------------------------------------------------------------------------------
protocol = "auto"        # of zeroshot, classifier, probe, clip_probe, dfr, fewshot, comma-separated; auto: the first three, where they can be;
                         # or ravl, contrast, with the family's own model (tiny-conv for digits, else lite0-clip) unless --model says otherwise
l2 = 0.8                 # penalty of probe and fewshot, as in train.py
shots = "1,4,16"         # fewshot: training images per class
draws = 5                # fewshot: draws of them, averaged; worst_group, too, is the mean of each draw's own
picker = "auto"          # CounterAnimal 1v20: the model that picks each class's 20 labels: NAME@PRETRAINED, or self for the one measured;
                         # auto: the published one, ViT-B-32@laion400m_e32, if its weights are on this machine, else self
line = "published"       # effective robustness: over the line through the published models, or through those compared (models)
composites = 0           # additivity also on composites of so many foregrounds, 0 for none
foregrounds = "drawn"    # for them, and --family=cutouts: folder of RGBA cut-outs
backgrounds = "drawn"    # folder of photos
# --- controlled settings (--protocol=ravl) ---------------------------------------------------------------------------
family = "digits"        # digits; cutouts, of --foregrounds on --backgrounds; or coco:DIR[:a,b,c[:FEATURE]]: --data=cutouts:help and coco:help say more
digits = "drawn"         # digits: drawn, or mnist:DIR with MNIST's IDX files
feature = "object"       # cutouts: what goes with a class: object or object=KIND, a second cut-out; scene or scene=KIND, the background
settings = 50            # how many, strongest first: Cramer's V .99 for each class, then .95, .9, .8, .7
mitigate = -1            # how many of the valid ones also with every mitigation; -1: the smaller of settings and 10
base_steps = -1          # pre-training of tiny, tiny-conv and lite0-clip on uncorrelated images, stopped early: a base that knows the classes learns
                         # nothing spurious. For this and the next three -1 is the family's own: 130, 160, 2e-3, 64 for digits; 0, 20, 3e-4, 32
                         # for the others, whose image tower knows ImageNet and whose texts follow within these steps
steps = -1               # of fine-tuning and of every mitigation
learning_rate = -1.      # of both
pairs = -1               # image-caption pairs in a step
region_weight = 0.8      # w of RaVL's loss, and
region_temperature = 0.3  # its temperature: at 0.07 it is content with a small margin, and the image embedding still follows the feature
regions = "auto"         # grid:2 for digits and cutouts, which lie in quadrants, grid:3 for coco
repeats = 3              # contrast: seeds, each with a spurious class of its own
# --- system ----------------------------------------------------------------------------------------------------------
seed = 0
# --- end -------------------------------------------------------------------------------------------------------------

ORDER = {"zeroshot": "text prompts", "classifier": "ImageNet classifier's own rows", "probe": "linear probe, class-balanced, on unit embeddings",
         "clip_probe": "linear probe as CLIP's authors run it, C = 0.316", "dfr": "last-layer retraining on the validation groups",
         "fewshot": "probe on a few images of each class"}

# CounterAnimal's table: common, counter in per cent, over 1000 labels (NeurIPS 2024; PROTOCOLS of this project, section 5). A name counts whole:
# which of timm's tags the paper took is not known here
PUBLISHED = {"ViT-B-32@laion400m_e32": (67.13, 36.95), "ViT-B-16@laion400m_e32": (73.11, 52.17), "ViT-L-14@openai": (85.38, 70.28),
             "ViT-B-32@openai": (69.13, 45.62), "ViT-H-14-378-quickgelu@dfn5b": (90.23, 83.67), "timm:resnet50": (81.44, 66.07),
             "timm:vit_base_patch16_224": (84.97, 74.98), "timm:convnext_large": (89.12, 81.47)}


def main():
    config = flags(globals())
    for flag, least in (("batch_size", 1), ("threads", 0), ("draws", 1), ("composites", 0), ("seed", 0)):
        expect(config[flag] >= least, flag, config[flag], f"a whole number from {least}")
    expect(0 < l2 < float("inf"), "l2", l2, "a positive number")
    expect(0 <= difficulty <= 1, "difficulty", difficulty, "a number from 0 to 1")
    expect(split in ("auto", "train", "val", "test", "all"), "split", split, "auto, train, val, test or all")
    expect(line in ("published", "models"), "line", line, "published or models")
    expect(all(s.isdecimal() and int(s) for s in shots.split(",")), "shots", shots, "whole numbers from 1, comma-separated")
    for flag, default in (("model", "lite0"), ("pretrained", "")):
        expect(not models or config[flag] == default, flag, config[flag], "nothing with --models; give the tag behind @ in --models")
    if protocol in ("ravl", "contrast"):
        expect(int(os.environ.get("WORLD_SIZE", 1)) == 1, "protocol", protocol, "another in several processes, as each would run all of it; start it without torchrun")
        return (controlled_settings if protocol == "ravl" else contrast_or_not)(config)
    asked = protocol.split(",")
    for p in asked if protocol != "auto" else ():
        expect(p in ORDER, "protocol", p, f"auto, or of {', '.join(ORDER)}; {near(p, ORDER)}")
    names = [n.strip() for n in models.split(",")] if models else [f"{model}@{pretrained}" if pretrained else model]
    expect(len(set(names)) == len(names) and all(names), "models", models, "different names, comma-separated")
    out, started, shard = Path(out_dir), time.time(), join()
    samples = load_data(data, masks, confounder, seed, difficulty, classes, prompts, splits=False)
    for note in samples.notes:
        say(note)

    inputs = [digest(samples), *(folder_digest(f) for f in (foregrounds, backgrounds) if composites),
              hashlib.sha256(Path(ckpt).read_bytes()).hexdigest() if os.path.isfile(ckpt) else "", dtype, split, masks, skip_bad, seed, CODE]

    results, failed, outcomes = {}, {}, {}
    git = revision()
    frame = lambda: dict(config=config, git=git, data=describe(samples), seconds=time.time() - started, models=results, failed=failed,
                         pending=[n for n in names if n not in results and n not in failed])
    for name in names:
        try:
            outcomes[name] = evaluate(name, samples, asked, inputs, shard)
            if not shard[0]:
                results[name] = measured(outcomes[name], samples)
        except Exception as problem:
            if len(names) == 1 or isinstance(problem, OSError) and not isinstance(problem, FileNotFoundError):
                raise  # a full disk is no fault of the model
            failed[name] = f"{'' if isinstance(problem, Complaint) else type(problem).__name__ + ': '}{problem}".splitlines()[0]
            say(f"{name}: FAILED, {failed[name]}")
            continue
        if len(names) > 1 and not shard[0]:
            say(f"{name}: {', '.join(f'{k} {v:.3f}' for k, v in list(results[name]['metrics'].items())[:3] if isinstance(v, float))}")
            write_json(out / "eval.json", frame())
    if shard[0]:
        return
    if not results:
        raise Complaint(f"--models: none could be evaluated; the first, {names[0]}: {failed[names[0]]}")
    compare(results, outcomes, samples)
    say("\n" + summary(results, samples))
    for name, problem in failed.items():
        say(f"FAILED {name}: {problem}")
    tables(out, results, outcomes, samples)
    write(out / "eval.html", report(results, outcomes, samples, config, failed, git))
    write_json(out / "eval.json", frame())  # last: nothing is pending only if all the rest is there
    say(f"\n{out}/eval.json, eval.html, eval.csv, groups.csv and predictions.csv written, {time.time() - started:.1f} s")


def join():
    """(rank, ranks) of torchrun, over gloo; (0, 1) without it."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
        if rank:
            sys.stdout = open(os.devnull, "w")
    return rank, ranks


# ---------------------------------------------------------------------------------------------------------------------
# one model: what it makes of each photo

def evaluate(name, samples, asked, inputs, shard):
    """{protocol: outcome} of one model; an outcome is a dict of tensors and plain values: index [m] of the photos, predicted [R, m]
    labels or classes, R draws, confidence [R, m]. Read from the cache where a former run had the same inputs (a list of plain values that
    all models share); None on ranks above 0."""
    encoder, local = open_encoder(name), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for note in encoder.notes:
        say(note)
    state = load_checkpoint(ckpt, encoder) if ckpt else None
    g = load_map(state) if state else unit
    chooser = [who_picks(), quick_gelu] if is_counteranimal(samples) else []
    depends = {"zeroshot": [samples.prompts, chooser], "classifier": [samples.imagenet, chooser], "probe": l2, "clip_probe": 0, "dfr": 0,
                **{f"fewshot_{k}": [l2, draws] for k in shots.split(",")}, "additivity": [composites, foregrounds, backgrounds, difficulty]}
    wanted = [p for w in offered(encoder, samples, asked) for p in ([f"fewshot_{k}" for k in shots.split(",")] if w == "fewshot" else [w])]
    wanted += ["additivity"] * (len(samples.places) > 1 and samples.y.max() >= 0 or composites > 0)
    key = lambda p: hashlib.sha256(json.dumps([p, depends[p], encoder.fingerprint, *inputs]).encode()).hexdigest()[:40]
    path = {p: cache_dir and Path(cache_dir) / f"result-{key(p)}.safetensors" for p in wanted}
    found = {p: cache_dir and load_tensors(path[p]) or None for p in wanted}
    todo = [p for p in wanted if found[p] is None]
    if shard[1] > 1:  # rank 0 decides: the others may have another cache
        torch.distributed.broadcast_object_list(box := [todo], 0)
        todo = box[0]
    if not todo:
        return found
    embedded = lambda e, pictures, label, **more: embed(e, pictures, cache_dir, batch_size, threads or max(1, cores() // local), dtype, skip_bad, label, **more)
    z, bad = embedded(encoder, samples.items, name, shard=shard)
    for _, text in bad[:20]:
        say(f"skipped {text}")
    remember(encoder)
    twenty = pick_labels(encoder, samples, z, embedded, shard) if is_counteranimal(samples) and {"zeroshot", "classifier"} & set(todo) else None
    if shard[0]:
        return None
    good = torch.ones(len(samples.items), dtype=torch.bool)
    good[[k for k, _ in bad]] = False
    shown = object_regions(encoder, samples, good, embedded) if masks else None
    for p in todo:
        started = time.time()
        if p == "additivity":
            found[p] = additive(encoder, samples, z, good, embedded)
        else:
            found[p] = dict(classify(p, encoder, samples, z, g, good, twenty, shown), skipped=len(bad), seconds=time.time() - started)
        if cache_dir:
            save_tensors(path[p], found[p])
    return found


CODE, TRAINING = (hashlib.sha256(b"".join(Path(__file__).with_name(f).read_bytes() for f in (name, "model.py", "data.py"))).hexdigest() for name in ("eval.py", "train.py"))


def open_encoder(name):
    known, _, weights = name.partition("@")
    return recall_encoder(known, weights, quick_gelu, device, cache_dir)


def digest(samples):
    """Hash of the pictures, labels and splits."""
    h = hashlib.sha256("\n".join(p.key() for p in samples.items).encode())
    h.update("\n".join(c.key() if c else "" for c in samples.cut).encode())
    for v in (samples.y, samples.place, samples.split):
        h.update(v.numpy().tobytes())
    return h.hexdigest()


def folder_digest(where):
    """Hash of the names, sizes and times of a folder's pictures."""
    files = [] if where == "drawn" else [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in pictures(where, "foregrounds or backgrounds")]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def offered(encoder, samples, asked):
    """The protocols to run: those asked for, or for auto what this model and these data allow. Complaint if one cannot be."""
    seen = torch.unique(samples.y[samples.split == 0]).tolist()
    why = {}
    if not encoder.reads:
        why["zeroshot"] = f"--model={encoder.name}: it has no text tower, zero-shot needs one; take --protocol=classifier or probe, or a CLIP-like model"
    if not encoder.names:
        why["classifier"] = f"--model={encoder.name}: it has no ImageNet classifier; take --protocol=zeroshot or probe"
    elif not samples.imagenet:
        why["classifier"] = f"{samples.name}: its classes are not ImageNet's" + " (put in_to_in9.json into its folder)" * samples.name.startswith("in9")
    if len([y for y in seen if y >= 0]) < 2:
        why.update({p: f"{samples.name}: {p} needs a training split with at least two classes" for p in ("probe", "clip_probe", "dfr", "fewshot")})
    elif int(torch.bincount(samples.y[samples.split == 1], minlength=len(samples.classes)).min()) < 8:
        why["dfr"] = f"{samples.name}: dfr needs at least 8 validation images of each class"
    else:
        here = torch.bincount(samples.group()[(samples.split == 1) & (samples.y >= 0)])
        least = int(here[here > 0].min())
        if least < 2:
            why["dfr"] = f"{samples.name}: dfr needs at least 2 validation images of each group (found {least})"
        elif least < 8 and "dfr" in asked:
            say(f"WARNING: dfr balances the validation groups down to the smallest, which has {least} images: expect noise")
    for k in map(int, shots.split(",") if "fewshot" in asked and "fewshot" not in why else ()):
        here = torch.bincount(samples.y[(samples.split == 0) & (samples.y >= 0)], minlength=len(samples.classes))
        if (here < k).any():
            say(f"WARNING: fewshot_{k}: {int((here < k).sum())} of {len(here)} classes have fewer training images, {samples.classes[here.argmin()]} the fewest, "
                f"{int(here.min())}; of these classes all are taken")
    if asked == ["auto"]:
        can = [p for p in ("zeroshot", "classifier") if p not in why]
        can += ["probe"] * ("probe" not in why and (samples.official or len(samples.classes) == 2 or not can))
        if not can:
            raise Complaint(why["zeroshot"])
        return can
    for p in asked:
        if p in why:
            raise Complaint(why[p])
    return sorted(set(asked), key=list(ORDER).index)


def repaired(g, z):
    """Embeddings [N, D] -> the same with the foreground only, in their own space, for text and classifier rows: mu + g(z), taken back
    through the map's power and to the length of z. Our reading: BAP names no zero-shot use."""
    v = g.mu + g(z)
    return unit(v.sign() * v.abs() ** (1 / g.power)) * z.norm(dim=1, keepdim=True)


def chosen(samples, where):
    """Index [m] of the photos of a split, or of all."""
    return (samples.split >= 0 if where == "all" else samples.split == ("train", "val", "test").index(where)).nonzero()[:, 0]


def through(g, z, index):
    """g(z[index]) [m, D'], with no second copy of z."""
    parts = [g(z[k]) for k in index.split(1 << 14)]
    out = torch.empty(len(index), parts[0].shape[1]) if parts else torch.empty(0, z.shape[1])
    for k in range(len(parts)):
        out[k << 14:(k + 1) << 14], parts[k] = parts[k], None
    return out


def classify(p, encoder, samples, z, g, good, twenty, shown):
    """The outcome of one protocol on embeddings z [n, D]; also of regions that show the object, where they are known."""
    trains = p not in ("zeroshot", "classifier")
    where = split if split != "auto" else "test" if samples.official or trains else "all"
    index = chosen(samples, where)
    index = index[good[index]]
    if not len(index):
        raise Complaint(f"--split={split}: {samples.name} has no photos there")
    heads = trained(p, samples, z, g, good, index) if trains else [by_rows(p, encoder, samples, g)]
    seen = int((samples.split[index] == (1 if p == "dfr" else 0)).sum()) if trains else 0
    if seen:
        say(f"WARNING: {p} was trained on {seen} of the {len(index)} photos that it is measured on; see --split")
    out = dict(index=index, seen=seen, predicted=torch.empty(len(heads), len(index), dtype=torch.int32), confidence=torch.empty(len(heads), len(index)))
    for r, head in enumerate(heads):
        for start, part in zip(range(0, len(index), 1 << 13), index.split(1 << 13)):
            logits, owner = head(z[part])
            top = logits.softmax(1).max(1)
            out["confidence"][r, start:start + len(part)] = top.values
            out["predicted"][r, start:start + len(part)] = (top.indices if owner is None else owner[top.indices]).int()
            if twenty is not None and not trains:
                mine = twenty[samples.y[part]]  # [N, 20]
                out.setdefault("predicted_1v20", torch.empty(len(index), dtype=torch.int32))[start:start + len(part)] = \
                    mine.gather(1, logits.gather(1, mine).argmax(1, keepdim=True))[:, 0].int()
    if "predicted_1v20" in out:
        out["picker"] = who_picks()
    if shown is not None:
        r, photo = shown
        inside = torch.isin(photo, index)
        logits, owner = heads[0](r[inside])
        top = logits.argmax(1)
        out.update(region_photo=photo[inside], region_predicted=top if owner is None else owner[top])
    return out


def by_rows(p, encoder, samples, g):
    """A head by text embeddings or a classifier's rows: embeddings [N, D] -> logits [N, C], and the class that owns each or None.

    Over all 1000 labels for CounterAnimal, ImageNet and ImageNet-9 (owner: the class, -1 for none); else among the classes, each by
    the best of its labels.
    """
    reads = p == "zeroshot"
    rows, bias = (prompt_embeddings(encoder, samples.prompts, cache_dir) * (encoder.logit_scale or 100.), 0.) if reads else encoder.classifier()
    groups, owner = samples.imagenet if not reads and len(samples.labels) < len(rows) else None, None
    if groups and samples.name.startswith("in9"):
        owner = torch.full((len(rows),), -1)
        for c, labels in enumerate(groups):
            owner[labels] = c

    def head(v):
        v = v if g is unit else repaired(g, v)
        logits = (unit(v) if reads else v) @ rows.T + bias
        return (logits if owner is not None or not groups else torch.stack([logits[:, labels].amax(1) for labels in groups], 1)), owner
    return head


def trained(p, samples, z, g, good, index):
    """Heads by probes: one, or one for each draw of few shots."""
    y, group, C = samples.y, samples.group(), len(samples.classes)
    train, val = ((samples.split == s) & good & (y >= 0) for s in (0, 1))
    train = train.nonzero()[:, 0]
    raw = lambda v: v
    if p == "dfr":
        some = val.nonzero()[:, 0]
        fits = [dfr(through(g, z, some), y[some], group[some], torch.ones(len(some), dtype=torch.bool), seed)]
    elif p == "clip_probe":  # raw embeddings, all images alike; C counts in the embeddings' own units
        g = raw if g is unit else g
        x = through(g, z, train)
        s = float(mean_std(x)[1].mean())
        fits = [fit_probe(x, y[train], 1 / (.316 * len(x) * s * s), torch.ones(len(x)), C)]
    elif p == "probe":
        fits = [fit_probe(through(g, z, train), y[train], l2, classes=C)]
    else:
        k, fits = int(p.removeprefix("fewshot_")), []
        for d in range(draws):
            few = torch.cat([mine[torch.from_numpy(rng(seed, "fewshot", k, d, c).permutation(len(mine))[:k])] for c in range(C) for mine in [train[y[train] == c]]])
            fits.append(fit_probe(through(g, z, few), y[few], l2, classes=C))
    return [lambda v, fit=fit: (fit.logits(g(v)), None) for fit in fits]


def object_regions(encoder, samples, good, embedded, n=3, share=.5):
    """Cells of an n x n grid over what the model sees of a photo, of which at least this share is the object by its mask:
    (embeddings [K, D], number of the photo [K])."""
    index = [k for k, cut in enumerate(samples.cut) if cut is not None and good[k]]
    if not index:
        raise Complaint(f"--masks={masks}: {samples.name} takes no masks, or none fits; expected --data=waterbirds:DIR and masks NAME.png")
    pool = lambda x, _: F.adaptive_avg_pool2d(encoder.maps(x).permute(0, 3, 1, 2), n).flatten(2).transpose(1, 2).flatten(0, 1)  # [N n n, D]
    r, _ = embedded(encoder, [samples.items[k] for k in index], "regions", compute=pool, name=f"grid {n}", rows=[n * n] * len(index))
    cover = []
    for k in index:
        mask = open_mask(samples.cut[k].figure.mask)
        left, top, right, bottom = (v * side for v, side in zip(encoder.frame(*mask.size), mask.size * 2))
        cover.append(np.asarray(mask.resize((n, n), Image.BOX, (left, top, right, bottom))).ravel() >= 255 * share)
    cover = torch.from_numpy(np.concatenate(cover))
    if not cover.any():
        raise Complaint(f"--masks={masks}: no cell of a {n}x{n} grid is at least {share:.0%} object in any photo, so there are no regions to read")
    return r[cover], torch.tensor(index).repeat_interleave(n * n)[cover]


def is_counteranimal(samples):
    return samples.places == ["common", "counter"] and len(samples.labels) == 1000


def who_picks():
    """--picker, auto resolved: no surprise of a download of 600 MB."""
    if picker != "auto":
        return picker
    from huggingface_hub.constants import HF_HUB_CACHE
    kept = Path(HF_HUB_CACHE) / "models--timm--vit_base_patch32_clip_224.laion400m_e32" / "snapshots"
    return "ViT-B-32@laion400m_e32" if any(kept.glob("*/open_clip_*")) else "self"


def pick_labels(encoder, samples, z, embedded, shard):
    """CounterAnimal's 1v20: for each class the 20 of the 1000 labels with the highest mean score over its photos [classes, 20]."""
    if who_picks() != "self":
        encoder = open_encoder(who_picks())
        z, _ = embedded(encoder, samples.items, f"picker {who_picks()}", shard=shard)
    elif picker == "auto":
        say("WARNING: 1v20: the model measured picks its own 20 labels; --picker=ViT-B-32@laion400m_e32 fetches the one that the paper used")
    if shard[0]:
        return None
    rows, bias = (prompt_embeddings(encoder, samples.prompts, cache_dir), 0.) if encoder.reads else encoder.classifier()
    mean = torch.zeros(len(samples.classes), z.shape[1])
    for part in torch.arange(len(z)).split(1 << 13):
        v = (unit(z[part]) if encoder.reads else z[part]).nan_to_num()
        mean.index_add_(0, samples.y[part], v)
    return (mean / torch.bincount(samples.y).clamp(min=1)[:, None] @ rows.T + bias).topk(20).indices


def additive(encoder, samples, z, good, embedded):
    """Additivity of the mean embeddings of class x place cells, and with --composites that of composites, flat and on the sphere."""
    out = {}
    index = (good & (samples.y >= 0)).nonzero()[:, 0]
    group, C, P = samples.group(), len(samples.classes), len(samples.places)
    if P > 1 and len(index):
        sums = torch.zeros(C * P, z.shape[1], dtype=torch.double)
        for part in index.split(1 << 14):
            sums.index_add_(0, group[part], unit(z[part]).double())
        cells = (torch.bincount(group[index], minlength=C * P) > 0).nonzero()[:, 0]
        out["cells"] = additivity(unit(sums[cells]), cells // P, cells % P, .1 if len(cells) >= 20 else 0., seed)
    if composites:
        figures, grounds, _ = layers(foregrounds, backgrounds, skip_bad, seed, difficulty)
        pictures, i, j = compose(figures, grounds, composites, 8, seed)
        v, bad = embedded(encoder, pictures, "composites")
        here = v.isfinite().all(1)
        out["composites"] = additivity(unit(v[here]), i[here], j[here], seed=seed)
    return dict(additivity=out)


# ---------------------------------------------------------------------------------------------------------------------
# what it amounts to

def measured(found, samples):
    """Outcomes of one model -> {"metrics", "classes", "groups", "protocol", "protocols": {...}, "additivity"}, plain values; the first
    three are those of the first protocol."""
    parts = {p: measure(out, samples, p) for p, out in found.items() if p != "additivity"}
    first = next(iter(parts))
    return dict(parts[first], protocol=first, protocols=parts, additivity=found.get("additivity", {}).get("additivity", {}))


def measure(out, samples, p):
    """One outcome -> metrics, classes, groups."""
    index, P = out["index"], len(samples.places)
    y, place = samples.y[index], samples.place[index]
    if (y < 0).all():
        taken = torch.bincount(out["predicted"][0].long(), minlength=len(samples.labels)).tolist()
        return dict(metrics=dict(n=len(index), confidence=float(out["confidence"].mean())), groups=[],
                    classes={name: dict(predicted=k) for name, k in zip(samples.labels, taken)})
    target = targets(samples, p)[index]
    correct = out["predicted"] == target  # [R, m]
    each = [group_metrics(c, y, place, samples.counts(0), P) for c in correct]
    mean = lambda key, rows=each: None if rows[0][key] is None else sum(r[key] for r in rows) / len(rows)
    groups = []
    for rows in zip(*[e["groups"] for e in each]):
        accuracy = mean("accuracy", rows)
        groups.append(dict(rows[0], accuracy=accuracy, interval=list(wilson(accuracy * rows[0]["n"], rows[0]["n"]))))
    metrics = {k: mean(k) for k in ("worst_group", "avg_group_mean", "avg_train_weighted")}
    z = NormalDist().inv_cdf(1 - .025 / len(groups))  # simultaneous over the groups: the bootstrap of a minimum is biased
    bounds = [[min(ends) for ends in zip(*[wilson(g["accuracy"] * g["n"], g["n"], z) for g in e["groups"]])] for e in each]
    metrics.update(worst_group_interval=[sum(ends) / len(bounds) for ends in zip(*bounds)], seen_in_training=out.get("seen", 0),
                   average=float(correct.double().mean()), ece=ece(out["confidence"].flatten(), correct.flatten()),
                   n=len(index), skipped=out["skipped"])
    classes = {}
    for c in torch.unique(y).tolist():
        inside = y == c
        k, n = float(correct[:, inside].double().mean()), int(inside.sum())
        wrong = out["predicted"][0][inside & ~correct[0]].long()
        taken = sorted(((int(v), called(samples, p, i)) for i, v in zip(*torch.unique(wrong, return_counts=True))), reverse=True)[:3]
        classes[samples.classes[c]] = dict(accuracy=k, n=n, interval=list(wilson(k * n, n)), taken_for={name: v for v, name in taken})
        if P > 1:
            classes[samples.classes[c]]["places"] = {samples.places[g["place"]]: g["accuracy"] for g in groups if g["y"] == c}
    if is_counteranimal(samples):
        metrics = dict(counter_metrics(correct.double().mean(0), y, place, classes, samples.classes), **metrics)
        if "predicted_1v20" in out:
            metrics.update(counter_metrics(out["predicted_1v20"] == target, y, place, classes, samples.classes, "_1v20"), picker=out["picker"])
    if samples.name.startswith("in9"):
        of = {v: correct.double().mean(0)[place == k] for k, v in enumerate(samples.places) if (place == k).any()}
        metrics = dict({v: float(c.mean()) for v, c in of.items()}, **metrics)
        if {"mixed_same", "mixed_rand"} <= set(of):
            a, b = of["mixed_same"], of["mixed_rand"]
            drawn = redraw([dict(n=len(c), accuracy=float(c.mean())) for c in (a, b)])
            metrics = dict(bg_gap=float(a.mean() - b.mean()), bg_gap_interval=interval(drawn[:, 0] - drawn[:, 1]), **metrics)
    if "region_photo" in out:
        photo = out["region_photo"]
        hit = out["region_predicted"] == targets(samples, p)[photo]
        of = group_metrics(hit, samples.y[photo], samples.place[photo], samples.counts(0), P)
        metrics.update(region_overall=float(hit.double().mean()), region_worst_group=of["worst_group"], regions=len(hit))
    return dict(metrics=metrics, classes=classes, groups=groups)


def targets(samples, p):
    """What is right for each photo [n]: its class, or where a model chooses among 1000 labels its ImageNet label."""
    if len(samples.labels) == 1000 and samples.imagenet and p in ("zeroshot", "classifier"):
        return torch.tensor([labels[0] for labels in samples.imagenet])[samples.y]
    return samples.y


def called(samples, p, k, whole=False):
    """The name of a predicted label or class, the first of its synonyms unless whole; "none of them" for -1."""
    wide = len(samples.labels) == 1000 and p in ("zeroshot", "classifier") or len(samples.y) and samples.y.max() < 0
    name = (samples.labels if wide else samples.classes)[k] if k >= 0 else "none of them"
    return name if whole else name.split(",")[0]


def each_outcome(results):
    """(model, protocol, {metrics, classes, groups}) of all."""
    return [(name, p, m) for name, r in results.items() for p, m in r["protocols"].items()]


def additivities(results):
    """Rows of the table of additivity."""
    parts = ("r2", "r2_heldout", "foreground", "background", "residual", "cross")
    return ("model", "of", "geometry", *parts), [(name, kind, geometry, *[a[q] for q in parts]) for name, r in results.items()
                                                 for kind, v in r["additivity"].items() for geometry, a in v.items()]


def redraw(groups, stream=0, times=2000):
    """Accuracies of the groups [times, G] if their photos are drawn anew: the bootstrap of n zeros and ones is binomial."""
    n = np.array([g["n"] for g in groups])
    return np.random.default_rng([seed, stream]).binomial(n, [g["accuracy"] for g in groups], (times, len(n))) / n


def interval(drawn):
    return [float(v) for v in np.quantile(drawn, (.025, .975))]


def ece(confidence, correct, bins=15):
    """Expected calibration error: mean over photos of |accuracy - confidence| of their bin of confidence (Guo et al. 2017)."""
    b = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, b, correct.double() - confidence.double())
    return float(gap.abs().sum() / len(b))


def counter_metrics(correct, y, place, classes, names, suffix=""):
    """CounterAnimal: class-balanced common, counter and their drop, with the drop's bootstrap interval, and plain averages.

    correct: [m], bool or a share of draws; place 0 common, 1 counter. The class's own go into classes[name]. Source: the paper's metric, the mean over
    classes of per-class accuracies; an interval draws photos anew within each class and place.
    """
    accuracy, cells = [[], []], [[], []]
    for c in torch.unique(y).tolist():
        own = [correct[(y == c) & (place == k)] for k in (0, 1)]
        a = [float(v.double().mean()) if len(v) else None for v in own]
        classes.setdefault(names[c], {}).update({"common" + suffix: a[0], "counter" + suffix: a[1], "drop" + suffix: None if None in a else a[0] - a[1],
                                                 "n_common": len(own[0]), "n_counter": len(own[1])})
        for k in (0, 1):
            if len(own[k]):
                accuracy[k].append(a[k])
                cells[k].append(dict(n=len(own[k]), accuracy=a[k]))
    common, counter = (sum(a) / len(a) if a else None for a in accuracy)
    plain = [float(correct[place == k].double().mean()) if (place == k).any() else None for k in (0, 1)]
    out = dict(common=common, counter=counter, drop=None, drop_interval=None, common_plain=plain[0], counter_plain=plain[1])
    if None not in (common, counter):
        out.update(drop=common - counter, drop_interval=interval(redraw(cells[0]).mean(1) - redraw(cells[1], 1).mean(1)))
    return {k + suffix: v for k, v in out.items()}


def line_through(points):
    """(common, counter) of models, fractions -> (intercept, slope) of the least-squares line between their logits."""
    x, y = (np.log(v / (1 - v)) for v in np.clip(np.array(points).T, .001, .999))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return y.mean() - slope * x.mean(), slope


def line_of(results):
    """The line that --line asks for, through the published models or those compared, each by its first protocol; None through fewer than three."""
    points = [(a / 100, b / 100) for a, b in PUBLISHED.values()] if line == "published" else \
        [(r["metrics"]["common"], r["metrics"]["counter"]) for r in results.values() if r["metrics"].get("drop") is not None]
    return line_through(points) if len({a for a, _ in points}) >= 3 else None


def on_line(line_, common):
    """The counter accuracy that the line expects at a common accuracy."""
    x = math.log(min(max(common, .001), .999) / (1 - min(max(common, .001), .999)))
    return 1 / (1 + math.exp(-line_[0] - line_[1] * x))


def compare(results, outcomes, samples):
    """What needs several models, put into results: effective robustness (counter accuracy over what the line expects at that
    common accuracy, Taori et al. 2020; the line is fitted to logits, our reading), and the difference to the first model."""
    rows = [m for r in results.values() for m in r["protocols"].values()]
    if is_counteranimal(samples):
        fit = line_of(results)
        if fit is None:
            say("WARNING: --line=models: a line needs three models with different common accuracies; no effective robustness")
        for m in rows:
            m["metrics"]["effective_robustness"] = m["metrics"]["counter"] - on_line(fit, m["metrics"]["common"]) \
                if fit is not None and m["metrics"].get("drop") is not None else None
    first, *others = results
    for name in others:
        p = results[name]["protocol"]
        a, b = outcomes[name][p], outcomes[first].get(results[first]["protocol"])
        y, group = samples.y[a["index"]], samples.group()[a["index"]]
        if y.min() >= 0 and torch.equal(a["index"], b["index"]):
            right = [out["predicted"][0] == targets(samples, q)[out["index"]] for out, q in ((a, p), (b, results[first]["protocol"]))]
            results[name]["metrics"]["worst_group_over_first"] = list(paired_bootstrap(*right, group, seed=seed))


def describe(samples):
    """The data, for eval.json."""
    return dict(name=samples.name, classes=samples.classes, places=samples.places, photos=len(samples.items), notes=samples.notes,
                splits=[int((samples.split == s).sum()) for s in range(3)], official=samples.official)


# ---------------------------------------------------------------------------------------------------------------------
# tables and the page

def columns(results, samples):
    """The metrics to show, in order: names of numbers that some row has; n first where rows differ in it, as probes are read on the test split only."""
    wanted = ("bg_gap", *samples.places, "worst_group", "avg_group_mean", "avg_train_weighted", "average", "region_overall", "region_worst_group", "confidence", "ece")
    if is_counteranimal(samples):
        wanted = ("common", "counter", "drop", "effective_robustness", "common_plain", "counter_plain", "common_1v20", "counter_1v20", "drop_1v20", "worst_group", "ece")
    elif len(samples.places) < 2:
        wanted = ("average", "avg_group_mean", "worst_group", "confidence", "ece")
    rows = [m["metrics"] for _, _, m in each_outcome(results)]
    return ["n"] * (len({m["n"] for m in rows}) > 1) + [k for k in wanted if any(m.get(k) is not None for m in rows)]


FEWSHOT = "fewshot: means over the draws; worst_group, too, is the mean of each draw's own"


def group_name(samples, g):
    return samples.classes[g["y"]] + (f" on {samples.places[g['place']]}" if len(samples.places) > 1 else "")


def summary(results, samples):
    """The tables on the console."""
    keys = columns(results, samples)
    name, first = next(iter(results.items()))
    few = first["groups"] if len(first["groups"]) <= 8 and not is_counteranimal(samples) else []
    alike = "n" not in keys
    header = ("model", "protocol", *keys, *[group_name(samples, g) + f" (n={g['n']})" * alike for g in few])
    rows = [(name, p, *[m["metrics"].get(k) for k in keys], *[g["accuracy"] for g in m["groups"][:len(few)]]) for name, p, m in each_outcome(results)]
    lines = [samples.name + f": {first['metrics']['n']} photos" * alike, table(header, rows)]
    if any(p.startswith("fewshot") for _, p, _ in each_outcome(results)):
        lines.append(FEWSHOT)
    best = first["metrics"]
    spans = [(k, best[k + "_interval"]) for k in ("drop", "worst_group", "bg_gap") if best.get(k + "_interval")]
    lines += [f"{name}: {k} {best[k]:.3f}, 95 % interval {low:.3f} to {high:.3f}" for k, (low, high) in spans[:1]]
    for name in results:
        if is_counteranimal(samples) and name in PUBLISHED:
            lines.append(f"{name}: published {PUBLISHED[name][0]:.2f} common, {PUBLISHED[name][1]:.2f} counter")
    head, rows = additivities(results)
    if rows:
        lines += ["\nAdditivity of mean embeddings of class x place (cells) or of composites, shares of their variance", table(head, rows)]
    return "\n".join(lines)


def tables(out, results, outcomes, samples):
    """eval.csv: a row for each model and protocol; groups.csv: for each group too; predictions.csv: for each photo."""
    rows = each_outcome(results)
    keys = list(dict.fromkeys(k for _, _, m in rows for k, v in m["metrics"].items() if not isinstance(v, (list, tuple))))
    write_table(out / "eval.csv", ("model", "protocol", *keys), [(name, p, *[m["metrics"].get(k) for k in keys]) for name, p, m in rows])
    write_table(out / "groups.csv", ("model", "protocol", "class", "place", "n", "accuracy", "low", "high"),
                [(name, p, samples.classes[g["y"]], samples.places[g["place"]], g["n"], g["accuracy"], *g["interval"]) for name, p, m in rows for g in m["groups"]])
    header, filled, shown = ["image", "class", "place", "split"], [], set()
    for name, p, _ in rows:
        index, predicted, confidence = (outcomes[name][p][k].tolist() for k in ("index", "predicted", "confidence"))
        header += [f"{name} {p}", f"{name} {p} confidence"]
        filled.append({k: (called(samples, p, c, True), f"{v:.4f}") for k, c, v in zip(index, predicted[0], confidence[0])})
        shown.update(index)
    fixed = lambda k: (getattr(samples.items[k], "path", samples.captions[k]), samples.classes[samples.y[k]] if samples.y[k] >= 0 else "",
                       samples.places[samples.place[k]], ("train", "val", "test")[samples.split[k]])
    write_table(out / "predictions.csv", header, [(*fixed(k), *[v for f in filled for v in f.get(k, ("", ""))]) for k in sorted(shown)])


def report(results, outcomes, samples, config, failed, git):
    """eval.html: the table, accuracy on the line, groups with intervals, the worst confusions, additivity, prompts, flags."""
    keys, first = columns(results, samples), next(iter(results))
    head, counter = results[first], is_counteranimal(samples)
    sections = [("Results", html_table(("model", "protocol", *[k.replace("_", " ") for k in keys]),
                                       [(name, p, *[m["metrics"].get(k) for k in keys]) for name, p, m in each_outcome(results)])
                 + (f"<p class=dim>{FEWSHOT}.</p>" if any(p.startswith("fewshot") for _, p, _ in each_outcome(results)) else "")
                 + "".join(f"<p>FAILED {escape(name)}: {escape(problem)}</p>" for name, problem in failed.items()))]
    x, y = ("common", "counter") if counter else ("avg_group_mean", "worst_group")
    dots = [(name, r["metrics"][x], r["metrics"][y], True) for name, r in results.items() if r["metrics"].get(y) is not None]
    if counter:
        dots = [(k, a / 100, b / 100, False) for k, (a, b) in PUBLISHED.items()] + dots
    if len(dots) > 1:
        fit = line_of(results) if counter else None
        curve = [(v / 100, on_line(fit, v / 100)) for v in range(2, 99)] if fit else None
        sections.append(("Accuracy on the line", scatter(dots, x.replace("_", " "), y.replace("_", " "), curve)
                         + ("<p class=dim>Pale: published models, over the same 1000 labels. The line is fitted to logits.</p>" if counter else "")))
    if counter:
        rows = sorted(head["classes"].items(), key=lambda c: -(c[1]["drop"] or 0))
        sections.append((f"Common and counter photos by class, largest drop first, {first}", bars([
            (f"{name[:26]}, {k}", c[k], wilson(c[k] * c["n_" + k], c["n_" + k]), f"n={c['n_' + k]}")
            for name, c in rows for k in ("common", "counter") if c[k] is not None])))
    elif head["groups"] and len(head["groups"]) <= 60:
        compared = [(f"{name} {p}", m) for name, p, m in each_outcome(results)]
        one = lambda label, g: (label[:34], g["accuracy"], g["interval"], f"n={g['n']}")
        if len(compared) <= 3:
            charts = [(name, [one(group_name(samples, g), g) for g in m["groups"]]) for name, m in compared]
        else:
            charts = [(group_name(samples, g), [one(name, v) for name, m in compared for v in m["groups"] if (v["y"], v["place"]) == (g["y"], g["place"])])
                      for g in head["groups"]]
        sections.append(("Accuracy per group, with 95 % intervals", "".join(f"<h3>{escape(title)}</h3>" + bars(rows) for title, rows in charts)))
    confused = [(name, c["accuracy"], c["n"], ", ".join(f"{k} ({v})" for k, v in c["taken_for"].items())) for name, c in head["classes"].items() if "accuracy" in c]
    if confused:
        sections.append((f"What each class is taken for, {first} {head['protocol']}",
                         html_table(("class", "accuracy", "n", "taken for"), sorted(confused, key=lambda r: r[1])[:45])))
    for name, p in [(name, r["protocol"]) for name, r in results.items()][:3]:
        sections.append((f"Worst confusions: wrong and sure, {name} {p}", worst(outcomes[name][p], samples, p)))
    header, rows = additivities(results)
    if rows:
        sections.append(("Additivity", "<p>How far an embedding is the sum of a foreground and a background part: shares of the variance in the fit z = mu + a + c + e, "
                         "flat and after the log map at the intrinsic mean; of the mean embedding of each class on each place (cells), or of composites.</p>"
                         + html_table(header, rows)))
    if any("zeroshot" in r["protocols"] for r in results.values()):
        texts = [(label, "; ".join(t[:4]) + f" and {len(t) - 4} more" * (len(t) > 4)) for label, t in zip(samples.labels, samples.prompts)]
        sections.append(("Prompts", html_table(("label", "prompts, averaged"), texts[:45])
                         + f"<p class=dim>and of {len(texts) - 45} more labels</p>" * (len(texts) > 45)))
    sections.append(("Data and flags", "<p>" + "<br>".join(map(escape, samples.notes)) + "</p><pre>" + escape("\n".join(f"--{k}={v}" for k, v in config.items()))
                     + f"\ngit {git}</pre>"))
    best = head["metrics"]
    says = f"common {best['common']:.1%}, counter {best['counter']:.1%}" if counter and best["drop"] is not None else \
        f"worst group {best['worst_group']:.1%}, mean of groups {best['avg_group_mean']:.1%}" if "worst_group" in best else f"{best['n']} photos without labels"
    how = ORDER[next(k for k in ORDER if head["protocol"].startswith(k))]
    return page("flock: how robust is it?", f"{samples.name}; {first}, {how}: {says}.", sections)


def worst(out, samples, p, most=12):
    """The photos that are wrong with the highest confidence, as figures."""
    y = samples.y[out["index"]]
    wrong = (out["predicted"][0] != targets(samples, p)[out["index"]]) & (y >= 0)
    figures = []
    seen = {}
    for k in out["confidence"][0].where(wrong, -1.).argsort(descending=True)[:int(wrong.sum())].tolist():
        seen[int(y[k])] = seen.get(int(y[k]), 0) + 1
        if seen[int(y[k])] > max(2, most // len(samples.classes)):  # not one class alone
            continue
        if len(figures) == most:
            break
        photo, taken = int(out["index"][k]), int(out["predicted"][0][k])
        caption = f"{group_name(samples, dict(y=int(samples.y[photo]), place=int(samples.place[photo])))}, taken for {called(samples, p, taken)}"
        figures.append(thumb(samples.items[photo].image(), f"{caption} ({float(out['confidence'][0][k]):.2f})"))
    return "".join(figures) or "<p>none</p>"


# ---------------------------------------------------------------------------------------------------------------------
# controlled settings: fine-tune where a planted feature goes with a class, discover it, mitigate it (RaVL, section 4)

STRENGTHS = .99, .95, .9, .8, .7
MITIGATIONS = "finetune", "ravl", "upsampled", "vl_erm", "vl_gdro", "spurious_aware", "jtt", "subg"
NATURAL = dict(model="lite0-clip", base_steps=0, steps=20, learning_rate=3e-4, pairs=32, regions="grid:3")
FAMILIES = dict(digits=dict(model="tiny-conv", base_steps=130, steps=160, learning_rate=2e-3, pairs=64, regions="grid:2"),
                cutouts={**NATURAL, "regions": "grid:2"}, coco=NATURAL)
FIGURES = "image_overall", "image_worst_group", "region_overall", "region_worst_group"


def of_family(config):
    """Puts the family's own values where the flags leave them open. Returns spec(strength, label), the --data of a setting."""
    kind, _, where = family.partition(":")
    expect(kind in FAMILIES and (kind == "coco") == bool(where), "family", family, "digits, cutouts or coco:DIR")
    expect(digits == "drawn" or digits.startswith("mnist:"), "digits", digits, "drawn or mnist:DIR")
    config.update({k: v for k, v in FAMILIES[kind].items() if config[k] in (-1, "auto", "lite0")})  # lite0, the default of the other protocols, has no text tower
    globals().update(config)
    if not regions.startswith("masks:"):
        load_regions(regions, [], None)  # complains now, not after the first fine-tuning
    rest = dict(digits=digits.partition(":")[2], cutouts=f"{feature}:{foregrounds}:{backgrounds}", coco=where)[kind]
    return lambda strength, label: f"{kind}:{strength:g}:{label}" + (f":{rest}" if rest else "")


def controlled_settings(config):
    """--protocol=ravl: runs the settings, and writes protocol.json, .csv and .html after each."""
    expect(1 <= settings <= 50, "settings", settings, "a whole number from 1 to 50")
    spec = of_family(config)
    started, out = time.time(), Path(out_dir)
    former = json.loads((out / "protocol.json").read_text())["config"] if (out / "protocol.json").is_file() else config
    differ = [k for k in config if k not in ("settings", "mitigate", "threads", "cache_dir", "out_dir") and former.get(k) != config[k]]
    if differ:
        raise Complaint(f"{out / 'protocol.json'}: made with " + ", ".join(f"--{k}={former.get(k)}" for k in differ) + "; give the same flags, or another --out_dir")
    classes = load_data(spec(0, 0), seed=seed).classes
    chosen = [(v, c) for v in STRENGTHS for c in range(len(classes))][:settings]
    most = min(settings, 10) if mitigate < 0 else mitigate
    base, done, mitigated = base_model(spec(0, 0)), [], 0
    for k, (strength, label) in enumerate(chosen):
        at = out / f"settings/{strength:g}-{label}"
        found = one_setting(at, spec(strength, label), strength, label, classes, base, mitigated < most)
        mitigated += bool(found["mitigation"])
        done.append(found)
        tree = dict(config=config, git=revision(), settings=done, summary=summarised(done), seconds=time.time() - started)
        write_json(out / "protocol.json", tree)
        say(f"setting {k + 1}/{len(chosen)}: V {strength:g}, {classes[label]}: gap {found['gap']:.2f}{'' if found['valid'] else ', not valid'}; Precision@10 "
            + (", ".join(f"{m} {v:.1f}" if v is not None else f"{m} -" for m, v in found["precision_at_10"].items()) or "not looked for"))
    write(out / "protocol.csv", as_csv(done))
    write(out / "protocol.html", setting_page(tree, classes))
    for title, header, rows in setting_tables(tree["summary"]):
        say(f"\n{title}\n{table(header, rows)}")
    say(f"\n{out}/protocol.json, protocol.csv and protocol.html written, {time.time() - started:.0f} s")


def script_run(name, out, **more):
    """Runs train.py or discover.py beside this file, its output into out/log.txt; raises Complaint with its last line."""
    shared = {k: globals()[k] for k in ("model", "quick_gelu", "device", "dtype", "batch_size", "cache_dir", "threads", "seed")}
    words = [f"--{k}={v}" for k, v in dict(shared, out_dir=out, **more).items()]
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / "log.txt", "w") as log:
        job = subprocess.run([sys.executable, str(Path(__file__).with_name(name)), *words], stdout=log, stderr=subprocess.STDOUT)
    if job.returncode == 130:
        raise KeyboardInterrupt
    if job.returncode:
        last = (Path(out) / "log.txt").read_text().strip().splitlines()[-1:]
        raise Complaint(f"{name} {' '.join(words)} failed: {''.join(last)}")


def base_model(spec):
    """Weights of the base model, pre-trained on uncorrelated images of another seed unless --pretrained names some."""
    if pretrained or not base_steps or model not in ("tiny", "tiny-conv", "lite0-clip"):
        return pretrained
    words = dict(method="finetune", data=spec, seed=1000 + seed, steps=base_steps, learning_rate=learning_rate, pairs=pairs, code=TRAINING)
    at = Path(cache_dir or out_dir) / f"base-{model}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]}"
    if not (at / "weights.safetensors").is_file():
        started = time.time()
        script_run("train.py", at, pretrained="imagenet" if model == "lite0-clip" else "none", **{k: v for k, v in words.items() if k != "code"})
        say(f"base model pre-trained in {time.time() - started:.0f} s, kept in {at}")
    return str(at / "weights.safetensors")


def one_setting(at, spec, strength, label, classes, base, mitigating):
    """Fine-tunes, discovers if the correlation was learned, mitigates if asked to: the setting's entry in protocol.json."""
    samples = load_data(spec, seed=seed)
    tuned = lambda method, **more: (at / method / "weights.safetensors").is_file() or script_run(
        "train.py", at / method, method=method, data=spec, pretrained=base, steps=steps, learning_rate=learning_rate, pairs=pairs,
        **dict(region_weight=region_weight, region_temperature=region_temperature) if method == "ravl" else {}, **more)
    tuned("finetune")
    first = reached(at / "finetune", samples)
    gap = first["groups"][2 * label + 1] - first["groups"][2 * label]
    found = dict(strength=strength, spurious_class=label, valid=gap >= .2, gap=gap, precision_at_10={}, mitigation={})
    if not found["valid"]:
        return found
    weights = at / "finetune/weights.safetensors"
    if not (at / "discovery/discovery.json").is_file():
        script_run("discover.py", at / "discovery", data=spec, pretrained=weights, regions=regions, method="all")
    tree = json.loads((at / "discovery/discovery.json").read_text())
    found["precision_at_10"] = {name: m["precision_at_10"] for name, m in tree["methods"].items()}
    if mitigating and any(c["kept"] for c in tree["clusters"]):
        for method in MITIGATIONS:
            tuned(method, **({} if method == "finetune" else dict(discovery=at / "discovery")))
            found["mitigation"][method] = {k: v for k, v in reached(at / method, samples).items() if k in FIGURES}
    return found


def reached(at, samples):
    """What the weights in a folder reach on the uncorrelated test split: the four figures, and groups, image accuracy of class x
    feature [2 C]. Region figures: zero-shot accuracy of the regions that show the class object. Kept in figures.json."""
    path = at / "figures.json"
    if path.is_file():
        return json.loads(path.read_text())
    encoder = load_encoder(model, str(at / "weights.safetensors"), quick_gelu, device)
    test = samples.keep((samples.split == 2).nonzero()[:, 0])
    pictures, _ = load_regions(regions, test.items, encoder.frame)
    z, r, _ = region_embeddings(encoder, pictures, cache="", threads=threads, label=f"{at.parent.name} {at.name}")
    g = prompt_embeddings(encoder, samples.class_prompts(), "")
    image = torch.arange(len(pictures)).repeat_interleave(torch.tensor([len(p.boxes) for p in pictures]))
    shown = region_truth(pictures, test.shows)[0]
    out = {}
    for name, e, index in (("image", z, torch.arange(len(z))), ("region", r[shown], image[shown])):
        right = (unit(e) @ g.T).argmax(1) == test.y[index]
        m = group_metrics(right, test.y[index], test.place[index], samples.counts(0), len(samples.places))
        out.update({f"{name}_overall": float(right.double().mean()), f"{name}_worst_group": m["worst_group"]})
        if name == "image":
            few = [f"{samples.classes[g['y']]}, {samples.places[g['place']]}: {g['n']}" for g in m["groups"] if g["n"] < LEAST]
            if few or len(m["groups"]) < 2 * len(samples.classes):
                raise Complaint(f"{samples.name}: test groups with fewer than {LEAST} images ({'; '.join(few) or 'some have none'}); the worst group would be noise")
            out["groups"] = [v["accuracy"] for v in m["groups"]]
    write_json(path, out)
    return out


def mean_interval(values, share=True):
    """Mean with its 95 % interval over settings, within [0, 1] if it is a share, and their number; what was not found counts as zero."""
    x = torch.tensor([v or 0. for v in values], dtype=torch.double)
    half = 1.96 * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else 0.
    least, most = (0., 1.) if share else (-1., 1.)
    return dict(mean=float(x.mean()), low=max(least, float(x.mean()) - half), high=min(most, float(x.mean()) + half), n=len(x))


def summarised(done):
    """Mean Precision@10 by method, over all valid settings and by strength; mitigations' means over settings whose RaVL Precision@10
    exceeds .6 and .8, as in the paper."""
    valid = [s for s in done if s["valid"]]
    methods = list(valid[0]["precision_at_10"]) if valid else []
    strengths = sorted({s["strength"] for s in valid}, reverse=True)
    precision = {m: dict(all=mean_interval([s["precision_at_10"][m] for s in valid]),
                         **{f"{v:g}": mean_interval([s["precision_at_10"][m] for s in valid if s["strength"] == v]) for v in strengths}) for m in methods}
    mitigation = {}
    for least in (.6, .8):
        some = [s["mitigation"] for s in valid if s["mitigation"] and (s["precision_at_10"]["ravl"] or 0) > least]
        mitigation[f"precision_above_{least:g}"] = dict(n=len(some), methods={
            m: {k: sum(s[m][k] for s in some) / len(some) for k in FIGURES} for m in MITIGATIONS} if some else {})
    return dict(settings=len(done), valid=len(valid), precision_at_10=precision, mitigation=mitigation)


def setting_tables(summary):
    """(title, header, rows) of the summary's tables."""
    p = summary["precision_at_10"]
    columns = list(next(iter(p.values()))) if p else []
    show = lambda v: f"{v['mean']:.3f} ({v['low']:.2f} to {v['high']:.2f})"
    out = [(f"Precision@10 over {summary['valid']} valid settings of {summary['settings']}, by Cramer's V, mean and 95 % interval",
            ("method", *columns), [(m, *[show(v[c]) for c in columns]) for m, v in p.items()])]
    for least in (.6, .8):
        part = summary["mitigation"][f"precision_above_{least:g}"]
        out.append((f"Mitigation, mean of {part['n']} settings with Precision@10 > {least:g}", ("method", *FIGURES),
                    [(m, *[v[k] for k in FIGURES]) for m, v in part["methods"].items()]))
    return out


def as_csv(done):
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("strength", "spurious_class", "valid", "gap", "stage", "method", "precision_at_10", *FIGURES))
    for s in done:
        head = (s["strength"], s["spurious_class"], s["valid"], s["gap"])
        rows.writerows([(*head, "discover", m, "" if v is None else v, *[""] * 4) for m, v in s["precision_at_10"].items()] or [(*head, "finetune", "", "", *[""] * 4)])
        rows.writerows((*head, "mitigate", m, "", *[v[k] for k in FIGURES]) for m, v in s["mitigation"].items())
    return text.getvalue()


def setting_page(tree, classes):
    """The HTML page: what was found, how well, what each mitigation reaches, every setting."""
    s = tree["summary"]
    sections = [("Discovery: Precision@10", bars([(m, v["all"]["mean"], (v["all"]["low"], v["all"]["high"]), f"n={v['all']['n']}")
                                                  for m, v in s["precision_at_10"].items()]))]
    part = next((p for p in reversed(s["mitigation"].values()) if p["n"]), None)
    if part:
        sections += [(f"Mitigation: {k.replace('_', ' ')}", bars([(m, v[k], None, f"n={part['n']}") for m, v in part["methods"].items()])) for k in FIGURES]
    sections += [(title, html_table(header, rows)) for title, header, rows in setting_tables(s)]
    sections.append(("Every setting", html_table(("V", "class", "valid", "gap", "RaVL Precision@10"), [
        (f"{v['strength']:g}", classes[v["spurious_class"]], "yes" if v["valid"] else "no", v["gap"], v["precision_at_10"].get("ravl")) for v in tree["settings"]])))
    sections.append(("Flags", "<pre>" + escape("\n".join(f"--{k}={v}" for k, v in tree["config"].items())) + f"\ngit {tree['git']}</pre>"))
    of = dict(digits=f"digits, {digits}", cutouts=f"cut-outs, {foregrounds}, on {backgrounds}, {feature}").get(family, family)
    return page(f"flock: controlled settings, {family.partition(':')[0]}", f"{s['valid']} of {s['settings']} settings learned the planted feature ({of}; {model}).", sections)


# ---------------------------------------------------------------------------------------------------------------------
# contrastive or not: CounterAnimal asks why contrastive models learn the nuisance more than supervised ones

SWEEP = .5, .6, .7, .8, .9, .95, 1.
ARMS = {"contrastive, captions name class and nuisance": ("finetune", "place"), "contrastive, captions name the class": ("finetune", "class"),
        "cross-entropy": ("vl_erm", "class")}


def contrast_or_not(config):
    """--protocol=contrast: the same base, data and steps with a contrastive loss and with cross-entropy, the planted feature tied ever more
    strongly to a class. On the uncorrelated test split: accuracy of the worst group and of all, and drop, accuracy of that class with the
    feature minus without it. Our design. Writes contrast.json, .csv and .svg (the worst group). A run that is there is not repeated."""
    started, out, spec = time.time(), Path(out_dir), of_family(config)
    C = len(load_data(spec(0, 0), seed=seed).classes)
    expect(1 <= repeats <= C, "repeats", repeats, f"a whole number from 1 to {C}, the number of classes")
    base, rows = base_model(spec(0, 0)), []
    for strength in SWEEP:
        for k in range(repeats):
            samples = load_data(spec(strength, k), seed=seed + k)
            for name, (method, captions) in ARMS.items():
                words = dict(data=spec(strength, k), pretrained=base, steps=steps, learning_rate=learning_rate, pairs=pairs, seed=seed + k, method=method, captions=captions)
                at = out / "runs" / hashlib.sha256(json.dumps([words, model, quick_gelu, TRAINING]).encode()).hexdigest()[:12]
                if not (at / "weights.safetensors").is_file():
                    script_run("train.py", at, **words)
                found = reached(at, samples)
                rows.append((strength, k, name, found["groups"][2 * k + 1] - found["groups"][2 * k], found["image_worst_group"], found["image_overall"]))
        say(f"V {strength:g}: " + "; ".join(f"{r[2]}: worst group {r[4]:.3f}" for r in rows[-len(ARMS):]))
    header = ("strength", "class", "loss", "drop", "worst_group", "overall")
    curves = {key: {name: [(v, mean_interval([r[at] for r in rows if r[0] == v and r[2] == name], key != "drop")) for v in SWEEP] for name in ARMS}
              for at, key in enumerate(header) if at > 2}
    write_table(out / "contrast.csv", header, rows)
    write(out / "contrast.svg", lines(curves["worst_group"], "Cramer's V of class and nuisance in training", "accuracy of the worst group"))
    for key, curve in curves.items():
        say("\n" + table((f"{key}, mean", *[f"V {v:g}" for v in SWEEP]), [(name, *[m["mean"] for _, m in points]) for name, points in curve.items()]))
    write_json(out / "contrast.json", dict(config=config, git=revision(), rows=[dict(zip(header, r)) for r in rows], **curves, seconds=time.time() - started))
    say(f"\n{out}/contrast.json, contrast.csv and contrast.svg written, {time.time() - started:.0f} s")


if __name__ == "__main__":
    run(main, "the same command")
