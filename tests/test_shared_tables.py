"""Processes that share the label table between them: what comes out is what one process makes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from end_to_end_common import LABELS, VOCABULARY, make_batch
from processes import collected, together
from scipy.sparse import csr_matrix
from scipy.sparse import random as sparse_random
from torch import Tensor

from xmlkernels import dist
from xmlkernels.data.batches.bags import BagBatches
from xmlkernels.evaluation import (
    embed_split,
    evaluate_split,
    evaluation_batches,
    predict_and_embed_split,
    predict_split,
)
from xmlkernels.metrics import evaluate
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.models.training import Training
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.mixed import MixedHead
from xmlkernels.nn.plain import PlainHead
from xmlkernels.nn.shard import Shard, shard_rows
from xmlkernels.nn.stored_head import StoredHead
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.nn.table_store import TableStore
from xmlkernels.precision import TABLE_DTYPES

WORDS, WIDTH, DOCUMENTS = 40, 12, 45
SIZES = (8, 7, 1)  # parts of one size, of several, and processes without a document


def share(labels: int) -> Shard | None:
    """This process's rows; None for one process alone."""
    return shard_rows(labels, dist.size(), dist.rank()) if dist.size() > 1 else None


def model(
    encoder: str, make: Callable[..., FullHead], labels: int = LABELS, **training: Any
) -> EndToEnd:
    own: Any = Encoder.tiny(VOCABULARY, seed=1)
    if encoder == "bow":
        words = RowOptimizer("adam", row_wise=True, decay=0.01, decoupled=True)
        own = BowEncoder(WORDS, WIDTH, optimizer=words, seed=3)
    head = make(labels, own.width, bias=True, seed=2, shard=share(labels))
    settings = {"encoder_lr": 0.01, "head_lr": 0.05, "encoder_decay": 0.01, "warmup": 0}
    return EndToEnd(own, head, Training(**settings | {"total": 100} | training)).eval()


def bags(documents: int, labels: int = LABELS) -> tuple[csr_matrix, csr_matrix]:
    rng = np.random.default_rng(5)
    features = sparse_random(documents, WORDS, 0.2, "csr", rng=rng, dtype=np.float32)
    return csr_matrix(features), csr_matrix(sparse_random(documents, labels, 0.2, "csr", rng=rng))


def batch_of(encoder: str, size: int, seed: int, labels: int = LABELS) -> Any:
    """A batch, of which several processes have their parts."""
    if encoder == "bow":
        made = BagBatches(*bags(DOCUMENTS, labels), size, prefetch=0).shared(dist.part)
        return made.collate(np.random.default_rng(seed).choice(DOCUMENTS, size, replace=False))
    whole, own = make_batch(size, seed, labels), dist.part(size)
    rows = slice(0, 1) if own.start == own.stop else own
    return replace(
        whole, input_ids=whole.input_ids[rows], attention_mask=whole.attention_mask[rows]
    )


def head(kind: str, dtype: str = "fp32", how: Any = FullHead, **options: Any) -> Any:
    momentum = 0.9 if kind == "sgd" else 0.0
    return partial(how, dtype=dtype, optimizer=RowOptimizer(kind, momentum=momentum), **options)


MIXED = partial(MixedHead, compute="bf16")
STORED = partial(StoredHead, store=TableStore("host"))
CASES: dict[str, Callable[[], EndToEnd]] = {
    f"{encoder}-{dtype}-{kind}": partial(model, encoder, head(kind, dtype))
    for encoder in ("bow", "tiny")
    for dtype in ("fp32", "bf16", "fp8")
    for kind in ("sgd", "adam")
}
CASES |= {
    "bow-plain-sgd": partial(model, "bow", head("sgd", how=PlainHead)),
    "bow-plain-adam": partial(model, "bow", head("adam", how=PlainHead)),
    "bow-mixed-adam": partial(model, "bow", head("adam", how=MIXED)),
    "tiny-mixed-sgd": partial(model, "tiny", head("sgd", how=MIXED)),
    "bow-fp8-stored": partial(model, "bow", head("sgd", "fp8", how=STORED)),
    "tiny-micro-mean": partial(
        model,
        "tiny",
        head("sgd"),
        micro_batch=2,
        clip=0.5,
        mean=MeanSettings(0.9, tables=True),
    ),
    "bow-few-adam": partial(model, "bow", head("adam"), 3),  # fewer labels than processes
}


