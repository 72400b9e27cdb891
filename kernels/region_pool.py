"""Mean of a feature map under boxes or masks.

    out_k  = sum_p w_kp x_{i(k),p} / W_k          W_k = sum_p w_kp, p over the H x W cells of image i(k)
    dx_ip  = sum over k with i(k) = i of  w_kp g_k / W_k
    box:  w_kp = area of overlap of box k with cell p = (overlap in y) * (overlap in x)
    mask: w_kp = masks_k,p

The cell in row r, column c covers [c, c+1] x [r, r+1]; what of a box lies off the map counts for nothing.
Our reading: a box or mask without any weight gives a row of zeros; a cell without weight is not read, so
its NaN stays out; a NaN under a box is a NaN in its row. The gradient goes to the features only.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.autograd.function import once_differentiable

from kernels import launch
from kernels.launch import accumulator, constexpr, jit, slices, tl, triton


def region_pool_ref(features, boxes, image_index):
    """The definition, one region at a time; arguments as region_pool."""
    pooled = [features.new_zeros(0, features.shape[-1])]
    for region, i in zip(boxes, image_index.tolist(), strict=True):
        if region.dim() == 1:
            rows, columns = overlaps(region[None].double(), *features.shape[1:3])
            region = rows[0, :, None] * columns[0]
        w = region.to(features.dtype)[:, :, None]  # [H, W, 1]
        x = torch.where(w == 0, 0, features[i])  # [H, W, D]
        pooled.append((w * x).sum((0, 1))[None] / torch.where((w == 0).all(), 1, w.sum()))
    return torch.cat(pooled)


def overlaps(boxes, H, W):
    """[K, 4] x1,y1,x2,y2 in cells -> how much of each row [K, H] and column [K, W] of cells a box covers."""

    def before(edge, n):  # how much of each cell lies before the edge
        return (edge[:, None] - torch.arange(n, dtype=edge.dtype, device=edge.device)).clamp_(0, 1)

    x1, y1, x2, y2 = boxes.unbind(1)
    rows = before(y2, H).sub_(before(y1, H)).clamp_(min=0)
    columns = before(x2, W).sub_(before(x1, W)).clamp_(min=0)
    return rows, columns


# The PyTorch path: each region is a weighted bag of rows of the feature map; embedding_bag has the gradient.
# Products of whole weight matrices are faster only where regions cover most of their maps (see LOG.md).

CHUNK = 1 << 22  # weights looked at in one go


def bags(boxes, image, H, W):
    """Regions as lists of cells, those without weight left out.

    boxes [K, 4] or masks [K, H, W], image [K] -> weights [N], of each region summing to one; their cells [N]
    in B*H*W; where each region's begin [K]. Of the K*H lines of cells only the L that a box touches are seen.
    """
    K, device = len(boxes), boxes.device
    if boxes.dim() == 3:
        line, total = torch.arange(K * H, device=device), boxes.sum((1, 2))  # k * H + row [L], [K]
        k = line // H
        w = boxes / torch.where(total == 0, 1, total)[:, None, None]
    else:
        rows, columns = overlaps(boxes, H, W)
        total = rows.sum(1) * columns.sum(1)
        rows = (rows / torch.where(total == 0, 1, total)[:, None]).view(-1)
        (line,) = rows.nonzero(as_tuple=True)  # [L]
        k = line // H
        # index_select and not indexing, here and below: it is several times faster
        w = rows.index_select(0, line)[:, None] * columns.index_select(0, k)  # [L, W]
    w = w.reshape(-1)
    (at,) = w.nonzero(as_tuple=True)  # [N]
    region = torch.arange(K, device=device)
    begin = torch.searchsorted(at, torch.searchsorted(line, region * H) * W)
    # image * H + row = line + (image - region) * H
    left = (line + ((image - region) * H).index_select(0, k)) * W  # cell in column 0 [L]
    cell = (left[:, None] + torch.arange(W, device=device)).view(-1)  # [L * W]
    return w.index_select(0, at), cell.index_select(0, at), begin


def pool_torch(features, boxes, image_index):
    H, W = features.shape[1:3]
    dtype = accumulator(features.dtype)
    cells = rearrange(features, "b h w d -> (b h w) d").to(dtype)
    out = [cells[:0]]
    for part in slices(len(boxes), max(1, CHUNK // max(1, H * W))):
        weight, cell, begin = bags(boxes[part].to(dtype), image_index[part], H, W)
        out.append(F.embedding_bag(cell, cells, begin, mode="sum", per_sample_weights=weight))
    return out[1] if len(out) == 2 else torch.cat(out)


# The Triton path. Forward, a program owns a region and BD features and walks over the cells under it.
# Backward, it owns BP cells and BD features of an image and walks over the image's regions in their order:
# no two programs write to one place, so there are no atomics and the sums always come out the same.


@jit
def overlap(x1, y1, x2, y2, r, c):
    """Area of overlap of a box with the cells in rows r, columns c (floats)."""
    width = tl.minimum(x2, c + 1) - tl.maximum(x1, c)
    height = tl.minimum(y2, r + 1) - tl.maximum(y1, r)
    return tl.where((width <= 0) | (height <= 0), 0, width * height)


@jit
def mean(x, image, regions, k, d, H, W, D, x_image, x_cell, MASK: constexpr, BP: constexpr, BD: constexpr):
    """Of region k the mean of features d [BD], and the sum of its weights, 1 where it is 0."""
    x += tl.load(image + k) * x_image  # x_image, x_cell: strides
    row, column, width, cells = 0, 0, W, H * W
    if not MASK:
        x1, y1 = tl.load(regions + 4 * k), tl.load(regions + 4 * k + 1)
        x2, y2 = tl.load(regions + 4 * k + 2), tl.load(regions + 4 * k + 3)
        x1, y1 = tl.where(x1 < 0, 0, x1), tl.where(y1 < 0, 0, y1)  # NaN stays
        x2, y2 = tl.where(x2 > W, W, x2), tl.where(y2 > H, H, y2)
        total = tl.where(x2 < x1, 0, x2 - x1) * tl.where(y2 < y1, 0, y2 - y1)
        live = (x1 < x2) & (y1 < y2)
        column = tl.floor(tl.where(live, x1, 0)).to(tl.int32)
        row = tl.floor(tl.where(live, y1, 0)).to(tl.int32)
        width = tl.ceil(tl.where(live, x2, 0)).to(tl.int32) - column
        cells = width * (tl.ceil(tl.where(live, y2, 0)).to(tl.int32) - row)
    acc, weights = tl.zeros([BP, BD], tl.float32), tl.zeros([BP], tl.float32)
    for p0 in range(0, cells, BP):
        p = p0 + tl.arange(0, BP)
        r, c = row + p // width, column + p % width
        if MASK:
            w = tl.load(regions + k * H * W + p, p < cells, 0).to(tl.float32)
            weights += w
        else:
            w = overlap(x1, y1, x2, y2, r.to(tl.float32), c.to(tl.float32))  # 0 in rows past the last
        at = (w != 0)[:, None] & (d < D)[None, :]
        cell = (r * W + c).to(tl.int64) * x_cell
        acc += w[:, None] * tl.load(x + cell[:, None] + d[None, :], at, 0).to(tl.float32)  # [BP, BD]
    if MASK:
        total = tl.sum(weights)
    total = tl.where(total == 0, 1, total)
    return tl.sum(acc, 0) / total, total


@jit
def forward_kernel(
    x, image, regions, total, out, H, W, D, x_image, x_cell, MASK: constexpr, BP: constexpr, BD: constexpr
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    m, weight = mean(x, image, regions, k, d, H, W, D, x_image, x_cell, MASK, BP, BD)
    tl.store(out + k * D + d, m, d < D)
    tl.store(total + k, weight, tl.program_id(1) == 0)


@jit
def list_kernel(image, order, starts, K, BK: constexpr):
    """The regions of each image, in their order, one image after the other; where each image's begin. In
    place of argsort and searchsorted: one launch for about ten."""
    i = tl.program_id(0)
    before, here = tl.zeros([BK], tl.int32), tl.zeros([BK], tl.int32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        of = tl.load(image + k, k < K, 1 << 30)
        before += (of < i).to(tl.int32)
        here += (of == i).to(tl.int32)
    at = tl.sum(before)
    tl.store(starts + i, at)
    tl.store(starts + i + 1, at + tl.sum(here), i + 1 == tl.num_programs(0))
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        mine = (tl.load(image + k, k < K, 1 << 30) == i).to(tl.int32)
        tl.store(order + at + tl.cumsum(mine) - 1, k, mine > 0)
        at += tl.sum(mine)


@jit
def backward_kernel(
    grad, regions, total, order, starts, out, P, W, D, MASK: constexpr, BP: constexpr, BD: constexpr
):
    blocks = tl.cdiv(P, BP)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p0 = (tl.program_id(0) % blocks) * BP
    p = p0 + tl.arange(0, BP)[:, None]  # [BP, 1]
    top, bottom = p0 // W, (p0 + BP - 1) // W + 1  # the rows of cells that the block lies in
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]  # [1, BD]
    acc = tl.zeros([BP, BD], tl.float32)
    for at in range(tl.load(starts + image), tl.load(starts + image + 1)):
        k = tl.load(order + at).to(tl.int64)
        apart = False
        if not MASK:
            x1, y1 = tl.load(regions + 4 * k), tl.load(regions + 4 * k + 1)
            x2, y2 = tl.load(regions + 4 * k + 2), tl.load(regions + 4 * k + 3)
            apart = (y1 >= bottom) | (y2 <= top)  # not so for NaN
        if not apart:
            if MASK:
                w = tl.load(regions + k * P + p, p < P, 0).to(tl.float32)
            else:
                w = overlap(x1, y1, x2, y2, (p // W).to(tl.float32), (p % W).to(tl.float32))
            w /= tl.load(total + k)
            g = tl.load(grad + k * D + d, d < D, 0)
            acc += tl.where(w != 0, w * g, 0)
    inside = (p < P) & (d < D)
    tl.store(out + (image * P + p) * D + d, acc.to(out.dtype.element_ty), inside)


def readable(features, regions):
    """Features and regions as kernels read them, and the features' strides between images and cells."""
    if features.stride(3) != 1 or features.stride(1) != features.shape[2] * features.stride(2):
        features = features.contiguous()
    regions = regions.contiguous() if regions.dim() == 3 else regions.float().contiguous()
    return features, regions, (features.stride(0), features.stride(2))


