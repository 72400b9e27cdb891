"""kernels/: every op and gradient against its float64 reference, on each path that this machine has.

The PyTorch path (and the GPU, if there is one) is tested in this process; test_interpreter runs the same
tests through Triton's interpreter in a process of its own, test_resources compiles for GPUs in others.
Inputs are new in every run: a failure prints the seed, FLOCK_TEST_SEED=<seed> brings it back.
"""
import importlib
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from kernels import cluster_sums, launch, pairwise_additivity, pairwise_loss, region_pool

MODULES = {name: importlib.import_module(f"kernels.{name}")
           for name in ("cluster_sums", "pairwise_additivity", "pairwise_loss", "region_pool")}
SEED = int(os.environ.get("FLOCK_TEST_SEED") or time.time_ns() % 2**31)
DEVICES = ["cpu"] + ["cuda"] * (torch.cuda.is_available() and not launch.INTERPRET)
ROOM = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # a last bit or two, of the largest number
only_torch = pytest.mark.skipif(launch.INTERPRET, reason="float64 and large inputs take the PyTorch path")
outside = pytest.mark.skipif(launch.INTERPRET, reason="starts processes of its own")


@pytest.fixture(autouse=True)
def poison():
    """Whatever an op leaves unwritten in torch.empty is NaN; one thread, as small inputs gain nothing by more."""
    print(f"FLOCK_TEST_SEED={SEED}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(()).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


class Draw:
    """Random inputs from (seed, name of the case)."""

    def __init__(self, *key):
        self.g = torch.Generator().manual_seed(SEED + sum(map(ord, str(key))))

    def normal(self, *shape):
        x = torch.randn(shape, generator=self.g, dtype=torch.float64)
        return x if shape[-1] > 2 else x.abs() + 0.5  # no sums near zero, which only rounding decides

    def unit(self, *shape):
        return F.normalize(self.normal(*shape), dim=-1)

    def integers(self, high, *shape, low=0):
        return torch.randint(low, high, shape, generator=self.g)

    def boxes(self, K, H, W):
        """Of any size, some past the edge, some inside one cell, the first empty."""
        size = torch.tensor([W, H], dtype=torch.float32)
        corners = (torch.rand(K, 2, 2, generator=self.g) * 1.4 - 0.2) * size
        low, high = corners.amin(1), corners.amax(1)
        high[::3] = low[::3] + 0.3
        high[:1] = low[:1]
        return torch.cat([low, high], 1)

    def masks(self, K, H, W):
        return torch.rand(K, H, W, generator=self.g) * (torch.rand(K, H, W, generator=self.g) < 0.4)


# A case: op, reference, inputs with gradients, the other arguments.

def loss_case(n, m, D, C, scale=3.0):
    draw = Draw("loss", n, m, D, C)
    return pairwise_loss, MODULES["pairwise_loss"].pairwise_loss_ref, \
        [draw.normal(k, D) for k in (n, m, C)], (draw.integers(C, n), scale)


def anchor_case(n, m, D):
    f, b = Draw("anchors", n, m, D).normal(n, D), Draw("anchors", n, m, D, "b").normal(m, D)
    ref = MODULES["pairwise_loss"].pairwise_loss_ref
    return lambda f, b, y: pairwise_loss(f, b, f, y, 2.0), lambda f, b, y: ref(f, b, f, y, 2.0), \
        [f, b], (torch.arange(n),)


def additivity_case(n, m, D, longer=1.):
    draw = Draw("additivity", n, m, D)
    return pairwise_additivity, MODULES["pairwise_additivity"].pairwise_additivity_ref, \
        [longer * draw.normal(n, m, D), draw.normal(n, D), draw.normal(m, D)], ()


def triples_case(P, n, m, D):
    draw = Draw("triples", P, n, m, D)
    index = draw.integers(n, P), draw.integers(m, P)
    return pairwise_additivity, MODULES["pairwise_additivity"].pairwise_additivity_ref, \
        [draw.normal(P, D), draw.normal(n, D), draw.normal(m, D)], (index,)


def sums_case(n, D, k):
    draw = Draw("sums", n, D, k)
    x = draw.unit(n, D) * (0.5 + torch.rand(n, 1, generator=draw.g))  # not of norm 1, else distances to self are 0
    return cluster_sums, MODULES["cluster_sums"].cluster_sums_ref, [x], (draw.integers(k + 1, n, low=-1), k)


def pool_case(B, H, W, D, K, masks=False, normalize=False, grid=None):
    draw = Draw("pool", B, H, W, D, K, masks)
    x = draw.normal(B, H, W, D)
    regions = (draw.masks if masks else draw.boxes)(K, H, W)
    return region_pool, MODULES["region_pool"].region_pool_ref, [x if grid is None else x.flatten(1, 2)], \
        (regions, draw.integers(max(1, B - 1), K), grid, normalize)  # the last image has none


CASES = {
    "loss one": lambda: loss_case(1, 1, 1, 1), "loss odd": lambda: loss_case(70, 65, 33, 5),
    "loss blocks": lambda: loss_case(64, 64, 32, 2), "loss wide": lambda: loss_case(3, 130, 600, 17),
    "loss D=4096": lambda: loss_case(2, 3, 4096, 4), "anchors": lambda: anchor_case(67, 5, 48),
    "additivity one": lambda: additivity_case(1, 1, 1), "additivity odd": lambda: additivity_case(9, 11, 70),
    "additivity wide": lambda: additivity_case(3, 17, 513), "additivity D=4096": lambda: additivity_case(2, 2, 4096),
    "additivity far": lambda: additivity_case(5, 7, 48, 3000.), "additivity near zero": lambda: additivity_case(5, 7, 48, 3e-3),
    "triples": lambda: triples_case(30, 9, 11, 70), "triples sparse": lambda: triples_case(3, 20, 20, 40),
    "sums one": lambda: sums_case(1, 1, 1), "sums odd": lambda: sums_case(90, 12, 4),
    "sums blocks": lambda: sums_case(128, 32, 1), "sums many": lambda: sums_case(65, 33, 70),
    "pool one": lambda: pool_case(1, 1, 1, 1, 1), "pool odd": lambda: pool_case(3, 5, 7, 70, 20),
    "pool wide": lambda: pool_case(2, 3, 3, 513, 7), "pool D=4096": lambda: pool_case(1, 2, 2, 4096, 2),
    "pool masks": lambda: pool_case(3, 5, 7, 70, 20, masks=True),
    "pool unit": lambda: pool_case(3, 5, 7, 70, 20, normalize=True),
    "pool unit masks": lambda: pool_case(3, 4, 4, 20, 9, masks=True, normalize=True),
    "pool patches": lambda: pool_case(2, 3, 5, 16, 9, grid=(3, 5)),
}


def results(op, inputs, args, dtype, device="cpu"):
    """Outputs and gradients of op at these inputs, for fixed gradients of the outputs."""
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    out = op(*inputs, *args)
    out = out if isinstance(out, tuple) else (out,)
    down = [torch.cos(torch.arange(o.numel(), device=device)).view(o.shape).to(o.dtype) for o in out]
    return [x.double().cpu() for x in (*(o.detach() for o in out), *torch.autograd.grad(out, inputs, down))]


def check(op, ref, inputs, args, dtype, device="cpu"):
    """STYLE.md's rule, forward and every gradient: |op - ref| <= 2 |ref in dtype - ref| + room."""
    inputs = [x.to(dtype).double() for x in inputs]
    found, low, exact = (results(*case, device) for case in (
        (op, inputs, args, dtype), (ref, inputs, args, dtype), (ref, inputs, args, torch.float64)))
    for n, (k, l, e) in enumerate(zip(found, low, exact)):
        assert k.shape == e.shape
        if e.numel():
            lost = (l - e).nan_to_num().abs().max()  # F.normalize's 1e-12 is 0 in fp16, and a region may be empty
            scale = e.abs().max() + (1 if e.numel() == 1 else 0.01)  # a single number may cancel
            error, limit = (k - e).abs().max(), 2 * lost + ROOM[dtype] * scale
            assert error <= limit, f"result {n}: off by {error:.2e}, {limit:.2e} allowed"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_case(case, dtype, device):
    check(*CASES[case](), dtype, device)


@only_torch
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [
    lambda: loss_case(700, 530, 96, 20), lambda: loss_case(40, 30, 16, 1500), lambda: additivity_case(20, 300, 1024),
    lambda: triples_case(3000, 80, 70, 96), lambda: sums_case(2500, 96, 7), lambda: pool_case(40, 14, 14, 96, 900),
], ids=["loss", "classes", "additivity", "triples", "sums", "pool"])
def test_large(case, device):
    check(*case(), torch.float32, device)


