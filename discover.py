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
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

# first, as it checks the flags before numpy and torch are imported
from data import ASSETS, SPLITS, Complaint, Crop, about_masks, bounded, dots, expect, filled, find_masks
from data import flags, folded, html_table, idle, linked, load_data, load_regions, opaque, page, reading
from data import refuse, region_truth, require, revision, rng, run, say, table, tag, thumb, write
from data import write_json

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import ImageDraw

from kernels.launch import slices
from model import auto_device, bar, fit_probe, join, load_checkpoint, load_encoder, load_heads
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
batch_size = "auto"       # images at a time; auto: 256 on a GPU, fewer if memory asks for it; CPU: 8 to 64
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

LIMITS = {  # the words that a flag may be, or list, those of a table by its name; or its interval
    "split": ["train", "val", "test"],
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
)
MOST_K, MOST_NUMBERS = 20_000, 1 << 32  # of clusters; of numbers in random:N,D and in cosines to clusters
INFLUENCE = 0.25  # clusters below it are not kept, as published
CONE = 0.1  # mean cosine of the regions above which fast takes their mean off: they lie in a cone, and what
# tells them apart is small beside what they share
LISTED = 1000  # regions of a cluster in discovery.json, of its n; the labels of all are in discovery.npz
PICTURED = 6  # kept clusters whose regions the page shows: with more it would weigh more than 2 MB
FALSE_DISCOVERIES = 0.05  # of the clusters that loss keeps, the share that may be chance
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
    config = flags(globals())
    low, high = map(int, k.split(":")) if k else (0, 0)
    expect(not k or 2 <= low < high <= MOST_K, "k", k, f"LOW:HIGH, 2 <= LOW < HIGH <= {MOST_K}, as in 20:50")
    refuse(OF_IMAGES * bool(embeddings), "with --embeddings")
    idle("outside" * (not masks), "without --masks")
    started, (rank, _), e = time.time(), join(device), None
    if not embeddings:
        e = from_images(config)
    elif rank == 0:
        e = from_embeddings(embeddings, temperature, seed, auto_device(device))
    if e is None:
        return  # this process has embedded its share, the first goes on
    for note in e.notes:
        say(note)

    # what baselines rank first; they compare regions as they are
    begun = time.time()
    asked = [name for name in BASELINES if method in (name, "all")]
    ranked = {name: BASELINES[name](e, seed, l2) for name in bar("baselines", asked)}

    # 1. clusters of regions, for each k
    times = [time.time()]
    ks, mean = k_range(low, high, len(e.classes), len(e.x), clustering), torch.zeros_like(e.x[0])
    if clustering == "fast":
        mean = less_mean(e.x)  # taken off in place: from here on e.x are directions from it
        sweep = kmedoids(e.x, ks, seed)
    else:
        sweep = published(e.x, ks)
    best = max(sweep, key=lambda k: sweep[k].silhouette)  # of equal ones the smallest k
    if clustering == "ravl" and sweep[best].silhouette <= 0:
        say("silhouette: not positive for any k; regions do not fall into clusters")
    labels, medoids = sweep[best].labels.long(), sweep[best].medoids
    times.append(time.time())

    # 2. which of them are spurious, by each rule
    verdicts = {name: identify(labels, best, e, criterion) for name, criterion in CRITERIA.items()}
    times.append(time.time())

    # 3. regions, the most typical first
    M = e.x[medoids]  # [k, D]
    similarity = torch.cat([(e.x[rows] * M[labels[rows]]).sum(1) for rows in slices(len(e.x), STEP)])  # [N]
    order = descending(similarity)
    order = order[labels[order].argsort(stable=True)]  # by cluster, within it by cosine to its medoid
    members = order.split(torch.bincount(labels, minlength=best).tolist())
    for name, v in verdicts.items():
        top = v.ranking[0]  # kept, if one is
        ranked[name] = members[top] if v.kept[top] else order[:0]
    if method in BASELINES:
        clusters = listed(method, ranked[method])
    else:
        v = verdicts.get(method, verdicts["ravl"])  # of all that of ravl is shown
        clusters = described(v, medoids, members, stability(sweep, best, v, e), e.classes)
    times.append(time.time())

    # what is written: numbers, arrays for train.py, the page
    summary = summarised(config, e, sweep, best, mean, clusters, ranked)
    seconds = dict(zip(("cluster", "identify", "rank"), np.diff(times).tolist(), strict=True))
    seconds["rank"] += times[0] - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but for macOS
    peak = peak / 2 ** (20 if os.uname().sysname == "Linux" else 30)
    summary.update(seconds=dict(seconds, total=time.time() - started), peak_gib=peak)
    out = Path(out_dir)
    (out / "discovery.json").unlink(missing_ok=True)  # it would be of another run than what comes now
    summary["npz"] = write_arrays(out / "discovery.npz", config, e, labels, M, mean, clusters)
    write(out / "discovery.html", report(summary, e, similarity, M))
    write_json(out / "discovery.json", summary)
    say(console(summary, e), True)
    written = "discovery.json, discovery.npz and discovery.html written"
    say(f"\n{out}/{written}, {time.time() - started:.1f} s", True)


def summarised(config, e, sweep, best, mean, clusters, ranked):
    """The tree of discovery.json, without what it cost. ranked: {method: its regions}."""
    summary = dict(config=config, git=revision(), notes=e.notes, k=best, classes=e.classes, clusters=clusters)
    summary.update(on_published_distance(e.x, sweep[best].labels.long(), best, mean, config["seed"]))
    summary.update(mean_removed=bool(mean.any()), silhouettes={str(k): sweep[k].silhouette for k in sweep})
    summary.update(accuracy=float((e.predicted == e.y).double().mean()))
    summary.update(base_rate=precision(torch.arange(len(e.x)), e.target, len(e.x)))
    methods = {}
    for name, index in ranked.items():
        methods[name] = dict(precision_at_10=precision(index, e.target), top=index[:100].tolist())
    name = "ravl" if config["method"] == "all" else config["method"]
    return dict(summary, precision_at_10=methods[name]["precision_at_10"], methods=methods)


