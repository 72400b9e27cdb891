"""How robust is this model? Zero-shot, classifier rows and probes on data sets with groups; one or many models.

    python eval.py --data=counteranimal:DIR --model=ViT-B-16 --pretrained=laion400m_e32
    python eval.py --data=waterbirds:DIR --models=lite0,ViT-B-32@openai,timm:resnet50 --protocol=probe,dfr
    python eval.py --data=folder:DIR --model=ViT-L-14 --pretrained=openai --prompts=FILE
    torchrun --nproc_per_node=4 eval.py ...                      shares out the images; the numbers are the same
    python eval.py --protocol=ravl --settings=5 --mitigate=2     controlled settings, the end of this file:
                                                                 fine-tune, discover, mitigate
    python eval.py --protocol=ravl --data=cutouts --feature=scene     the same with photos; or --data=coco:DIR

1. Embed the images, once: what was computed before is read from the cache, and then no weights are loaded.
2. Classify them by the heads of each protocol (PROTOCOLS); with --ckpt through a map of train.py.
3. Measure: groups and their worst, CounterAnimal's common, counter and drop, BG-Gap, calibration, additivity.

--data=NAME:help says what to download and how it must look. The same command after an interruption goes on.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from data import SPLITS, Complaint, Cutout, Ground, bars, expect, flags, flags_section, html_table, layers
from data import composites as compose
from data import load_data, load_regions, near, open_mask, page, read_json, reading, region_truth, revision
from data import rng, run, say, table, tag, thumb, write, write_json, write_table
from model import additivity, dfr, fit_probe, group_metrics, join, load_checkpoint, load_encoder, load_map
from model import mean_std, paired_bootstrap, region_embeddings, unit, wilson, with_map

# --- I/O ------------------------------------------------------------------------------------------------------------
out_dir = (
    "out"  # eval.json, eval.html, eval.csv, groups.csv, predictions.csv; of ravl protocol.json, .csv, .html
)
cache_dir = "cache"  # embeddings, reused by every run; --cache_dir= for none
skip_bad = False  # leave out images that cannot be read, counted and named, instead of stopping
# --- data -----------------------------------------------------------------------------------------------------------
data = ""  # NAME:DIR with NAME waterbirds, celeba, counteranimal, nico, cocogender, in9, imagenet, folder, csv, coco;
# or scenes, digits, cutouts, which need no folder. Empty: scenes, or for --protocol=ravl digits
split = "auto"  # photos to measure on: train, val, test, all; auto: test, or all where splits are ours and not used
classes = ""  # only these, as in car,truck; or a file of names, one a line
places = ""  # only these; with as many as --classes the k-th is the k-th class's own
prompts = ""  # file of templates with {}, or of class<TAB>prompt lines
masks = ""  # folder of foreground masks: also metrics of the regions that show the object
confounder = 1.0  # scenes and pairs: share of the training images on their class's own place
strength = 0.0  # digits, cutouts, coco: Cramer's V of a class and the planted feature in the training split,
spurious = "0"  # that class, by number or name (ravl goes through strengths and classes by itself),
feature = ""  # and that feature, where there is a choice
# --- models ---------------------------------------------------------------------------------------------------------
model = ""  # lite0 if empty; timm:NAME, any open_clip name such as ViT-L-14, or small CLIPs: lite0-clip, tiny, tiny-conv
pretrained = ""  # open_clip tag or local file
models = ""  # several instead, comma-separated, each NAME or NAME@PRETRAINED
quick_gelu = "auto"  # auto follows the record of the weights; on, off
ckpt = ""  # ckpt.pt of train.py: its map is applied first
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # of the forward pass: auto, float32, bfloat16
batch_size = 8  # small batches are faster on a CPU; raise it on a GPU
threads = 0  # that decode images and, on a CPU, embed them; 0 for one per core
# --- protocols ------------------------------------------------------------------------------------------------------
protocol = "auto"  # of zeroshot, classifier, probe, clip_probe, dfr, fewshot, comma-separated; auto: the first three,
# where they can be; or ravl
l2 = 0.8  # penalty of probe and fewshot, as in train.py
shots = "1,4,16"  # fewshot: training images per class
picker = "auto"  # CounterAnimal 1v20: what picks each class's 20 labels: NAME@PRETRAINED, or self, the model measured;
# auto: the published one, ViT-B-32@laion400m_e32, if its weights are on this machine, else self
composites = 0  # additivity also on composites of so many foregrounds, 0 for none
foregrounds = "assets/foregrounds"  # for them: folder of RGBA cut-outs
backgrounds = "assets/backgrounds"  # folder of photos
# --- controlled settings (--protocol=ravl); 0 and empty: the family's own, see FAMILIES -------------------------------
settings = 50  # how many, strongest first: Cramer's V .99 for each class, then .95, .9, .8, .7
mitigate = 10  # how many of the valid ones also with every mitigation
base_steps = 0  # pre-training of a small CLIP on uncorrelated images
steps = 0  # of fine-tuning and of every mitigation
learning_rate = 0.0  # of both
pairs = 0  # image-caption pairs in a step
regions = ""  # grid:N, as in discover.py
region_weight = 0.8  # w of RaVL's loss, and
region_temperature = (
    0.3  # its temperature: at 0.07 a small margin contents it, and the image follows the feature
)
# --- system ---------------------------------------------------------------------------------------------------------
seed = 0
# --- end ------------------------------------------------------------------------------------------------------------

DRAWS = 5  # of few shots, averaged; worst_group, too, is the mean of each draw's own
PAPERS_PICKER = "ViT-B-32@laion400m_e32"

# CounterAnimal's table: common, counter in per cent, over 1000 labels (NeurIPS 2024; PROTOCOLS of this project,
# section 5). A name counts whole: which of timm's tags the paper took is not known here
PUBLISHED = {
    PAPERS_PICKER: (67.13, 36.95),
    "ViT-B-16@laion400m_e32": (73.11, 52.17),
    "ViT-L-14@openai": (85.38, 70.28),
    "ViT-B-32@openai": (69.13, 45.62),
    "ViT-H-14-378-quickgelu@dfn5b": (90.23, 83.67),
    "timm:resnet50": (81.44, 66.07),
    "timm:vit_base_patch16_224": (84.97, 74.98),
    "timm:convnext_large": (89.12, 81.47),
}


def main():
    at_least_0 = dict.fromkeys(
        ("composites", "mitigate", "base_steps", "steps", "pairs", "learning_rate"), "[0, inf)"
    )
    limits = dict(settings="[1, 50]", region_weight="[0, 1]", region_temperature="(0, inf)")
    config = flags(globals(), split=("auto", *SPLITS, "all"), **at_least_0, **limits)
    if protocol == "ravl":
        return controlled_settings(config)
    config.update(data=data or "scenes", model=model or "lite0")
    asked = [] if protocol == "auto" else protocol.split(",")
    for p in asked:
        expect(
            p in PROTOCOLS, "protocol", p, f"auto, ravl, or of {', '.join(PROTOCOLS)}; {near(p, PROTOCOLS)}"
        )
    expect(
        all(s.isdecimal() and int(s) for s in shots.split(",")),
        "shots",
        shots,
        "whole numbers from 1, comma-separated",
    )
    for flag in ("model", "pretrained"):
        expect(
            not (models and globals()[flag]),
            flag,
            globals()[flag],
            "nothing with --models; give the tag behind @ there",
        )
    names = [n.strip() for n in (models or f"{config['model']}@{pretrained}".rstrip("@")).split(",")]
    expect(len(set(names)) == len(names) and all(names), "models", models, "different names, comma-separated")
    out, started, git, (rank, world) = Path(out_dir), time.time(), revision(), join(device)
    planted = dict(confounder=confounder, strength=strength, spurious=spurious, feature=feature)
    samples = load_data(config["data"], classes, places, prompts, masks, False, seed, **planted)
    for note in samples.notes:
        say(note)

    outcomes, results, failed = {}, {}, {}
    for name in names:
        try:
            outcomes[name], additive = evaluate(name, samples, asked)
            if rank == 0:
                results[name] = measured(outcomes[name], additive, samples, seed)
        except Exception as problem:
            full = isinstance(problem, OSError) and not isinstance(problem, FileNotFoundError)
            if len(names) == 1 or full or world > 1:  # a full disk is no fault of the model; and of several
                raise  # processes the others would wait for one that goes on to the next model
            kind = "" if isinstance(problem, Complaint) else type(problem).__name__ + ": "
            failed[name] = f"{kind}{problem}".splitlines()[0]
            say(f"{name}: FAILED, {failed[name]}")
        if name in results and len(names) > 1:
            leading = list(results[name]["metrics"].items())[:3]
            say(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in leading if isinstance(v, float)))
            write_json(out / "eval.json", contract(config, git, samples, names, results, failed, started))
    if rank:
        return
    if not results:
        raise Complaint(f"--models: none could be evaluated; the first, {names[0]}: {failed[names[0]]}")
    compare(results, outcomes, samples, seed)
    blocks = blocks_of(results, outcomes, samples, failed)
    say("\n" + console(blocks))
    write_tables(out, results, outcomes, samples)
    flags_of = flags_section(config, git, samples.notes)
    write(
        out / "eval.html",
        page("flock: how robust is it?", lead(results, samples), [*sections(blocks), flags_of]),
    )
    # last: nothing is pending only if all the rest is there
    write_json(out / "eval.json", contract(config, git, samples, names, results, failed, started))
    say(
        f"\n{out}/eval.json, eval.html, eval.csv, groups.csv and predictions.csv written, {time.time() - started:.1f} s"
    )


def contract(config, git, samples, names, results, failed, started):
    """The tree of eval.json."""
    facts = dict(name=samples.name, classes=samples.classes, places=samples.places, photos=len(samples.items))
    facts.update(
        notes=samples.notes,
        splits=[int((samples.split == s).sum()) for s in range(3)],
        official=samples.official,
    )
    pending = [n for n in names if n not in results and n not in failed]
    seconds = time.time() - started
    return dict(
        config=config, git=git, data=facts, seconds=seconds, models=results, failed=failed, pending=pending
    )


# ---------------------------------------------------------------------------------------------------------------------
# one model: what it makes of each photo


@dataclass
class Embedded:
    """What a protocol has at hand. z [n, D]: embeddings of the samples; good: bool [n], which of them could be read; g: the
    map that probes see them through."""

    encoder: object
    samples: object
    z: torch.Tensor
    good: torch.Tensor
    g: object
    l2: float
    seed: int

    def through(self, index):
        """g(z[index]) [m, D], in parts, so that there are no two copies of many."""
        out = self.z.new_empty(len(index), self.z.shape[1])
        for start, part in parts_of(index, 1 << 14):
            out[start : start + len(part)] = self.g(self.z[part.to(self.z.device)])
        return out

    def labels(self, index):
        return self.samples.y[index].to(self.z.device)

    def usable(self, split):
        """Index [m] of the labelled photos of a split that could be read."""
        return ((self.samples.split == split) & self.good & (self.samples.y >= 0)).nonzero()[:, 0]


@dataclass
class Outcome:
    """What a protocol makes of photos, on the CPU. index [m]: which; predicted [R, m] in R draws; confidence [R, m]; target [m]:
    what would be right; names: what predictions are called. one_of_20 [m]: CounterAnimal's 1v20, by picker. region_photo,
    region_predicted [K]: regions that show the object, the same way."""

    index: torch.Tensor
    predicted: torch.Tensor
    confidence: torch.Tensor
    target: torch.Tensor
    names: list
    seen: int = 0
    skipped: int = 0
    one_of_20: torch.Tensor | None = None
    picker: str = ""
    region_photo: torch.Tensor | None = None
    region_predicted: torch.Tensor | None = None

    def called(self, k, whole=False):
        """The name of what is predicted, the first of its synonyms unless whole."""
        name = self.names[k] if k >= 0 else "none of them"
        return name if whole else name.split(",")[0]


def evaluate(name, samples, asked):
    """({protocol: Outcome}, additivity) of one model. (None, None) on ranks above 0, which only embed: all embedding first."""
    how = dict(
        device=device, dtype=dtype, batch=batch_size, threads=threads, cache=cache_dir, skip_bad=skip_bad
    )
    encoder = open_encoder(name, quick_gelu, how)
    for note in encoder.notes:
        say(note)
    state = load_checkpoint(ckpt, encoder) if ckpt else None
    todo = offered(encoder, samples, asked)
    z = encoder.embed(samples.items, name)
    judge, judged, picks = encoder, z, ""
    if is_counteranimal(samples) and {"zeroshot", "classifier"} & set(todo):
        picks = choose_picker(picker)
        if picks != "self":
            judge = open_encoder(picks, quick_gelu, how)
            judged = judge.embed(samples.items, f"picker {picks}")
    cells = object_cells(encoder, samples, masks) if masks else None
    grid = composed(encoder, foregrounds, backgrounds, composites, skip_bad, seed) if composites else None
    if z is None:
        return None, None
    twenty = pick_labels(judge, judged, samples) if picks else None
    good = z.isfinite().all(1).cpu()
    e = Embedded(encoder, samples, z, good, load_map(state, z.device) if state else unit, l2, seed)
    outcomes = {}
    for p in todo:
        kinds = [f"fewshot_{k}" for k in shots.split(",")] if p == "fewshot" else [p]
        for kind in kinds:
            heads = PROTOCOLS[p].heads(e, *map(int, kind.split("_")[1:] if p == "fewshot" else ()))
            outcomes[kind] = classify(e, p, heads, split, twenty, cells)
            outcomes[kind].picker = picks
    return outcomes, additive_parts(e, grid)


def open_encoder(name, quick_gelu, how):
    known, _, weights = name.partition("@")
    return load_encoder(known, weights, quick_gelu, **how)


def is_counteranimal(samples):
    return samples.places == ["common", "counter"] and len(samples.labels) == 1000


def parts_of(index, size):
    """(start, part) of an index [m], each of a size."""
    return zip(range(0, len(index), size), index.split(size), strict=True)


def offered(encoder, samples, asked):
    """The protocols to run: those asked for, or for none what this model and these data allow. Complaint if one cannot be."""
    lacks = {p: PROTOCOLS[p].lacks(encoder, samples) for p in asked or ("zeroshot", "classifier", "probe")}
    for p in asked:
        if lacks[p]:
            raise Complaint(lacks[p])
    if asked:
        return sorted(set(asked), key=list(PROTOCOLS).index)
    can = [p for p in ("zeroshot", "classifier") if not lacks[p]]
    if not lacks["probe"] and (samples.official or len(samples.classes) == 2 or not can):
        can.append("probe")
    if not can:
        raise Complaint(lacks["zeroshot"])
    return can


def classify(e, p, heads, split, twenty, cells):
    """The Outcome of a protocol's heads; of regions that show the object, too, where they are known (by the first head)."""
    row, samples, wide = PROTOCOLS[p], e.samples, len(e.samples.labels) == 1000
    where = split if split != "auto" else "test" if samples.official or row.trained_on is not None else "all"
    index = (e.good if where == "all" else e.good & (samples.split == SPLITS.index(where))).nonzero()[:, 0]
    if not len(index):
        raise Complaint(f"--split={split}: {samples.name} has no photos there")
    seen = int((samples.split[index] == row.trained_on).sum()) if row.trained_on is not None else 0
    if seen:
        say(
            f"WARNING: {p} was trained on {seen} of the {len(index)} photos that it is measured on; see --split"
        )
    chosen, target = (
        (samples.classes, samples.y) if row.trained_on is not None else names_and_targets(samples)
    )
    predicted, confidence = (
        torch.empty(len(heads), len(index), dtype=torch.long),
        torch.empty(len(heads), len(index)),
    )
    of_20 = (
        torch.empty(len(index), dtype=torch.long) if twenty is not None and row.trained_on is None else None
    )
    for r, head in enumerate(heads):
        for start, part in parts_of(index, 1 << 13):
            here = slice(start, start + len(part))
            logits, owner = head(e.z[part.to(e.z.device)])
            confidence[r, here], predicted[r, here] = sure_of(logits, owner)
            if of_20 is not None:
                mine = twenty[samples.y[part]].to(logits.device)  # [N, 20]
                of_20[here] = mine.gather(1, logits.gather(1, mine).argmax(1, keepdim=True))[:, 0].cpu()
    skipped = int((~e.good).sum())
    out = Outcome(index, predicted, confidence, target[index], chosen, seen, skipped, of_20)
    if cells is not None:
        r, photo = cells
        inside = torch.isin(photo, index)
        out.region_photo, out.region_predicted = photo[inside], sure_of(*heads[0](r[inside.to(r.device)]))[1]
    return out


