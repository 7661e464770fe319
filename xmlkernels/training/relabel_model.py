"""Labels of a model come and go: new rows of its label table, and further training of it alone.

Letters: N documents, D width of an embedding, L labels, K clusters kept for a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.models.base import Documents, Model
from xmlkernels.models.restore import restored
from xmlkernels.nn.table import scaled_rows
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.rewritten import write_model
from xmlkernels.training.relabelled import Change
from xmlkernels.tree.label_tree import LabelTree

_STRENGTH = 10.0  # how little the rows of new labels are held small
_SEED = 0  # of the order of documents in further training
_BUFFERS = ("weight", "bias", "row_scale")  # of a table, those that have a row per label


@dataclass(frozen=True)
class _Seen:
    """Documents as the label table meets them.

    Attributes:
        x: fp32 [N, D].
        labels: CSR [N, M], by number after.
        kept: int64 [N, K] of a cascade, the clusters handed on to its last level, -1 pads; or None.
    """

    x: Tensor
    labels: csr_matrix
    kept: Tensor | None


def relabel_model(predictor: Predictor, change: Change, folder: Path) -> None:
    """Write the checkpoint of a model with other labels, and what lies beside it."""
    model = predictor.model
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    config = model.config()
    *_, table = model.tables()
    if tensors[f"{table}.weight"].dtype == torch.int8:
        mend = "change the labels of the run that it was exported from"
        raise InputError("RUN", "a label table that was trained", "one of int8", mend)
    new: dict[str, Tensor] = {}
    if change.new:
        weight, bias = _new_rows(predictor, change)
        new = _stored(tensors, table, weight, bias)
    if model.tree is None:
        order = place = None
        config["head"] = config["head"] | {"labels": len(change.every)}
    else:
        place = torch.from_numpy(model.tree.place.copy())
        tree = _tree(predictor, change, tensors, config)
        order = torch.from_numpy(tree.order.copy())
    kept = torch.from_numpy(change.kept)
    for name in _BUFFERS:
        if (rows := tensors.get(f"{table}.{name}")) is not None:
            by_label = rows[kept if place is None else place[kept]]
            if name in new:
                by_label = _joined(by_label, new[name])
            tensors[f"{table}.{name}"] = by_label if order is None else by_label[order]
    if change.epochs:
        tensors = _train_further(predictor, change, tensors, config)
    _write(predictor, change, folder, tensors, config)


def _joined(rows: Tensor, more: Tensor) -> Tensor:
    if rows.dtype == torch.float8_e4m3fn:  # torch joins no fp8: by its bytes
        both = torch.cat([rows.view(torch.uint8), more.view(torch.uint8)])
        return both.view(torch.float8_e4m3fn)
    return torch.cat([rows, more])


def _stored(
    tensors: dict[str, Tensor], table: str, weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """Turn new rows fp32 [n, D] and biases into the formats of the table."""
    found = {}
    if f"{table}.row_scale" in tensors:
        weight, found["row_scale"] = scaled_rows(weight)
    found["weight"] = weight.to(tensors[f"{table}.weight"].dtype)
    if (before := tensors.get(f"{table}.bias")) is not None:
        found["bias"] = bias.to(before.dtype)
    return found


def _new_rows(predictor: Predictor, change: Change) -> tuple[Tensor, Tensor]:
    """Train the rows of new labels: weights fp32 [new, D] and biases fp32 [new]."""
    from sklearn.linear_model import LogisticRegression

    *_, table = predictor.model.tables().values()
    own = predictor.embed(change.lines, batch_size=change.batch)
    x = np.concatenate([own, _sampled(predictor, change)])
    biased = getattr(table, "bias", None) is not None
    weight, bias = np.zeros((change.new, x.shape[1])), np.zeros(change.new)
    for number in range(change.new):
        y = np.zeros(len(x), bool)
        y[: len(own)] = change.truth[:, len(change.kept) + number].toarray().ravel() > 0
        found = LogisticRegression(C=_STRENGTH, fit_intercept=biased, max_iter=1000).fit(x, y)
        weight[number] = found.coef_[0]
        bias[number] = found.intercept_[0] if biased else 0.0
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def _samples(predictor: Predictor, change: Change) -> Iterator[Documents]:
    """Draw training documents of the run, a batch at a time, until there are `change.sample`."""
    assert change.train is not None
    count = 0
    for batch in predictor.inputs.batches(change.train, change.batch, seed=0).epoch(0):
        yield batch.to(predictor.model.device)
        count += len(batch)
        if count >= change.sample:
            return


def _sampled(predictor: Predictor, change: Change) -> np.ndarray:
    """Embed a sample of the run's training documents: fp32 [n, D]."""
    batches = _samples(predictor, change)
    found = [predictor.model.embed(batch).cpu().numpy() for batch in batches]
    return np.concatenate(found)[: change.sample]


