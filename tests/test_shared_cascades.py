"""Processes that share a cascade's label level: what comes out is what one process makes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cascade_common
import numpy as np
import pytest
import torch
from processes import collected, together
from scipy.sparse import csr_matrix
from scipy.sparse import random as sparse_random
from torch import Tensor

from xmlkernels import dist
from xmlkernels.data.batches.bags import BagBatches
from xmlkernels.data.batches.tokens import Batch
from xmlkernels.evaluation import evaluate_schemes, evaluation_batches, predict_split
from xmlkernels.metrics import evaluate
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.restore import restored
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.models.training import CascadeTraining
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.cluster_shard import tree_shards
from xmlkernels.nn.mixed import MixedLevel
from xmlkernels.nn.plain import PlainLevel
from xmlkernels.nn.shard import Shard
from xmlkernels.nn.stored_level import StoredLevel
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.nn.table_store import TableStore
from xmlkernels.precision import TABLE_DTYPES
from xmlkernels.tree.label_tree import LabelTree, arrangement

WORDS, WIDTH, DOCUMENTS = 40, 12, 45
SIZES = (7, 1)  # parts of several sizes, and processes without a document
TREE = cascade_common.make_tree(3)
FEW = LabelTree.from_partitions([np.repeat([0, 1, 2], [5, 1, 9])])  # fewer clusters than processes
SCHEMES = Cascade.schemes


def share(tree: LabelTree) -> list[Shard] | None:
    """This process's rows of each level; None for one process alone."""
    if dist.size() == 1:
        return None
    bounds = [torch.tensor(tree.bounds(r)) for r in range(tree.levels - 1)]
    return tree_shards(bounds, tree.sizes[0], dist.size())[dist.rank()]


def model(encoder: str, tree: LabelTree = TREE, **options: Any) -> Cascade:
    """A cascade whose label level the processes share."""
    if encoder == "tiny":
        return cascade_common.make_model(3, tree=tree, shards=share(tree), decay=0.1, **options)
    row = {k: options.pop(k) for k in cascade_common.ROW_OPTIONS if k in options}
    optimizer = RowOptimizer(options.pop("optimizer", "adam"), **{"row_wise": True} | row)
    settings = {"encoder_lr": 0.01, "total": 100, "decay": 0.1, "warmup": 0}
    settings |= {k: options.pop(k) for k in CascadeTraining.__dataclass_fields__ if k in options}
    words = RowOptimizer("adam", row_wise=True, decay=0.01, decoupled=True)
    most = [tree.widest(r) for r in range(tree.levels - 1)]
    heads = CascadeHeads(
        tree.sizes,
        most,
        WIDTH,
        layers=((0,),) * tree.levels,
        topk=[3] * (tree.levels - 1),
        optimizer=optimizer,
        shards=share(tree),
        seed=4,
        **options,
    )
    own = BowEncoder(WORDS, WIDTH, optimizer=words, seed=3)
    return Cascade(own, heads, tree, CascadeTraining(**settings)).eval()


def bags(tree: LabelTree) -> tuple[csr_matrix, csr_matrix]:
    rng = np.random.default_rng(5)
    features = sparse_random(DOCUMENTS, WORDS, 0.2, "csr", rng=rng, dtype=np.float32)
    labels = sparse_random(DOCUMENTS, len(tree.order), 0.1, "csr", rng=rng)
    return csr_matrix(features), csr_matrix(labels)


def batch_of(own: Cascade, size: int, seed: int) -> Any:
    """A batch, of which several processes have their parts."""
    tree = own.tree
    if isinstance(own.encoder, BowEncoder):
        made = BagBatches(*bags(tree), size, prefetch=0, **arrangement(tree)).shared(dist.part)
        return made.collate(np.random.default_rng(seed).choice(DOCUMENTS, size, replace=False))
    made = cascade_common.make_batch(tree, size, seed)
    whole = Batch(
        *made.inputs, made.pos_row, made.pos_sample, torch.arange(size), own.labels, made.levels
    )
    part = dist.part(size)
    rows = slice(0, 1) if part.start == part.stop else part
    return replace(
        whole, input_ids=whole.input_ids[rows], attention_mask=whole.attention_mask[rows]
    )


