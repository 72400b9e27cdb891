"""model.py: encoders, embedding and its cache, the additive algebra, probes, metrics, checkpoints."""

import copy
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from math import comb
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms

import data
import model
from data import Complaint
from model import load_encoder, unit, with_map

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("FLOCK_DATA", "nowhere"))

# Made by scikit-learn 1.9.1: LogisticRegression(C=1 / (l2 * n), class_weight="balanced", tol=1e-10,
# max_iter=10**5).fit((x - x.mean(0)) / x.std(0, ddof=1).mean(), y) of random x, y; "weighted" with
# sample_weight=weight / weight.mean() instead. l1_*: LogisticRegression(C=C, l1_ratio=1, solver="saga",
# tol=1e-12, max_iter=10**6).fit(StandardScaler().fit_transform(x), y)
PROBES = json.loads((Path(__file__).parent / "fixtures/probes.json").read_text())

TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
VIT = dict(image_size=48, layers=3, width=32, patch_size=16, head_width=16)
RN50 = dict(image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)
TIMM = dict(timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="", timm_proj="linear")
TOWERS = {"flock-vit": VIT, "flock-rn": RN50, "flock-timm": {**TIMM, "image_size": 160}}


def complaint(*words):
    """Expects a Complaint of one line that contains each of the words."""
    each = "".join(f"(?=.*{re.escape(str(word))})" for word in words)
    return pytest.raises(Complaint, match=rf"(?s)^{each}[^\n]*$")


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


class Noise(data.Picture):
    """A picture that needs no file: noise of seed k; broken as a file that cannot be read."""

    def __init__(self, k, wait=0.0, broken=False, size=64):
        self.k, self.wait, self.broken, self.size = k, wait, broken, size

    def key(self):
        return f"noise {self.k}|{self.size}"

    def image(self):
        time.sleep(self.wait)
        if self.broken:
            raise Complaint(f"noise {self.k}: cannot be decoded")
        pixels = np.random.default_rng(self.k).integers(0, 256, (self.size, self.size, 3), "uint8")
        return Image.fromarray(pixels)


class Once(Noise):
    def image(self):
        raise AssertionError("decoded although it is in the cache")


@pytest.fixture(scope="module")
def get(tmp_path_factory):
    """Name -> encoder, made once: lite0, those of flock, timm's, open_clip's kinds of towers made small."""
    folder = tmp_path_factory.mktemp("configs")
    for name, tower in TOWERS.items():
        config = dict(embed_dim=24, vision_cfg=tower, text_cfg=TEXT)
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)

    @functools.cache
    def made(name):
        return load_encoder(name, "" if name == "lite0" else "none", device="cpu", dtype="float32")

    return made


def batch(encoder, n=3):
    return torch.stack([encoder.transform(Noise(k, size=180).image()) for k in range(n)])


@torch.inference_mode()
def maps(encoder, x):
    return with_map(encoder.module, encoder.kind, x)[1]


def embed(encoder, pictures, cache="", compute=None, part="", rows=None, **how):
    how = dict(device="cpu", dtype="float32", batch=4, threads=2, cache=cache and str(cache)) | how
    return encoder.embeds_with(**how).embed(pictures, "noise", compute, part, rows)


def unloadable(name, *more, **how):
    """An encoder that fails when it loads its weights."""
    encoder = load_encoder(name, *more, device="cpu", **how)
    encoder.build = functools.partial(pytest.fail, "weights are loaded although all is in the cache")
    return encoder


# --- encoders


@pytest.mark.skipif(not (DATA / "imagenet_samples").is_dir(), reason="FLOCK_DATA has no imagenet_samples")
def test_lite0_classifies_imagenet_photos(get):
    root = DATA / "imagenet_samples"
    photos = [data.Photo(str(root.joinpath(*parts))) for parts in data.scan(root)]
    assert len(photos) == 1000
    z = embed(get("lite0"), photos[::3], threads=0)
    rows, bias = get("lite0").classifier()
    right = (z @ rows.T + bias).argmax(1) == torch.arange(0, 1000, 3)
    assert float(right.double().mean()) >= 0.8


