from kernels.cluster_sums import cluster_sums
from kernels.pairwise_additivity import pairwise_additivity
from kernels.pairwise_loss import pairwise_loss
from kernels.region_pool import region_pool
