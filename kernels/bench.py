"""Time of each op beside its naive form and the nearest library call, in one run, as a Markdown table.

    python -m kernels.bench [--device=cpu|cuda] [--dtype=float32|bfloat16|float16] [--threads=1] [--tune]

The naive form is the op's reference. One CPU thread unless told: two wait for each other on a busy machine.
Bare is ours on a GPU without launches from Python: a CUDA graph, played again, inputs in cache if they fit.
The floor is what the op's numbers, products and sums need in that dtype, at the rates that the same run finds
for a copy and for products of matrices. --tune prints launch.SETTINGS for the GPU at hand.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils import benchmark
from torchvision.ops import roi_align

from kernels import launch, pairwise_additivity, pairwise_loss, region_logits, region_pool
from kernels.launch import triton
from kernels.pairwise_additivity import pairwise_additivity_ref
from kernels.pairwise_loss import pairwise_loss_ref
from kernels.region_logits import region_logits_ref
from kernels.region_pool import region_pool_ref


def cases(new):
    """Yields name, leaves (none: forward only), calls and work: naive, library, ours, each as (function,
    *arguments); numbers read and written, operations in products of matrices and in other sums, forward."""
    B, H, W, D, K, C = 16, 14, 14, 512, 512, 10
    x, t = new(B, H, W, D), new(C, D)
    maps = x.detach().permute(0, 3, 1, 2).contiguous().requires_grad_()  # [B, D, H, W], as roi_align wants it
    image = torch.arange(K, device=x.device) % B
    size = torch.tensor([W, H], device=x.device)
    low = torch.rand(K, 2, device=x.device) * (size - 1)

    def pooled(rois):
        return roi_align(maps, rois, 7, sampling_ratio=2).mean((2, 3))

    def cosines(rois):
        return F.normalize(pooled(rois), dim=1) @ F.normalize(t, dim=1).T

    for largest in (14, 4):
        room = (size - low).clamp(max=largest) - 1
        boxes = torch.cat([low, low + 1 + torch.rand(K, 2, device=x.device) * room], 1)  # from one cell up
        rois = torch.cat([image[:, None], boxes], 1).to(x.dtype)  # [K, 5]
        cells = int((boxes[:, 2:].ceil() - boxes[:, :2].floor()).prod(1).sum())  # under boxes
        shape, given = f"16 maps 14 x 14 x 512, 512 boxes up to {largest} x {largest}", (x, boxes, image)
        calls = (region_pool_ref, *given), (pooled, rois), (region_pool, *given)
        yield f"region_pool, {shape}", (x, maps), calls, (x.numel() + K * D, 0, 2 * D * cells)
    calls = (region_logits_ref, *given, t), (cosines, rois), (region_logits, *given, t)
    work = x.numel() + C * D + K * D + K * C, 0, 2 * D * cells + 2 * K * C * D
    yield f"region_logits, {shape}, C = 10", (x, maps, t), calls, work

    z, f, b = new(512, 512, D).detach(), new(512, D).detach(), new(512, D).detach()

    def cosine(z, f, b):
        return F.cosine_similarity(z, f[:, None] + b, dim=-1)

    calls = (pairwise_additivity_ref, z, f, b), (cosine, z, f, b), (pairwise_additivity, z, f, b)
    yield "pairwise_additivity, n = m = D = 512", (), calls, (z.numel() + 1024 * D, 0, 10 * z.numel())
    del z, calls

    for n, C in ((256, 256), (512, 10), (2048, 10)):
        given = new(n, D), new(n, D), new(C, D), torch.randint(C, (n,), device=x.device), 14.3
        naive = (pairwise_loss_ref, *given) if n * n * max(C, D) < 1 << 28 else None  # more takes much memory
        work = (2 * n + C) * D, 2 * n * n * D + 4 * n * C * D, 6 * n * n * C
        calls = naive, None, (pairwise_loss, *given)
        yield f"pairwise_loss, n = m = {n}, D = 512, C = {C}", given[:3], calls, work


def run(call, leaves):
    """Forward, and backward if there are leaves."""
    with torch.set_grad_enabled(bool(leaves)):
        out = call[0](*call[1:])
    if leaves:
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out.sum(), leaves, allow_unused=True)


def milliseconds(call, leaves, device, bare=False):
    if call is None or (bare and device == "cpu"):
        return float("nan")
    timed = partial(run, call, leaves)
    if device == "cuda":
        test = triton.testing.do_bench_cudagraph if bare else triton.testing.do_bench
        return test(timed, return_mode="median")
    timer = benchmark.Timer("timed()", globals={"timed": timed}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=1).median


def rates(new, device):
    """Of this machine, a millisecond: numbers copied, operations of products, of products in float32."""
    side = 8192 if device == "cuda" else 1024
    x = new(side, side).detach()
    calls = (torch.empty_like(x).copy_, x), (torch.mm, x, x), (torch.mm, x.float(), x.float())
    copied, product, wide = [milliseconds(call, (), device) for call in calls]
    return 2 * side**2 / copied, 2 * side**3 / product, 2 * side**3 / wide


def tune(new, dtype):
    """Prints SETTINGS of launch.py: twice each number is halved or doubled where that makes its op faster."""
    print(f"SETTINGS = {{  # {torch.cuda.get_device_name()}, {dtype}, Triton {triton.__version__}")
    ours = {name: (calls[-1], leaves) for name, leaves, calls, _ in cases(new)}
    for kernel, settings in launch.SETTINGS.items():
        op = kernel.split(",")[0] + ("" if "few" not in kernel else ", n = m = 256")
        call, leaves = [v for name, v in ours.items() if name.startswith(op)][-1]
        best = milliseconds(call, leaves, "cuda", bare=True)
        for key, change in 2 * [(key, change) for key in settings for change in (0.5, 2)]:
            tried = launch.SETTINGS[kernel] = settings | {key: int(settings[key] * change)}
            try:
                time = milliseconds(call, leaves, "cuda", bare=True)
            except Exception:  # does not compile, or asks for more than the GPU has
                time = float("inf")
            if time < 0.98 * best:
                settings, best = tried, time
            launch.SETTINGS[kernel] = settings
        row = ", ".join(f"{key}={value}" for key, value in settings.items())
        print(f'    "{kernel}": dict({row}),  # {best:.4f} ms', flush=True)
    print("}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tune", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(shape, device=flags.device).to(getattr(torch, flags.dtype)).requires_grad_()

    if flags.tune:
        if flags.device == "cpu":
            parser.error("--tune: launch settings are a GPU's; add --device=cuda")
        return tune(new, flags.dtype)
    print(f"PyTorch {torch.__version__}, {flags.dtype}, {flags.device}, {flags.threads} CPU thread(s)\n")
    columns = "op, naive ms, library ms, ours ms, bare ms, floor ms, naive / ours, library / ours".split(", ")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rate = rates(new, flags.device)
    for name, leaves, calls, work in cases(new):
        for title, wanted, times in ((name, (), (1, 1, 1)), (f"{name}, with gradient", leaves, (2, 3, 2))):
            if wanted or title == name:
                naive, library, ours = [milliseconds(call, wanted, flags.device) for call in calls]
                floor = max(k * w / r for k, w, r in zip(times, work, rate, strict=True))
                bare = milliseconds(calls[-1], wanted, flags.device, bare=True)
                numbers = naive, library, ours, bare, floor, naive / ours, library / ours
                print(f"| {title} | " + " | ".join(f"{x:.3g}" for x in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