def spread(grad, regions, total, image_index, shape, dtype):
    """Gradients of the means [K, D] -> of features [B, H, W, D] in dtype."""
    B, H, W, D = shape
    order, starts = (image_index.new_empty(n, dtype=torch.int32) for n in (len(regions), B + 1))
    tile = launch.SETTINGS["region_pool, lists"]
    launch.run(list_kernel, (B,), image_index, order, starts, len(regions), **tile)
    out, tile = grad.new_empty(shape, dtype=dtype), launch.rows("region_pool, gradient", D)
    grid = B * triton.cdiv(H * W, tile["BP"]), triton.cdiv(D, tile["BD"])
    arguments = grad.contiguous(), regions, total, order, starts, out, H * W, W, D
    launch.run(backward_kernel, grid, *arguments, MASK=regions.dim() == 3, **tile)
    return out


class RegionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, regions, image_index):
        (_, H, W, D), K, MASK = features.shape, len(regions), regions.dim() == 3
        features, regions, strides = readable(features, regions)
        out, total = features.new_empty(K, D, dtype=torch.float32), regions.new_empty(K, dtype=torch.float32)
        tile = launch.rows("region_pool", D)
        arguments = features, image_index, regions, total, out, H, W, D, *strides
        launch.run(forward_kernel, (K, triton.cdiv(D, tile["BD"])), *arguments, MASK=MASK, **tile)
        ctx.save_for_backward(regions, total, image_index)
        ctx.like = features.shape, features.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return spread(grad, *ctx.saved_tensors, *ctx.like), None, None


