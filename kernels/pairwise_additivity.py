"""How additive composites are: each embedding z_ij against the sum f_i + b_j of its parts.

    cos_ij = <z_ij, f_i + b_j> / (|z_ij| |f_i + b_j|)        sq_ij = |z_ij - f_i - b_j|^2

z [n, m, D] for all pairs, f [n, D] foregrounds, b [m, D] backgrounds; or z [P, D] for the pairs (i_p, j_p) of
an incomplete grid. z is read once, f_i + b_j is made a tile at a time. sq comes from the differences, not
from |z|^2 - 2 <z, s> + |s|^2, which loses a small residual in rounding. It is a measure: where a gradient is
asked for, it is that of the definition below.

Our reading of BAP's additivity (arXiv 2605.11107, claim 1; the paper's equations are not public). As in
torch.cosine_similarity, a norm below 1e-8 counts as 1e-8.
"""

import torch
import torch.nn.functional as F

from kernels import launch
from kernels.launch import accumulator, constexpr, jit, slices, tl, triton

EPS = 1e-8


def pairwise_additivity_ref(z, f, b, index=None):
    """The definition, with all sums in memory; arguments as pairwise_additivity."""
    if index is None:
        s = f[:, None] + b  # [n, m, D]
    else:
        s = f[index[0]] + b[index[1]]  # [P, D]
    return F.cosine_similarity(z, s, dim=-1), (z - s).square().sum(-1)


# The PyTorch path: tiles of z and of f_i + b_j that stay in cache.

TILE = 1 << 19  # elements


def parts(f, b, index, step):
    """Yields up to step pairs at a time: their slice of all pairs, their rows of f and of b."""
    if index is None:
        for i in range(len(f)):
            for j in slices(len(b), step):
                yield slice(i * len(b) + j.start, i * len(b) + j.stop), f[i], b[j]
    else:
        for p in slices(index.shape[1], step):
            i, j = index[:, p]
            yield p, f[i], b[j]


def forward_torch(z, f, b, index):
    dtype = accumulator(z.dtype, f.dtype, b.dtype)
    f, b = f.to(dtype), b.to(dtype)
    zs, zz, ss, sq = z.new_empty(4, len(z), dtype=dtype)
    norm = torch.linalg.vector_norm
    step = max(1, TILE // max(1, z.shape[1]))
    room = z.new_empty(2, min(step, len(z)), z.shape[1], dtype=dtype)  # the same memory for all tiles
    for p, fi, bj in parts(f, b, index, step):
        s, difference = room[:, : p.stop - p.start]  # [p, D] each
        x = z[p].to(dtype)
        torch.add(fi, bj, out=s)
        norm(x, dim=1, out=zz[p])
        norm(torch.sub(x, s, out=difference), dim=1, out=sq[p])
        norm(s, dim=1, out=ss[p])
        torch.sum(s.mul_(x), 1, out=zs[p])
    return zs / (zz.clamp_(min=EPS) * ss.clamp_(min=EPS)), sq.square_()


# The Triton path: a program takes BP pairs and walks along D, a warp on rows of its own. Sums over a row are
# taken once, at its end: on the way no warp waits for another.


@jit
def forward_kernel(z, f, b, index, cos, sq, P, m, D, LIST: constexpr, BP: constexpr, BD: constexpr):
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    live = p < P
    if LIST:
        i, j = tl.load(index + p, live, 0), tl.load(index + P + p, live, 0)
    else:
        i, j = p // m, p % m
    zs, zz = tl.zeros([BP, BD], tl.float32), tl.zeros([BP, BD], tl.float32)
    ss, dd = tl.zeros([BP, BD], tl.float32), tl.zeros([BP, BD], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        at = live[:, None] & (d < D)[None, :]
        x = tl.load(z + p[:, None] * D + d[None, :], at, 0).to(tl.float32)  # [BP, BD]
        s = tl.load(f + i[:, None] * D + d[None, :], at, 0).to(tl.float32)
        s += tl.load(b + j[:, None] * D + d[None, :], at, 0).to(tl.float32)
        zs += x * s
        zz += x * x
        ss += s * s
        dd += (x - s) * (x - s)
    zz, ss = tl.sqrt(tl.sum(zz, 1)), tl.sqrt(tl.sum(ss, 1))
    zz, ss = tl.where(zz < 1e-8, 1e-8, zz), tl.where(ss < 1e-8, 1e-8, ss)  # NaN stays
    tl.store(cos + p, tl.sum(zs, 1) / (zz * ss), live)
    tl.store(sq + p, tl.sum(dd, 1), live)


def forward_triton(z, f, b, index):
    LIST = index is not None
    z, f, b = z.contiguous(), f.contiguous(), b.contiguous()
    cos, sq = z.new_empty(2, len(z), dtype=torch.float32)
    tile = launch.rows("pairwise_additivity", z.shape[1])
    inputs = (z, f, b, index if LIST else z)  # z: something to point at
    grid = (triton.cdiv(len(z), tile["BP"]),)
    launch.run(forward_kernel, grid, *inputs, cos, sq, len(z), len(b), z.shape[1], LIST=LIST, **tile)
    return cos, sq


@torch.compiler.disable  # a compiled caller calls it as it is
def pairwise_additivity(z, f, b, index=None):
    """(cos(z_ij, f_i + b_j), |z_ij - f_i - b_j|^2) of each composite; see the head of this file.

    z: [n, m, D], or [P, D] for an incomplete grid. f: [n, D], b: [m, D].
    index: with z [P, D] the pair (i, j) of index tensors [P], or one tensor [2, P]; pairs may come twice.
    Returns two [n, m] (or [P]) in float32 (float64 where an input is float64); sums in the same.
    Raises ValueError where shapes do not fit.
    """
    shape = (len(f), len(b)) if index is None else (len(index[0]),)
    if z.shape != (*shape, f.shape[1]) or f.shape[1] != b.shape[1]:
        shapes = f"f {list(f.shape)} and b {list(b.shape)}; an incomplete grid needs index=(i, j)"
        raise ValueError(f"z: found {list(z.shape)}, expected {[*shape, f.shape[1]]} for {shapes}")
    if index is not None:
        index = torch.stack(tuple(index)).long()
    if torch.is_grad_enabled() and (z.requires_grad or f.requires_grad or b.requires_grad):
        dtype = accumulator(z.dtype, f.dtype, b.dtype)
        return pairwise_additivity_ref(z.to(dtype), f.to(dtype), b.to(dtype), index)
    forward = forward_triton if launch.use_triton(z, f, b) else forward_torch
    cos, sq = forward(z.flatten(0, -2), f, b, index)
    return cos.view(shape), sq.view(shape)
