"""kernels/: every op and gradient against its float64 reference, on each path that this machine has.

The PyTorch path (and the GPU, if there is one) is tested in this process; test_interpreter runs the same
tests through Triton's interpreter in a process of its own, test_resources compiles for GPUs in others.
Inputs are new in every run: a failure prints the seed, FLOCK_TEST_SEED=<seed> brings it back.
"""

import importlib
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import launch, pairwise_additivity, pairwise_loss, region_logits, region_pool
from kernels.pairwise_additivity import pairwise_additivity_ref
from kernels.pairwise_loss import pairwise_loss_ref
from kernels.region_logits import region_logits_ref
from kernels.region_pool import region_pool_ref

SEED = int(os.environ.get("FLOCK_TEST_SEED") or time.time_ns() % 2**31)
DEVICES = ["cpu"] + ["cuda"] * (torch.cuda.is_available() and not launch.INTERPRET)
ROOM = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # a last bit or two, of the largest
only_torch = pytest.mark.skipif(launch.INTERPRET, reason="float64 and large inputs take the PyTorch path")
outside = pytest.mark.skipif(launch.INTERPRET, reason="starts processes of its own")
needs_triton = pytest.mark.skipif(launch.triton is None, reason="needs Triton")


@pytest.fixture(autouse=True)
def poison():
    """Whatever an op leaves unwritten in torch.empty is NaN."""
    print(f"FLOCK_TEST_SEED={SEED}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(()).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Cases: op, reference, the inputs with gradients, the other arguments.


def generator(*key):
    return torch.Generator().manual_seed(SEED + sum(map(ord, str(key))))


def normal(g, *shape):
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return x if shape[-1] > 2 else x.abs() + 0.5  # no sums near zero, which only rounding decides


def integers(g, high, *shape):
    return torch.randint(high, shape, generator=g)


def draw_boxes(g, K, H, W):
    """Of any size, some past the edge, some inside one cell, the first empty."""
    corners = (torch.rand(K, 2, 2, generator=g) * 1.4 - 0.2) * torch.tensor([W, H])
    low, high = corners.amin(1), corners.amax(1)
    high[::3] = low[::3] + 0.3
    high[:1] = low[:1]
    return torch.cat([low, high], 1)


def draw_masks(g, K, H, W):
    return torch.rand(K, H, W, generator=g) * (torch.rand(K, H, W, generator=g) < 0.4)


def loss_case(n, m, D, C, scale=3.0):
    g = generator("loss", n, m, D, C)
    inputs = [normal(g, k, D) for k in (n, m, C)]
    return pairwise_loss, pairwise_loss_ref, inputs, (integers(g, C, n), scale)


def anchor_case(n, m, D):
    """The foregrounds are the targets: both gradients add."""
    g = generator("anchors", n, m, D)

    def op(f, b, y):
        return pairwise_loss(f, b, f, y, 2.0)

    def ref(f, b, y):
        return pairwise_loss_ref(f, b, f, y, 2.0)

    return op, ref, [normal(g, n, D), normal(g, m, D)], (torch.arange(n),)


def additivity_case(n, m, D, longer=1.0):
    g = generator("additivity", n, m, D)
    inputs = [longer * normal(g, n, m, D), normal(g, n, D), normal(g, m, D)]
    return pairwise_additivity, pairwise_additivity_ref, inputs, ()


def triples_case(P, n, m, D):
    g = generator("triples", P, n, m, D)
    index = integers(g, n, P), integers(g, m, P)
    inputs = [normal(g, P, D), normal(g, n, D), normal(g, m, D)]
    return pairwise_additivity, pairwise_additivity_ref, inputs, (index,)


def pool_case(B, H, W, D, K, masks=False):
    g = generator("pool", B, H, W, D, K, masks)
    x = normal(g, B, H, W, D)
    regions = (draw_masks if masks else draw_boxes)(g, K, H, W)
    image = integers(g, max(1, B - 1), K)  # the last image has none
    return region_pool, region_pool_ref, [x], (regions, image)


def logits_case(B, H, W, D, K, C, masks=False):
    """Cosines and means side by side."""
    g = generator("logits", B, H, W, D, K, C, masks)
    regions, image = (draw_masks if masks else draw_boxes)(g, K, H, W), integers(g, max(1, B - 1), K)

    def op(x, t, *where):
        return torch.cat(region_logits(x, *where, t), 1)

    def ref(x, t, *where):
        return torch.cat(region_logits_ref(x, *where, t), 1)

    return op, ref, [normal(g, B, H, W, D), 3 * normal(g, C, D)], (regions, image)


CASES = {
    "loss one": (loss_case, 1, 1, 1, 1),
    "loss odd": (loss_case, 70, 65, 33, 5),
    "loss blocks": (loss_case, 64, 64, 32, 2),
    "loss wide": (loss_case, 3, 130, 600, 17),
    "loss D=4096": (loss_case, 2, 3, 4096, 4),
    "loss confident": (loss_case, 20, 30, 16, 5, 300.0),  # online logsumexp: no overflow, the rest not lost
    "anchors": (anchor_case, 67, 5, 48),
    "additivity one": (additivity_case, 1, 1, 1),
    "additivity odd": (additivity_case, 9, 11, 70),
    "additivity wide": (additivity_case, 3, 17, 513),
    "additivity D=4096": (additivity_case, 2, 2, 4096),
    "additivity far": (additivity_case, 5, 7, 48, 3000.0),
    "additivity near zero": (additivity_case, 5, 7, 48, 3e-3),
    "triples": (triples_case, 30, 9, 11, 70),
    "triples sparse": (triples_case, 3, 20, 20, 40),
    "pool one": (pool_case, 1, 1, 1, 1, 1),
    "pool odd": (pool_case, 3, 5, 7, 70, 20),
    "pool wide": (pool_case, 2, 3, 3, 513, 7),
    "pool D=4096": (pool_case, 1, 2, 2, 4096, 2),
    "pool masks": (pool_case, 3, 5, 7, 70, 20, True),
    "pool square masks": (pool_case, 3, 4, 4, 20, 9, True),
    "logits one": (logits_case, 1, 1, 1, 1, 1, 1),
    "logits odd": (logits_case, 3, 5, 7, 70, 20, 11),
    "logits masks": (logits_case, 3, 4, 4, 20, 9, 3, True),
    "logits wide": (logits_case, 2, 3, 3, 513, 5, 2),
    "logits D=4096": (logits_case, 1, 2, 2, 4096, 2, 3),
    "logits of many": (logits_case, 2, 3, 3, 5, 4, 260),
}
LARGE = {
    "loss": (loss_case, 700, 530, 96, 20),
    "classes": (loss_case, 40, 30, 16, 1500),
    "additivity": (additivity_case, 20, 300, 1024),
    "triples": (triples_case, 3000, 80, 70, 96),
    "pool": (pool_case, 40, 14, 14, 96, 900),
    "logits": (logits_case, 20, 14, 14, 96, 300, 20),
}
TINY = {
    "loss": (loss_case, 5, 4, 3, 3),
    "anchors": (anchor_case, 4, 3, 3),
    "additivity": (additivity_case, 3, 4, 5),
    "pool": (pool_case, 2, 3, 4, 3, 6),
    "masks": (pool_case, 2, 3, 4, 3, 6, True),
    "logits": (logits_case, 2, 3, 4, 3, 6, 2),
}


def case_of(table, name):
    make, *sizes = table[name]
    return make(*sizes)


def results(op, inputs, args, dtype, device="cpu"):
    """Outputs of op, and its gradients for fixed gradients of the outputs."""
    inputs = [x.to(device, dtype) for x in inputs]
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    alone = op(*inputs, *args)  # another path than with gradients
    if isinstance(alone, tuple):  # a measure
        return [x.double().cpu() for x in alone]
    inputs = [x.requires_grad_() for x in inputs]
    out = op(*inputs, *args)
    torch.testing.assert_close(out.detach(), alone, equal_nan=True)
    down = torch.cos(torch.arange(out.numel(), device=device)).view(out.shape).to(out.dtype)
    return [x.double().cpu() for x in (out.detach(), *torch.autograd.grad(out, inputs, down))]


def check(op, ref, inputs, args, dtype, device="cpu"):
    """Judged by what PyTorch loses in that dtype: |op - exact| <= 2 |ref in dtype - exact| + room."""
    inputs = [x.to(dtype).double() for x in inputs]
    found = results(op, inputs, args, dtype, device)
    low = results(ref, inputs, args, dtype, device)
    exact = results(ref, inputs, args, torch.float64, device)
    for n, (k, rounded, e) in enumerate(zip(found, low, exact, strict=True)):
        assert k.shape == e.shape
        lost = (
            (rounded - e).nan_to_num().abs().max()
        )  # F.normalize's 1e-12 is 0 in fp16, and a region may be empty
        scale = e.abs().max() + (1 if e.numel() == 1 else 0.01)  # a single number may cancel
        error, limit = (k - e).abs().max(), 2 * lost + ROOM[dtype] * scale
        assert error <= limit, f"result {n}: off by {error:.2e}, {limit:.2e} allowed"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_case(case, dtype, device):
    check(*case_of(CASES, case), dtype, device)


@only_torch
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", LARGE)
def test_large(case, device):
    check(*case_of(LARGE, case), torch.float32, device)


MANY = ["loss odd", "anchors", "additivity odd", "triples", "pool odd", "pool masks", "logits odd"]


@pytest.mark.parametrize("case", MANY)
def test_many_blocks_as_large_inputs_have_them(case, monkeypatch):
    small = {
        "pairwise_loss": {"BLOCK": 16, "LOGITS": 200, "side": lambda C: 16},
        "pairwise_additivity": {"TILE": 300},
        "region_pool": {"CHUNK": 100},
        "region_logits": {"MAX_C": 4},
    }
    monkeypatch.setitem(launch.SETTINGS, "region_pool, lists", dict(BK=8, warps=1))
    for name, settings in small.items():
        for key, value in settings.items():
            monkeypatch.setattr(importlib.import_module(f"kernels.{name}"), key, value)
    check(*case_of(CASES, case), torch.float32)


@pytest.mark.skipif(not launch.INTERPRET, reason="of the kernel alone")
@pytest.mark.parametrize("case", ["loss odd", "anchors"])
def test_large_tiles_as_many_pairs_have_them(case, monkeypatch):
    monkeypatch.setattr(launch, "MULTIPROCESSORS", 1)
    for dtype in (torch.float32, torch.bfloat16):
        check(*case_of(CASES, case), dtype)


@pytest.mark.skipif(not launch.INTERPRET, reason="of the kernels")
def test_region_ops_launch_one_kernel_forward_and_two_backward(monkeypatch):
    """Counted are Triton's launches and PyTorch's operations but views and torch.empty."""
    launches = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if not re.search("empty|view|slice|detach|alias", str(op)):
                launches.append(str(op))
            return op(*args, **(kwargs or {}))

    monkeypatch.setattr(launch, "run", lambda kernel, *args, **settings: launches.append(kernel.__name__))
    x, texts, boxes, image = (torch.zeros(*n) for n in ((2, 3, 3, 8), (5, 8), (4, 4), (4,)))
    image = image.long()
    with Count():
        region_logits(x, boxes, image, texts)
        out = region_pool(x.requires_grad_(), boxes, image)
    assert launches == ["logits_kernel", "forward_kernel"]
    down = torch.ones_like(out)
    with Count():
        torch.autograd.grad(out, x, down)
    assert launches[2:] == ["list_kernel", "backward_kernel"]


def test_pairwise_loss_of_pooled_parts_is_that_of_all_composites():
    """The recipe of region_logits.py beside maps alpha x_i + (1 - alpha) y_j made one by one and averaged."""
    g = generator("composites")
    x, y, alpha, texts = normal(g, 3, 4, 5, 9), normal(g, 6, 4, 5, 9), draw_masks(g, 1, 4, 5), normal(g, 4, 9)
    label, a = torch.tensor([1, 3, 0]), alpha.double().mean()
    layers = alpha.double()[:, None, :, :, None]
    z = (layers * x[:, None] + (1 - layers) * y).mean((2, 3))  # [n, m, D]
    logits = 5 * torch.nn.functional.normalize(z, dim=2) @ texts.T
    expected = -logits.log_softmax(2)[torch.arange(3), :, label].mean()
    f = a * region_pool(x.float(), alpha.expand(3, 4, 5), torch.arange(3))
    b = (1 - a) * region_pool(y.float(), 1 - alpha.expand(6, 4, 5), torch.arange(6))
    found = pairwise_loss(f, b, texts.float(), label, 5.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@only_torch
@pytest.mark.parametrize("case", TINY)
def test_float64(case):
    op, ref, inputs, args = case_of(TINY, case)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: op(*x, *args), inputs)
    for o, r in zip(
        results(op, inputs, args, torch.float64), results(ref, inputs, args, torch.float64), strict=True
    ):
        torch.testing.assert_close(o, r)


def test_gradient_of_scale():
    _, _, (f, b, t), (y, _) = loss_case(20, 30, 16, 5)

    def op(s):
        return pairwise_loss(f.to(s), b.to(s), t.to(s), y, s)

    def ref(s):
        return pairwise_loss_ref(f.to(s), b.to(s), t.to(s), y, s)

    check(op, ref, [torch.tensor(3.0)], (), torch.float32)


def test_gradient_of_a_measure_is_that_of_its_definition():
    for case in ("additivity odd", "triples"):
        op, ref, inputs, args = case_of(CASES, case)
        inputs = [x.bfloat16().requires_grad_() for x in inputs]
        wide = [x.detach().float().requires_grad_() for x in inputs]
        out = op(*inputs, *args)
        assert out[0].dtype == torch.float32
        found = torch.autograd.grad(out[0].sum() + out[1].sum(), inputs)
        out = ref(*wide, *args)
        for k, e in zip(found, torch.autograd.grad(out[0].sum() + out[1].sum(), wide), strict=True):
            assert torch.equal(k, e.bfloat16())


@pytest.mark.parametrize("dtype", [*ROOM] + [torch.float64] * (not launch.INTERPRET), ids=str)
def test_dtypes(dtype):
    """Sums come in float32 at least, features in their own dtype; regions get no gradient."""
    sums = torch.promote_types(dtype, torch.float32)
    for name, expected in {
        "loss odd": sums,
        "additivity odd": sums,
        "triples": sums,
        "logits odd": sums,
        "pool odd": dtype,
    }.items():
        op, _, inputs, args = case_of(CASES, name)
        inputs = [x.to(dtype) for x in inputs]
        out = op(*inputs, *args)
        assert {x.dtype for x in (out if isinstance(out, tuple) else (out,))} == {expected}
    x, boxes = inputs[0].requires_grad_(), args[0].clone().requires_grad_()
    region_pool(x, boxes, *args[1:]).sum().backward()
    assert x.grad.dtype == dtype and boxes.grad is None


def test_no_second_derivative_instead_of_a_wrong_one():
    for case in ("loss odd", "pool odd", "logits odd"):
        op, _, inputs, args = case_of(CASES, case)
        x = inputs[0].float().requires_grad_()
        (slope,) = torch.autograd.grad(
            op(x, *[v.float() for v in inputs[1:]], *args).square().sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError):
            torch.autograd.grad(slope.sum(), x)


@pytest.mark.parametrize("case", ["loss odd", "additivity odd", "pool odd", "logits odd"])
def test_compile_and_autocast(case):
    """The op of matrix products runs in autocast's dtype, those that read once in that of their input."""
    op, _, inputs, args = case_of(CASES, case)
    inputs = [x.float() for x in inputs]

    def inside(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return op(*x, *args)

    low = torch.bfloat16 if op is pairwise_loss else torch.float32
    expected = results(op, inputs, args, low)
    for found in (inside, torch.compile(inside, backend="aot_eager")):
        for k, e in zip(results(found, inputs, (), torch.float32), expected, strict=True):
            assert torch.equal(k, e)


@pytest.mark.parametrize(
    "case", ["pool odd", "pool masks", "logits odd", "loss odd", "additivity odd", "triples"]
)
def test_strided(case):
    """Inputs of any layout: here with the last axis first in memory, as a conv map has it."""

    def turned(x):
        return x.movedim(-1, 0).contiguous().movedim(0, -1)

    op, ref, inputs, args = case_of(CASES, case)
    if case.startswith(("pool", "logits")):
        args = (turned(args[0]), *args[1:])
    check(lambda *x: op(*map(turned, x), *args), lambda *x: ref(*x, *args), inputs, (), torch.float32)


def test_patches_behind_a_class_token():
    op, ref, (x,), args = case_of(CASES, "pool odd")
    x, grid = torch.cat([x[:, :1, 0], x.flatten(1, 2)], 1), x.shape[1:3]

    def cells(x):
        return x[:, 1:].unflatten(1, grid)

    check(lambda x: op(cells(x), *args), lambda x: ref(cells(x), *args), [x], (), torch.float32)


def test_no_rows():
    def zeros(*shape):
        return torch.zeros(*shape, requires_grad=True)

    no = torch.zeros(0).long()
    assert region_pool(zeros(2, 3, 3, 5), torch.zeros(0, 4), no).shape == (0, 5)
    assert region_pool(zeros(0, 3, 3, 5), torch.zeros(0, 4), no).shape == (0, 5)
    cos, means = region_logits(zeros(2, 3, 3, 5), torch.zeros(0, 4), no, zeros(4, 5))
    assert cos.shape == (0, 4) and means.shape == (0, 5)
    whole, of = torch.tensor([[0.0, 0, 3, 3]]), torch.zeros(1).long()
    assert region_logits(torch.ones(2, 3, 3, 5), whole, of, zeros(0, 5))[0].shape == (1, 0)
    f = torch.zeros(4, 5)
    assert pairwise_additivity(torch.zeros(0, 5), f, f, (no, no))[0].shape == (0,)
    for n, m in ((0, 4), (4, 0), (0, 0)):
        out = pairwise_additivity(torch.zeros(n, m, 5), torch.zeros(n, 5), torch.zeros(m, 5))
        assert [x.shape for x in out] == [(n, m)] * 2
        inputs = zeros(n, 5), zeros(m, 5), zeros(3, 5)
        loss = pairwise_loss(*inputs, torch.zeros(n).long(), 1.0)
        assert loss.isnan()  # the mean of nothing
        for x, g in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
            assert g.shape == x.shape and not g.nan_to_num().any()


def test_nan_where_a_nan_was_read_and_nowhere_else():
    nan, g = torch.nan, generator("nan")
    x = normal(g, 2, 4, 4, 6).float()
    x[0, 0, 0, 2] = nan
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 4, 4], *[[0, 0, 4, 4]] * 5])
    boxes[range(3, 7), range(4)] = nan
    image = torch.tensor([0, 0, *[1] * 5])
    out = region_pool(x, boxes, image)
    assert out.isnan().nonzero().tolist() == [[0, 2]] + [[k, d] for k in range(3, 7) for d in range(6)]
    cos, means = region_logits(x, boxes, image, normal(g, 2, 6).float())
    assert torch.equal(means.isnan(), out.isnan())
    assert torch.equal(cos.isnan(), out.isnan().any(1, keepdim=True).expand(-1, 2))

    z, f, b = normal(g, 3, 4, 6).float(), normal(g, 3, 6).float(), normal(g, 4, 6).float()
    z[0, 1, 0] = f[1, 2] = b[3, 5] = nan
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[0, 1] = expected[1] = expected[:, 3] = True
    for out in pairwise_additivity(z, f, b):
        assert torch.equal(out.isnan(), expected)

    y = torch.zeros(3).long()
    for bad in range(3):
        inputs = [normal(g, 3, 6).float() for _ in range(3)]
        assert pairwise_loss(*inputs, y, 1.0).isfinite()
        inputs[bad][0, 0] = nan
        assert pairwise_loss(*inputs, y, 1.0).isnan()


