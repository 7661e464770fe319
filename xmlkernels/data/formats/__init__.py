"""Readers and writers of every raw format.

| format | files | functions |
|---|---|---|
| texts, one per line | `trn_X.txt`, `Y.txt` | `iter_lines` `read_lines` `write_lines` |
| sparse text | `trn_X_Y.txt`, `trn_X_Xf.txt` | `read_sparse` `write_sparse` |
| old bag of words | `train.txt` | `read_bow` |
| label lines | `Y.trn.txt` | `read_label_lines` |
| any label file | the above and .npz, .json | `read_labels` |
| LF JSON lines | `trn.json.gz`, `lbl.json.gz` | `iter_lf_json` `read_lf_json` `count_lf_records` |
| AttentionXML texts and string labels | `train_raw_texts.txt`, `train_labels.txt` | `read_raw_texts` `read_label_strings` `encode_label_strings` |
| scipy sparse | `Y.trn.npz` | `read_npz` `write_npz` |
| filter pairs | `filter_labels_test.txt` | `read_filter_pairs` `write_filter_pairs` `select_pairs` |
| Renee's token maps | `trn_doc_input_ids.dat` | `open_token_map` `open_token_maps` `token_rows` |

A user's mistake is an InputError that names file and line; what was mended or left out is a
DataWarning.
"""  # noqa: E501  (a table row cannot be broken)

from xmlkernels.data.formats.labels import (
    LabelFormat,
    check_same_length,
    label_format,
    read_label_files,
    read_labels,
)
from xmlkernels.data.formats.lf_json import (
    LFRecord,
    LFRecords,
    count_lf_records,
    iter_lf_json,
    read_lf_json,
)
from xmlkernels.data.formats.matrices import (
    canonical_csr,
    drop_unlabelled,
    read_filter_pairs,
    read_npz,
    select_pairs,
    write_filter_pairs,
    write_npz,
)
from xmlkernels.data.formats.sparse_text import (
    Duplicates,
    read_bow,
    read_label_lines,
    read_sparse,
    write_sparse,
)
from xmlkernels.data.formats.text_lines import (
    Divider,
    EncodedLabels,
    encode_label_strings,
    iter_lines,
    join_parts,
    label_divider,
    read_label_strings,
    read_lines,
    read_raw_texts,
    split_title,
    write_lines,
)
from xmlkernels.data.formats.token_maps import open_token_map, open_token_maps, token_rows

__all__ = [
    "Divider",
    "Duplicates",
    "EncodedLabels",
    "LFRecord",
    "LFRecords",
    "LabelFormat",
    "canonical_csr",
    "check_same_length",
    "count_lf_records",
    "drop_unlabelled",
    "encode_label_strings",
    "iter_lf_json",
    "iter_lines",
    "join_parts",
    "label_divider",
    "label_format",
    "open_token_map",
    "open_token_maps",
    "read_bow",
    "read_filter_pairs",
    "read_label_files",
    "read_label_lines",
    "read_label_strings",
    "read_labels",
    "read_lf_json",
    "read_lines",
    "read_npz",
    "read_raw_texts",
    "read_sparse",
    "select_pairs",
    "split_title",
    "token_rows",
    "write_filter_pairs",
    "write_lines",
    "write_npz",
    "write_sparse",
]
