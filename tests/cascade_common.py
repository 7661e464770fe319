"""Small cascades for tests, and a cascade in plain PyTorch and float64 that they are compared
with.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from xmlkernels.models.cascade import Cascade
from xmlkernels.models.scored import LevelPrediction
from xmlkernels.models.training import CascadeTraining
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.tree.label_tree import LabelTree

VOCABULARY = 60
LABELS = 43


@dataclass(frozen=True)
class Documents:
    """What a cascade reads of a batch."""

    inputs: tuple[Tensor, ...]
    pos_row: Tensor
    pos_sample: Tensor
    levels: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return len(self.inputs[0])


def make_tree(levels: int, labels: int = LABELS, seed: int = 0) -> LabelTree:
    """A ragged tree of `levels` levels; its order is no identity."""
    rng = np.random.default_rng(seed)
    counts = np.linspace(4, labels, levels).astype(int)[:-1]
    partitions = [rng.integers(0, counts[0], labels)]
    for coarse, fine in itertools.pairwise(counts):
        partitions.append(
            partitions[-1] * 1000 + rng.integers(0, max(2, fine // coarse + 1), labels)
        )
    return LabelTree.from_partitions(partitions, {"dataset": "test"})


def pairs(node: np.ndarray, sample: np.ndarray) -> tuple[Tensor, Tensor]:
    """Unique pairs sorted by (node, sample)."""
    both = np.unique(np.stack([node, sample], 1), axis=0)
    return torch.from_numpy(both[:, 0].copy()), torch.from_numpy(both[:, 1].astype(np.int32))


def positives_of(tree: LabelTree, rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Positives of every level from the table rows of each document."""
    sample = np.array([s for s, labels in enumerate(rows) for _ in labels], np.int64)
    row = np.array([r for labels in rows for r in labels], np.int64)
    return [pairs(tree.ancestors(r)[row], sample) for r in range(tree.levels)]