@pytest.mark.parametrize("case", ["loss odd", "anchors", "additivity odd", "triples", "sums odd", "pool odd", "pool masks"])
def test_blocks(case, monkeypatch):
    """Many blocks of each kind, as large inputs have them, at a small size."""
    for name, settings in {"pairwise_loss": dict(BLOCK=16, LOGITS=200, side=lambda C: 16), "pairwise_additivity": dict(TILE=300),
                           "cluster_sums": dict(BLOCK=16, SIDE=32), "region_pool": dict(CHUNK=100)}.items():
        for key, value in settings.items():
            monkeypatch.setattr(MODULES[name], key, value)
    check(*CASES[case](), torch.float32)


@only_torch
@pytest.mark.parametrize("case", [
    lambda: loss_case(5, 4, 3, 3), lambda: anchor_case(4, 3, 3), lambda: additivity_case(3, 4, 5),
    lambda: triples_case(6, 3, 4, 5), lambda: sums_case(9, 4, 3), lambda: pool_case(2, 3, 4, 3, 6),
    lambda: pool_case(2, 3, 4, 3, 6, masks=True, normalize=True)],
    ids=["loss", "anchors", "additivity", "triples", "sums", "pool", "masks"])
def test_gradcheck(case):
    op, ref, inputs, args = case()
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: op(*x, *args), inputs)
    for o, r in zip(results(op, inputs, args, torch.float64), results(ref, inputs, args, torch.float64)):
        torch.testing.assert_close(o, r)