def sure_of(logits, owner):
    """Logits [N, C], and the class that owns each column or None -> confidence [N] and prediction [N], on the CPU."""
    top = logits.softmax(1).max(1)
    return top.values.cpu(), (top.indices if owner is None else owner[top.indices]).cpu()


def names_and_targets(samples):
    """What rows of text or of a classifier choose among, and what is right for each photo [n]: its class, or among 1000
    labels its ImageNet label."""
    if len(samples.labels) == 1000 and samples.imagenet:
        return samples.labels, torch.tensor([labels[0] for labels in samples.imagenet])[samples.y]
    unlabelled = len(samples.y) and samples.y.max() < 0
    return samples.labels if unlabelled or len(samples.labels) == 1000 else samples.classes, samples.y


# ---------------------------------------------------------------------------------------------------------------------
# protocols: what each lacks here (a line, or None), and its heads: embeddings [N, D] -> logits [N, C], and the class that
# owns each column (None: column k is class k; -1: none of them)


def lacks_texts(encoder, samples):
    cure = "zero-shot needs one; take --protocol=classifier or probe, or a CLIP-like model"
    return None if encoder.tokenizer else f"--model={encoder.name}: it has no text tower, {cure}"


def lacks_rows(encoder, samples):
    if not encoder.facts["rows"]:
        return f"--model={encoder.name}: it has no ImageNet classifier; take --protocol=zeroshot or probe"
    cure = " (put in_to_in9.json into its folder)" * samples.name.startswith("in9")
    return None if samples.imagenet else f"{samples.name}: its classes are not ImageNet's{cure}"


