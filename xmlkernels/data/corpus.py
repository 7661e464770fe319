"""The built-in corpus: from the first paragraph of its docstring, which functions does one call?

Documents: the functions, methods and coroutines, nested ones too, of the Python standard library
and of a fixed list of packages, as far as they have a docstring. Text: its first paragraph, white
space made single. Labels: the names that the function's body calls, `f(…)` → f and `a.b.f(…)` → f;
a nested function's calls count for the function around it too.
Nothing is imported or run: files are parsed.

1. Documents with the same text are one, with the labels of all.
2. Names called by fewer than 2 documents or by more than a tenth of them are no labels; documents
   without a label are left out.
3. A file belongs to train, val or test (80, 10, 10 %) by a hash of its path inside its package: the
   same on every machine, and functions of one file never meet across splits. A text from files of
   more than one split goes to train.

Test folders of the standard library are left out, because many distributions of Python leave them
out; those of packages come with every wheel and stay.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.files import DataWarning

STDLIB = "stdlib"
"""The name of the standard library in a list of packages."""

PACKAGES = (
    STDLIB,
    "PIL",
    "fontTools",
    "functorch",
    "huggingface_hub",
    "joblib",
    "llvmlite",
    "matplotlib",
    "mpmath",
    "networkx",
    "numba",
    "numpy",
    "pyarrow",
    "rich",
    "safetensors",
    "scipy",
    "setuptools",
    "sklearn",
    "sympy",
    "tokenizers",
    "torch",
    "torchgen",
    "transformers",
    "tyro",
)
"""Import names: the run-time requirements that hold Python source, and what they always bring
along.
"""

SPLITS = ("train", "val", "test")
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "functorch": "torch",
    "sklearn": "scikit-learn",
    "torchgen": "torch",
}
_SKIPPED = {"__pycache__", "site-packages", "dist-packages"}
_SKIPPED_IN_STDLIB = {"test", "tests", "idle_test"}
_OPERATORS = (ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop)
_LEAVES = {ast.Name, ast.Constant}.union(*(kind.__subclasses__() for kind in _OPERATORS))

_File = tuple[str, str]  # package/path, path on disk
# package/path, text and names called; None: cannot be parsed.
_Parsed = tuple[str, list[tuple[str, tuple[str, ...]]] | None]


@dataclass(frozen=True)
class Corpus:
    """By split ("train", "val", "test"); L labels, N documents of a split.

    Attributes:
        texts: split → N texts. labels: split → CSR float32 [N, L]. label_names: L names, sorted.
        hash: sha256 of texts, labels and split; another version of a package is another corpus.
        versions: package → version. report: what was counted on the way.
    """

    texts: dict[str, list[str]]
    labels: dict[str, csr_matrix]
    label_names: list[str]
    hash: str
    versions: dict[str, str]
    report: dict[str, int]


def build_corpus(
    documents: int | None = None,
    *,
    packages: Iterable[str] | None = None,
    workers: int | None = None,
) -> Corpus:
    """Build the corpus from the source files of this Python installation.

    About a minute on two cores.

    Args:
        documents: a part with at least this many documents in all three splits together, more by at
            most about one file's. The part is made of whole files, taken folder by folder in the
            order of a hash of the folder's path, and the rules are applied to it alone: its labels
            have 2 documents inside it, and neighbours stay together. None: everything.
        packages: import names, `STDLIB` for the standard library; the result does not depend on
            their order. None: those of PACKAGES that are installed; without some of them it is
            another corpus, and a warning says so.
        workers: processes that parse, by default one per available core. They are spawned, so with
            more than one a script needs `if __name__ == "__main__":` around its work; 1 parses in
            this process.

    Raises:
        InputError: a package that is not there or has no Python source, or more documents asked for
            than there are.
    """
    for argument, value in (("documents", documents), ("workers", workers)):
        if value is not None and value < 1:
            raise InputError(
                argument, "a whole number from 1, or None", str(value), "ask for at least one"
            )
    if packages is None:
        packages = installed_packages()
        if absent := sorted(set(PACKAGES) - set(packages)):
            warnings.warn(
                f"built-in corpus without {', '.join(absent)}, not installed here: figures are not "
                "those of the whole corpus",
                DataWarning,
                2,
            )
    names = sorted(set(packages))
    if not names:
        raise InputError(
            "packages",
            "at least one package",
            "none",
            f"leave it out, or name for example {STDLIB!r}",
        )
    files = sorted(file for name in names for file in files_of(name))
    with _parser(workers or _cores()) as parse:
        parsed = parse(files) if documents is None else _part(files, documents, parse)
    broken = [file for file, functions in parsed if functions is None]
    if broken:
        shown = ", ".join(broken[:3]) + (", …" if len(broken) > 3 else "")
        warnings.warn(
            f"built-in corpus: {len(broken)} files cannot be parsed and are left out: {shown}",
            DataWarning,
            2,
        )
    return _assemble(parsed, {name: _version(name) for name in names})


def installed_packages() -> list[str]:
    """List those of PACKAGES that are installed with Python source."""
    return [name for name in PACKAGES if name == STDLIB or _package_folders(name)]


def files_of(package: str) -> list[_File]:
    """List the source files of a package."""
    roots = [sysconfig.get_paths()["stdlib"]] if package == STDLIB else _package_folders(package)
    skipped = _SKIPPED | (_SKIPPED_IN_STDLIB if package == STDLIB else set())
    found = []
    for root in roots:
        for folder, below, names in os.walk(root):
            # The folder of build settings is named after the machine.
            below[:] = [
                name for name in below if name not in skipped and not name.startswith("config-")
            ]
            paths = [Path(folder, name) for name in names if name.endswith(".py")]
            found += [
                (f"{package}/{path.relative_to(root).as_posix()}", str(path)) for path in paths
            ]
    if not found:
        raise InputError(
            f"built-in corpus, package {package!r}",
            "an installed package with Python source",
            "none",
            f"install it (pip install {_DISTRIBUTIONS.get(package, package)}) or leave it out of "
            "the list of packages",
        )
    return found


def _package_folders(package: str) -> list[str]:
    spec = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    # A folder without __init__.py of the same name in the working folder is no such package.
    return (
        list(spec.submodule_search_locations or ())
        if spec is not None and spec.origin is not None
        else []
    )


def _version(package: str) -> str:
    if package == STDLIB or package in sys.stdlib_module_names:
        return platform.python_version()
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _fraction(key: str) -> float:
    """Return a number in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def _split_of(file: str) -> str:
    place = _fraction(f"split\0{file}")
    return "train" if place < 0.8 else "val" if place < 0.9 else "test"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _parser(workers: int) -> Iterator[Callable[[Sequence[_File]], list[_Parsed]]]:
    if workers == 1:
        yield lambda files: [_parse(file) for file in files]
        return
    # Spawned: a fork of a process in which torch or numba run threads may hang. Syntax trees hold
    # no cycles to collect.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=gc.disable
    ) as pool:
        try:
            yield lambda files: list(pool.map(_parse, files, chunksize=16))
        except BrokenProcessPool as error:
            mend = "put the call under `if __name__ == '__main__':`, or pass workers=1"
            raise RuntimeError(f"a process that parses files died; {mend}") from error


