"""Settings of `prepare`: which raw files, how they are read, and what contradicts each other."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from xmlkernels.data.formats import Divider, LabelFormat
from xmlkernels.data.formats.lf_json import is_lf_json
from xmlkernels.data.layouts import (
    Fields,
    Reading,
    Source,
)
from xmlkernels.data.raw import Files
from xmlkernels.data.tables.options import Tables, check_tables
from xmlkernels.errors import InputError

# A and B of Jain et al. 2016, as the published results use them; never guessed from a name.
PROPENSITIES = {"default": (0.55, 1.5), "amazon": (0.6, 2.6), "wikipedia": (0.5, 0.4)}


@dataclass(frozen=True)
class PrepareConfig:
    """Make a dataset folder from raw files or from the built-in corpus."""

    output: Path
    """Folder to make."""
    tokenizer: str | None = None
    """Hugging Face name, a local folder, or "minilm", the installed all-MiniLM-L6-v2. Without one
    the folder holds the texts alone, for a bag of words and the ranker."""
    max_length: int = 128
    """Tokens kept of each text, special tokens included."""
    source: Source = "text"
    """text: one text per line and a label file; lf: JSON lines with texts and targets;
    attentionxml: raw texts with /SEP/ and label names; bow: bags of words; docstrings: the built-in
    corpus, which needs no files."""
    name: str | None = None
    """Name of the dataset; the output folder's by default."""
    # ---- a table of your own ----
    tables: Tables = field(default_factory=Tables)
    """A table of texts and labels, its columns and its splits."""
    # ---- raw files ----
    train_text: Path | None = None
    """Training texts, one per line; plain, .gz, .bz2 or .xz (lf: the JSON lines; bow: train.txt
    with its labels, or features alone)."""
    train_labels: Path | None = None
    """Training labels, a row a document: label ids (`3 17`, `3,17`; a blank line has none), the
    same behind a header (`documents labels`, then `3:1 17:1`), an old bag-of-words file, .npz or
    JSON lines (bow: with features alone). attentionxml: label names divided by tabs, commas or
    spaces."""
    train_filter: Path | None = None
    """Pairs `row label` never to be predicted."""
    validation_text: Path | None = None
    """Validation texts; see also validation-share."""
    validation_labels: Path | None = None
    """Validation labels."""
    validation_filter: Path | None = None
    """Pairs `row label` of the validation split."""
    test_text: Path | None = None
    """Test texts."""
    test_labels: Path | None = None
    """Test labels."""
    test_filter: Path | None = None
    """Pairs `row label` of the test split."""
    label_text: Path | None = None
    """Label texts, one per line (lf: lbl.json): names, and the virtual documents of label-text
    augmentation (bow: features of the labels)."""
    label_names: Path | None = None
    """Label names, one per line, where they are not the label texts."""
    token_maps: Path | None = None
    """Folder of upstream's {trn_doc,tst_doc,lbl}_{input_ids,attention_mask}.dat to take instead of
    texts.
    """
    # ---- how they are read ----
    label_format: LabelFormat | None = None
    """Format of the label files, where it cannot be seen: sparse has a header, lines has none."""
    label_divider: Divider | None = None
    """attentionxml: what divides the label names of a line; by default tabs where there is any,
    else commas where most lines of several words have one, else spaces."""
    fields: Fields = "all"
    """lf and attentionxml: which part of a text to use."""
    num_labels: int | None = None
    """Number of labels, where neither a header nor label texts say it."""
    merge_duplicates: bool = False
    """Count a label once that a row names twice; otherwise that is an error."""
    remap_labels: bool = False
    """Give the labels that documents have new numbers from 0, as ids of a database need. The old
    ids stay as their names.
    """
    # ---- documents and metrics ----
    documents: int | None = None
    """docstrings: take a deterministic part of about this many documents."""
    validation_share: float = 0.0
    """Share of the training documents, drawn by seed, that becomes the validation split; of a
    table's by a hash of each text, so that equal texts stay together."""
    seed: int = 0
    """Draws the validation share."""
    unlabelled: Literal["keep", "drop-train", "drop"] = "keep"
    """Documents without a label: keep them, drop them from training (and its validation share), or
    drop them all.
    """
    propensity: Literal["default", "amazon", "wikipedia"] = "default"
    """PSP constants A and B: 0.55 and 1.5, 0.6 and 2.6, 0.5 and 0.4."""
    propensity_a: float | None = None
    """A, instead of the preset's."""
    propensity_b: float | None = None
    """B, instead of the preset's."""
    # ---- the folder ----
    keep_texts: bool = False
    """Keep the texts in the folder, to show them with predictions."""
    overwrite: bool = False
    """Replace a dataset folder made from other inputs or damaged."""

    @property
    def files(self) -> dict[str, Files]:
        """The raw files of each split that has any."""
        every = {
            "train": Files(self.train_text, self.train_labels, self.train_filter),
            "val": Files(self.validation_text, self.validation_labels, self.validation_filter),
            "test": Files(self.test_text, self.test_labels, self.test_filter),
        }
        return {name: files for name, files in every.items() if files != Files()}

    @property
    def reading(self) -> Reading:
        """How the files are read."""
        own = {field.name for field in fields(self)}
        return Reading(
            **{
                field.name: getattr(self, field.name)
                for field in fields(Reading)
                if field.name in own
            }
        )

    @property
    def dataset_name(self) -> str:
        """The name given, or the output folder's."""
        return self.name or self.output.resolve().name

    @property
    def constants(self) -> tuple[float, float]:
        """(A, B) of the inverse propensities."""
        a, b = PROPENSITIES[self.propensity]
        given = self.propensity_a, self.propensity_b
        return (a if given[0] is None else given[0], b if given[1] is None else given[1])