def lacks_training(encoder, samples):
    shown = torch.unique(samples.y[(samples.split == 0) & (samples.y >= 0)])
    return (
        None
        if len(shown) > 1
        else f"{samples.name}: a probe needs a training split with at least two classes"
    )


def lacks_validation(encoder, samples):
    val = (samples.split == 1) & (samples.y >= 0)
    if int(torch.bincount(samples.y[val], minlength=len(samples.classes)).min()) < 8:
        return f"{samples.name}: dfr needs at least 8 validation images of each class"
    least = smallest(samples.group()[val])
    return (
        f"{samples.name}: dfr needs at least 2 validation images of each group (found {least})"
        if least < 2
        else None
    )


def smallest(group):
    """The size of the smallest group that is there."""
    return int(torch.unique(group, return_counts=True)[1].min())


def prompt_heads(e):
    rows = e.encoder.prompts(e.samples.prompts) * (e.encoder.facts["logit_scale"] or 100.0)
    return [rows_head(e, rows, 0.0, True, [])]


def classifier_heads(e):
    rows, bias = e.encoder.classifier()
    return [rows_head(e, rows, bias, False, e.samples.imagenet if len(e.samples.labels) < len(rows) else [])]


def rows_head(e, rows, bias, normed, labels):
    """Rows [C, D] over all 1000 labels for CounterAnimal, ImageNet and ImageNet-9; else among the classes, each by the best
    of its labels. normed: of unit embeddings."""
    owner = None
    if labels and e.samples.name.startswith("in9"):
        owner = torch.full((len(rows),), -1, device=rows.device)
        for c, mine in enumerate(labels):
            owner[mine] = c

    def head(v):
        v = v if e.g is unit else repaired(e.g, v)
        logits = (unit(v) if normed else v) @ rows.T + bias
        if labels and owner is None:
            logits = torch.stack([logits[:, mine].amax(1) for mine in labels], 1)
        return logits, owner

    return head


def repaired(g, z):
    """Embeddings [N, D] -> the same with the foreground only, in their own space, for text and classifier rows: mu + g(z),
    taken back through the map's power and to the length of z. Our reading: BAP names no zero-shot use."""
    v = g.mu + g(z)
    return unit(v.sign() * v.abs() ** (1 / g.power)) * z.norm(dim=1, keepdim=True)


def probe_head(fit, g):
    def head(v):
        return fit.logits(g(v)), None

    return head


def probe_heads(e):
    train = e.usable(0)
    fit = fit_probe(e.through(train), e.labels(train), e.l2, classes=len(e.samples.classes))
    return [probe_head(fit, e.g)]


def clip_probe_heads(e, C=0.316):
    """As CLIP's authors run it: raw embeddings, all images alike; C counts in the embeddings' own units."""
    train, g = e.usable(0), e.g if e.g is not unit else torch.nn.Identity()
    x = e.through(train) if e.g is not unit else e.z[train.to(e.z.device)]
    scale, alike = float(mean_std(x)[1].mean()), torch.ones(len(x), device=x.device)
    fit = fit_probe(x, e.labels(train), 1 / (C * len(x) * scale * scale), alike, len(e.samples.classes))
    return [probe_head(fit, g)]


def dfr_heads(e):
    val = e.usable(1)
    group = e.samples.group()[val]
    if smallest(group) < 8:
        line = f"the smallest, which has {smallest(group)} images: expect noise"
        say(f"WARNING: dfr balances the validation groups down to {line}")
    return [probe_head(dfr(e.through(val), e.labels(val), group.to(e.z.device), e.seed), e.g)]


def fewshot_heads(e, shots):
    """One probe for each of DRAWS draws of so many training images of each class."""
    train, C = e.usable(0), len(e.samples.classes)
    of_class = [train[e.samples.y[train] == c] for c in range(C)]
    have = [len(mine) for mine in of_class]
    short, least = sum(n < shots for n in have), have.index(min(have))
    if short:
        fewest = f"{e.samples.classes[least]} the fewest, {have[least]}; of these classes all are taken"
        say(f"WARNING: fewshot_{shots}: {short} of {C} classes have fewer training images, {fewest}")
    heads = []
    for d in range(DRAWS):
        order = [torch.from_numpy(rng(e.seed, "fewshot", shots, d, c).permutation(have[c])) for c in range(C)]
        few = torch.cat([mine[k[:shots]] for mine, k in zip(of_class, order, strict=True)])
        heads.append(probe_head(fit_probe(e.through(few), e.labels(few), e.l2, classes=C), e.g))
    return heads


Protocol = namedtuple("Protocol", "what lacks heads trained_on", defaults=(None,))
Protocol.__doc__ = """what: in words. lacks: (encoder, samples) -> why it cannot be, or None. heads: (Embedded) -> list of
heads, one for each draw. trained_on: the split that they learn from."""

PROTOCOLS = {
    "zeroshot": Protocol("text prompts", lacks_texts, prompt_heads),
    "classifier": Protocol("ImageNet classifier's own rows", lacks_rows, classifier_heads),
    "probe": Protocol("linear probe, class-balanced, on unit embeddings", lacks_training, probe_heads, 0),
    "clip_probe": Protocol(
        "linear probe as CLIP's authors run it, C = 0.316", lacks_training, clip_probe_heads, 0
    ),
    "dfr": Protocol("last-layer retraining on the validation groups", lacks_validation, dfr_heads, 1),
    "fewshot": Protocol("probe on a few images of each class", lacks_training, fewshot_heads, 0),
}


# ---------------------------------------------------------------------------------------------------------------------
# the 20 labels, regions, additivity


def choose_picker(picker):
    """--picker, auto resolved: no surprise of a download of 600 MB."""
    if picker != "auto":
        return picker
    from huggingface_hub.constants import HF_HUB_CACHE

    kept = Path(HF_HUB_CACHE) / "models--timm--vit_base_patch32_clip_224.laion400m_e32" / "snapshots"
    if any(kept.glob("*/open_clip_*")):
        return PAPERS_PICKER
    cure = f"--picker={PAPERS_PICKER} fetches the one that the paper used"
    say(f"WARNING: 1v20: the model measured picks its own 20 labels; {cure}")
    return "self"