def test_opposite_parts():
    """f_i = -b_j: no direction, but no NaN either; 0 + 0 has logits 0."""
    zero = torch.zeros(2, 8)
    t = normal(generator("t"), 4, 8).float()
    torch.testing.assert_close(
        pairwise_loss(zero, zero, t, torch.tensor([1, 2]), 9.0), torch.tensor(4.0).log()
    )
    cos, sq = pairwise_additivity(
        torch.eye(8)[:4].view(2, 2, 8) * torch.tensor([0, 1.0])[:, None], zero, zero
    )
    assert not cos.any() and sq.tolist() == [[0, 1], [0, 1]]  # no direction of z either
    f = normal(generator("f"), 5, 8).float().requires_grad_()
    loss = pairwise_loss(f, -f, t, torch.arange(5) % 4, 9.0)
    assert loss.isfinite() and torch.autograd.grad(loss, f)[0].isfinite().all()


def test_same_sums_every_time():
    for case in ("pool odd", "loss odd", "logits odd"):
        op, _, inputs, args = case_of(CASES, case)
        once, again = (results(op, inputs, args, torch.float32) for _ in range(2))
        assert all(map(torch.equal, once, again))


def test_more_than_2_to_the_31_elements_between_images_or_cells():
    torch.use_deterministic_algorithms(False)  # leave the 4 GiB untouched
    room = torch.empty(2**31 + 64, dtype=torch.float16)
    far = room.as_strided((2, 1, 2, 16), (2**31, 32, 16, 1))
    far[0], far[1] = 1, 2
    out = region_pool(far, torch.tensor([[0.0, 0, 2, 1], [0.5, 0, 2, 1]]), torch.tensor([1, 0]))
    assert out.tolist() == [[2.0] * 16, [1.0] * 16]
    far = room.as_strided((1, 1, 3, 16), (2**31, 3 * 2**30, 2**30, 1))
    far[0, 0, 2] = 3
    assert region_pool(far, torch.tensor([[2.0, 0, 3, 1]]), torch.tensor([0])).tolist() == [[3.0] * 16]


