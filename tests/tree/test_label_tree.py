"""The label tree: levels, orders, what it refuses, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from xmlkernels.errors import InputError
from xmlkernels.tree.label_tree import FILE, LabelTree

# Labels 0..6; two coarse clusters, of two and one finer ones; ragged everywhere.
COARSE = np.array([1, 0, 0, 1, 0, 0, 1])
FINE = np.array([9, 4, 2, 9, 4, 2, 9])


@pytest.fixture
def tree() -> LabelTree:
    return LabelTree.from_partitions(
        [COARSE, FINE], {"dataset": "abc", "depths": [1, 2], "seed": 3}
    )


def test_levels_of_nested_partitions(tree: LabelTree) -> None:
    assert tree.order.tolist() == [2, 5, 1, 4, 0, 3, 6]
    assert [c.tolist() for c in tree.children] == [[0, 2, 3], [0, 2, 4, 7]]
    assert (tree.levels, tree.sizes) == (3, (2, 3, 7))
    assert (tree.widest(0), tree.widest(1)) == (2, 3)
    assert tree.ancestors(0).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert tree.ancestors(1).tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert tree.ancestors(2).tolist() == list(range(7))


def test_place_is_the_inverse_of_order(tree: LabelTree) -> None:
    assert tree.place[tree.order].tolist() == tree.order[tree.place].tolist() == list(range(7))
    assert all(
        a.dtype == np.int64 for a in (*tree.children, tree.order, tree.place, tree.ancestors(1))
    )


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_any_raggedness_against_sets(levels: int) -> None:
    """Random nested partitions: every node has just the labels of its cluster, at every level."""
    random = np.random.default_rng(levels)
    finest = random.permutation(np.repeat(np.arange(40), random.integers(1, 9, 40)))
    parts = [finest]
    while len(parts) < levels - 1:
        parts.insert(0, random.integers(0, parts[0].max() // 2 + 1, parts[0].max() + 1)[parts[0]])
    tree = LabelTree.from_partitions(parts)
    for r, part in enumerate(parts):
        ancestor = tree.ancestors(r)
        assert (np.diff(ancestor) >= 0).all() and ancestor[-1] == tree.sizes[r] - 1
        ours = {frozenset(tree.order[ancestor == c].tolist()) for c in range(tree.sizes[r])}
        assert ours == {frozenset(np.flatnonzero(part == c).tolist()) for c in np.unique(part)}
        assert tree.widest(r) == np.diff(tree.children[r]).max()


def test_one_label_and_one_cluster() -> None:
    tree = LabelTree.from_partitions([np.zeros(1, np.int64)])
    assert (tree.sizes, tree.levels, tree.widest(0)) == ((1, 1), 2, 1)
    assert tree.ancestors(0).tolist() == [0]


def test_the_arrays_are_copies_and_read_only(tree: LabelTree) -> None:
    order = np.array([1, 0])
    again = LabelTree((np.array([0, 2]),), order)
    order[:] = 0
    assert again.order.tolist() == [1, 0]
    for array in (*again.children, again.order, again.place):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_the_hash_is_of_the_content(tree: LabelTree) -> None:
    again = LabelTree.from_partitions([COARSE, FINE], {"seed": 4})
    assert again.content_hash == tree.content_hash and len(tree.content_hash) == 64
    others = [
        LabelTree.from_partitions([FINE]),
        LabelTree.from_partitions([1 - COARSE, FINE]),
        # the same numbers in a row, cut into arrays at another place
        LabelTree((np.array([0, 1, 2]), np.array([0, 1, 2])), np.array([0, 1])),
        LabelTree((np.array([0, 1, 2]),), np.array([0, 1])),
    ]
    assert len({tree.content_hash, *(other.content_hash for other in others)}) == 5


@pytest.mark.parametrize(
    ("children", "order", "says"),
    [
        (
            [[0, 2, 3]],
            [0, 1, 1],
            r"order: expected each label in one cluster, got label 1 in 2 clusters and label 2 in "
            r"none",
        ),
        ([[0, 2, 3]], [0, 1, 3], r"order: expected label ids from 0 to 2, got 3"),
        ([[0, 2, 3]], [0, 1, -1], r"order: expected label ids from 0 to 2, got -1"),
        ([[0, 2, 4]], [0, 1, 2], r"children\[0\]: expected bounds from 0 to 3, .* got 0 to 4"),
        ([[1, 2, 3]], [0, 1, 2], r"children\[0\]: expected bounds from 0 to 3, .* got 1 to 3"),
        (
            [[0, 1, 1, 3]],
            [0, 1, 2],
            r"children\[0\]: expected at least one child of each cluster, got 0 of cluster 1",
        ),
        (
            [[0, 2, 1, 3]],
            [0, 1, 2],
            r"children\[0\]: expected at least one child of each cluster, got -1 of cluster 1",
        ),
        (
            [[0, 1], [0, 2, 3]],
            [0, 1, 2],
            r"children\[0\]: expected bounds from 0 to 2, the nodes .*, got 0 to 1",
        ),
        ([[0]], [], r"children\[0\]: expected bounds"),
        ([], [0, 1], r"children: expected 2 to 5 levels, the label level included, got 1"),
        ([[0, 1]] * 5, [0], r"children: expected 2 to 5 levels, the label level included, got 6"),
        (
            [[0.0, 3.0]],
            [0, 1, 2],
            r"children\[0\]: expected integers in one dimension, got float64",
        ),
        ([[0, 3]], [[0, 1, 2]], r"order: expected integers in one dimension"),
    ],
)
def test_what_is_no_tree(children: list[list[int]], order: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        LabelTree(
            tuple(np.array(c) for c in children),
            np.array(order, np.int64) if not order else np.array(order),
        )


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            [COARSE, np.where(np.arange(7) == 1, 9, FINE)],
            r"partition 1: expected clusters inside one .* got cluster 9 in two",
        ),
        ([COARSE, FINE[:-1]], r"partition 1: expected an integer for each of 7 labels"),
        ([COARSE.astype(float)], r"partition 0: expected an integer for each of 7 labels"),
        ([], r"partitions: expected 1 to 4, one for each level, got 0"),
        ([COARSE] * 5, r"partitions: expected 1 to 4, one for each level, got 5"),
    ],
)
def test_partitions_that_do_not_nest(parts: list[np.ndarray], says: str) -> None:
    with pytest.raises(InputError, match=says):
        LabelTree.from_partitions(parts)


def test_levels_that_do_not_exist(tree: LabelTree) -> None:
    for call, level in ((tree.ancestors, 3), (tree.ancestors, -1), (tree.widest, 2)):
        with pytest.raises(InputError, match="level: expected 0 to [12], got"):
            call(level)


def test_of_another_dataset(tree: LabelTree) -> None:
    tree.check_dataset("abc", 7)
    LabelTree.from_partitions([FINE]).check_dataset("abc", 7)  # made by hand, of no dataset
    with pytest.raises(
        InputError, match="expected 8 labels, as the dataset has, got 7; make the tree again"
    ):
        tree.check_dataset("abc", 8)
    with pytest.raises(
        InputError, match="expected a tree of the dataset xyz, got one of abc; make the tree again"
    ):
        tree.check_dataset("xyz", 7)


@pytest.mark.parametrize("folder", [False, True])
def test_saved_and_read_again(tree: LabelTree, tmp_path: Path, folder: bool) -> None:
    place = tmp_path if folder else tmp_path / "of any name"
    tree.save(place)
    again = LabelTree.load(place)
    assert again.content_hash == tree.content_hash and again.settings == tree.settings
    assert [p.name for p in tmp_path.iterdir()] == [FILE if folder else "of any name"]


def damaged(path: Path, **head: str | None) -> None:
    """The same tree with another head."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = {
        k: v
        for k, v in (json.loads(content[8 : 8 + length])["__metadata__"] | head).items()
        if v is not None
    }
    path.write_bytes(save(load(content), metadata=metadata))


