"""`shortlist_matmul` in autograd: only what is asked for, sparse gradients, optimizers."""

import itertools

import pytest
import torch
from torch import Tensor

from common import DEVICES, DTYPES, name_of
from shortlists import BOTH, backward, forward, make, moved
from xmlkernels import ops

BF16 = torch.bfloat16
LEAVES = ("x", "weight", "bias")
SUBSETS = [c for n in range(4) for c in itertools.combinations(LEAVES, n)]
shared_or_not = pytest.mark.parametrize("shared", BOTH, ids=["per sample", "shared"])


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("needs", SUBSETS, ids=lambda n: "+".join(n) or "none")
def test_only_what_is_asked_for(
    needs: tuple[str, ...], dtype: torch.dtype, shared: bool, device: str
) -> None:
    t = moved(make(6, 12, 30, 9, dtype, shared=shared), device)
    leaves = {k: t[k].requires_grad_(k in needs) for k in LEAVES}
    z = forward(t)
    assert z.requires_grad == bool(needs)
    if not needs:
        return
    # An expanded gradient, as that of sum() is.
    torch.where(t["index"] >= 0, z, 0).sum().backward()
    t["dlogits"] = torch.ones(6, 12, device=device)
    expected = backward({k: v.detach() for k, v in t.items()})
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in needs)
        if leaf.grad is None:
            continue
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        if name == "x":
            assert torch.equal(leaf.grad, expected["dx"].to(dtype))
        else:
            assert leaf.grad.is_sparse and torch.equal(leaf.grad._indices()[0], expected["rows"])
            assert torch.equal(
                leaf.grad._values(),
                expected["grad" if name == "weight" else "dbias"].to(leaf.dtype),
            )


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
@pytest.mark.parametrize("needs", list(itertools.product(BOTH, BOTH, BOTH)), ids=str)
def test_what_is_not_asked_for_is_empty(
    needs: tuple[bool, bool, bool], shared: bool, device: str
) -> None:
    t = moved(make(6, 12, 30, 9, shared=shared), device)
    whole = backward(t)
    got = backward(t, need_dx=needs[0], need_dweight=needs[1], need_dbias=needs[2])
    asked = {"dx": needs[0], "grad": needs[1], "dbias": needs[2], "rows": needs[1] or needs[2]}
    empty = {"dx": (0,), "grad": (0, 9), "dbias": (0,), "rows": (0,)}
    for name, wanted in asked.items():
        if wanted:
            assert torch.equal(got[name], whole[name])
        assert wanted or got[name].shape == empty[name]


@pytest.mark.parametrize("device", DEVICES)
def test_finite_differences(device: str) -> None:
    """The derivative along a random direction, by central differences of the op itself in fp32."""
    t, g = make(8, 20, 30, 12), torch.Generator().manual_seed(0)
    t = moved(t | {"dlogits": torch.where(t["index"] >= 0, t["dlogits"], 0)}, device)
    found = backward(t)

    def loss(**changed: Tensor) -> Tensor:
        z = forward(t | changed)
        return (torch.where(t["index"] >= 0, z, 0) * t["dlogits"]).double().sum()

    for name, gradient in (("x", "dx"), ("weight", "grad"), ("bias", "dbias")):
        way = torch.randn(t[name].shape, generator=g).to(device)
        reached = way if name == "x" else way[found["rows"]]
        ahead, behind = (loss(**{name: t[name] + s * 0.05 * way}) for s in (1, -1))
        assert float(ahead - behind) / 0.1 == pytest.approx(
            float((found[gradient] * reached).sum()), rel=1e-3, abs=0.01
        )


@pytest.mark.parametrize("device", DEVICES)
@shared_or_not
def test_sparse_adam_takes_the_gradient(shared: bool, device: str) -> None:
    """Three steps beside an nn.Embedding(sparse=True) with the same numbers: the same table,
    untouched rows untouched.
    """
    t = moved(make(8, 20, 60, 12, shared=shared), device)
    real, target = (t["index"] >= 0).expand(8, 20), (t["dlogits"].nan_to_num() > 0.5).float()
    tables, found = {}, {}
    for kind in ("op", "embedding"):
        table = torch.nn.Embedding(60, 12, sparse=True, device=device)
        table.weight.data.copy_(t["weight"])
        optimizer = torch.optim.SparseAdam(list(table.parameters()), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            if kind == "op":
                z = ops.shortlist_matmul(t["x"], table.weight, None, t["index"])
            else:
                z = (table(t["index"].clamp(min=0)).expand(8, 20, 12) * t["x"][:, None]).sum(-1)
            torch.nn.functional.binary_cross_entropy_with_logits(
                z[real], target[real], reduction="sum"
            ).backward()
            optimizer.step()
        tables[kind], found[kind] = table.weight.detach(), table.weight.grad.coalesce().to_dense()
    torch.testing.assert_close(found["op"], found["embedding"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tables["op"], tables["embedding"], rtol=1e-4, atol=1e-5)
    untouched = torch.ones(60, dtype=torch.bool, device=device)
    untouched[t["index"][t["index"] >= 0]] = False
    assert untouched.any() and torch.equal(tables["op"][untouched], t["weight"][untouched])
    assert not torch.equal(tables["op"], t["weight"])


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_is_coalesced_and_backward_keeps_its_order(device: str) -> None:
    t = {k: v.to(device) for k, v in make(6, 40, 90, 8, BF16).items()}
    weight, bias = t["weight"].requires_grad_(), t["bias"].requires_grad_()
    total = torch.where(t["index"] >= 0, forward(t), 0).sum()
    for found in torch.autograd.grad(total, (weight, bias), retain_graph=True):
        assert found.layout == torch.sparse_coo and found.is_coalesced()
        assert torch.equal(found.indices()[0], t["index"][t["index"] >= 0].unique())
    total.backward()
    assert (weight.grad._indices()[0].diff() > 0).all() and weight.grad._values().dtype == BF16


def test_a_table_that_moved_since_is_refused_by_the_backward() -> None:
    """The gradient of x needs the rows that were scored: silently taking the updated ones would be
    wrong.
    """
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8)
    logits = ops.shortlist_matmul(x, weight, None, torch.tensor([0, 3]))
    hyper, counter = torch.tensor([0.1, 0, 0, 0, 0, 1, 1]), torch.tensor([1, 0])
    ops.sparse_sgd_(weight, None, torch.tensor([3]), torch.ones(1, 8), hyper, counter)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()