def write_arrays(path, config, e, labels, medoids, mean, clusters):
    """discovery.npz, which train.py's mitigations take clusters from; returns the hash of the file."""
    arrays, buffer = {flag: config[flag] for flag in ("region_encoder", "regions")}, io.BytesIO()
    tensors = dict(medoids=medoids, mean=mean, image=e.image, box=e.box, label=labels)
    arrays.update({name: tensor.cpu().numpy() for name, tensor in tensors.items()})
    arrays.update(kept=np.array([c["id"] for c in clusters if c["kept"]], np.int64), data=e.name)
    arrays.update(paths=[str(getattr(p, "path", "")) for p in e.pictures or [""] * len(e.y)])
    arrays.update(fingerprint=e.encoder.fingerprint if e.encoder else "")
    arrays.update(clipped=config["clustering"] == "ravl")
    np.savez_compressed(buffer, **arrays)
    write(path, buffer.getvalue())
    return sha256(buffer.getvalue())


def from_images(config):
    """Evidence from images; None on ranks of torchrun above 0, which only embed."""
    how = dict(device=device, dtype=dtype, batch=batch_size, threads=threads, cache=cache_dir)
    how.update(skip_bad=skip_bad, resize_once=resize_once)
    encoder = load_encoder(model, pretrained, quick_gelu, test_size, **how)
    facts = {flag: config[flag] for flag in ("confounder", "strength", "spurious", "feature", "columns")}
    expect(not data.startswith("embeddings:"), "data", data, "pictures; or --embeddings=FILE.npz of regions")
    samples = load_data(data, classes, places, prompts, "", False, seed, **facts)
    require((samples.y >= 0).all(), f"{samples.name}: no labels; discovery needs them, a folder a class")
    images, parts = of_splits(samples, split)
    pictures, notes = load_regions(regions, images.items, encoder.frame, skip_bad)
    if encoder.untrained:
        notes.append(f"{model}: its text tower is untrained: no nearest words")
    mask_of = None
    if masks:
        files = [getattr(picture, "path", "") for picture in samples.items]  # whose mask it is hangs on all
        of_file = dict(zip(files, find_masks(files, masks), strict=True))
        mask_of = [of_file[getattr(picture, "path", "")] for picture in images.items]
        notes += about_masks(masks, mask_of)
    logits, line = suspect(encoder, samples, parts, config)
    z, x = region_embeddings(encoder, pictures, region_encoder)
    if z is None:
        return None
    readable, count = z.isfinite().all(1), torch.tensor([len(p.boxes) for p in pictures], device=z.device)
    x, z, count = x[repeat_by(readable, count)], z[readable], count[readable]
    index = readable.nonzero()[:, 0].cpu()
    if len(index) < len(pictures):
        notes.append(f"{len(pictures) - len(index)} of {len(pictures)} images cannot be read; left out")
    images, pictures = images.keep(index), [pictures[i] for i in index]
    if masks:
        mask_of = [mask_of[i] for i in index]
    target = planted(pictures, images.shows, mask_of, outside)
    box = torch.cat([torch.zeros(0, 4), *[torch.tensor(picture.boxes).view(-1, 4) for picture in pictures]])
    notes = [*encoder.notes, *samples.notes, line, *notes]
    facts = samples.name, samples.classes, images.y, count, notes, box, target
    return evidence(x, z, logits, *facts, images.items, encoder)


def of_splits(samples, split):
    """The samples of --split, and which splits it names."""
    parts = [part.strip() for part in split.split(",")]
    images = samples.keep(torch.isin(samples.split, torch.tensor([SPLITS.index(part) for part in parts])))
    if not images.items:
        counts = dict(zip(SPLITS, torch.bincount(samples.split, minlength=3).tolist(), strict=True))
        raise Complaint(f"--split={split}: {samples.name} has no images there ({counts}); take another split")
    return images, parts


def planted(pictures, shows, mask_of, outside):
    """Which regions show the feature, float [N], NaN where it is not known; None of photos without masks, and
    that are not of a controlled setting. mask_of: of each picture; outside: the least share of a region that
    must lie outside its mask."""
    if mask_of is not None:
        shares = [mask_shares(picture, mask) for picture, mask in zip(pictures, mask_of, strict=True)]
        inside = torch.cat([torch.zeros(0), *shares])
        return (inside <= 1 - outside).float().masked_fill(inside.isnan(), torch.nan)
    return region_truth(pictures, shows)[1].float() if all(shows) else None


def descending(score):
    """Numbers by their score [N], largest first, of ties the later first, as published."""
    return len(score) - 1 - score.flip(0).argsort(descending=True, stable=True)


# ----------------------------------------------------------------------------------------------------------
# what is looked at


