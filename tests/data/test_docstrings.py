"""The built-in corpus: its rules on a small package written by hand, determinism, and a part of the
standard library.
"""

import hashlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from xmlkernels import InputError
from xmlkernels.data import corpus
from xmlkernels.data.corpus import build_corpus
from xmlkernels.files import DataWarning

RULES = '''
import functools


def first(path):
    """
    Opens   a file
    and reads it.

    This paragraph is no part of the text.
    """
    handle = open(path)
    return handle.read().strip().once_only()


class Reader:
    """A class is no document: setup()."""

    async def read(self):
        """Reads everything."""
        await self.source.read()
        self.close()

    @functools.cache
    def plain(self, default=dict()):
        """Calls nothing itself."""
        return self.close


def outer():
    """Has a helper."""

    @wraps(outer)
    def helper():
        """Helps to close."""
        return close(open)

    return strip(helper)


def without():
    return open().read()


def by_expression():
    """Calls what a call returns."""
    return table["x"](read(), lambda: strip())()


def silent():
    " \\n "
    return open()


def half():
    """Half a \\ud800 pair."""
    close()
'''


def write_package(folder: Path, name: str, files: dict[str, str], monkeypatch) -> None:
    """An importable package; monkeypatch takes it away again."""
    for path, text in {"__init__.py": "", **files}.items():
        target = folder / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")
    monkeypatch.syspath_prepend(str(folder))


def labelled(built) -> dict[str, tuple[str, set[str]]]:
    """Text → split, label names."""
    return {
        text: (split, {built.label_names[label] for label in built.labels[split][row].indices})
        for split in built.texts
        for row, text in enumerate(built.texts[split])
    }


def filler(count: int) -> str:
    return "".join(f'def f{i}():\n    """Filler {i}."""\n\n' for i in range(count))


def path_in(split: str, package: str, stem: str) -> str:
    """A file name of that package whose hash puts it into the split."""
    return next(
        f"{stem}{i}.py" for i in range(1000) if corpus._split_of(f"{package}/{stem}{i}.py") == split
    )


def test_documents_and_labels_by_hand(tmp_path, monkeypatch):
    write_package(tmp_path, "pkg_rules", {"rules.py": RULES, "filler.py": filler(60)}, monkeypatch)
    built = build_corpus(packages=["pkg_rules"], workers=1)
    got = {text: labels for text, (_, labels) in labelled(built).items()}
    # open: first alone (`without` has no docstring, `silent` an empty one); once_only: one
    # document; both are no labels
    assert got == {
        "Opens a file and reads it.": {"read", "strip"},
        "Reads everything.": {"read", "close"},
        "Has a helper.": {
            "close",
            "strip",
        },  # the helper's calls count; its decorator `wraps` is called once only
        "Helps to close.": {"close"},
        "Calls what a call returns.": {"read", "strip"},
        "Half a ? pair.": {"close"},
    }
    assert built.label_names == ["close", "read", "strip"]
    assert built.report["functions with a docstring"] == 67
    assert built.report["documents without a label, left out"] == 61  # the fillers and `plain`
    assert built.report["names of one document, no labels"] == 3  # open, once_only, wraps
    assert built.report["documents"] == 6 and built.report["labels"] == 3


def test_frequent_and_rare_names_are_no_labels(tmp_path, monkeypatch):
    def function(i: int, calls: list[str]) -> str:
        return (
            f'def f{i}():\n    """Document {i}."""\n'
            + "".join(f"    {name}()\n" for name in calls)
            + "    return\n\n"
        )

    # of 40 documents: `tenth` on 4 (kept: not more than a tenth), `above` on 5, `twice` on 2,
    # `once` on 1
    callers = {"tenth": range(4), "above": range(5), "twice": (7, 8), "once": (9,)}
    text = "".join(
        function(i, [name for name, of in callers.items() if i in of]) for i in range(40)
    )
    write_package(tmp_path, "pkg_counts", {"a.py": text}, monkeypatch)
    built = build_corpus(packages=["pkg_counts"], workers=1)
    assert built.label_names == ["tenth", "twice"]
    assert set(labelled(built)) == {f"Document {i}." for i in (0, 1, 2, 3, 7, 8)}
    assert built.report["names of more than a tenth of the documents, no labels"] == 1


def test_copies_are_merged_and_a_text_on_both_sides_goes_to_train(tmp_path, monkeypatch):
    def function(text: str, call: str) -> str:
        return f'def g():\n    """{text}"""\n    {call}()\n\n'

    train, val, test = (path_in(split, "pkg_sides", "m") for split in corpus.SPLITS)
    files = {
        train: function("In train.", "a")
        + function("In train.", "b")
        + function("Everywhere.", "a"),
        val: function("In val.", "a")
        + function("In val and test.", "b")
        + function("Everywhere.", "c"),
        test: function("In test.", "b") + function("In val and test.", "c") + filler(45),
    }
    write_package(tmp_path, "pkg_sides", files, monkeypatch)
    built = build_corpus(packages=["pkg_sides"], workers=1)
    assert labelled(built) == {
        "In train.": ("train", {"a", "b"}),
        "Everywhere.": ("train", {"a", "c"}),
        "In val and test.": ("train", {"b", "c"}),
        "In val.": ("val", {"a"}),
        "In test.": ("test", {"b"}),
    }
    assert built.report["texts from more than one split, in train"] == 2
    assert [built.labels[split].shape for split in corpus.SPLITS] == [(3, 3), (1, 3), (1, 3)]


