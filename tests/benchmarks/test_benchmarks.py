"""Clock, peak memory and load, and cases whose peers compute the same."""

import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_rows import TINY

from benchmarks import cascade, cases, cases_bce_loss, shapes, timing
from benchmarks.cases_bag_step import bag_work, make_bags
from benchmarks.cases_bce_step import bce_work, skip_work
from benchmarks.cases_cluster_step import cluster_work, make_level
from benchmarks.cases_matmul_topk import topk_work
from benchmarks.cases_shortlist_matmul import shortlist_work
from benchmarks.cases_sparse_update import make_touched, sparse_work
from benchmarks.head import make_head, positives
from xmlkernels import ops
from xmlkernels.errors import InputError


def test_quantiles_interpolate() -> None:
    assert timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_every_step_gets_every_round_in_turn() -> None:
    calls: list[str] = []

    class Counted(timing.Clock):
        def repeats(self, step: timing.Step) -> int:
            return 1

        def once(self, step: timing.Step, repeats: int = 1) -> float:
            step()
            return float(len(calls))

    steps = {name: partial(calls.append, name) for name in "abc"}
    samples = timing.alternate(steps, Counted("cpu"), rounds=3, budget_s=0)
    assert calls == list("abcbcacab")
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_rounds_fill_the_budget_and_never_fall_below_the_least() -> None:
    clock = timing.Clock("cpu")
    assert (
        len(timing.alternate({"a": partial(time.sleep, 0.02)}, clock, rounds=3, budget_s=0.3)["a"])
        > 3
    )
    assert (
        len(timing.alternate({"a": partial(time.sleep, 0.02)}, clock, rounds=3, budget_s=0)["a"])
        == 3
    )


def test_clock_gives_milliseconds_of_one_call() -> None:
    clock = timing.Clock("cpu")
    assert 5 <= clock.once(partial(time.sleep, 0.005), repeats=3) < 50
    assert clock.repeats(partial(time.sleep, 0.005)) in (1, 2, 3, 4)
    assert clock.repeats(partial(time.sleep, 0.03)) == 1


PEAK = """
import torch
from benchmarks import timing
size = 40_000_000

def start(held):
    state = torch.ones(size // 4)
    return lambda: state.add_(torch.ones(size // 4))  # a temporary, gone when the step ends

print(timing.peak_bytes("cpu", lambda: torch.ones(3 * size // 4), start))
"""


def test_peak_counts_state_and_temporaries_but_not_inputs() -> None:
    # In a process of its own, as `peak_bytes` asks: this one's allocator keeps pages of earlier
    # tests.
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    if sys.platform != "linux":
        assert done.stdout.strip() == "None"
    else:
        assert int(done.stdout) == pytest.approx(80_000_000, rel=0.05)


def test_load_sees_this_process_as_its_own() -> None:
    if not Path("/proc/stat").exists():
        assert timing.Load().others() is None
        return
    load, stop = timing.Load(), time.process_time() + 0.2
    while time.process_time() < stop:
        pass
    now, others = timing.Load._now(), load.others()
    assert now is not None and load._before is not None and others is not None
    wall = now[2] - load._before[2]
    assert (
        now[0] - load._before[0]
    ) - others * wall > 0.15  # of the busy seconds, those 0.2 are not others'


