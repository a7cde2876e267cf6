"""Mistakes that other tools have made with perplexities, each under its number, and that they are not made here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from language_models import BEGIN, FIRST, SECOND, UNKNOWN, bigram, random_texts
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from reformer_lm.scoring import score


@pytest.fixture(scope="module")
def gpt2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=BEGIN, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> list[float]:
    """Nats of each token, one forward pass for each, of nothing but what stands before it."""
    ids = [BEGIN, *tokenizer.encode(text)]
    found = []
    for place in range(1, len(ids)):
        logits = model(torch.tensor([ids[:place]])).logits[0, -1]
        found.append(-torch.log_softmax(logits, dim=-1)[ids[place]].item())
    return found


def test_evaluate_766_needs_no_pad_token_and_no_map_of_special_tokens(gpt2, tokenizer, tmp_path: Path):
    """evaluate's perplexity asks the tokenizer for attributes that transformers 5 no longer has."""
    tokenizer.save_pretrained(tmp_path)
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="[MASK]")
    assert bare.pad_token is None
    texts = random_texts([3, 20])
    assert [s.nll for s in score(gpt2, bare, texts)] == [s.nll for s in score(gpt2, tokenizer, texts)]


def test_datasets_pr_4108_long_texts_have_a_finite_perplexity(tokenizer):
    """The mean of the nats is exponentiated, never their sum, and in double precision."""
    (result,) = score(bigram(window=512), tokenizer, ["甲乙" * 5000])
    assert result.nll > 1e4
    # P(乙|甲) = 1/8 and P(甲|乙) = 1/2.
    assert result.ppl == pytest.approx(4, rel=1e-4)


def test_mlx_lm_pr_1855_and_axolotl_pr_3988_padding_is_never_scored(gpt2, tokenizer):
    short, long = random_texts([3, 60])
    alone = score(gpt2, tokenizer, [short])[0]
    beside = score(gpt2, tokenizer, [short, long])[0]
    assert alone.tokens == beside.tokens == 3
    assert beside.surprisals == pytest.approx(by_hand(gpt2, tokenizer, short), abs=1e-12)


def test_lmppl_5_no_token_is_added_to_tokenizer_or_model(gpt2, tokenizer):
    """An added [PAD] had random weights and a perplexity of 4e43."""
    before = len(tokenizer), gpt2.get_input_embeddings().weight.clone()
    score(gpt2, tokenizer, random_texts([1, 9, 30]))
    assert len(tokenizer) == before[0]
    assert torch.equal(gpt2.get_input_embeddings().weight, before[1])


def test_lighteval_pr_1252_logits_are_shifted_once(tokenizer):
    """A token is scored by the logits of the place before it: not by its own, and not by those two before."""
    (result,) = score(bigram(), tokenizer, ["甲乙"])
    assert result.surprisals == pytest.approx([math.log(2), math.log(8)])


def test_lm_evaluation_harness_1586_the_start_of_an_article_is_not_its_end(gpt2, tokenizer):
    (text,) = random_texts([10])
    (result,) = score(gpt2, tokenizer, [text])
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
    wrong = gpt2(ids, labels=ids).loss.item() * 10
    assert tokenizer.bos_token_id != tokenizer.eos_token_id
    assert result.nll == pytest.approx(sum(by_hand(gpt2, tokenizer, text)), abs=1e-10)
    assert abs(result.nll - wrong) > 0.1


@pytest.mark.parametrize("stride", [1, 7, 32, 64])
def test_lm_evaluation_harness_369_each_token_once_whatever_the_stride(gpt2, tokenizer, stride):
    (text,) = random_texts([150], seed=3)
    (result,) = score(gpt2, tokenizer, [text], stride=stride)
    assert result.tokens == len(result.surprisals) == 150
    ids = [BEGIN, *tokenizer.encode(text)]
    # Within the first window a token has all before it as context; behind it at least window + 1 - stride.
    for place in range(1, len(ids)):
        if place <= 64:
            begin = 0
        else:
            number = -(-(place - 64) // stride)
            begin = 64 + (number - 1) * stride + 1 - (65 - stride)
        logits = gpt2(torch.tensor([ids[begin:place]])).logits[0, -1]
        expected = -torch.log_softmax(logits, dim=-1)[ids[place]].item()
        assert result.surprisals[place - 1] == pytest.approx(expected, abs=1e-9), place


def test_lingua_46_sums_are_divided_by_what_was_summed(gpt2, tokenizer):
    """The nats of a truncated text were divided by the length of the whole one."""
    (text,) = random_texts([100], seed=4)
    (result,) = score(gpt2, tokenizer, [text])
    assert len(result.surprisals) == result.tokens == 100
    assert result.ppl == pytest.approx(math.exp(math.fsum(result.surprisals) / 100), rel=1e-12)


def test_minicons_51_and_29_the_first_token_counts(gpt2, tokenizer):
    for text in ("甲", "甲乙"):
        (result,) = score(gpt2, tokenizer, [text])
        assert result.tokens == len(text)
        assert result.surprisals == pytest.approx(by_hand(gpt2, tokenizer, text), abs=1e-12)


def test_minicons_18_chinese_has_a_surprisal_for_each_character(gpt2, tokenizer):
    text = "春天\n花 月。"
    (result,) = score(gpt2, tokenizer, [text])
    assert [text[begin:end] for begin, end in result.spans] == ["春", "天", "\n", "花", "月", "。"]
    assert len(result.character_surprisals) == len(text)
    assert result.character_surprisals[4] == 0.0
    assert math.fsum(result.character_surprisals) == pytest.approx(result.nll, rel=1e-12)


def test_a_text_of_nothing_but_unknown_tokens_has_a_score_and_says_so(tokenizer):
    (result,) = score(bigram(), tokenizer, ["甲鑫鑫"])
    assert (result.tokens, result.unknown) == (3, 2)
    assert result.token_ids == (FIRST, UNKNOWN, UNKNOWN)
    (only,) = score(bigram(), tokenizer, ["鑫"], prefixes=["甲"])
    assert (only.tokens, only.unknown, only.nll) == (1, 1, pytest.approx(math.log(8)))


def test_hash_ties_hardly_move_a_score(model, tokenizer):
    """In float32 two buckets may tie to the last bit: other shapes of the same text give the same score to 1e-4."""
    texts = random_texts([5, 17, 33, 64, 100], seed=9)
    together = score(model, tokenizer, texts)
    apart = [score(model, tokenizer, [text], batch_tokens=1)[0] for text in texts]
    for first, second in zip(together, apart, strict=True):
        assert first.surprisals == pytest.approx(second.surprisals, abs=1e-4)


def test_a_known_prefix_gives_known_conditionals(tokenizer):
    (result,) = score(bigram(), tokenizer, ["乙甲"], prefixes=["甲"])
    assert result.token_ids == (SECOND, FIRST)
    assert result.surprisals == pytest.approx([math.log(8), math.log(2)], rel=1e-14)
