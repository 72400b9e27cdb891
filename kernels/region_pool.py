"""Mean of a feature map under boxes or masks.

    out_k = sum_p w_kp x_{i(k),p} / sum_p w_kp        p over the H x W cells of image i(k)
    box:  w_kp = area of overlap of box k with cell p = (overlap in y) * (overlap in x)
    mask: w_kp = masks_k,p

The cell in row r, column c covers [c, c+1] x [r, r+1]; what of a box lies off the map counts for nothing.
Our reading: a box or mask without any weight gives a row of zeros; a cell without weight is not read, so
its NaN stays out; a NaN under a box is a NaN in its row. The gradient goes to the features only.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launch
from kernels.launch import accumulator, jit, slices, tl, use_triton, without_autocast


def region_pool_ref(features, boxes, image_index, grid=None, normalize=False):
    """The definition, one region at a time; arguments as region_pool."""
    if features.dim() == 3:
        features = features.unflatten(1, grid)
    out = []
    for region, i in zip(boxes, image_index.tolist()):
        if region.dim() == 1:
            rows, columns = overlaps(region[None].double(), *features.shape[1:3])
            region = rows[0, :, None] * columns[0]
        w = region.to(features.dtype)  # [H, W]
        x = torch.where(w[:, :, None] == 0, 0, features[i])  # [H, W, D]
        pooled = (w[:, :, None] * x).sum((0, 1)) / torch.where((w == 0).all(), 1, w.sum())
        out.append(F.normalize(pooled, dim=0) if normalize else pooled)
    return torch.stack(out) if out else features.new_zeros(0, features.shape[-1])


def overlaps(boxes, H, W):
    """[K, 4] x1,y1,x2,y2 in cells -> lengths of overlap with each row [K, H] and each column [K, W] of cells."""
    def overlap(low, high, n):
        cell = torch.arange(n, dtype=boxes.dtype, device=boxes.device)
        before = lambda x: (x[:, None] - cell).clamp_(0, 1)  # how much of each cell lies before x
        return before(high).sub_(before(low)).clamp_(min=0)
    x1, y1, x2, y2 = boxes.unbind(1)
    return overlap(y1, y2, H), overlap(x1, x2, W)


# The PyTorch path: each region is a weighted bag of rows of the feature map, and backward each cell is a weighted
# bag of rows of the gradient. Regions in the order of their images are fastest: a map then stays in cache. (One
# product of matrices per image, zeros and all, is faster only where regions cover most of their maps; see LOG.md.)

CHUNK = 1 << 22  # weights looked at in one go


def sparse(boxes, image, H, W, dtype):
    """Boxes [k, 4] or masks [k, H, W], images [k] -> the weights above zero [N], of each region summing to one; their
    cells in [B*H*W]; where each region's start [k + 1]. Works on the L rows of cells that regions touch."""
    boxes, k = boxes.to(dtype), torch.arange(len(boxes) + 1, device=boxes.device)
    if boxes.dim() == 3:
        total, row = boxes.sum((1, 2)), torch.arange(len(boxes) * H, device=boxes.device)  # region * H + row [L]
        region = row // H
        w = boxes / torch.where(total == 0, 1, total)[:, None, None]
    else:
        rows, columns = overlaps(boxes, H, W)
        total = rows.sum(1) * columns.sum(1)
        rows = (rows / torch.where(total == 0, 1, total)[:, None]).reshape(-1)
        row, = rows.nonzero(as_tuple=True)
        region = row // H
        w = rows.index_select(0, row)[:, None] * columns.index_select(0, region)
    w = w.reshape(-1)  # [L * W]
    at, = w.nonzero(as_tuple=True)
    starts = torch.searchsorted(at, torch.searchsorted(row, k * H) * W)
    first = (row + ((image - k[:-1]) * H).index_select(0, region)) * W  # cell in column 0 [L]
    cell = (first[:, None] + torch.arange(W, device=row.device)).view(-1).index_select(0, at)
    return w.index_select(0, at), cell, starts


