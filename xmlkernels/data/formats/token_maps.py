"""Renee's token maps: raw int64 without any header.

`*_input_ids.dat` and `*_attention_mask.dat`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from xmlkernels.data.token_store import TokenStore, TokenWriter
from xmlkernels.errors import InputError
from xmlkernels.files import PathLike, check_file

PADDED_ROWS_AT_ONCE = 65_536


def open_token_map(path: PathLike, *, rows: int, max_length: int) -> np.memmap:
    """Open one map: little-endian int64, row-major, `rows` × `max_length`.

    The file says nothing of its shape, and a wrong `max_length` would read shifted rows without any
    error, so the size must agree exactly.

    Returns:
        int64 [rows, max_length], read-only, memory-mapped.

    Raises:
        InputError: the file is larger or smaller than rows × max_length × 8 bytes.
    """
    name = os.fspath(path)
    for what, number in (("rows", rows), ("max_length", max_length)):
        if number < 1:
            raise InputError(
                f"{name}, {what}", "at least 1", str(number), "pass what the map was written with"
            )
    size, needed = check_file(path).stat().st_size, rows * max_length * 8
    if size != needed:
        fits = [f"max_length {size // (rows * 8)} for {rows} rows"] * (size % (rows * 8) == 0)
        fits += [f"{size // (max_length * 8)} rows of max_length {max_length}"] * (
            size % (max_length * 8) == 0
        )
        mend = (
            f"its size fits {' or '.join(fits)}"
            if size and fits
            else "fetch or write the file again"
        )
        raise InputError(
            name, f"{needed} bytes ({rows} rows × {max_length} tokens × 8)", f"{size} bytes", mend
        )
    return np.memmap(path, dtype="<i8", mode="r", shape=(rows, max_length))


def open_token_maps(prefix: PathLike, *, rows: int, max_length: int) -> tuple[np.memmap, np.memmap]:
    """Open the pair `{prefix}_input_ids.dat` and `{prefix}_attention_mask.dat`.

    The prefix is such as `…/trn_doc`.

    Returns:
        input ids and attention mask, each int64 [rows, max_length], read-only, memory-mapped.

    Raises:
        InputError: as `open_token_map`.
    """
    ids, mask = (f"{os.fspath(prefix)}_{name}.dat" for name in ("input_ids", "attention_mask"))
    return (
        open_token_map(ids, rows=rows, max_length=max_length),
        open_token_map(mask, rows=rows, max_length=max_length),
    )


def token_rows(
    ids: np.ndarray, mask: np.ndarray, first: int, last: int, where: str
) -> list[np.ndarray]:
    """Rows first … last − 1 of a pair of maps as ragged token arrays, padding left out.

    Args:
        ids, mask: int64 [rows, max_length]; a token counts where the mask is 1.
        first, last: the rows.
        where: what messages call the maps.

    Returns:
        last − first arrays of int64 token ids.

    Raises:
        InputError: a mask value is neither 0 nor 1, or a token id is negative.
    """
    tokens, kept = np.asarray(ids[first:last]), np.asarray(mask[first:last])
    wrong = np.argwhere((kept != 0) & (kept != 1))
    if len(wrong):
        row, column = wrong[0]
        got = str(kept[row, column])
        raise InputError(
            f"{where}, row {first + row}",
            "an attention mask of 0 and 1",
            got,
            "write the maps again",
        )
    wrong = np.argwhere((kept == 1) & (tokens < 0))
    if len(wrong):
        row, column = wrong[0]
        got = str(tokens[row, column])
        raise InputError(
            f"{where}, row {first + row}", "token ids from 0", got, "write the maps again"
        )
    return [row[own == 1] for row, own in zip(tokens, kept, strict=True)]


def from_padded_map(
    path: str | Path,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    *,
    vocab_size: int,
    tokenizer_hash: str,
    pad_id: int,
    rows: np.ndarray | None = None,
    name: str = "token map",
) -> TokenStore:
    """Rewrite upstream's padded maps as a token file, in pieces.

    Args:
        path: the token file to write.
        input_ids, attention_mask: integers [rows, width]; the mask is 1 on a row's tokens and 0
            behind them.
        rows: row numbers to take, in this order (default: all).
        name: what messages call the maps.

    Raises:
        InputError: shapes differ, a mask is no run of ones followed by zeros (the sign of maps read
            with a wrong width, which upstream would train on in silence), or an id lies outside the
            vocabulary.
    """
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        got = f"{input_ids.shape} and {attention_mask.shape}"
        raise InputError(
            name, "ids and mask of one shape [rows, width]", got, "give the two files of one run"
        )
    rows = np.arange(len(input_ids)) if rows is None else rows
    width = input_ids.shape[1]
    with TokenWriter(
        path,
        len(rows),
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash,
        max_length=width,
        pad_id=pad_id,
    ) as writer:
        for start in range(0, len(rows), PADDED_ROWS_AT_ONCE):
            part = rows[start : start + PADDED_ROWS_AT_ONCE]
            ids, mask = np.asarray(input_ids[part]), np.asarray(attention_mask[part])
            lengths = mask.astype(bool).sum(axis=1)
            real = np.arange(width) < lengths[:, None]
            wrong = np.flatnonzero((mask != real).any(axis=1) | (lengths == 0))
            if wrong.size:
                raise InputError(
                    f"{name}, row {part[wrong[0]]}",
                    "an attention mask of ones followed by zeros",
                    np.array2string(mask[wrong[0]], threshold=12, max_line_width=200),
                    f"check that the maps were made with max length {width}",
                )
            flat = ids[real]
            outside = np.flatnonzero((flat < 0) | (flat >= vocab_size))
            if outside.size:
                raise InputError(
                    f"{name}, row "
                    f"{part[np.searchsorted(np.cumsum(lengths), outside[0], side='right')]}",
                    f"token ids below {vocab_size}, the size of the tokenizer's vocabulary",
                    str(flat[outside[0]]),
                    "give the tokenizer the maps were made with",
                )
            writer.append_flat(flat, lengths)
    return TokenStore.open(path)
