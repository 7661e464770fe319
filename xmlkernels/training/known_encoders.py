"""Shapes of encoders that recipes name, to plan with where their files are not at hand.

Each is the `config.json` of the model of that name, as far as it differs from what transformers
takes for its kind.
"""

from collections.abc import Mapping
from typing import Any

_MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
_ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
_SENTENCE = "sentence-transformers/"

KNOWN: Mapping[str, Mapping[str, Any]] = {
    "minilm": {"model_type": "bert", "num_hidden_layers": 6, **_MINILM},
    f"{_SENTENCE}all-MiniLM-L6-v2": {"model_type": "bert", "num_hidden_layers": 6, **_MINILM},
    f"{_SENTENCE}paraphrase-MiniLM-L3-v2": {
        "model_type": "bert",
        "num_hidden_layers": 3,
        **_MINILM,
    },
    "bert-base-uncased": {"model_type": "bert"},
    "distilbert-base-uncased": {"model_type": "distilbert"},
    f"{_SENTENCE}msmarco-distilbert-base-v4": {"model_type": "distilbert"},
    "roberta-base": _ROBERTA,
    f"{_SENTENCE}paraphrase-distilroberta-base-v2": {**_ROBERTA, "num_hidden_layers": 6},
    f"{_SENTENCE}all-roberta-large-v1": {**_ROBERTA, "num_hidden_layers": 24, **_LARGE},
}
