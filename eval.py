"""How robust is this model? Zero-shot, classifier rows and probes on sets with groups; one or many models.

    python eval.py --data=counteranimal:DIR --model=ViT-B-16 --pretrained=laion400m_e32
    python eval.py --data=waterbirds:DIR --models=lite0,ViT-B-32@openai,timm:resnet50 --protocol=probe,dfr
    python eval.py --data=folder:DIR --model=ViT-L-14 --pretrained=openai --prompts=FILE
    torchrun --nproc_per_node=4 eval.py ...                      shares the images out, with the same numbers
    python eval.py --protocol=ravl --settings=5 --mitigate=2     controlled settings, the end of this file
    python eval.py --protocol=ravl --data=cutouts                the same with photos; or --data=coco:DIR

1. Embed the images, once: what was computed before is read from the cache, and then no weights are loaded.
2. Classify them by the heads of each protocol (PROTOCOLS); with --ckpt through a map of train.py.
3. Measure: groups and their worst, CounterAnimal's common, counter and drop, BG-Gap, calibration, additivity.

--data=NAME:help says what to download and how it must look. The same command after an interruption goes on.
"""

import contextlib
import json
import math
import os
import re
import runpy
import sys
import time
import traceback
from collections import Counter, namedtuple
from operator import itemgetter
from pathlib import Path

# first, as it checks the flags before numpy and torch are imported
from data import LEAST, SPEECH, SPLITS, Complaint, Ground, dots, drawing, expect, filled, flags, folded
from data import html_table, idle, layers, linked, load_data, load_foregrounds, load_predictions
from data import load_regions, page, read_json, reading, refuse, region_truth, require, revision, rng
from data import run, say, table, tag, text, thumb, unrun, write, write_json, write_table
from data import composites as compose

import numpy as np
import torch

from kernels.launch import slices
from model import LOADED, SHARES, additivity, bar, dfr, file_digest, fit_probe, group_metrics, join
from model import load_checkpoint, load_encoder, load_heads, load_map, mask_shares, mean_std
from model import paired_bootstrap, region_embeddings, repeat_by, sha256, standard, sums, unbalanced, unit
from model import wilson, worst_ends

# fmt: off
# --- I/O ----------------------------------------------------------------------------------------------------
out_dir = "out"           # eval.json, .html, .csv, groups.csv, predictions.csv; of ravl: protocol.*
cache_dir = "cache"       # embeddings, reused by every run; --cache_dir= for none
quiet = False             # say only warnings, the result and where it lies
skip_bad = False          # leave out images that cannot be read, counted and named, instead of stopping
resize_once = False       # keep photos as small as a model sees them, for others of its preprocessing
max_pixels = 89478485     # a photo of more is refused
# --- data ---------------------------------------------------------------------------------------------------
data = ""                 # NAME:DIR, NAME waterbirds, celeba, counteranimal, nico, cocogender, in9,
                          # imagenet, folder, csv, coco, embeddings; or, without a folder, scenes, digits,
                          # cutouts. Empty: scenes, for --protocol=ravl digits
predictions = ""          # instead a FILE.csv of predictions: y, predicted, if it has them place, confidence
labels = "own"            # imagenet: of a folder with fewer classes models choose among these; all: of 1000
split = "auto"            # photos to measure on: train, val, test, all; auto: test, or all if splits are ours
classes = ""              # only these, as in car,truck; or a file of names, one a line
places = ""               # only these; with as many as --classes the k-th is the k-th class's own
columns = ""              # of csv, waterbirds: which is what, as in place=weather,path=photo; see csv:help
prompts = ""              # openai: its 80 templates; or a file of templates with {}, or of class<TAB>prompt
masks = ""                # folder of foreground masks: also metrics of the regions that show the object
confounder = 1.0          # scenes and pairs: share of the training images on their class's own place
strength = 0.0            # controlled settings: Cramer's V of a class and the planted feature in training,
spurious = "0"            # that class, by number or name (ravl goes through strengths and classes),
feature = ""              # and that feature, where there is a choice
# --- models -------------------------------------------------------------------------------------------------
model = ""                # empty: lite0; lite1, lite2, timm:NAME, an open_clip name (ViT-L-14), hf-hub:NAME,
                          # local-dir:FOLDER, lite0-clip, tiny, tiny-conv
pretrained = ""           # open_clip tag, local file, or folder of weights
models = ""               # several instead, comma-separated, each NAME or NAME@PRETRAINED
quick_gelu = "auto"       # auto follows the record of the weights; on, off
test_size = False         # timm: pictures at the size and crop of its published accuracies, not of training
ckpt = ""                 # ckpt.pt of train.py: its map is applied first
device = "auto"           # auto, cpu, cuda
dtype = "auto"            # of the forward pass: auto, float32, bfloat16
batch_size = "auto"       # images at a time; auto: 256 on a GPU, fewer if memory asks for it; CPU: 8 to 64
threads = 0               # that decode images and, on a CPU, embed them; 0 for one per core
# --- protocols ----------------------------------------------------------------------------------------------
protocol = "auto"         # of zeroshot, classifier, probe, clip_probe, dfr, ckpt (the probes in --ckpt),
                          # fewshot, comma-separated; or ravl; auto: the first three, where they can be
l2 = 0.8                  # penalty of probe and fewshot, as in train.py
shots = "1,4,16"          # fewshot: training images per class
picker = "auto"           # CounterAnimal 1v20: what picks each class's 20 labels: NAME@PRETRAINED, or self;
                          # auto: the published one, ViT-B-32@laion400m_e32, if its weights are on this
                          # machine, else self
composites = 0            # additivity also on composites of so many foregrounds, 0 for none
foregrounds = "assets/foregrounds"  # for them: folder of RGBA cut-outs, or of masked photos, ...: see help
backgrounds = "assets/backgrounds"  # folder of photos
# --- controlled settings (--protocol=ravl); 0 and empty: the family's own, see FAMILIES ---------------------
settings = 50             # how many, strongest first: Cramer's V .99 for each class, then .95, .9, .8, .7
mitigate = 10             # how many of the valid ones also with every mitigation
base_steps = 0            # pre-training of a small CLIP on uncorrelated images
steps = 0                 # of fine-tuning and of every mitigation
learning_rate = 0.0       # of both
pairs = 0                 # image-caption pairs in a step
regions = ""              # grid:N, as in discover.py
region_weight = 0.8       # w of RaVL's loss,
region_temperature = 0.3  # its temperature: at 0.07 a small margin is enough, and images follow the feature
# --- system -------------------------------------------------------------------------------------------------
seed = 0
# --- end ----------------------------------------------------------------------------------------------------
LIMITS = {  # the words that a flag may be, or list; or its interval
    "protocol": ["auto", "ravl", "PROTOCOLS"],
    "split": ("auto", "train", "val", "test", "all"),
    "labels": ("own", "all"),
    "composites": "[0, 1e6]", "mitigate": "[0, 50]", "base_steps": "[0, 1e9]", "steps": "[0, 1e9]",
    "pairs": "[0, 1e6]", "learning_rate": "[0, inf)", "settings": "[1, 50]",
    "region_weight": "[0, 1]", "region_temperature": "(0, inf)",
}
# fmt: on

DRAWS = 5  # of few shots, averaged; worst_group, too, is the mean of each draw's own
TAILS = 0.025, 0.975  # of intervals
OF_RAVL = "settings mitigate base_steps steps learning_rate pairs regions region_weight region_temperature"
NOT_RAVL = "predictions labels split places columns prompts masks confounder strength spurious models l2"
NOT_RAVL += " ckpt test_size shots picker composites foregrounds backgrounds skip_bad resize_once"
STEP = 1 << 13  # photos classified at a time
PAPERS_PICKER = "ViT-B-32@laion400m_e32"
PUBLISHED = {  # CounterAnimal's table: common, counter in per cent, over 1000 labels (NeurIPS 2024). A name
    PAPERS_PICKER: (67.13, 36.95),  # counts whole: which of timm's tags the paper took is not known here
    "ViT-B-16@laion400m_e32": (73.11, 52.17),
    "ViT-L-14@openai": (85.38, 70.28),
    "ViT-B-32@openai": (69.13, 45.62),
    "ViT-H-14-378-quickgelu@dfn5b": (90.23, 83.67),
    "timm:resnet50": (81.44, 66.07),
    "timm:vit_base_patch16_224": (84.97, 74.98),
    "timm:convnext_large": (89.12, 81.47),
}


