"""`cluster_step_`: what is stored. Bits equal to the reference's where fp32 results are equal, and
to `bce_step_`'s where both do the same; independence of threads, shards, the order of clusters and
the other clusters; rounding without bias."""

import gc
import json
import sys

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    LOW,
    Step,
    assert_same_bits,
    huge_table,
    make_counter,
    make_hyper,
    name_of,
    needs_kernels,
    random_step,
    unit,
)
from common_cluster import ClusterStep, dyadic_cluster_step, random_cluster_step
from test_instruction_sets import digest, instruction_sets, run_child
from xmlkernels import ops
from xmlkernels.reference.cluster_step import cluster_step_ as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ADAM = make_hyper(0.02, 0.01, 0.9, 0.999, 1e-8)
MIXED = (40, [9, 0, 60, 7, 11, 3, 100, 10], 4, 72)  # small and large clusters in one call
MANY = (33, [11, 10] * 60 + [90, 0, 200], 12, 40)  # segments, and tiles of a large cluster
MIXES = {
    "fp32": (F32, {"momentum": F32}, {}),
    "bf16": (BF16, {"momentum": BF16, "bias": F32}, {"decoupled": True}),
    "bf16 adam": (BF16, {"momentum": BF16, "second": BF16}, {}),
    "fp16 kahan": (F16, {"kahan": F16}, {}),
}


def check_bits(step: Step, device: str) -> None:
    step = step.to(device)
    got, expected = step.run(), step.reference()
    assert_same_bits(got, expected, but=("loss",))
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=2e-6, atol=0)


