"""A recipe: a complete set of options with a name, and what one must know before choosing it."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from xmlkernels.options import replaced
from xmlkernels.training.config import Config
from xmlkernels.training.fitting import fitted

log = logging.getLogger(__name__)

T = TypeVar("T")
_WIDEST = 100


@dataclass(frozen=True)
class Recipe(Generic[T]):
    """A starting point: `RECIPES["minilm"].replace(dataset="cache/mine", output="runs/mine")`.

    Attributes:
        name: what one types behind `xmlkernels train`.
        group: the heading that it is listed under.
        what: what it trains, in one sentence.
        when: when to choose it; "" where the heading says it.
        time: how long it takes, and where that was measured; or that it was not.
        needs: what must be there before it starts.
        config: its options.
        source: where its data comes from; "" for one's own and for the built-in corpus.
        commands: what prepares its data, in a shell.
        notes: where it differs from its source.
        decided: options that the dataset decides where nobody gives them, see `fitted`.
    """

    name: str
    group: str
    what: str
    when: str
    time: str
    needs: str
    config: T
    source: str = ""
    commands: tuple[str, ...] = ()
    notes: str = ""
    decided: tuple[str, ...] = ()

    def replace(self, **changes: Any) -> T:
        """Return the options with these changes.

        What the recipe leaves to the dataset (label texts, the tree of a cascade) is decided here,
        from the folder that `dataset` names; the log says how.

        Raises:
            InputError: no dataset there.
        """
        config = replaced(self.config, changes)
        return self.fit(config, changes)

    def fit(self, config: T, given: Collection[str]) -> T:
        """Return the options with what the dataset decides.

        Args:
            config: the recipe's options, changed.
            given: the fields that somebody chose; they stay.

        Raises:
            InputError: no dataset there.
        """
        if not isinstance(config, Config):
            return config
        return cast(T, fitted(config, given, self.decided))

    @property
    def line(self) -> str:
        """What, when and how long: its entry in the list of recipes."""
        return " ".join(filter(None, (self.what, self.when, self.time)))

    @property
    def help(self) -> str:
        """All of it, as `xmlkernels train NAME --help` begins."""
        parts = [self.what]
        for title, text in (
            ("when", self.when or f"{self.group[:1].upper()}{self.group[1:]}."),
            ("time", self.time),
            ("needs", self.needs),
            ("data", self.source),
            ("differs", self.notes),
        ):
            parts += [f"{title + ':':<9}{text}"] if text else []
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        wrapped = [
            textwrap.fill(
                part,
                width,
                subsequent_indent=" " * 9 if number else "",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for number, part in enumerate(parts)
        ]
        if self.commands:
            wrapped += ["prepare:", *(_continued(command, width) for command in self.commands)]
        return "\n".join(wrapped)


def _continued(command: str, width: int) -> str:
    """Return a command of the shell, its lines broken between flags."""
    lines = textwrap.wrap(
        # a flag stays beside its values
        re.sub(r" (?!--)", "\0", command),
        width - 2,
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return " \\\n".join(lines).replace("\0", " ")


class Recipes(Mapping[str, Recipe[Any]]):
    """Recipes by name. A name of an earlier version is found too, and the log says the new one.

    Args:
        recipes: in the order in which they are listed.
        old: old name → new name.
    """

    def __init__(self, recipes: Collection[Recipe[Any]], old: Mapping[str, str]) -> None:
        self._by_name = {recipe.name: recipe for recipe in recipes}
        if len(self._by_name) != len(recipes):
            raise ValueError("two recipes of one name")
        self.old = dict(old)

    def __getitem__(self, name: str) -> Recipe[Any]:
        if name not in self.old:
            return self._by_name[name]
        recipe = self._by_name[self.old[name]]
        log.warning(f"note: recipe {name!r} is now called {recipe.name!r}")
        # A run that began under the old name goes on: its folder and its settings are as they were.
        config = dataclasses.replace(recipe.config, output=f"runs/{name}")
        return dataclasses.replace(recipe, name=name, config=config, decided=())

    def __contains__(self, name: object) -> bool:
        return name in self._by_name or name in self.old

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)