def test_lite0_preprocesses_as_tensorflow_does(get):
    transform = get("lite0").transform
    grey = transform(Image.new("RGB", (500, 300), (127, 255, 0)))
    assert grey.shape == (3, 224, 224)
    assert torch.allclose(grey.mean((1, 2)), torch.tensor([0.0, 1.0, -127 / 128]), atol=1e-5)
    frame = np.zeros((256, 256, 3), "uint8")
    frame[17:-17, 17:-17] = 255  # 0.875 of 256 is 224: the crop begins 16 pixels from the edge
    shown = transform(Image.fromarray(frame))
    assert (shown[:, 3:-3, 3:-3] > 0.9).all() and (shown[:, 0] < 0).all()


def test_lite0_has_a_classifier_and_no_text_tower(get):
    lite0 = get("lite0")
    assert (lite0.facts["dim"], lite0.facts["logit_scale"], lite0.tokenizer) == (1280, None, None)
    rows, bias = lite0.classifier()
    assert lite0.facts["rows"] and rows.shape == (1000, 1280) and bias.shape == (1000,)
    with complaint("--model=lite0", "no text tower"):
        lite0.texts(["a bird"])


def test_lite0_with_folded_norms_gives_what_the_module_gives(get):
    lite0, x = get("lite0"), batch(get("lite0"), 2)
    assert lite0.fast is not lite0.module
    with torch.inference_mode():
        z, whole = lite0.run(x, "float32"), model.embeddings(lite0.module, "timm", x)
    assert torch.allclose(z, whole, atol=1e-3 * float(z.max()))


def test_lite0_s_weights_wrong_or_missing_are_named_when_they_are_needed(monkeypatch):
    encoder = load_encoder("lite0", device="cpu")
    monkeypatch.setattr(model, "LITE0_SHA256", "0" * 64)
    with complaint("efficientnet-lite0-57934424.pth", "SHA-256", "pip install --force-reinstall"):
        encoder.module.eval()
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with complaint("--model=lite0", "pip install"):
        encoder.module.eval()


TIMMS = ("test_vit", "test_efficientnet", "test_convnext", "test_byobnet", "test_resnet", "resnet18")


@pytest.mark.parametrize("name", ["lite0", *(f"timm:{name}" for name in TIMMS)])
def test_timm_maps_have_one_row_of_the_embedding_per_cell(name, get):
    encoder, x = get(name), batch(get(name), 2)
    m, z = maps(encoder, x), encoder.run(x, "float32")
    side = x.shape[2] // (16 if "vit" in name else 32)
    assert m.shape == (2, side, side, z.shape[1])
    if "vit" not in name and "convnext" not in name:  # pooled by the mean, nothing after it
        assert torch.allclose(m.mean((1, 2)), z, atol=1e-4 * max(1, float(z.abs().max())))


@pytest.mark.parametrize("name", ["flock-vit", "flock-timm", "tiny", "timm:test_vit"])
def test_maps_show_each_place_in_its_own_cell(name, get):
    encoder, x = get(name), batch(get(name), 1)
    m = maps(encoder, x)
    h, w = m.shape[1:3]
    p = x.shape[2] // h
    for r, c in ((0, w - 1), (h - 1, 0), (1, 2)):
        y = x.clone()
        y[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p] += 3
        change = (maps(encoder, y) - m).norm(dim=3)[0]
        assert divmod(int(change.argmax()), w) == (r, c)


def squeezing():
    """An encoder of which only the transform is wanted: SigLIP's, which squeezes the whole picture."""
    record = timm.get_pretrained_cfg("vit_base_patch16_siglip_224").to_dict()
    config = timm.data.resolve_data_config({}, pretrained_cfg=record)
    return types.SimpleNamespace(transform=timm.data.create_transform(**config))


