"""A tiny word tokenizer, made on the spot, so that no test needs a download."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Core
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(200)]


def make_tokenizer(
    folder: Path,
    *,
    specials: bool = True,
    pad: bool = True,
    lower: bool = True,
    sep: bool = True,
    template: str = "[CLS] $A [SEP]",
) -> Path:
    """Save a word-level tokenizer: [CLS] text [SEP] (or another template), one id per known word,
    in `folder`.
    """
    vocab = {
        word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])
    }
    core = Core(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        core.normalizer = normalizers.Lowercase()
    if specials:
        core.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | (
        {"pad_token": "[PAD]"} if pad else {}
    )
    if not sep:
        del names["sep_token"]
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(str(folder))
    return folder
