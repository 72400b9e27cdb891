"""Would it run on a GPU? Real values on the CPU, in tensors that say they are on one.

A Gpu holds a CPU tensor and calls itself cuda:0. What is computed from one is one; .to(), .cpu() and
factories with device= go from side to side. Refused: tensors of both sides in one op, a CPU tensor indexed by
a Gpu, a generator of the CPU, numpy(), and index_add_, whose sums differ from run to run on a GPU. Counted:
waits, where the CPU asks what the GPU has not yet computed, or copies without non_blocking.
"""

import collections
import contextlib
import json
import os
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import data
import discover
import model
import train
from data import Complaint
from model import load_encoder, unit

pytestmark = pytest.mark.ahead
ROOT = Path(__file__).parent.parent
GPU, WAITS = torch.device("cuda:0"), collections.Counter()
LARGE = bool(os.environ.get("FLOCK_LARGE"))  # all methods, and discover.py as published
KNOWS_SIZE = (
    "_local_scalar_dense nonzero _unique2 unique_dim bincount masked_select repeat_interleave equal".split()
)


class Refused(RuntimeError):
    pass


def on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


class Gpu(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = (property(lambda t, v=v: v) for v in (GPU, True, False))

    @staticmethod
    def __new__(cls, inner):
        like = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)

    def __init__(self, inner):
        self.inner = inner

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    def to(self, *args, device=None, non_blocking=False, **more):
        args = [v for a in args for v in ((a.device, a.dtype) if isinstance(a, torch.Tensor) else (a,))]
        device = next((a for a in args if isinstance(a, (str, torch.device))), device)
        args = [a for a in args if isinstance(a, torch.dtype)]
        t = super().to(*args, **more) if args or more else self
        return t if device is None or on_gpu(device) else Down.apply(t)

    def cpu(self):
        return self.to("cpu")

    def __format__(self, spec):
        return format(self.item(), spec)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise Refused("numpy() of a tensor on a GPU")

    def new_tensor(self, values, **more):
        return torch.tensor(values, device=GPU, **dict(dtype=self.dtype) | more)

    @classmethod
    def __torch_dispatch__(cls, op, kinds, args=(), kwargs=None):
        return computed(op, args, kwargs or {})


class Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        WAITS[".cpu()"] += 1
        return t.inner.clone()

    @staticmethod
    def backward(ctx, slope):
        return Gpu(slope)


def computed(op, args, kwargs):
    """op(*args, **kwargs), as a GPU would."""
    leaves, name = tree_leaves((args, kwargs)), op._schema.name.removeprefix("aten::")
    here = [t for t in leaves if isinstance(t, Gpu)]
    there = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, Gpu)]
    if not here and not on_gpu(kwargs.get("device")):
        return op(*args, **kwargs)
    copies, indexes = (
        name in ("copy_", "_to_copy"),
        name.startswith(("index.", "index_put", "_index_put", "index")),
    )
    indexes = indexes and isinstance(args[0], Gpu) and not isinstance(args[1], int)
    if here and not copies and any(t.dim() for t in there) and not indexes:
        raise Refused(f"{name}: {len(here)} tensors on the GPU, {len(there)} on the CPU")
    if any(isinstance(v, torch.Generator) for v in leaves):
        raise Refused(f"{name}: a generator of the CPU")
    if name in ("index_add", "index_add_", "sparse_addmm", "_sparse_addmm"):
        raise Refused(f"{name}: sums in another order each time")
    masks = indexes and any(t.dtype == torch.bool for t in leaves[1:] if isinstance(t, torch.Tensor))
    waits = name in KNOWS_SIZE or masks or indexes and any(t.dim() for t in there)
    WAITS[name] += bool(waits or (copies and there and not (kwargs.get("non_blocking") or True in args[2:])))
    inner, more = tree_map(lambda v: v.inner if isinstance(v, Gpu) else v, (args, kwargs))
    more = {k: "cpu" if k == "device" else v for k, v in more.items() if k != "pin_memory"}
    out = op(*inner, **more)
    written = [
        v for v, a in zip(args, op._schema.arguments, strict=False) if a.alias_info and a.alias_info.is_write
    ]
    written += [v for k, v in kwargs.items() if k == "out"]
    if written and isinstance(out, torch.Tensor):
        return written[0]
    return tree_map(lambda v: Gpu(v) if isinstance(v, torch.Tensor) else v, out)


