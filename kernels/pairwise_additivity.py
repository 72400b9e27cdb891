"""How additive composites are: each embedding z_ij against the sum f_i + b_j of its parts.

    cos_ij = <z_ij, f_i + b_j> / (|z_ij| |f_i + b_j|)        sq_ij = |z_ij - f_i - b_j|^2

z [n, m, D] for all pairs, f [n, D] foregrounds, b [m, D] backgrounds; or z [P, D] for the pairs (i_p, j_p) of
an incomplete grid. z is read once, f_i + b_j is made a tile at a time. sq comes from the differences, not
from |z|^2 - 2 <z, s> + |s|^2, which loses a small residual in rounding. Backward, with s = f_i + b_j, gc and
gs the gradients of cos and sq,

    dz = alpha s + beta z                      alpha = gc / (|z| |s|) - 2 gs
    ds = alpha z + gamma s                     beta  = 2 gs - gc cos / |z|^2
    df_i = sum_j ds_ij, db_j = sum_i ds_ij     gamma = 2 gs - gc cos / |s|^2

Our reading of BAP's additivity (arXiv 2605.11107, claim 1; the paper's equations are not public). As in
torch.cosine_similarity, a norm below 1e-8 counts as 1e-8.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launch
from kernels.launch import accumulator, jit, slices, tl, use_triton, without_autocast

EPS = 1e-8


def pairwise_additivity_ref(z, f, b, index=None):
    """The definition, with all sums in memory; arguments as pairwise_additivity."""
    s = f[:, None] + b if index is None else f[index[0]] + b[index[1]]  # [n, m, D] or [P, D]
    return F.cosine_similarity(z, s, dim=-1), (z - s).square().sum(-1)


# The PyTorch path: tiles of z and of f_i + b_j that stay in cache.

TILE = 1 << 19  # elements


def tiles(z, f, b, index, dtype):
    """Yields (pairs, i, j, z, s, room): a slice of the pairs, their rows of f and of b, z, f_i + b_j and free space [p, D]."""
    f, b, step = f.to(dtype), b.to(dtype), max(1, TILE // max(1, z.shape[1]))
    space = z.new_empty(2, min(step, len(b) if index is None else len(z)), z.shape[1], dtype=dtype)  # the same for all
    if index is None:
        for i in range(len(f)):
            for j in slices(len(b), step):
                p = slice(i * len(b) + j.start, i * len(b) + j.stop)
                s, room = space[:, :j.stop - j.start]
                yield p, i, j, z[p].to(dtype), torch.add(f[i], b[j], out=s), room
    else:
        for p in slices(len(z), step):
            i, j = index[:, p]
            s, room = space[:, :p.stop - p.start]
            yield p, i, j, z[p].to(dtype), torch.add(f[i], b[j], out=s), room


def forward_torch(z, f, b, index, dtype):
    zs, zz, ss, sq = out = z.new_empty(4, len(z), dtype=dtype)
    norm = torch.linalg.vector_norm
    if index is None:  # |f_i + b_j| of all pairs from one product, a pass over the tiles less; double, as it may cancel
        f2, b2 = f.double(), b.double()
        both = f2.square().sum(1)[:, None] + b2.square().sum(1)
        ss.copy_(both.addmm_(f2, b2.T, alpha=2).clamp_(min=0).sqrt_().flatten())
    for p, _, _, x, s, room in tiles(z, f, b, index, dtype):
        norm(x, dim=1, out=zz[p])
        norm(torch.sub(x, s, out=room), dim=1, out=sq[p])
        if index is not None:
            norm(s, dim=1, out=ss[p])
        torch.sum(s.mul_(x), 1, out=zs[p])
    sq.square_()
    zs /= zz.clamp_(min=EPS) * ss.clamp_(min=EPS)
    return out


def backward_torch(alpha, beta, gamma, z, f, b, index, need_z):
    dz, dtype = torch.empty_like(z) if need_z else z.new_empty(0), alpha.dtype
    df, db = torch.zeros_like(f, dtype=dtype), torch.zeros_like(b, dtype=dtype)
    for p, i, j, x, s, room in tiles(z, f, b, index, dtype):
        a = alpha[p, None]
        ds = torch.mul(a, x, out=room).addcmul_(gamma[p, None], s)  # [p, D]
        if need_z:
            dz[p] = s.mul_(a).addcmul_(beta[p, None], x)
        if index is None:
            df[i] += ds.sum(0)
            db[j] += ds
        else:
            df.index_add_(0, i, ds)
            db.index_add_(0, j, ds)
    return dz, df, db


# The Triton path: a program takes BP pairs and walks along D.

@jit
def forward_kernel(z, f, b, index, out, P, m, D, LIST: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    live = p < P
    if LIST:
        i, j = tl.load(index + p, live, 0), tl.load(index + P + p, live, 0)
    else:
        i, j = p // m, p % m
    zs, zz = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    ss, sq = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        at = live[:, None] & (d < D)[None, :]
        x = tl.load(z + p[:, None] * D + d[None, :], at, 0).to(tl.float32)  # [BP, BD]
        s = tl.load(f + i[:, None] * D + d[None, :], at, 0).to(tl.float32)
        s += tl.load(b + j[:, None] * D + d[None, :], at, 0).to(tl.float32)
        zs += tl.sum(x * s, 1)
        zz += tl.sum(x * x, 1)
        ss += tl.sum(s * s, 1)
        sq += tl.sum((x - s) * (x - s), 1)
    zz, ss = tl.sqrt(zz), tl.sqrt(ss)
    zz, ss = tl.where(zz < 1e-8, 1e-8, zz), tl.where(ss < 1e-8, 1e-8, ss)  # NaN stays
    tl.store(out + p, zs / (zz * ss), live)
    tl.store(out + P + p, zz, live)
    tl.store(out + 2 * P + p, ss, live)
    tl.store(out + 3 * P + p, sq, live)


@jit
def backward_kernel(alpha, beta, gamma, z, own, other, order, starts, partner, dz, down, P, D, row, step,
                    LIST: tl.constexpr, NEED_Z: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """One row of f (or b): the sum of ds over its pairs, always in the same order; dz on the way."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    x_own = tl.load(own + r * D + d, d < D, 0).to(tl.float32)  # [BD]
    first, last = tl.load(starts + r), tl.load(starts + r + 1)
    acc = tl.zeros([BD], tl.float32)
    for k0 in range(first, last, BP):
        k = k0 + tl.arange(0, BP)
        live = k < last
        if LIST:
            p = tl.load(order + k, live, 0)
            o = tl.load(partner + p, live, 0)
        else:
            o = k - first
            p = r * row + o * step
        at = live[:, None] & (d < D)[None, :]
        x = tl.load(z + p[:, None] * D + d[None, :], at, 0).to(tl.float32)  # [BP, BD]
        s = tl.load(other + o[:, None] * D + d[None, :], at, 0).to(tl.float32) + x_own[None, :]
        a = tl.load(alpha + p, live, 0)[:, None]
        acc += tl.sum(tl.where(at, a * x + tl.load(gamma + p, live, 0)[:, None] * s, 0), 0)
        if NEED_Z:
            g = a * s + tl.load(beta + p, live, 0)[:, None] * x
            tl.store(dz + p[:, None] * D + d[None, :], g.to(dz.dtype.element_ty), at)
    tl.store(down + r * D + d, acc, d < D)


