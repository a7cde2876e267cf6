"""The likelihood of texts: known values, independence of the batch, windows, edge cases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_models import BEGIN, END, FIRST, NEWLINE, SECOND, THIRD, bigram, random_texts

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.errors import InputError
from reformer_lm.scoring import Score, ScoreTotals, score, score_stream
from reformer_lm.scoring.batches import TOKENS_PER_BATCH, rows_to_run
from reformer_lm.text import load_tokenizer

# --- known values


def test_perplexity_of_known_probabilities(tokenizer):
    (result,) = score(bigram(), tokenizer, ["甲乙"])
    assert result.tokens == 2
    # 1/2 for the first after the article start, 1/8 for the second: the geometric mean is 1/4.
    assert result.ppl == pytest.approx(4, rel=1e-14)
    assert result.nll == pytest.approx(math.log(16), rel=1e-14)
    assert result.surprisals == pytest.approx([math.log(2), math.log(8)], rel=1e-14)
    assert result.token_ids == (FIRST, SECOND)


def test_first_token_is_conditioned_on_the_article_start(tokenizer):
    first, second = score(bigram(), tokenizer, ["甲", "乙"])
    assert (first.tokens, second.tokens) == (1, 1)
    assert first.ppl == pytest.approx(2, rel=1e-14)
    assert second.ppl == pytest.approx(4, rel=1e-14)


def test_end_of_article_is_scored_on_request_only(tokenizer):
    (without,) = score(bigram(), tokenizer, ["甲"])
    (with_end,) = score(bigram(), tokenizer, ["甲"], add_eos=True)
    assert without.token_ids == (FIRST,)
    assert with_end.token_ids == (FIRST, END)
    assert with_end.nll == pytest.approx(math.log(2) + math.log(4), rel=1e-14)
    assert with_end.characters == 1


def test_newline_is_a_scored_token(tokenizer):
    (result,) = score(bigram(), tokenizer, ["丙\n甲"])
    assert result.token_ids == (THIRD, NEWLINE, FIRST)
    assert result.nll == pytest.approx(math.log(4) + math.log(2), rel=1e-14)


def test_per_character_measures(tokenizer):
    (result,) = score(bigram(), tokenizer, ["甲乙"])
    assert result.characters == 2
    assert result.ppl_per_character == pytest.approx(4, rel=1e-14)
    assert result.bits_per_character == pytest.approx(2, rel=1e-14)
    # A hanzi has three bytes in UTF-8.
    assert result.bits_per_byte == pytest.approx(2 / 3, rel=1e-14)


def test_impossible_token_has_infinite_perplexity(tokenizer):
    (result,) = score(bigram(), tokenizer, ["丁"])
    assert result.nll == math.inf
    assert result.ppl == math.inf


def test_enormous_surprisal_does_not_overflow():
    result = Score(text="甲", nll=1e6, tokens=1, unknown=0, token_ids=(FIRST,), surprisals=(1e6,))
    assert result.ppl == math.inf


def test_low_precision_logits_are_normalised_in_float32(tokenizer):
    low = bigram(dtype=torch.bfloat16)
    (result,) = score(low, tokenizer, ["甲乙甲甲丙"[:3]])
    table = torch.log_softmax(low.log_probabilities.double(), dim=-1)
    expected = -(table[BEGIN, FIRST] + table[FIRST, SECOND] + table[SECOND, FIRST]).item()
    # bfloat16 arithmetic would be wrong in the third digit.
    assert result.nll == pytest.approx(expected, rel=1e-6)


# --- edge cases


@pytest.mark.parametrize("text", ["", " ", "\u200b"])
def test_text_without_tokens_has_a_defined_score(tokenizer, text):
    (result,) = score(bigram(), tokenizer, [text])
    assert (result.tokens, result.nll, result.unknown, result.surprisals) == (0, 0.0, 0, ())
    assert math.isnan(result.ppl)


def test_empty_text_with_its_end_is_one_token(tokenizer, exact_model):
    (result,) = score(exact_model, tokenizer, [""], add_eos=True)
    assert result.tokens == 1
    assert result.ppl == pytest.approx(math.exp(result.nll))
    assert math.isnan(result.ppl_per_character)


def test_no_texts_give_no_scores(tokenizer):
    assert score(bigram(), tokenizer, []) == []


def test_unknown_tokens_are_scored_and_counted(tokenizer):
    (result,) = score(bigram(), tokenizer, ["甲鑫鑫"])
    assert (result.tokens, result.unknown) == (3, 2)
    assert result.nll == pytest.approx(math.log(2) + math.log(8), rel=1e-14)


def test_training_mode_is_restored_and_does_not_disturb(tokenizer, exact_model):
    config = ReformerLMConfig(**{**exact_model.config.to_diff_dict(), "hidden_dropout_prob": 0.5})
    noisy = ReformerLMForCausalLM(config)
    noisy.load_state_dict(exact_model.state_dict())
    noisy.double().train()
    texts = random_texts([20])
    assert score(noisy, tokenizer, texts)[0].nll == pytest.approx(score(exact_model, tokenizer, texts)[0].nll)
    assert noisy.training
    assert all(parameter.grad is None for parameter in noisy.parameters())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"window": 0}, "window"),
        ({"window": 17}, "window"),
        ({"context": 0}, "context"),
        ({"window": 4, "context": 5}, "context"),
    ],
)
def test_bad_options_are_refused_before_any_text_is_read(tokenizer, options, named):
    def texts() -> Iterator[str]:
        raise AssertionError("a text was asked for")
        yield ""

    with pytest.raises(InputError, match=named):
        score_stream(bigram(), tokenizer, texts(), **options)


@pytest.mark.parametrize(("name", "add_eos"), [("bos_token", False), ("eos_token", True)])
def test_tokenizer_without_a_special_token_is_refused(tokenizer, name, add_eos, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    bare = load_tokenizer(tmp_path)
    setattr(bare, name, None)
    with pytest.raises(InputError, match=name):
        score(bigram(), bare, ["甲"], add_eos=add_eos)


# --- the same number in any company


LENGTHS = [3, 1, 17, 0, 30, 63, 64, 65, 100, 5, 5, 16, 200, 2, 33]


def test_scores_equal_the_models_own_loss(tokenizer, exact_model):
    for text in random_texts([1, 5, 40, 64], seed=3):
        sequence = torch.tensor([[BEGIN, *tokenizer.encode(text)]])[:, : exact_model.config.max_position_embeddings]
        loss = exact_model(sequence, labels=sequence).loss
        (result,) = score(exact_model, tokenizer, [text[: sequence.shape[1] - 1]])
        assert result.nll / result.tokens == pytest.approx(loss.item(), abs=1e-12)


@pytest.mark.parametrize(("precision", "tolerance"), [("exact_model", 1e-9), ("model", 1e-4)])
def test_alone_batched_shuffled_and_any_batch_size_agree(request, tokenizer, precision, tolerance):
    language_model = request.getfixturevalue(precision)
    texts = random_texts(LENGTHS, seed=1)
    batched = score(language_model, tokenizer, texts)
    assert [result.text for result in batched] == texts
    assert [result.tokens for result in batched] == LENGTHS
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = score(language_model, tokenizer, [texts[index] for index in order])
    others = {
        "alone": [score(language_model, tokenizer, [text])[0] for text in texts],
        "shuffled": [shuffled[order.index(index)] for index in range(len(texts))],
        "batch size 1": score(language_model, tokenizer, texts, batch_size=1),
        "batch size 5": score(language_model, tokenizer, texts, batch_size=5),
    }
    for name, results in others.items():
        for ours, theirs in zip(batched, results, strict=True):
            assert theirs.text == ours.text
            assert theirs.surprisals == pytest.approx(ours.surprisals, abs=tolerance), name


def test_two_runs_agree_to_the_last_bit(model, tokenizer):
    texts = random_texts(LENGTHS, seed=4)
    assert score(model, tokenizer, texts) == score(model, tokenizer, texts)


def test_prefix_of_a_text_has_the_same_surprisals(tokenizer, exact_model):
    (text,) = random_texts([60], seed=5)
    whole, part = score(exact_model, tokenizer, [text, text[:23]])
    assert part.surprisals == pytest.approx(whole.surprisals[:23], abs=1e-9)


def test_chunked_attention_sees_no_padding(tokenizer):
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bucket_size=8,
        lsh_mask="chunked",
        initializer_range=0.3,
    )
    chunked = ReformerLMForCausalLM(config).double().eval()
    # Within the window: beyond it, a text's first window is the longest possible, and never padded anyway.
    texts = random_texts([length for length in LENGTHS if 0 < length <= 64], seed=8)
    for result in score(chunked, tokenizer, texts):
        inputs, targets = torch.tensor([[BEGIN, *result.token_ids[:-1]]]), torch.tensor([result.token_ids])
        log_probabilities = torch.log_softmax(chunked(inputs).logits, dim=-1)
        expected = -log_probabilities.gather(-1, targets[..., None]).flatten()
        assert result.surprisals == pytest.approx(expected.tolist(), abs=1e-9)


def test_no_batch_is_larger_than_promised(tokenizer):
    window = 2 * TOKENS_PER_BATCH
    recorder = bigram(window=window)
    texts = ["甲" * length for length in (3000, 3000, 3000, *[20] * 9, window, 5)]
    score(recorder, tokenizer, texts, batch_size=4)
    # The last but for one text is too short to fill a batch; it is filled with empty rows.
    assert recorder.shapes[0] == (rows_to_run(1, 8), 8)
    assert max(rows for rows, _ in recorder.shapes[1:]) == 4
    assert all(rows * length <= TOKENS_PER_BATCH or rows == 1 for rows, length in recorder.shapes)


# --- texts longer than the window


@given(text=st.text(alphabet="甲乙丙", min_size=0, max_size=70), window=st.integers(1, 16), data=st.data())
def test_windows_do_not_change_a_markov_chain(tokenizer, text, window, data):
    context = data.draw(st.integers(1, window))
    language_model = bigram(window=window)
    (result,) = score(language_model, tokenizer, [text], context=context)
    table = language_model.log_probabilities
    ids = [BEGIN, *tokenizer.encode(text)]
    expected = [-table[before, after].item() for before, after in pairwise(ids)]
    assert result.surprisals == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_context_is_half_of_the_window_by_default(tokenizer, exact_model):
    (text,) = random_texts([150], seed=6)
    (default,) = score(exact_model, tokenizer, [text])
    (half,) = score(exact_model, tokenizer, [text], window=64, context=32)
    (least,) = score(exact_model, tokenizer, [text], context=1)
    assert default.surprisals == half.surprisals
    assert default.surprisals[:64] == pytest.approx(least.surprisals[:64], abs=1e-9)
    assert default.nll != pytest.approx(least.nll, abs=1e-3)


def test_tokens_behind_the_first_window_see_their_context(tokenizer, exact_model):
    (text,) = random_texts([80], seed=7)
    (result,) = score(exact_model, tokenizer, [text], window=64, context=40)
    ids = torch.tensor([[BEGIN, *tokenizer.encode(text)]])
    # Token 64 of the text is predicted from the 40 tokens that end with number 63.
    log_probabilities = torch.log_softmax(exact_model(ids[:, 25:65]).logits[0, -1], dim=-1)
    assert result.surprisals[64] == pytest.approx(-log_probabilities[ids[0, 65]].item(), abs=1e-9)


# --- many texts


def test_texts_are_taken_as_needed(tokenizer, monkeypatch):
    monkeypatch.setattr("reformer_lm.scoring.stream.TEXTS_PER_BLOCK", 4)
    taken = []

    def texts() -> Iterator[str]:
        for number in range(100):
            taken.append(number)
            yield "甲" * (number % 7)

    results = score_stream(bigram(), tokenizer, texts())
    assert next(results).tokens == 0
    assert len(taken) == 4
    assert [result.tokens for result in results] == [number % 7 for number in range(1, 100)]


def test_totals_name_both_averages(tokenizer):
    totals = ScoreTotals()
    for result in score(bigram(), tokenizer, ["甲乙", "", "甲甲甲鑫"]):
        totals.add(result)
    assert (totals.texts, totals.scored_texts, totals.tokens, totals.unknown) == (3, 2, 6, 1)
    # 1/2 * 1/8 and 1/2 * 1/2 * 1/2 * 1/8: perplexities 16 ** (1/2) and 64 ** (1/4).
    assert totals.ppl == pytest.approx(1024 ** (1 / 6), rel=1e-12)
    assert totals.mean_ppl == pytest.approx((4 + 64**0.25) / 2, rel=1e-12)
    assert totals.ppl_per_character == pytest.approx(1024 ** (1 / 6), rel=1e-12)


def test_totals_of_nothing_are_not_a_number():
    totals = ScoreTotals()
    assert math.isnan(totals.ppl)
    assert math.isnan(totals.mean_ppl)
