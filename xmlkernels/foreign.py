"""Refuse folders of models or tokenizers that need code of their own or pickled weights.

Nothing is loaded here: names of files and JSON alone are looked at. Weights are read from
safetensors, which hold numbers and nothing else; code of a repository (`auto_map`) never runs,
whether it lies in a folder or on the hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xmlkernels.errors import InputError
from xmlkernels.records import read_record

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_AGAIN = "fetch the folder again"
_OWN_CODE = (
    "choose a model that transformers knows; where its own class is the right one, remove auto_map "
    "from the file"
)
_CONVERT = "save the model as safetensors where it comes from: model.save_pretrained(FOLDER)"


def refuse_model(folder: Path) -> None:
    """InputError unless a folder's model is of transformers and its weights are safetensors."""
    refuse_code(folder)
    _refuse_pickle(folder)


def refuse_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuse the same in a configuration that is loaded before its weights."""
    refuse_auto_map(settings, where)
    _refuse_weights_name(settings, where)


def refuse_code(folder: Path) -> None:
    """Raise InputError where a JSON file of settings names Python code of its own (`auto_map`).

    So does a file that is no JSON object.
    """
    for path in (folder / CONFIG, folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        settings = read_record(path, dict[str, Any], mend=_AGAIN)
        refuse_auto_map(settings, str(path))


def refuse_auto_map(settings: Mapping[str, Any], where: str) -> None:
    """Raise InputError where settings name Python code in place of a class of transformers.

    Settings inside them count too.
    """
    if code := next(_auto_maps(settings), None):
        raise InputError(
            where,
            "a model of transformers, for no other code runs",
            f"auto_map, which names {code}",
            _OWN_CODE,
        )


def _refuse_pickle(folder: Path) -> None:
    """Raise InputError where a folder's weights are no safetensors.

    Whether there are any, their loader says.
    """
    if (folder / "adapter_config.json").exists():
        mend = "merge it into its model (merge_and_unload) and save that"
        raise InputError(
            str(folder), "a whole model", "an adapter to another one (adapter_config.json)", mend
        )
    if (folder / CONFIG).is_file():
        _refuse_weights_name(
            read_record(folder / CONFIG, dict[str, Any], mend=_AGAIN), str(folder / CONFIG)
        )
    if (folder / WEIGHTS).is_file():
        return
    if (folder / INDEX).is_file():
        _check_index(folder)
        return
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if found:
        got = f"{found[0]}, a file that can hold code"
        raise InputError(str(folder), f"weights in {WEIGHTS}", got, _CONVERT)


def _refuse_weights_name(settings: Mapping[str, Any], where: str) -> None:
    """InputError where a configuration names a file of weights that is not safetensors."""
    name = settings.get("transformers_weights")
    if name is not None and not _is_plain(name, (".safetensors", ".safetensors.index.json")):
        raise InputError(
            f"{where}, $.transformers_weights",
            "a safetensors file of the folder",
            repr(name)[:60],
            _CONVERT,
        )


def _check_index(folder: Path) -> None:
    index: dict[str, Any] = read_record(folder / INDEX, dict[str, Any], mend=_AGAIN)
    names = index.get("weight_map")
    if not isinstance(names, dict):
        raise InputError(
            f"{folder / INDEX}, $.weight_map",
            "the file of each weight",
            type(names).__name__,
            _AGAIN,
        )
    for name in dict.fromkeys(map(str, names.values())):
        if not _is_plain(name, (".safetensors",)):
            raise InputError(
                f"{folder / INDEX}, $.weight_map",
                "safetensors files of the folder",
                repr(name)[:60],
                _CONVERT,
            )
        if not (folder / name).is_file():
            raise InputError(
                str(folder / name), f"a file that {INDEX} names", "no such file", _AGAIN
            )


def _is_plain(name: Any, ends: tuple[str, ...]) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(ends)
        and Path(name).name == name
        and "\\" not in name
    )


def _auto_maps(value: Any) -> Iterator[str]:
    """Yield what every non-empty `auto_map` names first."""
    if isinstance(value, list):
        for item in value:
            yield from _auto_maps(item)
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        if key == "auto_map" and item:
            named = next(iter(item.values())) if isinstance(item, dict) else item
            yield repr(named)[:60]
        yield from _auto_maps(item)
