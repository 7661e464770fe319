"""The kinds of model that the shared tests of this folder run for; an entry joins all of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cascade_common import VOCABULARY, make_tree
from cascade_common import make_model as make_cascade

from xmlkernels.models.base import Model
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.training import Training
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.table import RowOptimizer

TREE = make_tree(3)
LABELS = TREE.sizes[-1]
PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


@dataclass(frozen=True)
class Kind:
    """A kind of model, as the shared tests see it.

    Attributes:
        make: makes a tiny model of LABELS labels over documents of VOCABULARY words, in evaluation
            mode and without dropout, with the same weights in every call. It takes `dtype` of the
            tables, `training=False` for prediction alone, and fields of the training settings.
        groups: parameter groups of the optimizer; the encoder's two are first.
        epsilon: of the optimizer, where the settings leave it out.
        fp8: whether its tables can be fp8.
    """

    make: Callable[..., Any]
    groups: int = 2
    epsilon: float = 1e-6
    fp8: bool = True


def cascade(**settings: Any) -> Model:
    """Make a cascade of three levels."""
    return make_cascade(3, tree=TREE, **{"encoder_lr": 0.01, "head_lr": 0.1} | settings)


def full_table(
    model: Callable[..., EndToEnd],
    *,
    width: int = 8,
    dtype: str = "fp32",
    bias: bool = False,
    training: bool = True,
    **settings: Any,
) -> EndToEnd:
    """Make a model of an encoder of width 8 and one table of all labels.

    Args:
        model: called with the encoder, the table and the training settings.
        width: of the table.
        dtype: of the table.
        bias: give the table a bias per label.
        training: make its training settings, too.
        settings: what differs in them.
    """
    torch.manual_seed(4)  # for what a kind adds to encoder and table
    encoder = Encoder.tiny(VOCABULARY, width=16, bottleneck=8, seed=1)
    optimizer = RowOptimizer("sgd", momentum=0.9 if training else 0.0)
    head = FullHead(LABELS, width, dtype=dtype, bias=bias, optimizer=optimizer, seed=2)
    rates = {"encoder_lr": 0.01, "head_lr": 0.1, "encoder_decay": 0.01, "warmup": 0, "total": 100}
    return model(encoder, head, Training(**rates | settings) if training else None).eval()


def page_kind() -> type[EndToEnd]:
    """Define the class that docs/adding-a-model.md adds."""
    example = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert example is not None
    found: dict[str, Any] = {"__name__": "low_rank"}
    exec(compile(example[1], str(PAGE), "exec"), found)
    return found["LowRank"]


LowRank = page_kind()
MODELS = {
    "cascade": Kind(cascade, groups=4, epsilon=1e-8),
    "end_to_end": Kind(partial(full_table, EndToEnd, bias=True)),
    "low_rank": Kind(partial(full_table, LowRank, width=5)),
}
