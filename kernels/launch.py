"""What the ops share: Triton if it is there, which path tensors take, launch settings and their limits."""

import functools
import os
import sys

import torch

MISSING = None
try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError as error:  # a machine without Triton: the PyTorch path is all there is
    triton = tl = constexpr = None
    MISSING = error

MULTIPROCESSORS = 128  # about as many as a large GPU has; fixed, as settings are to hang on shapes alone
MAX_D = 4096  # embedding width that the kernels were written and tested for


def jit(fn):
    return triton.jit(fn) if triton else fn


@jit
def dot(a, b, acc, PRECISION: constexpr):
    """acc + a b in float32 with the PRECISION of tiles(); the interpreter's product does not know bf16."""
    if PRECISION == "interpret":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# TRITON_INTERPRET=1, asked of what jit made: each version of Triton keeps the setting elsewhere
INTERPRET = triton is not None and not isinstance(dot, triton.JITFunction)


def use_triton(x, *others):
    """The one place that decides: True if tensors like x (and others) go to Triton, False if to PyTorch.

    Triton: CUDA tensors, or any under TRITON_INTERPRET=1 (set before kernels is imported), in bf16,
    fp16 or fp32, rows up to 4096 wide, where Triton runs at all (the driver may be too old for it; that is
    said once). FLOCK_KERNELS=triton|torch forces one; RuntimeError where Triton is forced but cannot run.
    """
    force = os.environ.get("FLOCK_KERNELS", "")
    if force not in ("", "triton", "torch"):
        raise RuntimeError(f"FLOCK_KERNELS: found {force!r}, expected triton or torch; or leave it unset")
    why = ""
    if triton is None:
        why = f"Triton cannot be imported ({MISSING}); install triton"
    elif not (x.is_cuda or INTERPRET):
        why = f"the tensors are on {x.device}; move them to a GPU or set TRITON_INTERPRET=1 before the start"
    elif not {t.dtype for t in (x, *others)} <= {torch.bfloat16, torch.float16, torch.float32}:
        why = f"found {x.dtype}, expected bfloat16, float16 or float32"
    elif x.shape[-1] > MAX_D:
        why = f"rows are {x.shape[-1]} wide, the kernels take up to {MAX_D}"
    elif force != "torch" and not INTERPRET:
        why = failure(x.device)
    if force == "triton" and why:
        raise RuntimeError(f"FLOCK_KERNELS=triton: {why}, or unset FLOCK_KERNELS")
    return force != "torch" and not why


@jit
def one_kernel(x):
    tl.store(x, 1.0)


@functools.cache
def failure(device):
    """What Triton fails with on a GPU, "" if it runs there; said once."""
    try:
        run(one_kernel, (1,), torch.zeros(1, device=device))
        return ""
    except Exception as problem:  # whatever compiler, driver and C compiler raise
        line = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        why = f"Triton cannot run on {device} ({line}); mend driver or Triton"
        print(f"kernels: {why}; until then they run in PyTorch", file=sys.stderr)
        return why


def run(kernel, grid, *args, warps=4, stages=2, **constants):
    """Launches the kernel on the device of its first tensor, if there is anything to do."""
    if min(grid) == 0:
        return
    if grid[0] >= 1 << 31 or max(grid[1:], default=0) >= 1 << 16:
        raise ValueError(f"grid {grid}: a GPU takes up to 2^31 x 65,535 programs; split the input")
    with torch.cuda.device(args[0].device if args[0].is_cuda else -1):
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)


# Launch settings of each kernel, to be chosen on a GPU by `python -m kernels.bench --device=cuda --tune`.
# Untuned: from reading what the compiler makes of them, none of them was ever timed.
SETTINGS = {
    "region_pool": dict(BP=8, BD=512, warps=4),
    "region_pool, lists": dict(BK=1024, warps=4),
    "region_pool, gradient": dict(BP=8, BD=512, warps=4),
    "region_logits": dict(BP=8, BC=8, BD=MAX_D, warps=4),
    "pairwise_additivity": dict(BP=8, BD=128, warps=4),
    "pairwise_loss": dict(BI=64, BJ=64, BD=32, warps=8, stages=3),
    "pairwise_loss, few pairs": dict(BI=16, BJ=32, BD=32, warps=1, stages=3),
}


def rows(kernel, D):
    """Settings of a kernel that walks along rows of D numbers, no tile of them above 4,096."""
    settings = dict(SETTINGS[kernel])
    settings["BD"] = BD = min(settings["BD"], max(16, triton.next_power_of_2(D)))
    settings.update({k: min(v, max(1, 4096 // BD)) for k, v in settings.items() if k in ("BP", "BC")})
    return settings | dict(warps=8) if BD > 1024 else settings


def tiles(f, b):
    """Settings of the kernel with products of f [n, D] and b [m, D]: BI x BJ products, BD numbers at a time.

    float32 goes through tensor cores as three tf32 products, which keeps it float32, with smaller steps and,
    where rows are no multiple of 16 numbers, smaller tiles: else its registers spill on sm_80 and sm_89.
    Where large tiles would leave most of a GPU idle each is one warp, whose sums need no barrier.
    """
    settings = SETTINGS["pairwise_loss"]
    few = triton.cdiv(len(f), settings["BI"]) * triton.cdiv(len(b), settings["BJ"]) < MULTIPROCESSORS
    settings = SETTINGS["pairwise_loss, few pairs"] if few else settings
    settings = settings | dict(PRECISION="ieee")
    if f.dtype == torch.float32:
        settings |= dict(BD=16, PRECISION="tf32x3", BI=min(settings["BI"], 32 if f.shape[-1] % 16 else 64))
    return settings | (dict(PRECISION="interpret") if INTERPRET else {})


def slices(n, step):
    """range(n) in slices of up to step."""
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def accumulator(*dtypes):
    """The dtype of sums over tensors of these dtypes: float64 if one of them is, float32 for all else."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
