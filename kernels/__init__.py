from kernels.pairwise_loss import pairwise_loss
from kernels.region_pool import region_pool
