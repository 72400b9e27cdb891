"""What the compiler makes of every kernel, for GPUs that need not be there.

    python -m tests.resources [float32:512 bfloat16:77 ...]

Calls the ops on small CPU tensors, with the launch replaced by a compilation for sm_90, with FLOCK_LARGE=1
also for sm_80 and sm_89: each line is a kernel as it is really launched. Prints registers per thread, bytes
on the stack (spilled ones among them), shared memory, loads of 16 bytes, tensor-core products, barriers of
more than a warp (as the source has them, not as often as they are met). TRITON_INTERPRET must be unset.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from kernels import launch, pairwise_additivity, pairwise_loss, region_logits, region_pool
from kernels.launch import triton

ARCHS = (80, 89, 90) if os.environ.get("FLOCK_LARGE") else (90,)
LOAD16 = r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.c[ag]\S* [^;]*, 0x10"
BARRIER = r"\bbar(?:rier)?\.sync"
TENSOR = r"\b(?:mma\.sync|wgmma\.mma_async)"


def pretend(arch):
    """In place of a GPU's driver: what Triton asks one before it compiles. Kernels are cached by device."""
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    asked = {"device": lambda: arch, "stream": lambda device: 0, "target": lambda: target}
    triton.runtime.driver.set_active(SimpleNamespace(**{f"get_current_{k}": v for k, v in asked.items()}))


def call_ops(dtype, D):
    """Every op with every flag of its kernels, forward and backward."""
    maps, f, b, t = (torch.zeros(*shape, D, dtype=dtype) for shape in ((4, 16, 16), (32,), (64,), (16,)))
    index = torch.zeros(2048, dtype=torch.long)
    pairwise_additivity(maps.view(1024, D), f, b, (index[:1024], index[:1024]))
    pairwise_additivity(torch.zeros(32, 64, D, dtype=dtype), f, b)
    for launch.MULTIPROCESSORS in (128, 0):  # 32 x 64 are few pairs, or not
        pairwise_loss(f, b, t, index[:32], 1.0)
        pairwise_loss(f.detach().requires_grad_(), b, t, index[:32], 1.0)
    for regions in (torch.zeros(32, 4), torch.zeros(32, 16, 16)):
        region_pool(maps.requires_grad_(), regions, index[:32]).sum().backward()
        region_logits(maps, regions, index[:32], t)


def report(dtype, D):
    """[(arch, kernel, flags, registers, stack, shared, loads, products)] for rows of D numbers."""
    lines = []

    def compile_only(kernel, grid, *args, warps=4, stages=2, **constants):
        name = f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"
        flags = "+".join(k for k in ("LIST", "MASK", "NEED_GRAD") if constants.get(k))
        flags = "+".join([flags] * bool(flags) + ["one-warp"] * (warps == 1)) or "-"
        for arch in ARCHS:
            pretend(arch)
            binary = kernel.warmup(*args, grid=grid, num_warps=warps, num_stages=stages, **constants)
            registers = re.search(r"REG:(\d+) STACK:(\d+)", usage(binary.asm["cubin"]))
            counts = [len(re.findall(pattern, binary.asm["ptx"])) for pattern in (LOAD16, TENSOR, BARRIER)]
            counts[2] *= warps > 1
            lines.append((arch, name, flags, *registers.groups(), binary.metadata.shared, *counts))

    launch.run = compile_only
    launch.use_triton = lambda *tensors: True
    call_ops(dtype, D)
    return lines


def usage(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([tool, "-res-usage", file.name], stderr=subprocess.STDOUT, text=True)


if __name__ == "__main__":
    if triton is None or launch.INTERPRET:
        sys.exit("tests/resources.py compiles: it needs Triton, with TRITON_INTERPRET unset")
    print("sm kernel flags dtype D registers stack shared 16-byte-loads tensor-core barriers")
    for case in sys.argv[1:] or ["float32:512", "float32:77", "bfloat16:512", "float16:512"]:
        name, D = case.split(":")
        for arch, kernel, flags, *numbers in report(getattr(torch, name), int(D)):
            print(arch, kernel, flags, name, D, *numbers, flush=True)