MIXED = partial(MixedLevel, compute="bf16")
STORED = partial(StoredLevel, store=TableStore("host"), most=TREE.widest(1))
CASES: dict[str, Callable[[], Cascade]] = {
    f"{encoder}-{dtype}-{kind}": partial(model, encoder, dtype=dtype, optimizer=kind, momentum=0.9)
    for encoder, kinds in (("bow", ("sgd", "adam")), ("tiny", ("adam",)))
    for dtype in ("fp32", "bf16", "fp8")
    for kind in kinds
}
CASES |= {
    "bow-fp32-dense": partial(model, "bow", optimizer="adamw_dense"),
    "tiny-bf16-dense": partial(model, "tiny", dtype="bf16", optimizer="adamw_dense"),
    "bow-fp32-plain": partial(model, "bow", level=PlainLevel, optimizer="sgd"),
    "bow-fp32-mixed": partial(model, "bow", level=MIXED, state_dtype="bf16"),
    "bow-fp8-stored": partial(model, "bow", dtype="fp8", label_level=STORED),
    "bow-fp32-few": partial(model, "bow", FEW, reference_loss=True),
    "bow-bf16-placed": partial(model, "bow", dtype="bf16", label_device=torch.device("cpu")),
    "tiny-fp32-mean": partial(
        model, "tiny", micro_batch=2, clip=0.5, mean=MeanSettings(0.9, tables=True)
    ),
}


def train_all(folder: str) -> None:
    """Take steps of every case; the first process writes the whole tensors after each."""
    for name, make in CASES.items():
        if dist.size() == 3 and "bow" not in name:
            continue  # transformers in two of three groups
        own, found = make(), dict[str, Any]()
        for step, size in enumerate(SIZES):
            batch = batch_of(own, size, step)
            told = {"loss": own.step(batch, need_loss=True), "by level": own.level_losses(batch)}
            for level, held in enumerate(own.candidates(batch)):
                told |= {f"nodes {level}": held.nodes, f"logits {level}": held.logits}
                told[f"positive {level}"] = held.positive.to(torch.uint8)
            tensors, shards = own.tensors(), own.shards()
            same = {k: t for k, t in tensors.items() if k not in shards} | told
            dist.agree_on_tensors(same)
            whole = collected(tensors, shards)
            found |= {f"{step}.{k}": t.clone() for k, t in (whole | told).items()}
        assert own.shared == bool(shards) == (dist.size() > 1)
        if dist.rank() == 0:
            torch.save(found, Path(folder, f"{name}.pt"))
            if name == "bow-fp8-adam":
                torch.save((own.config(), whole), Path(folder, "whole.pt"))


class Rows:
    """What `Split` holds, without its folder."""

    name = "test"

    def __init__(self, tree: LabelTree) -> None:
        self.features, self.labels = bags(tree)
        self.filter_pairs = np.array([[3, 1], [3, 2], [29, 0]])

    def __len__(self) -> int:
        return int(self.labels.shape[0])


class Bags:
    """`Inputs` of a split of bags."""

    def batches(self, split: Any, batch_size: int, **options: Any) -> BagBatches:
        return BagBatches(split.features, split.labels, batch_size, **options)


