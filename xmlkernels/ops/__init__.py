"""The public ops. Torch's dispatcher chooses the kernel: native where one is loaded for the device, else the reference."""

from xmlkernels.ops._registry import missing
from xmlkernels.ops.bce_loss import bce_loss
from xmlkernels.ops.bce_step import bce_step_
from xmlkernels.ops.cluster_step import cluster_step_
from xmlkernels.ops.matmul_topk import matmul_topk
from xmlkernels.ops.shortlist_matmul import shortlist_matmul

__all__ = ["bce_loss", "bce_step_", "cluster_step_", "matmul_topk", "missing", "shortlist_matmul"]
