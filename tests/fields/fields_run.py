"""How each setting of data, evaluation, saving and the machine is tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch
from config_runs import PER_EPOCH, STEPS, Case, Config, Runs, Seen, recorded
from fields_cascade import TABLES, WEIGHT, a_tree_made_on_first_use

from xmlkernels import InputError, memory
from xmlkernels.cli import train
from xmlkernels.cli.flags import flags_of
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig
from xmlkernels.evaluation import Evaluation
from xmlkernels.metrics import evaluate, inverse_propensity, top_rows_from_csr
from xmlkernels.training import event_files as event_file_room
from xmlkernels.training import inputs, plan
from xmlkernels.training.config import BEST_BY
from xmlkernels.training.evaluator import Evaluator
from xmlkernels.training.run_state import RunState
from xmlkernels.tree.label_tree import arrangement


def models(runs: Runs, folder: Path) -> None:
    plain, changed = runs.of("tiny"), runs.of("cascade")
    assert plain.config.model == "end_to_end" and changed.config.model == "cascade"
    assert WEIGHT in plain.tensors
    assert not [name for name in plain.tensors if name.startswith("heads.")]
    assert changed.report["scheme"]
    assert TABLES[2] in changed.tensors
    assert WEIGHT not in changed.tensors


def datasets(runs: Runs, folder: Path) -> None:
    plain, changed = runs.of("tiny"), runs.of("tiny", dataset=str(runs.other))
    for seen, path, labels in ((plain, runs.dataset, 30), (changed, runs.other, 400)):
        assert seen.report["dataset_hash"] == Dataset.open(path).content_hash
        assert seen.tensors[WEIGHT].shape[0] == labels and seen.predictions.shape[1] == labels


class Asked(Exception):
    pass


def the_corpus_asked_for(**changes: object) -> PrepareConfig:
    """Return the settings with which the built-in corpus is prepared."""
    asked: list[PrepareConfig] = []

    def ask(settings: PrepareConfig, *_: object, **__: object) -> None:
        asked.append(settings)
        raise Asked

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked):
        patch.setattr(inputs, "prepare", ask)
        inputs.open_dataset(replace(Config(encoder="tiny", dataset="docstrings"), **changes))
    return asked[0]


def of_the_corpus(name: str, field: str) -> Callable[[Runs, Path], None]:
    """`--documents` and `--max-length` reach the corpus; each has its own folder in the cache."""

    def holds(runs: Runs, folder: Path) -> None:
        found = [the_corpus_asked_for(cache=str(folder), **{name: value}) for value in (17, 23)]
        assert [getattr(settings, field) for settings in found] == [17, 23]
        assert found[0].output != found[1].output

    return holds


def all_documents(runs: Runs, folder: Path) -> None:
    assert the_corpus_asked_for(cache=str(folder), documents=0).documents is None


def caches(runs: Runs, folder: Path) -> None:
    assert Path(the_corpus_asked_for(cache=str(folder / "mine")).output).parent == folder / "mine"


def outputs(runs: Runs, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recorded(runs.config("tiny", epochs=1, output="one/of/mine"))
    assert sorted(path.name for path in folder.iterdir()) == ["one"]
    inside = {path.name for path in (folder / "one" / "of" / "mine").iterdir()}
    assert inside >= {"config.json", "log.jsonl", "metrics.json", "predictions.npz", "checkpoint"}


def label_texts(plain: Seen, changed: Seen) -> None:
    """30 documents are added, each with its own label alone.

    Propensities are those of the documents without them.
    """
    assert plain.report["steps"] == STEPS and changed.report["steps"] == 2 * 6
    seen = [
        sorted(n for step in run.steps[: run.report["steps"] // 2] for n in step.index)
        for run in (plain, changed)
    ]
    assert seen == [list(range(160)), list(range(190))]
    splits, (_, top) = changed.dataset.splits, top_rows_from_csr(changed.predictions, 5)
    alone = splits["train"].labels
    augmented = scipy.sparse.vstack([alone, scipy.sparse.eye_array(30, format="csr")]).tocsr()
    constants, labels = changed.dataset.propensity, splits["test"].labels
    scored = [
        evaluate(top, labels, inverse_propensity(matrix, *constants))
        for matrix in (alone, augmented)
    ]
    assert changed.report["test"]["PSP@5"] == pytest.approx(scored[0]["PSP@5"], rel=1e-9)
    assert changed.report["test"]["PSP@5"] != pytest.approx(scored[1]["PSP@5"], rel=1e-4)


def validated(plain: list[int], changed: list[int]) -> Callable[[Seen, Seen], None]:
    """Test that these epochs end with a validation."""

    def holds(before: Seen, after: Seen) -> None:
        for seen, epochs in ((before, plain), (after, changed)):
            found = {line["epoch"] for line in seen.log if line.get("split") == "validation"}
            assert found == set(epochs)

    return holds


def chosen_by(plain: Seen, changed: Seen) -> None:
    for seen in (plain, changed):
        name = seen.config.best_by
        best = seen.report["best"]
        lines = [line for line in seen.log if line.get("split") == "validation"]
        assert set(best) == {name, "epoch", "step"}
        assert best[name] == max(line[name] for line in lines)
        assert best["epoch"] == next(line["epoch"] for line in lines if line[name] == best[name])


def the_first_of_equals(runs: Runs, folder: Path) -> None:
    """The first of equal metrics stays the best, and one that is no number is never better."""
    held = {"R@2": 5.0, "epoch": 1, "step": 5}
    run = SimpleNamespace(
        config=Config(best_by="R@2"),
        best=dict(held),
        reached=2,
        model=SimpleNamespace(steps=10),
    )
    for value in (5.0, 4.0, float("nan")):
        assert not RunState.improved(run, {"R@2": value, "P@1": 99.0}) and run.best == held
    assert RunState.improved(run, {"R@2": 5.5})
    assert run.best == {
        "R@2": 5.5,
        "epoch": 2,
        "step": 10,
    }


def every_metric_that_may_choose(runs: Runs, folder: Path) -> None:
    """Each is computed of the validation split: those over labels when asked for alone."""
    true = scipy.sparse.csr_matrix(np.eye(3, 6))
    found = Evaluation(np.zeros((3, 5), np.float32), np.tile(np.arange(5), (3, 1)), 0.5, [])
    split = SimpleNamespace(labels=true)
    session = SimpleNamespace(inverse_propensity=np.ones(6), validation=split)
    for name in BEST_BY:
        measuring = SimpleNamespace(config=Config(best_by=name), session=session)
        metrics = Evaluator._metrics(measuring, split, found)
        assert 0 < metrics[name] <= 100
        others = {n for n in metrics if n.startswith(("macro", "coverage"))}
        assert others <= {name}
        kind = name.partition("@")[0]
        assert kind in str(next(f for f in flags_of(Config) if f.name == "best_by").told)


def labels_kept(plain: Seen, changed: Seen) -> None:
    assert plain.predictions.getnnz(1).tolist() == [20] * 50
    assert changed.predictions.getnnz(1).tolist() == [7] * 50


def evaluated_at_once(plain: Seen, changed: Seen) -> None:
    assert max(plain.evaluated) == 50 and set(changed.evaluated) == {16, 8, 2}
    assert (plain.predictions != changed.predictions).nnz == 0 or np.allclose(
        plain.predictions.toarray(), changed.predictions.toarray(), atol=1e-5
    )


def each_document_counts_once(plain: Seen, changed: Seen) -> None:
    """Every document counts once in the loss of a split.

    A batch's loss is a mean over its candidates; the batches have 16, 16 and 8 documents.
    """
    split, arranged = changed.dataset.splits["val"], arrangement(changed.tree)
    batches = list(changed.inputs.batches(split, 16, shuffle=False, **arranged).epoch(0))
    losses = [float(changed.model.loss(batch)) for batch in batches]
    assert [len(batch) for batch in batches] == [16, 16, 8] and max(losses) > min(losses)
    own = sum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True)) / 40
    assert changed.report["validation"]["loss"] == pytest.approx(own, rel=1e-6)


def saved_at(plain: Seen, changed: Seen) -> None:
    assert STEPS in plain.saved and not set(plain.saved) - {PER_EPOCH, STEPS}
    assert sorted(set(changed.saved)) == [3, PER_EPOCH, 6, 9, STEPS]


def kept(plain: Seen, changed: Seen) -> None:
    """Checkpoints before the last are kept as asked; the best one is kept in any case."""
    for seen, earlier in ((plain, ["last.1"]), (changed, [])):
        there = sorted(
            path.name
            for path in Path(seen.config.output, "checkpoint").glob("[lb]*")
            if path.suffix != ".txt"
        )
        assert there == ["best", "last", *earlier]


def logged_at(plain: Seen, changed: Seen) -> None:
    assert [line["step"] for line in plain.progress] == list(range(1, 11))
    assert [line["step"] for line in changed.progress] == [4, 8]


def resumed(runs: Runs, folder: Path) -> None:
    """Nothing is left to train, and the weights are unchanged."""
    first = recorded(runs.config("tiny", output=str(folder / "run")))
    again = recorded(replace(first.config, resume=True))
    assert not again.steps and "resumed at step 10" in again.told
    assert torch.equal(again.tensors[WEIGHT], first.steps[-1].weights[WEIGHT])


def overwritten(runs: Runs, folder: Path) -> None:
    first = recorded(runs.config("tiny", epochs=1, output=str(folder / "run")))
    with pytest.raises(InputError, match="--overwrite"):
        recorded(replace(first.config, seed=3))
    again = recorded(replace(first.config, seed=3, overwrite=True))
    assert len(again.steps) == PER_EPOCH
    assert json.loads((folder / "run" / "config.json").read_text())["seed"] == 3


def beyond_memory(runs: Runs, folder: Path) -> None:
    """With one mebibyte of memory, a run is refused in a sentence unless the flag is set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "machine_memory", lambda: 1 << 20)
        with pytest.raises(
            InputError,
            match="memory of this run: expected at most 1.0 MiB.*got about.*--beyond-memory",
        ):
            recorded(runs.config("tiny", epochs=1, output=str(folder / "run")))
        assert recorded(
            runs.config("tiny", epochs=1, beyond_memory=True, output=str(folder / "run"))
        ).steps


