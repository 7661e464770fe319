"""Problems for the ops that update touched rows, and what plain PyTorch makes of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common import make_counter, make_hyper
from xmlkernels import ops
from xmlkernels.ops import Hyper
from xmlkernels.reference import bag_step as bag_reference
from xmlkernels.reference import sparse_update as sparse_reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROW_STATES = ("momentum", "second", "kahan", "row_step", "row_decay")
RULES = {
    "sgd": (),
    "momentum": ("momentum",),
    "adagrad": ("second",),
    "adam": ("momentum", "second"),
}
SGD = make_hyper(0.05, 0.02, 0.9, 0.0, 1e-8, 0.5)
ADAM = make_hyper(0.01, 0.1, 0.9, 0.999, 1e-8, 0.5)
# (N, n, D): single, none touched, ragged, aligned, wide, more than one work item, every row.
SHAPES = [
    (1, 1, 1),
    (0, 9, 5),
    (3, 37, 7),
    (130, 2000, 64),
    (70, 300, 385),
    (700, 5003, 33),
    (200, 200, 128),
]


@dataclass
class RowStep:
    """The arguments of one call of `sparse_sgd_`, `sparse_adagrad_`, `sparse_adam_` or `bag_step_`;
    `run` works on copies.

    rule: a key of RULES. The table is `param`, its gradient `grad`; `rows`, or `token` and
        `offset`, name the rows.
    """

    rule: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> str:
        if "token" in self.tensors:
            return "bag_step_"
        return {"momentum": "sparse_sgd_"}.get(self.rule, f"sparse_{self.rule}_")

    def arguments(self) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        t = self.tensors
        given = {k: t[k] for k in ("kahan", "row_step", "row_decay", "decay_sum") if k in t}
        steering = (t["hyper"], t["counter"])
        if self.op == "bag_step_":
            given |= {k: t[k] for k in ("token_weight", "momentum", "second") if k in t}
            return (t["param"], t["grad"], t["token"], t["offset"], *steering), given | self.options
        states = (
            (t.get("momentum"),)
            if self.op == "sparse_sgd_"
            else tuple(t[k] for k in RULES[self.rule])
        )
        return (t["param"], *states, t["rows"], t["grad"], *steering), given | self.options

    def run(self, *, reference: bool = False, wide: bool = False) -> dict[str, Tensor]:
        """Every tensor that the step updates, after it. wide: all floating-point arguments but
        hyper in float64.
        """
        t = {k: v.clone() for k, v in self.tensors.items()}
        if wide:
            t = {
                k: v.double() if v.is_floating_point() and k != "hyper" else v for k, v in t.items()
            }
        room: Any = (bag_reference if "token" in t else sparse_reference) if reference else ops
        positional, named = RowStep(self.rule, t, self.options).arguments()
        getattr(room, self.op)(*positional, **named)
        return {k: t[k] for k in ("param", *ROW_STATES) if k in t}

    def exact(self) -> dict[str, Tensor]:
        return self.run(reference=True, wide=True)

    def to(self, device: str) -> "RowStep":
        return RowStep(
            self.rule, {k: v.to(device) for k, v in self.tensors.items()}, dict(self.options)
        )

    def replace(self, **changed: Any) -> "RowStep":
        """A copy with other tensors or options."""
        tensors = {k: v for k, v in changed.items() if isinstance(v, Tensor)}
        options = {k: v for k, v in changed.items() if not isinstance(v, Tensor)}
        return RowStep(self.rule, self.tensors | tensors, self.options | options)


def some_rows(count: int, n: int, seed: int = 0) -> Tensor:
    """`count` different rows in ascending order; the first and the last are among them where there
    is room.
    """
    inner = (
        torch.randperm(max(n - 2, 0), generator=torch.Generator().manual_seed(seed))[
            : max(count - 2, 0)
        ]
        + 1
    )
    ends = torch.tensor([0, n - 1][:count] if n > 1 else [0][:count])
    return torch.cat([inner, ends]).sort().values.long()


def random_states(
    rule: str,
    n: int,
    d: int,
    dtype: torch.dtype,
    g: torch.Generator,
    *,
    row_wise: bool = False,
    kahan: bool = False,
    row_step: bool = False,
    lazy: bool = False,
) -> dict[str, Tensor]:
    """States of the sizes that training meets, in `dtype`."""
    out = {}
    if "momentum" in RULES[rule]:
        out["momentum"] = (torch.randn(n, d, generator=g) * 0.1).to(dtype)
    if "second" in RULES[rule]:
        out["second"] = (
            torch.randn(*((n,) if row_wise else (n, d)), generator=g).square() + 0.1
        ).to(dtype)
    if row_step:
        out["row_step"] = torch.randint(0, 50, (n,), generator=g)
    if lazy:
        out["row_decay"] = -0.05 * torch.rand(n, generator=g)
        out["decay_sum"] = torch.tensor([-0.07])
    return out


def random_rows(
    rule: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    state: torch.dtype | None = None,
    grad: torch.dtype = F32,
    fill: int = 0,
    hyper: Tensor | None = None,
    seed: int = 0,
    kahan: bool = False,
    row_wise: bool = False,
    row_step: bool = False,
    lazy: bool = False,
    **options: Any,
) -> RowStep:
    """A sparse update on random numbers. fill: entries that name no row, with NaN for a
    gradient.
    """
    g = torch.Generator().manual_seed(seed)
    count, n, d = shape
    tensors = {
        "param": (torch.randn(n, d, generator=g) * 0.3).to(dtype),
        "rows": torch.cat([some_rows(count, n, seed), torch.full((fill,), n)]),
        "grad": torch.cat(
            [torch.randn(count, d, generator=g), torch.full((fill, d), torch.nan)]
        ).to(grad),
        "hyper": (ADAM if rule == "adam" else SGD) if hyper is None else hyper,
        "counter": make_counter(),
    }
    tensors |= random_states(
        rule, n, d, state or dtype, g, row_wise=row_wise, row_step=row_step, lazy=lazy
    )
    if kahan:
        tensors["kahan"] = (torch.randn(n, d, generator=g) * 1e-4).to(dtype)
    return RowStep(rule, tensors, ({"decoupled": True} if lazy else {}) | options)


def random_bags(
    rule: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    weights: bool = True,
    fill: int = 3,
    seed: int = 0,
    **given: Any,
) -> RowStep:
    """A bag step: shape (B, T, n, D). Low rows come often; some bags are empty; `fill` tokens are
    -1; two lie in no bag.
    """
    bags, count, n, d = shape
    step = random_rows(rule, (bags, max(bags, n), d), dtype, seed=seed, **given)
    g = torch.Generator().manual_seed(seed + 1)
    token = (torch.rand(count, generator=g).pow(4) * n).long().clamp(max=max(n - 1, 0))
    token[: fill if n else count] = -1
    if count > fill + 3:
        token[-3], token[-4] = n - 1, 0
    end = max(count - 2, 0)
    offset = torch.randint(0, end + 1, (bags + 1,), generator=g).sort().values
    offset[0], offset[-1] = 0, end
    t = step.tensors | {"token": token, "offset": offset}
    t = {
        k: v[:n].clone() if k in ("param", *ROW_STATES) else v for k, v in t.items() if k != "rows"
    }
    if weights:
        t["token_weight"] = torch.rand(count, generator=g) + 0.1
    return RowStep(rule, t, step.options)


def touched(step: RowStep) -> Tensor:
    """The rows that a step updates, ascending."""
    t = step.tensors
    if "rows" in t:
        return t["rows"][t["rows"] < t["param"].shape[0]]
    inside = t["token"][int(t["offset"][0]) : int(t["offset"][-1])]
    return inside[inside >= 0].unique()


def summed_grad(step: RowStep, dtype: torch.dtype) -> Tensor:
    """Gradient of each touched row, every occurrence's product rounded to `dtype` and added up in
    fp32 or wider.
    """
    t = step.tensors
    if "rows" in t:
        return t["grad"][: touched(step).shape[0]].to(dtype)
    work = torch.promote_types(dtype, F32)
    at = torch.arange(t["token"].shape[0])
    keep = (t["token"] >= 0) & (at >= t["offset"][0]) & (at < t["offset"][-1])
    bag = torch.bucketize(at[keep], t["offset"], right=True) - 1
    factor = t["token_weight"][keep] if "token_weight" in t else torch.ones(bag.shape)
    products = (factor.to(dtype)[:, None] * t["grad"].to(dtype)[bag]).to(work)
    dense = torch.zeros(t["param"].shape, dtype=work).index_add_(0, t["token"][keep], products)
    return dense[touched(step)].to(dtype)


def torch_step(step: RowStep) -> dict[str, Tensor]:
    """The touched rows after the same step by torch.optim, which computes in fp32 and stores in the
    tensors' dtypes.

    What torch.optim has no word for (row-wise second moment, steps and decay of each row) is the
    exact result, rounded.
    """
    t, dtype, rows = step.tensors, step.tensors["param"].dtype, touched(step)
    if t.keys() & {"row_step", "row_decay"} or ("second" in t and t["second"].dim() == 1):
        return {k: v[rows].to(t[k].dtype) for k, v in step.exact().items()}
    lr, decay, beta1, beta2, eps, scale, _ = Hyper(*t["hyper"].tolist())
    w = t["param"][rows].float()
    if "kahan" in t:
        w = (w + t["kahan"][rows].float()).to(dtype).float()
    p = torch.nn.Parameter(w.clone())
    p.grad = (summed_grad(step, dtype) * scale).float()
    decoupled = step.options.get("decoupled", False)
    state = {k: t[k][rows].float() for k in ROW_STATES[:2] if k in t}
    optimizer: torch.optim.Optimizer
    if step.rule == "adam":
        optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
            [p], lr, (beta1, beta2), eps, decay
        )
        number = t["counter"][1].float()
        optimizer.state[p] = {
            "step": number,
            "exp_avg": state["momentum"],
            "exp_avg_sq": state["second"],
        }
    else:
        if decoupled:
            p.data.mul_(1 - lr * decay)
        l2 = 0 if decoupled else decay
        if step.rule == "adagrad":
            optimizer = torch.optim.Adagrad([p], lr, weight_decay=l2, eps=eps)
            optimizer.state[p] = {"step": torch.tensor(0.0), "sum": state["second"]}
        else:
            optimizer = torch.optim.SGD(
                [p], lr, beta1 if step.rule == "momentum" else 0, weight_decay=l2
            )
            if step.rule == "momentum":
                optimizer.state[p] = {"momentum_buffer": state["momentum"]}
    optimizer.step()
    after = optimizer.state[p]
    names = {"momentum": ("momentum_buffer", "exp_avg"), "second": ("sum", "exp_avg_sq")}
    out = {"param": p.detach().to(dtype)}
    for name in state:
        out[name] = next(after[k] for k in names[name] if k in after).to(t[name].dtype)
    return out


def multiples(
    shape: tuple[int, ...], exponent: int, dtype: torch.dtype, g: torch.Generator
) -> Tensor:
    """Random 6-bit multiples of 2^exponent."""
    return (torch.randint(-63, 64, shape, generator=g) * 2.0**exponent).to(dtype)


def dyadic_rows(
    rule: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    state: torch.dtype | None = None,
    exponent: int = -6,
    lr: float = 2.0**-8,
    row_wise: bool = False,
    seed: int = 0,
    **options: Any,
) -> RowStep:
    """A sparse update whose fp32 results are exact, so that bits can be compared.

    Gradients are odd, with up to 12 bits (where row_wise powers of two, one a row). Second moments
    begin at 0: then sqrt(v) is the gradient's magnitude, epsilon may be 0, and Adagrad's and Adam's
    first steps are lr times its sign.
    """
    g = torch.Generator().manual_seed(seed)
    count, n, d = shape
    size = torch.randint(0, 2048, (count, d), generator=g) * 2 + 1
    if row_wise:
        size = 2 ** torch.randint(0, 12, (count, 1), generator=g)
    sign = torch.randint(0, 2, (count, d), generator=g) * 2 - 1
    tensors = {
        "param": multiples((n, d), exponent, dtype, g),
        "rows": some_rows(count, n, seed),
        "grad": size * sign / 1024,
        "hyper": make_hyper(lr, 2.0**-4, 0.5, 0.75, 0.0, scale=0.5),
        "counter": make_counter(step=0 if rule == "adam" else 3),
    }
    if "momentum" in RULES[rule]:
        tensors["momentum"] = multiples((n, d), -5, state or dtype, g)
        if rule == "adam":
            tensors["momentum"][tensors["rows"]] = 0
    if "second" in RULES[rule]:
        tensors["second"] = torch.rand((n,) if row_wise else (n, d), generator=g).to(state or dtype)
        tensors["second"][tensors["rows"]] = 0
        options = {"decoupled": True} | options
    return RowStep(rule, tensors, options)