def pick_labels(encoder, z, samples):
    """CounterAnimal's 1v20: for each class the 20 of the 1000 labels with the highest mean score over its photos, [classes, 20]."""
    reads = encoder.tokenizer is not None
    rows, bias = (encoder.prompts(samples.prompts), 0.0) if reads else encoder.classifier()
    y = samples.y.to(z.device)
    mean = z.new_zeros(len(samples.classes), z.shape[1])
    for start in range(0, len(z), 1 << 13):
        part = z[start : start + (1 << 13)]
        mean.index_add_(0, y[start : start + (1 << 13)], (unit(part) if reads else part).nan_to_num())
    return (mean / torch.bincount(y).clamp(min=1)[:, None] @ rows.T + bias).topk(20).indices.cpu()


def object_cells(encoder, samples, masks, n=3, share=0.5):
    """Cells of an n x n grid over what the model sees of a photo, of which at least this share is the object by its mask:
    (embeddings [K, D], number of the photo [K]); None on ranks above 0."""
    index = [k for k, cut in enumerate(samples.cut) if cut is not None]

    def pool(x, _):
        m = rearrange(with_map(encoder.fast, encoder.kind, x)[1], "n h w d -> n d h w")
        return rearrange(F.adaptive_avg_pool2d(m, n), "n d r c -> (n r c) d")

    pictures = [samples.items[k] for k in index]
    r = encoder.embed(pictures, "regions", pool, f"grid {n}", [n * n] * len(index))
    if r is None:
        return None
    cover = []
    for k in index:
        mask = open_mask(samples.cut[k].figure.mask.path)
        frame = [v * side for v, side in zip(encoder.frame(*mask.size), mask.size * 2, strict=True)]
        cover.append(np.asarray(mask.resize((n, n), Image.BOX, frame)).ravel() >= 255 * share)
    cover = torch.from_numpy(np.concatenate(cover)) & r.isfinite().all(1).cpu()
    if not cover.any():
        line = f"no cell of a {n}x{n} grid is at least {share:.0%} object in any photo, so there are no regions to read"
        raise Complaint(f"--masks={masks}: {line}")
    return r[cover.to(r.device)], torch.tensor(index).repeat_interleave(n * n)[cover]


def composed(encoder, foregrounds, backgrounds, instances, skip_bad, seed):
    """Embeddings [N, D] of composites, 8 backgrounds for each foreground, and the two [N] of each."""
    figures, notes = layers(foregrounds, Cutout, "foregrounds", skip_bad)
    grounds, more = layers(backgrounds, Ground, "backgrounds", skip_bad)
    for note in notes + more:
        say(note)
    pictures, i, j = compose(figures, grounds, instances, 8, seed)
    return encoder.embed(pictures, "composites"), i, j


def additive_parts(e, grid):
    """Additivity of the mean embeddings of class x place cells, and with --composites that of composites, flat and on the sphere."""
    out, C, P = {}, len(e.samples.classes), len(e.samples.places)
    index = (e.good & (e.samples.y >= 0)).nonzero()[:, 0]
    if P > 1 and len(index):
        group = e.samples.group().to(e.z.device)
        sums = torch.zeros(C * P, e.z.shape[1], dtype=torch.double, device=e.z.device)
        for _, part in parts_of(index.to(e.z.device), 1 << 14):
            sums.index_add_(0, group[part], unit(e.z[part]).double())
        cells = torch.unique(group[index.to(e.z.device)])
        heldout = 0.1 if len(cells) >= 20 else 0.0
        out["cells"] = additivity(unit(sums[cells]), cells // P, cells % P, heldout, e.seed)
    if grid is not None:
        z, i, j = grid
        here = z.isfinite().all(1)
        i, j = (k.to(z.device)[here] for k in (i, j))
        out["composites"] = additivity(unit(z[here]), i, j, seed=e.seed)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# what it amounts to


def measured(outcomes, additive, samples, seed):
    """Outcomes of one model -> {"metrics", "classes", "groups", "protocol", "protocols": {...}, "additivity"}, plain values; the
    first three are those of the first protocol."""
    parts = {p: measure(out, samples, seed) for p, out in outcomes.items()}
    head = next(iter(parts))
    return dict(parts[head], protocol=head, protocols=parts, additivity=additive)


def measure(out, samples, seed):
    """One Outcome -> metrics, classes, groups."""
    y, place = samples.y[out.index], samples.place[out.index]
    if (y < 0).all():
        taken = torch.bincount(out.predicted[0], minlength=len(samples.labels)).tolist()
        metrics = dict(n=len(y), confidence=float(out.confidence.mean()))
        return dict(
            metrics=metrics,
            groups=[],
            classes={k: dict(predicted=n) for k, n in zip(samples.labels, taken, strict=True)},
        )
    correct = out.predicted == out.target  # [R, m]
    mean = correct.double().mean(0)  # over the draws, [m]
    metrics, groups = of_draws([group_metrics(c, samples, out.index) for c in correct])
    metrics.update(
        seen_in_training=out.seen,
        average=float(mean.mean()),
        ece=ece(out.confidence.flatten(), correct.flatten()),
    )
    metrics.update(n=len(y), skipped=out.skipped)
    classes = classes_of(out, samples, mean, groups)
    if is_counteranimal(samples):
        metrics = dict(counter_metrics(mean, y, place, classes, samples.classes, seed), **metrics)
        if out.one_of_20 is not None:
            right = out.one_of_20 == out.target
            metrics.update(
                counter_metrics(right, y, place, classes, samples.classes, seed, "_1v20"), picker=out.picker
            )
    if samples.name.startswith("in9"):
        metrics = dict(in9_metrics(mean, place, samples.places, seed), **metrics)
    if out.region_photo is not None:
        target = torch.full_like(samples.y, -1).index_copy_(0, out.index, out.target)
        hit = out.region_predicted == target[out.region_photo]
        worst = group_metrics(hit, samples, out.region_photo)["worst_group"]
        metrics.update(region_overall=float(hit.double().mean()), region_worst_group=worst, regions=len(hit))
    return dict(metrics=metrics, classes=classes, groups=groups)


def of_draws(each):
    """Metrics and groups, means over draws, from a list of group_metrics; with an interval of the worst group."""
    metrics = {}
    for key in ("worst_group", "avg_group_mean", "avg_train_weighted"):
        metrics[key] = None if each[0][key] is None else sum(m[key] for m in each) / len(each)
    groups = []
    for same in zip(*[m["groups"] for m in each], strict=True):
        accuracy, n = sum(g["accuracy"] for g in same) / len(each), same[0]["n"]
        groups.append(dict(same[0], accuracy=accuracy, interval=list(wilson(accuracy * n, n))))
    confidence = 1 - 0.05 / len(groups)  # simultaneous over the groups: the bootstrap of a minimum is biased
    ends = torch.tensor(
        [[wilson(g["accuracy"] * g["n"], g["n"], confidence) for g in m["groups"]] for m in each]
    )
    metrics["worst_group_interval"] = ends.double().amin(1).mean(0).tolist()  # [draws, groups, 2] -> [2]
    return metrics, groups


def classes_of(out, samples, mean, groups):
    """For each class that is there its accuracy, interval, places, and what it is most often taken for."""
    y, wrong, classes = samples.y[out.index], out.predicted[0] != out.target, {}
    for c in torch.unique(y).tolist():
        inside = y == c
        k, n = float(mean[inside].mean()), int(inside.sum())
        values, counts = torch.unique(out.predicted[0][inside & wrong], return_counts=True)
        taken = sorted(zip(counts.tolist(), map(out.called, values.tolist()), strict=True), reverse=True)[:3]
        entry = dict(
            accuracy=k, n=n, interval=list(wilson(k * n, n)), taken_for={name: v for v, name in taken}
        )
        if len(samples.places) > 1:
            entry["places"] = {samples.places[g["place"]]: g["accuracy"] for g in groups if g["y"] == c}
        classes[samples.classes[c]] = entry
    return classes


def redraw(groups, seed, stream=0, times=2000):
    """Accuracies of groups (n, accuracy), [times, G], if their photos are drawn anew: the bootstrap of n zeros and ones is binomial."""
    n, accuracy = (np.array(column) for column in zip(*groups, strict=True))
    return np.random.default_rng([seed, stream]).binomial(n, accuracy, (times, len(n))) / n


def interval(drawn):
    return [float(v) for v in np.quantile(drawn, (0.025, 0.975))]


def ece(confidence, correct, bins=15):
    """Expected calibration error: mean over photos of |accuracy - confidence| of their bin of confidence (Guo et al. 2017)."""
    b = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, b, correct.double() - confidence.double())
    return float(gap.abs().sum() / len(b))


