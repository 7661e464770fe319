"""Reads the machine code (SASS) of a GPU kernel: what a warp executes, and what a block needs.

No card is needed: Triton brings nvdisasm and cuobjdump. Every instruction stands with the line of
source that it comes from, so a loop of the machine code is known by the loop of the source that it
came from ("score_tiles: for d"), whatever the compiler calls its labels. Counts are exact for the
path that the given trips describe; cycles made of them are a model, and no measurement.
"""

import ast
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

Trips = Mapping[str | tuple[int, ...], float]
"""How often a loop runs, or the share of the times that a branch is taken.

A key is "function: for i", "function: while a < b" or "function: if hit" of the source; or, where
the source is not Python, the place of the loop: (0,) is the first, (1, 0) the first in the second.
A short branch becomes predicates, whose instructions count as executed: no share is taken of it.
"""

CLASSES = {
    "mma": "HGMMA QGMMA HMMA QMMA IMMA IGMMA DMMA UTCHMMA UTCQMMA UTCIMMA",
    "fma": "FFMA FMUL FADD FFMA2 FADD2 FMUL2 HADD2 HFMA2 HMUL2 FSWZADD",
    "imad": "IMAD IDP IDP4A UIMAD",
    "alu": "IADD3 IADD LOP3 LOP SHF SHL SHR ISETP FSETP HSETP2 SEL FSEL FMNMX FMNMX3 IMNMX PRMT LEA"
    " IABS PLOP3 VIMNMX VIMNMX3 BMSK SGXT VIADD VIADDMNMX P2R R2P FCHK F2FP I2FP HMNMX2 VABSDIFF"
    " ISCADD CSEL IMNMX3 VHMNMX",
    "fp64": "DADD DFMA DMUL DSETP",
    "move": "MOV MOV32I",
    "convert": "F2F F2I I2F F2IP I2IP FRND POPC FLO BREV",
    "mufu": "MUFU",
    "ldg": "LDG LD",
    "stg": "STG ST",
    "ldgsts": "LDGSTS",
    "lds": "LDS LDSM",
    "sts": "STS STSM",
    "tma": "UTMALDG UTMASTG UTMAREDG UTMAPF UBLKCP UBLKRED UBLKPF",
    "atomic": "ATOM ATOMG ATOMS RED REDG REDUX CREDUX UCGABAR_ARV UCGABAR_WAIT",
    "shuffle": "SHFL MOVM",
    "barrier": "BAR SYNCS WARPSYNC WARPGROUP",
    "fence": "MEMBAR FENCE ERRBAR CCTL",
    "local": "LDL STL",
}
CLASSES["control"] = (
    "BRA BRX JMP EXIT BSSY BSYNC NOP DEPBAR LDGDEPBAR UTMACMDFLUSH UTMACCTL S2R CS2R S2UR LDC LDCU"
    " CALL RET BREAK YIELD NANOSLEEP B2R R2B ELECT VOTE MATCH BMOV BPT KILL PREEXIT ACQBULK RPCMOV"
    " WARPEXIT LEPC"
)
KINDS = {opcode: kind for kind, opcodes in CLASSES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    """One instruction: opcode "LDG.E.128", and (file, line) of its source where that is known."""

    text: str
    opcode: str
    source: tuple[str, int] | None

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """Its class: a key of CLASSES, "uniform" or "control".

        Raises:
            ValueError: no class has the opcode.
        """
        base = self.base
        if base in KINDS:
            kind = KINDS[base]
            # Moves and additions that the compiler gives to the multiplier are not multiplications.
            if base == "IMAD" and re.search(r"\.(MOV|SHL|IADD)", self.opcode):
                return "fma"
            return kind
        if base.startswith("U") or base in ("R2UR", "VOTEU"):
            return "uniform"
        raise ValueError(f"no class for the instruction {self.text!r}")

    @property
    def bits(self) -> int:
        """How wide an access of one thread is."""
        found = re.search(r"\.[US]?(128|64|16|8)\b", self.opcode)
        return int(found[1]) if found else 32

    @property
    def bytes(self) -> int:
        """Bytes that a warp moves with it; 0 for what moves none."""
        if self.base in ("LDSM", "STSM"):
            return 128 * int((re.search(r"\.([24])\b", self.opcode) or [0, 1])[1])
        return 4 * self.bits if self.kind in ("ldg", "stg", "ldgsts", "lds", "sts", "local") else 0

    @property
    def multiplications(self) -> float:
        """Multiply-adds on the tensor cores for one warp."""
        if found := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", self.opcode):
            m, n, k = map(int, found.groups())
            return m * n * k / 4  # four warps issue it together
        if found := re.match(r"[HIQ]MMA\.(\d+)", self.opcode):
            shapes = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}
            return shapes[found[1]]
        return 0

    @property
    def operand_bytes(self) -> float:
        """Bytes of shared memory that a warp's part of a wgmma reads."""
        found = re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", self.opcode)
        if not found:
            return 0
        m, n, k = map(int, found.groups())
        size = 1 if self.opcode.startswith("Q") else 2
        operands = [part.strip() for part in self.text.partition("GMMA")[2].split(",")]
        in_registers = len(operands) > 2 and operands[1].startswith("R")
        return (n * k + (0 if in_registers else m * k)) * size / 4