def evidence(x, z, logits, name, classes, y, count, notes, box, target=None, pictures=None, encoder=None):
    """What steps 2 and 3 ask: n images of C classes, N regions in them, and what a classifier says of both.

    x: [N, D] embeddings of regions, made unit-norm in place; z: [n, D] of images; logits: of embeddings
    [., D] -> [., C]; y: [n] class; count: [n] regions of each image; box: [N, 4] in shares;
    target: [N], whether a region shows the planted feature, NaN where it is not known, or None. Returns all
    of it as a namespace, with predicted [n]; scores [n, C], the probabilities of classes; image [N], that of
    each region; own [N], the region's score for the class that its image is taken for; and best [n], the
    image's region with the largest, the first of equals, -1 without any.
    """
    require(len(y), f"{name}: no images")
    require(len(classes) > 1, f"{name}: one class ({classes[0]}), expected two or more")
    require(len(x), f"{name}: none of its {len(y)} images has a region")
    n, N, y, of_images = len(y), len(x), y.to(x.device), logits(z)
    predicted, scores = of_images.argmax(1), of_images.softmax(1)
    image = repeat_by(torch.arange(n, device=x.device), count)
    region_score = torch.empty(N, dtype=torch.double, device=x.device)
    for rows in slices(N, STEP):
        taken_for = predicted[image[rows], None]
        region_score[rows] = logits(x[rows]).double().softmax(1).gather(1, taken_for)[:, 0]
        norm = x[rows].norm(dim=1, keepdim=True)
        odd = (~norm.isfinite() | (norm == 0))[:, 0].nonzero()[:, 0].tolist()
        if odd:
            what = "not finite" if norm[odd[0]] else "zero"
            raise Complaint(f"{name}: region {rows.start + odd[0]} is {what}; leave it out, check the model")
        x[rows] /= norm
    top = region_score.new_full((n,), -math.inf).scatter_reduce_(0, image, region_score, "amax")
    ties = (region_score == top[image]).nonzero()[:, 0]
    best = torch.full_like(y, -1).scatter_reduce_(0, image[ties], ties, "amin", include_self=False)
    listing, right = ", ".join(classes[:6]) + ", ..." * (len(classes) > 6), (predicted == y).double()
    notes = [*notes, f"{N} regions of {n} images, classes {listing}; accuracy {float(right.mean()):.3f}"]
    if not count.all():
        notes.append(f"{int((count == 0).sum())} of {n} images have no region, so not the feature either")
    if right.all():
        notes.append(f"the classifier is right on all {n} images: without errors nothing can be found")
    if (y == y[0]).all():
        notes.append(f"all images are of one class ({classes[int(y[0])]}): what harms another cannot show")
    e = SimpleNamespace(name=name, classes=classes, x=x, z=unit(z.float()), y=y, count=count, notes=notes)
    e.predicted, e.scores, e.image, e.own, e.best = predicted, scores, image, region_score, best
    e.box, e.target, e.pictures, e.encoder = box, target, pictures, encoder
    if target is not None:
        e.target = target.to(x.device)
    return e


def suspect(encoder, samples, parts, config):
    """The classifier, embeddings [N, D] -> logits [N, C], and a line about it. parts: splits looked at."""
    kind, ckpt = config["classifier"], config["ckpt"]
    expect(not ckpt or kind in ("auto", "probe"), "ckpt", ckpt, f"none with --classifier={kind}")
    expect(ckpt or config["probe"] == "erm", "probe", config["probe"], "erm, or --ckpt=FILE of train.py")
    if kind == "auto":
        texts = encoder.tokenizer and not samples.nameless
        there = dict(probe=ckpt, text=texts, rows=len(samples.classes) == 1000)
        kind = next((name for name, able in there.items() if able), "probe")
    idle("prompts temperature" * (kind != "text"), f"with --classifier={kind}")
    return CLASSIFIERS[kind](encoder, samples, parts, config)


def text_classifier(encoder, samples, parts, config):
    """Cosines with text embeddings of the classes."""
    text, temperature = encoder.prompts(samples.class_prompts(), samples.classes), config["temperature"]
    note = f"classifier: text embeddings, {samples.prompt_line()}"
    return lambda v: unit(v.float()) @ text.T / temperature, note


def own_rows(encoder, samples, parts, config):
    """The model's own classifier."""
    weight, bias = encoder.classifier()
    C = len(samples.classes)
    require(len(weight) == C, f"--classifier=rows: {len(weight)} classes, expected the {C} here")
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
    heads = load_heads(state, encoder.device)
    expect(name in heads, "probe", name, f"of {', '.join(heads)}: the file has no other, or not its map")
    part = "val" if name.startswith("val_probe") else "train"
    if part in parts:
        raise Complaint(f"--split={','.join(parts)}: {name} was fitted on the {part} split; take another")
    made, here = ([*map(folded, classes)] for classes in (state["classes"], samples.classes))
    if sorted(made) != sorted(here):
        raise Complaint(f"--ckpt={ckpt}: made for {state['classes']}, {samples.name} has {samples.classes}")
    order = [made.index(c) for c in here]
    return lambda v: heads[name](v)[:, order], f"classifier: probe {name} of {ckpt}"


CLASSIFIERS = {"probe": probe_classifier, "text": text_classifier, "rows": own_rows}


def from_embeddings(name, temperature, seed, device):
    """Evidence from --embeddings: a file, or random:N,D; the classifier is zero-shot by its text_emb."""
    drawn = re.fullmatch("random:([0-9]{1,99}),([0-9]{1,99})", name)
    expect(drawn or not name.startswith("random:"), "embeddings", name, "random:N,D, as random:100000,256")
    a = drawn_regions(int(drawn[1]), int(drawn[2]), seed) if drawn else load_embeddings(name)
    x, count, y, text, z = (a[key].to(device) for key in ARRAYS)
    text, target = unit(text.double()), a.get("region_target")
    if target is not None:
        target = torch.where(target.isnan(), torch.nan, (target > 0.5).float())
    names = a.get("class_names") or [str(c) for c in range(len(text))]
    facts = name, names, y, count, a.get("notes", []), torch.zeros(len(x), 4), target
    return evidence(x, z, lambda v: unit(v.double()) @ text.T / temperature, *facts)


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

    text, grounds = normal(C, D), normal(12, D)
    feature = unit(normal(D) + 0.25 * text[0])
    kinds = torch.cat([text, grounds, feature[None]])
    images, x = n // per, torch.empty(n, D)
    y, has = (torch.randint(high, (images,), generator=generator) for high in (C, 2))
    kind = C + torch.randint(12, (n,), generator=generator)
    start = torch.arange(images) * per  # an image's first region is its object, its second the feature
    kind[start], kind[start + 1] = y, torch.where(has == 1, C + 12, kind[start + 1])
    for rows in slices(n, STEP):
        part = kinds[kind[rows]]
        x[rows] = unit(part + 0.8 * normal(*part.shape))
    other = text[torch.randint(C, (images,), generator=generator)]
    pull, blend = torch.rand(2, images, 1, generator=generator)
    z = (0.2 + 0.5 * pull) * text[y] + 0.5 * blend * other + 0.3 * has[:, None] * (feature + text[0])
    z = unit(z + 0.3 * normal(images, D))
    count = torch.full((images,), per)
    count[-1] += n - per * images
    return dict(zip(ARRAYS, (x, count, y, text, z), strict=True), region_target=(kind == C + 12).float())