# 7. Equal fp32 results must give equal stored bits: every sum of a dyadic step is exact in any
# order.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [(5, [3, 0, 9, 1, 8], 3, 7), MIXED, (33, [300], 1, 40)],
    ids=["small", "mixed", "level 0"],
)
def test_sgd_bits(shape: tuple, dtype: torch.dtype, device: str) -> None:
    step = dyadic_cluster_step(*shape, dtype)
    check_bits(step, device)
    if dtype in LOW:  # an inexact result must be among them, or rounding is not tested
        exact = step.exact()["weight"]
        assert (exact.to(dtype).double() != exact).float().mean() > 0.2
    l2 = make_hyper(2.0**-8, 2.0**-4, scale=0.5, dx_scale=4.0)
    check_bits(step.replace(hyper=l2, bias=torch.zeros(len(step.tensors["weight"]))), device)
    check_bits(step.replace(hyper=l2, decoupled=True, row_offset=2**32 - 100), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_state_bits(dtype: torch.dtype, state: torch.dtype, device: str) -> None:
    """Adam's first step from zero states: m / (1 - b1) = g, v / (1 - b2) = g², the step is lr times
    the sign of g.
    """
    hyper = make_hyper(2.0**-8, 2.0**-4, 0.5, 0.75, 2.0**-40, scale=1.0)
    step = dyadic_cluster_step(*MIXED, dtype, hyper=hyper, decoupled=True)
    zeros = torch.zeros(step.tensors["weight"].shape, dtype=state)
    step = step.replace(momentum=zeros, counter=make_counter(step=0))
    check_bits(step, device)
    step = step.replace(second=zeros)
    got, expected, exact = step.to(device).run(), step.reference(), step.exact()
    assert_same_bits({k: got[k] for k in ("momentum", "second", "dx", "scores")}, expected)
    spacing = unit(exact["weight"], dtype) if dtype in LOW else 1e-6
    assert ((got["weight"].double().cpu() - exact["weight"]).abs() <= 1.001 * spacing).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", DTYPES, ids=name_of)
def test_row_wise_state_bits(state: torch.dtype, device: str) -> None:
    """D = 64: the mean of exact squares is exact."""
    hyper = make_hyper(2.0**-8, 0.0, 0.5, 0.75, 2.0**-10, scale=1.0)
    step = dyadic_cluster_step(9, [9, 60, 7, 40], 2, 64, BF16, x_bits=3, hyper=hyper)
    n = len(step.tensors["weight"])
    second = (torch.arange(n) % 60 + 1) * 2.0**-12
    step = step.replace(momentum=torch.zeros(n, 64), second=second.to(state))
    got, expected, exact = step.to(device).run(), step.reference(), step.exact()
    assert_same_bits({k: got[k] for k in ("momentum", "second", "dx")}, expected)
    assert (
        (got["weight"].double().cpu() - exact["weight"]).abs()
        <= 1.001 * unit(exact["weight"], BF16)
    ).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_kahan_bits(dtype: torch.dtype, device: str) -> None:
    step = dyadic_cluster_step(*MIXED, dtype)
    check_bits(step.replace(kahan=(step.tensors["weight"].float() * 2.0**-10).to(dtype)), device)


# One cluster of all rows is the step of the full table.
def full_step(step: Step) -> ClusterStep:
    b, n = len(step.tensors["x"]), len(step.tensors["weight"])
    whole = {"clusters": torch.zeros(b, 1, dtype=torch.int64), "row_ptr": torch.tensor([0, n])}
    return ClusterStep(step.tensors | whole, step.options | {"cluster_rows": n})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mix", MIXES)
def test_one_cluster_of_all_rows_is_bce_step(mix: str, device: str) -> None:
    dtype, states, options = MIXES[mix]
    step = random_step(65, 1100, 100, dtype, states=states, hyper=ADAM, **options).to(device)
    expected, got = step.run(), full_step(step).to(device).run()
    assert_same_bits(expected, got)
    t = {k: v.double() if v.is_floating_point() else v for k, v in step.tensors.items()}
    z = t["x"] @ t["weight"].T + t.get("bias", 0)
    torch.testing.assert_close(
        got["scores"][:, 0].double(), z, rtol=1e-2 if dtype == BF16 else 1e-4, atol=1e-2
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_cluster_of_few_rows_is_bce_step(dtype: torch.dtype, device: str) -> None:
    """Through the products that pack nothing, where sums are exact."""
    for b, n in ((3, 400), (64, 20)):
        step = dyadic_cluster_step(b, [n], 1, 24, dtype)
        t = step.tensors
        step = Step(
            {k: v for k, v in t.items() if k not in ("clusters", "row_ptr")}, {"need_loss": True}
        ).to(device)
        assert_same_bits(step.run(), full_step(step).to(device).run(), but=("loss",))


# 6. Threads, repeats, order, shards.
@needs_kernels
@pytest.mark.parametrize("mix", MIXES)
def test_threads_and_repeats_change_nothing(mix: str, threads: None) -> None:
    dtype, states, options = MIXES[mix]
    step = random_cluster_step(*MANY, dtype, states=states, hyper=ADAM, **options)
    torch.set_num_threads(1)
    first = step.run()
    for count in (1, 2, 2, 4, 3):
        torch.set_num_threads(count)
        assert_same_bits(step.run(), first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mix", MIXES)
def test_the_order_of_a_samples_clusters_changes_nothing(mix: str, device: str) -> None:
    dtype, states, options = MIXES[mix]
    step = random_cluster_step(*MIXED, dtype, states=states, hyper=ADAM, **options)
    clusters = step.tensors["clusters"]
    order = torch.stack([torch.randperm(clusters.shape[1]) for _ in clusters])
    whole = step.to(device).run()
    other = step.replace(clusters=clusters.gather(1, order)).to(device).run()
    whole["scores"] = whole["scores"].gather(
        1, order[:, :, None].expand_as(whole["scores"]).to(device)
    )
    assert_same_bits(whole, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mix", MIXES)
def test_shards_are_the_whole(mix: str, device: str) -> None:
    """A table cut between clusters: each row comes out as in the whole table, to the bit."""
    if device == "cpu" and ops.missing:
        pytest.skip(
            "torch.mm, on which the reference stands, sums in another order for another shape"
        )
    dtype, states, options = MIXES[mix]
    step = random_cluster_step(
        *MIXED, dtype, states=states, hyper=ADAM, row_offset=2**33, **options
    )
    t, parts, names = step.tensors, [], ("weight", *states)
    row_ptr, clusters = t["row_ptr"], t["clusters"]
    n, count = len(t["weight"]), len(row_ptr) - 1
    for low, high, first, last in ((0, 4, 0, int(row_ptr[4])), (4, count, int(row_ptr[4]), n)):
        inside = (clusters >= low) & (clusters < high)
        mine = (t["pos_row"] >= first) & (t["pos_row"] < last)
        shard = {k: t[k][first:last].clone() for k in names}
        shard |= {
            "clusters": torch.where(inside, clusters - low, -1),
            "row_ptr": row_ptr[low : high + 1] - first,
        }
        shard |= {"pos_row": t["pos_row"][mine] - first, "pos_sample": t["pos_sample"][mine]}
        parts.append(step.replace(**shard, row_offset=2**33 + first).to(device).run())
    whole = step.to(device).run()
    assert_same_bits(
        {k: whole[k] for k in names}, {k: torch.cat([p[k] for p in parts]) for k in names}
    )
    assert_same_bits(
        {"scores": whole["scores"]},
        {"scores": torch.maximum(parts[0]["scores"], parts[1]["scores"])},
    )
    for name in ("dx", "loss"):
        torch.testing.assert_close(
            parts[0][name] + parts[1][name], whole[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_rest_of_the_batch_and_width_changes_no_row(dtype: torch.dtype, device: str) -> None:
    step = dyadic_cluster_step(*MIXED, dtype).to(device)
    t, whole = step.tensors, step.run()
    narrow = {k: t[k][:, :50].contiguous() for k in ("weight", "x")}
    assert_same_bits(
        {"weight": step.replace(**narrow).run()["weight"]}, {"weight": whole["weight"][:, :50]}
    )
    more = {"x": torch.cat([t["x"], torch.zeros(13, 72, dtype=dtype, device=device)])}
    more["clusters"] = torch.cat([t["clusters"], t["clusters"][:13]])
    assert_same_bits({"weight": step.replace(**more).run()["weight"]}, whole)


# Rounding without bias through the op, in clusters small and large.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size, samples", [(8, 1), (64, 16)], ids=["small", "large"])
@pytest.mark.parametrize("w", [0.0, 0.0117, 2.0**-20])
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_the_mean_of_many_small_updates_is_the_update(
    dtype: torch.dtype, w: float, size: int, samples: int, device: str
) -> None:
    """x = ±1 in turn over equal weights: z = 0, so each weight should move by ∓lr / 2 for each of
    its samples.
    """
    n, d, repeats = 2048, 16, 12
    start = float(torch.tensor(w).to(dtype))
    move = 1e-5 if w == 0 and dtype == BF16 else float(unit(torch.tensor(start), dtype)) * 0.03
    step = random_cluster_step(samples, [size] * (n // size), n // size, d, dtype, share=0.0)
    step = step.replace(
        weight=torch.full((n + 5, d), start, dtype=dtype),
        x=torch.tensor([[1.0, -1.0] * (d // 2)] * samples).to(dtype),
        clusters=torch.arange(n // size).repeat(samples, 1),
        hyper=make_hyper(2 * move / samples),
    )
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(repeats):
        weight = (
            step.replace(counter=make_counter(7, number))
            .to(device)
            .run()["weight"][2:-3]
            .double()
            .cpu()
        )
        sums += torch.stack([weight[:, 0::2].sum(), weight[:, 1::2].sum()])
    count = repeats * n * d // 2
    for mean, sign in zip(sums / count, (-1, 1), strict=True):
        target = start + sign * move
        spacing = float(unit(torch.tensor(target), dtype))
        part = target / spacing % 1
        sigma = spacing * (part * (1 - part) / count) ** 0.5
        assert abs(float(mean) - target) <= 5 * sigma + 2.0**-16 * spacing, (
            float(mean) - target
        ) / max(sigma, 1e-300)


@pytest.mark.parametrize("device", DEVICES)
def test_the_steps_train(device: str) -> None:
    """Steps on a problem that can be learned bring the loss down in every format alike."""
    losses = {}
    for dtype in DTYPES:
        step = random_cluster_step(*MIXED, dtype, hyper=make_hyper(0.1)).to(device)
        run = [step.run()]
        for number in range(30):
            step = step.replace(
                weight=run[-1]["weight"], counter=make_counter(step=number).to(device)
            )
            run.append(step.run())
        losses[dtype] = [float(r["loss"]) for r in run]
        assert losses[dtype][-1] < 0.05 * losses[dtype][0]
    for dtype in LOW:
        assert losses[dtype][-1] == pytest.approx(losses[F32][-1], rel=0.1)


# 4. Addresses beyond 2^31
@needs_kernels
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="maps one piece of memory many times, as Linux can"
)
def test_step_beyond_2_31_numbers() -> None:
    """Clusters at both ends of a bf16 table of 2^31 + 2^22 numbers come out as a small table of
    them alone.
    """
    rows, width, edge = 2**21 + 4096, 1024, 1 << 22
    table, kept = huge_table(rows, width, edge), edge // (2 * width)
    small = random_cluster_step(
        20, [40, 10, 9, 50], 3, width, BF16, hyper=make_hyper(0.05, 0.01), row_offset=rows - kept
    )
    count = len(small.tensors["weight"])
    table[-kept:][:count] = small.tensors["weight"]
    t = small.tensors
    moved = {"row_ptr": t["row_ptr"] + rows - kept, "pos_row": t["pos_row"] + rows - kept}
    huge = small.replace(weight=table, row_offset=0, **moved)
    args = (huge.tensors[k] for k in ("weight", "x", "clusters", "row_ptr"))
    rest = (huge.tensors[k] for k in ("pos_row", "pos_sample", "hyper", "counter"))
    dx, scores, loss = ops.cluster_step_(*args, 50, *rest, need_loss=True)
    got = {"dx": dx, "scores": scores, "loss": loss, "weight": table[-kept:][:count]}
    assert_same_bits(small.run(), got)
    assert not table[:kept].any()
    assert not table[kept : kept + 4096].any()
    assert not table[-kept:][count:].any()
    del table, huge, args, got
    gc.collect()


# All instruction sets.
def results(op: object) -> dict[str, str]:
    """One digest for each of some calls whose sums are exact in any order."""
    out = {}
    for dtype in DTYPES:
        for name, shape in (("small", (5, [3, 0, 9, 1, 8], 3, 7)), ("mixed", MIXED)):
            step = dyadic_cluster_step(
                *shape, dtype, need_loss=False, hyper=make_hyper(2.0**-8, 2.0**-4, 0.5, scale=0.5)
            )
            for state in (None, *DTYPES):
                if state is not None:
                    step = step.replace(
                        momentum=torch.zeros(step.tensors["weight"].shape, dtype=state)
                    )
                got = step.run(op)
                out[f"{name} {dtype} {state}"] = digest(
                    [got[k] for k in ("weight", "dx", "scores", "momentum") if k in got]
                )
    return out


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_cluster_step, test_cluster_step_bits as t
from common_cluster import SHAPES
from xmlkernels import ops
for dtype in t.DTYPES:
    for shape in (SHAPES["ragged"], test_cluster_step.MIXED):
        test_cluster_step.check_against_exact(test_cluster_step.make("adam by rows", shape, dtype))
print(json.dumps(t.results(ops.cluster_step_)))
"""


@needs_kernels
@pytest.mark.parametrize(
    "name", instruction_sets()[1:]
)  # the first is in use: all other tests are its own
def test_every_instruction_set(name: str) -> None:
    done = run_child(name, CHILD)
    assert done.returncode == 0, done.stderr[-3000:]
    got, expected = json.loads(done.stdout), results(reference)
    assert [k for k in expected if got[k] != expected[k]] == []