def train_all(folder: str) -> None:
    """Take steps of every case; the first process writes the whole tensors after each."""
    for name, make in CASES.items():
        own, encoder = make(), name.split("-")[0]
        found: dict[str, Any] = {}
        for step, size in enumerate(SIZES):
            batch = batch_of(encoder, size, step, own.labels)
            loss = own.step(batch, need_loss=True)
            tensors, shards = own.tensors(), own.shards()
            dist.agree_on_tensors({k: t for k, t in tensors.items() if k not in shards})
            whole = collected(tensors, shards)
            found |= {f"{step}.{k}": t.clone() for k, t in whole.items()} | {f"{step}.loss": loss}
            agreed = own.loss(batch)  # the same on all
            dist.agree_on_tensors({"loss": loss, "evaluated": agreed})
            found[f"{step}.evaluated"] = agreed
        assert own.shared == bool(shards) == (dist.size() > 1)
        if dist.rank() == 0:
            torch.save(found, Path(folder, f"{name}.pt"))


class Rows:
    """What `Split` holds, without its folder."""

    name = "test"

    def __init__(self) -> None:
        self.features, self.labels = bags(DOCUMENTS)
        self.filter_pairs = np.array([[3, 1], [3, 2], [29, 0]])

    def __len__(self) -> int:
        return int(self.labels.shape[0])


class Bags:
    """`Inputs` of a split of bags."""

    def batches(self, split: Any, batch_size: int, **options: Any) -> BagBatches:
        return BagBatches(split.features, split.labels, batch_size, **options)


def evaluated(folder: str) -> None:
    """Train twenty steps and keep everything that an evaluation gives, on every process."""
    split: Any = Rows()
    for name in ("bow-fp32-adam", "bow-bf16-sgd", "bow-fp8-sgd"):
        own = CASES[name]()
        for seed in range(20):
            own.step(batch_of("bow", 7, seed))
        for size in (7, 64):
            how: dict[str, Any] = {"batch_size": size, "inputs": Bags()}
            found = evaluate_split(own, split, 5, **how)
            values, rows = predict_split(own, split, 5, **how)
            again = predict_and_embed_split(own, split, 30, **how)  # more than there are labels
            start = FullHead(LABELS, WIDTH, seed=2, bias=True, shard=share(LABELS))
            pairs = (pair[0] for pair in evaluation_batches(own, split, size, Bags()))
            start.start_at_centroids(((own.embed(b), b.pos_row, b.pos_sample) for b in pairs), 0.5)
            start.start_at_frequencies(torch.arange(LABELS), 50)
            assert start.bias is not None
            tables = collected(
                {"w": start.weight, "b": start.bias}, dict.fromkeys("wb", start.shard)
            )
            assert np.array_equal(values, found.values) and np.array_equal(rows, found.labels)
            assert (again[1][:, LABELS:] == -1).all() and again[1].max() == LABELS - 1
            metrics = evaluate(found.labels, split.labels)
            np.savez(
                Path(folder, f"{name}-{size}-{dist.rank()}.npz"),
                values=values,
                rows=rows,
                more=again[0],
                vectors=again[2],
                embedded=embed_split(own, split, **how),
                loss=found.loss,
                precision=[metrics[f"P@{k}"] for k in (1, 3, 5)],
                tables=np.zeros(0) if dist.rank() else tables["w"].numpy(),
                biases=np.zeros(0) if dist.rank() else tables["b"].numpy(),
            )