def test_closed_forms() -> None:
    shape = shapes.Shape("x", 64, 131_072, 384, K=100)
    assert bce_work(shape, 2) == (
        19_327_352_832,
        2 * 2 * 50_331_648 + 8 * 64 * 384 + 12 * 320,
    )
    assert bce_work(shape, 4, 4)[1] - bce_work(shape, 4)[1] == 2 * 4 * 50_331_648
    lists = shapes.Shape("", 64, 131_072, 384, S=1024)  # 64 lists of 1,024 name 51,729 rows
    moved = 65_536 * 384 * 4 + 51_729 * 384 * (2 + 4) * 4 + 12 * 65_536 + 8 * 64 * 384
    assert shortlist_work(lists, "step", 4, 4) == (6 * 65_536 * 384, moved)
    fused = moved - 65_536 * 384 * 4
    assert shortlist_work(lists, "step", 4, 4, fused=True) == (
        6 * 65_536 * 384,
        fused,
    )
    assert topk_work(shape, 4) == (
        6_442_450_944,
        4 * 50_331_648 + 4 * 64 * 384 + 12 * 64 * 100,
    )
    # 64 draws of 128 of 16,384 clusters touch 51,729 rows.
    level = shapes.Shape("", 64, 131_072, 384, S=1024, K=128)
    moved = 51_729 * 384 * (2 + 4) * 4 + 4 * 65_536 + 8 * 64 * (128 + 384)
    assert cluster_work(level, 4, 4) == (6 * 65_536 * 384, moved)
    table = 50_331_648
    assert skip_work(shape, 2) == (
        2 * 64 * table + 4 * 64 * 128 * 320 * 384,
        2 * (table + 128 * 320 * 384) + 200_448,
    )
    assert cases_bce_loss.loss_work(shape, "loss", 2) == (
        2 * 64 * table,
        2 * table + 4 * 64 * 384 + 12 * 320,
    )
    assert cases_bce_loss.loss_work(shape, "backward", 4) == (
        6 * 64 * table,
        2 * (4 * table + 4 * 64 * 384) + 12 * 320,
    )
    bags = shapes.Shape("", 64, 50_000, 256, S=64)  # 4,096 draws name 3,933 rows
    moved = 2 * 3_933 * 256 * 2 * 3 + 4 * 64 * 256 + 12 * 4_096 + 8 * 64
    assert bag_work(bags, "adam", 2) == (2 * 4_096 * 256 + 14 * 3_933 * 256, moved)
    few = shapes.Shape("x", 1, 670_000, 384, S=100_000)
    assert sparse_work(few, "adam", 2) == (
        14 * 38_400_000,
        2 * 3 * 2 * 38_400_000 + 4 * 38_400_000 + 800_000,
    )
    assert sparse_work(few, "sgd", 4) == (2 * 38_400_000, 3 * 4 * 38_400_000 + 800_000)
    mm = cases.ceiling("bf16", "cpu")
    assert (mm.flops, mm.bytes) == (2 * 2048**3, 3 * 2 * 2048**2)
    assert [cases.ceiling_dtype(d, "cpu") for d in ("fp32", "bf16", "fp16")] == [
        "fp32",
        "bf16",
        "fp32",
    ]


def test_inputs_are_legal_and_the_same_in_every_format() -> None:
    for shape in (TINY, shapes.Shape("narrow", 6, 3, 8)):
        head, low = (make_head(shape, dtype, "cpu") for dtype in ("fp32", "bf16"))
        assert torch.equal(head.x, low.x) and torch.equal(head.pos_row, low.pos_row)
        assert len(head.pos_row) == positives(shape)
        # Refuses unsorted or repeated pairs.
        ops.bce_loss(head.x, head.weight, None, head.pos_row, head.pos_sample)


@pytest.mark.parametrize("peer", ["eager", "compile", "renee"])
def test_peers_compute_the_same_step(peer: str) -> None:
    if peer == "compile" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    after = []
    for impl in ("xmlkernels", peer):
        case = next(
            c for c in cases.build("bce_step", TINY, "cpu") if c.key == (impl, "momentum", "fp32")
        )
        head = case.inputs()
        step = case.start(head)
        step()
        dx = step()
        after.append((torch.as_tensor(dx).clone(), head.weight.detach().clone()))
    (dx, weight), (peer_dx, peer_weight) = after
    torch.testing.assert_close(peer_dx, dx)
    torch.testing.assert_close(peer_weight, weight, rtol=1e-5, atol=1e-7)
    assert not torch.equal(weight, make_head(TINY, "fp32", "cpu").weight)


