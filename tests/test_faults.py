"""What faults leave behind: damaged inputs of every reader, and runs that are killed.

Small by default; FLOCK_LARGE=1 reads thousands of damaged inputs, and kills hundreds of runs.
"""

import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

import data
import model
import test_data
import test_eval
import test_train
import train
from conftest import run_script
from data import Complaint, load_data

pytestmark = pytest.mark.ahead
LARGE = bool(os.environ.get("FLOCK_LARGE"))
HERE = Path(data.__file__).parent

# --- damage: of a file's bytes, or of what they mean. g: numpy's generator, which alone decides

ODD_TEXT = ["", "²", "9" * 5000, "-1", "1e400", "NaN", "18446744073709551616", "null", "\x00", "\x1b[2J", "١"]
ODD_TEXT += [
    "../../etc/passwd",
    "/etc/passwd",
    "=1+1",
    "\udcff",
    "a\nb",
    '"',
    "1.5",
    "Infinity",
    "x" * 70_000,
]
ODD_TREE = [
    None,
    [],
    {},
    True,
    -1,
    0,
    1.5,
    10**30,
    -(10**30),
    math.nan,
    math.inf,
    1e308,
    "\ud800",
    [[]],
    [None],
]
ODD_TREE += [{"a": None}, list(range(50)), 2**31, 2**63, *ODD_TEXT]


def pick(g, items):
    return items[int(g.integers(len(items)))]


def bent_bytes(g, raw):
    """Bytes that are cut, flipped, torn, doubled, or another format's."""
    at, kind = int(g.integers(len(raw) + 1)), int(g.integers(9))
    some = bytes(g.integers(0, 256, int(g.integers(1, 9))).astype(np.uint8))
    if kind < 3:
        out = bytearray(raw)
        for k in g.integers(0, max(1, len(raw)), int(g.integers(1, 12))) if raw else ():
            out[int(k)] ^= int(g.integers(1, 256))
        return bytes(out)
    end = int(g.integers(at, len(raw) + 1))
    first = [
        b"",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"PK\x03\x04",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"{",
        b"[" * 100_000,
    ]
    whole = [raw[:at], raw[:at] + some + raw[at:], raw[:at] + raw[end:], raw[:end] + raw[at:]]
    return [*whole, pick(g, first) + raw, pick(g, first)][kind - 3]


def bent_lines(g, raw):
    """A table or a list with a cell that is none."""
    parts = re.split(r"([,;\t\n ])", raw.decode())
    for _ in range(int(g.integers(1, 4))):
        parts[int(g.integers(len(parts)))] = pick(g, ODD_TEXT)
    return "".join(parts).encode("utf-8", "surrogateescape")


