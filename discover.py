"""Which image regions does a model spuriously rely on? RaVL's discovery, and the baselines that it is compared with.

    python discover.py --data=waterbirds:DIR --ckpt=out/ckpt.pt                  a probe that train.py made
    python discover.py --data=waterbirds:DIR --model=ViT-B-32 --pretrained=openai    zero-shot
    python discover.py --embeddings=FILE.npz                                     region embeddings from elsewhere
    torchrun --nproc_per_node=N discover.py ...                                  regions spread over N processes

1. Cluster the embeddings of regions: k-medoids for every k of a range, the k with the largest silhouette.
2. Identify the clusters that are spurious: images of one class gain by having a region in it, images of another lose, and the
   misclassified ones look at it (influence).
3. Rank each such cluster's regions by closeness to its medoid.

RaVL is Varma et al., NeurIPS 2024; --clustering=ravl is their published procedure to the letter, fast the same idea in O(n k D).
"""
import math, os, resource, time, zlib
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (Complaint, Crop, bars, drawn_regions, expect, find_masks, flags, html_table, load_data, load_embeddings, load_regions, npz,
                  open_mask, outlined, page, region_truth, revision, rng, run, say, table, thumb, write, write_json)
from kernels import cluster_sums
from model import Probe, cores, embed, fit_probe, load_checkpoint, load_encoder, load_map, prompt_embeddings, region_embeddings, unit

# --- I/O ------------------------------------------------------------------------------------------------------------
out_dir = "out"          # discovery.json, discovery.npz, discovery.html
cache_dir = "cache"      # embeddings, shared with the other scripts; --cache_dir= for none
skip_bad = False         # leave out images that cannot be read, counted and named, instead of stopping
# --- what to look at: images, or embeddings of their regions ----------------------------------------------------------
data = "scenes"          # every --data of train.py
split = "val"            # train, val, test, or several: val,test; the classifier must not have been fitted on it
confounder = 1.0         # scenes: as in train.py
difficulty = 0.65        # scenes: as in train.py
embeddings = ""          # FILE.npz with reg_emb [N,D], num_regions [n], true_label [n], text_emb [C,D], img_emb [n,D]; random:N,D draws some
masks = ""               # folder of foreground masks: what Precision@K counts as background
outside = 0.9            # share of a region that must lie outside the mask for it to count
# --- regions ---------------------------------------------------------------------------------------------------------
regions = "grid:3"       # grid:3, grid:2,4, boxes:FILE.csv (path,x1,y1,x2,y2 in pixels), coco:FILE.json, masks:DIR
region_encoder = "pool"  # pool: the feature map under the region; crop: each region as an image; roi: CLIP's ResNets
# --- the classifier under suspicion ----------------------------------------------------------------------------------
classifier = "auto"      # probe, text or rows (of an ImageNet classifier); auto: what there is, in this order
ckpt = ""                # of train.py; without one, probe is fitted on the training split as train.py's erm is
probe = "erm"            # which of its probes
classes = ""             # file of class names, one a line
prompts = ""             # file of templates with {}, one a line; if empty the data set's own (waterbirds and scenes: "This is a picture of a {}."; celeba
                         # and counteranimal have theirs), of any other "a photo of a {}."
temperature = 0.07       # of softmax over cosines with text embeddings
model = "lite0"          # lite0, timm:NAME, tiny, or any open_clip name such as ViT-L-14
pretrained = ""          # open_clip tag or local file
quick_gelu = "auto"      # auto follows the record of the weights; on, off
device = "auto"          # auto, cpu, cuda
dtype = "auto"           # of the forward pass: auto, float32, bfloat16
batch_size = 8           # small batches are faster on a CPU; raise it on a GPU
threads = 0              # that decode images and, on a CPU, embed them; 0 for one per core
# --- method ----------------------------------------------------------------------------------------------------------
method = "ravl"          # ravl, gap_only, influence_only, unweighted; random, failures, george, domino, spurious_aware; all
clustering = "fast"      # fast: cosines as they are; exact: clipped as published, ours; ravl: as published, seed 0
k = ""                   # range of k, as 20:50, upper end excluded; 2C:5C if empty, C the number of classes
centre = "auto"          # take the mean off unit embeddings first: on, off; auto: in fast, if their mean cosine exceeds 0.1
influence_least = 0.25   # clusters below it are not kept
l2 = 0.8                 # penalty of a probe fitted here, as in train.py
seed = 0
# --- end -------------------------------------------------------------------------------------------------------------

CLUSTERS = ("ravl", "gap_only", "influence_only", "unweighted")  # methods that choose among clusters
LISTS = ("random", "failures", "george", "domino", "spurious_aware")  # those that rank regions directly
OF_IMAGES = ("data", "split", "confounder", "difficulty", "masks", "outside", "regions", "region_encoder", "classifier", "ckpt", "probe", "classes", "prompts",
             "model", "pretrained", "quick_gelu")  # flags that say nothing of --embeddings
STEP = 1 << 16  # regions handled at a time


