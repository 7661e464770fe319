"""The command line: help in groups, and one sentence for every mistake, with the nearest name."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from train_runs import RECIPES, Config

from xmlkernels import InputError
from xmlkernels.cli import arguments, console, train
from xmlkernels.cli.flags import flags_of
from xmlkernels.data.prepare import PrepareConfig
from xmlkernels.training.ranker_config import RankerConfig
from xmlkernels.training.tree import TreeConfig

COMMANDS = {"prepare": PrepareConfig, "tree": TreeConfig, "rank": RankerConfig} | {
    name: import_module(f"xmlkernels.cli.{name}").Options
    for name in ("predict", "ensemble", "export", "neighbours")
}
PLACED = ("tree", "ensemble")


def mistake(*words: str, of: str = "") -> str:
    with pytest.raises(InputError) as told:
        if of:
            arguments.parse(
                COMMANDS[of], f"xmlkernels {of}", "", positional=of in PLACED, words=words
            )
        else:
            arguments.parse_named(RECIPES, "recipe", "xmlkernels train", "", words)
    text = str(told.value)
    assert "\n" not in text and not set("│╭─") & set(text), text
    return text


def test_values_are_read() -> None:
    words = (
        "cascade-tiny",
        "--topk",
        "3",
        "9",
        "--encoder_lr=0.5",
        "--no-label-text",
        "--layers",
        "1,2",
        "2",
        "2",
    )
    config: Config = arguments.parse_named(RECIPES, "recipe", "xmlkernels train", "", words)
    assert (config.topk, config.encoder_lr, config.label_text, config.layers) == (
        (3, 9),
        0.5,
        False,
        ("1,2", "2", "2"),
    )
    assert config.output == "runs/cascade-tiny" and config.epochs == 8  # the recipe's
    ranker: Any = arguments.parse(
        COMMANDS["rank"],
        "",
        "",
        words=("--dataset", "d", "--output", "o", "--cost", "2", "--share", "0.5", "--no-tfidf"),
    )
    assert (ranker.training.cost, ranker.share, ranker.tfidf) == (2.0, 0.5, False)
    tree: Any = arguments.parse(
        COMMANDS["tree"], "", "", positional=True, words=("folder", "--depths", "2", "4")
    )
    assert (tree.dataset, tree.depths) == ("folder", (2, 4))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("bow-",), "did you mean bow-eurlex57k-titles or bow-debian-deps?"),
        (("cascade-tny",), "did you mean cascade-tiny"),
        (("unlike-any",), "; xmlkernels train --help tells of each"),
        (("--epochs", "3"), "expected a recipe, got '--epochs'"),
        (("tiny", "--learning-rate", "3"), "did you mean --encoder-lr or --table-lr?"),
        (
            ("tiny", "--epoch=3"),
            "--epoch: expected a flag of this command, got none of that name; did you mean "
            "--epochs?",
        ),
        (("tiny", "--batch-size", "3"), "did you mean --batch?"),
        (("tiny", "--epochs", "many"), "--epochs: expected a whole number, got 'many'"),
        (("tiny", "--epochs"), "--epochs: expected a whole number, got nothing"),
        (
            ("tiny", "--table", "fp23"),
            "--table: expected one of auto, fp32, bf16, fp16, fp8, got 'fp23'",
        ),
        (
            ("tiny", "--topk", "1", "x"),
            "--topk: expected whole numbers, with spaces between them, got '1' 'x'",
        ),
        (("tiny", "--compile", "yes"), "expected flags and their values, got 'yes'"),
        (("tiny", "stray"), "expected flags and their values, got 'stray'"),
    ],
)
def test_mistakes_of_a_run(words: tuple[str, ...], expected: str) -> None:
    assert expected in mistake(*words)


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_of_every_command(name: str) -> None:
    assert "did you mean --output?" in mistake("--outptu", "x", of=name)
    assert f"xmlkernels {name} --help lists them" in mistake("--zzzz", of=name)
    required = {
        "prepare": "--output",
        "tree": "DATASET",
        "ranker": "--dataset",
        "export": "--checkpoint",
    }
    if name in required:
        assert mistake(of=name).startswith(f"{required[name]}: expected ")


def test_what_settings_refuse_names_the_flag() -> None:
    words = ("--dataset", "d", "--output", "o", "--epochs", "0")
    assert (
        mistake(*words, of="rank")
        == "--epochs: expected 1 or more, got 0; train for at least one pass"
    )


def test_a_text_is_taken_as_it_is() -> None:
    """A word behind --text is no flag, whatever it begins with."""
    flags = flags_of(COMMANDS["predict"])
    arguments.refuse_unknown(("--text", "--outptu", "--top-k", "3"), flags, "")
    with pytest.raises(InputError, match="did you mean --output"):
        arguments.refuse_unknown(("--text", "a", "--outptu", "3"), flags, "")


@pytest.mark.parametrize("name", ["run", *COMMANDS])
def test_help_tells_of_every_flag_and_no_comment(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = COMMANDS.get(name, Config)
    with pytest.raises(SystemExit) as ended:
        if name == "run":
            arguments.parse_named(RECIPES, "recipe", "xmlkernels train", "", ("tiny", "--help"))
        else:
            arguments.parse(
                kind,
                f"xmlkernels {name}",
                "What it does.",
                positional=name in PLACED,
                words=["--help"],
            )
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "----" not in shown
    for flag in flags_of(kind, positional=name in PLACED):
        assert flag.told, f"{flag.name} has no help"
        assert f"  {flag.shown}" in shown and flag.told.split()[0] in shown
    groups = {
        "run": ("data", "encoder", "label table", "training"),
        "prepare": ("raw files", "how they are read"),
        "tree": ("graph of labels",),
        "predict": ("texts", "answers"),
        "ranker": ("features", "training", "result"),
    }
    assert all(f"\n{group}:\n" in shown for group in groups.get(name, ("flags",)))
    if name == "run":
        assert "--epochs N " in shown and "[2]" in shown  # the recipe's


def test_help_of_recipes_and_of_one_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["tiny", "--help", "--rw-loss"]):
        with pytest.raises(SystemExit):
            arguments.parse_named(RECIPES, "recipe", "xmlkernels train", "Trains.", words)
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in RECIPES)
    headings = [line for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [f"{group}:" for group in dict.fromkeys(r.group for r in RECIPES.values())]
    assert "weights in proportion to the candidates" in " ".join(shown.split())
    assert "--epochs N" not in shown


def test_train_without_a_recipe_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main([])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == ""
    told = " ".join(shown.err.split())
    for name, recipe in RECIPES.items():
        assert f"  {name}" in shown.err and recipe.what in told and recipe.time in told


def test_a_recipe_s_help_begins_with_its_own_text(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("minilm", "lf-amazontitles-131k"):
        with pytest.raises(SystemExit):
            train.main([name, "--help"])
        shown = capsys.readouterr().out
        told = " ".join(shown.split("\n\ndata:\n")[0].replace("\\\n", "").split())
        recipe = RECIPES[name]
        assert shown.startswith(f"usage: xmlkernels train {name} ")
        for text in (recipe.what, recipe.time, recipe.needs, *recipe.commands):
            assert " ".join(text.split()) in told


def test_a_mistake_ends_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xmlkernels", "tree", "--thread", "1"],
        timeout=300,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --thread: expected a flag of this command")
    assert "--threads?" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--help",), ("--epochs", "3")])
def test_the_demo_takes_no_flags(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains for minutes: not where somebody asked what it is."""
    demo = import_module("xmlkernels.cli.demo")
    monkeypatch.setattr(demo, "run", lambda: pytest.fail("the demo began"))
    with pytest.raises(SystemExit if words == ("--help",) else InputError):
        demo.main(words)
    assert ("baseline" in capsys.readouterr().out) == (words == ("--help",))


def test_a_text_of_help_is_a_text() -> None:
    options: Any = arguments.parse(
        COMMANDS["predict"], "", "", words=("--text", "--help", "--top-k", "3")
    )
    assert (options.text, options.top_k) == ("--help", 3)


def test_a_tenth_whose_labels_no_document_has_shows_no_zeros(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"decile": 1, "labels": 3, "positives": 0, "R@1": 0.0, "P@1": 0.0}
    console.print_deciles([row, row | {"decile": 2, "positives": 1}])
    empty, other = capsys.readouterr().out.splitlines()[-3:-1]
    assert empty.count("–") == 2 and other.count("0.00") == 2
