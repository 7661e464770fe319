"""An encoder of one's own: what it needs, and that its parts may have any names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cascade_common import Documents, make_batch, make_tree
from torch import Tensor, nn

from xmlkernels import InputError
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.training import CascadeTraining, Training
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.layer_recipe import Recipe
from xmlkernels.planner import plan, planned

WIDTH, VOCABULARY = 16, 60
PAGE = Path(__file__).parents[2] / "docs" / "own-encoder.md"


class Own(nn.Module):
    """Its parts are called what attributes of `Encoder` are called, and are something else."""

    width = WIDTH
    autocast = None

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum")
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.bottleneck = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.hidden(ids, per_sample_weights=mask.float())
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.bottleneck(x)

    def layer_vectors(self, recipe: Recipe, ids: Tensor, mask: Tensor) -> list[Tensor]:
        return [self(ids, mask)] * len(recipe)

    def encoder_config(self) -> dict[str, Any]:
        return {"kind": "own"}


def end_to_end(encoder: nn.Module, labels: int) -> EndToEnd:
    settings = Training(encoder_lr=1e-2, head_lr=0.1, encoder_decay=0.0, warmup=0, total=99)
    return EndToEnd(encoder, FullHead(labels, WIDTH, seed=1), settings)


def cascade(encoder: nn.Module, labels: int) -> Cascade:
    tree = make_tree(2, labels)
    heads = CascadeHeads(tree.sizes, [tree.widest(0)], WIDTH, layers=((0,), (0,)), topk=[3])
    return Cascade(encoder, heads, tree, CascadeTraining(encoder_lr=1e-2, total=99))


MODELS = {"end_to_end": end_to_end, "cascade": cascade}


def batch(labels: int = 43) -> Documents:
    return make_batch(make_tree(2, labels), 8)


@pytest.mark.parametrize("kind", MODELS)
def test_both_models_take_it(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind](Own(), 43)
    before = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
    losses = [float(model.step(batch(), need_loss=True)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.encoder.named_parameters())
    again = MODELS[kind](Own(), 43)
    again.load_tensors({name: t.clone() for name, t in model.tensors().items()})
    assert float(again.step(batch(), need_loss=True)) == float(model.step(batch(), need_loss=True))


def test_the_planner_counts_its_output_alone() -> None:
    parts = plan(Own(), {"labels": planned(lambda: FullHead(9, 16))}, documents=5, tokens=100)
    assert parts["activations (estimate)"] == 4 * 5 * WIDTH


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", "16", "encoder: width: expected a whole number of 1 or more.*, got '16'"),
        ("width", True, "encoder: width: expected .*, got True"),
        ("autocast", torch.float32, "encoder: autocast: expected .*, got torch.float32"),
        ("encoder_config", {}, "encoder: encoder_config: expected a method, got {}"),
        ("update", nn.Identity(), "encoder: update: expected a method, got Identity"),
    ],
)
def test_parts_of_another_type(kind: str, name: str, value: object, message: str) -> None:
    encoder = Own()
    setattr(encoder, name, value)
    with pytest.raises(InputError, match=message):
        MODELS[kind](encoder, 43)


@pytest.mark.parametrize("name", ["width", "autocast", "encoder_config", "layer_vectors"])
def test_parts_that_are_missing(name: str) -> None:
    lacking = type("Lacking", (nn.Module,), {k: v for k, v in vars(Own).items() if k != name})
    lacking.__init__ = nn.Module.__init__  # type: ignore[misc]
    with pytest.raises(InputError, match=f"encoder: {name}: expected .*, got none"):
        cascade(lacking(), 43)


def test_the_example_of_its_page_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), found)
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert found["best"].tolist() == found["topics"].tolist()