def devices(runs: Runs, folder: Path) -> None:
    """A device is asked for by name; one that does not exist is refused."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "find_device", lambda name: asked.append(name) or torch.device("cpu"))
        seen = recorded(runs.config("tiny", epochs=1, device="cpu", output=str(folder / "run")))
    assert set(asked) == {"cpu"} and seen.report["environment"]["device"] == "cpu"
    with pytest.raises(
        InputError, match="--device: expected a device of this machine, got 'cuda:99'"
    ):
        recorded(runs.config("tiny", device="cuda:99", output=str(folder / "none")))


def cuda_graphs(runs: Runs, folder: Path) -> None:
    """Asked for on a CPU they are refused; on a card, auto has them where a step has one shape."""
    with pytest.raises(InputError, match="--cuda-graph: expected a card, got device cpu"):
        recorded(runs.config("tiny", cuda_graph="on", output=str(folder / "none")))
    assert not plan.before_data(runs.config("tiny", output=str(folder / "none"))).graphs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "find_device", lambda name: torch.device("cuda:0"))
        patch.setattr(plan, "default_table_dtype", lambda device: "bf16")

        def graphs(value: str, **more: object) -> bool:
            config = runs.config("tiny", cuda_graph=value, output=str(folder / "none"), **more)
            return plan.before_data(config).graphs

        assert graphs("auto") and graphs("on") and not graphs("off")
        for name, value in (
            ("encoder", "bow"),
            ("micro_batch", 2),
            ("accumulate", 2),
            ("compile", True),
            ("impl", "reference"),
            ("table_compute", "fp16"),
        ):
            assert not graphs("auto", **{name: value}), name
            with pytest.raises(InputError, match=r"--cuda-graph: .*take auto or off"):
                graphs("on", **{name: value})


def shards(runs: Runs, folder: Path) -> None:
    """Of several processes each builds its own rows, or with off a copy of all.

    tests/training/test_train_processes.py runs both.
    """
    with pytest.raises(InputError, match="--shard-labels: expected several processes, got one"):
        runs.of("tiny", shard_labels="on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        for value, sharded in (("auto", True), ("on", True), ("off", False)):
            config = runs.config("tiny", shard_labels=value, output=str(folder / "none"))
            assert plan.before_data(config).sharded is sharded, value


def threads(plain: Seen, changed: Seen) -> None:
    assert plain.report["environment"]["threads"] == 1
    assert changed.report["environment"]["threads"] == 2


def timeouts(runs: Runs, folder: Path) -> None:
    """The flag reaches the processes' heartbeats.

    tests/test_lost_processes.py measures what happens when they stop.
    """
    told: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.dist, "start", lambda device, patience: told.append(patience))
        patch.setattr(train, "train", lambda config, deadline: None)
        for words in ([], ["--timeout", "7"]):
            patch.setattr(train, "print_metrics", lambda *_: None)
            train.main(["tiny", "--dataset", str(runs.dataset), *words])
    assert told == [45, 7]
    with pytest.raises(InputError, match="--timeout: expected 1 or more seconds, got 0.5"):
        train.check(runs.config("tiny", timeout=0.5))


def event_files(runs: Runs, folder: Path) -> None:
    """TensorBoard's own reader finds the numbers of log.jsonl, also of a run that was resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = folder / "run"
    config = runs.config("tiny", tensorboard=True, output=str(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_room, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"--tensorboard: .*xmlkernels\[tensorboard\]"):
            recorded(config)
    assert not output.exists()
    recorded(config)
    lines = list(map(json.loads, (output / "log.jsonl").read_text().splitlines()))

    def told(tag: str) -> list[tuple[int, float]]:
        found = EventAccumulator(str(output / "tensorboard"))
        found.Reload()
        return [(x.step, x.value) for x in found.Scalars(tag)]

    for part, key in (("train", "loss"), ("train", "table_lr"), ("validation", "P@1")):
        kept = [x for x in lines if x.get("split", "train") == part and x.get(key) is not None]
        assert told(f"{part}/{key}") == [(x["step"], pytest.approx(x[key])) for x in kept]
    again = event_file_room.EventFile(output)  # as after a stop: what is logged again replaces
    again.add({"step": 4, "loss": 7.0})
    assert told("train/loss")[-1] == (4, 7.0) and len(told("train/loss")) == 4
    recorded(replace(config, overwrite=True, tensorboard=False))
    assert not (output / "tensorboard").exists()


def reported(runs: Runs, folder: Path) -> None:
    """A report is written, or none."""
    for value in (True, False):
        output = folder / str(value)
        recorded(runs.config("tiny", epochs=1, report=value, output=str(output)))
        assert (output / "report.html").exists() == value


def shown(runs: Runs, folder: Path) -> None:
    """The flag reaches the printing of metrics."""
    told: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.dist, "start", lambda *_: None)
        patch.setattr(train, "train", lambda config, deadline: {})
        patch.setattr(train, "print_metrics", lambda report, output, show: told.append(show))
        for words in ([], ["--show", "all"]):
            train.main(["tiny", "--dataset", str(runs.dataset), *words])
    assert told == ["short", "all"]


