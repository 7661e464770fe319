"""The race detector: planted races are found, others are not, every kernel was examined."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import races
from races import HARMLESS, RECORDER, Recorder, recorded
from xmlkernels.triton import common

TRITON = Path(__file__).resolve().parents[2] / "xmlkernels" / "triton"
SIDE = 16


def examine(launch: Callable[[], object]) -> list[tuple[str, str]]:
    """Return (argument, race) of what the launches did."""
    recorder = Recorder()
    with recorded(recorder):
        launch()
    assert recorder.launches.total()
    return [(race.argument, race.what) for race in recorder.races]


@triton.jit
def copy_blocks(source, target, STRIDE: tl.constexpr, SIDE: tl.constexpr):
    at = tl.program_id(0) * STRIDE + tl.arange(0, SIDE)
    tl.store(target + at, tl.load(source + at))


def test_two_programs_must_not_write_one_address() -> None:
    a, b = torch.zeros(64), torch.zeros(64)
    assert examine(lambda: copy_blocks[(4,)](a, b, SIDE, SIDE)) == []
    assert examine(lambda: copy_blocks[(4,)](a, b, SIDE - 1, SIDE)) == [("target", races.TWO_STORE)]


def test_between_launches_anything_goes() -> None:
    a, b = torch.zeros(64), torch.zeros(64)

    def twice() -> None:
        copy_blocks[(4,)](a, b, SIDE, SIDE)
        copy_blocks[(4,)](b, a, SIDE, SIDE)

    assert examine(twice) == []


def test_an_address_that_one_program_reads_and_another_writes() -> None:
    a = torch.zeros(96)
    assert examine(lambda: copy_blocks[(2,)](a, a[32:], SIDE, SIDE)) == []
    found = examine(lambda: copy_blocks[(4,)](a, a[SIDE:], SIDE, SIDE))
    assert [what for _, what in found] == [races.STORED_AND_READ]


def test_elements_of_different_size_overlap() -> None:
    """Program 1 reads as bytes what program 0 writes as fp32."""

    @triton.jit
    def mixed(numbers, octets, out):
        if tl.program_id(0) == 0:
            tl.store(numbers + 1, 1.0)
        else:
            tl.store(out, tl.load(octets + 6))

    a, out = torch.zeros(4), torch.zeros(1, dtype=torch.uint8)
    assert examine(lambda: mixed[(2,)](a, a.view(torch.uint8), out)) == [
        ("numbers", races.STORED_AND_READ)
    ]


@triton.jit
def count_up(counts, out, LOOK: tl.constexpr):
    tl.atomic_add(counts, 1, sem="relaxed")
    if LOOK:
        tl.store(out + tl.program_id(0), tl.load(counts))


def test_atomics_order_each_other_and_nothing_else() -> None:
    counts, out = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    assert examine(lambda: count_up[(4,)](counts, out, False)) == []
    assert examine(lambda: count_up[(4,)](counts, out, True)) == [("counts", races.ATOMIC_AND_READ)]


@triton.jit
def turn_around(scratch, out, BARRIER: tl.constexpr, SIDE: tl.constexpr):
    lane = tl.arange(0, SIDE)
    tl.store(scratch + lane, lane)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + lane, tl.load(scratch + (SIDE - 1 - lane)))


def test_a_program_waits_before_it_reads_what_its_threads_wrote() -> None:
    scratch, out = torch.zeros(SIDE, dtype=torch.int32), torch.zeros(SIDE, dtype=torch.int32)
    assert examine(lambda: turn_around[(1,)](scratch, out, True, SIDE)) == []
    assert examine(lambda: turn_around[(1,)](scratch, out, False, SIDE)) == [
        ("scratch", races.READ_AFTER_STORE)
    ]


@triton.jit
def sum_and_scale(table, sums, BARRIER: tl.constexpr, SIDE: tl.constexpr):
    """The sum and the update read the same values, in layouts that the compiler chooses."""
    lane = tl.arange(0, SIDE)
    tl.store(sums, tl.sum(tl.load(table + lane), 0))
    if BARRIER:
        tl.debug_barrier()
    tl.store(table + lane, 2 * tl.load(table + lane))


def test_values_read_in_two_layouts_are_not_overwritten_without_a_barrier() -> None:
    table, sums = torch.zeros(SIDE), torch.zeros(1)
    assert examine(lambda: sum_and_scale[(1,)](table, sums, True, SIDE)) == []
    assert examine(lambda: sum_and_scale[(1,)](table, sums, False, SIDE)) == [
        ("table", races.READ_TWICE)
    ]


def test_two_stores_to_one_address() -> None:
    @triton.jit
    def store_twice(out, SIDE: tl.constexpr):
        lane = tl.arange(0, SIDE)
        tl.store(out + lane, 0.0)
        tl.store(out + lane, 1.0)

    @triton.jit
    def store_lanes(out, DIFFER: tl.constexpr, SIDE: tl.constexpr):
        lane = tl.arange(0, SIDE)
        tl.store(out + lane // 2, lane % 2 if DIFFER else lane // 2)

    out = torch.zeros(SIDE)
    assert examine(lambda: store_twice[(1,)](out, SIDE)) == [("out", races.STORED_TWICE)]
    assert examine(lambda: store_lanes[(1,)](out, False, SIDE)) == []
    assert examine(lambda: store_lanes[(1,)](out, True, SIDE)) == [("out", races.LANES_DIFFER)]


def test_all_programs_may_raise_the_flag() -> None:
    with recorded(RECORDER):
        _, flag = common.prepare_batch(torch.full((2, 1024), torch.nan), torch.float32)
    assert flag == 1 and RECORDER.spared["flag", races.TWO_STORE]


def launched(source: str) -> set[str]:
    """Return the names of what a module launches: `name[grid](…)`."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    kernels = [f.value for f in calls if isinstance(f, ast.Subscript)]
    return {kernel.id for kernel in kernels if isinstance(kernel, ast.Name)}


def test_every_kernel_was_examined(request: pytest.FixtureRequest) -> None:
    """The last test of a whole run: no kernel that the package launches was left out."""
    here = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    config = request.config
    if {item.path.name for item in request.session.items} != here or config.option.keyword:
        pytest.skip("a part of the tests examines a part of the kernels")
    kernels = {name for path in TRITON.glob("*.py") for name in launched(path.read_text("utf-8"))}
    assert len(kernels) > 15 and not kernels - set(RECORDER.launches)
    assert set(RECORDER.spared) == set(HARMLESS), "what is listed as harmless no longer happens"
