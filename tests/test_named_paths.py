"""Paths and dotted names of the project that its texts name exist: docs, comments, code."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("xmlkernels", "train", "csrc", "tests", "benchmarks", "docs", "examples")
SUFFIXES = {".py", ".md", ".toml", ".txt", ".cff", ".yml", ".json", ".csv", ".svg", ".ipynb"}
SUFFIXES |= {".def", ".cpp", ".h", ".cu", ".cuh"}
# The history of the project and its fixtures name what was, this file what never was.
APART = ("CHANGELOG.md", "tests/fixtures/", "tests/test_named_paths.py")
# Names that texts make up as examples, and files of other projects.
INVENTED = {"row_norms", "low_rank", "x", "a", "b", "t", "no_more", "NAME", "app"}
BUILT = {"_host", "parse_sparse"}  # not there before the native library is
OTHERS = {"main_inference.py", "CreateTokenizedFiles.py", "CreateAugData.py", "library.h"}

ROOTED = re.compile(rf"(?<![\w./<{{}}-])(?:{'|'.join(ROOMS)})/[\w./<>{{}}*-]*")
SOURCE = re.compile(r"(?<![\w./<{}*-])[\w./-]+\.(?:py|cpp|cuh?|h|ipynb)\b")
DOTTED = re.compile(r"([`'\"])(xmlkernels(?:\.\w+)+)\1")


def _files() -> dict[str, Path]:
    places = [*ROOT.iterdir(), *(p for room in ROOMS for p in (ROOT / room).rglob("*"))]
    places += (ROOT / ".github").rglob("*.yml")
    found = {p.relative_to(ROOT).as_posix(): p for p in places if p.is_file()}
    return {name: path for name, path in found.items() if "__pycache__" not in name}


FILES = _files()
ENDS = {name[at:] for name in FILES for at in (0, *(m.end() for m in re.finditer("/", name)))}
TEXTS = {
    name: path
    for name, path in FILES.items()
    if (path.suffix in SUFFIXES or name == "Makefile") and not name.startswith(APART)
}


def _invented(path: str) -> bool:
    stem = Path(path).stem.removeprefix("test_").removeprefix("cases_")
    return stem in INVENTED or path in OTHERS or bool(set("<>{}*") & set(path))


def _wrong(name: str, text: str) -> list[str]:
    """Lines of a text that name a path which does not exist."""
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        named = set()
        for path in ROOTED.findall(line):
            whole = path.rstrip(".-")
            if Path(whole).suffix in SUFFIXES or whole.endswith("/"):
                named.add(whole)
        paths = {path for path in named if not (ROOT / path).exists()}
        if not name.startswith("tests/"):  # which write files of any name
            paths |= {path for path in SOURCE.findall(line) if path.lstrip("./") not in ENDS}
        wrong += [f"{name}:{number}: {path}" for path in sorted(paths) if not _invented(path)]
    return wrong


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_paths_that_texts_name_exist(room: str) -> None:
    own = {name: path for name, path in TEXTS.items() if name.partition("/")[0] == room}
    if not room:
        own = {name: path for name, path in TEXTS.items() if name.partition("/")[0] not in ROOMS}
    assert own
    assert not [
        line for name, path in own.items() for line in _wrong(name, path.read_text("utf-8"))
    ]


def test_dotted_names_in_quotes_exist() -> None:
    """A test that replaces a function by its name would not find it, a reader neither."""
    named = {
        (dotted, name)
        for name, path in TEXTS.items()
        for _, dotted in DOTTED.findall(path.read_text("utf-8"))
        if dotted.rpartition(".")[2] not in INVENTED | BUILT
    }
    gone = []
    for dotted, name in sorted(named):
        try:
            pkgutil.resolve_name(dotted)
        except (ImportError, AttributeError) as error:
            gone.append(f"{name}: {dotted}: {error}")
    assert len(named) > 20 and not gone


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("docs/a.md", "see xmlkernels/training/gone.py.", 1),
        ("docs/a.md", "see `xmlkernels/optim.py`, csrc/kernels.h and tests/fields/.", 0),
        ("docs/a.md", "all of xmlkernels/gone/ and `gone.py`", 2),
        ("docs/a.md", "`optim.py` and `training/loop.py`", 0),
        ("docs/a.md", "csrc/cuda/<stem>.cu, tests/ops/test_row_norms.py, examples/NAME.py", 0),
        ("tests/a.py", 'write("rules.py", "train/labels.npz")', 0),
        ("tests/a.py", "# as in tests/test_gone.py", 1),
    ],
)
def test_a_path_that_does_not_exist_is_found(name: str, text: str, count: int) -> None:
    assert len(_wrong(name, text)) == count