def main():
    config = flags(globals())
    if protocol == "ravl":
        idle(NOT_RAVL, "with --protocol=ravl")
        return controlled_settings(config)
    asked, names = asked_protocols(), names_of(config)
    out, started, git, (rank, world) = Path(out_dir), time.time(), revision(), join(device)
    state = load_checkpoint(ckpt) if ckpt else {}
    through = dict(ckpt=ckpt, through="bap" if "bap" in state.get("probes", ()) else "erm") if ckpt else {}
    if predictions:
        samples, given = predicted_elsewhere()
    else:
        samples = photos_of(config, state.get("classes", []))
    for note in samples.notes:
        say(note)

    outcomes, results, failed = {}, {}, {}
    of_data = {key: getattr(samples, key) for key in ("name", "classes", "places", "notes", "official")}
    of_data.update(photos=len(samples.items), splits=torch.bincount(samples.split, minlength=3).tolist())

    def save():
        tree = dict(config=config, git=git, data=of_data, seconds=time.time() - started)
        pending = [name for name in names if name not in results and name not in failed]
        write_json(out / "eval.json", dict(tree, models=results, failed=failed, pending=pending))

    for name in names:
        try:
            outcomes[name], additive = given if predictions else evaluate(name, samples, asked, failed)
            if rank == 0:
                results[name] = measured(outcomes[name], additive, samples, seed) | through
        except Exception as problem:
            full = isinstance(problem, OSError) and not isinstance(problem, FileNotFoundError)
            if len(names) == 1 or full or world > 1:  # a full disk is no fault of the model, and of several
                raise  # processes the others would wait for the one that goes on to the next model
            kind = "" if isinstance(problem, Complaint) else type(problem).__name__ + ": "
            failed[name] = f"{kind}{problem}".splitlines()[0]
            say(f"{name}: FAILED, {failed[name]}")
        if name in results and len(names) > 1:
            metrics = results[name]["metrics"].items()
            figures = [f"{key} {v:.3f}" for key, v in metrics if isinstance(v, float)]
            say(f"{name} {results[name]['protocol']}: {', '.join(figures[:2])}")
            save()
    if rank:
        return
    if not results:
        raise Complaint(f"--models: none could be evaluated; the first, {names[0]}: {failed[names[0]]}")
    compare(results, outcomes, samples, seed)
    write_tables(out, results, outcomes, samples)
    shown = shortened(results)
    blocks = blocks_of(shown, shortened(outcomes), samples, failed)
    write(out / "eval.html", report(shown, samples, blocks, config, git))
    save()  # last: nothing is pending only if all the rest is there
    say("\n" + console(blocks), True)
    seconds = f"{time.time() - started:.1f} s"
    say(f"\n{out}/eval.json, eval.html, eval.csv, groups.csv and predictions.csv written, {seconds}", True)


def shortened(by_name):
    """What is kept by models' names, by NAME@FILE without the file's folders, if these differ, too."""
    names = [re.sub("(?<=@).*/", "", name) for name in by_name]
    return dict(zip(names, by_name.values(), strict=True)) if len({*names}) == len(names) else by_name


def asked_protocols():
    """The protocols that --protocol names, none for auto; complains of flags that say nothing to them."""
    refuse(OF_RAVL, "without --protocol=ravl")
    asked = [] if protocol == "auto" else protocol.split(",")
    for p in asked:
        expect(p in PROTOCOLS, "protocol", p, ", ".join(PROTOCOLS) + "; or ravl alone")
    idle("shots" * ("fewshot" not in asked), "without --protocol=fewshot")
    idle("picker" * (not data.startswith("counteranimal:")), "without CounterAnimal")
    idle("foregrounds backgrounds" * (not composites), "without --composites=N")
    idle("labels" * (not data.startswith("imagenet:")), "without --data=imagenet:DIR")
    return asked


def names_of(config):
    """The models to measure, as --models has them; the one of embeddings and of predictions is their file."""
    stored = data if data.startswith("embeddings:") else predictions
    config.update(data=data or predictions or "scenes", model=stored or model or "lite0")
    if stored:
        refuse("models model pretrained", f"with {stored}, which needs no model")
        return [stored]
    if models:
        refuse("model pretrained", "with --models; tags go behind @ in --models")
    names = [n.strip() for n in (models or f"{config['model']}@{pretrained}".rstrip("@")).split(",")]
    expect(len({*names} - {""}) == len(names), "models", models, "different names, comma-separated")
    return names


def photos_of(config, names):
    """The Samples of --data; where some have a label, only these. names: the classes of a checkpoint."""
    facts = {flag: config[flag] for flag in ("confounder", "strength", "spurious", "feature", "columns")}
    facts.update(all_labels=labels == "all", names=names)
    samples = load_data(config["data"], classes, places, prompts, masks, False, seed, **facts)
    labelled = samples.y >= 0
    if labelled.all() or not labelled.any():
        return samples
    line = f"WARNING: {int((~labelled).sum())} of {len(labelled)} photos have no label: they are left out"
    samples.notes.append(line)
    return samples.keep(labelled)


def report(results, samples, blocks, config, git):
    """The page: how the first model does, in a sentence and some numbers; then the blocks."""
    name, head = next(iter(results.items()))
    m, numbers = head["metrics"], ()
    if "average" not in m:
        title = f"{name} is {m['confidence']:.0%} sure of photos without labels, on average."
    elif is_counteranimal(samples) and m["drop"] is not None:
        title = f"{name} loses {100 * m['drop']:.0f} points from common to counter backgrounds."
        numbers = "common", "counter", "drop"
    elif len(samples.places) > 1 and head["groups"]:
        least = min(head["groups"], key=itemgetter("accuracy"))
        group = samples.group_name(least["y"], least["place"])
        title = f"{name} is right on {m['worst_group']:.0%} of its worst group, {group}."
        numbers = "worst_group", "avg_group_mean", "avg_train_weighted"
    else:
        title = f"{name} is right on {m['average'] or 0:.0%} of the photos."
    numbers = [(f"{m[key]:.0%}", key.replace("_", " ")) for key in numbers if m[key] is not None]
    if numbers and numbers[-1][1] == "drop":
        numbers[-1] = f"{100 * m['drop']:.0f}", "points of drop"
    links = linked("the report of the map", ckpt, "report.html", config["out_dir"])
    what = f"the checkpoint's probe {head['protocol']}"
    if predictions:
        what = "what another program predicted"
    elif protocol_of(head["protocol"]):
        what = protocol_of(head["protocol"]).what
    lead = f"{what[0].upper() + what[1:]}; {m['n']} photos."
    kicker = f"flock, eval.py: {Path(samples.name).name}, {len(results)} model{'s' * (len(results) > 1)}"
    return page(kicker, title, lead, sections(blocks), config, git, samples.notes, numbers, links)


# ----------------------------------------------------------------------------------------------------------
# one model: what it makes of each photo


class Embedded:
    """What a protocol has at hand: embeddings z [n, D] of samples; y, group [n] on their device; good [n],
    which could be read; g that heads see them through, a checkpoint's map or unit, and bare, the same but
    for unit nothing; flags l2 and seed; a checkpoint's state."""

    def __init__(self, encoder, samples, z, g, l2, seed, state=None):
        self.encoder, self.samples, self.z, self.g, self.l2, self.seed = encoder, samples, z, g, l2, seed
        self.state, self.bare = state, torch.nn.Identity() if g is unit else g
        self.y, self.group = samples.y.to(z.device), samples.group().to(z.device)
        self.good = z.isfinite().all(1).cpu()

    def usable(self, split):
        """Index [m] of the labelled photos of a split that could be read."""
        return ((self.samples.split == split) & self.good & (self.samples.y >= 0)).nonzero()[:, 0]


FIELDS = "index predicted confidence target names fitted skipped of_20 picker region_photo region_predicted"
Outcome = namedtuple("Outcome", FIELDS, defaults=(0, 0, None, "", None, None))
Outcome.__doc__ = """What a protocol makes of photos, on the CPU. index: [m], which; predicted, confidence:
[R, m], of R draws; target: [m], what would be right; names: of what is predicted; fitted: how many of them
heads were fitted on; skipped: how many could not be read; of_20: [m], CounterAnimal's 1v20, whose labels
picker chose; region_photo, region_predicted: [K], of regions that show the object."""


def evaluate(name, samples, asked, failed):
    """({protocol: Outcome}, additivity) of one model; (None, None) on ranks above 0, which only embed. Of
    several models one that cannot have all protocols has the others, and failed says of which and why."""
    how = dict(device=device, dtype=dtype, batch=batch_size, threads=threads, cache=cache_dir)
    how.update(skip_bad=skip_bad, resize_once=resize_once)
    encoder = load_encoder(*name.partition("@")[::2], quick_gelu, test_size, **how)
    for note in encoder.notes:
        say(note)
    state = load_checkpoint(ckpt, encoder) if ckpt else None
    todo, reasons = offered(encoder, samples, asked, state)
    if reasons and not (todo and models):
        raise Complaint(next(iter(reasons.values())))
    failed.update({f"{name} {p}": reason for p, reason in reasons.items()})
    z = encoder.embed(samples.items, name)
    judge, judged, picks = encoder, z, ""
    if is_counteranimal(samples) and {"zeroshot", "classifier"} & set(todo):
        picks = choose_picker(picker)
        if picks != "self":
            judge = load_encoder(*picks.partition("@")[::2], quick_gelu, **how)
            judged = judge.embed(samples.items, f"picker {picks}")
    cells = object_cells(encoder, samples, masks) if masks else None
    grid = composed(encoder, foregrounds, backgrounds, composites, skip_bad, seed) if composites else None
    if z is None:
        return None, None
    e = Embedded(encoder, samples, z, load_map(state, z.device) if state else unit, l2, seed, state)
    twenty, outcomes = pick_labels(judge, judged, samples) if picks else None, {}
    for p in todo:
        for key, row, heads in rows_of(p, e, shots):
            out = classify(e, row, heads, split, twenty, cells)._replace(picker=picks)
            outcomes[key] = out
            if out.fitted:
                say(f"WARNING: {key} was trained on {out.fitted} of the {len(out.index)} photos; see --split")
    return outcomes, additive_parts(e, grid)