def resumed() -> None:
    """What was collected is loaded by rows, and goes on as the run that was not stopped."""
    for name in ("bow-fp8-adam", "tiny-micro-mean"):
        encoder = name.split("-")[0]
        first, other = CASES[name](), CASES[name]()
        first.step(batch_of(encoder, 7, 0))
        tensors = collected(first.tensors(), first.shards())
        if dist.rank() == 0:
            torch.save(tensors, "whole.pt")
        dist.sum_(torch.zeros(1))
        other.load_tensors(torch.load("whole.pt", weights_only=True))
        for own in (first, other):
            own.step(batch_of(encoder, 7, 1))
        for (key, expected), found in zip(
            first.tensors().items(), other.tensors().values(), strict=True
        ):
            assert bits(expected, found), key
        rows = first.head.rows(0, first.head.shard.count)
        if first.head.bias is not None:
            first.head.bias = None
        for start, end in ((0, LABELS), (5, 9), (LABELS, LABELS)):
            given = first.label_rows(start, end)
            assert given.shape[0] == end - start
            mine = given[max(0, first.head.shard.first - start) :][: len(rows)]
            assert start > 0 or torch.equal(mine, rows)


def counted() -> None:
    """Bytes received are those of the closed form, on the first process; nothing is of size L."""
    for name in ("bow-fp32-adam", "tiny-fp32-sgd", "tiny-micro-mean"):
        encoder = name.split("-")[0]
        own = CASES[name]()
        for size in SIZES:
            batch, terms = batch_of(encoder, size, 0), 0
            if encoder == "bow":
                terms = int(dist.gather_rows(torch.tensor([len(batch.token)])).max())
            for need_loss in (False, True):
                with dist.counted() as found:
                    own.step(batch, need_loss=need_loss)
                told = own.traffic(size, dist.size(), need_loss=need_loss, terms=terms)
                if dist.rank() == 0:
                    assert found == told, (name, size)
    few, many = (own.step and model("bow", head("sgd"), labels) for labels in (30, 3000))
    sizes = []
    for one in (few, many):
        with dist.counted() as found:
            one.step(batch_of("bow", 8, 0, 30))
        sizes.append(found)
    assert sizes[0] == sizes[1]


def skipped() -> None:
    """What is not finite in one process keeps all of them from the same step."""
    for name in ("tiny-fp32-sgd", "tiny-mixed-sgd"):
        own, batch = CASES[name](), batch_of("tiny", 8, 0)
        if dist.rank() == 1:
            next(own.encoder.parameters()).data[batch.input_ids[0, 0], 0] = torch.inf
        before = {k: t.clone() for k, t in own.tensors().items() if k.endswith(("weight", "bias"))}
        assert not own.step(batch, need_loss=True).isfinite()
        now = own.tensors()
        assert all(torch.equal(now[k], before[k]) for k in before if k.startswith("head."))
        assert int(own.skipped_steps) == 1 and int(own.skipped_encoder_steps) == 0


def groups_skipped() -> None:
    """Groups of 128 are those of the whole table, and their counters are summed."""
    labels = 128 * 5 + 3
    shard = shard_rows(labels, dist.size(), dist.rank(), aligned=True)
    make = partial(FullHead, skip_units=1e12, seed=2)
    own = model("bow", lambda *a, **k: make(*a, **k | {"shard": shard}), labels)
    own.step(batch_of("bow", 8, 0, LABELS))
    assert own.counters()["skipped_tiles"] == 5 / 6


def work(folder: str) -> None:
    import os

    os.chdir(folder)
    train_all(folder)
    evaluated(folder)
    resumed()
    counted()
    skipped()
    groups_skipped()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train_all(str(folder))
    evaluated(str(folder))
    return folder


@pytest.fixture(scope="module", params=[2, 3, 4])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"of{request.param}")
    together(request.param, work, folder, str(folder))
    return folder


