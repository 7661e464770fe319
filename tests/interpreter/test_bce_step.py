"""The Triton `bce_step_` in the interpreter: the whole schedule on tiny blocks, against the
reference.
"""

import math
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from benchmarks.model import Blocks, bce_step_accesses, bce_step_bytes
from common import (
    DTYPES,
    STATES,
    Step,
    assert_no_worse,
    assert_same_bits,
    dyadic_step,
    make_counter,
    make_hyper,
    name_of,
    random_step,
    torch_step,
)
from counting import counted
from tiny import PLAN, SHAPE, run, step_op
from xmlkernels.triton import descriptors
from xmlkernels.triton.bce_plan import CHUNK, GROUP, Plan, make_plan
from xmlkernels.triton.bce_step import bce_step_
from xmlkernels.triton.bce_tile import Tiles

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SGD = make_hyper(0.05, 0.01, 0.9, 0.0, 0.0, 0.5, 2.0)
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8, 0.5, 2.0)
ALIGNED = (13, 75, 24)  # as TMA descriptors ask for: rows of a multiple of 16 bytes
# name: (table, states, hyper, options)
VARIANTS = {
    "fp32 bias": (F32, {"bias": F32}, SGD, {}),
    "bf16 bias": (BF16, {"bias": F32}, SGD, {}),
    "fp16 bias decoupled": (F16, {"bias": F32}, SGD, {"decoupled": True}),
    "fp32 values, x bf16": (F32, {}, SGD, {"values": True, "x_dtype": BF16}),
    "bf16 values, x fp32": (BF16, {}, SGD, {"values": True, "x_dtype": F32}),
    "fp16 momentum bf16": (F16, {"momentum": BF16}, SGD, {}),
    "fp32 adam": (F32, {"momentum": F32, "second": F32}, ADAM, {}),
    "bf16 adamw": (
        BF16,
        {"momentum": BF16, "second": BF16, "bias": F32},
        ADAM,
        {"decoupled": True},
    ),
    "bf16 kahan momentum": (BF16, {"kahan": BF16, "momentum": BF16}, SGD, {}),
    "fp16 kahan, no loss": (F16, {"kahan": F16}, SGD, {"need_loss": False}),
}


def make(variant: str, **more: object) -> Step:
    dtype, states, hyper, options = VARIANTS[variant]
    return random_step(*SHAPE, dtype, states=states, hyper=hyper, share=0.05, **(options | more))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_worse_than_torch(variant: str) -> None:
    step = make(variant)
    dtype = step.tensors["weight"].dtype
    got, exact, low = run(step), step.exact(), torch_step(step)
    for name in ("dx", "loss", "bias"):
        if name in got and got[name].numel():
            assert_no_worse(got[name], low[name], exact[name], dtype, what=name)
    if "kahan" in got:
        whole = got["weight"].double() + got["kahan"].double()
        assert_no_worse(
            whole, low["weight"], exact["weight"] + exact["kahan"], dtype, what="weight + kahan"
        )
    for name in ("weight", "momentum", "second"):
        if name in got:
            wide = exact[name] + (exact.get("kahan", 0) if name == "weight" else 0)
            assert_no_worse(got[name], low[name], wide, dtype, what=name, rounded=got[name].dtype)
    assert got["loss"].shape == (int(step.options["need_loss"]),)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bits_where_sums_are_exact(dtype: torch.dtype) -> None:
    """Every sum exact in any order: each stored bit is the reference's, corner positives and a far
    row offset included.
    """
    hyper = make_hyper(2.0**-8, 2.0**-4, 0.5, scale=0.5, dx_scale=4.0)
    b, n, d = SHAPE
    base = dyadic_step(b, n, d, dtype, hyper=hyper, row_offset=2**32 - 40)
    plain = base.replace(bias=torch.zeros(n))
    assert_same_bits(run(plain), plain.reference(), but=("loss",))
    g = torch.Generator().manual_seed(3)
    momentum = (torch.randint(-63, 64, (n, d), generator=g) * 2.0**-5).to(BF16)
    values = torch.randint(-2, 5, base.tensors["pos_row"].shape, generator=g) / 4
    step = base.replace(momentum=momentum, pos_value=values, decoupled=True)
    assert_same_bits(run(step), step.reference(), but=("loss",))


