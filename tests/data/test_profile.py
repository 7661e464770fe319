"""The profile of a dataset: its numbers, what looks wrong, and its file."""

import json
from pathlib import Path

import pytest

from xmlkernels import Dataset, InputError
from xmlkernels.data.manifest import PROFILE
from xmlkernels.data.profile import Profile, load_profile, write_profile
from xmlkernels.data.profiling import lines_of

TRAIN = (
    ["Red  apples", "red apples", "green pears and plums", "", "a b c d"],
    [["fruit"], ["fruit", "red"], ["fruit"], [], ["odd"]],
)
TEST = (["RED APPLES", "caf\ufffd", "caf\u00c3\u00a9"], [["red"], ["fruit"], ["rare"]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "d"
    Dataset.from_texts(folder, TRAIN, test=TEST)
    return folder


@pytest.fixture(scope="module")
def profile(folder: Path) -> Profile:
    return load_profile(folder)


def test_it_counts_documents_labels_and_lengths(profile: Profile) -> None:
    train, test = profile.splits["train"], profile.splits["test"]
    assert (train.documents, train.unlabelled, train.empty, train.duplicates) == (5, 1, 1, 1)
    assert (test.documents, test.unlabelled, test.empty, test.duplicates) == (3, 0, 0, 0)
    assert (train.labels.mean, train.labels.least, train.labels.most) == (1.0, 0, 2)
    assert train.words is not None and train.characters is not None
    assert (train.words.least, train.words.p50, train.words.most) == (0, 2, 4)
    assert train.characters.most == len("green pears and plums") and train.tokens is None
    assert (profile.labels, profile.used, profile.once) == (4, 3, 2)


def test_deciles_hold_the_most_frequent_labels_first(profile: Profile) -> None:
    assert [tenth.most for tenth in profile.deciles] == [3, 1, 1, 0]
    assert sum(tenth.labels for tenth in profile.deciles) == profile.labels
    assert sum(tenth.share for tenth in profile.deciles) == pytest.approx(1)


def test_texts_of_two_splits_and_damaged_ones_are_found(profile: Profile) -> None:
    (shared,) = profile.overlaps
    assert (shared.first, shared.second, shared.documents) == ("train", "test", 1)
    found = {one.kind: one for one in profile.suspicions}
    assert set(found) == {
        "overlap", "encoding", "one_label", "unlabelled", "empty", "duplicates", "unused_labels",
    }  # fmt: skip
    assert (found["encoding"].count, found["encoding"].of) == (2, 3)
    assert found["one_label"].examples == ["fruit"] and found["one_label"].count == 3
    assert any("the label 'fruit' is on 3 of 5" in line for line in lines_of(profile))


def test_names_that_stand_in_their_texts_are_found(tmp_path: Path) -> None:
    texts = [f"item {n} Category: Garden  Tools" for n in range(10)] + [f"x {n}" for n in range(9)]
    labels = [["garden tools"]] * 10 + [["cut"]] * 9
    Dataset.from_texts(tmp_path / "d", (texts, labels))
    (found,) = load_profile(tmp_path / "d").suspicions
    assert (found.kind, found.count, found.examples) == ("label_in_text", 1, ["garden tools"])
    # Without spaces a name may stand anywhere, and words are characters.
    texts = [f"第{n}种北京烤鸭" for n in range(10)] + [f"x {n}" for n in range(9)]
    Dataset.from_texts(tmp_path / "e", (texts, [["北京"]] * 10 + [["cut"]] * 9))
    other = load_profile(tmp_path / "e")
    assert (other.suspicions[0].kind, other.suspicions[0].examples) == ("label_in_text", ["北京"])
    words = other.splits["train"].words
    assert words is not None and words.most == 7


def test_it_is_no_part_of_what_the_data_are(folder: Path) -> None:
    """A report may be newer than the data: the content hash is that of the data alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert PROFILE not in manifest["files"] and (folder / PROFILE).is_file()
    Dataset.from_texts(folder, TRAIN, test=TEST)
    Dataset.from_texts(folder, TRAIN, overwrite=True)
    assert "test" not in load_profile(folder).splits


def test_what_is_no_profile_is_refused(folder: Path, tmp_path: Path, profile: Profile) -> None:
    write_profile(tmp_path, profile)
    assert load_profile(tmp_path / PROFILE) == profile
    damaged = json.loads((tmp_path / PROFILE).read_text())
    damaged["splits"]["train"]["documents"] = "five"
    (tmp_path / PROFILE).write_text(json.dumps(damaged))
    with pytest.raises(InputError, match=r"splits\.train\.documents: expected a whole number"):
        load_profile(tmp_path)