def test_the_split_is_a_hash_of_the_path_alone():
    # worked by hand: the first six bytes of sha256 as a fraction
    place = int(hashlib.sha256(b"split\0json/decoder.py").hexdigest()[:12], 16) / 2**48
    assert corpus._split_of("json/decoder.py") == (
        "train" if place < 0.8 else "val" if place < 0.9 else "test"
    )
    share = [corpus._split_of(f"p/{i}.py") for i in range(5000)]
    assert [share.count(split) / 5000 for split in corpus.SPLITS] == pytest.approx(
        [0.8, 0.1, 0.1], abs=0.02
    )


def test_broken_files_are_counted_and_told(tmp_path, monkeypatch):
    write_package(
        tmp_path,
        "pkg_broken",
        {"rules.py": RULES, "filler.py": filler(60), "bad.py": "def (:\n"},
        monkeypatch,
    )
    (tmp_path / "pkg_broken" / "null.py").write_bytes(b"x = 1\0")
    # A SyntaxWarning that nobody asked for.
    (tmp_path / "pkg_broken" / "escape.py").write_text('x = "\\d"\n')
    with pytest.warns(
        DataWarning, match="2 files cannot be parsed.*pkg_broken/bad.py, pkg_broken/null.py"
    ) as told:
        built = build_corpus(packages=["pkg_broken"], workers=1)
    assert len(told) == 1
    assert built.report["unparsable files"] == 2
    assert built.report["documents"] == 6


def test_standard_library_packages_and_determinism():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = build_corpus(packages=["json", "email"], workers=1)
        # Spawned processes, another order.
        again = build_corpus(packages=("email", "json", "email"), workers=2)
    assert built.hash == again.hash
    assert built.texts == again.texts
    assert built.label_names == again.label_names
    assert all((built.labels[split] != again.labels[split]).nnz == 0 for split in built.labels)
    assert built.report == again.report and set(built.versions) == {"json", "email"}
    assert built.report["documents"] > 100 and built.label_names == sorted(set(built.label_names))
    texts = [text for split in built.texts.values() for text in split]
    assert len(texts) == len(set(texts)) == built.report["documents"]
    assert any("JSON document" in text for text in texts)
    frequency = sum(np.asarray(matrix.sum(0)).ravel() for matrix in built.labels.values())
    assert frequency.min() >= 2
    assert all(np.diff(matrix.indptr).min(initial=1) >= 1 for matrix in built.labels.values())
    for matrix in built.labels.values():
        assert matrix.has_canonical_format and matrix.dtype == np.float32


def test_a_part_keeps_the_rules():
    whole = build_corpus(packages=["email", "http"], workers=1)
    part = build_corpus(80, packages=["email", "http"], workers=1)
    assert 80 <= part.report["documents"] < whole.report["documents"] / 1.5
    frequency = sum(np.asarray(matrix.sum(0)).ravel() for matrix in part.labels.values())
    assert frequency.min() >= 2 and part.hash != whole.hash
    assert build_corpus(80, packages=["http", "email"], workers=1).hash == part.hash
    everything = whole.report["documents"]
    with pytest.raises(InputError, match=f"at most {everything}, all there are, got 100000"):
        build_corpus(100_000, packages=["email", "http"], workers=1)


def test_the_hash_tells_texts_labels_and_split_apart(tmp_path, monkeypatch):
    train, test = path_in("train", "pkg_hash", "m"), path_in("test", "pkg_hash", "m")
    seen = set()
    other_text, other_label = RULES.replace("Helps", "Serves"), RULES.replace("strip", "s")
    for name, text in ((train, RULES), (test, RULES), (train, other_text), (train, other_label)):
        for old in (tmp_path / "pkg_hash").glob("m*.py"):
            old.unlink()
        write_package(tmp_path, "pkg_hash", {name: text, "filler.py": filler(60)}, monkeypatch)
        seen.add(build_corpus(packages=["pkg_hash"], workers=1).hash)
    assert len(seen) == 4


def test_test_folders_of_the_standard_library_are_left_out():
    names = [name for name, _ in corpus.files_of(corpus.STDLIB)]
    assert "stdlib/json/decoder.py" in names
    assert not any("/test/" in name or "/site-packages/" in name for name in names)
    assert any("/tests/" in name for name, _ in corpus.files_of("scipy"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: build_corpus(packages=["no_such_package"], workers=1),
            "pip install no_such_package.*leave it out",
        ),
        (lambda: build_corpus(packages=["sys"], workers=1), "Python source"),
        (lambda: build_corpus(packages=["../json"], workers=1), "Python source"),
        (lambda: build_corpus(packages=[]), "at least one package"),
        (lambda: build_corpus(0), "documents.*from 1"),
        (lambda: build_corpus(workers=0), "workers.*from 1"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_missing_distribution_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        build_corpus(packages=["sklearn"], workers=1)


def test_packages_that_are_not_installed_are_left_out_and_named(monkeypatch):
    there = corpus._package_folders
    monkeypatch.setattr(corpus, "PACKAGES", (corpus.STDLIB, "tyro", "pyarrow"))
    monkeypatch.setattr(
        corpus, "_package_folders", lambda name: [] if name == "pyarrow" else there(name)
    )
    assert corpus.installed_packages() == [corpus.STDLIB, "tyro"]
    with pytest.warns(DataWarning, match="without pyarrow, not installed here"):
        built = corpus.build_corpus(20, workers=1)
    assert set(built.versions) == {corpus.STDLIB, "tyro"}