def predicted_elsewhere():
    """--predictions=FILE: Samples, whose photos need not be here, and ({"predictions": Outcome}, {})."""
    refuse("data ckpt masks prompts places protocol", "with --predictions, which runs no model")
    samples, taken, sure = load_predictions(predictions, columns, classes)
    tested, index = bool((samples.split == 2).any()), torch.arange(len(taken))
    if split in SPLITS or split == "auto" and tested:
        index = index[samples.split == SPLITS.index(split.replace("auto", "test"))]
    expect(len(index), "split", split, "one that the table has rows of")
    out = Outcome(index, taken[None, index], sure[None, index], samples.y[index], samples.classes)
    return samples, ({"predictions": out}, {})


def is_counteranimal(samples):
    return samples.places == ["common", "counter"] and len(samples.labels) == 1000


def classify(e, row, heads, split, twenty, cells):
    """The Outcome of a protocol's heads on photos and, if they are given, on cells that show the object."""
    samples, source, by_label = e.samples, SOURCES.get(row.needs), row.needs in ("texts", "rows")
    if split == "auto":
        split = "test" if samples.official or source is not None else "all"
    index = e.good.nonzero()[:, 0]
    if split != "all":
        index = index[samples.split[index] == SPLITS.index(split)]
    require(len(index), f"--split={split}: {samples.name} has no photos there")
    names, target = choice(samples) if by_label else (samples.classes, samples.y)
    predicted = torch.empty(len(heads), len(index), dtype=torch.long)
    confidence = torch.empty(predicted.shape)
    of_20 = torch.empty_like(index) if twenty is not None and by_label else None
    for r, (head, owner) in enumerate(heads):
        for here in slices(len(index), STEP):
            logits = head(e.z[index[here]])
            predicted[r, here], confidence[r, here] = surest(logits, owner)
            if of_20 is not None:
                columns = twenty[samples.y[index[here]]].to(logits.device)  # [N, 20]
                best = logits.gather(1, columns).argmax(1)
                of_20[here] = columns.gather(1, best[:, None])[:, 0].cpu()
    fitted = 0 if source is None else int((samples.split[index] == source).sum())
    skipped = int((~e.good).sum())
    out = Outcome(index, predicted, confidence, target[index], names, fitted, skipped, of_20)
    if cells is None:
        return out
    inside = torch.isin(cells[1], index)
    head, owner = heads[0]
    taken = surest(head(cells[0][inside]), owner)[0]
    return out._replace(region_photo=cells[1][inside], region_predicted=taken)


def called(out, k):
    """The name of a prediction k, with its synonyms."""
    return out.names[k] if k >= 0 else "none of them"


def surest(logits, owner):
    """Logits [N, C] and the owners of columns, or None -> prediction and confidence [N], on the CPU."""
    confidence, k = logits.softmax(1).max(1)
    return (k if owner is None else owner[k]).cpu(), confidence.cpu()


def choice(samples):
    """What texts and rows choose among, and what is right for each photo [n]: class or ImageNet label."""
    wide = len(samples.labels) == 1000 or (len(samples.y) and samples.y.max() < 0)
    if len(samples.labels) < 1000 or not samples.imagenet:
        return samples.labels if wide else samples.classes, samples.y
    return samples.labels, torch.tensor([labels[0] for labels in samples.imagenet])[samples.y]


# ----------------------------------------------------------------------------------------------------------
# protocols, each with its heads: (embeddings [N, D] -> logits [N, C], the class [C] that owns each column,
# -1 for none of them; None where column k is class k)


def prompt_heads(e):
    say(e.samples.prompt_line())
    rows = e.encoder.prompts(e.samples.prompts, e.samples.labels) * (e.encoder.facts["logit_scale"] or 100.0)
    return [(lambda v: unit(repaired(e.g, v)) @ rows.T, None)]


def classifier_heads(e):
    """Over all labels for CounterAnimal, ImageNet and ImageNet-9; else a class by the best of its labels."""
    (rows, bias), owner, labels = e.encoder.classifier(), None, e.samples.imagenet
    if e.samples.name.startswith("in9"):
        owner = torch.full((len(rows),), -1, device=rows.device)
        for c, columns in enumerate(labels):
            owner[columns] = c
    by_class = owner is None and len(e.samples.labels) < len(rows)

    def head(v):
        logits = repaired(e.g, v) @ rows.T + bias
        return torch.stack([logits[:, k].amax(1) for k in labels], 1) if by_class else logits

    return [(head, owner)]


def repaired(g, z):
    """Embeddings [N, D] -> of the foreground only, in their own space, for texts and a classifier's rows:
    mu + g(z) back through the map's power, at the length of z; without a map z itself. Our reading: BAP names
    no zero-shot use."""
    if g is unit:
        return z
    v = g.mu + g(z)
    return unit(v.sign() * v.abs() ** (1 / g.power)) * z.norm(dim=1, keepdim=True)


def probe_head(fit, g):
    return lambda v: fit.logits(g(v)), None


def probe_heads(e, index=None):
    """On the training images, or at an index of them."""
    index = e.usable(0) if index is None else index
    fit = fit_probe(e.g(e.z[index]), e.y[index], e.l2, classes=len(e.samples.classes))
    return [probe_head(fit, e.g)]


def clip_probe_heads(e, C=0.316):
    """Raw embeddings, all images alike; C counts in the embeddings' own units."""
    train = e.usable(0)
    x = e.bare(e.z[train])
    scale, alike = float(mean_std(x)[1].mean()), torch.ones_like(x[:, 0])
    fit = fit_probe(x, e.y[train], 1 / (C * len(x) * scale * scale), alike, len(e.samples.classes))
    return [probe_head(fit, e.bare)]


def dfr_heads(e, scaled=True):
    """On embeddings as the encoder gives them, as train.py; of a checkpoint through its map. scaled: by the
    training images, as the authors do."""
    train, val, x, scaler = e.usable(0), e.usable(1), e.bare(e.z), None
    groups = e.group[val]
    least = int(torch.unique(groups[groups >= 0], return_counts=True)[1].min())
    if least < 8:
        say(f"WARNING: dfr balances the validation groups down to the smallest, {least} images: expect noise")
    if scaled and not len(train):
        say("dfr: there are no training images to standardise by, these are the validation images")
    if scaled:
        scaler = standard(x[train if len(train) else val])
    fit = dfr(x[val], e.y[val], groups, e.seed, scaler)
    return [probe_head(fit, e.bare)]


def fewshot_heads(e, shots):
    """One probe for each of DRAWS draws of so many training images of each class."""
    train, names, heads = e.usable(0), e.samples.classes, []
    of_class = [train[e.samples.y[train] == c] for c in range(len(names))]
    least, name = min((len(index), name) for index, name in zip(of_class, names, strict=True))
    if least < shots:
        short = f"{sum(len(index) < shots for index in of_class)} of {len(names)} classes have fewer"
        short += f" training images, {name} the fewest, {least}"
        say(f"WARNING: fewshot_{shots}: {short}; of these classes all are taken")
    for d in bar(f"fewshot_{shots}", range(DRAWS)):
        draw = []
        for c, index in enumerate(of_class):
            order = rng(e.seed, "fewshot", shots, d, c).permutation(len(index))
            draw.append(index[torch.from_numpy(order[:shots])])
        heads += probe_heads(e, torch.cat(draw))
    return heads


def ckpt_heads(e):
    """{name: head} of the checkpoint's own probes, whose classes are the samples', in any order, or more."""
    number = {folded(name): k for k, name in enumerate(e.samples.classes)}
    owner = torch.tensor([number.get(folded(name), -1) for name in e.state["classes"]], device=e.z.device)
    return {name: (head, owner) for name, head in load_heads(e.state, e.z.device).items()}


def rows_of(p, e, shots):
    """The rows of a protocol, (name, Protocol, heads): one; of fewshot one for each number of shots; of ckpt
    for each probe, which has learned from a split if the checkpoint was made with the same --data."""
    row = PROTOCOLS[p]
    if p == "fewshot":
        return [(f"{p}_{k}", row, row.heads(e, int(k))) for k in shots.split(",")]
    if p != "ckpt":
        return [(p, row, row.heads(e))]
    made = e.state["config"].get("data", "")
    rows, same = [], e.samples.name == made or e.samples.name.startswith(f"{made} V ")
    for name, head in row.heads(e).items():
        learned = "validation" if name.startswith("val_probe") else "training"
        rows.append((name, row._replace(needs=learned) if same else row, [head]))
    return rows


