"""The recipe `auto`: one's own table in, a trained model out.

What is chosen on the way is in `choosing`.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypedDict

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.dataset_writer import Tell
from xmlkernels.data.prepare import PrepareConfig, cache_key, prepare
from xmlkernels.data.tables.options import Tables
from xmlkernels.data.tables.read import files_of
from xmlkernels.data.tables.repository import repository_files
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.errors import InputError
from xmlkernels.installed import source_of
from xmlkernels.options import NAME, OFF_AT_0, POSITIVE, check_values, of
from xmlkernels.records import read_record
from xmlkernels.report.run import CHOICES

DATA, TIME = "what is trained", "time and place"
SHARE = 0.1


@dataclass(frozen=True)
class AutoConfig:
    """What to train on, and in what time; all flags of the recipe that is chosen may be given."""

    tables: Tables = field(default_factory=Tables)
    """One's own table."""
    minutes: float = of(TIME, 10.0, POSITIVE)
    """Time for the whole command: decides between a linear model and a transformer, and how many
    trees or epochs. When it is over, training ends with a whole run; --resume goes on with it."""
    recipe: Literal["auto", "linear", "bow", "minilm", "cascade"] = of(TIME, "auto")
    """Which recipe; auto: chosen from the data, the machine and --minutes."""
    output: str = of(TIME, "runs/auto", NAME)
    """Folder of the trained model."""
    cache: str = of(TIME, "cache", NAME)
    """Where the prepared dataset and label trees are kept, by content: a second run finds them."""
    validation_share: float | None = of(DATA, None)
    """Share of the texts that becomes the validation split; by default 0.1, or none where there are
    files, a column or names that split."""
    max_length: int = of(DATA, 0, OFF_AT_0)
    """Tokens kept of each text, for a transformer; 0: what nine tenths of the texts need, up to
    128, or 256 on a GPU."""
    unlabelled: Literal["keep", "drop-train", "drop"] = of(DATA, "drop-train")
    """Documents without a label: keep them, drop them from training, or drop them all."""


def prepared(
    config: AutoConfig, given: Collection[str], tokenizer: str | None, tokens: int, tell: Tell
) -> Dataset:
    """Make the dataset of the tables in the cache, or open the one of the same content.

    Args:
        config: the settings.
        given: the fields that somebody chose.
        tokenizer: of the encoder; None for words alone.
        tokens: kept of each text.
        tell: receives a line now and then.

    Raises:
        InputError: the tables cannot be read.
    """
    check_values(config)
    tables = config.tables
    if tables.data is None:
        mend = "name a .csv, .tsv, .jsonl, .parquet or other table"
        raise InputError("--data", "a table of texts and labels", "none", mend)
    validation, test = shares(config, given)
    stem = "stdin" if str(tables.data) == "-" else tables.data.resolve().name.split(".")[0]
    source = None if tokenizer is None else source_of(tokenizer)
    settings = PrepareConfig(
        Path(config.cache),
        source,
        max_length=tokens,
        name=stem or "table",
        tables=replace(tables, test_share=test),
        validation_share=validation,
        unlabelled=config.unlabelled,
        keep_texts=True,
    )
    key = cache_key(settings, None if source is None else load_tokenizer(source))
    output = Path(config.cache) / f"{settings.name}-{key[:12]}"
    return prepare(replace(settings, output=output), tell, wait=True)


def shares(config: AutoConfig, given: Collection[str]) -> tuple[float, float]:
    """Return the shares of validation and test: a tenth each where nothing else splits."""
    tables, validation = config.tables, config.validation_share
    there: Collection[str] = ()
    if tables.data is not None:
        known = repository_files(tables.data) if tables.data.is_dir() else None
        there = known[1] if known else files_of(tables)
    # Who names a test file and no validation still wants one to choose on.
    none = tables.split_column or "val" in there
    if validation is None:
        validation = 0.0 if none else SHARE
    test = tables.test_share
    if "test_share" not in given and not tables.split_column and "test" not in there:
        test = SHARE
    return validation, test


class Before(TypedDict):
    """What a run is taken up from, of its choices.json."""

    recipe: str
    flags: list[list[str]]


def chosen_before(output: str) -> Before | None:
    """Return recipe and flags of the run in a folder; None where `auto` has finished none there.

    Raises:
        InputError: choices.json is damaged, or of a version that could not be resumed.
    """
    path = Path(output) / CHOICES
    if not path.is_file():
        return None
    return read_record(path, Before, mend="replace the run with --overwrite")