def spots(tree):
    """All (holder, key) of a tree of dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [at for key in keys for at in ((tree, key), *spots(tree[key]))]


def bent_tree(g, tree, odd):
    """The tree with one to three of its nodes removed, of another type, or another node of it."""
    for _ in range(int(g.integers(1, 4))):
        every = spots(tree)
        if not every:
            return pick(g, odd)
        holder, key = pick(g, every)
        kind = int(g.integers(8))
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, name = pick(g, every)
            with contextlib.suppress(LookupError):
                holder[key] = other[name] if not spots(other[name]) else None
        else:
            holder[key] = pick(g, odd)
    return tree


def bent_json(g, raw):
    tree = bent_tree(g, json.loads(raw), ODD_TREE)
    text = json.dumps(tree)
    return text.replace('"!deep"', "[" * 100_000).encode()


def bent_array(g, a):
    """An array of another shape, type or range; of objects, which need pickle."""
    a = np.asarray(a)
    kinds = [lambda: a[:0], lambda: a[..., None], lambda: a.ravel()[:1].reshape(()) if a.size else a]
    kinds += [
        lambda: np.full(a.shape, math.nan),
        lambda: np.full(a.shape, -1),
        lambda: np.full(a.shape, 10**9),
    ]
    kinds += [lambda: a.astype(str), lambda: a.astype(object), lambda: np.full(a.shape, 1e308)]
    kinds += [
        lambda: np.full(a.shape, 1 + 1j),
        lambda: a[:-1] if a.ndim else a,
        lambda: np.full(a.shape, "²"),
    ]
    kinds += [
        lambda: np.full(a.shape, 2**63, np.uint64),
        lambda: np.zeros((2, 2)),
        lambda: np.array(["\ud800"]),
    ]
    kinds += [lambda: np.zeros(a.shape, "datetime64[s]"), lambda: np.zeros(a.shape, [("a", int)])]
    return pick(g, kinds)()


def bent_npz(g, raw):
    with np.load(io.BytesIO(raw)) as file:
        arrays = dict(file)
    for _ in range(int(g.integers(1, 3))):
        name = pick(g, sorted(arrays))
        arrays[name] = bent_array(g, arrays[name])
        if g.random() < 0.15:
            del arrays[name]
            break
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


ODD_TENSORS = [
    torch.zeros(0),
    torch.tensor(math.nan),
    torch.zeros(1).expand(10**11),
    torch.zeros(3, 2),
    torch.ones(1),
]
ODD_TENSORS += [torch.tensor([1j]), torch.tensor(2**62), torch.eye(3).to_sparse(), torch.zeros(2, 2, 2)]
ODD_TENSORS += [torch.zeros(2, dtype=torch.bool), torch.full((64, 2), math.inf), torch.full((64,), -1)]


def bent_pt(g, raw):
    tree = torch.load(io.BytesIO(raw), weights_only=True)
    tree = bent_tree(g, tree, [*ODD_TREE, *ODD_TENSORS])
    torch.save(tree, buffer := io.BytesIO())
    return buffer.getvalue()


def bent_safetensors(g, raw):
    (n,) = struct.unpack("<Q", raw[:8])
    head = bent_json(g, raw[8 : 8 + n])
    n = pick(g, [len(head), len(head), len(head), 0, 2**40, 2**63])
    return struct.pack("<Q", n) + head + raw[8 + int(struct.unpack("<Q", raw[:8])[0]) :]


def bent_picture(g, raw):
    """A picture of odd values, sizes, modes or EXIF data; or one that says so and is not."""
    image, buffer = Image.open(io.BytesIO(raw)), io.BytesIO()
    kind = int(g.integers(8))
    if kind == 0:
        values = np.full((12, 16), pick(g, [math.nan, math.inf, -1e30, 1e30, 0]), np.float32)
        values[0, 0] = pick(g, [0, math.nan, 1])
        Image.fromarray(values).save(buffer, "TIFF")
    elif kind == 1:  # a head that lies about the size
        image.convert("RGB").save(buffer, "PNG")
        out = bytearray(buffer.getvalue())
        out[16:24] = struct.pack(">II", *(pick(g, [8, 0, 1_000_000, 2**31 - 1, 30_000]) for _ in range(2)))
        out[29:33] = struct.pack(">I", zlib.crc32(bytes(out[12:29])))
        return bytes(out)
    elif kind == 2:
        exif = bytes(g.integers(0, 256, 40).astype(np.uint8))
        exif = pick(g, [b"Exif\x00\x00MM\x00*", b"Exif\x00\x00II*\x00", b"", b"Exif\x00\x00"]) + exif
        image.convert("RGB").save(buffer, pick(g, ["JPEG", "PNG", "WEBP"]), exif=exif)
    elif kind == 3:
        exif = Image.Exif()
        exif[274] = pick(g, [0, 5, 9, 65535, 3])
        exif[pick(g, [274, 34665, 270])] = pick(g, [3, 6])
        image.convert("RGB").save(buffer, "PNG", exif=exif)
    elif kind == 4:
        mode = pick(g, ["1", "L", "LA", "P", "I;16", "I", "CMYK"])
        image.convert("L").convert(mode if mode != "I;16" else "I").save(buffer, "TIFF")
    elif kind == 5:
        image.resize(pick(g, [(8, 200_000), (7, 9), (1, 1), (8, 8), (20_000, 8)])).save(buffer, "PNG")
    elif kind == 6:
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[pick(g, [274, 256, 258, 259, 273, 279, 317])] = pick(g, [0, 3, 70_000, 65_535])
        with contextlib.suppress(Exception):
            image.convert("RGB").save(buffer, "TIFF", tiffinfo=info)
    else:
        image.convert("RGB").save(
            buffer, pick(g, ["GIF", "BMP", "PPM", "JPEG2000", "WEBP", "TIFF", "JPEG", "PNG"])
        )
        return bent_bytes(g, buffer.getvalue())
    return bent_bytes(g, buffer.getvalue()) if g.random() < 0.3 else buffer.getvalue()


def bent_file(g, path):
    """Another thing under the name: none, a folder, a link into nowhere; or the file under an odd name."""
    kind = int(g.integers(4))
    away = path.with_name(path.name + ".away")
    path.rename(away)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("nowhere")
    elif kind == 3:
        name = os.fsencode(path.parent) + b"/\xff\xe9 " + os.fsencode(path.name)
        away.rename(os.fsdecode(name))


BENT = {".json": bent_json, ".npz": bent_npz, ".pt": bent_pt, ".safetensors": bent_safetensors}
BENT |= dict.fromkeys((".csv", ".txt"), bent_lines)
BENT |= dict.fromkeys((".png", ".jpg", ".JPEG", ".webp"), bent_picture)


def damage(g, root, patterns):
    """Damages one or two of the files in a folder, chosen by patterns, each as likely; says which."""
    said = []
    for _ in range(1 + (g.random() < 0.2)):
        files = sorted(path for path in root.glob(pick(g, patterns)) if path.is_file())
        if not files:
            continue
        path, kind = pick(g, files), g.random()
        raw, bend = path.read_bytes(), BENT.get(path.suffix, bent_bytes)
        if kind < 0.08:
            bent_file(g, path)
            said.append(f"{path.name} moved")
            continue
        try:
            new = (bend if kind < 0.7 else bent_bytes)(g, raw)
        except Exception:  # damaged already
            new = bent_bytes(g, raw)
        path.unlink()  # a hard link
        path.write_bytes(new)
        said.append(f"{path.name} {'bent' if kind < 0.7 else 'bytes'}")
    return ", ".join(said)


# --- readers: how good files are made, which of them are damaged, and what reads them


def looked_at(samples):
    samples.digest, samples.group_name(0, 0), samples.prompt_line()
    for item in samples.items[:3]:
        with contextlib.suppress(Complaint):
            item.image()


def of_data(spec, **more):
    def read(root):
        looked_at(load_data(spec.format(root=root), **more))

    return read


def make_birds(root):
    test_train.birds(root, ["4 2 2 4", "2 2 2 2", "2 2 2 2"])


def make_table(root):
    lines = [f"{k}.png,{k % 2},{k // 2 % 2},{k % 3}" for k in range(24)]
    test_data.text(root / "table.csv", "path,y,place,split", *lines)
    test_data.text(root / "names.txt", "dog", "fox")
    test_data.text(root / "prompts.txt", "a photo of a {}.", "dog\ta good dog")
    test_data.text(root / "prompts.json", json.dumps(dict(dog=["a dog"], fox=["a fox", "one fox"])))
    test_data.touch(root, *[f"{k}.png" for k in range(24)])


def read_tables(root):
    for prompts in ("prompts.txt", "prompts.json"):
        looked_at(
            load_data(f"csv:{root / 'table.csv'}", str(root / "names.txt"), prompts=str(root / prompts))
        )


def make_predictions(root):
    lines = [f"{k}.png,{k % 2},{k // 3 % 2},{k // 2 % 2},0.{k % 9}" for k in range(24)]
    test_data.text(root / "said.csv", "path,y,predicted,place,confidence", *lines)
    test_data.text(root / "names.txt", "dog", "fox")


def read_predictions(root):
    data.load_predictions(str(root / "said.csv"), classes=str(root / "names.txt"))


def make_stored(root):
    z = np.random.default_rng(0).normal(size=(24, 5)).astype("float32")
    y = np.arange(24)
    arrays = dict(embedding=z, y=y % 2, place=y // 2 % 2, split=y % 3, text=z[:2], classes=["dog", "fox"])
    np.savez(root / "z.npz", **arrays, places=["a", "b"], foreground=y, background=y, logit_scale=100.0)


def read_stored(root):
    data.stored_arrays.cache_clear()
    samples = load_data(f"embeddings:{root / 'z.npz'}")
    looked_at(samples)
    items = data.stored_composites(str(root / "z.npz"))[0]
    encoder = model.load_encoder(f"embeddings:{root / 'z.npz'}", device="cpu")
    encoder.embed(samples.items), encoder.embed(items), encoder.facts
    if encoder.tokenizer:
        encoder.prompts(samples.class_prompts(), samples.classes)


def make_animals(root):
    test_data.animals(root / "LAION-final")
    test_data.text(root / "imagenet_names.txt", *[f"{k}\tname {k}" for k in range(1000)])


def make_nine(root):
    test_data.nine(root, 12)
    test_data.text(root / "in_to_in9.json", '{"151": 0, "152": 0, "407": 1, "999": -1}')


def make_digits(root):
    for name, n in (("train", 15000), ("t10k", 2500)):
        test_data.idx(root / f"{name}-images-idx3-ubyte", np.ones((n, 28, 28)))
        test_data.idx(root / f"{name}-labels-idx1-ubyte", np.arange(n) % 10)


def make_outlines(root):
    spec = test_eval.objects(root)
    path = root / "annotations/instances_train2017.json"
    tree = json.loads(path.read_text())
    for k, a in enumerate(tree["annotations"]):
        x, y, w, h = a["bbox"]
        a["id"], a["segmentation"] = k, [[x, y, x + w, y, x + w, y + h]]
        if k % 3 == 1:
            a["segmentation"] = dict(counts=[48 * 24, 200, 48 * 24 - 200], size=[48, 48])
        if k % 3 == 2:
            a["segmentation"] = dict(counts="04L4", size=[48, 48])
    path.write_text(json.dumps(tree))
    return spec


def read_outlines(root):
    notes = []
    for figure in data.coco_figures([str(root)], notes)[:6]:
        with contextlib.suppress(Complaint):
            figure.image()
    items = [data.Photo(str(path)) for path in sorted((root / "train2017").glob("*.png"))[:10]]
    file = root / "annotations/instances_train2017.json"
    regions = data.load_regions(f"coco:{file}", items, lambda w, h: (0, 0, 1, 1), True)[0]
    [(r.key(), r.in_frame()) for r in regions]


def read_coco(root):
    before, data.LEAST = data.LEAST, 1
    try:
        looked_at(load_data(f"coco:{root}", "cat,dog", feature="cup", strength=0.5))
    finally:
        data.LEAST = before


def make_regions(root):
    test_data.touch(root / "photos", *[f"{k}.png" for k in range(8)])
    (root / "masks").mkdir()
    for k in range(8):
        Image.new("L", (16, 12), 255).save(root / f"masks/{k}.png")
    lines = [f"{k}.png,0,0,{k + 2},6" for k in range(8)]
    test_data.text(root / "boxes.csv", "path,x1,y1,x2,y2", *lines)


def read_regions(root):
    items = [data.Photo(str(path)) for path in sorted((root / "photos").glob("*.png"))]
    for spec in (f"boxes:{root / 'boxes.csv'}", f"masks:{root / 'masks'}"):
        with contextlib.suppress(Complaint):
            for r in data.load_regions(spec, items, lambda w, h: (0, 0, 1, 1), bool(len(items) % 2))[0]:
                r.key(), r.in_frame(), r.weights(3, 3)
    data.load_foregrounds(f"masked:{root / 'photos'}:{root / 'masks'}", True)


def make_pictures(root):
    image = test_train.figure(0, 0)
    for name in ("a.png", "b.webp"):
        image.save(root / name)
    image.convert("RGB").save(root / "c.jpg")


def read_pictures(root):
    for parts in data.scan(root):
        path = os.path.join(root, *parts)
        photo = data.Photo(path)
        for look in (photo.image, photo.key, data.Cutout(path).image, data.Mask(path).image):
            with contextlib.suppress(Complaint):
                look()
        data.picture_size(photo)


FLAGS = dict(model="tiny", dtype="float32", device="cpu", threads=1)


@functools.cache
def shared():
    """A folder of small data, and what one run of each script on it leaves."""
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="flock-faults-"))
    import atexit

    atexit.register(shutil.rmtree, root, True)
    test_train.birds(root / "all", ["6 2 2 6", "6 6 6 6", "6 6 6 6"])
    for name in ("foregrounds", "backgrounds"):
        (root / name).mkdir()
    for k in range(12):
        test_train.figure(500 + k, k % 3).save(root / f"foregrounds/{k}.png")
        ground = np.random.default_rng(k).integers(40, 220, 3)
        test_train.ground(700 + k, ground).save(root / f"backgrounds/{k}.png")
    return root


def words(root, out, **flags):
    """The flags of a small run on shared()."""
    paths = {name: shared() / name for name in ("foregrounds", "backgrounds")}
    flags = dict(data=f"waterbirds:{shared() / 'all/set'}", cache_dir=shared() / "cache", **FLAGS) | flags
    return [f"--{k}={v}" for k, v in (flags | dict(out_dir=out)).items()], [
        f"--{k}={v}" for k, v in paths.items()
    ]


def start(name, root, out, **flags):
    mine, paths = words(root, out, **flags)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        code = run_script(HERE / f"{name}.py", mine + paths * (name == "train"))
    start.codes.append((code, said.getvalue()[-300:]))
    return code


start.codes = []


BAP = dict(instances=16, per_instance=2, own=0)
TUNE = dict(method="finetune", captions="class", pairs=8, steps=2, learning_rate=0.001)


def make_map(root):
    copied("map", root, lambda out: start("train", root, out, **BAP))


def read_map(root):
    state = model.load_checkpoint(root / "ckpt.pt")
    for head in model.load_heads(state).values():
        head(torch.zeros(2, len(state["map"]["W"])))
    start("eval", root, root / "out", ckpt=root / "ckpt.pt", protocol="ckpt")
    start("discover", root, root / "out", ckpt=root / "ckpt.pt", probe="bap", regions="grid:2", split="test")


def copied(name, root, make):
    """What make() leaves in a folder, made once, copied to root."""
    if not (shared() / name).exists():
        make(shared() / name)
        assert (shared() / name).exists(), start.codes[-1]
    shutil.copytree(shared() / name, root, dirs_exist_ok=True)


def make_discovery(root):
    flags = dict(method="all", regions="grid:2", split="train,val,test", k="3:6", skip_bad=True)
    copied("found", root, lambda out: start("discover", root, out, **flags))
    tree = json.loads((root / "discovery.json").read_text())
    for cluster in tree["clusters"]:  # two are spurious, whatever was found
        cluster["kept"] = cluster["id"] < 2
    (root / "discovery.json").write_text(json.dumps(tree))


def read_discovery(root):
    found = train.load_discovery(root)
    train.clusters_used(found), train.clusters_used(found, 1)
    samples = load_data(f"waterbirds:{shared() / 'all/set'}")
    encoder = model.load_encoder(
        "tiny", device="cpu", dtype="float32", threads=1, cache=str(shared() / "cache")
    )
    with contextlib.suppress(Complaint):
        grounds, _ = train.grounds_of(f"discovery:{root}", False)
        [ground.image() for ground in grounds[:3]]
    task = train.pairs_of(samples, "class", 8)
    train.discovered(samples, encoder, task, str(root), 0)
    start("train", root, root / "out", **TUNE | dict(method="ravl", steps=1, discovery=root))


def make_half(root):
    """What is left of runs that are interrupted after their first step, and their first seed."""

    def replaced(old, new, real=os.replace):
        real(old, new)
        if Path(new).name in train.PARTIAL:
            raise KeyboardInterrupt

    def interrupted(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replaced)
            for name, flags in HALVES.items():
                patch.chdir(shared())
                assert start("train", root, f"half/{name}", **flags) == 130

    copied("half", root / "half", interrupted)


HALVES = dict(tune=TUNE | dict(save_every=1), bap=BAP | dict(seeds=2))


def read_half(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, flags in HALVES.items():
            start("train", root, f"half/{name}", **flags, resume=True)


def make_weights(root):
    encoder = model.load_encoder("tiny", device="cpu")
    state = encoder.module.state_dict()
    (root / "w.safetensors").write_bytes(model.weights_bytes(encoder.module, config={}))
    torch.save(dict(model=state, step=3), root / "w.pt")
    tensors = {
        "visual.proj.lora_A.weight": torch.zeros(2, 64),
        "visual.proj.lora_B.weight": torch.zeros(64, 2),
    }
    for name, weights in (("model", state), ("adapter_model", tensors)):
        data.write(root / f"lora/{name}.safetensors", tensors_saved(weights))
    made = dict(lora_alpha=2, r=2, base_model_name_or_path="nowhere", use_dora=False)
    data.write_json(root / "lora/adapter_config.json", made)
    data.write_json(
        root / "timm/config.json", dict(architecture="resnet10t", num_classes=3, pretrained_cfg={})
    )
    data.write_json(
        root / "clip/open_clip_config.json", dict(model_cfg=model.TINY, preprocess_cfg=dict(mean=[0, 0, 0]))
    )
    data.write(root / "clip/open_clip_model.safetensors", tensors_saved(state))


def tensors_saved(state):
    from safetensors.torch import save

    return save({k: v.contiguous() for k, v in state.items()})


def read_weights(root):
    specs = [("tiny", root / name) for name in ("w.safetensors", "w.pt", "lora")]
    for name, path in [*specs, (f"local-dir:{root / 'clip'}", ""), (f"local-dir:{root / 'timm'}", "")]:
        with contextlib.suppress(Complaint):
            model.load_encoder(name, str(path), device="cpu", dtype="float32").module.eval()


def make_cache(root):
    start("eval", root, root / "out", cache_dir=root / "cache", protocol="probe")


def read_cache(root):
    start("eval", root, root / "out", cache_dir=root / "cache", protocol="probe")


def controlled(root):
    """The smallest run of the controlled settings: all that it makes lies below root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(data, "LEAST", 1)
        return start("eval", root, "out", **CONTROLLED, pretrained="none", cache_dir="cache")


