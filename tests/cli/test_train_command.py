"""`xmlkernels train`: what it makes of a recipe and its flags before it trains."""

from pathlib import Path

import pytest
from train_runs import RECIPES, Config, make_dataset

from xmlkernels import InputError
from xmlkernels.cli import train as command


class Asked:
    """Takes the place of training: keeps the configuration."""

    def __init__(self) -> None:
        self.config = Config()

    def __call__(self, config: Config, deadline: object = None) -> dict[str, object]:
        self.config = config
        return {}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(command, "train", asked)
    monkeypatch.setattr(command, "print_metrics", lambda *_: None)
    return asked


def test_the_dataset_decides_what_no_flag_does(
    asked: Asked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = str(make_dataset(tmp_path))
    caplog.set_level("INFO", "xmlkernels")
    command.main(["cascade", "--dataset", own])
    assert asked.config.label_text and asked.config.tree_depths == (2,)
    assert f"{own} has label texts" in caplog.text and "--tree-depths 2 " in caplog.text
    command.main(["cascade", "--dataset", own, "--no-label-text", "--tree-depths", "1", "3"])
    assert not asked.config.label_text and asked.config.tree_depths == (1, 3)
    command.main(["bow", "--dataset", own, "--no-label-text"])
    assert not asked.config.label_text


@pytest.mark.parametrize("words", [["--tree-depths", "2000"], ["--topk", "0"], ["--epochs", "0"]])
def test_bad_settings_are_refused_before_the_dataset_decides(
    words: list[str], asked: Asked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = str(make_dataset(tmp_path))
    caplog.set_level("INFO", "xmlkernels")
    with pytest.raises(InputError) as error:
        command.main(["cascade", "--dataset", own, *words])
    assert error.value.where == words[0] and not caplog.text


def test_an_old_name_is_told_once(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    command.main(["docstrings", "--epochs", "3"])
    assert asked.config.output == "runs/docstrings" and asked.config.epochs == 3
    assert caplog.text.count("recipe 'docstrings' is now called 'minilm'") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["minilm", "--batch", "64"],
            "batch 64 in place of the recipe's 32 with its --table-lr 0.05: the loss is a sum, so "
            "a step of the table is now 2 times as long; where the loss grows, lower the rate to "
            "0.025",
        ),
        (["minilm", "--accumulate", "4"], "batch 128 in place of the recipe's 32"),
        (["minilm", "--batch", "64", "--table-lr", "0.05"], ""),
        (["minilm", "--batch", "16", "--accumulate", "2"], ""),
        (["bow", "--batch", "64"], ""),  # Adam
        (["cascade", "--batch", "64"], ""),  # means
    ],
)
def test_a_rate_that_belongs_to_another_batch_is_told(
    words: list[str], told: str, asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xmlkernels")
    command.main(words)
    assert told in caplog.text and ("in place of the recipe's" in caplog.text) == bool(told)
    assert asked.config.output == RECIPES[words[0]].config.output


def test_flags_before_the_recipe_are_a_mistake() -> None:
    with pytest.raises(InputError, match="expected a recipe, got '--batch'"):
        command.main(["--batch", "64", "minilm"])


def test_an_init_state_can_be_left_out(asked: Asked) -> None:
    """A published setting from NGAME's encoder, without it."""
    command.main(["lf-amazontitles-131k", "--init-state", "", "--device", "cpu"])
    assert asked.config.init_state == ""
