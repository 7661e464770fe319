"""`cluster_step_` in Triton: the reference's step over many tiles of rows, pairs and columns, and
nothing else touched.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.model
from benchmarks.model import (
    PAIRS,
    cluster_pairs_accesses,
    cluster_step_accesses,
    cluster_step_memory,
)
from common import (
    DTYPES,
    Step,
    assert_no_worse,
    assert_same_bits,
    bits,
    dyadic_step,
    fp8_step,
    make_hyper,
    name_of,
    random_step,
)
from counting import counted
from xmlkernels.reference.cluster_step import cluster_step_ as reference
from xmlkernels.triton import cluster_pairs
from xmlkernels.triton import cluster_step as kernel

NAMES = ("weight", "bias", "momentum", "second", "kahan", "row_scale")
# Clusters of 0, 1 and several rows; the largest spans three tiles. Cluster 4 is selected by nobody,
# cluster 5 by everybody.
ROW_PTR = torch.tensor([0, 1, 1, 36, 40, 47, 58])
B, N, D, M = 18, 60, 21, 35


@pytest.fixture(autouse=True, params=["tiles", "pairs"])
def way(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Both ways to do a step, in small tiles."""
    for name in ("MOST", "MOST_FP32"):
        monkeypatch.setattr(kernel, name, (16, 16, 16))
    for module, name in ((kernel, "SCORED"), (cluster_pairs, "SCORED"), (cluster_pairs, "UPDATED")):
        monkeypatch.setattr(module, name, 16)
    monkeypatch.setattr(kernel, "FEW", {"tiles": 0, "pairs": 1000}[request.param])
    return request.param


def run(
    op: Any, step: Step, clusters: Tensor, row_ptr: Tensor, most: int, *, wide: bool = False
) -> dict[str, Tensor]:
    """dx, scores, loss and every tensor after a step on copies."""
    t = {k: v.clone() for k, v in step.tensors.items()}
    if wide:
        t = {k: v.double() if v.is_floating_point() and k != "hyper" else v for k, v in t.items()}
    given = {k: t[k] for k in ("pos_value", *NAMES[1:]) if k in t}
    first = (
        t["weight"],
        t["x"],
        clusters,
        row_ptr,
        most,
        t["pos_row"],
        t["pos_sample"],
        t["hyper"],
        t["counter"],
    )
    dx, scores, loss = op(*first, **given, **step.options)
    return {"dx": dx, "scores": scores, "loss": loss, **{k: t[k] for k in NAMES if k in t}}


def chosen(b: int = B) -> Tensor:
    """Three clusters a sample: the last, one or two of the others in any order, pads."""
    g = torch.Generator().manual_seed(0)
    clusters = torch.stack([torch.randperm(4, generator=g)[:3] for _ in range(b)])
    clusters[::3, 1] = -1
    clusters[:, 2] = 5
    return clusters


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bits_where_every_sum_is_exact(dtype: torch.dtype) -> None:
    """Random words included: global rows beyond 2^32. Rows that nobody selects, and padding rows,
    hold NaN and keep it.
    """
    step = dyadic_step(B, N, D, dtype, row_offset=2**33, rows=57)
    step.tensors["bias"] = torch.zeros(N)
    step.tensors["weight"][40:47] = step.tensors["weight"][57:] = math.nan
    want, got = (run(op, step, chosen(), ROW_PTR, M) for op in (reference, kernel.cluster_step_))
    assert want["loss"] > 0 and (want["scores"] == -math.inf).any()
    assert_same_bits(
        {**got, "dx": got["dx"] + 0.0}, {**want, "dx": want["dx"] + 0.0}, but=("scores", "loss")
    )
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=0.0)
    assert torch.equal(got["scores"], want["scores"])


STATES: dict[str, tuple[torch.dtype, dict[str, torch.dtype], dict[str, Any]]] = {
    "fp32-adam": (
        torch.float32,
        {"bias": torch.float32, "momentum": torch.float32, "second": torch.float32},
        {},
    ),
    "fp32-row-adam": (
        torch.float32,
        {"momentum": torch.float32, "second": torch.float32},
        {"row": True},
    ),
    "fp16-row-adam-decoupled": (
        torch.float16,
        {"momentum": torch.float32, "second": torch.float32},
        {"row": True, "decoupled": True},
    ),
    "fp16-momentum-kahan": (torch.float16, {"momentum": torch.float16, "kahan": torch.float16}, {}),
}


