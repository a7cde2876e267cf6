"""Encoder and decoder: what the target sees of the source, decoding from a cache, and life inside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from reformer_lm import LSHCache, ReformerEncDecConfig, ReformerLMConfig, ReformerLMForConditionalGeneration

EXACT = {"rtol": 0.0, "atol": 1e-9}
SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "bucket_size": 8,
    "num_hashes": 2,
    "initializer_range": 0.4,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_model(encoder: dict[str, Any] | None = None, **decoder: Any) -> ReformerLMForConditionalGeneration:
    torch.manual_seed(0)
    config = ReformerEncDecConfig(SIZES | (encoder or {}), SIZES | TOKENS | decoder)
    return ReformerLMForConditionalGeneration(config).double().eval()


def tokens_like(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


CAUSAL: list[dict[str, Any]] = [
    {},
    {"num_mem_kv": 2, "full_attention_threshold": 9},
    {"position_type": "rotary", "num_local_heads": 0, "allow_duplicate_attention": False},
    {"num_local_heads": [4, 2], "num_shifted_heads": [0, 1], "attn_chunks": 3},
]


@pytest.mark.parametrize("decoder", CAUSAL, ids=str)
def test_a_prefix_of_the_target_has_the_logits_it_has_in_the_whole(decoder: dict[str, Any]) -> None:
    model = make_model(**decoder)
    source, target = tokens_like(2, 37, 0), tokens_like(2, 50, 1)
    with torch.no_grad():
        whole = model(source, decoder_input_ids=target).logits
        for cut in (1, 8, 33):
            part = model(source, decoder_input_ids=target[:, :cut]).logits
            torch.testing.assert_close(part, whole[:, :cut], **EXACT)
        other = model(tokens_like(2, 37, 5), decoder_input_ids=target).logits
    assert (other - whole).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("decoder", CAUSAL, ids=str)
@pytest.mark.parametrize("first", [1, 6])
def test_decoding_from_the_cache_equals_the_whole(decoder: dict[str, Any], first: int) -> None:
    model = make_model(**decoder)
    source, target = tokens_like(3, 37, 0), tokens_like(3, 40, 1)
    mask = torch.arange(37) < torch.tensor([[37], [5], [20]])
    with torch.no_grad():
        whole = model(source, attention_mask=mask, decoder_input_ids=target).logits
        out = model(source, attention_mask=mask, decoder_input_ids=target[:, :first], use_cache=True)
        parts = [out.logits]
        cache = out.past_key_values
        assert isinstance(cache, LSHCache)
        for begin, end in ((first, first + 1), (first + 1, 20), (20, 21), (21, 40)):
            # The source is remembered.
            parts.append(model(decoder_input_ids=target[:, begin:end], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)
        # Rows may be taken in another order, and steps taken back.
        rows = torch.tensor([2, 0])
        cache.crop(30)
        held = cache.bytes()
        cache.batch_select_indices(rows)
        assert cache.bytes() < held
        again = model(decoder_input_ids=target[rows, 30:], past_key_values=cache).logits
        torch.testing.assert_close(again, whole[rows, 30:], **EXACT)
        with pytest.raises(ValueError, match="keys cannot be used with a cache that holds tokens"):
            model.decoder(target[rows, :1], keys=torch.zeros(2, 3, 24).double(), past_key_values=cache)


@pytest.mark.parametrize("chunked", [False, True])
def test_padding_of_source_and_target_changes_nothing(chunked: bool) -> None:
    model = make_model(**({"lsh_mask": "chunked", "sort_padding": False} if chunked else {}))
    lengths = [(37, 20), (5, 1), (20, 20), (20, 13)]
    source, target = tokens_like(4, 40, 0), tokens_like(4, 20, 1)
    mask = torch.stack([functional.pad(torch.ones(s, dtype=torch.long), (40 - s, 0)) for s, _ in lengths])
    target_mask = torch.stack([functional.pad(torch.ones(t, dtype=torch.long), (0, 20 - t)) for _, t in lengths])
    with torch.no_grad():
        given = {"attention_mask": mask, "decoder_input_ids": target, "decoder_attention_mask": target_mask}
        padded = model(source, **given).logits
        for row, (s, t) in enumerate(lengths):
            alone = model(source[row : row + 1, 40 - s :], decoder_input_ids=target[row : row + 1, :t]).logits
            torch.testing.assert_close(padded[row, :t], alone[0], **EXACT)


def test_the_loss_is_that_of_the_target_with_gradients_in_both_parts() -> None:
    model = make_model()
    source, labels = tokens_like(2, 30, 0), tokens_like(2, 12, 1)
    labels[1, 7:] = -100
    out = model(source, labels=labels)
    given = torch.cat((torch.ones(2, 1, dtype=torch.long), labels[:, :-1]), dim=1).masked_fill(labels == -100, 0)
    given[1, 7] = labels[1, 6]
    logits = model(source, decoder_input_ids=given).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected, **EXACT)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for threshold in (0, 1000):
        for stack in (model.encoder.stack, model.decoder.reformer.stack):
            stack.reversible_threshold = threshold
        found.append(torch.autograd.grad(model(source, labels=labels).loss, parameters))
    found.append(torch.autograd.grad(expected, parameters))
    for one, two, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, **EXACT)
        torch.testing.assert_close(two, three, **EXACT)
        assert three.abs().sum() > 0
    assert isinstance(model(source, labels=labels, return_dict=False), tuple)


def test_hidden_states_and_attention_weights() -> None:
    model = make_model({"num_hidden_layers": 3}, num_local_heads=[2, 4], num_shifted_heads=0, num_mem_kv=1)
    source, target = tokens_like(2, 30, 0), tokens_like(2, 12, 1)
    out = model(source, decoder_input_ids=target, output_hidden_states=True, output_attentions=True)
    assert (len(out.encoder_hidden_states), len(out.decoder_hidden_states)) == (4, 3)
    assert [w.shape for w in out.encoder_attentions] == [(2, 4, 30, 30)] * 3
    assert [w.shape for w in out.decoder_attentions] == [(2, 4, 12, 12)] * 2
    assert [w.shape for w in out.cross_attentions] == [(2, 4, 12, 30)] * 2
    # Local heads, the first two, do not see the source; nor does the second layer, of local heads alone.
    assert not out.cross_attentions[0][:, :2].any() and not out.cross_attentions[1].any()
    assert out.cross_attentions[0][:, 2:].sum(dim=-1).min() > 0.01
    assert torch.equal(out.encoder_last_hidden_state, out.encoder_hidden_states[-1])


@pytest.mark.parametrize("decoder", [{}, {"lsh_mask": "chunked"}], ids=str)
def test_greedy_generation_is_the_best_token_at_each_step(decoder: dict[str, Any]) -> None:
    model = make_model(**decoder)
    source = tokens_like(1, 25, 0)
    made = model.generate(source, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert made.shape == (1, 11) and made[0, 0] == 1
    with torch.no_grad():
        for t in range(10):
            logits = model(source, decoder_input_ids=made[:, : t + 1]).logits[0, -1]
            assert logits.argmax() == made[0, t + 1]
    if not decoder:
        without = model.generate(source, max_new_tokens=10, do_sample=False, eos_token_id=None, use_cache=False)
        assert torch.equal(without, made)


def test_batched_generation_with_beams_and_a_begun_target() -> None:
    model = make_model()
    sources = [tokens_like(1, 25, 0), tokens_like(1, 14, 1)]
    batch = torch.cat((sources[0], functional.pad(sources[1], (0, 11))))
    mask = torch.arange(25) < torch.tensor([[25], [14]])
    for options in ({}, {"num_beams": 3}, {"decoder_input_ids": torch.tensor([[1, 7, 9]])}):
        options = options | {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        alone = torch.cat([model.generate(source, **options) for source in sources])
        if "decoder_input_ids" in options:
            options["decoder_input_ids"] = options["decoder_input_ids"].expand(2, -1)
        assert torch.equal(model.generate(batch, attention_mask=mask.long(), **options), alone)
    torch.manual_seed(0)
    sampled = model.generate(sources[0], max_new_tokens=6, do_sample=True, num_return_sequences=4)
    assert len({tuple(row) for row in sampled.tolist()}) > 1
    with pytest.raises(ValueError, match="more than the decoder's max_position_embeddings"):
        model.generate(sources[0], max_new_tokens=160)


def test_save_and_load(tmp_path: Path) -> None:
    model = make_model({"vocab_size": 40}, lsh_mask="chunked").float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ReformerEncDecConfig) and isinstance(config.decoder, ReformerLMConfig)
    assert config.encoder.to_dict() == model.config.encoder.to_dict()
    # Both parts are written out, defaults and all.
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["encoder"]["causal"] is False and written["decoder"]["num_hashes"] == 2
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 2, 1)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(loaded, ReformerLMForConditionalGeneration)
    assert loaded.decoder.lm_head.weight is loaded.decoder.get_input_embeddings().weight
    source, target = tokens_like(2, 20, 0), tokens_like(2, 9, 1)
    assert torch.equal(loaded(source, decoder_input_ids=target).logits, model(source, decoder_input_ids=target).logits)


def test_initial_weights_are_those_of_the_parts() -> None:
    model = make_model({"initializer_range": 0.05}, initializer_range=0.01)
    for part, std in ((model.encoder, 0.05), (model.decoder.reformer, 0.01)):
        assert part.stack.layers[0].attention.value.weight.std().item() == pytest.approx(std, rel=0.1)


def test_a_larger_vocabulary() -> None:
    model = make_model()
    model.resize_token_embeddings(40)
    assert (model.config.encoder.vocab_size, model.config.decoder.vocab_size) == (40, 40)
    assert model(tokens_like(1, 9, 0) + 9, decoder_input_ids=tokens_like(1, 5, 0) + 9).logits.shape == (1, 5, 40)
    with pytest.raises(ValueError, match="vocabularies of 33 and 31 tokens"):
        make_model({"vocab_size": 33}).resize_token_embeddings(40)


@pytest.mark.parametrize(
    ("encoder", "decoder", "words"),
    [
        ({"hidden_size": 32}, {"hidden_size": 64}, "encoder.hidden_size=32 is not possible"),
        ({}, {"causal": False, "lsh_mask": "chunked"}, "decoder.causal=False is not possible"),
        ({}, {"num_local_heads": 8}, "decoder.num_local_heads=8 is not possible"),
        ({"num_hashes": 0}, {}, "num_hashes=0 is not possible"),
    ],
)
def test_parts_that_do_not_fit(encoder: dict[str, Any], decoder: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReformerEncDecConfig(encoder, decoder)


def test_nothing_to_begin_with() -> None:
    model = make_model()
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="nothing to begin the target with"):
        model(tokens_like(1, 5, 0), labels=tokens_like(1, 4, 0))


def test_trainer_of_transformers_learns_to_copy(tmp_path: Path) -> None:
    model = make_model({"initializer_range": 0.02}, initializer_range=0.02).float()
    rows = tokens_like(8, 6, 0)
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    before = model(rows, labels=rows).loss.item()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Seq2SeqTrainer(model=model, args=arguments, train_dataset=dataset).train()
    model.eval()
    assert model(rows, labels=rows).loss.item() < before / 2
