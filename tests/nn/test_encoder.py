import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from xmlkernels.errors import InputError
from xmlkernels.nn.dropout import Dropout, dropout
from xmlkernels.nn.encoder import Encoder

transformers = pytest.importorskip("transformers")
PREFIX = "embedding_labels.encoder.transformer.0.auto_model."


def batch(
    rows: int = 3, length: int = 9, pad_left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        dead = slice(0, 2 * row) if pad_left else slice(length - 2 * row, length)
        mask[row, dead] = 0
        ids[row, dead] = 1
    return ids, mask


def roberta(**options: object) -> Encoder:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    model = transformers.RobertaModel(config, add_pooling_layer=False)
    return Encoder(model, **options).eval()  # type: ignore[arg-type]


def test_mean_pooling_counts_real_tokens_only() -> None:
    encoder = Encoder.tiny(50).eval()
    ids, mask = batch()
    with torch.no_grad():
        out = encoder(ids, mask)
        hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        for row in range(3):
            real = int(mask[row].sum())
            torch.testing.assert_close(out[row], hidden[row, :real].mean(0))
            alone = encoder(ids[row : row + 1, :real], mask[row : row + 1, :real])
            torch.testing.assert_close(out[row], alone[0], rtol=1e-5, atol=1e-6)
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        assert out.shape == (3, 32)
        assert encoder.width == 32
        changed = ids.clone()
        changed[mask == 0] = 7
        assert torch.equal(encoder(changed, mask), out)
        empty = encoder(ids, torch.zeros_like(mask))
        assert torch.isfinite(empty).all() and not empty.any()


@pytest.mark.parametrize("grad", [False, True])
def test_empty_rows_give_zero_not_nan(grad: bool) -> None:
    encoder = Encoder.tiny(50).eval()
    ids, mask = batch()
    mask[1] = 0
    with torch.set_grad_enabled(grad):
        out = encoder(ids, mask)
    assert torch.isfinite(out).all() and not out[1].any() and out[0].any()
    if grad:
        out.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("pad_left", [False, True])
def test_cls_is_the_first_real_token(pad_left: bool) -> None:
    # Its positions count real tokens, so padding on the left changes nothing.
    encoder = roberta(pooling="cls")
    ids, mask = batch(pad_left=pad_left)
    with torch.no_grad():
        out = encoder(ids, mask)
        for row in range(3):
            real = ids[row][mask[row] == 1][None]
            hidden = encoder.model(
                input_ids=real, attention_mask=torch.ones_like(real)
            ).last_hidden_state
            torch.testing.assert_close(out[row], hidden[0, 0], rtol=1e-5, atol=1e-6)


def test_training_attention_equals_sdpa() -> None:
    encoder = Encoder.tiny(50).eval()
    ids, mask = batch()
    stock = Encoder.tiny(50).eval()
    stock.model.set_attn_implementation("sdpa")
    assert encoder.model.config._attn_implementation == "xmlkernels"
    out, expected = encoder(ids, mask), stock(ids, mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    for (name, p), q in zip(encoder.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids, mask), expected.detach(), rtol=1e-5, atol=1e-6)


def test_causal_models_stay_causal() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    encoder = Encoder(transformers.GPT2Model(config), pooling="cls").eval()
    ids, mask = batch(2, 6)
    for rows in (slice(0, 1), slice(0, 2)):  # without and with padding
        changed = ids[rows].clone()
        changed[:, 1:] = 9
        torch.testing.assert_close(
            encoder(ids[rows], mask[rows]), encoder(changed, mask[rows]), rtol=1e-5, atol=1e-6
        )


def test_dropout_has_its_distribution_and_gradient() -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 1001, requires_grad=True)
    y = dropout(x, 0.1)
    kept = y != 0
    assert y[kept].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4)
    rate = 1 - kept.float().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / x.numel()) ** 0.5
    pairs = (
        (kept[:, 1:] & kept[:, :-1]).float().mean().item(),
        (kept[1:] & kept[:-1]).float().mean().item(),
    )
    assert pairs == pytest.approx((0.81, 0.81), abs=0.004)  # neighbours are independent
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    assert torch.equal(grad, 3 * y.detach())
    half = dropout(torch.ones(4, 5, dtype=torch.bfloat16), 0.5)
    assert half.dtype == torch.bfloat16 and set(half.unique().tolist()) <= {0.0, 2.0}
    assert dropout(x, 0.0) is x and not dropout(x, 1.0).any()
    assert dropout(torch.ones(0, 3), 0.5).shape == (0, 3)
    layer = Dropout(0.5)
    assert layer.eval()(x) is x and (layer.train()(x) == 0).any()


