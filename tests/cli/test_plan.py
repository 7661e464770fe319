"""`xmlkernels plan`: sizes, devices, what a run takes, and the nearest change that makes it fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import make_dataset

import xmlkernels
from xmlkernels import InputError
from xmlkernels.cli import main, plan, train
from xmlkernels.planner import CARDS, Card, cards
from xmlkernels.training import planning
from xmlkernels.training.forecast import COPY
from xmlkernels.training.planned_mends import mends_of, nearest
from xmlkernels.training.planned_sizes import PlanConfig
from xmlkernels.training.planning import BASE, DATA, Forecast, forecast_of

GIB = 1 << 30
HERE = {"process so far": 400 << 20}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is what it is; how large it is belongs to another test."""
    monkeypatch.setattr(planning, "process_so_far", lambda: HERE)
    rates = {"fp32": 1e11, "bf16": 2e11, "fp16": 1e11}
    here = Card("cpu", False, 64 * GIB, 2e10, rates, 1e10, "made up")
    monkeypatch.setattr(cards, "this_cpu", lambda: here)


def planned(recipe: str, *, run: dict[str, Any] | None = None, **changes: Any) -> Forecast:
    known = xmlkernels.RECIPES[recipe]
    options = PlanConfig(run=replace(known.config, **(run or {})), **changes)
    return forecast_of(options, replace(known, config=options))


def bow(*, run: dict[str, Any] | None = None, **changes: Any) -> Forecast:
    """A bag of words of fp32 weights and momentum: 8 bytes per weight."""
    start = {
        "device": "h200",
        "documents": 10_000,
        "table": "fp32",
        "table_optimizer": "sgd",
        "bias": False,
        "frequency_bias": False,
        "centroid_norm": 0.0,
    }
    sizes = {"labels": 1_000_000, "dim": 64, "vocabulary": 1000}
    return planned("bow", run=start | (run or {}), **(sizes | changes))


def held(found: Forecast, device: str = "cuda") -> dict[str, int]:
    return dict(found.memory.budgets()[device].held)


def test_sizes_that_are_given() -> None:
    found, steering = bow(), 7 * 4 + 2 * 8
    assert held(found)["label table"] == 4 * 64 * 1_000_000 + steering
    assert held(found)["states of label table"] == 4 * 64 * 1_000_000
    assert held(bow(labels=2_000_000))["label table"] == 4 * 64 * 2_000_000 + steering
    assert held(bow(dim=128))["label table"] == 4 * 128 * 1_000_000 + steering
    assert held(bow(vocabulary=5000))["encoder"] > 4 * held(found)["encoder"]
    assert held(found, "cpu")[BASE] == 400 << 20
    data = held(found, "cpu")[DATA]
    assert data == 10_000 * (5 * 8 + 50 * 8 + 16)
    assert held(bow(positives=6.0), "cpu")[DATA] == data + 10_000 * 8
    assert held(bow(words=60.0), "cpu")[DATA] == data + 10_000 * 10 * 8
    assert held(bow(test=10_000), "cpu")[DATA] == 2 * data
    assert "the last report" in bow(test=10).memory.budgets()["cpu"].phases
    looked = bow(validation=500)
    assert looked.evaluation and not found.evaluation
    assert "the best checkpoint read" in looked.memory.budgets()["cpu"].phases
    tokens = {"run": {"device": "h200", "documents": 1000}, "labels": 100_000}
    short, long = (planned("minilm", longest=n, **tokens) for n in (16, 64))
    step = [f.memory.budgets()["cuda"].phases["a step"] for f in (short, long)]
    kept = [parts["activations (estimate)"] for parts in step]
    assert kept[1] == 4 * kept[0] == 4 * 34 * 384 * 6 * 32 * 16
    narrow = planned("minilm", longest=16, dim=96, **tokens)
    assert held(narrow)["label table"] - steering == (held(short)["label table"] - steering) // 4


def test_sizes_that_are_missing(tmp_path: Path) -> None:
    for changes, flag in (
        ({"run": {"documents": 0}}, "--documents"),
        ({"vocabulary": 0}, "--vocabulary"),
    ):
        with pytest.raises(InputError, match=f"^{flag}: expected"):
            bow(**changes)
    with pytest.raises(InputError, match="^--longest: expected"):
        planned("minilm", run={"device": "h200", "documents": 10}, labels=100)
    nowhere = {"device": "h200", "dataset": str(tmp_path / "none")}
    with pytest.raises(InputError, match="^--labels: expected the sizes .* give --labels"):
        planned("minilm", run=nowhere)
    with pytest.raises(InputError, match="^--dim: expected a bag of words"):
        planned("cascade", run={"device": "h200", "documents": 9}, labels=99, longest=9, dim=8)
    with pytest.raises(InputError, match="^--gpus: expected 1 or more"):
        bow(gpus=0)


