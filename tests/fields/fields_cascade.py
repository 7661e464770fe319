"""How each setting of a cascade is tested."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_runs import (
    EPOCHS,
    ONE_STEP,
    PER_EPOCH,
    Case,
    Runs,
    Seen,
    documents,
    recorded,
    training,
    zero_share,
)
from train_runs import make_tree

from xmlkernels.ops.hyper import SCALE
from xmlkernels.training.build import build_model
from xmlkernels.training.plan import before_data, resolve
from xmlkernels.tree.label_tree import LabelTree

# SGD without momentum, decay or dropout of the features: a level's table moves in proportion to the
# gradient of its loss.
PLAIN: dict[str, Any] = {
    "table_optimizer": "sgd",
    "momentum": 0.0,
    "encoder_decay": 0.0,
    "embed_drops": (0.0, 0.0, 0.0),
    **ONE_STEP,
}
TABLES = [f"heads.levels.{r}.weight" for r in range(3)]


def its_tree(runs: Runs, folder: Path) -> None:
    other = make_tree(runs.dataset, folder / "other.safetensors", seed=1)
    changed = recorded(
        runs.config("cascade", epochs=1, tree=str(other), output=str(folder / "run"))
    )
    own = LabelTree.load(other)
    assert changed.report["tree"] == own.content_hash != LabelTree.load(runs.tree).content_hash
    assert changed.tensors["order"].tolist() == np.asarray(own.order).tolist()


def a_tree_made_on_first_use(runs: Runs, folder: Path) -> None:
    """The tree has 2**d clusters for each depth and is kept in the cache."""
    base = runs.config(
        "cascade",
        epochs=1,
        tree="",
        tree_depths=(1, 2),
        topk=(2, 3),
        cache=str(folder / "cache"),
        output=str(folder / "run"),
    )
    changed = recorded(base)
    assert changed.tree.sizes == (2, 4, 30) and changed.tensors[TABLES[1]].shape == (4, 32)
    (kept,) = (folder / "cache" / "trees").iterdir()
    assert LabelTree.load(kept).content_hash == changed.report["tree"]
    deeper = recorded(replace(base, tree_depths=(1, 3), output=str(folder / "deeper")))
    assert deeper.tree.sizes == (2, 8, 30)
    assert len(list((folder / "cache" / "trees").iterdir())) == 2


def shortlists(plain: Seen, changed: Seen) -> None:
    for seen, topk in ((plain, (2, 4)), (changed, (1, 2))):
        found = seen.model.score(documents(seen), 5, schemes=["level"])
        levels = found.by_scheme["level"].levels
        assert tuple(level.kept.shape[1] for level in levels[:2]) == topk == seen.model.heads.topk
        assert all((level.kept >= 0).all() for level in levels[:2])
        assert f"keeping {topk[0]}, {topk[1]} clusters" in seen.told


def layers_that_are_read(plain: Seen, changed: Seen) -> None:
    """Each level's vector is the pooled state of its layers."""
    for seen, recipe in ((plain, ((1,), (2,), (2,))), (changed, ((0, 2), (1,), (0,)))):
        ids, mask = documents(seen).inputs
        encoder = seen.model.encoder
        with torch.no_grad():
            states = encoder.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=True
            ).hidden_states
            pooled = [(h * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True) for h in states]
            found = encoder.layer_vectors(seen.model.heads.layers, ids, mask)
        for vector, level in zip(found, recipe, strict=True):
            assert torch.allclose(vector, torch.cat([pooled[j] for j in level], 1), atol=1e-5)


def drops_of_levels(plain: tuple[float, ...], changed: tuple[float, ...]) -> Any:
    """The share of zeros in each level's features in training is as asked.

    The coarsest level (behind its linear layer) and the labels are included.
    """

    def holds(before: Seen, after: Seen) -> None:
        for seen, drops in ((before, plain), (after, changed)):
            batch = documents(seen, "train")
            with training(seen.model):
                shares = [zero_share(x) for x in seen.model._features(*batch.inputs)]
            assert shares == pytest.approx(list(drops), abs=0.03)
            assert zero_share(seen.model.embed(batch)) == 0

    return holds


def weighted_losses(plain: Seen, changed: Seen) -> None:
    """A level's gradient and its share of the loss are multiplied by its weight."""
    for name, weight in zip(TABLES, (2.0, 0.0, 3.5), strict=True):
        assert plain.moved(name).any()
        assert torch.allclose(
            changed.moved(name), weight * plain.moved(name), rtol=1e-3, atol=1e-7
        ), name
    assert [
        float(c[5] / p[5])
        for c, p in zip(changed.steps[0].hyper, plain.steps[0].hyper, strict=True)
    ] == [2.0, 0.0, 3.5]


def weighted_sums(runs: Runs, folder: Path) -> None:
    """The logged loss is the weighted sum of the levels' losses."""

    def loss(*weights: float) -> float:
        return float(
            runs.of("cascade", **PLAIN | ({"rw_loss": weights} if weights else {})).progress[0][
                "loss"
            ]
        )

    coarse, fine, labels = loss(1, 0, 0), loss(0, 1, 0), loss(0, 0, 1)
    assert loss() == pytest.approx(coarse + fine + labels, rel=1e-5)
    assert min(coarse, fine, labels) > 0.1
    assert loss(2.0, 0.0, 3.5) == pytest.approx(2 * coarse + 3.5 * labels, rel=1e-5)


