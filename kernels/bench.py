"""How long, how much memory, how close to what the hardware allows.

    python -m kernels.bench [--device=cpu|cuda] [--dtype=float32] [--op=all] [--repeats=7] [--threads=1]

First every op against its float64 reference, then per op and direction: median time and extra memory of the
naive form (the reference), of the nearest library op and of ours, in one run; bytes and FLOPs that the op
cannot avoid; the roofline floor on named GPUs; last what the compiler says of the kernels. GPU columns
are empty where none was measured. One CPU thread unless told: two wait for each other on a busy machine.
"""
import ctypes
import statistics
import sys
import time
from importlib import import_module

import torch
import torch.nn.functional as F

from kernels import cluster_sums, launch, pairwise_additivity, pairwise_loss, region_pool

REFS = {name: getattr(import_module(f"kernels.{name}"), f"{name}_ref")
        for name in ("region_pool", "pairwise_additivity", "pairwise_loss", "cluster_sums")}

# name: memory TB/s, dense bf16 tensor-core TFLOP/s, fp32 TFLOP/s (vendor's data sheets)
GPUS = {"A100-SXM-80GB": (2.039, 312, 19.5), "RTX 4090": (1.008, 165, 82.6), "H100-SXM": (3.35, 989, 67)}


def measure(fn, device, repeats):
    """Median milliseconds and extra MiB at the peak (None where the system does not tell)."""
    if device == "cuda":
        fn()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        extra, times = torch.cuda.max_memory_allocated() - before, []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times), extra / 2**20
    extra = peak_rss(fn)  # the first call, which also warms up
    times = []
    while len(times) < repeats or sum(times) < 200:  # short ones more often
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), extra


def peak_rss(fn):
    """Growth of the resident set at its peak during fn(), MiB, by Linux's resettable high-water mark."""
    def status(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory hides new
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = status("VmRSS")
    except (OSError, AttributeError):
        fn()
        return None
    fn()
    return status("VmHWM") - before


def forward_backward(op, leaves):
    def run():
        out = op()
        torch.autograd.grad(sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))), leaves)
    return run


# One function per op: draws inputs and returns {direction: (naive, library or None, ours, name of library,
# bytes, FLOPs on tensor cores, other FLOPs)}. e: bytes of an input number.

def bench_region_pool(new, e, largest=14):
    B, H, W, D, K = 16, 14, 14, 512, 512
    x, image = new(B, H, W, D), torch.arange(K) % B
    size = torch.tensor([W, H])
    low = torch.rand(K, 2) * (size - 1)
    room = (size - low).clamp(max=largest) - 1
    boxes = torch.cat([low, low + 1 + torch.rand(K, 2) * room], 1)  # of any size from one cell up
    image, boxes = image.to(x.device), boxes.to(x.device)
    roi, maps = library_roi(x, boxes, image)
    under = sum(int((r > 0).sum() * (c > 0).sum()) for r, c in zip(*import_module("kernels.region_pool").overlaps(boxes, H, W)))
    ours, naive = lambda: region_pool(x, boxes, image), lambda: REFS["region_pool"](x, boxes, image)
    inputs, flops = B * H * W * D * e + K * D * e, 2 * under * D
    return {"forward": (naive, roi, ours, "roi_align + mean", inputs, 0, flops),
            "forward + backward": (forward_backward(naive, x), roi and forward_backward(roi, maps),
                                   forward_backward(ours, x), "roi_align + mean", 2 * inputs, 0, 2 * flops)}


def library_roi(x, boxes, image):
    try:
        from torchvision.ops import roi_align
    except ImportError:
        return None, None
    maps = x.detach().permute(0, 3, 1, 2).contiguous().requires_grad_()  # the layout it wants
    rois = torch.cat([image[:, None], boxes], 1).to(x.dtype)
    return lambda: roi_align(maps, rois, 7, sampling_ratio=2).mean((2, 3)), maps


def bench_pairwise_additivity(new, e):
    n = m = D = 512
    z, f, b = new(n, m, D), new(n, D), new(m, D)
    ours, naive = lambda: pairwise_additivity(z, f, b), lambda: REFS["pairwise_additivity"](z, f, b)
    cosine = lambda: F.cosine_similarity(z, f[:, None] + b, dim=-1)
    moved = n * m * D * e + (n + m) * D * e + 8 * n * m
    return {"forward": (naive, cosine, ours, "cosine_similarity", moved, 0, 10 * n * m * D),
            "forward + backward": (forward_backward(naive, (z, f, b)), forward_backward(cosine, (z, f, b)),
                                   forward_backward(ours, (z, f, b)), "cosine_similarity", 3 * moved, 0, 20 * n * m * D)}


def bench_pairwise_loss(new, e, n=512, D=512, C=10):
    m = n
    f, b, t = new(n, D), new(m, D), new(C, D)
    y = torch.randint(C, (n,)).to(f.device)
    ours, naive = lambda: pairwise_loss(f, b, t, y, 14.3), lambda: REFS["pairwise_loss"](f, b, t, y, 14.3)
    moved, gemm = (n + m + C) * D * e, 2 * n * m * D + 2 * (n + m) * C * D
    return {"forward": (naive, None, ours, "", moved, gemm, 6 * n * m * C),
            "forward + backward": (forward_backward(naive, (f, b, t)), None, forward_backward(ours, (f, b, t)), "",
                                   3 * moved, 4 * gemm, 18 * n * m * C)}