def _parse(file: _File) -> _Parsed:
    """Return a file's functions with a docstring, in the order of the file."""
    name, path = file
    try:
        source = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are not ours
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return name, None
    found: list[tuple[int, str, set[str]]] = []
    # A stack, not recursion: an expression may be nested deeper than Python's own limit.
    stack: list[tuple[ast.AST, tuple[set[str], ...]]] = [(tree, ())]
    while stack:
        node, around = stack.pop()
        if around and type(node) is ast.Call:
            called = (
                node.func.id
                if isinstance(node.func, ast.Name)
                else getattr(node.func, "attr", None)
            )
            for calls in around if called is not None else ():
                calls.add(str(called))
        inside, body = around, set[int]()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = _first_paragraph(ast.get_docstring(node, clean=False) or "")
            if text:
                calls = set()
                found.append((node.lineno, text, calls))
                inside, body = (*around, calls), {id(child) for child in node.body}
        # What is in decorators, defaults and annotations is called by whoever defines the
        # function.
        for child in _children(node):
            below = inside if id(child) in body else around
            # Outside of documents only statements matter: no expression holds a `def`.
            if below or not isinstance(child, ast.expr):
                stack.append((child, below))
    return name, [
        (text, tuple(sorted(calls))) for _, text, calls in sorted(found, key=lambda entry: entry[0])
    ]


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Yield child nodes other than names, constants, operators and contexts.

    Those call nothing, and most nodes are such.
    """
    for value in node.__dict__.values():  # half the time of ast.iter_child_nodes
        for child in value if type(value) is list else (value,):
            if isinstance(child, ast.AST) and type(child) not in _LEAVES:
                yield child


def _first_paragraph(docstring: str) -> str:
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    # A docstring may hold half a surrogate pair, which no file can.
    return " ".join(paragraph.encode("utf-8", "replace").decode().split())


def _part(
    files: list[_File], documents: int, parse: Callable[[Sequence[_File]], list[_Parsed]]
) -> list[_Parsed]:
    """Return the first files, by folder hash, that give the documents asked for.

    Parses no more than it needs.
    """
    files = sorted(files, key=lambda file: (_fraction("part\0" + file[0].rpartition("/")[0]), file))
    parsed: list[_Parsed] = []
    before, count = 0, 0
    while count < documents and len(parsed) < len(files):
        before, end = len(parsed), max(512, len(parsed) * 3 // 2)
        parsed += parse(files[before:end])
        count = len(_select(_merge(parsed))[0])
    if count < documents:
        raise InputError(
            "documents",
            f"at most {count}, all there are",
            str(documents),
            "ask for fewer, or for all",
        )
    # The rules make the count not quite monotone: a file may push a name over the tenth. Bisection
    # settles on one answer.
    low, high = before, len(parsed)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if len(_select(_merge(parsed[:middle]))[0]) >= documents
            else (middle, high)
        )
    return sorted(parsed[:high], key=lambda file: file[0])


def _merge(parsed: Sequence[_Parsed]) -> dict[str, set[str]]:
    merged: dict[str, set[str]] = {}
    for _, functions in parsed:
        for text, calls in functions or ():
            merged.setdefault(text, set()).update(calls)
    return merged


def _select(merged: dict[str, set[str]]) -> tuple[dict[str, set[str]], set[str], Counter[str]]:
    """Documents with their labels, the labels, and how many documents call each name."""
    count = Counter(name for calls in merged.values() for name in calls)
    kept = {name for name, number in count.items() if 2 <= number <= len(merged) / 10}
    documents = {text: calls & kept for text, calls in merged.items()}
    return {text: labels for text, labels in documents.items() if labels}, kept, count


def _assemble(parsed: Sequence[_Parsed], versions: dict[str, str]) -> Corpus:
    merged = _merge(parsed)
    documents, kept, count = _select(merged)
    if not documents:
        raise InputError(
            "built-in corpus", "at least one document with a label", "none", "name more packages"
        )
    sides: dict[str, set[str]] = {}
    for file, functions in parsed:
        for text, _ in functions or ():
            sides.setdefault(text, set()).add(_split_of(file))
    side = {text: next(iter(of)) if len(of) == 1 else "train" for text, of in sides.items()}
    names = sorted(kept)
    number = {name: index for index, name in enumerate(names)}
    texts = {split: [text for text in documents if side[text] == split] for split in SPLITS}
    rows = {
        split: [sorted(number[name] for name in documents[text]) for text in texts[split]]
        for split in SPLITS
    }
    labels = {split: _matrix(rows[split], len(names)) for split in SPLITS}
    digest = hashlib.sha256()
    for split in SPLITS:
        for text in texts[split]:
            digest.update(json.dumps([split, text, sorted(documents[text])]).encode() + b"\n")
    with_docstring = sum(len(functions or ()) for _, functions in parsed)
    report = {
        "files": len(parsed),
        "unparsable files": sum(functions is None for _, functions in parsed),
        "functions with a docstring": with_docstring,
        "merged into another of the same text": with_docstring - len(merged),
        "texts from more than one split, in train": sum(len(sides[text]) > 1 for text in documents),
        "names of one document, no labels": sum(n == 1 for n in count.values()),
        "names of more than a tenth of the documents, no labels": sum(
            n > len(merged) / 10 for n in count.values()
        ),
        "documents without a label, left out": len(merged) - len(documents),
        "documents": len(documents),
        "labels": len(names),
    } | {split: len(texts[split]) for split in SPLITS}
    return Corpus(texts, labels, names, digest.hexdigest(), versions, report)


def _matrix(rows: list[list[int]], width: int) -> csr_matrix:
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.fromiter(chain.from_iterable(rows), np.int64, int(ends[-1]))
    return csr_matrix((np.ones(len(columns), np.float32), columns, ends), shape=(len(rows), width))
