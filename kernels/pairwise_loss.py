"""Cross-entropy of all virtual composites f_i + b_j, without ever making them.

    x_ijc = scale * <f_i + b_j, t_c> / |f_i + b_j|
    loss  = mean over i, j of  log sum_c exp(x_ijc) - x_ij,y_i

f [n, D] foregrounds, b [m, D] backgrounds, t [C, D] targets (class texts, or the anchors themselves: then
t = anchors, y = arange(n), and t may be f, the gradients add). Everything comes from three products:

    |f_i + b_j|^2 = |f_i|^2 + |b_j|^2 + 2 <f_i, b_j>       <f_i + b_j, t_c> = <f_i, t_c> + <b_j, t_c>

so a pair costs D for the norm and C for its logits, instead of C * D. The gradient, with p the softmax,
r = 1 / |f_i + b_j| and g_ijc = (p_ijc - [c = y_i]) * r_ij, is 1 / (n * m) times

    df_i = scale sum_jc g_ijc t_c - sum_j v_ij (f_i + b_j)    v_ij = r_ij^2 sum_c (p_ijc - [c = y_i]) x_ijc
    dt_c = scale sum_ij g_ijc (f_i + b_j)                     db_j as df_i, dscale = sum_c <t_c, dt_c> / scale

The loss is one number, so its gradient is made in the same pass, while a tile's logits are at hand, and kept
until it is asked for: in O((n + m + C) D) memory.
Our reading of BAP's anchor objective (BAP, arXiv 2605.11107, claim 2; the paper's equations are not public).
Also ours: the algebra cannot tell a squared norm below rounding, eps * (|f|^2 + |b|^2), from zero, so it
stops there; f_i = b_j = 0 has logits 0 and no gradient; the mean over no pairs is NaN.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import launch
from kernels.launch import accumulator, constexpr, dot, jit, slices, tl, triton

MAX_C = 4096  # targets in one softmax; with more, draw some (see pairwise_loss)


def pairwise_loss_ref(f, b, t, y, scale):
    """The definition, with all n * m composites in memory."""
    s = F.normalize(f[:, None] + b[None], dim=-1)  # [n, m, D]
    x = scale * s @ t.T  # [n, m, C]
    return F.cross_entropy(x.flatten(0, 1), y.repeat_interleave(len(b)))


# The PyTorch path: within a block of pairs, as many rows at a time as keep their logits in cache.

LOGITS = 1 << 18  # numbers


def inverse_norm(f, b):
    """1 / |f_i + b_j| [n, m] by the algebra, 0 for 0 + 0."""
    squares = f.square().sum(1)[:, None] + b.square().sum(1)
    n2 = torch.maximum(squares + 2 * f @ b.T, torch.finfo(f.dtype).eps * squares)
    return torch.where(n2 == 0, 0, n2.rsqrt())


def block_torch(f, b, ft, bt, y, scale, need_grad):
    """A block of pairs, f [n, D] and b [m, D], and its products with the targets, ft [C, n] and bt [C, m]
    -> the sum of its losses; sums of g over j [C, n] and over i [C, m]; v [n, m]."""
    r = inverse_norm(f.to(scale.dtype), b.to(scale.dtype))
    loss = torch.zeros((), dtype=torch.float64, device=r.device)
    gf, gb, v = torch.zeros_like(ft), torch.zeros_like(bt), torch.zeros_like(r)
    for k in slices(len(r), max(1, LOGITS // bt.numel())):
        x = (ft[:, k, None] + bt[:, None]) * (scale * r[k])  # [C, nk, m]
        logp = x.log_softmax(0)
        row = torch.arange(x.shape[1], device=x.device)
        loss -= logp[y[k], row].sum(dtype=torch.float64)
        if need_grad:
            g = logp.exp_()
            g[y[k], row] -= 1
            v[k] = x.mul_(g).sum(0) * r[k].square()
            g *= r[k]
            gf[:, k] = g.sum(2)
            gb += g.sum(1)
    return loss, gf, gb, v


# The Triton path. A program owns BI x BJ pairs: their part of F B^T on tensor cores, then class after class
# in registers, twice for the gradient. No atomics: what it leaves, sums over its rows and its columns, has a
# place of its own, and PyTorch adds them up.


@jit
def loss_kernel(f, b, f_norm, b_norm, ft, bt, y, scale, loss, gf, gb, v, n, m, C, D, NEED_GRAD: constexpr,
                PRECISION: constexpr, BI: constexpr, BJ: constexpr, BD: constexpr):  # fmt: skip
    """Of each tile: loss [blocks of i, blocks of j], gf [blocks of j, C, n], gb [blocks of i, C, m], v."""
    ti, tj = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, j = ti * BI + tl.arange(0, BI)[:, None], tj * BJ + tl.arange(0, BJ)[None, :]  # [BI, 1], [1, BJ]
    products = tl.zeros([BI, BJ], tl.float32)  # <f_i, b_j>
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        fi = tl.load(f + i * D + d[None, :], (i < n) & (d < D)[None, :], 0)
        bj = tl.load(b + j * D + d[:, None], (j < m) & (d < D)[:, None], 0)
        products = dot(fi, bj, products, PRECISION)
    fi, bj = tl.load(f_norm + i, i < n, 1), tl.load(b_norm + j, j < m, 1)
    squares = fi * fi + bj * bj
    n2 = squares + 2 * products
    n2 = tl.where(n2 < 1.1920929e-07 * squares, 1.1920929e-07 * squares, n2)  # as inverse_norm; NaN stays
    r = tl.where(n2 == 0, 0, tl.rsqrt(n2))
    sr = tl.load(scale) * r
    label = tl.load(y + i, i < n, 0)

    # online logsumexp over the classes; the target's logit is NaN where the label is no class
    top = tile_logits(ft, bt, 0, sr, i, j, n, m)
    total, target = tl.zeros([BI, BJ], tl.float32) + 1, tl.where(label == 0, top, float("nan"))
    for c in range(1, C):
        x = tile_logits(ft, bt, c, sr, i, j, n, m)
        e = tl.exp(-tl.abs(x - top))
        total = tl.where(x > top, total * e + 1, total + e)
        top = tl.where(x > top, x, top)
        target = tl.where(label == c, x, target)
    lse, at = top + tl.log(total), (i < n) & (j < m)
    tl.store(loss + ti * tl.num_programs(1) + tj, tl.sum(tl.where(at, lse - target, 0)))

    if NEED_GRAD:
        w = tl.zeros([BI, BJ], tl.float32)
        gf += tj * C * n + i
        gb += ti * C * m + j
        for c in range(0, C):
            x = tile_logits(ft, bt, c, sr, i, j, n, m)
            g = tl.exp(x - lse) - (label == c).to(tl.float32)
            w += g * x
            g = tl.where(at, g * r, 0)
            tl.store(gf + c * n, tl.sum(g, 1, True), i < n)
            tl.store(gb + c * m, tl.sum(g, 0, True), j < m)
        tl.store(v + i * m + j, w * r * r, at)


@jit
def tile_logits(ft, bt, c, sr, i, j, n, m):
    """Logits of class c for a tile of pairs; sr = scale / |f_i + b_j|."""
    return (tl.load(ft + c * n + i, i < n, 0) + tl.load(bt + c * m + j, j < m, 0)) * sr


def block_triton(f, b, ft, bt, y, scale, need_grad):
    """As block_torch; f and b contiguous, in any of the kernels' dtypes."""
    n, m, (C, D) = len(f), len(b), (len(ft), f.shape[1])
    tile = launch.tiles(f, b)
    grid = triton.cdiv(n, tile["BI"]), triton.cdiv(m, tile["BJ"])
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in (f, b)]
    loss, v = ft.new_empty(grid), ft.new_empty(n, m)
    kept = C if need_grad else 0
    gf, gb = ft.new_empty(grid[1], kept, n), ft.new_empty(grid[0], kept, m)
    inputs = (f, b, *norms, ft, bt, y, scale)
    launch.run(loss_kernel, grid, *inputs, loss, gf, gb, v, n, m, C, D, NEED_GRAD=need_grad, **tile)
    return loss.sum(dtype=torch.float64), *([gf.sum(0), gb.sum(0), v] if need_grad else [None] * 3)