CONTROLLED = dict(protocol="ravl", settings=1, steps=1, pairs=4, mitigate=1, regions="grid:2")
CONTROLLED |= dict(data="coco:coco", classes="cat,dog", feature="cup")


def make_protocol(root):
    def twice(out):
        out.mkdir()
        test_eval.objects(out / "coco")
        controlled(out)
        figures = out / "out/settings/0.99-0/finetune/figures.json"
        tree = json.loads(figures.read_text())
        figures.write_text(json.dumps(dict(tree, groups=[0.1, 0.9] * 2)))  # the feature was learned
        controlled(out)

    copied("protocol", root, twice)


READERS = {  # name: (writes good files into a folder, patterns of those that are damaged, reads them)
    "waterbirds": (make_birds, ["set/metadata.csv"], of_data("waterbirds:{root}/set", masks="")),
    "birds": (
        make_birds,
        ["set/*.png", "masks/*.png"],
        lambda root: looked_at(load_data(f"waterbirds:{root}/set", masks=str(root / "masks"))),
    ),
    "csv": (make_table, ["*.csv", "*.txt", "prompts.json", "*.png"], read_tables),
    "predictions": (make_predictions, ["*.csv", "*.txt"], read_predictions),
    "celeba": (test_data.faces, ["*.txt", "*/*.jpg"], of_data("celeba:{root}")),
    "counteranimal": (make_animals, ["*.txt", "*/*/*/*.jpg"], of_data("counteranimal:{root}", splits=False)),
    "in9": (make_nine, ["*.json", "*/*/*/*.JPEG"], of_data("in9:{root}", splits=False)),
    "cocogender": (test_data.people, ["annotations/*.json"], of_data("cocogender:{root}")),
    "coco": (make_outlines, ["annotations/*.json"], read_coco),
    "outlines": (make_outlines, ["annotations/*.json", "*/*.png"], read_outlines),
    "mnist": (make_digits, ["*"], of_data("digits:{root}")),
    "embeddings": (make_stored, ["*.npz"], read_stored),
    "regions": (make_regions, ["boxes.csv", "photos/*", "masks/*"], read_regions),
    "pictures": (make_pictures, ["*"], read_pictures),
    "map": (make_map, ["ckpt.pt"], read_map),
    "discovery": (make_discovery, ["*.json", "*.npz"], read_discovery),
    "weights": (make_weights, ["*.*", "lora/*", "clip/*", "timm/*"], read_weights),
    "cache": (make_cache, ["cache/*"], read_cache),
    "protocol": (
        make_protocol,
        [
            "out/*.json",
            "out/**/made.json",
            "out/**/figures.json",
            "out/**/discovery.*",
            "out/**/*.safetensors",
        ],
        controlled,
    ),
    "half": (make_half, ["half/*/*.pt"], read_half),
}


