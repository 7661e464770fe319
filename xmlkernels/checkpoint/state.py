"""Checkpoint content besides weights: exact JSON, generator states, optimizer states by name.

The public names are those of `xmlkernels.checkpoint`.
"""

from __future__ import annotations

import base64
import math
import random
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
import torch

from xmlkernels.errors import InputError
from xmlkernels.records import Meta, check_record

_Word = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class _Key(TypedDict):
    key: Annotated[list[_Word], Meta(min_length=624, max_length=624)]
    pos: Annotated[int, Meta(ge=0, le=624)]


class _Legacy(TypedDict):
    bit_generator: Literal["MT19937"]
    state: _Key
    has_gauss: Annotated[int, Meta(ge=0, le=1)]
    gauss: float


class _Generators(TypedDict):
    python: tuple[int, list[_Word], float | None]
    torch: str
    numpy: _Legacy
    cuda: NotRequired[list[str]]


_FLOAT = "__float__"
_STATELESS = "none"


def encode(value: Any, path: str = "state") -> Any:
    """Return `value` in strict JSON.

    Non-finite floats become {"__float__": "nan"}, NumPy scalars numbers, tuples lists.

    Raises:
        InputError: anything else than None, bool, int, float, str, list, tuple, or dict with str
            keys; names its place.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _FLOAT:
                mend = "json would change it; use strings"
                raise InputError(path, f"keys of type str other than {_FLOAT!r}", repr(key), mend)
        return {key: encode(item, f"{path}.{key}") for key, item in value.items()}
    mend = "put tensors and arrays among the tensors"
    raise InputError(
        path, "a JSON value (None, bool, int, float, str, list, dict)", type(value).__name__, mend
    )


def decode(value: Any) -> Any:
    """Invert `encode`; tuples come back as lists.

    Raises:
        InputError: For a float that `encode` does not write.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            if value[_FLOAT] not in ("nan", "inf", "-inf"):
                got, mend = repr(value[_FLOAT])[:40], "restore the checkpoint from a copy"
                raise InputError(f"state, {_FLOAT}", "nan, inf or -inf", got, mend)
            return float(value[_FLOAT])
        return {key: decode(item) for key, item in value.items()}
    return value


def rng_state() -> dict[str, Any]:
    """Return the states of all default generators, JSON-ready.

    Those of Python, NumPy (legacy), torch's CPU and every CUDA device.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(s) for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }
    legacy: Any = np.random.get_state(legacy=False)
    legacy["state"] = {"key": legacy["state"]["key"].tolist(), "pos": legacy["state"]["pos"]}
    return {**state, "numpy": legacy}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state()` gave. Nothing is changed unless every part is there.

    Raises:
        InputError: a part is missing or malformed, or the state has CUDA generators and their
            number is another here.
    """
    where = "random generator state"
    check_record(state, _Generators, where=where, mend="save it anew")
    cuda = list(state.get("cuda", []))
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cuda and len(cuda) != here:
        mend = "resume on as many devices, or drop state['cuda'] and accept other draws"
        raise InputError(where, f"{here} CUDA generators, as on this machine", str(len(cuda)), mend)
    before = rng_state()
    try:
        _apply(state)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        _apply(before)
        raise InputError(
            where, "what rng_state() gives", f"{type(error).__name__} {error}", "save it anew"
        ) from error


def _apply(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    legacy = dict(state["numpy"])
    legacy["state"] = {**legacy["state"], "key": np.array(legacy["state"]["key"], dtype=np.uint32)}
    np.random.set_state(legacy)
    torch.set_rng_state(_bytes(state["torch"]))
    if state.get("cuda"):
        torch.cuda.set_rng_state_all([_bytes(s) for s in state["cuda"]])


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_params: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return the state of every parameter under "NAME/KEY", as "model.bias/exp_avg".

    Names do not depend on the order of parameter groups.

    A parameter that has no state yet (it never had a gradient) leaves an empty "NAME/none". Rates
    and other settings of the groups belong to the run's configuration and are not here.

    Args:
        named_params: `module.named_parameters()`, or its items; every parameter of the optimizer
            must be among them.

    Raises:
        InputError: a parameter without a name, or state that is no tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _named(optimizer, named_params):
        state = optimizer.state.get(parameter, {})
        entries = {key: value for key, value in state.items() if value is not None}
        for key, value in entries.items():
            if not isinstance(value, torch.Tensor):
                mend = "use an optimizer that keeps tensors"
                raise InputError(
                    f"optimizer state {name}/{key}", "a tensor", type(value).__name__, mend
                )
            tensors[f"{name}/{key}"] = value
        if not entries:
            tensors[f"{name}/{_STATELESS}"] = torch.empty(0)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_params: Iterable[tuple[str, torch.Tensor]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Restore what `optimizer_tensors` returned.

    Tensors are copied, moments onto the parameter's device; groups stay as they are.

    Raises:
        InputError: names missing or left over, or a state of another shape. The optimizer is then
            unchanged.
    """
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        saved.setdefault(name, {})[key] = tensor
    order = _named(optimizer, named_params)
    names = {name for name, _ in order}
    if names != saved.keys():
        gone, extra = sorted(names - saved.keys()), sorted(saved.keys() - names)
        got = f"none for {gone[:3]} ({len(gone)}), beyond them {extra[:3]} ({len(extra)})"
        raise InputError(
            "optimizer state", f"state of {len(names)} parameters", got, "build the same model"
        )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for number, (name, parameter) in enumerate(order):
        entries = {k: v for k, v in saved[name].items() if k != _STATELESS}
        for key, value in entries.items():
            if value.numel() != 1 and value.shape != parameter.shape:
                shape = f"shape {tuple(parameter.shape)}"
                raise InputError(
                    f"optimizer state {name}/{key}",
                    shape,
                    str(tuple(value.shape)),
                    "build the same model",
                )
        if entries:
            state[number] = {key: value.clone() for key, value in entries.items()}
    # Numbers its parameters in the order of its groups, as `order` does.
    full_state = optimizer.state_dict()
    optimizer.load_state_dict({**full_state, "state": state})


def _named(
    optimizer: torch.optim.Optimizer, named_params: Iterable[tuple[str, torch.Tensor]]
) -> list[tuple[str, torch.Tensor]]:
    names = {id(parameter): name for name, parameter in named_params}
    order = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                got = f"a nameless one of shape {tuple(parameter.shape)}"
                mend = "pass the named_parameters() of every module it trains"
                raise InputError("optimizer state", "a name for every parameter", got, mend)
            order.append((names[id(parameter)], parameter))
    return order
