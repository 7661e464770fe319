"""A label level on a device of its own: the same model, and only what a step needs on its way there
and back.

Two devices are needed to see a move. Where there is no card, torch's fake tensors stand in for
them: they have a device and no values, and refuse to meet those of another one.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cascade_common import Documents, best, make_batch, make_model, relative
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from train_runs import RECIPES, Config, cascade, check, make_dataset, make_tree, run, weights

from xmlkernels import InputError
from xmlkernels.checkpoint import load, save
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.restore import restored
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.nn import cascade_level, shortlist, table
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.planner import Budget, planned
from xmlkernels.reference import shortlist_select as shortlist_reference
from xmlkernels.training import build
from xmlkernels.training.facts import BalancedTree, Facts
from xmlkernels.training.forecast import memory_of
from xmlkernels.training.plan import before_data

CPU = torch.device("cpu")
MODELS = {
    "fp32": {},
    "fp8": {"dtype": "fp8", "drops": 0.2},
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
    "dense": {"optimizer": "adamw_dense"},
    "mean": {"mean": MeanSettings(0.9, tables=True), "dtype": "bf16"},
}


def trained(steps: int = 4, **options: Any) -> Cascade:
    torch.manual_seed(0)
    model = make_model(3, total=50, decay=0.1, **options)
    for number in range(steps):
        model.step(make_batch(model.tree, 6, seed=number))
    return model


def same(ours: Cascade, theirs: Cascade) -> bool:
    a, b = ours.tensors(), theirs.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_on_the_models_device_nothing_changes(options: dict[str, Any], tmp_path: Path) -> None:
    """Trained, saved, read by a model without a placement and by one with, and served."""
    plain, placed = trained(**options), trained(label_device=CPU, **options)
    assert same(placed, plain)
    batch = make_batch(plain.tree, 5, seed=9)
    plain.eval(), placed.eval()
    assert all(
        torch.equal(a, b)
        for a, b in zip(best(plain, batch, 5), best(placed, batch, 5), strict=True)
    )
    assert torch.equal(plain.loss(batch), placed.loss(batch))
    assert placed.config() == plain.config()
    save(tmp_path / "checkpoint", placed.tensors(), {"model": placed.config()})
    tensors, state = load(tmp_path / "checkpoint")
    for device in (None, CPU):
        other = trained(0, label_device=device, **options)
        other.load_tensors(tensors)
        assert same(other, plain)
    served = restored(state["model"], tensors)
    served.load_tensors(tensors)
    assert all(
        torch.equal(a, b)
        for a, b in zip(best(served.eval(), batch, 5), best(plain, batch, 5), strict=True)
    )


def test_a_placed_level_stays_where_it_is() -> None:
    model, free = trained(label_device=CPU), trained()
    labels = model.heads.levels[-1]
    before = {name: value.data_ptr() for name, value in labels.state_dict().items()}
    model.to("meta"), free.to("meta")
    assert {name: value.data_ptr() for name, value in labels.state_dict().items()} == before
    assert {value.device for value in labels.state_dict().values()} | {labels.hyper.device} == {CPU}
    rest = [v for k, v in model.state_dict().items() if not k.startswith("heads.levels.2.")]
    assert {v.device.type for v in (*rest, model.scaler.scale, *free.state_dict().values())} == {
        "meta"
    }
    assert model.device.type == "meta"


class Watched:
    """The ops of a level, which refuse tensors of two devices and compute nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.devices: list[str] = []
        self.moves: list[tuple[str, str, int]] = []
        patch.setattr(cascade_level, "cluster_step_", self.step)
        patch.setattr(table, "shortlist_matmul", self.scores)
        # Without their ops, whose checks look at values.
        for name in ("shortlist_select", "shortlist_merge"):
            patch.setattr(shortlist, name, getattr(shortlist_reference, name))
        self.plainly = cascade_level.moved
        patch.setattr(cascade_level, "moved", self.moved)
        patch.setattr(
            cascade_level, "wait_for", lambda device: self.moves.append((str(device), "waited", 0))
        )
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)

    def met(self, *tensors: Any) -> None:
        found = {str(t.device) for t in tensors if isinstance(t, Tensor)}
        assert len(found) == 1, found
        self.devices += found

    def step(
        self,
        weight: Tensor,
        x: Tensor,
        clusters: Tensor,
        row_ptr: Tensor,
        most: int,
        *rest: Any,
        **more: Any,
    ) -> Any:
        self.met(weight, x, clusters, row_ptr, *rest, *more.values())
        return (
            torch.empty_like(x),
            x.new_empty(*clusters.shape, most),
            x.new_empty(int(more["need_loss"])),
        )

    def scores(
        self, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, row_scale: Tensor | None
    ) -> Tensor:
        self.met(x, weight, bias, index, row_scale)
        return x.new_empty(x.shape[0], index.shape[-1])

    def moved(self, device: torch.device, *tensors: Tensor) -> list[Tensor]:
        self.moves += [
            (str(t.device), str(device), t.numel()) for t in tensors if t.device != device
        ]
        return self.plainly(device, *tensors)


