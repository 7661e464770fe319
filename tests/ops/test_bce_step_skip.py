"""Tile skipping of `bce_step_`: which groups are skipped, what is left of their step, and what it
may cost.
"""

import math

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    Step,
    assert_no_worse,
    assert_same_bits,
    fp8_step,
    make_hyper,
    name_of,
    needs_kernels,
    opcheck,
    torch_step,
)
from skips import GROUP, clear_step, exact_step, groups_of, reach
from xmlkernels import ops
from xmlkernels.ops import bce_step_
from xmlkernels.ops.hyper import DX_SCALE, LR

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SGD = make_hyper(0.05, 0.0, 0.0, 0.0, 0.0, 0.5, 2.0)
DECAY = make_hyper(0.05, 0.1, 0.9, 0.0, 0.0, 0.5, 2.0)
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8, 0.5, 2.0)
# name: (states, hyper, options)
VARIANTS = {
    "plain": ({}, SGD, {}),
    "bias decay": ({"bias": F32}, DECAY, {}),
    "decoupled, no loss": ({}, DECAY, {"decoupled": True, "need_loss": False}),
    "momentum": ({"momentum": BF16, "bias": F32}, DECAY, {}),
    "adam": ({"momentum": BF16, "second": F32}, ADAM, {}),
    "negative scale": ({}, make_hyper(0.05, scale=-0.5), {}),
}
SIZE = (33, 8 * GROUP + 77, 40)  # nine groups, the last one ragged; several of the CPU's segments


def without(step: Step) -> Step:
    tensors = {k: v for k, v in step.tensors.items() if k != "skipped"}
    return Step(tensors, step.options | {"skip_below": 0.0})


