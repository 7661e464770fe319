"""How the title and the body of a document become one text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats.text_lines import join_parts, split_title, without_separator


@dataclass(frozen=True)
class TextParts:
    """How title and body of a training text were joined; texts to predict are joined alike.

    Attributes:
        fields: "all" takes both, "title" or "body" one of them.
        separator: what joins both.
        marked: whether `/SEP/` in a line divides title and body, as in AttentionXML's sets.
    """

    fields: Literal["all", "title", "body"] = "all"
    separator: str = " "
    marked: bool = False

    @classmethod
    def of(cls, dataset: Dataset | None) -> TextParts:
        """Return those of a dataset, as its manifest keeps them.

        In older and in other datasets a space joins all parts.
        """
        source: Any = {} if dataset is None else dataset.manifest.get("source")
        if not isinstance(source, dict) or "separator" not in source:
            return cls()
        return cls(source["fields"], source["separator"], source.get("kind") == "attentionxml")

    def join(self, title: str, body: str) -> str:
        """Join a title and a body, one of which may be empty."""
        if self.fields != "all":
            return title if self.fields == "title" else body
        return self.separator.join(filter(None, (title, body)))

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
