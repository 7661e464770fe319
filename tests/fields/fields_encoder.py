"""How each setting of the encoders is tested."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from config_runs import Case, Runs, Seen, documents, recorded, training, zero_share
from safetensors.torch import save_file
from torch import Tensor, nn
from train_runs import check

from xmlkernels import InputError

_INNER = "encoder.model."


def kinds(plain: Seen, changed: Seen) -> None:
    assert type(plain.model.encoder).__name__ == "Encoder"
    assert type(changed.model.encoder).__name__ == "BowEncoder"
    assert "encoder.table" in changed.tensors
    assert not [name for name in changed.tensors if name.startswith(_INNER)]


def poolings(plain: Seen, changed: Seen) -> None:
    """One is the mean of the real tokens' last states, the other the state of the first."""
    for seen, cls in ((plain, False), (changed, True)):
        ids, mask = documents(seen).inputs
        with torch.no_grad():
            hidden = seen.model.encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = torch.stack([h[: int(m.sum())].mean(0) for h, m in zip(hidden, mask, strict=True)])
        assert torch.allclose(
            seen.model.embed(documents(seen)), hidden[:, 0] if cls else mean, atol=1e-5
        )


def narrow(plain: Seen, changed: Seen) -> None:
    assert plain.tensors["head.weight"].shape == (30, 32)
    assert changed.tensors["head.weight"].shape == (30, 8)
    x = changed.model.encoder.bottleneck
    assert x.weight.shape == (8, 32)
    assert x.bias is None
    assert changed.moved("encoder.bottleneck.weight").any()


def drops(plain: float, changed: float) -> None:
    """In training alone, the embedding has that share of zeros."""

    def holds(before: Seen, after: Seen) -> None:
        for seen, p in ((before, plain), (after, changed)):
            batch = documents(seen, "train")
            with training(seen.model.encoder):
                shares = zero_share(seen.model.encoder(*batch.inputs))
            assert shares == pytest.approx(p, abs=0.03) and zero_share(seen.model.embed(batch)) == 0

    return holds


def lower_layers_stay(plain: Seen, changed: Seen) -> None:
    frozen = [
        name
        for name in plain.start
        if name.startswith((f"{_INNER}embeddings.", f"{_INNER}encoder.layer.0."))
    ]
    above = [
        name
        for name in plain.start
        if name.startswith(f"{_INNER}encoder.layer.1.") and not name.endswith("key.bias")
    ]
    assert len(frozen) > 15 and len(above) > 14
    assert not any(changed.moved(name).any() for name in frozen)
    assert all(changed.moved(name).any() for name in above)
    matrix = f"{_INNER}encoder.layer.0.output.dense.weight"
    assert plain.moved(matrix).any()
    assert plain.moved(f"{_INNER}embeddings.word_embeddings.weight").any()


def autocasts(plain: Seen, changed: Seen) -> None:
    """A matrix product of the encoder in training gives that format."""
    for seen, dtype, name in ((plain, torch.float32, "fp32"), (changed, torch.bfloat16, "bf16")):
        found: list[torch.dtype] = []
        linear = next(
            module for module in seen.model.encoder.modules() if isinstance(module, nn.Linear)
        )
        handle = linear.register_forward_hook(
            lambda module, given, out, found=found: found.append(out.dtype)
        )
        seen.model.embed(documents(seen))
        handle.remove()
        assert found == [dtype] and seen.report["environment"]["autocast"] == name


def it_is_compiled(runs: Runs, folder: Path) -> None:
    calls: list[dict[str, object]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Module,
            "compile",
            lambda self, **options: calls.append({"module": type(self).__name__} | options),
        )
        recorded(runs.config("tiny", epochs=1))
        assert not calls
        recorded(runs.config("tiny", epochs=1, compile=True, output=str(folder / "run")))
    assert calls == [{"module": "BertModel", "dynamic": True}]


def given_states(runs: Runs, folder: Path) -> None:
    """The encoder starts at the file's values, whose keys begin with another prefix."""
    plain = runs.of("tiny")
    given = {name: value + 0.25 for name, value in plain.start.items() if name.startswith(_INNER)}
    for prefix, changes in (
        ("embedding_labels.encoder.transformer.0.auto_model.", {}),
        ("mine.", {"init_prefix": "mine."}),
    ):
        file = folder / f"{prefix}safetensors"
        save_file(
            {prefix + name.removeprefix(_INNER): value for name, value in given.items()}, file
        )
        output = str(folder / prefix)
        changed = recorded(
            runs.config("tiny", epochs=1, init_state=str(file), output=output, **changes)
        )
        assert all(torch.equal(changed.start[name], value) for name, value in given.items())
        assert torch.equal(changed.start["head.weight"], plain.start["head.weight"])


# ---- bag of words ----


def widths(plain: Seen, changed: Seen) -> None:
    terms = len(plain.inputs.vectorizer)
    assert plain.tensors["encoder.table"].shape == (terms, 24)
    assert changed.tensors["encoder.table"].shape == (terms, 16)
    assert changed.tensors["head.weight"].shape == (30, 16)


