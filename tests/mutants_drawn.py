"""Faults drawn at random from the syntax trees of the source, and the tests of each file."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path

from mutants_by_hand import FIELDS, Fault

_STEP = (
    "tests/models/test_cascade_step.py tests/models/test_cascade_predict.py "
    "tests/models/test_cascade_state.py tests/nn/test_cascade_heads.py"
)
_CASCADE = f"{_STEP} tests/nn/test_cascade_placement.py tests/training/test_cascade_settings.py"
_SETTINGS = "tests/training/test_cascade_settings.py tests/training/test_train_settings.py"
_LOADER = (
    "tests/data/test_loader.py tests/data/test_loader_edges.py tests/data/test_prefetch.py "
    "tests/data/test_loader_bags.py"
)
_END = "tests/models/test_end_to_end.py tests/models/test_running_mean.py"


def _runs(fields: str) -> str:
    """Tiny runs that test these fields."""
    return f"{FIELDS} -k {' or '.join(fields.split())!r}"


_PREDICT = "tests/predict/test_predict.py tests/predict/test_serving.py"
_RUN = _runs("label_text save_every log_every best_by evaluate scheme resume overwrite threads")
_TRAIN = "tests/training/test_train.py -k 'not killed and not rich'"
_TABLES = _runs("rw_loss reference positives head_lr embed_drops table momentum scheme")

# The stages of a file's tests, narrow to wide; each is a line of pytest arguments.
TESTS: dict[str, tuple[str, ...]] = {
    "xmlkernels/optim.py": ("tests/test_optim.py", f"tests/models/test_end_to_end.py {_STEP}"),
    "xmlkernels/metrics/ranking.py": ("tests/test_metrics.py", _runs("label_text best_by")),
    "xmlkernels/evaluation.py": (
        "tests/predict/test_predict.py",
        _runs("evaluate_batch label_text top_k"),
        "tests/models/test_model.py",
    ),
    "xmlkernels/models/end_to_end.py": (_END, _runs("encoder_lr table_lr clip ema micro warmup")),
    "xmlkernels/models/cascade.py": (_CASCADE, "tests/models/test_running_mean.py", _TABLES),
    "xmlkernels/models/level_steps.py": (_CASCADE, "tests/test_shared_cascades.py"),
    "xmlkernels/models/descent.py": (_CASCADE, _TABLES),
    "xmlkernels/models/training.py": (
        _CASCADE,
        _runs("head_lr schedule cooldown encoder_decay rw_loss epsilon clip"),
    ),
    "xmlkernels/models/saved.py": (
        _CASCADE,
        "tests/models/test_running_mean.py",
        "tests/training/test_cascade_refusals.py tests/test_old_formats.py",
    ),
    "xmlkernels/models/scored.py": (_CASCADE, _PREDICT),
    "xmlkernels/models/restore.py": (
        "tests/models/test_cascade_predict.py tests/test_old_formats.py",
        _PREDICT,
        "tests/test_checkpoint_damage.py",
    ),
    "xmlkernels/models/gradient_caching.py": (
        "tests/models/test_end_to_end.py",
        "tests/models/test_cascade_step.py",
        "tests/test_processes.py",
    ),
    "xmlkernels/models/running_mean.py": ("tests/models/test_running_mean.py", _runs("ema")),
    "xmlkernels/models/state.py": (
        f"tests/models/test_end_to_end.py tests/models/test_running_mean.py {_STEP}",
        "tests/test_old_formats.py tests/test_processes.py",
    ),
    "xmlkernels/models/base.py": (
        f"tests/models/test_end_to_end.py tests/models/test_running_mean.py {_STEP}",
        "tests/test_old_formats.py",
    ),
    "xmlkernels/nn/bow.py": ("tests/nn/test_bow_encoder.py", _runs("bow word dropout")),
    "xmlkernels/nn/cascade_heads.py": (_CASCADE, _TABLES),
    "xmlkernels/nn/cascade_level.py": ("tests/nn/test_dense_level.py", _CASCADE, _TABLES),
    "xmlkernels/nn/dropout.py": (
        "tests/nn/test_encoder.py tests/nn/test_bow_encoder.py",
        _runs("dropout drops"),
    ),
    "xmlkernels/nn/encoder.py": (
        "tests/nn/test_encoder.py",
        _runs("pooling dropout precision compile layers"),
    ),
    "xmlkernels/nn/full_head.py": (
        "tests/nn/test_full_head.py tests/models/test_end_to_end.py",
        _runs("table bias centroid skip kahan"),
    ),
    "xmlkernels/nn/hf.py": (
        "tests/nn/test_encoder.py tests/nn/test_class_token.py",
        "tests/test_foreign.py",
    ),
    "xmlkernels/nn/layer_recipe.py": ("tests/nn/test_layer_recipe.py", _STEP),
    "xmlkernels/reference/shortlist_select.py": ("tests/ops/test_shortlist_select.py", _STEP),
    "xmlkernels/nn/shortlist.py": ("tests/nn/test_shortlist.py", _STEP),
    "xmlkernels/nn/table.py": (
        "tests/nn/test_table.py tests/nn/test_cascade_heads.py tests/nn/test_full_head.py",
        "tests/test_planner.py tests/nn/test_bow_encoder.py",
        _runs("table centroid word_std"),
    ),
    "xmlkernels/data/batches/base.py": (_LOADER, _runs("label_text seed batch")),
    "xmlkernels/data/batches/bags.py": ("tests/data/test_loader_bags.py tests/data/test_bow.py",),
    "xmlkernels/data/batches/tokens.py": (
        _LOADER,
        _PREDICT,
    ),
    "xmlkernels/data/batches/prefetch.py": ("tests/data/test_prefetch.py", _LOADER),
    "xmlkernels/data/vectorizer.py": ("tests/data/test_bow.py", _runs("ngrams min_df features")),
    "xmlkernels/ranker/knn.py": ("tests/ranker/test_knn.py",),
    "xmlkernels/data/inputs.py": (
        "tests/data/test_inputs.py",
        f"{_LOADER} tests/predict/test_predict.py",
        _runs("label_text ngrams"),
    ),
    "xmlkernels/data/formats/sparse_python.py": (
        "tests/data/test_sparse_text.py tests/data/test_sparse_parsers.py",
        "tests/data/test_formats.py",
    ),
    "xmlkernels/data/formats/labels.py": (
        "tests/data/test_label_formats.py",
        "tests/data/test_prepare.py tests/data/test_prepare_refusals.py",
        "tests/data/test_label_ids.py",
    ),
    "xmlkernels/training/build.py": (_SETTINGS, FIELDS),
    "xmlkernels/training/config.py": (f"{_SETTINGS} tests/nn/test_cascade_placement.py", FIELDS),
    "xmlkernels/training/checks.py": (
        _SETTINGS,
        "tests/training/test_train_bow.py -k refused",
        "tests/models/test_running_mean.py",
        "tests/training/test_cascade_refusals.py",
        FIELDS,
    ),
    "xmlkernels/training/plan.py": (
        f"{_SETTINGS} tests/nn/test_class_token.py tests/nn/test_cascade_placement.py",
        "tests/training/test_memory.py tests/models/test_running_mean.py",
        FIELDS,
    ),
    "xmlkernels/training/session.py": (_RUN, _TRAIN, "tests/training/test_train_cascade.py"),
    "xmlkernels/training/run_state.py": (
        _RUN,
        f"{_TRAIN} tests/training/test_progress.py",
        "tests/training/test_damaged_runs.py tests/training/test_cascade_refusals.py",
        "tests/training/test_train_cascade.py",
    ),
    "xmlkernels/training/evaluator.py": (
        _RUN,
        f"{_TRAIN} tests/training/test_progress.py",
        "tests/training/test_train_cascade.py",
    ),
    "xmlkernels/training/loop.py": (_RUN, _TRAIN),
    "xmlkernels/training/inputs.py": (
        _RUN,
        _SETTINGS,
        "tests/training/test_train_bow.py tests/training/test_cascade_refusals.py",
        "tests/training/test_train_cascade.py",
    ),
}

_COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_COUNTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}


# Names of parts of a message.
_MESSAGE = {"expected", "got", "mend", "told", "where", "what", "text", "note"}


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield faulty versions of a node."""
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
    return any(
        isinstance(n, ast.JoinedStr | ast.Constant) and isinstance(getattr(n, "value", ""), str)
        for n in ast.walk(node)
    )


