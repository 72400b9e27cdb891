"""Cross-entropy of all virtual composites f_i + b_j, without ever making them.

    x_ijc = scale * <f_i + b_j, t_c> / |f_i + b_j|
    loss  = mean over i, j of  log sum_c exp(x_ijc) - x_ij,y_i

f [n, D] foregrounds, b [m, D] backgrounds, t [C, D] targets (class texts, or the anchors themselves: then
t = anchors, y = arange(n), and t may be f, the gradients add). Everything comes from three products:

    |f_i + b_j|^2 = |f_i|^2 + |b_j|^2 + 2 <f_i, b_j>       <f_i + b_j, t_c> = <f_i, t_c> + <b_j, t_c>

so a pair costs D for the norm and C for its logits, instead of C * D. Backward, with p the softmax and
r = 1 / |f_i + b_j|: from g_ijc = scale * (p_ijc - [c = y_i]) * r_ij, the gradient of <f_i + b_j, t_c>,

    df_i = sum_jc g_ijc t_c - sum_j v_ij (f_i + b_j)       v_ij = r_ij^2 sum_c (p_ijc - [c = y_i]) x_ijc
    dt_c = sum_i (sum_j g_ijc) f_i + sum_j (sum_i g_ijc) b_j        db_j as df_i

all over n * m, tile by tile with the logits computed again, in O((n + m + C) D) memory.
Our reading of BAP's anchor objective (BAP, arXiv 2605.11107, claim 2; the paper's equations are not public).
Also ours: the algebra cannot tell a squared norm below rounding, eps * (|f|^2 + |b|^2), from zero, so it
stops there; f_i = b_j = 0 has logits 0 and no gradient; the mean over no pairs is NaN.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launch
from kernels.launch import accumulator, autocast_dtype, dot, jit, slices, tl, use_triton, without_autocast

MAX_C = 4096  # targets in one softmax; with more, draw some (see pairwise_loss)


def pairwise_loss_ref(f, b, t, y, scale):
    """The definition, with all n * m composites in memory."""
    s = F.normalize(f[:, None] + b[None], dim=-1)  # [n, m, D]
    x = scale * s @ t.T  # [n, m, C]
    return F.cross_entropy(x.flatten(0, 1), y.repeat_interleave(len(b)))


# The PyTorch path: blocks of pairs for the products, and within each as many rows as keep their logits in cache.

BLOCK, LOGITS = 512, 1 << 18


def inverse_norm(f, b):
    """1 / |f_i + b_j| [n, m] by the algebra, 0 for 0 + 0."""
    squares = f.square().sum(1)[:, None] + b.square().sum(1)
    n2 = torch.maximum(squares + 2 * f @ b.T, torch.finfo(f.dtype).eps * squares)
    return torch.where(n2 == 0, 0, n2.rsqrt())


def forward_torch(f, b, t, y, scale):
    total = torch.zeros((), dtype=torch.float64, device=f.device)
    for i in slices(len(f), BLOCK):
        ft = t @ f[i].T  # [C, ni]
        for j in slices(len(b), BLOCK):
            bt, r = t @ b[j].T, inverse_norm(f[i], b[j])  # [C, nj], [ni, nj]
            for k in slices(len(r), max(1, LOGITS // bt.numel())):
                x = (ft[:, k, None] + bt[:, None]) * (scale * r[k])  # [C, nk, nj]
                own = x[y[i][k], torch.arange(x.shape[1], device=x.device)]  # [nk, nj]
                total += (x.logsumexp(0) - own).sum(dtype=torch.float64)
    return total / (len(f) * len(b))


def backward_torch(f, b, t, y, scale):
    df, db, dt = torch.zeros_like(f), torch.zeros_like(b), torch.zeros_like(t)
    for i in slices(len(f), BLOCK):
        ft = t @ f[i].T  # [C, ni]
        gf = torch.zeros_like(ft)  # gradient of ft, over scale
        for j in slices(len(b), BLOCK):
            bt, r = t @ b[j].T, inverse_norm(f[i], b[j])  # [C, nj], [ni, nj]
            gb, v = torch.zeros_like(bt), torch.empty_like(r)
            for k in slices(len(r), max(1, LOGITS // bt.numel())):
                x = (ft[:, k, None] + bt[:, None]) * (scale * r[k])  # [C, nk, nj]
                g = x.softmax(0)
                g[y[i][k], torch.arange(x.shape[1], device=x.device)] -= 1
                v[k] = x.mul_(g).sum(0)
                g *= r[k]
                gf[:, k] += g.sum(2)
                gb += g.sum(1)
            v *= r * r
            df[i] -= v.sum(1)[:, None] * f[i] + v @ b[j]
            db[j] -= v.sum(0)[:, None] * b[j] + v.T @ f[i] - scale * gb.T @ t
            dt += gb @ b[j]
        df[i] += scale * gf.T @ t
        dt += gf @ f[i]
    return df, db, scale * dt, (t * dt).sum()


# The Triton path. A program owns BI x BJ pairs: their part of F B^T on tensor cores, then class after class in
# registers, twice backward. What it needs per class, <f_i, t_c> and <b_j, t_c>, and what it leaves, sums over
# its rows and columns, lies in memory for SIDE x SIDE pairs at a time. No atomics: each program has its place.

@jit
def products_kernel(t, x, out, C, n, D, PRECISION: tl.constexpr,
                    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr):
    """t [C, D], x [n, D] -> out [C, n] float32."""
    c = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    i = tl.program_id(1).to(tl.int64) * BJ + tl.arange(0, BJ)
    acc = tl.zeros([BI, BJ], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        tc = tl.load(t + c[:, None] * D + d[None, :], (c < C)[:, None] & (d < D)[None, :], 0)
        xi = tl.load(x + i[None, :] * D + d[:, None], (i < n)[None, :] & (d < D)[:, None], 0)
        acc = dot(tc, xi, acc, PRECISION)
    tl.store(out + c[:, None] * n + i[None, :], acc, (c < C)[:, None] & (i < n)[None, :])


@jit
def tile_norm(f, b, ff, bb, i, j, n, m, D, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
              BD: tl.constexpr):
    """1 / |f_i + b_j| for a tile, as inverse_norm."""
    acc = tl.zeros([BI, BJ], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        fi = tl.load(f + i[:, None] * D + d[None, :], (i < n)[:, None] & (d < D)[None, :], 0)
        bj = tl.load(b + j[None, :] * D + d[:, None], (j < m)[None, :] & (d < D)[:, None], 0)
        acc = dot(fi, bj, acc, PRECISION)
    squares = tl.load(ff + i, i < n, 1)[:, None] + tl.load(bb + j, j < m, 1)[None, :]
    n2 = squares + 2 * acc
    n2 = tl.where(n2 < 1.1920929e-07 * squares, 1.1920929e-07 * squares, n2)  # NaN stays
    return tl.where(n2 == 0, 0, tl.rsqrt(n2))


@jit
def tile_softmax(ft, bt, y, sr, i, j, n, m, C, BI: tl.constexpr, BJ: tl.constexpr):
    """Online logsumexp over the classes of a tile, and the logit of the own class (NaN if there is none)."""
    x = (tl.load(ft + i, i < n, 0)[:, None] + tl.load(bt + j, j < m, 0)[None, :]) * sr
    top, total, own = x, tl.zeros([BI, BJ], tl.float32) + 1, tl.where((y == 0)[:, None], x, float("nan"))
    for c in range(1, C):
        x = (tl.load(ft + c * n + i, i < n, 0)[:, None] + tl.load(bt + c * m + j, j < m, 0)[None, :]) * sr
        e = tl.exp(-tl.abs(x - top))
        total = tl.where(x > top, total * e + 1, total + e)
        top = tl.where(x > top, x, top)
        own = tl.where((y == c)[:, None], x, own)
    return top + tl.log(total), own


@jit
def forward_kernel(f, b, ff, bb, ft, bt, y, scale, out, n, m, C, D, PRECISION: tl.constexpr,
                   BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    j = tl.program_id(1).to(tl.int64) * BJ + tl.arange(0, BJ)
    r = tile_norm(f, b, ff, bb, i, j, n, m, D, PRECISION, BI, BJ, BD)
    lse, own = tile_softmax(ft, bt, tl.load(y + i, i < n, 0), tl.load(scale) * r, i, j, n, m, C, BI, BJ)
    total = tl.sum(tl.where((i < n)[:, None] & (j < m)[None, :], lse - own, 0))
    tl.store(out + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@jit
def backward_kernel(f, b, ff, bb, ft, bt, y, scale, gf, gb, v, n, m, C, D, PRECISION: tl.constexpr,
                    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr):
    """gf [blocks of j, C, n] and gb [blocks of i, C, m]: sums of g over the tile; v [n, m]."""
    ti, tj = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, j = ti * BI + tl.arange(0, BI), tj * BJ + tl.arange(0, BJ)
    at = (i < n)[:, None] & (j < m)[None, :]
    r = tile_norm(f, b, ff, bb, i, j, n, m, D, PRECISION, BI, BJ, BD)
    sr, own = tl.load(scale) * r, tl.load(y + i, i < n, 0)
    lse, _ = tile_softmax(ft, bt, own, sr, i, j, n, m, C, BI, BJ)
    w = tl.zeros([BI, BJ], tl.float32)
    gf += tj * C * n + i
    gb += ti * C * m + j
    for c in range(0, C):
        x = (tl.load(ft + c * n + i, i < n, 0)[:, None] + tl.load(bt + c * m + j, j < m, 0)[None, :]) * sr
        g = tl.exp(x - lse) - (own == c).to(tl.float32)[:, None]
        w += g * x
        g = tl.where(at, g * r, 0)
        tl.store(gf + c * n, tl.sum(g, 1), i < n)
        tl.store(gb + c * m, tl.sum(g, 0), j < m)
    tl.store(v + i[:, None] * m + j[None, :], w * r * r, at)


ROOM = 1 << 25  # numbers that SIDE x SIDE pairs may leave in memory


def side(C):
    """Rows and columns of the block of pairs that is in memory at a time: SIDE^2 for v, SIDE^2 C / 32 for gf and gb."""
    return max(s for s in (256, 512, 1024, 2048, 4096) if s == 256 or s * s * (1 + C / 32) <= ROOM)


def products(t, x, tile):
    out, grid = t.new_empty(len(t), len(x), dtype=torch.float32), (-(-len(t) // tile["BI"]), -(-len(x) // tile["BJ"]))
    launch.run(products_kernel, grid, t, x, out, len(t), len(x), t.shape[1], **tile)
    return out


def blocks(f, b, t, y, scale, tile):
    """Yields (i, j, grid, inputs of both kernels, sizes): slices of f and b, i outermost."""
    f, b, t, y = f.contiguous(), b.contiguous(), t.contiguous(), y.contiguous()
    ff, bb = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square() for x in (f, b))
    for i in slices(len(f), side(len(t))):
        ft = products(t, f[i], tile)  # [C, ni]
        for j in slices(len(b), side(len(t))):
            bt = products(t, b[j], tile)  # [C, nj]
            sizes = (ft.shape[1], bt.shape[1], *t.shape)
            grid = (-(-sizes[0] // tile["BI"]), -(-sizes[1] // tile["BJ"]))
            yield i, j, grid, (f[i], b[j], ff[i], bb[j], ft, bt, y[i], scale), sizes


def forward_triton(f, b, t, y, scale):
    total, tile = torch.zeros((), dtype=torch.float64, device=f.device), launch.tiles(f)
    for _, _, grid, inputs, sizes in blocks(f, b, t, y, scale, tile):
        out = scale.new_empty(grid)
        launch.run(forward_kernel, grid, *inputs, out, *sizes, **tile)
        total += out.sum(dtype=torch.float64)
    return total / (len(f) * len(b))


def backward_triton(f, b, t, y, scale):
    df, db, dt = (torch.zeros_like(x, dtype=torch.float32) for x in (f, b, t))
    t32, tile = t.float(), launch.tiles(f)
    for i, j, grid, inputs, sizes in blocks(f, b, t, y, scale, tile):
        fi, bj, (ni, nj, C, _) = inputs[0].float(), inputs[1].float(), sizes
        gf, gb, v = scale.new_empty(grid[1], C, ni), scale.new_empty(grid[0], C, nj), scale.new_empty(ni, nj)
        launch.run(backward_kernel, grid, *inputs, gf, gb, v, *sizes, **tile)
        gf, gb = gf.sum(0), gb.sum(0)  # [C, ni], [C, nj]
        df[i] += scale * gf.T @ t32 - v.sum(1)[:, None] * fi - v @ bj
        db[j] += scale * gb.T @ t32 - v.sum(0)[:, None] * bj - v.T @ fi
        dt += gf @ fi + gb @ bj
    return df, db, scale * dt, (t32 * dt).sum()


# The op

@torch.library.custom_op("flock::pairwise_loss", mutates_args=())
@without_autocast
def loss(f: Tensor, b: Tensor, t: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    dtype = accumulator(f.dtype)
    if use_triton(f):
        return forward_triton(f, b, t, y, scale.to(dtype)).to(dtype)
    return forward_torch(f.to(dtype), b.to(dtype), t.to(dtype), y, scale.to(dtype)).to(dtype)


@loss.register_fake
def _(f, b, t, y, scale):
    return f.new_empty((), dtype=accumulator(f.dtype))


@torch.library.custom_op("flock::pairwise_loss_backward", mutates_args=())
@without_autocast
def loss_backward(grad: Tensor, f: Tensor, b: Tensor, t: Tensor, y: Tensor,
                  scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(f.dtype)
    if use_triton(f):
        grads = backward_triton(f, b, t, y, scale.to(dtype))
    else:
        grads = backward_torch(f.to(dtype), b.to(dtype), t.to(dtype), y, scale.to(dtype))
    share = grad.to(dtype) / max(1, len(f) * len(b))
    return tuple((share * g).to(x.dtype) for g, x in zip(grads, (f, b, t, scale)))


@loss_backward.register_fake
def _(grad, f, b, t, y, scale):
    return f.new_empty(f.shape), b.new_empty(b.shape), t.new_empty(t.shape), scale.new_empty(())


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    df, db, dt, dscale = loss_backward(grad, *ctx.saved_tensors)
    return df, db, dt, None, dscale


loss.register_autograd(backward, setup_context=setup_context)


def pairwise_loss(f, b, t, y, scale, classes=None):
    """Mean cross-entropy of the n * m virtual composites f_i + b_j against y_i; see the head of this file.

    f: [n, D], b: [m, D], t: [C, D] (may be f). y: [n], the class of each f, in [0, C).
    scale: float or 0-d tensor, the inverse temperature; a tensor gets its gradient.
    classes: [S] distinct classes that take part, for C above 4096 (anchors as targets): the loss among these
    and the foregrounds of these. Draw anew for each step: torch.randperm(C, generator=g)[:4096].
    Returns a 0-d tensor: float32 (float64 for float64). Under autocast float32 input is cast first.
    Raises ValueError where shapes do not fit, or for C above 4096 without classes.
    """
    if classes is not None:
        place = torch.full((len(t),), -1, device=t.device).scatter(0, classes, torch.arange(len(classes), device=t.device))
        keep = (place[y] >= 0).nonzero()[:, 0]
        f, t, y = f[keep], t[classes], place[y[keep]]
    if not (f.dim() == b.dim() == t.dim() == 2 and f.shape[1] == b.shape[1] == t.shape[1] and y.shape == f.shape[:1]):
        raise ValueError(f"f {list(f.shape)}, b {list(b.shape)}, t {list(t.shape)}, y {list(y.shape)}: "
                         "expected [n, D], [m, D], [C, D], [n]")
    if len(t) > MAX_C:
        raise ValueError(f"t: {len(t)} targets in one softmax, up to {MAX_C} are computed; draw some: "
                         f"classes=torch.randperm({len(t)}, generator=g)[:{MAX_C}]")
    dtype = autocast_dtype(f)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=accumulator(f.dtype), device=f.device)
    return loss(f.to(dtype), b.to(dtype), t.to(dtype), y.long(), scale)