def test_scale_gradient():
    _, ref, (f, b, t), (y, _) = loss_case(20, 30, 16, 5)
    scale = torch.tensor(3.0)
    check(lambda s: pairwise_loss(f.to(s), b.to(s), t.to(s), y, s), lambda s: ref(f.to(s), b.to(s), t.to(s), y, s),
          [scale], (), torch.float32)


def op_calls():
    """(custom op, arguments) of all eight, float32."""
    draw, ops = Draw("ops"), torch.ops.flock
    f, b, t = (draw.normal(k, 12).float().requires_grad_() for k in (7, 6, 3))
    y, scale, one = draw.integers(3, 7), torch.tensor(2.0, requires_grad=True), torch.ones(())
    z, index = draw.normal(42, 12).float().requires_grad_(), torch.stack([draw.integers(7, 42), draw.integers(6, 42)])
    x, boxes, image = draw.normal(2, 3, 4, 12).float().requires_grad_(), draw.boxes(5, 3, 4), draw.integers(2, 5)
    out, norm = ops.region_pool(x.detach(), boxes, image, True)
    four = ops.pairwise_additivity(z.detach(), f.detach(), b.detach(), None)
    zfb = [a.detach() for a in (z, f, b)]
    return {
        "loss": (ops.pairwise_loss, (f, b, t, y, scale)),
        "loss backward": (ops.pairwise_loss_backward, (one, *(a.detach() for a in (f, b, t)), y, one)),
        "additivity": (ops.pairwise_additivity, (z, f, b, None)), "triples": (ops.pairwise_additivity, (z, f, b, index)),
        "additivity backward": (ops.pairwise_additivity_backward, (torch.ones_like(four), *zfb, None, four, True)),
        "triples backward": (ops.pairwise_additivity_backward, (torch.ones_like(four), *zfb, index, four, False)),
        "sums": (ops.cluster_sums, (f, y, 3)),
        "sums backward": (ops.cluster_sums_backward, (torch.ones(7, 3), f.detach(), y)),
        "pool": (ops.region_pool, (x, boxes, image, False)), "pool unit": (ops.region_pool, (x, boxes, image, True)),
        "pool backward": (ops.region_pool_backward, (torch.ones_like(out), boxes, image, out, norm, 2, 3, 4)),
    }


@pytest.mark.parametrize("name", ["loss", "loss backward", "additivity", "triples", "additivity backward",
                                  "triples backward", "sums", "sums backward", "pool", "pool unit", "pool backward"])