def evaluated(folder: str) -> None:
    """Train twenty steps and keep everything that an evaluation gives, on every process."""
    for name in ("bow-fp32-adam", "bow-fp8-sgd", "bow-fp32-few"):
        own = CASES[name]()
        split: Any = Rows(own.tree)
        for seed in range(20):
            own.step(batch_of(own, 7, seed))
        size = 64 if "fp8" in name else 17  # one batch, or several
        how: dict[str, Any] = {"batch_size": size, "inputs": Bags()}
        found = evaluate_schemes(own, split, 5, **how)
        out: dict[str, Any] = {}
        for scheme in SCHEMES:
            one = found[scheme]
            metrics = evaluate(one.labels, split.labels)
            numbers = [value for level in one.levels for value in level.values()]
            out |= {f"{scheme}-values": one.values, f"{scheme}-rows": one.labels}
            out[f"{scheme}-precision"] = [metrics[f"P@{k}"] for k in (1, 3, 5)]
            out[f"{scheme}-levels"] = np.array([one.loss, *numbers])
            own.use_scheme(scheme)
            values, rows = predict_split(own, split, 5, **how)
            assert np.array_equal(values, one.values) and np.array_equal(rows, one.labels)
        for batch, exclude in evaluation_batches(own, split, size, Bags()):
            more = own.score(batch, 60, exclude=exclude)  # more than there are candidates
            assert (more.labels[:, -1] == -1).all()
            assert (
                exclude is None
                or not (
                    (more.labels[:, :, None] == exclude[:, None]) & (exclude[:, None] >= 0)
                ).any()
            )
            kept = more.labels >= 0
            assert torch.equal(more.values.isneginf(), ~kept)
            assert all(
                len(row[on].unique()) == on.sum() for row, on in zip(more.labels, kept, strict=True)
            )
        np.savez(Path(folder, f"{name}-{size}-{dist.rank()}.npz"), **out)


def skipped() -> None:
    """What is not finite in one process keeps all of them from the same step."""
    for name in ("tiny-fp32-adam", "tiny-bf16-dense"):
        own = CASES[name]()
        batch = batch_of(own, 8, 0)
        if dist.rank() == 1:
            next(own.encoder.parameters()).data[batch.input_ids[0, 0], 0] = torch.inf
        before = {k: t.clone() for k, t in own.tensors().items() if k.startswith("heads.levels.")}
        assert not own.step(batch, need_loss=True).isfinite()
        now = own.tensors()
        assert all(torch.equal(now[k], t) for k, t in before.items() if "counter" not in k)
        assert int(own.skipped_steps) == 1 and int(own.skipped_encoder_steps) == 0


def counted() -> None:
    """Bytes received are those of the closed form, on the first process; nothing is of size L."""
    for name in ("bow-fp32-adam", "tiny-fp32-adam", "tiny-fp32-mean"):
        own = CASES[name]()
        for size in SIZES:
            batch, terms = batch_of(own, size, 0), 0
            if name.startswith("bow"):
                terms = int(dist.gather_rows(torch.tensor([len(batch.token)])).max())
            for need_loss in (False, True):
                with dist.counted() as found:
                    own.step(batch, need_loss=need_loss)
                told = own.traffic(size, dist.size(), need_loss=need_loss, terms=terms)
                if dist.rank() == 0:
                    assert found == told, (name, size)
                    assert found["scattered"] > 0
    sizes = []
    for labels in (LabelTree.from_partitions([np.arange(n) % 9]) for n in (90, 9000)):
        one = model("bow", labels)
        batch = batch_of(one, 8, 0)
        with dist.counted() as found:
            one.step(batch)
        sizes.append(found)
    assert sizes[0] == sizes[1]


def work(folder: str) -> None:
    train_all(folder)
    evaluated(folder)
    skipped()
    counted()


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


def units(own: Tensor, other: Tensor, dtype: torch.dtype) -> float:
    """The largest difference in units of rounding of the larger number."""
    own, other = own.double(), other.double()
    largest = torch.maximum(own.abs(), other.abs()).clamp(min=2.0**-6)
    return float(((own - other).abs() / largest).max()) / torch.finfo(dtype).eps


def same_bits(own: Tensor, other: Tensor) -> bool:
    return torch.equal(own.view(torch.uint8), other.view(torch.uint8))