def test_files_that_are_refused(tree: LabelTree, tmp_path: Path) -> None:
    path = tmp_path / FILE
    with pytest.raises(
        InputError, match="expected a label tree, got no such file; run xmlkernels tree"
    ):
        LabelTree.load(tmp_path)
    tree.save(path)
    whole = path.read_bytes()

    def refused(says: str) -> None:
        with pytest.raises(InputError, match=says):
            LabelTree.load(path)
        path.write_bytes(whole)

    path.write_bytes(whole[:-8])
    refused("expected a whole safetensors file")
    path.write_bytes(whole[:4])
    refused("expected a whole safetensors file")
    damaged(path, format="another")
    refused("expected the format 'xmlkernels label tree', got 'another'")
    damaged(path, version="2")
    refused("expected version 1, got version 2")
    damaged(path, settings="{")
    refused("settings: expected JSON")
    damaged(path, settings=None)
    refused("settings: expected JSON")
    path.write_bytes(
        save(
            {"order": np.asarray(tree.order), "children.1": np.asarray(tree.children[0])},
            metadata=None,
        )
    )
    refused("expected the format")
    damaged_tensors = load(whole)
    damaged_tensors["order"] = damaged_tensors["order"][[1, 0, 2, 3, 4, 5, 6]]
    head = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    path.write_bytes(save(damaged_tensors, metadata=head))
    refused("expected content .* copy it again")
    damaged_tensors["order"] = damaged_tensors["order"] * 0
    path.write_bytes(save(damaged_tensors, metadata=head))
    refused(r"tree.safetensors, order: expected each label in one cluster")
    del damaged_tensors["children.0"]
    path.write_bytes(save(damaged_tensors, metadata=head))
    refused(r"expected order and children.0 to children.R-2, got \['children.1', 'order'\]")
    LabelTree.load(path)


def test_a_save_that_fails_leaves_the_old_tree(tree: LabelTree, tmp_path: Path) -> None:
    tree.save(tmp_path)
    bad = LabelTree.from_partitions([FINE], {"seed": float("nan")})
    with pytest.raises(InputError, match="settings of the label tree: expected JSON values"):
        bad.save(tmp_path)
    with pytest.raises(InputError, match="expected a folder that can be written"):
        tree.save(tmp_path / "missing" / "tree")
    assert LabelTree.load(tmp_path).content_hash == tree.content_hash
    assert len(list(tmp_path.iterdir())) == 1


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """In what the settings say too, which the content hash leaves out."""
    fine = np.arange(12) // 2
    LabelTree.from_partitions([fine // 3, fine], {"dataset": "x", "seed": 3}).save(tmp_path)
    path = tmp_path / "tree.safetensors"
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).integers(8 * len(whole), size=200):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(InputError):
            LabelTree.load(tmp_path)
