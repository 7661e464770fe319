"""The label graph: which labels occur together, by random walks over documents and labels.

Source: Mittal et al., ECLARE: Extreme classification with label graph correlations (WWW 2021),
section 3, with the settings of CascadeXML (Kharbanda et al., NeurIPS 2022): 400 visits, restart
0.8, the 10 labels met most often.
"""

from __future__ import annotations

import logging

import numpy as np
from numba import njit
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.parallel import in_parallel, keep_compiled
from xmlkernels.ticks import Ticks
from xmlkernels.tree.products import top_product

log = logging.getLogger(__name__)

_LABELS = 1024  # walks a thread does at a time
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def label_graph(
    labels: csr_matrix,
    *,
    visits: int = 400,
    restart: float = 0.8,
    top: int = 10,
    most_documents: int = 0,
    seed: int = 0,
) -> csr_matrix:
    """How often a walk from each label visits each other label.

    A visit: from the current label to a document of it, from there to a label of that document
    (itself possible), both uniformly; with probability `restart` the next visit starts from the
    origin, else from the label just visited.

    Args:
        labels: [N, L]; non-zero is positive.
        visits: of the walk of each label.
        top: labels kept for each, those visited most; of equals the lower id. The label itself
            stays with them, with its own count or 1.
        most_documents: labels of more documents than this neither walk nor are met (0: no such
            bound). They and labels without documents have an edge of 1 to themselves alone.
        seed: with the label's number and that of the visit it decides every step; threads decide
            nothing.

    Returns:
        fp32 CSR [L, L] of counts, columns ascending, at most top + 1 a row.

    Raises:
        InputError: a number out of range.
    """
    rules = [
        (1 <= visits < 2**31, "visits", "1 to 2**31 - 1", visits),
        (0 <= restart <= 1, "restart", "a probability", restart),
        (top >= 1, "top", "at least 1", top),
        (most_documents >= 0, "most_documents", "0 (no bound) or more", most_documents),
        (0 <= seed < 2**64, "seed", "an integer from 0 to 2**64 - 1", seed),
    ]
    for good, where, expected, got in rules:
        if not good:
            raise InputError(where, expected, str(got), "mend the setting of the walk")
    forward = csr_matrix(labels != 0)
    if most_documents:
        frequent = np.bincount(forward.indices, minlength=forward.shape[1]) > most_documents
        forward.data[frequent[forward.indices]] = False
        forward.eliminate_zeros()
    backward = csr_matrix(forward.T)
    count, width = forward.shape[1], min(top, visits) + 1
    index, times = np.empty((count, width), np.int32), np.empty((count, width), np.float32)
    found = np.empty(count, np.int64)
    edges = (
        backward.indptr.astype(np.int64),
        backward.indices,
        forward.indptr.astype(np.int64),
        forward.indices,
    )
    settings = (np.int64(visits), np.uint64(round(restart * 2**32)), np.int64(top), np.uint64(seed))
    keep_compiled(_walk)
    in_parallel(
        lambda begin, end: _walk(begin, end, *edges, *settings, index, times, found),
        count,
        _LABELS,
        done=Ticks(log, "walks of the label graph", count, "labels").add,
    )
    kept = np.arange(width) < found[:, None]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(found)])
    return csr_matrix((times[kept], index[kept], ends), shape=(count, count))


def prune(graph: csr_matrix, vectors: np.ndarray, least: float) -> csr_matrix:
    """Remove edges between labels whose cosine similarity is below `least`.

    Edges of a label to itself stay.

    Args:
        vectors: [L, D], of any length; a label whose vector is zero keeps its edges.

    Raises:
        InputError: not one vector per label.
    """
    if vectors.ndim != 2 or len(vectors) != graph.shape[0]:
        raise InputError(
            "vectors",
            f"[{graph.shape[0]}, D], one a label",
            str(list(vectors.shape)),
            "pass those of the same labels",
        )
    norm = np.linalg.norm(vectors, axis=1)
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    keep = np.ones(graph.nnz, bool)
    for start in range(0, graph.nnz, 1 << 16):
        a, b = row[start : start + (1 << 16)], graph.indices[start : start + (1 << 16)]
        size = norm[a] * norm[b]
        similar = np.einsum("ij,ij->i", vectors[a], vectors[b]) >= least * size
        keep[start : start + (1 << 16)] = similar | (a == b) | (size == 0)
    ends = np.concatenate([[0], np.cumsum(keep)])[graph.indptr]
    return csr_matrix((graph.data[keep], graph.indices[keep], ends), shape=graph.shape)


