"""Every recipe builds and takes a step; where its data or encoder is not here, small ones stand
in.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import LABELS, RECIPES, check, make_dataset, run, session, threads_kept, tiny

from xmlkernels.data.dataset import Dataset
from xmlkernels.nn.encoder import Encoder
from xmlkernels.tree.label_tree import LabelTree

pytestmark = pytest.mark.filterwarnings("ignore::xmlkernels.nn.cascade_heads.ShortlistWarning")
# What a source gives: epochs, batch, clusters kept, dropout of the levels (spec: CascadeXML's
# README; LEVER, table 18).
PUBLISHED = {
    "cascade-wiki10-31k": (15, 64, (64, 64), (0.3, 0.3, 0.4)),
    "cascade-amazon-670k": (15, 64, (128, 256, 400), (0.2, 0.25, 0.4, 0.5)),
    "cascade-wiki-500k": (15, 64, (128, 256, 512), (0.2, 0.25, 0.35, 0.5)),
    "cascade-lf-amazontitles-131k": (15, 64, (1024, 1024, 1024), (0.2, 0.25, 0.35, 0.5)),
    "cascade-lf-amazon-131k": (15, 64, (64, 128, 256), (0.2, 0.25, 0.4, 0.5)),
    "cascade-lf-aol-270k": (12, 96, (1024, 1024, 1024), (0.2, 0.25, 0.35, 0.5)),
    "cascade-lf-wikiseealso-320k": (12, 64, (1024, 2048, 4096), (0.2, 0.25, 0.35, 0.5)),
    "cascade-lf-wikipedia-500k": (12, 256, (1024, 1024, 2048), (0.2, 0.25, 0.35, 0.5)),
    "cascade-lf-wikihierarchy-1m": (12, 96, (1024, 1024, 1024), (0.2, 0.25, 0.35, 0.5)),
    "cascade-lf-amazontitles-1.3m": (10, 48, (1024, 2048), (0.2, 0.3, 0.4)),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


def halves(dataset: Path, file: Path, levels: int) -> Path:
    """A tree of 2, 4, 8, … clusters."""
    parts = [np.arange(LABELS) * 2 ** (r + 1) // LABELS for r in range(levels - 1)]
    LabelTree.from_partitions(parts, {"dataset": Dataset.open(dataset).content_hash}).save(file)
    return file


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_takes_a_step(
    name: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RECIPES[name][1]
    check(config)
    make = Encoder.tiny
    if config.encoder not in ("tiny", "bow"):
        monkeypatch.setattr(
            Encoder, "tiny", lambda *sizes, **options: make(*sizes, layers=12, **options)
        )
        config = replace(config, encoder="tiny")
    if config.model == "cascade":
        tree = halves(dataset, tmp_path / "tree.safetensors", len(config.tree_depths) + 1)
        config = replace(config, tree=str(tree))
    config = replace(config, dataset=str(dataset), output=str(tmp_path / "run"), batch=16)
    with threads_kept():
        state = session.Session(config)
        batch = next(iter(state.batches.epoch(0)))
        loss = state.model.train().step(batch, need_loss=True)
    assert torch.isfinite(loss).all() and state.model.steps == 1
    assert state.model.config()["kind"] == config.model
    if config.model == "cascade" and not config.layers:
        layers = [tuple(level) for level in state.model.heads.config["layers"]]
        assert (
            layers
            == {3: [(7, 8), (10,), (12,)], 4: [(5, 6), (8,), (10,), (12,)]}[
                len(config.tree_depths) + 1
            ]
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    config = RECIPES[name][1]
    assert (config.epochs, config.batch, config.topk, config.embed_drops) == PUBLISHED[name]
    assert (config.encoder_lr, config.head_lr_factor, config.encoder_decay) == (1e-4, 10.0, 0.05)
    assert (
        config.warmup_epochs == (2.0 if name == "cascade-wiki10-31k" else 1.0)
        and config.cooldown_epochs == 3.0
    )
    assert config.top_k == 20 and config.pooling == "cls" and config.rw_loss == ()


def test_names_of_recipes_are_their_folders() -> None:
    outputs = [config.output for _, config in RECIPES.values()]
    assert outputs == [f"runs/{name}" for name in RECIPES] and all(
        told.endswith(".") for told, _ in RECIPES.values()
    )


@pytest.mark.parametrize("kept", [True, False], ids=["texts", "tokens"])
def test_a_tree_is_built_on_first_use_and_kept(
    kept: bool, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run reads it; another seed makes another."""
    own = dataset if kept else make_dataset(tmp_path / "raw")
    options: dict[str, Any] = {
        "model": "cascade",
        "tree_depths": (2, 4),
        "layers": ("1", "2", "2"),
        "cache": str(tmp_path / "cache"),
        "epochs": 1,
        "warmup": 2,
    }
    reports = [run(tiny(own, tmp_path / f"run{number}", **options)) for number in range(2)]
    told = capsys.readouterr().out
    assert told.count("made from the same inputs before, used again") == 1
    assert reports[0]["tree"] == reports[1]["tree"] and reports[0]["test"] == reports[1]["test"]
    (folder,) = (tmp_path / "cache" / "trees").iterdir()
    tree = LabelTree.load(folder)
    assert (
        tree.sizes == (4, 16, LABELS) and tree.settings["dataset"] == Dataset.open(own).content_hash
    )
    with threads_kept():
        session.Session(tiny(own, tmp_path / "other", **options, seed=1))
    assert len(list((tmp_path / "cache" / "trees").iterdir())) == 2