def test_opcheck(name):
    op, args = op_calls()[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("case", ["loss odd", "additivity odd", "triples", "sums odd", "pool unit", "pool patches"])
def test_compile(case):
    op, _, inputs, args = CASES[case]()
    compiled = torch.compile(lambda *x: op(*x), fullgraph=True, backend="aot_eager")
    for o, c in zip(results(op, inputs, args, torch.float32), results(compiled, inputs, args, torch.float32)):
        torch.testing.assert_close(c, o)


@pytest.mark.parametrize("case", ["loss odd", "sums odd", "additivity odd", "pool odd"])
def test_autocast(case):
    """Ops of matrix products run in autocast's dtype, the two that read once in that of their input."""
    op, _, inputs, args = CASES[case]()
    inputs = [x.float() for x in inputs]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return op(*x, *args)

    with torch.autocast("cpu", torch.bfloat16):
        inside = op(*inputs, *args)
    low = torch.bfloat16 if op in (pairwise_loss, cluster_sums) else torch.float32
    expected = op(*(x.to(low) for x in inputs), *args)
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled(*inputs), expected)


def test_strided():
    """Non-contiguous inputs: a conv map seen as [B, H, W, D], patches behind a class token, columns of a table."""
    op, ref, (x,), args = CASES["pool odd"]()
    check(lambda x: op(x.permute(0, 2, 3, 1), *args), lambda x: ref(x.permute(0, 2, 3, 1), *args),
          [x.permute(0, 3, 1, 2).contiguous()], (), torch.float32)
    op, ref, (x,), args = CASES["pool patches"]()
    check(lambda x: op(x[:, 1:], *args), lambda x: ref(x[:, 1:], *args),
          [torch.cat([x[:, :1], x], 1)], (), torch.float32)
    for case in ("pool odd", "pool masks"):  # regions, last axis first
        op, ref, inputs, (regions, *args) = CASES[case]()
        turned = regions.movedim(-1, 0).contiguous().movedim(0, -1)
        check(lambda x: op(x, turned, *args), lambda x: ref(x, turned, *args), inputs, (), torch.float32)
    for case in ("loss odd", "additivity odd", "sums odd", "triples"):
        op, ref, inputs, args = CASES[case]()
        check(lambda *x: op(*(v.mT for v in x), *args), lambda *x: ref(*(v.mT for v in x), *args),
              [x.mT.contiguous() for x in inputs], (), torch.float32)


def test_no_rows():
    e = lambda *shape: torch.zeros(*shape, requires_grad=True)
    assert region_pool(e(2, 3, 3, 5), torch.zeros(0, 4), torch.zeros(0).long(), normalize=True).shape == (0, 5)
    assert region_pool(e(0, 3, 3, 5), torch.zeros(0, 4), torch.zeros(0).long()).shape == (0, 5)
    for n, m in ((0, 4), (4, 0), (0, 0)):
        assert [o.shape for o in pairwise_additivity(e(n, m, 5), e(n, 5), e(m, 5))] == [(n, m)] * 2
        f, b, t = e(n, 5), e(m, 5), e(3, 5)
        loss = pairwise_loss(f, b, t, torch.zeros(n).long(), 1.0)
        assert loss.isnan()  # the mean of nothing
        for x, g in zip((f, b, t), torch.autograd.grad(loss, (f, b, t))):
            assert g.shape == x.shape and not g.nan_to_num().any()
    no = torch.zeros(0).long()
    z, f = e(0, 5), e(4, 5)
    out = pairwise_additivity(z, f, f, (no, no))
    assert out[0].shape == (0,) and not torch.autograd.grad(out[0].sum(), f)[0].any()
    x = e(0, 5)
    sums = cluster_sums(x, no, 3)
    assert sums.shape == (0, 3) and torch.autograd.grad(sums.sum(), x)[0].shape == (0, 5)
    assert cluster_sums(e(4, 5), torch.zeros(4).long(), 0).shape == (4, 0)


