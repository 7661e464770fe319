"""Tables in parts: written by any number of processes, read by any other, verified by blocks."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from checkpoint_groups import ROWS, Board, cuts, of_process, same, save_by, tables, together
from damage import flip
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from xmlkernels import dist
from xmlkernels.checkpoint import CheckpointFolder, load, new_identity, save, shards, writing
from xmlkernels.errors import InputError
from xmlkernels.nn.shard import Shard
from xmlkernels.rows import FileRows, in_memory, rows_behind, stand_in


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum for every one to six rows, so that each part has several."""
    monkeypatch.setattr(writing, "BLOCK", 32)


@pytest.mark.parametrize("written", [1, 2, 3, 4])
def test_any_number_of_processes_reads_what_any_number_wrote(tmp_path: Path, written: int) -> None:
    save_by(written, tmp_path / "c", 3)
    files = sorted(os.listdir(tmp_path / "c"))
    many = [f"shard-{rank:05}-of-{written:05}.safetensors" for rank in range(written)]
    assert files == [*(many if written > 1 else []), "state.json", "tensors.safetensors"]
    expected, state = tables(3), {"number": 3}
    found, told = load(tmp_path / "c")
    assert told == state and found.keys() == expected.keys() and found["again"] is found["encoder"]
    assert all(same(found[name], expected[name]) for name in expected)
    for readers in (1, 2, 3, 4):
        for shard in cuts(readers):
            held, rows = of_process(shard, 3)
            found, told = load(tmp_path / "c", rows=rows)
            assert told == state and found.keys() == held.keys()
            assert all(same(found[name], held[name]) for name in held), (readers, shard)
            assert all(
                t.is_contiguous() and t.shape[0] == shard.count
                for name, t in found.items()
                if name in rows
            )


def test_one_process_writes_what_was_always_written(tmp_path: Path) -> None:
    """Readers from before there were shards read it: two files of version 1."""
    save_by(1, tmp_path / "c")
    save(tmp_path / "plain", tables(), {"number": 0})
    facts = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("c", "plain")]
    assert facts[0]["version"] == facts[1]["version"] == 1
    assert facts[0]["tensors"] == facts[1]["tensors"] and "files" not in facts[0]
    held, own = of_process(Shard(0, 4, ROWS))
    with pytest.raises(InputError, match="all rows of it, or the other processes, got some rows"):
        save(tmp_path / "some", held, {}, shards=own)
    with pytest.raises(InputError, match=r"tensor 'table.bias': expected rows 0 to 5 of it, got 4"):
        save(tmp_path / "some", held, {}, shards={"table.bias": Shard(0, 5, ROWS)})
    assert not (tmp_path / "some").exists()


def test_what_is_read_is_verified_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range of rows costs its blocks: damage elsewhere is nobody's matter."""
    save_by(2, tmp_path / "c")
    seen: list[int] = []
    real = shards.checksum_of
    monkeypatch.setattr(
        shards, "checksum_of", lambda tensor: (seen.append(len(tensor)), real(tensor))[1]
    )
    rows = {name: Shard(10, 12, ROWS) for name in tables() if name.startswith("table.")}
    load(tmp_path / "c", rows=rows)
    # A block of fp32 has one row of 20 bytes, one of the halves 3, one of e4m3 6, one of biases 8;
    # the second part begins at row 9.
    assert sorted(seen) == sorted([1, 1, 3, 3, 6, 8])
    path = tmp_path / "c" / "shard-00001-of-00002.safetensors"
    with safe_open(path, "pt") as file:
        first = file.get_tensor("table.float32")
    place = path.read_bytes().index(first[13:14].numpy().tobytes())  # row 22 of the table
    flip(path, 8 * place)
    load(tmp_path / "c", rows=rows)
    told = "shard-00001-of-00002.safetensors, tensor table.float32, rows 22 to 23: .*checksum"
    for wanted in ({}, {"table.float32": Shard(22, 23, ROWS)}):
        with pytest.raises(InputError, match=told):
            load(tmp_path / "c", rows=wanted)


def test_rows_of_a_table_that_is_stored_whole_are_verified_too(tmp_path: Path) -> None:
    save_by(1, tmp_path / "c")
    rows = {"table.float32": Shard(1, 3, ROWS), "encoder": Shard(2, 4, 7), "again": Shard(0, 1, 7)}
    found, _ = load(tmp_path / "c", rows=rows)
    whole = tables()
    for name, shard in rows.items():
        assert same(found[name], whole[name][shard.first : shard.end]), name
    path = tmp_path / "c" / "tensors.safetensors"
    flip(path, 8 * path.read_bytes().index(whole["table.float32"][20:21].numpy().tobytes()))
    with pytest.raises(InputError, match=r"tensors.safetensors, tensor table.float32: .*checksum"):
        load(tmp_path / "c", rows=rows)
    for name in ("table.bias", "number"):
        with pytest.raises(InputError, match="24 rows, got shape"):
            load(tmp_path / "c", lambda n, name=name: n == name, {name: Shard(0, 1, 24)})