def normalised(graph: csr_matrix) -> csr_matrix:
    """Return D_r^-1/2 G D_c^-1/2 with the sums of the rows and of the columns.

    Every label has an edge to itself, so no sum is 0.
    """
    rows, columns = np.asarray(graph.sum(axis=1)).ravel(), np.asarray(graph.sum(axis=0)).ravel()
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    data = graph.data / np.sqrt(rows[row] * columns[graph.indices])
    return csr_matrix((data.astype(np.float32), graph.indices, graph.indptr), shape=graph.shape)


def smooth(graph: csr_matrix, features: csr_matrix, keep: int = 1000) -> csr_matrix:
    """Mix label features [L, V] with those of the neighbours in a label graph [L, L].

    The `keep` largest entries of each row remain.
    """
    return top_product(normalised(graph), features, keep, what="smoothing")


@njit(nogil=True)
def _draw(seed, number, step):  # type: ignore[no-untyped-def]
    """Draw four uint32 words (in uint64) by Philox-4x32-10, the project's generator.

    Key: `seed`; counter: (number, step).

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    k0, k1 = np.uint64(seed) & _LOW, np.uint64(seed) >> _HALF
    c0 = np.uint64(number) & _LOW
    c1 = np.uint64(number) >> _HALF
    c2 = np.uint64(step) & _LOW
    c3 = np.uint64(0)
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(nogil=True)
def _one_of(word, start, end):  # type: ignore[no-untyped-def]
    """Map a uint32 word to a uniform integer in [start, end).

    No integer is likelier than another by more than (end - start) / 2^32.
    """
    return start + np.int64((word * np.uint64(end - start)) >> _HALF)


@njit(nogil=True)
def _walk(  # type: ignore[no-untyped-def]
    begin,
    end,
    to_document,
    documents,
    to_label,
    labels,
    visits,
    restart,
    top,
    seed,
    index,
    times,
    found,
):
    for origin in range(begin, end):
        if to_document[origin + 1] == to_document[origin]:
            index[origin, 0], times[origin, 0], found[origin] = origin, 1, 1
            continue
        visited = np.empty(visits, np.int32)
        current = origin
        for visit in range(visits):
            first, second, third, _ = _draw(seed, origin, visit)
            document = documents[_one_of(first, to_document[current], to_document[current + 1])]
            current = labels[_one_of(second, to_label[document], to_label[document + 1])]
            visited[visit] = current
            if third < restart:
                current = origin
        visited.sort()
        found[origin] = _most_visited(visited, origin, top, index[origin], times[origin])


@njit(nogil=True)
def _most_visited(visited, origin, top, index, times):  # type: ignore[no-untyped-def]
    """Write the `top` labels visited most, and the origin, by label.

    Visits are a sorted list; returns the number of labels written.
    """
    label, count = np.empty(len(visited) + 1, np.int32), np.zeros(len(visited) + 1, np.int64)
    n, own = 0, -1
    for i in range(len(visited)):
        if i == 0 or visited[i] != visited[i - 1]:
            label[n] = visited[i]
            n += 1
        count[n - 1] += 1
        if visited[i] == origin:
            own = n - 1
    if own < 0:
        own = n
        label[own], count[own] = origin, 1
    chosen = np.zeros(n + 1, np.bool_)
    for _ in range(min(top, n)):
        best = -1
        for i in range(n):
            if not chosen[i] and (best < 0 or count[i] > count[best]):
                best = i
        chosen[best] = True
    chosen[own] = True
    # An origin never visited is last in the list and is placed by label.
    place = 0
    late = own == n
    for i in range(n):
        if late and label[i] > origin:
            index[place], times[place], late = origin, 1, False
            place += 1
        if chosen[i]:
            index[place], times[place] = label[i], count[i]
            place += 1
    if late:
        index[place], times[place] = origin, 1
        place += 1
    return place
