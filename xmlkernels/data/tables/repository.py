"""Folders of the Extreme Classification Repository and its kin, by the names of their files."""

from __future__ import annotations

from pathlib import Path

from xmlkernels.data.layouts import Reading, Source
from xmlkernels.data.raw import Files

_PACKED = ("", ".gz", ".bz2", ".xz")
_SPLITS = ("train", "val", "test")
# Layout: names of texts, of labels and of filter pairs, by split; and those of the label texts.
_TEXT = {
    "train": (("trn_X.txt", "X.trn.txt"), ("trn_X_Y.txt", "Y.trn.npz", "Y.trn.txt", "trn_Y.txt"),
              "filter_labels_train.txt"),
    "val": (("val_X.txt", "X.val.txt"), ("val_X_Y.txt", "Y.val.npz", "Y.val.txt", "val_Y.txt"),
            "filter_labels_val.txt"),
    "test": (("tst_X.txt", "X.tst.txt"), ("tst_X_Y.txt", "Y.tst.npz", "Y.tst.txt", "tst_Y.txt"),
             "filter_labels_test.txt"),
}  # fmt: skip
_LF = {
    "train": (("trn.json",), (), "filter_labels_train.txt"),
    "val": (("val.json",), (), "filter_labels_val.txt"),
    "test": (("tst.json",), (), "filter_labels_test.txt"),
}
_RAW = {
    "train": (("train_raw_texts.txt",), ("train_labels.txt",), ""),
    "val": (("val_raw_texts.txt",), ("val_labels.txt",), ""),
    "test": (("test_raw_texts.txt",), ("test_labels.txt",), ""),
}
_LAYOUTS: tuple[tuple[Source, dict, tuple[str, ...]], ...] = (  # type: ignore[type-arg]
    ("text", _TEXT, ("Y.txt", "output-items.txt")),
    ("lf", _LF, ("lbl.json",)),
    ("attentionxml", _RAW, ()),
)


def repository_files(folder: Path) -> tuple[Reading, dict[str, Files]] | None:
    """Find how a folder of the field's usual files is read; None where it holds no such.

    Args:
        folder: for example of `trn_X.txt`, `trn_X_Y.txt`, `tst_X.txt`, `tst_X_Y.txt`, `Y.txt`.
    """
    for source, layout, label_names in _LAYOUTS:
        found: dict[str, Files] = {}
        for split in _SPLITS:
            texts, labels, pairs = layout[split]
            text = _first(folder, texts)
            beside = _first(folder, labels)
            if text is not None and (beside is not None or not labels):
                found[split] = Files(text, beside, _first(folder, (pairs,) if pairs else ()))
        if "train" in found:
            return Reading(source, label_text=_first(folder, label_names)), found
    return None


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    paths = (folder / f"{name}{packed}" for name in names for packed in _PACKED)
    return next((path for path in paths if path.is_file()), None)
