"""What the compiler makes of every kernel, for GPUs that need not be there.

    python -m kernels.resources [--arch=80,89,90] [--dtype=bf16,fp16,fp32] [--width=512,77,64,33]

Runs the ops' own launch code on small CPU tensors with the launch itself replaced by a compilation, so each
line is a kernel as it is really launched: its types, alignment and settings. Prints registers per thread and
spilled bytes (ptxas -v, the one inside Triton), shared memory, and which instructions matter: loads of 16
bytes, tensor-core products. TRITON_INTERPRET must be unset: interpreted kernels cannot be compiled.
"""
import contextlib
import io
import re
import sys
from importlib import import_module

import torch

from kernels import launch
from kernels.launch import triton

# by name: as attributes of the package these are the functions
cluster_sums, pairwise_additivity, pairwise_loss, region_pool = (
    import_module(f"kernels.{name}") for name in ("cluster_sums", "pairwise_additivity", "pairwise_loss", "region_pool"))

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}


def recorded(op):
    """The launches that op() would do: [(kernel, args, warps, stages, constants)]."""
    calls, launch_run = [], launch.run
    launch.run = lambda kernel, grid, *args, warps=4, stages=2, **constants: calls.append(
        (kernel, args, warps, stages, constants))
    try:
        op()
    finally:
        launch.run = launch_run
    return calls


def launches(dtype, D):
    """Every kernel of every op, as launched for rows of D numbers of this dtype."""
    z, f, b, t = (torch.zeros(*k, D, dtype=dtype) for k in ((1024,), (32,), (32,), (16,)))
    index, one, P = torch.zeros(2, 1024, dtype=torch.long), torch.ones(()), torch.zeros(1024)
    maps, image, grad = z.view(4, 16, 16, D), torch.zeros(32, dtype=torch.long), torch.zeros(32, D)
    regions = torch.zeros(32, 4), torch.zeros(32, 16, 16)
    labels, sums = torch.zeros(32, dtype=torch.long), torch.zeros(32, 16)
    return [call for op in (
        *(lambda r=r: region_pool.forward_triton(maps, r, image) for r in regions),
        *(lambda r=r: region_pool.backward_triton(grad, r, image, 4, 16, 16, dtype) for r in regions),
        *(lambda i=i: pairwise_additivity.forward_triton(z, f, b, i, torch.float32) for i in (None, index)),
        *(lambda i=i, need_z=need_z: pairwise_additivity.backward_triton(P, P, P, z, f, b, i, need_z)
          for i in (None, index) for need_z in (True, False)),
        lambda: pairwise_loss.forward_triton(f, b, t, labels, one),
        lambda: pairwise_loss.backward_triton(f, b, t, labels, one),
        lambda: cluster_sums.forward_triton(f, labels, 16),
        lambda: cluster_sums.backward_triton(sums, f, labels),
    ) for call in recorded(op)]


def source(kernel, args, constants):
    """The call as Triton's launcher would specialise it: 1 is constant, multiples of 16 are known as such."""
    types, fixed, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, args)) | constants
    for n, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constants or (isinstance(value, int) and value == 1):
            types[name], fixed[n,] = "constexpr", value
        else:
            tensor = isinstance(value, torch.Tensor)
            types[name] = "*" + TYPES[value.dtype] if tensor else "i32" if abs(value) < 1 << 31 else "i64"
            if (value.data_ptr() if tensor else value) % 16 == 0:
                attributes[n,] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(kernel, types, fixed, attributes)


def compiled(src, arch, warps, stages):
    """-> dict of registers, spilled bytes, shared bytes, 16-byte loads, tensor-core instructions."""
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        out = triton.compile(src, target=triton.backends.compiler.GPUTarget("cuda", arch, 32),
                             options=dict(num_warps=warps, num_stages=stages))
    ptx, log = out.asm["ptx"], log.getvalue()
    return dict(registers=int(re.search(r"Used (\d+) registers", log)[1]),
                spills=sum(map(int, re.findall(r"(\d+) bytes spill", log))), shared=out.metadata.shared,
                wide=len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.c[ag]\S* [^;]*, 0x10", ptx)),
                tensor=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)))


def report(archs, cases):
    """Yields (arch, (kernel, flags, dtype, D), dict of compiled()) for every distinct kernel of the cases (dtype, D)."""
    if launch.triton is None or launch.INTERPRET:
        raise RuntimeError("kernels.resources compiles: it needs Triton, with TRITON_INTERPRET unset")
    archs, seen = list(archs), set()
    for dtype, D in cases:
        for kernel, args, warps, stages, constants in launches(dtype, D):
            src = source(kernel, args, constants)
            if src.hash() in seen:
                continue
            seen.add(src.hash())
            flags = "+".join(k for k in ("LIST", "MASK", "NEED_Z") if constants.get(k)) or "-"
            name = f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"
            for arch in archs:
                yield arch, (name, flags, TYPES[dtype], D), compiled(src, arch, warps, stages)


def main(argv):
    flags = dict(arch="80,89,90", dtype="bf16,fp16,fp32", width="512,77,64,33")
    for arg in argv:
        name, _, value = arg.removeprefix("--").partition("=")
        if name not in flags or not value:
            sys.exit(f"kernels.resources: found {arg}; it takes {' '.join(f'--{k}={v}' for k, v in flags.items())}")
        flags[name] = value
    archs, names, widths = (value.split(",") for value in flags.values())
    dtypes = {name: dtype for dtype, name in TYPES.items()}
    print("sm kernel flags dtype D registers spilled shared 16-byte-loads tensor-core")
    for arch, case, numbers in report(map(int, archs), [(dtypes[n], int(D)) for n in names for D in widths]):
        print(arch, *case, *numbers.values(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
