"""csrc/cuda/sm90/bce_pass.cu without a card: what the compiler makes of it, what the library asks
for, and, as host code, where its registers and memory meet and what it rounds.
"""

import ctypes
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sass, sass_pass
from common import assert_same_bits, make_counter
from cuda_arithmetic import address
from nvcc import FLAGS, LINKED, ROOT, SOURCES, TORCH, compiled, folder, need_nvcc, run
from sparse_common import dyadic_rows, random_rows
from xmlkernels.ops.hyper import DECAY, LR

pytestmark = pytest.mark.compile
VERSION = "4.2.0.0"  # the Makefile's
SAMPLES, LABELS, COLUMNS, HALF, THREADS = 128, 64, 128, 64, 128
WEIGHTS = LABELS * COLUMNS // THREADS  # of a thread, in a turn
ALLOWED = 15  # instructions per weight: 14.5 when it was written


def headers() -> Path:
    """CUTLASS's; without them skipped, or failed with XMLKERNELS_REQUIRE_CUTLASS=1."""
    wheel = Path(sys.prefix) / f"cutlass-{VERSION}" / "cutlass_library" / "source" / "include"
    found = Path(os.environ.get("XMLKERNELS_CUTLASS") or wheel)
    if (found / "cute" / "tensor.hpp").is_file():
        return found
    told = f"no CUTLASS in {found}: `make test` installs nvidia-cutlass {VERSION} there"
    if os.environ.get("XMLKERNELS_REQUIRE_CUTLASS") == "1":
        pytest.fail(f"XMLKERNELS_REQUIRE_CUTLASS=1, but {told}")
    pytest.skip(told)


