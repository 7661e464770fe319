"""Recipes: each builds and takes a step (where its data or encoder is not here, small ones take
their place), says what it needs, and has the values that its source publishes.
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import (
    LABELS,
    RECIPES,
    Config,
    check,
    make_dataset,
    run,
    session,
    threads_kept,
    tiny,
)

from xmlkernels import InputError
from xmlkernels.cli.arguments import parse
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig
from xmlkernels.nn.encoder import Encoder
from xmlkernels.training.fitting import level_weights, shortlists, tree_depths
from xmlkernels.training.published_cascades import CASCADE
from xmlkernels.training.tree import TreeConfig
from xmlkernels.tree.label_tree import LabelTree

pytestmark = pytest.mark.filterwarnings("ignore::xmlkernels.nn.cascade_heads.ShortlistWarning")
# What a source gives: epochs, batch, clusters kept, dropout of the levels (CascadeXML's README;
# LEVER, table 18).
CASCADES = {
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
# Renee's published table: encoder, batch, epochs, tokens, rates of encoder and table, decays of
# table and encoder, dropout, warm-up, NGAME's encoder, label texts as documents.
LARGE, DISTIL, MARCO = (
    f"sentence-transformers/{name}"
    for name in (
        "all-roberta-large-v1", "paraphrase-distilroberta-base-v2", "msmarco-distilbert-base-v4",
    )
)  # fmt: skip
# fmt: off
END_TO_END = {
    "amazontitles-670k": (
        LARGE, 256, 60, 32, 5e-5, 0.001, 0.001, 0.001, 0.8, 10000, False, False),
    "amazon-670k": (LARGE, 256, 70, 512, 4e-5, 0.01, 0.001, 0.001, 0.8, 10000, False, False),
    "amazontitles-3m": (LARGE, 256, 70, 32, 5e-5, 0.005, 0.002, 0.01, 0.75, 10000, False, False),
    "amazon-3m": (LARGE, 256, 60, 256, 4e-5, 0.01, 0.001, 0.001, 0.75, 10000, False, False),
    "wiki-500k": (DISTIL, 2048, 100, 256, 1e-4, 0.002, 0.001, 0.001, 0.75, 5000, False, False),
    "lf-amazontitles-131k": (
        MARCO, 512, 100, 32, 1e-5, 0.05, 1e-4, 0.01, 0.85, 5000, True, True),
    "lf-wikipedia-500k": (
        DISTIL, 2048, 100, 256, 1e-4, 0.002, 0.001, 0.01, 0.7, 5000, False, True),
    "lf-amazontitles-1.3m": (
        MARCO, 1024, 100, 32, 1e-6, 0.01, 1e-4, 0.01, 0.7, 15000, True, True),
    "lf-wikiseealso-320k": (
        DISTIL, 2048, 100, 128, 2e-4, 0.1, 1e-4, 0.001, 0.75, 5000, False, True),
    "lf-amazon-131k": (MARCO, 512, 100, 128, 1e-4, 0.05, 1e-4, 0.01, 0.75, 5000, False, True),
    "lf-amazon-131k-ngame": (
        MARCO, 512, 100, 128, 1e-5, 0.05, 1e-4, 0.01, 0.85, 5000, True, True),
}
# Tables 8 and 10: batch, tokens, encoder's name, bottleneck.
SPEEDS = {
    "speed-amazontitles-3m-minilm-l6": (1024, 32, "MiniLM-L6", 0),
    "speed-amazon-670k-distilroberta": (256, 256, "distilroberta", 0),
    "speed-amazontitles-3m-minilm-l3": (8192, 16, "MiniLM-L3", 64),
    "speed-amazon-3m-roberta-large": (16 * 48, 256, "roberta-large", 0),
    "speed-amazontitles-3m-roberta-large": (16 * 512, 32, "roberta-large", 0),
}
# fmt: on
MODELS = [name for name, recipe in RECIPES.items() if isinstance(recipe.config, Config)]
OWN = ("bow", "minilm", "cascade")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


def halves(dataset: Path, file: Path, levels: int) -> Path:
    """A tree of 2, 4, 8, … clusters."""
    parts = [np.arange(LABELS) * 2 ** (r + 1) // LABELS for r in range(levels - 1)]
    LabelTree.from_partitions(parts, {"dataset": Dataset.open(dataset).content_hash}).save(file)
    return file


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_builds_and_takes_a_step(
    name: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RECIPES[name].config
    check(config)
    make = Encoder.tiny
    if config.encoder not in ("tiny", "bow"):
        monkeypatch.setattr(
            Encoder, "tiny", lambda *sizes, **options: make(*sizes, layers=12, **options)
        )
        # compiling takes minutes, and the state dicts are elsewhere
        config = replace(config, encoder="tiny", compile=False, init_state="")
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


@pytest.mark.parametrize("name", CASCADES)
def test_published_settings_of_cascades(name: str) -> None:
    config = RECIPES[name].config
    assert (config.epochs, config.batch, config.topk, config.embed_drops) == CASCADES[name]
    assert (config.encoder_lr, config.head_lr_factor, config.encoder_decay) == (1e-4, 10.0, 0.05)
    assert config.warmup_epochs == (2.0 if name == "cascade-wiki10-31k" else 1.0)
    assert config.cooldown_epochs == 3.0
    assert config.top_k == 20 and config.pooling == "cls" and config.rw_loss == ()
    assert config.dataset == f"cache/{name.removeprefix('cascade-')}"


@pytest.mark.parametrize("name", END_TO_END)
def test_published_settings_end_to_end(name: str) -> None:
    encoder, batch, epochs, tokens, *rates, dropout, warmup, ngame, augmented = END_TO_END[name]
    config = RECIPES[name].config
    assert (config.model, config.encoder) == ("end_to_end", encoder)
    assert (config.batch, config.epochs, config.warmup) == (batch, epochs, warmup)
    found = [config.encoder_lr, config.table_lr, config.table_decay, config.encoder_decay]
    assert found == rates and config.dropout == dropout
    assert (bool(config.init_state), config.label_text) == (ngame, augmented)
    assert (config.momentum, config.encoder_epsilon, config.pooling) == (0.9, 1e-6, "mean")
    assert config.compile and config.loss_every == 0 and not config.bias
    (command,) = RECIPES[name].commands
    assert f"--tokenizer {encoder} --max-length {tokens} --output {config.dataset}" in command
    assert ("--label-text" in command) == name.startswith("lf-")
    assert ("--fields title" in command) == ("titles" in name)


@pytest.mark.parametrize("name", SPEEDS)
def test_published_settings_of_speed(name: str) -> None:
    batch, tokens, encoder, bottleneck = SPEEDS[name]
    config = RECIPES[name].config
    assert (config.batch, config.epochs, config.bottleneck) == (batch, 1, bottleneck)
    assert encoder in config.encoder and config.loss_every == 0
    assert f"--max-length {tokens} " in RECIPES[name].commands[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_needs(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name and recipe.config.output == f"runs/{name}"
    for text in (recipe.what, recipe.time, recipe.needs):
        assert text.endswith(".") and text in " ".join(recipe.help.split())
    if recipe.config.dataset != "docstrings":
        assert recipe.source and f"--output {recipe.config.dataset}" in recipe.commands[0]
    if name in ("linear", *OWN):
        assert recipe.when and "label texts" in recipe.needs and recipe.commands


@pytest.mark.parametrize("name", RECIPES)
def test_commands_that_prepare_are_commands(name: str) -> None:
    """Every flag exists, and takes the value that stands behind it."""
    shown = RECIPES[name].help.replace("\\\n", "")  # as a shell joins lines
    for command in RECIPES[name].commands:
        assert command in " ".join(shown.split())
        program, what, *words = shlex.split(command)
        assert program == "xmlkernels"
        if what == "prepare":
            config = parse(PrepareConfig, "", "", words=words)
            assert config.train_text and config.output.parts[0] == "cache"
        else:
            assert what == "tree" and parse(TreeConfig, "", "", positional=True, words=words)


def test_old_names_are_told_and_keep_folder_and_settings(caplog: pytest.LogCaptureFixture) -> None:
    for old, new in RECIPES.old.items():
        assert old in RECIPES and old not in list(RECIPES) and new in list(RECIPES)
        caplog.clear()
        config = RECIPES[old].replace(epochs=3)
        assert config == replace(RECIPES[new].config, epochs=3, output=f"runs/{old}")
        (record,) = caplog.records
        assert record.getMessage() == f"note: recipe {old!r} is now called {new!r}"
    with pytest.raises(KeyError):
        RECIPES["no such"]


# ---- what the dataset decides ----


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("texts", [True, False], ids=["label texts", "none"])
def test_label_texts_are_used_where_there_are_any(
    name: str, texts: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = str(make_dataset(tmp_path, **({} if texts else {"label_text": None})))
    caplog.set_level("INFO", "xmlkernels")
    config = RECIPES[name].replace(dataset=own, output="runs/mine")
    assert config.label_text is texts and config.output == "runs/mine"
    assert f"{own} has {'' if texts else 'no '}label texts" in caplog.text
    assert not RECIPES[name].replace(dataset=own, label_text=False).label_text
    assert RECIPES[name].replace().label_text is RECIPES[name].config.label_text  # built-in


def test_names_of_labels_are_no_texts_until_one_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"name {label}\n" for label in range(LABELS)))
    own = str(make_dataset(tmp_path, label_text=None, label_names=names))
    caplog.set_level("INFO", "xmlkernels")
    assert not RECIPES["bow"].replace(dataset=own).label_text
    assert "has names of its labels: --label-text trains on each" in caplog.text
    assert RECIPES["bow"].replace(dataset=own, label_text=True).label_text


def test_a_recipe_that_wants_label_texts_does_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = str(make_dataset(tmp_path, label_text=None))
    caplog.set_level("INFO", "xmlkernels")
    assert not RECIPES["lf-wikipedia-500k"].replace(dataset=own).label_text
    assert "note: " in caplog.text and "has no label texts" in caplog.text
    assert RECIPES["lf-wikipedia-500k"].replace(dataset=own, label_text=True).label_text


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a dataset folder"):
        RECIPES["minilm"].replace(dataset=str(tmp_path / "none"))


def test_a_cascade_fits_the_number_of_labels(dataset: Path) -> None:
    config = RECIPES["cascade"].replace(dataset=str(dataset))  # 30 labels
    assert (config.tree_depths, config.topk, config.rw_loss) == ((2,), (4,), (1.0, 7.5))
    told = RECIPES["cascade"].replace(dataset=str(dataset), tree_depths=(2, 3), topk=(2, 2))
    assert (told.tree_depths, told.topk, told.rw_loss) == ((2, 3), (2, 2), (1.0, 1.0, 1.9))
    fixed = RECIPES["cascade"].replace(dataset=str(dataset), rw_loss=(1.0, 1.0))
    assert fixed.rw_loss == (1.0, 1.0)


@pytest.mark.parametrize("labels", [1, 2, 7, 30, 100, 4271, 20_000, 131_073, 670_091, 2_812_281])
def test_shapes_of_cascades(labels: int) -> None:
    depths = tree_depths(labels)
    sizes = (*(2**depth for depth in depths), labels)
    topk = shortlists(sizes)
    weights = level_weights(sizes, topk)
    check(replace(CASCADE, tree_depths=depths, topk=topk, rw_loss=weights))
    assert len(topk) == len(depths) == len(weights) - 1 and all(k >= 1 for k in topk)
    assert depths[-1] <= 16 and (labels < 16 or labels / sizes[-2] > 4)
    if labels == 670_091:
        assert (depths, topk) == ((10, 13, 16), (128, 256, 512))


def test_weights_of_levels_are_those_of_the_built_in_corpus() -> None:
    """18,944 labels in 512 clusters: the recipe's own weights follow from the rule."""
    config = RECIPES["cascade"].config
    assert level_weights((64, 512, 18_944), config.topk) == config.rw_loss


@pytest.mark.parametrize("name", ["bow", "cascade"])
def test_own_data_without_label_texts_trains(name: str, tmp_path: Path) -> None:
    own = make_dataset(tmp_path, label_text=None, keep_texts=True)
    small = {"encoder": "tiny", "precision": "fp32"} if name == "cascade" else {"min_df": 1}
    config = RECIPES[name].replace(
        dataset=str(own), output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), epochs=1,
        threads=1, **small,
    )  # fmt: skip
    assert run(config)["test"]["P@1"] >= 0


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
    assert tree.sizes == (4, 16, LABELS)
    assert tree.settings["dataset"] == Dataset.open(own).content_hash
    with threads_kept():
        session.Session(tiny(own, tmp_path / "other", **options, seed=1))
    assert len(list((tmp_path / "cache" / "trees").iterdir())) == 2
