"""What every model has: its kind, its schemes, its counters; and the public calls of a cascade."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from cascade_common import make_batch, make_model, make_tree
from torch.nn.functional import binary_cross_entropy_with_logits

from xmlkernels import InputError
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.kinds import KINDS
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.full_head import FullHead

ROOT = Path(__file__).resolve().parents[2]
# Files above models/ that name a class of model: the public names, and the one builder.
BUILDERS = {"xmlkernels/__init__.py", "xmlkernels/training/build.py"}


def names_of(path: Path) -> set[str]:
    """Every identifier and imported module of a file; strings and comments are none."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {node.name, node.asname or ""}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_no_room_above_models_asks_for_the_class_of_a_model() -> None:
    classes = {model.__name__ for model in KINDS.values()}
    modules = {model.__module__ for model in KINDS.values()}
    assert classes >= {"EndToEnd", "Cascade"}
    users = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "xmlkernels").rglob("*.py")
        if path.parent.name != "models" and names_of(path) & (classes | modules)
    }
    assert users == BUILDERS


def plain() -> EndToEnd:
    return EndToEnd(BowEncoder(30, 8, seed=1), FullHead(12, 8, seed=2)).eval()


def test_kinds_name_themselves() -> None:
    for kind, model in KINDS.items():
        assert model.kind == kind
    assert plain().config()["kind"] == "end_to_end" and make_model(3).config()["kind"] == "cascade"


def test_a_scheme_that_a_model_lacks_is_refused() -> None:
    batch = make_batch(make_tree(3), 4)
    with pytest.raises(InputError, match="scheme: expected one of 'level', 'weighted', 'path'"):
        make_model(3).score(batch, 3, schemes=["level", "best"])
    for model, scheme in ((make_model(3), ""), (plain(), "path")):
        own = model.scheme
        with pytest.raises(InputError, match="scheme: expected one of '"):
            model.use_scheme(scheme)
        assert model.scheme == own
    plain().use_scheme("")


def test_a_model_for_prediction_says_that_it_does_not_train() -> None:
    cascade = make_model(3, training=False)
    for model in (cascade, plain()):
        with pytest.raises(InputError, match="model: expected a model built for training, got one"):
            model.step(make_batch(cascade.tree, 4))


def test_label_rows_are_inner_products_or_refused() -> None:
    model = plain()
    bag = torch.tensor([1, 2, 3]), torch.tensor([0, 3]), torch.ones(3)
    x, rows = model.encoder(*bag), model.label_rows(0, 12)
    values, labels = model.head.topk(x, 12)
    torch.testing.assert_close((x @ rows.T)[0, labels[0]], values[0])
    assert torch.equal(model.label_rows(3, 5), rows[3:5])
    biased = EndToEnd(BowEncoder(30, 8), FullHead(12, 8, bias=True))
    for other, got in ((biased, "one with a bias"), (make_model(3), "a cascade")):
        with pytest.raises(InputError, match=f"expected a label table without bias, got {got}"):
            other.label_rows(0, 1)


def test_a_cascade_cannot_start_as_a_full_table_does() -> None:
    with pytest.raises(InputError, match="a label table that can start at frequencies"):
        make_model(3).start_at_frequencies(torch.ones(43), 3)
    with pytest.raises(InputError, match="a label table that can start at centroids"):
        make_model(3).start_at_centroids([], 1.0)


def test_level_losses_are_the_parts_of_the_loss() -> None:
    for options in ({}, {"rw_loss": [2, 1, 0.5], "topk": [1, 1], "reference_loss": True}):
        model = make_model(3, **options)
        batch = make_batch(model.tree, 6)
        parts = model.level_losses(batch)
        assert parts.shape == (3,) and (parts > 0).all()
        # One after the other in fp32; cumsum adds in fp64.
        assert torch.equal(sum(parts).reshape(1), model.loss(batch))
    single = make_model(3, rw_loss=[2, 1, 0.5])
    other = make_model(3, rw_loss=[2, 1, 1.5])
    ratio = other.level_losses(batch) / single.level_losses(batch)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 1.0, 3.0]))


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_candidates_are_what_a_level_trains_on(levels: int) -> None:
    """A loss of one's own over them is the model's, and every true label is among them."""
    model = make_model(levels, topk=[1] * (levels - 1))
    batch = make_batch(model.tree, 6)
    found = model.candidates(batch)
    assert len(found) == levels
    parts = []
    for level in found:
        assert level.nodes.shape == level.logits.shape == level.positive.shape
        real = level.nodes >= 0
        assert (level.logits[~real] == -torch.inf).all() and not level.positive[~real].any()
        target = level.positive[real].float()
        parts.append(binary_cross_entropy_with_logits(level.logits[real], target))
    torch.testing.assert_close(torch.stack(parts), model.level_losses(batch))
    true = {
        (s, int(model.tree.order[r]))
        for r, s in zip(batch.pos_row.tolist(), batch.pos_sample.tolist(), strict=True)
    }
    sample, place = found[-1].positive.nonzero(as_tuple=True)
    hits = zip(sample.tolist(), found[-1].nodes[sample, place].tolist(), strict=True)
    assert set(hits) == true


def test_clusters_and_their_labels() -> None:
    model = make_model(4)
    for r in range(4):
        start, labels = model.labels_under(r)
        clusters = model.clusters_of(r)
        assert len(start) == model.tree.sizes[r] + 1 and sorted(labels.tolist()) == list(range(43))
        for c in range(model.tree.sizes[r]):
            under = labels[start[c] : start[c + 1]]
            assert len(under) and (clusters[under] == c).all()
    assert np.array_equal(model.clusters_of(3).numpy(), model.tree.place)
    for call in (model.labels_under, model.clusters_of):
        with pytest.raises(InputError, match="level: expected 0 to 3, got 4"):
            call(4)