def bits(own: Tensor, other: Tensor) -> bool:
    """Whether both are the same bit for bit."""
    return torch.equal(own.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def units(own: Tensor, other: Tensor, dtype: torch.dtype) -> float:
    """The largest difference in units of rounding of the larger number."""
    own, other = own.double(), other.double()
    largest = torch.maximum(own.abs(), other.abs()).clamp(min=2.0**-6)
    return float(((own - other).abs() / largest).max()) / torch.finfo(dtype).eps


def test_the_table_after_one_step_is_that_of_one_process(alone: Path, several: Path) -> None:
    """Bit for bit with bags, whose vectors do not depend on their part of a batch.

    Not so plain PyTorch, whose products of matrices add in an order of their sizes.
    """
    for name in CASES:
        one, more = (
            torch.load(folder / f"{name}.pt", weights_only=True) for folder in (alone, several)
        )
        assert one.keys() == more.keys()
        for key, expected in one.items():
            same = bits(more[key], expected)
            if key.startswith("0.head.") and name.startswith("bow") and "plain" not in name:
                assert same, (name, key)
            elif key == "0.head.weight":
                dtype = TABLE_DTYPES.get(name.split("-")[1], torch.float32)
                # In fp32 the vectors of a transformer already differ by the sizes of their parts.
                most = 16 if "plain" in name or dtype == torch.float32 else 1
                assert units(more[key], expected, dtype) <= most, name
            elif key.startswith("0.") and expected.is_floating_point() and "fp8" not in name:
                error = (more[key].double() - expected.double()).norm()
                assert error <= 2e-3 * expected.double().norm() + 1e-6, (name, key)
            elif not expected.is_floating_point():
                assert same, (name, key)


def test_an_evaluation_is_that_of_one_process(alone: Path, several: Path) -> None:
    """After twenty steps, on every process: of equal ones the same, P@k within 0.001."""
    files = sorted(alone.glob("*.npz"))
    assert len(files) == 6
    for file in files:
        one = np.load(file)
        others = [np.load(path) for path in sorted(several.glob(f"{file.stem[:-1]}*.npz"))]
        assert len(others) == int(several.name[2])
        for key in set(one.files) - {"tables", "biases"}:
            for other in others:
                assert np.array_equal(others[0][key], other[key]), (file.stem, key)
        np.testing.assert_allclose(others[0]["precision"], one["precision"], atol=0.1)
        np.testing.assert_allclose(others[0]["loss"], one["loss"], rtol=2e-3)
        np.testing.assert_allclose(others[0]["biases"], one["biases"], atol=1e-6)
        np.testing.assert_allclose(others[0]["tables"], one["tables"], atol=1e-2)
        if "fp32" in file.stem:
            assert np.array_equal(others[0]["rows"], one["rows"])
            np.testing.assert_allclose(others[0]["more"], one["more"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [100_001, 51_200, 1_000_003])
def test_four_processes_hold_a_quarter_each(labels: int) -> None:
    with torch.device("meta"):
        for kind in ("sgd", "adam"):
            make = head(kind, "fp8")
            whole = sum(make(labels, 64, bias=True).bytes().values())
            shards = [shard_rows(labels, 4, rank) for rank in range(4)]
            for shard in shards:
                own = make(labels, 64, bias=True, shard=shard)
                assert sum(own.bytes().values()) <= 0.26 * whole


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 127, 129, 51_199, 51_200, 1_000_003])
def test_shards_cover_the_table_once(rows: int, aligned: bool) -> None:
    for processes in (1, 2, 3, 4):
        shards = [shard_rows(rows, processes, rank, aligned=aligned) for rank in range(processes)]
        assert [0, *(s.end for s in shards)] == [*(s.first for s in shards), rows]
        if aligned or rows >= 12_800 * processes:
            assert all(shard.first % 128 == 0 for shard in shards if shard.count)
        else:
            assert max(s.count for s in shards) - min(s.count for s in shards) <= 1
