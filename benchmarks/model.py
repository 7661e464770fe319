"""What a kernel must move by its schedule: closed forms of its loads and stores, and of bytes.

They equal what the interpreter counts (tests/interpreter). Printed next to a floor and called
"model": an account of accesses, no measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the GPU kernel; the defaults are those of D=768, B=128 in bf16.

    `fused` is the second pass in one kernel, for one block of samples on sm_90 and later. `wide` is
    how many times as many columns its kernels take where they are two, and rows where there are no
    states; score_l, score_b: a tile of logits.
    """

    chunk: int = 786_432
    block_b: int = 128
    block_l: int = 128
    block_r: int = 64
    block_d: int = 64
    step: int = 64
    splits: int = 22
    wide: int = 2
    score_l: int = 256
    score_b: int = 128
    fused: bool = True


def _up(a: int, b: int) -> int:
    return -(-a // b)


def bce_step_accesses(
    B: int,
    L: int,
    D: int,
    blocks: Blocks,
    *,
    positives: int = 0,
    states: int = 0,
    bias: bool = False,
    loss: bool = False,
) -> dict[str, tuple[int, int]]:
    """Count the elements that one `bce_step_` loads and stores, by tensor.

    `states` is how many of momentum, second and kahan there are. The search for each block's first
    positive is left out: it depends on the data, and is at most
    (ceil(L / block_l) + 1) (floor(log2(positives)) + 1) loads of pos_row. `positives` are those
    within the rows, each read once more for the loss.
    """
    p = blocks
    of_b, of_s = _up(B, p.block_b), _up(B, p.score_b)
    of_l, of_r = _up(L, p.block_l), _up(L, p.block_r)
    side = 1 if states else p.wide  # of the update where it is a kernel of its own
    rows = _up(L, side * p.block_r)
    chunks, chunk = _up(L, p.chunk), min(p.chunk, of_l * p.block_l)
    pitch, step = of_b * p.block_b, min(p.step, p.block_b)
    partial = p.splits * B * D
    # Once where one program forms both products of a tile, with x read once a program.
    dx = _up(D, (1 if p.fused else p.wide) * p.block_d) * of_r * p.block_r * pitch
    update = _up(D, side * p.block_d) * rows * side * p.block_r * _up(B, step) * step
    again = dx if p.fused else dx + update
    x = chunks * partial if p.fused else rows * B * D
    read = of_s * positives * (2 if loss else 1)
    out = {
        # Logits by every block of samples; dX by every block of samples and the update once.
        "weight": ((of_s + (1 if p.fused else of_b + 1)) * L * D, L * D),
        "state": (states * L * D, states * L * D),
        # Logits by every tile of labels, the update, the finite check once.
        "x": (_up(L, p.score_l) * B * D + x + B * D, 0),
        "gradient": (again, of_l * p.block_l * pitch),
        "partial": (chunks * partial, chunks * partial),
        "dx": (0, B * D),
        "pos_row": (read, 0),
        "pos_sample": (read, 0),
    }
    if bias:
        sums = of_s * of_l * p.block_l
        out |= {"bias": ((of_s + 1) * L, L), "column_sum": (of_s * L, sums)}
    if loss:
        # Sums over the chunks, then over all blocks.
        first = chunk // p.block_l
        out |= {"loss_part": (of_s * of_l, of_s * of_l), "loss": (0, 1)}
        assert first <= of_l
    return out


def bce_step_bytes(
    B: int,
    L: int,
    D: int,
    *,
    element: int = 2,
    state_element: int = 2,
    states: int = 0,
    positives: int = 0,
    bias: bool = False,
    loss: bool = False,
    blocks: Blocks | None = None,
) -> dict[str, int]:
    """Model one `bce_step_`: bytes between memory and L2, and between L2 and the processors.

    The assumption: L2 holds nothing from one pass over a chunk to the next, and programs that run
    side by side share what they read. Then memory sees each row twice (three times where the second
    pass is two kernels) and back once, the gradient once back and once (twice) again, the states,
    bias, positives and the partial sums of dX.

    Returns:
        memory: bytes that must come from or go to memory. cache: bytes of all accesses of the three
            products.
    """
    p = blocks or Blocks(fused=Blocks.block_b >= B and element < 4)
    if blocks is None and (bias or loss):
        p = replace(p, score_l=p.block_l, score_b=64)  # more is done for a logit
    options = {"positives": positives, "states": states, "bias": bias, "loss": loss}
    of = bce_step_accesses(B, L, D, p, **options)
    gradient = max(element, 2)  # of an e4m3 table it is bf16
    size = dict.fromkeys(of, 4) | {"weight": element, "x": gradient, "gradient": gradient}
    size |= {"state": state_element, "pos_row": 8}
    reads = 2 if p.fused else 3
    tables = (reads + 1) * L * D * element + 2 * states * L * D * state_element
    kept = reads * of["gradient"][1] * gradient + 4 * sum(of["partial"])
    rest = 2 * B * D * gradient + positives * 12 + (8 * L if bias else 0)
    accesses = sum((loads + stores) * size[name] for name, (loads, stores) in of.items())
    return {"memory": tables + kept + rest, "cache": accesses}


CACHE = 40 << 20
"""Bytes of the smallest L2 of the large cards (A100).

What a call writes and reads again stays in it up to this size.
"""


def matmul_topk_accesses(
    B: int,
    L: int,
    D: int,
    chunks: Sequence[int],
    *,
    block_b: int = 128,
    block_l: int = 256,
    bias: bool = False,
) -> dict[str, tuple[int, int]]:
    """Count the elements of table, batch and bias that one `matmul_topk` loads and stores.

    chunks: labels taken between two cuts. The lists are left out: what enters them depends on the
    data.
    """
    of_b, of_l = _up(B, block_b), sum(_up(labels, block_l) for labels in chunks)
    out = {"weight": (of_b * L * D, 0), "x": (of_l * B * D, 0)}
    return out | ({"bias": (of_b * L, 0)} if bias else {})


def matmul_topk_memory(
    B: int, L: int, D: int, K: int, *, element: int = 2, samples: int = 1024
) -> int:
    """Model one `matmul_topk`: bytes between memory and L2.

    The table comes once for each `samples` of the batch: tiles of one block of labels run next to
    each other and share it in L2, where x and the lists' new entries stay.
    """
    return _up(B, samples) * L * D * element + 4 * B * D + 12 * B * K


def shortlist_accesses(
    B: int,
    S: int,
    D: int,
    named: int,
    *,
    shared: bool,
    block_s: int,
    block_b: int = 1,
    block_d: int = 1,
) -> dict[str, dict[str, tuple[int, int]]]:
    """Count the elements that `shortlist_matmul` loads and stores: "forward", and "dx" backward.

    named: entries of the index that are no pads. block_b: samples of a tile of a shared list; lists
    per sample have one.
    """
    of_b, of_s, of_d = _up(B, block_b) if shared else 1, _up(S, block_s), _up(D, block_d)
    weight = (of_b * named * D, 0)
    pairs = named * B if shared else named
    return {
        "forward": {"weight": weight, "x": (of_s * B * D, 0)},
        "dx": {"weight": weight, "x": (0, 0), "dlogits": (of_d * pairs, 0)},
    }


def shortlist_memory(B: int, S: int, D: int, *, shared: bool, element: int = 2) -> int:
    """Model one forward `shortlist_matmul`: bytes between memory and L2.

    Every row that a list names comes once, also one that other lists name (a shared list's once for
    the batch); index, x and logits once.
    """
    lists = 1 if shared else B
    return lists * S * D * element + 8 * lists * S + 4 * B * S + 4 * B * D


def cluster_step_accesses(
    B: int,
    D: int,
    sizes: Sequence[int],
    pairs: Sequence[int],
    *,
    block_r: int,
    block_p: int,
    states: int = 0,
) -> dict[str, tuple[int, int]]:
    """Count the elements that one `cluster_step_` loads and stores.

    sizes: rows of each cluster. pairs: samples that select it. Without a row-wise moment, which
    reads rows and x once more, and where all shares of dx are held at a time.
    """
    rows = sum(size for size, p in zip(sizes, pairs, strict=True) if p)
    scored = sum(_up(p, block_p) * size for size, p in zip(sizes, pairs, strict=True))
    used = sum(p * _up(size, block_r) for size, p in zip(sizes, pairs, strict=True))
    return {
        # Scores by every block of pairs, shares of dx, the update.
        "weight": ((scored + 2 * rows) * D, rows * D),
        "state": (states * rows * D, states * rows * D),
        # Scores and gradient by every tile of rows, the finite check once.
        "x": (2 * used * D + B * D, 0),
    }


PAIRS, SPAN, LIST = 4, 4, 16  # of xmlkernels/triton/cluster_pairs.py: FEW, SPAN and ROWS
HELD, HELD_BYTES = 768, 1536  # the same: the longest rows that are read once for scores and dx


def cluster_pairs_accesses(
    B: int,
    D: int,
    K: int,
    M: int,
    sizes: Sequence[int],
    pairs: Sequence[int],
    *,
    element: int = 2,
    states: int = 0,
) -> dict[str, tuple[int, int]]:
    """Count the same where clusters have few pairs: see `cluster_step_accesses`.

    M: the most rows of a cluster. element: bytes of a number of the table.
    """
    reads = 1 if D <= HELD and D * element <= HELD_BYTES else 2
    rows = sum(size for size, p in zip(sizes, pairs, strict=True) if p)
    candidates = sum(p * size for size, p in zip(sizes, pairs, strict=True))
    tiles = B * _up(K * M, SPAN * LIST) * SPAN
    # Two pairs of every row of a tile, whether it has them or not, and those beyond.
    products = 2 * LIST * _up(rows, LIST)
    products += sum(max(p - 2, 0) * size for size, p in zip(sizes, pairs, strict=True))
    return {
        # Scores and shares of dx by every pair, the update by every row.
        "weight": ((reads * candidates + rows) * D, rows * D),
        "state": (states * rows * D, states * rows * D),
        # Scores by every tile of candidates, the gradient, the check.
        "x": ((tiles + products + B) * D, 0),
    }


def cluster_step_memory(
    B: int,
    D: int,
    K: int,
    M: int,
    C: int,
    *,
    element: int = 2,
    state_element: int = 2,
    states: int = 0,
) -> int:
    """Model one `cluster_step_`: bytes between memory and L2.

    Each sample selects K of C clusters of M rows at random. The assumption: a touched row and its
    states come once and go back once, however many samples share it; the gradients of the logits
    and x stay in L2, and so do the shares of dx where they fit, else they go to memory and come
    back. Where a cluster has few pairs, its rows come once for the scores of each pair, too.
    """
    touched = round(C * M * (1 - (1 - K / C) ** B))
    if B * K <= PAIRS * C:
        shares = 4 * B * _up(K * M, SPAN * LIST) * D
        read = B * K * M * D * element if touched * D * element > CACHE else touched * D * element
        rows = read + touched * D * (2 * (element + states * state_element))
        return rows + (2 * shares if shares > CACHE else 0) + 4 * B * K * M + 8 * B * K + 8 * B * D
    block_r = min(64, max(16, 1 << max(0, M - 1).bit_length()))
    shares = 4 * B * K * _up(M, block_r) * D
    rows = 2 * touched * D * (element + states * state_element)
    return rows + (2 * shares if shares > CACHE else 0) + 4 * B * K * M + 8 * B * K + 8 * B * D
