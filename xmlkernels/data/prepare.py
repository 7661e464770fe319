"""Make a dataset folder from raw files or tables, once for each content of the inputs.

The folder is built next to its place and renamed: it is there whole or not at all. Its key is a
hash of the content of every input, of the tokenizer and of the settings; a name alone never decides
that a folder can be used again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from xmlkernels.data import manifest, token_store
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.dataset_writer import Tell, make_once, write_folder
from xmlkernels.data.label_ids import label_lines, name_lines
from xmlkernels.data.layouts import (
    docstrings_digest,
    map_files,
    read_docstrings,
    read_files,
)
from xmlkernels.data.prepare_config import PrepareConfig, check
from xmlkernels.data.raw import Raw, choose_rows
from xmlkernels.data.tables.read import inputs_of, read_tables
from xmlkernels.data.tables.splits import split_by_hash
from xmlkernels.data.tokens import Tokenizer, load_tokenizer
from xmlkernels.errors import InputError
from xmlkernels.locks import check_place

__all__ = ["PrepareConfig", "cache_key", "prepare"]

# Settings that came later: left as they were they are no part of the key, so that folders made
# before are known again.
NEWER = {"label_divider": None, "remap_labels": False}
# Bump when the same inputs would give another folder.
RECIPE_VERSION = 1


def prepare(
    config: PrepareConfig,
    tell: Tell = lambda line: None,
    *,
    flag: str = "--output",
    wait: bool = False,
) -> Dataset:
    """Make the dataset folder, or open the one that already holds just this.

    Args:
        tell: receives a line now and then: what is read, counts, progress.
        flag: what names the output, for messages.
        wait: for another process that makes a dataset there; otherwise it is refused.

    Raises:
        InputError: a setting or file that cannot be used, or `output` holds something else or is in
            use. Nothing is then left behind, and an older dataset stays.
    """
    check(config)
    check_place(config.output, flag)
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    if (
        tokenizer
        and tokenizer.model_max_length is not None
        and config.max_length > tokenizer.model_max_length
    ):
        tell(
            f"--max-length {config.max_length} is beyond the {tokenizer.model_max_length} tokens "
            "the tokenizer is made for"
        )
    separator = _separator(config, tokenizer)
    key = cache_key(config, tokenizer, separator)
    output = config.output
    dataset, stood = make_once(
        output,
        key,
        lambda: Dataset.open(output, verify=config.overwrite),
        lambda _: _make(config, tokenizer, separator, key, tell),
        overwrite=config.overwrite,
        flag=flag,
        wait=tell if wait else None,
    )
    if stood:
        tell(f"{output}: made from the same inputs before, used again")
    return dataset


def _make(
    config: PrepareConfig, tokenizer: Tokenizer | None, separator: str, key: str, tell: Tell
) -> None:
    built_in = config.source == "docstrings"
    reading = replace(config.reading, separator=separator)
    table = config.tables.data is not None
    if table:
        raw = _own(config, tell)
    else:
        raw = read_docstrings(config.documents) if built_in else read_files(reading, config.files)
    if built_in:
        tell(
            f"built-in corpus {raw.facts['corpus_hash'][:16]} of "
            f"{len(raw.facts['corpus_versions'])} packages"
        )
    _tell_separator(config, tokenizer, tell)
    if tokenizer is None and config.source != "bow":
        tell("no --tokenizer: the texts alone, for a bag of words and the ranker")
    for line in label_lines(raw) + (
        name_lines(raw.label_names or []) if config.source == "attentionxml" else []
    ):
        tell(line)
    drop = {"keep": (), "drop-train": ("train",), "drop": ("train", "val", "test")}[
        config.unlabelled
    ]
    drawn = 0.0 if table else config.validation_share  # by hash, and before
    choose_rows(raw, drop=drop, validation_share=drawn, seed=config.seed)
    facts = {
        "kind": "table" if table else config.source,
        "seed": config.seed,
        "unlabelled": config.unlabelled,
    }
    write_folder(
        config.output,
        raw,
        tokenizer,
        name=config.dataset_name,
        key=key,
        max_length=config.max_length,
        keep_texts=config.keep_texts,
        propensity=config.constants,
        tokenizer_name=config.tokenizer,
        source=facts | raw.facts,
        overwrite=config.overwrite,
        tell=tell,
    )


def _own(config: PrepareConfig, tell: Tell) -> Raw:
    """Read one's own tables, and split them as the settings say."""
    tables = config.tables
    raw, told = read_tables(tables)
    for line in told:
        tell(line)
    shares = {"validation": config.validation_share, "test": tables.test_share}
    split_by_hash(raw, **shares, seed=config.seed)
    return raw


def _separator(config: PrepareConfig, tokenizer: Tokenizer | None) -> str:
    """Return what joins title and body: the tokenizer's separator or a space.

    The separator is what CascadeXML's texts have.
    """
    joined = config.source in ("lf", "attentionxml") and config.fields == "all"
    return f" {tokenizer.separator} " if joined and tokenizer and tokenizer.separator else " "


def _tell_separator(config: PrepareConfig, tokenizer: Tokenizer | None, tell: Tell) -> None:
    if config.source in ("lf", "attentionxml") and config.fields == "all":
        own = tokenizer and tokenizer.separator
        tell(
            f"title and body: joined by {own}"
            if own
            else "title and body: joined by a space: the tokenizer has no separator"
        )


def cache_key(config: PrepareConfig, tokenizer: Tokenizer | None, separator: str = " ") -> str:
    """Return the sha256 of the content of every input file, the tokenizer and the settings.

    Settings are those that shape the folder.
    """
    settings = asdict(config)
    for name in (
        "output",
        "overwrite",
        "tokenizer",
        "propensity",
        "propensity_a",
        "propensity_b",
        "token_maps",
    ):
        del settings[name]
    own = settings.pop("tables")
    if not own["text_parts"]:  # as before there was such a setting
        del own["text_parts"]
    if config.tables.data is not None:
        paths = [name for name, value in own.items() if isinstance(value, Path)]
        # Two files of a folder may not change places: their order is that of the documents.
        own |= dict.fromkeys(paths, "") | {"files": list(map(_digest, inputs_of(config.tables)))}
        settings["tables"] = own
    for name, usual in NEWER.items():
        if settings[name] == usual:
            del settings[name]
    if separator != " ":
        settings["separator"] = separator
    if config.source == "attentionxml":
        settings["divided"] = 2  # how lines of label names are: by white space alone in version 1
    inputs = {name: _digest(value) for name, value in settings.items() if isinstance(value, Path)}
    if config.token_maps is not None:
        inputs |= {
            path.name: _digest(path) for path in map_files(config.token_maps, list(config.files))
        }
    if config.source == "docstrings":
        inputs["corpus"] = docstrings_digest()
    settings |= {"name": config.dataset_name, "constants": config.constants} | inputs
    versions = [RECIPE_VERSION, manifest.FORMAT_VERSION, token_store.FORMAT_VERSION]
    settings |= {"tokenizer": tokenizer and tokenizer.hash, "versions": versions}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(
            str(path), "a file", "a folder" if path.is_dir() else "no such file", "check the path"
        )
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