def counter_metrics(correct, y, place, classes, names, seed, suffix=""):
    """CounterAnimal: class-balanced common, counter and their drop, with the drop's bootstrap interval, and plain averages.

    correct: [m], bool or a share of draws; place 0 common, 1 counter. The class's own go into classes[name]. Source: the paper's
    metric, the mean over classes of per-class accuracies; an interval draws photos anew within each class and place.
    """
    cells = [[], []]  # of common and of counter: (n, accuracy) of each class that has such photos
    for c in torch.unique(y).tolist():
        share = [None, None]
        for k in (0, 1):
            mine = correct[(y == c) & (place == k)]
            if len(mine):
                share[k] = float(mine.double().mean())
                cells[k].append((len(mine), share[k]))
        drop = None if None in share else share[0] - share[1]
        n = [int(((y == c) & (place == k)).sum()) for k in (0, 1)]
        own = {"common" + suffix: share[0], "counter" + suffix: share[1], "drop" + suffix: drop}
        classes.setdefault(names[c], {}).update(own, n_common=n[0], n_counter=n[1])
    common, counter = (sum(a for _, a in of) / len(of) if of else None for of in cells)
    plain = [float(correct[place == k].double().mean()) if cells[k] else None for k in (0, 1)]
    out = dict(common=common, counter=counter, drop=None, drop_interval=None)
    if cells[0] and cells[1]:
        drawn = redraw(cells[0], seed).mean(1) - redraw(cells[1], seed, 1).mean(1)
        out.update(drop=common - counter, drop_interval=interval(drawn))
    out.update(common_plain=plain[0], counter_plain=plain[1])
    return {k + suffix: v for k, v in out.items()}


def in9_metrics(correct, place, places, seed):
    """ImageNet-9: accuracy on each variation, and BG-Gap = mixed_same - mixed_rand. correct: [m]."""
    of = {name: correct[place == k] for k, name in enumerate(places) if (place == k).any()}
    out = {name: float(c.mean()) for name, c in of.items()}
    if {"mixed_same", "mixed_rand"} <= set(of):
        a, b = out["mixed_same"], out["mixed_rand"]
        drawn = redraw([(len(of["mixed_same"]), a), (len(of["mixed_rand"]), b)], seed)
        out = dict(bg_gap=a - b, bg_gap_interval=interval(drawn[:, 0] - drawn[:, 1]), **out)
    return out


def logit(p):
    p = np.clip(p, 0.001, 0.999)
    return np.log(p / (1 - p))


def published_line():
    """(intercept, slope) of the least-squares line between the logits of the published models' common and counter accuracy."""
    x, y = logit(np.array(list(PUBLISHED.values())).T / 100)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return y.mean() - slope * x.mean(), slope


def on_line(line, common):
    """The counter accuracy that a line expects at a common accuracy."""
    return float(1 / (1 + np.exp(-line[0] - line[1] * logit(common))))


def compare(results, outcomes, samples, seed):
    """What needs several models, put into results: effective robustness (counter accuracy over what the published line expects
    at that common accuracy, Taori et al. 2020; fitted to logits, our reading), and the difference to the first model."""
    for _, _, m in each_outcome(results) if is_counteranimal(samples) else ():
        m, line = m["metrics"], published_line()
        m["effective_robustness"] = None if m["drop"] is None else m["counter"] - on_line(line, m["common"])
    base, *others = ((name, outcomes[name][r["protocol"]]) for name, r in results.items())
    for name, a in others:
        b = base[1]
        if samples.y[a.index].min() >= 0 and torch.equal(a.index, b.index):
            right = [out.predicted[0] == out.target for out in (a, b)]
            low_high = paired_bootstrap(*right, samples.group()[a.index], seed=seed)
            results[name]["metrics"]["worst_group_over_first"] = list(low_high)


# ---------------------------------------------------------------------------------------------------------------------
# blocks: what the console and the page show, laid out once

Block = namedtuple("Block", "title header rows parts notes said", defaults=((), (), (), (), False))
Block.__doc__ = """A title, a table (header, rows), Html parts (bars, figures, drawings) and notes; said: on the console, too."""


def console(blocks):
    """The tables and notes of blocks for the console, as text."""
    texts = []
    for block in blocks:
        if block.said and (block.rows or block.notes):
            texts.append(
                "\n".join(
                    [block.title, *([table(block.header, block.rows)] if block.rows else []), *block.notes]
                )
            )
    return "\n\n".join(texts)


def sections(blocks):
    """The sections of a page of blocks."""
    out = []
    for block in blocks:
        rows = [html_table([h.replace("_", " ") for h in block.header], block.rows)] if block.rows else []
        notes = [tag("p", note, class_="dim") for note in block.notes]
        if rows or block.parts or notes:
            out.append((block.title, *rows, *block.parts, *notes))
    return out


def each_outcome(results):
    """(model, protocol, {metrics, classes, groups}) of all."""
    return [(name, p, m) for name, r in results.items() for p, m in r["protocols"].items()]


def columns(results, samples):
    """The metrics to show, in order: those that some row has; n first where rows differ in it, as probes see the test split only."""
    wanted = ["bg_gap", *samples.places, "worst_group", "avg_group_mean", "avg_train_weighted", "average"]
    wanted += ["region_overall", "region_worst_group", "confidence", "ece"]
    if is_counteranimal(samples):
        wanted = ["common", "counter", "drop", "effective_robustness", "common_plain", "counter_plain"]
        wanted += ["common_1v20", "counter_1v20", "drop_1v20", "worst_group", "ece"]
    elif len(samples.places) < 2:
        wanted = ["average", "avg_group_mean", "worst_group", "confidence", "ece"]
    rows = [m["metrics"] for _, _, m in each_outcome(results)]
    differ = ["n"] * (len({m["n"] for m in rows}) > 1)
    return differ + [k for k in wanted if any(m.get(k) is not None for m in rows)]


def group_name(samples, y, place):
    return samples.classes[y] + (f" on {samples.places[place]}" if len(samples.places) > 1 else "")


def blocks_of(results, outcomes, samples, failed):
    """All that the console and eval.html show."""
    name, head = next(iter(results.items()))
    blocks = [results_block(results, samples, failed), line_block(results, samples)]
    blocks.append(
        counter_block(name, head) if is_counteranimal(samples) else groups_block(results, samples, head)
    )
    rows = [[c, v["accuracy"], v["n"], v["taken_for"]] for c, v in head["classes"].items() if "accuracy" in v]
    rows = sorted(rows, key=lambda row: row[1])[:45]
    rows = [(*row, ", ".join(f"{k} ({v})" for k, v in taken.items())) for *row, taken in rows]
    title = f"What each class is taken for, {name} {head['protocol']}"
    blocks.append(Block(title, ("class", "accuracy", "n", "taken for"), rows))
    for name, r in list(results.items())[:3]:
        figures = worst(outcomes[name][r["protocol"]], samples) or [tag("p", "none")]
        blocks.append(Block(f"Worst confusions: wrong and sure, {name} {r['protocol']}", parts=figures))
    blocks += [additivity_block(results)]
    if any("zeroshot" in r["protocols"] for r in results.values()):
        rows = [
            (label, "; ".join(t[:4]) + f" and {len(t) - 4} more" * (len(t) > 4))
            for label, t in zip(samples.labels, samples.prompts, strict=True)
        ]
        notes = [f"and of {len(rows) - 45} more labels"] * (len(rows) > 45)
        blocks.append(Block("Prompts", ("label", "prompts, averaged"), rows[:45], notes=notes))
    return blocks


