"""What the ops share: Triton if it is there, which path runs, launch settings and their limits."""
import functools
import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    MISSING, INTERPRET = None, triton.knobs.runtime.interpret
except ImportError as error:  # a machine without Triton: the PyTorch path is all there is
    triton, tl = None, SimpleNamespace(constexpr=None)
    MISSING, INTERPRET = error, False

MAX_D = 4096  # embedding width that the kernels were written and tested for


def jit(fn):
    return triton.jit(fn) if triton else fn


def use_triton(x, *more):
    """True if tensors like x (and more) go to the Triton kernels, False if to PyTorch.

    Triton: CUDA tensors, or any under TRITON_INTERPRET=1 (set before kernels is imported), in bf16,
    fp16 or fp32, rows up to 4096 wide. FLOCK_KERNELS=triton|torch forces one; RuntimeError where
    Triton is forced but cannot run.
    """
    force = os.environ.get("FLOCK_KERNELS", "")
    if force not in ("", "triton", "torch"):
        raise RuntimeError(f"FLOCK_KERNELS: found {force!r}, expected triton or torch; or leave it unset")
    why = None
    if triton is None:
        why = f"Triton cannot be imported ({MISSING}); install triton"
    elif not (x.is_cuda or INTERPRET):
        why = f"the tensors are on {x.device}; move them to a GPU or set TRITON_INTERPRET=1 before the start"
    elif not {t.dtype for t in (x, *more)} <= {torch.bfloat16, torch.float16, torch.float32}:
        why = f"found {x.dtype}, expected bfloat16, float16 or float32"
    elif x.shape[-1] > MAX_D:
        why = f"rows are {x.shape[-1]} wide, the kernels take up to {MAX_D}"
    if force == "triton" and why:
        raise RuntimeError(f"FLOCK_KERNELS=triton: {why}, or unset FLOCK_KERNELS")
    return force != "torch" and not why


def run(kernel, grid, *args, warps=4, stages=2, **constants):
    """Launches the kernel on the device of its first tensor, if there is anything to do."""
    if min(grid) == 0:
        return
    if grid[0] >= 1 << 31 or max(grid[1:], default=0) >= 1 << 16:
        raise ValueError(f"grid {grid}: a GPU takes up to 2^31 x 65,535 programs; split the input")
    with torch.cuda.device(args[0].device if args[0].is_cuda else -1):
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)


def rows(D):
    """Settings of the kernels that walk along rows of D numbers: BP rows by BD numbers. Untuned."""
    return dict(BP=8, BD=64 if D <= 64 else 512, warps=4)


def tiles(x):
    """Settings of the kernels with matrix products: BI x BJ products, BD numbers of each row at a time. Untuned.

    float32 goes through tensor cores as three tf32 products, which keeps it float32, with smaller steps and, where
    rows are no multiple of 16 numbers, smaller tiles: else its registers spill on sm_80 and sm_89.
    """
    single = x.dtype == torch.float32
    return dict(BI=32 if single and x.shape[-1] % 16 else 64, BJ=64, BD=16 if single else 32, warps=8, stages=3,
                PRECISION="interpret" if INTERPRET else "tf32x3" if single else "ieee")


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32, with the PRECISION of tiles(); the interpreter's own product does not know bf16."""
    if PRECISION == "interpret":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def slices(n, step):
    """range(n) in slices of up to step."""
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def accumulator(*dtypes):
    """The dtype of sums over tensors of these dtypes: float64 if one of them is, float32 for all else."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def autocast_dtype(x):
    """The dtype that a matrix product of x would run in: autocast's for float32 under autocast, else x's."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(fn):
    """Runs an op's body with autocast off: inside, each op chooses its own precision."""
    @functools.wraps(fn)
    def body(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, *args)
    return body
