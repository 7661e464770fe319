"""The tables' steps in plain PyTorch: dense targets, autograd, an optimizer over the whole table.

Nobody trains large tables by them: they hold the logits, the targets, the gathered rows and the
table's gradient as a whole. They are what the fused steps are verified against and compared in
speed with (`--impl reference`), in the same numbers within rounding. No op of this package is
called here. Source: the plain baseline of Renee (MLSys 2023), its `--default-impl`; the dense
autograd of CascadeXML (NeurIPS 2022).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from xmlkernels.errors import InputError
from xmlkernels.nn.cascade_level import LEVEL_OPTIMIZERS, CascadeLevel
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.shard import own_positives
from xmlkernels.nn.shortlist import candidates
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.ops.hyper import BETA1, BETA2, DECAY, EPSILON, LR


class PlainHead(FullHead):
    """A full head whose step is autograd's and an optimizer of `torch.optim`.

    The optimizer's state stands in the table's own buffers, so a checkpoint of either kind of head
    is read by the other. Arguments are those of `FullHead`; "fp32" alone, for torch's optimizers
    round to nearest, which loses small steps in narrower formats.
    """

    WAITS: ClassVar[bool] = True
    WITHOUT_SKIPS: ClassVar[str] = "plain PyTorch scores and trains every label"

    @classmethod
    def check_options(cls, dtype: str, optimizer: RowOptimizer) -> None:
        """Raise InputError unless table and state are in fp32."""
        super().check_options(dtype, optimizer)
        check_wide(cls.NAME, dtype, optimizer)

    def step_bytes(self, documents: int) -> int:
        """Bytes of the table's gradient with one temporary, and of four matrices [B, L]."""
        return 4 * self.shard.count * (2 * self.width + 4 * documents)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        pos_row: Tensor,
        pos_sample: Tensor,
        *,
        lr: float | Tensor,
        dx_scale: Tensor | float = 1.0,
        need_loss: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Train the table on one batch; see `FullHead.update`. Waits for the device."""
        if not bool(torch.isfinite(x).all()):
            return torch.full_like(x, torch.nan).float(), x.new_full((int(need_loss),), torch.nan)
        x, weight = x.detach().float().requires_grad_(), self.weight.detach().requires_grad_()
        bias = None if self.bias is None else self.bias.detach().requires_grad_()
        pos_row, pos_sample = own_positives(pos_row, pos_sample, self.shard)
        real = pos_row < self.shard.count
        target = torch.zeros(x.shape[0], self.shard.count, device=x.device)
        target[pos_sample[real].long(), pos_row[real]] = 1
        with torch.enable_grad():
            loss = bce(nn.functional.linear(x, weight, bias), target, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
        decay = self.optimizer.decay
        if self.optimizer.decoupled:
            weight.mul_(1 - lr * decay)
            decay = 0.0
        self._optimizer(weight, float(lr), decay).step()
        if bias is not None:
            torch.optim.SGD([bias], lr).step()
        assert x.grad is not None
        return dx_scale * x.grad, loss.detach().reshape(1)[: int(need_loss)]

    def _optimizer(self, weight: Tensor, lr: float, decay: float) -> torch.optim.Optimizer:
        """Make torch's optimizer of this step, with the state that the last one left."""
        rule, made = self.optimizer, dict[str, Any]()
        optimizer: torch.optim.Optimizer
        if rule.kind == "sgd":
            momentum = rule.momentum
            optimizer = torch.optim.SGD([weight], lr, momentum=momentum, weight_decay=decay)
            made = {"momentum_buffer": self.momentum}
        else:
            # As the ops have them: rounded to fp32, which changes 1 - beta2 by 1e-5 of itself.
            betas = float(self.hyper[BETA1]), float(self.hyper[BETA2])
            optimizer = torch.optim.Adam([weight], lr, betas, rule.epsilon, decay)
            steps = self.counter[1].float().cpu()
            made = {"step": steps, "exp_avg": self.momentum, "exp_avg_sq": self.second}
        optimizer.state[weight] = made
        return optimizer


