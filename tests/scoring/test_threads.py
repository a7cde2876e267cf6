"""Batches that run side by side."""

from __future__ import annotations

import threading

import pytest
import torch

from reformer_lm.scoring import score, threads


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


TEXTS = ["甲乙丙丁" * count for count in (1, 2, 5, 9, 3, 7)]


@pytest.fixture
def recorded(exact_model, monkeypatch):
    """Which thread ran which length, with how many threads of its own, and whether it wanted gradients."""
    calls = []
    forward = exact_model.reformer.forward

    def record(input_ids):
        calls.append((threading.get_ident(), input_ids.shape, torch.get_num_threads(), torch.is_grad_enabled()))
        return forward(input_ids)

    monkeypatch.setattr(exact_model.reformer, "forward", record)
    return calls


@pytest.mark.usefixtures("four_threads")
def test_batches_run_on_threads_of_their_own_and_give_the_same(tokenizer, exact_model, recorded, monkeypatch):
    together = score(exact_model, tokenizer, TEXTS, batch_size=1, alternatives=2)
    workers = {thread for thread, *_ in recorded}
    assert threading.get_ident() not in workers and 1 <= len(workers) <= 4
    assert {(own, gradients) for *_, own, gradients in recorded} == {(1, False)}
    assert torch.get_num_threads() == 4
    recorded.clear()
    monkeypatch.setattr(threads, "MOST_BATCHES_AT_A_TIME", 1)
    assert score(exact_model, tokenizer, TEXTS, batch_size=1, alternatives=2) == together
    assert {(thread, own) for thread, _, own, _ in recorded} == {(threading.get_ident(), 4)}


@pytest.mark.usefixtures("four_threads")
def test_a_fault_in_one_batch_is_raised_and_leaves_the_threads_as_they_were(tokenizer, exact_model, monkeypatch):
    forward = exact_model.reformer.forward

    def fail(input_ids):
        if input_ids.shape[1] == 20:
            raise ValueError("of one batch")
        return forward(input_ids)

    monkeypatch.setattr(exact_model.reformer, "forward", fail)
    with pytest.raises(ValueError, match="of one batch"):
        score(exact_model, tokenizer, TEXTS, batch_size=1)
    assert torch.get_num_threads() == 4
    assert threading.active_count() == 1 or all(not t.name.startswith("ThreadPool") for t in threading.enumerate())


@pytest.mark.usefixtures("four_threads")
def test_a_single_batch_has_all_threads(tokenizer, exact_model, recorded):
    score(exact_model, tokenizer, ["甲乙"])
    assert [(thread, own) for thread, _, own, _ in recorded] == [(threading.get_ident(), 4)]
