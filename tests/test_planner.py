"""The memory planned before a run is what its tensors then take."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cascade_common import make_batch, make_model, make_tree

from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.shard import Shard
from xmlkernels.nn.table import STATES, RowOptimizer
from xmlkernels.optim import encoder_optimizer
from xmlkernels.planner import (
    Budget,
    activation_bytes,
    encoder_parts,
    plan,
    planned,
    shortlist_bytes,
    summed,
    table_parts,
    told,
)
from xmlkernels.planner.parts import first_values_bytes, workspace_bytes


def size(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize(
    "optimizer",
    [
        RowOptimizer("sgd", momentum=0.9),
        RowOptimizer("sgd"),
        RowOptimizer("adam", state_dtype="bf16"),
        RowOptimizer("sgd", momentum=0.9, state_dtype="fp16", kahan=True),
    ],
    ids=str,
)
def test_a_full_table_takes_what_was_planned(dtype: str, optimizer: RowOptimizer) -> None:
    if dtype == "fp8":
        optimizer = replace(optimizer, kahan=False)
    make = partial(FullHead, 70, 12, dtype=dtype, bias=True, optimizer=optimizer)
    head, parts = make(), table_parts({"labels": planned(make)}, 1)
    states = size(head.momentum, head.second, head.kahan)
    assert parts["states of labels"] == states
    assert parts["labels"] == size(*head.buffers()) - states
    assert parts["labels"] >= size(head.weight, head.bias, head.row_scale)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw_dense"])
def test_the_tables_of_a_cascade_take_what_was_planned(dtype: str, optimizer: str) -> None:
    if (dtype, optimizer) == ("fp8", "adamw_dense"):
        dtype = "fp16"
    rows = RowOptimizer(optimizer, momentum=0.9, state_dtype="bf16", row_wise=True)
    options = {"layers": ((1,), (2,)), "topk": (2,), "dtype": dtype, "optimizer": rows}
    make = partial(CascadeHeads, (5, 40), (9,), 16, **options)
    heads, parts = make().tables(), table_parts(planned(make).tables(), 1)
    assert list(heads) == ["clusters of level 0", "label table"]
    for name, level in heads.items():
        states = [getattr(level, state) for state in STATES]
        assert parts[f"states of {name}"] == size(*states) > 0
        assert parts[name] + parts[f"states of {name}"] == size(*level.buffers())


def test_planning_takes_no_memory_and_warns_no_one(recwarn: pytest.WarningsRecorder) -> None:
    rows = 1 << 40  # of a PiB
    head = planned(lambda: FullHead(rows, 1024, dtype="fp8", optimizer="adam"))
    assert table_parts({"labels": head}, 1)["states of labels"] == 2 * 4 * 1024 * rows
    planned(lambda: CascadeHeads((5, 40), (9,), 16, layers=((1,), (2,)), topk=(99,)))
    assert not recwarn.list


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_running_means_take_what_was_told(dtype: str) -> None:
    model = make_model(
        2,
        tree=make_tree(2),
        mean=MeanSettings(0.5, tables=True),
        dtype=dtype,
        layers=((1,), (2,)),
        topk=[2],
    )
    tables = {str(r): level for r, level in enumerate(model.heads.levels)}
    sizes: dict[str, Any] = {"documents": 1, "tokens": 1}
    parts = plan(model.encoder, tables, **sizes, mean=True, table_means=True)
    model.step(make_batch(model.tree, 3))
    assert model.average is not None
    with model.average.used():
        rounded = [
            w
            for m, w in zip(model.average.means, model.average._rounded, strict=True)
            if m is not w
        ]
        told = parts["its running mean"] + sum(parts[f"mean of {r}"] for r in range(2))
        assert told == size(*model.average.means, *rounded) and bool(rounded) == (dtype == "bf16")
    assert plan(model.encoder, tables, **sizes)["mean of 0"] == 0


def test_an_encoder_takes_what_was_told() -> None:
    encoder = Encoder.tiny(50)
    encoder.model.embeddings.requires_grad_(False)  # type: ignore[union-attr, operator]
    optimizer = encoder_optimizer(encoder, 1e-3, 0.0)
    ids = torch.ones(2, 3, dtype=torch.int64)
    encoder(ids, ids).sum().backward()
    optimizer.step()
    parts = encoder_parts(encoder)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert parts["encoder"] == size(*encoder.parameters(), *encoder.buffers())
    assert parts["its gradients"] == size(*trained) < size(*encoder.parameters())
    states = [v for p in trained for k, v in optimizer.state.get(p, {}).items() if k != "step"]
    assert parts["its optimizer"] == size(*states)


def test_a_bag_of_words_counts_its_table_and_its_states() -> None:
    encoder = BowEncoder(100, 8, optimizer="adam")
    assert encoder_parts(encoder)["encoder"] >= size(
        encoder.table.weight, encoder.table.momentum, encoder.table.second, encoder.bias
    )
    assert activation_bytes(encoder, 16, 0) == 16 * 8 * 4


def test_activations_grow_with_every_size() -> None:
    small, deep, wide = Encoder.tiny(50), Encoder.tiny(50, layers=4), Encoder.tiny(50, width=64)
    assert activation_bytes(small, 8, 10) == 34 * 2 * 32 * 2 * 8 * 10
    assert (
        activation_bytes(deep, 8, 10)
        == activation_bytes(wide, 8, 10)
        == 2 * activation_bytes(small, 8, 10)
    )
    half = Encoder.tiny(50, autocast=torch.bfloat16)
    assert activation_bytes(half, 8, 20) == activation_bytes(small, 8, 10)


def test_the_line_names_every_part_and_the_total() -> None:
    tables = {
        "clusters": planned(lambda: FullHead(1 << 10, 64, dtype="bf16", optimizer="adam")),
        "label table": planned(lambda: FullHead(1 << 20, 64, dtype="fp8")),
    }
    parts = plan(Encoder.tiny(50), tables, documents=4, tokens=8, candidates=(1024, 640))
    assert parts["shortlists"] == shortlist_bytes(4, (1024, 640)) == 4 * 1664 * 12
    phases = {"a step": {"shortlists": parts.pop("shortlists")}, "a look": {"lists": 12}}
    budget = Budget(parts, phases)
    line = told(budget)
    steering = 7 * 4 + 2 * 8 + 8  # hyper, counter and rescaled
    assert parts["label table"] == (1 << 20) * (64 + 8) + steering
    assert parts["states of label table"] == 0
    assert "label table 72.0 MiB" in line and "label table 72.0 MiB, states" not in line
    assert "the rest" in line and "shortlists" not in line
    total = re.match(r"memory of this run: about ([\d.]+) MiB, at most during a step = ", line)
    assert total is not None
    assert float(total.group(1)) == pytest.approx(budget.peak / 2**20, abs=0.06)
    assert told(Budget({"a table": 5 << 20}), "cuda:1") == (
        "memory of this run on cuda:1: about 5.0 MiB = a table 5.0 MiB"
    )


def test_a_budget_peaks_in_the_phase_that_takes_most() -> None:
    one = Budget({"table": 100}, {"a step": {"sums": 7, "lists": 1}, "a look": {"lists": 5}})
    two = Budget({"data": 10}, {"a look": {"lists": 4, "metrics": 2}})
    assert (one.phase, one.peak) == ("a step", 108)
    both = summed([one, two])
    assert both.held == {"table": 100, "data": 10}
    assert (both.phase, both.peak) == ("a look", 121)
    assert both.parts() == {"table": 100, "data": 10, "lists": 9, "metrics": 2}
    assert Budget({"table": 3}).peak == 3 and Budget({}).phase == ""


def test_first_values_from_centroids_hold_a_table_of_sums() -> None:
    head = planned(lambda: FullHead(100, 16, dtype="bf16"))
    assert first_values_bytes(head, centroids=False) == 3 * 4 * 100 * 16
    assert first_values_bytes(head, centroids=True) == 4 * 100 * 17 + 3 * 4 * 100 * 16
    large = planned(lambda: FullHead(1 << 20, 64))
    assert first_values_bytes(large, centroids=False) == 3 * 4 * (1 << 22)


def test_what_an_op_works_in() -> None:
    small, large = planned(lambda: FullHead(1000, 16)), planned(lambda: FullHead(1 << 20, 64))
    partial = 4 * 8 * 16
    assert workspace_bytes(small, 8, cuda=False) == 4 * partial + 4 * partial
    assert workspace_bytes(large, 64, cuda=False) == (64 + 4) * 4 * 64 * 64
    assert workspace_bytes(large, 4096, cuda=False) == (32 + 4) * 4 * 4096 * 64
    assert workspace_bytes(large, 512, cuda=True) == 256_000_000
    assert workspace_bytes(small, 8, cuda=True) == 2 * 1000 * 8 * 4 + 22 * partial


def test_a_shard_takes_its_rows_alone() -> None:
    whole = planned(lambda: FullHead(1000, 64, dtype="bf16", bias=True, optimizer="adam"))
    parts = [
        planned(
            lambda a=a, b=b: FullHead(
                1000, 64, dtype="bf16", bias=True, optimizer="adam", shard=Shard(a, b, 1000)
            )
        )
        for a, b in ((0, 334), (334, 667), (667, 1000))
    ]
    steering = 7 * 4 + 2 * 8
    sums = [sum(part.bytes().values()) - steering for part in parts]
    assert sum(sums) == sum(whole.bytes().values()) - steering
    assert sums[0] == 334 * (64 * (2 + 4 + 4) + 4)
