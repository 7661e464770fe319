"""Generator states and optimizer states come back by name."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

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
