"""What to plan for: the flags of `xmlkernels plan`, and the sizes that they name or find.

Letters: L labels, T tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from xmlkernels import InputError
from xmlkernels.data.inputs import BowInputs
from xmlkernels.options import COUNT, OFF_AT_0, check_values, of
from xmlkernels.planner import Card, card_of
from xmlkernels.training.config import Config
from xmlkernels.training.data_sets import DATA_SETS
from xmlkernels.training.facts import BalancedTree, Facts, TreeShape, facts_of
from xmlkernels.training.inputs import open_dataset, open_inputs
from xmlkernels.training.recipe import Recipe
from xmlkernels.tree.label_tree import LabelTree

SIZES, MACHINES = "sizes, where the dataset is not there", "devices and their rates"
GB = 10**9
_WORDS = 50  # of a bag, where nobody says how many
_FLAGS = "the flags"
_TERMS = 30_522  # of a transformer's vocabulary: BERT's


@dataclass(frozen=True)
class PlanConfig:
    """What to plan for; the other flags are those of `xmlkernels train RECIPE`."""

    labels: int = of(SIZES, 0, OFF_AT_0)
    """Labels; 0 takes those of --dataset, or of the data set that the recipe names. With it,
    --documents is the number of training documents."""
    dim: int = of(SIZES, 0, OFF_AT_0)
    """Width of the embedding: --bow-width of a bag of words, --bottleneck of a transformer; 0
    leaves it to the recipe."""
    validation: int = of(SIZES, 0, OFF_AT_0)
    """Documents of the validation split."""
    test: int = of(SIZES, 0, OFF_AT_0)
    """Documents of the test split."""
    longest: int = of(SIZES, 0, OFF_AT_0)
    """Tokens of the longest document, for a transformer."""
    words: float = of(SIZES, 0.0, OFF_AT_0)
    """Tokens, or terms of a bag of words, of a document on average; 0: --longest, or 50 terms."""
    positives: float = of(SIZES, 5.0, OFF_AT_0)
    """Labels of a document, on average."""
    vocabulary: int = of(SIZES, 0, OFF_AT_0)
    """Terms of a bag of words, or tokens of a transformer's vocabulary."""

    gpus: int = of(MACHINES, 1, COUNT)
    """Processes, each with a device of its own; on a CPU they share the machine."""
    memory: float = of(MACHINES, 0.0, OFF_AT_0)
    """GB (10^9 bytes) of one device; 0: what the device has."""
    host_memory: float = of(MACHINES, 0.0, OFF_AT_0)
    """GB of the host that a process beside a card may take; 0: not looked at."""
    copy_rate: float = of(MACHINES, 0.0, OFF_AT_0)
    """GB/s that a device reads and writes in a large copy; 0: what is known of it."""
    mm_rate: float = of(MACHINES, 0.0, OFF_AT_0)
    """TFLOP/s of a device's matrix products, in all formats; 0: what is known of it."""
    wire_rate: float = of(MACHINES, 0.0, OFF_AT_0)
    """GB/s that a process receives from others; 0: what is known of the device."""
    store_rate: float = of(MACHINES, 0.0, OFF_AT_0)
    """GB/s at which rows of --table-store host or file: are read and written; 0: 25 between a card
    and the host (PCIe 4 x16), 2 of a disk, as assumed."""
    price: float = of(MACHINES, 0.0, OFF_AT_0)
    """Money per device and hour."""

    run: Config = field(default_factory=Config)
    """The run itself."""


@dataclass(frozen=True)
class Subject:
    """What is planned: settings, devices and sizes.

    Attributes:
        options: as given.
        card: the device, with the rates and the memory of the options.
        facts: of the data.
        words: tokens or terms of a document, on average.
        vocabulary: terms.
        tree: of a cascade.
        opened: whether the data are in this process's memory already.
        told: where the sizes are from.
    """

    options: PlanConfig
    card: Card
    facts: Facts
    words: float
    vocabulary: int
    tree: TreeShape | None
    opened: bool
    told: str

    @property
    def host_limit(self) -> int | None:
        """Bytes of the host that a process may hold; None: nobody knows, or it is not looked at."""
        if self.card.cuda:
            return int(self.options.host_memory * GB) or None
        # Processes on one machine's processors share its memory.
        return self.card.memory and self.card.memory // self.options.gpus

    @property
    def config(self) -> Config:
        """The run's settings."""
        return self.options.run


def with_rates(card: Card, options: PlanConfig) -> Card:
    """Give a device the memory and the rates that the options name."""
    if options.memory:
        card = replace(card, memory=int(options.memory * GB))
    if options.copy_rate:
        card = replace(card, copy=options.copy_rate * 1e9)
    if options.mm_rate:
        card = replace(card, products=dict.fromkeys(card.products, options.mm_rate * 1e12))
    return replace(card, wire=options.wire_rate * 1e9) if options.wire_rate else card


