from kernels.pairwise_additivity import pairwise_additivity
from kernels.pairwise_loss import pairwise_loss
from kernels.region_logits import region_logits
from kernels.region_pool import region_pool

__all__ = ["pairwise_additivity", "pairwise_loss", "region_logits", "region_pool"]
