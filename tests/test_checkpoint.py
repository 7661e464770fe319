import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import flip, without_checksums
from torch import nn

from xmlkernels import checkpoint
from xmlkernels.checkpoint import (
    CheckpointFolder,
    load,
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    save,
    set_rng_state,
)
from xmlkernels.errors import InputError
from xmlkernels.optim import encoder_optimizer


def value(number: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300,), float(number)), "n": torch.tensor(number)}


def whole(folder: Path) -> int:
    """The number of the checkpoint; fails if its two files do not belong together."""
    tensors, state = load(folder)
    number = state["number"]
    assert tensors["n"].item() == number and bool((tensors["w"] == number).all())
    return number


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process, which can be killed as a crash would; gives its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "fp32": base,
        "same": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "strided": base[:, ::2],
        "parameter": nn.Parameter(torch.randn(3)),
        "bf16": torch.randn(3).bfloat16(),
        "fp8": torch.randn(8).to(torch.float8_e4m3fn),
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    save(tmp_path / "c", tensors, {})
    found, state = load(tmp_path / "c")
    assert state == {} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert (
            found[name].numpy(force=True).tobytes()
            == tensor.detach().contiguous().numpy().tobytes()
            if (tensor.dtype in (torch.float32, torch.int64, torch.bool, torch.uint8))
            else torch.equal(found[name].float(), tensor.float())
        ), name
    assert found["same"] is found["fp32"]
    stored = os.path.getsize(tmp_path / "c" / "tensors.safetensors")
    assert stored < 4 * (24 + 24 + 8 + 12 + 6 + 64) + 4096  # the alias takes no room
    found["fp32"].zero_()  # training on what was loaded must not reach into the file
    again, _ = load(tmp_path / "c")
    assert torch.equal(again["fp32"], base)


def test_state_is_exact_and_strict_json(tmp_path: Path) -> None:
    state = {
        "inf": [math.inf, -math.inf],
        "big": 2**200 + 1,
        "third": 1 / 3,
        "tiny": 5e-324,
        "text": "é\n\ud7ff",
        "none": None,
        "flag": True,
        "numpy": np.int64(2**62),
        "tuple": (1, {"x": 2.0}),
        "state": {},
    }
    save(tmp_path / "c", {}, {**state, "nan": math.nan})
    _, found = load(tmp_path / "c")
    assert math.isnan(found.pop("nan"))
    assert found == {**state, "tuple": [1, {"x": 2.0}]}
    assert isinstance(found["numpy"], int) and isinstance(found["flag"], bool)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "c" / "state.json").read_text(encoding="utf-8"), parse_constant=refuse)
    for bad, place in [
        ({"a": {1: 2}}, "state.a"),
        ({"a": [0, {1}]}, r"state.a\[1\]"),
        ({"t": torch.ones(1)}, "state.t"),
    ]:
        with pytest.raises(InputError, match=place):
            save(tmp_path / "c", {}, bad)
    assert load(tmp_path / "c")[1]["big"] == 2**200 + 1