def load_embeddings(path):
    """The arrays of an .npz for --embeddings as tensors, class_names (a list), region_target and notes."""
    with reading(path, "an .npz file of plain arrays"), np.load(bounded(path)) as file:
        for key in ARRAYS:
            there = f"found: {', '.join(file.files)}"
            require(key in file.files, f"{path}: no array {key!r} ({there}); expected {', '.join(ARRAYS)}")
        a = {key: file[key] for key in (*ARRAYS, "region_target", "class_names") if key in file.files}
        check_arrays(path, a)
        names, notes = a.pop("class_names", np.array([])).astype(str).tolist(), []
        for key in a:
            kind = np.int64 if key in ("num_regions", "true_label") else np.float32
            a[key] = torch.from_numpy(np.ascontiguousarray(a[key], kind))
    for key in ("reg_emb", "img_emb", "text_emb") if len(a["reg_emb"]) else ():
        norm = torch.cat([a[key][rows].norm(dim=1) for rows in slices(len(a[key]), STEP)])
        odd = (~norm.isfinite() | (norm == 0)).nonzero()[:, 0].tolist()
        if odd and key != "reg_emb":  # those of regions are found when they are normalised
            raise Complaint(f"{path}: {key} has a row that is zero or not finite (row {odd[0]})")
        if (norm - 1).abs().max() > 1e-3:
            notes.append(f"{path}: {key} is not unit-norm ({norm.min():.3g} to {norm.max():.3g}); normalised")
    return dict(a, class_names=names, notes=notes)


def check_arrays(path, a):
    """Complaint where shapes or numbers of the arrays of --embeddings do not fit."""
    wrong = f"{path}: {', '.join(f'{key} {list(v.shape)}' for key, v in a.items())}; expected"
    x, count, y, text, z = (a[key] for key in ARRAYS)
    one_width = x.ndim == text.ndim == z.ndim == 2 and x.shape[1] == text.shape[1] == z.shape[1] > 0
    require(one_width and len(text), f"{wrong} reg_emb [N, D], text_emb [C, D], img_emb [n, D] with one D")
    numbers = all(v.ndim == 1 and v.dtype.kind in "iu" and len(v) == len(z) for v in (count, y))
    require(numbers, f"{wrong} num_regions and true_label as whole numbers [n], one a row of img_emb")
    fits = count.sum() == len(x) and (count >= 0).all()
    require(fits, f"{wrong} num_regions that add up to the rows of reg_emb, found sum {count.sum()}")
    low, high, C = y.min(initial=0), y.max(initial=0), len(text)
    of_classes = f"{wrong} true_label from 0 to {C - 1}, {C} classes, found {low} to {high}"
    require(0 <= low <= high < C, of_classes)
    require(a.get("region_target", x[:, 0]).shape == (len(x),), f"{wrong} region_target [{len(x)}]")
    if "class_names" in a:
        names = a["class_names"].tolist()
        require(len(names) == C == len({*names}), f"{wrong} {C} different class_names, found {names[:12]}")


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
    require(ks, f"--k: {low} clusters of {n} regions; give finer --regions or --k=2:{max(3, n)}")
    if ks[-1] * n > MOST_NUMBERS:
        raise Complaint(f"--k: {ks[-1]} clusters times {n} regions, expected at most {MOST_NUMBERS:,}")
    if clustering == "ravl" or len(ks) <= 40:
        return list(ks)
    say(f"k: {len(ks)} values from {ks[0]} to {ks[-1]}; 40 of them are tried, evenly spread in ratio")
    return sorted({round(ks[0] * (ks[-1] / ks[0]) ** (i / 39)) for i in range(40)})


def less_mean(x):
    """Takes the mean off unit-norm x [N, D] if they lie in a cone (CONE), and normalises again, in place.
    Returns what was taken off, [D], zeros for nothing."""
    mean = sum(x[rows].double().sum(0) for rows in slices(len(x), STEP)) / len(x)
    if mean.square().sum() <= CONE:  # |mean|^2 is the mean cosine
        return torch.zeros_like(x[0])
    mean = mean.float()
    for rows in slices(len(x), STEP):
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
        for rows in slices(len(self.x), STEP):
            out[clusters, rows] = v @ self.x[rows].T

    def numbers(self, changed):
        """Numbers [c] of the clusters that changed, bool [K]. On a GPU all: to compute them again, in the
        same walk over x, costs less than to wait for how many there are."""
        if changed.is_cuda:
            return torch.arange(len(changed), device=changed.device)
        return changed.nonzero()[:, 0]

    def settle(self, rounds=300):
        """Assigns regions and updates medoids in turn, until nothing moves."""
        for _ in range(rounds):
            if not (self.assign() and self.update()):
                break

    def assign(self):
        """Each region to its nearest medoid. Returns whether one moved."""
        nearest, K = self.cosine.argmax(0), len(self.index)
        moved = (nearest != self.label).nonzero()[:, 0]  # on a GPU the one wait of a round
        if not len(moved):
            return False
        before, after = self.label[moved] + 1, nearest[moved] + 1  # [m]; 0, no cluster: none before
        for part in slices(len(moved), STEP):
            v = self.x[moved[part]].double()
            self.S += sums(v, after[part] - 1, K) - sums(v, before[part], K + 1)[1:]
        self.label, count = nearest, torch.zeros_like(self.index)
        self.size = count.scatter_add_(0, nearest, torch.ones_like(nearest)).float()
        changed = torch.zeros(K + 1, dtype=torch.bool, device=nearest.device)
        changed = self.numbers(changed.index_fill_(0, before, True).index_fill_(0, after, True)[1:])
        self.products(self.s, changed, self.S[changed].float())
        return True

    def update(self):
        """Each medoid to the member with the largest sum of cosines to its cluster, the first of equals.
        Returns whether one moved; on a GPU always True, see numbers: there assign ends the rounds."""
        s = self.s.gather(0, self.label[None])[0]  # [N], of each region to its own cluster
        top = s.new_full((len(self.index),), -math.inf).scatter_reduce_(0, self.label, s, "amax")
        s_medoid = self.s.gather(1, self.index[:, None])[:, 0]  # [K]
        better = (top > s_medoid + 1e-6 * self.size) & (self.size > 0)  # or rounding moves it for ever
        best = torch.where(s == top[self.label], torch.arange(len(s), device=s.device), len(s))
        best = self.index.scatter_reduce(0, self.label, best, "amin", include_self=False)
        self.index = torch.where(better, best, self.index)
        changed = self.numbers(better)
        self.products(self.cosine, changed, self.x[self.index[changed]])
        return len(changed) > 0

    def drop(self, want):
        """Leaves out the medoids that cost least, a tenth of them at a time, until `want` are left: by how
        much the sum of 1 - d1 / d2 over regions, the medoid silhouette, changes, d1 to d3 the distances to
        their nearest medoids (the removal of FasterMSC, Lenssen and Schubert 2022)."""
        while len(self.index) > want:
            K = len(self.index)
            gain = self.S.new_zeros(K)
            for rows in slices(len(self.x), STEP):
                d, which = (1 - self.cosine[:, rows]).topk(min(3, K), dim=0, largest=False)
                d1, d2, d3 = d[[0, 1, -1]].clamp(min=1e-6).double()
                # without its nearest medoid a region has d2 and d3, without its second d1 and d3
                change = torch.stack([d1 / d2 - d2 / d3, d1 / d2 - d1 / d3])[..., None]  # [2, rows, 1]
                gain += sums(change.flatten(0, 1), which[:2].flatten(), K)[:, 0]
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
    for k in bar("clusters", sorted(ks, reverse=True)):
        m.drop(k)
        m.settle()
        total = sum(silhouettes(m.s[:, r], m.size, m.label[r]).double().sum() for r in slices(len(x), STEP))
        out[len(m.index)] = Clustering(float(total) / len(x), m.label.int(), m.index.clone())
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
    require(len(chosen) > 1, "the regions' embeddings are all equal; there is nothing to cluster")
    return torch.tensor(chosen, device=x.device)


