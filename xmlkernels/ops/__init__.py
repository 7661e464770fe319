"""The public ops.

Torch's dispatcher chooses the kernel: a native one where it is loaded for the device, else the
reference.
"""

from xmlkernels.ops.bag_step import bag_step_
from xmlkernels.ops.bce_loss import bce_loss
from xmlkernels.ops.bce_step import bce_step_
from xmlkernels.ops.cluster_step import cluster_step_
from xmlkernels.ops.define import missing
from xmlkernels.ops.hyper import Hyper
from xmlkernels.ops.matmul_topk import matmul_topk
from xmlkernels.ops.rescale_rows import rescale_rows_
from xmlkernels.ops.shortlist_matmul import shortlist_backward, shortlist_matmul
from xmlkernels.ops.shortlist_select import shortlist_merge, shortlist_select
from xmlkernels.ops.sparse_update import sparse_adagrad_, sparse_adam_, sparse_sgd_

__all__ = [
    "Hyper",
    "bag_step_",
    "bce_loss",
    "bce_step_",
    "cluster_step_",
    "matmul_topk",
    "missing",
    "rescale_rows_",
    "shortlist_backward",
    "shortlist_matmul",
    "shortlist_merge",
    "shortlist_select",
    "sparse_adagrad_",
    "sparse_adam_",
    "sparse_sgd_",
]