# 1. By hand
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """130 rows are two groups; x = [[1], [-3]], so the reach is 4. All weights 0 but row 5, and row
    129 at ln 3.

    lr = 1, scale = 1/2: the first group's largest sigma is 1/2 (row 5 is 0 too), its bound 1; the
    second's is 3/4, its 3/2.
    """
    weight = torch.zeros(130, 1, device=device)
    weight[129] = math.log(3)
    x = torch.tensor([[1.0], [-3.0]], device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    call = (
        x,
        none,
        none.int(),
        make_hyper(1.0, scale=0.5).to(device),
        torch.tensor([0, 0], device=device),
    )
    for below, skipped in ((1.0, [0, 2]), (1.001, [1, 2]), (1.501, [2, 2])):
        table, count = weight.clone(), torch.zeros(2, dtype=torch.int64, device=device)
        dx, loss = bce_step_(table, *call, skip_below=below, skipped=count, need_loss=True)
        assert count.tolist() == skipped
        # Trained rows lose 1/2 (sigma(w) - 3 sigma(-3 w)): 1/2 (1/2 - 3/2) at w = 0.
        assert float(table[5]) == (0.5 if below == 1.0 else 0.0)
        assert (float(table[129]) == float(weight[129])) == (below == 1.501)
        g = torch.tensor([[0.75], [1 / 28]]) * 0.5 * math.log(3)  # sigma(ln 3), sigma(-3 ln 3)
        torch.testing.assert_close(dx.cpu(), g if below < 1.5 else torch.zeros(2, 1))
        whole = 0.5 * (2 * 129 * math.log(2) + math.log(4) + math.log(28 / 27))
        assert float(loss) == pytest.approx(whole, rel=1e-6)  # skipped or not
    positive = torch.tensor([127], device=device)
    count.zero_()
    bce_step_(
        weight.clone(), x, positive, positive.int() * 0, *call[3:], skip_below=1.2, skipped=count
    )
    assert count.tolist() == [0, 2]


# 2. The reference against a step in which the rows are left out by hand, in float64
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_leaves_rows_out(variant: str) -> None:
    states, hyper, options = VARIANTS[variant]
    step, idle = clear_step(*SIZE, F32, states=states, hyper=hyper, **options)
    assert 0 < idle.sum() < len(idle)
    got, whole = step.exact(), without(step).exact()
    busy = ~idle
    kept = step.tensors["pos_row"]
    few = without(step).replace(
        **{k: step.tensors[k][busy] for k in ("weight", *states)},
        pos_row=(busy.cumsum(0) - 1)[kept],
        row_offset=0,
    )
    expected = few.exact()
    torch.testing.assert_close(got["dx"], expected["dx"], rtol=1e-12, atol=1e-12)
    for name in ("weight", *states):
        torch.testing.assert_close(got[name][busy], expected[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["loss"], whole["loss"], rtol=0, atol=0)
    # The skipped rows: a step with x = 0 has no gradient, and what is left of it is theirs.
    rest = without(step).replace(x=torch.zeros_like(step.tensors["x"])).exact()
    for name in ("weight", *states):
        expected_rows = step.tensors["bias"].double() if name == "bias" else rest[name]
        torch.testing.assert_close(got[name][idle], expected_rows[idle], rtol=1e-12, atol=1e-14)
    assert got["skipped"].tolist() == [5 + groups_of(idle)[0], 7 + groups_of(idle)[1]]


# 3. The kernels against the reference, no worse than what PyTorch's precision costs without
# skipping
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_worse_than_torch(variant: str, dtype: torch.dtype, device: str) -> None:
    states, hyper, options = VARIANTS[variant]
    step, idle = clear_step(*SIZE, dtype, states=states, hyper=hyper, **options)
    got, exact = step.to(device).run(), step.to(device).exact()
    plain = without(step).to(device)
    error = {
        k: v.double() - w
        for (k, v), w in ((i, plain.exact()[i[0]]) for i in torch_step(plain).items())
    }
    assert got["skipped"].tolist() == exact["skipped"].tolist() == [5 + groups_of(idle)[0], 12 + 4]
    for name in ("dx", *(k for k in ("loss", "bias") if k in got and got[k].numel())):
        assert_no_worse(got[name], exact[name] + error[name], exact[name], dtype, what=name)
    for name in ("weight", *(k for k in ("momentum", "second") if k in got)):
        assert_no_worse(
            got[name],
            exact[name] + error[name],
            exact[name],
            dtype,
            what=name,
            rounded=got[name].dtype,
        )


# 4. Where groups begin and end
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [0, GROUP - 1, GROUP, 3 * GROUP - 1, 3 * GROUP, 3 * GROUP + 9])
def test_a_positive_keeps_its_group_and_no_other(row: int, device: str) -> None:
    base = exact_step(9, 3 * GROUP + 10, 16, BF16)
    one = {"pos_row": torch.tensor([row]), "pos_sample": torch.tensor([4], dtype=torch.int32)}
    step = base.replace(**one).to(device)
    got = step.run()
    assert_same_bits(got, step.reference(), but=("loss",))
    assert got["skipped"].tolist() == [3, 4]
    moved = (got["weight"] != step.tensors["weight"]).any(1).cpu()
    assert set((moved.nonzero()[:, 0] // GROUP).tolist()) == {row // GROUP}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, GROUP, 2 * GROUP + 3])
def test_padding_and_fill_keep_no_group(rows: int, device: str) -> None:
    base = exact_step(9, 3 * GROUP, 16, BF16)
    fill = {
        "pos_row": torch.full((3,), rows),
        "pos_sample": torch.tensor([0, 1, 2], dtype=torch.int32),
    }
    step = base.replace(**fill, rows=rows, momentum=torch.ones(3 * GROUP, 16))
    step.tensors["weight"][rows:], step.tensors["momentum"][rows:] = math.nan, math.nan
    step = step.to(device)
    got, expected = step.run(), step.reference()
    assert_same_bits(got, expected, but=("loss", "dx"))
    assert (got["dx"] == expected["dx"]).all()  # a zero of the reference may have a sign
    assert got["skipped"].tolist() == [-(-rows // GROUP)] * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 200, 16), (3, 0, 16), (0, 0, 8), (1, 1, 1)], ids=name_of)
def test_empty_and_single(shape: tuple[int, int, int], device: str) -> None:
    """No samples change nothing: every group is skipped; decay goes on."""
    base = exact_step(max(shape[0], 1), *shape[1:], F32, hyper=make_hyper(0.5, 0.5))
    none = torch.empty(0, dtype=torch.int64)
    step = base.replace(
        x=base.tensors["x"][: shape[0]], pos_row=none, pos_sample=none.int(), skip_below=1e-9
    ).to(device)
    got = step.run()
    assert_same_bits(got, step.reference(), but=("loss",))
    assert got["skipped"].tolist() == [
        0 if shape[0] else -(-shape[1] // GROUP),
        -(-shape[1] // GROUP),
    ]


# 5. The stated bounds
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_left_out_is_within_the_bounds(bias: bool, device: str) -> None:
    states = {"bias": F32} if bias else {}
    step, idle = clear_step(*SIZE, F32, states=states, hyper=SGD)
    step = step.to(device)
    got, whole = step.run(), without(step).run()
    below, idle = step.options["skip_below"], idle.to(device)
    for name in ("weight", *states):
        change = (got[name] - whole[name]).abs()
        assert change[~idle].max() == 0 and 0 < change[idle].max() < below
    hyper = step.tensors["hyper"].double()
    most = (
        hyper[DX_SCALE]
        * below
        / (hyper[LR] * reach(step))
        * step.tensors["weight"][idle].double().abs().sum(0)
    )
    difference = (got["dx"] - whole["dx"]).double().abs()
    assert ((difference <= most + 1e-6) & (most > 0)).all() and difference.max() > 0
    torch.testing.assert_close(got["loss"], whole["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_bound_that_nothing_meets_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    step = exact_step(33, 5 * GROUP, 24, dtype).replace(skip_below=1e-30).to(device)
    got = step.run()
    assert_same_bits({k: got[k] for k in ("dx", "weight")}, without(step).run())
    assert got["skipped"].tolist() == [0, 5]


# 6. and 7. Bits, threads, repeats, shards
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=name_of)
def test_bits_where_sums_are_exact(dtype: torch.dtype, device: str) -> None:
    n = 6 * GROUP + 5
    l2 = make_hyper(2.0**-8, 2.0**-4, 0.5, scale=0.5, dx_scale=4.0)
    small = dtype == torch.float8_e4m3fn
    for hyper in (None, l2):
        step = exact_step(33, n, 24, F32 if small else dtype, hyper=hyper, row_offset=2**32 - 300)
        steps = [
            step,
            step.replace(momentum=torch.ones(n, 24) / 8),
            step.replace(bias=torch.zeros(n), decoupled=True),
        ]
        if dtype in (BF16, F16):
            steps.append(step.replace(kahan=(torch.ones(n, 24) * 2.0**-14).to(dtype)))
        for one in steps:
            mine = (fp8_step(one).replace(x=one.tensors["x"].to(BF16)) if small else one).to(device)
            if small:
                mine.tensors["row_scale"][:, 1] = (
                    0  # what is not stored again leaves no largest value
                )
            got = mine.run()
            assert_same_bits(got, mine.reference(), but=("loss",))
            assert got["skipped"].tolist() == [5, 7]


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
def test_threads_and_repeats_change_nothing(dtype: torch.dtype, threads: None) -> None:
    step, _ = clear_step(65, 40 * GROUP + 3, 24, dtype, states={"momentum": BF16}, hyper=DECAY)
    torch.set_num_threads(1)
    first = step.run()
    for count in (1, 2, 2, 4, 3):
        torch.set_num_threads(count)
        assert_same_bits(step.run(), first)


@pytest.mark.parametrize("device", DEVICES)
def test_shards_of_whole_groups_skip_what_the_table_would(device: str) -> None:
    step = exact_step(17, 7 * GROUP + 50, 24, BF16, row_offset=2**33).to(device)
    whole, t, cut = step.run(), step.tensors, 3 * GROUP
    parts = []
    for begin, end in ((0, cut), (cut, 7 * GROUP + 50)):
        mine = (t["pos_row"] >= begin) & (t["pos_row"] < end)
        part = {
            "weight": t["weight"][begin:end],
            "pos_row": t["pos_row"][mine] - begin,
            "pos_sample": t["pos_sample"][mine],
        }
        parts.append(step.replace(**part, row_offset=2**33 + begin).run())
    joined = {"weight": torch.cat([p["weight"] for p in parts])}
    joined |= {k: parts[0][k] + parts[1][k] for k in ("dx", "skipped")}
    assert_same_bits(joined, whole)


# 8. Registration, failures
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_x_changes_no_count(bad: float, device: str) -> None:
    step, _ = clear_step(*SIZE, BF16, x_dtype=F32)
    step.tensors["x"][17, 19] = bad
    step = step.to(device)
    got = step.run()
    assert_same_bits({k: got[k] for k in ("weight", "skipped")}, step.tensors)
    assert got["dx"].isnan().all() and got["loss"].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    step, _ = clear_step(5, 3 * GROUP, 8, F32, states={"momentum": F32})
    t = step.to(device).tensors
    call = (t["weight"], t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"])
    options = {
        "momentum": t["momentum"],
        "skip_below": step.options["skip_below"],
        "skipped": t["skipped"],
    }
    opcheck(torch.ops.xmlkernels.bce_step_.default, call, options)


def test_autograd_hears_of_the_counts() -> None:
    t = exact_step(5, 2 * GROUP, 8, F32).tensors
    before = t["skipped"]._version
    bce_step_(
        t["weight"],
        t["x"],
        t["pos_row"],
        t["pos_sample"],
        t["hyper"],
        t["counter"],
        skip_below=1.0,
        skipped=t["skipped"],
    )
    assert t["skipped"]._version > before


def test_the_group_is_one_number_everywhere() -> None:
    pytest.importorskip("triton")
    from xmlkernels.triton import skip

    assert skip.GROUP == GROUP and f"groups of {GROUP} rows" in (ops.bce_step_.__doc__ or "")


@pytest.mark.gpu
def test_a_graph_replays_the_choice() -> None:
    """The choice is made on the device at every replay: other positives keep other groups."""
    step = exact_step(17, 6 * GROUP, 32, BF16).to("cuda")
    t = {k: v.clone() for k, v in step.tensors.items()}
    call = (t["weight"], t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"])
    below = {"skip_below": step.options["skip_below"], "skipped": t["skipped"]}
    bce_step_(*call, **below)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bce_step_(*call, **below)
    for kept, counted in (
        (step.tensors["pos_row"], [4, 6]),
        (torch.full_like(t["pos_row"], 6 * GROUP), [6, 6]),
    ):
        t["pos_row"].copy_(kept)
        t["skipped"].zero_()
        t["weight"].copy_(step.tensors["weight"])
        graph.replay()
        assert t["skipped"].tolist() == counted


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_with_a_nan_in_the_table_is_not_skipped(device: str) -> None:
    """What is wrong with a table must show in dx, not be skipped over."""
    weight = torch.full((2 * GROUP, 16), -1.0, device=device)
    weight[3, 5] = math.nan
    none = torch.empty(0, dtype=torch.int64, device=device)
    count = torch.zeros(2, dtype=torch.int64, device=device)
    x, hyper = torch.ones(33, 16, device=device), make_hyper(0.1).to(device)
    call = (x, none, none.int(), hyper, torch.tensor([0, 0], device=device))
    dx, _ = bce_step_(weight, *call, skip_below=1e3, skipped=count)
    assert count.tolist() == [1, 2] and dx.isnan().any()