Protocol = namedtuple("Protocol", "what needs heads")  # heads: Embedded -> a list of heads, one a draw
SOURCES = {"training": 0, "validation": 1}  # what is needed, and the split that heads then learn from
PROTOCOLS = {
    "zeroshot": Protocol("text prompts", "texts", prompt_heads),
    "classifier": Protocol("ImageNet classifier's own rows", "rows", classifier_heads),
    "probe": Protocol("linear probe, class-balanced, on unit embeddings", "training", probe_heads),
    "clip_probe": Protocol("linear probe as CLIP's authors run it, C = 0.316", "training", clip_probe_heads),
    "dfr": Protocol("last-layer retraining on validation groups, as published", "validation", dfr_heads),
    "dfr_val_scaled": Protocol("dfr, scaled by validation", "validation", lambda e: dfr_heads(e, False)),
    "ckpt": Protocol("the checkpoint's own probes, in rows of their names", "ckpt", ckpt_heads),
    "fewshot": Protocol("probe on a few images of each class", "training", fewshot_heads),
}


def protocol_of(row):
    """The Protocol of a row of the tables, by its name; None of a checkpoint's probes and of predictions."""
    return PROTOCOLS.get(row) or PROTOCOLS.get(row.partition("_")[0])


def offered(encoder, samples, asked, state=None):
    """Protocols to run, those asked for or what model and data allow; and {protocol: why it cannot be}."""
    lacks = lacking(encoder, samples, state)
    reasons = {p: lacks[PROTOCOLS[p].needs].format(p=p) for p in asked if PROTOCOLS[p].needs in lacks}
    if asked:
        return [p for p in PROTOCOLS if p in asked and p not in reasons], reasons
    can = [p for p in ("zeroshot", "classifier") if PROTOCOLS[p].needs not in lacks]
    tested = samples.official or len(samples.classes) == 2 and (samples.split == 2).any()
    if "training" not in lacks and (tested or not can):
        can.append("probe")
    if "ckpt" not in lacks and (not can or samples.y.max() < 0):
        can.append("ckpt")
    if not can:
        raise Complaint("; ".join(lacks[k].format(p="a probe") for k in ("texts", "training") if k in lacks))
    if encoder.tokenizer and samples.nameless:
        say(f"zeroshot is not run: {samples.nameless}")
    return can, reasons


def lacking(encoder, samples, state=None):
    """{what a protocol needs: the line that says that it is not there}."""
    lacks, name = {}, f"--model={encoder.name}"
    made = (state or {}).get("classes")
    here, theirs = {*map(folded, samples.classes)}, {*map(folded, made or [])}
    if made is None:
        lacks["ckpt"] = "{p}: the probes of a checkpoint need it, --ckpt=FILE of train.py"
    elif here != theirs and not (here < theirs and samples.y.max() >= 0):
        kinds = ", ".join(samples.classes[:6])
        lacks["ckpt"] = f"--ckpt: made for {', '.join(made[:6])}, {samples.name} has {kinds}; take the same"
    if encoder.tokenizer is None:
        cure = "a CLIP, --protocol=classifier"
        if encoder.kind == "stored":
            cure = "an array text [C, D] in the file"
        lacks["texts"] = f"{name}: it has no text tower, zero-shot needs one; take {cure} or --protocol=probe"
    elif samples.nameless:
        lacks["texts"] = samples.nameless.replace("{", "{{").replace("}", "}}")
    if not encoder.facts["rows"]:
        lacks["rows"] = f"{name}: it has no ImageNet classifier; take --protocol=zeroshot or probe"
    elif not samples.imagenet:
        cure = " (put in_to_in9.json into its folder)" * samples.name.startswith("in9")
        lacks["rows"] = f"{samples.name}: its classes are not ImageNet's{cure}"
    if len(torch.unique(samples.y[(samples.y >= 0) & (samples.split == 0)])) < 2:
        lacks["training"] = f"{samples.name}: {{p}} needs a training split with at least two classes"
    reason = unbalanced(samples, 1, 2, 8)
    if reason:
        lacks["validation"] = f"{samples.name}: {{p}} cannot be: {reason}"
    return lacks


# ----------------------------------------------------------------------------------------------------------
# the 20 labels, regions, additivity


def choose_picker(picker):
    """--picker, auto resolved: no surprise of a download of 600 MB."""
    from huggingface_hub.constants import HF_HUB_CACHE

    kept = Path(HF_HUB_CACHE) / "models--timm--vit_base_patch32_clip_224.laion400m_e32" / "snapshots"
    if picker != "auto":
        return picker
    if any(kept.glob("*/open_clip_*")):
        return PAPERS_PICKER
    say(f"WARNING: 1v20: the model measured picks its own 20 labels; the paper's is --picker={PAPERS_PICKER}")
    return "self"


def pick_labels(encoder, z, samples):
    """CounterAnimal's 1v20: 20 labels with the highest mean score on a class's photos, [classes, 20]: those
    that it is most easily taken for, the same for all models if one model picks them."""
    if encoder.tokenizer:
        v, rows, bias = unit(z), encoder.prompts(samples.prompts), 0.0
    else:
        v, (rows, bias) = z, encoder.classifier()
    y = samples.y.to(z.device)
    mean = sums(v.nan_to_num(), y, len(samples.classes)) / torch.bincount(y).clamp(min=1)[:, None]
    return (mean @ rows.T + bias).topk(20).indices.cpu()


def object_cells(encoder, samples, masks, share=0.5):
    """Cells of grid:3 of which this share or more is the object: embeddings [K, D], the photo of each [K]."""
    index = [k for k, cut in enumerate(samples.cut) if cut is not None]
    pictures, _ = load_regions("grid:3", [samples.items[k] for k in index], encoder.frame, encoder.skip_bad)
    x = region_embeddings(encoder, pictures)[1]
    if x is None:
        return None
    shares = [mask_shares(p, samples.cut[k].figure.mask.path) for p, k in zip(pictures, index, strict=True)]
    of_object = (torch.cat(shares) >= share) & x.isfinite().all(1).cpu()
    if not of_object.any():
        raise Complaint(f"--masks={masks}: no cell of a 3x3 grid is at least {share:.0%} object in any photo")
    return x[of_object], repeat_by(torch.tensor(index), [len(p.boxes) for p in pictures])[of_object]


def composed(encoder, foregrounds, backgrounds, instances, skip_bad, seed):
    """Embeddings [N, D] of composites, 8 backgrounds for each foreground, and the two of each [N]."""
    figures, notes = load_foregrounds(foregrounds, skip_bad)
    grounds, of_grounds = layers(backgrounds, Ground, "backgrounds", skip_bad)
    for note in notes + of_grounds:
        say(note)
    pictures, i, j = compose(figures, grounds, instances, 8, seed)
    return encoder.embed(pictures, "composites"), i, j


