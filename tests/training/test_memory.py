"""Runs that no memory can hold: how much there is, what is refused, and what is let pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import RECIPES, make_dataset, make_tree, run, tiny

from xmlkernels import InputError, memory
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.cli import console
from xmlkernels.errors import Failed
from xmlkernels.memory import (
    MARGIN,
    check_memory,
    machine_memory,
    out_of_memory,
    resident_memory,
)
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.training import forecast

GIB = 1 << 30
HERE = torch.device("cpu")
MENDS = {"activations": "take a smaller --batch", "": "take --table fp8"}


def system(
    root: Path, total_kib: int | None = 8 << 20, cgroup: str = "0::/\n", **limits: str
) -> Path:
    """A file system with these facts; `limits` by place, "/" written as "__"."""
    (root / "proc" / "self").mkdir(parents=True)
    if total_kib is not None:
        (root / "proc" / "meminfo").write_text(f"MemTotal: {total_kib} kB\nMemFree: 12 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for place, text in limits.items():
        path = (
            root / "sys" / "fs" / "cgroup" / place.replace("__", "/").replace("memory_", "memory.")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, 8 * GIB),
        ({"memory_max": "max\n"}, 8 * GIB),
        ({"memory_max": f"{3 * GIB}\n"}, 3 * GIB),
        ({"memory_max": f"{64 * GIB}\n"}, 8 * GIB),  # a limit above what there is
        (
            {"cgroup": "0::/a/b\n", "a__b__memory_max": "max\n", "a__memory_max": f"{2 * GIB}\n"},
            2 * GIB,
        ),  # of a parent
        ({"cgroup": "0::/of/the/host\n", "memory_max": f"{GIB}\n"}, GIB),  # a container's own top
        (
            {"cgroup": "5:memory:/a\n3:cpu:/a\n", "memory__a__memory_limit_in_bytes": f"{GIB}\n"},
            GIB,
        ),
        (
            {"cgroup": "5:memory:/\n", "memory__memory_limit_in_bytes": "9223372036854771712\n"},
            8 * GIB,
        ),  # version 1: none
    ],
)
def test_the_memory_of_a_machine_is_what_its_cgroup_allows(
    facts: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    assert machine_memory(system(tmp_path, **facts)) == expected


def test_this_machine_says_how_much_it_has(tmp_path: Path) -> None:
    assert machine_memory() is not None and machine_memory() > GIB  # type: ignore[operator]
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("nothing\n")
    assert machine_memory(tmp_path) is None


def test_a_process_knows_what_it_holds(tmp_path: Path) -> None:
    before = resident_memory()
    assert before is not None
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = resident_memory()
    assert after is not None and 60 << 20 < after - before < 80 << 20
    del held
    assert resident_memory(system(tmp_path)) is None  # a system that does not say


def test_counting_draws_nothing_from_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    assert forecast.process_so_far()["process so far"] > 0
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(forecast, "resident_memory", lambda: 1 << 30)
    own = torch.nn.Linear(1 << 20, 4)  # an encoder that is counted by itself
    found = [forecast.process_so_far(*made)["process so far"] for made in ((), (own,))]
    assert found[0] - found[1] == 4 * own.weight.numel() + 4 * own.bias.numel()


def test_a_run_counts_what_its_process_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "raw")
    monkeypatch.setattr(memory, "machine_memory", lambda: 1 << 30)
    for held, good in ((100 << 20, True), (2 << 30, False)):
        monkeypatch.setattr(forecast, "resident_memory", lambda held=held: held)
        config = tiny(dataset, tmp_path / str(held), epochs=1)
        if good:
            run(config)
            continue
        with pytest.raises(InputError, match="memory of this run.*process so far 2.0 GiB"):
            run(config)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 10 * GIB)
    parts = {
        "encoder": GIB // 2,
        "activations (estimate)": 20 * GIB,
        "label table": 3 * GIB,
        "the smallest": 1,
    }
    told = (
        "memory of this run: expected at most 10.0 GiB, the memory of this machine, got about 23.5 "
        "GiB "
        r"\(activations \(estimate\) 20.0 GiB, label table 3.0 GiB, encoder 512 MiB\); take a "
        r"smaller --batch"
    )
    with pytest.raises(InputError, match=told):
        check_memory(parts, HERE, MENDS)
    with pytest.raises(InputError, match="take --table fp8"):
        check_memory(parts | {"states of label table": 30 * GIB}, HERE, MENDS)
    within = {"activations (estimate)": int(10 * MARGIN * GIB)}
    check_memory(within, HERE, MENDS)
    with pytest.raises(
        InputError,
        match=r"got about 22.0 GiB \(2 processes, each activations \(estimate\) 11.0 GiB\)",
    ):
        check_memory(within, HERE, MENDS, processes=2)
    check_memory(parts, torch.device("meta"), MENDS)  # nobody knows


def test_a_machine_of_unknown_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: None)
    check_memory({"label table": 1 << 60}, HERE, MENDS)


def test_a_batch_is_counted_by_the_documents_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 documents are 160 whatever --batch says; 160 of the cascade and of a bag of words,
    too.
    """
    dataset = make_dataset(tmp_path / "raw", keep_texts=True)
    tree = make_tree(dataset, tmp_path / "tree.safetensors")
    monkeypatch.setattr(forecast, "resident_memory", lambda: 0)  # the model alone
    monkeypatch.setattr(memory, "machine_memory", lambda: 64 << 20)
    large: dict[str, Any] = {"batch": 1_000_000, "epochs": 1, "warmup": 0}
    run(tiny(dataset, tmp_path / "a", **large))
    monkeypatch.setattr(memory, "machine_memory", lambda: 2 << 20)
    for name, changes, mend in (
        ("b", {}, "--micro-batch"),
        (
            "c",
            {
                "model": "cascade",
                "tree": str(tree),
                "layers": ("1", "2", "2"),
                "topk": (2, 4),
                "embed_drops": (0.1,) * 3,
            },
            "--beyond-memory",
        ),
        ("d", {"encoder": "bow", "bow_width": 8192, "min_df": 1}, "--table bf16"),
    ):
        with pytest.raises(
            InputError, match=f"memory of this run: expected at most 2.0 MiB.*{mend}"
        ):
            run(tiny(dataset, tmp_path / name, **(large | {"dropout": 0.2} | changes)))
        assert not (tmp_path / name / "checkpoint").exists()


