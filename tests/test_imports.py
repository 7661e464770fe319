"""The arrows of the house: who may import whom. Rooms that do not exist yet may stay away."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"torch", "numpy", "scipy", "numba", "sklearn", "safetensors"}

# room: rooms of ours it may import (itself always).
ARROWS = {
    "__init__": {"errors"},
    "errors": set(),
    "records": {"errors"},
    "foreign": {"records", "errors"},
    "checksums": {"records", "errors"},
    "reference": set(),
    "triton": set(),
    "native": {"ops"},
    "ops": {"reference", "triton", "native", "errors"},
    "data": {"checksums", "foreign", "records", "errors", "_host"},
    "parallel": {"errors"},
    "threads": {"errors"},
    "tree": {"checksums", "data", "parallel", "records", "errors"},
    "metrics": {"errors"},
    "dist": {"errors"},
    "checkpoint": {"dist", "checksums", "records", "errors"},
    "nn": {"ops", "dist", "foreign", "records", "threads", "errors"},
    "optim": {"ops", "dist", "errors"},
    "models": {"nn", "optim", "tree", "data", "dist", "records", "errors"},
    "ranker": {"checksums", "data", "metrics", "parallel", "records", "errors"},
    "predict": {"models", "checkpoint", "checksums", "data", "metrics", "ranker", "records", "threads", "errors"},
    "planner": {"models", "checkpoint", "data", "metrics", "records", "errors"},
    "benchmarks": {"ops", "reference", "errors"},
}
# room: packages it may import beside the standard library. `train` and `benchmarks` choose their own.
PACKAGES = {
    "__init__": set(),
    "errors": set(),
    "records": {"msgspec"},
    "foreign": set(),
    "checksums": {"numpy", "xxhash"},
    "reference": {"torch"},
    "triton": {"torch", "triton"},
    "native": {"torch"},
    "ops": {"torch"},
    "data": BASE | {"tokenizers"},
    "nn": BASE,
    "optim": {"torch"},
    "threads": {"torch"},
}
# Files that share the room of another: too long for one file.
PART_OF = {
    "memory": "planner", "_contents": "checkpoint", "_places": "checkpoint", "_state": "checkpoint", "ranking": "metrics",
    "levels": "predict", "evaluation": "predict", "ranked": "predict", "heartbeat": "dist",
}  # fmt: skip
# Arrows that point down but are not in the table, each with its reason.
BESIDE_THE_TABLE = {
    ("benchmarks/cases_cascade.py", "nn"): "times the step of several levels, whose shortlists are made there",
    ("benchmarks/label_tree.py", "tree"): "times the making of a tree",
    **{
        ("benchmarks/latency.py", to): "times a query from text to labels" for to in ("data", "models", "nn", "predict", "tree")
    },
    **{("benchmarks/busy.py", to): "times whole steps beside a busy process" for to in ("data", "models", "nn")},
    ("benchmarks/parse_sparse.py", "data"): "times the reader of sparse text, which is no op",
    ("xmlkernels/models/end_to_end.py", "checkpoint"): "optimizer states by name, as checkpoints keep them",
    ("xmlkernels/models/cascade_state.py", "checkpoint"): "as above",
    ("xmlkernels/evaluation.py", "dist"): "several processes evaluate documents of their own; the results are those of all",
    ("xmlkernels/levels.py", "dist"): "as above",
}
# Who alone may import a package.
ALONE = {
    "transformers": {"xmlkernels/nn/encoder.py", "xmlkernels/data/tokens.py"},
    "tokenizers": {"xmlkernels/data/tokens.py"},
    "torch.distributed": {"xmlkernels/dist.py"},
    "msgspec": {"xmlkernels/records.py"},
    "xxhash": {"xmlkernels/checksums.py"},
}


def sources() -> list[Path]:
    found = [p for top in ("xmlkernels", "train", "benchmarks") for p in sorted((ROOT / top).rglob("*.py"))]
    return [p for p in found if "__pycache__" not in p.parts]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "xmlkernels" else PART_OF.get(parts[1], parts[1])


def is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)


def imported(path: Path) -> Iterator[str]:
    """Full dotted names that the file imports anywhere; `from a import b` gives a.b. A script's own tail is left out."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    stack: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while stack:
        node = stack.pop()
        if is_main_guard(node):
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def our_rooms(path: Path) -> set[str]:
    """Rooms of ours that the file imports; `train`, `benchmarks` and `tests` count as rooms."""
    siblings = {p.stem for p in path.parent.glob("*.py")} if room_of(path) == "train" else set()
    rooms = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "xmlkernels" and len(parts) > 1:
            known = (ROOT / "xmlkernels" / parts[1]).is_dir() or (ROOT / "xmlkernels" / f"{parts[1]}.py").exists()
            # `from xmlkernels import InputError`: a name of the package itself
            rooms.add(PART_OF.get(parts[1], parts[1]) if known or parts[1] in ARROWS or parts[1] == "_host" else "__init__")
        elif parts[0] in ("train", "benchmarks", "tests") or parts[0] in siblings:
            rooms.add("train" if parts[0] in siblings else parts[0])
    return rooms


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_arrows(path: Path) -> None:
    room, rooms = room_of(path), our_rooms(path)
    assert room == "train" or room in ARROWS, f"{room} has no line in the table of rooms"
    if room == "train":
        assert not rooms & {"reference", "triton", "native", "_host", "benchmarks", "tests"}
        inner = [n.split(".") for n in imported(path) if n.startswith("xmlkernels.")]
        private = [n for n in inner if any(p[0] == "_" and p != "__version__" for p in n)]
        assert private == [], "train uses public names alone"
        return
    extra = {to for file, to in BESIDE_THE_TABLE if file == name_of(path)}
    may = ARROWS[room] | extra | {room, "__init__"}
    assert rooms <= may, f"{name_of(path)} imports {sorted(rooms - may)}"


