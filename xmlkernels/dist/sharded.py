"""Modules whose parameters lie in parts on all processes: torch's FSDP2 (`fully_shard`).

Source: Zhao et al., "PyTorch FSDP" (VLDB 2023). Each process holds consecutive rows of every
parameter, ceil(n / G) of n. A part of the module has its whole parameters while it is passed,
forward or back; each process then keeps its own rows of the summed gradients.

Optimizers, means and checkpoints see these rows as plain tensors (`own`), never torch's DTensors.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from xmlkernels.dist import wire
from xmlkernels.dist.group import before_parting, rank, size, talk

_OWN = "_xmlkernels_own"
# torch 2.13 has renamed them.
_GATHER = "all_gather_single", "all_gather_into_tensor"
_SCATTER = "reduce_scatter_single", "reduce_scatter_tensor"
AnyTensor = TypeVar("AnyTensor", bound=Tensor)


class OwnRows(nn.Parameter):
    """This process's rows of a parameter, in the same memory."""


def shard_module(
    module: nn.Module,
    parts: Sequence[nn.Module],
    device: torch.device,
    methods: Sequence[str] = (),
) -> None:
    """Leave this process its own rows of a module's parameters, in place.

    All processes call it together, with the same values, and pass the module together from then on.

    Args:
        module: called as a whole, on `device`.
        parts: modules inside that are gathered one at a time, in the order of the forward pass; the
            rest of the module is gathered for the whole pass.
        device: of the module.
        methods: of the module, which pass it as `forward` does.
    """
    fully: Any = importlib.import_module("torch.distributed.fsdp")
    meshes: Any = importlib.import_module("torch.distributed.device_mesh")
    before_parting(_forget)
    mesh = meshes.DeviceMesh.from_group(torch.distributed.group.WORLD, device.type)
    for one in (*parts, module):
        # Rows alone between two passes: what is saved or averaged then is the same everywhere.
        fully.fully_shard(one, mesh=mesh, reshard_after_forward=True)
        sharded: Any = one
        sharded.set_gradient_divide_factor(1.0)  # gradients are sums here, as without
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_custom_all_gather(_Gather())
        sharded.set_custom_reduce_scatter(_Scatter())
        # A part that is named itself gathers no other before it is needed.
        sharded.set_modules_to_backward_prefetch([one])
    for name in methods:
        fully.register_fsdp_forward_method(module, name)
    for before, one in zip(parts, parts[1:], strict=False):
        if any(p.requires_grad for p in before.parameters()):
            after: Any = one
            after.set_modules_to_backward_prefetch([before])


def _forget() -> None:
    """Let go of the group, which a module that nobody holds and torch's caches of DTensors keep.

    Threads of a group that is kept may free a tensor while the interpreter ends, and abort it.
    """
    gc.collect()
    debug: Any = importlib.import_module("torch.distributed.tensor.debug")
    for name in ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        clear = getattr(debug, name, None)
        if clear is not None:
            clear()


class _Allocates:
    """Where torch's FSDP puts what is sent and received."""

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Allocates):
    """Whole parameters of a part: counted, and an error names the process that is lost."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        wire.note("gathered", (size() - 1) * input_tensor.numel() * input_tensor.element_size())
        call = _found(*_GATHER)
        return talk(call, output_tensor, input_tensor, group=group, async_op=async_op)


class _Scatter(_Allocates):
    """Own rows of the summed gradients of a part; as `_Gather`."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        wire.note("scattered", (size() - 1) * output_tensor.numel() * output_tensor.element_size())
        how = {"op": op, "group": group, "async_op": async_op}
        return talk(_found(*_SCATTER), output_tensor, input_tensor, **how)


def _found(*names: str) -> Any:
    group = torch.distributed
    return next(getattr(group, name) for name in names if hasattr(group, name))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether processes hold a parameter in parts."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def own(tensor: AnyTensor) -> AnyTensor | Tensor:
    """Return this process's rows of a parameter, in its memory; all of one that is not sharded."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor.detach()
    rows: Tensor = part.to_local()
    return rows


def own_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """Return this process's rows as a parameter for an optimizer, the same one in every call.

    A parameter that is not sharded is its own. Only optimizers that treat every value by itself
    may train rows (AdamW does).
    """
    if not is_sharded(parameter):
        return parameter
    found = getattr(parameter, _OWN, None)
    if found is None:
        found = OwnRows(own(parameter), requires_grad=parameter.requires_grad)
        setattr(parameter, _OWN, found)
    rows: nn.Parameter = found
    return rows


def follow(rows: nn.Parameter, parameter: nn.Parameter) -> None:
    """Attach what `own_parameter` gave to its parameter again, which a module may have replaced."""
    rows.data = own(parameter)
    setattr(parameter, _OWN, rows)


def take_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Hand the gradients of sharded parameters to the parameters of their own rows."""
    for parameter in parameters:
        if is_sharded(parameter):
            gradient, parameter.grad = parameter.grad, None
            own_parameter(parameter).grad = None if gradient is None else own(gradient)


def own_range(tensor: Tensor) -> tuple[int, int, int]:
    """Return the first row, the one after the last, and all rows of a sharded parameter."""
    rows = tensor.shape[0]
    each = rows_of_each(rows, size())
    return min(rows, rank() * each), min(rows, (rank() + 1) * each), rows


def rows_of_each(rows: int, processes: int) -> int:
    """Return the rows of a parameter that the first of G processes holds, as many as any."""
    return -(-rows // processes)