@pytest.mark.parametrize("name", STATES)
def test_no_worse_than_the_reference_in_fp32(name: str) -> None:
    """Against float64; the same bits again on a second run, in one of the variants."""
    dtype, states, options = STATES[name]
    options = dict(options)
    row_wise = options.pop("row", False)
    hyper = make_hyper(0.01, 0.1, 0.9, 0.99, 1e-6, 0.5, 2.0)
    step = random_step(
        B, N, D, dtype, share=0.1, states=states, hyper=hyper, values=True, **options
    )
    if row_wise:
        step.tensors["second"] = step.tensors["second"].float().mean(1).contiguous()
    args = (step, chosen(), ROW_PTR, M)
    got = run(kernel.cluster_step_, *args)
    if name == "fp32-adam":
        assert_same_bits(got, run(kernel.cluster_step_, *args))
    low, exact = run(reference, *args), run(reference, *args, wide=True)
    real = exact["scores"] > -math.inf
    assert torch.equal(got.pop("scores") > -math.inf, real)
    for key, value in got.items():
        kind = value.dtype if key in NAMES else dtype
        rounded = kind if key in ("weight", "momentum") and "kahan" not in states else None
        assert_no_worse(value, low[key].to(kind), exact[key], kind, what=key, rounded=rounded)
        if key in NAMES and value.dim() == 2:
            assert torch.equal(value[40:47], step.tensors[key][40:47]), (
                f"{key}: a row that nobody selects was written"
            )