@pytest.mark.parametrize("name", ["lite0", "tiny", "flock-vit", "timm:test_vit", "siglip"])
@pytest.mark.parametrize("size", [(256, 256), (500, 300), (210, 420)])
def test_frame_is_the_box_that_the_network_sees(name, size, get):
    encoder = squeezing() if name == "siglip" else get(name)
    frame = model.Encoder.frame(encoder, *size)
    left, top, right, bottom = (round(v * n) for v, n in zip(frame, size * 2, strict=True))
    black = encoder.transform(Image.new("RGB", size))

    def seen(a, b, axis):
        """How bright the network sees a white bar from a to b across the picture."""
        image = Image.new("RGB", size)
        image.paste("white", (0, a, size[0], b) if axis else (a, 0, b, size[1]))
        return float((encoder.transform(image) - black).abs().max()) if b > a else 0.0

    for axis, low, high in ((0, left, right), (1, top, bottom)):
        white = seen(0, size[axis], axis)
        assert max(seen(0, low - 6, axis), seen(high + 6, size[axis], axis)) < 0.05 * white
        assert min(seen(low, low + 6, axis), seen(high - 6, high, axis)) > 0.3 * white


def test_frame_of_a_squeeze_and_a_crop():
    steps = transforms.Compose([transforms.Resize((100, 200)), transforms.CenterCrop((80, 100))])
    frame = model.Encoder.frame(types.SimpleNamespace(transform=steps), 640, 480)
    assert frame == pytest.approx((0.25, 0.1, 0.75, 0.9))


def test_maps_of_a_clip_transformer_are_its_patches_after_the_norm_and_projection(get, monkeypatch):
    visual, x = get("flock-vit").module.visual, batch(get("flock-vit"))
    z, m = get("flock-vit").run(x, "float32"), maps(get("flock-vit"), x)
    monkeypatch.setattr(visual, "output_tokens", True)
    with torch.inference_mode():
        pooled, tokens = visual(x)  # [3, D], [3, 9, W]
        assert torch.allclose(m, (tokens @ visual.proj).unflatten(1, (3, 3)), atol=1e-5)
    assert torch.allclose(z, pooled, atol=1e-5)


KINDS = ["lite0", "flock-vit", "flock-rn", "flock-timm", "tiny", "timm:test_vit"]


@pytest.mark.parametrize("name", KINDS)
def test_map_and_embedding_come_from_one_differentiable_pass(name, get):
    encoder, x = get(name), batch(get(name), 2).requires_grad_()
    z, m = with_map(encoder.module, encoder.kind, x)
    assert m.shape[0] == 2 and m.shape[3] == z.shape[1]
    assert torch.allclose(z, encoder.run(x, "float32"), atol=1e-3 * float(z.abs().max()))
    for out in (z, m):
        (g,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        assert g.isfinite().all() and g.abs().max() > 0


def test_a_cell_of_clip_s_resnet_is_what_attention_over_it_alone_gives(get):
    visual, x = get("flock-rn").module.visual, batch(get("flock-rn"), 2)
    pool = copy.deepcopy(visual.attnpool)
    pool.positional_embedding = nn.Parameter(torch.zeros(2, pool.v_proj.in_features))
    with torch.inference_mode():
        cell = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))[:, :, 1:, :1]
        alone, m = pool(cell), maps(get("flock-rn"), x)
    assert torch.allclose(m[:, 1, 0], alone, atol=1e-4 * float(m.abs().max()))


def test_a_cell_is_what_attention_pooling_makes_of_it_alone():
    vit = timm.create_model("test_vit", global_pool="map", class_token=False).eval()  # as SigLIP pools
    x = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        z, m = with_map(vit, "timm", x)
        patch = vit.forward_features(x)[1:, 23:24]
        assert torch.allclose(m[1, 2, 3], vit.forward_head(patch, pre_logits=True)[0], atol=1e-5)
    assert z.shape == (2, 64)