def forward_torch(features, boxes, image_index):
    B, H, W, D = features.shape
    cells, out = features.reshape(B * H * W, D).to(accumulator(features.dtype)), []
    for part in slices(len(boxes), max(1, CHUNK // max(1, H * W))):
        weight, cell, starts = sparse(boxes[part], image_index[part], H, W, cells.dtype)
        out.append(F.embedding_bag(cell, cells, starts[:-1], mode="sum", per_sample_weights=weight))
    return out[0] if len(out) == 1 else torch.cat([cells[:0], *out])


def backward_torch(grad, boxes, image_index, B, H, W, dtype):
    out = grad.new_zeros(B * H * W, grad.shape[1])
    image, order = image_index.sort(stable=True)
    for part in slices(len(boxes), max(1, CHUNK // max(1, H * W))):
        weight, cell, starts = sparse(boxes[order[part]], image[part], H, W, grad.dtype)
        first, last = int(image[part][0]) * H * W, int(image[part][-1] + 1) * H * W  # only these images
        cell, at = cell.sort(stable=True)
        region = order[part].repeat_interleave(starts.diff()).index_select(0, at)
        starts = torch.searchsorted(cell, torch.arange(first, last, device=cell.device))
        out[first:last] += F.embedding_bag(region, grad, starts, mode="sum", per_sample_weights=weight.index_select(0, at))
    return out.view(B, H, W, -1).to(dtype)


# The Triton path. Forward, a program owns a region and BD features and walks over the cells under it.
# Backward, it owns BP cells and BD features of an image and walks over the image's regions in their order:
# no two programs write to one place, so there are no atomics and the sums always come out the same.

@jit
def forward_kernel(x, boxes, image, total, out, W, P, D, image_stride, cell_stride,
                   H, MASK: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    x += tl.load(image + k) * image_stride
    row, column, width, cells = 0, 0, W, P
    if not MASK:
        x1, y1 = tl.load(boxes + 4 * k), tl.load(boxes + 4 * k + 1)
        x2, y2 = tl.load(boxes + 4 * k + 2), tl.load(boxes + 4 * k + 3)
        x1, y1 = tl.where(x1 > 0, x1, 0), tl.where(y1 > 0, y1, 0)  # NaN goes too: total has it
        x2, y2 = tl.where(x2 < W, x2, W), tl.where(y2 < H, y2, H)
        live = (x1 < x2) & (y1 < y2)
        column, row = tl.floor(tl.where(live, x1, 0)).to(tl.int32), tl.floor(tl.where(live, y1, 0)).to(tl.int32)
        width = tl.ceil(tl.where(live, x2, 0)).to(tl.int32) - column
        cells = width * (tl.ceil(tl.where(live, y2, 0)).to(tl.int32) - row)
    acc = tl.zeros([BD], tl.float32)
    for p0 in range(0, cells, BP):
        p = p0 + tl.arange(0, BP)
        r, c = row + p // width, column + p % width
        if MASK:
            w = tl.load(boxes + k * P + p, p < cells, 0).to(tl.float32)
        else:
            w = (tl.minimum(x2, c + 1.0) - tl.maximum(x1, c)) * (tl.minimum(y2, r + 1.0) - tl.maximum(y1, r))
            w = tl.where(p < cells, w, 0)
        at = (w != 0)[:, None] & (d < D)[None, :]
        cell = (r * W + c).to(tl.int64) * cell_stride
        acc += tl.sum(w[:, None] * tl.load(x + cell[:, None] + d[None, :], at, 0).to(tl.float32), 0)
    tl.store(out + k * D + d, acc / tl.load(total + k), d < D)


@jit
def backward_kernel(grad, boxes, total, order, starts, out, W, P, D, H,
                    MASK: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(P, BP)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    r, c = (p // W).to(tl.float32), (p % W).to(tl.float32)
    acc = tl.zeros([BP, BD], tl.float32)
    for at in range(tl.load(starts + image), tl.load(starts + image + 1)):
        k = tl.load(order + at)
        if MASK:
            w = tl.load(boxes + k * P + p, p < P, 0).to(tl.float32)
        else:
            x1, y1 = tl.load(boxes + 4 * k), tl.load(boxes + 4 * k + 1)
            x2, y2 = tl.load(boxes + 4 * k + 2), tl.load(boxes + 4 * k + 3)
            wx, wy = tl.minimum(x2, c + 1) - tl.maximum(x1, c), tl.minimum(y2, r + 1) - tl.maximum(y1, r)
            w = tl.where((wx <= 0) | (wy <= 0), 0, wx * wy)
        w /= tl.load(total + k)
        g = tl.load(grad + k * D + d, d < D, 0)
        acc += tl.where((w != 0)[:, None], w[:, None] * g[None, :], 0)
    at = (p < P)[:, None] & (d < D)[None, :]
    tl.store(out + (image * P + p)[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), at)


def totals(boxes, H, W):
    """Sum of the weights of each region [K], 1 where it is 0."""
    if boxes.dim() == 3:
        total = boxes.sum((1, 2), dtype=torch.float32)
    else:
        edge = torch.tensor([W, H], device=boxes.device)
        total = (boxes[:, 2:].minimum(edge) - boxes[:, :2].clamp(min=0)).clamp(min=0).prod(1)
    return torch.where(total == 0, 1, total)


def forward_triton(features, boxes, image_index):
    B, H, W, D = features.shape
    if features.stride(3) != 1 or features.stride(1) != W * features.stride(2):
        features = features.contiguous()
    boxes = boxes.contiguous() if boxes.dim() == 3 else boxes.float().contiguous()
    tile = launch.rows(D)
    out = features.new_empty(len(boxes), D, dtype=torch.float32)
    launch.run(forward_kernel, (len(boxes), -(-D // tile["BD"])), features, boxes, image_index,
               totals(boxes, H, W), out, W, H * W, D, features.stride(0), features.stride(2), H,
               MASK=boxes.dim() == 3, **tile)
    return out


def backward_triton(grad, boxes, image_index, B, H, W, dtype):
    boxes = boxes.contiguous() if boxes.dim() == 3 else boxes.float().contiguous()
    D = grad.shape[1]
    tile = launch.rows(D)
    image, order = image_index.sort(stable=True)
    starts = torch.searchsorted(image, torch.arange(B + 1, device=image.device))
    out = grad.new_empty(B, H, W, D, dtype=dtype)
    launch.run(backward_kernel, (B * -(-H * W // tile["BP"]), -(-D // tile["BD"])), grad, boxes,
               totals(boxes, H, W), order, starts, out, W, H * W, D, H, MASK=boxes.dim() == 3, **tile)
    return out


# The op

@torch.library.custom_op("flock::region_pool", mutates_args=())
@without_autocast
def pool(features: Tensor, boxes: Tensor, image_index: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """[B, H, W, D] -> the regions [K, D], and what they were divided by [K] (none: empty)."""
    run = forward_triton if use_triton(features) else forward_torch
    out = run(features, boxes, image_index)  # [K, D] in the accumulator's dtype
    norm = out.norm(dim=1).clamp(min=1e-12) if normalize else out.new_empty(0)
    return (out / norm[:, None] if normalize else out).to(features.dtype), norm


@pool.register_fake
def _(features, boxes, image_index, normalize):
    K, D = boxes.shape[0], features.shape[-1]
    return features.new_empty(K, D), features.new_empty(K if normalize else 0, dtype=accumulator(features.dtype))


@torch.library.custom_op("flock::region_pool_backward", mutates_args=())
@without_autocast
def pool_backward(grad: Tensor, boxes: Tensor, image_index: Tensor, out: Tensor, norm: Tensor,
                  B: int, H: int, W: int) -> Tensor:
    grad = grad.to(accumulator(grad.dtype))
    if len(norm):
        grad = (grad - out * (out * grad).sum(1, keepdim=True)) / norm[:, None]
    run = backward_triton if use_triton(out) else backward_torch
    return run(grad.contiguous(), boxes, image_index, B, H, W, out.dtype)


@pool_backward.register_fake
def _(grad, boxes, image_index, out, norm, B, H, W):
    return out.new_empty(B, H, W, out.shape[1])


def setup_context(ctx, inputs, output):
    features, boxes, image_index, _ = inputs
    ctx.save_for_backward(boxes, image_index, *output)
    ctx.shape = features.shape[:3]


def backward(ctx, grad, _):
    return pool_backward(grad, *ctx.saved_tensors, *ctx.shape), None, None, None


pool.register_autograd(backward, setup_context=setup_context)


def region_pool(features, boxes, image_index, grid=None, normalize=False):
    """Mean of the features under each region, weighted by overlap; see the head of this file.

    features: [B, H, W, D], or [B, P, D] (class token left out) with grid = (H, W), H * W = P.
    boxes: [K, 4] as x1, y1, x2, y2 in cells; or masks [K, H, W], weights >= 0.
    image_index: [K], the image of each region, in any order; an image may have none.
    normalize: divide each row by its L2 norm (at least 1e-12).
    Returns [K, D] in the dtype of features, summed in float32 (float64 for float64).
    Raises ValueError where the shapes do not fit.
    """
    if features.dim() == 3:
        if grid is None or grid[0] * grid[1] != features.shape[1]:
            raise ValueError(f"features: {features.shape[1]} patches do not fill the grid {grid}; "
                             "give grid=(rows, columns) and leave the class token out")
        features = features.unflatten(1, tuple(grid))
    if boxes.shape[1:] not in ((4,), features.shape[1:3]):
        raise ValueError(f"boxes: found {list(boxes.shape)}, expected [K, 4] or masks [K, H, W] "
                         f"with H, W = {list(features.shape[1:3])}")
    if image_index.shape != boxes.shape[:1]:
        raise ValueError(f"image_index: found {list(image_index.shape)}, expected [{len(boxes)}], one per region")
    return pool(features, boxes, image_index.long(), normalize)[0]