# The op: blocks of pairs, the products with the targets before and after them.

BLOCK = 512  # rows and columns of pairs at a time in PyTorch
ROOM = 1 << 25  # numbers that the kernel's block may leave in memory


def side(C):
    """Rows and columns of the kernel's block: it leaves side^2 numbers for v and up to 3 / 32 C times that,
    as tiles are 16 x 32 or more, for gf and gb."""
    return max(256, int((ROOM / (1 + C * 3 / 32)) ** 0.5) // 64 * 64)


def add_slope(df, gf, st, v, f, b):
    """df [n, D] += gf^T st - sum_j v_ij (f_i + b_j), in place: each launch counts where pairs are few."""
    df.addmm_(gf.T, st).addmm_(v, b, alpha=-1).addcmul_(v.sum(1, True), f, value=-1)


class PairwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, b, t, y, scale, need_grad):
        ctx.pairs = len(f) * len(b)
        block, size = (block_triton, side(len(t))) if launch.use_triton(f) else (block_torch, BLOCK)
        raw_f, raw_b, y = f.contiguous(), b.contiguous(), y.contiguous()  # what a kernel reads
        f, b, t, scale = [x.to(accumulator(f.dtype)) for x in (f, b, t, scale)]
        st, total, sizes = scale * t, 0.0, (len(f), len(b), len(t))
        slopes = f.new_zeros(sum(sizes) * need_grad, f.shape[1])
        df, db, dt = slopes.split(sizes) if need_grad else (None,) * 3  # in one piece: fewer launches
        for i in slices(len(f), size):
            ft = t @ f[i].T  # [C, ni]
            for j in slices(len(b), size):
                bt = t @ b[j].T  # [C, nj]
                loss, gf, gb, v = block(raw_f[i], raw_b[j], ft, bt, y[i], scale, need_grad)
                total = total + loss
                if need_grad:
                    add_slope(df[i], gf, st, v, f[i], b[j])
                    add_slope(db[j], gb, st, v.T, b[j], f[i])
                    dt.addmm_(gf, f[i]).addmm_(gb, b[j])
        if need_grad:
            dscale, ctx.sizes = (t * dt).sum() if ctx.needs_input_grad[4] else None, sizes
            dt.mul_(scale)
            ctx.save_for_backward(slopes, dscale)
        return (total / ctx.pairs).to(f.dtype) if ctx.pairs else f.new_full((), torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        share = grad / max(1, ctx.pairs)
        slopes, dscale = [None if x is None else share * x for x in ctx.saved_tensors]
        return *slopes.split(ctx.sizes), None, dscale, None  # autograd gives each its input's dtype


@torch.compiler.disable  # a compiled caller calls it as it is
def pairwise_loss(f, b, t, y, scale, classes=None):
    """Mean cross-entropy of the n * m virtual composites f_i + b_j against y_i; see the head of this file.

    f: [n, D], b: [m, D], t: [C, D] (may be f). y: [n], the class of each f, in [0, C).
    scale: float or 0-d tensor, the inverse temperature; a tensor gets its gradient.
    classes: [S] distinct classes that take part, for C above 4096 (anchors as targets): the loss among these
    and the foregrounds of these. Draw anew for each step: torch.randperm(C, generator=g)[:4096].
    Returns a 0-d tensor: float32 (float64 for float64). Under autocast float32 input is cast first.
    Raises ValueError where shapes do not fit, for C above 4096 without classes, and on a CPU for y beyond [0,
    C); on a GPU, which would have to wait, the loss is then NaN.
    """
    if classes is not None:
        place = torch.full((len(t),), -1, device=t.device)
        place[classes] = torch.arange(len(classes), device=t.device)
        keep = place[y] >= 0
        f, t, y = f[keep], t[classes], place[y[keep]]  # labels count among these classes
    matrices = f.dim() == b.dim() == t.dim() == 2 and f.shape[1] == b.shape[1] == t.shape[1]
    if not matrices or y.shape != f.shape[:1]:
        shapes = [list(x.shape) for x in (f, b, t, y)]
        raise ValueError(f"f, b, t, y: found {shapes}, expected [n, D], [m, D], [C, D], [n]")
    if y.device.type == "cpu" and len(y) and not 0 <= y.min() <= y.max() < len(t):
        raise ValueError(f"y: found {int(y.min())} to {int(y.max())}, expected 0 to {len(t) - 1}")
    if len(t) > MAX_C:
        draw = f"classes=torch.randperm({len(t)}, generator=g)[:{MAX_C}]"
        raise ValueError(f"t: {len(t)} targets in one softmax, up to {MAX_C} are computed; draw some: {draw}")
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((), scale, dtype=accumulator(f.dtype), device=f.device)
    device, dtype = f.device.type, f.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # as a product of matrices would run
    need_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (f, b, t, scale))
    with torch.autocast(device, enabled=False):  # sums inside keep their own precision
        return PairwiseLoss.apply(f.to(dtype), b.to(dtype), t.to(dtype), y.long(), scale, need_grad)