def test_sampled_classes():
    _, ref, (f, b, _), _ = loss_case(30, 7, 16, 2)
    classes = integers(generator("classes"), 30, 12).unique()
    expected = ref(f[classes], b, f[classes], torch.arange(len(classes)), 2.0)
    found = pairwise_loss(f.float(), b.float(), f.float(), torch.arange(30), 2.0, classes=classes)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


X = torch.zeros(2, 6, 5)
MAP = X.unflatten(1, (2, 3))
INDEX = torch.zeros(1).long()


@pytest.mark.parametrize(
    "op, args, message",
    [
        (region_pool, (X, torch.zeros(1, 4), INDEX), "class token"),
        (region_pool, (MAP, torch.zeros(1, 3, 2), INDEX), "masks"),
        (region_pool, (MAP, torch.zeros(1, 4), torch.zeros(2).long()), "one per region"),
        (region_logits, (X, torch.zeros(1, 4), INDEX, torch.zeros(3, 5)), "class token"),
        (region_logits, (MAP, torch.zeros(1, 4), INDEX, torch.zeros(3, 4)), r"expected \[C, 5\]"),
        (pairwise_additivity, (X, torch.zeros(2, 5), torch.zeros(5, 5)), "incomplete grid"),
        (pairwise_loss, (X[0], X[1], X[0], torch.zeros(5).long(), 1.0), "expected"),
        (pairwise_loss, (torch.zeros(4097, 2),) * 3 + (torch.arange(4097), 1.0), "classes=torch.randperm"),
    ],
)
def test_shapes_are_checked(op, args, message):
    with pytest.raises(ValueError, match=message):
        op(*args)