def test_nan():
    """NaN where a NaN was read, and nowhere else."""
    nan, draw = torch.nan, Draw("nan")
    x = draw.normal(2, 4, 4, 6).float()
    x[0, 0, 0, 2] = nan
    boxes = torch.tensor([[0, 0, 2, 2], [1, 0, 4, 4], [0, 0, 4, 4], [0, nan, 4, 4]])
    out = region_pool(x, boxes, torch.tensor([0, 0, 1, 1]))
    assert out.isnan().nonzero().tolist() == [[0, 2]] + [[3, d] for d in range(6)]

    z, f, b = draw.normal(3, 4, 6).float(), draw.normal(3, 6).float(), draw.normal(4, 6).float()
    z[0, 1, 0] = f[1, 2] = b[3, 5] = nan
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[0, 1] = expected[1] = expected[:, 3] = True
    for out in pairwise_additivity(z, f, b):
        assert torch.equal(out.isnan(), expected)

    t, y = draw.normal(3, 6).float(), torch.zeros(3).long()
    for bad in (f, b, t):
        good = [v.nan_to_num(1) for v in (f, b, t)]
        assert pairwise_loss(*good, y, 1.0).isfinite()
        bad[0, 0] = nan
        assert pairwise_loss(*(bad if v is bad else g for v, g in zip((f, b, t), good)), y, 1.0).isnan()

    x, labels = draw.unit(9, 6).float(), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, -1])
    x[4, 1] = nan
    expected = torch.zeros(9, 4, dtype=torch.bool)
    expected[4, :3] = expected[:, 1] = True  # cluster 3 is empty
    out = cluster_sums(x, labels, 4)
    assert torch.equal(out.isnan(), expected)
    ref = MODULES["cluster_sums"].cluster_sums_ref(x, labels, 4)
    torch.testing.assert_close(out, ref, equal_nan=True)


def test_opposite_parts():
    """f_i = -b_j: no direction, but no NaN either; 0 + 0 has logits 0."""
    f = torch.zeros(2, 8)
    t = Draw("t").normal(4, 8).float()
    torch.testing.assert_close(pairwise_loss(f, f, t, torch.tensor([1, 2]), 9.0), torch.tensor(4.0).log())
    f = Draw("f").normal(5, 8).float().requires_grad_()
    loss = pairwise_loss(f, -f, t, torch.arange(5) % 4, 9.0)
    assert loss.isfinite() and torch.autograd.grad(loss, f)[0].isfinite().all()


def test_confident_logits():
    """Logits of hundreds, as at a low temperature: the online logsumexp neither overflows nor loses the rest."""
    op, ref, inputs, (y, _) = loss_case(20, 30, 16, 5)
    check(op, ref, inputs, (y, 300.0), torch.float32)


def test_same_sums_every_time():
    op, _, (x,), args = CASES["pool odd"]()
    first, second = (results(op, [x], args, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_far_offsets():
    """More than 2^31 elements between two images, or two cells."""
    torch.use_deterministic_algorithms(False)  # leave the 4 GiB untouched
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 1, 2, 16), (2**31, 32, 16, 1))
    far[0], far[1] = 1, 2
    out = region_pool(far, torch.tensor([[0.0, 0, 2, 1], [0.5, 0, 2, 1]]), torch.tensor([1, 0]))
    assert out.tolist() == [[2.0] * 16, [1.0] * 16]
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((1, 1, 3, 16), (2**31, 3 * 2**30, 2**30, 1))
    far[0, 0, 2] = 3
    out = region_pool(far, torch.tensor([[2.0, 0, 3, 1]]), torch.tensor([0]))
    assert out.tolist() == [[3.0] * 16]


def test_sampled_classes():
    _, ref, (f, b, _), _ = loss_case(30, 7, 16, 2)
    classes = Draw("classes").integers(30, 12).unique()
    expected = ref(f[classes], b, f[classes], torch.arange(len(classes)), 2.0)
    found = pairwise_loss(f.float(), b.float(), f.float(), torch.arange(30), 2.0, classes=classes)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    many = torch.zeros(4097, 2)
    with pytest.raises(ValueError, match="classes=torch.randperm"):
        pairwise_loss(many, many, many, torch.arange(4097), 1.0)


def test_shapes_are_checked():
    x = torch.zeros(2, 6, 5)
    with pytest.raises(ValueError, match="class token"):
        region_pool(x, torch.zeros(1, 4), torch.zeros(1).long(), grid=(2, 2))
    with pytest.raises(ValueError, match="masks"):
        region_pool(x, torch.zeros(1, 3, 2), torch.zeros(1).long(), grid=(2, 3))
    with pytest.raises(ValueError, match="one per region"):
        region_pool(x, torch.zeros(1, 4), torch.zeros(2).long(), grid=(2, 3))
    with pytest.raises(ValueError, match="incomplete grid"):
        pairwise_additivity(x, torch.zeros(2, 5), torch.zeros(5, 5))
    with pytest.raises(ValueError, match="expected"):
        pairwise_loss(x[0], x[1], x[0], torch.zeros(5).long(), 1.0)
    with pytest.raises(ValueError, match="expected"):
        cluster_sums(x[0], torch.zeros(5).long(), 2)