def silhouettes(s, size, label):
    """From s [k, N], summed cosines (clipped or not) of each region to each cluster, itself included ->
    silhouettes [N], 0 for the only region of a cluster."""
    within = size[label] - s.gather(0, label[None])[0]
    a = within.clamp(min=0) / (size[label] - 1).clamp(min=1)  # to itself the distance is zero
    means = (s / size.clamp(min=1)[:, None]).masked_fill(size[:, None] == 0, -math.inf)
    b = 1 - means.scatter(0, label[None], -math.inf).amax(0)  # infinite where there is no other cluster
    larger = torch.maximum(a, b)
    return torch.where((size[label] > 1) & b.isfinite() & (larger > 0), (b - a) / larger, 0.0)


def published(x, ks):
    """RaVL's step 1: sklearn_extra's KMedoids (precomputed, alternate, k-medoids++, 300 iterations,
    random_state 0) on clip(1 - x x^T, 0, 1), and scikit-learn's silhouettes, by tiles: the same labels
    without the N x N matrix. x: [N, D]; on the CPU. Returns {k: Clustering}."""
    rows = x.cpu().numpy()
    medoids = {k: published_medoids(rows, k) for k in bar("clusters", ks)}
    labels = {k: torch.from_numpy(distances(rows, medoids[k]).argmin(0)) for k in ks}
    total = dict.fromkeys(ks, 0.0)
    for part in bar("silhouettes", slices(len(rows), 1024)):  # one tile of distances serves all k
        near = 1 - torch.from_numpy(distances(rows, np.arange(part.start, part.stop)))
        for k, label in labels.items():
            hot = F.one_hot(label, k).to(near.dtype)
            total[k] += float(silhouettes((near @ hot).T, hot.sum(0), label[part]).double().sum())
    medoids = {k: torch.from_numpy(index).to(x.device) for k, index in medoids.items()}
    return {k: Clustering(total[k] / len(x), labels[k].to(x.device), medoids[k]) for k in ks}


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
    order, N = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device), len(x)
    index = order[: N if N <= 10_000 else 1000].sort().values
    others, v, s = order[:STEP].sort().values, given(x[index], mean), x.new_zeros(k, len(index))
    for rows in bar("silhouette", slices(len(others), 1024)):
        near = (given(x[others[rows]], mean) @ v.T).clamp(min=0)  # [rows, index]
        s += (label[others[rows]] == torch.arange(k, device=x.device)[:, None]).float() @ near
    size = torch.bincount(label[others], minlength=k).float()
    silhouette = float(silhouettes(s, size, label[index]).double().mean())
    v = given(x[order[: N if N <= 4000 else 2000]], mean)
    negative = float((v @ v.T < 0).double().sum()) / max(1, len(v) * (len(v) - 1))
    return dict(silhouette=silhouette, silhouette_rows=len(index), negative_pairs=negative)


# ----------------------------------------------------------------------------------------------------------
# step 2: which clusters are spurious?


