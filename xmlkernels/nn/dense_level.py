"""A cascade's level whose every row is trained in every step: dense AdamW, for small numbers of
labels.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from xmlkernels.errors import InputError
from xmlkernels.nn.cascade_level import CascadeLevel
from xmlkernels.nn.shortlist import candidates, locate
from xmlkernels.ops import shortlist_matmul, sparse_adam_


class DenseLevel(CascadeLevel):
    """`CascadeLevel` with AdamW (Loshchilov & Hutter, ICLR 2019) on the whole table: CascadeXML
    without its `--sparse`.

    Candidates, loss and dx are the same. What differs: both moments go on and the decay applies in
    rows that are nobody's candidate, too, so that a row still moves by its momentum after the last
    step that saw it; the second moment is always [n, D]; biases follow Adam as well, without decay;
    and there is no gain. The price is the gradient [n, D], the gradient of the logits [B, n], and
    two moments and weights that are read and written whole in every step.

    The arguments are those of `CascadeLevel`, with optimizer "adamw_dense" and without "fp8".
    """

    OPTIMIZERS = ("adamw_dense",)

    bias_momentum: Tensor
    bias_second: Tensor

    def __init__(
        self, nodes: int, width: int, per_sample: int, *, dtype: str, **options: object
    ) -> None:
        if dtype == "fp8":
            raise InputError(
                "cascade table: dtype",
                "fp32, bf16 or fp16 for optimizer adamw_dense",
                "fp8",
                "choose one of them, or the row-sparse adam",
            )
        super().__init__(nodes, width, per_sample, dtype=dtype, **options)  # type: ignore[arg-type]
        self.register_buffer("bias_momentum", torch.zeros(nodes, 1))
        self.register_buffer("bias_second", torch.zeros(nodes, 1))

    def _train(
        self, held: list[Tensor], row_ptr: Tensor, most: int, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, clusters, node, sample, scale, dx_scale = held
        listed, real = candidates(clusters, row_ptr, most)
        finite = torch.isfinite(x).all()
        x = torch.where(finite, x.float(), torch.nan).requires_grad_()
        with torch.enable_grad():
            z = shortlist_matmul(
                x, self.weight, self.bias, torch.where(real, listed, -1).flatten(1)
            )
        scores = torch.where(finite, z.detach().view(real.shape), torch.nan)
        target = torch.zeros(
            real.numel() + 1, device=x.device
        )  # one more takes the positives that are no candidates
        place, found = locate(node, sample, clusters, row_ptr, most)
        target[torch.where(found, place, real.numel())] = 1
        y = target[:-1].view(real.shape)
        g = torch.where(real, scale * (torch.sigmoid(scores) - y), 0)
        (dx,) = torch.autograd.grad(z, x, (dx_scale * g).flatten(1))
        loss = x.new_empty(0)
        if need_loss:
            loss = torch.where(
                finite, scale * torch.where(real, softplus(scores) - y * scores, 0).sum(), torch.nan
            ).reshape(1)
        self._adamw(x.detach(), g, torch.where(real, listed, self.nodes), finite)
        return torch.where(finite, dx, torch.nan), scores, loss

    def _adamw(self, x: Tensor, g: Tensor, listed: Tensor, finite: Tensor) -> None:
        """Updates every row, unless x was not finite: the op then leaves all as it was.

        Args:
            x: [B, D]. g: [B, K, M], gradient of the logits, 0 at pads. listed: int64 [B, K, M],
                their rows; n at pads.
        """
        whole = torch.zeros(
            x.shape[0], self.nodes + 1, device=x.device
        )  # the last column takes the pads
        whole.scatter_(1, listed.flatten(1), g.flatten(1))
        g, rows = whole[:, : self.nodes], torch.arange(self.nodes, device=x.device)
        assert self.momentum is not None and self.second is not None
        sparse_adam_(
            self.weight,
            self.momentum,
            self.second,
            rows,
            g.T @ x,
            self.hyper,
            self.counter,
            decoupled=True,
        )
        plain = self.hyper.clone()
        plain[1] = 0  # biases do not decay
        grad = torch.where(finite, g.sum(0), torch.nan)[:, None]
        bias = self.bias.view(-1, 1)
        sparse_adam_(bias, self.bias_momentum, self.bias_second, rows, grad, plain, self.counter)