def results_block(results, samples, failed):
    keys, (name, head) = columns(results, samples), next(iter(results.items()))
    few = head["groups"] if len(head["groups"]) <= 8 and not is_counteranimal(samples) else []
    alike = "n" not in keys
    groups = [group_name(samples, g["y"], g["place"]) + f" (n={g['n']})" * alike for g in few]
    rows = []
    for model, p, m in each_outcome(results):
        rows.append(
            (
                model,
                p,
                *[m["metrics"].get(k) for k in keys],
                *[g["accuracy"] for g in m["groups"][: len(few)]],
            )
        )
    notes, best = [], head["metrics"]
    if any(p.startswith("fewshot") for _, p, _ in each_outcome(results)):
        notes.append("fewshot: means over the draws; worst_group, too, is the mean of each draw's own")
    for k in [k for k in ("drop", "worst_group", "bg_gap") if best.get(k + "_interval")][:1]:
        low, high = best[k + "_interval"]
        notes.append(f"{name}: {k} {best[k]:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    for model in results if is_counteranimal(samples) else ():
        if model in PUBLISHED:
            notes.append("{}: published {:.2f} common, {:.2f} counter".format(model, *PUBLISHED[model]))
    notes += [f"FAILED {model}: {problem}" for model, problem in failed.items()]
    title = samples.name + f": {best['n']} photos" * alike
    return Block(title, ("model", "protocol", *keys, *groups), rows, notes=notes, said=True)


def line_block(results, samples):
    counter = is_counteranimal(samples)
    x, y = ("common", "counter") if counter else ("avg_group_mean", "worst_group")
    dots = [(name, a / 100, b / 100, "pale") for name, (a, b) in PUBLISHED.items() if counter]
    for name, r in results.items():
        if r["metrics"].get(x) is not None and r["metrics"].get(y) is not None:
            dots.append((name, r["metrics"][x], r["metrics"][y], "dot"))
    if len(dots) < 2:
        return Block("Accuracy on the line")
    curve = [(v / 100, on_line(published_line(), v / 100)) for v in range(2, 99)] if counter else []
    notes = ["Pale: published models, over the same 1000 labels. The line is fitted to logits."] * counter
    return Block("Accuracy on the line", parts=[scatter(dots, curve, x, y)], notes=notes)


def scatter(dots, curve, xlabel, ylabel):
    """Points (name, x, y, class) in the unit square and a curve of (x, y), zoomed to where the points are, as SVG."""
    values = [v for _, x, y, _ in dots for v in (x, y)]
    low, high = max(0, math.floor(10 * min(values) - 0.5)), min(10, math.ceil(10 * max(values) + 0.5))
    scale = 10 / (high - low)

    def at(x, y):
        return 60 + 620 * (x - low / 10) * scale, 380 - 360 * (y - low / 10) * scale

    def text(x, y, words, anchor="middle", **more):
        return tag("text", words, x=f"{x:.0f}", y=f"{y:.0f}", **{"text-anchor": anchor}, **more)

    parts = [text(370, 424, xlabel.replace("_", " "))]
    parts.append(text(14, 200, ylabel.replace("_", " "), transform="rotate(-90 14 200)"))
    for k in range(low, high + 1):
        x, y = at(k / 10, k / 10)
        parts.append(tag("path", d=f"M{x:.0f} 20V380M60 {y:.0f}H680", class_="grid"))
        parts += [
            text(x, 398, f"{k / 10:.1f}", class_="dim"),
            text(52, y + 4, f"{k / 10:.1f}", "end", class_="dim"),
        ]
    parts.append(tag("path", d="M60 380L680 20", class_="grid", **{"stroke-dasharray": "4 4"}))
    shown = ["{:.1f} {:.1f}".format(*at(*p)) for p in curve if low / 10 <= min(p) and max(p) <= high / 10]
    parts += [tag("path", d="M" + "L".join(shown), class_="pale")] if shown else []
    taken = []
    for name, u, v, kind in sorted(dots, key=lambda dot: (dot[3] != "dot", dot[2])):
        x, y = at(u, v)
        parts.append(
            tag(
                "circle",
                tag("title", f"{name}: {u:.3f}, {v:.3f}"),
                cx=f"{x:.1f}",
                cy=f"{y:.1f}",
                r=4,
                class_=kind,
            )
        )
        y += 4
        while any(abs(y - b) < 13 and abs(x - a) < 190 for a, b in taken):  # no name over another
            y -= 13
        taken.append((x, y))
        parts.append(text(x + (-9 if x > 500 else 9), y, name[:34], "end" if x > 500 else "start"))
    return tag("svg", *parts, viewBox="0 0 720 430", role="img")


def counter_block(name, head):
    rows = []
    for label, c in sorted(head["classes"].items(), key=lambda item: -(item[1]["drop"] or 0)):
        for k in [k for k in ("common", "counter") if c[k] is not None]:
            n = c["n_" + k]
            rows.append((f"{label[:26]}, {k}", c[k], wilson(c[k] * n, n), f"n={n}"))
    return Block(f"Common and counter photos by class, largest drop first, {name}", parts=[bars(rows)])


def groups_block(results, samples, head):
    """Bars of the groups of each row of the table; from four rows on, bars of the rows for each group."""
    charts, by_row = {}, len(each_outcome(results)) <= 3
    for name, p, m in each_outcome(results) if len(head["groups"]) <= 60 else ():
        for g in m["groups"]:
            label, group = f"{name} {p}", group_name(samples, g["y"], g["place"])
            title, label = (label, group) if by_row else (group, label)
            charts.setdefault(title, []).append((label[:34], g["accuracy"], g["interval"], f"n={g['n']}"))
    parts = [part for title, rows in charts.items() for part in (tag("h3", title), bars(rows))]
    return Block("Accuracy per group, with 95 % intervals", parts=parts)


def worst(out, samples, most=12):
    """The photos that are wrong with the highest confidence, as figures."""
    y, figures, of_class = samples.y[out.index], [], {}
    wrong = (out.predicted[0] != out.target) & (y >= 0)
    order = out.confidence[0].where(wrong, -1.0).argsort(descending=True)[: int(wrong.sum())]
    for k in order.tolist():
        c, photo = int(y[k]), int(out.index[k])
        of_class[c] = of_class.get(c, 0) + 1
        if of_class[c] > max(2, most // len(samples.classes)):  # not one class alone
            continue
        if len(figures) == most:
            break
        taken, confidence = out.called(int(out.predicted[0][k])), float(out.confidence[0][k])
        caption = f"{group_name(samples, c, int(samples.place[photo]))}, taken for {taken} ({confidence:.2f})"
        figures.append(thumb(samples.items[photo].image(), caption))
    return figures


def additivity_block(results):
    parts, rows = ("r2", "r2_heldout", "foreground", "background", "residual", "cross"), []
    for name, r in results.items():
        for kind, geometries in r["additivity"].items():
            rows += [(name, kind, geometry, *[a[q] for q in parts]) for geometry, a in geometries.items()]
    what = "how far an embedding is a foreground's part plus a background's: shares of the variance in z = mu + a + c + e"
    of = "of the mean embedding of each class on each place (cells), or of composites; flat, and after the log map"
    return Block(
        "Additivity",
        ("model", "of", "geometry", *parts),
        rows,
        notes=[f"{what}, {of}"] * bool(rows),
        said=True,
    )


def lead(results, samples):
    """The sentence under the page's title."""
    name, head = next(iter(results.items()))
    m, p = head["metrics"], head["protocol"]
    if m.get("drop") is not None:
        says = f"common {m['common']:.1%}, counter {m['counter']:.1%}"
    elif "worst_group" in m:
        says = f"worst group {m['worst_group']:.1%}, mean of groups {m['avg_group_mean']:.1%}"
    else:
        says = f"{m['n']} photos without labels"
    return f"{samples.name}; {name}, {PROTOCOLS['fewshot' if p.startswith('fewshot') else p].what}: {says}."


def write_tables(out, results, outcomes, samples):
    """eval.csv: a row for each model and protocol; groups.csv: for each group too; predictions.csv: for each photo."""
    rows, keys = each_outcome(results), {}
    for _, _, m in rows:
        keys.update((k, None) for k, v in m["metrics"].items() if not isinstance(v, list))
    table = [(name, p, *[m["metrics"].get(k) for k in keys]) for name, p, m in rows]
    write_table(out / "eval.csv", ("model", "protocol", *keys), table)
    table = []
    for name, p, m in rows:
        for g in m["groups"]:
            where = samples.classes[g["y"]], samples.places[g["place"]]
            table.append((name, p, *where, g["n"], g["accuracy"], *g["interval"]))
    write_table(
        out / "groups.csv", ("model", "protocol", "class", "place", "n", "accuracy", "low", "high"), table
    )
    header, photos = ["image", "class", "place", "split"], {}
    for column, (name, p, _) in enumerate(rows):
        o, header = outcomes[name][p], [*header, f"{name} {p}", f"{name} {p} confidence"]
        for k, c, v in zip(o.index.tolist(), o.predicted[0].tolist(), o.confidence[0].tolist(), strict=True):
            photos.setdefault(k, [""] * 2 * len(rows))[2 * column : 2 * column + 2] = (
                o.called(c, True),
                f"{v:.4f}",
            )
    table = []
    for k, filled in sorted(photos.items()):
        image, c = getattr(samples.items[k], "path", samples.captions[k]), int(samples.y[k])
        where = samples.places[samples.place[k]], SPLITS[samples.split[k]]
        table.append((image, samples.classes[c] if c >= 0 else "", *where, *filled))
    write_table(out / "predictions.csv", header, table)


# ---------------------------------------------------------------------------------------------------------------------
# controlled settings: fine-tune where a planted feature goes with a class, discover it, mitigate it (RaVL, section 4)

STRENGTHS = 0.99, 0.95, 0.9, 0.8, 0.7
MITIGATIONS = "finetune", "ravl", "upsampled", "vl_erm", "vl_gdro", "spurious_aware", "jtt", "subg"
FIGURES = "image_overall", "image_worst_group", "region_overall", "region_worst_group"
SMALL_CLIPS = "tiny", "tiny-conv", "lite0-clip"  # what base_steps pre-trains
VALID = (
    0.2  # a setting counts if the fine-tuned model loses so much accuracy on the class without the feature
)
LEAST = 50  # images in each test group; of fewer the worst group would be noise
FREE = (
    "settings",
    "mitigate",
    "threads",
    "cache_dir",
    "out_dir",
)  # flags that may differ when settings are resumed
SHARED = (
    "data",
    "classes",
    "feature",
    "model",
    "quick_gelu",
    "device",
    "dtype",
    "batch_size",
    "threads",
    "cache_dir",
)

# What a family takes where the flags say nothing. A base that knows the classes learns nothing spurious, so that of digits
# is stopped early; the image tower of the others knows ImageNet, and their texts follow within these steps
FAMILIES = {
    "digits": dict(
        model="tiny-conv", base_steps=130, steps=160, learning_rate=2e-3, pairs=64, regions="grid:2"
    ),
    "cutouts": dict(
        model="lite0-clip", base_steps=0, steps=20, learning_rate=3e-4, pairs=32, regions="grid:2"
    ),
    "coco": dict(model="lite0-clip", base_steps=0, steps=20, learning_rate=3e-4, pairs=32, regions="grid:3"),
}


def controlled_settings(config):
    """--protocol=ravl: runs the settings, and writes protocol.json after each, .csv and .html at the end."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    expect(
        alone,
        "protocol",
        protocol,
        "another in several processes, as each would run all of it; start it without torchrun",
    )
    config = of_family(config)
    started, out, git = time.time(), Path(out_dir), revision()
    resumable(out / "protocol.json", config)
    classes = dataset(config, 0.0, 0).classes
    chosen = [(v, c) for v in STRENGTHS for c in range(len(classes))][:settings]
    base, done, mitigated = base_model(config), [], 0
    for k, (v, label) in enumerate(chosen):
        setting = one_setting(config, out / f"settings/{v:g}-{label}", v, label, base, mitigated < mitigate)
        mitigated += bool(setting["mitigation"])
        done.append(setting)
        tree = dict(
            config=config, git=git, settings=done, summary=summarised(done), seconds=time.time() - started
        )
        write_json(out / "protocol.json", tree)
        at_10 = ", ".join(
            f"{m} {'-' if p is None else f'{p:.1f}'}" for m, p in setting["precision_at_10"].items()
        )
        gap = f"gap {setting['gap']:.2f}" + ("" if setting["valid"] else ", not valid")
        say(
            f"setting {k + 1}/{len(chosen)}: V {v:g}, {classes[label]}: {gap}; Precision@10 {at_10 or 'not looked for'}"
        )
    write_settings(out / "protocol.csv", done)
    blocks, summary = setting_blocks(tree, classes), tree["summary"]
    lead = f"{summary['valid']} of {len(done)} settings learned the planted feature ({config['data']}; {config['model']})."
    title = f"flock: controlled settings, {config['data'].partition(':')[0]}"
    write(out / "protocol.html", page(title, lead, [*sections(blocks), flags_section(config, git)]))
    say("\n" + console(blocks))
    say(f"\n{out}/protocol.json, protocol.csv and protocol.html written, {time.time() - started:.0f} s")


def of_family(config):
    """The flags, with the family's own values where they are left open; says which these are."""
    data = config["data"] or "digits"
    kind = data.partition(":")[0]
    expect(kind in FAMILIES, "data", data, "digits, cutouts or coco:DIR with --protocol=ravl")
    taken = {flag: value for flag, value in FAMILIES[kind].items() if not config[flag]}
    if taken:
        say(f"{kind}: " + " ".join(f"--{flag}={value}" for flag, value in taken.items()))
    config = {**config, **taken, "data": data}
    if not config["regions"].startswith("masks:"):
        load_regions(config["regions"], [], None)  # complains now, not after the first fine-tuning
    return config


def resumable(path, config):
    """Raises Complaint where a protocol.json was made with other flags."""
    if not path.is_file():
        return
    tree = read_json(path, "a protocol.json of eval.py")
    with reading(path, "a protocol.json of eval.py", "move it away"):
        differ = [
            f"--{k}={tree['config'].get(k)}"
            for k in config
            if k not in FREE and tree["config"].get(k) != config[k]
        ]
    if differ:
        raise Complaint(f"{path}: made with {', '.join(differ)}; give the same flags, or another --out_dir")


def dataset(config, strength, label):
    """The Samples of a setting: its strength, and the class that the feature goes with."""
    planted = dict(strength=strength, spurious=str(label), feature=config["feature"])
    return load_data(config["data"], config["classes"], seed=config["seed"], **planted)


def script_run(script, out, config, **more):
    """Runs train.py or discover.py beside this file, its output into out/log.txt; raises Complaint with its last line."""
    words = [f"--{k}={v}" for k, v in ({k: config[k] for k in SHARED} | dict(out_dir=out) | more).items()]
    log = Path(out) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        command = [sys.executable, str(Path(__file__).with_name(script)), *words]
        job = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if job.returncode == 130:
        raise KeyboardInterrupt
    if job.returncode:
        line = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise Complaint(f"{script} {' '.join(words)} failed: {''.join(line)}")


def base_model(config):
    """Weights of the base model, pre-trained on uncorrelated images of another seed unless --pretrained names some."""
    model, steps = config["model"], config["base_steps"]
    if config["pretrained"] or not steps or model not in SMALL_CLIPS:
        return config["pretrained"]
    words = {k: config[k] for k in ("learning_rate", "pairs")}
    words.update(method="finetune", strength=0, spurious=0, seed=1000 + config["seed"], steps=steps)
    made = json.dumps([{k: config[k] for k in ("data", "classes", "feature")}, words, training_code()])
    at = (
        Path(config["cache_dir"] or config["out_dir"])
        / f"base-{model}-{hashlib.sha256(made.encode()).hexdigest()[:12]}"
    )
    weights = at / "weights.safetensors"
    if not weights.is_file():
        started = time.time()
        script_run(
            "train.py", at, config, pretrained="imagenet" if model == "lite0-clip" else "none", **words
        )
        say(f"base model pre-trained in {time.time() - started:.0f} s, kept in {at}")
    return str(weights)


def training_code():
    """The digest of what a base model is made by."""
    files = [Path(__file__).with_name(name) for name in ("train.py", "model.py", "data.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def one_setting(config, at, strength, label, base, mitigating):
    """Fine-tunes, discovers if the correlation was learned, mitigates if asked to: the setting's entry in protocol.json."""
    samples, planted = (
        dataset(config, strength, label),
        dict(strength=strength, spurious=label, seed=config["seed"]),
    )
    training = {k: config[k] for k in ("steps", "learning_rate", "pairs")} | planted
    of_ravl = {k: config[k] for k in ("region_weight", "region_temperature")}

    def figures(method, **more):
        if not (at / method / "weights.safetensors").is_file():
            more |= of_ravl if method == "ravl" else {}
            script_run("train.py", at / method, config, method=method, pretrained=base, **training, **more)
        return reached(config, at / method, samples)

    groups = figures("finetune")["groups"]
    gap = groups[2 * label + 1] - groups[2 * label]
    setting = dict(
        strength=strength,
        spurious_class=label,
        valid=gap >= VALID,
        gap=gap,
        precision_at_10={},
        mitigation={},
    )
    if not setting["valid"]:
        return setting
    tuned, path = at / "finetune/weights.safetensors", at / "discovery/discovery.json"
    if not path.is_file():
        script_run(
            "discover.py",
            path.parent,
            config,
            pretrained=tuned,
            regions=config["regions"],
            method="all",
            **planted,
        )
    tree = read_json(path, "a discovery.json of discover.py")
    setting["precision_at_10"] = {name: m["precision_at_10"] for name, m in tree["methods"].items()}
    if mitigating and any(c["kept"] for c in tree["clusters"]):
        for method in MITIGATIONS:
            m = figures(method, **({} if method == "finetune" else dict(discovery=path.parent)))
            setting["mitigation"][method] = {k: m[k] for k in FIGURES}
    return setting


def reached(config, at, samples):
    """What the weights in a folder reach on the uncorrelated test split: the four figures, and groups, image accuracy of
    class x feature [2 C]. Region figures: zero-shot accuracy of the regions that show the class object. Kept in figures.json."""
    path = at / "figures.json"
    if path.is_file():
        return read_json(path, "the figures.json of a setting")
    how = dict(
        device=config["device"], dtype=config["dtype"], batch=config["batch_size"], threads=config["threads"]
    )
    encoder = load_encoder(config["model"], str(at / "weights.safetensors"), config["quick_gelu"], **how)
    test = samples.keep(samples.split == 2)
    n = test.counts(2).tolist()
    if min(n) < LEAST:
        few = [f"{group_name(test, *divmod(g, len(test.places)))}: {k}" for g, k in enumerate(n) if k < LEAST]
        line = f"test groups with fewer than {LEAST} images ({'; '.join(few)})"
        raise Complaint(f"{samples.name}: {line}; the worst group would be noise")
    pictures, _ = load_regions(config["regions"], test.items, encoder.frame)
    z, r = region_embeddings(encoder, pictures, label=f"{at.parent.name} {at.name}")
    prompts = encoder.prompts(samples.class_prompts())
    photo = torch.arange(len(pictures)).repeat_interleave(torch.tensor([len(p.boxes) for p in pictures]))
    shown, figures = region_truth(pictures, test.shows)[0], {}
    regions = r[shown.to(r.device)], photo[shown]
    for name, (v, index) in dict(image=(z, torch.arange(len(z))), region=regions).items():
        right = (unit(v) @ prompts.T).argmax(1).cpu() == test.y[index]
        m = group_metrics(right, samples, (samples.split == 2).nonzero()[index, 0])
        figures.update({f"{name}_overall": m["overall"], f"{name}_worst_group": m["worst_group"]})
        if name == "image":
            figures["groups"] = [g["accuracy"] for g in m["groups"]]
    write_json(path, figures)
    return figures


def mean_interval(values):
    """Mean of shares with its 95 % interval over settings, and their number; what was not found counts as zero."""
    x = torch.tensor([v or 0.0 for v in values], dtype=torch.double)
    mean, half = float(x.mean()), 1.96 * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else 0.0
    return dict(mean=mean, low=max(0.0, mean - half), high=min(1.0, mean + half), n=len(x))


def summarised(done):
    """Mean Precision@10 by method, over all valid settings and by strength; mitigations' means over settings whose RaVL
    Precision@10 exceeds .6 and .8, as in the paper."""
    valid = [s for s in done if s["valid"]]
    precision, mitigation = {}, {}
    for m in valid[0]["precision_at_10"] if valid else ():
        of = {"all": [s["precision_at_10"][m] for s in valid]}
        for s in sorted(valid, key=lambda s: -s["strength"]):
            of.setdefault(f"{s['strength']:g}", []).append(s["precision_at_10"][m])
        precision[m] = {name: mean_interval(values) for name, values in of.items()}
    for least in (0.6, 0.8):
        each = [
            s["mitigation"] for s in valid if s["mitigation"] and (s["precision_at_10"]["ravl"] or 0) > least
        ]
        methods = {}
        for m in MITIGATIONS if each else ():
            methods[m] = {k: sum(figures[m][k] for figures in each) / len(each) for k in FIGURES}
        mitigation[f"precision_above_{least:g}"] = dict(n=len(each), methods=methods)
    return dict(settings=len(done), valid=len(valid), precision_at_10=precision, mitigation=mitigation)


def setting_blocks(tree, classes):
    """What was found, how well, what each mitigation reaches, every setting."""
    summary = tree["summary"]
    found, blocks = summary["precision_at_10"], []
    chart = [
        (m, v["all"]["mean"], (v["all"]["low"], v["all"]["high"]), f"n={v['all']['n']}")
        for m, v in found.items()
    ]
    blocks.append(Block("Discovery: Precision@10", parts=[bars(chart)] if chart else []))
    part = next((p for p in reversed(summary["mitigation"].values()) if p["n"]), dict(methods={}))
    for k in FIGURES if part["methods"] else ():
        chart = [(m, v[k], None, f"n={part['n']}") for m, v in part["methods"].items()]
        blocks.append(Block(f"Mitigation: {k.replace('_', ' ')}", parts=[bars(chart)]))
    shares = list(next(iter(found.values()))) if found else []
    rows = []
    for m, v in found.items():
        rows.append((m, *["{mean:.3f} ({low:.2f} to {high:.2f})".format(**v[c]) for c in shares]))
    of = f"over {summary['valid']} valid settings of {summary['settings']}, by Cramer's V, mean and 95 % interval"
    blocks.append(Block(f"Precision@10 {of}", ("method", *shares), rows, said=True))
    for name, part in summary["mitigation"].items():
        title = f"Mitigation, mean of {part['n']} settings with Precision@10 > {name.rpartition('_')[2]}"
        rows = [(m, *[v[k] for k in FIGURES]) for m, v in part["methods"].items()]
        blocks.append(Block(title, ("method", *FIGURES), rows, said=True))
    rows = []
    for s in tree["settings"]:
        valid = "yes" if s["valid"] else "no"
        rows.append(
            (
                f"{s['strength']:g}",
                classes[s["spurious_class"]],
                valid,
                s["gap"],
                s["precision_at_10"].get("ravl"),
            )
        )
    blocks.append(Block("Every setting", ("V", "class", "valid", "gap", "RaVL Precision@10"), rows))
    return blocks


def write_settings(path, done):
    """protocol.csv: a row for each setting and method of discovery, and for each mitigation."""
    rows, empty = [], [None] * len(FIGURES)
    for s in done:
        head = (s["strength"], s["spurious_class"], s["valid"], s["gap"])
        rows += [(*head, "discover", m, v, *empty) for m, v in s["precision_at_10"].items()]
        if not s["precision_at_10"]:
            rows.append((*head, "finetune", "", "", *empty))
        rows += [(*head, "mitigate", m, "", *[v[k] for k in FIGURES]) for m, v in s["mitigation"].items()]
    header = ("strength", "spurious_class", "valid", "gap", "stage", "method", "precision_at_10", *FIGURES)
    write_table(path, header, rows)


if __name__ == "__main__":
    run(main, "the same command")