def terms_of(texts: list[str], longest: int) -> tuple[Counter[str], Counter[str]]:
    """Count, per term of up to that many words, the texts that contain it and its occurrences."""
    texts_of: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for text in texts:
        words = text.split()
        found = [
            " ".join(words[i : i + n])
            for n in range(1, longest + 1)
            for i in range(len(words) - n + 1)
        ]
        texts_of.update(set(found))
        times.update(found)
    return texts_of, times


def vocabularies(longest: int, least: int, most: int) -> None:
    """The changed run's words are those that its settings choose from the training texts."""

    def holds(plain: Seen, changed: Seen) -> None:
        texts_of, times = terms_of(list(changed.dataset.splits["train"].texts), longest)
        words = changed.inputs.vectorizer.words
        frequent = {term for term, count in texts_of.items() if count >= least}
        if most:
            assert len(words) == most and set(words) < frequent
            assert min(times[word] for word in words) >= max(
                times[word] for word in frequent - set(words)
            )
        else:
            assert set(words) == frequent
        assert len(plain.inputs.vectorizer) != len(words) == len(changed.tensors["encoder.table"])
        assert (
            f"vocabulary: {len(words):,} terms of 1 to {longest} words, each in {least} documents "
            "or more" in changed.told
        )

    return holds


def activations(plain: Seen, changed: Seen) -> None:
    for seen, relu in ((plain, True), (changed, False)):
        assert (seen.model.embed(documents(seen)) >= 0).all() == relu


def words_are_left_out(plain: Seen, changed: Seen) -> None:
    """Half of the weights are 0 in training, the others twice what they were."""
    for seen, p in ((plain, 0.0), (changed, 0.5)):
        encoder, (token, offset, weight) = seen.model.encoder, documents(seen, "train").inputs
        with training(encoder), torch.enable_grad():
            encoder(token, offset, weight)
        *_, used = encoder._passed.pop()
        assert zero_share(used) == pytest.approx(p, abs=0.05)
        assert torch.allclose(used[used != 0], weight[used != 0] / (1 - p))


def first_words(plain: Seen, changed: Seen) -> None:
    """The draws are the same, with the standard deviation that was asked for."""
    table: Tensor = plain.start["encoder.table"]
    assert float(table.std()) == pytest.approx(1, rel=0.05)
    assert torch.allclose(changed.start["encoder.table"], 0.25 * table)


def in_parts(runs: Runs, folder: Path) -> None:
    """Of several processes each builds its part of the encoder, where nothing stands against it.

    tests/training/test_train_processes.py runs it.
    """
    told = "--shard-encoder: expected several processes, got one; start it by torchrun, or take off"
    with pytest.raises(InputError, match=told):
        runs.of("tiny", shard_encoder="on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")

        def early(base: str = "tiny", **more: object) -> bool:
            return check(runs.config(base, output=str(folder / "none"), **more)).encoder_sharded

        assert early(shard_encoder="on") and not early(shard_encoder="off") and not early()
        for told, base, more in (
            ("--shard-encoder: expected a transformer, got --encoder bow", "bow", {}),
            ("--shard-labels: expected auto with", "tiny", {"shard_labels": "off"}),
            ("--compile: expected False with --shard-encoder on", "tiny", {"compile": True}),
        ):
            with pytest.raises(InputError, match=told):
                early(base, shard_encoder="on", **more)


FIELDS = {
    "encoder": (Case("tiny", {"encoder": "bow", "table_optimizer": "adam"}, kinds),),
    "pooling": (Case("tiny", {"pooling": "cls"}, poolings),),
    "bottleneck": (Case("tiny", {"bottleneck": 8}, narrow),),
    "dropout": (
        Case("tiny", {"dropout": 0.5}, drops(0.1, 0.5)),
        Case("bow", {"dropout": 0.6}, drops(0.1, 0.6), {"bow_activation": "none"}),
    ),
    "freeze": (Case("tiny", {"freeze": 1}, lower_layers_stay),),
    "precision": (Case("tiny", {"precision": "bf16"}, autocasts),),
    "compile": (it_is_compiled,),
    "shard_encoder": (in_parts,),
    "init_state": (given_states,),
    "init_prefix": (given_states,),
    "bow_width": (Case("bow", {"bow_width": 16}, widths),),
    "ngrams": (
        Case("bow", {"ngrams": 1}, vocabularies(1, 1, 0)),
        Case("bow", {"ngrams": 3}, vocabularies(3, 1, 0)),
    ),
    "min_df": (Case("bow", {"min_df": 4}, vocabularies(2, 4, 0)),),
    "max_features": (Case("bow", {"max_features": 20}, vocabularies(2, 1, 20)),),
    "bow_activation": (Case("bow", {"bow_activation": "none"}, activations),),
    "word_dropout": (Case("bow", {"word_dropout": 0.5}, words_are_left_out),),
    "word_std": (Case("bow", {"word_std": 0.25}, first_words),),
}