@pytest.mark.parametrize("state", [None, "momentum", "row-wise"])
def test_e4m3_bits_where_every_sum_is_exact(state: str | None) -> None:
    """Scales from 2^-11 to 2^-8: subnormals, normals, rows that saturate; a maximum that grows and
    one that stays.
    """
    hyper = make_hyper(2.0**-4, 2.0**-4, 0.5, 0.5, 1e-3, 0.5, 4.0)
    step = dyadic_step(B, N, D, torch.float32, row_offset=2**33, rows=57, hyper=hyper)
    step = fp8_step(step, 2.0 ** -(torch.arange(N) % 4 + 8).float())
    t = step.tensors
    t["bias"], t["row_scale"][::2, 1] = torch.zeros(N), 0
    t["row_scale"][1::2, 1] = 2.0**7
    t["weight"].view(torch.uint8)[40:47] = t["weight"].view(torch.uint8)[57:] = 0x7F  # NaN
    if state:
        t["momentum"] = torch.zeros(N, D)
    if state == "row-wise":
        t["second"] = torch.zeros(N)
    want, got = (run(op, step, chosen(), ROW_PTR, M) for op in (reference, kernel.cluster_step_))
    assert torch.equal(got.pop("scores"), want.pop("scores"))
    assert_same_bits(
        {**got, "dx": got["dx"] + 0.0}, {**want, "dx": want["dx"] + 0.0}, but=("loss", "second")
    )
    if state == "row-wise":  # a mean over columns: its last place is the order's
        torch.testing.assert_close(got["second"], want["second"], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(got["loss"], want["loss"], rtol=2e-6, atol=0.0)
    moved = bits(got["weight"]) != bits(t["weight"])
    assert moved.float().mean() > 0.3 and not moved[40:47].any() and not moved[57:].any()
    assert (got["weight"].float().abs() == 448).any()
    assert torch.equal(got["row_scale"][1::2], t["row_scale"][1::2])
    assert (got["row_scale"][:36:2, 1] > 0).all()


def test_level_zero_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cluster of all rows; shares of dx for one tile and one block of columns at a time,
    row-wise moments kept.
    """
    step = dyadic_step(B, N, D, torch.float32)
    clusters, row_ptr = torch.zeros(B, 1, dtype=torch.int64), torch.tensor([0, N])
    for name, shape in (("momentum", (N, D)), ("second", (N,))):
        step.tensors[name] = torch.zeros(shape)
    step.tensors["hyper"] = make_hyper(2.0**-8, 0.0, 0.5, 0.5, 1e-3, 0.5, 4.0)
    want = run(reference, step, clusters, row_ptr, N + 3)
    whole = run(kernel.cluster_step_, step, clusters, row_ptr, N + 3)
    assert torch.equal(whole["dx"], want["dx"]) and torch.equal(whole["momentum"], want["momentum"])
    torch.testing.assert_close(whole["weight"], want["weight"], rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(kernel, "PART_BYTES", 1)
    assert len(kernel.pieces(B, 4, D, 16)) == 8
    assert_same_bits(run(kernel.cluster_step_, step, clusters, row_ptr, N + 3), whole)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=name_of)
def test_rows_that_are_read_again(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Long ones, whose shares of dx are formed after all scores of a program."""
    eight = dtype == torch.float8_e4m3fn
    step = dyadic_step(B, N, D, torch.float32 if eight else dtype)
    if eight:
        step = fp8_step(step, 2.0 ** -(torch.arange(N) % 4 + 8).float())
    held = run(kernel.cluster_step_, step, chosen(), ROW_PTR, M)
    monkeypatch.setattr(cluster_pairs, "HELD", 0)
    again = run(kernel.cluster_step_, step, chosen(), ROW_PTR, M)
    assert_same_bits({**again, "dx": again["dx"] + 0.0}, {**held, "dx": held["dx"] + 0.0})


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_batch_that_is_not_finite_touches_nothing(value: float) -> None:
    step = random_step(
        3, N, 5, torch.float32, states={"bias": torch.float32, "momentum": torch.float32}
    )
    step.tensors["x"][2, 4] = value
    got = run(kernel.cluster_step_, step, chosen(3), ROW_PTR, M)
    assert all(got[name].isnan().all() for name in ("dx", "scores", "loss"))
    assert_same_bits({k: got[k] for k in ("weight", "bias", "momentum")}, step.tensors)


@pytest.mark.parametrize("b, k, clusters", [(0, 2, 3), (2, 0, 3), (2, 2, 0), (2, 2, 3)], ids=str)
def test_empty(b: int, k: int, clusters: int) -> None:
    """No sample, no choice, no cluster, only pads."""
    step = random_step(b, 6, 5, torch.float32, share=0.0)
    row_ptr = torch.tensor([0, 2, 4, 6][: clusters + 1])
    args = (step, torch.full((b, k), -1), row_ptr, 2)
    got = run(kernel.cluster_step_, *args)
    assert torch.equal(got["weight"], step.tensors["weight"]) and got["loss"].tolist() == [0]
    assert torch.equal(got["dx"], torch.zeros(b, 5))
    assert torch.equal(got["scores"], torch.full((b, k, 2), -math.inf))


@pytest.mark.parametrize(
    "pairs, tiles, width, block",
    [(64 * 400, 1, 768, 64), (512, 256, 768, 64), (512, 2000, 768, 32), (7, 3, 5, 16)],
)
def test_pieces_cover_all_within_the_workspace(
    pairs: int, tiles: int, width: int, block: int
) -> None:
    todo = kernel.pieces(pairs, tiles, width, block)
    cells = [
        (t, c)
        for first, number, a, b in todo
        for t in range(first, first + number)
        for c in range(a, b, block)
    ]
    assert sorted(cells) == [(t, c) for t in range(tiles) for c in range(0, width, block)]
    assert all(4 * pairs * number * (b - a) <= kernel.PART_BYTES for _, number, a, b in todo)
    assert todo[0][3] - todo[0][2] == max(b - a for _, _, a, b in todo)
    assert todo[0][1] == max(t[1] for t in todo)


@pytest.mark.parametrize("held", [True, False], ids=["held", "read again"])
def test_accesses_are_the_closed_form(
    monkeypatch: pytest.MonkeyPatch, way: str, held: bool
) -> None:
    """A row of an active cluster is read for every block of its pairs (scores) and twice for its
    update, and written once; pair by pair once for each where registers hold it, else twice, and
    once for its update.
    """
    if not held:
        for module in (cluster_pairs, benchmarks.model):
            monkeypatch.setattr(module, "HELD", D - 1)
    step = random_step(B, N, D, torch.float32, states={"momentum": torch.float32})
    clusters = chosen()
    t = {k: v.clone() for k, v in step.tensors.items()}
    named = {k: t[k] for k in ("weight", "x", "momentum")}
    with counted(monkeypatch, named) as traffic:
        kernel.cluster_step_(
            t["weight"],
            t["x"],
            clusters,
            ROW_PTR,
            M,
            t["pos_row"],
            t["pos_sample"],
            t["hyper"],
            t["counter"],
            momentum=t["momentum"],
        )
    sizes, pairs = ROW_PTR.diff(), torch.bincount(clusters[clusters >= 0], minlength=6)
    assert pairs.max() > 16 and sizes.max() > 32  # two blocks of pairs, three tiles of rows
    both = sizes.tolist(), pairs.tolist()
    if way == "tiles":
        model = cluster_step_accesses(B, D, *both, block_r=16, block_p=16, states=1)
    else:
        model = cluster_pairs_accesses(B, D, clusters.shape[1], M, *both, states=1)
    model["momentum"] = model.pop("state")
    assert model["momentum"] == (int(sizes[pairs > 0].sum()) * D,) * 2
    assert {name: (traffic.loads[name], traffic.stores[name]) for name in model} == model


@pytest.mark.parametrize("most", [1, 11, 17, 40, 64, 1000])
def test_the_models_tiles_are_the_kernels(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.undo()
    tiles = math.ceil(most / kernel._sides(64, 400, 600, most, True)[0])
    shares, rows = 4 * 64 * 400 * tiles * 768, round(600 * most * (1 - (1 - 400 / 600) ** 64))
    rest = 2 * rows * 768 * (2 + 2 * 2) + 64 * 400 * (4 * most + 8) + 8 * 64 * 768
    assert cluster_step_memory(64, 768, 400, most, 600, states=2) == rest + 2 * shares


@pytest.mark.parametrize("count", [6_399, 6_400, 60_917])
def test_the_model_knows_which_steps_go_pair_by_pair(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.undo()
    assert kernel.takes_pairs(64, 400, count) == (64 * 400 <= PAIRS * count) == (count > 6_399)
    rows = round(count * 11 * (1 - (1 - 400 / count) ** 64)) * 768
    rest = 64 * 400 * (4 * 11 + 8) + 8 * 64 * 768 + 2 * rows * 2 * 3
    # The weights once more for the scores of each pair; or shares of dx for each pair.
    once_more = 2 * 64 * 400 * 11 * 768 if count > 6_399 else 2 * 4 * 64 * 400 * 768
    assert cluster_step_memory(64, 768, 400, 11, count, states=2) - rest == once_more