def test_generator_decides_the_masks() -> None:
    encoder = Encoder.tiny(50, dropout=0.3).train()
    # The embedding, and three in each layer.
    assert sum(type(m) is Dropout for m in encoder.model.modules()) == 7
    ids, mask = batch()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = encoder(ids, mask), encoder(ids, mask)
    torch.set_rng_state(state)
    assert torch.equal(encoder(ids, mask), first) and not torch.equal(first, second)
    torch.set_rng_state(state)
    with torch.no_grad():  # the first pass of gradient caching
        assert torch.equal(encoder(ids, mask), first)
    dropped = (first == 0).float().mean().item()
    assert 0.1 < dropped < 0.5
    encoder.eval()
    assert torch.equal(encoder(ids, mask), encoder(ids, mask))


def test_bottleneck_and_autocast() -> None:
    torch.manual_seed(0)
    encoder = Encoder.tiny(50, bottleneck=8, autocast=torch.bfloat16).eval()
    assert encoder.width == 8 and encoder.bottleneck is not None and encoder.bottleneck.bias is None
    weight = encoder.bottleneck.weight
    drawn = weight.detach()
    bound = 32**-0.5  # U(-1/sqrt(H), 1/sqrt(H)): 256 draws come near both ends
    assert -bound <= float(drawn.min()) < -0.9 * bound and 0.9 * bound < float(drawn.max()) <= bound
    assert weight.dtype == torch.float32 and weight.shape == (8, 32)
    ids, mask = batch()
    out = encoder(ids, mask)
    assert out.dtype == torch.float32 and out.shape == (3, 8)
    pooled = encoder._pool(
        encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask
    )
    exact = pooled @ weight.T
    error = (out - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.03  # bf16 was used, and no more than bf16
    out.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    encoder.autocast = None
    torch.testing.assert_close(encoder(ids, mask), exact, rtol=1e-5, atol=1e-6)


def test_tiny_is_seeded_and_leaves_the_generator() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b, c = Encoder.tiny(50, seed=1), Encoder.tiny(50, seed=1), Encoder.tiny(50, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(
        a.model.embeddings.word_embeddings.weight, c.model.embeddings.word_embeddings.weight
    )
    assert not any("pooler" in k for k in a.state_dict())


def test_rebuilt_from_its_description() -> None:
    options = {"pooling": "cls", "bottleneck": 8, "dropout": 0.25, "autocast": torch.bfloat16}
    for encoder in (Encoder.tiny(50, **options), roberta(**options)):
        text = json.dumps(encoder.encoder_config())
        assert "_name_or_path" not in text
        twin = Encoder.from_config(json.loads(text))
        twin.load_state_dict(encoder.state_dict())
        assert twin.encoder_config() == encoder.encoder_config()
        ids, mask = batch()
        assert torch.equal(twin.eval()(ids, mask), encoder.eval()(ids, mask))
    for bad in [
        {},
        {"model": {}},
        {"model": {"model_type": "no-such"}},
        {**json.loads(text), "surplus": 1},
    ]:
        with pytest.raises(InputError, match="encoder configuration"):
            Encoder.from_config(bad)
    with pytest.raises(InputError, match="float8"):
        Encoder.from_config({**json.loads(text), "autocast": "float8"})


def test_local_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.BertModel(config)  # with a pooling layer, which the encoder has no use for
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    capfd.readouterr()
    encoder = Encoder.from_pretrained(tmp_path / "m").eval()
    assert capfd.readouterr().err == ""
    assert encoder.width == 16 and all(p.dtype == torch.float32 for p in encoder.parameters())
    assert not any("pooler" in k for k in encoder.state_dict())
    assert str(tmp_path) not in json.dumps(encoder.encoder_config())
    ids, mask = batch()
    hidden = model.float().eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask)[0], hidden[0].mean(0), rtol=1e-5, atol=1e-6)

    weights = model.state_dict()
    del weights["encoder.layer.0.output.dense.weight"]
    model.save_pretrained(tmp_path / "holes", state_dict=weights)
    with pytest.raises(InputError, match="output.dense.weight"):
        Encoder.from_pretrained(tmp_path / "holes")
    with pytest.raises(InputError, match="nowhere"):
        Encoder.from_pretrained(tmp_path / "nowhere")