@pytest.mark.parametrize("written", [1, 3])
def test_rows_that_no_memory_holds_go_in_and_come_out(tmp_path: Path, written: int) -> None:
    """Stand-ins are written as what they stand for, and read: as a whole, in ranges, verified."""
    whole, names = tables(), [name for name in tables() if name.startswith("table.")]
    identity = new_identity()

    def one(board: Board) -> None:
        held, own = of_process(cuts(board.size)[board.rank])
        for name in names:
            path = tmp_path / f"{name}-{board.rank}"
            path.write_bytes(b"12345" + held[name].flatten().view(torch.uint8).numpy().tobytes())
            rows = FileRows(path, held[name].shape, held[name].dtype, offset=5)
            held[name] = stand_in(rows)
        save(tmp_path / "c", held, {}, shards=own, group=board, identity=identity)

    assert together(written, one) == [None] * written
    save_by(written, tmp_path / "plain")
    heads = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("c", "plain")]
    for key in ("sharded", "tensors"):
        assert heads[0].get(key) == heads[1].get(key)
    found, _ = load(tmp_path / "c", on_disk=names)
    shutil.rmtree(tmp_path / "plain")
    save(tmp_path / "c", {}, {})  # what stands behind is the file that was opened
    for name in ("encoder", *names):
        assert found[name].is_meta == (name in names)
        assert same(in_memory(found[name]), whole[name]), name
    save_by(written, tmp_path / "c")
    rows = {name: Shard(5, 17, ROWS) for name in names}
    found, _ = load(tmp_path / "c", rows=rows, on_disk=names)
    for name in names:
        behind = rows_behind(found[name])
        assert behind is not None and behind.shape == whole[name][5:17].shape
        part = torch.empty_like(whole[name][6:16])
        behind.read(1, part)
        assert same(part, whole[name][6:16]) and same(in_memory(found[name]), whole[name][5:17])
    last = sorted((tmp_path / "c").glob("*.safetensors"))[-2 if written > 1 else 0]
    flip(last, 8 * last.read_bytes().index(whole["table.float32"][16].numpy().tobytes()))
    with pytest.raises(InputError, match=r"tensor table.float32.*expected the content of checksum"):
        in_memory(load(tmp_path / "c", rows=rows, on_disk=names)[0]["table.float32"])


