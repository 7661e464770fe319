"""Faults drawn at random from the syntax trees of the source, and the tests that each file has."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from pathlib import Path

from mutants_by_hand import FIELDS, Fault

_STEP = "tests/test_cascade_step.py tests/test_cascade_predict.py tests/test_cascade_state.py tests/test_cascade_heads.py"
_CASCADE = f"{_STEP} tests/test_cascade_placement.py tests/test_cascade_settings.py"
_RUNS = "-k 'not killed' tests/test_train.py tests/test_train_settings.py tests/test_train_bow.py tests/test_train_cascade.py"
_LOADER = "tests/data/test_loader.py tests/data/test_loader_bags.py"

# file: the stages of its tests, narrow to wide; each a line of pytest arguments.
TESTS: dict[str, tuple[str, ...]] = {
    "xmlkernels/optim.py": ("tests/test_optim.py", f"tests/test_end_to_end.py {_STEP}"),
    "xmlkernels/metrics.py": ("tests/test_metrics.py", FIELDS),
    "xmlkernels/evaluation.py": ("tests/test_model.py tests/test_predict.py", f"{FIELDS} -k 'label_text or top_k'", _RUNS),
    "xmlkernels/models/end_to_end.py": ("tests/test_end_to_end.py tests/test_running_mean.py", FIELDS),
    "xmlkernels/models/cascade.py": (_CASCADE, "tests/test_running_mean.py", FIELDS, _RUNS),
    "xmlkernels/models/cascade_scores.py": (_CASCADE, FIELDS),
    "xmlkernels/models/cascade_training.py": (_CASCADE, FIELDS),
    "xmlkernels/models/cascade_state.py": (_CASCADE, "tests/test_running_mean.py", _RUNS),
    "xmlkernels/models/gradient_caching.py": ("tests/test_end_to_end.py tests/test_cascade_step.py", "tests/test_processes.py"),
    "xmlkernels/models/running_mean.py": ("tests/test_running_mean.py", f"{FIELDS} -k ema"),
    "xmlkernels/models/common.py": (f"tests/test_end_to_end.py {_STEP}", "tests/test_old_formats.py", _RUNS),
    "xmlkernels/nn/bow.py": ("tests/test_bow_encoder.py", f"{FIELDS} -k 'bow or word'"),
    "xmlkernels/nn/cascade_heads.py": (_CASCADE, FIELDS),
    "xmlkernels/nn/cascade_level.py": (_CASCADE, FIELDS),
    "xmlkernels/nn/dense_level.py": ("tests/test_dense_level.py", _STEP),
    "xmlkernels/nn/dropout.py": ("tests/test_encoder.py tests/test_bow_encoder.py", f"{FIELDS} -k drop"),
    "xmlkernels/nn/encoder.py": ("tests/test_encoder.py", FIELDS),
    "xmlkernels/nn/full_head.py": ("tests/test_full_head.py tests/test_end_to_end.py", FIELDS),
    "xmlkernels/nn/layer_recipe.py": ("tests/test_layer_recipe.py", _STEP),
    "xmlkernels/nn/shortlist.py": ("tests/test_shortlist.py", _STEP),
    "xmlkernels/nn/table.py": ("tests/test_cascade_heads.py tests/test_full_head.py", FIELDS),
    "xmlkernels/data/batches.py": (_LOADER, FIELDS),
    "xmlkernels/data/loader.py": (_LOADER, "tests/test_predict.py tests/test_serving.py"),
    "xmlkernels/data/bow.py": ("tests/data/test_bow.py", f"{FIELDS} -k 'bow or ngrams or df'"),
    "xmlkernels/data/knn.py": ("tests/data/test_knn.py",),
    "xmlkernels/data/inputs.py": ("tests/data/test_inputs.py", f"{_LOADER} tests/test_predict.py", FIELDS),
    "xmlkernels/data/sparse_python.py": ("tests/data/test_sparse_text.py", "tests/data/test_formats.py"),
    "xmlkernels/data/formats.py": ("tests/data/test_formats.py", "tests/data/test_prepare.py"),
    "train/build.py": (FIELDS, "tests/test_train_settings.py tests/test_cascade_settings.py", _RUNS),
    "train/config.py": ("tests/test_cascade_settings.py tests/test_cascade_placement.py", FIELDS, _RUNS),
    "train/checks.py": (
        "tests/test_cascade_settings.py tests/test_train_settings.py", "tests/test_train_bow.py -k refused",
        "tests/test_running_mean.py tests/test_train_processes.py",
    ),
    "train/session.py": (FIELDS, _RUNS),
    "train/run.py": (FIELDS, _RUNS),
    "train/sources.py": (FIELDS, _RUNS),
}  # fmt: skip

_COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_COUNTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    other = copy.deepcopy(node)
    if isinstance(other, ast.Compare) and len(other.ops) == 1:
        other.ops = [_COMPARED[type(other.ops[0])]()]
        yield other
    elif isinstance(other, ast.BinOp) and type(other.op) in _COUNTED and not _holds_text(other):
        other.op = _COUNTED[type(other.op)]()
        yield other
    elif isinstance(other, ast.BoolOp):
        other.op = ast.Or() if isinstance(other.op, ast.And) else ast.And()
        yield other
    elif isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not | ast.USub):
        yield other.operand
    elif isinstance(other, ast.IfExp):
        other.body, other.orelse = other.orelse, other.body
        yield other
    elif isinstance(other, ast.Constant) and type(other.value) in (int, float, bool):
        other.value = not other.value if isinstance(other.value, bool) else other.value + 1
        yield other
    elif isinstance(other, ast.Expr | ast.AugAssign) and not _is_text(other):
        yield ast.Pass()


def _holds_text(node: ast.AST) -> bool:
    return any(isinstance(n, ast.JoinedStr | ast.Constant) and isinstance(getattr(n, "value", ""), str) for n in ast.walk(node))


def _is_text(node: ast.AST) -> bool:
    """A docstring, or a line that only speaks."""
    value = getattr(node, "value", None)
    called = getattr(value, "func", None)
    return isinstance(value, ast.Constant) or (isinstance(called, ast.Name) and called.id in ("say", "print"))


def _left_alone(tree: ast.AST) -> set[int]:
    """Nodes inside of annotations, messages of errors and warnings, decorators, and what only checks our own code."""
    out: set[int] = set()
    for node in ast.walk(tree):
        inner: list[ast.AST] = []
        called = node.func if isinstance(node, ast.Call) else None
        speaks = isinstance(called, ast.Name) and called.id in ("say", "InputError")
        if speaks or isinstance(node, ast.Raise | ast.Assert):
            inner.append(node)
        elif isinstance(node, ast.AnnAssign):
            inner.append(node.annotation)
        elif isinstance(node, ast.keyword) and node.arg in ("strict", "stacklevel"):
            inner.append(node.value)
        elif isinstance(node, ast.FunctionDef):
            arguments = node.args
            inner += [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.annotation]
            inner += [*node.decorator_list, *([node.returns] if node.returns else [])]
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            inner.append(node)
        out |= {id(n) for part in inner for n in ast.walk(part)}
    return out


def drawn(root: Path, count: int, seed: int) -> list[Fault]:
    """Faults at random: each file of TESTS in proportion to its code, never two on one line."""
    found: list[tuple[str, int, Fault]] = []
    for path in TESTS:
        text = (root / path).read_text()
        tree = ast.parse(text)
        alone, lines = _left_alone(tree), text.splitlines(True)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line.encode()))
        raw = text.encode()
        for node in ast.walk(tree):
            if id(node) in alone or not hasattr(node, "end_col_offset"):
                continue
            begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            for changed in _changes(node):
                old = raw[starts[node.lineno - 1] : starts[node.end_lineno]].decode()
                inner = ast.unparse(changed)
                inside = f"({inner})" if isinstance(changed, ast.expr) and not isinstance(changed, ast.Constant) else inner
                head, tail = raw[starts[node.lineno - 1] : begin].decode(), raw[end : starts[node.end_lineno]].decode()
                if text.count(old) == 1:
                    found.append((path, node.lineno, Fault(path, old, head + inside + tail)))
    random.Random(seed).shuffle(found)
    out, seen = [], set()
    for path, line, fault in found:
        if (path, line) not in seen and len(out) < count:
            seen.add((path, line))
            out.append(fault)
    return out