def test_adam_and_kahan_bits() -> None:
    """From zero states m / (1 - b1) is the gradient and v / (1 - b2) its square: the step is lr
    times a sign.
    """
    n, d = SHAPE[1:]
    hyper = make_hyper(2.0**-8, 2.0**-4, 0.5, 0.75, 0.0, scale=1.0)
    states = {k: torch.zeros(n, d, dtype=BF16) for k in ("momentum", "second")}
    step = dyadic_step(17, n, d, BF16, hyper=hyper, decoupled=True).replace(
        counter=make_counter(step=0), **states
    )
    assert_same_bits(run(step), step.reference(), but=("loss",))
    step = dyadic_step(*SHAPE, F16).replace(kahan=(torch.ones(n, d) * 2.0**-14).to(F16))
    assert_same_bits(run(step), step.reference(), but=("loss",))


def test_corner_positives_a_full_row_and_a_full_sample() -> None:
    b, n, d = SHAPE
    base = dyadic_step(b, n, d, BF16, share=0.0)
    y = torch.zeros(n, b)
    # One block of labels has more than one load of positives, others begin at a block's edge.
    y[40] = 1
    y[:, 16] = 1
    y[0, 0] = y[n - 1, b - 1] = y[0, b - 1] = y[n - 1, 0] = 1
    row, sample = y.nonzero(as_tuple=True)
    step = base.replace(pos_row=row, pos_sample=sample.to(torch.int32))
    assert_same_bits(run(step), step.reference(), but=("loss",))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=name_of)
def test_padding_and_fill_are_ignored(dtype: torch.dtype) -> None:
    """Rows beyond `rows` are NaN and stay so; entries of pos_row from `rows` on are a graph's spare
    capacity.
    """
    b, n, d = SHAPE
    rows = 50
    step = dyadic_step(b, n, d, dtype).replace(
        momentum=torch.zeros(n, d), bias=torch.zeros(n), rows=rows
    )
    for name in ("weight", "momentum", "bias"):
        step.tensors[name][rows:] = math.nan
    fill = {"pos_row": torch.full((20,), rows), "pos_sample": torch.zeros(20, dtype=torch.int32)}
    keep = step.tensors["pos_row"] < rows
    step = step.replace(**{k: torch.cat([step.tensors[k][keep], v]) for k, v in fill.items()})
    assert_same_bits(run(step), step.reference(), but=("loss",))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_x_leaves_everything_as_it_was(bad: float) -> None:
    states = {"bias": F32, "momentum": BF16, "second": F32, "kahan": BF16}
    step = random_step(*SHAPE, BF16, states=states, hyper=ADAM, x_dtype=F32)
    step.tensors["x"][17, 19] = bad
    got = run(step)
    assert_same_bits({k: got[k] for k in ("weight", *states)}, step.tensors)
    assert got["dx"].isnan().all() and got["loss"].isnan().all()


@pytest.mark.parametrize("shape", [(0, 40, 20), (3, 0, 16), (0, 0, 16), (1, 1, 1)], ids=name_of)
def test_empty_and_single(shape: tuple[int, int, int]) -> None:
    step = random_step(*shape, F32, states={"momentum": F32, "bias": F32}, hyper=SGD)
    got, exact = run(step), step.exact()
    for name in got:
        assert got[name].shape == exact[name].shape
        torch.testing.assert_close(got[name], exact[name].float(), rtol=1e-5, atol=1e-6)


def test_largest_numbers_stay_finite() -> None:
    for dtype in (F16, BF16):
        step = random_step(*SHAPE, dtype, hyper=make_hyper(1e30, 0.1, dx_scale=1024.0), x_dtype=F32)
        edge = 65504.0 if dtype == F16 else 65280.0
        for name in ("weight", "x"):
            step.tensors[name] = (step.tensors[name].float().sign() * edge).to(
                step.tensors[name].dtype
            )
        got = run(step)
        assert all(v.isfinite().all() for v in got.values()), dtype