# ---- the label tree ----


def _tree(
    predictor: Predictor, change: Change, tensors: dict[str, Tensor], config: dict[str, Any]
) -> LabelTree:
    """Put new labels into clusters, and take out clusters without labels; change what they need.

    A cluster keeps its row in the table of its level, and a label its cluster.
    """
    model = predictor.model
    assert model.tree is not None
    before = model.tree
    parts = [before.ancestors(r)[before.place][change.kept] for r in range(before.levels - 1)]
    if change.new:
        joined = _clusters(predictor, change)
        above = [before.bounds(before.levels - 2)[joined]]  # a row of each cluster
        parts = [
            np.concatenate([part, before.ancestors(r)[above[0]]]) for r, part in enumerate(parts)
        ]
    tree = LabelTree.from_partitions(parts, before.settings)
    for r, part in enumerate(parts):
        there = torch.from_numpy(np.unique(part))  # in tree order, before as after
        for name in _BUFFERS:
            if (rows := tensors.get(f"heads.levels.{r}.{name}")) is not None:
                tensors[f"heads.levels.{r}.{name}"] = rows[there]
        tensors[f"children_{r}"] = torch.from_numpy(tree.children[r].copy())
    tensors["order"] = torch.from_numpy(tree.order.copy())
    most = [tree.widest(r) for r in range(tree.levels - 1)]
    topk: list[int] = []
    for r, k in enumerate(config["head"]["topk"]):
        there_are = tree.sizes[r] if r == 0 else min(tree.sizes[r], topk[-1] * most[r - 1])
        topk.append(min(k, there_are))
    config["head"] = config["head"] | {"sizes": list(tree.sizes), "most": most, "topk": topk}
    return tree


def _clusters(predictor: Predictor, change: Change) -> np.ndarray:
    """Choose the finest cluster of each new label: int64 [new].

    It is the one that the cascade gives the highest probability, summed over the label's text and
    documents, of those that its search keeps for them: the cluster where it will look for the
    label.
    """
    model = predictor.model
    assert model.tree is not None
    finest = model.tree.levels - 2
    found = np.zeros((len(change.lines), model.tree.sizes[finest]), np.float32)
    for batch in predictor.inputs.text_batches(change.lines, change.batch, window=1, prefetch=0):
        on = batch.to(model.device)
        answer = model.score(on, found.shape[1], schemes=("path",)).by_scheme["path"]
        level = answer.levels[finest]
        nodes, values = level.nodes.cpu().numpy(), level.values.sigmoid().cpu().numpy()
        for document, own, probability in zip(batch.index.tolist(), nodes, values, strict=True):
            found[document, own[own >= 0]] = probability[own >= 0]
    documents = change.truth[:, len(change.kept) :].T.astype(np.float32)
    return np.asarray((documents @ found).argmax(1), np.int64)


# ---- further training of the table ----


