"""The short loop for batches made on the spot."""

from __future__ import annotations

import itertools

import pytest
import torch

from reformer_lm import InputError, ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.training.fitting import fit
from reformer_lm.training.optimization import BETAS, LearningRateSchedule, split_by_decay


def make_model() -> ReformerLMForCausalLM:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bucket_size=4,
    )
    return ReformerLMForCausalLM(config)


def batches(count: int = 100) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(20, (3, 13), generator=generator) for _ in range(count)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in made]


def test_it_is_the_loop_written_out() -> None:
    model, other = make_model(), make_model().train()
    losses = fit(model, batches(), steps=12, learning_rate=0.01, warmup_steps=3, max_grad_norm=0.5, progress=False)
    decayed, spared = split_by_decay(other)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=BETAS, fused=True)
    schedule = LearningRateSchedule(0.01, total_steps=12, warmup_steps=3)
    expected = []
    for step, batch in enumerate(batches(12)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = other(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert losses == expected
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not model.training


def test_it_learns_and_neither_needs_nor_moves_the_global_seed() -> None:
    model, again = make_model(), make_model()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    losses = fit(model, itertools.repeat(batches(1)[0]), steps=25, learning_rate=0.02, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[-1] < losses[0] / 2
    assert fit(again, itertools.repeat(batches(1)[0]), steps=25, learning_rate=0.02, progress=False) == losses


def test_what_cannot_go_on_is_explained() -> None:
    with pytest.raises(InputError, match="5 steps were asked for, but there were only 3 batches"):
        fit(make_model(), batches(3), steps=5, learning_rate=0.01, progress=False)
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="loss of step 1 is not finite"):
        fit(model, batches(3), steps=2, learning_rate=0.01, progress=False)
