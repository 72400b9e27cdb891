"""kernels/: each op against its float64 reference."""
import pytest
import torch

from kernels import pairwise_loss, region_pool
from kernels.pairwise_loss import pairwise_loss_ref
from kernels.region_pool import region_pool_ref


def generator(*key):
    return torch.Generator().manual_seed(hash(key) & 0x7FFFFFFF)


@pytest.mark.parametrize("n, m, D, C", [(37, 29, 24, 7), (1, 1, 1, 1), (600, 3, 5, 2)])
def test_pairwise_loss(n, m, D, C):
    g = generator(n, m, D, C)
    args = [torch.randn(k, D, generator=g, dtype=torch.float64, requires_grad=True) for k in (n, m, C)]
    y = torch.randint(C, (n,), generator=g)
    loss, ref = pairwise_loss(*args, y, 3.0), pairwise_loss_ref(*args, y, 3.0)
    torch.testing.assert_close(loss, ref)
    for k, r in zip(torch.autograd.grad(loss, args), torch.autograd.grad(ref, args)):
        torch.testing.assert_close(k, r)


@pytest.mark.parametrize("normalize", [False, True])
def test_region_pool(normalize):
    g = generator(normalize)
    x = torch.randn(3, 5, 7, 11, generator=g, dtype=torch.float64, requires_grad=True)
    low = torch.rand(20, 2, generator=g, dtype=torch.float64) * 8 - 1
    boxes, image = torch.cat([low, low + 3], 1), torch.randint(3, (20,), generator=g)
    out, ref = [op(x, boxes, image, normalize=normalize) for op in (region_pool, region_pool_ref)]
    torch.testing.assert_close(out, ref)
    grad = torch.randn(out.shape, generator=g, dtype=out.dtype)
    torch.testing.assert_close(*[torch.autograd.grad(o, x, grad)[0] for o in (out, ref)])
