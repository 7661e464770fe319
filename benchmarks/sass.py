"""Reads the machine code (SASS) of a GPU kernel: what a warp executes, and what a block needs.

No card is needed: Triton brings nvdisasm and cuobjdump. Every instruction stands with the line of
source that it comes from, so a loop of the machine code is known by the loop of the source that it
came from ("score_tiles: for d"), whatever the compiler calls its labels. Counts are exact for the
path that the given trips describe; cycles made of them are a model, and no measurement.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

from benchmarks.sass_instructions import CLASSES, Instruction
from benchmarks.sass_loops import Loop, branches_of, find_loops

__all__ = (
    "CLASSES",
    "Code",
    "Counts",
    "Instruction",
    "Loop",
    "Resources",
    "Trips",
    "disassemble",
    "occupancy",
    "resources",
    "tool",
)

Trips = Mapping[str | tuple[int, ...], float]
"""How often a loop runs, or the share of the times that a branch is taken.

A key is "function: for i", "function: while a < b" or "function: if hit" of the source; or, where
the source is not Python, the place of the loop: (0,) is the first, (1, 0) the first in the second.
"function: for i + function: for j": how often the inner loop runs in one trip of the outer, which
has its own key, where the compiler made one loop of both.
A short branch becomes predicates, whose instructions count as executed: no share is taken of it.
"""


@dataclass
class Counts:
    """What one warp executes, weighted by trips; divergent branches count as executed by all.

    Attributes:
        kinds: instructions by class. opcodes: by opcode, with its modifiers. bytes: moved, by
            class. multiplications: multiply-adds on tensor cores. operand_bytes: read by wgmma from
            shared memory.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    multiplications: float = 0
    operand_bytes: float = 0

    @property
    def issue(self) -> float:
        """All instructions."""
        return sum(self.kinds.values())

    def matching(self, pattern: str) -> float:
        """Return how many instructions have an opcode that begins with the pattern."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


@dataclass
class Code:
    """The machine code of one kernel.

    Attributes:
        name: of its section. instructions: of the kernel itself, in order. loops: outer before
            inner. subroutines: instructions of what it calls, slow paths of divisions and roots,
            which no count takes in.
    """

    name: str
    instructions: list[Instruction]
    loops: list[Loop]
    blocks: list[range]
    subroutines: int = 0

    def static(self, pattern: str) -> int:
        """Return how many instructions have an opcode that begins with the pattern, unweighted."""
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)

    def weights(self, trips: Trips) -> list[float]:
        """Return how often a warp executes each instruction.

        Raises:
            ValueError: a loop has no trips, or trips are for no loop and no branch of the code.
        """
        out = [1.0] * len(self.instructions)
        used: set[str | tuple[int, ...]] = set()
        for loop in self.loops:
            if joined := _joined(loop, trips):
                outer = joined.partition(" + ")[0]
                used |= {joined, outer}
                for i in loop.inside:
                    out[i] *= trips[outer] * (trips[joined] if i in loop.always else 1)
                continue
            key = loop.path if loop.path in trips else loop.statement
            if key is None or key not in trips:
                raise ValueError(
                    f"{self.name}: no trips for the loop {loop.path}, {loop.statement!r}"
                )
            used.add(key)
            times = trips[key] if key == loop.path else self._unrolled(loop, trips[key])
            for i in loop.inside:
                out[i] *= times
        branches = [key for key in trips if isinstance(key, str) and ": if " in key]
        for block in self.blocks:
            around = Counter(
                key
                for i in block
                for key in branches
                if key in branches_of(self.instructions[i].source)
            )
            sourced = sum(self.instructions[i].source is not None for i in block)
            for key, votes in around.items():
                if 2 * votes > sourced:
                    used.add(key)
                    for i in block:
                        out[i] *= trips[key]
        if unused := [key for key in trips if key not in used]:
            raise ValueError(
                f"{self.name}: trips for {unused}: the code has no such loop or branch"
            )
        return out

    def _unrolled(self, loop: Loop, trips: float) -> float:
        """Share the trips of a loop of the source that the compiler split in two.

        The longer one does several iterations at once, the other the rest. Single iterations that
        it sets beside a short loop count as executed: a few too many.
        """
        same = [
            other
            for other in self.loops
            if other.source == loop.source and other.path[:-1] == loop.path[:-1]
        ]
        sizes = {other.path: self._work(other) for other in same}
        ratio = max(sizes.values()) / min(sizes.values())
        if len(same) != 2 or ratio < 1.8:
            return trips
        at_once = max((2, 4, 8, 16), key=lambda n: -abs(n - ratio))
        longer = sizes[loop.path] == max(sizes.values())
        return trips // at_once if longer else trips % at_once

    def _work(self, loop: Loop) -> int:
        """Count what an iteration does, without its addresses and conditions."""
        body = [self.instructions[i] for i in loop.inside]
        rest = ("alu", "imad", "move", "uniform", "control")
        return sum(i.kind not in rest for i in body) or len(body)

    def count(self, trips: Trips | None = None) -> Counts:
        """Return what one warp executes; see `weights`."""
        out = Counts()
        for instruction, times in zip(self.instructions, self.weights(trips or {}), strict=True):
            if instruction.text.startswith("@!PT"):
                continue  # never executed
            out.kinds[instruction.kind] += times
            out.opcodes[instruction.opcode] += times
            if instruction.bytes:
                out.bytes[instruction.kind] += times * instruction.bytes
            out.multiplications += times * instruction.multiplications
            out.operand_bytes += times * instruction.operand_bytes
        return out


def _joined(loop: Loop, trips: Trips) -> str | None:
    """Return the key of two loops of the source that this one was made of."""
    names = (key for key in trips if isinstance(key, str) and " + " in key)
    return next((key for key in names if loop.statement in key.split(" + ")), None)


@dataclass(frozen=True)
class Resources:
    """What a kernel needs: registers of a thread; bytes of stack, spilled and shared memory."""

    registers: int
    stack: int
    local: int
    shared: int


REGISTERS = 65_536  # of a multiprocessor, all architectures served
SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90a": 228, "sm_100a": 228}  # KiB
WARPS = {"sm_80": 64, "sm_86": 48, "sm_89": 48, "sm_90a": 64, "sm_100a": 64}


def occupancy(registers: int, shared: int, warps: int, arch: str) -> int:
    """Return how many blocks of a kernel a multiprocessor holds at a time.

    shared: bytes of a block; the system takes 1 KiB more. Registers are given out to warps in
    pieces of 256.
    """
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // of_warp // warps
    return min(by_registers, (SHARED[arch] << 10) // (shared + 1024), WARPS[arch] // warps, 32)


def _parse(listing: str) -> Iterator[Code]:
    """Read the kernels of what nvdisasm prints with lines of source."""
    for section in re.split(r"^//-+ \.text\.", listing, flags=re.M)[1:]:
        name = section.split(None, 1)[0]
        code: list[Instruction] = []
        labels: dict[str, int] = {}
        branches: dict[int, str] = {}
        source, end = None, None
        for line in section.splitlines():
            if found := re.match(r'\s*//## File "(.*)", line (\d+)', line):
                source = found[1], int(found[2])
            elif found := re.match(r"^([.$\w]+):", line):
                labels[found[1]] = len(code)
                if found[1].startswith("$"):  # a subroutine; the kernel itself ends here
                    end = len(code) if end is None else end
            elif found := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                text = re.sub(r"\s+", " ", found[1])
                words = text.split()
                opcode = words[1] if words[0].startswith("@") else words[0]
                # For sm_80 a jump to where warps meet again is a CALL that does not return.
                if target := re.search(r"\b(?:BRA\b.*?|CALL\b.*?(?=\(\.))\(([.$\w]+)\)", text):
                    branches[len(code)] = target[1]
                code.append(Instruction(text, opcode, source))
        end = len(code) if end is None else end
        kernel = code[:end]
        while (
            kernel and kernel[-1].base in ("NOP", "BRA") and _is_padding(kernel, branches, labels)
        ):
            kernel.pop()
        jumps = {i: labels[t] for i, t in branches.items() if i < len(kernel) and t in labels}
        starts = {0, *jumps.values(), *(i + 1 for i, c in enumerate(kernel) if c.base in BREAKS)}
        edges = sorted({*(s for s in starts if s < len(kernel)), len(kernel)})
        blocks = [range(a, b) for a, b in pairwise(edges)]
        block_at = {block.start: number for number, block in enumerate(blocks)}
        after = []
        for number, block in enumerate(blocks):
            last, following = kernel[block[-1]], set()
            if jumps.get(block[-1]) in block_at:
                following.add(block_at[jumps[block[-1]]])
            jumps_away = last.base == "CALL" and block[-1] in jumps and last.text[0] != "@"
            if number + 1 < len(blocks) and not jumps_away and not _ends(last):
                following.add(number + 1)
            after.append(sorted(following))
        yield Code(name, kernel, find_loops(kernel, blocks, after), blocks, len(code) - end)


def _is_padding(
    kernel: Sequence[Instruction], branches: Mapping[int, str], labels: Mapping[str, int]
) -> bool:
    """Whether the last instruction is filling, or the trap behind the exit: a jump to itself."""
    last = len(kernel) - 1
    return kernel[last].base == "NOP" or labels.get(branches.get(last, ""), -1) == last


def _ends(last: Instruction) -> bool:
    """Whether what follows a block in the code does not follow it in time."""
    if last.text.startswith("@") or last.base not in ("BRA", "EXIT", "RET"):
        return False
    # BRA.U and BRA.DIV have their condition among their operands.
    return last.base != "BRA" or last.text.count(",") == 0


BREAKS = ("BRA", "BRX", "EXIT", "CALL", "RET", "BREAK")


@cache
def tool(name: str) -> Path:
    """Return nvdisasm or cuobjdump as Triton brings it."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(command: Sequence[str | Path], where: Path) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=where)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def _with_cubins(binary: bytes | Path, read: Callable[[Path], object]) -> list[object]:
    """Call read for each cubin: the bytes of one, or those in an object file or library."""
    with tempfile.TemporaryDirectory(prefix="xmlkernels-sass-") as name:
        folder = Path(name)
        if isinstance(binary, bytes):
            cubins = [folder / "kernel.cubin"]
            cubins[0].write_bytes(binary)
        elif binary.suffix == ".cubin":
            cubins = [binary.resolve()]
        else:
            _run([tool("cuobjdump"), "-xelf", "all", binary.resolve()], folder)
            cubins = sorted(folder.glob("*.cubin"))
        return [read(cubin) for cubin in cubins]


def disassemble(binary: bytes | Path) -> dict[str, Code]:
    """Return the machine code of each kernel, by the name of its symbol.

    binary: the bytes of a cubin, or the path of a cubin, object file or shared library.
    """
    found: dict[str, Code] = {}

    def read(cubin: Path) -> None:
        listing = _run([tool("nvdisasm"), "-c", "-g", cubin], cubin.parent)
        found.update({code.name: code for code in _parse(listing)})

    _with_cubins(binary, read)
    return found


def resources(binary: bytes | Path) -> dict[str, Resources]:
    """Return what each kernel needs, by the name of its symbol; shared memory is the static."""
    found: dict[str, Resources] = {}

    def read(cubin: Path) -> None:
        kernel = ""
        report = _run([tool("cuobjdump"), "--dump-resource-usage", cubin], cubin.parent)
        for line in report.splitlines():
            if named := re.match(r"\s*Function (\S+):", line):
                kernel = named[1]
            elif "REG:" in line:
                n = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
                found[kernel] = Resources(n["REG"], n["STACK"], n["LOCAL"], n["SHARED"])

    _with_cubins(binary, read)
    return found
