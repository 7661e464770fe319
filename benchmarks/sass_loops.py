"""Finds the loops of machine code, and the loops and branches of the source that they came from.

Natural loops of the graph of blocks; a loop of the source belongs to the innermost of them that has
its lines.
"""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.sass_instructions import Instruction


@dataclass(frozen=True)
class Loop:
    """Some blocks of the code, as indices of instructions.

    path: its place among the loops of the code. source: file, statement and line of the loop of the
    source that it came from. always: those of its instructions that every trip executes.
    """

    inside: frozenset[int]
    path: tuple[int, ...]
    source: tuple[str, str, int] | None
    always: frozenset[int]

    @property
    def statement(self) -> str | None:
        """The loop of the source, "function: for i"."""
        return None if self.source is None else self.source[1]


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
def branches_of(source: tuple[str, int] | None) -> frozenset[str]:
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


def find_loops(
    code: Sequence[Instruction], blocks: Sequence[range], after: Sequence[Sequence[int]]
) -> list[Loop]:
    """Find natural loops, but for those that only wait for a barrier.

    Jumps back from a block that was set apart are none.
    """
    above = _dominators(after)
    bodies: dict[int, set[int]] = {}
    always: dict[int, set[int]] = {}
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
                always[head] = always.get(head, above[tail]) & above[tail]
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
        every = {i for b in always[head] & bodies[head] for i in blocks[b]}
        out.append(Loop(inside, (*parent, head), sources[head], frozenset(every)))
    # Places count in the order of the code.
    places: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
    for loop in sorted(out, key=lambda loop: (len(loop.path), loop.path)):
        parent = places[loop.path[:-1]]
        places[loop.path] = (*parent, children[parent])
        children[parent] += 1
    placed = [replace(loop, path=places[loop.path]) for loop in out]
    return sorted(placed, key=lambda loop: loop.path)


def _waits(body: Sequence[Instruction]) -> bool:
    """Whether a loop does nothing but look at a barrier again."""
    idle = {"SYNCS", "BRA", "NANOSLEEP", "NOP", "YIELD", "CS2R", "ISETP", "IADD3", "MOV", "UMOV"}
    moves = re.compile(r"IMAD\.(MOV|U32)\b.*RZ, RZ")
    return all(i.base in idle or moves.search(i.text) for i in body) and (
        len(body) == 1 or any(i.base in ("SYNCS", "NANOSLEEP") for i in body)
    )