def check(config: PrepareConfig) -> None:
    """Raise InputError for settings that contradict each other, before any file is read."""
    texts = [files.text for files in config.files.values()]
    own = config.tables.data is not None
    rules = [
        (
            own or config.tables == Tables(),
            "--data",
            "a table, for the flags of one",
            "none",
            "name one, or leave them out",
        ),
        (
            not own
            or (
                config.source == "text"
                and not config.files
                and not config.token_maps
                and config.label_text is None
                and config.label_names is None
                and config.num_labels is None
                and not config.remap_labels
            ),
            "--data",
            "no flags of raw files beside it",
            "both",
            "choose one; --label-file names the labels of a table",
        ),
        (
            config.max_length >= 1,
            "--max-length",
            "at least 1",
            config.max_length,
            "choose a longer one",
        ),
        (
            0 <= config.validation_share < 1,
            "--validation-share",
            "from 0 to below 1",
            config.validation_share,
            "mend it",
        ),
        (
            0 <= config.seed < 2**64,
            "--seed",
            "an integer from 0 to 2**64 - 1",
            config.seed,
            "choose another",
        ),
        (
            not config.validation_share
            or ("val" not in config.files and config.source != "docstrings"),
            "--validation-share",
            "0 beside a validation split",
            config.validation_share,
            "give one of the two",
        ),
        (
            min(config.constants) > 0,
            "--propensity",
            "positive A and B",
            config.constants,
            "mend them",
        ),
        (
            config.num_labels is None or config.num_labels > 0,
            "--num-labels",
            "at least 1",
            config.num_labels,
            "mend it",
        ),
        (
            config.documents is None or config.documents > 0,
            "--documents",
            "at least 1",
            config.documents,
            "mend it",
        ),
        (
            config.documents is None or config.source == "docstrings",
            "--documents",
            "--source docstrings",
            config.source,
            "leave it out",
        ),
        (
            own or (config.source == "docstrings") != ("train" in config.files),
            "--source",
            "training files, or docstrings without",
            config.source,
            "give --data TABLE, or --train-text and --train-labels, or --source docstrings alone",
        ),
        (
            config.tokenizer is not None or config.token_maps is None,
            "--tokenizer",
            "the one that made the token maps",
            "none",
            "give its name or folder",
        ),
        (
            config.source != "bow" or config.tokenizer is None,
            "--tokenizer",
            "none for bags of words",
            config.tokenizer,
            "leave it out",
        ),
        (
            config.source != "bow" or not config.keep_texts,
            "--keep-texts",
            "texts",
            "bags of words",
            "leave it out",
        ),
        (
            config.source != "text" or not any(path and is_lf_json(path) for path in texts),
            "--source",
            "lf for JSON lines",
            config.source,
            "give --source lf",
        ),
        (
            config.token_maps is None or config.source == "text",
            "--token-maps",
            "--source text",
            config.source,
            "leave it out",
        ),
        (
            config.token_maps is not None or config.source == "docstrings" or None not in texts,
            "--train-text",
            "a text file for each split",
            "none",
            "give --train-text, --validation-text and --test-text as needed",
        ),
        (
            config.source != "lf" or not any(files.labels for files in config.files.values()),
            "--train-labels",
            "none beside JSON lines, which hold their targets",
            "a label file",
            "leave it out",
        ),
        (
            not config.keep_texts or config.token_maps is None or None not in texts,
            "--keep-texts",
            "text files",
            "none",
            "give the texts beside the token maps",
        ),
        (
            config.fields == "all" or config.source in ("lf", "attentionxml"),
            "--fields",
            "--source lf or attentionxml",
            config.source,
            "leave it out",
        ),
        (
            config.label_divider is None or config.source == "attentionxml",
            "--label-divider",
            "--source attentionxml",
            config.source,
            "leave it out",
        ),
    ]
    for good, where, expected, got, mend in rules:
        if not good:
            raise InputError(where, expected, str(got), mend)
    if own:
        check_tables(config.tables, config.validation_share)