def test_repeats_and_shards_change_nothing() -> None:
    b, n, d = SHAPE
    step = random_step(
        b, n, d, BF16, states={"momentum": BF16, "bias": F32}, hyper=SGD, row_offset=2**33
    )
    whole = run(step)
    assert_same_bits(run(step), whole)
    cut, t, parts = 33, step.tensors, []
    for begin, end in ((0, cut), (cut, n)):
        mine = (t["pos_row"] >= begin) & (t["pos_row"] < end)
        part = {k: t[k][begin:end].clone() for k in ("weight", *STATES) if k in t}
        part |= {"pos_row": t["pos_row"][mine] - begin, "pos_sample": t["pos_sample"][mine]}
        parts.append(run(step.replace(**part, row_offset=2**33 + begin)))
    for name in ("weight", "momentum", "bias"):  # a row's sums run over D and B alone: to the bit
        assert_same_bits({name: torch.cat([p[name] for p in parts])}, whole)
    torch.testing.assert_close(parts[0]["dx"] + parts[1]["dx"], whole["dx"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "adam bias loss"])
def test_accesses_are_the_model(extra: bool, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load and store of every tensor, counted, against the closed form that the benchmarks
    print.
    """
    b, n, d = ALIGNED if fused else SHAPE
    monkeypatch.setattr(descriptors, "card_has_tma", lambda device: fused)
    blocks = replace(blocks_of(PLAN), fused=fused)
    states = {"bias": F32, "momentum": BF16, "second": BF16, "kahan": BF16} if extra else {}
    step = random_step(b, n, d, BF16, states=states, hyper=ADAM, need_loss=extra)
    t = {k: v.clone() for k, v in step.tensors.items()}
    given = {k: t[k] for k in STATES if k in t}
    named = {k: t[k] for k in ("weight", "x", "pos_row", "pos_sample", *given)}
    named |= {k: t[k] for k in ("hyper", "counter")}
    with counted(monkeypatch, named) as traffic:
        step_op(
            t["weight"],
            t["x"],
            t["pos_row"],
            t["pos_sample"],
            t["hyper"],
            t["counter"],
            **given,
            **step.options,
        )
    p, count = PLAN, t["pos_row"].numel()
    model = bce_step_accesses(
        b, n, d, blocks, positives=count, states=3 if extra else 0, bias=extra, loss=extra
    )
    for name in (
        "weight",
        "x",
        "gradient",
        "partial",
        "pos_sample",
        "bias",
        "column_sum",
        "loss_part",
    ):
        assert (traffic.loads[name], traffic.stores[name]) == model.get(name, (0, 0)), name
    for name in ("momentum", "second", "kahan"):
        assert traffic.loads[name] == traffic.stores[name] == model["state"][0] // 3, name
    most = (math.ceil(n / p.block_l) + 1) * count.bit_length()
    assert 0 <= traffic.loads["pos_row"] - model["pos_row"][0] <= most
    assert traffic.stores["pos_row"] == 0


def blocks_of(p: Plan) -> Blocks:
    score_l, score_b = p.large_score(p.block_b)
    return Blocks(**asdict(p), score_l=score_l, score_b=score_b)


def test_the_models_blocks_are_the_kernels() -> None:
    p = make_plan(128, 768, BF16)
    assert Blocks() == blocks_of(p)
    L, D = 3 * p.chunk, 768
    got = bce_step_bytes(128, L, D)
    # Each row twice and back once, its gradient back and again, the batch, the sums of dX.
    sums = 3 * 2 * p.splits * 128 * D * 4
    assert got["memory"] == 3 * L * D * 2 + 2 * L * 128 * 2 + 2 * 128 * D * 2 + sums
    apart = bce_step_bytes(128, L, D, blocks=replace(Blocks(), fused=False))
    assert apart["memory"] - got["memory"] == L * D * 2 + L * 128 * 2
    with_momentum = bce_step_bytes(128, L, D, states=1)
    assert (
        with_momentum["memory"] - got["memory"]
        == with_momentum["cache"] - got["cache"]
        == 2 * L * D * 2
    )


@pytest.mark.parametrize("batch", [13, 18], ids=["one block of samples", "two"])
@pytest.mark.parametrize("variant", ["fp16 bias decoupled", "bf16 adamw"])
def test_descriptors_give_the_same_bits(
    variant: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sm_90 computes by TMA descriptors, in one kernel for one block of samples, is what older
    cards compute by pointers.
    """
    dtype, states, hyper, options = VARIANTS[variant]
    step = random_step(
        batch, *ALIGNED[1:], dtype, states=states, hyper=hyper, share=0.05, **options
    ).replace(rows=70)
    plain = run(step)
    monkeypatch.setattr(descriptors, "card_has_tma", lambda device: True)
    assert_same_bits(run(step), plain)


@pytest.mark.parametrize("batch", [13, 18, 40], ids="{} samples".format)
@pytest.mark.parametrize("share", [0.005, 0.3], ids=["few positives", "many"])
def test_larger_tiles_give_the_same_bits(
    share: float, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With descriptors tiles are larger; a tile of logits may reach beyond its chunk."""
    step = random_step(batch, 203, 72, BF16, share=share, need_loss=False).replace(rows=190)
    plan = replace(PLAN, chunk=96)
    plain = step.run(partial(step_op, plan=plan))
    seen = {"parts": 1}
    launch = interpreter.GridExecutor.__call__

    def watch(self: Any, *given: Any, **options: Any) -> None:
        named = dict(zip(self.arg_names, given, strict=False))
        seen[self.fn.__name__] = named.get("BLOCK_L", 1) * named.get("BLOCK_B", 1)
        if "PARTS" in named:
            seen["parts"] = named["PARTS"]
        launch(self, *given, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watch)
    monkeypatch.setattr(descriptors, "card_has_tma", lambda device: True)
    assert_same_bits(step.run(partial(step_op, plan=replace(plan, wide=2))), plain)
    assert seen["score_tiles"] == plan.block_l * plan.block_b * (2 if share < 0.1 else 1)
    assert ("update_rows" in seen) == (batch > plan.block_b)
    assert seen["parts"] == (4 if batch > plan.block_b else 1)


@pytest.mark.parametrize("skips", [False, True], ids=["", "skips"])
def test_a_step_is_few_launches(skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.8M labels, 128 samples, 768 columns in bf16: nothing is computed, launches are counted."""
    launches: list[str] = []

    def launch(self: Any, *args: Any, **options: Any) -> None:
        launches.append(self.fn.__name__)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(descriptors, "card_has_tma", lambda device: True)
    b, n, d = 128, 2_812_281, 768
    table = torch.zeros(1, d, dtype=BF16).expand(n, d)
    options: dict[str, Any] = {"need_loss": True}
    if skips:
        options |= {"skip_below": 1e-9, "skipped": torch.zeros(2, dtype=torch.int64)}
    none = torch.empty(0, dtype=torch.int64)
    steer = (make_hyper(0.1), make_counter())
    bce_step_(table, torch.zeros(b, d), none, none.int(), *steer, **options)
    assert len(launches) <= 16, launches
    assert {"score_tiles", "step_tiles", "sum_dx", "sum_loss"} <= {*launches}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=name_of)
def test_scratch_is_bounded_at_every_shape(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 MB beyond the table and the results, skips, loss and bias included."""
    taken: list[int] = []
    kind = BF16 if dtype == torch.float8_e4m3fn else dtype

    def empty(shape: Any, *, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        taken.append(math.prod(shape) * dtype.itemsize)
        return torch.zeros(1, dtype=dtype).expand(shape)

    for b in (1, 16, 17, 64, 128, 129, 500, 512, 2048, 4096):
        for d in (1, 64, 384, 768, 1024, 4096):
            p = make_plan(b, d, dtype)
            assert p.chunk % p.block_l == p.block_l % p.block_r == 0 and p.chunk <= CHUNK
            for n in (1, 4000, 2_800_000, 100_000_000):
                taken.clear()
                tiles = Tiles.__new__(Tiles)
                tiles.batch, tiles.width, tiles.rows, tiles.kind = b, d, n, kind
                tiles.plan = p.with_rows(n)
                tiles.pitch, tiles.tma = p.pitch(b), False
                tiles.positives = (torch.empty(0), None, None)
                tiles.blocks, tiles.b_blocks = n, b
                tiles.groups, tiles.row_scale = object(), None
                tiles.empty = lambda *shape, dtype=F32: empty(shape, dtype=dtype)
                tiles.buffers(gradient=True, dx=True, column_sum=True, loss=True)
                if tiles.partial.shape[0] == 1:
                    taken.remove(b * d * 4)  # it becomes the result
                copy = b * d * kind.itemsize
                starts, groups = 8 * (n // p.block_l + 2), 2 * 4 * (p.chunk // GROUP + 1)
                assert sum(taken) + copy + starts + groups <= 256_000_000, (b, d, n)
                # A chunk is no smaller than it need be.
                assert p.with_rows(n).chunk >= min(n, CHUNK) or max(taken) > 160_000_000