def fitted_to(options: PlanConfig) -> PlanConfig:
    """Give the run the width that the options name.

    Raises:
        InputError: a cascade on a transformer, whose width is the encoder's own; or a value out of
            range.
    """
    check_values(options)
    run = options.run
    if not options.dim:
        return options
    if run.encoder == "bow":
        return replace(options, run=replace(run, bow_width=options.dim))
    if run.model == "cascade":
        mend = "leave it out, or name another --encoder"
        expected = "a bag of words, or --model end_to_end"
        raise InputError("--dim", expected, "a cascade on a transformer", mend)
    return replace(options, run=replace(run, bottleneck=options.dim))


def subject_of(options: PlanConfig, recipe: Recipe[PlanConfig]) -> Subject:
    """Find device and sizes: those given, the dataset's, or those of the set that a recipe names.

    Raises:
        InputError: a device that nobody knows, or no sizes.
    """
    options = fitted_to(options)
    card = with_rates(card_of(options.run.device), options)
    facts, words, vocabulary, told = _sizes(options, recipe)
    tree = tree_of(options.run, facts.labels)
    opened = told not in (_FLAGS, *(data.title for data in DATA_SETS.values()))
    return Subject(options, card, facts, words, vocabulary, tree, opened, told)


def _sizes(options: PlanConfig, recipe: Recipe[PlanConfig]) -> tuple[Facts, float, int, str]:
    """Return facts, words per document, terms of the vocabulary, and where they are from."""
    run = options.run
    longest = 0 if run.encoder == "bow" else options.longest
    if options.labels:
        for name, value in (("--documents", run.documents), ("--longest", longest)):
            if not value and not (name == "--longest" and run.encoder == "bow"):
                got = "--labels without it"
                raise InputError(name, "a number above 0", got, "give it too")
        facts = _given(options, options.labels, run.documents, longest, options.test)
        return facts, *_words(options, longest), _FLAGS
    if run.dataset == Config.dataset or Path(run.dataset).is_dir():
        return _opened(options)
    folder = Path(run.dataset).name
    names = [name for name in DATA_SETS if folder.startswith(name) and DATA_SETS[name].labels]
    if not names:
        expected = "the sizes of the data"
        mend = "give --labels, --documents and --longest, or the folder of xmlkernels prepare"
        raise InputError("--labels", expected, f"no dataset at {run.dataset}", mend)
    known = DATA_SETS[max(names, key=len)]
    found = [re.search(r"--max-length (\d+)", command) for command in recipe.commands]
    tokens = longest or next((int(match[1]) for match in found if match), 0)
    if not tokens and run.encoder != "bow":
        raise InputError("--longest", "a number above 0", "none in the recipe", "give it")
    facts = _given(options, known.labels, known.train, tokens, options.test or known.test)
    return facts, *_words(options, tokens), known.title


def _given(options: PlanConfig, labels: int, documents: int, longest: int, test: int) -> Facts:
    virtual = labels if options.run.label_text else 0
    return Facts(labels, documents, options.validation, test, virtual, longest)


def _words(options: PlanConfig, longest: int) -> tuple[float, int]:
    bow = options.run.encoder == "bow"
    words = options.words or (_WORDS if bow else longest)
    if bow and not options.vocabulary:
        got = "none"
        raise InputError("--vocabulary", "the terms of a bag of words", got, "give their number")
    return words, options.vocabulary or _TERMS


def _opened(options: PlanConfig) -> tuple[Facts, float, int, str]:
    run = options.run
    dataset = open_dataset(run)
    train = dataset.splits["train"]
    if run.encoder == "bow":
        inputs = open_inputs(run, dataset)
        assert isinstance(inputs, BowInputs)
        features = inputs.features(train)
        words, vocabulary = features.nnz / max(1, features.shape[0]), inputs.vocabulary
    else:
        words = float(train.tokens.lengths.mean())
        vocabulary = train.tokens.header.vocab_size
    told = f"{dataset.name} (hash {dataset.content_hash[:12]})"
    return facts_of(run, dataset), words, options.vocabulary or vocabulary, told


def data_bytes(subject: Subject) -> int:
    """Bytes of documents and labels in memory, from their sizes.

    A label of a document takes 8 bytes, 16 where a tree orders them anew; a term 8, a token 2 of a
    mapped file, or 4 where there are 65,536 or more in the vocabulary.
    """
    facts, options = subject.facts, subject.options
    documents = facts.documents + facts.validation + facts.test
    pair = 8 if subject.tree is None else 16
    word = 8 if options.run.encoder == "bow" else 2 if subject.vocabulary < 1 << 16 else 4
    return round(documents * (options.positives * pair + subject.words * word + 16))


def tree_of(config: Config, labels: int) -> TreeShape | None:
    """Find the shape of a cascade's tree: the one named, or a balanced one of --tree-depths."""
    if config.model != "cascade":
        return None
    if config.tree:
        return LabelTree.load(config.tree)
    return BalancedTree((*(2**depth for depth in config.tree_depths), labels))