def test_adapter(monkeypatch):
    x, labels = torch.eye(4), torch.zeros(4).long()
    def refuse(*args, **settings):
        raise AssertionError("launched")
    monkeypatch.setattr(launch, "run", refuse)
    monkeypatch.setenv("FLOCK_KERNELS", "torch")
    assert cluster_sums(x, labels, 1).tolist() == [[3.0]] * 4
    monkeypatch.setenv("FLOCK_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match="expected triton or torch"):
        cluster_sums(x, labels, 1)
    monkeypatch.setenv("FLOCK_KERNELS", "triton")
    with pytest.raises(AssertionError, match="launched") if launch.INTERPRET else pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        cluster_sums(x, labels, 1)
    if launch.INTERPRET:
        with pytest.raises(RuntimeError, match="float64"):
            cluster_sums(x.double(), labels, 1)
        with pytest.raises(RuntimeError, match="up to 4096"):
            cluster_sums(torch.zeros(4, 4097), labels, 1)


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True)


@outside
def test_without_triton():
    done = python("""
import sys; sys.modules["triton"] = None
import os, torch, kernels
x, y = torch.eye(4), torch.zeros(4).long()
assert kernels.cluster_sums(x, y, 1).tolist() == [[3.0]] * 4
assert kernels.region_pool(x.view(1, 2, 2, 4), torch.tensor([[0.0, 0, 1, 1]]), y[:1])[0].tolist() == [1, 0, 0, 0]
os.environ["FLOCK_KERNELS"] = "triton"
try: kernels.cluster_sums(x, y, 1)
except RuntimeError as error: print(error)
""", FLOCK_KERNELS="")
    assert done.returncode == 0, done.stderr
    assert "Triton cannot be imported" in done.stdout


@outside
def test_memory():
    """n = m = 4096: neither n x m (64 MiB) nor n x m x C is held, forward or backward."""
    done = python("""
import resource, torch
from kernels import pairwise_loss
f, b, t = (torch.randn(k, 16, requires_grad=True) for k in (4096, 4096, 4))
y, peak = torch.arange(4096) % 4, lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pairwise_loss(f[:600], b[:600], t, y[:600], 1.0).backward()  # two blocks: libraries and buffers are up
before = peak()
pairwise_loss(f, b, t, y, 1.0).backward()
print(peak() - before)
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 1024  # KiB


@outside
@pytest.mark.skipif(launch.triton is None, reason="needs Triton")
def test_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "FLOCK_KERNELS": "triton", "FLOCK_TEST_SEED": str(SEED), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-5000:] + done.stderr


@outside
@pytest.mark.skipif(launch.triton is None, reason="needs Triton")
def test_resources(tmp_path):
    """Every kernel and setting compiles for sm_80, sm_89 and sm_90, within the limits of each."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-m", "kernels.resources", f"--dtype={dtype}", f"--width={width}"],
                             env=env, stdout=subprocess.PIPE, text=True)
            for dtype, width in (("fp32", "512,77,20"), ("bf16", "512,77"), ("fp16", "512"))]
    lines = [line.split() for run in runs for line in run.communicate()[0].splitlines()]
    assert not any(run.returncode for run in runs)
    kernels = set()
    for arch, kernel, flags, dtype, D, *numbers in (line for line in lines if line[0] in ("80", "89", "90")):
        registers, spills, shared, wide, tensor = map(int, numbers)
        where = (arch, kernel, flags, dtype, D)
        kernels.add((arch, kernel, dtype))
        assert spills == 0 and registers <= 255, where
        assert shared <= {"80": 163, "89": 99, "90": 227}[arch] * 1024, where
        assert wide > 0 or D != "512", where
        assert tensor > 0 or kernel.split(".")[0] not in ("pairwise_loss", "cluster_sums"), where
    assert len(kernels) == 9 * 3 * 3
