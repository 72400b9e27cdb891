"""Sums of the clipped cosine distance of each row to each cluster.

    out_ic = sum over j != i with labels_j = c of  clip(1 - <x_i, x_j>, 0, 1)

x [n, D], rows of unit norm (they are taken as they come), labels [n]; a label outside [0, k) is in no cluster,
such a row still gets its sums. From out and the cluster sizes follow medoids, silhouettes and inertia of
RaVL's clustering (NeurIPS 2024) without the n x n matrix: a tile of distances
is summed by cluster and forgotten. Backward, with w_ij = [0 < 1 - <x_i, x_j> < 1] (g_i,labels_j + g_j,labels_i),

    dx_i = - sum over j != i of w_ij x_j

A row with NaN is NaN in its own sums and in those to its cluster.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launch
from kernels.launch import accumulator, autocast_dtype, dot, jit, slices, tl, use_triton, without_autocast


def cluster_sums_ref(x, labels, k):
    """The definition, with the n x n matrix."""
    distance = (1 - x @ x.T).clip(0, 1)
    distance = distance.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
    return torch.stack([distance[:, labels == c].sum(1) for c in range(k)], 1) if k else x.new_empty(len(x), 0)


# The PyTorch path: the matrix is symmetric, so half of its tiles will do. Rows are sorted by label, so a tile
# meets few clusters and its sums are a thin product with one-hot labels.

BLOCK = 1024


def one_hot(labels, k, dtype):
    """[n] -> [n, k]; all zero where the label is in no cluster."""
    return (labels[:, None] == torch.arange(k, device=labels.device)).to(dtype)


def forward_torch(x, labels, k):
    labels, order = labels.sort(stable=True)
    x = x[order]
    nan = x.isnan().any(1)
    x[nan] = 0  # a NaN must not reach other clusters through the zeros of one_hot
    hot, out = one_hot(labels, k, x.dtype), x.new_zeros(len(x), k)
    blocks, one = slices(len(x), BLOCK), x.new_ones(())
    spans = [slice(*labels[i][[0, -1]].clip(0, k).add(torch.tensor([0, 1])).tolist()) for i in blocks]
    for a, i in enumerate(blocks):
        for j, span in zip(blocks[a:], spans[a:]):
            d = torch.addmm(one, x[i], x[j].T, alpha=-1).clamp_(0, 1)  # [ni, nj]
            if i == j:
                d.fill_diagonal_(0)
            else:
                out[j, spans[a]] += d.T @ hot[i, spans[a]]
            out[i, span] += d @ hot[j, span]
    if nan.any():
        others, nans = hot.sum(0) - hot, hot[nan].sum(0) - hot * nan[:, None]
        out[(nan[:, None] & (others > 0)) | (nans > 0)] = torch.nan
    return torch.empty_like(out).index_copy_(0, order, out)


def backward_torch(grad, x, labels):
    k, dx = grad.shape[1], torch.zeros_like(x)
    labels = torch.where((labels >= 0) & (labels < k), labels, k)
    grad = F.pad(grad, (0, 1))  # column k: no cluster
    blocks = slices(len(x), BLOCK)
    for a, i in enumerate(blocks):
        for j in blocks[a:]:
            d = torch.addmm(x.new_ones(()), x[i], x[j].T, alpha=-1)
            w = grad[i][:, labels[j]] + grad[j][:, labels[i]].T  # [ni, nj]
            w[(d <= 0) | (d >= 1)] = 0
            if i == j:
                w.fill_diagonal_(0)
            else:
                dx[j] -= w.T @ x[i]
            dx[i] -= w @ x[j]
    return dx


# The Triton path: forward, a program owns BI rows and one cluster, whose rows lie together after a sort.

@jit
def forward_kernel(x, columns, order, starts, out, n, k, D, PRECISION: tl.constexpr,
                   BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    c = tl.program_id(1).to(tl.int64)
    first, last = tl.load(starts + c), tl.load(starts + c + 1)
    acc = tl.zeros([BI], tl.float32)
    for j0 in range(first, last, BJ):
        j = j0 + tl.arange(0, BJ)
        s = tl.zeros([BI, BJ], tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            xi = tl.load(x + i[:, None] * D + d[None, :], (i < n)[:, None] & (d < D)[None, :], 0)
            xj = tl.load(columns + j[None, :] * D + d[:, None], (j < last)[None, :] & (d < D)[:, None], 0)
            s = dot(xi, xj, s, PRECISION)
        s = 1 - s
        s = tl.where(s < 0, 0, tl.where(s > 1, 1, s))  # NaN stays
        own = tl.load(order + j, j < last, -1)
        acc += tl.sum(tl.where((j < last)[None, :] & (own[None, :] != i[:, None]), s, 0), 1)
    tl.store(out + i * k + c, acc, i < n)


@jit
def backward_kernel(x, labels, grad, out, i0, j0, ni, nj, k, D, PRECISION: tl.constexpr,
                    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr):
    """w for rows i0.. and columns j0.. of the matrix -> out [ni, nj]; grad [n, k + 1], its last column 0."""
    ti = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    tj = tl.program_id(1).to(tl.int64) * BJ + tl.arange(0, BJ)
    i, j = i0 + ti, j0 + tj
    li, lj = ti < ni, tj < nj
    s = tl.zeros([BI, BJ], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        xi = tl.load(x + i[:, None] * D + d[None, :], li[:, None] & (d < D)[None, :], 0)
        xj = tl.load(x + j[None, :] * D + d[:, None], lj[None, :] & (d < D)[:, None], 0)
        s = dot(xi, xj, s, PRECISION)
    at = li[:, None] & lj[None, :]
    ci, cj = tl.load(labels + i, li, 0), tl.load(labels + j, lj, 0)
    w = tl.load(grad + i[:, None] * (k + 1) + cj[None, :], at, 0)
    w += tl.load(grad + j[None, :] * (k + 1) + ci[:, None], at, 0)
    w = tl.where((1 - s <= 0) | (1 - s >= 1) | (i[:, None] == j[None, :]), 0, w)
    tl.store(out + ti[:, None] * nj + tj[None, :], w, at)


SIDE = 4096  # of the block of w that lies in memory


def forward_triton(x, labels, k):
    x = x.contiguous()
    labels, order = labels.sort(stable=True)
    starts = torch.searchsorted(labels, torch.arange(k + 1, device=x.device))
    out, tile = x.new_empty(len(x), k, dtype=torch.float32), launch.tiles(x)
    launch.run(forward_kernel, (-(-len(x) // tile["BI"]), k), x, x[order], order, starts, out, len(x), k,
               x.shape[1], **tile)
    return out


def backward_triton(grad, x, labels):
    x, k, dx = x.contiguous(), grad.shape[1], torch.zeros_like(x, dtype=grad.dtype)
    labels = torch.where((labels >= 0) & (labels < k), labels, k)
    grad, tile = F.pad(grad, (0, 1)), launch.tiles(x)
    for i in slices(len(x), SIDE):
        for j in slices(len(x), SIDE):
            ni, nj = i.stop - i.start, j.stop - j.start
            w = grad.new_empty(ni, nj)
            launch.run(backward_kernel, (-(-ni // tile["BI"]), -(-nj // tile["BJ"])), x, labels, grad, w,
                       i.start, j.start, ni, nj, k, x.shape[1], **tile)
            dx[i] -= w @ x[j].to(w.dtype)
    return dx


# The op

@torch.library.custom_op("flock::cluster_sums", mutates_args=())
@without_autocast
def sums(x: Tensor, labels: Tensor, k: int) -> Tensor:
    if use_triton(x):
        return forward_triton(x, labels, k)
    return forward_torch(x.to(accumulator(x.dtype)), labels, k)


@sums.register_fake
def _(x, labels, k):
    return x.new_empty(x.shape[0], k, dtype=accumulator(x.dtype))


@torch.library.custom_op("flock::cluster_sums_backward", mutates_args=())
@without_autocast
def sums_backward(grad: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    if use_triton(x):
        return backward_triton(grad, x, labels).to(x.dtype)
    return backward_torch(grad, x.to(grad.dtype), labels).to(x.dtype)


@sums_backward.register_fake
def _(grad, x, labels):
    return x.new_empty(x.shape)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def backward(ctx, grad):
    return sums_backward(grad, *ctx.saved_tensors), None, None


sums.register_autograd(backward, setup_context=setup_context)


def cluster_sums(x, labels, k):
    """[n, D], [n] -> sums of clipped cosine distance to each cluster [n, k]; see the head of this file.

    x: rows of unit norm. labels: integers, [0, k) for rows in a cluster. k: number of clusters.
    Returns float32 (float64 for float64). Under autocast float32 input is cast first.
    Raises ValueError where shapes do not fit.
    """
    if x.dim() != 2 or labels.shape != x.shape[:1]:
        raise ValueError(f"x {list(x.shape)}, labels {list(labels.shape)}: expected [n, D], [n]")
    return sums(x.to(autocast_dtype(x)), labels.long(), int(k))