@functools.cache
def binary() -> tuple[Path, str]:
    """The kernel with what tells of it, compiled once, and what the compiler said of it."""
    target = folder() / "bce_pass.o"
    command = [need_nvcc(), *FLAGS, "-isystem", str(headers()), f"-arch={LINKED}"]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
    command += ["-Xcompiler", "-fvisibility=hidden", "-c"]
    source = Path(__file__).with_name("bce_pass_layouts.cu")
    done = subprocess.run(
        [*command, str(source), "-o", str(target)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return target, done.stdout + done.stderr


@functools.cache
def library() -> ctypes.CDLL:
    target = folder() / "bce_pass.so"
    run([need_nvcc(), "-shared", f"-arch={LINKED}", str(binary()[0]), "-o", str(target)])
    return ctypes.CDLL(str(target))


def told(name: str, *shape: int, which: int | None = None) -> torch.Tensor:
    out = torch.full(shape, -1, dtype=torch.int32)
    arguments = [] if which is None else [ctypes.c_int64(which)]
    getattr(library(), name)(*arguments, ctypes.c_void_p(out.data_ptr()))
    return out


def codes() -> list[sass.Code]:
    found = sass.disassemble(binary()[0])
    assert len(found) == 2 and all("bce_pass_kernel" in name for name in found)
    return list(found.values())


def test_it_spills_nothing_and_runs_its_products_side_by_side() -> None:
    said = binary()[1]
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2, said
    assert said.count("Used 168 registers") == 2  # 3 warpgroups; they then share them out anew
    # C7510 and its like: products one after another, for what stands between them.
    assert "serialized" not in said and "Performance Loss" not in said, said


def turn(code: sass.Code) -> list[sass.Instruction]:
    """A tile of labels, as a warp of a consumer takes it."""
    return [code.instructions[i] for i in sorted(sass_pass.turn(code).inside)]


def test_a_tile_takes_few_instructions_and_wide_ones() -> None:
    for code in codes():
        body = turn(code)
        count = {name: sum(i.base == name for i in body) for name in {i.base for i in body}}
        # 8 products of 16 samples for the rows' gradient, and two times 4 of 16 labels for dX.
        assert count["HGMMA"] == 8 + 2 * 4 and sum(i.multiplications for i in body) * 4 == (
            2 * SAMPLES * LABELS * COLUMNS
        )
        assert code.static("HGMMA") == count["HGMMA"]
        assert count["UTMASTG"] == 2 and code.static("UTMALDG") == 2 + 4
        # Weights and random words, 16 bytes of a lane at a time.
        assert count["LDSM"] == 2 * WEIGHTS // 8 and count["STSM"] == count["STS"] == WEIGHTS // 8
        assert all(".128" in i.opcode for i in body if i.base == "STS")
        assert not count.keys() & {"LDG", "STG", "LD", "ST", "LDS", "LDL", "STL"}
        assert len(body) / WEIGHTS <= ALLOWED, len(body)
        print(f"\nbce_pass: {len(body) / WEIGHTS:.1f} instructions per weight")


def test_rounding_begins_while_dx_is_multiplied() -> None:
    """The rows' gradient is waited for first; what waits for dX comes behind the rounding."""
    for code in codes():
        body = turn(code)
        waits = [i for i, at in enumerate(body) if at.opcode.startswith("WARPGROUP.DEPBAR")]
        assert len(waits) == 2
        last = max(i for i, at in enumerate(body) if at.base == "HGMMA")
        rounding = [i for i, at in enumerate(body) if at.base in ("VIMNMX", "STSM")]
        assert last < waits[0] < min(rounding) and max(rounding) < waits[1]
        assert not any(at.base == "WARPGROUP" for at in body[body.index(body[last]) : waits[0]])


def test_registers_are_shared_out_anew() -> None:
    """What the loads do without, both that multiply get: 3 x 168 in all."""
    for code in codes():
        shares = [i for i in code.instructions if i.base == "USETMAXREG"]
        given = sorted(int(i.text.split(", ")[-1].split()[-1], 16) for i in shares)
        assert given == [24, 240] and given[0] + 2 * given[1] <= 3 * 168
    stages, shared = told("sizes", 2).tolist()
    assert stages == 5 and shared <= 227 << 10
    pieces = SAMPLES * COLUMNS + stages * LABELS * (COLUMNS + SAMPLES) + 2 * LABELS * COLUMNS
    assert shared >= 2 * pieces


def test_the_model_of_its_time() -> None:
    """docs/results/gpu.md has the figure. Memory is the largest of its resources."""
    sizes = (sass_pass.SAMPLES, sass_pass.LABELS, sass_pass.COLUMNS)
    assert sizes == (SAMPLES, LABELS, COLUMNS)
    assert sass_pass.STAGES == int(told("sizes", 2)[0])
    line = sass_pass.model(binary()[0])
    print(f"\nbce_pass bf16 B128 L2.8M (model): {line.expected:.2f} ms")
    assert line.expected < 2.85 and line.times["memory"] == line.largest < 2.2
    assert line.launches == 4


def box(rows: int) -> torch.Tensor:
    """Bytes [rows, 128] where TMA puts bf16 that it swizzles by 128 bytes, in two boxes of 64
    columns.
    """
    row, column = torch.arange(rows)[:, None], torch.arange(2 * HALF)[None, :]
    chunk = (column % HALF // 8) ^ (row % 8)
    return column // HALF * rows * 128 + row * 128 + chunk * 16 + column % 8 * 2


def test_the_products_find_what_tma_brought() -> None:
    stages = int(told("sizes", 2)[0])
    operands = [
        (0, SAMPLES, 1, True),  # x [sample, column], along columns and samples
        (1, LABELS, stages, True),  # weights [label, column]
        (2, LABELS, stages, False),  # gradient [label, sample]
        (3, LABELS, stages, True),  # the same, the other way round
    ]
    for which, rows, count, turned in operands:
        # The first index is the fastest: [stage, k, m or n].
        got = told("operand_places", count, *((rows, 128) if turned else (128, rows)), which=which)
        got = got if turned else got.transpose(1, 2)
        at = torch.arange(count)[:, None, None] * (rows * 128 * 2) + box(rows)
        assert torch.equal(got.long(), at), which


def test_lanes_round_the_weights_whose_gradient_they_hold() -> None:
    """Four 8 x 8 matrices at a time: from lane 8 m + r comes the address of row r of matrix m, and
    lane l gets two values of row l / 4 of each.
    """
    held = told("accumulator_places", THREADS, WEIGHTS, 2, which=0)
    chunks = told("chunk_places", THREADS, COLUMNS // 16, 3)
    place = {int(b): divmod(i, 128) for i, b in enumerate(box(LABELS).flatten())}
    for thread in range(THREADS):
        for p in range(COLUMNS // 16):
            start, *drawn = chunks[thread, p].tolist()
            # The words of a draw lie where its 8 columns do, each with the two that it serves.
            assert place[start] == tuple(drawn) and drawn[1] % 8 == 0
            for m in range(4):
                source = thread // 32 * 32 + 8 * m + thread % 32 // 4
                start = int(chunks[source, p, 0]) + thread % 4 * 4
                i = 8 * p + 2 * m
                assert place[start] == tuple(held[thread, i].tolist())
                assert place[start + 2] == tuple(held[thread, i + 1].tolist())


def test_sums_of_dx_go_where_they_belong() -> None:
    shape = (THREADS, SAMPLES * COLUMNS // THREADS, 2)
    got = told("dx_places", *shape)
    # The tensor's order: of a product's 64 samples, then of the next.
    assert torch.equal(got, told("accumulator_places", *shape, which=1))
    assert len({tuple(at) for at in got.view(-1, 2).tolist()}) == SAMPLES * COLUMNS


def update(step: object, decoupled: bool) -> dict[str, torch.Tensor]:
    t = {k: v.clone() for k, v in step.tensors.items()}  # type: ignore[attr-defined]
    rows, grad = t["rows"], t["grad"].float()
    for i, row in enumerate(rows.tolist()):
        table = t["param"][row]
        library().update_pairs(
            *(ctypes.c_void_p(address(a)) for a in (table, grad[i], t["hyper"], t["counter"])),
            *map(ctypes.c_int64, (row + step.options.get("row_offset", 0), 1)),  # type: ignore[attr-defined]
            *map(ctypes.c_int64, (grad.shape[1], decoupled)),
        )
    return {"param": t["param"]}


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_update_has_the_bits_of_the_cpu_kernels(decoupled: bool) -> None:
    """SGD where fp32 results are exact, of any row and column; large numbers and NaN saturate."""
    for row_offset in (0, 2**33 + 5):
        options = {"decoupled": decoupled, "row_offset": row_offset}
        step = dyadic_rows("sgd", (40, 60, 256), torch.bfloat16, **options)
        assert step.tensors["hyper"][DECAY] and not torch.equal(
            update(step, decoupled)["param"], step.tensors["param"]
        )
        assert_same_bits(update(step, decoupled), step.run())
        assert_same_bits(update(step, decoupled), step.run(reference=True))
        later = step.replace(counter=make_counter(seed=2**40 + 7, step=2**33))
        assert_same_bits(
            update(later, decoupled), step.replace(counter=later.tensors["counter"]).run()
        )
    large = step.replace(param=torch.full_like(step.tensors["param"], 3e38))
    large.tensors["param"][:, ::2] *= -1
    large.tensors["hyper"][LR] = 2.0**120
    assert_same_bits(update(large, decoupled), large.run())
    # Sums that are not exact are rounded once or twice: few are another neighbour then.
    step = random_rows("sgd", (200, 300, 256), torch.bfloat16, decoupled=decoupled)
    same = (update(step, decoupled)["param"] == step.run()["param"]).double().mean()
    assert same > 0.99


def test_the_library_links_with_it() -> None:
    """It asks for no symbol of the driver, and the library registers one op more."""
    source = str(ROOT / "csrc" / "bindings_cuda.cpp")
    bindings, made = folder() / "bindings_cutlass.o", folder() / "_cuda_cutlass.so"
    stable = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DUSE_CUDA",
        "-DXK_CUDA",
        "-DXK_CUTLASS",
    ]
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
    include = ["-isystem", str(TORCH / "include"), f"-I{ROOT / 'csrc'}"]
    run(["c++", *flags, *stable, *include, "-c", source, "-o", str(bindings)])
    objects = [str(compiled(s, LINKED)) for s in SOURCES]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    link = [need_nvcc(), "-shared", f"-arch={LINKED}", str(bindings), str(binary()[0]), *objects]
    run([*link, *libraries, "-o", str(made)])
    undefined = run(["nm", "-D", "--undefined-only", "--demangle", str(made)])
    assert not re.search(r" U cu[A-Z]", undefined), undefined
    assert "xk::" not in undefined
    stand_in = folder() / "stand_in_cutlass.c"
    stand_in.write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"
    )
    run(["cc", "-shared", "-fPIC", str(stand_in), "-o", str(stand_in.with_suffix(".so"))])
    code = (
        "import ctypes, sys, torch\n"
        "from xmlkernels import ops\n"
        "from xmlkernels.triton import bce_pass\n"
        "before = bce_pass.is_built()\n"
        "if torch.version.cuda is None: ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)\n"
        "torch.ops.load_library(sys.argv[2])\n"
        "print(before, bce_pass.is_built(), torch.ops.xmlkernels.bce_pass_.default._schema)\n"
    )
    environment = os.environ | {"XMLKERNELS_CUDA": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(stand_in.with_suffix(".so")), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.startswith("False True xmlkernels::bce_pass_(Tensor(a!) weight"), done.stderr


def test_the_build_compiles_it_for_one_architecture(tmp_path: Path) -> None:
    """CMake gives the kernel's file to nvcc for sm_90a alone, and the bindings their word of it."""
    cmake = Path(sys.executable).with_name("cmake")
    options = {"TORCH_ROOT": TORCH, "XMLKERNELS_PACKAGE": tmp_path / "package"}
    options |= {"XMLKERNELS_CUDA_ARCHS": "80-real;90a-real", "CMAKE_CUDA_COMPILER": need_nvcc()}
    options |= {"Python_EXECUTABLE": sys.executable, "CMAKE_BUILD_TYPE": "Release"}
    options |= {"XMLKERNELS_CUTLASS": headers()}
    given = [f"-D{name}={value}" for name, value in options.items()]
    run([str(cmake), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", *given])
    lines = (tmp_path / "compile_commands.json").read_text("utf-8").splitlines()
    commands = [line for line in lines if '"command"' in line]
    (mine,) = (line for line in commands if "bce_pass.cu " in line)
    assert "sm_90a" in mine and "sm_80" not in mine and str(headers()) in mine
    others = [line for line in commands if ".cu " in line and line is not mine]
    assert others and all("sm_80" in line and "sm_90a" in line for line in others)
    (bindings,) = (line for line in commands if "bindings_cuda.cpp" in line)
    assert "-DXK_CUTLASS" in bindings


@pytest.mark.parametrize("required", ["0", "1"])
def test_without_the_headers_it_skips_and_says_so(
    required: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XMLKERNELS_CUTLASS", str(tmp_path))
    monkeypatch.setenv("XMLKERNELS_REQUIRE_CUTLASS", required)
    outcome = pytest.fail.Exception if required == "1" else pytest.skip.Exception
    with pytest.raises(outcome, match="no CUTLASS"):
        headers()


def test_one_version_everywhere() -> None:
    for name in ("Makefile", "setup.py"):
        found = set(re.findall(r"cutlass(?:==|-)(\d[\d.]+\d)", (ROOT / name).read_text("utf-8")))
        assert found == {VERSION}, name
