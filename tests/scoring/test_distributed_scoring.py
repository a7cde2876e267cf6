"""Scoring in two processes: the numbers of one, in the order of the texts."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from language_models import random_texts
from transformers import AutoModelForCausalLM

import reformer_lm
from reformer_lm.errors import InputError
from reformer_lm.scoring import check_options, distributed, score, score_distributed, stream
from reformer_lm.text import load_tokenizer

OPTIONS = {
    "batch_size": None, "batch_tokens": 256, "add_eos": True, "window": None, "context": None, "stride": None,
    "alternatives": 2,
}  # fmt: skip

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def fail(*arguments: object) -> None:
    raise RuntimeError("no memory")


def work(rank: int, folder: str, port: int, texts: list[str]) -> None:
    """One of the processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    stream.TEXTS_PER_BLOCK = 7
    assert reformer_lm.ReformerLMForCausalLM
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    options = check_options(model, tokenizer, **OPTIONS)
    found = list(score_distributed(model, tokenizer, texts, options))
    Path(folder, f"scores-{rank}").write_bytes(pickle.dumps(found))
    if rank == 1:
        distributed.score_block = fail
    try:
        list(score_distributed(model, tokenizer, texts, options))
    except RuntimeError as error:
        Path(folder, f"error-{rank}").write_text(str(error), encoding="utf-8")
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(model, tokenizer, tmp_path):
    texts = random_texts([5, 0, 30, 64, 100, 3, 17, 40, 2, 9, 33], seed=1) * 3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(str(tmp_path), port, texts), nprocs=2)
    first, second = (pickle.loads((tmp_path / f"scores-{rank}").read_bytes()) for rank in range(2))
    assert second == []
    expected = score(model, tokenizer, texts, batch_tokens=256, add_eos=True, alternatives=2)
    assert [s.text for s in first] == texts
    for ours, theirs in zip(first, expected, strict=True):
        assert ours.surprisals == pytest.approx(theirs.surprisals, abs=1e-5)
        assert ours.token_ids == theirs.token_ids
    # What goes wrong in one ends the other, too.
    assert [(tmp_path / f"error-{rank}").read_text(encoding="utf-8") for rank in range(2)] == ["no memory"] * 2


def test_without_a_group_it_is_scoring(model, tokenizer):
    texts = random_texts([5, 30], seed=2)
    options = check_options(model, tokenizer, **{**OPTIONS, "add_eos": False, "alternatives": 0})
    assert list(score_distributed(model, tokenizer, texts, options)) == score(model, tokenizer, texts)
    with pytest.raises(InputError):
        list(score_distributed(model, tokenizer, texts, options, prefixes=["甲"]))
