"""Which image regions does a model spuriously rely on? RaVL's discovery, and what it is compared with.

    python discover.py --data=waterbirds:DIR --ckpt=out/ckpt.pt               a probe that train.py made
    python discover.py --data=waterbirds:DIR --model=ViT-B-32 --pretrained=openai          zero-shot
    python discover.py --embeddings=FILE.npz                      region embeddings from elsewhere
    torchrun --nproc_per_node=4 discover.py ...                   shares the embedding out

1. Cluster the embeddings of regions: k-medoids for each k of a range; the k with the largest silhouette.
2. Identify the clusters that are spurious: images of one class gain by a region in it, images of another
   lose, and those that are misclassified look at it (influence).
3. Rank the regions of each such cluster by their closeness to its medoid.

RaVL is Varma et al., NeurIPS 2024. --clustering=ravl is their published procedure to the letter, fast the
same idea in O(n k D). Embedding is what costs, and processes share it by the cache; clustering is one's work.
"""

import io
import math
import os
import re
import resource
import time
import zlib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

# first, as it checks the flags before torch is imported
from data import ASSETS, SPLITS, Complaint, Crop, bounded, dots, expect, find_masks, flags, html_table, linked
from data import load_data, load_regions, opaque, page, reading, region_truth, revision, rng, run, say, table
from data import tag, thumb, write, write_json

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import ImageDraw

from model import auto_device, bar, fit_probe, join, load_checkpoint, load_encoder, load_heads, load_probe
from model import mask_shares, region_embeddings, repeat_by, sha256, sums, unit, wilson

# fmt: off
# --- I/O ----------------------------------------------------------------------------------------------------
out_dir = "out"           # discovery.json, discovery.npz, discovery.html
cache_dir = "cache"       # embeddings, shared with the other scripts; --cache_dir= for none
quiet = False             # say only warnings, the result and where it lies
skip_bad = False          # leave out images that cannot be read, counted and named, instead of stopping
resize_once = False       # keep photos as small as a model sees them, for others of its preprocessing
max_pixels = 89478485     # a photo of more is refused
# --- what to look at: images, or embeddings of their regions ------------------------------------------------
data = "scenes"           # every --data of train.py
split = "val"             # train, val, test, or several: val,test; not those the classifier was fitted on
classes = ""              # only these, as in car,truck; or a file of names, one a line
places = ""               # only these; with as many as --classes the k-th is the k-th class's own
columns = ""              # of csv, waterbirds: which is what, as in place=weather,path=photo; see csv:help
confounder = 1.0          # scenes and pairs: share of the training images on their class's own place
strength = 0.0            # controlled settings: Cramer's V of a class and the planted feature in training,
spurious = "0"            # that class, by number or name,
feature = ""              # and that feature, where there is a choice
masks = ""                # folder of foreground masks: what Precision@10 counts as background
outside = 0.9             # share of a region that must lie outside the mask for it to count
embeddings = ""           # instead: FILE.npz with reg_emb [N,D], num_regions [n], true_label [n], text_emb
                          # [C,D], img_emb [n,D], perhaps region_target [N], class_names [C]; or random:N,D
# --- regions ------------------------------------------------------------------------------------------------
regions = "grid:3"        # grid:3, grid:2,4, boxes:FILE.csv (path,x1,y1,x2,y2 in pixels), coco:FILE,
                          # masks:DIR
region_encoder = "pool"   # the feature map under the region; crop: regions as images; roi: CLIP's ResNets
# --- the classifier under suspicion -------------------------------------------------------------------------
classifier = "auto"       # probe, text, rows (of an ImageNet classifier); auto: the first that there is
ckpt = ""                 # of train.py; without one, probe is fitted on the training split, as its erm is
probe = "erm"             # which of its probes
prompts = ""              # openai: its 80 templates; or a file of templates with {}, or of class<TAB>prompt;
                          # if empty the data set's own, of most "a photo of a {}."
temperature = 0.07        # of softmax over cosines with text embeddings
model = "lite0"           # lite0, lite1, lite2, timm:NAME, an open_clip name (ViT-L-14), hf-hub:NAME,
                          # local-dir:FOLDER, lite0-clip, tiny, tiny-conv
pretrained = ""           # open_clip tag, local file, or folder of weights
quick_gelu = "auto"       # auto follows the record of the weights; on, off
test_size = False         # timm: pictures at the size and crop of its published accuracies, not of training
device = "auto"           # auto, cpu, cuda
dtype = "auto"            # of the forward pass: auto, float32, bfloat16
batch_size = "auto"       # images at a time; auto: 256 on a GPU, fewer if memory asks for it; 8 on a CPU
threads = 0               # that decode images and, on a CPU, embed them; 0 for one per core
# --- method -------------------------------------------------------------------------------------------------
method = "ravl"           # a rule for clusters: ravl, gap_only, influence_only, unweighted; loss, ours: some
                          # class loses beyond chance, and none need gain; or a baseline: random, failures,
                          # george, domino, spurious_aware; or all
clustering = "fast"       # cosines as they are; ravl: as published, clipped, with its own seed 0
k = ""                    # range of k, as 20:50, upper end excluded; empty: 2C:5C, C the number of classes
l2 = 0.8                  # penalty of a probe fitted here, as in train.py
seed = 0
# --- end ----------------------------------------------------------------------------------------------------
# fmt: on

LIMITS = {  # the words that a flag may be, those of a table by its name; or its interval
    "method": ("CRITERIA", "BASELINES", "all"),
    "clustering": ("fast", "ravl"),
    "region_encoder": ("pool", "crop", "roi"),
    "classifier": ("auto", "CLASSIFIERS"),
    "temperature": "(0, inf)",
    "outside": "(0, 1]",
}

OF_IMAGES = (  # flags that say nothing of --embeddings
    "data split classes places columns confounder strength spurious feature masks outside regions "
    "region_encoder classifier ckpt probe prompts model pretrained quick_gelu test_size"
).split()
MOST_K, MOST_NUMBERS = 20_000, 1 << 32  # of clusters; of numbers in random:N,D and in cosines to clusters
INFLUENCE = 0.25  # clusters below it are not kept, as published
CONE = 0.1  # mean cosine of the regions above which fast takes their mean off: they lie in a cone, and what
# tells them apart is small beside what they share
LISTED = 1000  # regions of a cluster in discovery.json, of its n; the labels of all are in discovery.npz
PICTURED = 6  # kept clusters whose regions the page shows: with more it would weigh more than 2 MB
FALSE_DISCOVERIES = 0.05  # of the clusters that loss keeps, the share that may be chance
OF_GAP = "gap", "weight", "acc_in", "acc_out", "n_in", "n_out", "q"
STEP = 1 << 16  # regions handled at a time

Criterion = namedtuple("Criterion", "weighted gaps influence by", defaults=(True, True, True, "score"))
CRITERIA = {  # whether gaps are weighted, what a kept cluster must show, what clusters are ranked by
    "ravl": Criterion(),
    "gap_only": Criterion(influence=False),
    "influence_only": Criterion(gaps=False, by="influence"),
    "unweighted": Criterion(weighted=False),
    "loss": Criterion(gaps=False, influence=False, by="loss"),
}


