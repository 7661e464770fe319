"""The reader of machine code: loops counted by their trips, accesses by their width."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import nvcc
from benchmarks import sass
from compiled import ARCHES, Compiled, compile_kernel

pytestmark = pytest.mark.compile
F32, BF16 = torch.float32, torch.bfloat16


@triton.jit
def loops(out, x, outer, inner, rare, WORK: tl.constexpr, BLOCK: tl.constexpr):
    """A loop in a loop, with WORK loads; and a branch."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(outer):
        total = total * 0.5
        for j in range(inner):
            for k in tl.static_range(WORK):
                total = tl.exp(total * tl.load(x + ((i + j) * WORK + k).to(tl.int64) * 4096 + lane))
    if rare > 7:
        for k in tl.static_range(8):
            total = tl.exp(total * tl.load(out + lane + 4096 * k))
        tl.store(out + 65536 + lane, total)
    tl.store(out + lane, total)


@triton.jit
def product(a, b, c, width, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """One product, rows of c `width` apart."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * width + n[None, :], tl.dot(left, right).to(tl.bfloat16))


@triton.jit
def joined(out, x, outer, inner, WORK: tl.constexpr, BLOCK: tl.constexpr):
    """A loop in a loop, with WORK stores after the inner one, made into one."""
    lane = tl.arange(0, BLOCK)
    tl.assume(inner > 0)
    for i in tl.range(0, outer, flatten=True):
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for j in range(0, inner):
            total = tl.exp(total * tl.load(x + j * BLOCK + lane))
        for k in tl.static_range(WORK):
            tl.store(out + (i * WORK + k) * 2 * BLOCK + lane, total)


def build_loops(work: int) -> Compiled:
    kinds = {"out": F32, "x": F32, "outer": "i32", "inner": "i32", "rare": "i32"}
    return compile_kernel(loops, "sm_90a", kinds, {"WORK": work, "BLOCK": 128})


@pytest.fixture(scope="module")
def looping() -> Compiled:
    return build_loops(12)


def build_product(arch: str, divisible: tuple[str, ...] = ("width",)) -> Compiled:
    kinds = {"a": BF16, "b": BF16, "c": BF16, "width": "i32"}
    sides = {"M": 64, "N": 64, "K": 64}
    return compile_kernel(product, arch, kinds, sides, divisible=divisible)


def test_two_loops_made_one_are_told_apart() -> None:
    """What the inner one does counts in every trip, the rest once a trip of the outer."""
    kinds = {"out": F32, "x": F32, "outer": "i32", "inner": "i32"}
    got = compile_kernel(joined, "sm_90a", kinds, {"WORK": 64, "BLOCK": 128})
    (loop,) = got.code.loops
    assert loop.always < loop.inside
    counts = got.count({"joined: for i": 7, "joined: for i + joined: for j": 11})
    assert counts.kinds["ldg"] == 7 * 11 and counts.kinds["stg"] == 7 * 64


@pytest.mark.parametrize("inner", [1, 13])
def test_loops_are_weighted_by_the_trips_of_their_source(looping: Compiled, inner: int) -> None:
    """One element per thread: WORK loads for each trip."""
    trips = {"loops: for i": 5, "loops: for j": inner, "loops: if rare > 7": 0}
    got = looping.count(trips)
    assert (got.kinds["ldg"], got.bytes["ldg"]) == (60 * inner, 60 * inner * 128)
    assert got.kinds["stg"] == 1
    got = looping.count(trips | {"loops: if rare > 7": 0.25})
    assert (got.kinds["ldg"], got.kinds["stg"]) == (60 * inner + 2, 1.25)


@pytest.mark.parametrize("inner", [2, 40, 403])
def test_a_loop_that_the_compiler_splits(inner: int) -> None:
    """Four iterations at once, then one by one; some stand apart, and count once."""
    got = build_loops(1)
    assert len(got.code.loops) > 2
    trips = {"loops: for i": 1, "loops: for j": inner, "loops: if rare > 7": 0}
    assert inner <= got.count(trips).kinds["ldg"] <= inner + 4


def test_a_loop_may_be_named_by_its_place(looping: Compiled) -> None:
    assert [loop.path for loop in looping.code.loops] == [(0,), (0, 0)]
    named = looping.count({"loops: for i": 5, "loops: for j": 8})
    assert looping.count({(0,): 5, (0, 0): 8}) == named


@pytest.mark.parametrize("trips", [{}, {"loops: for i": 5}])
def test_a_loop_without_trips_is_refused(looping: Compiled, trips: sass.Trips) -> None:
    with pytest.raises(ValueError, match="no trips for the loop"):
        looping.count(trips)


def test_trips_for_nothing_are_refused(looping: Compiled) -> None:
    with pytest.raises(ValueError, match=r"trips for \['loops: for k'\]"):
        looping.count({"loops: for i": 5, "loops: for j": 8, "loops: for k": 2})


@pytest.mark.parametrize("arch", [*ARCHES, "sm_89"])
def test_products_are_counted(arch: str) -> None:
    got = build_product(arch).count()
    assert got.multiplications * 4 == 64**3
    assert got.matching("HGMMA" if arch == "sm_90a" else "HMMA") == got.kinds["mma"] > 0
    assert (got.operand_bytes > 0) == (arch == "sm_90a")


def test_accesses_are_told_apart_by_width() -> None:
    wide, narrow = build_product("sm_90a").count(), build_product("sm_90a", ()).count()
    # 64 * 64 results of two bytes by four warps; without alignment each goes alone.
    assert wide.bytes["stg"] * 4 == narrow.bytes["stg"] * 4 == 64 * 64 * 2
    assert wide.matching(r"STG.*\.128") == wide.kinds["stg"] == 4
    assert narrow.matching(r"STG.*\.U16") == narrow.kinds["stg"] == 32


@pytest.mark.parametrize(
    "registers, shared, warps, arch, blocks",
    [
        (128, 0, 8, "sm_90a", 2),
        (129, 0, 8, "sm_90a", 1),
        (32, 100 << 10, 4, "sm_90a", 2),
        (32, 49 << 10, 4, "sm_89", 2),
        (32, 0, 8, "sm_89", 6),
        (16, 0, 1, "sm_80", 32),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, arch: str, blocks: int) -> None:
    assert sass.occupancy(registers, shared, warps, arch) == blocks


def test_cuda_sources_are_read_too() -> None:
    source = Path(nvcc.ROOT, "csrc", "cuda", "sparse_update.cu")
    binary = nvcc.compiled(source, nvcc.LINKED)
    found, needs = sass.disassemble(binary), sass.resources(binary)
    assert set(found) == set(needs) and any("update_kernel" in name for name in found)
    for name, code in found.items():
        assert {i.kind for i in code.instructions} <= {*sass.CLASSES, "uniform", "control"}
        assert needs[name].registers > 0 and code.static("EXIT") >= 1
        # The source is not Python: loops have places and no names.
        assert all(loop.statement is None for loop in code.loops)
        code.count({loop.path: 2 for loop in code.loops})