def forward_triton(z, f, b, index, dtype):
    tile = launch.rows(z.shape[1])
    z, f, b = z.contiguous(), f.contiguous(), b.contiguous()
    out = z.new_empty(4, len(z), dtype=dtype)
    launch.run(forward_kernel, (-(-len(z) // tile["BP"]),), z, f, b, index if index is not None else z, out,
               len(z), len(b), z.shape[1], LIST=index is not None, **tile)
    return out


def backward_triton(alpha, beta, gamma, z, f, b, index, need_z):
    tile = launch.rows(z.shape[1])
    z, f, b = z.contiguous(), f.contiguous(), b.contiguous()
    D, m = f.shape[1], len(b)
    dz = torch.empty_like(z) if need_z else z.new_empty(0)
    grads = []
    for side, (own, other) in enumerate(((f, b), (b, f))):
        rows, mine = torch.arange(len(own) + 1, device=z.device), z
        if index is None:
            order, starts = rows, rows * len(other)
        else:
            mine, order = index[side].sort(stable=True)
            starts = torch.searchsorted(mine, rows)
        grads.append(torch.empty_like(own, dtype=alpha.dtype))
        launch.run(backward_kernel, (len(own), -(-D // tile["BD"])), alpha, beta, gamma, z, own, other, order,
                   starts, z if index is None else index[1 - side], dz, grads[-1], len(z), D,
                   (m, 1)[side], (1, m)[side], LIST=index is not None, NEED_Z=need_z and side == 0, **tile)
    return dz, *grads


# The op

@torch.library.custom_op("flock::pairwise_additivity", mutates_args=())
@without_autocast
def additivity(z: Tensor, f: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    """z [P, D] -> cos, |z|, |s|, sq [4, P]."""
    dtype = accumulator(z.dtype, f.dtype, b.dtype)
    run = forward_triton if use_triton(z, f, b) else forward_torch
    return run(z, f, b, index, dtype)


@additivity.register_fake
def _(z, f, b, index):
    return z.new_empty(4, z.shape[0], dtype=accumulator(z.dtype, f.dtype, b.dtype))


@torch.library.custom_op("flock::pairwise_additivity_backward", mutates_args=())
@without_autocast
def additivity_backward(grad: Tensor, z: Tensor, f: Tensor, b: Tensor, index: Tensor | None, out: Tensor,
                        need_z: bool) -> tuple[Tensor, Tensor, Tensor]:
    (cos, zz, ss, _), (gc, _, _, gs) = out, grad.to(out.dtype)
    alpha, beta, gamma = gc / (zz * ss) - 2 * gs, 2 * gs - gc * cos / zz.square(), 2 * gs - gc * cos / ss.square()
    run = backward_triton if use_triton(z, f, b) else backward_torch
    dz, df, db = run(alpha, beta, gamma, z, f, b, index, need_z)
    return dz, df.to(f.dtype), db.to(b.dtype)


@additivity_backward.register_fake
def _(grad, z, f, b, index, out, need_z):
    return z.new_empty(z.shape if need_z else 0), f.new_empty(f.shape), b.new_empty(b.shape)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def backward(ctx, grad):
    need_z = ctx.needs_input_grad[0]
    dz, df, db = additivity_backward(grad, *ctx.saved_tensors, need_z)
    return dz if need_z else None, df, db, None


additivity.register_autograd(backward, setup_context=setup_context)


def pairwise_additivity(z, f, b, index=None):
    """(cos(z_ij, f_i + b_j), |z_ij - f_i - b_j|^2) of each composite; see the head of this file.

    z: [n, m, D], or [P, D] for an incomplete grid. f: [n, D], b: [m, D].
    index: with z [P, D] the pair (i, j) of index tensors [P], or one tensor [2, P]; the same pair may come twice.
    Returns two [n, m] (or [P]) in float32 (float64 where an input is float64); sums in the same.
    Raises ValueError where shapes do not fit.
    """
    shape = (len(f), len(b)) if index is None else (len(index[0]),)
    if z.shape != (*shape, f.shape[1]) or f.shape[1] != b.shape[1]:
        raise ValueError(f"z: found {list(z.shape)}, expected {[*shape, f.shape[1]]} for f {list(f.shape)} and "
                         f"b {list(b.shape)}; an incomplete grid needs index=(i, j)")
    if index is not None and not isinstance(index, Tensor):
        index = torch.stack(tuple(index))
    out = additivity(z.flatten(0, -2), f, b, None if index is None else index.long())
    return out[0].unflatten(0, shape), out[3].unflatten(0, shape)
