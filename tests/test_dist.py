"""Several processes on one CPU: what they compute together is what one computes alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from processes import CPU, together

from xmlkernels import InputError, dist
from xmlkernels.dist import group


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gathering() -> None:
    whole = _numbers(7, 3)
    counts = [s.stop - s.start for s in dist.parts(7)]
    assert torch.equal(dist.gather_rows(whole[dist.part(7)], counts), whole)
    assert torch.equal(
        dist.gather_rows(torch.full((2,), dist.rank())),
        torch.arange(dist.size()).repeat_interleave(2),
    )
    few = dist.parts(1)  # the second process has no row at all
    assert torch.equal(
        dist.gather_rows(whole[: few[dist.rank()].stop - few[dist.rank()].start], [1, 0, 0]),
        whole[:1],
    )


def _ragged() -> None:
    whole = _numbers(6, 2)
    # one, none, five: no process knows what the others have.
    own = slice(*[(0, 1), (1, 1), (1, 6)][dist.rank()])
    assert torch.equal(dist.gather_ragged(whole[own]), whole)
    assert dist.gather_texts("é" * dist.rank()) == ["", "é", "éé"]
    values, names = np.full((6, 2), np.nan), np.zeros(6, np.int64)
    for array, all_rows in ((values, whole.numpy()), (names, np.arange(6))):
        array[5 - np.arange(6)[own]] = all_rows[5 - np.arange(6)[own]]
    parts = [5 - np.arange(6)[own]]
    dist.fill_rows(parts if dist.rank() != 1 else [], values, names)
    assert np.array_equal(values, whole.numpy()) and names.tolist() == list(range(6))
    assert dist.from_first(dist.rank() == 0) and not dist.from_first(dist.rank() > 0)


def _first_alone(folder: str) -> None:
    with dist.first_alone():
        stands = Path(folder, "made").exists()
        Path(folder, "made").touch()
    assert stands == (dist.rank() > 0)


def _drifting() -> None:
    same = {"weight": torch.ones(3).bfloat16(), "count": torch.tensor(3), "none": torch.empty(0)}
    dist.agree_on_tensors(same)
    with pytest.raises(RuntimeError, match="different copies of count"):
        dist.agree_on_tensors(same | {"count": torch.tensor(3 + dist.rank())})


def _sums() -> None:
    mine = torch.full((3,), float(dist.rank() + 1))
    assert dist.sum_(mine) is mine and mine.tolist() == [6.0] * 3
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 3)] + [
        torch.nn.Parameter(torch.zeros(2).double())
    ]
    frozen = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    parameters[0].grad = torch.full((2,), float(dist.rank()))
    if dist.rank() == 1:  # the others count as zero
        parameters[1].grad = torch.ones(3)
    parameters[2].grad = torch.full((2,), float("nan") if dist.rank() == 2 else 1.0).double()
    dist.sum_gradients([*parameters, frozen])
    assert parameters[0].grad.tolist() == [3.0, 3.0] and parameters[1].grad is not None
    assert parameters[1].grad.tolist() == [1.0] * 3 and frozen.grad is None
    # Every process learns of an overflow.
    assert parameters[2].grad is not None
    assert parameters[2].grad.isnan().all()


def _agreeing() -> None:
    dist.agree("--dataset", "the same", CPU)
    with pytest.raises(InputError, match="--dataset: .*another on processes 1 and 2 than"):
        dist.agree("--dataset", f"mine is {min(dist.rank(), 1)}", CPU)
    with pytest.raises(InputError, match="another on process 2 than on process 0"):
        dist.agree("--dataset", f"mine is {dist.rank() // 2}", CPU)
    with pytest.raises(InputError, match="gather_rows"):
        dist.gather_rows(torch.zeros(5, 1), [1] * dist.size())


def _scattering() -> None:
    """Numbers whose sums are exact: the order of additions cannot show."""
    for documents in (7, 2):  # a process without a row
        every = [_numbers(documents, 3, seed=s).round() for s in range(dist.size())]
        whole = torch.stack(every).sum(0)
        own = dist.part(documents)
        with dist.counted() as found:
            assert torch.equal(dist.scatter_sum(every[dist.rank()]).rows(), whole[own])
        received = (dist.size() - 1) * (own.stop - own.start) * 3 * 4
        assert found == {"gathered": 0, "scattered": received, "summed": 0, "routed": 0}
    # In the order of the processes, which loses the 1; any other order keeps it.
    last = torch.full((3, 1), [1e8, 1.0, -1e8][dist.rank()])
    own = dist.part(3)
    assert dist.scatter_sum(last).rows().tolist() == [[0.0]] * (own.stop - own.start)
    with pytest.raises(InputError, match="scatter_sum: counts: expected 3 rows in 3 parts"):
        dist.scatter_sum(last, [1, 1, 2])


def _merging() -> None:
    """The best of all, of equal ones the lower row; pads last."""
    values = [[2.0, 1.0], [2.0, -torch.inf], [3.0, 2.0]][dist.rank()]
    rows = [[7, 8], [1, -1], [20, 4]][dist.rank()]
    best, which = dist.merge_topk(torch.tensor([values, values]), torch.tensor([rows, rows]), 4)
    assert best.tolist() == [[3.0, 2.0, 2.0, 2.0]] * 2 and which.tolist() == [[20, 1, 4, 7]] * 2
    best, which = dist.merge_topk(torch.tensor([values]), torch.tensor([rows]), 7)
    assert which.tolist() == [[20, 1, 4, 7, 8, -1, -1]] and best[0, 5:].isinf().all()


def _collecting() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64):
        whole = (10 * _numbers(7, 3)).to(dtype)
        counts = [0, 5, 2]
        first = sum(counts[: dist.rank()])
        found = dist.collect_rows(whole[first : first + counts[dist.rank()]], counts)
        assert (found is None) == (dist.rank() > 0)
        if found is not None:
            assert found.dtype == dtype and torch.equal(found.float(), whole.float())


def _counting() -> None:
    before = dist.traffic()
    with dist.counted() as found:
        dist.gather_rows(torch.zeros(2 + (dist.rank() == 0), 5), [3, 2, 2])
        dist.sum_(torch.zeros(7))
    # A ring of three: two thirds of the bytes twice, rounded up.
    assert found == {"gathered": 2 * 3 * 5 * 4, "scattered": 0, "summed": 38, "routed": 0}
    assert dist.traffic()["gathered"] == before["gathered"] + found["gathered"]


def _all(folder: str) -> None:
    for work in (_scattering, _merging, _collecting, _counting):
        work()
    for work in (_gathering, _ragged, _sums, _agreeing, _drifting):
        work()
    _first_alone(folder)


def test_three_processes(tmp_path: Path) -> None:
    together(3, _all, tmp_path, str(tmp_path))


def test_alone_everything_is_itself() -> None:
    dist.start(CPU)
    assert not dist.running() and (dist.rank(), dist.size(), dist.part(5)) == (0, 1, slice(0, 5))
    x = torch.ones(2, 3)
    assert dist.gather_rows(x) is x and dist.sum_(x) is x
    assert dist.gather_ragged(x) is x
    assert dist.gather_texts("a") == ["a"]
    assert dist.from_first(True)
    assert not dist.from_first(False)
    array = np.full(3, 7)
    dist.fill_rows([np.array([1])], array)
    assert array.tolist() == [7, 7, 7] and dist.launched() == (0, 1)
    with dist.first_alone():
        pass
    assert dist.scatter_sum(x).rows() is x and dist.collect_rows(x, [2]) is x
    values, rows = dist.merge_topk(torch.tensor([[1.0, 5.0]]), torch.tensor([[9, 3]]), 3)
    assert values.tolist() == [[5.0, 1.0, -torch.inf]] and rows.tolist() == [[3, 9, -1]]
    assert not any(dist.traffic().values())
    assert not any(dist.step_traffic(5, [3], 1, summed=8).values())
    dist.agree_on_tensors({"x": x})
    dist.agree("--dataset", "anything", CPU)
    dist.sum_gradients([torch.nn.Parameter(x)])
    dist.wait()
    dist.stop()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_cover_everything_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "size", lambda: size)
    for count in (0, 1, 4, 5, 11):
        found = [i for s in dist.parts(count) for i in range(count)[s]]
        lengths = [s.stop - s.start for s in dist.parts(count)]
        assert found == list(range(count))
        assert len(lengths) == size
        assert max(lengths) - min(lengths) <= 1


def test_an_environment_that_torchrun_did_not_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="no RANK, .*MASTER_PORT.*torchrun"):
        dist.start(CPU)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="numbers as RANK and WORLD_SIZE"):
        dist.launched()