def identify(label, k, e, criterion):
    """RaVL's step 2 for all clusters at once. label: [N] cluster of each region; e: what evidence returns.

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

    def tally(values):  # of pairs [P] -> [C, k]
        return rearrange(sums(values[:, None], y[image] * k + cluster, C * k), "(c k) 1 -> c k", k=k)

    # how much better a class does with the cluster than without
    n, n_right = torch.bincount(y, minlength=C).double()[:, None], sums(right[:, None], y, C)  # [C, 1]
    n_in, right_in = tally(torch.ones_like(right[image])), tally(right[image])
    n_out = n - n_in
    acc_in, acc_out = right_in / n_in, (n_right - right_in) / n_out
    one_sided = (n_in == 0) | (n_out == 0)
    weight = 2 * torch.minimum(n_in, n_out) / n.clamp(min=1)  # a gap of a few images counts little
    factor = weight if criterion.weighted else torch.ones_like(weight)
    gap = (factor * (acc_in - acc_out)).masked_fill(one_sided, torch.nan)
    signs, score = (gap > 0).any(0) & (gap < 0).any(0), gap.abs().nansum(0)

    # whether the images that are wrong look at it; one with a single region has no other to look at
    asked = (right[image] == 0) & (e.count[image] > 1) & (gap[y[image], cluster] < 0)
    looks = asked & (label[e.best.clamp(min=0)][image] == cluster)
    errors = tally(asked.double())
    influence = torch.where(errors > 0, tally(looks.double()) / errors, -math.inf).amax(0)

    # what chance would give: the mean of |gap| is sqrt(2 / pi) of its standard deviation
    p = n_right / n.clamp(min=1)
    chance = factor * (2 / math.pi * p * (1 - p) * (1 / n_in + 1 / n_out)).sqrt()
    chance = chance.masked_fill(one_sided, 0).sum(0)
    counts = (v.cpu() for v in (n_in - right_in, n_in, n - n_right, n))  # few, in many small steps
    q = adjusted(loss_p(*counts), ~one_sided.cpu()).to(gap.device)

    kept = torch.ones_like(signs)
    if criterion.gaps:
        kept &= signs
    if criterion.influence:
        kept &= influence >= INFLUENCE
    if criterion.by == "influence":
        score, chance = influence, torch.full_like(chance, torch.nan)
    elif criterion.by == "loss":
        kept &= (q <= FALSE_DISCOVERIES).any(0)
        score, chance = -gap.clamp(max=0).nansum(0), chance / 2
    order = descending(score)
    ranking = order[kept[order]].tolist() + order[~kept[order]].tolist()
    of_gap = dict(gap=gap, weight=weight, acc_in=acc_in, acc_out=acc_out, n_in=n_in, n_out=n_out, q=q)
    of_cluster = dict(influence=influence, score=score, chance=chance, signs=signs, kept=kept)
    return SimpleNamespace(ranking=ranking, criterion=criterion, of_gap=of_gap, gap=gap, q=q, **of_cluster)


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


def stability(sweep, best, verdict, e):
    """{kept cluster: share of up to 15 values of k, spread over the sweep, at which a kept one shares half
    of its regions (Jaccard >= 0.5)}: what hangs on one k is suspect. Ours, not in the paper."""
    hits, label = dict.fromkeys(verdict.kept.nonzero()[:, 0].tolist(), 0), sweep[best].labels
    tried = np.linspace(0, len(sweep) - 1, min(15, len(sweep))).round().astype(int)
    for k in np.array([*sweep])[tried].tolist() if hits else ():
        other = sweep[k].labels.long()
        kept, size = identify(other, k, e, verdict.criterion).kept, torch.bincount(other, minlength=k)
        for c in hits:
            shared = torch.bincount(other[label == c], minlength=k)
            half = shared >= 0.5 * (size + shared.sum() - shared)
            hits[c] += bool((half & kept).any())
    return {c: count / len(tried) for c, count in hits.items()}


def listed(method, ranked):
    """A baseline's list of regions as the one cluster of discovery.json."""
    if not len(ranked):
        return []
    regions = ranked[:LISTED].tolist()
    cluster = dict(id=0, kept=True, reason=f"ranked list of {method}", gaps={}, n=len(ranked))
    nothing = dict.fromkeys(("score", "chance", "influence", "stability"))
    return [dict(cluster, **nothing, medoid=regions[0], regions=regions)]


def described(v, medoids, members, stable, classes):
    """The clusters for discovery.json, in their ranking. v: what identify returns."""
    out, of_gap = [], {key: values.tolist() for key, values in v.of_gap.items()}
    for c in v.ranking:
        cluster, gaps = dict(id=c, kept=bool(v.kept[c]), reason=why(v, c)), {}
        for y in (~v.gap[:, c].isnan()).nonzero()[:, 0].tolist():
            gap = {key: rows[y][c] for key, rows in of_gap.items()}
            gaps[classes[y]] = dict(gap, n_in=int(gap["n_in"]), n_out=int(gap["n_out"]))
        for key in ("score", "chance", "influence"):
            value = float(vars(v)[key][c])
            cluster[key] = value if math.isfinite(value) else None
        cluster.update(gaps=gaps, medoid=int(medoids[c]), stability=stable.get(c))
        cluster.update(n=len(members[c]), regions=members[c][:LISTED].tolist())
        out.append(cluster)
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
    """Distilling failures: regions by a linear classifier of right against wrong images of their class,
    their score toward wrong, the least accurate class first."""
    wrong, lists = (e.predicted != e.y).long(), []
    errors = {y: float(wrong[e.y == y].double().mean()) for y in torch.unique(e.y).tolist()}
    for y in sorted(errors, key=errors.get, reverse=True):
        images = e.y == y
        if 0 < errors[y] < 1:
            fitted = fit_probe(e.z[images], wrong[images], l2, classes=2)
            lists.append(toward(e, fitted.weight[:, 1] - fitted.weight[:, 0], images))
    return torch.cat(lists) if lists else random(e, seed, l2)


def george(e, seed, l2):
    """George: the least accurate cluster of image embeddings within a class; regions of its images
    by cosine to its mean less the mean of the class's rest."""
    right, least = (e.predicted == e.y).double(), math.inf
    for y in torch.unique(e.y).tolist():
        images = (e.y == y).nonzero()[:, 0]
        z = e.z[images]
        if len(z) < 4 or (1 - z @ z.mean(0)).max() < 1e-5:  # too few, or all alike
            continue
        sweep = kmedoids(z, range(2, min(10, len(z))), seed)
        label = max(sweep.values(), key=lambda c: c.silhouette).labels
        for c in torch.unique(label).tolist():
            accuracy = float(right[images[label == c]].mean())
            if accuracy < least and (label != c).any() and e.count[images[label == c]].any():
                least, group, rest = accuracy, images[label == c], images[label != c]
    if least == math.inf:  # no class falls into clusters
        return random(e, seed, l2)
    images = torch.zeros_like(right, dtype=torch.bool).index_fill_(0, group, True)
    return toward(e, e.z[group].mean(0) - e.z[rest].mean(0), images)


