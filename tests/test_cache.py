"""Going on with a text from a cache: what the whole forward pass gives, token by token, and through generate()."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reformer_lm import LSHCache, ReformerLMConfig, ReformerLMForCausalLM, record_attention

TIGHT = {"rtol": 0.0, "atol": 1e-9}
OPTIONS = [
    {},
    {"local_keys": "shared", "local_rotary": False, "key_norm": "unit"},
    {"position_type": "rotary", "num_local_heads": 0},
    {"position_type": "none", "num_local_heads": [4, 0, 1], "num_shifted_heads": [0, 2, 3]},
    {"position_type": "sinusoidal", "num_local_heads": 4},
    {"full_attention_threshold": 20, "num_mem_kv": 2},
    {"allow_duplicate_attention": False, "lsh_window": 3, "num_hashes": 3},
    {"num_buckets": 2, "local_window": 5, "attn_chunks": 2, "ff_chunk_size": 7},
    {"embedding_size": 12, "norm_type": "scalenorm", "ff_activation": "swiglu", "rehash": "step"},
    {"share_layer_weights": True, "one_value_head": True, "num_mem_kv": 2, "key_norm": "rms_eps"},
    {"num_buckets": [2, 6, 4], "merge_streams": "concatenate", "unit_output_vectors": True},
    {"product_key_layers": [0, 2], "product_keys": 12},
]


def make_model(**options: object) -> ReformerLMForCausalLM:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=4, max_position_embeddings=200, bucket_size=6,
        eos_token_id=None, bos_token_id=1, pad_token_id=0, **{"num_hashes": 2, "num_hidden_layers": 3, **options},
    )  # fmt: skip
    model = ReformerLMForCausalLM(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> ReformerLMForCausalLM:
    return make_model()


def draw(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_pieces(model: ReformerLMForCausalLM, tokens: Tensor, borders: list[int]) -> Tensor:
    cache = LSHCache(model.config)
    parts = []
    for begin, end in zip([0, *borders], [*borders, tokens.shape[1]], strict=True):
        parts.append(model(tokens[:, begin:end], past_key_values=cache).logits)
        assert cache.get_seq_length() == end
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_step_equals_the_whole_forward_pass(options: dict[str, object]) -> None:
    model = make_model(**options)
    tokens = draw(2, 90)
    with torch.no_grad():
        expected = model(tokens).logits
    # A prompt, single tokens, a piece of several at once; and single tokens from the very first.
    for borders in ([30, *range(31, 60), 75], list(range(1, 90))):
        torch.testing.assert_close(in_pieces(model, tokens, borders), expected, **TIGHT)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 200), borders=st.sets(st.integers(1, 199), max_size=5), seed=st.integers(0, 2**31))
def test_pieces_of_any_length(model: ReformerLMForCausalLM, tokens: int, borders: set[int], seed: int) -> None:
    ids = draw(1, tokens, seed)
    with torch.no_grad():
        expected = model(ids).logits
    cut = sorted(border for border in borders if border < tokens)
    torch.testing.assert_close(in_pieces(model, ids, cut), expected, **TIGHT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("whole_mask", [True, False])
def test_padded_rows_go_on_as_they_would_alone(model: ReformerLMForCausalLM, side: str, whole_mask: bool) -> None:
    lengths, width, more = [40, 1, 23], 40, 30
    texts = draw(3, 100)
    prompt, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        places = slice(width - length, width) if side == "left" else slice(0, length)
        prompt[row, places], mask[row, places] = texts[row, :length], 1
    cache = LSHCache(model.config)
    with torch.no_grad():
        first = model(prompt, attention_mask=mask, past_key_values=cache).logits
        for row, length in enumerate(lengths):
            alone = model(texts[row : row + 1, : length + more]).logits[0]
            torch.testing.assert_close(first[row][mask[row] == 1], alone[:length], **TIGHT)
        assert cache.lengths.tolist() == lengths
        for step in range(more):
            ids = torch.stack([texts[row, length + step : length + step + 1] for row, length in enumerate(lengths)])
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
            given = mask if whole_mask else None
            logits = model(ids, attention_mask=given, past_key_values=cache).logits
        for row, length in enumerate(lengths):
            alone = model(texts[row : row + 1, : length + more]).logits[0, -1]
            torch.testing.assert_close(logits[row, 0], alone, **TIGHT)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 10, "temperature": 0.8},
        {"do_sample": True, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_generated_text_is_the_same_with_and_without_cache(
    model: ReformerLMForCausalLM, options: dict[str, object]
) -> None:
    prompt = draw(2, 30)
    mask = torch.ones_like(prompt)
    prompt[0, :11] = mask[0, :11] = 0
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        texts.append(model.generate(prompt, attention_mask=mask, max_new_tokens=25, use_cache=use_cache, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("assisted", [True, False])
def test_assisted_decoding_gives_the_same_text(model: ReformerLMForCausalLM, assisted: bool) -> None:
    prompt = draw(1, 30)
    expected = model.generate(prompt, max_new_tokens=40, do_sample=False)
    helped = {"assistant_model": make_model(num_hidden_layers=1)} if assisted else {"prompt_lookup_num_tokens": 5}
    assert torch.equal(model.generate(prompt, max_new_tokens=40, do_sample=False, **helped), expected)


def test_a_long_prompt_in_chunks_gives_the_same_text(model: ReformerLMForCausalLM) -> None:
    prompt = draw(1, 120)
    expected = model.generate(prompt, max_new_tokens=10, do_sample=False)
    chunked = model.generate(prompt, max_new_tokens=10, do_sample=False, prefill_chunk_size=32)
    assert torch.equal(chunked, expected)


@pytest.mark.parametrize("back", [1, 5, 60])
def test_cropped_and_continued_equals_fresh(back: int) -> None:
    model = make_model(local_window=70)
    tokens, others = draw(2, 150), draw(2, 60, seed=1)
    cache = LSHCache(model.config)
    with torch.no_grad():
        expected = model(tokens).logits
        model(tokens[:, :100], past_key_values=cache)
        model(others[:, :back], past_key_values=cache)
        cache.crop(-back)
        assert cache.get_seq_length() == 100
        logits = model(tokens[:, 100:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 100:], **TIGHT)


def test_a_positive_number_crops_to_so_many(model: ReformerLMForCausalLM) -> None:
    tokens = draw(1, 40)
    cache = LSHCache(model.config)
    with torch.no_grad():
        model(tokens[:, :30], past_key_values=cache)
        cache.crop(50)
        assert cache.get_seq_length() == 30
        cache.crop(25)
        assert cache.get_seq_length() == 25
        torch.testing.assert_close(
            model(tokens[:, 25:], past_key_values=cache).logits, model(tokens).logits[:, 25:], **TIGHT
        )


def test_rows_are_reordered_repeated_and_selected(model: ReformerLMForCausalLM) -> None:
    tokens = draw(3, 60)
    cache = LSHCache(model.config)
    with torch.no_grad():
        expected = model(tokens).logits
        model(tokens[:, :50], past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 5]))
        rows = torch.tensor([2, 0])
        logits = model(tokens[rows, 50:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[rows, 50:], **TIGHT)


def test_reset_forgets_everything(model: ReformerLMForCausalLM) -> None:
    tokens = draw(2, 40)
    cache = LSHCache(model.config)
    with torch.no_grad():
        model(draw(3, 40, seed=1), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.lengths is None
        torch.testing.assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits, **TIGHT)


def test_a_cache_is_made_only_on_request(model: ReformerLMForCausalLM) -> None:
    tokens = draw(1, 10)
    with torch.no_grad():
        assert model(tokens).past_key_values is None
        cache = model(tokens, use_cache=True).past_key_values
        assert isinstance(cache, LSHCache) and cache.bytes() > 0
        logits, same = model(tokens[:, :1], past_key_values=cache, return_dict=False)
    assert same is cache and logits.shape == (1, 1, 50)


def test_chunked_models_generate_without_a_cache() -> None:
    model = make_model(lsh_mask="chunked")
    prompt = draw(1, 20)
    assert model(prompt, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match='lsh_mask="causal"'):
        LSHCache(model.config)
    text = model.generate(prompt, max_new_tokens=5, do_sample=False)
    for length in range(20, 25):
        assert text[0, length] == model(text[:, :length]).logits[0, -1].argmax()


def test_what_does_not_fit_is_said(model: ReformerLMForCausalLM) -> None:
    cache = LSHCache(model.config)
    model(draw(2, 190), past_key_values=cache)
    with pytest.raises(ValueError, match=r"201 tokens, more than max_position_embeddings \(200\)"):
        model(draw(2, 11), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, and the input has 3"):
        model(draw(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\)"):
        model(draw(2, 1), attention_mask=torch.ones(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="document_ids"):
        model(draw(2, 1), document_ids=torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
    # Nothing of that has changed it.
    assert cache.get_seq_length() == 190
    assert model(draw(2, 10), past_key_values=cache).logits.isfinite().all()


def test_a_text_that_cannot_fit_is_refused_before_it_begins(model: ReformerLMForCausalLM) -> None:
    prompt = draw(2, 190)
    with pytest.raises(ValueError, match=r"come to 201, more than max_position_embeddings \(200\)"):
        model.generate(prompt, max_new_tokens=11)
    # Padding takes no position.
    mask = torch.ones_like(prompt)
    mask[:, :20] = 0
    assert model.generate(prompt, attention_mask=mask, max_new_tokens=30).shape == (2, 220)
    with pytest.raises(ValueError, match="come to 201"):
        model.generate(prompt, attention_mask=mask, max_new_tokens=31)


def test_the_cache_grows_no_further_than_the_model_reads() -> None:
    model = make_model()
    cache = LSHCache(model.config)
    with torch.no_grad():
        model(draw(1, 130), past_key_values=cache)
        model(draw(1, 1), past_key_values=cache)
    assert {layer.lsh.capacity for layer in cache.layers} == {200}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_stays_close_but_for_hashes_that_tie(seed: int, side: str) -> None:
    model = make_model().float()
    tokens, padding = draw(2, 120, seed), torch.zeros(2, 10, dtype=torch.long)
    parts = (padding, tokens[:, :50]) if side == "left" else (tokens[:, :50], padding)
    cache = LSHCache(model.config)
    with torch.no_grad(), record_attention(model) as records:
        expected = model(tokens).logits
    mask = torch.cat([torch.zeros_like(padding) if x is padding else torch.ones_like(x) for x in parts], dim=1)
    with torch.no_grad():
        model(torch.cat(parts, dim=1), attention_mask=mask, past_key_values=cache)
        found = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(50, 120)]
    # A vector on the border of two buckets may fall either way where rounding differs; nothing before it is touched.
    fell_otherwise = torch.zeros(120, dtype=torch.bool)
    for record, layer in zip(records, cache.layers, strict=True):
        fell_otherwise |= (record.buckets != layer.lsh._buckets[..., :120]).flatten(0, 2).any(dim=0)
    same = int((~fell_otherwise).long().cumprod(dim=0).sum())
    assert same > 60, f"{int(fell_otherwise.sum())} of 120 tokens fell into other buckets"
    error = (torch.cat(found, dim=1) - expected[:, 50:]).abs()[:, : same - 50].max()
    assert error < 1e-4 * expected.abs().max()
