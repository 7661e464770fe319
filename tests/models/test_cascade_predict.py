"""Prediction by a cascade: against a brute-force model in float64, and its edges."""

import math

import numpy as np
import pytest
import torch
from cascade_common import LABELS, Twin, best, best_of_levels, make_batch, make_model

from xmlkernels.models.descent import logit_of_log
from xmlkernels.models.saved import saved_tree
from xmlkernels.nn.cascade_heads import CascadeHeads


def trained(levels: int, **options: object) -> object:
    """A model whose tables and biases have left their first values."""
    model = make_model(levels, head_lr=0.05, **options)
    for number in range(4):
        model.step(make_batch(model.tree, 8, seed=number))
    return model


def brute_force(model: object, batch: object) -> list[list[dict[int, float]]]:
    """For each level and document the logit of every candidate's probability under the scheme, in
    float64.
    """
    twin, scheme = Twin(model), model.heads.scheme
    with torch.no_grad():
        x = [f.double() for f in model._features(*batch.inputs)]
        z = [f @ w.T + b for f, w, b in zip(x, twin.tables, twin.biases, strict=True)]
    twin.settings = type(twin.settings)(encoder_lr=0, total=1, positives_bound=0)
    nothing = [(torch.zeros(0, dtype=torch.int64),) * 2] * len(z)
    lists, out = twin.shortlists(nothing, z), []
    for r, nodes in enumerate(lists):
        out.append([])
        for s, there in enumerate(nodes):
            found = {}
            for node in there:
                path = [node]
                for above in reversed(range(r)):
                    path.append(
                        int(np.searchsorted(model.tree.children[above], path[-1], "right")) - 1
                    )
                own = [float(z[r - i][s, n]) for i, n in enumerate(path)]
                used = {"level": own[:1], "weighted": own[:2], "path": own}[scheme]
                p = math.prod(1 / (1 + math.exp(-v)) for v in used)
                found[node] = math.log(p) - math.log1p(-p)
            out[-1].append(found)
    return out


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@pytest.mark.parametrize("scheme", ["level", "weighted", "path"])
def test_every_level_equals_brute_force(levels: int, scheme: str) -> None:
    model = trained(levels, scheme=scheme)
    batch = make_batch(model.tree, 6, seed=9)
    expected, k = brute_force(model, batch), 7
    for r, (level, found) in enumerate(zip(best_of_levels(model, batch, k), expected, strict=True)):
        label = r + 1 == levels
        for s, scores in enumerate(found):
            first = sorted(scores, key=lambda n, scores=scores: (-scores[n], n))[:k]
            nodes = [int(model.tree.order[n]) for n in first] if label else first
            assert level.nodes[s].tolist() == nodes + [-1] * (k - len(nodes))
            torch.testing.assert_close(
                level.values[s, : len(first)],
                torch.tensor([scores[n] for n in first]),
                rtol=1e-4,
                atol=1e-5,
            )
            assert level.values[s, len(first) :].eq(-torch.inf).all()
        if not label:
            handed = [
                sorted({int(np.searchsorted(model.tree.children[r], n, "right")) - 1 for n in f})
                for f in expected[r + 1]
            ]
            assert [[c for c in row if c >= 0] for row in level.kept.tolist()] == handed
        else:
            assert level.kept.shape == (6, 0)
    values, labels = best(model, batch, k)
    assert torch.equal(values, level.values) and torch.equal(labels, level.nodes)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_low_precision_tables_predict_what_their_rows_say(dtype: str) -> None:
    """bf16 products may round x; decoded fp8 rows are scored in fp32."""
    model = trained(3, dtype=dtype, cluster_dtype="fp32", scheme="level", topk=[4, 19])
    batch = make_batch(model.tree, 5, seed=9)
    values, labels = best(model, batch, LABELS)
    level = model.heads.levels[2]
    x = model._features(*batch.inputs)[2].detach().double()
    exact = x @ level.rows(0, LABELS).double().T + level.bias.double()
    got = torch.zeros(5, LABELS, dtype=torch.float64).scatter_(
        1, model.place[labels], values.double()
    )
    # Every cluster kept: every label is a candidate.
    assert sorted(labels[0].tolist()) == list(range(LABELS))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-5 if dtype == "fp8" else 0.02)


def test_excluded_labels_are_never_given() -> None:
    model = trained(3)
    batch = make_batch(model.tree, 4)
    values, labels = best(model, batch, 50)
    exclude = torch.stack([labels[:, 0], torch.full((4,), -1), labels[:, 2]], 1)
    kept, names = best(model, batch, 48, exclude)
    assert torch.equal(names, torch.cat([labels[:, 1:2], labels[:, 3:]], 1))
    assert torch.equal(kept, torch.cat([values[:, 1:2], values[:, 3:]], 1))
    outside = torch.tensor(
        [next(n for n in range(LABELS) if n not in row) for row in labels.tolist()]
    )[:, None]
    assert all(
        torch.equal(a, b)
        for a, b in zip(best(model, batch, 50, outside), (values, labels), strict=True)
    )