def test_adapter(monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("launched")

    def additivity(x):
        return pairwise_additivity(x, x, x, torch.arange(4).expand(2, 4))[0]

    monkeypatch.setattr(launch, "run", refuse)
    monkeypatch.setenv("FLOCK_KERNELS", "torch")
    torch.testing.assert_close(additivity(torch.eye(4)), torch.ones(4))
    monkeypatch.setenv("FLOCK_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match="expected triton or torch"):
        additivity(torch.eye(4))
    monkeypatch.setenv("FLOCK_KERNELS", "triton")
    if not launch.INTERPRET:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            additivity(torch.eye(4))
        return
    with pytest.raises(AssertionError, match="launched"):
        additivity(torch.eye(4))
    with pytest.raises(RuntimeError, match="float64"):
        additivity(torch.eye(4).double())
    with pytest.raises(RuntimeError, match="up to 4096"):
        additivity(torch.zeros(4, 4097))


@needs_triton
@outside
def test_where_triton_fails_pytorch_computes_and_that_is_said_once(monkeypatch, capfd):
    def old_driver(*args, **settings):
        raise RuntimeError("the provided PTX was compiled with an unsupported toolchain")

    monkeypatch.setattr(launch, "run", old_driver)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(size))
    monkeypatch.setenv("FLOCK_KERNELS", "")
    x = SimpleNamespace(is_cuda=True, device="cuda:99", dtype=torch.float32, shape=(4, 4))
    assert not launch.use_triton(x) and not launch.use_triton(x)
    assert capfd.readouterr().err.count("unsupported toolchain") == 1
    monkeypatch.setenv("FLOCK_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="unsupported toolchain.*unset FLOCK_KERNELS"):
        launch.use_triton(x)


def python(*args, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return done.stdout


@outside
@pytest.mark.ahead
def test_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import os, torch, kernels
x, boxes, image = torch.eye(4).view(1, 2, 2, 4), torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0])
assert kernels.region_pool(x, boxes, image)[0].tolist() == [1, 0, 0, 0]
os.environ["FLOCK_KERNELS"] = "triton"
try: kernels.region_pool(x, boxes, image)
except RuntimeError as error: print(error)
"""
    assert "Triton cannot be imported" in python("-c", code, FLOCK_KERNELS="")


def test_tuning_takes_what_is_fastest_and_passes_over_what_does_not_run(monkeypatch, capsys):
    from kernels import bench

    wanted = dict(BP=4, BC=32, BD=512, BK=1024, BI=32, BJ=32, warps=2, stages=3)

    def milliseconds(op, leaves, device, bare):
        if any(v["warps"] > 8 for v in launch.SETTINGS.values()):
            raise RuntimeError("too many threads")
        return 2 ** sum(abs(math.log2(v[k] / wanted[k])) for v in launch.SETTINGS.values() for k in v)

    names = (
        "region_pool",
        "region_logits",
        "pairwise_additivity",
        "pairwise_loss, n = m = 256",
        "pairwise_loss",
    )
    monkeypatch.setattr(launch, "SETTINGS", {k: dict(v) for k, v in launch.SETTINGS.items()})
    monkeypatch.setattr(bench, "cases", lambda new: [(name, (), (None,), ()) for name in names])
    monkeypatch.setattr(bench, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(bench, "triton", SimpleNamespace(__version__="3"))
    before = dict(launch.SETTINGS)
    bench.tune(None, "bfloat16")
    printed = capsys.readouterr().out
    rows = re.findall(r'^    "(.+)": dict\((.+)\),', printed, re.M)
    table = {name: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", row)} for name, row in rows}
    assert table == launch.SETTINGS and printed.startswith("SETTINGS = {  # a card, bfloat16")
    for kernel, settings in table.items():
        for key, value in settings.items():
            reach = [v for n in range(5) if (v := before[kernel][key] * 2**n // 4)]  # halved or doubled twice
            assert value == min(reach, key=lambda v: abs(math.log2(v / wanted[key]))), (kernel, key)


@outside
@pytest.mark.ahead
def test_memory():
    """n = m = 4096: neither n x m (64 MiB) nor n x m x C is held, forward or backward."""
    code = """
import resource, torch
from kernels import pairwise_loss
f, b, t = (torch.randn(k, 16, requires_grad=True) for k in (4096, 4096, 4))
y, peak = torch.arange(4096) % 4, lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pairwise_loss(f[:600], b[:600], t, y[:600], 1.0).backward()  # two blocks: libraries and buffers are up
before = peak()
pairwise_loss(f, b, t, y, 1.0).backward()
print(peak() - before)
"""
    assert int(python("-c", code)) < 16 * 1024  # KiB


@outside
@needs_triton
@pytest.mark.ahead
def test_interpreter():
    env = {"TRITON_INTERPRET": "1", "FLOCK_KERNELS": "triton", "FLOCK_TEST_SEED": str(SEED)}
    assert "passed" in python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, **env)


@outside
@needs_triton
@pytest.mark.ahead
def test_every_kernel_compiles_within_the_limits_of_each_gpu():
    cases = "float32:512 float32:77 bfloat16:512 float16:77".split()
    with tempfile.TemporaryDirectory() as folder:
        printed = python("-m", "tests.resources", *cases, TRITON_CACHE_DIR=folder)
    kernels = set()
    for line in printed.splitlines()[1:]:
        arch, kernel, flags, dtype, D, *numbers = line.split()
        registers, stack, shared, wide, tensor, barriers = map(int, numbers)
        kernels.add((arch, kernel, flags, dtype))
        assert stack <= 32 and registers <= 255, line  # older compilers spill four numbers
        assert shared <= {"80": 163, "89": 99, "90": 227}[arch] * 1024, line
        assert wide > 0 or D != "512", line
        assert tensor > 0 or "pairwise_loss" not in kernel, line
        alone = "one-warp" in flags or (kernel, dtype, D) == ("region_pool.forward_kernel", "float32", "512")
        assert barriers == 0 or not alone, line  # no warp waits for another
    archs = {"80", "89", "90"} if os.environ.get("FLOCK_LARGE") else {"90"}
    assert {arch for arch, *_ in kernels} == archs and len(kernels) == len(archs) * 13 * 3


@only_torch
def test_sums_that_nearly_cancel_keep_their_cosine_and_labels_beyond_the_classes_are_refused():
    f, s = torch.randn(2, 5, 16, dtype=torch.float64)
    s = 1e-6 * s
    cos, _ = pairwise_additivity(s[:, None], f, s[:1] - f[:1])
    assert cos[0, 0].item() == pytest.approx(1, abs=1e-9)
    for y in (torch.tensor([-1, 0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 5])):
        with pytest.raises(ValueError, match="y: found .*, expected 0 to 4"):
            pairwise_loss(f, f, f, y, 1.0)
