"""Tile skipping of the Triton `bce_step_` in the interpreter: the choice of groups, and the
products that are left out.
"""

import math

import pytest
import torch

from common import (
    DTYPES,
    Step,
    assert_no_worse,
    assert_same_bits,
    fp8_step,
    make_hyper,
    name_of,
    torch_step,
)
from counting import counted
from skips import GROUP, clear_step, exact_step, groups_of
from tiny import step_op
from xmlkernels.triton import bce_plan, descriptors
from xmlkernels.triton.bce_plan import Plan, make_plan

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Two groups a chunk, two tiles a group; (B, L, D): two blocks of samples, two chunks, two blocks of
# columns, all ragged.
PLAN = Plan(chunk=2 * GROUP, block_b=16, block_l=GROUP, block_r=64, block_d=16, step=32, splits=3)
SHAPE = (18, 3 * GROUP + 40, 20)
SGD = make_hyper(0.05, 0.0, 0.9, 0.0, 0.0, 0.5, 2.0)
DECAY = make_hyper(0.05, 0.1, 0.9, 0.0, 0.0, 0.5, 2.0)
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8, 0.5, 2.0)
VARIANTS = {
    "fp32 bias": (F32, {"bias": F32}, SGD, {}),
    "bf16 decay, no loss": (BF16, {}, DECAY, {"decoupled": True, "need_loss": False}),
    "fp16 momentum": (F16, {"momentum": BF16}, DECAY, {}),
    "bf16 adam": (BF16, {"momentum": BF16, "second": BF16}, ADAM, {}),
}


def run(step: Step) -> dict[str, torch.Tensor]:
    return step.run(lambda *a, **k: step_op(*a, plan=PLAN, **k))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_worse_than_torch(variant: str) -> None:
    dtype, states, hyper, options = VARIANTS[variant]
    step, idle = clear_step(*SHAPE, dtype, states=states, hyper=hyper, **options)
    got, exact, plain = run(step), step.exact(), step.replace(skip_below=0.0)
    del plain.tensors["skipped"]
    error = {
        k: v.double() - w
        for (k, v), w in ((i, plain.exact()[i[0]]) for i in torch_step(plain).items())
    }
    assert got["skipped"].tolist() == exact["skipped"].tolist() == [5 + groups_of(idle)[0], 7 + 4]
    assert 0 < idle.sum() < len(idle)
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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=name_of)
def test_bits_where_sums_are_exact(dtype: torch.dtype) -> None:
    l2 = make_hyper(2.0**-8, 2.0**-4, 0.5, scale=0.5, dx_scale=4.0)
    n, d = SHAPE[1:]
    small = dtype == torch.float8_e4m3fn
    step = exact_step(*SHAPE, F32 if small else dtype, row_offset=2**32 - 300)
    for one in (step, step.replace(hyper=l2, bias=torch.zeros(n), momentum=torch.ones(n, d) / 8)):
        mine = fp8_step(one).replace(x=one.tensors["x"].to(BF16)) if small else one
        if small:
            mine.tensors["row_scale"][:, 1] = 0  # what is not stored again leaves no largest value
        got = run(mine)
        assert_same_bits(got, mine.reference(), but=("loss",))
        assert got["skipped"].tolist() == [3, 4]


def test_a_positive_at_either_end_of_a_group() -> None:
    base = exact_step(*SHAPE, BF16)
    row = torch.tensor([GROUP - 1, 2 * GROUP, 3 * GROUP + 39])
    step = base.replace(pos_row=row, pos_sample=torch.tensor([17, 0, 3], dtype=torch.int32))
    got = run(step)
    assert_same_bits(got, step.reference(), but=("loss",))
    assert got["skipped"].tolist() == [1, 4]


def test_all_and_none() -> None:
    none = torch.empty(0, dtype=torch.int64)
    step = exact_step(*SHAPE, BF16).replace(pos_row=none, pos_sample=none.int())
    got = run(step)
    assert got["skipped"].tolist() == [4, 4] and (got["dx"] == 0).all()
    assert_same_bits({"weight": got["weight"]}, step.tensors)
    got = run(step.replace(skip_below=1e-30))
    assert got["skipped"].tolist() == [0, 4]
    assert_same_bits(got, step.replace(skip_below=1e-30).reference(), but=("loss",))