def test_renee_keeps_its_products_low_and_its_table_full() -> None:
    case = next(
        c for c in cases.build("bce_step", TINY, "cpu") if c.key == ("renee", "momentum", "bf16")
    )
    head = case.inputs()
    dx = case.start(head)()
    expected = ops.bce_step_(
        make_head(TINY, "fp32", "cpu").weight,
        head.x,
        head.pos_row,
        head.pos_sample,
        torch.tensor([0, 0, 0, 0, 0, 1.0, 1.0]),
        torch.tensor([0, 0]),
    )[0]
    assert head.weight.dtype == torch.float32
    assert 0 < (torch.as_tensor(dx) - expected).norm() / expected.norm() < 0.02


def test_searches_agree() -> None:
    found = {}
    for case in cases.build("matmul_topk", TINY, "cpu"):
        if case.phase == "topk" and case.dtype == "fp32":
            found[case.impl] = case.start(case.inputs())()
    assert set(found) == {"xmlkernels", "reference", "eager"}
    values, rows = found["reference"]
    for impl in ("xmlkernels", "eager"):
        assert torch.equal(found[impl][1], rows)
        torch.testing.assert_close(found[impl][0], values)


@pytest.mark.parametrize("phase", ["sgd", "adam"])
@pytest.mark.parametrize("k", [1, 4])
def test_cluster_peers_do_the_same(phase: str, k: int) -> None:
    """After two steps, so that the moments count."""
    shape, after = shapes.Shape("tiny", 4, 60, 16, S=60 if k == 1 else 20, K=k), {}
    for case in cases.build("cluster_step", shape, "cpu"):
        if (case.phase, case.dtype) == (phase, "fp32"):
            held = case.inputs()
            step = case.start(held)
            step()
            after[case.impl] = (
                torch.as_tensor(step()).detach().clone(),
                held.weight.detach().clone(),
            )
    assert set(after) == {"xmlkernels", "reference", "eager"} | (
        {"bce_step"} if k == 1 and phase == "sgd" else set()
    )
    found, weight = after["xmlkernels"]
    assert not torch.equal(weight, make_level(shape, "fp32", "cpu").weight)
    for peer, peer_weight in after.values():
        torch.testing.assert_close(peer, found)
        torch.testing.assert_close(peer_weight, weight, rtol=1e-4, atol=1e-6)


def test_cascade_peers_do_the_same() -> None:
    """One step from the same tables: the shortlists that the peer is handed are those that ours
    makes.
    """
    shape, after = shapes.Shape("tiny-cascade", 4, 512, 16, S=48, K=12), {}
    built = cases.build("cluster_step", shape, "cpu")
    assert [(case.impl, case.dtype) for case in built] == [
        ("xmlkernels", "fp32"),
        ("xmlkernels", "bf16"),
        ("eager", "fp32"),
    ]
    for case in built:
        if case.dtype == "fp32":
            # As SparseAdam has it.
            held = cascade.make_levels(shape, "fp32", "cpu", row_wise=False)
            before = [level.weight.clone() for level in held.heads.levels]
            assert [tuple(w.shape) for w in before] == [(16, 16), (128, 16), (512, 16)]
            assert [tuple(i.shape) for i in held.index] == [(4, 16), (4, 48), (4, 48)]
            assert [int(t.sum()) for t in held.target] == [len(n) for n, _ in held.positives]
            dx = case.start(held)()
            after[case.impl] = dx, [level.weight.detach().clone() for level in held.heads.levels]
    for name in range(3):
        torch.testing.assert_close(
            after["eager"][0][name], after["xmlkernels"][0][name], rtol=1e-4, atol=1e-8
        )
        torch.testing.assert_close(
            after["eager"][1][name], after["xmlkernels"][1][name], rtol=1e-4, atol=1e-6
        )
        assert not torch.equal(after["xmlkernels"][1][name], before[name])