SLOW = "half", "discovery", "protocol", "mnist"  # of them one input by default


class Slow(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


def peak():
    """Bytes that this process held at most since the last reset()."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10


def fault_of(read, root):
    """What reading a folder ends in that is no value and no Complaint: a traceback, time, memory; or None."""

    def late(*_):
        raise Slow

    before = signal.signal(signal.SIGALRM, late)
    linux = os.path.exists("/proc/self/clear_refs")
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        held = peak()
    signal.alarm(10)
    try:
        read(root)
    except (Complaint, OSError):  # run() makes one line of either
        pass
    except Slow:
        return "10 s: " + "".join(traceback.format_exc().splitlines(True)[-4:])
    except (Exception, SystemExit) as problem:
        frames = [f for f in traceback.extract_tb(problem.__traceback__) if f.filename.startswith(str(HERE))]
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/tests/" not in f.filename]
        return f"{type(problem).__name__} at {' '.join(frames[-3:])}: {str(problem)[:120]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if linux and peak() - held > 1 << 30:
        return f"{(peak() - held) >> 20} MB"
    return None


def faults(name, good, folder, times, seed=0):
    """Of so many damaged copies of good files: {what went wrong: [number of the input]}."""
    make, patterns, read = READERS[name]
    wrong = {}
    for k in range(times):
        at = folder / str(k)
        shutil.copytree(good, at, copy_function=os.link)
        g = np.random.default_rng([seed, k])
        said = damage(g, at, patterns)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            problem = fault_of(read, at)
        if problem:
            wrong.setdefault(re.sub(r"\d{4,}", "N", problem), []).append(f"{k} ({said})")
        shutil.rmtree(os.fsencode(at))
    return wrong


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_input_is_a_value_or_one_line(tmp_path, name):
    good = tmp_path / "good"
    good.mkdir()
    READERS[name][0](good)
    used = shutil.copytree(good, tmp_path / "used")  # a run that is resumed leaves nothing to damage
    start.codes.clear()
    assert fault_of(READERS[name][2], used) is None and not any(code for code, _ in start.codes), start.codes
    wrong = faults(name, good, tmp_path, 150 if LARGE else 1 if name in SLOW else 4)
    assert not wrong, "\n".join(f"{what}: {len(k)} times, {k[:5]}" for what, k in wrong.items())


# --- runs that are killed, each in a process of its own, forked from one that has imported torch already

LEARNS = dict(base_steps=1, steps=8, pairs=8, learning_rate=0.003, seed=3)  # and discovery finds it, too
TUNED = TUNE | dict(steps=3, save_every=1)
RUNS = {  # name: (script, its flags, those with which the next run goes on)
    "map": ("train", BAP | dict(seeds=2), dict(resume=True)),
    "encoder": ("train", BAP | TUNED | dict(method="bap", train="last_blocks"), dict(resume=True)),
    "tune": ("train", TUNED, dict(resume=True)),
    "discover": ("discover", dict(method="all", regions="grid:2", split="train,val,test", k="3:6"), {}),
    "eval": ("eval", dict(models="tiny,tiny-conv", model="", protocol="zeroshot,probe"), {}),
    "settings": ("eval", CONTROLLED | LEARNS, {}),
}
NEEDY = [name for name, row in train.METHODS.items() if row.discovery]
RUNS |= {name: ("train", TUNED | dict(method=name), dict(resume=True)) for name in train.METHODS}
del RUNS["finetune"]
AIMED = "fsync", "replace", "unlink"


def forked(at, script, argv, aim):
    """A script, as from the command line in a folder. aim: where the process kills itself: (function of os,
    number of its call, whether behind it, signal, times)."""
    os.chdir(at)
    with open("said.txt", "w") as said:
        os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as it is when all is imported
    data.LEAST, calls = 1, Counter()
    torch.set_num_threads(1)

    def aimed(name, real, *args, **more):
        calls[name] += 1
        hit = aim is not None and aim[:2] == (name, calls[name])
        with contextlib.ExitStack() as end:
            for _ in range(aim[4] if hit else 0):
                end.callback(os.kill, os.getpid(), aim[3])
            if hit and not aim[2]:
                end.close()
            return real(*args, **more)

    for name in AIMED:
        setattr(os, name, functools.partial(aimed, name, getattr(os, name)))
    code = run_script(HERE / f"{script}.py", argv)
    Path("calls.json").write_text(json.dumps(calls))
    sys.exit(code)


@functools.cache
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{HERE / 'tests'}{os.pathsep}{HERE}")
        multiprocessing.forkserver.ensure_running()
    return context


@functools.cache
def needs(name):
    """Flags of what a run of RUNS reads and has to be made first."""
    at = shared() / "needs" / name
    if name in NEEDY:
        make_discovery(at)
        return dict(discovery=at)
    return dict(data=test_eval.objects(at).split()[0].partition("=")[2]) if name == "settings" else {}


def run_of(name, at, more=(), aim=None, late=None):
    """A run of RUNS in a folder: its exit code, or minus the signal that ended it; what it said; seconds.
    late: (signal, seconds after which it comes, and comes again)."""
    script, flags, _ = RUNS[name]
    mine, paths = words(None, "out", **dict(cache_dir="cache") | flags | needs(name) | dict(more))
    process = server().Process(target=forked, args=(at, script, mine + paths * (script == "train"), aim))
    process.start()
    begun = time.time()
    for pause in late[1:] if late else ():
        process.join(pause)
        if process.is_alive():
            os.kill(process.pid, late[0])
    process.join(600)
    code, seconds = process.exitcode, time.time() - begun
    if code is None:
        process.kill(), process.join()
    said = at / "said.txt"
    return code, said.read_text() if said.exists() else "", seconds


TIMES = "seconds total images_per_s resume files npz peak_gib made".split()


def bits(tree):
    """A tree of what is compared bit for bit: without times, and what is of the files' own bytes."""
    if isinstance(tree, dict):
        return {str(k): bits(v) for k, v in tree.items() if k not in TIMES}
    if isinstance(tree, (list, tuple)):
        return [bits(v) for v in tree]
    array = np.asarray(tree) if not isinstance(tree, torch.Tensor) else tree.numpy()
    return array.dtype.str, array.shape, model.sha256(array.tobytes())


def content(path):
    """What a whole file says; an exception of its reader if it is not whole."""
    raw, beside = path.read_bytes(), path.with_name
    if path.suffix == ".json":
        tree = json.loads(raw)
        files = tree.get("files", {}) | ({"discovery.npz": tree["npz"]} if "npz" in tree else {})
        assert all(model.file_digest(beside(k), "") == v for k, v in files.items()), "of another run"
        return bits(tree)
    if path.suffix in (".npz", ".npy"):
        return bits(dict(np.load(path)) if path.suffix == ".npz" else np.load(path))
    if path.suffix == ".pt":
        return bits(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        from safetensors.torch import load

        return len(load(raw)), model.sha256(raw)
    if path.suffix == ".csv":
        rows = list(csv.reader(raw.decode().splitlines()))
        assert raw.endswith(b"\n") and len({len(row) for row in rows}) == 1
        keep = [k for k, name in enumerate(rows[0]) if name not in TIMES]
        return [[row[k] for k in keep] for row in rows]
    if path.suffix == ".html":
        assert raw.rstrip().endswith(b"</html>")
        return ""
    if path.name.startswith("sha256-"):
        assert re.fullmatch("[0-9a-f]{64}", raw.decode())
        return ""
    assert path.name == "log.txt", path.name
    return ""


def files_of(at):
    """{name: content} of all that a run has left; what is not whole says so. And its temporary files."""
    left, leftovers = {}, []
    for path in sorted(path for top in ("out", "cache") for path in (at / top).rglob("*") if path.is_file()):
        name = re.sub("sha256-.*", "sha256", str(path.relative_to(at)))
        if path.suffix == ".tmp" or path.name == ".lock":
            leftovers.append(re.sub("[0-9a-f]{8}-.*tmp", "tmp", name))
            continue
        try:
            left[name] = content(path)
        except Exception as problem:
            left[name] = f"not whole: {type(problem).__name__} {problem}"
    return left, leftovers


def not_whole(left):
    return [f"{name} {text}" for name, text in left.items() if isinstance(text, str) and text]


@functools.cache
def undisturbed(name):
    """A folder with what a run of RUNS leaves, its files_of, its seconds, and how often it calls AIMED."""
    at = shared() / "runs" / name
    at.mkdir(parents=True)
    code, said, seconds = run_of(name, at)
    left, leftovers = files_of(at)
    assert code == 0 and not not_whole(left) and not leftovers, (said, not_whole(left), leftovers)
    return at, left, seconds, json.loads((at / "calls.json").read_text())


def trial(name, k, at):
    """Kills a run of RUNS once or twice, and lets the next go on: [(signal, aimed)], and what went wrong."""
    made, left, seconds, calls = undisturbed(name)
    g, wrong, kills, more = np.random.default_rng([k, zlib.crc32(name.encode())]), [], [], {}
    anew = not g.integers(4)  # over what an undisturbed run has left
    shutil.copytree(made, at) if anew else at.mkdir()
    for _ in range(1 + (g.random() < 0.3)):
        sig, twice, aim, late = pick(g, ["SIGKILL", "SIGTERM", "SIGINT"]), g.random() < 0.3, None, None
        sig, surely = sig if k else "SIGKILL", not k  # one is always killed before it renames
        if surely or g.random() < 0.5:
            call, cached = pick(g, sorted(calls)), anew * sum(path.startswith("cache") for path in left)
            call, behind = "replace" if surely else call, not surely and g.random() < 0.3
            aim = call, int(g.integers(calls[call] - cached)) + 1, behind, signal.Signals[sig], 1 + twice
        else:
            late = signal.Signals[sig], *(g.uniform(0, [seconds, 0.3])[: 1 + twice].tolist())
        code, said, _ = run_of(name, at, more, aim, late)
        kills.append(f"{sig}{' twice' * twice} {'aimed' if aim else 'random'}" + " (too late)" * (code == 0))
        if code not in (0, 130, -signal.Signals[sig]) or "Traceback" in said:
            wrong.append(f"exit code {code}: {said[-400:]}")
        wrong += not_whole(files_of(at)[0])
        more = RUNS[name][2]
    code, said, _ = run_of(name, at, more)
    if code:
        wrong.append(f"the next run's exit code {code}: {said[-400:]}")
    now, leftovers = files_of(at)
    wrong += [f"left: {path}" for path in leftovers] + not_whole(now)
    wrong += [f"differs: {path}" for path in sorted({*left, *now}) if left.get(path) != now.get(path)]
    return kills, [f"{anew=} {kills} {problem}" for problem in wrong]


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_while_a_script_imports_a_signal_ends_it_quietly(tmp_path, sig):
    command = [sys.executable, HERE / "discover.py", f"--out_dir={tmp_path / 'out'}", "--quiet"]
    how = dict(env=os.environ | dict(PYTHONVERBOSE="1"), stderr=subprocess.PIPE)
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not so in the background
    process = subprocess.Popen(command, preexec_fn=heard, **how)
    for line in process.stderr:  # torch has begun
        if b"torch/_utils" in line:
            process.send_signal(sig)
            break
    assert b"Traceback" not in process.stderr.read() and process.wait(60) == -sig
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RUNS if LARGE else ("map", "tune", "discover", "eval"))
def test_a_killed_run_leaves_whole_files_and_the_next_one_comes_to_the_same(tmp_path, name):
    counts, wrong = Counter(), []
    for k in range(1 if not LARGE else 12 if name == "settings" else 25):
        kills, problems = trial(name, k, tmp_path / str(k))
        counts.update(kills)
        wrong += [f"{k}: {problem}" for problem in problems]
        shutil.rmtree(tmp_path / str(k))
    print(name, dict(counts))
    assert not wrong, "\n".join(wrong)
