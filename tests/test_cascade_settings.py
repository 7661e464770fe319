"""What a cascade refuses, in one sentence each, what it tells, and what moves with it."""

import pytest
from cascade_common import make_batch, make_model, make_tree

from xmlkernels import InputError
from xmlkernels.nn.encoder import Encoder


def test_a_batch_without_levels_is_refused() -> None:
    model = make_model(3)
    batch = make_batch(model.tree, 3)
    with pytest.raises(InputError, match="batch: expected positives of 2 cluster levels, got those of 1; make the batches"):
        model.step(type(batch)(batch.inputs, batch.pos_row, batch.pos_sample, batch.levels[:1]))


def test_options_that_do_not_fit_are_refused() -> None:
    for options, message in (
        ({"topk": [3]}, "topk: expected 2 numbers, one for each cluster level, got 1"),
        ({"topk": [3, 0]}, "topk: expected numbers of 1 or more, got 0"),
        ({"drops": [0.1]}, "dropout of the heads: expected one number, or 3"),
        ({"drops": 1.0}, "dropout of the heads: expected probabilities"),
        ({"layers": [(1,), (2,)]}, "layers of the levels: expected 3 entries, one for each level, got 2"),
        ({"layers": [(1,), (2,), (7,)]}, "expected layers from 0 to 4, those of this encoder, got layer 7; take a deeper"),
        ({"scheme": "sum"}, "scheme: expected one of level, weighted, path, got 'sum'"),
        ({"dtype": "fp4"}, "cascade table: dtype: expected one of .*fp4"),
        ({"optimizer": "lamb"}, "cascade table: optimizer"),
        ({"rw_loss": [1.0]}, "rw_loss: expected 3 weights"),
        ({"schedule": "flat"}, "schedule: expected one of three_phase, warmup_cosine"),
        ({"positives_bound": -1}, "positives_bound: expected 0 or more"),
        ({"warmup": 101}, "schedule: expected .*warmup ≤ total"),
    ):
        with pytest.raises(InputError, match=message):
            make_model(3, **options)


def test_heads_of_another_tree_or_width_are_refused() -> None:
    model = make_model(3)
    with pytest.raises(InputError, match="cascade: expected heads of .* nodes, the sizes of the label tree"):
        type(model)(model.encoder, model.heads, make_tree(3, labels=40))
    wide = Encoder.tiny(60, layers=4, width=32)
    with pytest.raises(InputError, match="cascade: expected heads of width 32, the encoder's, got 16"):
        type(model)(wide, model.heads, model.tree)
    narrow = Encoder.tiny(60, layers=4, width=16, bottleneck=16)
    with pytest.raises(InputError, match="encoder of a cascade: expected no bottleneck"):
        type(model)(narrow, model.heads, model.tree)


def test_a_topk_beyond_the_clusters_is_clamped_and_told_once() -> None:
    tree = make_tree(3)
    with pytest.warns(
        UserWarning, match="topk of level 0 is 99, but a sample has at most 4 candidates there; 4 are kept"
    ) as told:
        model = make_model(3, topk=[99, 2], tree=tree)
        model.step(make_batch(tree, 3))
        model.step(make_batch(tree, 3))
    assert len(told) == 1 and model.heads.topk == (4, 2)


def test_moving_a_model_moves_everything_that_a_step_reads() -> None:
    model = make_model(3, ema=0.9).to("meta")
    moved = [*model.buffers(), *model.parameters(), *model.scaler.tensors().values(), *model.average.means]
    assert {t.device.type for t in moved} == {"meta"}