def _train_further(
    predictor: Predictor, change: Change, tensors: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Train the label table on given and sampled documents; frozen rows stay bit for bit."""
    model = restored(config, tensors)
    model.load_tensors(tensors)
    model.eval()
    seen = _see(predictor, model, change)
    *_, table = model.tables()
    frozen = torch.from_numpy(change.frozen)
    if model.tree is not None:
        frozen = torch.from_numpy(model.tree.place.copy())[frozen]
    names = [f"{table}.{name}" for name in _BUFFERS if f"{table}.{name}" in tensors]
    held = {name: tensors[name][frozen].clone() for name in names}
    draw = np.random.default_rng(_SEED)
    for _ in range(change.epochs):
        order = draw.permutation(len(seen.x))
        for first in range(0, len(order), change.batch):
            _step(model, seen, np.sort(order[first : first + change.batch]), change.lr)
    found = {name: value.detach() for name, value in model.state_dict().items()}
    # No row has a part in the training of another: to put one back is never to have trained it.
    for name in names:
        found[name][frozen] = held[name]
    return found


def _see(predictor: Predictor, model: Model, change: Change) -> _Seen:
    """Embed given and sampled documents."""
    assert change.train is not None
    x, kept = list[Tensor](), list[Tensor]()
    lines = predictor.inputs.text_batches(change.lines, change.batch, window=1, prefetch=0)
    labels = []
    for truth, batches in (
        (change.truth, lines if change.lines else ()),
        (change.after(change.train.labels), _samples(predictor, change)),
    ):
        for batch in batches:
            on = batch.to(model.device)
            x.append(model.embed(on))
            labels.append(truth[batch.index.cpu().numpy()])
            if model.tree is not None:
                answer = model.score(on, 1, schemes=("level",)).by_scheme["level"]
                kept.append(answer.levels[-2].kept)
    every = csr_matrix(vstack(labels, "csr"))
    return _Seen(torch.cat(x), every, torch.cat(kept) if kept else None)


def _step(model: Any, seen: _Seen, documents: np.ndarray, lr: float) -> None:
    """Take one step of the label table, by the mean loss of the documents."""
    x = seen.x[torch.from_numpy(documents)]
    pairs = seen.labels[documents].tocoo()
    sample, row = pairs.row.astype(np.int64), pairs.col.astype(np.int64)
    if model.tree is not None:
        row = model.tree.place[row]
    order = np.lexsort((sample, row))
    nodes, samples = torch.from_numpy(row[order]), torch.from_numpy(sample[order])
    *_, table = model.tables().values()
    if model.tree is None:
        table.step(x, nodes, samples.int(), lr=lr / len(documents))
        return
    assert seen.kept is not None
    clusters = _with_true(model.tree, seen.kept[torch.from_numpy(documents)], row, sample)
    bounds = torch.from_numpy(model.tree.children[-1].copy())
    scale = torch.full((1,), 1 / len(documents))
    how: dict[str, Any] = {"lr": lr, "beta1": None, "scale": scale, "dx_scale": 1.0}
    pairs_of = (nodes, samples.int())
    table.step(x, clusters, bounds, model.heads.most[-1], pairs_of, **how, need_loss=False)


def _with_true(tree: LabelTree, kept: Tensor, row: np.ndarray, sample: np.ndarray) -> Tensor:
    """Add the clusters of true labels to those kept: int64 [B, K'], ascending, pads last."""
    cluster = tree.ancestors(tree.levels - 2)
    each = [set(own[own >= 0].tolist()) for own in kept.numpy()]
    for one, label in zip(sample.tolist(), row.tolist(), strict=True):
        each[one].add(int(cluster[label]))
    found = np.full((len(each), max(map(len, each))), -1)
    for document, own in enumerate(each):
        found[document, : len(own)] = sorted(own)
    return torch.from_numpy(found)


def _write(
    predictor: Predictor,
    change: Change,
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
) -> None:
    """Write the checkpoint and what lies beside it, the calibration too."""
    identity = write_model(
        predictor, folder, tensors, config, names=change.every, ids=change.ids(predictor)
    )
    if predictor.calibration is not None:
        change.calibrated(predictor.calibration, identity).save(folder / "checkpoint")
