"""Time of each op beside its naive form and the nearest library call, in one run, as a Markdown table.

    python -m kernels.bench [--device=cpu|cuda] [--dtype=float32|bfloat16|float16] [--threads=1]

The naive form is the op's reference. One CPU thread unless told: two wait for each other on a busy machine.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils import benchmark
from torchvision.ops import roi_align

from kernels import pairwise_additivity, pairwise_loss, region_pool
from kernels.launch import triton
from kernels.pairwise_additivity import pairwise_additivity_ref
from kernels.pairwise_loss import pairwise_loss_ref
from kernels.region_pool import region_pool_ref


def cases(new):
    """Yields name, leaves (none: forward only); then naive, library, ours, each as (function, *arguments)."""
    B, H, W, D, K = 16, 14, 14, 512, 512
    x = new(B, H, W, D)
    maps = x.detach().permute(0, 3, 1, 2).contiguous().requires_grad_()  # [B, D, H, W], as roi_align wants it
    image = torch.arange(K, device=x.device) % B
    size = torch.tensor([W, H], device=x.device)
    low = torch.rand(K, 2, device=x.device) * (size - 1)

    def pooled(rois):
        return roi_align(maps, rois, 7, sampling_ratio=2).mean((2, 3))

    for largest in (14, 4):
        room = (size - low).clamp(max=largest) - 1
        boxes = torch.cat([low, low + 1 + torch.rand(K, 2, device=x.device) * room], 1)  # from one cell up
        rois = torch.cat([image[:, None], boxes], 1).to(x.dtype)  # [K, 5]
        name = f"region_pool, 16 maps 14 x 14 x 512, 512 boxes up to {largest} x {largest}"
        yield (
            name,
            (x, maps),
            (region_pool_ref, x, boxes, image),
            (pooled, rois),
            (region_pool, x, boxes, image),
        )

    z, f, b = new(512, 512, D).detach(), new(512, D).detach(), new(512, D).detach()

    def cosine(z, f, b):
        return F.cosine_similarity(z, f[:, None] + b, dim=-1)

    name = "pairwise_additivity, n = m = D = 512"
    yield name, (), (pairwise_additivity_ref, z, f, b), (cosine, z, f, b), (pairwise_additivity, z, f, b)

    parts = new(512, D), new(512, D), new(10, D)
    y = torch.randint(10, (512,), device=x.device)
    name = "pairwise_loss, n = m = D = 512, C = 10"
    yield name, parts, (pairwise_loss_ref, *parts, y, 14.3), None, (pairwise_loss, *parts, y, 14.3)


def run(op, leaves):
    """Forward, and backward if there are leaves."""
    with torch.set_grad_enabled(bool(leaves)):
        out = op()
    if leaves:
        torch.autograd.grad(out.sum(), leaves, allow_unused=True)


def milliseconds(call, leaves, device):
    if call is None:
        return float("nan")
    timed = partial(run, partial(*call), leaves)
    if device == "cuda":
        return triton.testing.do_bench(timed, return_mode="median")
    timer = benchmark.Timer("timed()", globals={"timed": timed}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=1).median


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(shape, device=flags.device).to(getattr(torch, flags.dtype)).requires_grad_()

    print(f"PyTorch {torch.__version__}, {flags.dtype}, {flags.device}, {flags.threads} CPU thread(s)\n")
    print(
        "| op | naive ms | library ms | ours ms | naive / ours | library / ours |\n|---|---|---|---|---|---|"
    )
    for name, leaves, *calls in cases(new):
        for title, wanted in ((name, ()), (f"{name}, with gradient", leaves)):
            if wanted or title == name:
                naive, library, ours = [milliseconds(call, wanted, flags.device) for call in calls]
                numbers = naive, library, ours, naive / ours, library / ours
                print(f"| {title} | " + " | ".join(f"{x:.3g}" for x in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
