"""Define ops: schema, default kernel, shapes of the results, GPU kernel, public function."""

import functools
import importlib
import inspect
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, library

from xmlkernels import native
from xmlkernels.errors import InputError
from xmlkernels.ops.checks import describe

_untyped: Any = library  # `Library` has no types in torch
_library = _untyped.Library("xmlkernels", "DEF")
missing: str | None = native.load()
"""Why the native library is not loaded; None when it is."""

_INT64 = range(-(2**63), 2**63)
P = ParamSpec("P")
R = TypeVar("R")


def define(
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None],
    *,
    writes: Sequence[str] = (),
    cuda: str | None = None,
) -> None:
    """Define the op that `reference` is the meaning of; it has the reference's name and arguments.

    Args:
        reference: the op in plain torch; the kernel of every device that has no other.
        fake: returns results of the right shape and dtype, without computing them.
        check: takes the op's arguments and raises InputError where they do not fit. The public
            function has called it; the reference, which `torch.ops` reaches without that function,
            calls it too. (The native kernels have checks of their own.)
        writes: the arguments that the op updates in place.
        cuda: the module with the GPU kernel, a function of the op's name; imported on the first
            call. None: a kernel in CUDA C++, or none.
    """
    name = reference.__name__
    schema = library.infer_schema(reference, mutates_args=writes, op_name=name)
    # The stable ABI of the native kernels takes plain integers.
    _library.define(schema.replace("SymInt ", "int "))

    def default(*args: Any, **kwargs: Any) -> Any:
        arguments = getattr(torch.ops.xmlkernels, name).default._schema.arguments
        for argument, value in zip(arguments, args, strict=False):
            # The dispatcher takes None for a tensor that is not defined.
            if value is None and str(argument.type) == "Tensor":
                _check_type(name, argument.name, value, Tensor, optional=False)
        device = _device(args).type
        reasons = {"cpu": missing, "cuda": native.missing_cuda}
        reason = reasons.get(device) or f"no kernel of `{name}` is built for {device}"
        native.warn_reference(device, reason)
        check(*args, **kwargs)
        return reference(*args, **kwargs)

    _library.impl(name, default, "CompositeExplicitAutograd")
    library.register_fake(f"xmlkernels::{name}", fake, lib=_library)
    if cuda is not None:
        _library.impl(name, _cuda_kernel(name, cuda), "CUDA")


def _device(args: Sequence[Any]) -> torch.device:
    return next(a for a in args if isinstance(a, Tensor)).device


def _cuda_kernel(name: str, module: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        try:
            function = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ModuleNotFoundError(
                f"{name}: its GPU kernel needs triton: `pip install triton`", name="triton"
            ) from error
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(_device(args)):
            return function(*args, **kwargs)

    return kernel


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Make a public op check the types of its arguments by its signature, before anything else."""
    op = function.__name__
    names, kinds = [], {}
    for parameter in inspect.signature(function).parameters.values():
        one = getattr(parameter.annotation, "__args__", (parameter.annotation,))
        kinds[parameter.name] = one[0], type(None) in one
        names.append(parameter.name)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name not in kinds:
                continue  # Python itself refuses it, in the call below
            kind, optional = kinds[name]
            if (kind is Tensor and isinstance(value, Tensor)) or (optional and value is None):
                continue
            _check_type(op, name, value, kind, optional)
        return function(*args, **kwargs)

    return checked


def _check_type(op: str, name: str, value: object, kind: type, optional: bool) -> None:
    if kind is Tensor:
        good, expected = False, "a torch.Tensor"
        mend = "convert it, for example with torch.as_tensor" if value is not None else "pass one"
    elif kind is int:
        # NumPy's integers are welcome, a tensor is not: on a card it would have to be waited for.
        good = isinstance(value, torch.SymInt) or _fits_int64(value)
        expected, mend = "an int of 64 bits", "pass a whole number"
    elif kind is float:
        good = isinstance(value, numbers.Real) and not isinstance(value, bool)
        expected, mend = "a float", "pass a number"
    else:
        scalar = str(getattr(value, "dtype", "")) == "bool" and getattr(value, "shape", None) == ()
        good = isinstance(value, int) or scalar
        expected, mend = "a bool", "pass True or False"
    if optional:
        expected, mend = f"{expected} or None", f"{mend}, or leave it out"
    if not good:
        raise InputError(f"{op}: argument {name}", expected, _describe_any(value), mend)


def _fits_int64(value: object) -> bool:
    if isinstance(value, bool | Tensor):
        return False
    try:
        return operator.index(value) in _INT64  # type: ignore[arg-type]
    except TypeError:  # an array of several
        return False


def _describe_any(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor, {describe(value)}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    module, name = type(value).__module__, type(value).__qualname__
    name = name if module == "builtins" else f"{module}.{name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def mark_written(*tensors: Tensor | None) -> None:
    """Tell autograd that an op is about to change tensors in place.

    A later backward that needs their old values is then refused, not wrong.
    """
    torch.autograd.graph.increment_version(
        [t for t in tensors if t is not None and not t.is_inference()]
    )
