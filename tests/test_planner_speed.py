"""Seconds and bytes of a plan: floors by hand, figures as they are committed, published sizes."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import xmlkernels
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.training import CascadeTraining
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.shard import Shard, shard_rows
from xmlkernels.planner import CARDS, planned
from xmlkernels.planner.speed import (
    FIGURES,
    encoder_work,
    full_table_work,
    level_work,
    timed,
    words_work,
)
from xmlkernels.training import planning
from xmlkernels.training.build import cascade_heads
from xmlkernels.training.facts import BalancedTree
from xmlkernels.training.planned_sizes import PlanConfig
from xmlkernels.training.planning import Forecast, forecast_of, traffic_of
from xmlkernels.tree.label_tree import LabelTree

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "process_so_far", dict)


def table(labels: int, width: int, dtype: str = "bf16", **options: Any) -> FullHead:
    return planned(lambda: FullHead(labels, width, dtype=dtype, **options))


def forecast(recipe: str, *, run: dict[str, Any], **changes: Any) -> Forecast:
    known = xmlkernels.RECIPES[recipe]
    options = PlanConfig(run=replace(known.config, **run), **changes)
    return forecast_of(options, replace(known, config=options))


def test_figures_are_those_of_the_committed_rows() -> None:
    with (ROOT / "benchmarks" / "modelled.csv").open() as file:
        rows = {
            (r["op"], r["dtype"], r["card"].lower(), r["ms"], r["floor"])
            for r in csv.DictReader(file)
        }
    own = [f for f in FIGURES if f.how == "modelled"]
    found = {(f.op, f.dtype, f.device, f"{f.ms:.3f}", f"{f.floor:.3f}") for f in own}
    assert found == rows and len(own) == len(rows)
    with (ROOT / "benchmarks" / "results" / "amd-epyc-2c-avx512bf16.csv").open() as file:
        measured = list(csv.DictReader(file))
    for figure in (f for f in FIGURES if f.how == "measured"):
        commit = figure.source.split(", ")[1]
        same = [r for r in measured if r["commit"] == commit and r["ms_p50"] == f"{figure.ms:.4f}"]
        assert len(same) == 1, figure
        (row,) = same
        assert figure.op in (row["op"], row["phase"]) and row["device"] == "cpu" == figure.device
        if figure.op == "encoder":
            continue
        assert row["dtype"] == figure.dtype
        wide = "fp32" if figure.dtype == "fp16" else figure.dtype
        (rate,) = {
            r["tflops"]
            for r in measured
            if r["commit"] == commit and (r["op"], r["phase"]) == (row["op"], "ceiling")
            and r["dtype"] == wide and r["shape"] == row["shape"]
        }  # fmt: skip
        B, L, D = (int(row[letter]) for letter in "BLD")
        products = (6 if figure.op == "bce_step" else 2) * B * L * D
        assert figure.floor == pytest.approx(products / float(rate) / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "width", "batch", "dtype", "ms"),
    [
        # Bytes of rows read and written at 3.0 TB/s; or 6 operations at 790 TFLOP/s.
        (2_812_281, 768, 128, "bf16", 2.880),
        (8_600_000, 768, 128, "bf16", 8.81),
        (100_000_000, 64, 128, "bf16", 8.53),
        (1_305_265, 768, 512, "bf16", 3.898),
        (8_600_000, 768, 128, "fp8", 6.42),
    ],
)
def test_floors_of_a_full_table(labels: int, width: int, batch: int, dtype: str, ms: float) -> None:
    part = timed(full_table_work(table(labels, width, dtype), batch), CARDS["h100"])
    assert part.floor * 1e3 == pytest.approx(ms, rel=0.005)
    assert "modelled" in part.how and part.seconds > part.floor


def test_states_are_read_and_written_too() -> None:
    plain = full_table_work(table(1000, 64), 8)
    momentum = full_table_work(
        table(1000, 64, optimizer=xmlkernels.RowOptimizer("sgd", momentum=0.9)), 8
    )
    assert plain.bytes == 2 * 2 * 64_000 and momentum.bytes == 2 * (2 + 4) * 64_000
    assert plain.operations == momentum.operations == 6 * 8 * 64_000


def test_a_level_touches_its_candidates_once() -> None:
    # 64 documents of 4,400 candidates among 670,091 rows touch 0.23 million of them.
    level = table(670_091, 768, optimizer=xmlkernels.RowOptimizer("adam", state_dtype="bf16"))
    work = level_work(level, 64, 4400, what="labels")
    row, touched = 768 * 2 * 3, 670_091 * (1 - 2.718281828 ** (-64 * 4400 / 670_091))
    assert touched == pytest.approx(0.23e6, rel=0.01)
    assert work.bytes == pytest.approx(2 * touched * row + 4 * 64 * (4400 + 2 * 768), rel=1e-6)
    half = table(670_091, 768, shard=Shard(0, 335_046, 670_091))  # has half of the candidates
    own = level_work(half, 64, 4400, what="labels")
    assert own.operations == pytest.approx(work.operations / 2, rel=1e-4)


def test_an_encoder_multiplies_each_weight_once_per_token() -> None:
    encoder = Encoder.tiny(50)
    weights = sum(p.numel() for name, p in encoder.named_parameters() if "embeddings" not in name)
    work = encoder_work(encoder, 4, 10.0)
    assert work.operations == 3 * 40 * (2 * weights + 4 * 2 * 32 * 10)
    assert encoder_work(encoder, 4, 10.0, training=False).operations == work.operations / 3
    bag = BowEncoder(1000, 8, optimizer="adam")
    assert words_work(bag.table, 4, 25.0).operations == 4 * 100 * 8


def test_what_nobody_measured_is_said() -> None:
    part = timed(replace(full_table_work(table(9, 8), 4), op="another"), CARDS["l4"])
    assert part.seconds == part.floor and "no figure is known" in part.how


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("encoder", [Encoder.tiny(50), BowEncoder(60, 32, optimizer="adam")])
def test_bytes_on_the_wire_are_those_that_the_model_tells(
    processes: int, encoder: nn.Module
) -> None:
    shard = shard_rows(1000, processes, 0)
    head = FullHead(1000, 32, shard=shard)
    settings = {"update": 50, "sharded": True, "encoder_sharded": False}
    model, plan = EndToEnd(encoder, head), type("Plan", (), settings)()
    terms = -(-50 // processes) * 6
    told = model.traffic(50, processes, terms=terms)
    found = traffic_of(plan, encoder, {"labels": head}, processes, terms=6.0)
    for kind in ("gathered", "scattered", "summed"):
        own = sum(count for name, count in found.items() if name.startswith(kind))
        assert own == told[kind], kind
    largest = -(-50 // processes)
    assert found["gathered, labels"] == 4 * (processes - 1) * largest * 32
    plan.sharded = False
    assert "scattered, labels" not in traffic_of(plan, encoder, {"l": head}, processes, terms=6.0)
    assert traffic_of(plan, encoder, {"l": head}, 1, terms=6.0) == {}


@pytest.mark.parametrize("encoder", ["bow", "tiny"])
def test_bytes_on_the_wire_of_a_cascade_are_those_that_the_model_tells(encoder: str) -> None:
    processes, batch = 3, 50
    run: dict[str, Any] = {"device": "a100", "documents": 500, "encoder": encoder, "batch": batch}
    run |= {"tree_depths": (2, 4), "topk": (3, 5), "positives_bound": 4, "label_text": False}
    run |= {"layers": ("1", "2", "2"), "micro_batch": 0} if encoder == "tiny" else {"layers": ()}
    sizes: dict[str, Any] = {"longest": 8, "vocabulary": 60, "words": 6.0, "gpus": processes}
    found = forecast("cascade", run=run, labels=304, **sizes)
    plan, tree = found.plan, LabelTree.from_partitions([np.arange(304) // 76, np.arange(304) // 19])
    built = planning.planned_encoder(plan, 60)
    shape = BalancedTree((4, 16, 304))
    heads = planned(cascade_heads(plan, built, shape, processes=processes))
    assert heads.most == tuple(tree.widest(r) for r in range(2)), "the same tree"
    training = CascadeTraining(encoder_lr=0.1, total=9, positives_bound=4)
    model = Cascade(built, heads, tree, training)
    terms = -(-batch // processes) * 6
    told = model.traffic(batch, processes, terms=terms)
    for kind in ("gathered", "scattered", "summed"):
        own = sum(count for name, count in found.wire.items() if name.startswith(kind))
        assert own == told[kind], (kind, found.wire)
    assert found.wire["gathered, shortlists"] == 8 * 2 * 50 * (4 + 9)


def test_a_plan_tells_bytes_on_the_wire() -> None:
    run = {"device": "a100", "documents": 5000, "batch": 1024, "label_text": False}
    found = forecast("minilm", run=run, labels=1000, longest=32, gpus=4)
    assert found.wire["gathered, label table"] == 4 * 3 * 256 * 384
    assert found.wire["scattered, label table"] == 4 * 3 * 256 * 384
    wire = found.step[-1]
    assert wire.what == "wire" and wire.floor == sum(found.wire.values()) / 300e9
    assert not forecast("minilm", run=run, labels=1000, longest=32).wire
    levels = {"device": "h200", "documents": 500, "topk": (32, 64)}
    cascade = forecast("cascade", run=levels, labels=5000, longest=32, gpus=2)
    own = [name for name in cascade.wire if name.startswith("gathered")]
    assert own == [
        f"gathered, {n}"
        for n in ("clusters of level 0", "clusters of level 1", "label table", "shortlists")
    ]


def test_a_hundred_million_labels_of_64() -> None:
    """Renee, MLSys 2023, section 3.2: a bottleneck of 64, and no state of Adam's."""
    sizes = {"labels": 100_000_000, "dim": 64, "vocabulary": 1000}
    run = {
        "device": "h200", "documents": 10**6, "bias": False, "frequency_bias": False,
        "centroid_norm": 0.0, "table_optimizer": "sgd", "momentum": 0.0, "batch": 1024,
        "label_text": False,
    }  # fmt: skip
    for dtype, weights, momentum in (("bf16", 11.92, 23.84), ("fp8", 5.96 + 0.745, None)):
        found = forecast("bow", run=run | {"table": dtype}, **sizes)
        held = found.memory.device[1].held
        assert held["label table"] / GIB == pytest.approx(weights, abs=0.01)
        assert held["states of label table"] == 0
        if momentum is not None:
            own = run | {"table": dtype, "momentum": 0.9, "state": "bf16"}
            parts = forecast("bow", run=own, **sizes).memory.device[1].held
            both = parts["label table"] + parts["states of label table"]
            assert both / GIB == pytest.approx(momentum, abs=0.01)
    # What the host keeps of each label, and the last report's counts.
    host = forecast("bow", run=run | {"table": "bf16"}, test=1000, **sizes).memory.host
    assert host is not None and host.held["propensities"] == 16 * 10**8


def test_amazon_3m_beside_the_published_peak() -> None:
    """ELMO (ICML 2025) trains BERT-base with a bf16 table and SGD without momentum: 10.39 GiB.

    128 documents of 128 tokens; what CUDA itself takes is not in that figure.
    """
    run = {
        "device": "h200", "encoder": "bert-base-uncased", "batch": 128, "momentum": 0.0,
        "table": "bf16", "compile": False, "bias": False,
    }  # fmt: skip
    found = forecast("amazon-3m", run=run, longest=128)
    budget = found.memory.device[1]
    assert found.subject.facts.labels == 2_812_281
    assert budget.held["label table"] / GIB == pytest.approx(4.02, abs=0.01)
    assert budget.held["encoder"] == pytest.approx(4 * 109.5e6, rel=0.01)
    peak = (budget.peak - budget.held["CUDA (estimate)"]) / GIB
    assert peak == pytest.approx(10.39, rel=0.1)
    table_part = next(part for part in found.step if part.what == "label table")
    assert table_part.floor * 1e3 == pytest.approx(2.1, abs=0.1)  # 4.3 TB/s, 790 TFLOP/s
