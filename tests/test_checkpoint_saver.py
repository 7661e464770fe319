"""Saves beside a loop: what is written is what stood there when the save was asked for."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_groups import Board, cuts, of_process, same, tables, together
from patience import PATIENCE

from xmlkernels.checkpoint import CheckpointFolder, Saver, new_identity, snapshot, writing
from xmlkernels.rows import FileRows, stand_in

Held = dict[str, torch.Tensor]


class Gate:
    """Holds the values of every file back until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        put = writing.TensorFile.write_values

        def held(file: writing.TensorFile, *, blocks: bool) -> dict[str, list[str]]:
            self.reached.set()
            assert self.open.wait(PATIENCE)
            return put(file, blocks=blocks)

        patch.setattr(writing.TensorFile, "write_values", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = Gate(monkeypatch)
    yield held
    held.open.set()


def values(number: int) -> Held:
    found = tables(number)
    found["transposed"] = torch.randn(3, 4).t()
    found["none"] = torch.empty(0, 3)
    return found


def copies(tensors: Held) -> Held:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def save(saves: Saver, tensors: Held, number: int, **more: Any) -> None:
    saves.save(tensors, {"number": number}, {}, new_identity(), step=number, **more)


def whole(folder: CheckpointFolder, which: str, expected: Held) -> bool:
    found, _ = folder.load(which)
    return found.keys() == expected.keys() and all(
        same(found[name], expected[name].contiguous()) for name in expected
    )


def test_a_loop_goes_on_while_it_is_written(tmp_path: Path, gate: Gate) -> None:
    folder, asked = CheckpointFolder(tmp_path), []
    saves = Saver(folder, None, lambda size: not asked.append(size))
    tensors = values(1)
    saves.prepare(tensors)
    bytes_ = sum(t.numel() * t.element_size() for t in tensors.values())
    assert len(asked) == 1 and bytes_ <= asked[0] <= bytes_ + 64 * len(tensors)
    before, state = copies(tensors), {"number": 1, "list": [1]}
    saves.save(tensors, state, {}, new_identity(), step=1, best=True)
    assert gate.reached.wait(PATIENCE) and not folder.exists("last")
    assert (saves.begun, saves.saved, saves.failed, saves.waits) == (1, None, False, False)
    state["list"].append(2)
    for tensor in tensors.values():
        tensor.copy_(torch.zeros_like(tensor))
    with pytest.raises(AssertionError, match="not waited for"):
        save(saves, tensors, 2)
    gate.open.set()
    saves.settle()
    assert saves.saved == 1 and folder.load()[1] == {"number": 1, "list": [1]}
    assert whole(folder, "last", before) and whole(folder, "best", before)
    # The same memory takes the next copy, and a larger one finds its place.
    held = saves._snapshot._held
    save(saves, tensors, 2)
    saves.settle()
    assert saves._snapshot._held is held and whole(folder, "last", tensors)
    assert whole(folder, "best", before) and folder.load("last.1")[1]["number"] == 1
    larger = tensors | {"more": torch.randn(5000)}
    save(saves, larger, 3)
    saves.settle()
    saves.settle()  # nothing is under way
    assert saves._snapshot._held is not held and whole(folder, "last", larger)


@pytest.mark.parametrize("why", ["no room", "rows in a file"])
def test_where_there_is_no_copy_the_loop_waits(tmp_path: Path, why: str) -> None:
    asked: list[int | None] = []

    def room(size: int | None) -> bool:
        asked.append(size)
        return why != "no room"

    saves, tensors = Saver(CheckpointFolder(tmp_path / "c"), None, room), values(1)
    expected = copies(tensors)
    if why != "no room":
        path = tmp_path / "rows"
        path.write_bytes(tensors["table.float32"].numpy().tobytes())
        rows = FileRows(path, tensors["table.float32"].shape, torch.float32)
        tensors["table.float32"] = stand_in(rows)
    save(saves, tensors, 1)  # prepares itself
    assert saves.waits and saves.saved == 1
    assert [size is None for size in asked] == [why != "no room"]
    assert whole(CheckpointFolder(tmp_path / "c"), "last", expected)
    saves.settle()


@pytest.mark.parametrize("beside", [True, False])
def test_an_error_waits_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    folder = CheckpointFolder(tmp_path)
    saves, tensors = Saver(folder, None, lambda size: beside), values(1)
    save(saves, tensors, 1)
    saves.settle()

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "pwrite", full)
        save(saves, tensors, 2)
        if saves._now is not None and saves._now.thread is not None:
            saves._now.thread.join(60)
    assert saves.failed and saves.begun == 2
    with pytest.raises(OSError, match="No space left on device: .*last/tensors.safetensors'"):
        saves.settle()
    assert not saves.failed and saves.saved == 1 and folder.load()[1] == {"number": 1}
    save(saves, tensors, 3)
    saves.end()
    assert saves.saved == 3 and folder.load()[1] == {"number": 3}


def test_several_save_beside_their_loops(tmp_path: Path) -> None:
    identity = new_identity()

    def one(board: Board) -> None:
        saves = Saver(CheckpointFolder(tmp_path), board, lambda size: True)
        held, own = of_process(cuts(board.size)[board.rank], 4)
        saves.save(held, {"number": 4}, own, identity, step=4, best=True)
        for tensor in held.values():
            tensor.copy_(torch.zeros_like(tensor))
        saves.settle()
        assert saves.saved == 4

    assert together(3, one) == [None] * 3
    for which in ("last", "best"):
        assert whole(CheckpointFolder(tmp_path), which, tables(4))


def test_a_best_one_that_cannot_be_linked_is_told_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = new_identity()

    def refused(self: CheckpointFolder) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(CheckpointFolder, "save_best", refused)

    def one(board: Board) -> None:
        saves = Saver(CheckpointFolder(tmp_path), board, lambda size: True)
        held, own = of_process(cuts(board.size)[board.rank], 4)
        saves.save(held, {"number": 4}, own, identity, step=4, best=True)
        saves.settle()

    assert [getattr(error, "errno", None) for error in together(2, one)] == [122, 122]


def test_a_save_is_given_up_where_a_process_is_lost(tmp_path: Path) -> None:
    """It waits for no part that does not come, leaves the old checkpoint, and clears up."""
    board = Board(0, 2, {})
    saves = Saver(CheckpointFolder(tmp_path), board, lambda size: True)
    held, own = of_process(cuts(2)[0])
    saves.save(held, {}, own, new_identity(), step=1)
    thread = saves._now.thread
    thread.join(0.2)
    assert thread.is_alive()
    saves.give_up()
    assert not thread.is_alive() and saves.saved is None and list(tmp_path.iterdir()) == []
    saves.settle()


def test_large_tensors_are_copied_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_PART", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    folder = CheckpointFolder(tmp_path)
    saves, tensors = Saver(folder, None, lambda size: True), values(3)
    tensors["large"] = torch.randn(1234, 7)
    save(saves, tensors, 1)
    saves.settle()
    assert whole(folder, "last", tensors)


def test_a_copy_knows_its_size() -> None:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(65, dtype=torch.uint8), "c": torch.empty(0)}
    assert snapshot.snapshot_bytes(tensors) == 64 + 128
    assert snapshot.snapshot_bytes({}) == 0
