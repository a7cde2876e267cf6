"""TrainingWrapper: losses over tensors and uneven lists, generation."""

from __future__ import annotations

import pytest
import torch

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM, TrainingWrapper
from reformer_lm.wrapper import top_k, top_p


@pytest.fixture
def wrapper() -> TrainingWrapper:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
        bucket_size=4,
    )  # fmt: skip
    return TrainingWrapper(ReformerLMForCausalLM(config).double())


def test_loss_of_a_tensor(wrapper: TrainingWrapper) -> None:
    x = torch.randint(1, 20, (3, 17))
    logits = wrapper(x[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:])
    torch.testing.assert_close(wrapper(x, return_loss=True), expected)


def test_loss_of_uneven_rows_counts_real_tokens_only(wrapper: TrainingWrapper) -> None:
    # Zeros are real tokens here as well as the padding value.
    rows = [torch.randint(0, 20, (length,)) for length in (5, 17, 2)]
    sums = [wrapper(row[None], return_loss=True) * (len(row) - 1) for row in rows]
    torch.testing.assert_close(wrapper(rows, return_loss=True), sum(sums) / (4 + 16 + 1))
    assert wrapper(rows).shape == (3, 17, 20)


def test_ignore_index_is_a_token_that_is_not_scored(wrapper: TrainingWrapper) -> None:
    wrapper.ignore_index = 7
    x = torch.randint(1, 20, (2, 17))
    x[:, 5] = 7
    logits = wrapper(x[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], ignore_index=7)
    torch.testing.assert_close(wrapper(x, return_loss=True), expected)


def test_input_mask_hides_left_padding(wrapper: TrainingWrapper) -> None:
    x = torch.randint(1, 20, (1, 12))
    padded = torch.nn.functional.pad(x, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(x, dtype=torch.bool), (4, 0))
    torch.testing.assert_close(wrapper(padded, input_mask=mask)[:, 4:], wrapper(x))
    torch.testing.assert_close(wrapper(padded, return_loss=True, input_mask=mask), wrapper(x, return_loss=True))


def test_generate_returns_new_tokens_of_the_prompts_rank(wrapper: TrainingWrapper) -> None:
    wrapper.train()
    assert wrapper.generate(torch.tensor([1, 2, 3]), 5).shape == (5,)
    assert wrapper.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]), 5).shape == (2, 5)
    assert wrapper.net.training
    # Past the longest sequence it goes on with the last tokens.
    assert wrapper.generate(torch.tensor([1]), 40).shape == (40,)


@pytest.mark.parametrize("prompt", [[[1, 2, 3], [4, 5, 6]], [[7]]])
def test_generated_tokens_are_the_same_with_and_without_a_cache(wrapper: TrainingWrapper, prompt: list) -> None:
    prompt = torch.tensor(prompt)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    mask[0, :-1] = False
    texts = []
    # Any further argument to the net means no cache. Past the longest sequence there is none either.
    for options in ({}, {"output_hidden_states": False}):
        torch.manual_seed(3)
        texts.append(wrapper.generate(prompt, 45, input_mask=mask, **options))
    assert torch.equal(*texts)


def test_generate_reads_each_token_once(wrapper: TrainingWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    forward = wrapper.net.forward
    monkeypatch.setattr(wrapper.net, "forward", lambda x, **options: read.append(x.shape[1]) or forward(x, **options))
    wrapper.generate(torch.tensor([1, 2, 3]), 6)
    assert read == [3, 1, 1, 1, 1, 1]


def test_generate_follows_the_filter_and_the_temperature(wrapper: TrainingWrapper) -> None:
    def best_only(logits: torch.Tensor, thres: float) -> torch.Tensor:
        assert thres == 0.5
        return logits.masked_fill(logits < logits.max(dim=-1, keepdim=True).values, -torch.inf)

    prompt = torch.tensor([3, 1, 4])
    greedy = wrapper.generate(prompt, 6, filter_logits_fn=best_only, filter_thres=0.5)
    cold = wrapper.generate(prompt, 6, temperature=1e-6)
    tokens = prompt
    for _ in range(6):
        tokens = torch.cat((tokens, wrapper(tokens[None])[0, -1].argmax()[None]))
    assert torch.equal(greedy, tokens[3:])
    assert torch.equal(cold, tokens[3:])


def test_generate_stops_and_fills_with_the_end_token(wrapper: TrainingWrapper) -> None:
    def end_first_row(logits: torch.Tensor, thres: float) -> torch.Tensor:
        forced = torch.full_like(logits, -torch.inf)
        forced[0, 9] = 0.0
        forced[1:, 5] = 0.0
        return forced

    out = wrapper.generate(torch.tensor([[1], [2]]), 4, eos_token=9, filter_logits_fn=end_first_row)
    assert out.tolist() == [[9, 9, 9, 9], [5, 5, 5, 5]]
    assert wrapper.generate(torch.tensor([[1]]), 4, eos_token=9, filter_logits_fn=end_first_row).tolist() == [[9]]


def test_filters() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert torch.isfinite(top_k(logits, thres=0.5)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(top_k(logits, thres=0.99)).tolist() == [[True, False, False, False]]
    assert torch.isfinite(top_p(logits, thres=0.3)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(top_p(logits, thres=0.99)).tolist() == [[True, False, False, False]]