def test_unusable_models_are_told(tmp_path: Path) -> None:
    t5 = transformers.T5Config(
        vocab_size=50, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8
    )
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="encoder-decoder 't5'"):
        Encoder.from_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="encoder-decoder"):
        Encoder(transformers.T5Model(t5))
    vit = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    with pytest.raises(InputError, match="text model"):
        Encoder(transformers.ViTModel(vit))
    bert = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    with pytest.raises(InputError, match="last_hidden_state"):
        Encoder(transformers.BertForSequenceClassification(bert))
    for bad in [
        {"pooling": "max"},
        {"bottleneck": -1},
        {"dropout": 1.0},
        {"autocast": torch.float32},
    ]:
        with pytest.raises(InputError, match=next(iter(bad))):
            Encoder.tiny(50, **bad)


def test_too_long_is_told() -> None:
    encoder = roberta()  # 34 positions, of which RoBERTa leaves the first two unused
    assert encoder.max_length == 32 and Encoder.tiny(50).max_length == 512
    encoder(torch.full((1, 32), 5), torch.ones(1, 32, dtype=torch.int64))
    with pytest.raises(InputError, match="at most 32 tokens"):
        encoder(torch.full((1, 33), 5), torch.ones(1, 33, dtype=torch.int64))


def test_weights_of_another_project(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    source = transformers.DistilBertModel(config)
    state = {PREFIX + k: v.clone() for k, v in source.state_dict().items()}
    state[PREFIX + "embeddings.position_ids"] = torch.arange(512)[None]
    state["other.weight"] = torch.ones(2)
    from safetensors.torch import save_file

    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        encoder = Encoder(transformers.DistilBertModel(config))
        encoder.load_weights(tmp_path / name, PREFIX)
        assert all(
            torch.equal(v, source.state_dict()[k]) for k, v in encoder.model.state_dict().items()
        )

    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    key = PREFIX + "embeddings.word_embeddings.weight"

    def refused(changed: object, match: str) -> None:
        torch.save(changed, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=match):
            encoder.load_weights(tmp_path / "bad.pt", PREFIX)

    refused(
        {k: v for k, v in state.items() if k != key}, "none for embeddings.word_embeddings.weight"
    )
    refused({**state, PREFIX + "extra.weight": torch.ones(1)}, "also extra.weight")
    refused({**state, key: torch.ones(51, 16)}, r"shape \(50, 16\).*got \(51, 16\)")
    refused({"x": torch.ones(1)}, "keys that begin with")
    refused([1], "flat dict")
    refused({"x": nn.Linear(1, 1)}, "plain tensors")  # needs a pickle that runs code: not read
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:999])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:999])
    for name in ("cut.pt", "cut.safetensors", "none.pt"):
        with pytest.raises(InputError, match=name):
            encoder.load_weights(tmp_path / name, PREFIX)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_compile_keeps_the_keys() -> None:
    plain, compiled = Encoder.tiny(50), Encoder.tiny(50, compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert compiled.encoder_config()["compile"] is True
    # Traces as the real one does, needs no compiler.
    compiled.model.compile(backend="eager", dynamic=True)
    ids, mask = batch()
    torch.testing.assert_close(
        compiled.eval()(ids, mask), plain.eval()(ids, mask), rtol=1e-5, atol=1e-6
    )
    assert plain.state_dict().keys() == compiled.state_dict().keys()


def test_import_loads_no_transformers() -> None:
    code = "import sys, xmlkernels.nn.encoder; sys.exit('transformers' in sys.modules)"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, timeout=300).returncode == 0
