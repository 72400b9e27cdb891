"""Cosines of regions of a feature map with class texts, in one pass over the map.

    m_k   = sum_p w_kp x_{i(k),p} / W_k          as region_pool: boxes or masks, w_kp and W_k as there
    o_kc  = <m_k, t_c> / (|m_k| |t_c|)           a norm below 1e-12 counts as 1e-12
    dm_k  = sum_c g_kc t_c / (|m_k| |t_c|) - sum_c g_kc o_kc m_k / |m_k|^2
    dt_c  = sum_k g_kc m_k / (|m_k| |t_c|) - sum_k g_kc o_kc t_c / |t_c|^2,    dx from dm as region_pool

features [B, H, W, D], texts t [C, D]; m are the means. A program holds the mean of its region in registers:
beside the map only texts are read, and cosines [K, C] and means [K, D] written, in one launch.

Pooling is linear, so region_pool and pairwise_loss are all that composites of images ask of their maps. Of n
foreground maps x_i under weights alpha [H, W] and m background maps y_j under 1 - alpha, a the mean of alpha,
the mean of the map alpha x_i + (1 - alpha) y_j is f_i + b_j with

    f = a * region_pool(x, alpha for each, arange(n))    b = (1 - a) * region_pool(y, 1 - alpha for each, ...)

and pairwise_loss(f, b, texts, y, scale) the cross-entropy of all n * m of them, from n + m maps.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import launch
from kernels.launch import constexpr, jit, tl
from kernels.region_pool import check, mean, pool_torch, readable, region_pool_ref, spread

MAX_C = 256  # texts that the kernel walks over; more go to a product of matrices behind it


def region_logits_ref(features, regions, image_index, texts, pool=region_pool_ref):
    """The definition; arguments as region_logits. With pool_torch it is the PyTorch path, too."""
    means = pool(features, regions, image_index)
    return F.normalize(means, dim=1) @ F.normalize(texts.to(means.dtype), dim=1).T, means


# The Triton path: a program owns a region, all D features of it.


@jit
def logits_kernel(x, image, regions, texts, cosines, means, total, C, H, W, D, x_image, x_cell,
                  MASK: constexpr, BP: constexpr, BC: constexpr, BD: constexpr):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    m, weight = mean(x, image, regions, k, d, H, W, D, x_image, x_cell, MASK, BP, BD)
    tl.store(means + k * D + d, m, d < D)
    tl.store(total + k, weight)
    length = tl.sqrt(tl.sum(m * m))
    length = tl.where(length < 1e-12, 1e-12, length)  # NaN stays
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        at = (c < C)[:, None] & (d < D)[None, :]
        t = tl.load(texts + c[:, None] * D + d[None, :], at, 0).to(tl.float32)  # [BC, BD]
        dot, norm = tl.sum(t * m[None, :], 1), tl.sqrt(tl.sum(t * t, 1))
        norm = tl.where(norm < 1e-12, 1e-12, norm)
        tl.store(cosines + k * C + c, dot / length / norm, c < C)


class RegionLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, regions, image_index, texts):
        (_, H, W, D), K, C = features.shape, len(regions), len(texts)
        features, regions, strides = readable(features, regions)
        means, cosines, total = (features.new_empty(*n, dtype=torch.float32) for n in ((K, D), (K, C), (K,)))
        few = C if C <= MAX_C else 0
        arguments = features, image_index, regions, texts.contiguous(), cosines, means, total, few, H, W, D
        tile = launch.rows("region_logits", D)
        launch.run(logits_kernel, (K,), *arguments, *strides, MASK=regions.dim() == 3, **tile)
        if C > few:
            cosines = F.normalize(means, dim=1) @ F.normalize(texts.float(), dim=1).T
        ctx.save_for_backward(regions, total, image_index, texts, means, cosines)
        ctx.like = features.shape, features.dtype
        return cosines, means

    @staticmethod
    @once_differentiable
    def backward(ctx, g, dmeans):
        *where, texts, means, cosines = ctx.saved_tensors
        t, dx, dt = texts.float(), None, None
        norms = [torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-12) for v in (means, t)]
        m_norm, t_norm = norms  # [K, 1], [C, 1]
        across, along = g / m_norm / t_norm.T, g * cosines  # [K, C] both
        if ctx.needs_input_grad[0]:
            dm = (dmeans + across @ t).addcmul_(along.sum(1, True) / m_norm.square(), means, value=-1)
            dx = spread(dm, *where, *ctx.like)
        if ctx.needs_input_grad[3]:
            dt = (across.T @ means).addcmul_(along.sum(0)[:, None] / t_norm.square(), t, value=-1)
        return dx, None, None, dt  # autograd gives each its input's dtype


@torch.compiler.disable  # a compiled caller calls it as it is
def region_logits(features, regions, image_index, texts):
    """Cosines of regions and class texts, and the regions' means; see the head of this file.

    features, regions, image_index: as region_pool takes features, boxes, image_index.
    texts: [C, D], of any length, in any floating dtype.
    Returns cosines [K, C] and means [K, D], not normalised, summed and given in float32 (float64 for
    float64); logits are scale * cosines. A region without weight has a mean and cosines of zero. Gradients
    go to features and texts. Autocast changes nothing. Raises ValueError where the shapes do not fit.
    """
    check(features, regions, image_index)
    if texts.dim() != 2 or texts.shape[1] != features.shape[3]:
        raise ValueError(f"texts: found {list(texts.shape)}, expected [C, {features.shape[3]}]")
    inputs = features, regions.detach(), image_index.long(), texts
    with torch.autocast(features.device.type, enabled=False):
        if launch.use_triton(features, texts):
            return RegionLogits.apply(*inputs)
        return region_logits_ref(*inputs, pool_torch)