def check(features, boxes, image_index):
    """ValueError where the shapes do not fit, see region_pool."""
    if features.dim() != 4:
        cure = "leave the class token out and call features.unflatten(1, (rows, columns))"
        raise ValueError(f"features: found {list(features.shape)}, expected [B, H, W, D]; {cure}")
    if boxes.shape[1:] not in ((4,), features.shape[1:3]):
        H, W = features.shape[1:3]
        raise ValueError(f"boxes: found {list(boxes.shape)}, expected [K, 4] or masks [K, {H}, {W}]")
    if image_index.shape != boxes.shape[:1]:
        raise ValueError(f"image_index: {list(image_index.shape)}, expected [{len(boxes)}], one per region")


@torch.compiler.disable  # a compiled caller calls it as it is
def region_pool(features, boxes, image_index):
    """Mean of the features under each region, weighted by overlap; see the head of this file.

    features: [B, H, W, D]. Patches [B, P, D]: .unflatten(1, (H, W)), the class token left out.
    boxes: [K, 4] as x1, y1, x2, y2 in cells; or masks [K, H, W], weights >= 0.
    image_index: [K], the image of each region, in any order; an image may have none.
    Returns [K, D] in the dtype of features, summed in float32 (float64 for float64).
    Raises ValueError where the shapes do not fit.
    """
    check(features, boxes, image_index)
    pool = RegionPool.apply if launch.use_triton(features) else pool_torch
    return pool(features, boxes.detach(), image_index.long()).to(features.dtype)