class Machine(TorchDispatchMode):
    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        return computed(op, args, kwargs or {})


def later(make):
    """torch.tensor and its like, which ask the driver for a device."""

    def made(*args, device=None, **more):
        return make(*args, **more) if device is None else make(*args, **more).to(device)

    return made


def grad(on):
    """Gradients on or off; whether they were on. Inference mode, which knows no such tensors, is no more."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(on)
    return before


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU: with gpu(): ..."""
    empty, autocast, convert = torch.empty, torch.autocast, torch.__future__
    monkeypatch.setenv("FLOCK_KERNELS", "torch")
    patches = dict(is_available=lambda: True, device_count=lambda: 1, is_bf16_supported=lambda **_: True)
    for name, value in dict(patches, _lazy_init=lambda: None, empty_cache=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "tensor", later(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", later(torch.as_tensor))
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
    monkeypatch.setattr(torch, "autocast", lambda _, *args, **more: autocast("cpu", *args, **more))
    monkeypatch.setattr(F, "one_hot", lambda k, n: torch.eye(n, dtype=torch.long, device=k.device)[k])
    monkeypatch.setattr(torch.inference_mode, "__enter__", lambda i: setattr(i, "grad", grad(not i.mode)))
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda i, *_: torch.set_grad_enabled(i.grad))
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None)
    convert.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    WAITS.clear()
    yield Machine
    torch._C._set_only_lift_cpu_tensors(False)
    convert.set_overwrite_module_params_on_conversion(False)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MISTAKES = {
    "both sides in one op": lambda: Gpu(drawn(3)) + drawn(3),
    "labels left behind": lambda: drawn(9, 4)[Gpu(torch.tensor([1, 2]))],
    "a factory without device=": lambda: F.cross_entropy(Gpu(drawn(4, 2)), torch.zeros(4).long()),
    "the wrong generator": lambda: torch.rand(3, device=GPU, generator=torch.Generator()),
    "numpy()": lambda: Gpu(drawn(3)).numpy(),
    "sums in any order": lambda: Gpu(drawn(3)).index_add_(0, Gpu(torch.tensor([0])), Gpu(drawn(1))),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught(name, gpu):
    with gpu(), pytest.raises(Refused):
        MISTAKES[name]()


def test_waits_are_counted(gpu):
    with gpu():
        x = torch.zeros(4, 3, device=GPU)
        assert not WAITS.total()
        for wait in (
            lambda: x.sum().item(),
            lambda: x.cpu(),
            lambda: x[x[:, 0] > 0],
            lambda: drawn(3).to(GPU),
        ):
            before = WAITS.total()
            wait()
            assert WAITS.total() == before + 1
        drawn(3).to(GPU, non_blocking=True)
        assert WAITS.total() == before + 1


Z, FORE, BACK, G = drawn(60, 6), torch.arange(60) % 12, torch.arange(60) // 12, torch.arange(60) % 4
Y2, Y3, RIGHT = (Z[:, 0] + Z[:, 1] > 0).long(), torch.arange(60) % 3, Z[:, 2] > 0
KIND = types.SimpleNamespace(places="ab", y=Y2, worst="worst_group", group=lambda: G)
KIND.counts = lambda: torch.tensor([9, 1, 2, 8]).expand(3, 4)


def predicted(probe, x):
    return probe.logits(x)


FUNCTIONS = {  # of the tensors z, i, j, g, y2, y3, right on one side
    "additive_solve": lambda z, i, j, *_: model.additive_solve(z, i, j),
    "sums": lambda z, i, *_: model.sums(z, i, 14),
    "sphere_log": lambda z, *_: model.sphere_log(z),
    "additivity": lambda z, i, j, *_: model.additivity(unit(z), i, j),
    "cos_sum": lambda z, *_: model.cos_sum(z, z.flip(0), z + 1),
    "features": lambda z, *_: model.features(z, 0.5),
    "mean_std": lambda z, *_: model.mean_std(z),
    "fit_probe": lambda z, i, j, g, y, *_: model.fit_probe(z, y).logits(z),
    "fit_probe, three classes": lambda z, i, j, g, y, y3, right: model.fit_probe(z, y3).logits(z),
    "fit_probe, few rows": lambda z, i, j, g, y, *_: model.fit_probe(z[:5], y[:5], classes=2).logits(z),
    "fit_l1_probe": lambda z, i, j, g, y, *_: model.fit_l1_probe(z, y).logits(z),
    "dfr": lambda z, i, j, g, y, *_: model.dfr(z, y, g, 0, retrains=2).logits(z),
    "group_metrics": lambda z, i, j, g, y, y3, right: model.group_metrics(
        right, KIND, i.new_tensor(range(60))
    ),
    "worst_group": lambda z, i, j, g, y, y3, right: model.worst_group(right, g),
    "paired_bootstrap": lambda z, i, j, g, y, y3, right: model.paired_bootstrap(right, ~right, g),
    "wiener": lambda z, i, *_: train.wiener([(0.5, z, i), (0.5, z, i)]).W,
    "nullspace, leace": lambda z, i, j, *_: [train.nullspace(z, i, j, 2).W, train.leace(z, i, j, 2).W],
    "contrast": lambda z, i, j, *_: train.contrast(train.wiener([(1.0, z, i)]), z, i, j, 0, 3, 1e-2).W,
    "kmedoids": lambda z, *_: [c.labels for c in discover.kmedoids(unit(z), [4, 3], 0).values()],
    "domino": lambda z, i, j, g, y, y3, right: discover.mixture(z.double(), y, F.one_hot(y3, 3), 4, 0, 5)[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_stay_on_their_device_and_give_what_a_cpu_gives(name, gpu):
    cpu = Z, FORE, BACK, G, Y2, Y3, RIGHT
    wanted = tree_leaves(FUNCTIONS[name](*cpu))
    with gpu():
        got = tree_leaves(FUNCTIONS[name](*[v.to(GPU) for v in cpu]))
        assert all(isinstance(v, Gpu) for v in got if isinstance(v, torch.Tensor))
        got = [v.cpu() if isinstance(v, torch.Tensor) else v for v in got]
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6) if isinstance(a, torch.Tensor) else a == pytest.approx(b)


def test_a_round_of_k_medoids_waits_once(gpu):
    x, rounds = unit(drawn(400, 8)), []
    with gpu():
        m = discover.Medoids(x.to(GPU), torch.arange(12, device=GPU))
        update = m.update
        m.update = lambda: rounds.append(1) or update()
        before = WAITS.total()
        m.settle()
        assert len(rounds) > 1 and WAITS.total() - before == len(rounds) + 1  # in the last nothing moves


class Noise(data.Picture):
    def __init__(self, k, bad=False):
        self.k, self.bad = k, bad

    def key(self):
        return f"noise {self.k}"

    def image(self):
        if self.bad:
            raise Complaint(f"noise {self.k}: cannot be decoded")
        pixels = torch.randint(256, (70, 60, 3), generator=torch.Generator().manual_seed(self.k))
        return data.Image.fromarray(pixels.byte().numpy())


def tiny(**how):
    return load_encoder("tiny", **dict(device="cpu", dtype="float32", batch=4, threads=2) | how)


def test_embeddings_are_those_of_a_cpu_with_a_wait_a_batch_at_most(gpu, monkeypatch, capsys):
    monkeypatch.setattr(model, "CHUNK", 8)
    pictures = [Noise(k, k in (2, 9)) for k in range(19)]
    boxes = [data.Regions(p, ((0, 0, 0.5, 1), (0.2, 0.2, 1, 1)), (0, 0, 1, 1)) for p in pictures]
    wanted = tiny(skip_bad=True).embed(pictures), *model.region_embeddings(tiny(skip_bad=True), boxes)
    with gpu():
        encoder = tiny(device="cuda", skip_bad=True)
        _ = encoder.facts, encoder.fast
        WAITS.clear()
        list(encoder.stream(pictures, [1] * 19, [range(8), range(8, 16), range(16, 19)], None, NO_BAR))
        assert 0 < WAITS.total() <= 5, WAITS  # batches
        got = encoder.embed(pictures), *model.region_embeddings(encoder, boxes)
        texts = encoder.prompts([["a", "b"], ["c"]])
        assert all(isinstance(v, Gpu) for v in (*got, texts))
        got = [v.cpu() for v in got]
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5, equal_nan=True) and a.isnan().any()


NO_BAR = types.SimpleNamespace(update=lambda n: None)


def test_training_images_stay_on_the_gpu_while_they_fit_and_then_in_memory(gpu, monkeypatch):
    size = 56 * 56 * 3
    monkeypatch.setattr(train, "ROOM_GPU", 2 * size)
    monkeypatch.setattr(train, "ROOM", size)
    pictures = [Noise(k) for k in range(6)]
    with gpu():
        encoder = tiny(device="cuda")
        feed = train.Feed(pictures, encoder)
        for ids in ([0, 1, 0], [2, 3, 1], [2, 4, 0]):
            feed.ahead(torch.tensor(ids))
            wanted = torch.stack([encoder.transform(pictures[k].image()) for k in ids])
            assert torch.equal(feed.get().cpu(), wanted)
        assert list(feed.near) == [0, 1] and list(feed.far) == [2] and not WAITS["_to_copy"]
        assert all(isinstance(v, Gpu) and v.dtype == torch.uint8 for v in feed.near.values())
        feed.close()


def test_a_batch_that_memory_has_no_room_for_is_halved_and_that_is_said_once(gpu, monkeypatch, capsys):
    run, room = model.Encoder.run, 3

    def limited(encoder, x, *more):
        if len(x) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return run(encoder, x, *more)

    pictures = [Noise(k) for k in range(23)]
    wanted = tiny().embed(pictures)
    with gpu():
        encoder = tiny(device="cuda", batch=8)
        _ = encoder.facts
        monkeypatch.setattr(model.Encoder, "run", limited)
        capsys.readouterr()
        assert torch.allclose(encoder.embed(pictures).cpu(), wanted, atol=1e-5) and encoder.batch == 2
        said = capsys.readouterr().out
        assert said.count("out of memory with --batch_size=8, 2 from here on") == said.count("memory") == 1
        room = 0
        with pytest.raises(Complaint, match="--batch_size=1: cuda:0 has no memory for a single image"):
            encoder.embed(pictures)


def test_on_a_gpu_in_bfloat16_matrices_are_cast_once_and_weights_that_change_are_not(gpu):
    with gpu():
        encoder = tiny(device="cuda", dtype="auto", batch="auto")
        assert encoder.batch == 256 and encoder.precision == "bfloat16"
        kinds = {n: p.dtype for n, p in encoder.fast.named_parameters()}
        assert (
            kinds["visual.conv1.weight"] == torch.bfloat16 and kinds["visual.ln_pre.weight"] == torch.float32
        )
        assert all(p.dtype == torch.float32 for p in encoder.module.parameters())
        pictures = [Noise(k) for k in range(4)]
        x = encoder.normalised(encoder.onto_device([encoder.pixels(p) for p in pictures]))
        same = encoder.run(x, "bfloat16", lambda x, _: model.embeddings(encoder.folded, encoder.kind, x))
        assert F.cosine_similarity(encoder.run(x, "bfloat16"), same).cpu().min() > 0.999
        student = encoder.with_module(encoder.module)
        assert student.fast is student.folded is student.module


def test_a_gpu_without_bfloat16_takes_float32_and_says_so_if_asked_for_it(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with gpu():
        assert tiny(device="cuda", dtype="auto").precision == "float32"
        with pytest.raises(Complaint, match="--dtype: found 'bfloat16', expected float32 or auto: cuda:0"):
            tiny(device="cuda", dtype="bfloat16")


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with a small set of birds in it."""
    at, rows = tmp_path_factory.mktemp("devices"), ["img_id,img_filename,y,split,place,place_filename"]
    for k in range(52):
        Noise(k).image().save(at / f"{k}.png")
        rows.append(
            f"{k},{k}.png,{('dog', 'fox')[k // 2 % 2]},{0 if k < 24 else 1 if k < 44 else 2},{k % 2},x"
        )
    (at / "metadata.csv").write_text("\n".join(rows))
    return at


def script(gpu, at, name, words, device="cuda"):
    """Runs a script as on a GPU, or on the CPU; its waits."""
    WAITS.clear()
    common = f"--device={device} --model=tiny --threads=1 --cache_dir={at}/cache --data=waterbirds:{at}"
    with gpu() if device == "cuda" else contextlib.nullcontext():
        assert run_script(ROOT / f"{name}.py", [*f"{common} {words}".split()]) == 0
    return WAITS.total()


def found(path):
    """A discovery whose first cluster counts as kept."""
    tree = json.loads((path / "discovery.json").read_text())
    tree["clusters"][0].update(kept=True)
    (path / "discovery.json").write_text(json.dumps(tree))


def test_scripts_run_on_a_gpu_and_with_all_in_the_cache_touch_no_weights(gpu, at, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    few, ckpt = "--instances=16 --per_instance=3 --steps=3", f"--ckpt={at}/bap/ckpt.pt --method=all"
    protocols = "--protocol=zeroshot,probe,clip_probe,dfr,fewshot --shots=1 --composites=8"
    script(gpu, at, "train", f"--out_dir={at}/image {few} --l2=50 --train=image --own=0")
    runs = [
        ("train", f"--out_dir={at}/bap {few} --bap_map=linear"),
        ("eval", f"--out_dir={at}/eval {protocols}"),
    ]
    slow = "--classifier=text --clustering=ravl --k=4:6"
    for k, words in enumerate([ckpt, slow] if LARGE else [ckpt]):
        runs.append(("discover", f"--out_dir={at}/{k} {words} --regions=grid:2"))
    for device in ("cuda", "cpu"):
        for name, words in runs:
            script(gpu, at, name, f"{words} --l2=50 --dtype=float32", device)
        monkeypatch.setattr(model.Encoder, "module", property(lambda _: pytest.fail("weights were loaded")))


@pytest.mark.parametrize("method", train.METHODS if LARGE else ["ravl", "vl_gdro", "jtt"])
def test_fine_tuning_waits_twice_a_step_at_most(method, gpu, at):
    if not (at / "split").is_dir():
        script(gpu, at, "discover", f"--out_dir={at}/split --classifier=text --regions=grid:2 --split=val")
        found(at / "split")
        fill = f"--method=finetune --pairs=16 --steps=1 --out_dir={at}/one"
        script(gpu, at, "train", fill)  # fills the cache
    words = f"--method={method} --pairs=16 --discovery={at}/split --out_dir={at}/{method} --captions=class"
    waits = [script(gpu, at, "train", f"{words} --steps={n}") for n in (2, 4)]
    most = 5 if method == "ravl" else 2  # pooling in PyTorch, as here, waits three times; its kernel does not
    assert waits[1] - waits[0] <= 2 * most, WAITS


def test_a_gpu_whose_network_cannot_run_with_halved_weights_takes_float32(gpu, monkeypatch):
    def refuse(_):
        raise RuntimeError("Input type and weight type should be the same")

    monkeypatch.setattr(model.Encoder, "halved", property(refuse))
    with gpu():
        encoder = tiny(device="cuda", dtype="auto")
        assert encoder.precision == "float32" and encoder.fast is encoder.folded