def additive_parts(e, grid):
    """Additivity of the mean embeddings of class x place cells, and of composites."""
    out, P, index = {}, len(e.samples.places), (e.good & (e.samples.group() >= 0)).nonzero()[:, 0]
    if P > 1 and len(index):
        mean = sums(unit(e.z[index]).double(), e.group[index], len(e.samples.classes) * P)
        cells = torch.unique(e.group[index])
        heldout = 0.1 if len(cells) >= 20 else 0.0
        out["cells"] = additivity(unit(mean[cells]), cells // P, cells % P, heldout, e.seed)
    if grid is not None:
        z, i, j = grid
        readable = z.isfinite().all(1)
        i, j = i.to(z.device)[readable], j.to(z.device)[readable]
        out["composites"] = additivity(unit(z[readable]), i, j, seed=e.seed)
    return out


# ----------------------------------------------------------------------------------------------------------
# what it amounts to


def measured(outcomes, additive, samples, seed):
    """Outcomes of one model -> its entry in eval.json, with what the first protocol gives on top; of a
    checkpoint's probes alone that of its own method."""
    parts = {p: measure(out, samples, seed) for p, out in outcomes.items()}
    p = next(iter(parts))
    if protocol_of(p) is None and "bap" in parts:
        p = "bap"
    return dict(parts[p], protocol=p, protocols=parts, additivity=additive)


def measure(out, samples, seed):
    """One Outcome -> dict of metrics, classes, groups."""
    y, place = samples.y[out.index], samples.place[out.index]
    if (y < 0).all():
        taken = torch.bincount(out.predicted[0], minlength=len(out.names)).tolist()
        classes = {name: dict(predicted=n) for name, n in zip(out.names, taken, strict=True)}
        metrics = dict(n=len(y), confidence=float(out.confidence.mean()))
        return dict(metrics=metrics, classes=classes, groups=[])
    correct = out.predicted == out.target  # [R, m]
    mean = correct.double().mean(0)  # over the draws, [m]
    metrics, worst_of = group_metrics(mean, samples, out.index), samples.worst
    groups, of_draws = metrics.pop("groups"), [group_metrics(c, samples, out.index) for c in correct]
    # the worst group of few shots is the mean of each draw's own, so is its interval
    ends = [worst_ends([(g["accuracy"] * g["n"], g["n"]) for g in m["groups"]]) for m in of_draws]
    metrics[worst_of] = sum(m[worst_of] for m in of_draws) / len(of_draws)
    metrics[f"{worst_of}_interval"] = np.mean(ends, 0).tolist()
    metrics.update(seen_in_training=out.fitted, average=metrics.pop("overall"))
    metrics.update(ece=ece(out.confidence.flatten(), correct.flatten()), n=len(y), skipped=out.skipped)
    classes = class_metrics(out, samples, mean, groups)
    if is_counteranimal(samples):
        into = classes, samples.classes, seed
        metrics = counter_metrics(groups, *into) | metrics
        if out.of_20 is not None:
            of_20 = group_metrics(out.of_20 == out.target, samples, out.index)["groups"]
            metrics |= counter_metrics(of_20, *into, "_1v20") | dict(picker=out.picker)
    if samples.name.startswith("in9"):
        metrics = in9_metrics(mean, place, samples.places, seed) | metrics
    if out.region_photo is not None:
        target = torch.zeros_like(samples.y).index_copy(0, out.index, out.target)
        right = out.region_predicted == target[out.region_photo]
        of_regions = group_metrics(right, samples, out.region_photo)
        for key in ("overall", worst_of):
            metrics[f"region_{key}"] = of_regions[key]
        metrics["regions"] = len(right)
    return dict(metrics=metrics, classes=classes, groups=groups)


def class_metrics(out, samples, mean, groups):
    """For each class that is there its accuracy, interval, places, and what it is most often taken for."""
    y, wrong, classes = samples.y[out.index], out.predicted[0] != out.target, {}
    for c in torch.unique(y).tolist():
        accuracy, n = float(mean[y == c].mean()), int((y == c).sum())
        words = [called(out, k).split(",")[0] for k in out.predicted[0][wrong & (y == c)].tolist()]
        entry = dict(accuracy=accuracy, n=n, interval=list(wilson(accuracy * n, n)))
        entry["taken_for"] = dict(Counter(words).most_common(3))
        if len(samples.places) > 1:
            entry["places"] = {samples.places[g["place"]]: g["accuracy"] for g in groups if g["y"] == c}
        classes[samples.classes[c]] = entry
    return classes


def redraw(cells, seed, stream=0, times=2000):
    """Accuracies [times, G] of cells (n, accuracy), photos drawn anew: of zeros and ones that is binomial."""
    n, accuracy = np.array(cells).T
    return np.random.default_rng([seed, stream]).binomial(n.astype(int), accuracy, (times, len(n))) / n


def ece(confidence, correct, bins=15):
    """Expected calibration error: photos' mean |accuracy - confidence| of their bin (Guo et al. 2017)."""
    if confidence.isnan().any():
        return None
    b = (confidence * bins).long().clamp(0, bins - 1)
    gap = sums((correct.double() - confidence.double())[:, None], b, bins)
    return float(gap.abs().sum() / len(b))


def counter_metrics(groups, classes, names, seed, suffix=""):
    """CounterAnimal's common, counter and their drop: means over classes, as in the paper; plain averages.
    The drop's interval draws the photos of each class anew. groups: as of group_metrics, of place 0 common
    and 1 counter. What is of one class goes into classes[name]."""
    at = {(g["y"], g["place"]): (g["n"], g["accuracy"]) for g in groups}
    for y in sorted({g["y"] for g in groups}):
        (n, common), (m, counter) = (at.get((y, k), (0, None)) for k in (0, 1))
        drop = None if None in (common, counter) else common - counter
        values = {"common" + suffix: common, "counter" + suffix: counter, "drop" + suffix: drop}
        classes.setdefault(names[y], {}).update(values, n_common=n, n_counter=m)
    out = dict.fromkeys("common counter drop drop_interval common_plain counter_plain".split())
    cells = [[cell for (_, place), cell in at.items() if place == k] for k in (0, 1)]  # [(n, accuracy)] each
    for name, cell in zip(("common", "counter"), cells, strict=True):
        if cell:
            n, share = np.transpose(cell)
            out[name], out[name + "_plain"] = float(share.mean()), float(np.average(share, weights=n))
    both = [y for y, place in at if place == 0 and (y, 1) in at]  # a drop is one of the same classes
    if both:
        common, counter = ([at[y, k] for y in both] for k in (0, 1))
        drawn = redraw(common, seed).mean(1) - redraw(counter, seed, 1).mean(1)
        drop = float(np.mean([share for _, share in common]) - np.mean([share for _, share in counter]))
        out.update(drop=drop, drop_interval=np.quantile(drawn, TAILS).tolist())
    return {key + suffix: value for key, value in out.items()}


def in9_metrics(correct, place, places, seed):
    """ImageNet-9: accuracy on each variation, and BG-Gap = mixed_same - mixed_rand. correct: [m]."""
    of = {name: correct[place == k] for k, name in enumerate(places) if (place == k).any()}
    out = {name: float(v.mean()) for name, v in of.items()}
    if {"mixed_same", "mixed_rand"} <= set(of):
        same, rand = redraw([(len(of[name]), out[name]) for name in ("mixed_same", "mixed_rand")], seed).T
        ends = np.quantile(same - rand, TAILS).tolist()
        out = dict(bg_gap=out["mixed_same"] - out["mixed_rand"], bg_gap_interval=ends, **out)
    return out


def expected(common):
    """The counter accuracy at a common one, by the least-squares line of published models' logits."""
    published = torch.tensor(list(PUBLISHED.values()), dtype=torch.double) / 100
    slope, start = np.polyfit(*published.logit(0.001).T, 1)
    return float((slope * torch.tensor(float(common), dtype=torch.double).logit(0.001) + start).sigmoid())


def compare(results, outcomes, samples, seed):
    """Puts into results effective robustness (counter accuracy less expected, Taori et al. 2020; of logits,
    our reading), and how much better than the first a model is."""
    for _, _, entry in each_outcome(results) if is_counteranimal(samples) else ():
        m = entry["metrics"]
        m["effective_robustness"] = None if m["drop"] is None else m["counter"] - expected(m["common"])
    baseline, *others = (outcomes[name][entry["protocol"]] for name, entry in results.items())
    for out, entry in zip(others, list(results.values())[1:], strict=True):
        if samples.y[out.index].min() >= 0 and torch.equal(out.index, baseline.index):
            right = [part.predicted[0] == part.target for part in (out, baseline)]
            ends = paired_bootstrap(*right, samples.group()[out.index], seed=seed)
            entry["metrics"][f"{samples.worst}_over_first"] = list(ends)


# ----------------------------------------------------------------------------------------------------------
# blocks: what the console and the page show, laid out once

Block = namedtuple("Block", "title header rows parts notes said", defaults=((), (), (), (), False))
# under a title a table, Html parts (bars, figures, drawings) and notes; said: on the console, too


def console(blocks):
    """The tables and notes of blocks as text."""
    shown = [b for b in blocks if b.said and b.rows]
    return filled("\n\n".join("\n".join([b.title, table(b.header, b.rows), *b.notes]) for b in shown))


def sections(blocks):
    """Blocks as sections of a page; empty ones are left out."""
    out = []
    for b in blocks:
        rows = [html_table([h.replace("_", " ") for h in b.header], b.rows)] if b.rows else []
        if rows or b.parts:
            out.append((b.title, *rows, *b.parts, *[tag("p", note, class_="dim") for note in b.notes]))
    return out


def each_outcome(results):
    """(model, protocol, {metrics, classes, groups}) of all."""
    return [(name, p, m) for name, r in results.items() for p, m in r["protocols"].items()]


def by_group(results):
    """{(class, place): what groups say of it, or None, for each outcome}, of all groups that occur."""
    entries = [{(g["y"], g["place"]): g for g in m["groups"]} for _, _, m in each_outcome(results)]
    return {pair: [entry.get(pair) for entry in entries] for pair in sorted(set().union(*entries))}


def mapped(r, p):
    """A protocol as it is shown: with the method of the checkpoint whose map embeddings went through."""
    return f"{p}, {r['through']}" if "through" in r and protocol_of(p) else p


def metric_columns(results, samples):
    """The metrics to show: those that some row has; n where it differs, as probes see the test split."""
    wanted = ["bg_gap", *samples.places, "worst_group", "avg_group_mean", "avg_train_weighted", "average"]
    wanted += ["region_overall", "region_worst_group", "confidence", "ece"]
    if is_counteranimal(samples):
        wanted = ["common", "counter", "drop", "effective_robustness", "common_plain", "counter_plain"]
        wanted += ["common_1v20", "counter_1v20", "drop_1v20", "worst_group", "ece"]
    elif len(samples.places) < 2:
        wanted = ["average", "avg_group_mean", "worst_class", "confidence", "ece"]
    rows = [m["metrics"] for _, _, m in each_outcome(results)]
    differ = ["n"] * (len({m["n"] for m in rows}) > 1)
    return differ + [k for k in wanted if any(m.get(k) is not None for m in rows)]


def blocks_of(results, outcomes, samples, failed):
    """All that the console and eval.html show."""
    name, head = next(iter(results.items()))
    counter = is_counteranimal(samples)
    blocks = [counter_block(name, head) if counter else groups_block(results, samples)]
    blocks += [results_block(results, samples, failed), line_block(results, counter, samples.worst)]

    rows = []
    for c, m in head["classes"].items():
        if "accuracy" in m:
            taken = [f"{label} ({count})" for label, count in m.get("taken_for", {}).items()]
            rows.append((c, m["accuracy"], m["n"], ", ".join(taken)))
    title = f"What each class is taken for, {name} {head['protocol']}"
    rows = sorted(rows, key=itemgetter(1))[:45]
    blocks.append(Block(title, ("class", "accuracy", "n", "taken for"), rows))
    taken = Counter({c: m["predicted"] for c, m in head["classes"].items() if m.get("predicted")})
    title = f"What photos are taken for, {name} {head['protocol']}"  # without labels
    blocks.append(Block(title, ("class", "photos"), taken.most_common(45), said=True))
    for name, entry in list(results.items())[:3] if rows else ():
        figures = worst(outcomes[name][entry["protocol"]], samples) or [tag("p", "none")]
        blocks.append(Block(f"Worst confusions: wrong and sure, {name} {entry['protocol']}", parts=figures))

    rows = []
    for name, entry in results.items():
        for kind, fits in entry["additivity"].items():
            rows += [(name, kind, geometry, *[fit[k] for k in SHARES]) for geometry, fit in fits.items()]
    title = "Additivity of mean embeddings of class x place (cells), of composites: shares of variance"
    unknown = any(row[3] is None for row in rows)
    notes = ["-: too few classes share places, so that any embeddings would fit"] * unknown
    blocks.append(Block(title, ("model", "of", "geometry", *SHARES), rows, notes=notes, said=True))

    if any(p.startswith("zeroshot") for _, p, _ in each_outcome(results)):
        rows, others = [], len(samples.labels) - 45
        for label, texts in list(zip(samples.labels, samples.prompts, strict=True))[:45]:
            rows.append((label, "; ".join(texts[:4]) + f" and {len(texts) - 4} more" * (len(texts) > 4)))
        notes = [f"and of {others} more labels"] * (others > 0)
        blocks.append(Block("Prompts", ("label", "prompts, averaged"), rows, notes=notes))
    return blocks


def results_block(results, samples, failed):
    """The table of all models and protocols, with the groups if they are few; and notes about it."""
    keys, (name, head) = metric_columns(results, samples), next(iter(results.items()))
    m, alike, rows, notes = head["metrics"], "n" not in keys, [], []  # alike: rows on the same photos
    groups = by_group(results)
    if is_counteranimal(samples) or len(groups) > 8:
        groups = {}
    if groups:
        named = []
        for pair, cells in groups.items():
            n = next(cell["n"] for cell in cells if cell)
            named.append(samples.group_name(*pair) + f" (n={n})" * alike)
        notes.append("groups: " + ", ".join(f"{k} {group}" for k, group in enumerate(named, 1)))
    for column, (model, p, entry) in enumerate(each_outcome(results)):
        values = [entry["metrics"].get(key) for key in keys]
        values += [g[column] and g[column]["accuracy"] for g in groups.values()]
        rows.append((model, mapped(results[model], p), *values))
    if any(p.startswith("fewshot") for _, p, *_ in rows):
        notes.append(f"fewshot: means over the draws; {samples.worst}, too, is the mean of each draw's own")
    if head.get("through") == "bap":
        notes.append(f"bap: through the map of {Path(head['ckpt']).name}")
    for key in [key for key in ("drop", samples.worst, "bg_gap") if m.get(key + "_interval")][:1]:
        low, high = m[key + "_interval"]
        notes.append(f"{name} {head['protocol']}: {key} {m[key]:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    for model in results if is_counteranimal(samples) else ():
        if model in PUBLISHED:
            notes.append("{}: published {:.2f} common, {:.2f} counter".format(model, *PUBLISHED[model]))
    notes += [f"FAILED {model}: {problem}" for model, problem in failed.items()]
    title = Path(samples.name).name + f": {m['n']} photos" * alike
    header = ("model", "protocol", *keys, *[f"group {k}" for k in range(1, 1 + len(groups))])
    return Block(title, header, rows, notes=notes, said=True)


def line_block(results, counter, worst):
    """The first protocol of each model as a point; of CounterAnimal among published models."""
    x, y = ("common", "counter") if counter else ("avg_group_mean", worst)
    points, curve, notes = [], [], []
    if counter:
        points = [(name, a / 100, b / 100, "pale") for name, (a, b) in PUBLISHED.items()]
        curve = [(v / 100, expected(v / 100)) for v in range(2, 99)]
        notes = ["Pale: published models, over the same 1000 labels. The line is fitted to logits."]
    for name, entry in results.items():
        at = entry["metrics"].get(x), entry["metrics"].get(y)
        points += [(name, *at, "dot")] * (None not in at)
    parts = [scatter(points, curve, x.replace("_", " "), y.replace("_", " "))] if len(points) > 1 else []
    return Block("Accuracy on the line", parts=parts, notes=notes)


def scatter(points, curve, xlabel, ylabel):
    """SVG of points (name, x, y, class) in the unit square and a curve of (x, y), zoomed to the points."""
    values = [v for _, x, y, _ in points for v in (x, y)]
    low, high = max(0, math.floor(10 * min(values) - 0.5)), min(10, math.ceil(10 * max(values) + 0.5))

    def at(x, y):
        return [a + b * (10 * v - low) / (high - low) for a, b, v in ((40, 350, x), (310, -300, y))]

    parts = [text(215, 348, xlabel, "middle")]
    parts.append(text(10, 160, ylabel, "middle", transform="rotate(-90 10 160)"))
    for k in range(low, high + 1):
        x, y = at(k / 10, k / 10)
        parts.append(tag("path", d=f"M{x:.0f} 10V310M40 {y:.0f}H390", class_="grid"))
        parts += [text(x, 328, f"{k / 10}", "middle", "dim"), text(35, y + 4, f"{k / 10}", "end", "dim")]
    inside = [at(*p) for p in curve if low / 10 <= min(p) and max(p) <= high / 10] or [at(low / 10, low / 10)]
    parts.append(tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in inside), class_="pale"))
    taken = []
    for name, u, v, kind in sorted(points, key=lambda point: (point[3] != "dot", point[2])):
        x, y = at(u, v)
        title = tag("title", f"{name}: {u:.3f}, {v:.3f}")
        parts.append(tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_=kind))
        while any(abs(y - b) < 13 and abs(x - a) < 160 for a, b in taken):  # no name over another
            y -= 13
        taken.append((x, y))
        parts.append(text(x + (-8 if x > 250 else 8), y + 4, name[:26], "end" if x > 250 else "start"))
    return drawing(f"{ylabel} by {xlabel}", 354, *parts)