def test_the_never_list() -> None:
    """Said apart, so that a slip in the table above cannot let one through."""
    for path in sources():
        room, rooms = room_of(path), our_rooms(path)
        never = {"train", "benchmarks", "tests"} - ({room} if room in ("train", "benchmarks") else set())
        if room == "reference":
            never |= {"triton", "native", "ops", "_host"}
        if room in ("models", "train"):
            never |= {"reference", "triton"}
        if room == "ops":
            never |= {"nn", "data", "dist"}
        if room in ("metrics", "checkpoint"):
            never |= {"models"}
        assert not rooms & never, f"{name_of(path)} imports {sorted(rooms & never)}"


def test_exceptions_are_still_needed() -> None:
    for file, to in BESIDE_THE_TABLE:
        assert not (ROOT / file).exists() or to in our_rooms(ROOT / file), f"{file} -> {to} can go"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_packages(path: Path) -> None:
    room, names = room_of(path), list(imported(path))
    for package, who in ALONE.items():
        users = [n for n in names if n == package or n.startswith(package + ".")]
        assert not users or name_of(path) in who, f"{users}: {package} belongs to {sorted(who)}"
        if package == "transformers" and name_of(path) == "xmlkernels/data/tokens.py":
            assert all("Tokenizer" in n for n in users), "tokens.py loads tokenizers, not models"
    if room in ("train", "benchmarks"):
        return
    tops = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"xmlkernels", "train", "benchmarks", "tests"}
    alone = {p for p, who in ALONE.items() if name_of(path) in who}
    assert tops <= PACKAGES.get(room, BASE) | alone, f"{name_of(path)} imports {sorted(tops)}"


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def test_torch_distributed_is_named_in_dist_alone() -> None:
    users = [name_of(p) for p in sources() if any(dotted(n) == "torch.distributed" for n in ast.walk(ast.parse(p.read_text())))]
    assert set(users) <= ALONE["torch.distributed"]
