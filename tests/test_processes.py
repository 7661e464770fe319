"""Two processes train and evaluate both models: what comes out is what one process makes of the
same global batches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cascade_common
import numpy as np
import pytest
import torch
from end_to_end_common import make_batch, make_model
from processes import CPU, collected, together
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix
from scipy.sparse import random as sparse_random
from torch import Tensor

from xmlkernels import InputError, dist
from xmlkernels.data.batches.bags import BagBatch, BagBatches
from xmlkernels.data.batches.tokens import Batch
from xmlkernels.evaluation import embed_split, evaluate_split, evaluation_batches, predict_split
from xmlkernels.models.base import Model
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.models.training import Training
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.table import RowOptimizer

SIZES = (8, 7, 1, 6)  # parts of one size, of two sizes, and a process without a document
WORDS = 40
TREE = cascade_common.make_tree(3)


def part_of(batch: Any) -> tuple[Tensor, ...]:
    """The inputs that `AnyBatches.shared` leaves of a batch."""
    own = dist.part(len(batch.index))
    rows = slice(0, 1) if own.start == own.stop else own
    return tuple(part[rows] for part in batch.inputs)


def end_to_end_batch(size: int, seed: int) -> Batch:
    batch = make_batch(size, seed)
    ids, mask = part_of(batch)
    return replace(batch, input_ids=ids, attention_mask=mask)


def cascade_batch(size: int, seed: int) -> Batch:
    made = cascade_common.make_batch(TREE, size, seed)
    whole = Batch(
        *made.inputs,
        made.pos_row,
        made.pos_sample,
        torch.arange(size),
        cascade_common.LABELS,
        made.levels,
    )
    ids, mask = part_of(whole)
    return replace(whole, input_ids=ids, attention_mask=mask)


def bags(documents: int) -> tuple[csr_matrix, csr_matrix]:
    rng = np.random.default_rng(5)
    features, labels = (
        sparse_random(documents, n, 0.2, "csr", rng=rng, dtype=np.float32) for n in (WORDS, 23)
    )
    return csr_matrix(features), csr_matrix(labels)


def bag_batch(size: int, seed: int) -> BagBatch:
    made = BagBatches(*bags(30), size, prefetch=0).shared(dist.part)
    return made.collate(np.random.default_rng(seed).choice(30, size, replace=False))


def bow_model() -> EndToEnd:
    adam = RowOptimizer("adam", row_wise=True, decay=0.01, decoupled=True)
    encoder = BowEncoder(WORDS, 12, optimizer=adam, seed=3)
    settings = Training(encoder_lr=0.01, head_lr=0.05, encoder_decay=0.01, warmup=0, total=100)
    return EndToEnd(encoder, FullHead(23, 12, optimizer="adam", seed=2, bias=True), settings).eval()


def in_parts(make: Callable[[], Any]) -> Callable[[], Any]:
    """Of several processes each makes the model with its rows of the encoder alone."""
    whole = Encoder.tiny

    def sharded(*values: Any, **options: Any) -> Encoder:
        encoder = whole(*values, **options)
        encoder.shard(CPU)
        return encoder

    def made() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if dist.size() > 1:
                patch.setattr(Encoder, "tiny", sharded)
            return make()

    return made


CASES: dict[str, tuple[Callable[[], Any], Callable[[int, int], Any]]] = {
    "end_to_end": (make_model, end_to_end_batch),
    "micro": (
        lambda: make_model(micro_batch=2, clip=0.5, mean=MeanSettings(0.9, tables=True)),
        end_to_end_batch,
    ),
    "cascade": (
        lambda: cascade_common.make_model(
            3, tree=TREE, mean=MeanSettings(0.9, tables=True), decay=0.1
        ),
        cascade_batch,
    ),
    "unread": (
        lambda: cascade_common.make_model(3, tree=TREE, layers=((0, 1), (1,), (2,)), decay=0.1),
        cascade_batch,
    ),
    "bow": (bow_model, bag_batch),
}
CASES |= {
    f"{name}, encoder in parts": (in_parts(make), batch_of)
    for name, (make, batch_of) in CASES.items()
    if name != "bow"
}


def train_all(folder: str) -> None:
    """Some steps of each model; the first process writes what they come to, and their losses."""
    for name, (make, batch_of) in CASES.items():
        model, losses = make(), []
        assert model.encoder_shared is (dist.size() > 1 and "in parts" in name)
        for seed, size in enumerate(SIZES):
            with dist.counted() as received:
                losses.append(model.step(batch_of(size, seed), need_loss=True))
            if model.encoder_shared and dist.rank() == 0 and "unread" not in name:
                assert received == model.traffic(size, dist.size(), need_loss=True)
        tensors, shards = model.tensors(), model.shards()
        assert {k: v.shape[0] for k, v in tensors.items() if k in shards} == {
            k: shard.count for k, shard in shards.items()
        }
        whole = {k: v for k, v in tensors.items() if k not in shards}
        dist.agree_on_tensors(whole | {"losses": torch.cat(losses)})
        tensors = collected(tensors, shards) | {"losses": torch.cat(losses)}
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        if dist.rank() == 0:
            save_file(
                {k: v.clone() for k, v in tensors.items()}, Path(folder, f"{name}.safetensors")
            )


def skip_all(folder: str) -> None:
    """What is not finite in one process keeps all of them from the same step."""
    for make, batch_of in (CASES["end_to_end"], CASES["cascade"]):
        model, batch = make(), batch_of(8, 0)
        if dist.rank() == 1:
            next(model.encoder.parameters()).data[batch.input_ids[0, 0], 0] = torch.inf
        before = {k: v.clone() for k, v in model.tensors().items()}
        assert not model.step(batch, need_loss=True).isfinite()
        tables = [
            k for k in before if k.endswith("weight") and k.startswith(("head.", "heads.levels."))
        ]
        assert tables and all(torch.equal(model.tensors()[k], before[k]) for k in tables)
        assert int(model.skipped_steps) == 1 and int(model.skipped_encoder_steps) == 0
        model = make()
        parameter = next(p for p in model.encoder.parameters() if p.requires_grad)
        if dist.rank() == 1:
            parameter.register_hook(lambda grad: torch.full_like(grad, torch.inf))
        before = {k: v.clone() for k, v in model.encoder.named_parameters()}
        model.step(batch)
        assert all(torch.equal(v, before[k]) for k, v in model.encoder.named_parameters())
        assert int(model.skipped_steps) == 0 and int(model.skipped_encoder_steps) == 1
    with pytest.raises(InputError, match="gather_rows: own: expected 4 rows, got 8"):
        make_model().step(make_batch(8))


def parts_all() -> None:
    """What processes hold of an encoder in parts, and the decisions that they take together."""
    make, batch_of = CASES["micro, encoder in parts"]
    model, whole = make(), CASES["micro"][0]()

    def held(of: EndToEnd) -> int:
        """Bytes of weights, moments and means of the encoder."""
        tensors = of.tensors()
        names = [k for k in tensors if "layer." in k or "embeddings." in k]
        return sum(tensors[k].numel() * tensors[k].element_size() for k in names)

    for one in (model, whole):
        one.step(batch_of(8, 0))
    assert 0.5 <= held(model) / held(whole) < 0.51
    # The state of one goes into the other, either way, and both go on alike.
    shards = model.shards()
    rows = {k: v.clone() for k, v in model.tensors().items()}
    other = make()
    other.load_tensors({k: v.clone() for k, v in whole.tensors().items()})
    third = make()
    third.load_tensors(rows)
    for batch in (batch_of(7, 1), batch_of(1, 2)):
        losses = [one.step(batch, need_loss=True) for one in (whole, model, other, third)]
        torch.testing.assert_close(torch.cat(losses), losses[0].expand(4), rtol=1e-5, atol=0)
    with torch.no_grad():
        scored = [one.score(make_batch(7, 3), 3, loss=True) for one in (whole, model)]
    assert torch.equal(scored[0].labels, scored[1].labels), "by the means"
    torch.testing.assert_close(scored[0].loss, scored[1].loss, rtol=1e-5, atol=0)
    assert shards.keys() == model.shards().keys()
    # A gradient of one process that is not finite keeps all from the step.
    take = dist.take_gradients

    def spoilt(parameters: Any) -> None:
        held = list(parameters)
        take(held)
        rows = next(p for p in map(dist.own_parameter, held) if p.grad is not None and p.numel())
        if dist.rank() == 1:
            rows.grad.fill_(torch.inf)  # type: ignore[union-attr]

    before = {k: v.clone() for k, v in model.tensors().items() if "optimizer" in k}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "take_gradients", spoilt)
        model.step(batch_of(8, 4))
    after = model.tensors()
    assert before and all(torch.equal(after[k], v) for k, v in before.items())
    assert int(model.skipped_steps) == 0 and int(model.skipped_encoder_steps) == 1
    # Frozen layers are gathered forward alone, and have neither gradients nor moments.
    model = make()
    with pytest.MonkeyPatch.context() as patch:
        freeze = Encoder.shard
        patch.setattr(Encoder, "shard", lambda e, device: (e.freeze(1), freeze(e, device)))
        model = make()
    with dist.counted() as received:
        model.step(batch_of(8, 0), need_loss=True)
    assert dist.rank() > 0 or received == model.traffic(8, 2, need_loss=True)
    assert not any("layer.0" in k for k in model.tensors() if k.startswith("optimizer"))


def all_of_training(folder: str) -> None:
    train_all(folder)
    skip_all(folder)
    parts_all()


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    alone, both = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("both")
    train_all(str(alone))
    together(2, all_of_training, both, str(both))
    return alone, both


@pytest.mark.parametrize("name", CASES)
def test_steps_of_two_processes_are_those_of_one(trained: tuple[Path, Path], name: str) -> None:
    one, two = (load_file(folder / f"{name}.safetensors") for folder in trained)
    assert one.keys() == two.keys()
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    start = CASES[name][0]().tensors()
    moved = [k for k, v in one.items() if k in start and not torch.equal(v, start[k])]
    assert len(moved) > 20 or name == "bow"
    for key, expected in one.items():
        if not expected.is_floating_point():
            assert torch.equal(two[key], expected), key
        elif "key.bias" not in key:  # its gradient is rounding noise, which Adam blows up
            assert relative(two[key], expected) < 1e-4, key


@dataclass
class Rows:
    """What `Split` holds, without its folder."""

    features: csr_matrix
    labels: csr_matrix
    filter_pairs: np.ndarray
    name: str = "test"

    def __len__(self) -> int:
        return int(self.labels.shape[0])


class Bags:
    """`Inputs` of a split of bags."""

    def batches(self, split: Any, batch_size: int, **options: Any) -> BagBatches:
        return BagBatches(split.features, split.labels, batch_size, **options)


def evaluated(folder: str) -> None:
    """Everything that an evaluation gives, of both models, in batches of which there are fewer than
    processes or more.
    """
    features, labels = bags(30)
    split: Any = Rows(features, labels, np.array([[3, 1], [3, 2], [29, 0]]))
    wide = csr_matrix(
        sparse_random(30, cascade_common.LABELS, 0.1, "csr", rng=np.random.default_rng(6))
    )
    for name in ("end_to_end", "cascade"):
        model: Model = bow_model() if name == "end_to_end" else bow_cascade()
        if name == "cascade":
            split.labels = wide
        for size in (7, 64):
            found = evaluate_split(model, split, 5, batch_size=size, inputs=Bags())
            values, rows = predict_split(model, split, 5, batch_size=size, inputs=Bags())
            vectors = embed_split(model, split, batch_size=size, inputs=Bags())
            assert np.array_equal(values, found.values) and np.array_equal(rows, found.labels)
            numbers = [found.loss, *(value for level in found.levels for value in level.values())]
            assert len(found.levels) == (2 if name == "cascade" else 0)
            head = FullHead(split.labels.shape[1], 12, seed=2)
            pairs = (pair[0] for pair in evaluation_batches(model, split, size, Bags()))
            head.start_at_centroids(
                ((model.embed(batch), batch.pos_row, batch.pos_sample) for batch in pairs), 0.5
            )
            file = Path(folder, f"{name}-{size}-{dist.rank()}.npz")
            numbers = np.array(numbers, np.float64)
            np.savez(
                file,
                values=values,
                rows=rows,
                vectors=vectors,
                numbers=numbers,
                centroids=head.rows(0, 23).numpy(),
            )


def bow_cascade() -> Any:
    from xmlkernels.models.cascade import Cascade
    from xmlkernels.nn.cascade_heads import CascadeHeads

    most = [TREE.widest(r) for r in range(2)]
    heads = CascadeHeads(TREE.sizes, most, 12, layers=((0,),) * 3, topk=(3, 3), seed=4)
    return Cascade(BowEncoder(WORDS, 12, seed=3), heads, TREE).eval()


def test_an_evaluation_by_two_processes_is_that_of_one_to_the_bit(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    evaluated(str(alone))
    together(2, evaluated, tmp_path, str(tmp_path))
    for file in alone.glob("*.npz"):
        one = np.load(file)
        for rank in range(2):
            two = np.load(tmp_path / f"{file.stem[:-1]}{rank}.npz")
            # sums, in another order.
            np.testing.assert_allclose(two["centroids"], one["centroids"], atol=1e-5)
            for key in set(one.files) - {"centroids"}:
                assert np.array_equal(one[key], two[key]), (file.stem, key)
    assert len(list(alone.glob("*.npz"))) == 4