def bench_pairwise_loss_8192(new, e):
    both = bench_pairwise_loss(new, e, n=8192)
    return {name: (None, None, *row[2:]) for name, row in both.items()}  # naive would need terabytes


def bench_cluster_sums(new, e):
    n, D, k = 20_000, 512, 50
    x = F.normalize(new(n, D).detach(), dim=1).requires_grad_()
    labels = torch.randint(k, (n,)).to(x.device)
    ours, naive = lambda: cluster_sums(x, labels, k), lambda: REFS["cluster_sums"](x, labels, k)
    moved = n * D * e + 4 * n * k
    return {"forward": (naive, blocked_product(x), ours, "x @ x.T in blocks", moved, 2 * n * n * D, 3 * n * n),
            "forward + backward": (None, None, forward_backward(ours, x), "", 3 * moved, 6 * n * n * D, 8 * n * n)}


def blocked_product(x):
    def run():
        for i in launch.slices(len(x), 1024):
            x[i] @ x.T
    return run


BENCHES = {"region_pool": bench_region_pool, "region_pool up to 4 x 4": lambda new, e: bench_region_pool(new, e, 4),
           "pairwise_additivity": bench_pairwise_additivity, "pairwise_loss": bench_pairwise_loss,
           "pairwise_loss n=m=8192": bench_pairwise_loss_8192, "cluster_sums": bench_cluster_sums}


def correctness(device, dtype):
    """Largest error of each op at a small size against float64, relative to the largest number."""
    new = lambda *shape: torch.randn(shape, device=device).to(dtype)
    index = torch.randint(3, (40,), device=device)
    unit = F.normalize(new(200, 64), dim=1)
    for name, args in {
        "region_pool": (new(3, 5, 7, 64), torch.rand(40, 4, device=device).cumsum(1) * 2, index),
        "pairwise_additivity": (new(30, 40, 64), new(30, 64), new(40, 64)),
        "pairwise_loss": (new(40, 64), new(50, 64), new(3, 64), index, 14.3),
        "cluster_sums": (unit, torch.randint(5, (200,), device=device), 5),
    }.items():
        op = globals()[name]
        wide = [a.double() if isinstance(a, torch.Tensor) and a.dtype == dtype and a.shape[-1] == 64 else a for a in args]
        for found, exact in zip(*(out if isinstance(out, tuple) else (out,) for out in (op(*args), REFS[name](*wide)))):
            error = float((found - exact).abs().max() / exact.abs().max())
            limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
            print(f"{name:<20} relative error {error:.1e}  {'ok' if error <= limit else 'WRONG'}")
            if not error <= limit:
                sys.exit(f"{name}: relative error {error:.1e}, up to {limit:.0e} expected; no timing of wrong results")


def row(*cells):
    widths = (40, 10, 10, 12, 10)
    print("  ".join(f"{'' if c is None else f'{c:.2f}' if isinstance(c, float) else c:<{w}}" for c, w in zip(cells, widths)))


def main(argv):
    flags = dict(device="cpu", dtype="float32", op="all", repeats="7", threads="1")
    for arg in argv:
        name, _, value = arg.removeprefix("--").partition("=")
        if name not in flags or not value:
            sys.exit(f"kernels.bench: found {arg}; it takes {' '.join(f'--{k}={v}' for k, v in flags.items())}")
        flags[name] = value
    device, dtype, repeats = flags["device"], getattr(torch, flags["dtype"]), int(flags["repeats"])
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("kernels.bench: --device=cuda, but there is no GPU that PyTorch can use")
    torch.set_num_threads(int(flags["threads"]))
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {flags['dtype']}, " + (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)") + "\n")
    correctness(device, dtype)

    new = lambda *shape: torch.randn(shape, device=device).to(dtype).requires_grad_()
    for name, bench in BENCHES.items():
        if flags["op"] not in ("all", name.split()[0]):
            continue
        for direction, (naive, library, ours, what, moved, gemm, flops) in bench(new, dtype.itemsize).items():
            print()
            row(f"{name}, {direction}", "CPU ms", "GPU ms", "extra MiB", "x ours")
            times = {label: measure(fn, device, repeats if label == "ours" else min(repeats, 3))
                     for label, fn in (("naive", naive), (what, library), ("ours", ours)) if fn}
            for label, (ms, extra) in times.items():
                row(f"  {label}", ms if device == "cpu" else None, ms if device == "cuda" else None, extra,
                    ms / times["ours"][0])
            floors = {gpu: max(moved / tb / 1e9, gemm / tensor / 1e9, flops / vector / 1e9)
                      for gpu, (tb, tensor, vector) in GPUS.items()}
            print(f"  {moved / 1e6:.1f} MB, {gemm / 1e9:.2f} GFLOP in matrix products, {flops / 1e9:.2f} GFLOP beside them; "
                  "floor " + ", ".join(f"{gpu} {ms:.4f} ms" for gpu, ms in floors.items()))

    if launch.triton and not launch.INTERPRET and flags["op"] == "all":
        print()
        import_module("kernels.resources").main(["--dtype=bf16", "--width=512"])


if __name__ == "__main__":
    main(sys.argv[1:])
