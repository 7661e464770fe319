"""Label ids and counts of entries beyond 2^31, from a parsed file to written predictions.

A table of so many labels is virtual here: a process holds a few rows far behind its beginning.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from xmlkernels import dist
from xmlkernels.data.formats import sparse_python, sparse_text
from xmlkernels.data.formats.matrices import write_npz
from xmlkernels.evaluation import score_matrix
from xmlkernels.label_counts import LabelCounts
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.plain import PlainHead
from xmlkernels.nn.shard import Shard, shard_rows

WIDE, COUNT, WIDTH = 1 << 32, 300, 16  # as an int32 the first row would be row 0
LABELS = WIDE + 2 * COUNT


def head(first: int, dtype: str = "fp32", kind: type[FullHead] = FullHead) -> FullHead:
    """A shard of rows first to first + COUNT - 1, with the same values wherever it is."""
    made = kind(LABELS, WIDTH, dtype=dtype, std=0, shard=Shard(first, first + COUNT, LABELS))
    values = torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(1))
    made.weight.copy_(values)
    return made


def batch(first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, and positives of the whole table: two outside of the shard."""
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    own = [first + 1, first + 1, first + COUNT - 1]
    rows = sorted([5 if first else LABELS - 7, *own, first + COUNT])
    samples = torch.tensor([0, 1, 2, 3, 0][: len(rows)], dtype=torch.int32)
    order = torch.tensor(rows)
    inside = (order >= first) & (order < first + COUNT)
    samples[inside] = torch.tensor([0, 3, 2], dtype=torch.int32)
    return x, order, samples


@pytest.mark.parametrize("kind", [FullHead, PlainHead])
def test_a_table_is_trained_and_scored_by_rows_beyond_int32(kind: type[FullHead]) -> None:
    near, far = head(0, kind=kind), head(WIDE, kind=kind)
    for _ in range(2):
        found = [h.step(*batch(h.shard.first), lr=0.1, need_loss=True) for h in (near, far)]
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert torch.equal(near.weight, far.weight)
    x = batch(0)[0]
    (values, rows), (values_far, rows_far) = near.topk(x, 5), far.topk(x, 5)
    assert rows_far.dtype == torch.int64 and int(rows_far.min()) >= WIDE
    assert torch.equal(rows + WIDE, rows_far) and torch.equal(values, values_far)
    best = rows_far[:, :2].contiguous()
    assert torch.equal(far.topk(x, 3, best)[1], rows_far[:, 2:])
    assert torch.equal(near.loss(*batch(0)), far.loss(*batch(WIDE)))


def test_rounding_goes_by_all_bits_of_a_row() -> None:
    """A row number cut to 32 bits would draw what row 0 draws."""
    near, far, again = head(0, "bf16"), head(WIDE, "bf16"), head(WIDE, "bf16")
    for h in (near, far, again):
        h.step(*batch(h.shard.first), lr=0.1)
    assert torch.equal(far.weight, again.weight) and not torch.equal(near.weight, far.weight)


def test_shards_and_their_lists_are_merged_beyond_int32() -> None:
    shards = [shard_rows(LABELS, 3, rank) for rank in range(3)]
    assert shards[0].first == 0 and shards[-1].end == LABELS
    assert all(a.end == b.first for a, b in itertools.pairwise(shards))
    values = torch.tensor([[1.0, 2.0, 2.0, -torch.inf]])
    rows = torch.tensor([[WIDE, WIDE + 9, (1 << 31) + 1, -1]])
    merged, found = dist.merge_topk(values, rows, 3)
    assert found.tolist() == [[(1 << 31) + 1, WIDE + 9, WIDE]], "of equal values the lower row"
    assert merged.tolist() == [[2.0, 2.0, 1.0]]


def test_predictions_and_counts_hold_labels_beyond_int32(tmp_path: Path) -> None:
    rows = np.array([[WIDE + 3, 7], [(1 << 31) + 1, -1]])
    matrix = score_matrix(np.array([[1.0, 0.0], [2.0, 0.0]], np.float32), rows, LABELS)
    write_npz(tmp_path / "predictions.npz", matrix, keep_zeros=True)
    read = scipy.sparse.load_npz(tmp_path / "predictions.npz")
    assert read.indices.dtype == np.int64 and read.indices.tolist() == [7, WIDE + 3, (1 << 31) + 1]
    assert read.shape == (2, LABELS) and read.nnz == 3
    counts = LabelCounts(scipy.sparse.vstack([matrix, matrix[:1]]).tocsr())
    assert counts.of(np.array([WIDE + 3, (1 << 31) + 1, 8])).tolist() == [2, 1, 0]
    assert counts.unseen == LABELS - 3
    assert counts.place(np.array([8, WIDE + 3])).tolist() == [7, LABELS - 1]


def test_files_of_text_hold_ids_beyond_int32_and_count_entries_in_64_bits(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(f"2 {LABELS}\n{WIDE + 3}:1 7:2\n{(1 << 31) + 1}:3\n")
    read = sparse_text.read_sparse(path)
    assert read.shape == (2, LABELS) and read.indices.dtype == np.int64
    assert sorted(read.indices.tolist()) == [7, (1 << 31) + 1, WIDE + 3]
    for parser in (sparse_text._parser(), sparse_python.parse_sparse):
        how = False, False, False, "error", 1
        (((pointers, columns, _),), _) = parser(b"1:1 2:1\n3:1\n", 0, 2, 10, -1, *how)
        assert pointers.dtype == np.int64 and pointers.tolist() == [0, 2, 3]
        assert columns.dtype == np.int32, "columns are short where all of them are"
