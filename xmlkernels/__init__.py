"""Train and serve text classifiers with millions of labels, with kernels of their own.

    import xmlkernels as xk

    data = xk.Dataset.from_texts("cache/mine", train=(texts, label_lists), tokenizer="minilm")
    xk.train(xk.RECIPES["minilm"].replace(dataset="cache/mine", output="runs/mine"))
    for labels in xk.load("runs/mine").predict(["a text to label"], k=5):
        print(labels[0].name)

Importing the package loads neither torch nor numba: a name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xmlkernels.errors import InputError

if TYPE_CHECKING:
    from xmlkernels import ops
    from xmlkernels.data.dataset import Dataset
    from xmlkernels.data.prepare import PrepareConfig, prepare
    from xmlkernels.estimator.classifier import XMLClassifier
    from xmlkernels.hub import HubModel, push_to_hub
    from xmlkernels.metrics import evaluate, inverse_propensity
    from xmlkernels.models.cascade import Cascade
    from xmlkernels.models.end_to_end import EndToEnd
    from xmlkernels.models.training import CascadeTraining, Training
    from xmlkernels.nn.bow import BowEncoder
    from xmlkernels.nn.cascade_heads import CascadeHeads
    from xmlkernels.nn.encoder import Encoder
    from xmlkernels.nn.full_head import FullHead
    from xmlkernels.nn.table import RowOptimizer, Table
    from xmlkernels.predict.base import Label
    from xmlkernels.predict.folders import load
    from xmlkernels.predict.forest import Forest
    from xmlkernels.predict.hub import from_pretrained, save_pretrained
    from xmlkernels.predict.model import Predictor
    from xmlkernels.predict.ranked import RankedPredictor
    from xmlkernels.training.config import Config
    from xmlkernels.training.linear import LinearConfig, train_linear
    from xmlkernels.training.loop import train
    from xmlkernels.training.ranker import train_ranker
    from xmlkernels.training.ranker_config import RankerConfig
    from xmlkernels.training.recipes import RECIPES
    from xmlkernels.training.tree import TreeConfig, build_tree
    from xmlkernels.tree.label_tree import LabelTree

__version__ = "0.1.0"
__all__ = [
    "RECIPES",
    "BowEncoder",
    "Cascade",
    "CascadeHeads",
    "CascadeTraining",
    "Config",
    "Dataset",
    "Encoder",
    "EndToEnd",
    "Forest",
    "FullHead",
    "HubModel",
    "InputError",
    "Label",
    "LabelTree",
    "LinearConfig",
    "Predictor",
    "PrepareConfig",
    "RankedPredictor",
    "RankerConfig",
    "RowOptimizer",
    "Table",
    "Training",
    "TreeConfig",
    "XMLClassifier",
    "__version__",
    "build_tree",
    "evaluate",
    "from_pretrained",
    "inverse_propensity",
    "load",
    "ops",
    "prepare",
    "push_to_hub",
    "save_pretrained",
    "train",
    "train_linear",
    "train_ranker",
]

# Where each name is; the imports above say the same to type checkers, and a test compares both.
_HOMES = {
    "data.dataset": ("Dataset",),
    "data.prepare": ("PrepareConfig", "prepare"),
    "estimator.classifier": ("XMLClassifier",),
    "hub": ("HubModel", "push_to_hub"),
    "metrics": ("evaluate", "inverse_propensity"),
    "models.cascade": ("Cascade",),
    "models.end_to_end": ("EndToEnd",),
    "models.training": ("CascadeTraining", "Training"),
    "nn.bow": ("BowEncoder",),
    "nn.cascade_heads": ("CascadeHeads",),
    "nn.encoder": ("Encoder",),
    "nn.full_head": ("FullHead",),
    "nn.table": ("RowOptimizer", "Table"),
    "predict.base": ("Label",),
    "predict.folders": ("load",),
    "predict.hub": ("from_pretrained", "save_pretrained"),
    "predict.model": ("Predictor",),
    "predict.forest": ("Forest",),
    "predict.ranked": ("RankedPredictor",),
    "training.config": ("Config",),
    "training.linear": ("LinearConfig", "train_linear"),
    "training.loop": ("train",),
    "training.ranker": ("train_ranker",),
    "training.ranker_config": ("RankerConfig",),
    "training.recipes": ("RECIPES",),
    "training.tree": ("TreeConfig", "build_tree"),
    "tree.label_tree": ("LabelTree",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "ops":
        return import_module("xmlkernels.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'xmlkernels' has no attribute {name!r}")
    value = getattr(import_module(f"xmlkernels.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