FIELDS = {
    "model": (models,),
    "dataset": (datasets,),
    "documents": (of_the_corpus("documents", "documents"), all_documents),
    "max_length": (of_the_corpus("max_length", "max_length"),),
    "cache": (caches, a_tree_made_on_first_use),
    "output": (outputs,),
    "label_text": (Case("tiny", {"label_text": True}, label_texts),),
    "evaluate_every": (
        Case("tiny", {"evaluate_every": 2}, validated([1, 2], [2])),
        # The last epoch always is.
        Case("tiny", {"evaluate_every": 2}, validated([1, 2, 3], [2, 3]), {"epochs": 3}),
    ),
    "best_by": (
        Case("tiny", {"best_by": "nDCG@4"}, chosen_by),
        Case("tiny", {"best_by": "microF1@5"}, chosen_by),
        Case("tiny", {"best_by": "macroF1@3"}, chosen_by),
        the_first_of_equals,
        every_metric_that_may_choose,
    ),
    "show": (shown,),
    "report": (reported,),
    "tensorboard": (event_files,),
    "top_k": (Case("tiny", {"top_k": 7}, labels_kept),),
    "evaluate_batch": (
        Case("tiny", {"evaluate_batch": 16}, evaluated_at_once),
        Case("cascade", {"evaluate_batch": 16}, each_document_counts_once),
    ),
    "save_every": (Case("tiny", {"save_every": 3}, saved_at),),
    "keep": (Case("tiny", {"keep": 0}, kept),),
    "log_every": (Case("tiny", {"log_every": 4}, logged_at),),
    "resume": (resumed,),
    "overwrite": (overwritten,),
    "beyond_memory": (beyond_memory,),
    "device": (devices,),
    "cuda_graph": (cuda_graphs,),
    "shard_labels": (shards,),
    "threads": (Case("tiny", {"threads": 2}, threads),),
    "timeout": (timeouts,),
}
