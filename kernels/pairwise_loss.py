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

from kernels.launch import accumulator, autocast_dtype, use_triton, without_autocast

MAX_C = 4096  # targets in one softmax; with more, draw some (see pairwise_loss)


def pairwise_loss_ref(f, b, t, y, scale):
    """The definition, with all n * m composites in memory."""
    s = F.normalize(f[:, None] + b[None], dim=-1)  # [n, m, D]
    x = scale * s @ t.T  # [n, m, C]
    return F.cross_entropy(x.flatten(0, 1), y.repeat_interleave(len(b)))


# The PyTorch path: blocks of pairs for the products, and within each as many rows as keep their logits in cache.

BLOCK, LOGITS = 512, 1 << 18


def slices(n, step):
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


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


# The op

@torch.library.custom_op("flock::pairwise_loss", mutates_args=())
@without_autocast
def loss(f: Tensor, b: Tensor, t: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    dtype = accumulator(f.dtype)
    if use_triton(f):
        return forward_triton(f, b, t, y, scale.to(dtype))
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
