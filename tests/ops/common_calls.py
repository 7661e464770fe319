"""Good calls of every op by name, from a random source: what the tests of bad arguments spoil."""

import random
from collections.abc import Callable
from typing import Any

import torch

from common import DTYPES, Step, fp8_step, make_hyper, random_step, to_fp8
from common_cluster import random_cluster_step
from shortlists import make, make_choice
from sparse_common import RULES, random_bags, random_rows

Call = dict[str, Any]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8)


def sizes(r: random.Random) -> tuple[int, int, int]:
    """B, n and D: small, often ragged, sometimes empty."""
    return (
        r.choice([0, 1, 3, 5, 17, 40]),
        r.choice([0, 1, 4, 33, 130, 300]),
        r.choice([1, 3, 8, 33, 70]),
    )


def table_states(r: random.Random, dtype: torch.dtype) -> dict[str, torch.dtype]:
    names = r.choice([(), ("momentum",), ("momentum", "second")])
    states = {name: r.choice([F32, BF16, F16]) for name in names}
    if dtype in (BF16, F16) and r.random() < 0.3:
        states["kahan"] = dtype
    return states | ({"bias": F32} if r.random() < 0.5 else {})


def head_step(r: random.Random, **more: Any) -> Step:
    b, n, d = sizes(r)
    dtype = r.choice(DTYPES)
    states, fp8 = table_states(r, dtype), r.random() < 0.25
    if fp8:
        states.pop("kahan", None)
    step = random_step(
        b,
        n,
        d,
        dtype,
        x_dtype=r.choice(DTYPES),
        share=0.1,
        states=states,
        hyper=ADAM,
        values=r.random() < 0.3,
        seed=r.randrange(99),
        row_offset=r.choice([0, 5, 2**33]),
        decoupled=r.random() < 0.5,
        need_loss=r.random() < 0.5,
        **more,
    )
    return fp8_step(step) if fp8 else step


def bce_step(r: random.Random) -> Call:
    step = head_step(r)
    call = step.tensors | step.options
    if r.random() < 0.3:
        call |= {"skip_below": 1e-3, "skipped": torch.zeros(2, dtype=torch.int64)}
    return call | ({"rows": r.randint(0, len(call["weight"]))} if r.random() < 0.3 else {})


def cluster_step(r: random.Random) -> Call:
    b, _n, d = sizes(r)
    dtype = r.choice(DTYPES)
    several = [r.choice([0, 1, 3, 9, 40]) for _ in range(r.choice([0, 1, 3, 12]))]
    step = random_cluster_step(
        b,
        several,
        r.choice([0, 1, 2, 5]),
        d,
        dtype,
        x_dtype=r.choice(DTYPES),
        states=table_states(r, dtype),
        hyper=ADAM,
        decoupled=r.random() < 0.5,
        need_loss=r.random() < 0.5,
        seed=r.randrange(99),
    )
    call = step.tensors | step.options
    if "second" in call and r.random() < 0.4:
        call["second"] = torch.ones(len(call["weight"]), dtype=call["second"].dtype)
    return call


def loss(r: random.Random) -> Call:
    t = head_step(r).tensors
    call = {
        k: t.get(k)
        for k in ("x", "weight", "bias", "pos_row", "pos_sample", "pos_value", "row_scale")
    }
    return call | {"rows": r.choice([-1, r.randint(0, len(t["weight"]))])}


def loss_backward(r: random.Random) -> Call:
    return loss(r) | {"need_dweight": r.random() < 0.7, "need_dbias": r.random() < 0.7}


def topk(r: random.Random) -> Call:
    t, offset = head_step(r).tensors, r.choice([0, 7, 2**33])
    n = len(t["weight"])
    call: Call = {k: t.get(k) for k in ("x", "weight", "bias", "row_scale")}
    if r.random() < 0.4:
        call["exclude"] = torch.randint(-1, n + 1, (len(t["x"]), r.choice([0, 1, 4]))) + offset
    return call | {
        "k": r.choice([1, 3, n + 1]),
        "row_offset": offset,
        "rows": r.choice([-1, r.randint(0, n)]),
    }


def rescale(r: random.Random) -> Call:
    _, n, d = sizes(r)
    weight, row_scale = to_fp8(torch.randn(n, d))
    return {
        "weight": weight,
        "row_scale": row_scale,
        "counter": torch.tensor([3, 4]),
        "row_offset": r.choice([0, 2**33]),
    }


