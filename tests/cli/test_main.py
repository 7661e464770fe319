"""The command `xmlkernels` itself: which commands there are, and what it says without one."""

import ast
import os
import signal
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
from patience import PATIENCE
from test_imports import PACKAGE, dotted, name_of

import xmlkernels
from xmlkernels.cli import main as command
from xmlkernels.cli import waiting


def ended(*words: str, prog: str = "") -> int:
    with pytest.raises(SystemExit) as end:
        command.main(words, prog)
    return int(end.value.code or 0)


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("help",)])
def test_help_lists_every_command(words: tuple[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: xmlkernels COMMAND") and err == ""
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(
        command.COMMANDS
    )


def test_without_a_command_the_help_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: xmlkernels COMMAND")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--version"])
    assert capsys.readouterr().out == f"xmlkernels {xmlkernels.__version__}\n"


@pytest.mark.parametrize(
    ("word", "mend"), [("trian", "did you mean train?"), ("zzz", "xmlkernels --help lists them")]
)
def test_an_unknown_command(word: str, mend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(word) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: xmlkernels: expected a command (prepare, train") and mend in err


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_has_help_and_one_line_of_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(name, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: xmlkernels {name}")
    module = import_module(f"xmlkernels.cli.{command.MODULES.get(name, name)}")
    assert (module.__doc__ or "").strip().splitlines()[0].rstrip(".") in out


def test_train_without_a_recipe_lists_them_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look() -> str:
        raise AssertionError("it looked whether the machine is busy")

    monkeypatch.setattr(waiting, "crowded", look)
    assert ended("train") == 2
    out, err = capsys.readouterr()
    assert out == "" and all(f"  {name}" in err for name in xmlkernels.RECIPES)


def test_mistakes_under_another_name_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("train", "no-such-recipe", prog="train/run.py") == 2
    assert "error: train/run.py: expected a recipe" in capsys.readouterr().err


def test_help_and_version_load_no_torch() -> None:
    code = (
        "import sys\nfrom xmlkernels.cli.main import main\nmain(['--version'])\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def _of_its_own(code: str, **how: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **how)


def test_help_that_nobody_reads_to_its_end_ends_in_order() -> None:
    code = "from xmlkernels.cli.main import main; main(['--help'])"
    read, write = os.pipe()
    os.close(read)
    with _of_its_own(code, stdout=write) as child:
        os.close(write)
        assert child.communicate(timeout=PATIENCE)[1] == "" and child.returncode == 141
    with open("/dev/full", "w") as full, _of_its_own(code, stdout=full) as child:
        told = "error: standard output could not be written: No space left on device; "
        assert child.communicate(timeout=PATIENCE)[1].startswith(told) and child.returncode == 1


def test_ctrl_c_while_torch_is_loaded_is_one_sentence() -> None:
    """What a command imports first is the console: here it waits for the signal instead."""
    code = (
        "import signal, sys, time, types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Console:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'xmlkernels.cli.console':\n"
        "            signal.raise_signal(signal.SIGINT); time.sleep(600)\n"
        "sys.meta_path.insert(0, Console())\n"
        "from xmlkernels.cli.main import main\n"
        "main(['env'])"
    )
    with _of_its_own(code) as child:
        assert child.communicate(timeout=PATIENCE)[1] == "interrupted (SIGINT)\n"
        assert child.returncode == 130


def test_a_signal_that_was_switched_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen: list[Any] = []
    look = lambda *_: seen.append(signal.getsignal(signal.SIGINT))  # noqa: E731
    monkeypatch.setattr(command, "_main", look)
    try:
        command.main(["env"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command.main(["env"])
        assert seen[0] is signal.SIG_IGN and callable(seen[1])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# A thread that ends the process while the loop may wait for ever has no command to speak for it;
# the other is a command of its own, `python -m xmlkernels.ops`.
SPEAK = {"xmlkernels/training/loop.py", "xmlkernels/ops/__main__.py"}


def test_the_library_logs_and_commands_alone_print() -> None:
    printing = {
        name_of(path)
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and dotted(node.func) == "print"
    }
    assert {name for name in printing if not name.startswith("xmlkernels/cli/")} == SPEAK