def test_places_beyond_the_shortlist_are_empty() -> None:
    model = trained(3, topk=[1, 1])
    values, labels = best(model, make_batch(model.tree, 4), 40)
    there = labels >= 0
    assert there[:, 0].all() and not there[:, -1].any()
    assert torch.equal(values == -torch.inf, ~there)
    assert (values[:, 1:] <= values[:, :-1]).all()


def test_levels_under_every_scheme_for_one_pass() -> None:
    model = trained(3, topk=[2, 3])
    batch = make_batch(model.tree, 64)
    exclude = torch.tensor([[0, -1], [1, 2], [3, -1], [-1, -1]]).repeat(16, 1)
    whole = model.score(batch, 6, exclude=exclude, loss=True, schemes=model.schemes)
    found = {scheme: answer.levels for scheme, answer in whole.by_scheme.items()}
    assert set(found) == {"level", "weighted", "path"}
    assert torch.equal(whole.loss, model.loss(batch)) and whole.embedding is None
    assert torch.equal(whole.labels, best(model, batch, 6, exclude)[1])
    for scheme, levels in found.items():
        model.use_scheme(scheme)
        assert model.scheme == scheme
        assert torch.equal(whole.by_scheme[scheme].labels, levels[-1].nodes)
        assert torch.equal(levels[-1].nodes, best(model, batch, 6, exclude)[1])
        for said, alone in zip(levels, best_of_levels(model, batch, 6, exclude), strict=True):
            assert torch.equal(said.values, alone.values) and torch.equal(said.nodes, alone.nodes)
    assert not torch.equal(found["level"][-1].nodes, found["path"][-1].nodes)


def test_predictions_and_embeddings_for_one_pass() -> None:
    model = trained(3, topk=[2, 3])
    batch = make_batch(model.tree, 5)
    passes: list[int] = []
    model.encoder.model.register_forward_hook(lambda *_: passes.append(1))
    found = model.score(batch, 6, embedding=True, loss=True)
    assert len(passes) == 1
    own = found.values, found.labels
    assert all(torch.equal(a, b) for a, b in zip(own, best(model, batch, 6), strict=True))
    x = found.embedding
    assert torch.equal(x, model.embed(batch)) and x.shape == (5, model.width)


def test_equal_scores_stand_in_table_order() -> None:
    model = make_model(3, fill=False, topk=[2, 2])
    assert [level.kept.tolist() for level in best_of_levels(model, make_batch(model.tree, 1), 3)][
        :2
    ] == [[[0, 1]], [[0, 1]]]
    _, labels = best(model, make_batch(model.tree, 1), 3)
    assert labels.tolist() == [model.tree.order[:3].tolist()]


def test_prediction_trains_nothing_and_its_loss_is_the_steps() -> None:
    for options in ({}, {"rw_loss": [2, 1, 0.5], "topk": [1, 1], "positives_bound": 3}):
        model = make_model(3, **options)
        batch = make_batch(model.tree, 6)
        before = {k: v.clone() for k, v in model.tensors().items()}
        found = model.score(batch, 5, loss=True)
        values, labels, loss = found.values, found.labels, found.loss
        assert all(torch.equal(v, before[k]) for k, v in model.tensors().items())
        assert all(
            torch.equal(a, b) for a, b in zip(best(model, batch, 5), (values, labels), strict=True)
        )
        torch.testing.assert_close(loss, model.loss(batch))
        torch.testing.assert_close(loss, model.step(batch, need_loss=True), rtol=1e-5, atol=0)


def test_logits_keep_their_digits_at_both_ends() -> None:
    z = torch.tensor([-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0])
    torch.testing.assert_close(
        logit_of_log(torch.nn.functional.logsigmoid(z)), z, rtol=3e-6, atol=1e-6
    )
    assert logit_of_log(torch.tensor([-torch.inf])).tolist() == [-torch.inf]
    assert logit_of_log(torch.tensor([0.0])).isfinite().all()


def test_a_checkpoint_rebuilds_the_model_for_prediction() -> None:
    model = trained(3, drops=[0.1, 0.2, 0.3], dtype="bf16").eval()
    config, tensors = model.config(), {k: v.clone() for k, v in model.tensors().items()}
    heads = CascadeHeads(**config["head"], fill=False)
    again = type(model)(
        type(model.encoder).from_config(config["encoder"]), heads, saved_tree(config, tensors)
    ).eval()
    again.load_tensors(tensors)
    batch = make_batch(model.tree, 5)
    for a, b in zip(best(model, batch, 9), best(again, batch, 9), strict=True):
        assert torch.equal(a, b)
    assert again.tree.settings == {"dataset": "test"}
    assert again.steps == 4
    assert config["kind"] == "cascade"