def _is_text(node: ast.AST) -> bool:
    """Whether it is a docstring, or a call that only prints or logs."""
    value = getattr(node, "value", None)
    return isinstance(value, ast.Constant) or (isinstance(value, ast.Call) and _prints(value))


def _prints(call: ast.Call) -> bool:
    called = call.func
    if isinstance(called, ast.Attribute):
        return isinstance(called.value, ast.Name) and called.value.id == "log"
    return isinstance(called, ast.Name) and called.id == "print"


def _left_alone(tree: ast.AST) -> set[int]:
    """Nodes in annotations, decorators, messages, and what only checks our own code."""
    return {
        id(inner)
        for node in ast.walk(tree)
        for part in _untouched(node)
        for inner in ast.walk(part)
    }


def _untouched(node: ast.AST) -> list[ast.AST]:
    speaks = isinstance(node, ast.Call) and (
        _prints(node) or (isinstance(node.func, ast.Name) and node.func.id == "InputError")
    )
    typed = (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )
    if speaks or typed or isinstance(node, ast.Raise | ast.Assert):
        return [node]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    if isinstance(node, ast.keyword) and node.arg in ("strict", "stacklevel"):
        return [node.value]
    if isinstance(node, ast.ClassDef):
        return list(node.decorator_list)
    if isinstance(node, ast.Assign):
        names = {n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)}
        return [node] if names and names <= _MESSAGE else []
    if isinstance(node, ast.FunctionDef):
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        inner = [argument.annotation for argument in arguments if argument.annotation]
        return [*inner, *node.decorator_list, *([node.returns] if node.returns else [])]
    return []


def drawn(root: Path, count: int, seed: int) -> list[Fault]:
    """Draw faults from each file of TESTS in proportion to its code, never two on one line."""
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
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            for changed in _changes(node):
                old = raw[starts[node.lineno - 1] : starts[node.end_lineno]].decode()
                inner = ast.unparse(changed)
                inside = (
                    f"({inner})"
                    if isinstance(changed, ast.expr) and not isinstance(changed, ast.Constant)
                    else inner
                )
                head = raw[starts[node.lineno - 1] : begin].decode()
                tail = raw[end : starts[node.end_lineno]].decode()
                if text.count(old) == 1:
                    found.append((path, node.lineno, Fault(path, old, head + inside + tail)))
    # By content: an edit elsewhere changes little of the draw.
    found.sort(key=lambda one: hashlib.sha256(f"{seed} {one[2]}".encode()).digest())
    out, seen = [], set()
    for path, line, fault in found:
        if (path, line) not in seen and len(out) < count:
            seen.add((path, line))
            out.append(fault)
    return out
