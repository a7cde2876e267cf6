"""A text's likelihood is the product of its parts', each given what stands before it."""

from __future__ import annotations

import math

import pytest
import torch
from language_models import HANZI, random_texts

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.errors import InputError
from reformer_lm.scoring import score
from reformer_lm.scoring.batches import cut_windows


def gaps(model, tokenizer, pairs: list[tuple[str, str]]) -> list[float]:
    """How far ln P(ab) is from ln P(a) + ln P(b | a)."""
    whole = score(model, tokenizer, [a + b for a, b in pairs])
    first = score(model, tokenizer, [a for a, _ in pairs])
    second = score(model, tokenizer, [b for _, b in pairs], prefixes=[a for a, _ in pairs])
    return [abs(ab.nll - a.nll - b.nll) for ab, a, b in zip(whole, first, second, strict=True)]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    first = random_texts([1, 5, 20, 31, 40, 12], seed=1)
    second = random_texts([1, 20, 3, 31, 23, 50], seed=2)
    return list(zip(first, second, strict=True))


def test_the_chain_rule_holds_for_exactly_causal_attention(exact_model, tokenizer, pairs):
    for gap in gaps(exact_model, tokenizer, pairs):
        assert gap < 1e-10


def test_the_chain_rule_fails_for_chunked_attention(model, tokenizer, pairs):
    """There what follows moves chunk boundaries, and with them the probabilities of what stands before."""
    config = ReformerLMConfig(**{**model.config.to_diff_dict(), "lsh_mask": "chunked"})
    torch.manual_seed(0)
    chunked = ReformerLMForCausalLM(config).double().eval()
    assert max(gaps(chunked, tokenizer, pairs)) > 1e-2


def test_prefixes_may_fill_the_window_and_more(exact_model, tokenizer):
    window = exact_model.config.max_position_embeddings
    for length in (window - 1, window, window + 1, 3 * window):
        (prefix,), (text,) = random_texts([length], seed=5), random_texts([10], seed=6)
        (result,) = score(exact_model, tokenizer, [text], prefixes=[prefix], context=window // 2)
        assert result.tokens == 10
        # The last token is read with at least half a window before it.
        ids = torch.tensor([tokenizer.encode(prefix + text)])
        assert math.isfinite(result.nll) and ids.shape[1] == length + 10


@pytest.mark.parametrize("first", [0, 3, 7, 8, 9, 30])
@pytest.mark.parametrize("context", [1, 4, 8])
def test_windows_behind_a_prefix_score_each_token_once(first, context):
    sequence = list(range(41))
    windows = cut_windows(0, sequence, window=8, context=context, first=first)
    scored = [place for window in windows for place in range(window.first_scored, window.end_scored)]
    assert scored == list(range(first, 40))
    for window in windows:
        assert len(window.inputs) <= 8
        assert window.targets[-1] == sequence[window.end_scored]
        before = len(window.inputs) - (window.end_scored - window.first_scored)
        assert before >= min(context - 1, window.first_scored)


@pytest.mark.parametrize("prefixes", [["甲"], ["甲", "乙", "丙"]])
def test_as_many_prefixes_as_texts(model, tokenizer, prefixes):
    with pytest.raises(InputError, match="prefixes"):
        score(model, tokenizer, ["甲", "乙"], prefixes=prefixes)


def test_ranks_and_alternatives_are_those_of_the_whole_distribution(exact_model, tokenizer):
    (text,) = random_texts([30], seed=7)
    (result,) = score(exact_model, tokenizer, [text], alternatives=3)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
    log_probabilities = torch.log_softmax(exact_model(ids).logits[0, :-1], dim=-1)
    assert len(result.ranks) == len(result.alternatives) == 30
    for place, token in enumerate(result.token_ids):
        row = log_probabilities[place]
        assert result.ranks[place] == 1 + sum(value > row[token] for value in row)
        values, likeliest = row.sort(descending=True)
        assert [pair[0] for pair in result.alternatives[place]] == likeliest[:3].tolist()
        assert [pair[1] for pair in result.alternatives[place]] == pytest.approx(values[:3].tolist(), abs=1e-10)
    (everything,) = score(exact_model, tokenizer, [text[:2]], alternatives=10_000)
    assert len(everything.alternatives[0]) == len(tokenizer)
    assert len(HANZI) < len(tokenizer)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stride": 0}, "stride"),
        ({"stride": 65}, "stride"),
        ({"stride": 16, "context": 16}, "a context of 49"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"alternatives": -1}, "alternatives"),
    ],
)
def test_options_that_do_not_fit(model, tokenizer, options, named):
    with pytest.raises(InputError, match=named):
        score(model, tokenizer, ["甲"], **options)
    assert score(model, tokenizer, ["甲"], stride=16, context=49)