@pytest.mark.parametrize("name, side", [("flock-vit", 3), ("flock-rn", 2), ("flock-timm", 10), ("tiny", 8)])
def test_open_clip_models_embed_images_maps_and_texts_in_one_space(name, side, get):
    encoder, x = get(name), batch(get(name))
    dim = encoder.facts["dim"]
    assert encoder.run(x, "float32").shape == (3, dim) and maps(encoder, x).shape == (3, side, side, dim)
    t = encoder.texts(["a bird", "a bird", "the sea"])
    assert t.shape == (3, dim) and torch.allclose(t.norm(dim=1), torch.ones(3))
    assert torch.allclose(t[0], t[1], atol=1e-6) and not torch.allclose(t[0], t[2], atol=1e-3)
    assert encoder.facts["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-3)
    with complaint(f"--model={name}", "no linear classifier"):
        encoder.classifier()


def test_texts_in_blocks_keep_their_order(get):
    prompts, some = [f"picture {k}" for k in range(300)], [0, 255, 256, 299]
    alone = get("tiny").texts([prompts[k] for k in some])
    assert torch.allclose(get("tiny").texts(prompts)[some], alone, atol=1e-5)


def test_prompts_of_a_label_are_averaged_as_unit_embeddings(get):
    prompts = [["a gull.", "a photo of a gull.", "gull"], ["a wren."]]
    for row, texts in zip(get("tiny").prompts(prompts), prompts, strict=True):
        assert torch.allclose(row, unit(get("tiny").texts(texts).mean(0)), atol=1e-5)


def test_a_tokenizer_that_cannot_be_loaded_is_one_line_with_a_cure(monkeypatch):
    encoder = load_encoder("tiny", device="cpu")
    encoder.tokenizer = functools.partial(pytest.fail, "no sentencepiece\nmore", pytrace=False)
    encoder.tokenizer = functools.partial(timm.create_model, "no such model")
    with complaint("--model=tiny", "tokenizer cannot be loaded", "pip install transformers"):
        encoder.texts(["a bird"])


@pytest.mark.parametrize("name, side", [("tiny-conv", 56), ("lite0-clip", 224)])
def test_small_clips_give_a_map_whose_mean_is_the_embedding(name, side, get):
    encoder, x = get(name), batch(get(name), 2)
    z, m = with_map(encoder.module, encoder.kind, x)
    assert x.shape[2] == side and m.shape[:3] == (2, 7, 7) and torch.allclose(m.mean((1, 2)), z, atol=1e-5)
    assert encoder.texts(["a", "b"]).shape == (2, z.shape[1])


def test_a_cell_of_tiny_conv_sees_32_pixels_and_none_outshouts_the_others(get):
    module, x = get("tiny-conv").module, torch.rand(1, 3, 56, 56)
    there = x.clone()
    there[:, :, 28:, 28:] = 0
    changed = (maps(get("tiny-conv"), x) != maps(get("tiny-conv"), there)).any(-1)[0]
    assert not changed[:2].any() and not changed[:, :2].any() and changed[3:, 3:].all()
    features = module.visual.trunk.forward_features
    assert features(1e4 * x).norm(dim=1).max() < 96**0.5 + 1e-3 and features(0 * x).norm() == 0


def test_rows_of_a_network_with_more_behind_its_embedding_are_no_classifier():
    net = timm.create_model("test_resnet", num_classes=1000)
    build, whole = (lambda: net), type(net).forward
    parts = "timm", build, open_clip.image_transform(64, is_train=False), "", ""
    assert model.Encoder("plain", *parts).embeds_with("cpu").facts["rows"]
    net.forward = lambda x: whole(net, x) + torch.linspace(0, 1, 1000)
    encoder = model.Encoder("more", *parts).embeds_with("cpu")
    net.__class__.__deepcopy__ = None
    assert not encoder.facts["rows"]
    with complaint("more", "no linear classifier"):
        encoder.classifier()


def trained_norms(module):
    for k, m in enumerate(module.modules()):
        if isinstance(m, nn.BatchNorm2d):
            for v in (m.running_mean, m.weight.data, m.bias.data):
                v.add_(0.2 * gaussian(len(v), seed=k).float())
            m.running_var.mul_(1.5)
    return module.eval()


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet"])
def test_folding_keeps_the_output_with_fewer_norms(name):
    module = trained_norms(timm.create_model(name))
    fused, x = model.fused(module), gaussian(2, 3, 160, 160).float()
    before, after = (sum(isinstance(k, nn.BatchNorm2d) for k in m.modules()) for m in (module, fused))
    with torch.inference_mode():
        a, b = module.forward_features(x), fused.forward_features(x)
    assert after < before and torch.allclose(a, b, atol=2e-3 * float(a.abs().max()))


def test_folding_is_undone_where_the_parts_run_in_another_order():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward_features(self, x):
            return self.conv(self.norm(x).relu())

    module = trained_norms(Swapped())
    assert model.fused(module) is module and isinstance(module.norm, nn.BatchNorm2d)


# --- the fingerprint


def test_fingerprint_depends_on_the_file_s_bytes_and_not_on_its_path(tmp_path, get):
    state = {k: v.contiguous() for k, v in get("tiny").module.state_dict().items()}
    (tmp_path / "elsewhere").mkdir()
    same = str(tmp_path / "a.safetensors"), str(tmp_path / "elsewhere/b.safetensors")
    for path in same:
        save_file(state, path)
    state["logit_scale"] = state["logit_scale"] + 0.5
    save_file(state, tmp_path / "c.safetensors")
    a, b = (load_encoder("tiny", path).fingerprint for path in same)
    c = load_encoder("tiny", str(tmp_path / "c.safetensors")).fingerprint
    assert a == b and len({a, c, get("tiny").fingerprint}) == 3


def test_fingerprint_depends_on_activation_and_preprocessing_which_have_no_weights(tmp_path, get):
    state = {k: v.contiguous() for k, v in get("flock-vit").module.state_dict().items()}
    path, how = str(tmp_path / "w.safetensors"), ("auto", "on", "off")
    save_file(state, path)
    auto, on, off = (load_encoder("flock-vit", path, quick_gelu=choice).fingerprint for choice in how)
    assert auto == off != on
    darker = load_encoder("flock-vit", path)
    darker.digest, seen = "same", {}
    for mean in ([0.5, 0.5, 0.5], [0.4, 0.4, 0.4]):
        record = dict(preprocess=dict(mean=mean))
        save_file(state, path, dict(record=json.dumps(record)))
        encoder = load_encoder("flock-vit", path)
        encoder.digest = "same"
        seen[mean[0]] = encoder.fingerprint
    assert len({darker.fingerprint, *seen.values()}) == 3
    sized = {load_encoder(f"timm:{name}", "none").fingerprint for name in ("test_vit", "test_vit2")}
    assert len(sized) == 2


def test_another_module_has_another_fingerprint_and_cache_only_with_a_digest(tmp_path, get):
    encoder = load_encoder("tiny", device="cpu", cache=str(tmp_path))
    other = copy.deepcopy(encoder.module)
    nn.init.zeros_(other.visual.proj)
    changing, kept = encoder.with_module(other), encoder.with_module(other, "digest")
    assert (changing.cache, kept.cache) == ("", str(tmp_path)) and encoder.cache == kept.cache
    assert len({encoder.fingerprint, kept.fingerprint, changing.fingerprint}) == 3
    assert not kept.embed([Noise(0)]).any() and encoder.embed([Noise(0)]).any()


def test_file_digest_is_remembered_by_path_size_and_times(tmp_path, monkeypatch):
    path, cache = tmp_path / "w.pt", str(tmp_path / "cache")
    path.write_bytes(b"one")
    first = model.file_digest(path, cache)
    assert first == model.sha256(b"one") and model.file_digest(path, "") == first
    (note,) = Path(cache).iterdir()
    note.write_text("a" * 64)  # what is remembered is believed: nothing is hashed
    assert model.file_digest(path, cache) == "a" * 64
    note.write_text("damaged")
    assert model.file_digest(path, cache) == first
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 0))
    assert model.file_digest(path, cache) == model.sha256(b"two")


def test_file_digest_of_a_blob_of_the_hub_is_its_name_and_reads_nothing(tmp_path):
    blob, link = tmp_path / "blobs" / ("0123456789abcdef" * 4), tmp_path / "snapshots/model.safetensors"
    blob.parent.mkdir()
    link.parent.mkdir()
    blob.write_bytes(b"not what its name says")
    link.symlink_to(blob)
    assert model.file_digest(link, "") == model.file_digest(blob, str(tmp_path / "c")) == blob.name
    assert not (tmp_path / "c").exists()