def pads_in_the_mean(plain: Seen, changed: Seen) -> None:
    """The labels' loss alone counts pads.

    It is (sum over candidates + pads ln 2) / (documents x length of the longest list).
    """
    real, whole = (round(1 / float(seen.steps[0].hyper[2][SCALE])) for seen in (plain, changed))
    assert whole > real and whole % 160 == 0
    ours, theirs = (seen.progress[0]["loss"] for seen in (plain, changed))
    assert theirs == pytest.approx((ours * real + (whole - real) * math.log(2)) / whole, rel=1e-5)
    assert torch.allclose(
        changed.moved(TABLES[2]), plain.moved(TABLES[2]) * real / whole, rtol=1e-3, atol=1e-7
    )


def lost_clusters(plain: Seen, changed: Seen) -> None:
    """A document without room for more keeps one true cluster per level and loses the others."""
    assert not plain.tensors["lost_positives"].any() and plain.report["lost_positives"] == 0
    labels = changed.dataset.splits["train"].labels
    lost = []
    for r in range(2):
        cluster = changed.tree.ancestors(r)[np.asarray(changed.tree.place)]
        rows = np.split(cluster[labels.indices], labels.indptr[1:-1])
        lost.append(EPOCHS * sum(len(set(row.tolist())) - 1 for row in rows if len(row)))
    assert changed.tensors["lost_positives"].tolist() == lost
    assert changed.report["lost_positives"] == sum(lost) > 100


def schemes(plain: Seen, changed: Seen) -> None:
    assert changed.report["scheme"] == changed.model.heads.scheme == changed.config.scheme
    assert "--scheme auto" in plain.told and "--scheme auto" not in changed.told
    x = changed.model._features(*documents(changed).inputs)
    found = changed.model.score(documents(changed), 1)
    values, labels = found.values, found.labels
    tree, heads = changed.tree, changed.model.heads
    logs = []
    for r in range(3):
        node = (
            tree.ancestors(r)[np.asarray(tree.place)[labels[:, 0]]]
            if r < 2
            else np.asarray(tree.place)[labels[:, 0]]
        )
        logits = heads.levels[r].scores(
            x[r], torch.from_numpy(np.asarray(node, np.int64))[:, None]
        )[:, 0]
        logs.append(torch.nn.functional.logsigmoid(logits))
    used = {"level": logs[2:], "weighted": logs[1:], "path": logs}[changed.config.scheme]
    assert torch.allclose(torch.sigmoid(values[:, 0]), sum(used).exp(), atol=1e-5)


def labels_elsewhere(runs: Runs, folder: Path) -> None:
    """The label level alone goes where the flag says.

    `auto` and the model's own device leave it with the model.
    """
    plain = runs.of("cascade")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        settings = [
            replace(plain.config, precision="fp32", device=home, label_device=apart)
            for home, apart in (
                ("cuda", "auto"),
                ("cuda", "cuda:0"),
                ("cuda", "cpu"),
                ("cpu", "cuda:1"),
            )
        ]
        rest = plain.dataset, plain.tree, PER_EPOCH
        places = [resolve(one, before_data(one), *rest).label_device for one in settings]
    assert [str(place) for place in places] == ["None", "None", "cpu", "cuda:1"]
    plan = resolve(plain.config, before_data(plain.config), *rest)
    for apart, device in ((None, "cpu"), (torch.device("meta"), "meta")):
        made = replace(plan, label_device=apart)
        model = build_model(made, plain.dataset, plain.inputs, plain.tree)
        devices = [level.weight.device.type for level in model.heads.levels]
        assert devices == ["cpu", "cpu", device]


WEIGHT = "head.weight"
TWO = {"layers": ("1,2", "2", "2")}
FIELDS = {
    "tree": (its_tree,),
    "tree_depths": (a_tree_made_on_first_use,),
    "topk": (Case("cascade", {"topk": (1, 2)}, shortlists),),
    "layers": (Case("cascade", {"layers": ("0,2", "1", "0")}, layers_that_are_read),),
    "embed_drops": (
        Case(
            "cascade",
            {"embed_drops": (0.5, 0.0, 0.7)},
            drops_of_levels((0.1, 0.1, 0.1), (0.5, 0.0, 0.7)),
            TWO,
        ),
        Case("cascade", {"embed_drops": ()}, drops_of_levels((0.1, 0.1, 0.1), (0.3, 0.3, 0.4))),
        Case(
            "cascade",
            {"embed_drops": (0.6, 0.2, 0.0)},
            drops_of_levels((0.1, 0.1, 0.1), (0.6, 0.2, 0.0)),
        ),
    ),
    "rw_loss": (
        Case("cascade", {"rw_loss": (2.0, 0.0, 3.5)}, weighted_losses, PLAIN),
        weighted_sums,
    ),
    "scheme": tuple(
        Case("cascade", {"scheme": name}, schemes) for name in ("level", "weighted", "path")
    ),
    "positives_bound": (Case("cascade", {"positives_bound": 0}, lost_clusters, {"topk": (1, 1)}),),
    "reference_loss": (
        # Of one or two clusters each, where a document has labels in two: lists of different
        # lengths.
        Case(
            "cascade",
            {"reference_loss": True},
            pads_in_the_mean,
            PLAIN | {"topk": (1, 1), "rw_loss": (0.0, 0.0, 1.0)},
        ),
    ),
    "label_device": (labels_elsewhere,),
}