def test_kill_at_any_time_leaves_one_whole(tmp_path: Path) -> None:
    folder, told = tmp_path / "c", tmp_path / "told"
    save(folder, value(0), {"number": 0})
    told.write_text("0")

    def endless(first: int) -> None:
        for number in range(first, first + 100_000):
            save(folder, value(number), {"number": number})
            with open(tmp_path / "told.new", "w") as file:
                file.write(str(number))
            os.replace(tmp_path / "told.new", told)

    rng, number = random.Random(0), 0
    for _ in range(30):
        pid = in_child(lambda: endless(number + 1))  # noqa: B023
        time.sleep(rng.uniform(0.002, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done, before, number = int(told.read_text()), number, whole(folder)
        assert max(done, before) <= number <= max(done, before) + 1
    assert number >= 3  # a loaded machine saves rarely; more would measure its speed
    save(folder, value(-1), {"number": -1})
    assert whole(folder) == -1
    assert sorted(os.listdir(tmp_path)) == ["c", "told"] or sorted(os.listdir(tmp_path)) == [
        "c",
        "told",
        "told.new",
    ]


STEPS = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink", "link")


def dying(at: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, dead without any clean-up as it enters the `at`-th system call that changes the
    disk.
    """

    def run() -> None:
        left = [at]

        def guard(original: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return original(*args, **options)

            return call

        for name in STEPS:
            setattr(os, name, guard(getattr(os, name)))
        work()

    return run


@pytest.mark.parametrize("kept", [1, 2])
def test_death_while_the_earlier_ones_move_on(tmp_path: Path, kept: int) -> None:
    """Whatever stands under any name is whole; the newest two are among them; the next save clears
    up and counts right.
    """
    deaths = 0
    for at in range(1, 100):
        root = tmp_path / str(at)
        both = CheckpointFolder(root, kept)
        for number in range(1, 4):
            both.save_last(value(number), {"number": number})
        pid = in_child(dying(at, lambda: both.save_last(value(4), {"number": 4})))  # noqa: B023
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = {whole(root / name) for name in os.listdir(root) if not name.startswith(".")} | {
            whole(root / "last")
        }
        assert max(found) >= 3 and whole(root / "last") in (3, 4) and len(found) >= kept, (
            at,
            found,
        )
        both.save_last(value(5), {"number": 5})
        names = names_of(root)
        assert (
            names == ["last", *(f"last.{n}" for n in range(1, len(names)))]
            and len(names) <= kept + 1
        ), at
        numbers = [whole(root / name) for name in names]
        assert (
            numbers[0] == 5
            and numbers == sorted(numbers, reverse=True)
            and len(names) >= min(kept, 1) + 1
        ), at
        if status == 0:
            break
        assert status == 9
        deaths += 1
        shutil.rmtree(root)
    assert 8 <= deaths < 90


def test_death_while_one_is_put_back(tmp_path: Path) -> None:
    for at in range(1, 100):
        root = tmp_path / str(at)
        both = CheckpointFolder(root)
        for number in (1, 2):
            both.save_last(value(number), {"number": number})
        flip(root / "last" / "state.json", 400)
        pid = in_child(dying(at, lambda: both.put_back("last.1")))  # noqa: B023
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert both.resumable() and both.load_first(("last", "earlier", "best"))[1] == {
            "number": 1
        }, at
        both.put_back("last.1")
        both.save_last(value(3), {"number": 3})
        assert names_of(root) == ["last", "last.1"]
        assert [whole(root / name) for name in names_of(root)] == [3, 1]
        if status == 0:
            break
    assert at > 4


@pytest.mark.parametrize("kind", ["replace", "first", "best"])
def test_death_between_any_two_steps(tmp_path: Path, kind: str) -> None:
    deaths = 0
    for at in range(1, 100):
        root = tmp_path / str(at)
        both = CheckpointFolder(root)
        if kind != "first":
            both.save_last(value(1), {"number": 1})
            both.save_best()
        if kind == "best":
            both.save_last(value(2), {"number": 2})
        which = "best" if kind == "best" else "last"
        work = both.save_best if kind == "best" else lambda: both.save_last(value(2), {"number": 2})  # noqa: B023
        pid = in_child(dying(at, work))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if kind != "first" or both.exists(which):
            assert whole(root / which) in ((2,) if status == 0 or kind == "first" else (1, 2)), at
        if kind == "best":
            assert whole(root / "last") == 2
        work()  # the next save finds its way and clears up
        assert whole(root / which) == 2
        assert not [name for name in os.listdir(root) if name.startswith(".")]
        if status == 0:
            break
        assert status == 9
        deaths += 1
        shutil.rmtree(root)
    assert 8 <= deaths < 60


def test_empty_folder_in_the_way_does_not_cost_the_old_one(tmp_path: Path) -> None:
    save(tmp_path / "c", value(1), {"number": 1})
    os.rename(tmp_path / "c", tmp_path / ".c.old")  # as a crash between the two renames leaves it
    (tmp_path / "c").mkdir()
    assert whole(tmp_path / "c") == 1
    pid = in_child(dying(3, lambda: save(tmp_path / "c", value(2), {"number": 2})))
    os.waitpid(pid, 0)
    assert whole(tmp_path / "c") == 1


def test_failure_keeps_the_old_and_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c", value(1), {"number": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                save(tmp_path / "c", value(2), {"number": 2})
        assert whole(tmp_path / "c") == 1
        assert os.listdir(tmp_path) == ["c"]


def test_reader_beside_a_writer(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    save(folder, value(0), {"number": 0})

    def endless() -> None:
        for number in range(1, 100_000):
            save(folder, value(number), {"number": number})

    pid = in_child(endless)
    try:
        seen = {whole(folder) for _ in range(150)}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(seen) > 3


def test_bad_checkpoints_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(InputError, match="no such file"):
        load(folder)

    def broken(change: Callable[[], object], match: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, value(1), {"number": 1})
        without_checksums(folder)
        assert whole(folder) == 1
        change()
        with pytest.raises(InputError, match=match):
            load(folder)

    weights, state = folder / "tensors.safetensors", folder / "state.json"

    def edit(**entries: object) -> None:
        state.write_text(json.dumps({**json.loads(state.read_text()), **entries}))

    broken(lambda: os.truncate(weights, weights.stat().st_size - 4), "whole safetensors")
    broken(lambda: os.truncate(weights, 5), "whole safetensors")
    broken(weights.unlink, "tensors.safetensors.*no such file")
    broken(state.unlink, "state.json.*no such file")
    broken(lambda: os.truncate(state, 40), "state.json: expected JSON, got")
    broken(lambda: edit(version=2), "version 1, got 2")
    broken(lambda: edit(format="other"), 'format xmlkernels checkpoint, got "other"')
    broken(lambda: edit(identity="0"), "another checkpoint")
    scalar = {"shape": [], "dtype": "int64"}
    broken(
        lambda: edit(tensors={"w": {"shape": [150, 2], "dtype": "float32"}, "n": scalar}),
        "1 differ",
    )
    broken(
        lambda: edit(tensors={"w": {"shape": [300], "dtype": "float32"}}),
        "whole safetensors file, got .*1,200 of them",
    )
    broken(
        lambda: edit(tensors={"w": {"shape": [2**40, 2**40], "dtype": "float32"}}),
        "whole safetensors file, got",
    )
    broken(
        lambda: edit(tensors={"w": {"shape": [300], "dtype": "float33"}}),
        "a format that torch knows, got 'float33'",
    )
    broken(
        lambda: os.truncate(weights, 1 << 40), "whole safetensors file, got 1,099,511,627,776 bytes"
    )
    broken(
        lambda: state.write_text('{"format": "xmlkernels checkpoint", "version": 1}'),
        "a key 'identity', got none",
    )
    broken(lambda: state.write_text("[]"), "format xmlkernels checkpoint, got a list")
    broken(
        lambda: edit(tensors={"w": {"shape": [-1], "dtype": "float32"}}),
        r"tensors.w.shape\[0\]: expected .*>= 0, got -1",
    )
    broken(lambda: edit(alias={"x": 3}), r"alias.x: expected a text, got 3")
    broken(lambda: edit(alias={"x": "nowhere"}), "an alias of a tensor, got 'nowhere'")
    broken(lambda: edit(state=[]), r"state: expected an object, got a list of 0")
    broken(lambda: edit(state={"x": {"__float__": "much"}}), "nan, inf or -inf, got 'much'")
    broken(lambda: state.write_text("[" * 100_000), "at most 100 levels")
    broken(lambda: state.write_bytes(b"\xff\xfe"), "JSON in UTF-8")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """200 anywhere in either file, headers and checksums too; the same for damage by whole bytes,
    and for mixed files.
    """
    folder, random_ = tmp_path / "c", random.Random(0)
    tensors = {
        **value(1),
        "same": torch.ones(3),
        "half": torch.ones(5).bfloat16(),
        "empty": torch.empty(0, 4),
    }
    tensors["alias"] = tensors["same"]
    save(folder, tensors, {"number": 1, "rates": [0.5, None, math.nan]})
    assert whole(folder) == 1
    for name in ("tensors.safetensors", "state.json"):
        content = (folder / name).read_bytes()
        for bit in random_.sample(range(8 * len(content)), 200):
            flip(folder / name, bit)
            with pytest.raises(InputError):
                load(folder)
            (folder / name).write_bytes(content)
        for damaged in (content[:-1], content + b" ", b"\0" * len(content), b""):
            (folder / name).write_bytes(damaged)
            with pytest.raises(InputError):
                load(folder)
            (folder / name).write_bytes(content)
    assert whole(folder) == 1
    save(tmp_path / "other", tensors, {"number": 1, "rates": [0.5, None, 1.0]})
    shutil.copy(tmp_path / "other" / "state.json", folder)
    with pytest.raises(InputError, match="another checkpoint"):
        load(folder)


def test_only_what_is_read_is_compared(tmp_path: Path) -> None:
    save(tmp_path / "c", value(1), {"number": 1})
    path = tmp_path / "c" / "tensors.safetensors"
    flip(path, 8 * path.stat().st_size - 1)  # in w, whose values come last
    assert load(tmp_path / "c", keep=lambda name: name == "n")[0]["n"] == 1
    with pytest.raises(InputError, match="tensor w: expected the content of checksum"):
        load(tmp_path / "c")


def test_checksums_of_some_are_no_checkpoint(tmp_path: Path) -> None:
    """Otherwise damage could make a checkpoint look like one from before there were any."""
    save(tmp_path / "c", value(1), {"number": 1})
    path = tmp_path / "c" / "state.json"
    head = json.loads(path.read_text())
    for told in head["tensors"].values():
        told["xxh3_129"] = told.pop("xxh3_128")
        path.write_text(json.dumps(head))
        with pytest.raises(InputError, match="checksum"):
            load(tmp_path / "c")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        both = CheckpointFolder(tmp_path / "run")
        both.save_last(value(1), {"number": 1})
        both.save_best()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) == 4 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def names_of(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_earlier_checkpoints_are_kept_and_counted(tmp_path: Path) -> None:
    for keep in (0, 1, 3):
        both = CheckpointFolder(tmp_path / str(keep), keep)
        for number in range(1, 8):
            both.save_last(value(number), {"number": number})
            if number == 2:
                both.save_best()
            kept = [f"last.{n}" for n in range(1, keep + 1) if number - n >= 1]
            assert names_of(both.folder) == [*(["best"] if number >= 2 else []), "last", *kept]
            assert [whole(both.folder / name) for name in ("last", *kept)] == list(
                range(number, number - len(kept) - 1, -1)
            )
    CheckpointFolder(tmp_path / "3", 1).save_last(value(8), {"number": 8})  # fewer from now on
    assert names_of(tmp_path / "3") == ["best", "last", "last.1"]
    assert whole(tmp_path / "3" / "last.1") == 7


def test_a_folder_of_something_else_among_the_earlier_ones_stays(tmp_path: Path) -> None:
    both = CheckpointFolder(tmp_path, 0)
    (tmp_path / "last.7").mkdir()
    (tmp_path / "last.7" / "thesis.txt").write_text("mine")
    for number in (1, 2):
        both.save_last(value(number), {"number": number})
    assert names_of(tmp_path) == ["last", "last.7"]
    assert names_of(tmp_path / "last.7") == ["thesis.txt"]


def test_the_first_whole_one_is_found_and_put_back(tmp_path: Path) -> None:
    both, order = CheckpointFolder(tmp_path / "run", 2), ("last", "earlier", "best")
    for number in (1, 2, 3, 4):
        both.save_last(value(number), {"number": number})
        if number == 1:
            both.save_best()
    assert both.load_first(order)[1:] == ({"number": 4}, "last", None)
    for name, number in (("last", 3), ("last.1", 2), ("last.2", 1)):
        flip(tmp_path / "run" / name / "tensors.safetensors", 5000)
        _, state, which, reason = both.load_first(order)
        assert state == {"number": number}
        assert which == {3: "last.1", 2: "last.2", 1: "best"}[number]
        assert reason is not None and "run/last/tensors" in str(reason)
    both.put_back("best")
    assert whole(tmp_path / "run" / "last") == whole(tmp_path / "run" / "best") == 1
    both.save_last(value(5), {"number": 5})
    assert whole(tmp_path / "run" / "last") == 5 and whole(tmp_path / "run" / "last.1") == 1
    for name in ("last", "last.1", "last.2", "best"):
        (tmp_path / "run" / name / "state.json").unlink()
    with pytest.raises(InputError, match="run/last/state.json"):
        both.load_first(order)
    # There is something that must not be started over.
    assert both.exists("last")
    assert both.resumable()
    shutil.rmtree(tmp_path / "run" / "last")
    with pytest.raises(InputError, match="last.1/state.json"):
        both.load_first(order)


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in (home, tmp_path / "file"):
        with pytest.raises(InputError, match="choose another"):
            save(place, value(1), {"number": 1})
    (home / "state.json").write_text("{}")
    with pytest.raises(InputError, match="choose another"):
        save(home, value(1), {"number": 1})
    assert (home / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InputError, match="dense"):
        save(tmp_path / "c", {"s": torch.eye(2).to_sparse()}, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "home"]


def test_last_and_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = CheckpointFolder(tmp_path / "run")
    assert not both.exists("last")
    with pytest.raises(InputError, match="save_last first"):
        both.save_best()
    both.save_last(value(1), {"number": 1})
    both.save_best()
    name = checkpoint.TENSORS
    assert os.path.samefile(tmp_path / "run/last" / name, tmp_path / "run/best" / name)
    both.save_last(value(2), {"number": 2})
    assert whole(tmp_path / "run/last") == 2 and whole(tmp_path / "run/best") == 1

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    both.save_best()
    assert whole(tmp_path / "run/best") == 2
    both.save_last(value(3), {"number": 3})
    assert both.load("best")[1] == {"number": 2} and both.load()[1] == {"number": 3}
    with pytest.raises(InputError, match="'last' or 'best'"):
        both.load("first")


def draws() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(3).tolist(),
    ]


def test_generators(tmp_path: Path) -> None:
    draws()
    torch.randn(1)
    save(tmp_path / "c", {}, {"rng": rng_state()})
    first = draws()
    assert draws() != first
    set_rng_state(load(tmp_path / "c")[1]["rng"])
    assert draws() == first

    good = rng_state()
    expected = draws()
    set_rng_state(good)
    for bad in [
        {},
        {**good, "torch": "AAAA"},
        {**good, "numpy": {}},
        {**good, "cuda": ["AAAA"] * 99},
    ]:
        with pytest.raises(InputError, match="generator"):
            set_rng_state(bad)
    assert draws() == expected  # a refused state changes nothing


def trained(names: list[str], seed: int) -> tuple[nn.ModuleDict, torch.optim.AdamW]:
    torch.manual_seed(seed)
    module = nn.ModuleDict({n: nn.Linear(3, 3) if n != "norm" else nn.LayerNorm(3) for n in names})
    optimizer = encoder_optimizer(module, 1e-2, 0.1)
    for _ in range(seed):
        for name, p in module.named_parameters():
            p.grad = None if name.startswith("idle") else torch.randn_like(p)
        optimizer.step()
    return module, optimizer


def test_optimizer_state_by_name(tmp_path: Path) -> None:
    module, optimizer = trained(["a", "norm", "idle", "b"], 3)
    tensors = optimizer_tensors(optimizer, module.named_parameters())
    assert {
        "a.weight/exp_avg",
        "norm.weight/exp_avg_sq",
        "b.bias/step",
        "idle.weight/none",
    } < tensors.keys()
    save(tmp_path / "c", {**dict(module.state_dict()), **tensors}, {})
    found, _ = load(tmp_path / "c")
    # The other model registers its parts in another order: numbers would mix them up, names do not.
    other, twin = trained(["b", "idle", "norm", "a"], 0)
    other.load_state_dict({k: found[k] for k in module.state_dict()})
    load_optimizer_tensors(
        twin, other.named_parameters(), {k: v for k, v in found.items() if "/" in k}
    )
    own = dict(module.named_parameters())
    for name, p in other.named_parameters():
        assert twin.state[p].keys() == optimizer.state[own[name]].keys()
        for key, kept in optimizer.state[own[name]].items():
            assert twin.state[p][key].dtype == kept.dtype and torch.equal(twin.state[p][key], kept)
    torch.manual_seed(9)
    grads = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    for m, o in ((module, optimizer), (other, twin)):
        for name, p in m.named_parameters():
            p.grad = grads[name].clone()
        o.step()
    assert all(torch.equal(own[n], p) for n, p in other.named_parameters())


def test_optimizer_state_is_strict() -> None:
    module, optimizer = trained(["a", "b"], 1)
    tensors = optimizer_tensors(optimizer, module.named_parameters())
    before = {k: v.clone() for k, v in tensors.items()}
    less = {k: v for k, v in tensors.items() if not k.startswith("b.bias")}
    for bad, match in [
        (less, r"none for \['b.bias'\]"),
        ({**tensors, "c.weight/step": torch.ones(())}, r"beyond them \['c.weight'\]"),
        ({**tensors, "a.weight/exp_avg": torch.ones(2, 3)}, "a.weight/exp_avg"),
    ]:
        with pytest.raises(InputError, match=match):
            load_optimizer_tensors(optimizer, module.named_parameters(), bad)
    assert all(
        torch.equal(v, before[k])
        for k, v in optimizer_tensors(optimizer, module.named_parameters()).items()
    )
    with pytest.raises(InputError, match="a name for every parameter"):
        optimizer_tensors(optimizer, list(module.named_parameters())[:1])


def test_a_choice_of_tensors(tmp_path: Path) -> None:
    """Only what is asked for comes back, also where two names share one tensor."""
    weight = torch.arange(6.0)
    save(
        tmp_path / "c",
        {"a.weight": weight, "b.weight": weight, "optimizer.a": torch.ones(3)},
        {"step": 4},
    )
    tensors, state = load(tmp_path / "c", lambda name: name == "b.weight")
    assert list(tensors) == ["b.weight"]
    assert torch.equal(tensors["b.weight"], weight)
    assert state == {"step": 4}
    assert load(tmp_path / "c")[0].keys() == {"a.weight", "b.weight", "optimizer.a"}


def test_a_foreign_file_in_a_checkpoint_stops_no_save(tmp_path: Path) -> None:
    """A file manager writes into any folder; what is beside the checkpoint's own files is moved
    aside with it.
    """
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in range(5):
        folder.save_last({"w": torch.full((2,), float(step))}, {"step": step})
        if step == 1:
            (tmp_path / "last" / ".DS_Store").write_text("somebody's")
    assert folder.load("last")[1]["step"] == 4 and folder.load("last.1")[1]["step"] == 3
    (aside,) = tmp_path.glob("last.aside-*")
    assert (aside / ".DS_Store").read_text() == "somebody's" and load(aside)[1]["step"] == 1
