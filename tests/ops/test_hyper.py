"""`Hyper`: the names of the numbers that steer a step, and their places in every language."""

import re
from pathlib import Path

import pytest
import torch

from xmlkernels.ops import Hyper, hyper
from xmlkernels.reference import hyper as reference

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def test_the_tensor_holds_the_fields_in_order() -> None:
    values = Hyper(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    tensor = values.tensor("cpu")
    assert tensor.dtype == torch.float32 and tensor.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert Hyper(*tensor.tolist()) == values
    for place, name in enumerate(Hyper._fields):
        assert getattr(hyper, name.upper()) == place
        assert getattr(values, name) == tensor[getattr(hyper, name.upper())]


def test_the_defaults_are_plain_sgd() -> None:
    assert Hyper(0.5) == (0.5, 0.0, 0.0, 0.999, 1e-8, 1.0, 1.0)


@pytest.mark.parametrize("name", Hyper._fields)
def test_the_reference_and_triton_agree(name: str) -> None:
    assert getattr(reference, name.upper()) == getattr(hyper, name.upper())
    triton = pytest.importorskip("xmlkernels.triton.hyper", exc_type=ImportError)
    assert getattr(triton, name.upper()).value == getattr(hyper, name.upper())


def test_the_kernels_agree() -> None:
    """The C++ struct has the same fields, floats all, in the same order."""
    source = (CSRC / "kernels.h").read_text("utf-8")
    body = re.search(r"struct Hyper \{(.*?)\};", source, re.DOTALL)
    assert body is not None
    code = re.sub(r"//[^\n]*", "", body[1])
    assert re.findall(r"(\w+) (\w+);", code) == [("float", name) for name in Hyper._fields]