def counter_block(name, head):
    rows = []
    for label, m in sorted(head["classes"].items(), key=lambda item: -(item[1]["drop"] or 0)):
        pairs = (m["common"], m["n_common"]), (m["counter"], m["n_counter"])
        values = [share is not None and (share, wilson(share * n, n)) for share, n in pairs]
        rows.append((label[:44], f"n = {m['n_common']}, {m['n_counter']}", values))
    title = f"Common and counter photos by class, largest drop first, {name}"
    return Block(title, parts=[dots("common and counter", rows, ("common", "counter"))])


def groups_block(results, samples):
    """The accuracy of each group by the rows of the table, up to six of them."""
    rows, parts, every, groups = [], [], each_outcome(results), by_group(results)
    for pair, cells in groups.items() if len(groups) <= 60 else ():
        n = sorted({cell["n"] for cell in cells if cell})
        values = [cell and (cell["accuracy"], cell["interval"]) for cell in cells[:6]]
        rows.append((samples.group_name(*pair)[:44], f"n = {', '.join(map(str, n))}", values))
    if rows:
        series = [f"{name} {mapped(results[name], p)}" for name, p, _ in every[:6]]
        parts = [dots("groups", rows, tuple(series) if len(series) > 1 else ("",))]
    title = "Accuracy of each group, with 95 % intervals"
    return Block(title + f": the first 6 of {len(every)} rows" * (len(every) > 6), parts=parts)


