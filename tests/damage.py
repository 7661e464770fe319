"""Damage done to files, and files made to look as they did before there were checksums."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def flip(path: Path, bit: int) -> None:
    """Turns one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def without_checksums(folder: Path) -> None:
    """A checkpoint as it was written before: its two files then say nothing of their content."""
    state, weights = folder / "state.json", folder / "tensors.safetensors"
    head = json.loads(state.read_text("utf-8"))
    for told in head["tensors"].values():
        told.pop("xxh3_128", None)
    head["state"].pop("beside", None)
    state.write_text(json.dumps(head), "utf-8")
    with safe_open(weights, "pt") as file:
        identity = file.metadata()["identity"]
    tensors = {name: value.clone() for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"identity": identity})