def domino(e, seed, l2, components=25, dims=128):
    """Domino (Eyuboglu et al. 2022): of a mixture over images the slice that is wrong most surely,
    by max(p(predicted) - p(label)); regions of its images by cosine to its mean less the global mean."""
    z = e.z.double()
    v = z - z.mean(0)
    v = v @ torch.linalg.eigh(v.T @ v).eigenvectors[:, -dims:]  # PCA, not scaled
    R, excess = mixture(v, e.y, e.scores, components, seed)
    of = R.argmax(1)
    excess[torch.bincount(of[e.count > 0], minlength=components) == 0] = -math.inf  # none, or no region
    worst = int(excess.argmax())
    return toward(e, R[:, worst] @ z / R[:, worst].sum() - z.mean(0), of == worst)


def mixture(v, y, scores, components, seed, steps=100):
    """Gaussians (diagonal, 1e-6 added) x categorical label x categorical prediction (soft), by EM until the
    mean log-likelihood moves by less than 1e-3, as Domino's released package. It starts from the cells of the
    confusion matrix, each for several slices; if there are more, from the most frequent (our reading).

    v: [n, d]; y: [n]; scores: [n, C]. Returns responsibilities [n, components], max(p(predicted) - p(label)).
    """
    C = scores.shape[1]
    soft, cells = scores.double(), torch.arange(C * C, device=v.device)
    hot = (y[:, None] == cells[:C]).double()
    if C * C > components:
        cells = torch.bincount(y * C + soft.argmax(1), minlength=C * C).topk(components).indices
    cells = cells.repeat(components)[:components]
    R = hot[:, cells // C] * soft[:, cells % C]  # [n, components]
    noise = torch.rand(R.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    R = R / R.sum(1, keepdim=True).clamp(min=1e-12) + 1e-3 * noise.to(v.device)
    R, before = R / R.sum(1, keepdim=True), -math.inf
    for _ in range(steps):
        n = R.sum(0) + 1e-14
        mean = R.T @ v / n[:, None]
        var = (R.T @ v.square() / n[:, None] - mean.square()).clamp(min=0) + 1e-6
        p_y, p_p = (R.T @ h / n[:, None] for h in (hot, soft))  # [components, C]
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
    rule = "by the paper's rule"
    if method == "loss":
        rule = f"as a class loses by it (false discovery rate {FALSE_DISCOVERIES})"
    elif method not in ("ravl", "all"):
        rule = f"by the rule of --method={method}"
    line = f"{len(kept)} cluster{'s' * (len(kept) > 1)} kept {rule}"
    if all(c["chance"] is None for c in kept):
        return f"{line}; how many chance would keep is not known"
    return f"{line}, {len(clear(kept))} with a score above twice that of chance"


def dropped(clusters):
    """Where none is kept, a line about the best cluster that was dropped because no class gains by it."""
    lost = [c for c in clusters if c["score"] and c["reason"].startswith("no class does better")]
    if any(c["kept"] for c in clusters) or not lost:
        return ""
    c = max(lost, key=itemgetter("score"))
    q = min(gap["q"] for gap in c["gaps"].values())
    line = f"Cluster {c['id']}, score {c['score']:.2f} (by chance {c['chance']:.2f}), {gains(c, -1)}, was "
    line += "dropped as no class does better with it; one that is always right cannot. --method=loss asks "
    return line + f"for a loss with q up to {FALSE_DISCOVERIES}; here q is {q:.2g}."


def clear(kept):
    """Those of the kept clusters that stand out."""
    return [c for c in kept if c["chance"] is not None and (c["score"] or 0) > 2 * c["chance"]]


GAIN = "{name} {gap:+.2f} ({acc_in:.2f} of {n_in} with, {acc_out:.2f} of {n_out} without)"


def gains(cluster, sign, most=2, line=GAIN):
    """The classes that gain (1) or lose (-1) most by a cluster, with their accuracies; or nothing."""
    gaps = sorted(cluster["gaps"].items(), key=lambda gap: -sign * gap[1]["gap"])[:most]
    return ", ".join(line.format(name=name, **gap) for name, gap in gaps if sign * gap["gap"] > 0)


def console(summary, e):
    """The tables on the console."""
    config, clusters, N = summary["config"], summary["clusters"], len(e.x)
    drawn, kept = summary["silhouette_rows"], [c for c in clusters if c["kept"]]
    line = f"\nk = {summary['k']}, silhouette {summary['silhouette']:.3f} on the published distance"
    line += f" ({drawn} regions)" * (drawn < N) + "; the mean was taken off first" * summary["mean_removed"]
    line += f"; {'about ' * (N > 4000)}{summary['negative_pairs']:.1%} of the pairs have a negative cosine"
    lines = [line + f", which {'fast does not clip' if config['clustering'] == 'fast' else 'is clipped'}"]
    if config["method"] not in BASELINES:
        tied, rows = "most helped, harmed: weighted gap" if kept else "why not; weighted gaps", []
        for c in (kept or sorted(clusters, key=lambda c: -(c["score"] or 0))[:3])[:20]:
            words = [c["reason"] * (not c["kept"])]
            words += [gains(c, sign, 1, "{name:.24} {gap:+.2f}") for sign in (1, -1)]
            figures = itemgetter("score", "chance", "influence", "n", "stability")(c)
            at_10 = precision(c["regions"], e.target)
            rows.append((str(c["id"]), *figures, at_10, "; ".join(filter(None, words))))
        header = ("cluster", "score", "by chance", "influence", "regions", "stability", "P@10", tied)
        lines += [verdict_line(kept, config["method"]) + ":", table(header, rows)]
        lines += filter(None, [dropped(clusters)])
    else:
        lines.append(f"{N} regions, ranked by {config['method']}: see discovery.html")
    if config["method"] == "all" and summary["base_rate"] is not None:
        rows = [(name, m["precision_at_10"]) for name, m in summary["methods"].items()]
        lines.append("\n" + table(("method", "precision_at_10"), rows))
    if summary["base_rate"] is not None:
        at_10 = "-" if summary["precision_at_10"] is None else f"{summary['precision_at_10']:.2f}"
        rate = f"of regions at random {summary['base_rate']:.3f}"
        lines.append(f"Precision@10 of the first: {at_10}; {rate}")
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in summary["seconds"].items())
    lines.append(f"seconds: {seconds}; peak memory {summary['peak_gib']:.1f} GiB")
    return filled("\n".join(lines))


def report(summary, e, similarity, M):
    """The page: each kept cluster's regions as crops and in their images, accuracy with and without it."""
    config, clusters = summary["config"], summary["clusters"]
    baseline, kept = config["method"] in BASELINES, [c for c in clusters if c["kept"]]
    words, sections = {}, []
    if kept and not baseline and e.encoder and e.encoder.tokenizer and not e.encoder.untrained:
        words = nearest_words(e.encoder, M, summary["mean_removed"])
    for place, c in enumerate(kept[:PICTURED] or clusters[:3], 1):
        head = "The first of the ranking" if baseline else f"{place}. Cluster {c['id']}"
        if c["chance"] is not None:
            head += f", score {c['score']:.2f} (by chance {c['chance']:.2f})"
        sections.append((head, *cluster_parts(c, words.get(c["id"]), e, similarity)))
    figures = itemgetter("reason", "score", "chance", "influence", "n")
    rows = [(str(c["id"]), *figures(c)) for c in clusters[:60]]
    header = ("cluster", "kept?", "score", "by chance", "influence", "regions")
    sections += [("All clusters", html_table(header, rows))] * (not baseline)
    if len(summary["methods"]) > 1 and summary["base_rate"] is not None:
        rows = [(name, m["precision_at_10"]) for name, m in summary["methods"].items()]
        sections.append(("Methods", html_table(("method", "Precision@10"), rows)))
    lead = verdict_line(kept, config["method"]).removeprefix("No spurious feature was found. ")
    lead += f", among {summary['k']} clusters of {len(e.x)} regions. {dropped(clusters)}"
    if (e.predicted == e.y).all():
        lead = f"The classifier is right on all images: without errors nothing can be found. {lead}"
    if baseline:
        lead = f"A ranking of {len(e.x)} regions."
    if summary["precision_at_10"] is not None:
        rate = f"of regions at random {summary['base_rate']:.2f}"
        lead += f" Precision@10 {summary['precision_at_10']:.2f}, {rate}."
    above, title, numbers = clear(kept), "No spurious feature found above chance.", []
    if baseline:
        title = f"Regions as {config['method']} ranks them."
    elif kept and all(c["chance"] is None for c in kept):
        title = f"{len(kept)} clusters kept; what chance would keep is not known."
    elif above:
        sure = all(min(gap["q"] for gap in c["gaps"].values()) <= FALSE_DISCOVERIES for c in above)
        verb = "goes" if sure else "may go"
        title = f"The model {verb} by {len(above)} spurious feature{'s' * (len(above) > 1)}."
        name, gap = min(above[0]["gaps"].items(), key=lambda gap: gap[1]["gap"])
        numbers = [(f"{gap['acc_out']:.0%}", f"of class {name} are right without cluster {above[0]['id']}")]
        numbers.append((f"{gap['acc_in']:.0%}", "with it"))
    source = "given embeddings" if config["embeddings"] else config["model"]
    kicker = f"flock, discover.py: {e.name} by {source}"
    links = linked("how the classifier was trained", config["ckpt"], "report.html", config["out_dir"])
    return page(kicker, title, lead, sections, config, summary["git"], summary["notes"], numbers, links)


def nearest_words(encoder, M, mean_removed):
    """For each medoid M [k, D] the six nearest words, {cluster: text}. Embeddings of text and of images lie
    apart: each is compared without its mean."""
    vocabulary = (ASSETS / "words.txt").read_text().splitlines()
    words = encoder.prompts([[f"a photo of a {word}."] for word in vocabulary])
    words, M = unit(words - words.mean(0)), M if mean_removed else unit(M - M.mean(0))
    nearest = (M @ words.T).topk(6).indices.tolist()
    return {c: ", ".join(vocabulary[i] for i in index) for c, index in enumerate(nearest)}


def cluster_parts(c, words, e, similarity):
    """What the page says and shows of a cluster, or of a baseline's ranking, which has no score."""
    lead = f"Better with it: {gains(c, 1) or 'no class'}; worse: {gains(c, -1) or 'no class'}. "
    if c["influence"] is not None:
        lead += f"Influence {c['influence']:.2f}. "
    if c["stability"] is not None:
        lead += f"Found at {c['stability']:.0%} of the k tried. "
    if not c["kept"]:
        lead += f"Not kept: {c['reason']}."
    ranking = c["reason"].startswith("ranked")
    parts = [] if ranking else [tag("p", lead)]
    if words:
        parts.append(tag("p", f"Nearest words: {words}"))
    if e.pictures:
        what = "Its regions, the most typical first, with their cosine to the medoid"
        parts.append(tag("h3", "Its regions" if ranking else what))
        crops, typical = [], {}
        for r in c["regions"][:10]:
            crop = Crop(e.pictures[e.image[r]], tuple(e.box[r].tolist()))
            crops.append(thumb(crop, "" if ranking else f"{similarity[r]:.2f}", 84, f"region {r}"))
        parts += [tag("div", *crops, class_="small"), tag("h3", "In their images")]
        for r in c["regions"]:
            typical.setdefault(int(e.image[r]), r)
        for i, r in list(typical.items())[:6]:
            right = e.predicted[i] == e.y[i]
            caption = f"{e.classes[e.y[i]]}, {'right' if right else 'taken for ' + e.classes[e.predicted[i]]}"
            parts.append(thumb(e.pictures[i], caption, then=partial(outlined, box=e.box[r].tolist())))
    rows = []
    for name, gap in sorted(c["gaps"].items(), key=lambda gap: -abs(gap[1]["gap"]))[:8]:
        pairs = (gap["acc_out"], gap["n_out"]), (gap["acc_in"], gap["n_in"])
        values = [(accuracy, wilson(accuracy * n, n)) for accuracy, n in pairs]
        rows.append((name, f"n = {gap['n_out']}, {gap['n_in']}", values))
    if rows:
        chart = dots(f"cluster {c['id']}", rows, ("images without it", "with it"))
        parts += [tag("h3", "Accuracy of the classifier"), chart]
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
