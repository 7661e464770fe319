"""docs/recipes.md and docs/renee_flags.md say what the recipes and the flags are."""

import re
from dataclasses import fields

import pytest
from train_runs import RECIPES, ROOT, Config

from xmlkernels.cli import main as command
from xmlkernels.data.prepare import PrepareConfig
from xmlkernels.options import flag, names_in
from xmlkernels.training.config import CASCADE

# Every flag of Renee's main.py, CreateTokenizedFiles.py and CreateAugData.py.
RENEE = set(
    re.findall(
        r"--[\w-]+",
        """
        --data-dir --custom-cuda --default-impl --batch-size --epochs --expname --device
        --dist-url --rank --world-size --seed --bottleneck-dims --dropout --lr1 --lr2 --mo --wd1
        --wd2 --fp32encoder --fp16xfc --noloss --checkpoint-resume --infer --warmup --accum
        --pre-tok --maxlen --tf --use-ngame-encoder --compile --max-length --tokenizer-type
        --num-threads --output-folder --tokenize-label-texts --tokenization-folder --max-len
        """,
    )
)


def rows(page: str) -> list[list[str]]:
    lines = (ROOT / "docs" / page).read_text("utf-8").splitlines()
    cells = [line.replace(r"\|", "/").strip("| ").split(" | ") for line in lines if line[:1] == "|"]
    return [row for row in cells if not set(row[0]) <= set("-|")]


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_of_recipes_has_each_as_it_is(name: str) -> None:
    recipe = RECIPES[name]
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    row = f"| `{name}` | {recipe.what} | {f'{recipe.when} {recipe.time}'.strip()} |"
    section = text.partition(f"## {recipe.group[0].upper()}{recipe.group[1:]}\n")[2]
    assert row in section.partition("\n## ")[0], f"docs/recipes.md needs\n{row}"


def test_the_page_of_recipes_has_no_others() -> None:
    named = [row[0].strip("`") for row in rows("recipes.md") if row[0].startswith("`")]
    assert sorted(named) == sorted([*RECIPES, *RECIPES.old])
    old = {row[0].strip("`"): row[1].strip(" |`") for row in rows("recipes.md") if len(row) == 2}
    assert RECIPES.old.items() <= old.items()


def test_every_flag_of_renee_has_a_row() -> None:
    named = [word for row in rows("renee_flags.md") for word in re.findall(r"`(--[\w-]+)", row[0])]
    assert set(named) == RENEE


def test_the_flags_named_for_renee_s_are_ours() -> None:
    ours = {flag(field.name) for field in fields(Config)}
    prepare = {flag(field.name) for field in fields(PrepareConfig)}
    for row in rows("renee_flags.md"):
        assert len(row) in (2, 3), row
        for code in re.findall(r"`([^`]+)`", row[1]):
            told = re.findall(r"--[a-z][a-z-]+", code)
            words = code.split()
            if words[0] == "torchrun":
                continue
            if words[0] == "xmlkernels":
                assert words[1] in command.COMMANDS, code
                known = prepare if words[1] == "prepare" else {"--checkpoint"}
            else:
                known = prepare | ours if "prepare" in row[1] else ours
            assert told and set(told) <= known, code


def test_every_option_end_to_end_is_named() -> None:
    """Those of a cascade and of a bag of words are not Renee's."""
    text = (ROOT / "docs" / "renee_flags.md").read_text("utf-8")
    named = {
        word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"--[\w-]+", code)
    }
    for name in (
        "dataset", "output", "label_text", "encoder", "bottleneck", "dropout", "precision",
        "compile", "init_state", "init_prefix", "table", "table_optimizer", "momentum", "state",
        "table_decay", "decoupled", "epochs", "batch", "micro_batch", "encoder_lr", "table_lr",
        "encoder_decay", "encoder_epsilon", "warmup", "warmup_epochs", "clip", "loss_every", "seed",
        "evaluate_every", "best_by", "top_k", "save_every", "keep", "resume", "overwrite",
    ):  # fmt: skip
        assert flag(name) in named, name
    assert not {flag(name) for name in names_in(Config, CASCADE)} & named