def make_batch(tree: LabelTree, size: int, seed: int = 0, most: int = 3) -> Documents:
    """Random documents of differing lengths; every document has one to `most` labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 12, size)
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    ids = rng.integers(5, VOCABULARY, mask.shape) * mask
    rows = [
        rng.choice(len(tree.order), rng.integers(1, most + 1), replace=False) for _ in range(size)
    ]
    *levels, (row, sample) = positives_of(tree, rows)
    inputs = torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
    return Documents(inputs, row, sample, tuple(levels))


ROW_OPTIONS = ("momentum", "betas", "epsilon", "state_dtype", "row_wise", "kahan")
RECIPES = {
    2: ((1, 2), (3,)),
    3: ((1, 2), (3,), (4,)),
    4: ((1,), (2,), (3,), (4,)),
    5: ((0, 1), (1,), (2,), (3,), (4,)),
}


def make_model(
    levels: int, *, tree: LabelTree | None = None, topk: Sequence[int] | None = None, **options: Any
) -> Cascade:
    """A tiny cascade, in evaluation mode without dropout unless `drops` says otherwise, so that two
    ways of computing one step can be compared."""
    tree = make_tree(levels) if tree is None else tree
    names = set(CascadeTraining.__dataclass_fields__)
    if isinstance(options.get("optimizer"), str):  # that of the tables
        names.remove("optimizer")
    settings = {"encoder_lr": 1e-3, "total": 100} | {k: v for k, v in options.items() if k in names}
    rest = {"layers": RECIPES[levels], "seed": 3} | {
        k: v for k, v in options.items() if k not in names
    }
    training = rest.pop("training", True)
    own = {k: rest.pop(k) for k in ROW_OPTIONS if k in rest}
    optimizer = RowOptimizer(rest.pop("optimizer", "adam"), **{"row_wise": True} | own)
    encoder = Encoder.tiny(
        VOCABULARY, layers=4, width=16, seed=1, pooling="cls", autocast=rest.pop("autocast", None)
    )
    most = [tree.widest(r) for r in range(levels - 1)]
    heads = CascadeHeads(
        tree.sizes, most, 16, topk=topk or [3] * (levels - 1), optimizer=optimizer, **rest
    )
    model = Cascade(encoder, heads, tree, CascadeTraining(**settings) if training else None)
    return model.train("drops" in rest)


class Twin:
    """The same model with dense float64 tables, torch's autograd, and shortlists by Python
    loops.
    """

    def __init__(self, model: Cascade, epsilon: float = 1e-8) -> None:
        self.epsilon = epsilon
        self.tree, self.topk, self.settings = model.tree, model.heads.topk, model.training_settings
        self.encoder, self.heads = copy.deepcopy(model.encoder), copy.deepcopy(model.heads)
        self.tables = [
            nn.Parameter(level.rows(0, level.nodes).double()) for level in model.heads.levels
        ]
        self.biases = [nn.Parameter(level.bias.double()) for level in model.heads.levels]
        self.states = [
            (
                torch.zeros_like(t),
                torch.zeros(len(t))
                if level.second is None or level.second.dim() == 1
                else torch.zeros_like(t),
            )
            for t, level in zip(self.tables, model.heads.levels, strict=True)
        ]
        self.step_number = 0
        matrices = {
            id(m.weight) for m in self.encoder.modules() if isinstance(m, nn.Linear | nn.Embedding)
        }
        all_of = list(self.encoder.parameters())
        linear = self.heads.projections
        self.groups = [
            {
                "params": [p for p in all_of if id(p) in matrices],
                "weight_decay": self.settings.decay,
            },
            {"params": [p for p in all_of if id(p) not in matrices], "weight_decay": 0.0},
            {
                "params": [p for n, p in linear.named_parameters() if "bias" not in n],
                "weight_decay": self.settings.decay / 10,
            },
            {
                "params": [p for n, p in linear.named_parameters() if "bias" in n],
                "weight_decay": 0.0,
            },
        ]
        self.adamw = torch.optim.AdamW(self.groups, lr=1e-3, eps=1e-8)

    def children(self, level: int, kept: Sequence[int]) -> list[int]:
        starts = self.tree.children[level - 1]
        return [n for c in kept for n in range(starts[c], starts[c + 1])]

    def shortlists(
        self, positives: list[tuple[Tensor, Tensor]], logits: list[Tensor]
    ) -> list[list[list[int]]]:
        """Candidates of every level and sample."""
        size = len(logits[0])
        out = [[list(range(self.tree.sizes[0])) for _ in range(size)]]
        for r in range(self.tree.levels - 1):
            node, sample = positives[r]
            kept = []
            for s in range(size):
                true = {int(n) for n, t in zip(node, sample, strict=True) if t == s}
                ranked = sorted(
                    out[r][s],
                    key=lambda n, s=s, true=true, r=r: (n not in true, -float(logits[r][s, n]), n),
                )
                many = len(true & set(ranked))
                room = self.topk[r] + self.settings.positives_bound
                kept.append(sorted(ranked[: min(room, max(self.topk[r], many))]))
            out.append([self.children(r + 1, k) for k in kept])
        return out

    def step(self, batch: Documents, lr: float, encoder_lr: float, beta1: float) -> float:
        positives = [*batch.levels, (batch.pos_row, batch.pos_sample)]
        vectors = self.encoder.layer_vectors(self.heads.layers, *batch.inputs)
        x = [f.double() for f in self.heads.features(vectors)]
        logits = [f @ w.T + b for f, w, b in zip(x, self.tables, self.biases, strict=True)]
        lists = self.shortlists(positives, [z.detach() for z in logits])
        total, touched = torch.zeros((), dtype=torch.float64), []
        for r, z in enumerate(logits):
            mask, target = torch.zeros_like(z, dtype=torch.bool), torch.zeros_like(z)
            for s, nodes in enumerate(lists[r]):
                mask[s, nodes] = True
            target[positives[r][1].long(), positives[r][0]] = 1
            total = total + self.settings.weights(len(logits))[r] * bce(z[mask], target[mask])
            touched.append(mask.any(0))
        for group, rate in zip(
            self.adamw.param_groups, (encoder_lr, encoder_lr, lr, lr), strict=True
        ):
            group["lr"], group["betas"] = rate, (beta1, 0.999)
        self.adamw.zero_grad()
        for p in (*self.tables, *self.biases):
            p.grad = None
        total.backward()
        self.adamw.step()
        self.step_number += 1
        for r, hit in enumerate(touched):
            self.move(r, hit, lr, beta1)
        return float(total.detach())

    @torch.no_grad()
    def move(self, r: int, hit: Tensor, lr: float, beta1: float) -> None:
        """Adam or SGD on the touched rows alone."""
        table, bias, level = self.tables[r], self.biases[r], self.heads.levels[r]
        g = table.grad[hit]
        table[hit] *= 1 - lr * self.settings.decay / 10
        bias[hit] -= lr * level.gain * bias.grad[hit]
        if level.second is None:
            table[hit] -= lr * g
            return
        m, v = self.states[r]
        square = g.square() if v.dim() == 2 else g.square().mean(1)
        m[hit] = beta1 * m[hit] + (1 - beta1) * g
        v[hit] = (0.999 * v[hit] + 0.001 * square).to(v.dtype)
        root = (v[hit].double() / (1 - 0.999**self.step_number)).sqrt() + self.epsilon
        table[hit] -= (
            lr
            * (m[hit] / (1 - beta1**self.step_number))
            / (root if v.dim() == 2 else root[:, None])
        )


def best(model: Any, batch: Any, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits and labels of the k best labels."""
    found = model.score(batch, k, exclude=exclude)
    return found.values, found.labels


def best_of_levels(
    model: Cascade, batch: Any, k: int, exclude: Tensor | None = None
) -> tuple[LevelPrediction, ...]:
    """What each level predicts under the model's own scheme."""
    found = model.score(batch, k, exclude=exclude, schemes=[model.scheme])
    return found.by_scheme[model.scheme].levels


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