def test_sparse_updates_agree() -> None:
    """Each rule's second step, so that its states count. SparseAdam's epsilon lies elsewhere: 1e-8
    beside gradients of 1.
    """
    shape = shapes.Shape("few", 1, 300, 16, S=40)
    before, after = make_touched(shape, "fp32", "cpu"), {}
    for case in cases.build("sparse_update", shape, "cpu"):
        if case.dtype == "fp32":
            step = case.start(case.inputs())
            step()
            after[case.impl, case.phase] = torch.as_tensor(step()).detach()
    assert {impl for impl, _ in after} == {"xmlkernels", "reference", "torch"} and len(after) == 9
    for (impl, rule), param in after.items():
        torch.testing.assert_close(
            param, after["reference", rule], rtol=1e-5, atol=1e-8, msg=f"{impl} {rule}"
        )
        moved = (param != before.param).any(1).nonzero()[:, 0]
        assert torch.equal(moved, before.rows)


def test_bag_steps_agree() -> None:
    """The second step of each rule, tokens repeated within and across bags; as above for
    SparseAdam's epsilon.
    """
    shape, after = shapes.Shape("few", 6, 40, 16, S=20), {}
    before = make_bags(shape, "fp32", "cpu")
    for case in cases.build("bag_step", shape, "cpu"):
        if case.dtype == "fp32":
            step = case.start(case.inputs())
            step()
            after[case.impl, case.phase] = torch.as_tensor(step()).detach()
    assert {impl for impl, _ in after} == {"xmlkernels", "reference", "torch"} and len(after) == 6
    for (impl, rule), param in after.items():
        torch.testing.assert_close(
            param, after["reference", rule], rtol=1e-5, atol=1e-7, msg=f"{impl} {rule}"
        )
        moved = (param != before.param).any(1).nonzero()[:, 0]
        assert torch.equal(moved, before.token.unique())


@pytest.mark.parametrize("phase", ["loss", "backward"])
def test_losses_agree(phase: str) -> None:
    found = {}
    for case in cases.build("bce_loss", TINY, "cpu"):
        if (case.phase, case.dtype) == (phase, "fp32"):
            found[case.impl] = torch.as_tensor(case.start(case.inputs())()).detach()
    assert {"xmlkernels", "eager"} <= set(found)
    for result in found.values():
        torch.testing.assert_close(result, found["eager"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phase", ["forward", "shared", "step"])
def test_shortlist_peers_do_the_same(phase: str) -> None:
    shape, after = shapes.Shape("tiny", 4, 300, 16, S=20), {}
    for case in cases.build("shortlist_matmul", shape, "cpu"):
        if (case.phase, case.dtype) == (phase, "fp32"):
            held = case.inputs()
            step = case.start(held)
            step()
            after[case.impl] = (
                torch.as_tensor(step()).detach().clone(),
                held.weight.detach().clone(),
            )
    assert set(after) == {"xmlkernels", "eager"} | ({"fused"} if phase == "step" else set())
    found, weight = after["xmlkernels"]
    for peer, peer_weight in after.values():
        torch.testing.assert_close(peer, found)
        torch.testing.assert_close(peer_weight, weight, rtol=1e-4, atol=1e-6)


def test_cases_have_keys_of_their_own_and_references_stay_small() -> None:
    for op, benchmark in cases.BENCHMARKS.items():
        listed = benchmark.shapes
        assert len({shape.name for shape in listed}) == len(listed)
        for shape in listed:
            keys = [case.key for case in cases.build(op, shape, "cpu")]
            assert len(set(keys)) == len(keys) and keys[0][0] == "xmlkernels"
            tiny = shapes.tiny(shape)  # what `measure_peak` warms a peer up with
            assert set(keys) <= {case.key for case in cases.build(op, tiny, "cpu")}
            assert ("reference" in {key[0] for key in keys}) == (shape.L * shape.D <= 1 << 23)


def test_shapes_are_named() -> None:
    assert [shape.name for shape in cases.pick("bce_step", "B256-L131k")] == ["B256-L131k"]
    assert cases.pick("matmul_topk", None) == cases.BENCHMARKS["matmul_topk"].shapes
    with pytest.raises(InputError, match="did you mean B256-L670k"):
        cases.pick("matmul_topk", "B256-670k")