def test_sizes_of_a_known_data_set_and_of_a_dataset(tmp_path: Path) -> None:
    found = planned("cascade-amazon-3m", run={"device": "h200"})
    facts = found.subject.facts
    assert (facts.labels, facts.documents, facts.longest) == (2_812_281, 1_717_899, 128)
    assert found.subject.told == "Amazon-3M" and found.plan.steps == 15 * -(-1_717_899 // 64)
    # 2^10, 2^13 and 2^16 clusters, balanced: 43 labels of one at most.
    assert found.subject.tree is not None and found.subject.tree.widest(2) == 43
    folder = make_dataset(tmp_path / "raw", keep_texts=True)
    for recipe, more in (("tiny", {}), ("bow", {"min_df": 1})):
        own = planned(recipe, run={"device": "cpu", "dataset": str(folder), **more})
        facts = own.subject.facts
        assert (facts.labels, facts.documents) == (30, 160)
        assert (facts.validation, facts.test) == (40, 50)
        assert held(own, "cpu")["process so far"] == 400 << 20 and DATA not in held(own, "cpu")
        assert own.subject.words == pytest.approx(6, abs=3)


def test_processes_share_the_table() -> None:
    one, three = bow(), bow(gpus=3)
    steering = 7 * 4 + 2 * 8
    assert held(three)["label table"] == 4 * 64 * 333_440 + steering  # 2,605 times 128 rows
    assert held(three)["states of label table"] == 4 * 64 * 333_440
    assert held(three)["encoder"] == held(one)["encoder"]
    copied = bow(gpus=3, run={"shard_labels": "off"})
    assert held(copied)["label table"] == held(one)["label table"]
    table = [next(part for part in f.step if part.what == "label table") for f in (one, three)]
    assert table[1].floor == pytest.approx(table[0].floor / 3, rel=1e-3)


def test_processes_share_the_encoder() -> None:
    sizes = {"labels": 100_000, "gpus": 4, "longest": 32, "vocabulary": 30_522}
    whole, parts = (
        planned("minilm", run={"device": "h200", "documents": 10_000, "shard_encoder": on}, **sizes)
        for on in ("off", "on")
    )
    for name in ("encoder", "its gradients", "its optimizer"):
        assert held(parts)[name] == pytest.approx(held(whole)[name] / 4, rel=1e-3), name
    (weights,) = (p for p in parts.step if p.what == "wire")
    forward_and_back = 3 * 3 * held(parts)["its gradients"]  # gathered twice, scattered once
    received = sum(count for name, count in parts.wire.items() if name.endswith(", encoder"))
    assert received == pytest.approx(forward_and_back, rel=1e-3) and weights.floor > 0
    assert parts.wire["summed, encoder"] < 10 < whole.wire["summed, encoder"]
    gathered = parts.memory.device[1].phases["a step"]["encoder's parts, gathered"]
    assert 0 < gathered < 4 * held(whole)["encoder"]
    flags = [mend.flags for mend in mends_of(whole)]
    assert "--shard-encoder on" in flags
    assert "--shard-encoder on" not in [mend.flags for mend in mends_of(parts)]


def test_rates_and_a_price() -> None:
    found = bow()
    table = found.step[-1]
    # 16 bytes per weight and step at 4.3 TB/s, 6 operations per document at 51 TFLOP/s in fp32.
    products = 6 * 256 * 64e6 / 51e12
    assert table.what == "label table"
    assert table.floor == pytest.approx(max(16 * 64e6 / 4.3e12, products))
    assert "modelled: 1.89 x floor" in table.how and "of bf16" in table.how
    slow = bow(copy_rate=43.0).step[-1]
    assert slow.floor == pytest.approx(16 * 64e6 / 43e9) and slow.seconds > slow.floor
    fast = bow(mm_rate=1000.0).step[-1]
    assert fast.floor == pytest.approx(16 * 64e6 / 4.3e12)
    assert bow(wire_rate=7.0).subject.card.wire == 7e9
    paid = bow(price=4.0, gpus=2)
    assert paid.money == pytest.approx(8 * paid.hours) and found.money == 0
    updates = 6 * -(-10_000 // 256)
    assert found.hours * 3600 == pytest.approx(updates * sum(p.seconds for p in found.step))


def test_what_does_not_fit_is_mended() -> None:
    assert not bow().lacks() and not bow(memory=1.4).lacks()
    tight = bow(memory=1.3)
    peak, limit = tight.lacks()["cuda"]
    assert peak > limit == 1_300_000_000
    chosen, failed = nearest(tight)
    assert chosen is not None and chosen.flags == "--state bf16" and failed == []
    assert chosen.forecast.memory.device[1].peak == peak - 2 * 64 * 1_000_000
    chosen, failed = nearest(bow(memory=1.2))
    assert chosen is not None and chosen.flags == "--momentum 0" and chosen.costs == "no momentum"
    assert [tried.flags for tried in failed] == ["--state bf16", "--table bf16"]
    assert not chosen.forecast.lacks() and all(tried.forecast.lacks() for tried in failed)
    chosen, _ = nearest(bow(memory=1.04, run={"batch": 1}))
    assert chosen is not None and chosen.flags == "--state bf16 --table-store host"
    nothing = bow(memory=0.1)
    assert nearest(nothing)[0] is None
    assert "cpu" in bow(host_memory=0.2).lacks() and not bow(host_memory=4.0).lacks()
    many = bow(run={"device": "cpu"}, memory=2.0, gpus=4)
    assert many.lacks()["cpu"][0] == 4 * many.memory.device[1].peak  # they share the machine


def test_mends_are_those_that_change_something() -> None:
    def flags(found: Forecast) -> list[str]:
        return [mend.flags for mend in mends_of(found)]

    assert flags(bow())[:4] == ["--state bf16", "--table bf16", "--momentum 0", "--table fp8"]
    stores = ["--table-store host", "--table-store file:FOLDER"]
    assert flags(bow())[4:7] == [*stores, "--gpus 2"]
    done = {"table": "fp8", "momentum": 0.0, "device": "cpu"}
    assert flags(bow(run=done)) == stores[1:]
    assert flags(bow(run=done | {"table_store": "file:a"})) == []
    for unfit in ({"table_compute": "bf16"}, {"impl": "reference"}):
        assert not set(stores) & set(flags(bow(run=unfit)))
    assert not set(stores) & set(flags(bow(run={"shard_labels": "off"}, gpus=2)))
    tokens = {"labels": 1000, "longest": 64}
    cascade = planned("cascade", run={"device": "h200", "documents": 500}, **tokens)
    own = flags(cascade)
    assert own[0] == "--micro-batch 16" and "--label-device cpu" in own and "--table fp8" in own
    apart = {"device": "h200", "documents": 500, "table_store": "host"}
    assert "--label-device cpu" not in flags(planned("cascade", run=apart, **tokens))
    halves = next(m for m in mends_of(cascade) if m.kind == "micro")
    options = halves.applied(cascade.subject.options)
    again = planning.forecast(replace(cascade.subject, options=options), HERE)
    before, after = (
        f.memory.budgets()["cuda"].phases["a step"]["activations (estimate)"]
        for f in (cascade, again)
    )
    assert after == before // 2
    assert [p.what for p in again.step][:2] == ["encoder", "encoder, first pass"]


def test_a_copy_for_checkpoints_is_counted_where_one_is_taken() -> None:
    def copied(found: Forecast) -> dict[str, int]:
        phases = found.memory.budgets()["cpu"].phases
        return {name: parts[COPY] for name, parts in phases.items() if COPY in parts}

    def here(value: str, gb: float = 0.0, **run: Any) -> Forecast:
        run = run | {"device": "cpu", "background_save": value}
        return bow(run=run, memory=gb, test=10)

    assert copied(here("off")) == {} == copied(here("on", table_store="file:a"))
    found = copied(here("auto"))
    assert found.keys() == {"a step", "an evaluation", "the last report"}
    there = sum(held(here("off"), "cpu").values())
    own = ("encoder", "its optimizer", "label table", "states of label table")
    size = sum(held(here("off"), "cpu")[name] for name in own)
    assert set(found.values()) == {size}
    # Room for twice the copy beside all that stays.
    assert copied(here("auto", (there + 2 * size + 10) / 1e9)) == found
    assert not copied(here("auto", (there + 2 * size - 10) / 1e9))
    tight = here("on", (there + size) / 1e9)
    assert set(copied(tight).values()) == {size} and tight.lacks()
    assert mends_of(tight)[0].flags == "--background-save off"
    chosen, _ = nearest(tight)
    assert chosen is not None and chosen.flags == "--background-save off"
    assert set(copied(bow()).values()) == {size}  # of a card's model, on the host
    assert copied(bow(host_memory=1.4)) == {} == copied(bow(run={"background_save": "off"}))


def test_a_stored_table_is_where_it_is_said_to_be() -> None:
    rows = 8 * 64 * 1_000_000
    kept, there = bow(run={"table_store": "host"}), bow(run={"table_store": "file:a"})
    assert held(kept, "cpu")["rows of label table"] == rows
    assert "rows of label table" not in held(there, "cpu")
    for found in (kept, there):
        assert held(found)["tiles of label table"] == 3 * (1 << 17) * 8 * 64
        assert held(found)["label table"] + held(found)["states of label table"] < 100
    on_cpu = bow(run={"table_store": "host", "device": "cpu"})
    assert held(on_cpu, "cpu")["rows of label table"] == rows
    # What a step carries to and fro: at PCIe's rate, a disk's, memory's, or as given.
    for found, rate in ((kept, 25e9), (there, 2e9), (on_cpu, 2e10)):
        carried = next(part for part in found.step if "to and from" in part.what)
        assert carried.floor == carried.seconds == pytest.approx(2 * rows / rate), carried
    given = bow(run={"table_store": "file:a"}, store_rate=4.0, validation=512).evaluation
    (carried,) = (part for part in given if "to and from" in part.what)
    assert carried.floor == pytest.approx(2 * 4 * 64e6 / 4e9)  # two batches, weights alone
    sizes: dict[str, Any] = {"labels": 1000, "longest": 8, "validation": 600, "store_rate": 1.0}
    own = {"device": "h200", "documents": 9, "table_store": "file:a", "evaluate_batch": 300}
    level = planned("cascade", run=own, **sizes).evaluation
    (carried,) = (part for part in level if "to and from" in part.what)
    assert carried.floor == pytest.approx(2 * 2 * 1000 * 384 * 2 / 1e9)  # two batches, all rows
    many = bow(labels=100_000_000, memory=5.0, run={"table": "bf16"})
    chosen, failed = nearest(many)
    assert chosen is not None and chosen.flags == "--table-store host"
    assert [tried.flags for tried in failed] == [
        "--state bf16", "--momentum 0", "--table fp8",
    ]  # fmt: skip
    chosen, _ = nearest(bow(labels=100_000_000, memory=12.0, host_memory=9.0))
    assert chosen is not None and chosen.flags == "--table-store file:FOLDER"


def test_flags_of_the_run_are_planned_with(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bow", "--labels", "100000", "--documents", "500", "--vocabulary", "100", "--device"]
    words += ["h100", "--table", "fp8", "--batch", "50", "--epochs", "3", "--no-label-text"]
    plan.main(words)
    out = capsys.readouterr().out
    assert "bow on 1 x h100, 74.5 GiB each" in out and "table fp8" in out
    assert "50 documents per update, 30 updates" in out and "it fits" in out
    train.main([*words, "--plan", "--price", "2"])
    again = capsys.readouterr().out
    assert "table fp8" in again and "at 2 per device and hour" in again
    plan.main([*words, "--memory", "0.6"])
    out = capsys.readouterr().out
    assert "it does not fit cuda: " in out and "no three changes" in out


def test_devices_by_name() -> None:
    assert set(CARDS) == {"h200", "h100", "a100", "rtx4090", "l4"}
    assert all(card.source and card.cuda for card in CARDS.values())
    with pytest.raises(InputError, match=r"--device: expected a known device \(h200, .*, cpu\)"):
        bow(run={"device": "h999"})
    own = bow(run={"device": "cpu"})
    assert own.memory.host is None and list(own.memory.budgets()) == ["cpu"]
    assert {"label table", BASE} <= held(own, "cpu").keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_of_this_machine_must_be_there() -> None:
    with pytest.raises(InputError, match="--device: expected a card that is known"):
        bow(run={"device": "cuda"})


def test_recipes_without_a_table_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="got 'linear'; plan bow, minilm or cascade"):
        plan.main(["linear"])
    with pytest.raises(SystemExit) as ended:
        main.main(["plan", "tiny", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--gpus N" in out and "--table-optimizer" in out
    assert "label table:" in out and "devices and their rates:" in out