def worst(out, samples, most=12):
    """The photos that are wrong with the highest confidence, as figures; not of one class alone."""
    y, figures, shown = samples.y[out.index].tolist(), [], []
    wrong = (out.predicted[0] != out.target) & (samples.y[out.index] >= 0)
    sure = out.confidence[0].nan_to_num(1.0).where(wrong, -1.0)
    for k in sure.argsort(descending=True)[: int(wrong.sum())].tolist():
        if shown.count(y[k]) < max(2, most // len(samples.classes)) and len(figures) < most:
            shown.append(y[k])
            photo, taken = int(out.index[k]), called(out, int(out.predicted[0][k])).split(",")[0]
            group = samples.group_name(y[k], int(samples.place[photo]))
            caption = f"{group}, taken for {taken} ({float(out.confidence[0][k]):.2f})"
            figures.append(thumb(samples.items[photo], caption))
    return figures


def write_tables(out, results, outcomes, samples):
    """eval.csv: a row for each model and protocol; groups.csv: and group; predictions.csv: for each photo."""
    rows, of_groups, columns = each_outcome(results), [], []
    keys = {k: None for _, _, m in rows for k, v in m["metrics"].items() if not isinstance(v, list)}
    lines = [(name, p, *[m["metrics"].get(k) for k in keys]) for name, p, m in rows]
    write_table(out / "eval.csv", ("model", "protocol", *keys), lines)
    header = ["image", "class", "place", "split"]
    for name, p, m in rows:
        for g in m["groups"]:
            where = samples.classes[g["y"]], samples.places[g["place"]]
            of_groups.append((name, p, *where, g["n"], g["accuracy"], *g["interval"]))
        header += [f"{name} {p}", f"{name} {p} confidence"]
        out_of = outcomes[name][p]
        # of ImageNet's labels those of the classes here by these names, as in y
        wide = samples.imagenet if len(out_of.names) == 1000 else ()
        name_of = {k: c for c, labels in zip(samples.classes, wide, strict=False) for k in labels}
        taken = [name_of.get(k) or called(out_of, k) for k in out_of.predicted[0].tolist()]
        sure = [f"{v:.4f}".replace("nan", "") for v in out_of.confidence[0].tolist()]
        cells = zip(taken, sure, strict=True)
        columns.append(dict(zip(out_of.index.tolist(), cells, strict=True)))
    written = ("model", "protocol", "class", "place", "n", "accuracy", "low", "high")
    write_table(out / "groups.csv", written, of_groups)
    lines = []
    for photo in sorted(set().union(*columns)):
        cells = [cell for column in columns for cell in column.get(photo, ("", ""))]
        drawn, c = f"{samples.captions[photo]}, {photo}", int(samples.y[photo])
        image = getattr(samples.items[photo], "path", drawn)
        place, split = int(samples.place[photo]), SPLITS[samples.split[photo]]
        where = samples.classes[c] if c >= 0 else "", samples.places[place] if place >= 0 else ""
        lines.append((image, *where, split, *cells))
    write_table(out / "predictions.csv", header, lines)


# ----------------------------------------------------------------------------------------------------------
# controlled settings: fine-tune where a planted feature goes with a class, discover, mitigate (RaVL)

STRENGTHS = 0.99, 0.95, 0.9, 0.8, 0.7
MITIGATIONS = tuple(unrun(Path(__file__).with_name("train.py"))["METHODS"])
FIGURES = "image_overall", "image_worst_group", "region_overall", "region_worst_group"
VALID = 0.2  # what the feature must be worth, in accuracy on its class, to count as learned
FREE = "settings mitigate threads cache_dir out_dir quiet".split()  # may differ when a run goes on
SHARED = "data classes feature model quick_gelu device dtype batch_size threads cache_dir".split()
PRODUCTS = {"train.py": "weights.safetensors", "discover.py": "discovery.json"}
PRETRAINED = {"tiny": "none", "tiny-conv": "none", "lite0-clip": "imagenet"}  # what a base model starts from

# What a family takes where the flags say nothing. A base that knows the classes learns nothing spurious: that
# of digits is stopped early; the others' image tower knows ImageNet, and their texts follow in these steps
FAMILY = "model", "base_steps", "steps", "learning_rate", "pairs", "regions"
FAMILIES = {
    "digits": ("tiny-conv", 130, 160, 2e-3, 64, "grid:2"),
    "cutouts": ("lite0-clip", 0, 20, 3e-4, 32, "grid:2"),
    "coco": ("lite0-clip", 0, 20, 3e-4, 32, "grid:3"),
}


def controlled_settings(config):
    """--protocol=ravl: runs the settings, and writes protocol.json after each, .csv and .html at the end."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    expect(alone, "protocol", protocol, "none in several processes; start it without torchrun")
    config = of_family(config)
    started, out, git, done = time.time(), Path(out_dir), revision(), []
    path, what = out / "protocol.json", "a protocol.json of eval.py"
    with reading(path, what, "move it away"):
        made = read_json(path, what)["config"] if path.is_file() else config
        differ = [f"--{k}={made.get(k)}" for k in config if k not in FREE and made.get(k) != config[k]]
    require(not differ, f"{path}: made with {', '.join(differ)}; give the same flags, or another --out_dir")
    LOADED["most"] = 3  # the base model, the fine-tuned, a mitigated: all scripts run in this process
    classes = setting_data(config, 0.0).classes
    todo = [(strength, c) for strength in STRENGTHS for c in range(len(classes))][:settings]
    base = base_model(config)
    for strength, c in todo:
        mitigating = sum(bool(setting["mitigation"]) for setting in done) < mitigate
        at = out / f"settings/{strength:g}-{c}"
        setting = one_setting(config, at, strength, classes, c, base, mitigating)
        done.append(setting)
        tree = dict(config=config, git=git, settings=done, summary=summarised(done))
        write_json(path, dict(tree, seconds=time.time() - started))
        gap = f"gap {setting['gap']:.2f}" + ", not valid" * (not setting["valid"])
        at_10 = [f"{m} {'-' if p is None else f'{p:.1f}'}" for m, p in setting["precision_at_10"].items()]
        at_10 = f"Precision@10 {', '.join(at_10) or 'not looked for'}"
        say(f"setting {len(done)}/{len(todo)}: V {strength:g}, {classes[c]}: {gap}; {at_10}")
    write_settings(out / "protocol.csv", done)
    blocks, summary = setting_blocks(tree, classes), tree["summary"]
    learned = f"{summary['valid']} of {summary['settings']} settings learned the planted feature"
    learned += f" ({config['data']}; {config['model']})."
    write(out / "protocol.html", setting_page(tree, blocks, classes, learned))
    say("\n" + "\n\n".join(filter(None, (console(blocks), learned))), True)
    say(f"\n{out}/protocol.json, protocol.csv and protocol.html written, {time.time() - started:.0f} s", True)


def of_family(config):
    """The flags with the family's own values where they are left open; says which these are."""
    data = config["data"] or "digits"
    kind = data.partition(":")[0]
    expect(kind in FAMILIES, "data", data, "digits, cutouts or coco:DIR with --protocol=ravl")
    taken = {flag: value for flag, value in zip(FAMILY, FAMILIES[kind], strict=True) if not config[flag]}
    if taken:
        say(f"{kind}: " + " ".join(f"--{flag}={value}" for flag, value in taken.items()))
    config = {**config, **taken, "data": data}
    if not config["regions"].startswith("masks:"):
        load_regions(config["regions"], [], None)  # complains now, not after the first fine-tuning
    return config


def setting_data(config, strength, spurious="0"):
    """The Samples of a setting: its strength, and the class that the feature goes with, by name: numbers
    count all classes of the family, not those of --classes."""
    planted = dict(strength=strength, spurious=spurious, feature=config["feature"])
    return load_data(config["data"], config["classes"], seed=config["seed"], **planted)


def made_of(code, words, samples, config):
    """Hash of a script's code, flags, the files that these name, and data: equal where it makes the same."""
    here, words = Path(__file__).parent, {k: str(v) for k, v in words.items() if k not in FREE}
    sources = [here / name for name in (code, "model.py", "data.py")] + sorted(here.glob("kernels/*.py"))
    for k in ("pretrained", "discovery"):
        if os.path.isfile(words.get(k, "")):
            words[k] = file_digest(words[k], config["cache_dir"])
    return sha256(json.dumps([words, samples.digest, [sha256(path.read_bytes()) for path in sources]]))


def kept_tree(path, made):
    """The tree of a JSON file that is made of this; else an empty one, also of a damaged file."""
    with contextlib.suppress(Complaint, AttributeError):
        tree = read_json(path, "made by eval.py")
        return tree if tree.get("made") == made else {}
    return {}


def script_run(name, out, config, samples, **options):
    """What train.py or discover.py, which lie beside this file, make in out of these flags: their weights or
    discovery.json, kept if flags, data and code are the same. Output to out/log.txt; Complaint with its last
    line."""
    words, product = {flag: config[flag] for flag in SHARED} | options, out / PRODUCTS[name]
    made, note = made_of(name, words, samples, config), out / "made.json"
    if product.is_file():
        if kept_tree(note, made):
            return product
        say(f"{out}: made with other flags, data or code, or not to its end; it is made anew")
    for stale in (note.name, "training.pt"):  # the latter of a killed run: it is begun anew
        (out / stale).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    argv = [f"--{flag}={value}" for flag, value in words.items()] + [f"--out_dir={out}"]
    with open(out / "log.txt", "w", encoding="utf-8", errors="backslashreplace") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = exit_code(Path(__file__).with_name(name), argv)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        line = (out / "log.txt").read_text(errors="replace").strip().rpartition("\n")[2]
        raise Complaint(f"{name} {' '.join(argv)} failed: {line}")
    write_json(note, dict(made=made))
    return product


def exit_code(path, argv):
    """Runs a script in this process, so that what it imports, draws and loads is there for the next. Returns
    what it exits with: None or 0 if it went well."""
    quiet, before, sys.argv = SPEECH["quiet"], sys.argv, [str(path), *argv]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    except Exception:  # as Python itself ends a script
        traceback.print_exc()
        return 1
    finally:
        sys.argv, SPEECH["quiet"] = before, quiet  # the script's own flags were heard last


def base_model(config):
    """Weights of the base model: --pretrained, or trained on uncorrelated images of another seed."""
    model, words = config["model"], dict(method="finetune", strength=0, steps=config["base_steps"])
    if config["pretrained"] or not config["base_steps"] or model not in PRETRAINED:
        return config["pretrained"]
    words.update({k: config[k] for k in ("learning_rate", "pairs")}, pretrained=PRETRAINED[model])
    words["seed"] = 1000 + config["seed"]
    samples = setting_data(config | words, 0.0)
    made = made_of("train.py", {k: config[k] for k in SHARED} | words, samples, config)
    at = Path(config["cache_dir"] or config["out_dir"]) / f"base-{model}-{made[:12]}"
    say(f"base model: {at}")
    return script_run("train.py", at, config, samples, **words)


def one_setting(config, at, strength, classes, label, base, mitigating):
    """Fine-tunes, discovers if the feature was learned, mitigates if asked to: an entry of protocol.json."""
    samples = setting_data(config, strength, classes[label])
    planted = dict(strength=strength, spurious=classes[label], seed=config["seed"])

    def figures(method, **words):
        """What train.py reaches by a method."""
        flags_of = ["steps", "learning_rate", "pairs"]
        if method == "ravl":
            flags_of += ["region_weight", "region_temperature"]
        words |= {flag: config[flag] for flag in flags_of} | planted | dict(method=method, pretrained=base)
        weights = script_run("train.py", at / method, config, samples, **words)
        return reached(config, weights, samples)

    groups = figures("finetune")["groups"]
    gap = groups[2 * label + 1] - groups[2 * label]
    out = dict(strength=strength, spurious_class=label, valid=gap >= VALID, gap=gap)
    out.update(precision_at_10={}, mitigation={})
    if not out["valid"]:
        return out
    words = dict(pretrained=at / "finetune/weights.safetensors", regions=config["regions"], method="all")
    discovery = script_run("discover.py", at / "discovery", config, samples, **words, **planted)
    with reading(discovery, "a discovery.json of discover.py", "delete it"):
        tree = read_json(discovery, "a discovery.json of discover.py")
        out["precision_at_10"] = {name: m["precision_at_10"] for name, m in tree["methods"].items()}
        mitigating = mitigating and any(c["kept"] for c in tree["clusters"])
    for method in MITIGATIONS if mitigating else ():
        words = {} if method == "finetune" else dict(discovery=discovery)
        m = figures(method, **words)
        out["mitigation"][method] = {key: m[key] for key in FIGURES}
    return out


def reached(config, weights, samples):
    """What weights reach on the uncorrelated test split, kept beside them: FIGURES, zero-shot on images and
    on regions that show the class object; groups, accuracies on images of class x feature [2 C]."""
    path, test = weights.with_name("figures.json"), samples.keep(samples.split == 2)
    words = {flag: config[flag] for flag in (*SHARED, "regions")} | dict(pretrained=weights)
    made = made_of("eval.py", words, samples, config)
    out = kept_tree(path, made)
    if {*FIGURES, "groups"} <= out.keys():
        return out
    counts = enumerate(test.counts()[2].tolist())
    few = [f"{test.group_name(*divmod(group, 2))}: {n}" for group, n in counts if n < LEAST]
    require(not few, f"{samples.name}: test groups with fewer than {LEAST} images ({'; '.join(few)})")
    how = dict(batch=config["batch_size"], **{flag: config[flag] for flag in ("device", "dtype", "threads")})
    encoder = load_encoder(config["model"], str(weights), config["quick_gelu"], **how)
    pictures, _ = load_regions(config["regions"], test.items, encoder.frame)
    z, x = region_embeddings(encoder, pictures, label=f"{path.parts[-3]} {path.parts[-2]}")
    texts, photo = encoder.prompts(samples.class_prompts()), torch.arange(len(test.y))
    of_region = repeat_by(photo, [len(p.boxes) for p in pictures])
    shown, out = region_truth(pictures, test.shows)[0], dict(made=made)
    for name, v, index in (("image", z, photo), ("region", x[shown], of_region[shown])):
        m = group_metrics((unit(v) @ texts.T).argmax(1).cpu() == test.y[index], test, index)
        out.update({f"{name}_overall": m["overall"], f"{name}_worst_group": m["worst_group"]})
        out.setdefault("groups", [group["accuracy"] for group in m["groups"]])
    write_json(path, out)
    return out


def mean_interval(values):
    """Mean of shares over settings, their number, and a 95 % interval: Wilson's, as no shares vary more about
    their mean than those that are 0 or 1. What was not found counts as zero."""
    n, mean = len(values), sum(v or 0.0 for v in values) / len(values)
    low, high = wilson(mean * n, n)
    return dict(mean=mean, low=low, high=high, n=n)


def summarised(done):
    """Means of Precision@10, over valid settings and by strength, and of mitigations as in the paper."""
    valid, precision, mitigation = [setting for setting in done if setting["valid"]], {}, {}
    for m in valid[0]["precision_at_10"] if valid else ():
        values = {"all": [setting["precision_at_10"][m] for setting in valid]}
        for setting in sorted(valid, key=itemgetter("strength"), reverse=True):
            values.setdefault(f"{setting['strength']:g}", []).append(setting["precision_at_10"][m])
        precision[m] = {name: mean_interval(shares) for name, shares in values.items()}
    for least in (0.6, 0.8):
        hits = [each for each in valid if (each["precision_at_10"]["ravl"] or 0) > least]
        hits, methods = [each["mitigation"] for each in hits if each["mitigation"]], {}
        for m in MITIGATIONS if hits else ():
            methods[m] = {key: sum(figures[m][key] for figures in hits) / len(hits) for key in FIGURES}
        mitigation[f"precision_above_{least:g}"] = dict(n=len(hits), methods=methods)
    return dict(settings=len(done), valid=len(valid), precision_at_10=precision, mitigation=mitigation)


def setting_page(tree, blocks, classes, lead):
    """protocol.html: what RaVL found and reached, and the pages of the discoveries."""
    precision, config = tree["summary"]["precision_at_10"].get("ravl"), tree["config"]
    title, numbers, links = "No setting learned the planted feature.", [], []
    if precision:
        mean, n = f"{precision['all']['mean']:.2f}", precision["all"]["n"]
        title = f"RaVL finds the planted feature with a Precision@10 of {mean}."
        numbers = [(mean, f"mean Precision@10, n = {n}")]
    methods = tree["summary"]["mitigation"]["precision_above_0.6"]["methods"]
    for name in ("ravl", "finetune") if methods else ():
        numbers.append((f"{methods[name]['image_worst_group']:.0%}", f"worst group of {name}"))
    for setting in tree["settings"]:
        strength, c = f"{setting['strength']:g}", setting["spurious_class"]
        folder = Path(config["out_dir"]) / f"settings/{strength}-{c}/discovery"
        words = f"discovery at {strength}, {classes[c]}"
        links += linked(words, folder, "discovery.html", config["out_dir"])
    kicker = f"flock, eval.py: controlled settings, {config['data']} by {config['model']}"
    return page(kicker, title, lead, sections(blocks), config, tree["git"], (), numbers, links)


def setting_blocks(tree, classes):
    """What was found, how well, what each mitigation reaches, every setting."""
    summary, rows, chart, header = tree["summary"], [], [], ["method"]
    for m, shares in summary["precision_at_10"].items():
        header, every = ["method", *shares], shares["all"]
        cells = ["{mean:.3f} ({low:.2f} to {high:.2f})".format(**share) for share in shares.values()]
        rows.append((m, *cells))
        chart.append((m, f"n = {every['n']}", [(every["mean"], (every["low"], every["high"]))]))
    of = f"valid settings, {summary['valid']} of {summary['settings']}, by Cramer's V"
    title = f"Discovery: Precision@10 over the {of}, mean and 95 % interval"
    blocks = [Block(title, header, rows, [dots("Precision@10", chart)] if chart else [], said=True)]
    series = tuple(key.replace("_", " ") for key in reversed(FIGURES))
    for name, part in reversed(summary["mitigation"].items()):
        if blocks[1:] and part == summary["mitigation"]["precision_above_0.8"]:
            continue  # the same settings
        title = f"Mitigation, mean of settings, Precision@10 > {name.rpartition('_')[2]}, n = {part['n']}"
        rows, methods = [], part["methods"].items()
        for m, figures in methods:
            rows.append((m, *[figures[key] for key in FIGURES]))
        chart = [(m, "", [(share, None) for share in shares[::-1]]) for m, *shares in rows]
        parts = [dots(title, chart, series)] if chart else []
        blocks.append(Block(title, ("method", *FIGURES), rows, parts, said=True))
    rows = []
    for setting in tree["settings"]:
        valid, at_10 = "yes" if setting["valid"] else "no", setting["precision_at_10"].get("ravl")
        strength, name = f"{setting['strength']:g}", classes[setting["spurious_class"]]
        rows.append((strength, name, valid, setting["gap"], at_10))
    return [*blocks, Block("Every setting", ("V", "class", "valid", "gap", "RaVL Precision@10"), rows)]


def write_settings(path, done):
    """protocol.csv: a row for each setting and method of discovery, and for each mitigation."""
    rows, none = [], [None] * len(FIGURES)
    for setting in done:
        head = [setting[key] for key in ("strength", "spurious_class", "valid", "gap")]
        for m, at_10 in setting["precision_at_10"].items():
            rows.append((*head, "discover", m, at_10, *none))
        if not setting["precision_at_10"]:
            rows.append((*head, "finetune", None, None, *none))
        for m, figures in setting["mitigation"].items():
            rows.append((*head, "mitigate", m, None, *[figures[key] for key in FIGURES]))
    header = ("strength", "spurious_class", "valid", "gap", "stage", "method", "precision_at_10", *FIGURES)
    write_table(path, header, rows)


if __name__ == "__main__":
    run(main, "the same command")
