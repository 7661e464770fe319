"""What the tests of the end-to-end model share: random batches, and a tiny model."""

from typing import Any

import torch

from xmlkernels.data.batches.tokens import Batch
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.training import Training
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.table import RowOptimizer

LABELS = 23
VOCABULARY = 60


def make_batch(size: int, seed: int = 0, labels: int = LABELS) -> Batch:
    """Random documents of differing lengths; every document has one to three labels."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (size,), generator=g)
    mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=g) * mask
    pairs = sorted(
        {
            (int(torch.randint(0, labels, (1,), generator=g)), s)
            for s in range(size)
            for _ in range(3)
        }
    )
    rows = torch.tensor([r for r, _ in pairs])
    samples = torch.tensor([s for _, s in pairs], dtype=torch.int32)
    return Batch(ids, mask, rows, samples, torch.arange(size), labels)


def make_model(*, dropout: float = 0.0, **training: Any) -> EndToEnd:
    """A tiny model; in evaluation mode without dropout, so that two ways of computing one step can
    be compared.
    """
    settings = {
        "encoder_lr": 1e-3,
        "head_lr": 0.05,
        "encoder_decay": 0.01,
        "warmup": 0,
        "total": 100,
        **training,
    }
    encoder = Encoder.tiny(VOCABULARY, dropout=dropout, seed=1)
    head = FullHead(LABELS, encoder.width, optimizer=RowOptimizer("sgd", momentum=0.9), seed=2)
    return EndToEnd(encoder, head, Training(**settings)).train(dropout > 0)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