def test_no_recipe_is_refused_for_its_batch_on_a_machine_of_16_gib() -> None:
    """Of the recipes that name no data of their own: MiniLM's activations, at the longest that they
    take.
    """
    hidden, layers = 384, 6
    for name, recipe in RECIPES.items():
        config = recipe.config
        if getattr(config, "encoder", "") == "minilm":
            documents = config.micro_batch or config.batch
            assert 68 * hidden * layers * documents * config.max_length < 16 * GIB, name


def cuda() -> None:
    """What torch 2.11 raises on a card, shortened."""
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.1 GiB of "
        "which 1.2 GiB is free."
    )


def python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("take", "told"),
    [
        (lambda: torch.empty(1 << 60, dtype=torch.uint8), "another 1.07e+09 GiB could not be had"),
        (lambda: np.empty(1 << 60, np.uint8), "another 1.00 EiB could not be had"),
        (cuda, "memory of GPU 1 has run out: another 2.50 GiB could not be had"),
        (python, "memory has run out;"),
    ],
)
def test_a_command_without_memory_ends_in_one_sentence(
    take: Callable[[], Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        console.command(take)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and told in line and "xmlkernels plan RECIPE" in line


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert out_of_memory(RuntimeError("size mismatch")) is None
    assert out_of_memory(ValueError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 x")) is None


def test_a_run_without_memory_tells_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = EndToEnd.step

    def large(self: EndToEnd, *args: Any, **how: Any) -> Any:
        if self.steps == 5:
            torch.empty(1 << 60, dtype=torch.uint8)
        return step(self, *args, **how)

    monkeypatch.setattr(EndToEnd, "step", large)
    config = tiny(make_dataset(tmp_path / "raw"), tmp_path / "run", save_every=4)
    with pytest.raises(
        Failed, match="GiB could not be had; the checkpoint of step 4 in .*--resume"
    ):
        run(config)
    assert CheckpointFolder(tmp_path / "run" / "checkpoint").load()[1]["steps"] == 4