def test_the_tables_after_one_step_are_those_of_one_process(alone: Path, several: Path) -> None:
    """Bit for bit with bags, whose vectors do not depend on their part of a batch.

    Not so plain PyTorch, whose products of matrices add in an order of their sizes.
    """
    files = {path.stem: path for path in several.glob("*-*.pt")}
    assert len(files) == (12 if several.name.startswith("of3") else len(CASES))
    for name, path in files.items():
        one, more = (torch.load(p, weights_only=True) for p in (alone / path.name, path))
        assert one.keys() == more.keys()
        for key, expected in one.items():
            encoder, dtype, kind = name.split("-")
            exact = encoder == "bow" and kind not in ("dense", "plain")
            if key.startswith("0.heads.levels.") and exact:
                assert same_bits(more[key], expected), (name, key)
            elif key.startswith("0.heads.levels.") and key.endswith(".weight"):
                most = 16 if kind in ("dense", "plain") and dtype == "fp32" else 1
                assert units(more[key], expected, TABLE_DTYPES[dtype]) <= most, (name, key)
            elif not expected.is_floating_point() and key.startswith("0."):
                assert same_bits(more[key], expected), (name, key)
            elif key.startswith("0.") and dtype != "fp8" and "key.bias" not in key:
                real = expected.isfinite()
                assert torch.equal(real, more[key].isfinite()), (name, key)
                error = (more[key] - expected)[real].double().norm()
                assert error <= 2e-3 * expected[real].double().norm() + 1e-6, (name, key)


def test_an_evaluation_is_that_of_one_process(alone: Path, several: Path) -> None:
    """After twenty steps, on every process: of equal ones the same, P@k within 0.001."""
    files = sorted(alone.glob("*.npz"))
    assert len(files) == 3
    for file in files:
        one = np.load(file)
        others = [np.load(path) for path in sorted(several.glob(f"{file.stem[:-1]}*.npz"))]
        assert len(others) == int(several.name[2])
        for key in one.files:
            for other in others:
                assert np.array_equal(others[0][key], other[key]), (file.stem, key)
        for scheme in SCHEMES:
            got, expected = (
                {
                    part: found[f"{scheme}-{part}"]
                    for part in ("precision", "levels", "rows", "values")
                }
                for found in (others[0], one)
            )
            np.testing.assert_allclose(got["precision"], expected["precision"], atol=0.1)
            np.testing.assert_allclose(got["levels"], expected["levels"], rtol=2e-3, atol=0.1)
            if "fp32" in file.stem:
                assert np.array_equal(got["rows"], expected["rows"]), (file.stem, scheme)
                np.testing.assert_allclose(got["values"], expected["values"], rtol=1e-4, atol=1e-5)


def test_a_whole_table_predicts_in_one_process(alone: Path, several: Path) -> None:
    """What was collected from shards is a checkpoint like any other."""
    answers = []
    for folder in (alone, several):
        config, tensors = torch.load(folder / "whole.pt", weights_only=False)
        own = restored(config, tensors)
        own.load_tensors(tensors)
        answers.append(own.score(batch_of(own, 9, 1), 5))
    assert (answers[0].labels == answers[1].labels).float().mean() > 0.9


@pytest.mark.parametrize("labels", [100_001, 1_000_003])
def test_four_processes_hold_a_quarter_each(labels: int) -> None:
    """Of the label table and the next with their states; the first has too few rows to count."""
    rng = np.random.default_rng(0)
    row_ptr = np.concatenate(
        [[0], np.sort(rng.choice(labels - 1, labels // 20, replace=False)) + 1]
    )
    row_ptr = torch.from_numpy(np.append(row_ptr, labels))
    sizes, most = (64, len(row_ptr) - 1, labels), (len(row_ptr) - 1, int(row_ptr.diff().max()))
    how: dict[str, Any] = {"layers": ((0,),) * 3, "topk": (8, 8), "optimizer": "adam"}
    first = torch.arange(65) * (len(row_ptr) - 1) // 64
    shards = tree_shards([row_ptr[first], row_ptr], 64, 4)
    for dtype in ("fp32", "fp8"):
        with torch.device("meta"):
            whole = CascadeHeads(sizes, most, 64, dtype=dtype, **how)
            parts = [
                CascadeHeads(sizes, most, 64, dtype=dtype, shards=own, **how) for own in shards
            ]
        held = [[sum(level.bytes().values()) for level in h.levels] for h in (whole, *parts)]
        for own in held[1:]:
            assert all(few <= 0.26 * all_ for few, all_ in zip(own[1:], held[0][1:], strict=True))
            assert own[0] <= 0.27 * held[0][0]
            assert sum(own) <= 0.26 * sum(held[0])