def main():
    default = flags(globals(), [])
    config = flags(globals())
    low, high = map(int, k.split(":")) if re.fullmatch("[0-9]{1,99}:[0-9]{1,99}", k) else (0, 0)
    expect(not k or 2 <= low < high <= MOST_K, "k", k, f"LOW:HIGH, 2 <= LOW < HIGH <= {MOST_K}, as in 20:50")
    for flag in OF_IMAGES if embeddings else ():
        expect(config[flag] == default[flag], flag, config[flag], "nothing with --embeddings")
    started, (rank, _) = time.time(), join(device)
    if embeddings:
        e = from_embeddings(embeddings, temperature, seed, auto_device(device)) if rank == 0 else None
    else:
        e = from_images(config)
    if e is None:
        return  # this process has embedded its share, the first goes on
    for note in e.notes:
        say(note)

    # 1. clusters
    times = [time.time()]
    ks = k_range(low, high, len(e.classes), len(e.x), clustering)
    mean = less_mean(e.x) if clustering == "fast" else torch.zeros_like(e.x[0])
    sweep = kmedoids(e.x, ks, seed) if clustering == "fast" else published(e.x, ks)
    best = max(sweep, key=lambda c: sweep[c].silhouette)  # of equal ones the smallest k
    if clustering == "ravl" and sweep[best].silhouette <= 0:
        say("silhouette: not positive for any k; regions do not fall into clusters")
    labels, medoids = sweep[best].labels.long(), sweep[best].medoids
    times.append(time.time())

    # 2. which of them are spurious
    rule = method if method in CRITERIA else "ravl"
    verdicts = {name: identify(labels, best, e, criterion) for name, criterion in CRITERIA.items()}
    stable = stability(sweep, best, verdicts[rule], e, CRITERIA[rule])
    times.append(time.time())

    # 3. regions, the most typical first
    similarity = [(e.x[rows] * e.x[medoids[labels[rows]]]).sum(1) for rows in tiles(len(e.x))]
    similarity = torch.cat(similarity)  # cosine of each region to its cluster's medoid, [N]
    order = descending(similarity)
    order = order[labels[order].argsort(stable=True)]
    members, ranked = order.split(torch.bincount(labels, minlength=best).tolist()), {}
    for name, verdict in verdicts.items():
        first = verdict.ranking[0]  # kept, if one is
        ranked[name] = members[first] if verdict.kept[first] else order[:0]
    for name in bar("baselines", BASELINES if method == "all" else {method} & {*BASELINES}):
        ranked[name] = BASELINES[name](e, seed, l2)
    if method in BASELINES:
        clusters = listed(method, ranked[method])
    else:
        clusters = described(verdicts[rule], medoids, members, stable, e.classes)
    times.append(time.time())

    summary = dict(config=config, git=revision(), notes=e.notes, k=best, classes=e.classes, clusters=clusters)
    summary.update(on_published_distance(e.x, labels, best, mean, seed), mean_removed=bool(mean.any()))
    summary.update(silhouettes={str(c): s.silhouette for c, s in sweep.items()})
    summary.update(accuracy=float((e.predicted == e.y).double().mean()))
    summary.update(base_rate=precision(torch.arange(len(e.x)), e.target, len(e.x)))
    at_10 = {name: precision(r, e.target) for name, r in ranked.items()}
    tops = {name: dict(precision_at_10=at_10[name], top=r[:100].tolist()) for name, r in ranked.items()}
    summary.update(precision_at_10=at_10["ravl" if method == "all" else method])
    seconds = dict(zip(("cluster", "identify", "rank"), np.diff(times).tolist(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but for macOS
    peak = peak / 2 ** (20 if os.uname().sysname == "Linux" else 30)
    summary.update(methods=tops, seconds=dict(seconds, total=time.time() - started), peak_gib=peak)
    out, buffer = Path(out_dir), io.BytesIO()
    arrays = dict(medoids=e.x[medoids], mean=mean, image=e.image, box=e.box, label=labels)
    arrays = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    arrays.update(kept=np.array([c["id"] for c in clusters if c["kept"]], np.int64), data=e.name)
    arrays.update(paths=[str(getattr(p, "path", "")) for p in e.pictures or [""] * len(e.y)])
    arrays.update(fingerprint=e.encoder.fingerprint if e.encoder else "", regions=regions)
    np.savez_compressed(buffer, clipped=clustering == "ravl", region_encoder=region_encoder, **arrays)
    (out / "discovery.json").unlink(missing_ok=True)  # it would be of another run than what comes now
    write(out / "discovery.npz", buffer.getvalue())
    summary["npz"] = sha256(buffer.getvalue())
    write(out / "discovery.html", report(summary, e, similarity, e.x[medoids]))
    write_json(out / "discovery.json", summary)
    say(console(summary, e), True)
    written = "discovery.json, discovery.npz and discovery.html written"
    say(f"\n{out}/{written}, {time.time() - started:.1f} s", True)


def from_images(config):
    """Evidence from images; None on ranks of torchrun above 0, which only embed."""
    how = dict(device=device, dtype=dtype, batch=batch_size, threads=threads, cache=cache_dir)
    how.update(skip_bad=skip_bad, resize_once=resize_once)
    encoder = load_encoder(model, pretrained, quick_gelu, test_size, **how)
    planted = {k: config[k] for k in ("confounder", "strength", "spurious", "feature", "columns")}
    expect(not data.startswith("embeddings:"), "data", data, "pictures; or --embeddings=FILE.npz of regions")
    samples = load_data(data, classes, places, prompts, "", False, seed, **planted)
    if (samples.y < 0).any():
        raise Complaint(f"{samples.name}: no labels; discovery needs them: a folder for each class")
    parts = [part.strip() for part in split.split(",")]
    expect(set(parts) <= {*SPLITS}, "split", split, "train, val, test, or several of them with commas")
    wanted = torch.tensor([SPLITS.index(part) for part in parts])
    chosen = samples.keep(torch.isin(samples.split, wanted))
    if not chosen.items:
        counts = dict(zip(SPLITS, torch.bincount(samples.split, minlength=3).tolist(), strict=True))
        raise Complaint(f"--split={split}: {samples.name} has no images there ({counts}); take another split")
    pictures, notes = load_regions(regions, chosen.items, encoder.frame, skip_bad)
    notes += [f"{model}: its text tower is untrained: no nearest words"] * encoder.untrained
    mask_of = find_masks([getattr(p, "path", "") for p in chosen.items], masks) if masks else []
    logits, said = suspect(encoder, samples, parts, config)
    z, x = region_embeddings(encoder, pictures, region_encoder)
    if z is None:
        return None
    readable = z.isfinite().all(1)
    count = torch.tensor([len(p.boxes) for p in pictures], device=z.device)
    x, z, count, index = x[repeat_by(readable, count)], z[readable], count[readable], readable.nonzero()[:, 0]
    index, target = index.tolist(), None
    if masks:
        inside = torch.cat([torch.zeros(0), *[mask_shares(pictures[i], mask_of[i]) for i in index]])
        target = (inside <= 1 - outside).float().masked_fill(inside.isnan(), torch.nan).to(z.device)
    elif all(chosen.shows):
        shows = [chosen.shows[i] for i in index]
        target = region_truth([pictures[i] for i in index], shows)[1].float().to(z.device)
    if masks and None in mask_of:
        have = f"masks for {len(mask_of) - mask_of.count(None)} of {len(mask_of)} images"
        notes.append(f"--masks: {have}; Precision@10 and the base rate are of their regions only")
    if len(index) < len(pictures):
        notes.append(f"{len(pictures) - len(index)} of {len(pictures)} images cannot be read; left out")
    box = torch.cat([torch.tensor(pictures[i].boxes).view(-1, 4) for i in index] or [torch.zeros(0, 4)])
    given = dict(name=samples.name, classes=samples.classes, y=chosen.y.to(z.device)[readable], count=count)
    given.update(target=target, box=box, pictures=[chosen.items[i] for i in index], encoder=encoder)
    return evidence(x, z, logits, notes=[*encoder.notes, *samples.notes, said, *notes], **given)


def tiles(n, step=STEP):
    """Slices of n things, some at a time."""
    return [slice(a, min(a + step, n)) for a in range(0, n, step)]


def descending(score):
    """Numbers by their score [N], largest first, of ties the later first, as published."""
    return len(score) - 1 - score.flip(0).argsort(descending=True, stable=True)


# ----------------------------------------------------------------------------------------------------------
# what is looked at


def evidence(x, z, logits, name, classes, y, count, notes, **rest):
    """What steps 2 and 3 ask: n images of C classes, N regions in them, and what a classifier says of both.

    x: [N, D] embeddings of regions, made unit-norm in place; z: [n, D] of images; logits: of embeddings
    [., D] -> [., C]; y: [n] class; count: [n] regions of each image; rest: target [N], whether a region
    shows the planted feature, NaN where it is not known, or None; box [N, 4] in shares; pictures and encoder,
    or None. Returns all of it as a namespace, with predicted [n]; scores [n, C], the probabilities of
    classes; image [N], that of each region; own [N], the region's score for the class that its image is taken
    for; and best [n], the image's region with the largest, the first of equals, -1 without any.
    """
    if not len(y):
        raise Complaint(f"{name}: no images")
    if len(classes) < 2:
        raise Complaint(f"{name}: one class ({classes[0]}); spurious correlations need two or more")
    if not len(x):
        raise Complaint(f"{name}: none of its {len(y)} images has a region")
    n, N = len(y), len(x)
    image = repeat_by(torch.arange(n, device=x.device), count)
    said, own = logits(z), torch.empty(N, dtype=torch.double, device=x.device)
    predicted, scores = said.argmax(1), said.softmax(1)
    for rows in tiles(N):
        taken = predicted[image[rows], None]
        own[rows] = logits(x[rows]).double().softmax(1).gather(1, taken)[:, 0]
        norm = x[rows].norm(dim=1, keepdim=True)
        odd = (~norm.isfinite() | (norm == 0))[:, 0].nonzero()[:, 0].tolist()
        if odd:
            what = "not finite" if norm[odd[0]] else "zero"
            raise Complaint(f"{name}: region {rows.start + odd[0]} is {what}; leave it out, check the model")
        x[rows] /= norm
    highest = own.new_full((n,), -math.inf).scatter_reduce_(0, image, own, "amax")
    ties = (own == highest[image]).nonzero()[:, 0]
    best = torch.full_like(y, -1).scatter_reduce_(0, image[ties], ties, "amin", include_self=False)
    listing, right = ", ".join(classes[:6]) + ", ..." * (len(classes) > 6), (predicted == y).double()
    notes = [*notes, f"{N} regions of {n} images, classes {listing}; accuracy {float(right.mean()):.3f}"]
    if not count.all():
        notes.append(f"{int((count == 0).sum())} of {n} images have no region, so not the feature either")
    if right.all():
        notes.append(f"the classifier is right on all {n} images: without errors nothing can be found")
    if (y == y[0]).all():
        notes.append(f"all images are of one class ({classes[int(y[0])]}): what harms another cannot show")
    rest.update(name=name, classes=classes, x=x, z=unit(z.float()), y=y, count=count, notes=notes)
    return SimpleNamespace(predicted=predicted, scores=scores, image=image, own=own, best=best, **rest)


def suspect(encoder, samples, parts, config):
    """The classifier, embeddings [N, D] -> logits [N, C], and a line about it. parts: splits looked at."""
    kind, ckpt = config["classifier"], config["ckpt"]
    expect(not ckpt or kind in ("auto", "probe"), "ckpt", ckpt, f"none with --classifier={kind}")
    expect(ckpt or config["probe"] == "erm", "probe", config["probe"], "erm, or --ckpt=FILE of train.py")
    if kind == "auto":
        texts = encoder.tokenizer and not samples.nameless
        there = dict(probe=ckpt, text=texts, rows=len(samples.classes) == 1000)
        kind = next((name for name, able in there.items() if able), "probe")
    return CLASSIFIERS[kind](encoder, samples, parts, config)


def text_classifier(encoder, samples, parts, config):
    """Cosines with text embeddings of the classes."""
    texts = samples.class_prompts()
    text, temperature = encoder.prompts(texts, samples.classes), config["temperature"]
    note = f"classifier: text embeddings, {samples.prompt_line()}"
    return lambda v: unit(v.float()) @ text.T / temperature, note


def own_rows(encoder, samples, parts, config):
    """The model's own classifier."""
    weight, bias = encoder.classifier()
    if len(weight) != len(samples.classes):
        raise Complaint(f"--classifier=rows: {len(weight)} classes, expected the {len(samples.classes)} here")
    return lambda v: v.float() @ weight.T + bias, "classifier: the model's own rows"


def probe_classifier(encoder, samples, parts, config):
    """A probe of train.py's checkpoint, or one fitted here on the training split."""
    if config["ckpt"]:
        return checkpoint_probe(encoder, samples, parts, config["ckpt"], config["probe"])
    train = samples.keep(samples.split == 0)
    if "train" in parts or not train.items:
        raise Complaint(f"--split={','.join(parts)}: a probe is fitted on train; use --split=val, or --ckpt")
    z = encoder.embed(train.items, "training images")
    if z is None:  # on ranks above 0, which only embed
        return None, ""
    readable, y = z.isfinite().all(1), train.y.to(z.device)
    fitted = fit_probe(unit(z[readable]), y[readable], config["l2"], classes=len(samples.classes))
    note = f"classifier: probe fitted on {int(readable.sum())} training images, l2 = {config['l2']}"
    return lambda v: fitted.logits(unit(v.float())), note


def checkpoint_probe(encoder, samples, parts, ckpt, name):
    """The probe of a name in a checkpoint of train.py, on raw embeddings or through the checkpoint's map."""
    state = load_checkpoint(ckpt, encoder)
    load_probe(state, name)  # complains if it is not there
    heads = load_heads(state, encoder.device)
    expect(name in heads, "probe", name, f"of {', '.join(heads)}: the map of others is not in the file")
    part = "val" if name.startswith("val_probe") else "train"
    if part in parts:
        raise Complaint(f"--split={','.join(parts)}: {name} was fitted on the {part} split; take another")
    if state["classes"] != samples.classes:
        raise Complaint(f"--ckpt={ckpt}: made for {state['classes']}, {samples.name} has {samples.classes}")
    return heads[name], f"classifier: probe {name} of {ckpt}"


CLASSIFIERS = {"probe": probe_classifier, "text": text_classifier, "rows": own_rows}


def from_embeddings(name, temperature, seed, device):
    """Evidence from --embeddings: a file, or random:N,D; the classifier is zero-shot by its text_emb."""
    drawn = re.fullmatch("random:([0-9]{1,99}),([0-9]{1,99})", name)
    expect(drawn or not name.startswith("random:"), "embeddings", name, "random:N,D, as random:100000,256")
    a = drawn_regions(int(drawn[1]), int(drawn[2]), seed) if drawn else load_embeddings(name)
    x, count, y, text, z = (a[key].to(device) for key in ARRAYS)
    text, target = unit(text.double()), a.get("region_target")
    if target is not None:
        target = torch.where(target.isnan(), torch.nan, (target > 0.5).float()).to(device)
    names = a.get("class_names") or [str(c) for c in range(len(text))]
    given = dict(name=name, classes=names, y=y, count=count, target=target, notes=a.get("notes", []))
    given.update(box=torch.zeros(len(x), 4), pictures=None, encoder=None)
    return evidence(x, z, lambda v: unit(v.double()) @ text.T / temperature, **given)


ARRAYS = "reg_emb", "num_regions", "true_label", "text_emb", "img_emb"


def drawn_regions(n, D, seed=0, C=10, per=4):
    """The arrays of --embeddings for n regions of D dimensions with a planted spurious feature: images of
    `per` regions, one shows the class's object, the rest one of 12 grounds, or, in every second image, the
    feature, which pulls its image toward class 0. For benchmarks and tests."""
    wanted = f"at least {per * C} regions and 2 dimensions, and N x D at most {MOST_NUMBERS:,}"
    expect(n >= per * C and D >= 2 and n * D <= MOST_NUMBERS, "embeddings", f"random:{n},{D}", wanted)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return unit(torch.randn(*size, generator=generator))

    def share():
        return torch.rand(images, 1, generator=generator)

    text, grounds = normal(C, D), normal(12, D)
    feature = unit(normal(D) + 0.25 * text[0])
    kinds = torch.cat([text, grounds, feature[None]])
    images, x = n // per, torch.empty(n, D)
    y, has = (torch.randint(high, (images,), generator=generator) for high in (C, 2))
    kind = C + torch.randint(12, (n,), generator=generator)
    first = torch.arange(images) * per
    kind[first], kind[first + 1] = y, torch.where(has == 1, C + 12, kind[first + 1])
    for rows in tiles(n):
        part = kinds[kind[rows]]
        x[rows] = unit(part + 0.8 * normal(*part.shape))
    other = text[torch.randint(C, (images,), generator=generator)]
    z = (0.2 + 0.5 * share()) * text[y] + 0.5 * share() * other + 0.3 * has[:, None] * (feature + text[0])
    z = unit(z + 0.3 * normal(images, D))
    count = torch.full((images,), per)
    count[-1] += n - per * images
    return dict(zip(ARRAYS, (x, count, y, text, z), strict=True), region_target=(kind == C + 12).float())


def load_embeddings(path):
    """The arrays of an .npz for --embeddings as tensors, class_names (a list), region_target and notes."""
    with reading(path, "an .npz file of plain arrays"), np.load(bounded(path)) as file:
        absent = [key for key in ARRAYS if key not in file.files]
        if absent:
            there = ", ".join(file.files)
            raise Complaint(f"{path}: no array {absent[0]!r} (found: {there}); expected {', '.join(ARRAYS)}")
        a = {key: file[key] for key in (*ARRAYS, "region_target", "class_names") if key in file.files}
        check_arrays(path, a)
        names, notes = [str(name) for name in a.pop("class_names", [])], []
        for key in a:
            kind = np.int64 if key in ("num_regions", "true_label") else np.float32
            a[key] = torch.from_numpy(np.ascontiguousarray(a[key], kind))
    for key in ("reg_emb", "img_emb", "text_emb") if len(a["reg_emb"]) else ():
        norm = torch.cat([a[key][rows].norm(dim=1) for rows in tiles(len(a[key]))])
        odd = (~norm.isfinite() | (norm == 0)).nonzero()[:, 0].tolist()
        if odd and key != "reg_emb":  # those of regions are found when they are normalised
            raise Complaint(f"{path}: {key} has a row that is zero or not finite (row {odd[0]})")
        if (norm - 1).abs().max() > 1e-3:
            notes.append(f"{path}: {key} is not unit-norm ({norm.min():.3g} to {norm.max():.3g}); normalised")
    return dict(a, class_names=names, notes=notes)


def check_arrays(path, a):
    """Complaint where shapes or numbers of the arrays of --embeddings do not fit."""
    shapes = ", ".join(f"{key} {list(v.shape)}" for key, v in a.items())

    def demand(holds, wanted):
        if not holds:
            raise Complaint(f"{path}: {shapes}; expected {wanted}")

    x, count, y, text, z = (a[key] for key in ARRAYS)
    one_width = x.ndim == text.ndim == z.ndim == 2 and x.shape[1] == text.shape[1] == z.shape[1] > 0
    demand(one_width and len(text), "reg_emb [N, D], text_emb [C, D], img_emb [n, D] with one D")
    numbers = all(v.ndim == 1 and v.dtype.kind in "iu" and len(v) == len(z) for v in (count, y))
    demand(numbers, "num_regions and true_label as whole numbers [n], one for each row of img_emb")
    fits = count.sum() == len(x) and (count >= 0).all()
    demand(fits, f"num_regions that add up to the rows of reg_emb, found sum {count.sum()}")
    low, high, C = y.min(initial=0), y.max(initial=0), len(text)
    demand(0 <= low <= high < C, f"true_label from 0 to {C - 1}, {C} classes, found {low} to {high}")
    demand(a.get("region_target", x[:, 0]).shape == (len(x),), f"region_target [{len(x)}]")
    if "class_names" in a:
        names = a["class_names"].tolist()
        demand(len(names) == C == len(set(names)), f"{C} different class_names, found {names[:12]}")


# ----------------------------------------------------------------------------------------------------------
# step 1: clusters

Clustering = namedtuple("Clustering", "silhouette labels medoids")  # mean, [N], numbers of regions [k]


def k_range(low, high, C, n, clustering):
    """The values of k: low to high - 1, or 2C to 5C - 1; in fast at most 40, evenly spread in ratio."""
    low, high = (low, high) if high else (2 * C, 5 * C)
    ks = range(low, min(high, n))
    if high > n:
        used = f"; up to {n - 1} is used" if ks else ""
        say(f"k: {low} to {high - 1} wanted, but there are {n} regions{used}")
    if not ks:
        raise Complaint(f"--k: {low} clusters of {n} regions; give finer --regions or --k=2:{max(3, n)}")
    if ks[-1] * n > MOST_NUMBERS:
        raise Complaint(f"--k: {ks[-1]} clusters times {n} regions, expected at most {MOST_NUMBERS:,}")
    if clustering == "ravl" or len(ks) <= 40:
        return list(ks)
    say(f"k: {len(ks)} values from {ks[0]} to {ks[-1]}; 40 of them are tried, evenly spread in ratio")
    return sorted({round(ks[0] * (ks[-1] / ks[0]) ** (i / 39)) for i in range(40)})


def less_mean(x):
    """Takes the mean off unit-norm x [N, D] if they lie in a cone (CONE), and normalises again, in place.
    Returns what was taken off, [D], zeros for nothing."""
    mean = sum(x[rows].double().sum(0) for rows in tiles(len(x))) / len(x)
    if mean.square().sum() <= CONE:  # |mean|^2 is the mean cosine
        return torch.zeros_like(x[0])
    mean = mean.float()
    for rows in tiles(len(x)):
        part = x[rows] - mean
        x[rows] = torch.where(part.norm(dim=1, keepdim=True) > 1e-6, unit(part), x[rows])
    return mean


class Medoids:
    """K clusters of unit-norm x [N, D] around medoids, in cosine distance, and what moving them needs.

    With s_ci = sum of the cosines of region i to cluster c, medoids and silhouettes are a function of s
    [K, N], and s_ci = S_c . x_i with S_c the sum of the members: O(N K D), and only what changed is computed
    again. index: [K] medoids' rows in x; cosine: [K, N] to each medoid; size: [K]; label: [N].
    Memory: x 4 N D bytes, float32 as steps of 1e-6 count; cosine and s 8 N K; labels of each k tried 4 N.
    """

    def __init__(self, x, index):
        K, N = len(index), len(x)
        self.x, self.index, self.label = x, index, torch.full((N,), -1, device=x.device)
        self.cosine, self.s = x.new_empty(K, N), x.new_zeros(K, N)
        self.S, self.size = x.new_zeros(K, x.shape[1], dtype=torch.double), x.new_zeros(K)
        self.products(self.cosine, torch.arange(K, device=x.device), x[index])

    def products(self, out, clusters, v):
        """Cosines of vectors v [c, D] and all regions, into the rows of out [K, N] of these clusters [c]."""
        for rows in tiles(len(self.x)):
            out[clusters, rows] = v @ self.x[rows].T

    def settle(self, most=300):
        """Each region to its nearest medoid, each medoid to the member with the largest sum of cosines to its
        cluster, the first of equals, until nothing moves."""
        for _ in range(most):
            nearest = self.cosine.argmax(0)
            moved = (nearest != self.label).nonzero()[:, 0]  # on a GPU the one wait of a round
            if not len(moved):
                break
            self.products(self.s, *self.move(moved, nearest))
            own = self.s.gather(0, nearest[None])[0]  # [N], to its own cluster
            top = own.new_full((len(self.index),), -math.inf).scatter_reduce_(0, nearest, own, "amax")
            now = self.s.gather(1, self.index[:, None])[:, 0]  # the medoids' own
            better = (top > now + 1e-6 * self.size) & (self.size > 0)
            best = torch.where(own == top[nearest], torch.arange(len(own), device=own.device), len(own))
            first = self.index.scatter_reduce(0, nearest, best, "amin", include_self=False)
            self.index = torch.where(better, first, self.index)
            better = self.those(better)
            if not len(better):
                break
            self.products(self.cosine, better, self.x[self.index[better]])

    def those(self, chosen):
        """Numbers of the clusters chosen, bool [K]. On a GPU all: to compute them again, in the same walk
        over x, costs less than to wait for how many there are."""
        return torch.arange(len(chosen), device=chosen.device) if chosen.is_cuda else chosen.nonzero()[:, 0]

    def move(self, moved, nearest):
        """Regions [m] to their nearest medoids [N]; returns changed clusters [c] and their sums [c, D]."""
        was, now, K = self.label[moved] + 1, nearest[moved], len(self.index)  # was: 0 where there was none
        for some in tiles(len(moved)):
            v = self.x[moved[some]].double()
            self.S += sums(v, now[some], K) - sums(v, was[some], K + 1)[1:]
        self.label, count = nearest, torch.zeros_like(self.index)
        self.size = count.scatter_add_(0, nearest, torch.ones_like(nearest)).float()
        changed = torch.zeros(K + 1, dtype=torch.bool, device=now.device)
        changed = self.those(changed.index_fill_(0, was, True).index_fill_(0, now + 1, True)[1:])
        return changed, self.S[changed].float()

    def drop(self, want):
        """Leaves out the medoids that cost least, a tenth of them at a time, until `want` are left: by how
        much the sum of 1 - d1 / d2 over regions changes, d1 to d3 the distances to their nearest medoids."""
        while len(self.index) > want:
            K = len(self.index)
            gain = self.S.new_zeros(K)
            for rows in tiles(len(self.x)):
                d, which = (1 - self.cosine[:, rows]).topk(min(3, K), dim=0, largest=False)
                d1, d2, d3 = d[[0, 1, -1]].clamp(min=1e-6).double()
                loss = torch.stack([d1 / d2 - d2 / d3, d1 / d2 - d1 / d3])[..., None]  # [2, rows, 1]
                gain += sums(loss.flatten(0, 1), which[:2].flatten(), K)[:, 0]
            kept = gain.argsort(descending=True)[min(K - want, 1 + K // 10) :].sort().values
            new = torch.full((K + 1,), -1, device=kept.device)  # -1, no cluster, stays -1
            new[kept] = torch.arange(len(kept), device=kept.device)
            self.label = new[self.label]
            for name in ("index", "cosine", "s", "S", "size"):
                setattr(self, name, getattr(self, name)[kept])


def kmedoids(x, ks, seed):
    """K-medoids of unit-norm x [N, D] in cosine distance, {k: Clustering}. The largest k of ks starts at
    greedily chosen seeds, each next one from the converged medoids of the one before, less those whose loss
    costs least. x with fewer different rows than k gives fewer clusters."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(x), generator=generator)[: max(4096, 4 * max(ks))].sort().values.to(x.device)
    m, out = Medoids(x, sample[seeds(x[sample], max(ks), generator)]), {}
    for want in bar("clusters", sorted(ks, reverse=True)):
        m.drop(want)
        m.settle()
        parts = [silhouettes(m.s[:, r], m.size, m.label[r]).double().sum() for r in tiles(len(x))]
        out[len(m.index)] = Clustering(float(sum(parts)) / len(x), m.label.int(), m.index.clone())
    return dict(sorted(out.items()))


def seeds(x, K, generator, trials=4):
    """K rows of x [N, D], greedily: of `trials` rows drawn in proportion to their distance from those chosen,
    the one that lowers the sum of distances most. Fewer, if x has fewer different rows."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    distance = (1 - x @ x[chosen[0]]).clamp(min=0)
    distance[distance < 1e-6] = 0
    while len(chosen) < K and distance.sum() > 0:
        tries = torch.multinomial(distance.cpu(), trials, replacement=True, generator=generator)
        after = torch.minimum(distance, (1 - x[tries.to(x.device)] @ x.T).clamp(min=0))  # [trials, N]
        after[after < 1e-6] = 0
        best = int(after.sum(1).argmin())
        chosen.append(int(tries[best]))
        distance = after[best]
    if len(chosen) < 2:
        raise Complaint("the regions' embeddings are all equal; there is nothing to cluster")
    return torch.tensor(chosen, device=x.device)


def silhouettes(s, size, label):
    """From s [k, N], summed cosines (clipped or not) of each region to each cluster, itself included ->
    silhouettes [N], 0 for the only region of a cluster."""
    own = s.gather(0, label[None])[0]
    a = (size[label] - own).clamp(min=0) / (size[label] - 1).clamp(min=1)  # to itself the distance is zero
    means = (s / size.clamp(min=1)[:, None]).masked_fill(size[:, None] == 0, -math.inf)
    b = 1 - means.scatter(0, label[None], -math.inf).amax(0)  # infinite where there is no other cluster
    most = torch.maximum(a, b)
    return torch.where((size[label] > 1) & b.isfinite() & (most > 0), (b - a) / most, 0.0)


def published(x, ks):
    """RaVL's step 1: sklearn_extra's KMedoids (precomputed, alternate, k-medoids++, 300 iterations,
    random_state 0) on clip(1 - x x^T, 0, 1), and scikit-learn's silhouettes, by tiles: the same labels
    without the N x N matrix. x: [N, D]; on the CPU. Returns {k: Clustering}."""
    rows = x.cpu().numpy()
    medoids = {k: published_medoids(rows, k) for k in bar("clusters", ks)}
    labels = {k: torch.from_numpy(distances(rows, m).argmin(0)) for k, m in medoids.items()}
    total, out = dict.fromkeys(ks, 0.0), {}
    for part in bar("silhouettes", tiles(len(rows), 1024)):  # one tile of distances serves all k
        near = 1 - torch.from_numpy(distances(rows, np.arange(part.start, part.stop)))
        for k, label in labels.items():
            hot = F.one_hot(label, k).to(near.dtype)
            total[k] += float(silhouettes((near @ hot).T, hot.sum(0), label[part]).double().sum())
    for k in ks:
        index = torch.from_numpy(medoids[k]).to(x.device)
        out[k] = Clustering(total[k] / len(x), labels[k].to(x.device), index)
    return out


def distances(x, index, others=None):
    """clip(1 - cosine, 0, 1) of rows x[index] and x[others], all if None; exactly 0 of a row to itself."""
    others = np.arange(len(x)) if others is None else others
    tile = np.clip(1 - x[index] @ x[others].T, 0, 1)
    tile[index[:, None] == others] = 0
    return tile


def published_medoids(x, k):
    """The medoids [k] of x, numpy [N, D], as the published procedure finds them."""
    medoids = published_seeds(x, k)
    for _ in range(300):
        label, before = distances(x, medoids).argmin(0), medoids.copy()
        for c in range(k):
            members = np.flatnonzero(label == c)
            if len(members):
                parts = np.array_split(members, len(members) // 2048 + 1)
                cost = np.concatenate([distances(x, part, members).sum(1) for part in parts])
                if cost.min() < cost[np.argmax(members == medoids[c])]:
                    medoids[c] = members[cost.argmin()]
        if (medoids == before).all():
            break
    return medoids


def published_seeds(x, k):
    """k-medoids++ on squared distances, as sklearn_extra draws it from random_state 0: rows of x [k]."""
    state, trials, medoids = np.random.RandomState(0), 2 + int(np.log(k)), np.empty(k, int)
    medoids[0] = state.randint(len(x))
    closest = distances(x, medoids[:1])[0] ** 2
    potential = closest.sum()
    for c in range(1, k):
        drawn = state.random_sample(trials) * potential
        tries = np.searchsorted(np.cumsum(closest, dtype=np.float64), drawn).clip(max=len(x) - 1)
        after = np.minimum(closest, distances(x, tries) ** 2)
        sums = after.sum(1)
        best = int(sums.argmin())
        medoids[c], closest, potential = tries[best], after[best], sums[best]
    return medoids


def given(x, mean):
    """What less_mean made x [N, D] of: the unit vectors mean + t x, t > 0."""
    along = x @ mean
    t = (along.square() + 1 - mean.square().sum()).sqrt() - along
    return mean + t[:, None] * x if mean.any() else x


def on_published_distance(x, label, k, mean, seed):
    """What there is on the published distance, clip(1 - cosine, 0, 1) of the embeddings as they were given:
    silhouette, the mean of all regions up to 10,000, of 1,000 drawn beyond, their distances to all regions
    up to STEP, to so many drawn beyond; silhouette_rows, how many; negative_pairs, the share of pairs that
    are clipped, of all up to 4,000 regions, else of 2,000 drawn."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    pick = order[: len(x) if len(x) <= 10_000 else 1000].sort().values
    others, some, s = order[:STEP].sort().values, given(x[pick], mean), x.new_zeros(k, len(pick))
    for rows in bar("silhouette", tiles(len(others), 1024)):
        near = (given(x[others[rows]], mean) @ some.T).clamp(min=0)  # [rows, pick]
        s += (label[others[rows]] == torch.arange(k, device=x.device)[:, None]).float() @ near
    size = torch.bincount(label[others], minlength=k).float()
    value = silhouettes(s, size, label[pick]).double().mean()
    some = given(x[order[: len(x) if len(x) <= 4000 else 2000]], mean)
    negative = float((some @ some.T < 0).double().sum()) / max(1, len(some) * (len(some) - 1))
    return dict(silhouette=float(value), silhouette_rows=len(pick), negative_pairs=negative)


# ----------------------------------------------------------------------------------------------------------
# step 2: which clusters are spurious?


def identify(label, k, e, criterion):
    """RaVL's step 2 for all clusters at once. label: [N] cluster of each region; e: Evidence.

    gap [C, k]: weight x (accuracy of the images of a class with a region in the cluster - of those without),
    NaN where one side is empty; influence [k]: of the misclassified images of a class that loses by the
    cluster, the share whose region with the highest score for the predicted class lies in it, the largest
    over classes, -inf without any; score [k]: sum of |gap|; chance [k]: what that sum would be on average if
    the feature changed nothing (binomial errors; ours). ranking: kept clusters before others, both
    by their score, of ties the higher number first.

    Ours: q [C, k], of the hypothesis that the errors of a class fall on its images as if the feature were not
    there (loss_p, adjusted). by="loss" keeps what has one of at most FALSE_DISCOVERIES, without asking for a
    class that gains: one that is never wrong cannot. Its score is the sum of the losses alone.
    """
    y, C, right = e.y, len(e.classes), (e.predicted == e.y).double()
    pair = torch.unique(e.image * k + label)  # images and the clusters that they have a region in
    image, cluster = pair // k, pair % k

    def tally(weight):
        return rearrange(sums(weight[:, None], y[image] * k + cluster, C * k), "(c k) 1 -> c k", k=k)

    n_in, right_in = tally(torch.ones_like(right[image])), tally(right[image])
    n_all = torch.bincount(y, minlength=C).double()[:, None]
    right_all = sums(right[:, None], y, C)
    n_out, right_out = n_all - n_in, right_all - right_in
    weight = 2 * torch.minimum(n_in, n_out) / n_all.clamp(min=1)
    factor = weight if criterion.weighted else torch.ones_like(weight)
    acc_in, acc_out = right_in / n_in, right_out / n_out
    one_sided = (n_in == 0) | (n_out == 0)
    gap = (factor * (acc_in - acc_out)).masked_fill(one_sided, torch.nan)
    asked = (right[image] == 0) & (e.count[image] > 1) & (gap[y[image], cluster] < 0)
    looks = asked & (label[e.best.clamp(min=0)][image] == cluster)
    errors = tally(asked.double())
    influence = torch.where(errors > 0, tally(looks.double()) / errors, -math.inf).amax(0)
    p = right_all / n_all.clamp(min=1)
    chance = factor * (2 / math.pi * p * (1 - p) * (1 / n_in + 1 / n_out)).sqrt()
    chance = chance.masked_fill(one_sided, 0).sum(0)
    signs, score = (gap > 0).any(0) & (gap < 0).any(0), gap.abs().nansum(0)
    kept = torch.ones_like(signs)
    if criterion.gaps:
        kept &= signs
    if criterion.influence:
        kept &= influence >= INFLUENCE
    counts = (v.cpu() for v in (n_in - right_in, n_in, n_all - right_all, n_all))  # few, in many small steps
    q = adjusted(loss_p(*counts), ~one_sided.cpu()).to(gap.device)
    if criterion.by == "influence":
        score, chance = influence, torch.full_like(chance, torch.nan)
    elif criterion.by == "loss":
        kept &= (q <= FALSE_DISCOVERIES).any(0)
        score, chance = -gap.clamp(max=0).nansum(0), chance / 2
    parts = dict(gap=gap, weight=weight, acc_in=acc_in, acc_out=acc_out, n_in=n_in, n_out=n_out)
    parts.update(influence=influence, score=score, chance=chance, signs=signs, kept=kept)
    ranking = sorted(descending(score).tolist(), key=lambda c: not kept[c])
    return SimpleNamespace(ranking=ranking, q=q, criterion=criterion, **parts)


def loss_p(wrong_in, n_in, wrong, n):
    """Fisher's exact test, one-sided: the probability that at least wrong_in of the wrong images of a class
    are among the n_in of its n images with a feature, if n_in are drawn blindly. 1 where the share of wrong
    images is no larger with it than without. wrong_in, n_in: [C, k]; wrong, n: [C, 1], double."""
    wrong, n = wrong.expand_as(n_in), n.expand_as(n_in)
    loses = wrong_in * n > wrong * n_in
    t, a, w, n = (v[loses] for v in (wrong_in, n_in, wrong, n))  # those at the mode or above: terms fall

    def choices(n, k):
        return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()

    term, p = (choices(w, t) + choices(n - w, a - t) - choices(n, a)).exp(), torch.zeros_like(t)
    while (term > 1e-17 * p).any():
        p, term = p + term, term * (a - t) * (w - t) / ((t + 1) * (n - w - a + t + 1))
        t = t + 1
    return torch.ones_like(n_in).masked_scatter(loses, p)


def adjusted(p, tested):
    """Benjamini and Hochberg's adjusted p of those tested, bool as p; NaN of others."""
    ordered, order = p[tested].sort()
    q = ordered * len(ordered) / torch.arange(1, len(ordered) + 1, device=p.device)
    q = q.flip(0).cummin(0).values.flip(0).clamp(max=1) if len(q) else q
    return torch.full_like(p, torch.nan).masked_scatter(tested, torch.empty_like(q).scatter(0, order, q))


def why(v, c):
    """Why cluster c was kept, or not. v: what identify returns."""
    gap, influence = v.gap[:, c], float(v.influence[c])
    if v.kept[c]:
        return "kept"
    if gap.isnan().all():
        return "in no image, or in all of a class"
    if v.criterion.by == "loss":
        return f"no loss beyond chance (q {v.q[:, c].nan_to_num(1).min():.2g})"
    if v.criterion.gaps and not v.signs[c]:
        return f"no class does {'worse' if (gap > 0).any() else 'better'} with it"
    if influence == -math.inf:
        return "influence undefined: no class that does worse with it has an error to ask"
    return f"influence {influence:.2f} below {INFLUENCE}"


def stability(sweep, best, verdict, e, criterion):
    """{kept cluster: share of up to 15 values of k, spread over the sweep, at which a kept one shares half
    of its regions (Jaccard >= 0.5)}: a finding that hangs on one k is suspect. Ours, not in the paper."""
    hits, label = dict.fromkeys(verdict.kept.nonzero()[:, 0].tolist(), 0), sweep[best].labels
    ks, at = list(sweep), np.linspace(0, len(sweep) - 1, min(15, len(sweep))).round().astype(int)
    for k in [ks[i] for i in at] if hits else []:
        other = sweep[k].labels.long()
        kept, size = identify(other, k, e, criterion).kept, torch.bincount(other, minlength=k)
        for c in hits:
            shared = torch.bincount(other[label == c], minlength=k)
            half = shared >= 0.5 * (size + shared.sum() - shared)
            hits[c] += bool((half & kept).any())
    return {c: hit / len(at) for c, hit in hits.items()}


def listed(method, ranked):
    """A baseline's list of regions as the one cluster of discovery.json."""
    nothing = dict.fromkeys(("score", "chance", "influence", "stability"))
    cluster = dict(id=0, kept=True, reason=f"ranked list of {method}", gaps={}, n=len(ranked), **nothing)
    first = ranked[:LISTED].tolist()
    return [dict(cluster, medoid=first[0], regions=first)] if first else []


def described(v, medoids, members, stable, classes):
    """The clusters for discovery.json, in their ranking. v: what identify returns."""
    out = []
    for c in v.ranking:
        columns, gaps = [vars(v)[key][:, c].tolist() for key in OF_GAP], {}
        for name, *numbers in zip(classes, *columns, strict=True):
            if not math.isnan(numbers[0]):
                gaps[name] = dict(zip(OF_GAP, numbers, strict=True))
                gaps[name].update(n_in=int(gaps[name]["n_in"]), n_out=int(gaps[name]["n_out"]))
        numbers = {key: float(vars(v)[key][c]) for key in ("score", "chance", "influence")}
        numbers = {key: n if math.isfinite(n) else None for key, n in numbers.items()}
        numbers.update(gaps=gaps, medoid=int(medoids[c]), stability=stable.get(c))
        numbers.update(n=len(members[c]), regions=members[c][:LISTED].tolist())
        out.append(dict(id=c, kept=bool(v.kept[c]), reason=why(v, c), **numbers))
    return out


def precision(ranked, target, K=10):
    """Share of the first K regions of which it is known that show the planted feature; None without any."""
    if target is None:
        return None
    shown = target[torch.as_tensor(ranked, device=target.device).long()]
    shown = shown[~shown.isnan()][:K]
    return float(shown.double().mean()) if len(shown) else None


# ----------------------------------------------------------------------------------------------------------
# baselines: (evidence, seed, l2) -> a ranked list of regions. How the paper fits them to regions is not
# public: our reading


def random(e, seed, l2):
    """Regions in random order."""
    order = rng(seed, "random regions", zlib.crc32(os.fsencode(e.name))).permutation(len(e.x))
    return torch.from_numpy(order).to(e.x.device)


def highest(score, among):
    """Numbers of the regions among [N], by score [N], largest first."""
    index = among.nonzero()[:, 0]
    return index[score[index].argsort(descending=True, stable=True)]


def toward(e, direction, images):
    """Regions of some images, bool [n], by their cosine to a direction [D], largest first."""
    return highest(e.x @ direction.float(), images[e.image])


def failures(e, seed, l2):
    """Distilling failures: in each class a linear classifier of right against wrong images; its regions by
    their score toward wrong, the least accurate class first."""
    wrong, lists = (e.predicted != e.y).long(), []
    errors = {y: float(wrong[e.y == y].double().mean()) for y in torch.unique(e.y).tolist()}
    for y in sorted(errors, key=lambda y: -errors[y]):
        images = e.y == y
        if 0 < errors[y] < 1:
            fitted = fit_probe(e.z[images], wrong[images], l2, classes=2)
            lists.append(toward(e, fitted.weight[:, 1] - fitted.weight[:, 0], images))
    return torch.cat(lists) if lists else random(e, seed, l2)


def george(e, seed, l2):
    """George: the least accurate cluster of image embeddings within a class; regions of its images by cosine
    to its mean less the mean of the class's rest."""
    right, least, worst = (e.predicted == e.y).double(), math.inf, None
    for y in torch.unique(e.y).tolist():
        images = (e.y == y).nonzero()[:, 0]
        z = e.z[images]
        if len(z) < 4 or (1 - z @ z.mean(0)).max() < 1e-5:  # too few, or all alike
            continue
        sweep = kmedoids(z, range(2, min(10, len(z))), seed)
        label = max(sweep.values(), key=lambda c: c.silhouette).labels
        for c in torch.unique(label).tolist():
            accuracy = float(right[images[label == c]].mean())
            if accuracy < least and (label != c).any():
                least, worst = accuracy, (images[label == c], images[label != c])
    if worst is None:
        return random(e, seed, l2)
    group, rest = worst
    images = torch.zeros_like(right, dtype=torch.bool).index_fill_(0, group, True)
    return toward(e, e.z[group].mean(0) - e.z[rest].mean(0), images)


def domino(e, seed, l2, slices=25, dims=128):
    """Domino (Eyuboglu et al. 2022): a mixture over images; the slice with the largest max(p(predicted) -
    p(label)); regions of its images by cosine to the slice's mean less the global mean."""
    z = e.z.double()
    v = z - z.mean(0)
    v = v @ torch.linalg.eigh(v.T @ v).eigenvectors[:, -dims:]  # PCA, not scaled
    R, excess = mixture(v, e.y, e.scores, slices, seed)
    of = R.argmax(1)
    excess[torch.bincount(of, minlength=slices) == 0] = -math.inf
    worst = int(excess.argmax())
    return toward(e, R[:, worst] @ z / R[:, worst].sum() - z.mean(0), of == worst)


def mixture(v, y, scores, slices, seed, steps=100):
    """Gaussians (diagonal, 1e-6 added) x categorical label x categorical prediction (soft), by EM until the
    mean log-likelihood moves by less than 1e-3, as Domino's released package. It starts from the cells of the
    confusion matrix, each for several slices; if there are more, from the most frequent (our reading).

    v: [n, d]; y: [n]; scores: [n, C]. Returns responsibilities [n, slices], max(p(predicted) - p(label)).
    """
    C = scores.shape[1]
    soft, cells = scores.double(), torch.arange(C * C, device=v.device)
    hot = (y[:, None] == cells[:C]).double()
    if C * C > slices:
        cells = torch.bincount(y * C + soft.argmax(1), minlength=C * C).topk(slices).indices
    cells = cells.repeat(slices)[:slices]
    R = hot[:, cells // C] * soft[:, cells % C]  # [n, slices]
    noise = torch.rand(R.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    R = R / R.sum(1, keepdim=True).clamp(min=1e-12) + 1e-3 * noise.to(v.device)
    R, before = R / R.sum(1, keepdim=True), -math.inf
    for _ in range(steps):
        n = R.sum(0) + 1e-14
        mean = R.T @ v / n[:, None]
        var = (R.T @ v.square() / n[:, None] - mean.square()).clamp(min=0) + 1e-6
        p_y, p_p = (R.T @ h / n[:, None] for h in (hot, soft))  # [slices, C]
        square = v.square() @ (1 / var).T - 2 * v @ (mean / var).T + (mean.square() / var).sum(1)
        log_p = -0.5 * (square + var.log().sum(1) + v.shape[1] * math.log(2 * math.pi))
        for h, p in ((hot, p_y), (soft, p_p)):
            log_p += (h @ p.T).clamp(min=1e-300).log()
        log_p += (n / n.sum()).log()
        likelihood, R = float(log_p.logsumexp(1).mean()), log_p.softmax(1)
        if abs(likelihood - before) < 1e-3:
            break
        before = likelihood
    return R, (p_p - p_y).amax(1)


def spurious_aware(e, seed, l2):
    """All regions of misclassified images by their score for the class that was wrongly predicted."""
    return highest(e.own, (e.predicted != e.y)[e.image])


BASELINES = {
    "random": random,
    "failures": failures,
    "george": george,
    "domino": domino,
    "spurious_aware": spurious_aware,
}


# ----------------------------------------------------------------------------------------------------------
# what is shown


def verdict_line(kept, method):
    """How many clusters the rule keeps, and how many it would hardly keep by chance (ours)."""
    if not kept:
        return "No spurious feature was found. The nearest candidates"
    ours = f"as a class loses by it (false discovery rate {FALSE_DISCOVERIES})"
    rule = ours if method == "loss" else "by the paper's rule"
    features = f"{len(kept)} cluster{'s' * (len(kept) > 1)} kept {rule}"
    if all(c["chance"] is None for c in kept):
        return f"{features}; how many chance would keep is not known"
    return f"{features}, {len(clear(kept))} with a score above twice that of chance"


def dropped(clusters):
    """Where none is kept, a line about the best cluster that was dropped because no class gains by it."""
    lost = [c for c in clusters if c["score"] and c["reason"].startswith("no class does better")]
    if any(c["kept"] for c in clusters) or not lost:
        return ""
    c = max(lost, key=lambda c: c["score"])
    q = min(g["q"] for g in c["gaps"].values())
    line = f"Cluster {c['id']}, score {c['score']:.2f} (by chance {c['chance']:.2f}), {gains(c, -1)}, was "
    line += "dropped as no class does better with it; one that is always right cannot. --method=loss asks "
    return line + f"for a loss with q up to {FALSE_DISCOVERIES}; here q is {q:.2g}."


def clear(kept):
    return [c for c in kept if c["chance"] is not None and (c["score"] or 0) > 2 * c["chance"]]


GAIN = "{name} {gap:+.2f} ({acc_in:.2f} of {n_in} with, {acc_out:.2f} of {n_out} without)"


def gains(cluster, sign, most=2, line=GAIN):
    """The classes that gain (1) or lose (-1) most by a cluster, with their accuracies; or nothing."""
    gaps = sorted(cluster["gaps"].items(), key=lambda gap: -sign * gap[1]["gap"])[:most]
    return ", ".join(line.format(name=name, **g) for name, g in gaps if sign * g["gap"] > 0)


def console(summary, e):
    """The tables on the console."""
    config, clusters, N = summary["config"], summary["clusters"], len(e.x)
    kept, rows = [c for c in clusters if c["kept"]], summary["silhouette_rows"]
    head = f"\nk = {summary['k']}, silhouette {summary['silhouette']:.3f} on the published distance"
    head += f" ({rows} regions)" * (rows < N) + "; the mean was taken off first" * summary["mean_removed"]
    head += f"; {'about ' * (N > 4000)}{summary['negative_pairs']:.1%} of the pairs have a negative cosine"
    lines = [head + f", which {'fast does not clip' if config['clustering'] == 'fast' else 'is clipped'}"]
    if config["method"] not in BASELINES:
        lines.append(verdict_line(kept, config["method"]) + ":")
        rows = []
        for c in (kept or sorted(clusters, key=lambda c: -(c["score"] or 0))[:3])[:20]:
            at_10 = precision(c["regions"], e.target)
            reason = "" if c["kept"] else c["reason"]
            tied = [gains(c, sign, 1, "{name:.24} {gap:+.2f}") for sign in (1, -1)]
            tied = "; ".join(filter(None, (reason, *tied)))
            numbers = c["score"], c["chance"], c["influence"], c["n"], c["stability"]
            rows.append((str(c["id"]), *numbers, at_10, tied))
        tied = "most helped, harmed: weighted gap" if kept else "why not; weighted gaps"
        header = ("cluster", "score", "by chance", "influence", "regions", "stability", "P@10", tied)
        lines += filter(None, (table(header, rows), dropped(clusters)))
    if config["method"] == "all" and summary["base_rate"] is not None:
        rows = [(name, m["precision_at_10"]) for name, m in summary["methods"].items()]
        lines.append("\n" + table(("method", "precision_at_10"), rows))
    if summary["base_rate"] is not None:
        at_10 = "-" if summary["precision_at_10"] is None else f"{summary['precision_at_10']:.2f}"
        rate = f"of all regions {summary['base_rate']:.3f} show the target"
        lines.append(f"Precision@10 of the first: {at_10}; {rate}")
    seconds = ", ".join(f"{name} {s:.2f}" for name, s in summary["seconds"].items())
    lines.append(f"seconds: {seconds}; peak memory {summary['peak_gib']:.1f} GiB")
    return "\n".join(lines)


def report(summary, e, similarity, M):
    """The page: each kept cluster's regions as crops and in their images, accuracy with and without it."""
    config, clusters = summary["config"], summary["clusters"]
    kept, sections = [c for c in clusters if c["kept"]], []
    can_read = kept and e.encoder and e.encoder.tokenizer and not e.encoder.untrained
    can_read = can_read and config["method"] not in BASELINES
    words = nearest_words(e.encoder, M, summary["mean_removed"]) if can_read else {}
    for place, c in enumerate(kept[:PICTURED] or clusters[:3], 1):
        score = f", score {c['score']:.2f} (by chance {c['chance']:.2f})" if c["chance"] is not None else ""
        parts = cluster_parts(c, words.get(c["id"]), e, similarity)
        sections.append((f"{place}. Cluster {c['id']}{score}", *parts))
    rows = [
        (str(c["id"]), c["reason"], c["score"], c["chance"], c["influence"], c["n"]) for c in clusters[:60]
    ]
    header = ("cluster", "kept?", "score", "by chance", "influence", "regions")
    sections.append(("All clusters", html_table(header, rows)))
    if len(summary["methods"]) > 1 and summary["base_rate"] is not None:
        rows = [(name, m["precision_at_10"]) for name, m in summary["methods"].items()]
        sections.append(("Methods", html_table(("method", "Precision@10"), rows)))
    what = "given embeddings" if config["embeddings"] else config["model"]
    result = verdict_line(kept, config["method"])
    lead = f"{result}, among {summary['k']} clusters of {len(e.x)} regions. {dropped(clusters)}"
    lead = f"A ranking of {len(e.x)} regions." if config["method"] in BASELINES else lead
    if summary["precision_at_10"] is not None:
        rate = f"{summary['base_rate']:.2f} of all regions show the target"
        lead += f" Precision@10 {summary['precision_at_10']:.2f}, {rate}."
    above, title, numbers = clear(kept), "No spurious feature found above chance.", []
    if config["method"] in BASELINES:
        title = f"Regions as {config['method']} ranks them."
    elif above:
        sure = all(min(g["q"] for g in c["gaps"].values()) <= FALSE_DISCOVERIES for c in above)
        title = f"The model {'goes' if sure else 'may go'} by {len(above)} spurious feature"
        title += "s." if len(above) > 1 else "."
        name, g = min(above[0]["gaps"].items(), key=lambda gap: gap[1]["gap"])
        numbers = [(f"{g['acc_out']:.0%}", f"of {name} are right without cluster {above[0]['id']}")]
        numbers.append((f"{g['acc_in']:.0%}", "with it"))
    links = linked("how the classifier was trained", config["ckpt"], "report.html", config["out_dir"])
    about = config, summary["git"], summary["notes"], numbers, links
    return page(f"flock, discover.py: {e.name} by {what}", title, lead, sections, *about)


def nearest_words(encoder, M, mean_removed):
    """For each medoid M [k, D] the six nearest words, {cluster: text}. Embeddings of text and of images lie
    apart: each is compared without its mean."""
    vocabulary = (ASSETS / "words.txt").read_text().splitlines()
    words = encoder.prompts([[f"a photo of a {word}."] for word in vocabulary])
    words, M = unit(words - words.mean(0)), M if mean_removed else unit(M - M.mean(0))
    nearest = (M @ words.T).topk(6).indices.tolist()
    return {c: ", ".join(vocabulary[i] for i in index) for c, index in enumerate(nearest)}


def cluster_parts(c, words, e, similarity):
    """What the page says and shows of a cluster."""
    lead = f"Better with it: {gains(c, 1) or 'no class'}; worse: {gains(c, -1) or 'no class'}. "
    lead += f"Influence {c['influence']:.2f}. " if c["influence"] is not None else ""
    lead += f"Found at {c['stability']:.0%} of the k tried. " if c["stability"] is not None else ""
    lead += "" if c["kept"] else f"Not kept: {c['reason']}."
    parts = [tag("p", lead)] + ([tag("p", f"Nearest words: {words}")] if words else [])
    if e.pictures:
        parts.append(tag("h3", "Its regions, the most typical first, with their cosine to the medoid"))
        crops = {r: Crop(e.pictures[e.image[r]], tuple(e.box[r].tolist())) for r in c["regions"][:10]}
        crops = [thumb(v.image(), f"{similarity[r]:.2f}", 84, f"region {r}") for r, v in crops.items()]
        parts.append(tag("div", *crops, class_="small"))
        parts.append(tag("h3", "In their images"))
        firsts = {}
        for r in c["regions"]:
            firsts.setdefault(int(e.image[r]), r)
        for i, r in list(firsts.items())[:6]:
            caption = f"{e.classes[e.y[i]]}, taken for {e.classes[e.predicted[i]]}"
            parts.append(thumb(outlined(e.pictures[i].image(), e.box[r].tolist()), caption))
    rows = []
    for name, g in sorted(c["gaps"].items(), key=lambda gap: -abs(gap[1]["gap"]))[:8]:
        pairs = (g["acc_out"], g["n_out"]), (g["acc_in"], g["n_in"])
        values = [(accuracy, wilson(accuracy * n, n)) for accuracy, n in pairs]
        rows.append((name, f"n = {g['n_out']}, {g['n_in']}", values))
    chart = rows and dots(f"cluster {c['id']}", rows, ("images without it", "with it"))
    parts += [tag("h3", "Accuracy of the classifier"), chart] if rows else []
    return parts


def outlined(image, box):
    """A picture with a frame around a box of it, in shares."""
    image = opaque(image).copy()
    image.thumbnail((300, 300))
    box = [min(n - 1, round(v * n)) for v, n in zip(box, image.size * 2, strict=True)]
    for colour, width in (("black", 6), ("#ffd23f", 4)):
        ImageDraw.Draw(image).rectangle(box, outline=colour, width=width)
    return image


if __name__ == "__main__":
    run(main, "the same command")
