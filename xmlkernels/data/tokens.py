"""Tokenizers: the only module that loads one.

The file format of tokens is in `token_store`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xmlkernels.data.formats.token_maps import from_padded_map
from xmlkernels.data.token_store import TokenHeader, TokenStore, TokenWriter
from xmlkernels.errors import InputError
from xmlkernels.files import quote
from xmlkernels.foreign import refuse_auto_map, refuse_code
from xmlkernels.installed import MINILM, minilm_folder, need_transformers, not_fetched

__all__ = [
    "TokenHeader",
    "TokenStore",
    "TokenWriter",
    "Tokenizer",
    "from_padded_map",
    "load_tokenizer",
    "tokenize_to_file",
]

PROBE = [
    "",
    "Ünïcode  and\tspaces",
    "Mixed CASE: a-b_c.d/e!",
    "数字 12345 ½",
    "[CLS] <s> </s> [SEP] <unk>",
]
Progress = Callable[[int], None]
MOST_IDS = 1 << 24  # the largest vocabularies have a few hundred thousand
MOST_BYTES = 1 << 28  # of a file of a tokenizer; the largest have some ten million
FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")


class Tokenizer:
    """A Hugging Face tokenizer, reduced to what training needs.

    Special tokens are its own, whatever the model.

    Attributes:
        pad_id: the pad token's id, 0 where the tokenizer has none (padding is masked, so the id
            does not matter).
        vocab_size: one more than the largest id.
        model_max_length: the longest sequence the tokenizer's own settings allow, None where they
            set no bound.
        separator: the token between two texts ("[SEP]"), None where the tokenizer has none.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._by_length: dict[int, Any] = {}
        self.pad_id = 0 if inner.pad_token_id is None else int(inner.pad_token_id)
        self.vocab_size = max(len(inner), 1 + max(inner.get_vocab().values(), default=-1))
        limit = int(min(inner.model_max_length, 2**62))
        self.model_max_length = limit if limit < 1_000_000 else None
        # Read as a token anywhere in a text, unless the tokenizer splits special tokens.
        self.separator = None if inner.split_special_tokens else inner.sep_token

    def encode_batch(self, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
        """Return the ids of each text with special tokens, at most `max_length` of them, int32.

        An empty text gives the special tokens alone. A tokenizer that adds none would give a row of
        no token, which has no mean: that row is one end-of-text (else begin, unknown, pad) token.

        Raises:
            InputError: `max_length` leaves no room for a token of the text, or a text is no string.
        """
        least = self._inner.num_special_tokens_to_add() + 1
        if max_length < least:
            raise InputError(
                "--max-length",
                f"at least {least} (special tokens and one of the text)",
                str(max_length),
                "choose a longer one",
            )
        rows = [np.array(ids, np.int32) for ids in self._encode(texts, max_length)]
        return [row if row.size else self._stand_in for row in rows]

    def _encode(self, texts: Sequence[str], max_length: int) -> Iterator[list[int]]:
        if not self._inner.is_fast:
            yield from self._inner(list(texts), truncation=True, max_length=max_length)["input_ids"]
            return
        backend = self._by_length.get(max_length)
        if backend is None:
            backend = self._by_length[max_length] = self._truncating(max_length)
        try:
            encodings = backend.encode_batch_fast(list(texts))
        except TypeError:
            encodings = backend.encode_batch_fast([_writable(text) for text in texts])
        for encoding in encodings:
            yield encoding.ids

    def probe(self) -> None:
        """Meet what `encode_batch` will: some faults show at the first unknown word alone.

        One text at a time starts no threads.
        """
        encode = self._truncating(64).encode if self._inner.is_fast else self._inner
        for text in PROBE:
            encode(text)

    def _truncating(self, max_length: int) -> Any:
        """Return a copy of the tokenizer for one length.

        Truncation is state of the tokenizer, and two threads may ask for two lengths.
        """
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._inner.backend_tokenizer.to_str())
        backend.no_padding()
        backend.enable_truncation(max_length, direction=self._inner.truncation_side)
        backend.encode_special_tokens = self._inner.split_special_tokens
        return backend

    @cached_property
    def _stand_in(self) -> np.ndarray:
        inner = self._inner
        known = (inner.eos_token_id, inner.bos_token_id, inner.unk_token_id, self.pad_id)
        return np.array([next(token for token in known if token is not None)], np.int32)

    @cached_property
    def class_position(self) -> str | None:
        """Where `encode_batch` puts the class token.

        "first" (BERT), "last" (XLNet), None where there is none.
        """
        token = self._inner.cls_token_id
        row = self.encode_batch(["a"], 64)[0].tolist()
        if token is None or token not in (row[0], row[-1]):
            return None
        return "first" if row[0] == token else "last"

    @cached_property
    def hash(self) -> str:
        """The sha256 of everything that decides the ids.

        That is the serialized tokenizer (its saved truncation and padding left out, they are not
        used), special tokens and truncation side.
        """
        inner = self._inner
        content: Any
        if inner.is_fast:
            content = json.loads(inner.backend_tokenizer.to_str()) | {
                "truncation": None,
                "padding": None,
            }
        else:
            # Settings of a tokenizer written in Python do not survive saving word for word; what
            # they do does.
            content = [
                type(inner).__name__,
                inner.get_vocab(),
                [ids.tolist() for ids in self.encode_batch(PROBE, 64)],
            ]
        special = {key: str(value) for key, value in inner.special_tokens_map.items()}
        extra = [special, self.pad_id, inner.truncation_side, inner.split_special_tokens]
        return hashlib.sha256(json.dumps([content, extra], sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files; `load_tokenizer(folder)` gives the same ids and hash.

        Raises:
            OSError: what the system refused, which the library tells as a bare Exception.
        """
        try:
            self._inner.save_pretrained(str(folder))
        except Exception as error:
            if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(folder)) from error


def _writable(text: str) -> str:
    """Return the text with "?" for lone surrogates.

    JSON escapes can bring them in, and UTF-8 cannot hold them.
    """
    if not isinstance(text, str):
        raise InputError(
            "text", "a string", f"{text!r} ({type(text).__name__})", "convert it first"
        )
    return text.encode("utf-8", "replace").decode("utf-8")


def _refuse_large(folder: Path) -> None:
    """Refuse files that no tokenizer has: they are read into memory as a whole."""
    for path in (found for pattern in FILES for found in sorted(folder.glob(pattern))):
        if path.is_file() and (size := path.stat().st_size) > MOST_BYTES:
            raise InputError(
                str(path),
                f"a tokenizer's file of at most {MOST_BYTES:,} bytes",
                f"{size:,} bytes",
                "restore the file from where it came",
            )


def _refuse_ids(folder: Path) -> None:
    """Refuse ids that no vocabulary has: far ones, and two words of one id.

    The library asks for memory for each id up to the largest, and ends the process where there is
    none; of two words of one id it keeps one or the other. What is no JSON is left to its reader.
    """
    path = folder / "tokenizer.json"
    try:
        told = json.loads(path.read_bytes())
        ids = [(token["content"], token["id"]) for token in told.get("added_tokens") or []]
        vocab = told["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    words = vocab if isinstance(vocab, dict) else {}
    numbered = [(word, number) for word, number in words.items() if isinstance(number, int)]
    last = {number: word for word, number in numbered}
    if twice := next((pair for pair in numbered if last[pair[1]] != pair[0]), None):
        got = f"{twice[1]} of {quote(twice[0])} and of {quote(last[twice[1]])}"
        mend = "restore the file from where it came"
        raise InputError(str(path), "an id of its own for every token", got, mend)
    ids += words.items()
    for token, number in ids:
        if isinstance(number, int) and number >= MOST_IDS:
            raise InputError(
                str(path),
                f"token ids below {MOST_IDS:,}",
                f"{number} of {quote(str(token))}",
                "restore the file from where it came",
            )


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load a tokenizer by hub name or from a local folder; its own code never runs.

    Args:
        name_or_path: "minilm" is the one of the installed all-MiniLM-L6-v2.

    Raises:
        InputError: no such folder or name, no tokenizer files in it, ones that need code of their
            own, or transformers is not installed.
    """
    need_transformers(f"tokenizer {name_or_path}")
    from transformers import AutoTokenizer

    if name_or_path == MINILM:
        name_or_path = minilm_folder("tokenizer")
    name = str(name_or_path)
    looks_local = (
        isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    )
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise InputError(
            f"tokenizer {name}", "a folder with tokenizer files", "no such folder", "check the path"
        )
    if path.is_dir():
        refuse_code(path)
        _refuse_large(path)
        _refuse_ids(path)
    try:
        inner = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else name, trust_remote_code=False
        )
        refuse_auto_map(inner.init_kwargs, f"tokenizer {name}")
        tokenizer = Tokenizer(inner)
        tokenizer.probe()
        return tokenizer
    except InputError:
        raise
    # Damaged files end in whatever tokenizers and transformers happen to raise, or in a panic.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if told := not_fetched(error, f"tokenizer {name}", name):
            raise told from error
        reason = str(error).strip().split("\n")[0].rstrip(" .:") or type(error).__name__
        if path.is_dir() and not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
            reason = "a folder that holds no tokenizer.json and no vocabulary"
        raise InputError(
            f"tokenizer {name}",
            "a folder with tokenizer files or a model name of the Hugging Face hub",
            reason,
            "check the name, or download the model first and give its folder",
        ) from error


def tokenize_to_file(
    texts: Sequence[str],
    path: str | Path,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    chunk: int = 8192,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenize `texts` into a token file, `chunk` texts at a time by the tokenizer's own threads.

    Never more than one chunk's tokens are in memory. `progress` receives the size of each chunk
    behind it.
    """
    with TokenWriter(
        path,
        len(texts),
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        max_length=max_length,
        pad_id=tokenizer.pad_id,
    ) as writer:
        for start in range(0, len(texts), chunk):
            part = texts[start : start + chunk]
            writer.append(tokenizer.encode_batch(part, max_length))
            if progress is not None:
                progress(len(part))
    return TokenStore.open(path)