class PlainLevel(CascadeLevel):
    """A level whose step gathers its candidates' rows and leaves the rest to autograd.

    It has the rules of `CascadeLevel` ("adam" and "sgd" on the rows that a step touches) and of
    `DenseLevel` ("adamw_dense"), and their buffers: a checkpoint of either is read by the other.
    Arguments are those of `CascadeLevel`; "fp32" alone.
    """

    OPTIMIZERS: ClassVar[tuple[str, ...]] = LEVEL_OPTIMIZERS
    WAITS: ClassVar[bool] = True

    @classmethod
    def check_options(cls, dtype: str, optimizer: RowOptimizer) -> None:
        """Raise InputError unless table and state are in fp32."""
        super().check_options(dtype, optimizer)
        check_wide(cls.NAME, dtype, optimizer)

    def step_bytes(self, documents: int) -> int:
        """Bytes of the table's gradient, of rows [B, S, D] with their gradient, of targets."""
        gathered = 2 * 4 * documents * self.per_sample * self.width
        return 4 * self.nodes * self.width + gathered + documents * self.nodes

    def _train(
        self, held: list[Tensor], row_ptr: Tensor, most: int, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, clusters, node, sample, scale, dx_scale = held
        listed, real = candidates(clusters, row_ptr, most)
        if not bool(torch.isfinite(x).all()):
            lost = torch.full(real.shape, torch.nan, device=x.device)
            return torch.full_like(x, torch.nan).float(), lost, lost.flatten()[: int(need_loss)]
        x, weight = x.detach().float().requires_grad_(), self.weight.detach().requires_grad_()
        bias = self.bias.detach().requires_grad_()
        index = torch.where(real, listed, 0)
        inside = node < self.nodes
        positive = torch.zeros(x.shape[0], self.nodes, dtype=torch.bool, device=x.device)
        positive[sample[inside].long(), node[inside]] = True
        target = positive.gather(1, index.flatten(1)).view(index.shape).float()
        with torch.enable_grad():
            z = torch.einsum("bkmd,bd->bkm", weight[index], x) + bias[index]
            loss = scale * bce(z, target, weight=real.float(), reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None and weight.grad is not None and bias.grad is not None
        if self.optimizer.kind == "adamw_dense":
            rows = torch.arange(self.nodes, device=x.device)
            assert self.bias_momentum is not None and self.bias_second is not None
            moments = self.bias_momentum, self.bias_second
            bias -= self._adam(bias.grad[:, None], *moments, rows)[:, 0]
        else:
            rows = torch.unique(listed[real])
            bias -= self.hyper[LR] * self.gain * bias.grad
        self._update(weight, self.gain * weight.grad[rows], rows)
        scores = torch.where(real, z.detach(), -torch.inf)
        return dx_scale * x.grad, scores, loss.detach().reshape(1)[: int(need_loss)]

    def _update(self, weight: Tensor, grad: Tensor, rows: Tensor) -> None:
        """Shrink and move the rows [N, D] of the table by their gradient."""
        lr, decay, beta1 = self.hyper[LR], self.hyper[DECAY], self.hyper[BETA1]
        if self.second is not None:
            assert self.momentum is not None
            change = self._adam(grad, self.momentum, self.second, rows)
        elif self.momentum is not None:
            self.momentum[rows] = beta1 * self.momentum[rows] + grad
            change = lr * self.momentum[rows]
        else:
            change = lr * grad
        weight[rows] = (1 - lr * decay) * weight[rows] - change

    def _adam(self, grad: Tensor, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
        """Move Adam's moments of rows, and return what their weights move by.

        The second moment is [n, D], or [n] where it is the mean over a row.
        """
        lr, beta1, beta2 = self.hyper[LR], self.hyper[BETA1], self.hyper[BETA2]
        square = grad.square() if second.dim() == 2 else grad.square().mean(1)
        first[rows] = beta1 * first[rows] + (1 - beta1) * grad
        second[rows] = beta2 * second[rows] + (1 - beta2) * square
        steps = self.counter[1].double() + 1
        m = first[rows] / (1 - beta1.double() ** steps).float()
        root = (second[rows] / (1 - beta2.double() ** steps).float()).sqrt()
        return lr * m / ((root if root.dim() == 2 else root[:, None]) + self.hyper[EPSILON])


def check_wide(where: str, dtype: str, optimizer: RowOptimizer) -> None:
    """Refuse formats below fp32, whose updates torch's optimizers would lose.

    Raises:
        InputError: the table's or its state's.
    """
    for name, value in (("dtype", dtype), ("state_dtype", optimizer.state_dtype)):
        if value != "fp32":
            mend = "choose fp32, or the fused step"
            raise InputError(f"{where}: {name}", "fp32 for plain PyTorch", value, mend)
