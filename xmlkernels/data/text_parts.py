"""How the parts of a document, such as its title and its body, become one text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats.text_lines import join_parts, split_title, without_separator
from xmlkernels.errors import InputError
from xmlkernels.terms import PART


@dataclass(frozen=True)
class TextParts:
    """How the parts of a training text were joined; texts to predict are joined alike.

    Attributes:
        fields: "all" takes both, "title" or "body" one of them.
        separator: what joins the parts.
        marked: whether `/SEP/` in a line divides title and body, as in AttentionXML's sets.
        columns: of a table, whose texts are kept apart: `terms.PART` joins them for bags of words,
            `separator` for an encoder. None where they are not.
    """

    fields: Literal["all", "title", "body"] = "all"
    separator: str = " "
    marked: bool = False
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset | None) -> TextParts:
        """Return those of a dataset, as its manifest keeps them.

        In older and in other datasets a space joins all parts.
        """
        source: Any = {} if dataset is None else dataset.manifest.get("source")
        if not isinstance(source, dict) or "separator" not in source:
            return cls()
        marked = source.get("kind") == "attentionxml"
        return cls(source["fields"], source["separator"], marked, tuple(source.get("parts", ())))

    def join(self, title: str, body: str) -> str:
        """Join a title and a body, one of which may be empty."""
        if self.fields != "all":
            return title if self.fields == "title" else body
        return self.separator.join(filter(None, (title, body)))

    def of_record(self, record: Mapping[str, Any], where: str) -> str:
        """Return the text of an object that has the columns of the training table as its keys.

        Args:
            record: with a string for each column that is there; a missing one is empty.
            where: what it is, for messages.

        Raises:
            InputError: another key, none at all, or what is no string.
        """
        known = self.columns or ("title", "content")
        for key, value in record.items():
            if key not in known or not isinstance(value, str):
                expected = f"strings of {', '.join(known)}"
                raise InputError(where, expected, repr(key), "name what the model was trained on")
        if not record:
            raise InputError(where, f"one of {', '.join(known)}", "none", "give one")
        if not self.columns:
            return self.join(record.get("title", ""), record.get("content", ""))
        return PART.join(record.get(column, "") for column in self.columns)

    def plain(self, text: str) -> str:
        """Return a text whose parts are joined, as an encoder and people read it."""
        if PART not in text:
            return text
        return self.separator.join(filter(None, text.split(PART)))

    def of_line(self, line: str) -> str:
        """Return the text of a line, which may hold a title and a body."""
        if not self.marked:
            return line
        return (
            join_parts(line, self.separator)
            if self.fields == "all"
            else self.join(*split_title(line))
        )

    def words(self, text: str) -> str:
        """Return a text without the separator of a tokenizer, for bags of words."""
        return without_separator(text, self.separator)