@dataclass(frozen=True)
class Loop:
    """Some blocks of the code, as indices of instructions.

    path: its place among the loops of the code. source: file, statement and line of the loop of the
    source that it came from.
    """

    inside: frozenset[int]
    path: tuple[int, ...]
    source: tuple[str, str, int] | None

    @property
    def statement(self) -> str | None:
        """The loop of the source, "function: for i"."""
        return None if self.source is None else self.source[1]


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
                if key in _branches(self.instructions[i].source)
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


@cache
def _statements(path: str) -> list[tuple[str, str, range]]:
    """Loops and branches of a source file: function, header, lines."""
    file, found = Path(path), []
    if file.suffix != ".py" or not file.is_file():
        return []
    for function in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter):
                header, last = f"for {ast.unparse(node.target)}", node.end_lineno
            elif isinstance(node, ast.While):
                header, last = f"while {ast.unparse(node.test)}", node.end_lineno
            elif isinstance(node, ast.If):
                header, last = f"if {ast.unparse(node.test)}", node.body[-1].end_lineno
            else:
                continue
            first = node.body[0].lineno if isinstance(node, ast.If) else node.lineno
            found.append((function.name, header, range(first, (last or first) + 1)))
    return found


@cache
def _loop_of(source: tuple[str, int] | None) -> tuple[str, str, int] | None:
    """Return the innermost loop of the source around a line: file, statement, line."""
    if source is None:
        return None
    around = [
        (len(lines), (source[0], f"{function}: {header}", lines.start))
        for function, header, lines in _statements(source[0])
        if source[1] in lines and not header.startswith("if ")
    ]
    return min(around)[1] if around else None


@cache
def _branches(source: tuple[str, int] | None) -> frozenset[str]:
    """Return all branches of the source around a line."""
    if source is None:
        return frozenset()
    return frozenset(
        f"{function}: {header}"
        for function, header, lines in _statements(source[0])
        if source[1] in lines and header.startswith("if ")
    )


def _dominators(after: Sequence[Sequence[int]]) -> list[set[int]]:
    """For each block, those through which every way to it leads; none where no way does."""
    before: list[list[int]] = [[] for _ in after]
    for block, following in enumerate(after):
        for other in following:
            before[other].append(block)
    reached, work = {0}, [0]
    while work:
        new = set(after[work.pop()]) - reached
        reached |= new
        work += new
    out = [set(reached) if block in reached else set() for block in range(len(after))]
    out[0], changed = {0}, True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            ways = [out[other] for other in before[block] if other in reached]
            now = {block} | set.intersection(*ways)
            changed |= now != out[block]
            out[block] = now
    return out


def _find_loops(
    code: Sequence[Instruction], blocks: Sequence[range], after: Sequence[Sequence[int]]
) -> list[Loop]:
    """Find natural loops, but for those that only wait for a barrier.

    Jumps back from a block that was set apart are none.
    """
    above = _dominators(after)
    bodies: dict[int, set[int]] = {}
    for tail, following in enumerate(after):
        for head in following:
            if head not in above[tail]:
                continue
            body, work = {head, tail}, [tail] if tail != head else []
            while work:
                now = work.pop()
                new = {b for b, f in enumerate(after) if now in f and above[b]} - body
                body |= new
                work += new
            if not _waits([code[i] for b in body for i in blocks[b]]):
                bodies[head] = bodies.get(head, set()) | body
    ranges = {
        head: frozenset(i for b in body for i in blocks[b]) for head, body in sorted(bodies.items())
    }
    sources: dict[int, tuple[str, str, int] | None] = {}
    # Innermost first: a loop of the source belongs to the innermost loop that has its lines.
    for head, inside in sorted(ranges.items(), key=lambda item: len(item[1])):
        within = [h for h in sources if ranges[h] < inside]
        taken = {sources[h] for h in within}
        own = inside.difference(*(ranges[h] for h in within))
        votes = Counter(_loop_of(code[i].source) for i in sorted(own))
        names = [name for name, _ in votes.most_common() if name is not None and name not in taken]
        sources[head] = names[0] if names else None
    out: list[Loop] = []
    children: Counter[tuple[int, ...]] = Counter()
    for head, inside in sorted(ranges.items(), key=lambda item: (-len(item[1]), item[0])):
        around = [loop.path for loop in out if inside < loop.inside]
        parent = max(around, key=len, default=())
        out.append(Loop(inside, (*parent, head), sources[head]))
    # Places count in the order of the code.
    places: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
    for loop in sorted(out, key=lambda loop: (len(loop.path), loop.path)):
        parent = places[loop.path[:-1]]
        places[loop.path] = (*parent, children[parent])
        children[parent] += 1
    placed = [Loop(loop.inside, places[loop.path], loop.source) for loop in out]
    return sorted(placed, key=lambda loop: loop.path)


def _waits(body: Sequence[Instruction]) -> bool:
    """Whether a loop does nothing but look at a barrier again."""
    idle = {"SYNCS", "BRA", "NANOSLEEP", "NOP", "YIELD", "CS2R", "ISETP", "IADD3", "MOV", "UMOV"}
    return all(i.base in idle for i in body) and (
        len(body) == 1 or any(i.base in ("SYNCS", "NANOSLEEP") for i in body)
    )


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
                if target := re.search(r"\bBRA\b.*?\(([.$\w]+)\)", text):
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
            if last.base == "BRA" and jumps.get(block[-1]) in block_at:
                following.add(block_at[jumps[block[-1]]])
            if number + 1 < len(blocks) and not _ends(last):
                following.add(number + 1)
            after.append(sorted(following))
        yield Code(name, kernel, _find_loops(kernel, blocks, after), blocks, len(code) - end)


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