def main():
    default = {flag: globals()[flag] for flag in OF_IMAGES}
    config = flags(globals())
    for flag, known in (("method", (*CLUSTERS, *LISTS, "all")), ("clustering", ("fast", "exact", "ravl")), ("centre", ("auto", "on", "off")),
                        ("region_encoder", ("pool", "crop", "roi")), ("classifier", ("auto", "probe", "text", "rows"))):
        expect(config[flag] in known, flag, config[flag], ", ".join(known))
    for flag in ("temperature", "l2"):
        expect(0 < config[flag] < math.inf, flag, config[flag], "a positive number")
    expect(0 < outside <= 1, "outside", outside, "a share above 0, up to 1")
    for flag, least in (("batch_size", 1), ("threads", 0), ("seed", 0)):
        expect(config[flag] >= least, flag, config[flag], f"a whole number from {least}")
    expect(0 <= difficulty <= 1, "difficulty", difficulty, "a number from 0 to 1")
    expect(math.isfinite(influence_least), "influence_least", influence_least, "a finite number")
    low, _, high = k.partition(":")
    expect(not k or low.isdigit() and high.isdigit() and 2 <= int(low) < int(high), "k", k, "LOW:HIGH with 2 <= LOW < HIGH, for instance 20:50 for 20 to 49")
    for flag in OF_IMAGES if embeddings else ():
        expect(config[flag] == default[flag], flag, config[flag], "nothing with --embeddings, where it has no effect")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        expect(clustering == "fast", "clustering", clustering, "fast, the only one that works in several processes")
        dist.init_process_group("gloo")
        torch.set_num_threads(max(1, cores() // processes))
    started, seconds = time.time(), {}
    x, found = from_file() if embeddings else from_images()
    if rank() == 0:
        for line in found["notes"]:
            say(line)
    n_regions = len(found["image"])
    ks = k_range(len(found["classes"]), n_regions)
    x, mean = centred(x)

    clock = time.time()
    sweep = published_sweep(x.numpy(), ks) if clustering == "ravl" else kmedoids(x, ks, clustering == "exact", seed)
    best = max(sweep, key=lambda k: (sweep[k]["silhouette"], -k))
    if clustering == "ravl" and sweep[best]["silhouette"] <= 0:
        say("silhouette: not positive for any k; regions do not fall into clusters")
    labels, medoids = gathered(sweep[best]["labels"].long()), sweep[best]["medoids"]
    M = rows_of(x, medoids)
    seconds["cluster"], clock = time.time() - clock, time.time()
    results = {name: identify(labels, best, found, name) for name in CLUSTERS}
    by_method = method if method in CLUSTERS else "ravl"
    stable = stability(sweep, best, labels, results[by_method], found, by_method)
    seconds["identify"], clock = time.time() - clock, time.time()
    similarity = gathered(closeness(x, M, sweep[best]["labels"].long()))
    order = torch.from_numpy(np.lexsort((-np.arange(n_regions), -similarity.numpy().astype(np.float64))))  # of ties the later first, as published
    members = torch.split(order[labels[order].argsort(stable=True)], torch.bincount(labels, minlength=best).tolist())
    ranked = {name: next((members[c] for c in r["ranking"] if r["kept"][c]), members[0][:0]) for name, r in results.items()}
    ranked.update({name: globals()[name](x, found) for name in (LISTS if method == "all" else (method,) if method in LISTS else ())})
    seconds["rank"] = time.time() - clock
    silhouette, rows = clipped_silhouette(x, sweep[best]["labels"].long(), best, mean)
    negative = negative_pairs(x, mean)
    if rank():
        return
    seconds["total"] = time.time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if os.uname().sysname == "Linux" else 30)
    if method in LISTS:
        first = ranked[method].tolist()
        tree = [dict(id=0, kept=True, reason=f"ranked list of {method}", score=None, chance=None, influence=None, gaps={}, medoid=first[0],
                     regions=first, stability=None)] if first else []
    else:
        tree = described(results[by_method], medoids, members, stable, found)
    at_10 = {name: precision(r, found) for name, r in ranked.items()}
    headline = "ravl" if method == "all" else method
    summary = dict(config=config, git=revision(), notes=found["notes"], k=best, silhouette=silhouette, silhouette_rows=rows,
                   silhouettes={str(k): s["silhouette"] for k, s in sweep.items()}, mean_removed=bool(mean.any()), negative_pairs=negative,
                   accuracy=float((found["predicted"] == found["y"]).double().mean()), classes=found["classes"], clusters=tree,
                   precision_at_10=at_10[headline], base_rate=precision(range(n_regions), found, n_regions),
                   methods={name: dict(precision_at_10=at_10[name], top=r[:100].tolist()) for name, r in ranked.items()}, seconds=seconds,
                   peak_gib=peak)
    say(console(summary, found))
    out = Path(out_dir)
    write(out / "discovery.html", report(summary, found, similarity, M))
    paths = [str(getattr(p, "path", "")) for p in found["pictures"] or [""] * len(found["y"])]
    write(out / "discovery.npz", npz(
        medoids=M.cpu().numpy(), mean=mean.numpy(), kept=np.array([c["id"] for c in tree if c["kept"]], np.int64), clipped=clustering == "ravl",
        fingerprint=found["fingerprint"], regions=regions, region_encoder=region_encoder, data=found["name"], paths=paths,
        image=found["image"].numpy(), box=found["box"].numpy(), label=labels.numpy()))
    write_json(out / "discovery.json", summary)
    say(f"\n{out}/discovery.json, discovery.npz and discovery.html written, {time.time() - started:.1f} s")


# ---------------------------------------------------------------------------------------------------------------------
# several processes: each holds some of the regions, in the order of the ranks

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def total(t, op="SUM"):
    """The sum (MAX, MIN) of a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(t, op=getattr(dist.ReduceOp, op))
    return t


def own_threads():
    return threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def gathered(thing):
    """A list's or tensor's parts on all processes, put together, on each of them."""
    if not dist.is_initialized():
        return thing
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, thing)
    return torch.cat(parts) if isinstance(thing, torch.Tensor) else sum(parts, [])


def span(n):
    """First and last + 1 of the n things that are this process's."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    return n * rank() // size, n * (rank() + 1) // size


def rows_of(x, index):
    """Rows of x [N, D], spread over the processes, by their numbers among all regions [k] -> [k, D]."""
    counts = gathered(torch.tensor([len(x)]))
    here = index - int(counts[:rank()].sum())
    mine = (here >= 0) & (here < len(x))
    out = x.new_zeros(len(index), x.shape[1])
    out[mine] = x[here[mine]]
    return total(out)


# ---------------------------------------------------------------------------------------------------------------------
# what is looked at

def from_images():
    """Region embeddings and all that step 2 asks for, from images: (x [N, D] of this process, unit-norm; found, see tell)."""
    encoder = load_encoder(model, pretrained, quick_gelu, device)
    samples = load_data(data, "", confounder, seed, difficulty, classes, prompts, splits=False)
    if (samples.y < 0).any():
        raise Complaint(f"{samples.name}: no labels; discovery needs them: a folder for each class")
    names = [s.strip() for s in split.split(",")]
    expect(set(names) <= {"train", "val", "test"}, "split", split, "train, val, test, or several of them with commas")
    wanted = torch.isin(samples.split, torch.tensor([("train", "val", "test").index(s) for s in names]))
    chosen = samples.keep(wanted.nonzero()[:, 0])
    if not chosen.items:
        counts = ", ".join(f"{n} {int((samples.split == k).sum())}" for k, n in enumerate(("train", "val", "test")))
        raise Complaint(f"--split={split}: {samples.name} has no images there ({counts}); take another split")
    low, high = span(len(chosen.items))
    pictures, more = load_regions(regions, chosen.items, encoder.frame, skip_bad)
    pictures = pictures[low:high]
    mask_files = find_masks([getattr(p, "path", "") for p in chosen.items], masks) if masks else None
    logits, notes = suspect(encoder, samples, names)
    z, x, bad = region_embeddings(encoder, pictures, region_encoder, cache=cache_dir, batch=batch_size, threads=own_threads(), dtype=dtype,
                                  skip_bad=skip_bad, label="regions")
    good = z.isfinite().all(1)
    count = torch.tensor([len(p.boxes) for p in pictures], dtype=torch.long)
    x, count, kept = x[good.repeat_interleave(count)], count[good], good.nonzero()[:, 0]
    target = None
    if masks:
        share = gathered(torch.cat([torch.zeros(0), *[outside_mask(pictures[k], mask_files[low + k]) for k in kept.tolist()]]))
        target = torch.where(share.isnan(), torch.nan, (share >= outside).float())
        if share.isnan().any():
            with_mask = sum(m is not None for m in mask_files)
            notes.append(f"--masks: masks for {with_mask} of {len(mask_files)} images; Precision@K and the base rate are of their regions only")
    elif chosen.shows:
        target = gathered(region_truth([pictures[k] for k in kept.tolist()], [chosen.shows[low + k] for k in kept.tolist()])[1].float())
    box = torch.cat([torch.zeros(0, 4), *[torch.tensor(pictures[k].boxes).view(-1, 4) for k in kept.tolist()]])
    which = gathered(low + kept).tolist()
    return tell(x, z[good], logits, y=gathered(chosen.y[low + kept]), count=gathered(count), box=gathered(box), target=target, name=samples.name,
                classes=samples.classes, pictures=[chosen.items[k] for k in which], fingerprint=encoder.fingerprint, encoder=encoder,
                notes=encoder.notes + samples.notes + notes + more + gathered([f"skipped {line}" for _, line in bad]))


def tell(x, z, logits, **found):
    """Regions x [N, D] and images z [n, D] of this process, and their classifier -> x, made unit-norm in place, and what steps 2 and 3 ask for.

    found, of all processes: y [n], count [n] regions per image, box [N, 4], target [N] (1, 0, nan where it is not known) or None, name, classes, pictures, notes. It gains
    image [N], the number of each region's image; predicted [n]; z [n, D] unit-norm; own [N], the region's score (softmax) for the class that its
    image is taken for; best [n], the region with the largest, the first of equals, -1 without any.
    """
    name, y, count, known = found["name"], found["y"], found["count"], found["classes"]
    if not len(y):
        raise Complaint(f"{name}: no images in --split={split}")
    if len(known) < 2:
        raise Complaint(f"{name}: one class ({known[0]}); spurious correlations need two or more")
    if not count.sum():
        raise Complaint(f"{name}: none of its {len(y)} images has a region")
    image = torch.arange(len(y)).repeat_interleave(count)
    predicted = gathered(logits(z).argmax(1))
    low, own = int(gathered(torch.tensor([len(x)]))[:rank()].sum()), torch.empty(len(x), dtype=torch.double)
    for a in range(0, len(x), STEP):
        part = x[a:a + STEP]
        taken = predicted[image[low + a:low + a + len(part)]]
        own[a:a + STEP] = logits(part).double().softmax(1).gather(1, taken[:, None])[:, 0]
        norm = part.norm(dim=1, keepdim=True)
        if not norm.isfinite().all() or not norm.all():
            row = int((~norm.isfinite() | (norm == 0))[:, 0].nonzero()[0])
            raise Complaint(f"{name}: the embedding of region {low + a + row} is {'zero' if norm[row] == 0 else 'not finite'}; leave it out, or check the model")
        part /= norm
    own = gathered(own)
    highest = torch.full((len(y),), -math.inf, dtype=torch.double).scatter_reduce_(0, image, own, "amax")
    hit = (own == highest[image]).nonzero()[:, 0]
    best = torch.full((len(y),), len(image)).scatter_reduce_(0, image[hit], hit, "amin")
    notes = found["notes"] + [f"{len(image)} regions of {len(y)} images, classes {', '.join(known[:6])}{', ...' * (len(known) > 6)}; "
                              f"accuracy {float((predicted == y).double().mean()):.3f}"]
    if not (count > 0).all():
        notes.append(f"{int((count == 0).sum())} of {len(count)} images have no region: they count as images without the feature")
    if (predicted == y).all():
        notes.append(f"the classifier is right on all {len(y)} images: without errors no influence is defined, and nothing can be found")
    if len(set(y.tolist())) == 1:
        notes.append(f"all images are of one class ({known[int(y[0])]}): a feature that helps one class and harms another cannot show")
    return x, dict(found, image=image, predicted=predicted, z=unit(gathered(z.float())), own=own, best=torch.where(best < len(image), best, -1), notes=notes)


def suspect(encoder, samples, names):
    """The classifier: a function from embeddings [N, D] to logits [N, C], and notes."""
    kind = classifier
    expect(not ckpt or kind in ("auto", "probe"), "ckpt", ckpt, f"none with --classifier={kind}")
    expect(ckpt or probe == "erm", "probe", probe, "erm, or with it --ckpt=FILE of train.py")
    if kind == "auto":
        kind = "probe" if ckpt else "text" if encoder.tokenizer else "rows" if len(samples.classes) == 1000 else "probe"
    if kind == "text":
        texts = samples.class_prompts()
        text = prompt_embeddings(encoder, texts, cache_dir)
        said = f"classifier: text embeddings, prompts {texts[0][0]!r}" + f" and {len(texts[0]) - 1} more" * (len(texts[0]) > 1)
        return lambda v: unit(v.float()) @ text.T / temperature, [said]
    if kind == "rows":
        weight, bias = encoder.classifier()
        if len(weight) != len(samples.classes):
            raise Complaint(f"--classifier=rows: {encoder.name} has {len(weight)} classes, {samples.name} {len(samples.classes)}; expected the same")
        return lambda v: v.float() @ weight.T + bias, ["classifier: the model's own rows"]
    if ckpt:
        state = load_checkpoint(ckpt, encoder)
        if probe not in state["probes"] or probe in ("nullspace", "leace", "bap_closed", "bap_synthetic"):
            raise Complaint(f"--probe={probe}: {ckpt} has {', '.join(state['probes'])}; expected one on raw embeddings, or bap")
        fitted_on = "val" if probe.startswith("val_probe") else "train"
        if fitted_on in names:
            raise Complaint(f"--split={split}: the probe {probe} was fitted on the {fitted_on} split, and must be looked at on another")
        if state["classes"] != samples.classes:
            raise Complaint(f"--ckpt={ckpt}: made for the classes {state['classes']}, {samples.name} has {samples.classes}")
        fitted, g = Probe(**state["probes"][probe]), load_map(state) if probe in ("bap", "val_probe_bap") else unit
        return lambda v: fitted.logits(g(v.float())), [f"classifier: probe {probe} of {ckpt}"]
    train = (samples.split == 0).nonzero()[:, 0]
    if "train" in names or not len(train):
        raise Complaint(f"--split={split}: a probe is fitted on the training split, and must be looked at on another; use --split=val, or --ckpt")
    z, _ = embed(encoder, [samples.items[i] for i in train], cache_dir, batch_size, own_threads(), dtype, skip_bad, "training images")
    good = z.isfinite().all(1)
    fitted = fit_probe(unit(z[good]), samples.y[train][good], l2, classes=len(samples.classes))
    return lambda v: fitted.logits(unit(v.float())), [f"classifier: probe fitted on {int(good.sum())} training images, l2 = {l2}"]


def outside_mask(picture, path):
    """Share of each region of a picture that lies outside its foreground mask, [R]; nan without a mask."""
    if path is None:
        return torch.full((len(picture.boxes),), torch.nan)
    mask = np.asarray(open_mask(path)) > 127
    H, W = mask.shape
    area = lambda x1, y1, x2, y2: mask[round(y1 * H):max(round(y2 * H), round(y1 * H) + 1), round(x1 * W):max(round(x2 * W), round(x1 * W) + 1)]
    return torch.tensor([1 - area(*box).mean() for box in picture.boxes])


def from_file():
    """The same from --embeddings: this process's share of the regions. random:N,D draws them."""
    name = embeddings
    if name.startswith("random:"):
        N, _, D = name.removeprefix("random:").partition(",")
        if not (N.isdigit() and D.isdigit()):
            raise Complaint(f"--embeddings={name}: expected random:N,D, for instance random:100000,256")
        read, (low, high) = drawn_regions(int(N), int(D), seed), span(int(N))
        read["reg_emb"] = read["reg_emb"] if high - low == int(N) else read["reg_emb"][low:high].clone()
    else:
        read = load_embeddings(name, span)
    z, y, target, text = read["img_emb"], read["true_label"], read["region_target"], unit(read["text_emb"].double())
    low, high = span(len(y))
    return tell(read["reg_emb"], z[low:high].float(), lambda v: unit(v.double()) @ text.T / temperature, y=y, count=read["num_regions"],
                box=torch.zeros(int(read["num_regions"].sum()), 4), name=name, pictures=None,
                target=None if target is None else torch.where(target.isnan(), torch.nan, (target > .5).float()),
                classes=read.get("class_names") or [str(c) for c in range(len(text))], notes=read.get("notes", []), fingerprint="", encoder=None)


# ---------------------------------------------------------------------------------------------------------------------
# step 1: clusters

def k_range(C, n):
    """The values of k: the flag's range, or 2C to 5C - 1; at most 40 of them in fast and exact, evenly spread in ratio."""
    low, _, high = k.partition(":")
    ks = range(int(low), int(high)) if k else range(2 * C, 5 * C)
    usable = [v for v in ks if v < n]
    if len(usable) < len(ks) and rank() == 0:
        say(f"k: {ks[0]} to {ks[-1]} wanted, but there are {n} regions" + (f"; up to {usable[-1]} is used" if usable else ""))
    if not usable:
        raise Complaint(f"--k: {ks[0]} clusters of {n} regions; give more images, finer --regions, or --k=2:{max(3, n)}")
    if clustering == "ravl" or len(usable) <= 40:
        return usable
    if rank() == 0:
        say(f"k: {len(usable)} values from {usable[0]} to {usable[-1]}; 40 of them are tried, evenly spread in ratio")
    return sorted({round(usable[0] * (usable[-1] / usable[0]) ** (i / 39)) for i in range(40)})


def centred(x):
    """Unit-norm x [N, D] with its mean taken off where --centre says so, normalised again, in place; and that mean [D]."""
    n = int(total(torch.tensor(len(x))))
    mean = total(sum((part.double().sum(0) for part in x.split(STEP)), torch.zeros(x.shape[1], dtype=torch.double))) / n
    wanted = centre == "on" or centre == "auto" and clustering == "fast" and float(mean.square().sum()) > .1  # |mean|^2 is the mean cosine
    mean = mean.float() if wanted else torch.zeros(x.shape[1])
    if wanted:
        for a in range(0, len(x), STEP):
            part = x[a:a + STEP] - mean
            x[a:a + STEP] = torch.where(part.norm(dim=1, keepdim=True) > 1e-6, unit(part), x[a:a + STEP])
    return x, mean


def kmedoids(x, ks, clip, seed):
    """K-medoids in cosine distance for every k of ks, from the largest down; all k share their work.

    x: [N, D] unit-norm, this process's rows. The largest k starts at greedily chosen seeds; each next one from the converged medoids of the
    one before, less those whose loss costs least. In between: each region to its nearest medoid, each medoid to the member with the largest
    sum of cosines to its cluster, until nothing moves. With s_ic = sum of the cosines of region i to cluster c, all that is needed,
    medoids and silhouettes, is a function of s [k, N]: under the plain cosine distance s_ic = x_i . S_c with S_c the sum of the members, so only
    clusters that changed are computed again, O(n k D) in all. clip: cosines below zero count as zero (the published distance), and s follows
    the regions that moved. Returns {k: dict(silhouette, labels [N] of this process, medoids [k], numbers among all regions)}.
    """
    local, D = x.shape
    counts = gathered(torch.tensor([local]))
    n, low = int(counts.sum()), int(counts[:rank()].sum())
    parts = [slice(a, min(a + STEP, local)) for a in range(0, local, STEP)]
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(n, generator=generator)[:max(4096, 4 * max(ks))].sort().values
    medoids = sample[seeds(rows_of(x, sample), max(ks), generator)]
    K = len(medoids)
    cosine, s = torch.empty(K, local), torch.zeros(K, local)  # to each medoid; summed over each cluster
    S, size = torch.zeros(K, D, dtype=torch.double), torch.zeros(K)
    label = torch.full((local,), -1)

    def look(c):
        """Cosines to the medoids c, anew."""
        M = rows_of(x, medoids[c])
        for p in parts:
            cosine[c, p] = M @ x[p].T

    look(torch.arange(K))
    out = {}
    for want in sorted(ks, reverse=True):
        while len(medoids) > want:  # drop the medoids that cost least, a tenth of them at a time
            gain = torch.zeros(len(medoids), dtype=torch.double)  # in the sum of 1 - d1 / d2 over regions, by dropping a medoid
            for p in parts:
                value, which = (1 - cosine[:, p]).topk(min(3, len(medoids)), dim=0, largest=False)
                d1, d2, d3 = (v.clamp(min=1e-6).double() for v in (*value, value[-1])[:3])
                gain.index_add_(0, which[0], d1 / d2 - d2 / d3)
                gain.index_add_(0, which[1], d1 / d2 - d1 / d3)
            keep = total(gain).argsort(descending=True)[min(len(medoids) - want, 1 + len(medoids) // 10):].sort().values
            new = torch.full((len(medoids) + 1,), -1).index_copy_(0, keep, torch.arange(len(keep)))
            medoids, cosine, s, S, size, label = medoids[keep], cosine[keep], s[keep], S[keep], size[keep], new[label]
        K = len(medoids)
        for _ in range(300):
            nearest = torch.cat([cosine[:, p].argmax(0) for p in parts]) if local else label
            moved = (nearest != label).nonzero()[:, 0]
            change = torch.zeros(K, D + 2, dtype=torch.double)  # of S, of the size, and how many came and went
            for some in moved.split(STEP):
                v = torch.cat([x[some].double(), torch.ones(len(some), 1, dtype=torch.double)], 1)
                was = label[some] >= 0
                change[:, :-1].index_add_(0, nearest[some], v)
                change[:, :-1].index_add_(0, label[some][was], v[was], alpha=-1)
                change[:, -1] += torch.bincount(nearest[some], minlength=K) + torch.bincount(label[some][was], minlength=K)
            total(change)
            if not change[:, -1].any():
                break
            S, size, changed = S + change[:, :-2], size + change[:, -2].float(), change[:, -1].nonzero()[:, 0]
            if clip:
                for some in moved.split(1024):
                    sign = torch.zeros(K, len(some))
                    sign[nearest[some], torch.arange(len(some))] = 1
                    was = (label[some] >= 0).nonzero()[:, 0]
                    sign[label[some][was], was] = -1
                    for p in parts:
                        s[:, p] += sign @ (x[some] @ x[p].T).clamp(min=0)
            else:
                for p in parts:
                    s[changed, p] = S[changed].float() @ x[p].T
            label = nearest
            own = s.gather(0, label[None])[0]  # [N], to one's own cluster
            top = total(torch.full((K,), -math.inf).scatter_reduce_(0, label, own, "amax"), "MAX")
            here = medoids - low
            mine = (here >= 0) & (here < local)
            now = torch.full((K,), -math.inf)
            now[mine] = s[mine.nonzero()[:, 0], here[mine]]
            better = ((top > total(now, "MAX") + 1e-6 * size) & (size > 0)).nonzero()[:, 0]
            if not len(better):
                break
            hit = (own == top[label]).nonzero()[:, 0]
            first = total(torch.full((K,), n).scatter_reduce_(0, label[hit], hit + low, "amin"), "MIN")
            medoids = medoids.index_copy(0, better, first[better])
            look(better)
        value = torch.zeros((), dtype=torch.double)
        for p in parts:
            value += silhouettes(s[:, p], size, label[p]).double().sum()
        out[K] = dict(silhouette=float(total(value)) / n, labels=label.int(), medoids=medoids)
    return dict(sorted(out.items()))


def seeds(x, K, generator, trials=4):
    """K rows of x [N, D], greedily: of `trials` rows drawn in proportion to their distance from those chosen, the one that lowers the
    sum of distances most. Fewer, if x has fewer different rows."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    distance = (1 - x @ x[chosen[0]]).clamp(min=0)
    distance[distance < 1e-6] = 0
    while len(chosen) < K and distance.sum() > 0:
        tries = torch.multinomial(distance, trials, replacement=True, generator=generator)
        after = torch.minimum(distance, (1 - x[tries] @ x.T).clamp(min=0))  # [trials, N]
        after[after < 1e-6] = 0
        best = int(after.sum(1).argmin())
        chosen.append(int(tries[best]))
        distance = after[best]
    if len(chosen) < 2:
        raise Complaint("the regions' embeddings are all equal; there is nothing to cluster")
    return torch.tensor(chosen)


def silhouettes(s, size, label):
    """From s [k, N], summed cosines (clipped or not) of each region to each cluster, itself included -> silhouettes [N]."""
    own = s.gather(0, label[None])[0]
    a = (size[label] - own).clamp(min=0) / (size[label] - 1).clamp(min=1)  # mean distance within; to itself it is zero
    other = (s / size.clamp(min=1)[:, None]).masked_fill(size[:, None] == 0, -math.inf).scatter(0, label[None], -math.inf)
    b = 1 - other.amax(0)  # infinite where there is no other cluster
    return torch.where((size[label] > 1) & b.isfinite() & (torch.maximum(a, b) > 0), (b - a) / torch.maximum(a, b), 0.)


def published_sweep(x, ks):
    """RaVL's step 1: sklearn_extra's KMedoids (precomputed, alternate, k-medoids++, 300 iterations, random_state 0) on
    clip(1 - x x^T, 0, 1) and scikit-learn's silhouettes, by tiles: the same labels, without the N x N matrix. x: numpy [N, D]."""
    n = len(x)

    def distances(rows, columns=slice(None)):
        tile = np.clip(1 - x[rows] @ x[columns].T, 0, 1)
        at = np.arange(n)[columns]
        tile[np.asarray(rows)[:, None] == at] = 0
        return tile

    out = {}
    for k in ks:
        state = np.random.RandomState(0)
        trials = 2 + int(np.log(k))
        medoids = np.empty(k, int)
        medoids[0] = state.randint(n)
        closest = distances(medoids[:1])[0] ** 2
        potential = closest.sum()
        for c in range(1, k):
            tries = np.searchsorted(np.cumsum(closest, dtype=np.float64), state.random_sample(trials) * potential).clip(max=n - 1)
            after = np.minimum(closest, distances(tries) ** 2)
            sums = after.sum(1)
            best = int(sums.argmin())
            medoids[c], closest, potential = tries[best], after[best], sums[best]
        for _ in range(300):
            label, before = distances(medoids).argmin(0), medoids.copy()
            for c in range(k):
                members = np.where(label == c)[0]
                if len(members):
                    cost = np.concatenate([distances(rows, members).sum(1) for rows in np.array_split(members, len(members) // 2048 + 1)])
                    if cost.min() < cost[np.argmax(members == medoids[c])]:
                        medoids[c] = members[cost.argmin()]
            if (medoids == before).all():
                break
        out[k] = dict(labels=torch.from_numpy(distances(medoids).argmin(0)), medoids=torch.from_numpy(medoids), silhouette=0.)
    for rows in np.array_split(np.arange(n), n // 1024 + 1):  # one tile of distances serves all k
        near = 1 - torch.from_numpy(distances(rows))
        for k, found in out.items():
            size = torch.bincount(found["labels"], minlength=k).to(near.dtype)
            s = near @ F.one_hot(found["labels"], k).to(near.dtype)
            found["silhouette"] += float(silhouettes(s.T, size, found["labels"][torch.from_numpy(rows)]).double().sum()) / n
    return out


def clipped_silhouette(x, label, k, mean):
    """Mean silhouette on the published distance, clip(1 - cosine, 0, 1) of the embeddings as they were given, for comparison across modes: of
    all regions up to 10,000, of 1,000 drawn at random beyond. Returns (value, how many)."""
    n = int(total(torch.tensor(len(x))))
    size = total(torch.bincount(label, minlength=k)).float()
    if n <= 10_000 and not dist.is_initialized():
        return float(silhouettes(size[:, None] - cluster_sums(given(x, mean), label, k).T, size, label).double().mean()), n
    pick = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:10_000 if n <= 10_000 else 1000].sort().values
    some, s = given(rows_of(x, pick), mean), torch.zeros(k, len(pick))
    for a in range(0, len(x), STEP):
        s.index_add_(0, label[a:a + STEP], (given(x[a:a + STEP], mean) @ some.T).clamp(min=0))
    return float(silhouettes(total(s), size, rows_of(label[:, None].float(), pick)[:, 0].long()).double().mean()), len(pick)


def given(x, mean):
    """What centred() made x of: the unit vectors mean + t x, t > 0."""
    along = x @ mean
    return mean + (-along + (along.square() + 1 - mean.square().sum()).sqrt())[:, None] * x if mean.any() else x


def negative_pairs(x, mean):
    """Share of the pairs of regions, as they were given, with a negative cosine, where the published distance is clipped: of all pairs up
    to 4,000 regions, else of the pairs of 2,000 drawn at random."""
    n = int(total(torch.tensor(len(x))))
    pick = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n if n <= 4000 else 2000]
    some = given(rows_of(x, pick), mean)
    return float((some @ some.T < 0).double().sum()) / max(1, len(pick) * (len(pick) - 1))


def closeness(x, M, label):
    """Cosine of each region to its cluster's medoid, [N]."""
    return torch.cat([(x[a:a + STEP] * M[label[a:a + STEP]]).sum(1) for a in range(0, len(x), STEP)]) if len(x) else torch.empty(0)


# ---------------------------------------------------------------------------------------------------------------------
# step 2: which clusters are spurious?

def identify(label, k, found, method):
    """RaVL's step 2 for all clusters at once. label: [N] cluster of each region.

    gap [C, k]: weight x (accuracy of the images of a class with a region in the cluster - of those without), nan where one side is empty;
    influence [k]: of the misclassified images of a class that loses by the cluster, the share whose region with the highest score for the predicted
    class lies in it, the largest over classes, -inf without any; score: sum of |gap|; chance: what that sum would be on average if the feature changed nothing
    (binomial errors; ours). gap_only keeps by the gaps alone, influence_only by the
    influence alone and ranks by it, unweighted leaves out the weight. Returns a dict; ranking: clusters by score, of ties the higher number first.
    """
    y, C = found["y"], len(found["classes"])
    right = (found["predicted"] == y).double()
    pair = torch.unique(found["image"] * k + label)  # images and the clusters that they have a region in
    image, cluster = pair // k, pair % k
    count = lambda weight: torch.zeros(C * k, dtype=torch.double).index_add_(0, y[image] * k + cluster, weight).view(C, k)
    n_in, right_in = count(torch.ones(len(pair), dtype=torch.double)), count(right[image])
    n_all = torch.bincount(y, minlength=C).double()[:, None]
    n_out, right_out = n_all - n_in, torch.zeros(C, dtype=torch.double).index_add_(0, y, right)[:, None] - right_in
    weight = 2 * torch.minimum(n_in, n_out) / n_all.clamp(min=1)
    acc_in, acc_out = right_in / n_in, right_out / n_out
    factor = torch.ones_like(weight) if method == "unweighted" else weight
    gap = factor * (acc_in - acc_out)
    gap[(n_in == 0) | (n_out == 0)] = torch.nan
    asked = (right[image] == 0) & (found["count"][image] > 1) & (gap[y[image], cluster] < 0)
    looks = (label[found["best"].clamp(min=0)][image] == cluster).double()
    of = count(asked.double())
    influence = torch.where(of > 0, count(asked * looks) / of, -math.inf).amax(0)
    score = gap.abs().nansum(0)
    p = (right_in + right_out) / n_all.clamp(min=1)
    chance = (factor * (2 / math.pi * p * (1 - p) * (1 / n_in + 1 / n_out)).sqrt())[~gap.isnan()]
    chance = torch.zeros(k, dtype=torch.double).index_add_(0, (~gap.isnan()).nonzero()[:, 1], chance)
    signs = (gap > 0).any(0) & (gap < 0).any(0)
    enough = influence >= influence_least
    kept = signs if method == "gap_only" else enough if method == "influence_only" else signs & enough
    key, chance = (influence, torch.full((k,), torch.nan)) if method == "influence_only" else (score, chance)
    ranking = np.lexsort((-np.arange(k), -key.numpy())).tolist()
    return dict(gap=gap, weight=weight, acc_in=acc_in, n_in=n_in, acc_out=acc_out, n_out=n_out, influence=influence, score=score, chance=chance,
                key=key, kept=kept.tolist(), ranking=ranking, signs=signs)


def why(r, c):
    """Why cluster c was kept, or not."""
    if r["kept"][c]:
        return "kept"
    if not r["signs"][c]:
        gap = r["gap"][:, c]
        return ("in no image, or in all of a class" if gap.isnan().all() else
                "no class does better with it" if not (gap > 0).any() else "no class does worse with it")
    i = float(r["influence"][c])
    return "influence undefined: no class that does worse with it has an error to ask" if i == -math.inf else f"influence {i:.2f} below {influence_least}"


def stability(sweep, best, labels, result, found, method):
    """For each kept cluster the share of up to 15 values of k, spread over the sweep, at which a kept cluster shares half of its regions
    (Jaccard >= 0.5): a finding that hangs on one k is suspect. Ours, not in the paper. {cluster: share}."""
    kept = [c for c in range(best) if result["kept"][c]]
    hits = dict.fromkeys(kept, 0)
    tried = [list(sweep)[i] for i in np.linspace(0, len(sweep) - 1, min(15, len(sweep))).round().astype(int)] if kept else []
    for k in tried:
        other = gathered(sweep[k]["labels"].long())
        r, size = identify(other, k, found, method), torch.bincount(other, minlength=k)
        for c in kept:
            shared = torch.bincount(other[labels == c], minlength=k)
            hits[c] += bool((shared[r["kept"]] >= .5 * (size + shared.sum() - shared)[r["kept"]]).any())
    return {c: h / len(tried) for c, h in hits.items()}


def described(r, medoids, members, stable, found):
    """The clusters for discovery.json: kept first, each part by score."""
    number = lambda v: None if not math.isfinite(v) else float(v)
    out = []
    for c in sorted(r["ranking"], key=lambda c: not r["kept"][c]):
        gaps = {found["classes"][l]: dict({key: number(r[key][l, c]) for key in ("gap", "weight", "acc_in", "acc_out")},
                                          n_in=int(r["n_in"][l, c]), n_out=int(r["n_out"][l, c]))
                for l in range(len(found["classes"])) if r["n_in"][l, c] > 0 and r["n_out"][l, c] > 0}
        out.append(dict(id=c, kept=bool(r["kept"][c]), reason=why(r, c), score=number(r["key"][c]), chance=number(r["chance"][c]),
                        influence=number(r["influence"][c]), gaps=gaps, medoid=int(medoids[c]), stability=stable.get(c), regions=members[c].tolist()))
    return out


def precision(regions, found, K=10):
    """Share of the first K regions that show the planted feature, of those of which it is known; None if of none."""
    shown = torch.empty(0) if found["target"] is None else found["target"][torch.as_tensor(regions, dtype=torch.long)]
    shown = shown[~shown.isnan()][:K]
    return float(shown.double().mean()) if len(shown) else None


# ---------------------------------------------------------------------------------------------------------------------
# baselines: each a ranked list of regions. How the paper fits them to regions is not public: our reading

def random(x, found):
    return torch.from_numpy(rng(seed, "random regions", zlib.crc32(found["name"].encode())).permutation(len(found["image"])))


def toward(x, direction, found, images):
    """Regions of some images, bool [n], by the cosine to a direction [D], largest first."""
    score = gathered(torch.cat([part @ direction.float() for part in x.split(STEP)]) if len(x) else torch.empty(0))
    return by(score, images[found["image"]])


def by(score, among):
    """Numbers of the regions among [N], by score [N], largest first."""
    index = among.nonzero()[:, 0]
    return index[score[index].argsort(descending=True, stable=True)]


def worst_labels(found):
    """Classes that have right and wrong images, the least accurate first."""
    right = found["predicted"] == found["y"]
    accuracy = {l: float(right[found["y"] == l].double().mean()) for l in set(found["y"].tolist())}
    return sorted((l for l, a in accuracy.items() if 0 < a < 1), key=accuracy.get)


def failures(x, found):
    """Distilling failures: in each class a linear classifier of right against wrong images; its regions by their score toward wrong."""
    wrong, lists = (found["predicted"] != found["y"]).long(), []
    for l in worst_labels(found):
        of = found["y"] == l
        fitted = fit_probe(found["z"][of], wrong[of], l2, classes=2)
        lists.append(toward(x, fitted.weight[:, 1] - fitted.weight[:, 0], found, of))
    return torch.cat(lists) if lists else random(x, found)


def george(x, found):
    """George: the least accurate cluster of image embeddings within a class; regions of its images by cosine to its mean less the class's rest."""
    right, worst = (found["predicted"] == found["y"]).double(), (math.inf, None, None)
    for l in sorted(set(found["y"].tolist())):
        of = (found["y"] == l).nonzero()[:, 0]
        if len(of) < 4 or (1 - found["z"][of] @ found["z"][of].mean(0)).max() < 1e-5:  # too few, or all alike
            continue
        low, high = span(len(of))
        groups = kmedoids(found["z"][of[low:high]], range(2, min(10, len(of))), False, seed)
        labels = gathered(max(groups.values(), key=lambda g: g["silhouette"])["labels"].long())
        for c in set(labels.tolist()):
            accuracy = float(right[of[labels == c]].mean())
            if accuracy < worst[0] and (labels != c).any():
                worst = accuracy, of[labels == c], of[labels != c]
    if worst[1] is None:
        return random(x, found)
    images = torch.zeros(len(found["y"]), dtype=torch.bool).index_fill_(0, worst[1], True)
    return toward(x, found["z"][worst[1]].mean(0) - found["z"][worst[2]].mean(0), found, images)


def domino(x, found, parts=25, dims=128, steps=100):
    """Domino: mixture of Gaussians (diagonal, on 128 principal components) x categorical label x categorical prediction, by EM from random
    assignments within the cells of the confusion matrix; the slice with the largest max(p(predicted) - p(label)); regions of its images by
    cosine to the slice's mean less the global mean."""
    z, y, p, C = found["z"].double(), found["y"], found["predicted"], len(found["classes"])
    v = z - z.mean(0)
    v = v @ torch.linalg.eigh(v.T @ v).eigenvectors[:, -dims:]
    v = v / v.std().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    cell = torch.unique(y * C + p, return_inverse=True)[1]
    cells = int(cell.max()) + 1
    R = torch.rand(len(z), parts, generator=generator, dtype=torch.double) * (torch.arange(parts) % cells == cell[:, None] % parts) + 1e-3
    R /= R.sum(1, keepdim=True)
    Y, P = F.one_hot(y, C).double(), F.one_hot(p, C).double()
    for _ in range(steps):
        n = R.sum(0) + 1e-6
        mean = R.T @ v / n[:, None]
        var = (R.T @ v.square() / n[:, None] - mean.square()).clamp(min=0) + 1e-2
        py, pp = ((R.T @ T + 1e-3) / (n[:, None] + 1e-3 * C) for T in (Y, P))
        gauss = -.5 * (v.square() @ (1 / var).T - 2 * v @ (mean / var).T + (mean.square() / var).sum(1) + var.log().sum(1))
        before, R = R, (gauss + py.log().T[y] + pp.log().T[p] + n.log()).softmax(1)
        if (R - before).abs().max() < 1e-4:
            break
    of = R.argmax(1)
    rating = torch.where(torch.bincount(of, minlength=parts) > 0, (pp - py).amax(1), -math.inf)
    slice_ = int(rating.argmax())
    return toward(x, (R[:, slice_] @ z / R[:, slice_].sum() - z.mean(0)), found, of == slice_)


def spurious_aware(x, found):
    """All regions of misclassified images by their score for the class that was wrongly predicted."""
    return by(found["own"], (found["predicted"] != found["y"])[found["image"]])


# ---------------------------------------------------------------------------------------------------------------------
# what is shown

def verdict(kept):
    """How many clusters RaVL's rule keeps, and how many of them it would hardly keep by chance: score above twice what chance gives (ours)."""
    clear = sum(c["chance"] is None or (c["score"] or 0) > 2 * c["chance"] for c in kept)
    return f"{len(kept)} spurious feature{'s' * (len(kept) > 1)} found by the paper's rule, {clear} with a score above twice that of chance"


def console(summary, found):
    """The tables on the console."""
    kept = [c for c in summary["clusters"] if c["kept"]]
    lines = [f"\nk = {summary['k']}, silhouette {summary['silhouette']:.3f} on the published distance"
             + (f" ({summary['silhouette_rows']} regions)" if summary["silhouette_rows"] < len(found["image"]) else "")
             + ("; the mean was taken off first" if summary["mean_removed"] else "")
             + f"; {'about ' * (len(found['image']) > 4000)}{summary['negative_pairs']:.1%} of the pairs have a negative cosine, which "
             + ("fast does not clip" if clustering == "fast" else "is clipped")]
    gaps = lambda c, sign: ", ".join(f"{l} {g['gap']:+.2f} ({g['acc_in']:.2f} with, {g['acc_out']:.2f} without)"
                                     for l, g in sorted(c["gaps"].items(), key=lambda g: -sign * (g[1]["gap"] or 0))[:2] if sign * (g["gap"] or 0) > 0)
    if method not in LISTS:
        lines.append("No spurious feature was found. The nearest candidates:" if not kept else verdict(kept) + ":")
        shown = kept or sorted(summary["clusters"], key=lambda c: -(c["score"] or 0))[:3]
        lines.append(table(("cluster", "score", "by chance", "influence", "regions", "stability", "P@10",
                            "tied to: weighted gap, accuracy with and without it" if kept else "why not; weighted gaps"),
                           [(str(c["id"]), c["score"], c["chance"], c["influence"], len(c["regions"]), c["stability"], precision(c["regions"], found),
                             "; ".join(filter(None, ["" if kept else c["reason"], gaps(c, 1), gaps(c, -1)]))) for c in shown[:20]]))
    if method == "all":
        lines.append("\n" + table(("method", "precision_at_10"), [(name, m["precision_at_10"]) for name, m in summary["methods"].items()]))
    if summary["base_rate"] is not None:
        lines.append(f"Precision@10 of the first: {'-' if summary['precision_at_10'] is None else format(summary['precision_at_10'], '.2f')}; "
                     f"of all regions {summary['base_rate']:.3f} show the target")
    lines.append("seconds: " + ", ".join(f"{name} {s:.2f}" for name, s in summary["seconds"].items())
                 + f"; peak memory {summary['peak_gib']:.1f} GiB")
    return "\n".join(lines)


def report(summary, found, similarity, M):
    """The page: for each kept cluster its regions as crops and in their images, and the accuracy with and without it."""
    kept = [c for c in summary["clusters"] if c["kept"]]
    encoder, words = found["encoder"], None
    if kept and encoder is not None and encoder.tokenizer and method not in LISTS:
        vocabulary = (Path(__file__).parent / "assets" / "words.txt").read_text().split("\n")
        vocabulary = [w for w in vocabulary if w]
        words = encoder.class_embeddings(vocabulary)
        words = unit(words - words.mean(0))  # text and image embeddings lie apart: each without its mean
    sections = []
    for place, c in enumerate(kept or summary["clusters"][:3]):
        helps = [l for l, g in c["gaps"].items() if (g["gap"] or 0) > 0]
        harms = [l for l, g in c["gaps"].items() if (g["gap"] or 0) < 0]
        lead = f"Images of {', '.join(helps[:4]) or 'no class'} are classified better with it, images of {', '.join(harms[:4]) or 'no class'} worse." if c["gaps"] else ""
        lead += f" Influence {c['influence']:.2f}." if c["influence"] is not None else ""
        lead += f" Found at {c['stability']:.0%} of the k tried." if c["stability"] is not None else ""
        lead += "" if c["kept"] else f" Not kept: {c['reason']}."
        html, top = f"<p>{escape(lead)}</p>", c["regions"][:10]
        if words is not None:
            medoid = M[c["id"]] if summary["mean_removed"] else unit(M[c["id"]] - M.mean(0))
            html += "<p>Nearest words: " + escape(", ".join(vocabulary[i] for i in (words @ medoid).topk(6).indices)) + "</p>"
        if found["pictures"]:
            label = lambda r: f"{found['classes'][found['y'][found['image'][r]]]}, taken for {found['classes'][found['predicted'][found['image'][r]]]}"
            html += "<h3>Its regions, the most typical first, with their cosine to the medoid</h3><div class=small>" + "".join(
                thumb(Crop(found["pictures"][found["image"][r]], tuple(found["box"][r].tolist())).image(), f"{similarity[r]:.2f}", 84) for r in top) + "</div>"
            seen, images = set(), []
            for r in c["regions"]:
                if int(found["image"][r]) not in seen and len(images) < 6:
                    seen.add(int(found["image"][r]))
                    images.append(r)
            html += "<h3>In their images</h3>" + "".join(
                thumb(outlined(found["pictures"][found["image"][r]].image(), found["box"][r].tolist()), label(r)) for r in images)
        if c["gaps"]:
            chosen = sorted(c["gaps"].items(), key=lambda g: -abs(g[1]["gap"] or 0))[:8]
            html += "<h3>Accuracy of the classifier</h3>" + bars([(f"{l}, {side}", g[f"acc_{key}"], None, f"n={g[f'n_{key}']}") for l, g in chosen
                                                                    for side, key in (("with it", "in"), ("without", "out"))])
        sections.append((f"{place + 1}. Cluster {c['id']}" + (f", score {c['score']:.2f} (by chance {c['chance']:.2f})" if c["chance"] is not None else ""), html))
    rows = [(str(c["id"]), "kept" if c["kept"] else c["reason"], c["score"], c["chance"], c["influence"], len(c["regions"])) for c in summary["clusters"][:60]]
    sections.append(("All clusters", html_table(("cluster", "kept?", "score", "by chance", "influence", "regions"), rows)))
    if len(summary["methods"]) > 1:
        sections.append(("Methods", html_table(("method", "Precision@10"), [(m, v["precision_at_10"]) for m, v in summary["methods"].items()])))
    sections.append(("Flags", "<p>" + "<br>".join(map(escape, summary["notes"])) + "</p><pre>" + escape("\n".join(f"--{a}={b}" for a, b in summary["config"].items()))
                     + f"\ngit {summary['git']}</pre>"))
    n = len(kept)
    at = "" if summary["precision_at_10"] is None else f" Precision@10 {summary['precision_at_10']:.2f}, {summary['base_rate']:.2f} of all regions show the target."
    return page("flock: spurious features", (f"{found['name']}, {model if not embeddings else 'given embeddings'}: " + (verdict(kept) if n else
                "no spurious feature was found; below the nearest candidates") + f" among {summary['k']} clusters of {len(found['image'])} regions.{at}"), sections)


if __name__ == "__main__":
    run(main, "the same command")
