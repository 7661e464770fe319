"""The cascade: encoder layers → coarse clusters → finer clusters → a shortlist of labels (CascadeXML, NeurIPS 2022)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xmlkernels.checkpoint import load_optimizer_tensors, optimizer_tensors
from xmlkernels.data.loader import Batch
from xmlkernels.errors import InputError
from xmlkernels.models.cascade_scores import Tree, descend, loss_of, loss_scale, ranked
from xmlkernels.models.cascade_training import CascadeTraining, cascade_optimizer
from xmlkernels.models.end_to_end import _generator_at, _generator_state
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.layer_recipe import checked_layers
from xmlkernels.nn.shortlist import count, select
from xmlkernels.optim import LossScaler, WeightAverage, clip_gradients, set_learning_rate, step_unless

if TYPE_CHECKING:
    from xmlkernels.tree.label_tree import LabelTree