def on(device: str, batch: Documents) -> Documents:
    pairs = tuple((row.to(device), sample.to(device)) for row, sample in batch.levels)
    inputs = tuple(part.to(device) for part in batch.inputs)
    return Documents(inputs, batch.pos_row.to(device), batch.pos_sample.to(device), pairs)


@pytest.mark.parametrize(("home", "apart"), [("cpu", "meta"), ("meta", "cpu"), ("meta", "cpu:1")])
def test_a_step_takes_what_it_needs_to_the_labels_and_back(
    home: str, apart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole steps and a prediction. "meta" is the card here: of all that is not the host, torch
    knows it everywhere (but for autocast, which transformers would meet: they stand aside)."""
    model = make_model(3, dtype="bf16", topk=[2, 3])
    watched, batch = Watched(monkeypatch), make_batch(model.tree, 5)
    sizes, (above, most) = model.tree.sizes, model.heads.most
    tree, width, kept = sizes[1] + 1, 16, min(3 + 32, min(2 + 32, sizes[0]) * above)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.heads.levels[2].place_on(torch.device(apart))
        model.to(home)
        assert str(model.heads.levels[2].weight.device) == apart and str(model.device) == home
        held = on(home, batch)
        vectors = [
            torch.empty(5, size, device=home, requires_grad=True)
            for size in (2 * width, width, width)
        ]
        monkeypatch.setattr(model.encoder, "layer_vectors", lambda *inputs: vectors)
        loss = model.step(held, need_loss=True)
        assert [str(v.grad.device) for v in vectors] == [home] * 3
        assert str(loss.device) == home and watched.devices == [home, home, apart]
        pairs = len(batch.pos_row)
        forth = [count for _, to, count in watched.moves if to == apart]
        assert sorted(forth) == sorted([5 * width, 5 * kept, pairs, pairs, 1, 1, tree])
        back = [count for _, to, count in watched.moves if to == home]
        assert sorted(back) == sorted([5 * width, 5 * kept * most, 1])
        # All that goes to the host is asked for first: it waits for the tree once, and once for the
        # rest.
        waits = [where for where, to, _ in watched.moves if to == "waited"]
        assert waits == ([home] * 2 if apart.startswith("cpu") else [apart])
        watched.moves.clear()
        model.step(held)
        assert tree not in [count for _, _, count in watched.moves], "the tree is there already"
        watched.devices.clear()
        values, labels = best(
            model, held, 4, exclude=torch.zeros(5, 1, dtype=torch.int64, device=home)
        )
        assert watched.devices == [home, home, apart]
        assert {
            str(values.device),
            str(labels.device),
        } == {home}
        assert str(model.loss(held).device) == home


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp32", "fp8", "dense"])
def test_labels_on_the_host_beside_a_card(name: str) -> None:
    """Against the same model whole on the host, and read again by one whole on the card."""
    options = MODELS[name] | {"drops": 0.0}
    card = torch.device("cuda", 0)
    model, host = make_model(3, label_device=CPU, **options).to(card), make_model(3, **options)
    for number in range(4):
        batch = make_batch(host.tree, 6, seed=number)
        there = on("cuda:0", batch)
        expected = float(host.step(batch, need_loss=True))
        assert float(model.step(there, need_loss=True)) == pytest.approx(
            expected, rel=1e-2 if name == "fp8" else 1e-3
        )
    assert model.heads.levels[2].weight.device == CPU
    assert model.heads.levels[1].weight.device == card
    if name != "fp8":  # whose stores draw another way where a bit of dx differs
        assert relative(model.heads.levels[2].weight, host.heads.levels[2].weight) < 1e-2
    batch = on("cuda:0", make_batch(host.tree, 5, seed=9))
    values, labels = best(model.eval(), batch, 5)
    whole = make_model(3, **options).to(card).eval()
    whole.load_tensors(model.tensors())
    assert whole.heads.levels[2].weight.device == card
    torch.testing.assert_close(best(whole, batch, 5)[0], values, rtol=1e-3, atol=1e-3)
    assert values.device == labels.device == card and same(whole, model)


@pytest.mark.gpu
def test_labels_on_a_second_card() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one card")
    models = [
        make_model(3, label_device=device).to("cuda:0") for device in (None, torch.device("cuda:1"))
    ]
    for number in range(4):
        batch = on("cuda:0", make_batch(models[0].tree, 6, seed=number))
        losses = [float(model.step(batch, need_loss=True)) for model in models]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert models[1].heads.levels[2].weight.device == torch.device("cuda:1")
    assert (
        relative(models[1].heads.levels[2].weight, models[0].heads.levels[2].weight.to("cuda:1"))
        < 1e-4
    )


# ---- the command ----


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label_device": "tpu9"}, "--label-device: expected a device, got 'tpu9'"),
        ({"label_device": "meta"}, "--label-device: expected cpu or cuda, got 'meta'"),
        (
            {"label_device": "cuda:1"},
            r"--label-device: expected a device of this machine, got 'cuda:1' \(1 found\)",
        ),
        (
            {"label_device": "cpu", "model": "end_to_end"},
            "--label-device: expected auto with --model end_to_end, whose table stands with the "
            "model, got 'cpu'; leave it out",
        ),
    ],
)
def test_places_that_cannot_be_used_are_refused(
    changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=expected):
        check(
            replace(
                Config(), **{"model": "cascade", "tree_depths": (3, 6), "device": "cpu"} | changes
            )
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_told_by_the_heads_too() -> None:
    with pytest.raises(
        InputError, match="device of the label table: expected a device of this machine, got cuda:1"
    ):
        make_model(3, label_device=torch.device("cuda:1"))


def test_memory_is_told_for_each_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = {
        "label_device": "cpu",
        "device": "cuda",
        "table": "bf16",
        "batch": 8,
        "accumulate": 2,
        "beyond_memory": True,
    }
    config = replace(RECIPES["cascade-tiny"].config, **settings)
    encoder = BowEncoder(4, 4)
    tables = {
        name: planned(lambda rows=rows: FullHead(rows, 64, dtype="bf16", optimizer="adam"))
        for name, rows in (("clusters", 1 << 10), ("labels", 1 << 16))
    }
    facts = Facts(labels=1 << 16, documents=64, validation=0, test=0, virtual=0, longest=10)

    def lines(**changes: Any) -> list[str]:
        settings = replace(config, **changes)
        places = vars(before_data(settings))
        cascade = SimpleNamespace(topk=(10,))
        plan: Any = SimpleNamespace(
            config=settings,
            facts=facts,
            cascade=cascade,
            **places,
            documents=8,
            longest=10,
            update=16,
        )
        tree = BalancedTree((1 << 10, 1 << 16))
        memory = memory_of(plan, encoder, tables, tree, here={"so far": 1 << 20})
        budgets.update(memory.budgets())
        build.announce(plan, memory)
        return capsys.readouterr().out.splitlines()

    budgets: dict[str, Budget] = {}
    card, host = lines()
    assert card.startswith("memory of this run on cuda: about ")
    assert budgets["cuda"].held["clusters"] == (1 << 17) + (7 * 4 + 2 * 8)  # hyper and counter
    assert "labels" not in card and "labels" not in budgets["cuda"].held
    assert host.startswith("memory of this run on cpu: about ")
    assert "labels 8.0 MiB, states of labels 32.0 MiB" in host and "so far 1.0 MiB" in host
    assert budgets["cuda"].phases["a step"]["shortlists"] == 16 * (1024 + 10 * 64) * 12
    assert budgets["cpu"].phases["a step"]["shortlists"] == 16 * 10 * 64 * 12
    second = lines(label_device="cuda:1")[2]
    assert second.startswith("memory of this run on cuda:1: ") and "labels 8.0 MiB" in second
    for same_place in ("auto", "cuda", "cuda:0"):
        whole, host = lines(label_device=same_place)
        assert whole.startswith("memory of this run on cuda: about ")
        assert "states of labels" in whole and "labels" not in host
        assert {"clusters", "labels"} <= budgets["cuda"].held.keys()


def test_a_run_may_go_on_with_its_labels_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag reaches the model; a resumed run may name another place, and on the model's own all
    is as it was.
    """
    dataset = make_dataset(tmp_path / "raw")
    tree = make_tree(dataset, tmp_path / "tree.safetensors")
    report = run(cascade(dataset, tmp_path / "plain", tree, epochs=2))
    assert report["environment"]["label_device"] == "cpu"
    run(cascade(dataset, tmp_path / "parts", tree, epochs=2, label_device="cpu"))
    for which in ("last", "best"):
        assert weights(tmp_path / "parts", which) == weights(tmp_path / "plain", which)
    capsys.readouterr()
    run(cascade(dataset, tmp_path / "parts", tree, epochs=2, label_device="auto", resume=True))
    assert "resumed at step" in capsys.readouterr().out
    assert weights(tmp_path / "parts", "last") == weights(tmp_path / "plain", "last")