def lists(r: random.Random) -> Call:
    b, n, d = sizes(r)
    t = make(
        b,
        r.choice([0, 1, 4, 50]),
        n,
        d,
        r.choice(DTYPES),
        shared=r.random() < 0.5,
        seed=r.randrange(99),
    )
    if r.random() < 0.25:
        t["weight"], t["row_scale"] = to_fp8(t["weight"].float())
    return t


def shortlist(r: random.Random) -> Call:
    t = lists(r)
    return {k: t.get(k) for k in ("x", "weight", "bias", "index", "row_scale")}


def shortlist_backward(r: random.Random) -> Call:
    t = lists(r)
    given = {k: t.get(k) for k in ("dlogits", "x", "weight", "index", "row_scale")}
    return given | {f"need_{k}": r.random() < 0.7 for k in ("dx", "dweight", "dbias")}


def select(r: random.Random) -> Call:
    shape = (
        r.choice([0, 1, 5, 17]),
        r.choice([1, 4, 40]),
        r.choice([0, 1, 7]),
        5,
        r.choice([3, 9]),
    )
    kind = r.choice(["random", "ties", "special", "same"])
    call = make_choice(shape, kind, positives=r.choice([0, 3]), seed=r.randrange(99))
    if r.random() < 0.3:
        call |= {"node": None, "sample": None}
    first = torch.randint(0, 2**29, call["clusters"].shape) if r.random() < 0.3 else None
    return call | {"first": first}


def merge(r: random.Random) -> Call:
    call = select(r) | {"first": None}
    keys = torch.ops.xmlkernels.shortlist_select(**call)
    given = {name: call[name] for name in ("clusters", "row_ptr", "k", "width")}
    return given | {"keys": keys, "most": call["scores"].shape[2]}


def row_options(r: random.Random, rule: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "state": r.choice(DTYPES),
        "grad": r.choice(DTYPES),
        "fill": r.choice([0, 2]),
        "seed": r.randrange(99),
        "kahan": dtype != F32 and r.random() < 0.3,
        "row_wise": "second" in RULES[rule] and r.random() < 0.3,
        "row_step": rule == "adam" and r.random() < 0.3,
        "lazy": r.random() < 0.3,
        "row_offset": r.choice([0, 2**33]),
    }


def sparse(rule: str) -> Callable[[random.Random], Call]:
    def call(r: random.Random) -> Call:
        chosen = r.choice(["sgd", "momentum"]) if rule == "sgd" else rule
        dtype, n = r.choice(DTYPES), r.choice([1, 4, 33, 300])
        shape = (r.choice([0, 1, min(n, 3), n]), n, r.choice([1, 3, 8, 33, 70]))
        step = random_rows(chosen, shape, dtype, **row_options(r, chosen, dtype))
        return ({"momentum": None} if chosen == "sgd" else {}) | step.tensors | step.options

    return call


def bag(r: random.Random) -> Call:
    rule, dtype = r.choice(list(RULES)), r.choice(DTYPES)
    shape = (
        r.choice([1, 3, 9]),
        r.choice([0, 4, 60]),
        r.choice([1, 5, 200]),
        r.choice([1, 3, 8, 33, 70]),
    )
    step = random_bags(
        rule, shape, dtype, weights=r.random() < 0.5, **row_options(r, rule, dtype) | {"fill": 2}
    )
    return {"weight" if k == "param" else k: v for k, v in step.tensors.items()} | step.options


PUBLIC: dict[str, Callable[[random.Random], Call]] = {
    "bce_step_": bce_step,
    "bce_loss": loss,
    "cluster_step_": cluster_step,
    "matmul_topk": topk,
    "rescale_rows_": rescale,
    "shortlist_matmul": shortlist,
    "shortlist_backward": shortlist_backward,
    "shortlist_select": select,
    "shortlist_merge": merge,
    "sparse_sgd_": sparse("sgd"),
    "sparse_adagrad_": sparse("adagrad"),
    "sparse_adam_": sparse("adam"),
    "bag_step_": bag,
}
DIRECT = PUBLIC | {"bce_loss_backward": loss_backward}


def written(op: str) -> set[str]:
    """The arguments that an op updates, by its schema."""
    schema = getattr(torch.ops.xmlkernels, op).default._schema
    return {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
