"""What an import may do: nothing but define. Read from the source, and watched in a process of its
own.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_imports import ROOT, dotted, name_of, sources

# What stands at module level, or in a decorator, runs at import.
FORBIDDEN = (
    "threading.Thread",
    "threading.Timer",
    "concurrent.futures",
    "multiprocessing",
    "subprocess",
    "socket",
    "urllib",
    "requests",
    "http",
    "os.putenv",
    "os.unsetenv",
    "os.environ",
    "os.system",
    "os.fork",
    "os.makedirs",
    "os.mkdir",
    "torch.cuda",
    "torch.compile",
    "torch.set_",
    "torch.use_deterministic",
    "torch.backends",
    "torch.accelerator",
    "torch.utils.cpp_extension",
    "torch.distributed",
    "torch.manual_seed",
    "numpy.random.seed",
    "random.seed",
    "open",
)
READING = ("os.environ.get", "os.environ.items", "os.environ.copy")


def is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if is_main_guard(child):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            outside = [
                *getattr(child, "decorator_list", []),
                *child.args.defaults,
                *(d for d in child.args.kw_defaults if d),
            ]
            for part in outside:
                yield part
                yield from at_import(part)
        else:
            yield child
            yield from at_import(child)


def happenings(code: str) -> list[str]:
    """What the module-level code of a file does that no import may do."""
    tree, found = ast.parse(code), []
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def resolve(node: ast.AST) -> str:
        head, _, tail = dotted(node).partition(".")
        return ".".join(filter(None, [full.get(head, head), tail]))

    for node in at_import(tree):
        if isinstance(node, ast.Assign | ast.Delete):
            written = [resolve(t.value) for t in node.targets if isinstance(t, ast.Subscript)]
            found += [
                f"line {node.lineno}: environment write" for w in written if w == "os.environ"
            ]
        if not isinstance(node, ast.Call):
            continue
        called = resolve(node.func)
        bad = any(
            called == f or called.startswith(f if f.endswith("_") else f + ".") for f in FORBIDDEN
        )
        eager = called in ("numba.njit", "numba.jit", "numba.vectorize") and node.args
        if eager or (bad and not called.startswith(READING)):
            found.append(f"line {node.lineno}: {called}")
    return found


@pytest.mark.parametrize("path", sources("xmlkernels", "train", "benchmarks"), ids=name_of)
def test_nothing_happens_at_import(path: Path) -> None:
    assert happenings(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "code",
    [
        "import threading\nthreading.Thread(target=print).start()",
        "from threading import Thread as T\nclass A:\n    t = T()",
        "import os\nos.environ['A'] = '1'",
        "from os import environ\nenviron.setdefault('A', '1')",
        "import torch\nif True:\n    DEVICE = torch.cuda.is_available()",
        "import torch\ntorch.set_num_threads(2)",
        "import torch\n@torch.compile()\ndef f(): pass",
        "from numba import njit\n@njit('f4(f4)')\ndef f(x): return x",
        "def f(x=open('a')): pass",
        "from urllib import request\nrequest.urlopen('http://a')",
    ],
)
def test_the_check_finds_what_happens(code: str) -> None:
    assert happenings(code)


@pytest.mark.parametrize(
    "code",
    [
        "import os\nA = os.environ.get('A')",
        "import threading\ndef f():\n    threading.Thread(target=print).start()",
        "from numba import njit\n@njit\ndef f(x): return x",
        "import subprocess\nif __name__ == '__main__':\n    subprocess.run([])",
        "import torch\n@torch.no_grad()\ndef f(): torch.cuda.init()",
    ],
)
def test_the_check_lets_pass_what_waits(code: str) -> None:
    assert happenings(code) == []


# The same by watching: an audit hook sees threads, connections, processes, environment and files.
# What a package does on its own import is its own affair; what our module level asks for is ours.
WATCH = """
import os, sys
root, modules = sys.argv[1], sys.argv[2:]
sys.path.insert(0, root)
sys.dont_write_bytecode = True
EVENTS = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.putenv",
          "os.unsetenv", "os.system", "os.fork", "os.posix_spawn", "os.exec", "os.mkdir",
          "os.rename", "urllib.Request"}
found = set()

def ours():
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith("<frozen importlib"):
            return None
        if file.startswith(os.path.join(root, "xmlkernels")):
            return file
        frame = frame.f_back

def note(what):
    file = ours()
    if file:
        found.add(f"{what} from {os.path.relpath(file, root)}")

def hook(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event in EVENTS or writes:
        note(event)

import torch
def watched(holder, name):
    real = getattr(holder, name)
    def call(*args, **kwargs):
        note(f"{holder.__name__}.{name}")
        return real(*args, **kwargs)
    setattr(holder, name, call)
names = "is_available device_count current_device get_device_name get_device_capability init"
for name in names.split():
    watched(torch.cuda, name)
for name in ("compile", "set_num_threads", "manual_seed"):
    watched(torch, name)
import threading
watched(threading.Thread, "start")  # its audit event is younger than Python 3.11
sys.addaudithook(hook)
import importlib
for module in modules:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # optional: needed on a card alone
            raise
bad = [m for m in sys.modules if m.split(".")[0] in ("train", "benchmarks", "tests")]
print("\\n".join(sorted(found) + bad))
"""


def test_nothing_is_seen_to_happen_at_import() -> None:
    inside = [
        p.relative_to(ROOT).with_suffix("")
        for p in sources("xmlkernels", "train", "benchmarks")
        if p.parts[len(ROOT.parts)] == "xmlkernels"
    ]
    modules = [".".join(p.parts[:-1] if p.name == "__init__" else p.parts) for p in inside]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCH, str(ROOT), *modules],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "", done.stdout


def test_the_watch_sees(tmp_path: Path) -> None:
    """The hook above, on a package that does all that is forbidden."""
    package = tmp_path / "xmlkernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os, subprocess, sys, threading, torch\n"
        "os.environ['X'] = '1'\n"
        "threading.Thread(target=print).start()\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
        "torch.cuda.is_available()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path), "xmlkernels"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    for what in ("os.putenv", "Thread.start", "subprocess.Popen", "torch.cuda.is_available"):
        assert f"{what} from xmlkernels" in done.stdout, done.stderr[-1000:]
