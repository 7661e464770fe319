"""README, CONTRIBUTING, CHANGELOG and docs/: lines, links, navigation, commands, pictures."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xmlkernels
from benchmarks import front
from benchmarks.plot import read_rows
from xmlkernels.cli import main as command
from xmlkernels.cli import waiting

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
COLUMNS = 100


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page by their number, without code blocks and tables."""
    code = False
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.lstrip().startswith("|"):
            yield number, line


def code(path: Path) -> Iterator[str]:
    """Commands of a page: lines of code blocks with their continuations, and code in prose."""
    text = path.read_text("utf-8")
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        yield from re.sub(r" *\\\n *", " ", block).splitlines()
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(word.split()) for word in re.findall(r"`([^`]+)`", rest))


@pytest.mark.parametrize("path", [*PAGES, *FRONT], ids=named)
def test_lines_of_prose_are_short(path: Path) -> None:
    long = [number for number, line in prose(path) if len(line) > COLUMNS]
    assert not long, f"{named(path)}: lines {long} are longer than {COLUMNS} columns"


@pytest.mark.parametrize("path", FRONT, ids=named)
def test_links_of_the_front_pages_lead_somewhere(path: Path) -> None:
    """Those of docs/ are checked when the pages are built."""
    text = "\n".join(line for _, line in prose(path)) + path.read_text("utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(
        r'(?:src|href)="([^"#]+)"', text
    )
    links += re.findall(r"^\[\w+\]: ([^#\s]+)", text, re.MULTILINE)
    dead = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not dead


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Every flag of each command, from its --help."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting, "choose", lambda words: None)  # torch has been loaded
        for name, *recipe in [
            *((n, "tiny") if n in ("train", "plan") else (n,) for n in command.COMMANDS),
            ("train", "linear"),  # with flags of its own
            ("train", "auto"),
        ]:
            shown = io.StringIO()
            words = [name, *recipe, "--help"]
            with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(shown):
                command.main(words)
            assert ended.value.code in (0, None), words
            own = re.findall(r"--(?:\[no-\])?([a-z][a-z0-9-]*)", shown.getvalue())
            which = f"{name} {recipe[0]}" if recipe in (["linear"], ["auto"]) else name
            found[which] = {*own, *(f"no-{word}" for word in own), "help", "version"}
    found["train auto"] |= found["train linear"] | found["train"] | {"plan"}
    return found


COMMAND = re.compile(r"(?:\bxmlkernels |(train/run\.py )|-m xmlkernels )(\S+)")


@pytest.mark.parametrize("path", [*PAGES, *FRONT], ids=named)
def test_commands_that_pages_name_exist(path: Path, flags: dict[str, set[str]]) -> None:
    if path.name == "CHANGELOG.md":
        return  # it names what was
    for line in code(path):
        for part in re.split(r"&&|;|\||#", line):
            match = COMMAND.search(part)
            if match is None or part.lstrip().startswith(("import", "from", "pip", "git", ">>>")):
                continue
            name = "train" if match[1] else match[2]
            if not re.fullmatch(r"[a-z]+", name):
                continue
            recipe = part[match.end() :].split()[:1]
            if name == "train" and recipe in (["linear"], ["auto"]):
                name = f"train {recipe[0]}"
            assert name in flags, f"{named(path)}: {line}"
            told = set(re.findall(r"(?<=\s)--([a-z][a-z0-9-]*)", part[match.end() :]))
            assert told <= flags[name], f"{named(path)}: {line}: {sorted(told - flags[name])}"


def test_pages_are_built_without_a_warning_and_fetch_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the pages need requirements-dev.txt")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.sub(r"<[^>]+>", "", (tmp_path / "examples.html").read_text("utf-8"))
    assert shown.count("import xmlkernels as xk") >= 4  # the programs are in the page
    for page in tmp_path.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", page.read_text("utf-8"))
        fetched = [tag for tag in tags if re.search(r'(?:src|href)="(?:https?:)?//', tag)]
        assert not fetched, f"{page.name}: {fetched}"


BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["guide/formats.md", "guide/own-data.md"])
def test_files_and_commands_of_a_page_work(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file of the page is written, every command run, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(waiting, "choose", lambda words: None)  # torch has been loaded
    for kind, title, body in BLOCK.findall((ROOT / "docs" / page).read_text("utf-8")):
        if title:
            Path(title).write_text(body, "utf-8")
        if kind == "python":
            exec(compile(body, page, "exec"), {})
        for line in re.sub(r" *\\\n *", " ", body).splitlines() if kind == "bash" else ():
            program, *words = shlex.split(line, comments=True)
            assert program == "xmlkernels"
            with pytest.raises(SystemExit) as ended:
                command.main(words)
                sys.exit(0)
            assert ended.value.code in (0, None), f"{line}\n{capsys.readouterr().err}"


def test_the_example_of_the_metrics_works(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, _, body in BLOCK.findall((ROOT / "docs" / "guide" / "metrics.md").read_text("utf-8")):
        if kind == "python":
            exec(compile(body, "metrics.md", "exec"), {})
    assert "'P@1': 100.0" in capsys.readouterr().out


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > COLUMNS]


def test_every_public_name_is_on_a_page() -> None:
    api = (ROOT / "docs" / "api.md").read_text("utf-8")
    ops = (ROOT / "docs" / "ops.md").read_text("utf-8")
    apart = {"RECIPES", "__version__", "ops"}
    missing = [name for name in xmlkernels.__all__ if f"::: xmlkernels.{name}\n" not in api]
    assert set(missing) == apart and "RECIPES" in api
    kinds = {name: getattr(xmlkernels.ops, name) for name in xmlkernels.ops.__all__}
    shown = [name for name, kind in kinds.items() if callable(kind) and name != "missing"]
    assert not [name for name in shown if f"::: xmlkernels.ops.{name}\n" not in ops]


def test_there_are_twenty_pages_or_more() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")[1]
    assert len(re.findall(r"\b[\w/-]+\.md$", nav, re.MULTILINE)) >= 20


def test_the_picture_is_drawn_from_the_committed_rows() -> None:
    rows = read_rows(ROOT / "benchmarks" / "results" / "amd-epyc-2c-avx512bf16.csv", False)
    told = "benchmarks/plot.py benchmarks/results/amd-epyc-2c-avx512bf16.csv --front"
    picture = ROOT / "docs" / "images" / "step.svg"
    assert picture.read_text("utf-8") == front.draw(rows), f"{told} {named(picture)} draws it anew"


def test_the_python_of_the_readme_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
    blocks = [body for kind, _, body in found if kind == "python"]
    assert len(blocks) == 2
    for body in blocks:
        exec(compile(body, "README.md", "exec"), {})
    assert "eggs" in capsys.readouterr().out.splitlines()[-1]


def test_the_first_screen_of_the_readme_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows as it shows one, its second command on them, and a model where the third looks."""
    page = (ROOT / "README.md").read_text("utf-8")
    block = next(body for kind, _, body in BLOCK.findall(page) if kind == "bash")
    install, train, serve = block.splitlines()
    assert install.startswith("pip install") and serve == "xmlkernels serve runs/mine"
    row = re.search(r'`my\.jsonl` has `({"text".*?})`', page)
    assert row is not None and page.count("\n", 0, row.start()) < 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(waiting, "choose", lambda words: None)  # torch has been loaded
    others = [row[1].replace("egg", f"{kind} {n}") for n in range(10) for kind in ("rice", "egg")]
    Path("my.jsonl").write_text("".join(f"{line}\n" for line in (row[1], *others)))
    command.main(shlex.split(train)[1:])
    (answer,) = xmlkernels.load(serve.split()[-1]).predict(["boil an egg"], k=2)
    assert {label.name for label in answer} <= {"boiled", "eggs", "rice 1s"} | {
        label for n in range(10) for label in (f"rice {n}s", f"egg {n}s")
    }