@pytest.mark.parametrize("blocks", [True, False])
def test_files_are_read_by_the_library_as_its_own(tmp_path: Path, blocks: bool) -> None:
    tensors = {str(kind): torch.randn(9, 3).to(kind) for kind in writing.KINDS}
    tensors |= {"é": torch.tensor(3), "none": torch.empty(0, 4), "bytes": torch.ones(1).bool()}
    metadata = {"identity": "2"}
    save_file(tensors, tmp_path / "theirs", metadata)
    with writing.TensorFile(tmp_path / "ours", tensors, metadata) as file:
        sums = file.write_values(blocks=blocks)
        file.finish(metadata)
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    read, expected = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert read.keys() == expected.keys()
    assert all(same(read[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "ours", "pt") as opened:
        assert opened.metadata() == metadata
    assert sums.keys() == tensors.keys()
    assert {len(found) > 1 for found in sums.values()} == ({True, False} if blocks else {False})
    with (
        pytest.raises(ValueError, match="another length"),
        writing.TensorFile(tmp_path / "longer", tensors, metadata) as file,
    ):
        file.finish({"identity": "2" * 20})
    odd = {"odd": torch.empty(3, dtype=torch.complex128)}
    with pytest.raises(InputError, match="'odd': expected a format of safetensors, got complex128"):
        save(tmp_path / "odd", odd, {})


def meeting_in_real_processes(folder: Path) -> None:
    """Save by as many processes as there are, each its own rows, and read them."""
    board, shard = dist.board(), cuts(dist.size())[dist.rank()]
    assert board is not None and (board.rank, board.size) == (dist.rank(), dist.size())
    assert board.read("nothing") is None
    for number in range(3):
        identity = dist.gather_texts(new_identity())[0]
        held, own = of_process(shard, number)
        save(folder, held, {"number": number}, shards=own, group=board, identity=identity, keep=1)
        found, state = load(folder, rows=own)
        assert state == {"number": number}
        assert all(same(found[name], held[name]) for name in held)
        dist.wait()


def test_real_processes_save_together(tmp_path: Path) -> None:
    processes.together(3, meeting_in_real_processes, tmp_path, tmp_path / "c")
    found, state = load(tmp_path / "c")
    assert state == {"number": 2} and all(same(t, tables(2)[name]) for name, t in found.items())
    assert load(tmp_path / "c.1")[1] == {"number": 1}
    assert sorted(os.listdir(tmp_path)) == ["c", "c.1"]


def test_rows_of_another_table_are_refused(tmp_path: Path) -> None:
    save_by(2, tmp_path / "c")
    with pytest.raises(InputError, match=r"tensor table.bias: expected 24 rows, got shape \[23\]"):
        load(tmp_path / "c", rows={"table.bias": Shard(0, 1, 24)})


def test_every_flipped_bit_of_every_file_is_found(tmp_path: Path) -> None:
    folder, chance = tmp_path / "c", random.Random(0)
    save_by(3, folder)
    for name in sorted(os.listdir(folder)):
        content = (folder / name).read_bytes()
        for bit in chance.sample(range(8 * len(content)), 100):
            flip(folder / name, bit)
            with pytest.raises(InputError, match=f"{folder}"):
                load(folder)
            (folder / name).write_bytes(content)
        for damaged in (content[:-1], content + b" ", b"\0" * len(content), b"", content[:5]):
            (folder / name).write_bytes(damaged)
            with pytest.raises(InputError, match=name):
                load(folder)
            (folder / name).write_bytes(content)
        (folder / name).unlink()
        with pytest.raises(InputError, match=f"{name}.*no such file"):
            load(folder)
        (folder / name).write_bytes(content)
    assert load(folder)[1] == {"number": 0}
    save_by(3, tmp_path / "other")  # the same values and sizes: identities tell them apart
    name = "shard-00001-of-00003.safetensors"
    shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(InputError, match=f"{name}, header: expected the content of checksum"):
        load(folder)


def test_manifests_that_cannot_be_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the checksum of state.json, as a program other than ours might write it."""
    folder = tmp_path / "c"
    save_by(2, folder)
    monkeypatch.setattr("xmlkernels.checkpoint.contents.compare", lambda *_: None)
    path = folder / "state.json"
    whole = path.read_text()

    def refused(change: Callable[[dict[str, Any]], object], match: str) -> None:
        told = json.loads(whole)
        change(told)
        path.write_text(json.dumps(told))
        with pytest.raises(InputError, match=match):
            load(folder)

    def table(told: dict[str, Any]) -> dict[str, Any]:
        return told["sharded"]["table.float32"]

    refused(lambda t: table(t)["parts"].pop(), "parts up to row 23, got 9")
    refused(lambda t: table(t)["parts"].pop(0), "begins at row 0, got a part of rows 9 to 23")
    refused(lambda t: table(t)["parts"].append(table(t)["parts"][0]), "begins at row 9, got .*0 to")
    refused(lambda t: table(t)["parts"][0]["blocks"].pop(), "9 checksums of shard-00000-.*got 8")
    refused(lambda t: table(t).update(block=0), "block: expected .*>= 1, got 0")
    refused(lambda t: table(t).update(block=2), "5 checksums")
    refused(lambda t: table(t).update(shape=[]), "shape: expected .*length >= 1")
    refused(lambda t: table(t).update(shape=[24, 5]), "parts up to row 24, got 23")
    refused(lambda t: table(t).update(shape=[23, 4]), r"shape \[9, 4\], got \[9, 5\]")
    refused(lambda t: table(t).update(dtype="int32"), "int32, got float32")
    refused(lambda t: table(t).update(dtype="nothing"), "a format that torch knows")
    refused(lambda t: t["tensors"].update({"table.bias": t["tensors"]["number"]}), "one place")
    refused(lambda t: t.update(files={}), "files: expected .*length >= 1")
    refused(
        lambda t: t["files"].popitem(), "the size of shard-00001-of-00002.safetensors, got none"
    )
    refused(lambda t: t["files"].update({"../x": {"bytes": 1, "header": "0" * 32}}), "files")
    refused(lambda t: table(t)["parts"][0].update(file="../../etc/passwd"), "file: expected")
    refused(lambda t: table(t)["parts"][0].update(first=2**63), "first: expected")


def test_the_earlier_the_best_and_the_first_whole_one(tmp_path: Path) -> None:
    both = CheckpointFolder(tmp_path, 2)
    for number in range(4):
        save_by(1 + number % 3, tmp_path / "last", number, keep=2)
        if number == 1:
            both.save_best()
    assert sorted(os.listdir(tmp_path)) == ["best", "last", "last.1", "last.2"]
    assert [both.load(name)[1]["number"] for name in ("last", "last.1", "last.2", "best")] == [
        3,
        2,
        1,
        1,
    ]
    linked = "shard-00001-of-00002.safetensors"
    assert os.path.samefile(tmp_path / "best" / linked, tmp_path / "last.2" / linked)
    path = tmp_path / "last.1" / "shard-00002-of-00003.safetensors"
    flip(path, 8 * path.stat().st_size - 5)
    (tmp_path / "last" / "state.json").unlink()
    _, state, which, reason = both.load_first(("last", "earlier", "best"))
    assert state == {"number": 1} and which == "last.2"
    assert reason is not None and "last/state.json" in str(reason)
    # Another process has met damage among its rows: all go on to the next.
    told = iter([InputError("rows 5", "a", "b", "c"), None])
    which, reason = both.load_first(("earlier", "best"), agree=lambda error: error or next(told))[
        2:
    ]
    assert which == "best" and "last.1/shard-00002" in str(reason)
    both.put_back("best")
    assert both.load("last")[1] == {"number": 1}


def test_processes_without_a_common_folder_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmlkernels.checkpoint.together._APPEARS", 0.1)
    identity = new_identity()

    def one(board: Board) -> None:
        held, own = of_process(cuts(2)[board.rank])
        place = tmp_path / str(board.rank) / "c"
        save(place, held, {}, shards=own, group=board, identity=identity)

    (tmp_path / "1").mkdir()
    errors = together(2, one)
    assert all(isinstance(error, InputError) for error in errors)
    told = "one folder for all processes, got another one for process 1"
    assert all(told in str(error) for error in errors)
    assert os.listdir(tmp_path / "0") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_is_met_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The old checkpoint stays, nothing is left beside it, and the next save is a whole one."""
    save_by(2, tmp_path / "c", 1)
    put = writing.TensorFile._put

    def full(self: writing.TensorFile, values: memoryview, place: int) -> int:
        if self.path.name.startswith(f"shard-{rank:05}"):
            raise OSError(28, "No space left on device", str(self.path))
        return put(self, values, place)

    identity = new_identity()

    def one(board: Board) -> None:
        held, own = of_process(cuts(2)[board.rank], 2)
        save(tmp_path / "c", held, {}, shards=own, group=board, identity=identity)

    with monkeypatch.context() as patch:
        patch.setattr(writing.TensorFile, "_put", full)
        errors = together(2, one)
    for error in errors:
        assert isinstance(error, OSError) and error.errno == 28, error
        assert str(error.filename).endswith(f"shard-{rank:05}-of-00002.safetensors")
    assert os.listdir(tmp_path) == ["c"] and load(tmp_path / "c")[1] == {"number": 1}
    save_by(2, tmp_path / "c", 3)
    assert load(tmp_path / "c")[1] == {"number": 3}


def test_a_process_that_ends_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_by(2, tmp_path / "c", 1)
    identity = new_identity()

    def one(board: Board) -> None:
        if board.rank == 1:
            return
        board.lost = True
        held, own = of_process(cuts(2)[board.rank], 2)
        save(tmp_path / "c", held, {}, shards=own, group=board, identity=identity)

    first, _ = together(2, one)
    assert "another process has ended" in str(first)
    assert os.listdir(tmp_path) == ["c"] and load(tmp_path / "c")[1] == {"number": 1}


def test_a_slip_of_one_process_ends_the_save_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, real = new_identity(), shards.write_shard

    def slip(path: Path, *more: Any) -> Any:
        if path.name.startswith("shard-00001"):
            raise ValueError("a slip")
        return real(path, *more)

    monkeypatch.setattr("xmlkernels.checkpoint.together.write_shard", slip)

    def one(board: Board) -> None:
        held, own = of_process(cuts(2)[board.rank], 2)
        save(tmp_path / "c", held, {}, shards=own, group=board, identity=identity)

    first, second = together(2, one)
    assert isinstance(first, RuntimeError) and "ValueError: a slip" in str(first)
    assert isinstance(second, ValueError)


def test_rows_under_one_checksum() -> None:
    assert [writing.block_rows(size) for size in (8, 32, 33, 0)] == [4, 1, 1, 32]