@pytest.mark.parametrize("shape", [(0, 200, 16), (3, 0, 16), (1, 1, 1)], ids=name_of)
def test_empty_and_single(shape: tuple[int, int, int]) -> None:
    base = exact_step(max(shape[0], 1), *shape[1:], F32, hyper=make_hyper(0.5, 0.5))
    none = torch.empty(0, dtype=torch.int64)
    step = base.replace(
        x=base.tensors["x"][: shape[0]], pos_row=none, pos_sample=none.int(), skip_below=1e-9
    )
    got = run(step)
    assert_same_bits(got, step.reference(), but=("loss",))
    assert got["skipped"].tolist() == [
        0 if shape[0] else -(-shape[1] // GROUP),
        -(-shape[1] // GROUP),
    ]


def test_a_non_finite_x_changes_no_count() -> None:
    step, _ = clear_step(*SHAPE, BF16, states={"momentum": F32}, hyper=DECAY, x_dtype=F32)
    step.tensors["x"][17, 19] = math.nan
    got = run(step)
    assert_same_bits({k: got[k] for k in ("weight", "momentum", "skipped")}, step.tensors)
    assert got["dx"].isnan().all()


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_skipped_rows_are_read_once(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three products are left out, and without decay the store too: every access counted."""
    b, n, d = SHAPE
    step = exact_step(*SHAPE, BF16, hyper=make_hyper(2.0**-8, decay, scale=0.5), need_loss=False)
    t = {k: v.clone() for k, v in step.tensors.items()}
    call = (t["weight"], t["x"], t["pos_row"], t["pos_sample"], t["hyper"], t["counter"])
    with counted(monkeypatch, {k: t[k] for k in ("weight", "x")}) as traffic:
        step_op(*call, plan=PLAN, skipped=t["skipped"], **step.options)
    skipped = int(t["skipped"][0]) * GROUP - (GROUP - 40)  # the ragged last group is among them
    of_b, of_d = math.ceil(b / PLAN.block_b), math.ceil(d / PLAN.block_d)
    busy = n - skipped
    again = busy if decay == 0 else n
    pitch, groups = of_b * PLAN.block_b, math.ceil(n / GROUP)
    busy_groups = groups - int(t["skipped"][0])
    assert traffic.loads["weight"] == (of_b * n + of_b * busy + again) * d
    assert traffic.stores["weight"] == again * d
    # The gradient has no edges: whole groups of rows and blocks of samples.
    assert traffic.loads["gradient"] == 2 * of_d * pitch * busy_groups * GROUP
    assert traffic.stores["gradient"] == pitch * groups * GROUP


@pytest.mark.parametrize("batch", [13, 18], ids=["one block of samples", "two"])
def test_descriptors_give_the_same_bits(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel for one block of samples: busy groups first, then what decay does to others."""
    n = SHAPE[1]
    states = {"momentum": torch.ones(n, 24) / 8}
    for dtype, more in ((BF16, {}), (F16, states))[: 2 if batch == 13 else 1]:
        step = exact_step(batch, n, 24, dtype, hyper=DECAY).replace(bias=torch.zeros(n), **more)
        with monkeypatch.context() as patch:
            plain = run(step)
            patch.setattr(descriptors, "card_has_tma", lambda device: True)
            got = run(step)
        assert_same_bits(got, plain)
        assert got["skipped"].tolist() == [3, 4]


def test_the_blocks_fit_the_groups() -> None:
    for dtype in (*DTYPES, torch.float8_e4m3fn):
        for batch, width in ((1, 1), (64, 384), (512, 768), (4096, 1024)):
            p = make_plan(batch, width, dtype).with_rows(1000)
            assert p.block_l == GROUP and GROUP % p.block_r == p.chunk % GROUP == 0
    assert bce_plan.GROUP == GROUP


def test_a_group_with_a_nan_in_the_table_is_not_skipped() -> None:
    step, idle = clear_step(20, 4 * GROUP, 24, torch.float32)
    row = int(idle.nonzero()[0])
    step.tensors["weight"][row, 3] = math.nan
    got = run(step)
    before, seen = groups_of(idle)
    assert (got["skipped"] - torch.tensor([5, 7])).tolist() == [before - 1, seen]
    assert got["dx"].isnan().any()
